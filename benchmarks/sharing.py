"""What many tasks' masks take and answer, stored one by one, together, and merged:
python -m benchmarks.sharing --data-dir=DIR [--tasks 10 100 500] [--learned=DIR] [--output=DIR]

Tasks of two classes of CIFAR-100, learned as a library learns by its own settings, but with masks
on q, k, v and proj of L[10,11,12] alone. Fifty tasks use up its 100 classes; more have made ones:
each class turned by a quarter, a half or three quarters, as a negative, or with its colours
exchanged, which a network can tell from the class as it is. Classes stand by their superclass, so
that neighbouring tasks are alike. More alike are a task and its classes turned by a quarter, which
are merged, too.

The same tasks are measured when there are as many as each of --tasks says. A run's functions train
and answer; there is no report, and no evaluation in between. Prints figures as JSON, a line for
each way to keep masks, and draws them as `sharing.png` into the folder of --output.
"""

import argparse
import dataclasses
import functools
import json
import math
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from matplotlib.figure import Figure
from rich.console import Console

from soft_jax import commands, pytrees
from soft_jax.data import sources
from soft_jax.data.augmentation import to_unit
from soft_jax.evaluation import pictures
from soft_jax.evaluation.metrics import TEST
from soft_jax.experiment import imported, loop
from soft_jax.experiment.bank import TaskBank
from soft_jax.experiment.run import Run, prepare
from soft_jax.inference import engine, rules
from soft_jax.methods import merging
from soft_jax.methods.changes import cosine_distances
from soft_jax.methods.method import Method, Shared
from soft_jax.store import packing
from soft_jax.store.folder import Store

AT = (10, 100, 500)  # tasks
SETTINGS = (
    "library:dataset=cifar100,mask_layers=10-12,target_modules=qkv+proj,"
    "train_images_per_class=60,test_images_per_class=25"
)
CLASSES = 2  # of a task
# The superclass of each of CIFAR-100's classes, as the data set numbers both.
SUPERCLASS = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7),
    *(6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10),
    *(16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16),
    *(12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)
MEAN_BITS, OWN_BITS = 4, 1  # of the mean of all, and of a task's difference from it
MERGED_BITS = 4  # of a merged mask, as a delta from a draw of its own
GROUPS = (2, 10)  # tasks that are merged to one; and all
VERSION = len(SUPERCLASS) // CLASSES  # tasks, after which the same classes come again, turned
GIVEN, MERGED, ALONE = "its classes given", "merged task given", "task unknown"
FROZEN, NO_MASK, SHARED = "frozen features", "no mask", "mean of all + 1 bit"
TRAINED, OWN = "no mask, the trained classifier", "own mask, a classifier for 1"
NAMES = {NO_MASK: "no mask, a classifier for", "mean": "mean of", "ties": "TIES of"}


class Learned(NamedTuple):
    """A task's mask, and of its training and its test images the tokens in front of the masked
    layers, `[N, tokens, dim]`, and q(x), `[N, dim]`.
    """

    mask: pytrees.Tree
    train: np.ndarray
    train_query: np.ndarray
    test: np.ndarray
    test_query: np.ndarray


class Kept(NamedTuple):
    """A mask as it is read again, None for none, and its bytes as it is stored."""

    mask: pytrees.Tree | None
    size: float


