"""Run `launch.py` and strike at one moment: python -m tests.drive MOMENT ARGS...

MOMENT is one of: none; kill-step:TASK:STEP, kill-save:FOLDER (just before Orbax commits it),
kill-evaluate:CALL; term-step:TASK:STEP (SIGTERM); nan-step:TASK:STEP (the loss that is read is not
a number). Tasks, steps and calls from 0.
"""

import os
import runpy
import signal
import sys


def strike(moment: str) -> None:
    """Arm the moment; everything else of the run is as a user's."""
    from soft_jax.evaluation import protocols
    from soft_jax.experiment import loop

    kind, *where = moment.split(":")
    check, evaluate_task, calls = loop._check_step, protocols.evaluate_task, [0]

    def at_step(run, task, step, values):
        if [task, step] == [int(x) for x in where]:
            if kind == "kill-step":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "term-step":
                os.kill(os.getpid(), signal.SIGTERM)
            if kind == "nan-step":
                values = values | {"loss": float("nan")}
        return check(run, task, step, values)

    def at_evaluate(*args, **kwargs):
        calls[0] += 1
        if calls[0] == int(where[0]) + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate_task(*args, **kwargs)

    def at_rename(event, args):
        if (
            event == "os.rename"
            and "orbax-checkpoint-tmp" in str(args[0])
            and str(args[1]).rstrip("/").endswith(where[0])
        ):
            os.kill(os.getpid(), signal.SIGKILL)

    if kind.endswith("-step"):
        loop._check_step = at_step
    elif kind == "kill-evaluate":
        protocols.evaluate_task = at_evaluate
    elif kind == "kill-save":
        sys.addaudithook(at_rename)


if __name__ == "__main__":
    strike(sys.argv[1])
    sys.argv = ["launch.py", *sys.argv[2:]]
    runpy.run_path("launch.py", run_name="__main__")
