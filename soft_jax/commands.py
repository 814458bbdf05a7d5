"""What the commands do: train, predict, table, sweep, compare, export. `__main__` only reads the
command line.

What takes long to import is imported where it is used, so that a wrong argument is answered at
once.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soft_jax import paths
from soft_jax.buckets import BucketPath
from soft_jax.config import (
    DEFAULTS,
    RUNTIME_FIELDS,
    check_flag,
    from_config_dict,
    nearest,
    parse_argument,
    unknown,
    unknown_value,
)
from soft_jax.errors import UserError
from soft_jax.paths import Place

if TYPE_CHECKING:
    from soft_jax.config import Config
    from soft_jax.inference.predictor import Predictor

# The flags of `train` and of `sweep`, and what they mean.
JOBS = (
    "How many runs go side by side, each in a process on a device of its own; 1: one after the "
    "other, on all devices. Default: one for each TPU chip or GPU of this host; 1 on a CPU."
)
CONFIG_FLAG = (
    "The run's settings: a file, or the name of one that comes along (digits, vit_cil, clip_cil, "
    "table), with variants by argument (vit_cil:tasks=20); any field by --config.field=value, "
    "which goes before the file and its argument. Default: digits."
)
TRAIN_FLAGS = {
    "config": CONFIG_FLAG,
    "workdir": "The run's folder, on a disk or in a bucket (gs://BUCKET/FOLDER); the same command "
    "continues it. Default: "
    "runs/NAME-METHOD-TASKSx-seedSEED. With --seeds, the folder of the runs' folders; default: "
    "runs/NAME-METHOD-TASKSx.",
    "seeds": "How many runs, with the config's seed and those after it, and then their mean and "
    "standard deviation.",
    "jobs": f"{JOBS} It goes with --seeds.",
    "distributed": 'Several processes, one a host, in one run: "auto" on TPU pod slices and '
    'clusters that jax knows, else "HOST:PORT,INDEX,COUNT".',
}
SWEEP_FLAGS = {
    "config": CONFIG_FLAG,
    "set": "A setting and the values to try, separated by commas: learning_rate=0.003,0.01,0.03. "
    "Lists are written as in a config's argument: mask_layers=10-12,11+12. Given several times, "
    "every combination is run.",
    "protocol": "What the runs are compared by, such as per_sample/prompt_id. Default: each run by "
    "the best of its rules that take each image by itself, as predict does.",
    "workdir": "The folder that holds the runs of all sweeps. Default: runs/sweeps.",
    "output": "Also write the table as Markdown to this file, in the place of an older table.",
    "jobs": JOBS,
}
CONTINUES = "finished tasks are as they were, and the same command continues"
_SHOWN = 80  # signs of an argument that a message shows


def find_config(name: str) -> str:
    """Return the path of a config file, with its argument: "vit_cil:tasks=20" is one of ours.

    A name without a folder and without ".py" is looked up among the configs that come with the
    package, or in a checkout in the folder beside it. Raises UserError where there is none, naming
    the nearest of those and of the files where it was looked for.
    """
    paths.local(name, "file")  # no URL
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
    file = paths.local(path, "file")
    if not os.path.lexists(file):
        there = sorted(str(other) for other in file.parent.glob("*.py"))
        near = nearest(str(file), [*ours, *there])
        raise UserError(f"there is no file {paths.shown(file)}; {near}")
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"{paths.shown(file)} is no config; a config is a file of Python, NAME.py")
    return str(file) + colon + argument


def train(argv: Sequence[str]) -> int:
    """Train and evaluate the run that `argv`, the flags, describe; return the exit status."""
    if _asks_for_help(argv):
        settings = "\n".join(f"  --config.{name}={value!r}" for name, value in DEFAULTS.items())
        print(
            "usage: soft-jax train --config=vit_cil --workdir=runs/mine\n\n"
            f"Train and evaluate a run, or continue it.\n\n{_flags_help(TRAIN_FLAGS)}\n\n"
            "Settings and their defaults, which a config replaces. A list of numbers is written "
            f"10-12 or 3+5, as in a config's argument, or 3,5:\n{settings}"
        )
        return 0
    given = _read_flags(argv, TRAIN_FLAGS)
    workdir = given.values["workdir"] and _workdir(given.values["workdir"])
    distributed = given.values["distributed"]
    if given.values["seeds"] is not None:
        return _train_seeds(argv, given, workdir)
    if given.values["jobs"] is not None:
        raise UserError("--jobs: one run has nothing beside it; give --seeds too, or leave it out")
    try:
        _train(given.config, workdir, distributed)
    except (UserError, OSError) as error:
        if not distributed:
            raise
        # At once, without waiting for the other processes, which may wait for this one.
        continues = "" if isinstance(error, UserError) else f"; {CONTINUES}"
        print(f"error: {error}{continues}", file=sys.stderr, flush=True)
        os._exit(1)
    return 0


def _train(config: "Config", workdir: Place | None, processes: str | None) -> None:
    from absl import logging

    # Imported here: a wrong flag is answered at once, not after jax has started.
    from soft_jax import distributed
    from soft_jax.experiment import loop
    from soft_jax.experiment import settings as settings_lib
    from soft_jax.methods import registry

    logging.set_verbosity(logging.ERROR)
    settings_lib.check(config)
    workdir = workdir or default_workdir(config, registry.parse(config.method).name)
    if processes:
        distributed.join(processes)
    loop.run(config, workdir)


def _train_seeds(argv: Sequence[str], given: "_Flags", workdir: Place | None) -> int:
    """Train a run for each seed and print what they reach. Raises UserError where one failed."""
    count, jobs = whole_number(given.values["seeds"], "--seeds"), _jobs(given.values["jobs"])
    if given.values["distributed"]:
        raise UserError(
            "--seeds, --distributed: take one of them; runs side by side are each a process alone"
        )
    from absl import logging
    from rich.console import Console

    from soft_jax.experiment import planned as planned_lib
    from soft_jax.experiment import seeds as seeds_lib
    from soft_jax.methods import registry

    logging.set_verbosity(logging.ERROR)
    config = given.config
    workdir = workdir or default_workdir(config, registry.parse(config.method).name, of_seeds=True)
    runs = seeds_lib.plan(config, count, workdir)
    outcomes = list(planned_lib.run(runs, Console(), jobs=jobs))
    failed = [
        f"{run.title}: {outcome}"
        for run, outcome in zip(runs, outcomes, strict=True)
        if isinstance(outcome, UserError)
    ]
    if failed:
        raise UserError(
            f"{failed[0]}; {len(failed)} of {count} seeds failed. The mean is taken when all are "
            "finished: the same command continues"
        )
    of_seeds = [run.config.seed for run in runs]
    found = seeds_lib.summary(config, dict(zip(of_seeds, outcomes, strict=True)))
    text = seeds_lib.markdown(config, found, shlex.join(["soft-jax", "train", *argv]))
    print(f"\n{text}")
    seeds_lib.write(workdir, found, text)
    print(f"Written to {workdir / 'seeds.md'} and {workdir / 'seeds.json'}")
    return 0


def _jobs(text: str | None) -> int | None:
    """Return how many runs are asked for side by side; None where the host's devices say it."""
    return None if text is None else whole_number(text, "--jobs")


