"""`report.html`: what a library, or a finished run, holds and what its tasks did, as one page.

Everything is taken from what is stored: no image is read, nothing is evaluated again. Only the
weights are looked at anew, each active task's once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from soft_jax import paths
from soft_jax.config import Config, from_settings
from soft_jax.errors import UserError
from soft_jax.evaluation import html, metrics, predictions, report
from soft_jax.evaluation.html import Markup, Section
from soft_jax.evaluation.metrics import Manifests
from soft_jax.experiment.library import Library, kept_transfer
from soft_jax.inference import assembly, rules
from soft_jax.methods import changes, registry
from soft_jax.methods.low_rank import LoRA
from soft_jax.models import backbones
from soft_jax.models.protocol import Architecture
from soft_jax.store import library
from soft_jax.store.folder import Reader
from soft_jax.store.library import ACTIVE, LibraryReader, LibraryState, Version

Record = Mapping[str, Any]  # of the log
FILE = "report.html"
MOST_RECORDS = 200  # of the log, the newest
MOST_IN_DETAIL = 8  # tasks whose weights are shown one by one
_MOST_PAIRS = 12  # in a list of the strongest
_MOST_CLASSES = 8  # that are named beside a task
_SHOWN = {"given": "task given", "per_sample": "each image by itself"}
FORMULA = (
    "‖W − θ‖ / ‖θ‖ in percent, in 2-norms, where θ is a kernel of the frozen network and W what "
    "the task has in its place"
)


def write(
    root: str | PathLike, output: str | PathLike | None = None, console: Console | None = None
) -> Path:
    """Write the report of a library or a finished run; return its file.

    That is `output`, or report.html in the folder. Raises UserError where there is neither, a run
    is not finished, or the file can't be written or is something else.
    """
    opened = Library.open(root, console)
    file = opened.root / FILE if output is None else paths.local(output, "--output")
    with paths.making(file, "--output"):
        html.check_output(file)  # before what takes long
        html.write(file, page(opened))
    return file


def page(opened: Library) -> str:
    """Return the report of a library, or of a finished run's folder, as HTML."""
    reader, state = LibraryReader(opened.root), opened.state()
    name = opened.root.absolute().name
    if state.changes:  # else it is a run that nothing was changed of
        title, lead = f"Library {name}", _library_lead(reader, state)
        records = reader.log(state)
        sections = _of_library(reader, state, records)
    else:
        run = Reader(opened.root)
        run.read_record()
        manifests = [run.load_task_manifest(task) for task in run.present()]
        title, lead = f"Run {name}", _run_lead(state, manifests)
        sections, records = _of_run(reader, state, manifests), []
    sections += _of_weights(opened.console, reader, state)
    sections.append(Section("log", "Log", _log(records, state)))
    return html.page(title, lead, sections, f"Made {library.now()} by soft-jax report,")


# A library.


def _library_lead(reader: LibraryReader, state: LibraryState) -> Markup:
    versions = [version for found in state.tasks.values() for version in found]
    active = state.active.values()
    return html.joined(
        html.paragraph(
            f"{state.config['method']} on {state.config['backbone']}. With the task given, a task "
            "answers the same to the bit, whatever comes and goes beside it."
        ),
        html.facts(
            {
                "active tasks": len(state.active),
                "versions": len(versions),
                "classes": len({class_ for v in active for class_ in v.classes}),
                "changes": state.changes,
                "bytes": f"{sum(map(reader.size, versions)):,}",
                **_means(state),
            }
        ),
    )


def _means(state: LibraryState) -> dict[str, str]:
    if not state.figures:
        return {}
    return {
        _SHOWN[key]: f"{np.mean([row[key] for row in state.figures.values()]):.1f}%"
        for key in _SHOWN
    }


def _of_library(
    reader: LibraryReader, state: LibraryState, records: Sequence[Record]
) -> list[Section]:
    return [
        Section("tasks", "Tasks and versions", _tasks(reader, state)),
        Section("time", "Accuracy over time", _over_time(state, records)),
        Section("transfer", "Transfer", _transfer(reader, state)),
        Section("confusion", "Confusion", _library_confusion(state)),
    ]


