"""A library of tasks: it grows by one task at a time, keeps versions, and checks itself.

Every task is learned by itself, as a run of one task, and is then put together with the others
(`inference.assembly`). What they share, a G-prompt, is the first task's and frozen: with the task
given, an old task answers the same to the bit, however many come and go.

Before a version becomes the active one of its task, all active tasks are evaluated with it, on the
test images that they were learned with: the gate. Where one falls by more than is allowed, the
version stays a candidate.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from rich.console import Console

from soft_jax import distributed
from soft_jax.config import Config, from_settings
from soft_jax.data import sources
from soft_jax.errors import Stopped, UserError
from soft_jax.experiment import data_spec, loop, transfer
from soft_jax.experiment import settings as settings_lib
from soft_jax.experiment.data_spec import Data
from soft_jax.experiment.run import Start
from soft_jax.experiment.stopping import Preempted, stop_at_signals
from soft_jax.hooks import Hooks
from soft_jax.inference import assembly, engine
from soft_jax.inference.predictor import Predictor
from soft_jax.methods import registry
from soft_jax.models import backbones
from soft_jax.store import checkpoint, library
from soft_jax.store.library import (
    ACTIVE,
    ARCHIVED,
    CANDIDATE,
    RETIRED,
    LibraryFolder,
    LibraryReader,
    LibraryState,
    Version,
)

# What is measured of a task, in percent: with the task given, and each image by itself.
GIVEN, PER_SAMPLE = "given", "per_sample"
MEASURED = (GIVEN, PER_SAMPLE)
BEST = "best"  # in the place of a task to start from
TRANSFER_FILE = "transfer.json"
MAX_DROP = 1.0  # points that a task may fall by at the gate
RUN_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the gate found: `figures` in percent by task, as `MEASURED`; what fell, in words; and
    which tasks could not be checked, and why.
    """

    figures: Mapping[str, Mapping[str, float]]
    fallen: tuple[str, ...]
    unchecked: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Whether nothing fell, and everything was checked."""
        return not self.fallen and not self.unchecked


@dataclasses.dataclass(frozen=True)
class Gate:
    """What a version has to hold before it becomes the active one.

    No active task may fall by more than `max_drop` points, and the version itself, with the task
    given, must not be below `min_accuracy` percent.
    """

    max_drop: float = MAX_DROP
    min_accuracy: float = 0.0

    def __post_init__(self):
        if not (0 <= self.max_drop <= 100 and 0 <= self.min_accuracy <= 100):
            raise UserError(
                f"gate: max_drop {self.max_drop:g} and min_accuracy {self.min_accuracy:g} are "
                "percent, from 0 to 100"
            )


class Library:
    """A library of tasks in a folder. Made by `Library.open`, or by the first `learn`.

    Each method reads the folder anew, and those that change it hold it meanwhile. A run's folder is
    a library too, once the run is finished.
    """

    def __init__(self, root: str | PathLike, console: Console | None = None):
        self.root = LibraryReader(root).root
        self.console = console or Console(quiet=True)

    @classmethod
    def open(cls, root: str | PathLike, console: Console | None = None) -> Self:
        """Open a library. Raises UserError where there is none."""
        opened = cls(root, console)
        opened.state()
        return opened

    def state(self) -> LibraryState:
        """Return what the library holds now."""
        return LibraryReader(self.root).read()

    def log(self) -> list[dict[str, Any]]:
        """Return the records of all changes, oldest first."""
        return LibraryReader(self.root).log() if library.holds_library(self.root) else []

    # Growing.

    def learn(
        self,
        name: str,
        data: Data,
        *,
        config: Config | None = None,
        start_from: str | None = None,
        extend: bool = False,
        gate: Gate | None = None,
        keep_test_images: bool = False,
        command: str = "learn",
        hooks: Hooks | None = None,
    ) -> tuple[Version, Verdict]:
        """Learn a task, or a new version of it, and take it in.

        Args:
            name: the task's.
            data: its images.
            config: the settings that all tasks of a new library are learned with; None: those of
                the library. Others than the library's are refused.
            start_from: a task, or a version "birds@2", whose prompt and weights the training begins
                with; "best": the active task whose features serve the new images most
                (`experiment.transfer`); None: as they are drawn.
            extend: whether `data` brings more classes to a task that is there: the new version has
                both. The older classes' images are taken from `data` if it has them, else from
                where they were.
            gate: what the version has to hold to become the active one.
            keep_test_images: whether its test images are kept in the library.
            command: how the log calls it.
            hooks: functions to call while it trains.

        Returns:
            The version, active or a candidate, and what the gate found.

        Raises:
            UserError: for anything that the user has to mend; nothing is changed then.
            Preempted: after SIGTERM or SIGINT; the same call continues.
        """
        library.check_name(name)
        with self._held(make=config is not None) as folder:
            old = self._state_or_new(folder, config)
            named = None if start_from == BEST else start_from
            plan, dataset = _planned(old, name, data, extend, named)
            if start_from == BEST:
                plan = dataclasses.replace(plan, start_from=self._best(folder, old, dataset))
            version, finished = self._train(folder, old, plan, dataset, hooks)
            new, version = _with_version(old, plan, version)
            folder.take_in(finished, version)
            if keep_test_images:
                version = self._keep_tests(folder, new, dataset, version)
                new = new.replaced(name, version)
            verdict = self._judge(folder, old, new, name, version, gate or Gate())
            new, version = _decided(new, name, version, verdict)
            before = old if old.changes or old.tasks else None
            folder.commit(before, new, command, _verdict_note(verdict))
        return version, verdict

    @contextlib.contextmanager
    def _held(self, make: bool = False) -> Iterator[LibraryFolder]:
        with contextlib.closing(LibraryFolder(self.root, make)) as folder:
            yield folder

    def _state_or_new(self, folder: LibraryFolder, config: Config | None) -> LibraryState:
        if config is None or library.holds_library(self.root) or (self.root / RUN_FILE).exists():
            state = folder.read()
            ours = _config_of(state)
            _check_method(ours)
            if config is not None:
                _check_same(ours, config)
            _checked_backbone(state)
            return state
        folder.check_new()
        settings_lib.check(config)
        _check_method(config)
        loaded = _load_backbone(config)
        return LibraryState(config=dataclasses.asdict(config), backbone_sha256=loaded.fingerprint)

    def _train(
        self,
        folder: LibraryFolder,
        state: LibraryState,
        plan: "_Plan",
        dataset: sources.Dataset,
        hooks: Hooks | None,
    ) -> tuple[Version, Path]:
        """Train what is planned; return it as a version without a place, and its folder."""
        named = {"dataset": plan.parts[-1].dataset, "data_dir": plan.parts[-1].data_dir}
        config = dataclasses.replace(_config_of(state), **named, **_ONE_TASK)
        workdir = self.root / "learning" / _training_name(state, plan, config, dataset)
        begin = _start(folder, state, plan)
        manifests = loop.run(
            config, workdir, self.console, dataset, hooks, figures=False, start=begin
        )
        finished = workdir / "tasks" / "000"
        test = dataset.test
        version = Version(
            id=state.next_id,
            number=plan.number,
            state=CANDIDATE,
            classes=(),
            created=library.now(),
            data=tuple(part.to_json() for part in plan.parts),
            test={"images": len(test.labels), "sha256": _hash_of(dataset)},
            seconds=float(manifests[0].seconds["train"]),
            bytes=library.checkpoint_bytes(finished),
        )
        return version, finished

    def _keep_tests(
        self,
        folder: LibraryFolder,
        state: LibraryState,
        dataset: sources.Dataset,
        version: Version,
    ) -> Version:
        size = _load_backbone(_config_of(state)).architecture.image_size
        images = dataset.test.prepared(np.arange(len(dataset.test.labels)), size)
        digest = folder.keep_tests(version, images, dataset.test.labels)
        return dataclasses.replace(version, test={**version.test, "kept_sha256": digest})

    # The gate.

    def check(self, max_drop: float = MAX_DROP) -> Verdict:
        """Evaluate all active tasks on their test images, against their figures when accepted.

        A version that is damaged counts as one that can't be checked; the others are evaluated
        without it. Raises UserError where there is no active task.
        """
        reader = LibraryReader(self.root)
        state = reader.read()
        return self._evaluate(reader, state, state.figures, Gate(max_drop))

    def _judge(
        self,
        folder: LibraryFolder,
        old: LibraryState,
        new: LibraryState,
        name: str,
        version: Version,
        gate: Gate,
    ) -> Verdict:
        """Evaluate the library as it would be with `version` as the active one of task `name`."""
        tried = _activated(new, name, version)
        verdict = self._evaluate(folder, tried, old.figures, gate, name)
        if name in verdict.figures:
            own = verdict.figures[name][GIVEN]
            low = f"{own:.2f}% with the task given" if own < gate.min_accuracy else ""
        else:
            low = "it could not be evaluated, which" if gate.min_accuracy else ""
        if low:
            low = f"{name}: {low} is below {gate.min_accuracy:g}%"
            verdict = dataclasses.replace(verdict, fallen=(*verdict.fallen, low))
        return verdict

    def _evaluate(
        self,
        reader: LibraryReader,
        state: LibraryState,
        before: Mapping[str, Mapping[str, float]],
        gate: Gate,
        new: str | None = None,
    ) -> Verdict:
        """Evaluate the active tasks of `state`, against their figures `before`.

        Raises UserError where there are none, or task `new`, which is to be the active one, is
        damaged.
        """
        config, backbone = _config_of(state), _checked_backbone(state)
        if not state.active:
            raise UserError(f"library: {self.root} has no active task")
        versions, figures, fallen, unchecked = {}, {}, [], {}
        for name, version in state.active.items():
            try:
                assembly.check_version(reader, state, name, version, config, backbone)
                versions[name] = version
            except UserError as error:
                if name == new:
                    raise
                unchecked[name] = str(error)
        if not versions:
            return Verdict({}, (), unchecked)
        predictor = _predictor(reader, state, versions)
        whole: dict[Data, tuple[sources.Dataset, str]] = {}
        for place, (name, version) in enumerate(versions.items()):
            try:
                images, labels = _tests(reader, state, version, predictor, whole)
            except UserError as error:
                unchecked[name] = str(error)
                continue
            figures[name] = _accuracies(predictor, images, labels, place)
            if name not in before:
                if name != new:
                    unchecked[name] = "there are no figures of it to compare with"
                continue
            for measured in MEASURED:
                drop = before[name][measured] - figures[name][measured]
                if drop > gate.max_drop + 1e-9:
                    was = before[name][measured]
                    fallen.append(
                        f"{name}: {_SHOWN[measured]} {was:.2f} → {figures[name][measured]:.2f}, "
                        f"{drop:.2f} points lower"
                    )
        return Verdict(figures, tuple(fallen), unchecked)

    # Transfer.

    def _best(
        self, folder: LibraryReader, state: LibraryState, dataset: sources.Dataset
    ) -> Version:
        """Return the active version whose features serve the images of a data set most."""
        if not state.active:
            raise UserError("start_from: there is no active task yet to begin with")
        predictor = _predictor(folder, state, state.active)
        frozen, gains = transfer.gains(predictor, dataset)
        best = max(gains, key=lambda task: gains[task])
        self.console.print(
            f"Begins with {best}: its features name {frozen + gains[best]:.1f}% of the new images "
            f"held out of training, the frozen ones {frozen:.1f}%",
            highlight=False,
        )
        return state.active[best]

    def transfer(self) -> dict[str, dict[str, float]]:
        """Return what each active task's network gives to each active task, `transfer.gains`.

        `[i][j]` is of task i's network on the images of task j, in points; `["frozen"][j]` is the
        accuracy of the frozen network's probe, in percent. Pairs that were measured before are kept
        in the library, so that a task more costs one row and one column. Raises UserError where a
        task's images can't be had.
        """
        reader = LibraryReader(self.root)
        state = reader.read()
        kept = _kept_transfer(reader)
        versions = state.active
        if not versions:
            raise UserError(f"library: {self.root} has no active task")
        table: dict[str, dict[str, float]] = {name: {} for name in ("frozen", *versions)}
        for name, version in versions.items():
            column = kept.setdefault(str(version.id), {})
            missing = {n: v for n, v in versions.items() if str(v.id) not in column}
            if missing:
                predictor = _predictor(reader, state, missing)
                frozen, gains = transfer.gains(predictor, _images(version))
                column["frozen"] = frozen
                column |= {str(versions[task].id): gain for task, gain in gains.items()}
            table["frozen"][name] = column["frozen"]
            for other, of in versions.items():
                table[other][name] = column[str(of.id)]
        with contextlib.suppress(UserError):  # a library that can only be read
            text = json.dumps(kept, indent=1, sort_keys=True) + "\n"
            checkpoint.write_text(self.root / TRANSFER_FILE, text)
        return table

    # Versions.

    def activate(
        self, name: str, number: int, gate: Gate | None = None, command: str = "activate"
    ) -> Verdict:
        """Make a version the active one, if it passes the gate. Raises UserError where it is
        archived, or not there.
        """
        with self._held() as folder:
            old = folder.read()
            version = old.version(name, number)
            if version.state == ARCHIVED:
                raise UserError(f"version: {name}@{number} is archived; restore it first")
            if version.state == ACTIVE:
                raise UserError(f"version: {name}@{number} is the active one already")
            verdict = self._judge(folder, old, old, name, version, gate or Gate())
            if not verdict.fallen:
                new = _with_figures(_activated(old, name, version), name, verdict)
                folder.commit(old, new, command, _verdict_note(verdict))
        return verdict

    def rollback(self, name: str, command: str = "rollback") -> tuple[Version, Verdict]:
        """Make the version before the active one the active one again.

        It was accepted once, so the gate is asked, and not obeyed. Raises UserError where there is
        none before, or it is damaged.
        """
        with self._held() as folder:
            old = folder.read()
            versions = old.versions(name)
            active = old.active.get(name)
            upto = active.number if active else versions[-1].number + 1
            earlier = [v for v in versions if v.number < upto and v.state == RETIRED]
            if not earlier:
                raise UserError(
                    f"rollback: {name} has no version before "
                    f"{f'{name}@{upto}' if active else 'that'} that was active and is not archived"
                )
            version = earlier[-1]
            new = _activated(old, name, version)
            verdict = self._evaluate(folder, new, old.figures, Gate(100.0), name)
            new = _with_figures(new, name, verdict)
            folder.commit(old, new, command, _verdict_note(verdict))
        return version, verdict

    def archive(self, name: str, number: int | None = None, command: str = "archive") -> Version:
        """Pack a version small; it is loaded no more, and `restore` brings it back to the bit."""
        with self._held() as folder:
            old = folder.read()
            version = old.version(name, number)
            if version.state == ARCHIVED:
                raise UserError(f"version: {name}@{version.number} is archived already")
            folder.keep_shared(old, version)
            digest = folder.pack(version)
            again = RETIRED if version.state == ACTIVE else version.state
            archived = dataclasses.replace(
                version, state=ARCHIVED, archive_sha256=digest, restored_as=again
            )
            folder.commit(old, _of_active(old.replaced(name, archived)), command)
        return archived

    def restore(self, name: str, number: int | None = None, command: str = "restore") -> Version:
        """Unpack an archived version; `activate` then makes it the active one."""
        with self._held() as folder:
            old = folder.read()
            if number is None:
                archived = [v for v in old.versions(name) if v.state == ARCHIVED]
                if not archived:
                    raise UserError(f"restore: {name} has no archived version")
                number = archived[-1].number
            version = old.version(name, number)
            if version.state != ARCHIVED:
                raise UserError(f"version: {name}@{number} is not archived")
            folder.unpack(version)
            restored = dataclasses.replace(
                version, state=version.restored_as, archive_sha256="", restored_as=""
            )
            folder.commit(old, old.replaced(name, restored), command)
        return restored

    def rename(self, name: str, to: str, command: str = "rename") -> None:
        """Give a task another name; its versions and classes stay as they are."""
        library.check_name(to)
        with self._held() as folder:
            old = folder.read()
            old.versions(name)
            if to in old.tasks:
                raise UserError(f"rename: there is a task {to!r} already")
            renamed = {to if task == name else task: found for task, found in old.tasks.items()}
            figures = {to if task == name else task: row for task, row in old.figures.items()}
            new = dataclasses.replace(old, tasks=renamed, figures=figures)
            folder.commit(old, new, command)

    def remove(self, name: str, number: int | None = None, command: str = "remove") -> None:
        """Remove a version, or a task with all its versions, for ever; the log keeps the record."""
        with self._held() as folder:
            old = folder.read()
            removed = old.versions(name) if number is None else (old.version(name, number),)
            ids = {version.id for version in removed}
            left = tuple(v for v in old.versions(name) if v.id not in ids)
            tasks = {task: left if task == name else found for task, found in old.tasks.items()}
            tasks = {task: found for task, found in tasks.items() if found}
            new = dataclasses.replace(old, tasks=tasks)
            if tasks:  # which go on with the shared part that they were learned with
                for version in removed:
                    folder.keep_shared(old, version)
            else:
                new = dataclasses.replace(new, shared_from=None)
            folder.commit(old, _of_active(new), command)

    def tidy_plan(
        self, unused_days: float | None = None, keep_versions: int | None = None
    ) -> list[tuple[str, Version, str]]:
        """Return the versions that a rule archives, with the task and why.

        Active versions that nothing has loaded for `unused_days`, and all but the newest
        `keep_versions` of a task.
        """
        reader = LibraryReader(self.root)
        found = []
        for name, versions in reader.read().tasks.items():
            there = [version for version in versions if version.state != ARCHIVED]
            for age, version in enumerate(reversed(there)):
                days = library.age_in_days(reader.last_used(version))
                if keep_versions is not None and age >= keep_versions and version.state != ACTIVE:
                    found.append((name, version, f"{age} newer versions"))
                elif unused_days is not None and days >= unused_days:
                    found.append((name, version, f"not used for {days:.0f} days"))
        return found

    def predictor(
        self,
        task_id: str | None = None,
        names: Sequence[str] | None = None,
        **options: Any,
    ) -> Predictor:
        """Return the predictor of the active tasks, or of those in `names`.

        `task_id` and the other options are `Predictor.load`'s.
        """
        return Predictor.load(self.root, names, task_id, **options)


_SHOWN = {GIVEN: "with the task given", PER_SAMPLE: "each image by itself"}
# A version is learned as a run of one task.
_ONE_TASK = {
    "scenario": "equal",
    "tasks": 1,
    "initial_classes": 0,
    "increment": 10,
    "scenario_file": "",
    "class_order_seed": -1,
    "freeze_g_prompt": False,
    "train_images_per_class": 0,
    "test_images_per_class": 0,
}
_OF_DATA = ("name", "dataset", "data_dir", *_ONE_TASK)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is to be learned: version `number` of task `name`, with `classes` in this order, whose
    images are in `parts`.
    """

    name: str
    number: int
    classes: tuple[str, ...]
    parts: tuple[Data, ...]
    start_from: Version | None


