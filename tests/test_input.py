"""What people give as input: paths, folders, files and names as they come."""

import collections
import io
import os
import re
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from PIL import Image
from rich.console import Console

from soft_jax import paths
from soft_jax.config import Config
from soft_jax.data import cifar100, images, preparation, scenarios, sources
from soft_jax.errors import Stopped, UserError
from soft_jax.experiment import data_spec, loop, seeds, settings
from soft_jax.models import backbones


def write(path, level=0, size=(8, 8)):
    """Write an image of one level and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).save(path, "PNG")
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder data set of two classes, with three training images each and one for the test."""
    for label, name in enumerate(("cat", "dog")):
        for i in range(3):
            write(tmp_path / "train" / name / f"{i}.png", 100 * label + i)
        write(tmp_path / "test" / name / "0.png", 100 * label + 50)
    return tmp_path


def levels_of(split):
    return split.images[:, 0, 0, 0].tolist()


# Paths


def test_home_is_expanded(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert levels_of(sources.load("folder", "~").test) == [50, 150]
    (tmp_path / "tasks.json").write_text('[["dog"], ["cat"]]')
    config = Config(scenario="file", scenario_file="~/tasks.json")
    assert scenarios.make(config, ("cat", "dog")).classes_by_task == ((1,), (0,))
    assert images.read("~/train/dog/2.png")[0, 0, 0] == 102
    assert images.find(["~/train/dog", "~/a.png"])[-2:] == [
        tmp_path / "train/dog/2.png",
        tmp_path / "a.png",
    ]
    with pytest.raises(UserError, match=f"no Tiny-ImageNet at {tmp_path}/tiny-imagenet-200"):
        sources.load("tiny_imagenet", "~")


def test_a_file_whose_own_name_begins_with_a_tilde(tmp_path, monkeypatch):
    write(tmp_path / "~nobody/a.png", 7)
    monkeypatch.chdir(tmp_path)
    (found,) = images.find(["."])
    assert images.read(found)[0, 0, 0] == 7


@pytest.mark.parametrize("url", ["s3://b", "http://h/x.png", "gs:/b/x", "file:///x"])
def test_a_url_is_no_path(url):
    refused = f"{re.escape(repr(url))} is a URL; only local paths"
    with pytest.raises(UserError, match=f"^workdir: {refused}"):
        paths.local(url, "workdir")
    with pytest.raises(UserError, match=f"^data_dir: {refused}"):
        sources.load("folder", url)
    with pytest.raises(UserError, match=f"^data_dir: {refused}"):
        sources.load("tiny_imagenet", url)
    with pytest.raises(UserError, match=f"^scenario_file: {refused}"):
        scenarios.make(Config(scenario="file", scenario_file=url), ("a",))
    for field in ("data_dir", "backbone_path", "scenario_file"):  # of digits, which read none
        with pytest.raises(UserError, match=f"^{field}: {refused}"):
            settings.check(Config(dataset="digits", **{field: url}))
    with pytest.raises(UserError, match=f"^data: {refused}"):
        data_spec.Data.parse(url)
    for use in (images.read, lambda url: images.find([url]), lambda url: images.prepare(url, 0, 8)):
        with pytest.raises(UserError, match=f"^images: {refused}"):
            use(url)


def test_tfds_gets_a_folder_with_its_home_and_no_url(monkeypatch, tmp_path):
    given = []

    def builder(name, data_dir):
        given.append(data_dir)
        raise ValueError

    monkeypatch.setattr(tfds, "builder", builder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for data_dir in ("~/sets", ""):
        with pytest.raises(UserError, match="TFDS"):
            sources.load("cifar100", data_dir)
    assert given == [f"{tmp_path}/sets", None]
    for data_dir in ("s3://bucket", "https://host/sets", "file:///sets"):
        with pytest.raises(UserError, match="^data_dir: .* is a URL"):
            sources.load("cifar100", data_dir)


def test_a_slip_in_the_number_of_seeds_fills_no_memory(tmp_path):
    with pytest.raises(UserError, match="^--seeds: 999999999 is above 1000"):
        seeds.plan(Config(), 999_999_999, tmp_path)


def test_local_paths_are_let_through():
    for path in ("a", "./gs:/b", "/a/b:c", "C:/x", "a b", "", "é"):
        assert paths.local(path, "x") == Path(path)
    with pytest.raises(UserError, match="^x: '~no_such_user_here/a' can't be expanded"):
        paths.local("~no_such_user_here/a", "x")
    with pytest.raises(UserError, match=r"^x: 'a\\x00b' has a zero character"):
        paths.local("a\0b", "x")


# Folders


def test_what_is_no_image_is_left_out_and_told(folder):
    """Hidden files and folders without a word, others by kind with their number and names."""
    cat = folder / "train/cat"
    for hidden in (".ipynb_checkpoints/0.png", ".cache/deep/1.png", ".2.png"):
        write(cat / hidden, 255)
    write(folder / "train/.hidden_class/0.png", 255)
    (folder / "train/dog/gone.png").symlink_to(folder / "nowhere.png")
    for i in range(5):
        (cat / f"notes{i}.txt").write_text("no image")
    (cat / "README").write_text("no image")
    (folder / "train/labels.csv").write_text("no image")
    os.mkfifo(cat / "pipe.png")
    dataset = sources.load("folder", str(folder))
    assert dataset.class_names == ("cat", "dog")
    assert levels_of(dataset.train) == [0, 1, 2, 100, 101, 102]
    assert dataset.notes == (
        "train: left out: files or links outside the class folders: 1 (labels.csv); "
        "files without an extension: 1 (cat/README); "
        "files of other types: 5 (cat/notes0.txt, cat/notes1.txt, cat/notes2.txt and 2 more); "
        "pipes, sockets or devices: 1 (cat/pipe.png); "
        "links to nothing: 1 (dog/gone.png)",
        "train: 6 images: cat 3, dog 3",
        "test: 2 images: cat 1, dog 1",
    )
    assert dataset.first(2, 1).notes == dataset.with_validation(0.3, 0).notes == dataset.notes
    told = []
    assert [file.name for file in images.find([cat], told.append)] == ["0.png", "1.png", "2.png"]
    assert told == [
        f"{cat}: left out: files without an extension: 1 (README); files of other types: 5 "
        "(notes0.txt, notes1.txt, notes2.txt and 2 more); pipes, sockets or devices: 1 (pipe.png)"
    ]
    images.find([folder / "test"], told.append)
    assert len(told) == 1


def test_a_hidden_folder_that_is_asked_for_is_read(tmp_path):
    write(tmp_path / ".images/a.png")
    assert [file.name for file in images.find([tmp_path / ".images"])] == ["a.png"]


def test_links_are_followed_and_circles_end(tmp_path):
    write(tmp_path / "elsewhere/inner/b.png")
    write(tmp_path / "elsewhere/target.png")
    write(tmp_path / "here/z/a.png")
    (tmp_path / "here/a_link").symlink_to(tmp_path / "elsewhere/inner")
    (tmp_path / "here/file.png").symlink_to(tmp_path / "elsewhere/target.png")
    (tmp_path / "here/zz_again").symlink_to(tmp_path / "here/z")
    (tmp_path / "here/z/up").symlink_to(tmp_path / "here")
    (tmp_path / "elsewhere/inner/back").symlink_to(tmp_path / "here")
    (tmp_path / "here/self.png").symlink_to(tmp_path / "here/self.png")
    files, left_out = images.walk(tmp_path / "here")
    relative = [str(file.relative_to(tmp_path / "here")) for file in files]
    assert relative == ["a_link/b.png", "file.png", "z/a.png"]  # where it really is
    assert images.describe(left_out, tmp_path / "here") == (
        "left out: links to folders that are read already: 3 (a_link/back, z/up, zz_again); "
        "links to nothing: 1 (self.png)"
    )


def test_a_class_without_images_says_what_lies_there(folder):
    for file in (folder / "train/dog").iterdir():
        file.rename(file.with_suffix(""))
    with pytest.raises(
        UserError,
        match=r"train/dog: no image files in this folder; left out: files without an extension: 3",
    ):
        sources.load("folder", str(folder))
    with pytest.raises(UserError, match=r"dog: no image files in this folder; left out: files"):
        images.find([folder / "train/dog"])


def test_a_folder_without_classes_is_told_before_a_backbone_is_downloaded(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(backbones, "load", lambda *_: loaded.append(1))
    config = Config(dataset="folder", data_dir=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="no classes in .*gone/train"):
        loop.run(config, tmp_path / "run", Console(quiet=True))
    assert not loaded
    assert list(tmp_path.iterdir()) == []


def test_many_classes_are_counted_from_least_to_most(tmp_path):
    for i in range(21):
        for j in range(2 + (i == 4)):
            write(tmp_path / f"train/c{i:02d}/{j}.png")
        write(tmp_path / f"test/c{i:02d}/0.png")
    notes = sources.load("folder", str(tmp_path)).notes
    assert notes[0] == "train: 43 images: 21 classes, from 2 (c00) to 3 (c04)"


def test_hidden_files_of_tiny_imagenet(tmp_path):
    """As macOS leaves them behind in an unpacked archive."""
    root = tmp_path / "tiny-imagenet-200"
    write(root / "train/n01/images/n01_0.JPEG", 9)
    (root / "train/n01/images/._n01_0.JPEG").write_bytes(b"no image")
    write(root / "val/images/val_0.JPEG")
    (root / "wnids.txt").write_text("n01")
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn01\t0\n")
    assert levels_of(sources.load("tiny_imagenet", str(tmp_path)).train) == [9]


@pytest.fixture
def odd_files(tmp_path):
    """A pipe, a socket, a device and a folder, each by a name as images have."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(tmp_path)  # a socket's name is short
    try:
        server.bind("socket.png")
    finally:
        os.chdir(here)
    yield tmp_path
    server.close()


def in_a_thread(function):
    """Call `function` in a thread, so that a test fails and does not hang; raise what it raises."""
    raised = []

    def call():
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    for error in raised:
        raise error


def test_pipes_and_devices_are_refused_and_never_opened(odd_files):
    """Opened, a pipe waits for a writer without end."""
    told = {}

    def refuse():
        for kind in ("pipe", "socket", "device", "folder"):
            for use in (images.read, lambda file: images.prepare(file, 0, 8)):
                with pytest.raises(UserError) as error:
                    use(odd_files / f"{kind}.png")
                told.setdefault(kind, []).append(str(error.value))

    in_a_thread(refuse)
    assert set(told) == {"pipe", "socket", "device", "folder"}
    for kind, messages in told.items():
        assert len(messages) == 2
        for message in messages:
            assert re.search(rf"{kind}.png can't be read as an image \(OSError: it is a ", message)
            assert {"pipe": "named pipe"}.get(kind, kind) in message.split("it is a ")[1]


def test_a_text_file_is_no_image_and_no_message_names_an_address(folder):
    text = folder / "train/cat/1.png"
    text.write_text("no image")
    told = "1.png can't be read.* \\(UnidentifiedImageError: no image that Pillow can read\\)"
    for use in (images.read, lambda _: sources.load("folder", str(folder))):
        with pytest.raises(UserError, match=told):
            use(text)


def test_a_missing_image_is_told_with_what_to_do():
    told = r"^none.png can't be .*Error: No such file or directory\); name an image file, or "
    with pytest.raises(UserError, match=told):
        images.read("none.png")


def test_a_large_image_is_read_without_a_warning_until_pillow_refuses_it(tmp_path):
    """In a process of its own, whose filters of warnings are not pytest's."""
    for side in (10, 20):
        write(tmp_path / f"{side}.png", size=(side, side))
    program = (
        "from PIL import Image\n"
        "from soft_jax.data import images\n"
        "Image.MAX_IMAGE_PIXELS = 99\n"
        "print(images.read('10.png').shape)\n"
        "try:\n"
        "    images.read('20.png')\n"
        "except images.UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    shape, refused = done.stdout.splitlines()
    assert shape == "(10, 10, 3)"
    assert "(ValueError: more than 198 pixels; make it smaller first)" in refused


def test_a_pipe_that_takes_the_place_of_a_training_image(folder):
    """After the set was loaded."""
    write(folder / "train/cat/3.png", size=(9, 8))  # another shape: files
    split = sources.load("folder", str(folder)).train
    (folder / "train/cat/0.png").unlink()
    os.mkfifo(folder / "train/cat/0.png")
    with pytest.raises(UserError, match=r"cat/0.png can't be read .*it is a named pipe"):
        in_a_thread(lambda: split.image(0))


# Names that are no UTF-8


@pytest.fixture
def latin(folder):
    """The folder data set with a class and a file whose names are Latin-1."""
    try:
        write(folder / os.fsdecode(b"train/caf\xe9/gr\xfcn.png"), 7)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    write(folder / os.fsdecode(b"test/caf\xe9/0.png"), 8)
    return folder


def test_names_that_are_no_utf_8_can_be_printed(latin):
    dataset = sources.load("folder", str(latin))
    assert dataset.class_names == (r"caf\xe9", "cat", "dog")
    assert levels_of(dataset.train)[0] == 7
    "".join((*dataset.class_names, *dataset.notes)).encode()  # strict
    file = latin / os.fsdecode(b"train/caf\xe9/gr\xfcn.png")
    assert images.read(file)[0, 0, 0] == 7
    file.write_bytes(b"no image")
    for use in (lambda: sources.load("folder", str(latin)), lambda: images.read(file)):
        with pytest.raises(UserError, match=re.escape(r"train/caf\xe9/gr\xfcn.png")) as error:
            use()
        str(error.value).encode()
    file.rename(file.with_suffix(".txt"))
    with pytest.raises(UserError, match=re.escape(r"left out: files of other types: 1 (gr\xfcn")):
        images.find([file.parent])


def test_names_that_are_printed_alike(latin):
    write(latin / r"train/caf\xe9/a.png")
    with pytest.raises(UserError, match=r"two folders in .*/train are printed as 'caf\\\\xe9'"):
        sources.load("folder", str(latin))


def test_a_class_file_names_them_as_they_are_printed(latin):
    (latin / "classes.txt").write_text("dog\ncaf\\xe9\ncat\n")
    assert sources.load("folder", str(latin)).class_names == ("dog", r"caf\xe9", "cat")


# Images of 16 bits, and large ones


def png_of_16_bits(levels):
    """Return a PNG file of `levels` uint16 `[H, W]` or `[H, W, 3]`, which Pillow does not write."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = levels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if levels.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def test_16_bits_become_their_high_byte_in_grey_and_colour(rng, tmp_path):
    levels = rng.integers(0, 2**16, (5, 7, 3)).astype(np.uint16)
    levels[0, 0], levels[0, 1] = 0, 2**16 - 1
    grey = levels[..., 0]
    files = {"colour.png": png_of_16_bits(levels), "grey.png": png_of_16_bits(grey)}
    for kind in ("TIFF", "PPM"):
        file = io.BytesIO()
        Image.fromarray(grey).save(file, kind)
        files[f"grey.{kind.lower()}"] = file.getvalue()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        expected = levels if name == "colour.png" else np.stack([grey] * 3, axis=-1)
        np.testing.assert_array_equal(images.read(tmp_path / name), expected >> 8)
    # What was made of 8 bits by × 257, as by most programs, is 8 bits again.
    np.testing.assert_array_equal(np.arange(256), np.arange(256) * 257 >> 8)
    np.testing.assert_array_equal(
        images.prepare(Image.fromarray(np.full((8, 8), 40000, np.uint16)), 0, 8),
        np.full((8, 8, 3), 40000 >> 8),
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_16_bits_upright(rng, orientation, tmp_path):
    levels = rng.integers(0, 2**16, (5, 7)).astype(np.uint16)
    for name, array in (("deep.png", levels), ("flat.png", (levels >> 8).astype(np.uint8))):
        image = Image.fromarray(array)
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(tmp_path / name, exif=exif)
    deep, flat = (images.read(tmp_path / name) for name in ("deep.png", "flat.png"))
    np.testing.assert_array_equal(deep, flat)
    assert deep.shape == ((5, 7, 3) if orientation < 5 else (7, 5, 3))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_files_stored_on_their_side(rng, tmp_path, kind):
    """Opened by its name, such a TIFF file comes out of Pillow with height and width mixed up."""
    levels = rng.integers(0, 256, (5, 7)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(levels).save(tmp_path / "a.img", kind, exif=exif.tobytes())
    np.testing.assert_array_equal(images.read(tmp_path / "a.img")[..., 0], levels.T[:, ::-1])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_levels_whose_range_is_not_known_are_refused(tmp_path, dtype):
    Image.fromarray(np.full((8, 8), 3, dtype)).save(tmp_path / "deep.tiff")
    with pytest.raises(UserError, match=r"deep.tiff can't be read .*more than 16 bits a channel"):
        images.read(tmp_path / "deep.tiff")


def test_what_is_decoded_at_once_is_bounded(tmp_path, monkeypatch):
    """Of images of 64, 256 and 1,024 pixels, 600 at once; the largest goes alone."""
    monkeypatch.setattr(images, "DECODED_AT_ONCE", 600)
    sides = [8, 16, 8, 32, 16, 8, 16, 16, 32, 8, 8, 16] * 2
    files = [write(tmp_path / f"{i}.png", i, (side, side)) for i, side in enumerate(sides)]
    now, most, lock = collections.Counter(), [], threading.Lock()

    def then(levels):
        with lock:
            now["pixels"] += levels.shape[0] ** 2
            now["images"] += 1
            most.append((now["pixels"], now["images"]))
        waiting.wait(0.01)
        with lock:
            now["pixels"] -= levels.shape[0] ** 2
            now["images"] -= 1
        return levels[0, 0]

    waiting = threading.Event()
    with sources.ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda file: images.read(file, then), files))
    assert [answer[0] for answer in answers] == list(range(24))
    assert all(pixels <= 600 or count == 1 for pixels, count in most)
    assert max(count for _, count in most) > 1


def test_small_images_do_not_keep_a_large_one_waiting(monkeypatch):
    monkeypatch.setattr(images, "DECODED_AT_ONCE", 600)
    order = []

    def hold(pixels):
        with images._budget.hold(pixels):
            order.append(pixels)

    threads = [threading.Thread(target=hold, args=[pixels]) for pixels in (600, 64)]
    with images._budget.hold(100):
        threads[0].start()
        for _ in range(1000):  # until the large one waits
            if images._budget._turn.locked():
                break
            time.sleep(0.01)
        threads[1].start()
        threads[1].join(0.2)  # enough to pass the large one, if it may
    for thread in threads:
        thread.join()
    assert order == [600, 64]


def test_a_damaged_image_gives_its_room_back(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "DECODED_AT_ONCE", 64)
    whole = write(tmp_path / "a.png", 3)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:45])
    for _ in range(3):
        with pytest.raises(UserError, match=r"cut.png can't be read"):
            images.read(tmp_path / "cut.png")
        assert images._budget._held == 0
    assert images.read(whole)[0, 0, 0] == 3


def test_preparing_is_counted_as_decoding(folder, monkeypatch):
    """The whole image lives until it is resized, so that is where the bound must hold."""
    write(folder / "train/cat/3.png", size=(9, 8))
    split = sources.load("folder", str(folder)).train
    held = []
    resized = images._resized

    def spy(levels, size):
        held.append(images._budget._held)
        return resized(levels, size)

    monkeypatch.setattr(images, "_resized", spy)
    assert split.prepared(np.arange(1), 8).shape == (1, 8, 8, 3)
    images.prepare(folder / "train/cat/0.png", 0, 8)
    assert held == [64, 64]
    assert images._budget._held == 0


# Order of classes, and images for the test


def test_numbers_are_ordered_as_text_or_by_a_class_file(tmp_path):
    for i in (0, 1, 2, 10, 11):
        for part in ("train", "test"):
            write(tmp_path / part / str(i) / "a.png", i)
    assert sources.load("folder", str(tmp_path)).class_names == ("0", "1", "10", "11", "2")
    (tmp_path / "classes.txt").write_text("\ufeff0\r\n1\r\n2\r\n\r\n10\r\n11", encoding="utf-8")
    dataset = sources.load("folder", str(tmp_path))
    assert dataset.class_names == ("0", "1", "2", "10", "11")
    for split in (dataset.train, dataset.test):
        assert levels_of(split) == [0, 1, 2, 10, 11]
        assert split.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\n", "the folder 'dog' of train/ is not listed$"),
        (b"cat\ndog\nowl\nelk\n", "'owl' is no folder of train/, and 1 more such$"),
        (b"cat\ndog\ncat\n", "'cat' is listed twice$"),
        (b"", "the folder 'cat' of train/ is not listed, and 1 more such$"),
        (b"caf\xe9\n", "can't be read"),
        (None, "can't be read .*No such file"),  # a link to nothing
    ],
)
def test_a_class_file_lists_every_folder_once(folder, content, message):
    if content is None:
        (folder / "classes.txt").symlink_to(folder / "nowhere")
    else:
        (folder / "classes.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"dataset: .*classes.txt .*{message}"):
        sources.load("folder", str(folder))


def names_of(split):
    return {Path(split.names(i)).name for i in split.order}


@pytest.fixture
def unsplit(tmp_path):
    """A folder data set of 60 images in two classes, of many shapes, without test images."""
    for i in range(60):
        write(tmp_path / "train" / ("cat", "dog")[i % 2] / f"{i}.png", i, (8 + i % 5, 8))
    return tmp_path


def test_a_fifth_is_held_out_where_there_is_no_test(unsplit):
    dataset = sources.load("folder", str(unsplit))
    train, test = names_of(dataset.train), names_of(dataset.test)
    assert not train & test
    assert len(train | test) == 60
    assert 5 <= len(test) <= 20
    assert set(dataset.test.labels) == {0, 1}
    for split in (dataset.train, dataset.test):
        for i, label in enumerate(split.labels):
            assert split.image(i)[0, 0, 0] % 2 == label
    assert dataset.notes[0] == (
        f"no test/ in {unsplit}: 20% of train/ are held out for the test, chosen by a hash of each "
        "file's path in train/"
    )
    assert dataset.notes[2].startswith(f"test: {len(test)} images: cat ")


def test_images_that_come_move_none_of_the_others(unsplit, tmp_path_factory):
    before = sources.load("folder", str(unsplit))
    for i in range(60, 90):
        write(unsplit / "train/cat" / f"{i}.png", i)
    (unsplit / "train/dog/1.png").unlink()
    after = sources.load("folder", str(unsplit))
    assert names_of(before.train) - {"1.png"} <= names_of(after.train)
    assert names_of(before.test) - {"1.png"} <= names_of(after.test)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    unsplit.rename(elsewhere)
    assert names_of(sources.load("folder", str(elsewhere)).test) == names_of(after.test)


def test_small_classes_get_one_of_each(tmp_path):
    """Classes of two images, of which a hash alone would hold out none or both."""
    for i in range(30):
        for j in range(2):
            write(tmp_path / f"train/c{i}/{j}.png")
    dataset = sources.load("folder", str(tmp_path))
    assert np.bincount(dataset.train.labels).tolist() == [1] * 30
    assert np.bincount(dataset.test.labels).tolist() == [1] * 30
    (tmp_path / "train/c7/0.png").unlink()
    with pytest.raises(UserError, match=r"class 'c7' has one image in .*add images, or test/"):
        sources.load("folder", str(tmp_path))


def test_val_is_the_test_where_there_is_no_other(folder):
    (folder / "test").rename(folder / "val")
    dataset = sources.load("folder", str(folder))
    assert levels_of(dataset.test) == [50, 150]
    assert dataset.notes[0] == f"no test/ in {folder}: the images of val/ are the test"
    write(folder / "val/owl/a.png")
    with pytest.raises(UserError, match=r"/train and .*/val differ in their classes: 'owl'"):
        sources.load("folder", str(folder))


def test_a_test_folder_that_is_there_is_never_replaced(folder):
    """A link to nothing, as of a disk that is not mounted, is no reason to hold out others."""
    (folder / "test").rename(folder / "away")
    (folder / "test").symlink_to(folder / "nowhere")
    with pytest.raises(UserError, match=r"/train and .*/test differ in their classes"):
        sources.load("folder", str(folder))


# TFDS


class TinyGrey(tfds.core.GeneratorBasedBuilder):
    """Images of one channel, as MNIST has them."""

    VERSION = tfds.core.Version("1.0.0")
    shape, dtype = (8, 8, 1), np.uint8

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=self.shape, dtype=self.dtype),
            "label": tfds.features.ClassLabel(names=list("ab")),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        factor = 257 if self.dtype is np.uint16 else 1
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((8 + self.more * i, 8), 20 * i * factor, self.dtype)).save(
                file, "PNG"
            )
            file.seek(0)
            yield i, {"image": file, "label": i % 2}

    more = 0


class TinyDeepGrey(TinyGrey):
    """Of 16 bits."""

    dtype = np.uint16


class TinyGreyFiles(TinyGrey):
    """Of many shapes."""

    shape, more = (None, None, 1), 1


@pytest.mark.parametrize("builder", [TinyGrey, TinyDeepGrey, TinyGreyFiles])
def test_grey_sets_of_tfds_are_read_in_colour(tmp_path, builder):
    """Prepared on the way, since the set is defined here."""
    dataset = sources.load(builder.name, str(tmp_path))
    for split, count in ((dataset.train, 4), (dataset.test, 2)):
        there = set()
        for i, label in enumerate(split.labels):
            as_files = isinstance(split, sources.EncodedImages)
            image = split.image(i) if as_files else split.images[i]
            number = image[0, 0, 0] // 20
            assert number % 2 == label
            shape = 8 + number * builder.more, 8, 3
            np.testing.assert_array_equal(image, np.full(shape, 20 * number, np.uint8))
            there.add(number)
        assert there == set(range(count))


def test_the_preparation_of_a_set_that_is_defined_here_can_be_stopped(tmp_path, monkeypatch):
    stop, go_on = threading.Event(), threading.Event()

    def generate(self, count):
        stop.set()
        go_on.wait(30)
        raise KeyError  # it ends without having written anything

    monkeypatch.setattr(TinyGrey, "_generate_examples", generate)
    with pytest.raises(Stopped):
        sources.load("tiny_grey", str(tmp_path), stop)
    assert not go_on.is_set()
    go_on.set()


def test_grey_sets_do_not_hold_more_than_they_may(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "HELD_BYTES", 4 * 8 * 8 * 3 - 1)
    assert isinstance(sources.load("tiny_grey", str(tmp_path)).train, sources.EncodedImages)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("huggingface:x", r"TFDS does not know 'huggingface:x'"),
        ("cifar10O", r"TFDS does not know 'cifar10O'; did you mean 'cifar10' or 'cifar100'"),
        ("CIFAR-100", r"TFDS does not know 'CIFAR-100'; did you mean 'cifar100'"),
        ("digit", r"TFDS does not know 'digit'; did you mean 'digits'"),
        ("", r"TFDS does not know ''; 'digits' is bundled"),
        ("a/b/c", r"TFDS does not know 'a/b/c'; .*'folder' reads your own images"),
        ("mnist/foo", r"TFDS can't make 'mnist/foo' of its set 'mnist' \(ValueError: .*foo not"),
        ("mnist:9.9.9", r"TFDS can't make 'mnist:9.9.9' of its set 'mnist' \(AssertionError: "),
        ("mnist/a=3", r"TFDS can't make 'mnist/a=3' of its set 'mnist' \(TypeError: "),
    ],
)
def test_names_that_tfds_does_not_know(name, message, tmp_path, capsys):
    with pytest.raises(UserError, match=f"^dataset: {message}") as error:
        sources.load(name, str(tmp_path))
    assert "\n" not in str(error.value)
    assert not capsys.readouterr().out


def test_a_namespace_of_tfds_is_refused_before_the_network_is_asked(monkeypatch):
    monkeypatch.setattr(tfds, "builder", None)
    for act in (sources.load, sources.prepare, sources.check):
        for name in ("kubric:x/y", "a:b", "a-b:_c:1.0.0"):
            with pytest.raises(UserError, match=f"^dataset: '{name}' has a namespace, "):
                act(name)


def test_whatever_tfds_raises_names_the_set(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyError("made up")

    sources.load("tiny_grey", str(tmp_path))
    for name in ("as_data_source", "_info"):
        with monkeypatch.context() as patch:
            patch.setattr(TinyGrey, name, fail)
            with pytest.raises(UserError, match=r"dataset: .*tiny_grey.*KeyError: .*'made up'"):
                sources.load("tiny_grey", str(tmp_path))


# Downloads. A proxy on this machine stands for the network.


@pytest.fixture
def proxy(monkeypatch):
    """A server that takes connections and never answers, as the proxy of all downloads."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        for name in ("http_proxy", "https_proxy"):
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            monkeypatch.setenv(name, url)
            monkeypatch.setenv(name.upper(), url)
        for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield server


def test_no_network_is_told_soon(tmp_path, proxy):
    """TFDS itself tries ten times, for three and a half minutes."""
    proxy.close()
    with pytest.raises(
        UserError,
        match=r"dataset: no prepared cifar100 at .* \(ConnectionError: www.cs.toronto.edu can't be "
        r"reached \(.*--config.data_dir=DIR",
    ):
        sources.load("cifar100", str(tmp_path))


def test_a_download_can_be_stopped(tmp_path, proxy):
    """Nobody answers it, and the process that waits for an answer ends."""
    stop = threading.Event()
    asked = []

    def answer():
        connection, _ = proxy.accept()
        stop.set()
        connection.settimeout(60)
        while data := connection.recv(1000):
            asked.append(data)
        connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(Stopped):
        sources.load("cifar100", str(tmp_path), stop)
    thread.join()  # the connection is closed
    assert b"".join(asked).startswith(b"CONNECT www.cs.toronto.edu:443")


def test_the_other_process_ends_with_the_first(tmp_path, proxy):
    command = [sys.executable, "-m", "soft_jax.data.preparation", "cifar100", str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    root = Path(preparation.__file__).parents[2]
    with subprocess.Popen(command, cwd=root, **pipes) as process:
        with proxy.accept()[0]:
            process.stdin.close()  # what the end of the first one does
            assert process.wait(60) == 1
        assert not process.stdout.read()


def test_what_was_downloaded_before_needs_no_network(tmp_path, proxy):
    """CIFAR-100's archive, in small, lies where TFDS keeps downloads: it is taken."""
    proxy.close()
    downloads = tmp_path / "downloads/cifar100"
    downloads.mkdir(parents=True)
    checksum = tfds.builder_cls("cifar100").url_infos[cifar100.URL].checksum
    archive = downloads / tfds.core.download.resource.get_dl_fname(cifar100.URL, checksum)
    records = np.arange(4 * cifar100.RECORD, dtype=np.uint32).astype(np.uint8) % 20
    files = {f"{part}.bin": records.tobytes() for part in ("train", "test")}
    for kind, count in (("fine", 100), ("coarse", 20)):
        files[f"{kind}_label_names.txt"] = "".join(f"{kind}{i}\n" for i in range(count)).encode()
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-100-binary/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    archive.with_name(archive.name + ".INFO").write_text("{}")
    dataset = sources.load("cifar100", str(tmp_path))
    labels = records[1 :: cifar100.RECORD].tolist()
    assert sorted(dataset.train.labels.tolist()) == sorted(labels)
    assert dataset.class_names[99] == "fine99"


def test_a_host_is_asked_once_and_no_wait_is_without_end(monkeypatch):
    calls = []

    class Answer:
        def close(self):
            calls.append("closed")

    def get(session, url, **options):
        calls.append((url, options))
        return Answer()

    monkeypatch.setattr(requests.Session, "get", get)
    monkeypatch.setattr(socket, "setdefaulttimeout", calls.append)
    preparation.refuse_soon()
    with requests.Session() as session:
        for name in "ab":
            session.get(f"https://host/{name}", stream=True, verify=False)
    options = {"stream": True, "verify": False}
    both = options | {"timeout": (preparation.FIRST_ANSWER, preparation.SILENCE)}
    assert calls == [
        preparation.FIRST_ANSWER,
        ("https://host/a", options | {"timeout": preparation.FIRST_ANSWER}),
        "closed",
        ("https://host/a", both),
        ("https://host/b", both),
    ]


def test_a_host_that_does_not_answer(monkeypatch):
    """Looking its name up may take longer than any limit on a connection."""
    answered = threading.Event()

    def get(*_, **__):
        answered.wait(60)
        return types.SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(requests.Session, "get", get)
    monkeypatch.setattr(preparation, "FIRST_ANSWER", 0.1)
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda _: None)
    preparation.refuse_soon()
    with (
        requests.Session() as session,
        pytest.raises(requests.ConnectionError, match=r"host can't be .*no answer in 0.1 s"),
    ):
        session.get("https://host/a")
    answered.set()
