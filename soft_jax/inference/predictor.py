"""A trained run as a function of images: each is given to its task by itself, and classified by
that task's network.
"""

import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from soft_jax import distributed, paths, pytrees
from soft_jax.buckets import BucketPath
from soft_jax.config import Config, from_settings, unknown_value
from soft_jax.data import images as images_lib
from soft_jax.errors import UserError
from soft_jax.inference import assembly, engine, rules, zero_shot
from soft_jax.inference.rules import ImageBatch, TaskGiven, TaskIdentityRule
from soft_jax.methods import registry
from soft_jax.methods.method import Adapter, Method
from soft_jax.models import backbones
from soft_jax.store import library
from soft_jax.store.folder import Reader
from soft_jax.store.records import RunRecord, TaskManifest

_Made = TypeVar("_Made")


class Prediction(NamedTuple):
    """What `Predictor.predict` made of N images.

    `classes` int `[N]`; `tasks` int `[N]`, from 0, that these classes are of; `networks` int `[N]`,
    the tasks whose networks answered, which need not be the same. `probabilities` float32
    `[N, classes of the scenario]` sum to 1 over the classes that could win and are 0 elsewhere;
    `inference.rules` says what they are under each rule.
    """

    classes: np.ndarray
    tasks: np.ndarray
    networks: np.ndarray
    probabilities: np.ndarray