def _training_name(
    state: LibraryState, plan: _Plan, config: Config, dataset: sources.Dataset
) -> str:
    """Return the name of the folder that a plan is learned in, after all that it depends on.

    So what a command that was killed left there is gone on with by the same command alone.
    """
    begun = plan.start_from.id if plan.start_from else None
    of = [settings_lib.used_settings(config), dataset.fingerprint, begun, state.shared_from]
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    return f"{plan.name}@{plan.number}-{digest[:12]}"


def _planned(
    state: LibraryState, name: str, data: Data, extend: bool, start_from: str | None
) -> tuple[_Plan, sources.Dataset]:
    """Return what `learn` has to do, and the images.

    Raises UserError for classes that don't go together with those that are there, and Preempted
    after a signal.
    """
    versions = state.tasks.get(name, ())
    if extend and not versions:
        raise UserError(f"extend: there is no task {name!r} in this library yet")
    begin = _begin_of(state, start_from) if start_from is not None else None
    with stop_at_signals() as stop:
        try:
            dataset = data.load(stop)
            here: tuple[str, ...] = ()
            if versions:
                here = tuple(state.classes[class_] for class_ in versions[-1].classes)
            _check_classes(state, name, dataset.class_names, here, extend)
            newer = tuple(c for c in dataset.class_names if c not in here)
            parts = (dataclasses.replace(data, classes=(*here, *newer)),)
            if extend and len(newer) == len(dataset.class_names):
                older = [Data.from_json(part) for part in versions[-1].data]
                parts = (*older, dataclasses.replace(data, classes=newer))
                dataset = data_spec.joined(
                    functools.reduce(data_spec.joined, (part.load(stop) for part in older)),
                    dataset,
                )
        except Stopped:
            raise Preempted("Stopped while reading images") from None
    dataset = data_spec.subset(dataset, (*here, *newer))
    number = versions[-1].number + 1 if versions else 1
    return _Plan(name, number, dataset.class_names, parts, begin), dataset


