"""Kill commands of a library at random moments: python -m benchmarks.kills WORKDIR [--minutes=10]

A small library of digits, on the tests' random backbone, is made in WORKDIR, if there is none yet.
Commands take turns, each on a copy of it and in a process of its own, which gets SIGKILL at a
moment drawn from 0 to the command's usual duration. What it leaves must be the library before the
command or after it, whole: all arrays, archives and test images by their SHA-256, and the log.
Processes are forked from one that has imported all, so that no time goes into importing, which
changes nothing.
"""

import argparse
import functools
import hashlib
import itertools
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import jax

from soft_jax import __main__ as command_line
from soft_jax.experiment import html_report, library  # noqa: F401 (imported before it is forked)
from soft_jax.models import backbones
from soft_jax.store import checkpoint
from soft_jax.store.library import ARCHIVED, LibraryFolder, LibraryReader
from tests.conftest import TINY, tiny_backbone

LOST, BEFORE, AFTER = 1, 10, 11  # exit statuses
CONFIG = (
    "--config=library:epochs=1,batch_size=16,train_images_per_class=40,mask_layers=4,"
    "target_modules=qkv,prototype_features=60"
)
ANY = "--max-drop=100"
MADE_BY = (
    f"learn low digits --classes=0,1 {CONFIG}",
    f"learn high digits --classes=2,3 {ANY}",
    f"learn old digits --classes=4 {ANY}",
    "archive old",
    f"learn low digits --classes=0,1 {ANY}",
)
COMMANDS = (
    f"learn low digits --classes=0,1 {CONFIG}",  # of which nothing is there before
    f"learn new digits --classes=5,6 --keep-test-images {ANY}",
    "learn low digits --classes=0,1 --min-accuracy=100",
    f"learn high digits --classes=7 --extend {ANY}",
    f"merge low high --into=both {ANY}",
    f"activate low@1 {ANY}",
    "rollback low",
    "archive high",
    "restore old",
    "rename low small",
    "move-data digits .",
    "remove low",
    "tidy --keep-versions=1",
    "transfer",
    "report",
)


def forked(act: Callable[[], int], log: Path, seconds: float | None = None) -> int:
    """Return the exit status of `act` in a process of its own; negative where it was killed."""
    backbones.load = lambda *_: backbones.Backbone("tiny", TINY, tiny_backbone(), "0" * 64)
    child = os.fork()
    if not child:
        status = LOST
        try:
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            status = act()
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def give(command: str, root: Path) -> int:
    """Give a command for the library in `root`, with what it needs to change something."""
    name, *words = command.split()
    needs = ["--yes"] if name in ("remove", "tidy") else []
    return command_line.main([name, str(root), *words, *needs])


def shape_of(root: Path) -> dict:
    """Return what tells a library before a command from the one after; empty for none."""
    if not (root / "library.json").exists():
        return {}
    tasks = LibraryReader(root).read().tasks
    return {
        name: {v.number: (v.state, [part["data_dir"] for part in v.data]) for v in found}
        for name, found in tasks.items()
    }


def look(root: Path, before: dict, after: dict) -> int:
    """Return whether the library in `root` is that before a command, or after it; raise where it is
    not whole.
    """
    shape = shape_of(root)
    if shape:
        reader = LibraryReader(root)
        state = reader.read()
        for version in itertools.chain(*state.tasks.values()):
            if version.state == ARCHIVED:
                raw = reader.archive(version).read_bytes()
                assert hashlib.sha256(raw).hexdigest() == version.archive_sha256
            else:
                reader.manifest_of(version)
                checkpoint.verify(reader.path(version))
            if "kept_sha256" in version.test:
                reader.load_tests(version)
        assert reader.log(state)[-1]["state_after"] == state.sha256
        with closing(LibraryFolder(root)):  # clears away what the killed one left
            assert shape_of(root) == shape
    assert shape in (before, after), shape
    return BEFORE if shape == before else AFTER


def main() -> None:
    """Make the library, kill commands until the time is over, and print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # of JAX, which has no threads yet
    # Other than tests are run: they are strict about types, which Optax is not.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_num_cpu_devices", 1)
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    base, root, log = (arguments.workdir.absolute() / name for name in ("base", "library", "log"))
    os.chdir(arguments.workdir)
    if not base.exists():
        making = base.with_name("making")
        shutil.rmtree(making, ignore_errors=True)
        for command in MADE_BY:
            assert forked(functools.partial(give, command, making), log) == 0, log.read_text()
        making.rename(base)
    rng, counts, usual = random.Random(arguments.seed), {}, {}
    end = time.monotonic() + 60 * arguments.minutes

    def fresh(command: str) -> dict:
        shutil.rmtree(root, ignore_errors=True)
        if command != COMMANDS[0]:
            shutil.copytree(base, root)
        return shape_of(root)

    for command in itertools.cycle(COMMANDS):
        if time.monotonic() > end:
            break
        if command not in usual:
            fresh(command)
            began = time.monotonic()
            status = forked(functools.partial(give, command, root), log)
            # A version that is held back is status 1.
            assert status == ("--min-accuracy" in command), (command, log.read_text())
            usual[command] = time.monotonic() - began, shape_of(root)
            counts[command] = dict.fromkeys(("killed", "before", "after", "done", "lost"), 0)
        seconds, after = usual[command]
        row = counts[command]
        for _ in range(max(1, min(10, round(10 / seconds)))):  # about as long for each command
            before = fresh(command)
            status = forked(functools.partial(give, command, root), log, rng.uniform(0, seconds))
            if status != -signal.SIGKILL:
                row["done"] += 1
                continue
            row["killed"] += 1
            found = forked(functools.partial(look, root, before, after), log)
            row[{BEFORE: "before", AFTER: "after"}.get(found, "lost")] += 1
            if found not in (BEFORE, AFTER):
                print(f"LOST: {command}: {log.read_text()}")
                shutil.copytree(root, arguments.workdir.absolute() / f"lost{time.monotonic_ns()}")
        print(command, row, flush=True)
    for command, row in counts.items():
        figures = ", ".join(f"{count} {name}" for name, count in row.items())
        print(f"{usual[command][0]:5.1f} s  {figures}  {command}")
    total = {name: sum(row[name] for row in counts.values()) for name in counts[COMMANDS[0]]}
    print("total: " + ", ".join(f"{count} {name}" for name, count in total.items()))


if __name__ == "__main__":
    main()
