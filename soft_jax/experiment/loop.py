"""The one outer loop: scenario → train → evaluate → store → report, task after task, resumable
anywhere.
"""

import dataclasses
import functools
import math
import platform
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from soft_jax import distributed, pytrees
from soft_jax.config import RUNTIME_FIELDS, Config
from soft_jax.data import batches, sources
from soft_jax.data.scenarios import Scenario
from soft_jax.errors import UserError
from soft_jax.evaluation import protocols, report
from soft_jax.inference import engine, prototypes
from soft_jax.methods import regularization, rehearsal
from soft_jax.methods.method import Adapter, Method, Shared, begin, method_from_config
from soft_jax.models import backbones
from soft_jax.store.folder import Store
from soft_jax.training import train_step

CALL_SECONDS = (
    1.0  # of training that one call to the devices should take: so soon a SIGTERM is answered
)
# Training images that q(x) is taken of before a SIGTERM is looked for; from files, they are held at
# once
READ_AT_ONCE = 1024
DRAWN_AFTER = (
    60.0  # seconds of a task, for its pictures to be drawn before the last task: they take some
)
QUERIES_AT_ONCE = 256  # training images of a forward pass that takes q(x)


class Preempted(Exception):
    """SIGTERM came: the state is saved, and the same command continues."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """Everything that stays fixed from a run's first task to its last."""

    config: Config
    scenario: Scenario
    dataset: sources.Dataset
    backbone: backbones.Backbone
    params: pytrees.Tree  # the frozen backbone, on the devices
    method: Method
    step_config: train_step.StepConfig
    mesh: Mesh
    store: Store
    console: Console
    stop: threading.Event
    log: Callable[[str, int, Mapping[str, float]], None] = lambda *_: None
    # By task, computed once: q(x) depends on nothing trained, and files are decoded for the test
    # but once.
    queries: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    train_queries: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    tested: dict[int, sources.InMemoryImages] = dataclasses.field(default_factory=dict)

    @property
    def settings(self) -> protocols.Settings:
        """How evaluation batches its images."""
        c = self.config
        return protocols.Settings(
            self.mesh,
            c.batch_size,
            c.shots,
            c.eval_batch_size,
            isinstance(self.dataset.test, sources.EncodedImages),
        )

    def test_set(self, task: int) -> sources.InMemoryImages:
        """Task `task`'s test images; those from files are prepared, and then held in the host's
        memory.
        """
        test = self.dataset.test
        members = self.scenario.members(test.labels, task)
        if isinstance(test, sources.InMemoryImages):
            return test.take(members)
        if task not in self.tested:
            self.tested[task] = sources.InMemoryImages(
                test.prepared(members, self.method.vit.image_size), test.labels[members]
            )
        return self.tested[task]

    def members(self, task: int) -> np.ndarray:
        """Task `task`'s training images, as rows of the whole training set."""
        return self.scenario.members(self.dataset.train.labels, task)

    def shuffled(self, task: int) -> np.ndarray:
        """`members` in random order."""
        return np.random.default_rng([self.config.seed, zlib.crc32(b"memory"), task]).permutation(
            self.members(task)
        )

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of a training image as the step gets it: as it is in memory, or of the
        model's size where files are cropped before.
        """
        split, size = self.dataset.train, self.method.vit.image_size
        return (
            split.images.shape[1:] if isinstance(split, sources.InMemoryImages) else (size, size, 3)
        )

    def seen(self, task: int) -> np.ndarray:
        """The classes of the tasks up to `task`, bool `[classes]`."""
        return self.scenario.task_of_class <= task

    def training_indices(
        self, task: int, memory: pytrees.Tree | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What task `task` is trained on, as rows of the training set: images of its own, and
        older tasks' that `memory`, if any, names.
        """
        labels, way = self.dataset.train.labels, self.method.rehearsal
        own = self.members(task)
        if not way:
            return own, own[:0]
        shuffled = self.shuffled(task)
        held_out = way.held_out(shuffled, labels[shuffled], self.seen(task))
        again = rehearsal.rows_of(memory) if memory else own[:0]
        return np.setdiff1d(own, held_out), again

    def schedule(self, task: int, memory: pytrees.Tree | None = None) -> batches.BatchSampler:
        """Which images of `training_indices`, own ones first, make each step's batch."""
        c, way = self.config, self.method.rehearsal
        own, again = map(len, self.training_indices(task, memory))
        if not way or way.joined:
            return batches.BatchSampler(
                c.seed, task, own + again, c.epochs, c.batch_size, self.mesh.size
            )
        return batches.BatchSampler(
            c.seed, task, own, c.epochs, c.batch_size, self.mesh.size, replay=True, replayed=again
        )

    def query(self, task: int) -> np.ndarray:
        """q(x) of task `task`'s test images, `[N, dim]`, computed once in a run; `[N, 0]` where
        the method asks nothing of it.
        """
        if not (self.method.by_task or self.method.pool_size):
            return np.zeros((len(self.test_set(task).labels), 0), np.float32)
        if task not in self.queries:
            settings = self.settings
            images = self.test_set(task).images
            self.queries[task] = engine.queries(
                self.method, self.params, images, settings.batching, settings.prepared
            )
        return self.queries[task]

    @functools.cached_property
    def step_flops(self) -> float | None:
        """Floating point operations of one training step as XLA counts them; crops and Adam are
        in it. None where it can't tell.
        """
        method, key = self.method, jax.random.key(0)
        adapter, shared = (
            jax.eval_shape(draw, key, self.params)
            for draw in (method.init_adapter, method.init_shared)
        )
        memory = jax.eval_shape(
            lambda shared: method.before_task(method.init_memory(shared), shared)[0], shared
        )
        state = jax.eval_shape(
            functools.partial(train_step.init_state, self.step_config), adapter, shared
        )
        rows, like = self.schedule(0).padded, jax.ShapeDtypeStruct
        batch = {
            "images": like((rows, *self.image_shape), jnp.uint8),
            "labels": like((rows,), jnp.int32),
            "weights": like((rows,), jnp.float32),
        }
        batch |= {
            "class_mask": like((self.scenario.classes,), bool),
            "freeze_g_prompt": like((), bool),
        }
        batch |= (
            {"query": like((rows, self.method.vit.dim), self.method.vit.dtype)}
            if self.step_config.cache_queries
            else {}
        )
        batch |= {"memory": memory} | {
            name: like((rows, *column.shape), column.dtype)
            for name, column in method.columns.items()
        }
        step = train_step.compile_step(self.step_config, self.mesh)
        lowered = step.lower(state, self.params, batch, key)
        # GPUs and TPUs count only what is compiled; on a CPU the program as it is written will do.
        counted = lowered.cost_analysis() or lowered.compile().cost_analysis() or {}
        return counted.get("flops")

    def train_query(self, task: int) -> np.ndarray:
        """q(x) of task `task`'s training images prepared as test images are, `[N, dim]`; that of
        the task asked for last is held.
        """
        if task not in self.train_queries:
            self.train_queries.clear()
            self.train_queries[task] = self.features(self.members(task), self.params)
        return self.train_queries[task]

    def features(self, rows: np.ndarray, params: pytrees.Tree) -> np.ndarray:
        """q(x) `[N, dim]` of the training images `rows`, int `[N]`, prepared as test images are;
        q is the ViT with `params`.

        Raises Preempted after a SIGTERM: the training state before or behind it is kept.
        """
        # A size of its own: training depends on it, to the bit, and `eval_batch_size` may change in
        # a run.
        batching, split, out = (
            engine.Batching(self.mesh, QUERIES_AT_ONCE),
            self.dataset.train.take(rows),
            [],
        )
        in_memory = isinstance(split, sources.InMemoryImages)
        for part in np.split(np.arange(len(rows)), range(READ_AT_ONCE, len(rows), READ_AT_ONCE)):
            if distributed.all_max(self.stop.is_set())[0]:
                raise Preempted(
                    "Stopped while looking at training images; the same command continues"
                )
            images = (
                split.images[part]
                if in_memory
                else split.prepared(part, self.method.vit.image_size)
            )
            out.append(
                engine.queries(self.method, params, images, batching, prepared=not in_memory)
            )
        return np.concatenate(out)

    @functools.cached_property
    def projection(self) -> np.ndarray:
        """The random projection of every task's statistics."""
        return prototypes.projection(
            self.config.seed, self.method.vit.dim, self.config.prototype_features
        )

    def initial_adapter(self, task: int) -> Adapter:
        """Task `task`'s adapter as it is drawn, on the devices."""
        adapter = self.method.init_adapter(
            train_step.stream(self.config.seed, "adapter", task), self.params
        )
        return distributed.to_global(adapter, train_step.replicated(self.mesh))

    def initial_prompts(self, task: int) -> Adapter:
        """Key and E-prompt of `initial_adapter`, as far as the method has them."""
        return _init_prompts(self.method, train_step.stream(self.config.seed, "adapter", task))

    def statistics_shapes(self, task: int) -> pytrees.Tree:
        """Shapes and dtypes of `task_statistics`."""
        if not self.method.by_task:
            return {}
        return prototypes.shapes(
            self.config.prototype_features, len(self.scenario.classes_of(task))
        )

    def initial_shared(self) -> Shared:
        """The shared part before the first task, on the devices."""
        shared = self.method.init_shared(
            train_step.stream(self.config.seed, "shared", 0), self.params
        )
        return distributed.to_global(shared, train_step.replicated(self.mesh))

    def initial_memory(self, shared: Shared) -> pytrees.Tree:
        """What the method holds of older tasks before the first, `shared` being as it is then;
        empty where it holds nothing.
        """
        return distributed.to_global(
            self.method.init_memory(shared), train_step.replicated(self.mesh)
        )


