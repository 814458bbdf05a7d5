"""The outer loop's parts that a whole run can't show by itself."""

import dataclasses
import threading
from contextlib import closing

import jax
import numpy as np
import pytest
from rich.console import Console

from soft_jax import continual, data, evaluate, methods, train, trees, weights
from soft_jax.config import Config
from soft_jax.errors import UserError
from soft_jax.scenario import Scenario
from soft_jax.store import Store
from tests.conftest import TINY


@pytest.fixture
def run(rng):
    """A run over 4 classes in 2 tasks, without backbone or method: 11 training and 6 test images a task."""
    labels = np.arange(22, dtype=np.int32) % 4
    split = data.Split(rng.integers(0, 256, (22, 4, 4, 3), dtype=np.uint8), labels)
    test = data.Split(split.images[:12], labels[:12])
    return continual.Run(
        config=Config(tasks=2, batch_size=4, epochs=3, dataset="digits"),
        scenario=Scenario(4, 2),
        dataset=data.Dataset(split, test, tuple("abcd")),
        backbone=None,
        params=None,
        method=None,
        recipe=None,
        mesh=train.data_mesh(),
        store=None,
        console=Console(quiet=True),
        stop=threading.Event(),
    )


def real_rows(batch):
    kept = np.asarray(batch["weights"]) > 0
    return np.asarray(batch["images"])[kept], np.asarray(batch["labels"])[kept]


def test_an_epoch_sees_every_image_of_its_task_once(run):
    every = list(continual.batches(run, 1, 0))
    assert [step for step, _ in every] == list(range(9))
    assert {batch["images"].shape[0] for _, batch in every} == {4}
    members = run.scenario.members(run.dataset.train.labels, 1)
    orders = []
    for epoch in range(3):
        rows = [real_rows(batch) for _, batch in every[3 * epoch : 3 * epoch + 3]]
        assert [len(labels) for _, labels in rows] == [4, 4, len(members) - 8]
        images = np.concatenate([images for images, _ in rows])
        assert sorted(i.tobytes() for i in images) == sorted(i.tobytes() for i in run.dataset.train.images[members])
        orders.append(images.tobytes())
        for batch_images, labels in rows:
            assert set(labels.tolist()) <= {2, 3}
            for image, label in zip(batch_images, labels, strict=True):
                index = next(i for i in members if np.array_equal(run.dataset.train.images[i], image))
                assert run.dataset.train.labels[index] == label
    assert len(set(orders)) == 3
    np.testing.assert_array_equal(every[0][1]["class_mask"], [False, False, True, True])


@pytest.mark.parametrize("first", [1, 3, 5])
def test_batches_from_any_step_are_those_of_the_whole(run, first):
    whole = dict(continual.batches(run, 0, 0))
    rest = dict(continual.batches(run, 0, first))
    assert sorted(rest) == list(range(first, 9))
    for step, batch in rest.items():
        np.testing.assert_array_equal(batch["images"], whole[step]["images"])


def test_a_query_is_computed_once_in_a_run(run, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluate, "queries", lambda method, params, images, settings: calls.append(len(images)) or images.sum((1, 2)))
    for _ in range(3):
        assert run.query(0).shape == (6, 3)
        run.query(1)
    assert calls == [6, 6]


@pytest.fixture
def small(backbone, tmp_path, monkeypatch):
    """`prepare` for real digits in two tasks on the tiny random backbone, with batches that four devices don't divide."""
    monkeypatch.setattr(weights, "load", lambda *_: weights.Backbone("tiny", TINY, backbone, "0" * 64))
    digits = data.load("digits")
    few = data.Dataset(*(data.Split(s.images[:60], s.labels[:60]) for s in (digits.train, digits.test)), digits.class_names)
    monkeypatch.setattr(data, "load", lambda *_: few)
    layers = {"mask_layers": (3, 4), "e_prompt_layers": (3, 4), "g_prompt_layers": (1,)}
    config = Config(dataset="digits", tasks=2, batch_size=6, epochs=1, eval_batch_size=16, **layers)

    def prepare(devices=4):
        with closing(Store(tmp_path / f"on{devices}")) as store:
            mesh = train.data_mesh(jax.devices()[:devices])
            return continual.prepare(config, store, Console(quiet=True), threading.Event(), mesh)

    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an int step count
        yield prepare


