"""Run `launch.py` and strike at one moment: python -m tests.drive MOMENT ARGS...

Without ARGS, be the program of one run among several side by side.

MOMENT is one of: none; kill-step:TASK:STEP, kill-save:FOLDER (just before Orbax commits it),
kill-evaluate:CALL; term-step:TASK:STEP (SIGTERM); int-step:TASK:STEP (SIGINT, as Ctrl-C);
parent-step:TASK:STEP (SIGTERM for the program that started this one and others beside it);
nan-step:TASK:STEP (the loss that is read is not a number). Tasks, steps and calls from 0.

No pictures are drawn: that takes longer than many a run, and changes nothing in it.
"""

import functools
import os
import runpy
import signal
import sys


def strike(moment: str) -> None:
    """Arm the moment; everything else of the run, but for pictures, is as a user's."""
    from soft_jax.evaluation import pictures
    from soft_jax.experiment import loop
    from soft_jax.hooks import Hooks

    kind, *where = moment.split(":")
    calls = [0]

    def after_step(task, step, values):
        if kind.endswith("-step") and [task, step] == [int(x) for x in where]:
            if kind == "nan-step":
                return values | {"loss": float("nan")}
            if kind == "parent-step":
                os.kill(os.getppid(), signal.SIGTERM)
                return values
            os.kill(os.getpid(), getattr(signal, f"SIG{kind.removesuffix('-step').upper()}"))
        return values

    def before_evaluation(task):
        calls[0] += 1
        if kind == "kill-evaluate" and calls[0] == int(where[0]) + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def at_rename(event, args):
        if (
            event == "os.rename"
            and "orbax-checkpoint-tmp" in str(args[0])
            and str(args[1]).rstrip("/").endswith(where[0])
        ):
            os.kill(os.getpid(), signal.SIGKILL)

    pictures.draw = lambda *_: []
    loop.run = functools.partial(loop.run, hooks=Hooks(after_step, before_evaluation))
    if kind == "kill-save":
        sys.addaudithook(at_rename)


if __name__ == "__main__":
    strike(sys.argv[1])
    if not sys.argv[2:]:
        runpy.run_module("soft_jax.experiment.planned", run_name="__main__")
    sys.argv = ["launch.py", *sys.argv[2:]]
    runpy.run_path("launch.py", run_name="__main__")
