"""Runs, data and weights in a bucket, on the emulator of the package index.

One undisturbed run on a disk is what every other run here has to equal, array for array.
"""

import dataclasses
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from http import HTTPStatus
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from jax.experimental.compilation_cache import compilation_cache
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from soft_jax import __main__ as command_line
from soft_jax import buckets, cache, paths
from soft_jax.data import cifar100, images, sources
from soft_jax.errors import UserError
from soft_jax.evaluation import pictures
from soft_jax.experiment import loop, planned, seeds, trackers
from soft_jax.hooks import Hooks
from soft_jax.inference.predictor import Predictor
from soft_jax.models import backbones
from soft_jax.paper import rows as rows_lib
from soft_jax.paper import tables
from soft_jax.store import bucket_lock, checkpoint, folder
from tests import archives
from tests.conftest import COMPILED, hardly_optimized, tiny_world
from tests.emulator import kill_at, lock, url
from tests.train_tiny import CONFIG

# ml_collections reads config files by a function that Python deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
    pytest.mark.usefixtures("calm_after"),
]

ROOT = Path(__file__).parent.parent
load_images, load_backbone = sources.load, backbones.load


@pytest.fixture(scope="module", autouse=True)
def world(backbone):
    with (
        pytest.MonkeyPatch.context() as patch,
        tiny_world(backbone, patch) as few,
        hardly_optimized(),
    ):
        yield few


def train(workdir, **hooks) -> str:
    printed = io.StringIO()
    loop.run(CONFIG, workdir, Console(file=printed, width=200), hooks=Hooks(**hooks))
    return printed.getvalue()


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A run on a disk that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    train(workdir)
    return workdir


@pytest.fixture(scope="module")
def in_bucket(world, emulator):
    """The same in the bucket."""
    printed = train(url("whole"))
    assert f"Report: {url('whole/report.md')}" in printed
    return url("whole")


def outcome(manifests: list[bytes], results: bytes):
    """Hash of every array, the counts of every protocol, and the figures, by task."""
    rows = [json.loads(line) for line in results.splitlines()]
    figures = [{key: row[key] for key in row if key != "seconds"} for row in rows]
    read = map(json.loads, manifests)
    return [(manifest["sha256"], manifest["metrics"]) for manifest in read], figures


def of_disk(workdir: Path):
    found = [workdir / f"tasks/{task:03d}/manifest/metadata" for task in range(2)]
    return outcome([f.read_bytes() for f in found], (workdir / "results.jsonl").read_bytes())


def of_bucket(emulator, run: str):
    there = {
        name.removeprefix(f"{run}/"): content
        for name, content in emulator.objects.items()
        if name.startswith(f"{run}/")
    }
    # Neither a lock nor anything half done is left.
    assert not [name for name in there if name == ".lock" or ".partial" in name]
    assert not [name for name in there if name.startswith("training/")]
    manifests = [there[f"tasks/{task:03d}/manifest/metadata"] for task in range(2)]
    return outcome(manifests, there["results.jsonl"])


def test_a_run_in_a_bucket_is_that_on_a_disk(whole, in_bucket, emulator):
    assert of_bucket(emulator, "whole") == of_disk(whole)
    names = [path.name for path in whole.iterdir() if path.is_file() and path.name != ".lock"]
    for name in names:
        assert f"whole/{name}" in emulator.objects
    assert emulator.objects["whole/classes.csv"] == (whole / "classes.csv").read_bytes()


