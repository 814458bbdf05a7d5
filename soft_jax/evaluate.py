"""Evaluation after a task: who identifies the task of a test image (the protocol), and what it is then classified as.

Protocols, each a row of its own:

- `per_sample` / `prompt_id`: each image by itself; the nearest key of the tasks seen, then the classes seen. The default.
- `batch_vote` / `prompt_id`: the published one. Test batches hold one task, and all of a batch goes by its majority, over
  every key and every output of the head, untrained ones included. The batch leaks the task.
- `batch_vote` / `gradient_id`: the same batches; the task by ∂H/∂α on the batch's first `shots` images.
- `oracle` / `task_given`: the task is given and the logits are restricted to its classes (task-incremental learning).

Every distinct (image, task) pair is run once, whichever protocols ask for it, and the layers that come before any
task-specific one are run once per image.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from soft_jax import prompts, task_id, train, trees
from soft_jax.augment import prepare_test, to_unit
from soft_jax.methods import Adapter, Method, Shared

PER_SAMPLE = "per_sample/prompt_id"
VOTE_PROMPT = "batch_vote/prompt_id"
VOTE_GRADIENT = "batch_vote/gradient_id"
ORACLE = "oracle/task_given"

GROUPS = 8  # test batches whose mask gradients are held at once


def protocols(method: Method) -> tuple[str, ...]:
    """The protocols that apply to `method`; Gradient ID needs masks."""
    return (PER_SAMPLE, VOTE_PROMPT, *((VOTE_GRADIENT,) if method.mask_paths else ()), ORACLE)


@dataclasses.dataclass(frozen=True)
class Row:
    """One protocol's counts on one task's test images."""

    correct: int
    task_correct: int
    total: int


@dataclasses.dataclass(frozen=True)
class Model:
    """What a stage is evaluated with: the adapters of all tasks, those not yet trained as they are initialised.

    `adapters` has one entry a task of the scenario, `seen` of them trained; `task_of_class` is int `[classes]`.
    """

    method: Method
    backbone: trees.Tree
    shared: Shared
    adapters: Sequence[Adapter]
    seen: int
    task_of_class: np.ndarray

    @functools.cached_property
    def keys(self) -> jax.Array:
        """Prompt keys of all tasks, `[tasks, dim]`."""
        return jnp.stack([adapter["key"] for adapter in self.adapters])

    @functools.cached_property
    def superposed(self) -> trees.Tree:
        """The mean of the masks seen."""
        return task_id.mean_mask(adapter["mask"] for adapter in self.adapters[: self.seen])


@dataclasses.dataclass(frozen=True)
class Settings:
    """`batch_size` of the published test batches, `shots` that Gradient ID sees of each (0: all), size of forward passes."""

    mesh: Mesh
    batch_size: int
    shots: int
    eval_batch_size: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """A few fixed sizes of forward passes, largest first, multiples of the device count: no group recompiles anything."""
        n = self.mesh.size
        return tuple(sorted({-(-max(self.eval_batch_size // share, 1) // n) * n for share in (1, 4, 16)}, reverse=True))

    @property
    def chunk(self) -> int:
        """Images whose tokens are held at once: whole test batches, about four forward passes."""
        return self.batch_size * max(4 * self.eval_batch_size // self.batch_size, 1)


@functools.partial(jax.jit, static_argnames="method")
def _query(method: Method, backbone: trees.Tree, images: jax.Array) -> jax.Array:
    return method.query(backbone, _prepared(method, backbone, images))


@functools.partial(jax.jit, static_argnames="method")
def _trunk(method: Method, backbone: trees.Tree, shared: Shared, images: jax.Array) -> jax.Array:
    return method.trunk(backbone, shared, _prepared(method, backbone, images))


@functools.partial(jax.jit, static_argnames="method")
def _logits(
    method: Method,
    backbone: trees.Tree,
    adapter: Adapter,
    shared: Shared,
    tokens: jax.Array,
    rows: jax.Array,
    position: jax.Array,
    size: jax.Array,
) -> jax.Array:
    sources = prompts.prefix_sources(method.prefix_layout, position, size)
    return method.logits(backbone, adapter, shared, tokens[rows], sources)


def _prepared(method: Method, backbone: trees.Tree, images: jax.Array) -> jax.Array:
    return to_unit(prepare_test(images, method.vit.image_size), backbone["cls_token"].dtype)


def _pad(array: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])


def _pieces(count: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Cut `count` rows into (start, stop, padded size) pieces, padding less than the smallest size."""
    start = 0
    while start < count:
        size = next((size for size in sizes if size <= count - start), sizes[-1])
        yield start, min(start + size, count), size
        start += size