_init_prompts = jax.jit(Method.init_prompts, static_argnums=0)


def run(
    config: Config,
    workdir: str | Path,
    console: Console | None = None,
    dataset: sources.Dataset | None = None,
) -> list[dict[str, Any]]:
    """Train and evaluate every task that `workdir` does not hold yet; returns the manifests of
    all tasks.

    `dataset` is `config`'s as `data.load` gives it, for a caller who has it; None: it is loaded.
    Raises UserError for anything the user has to mend, Preempted after a SIGTERM.
    """
    console = console or Console(quiet=not distributed.is_primary())
    with _sigterm() as stop, closing(Store(workdir)) as store:
        this = prepare(config, store, console, stop, dataset=dataset)
        with _tensorboard(config, store.root) as log, _memory_named():
            manifests = _run_tasks(dataclasses.replace(this, log=log))
    report.show(console, config.benchmark, manifests)
    console.print(f"Report: {store.root / 'report.md'}")
    return manifests


def _run_tasks(run: Run) -> list[dict[str, Any]]:
    config, store, learned = run.config, run.store, TaskBank(run)
    shared, manifests = run.initial_shared(), []
    memory = run.initial_memory(shared)
    for task in range(store.finished()):
        templates = {
            "adapter": learned.template,
            "shared": shared,
            "statistics": run.statistics_shapes(task),
            "memory": memory,
        }
        items, manifest = store.load_task(task, templates, train_step.replicated(run.mesh))
        learned.add(task, run.method.unpack(items["adapter"], run.params), items["statistics"])
        learned.stored(task)
        shared, memory = items["shared"], items["memory"]
        manifests.append(manifest)
    if manifests:
        run.console.print(f"{len(manifests)} of {config.tasks} tasks are finished in {store.root}")
        _report(
            run, manifests
        )  # a kill may have come between the last task's commit and its report
    for task in range(len(manifests), config.tasks):
        adapter = begin(run.initial_adapter(task), learned.prompt(task - 1) if task else None)
        recalled, shared = run.method.before_task(memory, shared)
        state, seconds = train_task(run, task, adapter, shared, recalled)
        start = time.monotonic()
        memory, shared = task_memory(run, task, memory, state.trainable)
        adapter, packed = _as_stored(run, state.trainable["adapter"])
        items = {
            "adapter": packed,
            "shared": shared,
            "statistics": task_statistics(run, task),
            "memory": memory,
        }
        seconds["statistics"] = time.monotonic() - start
        learned.add(task, adapter, items["statistics"])
        table, seconds["evaluate"] = evaluate_stage(run, learned.model(shared))
        manifest = _manifest(run, task, adapter, items, table, seconds)
        store.save_task(task, items, manifest)
        learned.stored(task)
        manifests.append(manifest)
        _report(run, manifests)
        run.console.print(report.line(manifests))
    return manifests


