"""The command line of a trained run: python -m soft_jax predict WORKDIR IMAGE..."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

# Set before jax is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from soft_jax import images
from soft_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of `argv`; the exit status: 1 when anything could not be answered."""
    parser = argparse.ArgumentParser(prog="python -m soft_jax", description="Use a trained run.")
    commands = parser.add_subparsers(required=True)
    predict = commands.add_parser("predict", help="name the classes of images", description="Print a line for each image.")
    predict.add_argument("workdir", help="the folder that launch.py trained in")
    predict.add_argument("images", nargs="+", help="image files; a folder stands for all in it and below")
    predict.add_argument("--task-id", choices=("prompt", "gradient", "prototype"), default="prompt", help="how an image finds its task")
    predict.add_argument("--tasks", help="the tasks to choose from, such as 0,2,5, counted from 0 as their folders are; default: all")
    predict.add_argument("--task", type=int, help="the task of all images, counted from 0; they are then not identified")
    predict.add_argument("--backbone-path", default="", help="the backbone's file, where it is no longer where the run found it")
    predict.add_argument("--json", action="store_true", help="print a JSON object a line")
    arguments = parser.parse_args(argv)
    try:
        return _predict(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _predict(arguments: argparse.Namespace) -> int:
    try:
        tasks = [int(task) for task in arguments.tasks.split(",")] if arguments.tasks else None
    except ValueError:
        raise UserError(f"--tasks: {arguments.tasks!r} is not a list of numbers such as 0,2,5") from None
    files = images.find(arguments.images)
    # Imported here: jax takes seconds to start, and a wrong argument is answered at once.
    from soft_jax.predictor import Predictor

    task_id = "oracle" if arguments.task is not None else arguments.task_id
    predictor = Predictor.load(arguments.workdir, tasks, task_id, backbone_path=arguments.backbone_path)
    failed = 0
    for answered, prediction, errors in predictor.predict_chunks(files, arguments.task):
        rows = dict(zip(answered, zip(*prediction, strict=True), strict=True))
        for index in sorted(answered + list(errors)):
            if index in errors:
                line = {"file": str(files[index]), "error": str(errors[index])}
                print(json.dumps(line) if arguments.json else f"error: {errors[index]}", file=None if arguments.json else sys.stderr)
                continue
            class_, task, probabilities = rows[index]
            line = {
                "file": str(files[index]),
                "class": predictor.class_names[class_],
                "class_index": int(class_),
                "task": int(task),
                "probability": round(float(probabilities[class_]), 6),
            }
            print(json.dumps(line) if arguments.json else "{file}: {class}, task {task}, probability {probability:.4f}".format(**line))
        failed += len(errors)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
