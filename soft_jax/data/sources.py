"""Image sets: TFDS sets by name, Tiny-ImageNet, folders of one's own, and scikit-learn's bundled
digits.

Small sets of one shape are held in memory as uint8 (`InMemoryImages`); sets of many shapes, and
large ones, stay files that are decoded when they are needed (`EncodedImages`).
"""

import contextlib
import dataclasses
import difflib
import hashlib
import io
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from soft_jax import cache, paths, pytrees
from soft_jax.buckets import BucketPath
from soft_jax.data import images as images_lib
from soft_jax.data import preparation, scenarios
from soft_jax.data.augmentation import prepare_test
from soft_jax.errors import Stopped, UserError
from soft_jax.paths import Place
from soft_jax.store import files as files_lib

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

HELD_BYTES = 4 * 2**30  # of decoded images: larger splits are not held in memory
BLOCK = 1000  # records read at once
TEST_SHARE = 0.2  # of the images of a folder data set without test images of its own
_COPYING = ".copying"  # how names of folders begin to which a set is being copied
BUNDLED = ("digits",)  # the sets that come with a package, in no folder of their own
CLASSES_NAMED = 20  # classes that are counted one by one on screen; of more, the range is given


@dataclasses.dataclass(frozen=True)
class InMemoryImages:
    """Images in memory. `images` uint8 `[N, H, W, 3]`, `labels` int32 `[N]`."""

    images: np.ndarray
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> "InMemoryImages":
        """Return the images at `indices`, int `[M]`, as another split."""
        return InMemoryImages(self.images[indices], self.labels[indices])

    def prepared(self, indices: np.ndarray, size: int) -> np.ndarray:
        """Prepare the images at `indices` as test images, uint8 `[M, size, size, 3]`."""
        return np.asarray(prepare_test(jnp.asarray(self.images[indices]), size))

    @property
    def fingerprint(self) -> tuple[str, str]:
        """Return the SHA-256 of the images and of the labels, in hex."""
        return pytrees.sha256(self.images), pytrees.sha256(self.labels)


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """Images as encoded files, each of its own size. `read(i)` gives file i's bytes, `names` and
    `digests` tell it by name and SHA-256.

    `labels` int32 `[N]`. What `read` and `names` count is the set as it is stored; `order` int
    `[N]` says which of it make this split.
    """

    read: Callable[[int], bytes]
    names: Callable[[int], str]
    digests: Sequence[str]
    labels: np.ndarray
    order: np.ndarray

    def take(self, indices: np.ndarray) -> "EncodedImages":
        """Return the files at `indices`, int `[M]`, as another split."""
        return dataclasses.replace(self, labels=self.labels[indices], order=self.order[indices])

    @property
    def fingerprint(self) -> tuple[str, str]:
        """Return the SHA-256 of the files and of the labels, in hex."""
        return hashlib.sha256(
            "".join(self.digests[i] for i in self.order).encode()
        ).hexdigest(), pytrees.sha256(self.labels)

    def image(self, index: int, then: images_lib.Then = images_lib.unchanged) -> np.ndarray:
        """Read image `index`, upright and in colour, as uint8 `[H, W, 3]`; return `then` of it.

        `then` is called while the image's pixels are still counted in the bound on what all threads
        hold decoded (`images.decode`). Raises UserError naming the file when it can't be read.
        """
        return _decoded(self.read, self.names, int(self.order[index]), then)[1]

    def prepared(self, indices: np.ndarray, size: int) -> np.ndarray:
        """Prepare the images at `indices` as test images, uint8 `[M, size, size, 3]`."""
        with ThreadPoolExecutor() as threads:
            images = threads.map(
                lambda i: self.image(i, lambda levels: images_lib.prepare(levels, int(i), size)),
                indices,
            )
            return (
                np.stack(list(images)) if len(indices) else np.zeros((0, size, size, 3), np.uint8)
            )


