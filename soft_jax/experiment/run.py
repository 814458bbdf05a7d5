"""The run that goes through the outer loop: what stays fixed from its first task to its last."""

import dataclasses
import functools
import threading
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from soft_jax import distributed, pytrees
from soft_jax.config import DEFAULTS, Config
from soft_jax.data import batches, scenarios, sources
from soft_jax.data.augmentation import Augment
from soft_jax.data.scenarios import Scenario
from soft_jax.errors import Stopped, UserError
from soft_jax.evaluation import evaluate
from soft_jax.evaluation.metrics import TEST, VALIDATION
from soft_jax.experiment import settings as settings_lib
from soft_jax.experiment.display import Display, NoDisplay
from soft_jax.experiment.stopping import Preempted
from soft_jax.hooks import Hooks
from soft_jax.inference import engine, rules, zero_shot
from soft_jax.methods import registry, rehearsal
from soft_jax.methods.method import Adapter, Method, Shared
from soft_jax.models import backbones
from soft_jax.store.folder import Store
from soft_jax.store.records import RunRecord
from soft_jax.training import train_step
from soft_jax.training.task_input import TaskData
from soft_jax.training.train_step import StepConfig

# Training images that q(x) is taken of before a signal is looked for; from files, they are held at
# once.
READ_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Start:
    """What a task begins with that is learned by itself, after others that the run doesn't have.

    `number` takes the place of the task's in its random draws. `adapter` and `shared` are arrays
    that take the place of drawn ones; a G-prompt that is given is not trained on. Where it is
    `alone`, whoever learns it evaluates it: the run itself does so with the task given only, and
    writes no report. Where it is `trained` already, no step is taken (`experiment.imported`).
    """

    alone: bool = False
    trained: bool = False
    number: int = 0
    adapter: Adapter = dataclasses.field(default_factory=dict)
    shared: Shared = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """Everything that stays fixed in a run, and what of it is computed once."""

    config: Config
    scenario: Scenario
    dataset: sources.Dataset
    backbone: backbones.Backbone
    params: pytrees.Tree  # the frozen backbone, on the devices
    method: Method
    rules: tuple[rules.TaskIdentityRule, ...]
    step_config: StepConfig
    mesh: Mesh
    store: Store
    console: Console
    stop: threading.Event
    hooks: Hooks = dataclasses.field(default_factory=Hooks)
    start: Start = dataclasses.field(default_factory=Start)
    # Takes task (from 1), step (from 0) and what was measured.
    log: Callable[[int, int, Mapping[str, float]], None] = lambda *_: None
    display: Display = dataclasses.field(default_factory=NoDisplay)
    # By part and task, computed once: q(x) depends on nothing that is trained, and files are
    # decoded for the test but once.
    queries: dict[tuple[str, int], np.ndarray] = dataclasses.field(default_factory=dict)
    indices: dict[tuple[str, int], np.ndarray] = dataclasses.field(default_factory=dict)
    train_queries: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    prepared: dict[tuple[str, int], sources.InMemoryImages] = dataclasses.field(
        default_factory=dict
    )

    @functools.cached_property
    def zero_shot(self) -> jax.Array | None:
        """Return the classes' zero-shot text features, `[classes, feature_dim]`, on the devices.

        None where the backbone reads no text.
        """
        method = self.method
        if not method.host.reads_text:
            return None
        return zero_shot.text_features(method.architecture, self.params, method.class_names)

    @property
    def settings(self) -> evaluate.Settings:
        """Return how evaluation batches its images."""
        c = self.config
        from_files = isinstance(self.dataset.test, sources.EncodedImages)
        return evaluate.Settings(self.mesh, c.batch_size, c.eval_batch_size, from_files)

    @property
    def evaluated(self) -> tuple[rules.TaskIdentityRule, ...]:
        """Return the rules that test images are answered under."""
        if not self.start.alone:
            return self.rules
        return tuple(rule for rule in self.rules if rule.key == rules.TaskGiven().key)

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the parts of the data set that are evaluated: test, and validation if held out."""
        return (TEST, VALIDATION) if self.dataset.validation else (TEST,)

    def part(self, name: str, task: int) -> sources.InMemoryImages:
        """Return task `task`'s images of a part of the data set.

        Those from files are prepared, and then held in the host's memory.
        """
        split, members = getattr(self.dataset, name), self.index(name, task)
        if isinstance(split, sources.InMemoryImages):
            return split.take(members)
        if (name, task) not in self.prepared:
            images = split.prepared(members, self.method.architecture.image_size)
            self.prepared[name, task] = sources.InMemoryImages(images, split.labels[members])
        return self.prepared[name, task]

    def index(self, part: str, task: int) -> np.ndarray:
        """Return the rows of task `task`'s images in a part of the data set, int `[N]`."""
        if (part, task) not in self.indices:
            labels = getattr(self.dataset, part).labels
            self.indices[part, task] = self.scenario.members(labels, task)
        return self.indices[part, task]

    def files(self, part: str, index: np.ndarray) -> list[str]:
        """Return the names of the images at `index` of a part; "" where they are no files."""
        split = getattr(self.dataset, part)
        if isinstance(split, sources.InMemoryImages):
            return [""] * len(index)
        return [split.names(int(i)) for i in split.order[index]]

    def members(self, task: int) -> np.ndarray:
        """Return task `task`'s training images, as rows of the whole training set, int `[N]`."""
        return self.scenario.members(self.dataset.train.labels, task)

    def shuffled(self, task: int) -> np.ndarray:
        """Return `members` in random order."""
        seed = [self.config.seed, zlib.crc32(b"memory"), task]
        return np.random.default_rng(seed).permutation(self.members(task))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Return the shape of a training image as the step gets it.

        In memory it is as it is; files are cropped to the model's size before.
        """
        split, size = self.dataset.train, self.method.architecture.image_size
        in_memory = isinstance(split, sources.InMemoryImages)
        return split.images.shape[1:] if in_memory else (size, size, 3)

    def training_indices(
        self, task: int, memory: pytrees.Tree | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what task `task` is trained on, as rows of the training set.

        First its own images, then the older tasks' images that `memory` names, if there is any.
        """
        labels, strategy = self.dataset.train.labels, self.method.rehearsal
        own = self.members(task)
        if not strategy:
            return own, own[:0]
        shuffled = self.shuffled(task)
        seen = self.scenario.seen_mask(task)
        held_out = strategy.held_out(shuffled, labels[shuffled], seen)
        again = rehearsal.rows_of(memory) if memory else own[:0]
        return np.setdiff1d(own, held_out), again

    def sampler(self, task: int, memory: pytrees.Tree | None = None) -> batches.BatchSampler:
        """Return which images of `training_indices`, own ones first, make each step's batch."""
        c, strategy = self.config, self.method.rehearsal
        own, again = map(len, self.training_indices(task, memory))
        if not strategy or strategy.joined:
            return batches.BatchSampler(
                c.seed, task, own + again, c.epochs, c.batch_size, self.mesh.size
            )
        return batches.BatchSampler(
            c.seed, task, own, c.epochs, c.batch_size, self.mesh.size, replay=True, replayed=again
        )

    def task_data(self, task: int, memory: pytrees.Tree) -> TaskData:
        """Return what task `task` is trained on, `memory` being what the method recalls."""
        c, strategy, labels = self.config, self.method.rehearsal, self.dataset.train.labels
        own, again = self.training_indices(task, memory)
        columns = {"query": self.train_query(task)} if c.cache_queries else {}
        columns |= strategy.table(memory, len(own)) if strategy else {}
        sizes = [len(self.scenario.members(labels, t)) for t in range(self.scenario.num_tasks)]
        mask = self.scenario.seen_mask(task) if strategy else self.scenario.class_mask(task)
        return TaskData(
            images=self.dataset.train.take(np.concatenate([own, again])),
            columns=columns,
            sampler=self.sampler(task, memory),
            class_mask=mask,
            memory=memory,
            freeze_g_prompt=bool(self.start.shared) or (c.freeze_g_prompt and task > 0),
            augment=_augment(c, self.method),
            augment_key=train_step.stream(c.seed, "augment", task),
            pool_size=max(sizes) + (strategy.buffer_size if strategy else 0),
            rates=_rates(c, task, self.sampler(task, memory).steps_per_epoch),
        )

    def query(self, part: str, task: int) -> np.ndarray:
        """Return q(x) of a task's images of a part, `[N, dim]`, computed once in a run.

        `[N, 0]` where neither the method nor a rule asks for it.
        """
        split = self.part(part, task)
        if not self.method.queries and not any(rule.needs_query for rule in self.rules):
            return np.zeros((len(split.labels), 0), np.float32)
        if (part, task) not in self.queries:
            settings = self.settings
            self.queries[part, task] = engine.queries(
                self.method, self.params, split.images, settings.batching, settings.prepared
            )
        return self.queries[part, task]

    @functools.cached_property
    def step_flops(self) -> float | None:
        """Return the floating point operations of one training step as XLA counts them.

        Crops and Adam are in it. None where XLA can't tell.
        """
        method, key, like = self.method, jax.random.key(0), jax.ShapeDtypeStruct
        adapter, shared = (
            jax.eval_shape(draw, key, self.params)
            for draw in (method.init_adapter, method.init_shared)
        )
        memory = jax.eval_shape(
            lambda shared: method.before_task(method.init_memory(shared), shared)[0], shared
        )
        init = functools.partial(train_step.init_state, self.step_config)
        state = jax.eval_shape(init, adapter, shared)
        rows = self.sampler(0).padded
        batch = {
            "images": like((rows, *self.image_shape), jnp.uint8),
            "labels": like((rows,), jnp.int32),
            "weights": like((rows,), jnp.float32),
            "class_mask": like((self.scenario.num_classes,), bool),
            "freeze_g_prompt": like((), bool),
            "memory": memory,
        }
        if self.step_config.cache_queries:
            architecture = method.architecture
            batch["query"] = like((rows, architecture.feature_dim), architecture.dtype)
        if self.step_config.scheduled:
            batch["rates"] = jax.eval_shape(lambda: _rates(self.config, 0, 1))
        for name, column in method.columns.items():
            batch[name] = like((rows, *column.shape), column.dtype)
        step = train_step.compile_step(self.step_config, self.mesh)
        lowered = step.lower(state, self.params, batch, key)
        # GPUs and TPUs count only what is compiled; on a CPU the program as it is written will do.
        counted = lowered.cost_analysis() or lowered.compile().cost_analysis() or {}
        return counted.get("flops")

    def train_query(self, task: int) -> np.ndarray:
        """Return q(x) of a task's training images prepared as test images are, `[N, dim]`.

        That of the task asked for last is held.
        """
        if task not in self.train_queries:
            self.train_queries.clear()
            self.train_queries[task] = self.features(self.members(task), self.params)
        return self.train_queries[task]

    def features(self, rows: np.ndarray, params: pytrees.Tree) -> np.ndarray:
        """Return q(x) `[N, dim]` of the training images `rows`, int `[N]`; q has `params`.

        They are prepared as test images are. Raises Preempted after a signal: the training state
        before or behind it is kept.
        """
        # A size of its own: training depends on it, to the bit, and `eval_batch_size` may change in
        # a run.
        at_once = min(engine.IMAGES_A_DEVICE * self.mesh.size, READ_AT_ONCE)
        batching = engine.Batching(self.mesh, at_once)
        split, size = self.dataset.train.take(rows), self.method.architecture.image_size
        in_memory, out = isinstance(split, sources.InMemoryImages), []
        starts = range(READ_AT_ONCE, len(rows), READ_AT_ONCE)
        for part in np.split(np.arange(len(rows)), starts):
            if distributed.all_max(self.stop.is_set())[0]:
                raise Preempted("Stopped while looking at training images")
            images = split.images[part] if in_memory else split.prepared(part, size)
            out.append(
                engine.queries(self.method, params, images, batching, prepared=not in_memory)
            )
        return np.concatenate(out)

    def adapter_key(self, task: int) -> jax.Array:
        """Return the key that task `task`'s adapter is drawn from."""
        return train_step.stream(self.config.seed, "adapter", self.start.number + task)

    def initial_adapter(self, task: int) -> Adapter:
        """Return task `task`'s adapter as it is drawn, on the devices."""
        draw = _drawing(Method.init_adapter)
        adapter = draw(self.method, self.adapter_key(task), self.params)
        adapter = {**adapter, **self.start.adapter}
        return distributed.to_global(adapter, distributed.replicated(self.mesh))

    def initial_prompts(self, task: int) -> Adapter:
        """Return key and E-prompt of `initial_adapter`, as far as the method has them."""
        return _drawing(Method.init_prompts)(self.method, self.adapter_key(task))

    def statistics_shapes(self, task: int) -> pytrees.Tree:
        """Return shapes and dtypes of what the rules keep of a task."""
        count, shapes = len(self.scenario.classes_of(task)), {}
        for rule in rules.keepers(self.rules).values():
            shapes |= rule.statistics_shapes(count)
        return shapes

    def initial_shared(self) -> Shared:
        """Return the shared part before the first task, on the devices."""
        key = train_step.stream(self.config.seed, "shared", 0)
        shared = {**self.method.init_shared(key, self.params), **self.start.shared}
        return distributed.to_global(shared, distributed.replicated(self.mesh))

    def initial_memory(self, shared: Shared) -> pytrees.Tree:
        """Return what the method holds of older tasks before the first; empty if nothing.

        `shared` is the shared part as it is then.
        """
        memory = self.method.init_memory(shared)
        return distributed.to_global(memory, distributed.replicated(self.mesh))


