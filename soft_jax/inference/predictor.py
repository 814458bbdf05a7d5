"""A trained run as a function of images: each is given to its task by itself, and classified by
that task's network.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from typing import Any, NamedTuple

import jax
import numpy as np

from soft_jax.config import Config, from_identity
from soft_jax.data import images as images_lib
from soft_jax.data.scenarios import Scenario
from soft_jax.errors import UserError
from soft_jax.inference import engine, prototypes
from soft_jax.methods.method import Adapter, Method, method_from_config
from soft_jax.models import backbones
from soft_jax.store.folder import Reader
from soft_jax.training import train_step

TASK_IDS = ("prompt", "gradient", "prototype", "oracle")


class Prediction(NamedTuple):
    """What `Predictor.predict` made of N images.

    `classes` int `[N]`; `tasks` int `[N]`, from 0, whose network answered; `probabilities` float32
    `[N, classes of the scenario]`, which sum to 1 over the classes that could win and are 0
    elsewhere.
    """

    classes: np.ndarray
    tasks: np.ndarray
    probabilities: np.ndarray


class Predictor:
    """Classes of images whose tasks nobody names. Made by `Predictor.load`.

    A prediction does not depend on what else is asked for in the same call.
    """

    def __init__(
        self,
        model: engine.Model,
        task_id: str,
        class_names: Sequence[str],
        batching: engine.Batching,
    ):
        self.model, self.task_id, self.class_names, self.batching = (
            model,
            task_id,
            tuple(class_names),
            batching,
        )

    @classmethod
    def load(
        cls,
        workdir: str | PathLike,
        tasks: Sequence[int] | None = None,
        task_id: str = "prompt",
        *,
        backbone_path: str | PathLike = "",
        cache_bytes: int = 2**30,
        batch_size: int = 256,
        devices: Sequence[jax.Device] | None = None,
    ) -> "Predictor":
        """The model of a workdir as its last finished task left it; a run may go on training there.

        Args:
            workdir: the folder that `launch.py` trained in.
            tasks: those to choose from, counted from 0 as their folders are; all that are finished
                when None.
            task_id: how an image finds its task: "prompt" (nearest key), "gradient" (∂H/∂α, needs
                weights of each task's own), "prototype" (statistics of the frozen features), or
                "oracle" (`predict` is told). Where a method's tasks have nothing of their own,
                "prompt" stands for no task identity at all: the task is that of the winning class.
            backbone_path: the backbone's file, where it is no longer where the run found it.
            cache_bytes: of the devices' memory for tasks' θ ⊙ m, 4 bytes a masked weight and task;
                others are read from the workdir when an image is theirs. Gradient ID takes up to
                half as much again while it multiplies.
            batch_size: of the largest forward pass, over all devices.
            devices: those to run on; all when None.

        Raises:
            UserError: naming the folder, task or file that is missing, damaged, or from another
                run.
        """
        if task_id not in TASK_IDS:
            raise UserError(f"task_id: {task_id!r} is unknown; known are {', '.join(TASK_IDS)}")
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} is below 1")
        reader = Reader(workdir)
        identity = reader.read_identity()
        config = from_identity(identity)
        chosen = _chosen(reader, tasks)
        latest = reader.load_task_manifest(reader.present()[-1])
        backbone = backbones.load(
            config.backbone,
            str(backbone_path) or latest["config"]["backbone_path"],
            config.image_size,
            config.dtype,
        )
        if backbone.fingerprint != identity["backbone_sha256"]:
            raise UserError(
                f"backbone: the file found has SHA-256 {backbone.fingerprint}, this run's has "
                f"{identity['backbone_sha256']}; "
                f"give the run's own as backbone_path"
            )
        scenario = Scenario(config.tasks * len(latest["classes"]), config.tasks)
        method = method_from_config(config, backbone.vit, scenario.classes)
        if task_id == "gradient" and not method.kernels:
            raise UserError(
                f"task_id: 'gradient' needs weights of each task's own; {config.method} has none; "
                "take 'prompt' or 'prototype'"
            )
        if task_id == "prototype" and not method.by_task:
            raise UserError(
                f"task_id: 'prototype' names a task; {config.method} has nothing of a task's own; "
                "take 'prompt', the default"
            )
        batching = engine.Batching(train_step.data_mesh(devices), batch_size)
        model, names = _model(
            reader, method, backbone, scenario, config, chosen, task_id, cache_bytes, batching
        )
        return cls(model, task_id, names, batching)

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
        """As `predict`, for more files than fit in memory: a chunk at a time, in order, and an
        unusable image fails alone.

        Yields:
            The indices of a chunk's usable images, the prediction for those, and by index the
            errors of the others.
        """
        images = images_lib.as_list(images)
        given = self._given(task, len(images))
        for prepared in self._prepared(images):
            failed = {
                index: error for index, error in prepared.items() if isinstance(error, UserError)
            }
            usable = [index for index in prepared if index not in failed]
            if usable:
                stacked = np.stack([prepared[index] for index in usable])
                yield (
                    usable,
                    self.predict_prepared(stacked, given if given is None else given[usable]),
                    failed,
                )
            else:
                yield (
                    [],
                    Prediction(
                        np.zeros(0, int),
                        np.zeros(0, int),
                        np.zeros((0, self.model.method.classes), np.float32),
                    ),
                    failed,
                )

    def warm_up(self) -> None:
        """Compile everything now, for any number and mix of images. Without it, each size is
        compiled when it is first met.
        """
        model, batching = self.model, self.batching
        queried = self.task_id != "oracle" and model.method.by_task
        blank = np.zeros((batching.chunk, *[model.method.vit.image_size] * 2, 3), np.uint8)
        parts: dict[int, jax.Array] = {}
        for count in (*reversed(batching.sizes), batching.chunk):
            if queried:
                engine.encode(
                    model, blank[:count], batching, queried=False, prepared=True
                )  # for a task that is given
            tokens, query = engine.encode(model, blank[:count], batching, queried, prepared=True)
            for part in parts.values():
                tokens = engine.gather_tokens([part, part], [0, 0], count, batching)
            parts |= {count: tokens} if count in batching.sizes else {}
            for size in parts:
                engine.logits(model, tokens, engine.alone(np.full(size, model.tasks[0])), batching)
                if queried:
                    self._identify(tokens, query[:size])

    def _prepared(self, images: Sequence[Any]) -> Iterator[dict[int, np.ndarray | UserError]]:
        """Chunks of images by index, uint8 `[size, size, 3]` or what is wrong; the next chunk is
        read while one is computed.
        """
        chunk, size = self.batching.chunk, self.model.method.vit.image_size

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
        """`predict` of a chunk at most of images as the model takes them, uint8 `[N, size, size,
        3]`; `given` int `[N]` or None.
        """
        identified = given is None and self.model.method.by_task
        tokens, query = engine.encode(
            self.model, images, self.batching, queried=identified, prepared=True
        )
        tasks, posterior = (np.zeros(len(images), int) if given is None else given), None
        if identified:
            tasks, posterior = self._identify(tokens, query)
        logits = engine.logits(self.model, tokens, engine.alone(tasks), self.batching)
        if posterior is not None:
            logits = posterior + logits
        if given is not None or posterior is not None:
            logits = engine.mask_to_task(self.model, logits, tasks)
        else:
            logits = engine.mask_to_seen(self.model, logits)
        classes = logits.argmax(axis=1)
        if given is None and not self.model.method.by_task:
            tasks = self.model.task_of_class[classes]
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return Prediction(
            classes, tasks, (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)
        )

    def _identify(
        self, tokens: jax.Array, query: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Each image's task, int `[N]`, and the prototypes' log p(class | x) where they name it."""
        if self.task_id == "prototype":
            posterior = engine.log_posterior(self.model, query, self.batching)
            return engine.prototype_id(self.model, posterior), posterior
        nearest = engine.nearest_key(
            self.model, engine.key_similarity(self.model, query, self.batching)
        )
        if self.task_id == "gradient":
            return engine.gradient_id(self.model, tokens, nearest, self.batching), None
        return nearest, None

    def _given(self, task: int | Sequence[int] | None, count: int) -> np.ndarray | None:
        if task is None:
            if self.task_id == "oracle":
                raise UserError(
                    "task: this predictor was loaded with task_id='oracle'; tell predict the task "
                    "of each image"
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


def _chosen(reader: Reader, tasks: Sequence[int] | None) -> tuple[int, ...]:
    """The tasks to load, ascending."""
    there = reader.present()
    if not there:
        raise UserError(f"workdir: {reader.root} has no finished task yet")
    if tasks is None:
        return tuple(range(reader.finished()))
    if not isinstance(tasks, Iterable) or not all(
        isinstance(task, int | np.integer) for task in tasks
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


def _model(
    reader: Reader,
    method: Method,
    backbone: backbones.Backbone,
    scenario: Scenario,
    config: Config,
    chosen: tuple[int, ...],
    task_id: str,
    cache_bytes: int,
    batching: engine.Batching,
) -> tuple[engine.Model, list[str]]:
    """The model of `chosen`, and the class names; names of classes that are no task's of them
    are empty.
    """
    whole = train_step.replicated(batching.mesh)
    params = jax.device_put(backbone.params, whole)
    adapter = jax.eval_shape(
        lambda key: method.pack(method.init_adapter(key, params)), jax.random.key(0)
    )
    template = jax.eval_shape(method.init_shared, jax.random.key(0), params)
    shared = reader.load_task(reader.present()[-1], {"shared": template}, whole)[0]["shared"]
    # There is a row for each task of the run; those that are not loaded are never chosen.
    rows = {
        name: np.zeros((scenario.tasks, *shape), np.float32)
        for name, shape in method.row_shapes.items()
    }
    names = [""] * scenario.classes
    sums = prototypes.Sums(
        scenario.classes,
        prototypes.projection(config.seed, method.vit.dim, config.prototype_features),
    )
    for task in chosen:
        templates = {"adapter": {name: adapter[name] for name in rows if name in adapter}}
        if task_id == "prototype":
            templates["statistics"] = prototypes.shapes(
                config.prototype_features, len(scenario.classes_of(task))
            )
        items, manifest = reader.load_task(task, templates, whole, part=True)
        for name, array in items["adapter"].items():
            rows[name][task] = array
        for class_, name in zip(manifest["classes"], manifest["class_names"], strict=True):
            names[class_] = name
        if task_id == "prototype":
            sums.add(manifest["classes"], items["statistics"])

    def load(task: int) -> Adapter:
        own = {name: tree for name, tree in adapter.items() if name not in rows}
        return method.unpack(
            reader.load_task(task, {"adapter": own}, whole, part=True)[0]["adapter"], params
        )

    model = engine.Model(
        method=method,
        backbone=params,
        shared=shared,
        keys=jax.device_put(rows["key"], whole),
        prompts=jax.device_put(rows["prompt"], whole),
        weights=engine.TaskWeights(method, params, load, cache_bytes),
        tasks=chosen,
        task_of_class=scenario.task_of_class,
        prototypes=jax.device_put(sums.solve(), whole) if task_id == "prototype" else None,
    )
    return model, names
