"""Sweeps: which runs there are, how they are ranked, and what is chosen, by images held out."""

import dataclasses
import io
import os
import re
import shlex
import signal

import pytest
from rich.console import Console

from soft_jax import __main__ as command_line
from soft_jax import commands
from soft_jax.config import Config
from soft_jax.data import sources
from soft_jax.errors import Stopped, UserError
from soft_jax.evaluation import report
from soft_jax.experiment import loop, planned, sweep
from soft_jax.experiment.stopping import Preempted
from tests.manifests import manifest_of

# ml_collections imports a config file in a way that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

PROTOTYPE, PROMPT = "per_sample/prototype", "per_sample/prompt_id"
VOTE, FROZEN = "batch_vote/prompt_id", "per_sample/frozen_features"


def manifest(**correct_of_100):
    """Of a run of one task: how many of 100 held-out images each protocol got right. All test
    images are wrong.
    """

    def rows(correct):
        return [{"correct": correct, "total": 100, "task_correct": 0, "identified": {}}]

    return manifest_of(
        task=0,
        classes=(0,),
        class_names=("a",),
        num_classes=1,
        num_tasks=1,
        config={},
        backbone={"name": "vit_b16", "sha256": "0"},
        metrics={key: rows(0) for key in correct_of_100},
        validation={key: rows(correct) for key, correct in correct_of_100.items()},
    )


def swept(*arguments, outcomes, workdir, monkeypatch, capsys):
    """Exit status and output of a sweep whose runs end as `outcomes`, in the order of the grid."""
    monkeypatch.setattr(planned, "run", lambda every, *_, **__: outcomes[: len(every)])
    status = command_line.main(["sweep", *arguments, f"--workdir={workdir}"])
    return status, capsys.readouterr()


