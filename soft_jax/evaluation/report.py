"""What a run says about itself: `results.jsonl`, the Markdown report with its pictures, and the
tables on screen.
"""

import json
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from soft_jax.evaluation import calibration, metrics, pictures
from soft_jax.evaluation.metrics import TEST, VALIDATION, Manifests
from soft_jax.evaluation.published import published, published_clip, row_name
from soft_jax.inference.rules import (
    BATCH_VOTE,
    ORACLE,
    PER_SAMPLE,
    FrozenFeatures,
    TaskGiven,
    is_reference,
    title,
)
from soft_jax.methods import registry
from soft_jax.paths import Place
from soft_jax.store import files
from soft_jax.store.files import write_text
from soft_jax.store.records import TaskManifest

# Seconds of a task after which the report is written before the run ends. Writing it looks at every
# task before, so that after each of many short ones it would take longer than they do.
WRITTEN_AFTER = 60

FOOTNOTE = (
    "* the published protocol: one task id for a test batch that holds a single task, so "
    "the batch leaks the task"
)
LEGEND = (
    "final: mean accuracy over all tasks after the last; learned: of each task just after it; "
    "incr.: of the tasks seen, mean over the "
    "stages; forget: best minus final, mean over the tasks before the last; backw.: final minus "
    "learned, over the same; task id: test "
    "images given to their own task"
)
COLUMNS = {
    "final_average": "final",
    "just_learned": "learned",
    "average_incremental": "incr.",
    "forgetting": "forget",
    "backward_transfer": "backw.",
    "task_id_accuracy": "task id",
}


class Report:
    """The files of a run that are made from its tasks' manifests, kept up as tasks are finished.

    `results.jsonl` gets the lines of each task when it is added; whatever else is in the file is
    replaced. `report.md` and its pictures are written at the end of the `with` block, however that
    ends, and before that only after tasks of more than `WRITTEN_AFTER` seconds that are long
    beside the writing. Adding a task costs time linear in the tasks before it.

        with Report(store.root, dataclasses.asdict(config), config.benchmark, manifests) as report:
            ...
            report.add(manifest)

    One program at a time may have a `Report` of a folder, as `Store` sees to.
    """

    def __init__(
        self,
        root: Place,
        config: Mapping[str, Any],
        benchmark: str,
        manifests: Manifests = (),
        tell: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    ):
        """Begin with the `manifests` of the tasks that are finished.

        `root` is the run's folder, `config` its settings, `benchmark` their short name. `tell` is
        called with the rows of `results.jsonl` of each task, finished ones too. The run may
        have been killed between a task and its lines, or inside a line: where `results.jsonl` is
        not what these manifests make it, it is written anew.
        """
        self._root, self._config, self._benchmark = root, config, benchmark
        self._manifests = list(manifests)
        self._rows, self._tell = ResultRows(config, benchmark), tell
        self._is_written, self._write_seconds = False, 0.0
        text = "".join(map(self._lines, self._manifests)).encode()
        self._size = len(text)  # bytes in results.jsonl
        if (self._results.read_bytes() if self._results.is_file() else b"") != text:
            self._write_results()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            self.write()
        except Exception:
            if error is None:  # else what ended the run is to be told, not what came of it
                raise

    @property
    def _results(self) -> Place:
        return self._root / "results.jsonl"

    def add(self, manifest: TaskManifest) -> None:
        """Take in the next task: append its lines to `results.jsonl`.

        Raises UserError or OSError where the folder can't be written.
        """
        self._manifests.append(manifest)
        self._is_written = False
        self._append(self._lines(manifest).encode())
        # Drawing takes longer with every task: at most a twentieth of a task's time goes into it.
        if _task_seconds(manifest) > max(WRITTEN_AFTER, 20 * self._write_seconds):
            self.write()

    def write(self) -> None:
        """Write `report.md` and the pictures.

        Nothing is written when they show all tasks already, or when there are no tasks.
        """
        if self._is_written or not self._manifests:
            return
        start = time.monotonic()
        names = pictures.draw(self._root, self._manifests)
        text = markdown(self._root, self._config, self._benchmark, self._manifests, names)
        write_text(self._root / "report.md", text)
        self._is_written, self._write_seconds = True, time.monotonic() - start

    def _lines(self, manifest: TaskManifest) -> str:
        rows = self._rows.add(manifest)
        self._tell(rows)
        return "".join(json.dumps(row) + "\n" for row in rows)

    def _append(self, lines: bytes) -> None:
        if files.of(self._results).append(self._results, lines, self._size):
            self._size += len(lines)
        else:
            self._write_results()

    def _write_results(self) -> None:
        rows = result_rows(self._config, self._benchmark, self._manifests)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(self._results, text)
        self._size = len(text.encode())