def _tasks(reader: LibraryReader, state: LibraryState) -> Markup:
    rows, marked = [], []
    for name, versions in state.tasks.items():
        for version in versions:
            now = state.figures.get(name) if version.state == ACTIVE else None
            if version.state == ACTIVE:
                marked.append(len(rows))
            rows.append(
                (
                    f"{name}@{version.number}",
                    version.state,
                    _classes(state, version),
                    _two(version.learned),
                    _two(now),
                    f"{version.test.get('images', 0):,}",
                    f"{reader.size(version):,}",
                    f"{version.seconds:.0f}",
                    version.created[:10],
                    reader.last_used(version)[:10],
                )
            )
    columns = ("version", "state", "classes", "learned, %", "now, %", "test images", "bytes")
    return html.joined(
        html.table(
            "Versions; those that answer are marked",
            (*columns, "training, s", "made", "last use"),
            rows,
            left=(0, 1, 2),
            marked=marked,
        ),
        html.paragraph(
            "Learned and now: percent of test images with the task given / each image by itself,",
            "when the version was learned and when its task was last accepted.",
            kind="note",
        ),
    )


def _classes(state: LibraryState, version: Version) -> str:
    names = [state.classes[class_] for class_ in version.classes]
    shown = ", ".join(names[:_MOST_CLASSES])
    more = len(names) - _MOST_CLASSES
    return f"{shown} and {more} more" if more > 0 else shown


def _two(figures: Mapping[str, float] | None) -> str:
    return f"{figures['given']:.1f} / {figures['per_sample']:.1f}" if figures else "–"


def _over_time(state: LibraryState, records: Sequence[Record]) -> Markup:
    """Draw the figures of every evaluation at the gate, and those of now."""
    versions = {v.id: (name, v) for name, found in state.tasks.items() for v in found}
    places, stages, hollow = [], [], []
    for found in (record["found"] for record in records):
        figures = {int(id_): row for id_, row in found.get("figures", {}).items()}
        if not figures or found["version"] not in versions:
            continue
        name, version = versions[found["version"]]
        if found["held_back"]:
            hollow.append(len(places))
        places.append(f"{name}@{version.number}")
        # By the names of today, whatever tasks were called then.
        stages.append({versions[i][0]: row for i, row in figures.items() if i in versions})
    if state.figures:
        places, stages = [*places, "now"], [*stages, state.figures]
    if not stages:
        return html.paragraph("Nothing was evaluated yet.")
    names = places
    if max(map(len, places)) > html.LONGEST_PLACE:  # then numbers stand for them
        places = [str(number + 1) for number in range(len(places))]
        names = [f"{place}: {name}" for place, name in zip(places, names, strict=True)]
    drawn = [
        html.curves(
            f"Accuracy, {_SHOWN[key]}",
            places,
            _series(stages, key),
            "percent of test images, at each evaluation by the gate",
            hollow=hollow,
        )
        for key in _SHOWN
    ]
    tasks = list(dict.fromkeys(name for stage in stages for name in stage))
    if len(tasks) <= html.MOST:
        columns = tasks
        rows = [
            [_two(stage.get(name)) if name in stage else "" for name in tasks] for stage in stages
        ]
    else:
        columns = [f"{name}, {_SHOWN[key]}" for key in _SHOWN for name in _series(stages, key)]
        values = [row for key in _SHOWN for row in _series(stages, key).values()]
        rows = [[f"{value:.1f}" for value in row] for row in zip(*values, strict=True)]
    rows = [(place, *row) for place, row in zip(names, rows, strict=True)][-MOST_RECORDS:]
    held = "Hollow points are versions that the gate held back." if hollow else ""
    return html.joined(
        html.side_by_side(*drawn),
        html.paragraph(
            "Each point is what the gate found for all tasks with a version as the active one,",
            "when it was learned, activated or rolled back to.",
            held,
            "" if places is names else "They are numbered as in the figures below.",
            "Versions that were removed since are missing, and what releases without such a log",
            "found; the last point is when the library was last accepted.",
            kind="note",
        ),
        html.folded(
            "The figures",
            html.table(
                "With the task given / each image by itself, percent", ("version", *columns), rows
            ),
        ),
    )


