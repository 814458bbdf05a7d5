"""What the tasks so far have left behind, as evaluation needs it."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from soft_jax import distributed, pytrees
from soft_jax.experiment.run import Run
from soft_jax.inference import engine, rules
from soft_jax.methods.method import Adapter, Shared


class TaskBank:
    """Hold keys and prompts of all tasks, θ ⊙ m within a budget, and the statistics' sums.

    Keys and prompts of untrained tasks are as they are drawn.
    """

    def __init__(self, run: Run):
        self._run, self.tasks = run, 0
        self._rows = {
            name: np.zeros((run.scenario.num_tasks, *shape), np.float32)
            for name, shape in run.method.row_shapes.items()
        }
        for task in range(run.scenario.num_tasks):
            self._put(task, run.initial_prompts(task))
        self._in_memory: dict[int, Adapter] = {}
        budget = run.config.weights_cache_mb * 2**20
        self._weights = engine.TaskWeights(run.method, run.params, self._load, budget)
        self._collectors = {
            name: rule.collector(run.scenario.num_classes)
            for name, rule in rules.keepers(run.rules).items()
        }

    @functools.cached_property
    def template(self) -> Adapter:
        """Return shapes and dtypes of an adapter as the store keeps it."""
        return self._run.method.packed_shapes(self._run.params)

    @property
    def row_template(self) -> Adapter:
        """Return the part of `template` that is held of every task: key and E-prompt."""
        return {name: like for name, like in self.template.items() if name in self._rows}

    def _put(self, task: int, adapter: Adapter) -> None:
        for name, rows in self._rows.items():
            if name in adapter:
                rows[task] = adapter[name]

    def prompt(self, task: int) -> Adapter:
        """Return key and E-prompt of task `task`."""
        return {name: rows[task] for name, rows in self._rows.items()}

    def restore(self, task: int, rows: Adapter, statistics: Mapping[str, Any]) -> None:
        """Take in the next task, which the store has: its key and E-prompt, and its statistics."""
        assert task == self.tasks
        self._put(task, rows)
        if statistics:
            for collector in self._collectors.values():
                collector.add(self._run.scenario.classes_of(task), statistics)
        self.tasks += 1

    def add(self, task: int, adapter: Adapter, statistics: pytrees.Tree) -> None:
        """Take in the next task. Its adapter is held until `stored` tells that the store has it."""
        self.restore(task, adapter, statistics)
        self._in_memory = {task: adapter}
        self._weights.put(task, adapter)

    def stored(self, task: int) -> None:
        """Let go of task `task`'s adapter, which can be read from the store from now on."""
        self._in_memory.pop(task)

    def model(self, shared: Shared) -> engine.Model:
        """Return the model of the tasks so far."""
        whole = distributed.replicated(self._run.mesh)
        rows = {name: array.copy() for name, array in self._rows.items()}
        solved = {name: collector.solve() for name, collector in self._collectors.items()}
        return engine.Model(
            method=self._run.method,
            backbone=self._run.params,
            shared=shared,
            rows=distributed.to_global(rows, whole),
            weights=self._weights,
            tasks=tuple(range(self.tasks)),
            task_of_class=self._run.scenario.task_of_class,
            solved=distributed.to_global(solved, whole),
            zero_shot=self._run.zero_shot,
        )

    def _load(self, task: int) -> Adapter:
        if task in self._in_memory:
            return self._in_memory[task]
        if task >= self.tasks:
            return self._run.initial_adapter(task)
        whole = distributed.replicated(self._run.mesh)
        own = {name: like for name, like in self.template.items() if name not in self._rows}
        items, _ = self._run.store.load_task(task, {"adapter": own}, whole, part=True)
        return self._run.method.unpack(items["adapter"], self._run.params)
