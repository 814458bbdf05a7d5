"""A task's images as its training steps take them: from the devices' memory, or from files."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from soft_jax import distributed, pytrees
from soft_jax.data import batches
from soft_jax.data.augmentation import Augment
from soft_jax.data.sources import EncodedImages, InMemoryImages
from soft_jax.training import train_step
from soft_jax.training.clock import Stopwatch
from soft_jax.training.train_step import StepConfig, TrainState


@dataclasses.dataclass(frozen=True)
class TaskData:
    """What a task is trained on.

    `images` are its own, then exemplars of older tasks; `columns` hold more of each image,
    `[N, ...]` (the method's, and `query`). `sampler` says which of them make a batch. `class_mask`
    bool `[classes]` are the classes of the cross entropy, `memory` is what the method recalls of
    older tasks, `rates` are those of a `scheduled` step. `pool_size` is the number of rows that
    every task's images are padded to on the devices, so that one program serves all tasks.
    """

    images: InMemoryImages | EncodedImages
    columns: Mapping[str, np.ndarray]
    sampler: batches.BatchSampler
    class_mask: np.ndarray
    memory: pytrees.Tree
    freeze_g_prompt: bool
    augment: Augment
    augment_key: jax.Array
    pool_size: int
    rates: train_step.Rates | None = None


class TaskInput:
    """Run a task's steps: many in one call for images in memory, one by one for files.

    `waited` measures the time that the host spent on getting batches ready. Files are loaded in
    threads meanwhile.
    """

    def __init__(
        self, data: TaskData, step_config: StepConfig, mesh: Mesh, params: pytrees.Tree, first: int
    ):
        whole = distributed.replicated(mesh)
        fixed = {
            "class_mask": data.class_mask,
            "freeze_g_prompt": np.bool_(data.freeze_g_prompt),
        }
        if step_config.scheduled:
            fixed["rates"] = data.rates
        self._fixed = distributed.to_global(fixed, whole) | {"memory": data.memory}
        self._key = distributed.to_global(data.augment_key, whole)
        self._data, self._step_config, self._mesh, self._params = data, step_config, mesh, params
        self.waited = Stopwatch()
        self._files: Iterator | None = None
        if isinstance(data.images, InMemoryImages):
            pool = {"images": data.images.images, "labels": data.images.labels, **data.columns}
            padded = {name: batches.pad(array, data.pool_size) for name, array in pool.items()}
            self.pool = distributed.to_global(padded, whole)
        else:
            process, count = jax.process_index(), jax.process_count()
            self._files = batches.from_files(
                data.sampler, data.images, data.augment, first, process, count
            )

    def advance(self, state: TrainState, first: int, count: int) -> tuple[TrainState, Any]:
        """Run `count` steps from step `first` on.

        Returns the new state, and `train_step.TERMS` of the steps: a dict of arrays `[>= count]`,
        or a list of `count` dicts of scalars.
        """
        return (
            self._from_files(state, count) if self._files else self._from_pool(state, first, count)
        )

    def _from_pool(
        self, state: TrainState, first: int, count: int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        with self.waited:
            chunk = self._data.sampler.chunk(first, count, train_step.CHUNK)
            rows = distributed.to_global(chunk, distributed.replicated(self._mesh))
        steps = train_step.compile_steps(self._step_config, self._mesh)
        return steps(state, self._params, self.pool, rows, self._fixed, self._key, np.int32(count))

    def _from_files(
        self, state: TrainState, count: int
    ) -> tuple[TrainState, list[dict[str, jax.Array]]]:
        step, terms = train_step.compile_step(self._step_config, self._mesh), []
        for _ in range(count):
            with self.waited:
                batch, rows = next(self._files)
                columns = self._data.columns
                batch |= {name: column[rows] for name, column in columns.items()}
                batch = distributed.local_to_global(batch, distributed.by_row(self._mesh))
            state, now = step(state, self._params, batch | self._fixed, self._key)
            terms.append(now)
        return state, terms
