import dataclasses
import gc
import json
import logging
import os
import re
import resource
import stat
import subprocess
import sys
import tarfile
import threading
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soft_jax import __main__ as command_line
from soft_jax import distributed, pytrees
from soft_jax.errors import UserError
from soft_jax.store import checkpoint, files, folder, formats
from soft_jax.store.records import RunRecord, TaskManifest

RECORD = RunRecord(
    settings={"method": "softtf", "tasks": 2, "layers": (1, 2)},
    backbone_sha256="aa",
    dataset_sha256="bb",
    tasks=None,
)
OTHER = dataclasses.replace(RECORD, settings=RECORD.settings | {"tasks": 3})
MANIFEST = TaskManifest(
    task=0,
    classes=(0, 1),
    class_names=("null", "grüße"),
    num_classes=4,
    num_tasks=2,
    config={"method": "softtf"},
    backbone={"name": "tiny", "sha256": "aa"},
    metrics={"p": [{"correct": 17, "task_correct": 18, "total": 20, "identified": {"0": 20}}]},
    seconds={"train": 2.5},
    parameters={"adapter": 5, "shared": 3, "fixed": 0},
    step_flops=None,
    bytes={"adapter": 20},
    mask_distance_from_one={},
    weight_drift={},
    mask_density={},
    versions={"jax": "0"},
)
TREES = {
    "adapter": {
        "key": jnp.arange(5.0),
        "mask": {"blocks_0": {"kernel": jax.random.normal(jax.random.key(0), (64, 48))}},
    },
    "shared": {"head": {"bias": jnp.ones(3)}},
}


@pytest.fixture
def sharding():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@pytest.fixture
def opened(tmp_path):
    with closing(folder.Store(tmp_path / "run")) as opened:
        opened.claim(RECORD, {})
        yield opened


