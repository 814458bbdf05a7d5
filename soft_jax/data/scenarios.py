"""Which classes make which task. No images here."""

import dataclasses

import numpy as np

from soft_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Classes in label order, cut into tasks of equal size."""

    classes: int
    tasks: int

    def __post_init__(self):
        if self.classes % self.tasks:
            raise UserError(
                f"tasks: {self.classes} classes can't be divided into {self.tasks} equal tasks"
            )

    @property
    def task_of_class(self) -> np.ndarray:
        """The task of each class, int `[classes]`."""
        return np.arange(self.classes) // (self.classes // self.tasks)

    def class_mask(self, task: int) -> np.ndarray:
        """Which classes are task `task`'s, bool `[classes]`."""
        return self.task_of_class == task

    def classes_of(self, task: int) -> list[int]:
        """Task `task`'s classes."""
        return np.flatnonzero(self.class_mask(task)).tolist()

    def check(self, labels: np.ndarray) -> None:
        """Raise UserError where a label is no class, or a task has no images."""
        if labels.min(initial=0) < 0 or labels.max(initial=0) >= self.classes:
            raise UserError(
                f"dataset: labels run from {labels.min()} to {labels.max()}, expected 0 to "
                f"{self.classes - 1}"
            )
        for task in range(self.tasks):
            if not len(self.members(labels, task)):
                raise UserError(
                    f"dataset: no images of the classes {self.classes_of(task)}, which make task "
                    f"{task + 1}"
                )

    def members(self, labels: np.ndarray, task: int) -> np.ndarray:
        """Indices of the images of task `task`, in the order of `labels` int `[N]`."""
        return np.flatnonzero(self.task_of_class[labels] == task)
