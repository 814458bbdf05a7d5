"""A table as Markdown: its rows, what was chosen for them, what the figures say, a picture."""

import itertools
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from soft_jax.config import Config
from soft_jax.errors import UserError
from soft_jax.evaluation import report
from soft_jax.evaluation.metrics import mean_and_deviation
from soft_jax.experiment import settings as settings_lib
from soft_jax.inference import rules
from soft_jax.paper.lines import (
    EACH_IMAGE,
    Line,
    bound,
)
from soft_jax.paper.rows import Row, fixed

# Two tables, so that either fits a page: what was reached, a line a protocol, and at what cost, a
# line a row.
FIGURE_COLUMNS = ("#", "row", "protocol", "accuracy", "forgetting", "task id", "published")
VALIDATION_COLUMN = "val."  # beside the accuracy, where images were held out
COST_COLUMNS = ("#", "row", "parameters", "MiB", "statistics", "GFLOP", "seconds")

# What Soft-TF is put beside in words: other ways to a task's own weights, and none.
RIVALS = {
    "DualPrompt-Soft-TF": (
        "DualPrompt-WSN c=90%",
        "DualPrompt-SoftNet c=90%",
        "DualPrompt-LoRA r=4",
        "DualPrompt-Adapter r=4",
    ),
    "Soft-TF": ("head", "LoRA r=4"),
    "CLIP-Prompt-Soft-TF-L[10,11,12]": (
        "CLIP-Prompt-WSN c=90%",
        "CLIP-Prompt-SoftNet c=90%",
        "CLIP-Prompt-LoRA r=4",
        "CLIP-Prompt-Adapter r=4",
    ),
}

# The protocols that two methods are compared under: rules that stand for the same with either.
_COMPARED = (
    EACH_IMAGE,
    (rules.Prototype,),
    (rules.PromptVote, rules.PoolVote),
    (rules.TaskGiven,),
)


def markdown(
    title: str,
    command: str,
    rows: Sequence[Row],
    lines: Sequence[Line],
    settings: str,
    joint: Sequence[Line] = (),
    failed: Mapping[int, UserError] = types.MappingProxyType({}),
    references: Sequence[Line] = (),
) -> str:
    """Return the table as Markdown.

    `settings` is the text on what was chosen for all rows (`conditions`). `joint` are lines of
    joint training that bound those of the table, whether or not they are in it. `failed` has the
    errors of rows that failed, by row number. `references` are lines of the frozen backbones, which
    stand above all rows.
    """
    measured = [*lines, *joint]
    bounds = [bound(line, measured) for line in lines]
    held_out = any(line.validation for line in [*references, *lines])
    columns = _with_validation(FIGURE_COLUMNS, VALIDATION_COLUMN, held_out)
    figures = [(_reference_cells(line), line) for line in references]
    figures += [(_cells(line, best), line) for line, best in zip(lines, bounds, strict=True)]
    figures += [(cells, None) for cells in _without_lines(rows, failed)]
    text = [
        f"# {title}",
        "",
        f"Made by `{command}`; a row alone by its number, with `--rows=#`.",
        "",
        settings,
        "",
        *_table(columns, [_with_validation(c, _held_out(line), held_out) for c, line in figures]),
        "",
        report.escaped(report.FOOTNOTE) + ".",
        "",
        "Accuracy and forgetting after the last task, in percent of test images, ± the standard "
        "deviation over seeds; published: accuracy / forgetting, on ViT-B/16.",
        "",
        *(_VALIDATION_LEGEND if held_out else ()),
        *_reference_legend(references),
        _legend(lines, bounds, any(line.joint for line in measured)),
        "",
        "## What it costs",
        "",
        *_table(COST_COLUMNS, _cost_cells(lines)),
        "",
        "Parameters: a task's own + what all tasks share. MiB: its own + what all share + what the "
        "method holds of older tasks. Statistics, in MiB too, are what a task leaves of q(x) for "
        "prototypes. GFLOP are of one training step. Seconds: training + what follows it (the "
        "statistics, and what the method keeps) + evaluation of all protocols and stages.",
        "",
        *reading(lines, references),
    ]
    return "\n".join(text)


_VALIDATION_LEGEND = (
    f"{VALIDATION_COLUMN}: the accuracy on training images that were held out. Choose by it, not "
    "by test images.",
    "",
)
# What is the same for every row: how it is called, and what it is.
_REFERENCES = {
    rules.FrozenFeatures: (
        "the frozen features",
        "Frozen features: classes by a regression on the frozen backbone's features, in closed "
        "form.",
    ),
    rules.ZeroShot: (
        "the zero-shot answers",
        "Zero-shot: classes by the frozen text features of their names.",
    ),
}


