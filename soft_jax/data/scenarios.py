"""Which classes make which task, in which order. No images here.

A rule turns a data set's class names into a `Scenario`. To add one, write a class as below and its
line in `SCENARIOS`.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from soft_jax import paths
from soft_jax.config import Config, unknown_value
from soft_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Scenario:
    """An ordered list of tasks, each a tuple of different classes, of any number and in any order.

    `num_classes` are all that the data set has; those in no task are not learned. A class is in one
    task at most: once the class of an image is known, so is its task. Raises UserError where that
    does not hold.
    """

    num_classes: int
    classes_by_task: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        if not self.classes_by_task or not all(self.classes_by_task):
            raise UserError("scenario: every task needs at least one class")
        every = [class_ for classes in self.classes_by_task for class_ in classes]
        if odd := [class_ for class_ in every if not 0 <= class_ < self.num_classes]:
            raise UserError(f"scenario: class {odd[0]} is not one of 0 to {self.num_classes - 1}")
        if len(set(every)) < len(every):
            twice = next(class_ for class_ in every if every.count(class_) > 1)
            raise UserError(f"scenario: class {twice} stands twice; a class is in one task")

    @property
    def num_tasks(self) -> int:
        """Return the number of tasks."""
        return len(self.classes_by_task)

    @property
    def task_of_class(self) -> np.ndarray:
        """Return the task of each class, int `[num_classes]`; -1 for classes in no task."""
        tasks = np.full(self.num_classes, -1)
        for task, classes in enumerate(self.classes_by_task):
            tasks[list(classes)] = task
        return tasks

    @property
    def is_default(self) -> bool:
        """Whether the tasks are equal slices of all classes in label order, the paper's rule."""
        if self.num_classes % self.num_tasks:
            return False
        return self == equal(range(self.num_classes), self.num_classes, self.num_tasks)

    @property
    def num_learned(self) -> int:
        """Return the number of classes that are in a task."""
        return sum(map(len, self.classes_by_task))

    def class_mask(self, task: int) -> np.ndarray:
        """Return which classes are task `task`'s, bool `[num_classes]`."""
        return self.task_of_class == task

    def seen_mask(self, task: int) -> np.ndarray:
        """Return which classes are those of the tasks up to `task`, bool `[num_classes]`."""
        tasks = self.task_of_class
        return (tasks >= 0) & (tasks <= task)

    def classes_of(self, task: int) -> list[int]:
        """Return task `task`'s classes, in its order."""
        return list(self.classes_by_task[task])

    def check(self, labels: np.ndarray) -> None:
        """Raise UserError where a label of `labels` int `[N]` is no class, or a task has none."""
        if labels.min(initial=0) < 0 or labels.max(initial=0) >= self.num_classes:
            raise UserError(
                f"dataset: labels run from {labels.min()} to {labels.max()}, expected 0 to "
                f"{self.num_classes - 1}"
            )
        for task in range(self.num_tasks):
            if not len(self.members(labels, task)):
                raise UserError(
                    f"dataset: no images of the classes {self.classes_of(task)}, which make task "
                    f"{task + 1}"
                )

    def members(self, labels: np.ndarray, task: int) -> np.ndarray:
        """Return the indices of task `task`'s images, in the order of `labels` int `[N]`."""
        return np.flatnonzero(self.task_of_class[labels] == task)


