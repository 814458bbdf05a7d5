"""A library of tasks: what stays to the bit, what survives a kill, and what is refused.

Training is left out: a version is drawn at random in its place, and saved as a run saves it.
`test_library_commands` learns for real.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import zlib
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies

from soft_jax.__main__ import main
from soft_jax.config import Config
from soft_jax.data import sources
from soft_jax.errors import UserError
from soft_jax.experiment import gate, library_planning, loop, merged, transfer
from soft_jax.experiment import settings as settings_lib
from soft_jax.experiment.data_spec import Data
from soft_jax.experiment.gate import Gate, Verdict
from soft_jax.experiment.library import Library, kept_transfer
from soft_jax.experiment.run import Start, prepare
from soft_jax.inference import assembly, engine
from soft_jax.inference.predictor import Predictor
from soft_jax.methods.method import Method
from soft_jax.models import backbones
from soft_jax.store import archives, checkpoint, formats
from soft_jax.store.folder import Store
from soft_jax.store.library import (
    ACTIVE,
    ARCHIVED,
    CANDIDATE,
    RETIRED,
    LibraryFolder,
    LibraryReader,
    LibraryState,
    split_name,
)
from soft_jax.store.records import RunRecord
from tests.conftest import TINY, names, tiny_config
from tests.manifests import manifest_of

CLASSES = tuple(f"c{number:02d}" for number in range(60))
OPEN_GATE = Gate(100.0)
SETTINGS = {"batch_size": 8, "epochs": 1, "eval_batch_size": 16, "prototype_features": 20}
WITH_G_PROMPT = tiny_config(method="dualprompt+softtf", tasks=1, **SETTINGS)
WITHOUT = tiny_config(method="softtf", tasks=1, **SETTINGS)


def letters(seed: int = 0) -> sources.Dataset:
    """60 classes of 16 × 16 pixels, 3 images each to train on and 2 to test, a colour a class."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 200, (len(CLASSES), 1, 1, 3))

    def split(count):
        labels = np.repeat(np.arange(len(CLASSES), dtype=np.int32), count)
        noise = rng.integers(0, 56, (len(labels), 16, 16, 3))
        return sources.InMemoryImages((colours[labels] + noise).astype(np.uint8), labels)

    return sources.Dataset(split(3), split(2), CLASSES)


def drawn(config, workdir, console, dataset, hooks=None, figures=True, start=None):
    """Draw a task in the place of `loop.run`, from the folder's name, and save it as a run does."""
    with closing(Store(workdir)) as store:
        begin = start or Start()
        run = prepare(config, store, console, threading.Event(), None, dataset, hooks, begin)
        if store.finished():
            return [store.load_task_manifest(0)]
        rng = np.random.default_rng(zlib.crc32(Path(workdir).name.partition("-")[0].encode()))
        counts, features = np.bincount(dataset.train.labels), config.prototype_features

        def draw(like):
            return jax.numpy.asarray(rng.normal(1, 0.3, like.shape), like.dtype)

        shared = jax.eval_shape(run.method.init_shared, jax.random.key(0), run.params)
        phi = rng.normal(size=(len(counts), features)).astype(np.float32)
        statistics = {
            "gram": (phi.T @ (phi * counts[:, None]))[np.triu_indices(features)],
            "sums": phi * counts[:, None],
            "counts": counts.astype(np.int32),
        }
        items = {
            "adapter": jax.tree.map(draw, run.method.packed_shapes(run.params)),
            "shared": {**jax.tree.map(draw, shared), **begin.shared},
            "statistics": statistics,
        }
        items = jax.tree.map(jax.numpy.asarray, items)
        manifest = manifest_of(
            task=0,
            classes=tuple(range(len(dataset.class_names))),
            class_names=dataset.class_names,
            num_classes=len(dataset.class_names),
            num_tasks=1,
            config=dataclasses.asdict(run.config),
            backbone={},
            metrics={},
        )
        manifest = dataclasses.replace(manifest, seconds={"train": 1.0})
        store.save_task(0, items | {"memory": {}}, manifest)
        return [store.load_task_manifest(0)]


@pytest.fixture(scope="module", autouse=True)
def _world(backbone):
    """Libraries get the tiny backbone, the letters, and tasks that are drawn."""
    tiny = backbones.Backbone("tiny", TINY, backbone, "0" * 64)
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(backbones, "load", lambda *_: tiny)
        patch.setattr(sources, "load", lambda *_: letters())
        patch.setattr(loop, "run", drawn)
        yield


def of(*classes) -> Data:
    """The images of some letters, by number."""
    return Data("letters", classes=tuple(CLASSES[class_] for class_ in classes))


def made(root, config=WITHOUT, tasks=3, each=2) -> Library:
    """A library of tasks t0, t1, ..., of so many classes each."""
    opened = Library(root)
    for task in range(tasks):
        data = of(*range(task * each, (task + 1) * each))
        opened.learn(f"t{task}", data, config=config if task == 0 else None, gate=OPEN_GATE)
    return opened


@pytest.fixture
def paper():
    with gate_of_paper():
        yield