def run_two_tasks(run):
    """Both tasks as `continual.run` trains them: the adapters after each task, the shared part, the rows of the last stage."""
    adapters, shared, history = [run.initial_adapter(t) for t in range(2)], run.initial_shared(), []
    for task in range(2):
        adapters[task] = methods.begin(adapters[task], adapters[task - 1] if task else None)
        state, _ = continual.train_task(run, task, adapters[task], shared)
        adapters[task], shared = state.trainable["adapter"], state.trainable["shared"]
        history.append(jax.device_get(adapters))
    model = evaluate.Model(run.method, run.params, shared, adapters, 2, run.scenario.task_of_class)
    return history, jax.device_get(shared), continual.evaluate_stage(run, model)[0]


def test_the_same_run_on_one_and_on_four_devices(small):
    (history, shared, rows), (history_4, shared_4, rows_4) = (run_two_tasks(small(devices)) for devices in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-3), (history, shared), (history_4, shared_4))
    for protocol, by_task in rows.items():
        for row, row_4 in zip(by_task, rows_4[protocol], strict=True):
            assert row.total == row_4.total
            assert abs(row.correct - row_4.correct) <= 1, protocol


def test_an_old_adapter_keeps_its_bits_while_a_new_task_trains(small):
    run = small()
    history, _, _ = run_two_tasks(run)
    before, after = trees.flatten(history[0][0]), trees.flatten(history[1][0])
    for path, array in before.items():
        assert trees.sha256(array) == trees.sha256(after[path]), path
    drawn = trees.flatten(jax.device_get(run.initial_adapter(1)))
    trained = trees.flatten(history[1][1])
    assert all((trained[path] != drawn[path]).any() for path in drawn)


def test_a_new_prompt_starts_as_the_old_one_and_its_key_does_not(small):
    run = small()
    first, second = run.initial_adapter(0), run.initial_adapter(1)
    begun = methods.begin(second, first)
    np.testing.assert_array_equal(begun["prompt"], first["prompt"])
    np.testing.assert_array_equal(begun["key"], second["key"])
    assert methods.begin(first, None) is first


def test_sigterm_saves_at_once(small):
    """Between two scheduled saves: the state of the step it stopped at is kept, and training goes on from there."""
    run = small()
    adapter, shared = run.initial_adapter(0), run.initial_shared()
    seen = []
    stopping = dataclasses.replace(run, log=lambda group, step, values: run.stop.set() if step == 1 else seen.append(step))
    with pytest.raises(continual.Preempted, match="Stopped after step 3 of task 1"):
        continual.train_task(stopping, 0, adapter, shared)
    assert [path.name for path in run.store.training.iterdir()] == ["000-000003"]
    run.stop.clear()
    continued = dataclasses.replace(run, log=lambda group, step, values: seen.append(step))
    state, _ = continual.train_task(continued, 0, adapter, shared)
    assert seen == [0, 2, *range(3, int(state.step))]
    whole = dataclasses.replace(run, store=small(1).store)
    expected, _ = continual.train_task(whole, 0, adapter, shared)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_another_dataset_is_another_run(small, monkeypatch):
    small()
    few = data.load()
    monkeypatch.setattr(data, "load", lambda *_: dataclasses.replace(few, train=few.test))
    with pytest.raises(UserError, match="dataset_sha256: .* there, .* now"):
        small()


def test_a_run_that_ended_lets_go_of_its_workdir(tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match="backbone_path: no file"):
            continual.run(Config(backbone_path="/nowhere"), tmp_path, Console(quiet=True))
