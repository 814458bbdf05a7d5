"""A task as a folder that another library reads: timm, Hugging Face's transformers, PEFT.

The task's weights, θ ⊙ m or W + 8 A B, and its classes' columns of the classifier make a plain ViT,
which answers as `Predictor` does with the task given. Prompts have no place in it.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from soft_jax import distributed, paths, pytrees
from soft_jax.config import Config, from_settings, unknown_value
from soft_jax.data import sources
from soft_jax.errors import UserError
from soft_jax.experiment import gate
from soft_jax.inference import assembly, engine
from soft_jax.inference import predictor as predictor_lib
from soft_jax.inference.predictor import Predictor
from soft_jax.inference.rules import TaskGiven
from soft_jax.methods import peft, registry
from soft_jax.methods.low_rank import LoRA
from soft_jax.methods.method import Method
from soft_jax.models import vit_export
from soft_jax.models.vit import ViTConfig
from soft_jax.store import checkpoint, library
from soft_jax.store.folder import Reader
from soft_jax.store.library import LibraryReader
from soft_jax.store.records import RunRecord, TaskManifest

FORMATS = ("timm", "hf", "peft")


class Agreement(NamedTuple):
    """How many of a task's `total` test images get the same answer without prompts as with them.

    `correct_with` and `correct_without` of them are answered rightly, the task given.
    """

    same: int
    correct_with: int
    correct_without: int
    total: int


@dataclasses.dataclass(frozen=True)
class PlainTask:
    """A task's network as a plain ViT: `params` in our naming, the frozen `backbone` likewise.

    `called` is the task for people. `columns` are its own classes in the classifier of `predictor`,
    whose only task it is, `class_names` are theirs, and `classifier` is `{"kernel": [dim, classes],
    "bias": [classes]}` of them in this order. `products` loads A and B of a LoRA task, and `tests`
    its test images, as `_test_images_of_run` does.
    """

    called: str
    config: Config
    predictor: Predictor
    columns: tuple[int, ...]
    class_names: tuple[str, ...]
    params: pytrees.Tree
    classifier: Mapping[str, np.ndarray]
    products: Callable[[], pytrees.Tree]
    tests: Callable[[], tuple[np.ndarray, np.ndarray, bool]]

    @property
    def method(self) -> Method:
        """Return the method of the run or library."""
        return self.predictor.model.method

    @property
    def backbone(self) -> pytrees.Tree:
        """Return the frozen backbone's parameters."""
        return self.predictor.model.backbone


def export(
    workdir: str | PathLike,
    task: int | str,
    out: str | PathLike,
    format: str,
    *,
    without_prompts: bool = False,
    backbone_path: str | PathLike = "",
    tell: Callable[[str], None] = print,
) -> Path:
    """Write a task as the folder `out` of timm, transformers or PEFT, whole or not at all.

    Args:
        workdir: the folder that a run was trained in, or that of a library of tasks.
        task: of a run counted from 0, as `Predictor` counts; of a library its name, "birds", or a
            version, "birds@2". Of a run that is a library by now, "1" is "task1" too.
        out: a folder that is not there yet, or empty.
        format: "timm" (`model.safetensors`, `config.json`), "hf" (the same and
            `preprocessor_config.json`, for `ViTForImageClassification`), or "peft" (a LoRA task as
            an adapter, with the model it is for in `base/`).
        without_prompts: leave prompts out where the method has any, which changes answers; how
            many, of the task's test images, is told.
        backbone_path: the backbone's file, where it is no longer where it was.
        tell: is called with lines for the user.

    Raises:
        UserError: naming the task, method, backbone or folder that can't be exported, or what
            `Predictor.load` raises.
    """
    folder = paths.local(out, "OUT")
    _check_free(folder)
    if format not in FORMATS:
        raise UserError(unknown_value("format", format, FORMATS))
    plain = load(workdir, task, format, without_prompts, backbone_path)
    _write(folder, _files(plain, format))
    vit, count = plain.method.architecture, len(plain.class_names)
    tell(
        f"{paths.shown(folder)}: {plain.called} of {plain.config.method}, a ViT for images of "
        f"{vit.image_size} pixels with {count} {'class' if count == 1 else 'classes'}: "
        f"{', '.join(plain.class_names)}"
    )
    if vit.dtype != "float32":
        tell(f"It was trained in {vit.dtype}; in float32, answers differ by its rounding.")
    if registry.parse(plain.config.method).host_name:
        _tell_agreement(plain, tell)
    return folder


