import io
import os
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from soft_jax.data import images, preparation, scenarios, sources
from soft_jax.errors import UserError
from tests import archives


class TinyColors(tfds.core.GeneratorBasedBuilder):
    """Four classes of PNG files, prepared without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    shape = (8, 8, 3)

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=list("abcd")),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples(12), "test": self._generate_examples(8)}

    def _generate_examples(self, count):
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full(self.shape, 20 * i, np.uint8)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 4}


class ImagenetR(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """ImageNet-R as TFDS has it: one split, and labels that are 200 of 1,000; here two, in
    images of many shapes.
    """

    VERSION = tfds.builder_cls("imagenet_r").VERSION
    name = "imagenet_r"

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"test": self._generate_examples()}

    def _generate_examples(self):
        for i in range(24):
            image = np.full((20 + i, 30, 3), 10 * i, np.uint8)
            yield (
                i,
                {
                    "image": io.BytesIO(encoded(image, "JPEG")),
                    "label": (7, 930)[i % 2],
                    "file_name": str(i),
                },
            )


class TinyBirds(TinyColors):
    """As CUB-200: images of many shapes, and a second one each, which nothing here needs."""

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=list("abcd")),
            "mask": tfds.features.Image(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count):
        for i in range(count):
            image = io.BytesIO(encoded(np.full((8 + i, 8, 3), 20 * i, np.uint8), "PNG"))
            yield (
                i,
                {
                    "image": image,
                    "label": i % 4,
                    "mask": io.BytesIO(b"no picture: never to be decoded"),
                },
            )


def encoded(image, kind):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    builder = TinyColors(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder


def test_tfds_set(prepared):
    dataset = sources.load("tiny_colors", str(prepared))
    assert dataset.class_names == ("a", "b", "c", "d")
    assert dataset.train.images.shape == (12, 8, 8, 3)
    assert dataset.train.images.dtype == np.uint8
    assert len(dataset.test.labels) == 8
    for split in (dataset.train, dataset.test):
        np.testing.assert_array_equal(split.images[:, 0, 0, 0] // 20 % 4, split.labels)


def test_cifar100_from_its_archive(tmp_path, monkeypatch):
    """The public archive's binary format, downloaded and prepared without TensorFlow, as TFDS's
    own cifar100.
    """
    archive, records = archives.cifar100(tmp_path)
    monkeypatch.setattr(tfds.download.DownloadManager, "download", lambda self, url: archive)
    monkeypatch.setattr(  # which would not know of that patch
        preparation,
        "in_another_process",
        lambda name, data_dir, stop: preparation.in_this_process(name, data_dir),
    )
    dataset = sources.load("cifar100", str(tmp_path / "data"))
    assert dataset.class_names[7] == "fine7"
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        theirs = records[name][:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        there = {
            (label, image.tobytes())
            for label, image in zip(split.labels.tolist(), split.images, strict=True)
        }
        assert there == {
            (label, image.tobytes())
            for label, image in zip(records[name][:, 1].tolist(), theirs, strict=True)
        }
    again = sources.load("cifar100", str(tmp_path / "data"))  # prepared now
    np.testing.assert_array_equal(again.test.images, dataset.test.images)


def test_digits():
    dataset = sources.load("digits")
    assert dataset.train.images.shape[1:] == (32, 32, 3)
    assert len(dataset.train.labels) + len(dataset.test.labels) == 1797
    assert np.bincount(dataset.test.labels).min() >= 34
    # An image of the test is in no other place.
    train = {image.tobytes() for image in dataset.train.images}
    assert sum(image.tobytes() in train for image in dataset.test.images) == 0


def test_validation_is_taken_from_training():
    """Each training image is in one of the two, in its order; the test is as it was."""
    digits = sources.load("digits")
    split = digits.with_validation(0.1, seed=3)
    held = scenarios.hold_out(digits.train.labels, 0.1, 3)
    for part, chosen in ((split.train, ~held), (split.validation, held)):
        np.testing.assert_array_equal(part.images, digits.train.images[chosen])
        np.testing.assert_array_equal(part.labels, digits.train.labels[chosen])
    assert split.test is digits.test
    counts = np.bincount(digits.train.labels)
    np.testing.assert_array_equal(np.bincount(split.validation.labels), np.round(0.1 * counts))
    assert digits.validation is None


def test_images_of_many_shapes_stay_files(tmp_path):
    """ImageNet-R: labels counted from 0, every fifth image of a class for the test."""
    ImagenetR(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    dataset = sources.load("imagenet_r", str(tmp_path))
    names = tfds.builder("imagenet_r", data_dir=tmp_path).info.features["label"].names
    assert dataset.class_names == (names[7], names[930])
    assert isinstance(dataset.train, sources.EncodedImages)
    assert [np.bincount(split.labels).tolist() for split in (dataset.train, dataset.test)] == [
        [9, 9],
        [3, 3],
    ]
    seen = []
    for split in (dataset.train, dataset.test):
        for index, label in enumerate(split.labels):
            image = split.image(index)
            number = round(image.mean() / 10)
            assert image.shape == (20 + number, 30, 3)
            assert number % 2 == label
            seen.append(number)
    assert sorted(seen) == list(range(24))
    prepared = dataset.test.prepared(np.arange(6), 16)
    assert prepared.shape == (6, 16, 16, 3)
    assert [round(image.mean() / 10) % 2 for image in prepared] == dataset.test.labels.tolist()
    assert dataset.test.prepared(np.arange(0), 16).shape == (0, 16, 16, 3)
    few = dataset.first(2, 1)
    assert np.bincount(few.train.labels).tolist() == [2, 2]
    assert (
        len(
            {
                dataset.fingerprint,
                few.fingerprint,
                sources.load("imagenet_r", str(tmp_path)).fingerprint,
            }
        )
        == 2
    )


def test_only_what_is_learned_from_is_decoded(tmp_path):
    TinyBirds(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    split = sources.load("tiny_birds", str(tmp_path)).train
    assert [split.image(index).mean() // 20 % 4 for index in range(12)] == split.labels.tolist()


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / split / name / f"{i}.png").write_bytes(
                    encoded(np.full((8, 8, 3), 100 * label + i, np.uint8), "PNG")
                )
    return tmp_path


def test_folder(folder):
    dataset = sources.load("folder", str(folder))
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.images[:, 0, 0, 0].tolist() == [
        0,
        1,
        2,
        100,
        101,
        102,
    ]  # of one shape: in memory
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    (folder / "train/cat/odd.jpg").write_bytes(
        encoded(np.zeros((9, 8), np.uint8), "JPEG")
    )  # another shape, and grey
    odd = sources.load("folder", str(folder))
    assert isinstance(odd.train, sources.EncodedImages)
    assert isinstance(odd.test, sources.InMemoryImages)
    assert odd.train.image(3).shape == (9, 8, 3)
    assert odd.fingerprint != dataset.fingerprint


def test_large_sets_stay_files(folder, monkeypatch):
    monkeypatch.setattr(sources, "HELD_BYTES", 6 * 8 * 8 * 3 - 1)
    dataset = sources.load("folder", str(folder))
    assert isinstance(dataset.train, sources.EncodedImages)
    assert isinstance(dataset.test, sources.InMemoryImages)


def test_a_picture_is_learned_as_it_is_predicted(folder):
    """Upright, on white, whatever the file says; and a damaged one is named at once, not when it
    is first needed.
    """
    turned = Image.fromarray(np.arange(8 * 9 * 3, dtype=np.uint8).reshape(8, 9, 3))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "train/cat/turned.png", exif=exif)
    Image.new("RGBA", (8, 9), (0, 0, 0, 0)).save(folder / "train/dog/clear.png")
    split = sources.load("folder", str(folder)).train
    there = {images.prepare(path, 0, 8).tobytes() for path in (folder / "train").rglob("*.png")}
    assert {
        images.prepare(split.image(index), 0, 8).tobytes() for index in range(len(split.labels))
    } == there
    whole = encoded(np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8), "JPEG")
    (folder / "train/dog/cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=r"dataset: .*train/dog/cut.jpg can't be read .*; restore it"
    ):
        sources.load("folder", str(folder))


def test_folders_that_can_not_be_read(folder):
    with pytest.raises(UserError, match=r"dataset: 'folder' reads DIR/train/CLASS/\*"):
        sources.load("folder", "")
    (folder / "test/dog/0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"dataset: .*test/dog/0.png can't be read .*; restore it"):
        sources.load("folder", str(folder))
    shutil.rmtree(folder / "test/dog")
    with pytest.raises(UserError, match=r"differ in their classes: 'dog' is in one of them only"):
        sources.load("folder", str(folder))


def test_tiny_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    names = ["n02", "n01"]
    for name in names:
        (root / "train" / name / "images").mkdir(parents=True)
        for i in range(2):
            image = encoded(np.full((64, 64, 3), 50 * names.index(name) + i, np.uint8), "JPEG")
            (root / "train" / name / "images" / f"{name}_{i}.JPEG").write_bytes(image)
    (root / "val/images").mkdir(parents=True)
    for i in range(3):
        (root / f"val/images/val_{i}.JPEG").write_bytes(
            encoded(np.full((64, 64, 3), 9 * i, np.uint8), "JPEG")
        )
    (root / "val/val_annotations.txt").write_text(
        "val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\nval_2.JPEG\tn02\t0\t0\t9\t9\n"
    )
    with pytest.raises(UserError, match=r"no Tiny-ImageNet at .*wnids.txt"):
        sources.load("tiny_imagenet", str(tmp_path))
    (root / "wnids.txt").write_text("\n".join(names))
    dataset = sources.load("tiny_imagenet", str(tmp_path))
    assert dataset.class_names == ("n01", "n02")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert [round(image.mean()) for image in dataset.train.images] == [50, 51, 0, 1]
    assert dataset.test.labels.tolist() == [1, 0, 1]
    assert [round(image.mean()) for image in dataset.test.images] == [0, 9, 18]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wnids.txt", None, "no Tiny-ImageNet at .*wnids.txt: it is a named pipe"),
        ("val/val_annotations.txt", None, "no Tiny-ImageNet at .*annotations.txt: .*named pipe"),
        ("wnids.txt", b"n01\n\xff", "wnids.txt, line 2: expected UTF-8 text"),
        ("val/val_annotations.txt", b"\xff", "val_annotations.txt, line 1: expected UTF-8 text"),
        ("val/val_annotations.txt", b"a\tn01\nb\tn02", "line 2: .* a class of wnids.txt, .*n02"),
        ("val/val_annotations.txt", b"a\tn01\nb n01", "line 2: expected .*, a tab .*'b n01'"),
    ],
)
def test_lists_of_tiny_imagenet_that_are_damaged(tmp_path, name, content, message):
    root = tmp_path / "tiny-imagenet-200"
    (root / "val").mkdir(parents=True)
    (root / "wnids.txt").write_text("n01\n")
    (root / "val/val_annotations.txt").write_text("a\tn01\n")
    (root / name).unlink()
    if content is None:
        os.mkfifo(root / name)  # it is not waited for
    else:
        (root / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^dataset: .*{message}"):
        sources.load("tiny_imagenet", str(tmp_path))


def test_unknown_set():
    with pytest.raises(UserError, match="dataset: TFDS does not know 'nonesuch'"):
        sources.load("nonesuch")
    with pytest.raises(UserError, match="dataset: TFDS does not know 'my set'"):
        sources.load("my set")


def test_set_that_can_not_be_had(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(TinyColors, "download_and_prepare", refuse)
    with pytest.raises(
        UserError,
        match=r"no prepared tiny_colors at .*ConnectionError: no route to "
        r"host.*--config.data_dir=DIR",
    ):
        sources.load("tiny_colors", str(tmp_path))


def test_records_that_are_damaged(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    for record in (tmp_path / "copy").rglob("*test*array_record*"):
        record.unlink()
    with pytest.raises(UserError, match=r"dataset: tiny_colors at .* can't be read"):
        sources.load("tiny_colors", str(tmp_path / "copy"))
