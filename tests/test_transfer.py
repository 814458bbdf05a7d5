"""What one task's network gives to another task's images."""

import jax
import numpy as np
import pytest

from soft_jax import distributed
from soft_jax.data import sources
from soft_jax.experiment import transfer
from soft_jax.inference import engine, rules
from soft_jax.inference.predictor import Predictor
from tests.conftest import tiny_method
from tests.replay import model_of


def test_a_probe_tells_classes_apart_that_features_tell_apart(rng):
    labels = np.repeat(np.arange(3), 40)
    apart = rng.normal(size=(120, 5)) + 8 * np.eye(3, 5)[labels]
    assert transfer.probe(apart, labels) == 100
    assert transfer.probe(rng.normal(size=(120, 5)), labels) < 60  # chance is 33
    assert transfer.probe(apart, np.zeros(120, int)) == 100  # one class


def test_a_probe_is_measured_on_images_that_it_was_not_fitted_on(rng):
    """So many features fit 120 images of random classes perfectly."""
    labels = rng.integers(0, 2, 120)
    assert transfer.probe(rng.normal(size=(120, 400)), labels) < 75


@pytest.mark.usefixtures("fast_compile")
def test_features_are_what_the_tasks_network_classifies(backbone, rng):
    method = tiny_method()
    adapters = [method.init_adapter(jax.random.key(task), backbone) for task in range(2)]
    adapters[1]["mask"] = jax.tree.map(lambda m: 1.5 * m, adapters[1]["mask"])
    shared = method.init_shared(jax.random.key(9), backbone)
    of_class = np.arange(6) // 3
    model = model_of(method, backbone, shared, adapters, (0, 1), of_class)
    batching = engine.Batching(distributed.data_mesh(jax.devices()[:1]), 4)
    predictor = Predictor(model, rules.PromptId(), tuple("abcdef"), batching)
    images = rng.integers(0, 256, (21, 16, 16, 3)).astype(np.uint8)  # more than a chunk
    tokens, _ = engine.encode(model, images, batching, queried=False, prepared=True)
    for task in (0, 1):
        found = transfer.features(predictor, images, task)
        expected = engine.logits(model, tokens, engine.alone(np.full(21, task)), batching)
        ours = method.head(backbone, shared, found)
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    frozen = transfer.features(predictor, images, None)
    np.testing.assert_allclose(
        frozen, engine.queries(method, backbone, images, batching, prepared=True), atol=1e-6
    )
    dataset = sources.Dataset(
        sources.InMemoryImages(images, np.arange(21, dtype=np.int32) % 3),
        sources.InMemoryImages(images[:0], np.zeros(0, np.int32)),
        ("x", "y", "z"),
    )
    accuracy, gains = transfer.gains(predictor, dataset)
    assert 0 <= accuracy <= 100
    assert gains.keys() == {"1", "2"}
