"""Command lines: python -m soft_jax predict WORKDIR IMAGE..., python -m soft_jax table TABLE
--workdir=DIR
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soft_jax.cache import COMPILED

# Set before jax is imported. Programs compiled once are kept for later runs.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))

from soft_jax.config import parse_argument
from soft_jax.data import images
from soft_jax.errors import UserError
from soft_jax.paper import tables


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of `argv`; the exit status: 1 when anything could not be answered, 143
    after a SIGTERM, 141 for a closed pipe.
    """
    parser = argparse.ArgumentParser(
        prog="python -m soft_jax",
        description="Use a trained run, or make one of the paper's tables.",
    )
    commands = parser.add_subparsers(required=True)
    _add_predict(commands)
    _add_table(commands)
    arguments = parser.parse_args(argv)
    try:
        status = arguments.command(arguments)
        sys.stdout.flush()  # here, where a closed pipe is told
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    # Who read the output, such as `head`, has enough; nor may the interpreter's end write what is
    # left
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except OSError as error:
        print(
            f"error: {error}; finished tasks are as they were, and the same command continues",
            file=sys.stderr,
        )
    return 1


def _add_predict(commands: argparse._SubParsersAction) -> None:
    predict = commands.add_parser(
        "predict", help="name the classes of images", description="Print a line for each image."
    )
    predict.add_argument("workdir", help="the folder that launch.py trained in")
    predict.add_argument(
        "images", nargs="+", help="image files; a folder stands for all in it and below"
    )
    predict.add_argument(
        "--task-id",
        choices=("prompt", "gradient", "prototype"),
        default="prompt",
        help="how an image finds its task",
    )
    predict.add_argument(
        "--tasks",
        help="the tasks to choose from, such as 0,2,5, counted from 0 as their folders are; "
        "default: all",
    )
    predict.add_argument(
        "--task",
        type=int,
        help="the task of all images, counted from 0; they are then not identified",
    )
    predict.add_argument(
        "--backbone-path",
        default="",
        help="the backbone's file, where it is no longer where the run found it",
    )
    predict.add_argument("--json", action="store_true", help="print a JSON object a line")
    predict.set_defaults(command=_predict)


def _add_table(commands: argparse._SubParsersAction) -> None:
    table = commands.add_parser(
        "table",
        help="run a table of the paper",
        description="Run what is missing of a table, continue what was cut off, and print it with "
        "the published figures.",
    )
    table.add_argument("table", help=f"its number, or one of our own: {', '.join(tables.OWN)}")
    table.add_argument(
        "--workdir",
        default="runs/tables",
        help="the folder that holds the runs of all tables; default: runs/tables",
    )
    table.add_argument(
        "--benchmark",
        choices=tuple(tables.BENCHMARKS),
        help="default: the first that the table has figures for",
    )
    table.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="runs of each row, with the benchmark's seed and those after it",
    )
    table.add_argument(
        "--rows", help="those to run, such as 1,3-5, as --list numbers them; default: all"
    )
    table.add_argument(
        "--list", action="store_true", help="print the rows and their settings, and run nothing"
    )
    table.add_argument(
        "--set",
        default="",
        help="settings for all rows, as a config takes them: backbone=vit_ti8_32,epochs=2",
    )
    table.add_argument(
        "--output",
        help="also write the table as Markdown to this file; that of the layers with a picture "
        "beside it",
    )
    table.set_defaults(command=_table)


def _table(arguments: argparse.Namespace) -> int:
    if arguments.seeds < 1:
        raise UserError(f"--seeds: {arguments.seeds} is below 1")
    benchmark = arguments.benchmark or tables.default_benchmark(arguments.table)
    rows = tables.rows_of(arguments.table, benchmark)
    numbers = tables.chosen(arguments.rows, len(rows))
    if arguments.list:
        for number in numbers:
            row = rows[number - 1]
            print(
                f"{number:3d}  {row.name}: "
                + ("not run here" if row.settings is None else json.dumps(row.settings))
            )
        return 0
    overrides = parse_argument(arguments.set)
    rows = [rows[number - 1] for number in numbers]
    # Imported here: a wrong argument is answered sooner.
    from absl import logging

    from soft_jax.experiment.loop import Preempted

    logging.set_verbosity(logging.ERROR)
    if arguments.output:  # now, not after hours
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    workdir = Path(arguments.workdir)
    picture = (
        Path(arguments.output).with_suffix(".png") if arguments.output else workdir / "layers.png"
    )
    try:
        text, whole = tables.make(
            arguments.table,
            benchmark,
            rows,
            overrides,
            arguments.seeds,
            workdir,
            _command(arguments, overrides),
            picture,
        )
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + 15
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text)
    return 0 if whole else 1


def _command(arguments: argparse.Namespace, overrides: Mapping[str, Any]) -> str:
    """The command again, but for where things are, unless that tells what they are; `overrides`
    are what `--set` says.
    """
    dropped = set(tables.RUNTIME_FIELDS) - set(tables.told_apart(overrides.get("dataset")))
    options = {name: getattr(arguments, name) for name in ("benchmark", "seeds", "rows", "set")}
    settings = ",".join(
        item for item in options.pop("set").split(",") if item.partition("=")[0] not in dropped
    )
    words = [f"--{name}={value}" for name, value in (options | {"set": settings}).items() if value]
    return " ".join(["python -m soft_jax table", arguments.table, *words])


def _predict(arguments: argparse.Namespace) -> int:
    try:
        tasks = [int(task) for task in arguments.tasks.split(",")] if arguments.tasks else None
    except ValueError:
        raise UserError(
            f"--tasks: {arguments.tasks!r} is not a list of numbers such as 0,2,5"
        ) from None
    files = images.find(arguments.images)
    # Imported here: a wrong argument is answered sooner.
    from soft_jax.inference.predictor import Predictor

    task_id = "oracle" if arguments.task is not None else arguments.task_id
    predictor = Predictor.load(
        arguments.workdir, tasks, task_id, backbone_path=arguments.backbone_path
    )
    failed = 0
    for answered, prediction, errors in predictor.predict_chunks(files, arguments.task):
        rows = dict(zip(answered, zip(*prediction, strict=True), strict=True))
        for index in sorted(answered + list(errors)):
            if index in errors:
                line = {"file": str(files[index]), "error": str(errors[index])}
                print(
                    json.dumps(line) if arguments.json else f"error: {errors[index]}",
                    file=None if arguments.json else sys.stderr,
                )
                continue
            class_, task, probabilities = rows[index]
            line = {
                "file": str(files[index]),
                "class": predictor.class_names[class_],
                "class_index": int(class_),
                "task": int(task),
                "probability": round(float(probabilities[class_]), 6),
            }
            print(
                json.dumps(line)
                if arguments.json
                else "{file}: {class}, task {task}, probability {probability:.4f}".format(**line)
            )
        failed += len(errors)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
