"""A run's pictures: accuracy, confusion of tasks and classes, probabilities, masks.

They are made to be taken into a paper: a light background, colours that colour-blind readers can
tell apart (cividis; Okabe and Ito, 2008), numbers in heat maps where they fit, protocols by their
titles, names for tasks and classes.
"""

import io
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Figures without pyplot: no display, no global state.
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from soft_jax.evaluation import calibration, metrics, predictions
from soft_jax.evaluation.metrics import Manifests
from soft_jax.inference import rules
from soft_jax.paths import Place
from soft_jax.store import files

MOST_LABELS = 20  # along a side of a heat map
MOST_NUMBERS = 12  # rows or columns of a heat map with numbers in its cells
COLORS = "cividis"  # of heat maps, and of layers in their order
# Of curves, after Okabe and Ito (2008); the yellow among them is too light for a line.
CURVES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_MARKERS = "osD^vPX*"  # so that curves differ without colour, too
_IN_A_ROW = 3  # panels
_DPI = 150
_LONGEST = 12  # letters of a name along a side


def draw(root: Place, manifests: Manifests) -> list[str]:
    """Draw the pictures of at least one task into the folder `root`; return their file names.

    `root` is the run's, where `predictions.csv` tells which classes are taken for which. Raises
    UserError where that is damaged.
    """
    last = manifests[-1]
    protocols = list(last.metrics)
    # With the task given there is nothing to confuse.
    identifying = [p for p in protocols if p.partition("/")[0] != rules.ORACLE]
    drawn = {
        "accuracy_matrix.png": accuracy_matrices(manifests, protocols),
        "task_confusion.png": task_confusions(manifests, identifying),
        "accuracy_and_forgetting.png": curves(manifests, protocols),
    }
    if confusions := _class_confusions(root, manifests):
        drawn["class_confusion.png"] = confusions
    if last.calibration:
        drawn["reliability.png"] = reliability(last.calibration)
    if last.mask_density:
        drawn["mask_density.png"] = mask_densities(last.mask_density)
    if last.mask_distance_from_one:
        drawn["mask_distance.png"] = mask_distances(manifests)
    for name, figure in drawn.items():
        save(figure, root / name)
    return list(drawn)


def save(figure: Figure, path: Place) -> None:
    """Write a figure as a PNG file, whole or not at all; a link there is replaced, not followed.

    Raises UserError where it can't be written.
    """
    png = io.BytesIO()
    with warnings.catch_warnings():
        # A class name may have signs that the font lacks: boxes stand for them, and nobody can
        # mend that here.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(png, dpi=_DPI, format="png", facecolor="white")
    files.of(path).write(path, png.getvalue(), durable=False)


def accuracy_matrices(manifests: Manifests, protocols: Sequence[str]) -> Figure:
    """Draw the accuracy on each task after each task trained, a panel a protocol."""
    tasks = _task_labels(manifests)
    titles, count = [rules.title(protocol) for protocol in protocols], len(manifests)
    figure, panels = _panels(titles, count, "trained through task", "test images of task")
    for axes, protocol in zip(panels, protocols, strict=True):
        matrix = metrics.accuracy_matrix(manifests, protocol)
        below = np.tril(np.ones_like(matrix, dtype=bool), -1)
        image = _heat_map(axes, np.ma.masked_array(matrix, below))
        _number(axes.set_xticks, len(manifests))
        _name(axes.set_yticks, tasks)
    figure.colorbar(image, ax=panels, label="accuracy (%)")
    return figure


def task_confusions(manifests: Manifests, protocols: Sequence[str]) -> Figure:
    """Draw which tasks the test images of each are given to, a panel a protocol."""
    tasks = _task_labels(manifests)
    titles, count = [rules.title(protocol) for protocol in protocols], len(manifests)
    figure, panels = _panels(titles, count, "given to task", "test images of task")
    for axes, protocol in zip(panels, protocols, strict=True):
        confusion = metrics.task_confusion(manifests[-1], protocol)
        image = _heat_map(axes, confusion)
        _number(axes.set_xticks, confusion.shape[1])
        _name(axes.set_yticks, tasks)
    figure.colorbar(image, ax=panels, label="test images (%)")
    return figure


