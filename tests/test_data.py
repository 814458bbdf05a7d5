import io
import shutil
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from soft_jax import data
from soft_jax.errors import UserError


class TinyColors(tfds.core.GeneratorBasedBuilder):
    """Four classes of PNG files, prepared without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    shape = (8, 8, 3)

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(names=list("abcd"))}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples(12), "test": self._generate_examples(8)}

    def _generate_examples(self, count):
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full(self.shape, 20 * i, np.uint8)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 4}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    builder = TinyColors(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder


def test_tfds_set(prepared):
    dataset = data.load("tiny_colors", str(prepared))
    assert dataset.class_names == ("a", "b", "c", "d")
    assert dataset.train.images.shape == (12, 8, 8, 3)
    assert dataset.train.images.dtype == np.uint8
    assert len(dataset.test.labels) == 8
    for split in (dataset.train, dataset.test):
        np.testing.assert_array_equal(split.images[:, 0, 0, 0] // 20 % 4, split.labels)


def test_cifar100_from_its_archive(tmp_path, monkeypatch):
    """The public archive's binary format, downloaded and prepared without TensorFlow, as TFDS's own cifar100."""
    rng = np.random.default_rng(0)
    records = {name: rng.integers(0, 20, (count, 3074), np.uint8) for name, count in (("train", 30), ("test", 10))}
    files = {f"{name}.bin": array.tobytes() for name, array in records.items()}
    files["fine_label_names.txt"] = "".join(f"fine{i}\n" for i in range(100)).encode()
    files["coarse_label_names.txt"] = "".join(f"coarse{i}\n" for i in range(20)).encode()
    archive = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-100-binary/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(tfds.download.DownloadManager, "download", lambda self, url: archive)
    dataset = data.load("cifar100", str(tmp_path / "data"))
    assert dataset.class_names[7] == "fine7"
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        theirs = records[name][:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        there = {(label, image.tobytes()) for label, image in zip(split.labels.tolist(), split.images, strict=True)}
        assert there == {(label, image.tobytes()) for label, image in zip(records[name][:, 1].tolist(), theirs, strict=True)}
    again = data.load("cifar100", str(tmp_path / "data"))  # prepared now
    np.testing.assert_array_equal(again.test.images, dataset.test.images)


def test_digits():
    dataset = data.load("digits")
    assert dataset.train.images.shape[1:] == (32, 32, 3)
    assert len(dataset.train.labels) + len(dataset.test.labels) == 1797
    assert np.bincount(dataset.test.labels).min() >= 34
    # An image of the test is in no other place.
    train = {image.tobytes() for image in dataset.train.images}
    assert sum(image.tobytes() in train for image in dataset.test.images) == 0


def test_unknown_set():
    with pytest.raises(UserError, match="dataset: TFDS does not know 'nonesuch'"):
        data.load("nonesuch")
    with pytest.raises(UserError, match="dataset: TFDS does not know 'my set'"):
        data.load("my set")


def test_set_that_can_not_be_had(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(TinyColors, "download_and_prepare", refuse)
    with pytest.raises(UserError, match=r"no prepared tiny_colors at .*ConnectionError: no route to host.*--config.data_dir=DIR"):
        data.load("tiny_colors", str(tmp_path))


def test_records_that_are_damaged(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    for record in (tmp_path / "copy").rglob("*test*array_record*"):
        record.unlink()
    with pytest.raises(UserError, match=r"dataset: tiny_colors at .* can't be read"):
        data.load("tiny_colors", str(tmp_path / "copy"))
