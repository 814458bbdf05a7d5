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
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console

from soft_jax import paths
from soft_jax.config import Config
from soft_jax.data import sources
from soft_jax.errors import UserError
from soft_jax.experiment import cost, data_spec, imported, loop, merged, moved, transfer
from soft_jax.experiment import gate as gate_lib
from soft_jax.experiment import library_planning as planning
from soft_jax.experiment import settings as settings_lib
from soft_jax.experiment.cost import Cost
from soft_jax.experiment.data_spec import Data
from soft_jax.experiment.gate import GIVEN, MAX_DROP, Gate, Verdict
from soft_jax.experiment.run import Start
from soft_jax.hooks import Hooks
from soft_jax.inference import assembly
from soft_jax.inference import predictor as predictor_lib
from soft_jax.inference.predictor import Predictor
from soft_jax.models import backbones
from soft_jax.store import files, formats, library
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

BEST = "best"  # in the place of a task to start from
TRANSFER_FILE = "transfer.json"
Column = Mapping[str, float]  # of one version: "frozen", and by id what other versions give to it
RUN_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class Forward:
    """Forward transfer: what the networks of earlier tasks give to a later one's images.

    `frozen` is the accuracy of a probe on the frozen features, in percent; `best` is the name of
    the task whose features are better by most, `gain` by how many points, and `mean` of all.
    """

    frozen: float
    best: str
    gain: float
    mean: float


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
        reader = LibraryReader(self.root)
        return reader.log(reader.read())

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
            old, backbone = self._state_or_new(folder, config)
            named = None if start_from == BEST else start_from
            plan, dataset = planning.planned(old, name, data, extend, named)
            measured = None
            if start_from == BEST:
                measured = self._gains(folder, old, backbone, dataset)
                plan = dataclasses.replace(plan, start_from=old.active[measured[1].best])
            begin = planning.start(folder, old, backbone, plan)
            trained = self._train(old, plan, begin, dataset, hooks)
            options = (gate or Gate(), keep_test_images, command, measured)
            return self._take_in(folder, old, backbone, plan, dataset, *trained, *options)

    def import_lora(
        self,
        name: str,
        adapter: str | PathLike,
        data: Data,
        *,
        config: Config | None = None,
        gate: Gate | None = None,
        keep_test_images: bool = False,
        command: str = "import-lora",
    ) -> tuple[Version, Verdict]:
        """Take in a LoRA that PEFT saved as a task, or as a new version of it.

        Its products are taken as they are, and its classifier, whose rows are the classes of `data`
        in their order; one that it lacks is fitted (`experiment.imported`). The task's key, and the
        statistics by which images find it, are made of the training images.

        Args:
            name: the task's.
            adapter: the folder with `adapter_config.json` and `adapter_model.safetensors`.
            data: its images.
            config: as for `learn`, of the method "lora".
            gate: what the version has to hold to become the active one.
            keep_test_images: whether its test images are kept in the library.
            command: how the log calls it.

        Returns:
            The version, active or a candidate, and what the gate found.

        Raises:
            UserError: for anything that the user has to mend, such as an adapter of another rank,
                shape, module or base model; nothing is changed then.
        """
        library.check_name(name)
        adapter = paths.local(adapter, "ADAPTER")
        with self._held(make=config is not None) as folder:
            old, backbone = self._state_or_new(folder, config)
            imported.check_method(planning.config_of(old))
            origin = imported.origin_of(adapter)
            plan, dataset = planning.planned(old, name, data, False, None)
            plan = dataclasses.replace(plan, origin=origin)
            begin = planning.start_imported(old, backbone, plan, adapter)
            trained = self._train(old, plan, begin, dataset, None)
            options = (gate or Gate(), keep_test_images, command)
            return self._take_in(folder, old, backbone, plan, dataset, *trained, *options)

    def merge(
        self,
        tasks: Sequence[str],
        into: str,
        method: str = "mean",
        *,
        weights: Sequence[float] | None = None,
        density: float | None = None,
        gate: Gate | None = None,
        command: str = "merge",
    ) -> tuple[Version, Verdict]:
        """Make one task of several: one mask for all their classes, which takes their place.

        Masks are merged as they are (`methods.merging`). Classifier, key and statistics are made of
        the tasks' training images, which are read again (`experiment.imported`): columns that were
        trained apart can't be compared. When the new version becomes the active one, theirs are
        retired in the same write; `rollback` of the new task brings them back. The gate takes the
        mean of their figures, by their test images, for what the new task was before.

        Args:
            tasks: two or more, or versions such as "birds@2"; they stay as they are.
            into: the new task's name, or that of one that these were merged into before.
            method: "mean", "ties" or "dare".
            weights: how much each task counts, above 0; None: all the same.
            density: the share of entries that TIES or DARE keeps, in (0, 1]; None: 0.2 for TIES,
                0.1 for DARE.
            gate: what the version has to hold to become the active one.
            command: how the log calls it.

        Returns:
            The version, active or a candidate, and what the gate found.

        Raises:
            UserError: for anything that the user has to mend, such as an archived or damaged
                version, or a library whose tasks are not masks alone; nothing is changed then.
            Preempted: after SIGTERM or SIGINT; the same call continues.
        """
        library.check_name(into)
        with self._held() as folder:
            old = folder.read()
            merge = merged.planned(old, tasks, into, method, weights, density)
            plan, dataset = merged.images(old, merge)
            backbone = _backbone(old)
            begin = merged.start(folder, old, backbone, merge, plan)
            trained = self._train(old, plan, begin, dataset, None)
            options = (gate or Gate(), merge.keeps_tests, command)
            return self._take_in(folder, old, backbone, plan, dataset, *trained, *options)

    def _take_in(
        self,
        folder: LibraryFolder,
        old: LibraryState,
        backbone: backbones.Backbone,
        plan: planning.Plan,
        dataset: sources.Dataset,
        version: Version,
        finished: Path,
        gate: Gate,
        keep_test_images: bool,
        command: str,
        measured: tuple[Column, Forward] | None = None,
    ) -> tuple[Version, Verdict]:
        """Take in a version that is finished, through the gate.

        `measured` is what other tasks' networks give to its images, where that was looked at.
        """
        name = plan.name
        new, version = planning.with_version(old, plan, version)
        folder.take_in(finished, version)
        if keep_test_images:
            version = self._keep_tests(folder, backbone, dataset, version)
            new = new.replaced(name, version)
        tried = new.activated(name, version)
        verdict = self._judge(folder, old, tried, backbone, name, gate)
        found = gate_lib.record_of(old.figures, tried, verdict, name)
        new, version = _decided(new, name, version, verdict)
        before = old if old.changes or old.tasks else None
        if measured:
            best = old.active[measured[1].best].id
            found["forward"] = dataclasses.asdict(measured[1]) | {"best": best}
        folder.commit(before, new, command, gate_lib.note_of(verdict), found)
        if measured:
            self._keep_transfer({**kept_transfer(folder), str(version.id): measured[0]})
        return version, verdict

    @contextlib.contextmanager
    def _held(self, make: bool = False) -> Iterator[LibraryFolder]:
        with contextlib.closing(LibraryFolder(self.root, make)) as folder:
            yield folder

    def _state_or_new(
        self, folder: LibraryFolder, config: Config | None
    ) -> tuple[LibraryState, backbones.Backbone]:
        if config is None or library.holds_library(self.root) or (self.root / RUN_FILE).exists():
            state = folder.read()
            ours = planning.config_of(state)
            planning.check_method(ours)
            if config is not None:
                planning.check_same(ours, config)
            return state, _backbone(state)
        folder.check_new()
        settings_lib.check(config)
        planning.check_method(config)
        config = settings_lib.to_keep(config)
        loaded = assembly.load_backbone(config)
        sha256 = loaded.fingerprint
        return LibraryState(config=dataclasses.asdict(config), backbone_sha256=sha256), loaded

    def _train(
        self,
        state: LibraryState,
        plan: planning.Plan,
        begin: Start,
        dataset: sources.Dataset,
        hooks: Hooks | None,
    ) -> tuple[Version, Path]:
        """Train what is planned; return it as a version without a place, and its folder."""
        named = {"dataset": plan.parts[-1].dataset, "data_dir": plan.parts[-1].data_dir}
        config = dataclasses.replace(planning.config_of(state), **named, **planning.ONE_TASK)
        workdir = self.root / "learning" / planning.training_name(state, plan, config, dataset)
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
            test={"images": len(test.labels), "sha256": gate_lib.hash_of(dataset)},
            seconds=float(manifests[0].seconds["train"]),
            bytes=files.of(finished).size(finished),
            origin=plan.origin,
            manifest_sha256=library.hash_of_manifest(finished),
        )
        return version, finished

    def _keep_tests(
        self,
        folder: LibraryFolder,
        backbone: backbones.Backbone,
        dataset: sources.Dataset,
        version: Version,
    ) -> Version:
        size = backbone.architecture.image_size
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

        def evaluated(state: LibraryState) -> tuple[LibraryState, Verdict]:
            return state, gate_lib.evaluate(
                reader, state, _backbone(state), state.figures, Gate(max_drop)
            )

        while True:
            state, verdict = predictor_lib.read_whole(reader, evaluated)
            # What another command took away meanwhile is not damaged.
            if verdict.passed or reader.read() == state:
                return verdict

    def _judge(
        self,
        folder: LibraryFolder,
        old: LibraryState,
        tried: LibraryState,
        backbone: backbones.Backbone,
        name: str,
        gate: Gate,
    ) -> Verdict:
        """Evaluate the library as it would be, `tried`, with another version of task `name`.

        A task that takes the place of others has to hold what they have on average.
        """
        before = {**gate_lib.of_replaced(old, name, tried.active[name]), **old.figures}
        verdict = gate_lib.evaluate(folder, tried, backbone, before, gate, name, old)
        if name in verdict.figures:
            own = verdict.figures[name][GIVEN]
            low = f"{own:.2f}% with the task given" if own < gate.min_accuracy else ""
        else:
            low = "it could not be evaluated, which" if gate.min_accuracy else ""
        if low:
            low = f"{name}: {low} is below {gate.min_accuracy:g}%"
            verdict = dataclasses.replace(verdict, fallen=(*verdict.fallen, low))
        return verdict

    # Transfer.

    def _gains(
        self,
        folder: LibraryReader,
        state: LibraryState,
        backbone: backbones.Backbone,
        dataset: sources.Dataset,
    ) -> tuple[Column, Forward]:
        """Return what the active tasks' networks give to the images of a data set."""
        if not state.active:
            raise UserError("start_from: there is no active task yet to begin with")
        predictor = predictor_lib.of_versions(folder, state, state.active, backbone)
        frozen, gains = transfer.gains(predictor, dataset)
        forward = _forward(frozen, gains)
        self.console.print(
            f"Begins with {forward.best}: its features name {frozen + forward.gain:.1f}% of the "
            f"new images held out of training, the frozen ones {frozen:.1f}%",
            highlight=False,
        )
        by_id = {str(state.active[task].id): gain for task, gain in gains.items()}
        return {"frozen": frozen, **by_id}, forward

    def _keep_transfer(self, kept: Mapping[str, Column]) -> None:
        with contextlib.suppress(UserError):  # a library that can only be read
            text = json.dumps(formats.stamped("transfer", kept), indent=1, sort_keys=True)
            files.write_text(self.root / TRANSFER_FILE, f"{text}\n")

    def forward(self, name: str, version: Version) -> Forward | None:
        """Return what tasks that were learned before a version of task `name` give to its images.

        None where `transfer` has not measured it, or there was no other task.
        """
        column = kept_transfer(LibraryReader(self.root)).get(str(version.id), {})
        gains = {
            other: column[str(earlier.id)]
            for other, versions in self.state().tasks.items()
            for earlier in versions
            if other != name and earlier.id < version.id and str(earlier.id) in column
        }
        return _forward(column["frozen"], gains) if gains else None

    def transfer(self) -> dict[str, dict[str, float]]:
        """Return what each active task's network gives to each active task, `transfer.gains`.

        `[i][j]` is of task i's network on the images of task j, in points; `["frozen"][j]` is the
        accuracy of the frozen network's probe, in percent. Pairs that were measured before are kept
        in the library, so that a task more costs one row and one column; each column is kept when
        it is done. Pairs are missing that can't be measured: where a task's version is damaged, or
        its images can't be had; the console says why.
        """
        reader = LibraryReader(self.root)
        state = reader.read()
        kept, backbone, params = kept_transfer(reader), _backbone(state), None
        versions = state.active
        if not versions:
            raise UserError(f"library: {self.root} has no active task")
        # Reading all of them takes as long as measuring: not for what is kept already.
        sound = functools.cache(
            lambda: assembly.sound(reader, state, planning.config_of(state), backbone)
        )
        left_out: dict[str, str] = {}
        table: dict[str, dict[str, float]] = {name: {} for name in ("frozen", *versions)}
        for name, version in versions.items():
            column = dict(kept.get(str(version.id), {}))
            if {str(v.id) for v in versions.values()} - column.keys():
                able, damaged = sound()
                left_out |= damaged
                missing = {n: v for n, v in able.items() if str(v.id) not in column}
                try:
                    images = _images(version) if missing else None
                except UserError as error:
                    left_out[name], missing = str(error), {}
                if missing:
                    predictor = predictor_lib.of_versions(
                        reader, state, missing, backbone, params=params
                    )
                    params = predictor.model.backbone
                    frozen, gains = transfer.gains(predictor, images)
                    column["frozen"] = frozen
                    column |= {str(versions[task].id): gain for task, gain in gains.items()}
                    kept[str(version.id)] = column
                    self._keep_transfer(kept)
            known = {"frozen": "frozen", **{task: str(v.id) for task, v in versions.items()}}
            for row, key in known.items():
                if key in column:
                    table[row][name] = column[key]
        for name, why in left_out.items():
            self.console.print(f"not measured: {name}: {why}", highlight=False, markup=False)
        return table

    def cost(self) -> Cost:
        """Measure what the active tasks and the rules that identify them cost, `cost.measure`.

        Raises UserError where there is no active task, or all are damaged.
        """
        reader = LibraryReader(self.root)
        state = reader.read()
        if not state.active:
            raise UserError(f"library: {self.root} has no active task")
        return cost.measure(reader, state, _backbone(state))

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
            tried = old.activated(name, version)
            verdict = self._judge(folder, old, tried, _backbone(old), name, gate or Gate())
            if not verdict.fallen:
                found = gate_lib.record_of(old.figures, tried, verdict, name)
                new = _with_figures(tried, name, verdict)
                folder.commit(old, new, command, gate_lib.note_of(verdict), found)
        return verdict

    def rollback(self, name: str, command: str = "rollback") -> tuple[Version, Verdict]:
        """Make the version before the active one the active one again.

        Where a merge made the active one, and there is none before, those come back in whose place
        it is; the first of them is returned. They were accepted once, so the gate is asked, and not
        obeyed. Raises UserError where there is none before, or it is damaged.
        """
        with self._held() as folder:
            old = folder.read()
            versions = old.versions(name)
            active = old.active.get(name)
            upto = active.number if active else versions[-1].number + 1
            earlier = [(name, v) for v in versions if v.number < upto and v.state == RETIRED]
            if active and not earlier:
                earlier = old.replaced_by(active)[::-1]
            if not earlier:
                before = f" before {name}@{upto}" if active else ""
                raise UserError(
                    f"rollback: {name} has no version{before} that was active and is not archived"
                    f"; {self._instead(name, versions)}"
                )
            name, version = earlier[-1]
            tried, backbone = old.activated(name, version), _backbone(old)
            any_drop = Gate(100.0)
            verdict = gate_lib.evaluate(folder, tried, backbone, old.figures, any_drop, name, old)
            found = gate_lib.record_of(old.figures, tried, verdict, name)
            new = _with_figures(tried, name, verdict)
            folder.commit(old, new, command, gate_lib.note_of(verdict), found)
        return new.active[name], verdict

    def _instead(self, name: str, versions: Sequence[Version]) -> str:
        """Return what can be done where there is no version to go back to."""
        for state, command, why in (
            (RETIRED, "activate", "makes that one the active one"),
            (CANDIDATE, "activate", "makes the candidate the active one"),
            (ARCHIVED, "restore", "unpacks one that is archived"),
        ):
            if found := [version for version in versions if version.state == state]:
                return f"soft-jax {command} {self.root} {name}@{found[-1].number} {why}"
        return "there is no other; soft-jax learn makes one"

    def archive(self, name: str, number: int | None = None, command: str = "archive") -> Version:
        """Pack a version small; it is loaded no more, and `restore` brings it back to the bit.

        Raises UserError where it is damaged: nobody would look at it any more.
        """
        with self._held() as folder:
            old = folder.read()
            version = old.version(name, number)
            if version.state == ARCHIVED:
                raise UserError(f"version: {name}@{version.number} is archived already")
            assembly.check_files(folder, old, name, version)
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
        """Give a task another name; its versions and classes stay as they are.

        Raises UserError where the name is or was another task's, so that no two versions in the log
        are called the same.
        """
        library.check_name(to)
        with self._held() as folder:
            old = folder.read()
            old.versions(name)
            if to in old.tasks:
                raise UserError(f"rename: there is a task {to!r} already")
            owner = old.owners[name]
            if old.owners.get(to, owner) != owner:
                raise UserError(
                    f"rename: another task was called {to!r}, whose versions the log has as {to}@1 "
                    "and on; take another name"
                )
            renamed = {to if task == name else task: found for task, found in old.tasks.items()}
            figures = {to if task == name else task: row for task, row in old.figures.items()}
            highest = max(old.numbers.get(to, 0), old.numbers[name])
            numbers = {**old.numbers, to: highest}  # neither name gets one again
            owners = {**old.owners, to: owner}
            new = dataclasses.replace(
                old, tasks=renamed, figures=figures, numbers=numbers, owners=owners
            )
            folder.commit(old, new, command)

    def move_data(
        self,
        old: str | PathLike,
        new: str | PathLike,
        task: str | None = None,
        command: str = "move-data",
    ) -> list[str]:
        """Say that images are in the folder `new` now that were in `old`, of all versions.

        Args:
            old: the folder where they were, or the name of a data set that had no folder given.
            new: the folder where they are.
            task: the only task whose images were moved, or the only version, such as "birds@2";
                None: those of all.
            command: how the log calls it.

        Returns:
            The versions, as "birds@2".

        Raises:
            UserError: no version has images in `old`, or the test images in `new` are others than
                one was learned with, by their hashes; nothing is changed then.
        """
        folder_now, old = paths.local(new, "TO"), os.fspath(old)
        if old.startswith("~"):  # a data set's name stays as it is
            old = str(paths.local(old, "FROM"))
        with self._held() as folder:
            state = folder.read()
            after, names = moved.moved(state, old, folder_now, task)
            folder.commit(state, after, command, ", ".join(names))
        return names

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

        That is any version, also an active one, that was not asked for and has not answered for
        `unused_days`; and of a task all but its newest `keep_versions`, its active one excepted.
        None leaves a rule out.
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


