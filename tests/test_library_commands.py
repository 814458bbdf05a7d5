"""The commands of a library, on tasks that are learned for real, and a run that is a library."""

import dataclasses
import json
import os
import shutil
import signal
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from rich.console import Console

from soft_jax.__main__ import main
from soft_jax.data import sources
from soft_jax.errors import UserError
from soft_jax.experiment import cost, export, loop, transfer
from soft_jax.experiment.data_spec import Data
from soft_jax.experiment.library import Library
from soft_jax.experiment.stopping import Preempted
from soft_jax.hooks import Hooks
from soft_jax.inference import engine, explain, rules
from soft_jax.inference.predictor import Predictor
from soft_jax.models import backbones
from soft_jax.store.folder import Reader, Store
from soft_jax.store.library import ACTIVE, CANDIDATE, RETIRED, LibraryReader
from tests.conftest import hardly_optimized, tiny_config, tiny_world
from tests.test_export import plain_logits

# ml_collections reads config files by a function that Python deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIG = (
    "--config=library:batch_size=8,epochs=1,eval_batch_size=16,prototype_features=40,"
    "mask_layers=3+4,target_modules=qkv"
)


@pytest.fixture(scope="module", autouse=True)
def _tiny_world(backbone):
    load = sources.load
    with (
        pytest.MonkeyPatch.context() as patch,
        tiny_world(backbone, patch) as few,
        hardly_optimized(),
    ):
        patch.setattr(
            sources, "load", lambda name, *rest: few if name == "digits" else load(name, *rest)
        )
        yield few


def digits(*classes):
    return Data("digits", classes=tuple(map(str, classes)))


@pytest.fixture(scope="module")
def low(_tiny_world, tmp_path_factory):
    """A library with a task of the digits 0 and 1, not to be changed."""
    root = tmp_path_factory.mktemp("low") / "library"
    words = ["learn", str(root), "low", "digits", "--classes=0,1", "--keep-test-images", CONFIG]
    assert main(words) == 0
    return root


@pytest.fixture(scope="module")
def library_(low, tmp_path_factory):
    """The same with the digits 2 and 3, whose training was stopped by SIGTERM and went on; and a
    second version of low, a candidate. Not to be changed.
    """
    root = tmp_path_factory.mktemp("library") / "library"
    shutil.copytree(low, root)
    steps = []

    def after_step(task, step, values):
        steps.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    with pytest.raises(Preempted):
        Library(root).learn("high", digits(2, 3), hooks=Hooks(after_step))
    assert list(Library(root).state().tasks) == ["low"]
    words = ["--classes=2,3", "--max-drop=20"]  # more classes, more mistakes
    assert main(["learn", str(root), "high", "digits", *words]) == 0
    assert max(steps) == 2
    assert not list((root / "learning").iterdir())
    words = ["--classes=0,1", "--start-from=low", "--min-accuracy=100"]
    assert main(["learn", str(root), "low", "digits", *words]) == 1
    return root


@pytest.fixture
def root(library_, tmp_path):
    shutil.copytree(library_, tmp_path / "library")
    return tmp_path / "library"


@pytest.fixture
def say(root, capsys):
    """Give a command for the library; return its status and what it printed."""

    def run(command, *words, on=root):
        status = main([command, str(on), *words])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    capsys.readouterr()
    return run


def hashes(root, name):
    reader = LibraryReader(root)
    manifest = reader.load_manifest(reader.path(reader.read().version(name, 1)))
    return {key: value for key, value in manifest.sha256.items() if key.startswith("adapter/")}


def test_a_task_that_was_stopped_and_went_on_is_the_same_to_the_bit(low, library_, tmp_path):
    shutil.copytree(low, tmp_path / "library")
    Library(tmp_path / "library").learn("high", digits(2, 3))
    assert hashes(tmp_path / "library", "high") == hashes(library_, "high")


