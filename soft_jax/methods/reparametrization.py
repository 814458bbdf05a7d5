"""Weight reparametrisations: what a task's own arrays do to the frozen parameters before the
forward pass.

Each class is one kind: `slot` names its arrays in an adapter, `init` draws them, `weights` turns
them into parameters that take the place of the backbone's (`kernels`), or stand beside them
(`Bottleneck`). Products and sums are taken in float32: bfloat16 steps by 0.004 near 1, which is
where masks are. To add a kind, write its class here and its line in `REPARAMETRIZATIONS`.

Of every kind, nothing of an old task's arrays changes later, so none of them forgets by itself: see
`methods` for what does.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.errors import UserError
from soft_jax.models.vit import ViTConfig
from soft_jax.store import packing

WEIGHTS = {
    "qkv": ("attn/qkv",),
    "qv": ("attn/qkv",),
    "proj": ("attn/proj",),
    "mlp": ("mlp/fc1", "mlp/fc2"),
}


def kernel_paths(weights: Iterable[str], layers: Iterable[int]) -> tuple[str, ...]:
    """Paths of the kernels of `weights` ("qkv", "proj", "mlp") in `layers`, counted from 0.
    Biases are never among them.
    """
    names = [name for weight in weights for name in WEIGHTS[weight]]
    return tuple(f"blocks_{layer}/{name}/kernel" for layer in layers for name in names)


def layer_of(path: str) -> int:
    """The layer, from 0, that a parameter of a block belongs to."""
    return int(path.split("/", maxsplit=1)[0].removeprefix("blocks_"))


Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def _kaiming(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # PyTorch's default for a linear layer, kaiming_uniform(a=√5): U(-1/√in, 1/√in). Shapes are
    # [..., in, out].
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


# Table 5's. Fans are those of one task's mask; the published code draws the stack of all tasks' at
# once, whose fans are larger.
MASK_INITS: dict[str, Draw] = {
    "uniform": lambda key, shape: jax.random.uniform(key, shape, jnp.float32, 0.99, 1),
    "ones": lambda key, shape: jnp.ones(shape, jnp.float32),
    "xavier": lambda key, shape: jax.nn.initializers.xavier_uniform()(key, shape, jnp.float32),
    "kaiming": _kaiming,
    "normal": lambda key, shape: 0.01 * jax.random.normal(key, shape, jnp.float32),
}


def _draw(
    key: jax.Array, backbone: pytrees.Tree, paths: tuple[str, ...], draw: Draw
) -> pytrees.Tree:
    """An array for each kernel of `paths`. Raises KeyError naming the paths that the backbone
    does not have.
    """
    kernels = pytrees.flatten(pytrees.select(backbone, paths))
    keys = jax.random.split(key, len(kernels))
    return pytrees.unflatten(
        {
            path: draw(k, kernel.shape)
            for k, (path, kernel) in zip(keys, kernels.items(), strict=True)
        }
    )


def masked(backbone: pytrees.Tree, masks: pytrees.Tree) -> pytrees.Tree:
    """The masked kernels alone, θ ⊙ m (Soft-TF, section 3)."""
    kernels = pytrees.select(backbone, pytrees.flatten(masks))
    return jax.tree.map(jnp.multiply, kernels, masks)


class Reparametrization:
    """What a kind does unless it says otherwise. `slot` names its arrays in an adapter,
    `kernels` the parameters that they replace.

    `rank` is that of its matrices; 0: they are of any rank.
    """

    adapter_key: ClassVar[str]
    kernels: tuple[str, ...]
    rank = 0

    @property
    def changed_layers(self) -> tuple[int, ...]:
        """The layers, from 0, that differ from the backbone's."""
        return tuple(sorted({layer_of(path) for path in self.kernels}))

    def pack(self, own: pytrees.Tree) -> pytrees.Tree:
        """A trained task's arrays as the store keeps them: as they are."""
        return own

    def unpack(self, packed: pytrees.Tree, backbone: pytrees.Tree) -> pytrees.Tree:
        """Arrays that stand for the same weights, from what `pack` gave."""
        return packed


