import numpy as np
import pytest

from soft_jax.data.scenarios import equal
from soft_jax.errors import UserError
from soft_jax.evaluation import metrics
from soft_jax.evaluation.metrics import summarize


def test_summary_by_hand():
    matrix = np.array([[90, 80, 85], [0, 70, 60], [0, 0, 50]], float)
    assert summarize(matrix) == pytest.approx(
        {
            "final_average": (85 + 60 + 50) / 3,
            "forgetting": (5 + 10) / 2,
            "backward_transfer": (-5 - 10) / 2,
            "average_incremental": (90 + 75 + 65) / 3,
            "just_learned": (90 + 70 + 50) / 3,
        }
    )


def test_an_improvement_is_no_forgetting_but_a_transfer():
    figures = summarize(np.array([[50, 60], [0, 70]], float))
    assert figures["forgetting"] == 0
    assert figures["backward_transfer"] == 10


def test_one_task():
    figures = summarize(np.array([[42.0]]))
    assert figures["forgetting"] == figures["backward_transfer"] == 0
    assert figures["final_average"] == figures["just_learned"] == 42


@pytest.mark.parametrize("tasks", [2, 7, 8, 9, 40])
def test_figures_stage_by_stage_are_to_the_bit_those_of_the_whole_matrix(tasks, rng):
    """As one pass over the matrix gives them, which results were written by before."""
    accuracy = np.triu(100 * rng.integers(0, 181, (tasks, tasks)) / 180)
    count = np.arange(1, tasks + 1)
    before = np.triu(np.ones((tasks, tasks), bool), 1)
    best = np.maximum.accumulate(np.where(np.tri(tasks, k=-1), -np.inf, accuracy), axis=1)
    average = (np.where(before, accuracy, 0).sum(axis=0) + np.diag(accuracy)) / count
    older = np.maximum(count - 1, 1)
    moved = accuracy - np.diag(accuracy)[:, None]
    expected = {
        "final_average": average,
        "forgetting": np.where(before, best - accuracy, 0).sum(axis=0) / older,
        "backward_transfer": np.where(before, moved, 0).sum(axis=0) / older,
        "average_incremental": np.cumsum(average) / count,
        "just_learned": np.cumsum(np.diag(accuracy)) / count,
    }
    found = metrics.by_stage(metrics.columns_of(accuracy))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_a_stage_has_one_task_more_than_the_stage_before():
    running = metrics.RunningFigures()
    running.add(np.array([50.0]))
    with pytest.raises(ValueError, match=r"shape \(1,\), expected \(2,\)"):
        running.add(np.array([50.0]))


def test_scenario():
    scenario = equal(range(6), 6, 3)
    assert scenario.classes_of(1) == [2, 3]
    np.testing.assert_array_equal(scenario.members(np.array([3, 0, 2, 5]), 1), [0, 2])
    np.testing.assert_array_equal(scenario.class_mask(2), [False] * 4 + [True] * 2)
    scenario.check(np.arange(6))
    with pytest.raises(UserError, match=r"no images of the classes \[2, 3\], which make task 2"):
        scenario.check(np.array([0, 1, 4]))
    with pytest.raises(UserError, match="labels run from -1 to 5, expected 0 to 5"):
        scenario.check(np.arange(7) - 1)
    with pytest.raises(UserError, match="tasks: 10 classes can't be divided into 3 equal tasks"):
        equal(range(10), 10, 3)