def test_what_was_learned_is_better_than_chance(library_):
    """One epoch of ten images on a random backbone: the prototypes know more."""
    state = Library.open(library_).state()
    assert state.figures["high"]["per_sample"] > 40  # of 4 classes
    assert {name: v.number for name, v in state.active.items()} == {"low": 1, "high": 1}
    assert state.classes == ("0", "1", "2", "3")


def test_tasks_show_and_log(say, root):
    status, out, _ = say("tasks")
    lines = out.splitlines()
    assert status == 0 and lines[0].split()[:3] == ["version", "state", "classes"]
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["low@1", "active", "2"],
        ["low@2", "candidate", "2"],
        ["high@1", "active", "2"],
    ]
    status, out, _ = say("show", "low")
    assert "low@1, active, made " in out and "low@2, candidate" in out
    assert "classes: 0, 1" in out and "test images: " in out and ", kept here" in out
    assert "at the gate: low: " in out
    assert "low@2" not in say("show", "low@1")[1]
    status, out, _ = say("log")
    commands = [line.split("  ")[2] for line in out.splitlines()]
    assert commands[0].startswith("learn low digits --classes=0,1 --keep-test-images --config=")
    assert commands[1] == "learn high digits --classes=2,3 --max-drop=20"
    assert commands[2].startswith("learn low digits --classes=0,1 --start-from=low --min-accuracy")
    assert main(["rename", str(root), "low", "small"]) == 0
    assert say("log")[1].splitlines()[-1].endswith("rename low small")


def test_a_change_says_what_it_did_to_other_tasks(say, root):
    first, second, _ = Library(root).log()
    now = Library(root).state()
    low, high = now.active["low"], now.active["high"]
    own = {"version": low.id, "held_back": False, "backward": {}}
    assert first["found"] == own | {"figures": {str(low.id): low.learned}}
    assert second["found"]["figures"][str(high.id)] == high.learned
    change, was = second["found"]["backward"][str(low.id)], low.learned
    assert change == {name: now.figures["low"][name] - was[name] for name in was}
    assert change["given"] == 0 and change["per_sample"] <= 0
    assert f"low: +0.0 given, {change['per_sample']:+.1f} by itself" in say("show", "high")[1]
    assert main(["rename", str(root), "low", "small"]) == 0
    assert "backward transfer: small: +0.0 given" in say("show", "high")[1]
    assert {sum(row.values()) for row in now.confusion.values()} == {
        v.test["images"] for v in now.active.values()
    }


def test_what_tasks_give_to_each_other_and_cost(say, root, monkeypatch):
    assert "forward transfer" not in say("show", "high")[1]
    status, out, _ = say("transfer")
    table, given = (part.splitlines() for part in out.split("\n\n"))
    heads = [line.split()[0] for line in table]
    assert status == 0 and heads == ["network", "frozen", "low", "high"]
    assert given[0].split() == ["images", "of", "/", "given", "to", "low", "high"]
    shares = [[float(cell[:-1]) for cell in line.split()[1:]] for line in given[1:]]
    np.testing.assert_allclose(np.sum(shares, axis=1), 100, atol=0.1)
    gain = float(table[2].split()[2])  # of low's network for high's images
    frozen = table[1].split()[2]
    expected = f"forward transfer: {gain:+.1f} from low, {gain:+.1f} on average; frozen features "
    assert f"{expected}{frozen}" in say("show", "high")[1]
    # As the release before wrote it; nothing is measured again.
    kept = json.loads((root / "transfer.json").read_text())
    text = json.dumps({key: row for key, row in kept.items() if isinstance(row, dict)})
    (root / "transfer.json").write_text(text)
    monkeypatch.setattr(transfer, "gains", None)
    assert say("transfer")[1] == out
    status, out, _ = say("cost")
    lines = [line.split() for line in out.splitlines()]
    assert status == 0 and [line[0] for line in lines[1:3]] == ["low", "high"]
    ours = LibraryReader(root).read().active["low"]
    assert lines[1][1] == f"{ours.bytes:,}" and lines[1][3:5] == [f"{ours.seconds:.1f}", "s"]
    state = LibraryReader(root).read()
    for line, (name, version) in zip(lines[1:3], state.active.items(), strict=True):
        given = state.confusion[version.id]
        right_task = 100 * given.get(version.id, 0) / sum(given.values())
        assert line[5:] == [f"{right_task:.1f}%", f"{state.figures[name]['per_sample']:.1f}%"]
    oracle = next(line for line in lines if line[0] == "--task-id=oracle")
    given = [state.figures[name]["given"] for name in state.active]
    mean = np.average(given, weights=[v.test["images"] for v in state.active.values()])
    assert oracle[2:] == ["ms", "100.0%", f"{mean:.1f}%"] and float(oracle[1]) > 0
    figures = [row["per_sample"] for row in state.figures.values()]
    alone = next(line for line in lines if line[0] == "--task-id=prototype")
    assert min(figures) - 0.1 <= float(alone[-1][:-1]) <= max(figures) + 0.1
    assert "measured now, on 4 × cpu" in out


