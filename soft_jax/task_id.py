"""Task identity at test time: Prompt ID from the keys, Gradient ID from the superposed mask, and the published batch vote."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import prompts, trees
from soft_jax.methods import Method, Shared


@jax.jit
def key_similarity(query: jax.Array, keys: jax.Array) -> jax.Array:
    """cos(q(x), k) for queries `[N, dim]` and keys `[K, dim]`: `[N, K]`; Prompt ID is its argmax over the keys."""
    return prompts.similarity(query.astype(keys.dtype), keys)


def vote(ids: np.ndarray, pool: int) -> int:
    """The most frequent of a batch's ids, int `[B]`, as the published code finds it among `pool` prompts.

    Ties are common, and the traces have them: the published code leaves them to PyTorch's top-k of the counts (present ids in
    order, then zeros up to the pool's size), which on a CPU is C++'s nth_element for 4 to 63 entries and else the first.
    """
    present, counts = np.unique(ids, return_counts=True)
    counts = np.concatenate([counts, np.zeros(max(pool - len(counts), 0), int)])
    winner = _nth_element_first(counts) if 3 < len(counts) < 64 else int(counts.argmax())
    return int(present[winner])


def _nth_element_first(values: np.ndarray) -> int:
    """The index that libstdc++'s introselect (std::nth_element, descending) brings to the front."""
    order = list(range(len(values)))

    def above(i: int, j: int) -> bool:
        return values[order[i]] > values[order[j]]

    def swap(i: int, j: int) -> None:
        order[i], order[j] = order[j], order[i]

    last = len(order)
    while last > 3:
        # Which of equal candidates is the median matters: libstdc++ asks in this order.
        a, b, c = 1, last // 2, last - 1
        low, high = (b, a) if above(a, b) else (a, b)
        swap(0, low if above(low, c) else c if above(high, c) else high)
        left, right = 1, last
        while True:
            while above(left, 0):
                left += 1
            right -= 1
            while above(0, right):
                right -= 1
            if left >= right:
                break
            swap(left, right)
            left += 1
        last = left
    return max(order[:last], key=lambda i: values[i])


def majority(ids: np.ndarray, batches: np.ndarray, pool: int) -> np.ndarray:
    """The published vote: every image of a test batch gets the id that `vote` gives the batch.

    Args:
        ids: int `[N]`.
        batches: int `[N]`, the batch that each image belongs to.
        pool: the number of prompts.

    Returns:
        int `[N]`.
    """
    voted = np.empty_like(ids)
    for batch in np.unique(batches):
        members = batches == batch
        voted[members] = vote(ids[members], pool)
    return voted


def entropy_of_top(logits: jax.Array, top: jax.Array) -> jax.Array:
    """Entropy of the softmax over the `top` highest of logits `[..., classes]`; `top` may be traced."""
    ranked = -jnp.sort(-logits, axis=-1)
    kept = jnp.arange(logits.shape[-1]) < top
    log_p = jax.nn.log_softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    return -jnp.sum(jnp.where(kept, jnp.exp(log_p) * jnp.where(kept, log_p, 0), 0), axis=-1)


@functools.partial(jax.jit, static_argnames="method")
def mask_gradients(
    method: Method,
    backbone: trees.Tree,
    mask: trees.Tree,
    prompt: jax.Array,
    shared: Shared,
    tokens: jax.Array,
    weights: jax.Array,
    tasks: jax.Array,
) -> trees.Tree:
    """∂H/∂M of several test batches at once, each by itself, at the superposed mask M = Σ α_t m_t.

    H is the batch mean of the entropy over the top C/T logits, C classes of the head and T tasks seen. At any α,
    ∂H/∂α_t = ⟨∂H/∂M, m_t⟩, so one backward pass serves all tasks.

    Args:
        method: the method, which has masks.
        backbone: frozen parameters.
        mask: M, a mask tree.
        prompt: each batch's E-prompt, `[G, layers, 2, length, heads, head_dim]`.
        shared: the shared part.
        tokens: trunk tokens `[G, S, N, dim]`.
        weights: `[G, S]`, 0 for padding, which stands at the end.
        tasks: T, int.

    Returns:
        A mask tree with a leading axis G.
    """

    def entropy(mask, prompt, tokens, weights):
        total = jnp.maximum(weights.sum(), 1)
        sources = prompts.prefix_sources(method.prefix_layout, jnp.arange(len(weights)), total.astype(int))
        logits = method.logits(backbone, {"prompt": prompt, "mask": mask}, shared, tokens, sources)
        return jnp.sum(entropy_of_top(logits, method.classes // tasks) * weights) / total

    return jax.vmap(jax.grad(entropy), (None, 0, 0, 0))(mask, prompt, tokens, weights)


@jax.jit
def alpha_gradient(gradient: trees.Tree, mask: trees.Tree) -> jax.Array:
    """⟨∂H/∂M, m_t⟩ = ∂H/∂α_t for gradients with a leading axis G and one task's mask: `[G]`."""
    products = jax.tree.map(lambda g, m: jnp.tensordot(g, m, m.ndim, precision="highest"), gradient, mask)
    return sum(jax.tree.leaves(products))


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: trees.Tree, mask: trees.Tree) -> trees.Tree:
    return jax.tree.map(jnp.add, total, mask)


def mean_mask(masks: Iterable[trees.Tree]) -> trees.Tree:
    """The superposed mask at uniform α, (1/T) Σ m_t, added up one by one."""
    masks = list(masks)
    total = functools.reduce(_add, masks, jax.tree.map(jnp.zeros_like, masks[0]))
    return jax.tree.map(lambda leaf: leaf / len(masks), total)
