"""A whole run on the tiny CLIP, and what is made of it: predictions, answers by names, resuming."""

import csv
import dataclasses
import io
import json
import shutil
import threading
from contextlib import closing

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from soft_jax import distributed
from soft_jax.__main__ import main
from soft_jax.errors import UserError
from soft_jax.evaluation import predictions
from soft_jax.experiment import loop
from soft_jax.experiment import run as run_lib
from soft_jax.hooks import Hooks
from soft_jax.inference import engine
from soft_jax.inference.predictor import Predictor
from soft_jax.store.folder import Store
from soft_jax.training import train_step
from tests.small_clip import NAMES, few_digits_on_clip, small_config

# Of the run: masks in both towers, three classes a task, batches that four devices don't divide.
SETTINGS = {
    "dataset": "digits",
    "tasks": 2,
    "mask_towers": "vision+text",
    "mask_layers": (1,),
    "optimizer": "sgd",
    "schedule": "cosine",
    "learning_rate": 2.0,
    "first_learning_rate": 1.0,
    "weight_decay": 0.001,
    "batch_size": 6,
    "epochs": 2,
    "eval_batch_size": 16,
    "prototype_features": 30,
}
OPTIONS = {
    "prompt": "per_sample/prompt_id",
    "gradient": "per_sample/gradient_id",
    "prototype": "per_sample/prototype",
    "zero_shot": "per_sample/zero_shot",
    "k_means": "per_sample/k_means",
    "oracle": "oracle/task_given",
}


@pytest.fixture(scope="module", autouse=True)
def world():
    """Runs and predictors get the tiny CLIP, and a few digits under names of CLIP's words."""
    with few_digits_on_clip() as data:
        yield data