def load(
    workdir: str | PathLike,
    task: int | str,
    format: str = "timm",
    without_prompts: bool = False,
    backbone_path: str | PathLike = "",
) -> PlainTask:
    """Load a task as a plain ViT. Raises UserError as `export`."""
    if isinstance(task, str):
        return _load_of_library(workdir, task, format, without_prompts, backbone_path)
    reader = Reader(workdir)
    record, there = reader.read_record(), reader.present()
    config = from_settings(record.settings)
    if task not in there:
        finished = ", ".join(str(number + 1) for number in there) or "none"
        raise UserError(
            f"TASK: {task + 1} is no finished task of {paths.shown(reader.root)}; finished are "
            f"{finished}"
        )
    _check_method(config.method, format, without_prompts)
    predictor = Predictor.load(workdir, [task], TaskGiven.option, backbone_path=backbone_path)
    manifest = reader.load_task_manifest(task)
    load_items = functools.partial(reader.load_items, manifest)
    return _plain(
        called=f"task {task + 1}",
        config=config,
        predictor=predictor,
        columns=manifest.classes,
        class_names=manifest.class_names,
        load_items=load_items,
        tests=functools.partial(_test_images_of_run, predictor, config, record, manifest),
    )


def _load_of_library(
    root: str | PathLike,
    task: str,
    format: str,
    without_prompts: bool,
    backbone_path: str | PathLike,
) -> PlainTask:
    reader = LibraryReader(root)
    state = reader.read()
    name, number = library.split_name(task)
    if name not in state.tasks and name.isdecimal() and (reader.root / "config.json").exists():
        name = f"task{name}"  # by its number, as before the run was a library
    version = state.version(name, number)
    if version.state == library.ARCHIVED:
        raise UserError(f"TASK: {name}@{version.number} is archived; restore it first")
    config = from_settings(state.config)
    _check_method(config.method, format, without_prompts)
    backbone = assembly.load_backbone(config, state.backbone_sha256, backbone_path)
    predictor = predictor_lib.of_versions(
        reader, state, {name: version}, backbone, TaskGiven.option
    )
    folder = reader.path(version)
    load_items = functools.partial(
        checkpoint.load_items, folder, reader.manifest_of(version).sha256
    )

    def tests() -> tuple[np.ndarray, np.ndarray, bool]:
        return *gate.tested_images(reader, state, version, predictor, {}), True

    return _plain(
        called=f"{name}@{version.number}",
        config=config,
        predictor=predictor,
        columns=version.classes,
        class_names=tuple(state.classes[class_] for class_ in version.classes),
        load_items=load_items,
        tests=tests,
    )


def _plain(
    *,
    config: Config,
    predictor: Predictor,
    columns: tuple[int, ...],
    load_items: Callable[..., dict[str, Any]],
    **rest: Any,
) -> PlainTask:
    """Make a plain task of the only task of a predictor. Raises UserError where it is none."""
    model = predictor.model
    if not isinstance(model.method.architecture, ViTConfig):
        raise UserError(f"backbone: {config.backbone} is no plain ViT, which alone is exported")
    weights = model.weights[model.tasks[0]]
    if foreign := sorted(set(pytrees.flatten(weights)) - set(pytrees.flatten(model.backbone))):
        raise UserError(_no_place(config.method, foreign[0]))
    head = model.shared["head"]
    return PlainTask(
        config=config,
        predictor=predictor,
        columns=columns,
        params=pytrees.merge(model.shared.get("weights", model.backbone), weights),
        classifier={
            name: np.asarray(head[name])[..., list(columns)] for name in ("kernel", "bias")
        },
        products=functools.partial(_products, predictor, load_items),
        **rest,
    )


def _products(predictor: Predictor, load_items: Callable[..., dict[str, Any]]) -> pytrees.Tree:
    """Return the task's A and B, as `LoRA` has them."""
    method, params = predictor.model.method, predictor.model.backbone
    key = method.reparametrization.adapter_key
    template = {"adapter": {key: method.packed_shapes(params)[key]}}
    items = load_items(template, distributed.replicated(predictor.batching.mesh), part=True)
    return method.unpack(items["adapter"], params)[key]


def _check_method(method: str, format: str, without_prompts: bool) -> None:
    """Raise UserError for a method whose tasks are no plain ViT, before anything large is read."""
    parts = registry.parse(method)
    if parts.host.reads_text:
        raise UserError(f"method: {method!r} is of a CLIP; only runs on a ViT are exported")
    if parts.reparametrization and not parts.reparametrization.replaces_kernels:
        raise UserError(_no_place(method, "an adapter's bottleneck"))
    if format == "peft" and not (
        parts.reparametrization and issubclass(parts.reparametrization, LoRA)
    ):
        raise UserError(
            f"format: 'peft' is for lora, whose products PEFT adds to weights; {method!r} goes "
            "with timm or hf"
        )
    if parts.host_name and not without_prompts:
        raise UserError(
            f"method: {method!r} has prompts, which have no place in a plain ViT; with "
            "--without-prompts they are left out, and the difference is measured"
        )


