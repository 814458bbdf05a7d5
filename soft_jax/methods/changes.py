"""How far a task's weights are from the frozen ones, by layer, kernel and attention head, and how
alike the changes of two tasks are.

W are the weights that take the place of the frozen θ: θ ⊙ m with masks, W + AB with LoRA. Plain
NumPy.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from soft_jax import pytrees
from soft_jax.models.protocol import Architecture

PARTS = ("q", "k", "v", "proj", "fc1", "fc2")  # of a layer, in the order of the computation
SKETCH = 8192  # numbers that stand for a longer change
_EXACT = 2**27  # numbers of all tasks together that are compared as they are (512 MiB)


class Place(NamedTuple):
    """A kernel, or a third of a fused one: its tower, its layer from 0, and its name in `PARTS`."""

    tower: str
    layer: int
    part: str


class Change(NamedTuple):
    """How far a task's weights are from the frozen ones: ‖W − θ‖ / ‖θ‖, norms are 2-norms.

    `overall` is over all kernels together; `by_place` of each, q, k and v each by itself; `by_head`
    `[heads]` of each attention head of the vision tower, for q, k, v and proj: a head has columns
    of q, k and v, and rows of proj.
    """

    overall: float
    by_place: dict[Place, float]
    by_head: dict[Place, np.ndarray]


def measure(
    architecture: Architecture, backbone: pytrees.Tree, weights: pytrees.Tree
) -> Change | None:
    """Return how far `weights` are from those that they replace; None where they replace none.

    With masks, ‖W − θ‖ is ‖(m − 1) ⊙ θ‖.
    """
    norms, by_place, by_head = [], {}, {}
    for place, theta, change in _pieces(architecture, backbone, weights):
        norms.append((_norm(change), _norm(theta)))
        by_place[place] = _ratio(*norms[-1])
        if place.tower != "vision" or place.part not in PARTS[:4]:
            continue
        axis = 0 if place.part == "proj" else 1
        parts = (np.split(array, architecture.heads, axis) for array in (change, theta))
        by_head[place] = np.array([relative(a, b) for a, b in zip(*parts, strict=True)])
    if not norms:
        return None
    return Change(_ratio(*np.linalg.norm(norms, axis=0)), by_place, by_head)


def relative(change: np.ndarray, theta: np.ndarray) -> float:
    """Return ‖change‖ / ‖θ‖ of two arrays of one shape; norms are 2-norms."""
    return _ratio(_norm(change), _norm(theta))


def _ratio(change: float, theta: float) -> float:
    return float(change / max(theta, 1e-12))


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array))


def _pieces(
    architecture: Architecture, backbone: pytrees.Tree, weights: pytrees.Tree
) -> Iterator[tuple[Place, np.ndarray, np.ndarray]]:
    """Yield θ and W − θ of each kernel, or of each third of a fused one."""
    theta, changed = pytrees.flatten(backbone), pytrees.flatten(weights)
    for tower, depth in architecture.towers.items():
        for layer in range(depth):
            block = f"{architecture.block_path(layer, tower)}/"
            for path in (path for path in changed if path.startswith(block) and path in theta):
                before = np.asarray(theta[path], np.float32)
                change = np.asarray(changed[path], np.float32) - before
                name, count = path.split("/")[-2], architecture.fused(path)
                names = PARTS[:3] if count == 3 else (name,)
                pairs = (np.split(array, count, axis=-1) for array in (before, change))
                for part, one, other in zip(names, *pairs, strict=True):
                    yield Place(tower, layer, part), one, other


def vector(backbone: pytrees.Tree, weights: pytrees.Tree, tasks: int) -> np.ndarray:
    """Return W − θ of all kernels as one row, float32, of a length that suits so many `tasks`.

    Longer rows than fit in memory together are cut to `SKETCH` numbers: each entry is added, with a
    random sign, to a random one of them (a count sketch, Charikar et al., 2002). Cosines of the
    rows are then right to about 1/√SKETCH, 0.011.
    """
    theta, changed = pytrees.flatten(backbone), pytrees.flatten(weights)
    rows = [
        (np.asarray(changed[path], np.float32) - np.asarray(theta[path], np.float32)).reshape(-1)
        for path in changed
        if path in theta
    ]
    row = np.concatenate(rows) if rows else np.zeros(0, np.float32)
    if is_exact(row.size, tasks):
        return row
    places, signs = _sketch(row.size, SKETCH)
    return np.bincount(places, signs * row, SKETCH).astype(np.float32)


@functools.lru_cache(maxsize=1)
def _sketch(size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return places and signs of the entries of all tasks' changes, each `[size]`."""
    rng = np.random.default_rng(0)
    return rng.integers(0, length, size), 2 * rng.integers(0, 2, size, dtype=np.int8) - 1


def is_exact(size: int, tasks: int) -> bool:
    """Whether changes of `size` numbers of so many tasks are compared as they are."""
    return size <= SKETCH or size * tasks <= _EXACT


def cosine_distances(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return 1 − cos between the changes of tasks, `[tasks, tasks]`, float64.

    0: the same direction, 1: nothing in common, 2: opposite. A change of zeros has 1 to all others.
    """
    stacked = np.stack(rows)
    products = (stacked @ stacked.T).astype(np.float64)
    lengths = np.sqrt(np.diag(products))
    lengths = np.where(lengths > 0, lengths, 1)
    distances = 1 - products / lengths[:, None] / lengths[None]
    np.fill_diagonal(distances, 0)
    return np.clip((distances + distances.T) / 2, 0, 2)


def mean(changes: Sequence[Mapping[Place, float]]) -> dict[Place, float]:
    """Return the mean over tasks, of places that all of them change."""
    places = [place for place in changes[0] if all(place in other for other in changes)]
    return {place: float(np.mean([change[place] for change in changes])) for place in places}