def test_a_run_goes_on_where_it_is_copied_to(whole, emulator, tmp_path):
    """From a disk to a bucket, without its last task, and back when it is finished."""
    for file in (path for path in whole.rglob("*") if path.is_file()):
        if not file.is_relative_to(whole / "tasks/001") and "commit_success" not in file.name:
            emulator.put(f"copied/{file.relative_to(whole)}", file.read_bytes())
    assert "1 of 2 tasks are finished" in train(url("copied"))
    assert of_bucket(emulator, "copied") == of_disk(whole)
    for name, content in emulator.objects.items():
        if name.startswith("copied/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    assert "2 of 2 tasks are finished" in train(tmp_path / "copied")


def start(workdir: str, *strike: str) -> str:
    """Start the run in a program that is killed before it ends, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train_tiny", workdir, *strike],
        cwd=ROOT,
        env=os.environ | {"SOFT_JAX_TESTS_COMPILED": COMPILED},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_killed_anywhere_and_continued_is_the_same_run(whole, emulator):
    """In a step, in a save, and between a task's commit and the report."""
    start(url("killed"), "0:3")
    kill_at(emulator, "killed", "tasks/000/commit_success.txt", committed=False)
    assert "Task 1 continues after step 3" in start(url("killed"))
    assert "killed/tasks/000/manifest/metadata" in emulator.objects
    assert folder.Reader(url("killed")).present() == []  # nothing half done is taken for a task
    kill_at(emulator, "killed", "tasks/000/commit_success.txt", committed=True)
    assert "Task 1 continues after step 6" in start(url("killed"))
    emulator.calm()
    assert folder.Reader(url("killed")).present() == [0]
    assert "killed/results.jsonl" not in emulator.objects  # the task is there, its figures aren't
    assert "1 of 2 tasks are finished" in train(url("killed"))
    assert of_bucket(emulator, "killed") == of_disk(whole)


def test_a_bucket_that_goes_away_while_a_run_trains(whole, emulator):
    def go_away(task, step, values):
        if (task, step) == (1, 3):
            emulator.before = lambda method, name: HTTPStatus.FORBIDDEN
        return values

    with pytest.raises(UserError, match=r"gone is no longer the folder .* \(.*\); the run ends"):
        train(url("gone"), after_step=go_away)
    emulator.calm()
    train(url("gone"))
    assert of_bucket(emulator, "gone") == of_disk(whole)


def test_a_save_that_the_bucket_refuses_loses_nothing(emulator):
    record = folder.RunRecord(settings={}, backbone_sha256="", dataset_sha256="", tasks=None)
    state = {"mask": jax.numpy.arange(6.0)}
    with closing(folder.Store(url("full"))) as store:
        store.claim(record, {})
        store.save_training(0, 1, state, 1.0)

        def full(method, name):
            return HTTPStatus.FORBIDDEN if method != "GET" and "state/mask" in name else None

        emulator.before = full
        with pytest.raises(UserError, match="training/000-000002 could not be saved"):
            store.save_training(0, 2, state, 2.0)
        emulator.calm()
        whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        loaded, seconds = store.load_training(0, state, whole)
        assert seconds == 1.0
        np.testing.assert_array_equal(loaded["mask"], state["mask"])
        # What Orbax had sent may come after the sweep: the mark says that it is no checkpoint.
        assert "full/training/000-000002.partial" in emulator.objects
        assert [state.name for state in store._states()] == ["000-000001"]
        aside = store.set_aside_training()
        assert str(aside) == url("full", "damaged")
        assert store.load_training(0, state, whole) is None
    assert [name for name in emulator.objects if name.startswith("full/damaged/000-000001-")]


# Orbax has closed its event loop by the time that the other array's answer is there.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_comes_after_a_failed_save_is_no_checkpoint(emulator):
    """An array whose request is still being tried again when another was refused."""
    record = folder.RunRecord(settings={}, backbone_sha256="", dataset_sha256="", tasks=None)
    state = {"refused": jax.numpy.arange(6.0), "delayed": jax.numpy.arange(6.0)}
    late, delayed = "late/training/000-000001/state/delayed/", []

    def watch(method, name):
        if method != "GET" and "state/refused" in name:
            return HTTPStatus.FORBIDDEN
        if method == "POST" and name.startswith(late) and not delayed:
            delayed.append(name)
            return HTTPStatus.SERVICE_UNAVAILABLE
        return None

    with closing(folder.Store(url("late"))) as store:
        store.claim(record, {})
        emulator.before = watch
        with pytest.raises(UserError, match="training/000-000001 could not be saved"):
            store.save_training(0, 1, state, 1.0)
        deadline = time.monotonic() + 30
        while not any(name.startswith(late) for name in emulator.objects):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert store._states() == []
    emulator.calm()
    folder.Store(url("late")).close()
    assert not [name for name in emulator.objects if name.startswith("late/training")]


# Locks


def test_two_programs_for_one_workdir(emulator):
    with closing(folder.Store(url("held"))):
        refused = rf"another process is running in .*held \(process {os.getpid()} on"
        with pytest.raises(UserError, match=refused):
            folder.Store(url("held"))
    assert "held/.lock" not in emulator.objects
    folder.Store(url("held")).close()


def test_of_two_that_are_equally_fast_one_gets_the_lock(emulator):
    def be_faster(method, name):
        if method == "POST" and name == "race/.lock" and name not in emulator.objects:
            emulator.put("race/.lock", lock())

    emulator.before = be_faster
    with pytest.raises(
        UserError, match=r"another process is running in .*\(process 7 on elsewhere"
    ):
        folder.Store(url("race"))
    assert json.loads(emulator.objects["race/.lock"])["token"] == "theirs"


def test_a_lock_is_void_without_a_sign_of_life(emulator):
    emulator.put("old/.lock", lock(time=time.time() - bucket_lock.STALE + 20))
    with pytest.raises(UserError, match=r"last heard of 4\d s ago.* void after 60 s"):
        folder.Store(url("old"))
    emulator.put("old/.lock", lock(time=time.time() - bucket_lock.STALE - 1))
    folder.Store(url("old")).close()
    if bucket_lock._machine():  # at once, where it can be seen that its process is no more
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        here = {"machine": bucket_lock._machine(), "host": socket.gethostname()}
        emulator.put("old/.lock", lock(process=ended.pid, **here))
        folder.Store(url("old")).close()
    emulator.put("old/.lock", b"mine")
    with pytest.raises(UserError, match=r"old/.lock is no lock of ours; remove it"):
        folder.Store(url("old"))
    emulator.put("old/.lock", lock(format=9))
    with pytest.raises(UserError, match="it has format 9"):
        folder.Store(url("old"))


def test_a_lock_is_kept_alive_and_its_loss_is_noticed(emulator, monkeypatch):
    monkeypatch.setattr(bucket_lock, "REFRESH", 0.02)
    record = folder.RunRecord(settings={}, backbone_sha256="", dataset_sha256="", tasks=None)
    with closing(folder.Store(url("taken"))) as store:
        store.claim(record, {})
        first = json.loads(emulator.objects["taken/.lock"])["time"]
        deadline = time.monotonic() + 20
        while json.loads(emulator.objects["taken/.lock"])["time"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        emulator.put("taken/.lock", lock())
        with pytest.raises(UserError, match="another process has taken its lock"):
            store.save_training(0, 1, {"mask": jax.numpy.arange(6.0)}, 1.0)
    # It is not ours to remove, and nothing was saved.
    assert json.loads(emulator.objects["taken/.lock"])["token"] == "theirs"
    assert not [name for name in emulator.objects if name.startswith("taken/training")]


def test_a_lock_that_is_lost_in_a_save_removes_nothing(emulator, monkeypatch):
    """The state before stays: it may be what the other program goes on from."""
    record = folder.RunRecord(settings={}, backbone_sha256="", dataset_sha256="", tasks=None)
    state, save = {"mask": jax.numpy.arange(6.0)}, checkpoint.save

    def lose(*args):
        save(*args)
        emulator.put("lost/.lock", lock())

    with closing(folder.Store(url("lost"))) as store:
        store.claim(record, {})
        store.save_training(0, 1, state, 1.0)
        monkeypatch.setattr(checkpoint, "save", lose)
        with pytest.raises(UserError, match="another process has taken its lock"):
            store.save_training(0, 2, state, 2.0)
        assert [path.name for path in store._states()] == ["000-000001", "000-000002"]


@pytest.mark.parametrize("where", ["refused", "missing"])
def test_a_bucket_that_can_not_be_written_is_one_line(emulator, where, capsys):
    before = set(emulator.objects)
    if where == "refused":
        emulator.before = lambda method, _: None if method == "GET" else HTTPStatus.FORBIDDEN
    workdir = url("no") if where == "refused" else "gs://no-such-bucket/run"
    with pytest.raises(UserError, match=rf"^workdir: {workdir} can't be written \("):
        train(workdir)
    assert set(emulator.objects) == before
    output = "".join(capsys.readouterr())
    assert "Traceback" not in output


def test_a_bucket_that_can_not_be_read_is_named(whole, emulator):
    """And of several runs it ends its own alone."""
    emulator.before = lambda *_: HTTPStatus.FORBIDDEN
    shut, rows = paths.place(url("shut[no]"), ""), rows_lib.rows_of("methods", "c100_10")
    for field, look in (
        ("data_dir", lambda: load_images("folder", str(shut))),
        ("data_dir", lambda: sources.prepare("cifar100", str(shut))),
        ("backbone_path", lambda: backbones.locate("vit_ti8_32", str(shut))),
        ("images", lambda: images.find([shut])),
        ("workdir", lambda: seeds.plan(CONFIG, 2, shut)),
        ("workdir", lambda: tables.plan(tables.Request("methods", "c100_10", {}, 1, shut), rows)),
    ):
        with pytest.raises(
            UserError, match=rf"^{field}: gs://.*shut\[no\].* can't be (read|copied)"
        ):
            look()
    rows = [planned.PlannedRun(CONFIG, place, "") for place in (shut, whole)]
    printed = io.StringIO()
    problem, manifests = planned.run(rows, Console(file=printed, width=300))
    assert isinstance(problem, UserError)
    assert len(manifests) == 2
    reason = f"workdir: {shut}/tasks can't be read (Forbidden"
    assert str(problem).startswith(reason)
    assert f"error: {reason}" in printed.getvalue()


# What is read from a bucket


def png(levels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


def test_predictions_from_a_bucket(whole, in_bucket, emulator, world, capsys):
    for index in range(3):
        emulator.put(f"new_photos/{index}.png", png(world.test.images[index]))
    emulator.put("new_photos/notes.txt", b"")
    status = command_line.main(
        ["predict", in_bucket, url("new_photos"), "--json", "--task-id=none"]
    )
    output = capsys.readouterr()
    assert status == 0, output.err
    rows = [json.loads(line) for line in output.out.splitlines()]
    assert [row["file"] for row in rows] == [url("new_photos", f"{i}.png") for i in range(3)]
    assert "left out: files of other types: 1 (notes.txt)" in output.err
    answers = Predictor.load(whole, task_id="none").predict(world.test.images[:3])
    assert [row["class_index"] for row in rows] == answers.classes.tolist()
    with pytest.raises(UserError, match="none.png can't be read as an image .*No such file"):
        images.read(url("new_photos/none.png"))
    emulator.put("library/library.json", b"{}")
    with pytest.raises(UserError, match="is a library, which can't be read from a bucket"):
        Predictor.load(url("library"))
    with pytest.raises(
        UserError, match=r"nothing holds no run \(config.json can't be read: No such"
    ):
        Predictor.load(url("nothing"))


def test_a_damaged_array_in_a_bucket_is_named(in_bucket, emulator):
    name = "whole/tasks/001/shared/head.bias/0"
    content = emulator.objects[name]
    emulator.put(name, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"tasks/001: array shared/head.bias (is not|can't be)"):
        Predictor.load(in_bucket, task_id="none")
    emulator.put(name, content)


def test_a_folder_of_images_is_the_same_in_a_bucket(emulator, tmp_path, rng):
    """Hidden and other files, subfolders, and the images held out by the paths of files."""
    photos = tmp_path / "photos"
    for name in ("cat", "dog"):
        (photos / "train" / name / "more").mkdir(parents=True)
        for image in range(4):
            place = photos / "train" / name / ("more" if image % 2 else "") / f"{image}.png"
            place.write_bytes(png(rng.integers(0, 255, (8, 8, 3), np.uint8)))
    (photos / "train/cat/.hidden.png").write_bytes(b"")
    (photos / "train/cat/notes.txt").write_bytes(b"")
    (photos / "classes.txt").write_text("dog\ncat\n")
    for file in (path for path in photos.rglob("*") if path.is_file()):
        emulator.put(f"photos/{file.relative_to(photos)}", file.read_bytes())
    there = load_images("folder", url("photos"))
    here = load_images("folder", str(photos))
    assert there.fingerprint == here.fingerprint
    assert there.class_names == here.class_names == ("dog", "cat")
    assert [note.replace(url("photos"), str(photos)) for note in there.notes] == list(here.notes)
    with pytest.raises(UserError, match=f"no classes in {url('none')}/train"):
        load_images("folder", url("none"))


def test_cifar100_is_copied_from_a_bucket_once(emulator, tmp_path, monkeypatch):
    archive, records = archives.cifar100(tmp_path)
    monkeypatch.setattr(tfds.download.DownloadManager, "download", lambda self, url: archive)
    cifar100.builder(str(tmp_path / "sets")).download_and_prepare()
    for file in (path for path in (tmp_path / "sets/cifar100").rglob("*") if path.is_file()):
        emulator.put(str(file.relative_to(tmp_path)), file.read_bytes())
    monkeypatch.setattr(cache, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(buckets.BucketPath, "read_bytes", None)  # no file is held whole
    synced, cut_off, under_way = [], tmp_path / "cache/data/.copying1", ".copying2"
    monkeypatch.setattr(sources.files_lib, "sync", lambda path: synced.extend(path.iterdir()))
    cut_off.mkdir(parents=True)
    os.utime(cut_off, (0, 0))
    cut_off.with_name(under_way).mkdir()
    dataset = load_images("cifar100", url("sets"))
    assert len(synced) == 1
    assert {path.name[:9] for path in cut_off.parent.iterdir()} == {under_way[:9], "cifar100-"}
    assert sorted(dataset.train.labels) == sorted(records["train"][:, 1])
    asked = []
    emulator.before = lambda method, name: asked.append(name)
    assert load_images("cifar100", url("sets")).fingerprint == dataset.fingerprint
    assert not any("array_record" in name for name in asked)
    with pytest.raises(
        UserError, match=f"data_dir: no mnist in {url('sets')}; prepare it on a disk"
    ):
        load_images("mnist", url("sets"))
    with pytest.raises(UserError, match="does not know 'cifar1000'; did you mean 'cifar100'"):
        load_images("cifar1000", url("sets"))


def test_a_backbone_from_a_bucket(emulator):
    file = backbones.locate("vit_ti8_32")
    emulator.put("weights/vit_ti8_32.npz", file.read_bytes())
    here, there = (load_backbone("vit_ti8_32", path) for path in ("", url("weights")))
    assert there.fingerprint == here.fingerprint
    with pytest.raises(UserError, match=f"backbone_path: no file at {url('none')}"):
        load_backbone("vit_ti8_32", url("none"))


def test_a_cache_in_a_bucket(emulator, tmp_path, monkeypatch):
    """Downloaded weights, and JAX's compiled programs."""
    (tmp_path / "far.npz").write_bytes(b"weights")
    far = dataclasses.replace(
        backbones.BACKBONES["vit_ti8_32"], url=(tmp_path / "far.npz").as_uri(), sha256=""
    )
    monkeypatch.setitem(backbones.BACKBONES, "vit_far", far)
    monkeypatch.setattr(backbones, "CACHE", url("cache"))
    monkeypatch.setattr(cache, "CACHE", str(tmp_path / "on_disk"))
    for _ in range(2):
        assert backbones.locate("vit_far").read_bytes() == b"weights"
        (tmp_path / "far.npz").unlink(missing_ok=True)
    assert emulator.objects["cache/vit_ti8_32.npz.sha256"].endswith(b"  vit_ti8_32.npz\n")
    assert list((tmp_path / "on_disk").iterdir()) == []
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", url("cache/xla"))
    try:
        jax.jit(lambda x: x * 3 + 1)(1.0)
    finally:
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", COMPILED)
    assert [name for name in emulator.objects if name.startswith("cache/xla/jit__lambda")]


def test_tables_and_pictures_in_a_bucket(in_bucket, emulator, monkeypatch):
    run = planned.PlannedRun(CONFIG, paths.place(in_bucket, "workdir"), "")
    assert [manifest.task for manifest in planned.finished(run)] == [0, 1]
    text = "# Table 7\n\nMade by `a command`.\n"
    monkeypatch.setattr(tables, "make", lambda *_: (text, True))
    argv = ["table", "7", "--rows=1", f"--workdir={url('tables')}", f"--output={url('t.md')}"]
    for _ in range(2):
        assert command_line.main(argv) == 0
        assert emulator.objects["t.md"] == text.encode()
    emulator.put("t.md", b"mine")
    assert command_line.main(argv) == 1
    assert emulator.objects["t.md"] == b"mine"
    pictures.save(Figure(), paths.place(url("p.png"), "picture"))
    assert emulator.objects["p.png"].startswith(b"\x89PNG")


def test_curves_in_a_bucket(emulator, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, tensorboard=True)
    record = folder.RunRecord(settings={}, backbone_sha256="", dataset_sha256="", tasks=None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place, told = paths.place(url("curves"), "workdir"), []
    with trackers.opened(config, place, record, told.append) as opened:
        opened.curves(1, 0, {"loss": 1.0})
    (events,) = (name for name in emulator.objects if name.startswith("curves/tensorboard/task_1/"))
    assert b"train/loss" in emulator.objects[events]
    assert (list(tmp_path.iterdir()), told) == ([], [])
    # What the bucket refuses in the end stays on the disk.
    with trackers.opened(config, place, record, told.append) as opened:
        opened.curves(1, 1, {"loss": 0.5})
        emulator.before = lambda *_: HTTPStatus.FORBIDDEN
    (kept,) = tmp_path.iterdir()
    assert f"they are in {kept}" in told[0]
    assert b"train/loss" in next(kept.rglob("events*")).read_bytes()


# What is no bucket, or can't be one


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["train", "--workdir=gs://bucket-a/run"], "--workdir"),
        (["table", "7", "--output=gs://bucket-a/t.md"], "--output"),
        (["predict", "gs://bucket-a/run", "a.png"], "workdir"),
        (["predict", "run", "gs://bucket-a/a.png"], "images"),
        (["train", "--config.backbone_path=gs://bucket-a/x"], "backbone_path"),
    ],
)
def test_the_missing_extra_is_one_line(arguments, field, monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        buckets.importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find(name)
    )
    monkeypatch.chdir(tmp_path)
    assert command_line.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {field}: 'gs://bucket-a/")
    assert line.endswith('is in a bucket, which needs gcsfs: pip install "soft_jax[gcs]"')
    assert not list(tmp_path.iterdir())


def test_without_a_network_nothing_is_tried_again(tmp_path, monkeypatch, capsys):
    """gcsfs and TensorStore would, for up to a minute, and no signal stops them."""
    with socket.socket() as nobody:
        nobody.bind(("localhost", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{nobody.getsockname()[1]}")
        buckets._storage.cache_clear()
        try:
            with monkeypatch.context() as patch:
                patch.setattr("fsspec.filesystem", lambda *_, **__: pytest.fail("gcsfs was asked"))
                patch.setattr("tensorstore.KvStore.open", lambda *_: pytest.fail("so was it"))
                with pytest.raises(UserError, match="workdir: gs://.* can't be written .*refused"):
                    folder.Store(url("run"))
                assert command_line.main(["table", "7", f"--output={url('t.md')}"]) == 1
                assert "t.md can't be written" in capsys.readouterr().err
        finally:
            buckets._storage.cache_clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["gs://", "gs:///run", "gs://Runs/run", "gs:/bucket-a/run"])
def test_what_names_no_bucket_is_one_line(text):
    with pytest.raises(UserError, match=f"^workdir: '{text}' (names no bucket|is a URL)"):
        folder.Store(text)


def test_another_scheme_is_refused_for_the_cache_and_libraries(monkeypatch, capsys):
    assert command_line.main(["learn", "gs://bucket-a/library", "a", "digits"]) == 1
    assert "'gs://bucket-a/library' is a URL; only local paths" in capsys.readouterr().err
    monkeypatch.setattr(command_line, "CACHE", "s3://bucket-a/cache")
    assert command_line.main(["table", "7", "--list"]) == 1
    assert "error: SOFT_JAX_CACHE: 's3://bucket-a/cache' is a URL" in capsys.readouterr().err


def test_a_path_in_a_bucket_is_like_one_on_a_disk():
    path = buckets.BucketPath(url("a/b.tar.gz"))
    assert (path.name, path.suffix, path.key) == ("b.tar.gz", ".gz", "a/b.tar.gz")
    assert str(path.parent / "c") == str(path.with_name("c")) == url("a/c")
    assert path.parent.parent == path.parent.parent.parent == buckets.BucketPath(url())
    assert path.relative_to(path.parent.parent).as_posix() == "a/b.tar.gz"
    assert str(path.with_suffix(".png")) == url("a/b.tar.png")
    assert sorted([path, path.parent]) == [path.parent, path]
    assert len({path, buckets.BucketPath(str(path))}) == 1
