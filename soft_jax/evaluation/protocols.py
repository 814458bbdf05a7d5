"""Evaluation after a task: who identifies the task of a test image (the protocol), and what it
is then classified as.

Protocols, each a row of its own:

- `per_sample` / `prompt_id`: each image by itself; the nearest key of the tasks seen, then the
  classes seen. The default.
- `per_sample` / `gradient_id`: each image by itself; the task by ∂H/∂α, then the classes seen.
- `per_sample` / `prototype`: each image by itself; the task by the statistics of the frozen
  features that every task leaves behind, then that task's classes, by the classifier and the
  statistics together (log p + logits).
- `batch_vote` / `prompt_id`: the published one. Test batches hold one task, and all of a batch goes
  by its majority, over every key and every output of the head, untrained ones included. The batch
  leaks the task.
- `batch_vote` / `gradient_id_7`: the same batches; the task by ∂H/∂α on the batch's first 7 images,
  or as many as `shots` says.
- `per_sample` / `no_task_id`: for methods whose tasks have nothing of their own: each image by
  itself, the classes seen. L2P selects prompts for each image.
- `batch_vote` / `pool`: L2P as published: what most images of a single-task batch select, for all
  of them. The batch leaks the task.
- `oracle` / `task_given`: the task is given and the logits are restricted to its classes
  (task-incremental learning).

The engine is `inference`'s, the same as for users' images. Every distinct (image, task) pair is run
once, whichever protocols ask for it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax import Array
from jax.sharding import Mesh

from soft_jax.evaluation.report import vote_gradient
from soft_jax.inference import engine, identity
from soft_jax.inference.engine import Batching, Model
from soft_jax.methods import prompts
from soft_jax.methods.method import Method

PER_SAMPLE = "per_sample/prompt_id"
PER_SAMPLE_GRADIENT = "per_sample/gradient_id"
PROTOTYPE = "per_sample/prototype"
VOTE_PROMPT = "batch_vote/prompt_id"
ORACLE = "oracle/task_given"
NO_TASK_ID = "per_sample/no_task_id"
VOTE_POOL = "batch_vote/pool"


def _by_batch(protocol: str) -> bool:
    """Whether a test batch decides for its images: about the task, and about L2P's selection."""
    return protocol.startswith("batch_vote/")


def protocols(method: Method, shots: Sequence[int], prototypes: bool = True) -> tuple[str, ...]:
    """The protocols that apply to `method`; Gradient ID needs kernels of the task's own, to
    superpose.
    """
    by_task, kernels = method.by_task, bool(method.kernels)
    known = {
        NO_TASK_ID: not by_task,
        PER_SAMPLE: by_task,
        PER_SAMPLE_GRADIENT: kernels,
        PROTOTYPE: by_task and prototypes,
        VOTE_POOL: not by_task and method.pool_size > 0,
        VOTE_PROMPT: by_task,
        **{vote_gradient(n): kernels for n in shots},
        ORACLE: True,
    }
    return tuple(protocol for protocol, applies in known.items() if applies)


