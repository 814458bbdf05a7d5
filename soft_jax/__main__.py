"""The command line: soft-jax train|predict|table|sweep|compare|export, the commands of a library,
and the same as python -m soft_jax.
"""

import argparse
import io
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from soft_jax import paths
from soft_jax.cache import CACHE, COMPILED
from soft_jax.config import unknown
from soft_jax.errors import UserError
from soft_jax.experiment.stopping import Preempted

# Set before jax is imported. Programs compiled once are kept for later runs, the many small ones
# too, which together take as long as a large one.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


# They change nothing, and have nothing to continue.
_READERS = [
    [n]
    for n in (
        *("predict", "compare", "export", "check", "tasks", "show", "log", "transfer", "cost"),
        *("report", "explain"),
    )
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of `argv` and return its exit status.

    That is 1 when anything could not be answered, 128 + the signal's number after SIGTERM or
    SIGINT, and 141 for a closed pipe.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    from soft_jax import commands

    try:
        paths.place(CACHE, "SOFT_JAX_CACHE")
        if argv[:1] in (["train"], ["sweep"]):  # they take a config's fields as flags
            status = getattr(commands, argv[0])(argv[1:])
        else:
            arguments = _read(argv)
            function = getattr(arguments, "function", None)
            status = (function or getattr(commands, arguments.command))(arguments)
        sys.stdout.flush()  # here, where a closed pipe is told
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except BrokenPipeError:
        # Who read the output, such as `head`, has enough; nor may the interpreter's end write what
        # is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        continues = "" if argv[:1] in _READERS else f"; {commands.CONTINUES}"
        print(f"error: {error}{continues}", file=sys.stderr)
    return 1


def console(argv: Sequence[str] | None = None) -> None:
    """Be the installed command `soft-jax`, with `argv` or the program's own arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    continues = b"; finished tasks are as they were, and the same command continues"
    message = b"Stopped" + (b"" if argv[:1] in _READERS else continues) + b"\n"

    def stop_at_once(signum: int, frame: object) -> None:
        os.write(2, message)
        os._exit(128 + signum)

    # Until a run takes over, and after a second one in it. An exception could surface anywhere, in
    # the middle of an import too.
    signal.signal(signal.SIGINT, stop_at_once)
    for stream in (sys.stdout, sys.stderr):
        # What the terminal's encoding has no sign for, such as "θ" in ASCII or a file name that is
        # no UTF-8, is written as an escape; an error would end the program in mid-output.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main(argv))


class _Once(argparse.Action):
    """Takes an argument's value, and of a flag refuses a second one."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._given: list[Any] = []

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        from soft_jax import commands

        self._given.append(values)
        flag = (self.option_strings or [self.dest])[0]
        setattr(namespace, self.dest, commands.the_only(flag, self._given))


class _Parser(argparse.ArgumentParser):
    """Raises UserError for what is wrong, and takes no flag by a part of its name or twice."""

    def __init__(self, **options: Any):
        self.flags = ["h"]
        super().__init__(**options, allow_abbrev=False)
        self.register("action", None, _Once)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        self.flags += [name[2:] for name in names if name[:2] == "--"]
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help says more")

    def check_flags(self, argv: Sequence[str]) -> None:
        """Raise UserError for a flag that there isn't, before another is said to be missing."""
        takes_config = self.get_default("takes_config")
        for word in argv:
            if word == "--":
                return
            found = re.fullmatch(r"--?([A-Za-z][^=\s]*)(=.*)?", word, re.DOTALL)
            if not found or found[1] in self.flags:
                continue
            if not (takes_config and re.match(r"(no)?config(\.|$)", found[1])):
                known = [*self.flags[1:], *(["config"] if takes_config else [])]
                raise UserError(unknown("flag", found[1], known))


def _read(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a command; those of a config are its `flags`.

    Raises UserError for what is wrong with them, naming the nearest of an unknown word.
    """
    parser, parsers = _parsers()
    if argv and argv[0][:1] != "-" and argv[0] not in parsers:
        raise UserError(unknown("command", argv[0], parsers))
    parsers.get(argv[0] if argv else "", parser).check_flags(argv)
    arguments, rest = parser.parse_known_args(argv)
    if rest and not getattr(arguments, "takes_config", False):
        parsers[argv[0]].error(f"unexpected argument {rest[0]!r}")
    arguments.flags, arguments.given = rest, argv[1:]
    return arguments


def _parsers() -> tuple[_Parser, Mapping[str, _Parser]]:
    """Return the parser of all commands, and that of each."""
    from soft_jax import library_commands

    parser = _Parser(
        prog="soft-jax", description="Train a continual learner, use it, or compare runs."
    )
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser(
        "train",
        help="train and evaluate a run",
        description="soft-jax train --config=vit_cil --workdir=runs/mine; "
        "soft-jax train --help lists its flags and all settings.",
    )
    commands.add_parser(
        "sweep",
        help="try settings' values, and choose by images held out of training",
        description="soft-jax sweep --config=vit_cil --set=learning_rate=0.003,0.01,0.03; "
        "soft-jax sweep --help lists its flags.",
    )
    _add_predict(commands)
    _add_table(commands)
    _add_compare(commands)
    _add_export(commands)
    library_commands.add_parsers(commands)
    return parser, commands.choices


def _add_predict(commands: argparse._SubParsersAction) -> None:
    predict = commands.add_parser(
        "predict",
        help="name the classes of images",
        description="Print a line for each image: its class, the task that this class is of, its "
        "probability, and the task whose network answered where it is another one. Tasks are "
        "counted from 1 everywhere. How images find their tasks is printed on the error output.",
    )
    predict.add_argument(
        "workdir", help="the folder that the run was trained in, or that of a library"
    )
    predict.add_argument(
        "images", nargs="+", help="image files; a folder stands for all in it and below"
    )
    predict.add_argument(
        "--task-id",
        help="the rule by which an image finds its task; an unknown name is answered with those "
        "that there are. Default: the one that was best on the images that the run held out of "
        "training, else one that the run has a use for",
    )
    predict.add_argument(
        "--classes",
        help="answer by these class names alone, such as 'a,b,c', by a backbone that reads text "
        "(CLIP), whatever was trained",
    )
    predict.add_argument(
        "--tasks",
        help="the tasks to choose from, such as 1,3, counted from 1, or names in a library; "
        "default: all",
    )
    predict.add_argument(
        "--task",
        help="the task of all images, counted from 1, or its name in a library; they are then not "
        "identified",
    )
    predict.add_argument(
        "--top",
        default="1",
        help="so many classes for each image: the answer, then the next most probable ones",
    )
    predict.add_argument(
        "--backbone-path",
        default="",
        help="the backbone's file, where it is no longer where the run found it",
    )
    predict.add_argument(
        "--json",
        action="store_true",
        help='print a JSON object a line; "task" and "network" are counted from 1',
    )
    predict.add_argument(
        "--csv",
        action="store_true",
        help='print CSV, a line for each class; "task" and "network" are counted from 1',
    )


def _add_table(commands: argparse._SubParsersAction) -> None:
    from soft_jax.commands import JOBS

    table = commands.add_parser(
        "table",
        help="run a table of the paper",
        description="Run what is missing of a table, continue what was cut off, and print it with "
        "the published figures.",
    )
    table.add_argument(
        "table", help="its number, or one of our own: methods, layers, weights, clip"
    )
    table.add_argument(
        "--workdir",
        default="runs/tables",
        help="the folder that holds the runs of all tables; default: runs/tables",
    )
    table.add_argument(
        "--benchmark",
        help="c100_10, c100_20, imr_10, cub_5 or tiny_10; default: the first that the table has "
        "figures for",
    )
    table.add_argument(
        "--seeds",
        default="1",
        help="runs of each row, with the benchmark's seed and those after it",
    )
    table.add_argument("--jobs", help=JOBS)
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
        help="also write the table as Markdown to this file, in the place of an older table; that "
        "of the layers with a picture beside it",
    )


def _add_compare(commands: argparse._SubParsersAction) -> None:
    compare = commands.add_parser(
        "compare",
        help="put two runs side by side",
        description="Print, as Markdown, which settings of two runs differ, their figures side by "
        "side, the differences by task, and McNemar's test on the test images of both.",
    )
    compare.add_argument("runs", nargs=2, metavar="RUN", help="the folder of a finished run")


def _add_export(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser(
        "export",
        help="write a task as a model of timm, transformers or PEFT",
        description="Write a task as a folder: its weights merged into the backbone's, and its "
        "own classes' classifier.",
    )
    export.add_argument(
        "run", metavar="RUN", help="the folder that a run was trained in, or that of a library"
    )
    export.add_argument(
        "task",
        metavar="TASK",
        help="the task: of a run its number, from 1, or task1; of a library its name, or a version "
        "such as birds@2",
    )
    export.add_argument(
        "out", metavar="OUT", help="the folder to write, which is not there yet or empty"
    )
    export.add_argument(
        "--format",
        required=True,
        help="timm; hf, for transformers' ViTForImageClassification; or peft, for tasks of lora",
    )
    export.add_argument(
        "--without-prompts",
        action="store_true",
        help="leave prompts out, which changes answers: how many, is measured on the task's test "
        "images",
    )
    export.add_argument(
        "--backbone-path",
        default="",
        help="the backbone's file, where it is no longer where the run found it",
    )


if __name__ == "__main__":
    console()
