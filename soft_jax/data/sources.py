"""Image sets: TFDS sets by name, Tiny-ImageNet, folders of one's own, and scikit-learn's bundled
digits.

Small sets of one shape are held in memory as uint8 (`InMemoryImages`); sets of many shapes, and
large ones, stay files that are decoded when they are needed (`EncodedImages`).
"""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.data import images as images_lib
from soft_jax.data import scenarios
from soft_jax.data.augmentation import prepare_test
from soft_jax.errors import UserError

HELD_BYTES = 4 * 2**30  # of decoded images: larger splits are not held in memory
BLOCK = 1000  # records read at once


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

    def image(self, index: int) -> np.ndarray:
        """Read image `index` of the split, upright and in colour, as uint8 `[H, W, 3]`.

        Raises UserError naming the file when it can't be read.
        """
        return _decoded(self.read, self.names, int(self.order[index]))[1]

    def prepared(self, indices: np.ndarray, size: int) -> np.ndarray:
        """Prepare the images at `indices` as test images, uint8 `[M, size, size, 3]`."""
        with ThreadPoolExecutor() as threads:
            images = threads.map(lambda i: images_lib.prepare(self.image(i), int(i), size), indices)
            return (
                np.stack(list(images)) if len(indices) else np.zeros((0, size, size, 3), np.uint8)
            )


