"""What a library's tasks cost beside what they answer: bytes, parameters, seconds of learning, and
milliseconds an image by task-identity rule.
"""

import dataclasses
import os
import platform
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from soft_jax.errors import UserError
from soft_jax.experiment import gate
from soft_jax.experiment.library_planning import config_of
from soft_jax.inference import assembly, rules
from soft_jax.inference import predictor as predictor_lib
from soft_jax.inference.predictor import Predictor
from soft_jax.models import backbones
from soft_jax.store.library import LibraryReader, LibraryState, Version


@dataclasses.dataclass(frozen=True)
class OfTask:
    """What an active version takes: `bytes` on disk, `parameters` that are its own, and `seconds`
    of learning; and gives: percent of its test images that get its task and the right answer by the
    rule that `predict` takes, each image by itself. None where they could not be had.
    """

    bytes: int
    parameters: int
    seconds: float
    right_task: float | None
    accuracy: float | None


@dataclasses.dataclass(frozen=True)
class OfRule:
    """What a task-identity rule takes and gives, over the `images` that it was measured on.

    `milliseconds` are an image's, prepared and in the host's memory, in batches as the library's
    settings have them; `right_task` is the percentage that was given to its task, `accuracy` that
    of right answers.
    """

    milliseconds: float
    right_task: float
    accuracy: float
    images: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """The costs of a library's active tasks by name, and of its rules by `--task-id`.

    `machine` is what milliseconds were measured on; `unchecked` are tasks that are damaged or whose
    test images could not be had, and why.
    """

    tasks: Mapping[str, OfTask]
    rules: Mapping[str, OfRule]
    unchecked: Mapping[str, str]
    machine: str


def measure(reader: LibraryReader, state: LibraryState, backbone: backbones.Backbone) -> Cost:
    """Measure a library on the test images of its active tasks, at least one.

    Versions that are damaged are among the unchecked. Raises UserError where all are.
    """
    config = config_of(state)
    versions, unchecked = assembly.sound(reader, state, config, backbone)
    if not versions:
        raise UserError(next(iter(unchecked.values())))
    params, made = None, dict[str, Predictor]()
    method = assembly.method_of(config, backbone, state, versions)
    able, own = assembly.rules_of(method, config), assembly.choose(method, config, None)[0].option
    for option in (*(rule.option for rule in able), rules.TaskGiven.option):
        made[option] = predictor_lib.of_versions(
            reader, state, versions, backbone, option, params=params
        )
        params = made[option].model.backbone
    totals = {option: _Total(predictor) for option, predictor in made.items()}
    found: dict[str, tuple[float, float]] = {}
    whole: dict[Any, Any] = {}  # the data set that was read last
    for place, (name, version) in enumerate(versions.items()):
        try:
            images, labels = gate.tested_images(reader, state, version, made[option], whole)
        except UserError as error:
            unchecked[name] = str(error)
            continue
        for total in totals.values():
            total.add(images, labels, place)
        found[name] = totals[own].shares(place)
    return Cost(
        tasks={
            name: _of_task(reader, version, *found.get(name, (None, None)))
            for name, version in versions.items()
        },
        rules={option: total.result() for option, total in totals.items() if total.images},
        unchecked=unchecked,
        machine=_machine(),
    )


def _of_task(
    reader: LibraryReader, version: Version, right_task: float | None, accuracy: float | None
) -> OfTask:
    parameters = reader.manifest_of(version).parameters["adapter"]
    return OfTask(version.bytes, parameters, version.seconds, right_task, accuracy)


def _machine() -> str:
    devices = jax.devices()
    host = f"{platform.machine()} with {os.cpu_count()} cores"
    return f"{len(devices)} × {devices[0].device_kind}, {host}"


class _Total:
    """Adds up what a predictor takes and gives.

    Each chunk is answered once before it is timed: then all is compiled, and weights are loaded.
    """

    def __init__(self, predictor: Predictor):
        self._counts = dict[int, np.ndarray]()  # by task: images, of its task, right
        self._seconds, self._predictor = 0.0, predictor

    @property
    def images(self) -> int:
        """Return the number of images so far."""
        return int(sum(counts[0] for counts in self._counts.values()))

    def add(self, images: np.ndarray, labels: np.ndarray, place: int) -> None:
        """Answer the test images of the task at a `place` of the predictor."""
        given = isinstance(self._predictor.rule, rules.TaskGiven)
        counts = self._counts[place] = np.zeros(3, int)
        chunk = self._predictor.batching.chunk
        for first in range(0, len(images), chunk):
            part, truth = images[first : first + chunk], labels[first : first + chunk]
            tasks = np.full(len(part), place) if given else None
            self._predictor.predict_prepared(part, tasks)
            start = time.perf_counter()
            found = self._predictor.predict_prepared(part, tasks)
            self._seconds += time.perf_counter() - start
            right = (found.networks == place).sum(), (found.classes == truth).sum()
            counts += (len(part), *right)

    def shares(self, place: int) -> tuple[float, float]:
        """Return the percent of a task's images that got their task, and the right answer."""
        count, right_task, right = self._counts[place].tolist()
        return 100 * right_task / count, 100 * right / count

    def result(self) -> OfRule:
        """Return the means over all images so far."""
        count, right_task, right = sum(self._counts.values()).tolist()
        return OfRule(
            milliseconds=1000 * self._seconds / count,
            right_task=100 * right_task / count,
            accuracy=100 * right / count,
            images=count,
        )
