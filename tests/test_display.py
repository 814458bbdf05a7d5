"""What a run shows while it works, on a terminal and elsewhere."""

import dataclasses
import io
import re

import pytest
from rich.console import Console

from configs.digits import get_config
from soft_jax.config import from_config_dict
from soft_jax.experiment import display, loop, sweep
from soft_jax.experiment import run as run_lib
from soft_jax.experiment import settings as settings_lib
from soft_jax.experiment.display import Display
from soft_jax.training import loop as training_loop
from soft_jax.training import train_step
from tests.conftest import tiny_config


def printed(console):
    return console.file.getvalue()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    return Console(file=io.StringIO(), force_terminal=True, width=100)


@pytest.fixture
def log_file():
    return Console(file=io.StringIO(), width=80)


def test_a_terminal_shows_the_phase_and_how_far_it_is(terminal):
    with Display(terminal) as shown:
        shown.begin("loading")
        shown._progress.refresh()
        assert "loading" in printed(terminal)
        assert "/" not in printed(terminal)  # of how many, nobody knows
        shown.begin("training", 60)
        shown.update(12)
        shown._progress.refresh()
        assert re.search(r"training.*12/60", printed(terminal))
        shown.begin("training", 60)  # the same goes on
        shown._progress.refresh()
        assert "12/60" in printed(terminal).rpartition("training")[2]
        shown.begin("evaluating", 3)
        shown._progress.refresh()
        assert "0/3" in printed(terminal).rpartition("evaluating")[2]
        shown.begin("saving")
        shown._progress.refresh()
        assert "/" not in printed(terminal).rpartition("saving")[2]
    assert printed(terminal).endswith("\x1b[2K")  # the line is gone


def test_the_line_goes_when_the_run_fails(terminal):
    with pytest.raises(KeyError), Display(terminal) as shown:
        shown.begin("loading")
        raise KeyError
    assert printed(terminal).endswith("\x1b[2K")


def test_a_log_file_gets_plain_lines_that_are_not_many(log_file, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    with Display(log_file) as shown:
        shown.begin("loading")
        shown.begin("training", 60)
        shown.update(12)
        now[0] += display.EVERY
        shown.update(13)
        shown.update(14)
    assert printed(log_file).splitlines() == ["loading", "training, 13 of 60"]


@pytest.fixture
def untrained(monkeypatch):
    """Tasks of four steps that train nothing, and so need not be compiled."""

    def train_task(config, task, adapter, shared, data):
        for done in (1, 4):
            config.show(done, 4)
        state = train_step.init_state(config.step_config, adapter, shared)
        return state, {"train": 1.0, "input_wait": 0.0}

    monkeypatch.setattr(training_loop, "train_task", train_task)
    monkeypatch.setattr(run_lib.Run, "step_flops", None)


@pytest.mark.usefixtures("fast_compile", "untrained")
def test_a_run_shows_each_of_its_phases_and_a_line_a_task(tmp_path, digits, log_file, monkeypatch):
    """Tasks are counted from 1, nothing that only a terminal understands is printed, and brackets
    in a name are no markup.
    """
    digits = dataclasses.replace(digits, class_names=("[b]0", *digits.class_names[1:]))
    phases, begin, update = [], Display.begin, Display.update

    def begun(self, what, total=None):
        phases.append([what, total, 0])
        begin(self, what, total)

    def updated(self, done):
        phases[-1][2] = done
        update(self, done)

    monkeypatch.setattr(Display, "begin", begun)
    monkeypatch.setattr(Display, "update", updated)
    settings = {"method": "head", "tasks": 2, "prototype_features": 20}
    folder = tmp_path / "[bold]run"
    manifests = loop.run(tiny_config(**settings), folder, log_file, digits)
    names = list(dict.fromkeys(what for what, *_ in phases))
    assert names[0].startswith("loading")
    assert names[-1] == "writing the report"
    of_task = [
        [name.partition(": ")[2] for name in names if name.startswith(f"task {task} of 2: ")]
        for task in (1, 2)
    ]
    # The programs of an evaluation are compiled in its bar, at the first tasks.
    evaluating = "compiling and evaluating test images"
    expected = ["compiling", "training", "statistics", evaluating, "saving"]
    for shown in of_task:
        assert all(name.startswith(word) for name, word in zip(shown, expected, strict=True))
    # Those that can be counted get to their end.
    for name in ("training", evaluating):
        counted = [(total, done) for what, total, done in phases if f": {name}" in what]
        assert counted[-1][0] == counted[-1][1] > 0
    text = printed(log_file)
    assert "\x1b" not in text
    heading = text.index("task  classes")
    rows = [line for line in text[heading:].splitlines() if re.match(r" +\d  (\[b\])?\d", line)]
    assert [row.split()[0] for row in rows] == ["1", "2"]
    for row, manifest in zip(rows, manifests, strict=True):
        assert f"  {', '.join(manifest.class_names)}  " in row
    assert max(map(len, text.splitlines()[2:])) <= 80  # the folder's name may be longer
    # What does not fit is broken between facts.
    facts = text.splitlines()[1:4]
    assert facts[:2] == ["head on digits, 2 tasks of 5 classes", "vit_b16 at 16 pixels"]
    assert re.fullmatch(r"\d+ cpu device\(s\)", facts[2])
    assert "".join(text.splitlines()).endswith(f"Report: {folder}/report.md")


@pytest.mark.usefixtures("digits", "fast_compile", "untrained")
def test_a_sweep_shows_the_phases_of_its_runs_and_no_figure_of_test_images(
    tmp_path, log_file, monkeypatch
):
    """Whoever chooses by validation images must not have seen the others."""
    monkeypatch.setattr(display, "EVERY", -1.0)  # every line is printed
    config = tiny_config(method="head", tasks=2, prototype_features=20, validation=0.2)
    points = sweep.plan(config, ["epochs=3"], None, tmp_path)
    log_file.width = 200
    (result,) = sweep.run(points, None, log_file)
    text = printed(log_file)
    for task in (1, 2):
        shown = [line for line in text.splitlines() if line.startswith(f"task {task} of 2: ")]
        for phase in ("compiling", "training, 1 of 4", "evaluating test images", "saving"):
            assert any(phase in line for line in shown), phase
    assert text.index("loading the images") < text.index("loading the backbone")
    assert re.findall(r"\d+\.\d+", text) == [f"{result.figure.accuracy:.2f}"]


@pytest.mark.parametrize("method", ["dualprompt+softtf", "dualprompt", "l2p+softtf", "head", "bic"])
def test_the_embedded_example_takes_any_method(method):
    """What it sets for its own would have no effect with some, which is refused."""
    settings_lib.check(from_config_dict(get_config(f"method={method}")))