def _workdir(text: str) -> Place:
    """Return the folder that runs are written to. Raises UserError where it can be none."""
    folder = paths.place(text, "--workdir")
    paths.check_writable(folder, "--workdir", paths.FOLDER)
    return folder


def _asks_for_help(argv: Sequence[str]) -> bool:
    return bool({"-h", "--help", "--helpshort"} & set(argv))


def _flags_help(known: Mapping[str, str]) -> str:
    return "\n".join(f"  --{name}: {text}" for name, text in known.items())


def default_workdir(config: Any, method: str, of_seeds: bool = False) -> Path:
    """Return the folder of a run that is given none: its name, method, tasks and seed.

    `method` is the method in its one spelling. That `of_seeds` holds the runs of several seeds.
    Raises UserError where the name would lead elsewhere than to a folder in runs/.
    """
    if not re.fullmatch(r"[^\s./\0][^/\0]*", config.name):
        raise UserError(
            f"name: {config.name[:_SHOWN]!r} can't begin a folder's name in runs/; expected a word "
            "such as 'softtf', without a slash, and no dot in front. Or give --workdir"
        )
    tasks = f"{config.tasks}x" if config.scenario == "equal" else config.scenario
    seed = "" if of_seeds else f"-seed{config.seed}"
    return Path(f"runs/{config.name}-{method}-{tasks}{seed}")