def queries(method: Method, backbone: trees.Tree, images: np.ndarray, settings: Settings) -> np.ndarray:
    """q(x) `[N, dim]` of test images uint8 `[N, H, W, 3]`. It depends on nothing that is trained: once per run is enough."""
    out = []
    for start, stop, size in _pieces(len(images), settings.sizes):
        batch = jax.device_put(_pad(images[start:stop], size), train.by_row(settings.mesh))
        out.append(np.asarray(_query(method, backbone, batch))[: stop - start])
    return np.concatenate(out)


def _at_least_float32(dtype: np.dtype) -> np.dtype:
    return jnp.promote_types(dtype, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Batches:
    """How the published code batches a task's test images: in order, `size` at a time, the last one partial."""

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

    `task_ids` int `[N]` and `logits` `[N, classes]` by protocol; `alpha_gradients` `[batches, seen]`, None without masks.
    """

    task_ids: dict[str, np.ndarray]
    logits: dict[str, np.ndarray]
    alpha_gradients: np.ndarray | None

    @classmethod
    def concatenate(cls, parts: Sequence["Answers"]) -> "Answers":
        """The answers to consecutive chunks as one."""

        def joined(field):
            return {protocol: np.concatenate([getattr(p, field)[protocol] for p in parts]) for protocol in parts[0].task_ids}

        gradients = [p.alpha_gradients for p in parts if p.alpha_gradients is not None]
        return cls(joined("task_ids"), joined("logits"), np.concatenate(gradients) if gradients else None)


def answer(model: Model, images: np.ndarray, query: np.ndarray, task: int, settings: Settings) -> Answers:
    """Identify and classify test images uint8 `[N, H, W, 3]` of one task, with q(x) `[N, dim]`, under every protocol."""
    parts = [slice(start, start + settings.chunk) for start in range(0, len(images), settings.chunk)]
    return Answers.concatenate([_answer_chunk(model, images[part], query[part], task, settings) for part in parts])


def _answer_chunk(model: Model, images: np.ndarray, query: np.ndarray, task: int, settings: Settings) -> Answers:
    method, batches = model.method, Batches(len(images), settings.batch_size)
    tokens = _trunk_tokens(model, images, settings)
    similarity = np.asarray(task_id.key_similarity(query, model.keys))
    nearest = similarity.argmax(axis=1)
    ids = {
        PER_SAMPLE: similarity[:, : model.seen].argmax(axis=1),
        VOTE_PROMPT: task_id.majority(nearest, batches.index, len(model.adapters)),
        ORACLE: np.full(len(images), task),
    }
    gradients = None
    if method.mask_paths:
        gradients = alpha_gradients(model, tokens, nearest, batches, settings.shots or settings.batch_size)
        ids[VOTE_GRADIENT] = gradients.argmin(axis=1)[batches.index]
    # Under the interleaved layout an image's prefix depends on its place in its batch; per_sample is a batch of one.
    alone = (np.zeros(len(images), int), np.ones(len(images), int))
    together = alone if method.prefix_layout == "separate" else (batches.position, batches.length)
    places = {protocol: alone if protocol == PER_SAMPLE else together for protocol in ids}
    return Answers(ids, _logits_of_pairs(model, tokens, ids, places, settings), gradients)


def evaluate_task(model: Model, images: np.ndarray, labels: np.ndarray, query: np.ndarray, task: int, settings: Settings) -> dict[str, Row]:
    """Every protocol's counts on the test images of one task; arguments as for `answer`, `labels` int `[N]`."""
    answers = answer(model, images, query, task, settings)
    allowed = {PER_SAMPLE: model.task_of_class < model.seen, ORACLE: model.task_of_class == task}
    rows = {}
    for protocol in protocols(model.method):
        logits = np.where(allowed.get(protocol, True), answers.logits[protocol], -np.inf)
        rows[protocol] = Row(
            correct=int((logits.argmax(axis=1) == labels).sum()),
            task_correct=int((answers.task_ids[protocol] == task).sum()),
            total=len(labels),
        )
    return rows


def _trunk_tokens(model: Model, images: np.ndarray, settings: Settings) -> jax.Array:
    """Tokens `[N rounded up, tokens, dim]` on the devices; rounded to the largest size, so that nothing recompiles."""
    parts = []
    for start, stop, size in _pieces(len(images), settings.sizes[:1]):
        batch = jax.device_put(_pad(images[start:stop], size), train.by_row(settings.mesh))
        parts.append(_trunk(model.method, model.backbone, model.shared, batch))
    return jnp.concatenate(parts)


def _logits_of_pairs(
    model: Model,
    tokens: jax.Array,
    ids: dict[str, np.ndarray],
    places: dict[str, tuple[np.ndarray, np.ndarray]],
    settings: Settings,
) -> dict[str, np.ndarray]:
    """Logits `[N, classes]` of each protocol, every distinct (task, image, place in batch) run once."""
    count = len(next(iter(ids.values())))
    columns = [np.stack([ids[p], np.arange(count), *places[p]], axis=1) for p in ids]
    pairs, inverse = np.unique(np.concatenate(columns), axis=0, return_inverse=True)
    logits = np.empty((len(pairs), model.method.classes), _at_least_float32(tokens.dtype))
    pending: list[tuple[np.ndarray, jax.Array]] = []
    for task in np.unique(pairs[:, 0]):
        members = np.flatnonzero(pairs[:, 0] == task)
        for start, stop, size in _pieces(len(members), settings.sizes):
            chosen = members[start:stop]
            _, rows, position, length = jax.device_put(_pad(pairs[chosen], size), train.by_row(settings.mesh)).T
            values = _logits(model.method, model.backbone, model.adapters[task], model.shared, tokens, rows, position, length)
            pending.append((chosen, values))
    for chosen, values in pending:  # read only now: the devices are kept busy meanwhile
        logits[chosen] = np.asarray(values)[: len(chosen)]
    return {p: logits[part] for p, part in zip(ids, np.split(inverse.reshape(-1), len(ids)), strict=True)}


def alpha_gradients(model: Model, tokens: jax.Array, nearest: np.ndarray, batches: Batches, shots: int) -> np.ndarray:
    """∂H/∂α at uniform α, `[batches, seen]`, of the first `shots` images of each published test batch.

    The superposed pass uses the E-prompt that the majority of those images is nearest to (`nearest`, int `[N]`).
    """
    starts = np.arange(0, batches.count, batches.size)
    counts = np.minimum(np.minimum(batches.count - starts, batches.size), shots)
    shots = min(shots, batches.size)
    taken = starts[:, None] + np.arange(shots)
    weights = (np.arange(shots) < counts[:, None]).astype(_at_least_float32(tokens.dtype))
    voted = [task_id.vote(nearest[row[:n]], len(model.adapters)) for row, n in zip(taken, counts, strict=True)]
    taken = np.minimum(taken, batches.count - 1)
    out = []
    for start in range(0, len(starts), GROUPS):
        part = slice(start, start + GROUPS)
        prompt = jnp.stack([model.adapters[t]["prompt"] for t in [*voted[part], *[0] * GROUPS][:GROUPS]])
        gradient = task_id.mask_gradients(
            model.method,
            model.backbone,
            model.superposed,
            prompt,
            model.shared,
            tokens[_pad(taken[part], GROUPS)],
            _pad(weights[part], GROUPS),
            model.seen,
        )
        columns = [task_id.alpha_gradient(gradient, adapter["mask"]) for adapter in model.adapters[: model.seen]]
        out.append(np.stack([np.asarray(column) for column in columns], axis=1)[: len(starts[part])])
    return np.concatenate(out)