def equal(order: Sequence[int], num_classes: int, tasks: int) -> Scenario:
    """Cut the classes of `order` into so many tasks of equal size.

    Raises UserError where they can't be divided.
    """
    if len(order) % tasks:
        raise UserError(f"tasks: {len(order)} classes can't be divided into {tasks} equal tasks")
    return _cut(order, num_classes, [len(order) // tasks] * tasks)


def _cut(order: Sequence[int], num_classes: int, sizes: Sequence[int]) -> Scenario:
    bounds = np.cumsum([0, *sizes])
    cut = (tuple(order[start:stop]) for start, stop in itertools.pairwise(bounds))
    return Scenario(num_classes, tuple(cut))


def class_order(config: Config, num_classes: int) -> list[int]:
    """Return the classes in the order that `class_order_seed` gives, or in label order.

    `numpy.random.RandomState(seed).permutation` gives what `np.random.seed` and
    `np.random.permutation` do, by which PILOT and others order classes.
    """
    if config.class_order_seed < 0:
        return list(range(num_classes))
    return np.random.RandomState(config.class_order_seed).permutation(num_classes).tolist()


class ScenarioRule:
    """A rule that makes a scenario. `settings` names the fields of `Config` that it uses."""

    settings: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def make(config: Config, class_names: Sequence[str]) -> Scenario:
        """Make the scenario of a data set with `class_names`. Raises UserError where none fits."""
        raise NotImplementedError


class EqualSplit(ScenarioRule):
    """Tasks of equal size, in label order or in a seeded order."""

    settings: ClassVar[tuple[str, ...]] = ("tasks", "class_order_seed")

    @staticmethod
    def make(config: Config, class_names: Sequence[str]) -> Scenario:
        """Cut all classes into `tasks` tasks."""
        count = len(class_names)
        return equal(class_order(config, count), count, config.tasks)


class Increments(ScenarioRule):
    """A first task of `initial_classes`, then `increment` each; the last task has what is left.

    `initial_classes` 0 is the protocol that the literature calls B0: the first task is as large as
    the others.
    """

    settings: ClassVar[tuple[str, ...]] = ("initial_classes", "increment", "class_order_seed")

    @staticmethod
    def make(config: Config, class_names: Sequence[str]) -> Scenario:
        """Cut all classes by increments."""
        count, first = len(class_names), config.initial_classes or config.increment
        if first > count:
            name = "initial_classes" if config.initial_classes else "increment"
            raise UserError(f"{name}: {first} is above the data set's {count} classes")
        whole, rest = divmod(count - first, config.increment)
        sizes = [first, *[config.increment] * whole, *([rest] if rest else [])]
        return _cut(class_order(config, count), count, sizes)


class FromFile(ScenarioRule):
    """The tasks that a JSON file lists: `[["cat", "dog"], ["bird"]]`, by class name or number."""

    settings: ClassVar[tuple[str, ...]] = ("scenario_file",)

    @staticmethod
    def make(config: Config, class_names: Sequence[str]) -> Scenario:
        """Read the file. Raises UserError naming it and what is wrong in it."""
        path = paths.place(config.scenario_file, "scenario_file")
        file = paths.shown(path)
        try:
            tasks = json.loads(paths.read_bytes(path).decode("utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"scenario_file: {file} can't be read ({error})") from error
        if not isinstance(tasks, list) or not all(isinstance(task, list) for task in tasks):
            raise UserError(f"scenario_file: {file} holds no list of lists of classes")
        numbers = {name: number for number, name in enumerate(class_names)}

        def number_of(class_) -> int:
            if isinstance(class_, str) and class_ in numbers:
                return numbers[class_]
            if type(class_) is int and 0 <= class_ < len(class_names):
                return class_
            raise UserError(
                f"scenario_file: {file} names {class_!r}, which is no class of the data set "
                f"(a name, or a number from 0 to {len(class_names) - 1})"
            )

        numbered = tuple(tuple(number_of(class_) for class_ in task) for task in tasks)
        try:
            return Scenario(len(class_names), numbered)
        except UserError as error:
            problem = str(error).removeprefix("scenario: ")
            raise UserError(f"scenario_file: {file}: {problem}") from error


SCENARIOS: dict[str, type[ScenarioRule]] = {
    "equal": EqualSplit,
    "increments": Increments,
    "file": FromFile,
}


def check(config: Config) -> None:
    """Raise UserError for an unknown scenario, or one whose file is not named."""
    if config.scenario not in SCENARIOS:
        raise UserError(unknown_value("scenario", config.scenario, SCENARIOS))
    if "scenario_file" in SCENARIOS[config.scenario].settings and not config.scenario_file:
        raise UserError("scenario_file: scenario 'file' needs the file that lists the tasks")


def make(config: Config, class_names: Sequence[str]) -> Scenario:
    """Make the scenario that `config` names for a data set with `class_names`."""
    check(config)
    return SCENARIOS[config.scenario].make(config, class_names)


def hold_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Choose `share` of each class's training images for validation; return bool `[N]`.

    Of a class with images, one at least stays for training. The choice depends on `seed` and the
    labels alone, so a continued run makes it again.
    """
    held = np.zeros(len(labels), bool)
    rng = np.random.default_rng([seed, len(labels)])
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(round(share * len(members)), len(members) - 1)
        held[rng.permutation(members)[:count]] = True
    return held