@functools.cache
def _drawing(draw: Callable[..., pytrees.Tree]) -> Callable[..., pytrees.Tree]:
    """Jit one of the functions of `Method` that draw.

    On a CPU they are hardly optimized: LLVM takes seconds over a generator of random numbers that
    runs for milliseconds. The numbers are the same.
    """
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(draw, static_argnums=0, compiler_options=options)


def _rules(config: Config, method: Method, store: Store) -> tuple[rules.TaskIdentityRule, ...]:
    """Return the rules of the run's reports: those that apply, and that it was begun with.

    Tasks that a version without a rule has trained kept nothing for it, and have no figures of it.
    """
    applying = rules.rules_of(method, config)
    there = store.present()
    if not there:
        return applying
    measured = store.load_task_manifest(there[0]).metrics
    return tuple(rule for rule in applying if rule.key in measured)


def step_config_of(config: Config, method: Method, on_device: bool) -> StepConfig:
    """Return what a training step needs of the settings.

    The learning rate is scaled by batch size / 256. `on_device`: whether images are augmented in
    the step; those of files are before it.
    """
    return StepConfig(
        method=method,
        learning_rate=config.learning_rate * config.batch_size / 256,
        clip_norm=config.clip_norm,
        key_loss_weight=config.key_loss_weight,
        augment=_augment(config, method) if on_device else None,
        cache_queries=config.cache_queries,
        optimizer=config.optimizer,
        scheduled=_is_scheduled(config),
    )