def _series(
    stages: Sequence[Mapping[str, Mapping[str, float]]], key: str
) -> dict[str, list[float | None]]:
    """Return a curve a task, or of many tasks their mean and extremes."""
    tasks = list(dict.fromkeys(name for stage in stages for name in stage))
    if len(tasks) <= html.MOST_CURVES:
        return {
            name: [stage[name][key] if name in stage else None for stage in stages]
            for name in tasks
        }
    values = [[row[key] for row in stage.values()] for stage in stages]
    return {
        f"mean of {len(tasks)} tasks": [float(np.mean(row)) for row in values],
        "lowest": [min(row) for row in values],
        "highest": [max(row) for row in values],
    }


def _transfer(reader: LibraryReader, state: LibraryState) -> Markup:
    """Show what `soft-jax transfer` has measured."""
    versions = state.active
    kept = kept_transfer(reader)
    names, values = list(versions), np.full((len(versions),) * 2, np.nan)
    for column, version in enumerate(versions.values()):
        of = kept.get(str(version.id), {})
        for row, other in enumerate(versions.values()):
            values[row, column] = of.get(str(other.id), np.nan)
    if not np.isfinite(values).any():
        return html.paragraph(
            "Not measured yet: soft-jax transfer measures what each task's network gives to each",
            "other task's images, and the next report shows it.",
        )
    frozen = [kept.get(str(version.id), {}).get("frozen") for version in versions.values()]
    shown, blocks = html.in_blocks(names, values)
    missing = int(np.isnan(values).sum())
    return html.joined(
        html.paragraph(
            "What a ridge regression on the features of one task's network gains on the images of",
            "another task, in points above the same on the frozen network's; measured on training",
            "images held out. Above 0 a network helps, below 0 it harms.",
            f"{missing} pairs are not measured." if missing else "",
        ),
        html.heat_map(
            "Transfer, points",
            shown,
            shown,
            blocks,
            form="{:+.1f}",
            corner="network of ↓ / images of →",
            limits=_around_zero(blocks),
            unit="points",
        ),
        _blocks_note(names, pairs=True),
        html.folded(
            "The strongest pairs",
            _pairs(names, values, "{:+.1f}", ("network of", "images of", "points")),
        ),
        html.folded(
            "The frozen network by itself",
            html.table(
                "Accuracy of the regression on the frozen network, percent",
                ("images of", "percent"),
                [
                    (name, "–" if value is None else f"{value:.1f}")
                    for name, value in zip(names, frozen, strict=True)
                ],
            ),
        ),
    )


def _around_zero(values: np.ndarray) -> tuple[float, float]:
    far = max(float(np.nanmax(np.abs(values))), 1.0)
    return -far, far


def _library_confusion(state: LibraryState) -> Markup:
    active = state.active
    ids = {version.id: place for place, version in enumerate(active.values())}
    names, values = list(active), np.full((len(active),) * 2, np.nan)
    for one, row in state.confusion.items():
        total = max(sum(row.values()), 1)
        values[ids[one]] = 0
        for other, images in row.items():
            values[ids[one], ids[other]] = 100 * images / total
    if not np.isfinite(values).any():
        return html.paragraph(
            "Not known yet: soft-jax learn, activate and rollback evaluate all tasks, and keep",
            "which are confused.",
        )
    return html.joined(
        html.paragraph(
            "To which task the test images of each are given, each image by itself, when the",
            "library was last evaluated. On the diagonal are those that found their own.",
        ),
        _confusion(names, values, "Tasks, percent of the test images"),
    )


def _confusion(names: Sequence[str], values: np.ndarray, caption: str) -> Markup:
    shown, blocks = html.in_blocks(names, values, shares=True)
    heads = ("images of", "given to", "percent")
    return html.joined(
        html.heat_map(
            caption,
            shown,
            shown,
            blocks,
            limits=(0, 100),
            corner="images of ↓ / given to →",
            unit="percent",
        ),
        _blocks_note(names, pairs=True, shares=True),
        html.folded("The most confused pairs", _pairs(names, values, "{:.1f}", heads)),
    )


def _blocks_note(names: Sequence[str], pairs: bool = False, shares: bool = False) -> Markup | str:
    if len(names) <= html.MOST:
        return ""
    cell = "the mean over its rows of the sum of its columns" if shares else "the mean over them"
    return html.paragraph(
        f"There are {len(names)}; neighbours are joined, and a cell is {cell}.",
        "The strongest pairs are listed below." if pairs else "",
        kind="note",
    )


