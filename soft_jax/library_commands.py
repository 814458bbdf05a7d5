"""The commands of a library of tasks, from their arguments to an exit status.

What takes long to import is imported where it is used.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from soft_jax import commands, paths
from soft_jax.errors import UserError

if TYPE_CHECKING:
    from soft_jax.config import Config
    from soft_jax.experiment.data_spec import Data
    from soft_jax.experiment.gate import Gate, Verdict
    from soft_jax.experiment.library import Library
    from soft_jax.store.library import LibraryState, Version

LEARN_FLAGS = {
    "config": "the settings of a new library, as of soft-jax train; default: library",
}
_LIBRARY = "the library's folder, or that of a finished run"


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add the parsers of all commands of a library; each names its function as `function`."""
    _add_growing(subparsers)
    check = _add(
        subparsers, "check", "evaluate all active tasks again; status 1 if one fell", check_
    )
    _add_gate(check, of_version=False)

    _add(subparsers, "tasks", "list a library's tasks and versions", tasks_)
    show = _add(subparsers, "show", "show a task's versions and their figures", show_)
    show.add_argument("task", help="its name, or a version such as birds@2")
    transfer = _add(subparsers, "transfer", "show what tasks give to each other", transfer_)
    transfer.description = (
        "Print what each task's network gives to each task's images: a ridge regression on its "
        "features, on training images held out, in points above that on the frozen network's. Then "
        "to which tasks the test images of each were given, each by itself, when last accepted."
    )
    cost = _add(subparsers, "cost", "show what tasks and their identification cost", cost_)
    cost.description = (
        "Print bytes, parameters and seconds of learning of each active task, and of each rule by "
        "which an image finds its task milliseconds an image, measured now on this machine, the "
        "share of test images that it gives to the right task, and accuracy."
    )
    _add(subparsers, "log", "list all changes of a library", log_)
    report = _add(subparsers, "report", "write what a library or a run holds as a page", report_)
    report.description = (
        "Write one HTML file, for any browser: tasks, versions and log, accuracy over time, "
        "transfer and confusion, which weights each task changed, and how alike tasks are. Nothing "
        "is evaluated again."
    )
    report.add_argument("--output", help="the file to write; default: report.html in the folder")
    explain = _add(subparsers, "explain", "say why an image gets its answer", explain_)
    explain.description = (
        "Print what each rule makes of an image, which layers' masks moved the answer most, and "
        "what the network looked at."
    )
    explain.add_argument("image", help="an image file")
    explain.add_argument(
        "--tasks", help="the tasks to choose from, as of soft-jax predict; default: all"
    )
    explain.add_argument("--output", help="also write it, with pictures, to this HTML file")

    activate = _add(subparsers, "activate", "make a version the active one", activate_)
    activate.add_argument("task", help="the version, such as birds@2")
    _add_gate(activate)
    rollback = _add(subparsers, "rollback", "go back to the version before", rollback_)
    rollback.add_argument("task", help="the task's name")

    archive = _add(subparsers, "archive", "pack a version small; it is not loaded", archive_)
    archive.add_argument("task", help="a task (its active version), or a version such as birds@2")
    restore = _add(subparsers, "restore", "unpack an archived version, to the bit", restore_)
    restore.add_argument("task", help="a task (its newest archived version), or a version")
    rename = _add(subparsers, "rename", "give a task another name", rename_)
    rename.add_argument("task", help="the name that it has")
    rename.add_argument("to", help="the name that it gets")
    move = _add(subparsers, "move-data", "say where images are that were moved", move_data_)
    move.description = (
        "Say that images are in the folder TO now that were in FROM when tasks were learned. It is "
        "taken where the test images there are those that each version was learned with, by their "
        "hashes."
    )
    move.add_argument("old", metavar="FROM", help="the folder where they were, as show has it")
    move.add_argument("new", metavar="TO", help="the folder where they are")
    move.add_argument("--task", help="a task, or a version such as birds@2, alone; default: all")
    remove = _add(subparsers, "remove", "remove a task or a version for ever", remove_)
    remove.add_argument("task", help="a task with all its versions, or a version such as birds@2")
    remove.add_argument("--yes", action="store_true", help="needed; what is removed is gone")

    tidy = _add(subparsers, "tidy", "archive what nobody uses", tidy_)
    tidy.description = "Say which versions the rules archive; with --yes, archive them."
    tidy.add_argument("--archive-unused", help="versions not used for so long, such as 90d")
    tidy.add_argument(
        "--keep-versions", help="of each task, the newest so many, and the active one"
    )
    tidy.add_argument("--yes", action="store_true", help="archive them")


