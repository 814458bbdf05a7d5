"""Merging tasks: the arithmetic, and a library in which one task takes the place of others."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soft_jax import distributed, pytrees
from soft_jax.__main__ import main
from soft_jax.config import DEFAULTS
from soft_jax.errors import UserError
from soft_jax.experiment import gate, imported, library_planning, loop, merged
from soft_jax.experiment.gate import Verdict
from soft_jax.experiment.library import Library
from soft_jax.inference import assembly, prototypes
from soft_jax.inference.predictor import Predictor
from soft_jax.methods import merging
from soft_jax.models import backbones
from soft_jax.store import checkpoint
from soft_jax.store.library import (
    ACTIVE,
    ARCHIVED,
    CANDIDATE,
    RETIRED,
    LibraryReader,
    LibraryState,
    Version,
)
from tests.conftest import TINY, found_instead, names, soft_masks, tiny_method
from tests.test_library import (
    OPEN_GATE,
    check_whole,
    damage,
    drawn,
    gate_of_paper,
    letters,
    logits_of,
    made,
    of,
    shape_of,
)

# The arithmetic.

RNG = np.random.default_rng(0)
MASKS = [
    {
        "a": {"kernel": RNG.normal(1, 0.1, (5, 4)).astype(np.float32)},
        "b": {"kernel": RNG.normal(1, 0.1, (2, 3)).astype(np.float32)},
    }
    for _ in range(3)
]
KEY = jax.random.key(0)


def entries(mask):
    """The entries of m − 1, one after the other."""
    return [float(x) - 1 for leaf in pytrees.flatten(mask).values() for x in np.ravel(leaf)]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5)])
def test_mean_and_ties_are_what_plain_loops_give(weights):
    rows = [entries(mask) for mask in MASKS]
    kept = []
    for row in rows:
        largest = sorted(map(abs, row), reverse=True)[: round(0.4 * len(row))]
        kept.append([x if abs(x) >= largest[-1] - 1e-9 else 0.0 for x in row])
    mean, ties = [], []
    for place in range(len(rows[0])):
        column = [row[place] for row in rows]
        mean.append(sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights))
        column = [row[place] for row in kept]
        positive = sum(w * x for w, x in zip(weights, column, strict=True)) > 0
        agree = [(w, x) for w, x in zip(weights, column, strict=True) if x and (x > 0) == positive]
        ties.append(sum(w * x for w, x in agree) / sum(w for w, _ in agree) if agree else 0.0)
    for method, expected in (("mean", mean), ("ties", ties)):
        found = merging.merge(MASKS, method, weights, 0.4, KEY)
        np.testing.assert_allclose(entries(found), expected, atol=1e-6)
    assert 0 < ties.count(0.0) < len(ties)


def test_dare_keeps_a_share_of_entries_and_the_mean():
    masks = [{"a": np.full((300, 200), 1 + change, np.float32)} for change in (0.1, -0.3)]
    dropped = merging.dropped({"a": masks[0]["a"] - 1}, 0.25, KEY)["a"]
    np.testing.assert_allclose(np.unique(dropped), [0, 0.4], atol=1e-6)
    assert abs((dropped > 0).mean() - 0.25) < 0.01
    found = merging.merge(masks, "dare", (1, 1), 0.25, KEY)["a"]
    np.testing.assert_allclose(np.unique(found), [0.4, 0.6, 1, 1.2], atol=1e-6)  # each by itself
    assert abs(found.mean() - 0.9) < 0.01
    again = merging.merge(masks, "dare", (1, 1), 0.25, KEY)["a"]
    np.testing.assert_array_equal(found, again)
    np.testing.assert_allclose(merging.merge(masks, "dare", (1, 1), 1.0, KEY)["a"], 0.9, atol=1e-6)


# Which versions are active.


def version_of(id_, *classes, state=ACTIVE, **fields):
    return Version(id=id_, number=1, state=state, classes=classes, created="", **fields)


def test_a_class_is_in_one_active_version_and_none_is_lost():
    parts = {"a": (version_of(0, 0, 1),), "b": (version_of(1, 2),), "c": (version_of(2, 3),)}
    begun = LibraryState(config={}, backbone_sha256="", classes=tuple("wxyz"), tasks=parts)
    ab = version_of(3, 0, 1, 2, state=CANDIDATE)
    two = begun.replaced("ab", ab).activated("ab", ab)
    assert set(two.active) == {"c", "ab"} and two.active["ab"].replaces == (0, 1)
    assert two.task_of_class(0) == "ab" and begun.task_of_class(0) == "a"
    abc = version_of(4, 0, 1, 2, 3, state=CANDIDATE)
    one = two.replaced("abc", abc).activated("abc", abc)
    assert set(one.active) == {"abc"} and one.active["abc"].replaces == (2, 3)
    assert set(one.activated("ab", one.version("ab")).active) == {"ab", "c"}
    assert set(one.activated("c", one.version("c")).active) == {"ab", "c"}
    back = one.activated("b", one.version("b"))  # through both merges
    assert set(back.active) == {"a", "b", "c"} and back.active["b"].replaces == ()
    learned_again = dataclasses.replace(version_of(5, 0, 1, 2), number=2, state=CANDIDATE)
    newer = two.replaced("ab", learned_again).activated("ab", learned_again)
    assert newer.active["ab"].replaces == (0, 1)
    gone = two.replaced("a", dataclasses.replace(two.version("a"), state=ARCHIVED))
    with pytest.raises(UserError, match="b@1 would take the place of ab@1, .* for 'w' any more"):
        gone.activated("b", gone.version("b"))


# A library.


@pytest.fixture(scope="module", autouse=True)
def _world(backbone):
    """Tasks are drawn when they are learned, and merged as they are."""
    tiny = backbones.Backbone("tiny", TINY, backbone, "0" * 64)
    with found_instead(tiny, letters):
        yield


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A library of three tasks, not to be changed."""
    root = tmp_path_factory.mktemp("three") / "library"
    with pytest.MonkeyPatch.context() as patch, gate_of_paper():
        patch.setattr(loop, "run", drawn)
        made(root)
    return root


