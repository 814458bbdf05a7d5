import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from soft_jax.inference import prototypes

DIM, FEATURES = 12, 30


@pytest.fixture
def projection():
    return prototypes.projection(7, DIM, FEATURES)


def queries(rng, count=90):
    labels = rng.integers(0, 6, count)
    centres = np.random.default_rng(3).normal(size=(6, DIM))
    return (centres[labels] + 0.5 * rng.normal(size=(count, DIM))).astype(np.float32), labels


def features(query, projection):
    """φ spelt out."""
    unit = query / np.linalg.norm(query, axis=1, keepdims=True)
    x = (unit @ projection / 2).astype(np.float64)
    return x * np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2


def summed(parts, projection, classes=6):
    sums = prototypes.Sums(classes, projection)
    for members, statistics in parts:
        sums.add(members, statistics)
    return sums


def solved(parts, projection, classes=6):
    return summed(parts, projection, classes).solve()


def test_the_projections_stream_is_fixed(projection):
    """Statistics on disk are of no use with another projection."""
    np.testing.assert_allclose(projection[0, :3], [1.6905257, -0.46593738, 0.03282016], rtol=1e-6)
    assert projection.dtype == np.float32


def test_tasks_added_up_are_the_regression_over_all_images(rng, projection, monkeypatch):
    """W = (Σ φφᵀ + λI)⁻¹ Σ φyᵀ, from all images at once, with numpy; images beyond one block of
    rows are padded.
    """
    monkeypatch.setattr(prototypes, "ROWS", 16)
    query, labels = queries(rng)
    parts = []
    for classes in ((0, 1), (2, 3), (4, 5)):
        own = np.isin(labels, classes)
        parts.append((classes, prototypes.statistics(query[own], labels[own], classes, projection)))
    phi, targets = features(query, projection), np.eye(6)[labels]
    gram = phi.T @ phi
    ridge = summed(parts, projection).decompose().best_ridge()
    expected = np.linalg.solve(
        gram + ridge * gram.trace() / FEATURES * np.eye(FEATURES), phi.T @ targets
    )
    model = solved(parts, projection)
    fresh, truth = queries(np.random.default_rng(8))
    scores = prototypes.SHARPNESS * features(fresh, projection) @ expected
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(prototypes.log_posterior(fresh, model), log_p, atol=2e-2)
    assert (np.asarray(prototypes.log_posterior(fresh, model)).argmax(axis=1) == truth).mean() > 0.9
    reverse = solved(parts[::-1], projection)
    np.testing.assert_allclose(
        prototypes.log_posterior(fresh, reverse), prototypes.log_posterior(fresh, model), atol=1e-4
    )


def test_classes_of_no_task_never_win(rng, projection):
    query, labels = queries(rng)
    own = labels < 2
    model = solved(
        [((0, 1), prototypes.statistics(query[own], labels[own], (0, 1), projection))], projection
    )
    log_p = np.asarray(prototypes.log_posterior(query, model))
    assert np.isneginf(log_p[:, 2:]).all()
    np.testing.assert_allclose(np.exp(log_p).sum(axis=1), 1, atol=1e-5)
    by_task = prototypes.task_posterior(log_p, np.arange(6) // 2)
    np.testing.assert_allclose(by_task, [[1, 0, 0]] * len(query), atol=1e-5)


def test_a_later_task_changes_no_older_statistics(rng, projection):
    query, labels = queries(rng)
    own = labels < 2
    statistics = prototypes.statistics(query[own], labels[own], (0, 1), projection)
    before = jax.device_get(statistics)
    sums = prototypes.Sums(6, projection)
    sums.add((0, 1), statistics)
    sums.add((2, 3), prototypes.statistics(query[~own], labels[~own] % 2 + 2, (2, 3), projection))
    sums.solve()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(statistics), before)


