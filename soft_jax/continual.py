"""The one outer loop: scenario → train → evaluate → store → report, task after task, resumable anywhere."""

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

from soft_jax import data, evaluate, inference, methods, prototype, report, retention, train, trees, weights
from soft_jax.augment import prepare_test
from soft_jax.config import FREE, Config
from soft_jax.errors import UserError
from soft_jax.scenario import Scenario
from soft_jax.store import Store


class Preempted(Exception):
    """SIGTERM came: the state is saved, and the same command continues."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """Everything that stays fixed from a run's first task to its last."""

    config: Config
    scenario: Scenario
    dataset: data.Dataset
    backbone: weights.Backbone
    params: trees.Tree  # the frozen backbone, on the devices
    method: methods.Method
    recipe: train.Recipe
    mesh: Mesh
    store: Store
    console: Console
    stop: threading.Event
    log: Callable[[str, int, Mapping[str, float]], None] = lambda *_: None
    queries: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # by task: q(x) depends on nothing trained

    @property
    def settings(self) -> evaluate.Settings:
        """How evaluation batches its images."""
        c = self.config
        return evaluate.Settings(self.mesh, c.batch_size, c.shots, c.eval_batch_size)

    def test_set(self, task: int) -> data.Split:
        """Task `task`'s test images."""
        test = self.dataset.test
        members = self.scenario.members(test.labels, task)
        return data.Split(test.images[members], test.labels[members])

    def query(self, task: int) -> np.ndarray:
        """q(x) of task `task`'s test images, `[N, dim]`, computed once in a run; `[N, 0]` where the method asks nothing of it."""
        if not (self.method.by_task or self.method.pool_size):
            return np.zeros((len(self.test_set(task).labels), 0), np.float32)
        if task not in self.queries:
            self.queries[task] = inference.queries(self.method, self.params, self.test_set(task).images, self.settings.batching)
        return self.queries[task]

    @functools.cached_property
    def step_flops(self) -> float | None:
        """Floating point operations of one training step as XLA counts them; crops and Adam are in it. None where it can't tell."""
        shared = jax.eval_shape(self.initial_shared)
        trainable = jax.eval_shape(lambda: (self.initial_adapter(0), self.initial_shared()))
        state = jax.eval_shape(functools.partial(train.init_state, self.recipe), *trainable)
        _, batch = next(batches(self, 0, 0))
        batch = batch | {"memory": jax.eval_shape(self.initial_memory, shared)}
        step = train.compile_step(self.recipe, self.mesh)
        lowered = step.lower(state, self.params, batch, jax.random.key(0))
        # GPUs and TPUs count only what is compiled; on a CPU the program as it is written will do.
        counted = lowered.cost_analysis() or lowered.compile().cost_analysis() or {}
        return counted.get("flops")

    @functools.cached_property
    def projection(self) -> np.ndarray:
        """The random projection of every task's statistics."""
        return prototype.projection(self.config.seed, self.method.vit.dim, self.config.prototype_features)

    def initial_adapter(self, task: int) -> methods.Adapter:
        """Task `task`'s adapter as it is drawn, on the devices."""
        adapter = self.method.init_adapter(train.stream(self.config.seed, "adapter", task), self.params)
        return jax.device_put(adapter, train.replicated(self.mesh))

    def initial_prompts(self, task: int) -> methods.Adapter:
        """Key and E-prompt of `initial_adapter`, as far as the method has them."""
        return _init_prompts(self.method, train.stream(self.config.seed, "adapter", task))

    def statistics_shapes(self, task: int) -> trees.Tree:
        """Shapes and dtypes of `task_statistics`."""
        if not self.method.by_task:
            return {}
        return prototype.shapes(self.config.prototype_features, len(self.scenario.classes_of(task)))

    def initial_shared(self) -> methods.Shared:
        """The shared part before the first task, on the devices."""
        shared = self.method.init_shared(train.stream(self.config.seed, "shared", 0), self.params)
        return jax.device_put(shared, train.replicated(self.mesh))

    def initial_memory(self, shared: methods.Shared) -> trees.Tree:
        """What the method holds of older tasks before the first, `shared` being as it is then; empty where it holds nothing."""
        memory = self.method.retention.init(self.method, shared) if self.method.retention else {}
        return jax.device_put(memory, train.replicated(self.mesh))


