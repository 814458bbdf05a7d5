"""The one engine that identifies and classifies images, whatever their tasks: for evaluation and
for `Predictor`.

Images come mixed. The layers before the first task-specific one run once per image (`encode`); the
rest is dispatched by task (`logits`): images are grouped by task, each group is cut into pieces of
a few fixed sizes, so that nothing recompiles as the mix changes, and the answers are put back in
order. A task's θ ⊙ m is made once and kept while a byte budget allows (`TaskWeights`).
"""

import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from soft_jax import distributed, pytrees
from soft_jax.data.augmentation import prepare_test, to_unit
from soft_jax.data.batches import pad
from soft_jax.inference import identity
from soft_jax.methods.method import Adapter, Method, Shared

GRADIENT_BYTES = (
    2**30
)  # of the masked layers' inputs and output gradients that Gradient ID holds at once
# Images of a device in a forward pass, about: a v5e chip is forecast to take 37% fewer cycles for
# each of 64 than for each of 256 in a pass through all layers, and 27% through the last three.
# Training with `cache_queries` depends on it, to the bit.
IMAGES_A_DEVICE = 64
# Tasks whose θ ⊙ m one program multiplies with them; fewer only where the budget is short.
FEWEST_TASKS, MOST_TASKS = 8, 32


@dataclasses.dataclass(frozen=True)
class Batching:
    """How many rows a forward pass takes, over the devices of `mesh`: a few fixed sizes of at most
    `largest`.
    """

    mesh: Mesh
    largest: int

    @property
    def _quarterings(self) -> int:
        """Return how often `largest` is quartered until a device has about `IMAGES_A_DEVICE`."""
        count = 0
        while self.largest // 4 ** (count + 1) >= IMAGES_A_DEVICE * self.mesh.size // 2:
            count += 1
        return count

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the sizes, largest first, each about a quarter of the one before.

        They are multiples of the device count.
        """
        n, sizes, size = self.mesh.size, [], self.largest // 4**self._quarterings
        while size > 1:
            sizes.append(-(-size // n) * n)
            size //= 4
        return tuple(dict.fromkeys([*sizes, n]))

    @property
    def rooms(self) -> tuple[int, ...]:
        """Return for how many images there is room where tokens are held, smallest first."""
        more = range(1, self._quarterings + 2)
        return (*reversed(self.sizes), *(self.sizes[0] * 4**power for power in more))

    @property
    def chunk(self) -> int:
        """Return how many images have their tokens in memory at once: about 4 `largest`."""
        return self.rooms[-1]

    def pieces(
        self, count: int, largest: int | None = None, smallest: int = 0
    ) -> Iterator[tuple[int, int, int]]:
        """Cut `count` rows into (start, stop, padded size) pieces.

        They are few, of sizes from `smallest` to `largest` where there are any, and at most half of
        each is padding, but of the last where it has the smallest size.
        """
        most = self.sizes[0] if largest is None else largest
        sizes = [size for size in self.sizes if size <= most] or self.sizes[-1:]
        sizes = [size for size in sizes if size >= smallest] or sizes[:1]
        start = 0
        while start < count:
            rest = count - start
            size = next((size for size in reversed(sizes) if size >= rest), sizes[0])
            if 2 * rest < size:
                size = next((smaller for smaller in sizes if smaller <= rest), sizes[-1])
            yield start, min(start + size, count), size
            start += size

    def put(self, rows: np.ndarray, size: int) -> jax.Array:
        """Pad `rows` with zeros to `size` and split them over the devices."""
        return distributed.to_global(pad(rows, size), distributed.by_row(self.mesh))

    def map(self, function: Callable[[jax.Array], jax.Array], rows: np.ndarray) -> np.ndarray:
        """Apply `function` to all rows, piece by piece, and join the results.

        Each row of its results must depend on no other row.
        """
        out = [
            (function(self.put(rows[a:b], size)), b - a) for a, b, size in self.pieces(len(rows))
        ]
        return np.concatenate([distributed.to_host(values)[:count] for values, count in out])


class TaskWeights:
    """θ ⊙ m by task, on the devices: those used last, up to `budget` bytes; the rest is loaded
    when it is asked for.

    `load(task)` gives a task's adapter, from the store or from memory. Where tasks change no
    weights there is nothing to load or to keep. "θ ⊙ m" stands for whatever a method's `weights`
    gives.

    Several threads may share it. They wait while one of them loads, so that a task that two of them
    miss is loaded once. What a thread was given stays usable after its place went to another task;
    it takes memory beside the budget until the thread lets go of it.
    """

    def __init__(
        self, method: Method, backbone: pytrees.Tree, load: Callable[[int], Adapter], budget: int
    ):
        self._method, self._backbone, self._load, self._budget = method, backbone, load, budget
        self._kept: OrderedDict[int, pytrees.Tree] = OrderedDict()
        self._lock = threading.RLock()  # reentrant: __getitem__ calls put
        shapes = jax.eval_shape(
            lambda params: method.weights(params, method.init_adapter(jax.random.key(0), params)),
            backbone,
        )
        self.bytes_each = pytrees.nbytes(shapes)

    def __contains__(self, task: int) -> bool:
        return not self._method.reparametrization or task in self._kept

    def __getitem__(self, task: int) -> pytrees.Tree:
        if not self._method.reparametrization:
            return {}
        with self._lock:
            if task not in self._kept:
                self._make_room()
                self.put(task, self._load(task))
            self._kept.move_to_end(task)
            return self._kept[task]

    def put(self, task: int, adapter: Adapter) -> None:
        """Keep the weights that `adapter` makes of the backbone, as those of task `task`."""
        if not self._method.reparametrization:
            return
        with self._lock:
            self._kept.pop(task, None)
            self._make_room()
            self._kept[task] = _weights(self._method, self._backbone, adapter)

    def _make_room(self) -> None:
        # Before the next is made, so that what is kept never passes the budget; one task's is kept
        # whatever the budget.
        while self._kept and (len(self._kept) + 1) * self.bytes_each > self._budget:
            self._kept.popitem(last=False)

    def order(self, tasks: Iterable[int]) -> list[int]:
        """Return `tasks` with those in the devices' memory first.

        In this order, going through more tasks than the budget holds reloads no more than it must.
        """
        return sorted(tasks, key=lambda task: (task not in self, task))

    def at_once(self, count: int) -> int:
        """Return how many of `count` tasks' weights one product takes.

        It is a power of two, and may be above `count`, so that few programs serve all counts:
        compiling another one takes longer than multiplying a few tasks too many. The product copies
        the weights twice; the copies take at most half the budget, in addition to it.
        """
        most = min(MOST_TASKS, max(1, self._budget // max(4 * self.bytes_each, 1)))
        return 2 ** min((max(count, FEWEST_TASKS) - 1).bit_length(), most.bit_length() - 1)


@dataclasses.dataclass(frozen=True)
class Model:
    """What images are identified and classified with.

    `rows` are `Method.row_shapes` with a row for each task of the scenario: "key" `[P, dim]` and
    "prompt" `[P, ...]`, of zeros or empty where the method has none. `tasks` are those to choose
    from, in ascending order. `task_of_class` is int `[classes]`, -1 for classes in no task.
    `solved` is what task-identity rules made of all tasks' statistics, by the rule's name.
    `zero_shot` `[classes, feature_dim]` are `zero_shot.text_features`, where the backbone reads
    text.
    """

    method: Method
    backbone: pytrees.Tree
    shared: Shared
    rows: Mapping[str, jax.Array]
    weights: TaskWeights
    tasks: tuple[int, ...]
    task_of_class: np.ndarray
    solved: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    zero_shot: jax.Array | None = None

    @functools.cached_property
    def mean_weights(self) -> pytrees.Tree:
        """Return θ ⊙ M, where M is the mean of the masks of `tasks`."""
        return identity.mean_weights((self.weights[task] for task in self.tasks), len(self.tasks))

    @functools.cached_property
    def superposed_text(self) -> identity.SuperposedText:
        """Return the text tower at `mean_weights`, and its derivatives towards `tasks` in turn."""
        method, contexts = self.method, self.rows["context"]
        classes = np.full((len(contexts), method.classes_at_once), method.num_classes)
        for task in self.tasks:
            own = np.flatnonzero(self.task_of_class == task)
            classes[task, : len(own)] = own
        mean, found = self.mean_weights, []
        for task in self.tasks:
            found.append(
                identity.superposed_text(
                    method, self.backbone, mean, self.weights[task], contexts, classes
                )
            )
        return identity.SuperposedText(found[0][0], jnp.stack([moved for _, moved in found]))


_SPLIT = PartitionSpec("data")  # by row, as in `distributed.by_row`
_weights = jax.jit(Method.weights, static_argnums=0)
_select = jax.jit(Method.select, static_argnums=0)


@functools.partial(jax.jit, static_argnames=("method", "queried", "prepared"))
def _encode(
    method: Method,
    backbone: pytrees.Tree,
    shared: Shared,
    images: jax.Array,
    selected: jax.Array | None,
    queried: bool,
    prepared: bool,
) -> tuple[jax.Array, jax.Array | None]:
    # In one program, XLA computes once what the two passes share (the patch embedding at least).
    images = _unit(method, backbone, images, prepared)
    tokens = method.trunk(backbone, shared, images, selected)
    return tokens, method.query(backbone, images) if queried else None


@functools.partial(jax.jit, static_argnames=("method", "prepared"))
def _query(method: Method, backbone: pytrees.Tree, images: jax.Array, prepared: bool) -> jax.Array:
    return method.query(backbone, _unit(method, backbone, images, prepared))


def _unit(method: Method, backbone: pytrees.Tree, images: jax.Array, prepared: bool) -> jax.Array:
    # Small images are resized where they are used, each time: sending them at the model's size
    # would take longer than that.
    images = images if prepared else prepare_test(images, method.architecture.image_size)
    return to_unit(images, jax.tree.leaves(backbone)[0].dtype)


@functools.partial(jax.jit, static_argnames="method")
def _logits(
    method: Method,
    backbone: pytrees.Tree,
    weights: pytrees.Tree,
    rows: jax.Array,
    shared: Shared,
    tokens: jax.Array,
    pairs: jax.Array,
) -> jax.Array:
    task, _, position, size = pairs.T
    prefix = method.host.prefixes(shared, rows[task], position, size)
    return method.classify(pytrees.merge(backbone, weights), prefix, shared, tokens)


# Small programs of their own: the large ones above then depend on the size of a piece alone.


@functools.partial(jax.jit, static_argnames=("rows", "mesh"))
def _grow(part: jax.Array, rows: int, mesh: Mesh) -> jax.Array:
    def on_one(part: jax.Array) -> jax.Array:
        more = rows // mesh.size - len(part)
        return jnp.pad(part, ((0, more), *((0, 0) for _ in part.shape[1:])))

    return jax.shard_map(on_one, mesh=mesh, in_specs=_SPLIT, out_specs=_SPLIT)(part)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="mesh")
def _insert(tokens: jax.Array, part: jax.Array, start: jax.Array, mesh: Mesh) -> jax.Array:
    def on_one(tokens: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(tokens, part, start, axis=0)

    specs = (_SPLIT, _SPLIT, PartitionSpec())
    return jax.shard_map(on_one, mesh=mesh, in_specs=specs, out_specs=_SPLIT)(tokens, part, start)


# This one alone exchanges something between devices. A device that meets such a program waits there
# for the others, so all devices must meet them in one order: two threads that start theirs at the
# same time would wait for each other forever. A thread holds the lock while it starts one.
_exchanging = threading.Lock()


@functools.partial(jax.jit, static_argnames="mesh")
def _take_scattered(tokens: jax.Array, rows: jax.Array, mesh: Mesh) -> jax.Array:
    def on_one(tokens: jax.Array, rows: jax.Array) -> jax.Array:
        local = rows - jax.lax.axis_index("data") * len(tokens)
        own = (local >= 0) & (local < len(tokens))
        taken = tokens[jnp.where(own, local, 0)]
        taken = jnp.where(own[:, None, None], taken, 0)
        return jax.lax.psum_scatter(taken, "data", tiled=True)

    specs = (_SPLIT, PartitionSpec())
    return jax.shard_map(on_one, mesh=mesh, in_specs=specs, out_specs=_SPLIT)(tokens, rows)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Trunk tokens of images, on the devices: each image's where they were computed.

    `array` `[rows, tokens, dim]` is split over the devices by row. `row` int `[N]` has the row of
    each of N images; other rows of `array` are padding.
    """

    array: jax.Array
    row: np.ndarray


