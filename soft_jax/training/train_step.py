"""The training step: one jit-compiled, data-parallel function that serves every task."""

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from soft_jax import pytrees
from soft_jax.data.augmentation import Augment, augment, to_unit
from soft_jax.distributed import by_row, replicated
from soft_jax.methods import prompts
from soft_jax.methods.method import Adapter, Method, Shared

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Everything static of a training step. `learning_rate` is the optimizer's own; `augment`
    None takes images as they are.

    With `cache_queries` a batch brings its q(x) along; else it is that of the augmented images.
    With `scheduled` it brings its `rates` (`Rates`) along, which then stand in the place of
    `learning_rate`; `optimizer` is "adam" or "sgd". `score_bytes` is the room for a layer's scores
    of attention, in float32: a batch with larger ones is worked off in groups of images, where its
    loss is a sum over images. None: all at once.
    """

    method: Method
    learning_rate: float
    clip_norm: float = 1.0
    key_loss_weight: float = 1.0
    augment: Augment | None = None
    cache_queries: bool = False
    optimizer: str = "adam"
    scheduled: bool = False
    score_bytes: int | None = None

    def on(self, mesh: Mesh) -> "StepConfig":
        """Return this for steps over `mesh`."""
        # Of ViT-B/16, 24 images fit, and 128 do not: their scores and shares then go through a
        # TPU's main memory at every product, and its compiler forecasts twice the cycles an image
        # (benchmarks/README.md). Several devices would add their gradients up at each group.
        alone = mesh.size == 1 and mesh.devices.flat[0].platform == "tpu"
        return dataclasses.replace(self, score_bytes=48 * 2**20) if alone else self

    def images_at_once(self, backbone: pytrees.Tree, images: jax.Array) -> int:
        """Return into groups of how many images a batch `[B, H, W, 3]` is to be split, at most B.

        Groups are alike, so a B without a divisor of at least half of what fits stays whole.
        """
        method, count = self.method, len(images)
        # A strategy's loss and a pool's selection are the whole batch's, and a text encoder would
        # run for each group.
        if not self.score_bytes or method.strategy or method.host.pools or method.host.reads_text:
            return count
        tokens = jax.eval_shape(method.architecture.embed, backbone, images).shape[1]
        fit = self.score_bytes // (4 * method.architecture.heads * tokens**2)
        sizes = [size for size in range(max(1, fit // 2), fit + 1) if count % size == 0]
        return count if count <= fit else max(sizes, default=count)

    def transformation(self) -> optax.GradientTransformation:
        """Return Adam(0.9, 0.999, eps 1e-8), or SGD with momentum 0.9 as PyTorch has it.

        The updates are multiplied by -`learning_rate`, or by nothing yet where it is `scheduled`.
        """
        if not self.scheduled:
            return optax.adam(self.learning_rate)
        return optax.trace(0.9) if self.optimizer == "sgd" else optax.scale_by_adam()


class Rates(NamedTuple):
    """What a task's steps are scaled by: scalars, of which none is static.

    `learning_rate` is the first epoch's; with `epochs` above 0 it falls to 0 by half a cosine, by
    epoch, each of `steps_per_epoch` steps (PyTorch's CosineAnnealingLR). `weight_decay` × weights
    is added to their gradients.
    """

    learning_rate: jax.Array
    weight_decay: jax.Array
    epochs: jax.Array
    steps_per_epoch: jax.Array

    def at(self, step: jax.Array) -> jax.Array:
        """Return the learning rate of step `step`."""
        dtype = jnp.result_type(self.learning_rate)
        epoch = (step // self.steps_per_epoch).astype(dtype)
        share = jnp.where(self.epochs > 0, epoch / jnp.maximum(self.epochs, 1).astype(dtype), 0)
        return self.learning_rate * (1 + jnp.cos(jnp.pi * share)) / 2


CHUNK = 64  # steps that one call of `compile_steps`' program can run
TERMS = ("loss", "cross_entropy", "key_similarity", "accuracy", "grad_norm")  # of a step, scalars


class TrainState(NamedTuple):
    """What a task's training carries from step to step. Nothing frozen is in it.

    `trainable` is `{"adapter": ..., "shared": ...}`; `step` counts the task's steps.
    """

    step: jax.Array
    trainable: dict[str, pytrees.Tree]
    opt_state: optax.OptState


def init_state(step_config: StepConfig, adapter: Adapter, shared: Shared) -> TrainState:
    """Return the state before a task's first step; the optimizer starts anew with each task."""
    trainable = {"adapter": adapter, "shared": shared}
    opt_state = step_config.transformation().init(trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, opt_state)


def stream(seed: int, name: str, task: int) -> jax.Array:
    """Return the key of one named stream of randomness of one task.

    Steps fold their own number in.
    """
    return jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), task
    )