def _decoded(
    read: Callable[[int], bytes],
    names: Callable[[int], str],
    index: int,
    then: images_lib.Then = images_lib.unchanged,
) -> tuple[bytes, np.ndarray]:
    """Return the content of file `index`, and `then` of its image as `Predictor` sees it."""
    try:
        content = read(index)
        return content, images_lib.decode(io.BytesIO(content), then)
    # What reading and Pillow's decoders raise for missing and damaged files
    except Exception as error:
        raise UserError(
            f"dataset: {names(index)} can't be read ({type(error).__name__}: {error}); restore it"
        ) from error


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A set's two splits and its class names in label order.

    `notes` are lines for the user: what was counted, left out or chosen while it was loaded.
    """

    train: InMemoryImages | EncodedImages
    test: InMemoryImages | EncodedImages
    class_names: tuple[str, ...]
    validation: InMemoryImages | EncodedImages | None = None
    notes: tuple[str, ...] = ()

    def with_validation(self, share: float, seed: int) -> "Dataset":
        """Return the set with `share` of each class's training images held out as `validation`."""
        held = scenarios.hold_out(self.train.labels, share, seed)
        kept, taken = (self.train.take(np.flatnonzero(mask)) for mask in (~held, held))
        return dataclasses.replace(self, train=kept, validation=taken)

    def first(self, train: int, test: int) -> "Dataset":
        """Return the set with the first `train` and `test` images of each class; 0 means all.

        The images stay in their order.
        """

        def cut(
            split: InMemoryImages | EncodedImages, count: int
        ) -> InMemoryImages | EncodedImages:
            if not count:
                return split
            kept = [
                np.flatnonzero(split.labels == label)[:count] for label in np.unique(split.labels)
            ]
            return split.take(np.sort(np.concatenate(kept)))

        return dataclasses.replace(self, train=cut(self.train, train), test=cut(self.test, test))

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of all images and labels, in hex."""
        return hashlib.sha256(
            "".join((*self.train.fingerprint, *self.test.fingerprint)).encode()
        ).hexdigest()


def load(name: str, data_dir: str = "", stop: threading.Event | None = None) -> Dataset:
    """Load the data set `name`.

    "digits" is bundled. "tiny_imagenet" is `data_dir/tiny-imagenet-200` as it is published.
    "folder" is `data_dir` with an image a file, as `_folder` describes. Other names are TFDS's, of
    sets with `image` and `label`; one that is not prepared yet is downloaded.

    Args:
        name: the data set.
        data_dir: where it is, a folder on a disk or in a bucket, as gs://bucket/folder.
        stop: ends a download when it is set.

    Raises:
        UserError: there is no such set, it is neither prepared nor can be, or it does not fit.
        Stopped: `stop` was set during a download.
    """
    with paths.reading("data_dir"):
        return DATASETS[name](data_dir) if name in DATASETS else _tfds(name, data_dir, stop)


def check(name: str, data_dir: str = "") -> None:
    """Raise UserError where a folder of one's own, on a disk, has no classes.

    Or the name has a namespace. It costs nothing, and so is asked before what takes long, such as
    a backbone's download.
    """
    _refuse_namespace(name)
    if name == "folder" and not isinstance(paths.place(data_dir, "data_dir"), BucketPath):
        with paths.reading("data_dir"):
            _classes_there(data_dir)


def prepare(name: str, data_dir: str = "", stop: threading.Event | None = None) -> None:
    """Download and prepare the data set `name`, unless that is done or it is one of `DATASETS`.

    Several processes that `load` it afterwards download nothing. Arguments and errors are those of
    `load`; images are not looked at.
    """
    if name not in DATASETS:
        with paths.reading("data_dir"):
            _prepared(name, data_dir, stop)


def _every_fifth(labels: np.ndarray) -> np.ndarray:
    """Choose the test images of a set that has no test split; return bool `[N]`.

    They are every fifth image of each class, counted from its first.
    """
    test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        test[np.flatnonzero(labels == label)[::5]] = True
    return test


def _digits(data_dir: str) -> Dataset:
    """Load the digits: 1,797 handwritten ones, 8 × 8 in 17 levels, enlarged to 32 × 32.

    Every fifth image of a class is for the test.
    """
    from sklearn.datasets import load_digits

    levels, labels = load_digits(return_X_y=True)
    small = np.round(levels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = np.repeat(np.kron(small, np.ones((1, 4, 4), np.uint8))[..., None], 3, axis=-1)
    labels = labels.astype(np.int32)
    test = _every_fifth(labels)
    return Dataset(
        InMemoryImages(images[~test], labels[~test]),
        InMemoryImages(images[test], labels[test]),
        tuple("0123456789"),
    )


def _tiny_imagenet(data_dir: str) -> Dataset:
    """Load Tiny-ImageNet-200 from the folders of its archive.

    Its validation images, 50 a class, are the test. Classes are in the order of their WordNet ids.
    """
    root = paths.place(data_dir or ".", "data_dir") / "tiny-imagenet-200"
    names = tuple(sorted(_text(root / "wnids.txt", root).split()))
    annotations = root / "val/val_annotations.txt"
    rows = []
    for number, line in enumerate(_text(annotations, root).splitlines(), 1):
        rows.append(line.split("\t"))
        if len(rows[-1]) < 2 or rows[-1][1] not in names:
            raise UserError(
                f"dataset: {paths.shown(annotations)}, line {number}: expected the name of an "
                "image, a tab and a class of wnids.txt, found "
                f"{line[:80]!r}; restore the file"
            )
    train = [
        (path, names.index(name))
        for name in names
        for path in sorted((root / "train" / name / "images").glob("[!.]*.JPEG"))
    ]
    test = [(root / "val/images" / file, names.index(name)) for file, name, *_ in rows]
    splits = []
    for pairs in (train, test):
        labels = np.array([label for _, label in pairs], np.int32)
        splits.append(_from_paths([file for file, _ in pairs], labels, paths.shown(root)))
    return Dataset(*splits, names)


def _text(file: Place, root: Place) -> str:
    """Return the text of a file of the Tiny-ImageNet at `root`. Raises UserError where there is
    none.
    """
    try:
        return paths.read_bytes(file).decode("utf-8")
    except OSError as error:
        raise UserError(
            f"dataset: no Tiny-ImageNet at {paths.shown(root)} ({paths.shown(file)}: "
            f"{error.strerror or error}). Unpack tiny-imagenet-200.zip (Stanford CS231n) and give "
            "the folder that tiny-imagenet-200 is in: --config.data_dir=DIR"
        ) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"dataset: {paths.shown(file)}, line {line}: expected UTF-8 text ({error.reason}); "
            "restore the file"
        ) from error


def _folder(data_dir: str) -> Dataset:
    """Load a folder of one's own: `data_dir/train/CLASS/*` and `data_dir/test/CLASS/*`.

    Classes are in the order of their names as text, in which "10" comes before "2"; a file
    `data_dir/classes.txt` that lists the folders' names, one a line, gives another order. Images of
    a class may lie in subfolders (`images.walk`).

    Where there is no `test/`, the images of `val/` are the test. Where there is neither, a share
    `TEST_SHARE` of `train/` is held out for the test (`_held_out`).

    Raises UserError where there are no classes, `train/` and `test/` or `classes.txt` differ in
    them, a class has no image, or an image can't be read.
    """
    root, folders, stray = _classes_there(data_dir)
    there, names = files_lib.of(root), _ordered(root, tuple(folders))
    train, labels, notes = _class_files(root / "train", [folders[name] for name in names], stray)
    part = next((part for part in ("test", "val") if there.exists(root / part)), None)
    if part:
        theirs, stray = _class_folders(root / part)
        if odd := sorted(theirs.keys() ^ folders.keys()):
            raise UserError(
                f"dataset: {paths.shown(root)}/train and {paths.shown(root)}/{part} differ in "
                f"their classes: {odd[0]!r} is in one of them only"
            )
        test, test_labels, more = _class_files(root / part, [theirs[n] for n in names], stray)
        notes += more
        if part == "val":
            notes.append(f"no test/ in {paths.shown(root)}: the images of val/ are the test")
    else:
        held = _held_out(root / "train", train, labels, names)
        test, test_labels = [train[i] for i in np.flatnonzero(held)], labels[held]
        train, labels = [train[i] for i in np.flatnonzero(~held)], labels[~held]
        notes.append(
            f"no test/ in {paths.shown(root)}: {TEST_SHARE:.0%} of train/ are held out for the "
            "test, chosen by a hash of each file's path in train/"
        )
    notes += [_counts("train", labels, names), _counts("test", test_labels, names)]
    where = f"{paths.shown(root)}/train", f"{paths.shown(root)}/{part or 'train'}"
    splits = _from_paths(train, labels, where[0]), _from_paths(test, test_labels, where[1])
    return Dataset(*splits, names, notes=tuple(notes))


def _classes_there(data_dir: str) -> tuple[Place, dict[str, Place], images_lib.LeftOut]:
    """Return a folder data set's root, its classes, and what lies beside them in `train/`.

    Raises UserError where there are no classes.
    """
    root = paths.place(data_dir, "data_dir")
    folders, stray = _class_folders(root / "train") if data_dir else ({}, [])
    if not folders:
        raise UserError(
            "dataset: 'folder' reads DIR/train/CLASS/* and DIR/test/CLASS/* of "
            f"--config.data_dir=DIR; no classes in {paths.shown(root)}/train"
        )
    return root, folders, stray


def _class_folders(folder: Place) -> tuple[dict[str, Place], images_lib.LeftOut]:
    """Return the class folders in `folder` by printable name, in order; and what lies beside them.

    Hidden ones are neither. Raises UserError where two folders have the same printable name.
    """
    folders: dict[str, Place] = {}
    stray: images_lib.LeftOut = []
    for path in sorted(folder.glob("*")):
        name = paths.shown(path.name)
        if path.name.startswith("."):
            continue
        if not files_lib.of(path).is_dir(path):
            stray.append((path, "files or links outside the class folders"))
        elif name in folders:
            raise UserError(
                f"dataset: two folders in {paths.shown(folder)} are printed as {name!r}, since the "
                "name of one is no UTF-8; rename it"
            )
        else:
            folders[name] = path
    return folders, stray


def _ordered(root: Place, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the classes `names` in the order of `root/classes.txt`, if there is that file.

    Raises UserError where it can't be read, or does not list each of `names` once and no other.
    """
    file, where = root / "classes.txt", f"dataset: {paths.shown(root)}/classes.txt"
    if not files_lib.of(file).exists(file):
        return names
    try:
        lines = paths.read_bytes(file).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{where} can't be read ({error})") from error
    listed = tuple(line.strip() for line in lines if line.strip())
    problems = [
        *(f"{name!r} is no folder of train/" for name in listed if name not in names),
        *(f"the folder {name!r} of train/ is not listed" for name in names if name not in listed),
        *(f"{name!r} is listed twice" for i, name in enumerate(listed) if name in listed[:i]),
    ]
    if problems:
        more = f", and {len(problems) - 1} more such" if len(problems) > 1 else ""
        raise UserError(
            f"{where} has to list the folders of train/, one a line: {problems[0]}{more}"
        )
    return listed


