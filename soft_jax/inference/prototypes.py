"""Task identity from statistics of the frozen features: a ridge regression on random features of
q(x).

After RanPAC (McDonnell et al., 2023): features φ(x) = GELU(R q(x) / 2|q(x)|), R fixed and Gaussian,
and W = (Σ φφᵀ + λI)⁻¹ Σ φyᵀ over all training images seen. Both sums are taken per task, from one
pass over its training images as they are tested (no crops), and kept with the task: no image is,
and a task added later changes none of an older one's.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.methods import prompts

RIDGE = 1e-4  # λ, as a share of the mean of Σ φφᵀ's diagonal; accuracy is flat from 1e-6 to 1e-3
SHARPNESS = 20.0  # of the softmax over the regression's scores, which lie around 0 to 1

ROWS = 1024  # images whose features are held at once


class Classifier(NamedTuple):
    """A solved regression: `projection` `[dim, features]`, `weights` `[features, classes]`,
    `seen` bool `[classes]`.
    """

    projection: jax.Array
    weights: jax.Array
    seen: jax.Array


def projection(seed: int, dim: int, count: int) -> np.ndarray:
    """Draw R, float32 `[dim, count]`, from N(0, 1); it is the same for every task of a run."""
    # NumPy promises that this generator's stream never changes; statistics on disk outlive a
    # version of JAX.
    return np.random.RandomState(seed).standard_normal((dim, count)).astype(np.float32)


def _features(query: jax.Array, projection: jax.Array) -> jax.Array:
    unit = prompts.normalize(query.astype(projection.dtype))
    return jax.nn.gelu(jnp.matmul(unit, projection, precision="highest") / 2, approximate=False)


@jax.jit
def _sums(
    query: jax.Array, targets: jax.Array, projection: jax.Array
) -> tuple[jax.Array, jax.Array]:
    features = _features(query, projection)
    return jnp.matmul(features.T, features, precision="highest"), jnp.matmul(
        targets.T, features, precision="highest"
    )


def statistics(
    query: np.ndarray, labels: np.ndarray, classes: Sequence[int], projection: np.ndarray
) -> pytrees.Tree:
    """Compute a task's statistics from q(x) `[N, dim]` of its training images and their labels.

    The labels are int `[N]`, and are among `classes`.

    Returns:
        `{"gram": [features (features + 1) / 2], "sums": [len(classes), features]}`, float32: the
        upper triangle of Σ φφᵀ by rows, and Σ φ of each class.
    """
    gram, sums = 0.0, 0.0
    for start in range(0, len(query), ROWS):
        part = query[start : start + ROWS]
        targets = (labels[start : start + ROWS, None] == np.asarray(classes)).astype(np.float32)
        pad = ((0, ROWS - len(part)), (0, 0))  # φ(0) = 0, so these rows add nothing
        more = jax.device_get(_sums(np.pad(part, pad), np.pad(targets, pad), projection))
        gram, sums = gram + more[0].astype(np.float64), sums + more[1].astype(np.float64)
    return {
        "gram": jnp.asarray(gram[np.triu_indices(len(gram))], jnp.float32),
        "sums": jnp.asarray(sums, jnp.float32),
    }


def shapes(features: int, classes: int) -> pytrees.Tree:
    """Return the shapes and dtypes of the statistics of a task of `classes` classes."""
    return {
        "gram": jax.ShapeDtypeStruct((features * (features + 1) // 2,), jnp.float32),
        "sums": jax.ShapeDtypeStruct((classes, features), jnp.float32),
    }


class Sums:
    """The statistics of some tasks added up, in float64: the memory of one task's, whatever the
    number of tasks.
    """

    def __init__(self, classes: int, projection: np.ndarray):
        count = projection.shape[1]
        self._projection, self._gram = projection, np.zeros(count * (count + 1) // 2)
        self._sums, self._seen = np.zeros((classes, count)), np.zeros(classes, bool)

    def add(self, classes: Sequence[int], statistics: Mapping[str, jax.Array]) -> None:
        """Add a task's `statistics`, of its `classes`."""
        self._gram += np.asarray(statistics["gram"])
        self._sums[list(classes)] += np.asarray(statistics["sums"])
        self._seen[list(classes)] = True

    def solve(self) -> Classifier:
        """Solve the regression over the tasks added."""
        count = self._projection.shape[1]
        gram = np.zeros((count, count))
        gram[np.triu_indices(count)] = self._gram
        gram += np.triu(gram, 1).T
        gram[np.diag_indices(count)] += RIDGE * gram.trace() / count
        weights = np.linalg.solve(gram, self._sums.T)
        return Classifier(
            jnp.asarray(self._projection),
            jnp.asarray(weights, jnp.float32),
            jnp.asarray(self._seen),
        )


@jax.jit
def log_posterior(query: jax.Array, classifier: Classifier) -> jax.Array:
    """Compute log p(class | x), float32 `[B, classes]`, for q(x) `[B, dim]`.

    It is -inf for classes that no task of the fit has.
    """
    scores = jnp.matmul(
        _features(query, classifier.projection), classifier.weights, precision="highest"
    )
    return jax.nn.log_softmax(
        jnp.where(classifier.seen[None], SHARPNESS * scores, -jnp.inf), axis=-1
    )


def task_posterior(log_posterior: np.ndarray, task_of_class: np.ndarray) -> np.ndarray:
    """Compute p(task | x) `[N, tasks]`.

    It is the sum over each task's classes of the probabilities whose logs `log_posterior` gave.
    """
    member = task_of_class[:, None] == np.arange(task_of_class.max() + 1)
    return np.exp(log_posterior) @ member.astype(log_posterior.dtype)