_init_prompts = jax.jit(methods.Method.init_prompts, static_argnums=0)


def run(config: Config, workdir: str | Path, console: Console | None = None, dataset: data.Dataset | None = None) -> list[dict[str, Any]]:
    """Train and evaluate every task that `workdir` does not hold yet; returns the manifests of all tasks.

    `dataset` is `config`'s as `data.load` gives it, for a caller who has it; None: it is loaded. Raises UserError for anything the
    user has to mend, Preempted after a SIGTERM.
    """
    console = console or Console()
    with _sigterm() as stop, closing(Store(workdir)) as store:
        this = prepare(config, store, console, stop, dataset=dataset)
        with _tensorboard(config, store.root) as log:
            manifests = _run_tasks(dataclasses.replace(this, log=log))
    report.show(console, config.benchmark, manifests)
    console.print(f"Report: {store.root / 'report.md'}")
    return manifests


def _run_tasks(run: Run) -> list[dict[str, Any]]:
    config, store, learned = run.config, run.store, Learned(run)
    shared, manifests = run.initial_shared(), []
    memory = run.initial_memory(shared)
    for task in range(store.finished()):
        templates = {"adapter": learned.template, "shared": shared, "statistics": run.statistics_shapes(task), "memory": memory}
        items, manifest = store.load_task(task, templates, train.replicated(run.mesh))
        learned.add(task, items["adapter"], items["statistics"])
        learned.stored(task)
        shared, memory = items["shared"], items["memory"]
        manifests.append(manifest)
    if manifests:
        run.console.print(f"{len(manifests)} of {config.tasks} tasks are finished in {store.root}")
        # A kill may have come between the last task's commit and its report.
        report.write(store.root, dataclasses.asdict(config), config.benchmark, manifests)
    for task in range(len(manifests), config.tasks):
        adapter = methods.begin(run.initial_adapter(task), learned.prompt(task - 1) if task else None)
        state, train_seconds = train_task(run, task, adapter, shared, memory)
        start = time.monotonic()
        memory = task_memory(run, task, memory, state.trainable)
        items = {**state.trainable, "statistics": task_statistics(run, task), "memory": memory}
        seconds = {"train": train_seconds, "statistics": time.monotonic() - start}
        shared = items["shared"]
        learned.add(task, items["adapter"], items["statistics"])
        table, seconds["evaluate"] = evaluate_stage(run, learned.model(shared))
        manifest = _manifest(run, task, items, table, seconds)
        store.save_task(task, items, manifest)
        learned.stored(task)
        manifests.append(manifest)
        report.write(store.root, dataclasses.asdict(config), config.benchmark, manifests)
        run.console.print(report.line(manifests))
    return manifests