def test_statistics_have_their_documented_shapes(rng, projection):
    query, labels = queries(rng)
    own = labels < 2
    statistics = prototypes.statistics(query[own], labels[own], (0, 1), projection)
    shapes = prototypes.shapes(FEATURES, 2)
    assert jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), statistics, shapes
    ) == {"gram": True, "sums": True, "counts": True}
    gram = features(query[own], projection).T @ features(query[own], projection)
    np.testing.assert_allclose(statistics["gram"], gram[np.triu_indices(FEATURES)], atol=1e-3)
    np.testing.assert_allclose(
        statistics["sums"][1], features(query[labels == 1], projection).sum(axis=0), atol=1e-4
    )


def test_images_are_counted_by_class(rng, projection):
    query, labels = queries(rng)
    counts = prototypes.statistics(query, labels, (4, 1, 0, 2, 3, 5), projection)["counts"]
    np.testing.assert_array_equal(counts, np.bincount(labels)[[4, 1, 0, 2, 3, 5]])


def test_queries_in_bfloat16(rng, projection):
    """A backbone in bfloat16 gives them so; the sums are float32 all the same."""
    query, labels = queries(rng)
    low = np.asarray(jnp.asarray(query, jnp.bfloat16))
    assert prototypes.statistics(low, labels, range(6), projection)["gram"].dtype == np.float32


# λ. 60 features; 10 tasks of two classes, which overlap.
WIDE, CLASSES = 60, 20


@pytest.fixture
def wide():
    return prototypes.projection(7, DIM, WIDE)


def overlapping(seed, count):
    """`count` images of each of `CLASSES` classes."""
    labels = np.repeat(np.arange(CLASSES), count)
    centres = np.random.default_rng(3).normal(size=(CLASSES, DIM))
    noise = np.random.default_rng(seed).normal(size=(len(labels), DIM))
    return (centres[labels] + 0.8 * noise).astype(np.float32), labels


