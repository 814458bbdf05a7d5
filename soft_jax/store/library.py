"""The folder of a library: tasks with versions, and a log of every change.

    LIBRARY/library.json       which tasks, versions and classes there are (`LibraryState`)
    LIBRARY/log/000001.json    a change: when, by which command, what the state was and is
    LIBRARY/tasks/000/         a version: a checkpoint as a run keeps of a task
    LIBRARY/tests/000.npz      its test images, where they are kept
    LIBRARY/archive/000.tar.xz an archived version, packed
    LIBRARY/shared/000/        the part that all tasks share (a G-prompt), where the version that it
                               is from is archived or removed
    LIBRARY/learning/NAME@1-*/ the run that learns a version, until it is taken in
    LIBRARY/used/000           is touched when a version is asked for, or answers

A change is made by one write of `library.json`. Before it, new files are put where nothing names
them; behind it, what nothing names any more is removed. So a command that is killed leaves the
library as it was or as it should be, and the next command clears away the rest (`Folder.recover`).

A run's folder is a library too, whose tasks were planned: there is no `library.json` in it until
something is changed, and its tasks are "task1", "task2" and so on, each of one version.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np

from soft_jax import paths
from soft_jax.errors import UserError
from soft_jax.store import archives, checkpoint, disk_lock, files, formats
from soft_jax.store.folder import Reader
from soft_jax.store.records import TaskManifest

JSON = Any
STATE_FILE = "library.json"
# The states of a version. One of a task's is active at most.
ACTIVE, CANDIDATE, RETIRED, ARCHIVED = "active", "candidate", "retired", "archived"
RESERVED = ("best", "all", "none", "frozen")
_NAME = re.compile(r"[^\W_][\w.-]{0,63}")
_NAME_BYTES = 128  # in UTF-8: names are parts of names of folders, which have 255 at most
# Ours in `tasks`, `tests`, `archive` and `shared`, whole or under way; we touch nothing else there.
_OURS = re.compile(r"([0-9]{3,})(\.npz|\.tar\.xz)?|\.[0-9]{3,}(\.npz|\.tar\.xz)?\.partial")
_FOLDERS = ("tasks", "tests", "archive", "shared", "log", "learning", "used")
# Protocols of a run's figures.
_GIVEN, _PROTOTYPE = "oracle/task_given", "per_sample/prototype"
_REFERENCES = ("per_sample/frozen_features", "per_sample/zero_shot")
_NO_CHANGE = {"given": 0.0, "per_sample": 0.0}  # of a task's figures, by another's change


def check_name(name: str) -> None:
    """Raise UserError where `name` can't be a task's."""
    if not _NAME.fullmatch(name) or name in RESERVED or len(name.encode()) > _NAME_BYTES:
        raise UserError(
            f"task name: {name[:80]!r} can't be one; take letters, digits, '_', '-' and '.', at "
            f"most 64 ({_NAME_BYTES} bytes), beginning with a letter or digit, and none of "
            f"{', '.join(RESERVED)}"
        )


def split_name(text: str) -> tuple[str, int | None]:
    """Return the task and the version that "birds@2" names; of "birds", None as the version."""
    name, at, number = text.partition("@")
    check_name(name)
    if not at:
        return name, None
    if not re.fullmatch("[1-9][0-9]{0,8}", number):
        raise UserError(f"version: {text[:80]!r}; write a task's version as {name}@2")
    return name, int(number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """One version of a task. `id` is its folder in `tasks/`, `number` counts from 1 in its task.

    `classes` are the library's numbers of its classes, in the order of its own classifier.
    `data` says where its images are from (`experiment.data_spec.Data`, one or several), `test` how
    many test images it has and the hash of them all, and of the file where they are kept; of a run,
    the hash of the run's data set. `learned` are figures in percent, of when it was
    learned, with and without the task given; `gate` what the gate found then, in words: what had
    `fallen`, and what was `unchecked`. `origin` says where
    arrays are from that were not trained here. `replaces` are the ids of other tasks' versions in
    whose place it answers for their classes. `restored_as` is the state that an archived version
    comes back with. `manifest_sha256` is the hash of the file `manifest/metadata` in its folder,
    which has those of all its arrays; "" of versions that releases before took in.
    """

    id: int
    number: int
    state: str
    classes: tuple[int, ...]
    created: str  # UTC, ISO 8601
    data: tuple[Mapping[str, JSON], ...] = ()
    test: Mapping[str, JSON] = dataclasses.field(default_factory=dict)
    learned: Mapping[str, float] = dataclasses.field(default_factory=dict)
    gate: Mapping[str, JSON] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    bytes: int = 0
    archive_sha256: str = ""
    restored_as: str = ""
    origin: str = ""
    replaces: tuple[int, ...] = ()
    manifest_sha256: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LibraryState:
    """What a library holds: `library.json`.

    `config` is the whole `Config` that tasks are learned with; `shared_from` the version whose
    shared part (a G-prompt) serves all. `classes` are the names of all classes ever learned; their
    places are their numbers, and stay. `tasks` has the versions by task, in the order that tasks
    came in. `figures` are those of the active tasks when they were last accepted, in percent, and
    `confusion` by version's id to which versions' tasks its test images were given then, each by
    itself: `[one][other]` images. `numbers` has the highest number that a version of a name ever
    had; none is given again. `owners` has by every name, also former ones, the id of the first
    version of the task that had it last; -1 where that is not known. `changes` is the number of the
    last record of the log.
    """

    config: Mapping[str, JSON]
    backbone_sha256: str
    shared_from: int | None = None
    next_id: int = 0
    classes: tuple[str, ...] = ()
    tasks: Mapping[str, tuple[Version, ...]] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    confusion: Mapping[int, Mapping[int, int]] = dataclasses.field(default_factory=dict)
    numbers: Mapping[str, int] = dataclasses.field(default_factory=dict)
    owners: Mapping[str, int] = dataclasses.field(default_factory=dict)
    changes: int = 0

    @property
    def active(self) -> dict[str, Version]:
        """Return the active version of each task that has one."""
        return {
            name: version
            for name, versions in self.tasks.items()
            for version in versions
            if version.state == ACTIVE
        }

    @property
    def sha256(self) -> str:
        """Return the hex SHA-256 of the state."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def task_of_class(self, class_: int) -> str | None:
        """Return the task that has a class: by its active version, else by any of its versions.

        None: none has it any more.
        """
        for name, version in self.active.items():
            if class_ in version.classes:
                return name
        for name, versions in self.tasks.items():
            if any(class_ in version.classes for version in versions):
                return name
        return None

    def versions(self, name: str) -> tuple[Version, ...]:
        """Return a task's versions. Raises UserError where there is no such task."""
        if name not in self.tasks:
            known = ", ".join(self.tasks) or "none yet"
            raise UserError(f"task: there is no {name!r} in this library; there are {known}")
        return self.tasks[name]

    def version(self, name: str, number: int | None = None) -> Version:
        """Return a task's version `number`; None: the active one, else the newest.

        Raises UserError where it is not there.
        """
        versions = self.versions(name)
        if number is None:
            return self.active.get(name, versions[-1])
        for version in versions:
            if version.number == number:
                return version
        raise UserError(
            f"version: there is no {name}@{number}; there are "
            f"{', '.join(f'{name}@{version.number}' for version in versions)}"
        )

    def replaced(self, name: str, *changed: Version) -> "LibraryState":
        """Return the state with `changed` in the places of the same versions of task `name`."""
        by_id = {version.id: version for version in changed}
        versions = tuple(by_id.pop(old.id, old) for old in self.tasks.get(name, ()))
        tasks = {**self.tasks, name: (*versions, *by_id.values())}
        return dataclasses.replace(self, tasks=tasks)

    def activated(self, name: str, version: Version) -> "LibraryState":
        """Return the state with `version` as the active one of its task, and of its classes.

        A class is in one active version. Those of other tasks that have one of its classes are
        retired; of those that it has all classes of, it keeps the ids (`Version.replaces`). Where
        a retired one had itself taken the place of others, by a merge, the others come back.

        Raises UserError where a class would be left that no active version has, as its own is
        archived or removed.
        """
        before, state = self.active.get(name), self
        rivals = {
            task: other
            for task, other in self.active.items()
            if task != name and set(other.classes) & set(version.classes)
        }
        mine = set(version.classes)
        replaces = {other.id for other in rivals.values() if set(other.classes) <= mine}
        replaces |= set(before.replaces if before else ())
        changed = [dataclasses.replace(version, state=ACTIVE, replaces=tuple(sorted(replaces)))]
        if before and before.id != version.id:
            changed.append(dataclasses.replace(before, state=RETIRED))
        state = state.replaced(name, *changed)
        for task, other in rivals.items():
            state = state.replaced(task, dataclasses.replace(other, state=RETIRED))
        for other in rivals.values():
            state = state._brought_back(other, {version.id})
        there = {class_ for active in state.active.values() for class_ in active.classes}
        for task, other in rivals.items():
            if lost := sorted(set(other.classes) - there):
                raise UserError(
                    f"version: {name}@{version.number} would take the place of "
                    f"{task}@{other.number}, and nothing would answer for "
                    f"{self.classes[lost[0]]!r} any more, which no other version has that is there;"
                    f" restore one that has it, or archive {task} before"
                )
        return state

    def replaced_by(self, version: Version) -> list[tuple[str, Version]]:
        """Return the retired versions that a version took the place of, with their tasks."""
        return [
            (name, other)
            for name, versions in self.tasks.items()
            for other in versions
            if other.id in version.replaces and other.state == RETIRED
        ]

    def _brought_back(self, gone: Version, seen: set[int]) -> "LibraryState":
        """Return the state with the versions active that `gone` had taken the place of."""
        state = self
        for name, version in self.replaced_by(gone):
            if version.id in seen:
                continue
            seen.add(version.id)
            taken = {class_ for active in state.active.values() for class_ in active.classes}
            if taken & set(version.classes) or name in state.active:
                state = state._brought_back(version, seen)
            else:
                state = state.replaced(name, dataclasses.replace(version, state=ACTIVE))
        return state

    def to_json(self) -> dict[str, JSON]:
        """Return the state as it is written."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, JSON], where: Any) -> "LibraryState":
        """Return the state that `to_json` gave. Raises UserError, naming `where`, for another."""
        _check_keys(cls, data, where)
        try:
            _check_types(cls, data)
            _check_figures(data["figures"])
            tasks = {
                name: tuple(_version(version, f"{where}: {name}") for version in versions)
                for name, versions in data["tasks"].items()
            }
            confusion = {
                int(one): {int(other): count for other, count in row.items()}
                for one, row in data["confusion"].items()
            }
            read = {"classes": tuple(data["classes"]), "tasks": tasks, "confusion": confusion}
            return cls(**{**data, **read})
        except (TypeError, ValueError, AttributeError) as error:  # a value of another type
            raise UserError(
                f"{where} is damaged, it is not what was written ({error}); restore it"
            ) from error


def _version(data: Mapping[str, JSON], where: Any) -> Version:
    _check_keys(Version, data, where)
    _check_types(Version, data)
    _check_figures({"learned": data["learned"]} if data["learned"] else {})
    lists = {name: tuple(data[name]) for name in ("classes", "data", "replaces")}
    return Version(**{**data, **lists})


def _check_keys(record: type, data: Mapping[str, JSON], where: Any) -> None:
    names = {field.name for field in dataclasses.fields(record)}
    if not isinstance(data, Mapping) or names != data.keys():
        odd = names ^ (data.keys() if isinstance(data, Mapping) else set())
        raise UserError(f"{where}: {', '.join(sorted(odd))} is missing or unknown; restore it")


def _check_types(record: type, data: Mapping[str, JSON]) -> None:
    """Raise TypeError where a value is not what JSON has for the type of its field."""
    for field in dataclasses.fields(record):
        if not _fits(data[field.name], field.type):
            raise TypeError(f"{field.name} is {str(data[field.name])[:80]!r}, of another type")


def _fits(value: JSON, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(entry, inner[0]) for entry in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(v, inner[1]) for v in value.values())
    if origin is types.UnionType:
        return any(_fits(value, one) for one in inner)
    if kind is float:
        return type(value) in (int, float)
    # A version is looked at by itself.
    return kind in (JSON, Version) or type(value) is kind


def _check_figures(figures: Mapping[str, Mapping[str, float]]) -> None:
    for name, row in figures.items():
        if not {"given", "per_sample"} <= row.keys():
            raise ValueError(f"the figures of {name} are {str(row)[:80]}")


def _is_record(record: Mapping[str, JSON]) -> bool:
    """Whether a record of the log, in today's format, has what `commit` writes."""
    kinds = {"number": int, "when": str, "command": str, "note": str, "found": dict}
    if not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        return False
    kinds = {"figures": dict, "backward": dict, "whole": bool, "gone": list, "without": list}
    found = record["found"]
    return "figures" not in found or all(isinstance(found.get(n), k) for n, k in kinds.items())