def test_only_what_was_answered_before_is_timed(monkeypatch):
    """Which tasks' networks answer, and so what is compiled and loaded, differs by the images."""
    happened = []

    class Watched:
        rule, batching = rules.TaskGiven(), SimpleNamespace(chunk=2)

        def predict_prepared(self, images, tasks):
            happened.append(images.tolist())
            return SimpleNamespace(networks=tasks, classes=tasks)

    def clock():
        happened.append("clock")
        return float(len(happened))

    monkeypatch.setattr(cost.time, "perf_counter", clock)
    total = cost._Total(Watched())
    total.add(np.arange(4), np.zeros(4, int), 0)
    first, second = [0, 1], [2, 3]
    assert happened == [first, "clock", first, "clock", second, "clock", second, "clock"]
    assert total.result().images == 4


@pytest.mark.parametrize("of", ["root", "run"])
def test_an_explanation_is_of_one_look_at_a_library(of, request, monkeypatch):
    """Its rules' statistics too, where another rule answers: no change comes in between."""
    folder, looks = request.getfixturevalue(of), []

    def counted(owner, name):
        function = getattr(owner, name)

        def count(*arguments, **options):
            looks.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, count)

    counted(LibraryReader, "read")
    counted(Reader, "present")
    counted(backbones, "load")
    monkeypatch.setattr(rules, "choose", lambda able, _: (rules.PromptId(), "it is asked for here"))
    predictor, able = explain.load(folder)
    assert sorted(looks) == ["load", "read" if of == "root" else "present"]
    assert isinstance(predictor.rule, rules.PromptId) and "prototype" in predictor.model.solved
    assert {"prompt", "prototype"} <= {rule.option for rule in able}


def test_check_says_what_fell(say, root, monkeypatch):
    status, out, _ = say("check")
    assert status == 0 and out.endswith("All tasks are as they were.\n")
    state = json.loads((root / "library.json").read_text())
    state["figures"]["high"]["given"] += 1.5
    (root / "library.json").write_text(json.dumps(state))
    status, out, _ = say("check")
    assert status == 1 and "fell: high: with the task given" in out and "1.50 points lower" in out
    assert say("check", "--max-drop=1.5")[0] == 0
    assert say("check", "--max-drop=x")[2].startswith("error: --max-drop: 'x' is not a number")

    def gone(*_):
        raise UserError("dataset: it is gone")

    monkeypatch.setattr(sources, "load", gone)
    status, out, _ = say("check", "--max-drop=100")
    assert status == 1 and "not checked: high: dataset: it is gone" in out and "low: " in out


