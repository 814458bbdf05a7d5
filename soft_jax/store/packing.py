"""How a task's masks are kept in the store: as they are, or smaller.

Packing is done once, when a task ends, and the task goes on with what unpacking gives: figures are
those of what is stored. A soft mask is near 1, so what is kept is its distance from 1, in a dict of
arrays; a mask of ones stays one, to the bit, in each of these ways. Of a binary mask a bit a weight
is kept.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from soft_jax import pytrees

Packed = dict[str, jax.Array]


def _quantized(mask: jax.Array, levels: int) -> Packed:
    """Round `mask - 1`, `[in, out]`, to whole multiples of a step, one step for each row.

    Multiples `whole` are int8, -`levels` to `levels`; `step` is float32 `[in, 1]`.
    """
    delta = mask - 1
    step = jnp.max(jnp.abs(delta), axis=1, keepdims=True) / levels
    whole = jnp.round(delta / jnp.where(step > 0, step, 1)).astype(jnp.int8)
    return {"whole": whole, "step": step.astype(jnp.float32)}


def _dequantized(packed: Packed) -> jax.Array:
    return 1 + packed["whole"].astype(jnp.float32) * packed["step"]


def _pack_int8(mask: jax.Array, rank: int) -> Packed:
    return _quantized(mask, 127)


def _pack_int4(mask: jax.Array, rank: int) -> Packed:
    """Pack in 4 bits: two neighbours of a row share a byte, the first in its lower half."""
    packed = _quantized(mask, 7)
    halves = (packed["whole"] + 8).astype(jnp.uint8)
    halves = jnp.pad(halves, ((0, 0), (0, halves.shape[1] % 2)))
    return packed | {"whole": halves[:, ::2] | (halves[:, 1::2] << 4)}


def _unpack_int4(packed: Packed, columns: int) -> jax.Array:
    halves = jnp.stack([packed["whole"] & 15, packed["whole"] >> 4], axis=-1).reshape(
        len(packed["whole"]), -1
    )[:, :columns]
    return _dequantized(packed | {"whole": halves.astype(jnp.int8) - 8})


def _pack_low_rank(mask: jax.Array, rank: int) -> Packed:
    """Return the products `[in, rank]` and `[rank, out]` nearest to `mask - 1` in the 2-norm.

    They are from the singular value decomposition (Eckart and Young, 1936).
    """
    left, sizes, right = jnp.linalg.svd(mask - 1, full_matrices=False)
    return {"left": left[:, :rank] * sizes[None, :rank], "right": right[:rank]}


def pack_bits(mask: jax.Array) -> jax.Array:
    """Pack a mask of zeros and ones into uint8 `[ceil(size / 8)]`, bit by bit, row-major."""
    return jnp.packbits(mask.reshape(-1).astype(bool))


def unpack_bits(bits: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the mask, float32 `shape`, from what `pack_bits` gave."""
    return jnp.unpackbits(bits, count=math.prod(shape)).reshape(shape).astype(jnp.float32)


class Packing(NamedTuple):
    """A way to keep masks smaller: `pack(mask [in, out], rank)` and `unpack(packed, columns of
    the mask)`.
    """

    pack: Callable[[jax.Array, int], Packed]
    unpack: Callable[[Packed, int], jax.Array]


KINDS = {
    "int8": Packing(_pack_int8, lambda packed, columns: _dequantized(packed)),
    "int4": Packing(_pack_int4, _unpack_int4),
    "lowrank": Packing(
        _pack_low_rank,
        lambda packed, columns: (
            1 + jnp.matmul(packed["left"], packed["right"], precision="highest")
        ),
    ),
}


STORED_AS = ("float32", *KINDS)


def pack(masks: pytrees.Tree, kind: str, rank: int) -> pytrees.Tree:
    """Pack masks, a tree of float32 `[in, out]`, in the way that `kind` of STORED_AS names.

    "float32" leaves them as they are; only "lowrank" uses `rank`.
    """
    if kind == "float32":
        return masks
    return jax.tree.map(lambda mask: KINDS[kind].pack(mask, rank), masks)


def unpack(packed: pytrees.Tree, kind: str, like: pytrees.Tree) -> pytrees.Tree:
    """Return the masks, float32, from what `pack` gave; `like` is a tree of their shapes."""
    if kind == "float32":
        return packed
    return jax.tree.map(lambda mask, kept: KINDS[kind].unpack(kept, mask.shape[1]), like, packed)
