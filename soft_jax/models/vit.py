"""Vision Transformer (Dosovitskiy et al., 2021) in Flax linen, pre-norm, with optional key/value
prefixes.

The module knows nothing of masks or tasks: a method changes the parameter tree and fills `prefix`
before `apply`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.models import vit_checkpoints
from soft_jax.models.protocol import Architecture, Prefix, Preprocessing
from soft_jax.models.transformer import Block, LayerConfig


@dataclasses.dataclass(frozen=True)
class ViTConfig(Architecture):
    """Sizes of a ViT, and what the rest of the program has to know of the family."""

    image_size: int
    patch_size: int
    dim: int
    depth: int
    heads: int
    mlp_dim: int
    dtype: str = "float32"
    preprocessing: Preprocessing = Architecture.preprocessing

    # "qv" is "qkv" for those that tell q, k and v apart (LoRA).
    modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "qkv": ("attn/qkv",),
        "qv": ("attn/qkv",),
        "proj": ("attn/proj",),
        "mlp": ("mlp/fc1", "mlp/fc2"),
    }

    @property
    def grid(self) -> int:
        """Return the number of patches along one side of an image."""
        return self.image_size // self.patch_size

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of the backbone's patch size "
                f"{self.patch_size}"
            )
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")

    @property
    def layer(self) -> LayerConfig:
        """Return what its layers have in common."""
        return LayerConfig(self.dim, self.heads, self.mlp_dim, self.dtype)

    def module(self) -> "ViT":
        """Return the Flax module."""
        return ViT(self)

    def block_path(self, layer: int, tower: str = "vision") -> str:
        """Return the path of a layer's block, such as "blocks_3"; there is one tower."""
        return f"blocks_{layer}"

    def layer_of(self, path: str) -> int | None:
        """Return the layer of a path: 3 for "blocks_3/attn/qkv/kernel", None outside the blocks."""
        found = re.match(r"blocks_(\d+)/", path)
        return int(found[1]) if found else None

    def fused(self, path: str) -> int:
        """Return 3 for the kernel that holds q, k and v."""
        return 3 if path.endswith("attn/qkv/kernel") else 1

    def query_layer(self, path: Sequence[str]) -> int | None:
        """Return the layer of a fused qkv product."""
        return self.layer_of("/".join(path)) if tuple(path[-2:]) == ("attn", "qkv") else None

    def bottleneck_widths(self, layer: int, tower: str = "vision") -> dict[str, int]:
        """Return the places behind fc1 and behind fc2, where `Mlp` looks for them."""
        mlp = f"{self.block_path(layer, tower)}/mlp"
        return {f"{mlp}/adapter1": self.mlp_dim, f"{mlp}/adapter2": self.dim}

    def convert(self, arrays: Mapping[str, np.ndarray]) -> tuple[pytrees.Tree, tuple[str, ...]]:
        """Convert arrays in Google's or timm's naming to our tree (`vit_checkpoints`)."""
        return vit_checkpoints.convert(arrays, self)

    def at_size(self, image_size: int) -> "ViTConfig":
        """Return this ViT for images of `image_size` pixels, a multiple of the patch size."""
        return dataclasses.replace(self, image_size=image_size)

    def fit_size(self, params: pytrees.Tree) -> pytrees.Tree:
        """Return `params` with the position embeddings resized to this grid."""
        resized = vit_checkpoints.interpolate_positions(params["pos_embed"], self.grid)
        return params | {"pos_embed": resized}


class ViT(nn.Module):
    """The whole backbone, callable in parts so that layers which tasks share are computed once.

    `__call__` is `embed`, then `run_blocks` over all layers, then `pool`. Layers count from 0 here.
    """

    config: ViTConfig
    patch_bias: bool = True

    def setup(self):
        """Name the parameters: patch_embed, cls_token, pos_embed, blocks_0 and on, norm."""
        c = self.config
        self.patch_embed = nn.Conv(
            c.dim,
            (c.patch_size, c.patch_size),
            (c.patch_size, c.patch_size),
            padding="VALID",
            use_bias=self.patch_bias,
            dtype=c.dtype,
        )
        self.cls_token = self.param("cls_token", nn.initializers.zeros, (1, 1, c.dim))
        self.pos_embed = self.param(
            "pos_embed", nn.initializers.normal(0.02), (1, c.grid**2 + 1, c.dim)
        )
        self.blocks = [Block(c.layer) for _ in range(c.depth)]
        self.norm = c.layer.layer_norm("norm")

    def embed(self, images: jax.Array) -> jax.Array:
        """Embed normalized images `[B, H, W, 3]` as tokens `[B, 1 + patches, dim]`.

        The first is the [class] token.
        """
        c = self.config
        with jax.default_matmul_precision(c.layer.precision):
            patches = self.patch_embed(images.astype(c.dtype)).reshape(
                images.shape[0], c.grid**2, c.dim
            )
        cls = jnp.broadcast_to(self.cls_token.astype(c.dtype), (images.shape[0], 1, c.dim))
        return jnp.concatenate([cls, patches], axis=1) + self.pos_embed.astype(c.dtype)

    def run_blocks(
        self,
        tokens: jax.Array,
        prefix: Prefix | None = None,
        start: int = 0,
        stop: int | None = None,
        prompts: int = 0,
    ) -> jax.Array:
        """Run layers `start` to `stop` (all by default) on tokens `[B, N, dim]`.

        After the last layer only the [class] token and the `prompts` tokens behind it are left,
        `[B, 1 + prompts, dim]`. `prefix[layer]` is `[B or 1, 2, length, heads, head_dim]`, keys
        then values.
        """
        prefix = prefix or {}
        with jax.default_matmul_precision(self.config.layer.precision):
            for layer in range(self.config.depth)[start:stop]:
                # Nothing reads the other tokens of the last layer.
                tokens = self.blocks[layer](
                    tokens,
                    prefix.get(layer),
                    queries=1 + prompts if layer == self.config.depth - 1 else None,
                )
        return tokens

    def pool(self, tokens: jax.Array, prompts: int = 0) -> jax.Array:
        """Return the features `[B, dim]`: the [class] token after the final norm.

        With `prompts`, they are the mean of that many prompts' tokens after it (L2P's features).
        """
        return (
            self.norm(tokens[:, 1 : 1 + prompts]).mean(axis=1)
            if prompts
            else self.norm(tokens[:, 0])
        )

    def __call__(self, images: jax.Array, prefix: Prefix | None = None) -> jax.Array:
        """Return the features `[B, dim]` of normalized images `[B, H, W, 3]`."""
        return self.pool(self.run_blocks(self.embed(images), prefix))