def _class_files(
    part: Place, folders: Sequence[Place], stray: images_lib.LeftOut
) -> tuple[list[Place], np.ndarray, list[str]]:
    """Return the image files of classes 0, 1, ..., which are `folders`: files, labels, and notes.

    Labels are int32 `[N]`. `stray` is left out beside the folders. Raises UserError where a class
    has no image.
    """
    files: list[Place] = []
    labels, left_out = [], list(stray)
    for label, folder in enumerate(folders):
        within, others = images_lib.walk(folder)
        if not within:
            note = images_lib.describe(others, folder)
            raise UserError(
                f"dataset: {paths.shown(folder)}: no image files in this folder"
                f"{note and '; ' + note}"
            )
        files += within
        labels += [label] * len(within)
        left_out += others
    note = images_lib.describe(left_out, part)
    return files, np.array(labels, np.int32), [f"{part.name}: {note}"] if note else []


def _held_out(
    folder: Place, files: Sequence[Place], labels: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """Choose the test images of a folder that has none; return bool `[N]`.

    A file's path below `folder` gives it a number in [0, 1) by SHA-256, and those below
    `TEST_SHARE` are held out. So another file that comes or goes moves none. The exception are
    classes of a few images, of which all or none would be held out: there the one with the least
    number is held out, or the one with the greatest stays.

    Raises UserError for a class of one image.
    """
    relative = [os.fsencode(file.relative_to(folder).as_posix()) for file in files]
    draws = np.array([int(hashlib.sha256(path).hexdigest()[:13], 16) / 16**13 for path in relative])
    held = draws < TEST_SHARE
    for label, name in enumerate(names):
        members = np.flatnonzero(labels == label)
        if len(members) == 1:
            raise UserError(
                f"dataset: class {name!r} has one image in {paths.shown(folder)}. Without a folder "
                "test/ beside it, one of each class is held out for the test: add images, or test/"
            )
        if not held[members].any():
            held[members[draws[members].argmin()]] = True
        elif held[members].all():
            held[members[draws[members].argmax()]] = False
    return held


def _counts(part: str, labels: np.ndarray, names: Sequence[str]) -> str:
    """Say how many images a part has, and how many of each class, or from how many to how many."""
    counts = np.bincount(labels, minlength=len(names))
    if len(names) <= CLASSES_NAMED:
        each = ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))
    else:
        least, most = counts.argmin(), counts.argmax()
        each = (
            f"{len(names):,} classes, from {counts[least]:,} ({names[least]}) to "
            f"{counts[most]:,} ({names[most]})"
        )
    return f"{part}: {len(labels):,} images: {each}"