@dataclasses.dataclass(frozen=True)
class _Flags:
    """What was read from flags: the config, how it was written, and the values of the others.

    `as_written` is the file's config with the flags' fields, `name` is that of the config's flag,
    `overrides` are the texts of its fields. `values` has None for a flag that was not given, and a
    list for `set`.
    """

    as_written: "Config"
    name: str
    overrides: Mapping[str, str]
    values: Mapping[str, Any]

    @functools.cached_property
    def config(self) -> "Config":
        """Return the config to run; asked for late, since it takes an import of jax."""
        return _giving_way(self.as_written, self.name, self.overrides)


def _read_flags(argv: Sequence[str], known: Mapping[str, str]) -> _Flags:
    """Read flags, among them the config file that they name and its fields.

    `known` are the flags and what they mean. Raises UserError of one line for what is wrong in the
    flags or in the file.
    """
    from absl import flags
    from ml_collections import config_flags

    name, fields, rest = _split(argv)
    overrides = [as_flag for field in fields.items() for as_flag in _as_flags(*field)]
    values = flags.FlagValues()  # its own: a program may read flags more than once
    for flag, meaning in known.items():
        if flag != "config":
            # Several, so that a second one is seen.
            flags.DEFINE_multi_string(flag, None, meaning, flag_values=values)
    try:
        argv = ["", f"--config={find_config(name)}", *overrides, *rest]
        # Defining it reads the file and the overrides of its fields.
        config_flags.DEFINE_config_file(
            "config", None, known["config"], flag_values=values, sys_argv=argv
        )
        left = values(argv)
    except UserError as error:
        raise UserError(f"--config: {error}") from error
    except flags.UnrecognizedFlagError as error:
        raise UserError(unknown("flag", error.flagname, known)) from error
    except flags.Error as error:
        raise UserError(_one_line(error)) from error
    except (OSError, SyntaxError, AttributeError, KeyError) as error:
        # A file that can't be read or is no Python, or a field that is none.
        raise UserError(f"--config: {type(error).__name__}: {_one_line(error)}") from error
    if left[1:]:
        flag_names = ", ".join(f"--{flag}" for flag in known)
        raise UserError(f"unexpected argument {left[1]!r}; flags are {flag_names}")
    given = {flag: values[flag].value for flag in known if flag != "config"}
    for flag, texts in given.items():
        if flag != "set" and texts is not None:
            given[flag] = the_only(f"--{flag}", texts)
    return _Flags(from_config_dict(values.config), name, fields, given)


def _giving_way(config: "Config", name: str, fields: Iterable[str]) -> "Config":
    """Return `config`, its file's own settings at their defaults where flags leave them no effect.

    `fields` are those that flags or a sweep set; what the user set, there or in the argument,
    stays. So does what has no effect in the file alone: it is refused later.
    """
    if not fields:
        return config
    from soft_jax.experiment import settings

    given = {each for field in fields for each in _fields_of(field)}
    _, _, argument = name.partition(":")
    for item in argument.split(","):
        with contextlib.suppress(UserError):  # a file may have keys of its own
            given |= parse_argument(item).keys()
    useless = settings.without_effect(config).keys() - given
    if not useless:
        return config
    with contextlib.suppress(UserError):  # it may need the flags to be any good
        alone = _read_flags([f"--config={name}"], {"config": ""}).as_written
        useless -= settings.without_effect(alone).keys()
    return dataclasses.replace(config, **{each: DEFAULTS[each] for each in useless})


def read_config(argv: Sequence[str], known: Mapping[str, str]) -> "Config":
    """Return the config that the flags `argv` give, as `train` reads them.

    `known` has the meaning of --config. Raises UserError for what is wrong in them.
    """
    return _read_flags(argv, known).config


def the_only(flag: str, texts: Sequence[str]) -> str:
    """Return the text that a flag was given. Raises UserError where there are several."""
    if len(texts) > 1:
        first, second = (repr(text[:_SHOWN]) for text in texts[:2])
        raise UserError(f"{flag} is given twice, as {first} and as {second}; give it once")
    return texts[0]


