"""The predictor over a real, small run: five tasks of two digits on the tiny random backbone."""

import json
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from PIL import Image
from rich.console import Console

import soft_jax
from soft_jax import __main__
from soft_jax.data import augmentation, images
from soft_jax.errors import UserError
from soft_jax.experiment import loop
from soft_jax.inference import rules
from soft_jax.inference.predictor import Predictor, active_versions
from soft_jax.models import backbones
from tests import protocols
from tests.conftest import TINY, hardly_optimized, tiny_config, tiny_method, tiny_world

PROTOCOLS = {
    "prompt": protocols.PER_SAMPLE,
    "gradient": protocols.PER_SAMPLE_GRADIENT,
    "prototype": protocols.PROTOTYPE,
    "oracle": protocols.ORACLE,
}


@pytest.fixture(scope="module", autouse=True)
def _tiny_world(backbone):
    with (
        pytest.MonkeyPatch.context() as patch,
        tiny_world(backbone, patch) as few,
        hardly_optimized(),
    ):
        yield few


@pytest.fixture(scope="module")
def workdir(_tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(
        tasks=5,
        batch_size=8,
        epochs=1,
        eval_batch_size=16,
        prototype_features=60,
    )
    loop.run(config, folder, Console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def test_set(_tiny_world):
    return _tiny_world.test


@pytest.fixture(scope="module")
def predictors(workdir):
    return {
        task_id: Predictor.load(workdir, task_id=task_id, batch_size=16) for task_id in PROTOCOLS
    }


def asked(predictor, labels):
    """What `predict` is told of the tasks."""
    return {"task": labels // 2} if predictor.rule.option == "oracle" else {}


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("task_id", PROTOCOLS)
def test_predictions_are_what_evaluation_counted(workdir, test_set, predictors, task_id, devices):
    """One engine: the counts of the run's last evaluation, from mixed images, on one and on four
    devices.
    """
    predictor = predictors[task_id]
    if devices == 1:
        predictor = soft_jax.Predictor.load(
            workdir, task_id=task_id, batch_size=16, devices=jax.devices()[:1]
        )
    order = np.random.default_rng(1).permutation(len(test_set.labels))
    shuffled, labels = test_set.images[order], test_set.labels[order]
    classes, tasks, networks, probabilities = predictor.predict(
        shuffled, **asked(predictor, labels)
    )
    rows = json.loads((workdir / "tasks/004/manifest/metadata").read_text())["metrics"][
        PROTOCOLS[task_id]
    ]
    for task, row in enumerate(rows):
        own = labels // 2 == task
        assert abs((classes == labels)[own].sum() - row["correct"]) <= (devices == 1)
        identified = [row["identified"].get(str(given), 0) for given in range(5)]
        assert np.abs(np.bincount(networks[own], minlength=5) - identified).max() <= (devices == 1)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(tasks, classes // 2)
    # Classes of another task than the one identified may be likelier each, not together.
    able = np.where(np.arange(10) // 2 == networks[:, None], probabilities, 0)
    best = (able if task_id == "prototype" else probabilities).argmax(axis=1)
    np.testing.assert_array_equal(best, classes)


@given(data=strategies.data())
@settings(max_examples=12)
@pytest.mark.parametrize("task_id", PROTOCOLS)
def test_order_and_company_never_change_a_prediction(test_set, predictors, task_id, data):
    predictor = predictors[task_id]
    whole = predictor.predict(test_set.images, **asked(predictor, test_set.labels))
    chosen = np.array(
        data.draw(strategies.lists(strategies.integers(0, 79), min_size=1, max_size=80))
    )
    part = predictor.predict(test_set.images[chosen], **asked(predictor, test_set.labels[chosen]))
    np.testing.assert_array_equal(part.classes, whole.classes[chosen])
    np.testing.assert_array_equal(part.networks, whole.networks[chosen])
    np.testing.assert_allclose(part.probabilities, whole.probabilities[chosen], atol=1e-4)


@pytest.mark.parametrize("task_id", PROTOCOLS)
def test_nothing_is_compiled_after_warm_up(workdir, test_set, predictors, task_id):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: (
            compiled.append(event) if event.endswith("backend_compile_duration") else None
        )
    )
    sizes = {
        "prompt": 12,
        "gradient": 20,
        "prototype": 24,
        "oracle": 28,
    }  # which no other test has compiled
    predictor = Predictor.load(workdir, task_id=task_id, batch_size=sizes[task_id], cache_bytes=0)
    predictor.warm_up()
    assert compiled
    compiled.clear()
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 5, 7, 11, 16, 17, 23, 40, 63, 64, 65, 79, 80, *rng.integers(1, 80, 6)):
        chosen = rng.integers(0, 80, count)
        predictor.predict(test_set.images[chosen], **asked(predictor, test_set.labels[chosen]))
        predictor.predict(test_set.images[chosen], task=int(count) % 5)
    assert not compiled
    # And the size of the batches changes no answer.
    ours, others = (
        p.predict(test_set.images, **asked(p, test_set.labels))
        for p in (predictor, predictors[task_id])
    )
    np.testing.assert_array_equal(ours.classes, others.classes)
    np.testing.assert_array_equal(ours.networks, others.networks)


def test_some_tasks_only(workdir, test_set):
    """Only their classes can win; asked among one task, every image is its."""
    predictor = Predictor.load(workdir, tasks=[3, 1], task_id="prototype", batch_size=16)
    assert predictor.class_names == ("", "", "2", "3", "", "", "6", "7", "", "")
    classes, tasks, _, probabilities = predictor.predict(test_set.images)
    assert set(tasks.tolist()) == {1, 3}
    assert set(classes.tolist()) <= {2, 3, 6, 7}
    assert not probabilities[:, [0, 1, 4, 5, 8, 9]].any()
    for task_id in ("prompt", "gradient", "prototype"):
        alone = Predictor.load(workdir, tasks=[2], task_id=task_id, batch_size=16)
        assert set(alone.predict(test_set.images).tasks.tolist()) == {2}


def test_a_given_task(predictors, test_set):
    """It wins over the predictor's own way, and its classes alone can win."""
    for predictor in predictors.values():
        classes, tasks, _, _ = predictor.predict(test_set.images[:9], task=3)
        assert (tasks == 3).all()
        assert set(classes.tolist()) <= {6, 7}
    each = np.arange(9) % 5
    mixed = predictors["oracle"].predict(test_set.images[:9], task=each)
    np.testing.assert_array_equal(mixed.classes // 2, each)


def test_a_budget_of_nothing_changes_nothing(workdir, test_set, predictors):
    for task_id in ("prompt", "gradient"):
        poor = Predictor.load(workdir, task_id=task_id, batch_size=16, cache_bytes=0)
        ours, theirs = poor.predict(test_set.images), predictors[task_id].predict(test_set.images)
        np.testing.assert_array_equal(ours.classes, theirs.classes)
        np.testing.assert_array_equal(ours.networks, theirs.networks)


@pytest.fixture
def folder(tmp_path, test_set):
    """Images as users have them: other sizes, grey, transparent, turned by EXIF, in a folder
    below; one damaged, one no image.
    """
    (tmp_path / "below").mkdir()
    big = Image.fromarray(test_set.images[0]).resize((75, 48))
    big.save(tmp_path / "a.png")
    big.convert("L").save(tmp_path / "below" / "grey.jpg")
    big.convert("RGBA").save(tmp_path / "clear.png")
    exif = big.getexif()
    exif[0x0112] = 6
    big.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_files_and_arrays(predictors, folder, test_set):
    predictor = predictors["prompt"]
    upright = np.asarray(Image.open(folder / "a.png"))
    by_file = predictor.predict(
        [
            folder / "a.png",
            str(folder / "clear.png"),
            folder / "turned.png",
            upright,
            upright / 255.0,
        ]
    )
    np.testing.assert_allclose(by_file.probabilities, by_file.probabilities[[0] * 5], atol=1e-5)
    single = predictor.predict(folder / "a.png")
    np.testing.assert_array_equal(single.classes, by_file.classes[:1])
    as_float = predictor.predict(test_set.images[:5].astype(np.float32) / 255)
    np.testing.assert_array_equal(
        as_float.probabilities, predictor.predict(test_set.images[:5]).probabilities
    )
    assert predictor.predict(iter([upright])).classes.shape == (1,)
    assert predictor.predict(jax.numpy.asarray(test_set.images[:2])).classes.shape == (2,)


def test_pillow_images_rounding_and_what_lies_under_transparency(tmp_path):
    """Levels are what a person would see; files that are no pictures are not looked for."""
    assert images.as_list(Image.new("L", (8, 8))) == [Image.new("L", (8, 8))]
    assert (images.prepare(Image.new("L", (32, 32), 7), 0, 32) == 7).all()
    assert (images.prepare(np.full((32, 32, 3), 1 + 1.2e-7), 0, 32) == 255).all()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (images.read(tmp_path / "clear.png") == 255).all()
    for name in ("._clear.png", "data.h5", "film.mpg"):
        (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n")
    assert [path.name for path in images.find([tmp_path])] == ["clear.png"]
    assert images.as_list(np.array(["a.png"])) == ["a.png"]


@pytest.mark.parametrize("shape", [(32, 32), (48, 80), (90, 60), (300, 200)])
@pytest.mark.parametrize("size", [32, 56])
def test_a_users_image_is_prepared_as_a_test_image(rng, shape, size):
    """By Pillow here, by `augment.prepare_test` there."""
    image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    ours = images.prepare(image, 0, size).astype(int)
    theirs = np.asarray(augmentation.prepare_test(image[None], size)[0]).astype(int)
    assert ours.shape == theirs.shape == (size, size, 3)
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "images: none were given"),
        (np.zeros((0, 16, 16, 3), np.uint8), "images: none were given"),
        (np.zeros((16, 16, 3), np.uint8), r"images: shape \(16, 16, 3\), expected \[N, H, W, 3\]"),
        (
            np.zeros((2, 16, 16, 1), np.uint8),
            r"images\[0\]: shape \(16, 16, 1\), expected \[H, W, 3\]",
        ),
        (
            np.zeros((2, 3, 16, 16), np.uint8),
            r"images\[0\]: shape \(3, 16, 16\), expected \[H, W, 3\]",
        ),
        (
            [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)],
            r"images\[1\]: shape \(16, 16\)",
        ),
        (np.zeros((1, 16, 16, 3), int), r"images\[0\]: dtype int64, expected uint8, or float"),
        (np.full((1, 16, 16, 3), np.nan), r"images\[0\]: has values that are not finite"),
        (
            np.full((1, 16, 16, 3), 200.0),
            r"images\[0\]: float values from 200 to 200, expected 0 to 1",
        ),
        (["/nowhere.png"], "/nowhere.png can't be read as an image"),
        ([np.zeros((16, 16, 3), np.uint8), [[1, 2], [3]]], r"images\[1\]: not an image"),
        (
            [np.zeros((2, 2000, 3), np.uint8)],
            r"images\[0\]: 2000 × 2 pixels, expected sides of at most 64 to 1",
        ),
    ],
)
def test_bad_images_are_named(predictors, given, message):
    with pytest.raises(UserError, match=message):
        predictors["prompt"].predict(given)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (5, "task: 5 is not loaded; loaded are 0, 1, 2, 3, 4"),
        ([0, -1], "task: -1 is not loaded"),
        (
            [0, 1, 2],
            r"task: int64 of shape \(3,\), expected one int, or one for each of the 2 images",
        ),
        ("two", "task: .* expected one int"),
    ],
)
def test_bad_tasks_are_named(predictors, test_set, task, message):
    with pytest.raises(UserError, match=message):
        predictors["prompt"].predict(test_set.images[:2], task=task)
    with pytest.raises(UserError, match="tell predict the task of each image"):
        predictors["oracle"].predict(test_set.images[:2])