# Sets of our own by name; to add one, write a function of `data_dir` that returns a `Dataset`.
DATASETS: dict[str, Callable[[str], Dataset]] = {
    "digits": _digits,
    "tiny_imagenet": _tiny_imagenet,
    "folder": _folder,
}


def _from_paths(
    files: Sequence[Place], labels: np.ndarray, where: str
) -> InMemoryImages | EncodedImages:
    if not files:
        raise UserError(f"dataset: no images in {where}")
    return _split(
        lambda i: paths.read_bytes(files[i]), lambda i: paths.shown(files[i]), np.asarray(labels)
    )


def _split(
    read: Callable[[int], bytes], names: Callable[[int], str], labels: np.ndarray
) -> InMemoryImages | EncodedImages:
    """Make the split of files 0 to N - 1: in memory if all have one shape and fit, else as files.

    All files are decoded once here, so that a damaged one is reported now, by a UserError that
    names it, and not in some later task.
    """

    digests: list[str] = []
    held: list[np.ndarray] | None = []

    def look(index: int) -> tuple[str, np.ndarray | None]:
        content, image = _decoded(read, names, index)
        # What is not going to be held must not wait for its turn below.
        return hashlib.sha256(content).hexdigest(), None if held is None else image

    with ThreadPoolExecutor() as threads:
        for digest, image in threads.map(look, range(len(labels))):
            digests.append(digest)
            if held is not None and image is not None:
                held.append(image)
                if image.shape != held[0].shape or len(labels) * image.size > HELD_BYTES:
                    held = None
    return (
        EncodedImages(read, names, digests, labels, np.arange(len(labels)))
        if held is None
        else InMemoryImages(np.stack(held), labels)
    )