class ResultRows:
    """The rows of `results.jsonl`, task by task."""

    def __init__(self, config: Mapping[str, Any], benchmark: str):
        names = {name: config[name] for name in ("method", "seed")}
        self._run = {"benchmark": benchmark} | names
        self._running: dict[tuple[str, str], metrics.RunningFigures] = {}
        self._tasks = 0

    def add(self, manifest: TaskManifest) -> list[dict[str, Any]]:
        """Return the rows of the next task: one for each protocol and part of the data.

        The parts are those that the task is evaluated on.
        """
        self._tasks += 1
        return [
            self._row(manifest, part, protocol)
            for part in (TEST, VALIDATION)
            for protocol in metrics.counts(manifest, part)
        ]

    def _row(self, manifest: TaskManifest, part: str, protocol: str) -> dict[str, Any]:
        grouping, name = protocol.split("/")
        accuracy = metrics.accuracies(manifest, protocol, part=part)
        identified = metrics.accuracies(manifest, protocol, "task_correct", part)
        running = self._running.setdefault((part, protocol), metrics.RunningFigures())
        return {
            **self._run,
            "tasks_trained": self._tasks,
            "part": part,
            "protocol": grouping,
            "task_id": name,
            **running.add(accuracy),
            "task_id_accuracy": float(identified.mean()),
            "accuracy_by_task": accuracy.tolist(),
            "images": sum(row["total"] for row in metrics.counts(manifest, part)[protocol]),
            "seconds": manifest.seconds,
        }


def result_rows(
    config: Mapping[str, Any], benchmark: str, manifests: Manifests
) -> list[dict[str, Any]]:
    """Return the rows of `results.jsonl` for all tasks."""
    rows = ResultRows(config, benchmark)
    return [row for manifest in manifests for row in rows.add(manifest)]


class StageTable:
    """The table on screen that grows by a line with each task.

    Accuracy is in percent of test images, the mean over the tasks seen so far. Where the screen is
    too narrow for all columns, the published protocols by batch are left to the final table.

        table = StageTable(manifest.metrics, console.width)
        print(table.heading)
        print(table.line(manifest))
    """

    def __init__(self, protocols: Iterable[str], width: int):
        """Lay out a table of `protocols` (keys) on `width` columns of characters."""
        if self._lay_out(protocols, width) < _CLASSES[0]:
            self._lay_out([key for key in protocols if not key.startswith(f"{BATCH_VOTE}/")], width)

    def _lay_out(self, protocols: Iterable[str], width: int) -> int:
        """Set the columns; return how many characters are left for the classes' names."""
        groups: dict[str, dict[str, list[str]]] = {}  # lines of a heading by group and protocol
        for key in protocols:
            group, _, name = title(key).partition(", ")
            groups.setdefault(group, {})[key] = _wrapped(name or group)
        self._headings = {key: lines for group in groups.values() for key, lines in group.items()}
        self._widths: list[int] = []
        self._groups: list[tuple[str, int]] = []  # title and width
        for name, headings in groups.items():
            widths = [max(5, *map(len, lines)) for lines in headings.values()]
            gaps = 2 * (len(widths) - 1)
            widths[0] += max(0, len(name) - sum(widths) - gaps)
            self._widths += widths
            self._groups.append((name, sum(widths) + gaps))
        left = width - len("task") - len("seconds") - 2 * 2 - sum(w + 2 for w in self._widths)
        self._classes = min(max(left, _CLASSES[0]), _CLASSES[1])
        return left

    @property
    def heading(self) -> str:
        """Return the lines above the first task's."""
        groups = "  ".join(f"{group:<{width}}" for group, width in self._groups)
        blank = " " * (len("task") + 2 + self._classes + 2)
        names = list(self._headings.values())
        depth = max(map(len, names))
        # Names of fewer lines stand at the bottom.
        rows = zip(*([""] * (depth - len(name)) + name for name in names), strict=True)
        *above, bottom = (list(row) for row in rows)
        return "\n".join(
            [
                "Percent of the test images of all tasks so far that are named right:",
                "",
                (blank + groups).rstrip(),
                *(self._joined("", "", cells, "") for cells in above),
                self._joined("task", "classes", bottom, "seconds"),
            ]
        )

    def line(self, manifest: TaskManifest) -> str:
        """Return the line of the latest task, the one of `manifest`."""
        cells = [
            f"{metrics.accuracies(manifest, key).mean():.1f}" if key in manifest.metrics else ""
            for key in self._headings
        ]
        names = _short_names(manifest.class_names, self._classes)
        seconds = f"{_task_seconds(manifest):.1f}"
        return self._joined(str(manifest.task + 1), names, cells, seconds)

    def _joined(self, task: str, classes: str, cells: Sequence[str], seconds: str) -> str:
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells, self._widths, strict=True))
        first = f"{task:>4}  {classes:<{self._classes}}"
        return "  ".join([first, *numbers, f"{seconds:>7}"]).rstrip()


