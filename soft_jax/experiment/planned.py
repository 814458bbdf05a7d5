"""Runs that are planned before they are run: what a table's rows and a sweep's settings need.

A plan says of each run its config and its folder; the folder says what is finished already. So
whoever plans the same run again finds it, and only what is missing is trained: one after the other
in this process, or side by side (`jobs`), each in a process that runs this module as a program.
"""

import dataclasses
import functools
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from soft_jax import paths
from soft_jax.cache import on_disk
from soft_jax.config import DEFAULTS, Config, from_settings
from soft_jax.errors import Stopped, UserError
from soft_jax.evaluation import report
from soft_jax.experiment import jobs as jobs_lib
from soft_jax.experiment import settings as settings_lib
from soft_jax.experiment import trackers
from soft_jax.experiment.display import Display
from soft_jax.experiment.stopping import Preempted, stop_at_signals
from soft_jax.paths import Place
from soft_jax.store.folder import Reader, Store
from soft_jax.store.records import TaskManifest

# The program that runs one run, which it is given as `_given` writes it.
PROGRAM = (sys.executable, "-P", "-m", "soft_jax.experiment.planned")
LOG = "log.txt"  # in a run's folder: what such a process prints
MOST_SEEDS = 1000  # of one config: more is a slip, and would fill memory before a run begins


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run that is needed: its config, the folder that it is in or will be, and a title for the
    screen.
    """

    config: Config
    folder: Place
    title: str


def check_seeds(count: int) -> None:
    """Raise UserError for more runs of one config than anybody means."""
    if count > MOST_SEEDS:
        raise UserError(f"--seeds: {count} is above {MOST_SEEDS}, the most runs of one config")


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
    if planned.config.scenario == "file":
        return None  # its tasks are compared where the run is prepared, which trains nothing anew
    return _stored(planned)


def _stored(planned: PlannedRun) -> list[TaskManifest] | None:
    """Return what `finished` does, also where a file says which tasks there are."""
    reader = Reader(planned.folder)
    tasks = reader.present()
    if not tasks or not (planned.folder / "config.json").exists():
        return None
    # A folder is named for a digest: what is in it has the last word.
    reader.compare_settings(settings_lib.used_settings(planned.config), DEFAULTS)
    last = reader.load_task_manifest(tasks[-1])
    if len(tasks) < last.num_tasks:
        return None
    return [*(reader.load_task_manifest(task) for task in range(last.num_tasks - 1)), last]


Outcome = list[TaskManifest] | UserError


def run(
    planned: Sequence[PlannedRun],
    console: Console,
    figures: bool = True,
    jobs: int | None = 1,
    program: Sequence[str] = PROGRAM,
) -> Iterator[Outcome]:
    """Yield the manifests of each run, or what was wrong with it.

    Runs that are not finished are run, or continued. `console` shows which run it is, how far it is
    and what was wrong; with `figures` also what it reached on test images.

    Args:
        planned: the runs.
        console: where all that is shown.
        figures: whether figures of test images are shown.
        jobs: how many runs go side by side, each in a process on a device of its own, with its log
            in its folder; None: one for each chip of this host, or one where they can't be counted.
            One run alone, or one at a time, is run in this process on all devices; then one data
            set is held at a time, and seeds of one method share its compiled programs.
        program: the words of the command that runs one run, for tests and programs around this.

    Raises:
        UserError: for more jobs than the host has chips, or where they can't be counted, and for
            a tracker that is not installed.
        Preempted: after a signal to stop; the states of all runs are saved.
    """
    for each in planned:
        trackers.check(each.config)  # else every run would say the same
    folders = {each.folder: each for each in planned}  # rows may share a run
    slots, devices, before = 1, None, {}
    if jobs != 1 and len(folders) > 1:
        before = {folder: _before(each) for folder, each in folders.items()}
        if None in before.values():
            devices = _devices(jobs, console)
            # Not the number of the missing: continued, a run has as many devices as before.
            slots = jobs_lib.at_once(jobs, len(folders), devices)
    if slots > 1:
        runs = list(folders.values())
        outcomes = _side_by_side(runs, before, console, figures, slots, devices, program)
        yield from (outcomes[each.folder] for each in planned)
    else:
        yield from _one_by_one(planned, before, console, figures)


def _devices(jobs: int | None, console: Console) -> jobs_lib.Devices:
    """Return the host's devices; where they can't be counted and `jobs` is None, as if one."""
    try:
        return jobs_lib.devices_of_host()
    except UserError as error:
        if jobs is not None:
            raise
        _say(console, f"One run at a time: {error}")
        return jobs_lib.Devices("cpu", 1)


def _say(console: Console, text: str) -> None:
    """Print a line in which square brackets are no markup."""
    console.print(text, markup=False, highlight=False)


def _before(planned: PlannedRun) -> Outcome | None:
    """Return the outcome of a run that needs none of it: finished, or nothing to be run."""
    try:
        return _with_report(planned)
    except UserError as error:
        return error


@paths.reading("workdir")
def _with_report(planned: PlannedRun) -> list[TaskManifest] | None:
    """Return what `finished` does; a run killed between its last task and its report gets it."""
    manifests = finished(planned)
    if manifests and not report.shows(planned.folder, manifests):
        config = settings_lib.to_keep(planned.config)
        settings = dataclasses.asdict(config)
        with closing(Store(planned.folder)) as store:
            report.Report(store.root, settings, config.benchmark, manifests).write()
    return manifests


def _problem(error: UserError | OSError) -> UserError:
    """Return what went wrong with a run as its outcome; an OSError is a disk's or bucket's."""
    return error if isinstance(error, UserError) else UserError(str(error))


def _one_by_one(
    planned: Sequence[PlannedRun],
    before: Mapping[Place, Outcome | None],
    console: Console,
    figures: bool,
) -> Iterator[Outcome]:
    """Yield the outcome of each run in turn; all are run in this process.

    `before` is what is known already of the outcomes, by folder.
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
            except (UserError, OSError) as error:  # what can't be had is not tried for again
                dataset = _problem(error)
            except Stopped:
                dataset = None
            if stop.is_set():
                raise Preempted("Stopped while reading images")
        return dataset

    for number, each in enumerate(planned, 1):
        config = each.config
        try:
            manifests = before.get(each.folder) or _with_report(each)
            if isinstance(manifests, UserError):
                raise manifests
            if manifests is None:
                console.rule(f"{number} of {len(planned)}: {each.title}")
                dataset = load(config.dataset, config.data_dir)
                if isinstance(dataset, UserError):
                    raise dataset
                manifests = loop.run(config, each.folder, console, dataset, figures=figures)
            outcome = manifests
        except (UserError, OSError) as error:  # hours of other runs may be before and behind it
            _say(console, f"error: {error}")
            outcome = _problem(error)
        yield outcome


