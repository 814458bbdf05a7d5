"""The one outer loop: train, evaluate, store and report, task after task, resumable anywhere."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from soft_jax import distributed, pytrees
from soft_jax.config import DEFAULTS, SIZES, Config
from soft_jax.data import sources
from soft_jax.errors import UserError
from soft_jax.evaluation import evaluate, predictions, report
from soft_jax.evaluation.metrics import TEST, VALIDATION
from soft_jax.experiment import imported
from soft_jax.experiment import manifest as manifests_lib
from soft_jax.experiment import trackers as trackers_lib
from soft_jax.experiment.bank import TaskBank
from soft_jax.experiment.display import Display
from soft_jax.experiment.run import Run, Start, prepare
from soft_jax.experiment.stopping import Preempted, stop_at_signals
from soft_jax.hooks import Hooks
from soft_jax.inference import engine, rules
from soft_jax.methods import regularization, rehearsal
from soft_jax.methods.method import Adapter, Method, Shared, begin
from soft_jax.store.folder import Store
from soft_jax.store.records import RunRecord, TaskManifest
from soft_jax.training import loop as training_loop
from soft_jax.training.train_step import TrainState


def run(
    config: Config,
    workdir: str | Path,
    console: Console | None = None,
    dataset: sources.Dataset | None = None,
    hooks: Hooks | None = None,
    figures: bool = True,
    start: Start | None = None,
    display: Display | None = None,
) -> list[TaskManifest]:
    """Train and evaluate every task that `workdir` does not hold yet.

    Args:
        config: the settings.
        workdir: the run's folder, made if it is not there.
        console: where progress is printed; None: the terminal.
        dataset: `config`'s as `sources.load` gives it, for a caller who has it; None: it is loaded.
        hooks: functions to call on the way.
        figures: whether `console` shows what the run reached on test images: a line after each task
            and the report at the end. The report's files have it in any case.
        start: what the tasks begin with, where they are not the first; nothing if not given.
        display: where it is shown what the run does now; None: on `console`.

    Returns:
        The manifests of all tasks.

    Raises:
        UserError: for anything that the user has to mend.
        Preempted: after SIGTERM or SIGINT; the state is saved.
    """
    console = console or Console(quiet=not distributed.is_primary())
    trackers_lib.check(config)
    with (
        stop_at_signals() as stop,
        closing(Store(workdir)) as store,
        display or Display(console) as shown,
        _memory_named(config),
        ExitStack() as stack,
    ):
        trackers = trackers_lib.Trackers()

        def track(record: RunRecord) -> None:
            nonlocal trackers
            tell = functools.partial(console.print, markup=False, highlight=False)
            opened = trackers_lib.opened(config, store.root, record, tell)
            trackers = stack.enter_context(opened)

        shown.begin("loading the backbone and the images")
        prepared = prepare(config, store, console, stop, None, dataset, hooks, start, track)
        run = dataclasses.replace(prepared, log=trackers.curves, display=shown)
        manifests = _run_tasks(run, trackers, figures)
    if figures and not run.start.alone:
        report.show(console, config.benchmark, manifests)
        console.print(f"Report: {store.root / 'report.md'}", markup=False)
    return manifests


def _run_tasks(run: Run, trackers: trackers_lib.Trackers, figures: bool) -> list[TaskManifest]:
    scenario, bank = run.scenario, TaskBank(run)
    run.display.begin("taking in the finished tasks")
    shared = run.initial_shared()
    memory = run.initial_memory(shared)
    manifests, shared, memory = _restore(run, bank, shared, memory)
    if manifests:
        run.console.print(
            f"{len(manifests)} of {scenario.num_tasks} tasks are finished in {run.store.root}",
            markup=False,
        )
    finished = len(manifests)
    table = report.StageTable([rule.key for rule in run.evaluated], run.console.width)
    with _report(run, manifests, trackers) as add:
        for task in range(finished, scenario.num_tasks):
            manifest, shared, memory = _learn_task(run, bank, task, shared, memory)
            manifests.append(manifest)
            add(manifest)
            if figures:
                if task == finished:
                    run.console.print(f"\n{table.heading}", highlight=False)
                run.console.print(table.line(manifest), markup=False, highlight=False)
        run.display.begin("writing the report")
    return manifests


@contextmanager
def _report(
    run: Run, manifests: list[TaskManifest], trackers: trackers_lib.Trackers
) -> Iterator[Callable[[TaskManifest], None]]:
    """Keep report and trackers up to date, in the first process: yields what takes a new task."""
    if not distributed.is_primary() or run.start.alone:
        yield lambda manifest: None
        return
    settings = dataclasses.asdict(run.config)
    files = report.Report(
        run.store.root, settings, run.config.benchmark, manifests, trackers.results
    )
    with files:
        yield files.add


def _restore(
    run: Run, bank: TaskBank, shared: Shared, memory: pytrees.Tree
) -> tuple[list[TaskManifest], Shared, pytrees.Tree]:
    """Take in the finished tasks: their manifests, and the shared part and memory of the last.

    All processes see the same: `Store.claim` has compared what is there.
    """
    finished = run.store.finished()
    manifests = []
    for task in range(finished):
        manifest = run.store.load_task_manifest(task)
        statistics = manifest.stored("statistics", run.statistics_shapes(task))
        templates = {"adapter": bank.row_template, "statistics": statistics}
        if task == finished - 1:
            templates |= {"shared": shared, "memory": memory}
        whole = distributed.replicated(run.mesh)
        items = run.store.load_items(manifest, templates, whole, part=True)
        bank.restore(task, items["adapter"], items["statistics"])
        if task == finished - 1:
            shared, memory = items["shared"], items["memory"]
        manifests.append(manifest)
    return manifests, shared, memory


def _learn_task(
    run: Run, bank: TaskBank, task: int, shared: Shared, memory: pytrees.Tree
) -> tuple[TaskManifest, Shared, pytrees.Tree]:
    """Train, evaluate and store task `task`: its manifest, the shared part and the memory."""
    _begin(run, task, "compiling")
    adapter = begin(run.initial_adapter(task), bank.prompt(task - 1) if task else None)
    recalled, shared = run.method.before_task(memory, shared)
    if run.start.trained:
        trained, seconds = imported.finish(run, adapter, shared), {"train": 0.0}
    else:
        state, seconds = train_task(run, task, adapter, shared, recalled)
        trained = state.trainable
    start = time.monotonic()
    _begin(run, task, "statistics of its training images")
    memory, shared = task_memory(run, task, memory, trained)
    adapter, packed = _as_stored(run, task, trained["adapter"])
    if run.method.host.reads_text:
        class_mask = run.scenario.class_mask(task)
        class_mask = distributed.to_global(class_mask, distributed.replicated(run.mesh))
        shared = _with_own_classes(run.method, run.params, adapter, shared, class_mask)
    items = {
        "adapter": packed,
        "shared": shared,
        "statistics": task_statistics(run, task),
        "memory": memory,
    }
    seconds["statistics"] = time.monotonic() - start
    bank.add(task, adapter, items["statistics"])
    start = time.monotonic()
    model = bank.model(shared)
    stages = evaluate_parts(run, model)
    seconds["evaluate"] = time.monotonic() - start
    _begin(run, task, "saving")
    manifest = manifests_lib.make(run, task, adapter, items, stages, seconds)
    if distributed.is_primary() and not run.start.alone:
        own, _ = rules.choose(run.rules, manifest.validation)
        predictions.write(run.store.root, stages[TEST].predictions, own.key)
    run.store.save_task(task, items, manifest)
    bank.stored(task)
    return manifest, shared, memory


def _as_stored(run: Run, task: int, adapter: Adapter) -> tuple[Adapter, Adapter]:
    """Return task `task`'s adapter as it is when stored and read again, and as it is stored."""
    whole = distributed.replicated(run.mesh)
    key = distributed.to_global(run.adapter_key(task), whole)
    packed = distributed.to_global(_pack(run.method, adapter, key), whole)
    return run.method.unpack(packed, run.params), packed


