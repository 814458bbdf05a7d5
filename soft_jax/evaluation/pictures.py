"""A run's pictures, from its tasks' manifests: accuracy, task identity, masks."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Figures without pyplot: no display, no global state.
import numpy as np
from matplotlib.figure import Figure

from soft_jax.evaluation import metrics
from soft_jax.evaluation.metrics import Manifests
from soft_jax.inference import rules

MOST_LABELS = 20  # of tasks along a side


def draw(root: Path, manifests: Manifests) -> list[str]:
    """Draw the pictures of at least one task into the folder `root`; return their file names."""
    last = manifests[-1]
    protocols = list(last.metrics)
    # With the task given there is nothing to confuse.
    identifying = [p for p in protocols if p.partition("/")[0] != rules.ORACLE]
    drawn = {
        "accuracy_matrix.png": accuracy_matrices(manifests, protocols),
        "task_confusion.png": task_confusions(manifests, identifying),
        "accuracy_and_forgetting.png": curves(manifests, protocols),
    }
    if last.mask_density:
        drawn["mask_density.png"] = mask_densities(last.mask_density)
    if last.mask_distance_from_one:
        drawn["mask_distance.png"] = mask_distances(manifests)
    for name, figure in drawn.items():
        save(figure, root / name)
    return list(drawn)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, whole or not at all; a link there is replaced, not followed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    figure.savefig(partial, dpi=100, format="png")
    os.replace(partial, path)


def accuracy_matrices(manifests: Manifests, protocols: list[str]) -> Figure:
    """Draw the accuracy on each task after each task trained, a panel a protocol."""
    figure, panels = _row_of_panels(len(protocols), height=4)
    for axes, protocol in zip(panels, protocols, strict=True):
        matrix = metrics.accuracy_matrix(manifests, protocol)
        below = np.tril(np.ones_like(matrix), -1)
        image = axes.imshow(np.ma.masked_array(matrix, below), vmin=0, vmax=100)
        axes.set(title=protocol, xlabel="trained through task", ylabel="test images of task")
        for set_ticks in (axes.set_xticks, axes.set_yticks):
            _number(set_ticks, len(manifests))
    figure.colorbar(image, ax=figure.axes, label="accuracy (%)")
    return figure


def task_confusions(manifests: Manifests, protocols: list[str]) -> Figure:
    """Draw which tasks the test images of each are given to, a panel a protocol."""
    figure, panels = _row_of_panels(len(protocols), height=4)
    for axes, protocol in zip(panels, protocols, strict=True):
        confusion = metrics.task_confusion(manifests[-1], protocol)
        image = axes.imshow(confusion, vmin=0, vmax=100)
        axes.set(title=protocol, xlabel="given to task", ylabel="test images of task")
        _number(axes.set_xticks, confusion.shape[1])
        _number(axes.set_yticks, len(manifests))
    figure.colorbar(image, ax=figure.axes, label="test images (%)")
    return figure


def curves(manifests: Manifests, protocols: list[str]) -> Figure:
    """Draw average accuracy and forgetting over the tasks trained, a curve a protocol."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    stages = np.arange(1, len(manifests) + 1)
    values = {
        protocol: metrics.by_stage(metrics.accuracies(m, protocol) for m in manifests)
        for protocol in protocols
    }
    titles = {"final_average": "average accuracy", "forgetting": "forgetting"}
    for axes, (field, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for protocol in protocols:
            axes.plot(stages, values[protocol][field], marker="o", label=protocol)
        ticks = stages[:: _every(len(stages))]
        axes.set(xlabel="tasks trained", ylabel=f"{title} (%)", xticks=ticks)
        axes.legend()
    return figure


def mask_distances(manifests: Manifests) -> Figure:
    """Draw how far each task's masks are from 1, a row a masked parameter and a column a task."""
    paths = sorted(manifests[-1].mask_distance_from_one, key=layer_first)
    width = 2 + 0.8 * min(len(manifests), MOST_LABELS)
    figure = Figure(figsize=(width, 1 + 0.4 * len(paths)), layout="constrained")
    axes = figure.subplots()
    values = np.array([[m.mask_distance_from_one[path] for m in manifests] for path in paths])
    image = axes.imshow(values, aspect="auto")
    axes.set_yticks(range(len(paths)), [_label(path) for path in paths])
    _number(axes.set_xticks, len(manifests))
    axes.set(xlabel="task", title="how far each mask moved from 1")
    figure.colorbar(image, ax=axes, label="root mean square of m − 1")
    return figure


def mask_densities(densities: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the densities of a task's mask entries (the paper's Figures 6 and 7).

    `densities` are those of `TaskManifest.mask_density`. A panel is a weight, a curve a layer.
    """
    weights = sorted({weight_of(path) for path in densities})
    figure, panels = _row_of_panels(len(weights), height=3.5)
    for axes, weight in zip(panels, weights, strict=True):
        for path in sorted((p for p in densities if weight_of(p) == weight), key=layer_first):
            found, bins = densities[path], np.array(densities[path]["counts"])
            edges = np.linspace(found["low"], found["high"], len(bins) + 1)
            label = _label(path).split()[0]
            axes.stairs(bins / bins.sum() / np.diff(edges), edges, label=label)
        axes.set(title=weight, xlabel="mask entry", ylabel="density", yscale="log")
        axes.legend()
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


def _label(path: str) -> str:
    layer = layer_of(path)
    return weight_of(path) if layer is None else f"L{layer + 1} {weight_of(path)}"


def _row_of_panels(count: int, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4 * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _every(count: int) -> int:
    """Return the step from one labelled place to the next, for `count` places in a row."""
    return -(-count // MOST_LABELS)


def _number(set_ticks: Callable[..., Any], count: int) -> None:
    """Label places 0 to `count` - 1 with 1 to `count`, leaving out labels there is no room for."""
    places = np.arange(0, count, _every(count))
    set_ticks(places, places + 1)
