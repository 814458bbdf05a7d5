"""Two runs side by side: runs of four classes that are made up, and one that was trained."""

import dataclasses
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from soft_jax import __main__ as command_line
from soft_jax.config import Config
from soft_jax.errors import UserError
from soft_jax.evaluation import compare, predictions
from soft_jax.evaluation.predictions import Predictions
from soft_jax.experiment import settings as settings_lib
from soft_jax.store.records import RunRecord
from tests.manifests import manifest_of

PROMPT, VOTE = "per_sample/prompt_id", "batch_vote/prompt_id"
GIVEN, FROZEN = "oracle/task_given", "per_sample/frozen_features"
CLASSES = ("ant", "bee", "cat", "dog")
TRUTH = np.repeat(np.arange(4), 5)  # two tasks of two classes, of five test images each


def right(*wrong):
    """Which of the 20 test images are right, bool `[20]`: all but `wrong`."""
    return ~np.isin(np.arange(20), wrong)


def made_up(root, by_protocol, index=range(20), files=None, sha256="d", truth=TRUTH, **settings):
    """A finished run whose folder holds its predictions alone.

    `by_protocol` says which test images are right, `index` which are in the predictions.
    """
    config = Config(**{"dataset": "digits", "tasks": 2, **settings})
    used = settings_lib.used_settings(config)
    record = RunRecord(settings=used, backbone_sha256="b", dataset_sha256=sha256, tasks=None)

    def rows(correct, tasks):
        counts = (int(correct[10 * task :][:10].sum()) for task in range(tasks))
        return [
            {"correct": count, "total": 10, "task_correct": 5, "identified": {}} for count in counts
        ]

    manifests = [
        manifest_of(
            task=task,
            classes=(2 * task, 2 * task + 1),
            class_names=CLASSES[2 * task :][:2],
            num_classes=4,
            num_tasks=2,
            config=dataclasses.asdict(config),
            backbone={"name": "vit_ti8_32", "sha256": "b"},
            metrics={key: rows(correct, task + 1) for key, correct in by_protocol.items()},
            run=record,
        )
        for task in range(2)
    ]
    index = np.array(index)
    answers = {
        key: tuple(CLASSES[(truth[i] + (not correct[i])) % 4] for i in index)
        for key, correct in by_protocol.items()
    }
    table = Predictions(
        index=index,
        files=files or ("",) * len(index),
        tasks=truth[index] // 2,
        truth=tuple(CLASSES[label] for label in truth[index]),
        answers=answers,
        probabilities={key: np.full(len(index), 0.5) for key in by_protocol},
    )
    root.mkdir()
    predictions.write(root, table, next(iter(by_protocol)))
    return compare.FinishedRun(root, record, manifests)


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
    """Exit status and output of comparing two made-up runs, given as arguments of `made_up`."""

    def run(a, b):
        of_a, of_b = (made_up(tmp_path / name, **run) for name, run in (("a", a), ("b", b)))
        there = {of_a.root: of_a, of_b.root: of_b}
        monkeypatch.setattr(compare, "load", there.__getitem__)
        status = command_line.main(["compare", str(of_a.root), str(of_b.root)])
        return status, capsys.readouterr().out

    return run


def cells(text, after):
    """The cells of the table below a heading, its own heading first."""
    lines = text.split(f"## {after}")[1].split("\n## ")[0].splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in rows]


def test_settings_that_differ_are_listed_for_both(compared):
    a = {"by_protocol": {PROMPT: right()}, "epochs": 3}
    status, text = compared(a, a | {"epochs": 5, "learning_rate": 0.1})
    assert status == 0
    listed = text.split("## Settings that differ\n\n")[1].split("\n\n")[0]
    assert listed.splitlines() == [
        "- epochs: 3 in A, 5 in B",
        "- learning_rate: 0.03 in A, 0.1 in B",
    ]


def test_runs_of_equal_settings_differ_in_none(compared):
    a = {"by_protocol": {PROMPT: right()}}
    assert "## Settings that differ\n\n- none\n" in compared(a, a)[1]


def test_figures_stand_side_by_side_and_no_task_is_named_where_it_is_given(compared):
    a, b = {PROMPT: right(0, 1), GIVEN: right()}, {PROMPT: right(10), GIVEN: right(19)}
    _, text = compared({"by_protocol": a}, {"by_protocol": b})
    assert cells(text, "Figures")[1:] == [
        ["CIL per_sample, Prompt ID", "A", "90.00", "0.00", "50.00"],
        ["", "B", "95.00", "0.00", "50.00"],
        ["", "B−A", "+5.00", "+0.00", "+0.00"],
        ["TIL oracle, task given", "A", "100.00", "0.00", "–"],
        ["", "B", "95.00", "0.00", "–"],
        ["", "B−A", "-5.00", "+0.00", "–"],
    ]


