"""Low-rank changes of a layer: LoRA's products, and adapters' bottlenecks."""

import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.config import Config
from soft_jax.methods.reparametrization import (
    TOWER_SETTINGS,
    Reparametrization,
    kaiming,
    layers_by_tower,
    targets,
)
from soft_jax.models.protocol import Architecture


@dataclasses.dataclass(frozen=True)
class LoRA(Reparametrization):
    """LoRA (Hu et al., 2022): W + 8 A B, rank `rank`, for q, k, v each by itself and `proj`,
    `fc1`, `fc2` whole.

    8 is alpha / rank of the published baseline (32 / 4), at every rank of Table 7; its dropout of
    0.1 on the way in is left out. B starts at 0: a new task starts as the backbone, to the bit.
    """

    adapter_key: ClassVar[str] = "lora"
    settings: ClassVar[tuple[str, ...]] = (*Reparametrization.settings, "rank")
    published_as: ClassVar[str] = "LoRA"
    splits_qkv: ClassVar[bool] = True
    SCALE: ClassVar[float] = 8.0
    kernels: tuple[str, ...]
    changed_layers: tuple[int, ...]
    rank: int = 4
    parts: tuple[int, ...] = (0, 1, 2)  # of q, k, v
    fused: tuple[str, ...] = ()  # the kernels that hold all three

    @classmethod
    def from_config(cls, config: Config, architecture: Architecture) -> Self:
        """Make LoRA's products from their settings, for a backbone."""
        kernels, layers = targets(config, architecture)
        parts = (0, 2) if "qv" in config.target_modules.split("+") else (0, 1, 2)
        fused = tuple(path for path in kernels if architecture.fused(path) == 3)
        return cls(kernels, layers, config.rank, parts, fused)

    def _columns(self, path: str) -> tuple[tuple[int, ...], int]:
        """Return the column blocks of a kernel that get a product, and how many blocks it has."""
        return (self.parts, 3) if path in self.fused else ((0,), 1)

    def init(self, key: jax.Array, backbone: pytrees.Tree) -> pytrees.Tree:
        """Draw A and start B at 0 for each kernel.

        Beside each kernel's path stand `{"a": [blocks, in, rank], "b": [blocks, rank, out / all
        blocks]}`, float32.
        """
        own = {}
        kernels = pytrees.flatten(pytrees.select(backbone, self.kernels))
        for k, (path, kernel) in zip(
            jax.random.split(key, len(kernels)), kernels.items(), strict=True
        ):
            blocks, of = self._columns(path)
            own[f"{path}/a"] = kaiming(k, (len(blocks), kernel.shape[0], self.rank))
            own[f"{path}/b"] = jnp.zeros(
                (len(blocks), self.rank, kernel.shape[1] // of), jnp.float32
            )
        return pytrees.unflatten(own)

    def weights(self, backbone: pytrees.Tree, own: pytrees.Tree) -> pytrees.Tree:
        """Return the merged weights W + 8 A B: inference costs what the backbone's does."""
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
    that the backbone looks for, so there is nothing to superpose for Gradient ID.
    """

    adapter_key: ClassVar[str] = "bottleneck"
    settings: ClassVar[tuple[str, ...]] = ("rank", *TOWER_SETTINGS)
    published_as: ClassVar[str] = "Adapter"
    replaces_kernels: ClassVar[bool] = False
    kernels: ClassVar[tuple[str, ...]] = ()
    changed_layers: tuple[int, ...]
    places: tuple[tuple[tuple[str, int], ...], ...]  # by layer: parameter path and width
    rank: int = 4

    @classmethod
    def from_config(cls, config: Config, architecture: Architecture) -> Self:
        """Make the bottlenecks from their settings, for a backbone."""
        by_tower = layers_by_tower(config)
        places = (
            tuple(architecture.bottleneck_widths(layer, tower).items())
            for tower, layers in by_tower.items()
            for layer in layers
        )
        return cls(by_tower.get("vision", ()), tuple(places), config.rank)

    def init(self, key: jax.Array, backbone: pytrees.Tree) -> pytrees.Tree:
        """Draw `{down [width, rank], up [rank, width]}` for each place, float32."""
        own = {}
        for places, k in zip(self.places, jax.random.split(key, len(self.places)), strict=True):
            for (path, width), one in zip(places, jax.random.split(k, len(places)), strict=True):
                own[f"{path}/down"] = kaiming(one, (width, self.rank))
                own[f"{path}/up"] = jnp.zeros((self.rank, width), jnp.float32)
        return pytrees.unflatten(own)

    def weights(self, backbone: pytrees.Tree, own: pytrees.Tree) -> pytrees.Tree:
        """Return the bottlenecks as they are."""
        return own