def _read_json(file: Path) -> JSON:
    """Return what a JSON file of a library holds. Raises UserError, naming it, where it can't."""
    try:
        return json.loads(paths.read_bytes(file))
    except OSError as error:
        raise UserError(f"library: {file} can't be read ({error}); restore it") from error
    except (ValueError, RecursionError) as error:  # the latter where it is nested too deeply
        raise UserError(f"library: {file} is damaged ({error}); restore it") from error


def holds_library(root: str | Path) -> bool:
    """Whether a folder is a library's that was made or changed as one."""
    return os.path.lexists(paths.local(root, "library") / STATE_FILE)


def hash_of_manifest(path: Path) -> str:
    """Return the hex SHA-256 of the manifest in a version's folder."""
    return hashlib.sha256(paths.read_bytes(path / "manifest" / "metadata")).hexdigest()


def now() -> str:
    """Return this moment as UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class LibraryReader:
    """A library's folder, to read from, also while another program changes it."""

    def __init__(self, root: str | Path):
        self.root = paths.local(root, "library")
        self.tasks = self.root / "tasks"

    def read(self) -> LibraryState:
        """Return the state. Raises UserError where there is no library, or it can't be read."""
        file = self.root / STATE_FILE
        files.refuse_link(file)
        if not file.exists():
            if not os.path.lexists(self.root / "config.json"):
                raise UserError(f"library: there is none in {self.root}, and no run")
            return _state_of_run(self.root)
        data = _read_json(file)
        return LibraryState.from_json(formats.upgrade("library", data, file), file)

    def path(self, version: Version) -> Path:
        """Return the folder of a version."""
        return self.tasks / f"{version.id:03d}"

    def tests(self, version: Version) -> Path:
        """Return the file of a version's test images, where they are kept."""
        return self.root / "tests" / f"{version.id:03d}.npz"

    def load_tests(self, version: Version) -> tuple[np.ndarray, np.ndarray]:
        """Return what `keep_tests` kept. Raises UserError where it is not that any more."""
        file = self.tests(version)
        try:
            raw = paths.read_bytes(file)
        except OSError as error:
            raise UserError(f"{file} can't be read ({error}); restore it") from error
        if hashlib.sha256(raw).hexdigest() != version.test["kept_sha256"]:
            raise UserError(f"{file} is not what was kept (its SHA-256 differs); restore it")
        with np.load(io.BytesIO(raw)) as kept:
            return kept["images"], kept["labels"]

    def archive(self, version: Version) -> Path:
        """Return the file of an archived version."""
        return self.root / "archive" / f"{version.id:03d}.tar.xz"

    def shared(self, state: LibraryState) -> Path | None:
        """Return the folder of the part that all tasks share; None where there is none yet."""
        if state.shared_from is None:
            return None
        kept = self.root / "shared" / f"{state.shared_from:03d}"
        return kept if kept.is_dir() else self.tasks / kept.name

    def size(self, version: Version) -> int:
        """Return the bytes that a version takes now: of an archived one, those of its archive."""
        if version.state == ARCHIVED:
            with contextlib.suppress(OSError):  # its archive is gone
                return self.archive(version).stat().st_size
        return version.bytes

    def archived_hashes(self, version: Version) -> dict[str, str]:
        """Return the hex SHA-256 of each array of an archived version, by "item/leaf".

        Empty where the archive can't be read.
        """
        return archives.hashes(self.archive(version), self.path(version).name)

    def manifest_of(self, version: Version) -> TaskManifest:
        """Return a version's manifest. Raises UserError where it is missing, damaged or another."""
        path = self.path(version)
        manifest = self.load_manifest(path)
        if version.manifest_sha256 not in ("", hash_of_manifest(path)):
            raise UserError(
                f"{path}: the manifest is another than the library took in (its SHA-256 differs)"
            )
        return manifest

    def load_manifest(self, path: Path) -> TaskManifest:
        """Return the manifest in a version's folder. Raises UserError where it is missing or
        damaged.
        """
        data = formats.upgrade("task", checkpoint.load_manifest(path), path)
        return TaskManifest.from_json(data, path)

    def log(self, state: LibraryState) -> list[dict[str, JSON]]:
        """Return the records of the changes that led to a state, in order."""
        records = []
        for number in range(1, state.changes + 1):
            file = self.root / "log" / f"{number:06d}.json"
            records.append(formats.upgrade("log", _read_json(file), file))
            if not _is_record(records[-1]):
                raise UserError(
                    f"library: {file} is damaged, it is not the record that was written; restore it"
                )
        return _filled(records)

    def last_used(self, version: Version) -> str:
        """Return when a version was last asked for or last answered, or else when it was made."""
        try:
            seconds = (self.root / "used" / f"{version.id:03d}").stat().st_mtime
        except OSError:
            return version.created
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")

    def note_use(self, versions: Sequence[Version]) -> None:
        """Note that versions are used to predict; where nothing can be written, nothing is."""
        with contextlib.suppress(OSError):
            folder = self.root / "used"
            folder.mkdir(exist_ok=True)
            for version in versions:
                (folder / f"{version.id:03d}").touch()


