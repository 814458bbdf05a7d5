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
        # The two-pass variance is what PyTorch computes; the one-pass form cancels in float32. What
        # it loses, in float32 too, is below the rounding of tokens that are bfloat16.
        return nn.LayerNorm(
            epsilon=self.epsilon,
            dtype=self.dtype,
            use_fast_variance=self.dtype == "bfloat16",
            name=name,
        )


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array | None = None) -> jax.Array:
    """Return scaled dot-product attention, shaped as the queries `q` `[B, Q, heads, D]`.

    Keys `k` and values `v` are `[B, K, heads, D]`; `visible`, bool `[Q, K]`, says which keys a
    query sees, at least one (None: all). The softmax is in float32 or wider.

    Heads come first throughout: on a CPU that takes a quarter of the time of Flax's form, whose
    batched products XLA takes over strided arrays. The softmax is divided out before the product
    with the values: XLA's TPU compiler then joins its derivative with the products around it, and
    forecasts two fifths fewer cycles (benchmarks/README.md).
    """
    accumulate_dtype = q.dtype if jnp.finfo(q.dtype).bits >= 32 else jnp.float32
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=accumulate_dtype)
    if visible is not None:
        scores = jnp.where(visible[None, None], scores, -jnp.inf)
    shares = nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", shares, v).transpose(0, 2, 1, 3)


@jax.jit  # so that it is traced once for all layers of a size
def _product(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Return x kernel + bias `[B, N, out]` of tokens `x` `[B, N, in]`."""

    def of_images(x, kernel, bias):
        return x @ kernel + bias[None, None]

    def of_rows(x, kernel, bias):
        out = x.reshape(x.shape[0] * x.shape[1], -1) @ kernel + bias[None]
        return out.reshape(*x.shape[:2], kernel.shape[1])

    # The kernel's gradient multiplies tokens by the output's gradient. XLA's CPU compiler
    # transposes the latter by a loop over single numbers, unless all images' tokens are one
    # matrix: that loop was a third of a step with masks on all layers. On a TPU, making one matrix
    # copies every token (benchmarks/README.md). GPUs get the TPUs' form, untried.
    return jax.lax.platform_dependent(x, kernel, bias, cpu=of_rows, default=of_images)


class Dense(nn.Dense):
    """`nn.Dense` of tokens, with a bias, in the form that suits the backend."""

    def product(self, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        """Return x kernel + bias `[B, N, out]`.

        `x` `[B, N, in]`, `kernel` `[in, out]` and `bias` `[out]` have one dtype.
        """
        return _product(x, kernel, bias)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform each token of `[B, N, in]`; return `[B, N, features]`."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)
        return self.product(*self.promote_dtype(x, kernel, bias, dtype=self.dtype))


class ThreeProducts(Dense):
    """`Dense`, computed as a product for each third of its columns.

    Whoever splits the result in three again gets those products themselves: XLA takes a split of a
    joined array away. Told apart by heads from one product instead, q, k and v are copied on a TPU.
    """

    def product(self, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        """Return x kernel + bias `[B, N, out]`, the products by the thirds of `kernel` joined."""
        thirds = zip(jnp.split(kernel, 3, axis=1), jnp.split(bias, 3), strict=True)
        return jnp.concatenate([_product(x, columns, own) for columns, own in thirds], axis=-1)


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
        qkv = ThreeProducts(3 * c.dim, dtype=c.dtype, name="qkv")(x)
        q, k, v = (
            part.reshape(batch, tokens, c.heads, c.head_dim) for part in jnp.split(qkv, 3, axis=-1)
        )
        q = q[:, :queries]
        if prefix is not None:
            prefix = jnp.broadcast_to(prefix.astype(k.dtype), (batch, *prefix.shape[1:]))
            k = jnp.concatenate([prefix[:, 0], k], axis=1)
            v = jnp.concatenate([prefix[:, 1], v], axis=1)
        visible = None
        if c.causal:  # token i sees the whole prefix and the tokens 0 to i
            visible = jnp.tri(q.shape[1], k.shape[1], k.shape[1] - tokens, dtype=bool)
        out = attend(q, k, v, visible)
        return Dense(c.dim, dtype=c.dtype, name="proj")(out.reshape(batch, -1, c.dim))


def _gelu(x: jax.Array) -> jax.Array:
    # As PyTorch computes it, but bfloat16 in float32. jax.nn.gelu takes erfc, which has two
    # branches: with it the MLP takes a fifth more cycles on a TPU.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


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
        x = self._adapted("adapter1", Dense(c.mlp_dim, dtype=c.dtype, name="fc1")(x))
        x = Dense(c.dim, dtype=c.dtype, name="fc2")(_ACTIVATIONS[c.activation](x))
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
