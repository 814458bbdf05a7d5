import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def solved(parts, projection, classes=6):
    sums = prototypes.Sums(classes, projection)
    for members, statistics in parts:
        sums.add(members, statistics)
    return sums.solve()


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
    expected = np.linalg.solve(
        gram + prototypes.RIDGE * gram.trace() / FEATURES * np.eye(FEATURES), phi.T @ targets
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
    ) == {"gram": True, "sums": True}
    gram = features(query[own], projection).T @ features(query[own], projection)
    np.testing.assert_allclose(statistics["gram"], gram[np.triu_indices(FEATURES)], atol=1e-3)
    np.testing.assert_allclose(
        statistics["sums"][1], features(query[labels == 1], projection).sum(axis=0), atol=1e-4
    )


def test_queries_in_bfloat16(rng, projection):
    """A backbone in bfloat16 gives them so; the sums are float32 all the same."""
    query, labels = queries(rng)
    low = np.asarray(jnp.asarray(query, jnp.bfloat16))
    assert prototypes.statistics(low, labels, range(6), projection)["gram"].dtype == np.float32
