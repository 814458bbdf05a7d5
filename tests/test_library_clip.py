"""A library on a tiny CLIP: tasks of unequal sizes, told apart by the names of their classes."""

import jax
import numpy as np
import pytest

from soft_jax.experiment.data_spec import Data
from soft_jax.experiment.gate import Gate
from soft_jax.experiment.library import Library
from soft_jax.inference import engine
from soft_jax.inference.predictor import Predictor
from tests.small_clip import NAMES, few_digits_on_clip, small_config

SETTINGS = {
    "dataset": "digits",
    "mask_towers": "vision+text",
    "mask_layers": (1,),
    "learning_rate": 1.0,
    "batch_size": 6,
    "epochs": 1,
    "eval_batch_size": 16,
    "prototype_features": 30,
}


@pytest.fixture(scope="module", autouse=True)
def _world():
    """Libraries get the tiny CLIP, and a few digits under names of CLIP's words."""
    with few_digits_on_clip() as data:
        yield data


def logits_of(root, images):
    """The logits of each active task's classes, with the task given."""
    predictor = Predictor.load(root, task_id="oracle", batch_size=16, devices=jax.devices()[:1])
    model, batching = predictor.model, predictor.batching
    tokens, _ = engine.encode(model, images, batching, queried=False)
    found = {}
    for place, name in enumerate(predictor.task_names):
        rows = engine.logits(model, tokens, engine.alone(np.full(len(images), place)), batching)
        found[name] = rows[:, model.task_of_class == place]
    return found


def test_a_task_more_changes_no_bit_of_the_others(_world, tmp_path):
    root, images = tmp_path / "library", _world.test.images[:16]
    opened, gate = Library(root), Gate(100.0)
    config = small_config("clipprompt+softtf", **SETTINGS)
    opened.learn("one", Data("digits", classes=NAMES[:3]), config=config, gate=gate)
    known = logits_of(root, images)
    opened.learn("two", Data("digits", classes=NAMES[3:5]), start_from="one", gate=gate)
    now = logits_of(root, images)
    np.testing.assert_array_equal(now["one"], known["one"])
    assert [now[name].shape[1] for name in ("one", "two")] == [3, 2]
    verdict = opened.check()
    assert verdict.passed, (verdict.fallen, verdict.unchecked)
    predictor = Predictor.load(root)
    found = predictor.predict(_world.test.images)
    assert set(found.classes) <= set(range(5)) and predictor.task_names == ("one", "two")
    opened.remove("one")
    np.testing.assert_array_equal(logits_of(root, images)["two"], now["two"])