@dataclasses.dataclass(frozen=True)
class SoftMask(Reparametrization):
    """Soft-TF: a real-valued mask for each kernel, drawn as `init_as` says (Table 5); U(0.99, 1)
    is the published code's.

    `stored_as` and `stored_rank` say how the store keeps masks (`packing`).
    """

    adapter_key: ClassVar[str] = "mask"
    kernels: tuple[str, ...]
    init_as: str = "uniform"
    stored_as: str = "float32"
    stored_rank: int = 4

    @property
    def rank(self) -> int:
        """That of the masks, where the store keeps products."""
        return self.stored_rank if self.stored_as == "lowrank" else 0

    def init(self, key: jax.Array, backbone: pytrees.Tree) -> pytrees.Tree:
        """A task's masks, float32, shaped as the kernels."""
        return _draw(key, backbone, self.kernels, MASK_INITS[self.init_as])

    def weights(self, backbone: pytrees.Tree, masks: pytrees.Tree) -> pytrees.Tree:
        """θ ⊙ m."""
        return masked(backbone, masks)

    def pack(self, masks: pytrees.Tree) -> pytrees.Tree:
        """The masks as `stored_as` says."""
        return packing.pack(masks, self.stored_as, self.stored_rank)

    def unpack(self, packed: pytrees.Tree, backbone: pytrees.Tree) -> pytrees.Tree:
        """The masks that are stored."""
        return packing.unpack(packed, self.stored_as, pytrees.select(backbone, self.kernels))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def top_k_mask(scores: jax.Array, keep: int) -> jax.Array:
    """1 for the `keep` highest of scores, exactly, else 0; its gradient is that of the scores
    themselves (straight-through).

    Of equal scores the first are kept; -0 is below 0. Sorting would be most of a training step, so
    the lowest that is kept is found bit by bit: a float's bits, those of negative ones inverted,
    are in the order of the floats. So is the place where the equal ones end.
    """
    width = 8 * scores.dtype.itemsize
    unsigned = jnp.dtype(f"uint{width}")
    top = unsigned.type(1 << (width - 1))
    bits = jax.lax.bitcast_convert_type(scores.reshape(-1), unsigned)
    ranks = jnp.where(bits >= top, ~bits, bits | top)

    lowest = _highest(unsigned, lambda rank: _count(ranks >= rank) >= keep)
    above, level = ranks > lowest, ranks == lowest
    room = keep - _count(above)

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
    """The highest number of an unsigned `kind` that `holds`; 0 does, and with any number all
    below it.
    """

    def raised(step: jax.Array, number: jax.Array) -> jax.Array:
        higher = number | (kind.type(1) << (kind.type(8 * kind.itemsize - 1) - step.astype(kind)))
        return jnp.where(holds(higher), higher, number)

    return jax.lax.fori_loop(0, 8 * kind.itemsize, raised, kind.type(0))


@top_k_mask.defjvp
def _straight_through(keep, primals, tangents):
    return top_k_mask(primals[0], keep), tangents[0]


