"""Pre-norm transformer layers in Flax linen, with optional key/value prefixes."""

from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from soft_jax.models.vit import ViTConfig


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

    config: "ViTConfig"

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

    config: "ViTConfig"

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


def layer_norm(config: "ViTConfig", name: str) -> nn.LayerNorm:
    """Make a LayerNorm module."""
    # The two-pass variance is what PyTorch computes; the one-pass form cancels in float32.
    return nn.LayerNorm(epsilon=1e-6, dtype=config.dtype, use_fast_variance=False, name=name)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    config: "ViTConfig"

    @nn.compact
    def __call__(
        self, x: jax.Array, prefix: jax.Array | None = None, queries: int | None = None
    ) -> jax.Array:
        """Transform tokens `[B, N, dim]`; `prefix` and `queries` are as for `Attention`."""
        c = self.config
        x = x[:, :queries] + Attention(c, name="attn")(layer_norm(c, "norm1")(x), prefix, queries)
        return x + Mlp(c, name="mlp")(layer_norm(c, "norm2")(x))


def precision(config: "ViTConfig") -> str:
    """Return the precision that matrix products need for the computation to be in `dtype`."""
    # TPUs and GPUs would otherwise multiply float32 in bfloat16 or TF32, and "float32" would not be
    # what it says.
    return "default" if config.dtype == "bfloat16" else "highest"
