"""DualPrompt's prompts (Wang et al., 2022): key/value prefixes, their look-up, and key matching."""

import jax
import jax.numpy as jnp

LAYOUTS = ("separate", "interleaved")


def from_zero(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Return layers that a setting counts from 1, counted from 0, in order and each once."""
    return tuple(sorted({layer - 1 for layer in layers}))


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw prompts or prompt keys from U(-1, 1), float32 `shape`."""
    return jax.random.uniform(key, shape, jnp.float32, -1, 1)


def prefix_sources(layout: str, positions: jax.Array, batch: jax.Array) -> jax.Array | None:
    """Return which half of an E-prompt gives each image its key prefix, and which its value prefix.

    "separate" gives the key prompt as key and the value prompt as value: None stands for that.
    "interleaved" is what the published prompt-pool look-up does, which *reshapes* `[2, B, ...]` to
    `[B, 2, ...]`: flat entry f of the first comes from half f // B, and image b gets entries 2b and
    2b + 1. The result then depends on the image's position in its batch; for a batch of one image
    it is the same as "separate".

    Args:
        layout: "separate" or "interleaved".
        positions: int `[B]`, each image's position in its batch.
        batch: int, scalar or `[B]`, that batch's number of images.

    Returns:
        int `[B, 2]`, or None.
    """
    if layout == "separate":
        return None
    flat = 2 * positions[:, None] + jnp.arange(2)[None]
    return jnp.clip(flat // jnp.maximum(jnp.broadcast_to(batch, positions.shape), 1)[:, None], 0, 1)


def prefixes(
    prompt: jax.Array, layers: tuple[int, ...], sources: jax.Array | None = None
) -> dict[int, jax.Array]:
    """Split a prompt `[layers, 2, length, heads, head_dim]` by layer.

    The result is `{layer: [1 or B, 2, length, heads, head_dim]}`: B with `sources`, else 1.
    """
    rows = prompt[:, None] if sources is None else prompt[:, sources]
    return dict(zip(layers, rows, strict=True))


def row_prefixes(
    rows: jax.Array, layers: tuple[int, ...], sources: jax.Array | None = None
) -> dict[int, jax.Array]:
    """Split one prompt per image, `[B, layers, 2, length, heads, head_dim]`, by layer.

    The result is `{layer: [B, 2, length, heads, head_dim]}`.
    """
    if sources is not None:
        rows = jnp.take_along_axis(rows, sources[:, None, :, None, None, None], axis=2)
    return {layer: rows[:, i] for i, layer in enumerate(layers)}


def normalize(x: jax.Array) -> jax.Array:
    """Return `x / |x|`, with the norm over the last axis."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


def similarity(query: jax.Array, keys: jax.Array) -> jax.Array:
    """Return cos(q(x), k) of queries `[B, dim]` and keys `[K, dim]`: `[B, K]`."""
    return jnp.matmul(normalize(query), normalize(keys).T, precision="highest")


def nearest(similarity: jax.Array, count: int) -> jax.Array:
    """Return the `count` nearest keys of each image by itself, int `[B, count]` (L2P).

    `similarity` is `[B, size]`.
    """
    return jax.lax.top_k(similarity, count)[1]


def most_selected(selected: jax.Array, weights: jax.Array, size: int) -> jax.Array:
    """Return the prompts that most images of a batch select, for all of its images.

    This is L2P's selection for a batch (Wang et al., 2022, `batchwise_prompt`).

    Args:
        selected: int `[B, count]`, each image's own selection.
        weights: `[B]`, 0 for padding, whose selection does not count.
        size: of the pool. Of prompts selected equally often, the first in the pool are taken.

    Returns:
        int `[B, count]`, the same row for each image.
    """
    votes = (
        jnp.zeros(size, weights.dtype)
        .at[selected]
        .add(jnp.broadcast_to((weights > 0).astype(weights.dtype)[:, None], selected.shape))
    )
    return jnp.broadcast_to(jax.lax.top_k(votes, selected.shape[1])[1][None], selected.shape)