def loss_fn(
    trainable: dict[str, pytrees.Tree],
    backbone: pytrees.Tree,
    batch: Batch,
    step_config: StepConfig,
    place: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the loss: cross entropy over the task's classes minus λ·cos(q(x), k).

    Both are means over the images of weight 1 (Soft-TF, section 3). With `place`, `batch` is a
    group out of a larger one, and they are its share of that one's means: `place` has each image's
    position in the larger batch, int `[B]`, and that batch's sum of weights.

    k is the task's key, and for L2P each of the pool's keys that the batch selects (Wang et al.,
    2022, eq. 5); a method without keys has no such term, one with a memory adds its own.

    `batch` holds `images` in [0, 1] `[B, H, W, 3]`, `labels` int `[B]`, `weights` `[B]` (0 for
    padding, which stands at the end), `class_mask` bool `[classes]`, the task's classes (with
    rehearsal all seen), `memory`, the method's `columns`, and `query` `[B, dim]` where the
    step_config says so. The second result names the terms.
    """
    method, weights = step_config.method, batch["weights"]
    images = batch["images"]
    positions, total = place or (jnp.arange(len(weights)), weights.sum())

    def mean(x):
        return jnp.sum(jnp.where(weights > 0, x * weights, 0)) / total

    adapter, shared, host = trainable["adapter"], trainable["shared"], method.host
    query, selected, pulled = None, None, jnp.zeros(len(weights), weights.dtype)
    if method.queries:
        query = (
            batch["query"]
            if step_config.cache_queries
            else jax.lax.stop_gradient(method.query(backbone, images))
        )
    if method.by_task:
        key = adapter["key"]
        pulled += prompts.similarity(query.astype(key.dtype), key[None])[:, 0]
    if host.pools:
        to_pool = host.similarity(shared, query)
        # As published, a training batch shares its selection; it holds one task, and training may
        # know that.
        selected = host.select_together(host.select(to_pool), weights)
        pulled += jnp.take_along_axis(to_pool, selected, axis=1).sum(axis=1)
    sources = host.sources(positions, total.astype(int))
    shared = method.with_own_classes(backbone, adapter, shared, batch["class_mask"])
    tokens = method.trunk(backbone, shared, images, selected)
    logits = method.logits(backbone, adapter, shared, tokens, sources)
    masked = jnp.where(batch["class_mask"][None], logits, -jnp.inf)
    cross_entropy = mean(optax.softmax_cross_entropy_with_integer_labels(masked, batch["labels"]))
    key_similarity = mean(pulled)
    loss = cross_entropy - step_config.key_loss_weight * key_similarity
    if method.strategy:
        loss += method.strategy.loss(batch["memory"], method, trainable, backbone, batch, logits)
    hits = mean((masked.argmax(axis=-1) == batch["labels"]).astype(weights.dtype))
    terms = {
        "loss": loss,
        "cross_entropy": cross_entropy,
        "key_similarity": key_similarity,
        "accuracy": hits,
    }
    return loss, terms | {"logits": logits} | ({} if query is None else {"query": query})


def _by_groups(
    trainable: dict[str, pytrees.Tree],
    backbone: pytrees.Tree,
    batch: Batch,
    step_config: StepConfig,
    size: int,
) -> tuple[pytrees.Tree, dict[str, jax.Array]]:
    """Return what `jax.grad(loss_fn)` does, from groups of `size` images, one after the other."""
    count, total = len(batch["weights"]), batch["weights"].sum()
    names = [name for name in ("images", "labels", "weights", "query") if name in batch]
    rows = {name: batch[name] for name in names} | {"positions": jnp.arange(count)}
    groups = jax.tree.map(lambda x: x.reshape(count // size, size, *x.shape[1:]), rows)

    def part(group):
        place = (group["positions"], total)
        grads, terms = jax.grad(loss_fn, has_aux=True)(
            trainable, backbone, {**batch, **group}, step_config, place
        )
        by_image = {name: terms.pop(name) for name in ("logits", "query") if name in terms}
        return (grads, terms), by_image

    def add(sums, group):
        now, by_image = part(group)
        return jax.tree.map(jnp.add, sums, now), by_image

    shapes, _ = jax.eval_shape(part, jax.tree.map(lambda x: x[0], groups))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, terms), by_image = jax.lax.scan(add, nothing, groups)
    whole = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), by_image)
    return grads, terms | whole


def gradients(
    trainable: dict[str, pytrees.Tree],
    backbone: pytrees.Tree,
    batch: Batch,
    step_config: StepConfig,
) -> tuple[pytrees.Tree, dict[str, Any]]:
    """Compute the gradients of every trained array, and the terms of the loss.

    The gradients are clipped to a global norm, then projected where the method does that. The terms
    are `loss_fn`'s and `grad_norm` (before clipping).

    Where `batch["freeze_g_prompt"]`, a bool, the G-prompt's gradients are 0: Adam, fresh in each
    task, then leaves it as it is, to the bit. Clipping divides by norm + 1e-6, as PyTorch's
    `clip_grad_norm_` does (Optax divides by the norm alone).
    """
    size = step_config.images_at_once(backbone, batch["images"])
    if size < len(batch["weights"]):
        grads, terms = _by_groups(trainable, backbone, batch, step_config, size)
    else:
        grads, terms = jax.grad(loss_fn, has_aux=True)(trainable, backbone, batch, step_config)
    method = step_config.method
    frozen = method.host.freeze(grads["shared"], batch["freeze_g_prompt"])
    grads = grads | {"shared": frozen}
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(step_config.clip_norm / (norm + 1e-6), 1)
    grads = jax.tree.map(lambda g: g * scale, grads)
    if method.strategy:
        grads = method.strategy.project(batch["memory"], method, grads)
    return grads, terms | {"grad_norm": norm}


def train_step(
    state: TrainState,
    backbone: pytrees.Tree,
    batch: Batch,
    key: jax.Array,
    *,
    step_config: StepConfig,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Run one step on uint8 images: augment, query, gradients, Adam.

    `key` is the task's augmentation stream.

    Returns the new state and the scalars `loss`, `cross_entropy`, `key_similarity`, `accuracy` and
    `grad_norm`.
    """
    images = batch["images"]
    if step_config.augment is not None:
        images = augment(jax.random.fold_in(key, state.step), images, step_config.augment)
    grads, terms = gradients(
        state.trainable,
        backbone,
        {**batch, "images": to_unit(images, batch["weights"].dtype)},
        step_config,
    )
    rates = batch["rates"] if step_config.scheduled else None
    if rates:
        grads = _decayed(step_config.method, grads, state.trainable, rates.weight_decay)
    update = step_config.transformation().update
    updates, opt_state = update(grads, state.opt_state, state.trainable)
    if rates:
        rate = rates.at(state.step)
        updates = jax.tree.map(lambda update: -(rate * update).astype(update.dtype), updates)
    trainable = optax.apply_updates(state.trainable, updates)
    return TrainState(state.step + 1, trainable, opt_state), {name: terms[name] for name in TERMS}


