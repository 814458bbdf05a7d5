"""What `Library.learn` is about to do: which classes and images, and what training begins with."""

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax

from soft_jax import distributed
from soft_jax.config import Config, from_settings
from soft_jax.data import sources
from soft_jax.errors import Stopped, UserError
from soft_jax.experiment import data_spec, imported
from soft_jax.experiment import settings as settings_lib
from soft_jax.experiment.data_spec import Data
from soft_jax.experiment.run import Start
from soft_jax.experiment.stopping import Preempted, stop_at_signals
from soft_jax.inference import assembly
from soft_jax.methods import registry
from soft_jax.models import backbones
from soft_jax.store import checkpoint, library
from soft_jax.store.library import ARCHIVED, LibraryFolder, LibraryState, Version

# A version is learned as a run of one task.
ONE_TASK = {
    "scenario": "equal",
    "tasks": 1,
    "initial_classes": 0,
    "increment": 10,
    "scenario_file": "",
    "class_order_seed": -1,
    "freeze_g_prompt": False,
    "train_images_per_class": 0,
    "test_images_per_class": 0,
}
_OF_DATA = ("name", "dataset", "data_dir", *ONE_TASK)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be learned: version `number` of task `name`, with `classes` in this order, whose
    images are in `parts`. `given` are the classes that were asked for, in that order. `origin` is a
    few words on where arrays are from that are not trained here.
    """

    name: str
    number: int
    classes: tuple[str, ...]
    parts: tuple[Data, ...]
    start_from: Version | None
    given: tuple[str, ...]
    origin: str = ""


def planned(
    state: LibraryState, name: str, data: Data, extend: bool, start_from: str | None
) -> tuple[Plan, sources.Dataset]:
    """Return what `learn` has to do, and the images.

    Raises UserError for classes that don't go together with those that are there, and Preempted
    after a signal.
    """
    versions = state.tasks.get(name, ())
    if extend and not versions:
        raise UserError(f"extend: there is no task {name!r} in this library yet")
    begin = _begin_of(state, start_from) if start_from is not None else None
    # A newer one with more classes may have been held back, or gone back from.
    base = state.version(name) if versions else None
    with stop_at_signals() as stop:
        try:
            dataset = data.load(stop)
            here: tuple[str, ...] = ()
            if base:
                here = tuple(state.classes[class_] for class_ in base.classes)
            given = dataset.class_names
            _check_classes(state, name, given, here, extend)
            newer = tuple(c for c in dataset.class_names if c not in here)
            parts = (dataclasses.replace(data, classes=(*here, *newer)),)
            if extend and len(newer) == len(dataset.class_names):
                older = [Data.from_json(part) for part in base.data]
                parts = (*older, dataclasses.replace(data, classes=newer))
                dataset = data_spec.joined(
                    functools.reduce(data_spec.joined, (part.load(stop) for part in older)),
                    dataset,
                )
        except Stopped:
            raise Preempted("Stopped while reading images") from None
    dataset = data_spec.subset(dataset, (*here, *newer))
    number = state.numbers.get(name, 0) + 1
    return Plan(name, number, dataset.class_names, parts, begin, given), dataset


def _begin_of(state: LibraryState, start_from: str) -> Version:
    version = state.version(*library.split_name(start_from))
    if version.state == ARCHIVED:
        raise UserError(f"start_from: {start_from} is archived; restore it first")
    return version


def _check_classes(
    state: LibraryState, name: str, given: Sequence[str], here: Sequence[str], extend: bool
) -> None:
    """Raise UserError where the classes `given` don't suit task `name`, which has `here`."""
    for class_ in given:
        known = class_ in state.classes
        owner = state.task_of_class(state.classes.index(class_)) if known else None
        if owner not in (None, name):
            raise UserError(
                f"classes: {class_!r} is in task {owner!r} already; leave it out, or learn a new "
                f"version of {owner!r} with --extend"
            )
    both = set(given) & set(here)
    if extend:
        if both == set(given):
            raise UserError(f"extend: {name} has all of these classes already")
        if both and both != set(here):
            raise UserError(
                f"extend: of the older classes of {name}, the data has only some "
                f"({', '.join(sorted(both))}); give all of them, or none"
            )
    elif here and set(given) != set(here):
        odd = sorted(set(given) ^ set(here))[0]
        raise UserError(
            f"classes: a new version of {name} has the same classes, and {odd!r} is in one of the "
            "two only; take another task name, or --extend"
        )