def _no_place(method: str, what: str) -> str:
    return f"method: {what} of {method!r} has no place in a plain ViT, so it can't be exported"


# The folder.


def _check_free(folder: Path) -> None:
    paths.check_writable(folder, "OUT", paths.FOLDER)
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        kind = "is not empty" if folder.is_dir() else "is a link to nothing"
        raise UserError(f"OUT: {paths.shown(folder)} {kind}; name one that is not there yet")


Content = Mapping[str, Any]


def _files(plain: PlainTask, format: str) -> dict[str, Content]:
    """Return the content of each file: of `.safetensors` the arrays, of others JSON."""
    vit, names = plain.method.architecture, plain.class_names
    if format == "timm":
        return {
            "model.safetensors": vit_export.to_timm(plain.params, plain.classifier),
            "config.json": vit_export.timm_config(vit, names),
        }
    params = plain.backbone if format == "peft" else plain.params
    model = {
        "model.safetensors": vit_export.to_hugging_face(params, plain.classifier),
        "config.json": vit_export.hugging_face_config(vit, names),
        "preprocessor_config.json": vit_export.preprocessor_config(vit),
    }
    if format == "hf":
        return model
    config, arrays = peft.lora_to_peft(plain.products(), plain.method, plain.classifier)
    return {
        peft.CONFIG: config,
        peft.ARRAYS: arrays,
        **{f"base/{name}": content for name, content in model.items()},
    }


def _write(folder: Path, files: Mapping[str, Content]) -> None:
    partial = folder.with_name(f".{folder.name}.partial{os.getpid()}")
    try:
        for name, content in files.items():
            file = partial / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                # The metadata is asked for by transformers.
                safetensors.numpy.save_file(content, file, metadata={"format": "pt"})
            else:
                file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(partial, folder)
    except (OSError, safetensors.SafetensorError) as error:  # the latter for a full disk, too
        raise UserError(
            f"OUT: {paths.shown(folder)} can't be written ({error}); make room or mend the disk, "
            "or name another folder, and give the same command again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial)


# What prompts are worth.


def _tell_agreement(plain: PlainTask, tell: Callable[[str], None]) -> None:
    try:
        images, labels, prepared = plain.tests()
    except UserError as error:
        tell(f"Left out: prompts. How many answers change could not be measured: {error}")
        return
    found = agreement(plain, images, labels, prepared)
    shares = (f"{100 * count / found.total:.1f}%" for count in found[:3])
    tell(
        "Left out: prompts. Of the task's {} test images, {} get the same answer without them; "
        "with the task given, {} are right with prompts and {} without.".format(
            found.total, *shares
        )
    )


def _test_images_of_run(
    predictor: Predictor, config: Config, record: RunRecord, manifest: TaskManifest
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return the task's test images, their labels, and whether they are as the model takes them.

    Raises UserError where the data set can't be loaded, or is no longer the run's.
    """
    dataset = sources.load(config.dataset, manifest.config["data_dir"])
    dataset = dataset.first(config.train_images_per_class, config.test_images_per_class)
    if dataset.fingerprint != record.dataset_sha256:
        raise UserError(f"dataset: {config.dataset} is no longer what the run was trained on")
    members = np.flatnonzero(np.isin(dataset.test.labels, manifest.classes))
    if isinstance(dataset.test, sources.InMemoryImages):
        return dataset.test.images[members], dataset.test.labels[members], False
    size = predictor.model.method.architecture.image_size
    return dataset.test.prepared(members, size), dataset.test.labels[members], True


def agreement(
    plain: PlainTask, images: np.ndarray, labels: np.ndarray, prepared: bool
) -> Agreement:
    """Compare the exported ViT's answers with those of the run or library, the task given.

    `images` are uint8 `[N, H, W, 3]`, `prepared` as test images or not; `labels` int `[N]`.
    """
    model, batching = plain.predictor.model, plain.predictor.batching
    classes, columns = np.array(plain.columns), list(plain.columns)
    answers: list[Sequence[np.ndarray]] = []
    for start in range(0, len(images), batching.chunk):
        chunk = images[start : start + batching.chunk]
        tokens, _ = engine.encode(model, chunk, batching, queried=False, prepared=prepared)
        tasks = np.full(len(chunk), model.tasks[0])
        ours = engine.logits(model, tokens, engine.alone(tasks), batching)[:, columns]
        features = engine.queries(plain.method, plain.params, chunk, batching, prepared)
        theirs = features @ plain.classifier["kernel"] + plain.classifier["bias"]
        answers.append([classes[logits.argmax(axis=1)] for logits in (ours, theirs)])
    ours, theirs = (np.concatenate(column) for column in zip(*answers, strict=True))
    counts = (np.sum(ours == theirs), np.sum(ours == labels), np.sum(theirs == labels))
    return Agreement(*map(int, counts), len(images))