@contextlib.contextmanager
def gate_of_paper():
    """Evaluate nothing at the gate: every task has 50%, whatever is tried."""

    def evaluate(reader, state, *_):
        return Verdict({name: {"given": 50.0, "per_sample": 50.0} for name in state.active}, (), {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "evaluate", evaluate)
        yield


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A library of three tasks, not to be changed; t1 has an older version and a candidate."""
    root = tmp_path_factory.mktemp("three") / "library"
    opened = made(root)
    opened.learn("t1", of(2, 3), gate=OPEN_GATE)
    opened.learn("t1", of(2, 3), gate=Gate(100.0, 100.0))
    states = {v.number: v.state for v in opened.state().versions("t1")}
    assert states == {1: RETIRED, 2: ACTIVE, 3: CANDIDATE}
    return root


@pytest.fixture
def root(three, tmp_path):
    """A copy of it."""
    shutil.copytree(three, tmp_path / "library")
    return tmp_path / "library"


def shape_of(state: LibraryState) -> dict[str, dict[int, str]]:
    return {name: {v.number: v.state for v in found} for name, found in state.tasks.items()}


def digest(folder: Path) -> str:
    """Hash all files in a folder, with their names."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        found.update(str(file.relative_to(folder)).encode())
        found.update(file.read_bytes() if file.is_file() else b"")
    return found.hexdigest()


def check_whole(root: Path) -> LibraryState:
    """Check that all that a library's state names is there, and, after clearing up, no more; and
    that each record of the log goes on from the one before. Returns the state.
    """
    reader = LibraryReader(root)
    state = reader.read()
    versions = [v for found in state.tasks.values() for v in found]
    for version in versions:
        if version.state == ARCHIVED:
            raw = reader.archive(version).read_bytes()
            assert hashlib.sha256(raw).hexdigest() == version.archive_sha256
        else:
            reader.load_manifest(reader.path(version))
        if "kept_sha256" in version.test:
            reader.load_tests(version)
    if shared := reader.shared(state):
        reader.load_manifest(shared)
    records = reader.log(state)
    assert [record["number"] for record in records] == list(range(1, state.changes + 1))
    for one, other in itertools.pairwise(records):
        assert one["state_after"] == other["state_before"]
    if records:
        assert records[-1]["state_after"] == state.sha256
    with closing(LibraryFolder(root)):
        pass
    assert reader.read() == state
    there = {
        kind: {path.name for path in (root / kind).glob("*")}
        for kind in ("tasks", "archive", "tests", "log")
    }
    away = {f"{v.id:03d}" for v in versions if v.state == ARCHIVED}
    assert there["tasks"] == {f"{v.id:03d}" for v in versions} - away
    assert there["archive"] == {f"{number}.tar.xz" for number in away}
    assert there["tests"] == {f"{v.id:03d}.npz" for v in versions if "kept_sha256" in v.test}
    assert there["log"] == {f"{number:06d}.json" for number in range(1, state.changes + 1)}
    return state


# What stays to the bit.


def logits_of(root: Path) -> dict[int, np.ndarray]:
    """The logits of each active version for its test images and others, with the task given."""
    # As many images in a product as round otherwise when there are more classes beside them.
    one = jax.devices()[:1]
    predictor = Predictor.load(root, task_id="oracle", batch_size=128, devices=one)
    images, state, found = letters().test.images, LibraryReader(root).read(), {}
    model, batching = predictor.model, predictor.batching
    tokens, _ = engine.encode(model, images, batching, queried=False)
    for place, name in enumerate(predictor.task_names):
        rows = engine.logits(model, tokens, engine.alone(np.full(len(images), place)), batching)
        version = state.active[name]
        found[version.id] = rows[:, list(version.classes)]
    return found


def one_of(data, choices, what):
    return data.draw(strategies.sampled_from(sorted(choices)), label=what)


def change_at_random(data, opened: Library, free: list[int]) -> None:
    """Give one command, as it makes sense now."""
    state = opened.state()
    every = [(name, v.number, v.state) for name, found in state.tasks.items() for v in found]
    there = [(name, number) for name, number, state in every if state != ARCHIVED]
    away = [(name, number) for name, number, state in every if state == ARCHIVED]
    idle = [(name, number) for name, number, state in every if state in (RETIRED, CANDIDATE)]
    able = {"learn", "rename"} | ({"archive", "remove"} if len(there) > 1 else set())
    able |= {"again"} if state.tasks else set()
    able |= ({"restore"} if away else set()) | ({"activate"} if idle else set())
    able |= {"rollback"} if any(s == RETIRED for *_, s in every) else set()
    command = one_of(data, able, "command")
    gate = Gate(1.0, data.draw(strategies.sampled_from([0.0, 60.0])))
    if command == "learn":
        count = data.draw(strategies.integers(1, 5))
        classes = [free.pop(0) for _ in range(count)]
        opened.learn(f"n{classes[0]}", of(*classes), gate=gate)
    elif command == "again":
        name = one_of(data, state.tasks, "task")
        names = [state.classes[class_] for class_ in state.tasks[name][-1].classes]
        opened.learn(name, Data("letters", classes=tuple(names)), gate=gate)
    elif command == "rename":
        name = one_of(data, state.tasks, "task")
        opened.rename(name, f"{name}x")
    elif command == "rollback":
        with contextlib.suppress(UserError):  # the retired version may be a newer one
            opened.rollback(one_of(data, {n for n, _, s in every if s == RETIRED}, "task"))
    else:
        among = {"archive": there, "remove": there + away, "restore": away, "activate": idle}
        name, number = one_of(data, among[command], "version")
        if command == "activate":
            opened.activate(name, number, gate)
        else:
            getattr(opened, command)(name, number)


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """A library with a G-prompt, of 7 tasks and 28 classes: a few more are more than there is room
    for. Not to be changed; and the logits of its versions.
    """
    root = tmp_path_factory.mktemp("seven") / "library"
    with gate_of_paper():
        made(root, WITH_G_PROMPT, tasks=7, each=4)
    return root, logits_of(root)


@given(data=strategies.data())
@settings(
    max_examples=4,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_with_the_task_given_an_old_task_answers_the_same_to_the_bit(seven, tmp_path_factory, data):
    base, known = seven
    known, root = dict(known), tmp_path_factory.mktemp("history") / "library"
    shutil.copytree(base, root)
    opened, free, classes = Library(root), list(range(28, 60)), opened_classes(base)
    for _ in range(7):
        with gate_of_paper():
            change_at_random(data, opened, free)
        state = check_whole(root)
        assert state.classes[: len(classes)] == classes  # names keep their numbers
        classes = state.classes
        if state.active:
            for version, logits in logits_of(root).items():
                np.testing.assert_array_equal(known.setdefault(version, logits), logits)


def opened_classes(root):
    return LibraryReader(root).read().classes


@pytest.mark.usefixtures("paper")
def test_more_tasks_and_classes_than_there_was_room_for_change_no_bit(seven, tmp_path):
    """Nor does it when the first task, whose G-prompt serves all, is archived, or removed."""
    base, known = seven
    root = tmp_path / "library"
    shutil.copytree(base, root)
    opened = Library(root)
    assert Predictor.load(root, task_id="oracle").model.method.num_classes == 32
    opened.learn("more", of(*range(28, 40)), gate=OPEN_GATE)
    opened.learn("yet_more", of(40), gate=OPEN_GATE)
    predictor = Predictor.load(root, task_id="oracle")
    assert predictor.model.method.num_classes == 64
    assert len(predictor.model.rows["key"]) == 16
    known = known | logits_of(root)
    for name in opened.state().tasks:
        opened.archive(name)
    opened.remove("t1")
    opened.learn("last", of(50))  # when no other is there that has the G-prompt
    known = known | logits_of(root)
    for name in [name for name in opened.state().tasks if name != "last"]:
        opened.restore(name)
        opened.activate(name, 1, OPEN_GATE)
    check_whole(root)
    assert not list((root / "shared").iterdir())
    assert_bits(root, known)
    opened.remove("t0")
    assert (root / "shared/000").is_dir()
    assert_bits(root, known)
    for name in opened.state().tasks:
        opened.remove(name)
    assert check_whole(root).shared_from is None
    assert not list((root / "shared").iterdir())


def assert_bits(root, known):
    for version, logits in logits_of(root).items():
        np.testing.assert_array_equal(known[version], logits)


def test_an_archived_version_comes_back_to_the_bit_and_as_what_it_was(root):
    opened = Library(root)
    before, folder = opened.state(), LibraryReader(root)
    digests = {v.id: digest(folder.path(v)) for v in before.tasks["t1"]}
    for number in (1, 2, 3):
        opened.archive("t1", number)
    state = check_whole(root)
    assert shape_of(state)["t1"] == {1: ARCHIVED, 2: ARCHIVED, 3: ARCHIVED}
    for version in state.tasks["t1"]:
        assert folder.size(version) == folder.archive(version).stat().st_size < version.bytes
    with pytest.raises(UserError, match="t1@2 is archived; restore it first"):
        opened.activate("t1", 2)
    nothing = "rollback: t1 has no version that was active and is not archived; soft-jax restore "
    with pytest.raises(UserError, match=f"{nothing}.* t1@3 unpacks one that is archived"):
        opened.rollback("t1")
    for _ in range(3):
        opened.restore("t1")
    # The active one is active again when it is made so; what never passed the gate has not.
    after = check_whole(root)
    assert shape_of(after)["t1"] == {1: RETIRED, 2: RETIRED, 3: CANDIDATE}
    assert {v.id: digest(folder.path(v)) for v in after.tasks["t1"]} == digests
    back, _ = opened.rollback("t1")
    assert back.number == 2 and back == opened.state().active["t1"]


@pytest.mark.parametrize("rows", [1, 16, 128])
def test_a_class_has_the_same_logits_to_the_bit_beside_any_number_of_classes(rows):
    """Left as it is, the product rounds otherwise from some number of images and classes on."""
    rng = np.random.default_rng(0)
    architecture = dataclasses.replace(TINY, dim=192)
    features = rng.normal(size=(rows, 192)).astype(np.float32)
    head = {
        "kernel": rng.normal(size=(192, 256)).astype(np.float32),
        "bias": rng.normal(size=256).astype(np.float32),
    }

    def logits(kind, count):
        method = kind(architecture, names(count))
        shared = {"head": {name: array[..., :count] for name, array in head.items()}}
        return np.asarray(jax.jit(method.head)({}, shared, features))

    few = logits(assembly.LibraryMethod, 32)
    np.testing.assert_allclose(few, logits(Method, 32), rtol=1e-4, atol=1e-4)
    for count in (64, 256):
        np.testing.assert_array_equal(logits(assembly.LibraryMethod, count)[:, :32], few)


# Predictors that are open.


@contextlib.contextmanager
def compilations():
    """Yield a list that gets an entry for every program that is compiled."""
    found: list[str] = []

    def note(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize("task_id", ["prototype", "prompt", "oracle"])
def test_refresh_takes_in_what_came_and_compiles_nothing(three, tmp_path, task_id):
    root = tmp_path / "library"
    shutil.copytree(three, root)
    opened, images = Library(root), letters().test.images
    predictor = Predictor.load(root, task_id=task_id, batch_size=12)
    predictor.warm_up()
    asked = {"task": 1} if task_id == "oracle" else {}
    before = predictor.predict(images[:30], **asked)
    opened.learn("t3", of(6, 7, 8, 9, 10, 11), gate=OPEN_GATE)
    opened.rollback("t1")
    opened.archive("t0")
    still = predictor.predict(images[:30], **asked)
    jax.tree.map(np.testing.assert_array_equal, still, before)
    other = Predictor.load(root, task_id=task_id, batch_size=12).predict(images[:30], **asked)
    with compilations() as compiled:
        predictor.refresh()
        now = predictor.predict(images[:30], **asked)
    assert not compiled
    assert predictor.task_names == ("t1", "t2", "t3")
    jax.tree.map(np.testing.assert_array_equal, now, other)


def old_archive(folder: Path, file: Path) -> None:
    """Write an archive as releases before format 5 of a library did."""
    with tarfile.open(file, "w:xz") as archive:
        for path in sorted(folder.rglob("*")):
            archive.add(path, path.relative_to(folder.parent).as_posix(), recursive=False)


def test_an_archive_takes_no_space_for_what_masks_have_in_common(tmp_path, rng):
    """Of the 32 bits of a fresh mask's entries, 17.4 are random."""
    masks = {name: rng.uniform(0.99, 1, (300, 200)).astype(np.float32) for name in "ab"}
    others = {
        "zero": np.zeros(5, np.float32),
        "one": np.float32(1),
        "codes": rng.integers(0, 9, 999).astype(np.int8),
        "half": rng.normal(size=(7, 3)).astype(np.float16),
    }
    folder = tmp_path / "007"
    checkpoint.save(folder, {"adapter": jax.tree.map(jax.numpy.asarray, masks | others)}, {})
    for pack in (archives.pack, old_archive):
        pack(folder, tmp_path / pack.__name__)
        back = tmp_path / f"{pack.__name__}d"
        archives.unpack((tmp_path / pack.__name__).read_bytes(), back)
        assert digest(back) == digest(folder)
    with tarfile.open(tmp_path / "pack") as archive:
        regrouped = [Path(name).parent.name for name in archive.getnames() if "planes" in name]
    assert set(regrouped) == masks.keys() | others.keys()
    new, old = ((tmp_path / name).stat().st_size / 480_000 for name in ("pack", "old_archive"))
    assert new < 0.58 and old > 0.7
    # Files that would not be written so again stay as they are.
    damaged = folder / "adapter/a/.zarray"
    damaged.write_text(damaged.read_text() + " ")
    archives.pack(folder, tmp_path / "pack")
    archives.unpack((tmp_path / "pack").read_bytes(), tmp_path / "again")
    assert digest(tmp_path / "again") == digest(folder)


def with_archive(root: Path, version: int, raw: bytes) -> None:
    """Put an archive in the place of a version's, as a library of format 4 has it."""
    (root / f"archive/{version:03d}.tar.xz").write_bytes(raw)
    state = json.loads((root / "library.json").read_text())
    for found in state["tasks"].values():
        for entry in found:
            if entry["id"] == version:
                entry["archive_sha256"] = hashlib.sha256(raw).hexdigest()
    (root / "library.json").write_text(json.dumps(state | {"format": 4}))


def test_an_archive_of_a_release_before_is_restored_unless_it_was_damaged(root, tmp_path):
    opened, reader = Library(root), LibraryReader(root)
    t0, t2 = (opened.state().active[name] for name in ("t0", "t2"))
    before = digest(reader.path(t0))
    old_archive(reader.path(t0), tmp_path / "t0")
    opened.archive("t0")
    with_archive(root, t0.id, (tmp_path / "t0").read_bytes())
    opened.restore("t0")
    assert digest(reader.path(t0)) == before
    damage(root, t2, "adapter")
    old_archive(reader.path(t2), tmp_path / "t2")
    damage(root, t2, "adapter")  # the same bit: it is whole again
    opened.archive("t2")
    with_archive(root, t2.id, (tmp_path / "t2").read_bytes())
    with pytest.raises(UserError, match=r"002.tar.xz holds is damaged \(.*array adapter/"):
        opened.restore("t2")
    assert shape_of(reader.read())["t2"] == {1: ARCHIVED}
    assert {path.name for path in (root / "tasks").iterdir()} == {"000", "001", "003", "004"}
    opened.remove("t2")
    assert not list((root / "archive").iterdir())


def test_a_call_that_has_begun_goes_on_with_what_it_began_with(root):
    predictor = Predictor.load(root, batch_size=4)
    images = np.concatenate([letters().test.images[:12]] * 4)
    whole = predictor.predict(images)
    chunks = predictor.predict_chunks(images)
    found = [next(chunks)[1]]
    Library(root).archive("t0")
    predictor.refresh()
    found += [prediction for _, prediction, _ in chunks]
    assert len(found) > 1
    np.testing.assert_array_equal(np.concatenate([part.tasks for part in found]), whole.tasks)
    assert set(predictor.predict(images).tasks) <= {0, 1}


def test_what_an_open_predictor_can_not_read_any_more_is_said(root):
    images = letters().test.images[:4]
    predictor = Predictor.load(root, task_id="oracle", batch_size=4)
    known = predictor.predict(images, task=0)
    of_one = Predictor.load(root, task_id="oracle", batch_size=4, cache_bytes=0)
    for task in (0, 1):
        of_one.predict(images, task=task)
    for name in ("t0", "t2"):
        Library(root).remove(name)
    (root / "tasks/002").mkdir()  # as while it is removed
    again = predictor.predict(images, task=0)  # it has the weights
    jax.tree.map(np.testing.assert_array_equal, again, known)
    with pytest.raises(UserError, match=r"t2@1 was archived or removed .* call refresh\(\)"):
        predictor.predict(images, task=2)
    with pytest.raises(UserError, match=r"t0@1 was archived or removed .* call refresh\(\)"):
        of_one.predict(images, task=0)
    predictor.refresh()
    assert predictor.task_names == ("t1",)
    Library(root).remove("t1")
    with pytest.raises(UserError, match="has no active task"):
        predictor.refresh()
    assert predictor.task_names == ("t1",)


def test_only_a_library_can_be_refreshed(root):
    predictor = Predictor.load(root)
    predictor._reload = None
    with pytest.raises(UserError, match="only the predictor of a library"):
        predictor.refresh()


def test_a_library_that_changes_while_it_is_read_is_read_again(root, monkeypatch):
    load_manifest, opened = LibraryReader.load_manifest, Library(root)

    def archive_first(reader, path):
        monkeypatch.setattr(LibraryReader, "load_manifest", load_manifest)
        opened.archive("t0")
        return load_manifest(reader, path)

    monkeypatch.setattr(LibraryReader, "load_manifest", archive_first)
    assert Predictor.load(root).task_names == ("t1", "t2")


# The gate.


def test_check_looks_again_where_another_command_came_between(root, monkeypatch):
    opened, seen = Library(root), []

    def evaluate(reader, state, *_):
        seen.append(set(state.active))
        if len(seen) == 1:
            opened.archive("t0")
        if len(seen) == 2:
            opened.archive("t1")
            raise UserError("t1@2 was archived")
        return Verdict({}, (), {name: "it is damaged" for name in {"t0"} & state.active.keys()})

    monkeypatch.setattr(gate, "evaluate", evaluate)
    assert opened.check().passed
    assert seen == [{"t0", "t1", "t2"}, {"t1", "t2"}, {"t2"}]


def test_a_version_that_lets_another_fall_stays_a_candidate(root, monkeypatch):
    opened = Library(root)
    before = opened.state().figures
    accuracies = gate.accuracies

    def lower(predictor, images, labels, place):
        found, given = accuracies(predictor, images, labels, place)
        return found | ({"given": before["t0"]["given"] - 2.0} if place == 0 else {}), given

    monkeypatch.setattr(gate, "accuracies", lower)
    version, verdict = opened.learn("t3", of(6, 7), gate=Gate(1.9))
    assert version.state == CANDIDATE and "t3" not in opened.state().active
    assert verdict.fallen[0].startswith("t0: with the task given ")
    assert verdict.fallen[0].endswith("2.00 points lower")
    assert version.gate["fallen"] == list(verdict.fallen)
    assert opened.log()[-1]["note"] == "; ".join(verdict.fallen)
    assert opened.state().figures == before
    assert not opened.check(1.9).passed
    assert opened.activate("t3", 1, Gate(1.9)).fallen
    monkeypatch.setattr(gate, "MEASURED", ("given",))  # the others fall by themselves
    assert opened.activate("t3", 1, Gate(2.0)).passed
    assert opened.state().figures["t0"]["given"] == before["t0"]["given"] - 2.0
    with pytest.raises(UserError, match="t3@1 is the active one already"):
        opened.activate("t3", 1)


def test_a_version_below_the_least_accuracy_stays_a_candidate(root):
    figures = Library(root).state().figures["t1"]["given"]
    version, verdict = Library(root).learn("t3", of(6, 7), gate=Gate(100.0, 100.0))
    own = version.learned["given"]
    assert own < 100 and version.state == CANDIDATE
    assert verdict.fallen == (f"t3: {own:.2f}% with the task given is below 100%",)
    assert Library(root).state().figures["t1"]["given"] == figures


@pytest.mark.parametrize("bad", [{"max_drop": -1}, {"max_drop": 101}, {"min_accuracy": 100.5}])
def test_a_gate_is_in_percent(bad):
    with pytest.raises(UserError, match="from 0 to 100"):
        Gate(**bad)


def test_test_images_that_changed_are_said_and_their_figures_stay(root, monkeypatch):
    opened = Library(root)
    opened.learn("t3", of(6, 7), gate=OPEN_GATE, keep_test_images=True)
    figures = opened.state().figures
    assert opened.check().passed
    monkeypatch.setattr(sources, "load", lambda *_: letters(seed=1))
    verdict = opened.check()
    assert not verdict.passed and not verdict.fallen
    assert set(verdict.unchecked) == {"t0", "t1", "t2"}
    assert "letters are others than it was learned with" in verdict.unchecked["t0"]
    assert verdict.figures.keys() == {"t3"}  # its images are kept in the library
    verdict = opened.activate("t1", 1)
    assert "t1" in verdict.unchecked
    state = opened.state()
    assert state.figures == {name: row for name, row in figures.items() if name != "t1"}
    assert state.active["t1"].number == 1 and "t0: not checked" in opened.log()[-1]["note"]
    monkeypatch.undo()
    verdict = opened.check()  # and of a version that was never evaluated
    assert verdict.unchecked == {"t1": "there are no figures of it to compare with"}


def test_test_images_that_are_gone_are_said(root, monkeypatch):
    def gone(*_):
        raise UserError("dataset: it is not there")

    monkeypatch.setattr(sources, "load", gone)
    verdict = Library(root).check()
    assert verdict.unchecked == dict.fromkeys(("t0", "t1", "t2"), "dataset: it is not there")
    verdict = Library(root).activate("t1", 3, Gate(1.0, 50.0))
    assert verdict.fallen == ("t1: it could not be evaluated, which is below 50%",)


def test_images_that_were_moved_are_found_where_one_says(root, tmp_path, monkeypatch, capsys):
    """Where they are the same, by the hashes of the test images."""

    def load(name, data_dir="", *_):
        if data_dir and not Path(data_dir).is_dir():
            raise UserError(f"data_dir: there is no {data_dir}")
        return letters(int((Path(data_dir) / "seed").read_text()) if data_dir else 0)

    monkeypatch.setattr(sources, "load", load)
    here, there, other = (tmp_path / name for name in ("here", "there", "other"))
    for folder, seed in ((here, "3"), (other, "4")):
        folder.mkdir()
        (folder / "seed").write_text(seed)
    opened = Library(root)

    def photos(*classes):
        return dataclasses.replace(of(*classes), data_dir=str(here))

    opened.learn("t3", photos(6, 7), gate=OPEN_GATE, keep_test_images=True)
    opened.learn("t4", photos(8, 9), gate=OPEN_GATE)
    opened.archive("t3")
    opened.learn("t0", photos(10), extend=True, gate=OPEN_GATE)  # of two places
    here.rename(there)
    assert opened.check(100.0).unchecked.keys() == {"t0", "t4"}
    before = opened.state()
    for words, message in (
        ([here, other], "t0@2: its test images in .*letters are others than .* Nothing is changed"),
        ([here, other, "--task=t4"], "t4@1: its test images .* Nothing is changed"),
        ([here, tmp_path / "gone"], "TO: there is no folder "),
        ([other, there], "FROM: .*other is not where images were; they were in letters"),
        ([here, there, "--task=t1"], "FROM: .*here is not where images were; they were in letters"),
        ([here, there, "--task=t9"], "there is no 't9' in this library"),
        (["", there], "FROM:  is not where images were"),
    ):
        assert main(["move-data", str(root), *map(str, words)]) == 1
        assert re.match(f"error: .*{message}", capsys.readouterr().err)
    assert opened.state() == before
    monkeypatch.chdir(tmp_path)
    assert main(["move-data", str(root), "here", "there", "--task=t4"]) == 0
    assert capsys.readouterr().out == "The images of t4@1 are in there now\n"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["move-data", str(root), "~/here", str(there)]) == 0
    assert "The images of t0@2, t3@1 are in " in capsys.readouterr().out
    assert opened.log()[-1]["note"] == "t0@2, t3@1"
    check_whole(root)
    assert opened.check(100.0).passed
    opened.restore("t3")
    for name in ("t3", "t4", "t0"):
        parts = opened.state().version(name).data
        assert [part["data_dir"] for part in parts if part["data_dir"]] == [str(there)]
    opened.learn("t4", of(11), extend=True)  # its older images are read from there


def test_kept_test_images_that_are_damaged_are_said(root):
    opened = Library(root)
    version, _ = opened.learn("t3", of(6, 7), gate=OPEN_GATE, keep_test_images=True)
    file = LibraryReader(root).tests(version)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    assert "is not what was kept" in opened.check().unchecked["t3"]
    file.unlink()
    assert "can't be read" in opened.check().unchecked["t3"]


def damage(root: Path, version, item: str) -> None:
    """Change a byte of the largest array of an item."""
    files = [
        file for file in (root / f"tasks/{version.id:03d}/{item}").rglob("0*") if file.is_file()
    ]
    file = max(files, key=lambda file: file.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def test_a_version_of_a_newer_release_is_not_called_damaged(root):
    opened = Library(root)
    file = LibraryReader(root).path(opened.state().active["t1"]) / "manifest/metadata"
    data = json.loads(file.read_text())
    del data["manifest_sha256"]
    data |= {"format": 99, "written_by": "9.1"}
    file.write_text(json.dumps(data | {"manifest_sha256": checkpoint._digest(data)}))
    newer = "t1@2 is of a newer release: .*written by soft_jax 9.1.*: upgrade this program, or"
    why = opened.check().unchecked["t1"]
    assert re.match(f"{newer} go back .* or predict without it, with --tasks=t0,t2", why)
    assert "damaged" not in why
    for act in (lambda: Predictor.load(root), lambda: opened.archive("t1")):
        with pytest.raises(UserError, match=newer):
            act()


@pytest.mark.parametrize("item", ["adapter", "shared", "statistics", "manifest"])
def test_a_damaged_version_is_named_and_the_others_go_on(root, item):
    opened, images = Library(root), letters().test.images[:12]
    state = opened.state()
    others = Predictor.load(root, ["t0", "t2"]).predict(images)
    if item == "manifest":
        (root / f"tasks/{state.active['t1'].id:03d}/manifest/metadata").write_text("{}")
    else:
        damage(root, state.active["t1"], item)
    with pytest.raises(UserError, match="t1@2 is damaged .*rollback .* t1, or .*--tasks=t0,t2"):
        Predictor.load(root).predict(images, task=[0] * 4 + [1] * 4 + [2] * 4)
    jax.tree.map(
        np.testing.assert_array_equal, Predictor.load(root, ["t0", "t2"]).predict(images), others
    )
    verdict = opened.check()
    assert set(verdict.unchecked) == {"t1"} and "t1@2 is damaged" in verdict.unchecked["t1"]
    assert set(verdict.figures) == {"t0", "t2"}
    with pytest.raises(UserError, match="t1@2 is damaged"):  # packed, nobody would see it
        opened.archive("t1")
    version, verdict = opened.rollback("t1")
    assert version.number == 1 and not verdict.unchecked
    Predictor.load(root).predict(images)
    with pytest.raises(UserError, match="t1@2 is damaged"):
        opened.activate("t1", 2)
    opened.remove("t1", 2)
    assert opened.check().passed


def test_the_state_is_a_hash_of_the_manifests(root):
    """So whole versions can't change places; the hashes of their arrays are all as they were."""
    opened, reader = Library(root), LibraryReader(root)
    for version in opened.state().active.values():
        raw = (reader.path(version) / "manifest/metadata").read_bytes()
        assert version.manifest_sha256 == hashlib.sha256(raw).hexdigest()
    shutil.rmtree(root / "tasks/000")
    shutil.copytree(root / "tasks/001", root / "tasks/000")
    verdict = opened.check(100.0)
    assert set(verdict.unchecked) == {"t0"}
    assert "t0@1 is damaged" in verdict.unchecked["t0"]
    assert "another than the library took in" in verdict.unchecked["t0"]


def test_a_version_whose_files_are_gone_can_be_removed(root):
    """Also the first of a library, of which others may need what all share."""
    shutil.rmtree(root / "tasks/000")
    opened = Library(root)
    with pytest.raises(UserError, match="t0@1 is damaged"):
        opened.archive("t0")
    opened.remove("t0")
    assert set(opened.check().figures) == {"t1", "t2"}
    assert opened.learn("t3", of(6), gate=OPEN_GATE)[0].state == ACTIVE


def test_another_backbone_is_refused(root, monkeypatch, backbone):
    other = backbones.Backbone("tiny", TINY, backbone, "1" * 64)
    monkeypatch.setattr(backbones, "load", lambda *_: other)
    for act in (
        lambda: Library(root).learn("t3", of(6, 7)),
        Library(root).check,
        lambda: Predictor.load(root),
    ):
        with pytest.raises(UserError, match=f"backbone: the file found has SHA-256 {'1' * 64}"):
            act()


# Names, classes and folders.


@pytest.mark.parametrize(
    "name", ["", "a/b", "../x", ".", "..", "a b", "-x", "_x", ".x", "a@b", "best", "all", "none",
             "frozen", "a\n", "x" * 65, "\U0001d4d0" * 33, "\udcff", "a\0"]
)  # fmt: skip
def test_names_that_can_not_be(root, name):
    with pytest.raises(UserError, match="task name: "):
        Library(root).learn(name, of(6, 7))
    with pytest.raises(UserError, match="task name: "):
        Library(root).rename("t0", name)


@pytest.mark.parametrize("name", ["birds", "1", "Vögel", "鳥", "a.b-c_d", "x" * 64])
def test_names_that_can(root, name):
    Library(root).rename("t0", name)
    assert list(check_whole(root).tasks) == [name, "t1", "t2"]
    assert Predictor.load(root).task_names[0] == name
    assert split_name(f"{name}@12") == (name, 12)


@pytest.mark.parametrize("text", ["t@", "t@0", "t@-1", "t@x", "t@1@2", "t@1234567890"])
def test_versions_that_can_not_be(text):
    with pytest.raises(UserError, match="version: .* write a task's version as t@2"):
        split_name(text)


def test_a_class_is_in_one_task(root):
    opened = Library(root)
    changes = opened.state().changes
    for name, data, extend, message in (
        ("t3", of(5, 6), False, "classes: 'c05' is in task 't2' already"),
        ("t0", of(0, 1, 2), True, "classes: 'c02' is in task 't1' already"),
        ("t0", of(0), False, "a new version of t0 has the same classes, and 'c01' is in one"),
        ("t0", of(0, 1, 6), False, "'c06' is in one of the two only; take another"),
        ("t0", of(0, 1), True, "extend: t0 has all of these classes already"),
        ("t0", of(0, 6), True, "extend: of the older classes of t0, the data has only some"),
        ("t3", of(6), True, "extend: there is no task 't3'"),
        ("t3", Data("letters", classes=("x",)), False, "letters has no class 'x'; it has c00, c01"),
    ):
        with pytest.raises(UserError, match=message):
            opened.learn(name, data, extend=extend)
    assert opened.state().changes == changes
    opened.remove("t2")  # and then its classes are free, and keep their numbers
    version, _ = opened.learn("t3", of(6, 5), gate=OPEN_GATE)
    assert version.classes == (6, 5)
    assert opened.state().classes == CLASSES[:7]


@pytest.mark.parametrize("given", [(6, 7), (0, 1, 6, 7), (7, 1, 6, 0)])
def test_extend_makes_a_version_with_more_classes(root, given):
    """Whether the data has the older classes too, or they are read from where they were."""
    opened = Library(root)
    version, _ = opened.learn("t0", of(*given), extend=True, gate=OPEN_GATE)
    assert version.number == 2 and version.classes[:2] == (0, 1)
    assert set(version.classes[2:]) == {6, 7}
    assert version.test["images"] == 8
    assert opened.check().passed
    assert opened.rollback("t0")[0].classes == (0, 1)


def test_an_extension_that_was_held_back_binds_nobody(root):
    """The active version says which classes a task has, not a newer candidate or a retired one."""
    opened, none = Library(root), Gate(100.0, 100.0)
    held, _ = opened.learn("t0", of(6), extend=True, gate=none)
    again, _ = opened.learn("t0", of(6), extend=True, gate=OPEN_GATE)
    assert (held.state, again.state) == (CANDIDATE, ACTIVE)
    assert held.classes == again.classes == (0, 1, 6)
    opened.rollback("t0")
    assert opened.learn("t0", of(0, 1), gate=OPEN_GATE)[0].classes == (0, 1)
    check_whole(root)


def test_a_task_of_one_class(root):
    opened = Library(root)
    version, _ = opened.learn("one", of(9), gate=OPEN_GATE)
    assert version.learned["given"] == 100
    assert opened.check().passed


def test_start_from(root, monkeypatch):
    opened, begun = Library(root), []

    def note(*args, start, **others):
        begun.append(start)
        return drawn(*args, start=start, **others)

    monkeypatch.setattr(loop, "run", note)
    opened.learn("t3", of(6, 7), start_from="t1@1", gate=OPEN_GATE)
    opened.learn("t4", of(8, 9), gate=OPEN_GATE)
    assert begun[0].adapter["mask"] and "key" not in begun[0].adapter and not begun[1].adapter
    reader, state = LibraryReader(root), opened.state()
    folder = reader.path(state.version("t1", 1)) / "adapter"
    names = {path.name for path in folder.iterdir() if path.name.startswith("mask.")}
    flat, _ = jax.tree_util.tree_flatten_with_path(begun[0].adapter)
    assert {jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in flat} == names
    opened.archive("t1", 1)
    for start_from, message in (
        ("t1@1", "t1@1 is archived; restore it first"),
        ("t1@9", "there is no t1@9; there are t1@1, t1@2, t1@3"),
        ("t9", "there is no 't9' in this library; there are t0, t1"),
    ):
        with pytest.raises(UserError, match=message):
            opened.learn("t5", of(10, 11), start_from=start_from)


def test_start_from_best_is_the_task_that_serves_most(root, monkeypatch):
    monkeypatch.setattr(transfer, "gains", lambda *_: (50.0, {"t0": 1.0, "t1": 4.0, "t2": -2.0}))
    opened = Library(root)
    version, _ = opened.learn("t3", of(6, 7), start_from="best", gate=OPEN_GATE)
    forward = {"frozen": 50.0, "best": "t1", "gain": 4.0, "mean": 1.0}
    best = opened.state().active["t1"].id
    assert opened.log()[-1]["found"]["forward"] == forward | {"best": best}
    assert dataclasses.asdict(opened.forward("t3", version)) == forward
    assert opened.forward("t0", opened.state().version("t0")) is None


def test_transfer_keeps_each_column_and_loads_the_backbone_once(root, monkeypatch):
    opened, seen = Library(root), []

    def gains(predictor, dataset):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(predictor.model.backbone)
        return 50.0, dict.fromkeys(predictor.task_names, 1.0)

    monkeypatch.setattr(transfer, "gains", gains)
    with pytest.raises(KeyboardInterrupt):
        opened.transfer()
    assert seen[0] is seen[1]
    ids = [version.id for version in opened.state().active.values()]
    column = {"frozen": 50.0} | {str(id_): 1.0 for id_ in ids}
    kept = kept_transfer(LibraryReader(root))
    assert kept == {str(id_): column for id_ in ids[:2]}
    (root / "transfer.json").write_text(json.dumps(kept | {"0": 5, "1": {"frozen": "x"}, "7": {}}))
    assert kept_transfer(LibraryReader(root)) == {k: kept[k] for k in kept.keys() - {"0", "1"}}
    (root / "transfer.json").write_text(json.dumps({"format": 99} | kept))
    assert kept_transfer(LibraryReader(root)) == {}


def test_transfer_leaves_out_images_that_are_gone(root, monkeypatch):
    load, gains = Data.load, {"t0": 1.0, "t1": 2.0, "t2": 3.0}

    def gone(self, stop=None):
        if self.classes == of(4, 5).classes:
            raise UserError("data_dir: the folder is gone")
        return load(self, stop)

    monkeypatch.setattr(Data, "load", gone)
    monkeypatch.setattr(transfer, "gains", lambda *_: (50.0, gains))
    table = Library(root).transfer()
    assert table == {name: dict.fromkeys(("t0", "t1"), gain) for name, gain in gains.items()} | {
        "frozen": {"t0": 50.0, "t1": 50.0}
    }


def test_a_library_has_one_set_of_settings(root, tmp_path):
    opened = Library(root)
    other = dataclasses.replace(WITHOUT, learning_rate=0.5)
    with pytest.raises(UserError, match="other settings .learning_rate: 0.03 there, 0.5 now"):
        opened.learn("t3", of(6, 7), config=other)
    opened.learn("t3", of(6, 7), config=dataclasses.replace(WITHOUT, eval_batch_size=8))
    for method in ("head", "dualprompt+ewc", "l2p", "l2p+softtf", "finetune"):
        with pytest.raises(UserError, match="method: "):
            Library(tmp_path / "new").learn("t", of(0), config=Config(method=method))
    with pytest.raises(UserError, match="library: .*new is not there"):
        Library(tmp_path / "new").learn("t", of(0))
    assert not (tmp_path / "new").exists()  # nothing is left of what was refused


@pytest.mark.usefixtures("paper")
def test_no_number_of_a_version_is_given_again(root):
    opened = Library(root)
    opened.remove("t1", 3)
    assert opened.learn("t1", of(2, 3))[0].number == 4
    opened.remove("t2")
    assert opened.learn("t2", of(4, 5))[0].number == 2
    opened.rename("t0", "t2b")
    opened.rename("t2b", "x")
    for name, number in (("t0", 2), ("t2b", 2)):
        assert opened.learn(name, of(10 + number + len(name)))[0].number == number
    assert opened.learn("x", of(0, 1))[0].number == 2
    check_whole(root)


@pytest.mark.usefixtures("paper")
def test_no_task_gets_a_name_that_another_had(root):
    """Or t2@1 in the log would be one version before a change, and another one behind it."""
    opened = Library(root)
    opened.rename("t0", "zero")
    opened.rename("zero", "t0")  # its own of before
    opened.remove("t2")
    opened.rename("t0", "zero")
    opened.learn("t0", of(6))
    opened.remove("t0")
    for name in ("t0", "t2"):
        with pytest.raises(UserError, match=f"rename: another task was called '{name}'"):
            opened.rename("zero", name)
    check_whole(root)


def test_a_library_of_format_0_is_read(tmp_path):
    """`data/library_0.json` was written before versions' numbers were kept.

    What it holds of other tasks' figures at the gate, by their names, is left out.
    """
    shutil.copy(Path(__file__).parent / "data/library_0.json", tmp_path / "library.json")
    (tmp_path / "log").mkdir()
    state = LibraryReader(tmp_path).read()
    assert state.numbers == {"t0": 1, "t1": 2, "t2": 1} and state.confusion == {}
    assert state.owners == {name: found[0].id for name, found in state.tasks.items()}
    versions = [v for found in state.tasks.values() for v in found]
    assert {v.origin for v in versions} == {v.manifest_sha256 for v in versions} == {""}
    assert all(v.gate == {"fallen": [], "unchecked": {}} for v in versions)
    for number in range(1, state.changes + 1):
        old = {"number": number, "when": "", "command": "learn", "note": "", "state_before": None}
        if number == 2:  # what format 1 had
            old |= {"format": 1, "found": {"backward": {"t0": {}}}}
        text = json.dumps(old | {"state_after": ""})
        (tmp_path / f"log/{number:06d}.json").write_text(text)
    assert [record["found"] for record in Library(tmp_path).log()] == [{}] * state.changes


def test_a_record_keeps_what_changed_since_the_one_before(tmp_path, rng):
    """And is read as if it had all, also behind one of format 2 and one that was damaged."""
    state, old, every = LibraryState(config={}, backbone_sha256=""), None, []
    log = tmp_path / "library/log"

    def rows(ids):
        return {id_: {"given": 50.0, "per_sample": float(rng.integers(2))} for id_ in ids}

    with closing(LibraryFolder(log.parent, make=True)) as folder:
        for number in range(8):
            ids = [str(id_) for id_ in range(40) if rng.random() < 0.9]
            found = {"version": 7, "figures": rows(ids), "backward": rows(ids[2:])}
            every.append(found if number != 3 else {})
            if number == 5:
                kept = (log / "000004.json").read_text()
                (log / "000004.json").write_text("")
            old = folder.commit(old, state, "learn", found=every[-1])
            if number == 1:
                record = json.loads((log / "000002.json").read_text())
                record |= {"format": 2, "found": found}
                (log / "000002.json").write_text(json.dumps(record))
            if number == 5:
                (log / "000004.json").write_text(kept)
        still = {id_: {"given": 0.0, "per_sample": 0.0} for id_ in ids[2:]}
        for backward in (rows(ids[2:]), still):
            every.append(found | {"backward": backward})
            old = folder.commit(old, state, "check", found=every[-1])
    assert [record["found"] for record in LibraryReader(log.parent).log(old)] == every
    sizes = [(log / f"{number:06d}.json").stat().st_size for number in (1, 6, 10)]
    assert sizes[2] < 800 and sizes[2] < sizes[0] / 5 and sizes[1] > sizes[0] / 2


def test_what_was_asked_for_or_answered_counts_as_used(root):
    images, used = letters().test.images[:4], root / "used"
    predictor = Predictor.load(root)
    assert not used.exists()
    predictor.predict(images, task=2)
    assert [file.name for file in used.iterdir()] == ["002"]
    networks = {predictor.predict(images[:1]).networks[0] for _ in range(2)}
    assert {file.name for file in used.iterdir()} == {"002", *(f"{n:03d}" for n in networks)}
    shutil.rmtree(used)
    Predictor.load(root, ["t1"])
    active = Library(root).state().active["t1"].id
    assert [file.name for file in used.iterdir()] == [f"{active:03d}"]


def test_a_damaged_g_prompt_is_read_from_another_version(tmp_path):
    root, images = tmp_path / "library", letters().test.images[:12]
    with gate_of_paper():
        opened = made(root, WITH_G_PROMPT)
    asked = {"task_id": "oracle", "batch_size": 16}
    before = Predictor.load(root, **asked).predict(images, task=1)
    damage(root, opened.state().active["t0"], "shared/g_prompt")
    after = Predictor.load(root, **asked).predict(images, task=1)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    verdict = opened.check(100.0)
    assert "t0@1 is damaged" in verdict.unchecked["t0"] and set(verdict.figures) == {"t1", "t2"}
    (root / "tasks/000/manifest/metadata").write_text("{}")  # nor does that say what it was
    after = Predictor.load(root, ["t1", "t2"], **asked).predict(images, task=0)
    np.testing.assert_array_equal(after.probabilities, before.probabilities)
    opened.archive("t2")
    damage(root, opened.state().active["t1"], "shared/g_prompt")
    with pytest.raises(
        UserError, match=r"what all tasks share \(g_prompt\) is damaged .*soft-jax restore .* t2@1"
    ):
        Predictor.load(root, ["t1"], **asked)
    opened.restore("t2")
    Predictor.load(root, ["t1"], **asked)
    shutil.rmtree(root / "tasks/000")
    opened.remove("t0")  # of which nothing is left to copy
    Predictor.load(root, ["t1"], **asked)


def test_other_things_in_a_folder_are_left_alone(root, tmp_path):
    (tmp_path / "mine/tests").mkdir(parents=True)
    (tmp_path / "mine/tests/000.npz").write_text("mine")
    (tmp_path / "mine/README").write_text("mine")
    with pytest.raises(UserError, match="holds other things .README. and no library"):
        Library(tmp_path / "mine").learn("t", of(0, 1), config=WITHOUT)
    assert sorted(p.name for p in (tmp_path / "mine").rglob("*")) == ["000.npz", "README", "tests"]
    kept = [root / name for name in ("tasks/notes.txt", "notes.txt", "log/x.json", "learning/x")]
    for file in kept:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    Library(root).rename("t0", "zero")
    assert all(file.read_text() == "mine" for file in kept)


@pytest.mark.parametrize("name", [".lock", "tasks", "log", "archive", "library.json"])
def test_links_are_refused(root, tmp_path, name):
    if not (root / name).exists():
        (root / name).mkdir()
    (root / name).rename(tmp_path / "elsewhere")
    (root / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        Library(root).rename("t0", "zero")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "library.json is damaged"),
        ("[" * 10_000, "library.json is damaged"),
        ("[]", "a JSON object was expected"),
        (json.dumps(formats.stamped("library", {})), "is missing or unknown; restore it"),
        ("{}", "it is not what its format says"),
        ('{"format": 7, "written_by": "9.1"}', "written by soft_jax 9.1.*upgrade this program"),
        ({"tasks": {"t0": 5}}, "library.json is damaged, it is not what was written"),
        ({"config": []}, r"library.json is damaged, .*config is '\[\]', of another type"),
        ({"config": 5}, "library.json is damaged, .*config is '5', of another type"),
        ({"figures": []}, r"library.json is damaged, .*figures is '\[\]', of another type"),
        ({"figures": {"t0": {}}}, "library.json is damaged, .*the figures of t0 are {}"),
        ({"shared_from": "x"}, "library.json is damaged, .*shared_from is 'x', of another type"),
        ({"confusion": {"a": {}}}, "library.json is damaged"),
    ],
)
def test_a_state_that_can_not_be_read(root, text, message):
    file = root / "library.json"
    if isinstance(text, dict):
        text = json.dumps(json.loads(file.read_text()) | text)
    file.write_text(text)
    digests = digest(root / "tasks")
    for act in (
        lambda: Library.open(root),
        lambda: Predictor.load(root),
        lambda: Library(root).rename("t0", "zero"),
        lambda: Library(root).learn("t3", of(6, 7), config=WITHOUT),
    ):
        with pytest.raises(UserError, match=message):
            act()
    assert file.read_text() == text and digest(root / "tasks") == digests


def test_a_version_that_can_not_be_read(root):
    file = root / "library.json"
    whole = json.loads(file.read_text())
    for changed in ({"seconds": "x"}, {"data": [5]}, {"classes": ["x"]}, {"learned": {"x": 1.0}}):
        version = whole["tasks"]["t0"][0] | changed
        file.write_text(json.dumps(whole | {"tasks": whole["tasks"] | {"t0": [version]}}))
        with pytest.raises(UserError, match="library.json.* is damaged"):
            Library.open(root)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{",
        "[" * 10_000,
        {"note": 5},
        {"found": {"figures": {}}},
        {"found": {"figures": 5, "backward": {}, "whole": True, "gone": [], "without": []}},
    ],
)
def test_a_record_of_the_log_that_is_damaged_is_named(root, capsys, text):
    file = root / "log/000001.json"
    if isinstance(text, dict):
        text = json.dumps(json.loads(file.read_text()) | text)
    file.write_text(text)
    assert main(["log", str(root)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: library: {file} is damaged")
    Library(root).rename("t0", "zero")  # goes on


@pytest.mark.parametrize("bucket", [False, True])
def test_a_backbone_is_found_again_from_any_folder(tmp_path, monkeypatch, bucket):
    monkeypatch.chdir(tmp_path)
    given = "gs://bucket/x.npz" if bucket else "../bb/x.npz"
    opened = made("lib", dataclasses.replace(WITHOUT, backbone_path=given), tasks=1)
    kept = given if bucket else f"{tmp_path}/../bb/x.npz"
    assert opened.state().config["backbone_path"] == kept


@pytest.mark.parametrize("bucket", [False, True])
def test_images_are_found_again_from_any_folder(tmp_path, monkeypatch, bucket):
    monkeypatch.chdir(tmp_path)
    given = "gs://bucket/sets" if bucket else "../sets"
    kept = given if bucket else f"{tmp_path}/../sets"
    config = Config(dataset="tiny_imagenet", data_dir=given)
    assert settings_lib.to_keep(config).data_dir == kept
    assert Data.parse("tiny_imagenet", ("cat",), vars(config)).data_dir == kept
    assert settings_lib.to_keep(Config()).data_dir == Data.parse("digits").data_dir == ""


def test_kept_transfer_that_is_damaged_is_left_out(root):
    file = root / "transfer.json"
    file.write_text("[" * 10_000)
    assert kept_transfer(LibraryReader(root)) == {}
    file.unlink()
    os.mkfifo(file)  # it is not waited for
    assert kept_transfer(LibraryReader(root)) == {}


def test_bundled_images_can_not_be_moved(root, tmp_path, monkeypatch, capsys):
    bundled = dataclasses.replace(letters(), class_names=tuple(f"d{i}" for i in range(60)))
    monkeypatch.setattr(
        sources, "load", lambda name, *_: bundled if name == "digits" else letters()
    )
    opened = Library(root)
    opened.learn("t3", Data("digits", classes=("d1", "d2")), gate=OPEN_GATE)
    before = opened.state()
    assert main(["move-data", str(root), "digits", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: FROM: the images of t3@1 are the bundled 'digits', which are in")
    assert opened.state() == before


def test_two_commands_at_once(root):
    with (
        closing(LibraryFolder(root)),
        pytest.raises(UserError, match="another program is changing"),
    ):
        Library(root).rename("t0", "zero")
    assert Library(root).state().active.keys() == {"t0", "t1", "t2"}
    Library(root).rename("t0", "zero")


def test_training_that_was_cut_off_is_gone_on_with_by_the_same_command_alone(root, monkeypatch):
    opened, begun = Library(root), []

    def cut_off(config, workdir, console, dataset, *others, **start):
        begun.append(Path(workdir).name)
        drawn(config, workdir, console, dataset, *others, **start)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "run", cut_off)
    for data in (of(6, 7), of(6, 7), of(6, 7, 8)):
        with pytest.raises(KeyboardInterrupt):
            opened.learn("t3", data)
    assert begun[0] == begun[1] != begun[2]
    assert all((root / "learning" / name).is_dir() for name in begun)
    monkeypatch.setattr(loop, "run", drawn)
    opened.learn("other", of(10, 11), gate=OPEN_GATE)  # one in between changes nothing
    monkeypatch.setattr(loop, "run", cut_off)
    with pytest.raises(KeyboardInterrupt):
        opened.learn("t3", of(6, 7))
    assert begun[3] == begun[0]
    monkeypatch.setattr(loop, "run", drawn)
    before = digest(root / "learning" / begun[0] / "tasks/000")
    version, _ = opened.learn("t3", of(6, 7), gate=OPEN_GATE)
    assert digest(LibraryReader(root).path(version)) == before
    assert not list((root / "learning").iterdir())


def test_tidy_archives_what_is_old(root):
    opened = Library(root)
    planned = [(name, v.number, why) for name, v, why in opened.tidy_plan(keep_versions=1)]
    assert planned == [("t1", 1, "2 newer versions")]  # @2 is the active one
    assert not opened.tidy_plan(unused_days=1)
    Predictor.load(root, ["t0"])
    for version in range(5):
        file = root / f"used/{version:03d}"
        file.touch()
        os.utime(file, (0, 0) if version else None)
    names = [f"{name}@{v.number}" for name, v, _ in opened.tidy_plan(unused_days=90)]
    assert sorted(names) == ["t1@1", "t1@2", "t1@3", "t2@1"]


# Kills, and full disks.

_at_change: list = []  # what is called before anything on the disk is changed
_CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
)


def _hook(event, arguments):
    if not _at_change:
        return
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    if event in _CHANGES or (event == "open" and (arguments[2] or 0) & writes):
        _at_change[-1](event, arguments)


@pytest.fixture(scope="module")
def _hooked():
    sys.addaudithook(_hook)  # for good; it does nothing when nobody asks


@contextlib.contextmanager
def at_change(act):
    """Call `act` before each change on the disk."""
    _at_change.append(act)
    try:
        yield
    finally:
        _at_change.pop()


class Killed(BaseException):
    """The process ends here: no handler for errors runs."""


class Clock:
    """Counts changes on the disk; at number `at` and after it raises `error`."""

    def __init__(self, at=None, error=Killed, only=()):
        self.count, self._at, self._error, self._only = 0, at, error, only

    def __call__(self, event, arguments):
        if self._only and event not in self._only:
            return
        self.count += 1
        if self._at is not None and self.count > self._at:
            raise self._error


COMMANDS = {
    "learn": lambda opened: opened.learn("t3", of(6, 7), keep_test_images=True),
    "learn_again": lambda opened: opened.learn("t1", of(2, 3)),
    "learn_refused": lambda opened: opened.learn("t3", of(6), gate=Gate(1.0, 60.0)),
    "first": lambda opened: opened.learn("t0", of(0, 1), config=WITHOUT),
    "activate": lambda opened: opened.activate("t1", 1),
    "rollback": lambda opened: opened.rollback("t1"),
    "archive": lambda opened: opened.archive("t0"),
    "restore": lambda opened: opened.restore("t2"),
    "rename": lambda opened: opened.rename("t1", "one"),
    "merge": lambda opened: opened.merge(["t0", "t1"], "both"),
    "remove": lambda opened: opened.remove("t1"),
    "remove_version": lambda opened: opened.remove("t0", 1),
}


@pytest.fixture(scope="module")
def _small(tmp_path_factory, _hooked):
    """A library as `three`, whose versions are a few small files and can't be loaded; t2 is
    archived, and t1 keeps test images. Not to be changed.
    """
    finished = tmp_path_factory.mktemp("finished")
    for name in ("adapter/mask/0", "shared/bias/0"):
        (finished / name).parent.mkdir(parents=True)
        (finished / name).write_text(name)
    manifest = manifest_of(
        task=0,
        classes=(0,),
        class_names=("a",),
        num_classes=1,
        num_tasks=1,
        config={},
        backbone={},
        metrics={},
    )
    manifest = dataclasses.replace(manifest, seconds={"train": 1.0})
    data = formats.stamped("task", manifest.to_json()) | {"run": RECORD, "sha256": {}}
    data["manifest_sha256"] = checkpoint._digest(data)
    (finished / "manifest").mkdir()
    (finished / "manifest/metadata").write_text(json.dumps(data))

    def copied(config, workdir, *_, **__):
        if not (workdir / "tasks/000").is_dir():
            (workdir / "tasks").mkdir(parents=True, exist_ok=True)
            shutil.rmtree(workdir / "partial", ignore_errors=True)
            shutil.copytree(finished, workdir / "partial")
            (workdir / "partial").rename(workdir / "tasks/000")  # as Orbax does
        return [manifest]

    root = tmp_path_factory.mktemp("small") / "library"
    with _without_arrays(copied):
        opened = made(root)
        opened.learn("t1", of(2, 3), keep_test_images=True)
        opened.archive("t2")
    return root, copied


@contextlib.contextmanager
def _without_arrays(train):
    with pytest.MonkeyPatch.context() as patch, gate_of_paper():
        patch.setattr(loop, "run", train)
        for module in (library_planning, merged):
            patch.setattr(module, "start", lambda *_: Start())
        patch.setattr(Library, "_keep_tests", _keep_few)
        yield


@pytest.fixture
def small(_small):
    with _without_arrays(_small[1]):
        yield _small[0]


def _keep_few(self, folder, backbone, dataset, version):
    found = folder.keep_tests(version, np.zeros(2, np.uint8), np.zeros(2, int))
    return dataclasses.replace(version, test={**version.test, "kept_sha256": found})


RECORD = RunRecord(settings={}, backbone_sha256="", dataset_sha256="", tasks=None).to_json()


def copy_of(small: Path, tmp_path: Path, command: str) -> Path:
    root = tmp_path / "library"
    shutil.rmtree(root, ignore_errors=True)
    if command != "first":
        shutil.copytree(small, root)
    return root


def contents(root: Path) -> dict[int, str]:
    """The hash of each version's files, packed or not."""
    reader, found = LibraryReader(root), {}
    for versions in reader.read().tasks.values():
        for version in versions:
            if version.state != ARCHIVED:
                found[version.id] = digest(reader.path(version))
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_change_on_the_disk_a_command_is_done_or_not(small, tmp_path, command):
    """And the same command then does it, or finds it done."""
    act, clock = COMMANDS[command], Clock()
    root = copy_of(small, tmp_path, command)
    before = shape_of(check_whole(root)) if command != "first" else None
    known = contents(root) if before else {}
    with at_change(clock):
        act(Library(root))
    after = shape_of(check_whole(root))
    assert after != before and clock.count > 5
    known |= contents(root)
    seen = set()
    for at in range(clock.count):
        root = copy_of(small, tmp_path, command)
        with at_change(Clock(at)), contextlib.suppress(Killed):
            act(Library(root))
        if not (root / "library.json").exists():
            assert before is None
            seen.add("before")
        else:
            shape = shape_of(check_whole(root))
            assert shape in (before, after)
            seen.add("after" if shape == after else "before")
            assert contents(root).items() <= known.items()
            if shape == after:
                continue
        act(Library(root))
        assert shape_of(check_whole(root)) == after
    # Some change is left to do when it is done, but for commands that have nothing to remove.
    assert "before" in seen


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_leaves_the_library_as_it_was(small, tmp_path, command):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    act, clock = COMMANDS[command], Clock(only=("open", "os.mkdir"))
    root = copy_of(small, tmp_path, command)
    with at_change(clock):
        act(Library(root))
    after = shape_of(check_whole(root))
    for at in range(clock.count):
        root = copy_of(small, tmp_path, command)
        before = shape_of(LibraryReader(root).read()) if command != "first" else None
        filled = Clock(at, full, ("open", "os.mkdir"))
        with at_change(filled), pytest.raises((UserError, OSError), match="No space left") as error:
            act(Library(root))
        # But for what training says of itself, which stands in for a run here.
        trains = "learn" in command or command in ("first", "merge")
        assert error.type is UserError or trains
        if before:
            assert shape_of(LibraryReader(root).read()) == before
            assert not list(root.glob("[!l]*/.*.partial*"))  # what was written makes room again
        act(Library(root))
        assert shape_of(check_whole(root)) == after


@pytest.mark.parametrize("command", ["learn", "archive", "restore"])
def test_what_a_disk_does_not_keep_is_not_taken_for_kept(small, tmp_path, monkeypatch, command):
    """Files of which fsync says that they may be lost; that of folders may fail everywhere."""
    act, sync, calls = COMMANDS[command], os.fsync, []

    def failing_at(at):
        def fail(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            calls.append(descriptor)
            if len(calls) - 1 == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            sync(descriptor)

        calls.clear()
        monkeypatch.setattr(os, "fsync", fail)

    root = copy_of(small, tmp_path, command)
    failing_at(None)
    act(Library(root))
    after, files = shape_of(check_whole(root)), len(calls)
    assert files >= 4  # log, library.json, and two of the command's own at least
    for at in range(files):
        root = copy_of(small, tmp_path, command)
        before = digest(root / "tasks"), digest(root / "archive"), LibraryReader(root).read()
        failing_at(at)
        with pytest.raises(UserError, match=r"could not be written .*Input/output error"):
            act(Library(root))
        assert before[2] == check_whole(root)
        assert (digest(root / "tasks"), digest(root / "archive")) == before[:2]
        act(Library(root))
        assert shape_of(check_whole(root)) == after


KILLS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from soft_jax.experiment.library import Library
from soft_jax.store.library import LibraryReader

small, work = map(Path, sys.argv[1:])
COMMANDS = {
    "archive": lambda opened: opened.archive("t0"),
    "restore": lambda opened: opened.restore("t2"),
    "rename": lambda opened: opened.rename("t1", "one"),
    "remove": lambda opened: opened.remove("t1"),
}

def state(root):
    return {n: {v.number: v.state for v in f} for n, f in LibraryReader(root).read().tasks.items()}

def run(root, act, seconds):
    child = os.fork()
    if not child:
        act(Library(root))
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

random.seed(0)
killed = 0
for name, act in COMMANDS.items():
    whole = work / "whole"
    shutil.copytree(small, whole)
    began = time.monotonic()
    assert run(whole, act, None) == 0
    took, before, after = time.monotonic() - began, state(small), state(whole)
    shutil.rmtree(whole)
    for number in range(12):
        root = work / f"{name}{number}"
        shutil.copytree(small, root)
        killed += run(root, act, random.uniform(0, took)) != 0
        assert state(root) in (before, after), (name, number)
        if state(root) == before:
            assert run(root, act, None) == 0
        assert state(root) == after, (name, number)
print(killed)
"""


def test_killed_at_any_moment_a_command_is_done_or_not(small, tmp_path):
    """By SIGKILL, of processes that change a library without training."""
    command = [sys.executable, "-c", KILLS, str(small), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert int(done.stdout) >= 10  # of 48; the others were done before
    for root in tmp_path.iterdir():
        check_whole(root)


@pytest.mark.usefixtures("_hooked")
def test_a_library_that_can_not_be_written_is_read(root):
    readonly = Clock(0, OSError(errno.EROFS, os.strerror(errno.EROFS)))
    opened, images = Library(root), letters().test.images[:4]
    before = Predictor.load(root, task_id="oracle").predict(images, task=0)
    with at_change(readonly):
        after = Predictor.load(root, task_id="oracle").predict(images, task=0)
        assert opened.log()[-1]["command"] == "learn"
        assert opened.state().active.keys() == {"t0", "t1", "t2"}
        assert opened.check().passed
        with pytest.raises(UserError, match="can't be written .*Read-only file system"):
            opened.rename("t0", "zero")
    jax.tree.map(np.testing.assert_array_equal, after, before)