_pack = jax.jit(Method.pack, static_argnums=0)
_with_own_classes = jax.jit(Method.with_own_classes, static_argnums=0)


def task_statistics(run: Run, task: int) -> pytrees.Tree:
    """Return what the rules keep of q(x) over a task's training images, each image once.

    They are prepared as test images are. Empty where no rule keeps anything.
    """
    statistics: pytrees.Tree = {}
    labels = run.dataset.train.labels[run.members(task)]
    for rule in rules.keepers(run.rules).values():
        query, classes = run.train_query(task), run.scenario.classes_of(task)
        statistics |= rule.statistics(query, labels, classes)
    return distributed.to_global(statistics, distributed.replicated(run.mesh))


def task_memory(
    run: Run, task: int, memory: pytrees.Tree, trainable: dict[str, pytrees.Tree]
) -> tuple[pytrees.Tree, Shared]:
    """Return the method's memory after task `task`, and the shared part to be stored.

    Rehearsal looks at the training images that it chooses exemplars from, the other strategies at
    some drawn at random, prepared as test images are.
    """
    strategy, shared, method = run.method.strategy, trainable["shared"], run.method
    if not strategy:
        return {}, shared
    whole = distributed.replicated(run.mesh)
    if method.rehearsal:
        reviewed = _reviewed(run, task, memory, shared)
        memory, shared = method.rehearsal.update_buffer(memory, shared, reviewed)
    else:
        split, chosen = run.dataset.train, run.shuffled(task)[: regularization.IMAGES]
        images = split.prepared(chosen, method.architecture.image_size)
        batch = {
            "images": images.astype(np.float32) / 255,
            "labels": split.labels[chosen],
            "class_mask": run.scenario.class_mask(task),
        }
        batch = distributed.to_global(batch, whole)
        memory = strategy.update(memory, method, trainable, run.params, batch)
    return distributed.to_global((memory, shared), whole)


