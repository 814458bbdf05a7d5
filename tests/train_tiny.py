"""Train the run of tests/test_buckets.py as a program of its own.

    python -m tests.train_tiny WORKDIR [TASK:STEP]

It kills itself after that step; tasks and steps from 0.
"""

import os
import signal
import sys

import jax
import pytest
from rich.console import Console

from soft_jax.experiment import loop
from soft_jax.hooks import Hooks
from tests.conftest import tiny_backbone, tiny_config, tiny_world

# Two tasks of five digits, 6 steps each: the smallest run that has a past and a future.
CONFIG = tiny_config(
    method="head",
    tasks=2,
    epochs=1,
    batch_size=8,
    eval_batch_size=8,
    checkpoint_every=3,
    prototype_features=40,
)


def main(workdir: str, strike: str = "") -> None:
    jax.config.update("jax_disable_most_optimizations", True)

    def after_step(task, step, values):
        if f"{task}:{step}" == strike:
            os.kill(os.getpid(), signal.SIGKILL)
        return values

    with pytest.MonkeyPatch.context() as patch, tiny_world(tiny_backbone(), patch):
        loop.run(CONFIG, workdir, Console(width=200), hooks=Hooks(after_step))


if __name__ == "__main__":
    main(*sys.argv[1:])