def table_rows(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


@pytest.fixture
def world(tmp_path, monkeypatch, capsys):
    return {"workdir": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}


def settings_of(points):
    return [dict(point.settings) for point in points]


def test_the_grid_is_every_combination(tmp_path):
    points = sweep.plan(Config(), ["learning_rate=0.01, 0.1", "epochs=1,2"], None, tmp_path)
    assert settings_of(points) == [
        {"learning_rate": rate, "epochs": epochs} for rate in ("0.01", "0.1") for epochs in "12"
    ]
    last = points[-1].run
    assert (last.config.learning_rate, last.config.epochs) == (0.1, 2)
    assert last.folder == tmp_path / planned.folder_of(last.config)
    assert len({point.run.folder for point in points}) == 4


def test_lists_are_written_as_in_a_configs_argument(tmp_path):
    points = sweep.plan(Config(), ["layers=10-12,11+12"], None, tmp_path)
    layers = [(p.run.config.mask_layers, p.run.config.e_prompt_layers) for p in points]
    assert layers == [((10, 11, 12),) * 2, ((11, 12),) * 2]


def test_a_method_swept_leaves_a_files_own_settings_without_effect(world):
    """The digits' file sets masks, which a bare head has no use for; what is swept stays."""
    outcomes = [manifest(**{PROMPT: 50})], [manifest(**{PROTOTYPE: 60})]
    digits = "--config=digits", "--set=method=dualprompt+softtf,head"
    status, output = swept(*digits, outcomes=outcomes, **world)
    assert status == 0, output.err
    cells = [cell for row in table_rows(output.out) for cell in row]
    assert {"dualprompt+softtf", "head"} <= set(cells), output.out
    status, output = swept(*digits, "--set=density=0.5", outcomes=outcomes, **world)
    assert status != 0
    assert "density: 0.5 has no effect" in output.err


@pytest.mark.parametrize(("share", "taken"), [(0.0, 0.1), (0.3, 0.3)])
def test_images_are_held_out_whatever_the_config_says(tmp_path, share, taken):
    (point,) = sweep.plan(Config(validation=share), ["epochs=1"], None, tmp_path)
    assert point.run.config.validation == taken


@pytest.mark.parametrize(
    ("choices", "protocol", "message"),
    [
        ([], None, "^--set: write what to try"),
        (["epochs"], None, "^--set: 'epochs': write NAME=VALUE,VALUE"),
        (["epochs=1,,2"], None, "^--set: 'epochs=1,,2': write NAME=VALUE,VALUE"),
        (["epoch=1"], None, "^--set: key 'epoch' is unknown; did you mean 'epochs'?"),
        (["epochs=1,few"], None, "^--set: epochs='few' is not of the type int"),
        (["epochs=1,0"], None, "^--set: epochs=0: epochs: 0 is below 1"),
        (["density=0.5"], None, "^--set: density=0.5: density: 0.5 has no effect"),
        (["epochs=1", "epochs=1,2"], None, "^--set: epochs is given twice; .* --set=epochs=1,2$"),
        (["layers=3", "mask_layers=3"], None, "^--set: layers and mask_layers both set mask_lay"),
        (["seed=1,2"], None, "^--set: seed changes the images or the tasks"),
        (["validation=0.1,0.2"], None, "^--set: validation changes the images"),
        (["learning_rate=0.1,1e-1"], None, "learning_rate=0.1 and learning_rate=1e-1 are the same"),
        (["eval_batch_size=1,2"], None, "eval_batch_size=1 and eval_batch_size=2 are the same run"),
        (["epochs=1"], "per_sample/prototypes", "^--protocol: .*did you mean 'per_sample/proto"),
        (["epochs=1"], FROZEN, "^--protocol: .* is the same for all runs: no training changes it"),
        (["epochs=1"], "per_sample/no_task_id", "^--protocol: .* means nothing for method 'dualp"),
    ],
)
def test_what_can_not_be_swept_is_said_before_anything_runs(tmp_path, choices, protocol, message):
    with pytest.raises(UserError, match=message):
        sweep.plan(Config(), choices, protocol, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_figure_is_that_of_the_best_rule_that_predict_could_take():
    """Not of a vote by batches, which leaks the task, nor of frozen features, which are the same
    for all.
    """
    figure = sweep.figure_of(
        [manifest(**{PROMPT: 30, PROTOTYPE: 40, VOTE: 90, FROZEN: 80, "oracle/task_given": 99})],
        None,
    )
    assert (figure.protocol, figure.accuracy, figure.images) == (PROTOTYPE, 40.0, 100)
    assert sweep.figure_of([manifest(**{PROMPT: 30, VOTE: 90})], VOTE).accuracy == 90.0


def test_a_protocol_that_a_run_does_not_have_ends_the_sweep():
    with pytest.raises(UserError, match=r"batch_vote/gradient_id_3.*it has those of per_sample/pr"):
        sweep.figure_of([manifest(**{PROMPT: 30})], "batch_vote/gradient_id_3")


def test_the_table_is_sorted_and_its_best_row_is_a_command(world):
    outcomes = [[manifest(**{PROMPT: right, PROTOTYPE: 20})] for right in (30, 50, 10)]
    status, printed = swept(
        "--config=digits:epochs=2",
        "--set=learning_rate=0.01,0.03,0.1",
        "--config.clip_norm=2",
        "--config.validation=0.2",
        outcomes=outcomes,
        **world,
    )
    assert status == 0
    assert table_rows(printed.out) == [
        ["learning_rate", "val.", "forget", "protocol"],
        ["0.03", "50.00", "0.00", "CIL per_sample, Prompt ID"],
        ["0.01", "30.00", "0.00", "CIL per_sample, Prompt ID"],
        ["0.1", "20.00", "0.00", "CIL per_sample, prototype"],
    ]
    assert "0.2 of each class's training images" in printed.out
    assert "One of the 100 images is 1.00 points" in printed.out
    assert "Chosen: learning_rate=0.03." in printed.out
    (command,) = re.findall("^    (soft-jax train .*)", printed.out, re.MULTILINE)
    words = shlex.split(command)[2:]
    config = commands._read_flags(words, commands.TRAIN_FLAGS).config
    assert (config.epochs, config.learning_rate) == (2, 0.03)
    assert (config.clip_norm, config.validation) == (2.0, 0.0)


def test_the_command_of_the_best_row_sets_nothing_twice(world):
    """`layers` are two settings, of which a sweep may choose one."""
    _, printed = swept(
        "--config.layers=3-5", "--set=mask_layers=2", outcomes=[[manifest(**{PROMPT: 30})]], **world
    )
    (command,) = re.findall("^    (soft-jax train .*)", printed.out, re.MULTILINE)
    config = commands._read_flags(shlex.split(command)[2:], commands.TRAIN_FLAGS).config
    assert (config.e_prompt_layers, config.mask_layers) == ((3, 4, 5), (2,))


def test_a_share_that_nobody_asked_for_is_said(world):
    outcomes = [[manifest(**{PROMPT: 30})]]
    _, printed = swept("--set=epochs=1", outcomes=outcomes, **world)
    assert "validation=0.1: a sweep needs it" in printed.err
    assert "0.1 of each class's training images" in printed.out


@pytest.mark.parametrize(
    "flags", [["--set=epoch=1"], ["--set=epochs=0"], ["--set=epochs=1", "--output=."]]
)
def test_that_share_is_not_said_of_a_sweep_that_is_refused(flags, capsys):
    assert command_line.main(["sweep", *flags]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_one_protocol_for_all_is_named_once(world):
    outcomes = [[manifest(**{PROMPT: 30, VOTE: right})] for right in (1, 2)]
    _, printed = swept("--set=epochs=1,2", f"--protocol={VOTE}", outcomes=outcomes, **world)
    assert table_rows(printed.out) == [
        ["epochs", "val.", "forget"],
        ["2", "2.00", "0.00"],
        ["1", "1.00", "0.00"],
    ]
    assert "under CIL batch_vote, Prompt ID *" in printed.out


def test_a_run_that_failed_stands_below_and_the_status_says_so(world, tmp_path):
    outcomes = [UserError("the loss is\nnot finite"), [manifest(**{PROMPT: 30})]]
    for number in range(2):  # the same command continues, and replaces its table
        if number:  # whole: no reader sees half of one
            os.link(tmp_path / "new/t.md", tmp_path / "before")
            (tmp_path / "before").write_text((tmp_path / "before").read_text() + "\nread on\n")
        status, printed = swept(
            "--set=epochs=1,2", f"--output={tmp_path / 'new/t.md'}", outcomes=outcomes, **world
        )
    assert status == 1
    assert table_rows(printed.out)[-1] == ["1", "failed", "–", "–"]
    assert "- failed: epochs=1: the loss is not finite" in printed.out
    assert "Chosen: epochs=2." in printed.out
    assert printed.out.endswith((tmp_path / "new/t.md").read_text() + "\n")
    assert (tmp_path / "before").read_text().endswith("read on\n")


def test_where_all_runs_failed_nothing_is_chosen(world, tmp_path):
    outcomes = [UserError("first"), UserError("second")]
    output = f"--output={tmp_path / 'new/one/t.md'}"
    status, printed = swept("--set=epochs=1,2", output, outcomes=outcomes, **world)
    assert status == 1
    assert not list(tmp_path.iterdir())  # no folder for a table that there is not
    assert printed.err.endswith("error: first\n")
    assert "Chosen" not in printed.out


def test_only_what_is_not_finished_is_run(tmp_path, monkeypatch):
    """A run is continued by the same call as it is begun, in the same folder."""
    points = sweep.plan(Config(), ["learning_rate=0.1,0.3"], None, tmp_path)
    there = {points[0].run: [manifest(**{PROMPT: 20})]}
    monkeypatch.setattr(planned, "finished", there.get)
    monkeypatch.setattr(report, "shows", lambda *_: True)
    monkeypatch.setattr(sources, "load", lambda *_: "the images")
    ran = []

    def run(config, folder, console, dataset, figures):
        ran.append((config, folder, dataset))
        assert not figures
        return [manifest(**{PROMPT: 40})]

    monkeypatch.setattr(loop, "run", run)
    output = io.StringIO()
    results = sweep.run(points, None, Console(file=output, width=200))
    assert ran == [(points[1].run.config, points[1].run.folder, "the images")]
    assert [result.figure.accuracy for result in results] == [20.0, 40.0]
    assert "2 of 2: learning_rate=0.3" in output.getvalue()
    assert "learning_rate=0.3: 40.00 on validation images" in output.getvalue()


@pytest.mark.parametrize("during", ["a download", "reading"])
def test_a_signal_while_images_are_loaded_stops_the_sweep(tmp_path, monkeypatch, during):
    """None of its runs begins, and the signal is told."""

    def load(name, folder, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(10)
        if during == "a download":
            raise Stopped
        return "the images"

    monkeypatch.setattr(sources, "load", load)
    monkeypatch.setattr(loop, "run", None)
    points = sweep.plan(Config(), ["epochs=1,2"], None, tmp_path)
    with pytest.raises(Preempted, match="Stopped while reading images; the same com") as stopped:
        sweep.run(points, None, Console(quiet=True))
    assert stopped.value.signum == signal.SIGTERM


def test_equal_runs_stay_in_the_order_of_the_grid(tmp_path):
    points = sweep.plan(Config(), ["epochs=1,2,3"], None, tmp_path)
    figure = sweep.Figure(PROMPT, 50.0, 0.0, 100)
    accuracies = (40.0, 50.0, 50.0)
    results = [
        sweep.Result(point, dataclasses.replace(figure, accuracy=accuracy))
        for point, accuracy in zip(points, accuracies, strict=True)
    ]
    assert [result.point.settings["epochs"] for result in sweep.ranked(results)] == ["2", "3", "1"]
    assert sweep.best(results) == {"epochs": "2"}
