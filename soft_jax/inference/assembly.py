"""The model of a library: tasks that were learned apart, put together.

A version keeps a classifier of its own classes; the model's has a column for each class of the
library, by its number there. The other shared arrays (a G-prompt) are the same for all. Tasks,
classes and prompts are padded to a few fixed sizes, so that a task more compiles nothing anew. The
classifier is applied to so many classes at a time: a matrix product's rounding depends on its
sizes, and an old task's logits are to stay the same to the bit when there are more classes.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import distributed, pytrees
from soft_jax.config import Config
from soft_jax.errors import UserError
from soft_jax.inference import engine, rules, zero_shot
from soft_jax.inference.rules import TaskIdentityRule
from soft_jax.methods import registry
from soft_jax.methods.method import Adapter, Method, Shared
from soft_jax.models import backbones
from soft_jax.store import checkpoint, formats
from soft_jax.store.library import ARCHIVED, LibraryReader, LibraryState, Version
from soft_jax.store.records import TaskManifest

LEAST_TASKS, LEAST_CLASSES = 8, 32  # that a model has room for
BLOCK = 16  # classes that the classifier is applied to at a time; at least two blocks, so a loop


class LibraryMethod(Method):
    """A method whose classifier is applied to `BLOCK` classes at a time.

    A class's logits are then the same to the bit, whatever the number of classes beside it.
    """

    def head(self, params: pytrees.Tree, shared: Shared, features: jax.Array) -> jax.Array:
        """Return logits as `Method.head` does, of a number of classes that `BLOCK` divides."""
        axis = _class_axis(self)

        def cut(array: jax.Array, axis: int) -> jax.Array:
            shape = (*array.shape[:axis], -1, BLOCK, *array.shape[axis + 1 :])
            return jnp.moveaxis(array.reshape(shape), axis, 0)

        flat = pytrees.flatten(shared["head"])
        blocks = {name: cut(array, axis[name]) for name, array in flat.items()}

        def of_block(block: Mapping[str, jax.Array]) -> jax.Array:
            head = pytrees.unflatten(block)
            return super(LibraryMethod, self).head(params, {"head": head}, features)

        logits = jax.lax.map(of_block, blocks)
        return jnp.moveaxis(logits, 0, 1).reshape(len(features), -1)


def room(count: int, least: int) -> int:
    """Return the size that `count` rows are padded to: `least`, or twice, four times as many."""
    while least < count:
        least *= 2
    return least


def load_backbone(
    config: Config, sha256: str = "", path: str | PathLike = "", whose: str = "library"
) -> backbones.Backbone:
    """Load the backbone of a library, or of a run, from `path` or where the settings say.

    Raises UserError where the file there is another than the one of `sha256`; "" takes any.
    """
    file = str(path) or config.backbone_path
    backbone = backbones.load(config.backbone, file, config.image_size, config.dtype)
    if sha256 and backbone.fingerprint != sha256:
        raise UserError(
            f"backbone: the file found has SHA-256 {backbone.fingerprint}, this {whose}'s has "
            f"{sha256}; give the {whose}'s own as backbone_path"
        )
    return backbone


def method_of(
    config: Config,
    backbone: backbones.Backbone,
    state: LibraryState,
    versions: Mapping[str, Version],
) -> Method:
    """Return the method of a model of `versions`, with room for more tasks and classes.

    Class names, and the number of the largest task's, are left out but for backbones that read
    text: with one more, all would be compiled again.
    """
    names, largest = [""] * room(len(state.classes), LEAST_CLASSES), 1
    if backbone.architecture.reads_text:
        names[: len(state.classes)] = state.classes
        largest = room(max((len(version.classes) for version in versions.values()), default=1), 4)
    method = registry.make_method(config, backbone.architecture, names, largest)
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return LibraryMethod(**fields)


def rules_of(method: Method, config: Config) -> tuple[TaskIdentityRule, ...]:
    """Return the rules by which one image finds its task in a library."""
    return tuple(rule for rule in rules.rules_of(method, config) if rule.can_stand_alone())


def choose(method: Method, config: Config, option: str | None) -> tuple[TaskIdentityRule, str]:
    """Return the rule of option `option`, or without one the default, and why it is.

    Raises UserError where the method has no use for the rule.
    """
    if option == rules.TaskGiven.option:
        return rules.TaskGiven(), "it was asked for"
    able = rules_of(method, config)
    if option is None:
        return rules.choose(able, {})
    by_option = {rule.option: rule for rule in able}
    if option not in by_option:
        raise UserError(
            f"task_id: {option!r} means nothing for {config.method}; take one of "
            f"{', '.join(map(repr, by_option))}"
        )
    return by_option[option], "it was asked for"


def assemble(
    reader: LibraryReader,
    state: LibraryState,
    versions: Mapping[str, Version],
    config: Config,
    backbone: backbones.Backbone,
    rule: TaskIdentityRule,
    cache_bytes: int,
    batching: engine.Batching,
    params: pytrees.Tree | None = None,
) -> engine.Model:
    """Make the model of `versions`, at least one, whose places are the tasks' numbers in it.

    `params` are the backbone's on the devices, if they are there already. Raises UserError where a
    version is damaged, and says which.
    """
    whole = distributed.replicated(batching.mesh)
    params = jax.device_put(backbone.params, whole) if params is None else params
    method = method_of(config, backbone, state, versions)
    collector = rule.collector(method.num_classes)
    tasks = room(len(versions), LEAST_TASKS)
    rows = {
        name: np.zeros((tasks, *shape), np.float32) for name, shape in method.row_shapes.items()
    }
    shapes = jax.eval_shape(method.init_shared, jax.random.key(0), params)
    shared = jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), shapes)
    shared |= load_shared(reader, state, method, params)
    axis = _class_axis(method)
    task_of_class = np.full(method.num_classes, -1)
    adapters: dict[int, Any] = {}
    for task, (name, version) in enumerate(versions.items()):
        own = _method_of_version(config, backbone, version)
        with _naming(reader, state, name, version):
            manifest = reader.manifest_of(version)
            adapter, loaded = _templates(own, params, manifest)
            templates = {
                "adapter": {name: adapter[name] for name in rows if name in adapter},
                "shared": {"head": loaded["head"]},
            }
            if collector:
                shapes = rule.statistics_shapes(len(version.classes))
                templates["statistics"] = manifest.stored("statistics", shapes)
            items = checkpoint.load_items(
                reader.path(version), manifest.sha256, templates, whole, part=True
            )
        for row, array in items["adapter"].items():
            rows[row][task][tuple(map(slice, array.shape))] = array
        places, theirs = list(version.classes), list(manifest.classes)
        _put_classes(shared["head"], items["shared"]["head"], axis, places, theirs)
        task_of_class[places] = task
        if collector:
            collector.add(version.classes, items["statistics"])
        template = {key: like for key, like in adapter.items() if key not in rows}
        adapters[task] = (name, version, manifest, own, template)

    def load(task: int) -> Adapter:
        name, version, manifest, own, template = adapters[task]
        try:
            with _naming(reader, state, name, version):
                items = checkpoint.load_items(
                    reader.path(version), manifest.sha256, {"adapter": template}, whole, part=True
                )
        except UserError as error:
            # By the state, which changes before files go.
            now = (v for versions in reader.read().tasks.values() for v in versions)
            if any(v.id == version.id and v.state != ARCHIVED for v in now):
                raise
            raise UserError(
                f"task: {name}@{version.number} was archived or removed after this predictor was "
                "opened, and its weights are not in memory (any more); call refresh() to go on "
                "with what the library holds now"
            ) from error
        return own.unpack(items["adapter"], params)

    return engine.Model(
        method=method,
        backbone=params,
        shared=jax.device_put(shared, whole),
        rows=jax.device_put(rows, whole),
        weights=engine.TaskWeights(method, params, load, cache_bytes),
        tasks=tuple(range(len(versions))),
        task_of_class=task_of_class,
        solved=jax.device_put({rule.statistics_name: collector.solve()}, whole)
        if collector
        else {},
        zero_shot=zero_shot.text_features(method.architecture, params, method.class_names)
        if isinstance(rule, rules.ZeroShot)
        else None,
    )


def load_shared(
    reader: LibraryReader, state: LibraryState, method: Method, params: pytrees.Tree
) -> Shared:
    """Return what all tasks share beside the classifier, as NumPy arrays; empty before the first.

    Where it is damaged, it is read from another version that has the same. Raises UserError where
    none has.
    """
    shapes = jax.eval_shape(method.init_shared, jax.random.key(0), params)
    template = {name: like for name, like in shapes.items() if name != "head"}
    folder = reader.shared(state)
    if folder is None or not template:
        return {}
    hashes = None
    try:
        hashes = _hashes_of_shared(reader.load_manifest(folder).sha256, template)
        return _shared_in(folder, hashes, template)
    except UserError as error:
        return _copy_of_shared(reader, state, template, hashes, f"{folder}: {error}")


def _hashes_of_shared(hashes: Mapping[str, str], template: pytrees.Tree) -> dict[str, str]:
    names = (f"shared/{name}" for name in checkpoint.named_leaves(template))
    return {name: hashes[name] for name in names if name in hashes}


def _shared_in(folder: Path, hashes: Mapping[str, str], template: pytrees.Tree) -> Shared:
    whole = distributed.replicated(distributed.data_mesh(jax.devices()[:1]))
    items = checkpoint.load_items(folder, hashes, {"shared": template}, whole, part=True)
    return jax.device_get(items["shared"])


def _copy_of_shared(
    reader: LibraryReader,
    state: LibraryState,
    template: pytrees.Tree,
    hashes: Mapping[str, str] | None,
    why: str,
) -> Shared:
    """Return the part that all tasks share from another version's checkpoint.

    It is the same where the `hashes` of its arrays are; where those can't be read (None), in the
    versions that were learned after the one that it is from. Raises UserError with `why` it is
    damaged, and what can be done, where there is no copy.
    """

    def is_copy(version: Version, theirs: Mapping[str, str]) -> bool:
        same = _hashes_of_shared(theirs, template)
        return bool(same) and (same == hashes if hashes else version.id > state.shared_from)

    archived = ""
    for name, versions in state.tasks.items():
        for version in versions:
            if version.state == ARCHIVED:
                if not archived and is_copy(version, reader.archived_hashes(version)):
                    archived = f"{name}@{version.number}"
                continue
            with contextlib.suppress(UserError):  # damaged too
                theirs = reader.manifest_of(version).sha256
                if is_copy(version, theirs):
                    return _shared_in(reader.path(version), theirs, template)
    why = why.removesuffix(f"; {checkpoint.ADVICE}")
    way = f", or unpack one with soft-jax restore {reader.root} {archived}" if archived else ""
    raise UserError(
        f"library: what all tasks share ({', '.join(template)}) is damaged ({why}), and no other "
        f"version has it; restore that folder from a copy{way}"
    )


def check_version(
    reader: LibraryReader,
    state: LibraryState,
    name: str,
    version: Version,
    config: Config,
    backbone: backbones.Backbone,
) -> None:
    """Read all of a version that answers are made of. Raises UserError where it is damaged."""
    own = _method_of_version(config, backbone, version)
    whole = distributed.replicated(distributed.data_mesh(jax.devices()[:1]))
    with _naming(reader, state, name, version):
        manifest = reader.manifest_of(version)
        adapter, shared = _templates(own, backbone.params, manifest)
        templates = {"adapter": adapter, "shared": shared}
        for rule in rules.keepers(rules_of(own, config)).values():
            shapes = rule.statistics_shapes(len(version.classes))
            templates.setdefault("statistics", {}).update(manifest.stored("statistics", shapes))
        checkpoint.load_items(reader.path(version), manifest.sha256, templates, whole, part=True)


def sound(
    reader: LibraryReader, state: LibraryState, config: Config, backbone: backbones.Backbone
) -> tuple[dict[str, Version], dict[str, str]]:
    """Return the active versions that are whole, by task, and of the others what is wrong."""
    whole, damaged = {}, {}
    for name, version in state.active.items():
        try:
            check_version(reader, state, name, version, config, backbone)
            whole[name] = version
        except UserError as error:
            damaged[name] = str(error)
    return whole, damaged


def check_files(reader: LibraryReader, state: LibraryState, name: str, version: Version) -> None:
    """Read every file of a version. Raises UserError where one is not what was saved."""
    with _naming(reader, state, name, version):
        reader.manifest_of(version)
        checkpoint.verify(reader.path(version))


def load_weights(
    reader: LibraryReader,
    state: LibraryState,
    name: str,
    version: Version,
    config: Config,
    backbone: backbones.Backbone,
) -> pytrees.Tree:
    """Return the weights that a version puts in the place of the backbone's, θ ⊙ m for masks.

    Empty where its task changes none. Raises UserError where it is damaged.
    """
    own = _method_of_version(config, backbone, version)
    if not own.reparametrization:
        return {}
    adapter = load_own(reader, state, name, version, config, backbone)
    return own.weights(backbone.params, adapter)


def load_own(
    reader: LibraryReader,
    state: LibraryState,
    name: str,
    version: Version,
    config: Config,
    backbone: backbones.Backbone,
) -> Adapter:
    """Return what a version's weights are made of, `{"mask": ...}` for masks, unpacked.

    The library's method must have a reparametrization. Raises UserError where it is damaged.
    """
    own = _method_of_version(config, backbone, version)
    key = own.reparametrization.adapter_key
    whole = distributed.replicated(distributed.data_mesh(jax.devices()[:1]))
    with _naming(reader, state, name, version):
        manifest = reader.manifest_of(version)
        adapter, _ = _templates(own, backbone.params, manifest)
        templates = {"adapter": {key: adapter[key]}}
        items = checkpoint.load_items(
            reader.path(version), manifest.sha256, templates, whole, part=True
        )
        return own.unpack(items["adapter"], backbone.params)


@contextlib.contextmanager
def _naming(
    reader: LibraryReader, state: LibraryState, name: str, version: Version
) -> Iterator[None]:
    """Say which version is damaged, or of a newer release, and what can be done."""
    try:
        yield
    except UserError as error:
        earlier = any(v.number < version.number for v in state.tasks.get(name, ()))
        others = ",".join(task for task in state.active if task != name)
        newer = isinstance(error, formats.NewerFormat)
        ways = [
            *([] if newer else ["restore its folder from a copy"]),
            *([f"go back with soft-jax rollback {reader.root} {name}"] if earlier else []),
            *([f"predict without it, with --tasks={others}"] if others else []),
        ]
        why, called = str(error).removesuffix(f"; {checkpoint.ADVICE}"), f"{name}@{version.number}"
        if newer:
            said = f"{called} is of a newer release: {', or '.join([why, *ways])}"
        else:
            said = f"{called} is damaged ({why}); {', or '.join(ways)}"
        raise UserError(said) from error


def _method_of_version(config: Config, backbone: backbones.Backbone, version: Version) -> Method:
    names = [""] * len(version.classes)
    return registry.make_method(config, backbone.architecture, names, len(names))


def _templates(
    method: Method, params: pytrees.Tree, manifest: TaskManifest
) -> tuple[pytrees.Tree, pytrees.Tree]:
    """Return the shapes of a version's adapter as it is stored, and of its shared part.

    That of a run has the columns of all of the run's classes.
    """
    key = jax.random.key(0)
    adapter = method.packed_shapes(params)
    names = ("",) * manifest.num_classes
    head = jax.eval_shape(lambda key: method.architecture.init_classifier(key, names), key)
    shared = jax.eval_shape(method.init_shared, key, params)
    return adapter, {**shared, "head": head}


def _class_axis(method: Method) -> dict[str, int]:
    """Return which axis of each array of a classifier counts classes, by name."""

    def shapes(count: int) -> dict[str, Any]:
        names = ("",) * count
        init = method.architecture.init_classifier
        return pytrees.flatten(jax.eval_shape(lambda key: init(key, names), jax.random.key(0)))

    one, two = shapes(1), shapes(2)
    return {
        name: [a != b for a, b in zip(one[name].shape, two[name].shape, strict=True)].index(True)
        for name in one
    }


def _put_classes(
    whole: pytrees.Tree,
    own: pytrees.Tree,
    axis: Mapping[str, int],
    places: list[int],
    theirs: list[int],
) -> None:
    """Copy a version's classes `theirs` to their `places` in the library's classifier."""
    mine = pytrees.flatten(own)
    for name, array in pytrees.flatten(whole).items():
        before = (slice(None),) * axis[name]
        array[(*before, places)] = np.asarray(mine[name])[(*before, theirs)]