def _split(argv: Sequence[str]) -> tuple[str, dict[str, str], list[str]]:
    """Take the config out of the flags: its name, the texts of its fields, and all other flags.

    Raises UserError for a field that there isn't, naming the nearest, and for what is set twice.
    """
    names, fields, rest = [], {}, []
    set_by: dict[str, str] = {}
    arguments = iter(argv)
    for argument in arguments:
        found = re.fullmatch(r"--?(no)?config(?:\.([^=]*))?(?:=(.*))?", argument, re.DOTALL)
        if not found or (found[1] and found[2] is None):
            rest.append(argument)
            continue
        negated, field, text = found.groups()
        if field is not None and field not in (*DEFAULTS, "layers"):
            raise UserError(f"--config: {unknown('setting', field, DEFAULTS)}")
        if text is None and isinstance(DEFAULTS.get(field or ""), bool):
            text = "false" if negated else "true"
        elif text is None:
            text = next(arguments, None)  # --config.epochs 3
        if text is None or (negated and not isinstance(DEFAULTS[field], bool)):
            raise UserError(f"{argument}: write --config{'.' + field if field else ''}=VALUE")
        if field is None:
            names.append(text)
            continue
        if field in fields:
            the_only(f"--config.{field}", [fields[field], text])
        for each in _fields_of(field):
            if each in set_by:
                raise UserError(f"--config.{set_by[each]} and --config.{field} both set {each}")
            set_by[each] = field
        fields[field] = text
    return the_only("--config", names or ["digits"]), fields, rest


def _fields_of(name: str) -> tuple[str, ...]:
    """Return the fields that a flag `--config.NAME` sets."""
    return ("e_prompt_layers", "mask_layers") if name == "layers" else (name,)


def _as_flags(field: str, text: str) -> list[str]:
    """Return a config's field as the flags that ml_collections reads.

    Lists may be written as a config's argument has them, "10-12", and so may `layers`. Raises
    UserError for a text that is neither that nor a flag's.
    """
    settings = {field: text}
    if field == "layers" or isinstance(DEFAULTS[field], tuple):
        try:
            settings = {
                name: ",".join(map(str, value))
                for name, value in parse_argument(f"{field}={text}").items()
            }
        except UserError:  # "10,11,12", or nothing that can be read
            settings = dict.fromkeys(_fields_of(field), text)
    for name, each in settings.items():
        try:
            check_flag(name, each)
        except UserError as error:
            problem = str(error).removeprefix(f"{name}: ")
            raise UserError(f"flag --config.{field}={text[:_SHOWN]}: {problem}") from error
    return [f"--config.{name}={each}" for name, each in settings.items()]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def whole_number(text: str, flag: str, least: int = 1) -> int:
    """Return the whole number that a flag gives. Raises UserError for another text, or below."""
    # Of ASCII digits, and few: str.isdigit takes "²" too, and int fails at thousands of digits.
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise UserError(f"{flag}: {text[:_SHOWN]!r} is not a whole number from {least} on")
    return int(text)


def predict(arguments: argparse.Namespace) -> int:
    """Print a line for each image; the exit status is 1 where one could not be answered."""
    top = whole_number(arguments.top, "--top")
    if "" in arguments.images:
        raise UserError("images: '' is no path; give a file or a folder (is a variable unset?)")
    if arguments.json and arguments.csv:
        raise UserError("--json, --csv: take one of them")
    load = _by_task(arguments) if arguments.classes is None else _by_names(arguments)
    from soft_jax.data import images

    files = images.find(arguments.images, tell=lambda note: print(note, file=sys.stderr))
    predictor = load()
    write = _writer(arguments)
    failed = 0
    given = None if arguments.task is None else _given(predictor, arguments.task)
    for answered, prediction, errors in predictor.predict_chunks(files, given):
        rows = dict(zip(answered, zip(*prediction, strict=True), strict=True))
        for index in sorted(answered + list(errors)):
            if index in errors:
                write.error(files[index], errors[index])
            else:
                answers = _answers(rows[index], predictor, top, arguments.classes is None)
                write.answers(files[index], answers)
        failed += len(errors)
    return 1 if failed else 0


def _places(arguments: argparse.Namespace) -> tuple[Place, Place | str]:
    """Return the run's folder, and the backbone's file or ""."""
    workdir = paths.place(arguments.workdir, "workdir")
    path = arguments.backbone_path
    return workdir, path and paths.place(path, "--backbone-path")