def _figures_in(records: Sequence[Mapping[str, JSON]]) -> Mapping[str, JSON]:
    """Return the figures of the last record that has some."""
    return next((r["found"]["figures"] for r in records[::-1] if "figures" in r["found"]), {})


def _filled(records: Sequence[Mapping[str, JSON]]) -> list[dict[str, JSON]]:
    """Return records of the log with all that was measured, which `_shortened` left out."""
    out: list[dict[str, JSON]] = []
    known: Mapping[str, JSON] = {}
    for record in records:
        found = dict(record["found"])
        if "figures" in found:
            whole, gone, without = (found.pop(key) for key in ("whole", "gone", "without"))
            if not whole:
                kept = {id_: row for id_, row in known.items() if id_ not in gone}
                found["figures"] = kept | found["figures"]
            same = {id_: _NO_CHANGE for id_ in found["figures"] if id_ not in without}
            found["backward"] = same | found["backward"]
            known = found["figures"]
        out.append({**record, "found": found})
    return out


def _state_of_run(root: Path) -> LibraryState:
    """Return a run as the state of a library whose tasks were planned.

    Raises UserError where it is not finished.
    """
    reader = Reader(root)
    record, there = reader.read_record(), reader.present()
    reader.check_complete(there)
    manifests = [reader.load_task_manifest(task) for task in there]
    planned = manifests[-1].num_tasks if manifests else 0
    if not manifests or len(there) < planned:
        of = f" of {planned}" if planned else ""
        raise UserError(
            f"library: {root} is a run of which {len(there)}{of} tasks are finished; finish it "
            "before it is used as a library"
        )
    last = manifests[-1]
    # Classes that are in no task have no name that is written down.
    names = [f"class {class_}" for class_ in range(last.num_classes)]
    for manifest in manifests:
        for class_, name in zip(manifest.classes, manifest.class_names, strict=True):
            names[class_] = name
    tasks = {}
    for task, manifest in zip(there, manifests, strict=True):
        path = reader.task_path(task)
        created = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
        config = manifest.config
        tasks[f"task{task + 1}"] = (
            Version(
                id=task,
                number=1,
                state=ACTIVE,
                classes=manifest.classes,
                created=created,
                data=(
                    {
                        "dataset": config["dataset"],
                        "data_dir": config["data_dir"],
                        "classes": list(manifest.class_names),
                        "train_images_per_class": config["train_images_per_class"],
                        "test_images_per_class": config["test_images_per_class"],
                    },
                ),
                test={
                    "images": manifest.metrics[_GIVEN][task]["total"],
                    "dataset_sha256": record.dataset_sha256,
                },
                learned=_figures(manifest, task),
                seconds=float(manifest.seconds.get("train", 0.0)),
                bytes=files.of(path).size(path),
                manifest_sha256=hash_of_manifest(path),
            ),
        )
    return LibraryState(
        config=last.config,
        backbone_sha256=record.backbone_sha256,
        shared_from=there[-1],
        next_id=there[-1] + 1,
        classes=tuple(names),
        tasks=tasks,
        figures={f"task{task + 1}": _figures(last, task) for task in there},
        confusion={
            task: {int(other): count for other, count in _alone(last, task)["identified"].items()}
            for task in there
        },
        numbers=dict.fromkeys(tasks, 1),
        owners={name: version.id for name, (version,) in tasks.items()},
    )