def _is_scheduled(config: Config) -> bool:
    """Whether steps take their rates from the task: all but Adam with one learning rate do."""
    first = config.first_learning_rate > 0 or config.first_weight_decay >= 0
    changes = config.schedule != "constant" or config.weight_decay > 0 or first
    return config.optimizer != "adam" or changes


def _rates(config: Config, task: int, steps_per_epoch: int) -> train_step.Rates:
    learning_rate, decay = config.learning_rate, config.weight_decay
    if task == 0:
        learning_rate = config.first_learning_rate or learning_rate
        decay = config.first_weight_decay if config.first_weight_decay >= 0 else decay
    return train_step.Rates(
        np.float32(learning_rate * config.batch_size / 256),
        np.float32(decay),
        np.int32(config.epochs if config.schedule == "cosine" else 0),
        np.int32(steps_per_epoch),
    )


def _augment(config: Config, method: Method) -> Augment:
    size = method.architecture.image_size
    return Augment(size, config.crop_scale, config.crop_ratio, config.flip)


def _load_backbone(config: Config, stop: threading.Event) -> backbones.Backbone | None:
    """Return the backbone; None where a signal came during a download."""
    try:
        return backbones.load(
            config.backbone, config.backbone_path, config.image_size, config.dtype, stop
        )
    except Stopped:
        return None


