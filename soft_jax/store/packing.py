"""How a task's masks are kept in the store: as they are, or smaller.

Packing is done once, when a task ends, and the task goes on with what unpacking gives: figures are
those of what is stored. A soft mask is near 1, so what is kept is its distance from 1, in a dict of
arrays; a mask of ones stays one, to the bit, in each of these ways. Of a binary mask a bit a weight
is kept.

The "delta" ways keep the distance from the mask's own initial draw instead, which training has
moved it from: 1, 2 or 4 bits a weight (BitDelta, Liu et al., 2024, keeps fine-tuned weights so, in
1 bit). The draw itself takes no bytes: it is drawn again from its key, which is kept. A mask that
training left as it was drawn stays so, to the bit.

What is read is right only where the key draws the same numbers again. Random bits are threefry's,
integers that every device computes alike; how JAX spends them on an array (`jax.random.split`,
`jax_threefry_partitionable`) and makes floats of them may change with its version. So some entries
of the draw are kept, and compared whenever it is drawn again: another generator is an error, never
another mask. They are compared within a tolerance, not by a hash, because floats made of the same
bits differ in their last digits: half the entries of a kaiming draw do, on one CPU, between a
compiled program and operations one by one.
"""

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.errors import UserError

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


DELTA_BITS = {"delta1": 1, "delta2": 2, "delta4": 4}
STORED_AS = ("float32", *KINDS, *DELTA_BITS)

# The step between 2ᵇ even levels that loses least of a normal distribution, in standard deviations
# (Max, 1960); where the search for the least squares begins.
_NORMAL_STEPS = {1: 1.596, 2: 0.9957, 4: 0.3352}
_ROUNDS = 8  # of that search
_WITNESSES = 16  # entries of a kernel's draw that are kept
# Far above the last digit of a mask near 1 (6e-8), far below the narrowest draw's width (0.01).
_SAME = 1e-5


def pack(masks: pytrees.Tree, kind: str, rank: int) -> pytrees.Tree:
    """Pack masks, a tree of float32 `[in, out]`, in the way that `kind` of STORED_AS names.

    "float32" leaves them as they are; only "lowrank" uses `rank`.
    """
    if kind == "float32":
        return masks
    leaves, structure = jax.tree.flatten(masks)
    places: dict[tuple[int, ...], list[int]] = {}
    for place, mask in enumerate(leaves):
        places.setdefault(mask.shape, []).append(place)
    packed = {}
    for alike in places.values():
        # One after another in a loop, so that each shape is compiled once: a TPU's compiler takes
        # more than a minute for every singular value decomposition that it meets.
        together = jnp.stack([leaves[place] for place in alike])
        found = jax.lax.map(lambda mask: KINDS[kind].pack(mask, rank), together)
        for row, place in enumerate(alike):
            packed[place] = jax.tree.map(operator.itemgetter(row), found)
    return jax.tree.unflatten(structure, [packed[place] for place in range(len(leaves))])


def unpack(packed: pytrees.Tree, kind: str, like: pytrees.Tree) -> pytrees.Tree:
    """Return the masks, float32, from what `pack` gave; `like` is a tree of their shapes."""
    if kind == "float32":
        return packed
    return jax.tree.map(lambda mask, kept: KINDS[kind].unpack(kept, mask.shape[1]), like, packed)


def pack_delta(masks: pytrees.Tree, drawn: pytrees.Tree, bits: int) -> pytrees.Tree:
    """Pack what training added to masks: two trees of float32 `[in, out]`, now and as drawn.

    A kernel's difference becomes `codes`, uint8 `[ceil(in · out · bits / 8)]`, row-major, the first
    in a byte's lowest bits; `step`, float32 `[]`; and `witness`, float32, some of the draw. A code
    c stands for (c - (2ᵇ - 1) / 2) · step, which is ±step / 2 for one bit.
    """
    return jax.tree.map(
        lambda mask, draw: _quantized_delta(mask - draw, bits) | {"witness": _witness(draw)},
        masks,
        drawn,
    )


def unpack_delta(packed: pytrees.Tree, drawn: pytrees.Tree, bits: int) -> pytrees.Tree:
    """Return the masks, float32, from what `pack_delta` gave and the same draw."""
    return jax.tree.map(lambda draw, kept: draw + _delta(kept, draw.shape, bits), drawn, packed)


def check_drawn_again(packed: pytrees.Tree, drawn: pytrees.Tree) -> None:
    """Raise UserError, naming the first kernel, where `drawn` is another draw than `pack_delta`'s.

    Not for a function under jit.
    """
    kept = pytrees.flatten(packed)
    for path, draw in pytrees.flatten(drawn).items():
        witness, again = np.asarray(kept[f"{path}/witness"]), np.asarray(_witness(draw))
        if not np.allclose(witness, again, rtol=0, atol=_SAME):
            raise UserError(
                f"mask_storage: the mask of {path} is stored as a delta from a random draw, and "
                f"JAX {jax.__version__} with its settings here draws other numbers from the same "
                'key; take the version of jax in the task\'s manifest, under "versions", and the '
                "settings (JAX_THREEFRY_PARTITIONABLE, JAX_DEFAULT_PRNG_IMPL) it was trained with"
            )


def _witness(draw: jax.Array) -> jax.Array:
    """Return entries from all over a kernel's draw, float32 `[at most _WITNESSES]`."""
    flat = draw.reshape(-1)
    return flat[:: max(1, flat.size // _WITNESSES)][:_WITNESSES]


def _quantized_delta(delta: jax.Array, bits: int) -> Packed:
    levels = 2**bits

    def codes(step: jax.Array) -> jax.Array:
        # Where nothing moved, any code stands for 0.
        raised = jnp.floor(delta / jnp.where(step > 0, step, 1)) + levels / 2
        return jnp.clip(raised, 0, levels - 1)

    def refitted(_: int, step: jax.Array) -> jax.Array:
        """Fit the step to the codes by least squares; for one bit it is 2 mean |delta| at once."""
        centred = codes(step) - (levels - 1) / 2
        return jnp.mean(delta * centred) / jnp.mean(centred**2)

    step = _NORMAL_STEPS[bits] * jnp.sqrt(jnp.mean(delta**2))
    step = jax.lax.fori_loop(0, _ROUNDS, refitted, step)
    return {"codes": _joined(codes(step).astype(jnp.uint8), bits), "step": step}


def _delta(kept: Packed, shape: tuple[int, ...], bits: int) -> jax.Array:
    codes = _parted(kept["codes"], math.prod(shape), bits).reshape(shape)
    return (codes.astype(jnp.float32) - (2**bits - 1) / 2) * kept["step"]


def _joined(codes: jax.Array, bits: int) -> jax.Array:
    """Join codes of 1, 2 or 4 bits to bytes, the first in the lowest bits."""
    each = 8 // bits
    codes = jnp.pad(codes.reshape(-1), (0, -codes.size % each)).reshape(-1, each)
    return jnp.sum(codes << _shifts(bits), axis=1, dtype=jnp.uint8)


def _parted(joined: jax.Array, count: int, bits: int) -> jax.Array:
    """Return the first `count` codes, uint8, of what `_joined` gave."""
    return ((joined[:, None] >> _shifts(bits)) & (2**bits - 1)).reshape(-1)[:count]


def _shifts(bits: int) -> jax.Array:
    return jnp.arange(0, 8, bits, dtype=jnp.uint8)[None]