def _pairs(names: Sequence[str], values: np.ndarray, form: str, heads: Sequence[str]) -> Markup:
    """List the pairs of the largest values, and of the most below 0 where there are any.

    No pair is of one and the same.
    """
    values = np.array(values, float)
    np.fill_diagonal(values, np.nan)
    places = [(i, j) for i, j in np.argwhere(np.isfinite(values)) if values[i, j]]
    places.sort(key=lambda place: -values[place])
    chosen = places[:_MOST_PAIRS]
    chosen += [p for p in places[_MOST_PAIRS:][-_MOST_PAIRS:] if values[p] < 0]
    rows = [(names[i], names[j], form.format(values[i, j]).replace("-", "−")) for i, j in chosen]
    if not rows:
        return html.paragraph("There are none.")
    return html.table("Pairs, the strongest first", heads, rows, left=(0, 1))


def _log(records: Sequence[Record], state: LibraryState) -> Markup:
    if not records:
        return html.paragraph(
            "A run has no log: its tasks were planned before it began, and trained in turn."
        )
    newest = records[::-1][:MOST_RECORDS]
    rows = [
        (
            record["number"],
            record["when"].replace("T", " ").replace("+00:00", " UTC"),
            record["command"],
            record["note"],
            (record["state_before"] or "–")[:12],
            record["state_after"][:12],
        )
        for record in newest
    ]
    whole = records[-1]["state_after"] == state.sha256
    left_out = len(records) - len(newest)
    return html.joined(
        html.table(
            "Changes, the newest first",
            ("number", "when", "command", "note", "state before", "after"),
            rows,
            left=(0, 1, 2, 3, 4, 5),
        ),
        html.paragraph(
            "States are the first digits of their SHA-256.",
            "The last is that of the library now."
            if whole
            else f"That of the library now is {state.sha256[:12]}, another than the last: its file "
            "was changed otherwise than by a command, or is of an older release.",
            f"{left_out} older changes are left out; soft-jax log lists all." if left_out else "",
            kind="note",
        ),
    )


# A run.


def _own_protocol(manifests: Manifests) -> str:
    """Return the protocol that `predict` goes by."""
    last = manifests[-1]
    found = [key for key in last.metrics if rules.grouping_of(key) == rules.PER_SAMPLE]
    able = [key for key in found if (rule := rules.rule_of(key)) and rule.can_stand_alone()]
    return rules.chosen(able or found, last.validation)[0]


def _run_lead(state: LibraryState, manifests: Manifests) -> Markup:
    last, own = manifests[-1], _own_protocol(manifests)
    keys = {
        "as predict answers": own,
        "frozen features": f"{rules.PER_SAMPLE}/{rules.FrozenFeatures.name}",
        "task given": f"{rules.ORACLE}/{rules.TaskGiven.name}",
    }
    final = {
        name: f"{metrics.accuracies(last, key).mean():.1f}%"
        for name, key in keys.items()
        if key in last.metrics
    }
    return html.joined(
        html.paragraph(
            f"{last.config['method']} on {last.config['dataset']}, {last.backbone['name']}, seed "
            f"{last.config['seed']}."
        ),
        html.facts(
            {"tasks": len(manifests), "classes": sum(len(m.classes) for m in manifests), **final}
        ),
        html.paragraph(report.gain(manifests)),
    )


def _of_run(reader: LibraryReader, state: LibraryState, manifests: Manifests) -> list[Section]:
    return [
        Section("figures", "Figures after the last task", _figures(manifests)),
        Section("tasks", "Tasks", _tasks(reader, state)),
        Section("time", "Accuracy over time", _run_over_time(manifests)),
        Section("matrices", "Accuracy by task", _matrices(manifests)),
        Section("confusion", "Confusion", _run_confusion(reader.root, manifests)),
        Section("transfer", "Transfer", _transfer(reader, state)),
    ]


def _figures(manifests: Manifests) -> Markup:
    keys = list(manifests[-1].metrics)
    rows = []
    for key in keys:
        values = metrics.figures(manifests, key)
        rows.append((rules.title(key), *(f"{values[column]:.2f}" for column in report.COLUMNS)))
    references = [i for i, key in enumerate(keys) if rules.is_reference(key)]
    return html.joined(
        html.table(
            "Percent of test images, by protocol; marked rows cost no training",
            ("protocol", *report.COLUMNS.values()),
            rows,
            marked=references,
        ),
        html.paragraph(f"{report.FOOTNOTE}.", kind="note"),
        html.paragraph(f"{report.LEGEND}.", kind="note"),
    )