def num_kept(share: float, size: int) -> int:
    """How many of `size` weights the top `share` is: at least 1."""
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
    kernels: tuple[str, ...]
    density: float = 0.9
    soft: bool = False

    def init(self, key: jax.Array, backbone: pytrees.Tree) -> pytrees.Tree:
        """A task's scores, and for SoftNet its minor weights, float32, shaped as the kernels."""
        score_key, minor_key = jax.random.split(key)
        own = {"scores": _draw(score_key, backbone, self.kernels, _kaiming)}
        if self.soft:
            minor = _draw(
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
        """The masks that the scores stand for."""
        masks = self._binary(own)
        if not self.soft:
            return masks
        return jax.tree.map(
            lambda mask, minor: mask + jax.lax.stop_gradient((1 - mask) * minor),
            masks,
            own["minor"],
        )

    def weights(self, backbone: pytrees.Tree, own: pytrees.Tree) -> pytrees.Tree:
        """θ ⊙ m."""
        return masked(backbone, self.masks(own))

    def pack(self, own: pytrees.Tree) -> pytrees.Tree:
        """Which weights are kept, a bit each, and the small values of the others, float32 `[size
        - kept]`.
        """
        binary = self._binary(own)
        packed = {"bits": jax.tree.map(packing.pack_bits, binary)}
        if self.soft:
            packed["minor"] = jax.tree.map(
                lambda mask, minor: minor.reshape(-1)[self._dropped(mask)], binary, own["minor"]
            )
        return packed

    def unpack(self, packed: pytrees.Tree, backbone: pytrees.Tree) -> pytrees.Tree:
        """Scores of 1 and 0, and the small values where they are used: the same masks, to the
        bit.
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


@dataclasses.dataclass(frozen=True)
class LoRA(Reparametrization):
    """LoRA (Hu et al., 2022): W + 8 A B, rank `rank`, for q, k, v each by itself and `proj`,
    `fc1`, `fc2` whole.

    8 is alpha / rank of the published baseline (32 / 4), at every rank of Table 7; its dropout of
    0.1 on the way in is left out. B starts at 0: a new task starts as the backbone, to the bit.
    """

    adapter_key: ClassVar[str] = "lora"
    SCALE: ClassVar[float] = 8.0
    kernels: tuple[str, ...]
    rank: int = 4
    parts: tuple[int, ...] = (0, 1, 2)  # of q, k, v

    def _columns(self, path: str) -> tuple[tuple[int, ...], int]:
        """The column blocks of a kernel that get a product of their own, and how many blocks it
        has.
        """
        return (self.parts, 3) if path.endswith("attn/qkv/kernel") else ((0,), 1)

    def init(self, key: jax.Array, backbone: pytrees.Tree) -> pytrees.Tree:
        """For each kernel `{"a": [blocks, in, rank], "b": [blocks, rank, out / all blocks]}`,
        float32.
        """
        own = {}
        kernels = pytrees.flatten(pytrees.select(backbone, self.kernels))
        for k, (path, kernel) in zip(
            jax.random.split(key, len(kernels)), kernels.items(), strict=True
        ):
            blocks, of = self._columns(path)
            own[f"{path}/a"] = _kaiming(k, (len(blocks), kernel.shape[0], self.rank))
            own[f"{path}/b"] = jnp.zeros(
                (len(blocks), self.rank, kernel.shape[1] // of), jnp.float32
            )
        return pytrees.unflatten(own)

    def weights(self, backbone: pytrees.Tree, own: pytrees.Tree) -> pytrees.Tree:
        """W + 8 A B: the merged weights, so that inference costs what the backbone's does."""
        own, merged = pytrees.flatten(own), {}
        for path, kernel in pytrees.flatten(pytrees.select(backbone, self.kernels)).items():
            blocks, of = self._columns(path)
            products = jnp.einsum(
                "gir,gro->gio", own[f"{path}/a"], own[f"{path}/b"], precision="highest"
            )
            placed = (
                jnp.zeros((of, kernel.shape[0], kernel.shape[1] // of), products.dtype)
                .at[np.array(blocks)]
                .set(products)
            )
            merged[path] = kernel + self.SCALE * jnp.moveaxis(placed, 0, 1).reshape(kernel.shape)
        return pytrees.unflatten(merged)


@dataclasses.dataclass(frozen=True)
class Bottleneck(Reparametrization):
    """Adapter (Houlsby et al., 2019), placed as the published baseline's: x + up(GELU(down x))
    behind fc1 and behind fc2, no biases.

    The published ones are never trained (they require no gradient); these are. `up` starts at 0: a
    new task starts as the backbone. They stand beside the backbone's parameters, under the names
    that `vit.Mlp` looks for, so there is nothing to superpose for Gradient ID.
    """

    adapter_key: ClassVar[str] = "bottleneck"
    kernels: ClassVar[tuple[str, ...]] = ()
    layers: tuple[int, ...]
    rank: int = 4

    @property
    def changed_layers(self) -> tuple[int, ...]:
        """Those that it stands in."""
        return self.layers

    def init(self, key: jax.Array, backbone: pytrees.Tree) -> pytrees.Tree:
        """`blocks_L/mlp/{adapter1,adapter2}/{down [width, rank], up [rank, width]}`, float32."""
        own = {}
        for layer, k in zip(self.layers, jax.random.split(key, len(self.layers)), strict=True):
            mlp = backbone[f"blocks_{layer}"]["mlp"]
            for name, dense, one in zip(
                ("adapter1", "adapter2"), ("fc1", "fc2"), jax.random.split(k), strict=True
            ):
                width = mlp[dense]["kernel"].shape[1]
                own[f"blocks_{layer}/mlp/{name}/down"] = _kaiming(one, (width, self.rank))
                own[f"blocks_{layer}/mlp/{name}/up"] = jnp.zeros((self.rank, width), jnp.float32)
        return pytrees.unflatten(own)

    def weights(self, backbone: pytrees.Tree, own: pytrees.Tree) -> pytrees.Tree:
        """The bottlenecks as they are."""
        return own


def _lora(c, layers):
    weights = c.target_modules.split("+")
    parts = (0, 2) if "qv" in weights else (0, 1, 2)
    return LoRA(kernel_paths(weights, layers), c.rank, parts)


# A kind by the name it has in a config's `method`, from the config's settings and its layers,
# counted from 0.
REPARAMETRIZATIONS = {
    "softtf": lambda c, layers: SoftMask(
        kernel_paths(c.target_modules.split("+"), layers), c.mask_init, c.mask_storage, c.rank
    ),
    "wsn": lambda c, layers: BinaryMask(
        kernel_paths(c.target_modules.split("+"), layers), c.density
    ),
    "softnet": lambda c, layers: BinaryMask(
        kernel_paths(c.target_modules.split("+"), layers), c.density, soft=True
    ),
    "lora": _lora,
    "adapter": lambda c, layers: Bottleneck(layers, c.rank),
}


def check(reparam: Reparametrization, vit: ViTConfig) -> None:
    """Raise UserError where a rank that is used is larger than the layer is wide."""
    if reparam.rank > vit.dim:
        raise UserError(f"rank: {reparam.rank} is above the backbone's width, {vit.dim}")
