import numpy as np
import pytest

from soft_jax.data.scenarios import Scenario
from soft_jax.errors import UserError
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


def test_scenario():
    scenario = Scenario(classes=6, tasks=3)
    assert scenario.classes_of(1) == [2, 3]
    np.testing.assert_array_equal(scenario.members(np.array([3, 0, 2, 5]), 1), [0, 2])
    np.testing.assert_array_equal(scenario.class_mask(2), [False] * 4 + [True] * 2)
    scenario.check(np.arange(6))
    with pytest.raises(UserError, match=r"no images of the classes \[2, 3\], which make task 2"):
        scenario.check(np.array([0, 1, 4]))
    with pytest.raises(UserError, match="labels run from -1 to 5, expected 0 to 5"):
        scenario.check(np.arange(7) - 1)
    with pytest.raises(UserError, match="tasks: 10 classes can't be divided into 3 equal tasks"):
        Scenario(classes=10, tasks=3)
