"""Evaluation after a task: every task-identity rule that applies, on every test image.

The engine is `inference.engine`, the same as for users' images. Every distinct (image, task) pair
is run once, whichever rules ask for it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax import Array
from jax.sharding import Mesh

from soft_jax.inference import engine
from soft_jax.inference.engine import Batching, Model
from soft_jax.inference.rules import ORACLE, ImageBatch, TaskIdentityRule, TestBatches


@dataclasses.dataclass(frozen=True)
class Row:
    """One protocol's counts on one task's test images.

    `identified` counts the images by the task that they were given to.
    """

    correct: int
    task_correct: int
    total: int
    identified: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How test images are batched.

    `batch_size` is that of the published test batches, `eval_batch_size` that of forward passes.
    `prepared`: whether test images come at the model's size, prepared already.
    """

    mesh: Mesh
    batch_size: int
    eval_batch_size: int
    prepared: bool = False

    @property
    def batching(self) -> Batching:
        """Return the sizes of forward passes."""
        return Batching(self.mesh, self.eval_batch_size)

    @property
    def chunk(self) -> int:
        """Return how many images have their tokens in memory at once.

        They are whole test batches, about four forward passes.
        """
        return self.batch_size * max(self.batching.chunk // self.batch_size, 1)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the protocols made of one task's test images.

    By protocol: `task_ids` int `[N]`, `logits` `[N, classes]` of that task's network, and `scores`,
    those with -inf for classes that the protocol does not let win. `alpha_gradients` are the test
    batches', `[batches, seen]` by shots; empty without masks.
    """

    task_ids: dict[str, np.ndarray]
    logits: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    alpha_gradients: dict[int, np.ndarray]

    @classmethod
    def concatenate(cls, parts: Sequence["Answers"]) -> "Answers":
        """Return the answers to consecutive chunks as one."""

        def joined(field):
            return {
                key: np.concatenate([getattr(part, field)[key] for part in parts])
                for key in getattr(parts[0], field)
            }

        return cls(*(joined(field.name) for field in dataclasses.fields(cls)))


def answer(
    model: Model,
    rules: Sequence[TaskIdentityRule],
    images: np.ndarray,
    query: np.ndarray,
    task: int,
    settings: Settings,
) -> Answers:
    """Identify and classify test images of one task under every rule.

    Args:
        model: the model of the tasks seen.
        rules: those that apply to its method.
        images: uint8 `[N, H, W, 3]`.
        query: q(x) `[N, dim]`.
        task: the images' task.
        settings: how they are batched.
    """
    starts = range(0, len(images), settings.chunk)
    parts = [slice(start, start + settings.chunk) for start in starts]
    return Answers.concatenate(
        [_answer_chunk(model, rules, images[part], query[part], task, settings) for part in parts]
    )


def _answer_chunk(
    model: Model,
    rules: Sequence[TaskIdentityRule],
    images: np.ndarray,
    query: np.ndarray,
    task: int,
    settings: Settings,
) -> Answers:
    batches = TestBatches(len(images), settings.batch_size)
    tokens, batch_tokens = _tokens(model, images, query, batches, settings)
    given = np.full(len(images), task)
    batch = ImageBatch(
        model, tokens, query, settings.batching, given, batches, batch_tokens=batch_tokens
    )
    ids = {rule.key: rule.identify(batch) for rule in rules}
    shared = batch_tokens is tokens
    alone = {rule.key: rule for rule in rules if shared or not rule.by_batch}
    logits = _logits(batch, tokens, alone, ids)
    if len(alone) < len(rules):
        together = {rule.key: rule for rule in rules if rule.key not in alone}
        logits |= _logits(batch, batch_tokens, together, ids)
    scores = {rule.key: rule.scores(batch, logits[rule.key], ids[rule.key]) for rule in rules}
    ids = {rule.key: rule.final_tasks(batch, scores[rule.key], ids[rule.key]) for rule in rules}
    return Answers(
        ids, {rule.key: logits[rule.key] for rule in rules}, scores, batch.alpha_gradients
    )


def _tokens(
    model: Model, images: np.ndarray, query: np.ndarray, batches: TestBatches, settings: Settings
) -> tuple[Array, Array]:
    """Return trunk tokens of each image by itself, and as part of its test batch.

    The two differ where a batch selects other prompts of a pool than an image by itself; otherwise
    they are the same array.
    """
    batching, prepared, host = settings.batching, settings.prepared, model.method.host
    if not host.pools:
        tokens, _ = engine.encode(model, images, batching, queried=False, prepared=prepared)
        return tokens, tokens
    selected = engine.pool_selection(model, query, batching)
    voted = np.empty_like(selected)
    for batch in range(batches.index[-1] + 1):
        members = batches.index == batch
        voted[members] = host.select_together(selected[members], np.ones(members.sum(), np.float32))
    return tuple(
        engine.encode(model, images, batching, False, prepared, selected=chosen)[0]
        for chosen in (selected, voted)
    )


def _logits(
    batch: ImageBatch,
    tokens: Array,
    rules: dict[str, TaskIdentityRule],
    ids: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Return logits `[N, classes]` by protocol.

    Every distinct (task, image, place in its batch) is run once.
    """
    method = batch.model.method
    place = np.stack([batch.batches.position, batch.batches.length], axis=1)
    columns = []
    for key, rule in rules.items():
        # Where tasks have nothing of their own, all protocols ask for the same.
        pairs = engine.alone(ids[key] if method.by_task else np.zeros_like(ids[key]))
        # Every published figure, also with the task given, is by batches.
        if method.host.depends_on_place and (rule.by_batch or rule.grouping == ORACLE):
            pairs[:, 2:] = place
        columns.append(pairs)
    pairs, inverse = np.unique(np.concatenate(columns), axis=0, return_inverse=True)
    logits = engine.logits(batch.model, tokens, pairs, batch.batching)
    parts = np.split(inverse.reshape(-1), len(rules))
    return {key: logits[part] for key, part in zip(rules, parts, strict=True)}


def evaluate_task(
    model: Model,
    rules: Sequence[TaskIdentityRule],
    images: np.ndarray,
    labels: np.ndarray,
    query: np.ndarray,
    task: int,
    settings: Settings,
) -> dict[str, Row]:
    """Identify and classify one task's test images under every rule, and count the results.

    Arguments are those of `answer`, and `labels` int `[N]`.
    """
    answers = answer(model, rules, images, query, task, settings)
    rows = {}
    for protocol, tasks in answers.task_ids.items():
        counts = np.bincount(tasks, minlength=len(model.rows["key"]))
        rows[protocol] = Row(
            correct=int((answers.scores[protocol].argmax(axis=1) == labels).sum()),
            task_correct=int((tasks == task).sum()),
            total=len(labels),
            identified=tuple(counts.tolist()),
        )
    return rows
