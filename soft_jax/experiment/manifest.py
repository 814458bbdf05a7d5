"""What is measured of a finished task beside its figures: sizes, drift, densities, versions."""

import dataclasses
import math
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

from soft_jax import pytrees
from soft_jax.evaluation import evaluate
from soft_jax.evaluation.metrics import TEST, VALIDATION
from soft_jax.experiment.run import Run
from soft_jax.methods import changes, rehearsal
from soft_jax.methods.method import Adapter, Shared
from soft_jax.store.records import TaskManifest

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def make(
    run: Run,
    task: int,
    adapter: Adapter,
    items: Mapping[str, pytrees.Tree],
    stages: Mapping[str, evaluate.Stage],
    seconds: Mapping[str, float],
) -> TaskManifest:
    """Make the manifest of task `task`.

    `adapter` is as the task goes on with it, which what is stored unpacks to; `items` are as they
    are stored; `stages` has what was evaluated, by part of the data set.
    """
    classes = run.scenario.classes_of(task)
    masks = pytrees.flatten(adapter.get("mask", {}))
    metrics = {
        part: {protocol: [_counts(row) for row in rows] for protocol, rows in stage.rows.items()}
        for part, stage in stages.items()
    }
    sizes = {name: pytrees.nbytes(tree) for name, tree in items.items()}
    return TaskManifest(
        task=task,
        classes=tuple(classes),
        class_names=tuple(run.dataset.class_names[c] for c in classes),
        num_classes=run.scenario.num_classes,
        num_tasks=run.scenario.num_tasks,
        config=dataclasses.asdict(run.config),
        backbone={"name": run.backbone.name, "sha256": run.backbone.fingerprint},
        metrics=metrics[TEST],
        validation=metrics.get(VALIDATION, {}),
        temperature=dict(stages[TEST].temperatures),
        calibration=stages[TEST].calibration_counts,
        seconds=dict(seconds),
        parameters={
            "adapter": pytrees.count(adapter),
            "shared": pytrees.count(run.method.trained_of_shared(items["shared"])),
            "fixed": run.method.count_fixed(adapter),
        },
        step_flops=run.step_flops,
        bytes=sizes | {"exemplars": _exemplar_bytes(run, items["memory"])},
        mask_distance_from_one={path: _distance_from_one(mask) for path, mask in masks.items()},
        weight_drift=_drift(run, adapter, items["shared"]),
        mask_density={path: _density(mask) for path, mask in masks.items()},
        versions={"python": platform.python_version()}
        | {name: metadata.version(name) for name in _PACKAGES},
    )


def _counts(row: evaluate.Row) -> dict[str, Any]:
    # There may be hundreds of tasks, most of which got none of its images.
    identified = {str(task): count for task, count in enumerate(row.identified) if count}
    return dataclasses.asdict(row) | {"identified": identified}


def _exemplar_bytes(run: Run, memory: pytrees.Tree) -> int:
    """Return the bytes of the older tasks' images that are trained on, as the step gets them.

    The store keeps their rows alone.
    """
    if not run.method.rehearsal:
        return 0
    return len(rehearsal.all_rows_of(memory)) * math.prod(run.image_shape)


def _drift(run: Run, adapter: Adapter, shared: Shared) -> dict[str, float]:
    """Return how far the task's weights are from the frozen ones, |θ_t − θ| / |θ|, by parameter.

    Norms are 2-norms; parameters are those that the weights replace.
    """
    theta = {path: np.asarray(w) for path, w in pytrees.flatten(run.backbone.params).items()}
    there = pytrees.flatten(run.method.weights(run.params, adapter) | shared.get("weights", {}))
    return {
        path: changes.relative(np.asarray(w) - theta[path], theta[path])
        for path, w in there.items()
        if path in theta
    }


def _distance_from_one(mask: jax.Array) -> float:
    """Return the root of the mean of (m - 1)²."""
    # By NumPy, as `_drift`: JAX would compile each operation for each shape, for one use.
    return float(np.sqrt(np.mean((np.asarray(mask) - 1) ** 2)))


def _density(mask: jax.Array) -> dict[str, Any]:
    """Return a histogram of a mask's entries between its extremes."""
    counts, edges = np.histogram(np.asarray(mask), bins=60)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}
