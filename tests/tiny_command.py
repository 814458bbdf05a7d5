"""Be a command in the tests' tiny world, and strike: python -m tests.tiny_command MOMENT ARGS...

ARGS are those of soft-jax; without any, be the program of one run among several side by side.
MOMENT is one of tests.drive's, or hold-step:TASK:STEP: then the run prints "held" and waits until
its input ends. Meanwhile it gives a sign of life every 0.2 seconds.
"""

import runpy
import sys

import jax
import pytest

from soft_jax import __main__ as command_line
from soft_jax.experiment import loop
from soft_jax.hooks import Hooks
from soft_jax.store import bucket_lock
from tests import drive
from tests.conftest import tiny_backbone, tiny_world


def hold(task_and_step: list[str]) -> Hooks:
    bucket_lock.REFRESH = 0.2

    def after_step(task, step, values):
        if [str(task), str(step)] == task_and_step:
            print("held", flush=True)
            sys.stdin.read()
        return values

    return Hooks(after_step)


def main(moment: str, *argv: str) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch, tiny_world(tiny_backbone(), patch):
        kind, *where = moment.split(":")
        if kind == "hold-step":
            run, hooks = loop.run, hold(where)
            patch.setattr(loop, "run", lambda *args, **kw: run(*args, **kw, hooks=hooks))
        else:
            drive.strike(moment)
        if argv:
            command_line.console(argv)
        runpy.run_module("soft_jax.experiment.planned", run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
