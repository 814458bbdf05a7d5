"""The folder of a run: its config, one checkpoint per finished task, and the state of the task in
training.

    WORKDIR/config.json             what the run is (`records.RunRecord`); another run is refused
    WORKDIR/tasks/000/              a task: adapter, shared part, statistics, memory and manifest,
                                    written whole or not at all
    WORKDIR/training/000-000500/    task 0 after its 500th step, until the task is finished
    WORKDIR/damaged/                training states that could not be used

In a bucket, objects of these names; `store.files` says what differs.

`config.json` is written once, when the run begins, and stays as it is: a run of an older format
keeps its file, and every task of it is held against the record that the migrations make of that.
"""

import json
import os
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Sharding

from soft_jax import distributed, paths
from soft_jax.errors import UserError
from soft_jax.paths import Place
from soft_jax.store import checkpoint, files, formats, records
from soft_jax.store.records import RunRecord, TaskManifest, TrainingManifest

# As `task_path` writes them, so that no two names are the same task.
_TASK_NAME = re.compile(r"[0-9]{3}|[1-9][0-9]{3,}")
_STATE_NAME = re.compile(r"([0-9]{3}|[1-9][0-9]{3,})-([0-9]{6}|[1-9][0-9]{6,})")
# What is written in a workdir; where one of them is a link, the writing would happen elsewhere.
_OURS = ("config.json", ".config.json.partial", ".lock", "tasks", "training", "damaged")


