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
    dim: int  # width of an image's token; `feature_dim` is that of q(x)
    depth: int  # number of layers
    heads: int
    dtype: str  # of the computation; parameters keep their own
    preprocessing: ClassVar[Preprocessing] = Preprocessing()
    # Names that `target_modules` may join, and the dense layers of a block that each stands for.
    modules: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # Whether there is a text encoder: `tokenize` and `encode_text`.
    reads_text: ClassVar[bool] = False

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.dim // self.heads

    @property
    def feature_dim(self) -> int:
        """Return the width of q(x) and of what `pool` returns."""
        return self.dim

    @property
    def towers(self) -> Mapping[str, int]:
        """Return the number of layers of each encoder by its name; "vision" reads the images."""
        return {"vision": self.depth}

    # The network.

    @abc.abstractmethod
    def module(self) -> nn.Module:
        """Return the Flax module, which has the methods `embed`, `run_blocks` and `pool`."""

    def embed(self, params: pytrees.Tree, images: jax.Array) -> jax.Array:
        """Embed images in [0, 1] `[B, H, W, 3]` as tokens `[B, N, dim]`."""
        images = self.preprocessing.normalize(images)
        return self.module().apply({"params": params}, images, method="embed")

    def insert_prompts(
        self, params: pytrees.Tree, tokens: jax.Array, prompts: jax.Array
    ) -> jax.Array:
        """Put `prompts` `[B or 1, P, dim]` behind the first of embedded tokens `[B, N, dim]`.

        Returns `[B, N + P, dim]`. Prompts get no position; they are trained where they stand.
        """
        prompts = jnp.broadcast_to(prompts.astype(tokens.dtype), (len(tokens), *prompts.shape[1:]))
        return jnp.concatenate([tokens[:, :1], prompts, tokens[:, 1:]], axis=1)

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
        """Return features `[B, feature_dim]` of the last layer's tokens.

        With `prompts`, they are of the tokens of that many prompts.
        """
        return self.module().apply({"params": params}, tokens, prompts, method="pool")

    def features(self, params: pytrees.Tree, images: jax.Array) -> jax.Array:
        """Return q(x) `[B, feature_dim]` of images in [0, 1] `[B, H, W, 3]`: no prompt, no mask."""
        return self.pool(params, self.run_blocks(params, self.embed(params, images)))

    # Text, where the family reads any.

    def tokenize(self, texts: Sequence[str], context: int = 0) -> np.ndarray:
        """Return token ids, int32 `[N, L]`, of texts with room for `context` vectors before each.

        Raises NotImplementedError where `reads_text` is False.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no text")

    def encode_text(
        self, params: pytrees.Tree, ids: jax.Array, contexts: jax.Array | None = None
    ) -> jax.Array:
        """Return text features `[N, feature_dim]`, not normalized, of token ids int `[N, L]`.

        `contexts` `[N or 1, n, width]` stand in the places 1 to n, which `tokenize` has left free.
        Raises NotImplementedError where `reads_text` is False.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no text")

    # Addresses of layers.

    @abc.abstractmethod
    def block_path(self, layer: int, tower: str = "vision") -> str:
        """Return the path of a tower's layer in the parameter tree."""

    @abc.abstractmethod
    def layer_of(self, path: str) -> int | None:
        """Return the vision tower's layer that the parameter at `path` is of; None: of none."""

    def kernel_paths(
        self, modules: Iterable[str], layers: Iterable[int], tower: str = "vision"
    ) -> tuple[str, ...]:
        """Return the paths of the kernels of `modules` in a tower's `layers`.

        Biases are never among them.
        """
        names = [name for module in modules for name in self.modules[module]]
        return tuple(
            f"{self.block_path(layer, tower)}/{name}/kernel" for layer in layers for name in names
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
    def bottleneck_widths(self, layer: int, tower: str = "vision") -> dict[str, int]:
        """Return where residual bottlenecks may stand in a tower's layer: path to width."""

    # The classifier, which belongs to the family.

    def init_classifier(self, key: jax.Array, class_names: Sequence[str]) -> pytrees.Tree:
        """Draw a classifier over `class_names` as timm does: N(0, 0.02²), bias 0."""
        kernel = 0.02 * jax.random.normal(key, (self.feature_dim, len(class_names)), jnp.float32)
        return {"kernel": kernel, "bias": jnp.zeros((len(class_names),), jnp.float32)}

    def classify(
        self, params: pytrees.Tree, classifier: pytrees.Tree, features: jax.Array
    ) -> jax.Array:
        """Return logits `[B, classes]` in float32 or wider of features `[B, feature_dim]`.

        `params` are those that the features were computed with.
        """
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