# Characters for a task's classes in `StageTable`, at least and at most.
_CLASSES = (8, 24)


def _wrapped(name: str) -> list[str]:
    """Break a protocol's name into short lines; the star of the footnote is not left alone."""
    lines = textwrap.wrap(name.replace(" *", "_*"), 8, break_long_words=False)
    return [line.replace("_*", " *") for line in lines]


def _short_names(names: Sequence[str], width: int) -> str:
    """Return class names within `width` characters: all, or the first and how many more."""
    if len(whole := ", ".join(names)) <= width:
        return whole
    more = f" +{len(names) - 1}" if len(names) > 1 else ""
    room = width - len(more)
    first = names[0] if len(names[0]) <= room else names[0][: room - 1] + "…"
    return first + more


def gain(manifests: Manifests) -> str:
    """Say what training added to the frozen features, as `gain_of_runs` says it of one run."""
    last = manifests[-1]
    return gain_of_runs(
        {
            part: {
                key: [float(metrics.accuracies(last, key, part=part).mean())]
                for key in metrics.counts(last, part)
            }
            for part in (TEST, VALIDATION)
        }
    )


def gain_of_runs(finals: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Say what training added to the frozen features, in points of the final accuracy.

    `finals` has the final accuracies by part of the data and protocol, one a run; of several, their
    means and the standard deviation of what was added are said. With the task given, and without
    it: there the method's best rule that looks at one image at a time stands for it, chosen by
    validation images where there are any. Empty where a run has no figures of the frozen features,
    as runs of older versions.
    """
    frozen = f"{PER_SAMPLE}/{FrozenFeatures.name}"
    frozen_given = f"{ORACLE}/{FrozenFeatures.name}"
    if not {frozen, frozen_given} <= finals[TEST].keys():
        return ""
    chosen_by = finals.get(VALIDATION) or finals[TEST]
    rules = [key for key in chosen_by if key.startswith(f"{PER_SAMPLE}/") and not is_reference(key)]
    best = max(rules, key=lambda key: np.mean(chosen_by[key]))
    keys = (best, frozen, f"{ORACLE}/{TaskGiven.name}", frozen_given)
    trained, before, given, given_before = (np.array(finals[TEST][key]) for key in keys)
    return (
        f"Given the task, what was trained {_added(given, given_before)} the frozen features "
        f"({given.mean():.1f} against {given_before.mean():.1f}); without it, "
        f"{_added(trained, before)} them ({trained.mean():.1f} by {title(best).partition(', ')[2]},"
        f" the best of its rules, against {before.mean():.1f})."
    )


def _added(trained: np.ndarray, frozen: np.ndarray) -> str:
    points = round(float(trained.mean()), 1) - round(float(frozen.mean()), 1)  # as shown
    _, deviation = metrics.mean_and_deviation(trained - frozen)
    spread = f" ± {deviation:.1f}" if len(trained) > 1 else ""
    if abs(points) < 0.05:
        return f"adds {f'0.0{spread} points' if spread else 'nothing'} to"
    verb, at = ("adds", "to") if points > 0 else ("takes", "off")
    return f"{verb} {abs(points):.1f}{spread} points {at}"


def show(console: Console, benchmark: str, manifests: Manifests) -> None:
    """Print the figures after the last task, on test images, and on those held out if any."""
    for part in (TEST, VALIDATION):
        if protocols := metrics.counts(manifests[-1], part):
            held_out = ", images held out of training" if part == VALIDATION else ""
            table = Table(
                box=SIMPLE,
                show_edge=False,
                padding=(0, 0 if console.width < 90 else 1, 0, 0),
                pad_edge=False,
                title=f"\n{benchmark} after {len(manifests)} tasks, percent{held_out}\n",
                title_justify="left",
            )
            table.add_column("protocol")  # what is too long for a narrow terminal goes on below
            for heading in COLUMNS.values():
                table.add_column(heading, justify="right", no_wrap=True)
            for protocol in protocols:
                table.add_row(title(protocol), *_figure_cells(manifests, protocol, part))
            console.print(table)
    console.print(f"\n{FOOTNOTE}\n{LEGEND}", highlight=False)
    if sentence := gain(manifests):
        console.print(f"\n{sentence}", style="bold", highlight=False)
    console.print(f"\n{_time(manifests)}", highlight=False)


def markdown(
    root: Place,
    config: Mapping[str, Any],
    benchmark: str,
    manifests: Manifests,
    drawn: Sequence[str],
) -> str:
    """Return the report as Markdown; `drawn` are the names of its pictures' files."""
    last = manifests[-1]
    settings = ", ".join(f"{key}={value}" for key, value in config.items())
    of_clip = registry.parse(config["method"]).host.reads_text
    added = gain(manifests)
    lines = [
        f"# {config['method']} on {benchmark}, seed {config['seed']}",
        "",
        _shown_tasks(manifests),
        "",
        *([added, ""] if added else []),
        *_figure_lines(manifests, TEST),
        escaped(FOOTNOTE),
        "",
        f"({LEGEND}.)",
        "",
        _time(manifests),
        "",
        *_validation_lines(manifests),
        *_probability_lines(manifests),
        *_size_lines(root, manifests),
        *_matrix_lines(manifests),
        *_drift_lines(manifests),
        *(_published_clip_lines if of_clip else _published_lines)(benchmark),
        *(f"![{name}]({name})\n" for name in drawn),
        f"Backbone {last.backbone['name']}, SHA-256 {last.backbone['sha256']}.",
        "",
        f"Settings: {settings}.",
        "",
    ]
    return "\n".join(lines)


def _shown_tasks(manifests: Manifests) -> str:
    return f"After {len(manifests)} of {manifests[-1].num_tasks} tasks; percent of test images."


def shows(root: Place, manifests: Manifests) -> bool:
    """Return whether `report.md` in a run's folder shows all of these tasks.

    It does not where the run was killed between its last task and its report.
    """
    file = root / "report.md"
    return file.is_file() and f"\n{_shown_tasks(manifests)}\n" in file.read_text("utf-8")


def escaped(text: str) -> str:
    """Return text with its stars escaped, so that Markdown shows them as stars."""
    return text.replace("*", "\\*")


def _figure_cells(manifests: Manifests, protocol: str, part: str) -> list[str]:
    values = metrics.figures(manifests, protocol, part)
    return [f"{values[column]:.2f}" for column in COLUMNS]


def _figure_lines(manifests: Manifests, part: str) -> list[str]:
    lines = [
        "| protocol | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for protocol in metrics.counts(manifests[-1], part):
        cells = [escaped(title(protocol)), *_figure_cells(manifests, protocol, part)]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _validation_lines(manifests: Manifests) -> list[str]:
    if not metrics.counts(manifests[-1], VALIDATION):
        return []
    return [
        "## On images held out of training",
        "",
        "Percent of validation images. Settings chosen by these were not chosen on test images.",
        "",
        *_figure_lines(manifests, VALIDATION),
    ]


def _probability_lines(manifests: Manifests) -> list[str]:
    """Say how far each protocol's probabilities can be taken at their word."""
    last = manifests[-1]
    counted = last.calibration
    if not counted:
        return []
    temperatures = last.temperature
    where = (
        "Temperatures were fitted on the images held out of training."
        if temperatures
        else "No images were held out to fit temperatures on, so that they are 1."
    )
    lines = [
        "## Probabilities",
        "",
        "Of the answers to all test images after the last task: their mean probability, the "
        "percentage that is right, and the expected calibration error (ECE), which is 0 where of "
        f"the answers given with probability p a share p is right. {where}",
        "",
        "| protocol | mean probability | right | ECE | temperature |",
        "|---|---|---|---|---|",
    ]
    for protocol, counts in counted.items():
        images = max(sum(counts["count"]), 1)
        sure, right = (100 * sum(counts[name]) / images for name in ("confidence", "correct"))
        lines.append(
            f"| {escaped(title(protocol))} | {sure:.2f} | {right:.2f} | "
            f"{calibration.expected_error(counts):.2f} | {temperatures.get(protocol, 1):.3g} |"
        )
    return [*lines, ""]


def _task_seconds(manifest: TaskManifest) -> float:
    return sum(manifest.seconds.get(part, 0) for part in ("train", "statistics", "evaluate"))


def _time(manifests: Manifests) -> str:
    parts = ("train", "input_wait", "statistics", "evaluate")
    train, wait, statistics, evaluate = (
        sum(manifest.seconds.get(part, 0) for manifest in manifests) for part in parts
    )
    return (
        f"Time: {train:.0f} s training ({wait:.1f} s of it waiting for batches), {statistics:.0f} "
        "s statistics, "
        f"{evaluate:.0f} s evaluation, compilation included."
    )


def _size_lines(root: Place, manifests: Manifests) -> list[str]:
    last = manifests[-1]
    adapter = last.parameters["adapter"] - last.parameters["fixed"]
    shared, sizes = last.parameters["shared"], last.bytes
    exemplars = sizes.get("exemplars", 0)
    there = files.of(root)
    names = sorted(name for name in there.checkpoints(root / "tasks") if name.isdigit())
    on_disk = [there.size(root / "tasks" / name) for name in names]
    of_images = f" ({exemplars:,} of it images, stored as their rows in the training set)"
    lines = [
        "## Size",
        "",
        f"- Trainable parameters of one task: {adapter:,} of its own, and {shared:,} shared by "
        "all.",
        f"- Of all {len(manifests)} tasks: {adapter * len(manifests) + shared:,}.",
        f"- Bytes that one task keeps: {sizes['adapter']:,} adapter, {sizes['statistics']:,} "
        "statistics for prototype task identity, "
        f"{sizes['shared']:,} shared part, {sizes['memory'] + exemplars:,} what the "
        f"method holds of older tasks{of_images if exemplars else ''}.",
        f"- Bytes on disk: {on_disk[-1]:,} of the last task, {sum(on_disk):,} of all.",
    ]
    if last.step_flops:
        lines.append(
            "- Floating point operations of a training step, as XLA counts them: "
            f"{last.step_flops:.4g}."
        )
    return [*lines, ""]


def _matrix_lines(manifests: Manifests) -> list[str]:
    lines = ["## Accuracy by task (rows) after each task trained (columns)", ""]
    stages = range(len(manifests))
    for protocol in manifests[-1].metrics:
        matrix = metrics.accuracy_matrix(manifests, protocol)
        lines += [
            f"{escaped(title(protocol))}:",
            "",
            "| task | " + " | ".join(str(stage + 1) for stage in stages) + " |",
            "|---" * (len(stages) + 1) + "|",
        ]
        for task in stages:
            cells = (f"{matrix[task, s]:.1f}" if s >= task else "" for s in stages)
            lines.append(f"| {task + 1} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _drift_lines(manifests: Manifests) -> list[str]:
    drifts = manifests[-1].weight_drift
    if not drifts:
        return []
    lines = [
        "## How far each task's weights are from the frozen ones",
        "",
        "Relative, |θ_t − θ| / |θ|; at its largest and in the mean over tasks.",
    ]
    lines += ["", "| weight | largest | mean |", "|---|---|---|"]
    for path in sorted(drifts, key=pictures.layer_first):
        values = [m.weight_drift[path] for m in manifests if path in m.weight_drift]
        lines.append(f"| {pictures.label_of(path)} | {max(values):.4f} | {np.mean(values):.4f} |")
    return [*lines, ""]


def _published_clip_lines(benchmark: str) -> list[str]:
    rows = published_clip(benchmark)
    if not rows:
        return []
    lines = [
        "## Published figures",
        "",
        "From arXiv 2411.16073, Table 3, CLIP ViT-B/16 at 224 pixels: accuracy and forgetting. "
        "CIL is under batch_vote (one id for a whole test batch) or, for CLIP and CLIP-PGP, cut "
        "at the batch's task.",
        "",
        "| method | task id | CIL | TIL |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            "{accuracy:.2f} / {forgetting:.2f}".format(**row[f"{benchmark}_{scenario}"])
            for scenario in ("cil", "til")
        ]
        lines.append(f"| {row_name(row)} | {row['task_id']} | {cells[0]} | {cells[1]} |")
    return [*lines, ""]


def _published_lines(benchmark: str) -> list[str]:
    rows = published(benchmark)
    if not rows:
        return []
    lines = [
        "## Published figures",
        "",
        "From arXiv 2411.16073, ViT-B/16 at 224 pixels. Rows with a task id are under batch_vote "
        "(one id for a whole test batch).",
        "",
        "| method | table | protocol | task id | final | forgetting |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        protocol = "batch_vote" if row["task_id"] else "–"
        value = row[benchmark]
        forgetting = "–" if value["forgetting"] is None else f"{value['forgetting']:.2f}"
        lines.append(
            f"| {row_name(row)} | {row['table']} | {protocol} | {row['task_id'] or '–'} | "
            f"{value['accuracy']:.2f} | {forgetting} |"
        )
    return [*lines, ""]