def _begin_of(state: LibraryState, start_from: str) -> Version:
    version = state.version(*library.split_name(start_from))
    if version.state == ARCHIVED:
        raise UserError(f"start_from: {start_from} is archived; restore it first")
    return version


def _check_classes(
    state: LibraryState, name: str, given: Sequence[str], here: Sequence[str], extend: bool
) -> None:
    """Raise UserError where the classes `given` don't suit task `name`, which has `here`."""
    for class_ in given:
        known = class_ in state.classes
        owner = state.task_of_class(state.classes.index(class_)) if known else None
        if owner not in (None, name):
            raise UserError(
                f"classes: {class_!r} is in task {owner!r} already; leave it out, or learn a new "
                f"version of {owner!r} with --extend"
            )
    both = set(given) & set(here)
    if extend:
        if both == set(given):
            raise UserError(f"extend: {name} has all of these classes already")
        if both and both != set(here):
            raise UserError(
                f"extend: of the older classes of {name}, the data has only some "
                f"({', '.join(sorted(both))}); give all of them, or none"
            )
    elif here and set(given) != set(here):
        odd = sorted(set(given) ^ set(here))[0]
        raise UserError(
            f"classes: a new version of {name} has the same classes, and {odd!r} is in one of the "
            "two only; take another task name, or --extend"
        )


