"""What TensorBoard and Weights & Biases get of a run."""

import dataclasses
import importlib.util
import io
import struct
import time
from pathlib import Path

import pytest
from rich.console import Console

from soft_jax.config import Config
from soft_jax.errors import UserError
from soft_jax.experiment import loop, planned, trackers
from soft_jax.experiment.planned import PlannedRun
from soft_jax.store.records import RunRecord
from tests.conftest import tiny_config

RECORD = RunRecord(settings={}, backbone_sha256="0", dataset_sha256="1", tasks=None)
ROW = {
    "part": "test",
    "protocol": "per_sample",
    "task_id": "prompt_id",
    "final_average": 80.0,
    "forgetting": 5.0,
    "task_id_accuracy": 60.0,
}


def train(config, root, tasks, first_step=0):
    """Two steps and the results of each of `tasks`, counted from 1."""
    with trackers.opened(config, root, RECORD, print) as sent:
        for task in tasks:
            for step in range(first_step, first_step + 2):
                sent.curves(task, step, {"loss": task + step / 10})
            voted = {"protocol": "batch_vote", "task_id": "gradient_id_7", "final_average": 70.0}
            held_out = {"part": "validation", "final_average": 90.0}
            rows = (ROW, ROW | voted, ROW | held_out)
            sent.results([row | {"tasks_trained": task} for row in rows])