def _by_task(arguments: argparse.Namespace) -> Callable[[], "Predictor"]:
    """Return what loads the predictor of tasks, and says how images find theirs.

    Those of a run are numbers from 1, those of a library names.
    """
    workdir, backbone_path = _places(arguments)
    named, tasks = tasks_of(workdir, arguments.tasks)
    task: int | str | None = arguments.task
    if not named:
        task = None if task is None else whole_number(task, "--task")
    from soft_jax.inference import rules
    from soft_jax.inference.predictor import Predictor

    if arguments.task_id == rules.TaskGiven.option and task is None:
        raise UserError(f"--task-id: {arguments.task_id!r} needs --task, the task of all images")

    def load() -> Predictor:
        chosen = tasks
        if not named:
            chosen = check_tasks(workdir, tasks, task)
        elif tasks is None and task is not None:
            chosen = _alone(workdir, task.strip())
        predictor = Predictor.load(
            workdir,
            chosen,
            rules.TaskGiven.option if task is not None else arguments.task_id,
            backbone_path=backbone_path,
        )
        if task is None and arguments.task_id is None:
            because = f"{rules.title(predictor.rule.key)}; {predictor.chosen_because}"
            print(f"Task identity: {because}", file=sys.stderr, flush=True)
        return predictor

    return load


def _alone(root: Place, task: str) -> list[str] | None:
    """Return the tasks to load of a library where all images are of one: it, if it is active.

    So it answers also where another is damaged.
    """
    from soft_jax.store.library import LibraryReader

    return [task] if task in LibraryReader(root).read().active else None


def _given(predictor: "Predictor", task: str) -> int:
    """Return the place of the task that all images are of. Raises UserError where it has none."""
    names = [str(name) for name in predictor.task_names]
    name = str(int(task)) if isinstance(predictor.task_names[0], int) else task.strip()
    if name not in names:
        raise UserError(
            f"--task: {name!r} is not a task to choose from; those are {', '.join(names)}"
        )
    return names.index(name)


def _by_names(arguments: argparse.Namespace) -> Callable[[], "Predictor"]:
    """Return what loads the predictor of the class names that are given."""
    for flag in ("tasks", "task", "task_id"):
        if getattr(arguments, flag) is not None:
            raise UserError(
                f"--classes, --{flag.replace('_', '-')}: take one of them; by class names alone, "
                "no task has a part in the answer"
            )
    workdir, backbone_path = _places(arguments)
    names = [name.strip() for name in arguments.classes.split(",")]
    from soft_jax.inference.predictor import Predictor

    return lambda: Predictor.zero_shot(workdir, names, backbone_path=backbone_path)


def tasks_of(workdir: Place, text: str | None) -> tuple[bool, list[Any] | None]:
    """Return whether tasks have names there, as in a library, and those that `--tasks` lists.

    Those of a run are counted from 1. Raises UserError for one that is no number there.
    """
    named = not isinstance(workdir, BucketPath) and os.path.lexists(workdir / "library.json")
    if text is None:
        return named, None
    tasks = [part.strip() for part in text.split(",")]
    return named, tasks if named else [whole_number(part, "--tasks") for part in tasks]


def check_tasks(
    workdir: Place, tasks: Sequence[int] | None, task: int | None = None
) -> list[int] | None:
    """Return the tasks of a run, counted from 1, as they are counted within, from 0.

    Raises UserError for one that the run has not, and for a `task` that is not one of them.
    """
    from soft_jax.store.folder import Reader

    finished = [number + 1 for number in Reader(workdir).present()]
    for flag, wanted, there in (
        ("--tasks", tasks or (), finished),
        ("--task", () if task is None else (task,), tasks or finished),
    ):
        # Without any task, the run says what is wrong with it when it is loaded.
        for number in wanted if finished else ():
            if number not in there:
                listed = ", ".join(map(str, there))
                raise UserError(
                    f"{flag}: {number} is not a task to choose from; those are {listed}"
                )
    return None if tasks is None else [number - 1 for number in tasks]


def _answers(row: tuple, predictor: "Predictor", top: int, of_tasks: bool) -> list[dict[str, Any]]:
    """Return an image's class and the next most probable ones, `top` in all, as JSON has them.

    Classes that can't win are left out. Tasks are counted from 1, and named if classes are
    `of_tasks`.
    """
    answer, _, network, probabilities = row
    order = (-probabilities).argsort(kind="stable")
    others = [class_ for class_ in order if class_ != answer and probabilities[class_] > 0]
    answers = []
    for class_ in [answer, *others[: top - 1]]:
        named = {"class": predictor.class_names[class_], "class_index": int(class_)}
        if of_tasks:
            task = int(predictor.model.task_of_class[class_])
            names = predictor.task_names
            named |= {"task": names[task], "network": names[int(network)]}
        answers.append(named | {"probability": round(float(probabilities[class_]), 6)})
    return answers