def _start(folder: LibraryFolder, state: LibraryState, plan: _Plan) -> Start:
    """Return what the training of a plan begins with."""
    config = _config_of(state)
    whole = distributed.replicated(distributed.data_mesh(jax.devices()[:1]))
    backbone = _load_backbone(config)
    method = registry.make_method(config, backbone.architecture, ("",))
    shared, adapter = assembly.load_shared(folder, state, method, backbone.params), {}
    if plan.start_from:
        version = plan.start_from
        manifest = folder.load_manifest(folder.path(version))
        names = [""] * len(version.classes)
        method = registry.make_method(config, backbone.architecture, names, len(names))
        template = method.packed_shapes(backbone.params)
        template = {k: like for k, like in template.items() if k not in ("key", "context")}
        items = checkpoint.load_items(
            folder.path(version), manifest.sha256, {"adapter": template}, whole, part=True
        )
        adapter = jax.device_get(method.unpack(items["adapter"], backbone.params))
    # Not the version's id: another may be taken in before a killed command is given again.
    number = zlib.crc32(f"{plan.name}@{plan.number}".encode())
    return Start(alone=True, number=number, adapter=adapter, shared=shared)


def _with_version(
    state: LibraryState, plan: _Plan, version: Version
) -> tuple[LibraryState, Version]:
    """Return the state with a version more, as a candidate, and the version in its place."""
    classes = list(state.classes)
    classes += [name for name in plan.classes if name not in classes]
    numbers = tuple(classes.index(name) for name in plan.classes)
    version = dataclasses.replace(version, classes=numbers)
    shared_from = version.id if state.shared_from is None else state.shared_from
    state = dataclasses.replace(
        state, classes=tuple(classes), next_id=state.next_id + 1, shared_from=shared_from
    )
    return state.replaced(plan.name, version), version


