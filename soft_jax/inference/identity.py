"""Task identity at test time: Prompt ID from the keys, Gradient ID from the superposed mask, and
the published batch vote.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.methods import prompts
from soft_jax.methods.method import Method, Shared

BLOCK_BYTES = 2**26  # of kernel gradients, one per image, that are multiplied out at once


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
    """∂H/∂W of a kernel y = xW for B images, not multiplied out: Σ over an image's tokens of
    x ⊗ ∂H/∂y.

    `inputs` `[B, tokens, in]` and `gradients` `[B, tokens, out]`, of the backbone's dtype: in
    bfloat16, products of them that are added up in float32 are exact and take one pass on a TPU.
    """

    inputs: jax.Array
    gradients: jax.Array


class LogitFactors(NamedTuple):
    """What the logits of B images have to do with H: `gradients` ∂H/∂ℓ `[B, classes]`, and the
    `features` `[B, feature_dim]` that they are made of.
    """

    features: jax.Array
    gradients: jax.Array


@functools.partial(jax.jit, static_argnames="method")
def entropy_gradients(
    method: Method,
    backbone: pytrees.Tree,
    mean: pytrees.Tree,
    rows: jax.Array,
    shared: Shared,
    tokens: jax.Array,
    pairs: jax.Array,
    tasks: jax.Array,
) -> tuple[dict[str, Factors], LogitFactors]:
    """Compute ∂H/∂(θ ⊙ M) of several images, at the superposed mask M = Σ α_t m_t.

    Each image has its own gradients; all are computed in one pass. Those of the mean of several
    images' H are the mean of theirs.

    H is the image's entropy over the top C/T logits, C classes of the head and T tasks to choose
    from. At any α, ∂H/∂α_t = ⟨∂H/∂M, m_t⟩ = ⟨∂H/∂(θ ⊙ M), θ ⊙ m_t⟩: one backward pass serves all
    tasks (`alpha_gradients`).

    Args:
        method: the method, whose tasks replace kernels.
        backbone: frozen parameters.
        mean: θ ⊙ M, the tree of `Method.weights`.
        rows: all tasks' E-prompts, `[P, layers, 2, length, heads, head_dim]`.
        shared: the shared part; where masks are in the text tower, its classifier is
            `superposed_text`'s.
        tokens: trunk tokens `[B, N, dim]`.
        pairs: int `[B, 4]`, as `engine.logits` takes them; the task is that whose E-prompt is used.
        tasks: T, int.

    Returns:
        The masked kernels' gradients by path, those of the vision tower, and what the text tower's
        are made of.
    """
    task, _, position, size = pairs.T
    dtype = jnp.promote_types(tokens.dtype, jnp.float32)
    prefix = method.host.prefixes(shared, rows[task], position, size)
    params = pytrees.merge(backbone, mean)

    def entropy(shifts, logit_shift):
        inputs = {}

        def shifted(call, args, kwargs, context):
            path = "/".join((*context.module.path, "kernel"))
            if context.method_name != "__call__" or path not in shifts:
                return call(*args, **kwargs)
            inputs[path] = args[0]
            return call(*args, **kwargs) + shifts[path]

        with nn.intercept_methods(shifted):
            features = method.features(params, prefix, shared, tokens)
        logits = method.head(params, shared, features) + logit_shift
        return jnp.sum(entropy_of_top(logits, method.num_classes // tasks)), (inputs, features)

    # A shift of 0 of a layer's output has the output's gradient; that of the kernel itself would be
    # as large as the kernel, per image.
    layer_of = method.architecture.layer_of
    outs = {
        path: kernel.shape[1]
        for path, kernel in pytrees.flatten(mean).items()
        if layer_of(path) is not None
    }
    logit_shift = jnp.zeros((len(tokens), method.num_classes), dtype)

    def zeros(counts: Mapping[str, int]) -> dict[str, jax.Array]:
        return {
            path: jnp.zeros((len(tokens), counts[path], out), method.architecture.dtype)
            for path, out in outs.items()
        }

    _, (inputs, _) = jax.eval_shape(entropy, zeros(dict.fromkeys(outs, 1)), logit_shift)
    counts = {path: x.shape[1] for path, x in inputs.items()}
    (gradients, by_logit), (inputs, features) = jax.grad(entropy, (0, 1), has_aux=True)(
        zeros(counts), logit_shift
    )
    of_kernels = {path: Factors(inputs[path], gradients[path]) for path in outs}
    return of_kernels, LogitFactors(features.astype(dtype), by_logit)


class SuperposedText(NamedTuple):
    """The text tower at the superposed mask: the classes' features `text` `[classes, feature_dim]`,
    and how they change with α, `tangents` `[tasks, classes, feature_dim]`, ∂text/∂α_t.
    """

    text: jax.Array
    tangents: jax.Array


@functools.partial(jax.jit, static_argnames="method")
def superposed_text(
    method: Method,
    backbone: pytrees.Tree,
    mean: pytrees.Tree,
    direction: pytrees.Tree,
    contexts: jax.Array,
    classes: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Compute the text features of all classes at θ ⊙ M, and their derivative towards θ ⊙ m_t.

    Args:
        method: the method, which reads text.
        backbone: frozen parameters.
        mean: θ ⊙ M, the tree of `Method.weights`.
        direction: θ ⊙ m_t, the same tree.
        contexts: text contexts of P tasks, `[P, K or 1, n, width]`.
        classes: their classes, int `[P, K]`; the number of all classes stands for none.

    Returns:
        Features and derivative, each `[classes, feature_dim]`, 0 for classes in no task.
    """
    count = method.num_classes
    contexts = jnp.broadcast_to(contexts, (*classes.shape, *contexts.shape[2:]))
    rows = classes.reshape(-1)

    def features(weights):
        of_rows = method.host.text_features(
            method.architecture,
            pytrees.merge(backbone, weights),
            contexts.reshape(-1, *contexts.shape[2:]),
            method.class_names,
            jnp.minimum(rows, count - 1),
        )
        empty = jnp.zeros((count, of_rows.shape[1]), of_rows.dtype)
        return empty.at[rows].set(of_rows, mode="drop")

    return jax.jvp(features, (mean,), (direction,))