def _decided(
    state: LibraryState, name: str, version: Version, verdict: Verdict
) -> tuple[LibraryState, Version]:
    """Return the state after the gate, and the version, active or a candidate."""
    found = {"fallen": list(verdict.fallen), "unchecked": dict(verdict.unchecked)}
    learned = dict(verdict.figures.get(name, {}))
    version = dataclasses.replace(version, gate=found, learned=learned)
    if verdict.fallen:
        return state.replaced(name, version), version
    state = state.replaced(name, version).activated(name, version)
    return _with_figures(state, name, verdict), state.version(name, version.number)


def _with_figures(state: LibraryState, name: str, verdict: Verdict) -> LibraryState:
    """Return the state with the figures of a verdict that made a version of `name` active.

    Those of tasks that could not be evaluated stay, but for those of `name`'s version before.
    """
    kept = {task: row for task, row in state.figures.items() if task != name}
    figures, confusion = {**kept, **verdict.figures}, {**state.confusion, **verdict.confusion}
    return _of_active(dataclasses.replace(state, figures=figures, confusion=confusion))


def _of_active(state: LibraryState) -> LibraryState:
    """Return the state without the figures of tasks that are not active."""
    figures = {task: row for task, row in state.figures.items() if task in state.active}
    active = {version.id for version in state.active.values()}
    confusion = {
        one: row for one, row in state.confusion.items() if one in active and active >= row.keys()
    }
    return dataclasses.replace(state, figures=figures, confusion=confusion)


