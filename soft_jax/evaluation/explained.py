"""An explanation of an answer, as a short text and as an HTML page."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from soft_jax.evaluation import html
from soft_jax.evaluation.html import Markup, Section, text
from soft_jax.inference import rules
from soft_jax.inference.explain import ALL, Attention, Explanation, RuleAnswer

MOST_TASKS = 40  # whose scores are shown, those that some rule scores best
_ON_SCREEN = 8
# What the figures of a layer mean, and what they don't.
MARGIN = (
    "The margin is the winning class's logit less the next highest, by the network that answered."
)
ATTENTION = (
    "The attention of the [class] token in the last layer, mean over its heads (as Caron et al., "
    "2021, show it), in percent. It says where the network looked, not why it decided."
)


def name_of(explanation: Explanation, task: int) -> str:
    """Return what people call a task; a task without a name is one that isn't loaded."""
    return explanation.task_names[task] if 0 <= task < len(explanation.task_names) else "none"


def _rule(answer: RuleAnswer) -> str:
    return rules.title(answer.rule.key).partition(", ")[2]


def _classes(explanation: Explanation, answer: RuleAnswer, count: int) -> str:
    pairs = zip(answer.classes[:count], answer.probabilities[:count], strict=True)
    return ", ".join(f"{explanation.class_names[c]} {100 * p:.1f}%" for c, p in pairs)


def shown_tasks(explanation: Explanation, most: int) -> list[int]:
    """Return the places of at most `most` tasks: those that the rules put first, in turn."""
    columns = [
        np.argsort(a.scores if a.rule.lowest_wins else -a.scores, kind="stable")
        for a in explanation.answers
        if a.scores is not None
    ]
    ranked = (int(task) for row in zip(*columns, strict=True) for task in row)
    return sorted(list(dict.fromkeys(ranked))[:most])


def lines(explanation: Explanation, file: str) -> list[str]:
    """Return the explanation as lines for a screen."""
    e, own = explanation, explanation.answers[explanation.own]
    out = [
        f"{file}: {e.class_names[e.class_]}, of task {name_of(e, e.task_of_class[e.class_])}, by "
        f"{_rule(own)} ({e.because})",
        "",
        "What each rule says:",
        *_padded(
            [(f"  {_rule(a)}", f"task {name_of(e, a.task)}", _classes(e, a, 3)) for a in e.answers]
        ),
    ]
    scored = [a for a in e.answers if a.scores is not None]
    if scored:
        tasks = shown_tasks(e, _ON_SCREEN)
        rows = [("  task", *(f"{_rule(a)}, {a.rule.scored_by}" for a in scored))]
        for task in tasks:
            cells = (_score(a, task, mark="*").replace("−", "-") for a in scored)
            rows.append((f"  {e.task_names[task]}", *cells))
        left_out = len(scored[0].scores) - len(tasks)
        out += ["", "Scores of the tasks (*: the one that is named):", *_padded(rows)]
        out += [f"  and {left_out} more tasks"] if left_out else []
    if e.layers:
        out += ["", f"With a layer as in the frozen network, {_margin_words(e)} would be:"]
        out += _padded(
            [
                (
                    f"  {_layer(x.layer)}",
                    f"{x.margin:.2f}",
                    f"({x.margin - e.margin:+.2f}),",
                    f"probability {100 * x.probability:.1f}%",
                )
                for x in e.layers
            ]
        )
    out += [
        "",
        "Where the [class] token of the last layer looks, by row and column of patches:",
        f"  frozen: {_most(e.frozen)}",
        f"  task {name_of(e, e.network)}: {_most(e.masked)}",
    ]
    return out


def _margin_words(e: Explanation) -> str:
    return f"the margin of {e.class_names[e.class_]} ({e.margin:.2f}, {100 * e.probability:.1f}%)"


def _layer(layer: int | str) -> str:
    return "all layers" if layer == ALL else f"layer {layer + 1}"


def _score(answer: RuleAnswer, task: int, mark: str) -> str:
    score = answer.scores[task]
    best = answer.scores.argmin() if answer.rule.lowest_wins else answer.scores.argmax()
    return f"{html.number_of(score, '{:.3g}')}{mark if task == best else ''}"


def _most(attention: Attention, count: int = 3) -> str:
    """Name the patches that get most, and what is left for others."""
    flat = attention.patches.reshape(-1)
    places = np.argsort(-flat, kind="stable")[:count]
    grid = len(attention.patches)
    found = (f"({p // grid + 1}, {p % grid + 1}) {100 * flat[p]:.0f}%" for p in places)
    return f"{', '.join(found)}; itself {100 * attention.itself:.0f}%" + (
        f", prompts {100 * attention.prompts:.0f}%" if attention.prompts > 1e-4 else ""
    )