@pytest.fixture
def old(tmp_path):
    """A finished run of format 0, and one that was killed in its second task."""
    with tarfile.open(Path(__file__).parent / "data" / "format_0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


FINISHED = "tables/dualprompt+softtf-digits-2x-be97c3dd/seed59"


def keep(opened, task=0, **changes):
    opened.save_task(task, TREES, dataclasses.replace(MANIFEST, task=task, **changes))
    return opened.task_path(task)


def load(opened, sharding, task=0):
    return opened.load_task(task, TREES, sharding)


def chunk(path, array="mask.blocks_0.kernel"):
    return path / "adapter" / array / "0.0"


def templates(hashes, path):
    """Templates of all arrays of a checkpoint, by item, from what zarr says of each."""
    out = {}
    for key in hashes:
        item, leaf = key.split("/")
        array = json.loads((path / item / leaf / ".zarray").read_text())
        like = jax.ShapeDtypeStruct(array["shape"], np.dtype(array["dtype"]))
        out.setdefault(item, {})[leaf] = like
    return out


def edit_config(root, change):
    config = json.loads((root / "config.json").read_text())
    change(config)
    (root / "config.json").write_text(json.dumps(config))


def test_a_task_comes_back_to_the_bit(opened, sharding):
    keep(opened)
    items, manifest = load(opened, sharding)
    jax.tree.map(np.testing.assert_array_equal, items, TREES)
    assert items["adapter"]["key"].sharding == sharding
    assert set(manifest.sha256) == {
        "adapter/key",
        "adapter/mask.blocks_0.kernel",
        "shared/head.bias",
    }
    assert dataclasses.replace(manifest, sha256={}) == dataclasses.replace(MANIFEST, run=RECORD)
    assert opened.load_task_manifest(0) == manifest
    assert opened.finished() == 1


def test_a_workdir_that_is_named_by_the_folder_above(tmp_path, sharding, monkeypatch):
    """TensorStore takes no path with ".." in it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with closing(folder.Store("../run")) as store:
        store.claim(RECORD, {})
        keep(store)
        jax.tree.map(np.testing.assert_array_equal, load(store, sharding)[0], TREES)
    assert (tmp_path / "run/tasks/000").is_dir()


def test_every_flipped_bit_is_found(opened, sharding):
    """One bit anywhere in an array's bytes: an error that names the array."""
    path = keep(opened)
    file = chunk(path)
    good = file.read_bytes()
    for position in np.linspace(0, len(good) - 1, 12).astype(int):
        bad = bytearray(good)
        bad[position] ^= 1
        file.write_bytes(bad)
        with pytest.raises(UserError, match=r"array adapter/mask.blocks_0.kernel .*retrain"):
            load(opened, sharding)
    file.write_bytes(good)
    load(opened, sharding)


def test_truncated_empty_and_missing_files(opened, sharding, capfd):
    """One error, and nothing is printed beside it, now or when what failed is collected."""
    path = keep(opened)
    file = chunk(path)
    good = file.read_bytes()
    capfd.readouterr()
    for content in (good[: len(good) // 2], b"", None):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(UserError, match=r"000: array adapter/mask.blocks_0.kernel") as raised:
            load(opened, sharding)
        assert len(str(raised.value).splitlines()) == 1
        del raised
        gc.collect()
    assert capfd.readouterr() == ("", "")


def test_damaged_manifest(opened, sharding):
    path = keep(opened)
    file = path / "manifest" / "metadata"
    text = file.read_text()
    file.write_text(text.replace("17", "18"))
    with pytest.raises(UserError, match="the manifest does not have the SHA-256"):
        load(opened, sharding)
    file.write_text(text[:50])
    with pytest.raises(UserError, match="000: the manifest can't be read"):
        load(opened, sharding)
    file.unlink()
    os.mkfifo(file)  # a pipe is not waited for
    with pytest.raises(UserError, match="000: the manifest can't be read"):
        load(opened, sharding)


def test_another_method_or_shape(opened, sharding):
    keep(opened)
    with pytest.raises(UserError, match="adapter/mask.blocks_0.kernel is only in the checkpoint"):
        opened.load_task(0, {"adapter": {"key": TREES["adapter"]["key"]}}, sharding)
    with pytest.raises(UserError, match="adapter/extra is only in the configured method"):
        opened.load_task(0, {"adapter": TREES["adapter"] | {"extra": jnp.ones(1)}}, sharding)
    with pytest.raises(UserError, match="array adapter/key"):
        opened.load_task(0, {"adapter": TREES["adapter"] | {"key": jnp.ones(4)}}, sharding)


def test_a_part_of_a_task(opened, sharding):
    """Only what is asked for is read: a damaged array beside it does no harm."""
    path = keep(opened)
    chunk(path).unlink()
    part = {"adapter": {"key": TREES["adapter"]["key"]}}
    items, _ = opened.load_task(0, part, sharding, part=True)
    jax.tree.map(np.testing.assert_array_equal, items, part)
    with pytest.raises(UserError, match="adapter/extra is only in the configured method"):
        opened.load_task(0, {"adapter": {"extra": jnp.ones(1)}}, sharding, part=True)
    with pytest.raises(UserError, match=r"tasks/001 is missing"):
        opened.load_task(1, part, sharding, part=True)


def test_reading_beside_a_running_process(opened):
    keep(opened)
    reader = folder.Reader(opened.root)
    assert reader.read_record() == RECORD
    assert reader.present() == [0]
    with pytest.raises(UserError, match=r"holds no run \(config.json can't be read: No such file"):
        folder.Reader(opened.root / "tasks").read_record()
    assert folder.Reader(opened.root / "none").present() == []


def test_names_that_are_no_tasks(opened):
    """Only the name that a task is saved under is that task."""
    keep(opened)
    for name in ("0", "00", "0001", "0000", "²", "٣٣٣", "1000.tmp", "-01", ".DS_Store"):
        (opened.tasks / name).mkdir()
    assert opened.present() == [0]
    assert opened.finished() == 1
    (opened.tasks / "1000").mkdir()
    assert opened.present() == [0, 1000]


def test_a_full_disk_loses_nothing(opened, sharding, caplog, capfd):
    """A save that runs out of room: one error and nothing beside it, the task before it intact,
    nothing half-written left.
    """
    keep(opened)
    large = {"key": jax.random.normal(jax.random.key(1), (300_000,))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"tasks/001 could not be saved .*Finished tasks are as they were"
        ):
            opened.save_task(1, TREES | {"adapter": large}, dataclasses.replace(MANIFEST, task=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caplog.records, capfd.readouterr()) == ([], ("", ""))
    assert [path.name for path in opened.tasks.iterdir()] == ["000"]
    assert opened.finished() == 1
    load(opened, sharding)


def test_what_orbax_logs_is_there_for_those_who_ask(opened, caplog):
    """By absl's verbosity or by Python's levels; else nothing of it is."""
    keep(opened)
    assert caplog.records == []
    with caplog.at_level(logging.INFO):
        keep(opened, 1)
    assert any("orbax" in record.pathname for record in caplog.records)


def test_what_a_killed_save_left_is_removed(opened):
    partial = opened.tasks / "000.orbax-checkpoint-tmp"
    partial.mkdir()
    opened.close()
    with closing(folder.Store(opened.root)) as again:
        assert not partial.exists()
        assert again.finished() == 0


def test_a_task_missing_among_others(opened):
    keep(opened, 0)
    keep(opened, 1)
    opened.task_path(0).rename(opened.root / "elsewhere")
    with pytest.raises(UserError, match="tasks/000 is missing, later tasks are there"):
        opened.finished()


def test_a_large_number_of_a_task_fills_no_memory(opened):
    opened.tasks.joinpath("9" * 20, "manifest").mkdir(parents=True)
    assert opened.present() == [int("9" * 20)]
    with pytest.raises(UserError, match="tasks/000 is missing, later tasks are there"):
        opened.finished()


def test_a_config_that_is_nested_too_deeply_is_damaged(opened):
    (opened.root / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config.json is damaged \(maximum recursion depth"):
        opened.read_record()


def test_one_process_at_a_time(opened):
    with pytest.raises(UserError, match="workdir: another process is running in"):
        folder.Store(opened.root)
    opened.close()
    folder.Store(opened.root).close()


# Text files


def test_a_text_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "grüße")
    assert path.read_bytes() == "grüße".encode()
    (tmp_path / ".a.txt.partial").write_text("of a process that was killed, and longer")
    files.write_text(path, "two")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a.txt could not be written \(File too large\)"):
            files.write_text(path, "3" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "two"}


def test_a_text_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The file is synced, then renamed, then its folder is synced."""
    done, sync, rename = [], os.fsync, os.replace

    def note_sync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def note_rename(one, other):
        done.append("renamed")
        rename(one, other)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    files.write_text(tmp_path / "a.txt", "one")
    assert done == ["file", "renamed", "folder"]


# What a run is


def test_another_config_is_refused_with_the_difference(opened):
    opened.compare(RECORD, {})  # the same: fine
    opened.compare_settings(RECORD.settings, {})
    other = r"another config.*\n  tasks: 2 there, 3 now$"
    for check in (opened.compare, opened.claim, folder.Reader(opened.root).compare):
        with pytest.raises(UserError, match=other):
            check(OTHER, {})
    with pytest.raises(UserError, match=other):
        opened.compare_settings(OTHER.settings, {})
    with pytest.raises(UserError, match=r"another config.*\n  dataset_sha256: 'bb' there, 'c'"):
        opened.compare(dataclasses.replace(RECORD, dataset_sha256="c"), {})
    (opened.root / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        opened.compare(RECORD, {})


def test_tasks_without_a_config_are_refused(opened):
    keep(opened)
    (opened.root / "config.json").unlink()
    for check in (opened.compare, opened.claim):
        with pytest.raises(UserError, match=r"has tasks but no config.json"):
            check(RECORD, {})
    with pytest.raises(UserError, match=r"has tasks but no config.json"):
        opened.compare_settings(RECORD.settings, {})


def test_a_new_setting_makes_no_other_run(opened):
    """A program that knows a setting more goes on with the run at the setting's default, and with
    config.json as it is.
    """
    keep(opened)
    opened.close()
    before = (opened.root / "config.json").read_bytes()
    newer = dataclasses.replace(RECORD, settings=RECORD.settings | {"new": 1})
    with closing(folder.Store(opened.root)) as again:
        with pytest.raises(UserError, match=r"\n  new: 2 there, 1 now"):
            again.claim(newer, {"new": 2})
        assert again.claim(newer, {"new": 1}) is None
        assert again.record == RECORD
        keep(again, 1)
        assert again.load_task_manifest(1).run == RECORD
    assert (opened.root / "config.json").read_bytes() == before


def test_config_is_readable(opened):
    config = json.loads((opened.root / "config.json").read_text())
    assert config["settings"] == {"method": "softtf", "tasks": 2, "layers": [1, 2]}
    assert config["format"] == 1
    assert config["fingerprint"] == RECORD.fingerprint


def test_a_config_that_was_changed_by_hand_is_found(opened):
    keep(opened)
    good = (opened.root / "config.json").read_text()
    for change in (
        lambda config: config["settings"].pop("layers"),
        lambda config: config["settings"].update(more=1),
        lambda config: config["settings"].update(tasks=3),
    ):
        edit_config(opened.root, change)
        with pytest.raises(UserError, match=r"config.json: .*fingerprint differs"):
            folder.Reader(opened.root).load_task_manifest(0)
        (opened.root / "config.json").write_text(good)
    edit_config(opened.root, lambda config: config.update(format=2, written_by="9.9"))
    with pytest.raises(UserError, match=r"config.json: it has format 2, written by soft_jax 9.9"):
        folder.Reader(opened.root).read_record()


def test_a_task_from_elsewhere_is_refused(opened, sharding):
    """Another task's folder, or another run's, in the place of this one: whole, but not this
    task.
    """
    keep(opened, 0).rename(opened.task_path(1))
    with pytest.raises(UserError, match=r"001: .*from elsewhere.*\(task: 0 there, 1 now\)"):
        load(opened, sharding, 1)
    opened.task_path(1).rename(opened.task_path(0))
    fewer = {key: value for key, value in RECORD.settings.items() if key != "layers"}
    for change, difference in (
        ({"backbone_sha256": "c"}, "backbone_sha256: 'aa' there, 'c' now"),
        ({"settings": RECORD.settings | {"more": 1}}, "more: nothing there, 1 now"),
        ({"settings": fewer}, r"layers: \[1, 2\] there, nothing now"),
        ({"tasks": ((0,), (1,))}, r"classes of the tasks: the equal split there, \[\[0\], \[1\]\]"),
    ):
        opened.record = dataclasses.replace(RECORD, **change)
        with pytest.raises(UserError, match=rf"000: .*from elsewhere.*{difference}"):
            load(opened, sharding, 0)


def test_processes_that_see_different_folders_are_told(opened, monkeypatch):
    """What each process finds there is brought down to a number; here another's is higher."""
    keep(opened)
    found = []

    def all_max(*values):
        found.append(values)
        return (values[0] + 1, *values[1:]) if len(values) == 2 else values

    monkeypatch.setattr(distributed, "all_max", all_max)
    with pytest.raises(UserError, match="the processes of this run see different things in"):
        opened.claim(RECORD, {})
    keep(opened, 1)
    with pytest.raises(UserError, match="see different things"):
        opened.claim(RECORD, {})
    assert len({values for values in found if len(values) == 2}) == 2


# A workdir that can't be, or is no longer


def test_a_workdir_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"workdir: .*file/run can't be written .*--workdir"):
        folder.Store(tmp_path / "file" / "run")


def moved(root):
    root.rename(root.with_name("elsewhere"))


def replaced(root):
    """Moved, and a copy in its place."""
    moved(root)
    (root / "tasks").mkdir(parents=True)
    (root / "training").mkdir()
    (root / "config.json").write_bytes((root.with_name("elsewhere") / "config.json").read_bytes())


def of_another_run(root):
    (root / "config.json").unlink()
    text = json.dumps({"format": 1, "written_by": "0", **OTHER.to_json()})
    files.write_text(root / "config.json", text)


def without_config(root):
    (root / "config.json").unlink()


def without_tasks(root):
    (root / "tasks").rename(root / "elsewhere")


@pytest.mark.parametrize("change", [moved, replaced, of_another_run, without_config, without_tasks])
def test_nothing_is_saved_in_a_workdir_that_is_no_longer_the_runs(opened, change):
    def files():
        return sorted(str(path) for path in opened.root.parent.rglob("*"))

    change(opened.root)
    before = files()
    for save in (
        lambda: keep(opened),
        lambda: opened.save_training(0, 5, TREES, 1.0),
        opened.set_aside_training,
    ):
        with pytest.raises(UserError, match=r"is no longer the folder that this run") as caught:
            save()
        assert "\n" not in str(caught.value)
    assert files() == before


def test_a_workdir_that_was_put_back_is_the_runs_again(opened, sharding):
    moved(opened.root)
    with pytest.raises(UserError, match="Put it back as it was"):
        keep(opened)
    opened.root.with_name("elsewhere").rename(opened.root)
    keep(opened)
    load(opened, sharding)


@pytest.mark.parametrize("name", [".lock", "config.json", ".config.json.partial"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_place_of_a_file_is_refused(tmp_path, name, there):
    """Its target stays as it is, and is not made."""
    target, link = tmp_path / "target", tmp_path / "run" / name
    if there:
        target.write_text("mine")
    link.parent.mkdir()
    link.symlink_to(target)
    with pytest.raises(UserError, match=rf"{re.escape(str(link))} is a symbolic link"):
        folder.Store(tmp_path / "run")
    assert (target.read_text() if target.exists() else None) == ("mine" if there else None)
    assert os.readlink(link) == str(target)


@pytest.mark.parametrize("name", ["tasks", "training", "damaged"])
def test_a_link_in_the_place_of_a_folder_is_refused(tmp_path, name):
    """Nothing in its target is removed."""
    state = tmp_path / "target" / "000-000005.orbax-checkpoint-tmp"
    state.mkdir(parents=True)
    link = tmp_path / "run" / name
    link.parent.mkdir()
    link.symlink_to(tmp_path / "target")
    for open_ in (folder.Store, lambda root: folder.Reader(root).read_record()):
        with pytest.raises(UserError, match=rf"{re.escape(str(link))} is a symbolic link"):
            open_(tmp_path / "run")
    assert state.exists()


def test_links_that_come_while_a_run_trains_are_not_followed(opened, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("mine")
    (opened.training / "000-000005").symlink_to(target)
    (opened.training / "x.orbax-checkpoint-tmp").symlink_to(target)
    with pytest.raises(UserError, match="000-000005 is a symbolic link"):
        opened.load_training(0, TREES, None)
    opened.save_training(0, 6, TREES, 1.0)
    opened.close()
    folder.Store(opened.root).close()
    assert [path.name for path in opened.training.iterdir()] == ["000-000006"]
    partial = tmp_path / ".a.txt.partial"
    partial.symlink_to(target / "mine")
    with pytest.raises(UserError, match=r".a.txt.partial is a symbolic link"):
        files.write_text(tmp_path / "a.txt", "text")
    assert (target / "mine").read_text() == "mine"


def test_a_file_that_shares_the_locks_place_is_not_emptied(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    os.link(tmp_path / "mine", tmp_path / "run" / ".lock")
    folder.Store(tmp_path / "run").close()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_workdir_may_be_reached_by_a_link(tmp_path, sharding):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with closing(folder.Store(tmp_path / "run")) as opened:
        opened.claim(RECORD, {})
        keep(opened)
        load(opened, sharding)


# The state of the task in training


def test_training_state(opened, sharding):
    assert opened.load_training(0, TREES, sharding) is None
    opened.save_training(0, 5, TREES, 1.5)
    (opened.training / ".DS_Store").write_text("not ours")
    opened.save_training(0, 10, jax.tree.map(lambda x: x + 1, TREES), 2.5)
    assert sorted(path.name for path in opened.training.iterdir()) == [".DS_Store", "000-000010"]
    state, seconds = opened.load_training(0, TREES, sharding)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1), state, TREES)
    assert seconds == 2.5
    assert opened.load_training(1, TREES, sharding) is None
    keep(opened)
    assert [path.name for path in opened.training.iterdir()] == [".DS_Store"]


def test_the_latest_training_state_is_that_of_the_most_steps(opened, sharding):
    """Also where their numbers have different lengths, as after a kill between save and removal."""
    opened.save_training(0, 999_999, TREES, 1.0)
    aside = opened.root / "aside"
    (opened.training / "000-999999").rename(aside)
    opened.save_training(0, 1_000_000, TREES, 2.0)
    aside.rename(opened.training / "000-999999")
    assert opened.load_training(0, TREES, sharding)[1] == 2.0


def test_a_damaged_training_state_is_moved_not_deleted(opened, sharding):
    opened.save_training(0, 5, TREES, 1.0)
    aside = opened.set_aside_training()
    assert opened.load_training(0, TREES, sharding) is None
    assert [path.name.startswith("000-000005-") for path in aside.iterdir()] == [True]


def test_a_training_state_of_another_run_is_not_used(opened, tmp_path, sharding):
    with closing(folder.Store(tmp_path / "other")) as other:
        other.claim(OTHER, {})
        other.save_training(0, 5, TREES, 1.0)
        (other.training / "000-000005").rename(opened.training / "000-000005")
    with pytest.raises(UserError, match=r"000-000005: this training state is of another run"):
        opened.load_training(0, TREES, sharding)


@pytest.mark.parametrize("name", ["001-000005", "000-000006"])
def test_a_training_state_of_another_task_or_step_is_not_used(opened, sharding, name):
    opened.save_training(0, 5, TREES, 1.0)
    (opened.training / "000-000005").rename(opened.training / name)
    with pytest.raises(UserError, match=rf"{name}: this training state is of task 0 after step 5"):
        opened.load_training(int(name[:3]), TREES, sharding)


def test_a_training_state_whose_own_step_is_another_is_not_used(opened, sharding):
    state = {"step": jnp.int32(4), "trainable": TREES}
    opened.save_training(0, 5, state, 1.0)
    with pytest.raises(UserError, match=r"000-000005: .* after step 4, expected 5"):
        opened.load_training(0, state, sharding)
    opened.save_training(0, 6, state | {"step": jnp.int32(6)}, 1.0)
    assert int(opened.load_training(0, state, sharding)[0]["step"]) == 6


def test_a_training_state_without_a_config_is_set_aside(opened, sharding):
    """Nothing says then which run it is of."""
    opened.save_training(0, 5, TREES, 1.0)
    (opened.root / "config.json").unlink()
    opened.close()
    with closing(folder.Store(opened.root)) as again:
        aside = again.claim(RECORD, {})
        assert again.load_training(0, TREES, sharding) is None
        assert [path.name[:10] for path in aside.iterdir()] == ["000-000005"]
        assert again.claim(RECORD, {}) is None  # there is nothing more


# Verified once


@pytest.fixture
def hashed(monkeypatch):
    """How many arrays were hashed."""
    count, sha256 = [], pytrees.sha256

    def counting(array):
        count.append(1)
        return sha256(array)

    monkeypatch.setattr(pytrees, "sha256", counting)
    return count


def test_an_array_is_hashed_once_as_long_as_its_files_stay(opened, sharding, hashed):
    path = keep(opened)
    hashed.clear()
    for _ in range(3):
        items, _ = load(opened, sharding)
    assert len(hashed) == 3  # arrays
    jax.tree.map(np.testing.assert_array_equal, items, TREES)
    file = chunk(path)
    bad = bytearray(file.read_bytes())
    bad[len(bad) // 2] ^= 1
    file.write_bytes(bad)
    with pytest.raises(UserError, match=r"array adapter/mask.blocks_0.kernel"):
        load(opened, sharding)
    with pytest.raises(UserError, match=r"array adapter/mask.blocks_0.kernel"):
        load(opened, sharding)


def test_another_task_in_the_place_of_a_verified_one_is_hashed_anew(opened, sharding, hashed):
    path = keep(opened)
    load(opened, sharding)
    files.of(path).remove(path)
    keep(opened, seconds={"train": 1.0})
    hashed.clear()
    load(opened, sharding)
    assert len(hashed) == 3


def test_an_array_is_verified_as_what_it_is_read_as(opened, sharding):
    keep(opened)
    load(opened, sharding)
    half = {"adapter": {"key": jnp.zeros(5, jnp.float16)}}
    with pytest.raises(UserError, match="array adapter/key is not what was saved"):
        opened.load_task(0, half, sharding, part=True)


def test_threads_verify_together(opened, sharding):
    for task in range(3):
        keep(opened, task)
    failed = []

    def read(first):
        try:
            for task in range(3):
                items, _ = load(opened, sharding, (first + task) % 3)
                jax.tree.map(np.testing.assert_array_equal, items, TREES)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_manifest_is_read_without_orbax(opened, monkeypatch):
    keep(opened)

    def fail(*_):
        raise AssertionError("Orbax was asked")

    monkeypatch.setattr(checkpoint.ocp, "Checkpointer", fail)
    assert opened.load_task_manifest(0).seconds == {"train": 2.5}


# Runs of format 0


def test_a_finished_run_of_format_0_opens(old, sharding):
    reader = folder.Reader(old / FINISHED)
    assert reader.finished() == 2
    assert reader.read_record().settings["target_modules"] == "qkv+proj"
    for task in range(2):
        path = reader.task_path(task)
        hashes = reader.load_task_manifest(task).sha256
        items, manifest = reader.load_task(task, templates(hashes, path), sharding)
        assert {item: set(leaves) for item, leaves in items.items()} == {
            "adapter": {"key", "prompt"}
            | {f"mask.blocks_{n}.attn.{name}.kernel" for n in (2, 3) for name in ("qkv", "proj")},
            "shared": {"g_prompt", "head.bias", "head.kernel"},
            "statistics": {"gram", "sums"},
        }
        assert manifest.classes == tuple(range(5 * task, 5 * task + 5))
        assert manifest.run == reader.record
        assert manifest.metrics["oracle/task_given"][task]["correct"] == (7, 8)[task]


def test_a_killed_run_of_format_0_is_continued(old, sharding):
    """By a run that has only the settings that its method uses, and a new one; config.json stays,
    new tasks are of the new format, and all are of one run.
    """
    root = old / "killed"
    there = folder.Reader(root).read_record()
    used = {key: there.settings[key] for key in there.settings.keys() - {"pool_size", "rank"}}
    now = dataclasses.replace(there, settings=used | {"scenario": "equal"})
    before = (root / "config.json").read_bytes()
    with closing(folder.Store(root)) as opened:
        with pytest.raises(UserError, match=r"another config.*\n  seed: 59 there, 60 now$"):
            opened.claim(
                dataclasses.replace(now, settings=now.settings | {"seed": 60}),
                {"scenario": "equal"},
            )
        assert opened.claim(now, {"scenario": "equal"}) is None
        path = opened.training / "001-000003"
        hashes = checkpoint.load_manifest(path)["sha256"]
        template = templates(hashes, path)["state"]
        state, seconds = opened.load_training(1, template, sharding)
        assert seconds == pytest.approx(0.18727, abs=1e-5)
        assert int(state["step"]) == 3
        assert {f"state/{name}" for name in state} == set(hashes)
        keep(opened, 1)
        assert [opened.load_task_manifest(task).run for task in range(2)] == [there, there]
        written = json.loads((opened.task_path(1) / "manifest" / "metadata").read_text())
        assert written["format"] == len(formats.MIGRATIONS["task"])
    assert (root / "config.json").read_bytes() == before


@pytest.mark.parametrize("key", ["seed", "prefix_layout", "backbone_sha256"])
def test_a_key_missing_in_a_config_of_format_0_is_named(old, key):
    edit_config(old / FINISHED, lambda config: config.pop(key))
    with pytest.raises(UserError, match=rf"config.json: {key} is missing"):
        folder.Reader(old / FINISHED).read_record()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 60}, "seed: 59 there, 60 now"),
        ({"keep": 0.5}, "density: 0.9 there, 0.5 now"),
        ({"dataset_sha256": "c"}, "dataset_sha256: .* there, 'c' now"),
    ],
)
def test_a_config_of_format_0_that_was_changed_is_not_its_tasks(old, change, difference):
    edit_config(old / FINISHED, lambda config: config.update(change))
    reader = folder.Reader(old / FINISHED)
    with pytest.raises(UserError, match=rf"000: this task is from elsewhere.*{difference}"):
        reader.load_task_manifest(0)


@pytest.mark.parametrize("name", ["000-000003", "001-000004"])
def test_a_training_state_of_format_0_of_another_task_or_step_is_not_used(old, sharding, name):
    root = old / "killed"
    template = templates(
        checkpoint.load_manifest(root / "training" / "001-000003")["sha256"],
        root / "training" / "001-000003",
    )["state"]
    (root / "training" / "001-000003").rename(root / "training" / name)
    with closing(folder.Store(root)) as opened:
        opened.claim(folder.Reader(root).read_record(), {})
        with pytest.raises(UserError, match=rf"{name}: .* is of task 1 after step 3"):
            opened.load_training(int(name[:3]), template, sharding)


def test_a_training_state_of_format_0_in_a_newer_run_is_not_used(old, opened, sharding):
    (old / "killed" / "training" / "001-000003").rename(opened.training / "001-000003")
    with pytest.raises(UserError, match=r"001-000003: .* older format than .* from elsewhere"):
        opened.load_training(1, TREES, sharding)


def test_a_training_state_of_format_0_without_a_config_is_set_aside(old, sharding):
    root = old / "killed"
    record = folder.Reader(root).read_record()
    (root / "config.json").unlink()
    (root / "tasks" / "000").rename(root / "elsewhere")
    with closing(folder.Store(root)) as opened:
        assert [path.name[:10] for path in opened.claim(record, {}).iterdir()] == ["001-000003"]
        assert opened.load_training(1, TREES, sharding) is None


# The cache's folder


def cache_folder(tmp_path, uid=None, **environment):
    """`cache.CACHE` in a process whose user, of the number `uid`, has no home directory."""
    code = (
        "import os, pathlib\n"
        f"os.getuid = lambda uid=os.getuid(): {uid} or uid\n"
        "def expanduser(self):\n"
        "    if str(self).startswith('~'): raise RuntimeError('no home directory')\n"
        "    return self\n"
        "pathlib.Path.expanduser = expanduser\n"
        "from soft_jax import cache\n"
        "print(cache.CACHE)"
    )
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), **environment}
    return Path(
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
        ).stdout.strip()
    )