def _alone(manifest: TaskManifest, task: int) -> Mapping[str, JSON]:
    """Return what a run counted of a task's images, each by itself, under the rule that a library
    takes (`rules.choose`), when the task of `manifest` was done.
    """
    able = (key for key in manifest.metrics if key.startswith("per_sample/"))
    able = [key for key in able if key not in _REFERENCES]
    return manifest.metrics[_PROTOTYPE if _PROTOTYPE in able else able[0]][task]


def _figures(manifest: TaskManifest, task: int) -> dict[str, float]:
    """Return a task's figures in percent, as of a run after the task of `manifest`."""
    rows = {"given": manifest.metrics[_GIVEN][task], "per_sample": _alone(manifest, task)}
    return {name: 100 * row["correct"] / row["total"] for name, row in rows.items()}


class LibraryFolder(LibraryReader):
    """A library's folder, held by one program at a time, which may change it."""

    def __init__(self, root: str | Path, make: bool = False):
        """Hold the folder; with `make`, it is made if it is not there.

        Raises UserError where it can't be written, is not there, or another program holds it.
        """
        super().__init__(root)
        if not make and not self.root.is_dir():
            raise UserError(f"library: {self.root} is not there")
        try:
            for name in (disk_lock.FILE, *_FOLDERS):
                files.refuse_link(self.root / name)
            held = f"library: another program is changing {self.root}; wait for it"
            self._lock = disk_lock.DiskLock(self.root, held)
        except OSError as error:
            raise UserError(f"library: {self.root} can't be written ({error})") from error
        try:
            if holds_library(self.root):
                self.recover(self.read())
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        """Let other programs change the folder. What was made for nothing is removed."""
        self._lock.close(keep=holds_library(self.root))

    def check_new(self) -> None:
        """Raise UserError where a new library would be made among other things."""
        others = {path.name for path in self.root.iterdir()} - {disk_lock.FILE, *_FOLDERS}
        others = {name for name in others if not name.startswith(f".{STATE_FILE}")}
        if others:
            raise UserError(
                f"library: {self.root} holds other things ({paths.shown(min(others))}) and no "
                "library; name a new folder"
            )

    def recover(self, state: LibraryState) -> None:
        """Remove what commands that were killed left behind: files that the state doesn't name."""
        kept = {version.id: version for versions in state.tasks.values() for version in versions}
        for kind in ("tasks", "archive", "tests", "shared"):
            for path in self._files_of(kind):
                found = _OURS.fullmatch(path.name)
                if found and not (found[1] and _is_named(state, kept, kind, int(found[1]))):
                    _remove(path)
        for file in self._files_of("log"):
            record = re.fullmatch(r"([0-9]{6,})\.json|\.[0-9]{6,}\.json\.partial", file.name)
            if record and not (record[1] and int(record[1]) <= state.changes):
                file.unlink()
        done = {f"{name}@{v.number}" for name, found in state.tasks.items() for v in found}
        for path in self._files_of("learning"):
            if path.name.rpartition("-")[0] in done:
                _remove(path)

    def _files_of(self, name: str) -> list[Path]:
        folder = self.root / name
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def commit(
        self,
        old: LibraryState | None,
        new: LibraryState,
        command: str,
        note: str = "",
        found: Mapping[str, JSON] | None = None,
    ) -> LibraryState:
        """Make `new` the library's state in the place of `old`, with a record in the log.

        `found` is what was measured on the way. Returns the state as it is written. What `new`
        doesn't name is removed.
        """
        new = dataclasses.replace(new, changes=(old.changes if old else 0) + 1)
        record = {
            "number": new.changes,
            "when": now(),
            "command": command,
            "note": note,
            "found": self._shortened(found or {}, old),
            "state_before": old.sha256 if old else None,
            "state_after": new.sha256,
        }
        folder = self.root / "log"
        with _disk(folder):
            folder.mkdir(exist_ok=True)
        text = json.dumps(formats.stamped("log", record), indent=1, ensure_ascii=False) + "\n"
        files.write_text(folder / f"{new.changes:06d}.json", text)
        data = formats.stamped("library", new.to_json())
        files.write_text(
            self.root / STATE_FILE, json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        )
        # Done; what can't be removed now is removed by the next command.
        with contextlib.suppress(OSError):
            self.recover(new)
        return new

    def _shortened(self, found: Mapping[str, JSON], old: LibraryState | None) -> dict[str, JSON]:
        """Return what was measured as a record keeps it: what changed since the record before.

        With the figures of all tasks in each record, a log would grow with their number squared.
        """
        if "figures" not in found:
            return dict(found)
        try:
            known, whole = _figures_in(self.log(old)) if old else {}, False
        except UserError:  # a record is damaged; whoever goes on reads from this one
            known, whole = {}, True
        figures, backward = found["figures"], found["backward"]
        return {
            **found,
            "whole": whole,
            "figures": {id_: row for id_, row in figures.items() if known.get(id_) != row},
            "gone": [id_ for id_ in known if id_ not in figures],
            "backward": {id_: row for id_, row in backward.items() if any(row.values())},
            "without": [id_ for id_ in figures if id_ not in backward],
        }

    def take_in(self, finished: Path, version: Version) -> None:
        """Copy a finished task's folder to where the version's is; no state names it yet."""
        with self._replacing(self.path(version)) as partial:
            shutil.copytree(finished, partial)

    def keep_tests(self, version: Version, images: np.ndarray, labels: np.ndarray) -> str:
        """Keep a version's test images, uint8 `[N, size, size, 3]`, and their labels, int `[N]`.

        Returns the file's hex SHA-256.
        """
        with self._replacing(self.tests(version)) as partial:
            with open(partial, "wb") as file:
                np.savez_compressed(file, images=images, labels=labels)
            digest = hashlib.sha256(partial.read_bytes()).hexdigest()
        return digest

    def keep_shared(self, state: LibraryState, version: Version) -> None:
        """Copy the part that all tasks share out of `version`, if it is from there and goes away.

        Versions that are archived will ask for it too. Of a damaged version there may be nothing to
        copy: other versions have it.
        """
        parts = [self.path(version) / part for part in ("shared", "manifest")]
        gone = version.state == ARCHIVED or not all(part.is_dir() for part in parts)
        if version.id != state.shared_from or gone:
            return
        with self._replacing(self.root / "shared" / f"{version.id:03d}") as partial:
            for part in parts:
                shutil.copytree(part, partial / part.name)

    def pack(self, version: Version) -> str:
        """Write a version's folder as an archive; return the archive's hex SHA-256."""
        with self._replacing(self.archive(version)) as partial:
            archives.pack(self.path(version), partial)
            digest = hashlib.sha256(partial.read_bytes()).hexdigest()
        return digest

    def unpack(self, version: Version) -> None:
        """Write an archived version's folder again, to the bit.

        Raises UserError where the archive is missing, or not what was written; and where an array
        is not what was saved: releases before archived damaged versions too.
        """
        file = self.archive(version)
        try:
            raw = paths.read_bytes(file)
        except OSError as error:
            raise UserError(f"library: {file} can't be read ({error}); restore it") from error
        if hashlib.sha256(raw).hexdigest() != version.archive_sha256:
            raise UserError(
                f"library: {file} is not what was archived (its SHA-256 differs); restore it"
            )
        with self._replacing(self.path(version)) as partial:
            archives.unpack(raw, partial)
            try:
                checkpoint.verify(partial)
            except UserError as error:
                raise UserError(
                    f"library: what {file} holds is damaged ({error}); take the file from a copy "
                    "of the library, or remove the version"
                ) from error

    @contextlib.contextmanager
    def _replacing(self, target: Path) -> Iterator[Path]:
        """Yield where to write a file or folder, which then takes the place of `target`, on the
        disk. Raises UserError where it can't be written; what was written is removed then.
        """
        partial = target.with_name(f".{target.name}.partial")
        with _disk(target):
            try:
                target.parent.mkdir(exist_ok=True)
                _remove(partial)
                yield partial
                files.sync(partial)
                _remove(target)
                os.replace(partial, target)
                files.sync_folder(target.parent)
            except Exception:
                with contextlib.suppress(OSError):
                    _remove(partial)
                raise


def _is_named(state: LibraryState, kept: Mapping[int, Version], kind: str, number: int) -> bool:
    """Whether a state names file or folder `number` of a kind of folder."""
    version = kept.get(number)
    archived = version is not None and version.state == ARCHIVED
    if kind == "shared":
        return number == state.shared_from and (version is None or archived)
    if kind == "tests":
        return version is not None and "kept_sha256" in version.test
    return version is not None and archived == (kind == "archive")


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Say which file or folder a full or broken disk keeps from being written."""
    try:
        yield
    except (OSError, shutil.Error) as error:
        raise UserError(
            f"{path} could not be written ({error}); make room or mend the disk, and give the "
            "same command again"
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def age_in_days(moment: str) -> float:
    """Return how many days ago a moment in ISO 8601 was."""
    return (time.time() - datetime.fromisoformat(moment).timestamp()) / 86400