@pytest.fixture(scope="module")
def both(three, tmp_path_factory):
    """The library after a merge of two of them, not to be changed."""
    root = tmp_path_factory.mktemp("both") / "library"
    shutil.copytree(three, root)
    words = ["t0", "t1", "--into=both", "--weights=3,1", "--max-drop=100"]
    assert main(["merge", str(root), *words]) == 0
    return root


def masks_of(root, name):
    reader = LibraryReader(root)
    state, backbone = reader.read(), backbones.load()
    version, config = state.version(name), library_planning.config_of(state)
    own = assembly.load_own(reader, state, name, version, config, backbone)
    return pytrees.flatten(own["mask"])


def stored(root, name, templates):
    """Arrays of a version as they are stored."""
    reader = LibraryReader(root)
    path = reader.path(reader.read().version(name))
    whole = distributed.replicated(distributed.data_mesh(jax.devices()[:1]))
    hashes = reader.load_manifest(path).sha256
    return jax.device_get(checkpoint.load_items(path, hashes, templates, whole, part=True))


def test_one_task_takes_the_place_of_two(three, both):
    state = check_whole(both)
    assert shape_of(state) == {
        "t0": {1: RETIRED},
        "t1": {1: RETIRED},
        "t2": {1: ACTIVE},
        "both": {1: ACTIVE},
    }
    version = state.version("both")
    assert version.classes == (0, 1, 2, 3) and version.test["images"] == 8
    assert [part["classes"] for part in version.data] == [["c00", "c01"], ["c02", "c03"]]
    assert version.origin == (
        "the masks of t0@1 (tasks/000), t1@1 (tasks/001), merged by mean, weights 3, 1"
    )
    assert state.figures["both"] == version.learned
    one, other, merged_ = (masks_of(both, name) for name in ("t0", "t1", "both"))
    for path, mask in merged_.items():
        np.testing.assert_allclose(mask, 0.75 * one[path] + 0.25 * other[path], atol=1e-6)
    # Other tasks answer the same to the bit; the merged one with its own four classes.
    before, after = logits_of(three), logits_of(both)
    np.testing.assert_array_equal(after[2], before[2])
    predictor = Predictor.load(both, task_id="oracle")
    images, labels = letters().test.images[:8], letters().test.labels[:8]
    answer = predictor.predict(images, task=predictor.task_names.index("both"))
    right = 100 * (answer.classes == labels).mean()
    assert right == version.learned["given"] and right > 50  # of four colours, by its classifier
    alone = Predictor.load(both).predict(letters().test.images[:12])
    assert {predictor.task_names[task] for task in alone.tasks} <= {"t2", "both"}