def _decoded(
    read: Callable[[int], bytes], names: Callable[[int], str], index: int
) -> tuple[bytes, np.ndarray]:
    """Return the content of file `index`, and its image as `Predictor` sees an image file."""
    try:
        content = read(index)
        return content, images_lib.decode(io.BytesIO(content))
    except (
        Exception
    ) as error:  # what reading and Pillow's decoders raise for missing and damaged files
        raise UserError(
            f"dataset: {names(index)} can't be read ({type(error).__name__}: {error}); restore it"
        ) from error


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A set's two splits and its class names in label order."""

    train: InMemoryImages | EncodedImages
    test: InMemoryImages | EncodedImages
    class_names: tuple[str, ...]
    validation: InMemoryImages | EncodedImages | None = None

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

        return Dataset(cut(self.train, train), cut(self.test, test), self.class_names)

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of all images and labels, in hex."""
        return hashlib.sha256(
            "".join((*self.train.fingerprint, *self.test.fingerprint)).encode()
        ).hexdigest()


def load(name: str, data_dir: str = "") -> Dataset:
    """Load the data set `name`.

    "digits" is bundled. "tiny_imagenet" is `data_dir/tiny-imagenet-200` as it is published.
    "folder" is `data_dir` with an image a file, `train/CLASS/*` and `test/CLASS/*`. Other names are
    TFDS's, of sets with `image` and `label`.

    Raises UserError when there is no such set, it is neither prepared nor can be, or it does not
    fit.
    """
    return DATASETS[name](data_dir) if name in DATASETS else _tfds(name, data_dir)


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
    root = Path(data_dir or ".").expanduser() / "tiny-imagenet-200"
    try:
        names = tuple(sorted((root / "wnids.txt").read_text().split()))
        rows = [
            line.split("\t")[:2]
            for line in (root / "val/val_annotations.txt").read_text().splitlines()
        ]
    except OSError as error:
        raise UserError(
            f"dataset: no Tiny-ImageNet at {root} ({error.filename}: {error.strerror}). Unpack "
            "tiny-imagenet-200.zip "
            "(Stanford CS231n) and give the folder that tiny-imagenet-200 is in: "
            "--config.data_dir=DIR"
        ) from error
    train = [
        (path, names.index(name))
        for name in names
        for path in sorted((root / "train" / name / "images").glob("*.JPEG"))
    ]
    test = [(root / "val/images" / file, names.index(name)) for file, name in rows]
    return Dataset(_from_paths(train, str(root)), _from_paths(test, str(root)), names)


def _folder(data_dir: str) -> Dataset:
    root = Path(data_dir).expanduser()
    names = (
        tuple(sorted(p.name for p in root.glob("train/*") if p.is_dir() and p.name[0] != "."))
        if data_dir
        else ()
    )
    if not names:
        raise UserError(
            "dataset: 'folder' reads DIR/train/CLASS/* and DIR/test/CLASS/* of "
            f"--config.data_dir=DIR; no classes in {root}/train"
        )
    if odd := sorted(
        {p.name for p in root.glob("test/*") if p.is_dir() and p.name[0] != "."} ^ set(names)
    ):
        raise UserError(
            f"dataset: {root}/train and {root}/test differ in their classes: {odd[0]!r} is in one "
            "of them only"
        )
    pairs = {
        s: [
            (path, i) for i, name in enumerate(names) for path in images_lib.find([root / s / name])
        ]
        for s in ("train", "test")
    }
    return Dataset(
        _from_paths(pairs["train"], f"{root}/train"),
        _from_paths(pairs["test"], f"{root}/test"),
        names,
    )


# Sets of our own by name; to add one, write a function of `data_dir` that returns a `Dataset`.
DATASETS: dict[str, Callable[[str], Dataset]] = {
    "digits": _digits,
    "tiny_imagenet": _tiny_imagenet,
    "folder": _folder,
}


def _from_paths(pairs: Sequence[tuple[Path, int]], where: str) -> InMemoryImages | EncodedImages:
    paths, labels = [path for path, _ in pairs], np.array([label for _, label in pairs], np.int32)
    if not paths:
        raise UserError(f"dataset: no images in {where}")
    return _split(lambda i: paths[i].read_bytes(), lambda i: str(paths[i]), labels)


def _split(
    read: Callable[[int], bytes], names: Callable[[int], str], labels: np.ndarray
) -> InMemoryImages | EncodedImages:
    """Make the split of files 0 to N - 1: in memory if all have one shape and fit, else as files.

    All files are decoded once here, so that a damaged one is reported now, by a UserError that
    names it, and not in some later task.
    """

    def look(index: int) -> tuple[str, np.ndarray]:
        content, image = _decoded(read, names, index)
        return hashlib.sha256(content).hexdigest(), image

    digests: list[str] = []
    held: list[np.ndarray] | None = []
    with ThreadPoolExecutor() as threads:
        for digest, image in threads.map(look, range(len(labels))):
            digests.append(digest)
            if held is not None:
                held.append(image)
                if image.shape != held[0].shape or len(labels) * image.size > HELD_BYTES:
                    held = None
    return (
        EncodedImages(read, names, digests, labels, np.arange(len(labels)))
        if held is None
        else InMemoryImages(np.stack(held), labels)
    )


def _tfds(name: str, data_dir: str) -> Dataset:
    # Imported here: it takes most of a second, and the bundled digits do without.
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except (
        tfds.core.DatasetNotFoundError,
        ValueError,
        AssertionError,
    ) as error:  # the last two: not a name, no such version
        raise UserError(
            f"dataset: TFDS does not know {name!r}; 'digits' is bundled, 'cifar100' is the "
            "paper's, 'folder' reads your own images"
        ) from error
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
    if not builder.info.splits:
        builder = _prepare(name, data_dir, str(builder.data_dir))
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
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # array_record and Pillow on missing or damaged files
        raise UserError(
            f"dataset: {name} at {builder.data_dir} can't be read ({error}); prepare it again"
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


def _prepare(name: str, data_dir: str, looked: str):
    import tensorflow_datasets as tfds

    try:
        if name == "cifar100":
            from soft_jax.data import cifar100

            builder = cifar100.builder(data_dir or None)
        else:
            builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # whatever TFDS, its download manager or a missing TensorFlow raises
        raise UserError(
            f"dataset: no prepared {name} at {looked}, and TFDS could not download and prepare it "
            f"({type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}). "
            "Point to a prepared copy with "
            f"--config.data_dir=DIR, where DIR/{name} is; or prepare one where TensorFlow and a "
            "network are at hand: "
            f"tfds.builder({name!r}, data_dir=DIR, "
            "file_format='array_record').download_and_prepare()"
        ) from error
    return builder


def _read(builder, name: str, split: str) -> InMemoryImages | EncodedImages:
    import tensorflow_datasets as tfds

    def records(source):
        for start in range(0, len(source), BLOCK):
            yield from source.__getitems__(list(range(start, min(start + BLOCK, len(source)))))

    shape = builder.info.features["image"].shape
    if shape[-1] not in (3, None):
        raise UserError(f"dataset: {name} has images of shape {shape}, expected 3 channels")
    if None not in shape and builder.info.splits[split].num_examples * np.prod(shape) <= HELD_BYTES:
        # TFDS's own way, in blocks: several times faster than a record at a time.
        images, labels = zip(
            *((r["image"], r["label"]) for r in records(builder.as_data_source(split))), strict=True
        )
        return InMemoryImages(np.stack(images), np.array(labels, np.int32))
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
