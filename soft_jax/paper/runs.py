"""The runs behind a table's rows: which are finished, and running or continuing the others."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from soft_jax.config import DEFAULTS, Config
from soft_jax.errors import UserError
from soft_jax.experiment import settings as settings_lib
from soft_jax.paper import folders
from soft_jax.paper.rows import Row, config_of, settings_of
from soft_jax.store.folder import Reader
from soft_jax.store.records import TaskManifest


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run that a row needs: its config, and the folder that it is in, or will be."""

    config: Config
    folder: Path


def plan(
    row: Row, benchmark: str, overrides: Mapping[str, Any], seeds: int, workdir: Path
) -> list[PlannedRun]:
    """Return the runs of a row, one a seed. Raises UserError as `config_of` does."""
    configs = [config_of(row, benchmark, overrides, seed) for seed in range(seeds)]
    # What the method does not use was part of older folders' names.
    settings = [settings_of(row, benchmark, overrides, seed) for seed in range(seeds)]
    return [
        PlannedRun(config, folders.find(workdir, config, of_seed))
        for config, of_seed in zip(configs, settings, strict=True)
    ]


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


def run(planned: Sequence[PlannedRun], console: Console) -> list[list[TaskManifest] | UserError]:
    """Return the manifests of each run, or what was wrong with it.

    Runs that are not finished are run, or continued. One data set is held at a time, and seeds of
    one method share its compiled programs. Raises Preempted after a signal to stop.
    """
    # They are not needed for a finished table, and importing them takes a second.
    from soft_jax.data import sources
    from soft_jax.experiment import loop

    @functools.lru_cache(maxsize=1)
    def load(name: str, folder: str) -> sources.Dataset | UserError:
        try:
            return sources.load(name, folder)
        except UserError as error:  # what can't be had is not tried for again
            return error

    outcomes: list[list[TaskManifest] | UserError] = []
    for number, each in enumerate(planned, 1):
        config = each.config
        try:
            manifests = finished(each)
            if manifests is None:
                console.rule(
                    f"{number} of {len(planned)}: {config.method} on {config.benchmark}, seed "
                    f"{config.seed}"
                )
                dataset = load(config.dataset, config.data_dir)
                if isinstance(dataset, UserError):
                    raise dataset
                manifests = loop.run(config, each.folder, console, dataset)
            outcomes.append(manifests)
        except UserError as error:  # hours of other rows may be before and behind it
            console.print(f"error: {error}")
            outcomes.append(error)
    return outcomes
