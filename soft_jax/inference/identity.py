"""Task identity at test time: Prompt ID from the keys, Gradient ID from the superposed mask, and
the published batch vote.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.methods import prompts
from soft_jax.methods.method import Method, Shared

BLOCK_BYTES = 2**26  # of kernel gradients, one per group of images, that are multiplied out at once


@jax.jit
def key_similarity(query: jax.Array, keys: jax.Array) -> jax.Array:
    """Compute cos(q(x), k) `[N, K]` for queries `[N, dim]` and keys `[K, dim]`.

    Prompt ID is its argmax over the keys.
    """
    return prompts.similarity(query.astype(keys.dtype), keys)


def vote(ids: np.ndarray, pool: int) -> int:
    """Return the most frequent of a batch's ids, int `[B]`, as the published code finds it.

    `pool` is the number of prompts among which it looks.

    Ties are common, and the traces have them: the published code leaves them to PyTorch's top-k of
    the counts (present ids in order, then zeros up to the pool's size), which on a CPU is C++'s
    nth_element for 4 to 63 entries and else the first.
    """
    present, counts = np.unique(ids, return_counts=True)
    counts = np.concatenate([counts, np.zeros(max(pool - len(counts), 0), int)])
    winner = _nth_element_first(counts) if 3 < len(counts) < 64 else int(counts.argmax())
    return int(present[winner])


def _nth_element_first(values: np.ndarray) -> int:
    """Return the index that libstdc++'s introselect brings to the front.

    That is std::nth_element, in descending order.
    """
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
    """Give every image of a test batch the id that `vote` gives the batch: the published vote.

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
    """Compute the entropy of the softmax over the `top` highest of logits `[..., classes]`.

    `top` may be traced.
    """
    ranked = -jnp.sort(-logits, axis=-1)
    kept = jnp.arange(logits.shape[-1]) < top
    log_p = jax.nn.log_softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    return -jnp.sum(jnp.where(kept, jnp.exp(log_p) * jnp.where(kept, log_p, 0), 0), axis=-1)


class Factors(NamedTuple):
    """∂H/∂W of a kernel y = xW for G groups of images, not multiplied out: Σ over a group's
    tokens of x ⊗ ∂H/∂y.

    `inputs` `[G, tokens, in]` and `gradients` `[G, tokens, out]`.
    """

    inputs: jax.Array
    gradients: jax.Array


@functools.partial(jax.jit, static_argnames="method")
def entropy_gradients(
    method: Method,
    backbone: pytrees.Tree,
    mean: pytrees.Tree,
    prompt: jax.Array,
    shared: Shared,
    tokens: jax.Array,
    weights: jax.Array,
    tasks: jax.Array,
) -> dict[str, Factors]:
    """Compute ∂H/∂(θ ⊙ M) of several groups of images, at the superposed mask M = Σ α_t m_t.

    Each group has its own gradients; all are computed in one pass.

    H is the group's mean entropy over the top C/T logits, C classes of the head and T tasks to
    choose from. At any α, ∂H/∂α_t = ⟨∂H/∂M, m_t⟩ = ⟨∂H/∂(θ ⊙ M), θ ⊙ m_t⟩: one backward pass serves
    all tasks (`alpha_gradients`).

    Args:
        method: the method, whose tasks replace kernels.
        backbone: frozen parameters.
        mean: θ ⊙ M, the tree of `Method.weights`.
        prompt: each group's E-prompt, `[G, layers, 2, length, heads, head_dim]`.
        shared: the shared part.
        tokens: trunk tokens `[G, S, N, dim]`.
        weights: `[G, S]`, 0 for padding, which stands at the end.
        tasks: T, int.

    Returns:
        The masked kernels' gradients by path.
    """
    groups, size, count, dim = tokens.shape
    totals = jnp.maximum(weights.sum(axis=1, keepdims=True), 1)
    shares = (weights / totals).reshape(-1)
    positions, sizes = (
        jnp.broadcast_to(x, weights.shape).reshape(-1)
        for x in (jnp.arange(size)[None], totals.astype(int))
    )
    sources = method.host.sources(positions, sizes)
    rows = jnp.repeat(prompt, size, axis=0)
    prefix = {
        **method.host.shared_prefix(shared),
        **method.host.row_prefix(rows, sources),
    }
    params = pytrees.merge(backbone, mean)

    def entropy(shifts):
        inputs = {}

        def shifted(call, args, kwargs, context):
            path = "/".join((*context.module.path, "kernel"))
            if context.method_name != "__call__" or path not in shifts:
                return call(*args, **kwargs)
            inputs[path] = args[0]
            return call(*args, **kwargs) + shifts[path]

        with nn.intercept_methods(shifted):
            logits = method.classify(params, prefix, shared, tokens.reshape(-1, count, dim))
        return jnp.sum(entropy_of_top(logits, method.num_classes // tasks) * shares), inputs

    # A shift of 0 of a layer's output has the output's gradient; that of the kernel itself would be
    # as large as the kernel, per group.
    outs = {path: kernel.shape[1] for path, kernel in pytrees.flatten(mean).items()}
    zeros = {
        path: jnp.zeros((groups * size, 1, out), method.architecture.dtype)
        for path, out in outs.items()
    }
    _, inputs = jax.eval_shape(entropy, zeros)
    zeros = {
        path: jnp.zeros(
            (groups * size, inputs[path].shape[1], outs[path]), method.architecture.dtype
        )
        for path in outs
    }
    gradients, inputs = jax.grad(entropy, has_aux=True)(zeros)

    def by_group(rows):
        return rows.astype(shares.dtype).reshape(groups, -1, rows.shape[-1])

    return {path: Factors(by_group(inputs[path]), by_group(gradients[path])) for path in outs}


@jax.jit
def alpha_gradients(gradient: dict[str, Factors], weights: tuple[pytrees.Tree, ...]) -> jax.Array:
    """Compute ⟨∂H/∂(θ ⊙ M), θ ⊙ m_t⟩ = ∂H/∂α_t of each group, for K tasks: `[G, K]`.

    It takes the weights θ ⊙ m_t of those tasks.

    The gradient is multiplied out for a few of a kernel's rows at a time, for all K: in all that is
    one product of the masked layers' size, and K inner products.
    """
    kernels = [pytrees.flatten(tree) for tree in weights]
    return sum(
        _inner_products(factors, jnp.stack([kernel[path] for kernel in kernels]))
        for path, factors in gradient.items()
    )


def _inner_products(factors: Factors, kernels: jax.Array) -> jax.Array:
    """Compute ⟨Σ x ⊗ g, W_k⟩ for kernels W_k `[K, in, out]`: `[G, K]`."""
    inputs, gradients = factors
    (groups, tokens, width), out = inputs.shape, gradients.shape[2]
    rows = max(1, BLOCK_BYTES // (groups * out * gradients.dtype.itemsize))
    rows = next(size for size in range(min(rows, width), 0, -1) if width % size == 0)

    def add(total, block):
        x, w = block
        product = jnp.einsum("gnr,gno->gro", x, gradients, precision="highest")
        return total + jnp.einsum("gro,kro->gk", product, w, precision="highest"), None

    blocks = (
        jnp.moveaxis(inputs.reshape(groups, tokens, -1, rows), 2, 0),
        jnp.moveaxis(kernels.reshape(len(kernels), -1, rows, out), 1, 0),
    )
    return jax.lax.scan(add, jnp.zeros((groups, len(kernels)), gradients.dtype), blocks)[0]


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: pytrees.Tree, weights: pytrees.Tree) -> pytrees.Tree:
    return jax.tree.map(jnp.add, total, weights)


def mean_weights(weights: Iterator[pytrees.Tree], count: int) -> pytrees.Tree:
    """Compute θ ⊙ M at uniform α: (1/T) Σ θ ⊙ m_t for T = `count` tasks.

    The terms are added one by one, so that only two are in memory at a time.
    """
    total = jax.tree.map(jnp.copy, next(weights))
    for tree in weights:
        total = _add(total, tree)
    return jax.tree.map(lambda leaf: leaf / count, total)