def main() -> None:
    """Learn, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default="", help="where TFDS has CIFAR-100")
    parser.add_argument("--tasks", type=int, nargs="+", default=AT)
    parser.add_argument("--learned", help="a folder that keeps what tasks learned; one goes on")
    parser.add_argument("--output", default=".")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    found = {}
    with tempfile.TemporaryDirectory() as folder, closing(Store(Path(folder) / "run")) as store:
        kept = Path(arguments.learned or folder)
        kept.mkdir(parents=True, exist_ok=True)
        run = prepared(arguments.data_dir, store)
        bank, shared, learned = TaskBank(run), run.initial_shared(), list[Learned]()
        for count in sorted(arguments.tasks):
            for task in range(len(learned), count):
                one, shared = learned_once(run, bank, task, shared, kept)
                learned.append(one)
            beside = pytrees.nbytes(run.statistics_shapes(0))
            say(tasks=count, seconds=time.process_time(), statistics=beside, **alike(run, learned))
            found[count] = dict(measured(run, bank.model(shared), learned))
    pictures.save(draw(found), Path(arguments.output) / "sharing.png")
    say(seconds=time.process_time())


def say(**values: Any) -> None:
    """Print a line of JSON."""
    print(json.dumps(values), flush=True)


def prepared(data_dir: str, store: Store) -> Run:
    """Return a run of as many tasks as there can be, whichever are measured."""
    config = commands.read_config([f"--config={SETTINGS},tasks={max(AT)}"], {"config": ""})
    cifar = sources.load(config.dataset, data_dir)
    cifar = cifar.first(config.train_images_per_class, config.test_images_per_class)
    quiet = Console(quiet=True)
    return prepare(config, store, quiet, threading.Event(), dataset=made(cifar, config.tasks))


def made(cifar: sources.Dataset, tasks: int) -> sources.Dataset:
    """Return the classes of so many tasks: all of CIFAR-100 by superclass, then versions of all."""
    order = np.argsort(SUPERCLASS, kind="stable")
    place, count = np.argsort(order), len(order)
    versions = range(math.ceil(tasks * CLASSES / count))

    def split(images: sources.InMemoryImages) -> sources.InMemoryImages:
        labels = np.concatenate([place[images.labels] + count * v for v in versions])
        every = np.concatenate([version(images.images, v) for v in versions])
        wanted = labels < tasks * CLASSES
        return sources.InMemoryImages(every[wanted], labels[wanted].astype(np.int32))

    names = [f"{cifar.class_names[i]} {v}" for v in versions for i in order][: tasks * CLASSES]
    return sources.Dataset(split(cifar.train), split(cifar.test), tuple(names))


def version(images: np.ndarray, number: int) -> np.ndarray:
    """Return images `[N, H, W, 3]` turned by `number` quarters: 0 to 3 as they are, 4 to 7 as
    negatives, from 8 on with green, blue and red for red, green and blue.
    """
    colours = (images, 255 - images, images[..., [1, 2, 0]])[number // 4]
    return np.rot90(colours, number % 4, axes=(1, 2))


def learned_once(
    run: Run, bank: TaskBank, task: int, shared: Shared, folder: Path
) -> tuple[Learned, Shared]:
    """Learn a task, or read from `folder` what it learned; the bank takes its statistics."""
    file = folder / f"{task:03d}.pickle"
    if not file.is_file():
        made = file.with_suffix(".part")
        made.write_bytes(pickle.dumps(jax.device_get(learn(run, task, shared))))
        made.rename(file)
    one, statistics, shared = pickle.loads(file.read_bytes())
    bank.restore(task, {}, statistics)
    return one, shared


def learn(run: Run, task: int, shared: Shared) -> tuple[Learned, pytrees.Tree, Shared]:
    """Learn a task; returns its statistics and the shared part as well."""
    own, test = run.dataset.train.take(run.members(task)), run.part(TEST, task)
    tokens, query = jax.device_get(seen(run.method, run.params, own.images))
    run.train_queries.clear()
    run.train_queries[task] = query  # as `run.train_query` would compute them
    state, _ = loop.train_task(run, task, run.initial_adapter(task), shared, {})
    mask, shared = state.trainable["adapter"]["mask"], state.trainable["shared"]
    answered = seen(run.method, run.params, test.images)
    return Learned(mask, tokens, query, *answered), loop.task_statistics(run, task), shared


@functools.partial(jax.jit, static_argnames="method")
def seen(method: Method, backbone: pytrees.Tree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the tokens in front of the masked layers, and q(x), of uint8 images at the model's
    size.
    """
    unit = to_unit(images, jnp.float32)
    return method.trunk(backbone, {}, unit), method.query(backbone, unit)


def drawn(run: Run, number: int) -> pytrees.Tree:
    """Return the mask that task `number` is drawn with."""
    return run.initial_adapter(number)["mask"]


def vector(tree: pytrees.Tree) -> np.ndarray:
    """Return all entries of a tree as one row, float32."""
    return np.concatenate([np.ravel(leaf) for leaf in pytrees.flatten(tree).values()])