def _activated(state: LibraryState, name: str, version: Version) -> LibraryState:
    """Return the state with `version` as the active one of its task."""
    changed = [dataclasses.replace(version, state=ACTIVE)]
    if (before := state.active.get(name)) and before.id != version.id:
        changed.append(dataclasses.replace(before, state=RETIRED))
    return state.replaced(name, *changed)


def _decided(
    state: LibraryState, name: str, version: Version, verdict: Verdict
) -> tuple[LibraryState, Version]:
    """Return the state after the gate, and the version, active or a candidate."""
    found = {
        "fallen": list(verdict.fallen),
        "unchecked": dict(verdict.unchecked),
        "figures": {task: dict(row) for task, row in verdict.figures.items()},
    }
    learned = dict(verdict.figures.get(name, {}))
    version = dataclasses.replace(version, gate=found, learned=learned)
    if verdict.fallen:
        return state.replaced(name, version), version
    state = _activated(state.replaced(name, version), name, version)
    return _with_figures(state, name, verdict), state.version(name, version.number)


def _with_figures(state: LibraryState, name: str, verdict: Verdict) -> LibraryState:
    """Return the state with the figures of a verdict that made a version of `name` active.

    Those of tasks that could not be evaluated stay, but for those of `name`'s version before.
    """
    kept = {task: row for task, row in state.figures.items() if task != name}
    return _of_active(dataclasses.replace(state, figures={**kept, **verdict.figures}))