def _side_by_side(
    planned: Sequence[PlannedRun],
    before: Mapping[Place, Outcome | None],
    console: Console,
    figures: bool,
    slots: int,
    devices: jobs_lib.Devices,
    program: Sequence[str],
) -> dict[Place, Outcome]:
    """Return the outcome of each run by its folder; `slots` of them run at a time.

    `before` is what is known already of the outcomes, by folder.
    """
    outcomes: dict[Place, Outcome] = {}
    missing: list[PlannedRun] = []
    with stop_at_signals() as stop:
        fetch = functools.cache(functools.partial(_fetch, console, stop))
        for each in planned:
            c = each.config
            outcome = before[each.folder]
            if outcome is None:
                outcome = fetch(c.dataset, c.data_dir, c.backbone, c.backbone_path)
            if outcome is None:
                missing.append(each)
                continue
            outcomes[each.folder] = outcome
            if isinstance(outcome, UserError):
                _say(console, f"error: {each.title}: {outcome}")
        jobs = [
            jobs_lib.Job(each.title, program, _given(each, figures), _log(each)) for each in missing
        ]
        problems = jobs_lib.run(jobs, slots, devices, console, stop)
        if stop.is_set():
            raise Preempted("Stopped")
    for each, problem in zip(missing, problems, strict=True):
        try:
            with paths.reading("workdir"):
                outcomes[each.folder] = (
                    problem
                    or _stored(each)
                    or UserError(f"its process ended without a word (log: {_log(each)})")
                )
        except UserError as error:
            outcomes[each.folder] = error
    return outcomes


def _fetch(
    console: Console, stop: threading.Event, dataset: str, data_dir: str, backbone: str, path: str
) -> UserError | None:
    """Download what a run needs and this host has not, before several processes would.

    Returns what is wrong with it. Raises Preempted after a signal.
    """
    # Here, since a finished table needs neither.
    from soft_jax.data import sources
    from soft_jax.models import backbones

    with Display(console) as display:
        display.begin("looking for the images and the backbone")
        try:
            sources.prepare(dataset, data_dir, stop)
            backbones.locate(backbone, path, stop)
        except (UserError, OSError) as error:
            return _problem(error)
        except Stopped:
            pass
    if stop.is_set():
        raise Preempted("Stopped while fetching images and backbone")
    return None


def _log(planned: PlannedRun) -> Path:
    """Return the log's file: in the run's folder, or below the cache where that is in a bucket."""
    if isinstance(planned.folder, Path):
        return planned.folder / LOG
    return on_disk() / "logs" / re.sub(r"[^\w+.-]+", "/", str(planned.folder)) / LOG


def _given(planned: PlannedRun, figures: bool) -> dict[str, Any]:
    """Return what `main` needs to know, as JSON has it."""
    folder = str(planned.folder)
    return {"config": dataclasses.asdict(planned.config), "folder": folder, "figures": figures}


def main() -> int:
    """Be the program that runs one run, and return its exit status.

    That is 1 for what the user has to mend, and 128 + the signal's number after a signal. What it
    prints is on the error output, how far it is on the other.
    """
    given = jobs_lib.receive()
    from absl import logging

    from soft_jax.experiment import loop

    logging.set_verbosity(logging.ERROR)
    console = Console(file=sys.stderr, width=100)
    try:
        loop.run(
            from_settings(given["config"]),
            given["folder"],
            console,
            figures=given["figures"],
            display=jobs_lib.ToldDisplay(console),
        )
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        jobs_lib.tell(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