def _report(run: Run, manifests: list[dict[str, Any]]) -> None:
    if distributed.is_primary():
        drawn = (
            len(manifests) == run.config.tasks
            or sum(manifests[-1]["seconds"].values()) > DRAWN_AFTER
        )
        report.write(
            run.store.root, dataclasses.asdict(run.config), run.config.benchmark, manifests, drawn
        )


class TaskBank:
    """What the tasks so far have left behind, as evaluation needs it.

    Keys and prompts of all tasks are held, untrained ones as they are drawn; θ ⊙ m within a budget;
    the statistics as their sums.
    """

    def __init__(self, run: Run):
        self._run, self.tasks = run, 0
        self._rows = {
            name: np.zeros((run.config.tasks, *shape), np.float32)
            for name, shape in run.method.row_shapes.items()
        }
        for task in range(run.config.tasks):
            self._put(task, run.initial_prompts(task))
        self._in_memory: dict[int, Adapter] = {}
        self._weights = engine.TaskWeights(
            run.method, run.params, self._load, run.config.weights_cache_mb * 2**20
        )
        self._sums = prototypes.Sums(run.scenario.classes, run.projection)

    @functools.cached_property
    def template(self) -> Adapter:
        """Shapes and dtypes of an adapter as the store keeps it."""
        method = self._run.method
        return jax.eval_shape(
            lambda key, params: method.pack(method.init_adapter(key, params)),
            jax.random.key(0),
            self._run.params,
        )

    def _put(self, task: int, adapter: Adapter) -> None:
        for name, rows in self._rows.items():
            if name in adapter:
                rows[task] = adapter[name]

    def prompt(self, task: int) -> Adapter:
        """Key and E-prompt of task `task`."""
        return {name: rows[task] for name, rows in self._rows.items()}

    def add(self, task: int, adapter: Adapter, statistics: pytrees.Tree) -> None:
        """Take in the next task. Its adapter is held until `stored` tells that the store has it."""
        assert task == self.tasks
        self._put(task, adapter)
        self._in_memory = {task: adapter}
        self._weights.put(task, adapter)
        if statistics:
            self._sums.add(self._run.scenario.classes_of(task), statistics)
        self.tasks += 1

    def stored(self, task: int) -> None:
        """Task `task` can be read from the store from now on."""
        self._in_memory.pop(task)

    def model(self, shared: Shared) -> engine.Model:
        """The model of the tasks so far."""
        whole = train_step.replicated(self._run.mesh)
        rows = distributed.to_global(
            {name: array.copy() for name, array in self._rows.items()}, whole
        )
        return engine.Model(
            method=self._run.method,
            backbone=self._run.params,
            shared=shared,
            keys=rows["key"],
            prompts=rows["prompt"],
            weights=self._weights,
            tasks=tuple(range(self.tasks)),
            task_of_class=self._run.scenario.task_of_class,
            prototypes=distributed.to_global(self._sums.solve(), whole)
            if self._run.method.by_task
            else None,
        )

    def _load(self, task: int) -> Adapter:
        if task in self._in_memory:
            return self._in_memory[task]
        if task >= self.tasks:
            return self._run.initial_adapter(task)
        items, _ = self._run.store.load_task(
            task, {"adapter": self.template}, train_step.replicated(self._run.mesh)
        )
        return self._run.method.unpack(items["adapter"], self._run.params)