def _of_active(state: LibraryState) -> LibraryState:
    """Return the state without the figures of tasks that are not active."""
    figures = {task: row for task, row in state.figures.items() if task in state.active}
    return dataclasses.replace(state, figures=figures)


def _verdict_note(verdict: Verdict) -> str:
    parts = [*verdict.fallen, *(f"{k}: not checked, {v}" for k, v in verdict.unchecked.items())]
    return "; ".join(parts)


def _config_of(state: LibraryState) -> Config:
    return from_settings(state.config)


@functools.lru_cache(maxsize=1)
def _load_backbone(config: Config) -> backbones.Backbone:
    return backbones.load(config.backbone, config.backbone_path, config.image_size, config.dtype)


def _check_method(config: Config) -> None:
    """Raise UserError for a method whose tasks can't be learned apart."""
    parts = registry.parse(config.method)
    if parts.strategy or parts.whole_network or parts.host.pools or not parts.by_task:
        raise UserError(
            f"method: {config.method!r} has arrays that every task trains, so its tasks can't be "
            "learned one by one and stay as they are; take softtf, lora, adapter, wsn or softnet, "
            "with dualprompt or clipprompt or alone"
        )
    if parts.host.reads_text and not parts.host.per_task:
        raise UserError(
            f"method: {config.method!r} has one image prompt for all tasks; take clipprompt"
        )