def _run_over_time(manifests: Manifests) -> Markup:
    places = [str(stage + 1) for stage in range(len(manifests))]
    fields = {"final_average": "Average accuracy", "forgetting": "Forgetting"}
    protocols = list(manifests[-1].metrics)
    values = {
        key: metrics.by_stage(metrics.accuracies(m, key) for m in manifests) for key in protocols
    }
    # As many curves as colours tell apart: those of rules that look at one image come first.
    order = sorted(protocols, key=lambda key: rules.grouping_of(key) == rules.BATCH_VOTE)
    shown = order[: html.MOST_CURVES]
    dashed = [rules.title(key) for key in shown if rules.grouping_of(key) == rules.ORACLE]
    (average, name) = next(iter(fields.items()))
    drawn = html.curves(
        f"{name} of the tasks seen",
        places,
        {rules.title(key): values[key][average].tolist() for key in shown},
        "percent of test images, after each task",
        dashed,
    )
    rows = [
        (rules.title(key), *(f"{value:.1f}" for value in values[key][average])) for key in protocols
    ]
    every = range(0, len(places), max(1, -(-len(places) // html.MOST)))
    rows = [(row[0], *(row[1 + i] for i in every)) for row in rows]
    return html.joined(
        drawn,
        html.folded(
            "The figures",
            html.table(
                "Average accuracy after so many tasks, percent",
                ("protocol", *(places[i] for i in every)),
                rows,
            ),
        ),
    )


def _matrices(manifests: Manifests) -> Markup:
    names = [_called(manifest) for manifest in manifests]
    parts = []
    own = _own_protocol(manifests)
    for key in manifests[-1].metrics:
        matrix = metrics.accuracy_matrix(manifests, key)
        matrix[np.tril_indices(len(matrix), -1)] = np.nan
        rows, blocks = html.in_blocks(names, matrix)
        columns = (
            [str(stage + 1) for stage in range(len(names))] if len(names) <= html.MOST else rows
        )
        drawn = html.heat_map(
            rules.title(key),
            rows,
            columns,
            blocks,
            limits=(0, 100),
            corner="task ↓ / trained through →",
            unit="percent",
        )
        parts.append(html.folded(rules.title(key), drawn, is_open=key == own))
    return html.joined(
        html.paragraph(
            "Accuracy on the test images of each task after each task was trained. The open one",
            "is what predict goes by.",
        ),
        *parts,
        _blocks_note(names),
    )


def _called(manifest: Any) -> str:
    return f"{manifest.task + 1}: {', '.join(manifest.class_names)}"


def _run_confusion(root: Path, manifests: Manifests) -> Markup:
    last, own = manifests[-1], _own_protocol(manifests)
    names = [_called(manifest) for manifest in manifests]
    keys = [key for key in last.metrics if rules.grouping_of(key) == rules.PER_SAMPLE]
    parts = [
        html.paragraph(
            "To which task, and for which class, the test images are taken after the last task,",
            "each image by itself. The open ones are what predict goes by.",
        ),
        html.heading("Tasks"),
    ]
    for key in keys:
        values = metrics.task_confusion(last, key)[:, : len(names)]
        drawn = _confusion(names, values, f"Tasks, by {rules.title(key)}")
        parts.append(html.folded(rules.title(key), drawn, is_open=key == own))
    parts.append(html.heading("Classes"))
    parts.append(_class_confusion(root, manifests, own))
    return html.joined(*parts)


def _class_confusion(root: Path, manifests: Manifests, own: str) -> Markup:
    try:
        answers = predictions.read(root)
    except UserError as error:
        return html.paragraph(str(error))
    names = [name for manifest in manifests for name in manifest.class_names]
    places = {name: place for place, name in enumerate(names)}
    if own not in answers.answers or not {*answers.truth, *answers.answers[own]} <= places.keys():
        return html.paragraph("predictions.csv is not of the last task; train the run again.")
    counts = np.zeros((len(names),) * 2)
    pairs = zip(answers.truth, answers.answers[own], strict=True)
    np.add.at(counts, tuple(np.array([(places[a], places[b]) for a, b in pairs]).T), 1)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return _confusion(names, shares, f"Classes, by {rules.title(own)}")


# Weights.


@dataclasses.dataclass(frozen=True)
class _Changes:
    """How far each active task's weights are from the frozen ones; `rows` are `changes.vector`."""

    of: dict[str, changes.Change]
    rows: dict[str, np.ndarray]
    size: int  # numbers of a change
    drawn: float | None  # overall, of what is drawn and not trained
    failed: dict[str, str]


def _of_weights(console: Console, reader: LibraryReader, state: LibraryState) -> list[Section]:
    try:
        config = from_settings(state.config)
        backbone = assembly.load_backbone(config, state.backbone_sha256)
    except UserError as error:
        body = html.paragraph(f"The weights could not be compared with the frozen ones: {error}")
        return [Section("weights", "Weights", body), Section("tree", "How alike", body)]
    found = _measured(console, reader, state, backbone)
    return [
        Section("weights", "Which weights each task changed", _weights(found, config, backbone)),
        Section("tree", "How alike the tasks are", _alike(found)),
    ]


def _measured(
    console: Console, reader: LibraryReader, state: LibraryState, backbone: backbones.Backbone
) -> _Changes:
    config, architecture = from_settings(state.config), backbone.architecture
    params = jax.device_get(backbone.params)
    found = _Changes({}, {}, 0, None, {})
    size, drawn = 0, None
    for number, (name, version) in enumerate(state.active.items()):
        if number and number % 20 == 0:
            console.print(f"{number} of {len(state.active)} tasks' weights are read")
        try:
            weights = assembly.load_weights(reader, state, name, version, config, backbone)
        except UserError as error:
            found.failed[name] = str(error)
            continue
        weights = jax.device_get(weights)
        change = changes.measure(architecture, params, weights)
        if change is None:
            continue
        if drawn is None:
            size = sum(leaf.size for leaf in jax.tree.leaves(weights))
            drawn = _as_drawn(config, backbone, params)
        found.of[name] = change
        found.rows[name] = changes.vector(params, weights, len(state.active))
    return dataclasses.replace(found, size=size, drawn=drawn)


def _as_drawn(config: Any, backbone: backbones.Backbone, params: Any) -> float | None:
    """Return how far weights are from the frozen ones before they are trained."""
    method = registry.make_method(config, backbone.architecture, ("",))
    own = method.reparametrization
    weights = own.weights(backbone.params, own.init(jax.random.key(0), backbone.params))
    change = changes.measure(backbone.architecture, params, jax.device_get(weights))
    return change and change.overall


def _weights(found: _Changes, config: Config, backbone: backbones.Backbone) -> Markup:
    failed = [html.paragraph(f"{name}: {why}") for name, why in found.failed.items()]
    if not found.of:
        return html.joined(
            html.paragraph("No task replaces weights of the frozen network here."), *failed
        )
    rows = []
    for name, change in found.of.items():
        of = change.by_place
        place = max(of, key=lambda place: of[place])
        least = min(of, key=lambda place: of[place])
        cells = (f"{_place(p)} {100 * of[p]:.2f}" for p in (place, least))
        rows.append((name, f"{100 * change.overall:.2f}", *cells))
    before = (
        "" if found.drawn is None else f"As drawn, before training, it is {100 * found.drawn:.2f}."
    )
    parts = [
        html.paragraph(f"{FORMULA}{_kind_of(config)}.", before),
        html.table(
            "All of a task's kernels together, percent",
            ("task", "changed by", "most", "least"),
            rows,
            left=(0, 2, 3),
        ),
        *failed,
    ]
    by_place = [change.by_place for change in found.of.values()]
    if len(by_place) > 1:
        parts.append(_by_kernel(changes.mean(by_place), "Mean over the tasks, percent"))
    # One scale of colours for all tasks.
    limits = _limits([value for of in by_place for value in of.values()])
    of_heads = _limits([row for change in found.of.values() for row in change.by_head.values()])
    names = sorted(found.of, key=lambda name: -found.of[name].overall)[:MOST_IN_DETAIL]
    for name in [name for name in found.of if name in names]:
        body = html.joined(
            _by_kernel(found.of[name].by_place, f"{name}, by layer and kernel, percent", limits),
            _by_head(found.of[name].by_head, backbone.architecture, of_heads),
        )
        parts.append(html.folded(f"Task {name}", body, is_open=len(found.of) == 1))
    if len(names) < len(found.of):
        parts.append(
            html.paragraph(
                f"One by one are the {len(names)} tasks that changed most; of all, the table above",
                "and the mean.",
                kind="note",
            )
        )
    return html.joined(*parts)


def _kind_of(config: Config) -> str:
    """Say what W is by the method."""
    reparametrization = registry.parse(config.method).reparametrization
    if reparametrization is LoRA:
        scale = LoRA.SCALE
        return f": θ + {scale:g} AB with low-rank A and B, so that it is ‖{scale:g} AB‖ / ‖θ‖"
    if reparametrization and reparametrization.replaces_kernels:
        return ": θ ⊙ m with its mask m, so that it is ‖(m − 1) ⊙ θ‖ / ‖θ‖"
    return ""


def _limits(values: Sequence[Any]) -> tuple[float, float]:
    every = 100 * np.concatenate([np.ravel(value) for value in values] or [np.zeros(1)])
    return float(every.min()), float(every.max())


def _place(place: changes.Place) -> str:
    tower = "" if place.tower == "vision" else f"{place.tower} "
    return f"{tower}L{place.layer + 1} {place.part}"


def _by_kernel(
    of: Mapping[changes.Place, float], caption: str, limits: tuple[float, float] | None = None
) -> Markup:
    layers = list(dict.fromkeys((place.tower, place.layer) for place in of))
    columns = [part for part in changes.PARTS if any(place.part == part for place in of)]
    values = [
        [100 * of.get(changes.Place(tower, layer, part), np.nan) for part in columns]
        for tower, layer in layers
    ]
    names = [_place(changes.Place(*layer, "")).strip() for layer in layers]
    return html.heat_map(
        caption,
        names,
        columns,
        np.array(values),
        form="{:.2f}",
        corner="layer ↓ / kernel →",
        limits=limits,
        unit="percent",
    )


def _by_head(
    of: Mapping[changes.Place, np.ndarray], architecture: Architecture, limits: tuple[float, float]
) -> Markup | str:
    drawn = []
    for part in changes.PARTS[:4]:
        layers = [place for place in of if place.part == part]
        if layers:
            drawn.append(
                html.heat_map(
                    f"Heads of {part}",
                    [f"L{place.layer + 1}" for place in layers],
                    [str(head + 1) for head in range(architecture.heads)],
                    100 * np.array([of[place] for place in layers]),
                    form="{:.2f}",
                    corner="layer ↓ / head →",
                    limits=limits,
                    unit="percent",
                )
            )
    return html.side_by_side(*drawn) if drawn else ""


def _alike(found: _Changes) -> Markup:
    names = list(found.rows)
    if len(names) < 2:
        return html.paragraph("A tree takes two tasks that change weights.")
    distances = changes.cosine_distances(list(found.rows.values()))
    exact = changes.is_exact(found.size, len(names))
    shown, blocks = html.in_blocks(names, distances)
    joined = len(names) > html.MOST_LEAVES
    return html.joined(
        html.paragraph(
            "The changes W − θ of all kernels, as one vector a task, compared by 1 − cos: 0 is the",
            "same direction, 1 nothing in common, 2 opposite. Tasks that are most alike are joined",
            "first (average linkage).",
            "Masks are drawn around a common mean, which tasks that were hardly trained share.",
            ""
            if exact
            else f"Vectors of {found.size:,} numbers were cut to {changes.SKETCH:,} by a random "
            "sketch, so that distances are right to about 0.01.",
        ),
        html.side_by_side(
            html.tree(
                "Tasks by the distance of their changes"
                + (f", the most alike in {html.MOST_LEAVES} leaves" if joined else ""),
                names,
                distances,
            ),
            html.heat_map(
                "Distances",
                shown,
                shown,
                blocks,
                form="{:.2f}",
                limits=(0.0, max(1.0, float(np.nanmax(blocks)))),
                unit="1 − cos",
            ),
        ),
        _blocks_note(names),
    )