def test_what_finds_it_is_made_of_the_training_images_of_both(both):
    """The sums of the statistics are those of its parts, and the key is the images' mean."""
    model = Predictor.load(both).model
    train = letters().train
    images = jnp.asarray(train.images[:12] / 255, jnp.float32)
    query, labels = np.asarray(model.method.query(model.backbone, images)), train.labels[:12]
    projection = np.asarray(next(iter(model.solved.values())).projection)
    parts = [
        prototypes.statistics(
            query[labels // 2 == task], labels[labels // 2 == task], classes, projection
        )
        for task, classes in enumerate([(0, 1), (2, 3)])
    ]
    width = jax.ShapeDtypeStruct(query.shape[1:], np.float32)
    templates = {"statistics": prototypes.shapes(20, 4), "adapter": {"key": width}}
    items = stored(both, "both", templates)
    found = items["statistics"]
    np.testing.assert_allclose(found["gram"], parts[0]["gram"] + parts[1]["gram"], rtol=1e-4)
    for name in ("sums", "counts"):
        joined = np.concatenate([part[name] for part in parts])
        np.testing.assert_allclose(found[name], joined, rtol=1e-4, atol=1e-5)
    key = (query / np.linalg.norm(query, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(items["adapter"]["key"], key, atol=1e-5)


def test_the_parts_come_back(both, three, tmp_path, capsys):
    root = tmp_path / "library"
    shutil.copytree(both, root)
    with pytest.raises(UserError, match="'c00' is in task 'both' already"):
        Library(root).learn("t0", of(0, 1))
    assert main(["rollback", str(root), "both"]) == 0
    assert Library(root).log()[-1]["note"] == ""  # all were evaluated
    assert capsys.readouterr().out.endswith("t0@1 is active\nt1@1 is active\n")
    state = check_whole(root)
    assert set(state.active) == {"t0", "t1", "t2"}
    jax.tree.map(np.testing.assert_array_equal, logits_of(root), logits_of(three))
    assert Library(root).activate("both", 1, OPEN_GATE).passed
    assert set(Library(root).state().active) == {"t2", "both"}
    Library(root).archive("t0", 1)
    for act in (lambda: Library(root).rollback("both"), lambda: Library(root).activate("t1", 1)):
        with pytest.raises(UserError, match="nothing would answer for 'c00' any more"):
            act()


def test_the_gate_compares_with_the_mean_of_the_parts(three, tmp_path, monkeypatch):
    root = tmp_path / "library"
    shutil.copytree(three, root)
    opened, state = Library(root), LibraryReader(root).read()
    rows = [state.figures[name] for name in ("t0", "t1")]
    mean = {name: (rows[0][name] + rows[1][name]) / 2 for name in rows[0]}
    seen = []

    def judged(reader, tried, backbone, before, *_):
        seen.append((dict(before), set(tried.active)))
        return Verdict(before, ("it fell",), {})

    monkeypatch.setattr(gate, "evaluate", judged)
    monkeypatch.setattr(loop, "run", drawn)
    version, _ = opened.merge(["t0", "t1"], "both")
    opened.activate("both", 1)
    assert version.state == CANDIDATE
    for before, active in seen:
        assert before["both"] == mean and active == {"t2", "both"}
    assert set(check_whole(root).active) == {"t0", "t1", "t2"}


def test_what_can_not_be_merged_is_said(three, tmp_path, capsys):
    root = tmp_path / "library"
    shutil.copytree(three, root)
    opened = Library(root)
    for flag in ("--density", "--weights"):
        assert main(["merge", str(root), "t0", "t1", "--into=x", "--method=ties", f"{flag}="]) == 1
        assert f"{flag}: '' is not a number" in capsys.readouterr().err
    for tasks, into, options, message in (
        (["t0"], "x", {}, "name two or more tasks, each once"),
        (["t0", "t0@1"], "x", {}, "name two or more tasks, each once"),
        (["t0", "t9"], "x", {}, "there is no 't9'"),
        (["t0", "t1@2"], "x", {}, "there is no t1@2"),
        (["t0", "t1"], "t2", {}, "there is a task 't2' already"),
        (["t0", "t1"], "t1", {}, "there is a task 't1' already"),
        (["t0", "t1"], "a/b", {}, "'a/b' can't be one"),
        (["t0", "t1"], "x", {"method": "sum"}, "method: 'sum' is unknown; known are mean"),
        (["t0", "t1"], "x", {"weights": [1.0]}, "weights: 1; give a number above 0 for each"),
        (["t0", "t1"], "x", {"weights": [1.0, 0.0]}, "weights: 1, 0; give a number above 0"),
        (["t0", "t1"], "x", {"density": 0.5}, "density: the method 'mean' keeps all entries"),
        (["t0", "t1"], "x", {"method": "ties", "density": 0.0}, "density: 0 is no share"),
    ):
        with pytest.raises(UserError, match=message):
            opened.merge(tasks, into, **options)
    state = opened.state()
    other = version_of(9, 0, 5)
    overlapping = dataclasses.replace(state, tasks={**state.tasks, "o": (other,)})
    planned = ("mean", None, None)
    with pytest.raises(UserError, match="class 'c00' is in two of these versions"):
        merged.planned(overlapping, ["t0", "o"], "x", *planned)
    with pytest.raises(UserError, match="o@1 is active .* and 'c05' as well"):
        merged.planned(overlapping, ["t0", "t1"], "x", *planned)
    for method in ("lora", "wsn", "dualprompt+softtf"):
        config = {**DEFAULTS, **state.config, "method": method}
        with pytest.raises(
            UserError, match=f"method is '{method}', and only the masks".replace("+", r"\+")
        ):
            merged.planned(dataclasses.replace(state, config=config), ["t0", "t1"], "x", *planned)
    drawn_wide = {**state.config, "mask_init": "kaiming"}
    with pytest.raises(UserError, match="drawn as 'kaiming', far from 1"):
        merged.planned(dataclasses.replace(state, config=drawn_wide), ["t0", "t1"], "x", *planned)
    damage(root, state.version("t1"), "adapter")
    with pytest.raises(UserError, match="t1@1 is damaged"):
        opened.merge(["t0", "t1"], "x")
    opened.archive("t0")
    with pytest.raises(UserError, match="t0@1 is archived; restore it first"):
        opened.merge(["t0", "t1"], "x")
    assert set(opened.state().active) == {"t1", "t2"} and not list((root / "learning").iterdir())


def test_the_classifier_is_fitted_to_the_masks_that_are_stored(backbone, rng):
    """In one bit of a change, a mask is not quite what was merged."""
    masks = dataclasses.replace(soft_masks(), stored_as="delta1")
    method = tiny_method(reparametrization=masks, class_names=names(2))
    key, seen = jax.random.key(3), []
    adapter = jax.device_get(method.init_adapter(key, backbone))
    adapter["mask"] = jax.tree.map(
        lambda m: m + rng.normal(0, 0.1, m.shape).astype(m.dtype), adapter["mask"]
    )
    rows = np.arange(6)
    run = SimpleNamespace(
        method=method,
        params=backbone,
        mesh=distributed.data_mesh(),
        start=SimpleNamespace(shared={}),
        dataset=SimpleNamespace(train=SimpleNamespace(labels=np.array([0, 1] * 3))),
        members=lambda task: rows,
        train_query=lambda task: rng.normal(size=(6, TINY.dim)),
        adapter_key=lambda task: key,
        features=lambda rows, params: seen.append(params) or rng.normal(size=(6, TINY.dim)),
    )
    finished = imported.finish(run, adapter, method.init_shared(key, backbone))["adapter"]
    stored = method.unpack(method.pack(finished, key), backbone)
    of_stored, of_merged = (
        pytrees.flatten(method.weights(backbone, each)) for each in (stored, finished)
    )
    for path, kernel in pytrees.flatten(seen[0]).items():
        if path in of_stored:
            np.testing.assert_array_equal(kernel, of_stored[path])
            assert (np.asarray(kernel) != np.asarray(of_merged[path])).any()
