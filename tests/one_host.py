"""Be one of the processes of a tiny run:

    python -m tests.one_host METHOD WORKDIR DEVICES STRIKE HOSTS

DEVICES is how many it has. STRIKE is none, or KILL:TASK:STEP or TERM:TASK:STEP: the signal that it
sends itself after that step; tasks and steps from 0. HOSTS is what --distributed takes. Meshes get
the devices in an order that a TPU slice may have them in: not process by process.
"""

import functools
import os
import signal
import sys

import jax
import pytest
from rich.console import Console

from soft_jax import distributed
from soft_jax.experiment import loop
from soft_jax.experiment.stopping import Preempted
from soft_jax.hooks import Hooks
from tests.conftest import tiny_backbone, tiny_config, tiny_world

# Two tasks of five digits, five steps of one image a device each.
SETTINGS = {
    "tasks": 2,
    "epochs": 1,
    "batch_size": 8,
    "eval_batch_size": 8,
    "checkpoint_every": 2,
    "prototype_features": 40,
}
# With two devices a process: of processes 0, 1, 2, 3, 0, ...
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)


def main(method: str, workdir: str, devices: str, strike: str, hosts: str) -> int:
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_disable_most_optimizations", True)
    # Whether the others live is known after a minute and a half by default.
    initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.distributed, "initialize", initialize)
        distributed.join(hosts)
    name, *where = strike.split(":")

    def after_step(task, step, values):
        if [str(task), str(step)] == where:
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        return values

    with pytest.MonkeyPatch.context() as patch, tiny_world(tiny_backbone(), patch):
        there = jax.devices()
        listed, in_order = [there[place] for place in INTERLEAVED], distributed.data_mesh
        patch.setattr(distributed, "data_mesh", lambda given=None: in_order(given or listed))
        try:
            config = tiny_config(method=method, **SETTINGS)
            console = Console(width=200, quiet=not distributed.is_primary())
            loop.run(config, workdir, console, hooks=Hooks(after_step))
        except Preempted as stopped:
            print(stopped)
            return 128 + signal.SIGTERM
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