class _Text:
    """Prints an image's answers as lines for people."""

    def answers(self, file: str | Path, answers: Sequence[Mapping[str, Any]]) -> None:
        """Print the answer in a line, and a line for each class after it."""
        answer, *others = answers
        by = f", by task {answer.get('network')}'s network"
        other_network = answer.get("network") != answer.get("task")
        print(f"{paths.shown(file)}: {self._line(answer)}{by if other_network else ''}")
        for rank, other in enumerate(others, 2):
            print(f"  {rank}. {self._line(other)}")

    def _line(self, answer: Mapping[str, Any]) -> str:
        task = f" (task {answer['task']})" if "task" in answer else ""
        return f"{answer['class']}{task}, probability {answer['probability']:.4f}"

    def error(self, file: str | Path, error: UserError) -> None:
        """Say what is wrong with a file."""
        print(f"error: {error}", file=sys.stderr)


class _Json:
    """Prints an image's answers as a JSON object in a line."""

    def __init__(self, with_others: bool):
        self._with_others = with_others

    def answers(self, file: str | Path, answers: Sequence[Mapping[str, Any]]) -> None:
        """Print the answer, and where there are others, all of them under "top"."""
        others = {"top": answers} if self._with_others else {}
        print(json.dumps({"file": paths.shown(file), **answers[0], **others}))

    def error(self, file: str | Path, error: UserError) -> None:
        """Print what is wrong with a file as such a line."""
        print(json.dumps({"file": paths.shown(file), "error": str(error)}))


class _Csv:
    """Prints an image's answers as CSV, a line for each class."""

    COLUMNS = ("file", "rank", "class", "class_index", "task", "network", "probability", "error")

    def __init__(self):
        self._out = csv.DictWriter(sys.stdout, self.COLUMNS, restval="", lineterminator="\n")
        self._out.writeheader()

    def answers(self, file: str | Path, answers: Sequence[Mapping[str, Any]]) -> None:
        """Print a line for each class, by rank."""
        for rank, answer in enumerate(answers, 1):
            self._out.writerow({"file": paths.shown(file), "rank": rank, **answer})

    def error(self, file: str | Path, error: UserError) -> None:
        """Print a line with what is wrong with a file."""
        self._out.writerow({"file": paths.shown(file), "error": str(error)})


def _writer(arguments: argparse.Namespace) -> _Text | _Json | _Csv:
    if arguments.csv:
        return _Csv()
    return _Json(with_others=arguments.top != "1") if arguments.json else _Text()


def table(arguments: argparse.Namespace) -> int:
    """Run what is missing of a table and print it; the exit status is 1 where a row failed."""
    seeds, jobs = whole_number(arguments.seeds, "--seeds"), _jobs(arguments.jobs)
    workdir, output = _workdir(arguments.workdir), _output(arguments.output)
    from soft_jax.paper import rows as rows_lib

    benchmark = arguments.benchmark or rows_lib.default_benchmark(arguments.table)
    if benchmark not in rows_lib.BENCHMARKS:
        raise UserError(unknown_value("--benchmark", benchmark, rows_lib.BENCHMARKS))
    rows = rows_lib.rows_of(arguments.table, benchmark)
    numbers = rows_lib.chosen(arguments.rows, len(rows))
    if arguments.list:
        for number in numbers:
            row = rows[number - 1]
            settings = "not run here" if row.settings is None else json.dumps(row.settings)
            print(f"{number:3d}  {row.name}: {settings}")
        return 0
    overrides = parse_argument(arguments.set, "--set")
    rows = [rows[number - 1] for number in numbers]
    from absl import logging
    from rich.console import Console

    from soft_jax.paper import printing, tables

    logging.set_verbosity(logging.ERROR)
    request = tables.Request(arguments.table, benchmark, overrides, seeds, workdir, jobs)
    tables.plan(request, rows)  # what is wrong with all rows is told before anything is written
    picture = output.with_suffix(".png") if output else workdir / "layers.png"
    paths.check_writable(picture, "--output" if output else "--workdir", paths.FILE)
    with paths.making(output, "--output"):
        text, whole = tables.make(request, rows, _command(arguments, overrides), picture)
        if sys.stdout.isatty():
            printing.draw(text, Console())
        else:
            print(text)
        if output:
            _write(output, text)
    return 0 if whole else 1


