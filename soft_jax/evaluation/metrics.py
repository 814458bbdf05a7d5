"""From the counts in tasks' manifests to accuracy matrices and the figures of continual learning.

Everything is in percent of images. Plain NumPy, no jax.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from soft_jax.store.records import TaskManifest

Manifests = Sequence[TaskManifest]

TEST, VALIDATION = "test", "validation"  # the parts of a data set that a task is evaluated on


def counts(manifest: TaskManifest, part: str = TEST) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """Return a manifest's rows by protocol: one a task seen, see `TaskManifest.metrics`.

    `part` is TEST or VALIDATION; empty where nothing was held out for validation.
    """
    return manifest.validation if part == VALIDATION else manifest.metrics


def accuracies(
    manifest: TaskManifest, protocol: str, field: str = "correct", part: str = TEST
) -> np.ndarray:
    """Return the accuracy on each task seen, `[tasks seen]`, after the manifest's task.

    `field` is "correct", or "task_correct" for images that were given to their own task.
    """
    rows = counts(manifest, part)[protocol]
    return np.array([100 * row[field] / row["total"] for row in rows])


def accuracy_matrix(
    manifests: Manifests, protocol: str, field: str = "correct", part: str = TEST
) -> np.ndarray:
    """Return `accuracies` as a matrix `[task, trained through]`; 0 below the diagonal."""
    matrix = np.zeros((len(manifests), len(manifests)))
    for stage, manifest in enumerate(manifests):
        matrix[: stage + 1, stage] = accuracies(manifest, protocol, field, part)
    return matrix


def task_confusion(manifest: TaskManifest, protocol: str) -> np.ndarray:
    """Return the share of each task's test images that was given to each task, after a task.

    `[task seen, task given to]`, in percent.
    """
    rows = manifest.metrics[protocol]
    confusion = np.zeros((len(rows), manifest.num_tasks))
    for task, row in enumerate(rows):
        for given, count in row["identified"].items():
            confusion[task, int(given)] = 100 * count / row["total"]
    return confusion


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (n − 1; 0 for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


class RunningFigures:
    """The figures of continual learning, stage by stage.

    A stage takes time and memory linear in the tasks seen, however many stages came before.
    """

    def __init__(self):
        self._best = np.zeros(0)  # of each task at any stage so far
        self._learned = np.zeros(0)  # of each task just after learning it
        self._sum_of_averages = 0.0
        self._sum_of_learned = 0.0

    def add(self, accuracy: np.ndarray) -> dict[str, float]:
        """Return the figures after one more task, given the accuracy on each task seen.

        `accuracy` is `[tasks seen]`, one longer than at the call before. The figures:

        - `final_average`: mean over the tasks seen, as they are now (A_T).
        - `forgetting`: mean over the tasks before the newest of (best accuracy at any stage −
          accuracy now), as the published code has it; 0 for one task.
        - `backward_transfer`: mean over the same tasks of (accuracy now − accuracy just after
          learning).
        - `average_incremental`: mean over the stages of the average accuracy of the tasks seen.
        - `just_learned`: mean accuracy of each task just after learning it.
        """
        count = len(self._learned) + 1
        if accuracy.shape != (count,):
            raise ValueError(f"accuracy: shape {accuracy.shape}, expected {(count,)}")
        before, newest = accuracy[:-1], accuracy[-1]
        best, older = np.maximum(self._best, before), max(count - 1, 1)
        average = _sum(before) + newest
        self._sum_of_averages += average / count
        self._sum_of_learned += newest
        figures = {
            "final_average": average / count,
            "forgetting": _sum(best - before) / older,
            "backward_transfer": _sum(before - self._learned) / older,
            "average_incremental": self._sum_of_averages / count,
            "just_learned": self._sum_of_learned / count,
        }
        self._best, self._learned = np.append(best, newest), np.append(self._learned, newest)
        return {name: float(value) for name, value in figures.items()}


def _sum(values: np.ndarray) -> float:
    """Add up from the first to the last, so that a figure has the same digits everywhere."""
    return np.cumsum(values)[-1] if len(values) else 0.0


def by_stage(columns: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the figures of `RunningFigures.add` after each stage, `[stages]` each.

    `columns` are the accuracies on the tasks seen, `[tasks seen]`, of each stage.
    """
    running = RunningFigures()
    stages = [running.add(column) for column in columns]
    return {name: np.array([stage[name] for stage in stages]) for name in stages[-1]}


def columns_of(matrix: np.ndarray) -> list[np.ndarray]:
    """Split a matrix `[task, trained through]` by stage: what is on and above its diagonal."""
    return [matrix[: stage + 1, stage] for stage in range(matrix.shape[1])]


def summarize(matrix: np.ndarray) -> dict[str, float]:
    """Return the figures after the last stage of a matrix `[task, trained through]`."""
    return {name: float(values[-1]) for name, values in by_stage(columns_of(matrix)).items()}


def figures(manifests: Manifests, protocol: str, part: str = TEST) -> dict[str, float]:
    """Return the figures of one protocol after the last task, and `task_id_accuracy`.

    The latter is the mean over the tasks of the share of images given to their own task.
    """
    identified = accuracies(manifests[-1], protocol, "task_correct", part)
    summary = summarize(accuracy_matrix(manifests, protocol, part=part))
    return summary | {"task_id_accuracy": float(identified.mean())}
