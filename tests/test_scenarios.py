"""Which classes make which task."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, strategies

from soft_jax.config import Config
from soft_jax.data import scenarios
from soft_jax.data.scenarios import Scenario
from soft_jax.errors import UserError

TEN = tuple("abcdefghij")


def make(names=TEN, **settings):
    return scenarios.make(Config(**settings), names)


def test_an_equal_split_in_label_order_is_the_default():
    scenario = make(tasks=5)
    assert scenario.classes_by_task == ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
    assert scenario.is_default
    assert scenario.task_of_class.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert np.flatnonzero(scenario.class_mask(2)).tolist() == [4, 5]
    assert np.flatnonzero(scenario.seen_mask(1)).tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="tasks: 10 classes can't be divided into 3 equal tasks"):
        make(tasks=3)


def test_only_the_papers_rule_is_the_default():
    """Whatever the sizes: also where the classes can't be divided by the number of tasks."""
    assert not make(scenario="increments", increment=3).is_default
    assert not make(scenario="increments", initial_classes=6, increment=2).is_default
    assert make(scenario="increments", increment=5).is_default
    assert not Scenario(10, ((0, 1, 2), (3, 4))).is_default


def test_the_class_order_that_pilot_uses():
    """`np.random.seed(1993); np.random.permutation(100)` begins so."""
    names = tuple(map(str, range(100)))
    scenario = make(names, tasks=10, class_order_seed=1993)
    assert scenario.classes_by_task[0][:5] == (68, 56, 78, 8, 23)
    every = [c for classes in scenario.classes_by_task for c in classes]
    assert every == np.random.RandomState(1993).permutation(100).tolist()
    assert not scenario.is_default


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"increment": 3}, (3, 3, 3, 1)),
        ({"increment": 2, "initial_classes": 5}, (5, 2, 2, 1)),
        ({"increment": 5}, (5, 5)),
        ({"increment": 10}, (10,)),
    ],
)
def test_increments_leave_the_rest_to_the_last_task(settings, sizes):
    scenario = make(scenario="increments", **settings)
    assert tuple(map(len, scenario.classes_by_task)) == sizes
    assert sum(scenario.classes_by_task, ()) == tuple(range(10))


def test_a_first_task_larger_than_the_set_is_refused():
    """The message names the setting that is too large."""
    with pytest.raises(UserError, match="initial_classes: 11 is above the data set's 10 classes"):
        make(scenario="increments", initial_classes=11)
    with pytest.raises(UserError, match="increment: 12 is above the data set's 10 classes"):
        make(scenario="increments", increment=12)


def test_increments_take_a_seeded_order_too():
    scenario = make(scenario="increments", increment=4, class_order_seed=7)
    order = np.random.RandomState(7).permutation(10).tolist()
    assert [list(classes) for classes in scenario.classes_by_task] == [
        order[:4],
        order[4:8],
        order[8:],
    ]


def test_a_file_lists_any_classes_in_any_order(tmp_path):
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps([["j", "a"], [4], ["b", 2, 3]]))
    scenario = make(scenario="file", scenario_file=str(file))
    assert scenario.classes_by_task == ((9, 0), (4,), (1, 2, 3))
    assert scenario.task_of_class.tolist() == [0, 2, 2, 2, 1, -1, -1, -1, -1, 0]
    assert scenario.members(np.array([5, 9, 1, 0, 4]), 0).tolist() == [1, 3]
    assert not scenario.seen_mask(2)[5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[", "can't be read"),
        ('{"a": 1}', "holds no list of lists of classes"),
        ('[["a"], "b"]', "holds no list of lists of classes"),
        ('[["a"], ["zebra"]]', "names 'zebra', which is no class of the data set"),
        ("[[10]]", "names 10, which is no class"),
        ("[[true]]", "names True, which is no class"),
        ('[["a"], []]', "every task needs at least one class"),
        ("[]", "every task needs at least one class"),
        ('[["a"], ["b", 0]]', "class 0 stands twice; a class is in one task"),
    ],
)
def test_a_bad_file_is_one_error(tmp_path, text, message):
    file = tmp_path / "tasks.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"^scenario_file: {file}.*{re.escape(message)}"):
        make(scenario="file", scenario_file=str(file))


def test_a_file_that_is_nested_too_deeply_is_one_error(tmp_path):
    (tmp_path / "tasks.json").write_text("[" * 100_000)
    config = Config(scenario="file", scenario_file=str(tmp_path / "tasks.json"))
    with pytest.raises(UserError, match=r"scenario_file: .*tasks.json can't be read \(maximum rec"):
        scenarios.make(config, ("a",))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="scenario_file: .*none.json can't be read"):
        make(scenario="file", scenario_file=str(tmp_path / "none.json"))


def test_labels_have_to_fit():
    scenario = Scenario(4, ((0, 1), (3,)))
    scenario.check(np.array([0, 1, 2, 3]))
    with pytest.raises(UserError, match="labels run from 0 to 4, expected 0 to 3"):
        scenario.check(np.array([0, 4]))
    with pytest.raises(UserError, match=r"no images of the classes \[3\], which make task 2"):
        scenario.check(np.array([0, 1, 2]))


@given(
    labels=strategies.lists(strategies.integers(0, 5), min_size=1, max_size=200),
    share=strategies.floats(0, 0.99),
    seed=strategies.integers(0, 100),
)
def test_what_is_held_out(labels, share, seed):
    """A share of each class, never all of it, and the same when it is asked for again."""
    labels = np.array(labels)
    held = scenarios.hold_out(labels, share, seed)
    np.testing.assert_array_equal(held, scenarios.hold_out(labels, share, seed))
    for label in np.unique(labels):
        count, taken = (labels == label).sum(), held[labels == label].sum()
        assert taken == min(round(share * count), count - 1)


def test_another_seed_holds_out_others():
    labels = np.repeat(np.arange(3), 40)
    first, second = (scenarios.hold_out(labels, 0.25, seed) for seed in (1, 2))
    assert first.sum() == second.sum() == 30
    assert (first != second).any()