def _images(version: Version) -> sources.Dataset:
    """Return the images that a version was learned with."""
    parts = (Data.from_json(part).load() for part in version.data)
    return functools.reduce(data_spec.joined, parts)


def _forward(frozen: float, gains: Mapping[str, float]) -> Forward:
    best = max(gains, key=lambda task: gains[task])
    return Forward(frozen, best, gains[best], float(np.mean(list(gains.values()))))


def kept_transfer(reader: LibraryReader) -> dict[str, Column]:
    """Return what is kept of transfer: by version, the frozen probe and each version's gain.

    What is damaged is left out: it is measured again.
    """
    file = reader.root / TRANSFER_FILE
    try:
        kept = formats.upgrade("transfer", json.loads(paths.read_bytes(file)), file)
    except (OSError, ValueError, RecursionError, UserError):  # none, or not as it was written
        return {}
    return {version: column for version, column in kept.items() if _is_column(column)}


def _is_column(column: Any) -> bool:
    return (
        isinstance(column, dict)
        and "frozen" in column
        and all(type(value) in (int, float) for value in column.values())
    )


def _backbone(state: LibraryState) -> backbones.Backbone:
    """Load a library's backbone. Raises UserError where the file that is found is another."""
    return assembly.load_backbone(planning.config_of(state), state.backbone_sha256)
