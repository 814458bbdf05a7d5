import io

import numpy as np
import pytest
from PIL import Image

from soft_jax.data import batches, sources
from soft_jax.data.augmentation import Augment
from soft_jax.errors import UserError


def schedule(**changes) -> batches.BatchSampler:
    settings = {"seed": 0, "task": 1, "count": 11, "epochs": 3, "batch_size": 4, "devices": 3}
    return batches.BatchSampler(**settings | changes)


def test_an_epoch_sees_every_image_once():
    plan = schedule()
    assert (plan.steps_per_epoch, plan.steps, plan.padded) == (3, 9, 6)
    orders = []
    for epoch in range(3):
        every = [plan.batch(3 * epoch + index) for index in range(3)]
        assert [weights.tolist() for _, weights in every] == [
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0, 0],
        ]
        seen = np.concatenate([rows[weights > 0] for rows, weights in every])
        assert sorted(seen) == list(range(11))
        orders.append(tuple(seen))
    assert len(set(orders)) == 3
    others = [tuple(schedule(**change).batch(0)[0]) for change in ({"task": 0}, {"seed": 1})]
    assert len({tuple(plan.batch(0)[0]), *others}) == 3


def test_a_chunk_is_its_batches():
    plan = schedule()
    chunk = plan.chunk(2, 5, 8)
    for index in range(8):
        rows, weights = plan.batch(2 + index) if index < 5 else (np.zeros(6), np.zeros(6))
        np.testing.assert_array_equal(chunk["rows"][index], rows)
        np.testing.assert_array_equal(chunk["weights"][index], weights)


@pytest.fixture
def files(rng):
    """11 JPEG files of many shapes; a file's blue tells its number."""
    contents = []
    for index in range(11):
        height, width = rng.integers(20, 60, 2)
        image = rng.integers(100, 130, (height, width, 3)).astype(np.uint8)
        image[..., 2] = 20 * index
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        contents.append(file.getvalue())
    return sources.EncodedImages(
        contents.__getitem__,
        lambda i: f"file {i}",
        [""] * 11,
        np.arange(11, dtype=np.int32) % 4,
        np.arange(11),
    )


SPEC = Augment(16)


def everything(feed):
    return [(batch | {"rows": rows}) for batch, rows in feed]


def test_files_come_by_the_schedule(files):
    plan = schedule()
    every = everything(batches.from_files(plan, files, SPEC, 0))
    assert len(every) == plan.steps
    for step, batch in enumerate(every):
        rows, weights = plan.batch(step)
        np.testing.assert_array_equal(batch["rows"], rows)
        np.testing.assert_array_equal(batch["weights"], weights)
        assert batch["images"].shape == (6, 16, 16, 3)
        assert batch["images"].dtype == np.uint8
        real = weights > 0
        np.testing.assert_array_equal(batch["labels"][real], files.labels[rows[real]])
        blue = batch["images"][real][..., 2].mean(axis=(1, 2))
        assert np.abs(blue - 20 * rows[real]).max() < 10
    # The same image looks another way in another epoch.
    first, second = (
        next(b["images"][i] for b in part for i in range(4) if b["rows"][i] == 7)
        for part in (every[:3], every[3:6])
    )
    assert (first != second).any()


@pytest.mark.parametrize("first", [1, 3, 7])
def test_files_from_any_step_are_those_of_the_whole(files, first):
    plan = schedule()
    whole, rest = (everything(batches.from_files(plan, files, SPEC, start)) for start in (0, first))
    assert len(rest) == plan.steps - first
    for a, b in zip(whole[first:], rest, strict=True):
        assert {name: array.tobytes() for name, array in a.items()} == {
            name: array.tobytes() for name, array in b.items()
        }


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_a_batch_out(files, processes):
    plan = schedule()
    whole = everything(batches.from_files(plan, files, SPEC, 2))
    parts = [
        everything(batches.from_files(plan, files, SPEC, 2, process, processes))
        for process in range(processes)
    ]
    for step, batch in enumerate(whole):
        for name, array in batch.items():
            np.testing.assert_array_equal(
                np.concatenate([part[step][name] for part in parts]), array
            )


def test_files_load_where_cores_can_not_be_asked_for(files, monkeypatch):
    """macOS has no `sched_getaffinity`."""
    monkeypatch.delattr(batches.os, "sched_getaffinity", raising=False)
    plan = schedule(epochs=1)
    assert len(everything(batches.from_files(plan, files, SPEC, 0))) == plan.steps
    monkeypatch.setattr(batches.os, "cpu_count", lambda: None)  # as Python may answer
    assert batches._cores() == 1


def test_a_file_that_can_not_be_read_is_named(files):
    damaged = files.take(np.array([3, 4, 5]))
    broken = sources.EncodedImages(
        lambda i: b"GIF89a" if i == 4 else files.read(i),
        files.names,
        files.digests,
        damaged.labels,
        damaged.order,
    )
    with pytest.raises(UserError, match=r"dataset: file 4 can't be read .*; restore it"):
        everything(batches.from_files(schedule(count=3), broken, SPEC, 0))
