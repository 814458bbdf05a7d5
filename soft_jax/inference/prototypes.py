"""Task identity from statistics of the frozen features: a ridge regression on random features of
q(x).

After RanPAC (McDonnell et al., 2023): features φ(x) = GELU(R q(x) / 2|q(x)|), R fixed and Gaussian,
and W = (Σ φφᵀ + λI)⁻¹ Σ φyᵀ over all training images seen. The sums are taken per task, from one
pass over its training images as they are tested (no crops), and kept with the task: no image is,
and a task added later changes none of an older one's.

λ is chosen anew for every set of tasks, by generalised cross validation (Golub, Heath and Wahba,
1979), which needs the sums alone. A fixed λ fails where there are about as many images as features:
the regression then just manages to fit every image, with weights that are huge (double descent).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.methods import prompts

# λ is given as a share of the mean of Σ φφᵀ's diagonal.
RIDGES = tuple(10.0 ** (step / 2) for step in range(-10, 5))  # what λ is chosen from: 1e-5 to 1e2
RIDGE = 1e-4  # where a task has no "counts", as tasks stored before λ was chosen
# The smallest λ is taken whose squared error is at most this much above the least, as a share: the
# largest score, which decides, stays right at smaller λ than squared error asks for. On training
# images held out (CIFAR-100) 2% and 3% are alike, and 0.2 points of accuracy better than 0.
SLACK = 0.02
# Degrees of freedom, as a share of the images, beyond which too few are left to estimate an error.
# With few images, cross validation is now and then least where a regression fits all of them. From
# 0.5 to 0.9 there is no difference on those images; 0.3 with 5% is 0.1 better, within noise.
MOST_FITTED = 0.5
# Eigenvalues below this share of their mean are noise: the sums are stored in float32.
SMALLEST = 1e-6
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


def random_features(query: jax.Array, projection: jax.Array) -> jax.Array:
    """Compute φ(x), float32 `[N, features]`, for q(x) `[N, dim]`."""
    unit = prompts.normalize(query.astype(projection.dtype))
    return jax.nn.gelu(jnp.matmul(unit, projection, precision="highest") / 2, approximate=False)


@jax.jit
def _sums(
    query: jax.Array, targets: jax.Array, projection: jax.Array
) -> tuple[jax.Array, jax.Array]:
    features = random_features(query, projection)
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
        upper triangle of Σ φφᵀ by rows, and Σ φ of each class; and `"counts": [len(classes)]`,
        int32: the number of images of each class.
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
        "counts": jnp.asarray((labels[:, None] == np.asarray(classes)).sum(axis=0), jnp.int32),
    }


def shapes(features: int, classes: int) -> pytrees.Tree:
    """Return the shapes and dtypes of the statistics of a task of `classes` classes.

    Tasks that were stored before λ was chosen have no "counts".
    """
    return {
        "gram": jax.ShapeDtypeStruct((features * (features + 1) // 2,), jnp.float32),
        "sums": jax.ShapeDtypeStruct((classes, features), jnp.float32),
        "counts": jax.ShapeDtypeStruct((classes,), jnp.int32),
    }


class Decomposition(NamedTuple):
    """Σ φφᵀ = V diag(s) Vᵀ, by which the regression is cheap for any λ. All in float64.

    `values` s `[features]`, ascending, `vectors` V `[features, features]`, `coefficients` Vᵀ Σ φyᵀ
    `[features, classes]`, `images` the number of images; None where a task has no "counts".
    """

    values: np.ndarray
    vectors: np.ndarray
    coefficients: np.ndarray
    images: int | None

    def weights(self, ridge: float) -> np.ndarray:
        """Solve for W `[features, classes]`; `ridge` is λ as a share of the values' mean."""
        shrunk = np.maximum(self.values, 0) + ridge * self.values.mean()
        return self.vectors @ (self.coefficients / shrunk[:, None])

    def validation_error(self, ridge: float) -> tuple[float, float]:
        """Estimate the squared error, over all classes, of an image that was not fitted.

        It is generalised cross validation (Golub, Heath and Wahba, 1979, equation 1.3):
        |(I - H) Y|² / N over (tr(I - H) / N)², where H Y are the regression's scores of the N
        training images and Y their classes, one-hot. `images` must be known.

        Returns:
            The estimate, and the regression's degrees of freedom as a share of N: tr(H) / N.
        """
        # At most as many eigenvalues as there are images differ from 0. In their directions I - H
        # is λ / (s + λ), in all others 1. Summed over the former: the same by 1 - s / (s + λ) would
        # be lost to rounding where there are fewer images than features.
        mean = self.values.mean()
        rank = min(self.images, int((self.values > SMALLEST * mean).sum()))
        values = self.values[-rank:]
        left = ridge * mean / (values + ridge * mean)
        # Σ y² = N, which has these parts in their directions.
        parts = (self.coefficients[-rank:] ** 2).sum(axis=1) / values
        beyond = max(self.images - parts.sum(), 0.0) if self.images > rank else 0.0
        error = (left**2 @ parts + beyond) / self.images
        free = (self.images - rank + left.sum()) / self.images
        return error / free**2, 1 - free

    def validation_errors(self) -> dict[float, tuple[float, float]]:
        """Return the `validation_error` of each of `RIDGES`."""
        return {ridge: self.validation_error(ridge) for ridge in RIDGES}

    def best_ridge(self) -> float:
        """Choose λ by `smallest_ridge`; it is `RIDGE` where `images` is None."""
        return RIDGE if self.images is None else smallest_ridge(self.validation_errors())


