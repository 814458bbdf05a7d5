"""Strategies that keep arrays of older tasks: PGP, EWC, LwF. Those that keep images are in
`rehearsal`.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.methods.strategy import Batch, ContinualStrategy

if TYPE_CHECKING:
    from soft_jax.config import Config
    from soft_jax.methods.method import Method

IMAGES = 256  # of a task's training images that `update` looks at, prepared as test images are
AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class PGP(ContinualStrategy):
    """Prompt Gradient Projection (Qiao et al., 2024): prompts move at right angles to what older
    tasks' images ask them.

    For a prefix, g ← g − g U Uᵀ for its key half, U a basis of the layer's attention queries x Wq;
    its value half moves freely, as in the published code. For L2P's pool, U is a basis of the
    embedded images. U grows by task as in GPM (Saha et al., 2021): the residual's main directions
    until `threshold` of the task's energy Σ σ² is in it. The published code, whose threshold is
    also 0.5, centres and reduces features by PCA, weighs σ⁴, and takes the basis among the images,
    not the features; that is not reproduced. Under the interleaved layout the halves named here are
    those of the arrays, not of their use. Projection comes after clipping and before Adam, as
    there: Adam rescales each entry, so the update is only nearly orthogonal, and old tasks can
    still drift by the G-prompt or the pool.

    Memory: `{"projector": [layers, dim, dim]}`, U Uᵀ of the G- and E-prompt layers in turn; of the
    pool, one.
    """

    published_as: ClassVar[str] = "PGP"
    fine_tunes: ClassVar[bool] = False
    threshold: float = 0.5

    def init(self, method: "Method", shared: pytrees.Tree) -> pytrees.Tree:
        """Hold nothing yet."""
        count, dim = method.host.count_projectors(), method.architecture.dim
        return {"projector": jnp.zeros((count, dim, dim), jnp.float32)}

    def project(self, memory: pytrees.Tree, method: "Method", grads: pytrees.Tree) -> pytrees.Tree:
        """Return `grads` with those of the prompts projected."""
        return method.host.project(grads, memory["projector"])

    def update(
        self,
        memory: pytrees.Tree,
        method: "Method",
        trainable: pytrees.Tree,
        backbone: pytrees.Tree,
        batch: Batch,
    ) -> pytrees.Tree:
        """Return the memory with the directions of one more task."""
        images = batch["images"]
        grams = sum(
            np.asarray(
                _grams(method, trainable, backbone, images[start : start + AT_ONCE]), np.float64
            )
            for start in range(0, len(images), AT_ONCE)
        )
        grown = [
            _grow(np.asarray(old, np.float64), gram, self.threshold)
            for old, gram in zip(memory["projector"], grams, strict=True)
        ]
        return {"projector": jnp.asarray(np.stack(grown), jnp.float32)}


@functools.partial(jax.jit, static_argnums=0)
def _grams(
    method: "Method", trainable: pytrees.Tree, backbone: pytrees.Tree, images: jax.Array
) -> jax.Array:
    """Sum xᵀx `[layers, dim, dim]` over the tokens x of images in [0, 1].

    Tokens are the queries of the prompted layers or, for a pool, the embedded images.
    """
    features = method.host.projection_inputs(method, trainable, backbone, images)
    return jnp.stack(
        [
            jnp.einsum("bnd,bne->de", x, x, precision="highest")
            for x in (f.astype(jnp.float32) for f in features)
        ]
    )


def _grow(projector: np.ndarray, gram: np.ndarray, threshold: float) -> np.ndarray:
    rest = np.eye(len(gram)) - projector
    values, vectors = np.linalg.eigh(rest @ gram @ rest)
    captured = np.trace(projector @ gram)
    for value, vector in zip(values[::-1], vectors.T[::-1], strict=True):
        if captured >= threshold * np.trace(gram):
            break
        projector = projector + np.outer(vector, vector)
        captured += value
    return projector


@dataclasses.dataclass(frozen=True)
class EWC(ContinualStrategy):
    """Elastic Weight Consolidation (Kirkpatrick et al., 2017), online: + λ/2 Σ F (θ − θ*)² over
    everything trained.

    F adds up the tasks' diagonal empirical Fisher informations, θ* is where the last task ended.
    All weights are shared: forgetting comes from every step, and the term slows it where F is
    large.

    Memory: `{"fisher": F}`, shaped as the shared part; θ* is the shared part as stored.
    """

    settings: ClassVar[tuple[str, ...]] = ("ewc_strength",)
    published_as: ClassVar[str] = "EWC"
    strength: float = 1000.0

    @classmethod
    def from_config(cls, config: "Config") -> Self:
        """Make the strategy with `ewc_strength` as λ."""
        return cls(config.ewc_strength)

    def init(self, method: "Method", shared: pytrees.Tree) -> pytrees.Tree:
        """Return F = 0: nothing is held on to yet."""
        return {"fisher": jax.tree.map(jnp.zeros_like, shared)}

    def before_task(
        self, memory: pytrees.Tree, shared: pytrees.Tree
    ) -> tuple[pytrees.Tree, pytrees.Tree]:
        """Return the memory with the shared part, θ*, as `anchor`, and the shared part as it is."""
        return memory | {"anchor": shared}, shared

    def loss(
        self,
        memory: pytrees.Tree,
        method: "Method",
        trainable: pytrees.Tree,
        backbone: pytrees.Tree,
        batch: Batch,
        logits: jax.Array,
    ):
        """Return the term λ/2 Σ F (θ − θ*)², a scalar."""
        terms = jax.tree.map(
            lambda f, x, a: jnp.sum(f * (x - a) ** 2),
            memory["fisher"],
            trainable["shared"],
            memory["anchor"],
        )
        return self.strength / 2 * sum(jax.tree.leaves(terms))

    def update(
        self,
        memory: pytrees.Tree,
        method: "Method",
        trainable: pytrees.Tree,
        backbone: pytrees.Tree,
        batch: Batch,
    ) -> pytrees.Tree:
        """Return the memory with one more task's Fisher information added to F.

        It is the mean over images of the squared gradient of log p(label).
        """
        fisher = _fisher(
            method, trainable, backbone, batch["images"], batch["labels"], batch["class_mask"]
        )
        return {"fisher": jax.tree.map(jnp.add, memory["fisher"], fisher)}


@functools.partial(jax.jit, static_argnums=0)
def _fisher(
    method: "Method",
    trainable: pytrees.Tree,
    backbone: pytrees.Tree,
    images: jax.Array,
    labels: jax.Array,
    class_mask: jax.Array,
):
    def log_p(shared, image, label):
        logits = method.logits(
            backbone, trainable["adapter"], shared, method.trunk(backbone, shared, image[None])
        )
        return jax.nn.log_softmax(jnp.where(class_mask[None], logits, -jnp.inf))[0, label]

    def add(total, one):
        grads = jax.grad(log_p)(trainable["shared"], *one)
        return jax.tree.map(lambda t, g: t + g * g / len(images), total, grads), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trainable["shared"]), (images, labels))[0]


@dataclasses.dataclass(frozen=True)
class Distillation(ContinualStrategy):
    """The old network's answers on the batch's images, kept for the old classes.

    + λ T² KL between the softmaxes at temperature T = 2 over the classes of older tasks.

    Memory: `{"seen": bool [classes]}`; the old network is the shared part as stored.
    """

    strength: float = 1.0
    temperature: float = 2.0

    def init(self, method: "Method", shared: pytrees.Tree) -> pytrees.Tree:
        """Return a memory in which no class is old."""
        return {"seen": jnp.zeros(method.num_classes, bool)}

    def before_task(
        self, memory: pytrees.Tree, shared: pytrees.Tree
    ) -> tuple[pytrees.Tree, pytrees.Tree]:
        """Return the memory with the old network as `shared`, and the shared part as it is."""
        return memory | {"shared": shared}, shared

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
        seen, weights, shared = memory["seen"], batch["weights"], memory["shared"]
        before = method.logits(
            backbone, trainable["adapter"], shared, method.trunk(backbone, shared, batch["images"])
        )
        # Nothing is old: a softmax over nothing would be NaN, so all classes stand in and the term
        # is multiplied by 0.
        old = jnp.where(seen.any(), seen, True)[None]
        log_then, log_now = (
            jax.nn.log_softmax(jnp.where(old, x / self.temperature, -jnp.inf))
            for x in (jax.lax.stop_gradient(before), logits)
        )
        divergence = jnp.sum(
            jnp.where(
                old,
                jnp.exp(log_then) * (jnp.where(old, log_then, 0) - jnp.where(old, log_now, 0)),
                0,
            ),
            axis=-1,
        )
        mean = jnp.sum(jnp.where(weights > 0, divergence * weights, 0)) / weights.sum()
        return self.strength * self.temperature**2 * mean * seen.any().astype(mean.dtype)


class LwF(Distillation):
    """Learning without Forgetting (Li and Hoiem, 2016): distillation on the new images alone.

    There, the new classes' columns are trained first, alone; here everything is from the start. All
    weights are shared: old tasks drift wherever the new images do not speak for the old ones.
    """

    settings: ClassVar[tuple[str, ...]] = ("lwf_strength",)
    published_as: ClassVar[str] = "LwF"

    @classmethod
    def from_config(cls, config: "Config") -> Self:
        """Make the strategy with `lwf_strength` as λ."""
        return cls(config.lwf_strength)

    def update(
        self,
        memory: pytrees.Tree,
        method: "Method",
        trainable: pytrees.Tree,
        backbone: pytrees.Tree,
        batch: Batch,
    ) -> pytrees.Tree:
        """Return the memory with the task's classes among the old ones."""
        return {"seen": memory["seen"] | jnp.asarray(batch["class_mask"])}