def _add_growing(subparsers: argparse._SubParsersAction) -> None:
    """Add the parsers of the commands that make a version."""
    learn = _add(subparsers, "learn", "add a task to a library, or a new version of one", learn_)
    learn.description = (
        "Learn a task and take it in, unless another task would fall by more than --max-drop "
        "points: then it stays a candidate. The first task makes the library, with the settings "
        "of --config (soft-jax train --help lists them). Killed anywhere, the same command "
        "continues."
    )
    learn.add_argument("name", help="the task's name")
    _add_data(learn)
    learn.add_argument(
        "--start-from",
        help="a task, or a version such as birds@2, whose masks it begins with; best: the task "
        "whose features serve the new images most",
    )
    learn.add_argument(
        "--extend", action="store_true", help="a new version of the task, with these classes more"
    )
    _add_gate(learn)

    lora = _add(subparsers, "import-lora", "take in a LoRA of PEFT as a task", import_lora_)
    lora.description = (
        "Take a LoRA that PEFT saved in, as a task of a library of the method lora, through the "
        "same gate as learn. Its classifier's rows are the classes of the data, in the order of "
        "--classes; where it has none, one is fitted to the training images. They also give what "
        "the task is found by."
    )
    lora.add_argument("name", help="the task's name")
    lora.add_argument(
        "adapter", help="the folder with adapter_config.json and adapter_model.safetensors"
    )
    _add_data(lora)
    _add_gate(lora)

    merge = _add(subparsers, "merge", "make one task, with one mask, of several", merge_)
    merge.description = (
        "Make one task of several, with one mask for all their classes, and put it in their place, "
        "through the same gate as learn; what it was before is the mean of their figures. "
        "Classifier and key are made of their training images, which are read again. The tasks "
        "stay, retired; soft-jax rollback LIBRARY NAME brings them back."
    )
    merge.add_argument("tasks", nargs="+", help="tasks, or versions such as birds@2")
    merge.add_argument("--into", required=True, help="the new task's name")
    merge.add_argument(
        "--method",
        default="mean",
        help="mean; ties: the largest changes alone, where signs agree; dare: random changes, "
        "raised; default: mean",
    )
    merge.add_argument("--weights", help="how much each task counts, such as 2,1; default: alike")
    merge.add_argument(
        "--density",
        help="the share of changes that ties or dare keeps; default: 0.2 for ties, 0.1 for dare",
    )
    _add_gate(merge)