def test_versions(say, root):
    assert say("activate", "low")[2].startswith("error: version: write which version of low")
    status, out, _ = say("activate", "low@2", "--min-accuracy=100")
    assert status == 1 and "low@2 is not active" in out
    assert say("activate", "low@2", "--max-drop=100")[0] == 0
    assert [v.state for v in Library(root).state().tasks["low"]] == [RETIRED, ACTIVE]
    status, out, _ = say("rollback", "low")
    assert status == 0 and out.endswith("low@1 is active\n")
    nothing = "error: rollback: low has no version before low@1 that was active and is not archived"
    assert say("rollback", "low")[2] == (
        f"{nothing}; soft-jax activate {root} low@2 makes that one the active one\n"
    )
    assert say("rollback", "high")[2].endswith("; there is no other; soft-jax learn makes one\n")
    status, out, _ = say("archive", "low")
    assert out.startswith("low@1 is archived: ") and "000.tar.xz" in out
    assert "low@1 is there again" in say("restore", "low")[1]
    assert say("restore", "low")[2].startswith("error: restore: low has no archived version")
    assert say("activate", "low@1", "--max-drop=100")[0] == 0
    assert say("remove", "low")[2].startswith("error: remove: 2 version(s) of low would be gone")
    assert say("remove", "low@2", "--yes")[0] == 0
    assert say("remove", "low", "--yes")[0] == 0
    assert say("remove", "low", "--yes")[2].startswith("error: task: there is no 'low'")
    assert say("rename", "high", "none")[2].startswith("error: task name: 'none' can't be one")


def test_tidy(say, root):
    assert say("tidy")[2].startswith("error: tidy: give --archive-unused=90d")
    assert say("tidy", "--archive-unused=90")[2].startswith("error: --archive-unused: '90'")
    assert say("tidy", "--archive-unused=1d")[1] == "There is nothing to archive.\n"
    _, out, _ = say("tidy", "--archive-unused=0d")
    assert out.count("would be archived") == 3
    assert Library(root).state().active
    assert say("tidy", "--archive-unused=0d", "--yes")[1].count("@1 archived") == 2
    assert not Library(root).state().active
    assert say("check")[2].endswith("has no active task\n")


@pytest.fixture
def photos(_tiny_world, tmp_path):
    for number in range(4):
        Image.fromarray(_tiny_world.test.images[number]).save(tmp_path / f"{number}.png")
    return [str(tmp_path / f"{number}.png") for number in range(4)]


def test_predict_takes_tasks_by_their_names(say, photos):
    status, out, err = say("predict", *photos)
    assert status == 0 and err.startswith("Task identity: CIL per_sample, prototype")
    assert out.count("(task low)") + out.count("(task high)") == 4
    assert say("predict", *photos, "--tasks=high")[1].count("(task high)") == 4
    assert say("predict", *photos, "--task=high")[1].count("(task high)") == 4
    rows = [json.loads(line) for line in say("predict", *photos, "--json")[1].splitlines()]
    assert {row["task"] for row in rows} <= {"low", "high"}
    for words, message in (
        (["--tasks=1"], "tasks: '1' is no active task; there are low, high"),
        (["--task=x"], "--task: 'x' is not a task to choose from; those are low, high"),
        (["--tasks=low", "--task=high"], "--task: 'high' is not a task to choose from; those"),
        (["--task-id=oracle"], "--task-id: 'oracle' needs --task"),
    ):
        assert message in say("predict", photos[0], *words)[2]


def test_a_damaged_task_keeps_none_of_the_others_from_answering(say, root, photos):
    """With the ways out that the error names; what is measured is measured of the others."""
    shutil.rmtree(root / "tasks/000/shared")
    for command, *words in (["predict", *photos], ["explain", photos[0]]):
        status, _, err = say(command, *words)
        assert status == 1 and "low@1 is damaged" in err and "--tasks=high" in err
        assert say(command, *words, "--tasks=high")[0] == 0
    assert say("predict", *photos, "--task=high")[1].count("(task high)") == 4
    status, out, _ = say("transfer")
    assert status == 1 and "not measured: low: low@1 is damaged" in out.replace("\n", " ")
    table = out[out.index("network of") : out.index("images of")]
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line}
    assert rows["low"] == ["–", "–"] and "–" not in rows["frozen"] + rows["high"]
    status, out, _ = say("cost")
    assert status == 1 and "not measured: low: low@1 is damaged" in out and "\nhigh  " in out


