"""Where a run's curves and figures are sent while it trains: TensorBoard, Weights & Biases.

To add a tracker, write its class, its line in `TRACKERS` and a setting of that name in `Config`
that turns it on.
"""

import dataclasses
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from soft_jax import cache, distributed
from soft_jax.buckets import BucketPath
from soft_jax.config import Config
from soft_jax.errors import UserError
from soft_jax.inference.rules import title
from soft_jax.paths import Place
from soft_jax.store.records import RunRecord

SENT_EVERY = 60.0  # seconds between two copies of TensorBoard's files to a bucket
# Figures of a protocol after a task, by what they are called where people read; those of `results`.
FIGURES = {
    "accuracy": "final_average",
    "forgetting": "forgetting",
    "task identity": "task_id_accuracy",
}


class Tracker:
    """One place that curves and figures are sent to.

    `package` is the Python package that it needs. Tasks count from 1, as wherever people read.
    """

    package: ClassVar[str]

    @classmethod
    def open(cls, config: Config, root: Place, record: RunRecord) -> Self:
        """Begin, or go on, for the run `record` in the folder `root`. Raises UserError."""
        raise NotImplementedError

    def curves(self, task: int, step: int, values: Mapping[str, float]) -> None:
        """Take in what a training step measured: `train_step.TERMS` by name.

        `task` counts from 1, `step` within the task from 0.
        """
        raise NotImplementedError

    def results(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take in the rows of `results.jsonl` after a task, one a protocol and part of the data.

        Those of tasks that were finished before come again when a run goes on.
        """
        raise NotImplementedError

    def close(self) -> str:
        """Send what is left; return a line for the user about what could not be sent, else ""."""
        raise NotImplementedError


def check(config: Config) -> None:
    """Raise UserError where a tracker is wanted whose package is not installed."""
    for setting, tracker in TRACKERS.items():
        if getattr(config, setting) and not importlib.util.find_spec(tracker.package):
            raise UserError(
                f"{setting}: {tracker.package} is not installed; pip install "
                f'"soft_jax[{setting}]", or leave the setting off'
            )


@contextmanager
def opened(
    config: Config, root: Place, record: RunRecord, tell: Callable[[str], None]
) -> Iterator["Trackers"]:
    """Yield the trackers that `config` turns on, in the first process; they are closed at the end.

    `tell` is called with a line about what one could not send. Raises UserError where one can't be
    opened.
    """

    def close(tracker: Tracker) -> None:
        if note := tracker.close():
            tell(note)

    check(config)
    wanted = [tracker for setting, tracker in TRACKERS.items() if getattr(config, setting)]
    with ExitStack() as stack:
        trackers = []
        for tracker in wanted if distributed.is_primary() else ():
            trackers.append(tracker.open(config, root, record))
            stack.callback(close, trackers[-1])
        yield Trackers(trackers)


class Trackers:
    """All trackers of a run as one."""

    def __init__(self, trackers: Sequence[Tracker] = ()):
        self._trackers = tuple(trackers)

    def curves(self, task: int, step: int, values: Mapping[str, float]) -> None:
        """Send what a training step measured, as `Tracker.curves`."""
        for tracker in self._trackers:
            tracker.curves(task, step, values)

    def results(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send the rows after a task, as `Tracker.results`."""
        for tracker in self._trackers:
            tracker.results(rows)


def figures(row: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """Return a row's protocol as people read it, and its figures, "test accuracy" and the like."""
    protocol = title(f"{row['protocol']}/{row['task_id']}").removesuffix(" *")
    return protocol, {f"{row['part']} {name}": row[field] for name, field in FIGURES.items()}


class TensorBoard(Tracker):
    """Event files in `WORKDIR/tensorboard`, a folder a curve, so that curves lie over each other.

    `task_1`, `task_2`, ... hold the training curves over the steps of the task; a folder named for
    each protocol holds its figures over the number of tasks trained.

    Of a run in a bucket they are written to a temporary folder, and copied to the bucket after each
    task and every `SENT_EVERY` seconds. What can't be copied in the end stays there.
    """

    package = "tensorboardX"

    def __init__(self, root: Place, writer: Callable[..., Any]):
        self._bucket = root if isinstance(root, BucketPath) else None
        self._root = Path(tempfile.mkdtemp(prefix="soft_jax-")) if self._bucket else root
        self._new, self._sent = writer, time.monotonic()
        self._task: tuple[int, Any] | None = None  # number and writer of the task in training
        self._protocols: dict[str, Any] = {}

    @classmethod
    def open(cls, config: Config, root: Place, record: RunRecord) -> Self:
        """Begin in `root/tensorboard`; a run that goes on adds files to those there."""
        from tensorboardX import SummaryWriter

        return cls(root / "tensorboard", SummaryWriter)

    def curves(self, task: int, step: int, values: Mapping[str, float]) -> None:
        """Write a point of each of the task's curves."""
        if self._task is None or self._task[0] != task:
            self._close_task()
            self._task = task, self._writer(f"task_{task}", step)
        for name, value in values.items():
            self._task[1].add_scalar(f"train/{name}", value, step)
        if time.monotonic() - self._sent > SENT_EVERY:
            self._task[1].flush()
            self._send()

    def results(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a point of each protocol's figures."""
        for row in rows:
            protocol, values = figures(row)
            stage = row["tasks_trained"]
            if protocol not in self._protocols:
                self._protocols[protocol] = self._writer(protocol, stage)
            for name, value in values.items():
                part, _, figure = name.partition(" ")
                tag = f"{part}/{figure.replace(' ', '_')}"
                self._protocols[protocol].add_scalar(tag, value, stage)
        for writer in self._protocols.values():
            writer.flush()  # tasks may be hours apart
        self._send()

    def _writer(self, name: str, step: int) -> Any:
        # What an earlier process wrote from this step on is replaced: it was cut off there.
        return self._new(str(self._root / name), purge_step=step)

    def _close_task(self) -> None:
        if self._task:
            self._task[1].close()

    def close(self) -> str:
        """Close all files; return where they are if not all could be copied to the bucket."""
        self._close_task()
        for writer in self._protocols.values():
            writer.close()
        if problem := self._send():
            return (
                f"tensorboard: curves could not be copied to {self._bucket} ({problem}); they are "
                f"in {self._root}, copy them from there"
            )
        if self._bucket:
            shutil.rmtree(self._root, ignore_errors=True)
        return ""

    def _send(self) -> str:
        """Copy the files to the bucket, if the run is in one; return what was wrong, "" if nothing.

        Where that fails they come with the next; the run itself tells of a bucket that is gone.
        """
        self._sent, problem = time.monotonic(), ""
        for file in self._root.rglob("events*") if self._bucket else ():
            try:
                (self._bucket / file.relative_to(self._root)).write_bytes(file.read_bytes())
            except OSError as error:
                problem = str(error)
        return problem


class WandB(Tracker):
    """A run of Weights & Biases, in the project "soft_jax"; WANDB_PROJECT, WANDB_MODE and the like
    hold as everywhere.

    It is named for the folder, and known by the run's fingerprint: a run that goes on goes on there
    too. The curves of task 1 are "task_1/loss" and so on, over "step"; figures are "CIL per_sample,
    Prompt ID/test accuracy" and so on, over "tasks trained".
    """

    package = "wandb"

    def __init__(self, run: Any):
        self._run, self._defined = run, set()

    @classmethod
    def open(cls, config: Config, root: Place, record: RunRecord) -> Self:
        """Begin or go on with the run. Raises UserError where W&B can't: no login, no network."""
        import wandb

        # What it has not sent yet has to be on a disk.
        folder = cache.on_disk() if isinstance(root, BucketPath) else root
        folder.mkdir(parents=True, exist_ok=True)
        own = None if (folder / "wandb").exists() else folder / "wandb"
        try:
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "soft_jax"),
                name=root.name,
                id=record.fingerprint[:16],
                resume="allow",
                dir=str(folder),
                config=dataclasses.asdict(config),
                # The screen is ours, and stays on it.
                settings=wandb.Settings(console="off", silent=True),
            )
        except (wandb.errors.Error, ValueError) as error:  # the latter of its own settings
            if own:
                shutil.rmtree(own, ignore_errors=True)
            said = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"wandb: {said}; log in with `wandb login`, set WANDB_MODE=offline, or leave the "
                "setting off"
            ) from error
        return cls(run)

    def curves(self, task: int, step: int, values: Mapping[str, float]) -> None:
        """Log a point of each of the task's curves."""
        self._log(f"task_{task}", "step", step, values)

    def results(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a point of each protocol's figures."""
        for row in rows:
            protocol, values = figures(row)
            self._log(protocol, "tasks trained", row["tasks_trained"], values)

    def _log(self, group: str, axis: str, place: int, values: Mapping[str, float]) -> None:
        named = {f"{group}/{name}": value for name, value in values.items()}
        for name in named.keys() - self._defined:
            self._run.define_metric(name, step_metric=axis)
        self._defined |= named.keys()
        self._run.log(named | {axis: place})

    def close(self) -> str:
        """Send what is left, and end the process that W&B runs beside this one."""
        self._run.finish()
        return ""


# By the setting that turns each on.
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}