class Learned:
    """What the tasks so far have left behind, as evaluation needs it.

    Keys and prompts of all tasks are held, untrained ones as they are drawn; θ ⊙ m within a budget; the statistics as their sums.
    """

    def __init__(self, run: Run):
        self._run, self.tasks = run, 0
        self._rows = {name: np.zeros((run.config.tasks, *shape), np.float32) for name, shape in run.method.row_shapes.items()}
        for task in range(run.config.tasks):
            self._put(task, run.initial_prompts(task))
        self._in_memory: dict[int, methods.Adapter] = {}
        self._weights = inference.TaskWeights(run.method, run.params, self._load, run.config.weights_cache_mb * 2**20)
        self._sums = prototype.Sums(run.scenario.classes, run.projection)

    @functools.cached_property
    def template(self) -> methods.Adapter:
        """Shapes and dtypes of an adapter."""
        return jax.eval_shape(self._run.method.init_adapter, jax.random.key(0), self._run.params)

    def _put(self, task: int, adapter: methods.Adapter) -> None:
        for name, rows in self._rows.items():
            if name in adapter:
                rows[task] = adapter[name]

    def prompt(self, task: int) -> methods.Adapter:
        """Key and E-prompt of task `task`."""
        return {name: rows[task] for name, rows in self._rows.items()}

    def add(self, task: int, adapter: methods.Adapter, statistics: trees.Tree) -> None:
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

    def model(self, shared: methods.Shared) -> inference.Model:
        """The model of the tasks so far."""
        whole = train.replicated(self._run.mesh)
        rows = jax.device_put({name: array.copy() for name, array in self._rows.items()}, whole)
        return inference.Model(
            method=self._run.method,
            backbone=self._run.params,
            shared=shared,
            keys=rows["key"],
            prompts=rows["prompt"],
            weights=self._weights,
            tasks=tuple(range(self.tasks)),
            task_of_class=self._run.scenario.task_of_class,
            prototypes=jax.device_put(self._sums.solve(), whole) if self._run.method.by_task else None,
        )

    def _load(self, task: int) -> methods.Adapter:
        if task in self._in_memory:
            return self._in_memory[task]
        if task >= self.tasks:
            return self._run.initial_adapter(task)
        items, _ = self._run.store.load_task(task, {"adapter": self.template}, train.replicated(self._run.mesh))
        return items["adapter"]


def task_statistics(run: Run, task: int) -> trees.Tree:
    """The statistics of q(x) over task `task`'s training images, each once, prepared as test images are; empty without task identity."""
    if not run.method.by_task:
        return {}
    split = run.dataset.train
    members = run.scenario.members(split.labels, task)
    query = inference.queries(run.method, run.params, split.images[members], run.settings.batching)
    return prototype.statistics(query, split.labels[members], run.scenario.classes_of(task), run.projection)


def task_memory(run: Run, task: int, memory: trees.Tree, trainable: dict[str, trees.Tree]) -> trees.Tree:
    """The method's memory after task `task`, from some of its training images, drawn at random and prepared as test images are."""
    if not run.method.retention:
        return {}
    split, size = run.dataset.train, run.method.vit.image_size
    members = run.scenario.members(split.labels, task)
    chosen = np.random.default_rng([run.config.seed, zlib.crc32(b"memory"), task]).permutation(members)[: retention.IMAGES]
    images = np.asarray(prepare_test(jnp.asarray(split.images[chosen]), size), np.float32) / 255
    batch = {"images": images, "labels": split.labels[chosen], "class_mask": run.scenario.class_mask(task)}
    return jax.device_put(run.method.retention.update(memory, run.method, trainable, run.params, batch), train.replicated(run.mesh))


