"""What the commands do: train, predict, table. `__main__` only reads the command line.

What takes long to import is imported where it is used, so that a wrong argument is answered at
once.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soft_jax.config import DEFAULTS, RUNTIME_FIELDS, parse_argument, unknown
from soft_jax.errors import UserError

# The flags of `train`, and what they mean.
TRAIN_FLAGS = {
    "config": "The run's settings: a file, or the name of one that comes along (digits, vit_cil, "
    "table), with variants by argument (vit_cil:tasks=20); any field by --config.field=value. "
    "Default: digits.",
    "workdir": "The run's folder; the same command continues it. Default: "
    "runs/NAME-METHOD-TASKSx-seedSEED.",
    "distributed": 'Several processes, one a host, in one run: "auto" on TPU pod slices and '
    'clusters that jax knows, else "HOST:PORT,INDEX,COUNT".',
}
CONTINUES = "finished tasks are as they were, and the same command continues"


def find_config(name: str) -> str:
    """Return the path of a config file, with its argument: "vit_cil:tasks=20" is one of ours.

    A name without a folder and without ".py" is looked up among the configs that come with the
    package, or in a checkout in the folder beside it. Raises UserError where there is none, naming
    the nearest of those and of the files where it was looked for.
    """
    path, colon, argument = name.partition(":")
    package = Path(__file__).parent
    # Only one of them: beside an installed package, "configs" would be somebody else's.
    folder = package / "configs"
    if not folder.is_dir():
        folder = package.parent / "configs"
    ours = {file.stem: file for file in sorted(folder.glob("[!_]*.py"))}
    if "/" not in path and not path.endswith(".py"):
        if path not in ours:
            raise UserError(unknown("config", path, ours))
        return str(ours[path]) + colon + argument
    file = Path(path).expanduser()
    if not file.is_file():
        there = sorted(str(other) for other in file.parent.glob("*.py"))
        raise UserError(unknown("config", str(file), [*ours, *there]))
    return str(file) + colon + argument


def train(argv: Sequence[str], program: str = "soft-jax train") -> None:
    """Train and evaluate the run that `argv`, the flags, describe; ends the program.

    The exit status is 0, 1 for what the user has to mend, 128 + the signal's number after one.
    """
    from absl import app

    if {"-h", "--help", "--helpshort"} & set(argv):
        print(_train_help(program), flush=True)
        sys.exit(0)  # absl's own help lists the flags of `__main__`, which are none, and exits 1
    app.run(_train, argv=[program, *argv], flags_parser=_parse_flags)


def _train_help(program: str) -> str:
    """Return what `train` takes: its flags, and the settings with their defaults."""
    flags_help = "\n".join(f"  --{name}: {text}" for name, text in TRAIN_FLAGS.items())
    settings = "\n".join(f"  --config.{name}={value!r}" for name, value in DEFAULTS.items())
    return (
        f"usage: {program} --config=vit_cil --workdir=runs/mine\n\n"
        f"Train and evaluate a run, or continue it.\n\n{flags_help}\n\n"
        f"Settings and their defaults, which a config replaces:\n{settings}"
    )


def _train(argv: list[str]) -> None:
    from absl import flags, logging

    from soft_jax import config as config_lib
    from soft_jax.experiment.stopping import Preempted

    logging.set_verbosity(logging.ERROR)
    given = flags.FLAGS
    try:
        config = config_lib.from_config_dict(given.config)
        # Imported here: a wrong flag is answered at once, not after jax has started.
        from soft_jax import distributed
        from soft_jax.experiment import loop
        from soft_jax.experiment import settings as settings_lib
        from soft_jax.methods import registry

        settings_lib.check(config)
        if given.distributed:
            distributed.join(given.distributed)
        method = registry.parse(config.method).name
        loop.run(config, given.workdir or default_workdir(config, method))
    except UserError as error:
        _end(f"error: {error}", bool(given.distributed))
    except OSError as error:
        _end(f"error: {error}; {CONTINUES}", bool(given.distributed))
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signum)


def default_workdir(config: Any, method: str) -> str:
    """Return the folder of a run that is given none: its name, method, tasks and seed.

    `method` is the method in its one spelling.
    """
    tasks = f"{config.tasks}x" if config.scenario == "equal" else config.scenario
    return f"runs/{config.name}-{method}-{tasks}-seed{config.seed}"


def _end(message: str, distributed: bool) -> None:
    """Say why the program ends, and end it.

    Of several processes this one ends at once, without waiting for the others, which may wait for
    it.
    """
    print(message, file=sys.stderr, flush=True)
    os._exit(1) if distributed else sys.exit(1)


def _parse_flags(argv: list[str]) -> list[str]:
    """Read the flags, and the config file that they name; what is wrong in either is one line."""
    from absl import flags
    from ml_collections import config_flags

    flags.DEFINE_string("workdir", None, TRAIN_FLAGS["workdir"])
    flags.DEFINE_string("distributed", None, TRAIN_FLAGS["distributed"])
    try:
        pairs = zip(["", *argv[:-1]], argv, strict=True)
        argv = [_with_config_found(argument, before) for before, argument in pairs]
        _check_fields(argv)
        # Defining it reads the file and the overrides of its fields.
        config_flags.DEFINE_config_file(
            "config", find_config("digits"), TRAIN_FLAGS["config"], sys_argv=argv
        )
        left = flags.FLAGS(argv)
        flags.FLAGS.config.lock()
    except UserError as error:
        sys.exit(f"error: --config: {error}")
    except flags.Error as error:
        sys.exit(f"error: {_one_line(error)}")
    except (OSError, SyntaxError, AttributeError, KeyError) as error:
        # A file that can't be read or is no Python, or a field that is none.
        sys.exit(f"error: --config: {type(error).__name__}: {_one_line(error)}")
    if left[1:]:
        known = ", ".join(f"--{name}" for name in TRAIN_FLAGS)
        sys.exit(f"error: unexpected argument {left[1]!r}; flags are {known}")
    return left


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_fields(argv: Sequence[str]) -> None:
    """Raise UserError for a flag --config.field of a field that there isn't, naming the nearest."""
    for argument in argv:
        field = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if field and field[1] not in DEFAULTS:
            raise UserError(unknown("setting", field[1], DEFAULTS))