def alike(run: Run, learned: Sequence[Learned]) -> dict[str, float]:
    """Return how alike changes m − m₀ are, and what a code of all tasks together could save.

    "bits at best" are those of an entry of a task that a perfect code of all tasks together saves
    over one of each by itself, at the same error: −log₂ det C / 2 over the number of tasks, for
    Gaussian entries with the cosines C.
    """
    changes = [vector(one.mask) - vector(drawn(run, task)) for task, one in enumerate(learned)]
    cosines = 1 - cosine_distances(changes)
    turned = np.diag(cosines, VERSION) if len(cosines) > VERSION else np.zeros(0)
    neighbours, pairs = np.diag(cosines, 1)[::2], cosines[np.triu_indices(len(cosines), 1)]
    best = -np.linalg.slogdet(cosines)[1] / np.log(2) / 2 / len(cosines)
    return {
        "change of an entry": float(np.sqrt(np.mean([np.mean(row**2) for row in changes]))),
        "mean cosine": float(pairs.mean()),
        "of neighbours": float(neighbours.mean()),
        "of the same classes": float(turned.mean()) if turned.size else None,
        "largest": float(pairs.max()),
        "bits at best": float(best),
    }


def measured(
    run: Run, model: engine.Model, learned: Sequence[Learned]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what each way to keep masks takes and answers, by its name.

    Bytes are those of a task, and errors |error| / |m − m₀| over all tasks.
    """
    test = TestImages(run, learned)
    yield FROZEN, test.frozen(model)
    for name, keep in ways(run, learned).items():
        kept = [keep(task) for task in range(len(learned))]
        row = {
            "bytes": sum(one.size for one in kept) / len(kept),
            "error": error(run, learned, kept),
        } | test.answers(with_masks(model, kept))
        say(way=name, **row)
        yield name, row
    row = {"bytes": 0} | test.answers(model, frozen=True)
    say(way=TRAINED, **row)
    yield TRAINED, row
    for size, groups in groupings(len(learned)).items():
        for how in NAMES if len(groups[0]) > 1 else (NO_MASK, "mean"):
            several, size_each = merged(run, model, learned, groups, how)
            row = {"bytes": size_each} | test.answers(several, frozen=how == NO_MASK)
            name = OWN if (how, size) == ("mean", "1") else f"{NAMES[how]} {size}"
            say(way=name, seconds=time.process_time(), **row)
            yield name, row


def groupings(count: int) -> dict[str, list[list[int]]]:
    """Return by name which of so many tasks are merged: neighbours, a class and itself turned."""
    sizes = sorted({1, *(size for size in GROUPS if size < count), count})
    found = {
        f"{size}": [list(range(t, min(t + size, count))) for t in range(0, count, size)]
        for size in sizes
    }
    if count % (2 * VERSION) == 0:
        firsts = [task for task in range(count) if task // VERSION % 2 == 0]
        found["2, turned"] = [[task, task + VERSION] for task in firsts]
    return found


class TestImages:
    """The test images of some tasks, and how they are answered."""

    def __init__(self, run: Run, learned: Sequence[Learned]):
        self._run, counts = run, [len(one.test_query) for one in learned]
        self._task = np.repeat(np.arange(len(learned)), counts)
        self._labels = np.concatenate([run.part(TEST, t).labels for t in range(len(learned))])
        self._query = np.concatenate([one.test_query for one in learned])
        tokens = jnp.asarray(np.concatenate([one.test for one in learned]))
        self._tokens = engine.Tokens(tokens, np.arange(len(tokens)))

    def _batch(self, model: engine.Model) -> rules.ImageBatch:
        # A task's first class tells which of the model's tasks has it.
        given = model.task_of_class[CLASSES * self._task]
        return rules.ImageBatch(
            model, self._tokens, self._query, self._run.settings.batching, given
        )

    def _right(self, scores: np.ndarray) -> float:
        return float(100 * np.mean(scores.argmax(axis=1) == self._labels))

    def _of_its_classes(self, scores: np.ndarray) -> np.ndarray:
        own = np.arange(scores.shape[1])[None] // CLASSES == self._task[:, None]
        return np.where(own, scores, -np.inf)

    def frozen(self, model: engine.Model) -> dict[str, float]:
        """Return what the statistics answer without any mask, in percent of the images."""
        (rule,) = rules.FrozenFeatures.of(model.method, self._run.config)
        batch = self._batch(model)
        scores = rule.scores(batch, None, batch.given)
        row = {GIVEN: self._right(self._of_its_classes(scores)), ALONE: self._right(scores)}
        say(way=FROZEN, **row)
        return row

    def answers(self, model: engine.Model, frozen: bool = False) -> dict[str, float]:
        """Return how many images are answered right, in percent.

        The model's tasks may be merged ones: a task's two classes are then given as well as all of
        the merged task. `frozen`: by the model's classifier on frozen features.
        """
        batch, (rule,) = self._batch(model), rules.Prototype.of(model.method, self._run.config)
        ids = (batch.given, rule.identify(batch))
        if frozen:
            given = named = np.asarray(model.method.head({}, model.shared, self._query))
        else:
            pairs = np.concatenate([engine.alone(tasks) for tasks in ids])
            pairs, places = np.unique(pairs, axis=0, return_inverse=True)
            logits = engine.logits(model, batch.tokens, pairs, batch.batching)
            given, named = (logits[part] for part in np.split(places.reshape(-1), 2))
        return {
            GIVEN: self._right(self._of_its_classes(given)),
            MERGED: self._right(engine.mask_to_task(model, given, ids[0])),
            ALONE: self._right(rule.scores(batch, named, ids[1])),
            "task named": float(100 * np.mean(ids[0] == ids[1])),
        }


def error(run: Run, learned: Sequence[Learned], kept: Sequence[Kept]) -> float:
    """Return |error| / |m − m₀| of all tasks together."""
    lost, moved = 0.0, 0.0
    for task, (one, again) in enumerate(zip(learned, kept, strict=True)):
        mask = vector(one.mask)
        lost += float(np.sum((vector(again.mask) - mask) ** 2))
        moved += float(np.sum((mask - vector(drawn(run, task))) ** 2))
    return math.sqrt(lost / moved)


def with_masks(model: engine.Model, kept: Sequence[Kept]) -> engine.Model:
    """Return the model with other masks."""
    method, backbone = model.method, model.backbone
    weights = engine.TaskWeights(method, backbone, lambda task: {"mask": kept[task].mask}, 0)
    return dataclasses.replace(model, weights=weights)


def ways(run: Run, learned: Sequence[Learned]) -> dict[str, Callable[[int], Kept]]:
    """Return by name how a task's mask is kept."""

    def whole(task: int) -> Kept:
        return Kept(learned[task].mask, pytrees.nbytes(learned[task].mask))

    def int8(task: int) -> Kept:
        packed = packing.pack(learned[task].mask, "int8", 0)
        return Kept(packing.unpack(packed, "int8", learned[task].mask), pytrees.nbytes(packed))

    def delta(task: int, bits: int) -> Kept:
        return as_delta(run, task, learned[task].mask, bits)

    def shared(task: int) -> Kept:
        middle = jax.tree.map(jnp.add, drawn(run, task), mean.mask)
        packed, mask = coded(learned[task].mask, middle, OWN_BITS)
        return Kept(mask, pytrees.nbytes((packed, key_of(run, task))) + mean.size / len(learned))

    total = functools.reduce(
        functools.partial(jax.tree.map, np.add),
        (
            jax.tree.map(np.subtract, one.mask, jax.device_get(drawn(run, task)))
            for task, one in enumerate(learned)
        ),
    )
    nothing = jax.tree.map(np.zeros_like, total)
    packed, mask = coded(jax.tree.map(lambda leaf: leaf / len(learned), total), nothing, MEAN_BITS)
    mean = Kept(mask, pytrees.nbytes(packed))
    deltas = {
        name: functools.partial(delta, bits=bits)
        for name, bits in reversed(packing.DELTA_BITS.items())
    }
    return {"float32": whole, "int8": int8, **deltas, SHARED: shared}


def key_of(run: Run, task: int) -> jax.Array:
    """Return what is kept of the key that a task's mask is drawn from."""
    return jax.random.key_data(run.adapter_key(task))


def as_delta(run: Run, number: int, mask: pytrees.Tree, bits: int) -> Kept:
    """Keep a mask as a delta from the draw of task `number`."""
    packed, again = coded(mask, drawn(run, number), bits)
    return Kept(again, pytrees.nbytes((packed, key_of(run, number))))


@functools.partial(jax.jit, static_argnames="bits")
def coded(mask: pytrees.Tree, drawn: pytrees.Tree, bits: int) -> tuple[pytrees.Tree, pytrees.Tree]:
    """Return a mask's delta from `drawn` as it is packed, and the mask as it is read again."""
    packed = packing.pack_delta(mask, drawn, bits)
    return packed, packing.unpack_delta(packed, drawn, bits)


def merged(
    run: Run, model: engine.Model, learned: Sequence[Learned], groups: list[list[int]], how: str
) -> tuple[engine.Model, float]:
    """Merge each group of tasks as `soft-jax merge` does.

    `how` is its method, or NO_MASK: the classifier is fitted to frozen features, as it is to those
    of a merged mask. Returns a model whose tasks are merged ones, and the bytes of masks for each
    task that went in.
    """
    kept, head = list[Kept](), jax.tree.map(np.array, model.shared["head"])
    of_task = np.full(run.scenario.num_tasks, -1)
    for group in groups:
        parts = [learned[task] for task in group]
        of_task[group] = len(kept)
        if how == NO_MASK:
            kept.append(Kept(None, 0))
            shown = [part.train_query for part in parts]
        else:
            weights = [1.0] * len(parts)
            density = merging.check(how, weights, None, len(parts))
            mask = merging.merge([p.mask for p in parts], how, weights, density, jax.random.key(0))
            # A merged task is a new one, with a draw of its own.
            number = run.scenario.num_tasks + len(kept)
            kept.append(as_delta(run, number, mask, MERGED_BITS))
            shown = [features(run.method, run.params, kept[-1].mask, part.train) for part in parts]
        labels = np.concatenate([run.dataset.train.labels[run.members(task)] for task in group])
        columns, labels = np.unique(labels, return_inverse=True)
        fitted = imported.fit(np.concatenate(shown), labels)
        head["kernel"][:, columns], head["bias"][columns] = fitted["kernel"], fitted["bias"]
    several = dataclasses.replace(
        with_masks(model, kept),
        shared={**model.shared, "head": head},
        tasks=tuple(range(len(kept))),
        task_of_class=of_task[model.task_of_class],
    )
    return several, sum(one.size for one in kept) / len(learned)


@functools.partial(jax.jit, static_argnames="method")
def features(
    method: Method, backbone: pytrees.Tree, mask: pytrees.Tree, tokens: jax.Array
) -> jax.Array:
    """Return the features `[N, dim]` of the network with a mask."""
    weights = method.weights(backbone, {"mask": mask})
    return method.features(pytrees.merge(backbone, weights), {}, {}, tokens)


def draw(found: dict[int, dict[str, dict[str, float]]]) -> Figure:
    """Draw bytes of all masks and accuracy, a row for each way and a dot for a number of tasks."""
    names = list(dict.fromkeys(name for ways in found.values() for name in ways))
    figure = Figure(figsize=(11, 1.2 + 0.36 * len(names)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for place, (count, ways) in enumerate(found.items()):
        color, marker = pictures.CURVES[place], "osD"[place % 3]
        heights = [names.index(name) + 0.26 * place for name in ways]
        sizes = [count * row.get("bytes", 0) / 1e6 for row in ways.values()]
        columns = (
            [(size, f"{size:.3g}") for size in sizes],
            [(row[GIVEN], f"{row[GIVEN]:.1f}") for row in ways.values()],
            [(row[ALONE], f"{row[ALONE]:.1f}") for row in ways.values()],
        )
        for axes, column in zip(panels, columns, strict=True):
            for height, (value, text) in zip(heights, column, strict=True):
                style = {"color": color, "fontsize": 7, "va": "center"}
                if not value:  # a logarithmic axis has no place for it
                    axes.text(0.01, height, "0", transform=axes.get_yaxis_transform(), **style)
                    continue
                axes.plot(value, height, marker, color=color, markersize=4)
                axes.annotate(
                    text, (value, height), xytext=(5, 0), textcoords="offset points", **style
                )
            axes.annotate(
                f"{count} tasks",
                (max(sizes) if axes is panels[0] else column[0][0], -0.8),
                ha="center",
                color=color,
                fontsize=8,
            )
    for axes, label in zip(panels, ("MB of all masks", GIVEN, ALONE), strict=True):
        axes.set_title(label if axes is panels[0] else f"{label}: right answers, %", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.margins(x=0.15)
    panels[0].set(xscale="log", yticks=range(len(names)), ylim=(len(names) - 0.3, -1.1))
    panels[0].set_yticklabels(names, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