def _refuse_namespace(name: str) -> None:
    """Raise UserError for a set of TFDS's communities, such as "kubric:movi_a/256x256".

    To look one up, TFDS asks the network for minutes, and hears no signal meanwhile. That it lacks
    what "huggingface:" needs, it says by itself; behind a set's own name, a colon and a digit begin
    its version.
    """
    space = re.match(r"([\w-]+):[^\W\d]", name)
    if space and space[1] != "huggingface":
        raise UserError(
            f"dataset: {name!r} has a namespace, {space[1]!r}, and only TFDS's own sets are read "
            "here; give one of those, such as 'cifar100', or 'folder' for images of your own"
        )


def _prepared(name: str, data_dir: str, stop: threading.Event | None) -> "tfds.core.DatasetBuilder":
    """Return TFDS's builder of an image classification set whose files are there.

    They are downloaded and prepared if they are not. Raises UserError and Stopped as `load`.
    """
    _refuse_namespace(name)
    # Imported here: it takes most of a second, and the bundled digits do without.
    import tensorflow_datasets as tfds

    data_dir = _tfds_dir(name, data_dir, stop)
    builder = _builder(name, data_dir)
    features = (
        dict(builder.info.features.items())
        if isinstance(builder.info.features, tfds.features.FeaturesDict)
        else {}
    )
    if "image" not in features or not isinstance(features.get("label"), tfds.features.ClassLabel):
        raise UserError(
            f"dataset: {name} is not an image classification set: it has no 'image' with a class "
            "'label'"
        )
    return builder if builder.info.splits else _prepare(builder, name, data_dir, stop)


def _tfds(name: str, data_dir: str, stop: threading.Event | None) -> Dataset:
    builder = _prepared(name, data_dir, stop)
    splits = ("test",) if name == "imagenet_r" else ("train", "test")
    if missing := set(splits) - set(builder.info.splits):
        raise UserError(
            f"dataset: {name} at {builder.data_dir} has no split {', '.join(sorted(missing))}"
        )
    try:
        read = [_read(builder, name, split) for split in splits]
    except NotImplementedError as error:
        raise UserError(
            f"dataset: {name} at {builder.data_dir} is stored as {builder.info.file_format}, which "
            "has no random access. "
            f"Prepare it with tfds.builder({name!r}, data_dir=..., "
            "file_format='array_record').download_and_prepare()"
        ) from error
    except UserError:
        raise
    except Exception as error:  # what TFDS, array_record and Pillow raise on damaged files
        raise UserError(
            f"dataset: {name} at {builder.data_dir} can't be read "
            f"({preparation.describe(error)}); prepare it again"
        ) from error
    class_names = tuple(builder.info.features["label"].names)
    return (
        _imagenet_r(read[0], class_names) if name == "imagenet_r" else Dataset(*read, class_names)
    )


