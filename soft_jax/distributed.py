"""Several processes, one a host, running one program: what each of them holds of an array, and
what they have to agree on.

With one process every function here is its plain counterpart. All processes must call them in the
same order.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from soft_jax.errors import UserError


def join(others: str) -> None:
    """Meet the other processes of this program; before anything else of jax is used.

    `others` is "auto" where jax finds them itself (TPU pods, Slurm, Open MPI, Kubernetes), or
    "HOST:PORT,INDEX,COUNT": where process 0 listens, which one this is, and how many there are.
    Raises UserError when it can't be read, or no cluster is found; processes that wait for others
    in vain are ended by jax after five minutes.
    """
    try:
        if others == "auto":
            jax.distributed.initialize()
        else:
            address, index, count = others.split(",")
            jax.distributed.initialize(address, int(count), int(index))
    except (
        ValueError,
        RuntimeError,
    ) as error:  # not three parts, no numbers, no cluster found, nobody there
        raise UserError(
            f'distributed: {others!r}: {error}; expected "auto" or "HOST:PORT,INDEX,COUNT", the '
            "same COUNT for all"
        ) from error


def is_primary() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def to_global(tree: Any, sharding: Sharding) -> Any:
    """Arrays that every process has whole, placed by `sharding`. Nothing is sent: each process
    copies its devices' part.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf)))
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree)


def local_to_global(tree: Any, sharding: Sharding) -> Any:
    """Arrays of which each process has its own rows, in the processes' order, as global arrays
    split by `sharding`.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of an array, in every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def all_max(*values: int) -> tuple[int, ...]:
    """The highest of the processes' values, for each argument by itself."""
    if jax.process_count() == 1:
        return values
    return tuple(multihost_utils.process_allgather(np.array(values, np.int32)).max(axis=0).tolist())


Result = TypeVar("Result")


def run_on_all(function: Callable[[], Result]) -> Result:
    """`function()` in the first process, which may make files that the others find, then in the
    others. A UserError in any ends all.
    """
    result, problem = None, None
    for turn in (True, False):
        if is_primary() == turn:
            try:
                result = function()
            except UserError as error:
                problem = error
        if all_max(problem is not None)[0]:
            raise problem or UserError(
                "another process of this run can't go on; its output says why"
            )
    return result


def check_equal(settings: Mapping[str, Any]) -> None:
    """Raise UserError in all processes where their settings, JSON values, are not the same."""
    number = int(hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:7], 16)
    most, least = all_max(number, -number)
    if most != -least:
        raise UserError(
            "distributed: the processes were given different settings, data or backbones; give all "
            "the same command and files"
        )


def barrier() -> None:
    """Return when every process has come here."""
    all_max(0)
