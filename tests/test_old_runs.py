"""Runs that the code of before the first format number wrote: they open, predict the same, go on to
the same arrays, and stand in a table without being trained again.

`data/format_0.tar.gz` holds a finished run in a table's folder, one killed inside its second task,
the tiny backbone of both, and what the finished one predicted then; `data/format_1.tar.gz` a run
of l2p with one of two tasks finished, of a version that kept no statistics where tasks have nothing
of their own.
"""

import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from soft_jax import distributed
from soft_jax.config import from_settings
from soft_jax.experiment import loop
from soft_jax.inference.predictor import Predictor
from soft_jax.models import backbones
from soft_jax.paper import rows, tables
from soft_jax.store.folder import Reader
from tests import protocols
from tests.conftest import TINY

# The table command's --set that the finished run was made by, under today's names.
SETTINGS = {
    "dataset": "digits",
    "tasks": 2,
    "backbone": "tiny",
    "mask_layers": (3, 4),
    "e_prompt_layers": (3, 4),
    "g_prompt_layers": (1,),
    "e_prompt_length": 2,
    "g_prompt_length": 2,
    "epochs": 2,
    "batch_size": 10,
    "train_images_per_class": 8,
    "test_images_per_class": 6,
    "prototype_features": 20,
    "checkpoint_every": 3,
    "eval_batch_size": 16,
    "learning_rate": 0.1,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).parent / "data/format_0.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(autouse=True)
def _tiny_backbone(written, monkeypatch):
    monkeypatch.setitem(backbones.BACKBONES, "tiny", backbones.Source(TINY, "tiny.npz"))
    monkeypatch.setattr(backbones, "locate", lambda name, path="", stop=None: written / "tiny.npz")
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def finished(written):
    (folder,) = written.glob("tables/*/*")
    return folder


@pytest.mark.parametrize("task_id", ["prompt", "gradient", "prototype"])
def test_a_finished_run_predicts_as_it_did(written, finished, task_id):
    then = np.load(written / "predictions.npz")
    predictor = Predictor.load(finished, task_id=task_id, devices=jax.devices()[:1])
    now = predictor.predict(then["images"])
    np.testing.assert_array_equal(now.classes, then[f"{task_id}/classes"])
    np.testing.assert_array_equal(now.networks, then[f"{task_id}/tasks"])
    probabilities = now.probabilities
    if task_id == "prototype":  # then, they were taken within the task identified
        own = predictor.model.task_of_class[None] == now.networks[:, None]
        probabilities = np.where(own, probabilities, 0)
        assert (probabilities.sum(axis=1) < 1).all()
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, then[f"{task_id}/probabilities"], atol=1e-5)


def test_a_killed_run_goes_on_to_the_same_arrays(written, finished, tmp_path, monkeypatch):
    """From inside its second task; what the code of before trained in one go is what it ends with.

    To rounding: the machine that wrote it may have had another processor.
    """
    shutil.copytree(written / "killed", tmp_path / "run")
    settings = Reader(tmp_path / "run").read_record().settings
    config = from_settings(SETTINGS | {"seed": settings["seed"], "method": settings["method"]})
    one = distributed.data_mesh(jax.devices()[:1])
    monkeypatch.setattr(distributed, "data_mesh", lambda devices=None: one)
    said = []
    console = Console(quiet=True)
    monkeypatch.setattr(console, "print", lambda *text, **_: said.append(str(text[0])))
    manifests = loop.run(config, tmp_path / "run", console)
    assert "Task 2 continues after step 3" in said
    assert len(manifests) == 2
    images = np.load(written / "predictions.npz")["images"]
    ours, theirs = (
        Predictor.load(folder, task_id="oracle", devices=jax.devices()[:1])
        for folder in (tmp_path / "run", finished)
    )
    for task in range(2):
        ours_, theirs_ = (p.model.weights[task] for p in (ours, theirs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours_, theirs_)
        probabilities = [p.predict(images, task=task).probabilities for p in (ours, theirs)]
        np.testing.assert_allclose(*probabilities, atol=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        ours.model.shared,
        theirs.model.shared,
    )


def test_a_run_of_format_1_goes_on_with_the_rules_that_it_began_with(written, tmp_path):
    with tarfile.open(Path(__file__).parent / "data/format_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    settings = Reader(tmp_path / "l2p").read_record().settings
    manifests = loop.run(from_settings(settings), tmp_path / "l2p", Console(quiet=True))
    assert [set(manifest.metrics) for manifest in manifests] == [
        {protocols.NO_TASK_ID, protocols.VOTE_POOL, protocols.ORACLE}
    ] * 2
    assert manifests[0].calibration == {} != manifests[1].calibration
    assert not any(name.startswith("statistics/") for name in manifests[1].sha256)
    assert Predictor.load(tmp_path / "l2p").rule.option == "none"


def test_a_finished_run_stands_in_a_table_without_training(written, finished, monkeypatch):
    """In the folder that the code of before named; its files are left as they are."""

    def refuse(*_, **__):
        raise AssertionError("it was trained again")

    monkeypatch.setattr(loop, "run", refuse)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    row = rows.rows_of("methods", "c100_10")[13]
    request = tables.Request("methods", "c100_10", SETTINGS, 1, written / "tables")
    text, whole = tables.make(request, [row], "the command", written / "unused.png")
    assert whole
    assert "| 14 | DualPrompt-Soft-TF | TIL oracle, task given | 25.00 |" in text
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
