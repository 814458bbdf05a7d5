"""Two finished runs side by side: settings, figures, tasks, and the test images that only one of
them gets right.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from soft_jax import paths
from soft_jax.config import DEFAULTS
from soft_jax.errors import UserError
from soft_jax.evaluation import markdown as markdown_lib
from soft_jax.evaluation import metrics, predictions
from soft_jax.evaluation.metrics import Manifests
from soft_jax.evaluation.predictions import Predictions
from soft_jax.inference import rules
from soft_jax.store import records
from soft_jax.store.folder import Reader
from soft_jax.store.records import RunRecord

FIGURES = {"final_average": "final", "forgetting": "forget", "task_id_accuracy": "task id"}


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run to compare: its folder, what makes it this run, and the manifests of its tasks."""

    root: Path
    record: RunRecord
    manifests: Manifests

    @property
    def title(self) -> str:
        """Return the run's folder, method, data and seed."""
        settings = self.record.settings
        return (
            f"`{paths.shown(self.root)}`: {settings['method']} on {settings['dataset']}, "
            f"{len(self.manifests)} task(s), seed {settings['seed']}"
        )


def load(root: Path) -> FinishedRun:
    """Return the run of a folder. Raises UserError where there is none, or not all of it yet."""
    reader = Reader(root)
    record, there = reader.read_record(), reader.present()
    if not there:
        raise UserError(f"{paths.shown(root)}: no task is finished yet")
    reader.check_complete(there)
    manifests = [reader.load_task_manifest(task) for task in there]
    if len(there) < manifests[-1].num_tasks:
        raise UserError(
            f"{paths.shown(root)}: {len(there)} of {manifests[-1].num_tasks} tasks are finished; "
            "compare it when all are"
        )
    return FinishedRun(root, record, manifests)


def markdown(root_a: Path, root_b: Path) -> str:
    """Return what two runs have otherwise, as Markdown that reads well at 80 columns.

    Raises UserError as `load` does.
    """
    a, b = load(root_a), load(root_b)
    shared = [key for key in a.manifests[-1].metrics if key in b.manifests[-1].metrics]
    learned = [key for key in shared if not _is_same_reference(a, b, key)]
    text = [
        "# Two runs side by side",
        "",
        f"- A: {a.title}",
        f"- B: {b.title}",
        "",
        "## Settings that differ",
        "",
        *(f"- {line}" for line in differences(a.record, b.record) or ["none"]),
        "",
        "## Figures after the last task, percent of test images",
        "",
        *_figures(a, b, shared),
        "",
        "## Final accuracy by task, B − A in points",
        "",
        *_by_task(a, b, learned),
        "",
        "## McNemar's test on the same test images",
        "",
        *_mcnemar(a, b, learned),
        "",
    ]
    return "\n".join(text)


def differences(a: RunRecord, b: RunRecord) -> list[str]:
    """List in which settings, weights, images or classes of the tasks two runs differ."""
    changes = records.changed(a, b.settings, DEFAULTS)
    lines = [f"{name}: {of_a} in A, {of_b} in B" for name, of_a, of_b in changes]
    if a.backbone_sha256 != b.backbone_sha256:
        lines.append("the weights of the backbone (by their SHA-256)")
    if a.dataset_sha256 != b.dataset_sha256:
        lines.append("the images that are trained or tested on (by their SHA-256)")
    if a.tasks != b.tasks:
        lines.append("the classes of the tasks")
    return lines


def _figures(a: FinishedRun, b: FinishedRun, protocols: Sequence[str]) -> list[str]:
    rows: list[list[str]] = []
    for protocol in protocols:
        title = rules.title(protocol)
        of_a, of_b = (metrics.figures(run.manifests, protocol) for run in (a, b))
        if _is_same_reference(a, b, protocol):
            rows.append([title, "both", *_cells(of_a, protocol)])
            continue
        difference = {name: of_b[name] - of_a[name] for name in FIGURES}
        rows.append([title, "A", *_cells(of_a, protocol)])
        rows.append(["", "B", *_cells(of_b, protocol)])
        rows.append(["", "B−A", *_cells(difference, protocol, sign="+")])
    alone = [
        f"Only {name} has {', '.join(rules.title(key) for key in keys)}."
        for name, run in (("A", a), ("B", b))
        if (keys := [key for key in run.manifests[-1].metrics if key not in protocols])
    ]
    columns = ("protocol", "run", *FIGURES.values())
    return [*markdown_lib.table(columns, rows, left=("protocol", "run")), *(alone and ["", *alone])]


def _cells(figures: Mapping[str, float], protocol: str, sign: str = "") -> list[str]:
    task_given = rules.grouping_of(protocol) == rules.ORACLE
    return [
        "–" if name == "task_id_accuracy" and task_given else f"{figures[name]:{sign}.2f}"
        for name in FIGURES
    ]


def _is_same_reference(a: FinishedRun, b: FinishedRun, protocol: str) -> bool:
    """Whether a protocol without any network's answer, which no training changes, is alike."""
    return rules.is_reference(protocol) and all(
        of_a.metrics.get(protocol) == of_b.metrics.get(protocol)
        for of_a, of_b in zip(a.manifests, b.manifests, strict=False)
    )