def test_what_can_not_be_loaded_is_named(workdir, test_set, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match="task_id: 'keys' is unknown; known are none, prompt, gradient, prototype"
    ):
        Predictor.load(workdir, task_id="keys")
    with pytest.raises(UserError, match="'protoype' is unknown; did you mean 'prototype'. known"):
        Predictor.load(workdir, task_id="protoype")
    with pytest.raises(UserError, match="tasks: 7 is not in .*; there are 0, 1, 2, 3, 4"):
        Predictor.load(workdir, tasks=[0, 7])
    with pytest.raises(UserError, match="workdir: .* holds no run"):
        Predictor.load(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    late = Predictor.load(copy, batch_size=16, cache_bytes=0)
    shutil.rmtree(copy / "tasks/001")
    with pytest.raises(UserError, match="tasks/001 is missing, later tasks are there"):
        Predictor.load(copy)
    with pytest.raises(
        UserError, match="tasks/001 is missing"
    ):  # removed while the predictor is in use
        late.predict(test_set.images, task=1)
    kept = Predictor.load(copy, tasks=[0, 2], batch_size=16)
    assert set(kept.predict(test_set.images).tasks.tolist()) <= {0, 2}
    chunk = next((copy / "tasks/002/adapter").glob("mask.*qkv*/0.0"))
    chunk.write_bytes(chunk.read_bytes()[:-9])
    damaged = Predictor.load(copy, tasks=[0, 2], batch_size=16)
    with pytest.raises(UserError, match=r"tasks/002: array adapter/mask.*restore this folder"):
        damaged.predict(test_set.images, task=2)
    shutil.rmtree(copy / "tasks")
    with pytest.raises(UserError, match="has no finished task yet"):
        Predictor.load(copy)
    monkeypatch.setattr(
        backbones, "load", lambda *_: backbones.Backbone("tiny", TINY, {}, "1" * 64)
    )
    with pytest.raises(
        UserError,
        match="backbone: the file found has SHA-256 1111.*give the run's own as backbone_path",
    ):
        Predictor.load(workdir)


NO_PATHS = (5, ["x"], True, b"x")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("workdir", value, "expected a path, a str or pathlib.Path") for value in NO_PATHS),
        ("workdir", None, "expected a path, a str or pathlib.Path"),
        *(("backbone_path", value, "expected a path") for value in NO_PATHS),
        *(
            ("devices", value, "expected a list of different devices")
            for value in (
                ["cpu"],
                "cpu",
                5,
                [],
                lambda: jax.devices()[0],
                lambda: jax.devices() * 2,
            )
        ),
        *(("batch_size", value, "expected an int of at least 1") for value in (0, 1.5, "1", True)),
        *(
            ("cache_bytes", value, "expected an int of at least 0")
            for value in (-1, 1.5, "1", None)
        ),
        *(("task_id", value, "is unknown") for value in (["prompt"], 5, np.array(["a", "b"]))),
        *(("tasks", value, "expected a list of ints") for value in ([True], [0, False], 5, "01")),
        *(
            ("class_names", value, "expected a list of names such as")
            for value in (None, 5, [5], [None], ["cat", b"dog"], "ab", b"ab")
        ),
    ],
)
def test_an_argument_that_is_none_is_named(workdir, name, value, expected):
    value = value() if callable(value) else value  # jax is not started while tests are collected
    loads = [Predictor.load]
    if name in ("workdir", "backbone_path", "devices", "batch_size", "class_names"):
        loads = [Predictor.zero_shot] + loads * (name != "class_names")
    for load in loads:
        names = {"class_names": ["cat", "dog"]} if load == Predictor.zero_shot else {}
        with pytest.raises(UserError) as caught:
            load(**{"workdir": workdir} | names | {name: value})
        assert str(caught.value).startswith(f"{name}: {value!r}")
        assert expected in str(caught.value)


