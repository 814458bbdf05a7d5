"""Which images make a training batch, and how they come to the devices: from memory all at once,
from files through Grain.

A task's batches are a pure function of seed, task and step, so that a run can be continued from any
step.
"""

import dataclasses
import functools
import math
import os
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from soft_jax.data.augmentation import Augment, augment_file
from soft_jax.data.sources import EncodedImages

AHEAD_BYTES = 2**30  # of batches from files that wait to be used

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchSampler:
    """A task's batches as rows of its `count` training images, every image once an epoch, in
    another order each time.

    The last batch of an epoch holds what is left. With `replay`, as many more are drawn from the
    `replayed` rows that follow the `count`, as far as there are any, and every batch is padded to
    one size that `devices` divides, with weight 0.
    """

    seed: int
    task: int
    count: int
    epochs: int
    batch_size: int
    devices: int
    replay: bool = False
    replayed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of batches in an epoch."""
        return math.ceil(self.count / self.batch_size)

    @property
    def steps(self) -> int:
        """Return the number of batches of the task."""
        return self.epochs * self.steps_per_epoch

    @property
    def padded(self) -> int:
        """Return the number of rows in a batch, padding included."""
        return math.ceil(self.batch_size * (1 + self.replay) / self.devices) * self.devices

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return step `step`'s rows, int32 `[padded]`, and their weights, float32 `[padded]`."""
        epoch, index = divmod(step, self.steps_per_epoch)
        chosen = _order(self.seed, self.task, epoch, self.count)[
            index * self.batch_size : (index + 1) * self.batch_size
        ]
        if self.replay:
            rng = np.random.default_rng([self.seed, zlib.crc32(b"replay"), self.task, step])
            chosen = np.concatenate(
                [chosen, self.count + rng.permutation(self.replayed)[: len(chosen)]]
            )
        rows, weights = np.zeros(self.padded, np.int32), np.zeros(self.padded, np.float32)
        rows[: len(chosen)], weights[: len(chosen)] = chosen, 1
        return rows, weights

    def chunk(self, first: int, count: int, length: int) -> Batch:
        """Return the batches of `count` steps from `first` on, then zeros up to `length` steps.

        The result has `rows` and `weights`, each `[length, padded]`.
        """
        rows, weights = (
            np.zeros((length, self.padded), np.int32),
            np.zeros((length, self.padded), np.float32),
        )
        for index in range(count):
            rows[index], weights[index] = self.batch(first + index)
        return {"rows": rows, "weights": weights}


@functools.lru_cache(maxsize=8)
def _order(seed: int, task: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(b"shuffle"), task, epoch]).permutation(count)


def pad(rows: np.ndarray, length: int) -> np.ndarray:
    """Return `rows` `[N, ...]` with zeros behind them, `length` in all."""
    return np.concatenate([rows, np.zeros((length - len(rows), *rows.shape[1:]), rows.dtype)])


def _cores() -> int:
    """Return how many cores this process may use; macOS can only tell how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def from_files(
    sampler: BatchSampler,
    files: EncodedImages,
    spec: Augment,
    first: int,
    process: int = 0,
    processes: int = 1,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield the batches from step `first` on, decoded and augmented by threads ahead of use.

    Each of `processes` gets its own rows of every batch, as (`{"images": uint8 [rows, size, size,
    3], "labels", "weights"}`, rows of the task). An image is augmented by its place in the sampler
    alone, so the batches depend neither on threads nor on processes. Raises UserError naming a file
    that can't be read.
    """
    import grain  # a third of what a run would import, and only files need it

    each = sampler.padded // processes
    first_row = process * each

    def load(step: int) -> dict[str, np.ndarray]:
        rows, weights = (array[first_row : first_row + each] for array in sampler.batch(step))
        images, labels = (
            np.zeros((each, spec.size, spec.size, 3), np.uint8),
            np.zeros(each, np.int32),
        )
        for index in np.flatnonzero(weights):
            rng = np.random.default_rng(
                [sampler.seed, zlib.crc32(b"augment"), sampler.task, step, first_row + index]
            )
            images[index] = files.image(
                rows[index],
                lambda levels, rng=rng: augment_file(rng, Image.fromarray(levels), spec),
            )
            labels[index] = files.labels[rows[index]]
        return {"images": images, "labels": labels, "weights": weights, "rows": rows}

    # A thread makes a whole batch; decoding and resizing let go of Python's lock. Twice as many
    # batches wait as threads work, if they fit.
    threads = max(2, _cores())
    waiting = max(1, min(2 * threads, AHEAD_BYTES // (3 * each * spec.size**2)))
    options = grain.ReadOptions(num_threads=min(threads, waiting), prefetch_buffer_size=waiting)
    iterator = iter(grain.MapDataset.range(sampler.steps).map(load).to_iter_dataset(options))
    iterator.set_state({"next_index": first})
    for batch in iterator:
        yield {name: batch[name] for name in ("images", "labels", "weights")}, batch["rows"]