def smallest_ridge(
    errors: Mapping[float, tuple[float, float]],
    slack: float = SLACK,
    most_fitted: float = MOST_FITTED,
) -> float:
    """Choose λ from the `validation_error` of each λ.

    It is the smallest of those that fit at most `most_fitted`, and whose error is at most `slack`
    above the least among them; the largest of all where all fit more.
    """
    allowed = {ridge: error for ridge, (error, fit) in errors.items() if fit <= most_fitted}
    if not allowed:
        return max(errors)
    enough = (1 + slack) * min(allowed.values())
    return min(ridge for ridge, error in allowed.items() if error <= enough)


class Sums:
    """The statistics of some tasks added up, in float64: the memory of one task's, whatever the
    number of tasks.
    """

    def __init__(self, classes: int, projection: np.ndarray):
        count = projection.shape[1]
        self._projection, self._gram = projection, np.zeros(count * (count + 1) // 2)
        self._sums, self._seen = np.zeros((classes, count)), np.zeros(classes, bool)
        self._images: int | None = 0

    def add(self, classes: Sequence[int], statistics: Mapping[str, jax.Array]) -> None:
        """Add a task's `statistics`, of its `classes`; those of old tasks have no "counts"."""
        self._gram += np.asarray(statistics["gram"])
        self._sums[list(classes)] += np.asarray(statistics["sums"])
        self._seen[list(classes)] = True
        if "counts" not in statistics:
            self._images = None
        elif self._images is not None:
            self._images += int(np.asarray(statistics["counts"]).sum())

    def decompose(self) -> Decomposition:
        """Decompose the sums over the tasks added."""
        count = self._projection.shape[1]
        gram = np.zeros((count, count))
        gram[np.triu_indices(count)] = self._gram
        # numpy's eigh reads one triangle, the lower unless it is told.
        values, vectors = np.linalg.eigh(gram, UPLO="U")
        return Decomposition(values, vectors, vectors.T @ self._sums.T, self._images)

    def solve(self) -> Classifier:
        """Choose λ, and solve the regression over the tasks added."""
        found = self.decompose()
        return Classifier(
            jnp.asarray(self._projection),
            jnp.asarray(found.weights(found.best_ridge()), jnp.float32),
            jnp.asarray(self._seen),
        )


@jax.jit
def log_posterior(query: jax.Array, classifier: Classifier) -> jax.Array:
    """Compute log p(class | x), float32 `[B, classes]`, for q(x) `[B, dim]`.

    It is -inf for classes that no task of the fit has.
    """
    scores = jnp.matmul(
        random_features(query, classifier.projection), classifier.weights, precision="highest"
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