def test_tasks_of_a_library_that_are_no_list_are_named():
    with pytest.raises(UserError, match="tasks: 5, expected a list of tasks' names"):
        active_versions(None, SimpleNamespace(active={"birds": None}), 5)


def command(capsys, *arguments):
    status = __main__.main(["predict", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_the_command_answers_what_it_can(workdir, folder, capsys):
    """A folder in the order of its names; the damaged file is reported, the others are answered,
    the status tells.
    """
    status, out, err = command(capsys, workdir, folder)
    assert status == 1
    lines = out.splitlines()
    assert [line.split(": ")[0].split("/")[-1] for line in lines] == [
        "a.png",
        "grey.jpg",
        "clear.png",
        "turned.png",
    ]
    pattern = r".*: \d \(task \d\), probability [01]\.\d{4}(, by task \d's network)?"
    assert [line for line in lines if not re.fullmatch(pattern, line)] == []
    assert "Task identity: CIL per_sample, prototype; the tasks keep statistics for it" in err
    assert "broken.png can't be read as an image" in err
    (folder / "broken.png").unlink()
    status, out, err = command(
        capsys, workdir, folder, "--json", "--task-id=prototype", "--tasks=1,3"
    )
    assert status == 0
    assert "left out: " in err and "notes.txt" in err and len(err.splitlines()) == 1
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 4
    assert {row["task"] for row in rows} <= {1, 3}
    assert rows[0].keys() == {"file", "class", "class_index", "task", "network", "probability"}
    status, out, _ = command(capsys, workdir, folder / "a.png", "--task=4")
    assert status == 0
    assert " (task 4), " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/none.png"], "none.png can't be read as an image"),
        (["{folder}/below/grey.jpg", "--tasks=1,x"], "--tasks: 'x' is not a whole number from 1"),
        (["{folder}/below/grey.jpg", "--tasks=9"], "--tasks: 9 is not a task to choose from"),
        (["{folder}/below/grey.jpg", "--task=9"], "--task: 9 is not a task to choose from"),
        (["{folder}/empty"], "empty: no image files in this folder"),
    ],
)
def test_a_bad_command_is_one_line(workdir, folder, capsys, arguments, message):
    (folder / "empty").mkdir()
    status, out, err = command(
        capsys,
        workdir,
        "--task-id=prompt",
        *(argument.format(folder=folder) for argument in arguments),
    )
    assert (status, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_dualprompt(tmp_path, test_set):
    """No masks: nothing to load by task, and no Gradient ID."""
    config = tiny_config(
        method="dualprompt",
        tasks=2,
        batch_size=8,
        epochs=1,
        eval_batch_size=16,
        prototype_features=60,
    )
    loop.run(config, tmp_path, Console(quiet=True))
    with pytest.raises(
        UserError,
        match="'gradient' means nothing for this run of dualprompt; take one of 'prompt', 'pro",
    ):
        Predictor.load(tmp_path, task_id="gradient")
    predictor = Predictor.load(tmp_path, task_id="prompt", batch_size=16)
    rows = json.loads((tmp_path / "tasks/001/manifest/metadata").read_text())["metrics"][
        protocols.PER_SAMPLE
    ]
    classes, _, networks, _ = predictor.predict(test_set.images)
    assert (classes == test_set.labels).sum() == sum(row["correct"] for row in rows)
    assert (networks == test_set.labels // 5).sum() == sum(row["task_correct"] for row in rows)


def test_the_rule_that_was_best_on_validation_images_answers():
    """Else prototypes where they are kept; never one that looks at batches or is told the task."""
    method = tiny_method()
    applying = protocols.rules_for(method, (7,), 20)

    def counts(**correct):
        return {key.replace("__", "/"): [{"correct": n, "total": 10}] for key, n in correct.items()}

    held_out = counts(
        per_sample__prompt_id=4,
        per_sample__gradient_id=6,
        per_sample__prototype=5,
        per_sample__frozen_features=8,
        batch_vote__prompt_id=9,
        oracle__task_given=10,
    )
    rule, because = rules.choose(applying, held_out)
    assert (rule.option, because) == ("gradient", "the best on validation images, 60.00%")
    assert rules.choose(applying, {})[0].option == "prototype"
    assert rules.choose(protocols.rules_for(method), {})[0].option == "prompt"