def test_a_user_without_a_home_has_a_cache(tmp_path):
    folder_ = cache_folder(tmp_path)
    assert folder_ == tmp_path / f"soft_jax-{os.getuid()}"
    assert folder_.stat().st_mode & 0o777 == 0o700
    assert cache_folder(tmp_path) == folder_
    assert cache_folder(tmp_path, SOFT_JAX_CACHE="/a/b") == Path("/a/b")


@pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")
def test_names_that_are_no_utf_8(tmp_path, capsys):
    """A report has the settings, and data_dir may be any name; arrays can't be stored under it."""
    name = os.fsdecode(b"ph\xe9")
    files.write_text(tmp_path / "report.md", f"data_dir={name}, seed=59 θ\n")
    assert (tmp_path / "report.md").read_text("utf-8") == "data_dir=ph\\xe9, seed=59 θ\n"
    with pytest.raises(UserError, match=r"^workdir: '.*ph\\\\xe9' is not UTF-8; name a folder"):
        folder.Store(tmp_path / name)
    assert command_line.main(["train", f"--workdir={tmp_path / name}"]) == 1
    assert re.match(r"error: --workdir: '.*xe9' is not UTF-8", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_a_cache_of_a_user_who_is_not_there_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "soft_jax", "table", "7", "--list"],
        env=os.environ | {"SOFT_JAX_CACHE": "~nobody-of-this-name/c"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error: SOFT_JAX_CACHE: '~nobody-of-this-name/c' can't be expanded" in done.stderr


def test_a_cache_that_is_another_users_is_not_used(tmp_path):
    """Programs that are run are kept there. A link may lead to anyone's folder."""
    name = f"soft_jax-{os.getuid()}"
    (tmp_path / "theirs").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "theirs")
    (tmp_path / "soft_jax-12345").mkdir()  # ours, not 12345's
    for uid in (None, 12345):
        made = cache_folder(tmp_path, uid)
        assert made.parent == tmp_path and made.is_dir()
        assert made.name not in (name, "soft_jax-12345")


def test_a_run_that_is_refused_leaves_no_folders(tmp_path):
    """What was there before stays, and so does whatever somebody put in meanwhile."""
    with closing(folder.Store(tmp_path / "runs/mine")):
        assert (tmp_path / "runs/mine/tasks").is_dir()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with closing(folder.Store(tmp_path / "there")):
        pass
    assert list((tmp_path / "there").iterdir()) == []
    with closing(folder.Store(tmp_path / "runs/mine")):
        (tmp_path / "runs/note.txt").write_text("mine")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["note.txt"]
