"""Where a task's images are from: a folder or a data set, and some of its classes."""

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from soft_jax import paths
from soft_jax.config import DEFAULTS
from soft_jax.data import sources
from soft_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Data:
    """The images of `classes` of a data set, in this order; of all its classes where it is empty.

    `dataset` and `data_dir` are those of a config. Limits of 0 take all images of a class.
    """

    dataset: str
    data_dir: str = ""
    classes: tuple[str, ...] = ()
    train_images_per_class: int = 0
    test_images_per_class: int = 0

    @classmethod
    def parse(
        cls, text: str, classes: Sequence[str] = (), config: Mapping[str, Any] = DEFAULTS
    ) -> Self:
        """Read a folder's path, or the name of a data set, with the limits of a config.

        What is a folder is one; so a data set is meant where there is none of that name. Raises
        UserError for a class that stands twice, and for a URL.
        """
        names = tuple(classes)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"classes: {twice!r} stands twice")
        limits = (config["train_images_per_class"], config["test_images_per_class"])
        folder = paths.local(text, "data")
        if folder.is_dir():
            return cls("folder", str(folder.absolute()), names, *limits)
        if "/" in text or text in (".", ".."):
            raise UserError(f"data: there is no folder {text}, and no data set is called so")
        data_dir = config.get("data_dir", "") if config.get("dataset") != "folder" else ""
        return cls(text, paths.to_keep(data_dir, "data_dir"), names, *limits)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return what `to_json` gave."""
        return cls(**{**data, "classes": tuple(data["classes"])})

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return dataclasses.asdict(self) | {"classes": list(self.classes)}

    @property
    def where(self) -> str:
        """Say where the images are, for people."""
        return self.data_dir if self.dataset == "folder" else self.dataset

    def load(self, stop: threading.Event | None = None) -> sources.Dataset:
        """Return the images, with the labels of `classes` counted from 0.

        Raises UserError where they can't be had, or a class is unknown.
        """
        return self.of(self.whole(stop))

    def whole(self, stop: threading.Event | None = None) -> sources.Dataset:
        """Return the images of all classes of the data set. Raises UserError as `load`."""
        whole = sources.load(self.dataset, self.data_dir, stop)
        return whole.first(self.train_images_per_class, self.test_images_per_class)

    def of(self, whole: sources.Dataset) -> sources.Dataset:
        """Return the part of `whole` that `load` returns. Raises UserError as `load`."""
        names = self.classes or whole.class_names
        if unknown := [name for name in names if name not in whole.class_names]:
            known = ", ".join(whole.class_names[:20])
            raise UserError(f"classes: {self.where} has no class {unknown[0]!r}; it has {known}")
        return subset(whole, names)


def subset(dataset: sources.Dataset, names: Sequence[str]) -> sources.Dataset:
    """Return the images of classes `names` alone, whose labels are their places in it."""
    place = np.full(len(dataset.class_names), -1, np.int32)
    for label, name in enumerate(names):
        place[dataset.class_names.index(name)] = label

    def cut(split: Any) -> Any:
        labels = place[split.labels]
        kept = np.flatnonzero(labels >= 0)
        return dataclasses.replace(split.take(kept), labels=labels[kept])

    return dataclasses.replace(
        dataset,
        train=cut(dataset.train),
        test=cut(dataset.test),
        class_names=tuple(names),
    )


def joined(one: sources.Dataset, other: sources.Dataset) -> sources.Dataset:
    """Return two data sets as one; the classes of `other` follow those of `one`.

    Raises UserError where one has files and the other arrays, or arrays of another size.
    """
    return sources.Dataset(
        _both(one.train, other.train, len(one.class_names)),
        _both(one.test, other.test, len(one.class_names)),
        (*one.class_names, *other.class_names),
        notes=(*one.notes, *other.notes),
    )


def _both(one: Any, other: Any, shift: int) -> Any:
    """Return two splits as one; labels of `other` are shifted."""
    labels = np.concatenate([one.labels, other.labels + shift]).astype(np.int32)
    if isinstance(one, sources.EncodedImages) and isinstance(other, sources.EncodedImages):
        count = len(one.digests)

        def of_either(first: Any, second: Any) -> Any:
            return lambda i: first(i) if i < count else second(i - count)

        return sources.EncodedImages(
            read=of_either(one.read, other.read),
            names=of_either(one.names, other.names),
            digests=[*one.digests, *other.digests],
            labels=labels,
            order=np.concatenate([one.order, other.order + count]),
        )
    arrays = isinstance(one, sources.InMemoryImages) and isinstance(other, sources.InMemoryImages)
    if not arrays or one.images.shape[1:] != other.images.shape[1:]:
        raise UserError(
            "data: the images of the older classes and those of the new ones are of different "
            "kinds or sizes; put all of them into one folder, and give that"
        )
    return sources.InMemoryImages(np.concatenate([one.images, other.images]), labels)