def test_folders_of_images(say, root, tmp_path, photos):
    (tmp_path / "empty").mkdir()
    assert "no classes in" in say("learn", "x", str(tmp_path / "empty"))[2]
    assert "there is no folder" in say("learn", "x", str(tmp_path / "gone"))[2]
    (tmp_path / "mine/train/3").mkdir(parents=True)
    assert "no image" in say("learn", "x", str(tmp_path / "mine"))[2]
    for number, photo in enumerate(photos):
        shutil.copy(photo, tmp_path / f"mine/train/3/{number}.png")
    assert "'3' is in task 'high' already" in say("learn", "x", str(tmp_path / "mine"))[2]
    assert "classes: 'a' stands twice" in say("learn", "x", "digits", "--classes=a,a")[2]
    assert "has no class 'z'" in say("learn", "x", "digits", "--classes=z")[2]
    assert "there is no 'y'" in say("learn", "x", "digits", "--classes=4", "--start-from=y")[2]
    assert "did you mean 'classes'?" in say("learn", "x", "digits", "--clases=4")[2]
    assert "epochs: 1 there, 2 now" in say("learn", "x", "digits", CONFIG, "--config.epochs=2")[2]
    new = tmp_path / "new"
    assert "no classes in" in say("learn", "x", str(tmp_path / "empty"), CONFIG, on=new)[2]
    assert not new.exists()