def _with_config_found(argument: str, before: str) -> str:
    if argument.startswith(("--config=", "-config=")):
        flag, _, name = argument.partition("=")
        return f"{flag}={find_config(name)}"
    return find_config(argument) if before in ("--config", "-config") else argument


def predict(arguments: argparse.Namespace) -> int:
    """Print a line for each image; the exit status is 1 where one could not be answered."""
    try:
        tasks = [int(task) for task in arguments.tasks.split(",")] if arguments.tasks else None
    except ValueError:
        raise UserError(
            f"--tasks: {arguments.tasks!r} is not a list of numbers such as 0,2,5"
        ) from None
    from soft_jax.data import images

    files = images.find(arguments.images)
    from soft_jax.inference.predictor import Predictor
    from soft_jax.inference.rules import TaskGiven

    task_id = TaskGiven.option if arguments.task is not None else arguments.task_id
    predictor = Predictor.load(
        arguments.workdir, tasks, task_id, backbone_path=arguments.backbone_path
    )
    failed = 0
    for answered, prediction, errors in predictor.predict_chunks(files, arguments.task):
        rows = dict(zip(answered, zip(*prediction, strict=True), strict=True))
        for index in sorted(answered + list(errors)):
            if index in errors:
                _print_error(str(files[index]), errors[index], arguments.json)
            else:
                _print_answer(str(files[index]), rows[index], predictor, arguments.json)
        failed += len(errors)
    return 1 if failed else 0


def _print_error(file: str, error: UserError, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"file": file, "error": str(error)}))
    else:
        print(f"error: {error}", file=sys.stderr)


def _print_answer(file: str, row: tuple, predictor: Any, as_json: bool) -> None:
    class_, task, probabilities = row
    line = {
        "file": file,
        "class": predictor.class_names[class_],
        "class_index": int(class_),
        "task": int(task),
        "probability": round(float(probabilities[class_]), 6),
    }
    text = "{file}: {class}, task {task}, probability {probability:.4f}"
    print(json.dumps(line) if as_json else text.format(**line))


def table(arguments: argparse.Namespace) -> int:
    """Run what is missing of a table and print it; the exit status is 1 where a row failed."""
    if arguments.seeds < 1:
        raise UserError(f"--seeds: {arguments.seeds} is below 1")
    from soft_jax.paper import rows as rows_lib

    benchmark = arguments.benchmark or rows_lib.default_benchmark(arguments.table)
    if benchmark not in rows_lib.BENCHMARKS:
        raise UserError(f"--benchmark: {unknown('benchmark', benchmark, rows_lib.BENCHMARKS)}")
    rows = rows_lib.rows_of(arguments.table, benchmark)
    numbers = rows_lib.chosen(arguments.rows, len(rows))
    if arguments.list:
        for number in numbers:
            row = rows[number - 1]
            settings = "not run here" if row.settings is None else json.dumps(row.settings)
            print(f"{number:3d}  {row.name}: {settings}")
        return 0
    overrides = parse_argument(arguments.set)
    rows = [rows[number - 1] for number in numbers]
    from absl import logging

    from soft_jax.experiment.stopping import Preempted
    from soft_jax.paper import tables

    logging.set_verbosity(logging.ERROR)
    workdir = Path(arguments.workdir).expanduser()
    picture = workdir / "layers.png"
    if arguments.output:  # now, not after hours
        output = Path(arguments.output).expanduser()
        output.parent.mkdir(parents=True, exist_ok=True)
        picture = output.with_suffix(".png")
    request = tables.Request(arguments.table, benchmark, overrides, arguments.seeds, workdir)
    try:
        text, whole = tables.make(request, rows, _command(arguments, overrides), picture)
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    print(text)
    if arguments.output:
        output.write_text(text, encoding="utf-8")
    return 0 if whole else 1


def _command(arguments: argparse.Namespace, overrides: Mapping[str, Any]) -> str:
    """Return the command again, but for where things are, unless that tells what they are.

    `overrides` are what `--set` says.
    """
    from soft_jax.experiment.settings import told_apart

    dropped = set(RUNTIME_FIELDS) - set(told_apart(overrides))
    options = {name: getattr(arguments, name) for name in ("benchmark", "seeds", "rows", "set")}
    settings = ",".join(
        item for item in options.pop("set").split(",") if item.partition("=")[0] not in dropped
    )
    words = [f"--{name}={value}" for name, value in (options | {"set": settings}).items() if value]
    return " ".join(["python -m soft_jax table", arguments.table, *words])