class Reader:
    """The folder of one run, to read from: finished tasks are whole, also while another process
    trains more.
    """

    def __init__(self, workdir: str | os.PathLike):
        self.root = paths.place(workdir, "workdir")
        self._files = files.of(self.root)
        self.tasks, self.training = self.root / "tasks", self.root / "training"
        self.record: RunRecord | None = None  # what the run is, once it has been read or claimed
        self._format = 0  # of config.json

    @property
    def _config(self) -> Place:
        return self.root / "config.json"

    def read_record(self) -> RunRecord:
        """Return what makes the run this one (`config.json`); every task is held against it.

        Raises UserError where there is no run, its file is damaged or changed by hand, or of a
        newer format.
        """
        self.record, self._format = self._read_config()
        return self.record

    def _read_config(self) -> tuple[RunRecord, int]:
        config = self._config
        for name in _OURS:
            files.refuse_link(self.root / name)
        try:
            data = json.loads(self._files.read_own(config))
        except OSError as error:
            raise UserError(
                f"workdir: {self.root} holds no run ({config.name} can't be read: {error.strerror})"
            ) from error
        except (ValueError, RecursionError) as error:  # the latter where it is nested too deeply
            raise UserError(
                f"workdir: {config} is damaged ({error}); restore it, or take another workdir"
            ) from error
        where = f"workdir: {config}"
        record = RunRecord.from_json(formats.upgrade("run", data, where), where)
        return record, formats.number(data)

    def compare_settings(self, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        """Raise UserError when the folder's run has other settings than `settings`.

        The error has a line for each that differs, by the rule of `records.differences`.
        """
        there = self.read_record()
        self._refuse(
            records.differences(there, settings, defaults, ignore_unused=self._format == 0)
        )

    def compare(self, record: RunRecord, defaults: Mapping[str, Any]) -> None:
        """Raise UserError as `compare_settings`, also for other hashes or classes of the tasks."""
        there = self.read_record()
        self._refuse(
            records.differences(there, record.settings, defaults, ignore_unused=self._format == 0)
            + records.origin_differences(there, record)
        )

    def _refuse(self, lines: list[str]) -> None:
        if lines:
            raise UserError(
                f"workdir: {self.root} holds a run of another config; take another workdir, or its "
                "settings:\n" + "\n".join(f"  {line}" for line in lines)
            )

    def task_path(self, task: int) -> Place:
        """Return where task `task` (from 0) is kept."""
        return self.tasks / f"{task:03d}"

    def present(self) -> list[int]:
        """Return the tasks that are there, in order."""
        names = self._files.checkpoints(self.tasks) if self._files.is_dir(self.tasks) else []
        return sorted(int(name) for name in names if _TASK_NAME.fullmatch(name))

    def finished(self) -> int:
        """Return how many tasks are finished. Raises UserError where one is missing among them."""
        there = self.present()
        self.check_complete(there)
        return len(there)

    def check_complete(self, there: Sequence[int]) -> None:
        """Raise UserError where `there`, what `present` gave, leaves a task out."""
        if list(there) != list(range(len(there))):
            # Not by listing all numbers up to the last: a folder may be called anything.
            missing = next(place for place, task in enumerate(there) if task != place)
            raise UserError(
                f"{self.task_path(missing)} is missing, later tasks are there; {checkpoint.ADVICE}"
            )

    def load_task(
        self, task: int, templates: Mapping[str, Any], sharding: Sharding, part: bool = False
    ) -> tuple[dict[str, Any], TaskManifest]:
        """Return items of a finished task, like `templates`, and its manifest.

        Items are "adapter", "shared", "statistics" and "memory", verified as by
        `checkpoint.load_items`. Raises UserError when an array is damaged, or the task is missing,
        another one, or of another run.
        """
        manifest = self.load_task_manifest(task)
        return self.load_items(manifest, templates, sharding, part), manifest

    def load_items(
        self,
        manifest: TaskManifest,
        templates: Mapping[str, Any],
        sharding: Sharding,
        part: bool = False,
    ) -> dict[str, Any]:
        """Return items of the task of `manifest`, as `load_task`, which reads the manifest too."""
        path = self.task_path(manifest.task)
        return checkpoint.load_items(path, manifest.sha256, templates, sharding, part)

    def load_task_manifest(self, task: int) -> TaskManifest:
        """Return a finished task's manifest alone. Raises UserError as `load_task`."""
        path = self.task_path(task)
        if not path.is_dir():
            raise UserError(f"{path} is missing; {checkpoint.ADVICE}")
        data = formats.upgrade("task", checkpoint.load_manifest(path), path)
        manifest = TaskManifest.from_json(data, path)
        self._check_origin(path, task, manifest)
        return manifest

    def _check_origin(self, path: Place, task: int, manifest: TaskManifest) -> None:
        expected = self.record or self.read_record()
        lines = records.differences(manifest.run, expected.settings, {})
        lines += records.origin_differences(manifest.run, expected)
        if manifest.task != task:
            lines.insert(0, f"task: {manifest.task} there, {task} now")
        if lines:
            raise UserError(
                f"{path}: this task is from elsewhere, it is not of this run's config.json "
                f"({'; '.join(lines)}); {checkpoint.ADVICE}"
            )


class Store(Reader):
    """The folder of one run, held by one program at a time. Of its processes the first writes
    what Orbax does not, and keeps the lock.
    """

    def __init__(self, workdir: str | os.PathLike):
        """Make the folder, or open it.

        Raises UserError when it can't be written, something of ours in it is a link, or another
        process runs in it.
        """
        super().__init__(workdir)
        paths.check_encoding(self.root, "workdir")
        self._lock: files.Lock | None = None
        distributed.run_on_all(self._open)

    def _open(self) -> None:
        if not distributed.is_primary():
            if not self._files.is_locked(self.root):
                raise UserError(
                    f"workdir: {self.root}, which the first process opened, is not there for "
                    "another; take one that all see"
                )
            return
        try:
            for name in _OURS:
                files.refuse_link(self.root / name)
            self._lock = self._files.lock(self.root)
            self._prepare(self._lock)
        except OSError as error:
            raise UserError(
                f"workdir: {self.root} can't be written ({error}); name another with --workdir=DIR"
            ) from error

    def _prepare(self, lock: files.Lock) -> None:
        """Make what is missing in the folder, and clear away what was left half done."""
        try:
            if self._files.exists(self.root / "library.json"):
                raise UserError(
                    f"workdir: {self.root} is a library by now; add a task with soft-jax learn, or "
                    "train a run in another workdir"
                )
            folders = (self.tasks, self.training)
            lock.make(folders)
            for folder in folders:
                self._files.clean(folder)
        except (OSError, UserError):
            lock.close()
            raise

    def close(self) -> None:
        """Let others open the folder. What was made for a run that was refused is removed."""
        if self._lock:
            self._lock.close(keep=self._is_claimed())

    def _is_claimed(self) -> bool:
        try:
            return self._files.exists(self._config)
        except OSError:  # a bucket that can't be reached: nothing is removed there
            return True

    def compare_settings(self, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        """Raise UserError as `Reader.compare_settings`; a folder without a run is fine."""
        if self._holds_run():
            super().compare_settings(settings, defaults)

    def compare(self, record: RunRecord, defaults: Mapping[str, Any]) -> None:
        """Raise UserError as `Reader.compare`; a folder without a run is fine."""
        if self._holds_run():
            super().compare(record, defaults)

    def _holds_run(self) -> bool:
        """Whether config.json is there. Raises UserError where tasks are there without it."""
        if self._files.exists(self._config):
            return True
        if self.present():
            raise UserError(
                f"workdir: {self.root} has tasks but no config.json; restore it, or take "
                "another workdir"
            )
        return False

    def claim(
        self,
        record: RunRecord,
        defaults: Mapping[str, Any],
        before: Callable[[RunRecord], None] = lambda record: None,
    ) -> Place | None:
        """Make the folder this run's: write `record`, or find that the run there is this one.

        Where there was no config.json, nothing says which run the training states there are of:
        they are set aside. Returns the folder where they are now, None if none were set aside.
        `before` is called with the run's record before anything is written: what it raises leaves
        the folder as it was. Raises UserError as `compare` does, or where the processes of a run
        don't see the same folder.
        """
        self.compare(record, defaults)
        before(self.record or record)
        new = not self._holds_run()
        self._check_shared_view(new)
        aside = None
        if new:
            self.record, self._format = record, len(formats.MIGRATIONS["run"])
            if self._states():
                aside = self._move_states_aside()
            if distributed.is_primary():
                text = json.dumps(formats.stamped("run", record.to_json()), indent=2)
                files.write_text(self._config, text + "\n")
        distributed.barrier()
        return aside

    def _check_shared_view(self, new: bool) -> None:
        """Raise UserError in all processes where they don't find the same run, tasks and states."""
        seen = [new, self.present(), [path.name for path in self._states()]]
        number = zlib.crc32(json.dumps(seen).encode()) >> 1
        most, least = distributed.all_max(number, -number)
        if most != -least:
            raise UserError(
                f"workdir: the processes of this run see different things in {self.root}; give all "
                "of them one folder that they share"
            )

    def save_task(self, task: int, items: Mapping[str, Any], manifest: TaskManifest) -> None:
        """Save a finished task's `items` with `manifest`, and drop the training state.

        Items are "adapter", "shared", "statistics" and "memory"; the manifest's `run` and `sha256`
        are filled in. Raises UserError when it can't be written, or the folder is no longer this
        run's, before the save or after it: an outage may have made it a long one.
        """
        self._check_still_ours()
        data = manifest.to_json() | {"task": task, "run": self.record.to_json()}
        checkpoint.save(self.task_path(task), items, formats.stamped("task", data))
        self._check_still_ours()
        self._keep_only(None)

    def save_training(self, task: int, step: int, state: Any, seconds: float) -> None:
        """Save the state of task `task` after `step` steps and `seconds` of training.

        It takes the place of the one before. Raises UserError as `save_task`.
        """
        self._check_still_ours()
        path = self.training / f"{task:03d}-{step:06d}"
        if not distributed.all_max(path in self._states())[0]:
            manifest = TrainingManifest(
                run_fingerprint=self.record.fingerprint, task=task, step=step, seconds=seconds
            )
            data = formats.stamped("training", manifest.to_json())
            checkpoint.save(path, {"state": state}, data)
            self._check_still_ours()
        self._keep_only(path)

    def load_training(
        self, task: int, template: Any, sharding: Sharding
    ) -> tuple[Any, float] | None:
        """Return the latest kept state of task `task` and its seconds, None if there is none.

        Raises UserError when it is damaged, or of another run, task or step than its folder says:
        `set_aside_training` is what is left to do then. A state of format 0 says no run; it is
        taken where config.json is of format 0 too.
        """
        kept = [path for path in self._states() if _state_of(path)[0] == task]
        if not kept:
            return None
        path = kept[-1]
        files.refuse_link(path)
        data = formats.upgrade("training", checkpoint.load_manifest(path), path)
        manifest = TrainingManifest.from_json(data, path)
        self._check_state(path, manifest)
        items = checkpoint.load_items(path, manifest.sha256, {"state": template}, sharding)
        step = checkpoint.named_leaves(items["state"]).get("step")
        if step is not None and int(distributed.to_host(step)) != manifest.step:
            raise UserError(
                f"{path}: the state in it is that after step {int(distributed.to_host(step))}, "
                f"expected {manifest.step}"
            )
        return items["state"], manifest.seconds

    def _check_state(self, path: Place, manifest: TrainingManifest) -> None:
        if manifest.run_fingerprint is None:
            if self._format > 0:
                raise UserError(
                    f"{path}: this training state is of an older format than the run's "
                    "config.json, so it is from elsewhere"
                )
        elif manifest.run_fingerprint != self.record.fingerprint:
            raise UserError(
                f"{path}: this training state is of another run (its fingerprint is "
                f"{manifest.run_fingerprint[:12]}..., expected {self.record.fingerprint[:12]}...)"
            )
        if (there := (manifest.task, manifest.step)) != _state_of(path):
            raise UserError(
                f"{path}: this training state is of task {there[0]} after step {there[1]}, which "
                "is not what its folder is named for"
            )

    def set_aside_training(self) -> Place:
        """Move every kept training state out of the way, never to be read again.

        Returns the folder where they are now.
        """
        self._check_still_ours()
        return self._move_states_aside()

    def _move_states_aside(self) -> Place:
        aside = self.root / "damaged"
        if distributed.is_primary():
            for path in self._states():
                self._files.move(path, aside / f"{path.name}-{time.time_ns()}")
        distributed.barrier()
        return aside

    def _states(self) -> list[Place]:
        """Return the kept training states, in the order of tasks and steps."""
        there = self._files.is_dir(self.training)
        names = self._files.checkpoints(self.training) if there else []
        states = [self.training / name for name in names if _STATE_NAME.fullmatch(name)]
        return sorted(states, key=_state_of)

    def _keep_only(self, path: Place | None) -> None:
        if distributed.is_primary():
            for other in self._states():
                if other != path:
                    self._files.remove(other)
        distributed.barrier()

    def _check_still_ours(self) -> None:
        """Raise UserError in all processes when the folder was moved, removed, or made another's.

        Orbax would make it anew, and the run would end well in a folder that holds half of it.
        """

        def look() -> None:
            if not distributed.is_primary():
                return
            because = ""
            try:
                self._lock.check()
                if self._read_config()[0] == self.record:
                    return
            except OSError as error:
                because = f" ({error})"  # square brackets would be rich's markup
            except UserError:
                pass
            raise UserError(
                f"workdir: {self.root} is no longer the folder that this run was started in (it "
                f"was moved, removed or changed while the run trained){because}; the run ends "
                "here. Put it back as it was and give the same command again"
            )

        distributed.run_on_all(look)


def _state_of(path: Place) -> tuple[int, int]:
    """Return the task and the step that a training state's folder is named for."""
    task, step = path.name.split("-")
    return int(task), int(step)