def _as_stored(run: Run, adapter: Adapter) -> tuple[Adapter, Adapter]:
    """A trained adapter as it is when it has been stored and read again, and as it is stored."""
    packed = distributed.to_global(_pack(run.method, adapter), train_step.replicated(run.mesh))
    return run.method.unpack(packed, run.params), packed


_pack = jax.jit(Method.pack, static_argnums=0)


def task_statistics(run: Run, task: int) -> pytrees.Tree:
    """The statistics of q(x) over task `task`'s training images, each once, prepared as test
    images are; empty without task identity.
    """
    if not run.method.by_task:
        return {}
    labels = run.dataset.train.labels[run.members(task)]
    statistics = prototypes.statistics(
        run.train_query(task), labels, run.scenario.classes_of(task), run.projection
    )
    return distributed.to_global(statistics, train_step.replicated(run.mesh))


def task_memory(
    run: Run, task: int, memory: pytrees.Tree, trainable: dict[str, pytrees.Tree]
) -> tuple[pytrees.Tree, Shared]:
    """The method's memory after task `task`, from its training images prepared as test images
    are, and the shared part to be stored.

    Rehearsal looks at those that it chooses exemplars from, the others at some drawn at random.
    """
    way, shared, whole = run.method.strategy, trainable["shared"], train_step.replicated(run.mesh)
    if not way:
        return {}, shared
    if run.method.rehearsal:
        memory, shared = run.method.rehearsal.update_buffer(
            memory, shared, _reviewed(run, task, memory, shared)
        )
    else:
        split, chosen = run.dataset.train, run.shuffled(task)[: regularization.IMAGES]
        batch = {
            "images": split.prepared(chosen, run.method.vit.image_size).astype(np.float32) / 255,
            "labels": split.labels[chosen],
            "class_mask": run.scenario.class_mask(task),
        }
        memory = way.update(
            memory, run.method, trainable, run.params, distributed.to_global(batch, whole)
        )
    return distributed.to_global((memory, shared), whole)


