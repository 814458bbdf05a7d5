"""The backbone protocol: what a family of backbones brings along, and all that others know of it.

A family is a frozen dataclass of sizes, derived from `Architecture`, and a Flax module. To add one,
write both and list its checkpoints in `backbones.BACKBONES`.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.errors import UserError

Prefix = Mapping[int, jax.Array]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The mean and standard deviation, by colour, that a family takes off pixels in [0, 1]."""

    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def normalize(self, images: jax.Array) -> jax.Array:
        """Normalize images in [0, 1] `[B, H, W, 3]`; the default leaves every bit as it is."""
        if self == Preprocessing():
            return images
        mean, std = (np.asarray(x, images.dtype)[None, None, None] for x in (self.mean, self.std))
        return (images - mean) / std


class Architecture(abc.ABC):
    """One backbone's sizes and functions. Hashable, so that jit takes it as static.

    Layers are counted from 0. Parameters are the tree of `module()`, and a kernel's path in it is
    its `nn.Dense` module's path and "kernel": Gradient ID reads a layer's input and output there.
    """

    # What every family has as a field or a property.
    image_size: int  # pixels along a side
    dim: int  # width of a token, and of q(x)
    depth: int  # number of layers
    heads: int
    dtype: str  # of the computation; parameters keep their own
    preprocessing: ClassVar[Preprocessing] = Preprocessing()
    # Names that `target_modules` may join, and the dense layers of a block that each stands for.
    modules: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.dim // self.heads

    # The network.

    @abc.abstractmethod
    def module(self) -> nn.Module:
        """Return the Flax module, which has the methods `embed`, `run_blocks` and `pool`."""

    def embed(
        self, params: pytrees.Tree, images: jax.Array, prompts: jax.Array | None = None
    ) -> jax.Array:
        """Embed images in [0, 1] `[B, H, W, 3]` as tokens `[B, 1 + P + patches, dim]`.

        `prompts` `[B, P, dim]` stand behind the first token.
        """
        images = self.preprocessing.normalize(images)
        return self.module().apply({"params": params}, images, prompts, method="embed")

    def run_blocks(
        self,
        params: pytrees.Tree,
        tokens: jax.Array,
        prefix: Prefix | None = None,
        start: int = 0,
        stop: int | None = None,
        prompts: int = 0,
    ) -> jax.Array:
        """Run layers `start` to `stop` (None: to the last) on tokens `[B, N, dim]`.

        `prefix[layer]` `[B or 1, 2, length, heads, head_dim]` holds keys, then values, that stand
        before the layer's own. Behind the last layer only the first token and the `prompts` behind
        it have to be left.
        """
        return self.module().apply(
            {"params": params}, tokens, prefix, start, stop, prompts, method="run_blocks"
        )

    def pool(self, params: pytrees.Tree, tokens: jax.Array, prompts: int = 0) -> jax.Array:
        """Return features `[B, dim]` of the last layer's tokens; with `prompts`, those tokens'."""
        return self.module().apply({"params": params}, tokens, prompts, method="pool")

    def features(self, params: pytrees.Tree, images: jax.Array) -> jax.Array:
        """Return q(x) `[B, dim]` of images in [0, 1] `[B, H, W, 3]`: no prompt, no mask."""
        return self.pool(params, self.run_blocks(params, self.embed(params, images)))

    # Addresses of layers.

    @abc.abstractmethod
    def block_path(self, layer: int) -> str:
        """Return the path of a layer's block in the parameter tree."""

    @abc.abstractmethod
    def layer_of(self, path: str) -> int | None:
        """Return the layer that the parameter at `path` belongs to; None: to none of them."""

    def kernel_paths(self, modules: Iterable[str], layers: Iterable[int]) -> tuple[str, ...]:
        """Return the paths of the kernels of `modules` in `layers`. Biases are never among them."""
        names = [name for module in modules for name in self.modules[module]]
        return tuple(
            f"{self.block_path(layer)}/{name}/kernel" for layer in layers for name in names
        )

    def fused(self, path: str) -> int:
        """Return how many products stand side by side in the kernel at `path`: 3 for q, k and v."""
        return 1

    @abc.abstractmethod
    def query_layer(self, path: Sequence[str]) -> int | None:
        """Return the layer whose queries are the first `dim` outputs of the module at `path`.

        None where the module computes no queries. PGP watches attention queries by it.
        """

    @abc.abstractmethod
    def bottleneck_widths(self, layer: int) -> dict[str, int]:
        """Return where residual bottlenecks may stand in a layer: parameter path to width."""

    # The classifier, which belongs to the family.

    def init_classifier(self, key: jax.Array, class_names: Sequence[str]) -> pytrees.Tree:
        """Draw a classifier over `class_names` as timm does: N(0, 0.02²), bias 0."""
        kernel = 0.02 * jax.random.normal(key, (self.dim, len(class_names)), jnp.float32)
        return {"kernel": kernel, "bias": jnp.zeros((len(class_names),), jnp.float32)}

    def classify(self, classifier: pytrees.Tree, features: jax.Array) -> jax.Array:
        """Return logits `[B, classes]` in float32 or wider of features `[B, dim]`."""
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        kernel, bias = classifier["kernel"], classifier["bias"]
        return jnp.matmul(features, kernel, precision="highest") + bias[None]

    # Checkpoints.

    @abc.abstractmethod
    def convert(self, arrays: Mapping[str, np.ndarray]) -> tuple[pytrees.Tree, tuple[str, ...]]:
        """Return a file's arrays as this family's parameters, and the names that have no place.

        Arrays are float32 afterwards; float64 ones stay so. Raises ValueError naming an array that
        is missing or of the wrong shape.
        """

    @abc.abstractmethod
    def at_size(self, image_size: int) -> "Architecture":
        """Return the same backbone for images of another size. Raises ValueError where none is."""

    @abc.abstractmethod
    def fit_size(self, params: pytrees.Tree) -> pytrees.Tree:
        """Return a checkpoint's parameters fitted to `image_size`, if that is not its own."""


def check_layers(field: str, layers: Sequence[int], depth: int, name: str) -> None:
    """Raise UserError where one of `layers`, counted from 1, is not a layer of backbone `name`."""
    for layer in layers:
        if not 1 <= layer <= depth:
            raise UserError(f"{field}: layer {layer} is not one of {name}'s layers 1 to {depth}")
