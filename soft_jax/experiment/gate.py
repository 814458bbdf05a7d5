"""The gate of a library: all active tasks are evaluated again before a version becomes active."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from soft_jax.data import sources
from soft_jax.errors import UserError
from soft_jax.experiment import data_spec
from soft_jax.experiment.data_spec import Data
from soft_jax.experiment.library_planning import config_of
from soft_jax.inference import assembly
from soft_jax.inference import predictor as predictor_lib
from soft_jax.inference.predictor import Predictor
from soft_jax.models import backbones
from soft_jax.store.library import LibraryReader, LibraryState, Version

JSON = Any
# What is measured of a task, in percent: with the task given, and each image by itself.
GIVEN, PER_SAMPLE = "given", "per_sample"
MEASURED = (GIVEN, PER_SAMPLE)
_SHOWN = {GIVEN: "with the task given", PER_SAMPLE: "each image by itself"}
MAX_DROP = 1.0  # points that a task may fall by at the gate


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the gate found: `figures` in percent by task, as `MEASURED`; what fell, in words; which
    tasks could not be checked, and why; and by version's id, to which versions' tasks its test
    images were given, each by itself: `confusion[one][other]` images.
    """

    figures: Mapping[str, Mapping[str, float]]
    fallen: tuple[str, ...]
    unchecked: Mapping[str, str]
    confusion: Mapping[int, Mapping[int, int]] = dataclasses.field(default_factory=dict)

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


def hash_of(dataset: sources.Dataset) -> str:
    """Return the hash of a data set's test images that a version keeps."""
    return "-".join(part[:16] for part in dataset.test.fingerprint)


def tested_images(
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
    dataset = test_set(state, version, whole)
    size = predictor.model.method.architecture.image_size
    count = len(dataset.test.labels)
    return dataset.test.prepared(np.arange(count), size), places[dataset.test.labels]


def test_set(
    state: LibraryState, version: Version, whole: dict[Data, tuple[sources.Dataset, str]]
) -> sources.Dataset:
    """Return the data set of a version's classes, read from where its images are; `whole` and the
    UserError are those of `tested_images`.
    """
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
    if theirs != (whole[key][1] if of_run else hash_of(dataset)):
        raise UserError(f"its test images in {where} are others than it was learned with")
    return dataset


def accuracies(
    predictor: Predictor, images: np.ndarray, labels: np.ndarray, place: int
) -> tuple[dict[str, float], dict[int, int]]:
    """Return the share of right answers with the task given and each image by itself, in percent,
    and how many images were given to which task in the latter case.
    """
    chunk, right = predictor.batching.chunk, {GIVEN: 0, PER_SAMPLE: 0}
    tasks: Counter[int] = Counter()
    for first in range(0, len(images), chunk):
        part, truth = images[first : first + chunk], labels[first : first + chunk]
        given = predictor.predict_prepared(part, np.full(len(part), place))
        alone = predictor.predict_prepared(part)
        right[GIVEN] += int((given.classes == truth).sum())
        right[PER_SAMPLE] += int((alone.classes == truth).sum())
        tasks.update(alone.networks.tolist())
    return {name: 100 * count / len(images) for name, count in right.items()}, dict(tasks)


def record_of(
    before: Mapping[str, Mapping[str, float]], tried: LibraryState, verdict: Verdict, name: str
) -> dict[str, JSON]:
    """Return what the log keeps of an evaluation, where task `name` had another version.

    It has the `version`, whether the gate `held_back` it, the `figures` of all tasks, and
    `backward`: by how many points the others' figures went up, which is backward transfer. Rows are
    by the ids of the versions that were evaluated, those active in `tried`: tasks may be renamed.
    `before` are the figures when tasks were last accepted, by their names.
    """
    figures, backward = {}, {}
    for task, version in tried.active.items():
        if task not in verdict.figures:
            continue
        row = figures[str(version.id)] = dict(verdict.figures[task])
        if task != name and task in before:
            backward[str(version.id)] = {key: row[key] - before[task][key] for key in MEASURED}
    return {
        "version": tried.active[name].id,
        "held_back": bool(verdict.fallen),
        "figures": figures,
        "backward": backward,
    }


def of_replaced(state: LibraryState, name: str, version: Version) -> dict[str, dict[str, float]]:
    """Return the mean figures of the active versions that `version` takes the place of, by `name`.

    Each counts by the number of its test images. Empty where there is none, or one has no figures.
    """
    replaced = {task: v for task, v in state.active.items() if v.id in version.replaces}
    if not replaced or not replaced.keys() <= state.figures.keys():
        return {}
    counts = [v.test["images"] for v in replaced.values()]
    return {
        name: {
            measured: float(
                np.average([state.figures[task][measured] for task in replaced], weights=counts)
            )
            for measured in MEASURED
        }
    }


def note_of(verdict: Verdict) -> str:
    """Return what the log says of a verdict: what fell and what was not checked; "" for nothing."""
    parts = [*verdict.fallen, *(f"{k}: not checked, {v}" for k, v in verdict.unchecked.items())]
    return "; ".join(parts)


def evaluate(
    reader: LibraryReader,
    state: LibraryState,
    backbone: backbones.Backbone,
    before: Mapping[str, Mapping[str, float]],
    gate: Gate,
    new: str | None = None,
    old: LibraryState | None = None,
) -> Verdict:
    """Evaluate the active tasks of `state`, against their figures `before`.

    Of a version that `old`, the state until now, does not have as an active one, there need not be
    figures. Raises UserError where there are no active tasks, or task `new`, which is to be an
    active one, is damaged.
    """
    config = config_of(state)
    if not state.active:
        raise UserError(f"library: {reader.root} has no active task")
    until_now = {version.id for version in (old or state).active.values()}
    figures, fallen, confusion = {}, [], {}
    versions, unchecked = assembly.sound(reader, state, config, backbone)
    if new in unchecked:
        raise UserError(unchecked[new])
    if not versions:
        return Verdict({}, (), unchecked)
    predictor = predictor_lib.of_versions(reader, state, versions, backbone)
    whole: dict[Data, tuple[sources.Dataset, str]] = {}
    for place, (name, version) in enumerate(versions.items()):
        try:
            images, labels = tested_images(reader, state, version, predictor, whole)
        except UserError as error:
            unchecked[name] = str(error)
            continue
        figures[name], given = accuracies(predictor, images, labels, place)
        ids = [each.id for each in versions.values()]
        confusion[version.id] = {ids[task]: count for task, count in given.items()}
        if name not in before:
            if version.id in until_now:
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
    return Verdict(figures, tuple(fallen), unchecked, confusion)