def _imagenet_r(images: InMemoryImages | EncodedImages, class_names: tuple[str, ...]) -> Dataset:
    """Make ImageNet-R's two splits from its only one, and count its 200 classes from 0.

    Its labels are 200 of ImageNet's 1,000. Every fifth image of a class is for the test.
    """
    there = np.unique(images.labels)
    images = dataclasses.replace(
        images, labels=np.searchsorted(there, images.labels).astype(np.int32)
    )
    test = _every_fifth(images.labels)
    return Dataset(
        images.take(np.flatnonzero(~test)),
        images.take(np.flatnonzero(test)),
        tuple(class_names[label] for label in there),
    )


def _tfds_dir(name: str, data_dir: str, stop: threading.Event | None) -> str:
    """Return `data_dir` for TFDS: empty, or a folder on a disk, to which a bucket's is copied."""
    if not data_dir:
        return data_dir
    place = paths.place(data_dir, "data_dir")
    if isinstance(place, BucketPath):
        return str(_copied(place, re.split("[/:]", name)[0], stop))
    return str(place)


def _copied(bucket: BucketPath, name: str, stop: threading.Event | None) -> Path:
    """Return a folder on a disk that holds what `bucket` has of TFDS's set `name`.

    TFDS reads records from a disk alone. The copy is kept among the cached files, and made anew
    when something in the bucket has changed. Raises UserError where it is not there or can't be
    copied, and Stopped.
    """
    try:
        there = (bucket / name).objects()
        if not there:
            if name not in (known := _known()):
                raise _unknown(name, known)
            raise UserError(
                f"data_dir: no {name} in {bucket}; prepare it on a disk, and copy it there: "
                f"gcloud storage cp -r DIR/{name} {bucket}/"
            )
        listed = "\n".join(f"{path} {each.generation}" for path, each in sorted(there.items()))
        digest = hashlib.sha256(listed.encode()).hexdigest()[:16]
        target = cache.on_disk() / "data" / f"{name}-{digest}"
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(target.parent)
            # Beside it, since what is copied in part must not have its name.
            with tempfile.TemporaryDirectory(prefix=_COPYING, dir=target.parent) as partial:
                _copy(bucket, there, Path(partial) / "whole", stop)
                files_lib.sync(Path(partial) / "whole")
                try:
                    os.rename(Path(partial) / "whole", target)
                except OSError:
                    if not target.is_dir():  # else another process was faster
                        raise
    except OSError as error:
        raise UserError(f"data_dir: {bucket / name} can't be copied to a disk ({error})") from error
    return target


def _remove_unfinished(folder: Path) -> None:
    """Remove copies that were cut off: nothing was written to them for a day."""
    for copying in folder.glob(f"{_COPYING}*"):
        with contextlib.suppress(OSError):  # another process ends with it, or removes it
            written = max(path.stat().st_mtime for path in (copying, *copying.rglob("*")))
            if written < time.time() - 24 * 3600:
                shutil.rmtree(copying)


def _copy(
    bucket: BucketPath, objects: Iterable[BucketPath], folder: Path, stop: threading.Event | None
) -> None:
    def copy(path: BucketPath) -> None:
        if stop is not None and stop.is_set():
            raise Stopped
        file = folder / path.relative_to(bucket)
        file.parent.mkdir(parents=True, exist_ok=True)
        path.download(file)

    with ThreadPoolExecutor() as threads:
        list(threads.map(copy, objects))