@functools.partial(jax.jit, static_argnames="method")
def text_alpha_gradients(
    method: Method,
    params: pytrees.Tree,
    shared: Shared,
    factors: LogitFactors,
    tangents: jax.Array,
) -> jax.Array:
    """Compute the part of each image's ∂H/∂α_t that goes through the text tower, `[B, T]`.

    It is Σ ∂H/∂ℓ · ∂ℓ/∂text · ∂text/∂α_t over all classes. `tangents` `[T, classes, feature_dim]`
    are `superposed_text`'s derivatives.
    """

    def along(tangent):
        def logits(text):
            head = shared["head"] | {"text": text}
            return method.head(params, shared | {"head": head}, factors.features)

        text = shared["head"]["text"]
        moved = jax.jvp(logits, (text,), (tangent.astype(text.dtype),))[1]
        return (factors.gradients * moved).sum(axis=1)

    return jax.lax.map(along, tangents).T


@jax.jit
def alpha_gradients(gradient: dict[str, Factors], weights: tuple[pytrees.Tree, ...]) -> jax.Array:
    """Compute ⟨∂H/∂(θ ⊙ M), θ ⊙ m_t⟩ = ∂H/∂α_t of each image, for K tasks: `[B, K]`.

    It takes the weights θ ⊙ m_t of those tasks.

    The gradient is multiplied out for a few of a kernel's rows at a time, for all K: in all that is
    one product of the masked layers' size, and K inner products.
    """
    kernels = [pytrees.flatten(tree) for tree in weights]
    some = next(iter(gradient.values())).gradients
    total = jnp.zeros((len(some), len(kernels)), np.promote_types(some.dtype, jnp.float32))
    for path, factors in gradient.items():
        total = _add_inner_products(total, factors, [kernel[path] for kernel in kernels])
    return total


def _add_inner_products(
    total: jax.Array, factors: Factors, kernels: Sequence[jax.Array]
) -> jax.Array:
    """Add ⟨Σ x ⊗ g, W_k⟩ for kernels W_k, each `[in, out]`, to `total` `[B, K]`."""
    inputs, gradients = factors
    images, (width, out) = len(inputs), kernels[0].shape
    # Two blocks at least: XLA takes a loop of one apart, and then multiplies out the gradients of
    # all kernels at the same time.
    most = min(BLOCK_BYTES // (images * out * total.dtype.itemsize), width // 2)
    rows = next(size for size in range(max(1, most), 0, -1) if width % size == 0)

    def add(total: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, w = block
        product = jnp.einsum(
            "bnr,bno->bro", x, gradients, precision="highest", preferred_element_type=total.dtype
        )
        return total + jnp.einsum("bro,kro->bk", product, w, precision="highest"), None

    # Copied into blocks first: a TPU takes up to six times as many cycles where the loop slices.
    blocks = (
        jnp.moveaxis(inputs.reshape(images, -1, width // rows, rows), 2, 0),
        jnp.stack([kernel.reshape(-1, rows, out) for kernel in kernels], axis=1),
    )
    return jax.lax.scan(add, total, blocks)[0]


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