def _by_task(a: FinishedRun, b: FinishedRun, protocols: Sequence[str]) -> list[str]:
    last_a, last_b = a.manifests[-1], b.manifests[-1]
    if [m.class_names for m in a.manifests] != [m.class_names for m in b.manifests]:
        return ["Left out: the tasks of the two runs are not of the same classes."]
    columns = [
        metrics.accuracies(last_b, protocol) - metrics.accuracies(last_a, protocol)
        for protocol in protocols
    ]
    rows = [
        (str(task + 1), *(f"{difference:+.1f}" for difference in of_task))
        for task, of_task in enumerate(zip(*columns, strict=True))
    ]
    numbers = [f"({number})" for number in range(1, len(protocols) + 1)]
    meant = (f"{n} {rules.title(p)}" for n, p in zip(numbers, protocols, strict=True))
    return [*markdown_lib.table(("task", *numbers), rows), "", "; ".join(meant) + "."]


@dataclasses.dataclass(frozen=True)
class Discordant:
    """How many of the same images only run A, and only run B, gets right."""

    only_a: int
    only_b: int

    @property
    def p_value(self) -> float:
        """Return p of McNemar's exact test (McNemar 1947): both counts are equally likely.

        It is the two-sided binomial test of one count among both; 1 where there are none.
        """
        both = self.only_a + self.only_b
        return float(binomtest(self.only_a, both).pvalue) if both else 1.0


def discordant(a: Predictions, b: Predictions, protocol: str) -> Discordant:
    """Count the images of which one run's answer is right and the other's is not.

    `a` and `b` are of the same images in the same order.
    """
    right_a, right_b = a.correct(protocol), b.correct(protocol)
    return Discordant(int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum()))


def same_images(a: FinishedRun, b: FinishedRun) -> tuple[Predictions, Predictions]:
    """Return both runs' predictions for the test images that both have, in the same order.

    Runs on one data set may differ in their training images. Raises UserError where their test
    images differ, or a run has no predictions.
    """
    settings_a, settings_b = a.record.settings, b.record.settings
    if settings_a["dataset"] != settings_b["dataset"]:
        raise UserError(f"the data sets differ: {settings_a['dataset']}, {settings_b['dataset']}")
    of_each = "test_images_per_class"  # an image's place is that among those taken
    if _setting(a, of_each) != _setting(b, of_each):
        raise UserError(f"{of_each} differs: {_setting(a, of_each)}, {_setting(b, of_each)}")
    # The hash is of training and test images together.
    same_training = _setting(a, "train_images_per_class") == _setting(b, "train_images_per_class")
    if a.record.dataset_sha256 != b.record.dataset_sha256 and same_training:
        raise UserError("the images differ, by their SHA-256")
    of_a, of_b = predictions.read(a.root), predictions.read(b.root)
    shared, rows_a, rows_b = np.intersect1d(of_a.index, of_b.index, return_indices=True)
    if not len(shared):
        raise UserError("the runs have no test image in common")
    of_a, of_b = _take(of_a, rows_a), _take(of_b, rows_b)
    if (of_a.truth, of_a.files) != (of_b.truth, of_b.files):
        raise UserError("images at the same place in the test set have other classes or files")
    return of_a, of_b


def _setting(run: FinishedRun, name: str) -> object:
    return run.record.settings.get(name, DEFAULTS[name])


def _take(table: Predictions, rows: np.ndarray) -> Predictions:
    def of(values: Sequence[str]) -> tuple[str, ...]:
        return tuple(values[row] for row in rows)

    def of_all(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: column[rows] for key, column in columns.items()}

    return Predictions(
        index=table.index[rows],
        files=of(table.files),
        tasks=table.tasks[rows],
        truth=of(table.truth),
        answers={key: of(answers) for key, answers in table.answers.items()},
        probabilities=of_all(table.probabilities),
    )


def _mcnemar(a: FinishedRun, b: FinishedRun, protocols: Sequence[str]) -> list[str]:
    try:
        of_a, of_b = same_images(a, b)
    except UserError as error:
        return [f"Left out: {error}."]
    rows = []
    for protocol in protocols:
        if protocol not in of_a.answers or protocol not in of_b.answers:
            continue
        counts = discordant(of_a, of_b, protocol)
        # Images of a batch are decided together, so they are not separate trials.
        together = rules.grouping_of(protocol) == rules.BATCH_VOTE
        p_value = "–" if together else _shown(counts.p_value)
        rows.append((rules.title(protocol), str(counts.only_a), str(counts.only_b), p_value))
    text = (
        f"Of {len(of_a.index):,} images: those that only A, and only B, gets right. p is the "
        "chance of so uneven a split, or a more uneven one, if neither were better. It is about "
        "these two trained runs; other seeds may differ by more. A batch's images are decided "
        "together, which the test does not allow (–)."
    )
    columns = ("protocol", "only A", "only B", "p")
    return [text, "", *markdown_lib.table(columns, rows, left=("protocol",))]


def _shown(p_value: float) -> str:
    return "< 0.0001" if p_value < 0.0001 else f"{p_value:.4f}"