def _padded(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def page(explanation: Explanation, file: Any, root: Any) -> str:
    """Return the explanation as an HTML page; `file` is the image's, `root` the library's."""
    e = explanation
    task = name_of(e, e.task_of_class[e.class_])
    own = e.answers[e.own]
    lead = html.joined(
        html.paragraph(
            "Answer of",
            html.strong(root),
            "to",
            Markup(f"{html.strong(file)}:"),
            Markup(f"{html.strong(e.class_names[e.class_])}, of task {html.strong(task)},"),
            f"by the rule {_rule(own)} ({e.because}).",
        ),
        html.facts(
            {
                "class": e.class_names[e.class_],
                "probability": f"{100 * own.probabilities[0]:.1f}%",
                "network of task": name_of(e, e.network),
                "margin": html.number_of(e.margin, "{:.2f}"),
            }
        ),
    )
    sections = [
        Section("rules", "What each rule says", _rules(e)),
        Section("layers", "Which changed layers moved the answer", _layers(e)),
        Section("attention", "Where it looked", _attention(e)),
    ]
    return html.page(f"Why {e.class_names[e.class_]}?", lead, sections, "Made by soft-jax explain,")


def _rules(e: Explanation) -> Markup:
    rows = [
        (
            _rule(a),
            name_of(e, a.task),
            e.class_names[a.classes[0]],
            f"{100 * a.probabilities[0]:.1f}",
            _others(e, a),
        )
        for a in e.answers
    ]
    columns = ("rule", "task", "class", "probability, %", "then")
    parts = [
        html.table(
            "Answers by rule; the marked one is what predict goes by",
            columns,
            rows,
            left=(0, 1, 2, 4),
            marked=(e.own,),
        )
    ]
    scored = [a for a in e.answers if a.scores is not None]
    if scored:
        tasks = shown_tasks(e, MOST_TASKS)
        rows = []
        for task in tasks:
            cells = []
            for a in scored:
                cell = _score(a, task, mark="")
                best = _score(a, task, mark="*") != cell
                cells.append(Markup(f"<b>{text(cell)} ✓</b>") if best else cell)
            rows.append((e.task_names[task], *cells))
        heads = ("task", *(f"{_rule(a)}: {a.rule.scored_by}" for a in scored))
        lowest = [_rule(a) for a in scored if a.rule.lowest_wins]
        left_out = len(scored[0].scores) - len(tasks)
        notes = [
            "✓ marks the task that a rule names: the highest score",
            f"(of {', '.join(lowest)}: the lowest)." if lowest else ".",
            f"The {left_out} tasks that no rule puts near the front are left out."
            if left_out
            else "",
        ]
        parts += [
            html.table("Scores of the tasks by rule", heads, rows),
            html.paragraph(" ".join(filter(None, notes)).replace(" .", "."), kind="note"),
        ]
    return html.joined(*parts)


def _others(e: Explanation, answer: RuleAnswer) -> str:
    rest = answer._replace(classes=answer.classes[1:], probabilities=answer.probabilities[1:])
    return _classes(e, rest, 3)


def _layers(e: Explanation) -> Markup:
    if not e.layers:
        return html.paragraph("The tasks of this method change no weights in the layers.")
    rows = [
        (
            _layer(x.layer),
            html.number_of(x.margin, "{:.2f}"),
            _signed(x.margin - e.margin),
            f"{100 * x.probability:.1f}",
            _signed(100 * (x.probability - e.probability), 1),
        )
        for x in e.layers
    ]
    changes = [x.margin - e.margin for x in e.layers]
    below = (
        f"It is below 0: the network alone would have named another class, and the rule "
        f"{_rule(e.answers[e.own])} counts more than its logits."
    )
    return html.joined(
        html.paragraph(
            f"The image was answered again with one layer as in the frozen network. {MARGIN}",
            f"As the task has them all, it is {html.number_of(e.margin, '{:.2f}')}, and the class",
            f"has {100 * e.probability:.1f}% of that network's softmax over the classes that could",
            "win. Where the margin falls, what the task changed in that layer spoke for the",
            "answer; where it rises, against it. Prompts stay.",
            below if e.margin < 0 else "",
        ),
        html.bars(
            f"The margin of {e.class_names[e.class_]} without what the task changed in a layer",
            ("as frozen", "margin", "change", "probability, %", "change, points"),
            rows,
            changes,
        ),
    )


def _signed(value: float, digits: int = 2) -> str:
    return html.number_of(value, f"{{:+.{digits}f}}")


def _attention(e: Explanation) -> Markup:
    most = max(float(e.frozen.patches.max()), float(e.masked.patches.max()))
    change = e.masked.patches - e.frozen.patches
    far = max(float(np.abs(change).max()), 1e-9)
    rest = [
        (name, *(f"{100 * share:.1f}" for share in (a.patches.sum(), a.itself, a.prompts)))
        for name, a in (("frozen", e.frozen), (f"task {name_of(e, e.network)}", e.masked))
    ]
    return html.joined(
        html.paragraph(ATTENTION),
        html.side_by_side(
            html.over_image("The image as seen", e.image, None, (0, 1)),
            html.over_image("Frozen network", e.image, e.frozen.patches, (0, most)),
            html.over_image(
                f"Network of task {name_of(e, e.network)}", e.image, e.masked.patches, (0, most)
            ),
            html.over_image("Difference, in points", e.image, change, (-far, far)),
            small=True,
        ),
        html.table(
            "All of the token's attention, percent",
            ("network", "patches", "itself", "prompts"),
            rest,
        ),
    )
