"""The loop over one task's training steps: resumable at any step, and stopped by a signal."""

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from soft_jax import distributed, pytrees
from soft_jax.errors import UserError
from soft_jax.hooks import Hooks
from soft_jax.training import train_step
from soft_jax.training.task_input import TaskData, TaskInput
from soft_jax.training.train_step import StepConfig, TrainState

CALL_SECONDS = (
    1.0  # of training that one call to the devices should take: so soon it can be stopped
)


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What the loop needs beside the task: programs, places to save to, and who may stop it.

    `load(state)` returns the kept state of a task and its seconds, or `state` and 0; `save(step,
    state, seconds)` keeps one. `log(step, values)` gets `train_step.TERMS` of each step.
    `show(step, steps)` shows progress. `stopped(message)` makes the exception that ends the run.
    """

    step_config: StepConfig
    mesh: Mesh
    params: pytrees.Tree  # the frozen backbone, on the devices
    checkpoint_every: int
    load: Callable[[TrainState], tuple[TrainState, float]]
    save: Callable[[int, TrainState, float], None]
    log: Callable[[int, Mapping[str, float]], None]
    show: Callable[[int, int], None]
    stop: threading.Event
    stopped: Callable[[str], Exception]
    hooks: Hooks = dataclasses.field(default_factory=Hooks)


def train_task(
    loop: LoopConfig, task: int, adapter: pytrees.Tree, shared: pytrees.Tree, data: TaskData
) -> tuple[TrainState, dict[str, float]]:
    """Train task `task` from where its kept state stands, or from `adapter` and `shared`.

    Returns the state, and the seconds it took: "train", of which "input_wait" were spent on waiting
    for batches since this process began. The state after the last step is kept, so that a run
    killed in evaluation does not train again.

    Raises UserError for a loss that is not finite, and `loop.stopped`'s exception after a signal.
    """
    start = time.monotonic()
    initial = train_step.compile_init(loop.step_config, loop.mesh)(adapter, shared)
    state, before = loop.load(initial)
    done, total = int(state.step), data.sampler.steps
    task_input = TaskInput(data, loop.step_config, loop.mesh, loop.params, done)
    call, pending, mark = 1, None, time.monotonic()
    while done < total:
        until_save = loop.checkpoint_every - done % loop.checkpoint_every
        count = min(call, train_step.CHUNK, total - done, until_save)
        state, terms = task_input.advance(state, done, count)
        # Looked at one call late: the devices compute this one while the host reads the one before.
        if pending:
            _check(loop, task, *pending)
            seconds = time.monotonic() - mark
            call = loop.hooks.steps_at_once(next_call(call, pending[1], seconds))
            mark = time.monotonic()
        pending, done = (done, count, terms), done + count
        loop.show(done, total)
        stopping, call = distributed.all_max(loop.stop.is_set(), call)
        if stopping or done % loop.checkpoint_every == 0 or done == total:
            _check(loop, task, *pending)
            loop.save(done, state, before + time.monotonic() - start)
            pending, mark = None, time.monotonic()
            if distributed.all_max(loop.stop.is_set())[0]:
                raise loop.stopped(f"Stopped after step {done} of task {task + 1}")
    seconds = {"train": before + time.monotonic() - start, "input_wait": task_input.waited.seconds}
    return state, seconds


def next_call(call: int, steps: int, seconds: float) -> int:
    """Return how many steps the next call should run, given how long `steps` of them took.

    It grows slowly, since the first calls also compile.
    """
    return max(1, min(4 * call, int(CALL_SECONDS * steps / max(seconds, 1e-6))))


def _check(loop: LoopConfig, task: int, first: int, count: int, terms: Any) -> None:
    """Log the terms of `count` steps from `first` on. Raises UserError for one not finite."""
    terms = jax.device_get(terms)
    for index in range(count):
        values = {
            name: float(terms[index][name] if isinstance(terms, list) else terms[name][index])
            for name in train_step.TERMS
        }
        step = first + index
        values = loop.hooks.after_step(task, step, values)
        loop.log(step, values)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise UserError(
                    f"task {task + 1}, step {step + 1}: {name} is {values[name]}; training "
                    "stopped, finished tasks are as they were. Try a lower learning_rate, or "
                    "dtype=float32, in another workdir"
                )