@dataclasses.dataclass(frozen=True)
class Row:
    """One protocol's counts on one task's test images; `identified` counts them by the task they
    were given to.
    """

    correct: int
    task_correct: int
    total: int
    identified: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """`batch_size` of the published test batches, numbers of `shots` that Gradient ID sees of
    each (0: all), size of forward passes.

    `prepared`: whether test images come at the model's size, prepared already.
    """

    mesh: Mesh
    batch_size: int
    shots: tuple[int, ...]
    eval_batch_size: int
    prepared: bool = False

    @property
    def batching(self) -> Batching:
        """Sizes of forward passes."""
        return Batching(self.mesh, self.eval_batch_size)

    @property
    def chunk(self) -> int:
        """Images whose tokens are held at once: whole test batches, about four forward passes."""
        return self.batch_size * max(self.batching.chunk // self.batch_size, 1)


@dataclasses.dataclass(frozen=True)
class Batches:
    """How the published code batches a task's test images: in order, `size` at a time, the last
    one partial.
    """

    count: int
    size: int

    @property
    def index(self) -> np.ndarray:
        """The batch of each image, `[N]`."""
        return np.arange(self.count) // self.size

    @property
    def position(self) -> np.ndarray:
        """Each image's position in its batch, `[N]`."""
        return np.arange(self.count) % self.size

    @property
    def length(self) -> np.ndarray:
        """The number of images in each image's batch, `[N]`."""
        return np.bincount(self.index)[self.index]


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
        """The answers to consecutive chunks as one."""

        def joined(field):
            return {
                key: np.concatenate([getattr(part, field)[key] for part in parts])
                for key in getattr(parts[0], field)
            }

        return cls(*(joined(field.name) for field in dataclasses.fields(cls)))


def answer(
    model: Model, images: np.ndarray, query: np.ndarray, task: int, settings: Settings
) -> Answers:
    """Identify and classify test images uint8 `[N, H, W, 3]` of one task, with q(x) `[N, dim]`,
    under every protocol.
    """
    parts = [
        slice(start, start + settings.chunk) for start in range(0, len(images), settings.chunk)
    ]
    return Answers.concatenate(
        [_answer_chunk(model, images[part], query[part], task, settings) for part in parts]
    )


def _answer_chunk(
    model: Model, images: np.ndarray, query: np.ndarray, task: int, settings: Settings
) -> Answers:
    method, batching, batches = (
        model.method,
        settings.batching,
        Batches(len(images), settings.batch_size),
    )
    tokens, batch_tokens = _tokens(model, images, query, batches, settings)
    ids = {protocol: np.full(len(images), task) for protocol in (ORACLE, NO_TASK_ID, VOTE_POOL)}
    gradients, posterior = {}, None
    if method.by_task:
        similarity = engine.key_similarity(model, query, batching)
        nearest = similarity.argmax(axis=1)  # of the whole pool
        ids[PER_SAMPLE] = engine.nearest_key(model, similarity)
        ids[VOTE_PROMPT] = identity.majority(nearest, batches.index, len(model.keys))
    if method.kernels:
        ids[PER_SAMPLE_GRADIENT] = engine.gradient_id(model, tokens, ids[PER_SAMPLE], batching)
        for shots in settings.shots:
            gradients[shots] = batch_alpha_gradients(
                model, batch_tokens, nearest, batches, shots, batching
            )
            ids[vote_gradient(shots)] = np.asarray(model.tasks)[
                gradients[shots].argmin(axis=1)[batches.index]
            ]
    if model.prototypes:
        posterior = engine.log_posterior(model, query, batching)
        ids[PROTOTYPE] = engine.prototype_id(model, posterior)
    ids = {
        protocol: ids[protocol]
        for protocol in protocols(method, settings.shots, model.prototypes is not None)
    }
    alone = {
        protocol: tasks
        for protocol, tasks in ids.items()
        if batch_tokens is tokens or not _by_batch(protocol)
    }
    logits = _logits(model, tokens, alone, batches, batching)
    if len(alone) < len(ids):
        logits |= _logits(
            model, batch_tokens, {p: ids[p] for p in ids if p not in alone}, batches, batching
        )
    scores = {
        NO_TASK_ID: lambda: engine.mask_to_seen(model, logits[NO_TASK_ID]),
        PER_SAMPLE: lambda: engine.mask_to_seen(model, logits[PER_SAMPLE]),
        PER_SAMPLE_GRADIENT: lambda: engine.mask_to_seen(model, logits[PER_SAMPLE_GRADIENT]),
        PROTOTYPE: lambda: engine.mask_to_task(
            model, posterior + logits[PROTOTYPE], ids[PROTOTYPE]
        ),
        ORACLE: lambda: engine.mask_to_task(model, logits[ORACLE], ids[ORACLE]),
    }
    scores = {p: scores[p]() if p in scores else logits[p] for p in ids}
    for protocol in (NO_TASK_ID, VOTE_POOL):
        if protocol in ids:  # nobody names the task; the winning class has one
            ids[protocol] = model.task_of_class[scores[protocol].argmax(axis=1)]
    return Answers(ids, logits, scores, gradients)


def _tokens(
    model: Model, images: np.ndarray, query: np.ndarray, batches: Batches, settings: Settings
) -> tuple[Array, Array]:
    """Trunk tokens of each image by itself, and as part of its test batch: another selection of
    L2P's prompts, else the same array.
    """
    batching, prepared = settings.batching, settings.prepared
    if not model.method.pool_size:
        tokens, _ = engine.encode(model, images, batching, queried=False, prepared=prepared)
        return tokens, tokens
    selected = engine.pool_selection(model, query, batching)
    voted = np.empty_like(selected)
    for batch in range(batches.index[-1] + 1):
        members = batches.index == batch
        voted[members] = prompts.most_selected(
            selected[members], np.ones(members.sum(), np.float32), model.method.pool_size
        )
    return tuple(
        engine.encode(model, images, batching, False, prepared, selected=chosen)[0]
        for chosen in (selected, voted)
    )


def _logits(
    model: Model, tokens: Array, ids: dict[str, np.ndarray], batches: Batches, batching: Batching
) -> dict[str, np.ndarray]:
    """Logits `[N, classes]` of each protocol, every distinct (task, image, place in its batch)
    run once.
    """
    place = np.stack([batches.position, batches.length], axis=1)
    columns = []
    for protocol, tasks in ids.items():
        # Where tasks have nothing of their own, all protocols ask for the same.
        pairs = engine.alone(tasks if model.method.by_task else np.zeros_like(tasks))
        # Under the interleaved layout an image's prefix depends on its place in its test batch;
        # every published figure is by batches.
        if model.method.prefix_layout == "interleaved" and (
            _by_batch(protocol) or protocol == ORACLE
        ):
            pairs[:, 2:] = place
        columns.append(pairs)
    pairs, inverse = np.unique(np.concatenate(columns), axis=0, return_inverse=True)
    logits = engine.logits(model, tokens, pairs, batching)
    return {
        p: logits[part]
        for p, part in zip(ids, np.split(inverse.reshape(-1), len(ids)), strict=True)
    }


def batch_alpha_gradients(
    model: Model,
    tokens: Array,
    nearest: np.ndarray,
    batches: Batches,
    shots: int,
    batching: Batching,
) -> np.ndarray:
    """∂H/∂α at uniform α, `[batches, seen]`, of the first `shots` images (0: all) of each
    published test batch.

    The superposed pass uses the E-prompt that the majority of those images is nearest to
    (`nearest`, int `[N]`).
    """
    shots = min(shots or batches.size, batches.size)
    starts = np.arange(0, batches.count, batches.size)
    counts = np.minimum(np.minimum(batches.count - starts, batches.size), shots)
    taken = starts[:, None] + np.arange(shots)
    voted = np.array(
        [
            identity.vote(nearest[row[:n]], len(model.keys))
            for row, n in zip(taken, counts, strict=True)
        ]
    )
    taken, weights = np.minimum(taken, batches.count - 1), np.arange(shots) < counts[:, None]
    return engine.alpha_gradients(model, tokens, taken, weights, voted, batching)


def evaluate_task(
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    query: np.ndarray,
    task: int,
    settings: Settings,
) -> dict[str, Row]:
    """Every protocol's counts on the test images of one task; arguments as for `answer`,
    `labels` int `[N]`.
    """
    answers = answer(model, images, query, task, settings)
    rows = {}
    for protocol in answers.task_ids:
        tasks = answers.task_ids[protocol]
        rows[protocol] = Row(
            correct=int((answers.scores[protocol].argmax(axis=1) == labels).sum()),
            task_correct=int((tasks == task).sum()),
            total=len(labels),
            identified=tuple(np.bincount(tasks, minlength=len(model.keys)).tolist()),
        )
    return rows