def _add(
    subparsers: argparse._SubParsersAction, name: str, what: str, function: Any
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    parser.add_argument("library", help=_LIBRARY)
    parser.set_defaults(function=function)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which images a version is of; other flags are a config's."""
    parser.add_argument(
        "data", help="a folder with train/CLASS/* (and test/CLASS/*), or the name of a data set"
    )
    parser.add_argument("--classes", help="some of its classes, such as cat,dog; default: all")
    parser.add_argument(
        "--keep-test-images", action="store_true", help="keep its test images in the library"
    )
    parser.set_defaults(takes_config=True)


def _add_gate(parser: argparse.ArgumentParser, of_version: bool = True) -> None:
    parser.add_argument(
        "--max-drop",
        default="1",
        help="points of accuracy that a task may fall by, with the task given or each image by "
        "itself; default: 1",
    )
    if of_version:
        parser.add_argument(
            "--min-accuracy",
            default="0",
            help="percent that the version itself needs with the task given; default: 0",
        )


def _open(arguments: argparse.Namespace) -> "Library":
    root = paths.local(arguments.library, "library")
    from rich.console import Console

    from soft_jax.experiment.library import Library

    return Library(root, Console())


def _gate(arguments: argparse.Namespace) -> "Gate":
    from soft_jax.experiment.gate import Gate

    return Gate(
        _percent(arguments.max_drop, "--max-drop"),
        _percent(getattr(arguments, "min_accuracy", "0"), "--min-accuracy"),
    )


def _percent(text: str, flag: str) -> float:
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?", text) or float(text) > 100:
        raise UserError(f"{flag}: {text[:80]!r} is not a number of points from 0 to 100")
    return float(text)


def _command(arguments: argparse.Namespace) -> str:
    """Return how the log calls the command: as it was given, without the library's folder."""
    given = list(arguments.given)
    given.remove(arguments.library)
    return shlex.join([arguments.command, *given])


def learn_(arguments: argparse.Namespace) -> int:
    """Learn a task; the exit status is 1 where it stays a candidate."""
    gate = _gate(arguments)
    opened, data, config = _to_learn(arguments)
    version, verdict = opened.learn(
        arguments.name,
        data,
        config=config,
        start_from=arguments.start_from,
        extend=arguments.extend,
        gate=gate,
        keep_test_images=arguments.keep_test_images,
        command=_command(arguments),
    )
    return _print_taken_in(arguments, arguments.name, version, verdict)


def import_lora_(arguments: argparse.Namespace) -> int:
    """Take in a LoRA; the exit status is 1 where it stays a candidate."""
    gate = _gate(arguments)
    adapter = paths.local(arguments.adapter, "ADAPTER")
    opened, data, config = _to_learn(arguments)
    version, verdict = opened.import_lora(
        arguments.name,
        adapter,
        data,
        config=config,
        gate=gate,
        keep_test_images=arguments.keep_test_images,
        command=_command(arguments),
    )
    return _print_taken_in(arguments, arguments.name, version, verdict)


def merge_(arguments: argparse.Namespace) -> int:
    """Merge tasks; the exit status is 1 where the new one stays a candidate."""
    weights, density = arguments.weights, arguments.density
    if weights is not None:
        weights = [_number(text, "--weights") for text in weights.split(",")]
    version, verdict = _open(arguments).merge(
        arguments.tasks,
        arguments.into,
        arguments.method,
        weights=weights,
        density=None if density is None else _number(density, "--density"),
        gate=_gate(arguments),
        command=_command(arguments),
    )
    return _print_taken_in(arguments, arguments.into, version, verdict)


def _number(text: str, flag: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise UserError(f"{flag}: {text[:80]!r} is not a number")
    return float(text)


def _to_learn(arguments: argparse.Namespace) -> "tuple[Library, Data, Config | None]":
    """Return the library, the images, and the settings where they are given or it is new."""
    root = paths.local(arguments.library, "library")
    paths.check_writable(root, "library", paths.FOLDER)
    classes = [name.strip() for name in (arguments.classes or "").split(",") if name.strip()]
    from soft_jax.store import library

    library.check_name(arguments.name)
    config = None
    is_new = not library.holds_library(root) and not (root / "config.json").exists()
    if arguments.flags or is_new:
        flags = arguments.flags
        if not any(re.match(r"--?config=", flag) or flag == "--config" for flag in flags):
            flags = ["--config=library", *flags]
        config = commands.read_config(flags, LEARN_FLAGS)
    from absl import logging

    from soft_jax.experiment.data_spec import Data

    logging.set_verbosity(logging.ERROR)
    opened = _open(arguments)
    limits = vars(config) if config else opened.state().config
    return opened, Data.parse(arguments.data, classes, limits), config


def _print_taken_in(
    arguments: argparse.Namespace, name: str, version: "Version", verdict: "Verdict"
) -> int:
    """Say what became of a new version of task `name`; return the exit status."""
    from soft_jax.store import library

    _print_verdict(verdict)
    called = f"{name}@{version.number}"
    if version.state == library.ACTIVE:
        print(f"{called} is active: {_learned(version)}")
        return 0
    print(
        f"{called} stays a candidate: {_learned(version)}. To take it all the same: "
        f"soft-jax activate {arguments.library} {called} --max-drop=100"
    )
    return 1


def _learned(version: "Version") -> str:
    figures = version.learned
    if not figures:
        return "not evaluated"
    return (
        f"{figures['given']:.2f}% with the task given, {figures['per_sample']:.2f}% each image by "
        "itself"
    )


def _print_verdict(verdict: "Verdict") -> None:
    for name, figures in verdict.figures.items():
        print(f"{name}: {figures['given']:.2f}% given, {figures['per_sample']:.2f}% by itself")
    for line in verdict.fallen:
        print(f"fell: {line}")
    for name, why in verdict.unchecked.items():
        print(f"not checked: {name}: {why}")


def check_(arguments: argparse.Namespace) -> int:
    """Evaluate all active tasks; the exit status is 1 where one fell or can't be checked."""
    verdict = _open(arguments).check(_gate(arguments).max_drop)
    _print_verdict(verdict)
    print("All tasks are as they were." if verdict.passed else "Not all tasks are as they were.")
    return 0 if verdict.passed else 1


def tasks_(arguments: argparse.Namespace) -> int:
    """Print a line for each version."""
    from soft_jax.store.library import LibraryReader

    reader = LibraryReader(paths.local(arguments.library, "library"))
    state = reader.read()
    rows = [("version", "state", "classes", "learned", "now", "bytes", "last use")]
    for name, versions in state.tasks.items():
        for version in versions:
            now = state.figures.get(name) if version.state == "active" else None
            rows.append(
                (
                    f"{name}@{version.number}",
                    version.state,
                    str(len(version.classes)),
                    _two(version.learned),
                    _two(now),
                    f"{reader.size(version):,}",
                    reader.last_used(version)[:10],
                )
            )
    _print_table(rows)
    print("learned, now: percent with the task given / each image by itself")
    return 0


def _two(figures: Mapping[str, float] | None) -> str:
    return f"{figures['given']:.1f} / {figures['per_sample']:.1f}" if figures else "–"


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def show_(arguments: argparse.Namespace) -> int:
    """Print what is known of a task's versions, or of one."""
    from soft_jax.store import library

    opened = _open(arguments)
    reader = library.LibraryReader(opened.root)
    state = reader.read()
    name, number = library.split_name(arguments.task)
    versions = state.versions(name) if number is None else (state.version(name, number),)
    names = {str(v.id): task for task, found in state.tasks.items() for v in found}
    # What the gate found when each version came in.
    at_gate = {r["found"].get("version"): r["found"] for r in reversed(reader.log(state))}
    for version in versions:
        print(f"{name}@{version.number}, {version.state}, made {version.created}")
        print(f"  classes: {', '.join(state.classes[c] for c in version.classes)}")
        if version.origin:
            print(f"  from: {version.origin}")
        for part in version.data:
            where = part["data_dir"] if part["dataset"] == "folder" else part["dataset"]
            print(f"  images of {', '.join(part['classes'])}: {where}")
        if version.test:
            kept = ", kept here" if reader.tests(version).is_file() else ""
            print(f"  test images: {version.test['images']}{kept}")
        print(f"  when learned: {_learned(version)}")
        for line in version.gate.get("fallen", ()):
            print(f"  at the gate: {line}")
        if forward := opened.forward(name, version):
            print(
                f"  forward transfer: {forward.gain:+.1f} from {forward.best}, "
                f"{forward.mean:+.1f} on average; frozen features {forward.frozen:.1f}%"
            )
        for other, change in at_gate.get(version.id, {}).get("backward", {}).items():
            if other in names:  # it may have been removed since
                given, alone = (f"{change[key]:+.1f}" for key in ("given", "per_sample"))
                print(f"  backward transfer: {names[other]}: {given} given, {alone} by itself")
        for task, why in version.gate.get("unchecked", {}).items():
            print(f"  not checked: {task}: {why}")
        print(f"  {reader.size(version):,} bytes, {version.seconds:.0f} s of training")
    return 0


def transfer_(arguments: argparse.Namespace) -> int:
    """Print the table of transfer; the exit status is 1 where a pair could not be measured."""
    opened = _open(arguments)
    table = opened.transfer()
    names = [name for name in table if name != "frozen"]
    rows = [["network of", *names]]
    for of, gains in table.items():
        figure = "{:.1f}%" if of == "frozen" else "{:+.1f}"
        rows.append([of, *(figure.format(gains[n]) if n in gains else "–" for n in names)])
    _print_table(rows)
    _print_confusion(opened.state())
    return 0 if all(len(gains) == len(names) for gains in table.values()) else 1


def _print_confusion(state: "LibraryState") -> None:
    """Print to which tasks each task's test images were given, where that is known of any."""
    names = {version.id: name for name, version in state.active.items()}
    if not state.confusion:
        return
    rows = [["images of / given to", *names.values()]]
    for one, name in names.items():
        if given := state.confusion.get(one):
            shares = (100 * given.get(other, 0) / sum(given.values()) for other in names)
            rows.append([name, *(f"{share:.1f}%" for share in shares)])
    print()
    _print_table(rows)


def cost_(arguments: argparse.Namespace) -> int:
    """Print the table of costs; the exit status is 1 where a task's images could not be had."""
    cost = _open(arguments).cost()
    rows = [("", "bytes", "parameters", "learned in", "an image", "right task", "accuracy")]
    for name, of in cost.tasks.items():
        learned = f"{of.seconds:.1f} s"
        shares = ("–" if x is None else f"{x:.1f}%" for x in (of.right_task, of.accuracy))
        rows.append((name, f"{of.bytes:,}", f"{of.parameters:,}", learned, "", *shares))
    for option, of in cost.rules.items():
        figures = (f"{of.milliseconds:.2f} ms", f"{of.right_task:.1f}%", f"{of.accuracy:.1f}%")
        rows.append((f"--task-id={option}", "", "", "", *figures))
    _print_table(rows)
    print(f"an image: measured now, on {cost.machine}; oracle: the task is given")
    print("a task's right task and accuracy: by the rule that predict takes")
    for name, why in cost.unchecked.items():
        print(f"not measured: {name}: {why}")
    return 1 if cost.unchecked else 0


def log_(arguments: argparse.Namespace) -> int:
    """Print a line for each change."""
    for record in _open(arguments).log():
        note = f": {record['note']}" if record["note"] else ""
        print(f"{record['number']}  {record['when']}  {record['command']}{note}")
    return 0


def report_(arguments: argparse.Namespace) -> int:
    """Write the report."""
    root = paths.local(arguments.library, "library")
    from rich.console import Console

    from soft_jax.experiment import html_report

    print(f"Report: {paths.shown(html_report.write(root, arguments.output, Console()))}")
    return 0


def explain_(arguments: argparse.Namespace) -> int:
    """Print why an image gets its answer, and write it as a page where one is asked for."""
    root = paths.local(arguments.library, "library")
    image = paths.local(arguments.image, "image")
    output = paths.local(arguments.output, "--output") if arguments.output else None
    from soft_jax.evaluation import explained, html
    from soft_jax.inference import explain

    named, tasks = commands.tasks_of(root, arguments.tasks)
    tasks = tasks if named else commands.check_tasks(root, tasks)
    with paths.making(output, "--output"):
        if output:
            html.check_output(output)  # before what takes long
        found = explain.explain(*explain.load(root, tasks), image)
        if output:  # first: whoever reads what is printed may have enough of it
            html.write(output, explained.page(found, image, root.absolute().name))
    print("\n".join(explained.lines(found, paths.shown(image))))
    if output:
        print(f"\nPage: {paths.shown(output)}")
    return 0


def _version_of(text: str) -> tuple[str, int]:
    from soft_jax.store import library

    name, number = library.split_name(text)
    if number is None:
        raise UserError(f"version: write which version of {name}, such as {name}@1")
    return name, number


def activate_(arguments: argparse.Namespace) -> int:
    """Make a version the active one; the exit status is 1 where the gate holds it back."""
    name, number = _version_of(arguments.task)
    verdict = _open(arguments).activate(name, number, _gate(arguments), _command(arguments))
    _print_verdict(verdict)
    if verdict.fallen:
        print(f"{name}@{number} is not active: --max-drop is what may fall")
        return 1
    print(f"{name}@{number} is active")
    return 0


def rollback_(arguments: argparse.Namespace) -> int:
    """Go back to the version before the active one."""
    opened = _open(arguments)
    before = {version.id for version in opened.state().active.values()}
    _, verdict = opened.rollback(arguments.task, _command(arguments))
    _print_verdict(verdict)
    for name, version in opened.state().active.items():
        if version.id not in before:
            print(f"{name}@{version.number} is active")
    return 0


def archive_(arguments: argparse.Namespace) -> int:
    """Pack a version."""
    from soft_jax.store import library

    opened = _open(arguments)
    name, number = library.split_name(arguments.task)
    version = opened.archive(name, number, _command(arguments))
    packed = library.LibraryReader(opened.root).archive(version)
    print(f"{name}@{version.number} is archived: {packed.stat().st_size:,} bytes in {packed}")
    return 0


def restore_(arguments: argparse.Namespace) -> int:
    """Unpack an archived version."""
    from soft_jax.store import library

    name, number = library.split_name(arguments.task)
    version = _open(arguments).restore(name, number, _command(arguments))
    called = f"{name}@{version.number}"
    print(
        f"{called} is there again; soft-jax activate {arguments.library} {called} makes it active"
    )
    return 0


def rename_(arguments: argparse.Namespace) -> int:
    """Give a task another name."""
    _open(arguments).rename(arguments.task, arguments.to, _command(arguments))
    print(f"{arguments.task} is {arguments.to} now")
    return 0


def move_data_(arguments: argparse.Namespace) -> int:
    """Say where images are now."""
    opened = _open(arguments)
    names = opened.move_data(arguments.old, arguments.new, arguments.task, _command(arguments))
    print(f"The images of {', '.join(names)} are in {paths.shown(arguments.new)} now")
    return 0


def remove_(arguments: argparse.Namespace) -> int:
    """Remove a task or a version."""
    from soft_jax.store import library

    name, number = library.split_name(arguments.task)
    opened = _open(arguments)
    state = opened.state()
    found = state.versions(name) if number is None else (state.version(name, number),)
    if not arguments.yes:
        raise UserError(
            f"remove: {len(found)} version(s) of {name} would be gone for ever; give --yes, or "
            "archive instead"
        )
    opened.remove(name, number, _command(arguments))
    print(f"{arguments.task} is removed; the log has the record")
    return 0


def tidy_(arguments: argparse.Namespace) -> int:
    """Say what the rules archive, and with --yes archive it."""
    days, keep = None, None
    if arguments.archive_unused is not None:
        found = re.fullmatch(r"([0-9]{1,5})d", arguments.archive_unused)
        if not found:
            raise UserError(
                f"--archive-unused: {arguments.archive_unused[:80]!r}; write days as 90d"
            )
        days = float(found[1])
    if arguments.keep_versions is not None:
        keep = commands.whole_number(arguments.keep_versions, "--keep-versions")
    if days is None and keep is None:
        raise UserError("tidy: give --archive-unused=90d, --keep-versions=3, or both")
    opened = _open(arguments)
    planned = opened.tidy_plan(days, keep)
    for name, version, why in planned:
        if arguments.yes:
            opened.archive(name, version.number, _command(arguments))
        done = "archived" if arguments.yes else "would be archived"
        print(f"{name}@{version.number} {done}: {why}")
    if not planned:
        print("There is nothing to archive.")
    elif not arguments.yes:
        print("Give --yes to archive them.", file=sys.stderr)
    return 0
