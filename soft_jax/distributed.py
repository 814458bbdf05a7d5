"""Several devices, and several processes (one a host) that run one program: how arrays are split
over them, and what the processes have to agree on.

With one process every function here is its plain counterpart. Functions that send something must
be called by all processes in the same order, as all must run the same programs.
"""

import collections
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from soft_jax.errors import UserError


def join(others: str) -> None:
    """Connect to the other processes of this program. Call it before anything else of jax.

    Args:
        others: "auto" where jax finds the others by itself (TPU pods, Slurm, Open MPI,
            Kubernetes), or "HOST:PORT,INDEX,COUNT": the address at which process 0 listens, which
            process this one is, counted from 0, and how many there are.

    Raises:
        UserError: `others` can't be read, or there is no cluster. A process that waits five minutes
            for the others is ended by jax.
    """
    expected = (
        'expected "auto" or "HOST:PORT,INDEX,COUNT", with the same HOST:PORT and COUNT in all '
        "processes, and INDEX from 0 to COUNT - 1"
    )
    named: tuple[str, int, int] | tuple[()] = ()
    if others != "auto":
        number = r"\s*([0-9]{1,9})\s*"
        parts = re.fullmatch(rf"\s*([^,\s]+:[0-9]{{1,5}})\s*,{number},{number}", others)
        if not parts or int(parts[2]) >= int(parts[3]):
            raise UserError(f"distributed: {others!r}: {expected}")
        named = (parts[1], int(parts[3]), int(parts[2]))
    try:
        jax.distributed.initialize(*named)
    # No cluster found, or nobody at that address.
    except (ValueError, RuntimeError) as error:
        raise UserError(f"distributed: {others!r}: {error}; {expected}") from error


def is_primary() -> bool:
    """Return whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of all devices (or of those given) with one axis, `data`.

    The devices stand in the order of their processes, and within a process in that of their ids:
    the first rows of an array that is split over the mesh are the first process's.

    Raises:
        UserError: the processes have different numbers of devices.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        raise UserError(
            f"distributed: the processes have {sorted(counts.values())} devices; expected the same "
            "number in each"
        )
    # Not jax.make_mesh: on TPU slices it reorders what it is given. Each process's rows would then
    # lie between those of others, and padding would no longer stand at the end of a batch.
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole: backbone, adapters, state."""
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what is split over `data` by its first axis: images, labels."""
    return NamedSharding(mesh, PartitionSpec("data"))


def to_global(tree: Any, sharding: Sharding) -> Any:
    """Place arrays by `sharding`, when every process has them whole.

    Nothing is sent: each process copies the part of its devices. Arrays that are split over the
    processes already are moved to `sharding`.
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
    """Make global arrays, split by `sharding`, when each process has its own rows of them.

    The rows of all processes follow each other in the order of the processes.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)


def to_host(array: jax.Array) -> np.ndarray:
    """Return the whole of an array to every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def all_max(*values: int) -> tuple[int, ...]:
    """Return, for each argument by itself, the highest value that any process gave.

    Values are sent as int32.
    """
    if jax.process_count() == 1:
        return values
    return tuple(multihost_utils.process_allgather(np.array(values, np.int32)).max(axis=0).tolist())


def from_primary(*values: int) -> tuple[int, ...]:
    """Return to every process the values that the first process gave; the others' are ignored.

    All processes give equally many values, which are sent as int32.
    """
    if jax.process_count() == 1:
        return values
    return tuple(multihost_utils.broadcast_one_to_all(np.array(values, np.int32)).tolist())


Result = TypeVar("Result")


def run_on_all(function: Callable[[], Result]) -> Result:
    """Call `function` in the first process, then in the others; return this process's result.

    The first may make files that the others find.

    Raises:
        UserError: in all processes when `function` raised one in any of them. Where it was not this
            process's own, the message points to the other's output.
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
    """Compare the processes' `settings`, JSON values.

    Raises:
        UserError: in all processes when they are not the same in all.
    """
    number = int(hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:7], 16)
    most, least = all_max(number, -number)
    if most != -least:
        raise UserError(
            "distributed: the processes were given different settings, data or backbones; give all "
            "of them the same command and files"
        )


def barrier() -> None:
    """Wait until every process has come here."""
    all_max(0)