def _reviewed(run: Run, task: int, memory: pytrees.Tree, shared: Shared) -> rehearsal.Reviewed:
    """What the network after task `task` makes of the exemplars and of the task's images that
    may become some.
    """
    labels, shuffled = run.dataset.train.labels, run.shuffled(task)
    considered = run.method.rehearsal.candidate_indices(shuffled, labels[shuffled], run.seen(task))
    rows = np.concatenate([rehearsal.all_rows_of(memory), considered])
    features = run.features(rows, shared["weights"]).astype(np.float32)
    logits = np.asarray(
        run.method.head(jax.tree.map(np.asarray, {"head": shared["head"]}), features)
    )
    return rehearsal.Reviewed(
        rows, labels[rows], features, logits, run.scenario.class_mask(task), run.seen(task)
    )


def prepare(
    config: Config,
    store: Store,
    console: Console,
    stop: threading.Event,
    mesh: Mesh | None = None,
    dataset: sources.Dataset | None = None,
) -> Run:
    """Find weights and data, check that everything fits, and make `store` this run's. `mesh`
    defaults to all devices.
    """
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in RUNTIME_FIELDS}
    store.compare(settings)  # before anything is downloaded
    distributed.check_equal(
        dataclasses.asdict(config) | dict.fromkeys(("data_dir", "backbone_path"))
    )  # those may differ by host
    backbone = distributed.run_on_all(
        lambda: backbones.load(
            config.backbone, config.backbone_path, config.image_size, config.dtype
        )
    )
    for name in backbone.left_out:
        console.print(f"backbone: {name} has no place in a ViT without a classifier; left out")
    method_from_config(config, backbone.vit, classes=1)  # its layers, before any data is read
    dataset = dataset or distributed.run_on_all(
        lambda: sources.load(config.dataset, config.data_dir)
    )
    dataset = dataset.first(config.train_images_per_class, config.test_images_per_class)
    scenario = Scenario(len(dataset.class_names), config.tasks)
    for split in (dataset.train, dataset.test):
        scenario.check(split.labels)
    method = method_from_config(config, backbone.vit, scenario.classes)
    if method.rehearsal:
        method.rehearsal.check(scenario.classes)
    identity = settings | {
        "backbone_sha256": backbone.fingerprint,
        "dataset_sha256": dataset.fingerprint,
    }
    distributed.check_equal(identity)
    store.claim(identity)
    mesh = mesh or train_step.data_mesh()
    console.print(
        f"{config.method} on {config.dataset}, {config.tasks} tasks of "
        f"{scenario.classes // config.tasks} classes; "
        f"{config.backbone} at {backbone.vit.image_size} pixels; {mesh.size} "
        f"{jax.devices()[0].device_kind} device(s); {store.root}"
    )
    return Run(
        config=config,
        scenario=scenario,
        dataset=dataset,
        backbone=backbone,
        params=distributed.to_global(backbone.params, train_step.replicated(mesh)),
        method=method,
        step_config=train_step.step_config_from(
            config, method, on_device=isinstance(dataset.train, sources.InMemoryImages)
        ),
        mesh=mesh,
        store=store,
        console=console,
        stop=stop,
    )


