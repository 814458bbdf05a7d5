"""The model of a library: tasks that were learned apart, put together.

A version keeps a classifier of its own classes; the model's has a column for each class of the
library, by its number there. The other shared arrays (a G-prompt) are the same for all. Tasks,
classes and prompts are padded to a few fixed sizes, so that a task more compiles nothing anew.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from soft_jax import distributed, pytrees
from soft_jax.config import Config
from soft_jax.errors import UserError
from soft_jax.inference import engine, rules, zero_shot
from soft_jax.inference.rules import TaskIdentityRule
from soft_jax.methods import registry
from soft_jax.methods.method import Adapter, Method
from soft_jax.models import backbones
from soft_jax.store import checkpoint
from soft_jax.store.library import LibraryReader, LibraryState, Version
from soft_jax.store.records import TaskManifest

LEAST_TASKS, LEAST_CLASSES = 8, 32  # that a model has room for


def room(count: int, least: int) -> int:
    """Return the size that `count` rows are padded to: `least`, or twice, four times as many."""
    while least < count:
        least *= 2
    return least


def method_of(
    config: Config,
    backbone: backbones.Backbone,
    state: LibraryState,
    versions: Mapping[str, Version],
) -> Method:
    """Return the method of a model of `versions`, with room for more tasks and classes.

    Class names are left out but for backbones that read text: with a name more, all would be
    compiled again.
    """
    classes = room(len(state.classes), LEAST_CLASSES)
    names = [""] * classes
    if backbone.architecture.reads_text:
        names[: len(state.classes)] = state.classes
    largest = max((len(version.classes) for version in versions.values()), default=1)
    return registry.make_method(config, backbone.architecture, names, room(largest, 4))


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
    version is damaged, and names it.
    """
    whole = distributed.replicated(batching.mesh)
    params = jax.device_put(backbone.params, whole) if params is None else params
    method = method_of(config, backbone, state, versions)
    keeper = rules.keepers((rule,)).get(rule.statistics_name) if rule.keeps_statistics else None
    collector = keeper.collector(method.num_classes) if keeper else None
    tasks = room(len(versions), LEAST_TASKS)
    rows = {
        name: np.zeros((tasks, *shape), np.float32) for name, shape in method.row_shapes.items()
    }
    shapes = jax.eval_shape(method.init_shared, jax.random.key(0), params)
    shared = jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), shapes)
    axis = _class_axis(method)
    task_of_class = np.full(method.num_classes, -1)
    adapters: dict[int, Any] = {}
    for task, (name, version) in enumerate(versions.items()):
        manifest, own = reader.load_manifest(version), _method_of_version(config, backbone, version)
        adapter, loaded = _templates(own, params, manifest)
        templates = {
            "adapter": {name: adapter[name] for name in rows if name in adapter},
            "shared": loaded,
        }
        if collector:
            shapes = rule.statistics_shapes(len(version.classes))
            templates["statistics"] = manifest.stored("statistics", shapes)
        try:
            items = checkpoint.load_items(
                reader.path(version), manifest.sha256, templates, whole, part=True
            )
        except UserError as error:
            raise UserError(f"{name}@{version.number}: {error}") from error
        for row, array in items["adapter"].items():
            rows[row][task][tuple(map(slice, array.shape))] = array
        places, theirs = list(version.classes), list(manifest.classes)
        _put_classes(shared["head"], items["shared"]["head"], axis, places, theirs)
        if version.id == state.shared_from or task == 0:
            shared |= {key: value for key, value in items["shared"].items() if key != "head"}
        task_of_class[places] = task
        if collector:
            collector.add(version.classes, items["statistics"])
        adapters[task] = (
            version,
            manifest,
            own,
            {key: like for key, like in adapter.items() if key not in rows},
        )

    def load(task: int) -> Adapter:
        version, manifest, own, template = adapters[task]
        items = checkpoint.load_items(
            reader.path(version), manifest.sha256, {"adapter": template}, whole, part=True
        )
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