def _builder(name: str, data_dir: str) -> "tfds.core.DatasetBuilder":
    """Return TFDS's builder of the set `name`, whose `info` can be read.

    Raises UserError where TFDS does not know the name, or can't make a builder of it.
    """
    import tensorflow_datasets as tfds

    try:
        # TFDS prints of packages that it misses, beside what it raises.
        with contextlib.redirect_stdout(io.StringIO()):
            builder = tfds.builder(name, data_dir=data_dir or None)
        builder.info.features  # noqa: B018  made when it is first asked for
        return builder
    except Exception as error:  # no such name, config, version or package
        known = _known()
        base = re.split("[/:]", name)[0]
        if base in known:
            raise UserError(
                f"dataset: TFDS can't make {name!r} of its set {base!r} "
                f"({preparation.describe(error)})"
            ) from error
        # That TFDS has not found it is said already; a missing package is news.
        why = "" if isinstance(error, ValueError) else f" ({preparation.describe(error)})"
        raise _unknown(name, known, why) from error


def _known() -> list[str]:
    """Return the names of all sets, ours and TFDS's."""
    import tensorflow_datasets as tfds

    return [*DATASETS, *tfds.list_builders(with_community_datasets=False)]


def _unknown(name: str, known: Sequence[str], why: str = "") -> UserError:
    near = difflib.get_close_matches(name.lower(), known, 3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UserError(
        f"dataset: TFDS does not know {name!r}{why}; {hint}'digits' is bundled, 'cifar100' is the "
        "paper's, 'folder' reads your own images"
    )


def _prepare(
    builder: "tfds.core.DatasetBuilder", name: str, data_dir: str, stop: threading.Event | None
) -> "tfds.core.DatasetBuilder":
    """Download and prepare a set: by another process if it comes with TFDS, else in this one.

    A set that is defined elsewhere is known here only. Raises UserError where it can't be done, and
    Stopped.
    """
    try:
        if type(builder).__module__.startswith("tensorflow_datasets."):
            preparation.in_another_process(name, data_dir, stop)
        else:
            preparation.in_this_process(name, data_dir, stop)
        return _builder(name, data_dir)
    except (Stopped, UserError):
        raise
    except Exception as error:  # whatever TFDS, its download manager or a missing TensorFlow raises
        told = isinstance(error, preparation.PreparationError)
        why = str(error) if told else preparation.describe(error)
        raise UserError(
            f"dataset: no prepared {name} at {builder.data_dir}, and TFDS could not download and "
            f"prepare it ({why}). Point to a prepared copy with --config.data_dir=DIR, where "
            f"DIR/{name} is; or prepare one where TensorFlow and a network are at hand: "
            f"tfds.builder({name!r}, data_dir=DIR, "
            "file_format='array_record').download_and_prepare()"
        ) from error


def _read(builder: Any, name: str, split: str) -> InMemoryImages | EncodedImages:
    """Read a split of a prepared TFDS set.

    Images of one channel are grey: all three get it. Levels of 16 bits become their high byte, as
    those of files do.
    """
    import tensorflow_datasets as tfds

    def records(source):
        for start in range(0, len(source), BLOCK):
            yield from source.__getitems__(list(range(start, min(start + BLOCK, len(source)))))

    feature, count = builder.info.features["image"], builder.info.splits[split].num_examples
    shape, levels = feature.shape, np.dtype(feature.np_dtype)
    if shape[-1] not in (1, 3, None):
        raise UserError(f"dataset: {name} has images of shape {shape}, expected 1 or 3 channels")
    if levels not in (np.uint8, np.uint16):
        raise UserError(f"dataset: {name} has images of {levels}, expected uint8 or uint16")
    # TFDS decodes images of 16 bits by OpenCV only: they are taken as files.
    in_memory = None not in shape and levels == np.uint8
    if in_memory and count * np.prod([*shape[:2], 3]) <= HELD_BYTES:
        # TFDS's own way, in blocks: several times faster than a record at a time.
        images, labels = zip(
            *((r["image"], r["label"]) for r in records(builder.as_data_source(split))), strict=True
        )
        stacked = np.stack(images)
        colours = np.repeat(stacked, 3, axis=-1) if shape[-1] == 1 else stacked
        return InMemoryImages(colours, np.array(labels, np.int32))
    skipped = {
        name: tfds.decode.SkipDecoding() for name in builder.info.features if name != "label"
    }  # CUB-200 has a second image
    source = builder.as_data_source(split, decoders=skipped)
    labels = [record["label"] for record in records(source)]
    return _split(
        lambda i: source[i]["image"],
        lambda i: f"{name} at {builder.data_dir}, {split} record {i},",
        np.array(labels, np.int32),
    )
