"""Every command, with a path that is wrong in each of its arguments: one line, and no waiting."""

import contextlib
import os
import shutil
import signal
import tarfile
from pathlib import Path

import pytest

from soft_jax import __main__ as command_line
from soft_jax import commands
from soft_jax.data import sources
from soft_jax.errors import UserError
from soft_jax.experiment import loop, planned
from soft_jax.models import backbones

_, PARSERS = command_line._parsers()
# Those whose flags are not argparse's.
FLAGS = {"train": commands.TRAIN_FLAGS, "sweep": commands.SWEEP_FLAGS}
PATHS = ("ftp://host/x", "~no_such_user_here/x", "no/x", "there/../no", "../here/run", "fifo")
PATHS += ("fifo/x", "piped", "pipes", "/dev/zero")
# What a command needs beside the argument that is tried.
NEEDED = {"sweep": ["--set=epochs=1", "--config.validation=0.1"], "tidy": ["--keep-versions=1"]}
NEEDED |= {"export": ["--without-prompts"]}
VALUES = {"library": "run", "workdir": "run", "run": "run", "runs": "run", "data": "images"}
VALUES |= {"format": "timm", "table": "7", "task": "1"}

# ml_collections imports a config file in a way that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")


def refuse(*_, **__):
    raise UserError("it would begin")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).parent / "data/format_0.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("tables/*/seed*"))


@pytest.fixture
def here(run, tmp_path, monkeypatch):
    """A folder with a pipe, a run, and folders in which a pipe stands for a run's or a library's
    file; nothing is trained or loaded.
    """
    here = tmp_path / "here"
    for folder in ("there", "images", "piped", "pipes"):
        (here / folder).mkdir(parents=True)
    for pipe in ("fifo", "piped/config.json", "pipes/library.json"):
        os.mkfifo(here / pipe)
    shutil.copytree(run, here / "run")
    monkeypatch.chdir(here)
    for module, name in (
        (loop, "run"),
        (planned, "run"),
        (sources, "load"),
        (backbones, "load"),
        (backbones, "locate"),
    ):
        monkeypatch.setattr(module, name, refuse)
    return here


class Waits(BaseException):
    """A call took too long; nothing catches it on the way."""


@contextlib.contextmanager
def no_waiting(seconds=60):
    """Raise Waits where the block takes longer; a call that waits in the system is broken off."""

    def fail(*_):
        raise Waits

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def calls(command, path):
    """Return the arguments of calls in each of which another argument is `path`."""
    if command in FLAGS:  # what --distributed fails at ends the program
        flags = [flag for flag in FLAGS[command] if flag != "distributed"]
        needed = NEEDED.get(command, [])
        return [[command, f"--{flag}={path}", *needed] for flag in flags]
    parser = PARSERS[command]
    takers = [action for action in parser._actions if action.nargs != 0]
    found = []
    for tried in takers:
        words = [command, *NEEDED.get(command, [])]
        for action in takers:
            value = path if action is tried else VALUES.get(action.dest, "x")
            flag = action.option_strings[-1:] if action.option_strings else None
            if flag and (action is tried or action.required):
                words.append(f"{flag[0]}={value}")
            elif not flag:
                words += [value] * (action.nargs if type(action.nargs) is int else 1)
        found.append(words)
    if parser.get_default("takes_config"):
        found.append([*found[0][:1], "new", *found[0][2:], f"--config={path}"])
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("command", PARSERS)
def test_a_wrong_path_is_one_line_and_nothing_waits(command, path, here, capsys):
    refused = 0
    for words in calls(command, path):
        with no_waiting():
            status = command_line.main(words)
        out, err = capsys.readouterr()
        assert status in (0, 1), words
        assert "Traceback" not in out + err, words
        if status:
            assert err.startswith("error: ") and err.count("\n") == 1, (words, err)
        refused += status
    assert refused or path == "../here/run"