def _decayed(
    method: Method, grads: pytrees.Tree, trainable: pytrees.Tree, decay: jax.Array
) -> pytrees.Tree:
    """Return gradients with `decay` × weights added, but for what no step trains."""
    decayed = jax.tree.map(lambda g, w: g + (decay * w).astype(g.dtype), grads, trainable)
    trained = method.trained_of_shared(decayed["shared"])
    return decayed | {"shared": grads["shared"] | trained}


def train_steps(
    state: TrainState,
    backbone: pytrees.Tree,
    pool: Batch,
    batches: Batch,
    fixed: Batch,
    key: jax.Array,
    count: jax.Array,
    *,
    step_config: StepConfig,
    sharding: NamedSharding,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Run `train_step` `count` times, on images that are on the devices already.

    Args:
        state: as for `train_step`.
        backbone: frozen parameters.
        pool: what a batch is taken from by row: `images` uint8 `[N, H, W, 3]`, `labels` int `[N]`,
            the method's `columns`, and `query` `[N, dim]` if any.
        batches: `rows` int `[CHUNK, B]` of the pool and `weights` `[CHUNK, B]`, of which the first
            `count` are used.
        fixed: the rest of a batch, the same for every step.
        key: the task's augmentation stream.
        count: int, at most CHUNK.
        step_config: everything static.
        sharding: of a batch.

    Returns:
        The new state, and each of TERMS by step, `[CHUNK]`, 0 from `count` on.
    """

    def step(index, carry):
        state, terms = carry
        rows = jax.lax.with_sharding_constraint(batches["rows"][index], sharding)
        taken = {
            name: jax.lax.with_sharding_constraint(array[rows], sharding)
            for name, array in pool.items()
        }
        batch = {
            **taken,
            **fixed,
            "weights": jax.lax.with_sharding_constraint(batches["weights"][index], sharding),
        }
        state, now = train_step(state, backbone, batch, key, step_config=step_config)
        return state, {name: terms[name].at[index].set(now[name]) for name in TERMS}

    return jax.lax.fori_loop(
        0,
        count,
        step,
        (state, {name: jnp.zeros(CHUNK, batches["weights"].dtype) for name in TERMS}),
    )


@functools.cache
def compile_step(step_config: StepConfig, mesh: Mesh) -> Any:
    """Jit `train_step` over `mesh`, the state donated.

    One compilation serves every task of a run.
    """
    whole, rows = replicated(mesh), by_row(mesh)
    batch = {
        "images": rows,
        "labels": rows,
        "weights": rows,
        "class_mask": whole,
        "freeze_g_prompt": whole,
        "memory": whole,
    }
    batch |= dict.fromkeys(step_config.method.columns, rows)
    batch |= {"query": rows} if step_config.cache_queries else {}
    batch |= {"rates": whole} if step_config.scheduled else {}
    step = functools.partial(train_step, step_config=step_config.on(mesh))
    return jax.jit(
        step, donate_argnums=0, in_shardings=(whole, whole, batch, whole), out_shardings=whole
    )


@functools.cache
def compile_steps(step_config: StepConfig, mesh: Mesh) -> Any:
    """Jit `train_steps` over `mesh`, the state donated.

    Every device holds the whole pool and works on its rows of each batch.
    """
    steps = functools.partial(train_steps, step_config=step_config.on(mesh), sharding=by_row(mesh))
    return jax.jit(
        steps, donate_argnums=0, in_shardings=replicated(mesh), out_shardings=replicated(mesh)
    )


@functools.cache
def compile_init(step_config: StepConfig, mesh: Mesh) -> Any:
    """Jit `init_state` over `mesh`; it copies its arguments.

    A step donates its state, and others hold the adapter and the shared part.
    """

    def init(adapter, shared):
        return init_state(step_config, *jax.tree.map(jnp.copy, (adapter, shared)))

    return jax.jit(init, in_shardings=replicated(mesh), out_shardings=replicated(mesh))