def test_differences_are_told_by_task_counted_from_1(compared):
    a, b = {PROMPT: right(0, 1), VOTE: right()}, {PROMPT: right(10), VOTE: right()}
    _, text = compared({"by_protocol": a}, {"by_protocol": b})
    assert cells(text, "Final accuracy by task")[1:] == [
        ["1", "+20.0", "+0.0"],
        ["2", "-10.0", "+0.0"],
    ]
    assert "(1) CIL per_sample, Prompt ID; (2) CIL batch_vote, Prompt ID *." in text


def test_mcnemar_counts_the_images_that_one_run_alone_gets_right(compared):
    """Exactly: of 1 and 5, two-sided, 2 · (1 + 6) / 2⁶."""
    a, b = right(1, 2, 3, 4, 5, 9), right(9, 10)
    _, text = compared({"by_protocol": {PROMPT: a, VOTE: a}}, {"by_protocol": {PROMPT: b, VOTE: b}})
    assert "Of 20 images" in text
    assert cells(text, "McNemar")[1:] == [
        ["CIL per_sample, Prompt ID", "1", "5", f"{2 * 7 / 2**6:.4f}"],
        ["CIL batch_vote, Prompt ID *", "1", "5", "–"],  # a batch's images are no separate trials
    ]


def test_runs_that_get_the_same_images_right_do_not_differ():
    assert compare.Discordant(0, 0).p_value == 1.0
    assert compare.Discordant(0, 30).p_value == pytest.approx(2 / 2**30)


def test_images_are_matched_by_their_place_in_the_test_set(compared):
    """In whatever order the runs have them, and those alone that both have."""
    a = {"by_protocol": {PROMPT: right(3, 12)}, "index": range(4, 20)}
    b = {"by_protocol": {PROMPT: right(12, 7)}, "index": range(15, -1, -1)}
    _, text = compared(a, b)
    assert "Of 12 images" in text
    assert cells(text, "McNemar")[1][1:3] == ["1", "0"]


def test_frozen_features_stand_there_once_where_they_are_the_same(compared):
    a, b = {PROMPT: right(0), FROZEN: right(1)}, {PROMPT: right(), FROZEN: right(1)}
    _, text = compared({"by_protocol": a}, {"by_protocol": b})
    both = ["CIL per_sample, frozen features", "both", "95.00", "0.00", "50.00"]
    assert cells(text, "Figures")[-1] == both
    assert len(cells(text, "McNemar")) == 2
    assert len(cells(text, "Final accuracy by task")[0]) == 2


def test_a_protocol_that_one_run_alone_has_is_named(compared):
    a, b = {PROMPT: right(), GIVEN: right()}, {PROMPT: right()}
    _, text = compared({"by_protocol": a}, {"by_protocol": b})
    assert "Only A has TIL oracle, task given." in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sha256": "other"}, "the images differ, by their SHA-256"),
        ({"dataset": "cifar100"}, "the data sets differ: digits, cifar100"),
        ({"test_images_per_class": 5}, "test_images_per_class differs: 0, 5"),
        ({"truth": TRUTH[::-1]}, "images at the same place in the test set have other classes"),
        ({"files": tuple("abcdefghijklmnopqrst")}, "have other classes or files"),
        # It moves the hash too, which is of training and test images together.
        ({"sha256": "other", "train_images_per_class": 5}, None),
    ],
)
def test_other_images_are_not_tested_on_and_it_says_why(compared, changes, reason):
    a = {"by_protocol": {PROMPT: right()}}
    status, text = compared(a, a | changes)
    assert status == 0
    if reason:
        assert reason in text.split("Left out: ")[1]
    else:
        assert "Of 20 images" in text
    assert "## Figures after the last task" in text


def test_a_line_of_a_table_fits_80_columns(compared):
    keys = (PROMPT, "per_sample/gradient_id", "per_sample/prototype", VOTE, GIVEN)
    keys += ("batch_vote/gradient_id_7", FROZEN, "oracle/frozen_features")
    a = {"by_protocol": dict.fromkeys(keys, right())}
    _, text = compared(a, {"by_protocol": dict.fromkeys(keys, right(*range(20)))})
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 80


@pytest.fixture
def trained(tmp_path):
    """A run that an older version finished, which wrote no predictions."""
    with tarfile.open(Path(__file__).parent / "data/format_0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = (tmp_path / "tables").glob("*/*")
    return folder


def test_a_run_without_predictions_is_compared_but_for_its_images(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "copy")
    assert command_line.main(["compare", str(trained), str(tmp_path / "copy")]) == 0
    text = capsys.readouterr().out
    assert "- none" in text
    assert cells(text, "Figures")[3][1:4] == ["B−A", "+0.00", "+0.00"]
    assert "Left out: " in text
    assert "predictions.csv is not there" in text


def test_a_run_that_is_not_finished_is_refused(trained, capsys):
    shutil.rmtree(trained / "tasks/001")
    with pytest.raises(UserError, match="1 of 2 tasks are finished; compare it when all are"):
        compare.load(trained)
    assert command_line.main(["compare", str(trained), str(trained)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("path", ["nowhere", "gs://bucket/run"])
def test_what_is_no_run_is_one_line(path, capsys):
    assert command_line.main(["compare", path, path]) == 1
    assert capsys.readouterr().err.startswith("error: ")
