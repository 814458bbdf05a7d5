"""Image sets as uint8 arrays in memory: TFDS sets by name, and scikit-learn's bundled digits."""

import dataclasses
import hashlib

import numpy as np

from soft_jax import trees
from soft_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """`images` uint8 `[N, H, W, 3]`, `labels` int32 `[N]`."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A set's two splits and its class names in label order."""

    train: Split
    test: Split
    class_names: tuple[str, ...]

    def first(self, train: int, test: int) -> "Dataset":
        """The set with the first `train` and `test` images of each class, in their order; 0 is all of them."""

        def cut(split: Split, count: int) -> Split:
            if not count:
                return split
            kept = np.sort(np.concatenate([np.flatnonzero(split.labels == label)[:count] for label in np.unique(split.labels)]))
            return Split(split.images[kept], split.labels[kept])

        return Dataset(cut(self.train, train), cut(self.test, test), self.class_names)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all images and labels."""
        parts = (self.train.images, self.train.labels, self.test.images, self.test.labels)
        return hashlib.sha256("".join(trees.sha256(part) for part in parts).encode()).hexdigest()


def load(name: str, data_dir: str = "") -> Dataset:
    """The set `name`: "digits", or a TFDS set with `image` and `label` and the splits train and test.

    Raises UserError when TFDS does not know the set, it is neither prepared nor can be, or it does not fit.
    """
    return _digits() if name == "digits" else _tfds(name, data_dir)


def _digits() -> Dataset:
    """1,797 handwritten digits, 8 × 8 in 17 levels, enlarged to 32 × 32; every fifth image of a class is for the test."""
    from sklearn.datasets import load_digits

    levels, labels = load_digits(return_X_y=True)
    small = np.round(levels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = np.repeat(np.kron(small, np.ones((1, 4, 4), np.uint8))[..., None], 3, axis=-1)
    labels = labels.astype(np.int32)
    test = np.zeros(len(labels), bool)
    for digit in range(10):
        test[np.flatnonzero(labels == digit)[::5]] = True
    return Dataset(Split(images[~test], labels[~test]), Split(images[test], labels[test]), tuple("0123456789"))


def _tfds(name: str, data_dir: str) -> Dataset:
    # Imported here: it takes most of a second, and the bundled digits do without.
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:  # the last two: not a name, no such version
        raise UserError(f"dataset: TFDS does not know {name!r}; 'digits' is bundled, 'cifar100' is the paper's") from error
    features = dict(builder.info.features.items()) if isinstance(builder.info.features, tfds.features.FeaturesDict) else {}
    if "image" not in features or not isinstance(features.get("label"), tfds.features.ClassLabel):
        raise UserError(f"dataset: {name} is not an image classification set: it has no 'image' with a class 'label'")
    if not builder.info.splits:
        builder = _prepare(name, data_dir, str(builder.data_dir))
    if missing := {"train", "test"} - set(builder.info.splits):
        raise UserError(f"dataset: {name} at {builder.data_dir} has no split {', '.join(sorted(missing))}")
    try:
        train, test = (_read(builder.as_data_source(split), name) for split in ("train", "test"))
    except NotImplementedError as error:
        raise UserError(
            f"dataset: {name} at {builder.data_dir} is stored as {builder.info.file_format}, which has no random access. "
            f"Prepare it with tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare()"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # array_record and Pillow on missing or damaged files
        raise UserError(f"dataset: {name} at {builder.data_dir} can't be read ({error}); prepare it again") from error
    return Dataset(train, test, tuple(builder.info.features["label"].names))


def _prepare(name: str, data_dir: str, looked: str):
    import tensorflow_datasets as tfds

    try:
        if name == "cifar100":
            from soft_jax import cifar100

            builder = cifar100.builder(data_dir or None)
        else:
            builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # whatever TFDS, its download manager or a missing TensorFlow raises
        raise UserError(
            f"dataset: no prepared {name} at {looked}, and TFDS could not download and prepare it "
            f"({type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}). Point to a prepared copy with "
            f"--config.data_dir=DIR, where DIR/{name} is; or prepare one where TensorFlow and a network are at hand: "
            f"tfds.builder({name!r}, data_dir=DIR, file_format='array_record').download_and_prepare()"
        ) from error
    return builder


def _read(source, name: str) -> Split:
    records = source.__getitems__(list(range(len(source))))
    images = [record["image"] for record in records]
    if len(shapes := {image.shape for image in images}) != 1:
        raise UserError(f"dataset: {name} has images of {len(shapes)} different shapes; only sets of one shape fit in memory here")
    if images[0].shape[-1] != 3:
        raise UserError(f"dataset: {name} has images of shape {images[0].shape}, expected 3 channels")
    return Split(np.stack(images), np.array([record["label"] for record in records], np.int32))