def _reviewed(run: Run, task: int, memory: pytrees.Tree, shared: Shared) -> rehearsal.Reviewed:
    """Return what the network after a task makes of exemplars, and of possible new ones."""
    labels, shuffled = run.dataset.train.labels, run.shuffled(task)
    seen = run.scenario.seen_mask(task)
    candidates = run.method.rehearsal.candidate_indices(shuffled, labels[shuffled], seen)
    rows = np.concatenate([rehearsal.all_rows_of(memory), candidates])
    features = run.features(rows, shared["weights"]).astype(np.float32)
    head = {"head": jax.tree.map(np.asarray, shared["head"])}
    logits = np.asarray(run.method.head(shared["weights"], head, features))
    mask = run.scenario.class_mask(task)
    return rehearsal.Reviewed(rows, labels[rows], features, logits, mask, seen)


def train_task(
    run: Run, task: int, adapter: Adapter, shared: Shared, memory: pytrees.Tree
) -> tuple[TrainState, dict[str, float]]:
    """Train task `task` as `training.loop.train_task`, with the run's store, log and display.

    `memory` is what the method recalls of older tasks.
    """

    def show(step: int, steps: int) -> None:
        _begin(run, task, "training", steps)
        run.display.update(step)

    config = training_loop.LoopConfig(
        step_config=run.step_config,
        mesh=run.mesh,
        params=run.params,
        checkpoint_every=run.config.checkpoint_every,
        load=lambda state: _continued(run, task, state),
        save=lambda step, state, seconds: run.store.save_training(task, step, state, seconds),
        log=lambda step, values: run.log(task + 1, step, values),
        show=show,
        stop=run.stop,
        stopped=Preempted,
        hooks=run.hooks,
    )
    return training_loop.train_task(config, task, adapter, shared, run.task_data(task, memory))


