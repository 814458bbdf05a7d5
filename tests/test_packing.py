import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from soft_jax import pytrees
from soft_jax.evaluation import pictures, report
from soft_jax.experiment import loop
from soft_jax.inference.predictor import Predictor
from soft_jax.store import packing
from tests.conftest import tiny_config


def masks(shape=(24, 71)):
    drawn = 1 + 0.05 * jax.random.normal(jax.random.key(0), shape, jnp.float32)
    return {
        "blocks_2": {
            "attn": {
                "qkv": {"kernel": drawn.at[3].set(1).at[5].multiply(40)},
                "proj": {"kernel": drawn[:, :8]},
            }
        }
    }


@pytest.mark.parametrize(("way", "levels"), [("int8", 127), ("int4", 7)])
def test_a_step_is_a_rows_own(way, levels):
    like = masks()
    back = packing.unpack(packing.pack(like, way, 4), way, like)
    for mask, there in zip(jax.tree.leaves(like), jax.tree.leaves(back), strict=True):
        step = np.abs(np.asarray(mask) - 1).max(axis=1, keepdims=True) / levels
        assert (np.abs(mask - there) <= step / 2 + 1e-6).all()
    np.testing.assert_array_equal(back["blocks_2"]["attn"]["qkv"]["kernel"][3], 1)


@pytest.mark.parametrize("way", packing.STORED_AS)
def test_ones_are_ones_and_bytes_are_what_they_should_be(way):
    like = {"a": jnp.ones((24, 71), jnp.float32)}
    packed = packing.pack(like, way, 4)
    np.testing.assert_array_equal(packing.unpack(packed, way, like)["a"], 1)
    expected = {
        "float32": 4 * 24 * 71,
        "int8": 24 * 71 + 4 * 24,
        "int4": 24 * 36 + 4 * 24,
        "lowrank": 4 * 4 * (24 + 71),
    }
    assert pytrees.nbytes(packed) == expected[way]


def test_a_low_rank_mask_is_kept_whole():
    rng = np.random.default_rng(0)
    mask = jnp.asarray(1 + rng.normal(size=(24, 3)) @ rng.normal(size=(3, 71)), jnp.float32)
    for rank, close in ((3, True), (2, False)):
        back = packing.unpack(packing.pack({"a": mask}, "lowrank", rank), "lowrank", {"a": mask})[
            "a"
        ]
        assert np.allclose(back, mask, atol=1e-4) == close


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize(
    "settings", [{"mask_storage": "int4"}, {"method": "dualprompt+softnet", "density": 0.7}]
)
def test_a_run_goes_on_with_what_it_stored(settings, digits, tmp_path, monkeypatch):
    """Its figures are those of the stored masks: read again, by the run and by a predictor, they
    are the ones that were evaluated.
    """
    config = tiny_config(
        tasks=2,
        batch_size=10,
        epochs=1,
        eval_batch_size=16,
        prototype_features=40,
        **settings,
    )
    seen = []
    add = loop.TaskBank.add
    monkeypatch.setattr(
        loop.TaskBank,
        "add",
        lambda self, task, adapter, rest: seen.append(adapter) or add(self, task, adapter, rest),
    )
    monkeypatch.setattr(report, "WRITTEN_AFTER", 0.0)
    drawn = []
    monkeypatch.setattr(
        pictures, "draw", lambda root, manifests: drawn.append(len(manifests)) or []
    )
    for _ in range(2):  # the second reads both tasks from the store
        manifests = loop.run(config, tmp_path, Console(quiet=True))
    assert drawn == [1, 2, 2]  # long tasks have pictures before the last is done
    assert len(seen) == 2
    predictor = Predictor.load(tmp_path, task_id="oracle", batch_size=16)
    for task, adapter in enumerate(seen):
        evaluated = predictor.model.method.weights(predictor.model.backbone, adapter)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9),
            predictor.model.weights[task],
            evaluated,
        )
    labels = digits.test.labels
    right = predictor.predict(digits.test.images, labels // 5).classes == labels
    rows = manifests[-1].metrics["oracle/task_given"]
    assert [int(right[labels // 5 == task].sum()) for task in range(2)] == [
        row["correct"] for row in rows
    ]
    stored = json.loads((tmp_path / "tasks/000/manifest/metadata").read_text())
    assert stored["parameters"]["adapter"] == pytrees.count(seen[0])
    assert stored["bytes"]["adapter"] < pytrees.nbytes(seen[0]) / 2