def take_rows(tokens: Tokens, images: np.ndarray, size: int, batching: Batching) -> jax.Array:
    """Return the tokens of `images`, int `[n]`, as `[size, tokens, dim]`.

    The result is split over the devices by row; behind the first n it holds any rows. Each device
    brings the rows that it has, and gets its share of the sum with zeros: what is exchanged is the
    size of the result. (Left to XLA, every device receives all tokens.)
    """
    rows = distributed.to_global(
        pad(tokens.row[images].astype(np.int32), size), distributed.replicated(batching.mesh)
    )
    with _exchanging:
        return _take_scattered(tokens.array, rows, batching.mesh)


def queries(
    method: Method,
    backbone: pytrees.Tree,
    images: np.ndarray,
    batching: Batching,
    prepared: bool = False,
) -> np.ndarray:
    """Compute q(x) `[N, dim]` of uint8 images `[N, H, W, 3]`.

    The images are prepared as test images, here or before. The result depends on nothing that is
    trained.
    """
    return batching.map(functools.partial(_query, method, backbone, prepared=prepared), images)


def encode(
    model: Model,
    images: np.ndarray,
    batching: Batching,
    queried: bool,
    prepared: bool = False,
    selected: np.ndarray | None = None,
) -> tuple[Tokens, np.ndarray | None]:
    """Compute trunk tokens of uint8 images `[N, H, W, 3]`, and q(x) `[N, dim]` where `queried`.

    The images are prepared as test images, here or before.

    `selected`, int `[N, top_k]`, names L2P's prompts for each image; None: those nearest to it. The
    tokens have as many rows as N rounded up to one of `Batching.rooms` or to whole chunks.
    """
    pieces = list(batching.pieces(len(images)))
    total, chunk = sum(size for *_, size in pieces), batching.chunk
    rows = next((room for room in batching.rooms if room >= total), -(-total // chunk) * chunk)
    parts, query = [], []
    for start, stop, size in pieces:
        chosen = None if selected is None else batching.put(selected[start:stop], size)
        part, q = _encode(
            model.method,
            model.backbone,
            model.shared,
            batching.put(images[start:stop], size),
            chosen,
            queried,
            prepared,
        )
        parts.append(part)
        query.append((q, stop - start))
    tokens = join_tokens(parts, [stop - start for start, stop, _ in pieces], rows, batching)
    return tokens, np.concatenate(
        [distributed.to_host(q)[:count] for q, count in query]
    ) if queried else None


def join_tokens(
    parts: Sequence[jax.Array], counts: Sequence[int], rows: int, batching: Batching
) -> Tokens:
    """Join parts `[n, tokens, dim]`, each of `counts` images and padding, in an array of `rows`.

    Each device joins what it has of the parts, so that nothing is exchanged; the order of the rows
    is that of the images on one device alone.
    """
    mesh = batching.mesh
    tokens = parts[0] if len(parts[0]) == rows else _grow(parts[0], rows, mesh)
    held = [len(part) // mesh.size for part in parts]  # by each device
    starts = np.cumsum([0, *held[:-1]]).astype(np.int32)
    for part, first in zip(parts[1:], starts[1:], strict=True):
        start = distributed.to_global(first, distributed.replicated(mesh))
        tokens = _insert(tokens, part, start, mesh)
    found = []
    for count, each, start in zip(counts, held, starts, strict=True):
        device, place = np.divmod(np.arange(count), each)
        found.append(device * (rows // mesh.size) + start + place)
    return Tokens(tokens, np.concatenate(found))


def key_similarity(model: Model, query: np.ndarray, batching: Batching) -> np.ndarray:
    """Compute cos(q(x), k) `[N, P]` of queries `[N, dim]` with every key of the pool."""
    return batching.map(lambda part: identity.key_similarity(part, model.rows["key"]), query)


def pool_selection(model: Model, query: np.ndarray, batching: Batching) -> np.ndarray:
    """Select L2P's prompts for each image by itself, int `[N, top_k]`, from queries `[N, dim]`."""
    return batching.map(lambda part: _select(model.method, model.shared, part), query)


def nearest_key(model: Model, similarity: np.ndarray) -> np.ndarray:
    """Return the Prompt ID of each image by itself, int `[N]`.

    It is the nearest key among those of `model.tasks`, by the `[N, P]` result of `key_similarity`.
    """
    return np.asarray(model.tasks)[similarity[:, model.tasks].argmax(axis=1)]


def gradients_at_once(tokens: jax.Array, kernels: Iterable[jax.Array]) -> int:
    """Return for how many images GRADIENT_BYTES holds the inputs and output gradients of `kernels`.

    `tokens` `[rows, tokens, dim]` is what the layers take; of both, shapes are enough.
    """
    widths = sum(sum(kernel.shape) for kernel in kernels)
    return GRADIENT_BYTES // (tokens.shape[1] * max(widths, 1) * tokens.dtype.itemsize)


def alpha_gradients(
    model: Model, tokens: Tokens, pairs: np.ndarray, batching: Batching, smallest: int = 0
) -> np.ndarray:
    """Compute ∂H/∂α_t at uniform α, `[K, len(model.tasks)]`, float32 or wider.

    There is one row for each row of `pairs`; the columns are in the order of `model.tasks`, which
    replace kernels.

    Args:
        model: the images' model.
        tokens: what `encode` returned.
        pairs: int `[K, 4]`, as for `logits`; a pair's task is that whose E-prompt the image's
            superposed pass uses.
        batching: fixes the sizes of passes,
        smallest: and this the smallest that is taken.
    """
    tasks, step = model.tasks, model.weights.at_once(len(model.tasks))
    out = np.empty((len(pairs), len(tasks)), at_least_float32(tokens.array.dtype))
    text = set(model.method.text_kernels)
    kernels = pytrees.flatten(model.mean_weights)
    largest = gradients_at_once(
        tokens.array, [kernel for path, kernel in kernels.items() if path not in text]
    )
    shared = model.shared
    if text:
        superposed = model.superposed_text.text.astype(shared["head"]["text"].dtype)
        shared = shared | {"head": shared["head"] | {"text": superposed}}
    pieces = list(batching.pieces(len(pairs), largest, smallest))
    while pieces:
        # As many pieces as GRADIENT_BYTES holds, at least one, go through the tasks together: where
        # the cache doesn't hold all tasks, each pass through them loads most of them again.
        fit = np.searchsorted(np.cumsum([size for *_, size in pieces]), largest, side="right")
        together, pieces = pieces[: max(1, fit)], pieces[max(1, fit) :]
        both = [
            identity.entropy_gradients(
                model.method,
                model.backbone,
                model.mean_weights,
                model.rows["prompt"],
                shared,
                take_rows(tokens, pairs[start:stop, 1], size, batching),
                batching.put(pairs[start:stop], size),
                len(tasks),
            )
            for start, stop, size in together
        ]
        gradients = [of_kernels for of_kernels, _ in both]
        for (start, stop, _), (_, by_logit) in zip(together, both, strict=True):
            out[start:stop] = _by_text(model, shared, by_logit)[: stop - start] if text else 0
        del both
        order = model.weights.order(tasks) if gradients[0] else []
        for first in range(0, len(order), step):
            part = order[first : first + step]
            columns = np.searchsorted(tasks, part)
            products = _products(model, gradients, part, step)
            for (start, stop, _), values in zip(together, products, strict=True):
                out[start:stop, columns] += values[: stop - start]
        del gradients  # before the next are made
    return out


def _by_text(model: Model, shared: Shared, factors: identity.LogitFactors) -> np.ndarray:
    """Return the part of ∂H/∂α `[B, tasks]` that goes through the text tower."""
    tangents = model.superposed_text.tangents
    values = identity.text_alpha_gradients(model.method, model.backbone, shared, factors, tangents)
    return distributed.to_host(values)


def _products(
    model: Model, gradients: list[dict[str, identity.Factors]], tasks: list[int], padded: int
) -> list[np.ndarray]:
    """Compute `identity.alpha_gradients` of each of `gradients`, `[B, len(tasks)]`.

    There are at most `padded` tasks. This is a function of its own so that no weights outlive their
    use.
    """
    weights = tuple(model.weights[task] for task in tasks)
    weights += weights[:1] * (padded - len(tasks))
    products = [identity.alpha_gradients(gradient, weights) for gradient in gradients]
    return [distributed.to_host(values)[:, : len(tasks)] for values in products]


def logits(model: Model, tokens: Tokens, pairs: np.ndarray, batching: Batching) -> np.ndarray:
    """Compute logits `[K, classes]`, one row for each row of `pairs`, int `[K, 4]`.

    A row of it is (task, image of `tokens`, position in its batch, size of its batch).

    The last two matter under the interleaved prefix layout only. Images of one task share its
    weights; without masks all do.
    """
    out = np.empty((len(pairs), model.method.num_classes), at_least_float32(tokens.array.dtype))
    group = pairs[:, 0] if model.method.reparametrization else np.zeros(len(pairs), int)
    pending: list[tuple[np.ndarray, jax.Array]] = []
    for task in model.weights.order(np.unique(group).tolist()):
        if pending and task not in model.weights:
            # What the devices still work with would be held beside the budget.
            jax.block_until_ready(pending[-1][-1])
        weights = None  # and so would be what the cache lets go of for the next
        weights, members = model.weights[task], np.flatnonzero(group == task)
        for start, stop, size in batching.pieces(len(members)):
            chosen = members[start:stop]
            part = take_rows(tokens, pairs[chosen, 1], size, batching)
            values = _logits(
                model.method,
                model.backbone,
                weights,
                model.rows["prompt"],
                model.shared,
                part,
                batching.put(pairs[chosen], size),
            )
            pending.append((chosen, values))
    for chosen, values in pending:  # read only now: the devices are kept busy meanwhile
        out[chosen] = distributed.to_host(values)[: len(chosen)]
    return out


def alone(tasks: np.ndarray) -> np.ndarray:
    """Return pairs for images that each form a batch of their own, int `[N, 4]`.

    Image i is answered by the network of task `tasks[i]`.
    """
    count = len(tasks)
    return np.stack([tasks, np.arange(count), np.zeros(count, int), np.ones(count, int)], axis=1)


def at_least_float32(dtype: np.dtype) -> np.dtype:
    """Return the dtype of logits computed in `dtype`."""
    return np.promote_types(dtype, jnp.float32)


def mask_to_seen(model: Model, logits: np.ndarray) -> np.ndarray:
    """Return `logits` `[N, classes]` with -inf for every class outside all of `model.tasks`."""
    return np.where(np.isin(model.task_of_class, model.tasks)[None], logits, -np.inf)


def mask_to_task(model: Model, logits: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """Return `logits` `[N, classes]` with -inf for every class outside the image's task.

    `tasks` int `[N]` has the task of each image.
    """
    return np.where(model.task_of_class[None] == tasks[:, None], logits, -np.inf)