def train_task(
    run: Run, task: int, adapter: Adapter, shared: Shared, memory: pytrees.Tree
) -> tuple[train_step.TrainState, dict[str, float]]:
    """Train task `task` from where its kept state stands, or from `adapter` and `shared`; the
    state, and the seconds it took.

    `memory` is what the method recalls of older tasks. Of the seconds, "train", "input_wait" were
    spent on waiting for batches, since this process began.

    The state after the last step is kept, so that a run killed in evaluation does not train again.
    Raises UserError for a loss that is not finite, Preempted after a SIGTERM.
    """
    config, start = run.config, time.monotonic()
    state, before = _continued(
        run, task, train_step.compile_init(run.step_config, run.mesh)(adapter, shared)
    )
    done = int(state.step)
    feed = TaskInput(run, task, done, memory)
    total = feed.schedule.steps
    call, pending, mark = 1, None, time.monotonic()
    with _progress(run.console) as progress:
        bar = progress.add_task(f"Task {task + 1}/{config.tasks}", total=total, completed=done)
        while done < total:
            count = min(
                call,
                train_step.CHUNK,
                total - done,
                config.checkpoint_every - done % config.checkpoint_every,
            )
            state, terms = feed.advance(state, done, count)
            # Looked at one call late: the devices compute this one while the host reads the one
            # before.
            if pending:
                _check(run, task, *pending)
                call, mark = _next_call(call, pending[1], time.monotonic() - mark), time.monotonic()
            pending, done = (done, count, terms), done + count
            progress.update(bar, completed=done)
            stopping, call = distributed.all_max(run.stop.is_set(), call)
            if stopping or done % config.checkpoint_every == 0 or done == total:
                _check(run, task, *pending)
                run.store.save_training(task, done, state, before + time.monotonic() - start)
                pending, mark = None, time.monotonic()
                if distributed.all_max(run.stop.is_set())[0]:
                    raise Preempted(
                        f"Stopped after step {done} of task {task + 1}; the same command continues"
                    )
    return state, {"train": before + time.monotonic() - start, "input_wait": feed.waited}


def _next_call(call: int, steps: int, seconds: float) -> int:
    """How many steps the next call should run, by how long `steps` of them took; growing slowly,
    since the first also compile.
    """
    return max(1, min(4 * call, int(CALL_SECONDS * steps / max(seconds, 1e-6))))


