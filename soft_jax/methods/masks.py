"""Masks: real-valued ones (Soft-TF), and binary ones from scores (WSN, SoftNet)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from soft_jax import pytrees
from soft_jax.config import Config, unknown_value
from soft_jax.errors import UserError
from soft_jax.methods.reparametrization import (
    Draw,
    Reparametrization,
    draw_for,
    kaiming,
    targets,
)
from soft_jax.models.protocol import Architecture
from soft_jax.store import packing

# Table 5's. Fans are those of one task's mask; the published code draws the stack of all tasks' at
# once, whose fans are larger.
MASK_INITS: dict[str, Draw] = {
    "uniform": lambda key, shape: jax.random.uniform(key, shape, jnp.float32, 0.99, 1),
    "ones": lambda key, shape: jnp.ones(shape, jnp.float32),
    "xavier": lambda key, shape: jax.nn.initializers.xavier_uniform()(key, shape, jnp.float32),
    "kaiming": kaiming,
    "normal": lambda key, shape: 0.01 * _standard_normal(key, shape),
}


def _standard_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # By itself: XLA would join a factor that follows with one inside, which rounds otherwise.
    return jax.lax.optimization_barrier(jax.random.normal(key, shape, jnp.float32))


def masked(backbone: pytrees.Tree, masks: pytrees.Tree) -> pytrees.Tree:
    """Return the masked kernels alone, θ ⊙ m (Soft-TF, section 3)."""
    kernels = pytrees.select(backbone, pytrees.flatten(masks))
    return jax.tree.map(jnp.multiply, kernels, masks)


@dataclasses.dataclass(frozen=True)
class SoftMask(Reparametrization):
    """Soft-TF: a real-valued mask for each kernel, drawn as `init_as` says (Table 5); U(0.99, 1)
    is the published code's.

    `stored_as` and `stored_rank` say how the store keeps masks (`packing`).
    """

    adapter_key: ClassVar[str] = "mask"
    settings: ClassVar[tuple[str, ...]] = (
        *Reparametrization.settings,
        "mask_init",
        "mask_storage",
        "rank",
    )
    published_as: ClassVar[str] = "Soft-TF"
    kernels: tuple[str, ...]
    changed_layers: tuple[int, ...]
    init_as: str = "uniform"
    stored_as: str = "float32"
    stored_rank: int = 4

    @classmethod
    def from_config(cls, config: Config, architecture: Architecture) -> Self:
        """Make soft masks from their settings, for a backbone."""
        where = targets(config, architecture)
        return cls(*where, config.mask_init, config.mask_storage, config.rank)

    @classmethod
    def settings_used(cls, config: Config) -> tuple[str, ...]:
        """Return the settings, without `rank` unless masks are stored as low-rank products."""
        lowrank = config.mask_storage == "lowrank"
        used = super().settings_used(config)
        return tuple(name for name in used if name != "rank" or lowrank)

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise UserError for an unknown tower, or an unknown way to draw or to store masks."""
        super().check(config)
        for name, known in (("mask_init", MASK_INITS), ("mask_storage", packing.STORED_AS)):
            if (value := getattr(config, name)) not in known:
                raise UserError(unknown_value(name, value, known))

    def init(self, key: jax.Array, backbone: pytrees.Tree) -> pytrees.Tree:
        """Draw a task's masks, float32, shaped as the kernels."""
        return draw_for(key, backbone, self.kernels, MASK_INITS[self.init_as])

    def weights(self, backbone: pytrees.Tree, masks: pytrees.Tree) -> pytrees.Tree:
        """Return the masked kernels, θ ⊙ m."""
        return masked(backbone, masks)

    @property
    def _delta_bits(self) -> int | None:
        """Return the bits of an entry where masks are kept as a delta from their draw."""
        return packing.DELTA_BITS.get(self.stored_as)

    def pack(self, masks: pytrees.Tree, key: jax.Array | None = None) -> pytrees.Tree:
        """Return the masks packed in the way that `stored_as` names.

        The "delta" ways need `key`, which `init` drew the masks from: they keep it, uint32, as
        `key`, and what training added to the draw as `delta`. ValueError where it isn't given.
        """
        if not self._delta_bits:
            return packing.pack(masks, self.stored_as, self.stored_rank)
        if key is None:
            raise ValueError(f"masks stored as {self.stored_as} are packed with their draw's key")
        delta = packing.pack_delta(masks, self.init(key, masks), self._delta_bits)
        return {"key": jax.random.key_data(key), "delta": delta}

    def unpack(self, packed: pytrees.Tree, backbone: pytrees.Tree) -> pytrees.Tree:
        """Return the masks, float32, from what `pack` gave.

        Raises UserError where the key that was kept draws other numbers than it did.
        """
        if not self._delta_bits:
            return packing.unpack(packed, self.stored_as, pytrees.select(backbone, self.kernels))
        drawn = self.init(jax.random.wrap_key_data(packed["key"]), backbone)
        packing.check_drawn_again(packed["delta"], drawn)
        return packing.unpack_delta(packed["delta"], drawn, self._delta_bits)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def top_k_mask(scores: jax.Array, count: int) -> jax.Array:
    """Return 1 for exactly the `count` highest of `scores` and 0 for the others.

    The gradient passes to the scores unchanged (straight-through). Of equal scores the first are
    kept; -0 is below 0.

    Sorting would take most of a training step, so the lowest score that is kept is found bit by
    bit: a float's bits, with those of negative ones inverted, are in the order of the floats. The
    place of the last equal score that is kept is found in the same way.
    """
    width = 8 * scores.dtype.itemsize
    unsigned = jnp.dtype(f"uint{width}")
    top = unsigned.type(1 << (width - 1))
    bits = jax.lax.bitcast_convert_type(scores.reshape(-1), unsigned)
    ranks = jnp.where(bits >= top, ~bits, bits | top)

    lowest = _highest(unsigned, lambda rank: _count(ranks >= rank) >= count)
    above, level = ranks > lowest, ranks == lowest
    room = count - _count(above)

    def first() -> jax.Array:
        places = jnp.arange(scores.size, dtype=jnp.uint32)
        return level & (
            places < _highest(places.dtype, lambda place: _count(level & (places < place)) <= room)
        )

    level = jax.lax.cond(_count(level) == room, lambda: level, first)
    return (above | level).astype(scores.dtype).reshape(scores.shape)


