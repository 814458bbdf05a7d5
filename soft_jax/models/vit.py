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


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Return scaled dot-product attention, shaped as the queries `q` `[B, Q, heads, D]`.

    Keys `k` and values `v` are `[B, K, heads, D]`. The softmax is in float32 or wider, and its sum
    is divided out last, where the array is smallest; heads come first throughout. On a CPU that
    takes a quarter of the time of Flax's, whose batched products XLA takes over strided arrays.
    """
    accumulate_dtype = q.dtype if jnp.finfo(q.dtype).bits >= 32 else jnp.float32
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=accumulate_dtype)
    unnormalized = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    values = jnp.einsum(
        "bhqk,bhkd->bhqd", unnormalized.astype(v.dtype), v, preferred_element_type=accumulate_dtype
    )
    return (values / unnormalized.sum(axis=-1, keepdims=True)).astype(v.dtype).transpose(0, 2, 1, 3)


class Attention(nn.Module):
    """Multi-head self-attention; a prefix is put before the layer's own keys and values (prefix
    tuning).
    """

    config: ViTConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, prefix: jax.Array | None = None, queries: int | None = None
    ) -> jax.Array:
        """Attend over tokens `[B, N, dim]`; return the first `queries` of them (all by default).

        `prefix` is `[B or 1, 2, length, heads, head_dim]`, keys then values.
        """
        c = self.config
        batch, tokens, _ = x.shape
        qkv = nn.Dense(3 * c.dim, dtype=c.dtype, name="qkv")(x).reshape(
            batch, tokens, 3, c.heads, c.head_dim
        )
        q, k, v = qkv[:, :queries, 0], qkv[:, :, 1], qkv[:, :, 2]
        if prefix is not None:
            prefix = jnp.broadcast_to(prefix.astype(k.dtype), (batch, *prefix.shape[1:]))
            k = jnp.concatenate([prefix[:, 0], k], axis=1)
            v = jnp.concatenate([prefix[:, 1], v], axis=1)
        out = attend(q, k, v)
        return nn.Dense(c.dim, dtype=c.dtype, name="proj")(out.reshape(batch, -1, c.dim))


class Mlp(nn.Module):
    """Two dense layers with the erf GELU between them.

    Where its parameters hold `adapter1` or `adapter2`, `{"down": [width, rank], "up": [rank,
    width]}`, that residual bottleneck follows fc1 or fc2. A backbone has none; a task may bring
    them.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform each token of `[B, N, dim]`; the shape stays."""
        c = self.config
        x = self._adapted("adapter1", nn.Dense(c.mlp_dim, dtype=c.dtype, name="fc1")(x))
        return self._adapted(
            "adapter2", nn.Dense(c.dim, dtype=c.dtype, name="fc2")(nn.gelu(x, approximate=False))
        )

    def _adapted(self, name: str, x: jax.Array) -> jax.Array:
        if not self.has_variable("params", name):
            return x
        down, up = (
            self.get_variable("params", name)[part].astype(x.dtype) for part in ("down", "up")
        )
        return x + nn.gelu(x @ down, approximate=False) @ up


def _layer_norm(config: ViTConfig, name: str) -> nn.LayerNorm:
    # The two-pass variance is what PyTorch computes; the one-pass form cancels in float32.
    return nn.LayerNorm(epsilon=1e-6, dtype=config.dtype, use_fast_variance=False, name=name)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, prefix: jax.Array | None = None, queries: int | None = None
    ) -> jax.Array:
        """Transform tokens `[B, N, dim]`; `prefix` and `queries` are as for `Attention`."""
        c = self.config
        x = x[:, :queries] + Attention(c, name="attn")(_layer_norm(c, "norm1")(x), prefix, queries)
        return x + Mlp(c, name="mlp")(_layer_norm(c, "norm2")(x))


class ViT(nn.Module):
    """The whole backbone, callable in parts so that layers which tasks share are computed once.

    `__call__` is `embed`, then `run_blocks` over all layers, then `pool`. Layers count from 0 here.
    """

    config: ViTConfig

    def setup(self):
        """Name the parameters: patch_embed, cls_token, pos_embed, blocks_0 and on, norm."""
        c = self.config
        self.patch_embed = nn.Conv(
            c.dim,
            (c.patch_size, c.patch_size),
            (c.patch_size, c.patch_size),
            padding="VALID",
            dtype=c.dtype,
        )
        self.cls_token = self.param("cls_token", nn.initializers.zeros, (1, 1, c.dim))
        self.pos_embed = self.param(
            "pos_embed", nn.initializers.normal(0.02), (1, c.grid**2 + 1, c.dim)
        )
        self.blocks = [Block(c) for _ in range(c.depth)]
        self.norm = _layer_norm(c, "norm")

    def embed(self, images: jax.Array) -> jax.Array:
        """Embed normalized images `[B, H, W, 3]` as tokens `[B, 1 + patches, dim]`.

        The first is the [class] token.
        """
        c = self.config
        with jax.default_matmul_precision(_precision(c)):
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
        with jax.default_matmul_precision(_precision(self.config)):
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


def _precision(config: ViTConfig) -> str:
    # TPUs and GPUs would otherwise multiply float32 in bfloat16 or TF32, and "float32" would not be
    # what it says.
    return "default" if config.dtype == "bfloat16" else "highest"