def _continued(run: Run, task: int, state: TrainState) -> tuple[TrainState, float]:
    """Return the kept state of this task and its seconds, or `state`.

    One that can't be used, in any of the processes, costs its steps, not the run: they start the
    task again together. So do processes that see different steps.
    """
    kept, problem = None, None
    try:
        kept = run.store.load_training(task, state, distributed.replicated(run.mesh))
    except UserError as error:
        problem = error
    step = int(kept[0].step) if kept else 0
    (agreed,) = distributed.from_primary(step)
    if not problem and step != agreed:
        problem = UserError(f"It is of step {step} here and {agreed} in the first process.")
    if distributed.all_max(problem is not None)[0]:
        aside = run.store.set_aside_training()
        run.console.print(
            f"The kept training state can't be used and is now in {aside}; task {task + 1} starts "
            f"again. {problem or 'Another process could not read it.'}",
            markup=False,
        )
        return state, 0.0
    if kept is None:
        return state, 0.0
    run.console.print(f"Task {task + 1} continues after step {step}")
    return kept


def evaluate_parts(run: Run, model: engine.Model) -> dict[str, evaluate.Stage]:
    """Evaluate the tasks seen on each part of the data set.

    First on images held out for validation, if any: they give the temperatures of the others.
    """
    if VALIDATION not in run.parts:
        return {TEST: evaluate_stage(run, model, TEST)}
    held_out = evaluate_stage(run, model, VALIDATION)
    tested = evaluate_stage(run, model, TEST, held_out.fitted_temperatures())
    return {TEST: tested, VALIDATION: held_out}


def evaluate_stage(
    run: Run, model: engine.Model, part: str, temperatures: Mapping[str, float] | None = None
) -> evaluate.Stage:
    """Evaluate every rule on all tasks seen, on the images of a `part` of the data set.

    `temperatures` by protocol are 1 if not given. Raises Preempted after a signal.
    """
    fits = part == VALIDATION
    stage = evaluate.Stage(model, run.evaluated, run.settings, temperatures or {}, for_fit=fits)
    seen, done = len(model.tasks), 0
    sizes = [len(run.index(part, task)) for task in model.tasks]
    last = evaluate.last_in_batch(model.tasks, sizes, run.settings.batch_size)
    # Gradient ID begins with the second task. A run that continues compiles at a later one.
    first = VALIDATION if VALIDATION in run.parts else TEST
    compiling = "compiling and " if seen <= 2 and part == first else ""
    _begin(run, model.tasks[-1], f"{compiling}evaluating {part} images", sum(sizes))
    for task in model.tasks:
        run.hooks.before_evaluation(task)
        if distributed.all_max(run.stop.is_set())[0]:
            raise Preempted(f"Stopped while evaluating after task {seen}")
        split = run.part(part, task)
        query, index = run.query(part, task), run.index(part, task)
        files = run.files(part, index)
        in_batch = last[done : done + len(index)]
        stage.add(task, split.images, split.labels, query, index, files, in_batch)
        done += len(index)
        run.display.update(done)
    return stage


@contextmanager
def _memory_named(config: Config) -> Iterator[None]:
    """Say what to do about too little memory, in the place of XLA's or NumPy's account of it.

    Which setting took it is not known: those of `config` above their defaults are named.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        on_host = isinstance(error, MemoryError)
        if not on_host and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        where = "this machine has" if on_host else "the devices have"
        first, *_ = str(error).splitlines() or ["no more"]
        large = [name for name in SIZES if getattr(config, name) > DEFAULTS[name]]
        raise UserError(
            f"memory: {where} too little ({first}). Take a lower eval_batch_size or "
            "weights_cache_mb, which may change in a run; or in another workdir dtype=bfloat16 or "
            f"a lower {', '.join(large) or 'batch_size'}. Finished tasks are as they were"
        ) from error


def _begin(run: Run, task: int, what: str, total: int | None = None) -> None:
    run.display.begin(f"task {task + 1} of {run.scenario.num_tasks}: {what}", total)