@pytest.fixture(scope="module")
def workdir(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    console = Console(file=io.StringIO(), width=200)
    loop.run(small_config(**SETTINGS), folder, console)
    (folder / "printed").write_text(console.file.getvalue())
    return folder


@pytest.fixture(scope="module")
def predictors(workdir):
    return {option: Predictor.load(workdir, task_id=option, batch_size=16) for option in OPTIONS}


def asked(option, labels):
    """What `predict` is told of the tasks."""
    return {"task": labels // 3} if option == "oracle" else {}


def test_one_program_trains_every_task(workdir):
    """And evaluates it: unequal numbers of steps, other rates, other classes are no other one."""
    with closing(Store(workdir)) as store:
        run = run_lib.prepare(
            small_config(**SETTINGS), store, Console(quiet=True), threading.Event()
        )
    assert train_step.compile_steps(run.step_config, run.mesh)._cache_size() == 1


@pytest.mark.parametrize("option", OPTIONS)
def test_predictions_are_evaluations_answers(workdir, world, predictors, option):
    """Image by image, with their probabilities, in any order and company."""
    found = predictions.read(workdir)
    test, key = world.test, OPTIONS[option]
    ours = predictors[option].predict(test.images, **asked(option, test.labels))
    np.testing.assert_allclose(ours.probabilities.sum(axis=1), 1, atol=1e-5)
    assert (ours.probabilities >= 0).all()
    names = [NAMES[class_] for class_ in ours.classes[found.index]]
    assert names == list(found.answers[key])
    answered = ours.probabilities[np.arange(len(ours.classes)), ours.classes]
    np.testing.assert_allclose(answered[found.index], found.probabilities[key], atol=2e-5)
    assert np.ptp(ours.probabilities, axis=0).max() > 1e-3  # or nothing is said
    chosen = np.random.default_rng(0).permutation(len(test.labels))[:7]
    part = predictors[option].predict(test.images[chosen], **asked(option, test.labels[chosen]))
    np.testing.assert_array_equal(part.classes, ours.classes[chosen])
    np.testing.assert_array_equal(part.networks, ours.networks[chosen])
    np.testing.assert_allclose(part.probabilities, ours.probabilities[chosen], atol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_a_temperature_moves_probabilities_and_no_answer(world, predictors, temperature):
    for option in ("zero_shot", "k_means"):
        one = predictors[option]
        warm = Predictor(
            one.model, one.rule, one.class_names, one.batching, {one.rule.key: temperature}
        )
        ours, theirs = (each.predict(world.test.images[:8]) for each in (warm, one))
        np.testing.assert_array_equal(ours.classes, theirs.classes)
        np.testing.assert_allclose(ours.probabilities.sum(axis=1), 1, atol=1e-5)
        surer = ours.probabilities.max(axis=1) > theirs.probabilities.max(axis=1)
        assert surer.all() if temperature < 1 else not surer.any()


def test_some_tasks_only(workdir, world):
    """Names of tasks that are not loaded are unknown, and change nothing."""
    for option in ("prompt", "gradient", "zero_shot", "k_means"):
        predictor = Predictor.load(workdir, tasks=[1], task_id=option, batch_size=16)
        assert predictor.class_names == ("", "", "", *NAMES[3:])
        alone = predictor.predict(world.test.images)
        assert set(alone.tasks.tolist()) == {1}
        assert not alone.probabilities[:, :3].any()
        if option == "zero_shot":
            whole = Predictor.load(workdir, task_id=option).predict(world.test.images)
            shares = whole.probabilities[:, 3:]
            shares = shares / shares.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(alone.probabilities[:, 3:], shares, atol=1e-5)


def files_of(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for part in ("tasks", "config.json")
        for path in sorted((folder / part).rglob("*") if part == "tasks" else [folder / part])
        if path.is_file()
    }


def test_a_finished_run_is_left_as_it_is(workdir):
    def fail(*_):
        raise AssertionError("a finished task is trained or evaluated again")

    before = files_of(workdir)
    manifests = loop.run(
        small_config(**SETTINGS), workdir, Console(quiet=True), hooks=Hooks(fail, fail)
    )
    assert len(manifests) == 2
    assert files_of(workdir) == before
    other = small_config(**SETTINGS | {"text_context": "task"})
    with pytest.raises(UserError, match="text_context"):
        loop.run(other, workdir, Console(quiet=True))


class Killed(Exception):
    """As if the process had ended."""


def test_a_task_goes_on_where_it_was_killed(workdir, tmp_path, predictors):
    """Inside the second task, under SGD: momentum, the cosine and what old tasks learned are those
    of the run that nobody killed.
    """
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/tasks/001")
    config = dataclasses.replace(small_config(**SETTINGS), checkpoint_every=2)
    steps = []

    def kill(task, step, values):
        steps.append((task, step))
        if steps[-1] == (1, 4):
            raise Killed
        return values

    with pytest.raises(Killed):
        loop.run(config, tmp_path / "run", Console(quiet=True), hooks=Hooks(kill))
    assert [path.name for path in (tmp_path / "run/training").iterdir()] == ["001-000004"]
    steps.clear()
    loop.run(config, tmp_path / "run", Console(quiet=True), hooks=Hooks(after_step=_seen(steps)))
    assert steps == [(1, step) for step in range(4, 8)]
    again = Predictor.load(tmp_path / "run", task_id="prompt").model
    whole = predictors["prompt"].model
    for ours, theirs in (
        (again.shared, whole.shared),
        (again.rows, whole.rows),
        (again.weights[1], whole.weights[1]),
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    first, second = (predictions.read(folder) for folder in (workdir, tmp_path / "run"))
    assert first.answers == second.answers


def _seen(steps):
    def after_step(task, step, values):
        steps.append((task, step))
        return values

    return after_step


def test_one_device_has_the_same_logits(workdir, world, tmp_path, predictors):
    """The first task trained on one device, and images answered there, against four."""
    with closing(Store(tmp_path)) as store:
        run = run_lib.prepare(
            small_config(**SETTINGS),
            store,
            Console(quiet=True),
            threading.Event(),
            distributed.data_mesh(jax.devices()[:1]),
        )
        shared = run.initial_shared()
        state, _ = loop.train_task(run, 0, run.initial_adapter(0), shared, {})
    four, one = (
        Predictor.load(workdir, task_id="prompt", batch_size=16, devices=jax.devices()[:count])
        for count in (4, 1)
    )
    adapter = jax.device_get(state.trainable["adapter"])
    for name, row in four.model.rows.items():
        np.testing.assert_allclose(adapter[name], row[0], atol=1e-5)
    weights = run.method.weights(run.params, adapter)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), weights, four.model.weights[0]
    )
    answers = []
    for each in (four, one):
        tokens, _ = engine.encode(each.model, world.test.images, each.batching, False)
        tasks = np.arange(len(world.test.labels)) % 2
        answers.append(engine.logits(each.model, tokens, engine.alone(tasks), each.batching))
    np.testing.assert_allclose(*answers, atol=1e-5)
    assert np.ptp(answers[0], axis=1).min() > 0.1


# By names alone.


@pytest.fixture
def picture(world, tmp_path):
    Image.fromarray(world.test.images[0]).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_names_alone_are_the_runs_zero_shot(workdir, world, predictors):
    """With the run's own names; in another order, the same answers."""
    images = world.test.images
    ours = predictors["zero_shot"].predict(images)
    order = [4, 0, 5, 1, 3, 2]
    named = Predictor.zero_shot(workdir, [NAMES[class_] for class_ in order], batch_size=16)
    theirs = named.predict(images)
    np.testing.assert_allclose(theirs.probabilities, ours.probabilities[:, order], atol=1e-5)
    assert set(theirs.tasks.tolist()) == {0}
    spaced = Predictor.zero_shot(workdir, [name.replace("_", " ") for name in NAMES])
    np.testing.assert_allclose(spaced.predict(images).probabilities, ours.probabilities, atol=1e-5)


def test_predict_answers_by_classes(workdir, picture, capsys):
    names = "red fox, crème brûlée ,cat"
    assert main(["predict", str(workdir), picture, f"--classes={names}", "--top=3"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 3
    assert "task" not in printed.out + printed.err
    assert main(["predict", str(workdir), picture, f"--classes={names}", "--top=3", "--json"]) == 0
    top = json.loads(capsys.readouterr().out)["top"]
    assert {each["class"] for each in top} == {"red fox", "crème brûlée", "cat"}
    assert set(top[0]) == {"class", "class_index", "probability"}
    assert abs(sum(each["probability"] for each in top) - 1) < 1e-5
    assert main(["predict", str(workdir), picture, f"--classes={names}", "--csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["class"] == top[0]["class"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes=cat,cat"], "class names: 'cat, cat', expected different names"),
        (["--classes="], "class names: '', expected different names"),
        (["--classes=cat,,dog"], "class names: 'cat, , dog', expected different names"),
        (["--classes=cat,dog", "--task=1"], "--classes, --task: take one of them"),
        (["--classes=cat", "--task-id=prompt"], "--classes, --task-id: take one of them"),
        (["--classes=cat", "--tasks=1"], "--classes, --tasks: take one of them"),
        (["--classes=cat", "--classes=dog"], "--classes is given twice"),
    ],
)
def test_what_names_alone_can_not_be(workdir, picture, capsys, arguments, message):
    assert main(["predict", str(workdir), picture, *arguments]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {message}")
    assert len(told.splitlines()) == 1


# The published host: no task identity.


def test_a_run_of_the_published_host(world, tmp_path):
    """One image prompt for all tasks, one context a task, its optimizer, its projection, and its
    leaking protocol beside the one by sample.
    """
    settings = {"text_context": "task", "epochs": 1, "prototype_features": 0}
    config = small_config(**SETTINGS | settings | {"method": "clip+pgp"})
    (_, manifest) = loop.run(config, tmp_path, Console(quiet=True))
    assert set(manifest.metrics) == {
        "per_sample/no_task_id",
        "per_sample/zero_shot",
        "batch_vote/cut_off",
        "oracle/task_given",
        "oracle/zero_shot",
    }
    found = predictions.read(tmp_path)
    ours = Predictor.load(tmp_path).predict(world.test.images)
    names = [NAMES[class_] for class_ in ours.classes[found.index]]
    assert names == list(found.answers["per_sample/no_task_id"])
    # 15 images a task in batches of 6: the third batch is of both tasks, and goes by the second.
    cut = np.array(found.answers["batch_vote/cut_off"])
    assert set(cut[:12]) <= set(NAMES[:3])
    np.testing.assert_array_equal(cut[12:], np.array(names)[12:])
