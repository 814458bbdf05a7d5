"""Probabilities that hold: temperatures, the calibration error, and the tables of answers."""

import csv

import numpy as np
import pytest
import scipy.special

from soft_jax.errors import UserError
from soft_jax.evaluation import calibration, predictions
from soft_jax.inference import rules

CLASSES = 4


@pytest.fixture(scope="module")
def drawn():
    """Labels drawn from known probabilities, and their logs."""
    rng = np.random.default_rng(0)
    logs = scipy.special.log_softmax(rng.normal(0, 2, (4000, CLASSES)), axis=1)
    draw = rng.random((4000, 1)) < np.exp(logs).cumsum(axis=1)
    return logs, draw.argmax(axis=1)


@pytest.mark.parametrize("sharper", [0.25, 1.0, 3.0])
def test_the_temperature_undoes_what_made_answers_too_sure(drawn, sharper):
    logs, labels = drawn
    found = calibration.fit_temperature(sharper * logs, labels)
    assert found == pytest.approx(sharper, rel=0.06)
    back = rules.probabilities(sharper * logs, found)
    np.testing.assert_allclose(back, np.exp(logs), atol=0.03)


def test_images_whose_class_cannot_win_say_nothing_of_the_temperature(drawn):
    logs, labels = drawn
    barred = np.where(np.arange(CLASSES) == 3, -np.inf, logs)
    able = labels != 3
    assert calibration.fit_temperature(barred, labels) == pytest.approx(
        calibration.fit_temperature(barred[able], labels[able])
    )
    assert calibration.fit_temperature(barred[~able], labels[~able]) == 1


def test_the_calibration_error(drawn):
    """Near 0 for probabilities that are, and the share of wrong answers for those always sure."""
    logs, labels = drawn
    answer = logs.argmax(axis=1)
    sure = np.exp(logs[np.arange(len(labels)), answer])
    honest = calibration.count(sure, answer == labels)
    assert sum(honest["count"]) == len(labels)
    assert sum(honest["correct"]) == (answer == labels).sum()
    assert calibration.expected_error(honest) < 2.5
    boasting = calibration.count(np.ones(len(labels)), answer == labels)
    assert calibration.expected_error(boasting) == pytest.approx(100 * (answer != labels).mean())


@pytest.fixture
def some():
    return predictions.Predictions(
        index=np.array([4, 0, 7]),
        files=("a,b.png", "", ""),
        tasks=np.array([0, 0, 1]),
        truth=("cat", "dog", 'a "bird"'),
        answers={"per_sample/prompt_id": ("cat", "cat", "cat"), "oracle/task_given": ("dog",) * 3},
        probabilities={
            "per_sample/prompt_id": np.array([0.5, 0.25, 0.75]),
            "oracle/task_given": np.array([1.0, 0.5, 0.5]),
        },
    )


def test_answers_are_read_as_they_were_written(some, tmp_path):
    predictions.write(tmp_path, some, "per_sample/prompt_id")
    read = predictions.read(tmp_path)
    np.testing.assert_array_equal(read.index, some.index)
    np.testing.assert_array_equal(read.tasks, some.tasks)
    assert (read.files, read.truth, read.answers) == (some.files, some.truth, some.answers)
    for key, sure in some.probabilities.items():
        np.testing.assert_array_equal(read.probabilities[key], sure)


def test_mistakes_and_classes_are_listed(some, tmp_path):
    """The surest mistake first; each class's accuracy by protocol; tasks counted from 1."""
    predictions.write(tmp_path, some, "per_sample/prompt_id")
    rows = [
        list(csv.reader((tmp_path / name).read_text().splitlines()))
        for name in ("mistakes.csv", "classes.csv")
    ]
    assert rows[0][1:] == [
        ["7", "", "2", 'a "bird"', "cat", "0.750000"],
        ["0", "", "1", "dog", "cat", "0.250000"],
    ]
    assert rows[1] == [
        ["class", "task", "images", "per_sample/prompt_id", "oracle/task_given"],
        ["cat", "1", "1", "100.00", "0.00"],
        ["dog", "1", "1", "0.00", "100.00"],
        ['a "bird"', "2", "1", "0.00", "0.00"],
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "predictions.csv is not there"),
        (b"", "predictions.csv can't be read"),
        (b"\xff\n", "predictions.csv can't be read"),
        (b"index,file,task\n", "predictions.csv is not what a run wrote"),
        (b"index,file,task,class,a,a probability\n1,,1,cat,dog\n", "is not what a run wrote"),
        (b"index,file,task,class\nx,,1,cat\n", "predictions.csv: invalid literal"),
    ],
)
def test_a_table_of_answers_that_is_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / predictions.FILE).write_bytes(content)
    with pytest.raises(UserError, match=message):
        predictions.read(tmp_path)