def _write(file: Place, text: str) -> None:
    """Write a table whole, or leave what was there: a later command reads and replaces it."""
    from soft_jax.store import files

    files.write_text(file, text)


def _output(text: str | None) -> Place | None:
    """Return the file to write a table to. Raises UserError for one that no such command wrote."""
    if not text:
        return None
    file = paths.place(text, "--output")
    paths.check_writable(file, "--output", paths.FILE)
    there = file.read_text("utf-8", "replace") if file.is_file() else ""
    if there and not re.match(r"# .*\n\nMade by `", there):
        raise UserError(
            f"--output: {paths.shown(file)} is there and holds no table that was made by this "
            "command, so it is not replaced; name another file, or remove it"
        )
    return file


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


def sweep(argv: Sequence[str]) -> int:
    """Run every combination of some settings' values, and print them by the validation figure.

    The exit status is 1 where a run failed.
    """
    if _asks_for_help(argv):
        print(
            "usage: soft-jax sweep --config=vit_cil --set=learning_rate=0.003,0.01,0.03\n\n"
            "Run what is missing of a sweep, continue what was cut off, and print a table by the\n"
            f"accuracy on images held out of training.\n\n{_flags_help(SWEEP_FLAGS)}"
        )
        return 0
    given = _read_flags(argv, SWEEP_FLAGS)
    workdir = _workdir(given.values["workdir"] or "runs/sweeps")
    output, jobs = _output(given.values["output"]), _jobs(given.values["jobs"])
    from absl import logging
    from rich.console import Console

    from soft_jax.experiment import sweep as sweep_lib

    logging.set_verbosity(logging.ERROR)
    protocol = given.values["protocol"]
    points = sweep_lib.plan(
        given.as_written,
        given.values["set"] or [],
        protocol,
        workdir,
        lambda config, names: _giving_way(config, given.name, [*given.overrides, *names]),
    )
    if not given.as_written.validation:
        share = sweep_lib.VALIDATION_SHARE
        print(f"validation={share}: a sweep needs it, and the config has none", file=sys.stderr)
    with paths.making(output, "--output"):
        results = sweep_lib.run(points, protocol, Console(), jobs)
        commands = (
            shlex.join(["soft-jax", "sweep", *argv]),
            shlex.join(["soft-jax", "train", *_train_words(given, sweep_lib.best(results))]),
        )
        text = sweep_lib.markdown(results, protocol, *commands)
        print(text)
        if output:
            _write(output, text)
    return 0 if all(result.figure is not None for result in results) else 1


def _train_words(given: _Flags, chosen: Mapping[str, str]) -> list[str]:
    """Return the flags that train a run with the `chosen` settings on all training images."""
    flags = {**given.overrides, **chosen, "validation": "0"}
    fields = {field: text for name, text in flags.items() for field in _fields_of(name)}
    return [f"--config={given.name}", *(f"--config.{name}={text}" for name, text in fields.items())]


def compare(arguments: argparse.Namespace) -> int:
    """Print what two runs have otherwise: settings, figures, and the images they get right."""
    roots = [paths.local(run, "RUN") for run in arguments.runs]
    from soft_jax.evaluation import compare as compare_lib

    print(compare_lib.markdown(*roots))
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Write a task as a folder of timm, transformers or PEFT, and say what is in it."""
    run = paths.local(arguments.run, "RUN")
    task: int | str = arguments.task
    if not os.path.lexists(run / "library.json"):  # else it has a name
        as_library = re.fullmatch("task([0-9]+)(@1)?", task)  # as a run's tasks are called there
        task = whole_number(as_library[1] if as_library else task, "TASK") - 1
    path = arguments.backbone_path
    path = path and paths.local(path, "--backbone-path")
    from soft_jax.experiment import export as export_lib

    export_lib.export(
        run,
        task,
        arguments.out,
        arguments.format,
        without_prompts=arguments.without_prompts,
        backbone_path=path,
    )
    return 0