class TaskInput:
    """A task's steps on its images: many in one call where the images are on the devices, one by
    one where they come from files.

    `waited` counts the seconds that the host spent on getting batches ready, of which files are
    loaded in threads meanwhile.
    """

    def __init__(self, run: Run, task: int, first: int, memory: pytrees.Tree):
        whole, way = train_step.replicated(run.mesh), run.method.rehearsal
        own, again = run.training_indices(task, memory)
        split = run.dataset.train.take(np.concatenate([own, again]))
        fixed = {
            "class_mask": run.seen(task) if way else run.scenario.class_mask(task),
            "freeze_g_prompt": np.bool_(run.config.freeze_g_prompt and task > 0),
        }
        self._fixed = distributed.to_global(fixed, whole) | {"memory": memory}
        self._key = distributed.to_global(
            train_step.stream(run.config.seed, "augment", task), whole
        )
        self._run, self.schedule, self.waited = run, run.schedule(task, memory), 0.0
        self._columns = {"query": run.train_query(task)} if run.step_config.cache_queries else {}
        self._columns |= way.table(memory, len(own)) if way else {}
        if isinstance(split, sources.InMemoryImages):
            # All tasks' pools have the size of the largest, so that one program serves them.
            most = np.bincount(run.scenario.task_of_class[run.dataset.train.labels]).max() + (
                way.buffer_size if way else 0
            )
            pool = {"images": split.images, "labels": split.labels} | self._columns
            self._pool = distributed.to_global(
                {name: engine.pad(array, most) for name, array in pool.items()}, whole
            )
            self._files = None
        else:
            spec = train_step.augmentation(run.config, run.method)
            self._files = batches.from_files(
                self.schedule, split, spec, first, jax.process_index(), jax.process_count()
            )

    def advance(
        self, state: train_step.TrainState, first: int, count: int
    ) -> tuple[train_step.TrainState, Any]:
        """Run `count` steps from step `first` on; the new state, and the steps' terms as
        `_check` takes them.
        """
        return (
            self._from_files(state, count) if self._files else self._from_pool(state, first, count)
        )

    def _from_pool(
        self, state: train_step.TrainState, first: int, count: int
    ) -> tuple[train_step.TrainState, dict[str, jax.Array]]:
        start = time.monotonic()
        rows = distributed.to_global(
            self.schedule.chunk(first, count, train_step.CHUNK),
            train_step.replicated(self._run.mesh),
        )
        self.waited += time.monotonic() - start
        steps = train_step.compile_steps(self._run.step_config, self._run.mesh)
        return steps(
            state, self._run.params, self._pool, rows, self._fixed, self._key, np.int32(count)
        )

    def _from_files(
        self, state: train_step.TrainState, count: int
    ) -> tuple[train_step.TrainState, list[dict[str, jax.Array]]]:
        step, terms = train_step.compile_step(self._run.step_config, self._run.mesh), []
        for _ in range(count):
            start = time.monotonic()
            batch, rows = next(self._files)
            batch |= {name: column[rows] for name, column in self._columns.items()}
            batch = distributed.local_to_global(batch, train_step.by_row(self._run.mesh))
            self.waited += time.monotonic() - start
            state, now = step(state, self._run.params, batch | self._fixed, self._key)
            terms.append(now)
        return state, terms


def _continued(
    run: Run, task: int, state: train_step.TrainState
) -> tuple[train_step.TrainState, float]:
    """The kept state of this task and its seconds, or `state`. A damaged one costs its steps,
    not the run: the task starts again.
    """
    kept, problem = None, None
    try:
        kept = run.store.load_training(task, state, train_step.replicated(run.mesh))
    except UserError as error:
        problem = error
    if distributed.all_max(problem is not None)[0]:  # in any of the processes: they go on together
        aside = run.store.set_aside_training()
        problem = problem or "Another process could not read it."
        run.console.print(
            f"The kept training state can't be used and is now in {aside}; task {task + 1} starts "
            f"again. {problem}"
        )
        return state, 0.0
    if kept is None:
        return state, 0.0
    run.console.print(f"Task {task + 1} continues after step {int(kept[0].step)}")
    return kept


def _check(
    run: Run,
    task: int,
    first: int,
    count: int,
    terms: dict[str, jax.Array] | list[dict[str, jax.Array]],
) -> None:
    """Log the terms of `count` steps from `first` on. Raises UserError for one that is not
    finite.
    """
    terms = jax.device_get(terms)
    for index in range(count):
        values = {
            name: float(terms[index][name] if isinstance(terms, list) else terms[name][index])
            for name in train_step.TERMS
        }
        _check_step(run, task, first + index, values)


def _check_step(run: Run, task: int, step: int, values: dict[str, float]) -> None:
    run.log(f"task_{task + 1}", step, values)
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise UserError(
                f"task {task + 1}, step {step + 1}: {name} is {values[name]}; training stopped, "
                "finished tasks are as they were. "
                f"Try a lower learning_rate, or dtype=float32, in another workdir"
            )


def evaluate_stage(run: Run, model: engine.Model) -> tuple[dict[str, list[protocols.Row]], float]:
    """Every protocol over every task seen, as rows by task, and the seconds it took. Raises
    Preempted after a SIGTERM.
    """
    start = time.monotonic()
    table: dict[str, list[protocols.Row]] = {
        protocol: [] for protocol in protocols.protocols(run.method, run.config.shots)
    }
    seen = len(model.tasks)
    with _progress(run.console) as progress:
        bar = progress.add_task(f"Evaluate {seen}/{run.config.tasks}", total=seen)
        for task in model.tasks:
            if distributed.all_max(run.stop.is_set())[0]:
                raise Preempted(
                    f"Stopped while evaluating after task {seen}; the same command continues"
                )
            split = run.test_set(task)
            rows = protocols.evaluate_task(
                model, split.images, split.labels, run.query(task), task, run.settings
            )
            for protocol, row in rows.items():
                table[protocol].append(row)
            progress.advance(bar)
    return table, time.monotonic() - start


