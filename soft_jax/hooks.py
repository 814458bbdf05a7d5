"""What a caller may do at certain moments of a run: for tests, and for programs around it."""

import dataclasses
from collections.abc import Callable, Mapping

Values = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Functions that a run calls; tasks and steps count from 0. By default they do nothing.

    `after_step(task, step, values)` gets the terms of a training step, `train_step.TERMS`, when
    they are read on the host, and returns those to go on with. `before_evaluation(task)` is called
    before the test images of each task are evaluated. `steps_at_once(steps)` gets how many steps
    the next call to the devices would run, and returns how many it runs; no array depends on it.
    """

    after_step: Callable[[int, int, Values], Values] = lambda task, step, values: values
    before_evaluation: Callable[[int], None] = lambda task: None
    steps_at_once: Callable[[int], int] = lambda steps: steps