def _reference(line: Line) -> tuple[str, str]:
    rule, title = rules.rule_of(line.protocol), rules.title(line.protocol)
    other = (f"the answers under {title!r}", f"{title}: no trained network answers.")
    return next((text for each, text in _REFERENCES.items() if issubclass(rule, each)), other)


def _reference_legend(references: Sequence[Line]) -> tuple[str, ...]:
    if not references:
        return ()
    return (
        f"{' '.join(dict.fromkeys(_reference(line)[1] for line in references))} They are the same "
        "for every row, and what a row has above them is what its training added.",
        "",
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]


def draw(text: str, console: Console) -> None:
    """Print a table's Markdown on a terminal, to its width.

    Each row's name is a line of its own, with the protocols below it: beside each other they leave
    no room for the figures.
    """
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        if not is_table:
            console.print("\n".join(lines).replace("\\*", "*"), markup=False, highlight=False)
            continue
        heading, _, *rows = (
            [
                cell.replace("\\*", "*").replace("**", "").strip()
                for cell in _CELL_END.split(line[1:-1])
            ]
            for line in lines
        )
        _draw(heading, rows, console)


_CELL_END = re.compile(r"(?<!\\)\|")  # not the escaped one inside a cell


def _draw(heading: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    wide = _drawn(heading, rows)
    endless = console.options.update(max_width=10_000)
    fits = Measurement.get(console, endless, wide).maximum <= console.width
    # Else a deviation stands below its mean.
    below = [[cell.replace(" ±", "\n±") for cell in row] for row in rows]
    console.print(wide if fits else _drawn(heading, below))


def _drawn(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    by_protocol = FIGURE_COLUMNS[2] in heading
    first = 3 if by_protocol else 2  # column of figures
    shown = [i for i in range(first, len(heading)) if any(row[i] != "–" for row in rows)]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(", ".join(heading[1:first]), overflow="fold")
    for i in shown:
        table.add_column(heading[i], justify="right", overflow="fold")
    before = None
    for row in rows:
        name = f"{row[0]}  {row[1]}"
        label: RenderableType = Text(name)
        if by_protocol:
            if name != before:
                table.add_row(Text(name, style="bold"))
            label = Padding(Text(row[2]), (0, 0, 0, 4))
        table.add_row(label, *(Text(row[i]) for i in shown))
        before = name
    return table


def _with_validation(cells: Sequence[str], cell: str, held_out: bool) -> list[str]:
    """Put a cell of the validation column behind the accuracy where there is such a column."""
    behind = FIGURE_COLUMNS.index("accuracy") + 1
    return [*cells[:behind], *([cell] if held_out else []), *cells[behind:]]


def _held_out(line: Line | None) -> str:
    return _mean(line.validation, line.seeds) if line and line.validation else "–"


def _cells(line: Line, best: float | None) -> list[str]:
    shown = {key: _mean(values, line.seeds) for key, values in line.figures.items()}
    above = best is not None and line.figures["final_average"][0] > best
    return [
        str(line.number),
        line.name + (" (joint)" if line.joint else ""),
        report.escaped(rules.title(line.protocol)),
        shown["final_average"] + (" **▲**" if above else ""),
        "–" if line.joint else shown["forgetting"],
        "–" if line.joint or line.task_is_given else shown["task_id_accuracy"],
        published_cell(line.published),
    ]


def _reference_cells(line: Line) -> list[str]:
    return ["–", f"{line.backbone}, frozen", *_cells(line, None)[2:-1], "–"]


def _cost_cells(lines: Sequence[Line]) -> list[list[str]]:
    """Return a table row for each row of the paper: its costs are the same for all its lines."""
    rows = []
    for line in {line.number: line for line in lines}.values():
        cost, bytes_ = line.cost, ("own_bytes", "shared_bytes", "memory_bytes")
        seconds = ("train", "statistics", "evaluate")
        rows.append(
            [
                str(line.number),
                line.name + (" (joint)" if line.joint else ""),
                f"{cost['own']:,} + {cost['shared']:,}",
                " + ".join(f"{cost[part] / 2**20:.2f}" for part in bytes_),
                f"{cost['statistics_bytes'] / 2**20:.2f}",
                "–" if cost["gflops"] is None else f"{cost['gflops']:.1f}",
                " + ".join(f"{cost[part]:.0f}" for part in seconds),
            ]
        )
    return rows


def _mean(values: tuple[float, float], seeds: int) -> str:
    return f"{values[0]:.2f} ± {values[1]:.2f}" if seeds > 1 else f"{values[0]:.2f}"


def published_cell(figures: Mapping[str, Any] | None) -> str:
    """Return the cell of a published accuracy and forgetting, or of published seconds."""
    if not figures:
        return "–"
    if "train" in figures:
        return f"training {figures['train']} s, test {figures['test']} s on a {figures['device']}"
    text = " / ".join(
        f"{figures[key]:.2f}" for key in ("accuracy", "forgetting") if figures.get(key) is not None
    )
    again = figures.get("reproduced")
    return f"{text} (reproduced {published_cell(again)})" if again else text


def _without_lines(rows: Sequence[Row], failed: Mapping[int, UserError]) -> list[list[str]]:
    """Return table rows for what is not run, with published figures, and for what failed."""
    text = []
    for row in rows:
        number = str(row.number)
        for figures in row.published.values() if row.settings is None else ():
            not_run = "as published, not run"
            text.append([number, row.name, not_run, *"–––", published_cell(figures)])
        if row.number in failed:
            problem = " ".join(str(failed[row.number]).split()).replace("|", "\\|")
            text.append([number, row.name, f"failed: {problem}", *"––––"])
    return text


def _legend(lines: Sequence[Line], bounds: Sequence[float | None], has_joint: bool) -> str:
    if not has_joint:
        return (
            "Joint training on all classes is not measured under these settings, so no row "
            "is marked as above it (▲); "
            "`table methods`, and on CLIP `table clip`, has it in its last rows."
        )
    legend = (
        "▲: above joint training on all classes, as measured here on the same backbone "
        "(for prototype rows: with prototypes)."
    )
    pairs = zip(lines, bounds, strict=True)
    if without := dict.fromkeys(x.number for x, best in pairs if x.bounded and best is None):
        legend += (
            f" That is not measured for row(s) {', '.join(map(str, without))}: nothing "
            "marks what is above it there."
        )
    return legend


Found = Mapping[tuple[str, str], Sequence[float]]  # accuracy of each seed, by row and protocol


def reading(lines: Sequence[Line], references: Sequence[Line] = ()) -> list[str]:
    """Return what the figures say, as Markdown.

    That is: the best rows, what each adds to the frozen backbones of `references`, how Soft-TF
    compares with each method, and how much the vote over single-task batches adds.
    """
    found = {(line.name, line.protocol): line.each for line in lines if not line.joint}
    text = [
        *_best_and_worst(found),
        *_added(lines, references),
        *_comparisons(found),
        *_votes(found),
    ]
    if text and any(len(each) > 1 for each in found.values()):
        text += [
            "",
            "Differences are taken seed by seed: mean ± standard deviation. Of few seeds, those "
            "below twice that say little.",
        ]
    return ["## What the figures say", "", *text, ""] if text else []


# The groupings of images that leak no more than they say, in words.
_GROUPINGS = {rules.PER_SAMPLE: "each image by itself", rules.ORACLE: "the task given"}


def _added(lines: Sequence[Line], references: Sequence[Line]) -> list[str]:
    """Say how far each row, by its best rule, is above its frozen backbone."""
    text = []
    for reference in references:
        grouping, added = rules.grouping_of(reference.protocol), {}
        for line in lines:
            same = line.backbone == reference.backbone and line.seeds == reference.seeds
            if same and not line.joint and rules.grouping_of(line.protocol) == grouping:
                difference = mean_and_deviation(np.subtract(line.each, reference.each))
                added[line.name] = max(added.get(line.name, difference), difference)
        ranked = sorted(added.items(), key=lambda item: item[1], reverse=True)
        if ranked:
            parts = (
                f"{name} {mean:+.2f}" + (f" ± {deviation:.2f}" if reference.seeds > 1 else "")
                for name, (mean, deviation) in ranked
            )
            text.append(
                f"- Beside {_reference(reference)[0]} of {reference.backbone}, with "
                f"{_GROUPINGS[grouping]}, by each row's best rule: {', '.join(parts)} points."
            )
    return text


def _best_and_worst(found: Found) -> list[str]:
    text = []
    for grouping, title in _GROUPINGS.items():
        these = [
            (np.mean(x), x, key)
            for key, x in found.items()
            if rules.grouping_of(key[1]) == grouping
        ]
        ranked = sorted(these, reverse=True)
        if len(ranked) > 1:
            best = "; ".join(
                f"{name} ({rules.title(protocol)}) {_mean(mean_and_deviation(each), len(each))}"
                for _, each, (name, protocol) in ranked[:3]
            )
            text.append(
                f"- Highest with {title}: {best}. Lowest: {ranked[-1][2][0]}, {ranked[-1][0]:.2f}."
            )
    return text


# What makes a row of a host one with masks, in the row's name.
_SOFT_TF = re.compile(r"-Soft-TF(-L\[[\d,-]+\])?( q,k,v(,proj)?)?( (and )?in the text tower)?")


def _comparisons(found: Found) -> list[str]:
    pairs = [
        (name, host)
        for name in dict.fromkeys(name for name, _ in found)
        if (host := _SOFT_TF.sub("", name)) != name
    ]
    pairs += [(one, other) for one, others in RIVALS.items() for other in others]
    return [
        f"- {one} beside {other}: {changes} points."
        for one, other in pairs
        if (changes := _differences(found, one, other))
    ]


def _differences(found: Found, one: str, other: str) -> str:
    """Say by how much `one`'s accuracies are above `other`'s, for each protocol."""
    parts = []
    for same in _COMPARED:
        keys = [f"{rule.grouping}/{rule.name}" for rule in same]
        new, old = (
            next((found[name, key] for key in keys if (name, key) in found), None)
            for name in (one, other)
        )
        if new and old:
            mean, deviation = mean_and_deviation(np.subtract(new, old))
            spread = f" ± {deviation:.2f}" if len(new) > 1 else ""
            parts.append(f"{keys[0]} {mean:+.2f}{spread}")
    return ", ".join(parts)


def _votes(found: Found) -> list[str]:
    """Say how much is gained when a batch of one task decides in the place of each image."""
    added = {}
    for (name, protocol), each in found.items():
        rule = rules.rule_of(protocol)
        voted_by = rule and rule.voted_by
        voted = [
            p for same, p in found if voted_by and same == name and rules.rule_of(p) is voted_by
        ]
        if voted:
            added[f"{name} {voted[0]}"] = np.mean(found[name, voted[0]]) - np.mean(each)
    if not added:
        return []
    most = max(added, key=added.get)
    return [
        f"- Going by batches of one task adds {np.mean(list(added.values())):+.2f} points in "
        f"the mean of {len(added)} pairs of rows, "
        f"{added[most]:+.2f} at most ({most})."
    ]


def draw_layers(lines: Sequence[Line]) -> Figure:
    """Draw Figure 4: accuracy by masked layer, a curve a protocol."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for protocol in dict.fromkeys(line.protocol for line in lines):
        these = [line for line in lines if line.protocol == protocol]
        layers = [int(re.search(r"L\[(\d+)\]", line.name)[1]) for line in these]
        means, deviations = zip(*(line.figures["final_average"] for line in these), strict=True)
        label = rules.title(protocol)
        axes.errorbar(layers, means, deviations, marker="o", capsize=3, label=label)
    axes.set(xlabel="masked layer", ylabel="accuracy after the last task (%)", xticks=range(1, 13))
    axes.legend(fontsize="small")
    return figure


def conditions(
    rows: Sequence[Row], configs: Mapping[int, Sequence[Config]], overrides: Mapping[str, Any]
) -> str:
    """Say which backbone, epochs, batches, rates and images are used, and for which rows.

    It also says which of the `overrides` did not reach a row.

    `configs` has the configs of a row's seeds, by row number; rows that are not run have none.
    """
    by_condition: dict[str, list[int]] = {}
    for number, (config, *_) in configs.items():
        by_condition.setdefault(_condition(config), []).append(number)
    if len(by_condition) == 1:
        text = f"{next(iter(by_condition))}."
    else:
        text = " ".join(
            f"Rows {', '.join(map(str, numbers))}: {condition}."
            for condition, numbers in by_condition.items()
        )
    own: dict[str, list[int]] = {}
    without_effect: dict[str, list[int]] = {}
    for row in rows:
        for key, value in fixed(row).items() if row.settings else ():
            if overrides.get(key, value) != value:
                own.setdefault(key, []).append(row.number)
    for number, (config, *_) in configs.items():
        used = settings_lib.used_settings(config)
        for key, value in overrides.items():
            if key not in used and getattr(config, key) != value:
                without_effect.setdefault(key, []).append(number)
    for key, numbers in own.items():
        listed = ", ".join(map(str, numbers))
        text += f" {key} is what rows {listed} are about: theirs is their own."
    for key, numbers in without_effect.items():
        text += f" {key} has no effect on rows {', '.join(map(str, numbers))}."
    return text


def _condition(config: Config) -> str:
    images = (
        f"{config.train_images_per_class or 'all'} training and "
        f"{config.test_images_per_class or 'all'} test images a class"
    )
    if config.validation:
        images += f" ({config.validation:g} of the training images held out)"
    return (
        f"{config.backbone}, {config.epochs} epoch(s) in batches of {config.batch_size} at base "
        f"rate {config.learning_rate}, {images}"
    )