def class_confusion(
    truth: Sequence[str], answers: Mapping[str, Sequence[str]], class_names: Sequence[str]
) -> Figure:
    """Draw which classes the images of each are taken for, a panel a protocol.

    Args:
        truth: the images' classes, names `[N]`.
        answers: what they were taken for, names `[N]`, by the title of the panel.
        class_names: all that occur in either, in the order in which they are shown.
    """
    places = {name: place for place, name in enumerate(class_names)}
    count = len(class_names)
    figure, panels = _panels(list(answers), count, "taken for class", "test images of class")
    for axes, given in zip(panels, answers.values(), strict=True):
        rows, columns = ([places[name] for name in names] for names in (truth, given))
        confusion = np.zeros((count, count))
        np.add.at(confusion, (rows, columns), 1)
        images = confusion.sum(axis=1, keepdims=True)
        image = _heat_map(axes, 100 * confusion / np.maximum(images, 1))
        _name(axes.set_xticks, class_names, rotation=90 if max(map(len, class_names)) > 2 else 0)
        _name(axes.set_yticks, class_names)
    figure.colorbar(image, ax=panels, label="test images (%)")
    return figure


def _class_confusions(root: Place, manifests: Manifests) -> Figure | None:
    """Draw `class_confusion` of the rules that look at one image at a time.

    None where the folder has no answers, or not those after the last task.
    """
    if not (root / predictions.FILE).is_file():
        return None
    answers = predictions.read(root)
    if set(answers.tasks) != set(range(len(manifests))):
        return None
    given = {
        rules.title(key): names
        for key, names in answers.answers.items()
        if key.startswith(f"{rules.PER_SAMPLE}/")
    }
    names = [name for manifest in manifests for name in manifest.class_names]
    known = set(names).issuperset
    if not given or not known(answers.truth) or not all(map(known, given.values())):
        return None
    return class_confusion(answers.truth, given, names)