def _check_same(ours: Config, given: Config) -> None:
    """Raise UserError where a library's settings are not those that are given."""
    there, now = (
        {k: v for k, v in settings_lib.used_settings(c).items() if k not in _OF_DATA}
        for c in (ours, given)
    )
    odd = [key for key in sorted(there.keys() | now.keys()) if there.get(key) != now.get(key)]
    if odd:
        lines = "; ".join(f"{key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in odd)
        raise UserError(f"library: it has other settings ({lines}); leave --config out")


def _checked_backbone(state: LibraryState) -> backbones.Backbone:
    """Load a library's backbone. Raises UserError where the file that is found is another."""
    backbone = _load_backbone(_config_of(state))
    if backbone.fingerprint != state.backbone_sha256:
        raise UserError(
            f"backbone: the file found has SHA-256 {backbone.fingerprint}, this library's has "
            f"{state.backbone_sha256}; put the library's own in its place"
        )
    return backbone


def _predictor(
    reader: LibraryReader, state: LibraryState, versions: Mapping[str, Version]
) -> Predictor:
    config = _config_of(state)
    backbone = _load_backbone(config)
    method = assembly.method_of(config, backbone, state, versions)
    rule, because = assembly.choose(method, config, None)
    batching = engine.Batching(distributed.data_mesh(), config.eval_batch_size)
    cache = config.weights_cache_mb * 2**20
    model = assembly.assemble(reader, state, versions, config, backbone, rule, cache, batching)
    return Predictor(
        model, rule, state.classes, batching, None, because, task_names=tuple(versions)
    )


def _hash_of(dataset: sources.Dataset) -> str:
    return "-".join(part[:16] for part in dataset.test.fingerprint)


def _images(version: Version) -> sources.Dataset:
    """Return the images that a version was learned with."""
    parts = (Data.from_json(part).load() for part in version.data)
    return functools.reduce(data_spec.joined, parts)


def _kept_transfer(reader: LibraryReader) -> dict[str, dict[str, float]]:
    """Return what is kept of transfer: by version, the frozen probe and each version's gain."""
    try:
        kept = json.loads((reader.root / TRANSFER_FILE).read_bytes())
    except (OSError, ValueError):  # none, or damaged: it is measured again
        return {}
    return kept if isinstance(kept, dict) else {}


def _tests(
    reader: LibraryReader,
    state: LibraryState,
    version: Version,
    predictor: Predictor,
    whole: dict[Data, tuple[sources.Dataset, str]],
) -> tuple[np.ndarray, np.ndarray]:
    """Return a version's test images at the model's size, and the library's numbers of their
    classes. `whole` holds the data set that was read last, and its hash.

    Raises UserError where they can't be had, or are others than it was learned with.
    """
    places = np.asarray(version.classes)
    if "kept_sha256" in version.test:
        images, labels = reader.load_tests(version)
        return images, places[labels]
    names = [state.classes[class_] for class_ in version.classes]
    parts = [Data.from_json(part) for part in version.data]
    where = " and ".join(part.where for part in parts)
    found = []
    for part in parts:
        key = dataclasses.replace(part, classes=())
        if key not in whole:
            whole.clear()
            loaded = part.whole()
            whole[key] = (loaded, loaded.fingerprint)
        found.append(part.of(whole[key][0]))
    dataset = data_spec.subset(functools.reduce(data_spec.joined, found), names)
    of_run = "dataset_sha256" in version.test  # and so of all its images
    theirs = version.test["dataset_sha256" if of_run else "sha256"]
    if theirs != (whole[key][1] if of_run else _hash_of(dataset)):
        raise UserError(f"its test images in {where} are others than it was learned with")
    size = predictor.model.method.architecture.image_size
    count = len(dataset.test.labels)
    return dataset.test.prepared(np.arange(count), size), places[dataset.test.labels]


def _accuracies(
    predictor: Predictor, images: np.ndarray, labels: np.ndarray, place: int
) -> dict[str, float]:
    """Return the share of right answers with the task given and each image by itself, percent."""
    chunk, right = predictor.batching.chunk, {GIVEN: 0, PER_SAMPLE: 0}
    for first in range(0, len(images), chunk):
        part, truth = images[first : first + chunk], labels[first : first + chunk]
        given = predictor.predict_prepared(part, np.full(len(part), place))
        alone = predictor.predict_prepared(part)
        right[GIVEN] += int((given.classes == truth).sum())
        right[PER_SAMPLE] += int((alone.classes == truth).sum())
    return {name: 100 * count / len(images) for name, count in right.items()}