def prepare(
    config: Config, store: Store, console: Console, stop: threading.Event, mesh: Mesh | None = None, dataset: data.Dataset | None = None
) -> Run:
    """Find weights and data, check that everything fits, and make `store` this run's. `mesh` defaults to all devices."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    store.compare(settings)  # before anything is downloaded
    backbone = weights.load(config.backbone, config.backbone_path, config.image_size, config.dtype)
    for name in backbone.left_out:
        console.print(f"backbone: {name} has no place in a ViT without a classifier; left out")
    methods.from_config(config, backbone.vit, classes=1)  # its layers, before any data is read
    dataset = dataset or data.load(config.dataset, config.data_dir)
    dataset = dataset.first(config.train_images_per_class, config.test_images_per_class)
    scenario = Scenario(len(dataset.class_names), config.tasks)
    for split in (dataset.train, dataset.test):
        scenario.check(split.labels)
    method = methods.from_config(config, backbone.vit, scenario.classes)
    store.claim(settings | {"backbone_sha256": backbone.fingerprint, "dataset_sha256": dataset.fingerprint})
    mesh = mesh or train.data_mesh()
    console.print(
        f"{config.method} on {config.dataset}, {config.tasks} tasks of {scenario.classes // config.tasks} classes; "
        f"{config.backbone} at {backbone.vit.image_size} pixels; {mesh.size} {jax.devices()[0].device_kind} device(s); {store.root}"
    )
    return Run(
        config=config,
        scenario=scenario,
        dataset=dataset,
        backbone=backbone,
        params=jax.device_put(backbone.params, train.replicated(mesh)),
        method=method,
        recipe=train.recipe_from_config(config, method),
        mesh=mesh,
        store=store,
        console=console,
        stop=stop,
    )


def train_task(run: Run, task: int, adapter: methods.Adapter, shared: methods.Shared, memory: trees.Tree) -> tuple[train.TrainState, float]:
    """Train task `task` from where its kept state stands, or from `adapter` and `shared`; the state and the seconds it took.

    `memory` is what the method holds of older tasks.

    The state after the last step is kept, so that a run killed in evaluation does not train again.
    Raises UserError for a loss that is not finite, Preempted after a SIGTERM.
    """
    config, start = run.config, time.monotonic()
    # The step donates its state; the adapters and the shared part that others still hold are copied first.
    state = train.init_state(run.recipe, *jax.tree.map(jnp.copy, (adapter, shared)))
    state, before = _continued(run, task, jax.device_put(state, train.replicated(run.mesh)))
    step_fn, key = train.compile_step(run.recipe, run.mesh), train.stream(config.seed, "augment", task)
    first, total = int(state.step), config.epochs * _steps_per_epoch(run, task)
    last: tuple[int, dict[str, jax.Array]] | None = None
    with _progress(run.console) as progress:
        bar = progress.add_task(f"Task {task + 1}/{config.tasks}", total=total, completed=first)
        for step, batch in batches(run, task, first):
            state, terms = step_fn(state, run.params, batch | {"memory": memory}, key)
            # Looked at one step late: the device computes this step while the host reads the one before.
            if last:
                _check(run, task, *last)
            last = step, terms
            progress.advance(bar)
            stopping = run.stop.is_set()
            if stopping or (step + 1) % config.checkpoint_every == 0 or step + 1 == total:
                _check(run, task, *last)
                run.store.save_training(task, step + 1, state, before + time.monotonic() - start)
                last = None
            if stopping:
                raise Preempted(f"Stopped after step {step + 1} of task {task + 1}; the same command continues")
    return state, before + time.monotonic() - start


def _continued(run: Run, task: int, state: train.TrainState) -> tuple[train.TrainState, float]:
    """The kept state of this task and its seconds, or `state`. A damaged one costs its steps, not the run: the task starts again."""
    try:
        kept = run.store.load_training(task, state, train.replicated(run.mesh))
    except UserError as error:
        aside = run.store.set_aside_training()
        run.console.print(f"The kept training state can't be used and is now in {aside}; task {task + 1} starts again. {error}")
        return state, 0.0
    if kept is None:
        return state, 0.0
    run.console.print(f"Task {task + 1} continues after step {int(kept[0].step)}")
    return kept


def _steps_per_epoch(run: Run, task: int) -> int:
    return math.ceil(len(run.scenario.members(run.dataset.train.labels, task)) / run.config.batch_size)


def batches(run: Run, task: int, first: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
    """A task's training batches from step `first` on, as (step, batch); a pure function of seed, task and step.

    The last batch of an epoch holds what is left. Every batch is padded to one shape that the devices divide, with weight 0.
    """
    config, split = run.config, run.dataset.train
    members = run.scenario.members(split.labels, task)
    steps = _steps_per_epoch(run, task)
    padded = math.ceil(config.batch_size / run.mesh.size) * run.mesh.size
    rows, whole = train.by_row(run.mesh), train.replicated(run.mesh)
    fixed = jax.device_put({"class_mask": run.scenario.class_mask(task), "hold_g_prompt": config.hold_g_prompt and task > 0}, whole)
    for epoch in range(first // steps, config.epochs):
        order = np.random.default_rng([config.seed, zlib.crc32(b"shuffle"), task, epoch]).permutation(members)
        for index in range(first - epoch * steps if epoch == first // steps else 0, steps):
            chosen = order[index * config.batch_size : (index + 1) * config.batch_size]
            pad = np.zeros(padded - len(chosen), chosen.dtype)
            weights_ = np.concatenate([np.ones(len(chosen), np.float32), pad.astype(np.float32)])
            chosen = np.concatenate([chosen, pad])
            batch = jax.device_put({"images": split.images[chosen], "labels": split.labels[chosen], "weights": weights_}, rows)
            yield epoch * steps + index, batch | fixed


def _check(run: Run, task: int, step: int, terms: dict[str, jax.Array]) -> None:
    values = {name: float(value) for name, value in jax.device_get(terms).items()}
    run.log(f"task_{task + 1}", step, values)
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise UserError(
                f"task {task + 1}, step {step + 1}: {name} is {values[name]}; training stopped, finished tasks are as they were. "
                f"Try a lower learning_rate, or dtype=float32, in another workdir"
            )


def evaluate_stage(run: Run, model: inference.Model) -> tuple[dict[str, list[evaluate.Row]], float]:
    """Every protocol over every task seen, as rows by task, and the seconds it took. Raises Preempted after a SIGTERM."""
    start = time.monotonic()
    table: dict[str, list[evaluate.Row]] = {protocol: [] for protocol in evaluate.protocols(run.method)}
    seen = len(model.tasks)
    with _progress(run.console) as progress:
        bar = progress.add_task(f"Evaluate {seen}/{run.config.tasks}", total=seen)
        for task in model.tasks:
            if run.stop.is_set():
                raise Preempted(f"Stopped while evaluating after task {seen}; the same command continues")
            split = run.test_set(task)
            rows = evaluate.evaluate_task(model, split.images, split.labels, run.query(task), task, run.settings)
            for protocol, row in rows.items():
                table[protocol].append(row)
            progress.advance(bar)
    return table, time.monotonic() - start


def _manifest(
    run: Run, task: int, items: Mapping[str, trees.Tree], table: Mapping[str, list[evaluate.Row]], seconds: Mapping[str, float]
) -> dict[str, Any]:
    classes = run.scenario.classes_of(task)
    masks = trees.flatten(items["adapter"].get("mask", {}))
    return {
        "classes": classes,
        "class_names": [run.dataset.class_names[c] for c in classes],
        "config": dataclasses.asdict(run.config),
        "backbone": {"name": run.backbone.name, "sha256": run.backbone.fingerprint},
        "metrics": {protocol: [dataclasses.asdict(row) for row in rows] for protocol, rows in table.items()},
        "seconds": dict(seconds),
        "parameters": {name: trees.count(items[name]) for name in ("adapter", "shared")} | {"fixed": run.method.fixed(items["adapter"])},
        "step_flops": run.step_flops,
        "bytes": {name: trees.nbytes(tree) for name, tree in items.items()},
        "mask_distance_from_one": {path: float(jnp.sqrt(jnp.mean((mask - 1) ** 2))) for path, mask in masks.items()},
        "weight_drift": _drift(run, items),
        "mask_density": {path: _density(mask) for path, mask in masks.items()},
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES},
    }


def _drift(run: Run, items: Mapping[str, trees.Tree]) -> dict[str, float]:
    """How far the task's weights are from the frozen ones, |θ_t − θ| / |θ| in the 2-norm, for each parameter that they replace."""
    theta = trees.flatten(run.params)
    there = trees.flatten(run.method.weights(run.params, items["adapter"]) | items["shared"].get("weights", {}))
    norm = jnp.linalg.norm
    return {path: float(norm(w - theta[path]) / jnp.maximum(norm(theta[path]), 1e-12)) for path, w in there.items() if path in theta}


def _density(mask: jax.Array) -> dict[str, Any]:
    """A histogram of a mask's entries between its extremes."""
    counts, edges = np.histogram(np.asarray(mask), bins=60)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}


_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; outside the main thread, where no handler can be set, it never is."""
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
    if not config.tensorboard:
        yield lambda *_: None
        return
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboard: tensorboardX is not installed; pip install tensorboardX, or leave the setting off") from error
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
