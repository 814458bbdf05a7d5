"""What is written about a run, as typed records: what makes it the run that it is, what became of
each finished task, and where the task in training stands.

A record is made by `from_json` from JSON of today's format (`formats.upgrade` brings older ones
there), which refuses unknown and missing keys alike: a silent default would answer wrongly later.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from soft_jax.errors import UserError

JSON = Any  # None, bool, int, float, str, or lists and dicts of them


def as_json(value: Any) -> JSON:
    """Return `value` as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What makes a run this run and no other: `config.json`.

    `settings` are those that the method uses; `backbone_sha256` and `dataset_sha256` are hex;
    `tasks` are the classes of each task, None for the equal split of the classes in the order of
    their labels. Two runs with equal records compute the same.
    """

    settings: Mapping[str, JSON]
    backbone_sha256: str
    dataset_sha256: str
    tasks: tuple[tuple[int, ...], ...] | None

    def __post_init__(self):
        object.__setattr__(self, "settings", as_json(dict(self.settings)))
        if self.tasks is not None:
            tasks = tuple(tuple(int(class_) for class_ in task) for task in self.tasks)
            object.__setattr__(self, "tasks", tasks)

    @property
    def fingerprint(self) -> str:
        """Return the hex SHA-256 of the four fields as canonical JSON; equal for equal records."""
        text = json.dumps(_canonical(self._content()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _content(self) -> dict[str, JSON]:
        return as_json(
            {field.name: getattr(self, field.name) for field in dataclasses.fields(RunRecord)}
        )

    def to_json(self) -> dict[str, JSON]:
        """Return the record as it is written, with its fingerprint."""
        return self._content() | {"fingerprint": self.fingerprint}

    @classmethod
    def from_json(cls, data: Mapping[str, JSON], where: Any) -> "RunRecord":
        """Return the record that `to_json` gave, read from the file `where`.

        Raises UserError, naming `where`, for a key that is missing, unknown, of another type, or
        not what it was when the fingerprint was taken.
        """
        if not isinstance(data, Mapping):
            raise UserError(f"{where}: a JSON object was expected; restore it")
        data = dict(data)
        fingerprint = data.pop("fingerprint", None)
        _check_keys(cls, data, where)
        tasks = data["tasks"]
        if not (
            isinstance(data["settings"], dict)
            and isinstance(data["backbone_sha256"], str)
            and isinstance(data["dataset_sha256"], str)
            and (tasks is None or (isinstance(tasks, list) and all(map(_is_classes, tasks))))
        ):
            raise UserError(f"{where}: an entry is not of the type it was written with; restore it")
        record = cls(**data)
        if record.fingerprint != fingerprint:
            raise UserError(
                f"{where}: the settings, hashes or tasks in it are not those that it was written "
                "with (their fingerprint differs): something was added, removed or changed; "
                "restore it, or take another workdir"
            )
        return record


def _is_classes(task: JSON) -> bool:
    return isinstance(task, list) and all(type(class_) is int for class_ in task)


def _canonical(value: JSON) -> JSON:
    """Write whole floats as ints, so that records that are equal (1 == 1.0) look alike."""
    if isinstance(value, dict):
        return {key: _canonical(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_canonical(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskManifest:
    """What is kept of a finished task beside its arrays.

    `metrics` holds by protocol a row for each task seen, {"correct", "task_correct", "total":
    images, "identified": {task: images given to it}}; `config` is the whole `Config` that the task
    was trained with, runtime settings included; `seconds` by what they went into; `parameters` and
    `bytes` by what they are of; `mask_distance_from_one`, `weight_drift` and `mask_density` by
    parameter. `run` and `sha256` (of each array, by "item/leaf") are filled in by the store.
    """

    task: int  # counted from 0
    classes: tuple[int, ...]
    class_names: tuple[str, ...]
    num_classes: int  # of the whole scenario, as far as it was known then
    num_tasks: int
    config: Mapping[str, JSON]
    backbone: Mapping[str, str]  # name and sha256
    metrics: Mapping[str, Sequence[Mapping[str, JSON]]]
    seconds: Mapping[str, float]
    parameters: Mapping[str, int]
    step_flops: float | None
    bytes: Mapping[str, int]
    mask_distance_from_one: Mapping[str, float]
    weight_drift: Mapping[str, float]
    mask_density: Mapping[str, Mapping[str, JSON]]
    versions: Mapping[str, str]
    # As `metrics`, of the images held out for validation; empty where none are.
    validation: Mapping[str, Sequence[Mapping[str, JSON]]] = dataclasses.field(default_factory=dict)
    # By protocol: what log-probabilities are divided by, fitted on the validation images; empty
    # where there are none, and it is 1 then.
    temperature: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # By protocol, of test images: numbers by bin of probability, see `calibration.count`.
    calibration: Mapping[str, Mapping[str, Sequence[float]]] = dataclasses.field(
        default_factory=dict
    )
    run: RunRecord | None = None
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def stored(self, item: str, template: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a flat `template` whose arrays the task has in `item`.

        Tasks of older versions may lack arrays that are kept now.
        """
        return {name: like for name, like in template.items() if f"{item}/{name}" in self.sha256}

    def to_json(self) -> dict[str, JSON]:
        """Return the manifest as it is written, but for `sha256`, which the checkpoint adds."""
        data = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(TaskManifest)
            if field.name not in ("run", "sha256")
        }
        return as_json(data | {"run": self.run.to_json() if self.run else None})

    @classmethod
    def from_json(cls, data: Mapping[str, JSON], where: Any) -> "TaskManifest":
        """Return the manifest in the folder `where`, from the JSON in it.

        Raises UserError, naming `where`, for a key that is missing or unknown, or a run that is not
        what it was when it was written.
        """
        _check_keys(cls, data, where)
        run = RunRecord.from_json(data["run"], f"{where}: run")
        names = {name: tuple(data[name]) for name in ("classes", "class_names")}
        return cls(**(dict(data) | names | {"run": run}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingManifest:
    """Where the task in training stands: of which run, and after how many steps and seconds.

    `run_fingerprint` is None for a state of format 0, which did not say it.
    """

    run_fingerprint: str | None
    task: int  # counted from 0
    step: int  # steps of the task that are done
    seconds: float  # of training that they took
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, JSON]:
        """Return the manifest as it is written, but for `sha256`, which the checkpoint adds."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(TrainingManifest)
            if field.name != "sha256"
        }

    @classmethod
    def from_json(cls, data: Mapping[str, JSON], where: Any) -> "TrainingManifest":
        """Return the manifest in the folder `where`, from the JSON in it.

        Raises UserError, naming `where`, for a key that is missing or unknown.
        """
        _check_keys(cls, data, where)
        return cls(**data)


def _check_keys(record: type, data: Mapping[str, JSON], where: Any) -> None:
    names = {field.name for field in dataclasses.fields(record)}
    for problem, keys in (("missing", names - data.keys()), ("unknown", data.keys() - names)):
        if keys:
            raise UserError(f"{where}: {', '.join(sorted(keys))} is {problem}; restore it")


_NOTHING = object()


def differences(
    there: RunRecord,
    settings: Mapping[str, JSON],
    defaults: Mapping[str, JSON],
    ignore_unused: bool = False,
) -> list[str]:
    """List in which settings the run `there` differs from one with `settings`, a line each.

    They are those of `changed`.
    """
    changes = changed(there, settings, defaults, ignore_unused)
    return [f"{key}: {one} there, {other} now" for key, one, other in changes]


def changed(
    there: RunRecord,
    settings: Mapping[str, JSON],
    defaults: Mapping[str, JSON],
    ignore_unused: bool = False,
) -> list[tuple[str, str, str]]:
    """Return the settings in which the run `there` differs from one with `settings`, by name.

    Each is a name and what both have, as it is shown. A setting that only one side has counts on
    the other as its default in `defaults`, which says what runs did before there was such a
    setting; without a default it is a difference. With `ignore_unused`, settings that are not in
    `settings` are skipped: a record of format 0 also holds those that its method does not use.
    """
    now, defaults = as_json(dict(settings)), as_json(dict(defaults))
    changes = []
    for key in sorted(there.settings.keys() | now.keys()):
        if ignore_unused and key not in now:
            continue
        default = defaults.get(key, _NOTHING)
        one, other = there.settings.get(key, default), now.get(key, default)
        if one is _NOTHING or other is _NOTHING or one != other:
            changes.append((key, _shown(one), _shown(other)))
    return changes


def origin_differences(there: RunRecord, now: RunRecord) -> list[str]:
    """List in which hashes, or tasks' classes, two runs differ, a line each."""
    lines = [
        f"{name}: {getattr(there, name)!r} there, {getattr(now, name)!r} now"
        for name in ("backbone_sha256", "dataset_sha256")
        if getattr(there, name) != getattr(now, name)
    ]
    if there.tasks != now.tasks:
        one, other = (
            "the equal split" if record.tasks is None else str([list(t) for t in record.tasks])
            for record in (there, now)
        )
        lines.append(f"classes of the tasks: {_cut(one)} there, {_cut(other)} now")
    return lines


def _shown(value: Any) -> str:
    return "nothing" if value is _NOTHING else _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
