"""Runs that are planned before they are run: what a table's rows and a sweep's settings need.

A plan says of each run its config and its folder; the folder says what is finished already. So
whoever plans the same run again finds it, and only what is missing is trained.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from soft_jax.config import DEFAULTS, Config
from soft_jax.errors import Stopped, UserError
from soft_jax.experiment import settings as settings_lib
from soft_jax.experiment.display import Display
from soft_jax.experiment.stopping import Preempted, stop_at_signals
from soft_jax.store.folder import Reader
from soft_jax.store.records import TaskManifest


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run that is needed: its config, the folder that it is in or will be, and a title for the
    screen.
    """

    config: Config
    folder: Path
    title: str


def folder_of(config: Config) -> str:
    """Return where a run is kept, below the folder of all runs of a table or sweep.

    Its name is made of the run's method and benchmark, a digest of the settings that differ from
    the defaults among those that the method uses, and its seed. So a setting that comes later, or
    has no effect, moves nothing.
    """
    used = settings_lib.used_settings(config)
    paths = {name: getattr(config, name) for name in settings_lib.told_apart(used)}
    changed = {
        # 100 and 100.0 are one setting, and so one folder.
        name: float(value) if type(DEFAULTS[name]) is float else value
        for name, value in (used | paths).items()
        if value != DEFAULTS[name] and name != "seed"
    }
    return f"{used['method']}-{config.benchmark}-{digest(changed)}/seed{config.seed}"


def digest(settings: Mapping[str, Any]) -> str:
    """Return the first 8 hex digits of the SHA-256 of settings, written as JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def finished(planned: PlannedRun) -> list[TaskManifest] | None:
    """Return the manifests of a run's tasks, None unless all of them are there.

    Raises UserError where the folder holds a run of other settings, or is damaged.
    """
    reader = Reader(planned.folder)
    tasks = reader.present()
    if not tasks or not (planned.folder / "config.json").exists():
        return None
    # A folder is named for a digest: what is in it has the last word.
    reader.compare_settings(settings_lib.used_settings(planned.config), DEFAULTS)
    last = reader.load_task_manifest(tasks[-1])
    if planned.config.scenario == "file":
        return None  # its tasks are compared where the run is prepared, which trains nothing anew
    if len(tasks) < last.num_tasks:
        return None
    return [*(reader.load_task_manifest(task) for task in range(last.num_tasks - 1)), last]


def run(
    planned: Sequence[PlannedRun], console: Console, figures: bool = True
) -> Iterator[list[TaskManifest] | UserError]:
    """Yield the manifests of each run, or what was wrong with it.

    Runs that are not finished are run, or continued. One data set is held at a time, and seeds of
    one method share its compiled programs. `console` shows which run it is, how far it is and what
    was wrong; with `figures` also what it reached on test images.

    Raises Preempted after a signal to stop.
    """
    # They are not needed for a finished table, and importing them takes a second.
    from soft_jax.data import sources
    from soft_jax.experiment import loop

    @functools.lru_cache(maxsize=1)
    def load(name: str, folder: str) -> sources.Dataset | UserError:
        with stop_at_signals() as stop, Display(console) as display:
            display.begin("loading the images")
            try:
                dataset = sources.load(name, folder, stop)
            except UserError as error:  # what can't be had is not tried for again
                dataset = error
            except Stopped:
                dataset = None
            if stop.is_set():
                raise Preempted("Stopped while reading images")
        return dataset

    for number, each in enumerate(planned, 1):
        config = each.config
        try:
            manifests = finished(each)
            if manifests is None:
                console.rule(f"{number} of {len(planned)}: {each.title}")
                dataset = load(config.dataset, config.data_dir)
                if isinstance(dataset, UserError):
                    raise dataset
                manifests = loop.run(config, each.folder, console, dataset, figures=figures)
            outcome = manifests
        except UserError as error:  # hours of other runs may be before and behind it
            console.print(f"error: {error}")
            outcome = error
        yield outcome