def reliability(counted: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw how often answers are right by the probability they are given with.

    `counted` is `TaskManifest.calibration`: `calibration.count` by protocol, a panel each. A dot is
    a bin of answers, its area their share of all; on the diagonal a probability is one.
    """
    titles = [rules.title(protocol) for protocol in counted]
    figure, panels = _panels(titles, 0, "probability of the answers (%)", "right answers (%)")
    for axes, counts in zip(panels, counted.values(), strict=True):
        images, sure, right = (
            np.asarray(counts[name], float) for name in ("count", "confidence", "correct")
        )
        some = images > 0
        images, sure, right = images[some], sure[some], right[some]
        axes.plot([0, 100], [0, 100], color="0.6", linestyle="--", linewidth=1)
        axes.plot(100 * sure / images, 100 * right / images, color=CURVES[0], linewidth=1)
        areas = 10 + 200 * images / images.sum()
        axes.scatter(100 * sure / images, 100 * right / images, areas, CURVES[0], zorder=3)
        error = f"ECE {calibration.expected_error(counts):.1f}"
        axes.text(0.04, 0.96, error, transform=axes.transAxes, va="top")
        axes.set(xlim=(0, 103), ylim=(-3, 103))
        axes.set_aspect("equal")
    return figure


def curves(manifests: Manifests, protocols: Sequence[str]) -> Figure:
    """Draw average accuracy and forgetting over the tasks trained, a curve a protocol."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    stages = np.arange(1, len(manifests) + 1)
    values = {
        protocol: metrics.by_stage(metrics.accuracies(m, protocol) for m in manifests)
        for protocol in protocols
    }
    fields = {"final_average": "average accuracy", "forgetting": "forgetting"}
    both = figure.subplots(1, 2)
    for axes, (field, name) in zip(both, fields.items(), strict=True):
        for number, protocol in enumerate(protocols):
            axes.plot(
                stages,
                values[protocol][field],
                color=CURVES[number % len(CURVES)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                linestyle="--" if protocol.startswith(f"{rules.ORACLE}/") else "-",
                label=rules.title(protocol),
            )
        ticks = stages[:: _every(len(stages))]
        axes.set(xlabel="tasks trained", ylabel=f"{name} (%)", xticks=ticks)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        _label_ends(axes, stages[-1], [values[protocol][field][-1] for protocol in protocols])
    ends = [values[protocol]["final_average"][-1] for protocol in protocols]
    order = np.argsort(ends)[::-1]  # as the curves end, from the top
    lines = both[0].get_lines()[: len(protocols)]
    figure.legend(
        [lines[i] for i in order],
        [rules.title(protocols[i]) for i in order],
        loc="outside right center",
        frameon=False,
    )
    return figure


def _label_ends(axes: Axes, right: float, ends: Sequence[float]) -> None:
    """Write its last value beside each curve; those that would overlap are moved apart."""
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    order = np.argsort(ends)[::-1]  # from the top
    heights = np.array(ends, float)[order]
    for i in range(1, len(heights)):
        heights[i] = min(heights[i], heights[i - 1] - gap)
    heights[-1] = max(heights[-1], low)
    for i in range(len(heights) - 2, -1, -1):
        heights[i] = max(heights[i], heights[i + 1] + gap)
    for place, height in zip(order, heights, strict=True):
        axes.annotate(
            f"{ends[place]:.1f}",
            (right, height),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=CURVES[place % len(CURVES)],
            annotation_clip=False,
        )


def mask_distances(manifests: Manifests) -> Figure:
    """Draw how far each task's masks are from 1, a row a masked parameter and a column a task."""
    paths = sorted(manifests[-1].mask_distance_from_one, key=layer_first)
    columns = min(len(manifests), MOST_LABELS)
    height = 1.4 + (0.3 if len(paths) <= MOST_LABELS else 0.2) * len(paths)
    figure = Figure(figsize=(3 + 0.6 * columns, height), layout="constrained")
    axes = figure.subplots()
    values = np.array([[m.mask_distance_from_one[path] for m in manifests] for path in paths])
    # Rows are as high as their labels, however many there are: numbers fit by the columns alone.
    numbers = len(manifests) <= MOST_NUMBERS
    image = _heat_map(axes, values, None, "{:.3f}" if numbers else "", aspect="auto")
    axes.set_yticks(range(len(paths)), [label_of(path) for path in paths], fontsize=8)
    _number(axes.set_xticks, len(manifests))
    axes.set(xlabel="task")
    axes.set_title("how far each mask moved from 1", fontsize=10)
    figure.colorbar(image, ax=axes, label="root mean square of m − 1", aspect=40)
    return figure


def mask_densities(densities: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the densities of a task's mask entries (the paper's Figures 6 and 7).

    `densities` are those of `TaskManifest.mask_density`. A panel is a weight, a curve a layer.
    """
    from matplotlib import colormaps

    weights = sorted({weight_of(path) for path in densities})
    layers = sorted({layer_first(path)[0] for path in densities})
    figure, panels = _panels(weights, 0, "mask entry", "density")
    # The light end of the colours can't be seen on white.
    shades = colormaps[COLORS](np.linspace(0, 0.85, max(len(layers), 2)))
    shown = {}
    for axes, weight in zip(panels, weights, strict=True):
        for path in sorted((p for p in densities if weight_of(p) == weight), key=layer_first):
            found, bins = densities[path], np.array(densities[path]["counts"])
            edges = np.linspace(found["low"], found["high"], len(bins) + 1)
            label = label_of(path).split()[0]
            shade = shades[layers.index(layer_first(path)[0])]
            heights = bins / bins.sum() / np.diff(edges)
            shown[label] = axes.stairs(heights, edges, label=label, color=shade)
        axes.set(yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(shown.values(), shown.keys(), loc="outside right center", frameon=False)
    return figure


def layer_of(path: str) -> int | None:
    """Return the layer, from 0, in a parameter's path, "blocks_9/attn/qkv/kernel"; None without.

    It is the number that ends the first of the path's parts to end with one.
    """
    numbers = (part.rpartition("_")[2] for part in path.split("/")[:-1])
    return next((int(number) for number in numbers if number.isdecimal()), None)


def weight_of(path: str) -> str:
    """Return which weight of a layer a parameter's path names.

    For "blocks_9/attn/qkv/kernel" that is "attn/qkv".
    """
    parts = path.split("/")[:-1]
    return "/".join(part for part in parts if not part.rpartition("_")[2].isdecimal())


def layer_first(path: str) -> tuple[int, str]:
    """Return a key that sorts parameters' paths by layer, those of no layer first."""
    layer = layer_of(path)
    return (-1 if layer is None else layer), path


def label_of(path: str) -> str:
    """Return a parameter's path as people read it, its layer counted from 1.

    "blocks_9/attn/qkv/kernel" is "L10 attn/qkv"; what is no kernel keeps its last part.
    """
    layer, last = layer_of(path), path.rpartition("/")[2]
    name = "/".join(part for part in (weight_of(path), last) if part not in ("", "kernel"))
    return name if layer is None else f"L{layer + 1} {name}"


def _panels(
    titles: Sequence[str], cells: int, x_label: str, y_label: str
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel for each title, in rows of at most `_IN_A_ROW`.

    `cells` is the number of rows or columns of the heat map in each, 0 for none.
    """
    columns = 2 if len(titles) == 4 else min(len(titles), _IN_A_ROW)
    rows = -(-len(titles) // columns)
    side = 3.4 + 0.12 * max(0, min(cells, MOST_LABELS) - 6)
    figure = Figure(figsize=(side * columns + 0.8, side * rows), layout="constrained")
    # Panels of a row have one scale up and down, whose labels stand once.
    places = figure.subplots(rows, columns, squeeze=False, sharey="row").reshape(-1)
    for axes in places[len(titles) :]:
        axes.set_visible(False)
    panels = list(places[: len(titles)])
    for place, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        axes.set_title(textwrap.fill(title, 40), fontsize=9)
        axes.set(xlabel=x_label, ylabel="" if place % columns else y_label)
    return figure, panels


def _heat_map(
    axes: Axes,
    values: np.ndarray,
    limits: tuple[float, float] | None = (0, 100),
    form: str = "{:.0f}",
    aspect: str = "equal",
) -> AxesImage:
    """Draw a matrix, with its values in the cells where they fit; masked ones are left white.

    `limits` of the colours are those of the values where None; `form` is empty for no numbers.
    """
    low, high = limits or (float(np.min(values)), float(np.max(values)))
    image = axes.imshow(values, vmin=low, vmax=high, cmap=COLORS, aspect=aspect)
    axes.tick_params(length=0)
    crowded = aspect == "equal" and max(values.shape) > MOST_NUMBERS
    if form and not crowded:
        size = 9 if max(values.shape) <= 6 else 7
        for (row, column), value in np.ndenumerate(values):
            if not np.ma.getmaskarray(values)[row, column]:
                color = "black" if value > (low + high) / 2 else "white"
                text = form.format(value)
                axes.text(
                    *(column, row, text), ha="center", va="center", color=color, fontsize=size
                )
    return image


def _task_labels(manifests: Manifests) -> list[str]:
    """Return "3: cat, dog" for each task."""
    names = (", ".join(manifest.class_names) for manifest in manifests)
    return [f"{task + 1}: {name}" for task, name in enumerate(names)]


def _every(count: int) -> int:
    """Return the step from one labelled place to the next, for `count` places in a row."""
    return -(-count // MOST_LABELS)


def _number(set_ticks: Callable[..., Any], count: int) -> None:
    """Label places 0 to `count` - 1 with 1 to `count`, leaving out labels there is no room for."""
    places = np.arange(0, count, _every(count))
    set_ticks(places, places + 1)


def _name(set_ticks: Callable[..., Any], names: Sequence[str], **style: Any) -> None:
    """Label places with names, cut short, leaving out those that there is no room for."""
    places = np.arange(0, len(names), _every(len(names)))
    labels = [
        names[place] if len(names[place]) <= _LONGEST else f"{names[place][: _LONGEST - 1]}…"
        for place in places
    ]
    set_ticks(places, labels, fontsize=8, **style)
