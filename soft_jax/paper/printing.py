"""A table as Markdown: its rows, what was chosen for them, what the figures say, a picture."""

import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from soft_jax.config import Config
from soft_jax.errors import UserError
from soft_jax.evaluation import report
from soft_jax.experiment import settings as settings_lib
from soft_jax.inference import rules
from soft_jax.paper.lines import EACH_IMAGE, Line, bound, grouping_of, rule_of, statistics
from soft_jax.paper.rows import Row, fixed

COLUMNS = (
    "#",
    "row",
    "protocol",
    "accuracy",
    "forgetting",
    "task id",
    "published",
    "parameters: own + shared",
    "MiB a task: own + shared + memory",
    "GFLOP a step",
    "seconds: training + after it + evaluation",
)

# What Soft-TF is put beside in words: other ways to a task's own weights, and none.
RIVALS = {
    "DualPrompt-Soft-TF": (
        "DualPrompt-WSN c=90%",
        "DualPrompt-SoftNet c=90%",
        "DualPrompt-LoRA r=4",
        "DualPrompt-Adapter r=4",
    ),
    "Soft-TF": ("head", "LoRA r=4"),
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
) -> str:
    """Return the table as Markdown.

    `settings` is the text on what was chosen for all rows (`conditions`). `joint` are lines of
    joint training that bound those of the table, whether or not they are in it. `failed` has the
    errors of rows that failed, by row number.
    """
    measured = [*lines, *joint]
    bounds = [bound(line, measured) for line in lines]
    text = [
        f"# {title}",
        "",
        f"Made by `{command}`; a row alone by its number, with `--rows=#`.",
        "",
        settings,
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *(_row(_cells(line, best)) for line, best in zip(lines, bounds, strict=True)),
        *_rows_without_lines(rows, failed),
        "",
        report.escaped(report.FOOTNOTE) + ".",
        "",
        "Accuracy and forgetting after the last task, in percent of test images, ± the standard "
        "deviation over seeds; published: "
        "accuracy / forgetting, on ViT-B/16. Memory is what a method holds of older tasks; what is "
        "a prototype row's own counts the "
        "statistics of q(x). After training come those statistics and what the method keeps; "
        "evaluation is of all protocols and stages.",
        "",
        _legend(lines, bounds, any(line.joint for line in measured)),
        "",
        *reading(lines),
    ]
    return "\n".join(text)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(line: Line, best: float | None) -> list[str]:
    shown = {key: _mean(values, line.seeds) for key, values in line.figures.items()}
    cost = line.cost
    above = best is not None and line.figures["final_average"][0] > best
    bytes_, seconds = (
        ("own_bytes", "shared_bytes", "memory_bytes"),
        ("train", "statistics", "evaluate"),
    )
    return [
        str(line.number),
        line.name + (" (joint)" if line.joint else ""),
        report.escaped(rules.title(line.protocol)),
        shown["final_average"] + (" **▲**" if above else ""),
        "–" if line.joint else shown["forgetting"],
        "–" if line.joint or line.task_is_given else shown["task_id_accuracy"],
        published_cell(line.published),
        f"{cost['own']:,} + {cost['shared']:,}",
        " + ".join(f"{cost[part] / 2**20:.2f}" for part in bytes_),
        "–" if cost["gflops"] is None else f"{cost['gflops']:.1f}",
        " + ".join(f"{cost[part]:.0f}" for part in seconds),
    ]


def _mean(values: tuple[float, float], seeds: int) -> str:
    return f"{values[0]:.2f} ± {values[1]:.2f}" if seeds > 1 else f"{values[0]:.2f}"


def published_cell(figures: Mapping[str, Any] | None) -> str:
    """Return the cell of a published accuracy and forgetting, or of published seconds."""
    if not figures:
        return "–"
    if "train" in figures:
        return f"training {figures['train']} s, test {figures['test']} s on a {figures['device']}"
    return " / ".join(
        f"{figures[key]:.2f}" for key in ("accuracy", "forgetting") if figures.get(key) is not None
    )


def _rows_without_lines(rows: Sequence[Row], failed: Mapping[int, UserError]) -> list[str]:
    """Return table rows for what is not run, with published figures, and for what failed."""
    text = []
    for row in rows:
        for figures in row.published.values() if row.settings is None else ():
            cells = [str(row.number), row.name, "as published, not run", "–", "–", "–"]
            text.append(_row([*cells, published_cell(figures), "–", "–", "–", "–"]))
        if row.number in failed:
            problem = " ".join(str(failed[row.number]).split()).replace("|", "\\|")
            text.append(_row([str(row.number), row.name, f"failed: {problem}", *"–" * 8]))
    return text


def _legend(lines: Sequence[Line], bounds: Sequence[float | None], has_joint: bool) -> str:
    if not has_joint:
        return (
            "Joint training on all classes is not measured under these settings, so no row "
            "is marked as above it (▲); "
            "`table methods` has it in its last rows."
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


def reading(lines: Sequence[Line]) -> list[str]:
    """Return what the figures say, as Markdown.

    That is: the best rows, how Soft-TF compares with each method, and how much the vote over
    single-task batches adds.
    """
    found = {(line.name, line.protocol): line.each for line in lines if not line.joint}
    text = [*_best_and_worst(found), *_comparisons(found), *_votes(found)]
    if text and any(len(each) > 1 for each in found.values()):
        text += [
            "",
            "Differences are taken seed by seed: mean ± standard deviation. Of few seeds, those "
            "below twice that say little.",
        ]
    return ["## What the figures say", "", *text, ""] if text else []


def _best_and_worst(found: Found) -> list[str]:
    text = []
    groups = {rules.PER_SAMPLE: "each image by itself", rules.ORACLE: "the task given"}
    for grouping, title in groups.items():
        these = [
            (np.mean(x), x, key) for key, x in found.items() if grouping_of(key[1]) == grouping
        ]
        ranked = sorted(these, reverse=True)
        if len(ranked) > 1:
            best = "; ".join(
                f"{name} ({rules.title(protocol)}) {_mean(statistics(each), len(each))}"
                for _, each, (name, protocol) in ranked[:3]
            )
            text.append(
                f"- Highest with {title}: {best}. Lowest: {ranked[-1][2][0]}, {ranked[-1][0]:.2f}."
            )
    return text


def _comparisons(found: Found) -> list[str]:
    pairs = [
        (name, host)
        for name in dict.fromkeys(name for name, _ in found)
        if (host := re.sub(r"-Soft-TF(-L\[[\d,]+\])?( q,k,v(,proj)?)?", "", name)) != name
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
            mean, deviation = statistics(np.subtract(new, old))
            spread = f" ± {deviation:.2f}" if len(new) > 1 else ""
            parts.append(f"{keys[0]} {mean:+.2f}{spread}")
    return ", ".join(parts)


def _votes(found: Found) -> list[str]:
    """Say how much is gained when a batch of one task decides in the place of each image."""
    added = {}
    for (name, protocol), each in found.items():
        rule = rule_of(protocol)
        voted_by = rule and rule.voted_by
        voted = [p for same, p in found if voted_by and same == name and rule_of(p) is voted_by]
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
