"""Rehearsal: images of older tasks, the exemplars, that are trained on again beside the new
ones: DER++, iCaRL, BiC.

These are strategies that keep, beside arrays, which images of the training set are their exemplars:
rows of that set, equally many of every class seen (`buffer_size` // classes), so a continued run
needs the same set, which it checks. All of them train the whole network, with the cross entropy
over all classes seen: they forget as fine-tuning does wherever so few images, which they come to
know by heart, do not speak for the rest. They are the paper's rehearsal baselines on this backbone,
under this project's optimizer and crops; where the originals differ is said in each.
"""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.errors import UserError
from soft_jax.methods.regularization import Distillation
from soft_jax.methods.strategy import Batch, ContinualStrategy

if TYPE_CHECKING:
    from soft_jax.config import Config
    from soft_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class Reviewed:
    """A trained network's features and logits of exemplars and of images of its last task.

    The exemplars of older tasks come first. `rows` int `[N]` of the training set, in the order in
    which they would be kept; `labels` int `[N]`; `features` `[N, dim]` and `logits` `[N, classes]`
    of the images as test images are prepared; `new` and `seen` bool `[classes]`, the task's
    classes, and those and all before.
    """

    rows: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    logits: np.ndarray
    new: np.ndarray
    seen: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rehearsal(ContinualStrategy):
    """What DER++, iCaRL and BiC share.

    With `joined`, exemplars are images of an epoch like the task's own; else as many exemplars as
    a batch has images are added to each batch.

    Memory: `{"rows": int32 [exemplars]}`, -1 where there are none yet, and each one's own.
    """

    settings: ClassVar[tuple[str, ...]] = ("buffer_size",)
    joined: ClassVar[bool] = True
    least: ClassVar[int] = 1  # exemplars of a class
    buffer_size: int

    @classmethod
    def from_config(cls, config: "Config") -> Self:
        """Make the strategy with as many exemplars as `config` says."""
        return cls(buffer_size=config.buffer_size)

    def check_classes(self, classes: int) -> None:
        """Raise UserError where there are too few exemplars for so many classes."""
        if self.buffer_size < self.least * classes:
            raise UserError(
                f"buffer_size: {self.buffer_size} is below {self.least * classes}, {self.least} "
                f"for each of {classes} classes"
            )

    def share(self, seen: np.ndarray) -> int:
        """Return how many exemplars each class has once the classes `seen` have been learned.

        `seen` is bool `[classes]`.
        """
        return self.buffer_size // int(seen.sum())

    def held_out(self, rows: np.ndarray, labels: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Return those of a task's `rows` that are not trained on: by default none.

        `rows` are in random order, `labels` are theirs, and `seen`, bool `[classes]`, includes the
        task's classes.
        """
        return rows[:0]

    def candidate_indices(
        self, rows: np.ndarray, labels: np.ndarray, seen: np.ndarray
    ) -> np.ndarray:
        """Return those of a task's `rows` that `update_buffer` chooses from, in their order.

        Arguments are as in `held_out`.
        """
        return rows[first_of_each(labels, self.share(seen))]

    def columns(self, classes: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return what `loss` needs of each image beside image and label, by name.

        Shapes are those of one image.
        """
        return {}

    def table(self, memory: pytrees.Tree, count: int) -> dict[str, np.ndarray]:
        """Return the `columns` of a task's `count` images, followed by those of the exemplars."""
        return {}

    def update_buffer(
        self, memory: pytrees.Tree, shared: pytrees.Tree, known: Reviewed
    ) -> tuple[pytrees.Tree, pytrees.Tree]:
        """Return the memory after a task, and the shared part that is stored and classifies.

        `shared` is the shared part as it was trained.
        """
        raise NotImplementedError


def rows_of(memory: pytrees.Tree) -> np.ndarray:
    """Return the exemplars that are trained on, as rows of the training set, int `[N]`."""
    rows = np.asarray(memory["rows"])
    return rows[rows >= 0]


def all_rows_of(memory: pytrees.Tree) -> np.ndarray:
    """Return the rows of all exemplars, also of those kept for validation, int `[N]`."""
    rows = np.concatenate(
        [np.asarray(memory[name]) for name in ("rows", "validation") if name in memory]
    )
    return rows[rows >= 0]


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the first `count` of each label in `labels` int `[N]`, in order."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    return np.sort(order[np.arange(len(labels)) - starts < count])


def _padded(rows: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([rows, np.full(length - len(rows), -1)]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class DERpp(Rehearsal):
    """Dark Experience Replay++ (Buzzega et al., 2020): exemplars with their labels, and with the
    logits that the network once gave them.

    CE(new) + β CE(exemplars) + α MSE of the exemplars' logits to those of when they were new, with
    β = 1 and α = 0.1 as for Tiny-ImageNet with 200 exemplars there, and half of it all: the cross
    entropy is the mean over a batch and as many exemplars. (Fewer exemplars than a batch has images
    are all in it, and β is their share of it.) There, a reservoir takes images and logits in at
    every step, and a second batch is drawn for the third term; here they are taken after a task,
    equally many of each class.

    Memory: `rows`, and `logits` float32 `[exemplars, classes]`.
    """

    published_as: ClassVar[str] = "DER++"
    joined: ClassVar[bool] = False
    alpha: float = 0.1

    def init(self, method: "Method", shared: pytrees.Tree) -> pytrees.Tree:
        """Return a memory without exemplars."""
        return {
            "rows": np.full(self.buffer_size, -1, np.int32),
            "logits": np.zeros((self.buffer_size, method.num_classes), np.float32),
        }

    def columns(self, classes: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return `replayed`, 1 for an exemplar and else 0, and `then`, its stored logits."""
        return {
            "replayed": jax.ShapeDtypeStruct((), np.float32),
            "then": jax.ShapeDtypeStruct((classes,), np.float32),
        }

    def table(self, memory: pytrees.Tree, count: int) -> dict[str, np.ndarray]:
        """Return the columns of all images; `then` is 0 for the task's own."""
        kept = np.asarray(memory["logits"])[np.asarray(memory["rows"]) >= 0]
        new = np.zeros((count, kept.shape[1]), np.float32)
        return {
            "replayed": np.repeat(np.float32([0, 1]), [count, len(kept)]),
            "then": np.concatenate([new, kept]),
        }

    def loss(
        self,
        memory: pytrees.Tree,
        method: "Method",
        trainable: pytrees.Tree,
        backbone: pytrees.Tree,
        batch: Batch,
        logits: jax.Array,
    ):
        """Return the third term, a scalar; 0 without exemplars."""
        weights = batch["weights"] * batch["replayed"]
        squares = jnp.mean((logits - batch["then"]) ** 2, axis=1)
        return (
            self.alpha
            / 2
            * jnp.sum(jnp.where(weights > 0, squares * weights, 0))
            / jnp.maximum(weights.sum(), 1)
        )

    def update_buffer(
        self, memory: pytrees.Tree, shared: pytrees.Tree, known: Reviewed
    ) -> tuple[pytrees.Tree, pytrees.Tree]:
        """Keep random new images with their present logits, and fewer of the old.

        The shared part is returned as it is.
        """
        old = np.asarray(memory["rows"]) >= 0
        logits = np.concatenate([np.asarray(memory["logits"])[old], known.logits[old.sum() :]])
        kept = first_of_each(known.labels, self.share(known.seen))
        room = np.zeros((self.buffer_size - len(kept), logits.shape[1]))
        rows = _padded(known.rows[kept], self.buffer_size)
        return {
            "rows": rows,
            "logits": np.concatenate([logits[kept], room]).astype(np.float32),
        }, shared


@dataclasses.dataclass(frozen=True)
class ICaRL(Distillation, Rehearsal):
    """iCaRL (Rebuffi et al., 2017): exemplars chosen by herding, distillation, and the nearest
    mean of exemplars as the class of an image.

    There, each class has a sigmoid of its own and old classes' targets are the old network's; here
    it is the cross entropy and LwF's distillation with T = 2 over the same images, as in its later
    reimplementations. argmin |f/|f| − μ| over means μ of norm 1 is argmax f · μ, so the stored
    classifier is the means.

    Memory: that of the distillation, `rows`, and `head`, the trained classifier: training goes on
    from it, and the old network answers with it.
    """

    published_as: ClassVar[str] = "iCaRL"

    def init(self, method: "Method", shared: pytrees.Tree) -> pytrees.Tree:
        """Return a memory without old classes or exemplars."""
        return super().init(method, shared) | {
            "rows": np.full(self.buffer_size, -1, np.int32),
            "head": shared["head"],
        }

    def before_task(
        self, memory: pytrees.Tree, shared: pytrees.Tree
    ) -> tuple[pytrees.Tree, pytrees.Tree]:
        """Return the memory and the network with its trained classifier back in place.

        That network is the old one for the distillation, and the one that training starts from.
        """
        return super().before_task(memory, shared | {"head": memory["head"]})

    def candidate_indices(
        self, rows: np.ndarray, labels: np.ndarray, seen: np.ndarray
    ) -> np.ndarray:
        """Return all rows: herding needs the mean of all images of a class."""
        return rows

    def update_buffer(
        self, memory: pytrees.Tree, shared: pytrees.Tree, known: Reviewed
    ) -> tuple[pytrees.Tree, pytrees.Tree]:
        """Choose the new classes' exemplars by herding, and keep fewer of the old.

        The shared part is returned with the means of all exemplars' features, as the network gives
        them now, for its classifier. A class without exemplars, since it has no images or is not
        learned yet, has no mean, and never wins.
        """
        features = known.features / np.maximum(
            np.linalg.norm(known.features, axis=1, keepdims=True), 1e-12
        )
        share, order = self.share(known.seen), np.arange(len(known.rows))
        for label in np.unique(known.labels[known.new[known.labels]]):
            members = np.flatnonzero(known.labels == label)
            order[members] = members[herding(features[members], share)]
        kept = order[first_of_each(known.labels[order], share)]
        means = np.zeros((len(known.seen), features.shape[1]))
        np.add.at(means, known.labels[kept], features[kept])
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        bias = np.where(np.isin(np.arange(len(means)), known.labels[kept]), 0, -np.inf).astype(
            np.float32
        )
        served = {"kernel": means.T.astype(np.float32), "bias": bias}
        rows = _padded(known.rows[kept], self.buffer_size)
        return {"seen": known.seen, "rows": rows, "head": shared["head"]}, shared | {"head": served}


def herding(features: np.ndarray, count: int) -> np.ndarray:
    """Return an order of images, int `[N]`, by their `features` `[N, dim]` (alg. 4).

    Each of the first `count` is the image that brings the mean of those chosen so far nearest to
    the mean of all. The others follow in their old order.
    """
    target, total, rest = (
        features.mean(axis=0),
        np.zeros(features.shape[1]),
        np.ones(len(features), bool),
    )
    chosen = []
    for number in range(1, min(count, len(features)) + 1):
        distance = np.linalg.norm(target - (total + features) / number, axis=1)
        chosen.append(int(np.where(rest, distance, np.inf).argmin()))
        rest[chosen[-1]], total = False, total + features[chosen[-1]]
    return np.concatenate([np.array(chosen, int), np.flatnonzero(rest)])


@dataclasses.dataclass(frozen=True)
class BiC(Distillation, Rehearsal):
    """Bias correction (Wu et al., 2019): exemplars and distillation, then α and β for the new
    classes' logits from images not trained on.

    (1 − λ) CE + λ KL at T = 2 with λ = old classes / all, here divided by 1 − λ. A tenth of each
    class's exemplars, one at least, is for α and β alone and never trained on. α z + β is put into
    the classifier's columns for classification and for the next task's distillation; training goes
    on from those before it. There, exemplars are chosen by herding, here at random.

    Memory: that of the distillation, `rows`, `validation` int32 `[exemplars]`, and `head`, the
    classifier before the correction.
    """

    published_as: ClassVar[str] = "BiC"
    least: ClassVar[int] = 2

    def init(self, method: "Method", shared: pytrees.Tree) -> pytrees.Tree:
        """Return a memory without old classes or exemplars."""
        empty = np.full(self.buffer_size, -1, np.int32)
        return super().init(method, shared) | {
            "rows": empty,
            "validation": empty,
            "head": shared["head"],
        }

    def before_task(
        self, memory: pytrees.Tree, shared: pytrees.Tree
    ) -> tuple[pytrees.Tree, pytrees.Tree]:
        """Return the memory with the corrected network as the old one, and where training starts.

        It starts from the network with its classifier before the correction.
        """
        return super().before_task(memory, shared)[0], shared | {"head": memory["head"]}

    def held_out(self, rows: np.ndarray, labels: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Return the first rows of each class, which serve for validation.

        They are a tenth of the class's exemplars, or of its images where those are fewer, but at
        least one; none of a class of one image.
        """
        counts = np.bincount(labels)
        held = [
            np.flatnonzero(labels == label)[: max(1, min(self.share(seen), counts[label]) // 10)]
            for label in np.flatnonzero(counts > 1)
        ]
        return rows[np.sort(np.concatenate([*held, np.zeros(0, int)]))]

    def loss(
        self,
        memory: pytrees.Tree,
        method: "Method",
        trainable: pytrees.Tree,
        backbone: pytrees.Tree,
        batch: Batch,
        logits: jax.Array,
    ):
        """Return the distillation term, a scalar; 0 while no class is old."""
        term = super().loss(memory, method, trainable, backbone, batch, logits)
        old, seen = (
            mask.sum().astype(term.dtype) for mask in (memory["seen"], batch["class_mask"])
        )
        return term / self.temperature**2 * old / jnp.maximum(seen - old, 1)

    def update_buffer(
        self, memory: pytrees.Tree, shared: pytrees.Tree, known: Reviewed
    ) -> tuple[pytrees.Tree, pytrees.Tree]:
        """Keep random new images, and fewer of the old.

        The shared part is returned with α and β put into its classifier.
        """
        count = max(1, self.share(known.seen) // 10)
        fresh = np.arange(len(known.rows)) >= len(all_rows_of(memory))
        held = np.isin(known.rows, np.asarray(memory["validation"]))
        held |= np.isin(
            known.rows, self.held_out(known.rows[fresh], known.labels[fresh], known.seen)
        )
        validation = np.flatnonzero(held)[first_of_each(known.labels[held], count)]
        kept = np.flatnonzero(~held)[
            first_of_each(known.labels[~held], self.share(known.seen) - count)
        ]
        rows = {
            "rows": _padded(known.rows[kept], self.buffer_size),
            "validation": _padded(known.rows[validation], self.buffer_size),
        }
        served = shared["head"]
        if (known.seen & ~known.new).any():
            served = _corrected(served, known.new, *bias(known, validation))
        return {"seen": known.seen, "head": shared["head"]} | rows, shared | {"head": served}


def bias(known: Reviewed, validation: np.ndarray) -> tuple[float, float]:
    """Fit α and β of the new classes' logits on the images `validation`, int `[M]`.

    They give the least cross entropy over the classes seen. With few images any α may be best, so
    those near (1, 0) are preferred, as by a prior N(1, 1) of α and N(0, 1) of β. (In the original,
    β alone is held near 0, by a weight decay.)
    """
    from scipy.optimize import minimize  # only BiC needs it, and it takes long to import

    logits, labels = known.logits[validation].astype(np.float64), known.labels[validation]

    def objective(x):
        corrected = np.where(known.new, x[0] * logits + x[1], logits)
        corrected = np.where(known.seen, corrected, -np.inf)
        shifted = corrected - corrected.max(axis=1, keepdims=True)
        surprise = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
        return surprise.sum() + ((x[0] - 1) ** 2 + x[1] ** 2) / 2

    return tuple(minimize(objective, np.array([1.0, 0.0])).x.tolist())


def _corrected(head: pytrees.Tree, new: np.ndarray, alpha: float, beta: float) -> pytrees.Tree:
    scale = np.where(new, alpha, 1).astype(np.float32)
    bias = np.asarray(head["bias"]) * scale + np.where(new, beta, 0).astype(np.float32)
    return {"kernel": np.asarray(head["kernel"]) * scale, "bias": bias}
