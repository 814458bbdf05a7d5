"""Every test image's answers after the last task, as tables that people and other programs read.

In a run's folder: `predictions.csv`, a line an image; `mistakes.csv`, the lines that the run's own
rule got wrong, the surest first; `classes.csv`, the accuracy of each class by protocol. Tasks are
counted from 1. They are written anew after each task, for the tasks seen.
"""

import csv
import dataclasses
import io
import itertools
from collections.abc import Sequence

import numpy as np

from soft_jax import paths
from soft_jax.errors import UserError
from soft_jax.paths import Place
from soft_jax.store.files import write_text

FILE = "predictions.csv"
_PROBABILITY = " probability"  # after a protocol's key: the heading of its probabilities


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What every protocol answered to N test images.

    `index` int `[N]` is an image's place in the test set as it is stored, `files` its name where it
    is a file, else ""; `tasks` int `[N]` are from 0, `truth` class names. By protocol: `answers`,
    class names, and `probabilities` float `[N]` of the answers.
    """

    index: np.ndarray
    files: tuple[str, ...]
    tasks: np.ndarray
    truth: tuple[str, ...]
    answers: dict[str, tuple[str, ...]]
    probabilities: dict[str, np.ndarray]

    @classmethod
    def concatenate(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Return the predictions of several tasks as one."""
        keys, chain = parts[0].answers, itertools.chain.from_iterable
        return cls(
            np.concatenate([part.index for part in parts]),
            tuple(chain(part.files for part in parts)),
            np.concatenate([part.tasks for part in parts]),
            tuple(chain(part.truth for part in parts)),
            {key: tuple(chain(part.answers[key] for part in parts)) for key in keys},
            {key: np.concatenate([part.probabilities[key] for part in parts]) for key in keys},
        )

    def correct(self, protocol: str) -> np.ndarray:
        """Return which images a protocol got right, bool `[N]`."""
        return np.asarray(self.answers[protocol]) == np.asarray(self.truth)


def write(root: Place, predictions: Predictions, own: str) -> None:
    """Write the three files into a run's folder; `own` is the protocol that `predict` goes by."""
    write_text(root / FILE, _all(predictions))
    write_text(root / "mistakes.csv", _mistakes(predictions, own))
    write_text(root / "classes.csv", _classes(predictions))


def _all(predictions: Predictions) -> str:
    keys = tuple(predictions.answers)
    pairs = (name for key in keys for name in (key, key + _PROBABILITY))
    rows: list[tuple] = [("index", "file", "task", "class", *pairs)]
    for i, index in enumerate(predictions.index):
        answers = (
            cell
            for key in keys
            for cell in (
                predictions.answers[key][i],
                f"{predictions.probabilities[key][i]:.6f}",
            )
        )
        task = int(predictions.tasks[i]) + 1
        rows.append((int(index), predictions.files[i], task, predictions.truth[i], *answers))
    return _csv(rows)


def _mistakes(predictions: Predictions, own: str) -> str:
    wrong = np.flatnonzero(~predictions.correct(own))
    sure = predictions.probabilities[own]
    rows: list[tuple] = [("index", "file", "task", "class", own, own + _PROBABILITY)]
    for i in wrong[np.argsort(-sure[wrong], kind="stable")]:
        rows.append(
            (
                *(int(predictions.index[i]), predictions.files[i]),
                *(int(predictions.tasks[i]) + 1, predictions.truth[i]),
                *(predictions.answers[own][i], f"{sure[i]:.6f}"),
            )
        )
    return _csv(rows)


def _classes(predictions: Predictions) -> str:
    keys, truth = tuple(predictions.answers), np.asarray(predictions.truth)
    correct = {key: predictions.correct(key) for key in keys}
    rows: list[tuple] = [("class", "task", "images", *keys)]
    for name in dict.fromkeys(predictions.truth):
        members = truth == name
        shares = (f"{100 * correct[key][members].mean():.2f}" for key in keys)
        task = int(predictions.tasks[members][0]) + 1
        rows.append((name, task, int(members.sum()), *shares))
    return _csv(rows)


def _csv(rows: Sequence[tuple]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read(root: Place) -> Predictions:
    """Read what `write` wrote into a run's folder.

    Raises UserError where it is not there or is no such table.
    """
    path = root / FILE
    try:
        text = io.StringIO(paths.read_bytes(path).decode("utf-8"), newline="")
        heading, *rows = csv.reader(text)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not there; the run's next task, or training it again, writes it"
        ) from error
    except (OSError, ValueError) as error:  # no UTF-8, or empty
        raise UserError(f"{path} can't be read: {error}") from error
    fixed, others = heading[:4], heading[4:]
    keys = tuple(others[::2])
    whole = fixed == ["index", "file", "task", "class"]
    whole &= others == [name for key in keys for name in (key, key + _PROBABILITY)]
    if not whole or any(len(row) != len(heading) for row in rows):
        raise UserError(f"{path} is not what a run wrote; remove it, and train the run again")
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(heading)
    try:
        return Predictions(
            np.array(columns[0], int),
            tuple(columns[1]),
            np.array(columns[2], int) - 1,
            tuple(columns[3]),
            {key: tuple(columns[4 + 2 * i]) for i, key in enumerate(keys)},
            {key: np.array(columns[5 + 2 * i], float) for i, key in enumerate(keys)},
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}; remove it, and train the run again") from error