def tasks_of(query, labels, projection):
    parts = []
    for task in range(CLASSES // 2):
        classes, own = (2 * task, 2 * task + 1), labels // 2 == task
        statistics = prototypes.statistics(query[own], labels[own], classes, projection)
        parts.append((classes, statistics))
    return parts


def without_counts(statistics):
    """Return the statistics as they were before there were counts."""
    return {name: array for name, array in statistics.items() if name != "counts"}


@pytest.mark.parametrize(
    ("count", "ridge"),
    [(1, 1e-5), *itertools.product([1, 2, 3, 4, 30], [1e-2, 1.0, 100.0])],
)
def test_the_validation_error_is_that_of_all_images(wide, count, ridge):
    """|(I - H) Y|² / N over (tr(I - H) / N)², with the N × N matrix H and numpy.

    With 20 to 600 images: fewer than features, as many, more.
    """
    query, labels = overlapping(0, count)
    phi, targets, size = features(query, wide), np.eye(CLASSES)[labels], len(labels)
    share = ridge * (phi**2).sum() / WIDE
    hat = phi @ np.linalg.solve(phi.T @ phi + share * np.eye(WIDE), phi.T)
    fit = hat.trace() / size
    expected = ((targets - hat @ targets) ** 2).sum() / size / (1 - fit) ** 2, fit
    found = summed(tasks_of(query, labels, wide), wide, CLASSES).decompose()
    np.testing.assert_allclose(found.validation_error(ridge), expected, rtol=1e-3)


def test_ridge_grows_where_images_are_about_as_many_as_features(wide):
    chosen = {}
    for count in (3, 100):
        parts = tasks_of(*overlapping(0, count), wide)
        chosen[count] = summed(parts, wide, CLASSES).decompose().best_ridge()
    assert chosen[3] >= 100 * chosen[100]


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_does_not_collapse_where_images_are_as_many_as_features(wide, seed):
    """3 images a class: as many as features with the last task, where λ = 1e-4 fits noise."""
    query, labels = overlapping(1, 30)
    phi = features(query, wide)
    parts = tasks_of(*overlapping(10 + seed, 3), wide)
    for tasks in (3, 6, 10):
        sums, seen = summed(parts[:tasks], wide, CLASSES), labels < 2 * tasks
        found = sums.decompose()
        by_ridge = {
            ridge: np.mean((phi @ found.weights(ridge)).argmax(axis=1)[seen] == labels[seen])
            for ridge in prototypes.RIDGES
        }
        chosen = np.mean((phi @ sums.solve().weights).argmax(axis=1)[seen] == labels[seen])
        # A margin, for the best of 15 on a few hundred images is partly luck.
        assert chosen >= max(by_ridge.values()) - 0.08
    assert by_ridge[prototypes.RIDGE] < chosen - 0.2


def test_the_smallest_ridge_whose_error_is_nearly_least(wide):
    parts = tasks_of(*overlapping(0, 10), wide)
    found = summed(parts, wide, CLASSES).decompose()
    errors = [found.validation_error(ridge)[0] for ridge in prototypes.RIDGES]
    chosen = prototypes.RIDGES.index(found.best_ridge())
    assert chosen < np.argmin(errors)
    assert errors[chosen] <= 1.02 * min(errors) < errors[chosen - 1]


def test_few_images_are_never_all_fitted(wide):
    """With 18 images of six classes cross validation alone chooses the smallest λ, which fits
    all.
    """
    parts = tasks_of(*overlapping(10, 3), wide)[:3]
    found = summed(parts, wide, CLASSES).decompose()
    errors = {ridge: found.validation_error(ridge) for ridge in prototypes.RIDGES}
    assert min(errors, key=errors.get) == prototypes.RIDGES[0]
    assert errors[found.best_ridge()][1] <= 0.5


def test_a_single_image_has_a_large_ridge(wide):
    """Or the one before it: all others fit too much. Nothing is NaN or infinite."""
    query, labels = overlapping(0, 1)
    statistics = prototypes.statistics(query[:1], labels[:1], (0,), wide)
    sums = summed([((0,), statistics)], wide, CLASSES)
    assert sums.decompose().best_ridge() in prototypes.RIDGES[-2:]
    assert np.isfinite(sums.solve().weights).all()


@given(order=strategies.permutations(range(CLASSES // 2)))
@settings(max_examples=5)
def test_the_order_of_tasks_changes_no_ridge(order):
    wide = prototypes.projection(7, DIM, WIDE)
    parts = tasks_of(*overlapping(0, 3), wide)
    first, other = (
        summed(tasks, wide, CLASSES).decompose().best_ridge()
        for tasks in (parts, [parts[task] for task in order])
    )
    assert first == other


@pytest.mark.parametrize("old", [(0,), (9,), range(10)])
def test_tasks_without_counts_keep_their_ridge(wide, old):
    """Where any task has none, the classifier is what it was before λ was chosen."""
    parts = tasks_of(*overlapping(0, 3), wide)
    parts = [
        (classes, without_counts(statistics) if task in old else statistics)
        for task, (classes, statistics) in enumerate(parts)
    ]
    phi, targets = features(overlapping(0, 3)[0], wide), np.eye(CLASSES)[overlapping(0, 3)[1]]
    gram = phi.T @ phi
    expected = np.linalg.solve(gram + 1e-4 * gram.trace() / WIDE * np.eye(WIDE), phi.T @ targets)
    fresh, _ = overlapping(1, 5)
    scores = features(fresh, wide) @ np.asarray(solved(parts, wide, CLASSES).weights)
    np.testing.assert_allclose(scores, features(fresh, wide) @ expected, atol=2e-2)


def test_larger_constants_never_shrink_more():
    """And a λ that fits too much is no choice, however small its error."""
    errors = {0.01: (0.5, 0.9), 0.1: (1.04, 0.45), 1.0: (1.01, 0.3), 10.0: (1.0, 0.2)}
    chosen = {
        (slack, cap): prototypes.smallest_ridge(errors, slack, cap)
        for slack in (0, 0.02, 0.05)
        for cap in (0.1, 0.25, 0.4, 0.5, 1)
    }
    assert [chosen[slack, 0.5] for slack in (0, 0.02, 0.05)] == [10.0, 1.0, 0.1]
    assert [chosen[0.05, cap] for cap in (0.1, 0.25, 0.4, 0.5, 1)] == [10.0, 10.0, 1.0, 0.1, 0.01]