def _manifest(
    run: Run,
    task: int,
    adapter: Adapter,
    items: Mapping[str, pytrees.Tree],
    table: Mapping[str, list[protocols.Row]],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """`adapter` as the task goes on with it, which what is stored unpacks to; `items` as they
    are stored.
    """
    classes = run.scenario.classes_of(task)
    masks = pytrees.flatten(adapter.get("mask", {}))
    return {
        "classes": classes,
        "class_names": [run.dataset.class_names[c] for c in classes],
        "config": dataclasses.asdict(run.config),
        "backbone": {"name": run.backbone.name, "sha256": run.backbone.fingerprint},
        "metrics": {protocol: [_counts(row) for row in rows] for protocol, rows in table.items()},
        "seconds": dict(seconds),
        "parameters": {
            "adapter": pytrees.count(adapter),
            "shared": pytrees.count(items["shared"]),
            "fixed": run.method.fixed(adapter),
        },
        "step_flops": run.step_flops,
        "bytes": {name: pytrees.nbytes(tree) for name, tree in items.items()}
        | {"exemplars": _exemplar_bytes(run, items["memory"])},
        "mask_distance_from_one": {
            path: float(jnp.sqrt(jnp.mean((mask - 1) ** 2))) for path, mask in masks.items()
        },
        "weight_drift": _drift(run, adapter, items["shared"]),
        "mask_density": {path: _density(mask) for path, mask in masks.items()},
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in _PACKAGES},
    }


def _exemplar_bytes(run: Run, memory: pytrees.Tree) -> int:
    """Bytes of the older tasks' images that are trained on again, as the step gets them; the
    store keeps their rows alone.
    """
    if not run.method.rehearsal:
        return 0
    return len(rehearsal.all_rows_of(memory)) * math.prod(run.image_shape)


def _counts(row: protocols.Row) -> dict[str, Any]:
    """A row for the manifest. Of the tasks that its images were given to, those that got any:
    there may be hundreds of tasks.
    """
    given = {str(task): count for task, count in enumerate(row.identified) if count}
    return dataclasses.asdict(row) | {"identified": given}


def _drift(run: Run, adapter: Adapter, shared: Shared) -> dict[str, float]:
    """How far the task's weights are from the frozen ones, |θ_t − θ| / |θ| in the 2-norm, for
    each parameter that they replace.
    """
    theta = pytrees.flatten(run.params)
    there = pytrees.flatten(run.method.weights(run.params, adapter) | shared.get("weights", {}))
    norm = jnp.linalg.norm
    return {
        path: float(norm(w - theta[path]) / jnp.maximum(norm(theta[path]), 1e-12))
        for path, w in there.items()
        if path in theta
    }


def _density(mask: jax.Array) -> dict[str, Any]:
    """A histogram of a mask's entries between its extremes."""
    counts, edges = np.histogram(np.asarray(mask), bins=60)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}


_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@contextmanager
def _memory_named() -> Iterator[None]:
    """What to do about too little memory, in the place of XLA's own account of it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"batch_size: the devices have too little memory ({str(error).splitlines()[0]}). Take "
            "a lower eval_batch_size or "
            "weights_cache_mb, which may change in a run; or in another workdir a lower batch_size "
            "or dtype=bfloat16. Finished tasks are "
            "as they were"
        ) from error


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; outside the main thread, where no handler can be set, it never
    is.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _tensorboard(config: Config, root: Path) -> Iterator[Callable[..., None]]:
    if not config.tensorboard or not distributed.is_primary():
        yield lambda *_: None
        return
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            "tensorboard: tensorboardX is not installed; pip install tensorboardX, or leave the "
            "setting off"
        ) from error
    with SummaryWriter(str(root / "tensorboard")) as writer:

        def log(group: str, step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(f"{group}/{name}", value, step)

        yield log


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