def _count(where: jax.Array) -> jax.Array:
    return jnp.sum(where, dtype=jnp.int32)


def _highest(kind: jnp.dtype, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Find the highest number of the unsigned type `kind` for which `holds` is true.

    `holds` must be true for 0, and for every number below one for which it is true.
    """

    def raised(step: jax.Array, number: jax.Array) -> jax.Array:
        higher = number | (kind.type(1) << (kind.type(8 * kind.itemsize - 1) - step.astype(kind)))
        return jnp.where(holds(higher), higher, number)

    return jax.lax.fori_loop(0, 8 * kind.itemsize, raised, kind.type(0))


@top_k_mask.defjvp
def _straight_through(count, primals, tangents):
    return top_k_mask(primals[0], count), tangents[0]


def num_kept(share: float, size: int) -> int:
    """Return how many of `size` weights the top `share` is: at least 1."""
    return max(1, round(share * size))


@dataclasses.dataclass(frozen=True)
class BinaryMask(Reparametrization):
    """WSN (Kang et al., 2022): scores s, and the top share `density` of |s| in each kernel as a
    binary mask, straight-through to |s|.

    With `soft`, SoftNet (Kang et al., 2023): what is not kept has small real values, σ(U(-50, -10))
    as in the published code, instead of 0. They are drawn with the task and not trained. The store
    keeps a bit a weight, and of the small values those that are used.
    """

    adapter_key: ClassVar[str] = "scores"
    fixed: ClassVar[tuple[str, ...]] = ("minor",)
    settings: ClassVar[tuple[str, ...]] = (*Reparametrization.settings, "density")
    published_as: ClassVar[str] = "WSN"
    kernels: tuple[str, ...]
    changed_layers: tuple[int, ...]
    density: float = 0.9
    soft: bool = False

    @classmethod
    def from_config(cls, config: Config, architecture: Architecture) -> Self:
        """Make binary masks from their settings, for a backbone."""
        return cls(*targets(config, architecture), config.density)

    def init(self, key: jax.Array, backbone: pytrees.Tree) -> pytrees.Tree:
        """Draw a task's scores and, for SoftNet, its minor weights.

        Both are float32, shaped as the kernels.
        """
        score_key, minor_key = jax.random.split(key)
        own = {"scores": draw_for(score_key, backbone, self.kernels, kaiming)}
        if self.soft:
            minor = draw_for(
                minor_key,
                backbone,
                self.kernels,
                lambda k, shape: jax.random.uniform(k, shape, jnp.float32, -50, -10),
            )
            own["minor"] = jax.tree.map(jax.nn.sigmoid, minor)
        return own

    def _binary(self, own: pytrees.Tree) -> pytrees.Tree:
        return jax.tree.map(
            lambda scores: top_k_mask(jnp.abs(scores), num_kept(self.density, scores.size)),
            own["scores"],
        )

    def masks(self, own: pytrees.Tree) -> pytrees.Tree:
        """Return the masks that the scores stand for."""
        masks = self._binary(own)
        if not self.soft:
            return masks
        return jax.tree.map(
            lambda mask, minor: mask + jax.lax.stop_gradient((1 - mask) * minor),
            masks,
            own["minor"],
        )

    def weights(self, backbone: pytrees.Tree, own: pytrees.Tree) -> pytrees.Tree:
        """Return the masked kernels, θ ⊙ m."""
        return masked(backbone, self.masks(own))

    def pack(self, own: pytrees.Tree, key: jax.Array | None = None) -> pytrees.Tree:
        """Return which weights are kept, one bit each, as `bits`.

        SoftNet adds `minor`: the small values of the other weights, float32 `[size - kept]`.
        """
        binary = self._binary(own)
        packed = {"bits": jax.tree.map(packing.pack_bits, binary)}
        if self.soft:
            packed["minor"] = jax.tree.map(
                lambda mask, minor: minor.reshape(-1)[self._dropped(mask)], binary, own["minor"]
            )
        return packed

    def unpack(self, packed: pytrees.Tree, backbone: pytrees.Tree) -> pytrees.Tree:
        """Return scores of 1 and 0, which stand for the same masks to the bit.

        SoftNet adds its small values where they are used, and 0 elsewhere.
        """
        kernels = pytrees.select(backbone, self.kernels)
        own = {
            "scores": jax.tree.map(
                lambda kernel, bits: packing.unpack_bits(bits, kernel.shape),
                kernels,
                packed["bits"],
            )
        }
        if self.soft:
            own["minor"] = jax.tree.map(
                lambda mask, minor: (
                    jnp.zeros(mask.size).at[self._dropped(mask)].set(minor).reshape(mask.shape)
                ),
                own["scores"],
                packed["minor"],
            )
        return own

    def _dropped(self, mask: jax.Array) -> jax.Array:
        return jnp.flatnonzero(mask == 0, size=mask.size - num_kept(self.density, mask.size))


class SoftNet(BinaryMask):
    """SoftNet: `BinaryMask` with `soft`."""

    published_as: ClassVar[str] = "SoftNet"

    @classmethod
    def from_config(cls, config: Config, architecture: Architecture) -> Self:
        """Make SoftNet's masks from their settings, for a backbone."""
        return cls(*targets(config, architecture), config.density, soft=True)
