import jax
import numpy as np
import pytest
from hypothesis import given, strategies

from soft_jax import pytrees
from soft_jax.inference import engine
from soft_jax.training import train_step
from tests.conftest import tiny_method
from tests.replay import model_of


@given(
    count=strategies.integers(1, 3000),
    largest=strategies.integers(1, 600),
    devices=strategies.sampled_from([1, 2, 4]),
)
def test_pieces_cover_every_row_once(count, largest, devices):
    batching = engine.Batching(train_step.data_mesh(jax.devices()[:devices]), largest)
    assert len(batching.sizes) <= 6
    assert all(size % devices == 0 for size in batching.sizes)
    pieces = list(batching.pieces(count))
    assert [row for start, stop, _ in pieces for row in range(start, stop)] == list(range(count))
    for start, stop, size in pieces:
        assert size in batching.sizes
        assert size == batching.sizes[-1] or stop - start <= size <= 2 * (stop - start)
    # What encode relies on: a chunk's pieces fit into the chunk.
    if count <= batching.chunk:
        assert sum(size for *_, size in pieces) <= batching.chunk


@pytest.fixture
def weights_of(backbone):
    """A cache over four tasks with a budget in tasks, and the loads it made."""
    method = tiny_method()
    adapters = [method.init_adapter(jax.random.key(t), backbone) for t in range(4)]
    each = 4 * pytrees.count(adapters[0]["mask"])

    def make(budget):
        loads = []
        cache = engine.TaskWeights(
            method, backbone, lambda task: loads.append(task) or adapters[task], int(budget * each)
        )
        assert cache.bytes_each == each
        return cache, loads, adapters

    return make


@pytest.mark.parametrize("budget", [0, 1, 2.9])
def test_weights_stay_within_their_budget(weights_of, budget):
    cache, _, _ = weights_of(budget)
    for task in (0, 1, 2, 3, 0, 2):
        assert task in cache or cache[task]
        assert sum(t in cache for t in range(4)) <= max(1, int(budget))


def test_weights_are_made_once_while_they_fit(weights_of, backbone):
    cache, loads, adapters = weights_of(2)
    for task in (0, 1, 0, 1):
        effective = cache[task]
        theta = pytrees.select(backbone, pytrees.flatten(effective))
        jax.tree.map(
            lambda w, k, m: np.testing.assert_array_equal(w, k * m),
            effective,
            theta,
            adapters[task]["mask"],
        )
    assert loads == [0, 1]
    cache[2]  # in the place of 0, which was used before 1
    assert [task in cache for task in range(3)] == [False, True, True]
    assert cache.order(range(4)) == [1, 2, 0, 3]
    assert (cache.at_once(4), cache.at_once(1)) == (1, 1)
    roomy, _, _ = weights_of(100)
    assert [roomy.at_once(count) for count in (1, 3, 10, 200)] == [1, 4, 16, 16]


def test_a_budget_changes_no_answer(backbone, rng):
    """Tasks read again and again from their source: the same logits, to the bit, and the same
    gradients over α.
    """
    method = tiny_method()
    adapters = [method.init_adapter(jax.random.key(t), backbone) for t in range(5)]
    shared = method.init_shared(jax.random.key(9), backbone)
    images = rng.integers(0, 256, (23, 16, 16, 3)).astype(np.uint8)
    batching = engine.Batching(train_step.data_mesh(), 16)
    tasks = rng.integers(0, 5, 23)
    answers = []
    for budget in (2**30, 0):
        model = model_of(method, backbone, shared, adapters, (0, 1, 3, 4), np.arange(5), budget)
        tokens, query = engine.encode(model, images, batching, queried=True)
        logits = engine.logits(model, tokens, engine.alone(tasks), batching)
        rows = np.arange(23)[:, None]
        answers.append(
            (
                query,
                logits,
                engine.alpha_gradients(model, tokens, rows, np.ones((23, 1)), tasks, batching),
            )
        )
    np.testing.assert_array_equal(answers[0][0], answers[1][0])
    np.testing.assert_array_equal(answers[0][1], answers[1][1])
    np.testing.assert_allclose(answers[0][2], answers[1][2], atol=1e-6)
    assert answers[0][2].shape == (23, 4)