def events(folder):
    """The scalars `(tag, step, value)` of a folder of event files, as TensorBoard shows them: what
    comes after a restart replaces what was there from that step on.
    """
    from tensorboardX.proto import event_pb2

    found = []
    for file in sorted(folder.glob("events*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            if event.HasField("session_log"):
                found = [scalar for scalar in found if scalar[1] < event.step]
            for value in event.summary.value:
                found.append((value.tag, event.step, round(value.simple_value, 4)))
    return found


def test_tensorboard_lays_the_curves_of_all_tasks_over_each_other(tmp_path):
    """The same tags in a folder each: so it draws them into one chart, and protocols likewise."""
    train(Config(tensorboard=True), tmp_path, [1, 2])
    board = tmp_path / "tensorboard"
    assert {path.name for path in board.iterdir()} == {
        "task_1",
        "task_2",
        "CIL per_sample, Prompt ID",
        "CIL batch_vote, Gradient ID, 7 shots",
    }
    for task in (1, 2):
        found = events(board / f"task_{task}")
        assert found == [("train/loss", 0, task), ("train/loss", 1, task + 0.1)]
    found = events(board / "CIL per_sample, Prompt ID")
    expected = {"accuracy": 80, "forgetting": 5, "task_identity": 60}
    for stage in (1, 2):
        for name, value in expected.items():
            assert (f"test/{name}", stage, value) in found
        assert ("validation/accuracy", stage, 90) in found
    assert len(found) == 2 * 6
    assert ("test/accuracy", 2, 70) in events(board / "CIL batch_vote, Gradient ID, 7 shots")


def test_tensorboard_replaces_what_a_run_that_was_cut_off_does_again(tmp_path, monkeypatch):
    config = Config(tensorboard=True)
    train(config, tmp_path, [1, 2])
    # File names hold the second they were made in; here they are in order without waiting.
    for file in (tmp_path / "tensorboard").glob("*/events*"):
        file.rename(file.with_name(f"events.0.{file.name}"))
    train(config, tmp_path, [1, 2], first_step=1)
    board = tmp_path / "tensorboard"
    found = events(board / "task_2")
    assert found == [("train/loss", 0, 2), ("train/loss", 1, 2.1), ("train/loss", 2, 2.2)]
    assert len(events(board / "CIL per_sample, Prompt ID")) == 2 * 6


@pytest.fixture
def offline(monkeypatch):
    """Weights & Biases that sends nothing; its files are in the run's folder."""
    if not importlib.util.find_spec("wandb"):
        pytest.skip("wandb is not installed; it is in requirements-dev.txt")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("offline")
def test_wandb_gets_curves_and_figures_without_a_network(tmp_path, capfd):
    train(Config(wandb=True), tmp_path, [1])
    (file,) = tmp_path.glob(f"wandb/offline-run-*/run-{RECORD.fingerprint[:16]}.wandb")
    # W&B's own process may write the last of it a moment after it is told to finish.
    deadline = time.monotonic() + 60
    while b"tasks trained" not in (sent := file.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for name in (
        "task_1/loss",
        "CIL per_sample, Prompt ID/test accuracy",
        "CIL per_sample, Prompt ID/validation accuracy",
        "CIL batch_vote, Gradient ID, 7 shots/test forgetting",
        "tasks trained",
        "dualprompt+softtf",
    ):
        assert name.encode() in sent  # protocol buffers: text stands in them as it is
    assert capfd.readouterr().out == ""  # the screen is the run's


def test_wandb_defines_axes_once_and_logs_over_them():
    """Whose curves start anew with each task: W&B's own count of steps never goes back."""

    class Run:
        axes, logged = {}, []

        def define_metric(self, name, step_metric):
            assert name not in self.axes
            self.axes[name] = step_metric

        def log(self, values):
            self.logged.append(values)

    tracker = trackers.WandB(Run())
    for task in (1, 2):
        tracker.curves(task, 0, {"loss": 0.5})
        tracker.curves(task, 1, {"loss": 0.4})
        tracker.results([ROW | {"tasks_trained": task}])
    assert Run.axes["task_2/loss"] == "step"
    assert Run.axes["CIL per_sample, Prompt ID/test accuracy"] == "tasks trained"
    assert Run.logged[0] == {"task_1/loss": 0.5, "step": 0}
    assert Run.logged[-1] == {
        "CIL per_sample, Prompt ID/test accuracy": 80.0,
        "CIL per_sample, Prompt ID/test forgetting": 5.0,
        "CIL per_sample, Prompt ID/test task identity": 60.0,
        "tasks trained": 2,
    }


@pytest.mark.usefixtures("offline")
def test_wandb_that_refuses_is_named(tmp_path, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="wandb: No API key configured.*WANDB_MODE=offline"):
        train(Config(wandb=True), tmp_path, [1])


@pytest.mark.usefixtures("offline", "digits")
@pytest.mark.parametrize("kind", ["its own", "of its settings"])
def test_a_run_that_wandb_refuses_leaves_nothing(kind, tmp_path, monkeypatch):
    import wandb

    def refuse(dir, **_):
        (Path(dir) / "wandb").mkdir()
        (Path(dir) / "wandb/debug.log").write_text("its own log")
        problem = "1 error in\n  mode\n"
        raise wandb.errors.UsageError(problem) if kind == "its own" else ValueError(problem)

    monkeypatch.setattr(wandb, "init", refuse)
    config = tiny_config(method="head", tasks=2, wandb=True)
    with pytest.raises(UserError, match="^wandb: 1 error in mode; log in with"):
        loop.run(config, tmp_path / "runs/mine", Console(quiet=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", list(trackers.TRACKERS))
def test_a_tracker_that_is_not_installed_is_named_before_the_run(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config, printed = dataclasses.replace(Config(), **{setting: True}), io.StringIO()
    refused = pytest.raises(UserError, match=rf'{setting}: .* pip install "soft_jax\[{setting}\]"')
    with refused:
        trackers.check(config)
    runs = [PlannedRun(config, tmp_path / name, name) for name in ("one", "two")]
    with refused:  # once, not by every run
        list(planned.run(runs, Console(file=printed)))
    assert not printed.getvalue()
    trackers.check(Config())  # nobody asked for it


def test_other_processes_track_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.distributed, "is_primary", lambda: False)
    train(Config(tensorboard=True), tmp_path, [1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", list(trackers.TRACKERS))
def test_every_tracker_has_an_extra_of_its_name(setting):
    import tomllib

    file = Path(__file__).parent.parent / "pyproject.toml"
    extras = tomllib.loads(file.read_text())["project"]["optional-dependencies"]
    (needed,) = extras[setting]
    assert needed.startswith(trackers.TRACKERS[setting].package)
    assert needed in (file.parent / "requirements-dev.txt").read_text().split()  # tests need it