def test_a_task_is_exported_by_its_name(root, tmp_path, _tiny_world, capsys):
    for task in ("high", "low@2"):
        out = tmp_path / task
        assert main(["export", str(root), task, str(out), "--format=timm"]) == 0
        assert f"{task if '@' in task else 'high@1'} of softtf" in capsys.readouterr().out
    version = Library(root).state().version("low", 2)
    images = _tiny_world.test.images[:6]
    plain = export.load(root, "low@2")
    tokens, _ = engine.encode(plain.predictor.model, images, plain.predictor.batching, False)
    ours = engine.logits(
        plain.predictor.model, tokens, engine.alone(np.zeros(6, int)), plain.predictor.batching
    )
    arrays = safetensors.numpy.load_file(tmp_path / "low@2/model.safetensors")
    np.testing.assert_allclose(
        plain_logits(arrays, images), ours[:, list(version.classes)], rtol=0, atol=1e-5
    )
    Library(root).archive("low", 2)
    for task, message in (
        ("low@2", "TASK: low@2 is archived; restore it first"),
        ("1", "task: there is no '1' in this library; there are low, high"),
        ("low@7", "version: there is no low@7"),
    ):
        assert main(["export", str(root), task, str(tmp_path / "no"), "--format=timm"]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_run_does_not_go_on_in_a_library(root):
    with pytest.raises(UserError, match="is a library by now"):
        Store(root)


# A run is a library too.


@pytest.fixture(scope="module")
def run_(_tiny_world, tmp_path_factory):
    """A finished run of two tasks, not to be changed; 6 of the digits are in none."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tasks.json").write_text('[["1", "0"], ["2", "3"]]')
    settings = {"batch_size": 8, "epochs": 1, "eval_batch_size": 16, "prototype_features": 40}
    config = tiny_config(
        method="dualprompt",
        scenario="file",
        scenario_file=str(folder / "tasks.json"),
        **settings,
    )
    loop.run(config, folder / "run", Console(quiet=True))
    return config, folder / "run"


@pytest.fixture
def run(run_, tmp_path):
    shutil.copytree(run_[1], tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_is_a_library_whose_tasks_were_planned(say, run, run_, photos):
    by_run = Predictor.load(run)
    assert say("tasks", on=run)[1].splitlines()[1].startswith("task1@1  active  2 ")
    assert "classes: 1, 0" in say("show", "task1", on=run)[1]
    status, out, _ = say("check", on=run)  # against the run's own figures
    assert status == 0, out
    assert say("log", on=run)[1] == ""
    assert not (run / "library.json").exists()
    assert say("archive", "task1", on=run)[0] == 0
    with pytest.raises(UserError, match="is a library by now"):
        loop.run(run_[0], run, Console(quiet=True))
    assert say("restore", "task1", on=run)[0] == 0
    # The gate has the run's figures: without task1, images of task2 were easier to tell.
    assert say("activate", "task1@1", "--max-drop=100", on=run)[0] == 0
    by_library = Predictor.load(run)
    assert by_library.task_names == ("task2", "task1")[::-1]
    images = [np.asarray(Image.open(photo)) for photo in photos]
    one, other = by_run.predict(images), by_library.predict(images)
    np.testing.assert_array_equal(one.classes, other.classes)
    np.testing.assert_allclose(one.probabilities, other.probabilities[:, :10], atol=1e-5)


def test_a_run_learns_on_as_a_library(say, run):
    given = Library(run).check().figures
    status, out, err = say("learn", "more", "digits", "--classes=4,5", "--max-drop=100", on=run)
    assert status == 0, (out, err)
    state = Library(run).state()
    assert list(state.active) == ["task1", "task2", "more"]
    assert state.active["more"].classes == (10, 11)  # the run's ten classes keep their numbers
    for name in ("task1", "task2"):
        assert state.figures[name]["given"] == given[name]["given"]
    # The G-prompt is the run's last, and stays.
    reader = LibraryReader(run)
    shared = {
        manifest.sha256["shared/g_prompt"]
        for manifest in (reader.load_manifest(reader.tasks / name) for name in ("001", "002"))
    }
    assert len(shared) == 1
    before = Predictor.load(run, task_id="oracle").predict(np.zeros((4, 16, 16, 3), np.uint8), 0)
    Library(run).archive("task2")
    after = Predictor.load(run, task_id="oracle").predict(np.zeros((4, 16, 16, 3), np.uint8), 0)
    np.testing.assert_array_equal(before.probabilities, after.probabilities)


def test_a_run_whose_images_changed_can_not_be_checked(say, run, monkeypatch, _tiny_world):
    images = _tiny_world.test.images.copy()
    images[0] ^= 255
    changed = dataclasses.replace(
        _tiny_world, test=dataclasses.replace(_tiny_world.test, images=images)
    )
    monkeypatch.setattr(sources, "load", lambda *_: changed)
    status, out, _ = say("check", on=run)
    assert status == 1
    assert "not checked: task1: its test images in digits are others than it was learned" in out


def test_a_run_that_is_not_finished_is_no_library(say, run):
    shutil.rmtree(run / "tasks/001")
    for command, words in (
        ("tasks", []),
        ("show", ["task1"]),
        ("check", []),
        ("archive", ["task1"]),
        ("learn", ["x", "digits", "--classes=4"]),
    ):
        status, _, err = say(command, *words, on=run)
        assert status == 1 and "is a run of which 1 of 2 tasks are finished" in err, err
    assert not (run / "library.json").exists()
    assert Predictor.load(run).model.tasks == (0,)  # which a run's predictor does


def test_a_folder_that_is_neither(say, tmp_path):
    for command, words in (("tasks", []), ("check", []), ("rename", ["a", "b"])):
        status, _, err = say(command, *words, on=tmp_path / "nothing")
        assert status == 1 and ("there is none in" in err or "is not there" in err)


def test_an_unfinished_run_is_not_taken_from_the_program_that_trains_it(run):
    with closing(Store(run)), pytest.raises(UserError, match="another program is changing"):
        Library(run).archive("task1")


def test_the_candidate_began_with_the_active_version(library_):
    versions = Library(library_).state().tasks["low"]
    assert [v.state for v in versions] == [ACTIVE, CANDIDATE]
