"""One task's masks made of several tasks': their mean, TIES or DARE.

What is merged is m − 1, a task's distance from the frozen network: W − θ = (m − 1) ⊙ θ, so tasks
start at one common point, as both methods ask for. The initial draw m₀ is each task's own, and no
such point; where masks are drawn near 1, what it adds to m − 1 is small noise (0.003 beside the
0.08 that training adds, `benchmarks/README.md`), which TIES cuts off and a mean averages out.

Plain functions over trees of NumPy arrays; nothing is trained, and no image is seen.
"""

from collections.abc import Sequence

import jax
import numpy as np

from soft_jax import pytrees
from soft_jax.config import unknown_value
from soft_jax.errors import UserError

# The share of a task's entries that is kept, where none is given: the papers' own.
DENSITIES = {"ties": 0.2, "dare": 0.1}
METHODS = ("mean", *DENSITIES)


def merge(
    masks: Sequence[pytrees.Tree],
    method: str,
    weights: Sequence[float],
    density: float,
    key: jax.Array,
) -> pytrees.Tree:
    """Merge masks, trees of float32 of the same shapes, one for each task.

    `method` is one of `METHODS`. `weights`, above 0, say how much each task counts; their sum does
    not matter. `density` in (0, 1] and `key` are for those methods that take them.
    """
    changes = [jax.tree.map(lambda mask: np.asarray(mask) - np.float32(1), m) for m in masks]
    if method == "dare":
        changes = [
            dropped(change, density, jax.random.fold_in(key, task))
            for task, change in enumerate(changes)
        ]
    elif method == "ties":
        changes = [trimmed(change, density) for change in changes]
    join = _agreed if method == "ties" else _mean
    share = np.asarray(weights, np.float32) / np.float32(sum(weights))
    return jax.tree.map(lambda *rows: 1 + join(np.stack(rows), share), *changes)


def check(method: str, weights: Sequence[float], density: float | None, count: int) -> float:
    """Return the density to merge `count` tasks with, `density` or the method's own.

    Raises UserError for a method, weights or a density that mean nothing.
    """
    if method not in METHODS:
        raise UserError(unknown_value("method", method, METHODS))
    if len(weights) != count or not all(0 < weight < np.inf for weight in weights):
        raise UserError(
            f"weights: {', '.join(f'{weight:g}' for weight in weights)}; give a number above 0 "
            f"for each of the {count} tasks"
        )
    if density is None:
        return DENSITIES.get(method, 1.0)
    if method not in DENSITIES:
        raise UserError(f"density: the method {method!r} keeps all entries; leave it out")
    if not 0 < density <= 1:
        raise UserError(f"density: {density:g} is no share above 0 and at most 1")
    return density


def trimmed(change: pytrees.Tree, density: float) -> pytrees.Tree:
    """Return a task's change with its largest entries alone, and 0 for the others.

    The share `density` of all its kernels' entries together stays, and what is as large as the
    smallest of those (TIES, Yadav et al., 2023, step 1).
    """
    sizes = np.concatenate([np.abs(leaf).reshape(-1) for leaf in jax.tree.leaves(change)])
    place = sizes.size - max(1, round(density * sizes.size))
    least = np.partition(sizes, place)[place]
    return jax.tree.map(lambda leaf: np.where(np.abs(leaf) >= least, leaf, np.float32(0)), change)


def dropped(change: pytrees.Tree, density: float, key: jax.Array) -> pytrees.Tree:
    """Return a task's change with random entries set to 0, and the others raised to make up for it.

    Each stays with probability `density`, and is divided by it (DARE, Yu et al., 2024).
    """
    leaves, tree = jax.tree.flatten(change)
    out = []
    for one, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True):
        stays = np.asarray(jax.random.bernoulli(one, density, leaf.shape))
        out.append(np.where(stays, leaf / np.float32(density), np.float32(0)))
    return jax.tree.unflatten(tree, out)


def _mean(rows: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return the weighted mean of `[tasks, in, out]` over tasks."""
    return np.tensordot(share, rows, axes=1)


def _agreed(rows: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return at each entry the weighted mean of those tasks that have the sign of their sum.

    Tasks whose entry is 0 don't count; it is 0 where none does (TIES, steps 2 and 3).
    """
    weighted = share[:, None, None] * rows
    agree = np.sign(rows) == np.sign(weighted.sum(axis=0))
    counted = (share[:, None, None] * agree).sum(axis=0)
    total = (weighted * agree).sum(axis=0)
    return np.divide(total, counted, out=np.zeros_like(total), where=counted > 0)