def _load_images(config: Config, stop: threading.Event) -> sources.Dataset | None:
    """Return the data set; None where a signal came during a download."""
    try:
        return sources.load(config.dataset, config.data_dir, stop)
    except Stopped:
        return None


def _hold_out(config: Config, dataset: sources.Dataset, scenario: Scenario) -> sources.Dataset:
    """Return the data set with a validation part. Raises UserError where a task has none of it."""
    dataset = dataset.with_validation(config.validation, config.seed)
    for task in range(scenario.num_tasks):
        if not len(scenario.members(dataset.validation.labels, task)):
            raise UserError(
                f"validation: a share of {config.validation} holds no training image of task "
                f"{task + 1} out; take a larger share, or more images a class"
            )
    return dataset


def prepare(
    config: Config,
    store: Store,
    console: Console,
    stop: threading.Event,
    mesh: Mesh | None = None,
    dataset: sources.Dataset | None = None,
    hooks: Hooks | None = None,
    start: Start | None = None,
    before: Callable[[RunRecord], None] = lambda record: None,
) -> Run:
    """Find weights and data, check that everything fits, and make `store` this run's.

    `mesh` defaults to all devices, `dataset` to what `config` names. `before` is `Store.claim`'s.
    Raises UserError for anything that does not fit, before training, and Preempted after a signal.
    """
    settings_lib.check(config)
    config = settings_lib.to_keep(config)
    used = settings_lib.used_settings(config)
    store.compare_settings(used, DEFAULTS)  # before anything is downloaded
    by_host = ("data_dir", "backbone_path", "scenario_file")  # those may differ by host
    distributed.check_equal(dataclasses.asdict(config) | dict.fromkeys(by_host))
    if dataset is None:  # what is wrong with it at first sight, before a download
        distributed.run_on_all(lambda: sources.check(config.dataset, config.data_dir))
    backbone = distributed.run_on_all(lambda: _load_backbone(config, stop))
    if distributed.all_max(stop.is_set())[0]:
        raise Preempted("Stopped while reading the backbone")
    for name in backbone.left_out:
        console.print(f"backbone: {name} has no place in this backbone; left out", markup=False)
    for note in backbone.notes:
        console.print(f"backbone: {note}", markup=False)
    # Its layers, before any data is read.
    registry.make_method(config, backbone.architecture, ("",))
    dataset = dataset or distributed.run_on_all(lambda: _load_images(config, stop))
    if distributed.all_max(stop.is_set())[0]:
        raise Preempted("Stopped while reading images")
    for note in dataset.notes:
        console.print(f"images: {note}", markup=False)
    dataset = dataset.first(config.train_images_per_class, config.test_images_per_class)
    scenario = distributed.run_on_all(lambda: scenarios.make(config, dataset.class_names))
    fingerprint = dataset.fingerprint
    for split in (dataset.train, dataset.test):
        scenario.check(split.labels)
    if config.validation:
        dataset = _hold_out(config, dataset, scenario)
    largest = max(map(len, scenario.classes_by_task))
    names = dataset.class_names
    method = registry.make_method(config, backbone.architecture, names, largest)
    for note in method.host.notes(names):
        console.print(note, markup=False)
    if method.strategy:
        method.strategy.check_classes(scenario.num_learned)
    record = RunRecord(
        settings=used,
        backbone_sha256=backbone.fingerprint,
        dataset_sha256=fingerprint,
        tasks=None if scenario.is_default else scenario.classes_by_task,
    )
    distributed.check_equal(record.to_json())
    if aside := store.claim(record, DEFAULTS, before):
        console.print(f"A training state of no known run is now in {aside}", markup=False)
    mesh = mesh or distributed.data_mesh()
    sizes = sorted({len(classes) for classes in scenario.classes_by_task})
    of_classes = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    facts = (
        f"{used['method']} on {config.dataset}, {scenario.num_tasks} tasks of {of_classes} classes",
        f"{config.backbone} at {backbone.architecture.image_size} pixels",
        f"{mesh.size} {jax.devices()[0].device_kind} device(s)",
        str(store.root),
    )
    line = "; ".join(facts)
    # Where it does not fit, a line each: none is broken in its middle.
    console.print(line if len(line) <= console.width else "\n".join(facts), markup=False)
    in_memory = isinstance(dataset.train, sources.InMemoryImages)
    return Run(
        config=config,
        scenario=scenario,
        dataset=dataset,
        backbone=backbone,
        params=distributed.to_global(backbone.params, distributed.replicated(mesh)),
        method=method,
        rules=_rules(config, method, store),
        step_config=step_config_of(config, method, on_device=in_memory),
        mesh=mesh,
        store=store,
        console=console,
        stop=stop,
        hooks=hooks or Hooks(),
        start=start or Start(),
    )
