"""Task identity by k-means centres of the frozen features (S-Prompts, Wang et al., 2022).

A task leaves the centres of its training images' q(x), each scaled to norm 1. An image is given to
the task of its nearest centre in the L1 distance.
"""

import warnings
from collections.abc import Mapping, Sequence

import jax
import numpy as np

COUNT = 5  # of a task, as published


def normalized(query: np.ndarray) -> np.ndarray:
    """Return q(x) `[N, dim]` scaled to norm 1, float32."""
    query = np.asarray(query, np.float32)
    return query / np.maximum(np.linalg.norm(query, axis=1, keepdims=True), 1e-12)


def statistics(query: np.ndarray) -> dict[str, np.ndarray]:
    """Return the centres of q(x) `[N, dim]`, N at least 1: `{"centres": float32 [COUNT, dim]}`.

    Of fewer different images than centres, some centres stand twice.
    """
    # Only learning needs them, and they take more than a second of CPU to import.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    query = normalized(query)
    means = KMeans(min(COUNT, len(query)), random_state=0, n_init=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # images that are the same
        centres = means.fit(query).cluster_centers_
    return {"centres": np.resize(centres.astype(np.float32), (COUNT, query.shape[1]))}


def distances(query: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return how far q(x) `[N, dim]` is from the nearest of each task's centres, `[N, T]`.

    `centres` are `[T, COUNT, dim]`; distances are L1, of normalized q(x).
    """
    query = normalized(query)
    found = [np.abs(query[:, None] - task[None]).sum(axis=2).min(axis=1) for task in centres]
    return np.stack(found, axis=1)


class Centres:
    """The centres of all tasks, in the order of the tasks."""

    def __init__(self):
        self._centres: list[np.ndarray] = []

    def add(self, classes: Sequence[int], statistics: Mapping[str, jax.Array]) -> None:
        """Take in one more task's centres."""
        self._centres.append(np.asarray(statistics["centres"]))

    def solve(self) -> np.ndarray:
        """Return the centres, float32 `[T, COUNT, dim]`."""
        return np.stack(self._centres)