def training_name(state: LibraryState, plan: Plan, config: Config, dataset: sources.Dataset) -> str:
    """Return the name of the folder that a plan is learned in, after all that it depends on.

    So what a command that was killed left there is gone on with by the same command alone.
    """
    begun = plan.start_from.id if plan.start_from else None
    of = [settings_lib.used_settings(config), dataset.fingerprint, begun, state.shared_from]
    of += [plan.origin, plan.given] if plan.origin else []
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    return f"{plan.name}@{plan.number}-{digest[:12]}"


def start(
    folder: LibraryFolder, state: LibraryState, backbone: backbones.Backbone, plan: Plan
) -> Start:
    """Return what the training of a plan begins with."""
    config = config_of(state)
    whole = distributed.replicated(distributed.data_mesh(jax.devices()[:1]))
    method = registry.make_method(config, backbone.architecture, ("",))
    shared, adapter = assembly.load_shared(folder, state, method, backbone.params), {}
    if plan.start_from:
        version = plan.start_from
        manifest = folder.manifest_of(version)
        names = [""] * len(version.classes)
        method = registry.make_method(config, backbone.architecture, names, len(names))
        template = method.packed_shapes(backbone.params)
        template = {k: like for k, like in template.items() if k not in ("key", "context")}
        items = checkpoint.load_items(
            folder.path(version), manifest.sha256, {"adapter": template}, whole, part=True
        )
        adapter = jax.device_get(method.unpack(items["adapter"], backbone.params))
    return Start(alone=True, number=number_of(plan), adapter=adapter, shared=shared)


def start_imported(
    state: LibraryState, backbone: backbones.Backbone, plan: Plan, folder: Path
) -> Start:
    """Return what a plan begins with that is the PEFT adapter in `folder`. Raises UserError where
    it does not fit.
    """
    config = config_of(state)
    adapter, shared = imported.read(folder, config, backbone, plan.given, plan.classes)
    return Start(alone=True, trained=True, number=number_of(plan), adapter=adapter, shared=shared)


def number_of(plan: Plan) -> int:
    """Return the number of a plan's random draws.

    Not the version's id: another may be taken in before a killed command is given again.
    """
    return zlib.crc32(f"{plan.name}@{plan.number}".encode())


def with_version(state: LibraryState, plan: Plan, version: Version) -> tuple[LibraryState, Version]:
    """Return the state with a version more, as a candidate, and the version in its place."""
    classes = list(state.classes)
    classes += [name for name in plan.classes if name not in classes]
    numbers = tuple(classes.index(name) for name in plan.classes)
    version = dataclasses.replace(version, classes=numbers)
    shared_from = version.id if state.shared_from is None else state.shared_from
    state = dataclasses.replace(
        state,
        classes=tuple(classes),
        next_id=state.next_id + 1,
        shared_from=shared_from,
        numbers={**state.numbers, plan.name: plan.number},
        owners=state.owners
        if plan.name in state.tasks
        else {**state.owners, plan.name: version.id},
    )
    return state.replaced(plan.name, version), version


def check_method(config: Config) -> None:
    """Raise UserError for a method whose tasks can't be learned apart."""
    parts = registry.parse(config.method)
    if parts.strategy or parts.whole_network or parts.host.pools or not parts.by_task:
        raise UserError(
            f"method: {config.method!r} has arrays that every task trains, so its tasks can't be "
            "learned one by one and stay as they are; take softtf, lora, adapter, wsn or softnet, "
            "with dualprompt or clipprompt or alone"
        )
    if parts.host.reads_text and not parts.host.per_task:
        raise UserError(
            f"method: {config.method!r} has one image prompt for all tasks; take clipprompt"
        )


def check_same(ours: Config, given: Config) -> None:
    """Raise UserError where a library's settings are not those that are given."""
    there, now = (
        {k: v for k, v in settings_lib.used_settings(c).items() if k not in _OF_DATA}
        for c in (ours, given)
    )
    odd = [key for key in sorted(there.keys() | now.keys()) if there.get(key) != now.get(key)]
    if odd:
        lines = "; ".join(f"{key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in odd)
        raise UserError(f"library: it has other settings ({lines}); leave --config out")


def config_of(state: LibraryState) -> Config:
    """Return the settings that a library's tasks are learned with."""
    return from_settings(state.config)