class Predictor:
    """Classes of images whose tasks nobody names. Made by `load`, or by `zero_shot`.

    A prediction does not depend on what else is asked for in the same call. Several threads may
    call the same predictor. `rule` is how images find their tasks, `chosen_because` a few words on
    why it is this one, `temperatures` are those of the run by protocol.
    """

    def __init__(
        self,
        model: engine.Model,
        rule: TaskIdentityRule,
        class_names: Sequence[str],
        batching: engine.Batching,
        temperatures: Mapping[str, float] | None = None,
        chosen_because: str = "it was asked for",
        task_names: Sequence[str | int] | None = None,
    ):
        self.model, self.rule = model, rule
        self.class_names, self.batching = tuple(class_names), batching
        self.temperatures, self.chosen_because = temperatures or {}, chosen_because
        # What people call each task: a name in a library, else its number, from 1.
        self.task_names = tuple(task_names or range(1, max(model.tasks) + 2))
        self._reload: Callable[[Predictor], Predictor] | None = None
        self._note_use: Callable[[np.ndarray], None] | None = None  # takes the tasks that answered

    @classmethod
    def load(
        cls,
        workdir: str | PathLike,
        tasks: Sequence[int] | Sequence[str] | None = None,
        task_id: str | None = None,
        *,
        backbone_path: str | PathLike = "",
        cache_bytes: int = 2**30,
        batch_size: int = 256,
        devices: Sequence[jax.Device] | None = None,
    ) -> "Predictor":
        """Load a run as its last finished task left it, which may go on training meanwhile; or the
        active tasks of a library.

        Args:
            workdir: the folder that the run was trained in, which may be in a bucket (gs://...), or
                that of a library.
            tasks: those to choose from, counted from 0 as their folders are, or by their names in a
                library; all that are finished, or active, when None.
            task_id: how an image finds its task: "prompt" (nearest key), "gradient" (∂H/∂α, needs
                weights of each task's own), "prototype" (statistics of the frozen features),
                "none" (where tasks have nothing of their own), on CLIP "k_means" (centres of the
                frozen features) or "zero_shot" (class names alone), or "oracle" (`predict` is
                told).
                None: the one that was best on the images that the run held out for validation;
                without those, "prototype" where the run keeps its statistics, else the first of
                the others that means something.
            backbone_path: the backbone's file, where it is no longer where the run found it.
            cache_bytes: of the devices' memory for tasks' θ ⊙ m, 4 bytes a masked weight and task;
                others are read from the workdir when an image is theirs. Gradient ID takes up to
                half as much again while it multiplies.
            batch_size: images of the largest forward pass, over all devices.
            devices: those to run on; all when None.

        Raises:
            UserError: naming the folder, task or file that is missing, damaged, or from another
                run; a rule that the method has no use for; or an argument that is not as above.
        """
        options = rules.options()
        if task_id is not None and not (isinstance(task_id, str) and task_id in options):
            raise UserError(unknown_value("task_id", task_id, options))
        if type(cache_bytes) is not int or cache_bytes < 0:
            raise UserError(f"cache_bytes: {cache_bytes!r}, expected an int of at least 0")
        _check_given(workdir, backbone_path, batch_size, devices)
        root = paths.place(workdir, "workdir")
        if isinstance(root, BucketPath):
            _refuse_library(root)
        elif library.holds_library(root):
            return _library_predictor(
                root,
                names=tasks,
                task_id=task_id,
                backbone_path=backbone_path,
                cache_bytes=cache_bytes,
                batch_size=batch_size,
                devices=devices,
            )
        run = read_run(workdir, tasks, backbone_path)
        batching = engine.Batching(distributed.data_mesh(devices), batch_size)
        return of_run(run, task_id, cache_bytes, batching)

    @classmethod
    def zero_shot(
        cls,
        workdir: str | PathLike,
        class_names: Sequence[str],
        *,
        backbone_path: str | PathLike = "",
        batch_size: int = 256,
        devices: Sequence[jax.Device] | None = None,
    ) -> "Predictor":
        """Load the frozen backbone of a run to answer by any class names, and by nothing trained.

        The classes are one task's, and the network that answers is no task's. Arguments and errors
        are those of `load`; UserError also where the backbone reads no text, or for no names or one
        that comes twice.
        """
        listed = isinstance(class_names, Iterable) and not isinstance(class_names, str)
        names = tuple(class_names) if listed else ()
        if not listed or not all(isinstance(name, str) for name in names):
            raise UserError(
                f'class_names: {class_names!r}, expected a list of names such as ["cat", "dog"]'
            )
        _check_given(workdir, backbone_path, batch_size, devices)
        if len(set(names)) < max(len(names), 1) or not all(map(str.strip, names)):
            raise UserError(f"class names: {', '.join(names)!r}, expected different names")
        reader = Reader(workdir)
        record, there = reader.read_record(), reader.present()
        if not there:
            raise UserError(f"workdir: {reader.root} has no finished task yet")
        config = from_settings(record.settings)
        backbone = _backbone(record, reader.load_task_manifest(there[-1]), backbone_path)
        if not backbone.architecture.reads_text:
            raise UserError(
                f"backbone: {config.backbone} reads no text, so it knows no class by its name; "
                "take a run on CLIP"
            )
        method = registry.make_method(config, backbone.architecture, names, len(names))
        batching = engine.Batching(distributed.data_mesh(devices), batch_size)
        params = jax.device_put(backbone.params, distributed.replicated(batching.mesh))
        model = engine.Model(
            method=method,
            backbone=params,
            shared={},
            rows={},
            weights=engine.TaskWeights(method, params, lambda task: {}, 0),
            tasks=(0,),
            task_of_class=np.zeros(len(names), int),
            zero_shot=zero_shot.text_features(method.architecture, params, names),
        )
        (rule,) = rules.ZeroShot.of(method, config)
        return cls(model, rule, names, batching)

    def refresh(self) -> None:
        """Take in what the library holds by now, for the calls that come; nothing is compiled anew.

        More tasks or classes than the model had room for (8, 16, ... tasks; 32, 64, ... classes)
        are compiled once, and on a backbone that reads text (CLIP) any new class. Until this is
        called, and in a call that has begun, a predictor answers by the versions that it opened.
        Of those it has weights in memory as `cache_bytes` allows, and reads others when an image is
        theirs, also again: where such a version was archived or removed meanwhile, `predict` raises
        UserError, which names it. A task's number is its place in `task_names`, and may be another
        afterwards; those of classes stay. Raises UserError as `load`, and where this predictor is
        not a library's; it is then as it was.
        """
        if self._reload is None:
            raise UserError("refresh: only the predictor of a library has something to take in")
        fresh = self._reload(self)
        # In one step: other threads see the old model or the new one.
        self.__dict__ = fresh.__dict__

    def predict(self, images: Any, task: int | Sequence[int] | None = None) -> Prediction:
        """Identify and classify images.

        Args:
            images: `[N, H, W, 3]`, or a sequence of `[H, W, 3]` arrays and file paths of any sizes;
                arrays are uint8, or float in [0, 1], which is rounded to 256 levels. They are
                prepared as evaluation prepares its test images.
            task: the task of all images, or of each; its classes alone can win then. Needed with
                task_id="oracle".

        Raises:
            UserError: naming the image or the task and what is wrong with it. No image is then
                answered.
        """
        parts = []
        for _, prediction, failed in self.predict_chunks(images, task):
            if failed:
                raise next(iter(failed.values()))
            parts.append(prediction)
        return Prediction(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def predict_chunks(
        self, images: Any, task: int | Sequence[int] | None = None
    ) -> Iterator[tuple[list[int], Prediction, dict[int, UserError]]]:
        """Answer `predict` a chunk at a time, in order, for more files than fit in memory.

        An image that can't be used fails alone.

        Yields:
            The indices of a chunk's usable images, the prediction for those, and by index the
            errors of the others.
        """
        now = copy.copy(self)  # as it is now, whatever `refresh` brings meanwhile
        images = images_lib.as_list(images)
        given = now._given(task, len(images))
        for prepared in now._prepared(images):
            failed = {
                index: error for index, error in prepared.items() if isinstance(error, UserError)
            }
            usable = [index for index in prepared if index not in failed]
            if usable:
                stacked = np.stack([prepared[index] for index in usable])
                yield (
                    usable,
                    now.predict_prepared(stacked, given if given is None else given[usable]),
                    failed,
                )
            else:
                yield (
                    [],
                    Prediction(
                        *(np.zeros(0, int),) * 3,
                        np.zeros((0, now.model.method.num_classes), np.float32),
                    ),
                    failed,
                )

    def warm_up(self) -> None:
        """Compile everything now, for any number and mix of images.

        Without it, each size is compiled when it is first met.
        """
        model, batching, rule = self.model, self.batching, self.rule
        size = model.method.architecture.image_size
        blank = np.zeros((batching.chunk, size, size, 3), np.uint8)
        parts: dict[int, jax.Array] = {}
        for count in batching.rooms:
            if rule.needs_query:  # for a task that is given
                engine.encode(model, blank[:count], batching, queried=False, prepared=True)
            tokens, query = engine.encode(
                model, blank[:count], batching, rule.needs_query, prepared=True
            )
            for part in parts.values():
                engine.join_tokens([part, part], [0, 0], count, batching)
            parts |= {count: tokens.array} if count in batching.sizes else {}
            for rows in parts:
                engine.logits(model, tokens, engine.alone(np.full(rows, model.tasks[0])), batching)
                if rule.needs_query:
                    batch = ImageBatch(model, tokens, query[:rows], batching)
                    tasks = rule.identify(batch)
                    rule.scores(batch, np.zeros((rows, model.method.num_classes)), tasks)

    def _prepared(self, images: Sequence[Any]) -> Iterator[dict[int, np.ndarray | UserError]]:
        """Yield chunks of images by index, reading the next chunk while one is computed.

        An image is uint8 `[size, size, 3]`, or the error that says what is wrong with it.
        """
        chunk, size = self.batching.chunk, self.model.method.architecture.image_size

        def prepare(index: int) -> np.ndarray | UserError:
            try:
                return images_lib.prepare(images[index], index, size)
            except UserError as error:
                return error

        with ThreadPoolExecutor() as pool:

            def submit(start: int) -> dict[int, Future]:
                return {
                    index: pool.submit(prepare, index)
                    for index in range(start, min(start + chunk, len(images)))
                }

            following = submit(0)
            for start in range(0, len(images), chunk):
                current, following = following, submit(start + chunk)
                yield {index: future.result() for index, future in current.items()}

    def predict_prepared(self, images: np.ndarray, given: np.ndarray | None = None) -> Prediction:
        """Answer `predict` for at most one chunk of images as the model takes them.

        `images` is uint8 `[N, size, size, 3]`, `given` int `[N]` or None.
        """
        now = self.__dict__  # which `refresh` replaces as a whole
        model = now["model"]
        rule = now["rule"] if given is None else TaskGiven()
        if rule.needs_network:
            tokens, query = engine.encode(
                model, images, self.batching, queried=rule.needs_query, prepared=True
            )
        else:
            tokens, query = (
                None,
                engine.queries(model.method, model.backbone, images, self.batching, prepared=True),
            )
        query = np.zeros((len(images), 0), np.float32) if query is None else query
        batch = ImageBatch(model, tokens, query, self.batching, given)
        tasks = rule.identify(batch)
        logits = None
        if rule.needs_network:
            logits = engine.logits(model, tokens, engine.alone(tasks), self.batching)
        scores = rule.scores(batch, logits, tasks)
        probabilities = rules.probabilities(
            rule.log_probabilities(batch, scores, tasks), self.temperatures.get(rule.key, 1.0)
        )
        classes, networks = scores.argmax(axis=1), rule.final_tasks(batch, scores, tasks)
        if now["_note_use"]:
            now["_note_use"](networks)
        return Prediction(
            classes, model.task_of_class[classes], networks, probabilities.astype(np.float32)
        )

    def _given(self, task: int | Sequence[int] | None, count: int) -> np.ndarray | None:
        if task is None:
            if isinstance(self.rule, TaskGiven):
                raise UserError(
                    f"task: this predictor was loaded with task_id={self.rule.option!r}; tell "
                    "predict the task of each image"
                )
            return None
        try:
            given = np.asarray(task)
        except ValueError as error:
            raise UserError(
                f"task: {task!r}, expected one int, or one for each of the {count} images"
            ) from error
        if (
            given.ndim > 1
            or given.dtype.kind not in "iu"
            or (given.ndim == 1 and len(given) != count)
        ):
            raise UserError(
                f"task: {given.dtype} of shape {given.shape}, expected one int, or one for each of "
                f"the {count} images"
            )
        if unknown := sorted(set(given.reshape(-1).tolist()) - set(self.model.tasks)):
            raise UserError(
                f"task: {unknown[0]} is not loaded; loaded are "
                f"{', '.join(map(str, self.model.tasks))}"
            )
        return np.broadcast_to(given.astype(int), count)


def _check_given(workdir: Any, backbone_path: Any, batch_size: Any, devices: Any) -> None:
    """Raise UserError naming an argument that is not of its type, or that nothing can run on."""
    for name, path in (("workdir", workdir), ("backbone_path", backbone_path or "")):
        if not isinstance(path, str | PathLike):
            raise UserError(f"{name}: {path!r}, expected a path, a str or pathlib.Path")
    if type(batch_size) is not int or batch_size < 1:
        raise UserError(f"batch_size: {batch_size!r}, expected an int of at least 1")
    if devices is not None and not (
        isinstance(devices, Sequence)
        and all(isinstance(device, jax.Device) for device in devices)
        and 0 < len(devices) == len(set(devices))
    ):
        raise UserError(
            f"devices: {devices!r}, expected a list of different devices such as "
            "jax.devices()[:1]; leave it out for all"
        )


def _refuse_library(root: BucketPath) -> None:
    if (root / library.STATE_FILE).exists():
        raise UserError(
            f"workdir: {root} is a library, which can't be read from a bucket; copy it to a disk, "
            "and give that folder"
        )


def _library_predictor(
    root: Path,
    before: Predictor | None = None,
    *,
    names: Sequence[str] | None,
    task_id: str | None,
    backbone_path: str | PathLike,
    cache_bytes: int,
    batch_size: int,
    devices: Sequence[jax.Device] | None,
) -> Predictor:
    """Load the predictor of a library's active tasks, or of those in `names`.

    Of `before`, a predictor of the same library, the backbone on the devices is taken over.
    """
    reader = library.LibraryReader(root)

    def of_state(state: library.LibraryState) -> Predictor:
        versions = active_versions(reader, state, names)
        config = from_settings(state.config)
        backbone = assembly.load_backbone(config, state.backbone_sha256, backbone_path)
        if before:
            batching, params = before.batching, before.model.backbone
        else:
            batching, params = engine.Batching(distributed.data_mesh(devices), batch_size), None
        predictor = of_versions(
            reader, state, versions, backbone, task_id, cache_bytes, batching, params
        )
        if names is not None:
            reader.note_use(list(versions.values()))
        predictor._note_use = _noting(reader, list(versions.values()))
        return predictor

    predictor = read_whole(reader, of_state)
    predictor._reload = functools.partial(
        _library_predictor,
        root,
        names=names,
        task_id=task_id,
        backbone_path=backbone_path,
        cache_bytes=cache_bytes,
        batch_size=batch_size,
        devices=devices,
    )
    return predictor


def read_whole(
    reader: library.LibraryReader, make: Callable[[library.LibraryState], _Made]
) -> _Made:
    """Return what `make` reads of a library, by its state; of the next where it was changed.

    A version that is archived or removed meanwhile can't be read any more. Raises UserError as
    `make` for a library that stayed as it was.
    """
    while True:
        state = reader.read()
        try:
            return make(state)
        except UserError:
            if reader.read() == state:
                raise


def active_versions(
    reader: library.LibraryReader,
    state: library.LibraryState,
    names: Sequence[str] | None = None,
) -> Mapping[str, library.Version]:
    """Return the active versions of the tasks in `names`, of all for None.

    Raises UserError where there is none, or none of such a name.
    """
    versions = state.active
    if names is not None:
        if not isinstance(names, Iterable):
            raise UserError(f"tasks: {names!r}, expected a list of tasks' names")
        wanted = [names] if isinstance(names, str) else [str(name) for name in names]
        if unknown := [name for name in wanted if name not in versions]:
            there = ", ".join(versions) or "none"
            raise UserError(f"tasks: {unknown[0]!r} is no active task; there are {there}")
        versions = {name: version for name, version in versions.items() if name in wanted}
    if not versions:
        raise UserError(f"library: {reader.root} has no active task")
    return versions


def _noting(
    reader: library.LibraryReader, versions: Sequence[library.Version]
) -> Callable[[np.ndarray], None]:
    """Return what notes the use of versions, given by their places: of each once an hour."""
    noted: dict[int, float] = {}

    def note(tasks: np.ndarray) -> None:
        moment = time.monotonic()
        due = [t for t in np.unique(tasks).tolist() if moment - noted.get(t, -math.inf) > 3600]
        noted.update(dict.fromkeys(due, moment))
        if due:
            reader.note_use([versions[task] for task in due])

    return note


def of_versions(
    reader: library.LibraryReader,
    state: library.LibraryState,
    versions: Mapping[str, library.Version],
    backbone: backbones.Backbone,
    task_id: str | None = None,
    cache_bytes: int | None = None,
    batching: engine.Batching | None = None,
    params: pytrees.Tree | None = None,
) -> Predictor:
    """Return a predictor of `versions` of a library, at least one, by the names of their tasks.

    They need not be active. Batches and memory are as the library's settings say where they are not
    given; `params` are the backbone's on the devices, if they are there already. Raises UserError
    where a version is damaged, or the rule `task_id` means nothing for the method.
    """
    config = from_settings(state.config)
    batching, cache = _sizes(config, batching, cache_bytes)
    method = assembly.method_of(config, backbone, state, versions)
    rule, because = assembly.choose(method, config, task_id)
    model = assembly.assemble(
        reader, state, versions, config, backbone, rule, cache, batching, params
    )
    return Predictor(
        model, rule, state.classes, batching, None, because, task_names=tuple(versions)
    )


def _chosen(reader: Reader, there: Sequence[int], tasks: Sequence[int] | None) -> tuple[int, ...]:
    """Return the tasks to load, in ascending order; `there` are those that are finished."""
    if not there:
        raise UserError(f"workdir: {reader.root} has no finished task yet")
    if tasks is None:
        reader.check_complete(there)
        return tuple(there)
    if not isinstance(tasks, Iterable) or not all(
        isinstance(task, int | np.integer) and type(task) is not bool for task in tasks
    ):
        raise UserError(f"tasks: {tasks!r}, expected a list of ints such as [0, 2], counted from 0")
    chosen = tuple(sorted({int(task) for task in tasks}))
    if not chosen:
        raise UserError("tasks: none were named; leave it out for all")
    if unknown := [task for task in chosen if task not in there]:
        raise UserError(
            f"tasks: {unknown[0]} is not in {reader.tasks}; there are {', '.join(map(str, there))}"
        )
    return chosen


class Run(NamedTuple):
    """A run as it was at one look: one that goes on training adds tasks meanwhile.

    `tasks` are those to choose from, in ascending order, `latest` is the last that was finished.
    """

    reader: Reader
    record: RunRecord
    latest: TaskManifest
    tasks: tuple[int, ...]
    backbone: backbones.Backbone

    @property
    def config(self) -> Config:
        """Return the run's settings."""
        return from_settings(self.record.settings)


def read_run(
    workdir: str | PathLike,
    tasks: Sequence[int] | None = None,
    backbone_path: str | PathLike = "",
) -> Run:
    """Read what a predictor of a run is made of, but for tasks' arrays.

    Arguments and errors are those of `Predictor.load`.
    """
    reader = Reader(workdir)
    record, there = reader.read_record(), reader.present()
    chosen = _chosen(reader, there, tasks)
    latest = reader.load_task_manifest(there[-1])
    return Run(reader, record, latest, chosen, _backbone(record, latest, backbone_path))


def of_run(
    run: Run,
    task_id: str | None = None,
    cache_bytes: int | None = None,
    batching: engine.Batching | None = None,
    params: pytrees.Tree | None = None,
) -> Predictor:
    """Return a predictor of a run, with what is not given as `of_versions` has it.

    Raises UserError where a task is damaged, or the rule `task_id` means nothing for the method.
    """
    reader, record, latest, tasks, backbone = run
    batching, cache = _sizes(run.config, batching, cache_bytes)
    # The names are filled in below: a network does not depend on those of a linear classifier.
    names = [""] * latest.num_classes
    # Without a list of tasks, all have as many classes.
    largest = max(map(len, record.tasks or (latest.classes,)))
    method = registry.make_method(run.config, backbone.architecture, names, largest)
    rule, because = _rule(run.config, method, latest, task_id)
    manifests = {task: reader.load_task_manifest(task) for task in tasks}
    for manifest in manifests.values():
        for class_, name in zip(manifest.classes, manifest.class_names, strict=True):
            names[class_] = name
    method = registry.make_method(run.config, backbone.architecture, names, largest)
    if params is None:
        params = jax.device_put(backbone.params, distributed.replicated(batching.mesh))
    model = _model(reader, method, params, latest, manifests, rule, cache, batching)
    return Predictor(model, rule, names, batching, latest.temperature, because)


def _sizes(
    config: Config, batching: engine.Batching | None, cache_bytes: int | None
) -> tuple[engine.Batching, int]:
    """Return batches and memory as they are given, else as the settings say."""
    if batching is None:
        batching = engine.Batching(distributed.data_mesh(), config.eval_batch_size)
    return batching, config.weights_cache_mb * 2**20 if cache_bytes is None else cache_bytes


def _backbone(record: RunRecord, latest: TaskManifest, path: str | PathLike) -> backbones.Backbone:
    """Load the backbone that a run was trained on, from `path` or from where `latest` found it.

    Raises UserError where the file there is another.
    """
    config, found_at = from_settings(record.settings), latest.config["backbone_path"]
    return assembly.load_backbone(config, record.backbone_sha256, path or found_at, "run")


def _rule(
    config: Config, method: Method, latest: TaskManifest, task_id: str | None
) -> tuple[TaskIdentityRule, str]:
    """Return the rule of option `task_id`, or the one to take where that is None, and why it is.

    Raises UserError where this run has no use for the rule.
    """
    applying = rules.kept(rules.rules_of(method, config), latest.sha256)
    if task_id is None:
        return rules.choose(applying, latest.validation)
    by_option = {rule.option: rule for rule in applying if rule.option}
    if task_id not in by_option:
        raise UserError(
            f"task_id: {task_id!r} means nothing for this run of {config.method}; take one of "
            f"{', '.join(map(repr, by_option))}"
        )
    return by_option[task_id], "it was asked for"


def _model(
    reader: Reader,
    method: Method,
    params: pytrees.Tree,
    latest: TaskManifest,
    manifests: Mapping[int, TaskManifest],
    rule: TaskIdentityRule,
    cache_bytes: int,
    batching: engine.Batching,
) -> engine.Model:
    """Make the model of the tasks of `manifests`, with the shared part that `latest` left."""
    whole = distributed.replicated(batching.mesh)
    adapter = method.packed_shapes(params)
    template = jax.eval_shape(method.init_shared, jax.random.key(0), params)
    shared = reader.load_items(latest, {"shared": template}, whole)["shared"]
    # There is a row for each task of the run; those that are not loaded are never chosen.
    rows = {
        name: np.zeros((latest.num_tasks, *shape), np.float32)
        for name, shape in method.row_shapes.items()
    }
    task_of_class = np.full(latest.num_classes, -1)
    collector = rule.collector(latest.num_classes)
    for task, manifest in manifests.items():
        templates = {"adapter": {name: adapter[name] for name in rows if name in adapter}}
        if collector:
            shapes = rule.statistics_shapes(len(manifest.classes))
            templates["statistics"] = manifest.stored("statistics", shapes)
        items = reader.load_items(manifest, templates, whole, part=True)
        for name, array in items["adapter"].items():
            rows[name][task] = array
        task_of_class[list(manifest.classes)] = task
        if collector:
            collector.add(manifest.classes, items["statistics"])

    def load(task: int) -> Adapter:
        own = {name: tree for name, tree in adapter.items() if name not in rows}
        items, _ = reader.load_task(task, {"adapter": own}, whole, part=True)
        return method.unpack(items["adapter"], params)

    return engine.Model(
        method=method,
        backbone=params,
        shared=shared,
        rows=jax.device_put(rows, whole),
        weights=engine.TaskWeights(method, params, load, cache_bytes),
        tasks=tuple(manifests),
        task_of_class=task_of_class,
        solved=jax.device_put({rule.statistics_name: collector.solve()}, whole)
        if collector
        else {},
        zero_shot=zero_shot.text_features(method.architecture, params, method.class_names)
        if isinstance(rule, rules.ZeroShot)
        else None,
    )
