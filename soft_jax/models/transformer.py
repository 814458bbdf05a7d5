"""Pre-norm transformer layers in Flax linen, with optional key/value prefixes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What the layers of one transformer have in common.

    `activation` is that of the MLP: "gelu", by the error function, or "quick_gelu", x σ(1.702 x).
    With `causal`, a token attends to prefixes, to itself and to the tokens before it alone.
    """

    dim: int
    heads: int
    mlp_dim: int
    dtype: str = "float32"
    epsilon: float = 1e-6  # of LayerNorm
    activation: str = "gelu"
    causal: bool = False

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.dim // self.heads

    @property
    def precision(self) -> str:
        """Return the precision of matrix products with which they are in `dtype`."""
        # TPUs and GPUs would otherwise multiply float32 in bfloat16 or TF32, and "float32" would
        # not be what it says.
        return "default" if self.dtype == "bfloat16" else "highest"

    def layer_norm(self, name: str | None = None) -> nn.LayerNorm:
        """Make a LayerNorm module."""
        # The two-pass variance is what PyTorch computes; the one-pass form cancels in float32.
        return nn.LayerNorm(
            epsilon=self.epsilon, dtype=self.dtype, use_fast_variance=False, name=name
        )


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array | None = None) -> jax.Array:
    """Return scaled dot-product attention, shaped as the queries `q` `[B, Q, heads, D]`.

    Keys `k` and values `v` are `[B, K, heads, D]`; `visible`, bool `[Q, K]`, says which keys a
    query sees, at least one (None: all). The softmax is in float32 or wider, and its sum is divided
    out last, where the array is smallest; heads come first throughout. On a CPU that takes a
    quarter of the time of Flax's, whose batched products XLA takes over strided arrays.
    """
    accumulate_dtype = q.dtype if jnp.finfo(q.dtype).bits >= 32 else jnp.float32
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=accumulate_dtype)
    if visible is not None:
        scores = jnp.where(visible[None, None], scores, -jnp.inf)
    unnormalized = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    values = jnp.einsum(
        "bhqk,bhkd->bhqd", unnormalized.astype(v.dtype), v, preferred_element_type=accumulate_dtype
    )
    return (values / unnormalized.sum(axis=-1, keepdims=True)).astype(v.dtype).transpose(0, 2, 1, 3)


class Attention(nn.Module):
    """Multi-head self-attention; a prefix is put before the layer's own keys and values (prefix
    tuning).
    """

    config: LayerConfig

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
        visible = None
        if c.causal:  # token i sees the whole prefix and the tokens 0 to i
            visible = jnp.tri(q.shape[1], k.shape[1], k.shape[1] - tokens, dtype=bool)
        out = attend(q, k, v, visible)
        return nn.Dense(c.dim, dtype=c.dtype, name="proj")(out.reshape(batch, -1, c.dim))


def _gelu(x: jax.Array) -> jax.Array:
    return nn.gelu(x, approximate=False)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * nn.sigmoid(1.702 * x)


_ACTIVATIONS = {"gelu": _gelu, "quick_gelu": _quick_gelu}


class Mlp(nn.Module):
    """Two dense layers with the activation between them.

    Where its parameters hold `adapter1` or `adapter2`, `{"down": [width, rank], "up": [rank,
    width]}`, that residual bottleneck, with the erf GELU, follows fc1 or fc2. A backbone has none;
    a task may bring them.
    """

    config: LayerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform each token of `[B, N, dim]`; the shape stays."""
        c = self.config
        x = self._adapted("adapter1", nn.Dense(c.mlp_dim, dtype=c.dtype, name="fc1")(x))
        x = nn.Dense(c.dim, dtype=c.dtype, name="fc2")(_ACTIVATIONS[c.activation](x))
        return self._adapted("adapter2", x)

    def _adapted(self, name: str, x: jax.Array) -> jax.Array:
        if not self.has_variable("params", name):
            return x
        down, up = (
            self.get_variable("params", name)[part].astype(x.dtype) for part in ("down", "up")
        )
        return x + _gelu(x @ down) @ up


class Block(nn.Module):
    """One pre-norm transformer layer."""

    config: LayerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, prefix: jax.Array | None = None, queries: int | None = None
    ) -> jax.Array:
        """Transform tokens `[B, N, dim]`; `prefix` and `queries` are as for `Attention`."""
        c = self.config
        x = x[:, :queries] + Attention(c, name="attn")(c.layer_norm("norm1")(x), prefix, queries)
        return x + Mlp(c, name="mlp")(c.layer_norm("norm2")(x))
