import json
import resource
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soft_jax.errors import UserError
from soft_jax.store import folder
from soft_jax.training import train_step

IDENTITY = {"method": "softtf", "tasks": 2, "layers": (1, 2)}
TREES = {
    "adapter": {
        "key": jnp.arange(5.0),
        "mask": {"blocks_0": {"kernel": jax.random.normal(jax.random.key(0), (64, 48))}},
    },
    "shared": {"head": {"bias": jnp.ones(3)}},
}


@pytest.fixture
def sharding():
    return train_step.replicated(train_step.data_mesh())


@pytest.fixture
def opened(tmp_path):
    with closing(folder.Store(tmp_path / "run")) as opened:
        opened.claim(IDENTITY)
        yield opened


def keep(opened, task=0, **manifest):
    opened.save_task(task, TREES, manifest)
    return opened.task_path(task)


def load(opened, sharding, task=0):
    return opened.load_task(task, TREES, sharding)


def chunk(path, array="mask.blocks_0.kernel"):
    return path / "adapter" / array / "0.0"


def test_a_task_comes_back_to_the_bit(opened, sharding):
    keep(opened, note="grüße", metrics={"a": [1, 2.5]})
    items, manifest = load(opened, sharding)
    jax.tree.map(np.testing.assert_array_equal, items, TREES)
    assert items["adapter"]["key"].sharding == sharding
    assert (manifest["note"], manifest["metrics"]) == ("grüße", {"a": [1, 2.5]})
    assert set(manifest["sha256"]) == {
        "adapter/key",
        "adapter/mask.blocks_0.kernel",
        "shared/head.bias",
    }
    assert opened.finished() == 1


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


def test_truncated_and_missing_files(opened, sharding):
    path = keep(opened)
    file = chunk(path)
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match=r"000: array adapter/mask.blocks_0.kernel"):
        load(opened, sharding)
    file.unlink()
    with pytest.raises(UserError, match=r"000: array adapter/mask.blocks_0.kernel"):
        load(opened, sharding)


def test_damaged_manifest(opened, sharding):
    path = keep(opened, metrics={"correct": 17})
    file = path / "manifest" / "metadata"
    text = file.read_text()
    file.write_text(text.replace("17", "18"))
    with pytest.raises(UserError, match="the manifest does not have the SHA-256"):
        load(opened, sharding)
    file.write_text(text[:50])
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
    assert reader.read_identity() == opened.identity
    assert reader.present() == [0]
    with pytest.raises(UserError, match=r"holds no run \(config.json can't be read: No such file"):
        folder.Reader(opened.root / "tasks").read_identity()
    assert folder.Reader(opened.root / "none").present() == []


def test_a_full_disk_loses_nothing(opened, sharding):
    """A save that runs out of room: one error, the task before it intact, nothing half-written
    left.
    """
    keep(opened)
    large = {"key": jax.random.normal(jax.random.key(1), (300_000,))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"tasks/001 could not be saved .*Finished tasks are as they were"
        ):
            opened.save_task(1, TREES | {"adapter": large}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in opened.tasks.iterdir()] == ["000"]
    assert opened.finished() == 1
    load(opened, sharding)


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


def test_another_config_is_refused_with_the_difference(opened):
    opened.compare(IDENTITY)  # the same: fine
    opened.compare({"tasks": 2})  # as much as is known yet
    for check in (opened.compare, opened.claim):
        with pytest.raises(UserError, match=r"another config.*\n  tasks: 2 there, 3 now"):
            check(IDENTITY | {"tasks": 3})
    (opened.root / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        opened.compare(IDENTITY)
    (opened.root / "config.json").unlink()
    keep(opened)
    with pytest.raises(UserError, match=r"has tasks but no config.json"):
        opened.compare(IDENTITY)


def test_a_task_from_elsewhere_is_refused(opened, sharding):
    """Another task's folder, or another run's, in the place of this one: whole, but not this
    task.
    """
    keep(opened, 0).rename(opened.task_path(1))
    with pytest.raises(UserError, match=r"001: task is 0, expected 1: this task is from elsewhere"):
        load(opened, sharding, 1)
    opened.task_path(1).rename(opened.task_path(0))
    opened.identity["backbone_sha256"] = "another"
    with pytest.raises(UserError, match=r"000: backbone_sha256 is None, expected 'another'"):
        load(opened, sharding, 0)


def test_a_workdir_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"workdir: .*file/run can't be written .*--workdir"):
        folder.Store(tmp_path / "file" / "run")


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


def test_a_damaged_training_state_is_moved_not_deleted(opened, sharding):
    opened.save_training(0, 5, TREES, 1.0)
    aside = opened.set_aside_training()
    assert opened.load_training(0, TREES, sharding) is None
    assert [path.name.startswith("000-000005-") for path in aside.iterdir()] == [True]


def test_one_process_at_a_time(opened):
    with pytest.raises(UserError, match="workdir: another process is running in"):
        folder.Store(opened.root)
    opened.close()
    folder.Store(opened.root).close()


def test_config_is_readable(opened):
    assert json.loads((opened.root / "config.json").read_text()) == IDENTITY | {"layers": [1, 2]}
