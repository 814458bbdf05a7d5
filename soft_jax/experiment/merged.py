"""One task made of several: what is to be merged, and what the finished version begins with.

The masks are merged (`methods.merging`), and nothing is trained. The classifier is fitted to the
training images as the merged network sees them, since columns of classifiers that were trained
apart can't be compared; key and statistics are made of the same images (`experiment.imported`).
"""

import dataclasses
import functools
from collections.abc import Sequence

from soft_jax.data import sources
from soft_jax.errors import Stopped, UserError
from soft_jax.experiment import data_spec
from soft_jax.experiment import library_planning as planning
from soft_jax.experiment.data_spec import Data
from soft_jax.experiment.run import Start
from soft_jax.experiment.stopping import Preempted, stop_at_signals
from soft_jax.inference import assembly
from soft_jax.methods import merging, registry
from soft_jax.models import backbones
from soft_jax.store import library
from soft_jax.store.library import ARCHIVED, LibraryFolder, LibraryState, Version
from soft_jax.training import train_step

NEAR_ONE = ("uniform", "ones")  # the draws of a mask that are near 1


@dataclasses.dataclass(frozen=True)
class Merge:
    """What is to be merged: `parts` are versions with the names of their tasks."""

    into: str
    parts: tuple[tuple[str, Version], ...]
    method: str
    weights: tuple[float, ...]
    density: float

    @property
    def classes(self) -> tuple[int, ...]:
        """Return the library's numbers of all classes, in the order of the parts."""
        return tuple(class_ for _, version in self.parts for class_ in version.classes)

    @property
    def keeps_tests(self) -> bool:
        """Whether test images are kept in the library: where those of every part are."""
        return all("kept_sha256" in version.test for _, version in self.parts)

    @property
    def origin(self) -> str:
        """Say what it is made of, with the folders, since tasks may be renamed."""
        names = ", ".join(f"{name}@{v.number} (tasks/{v.id:03d})" for name, v in self.parts)
        how = self.method
        if self.method in merging.DENSITIES:
            how += f", density {self.density:g}"
        if len(set(self.weights)) > 1:
            how += f", weights {', '.join(f'{weight:g}' for weight in self.weights)}"
        return f"the masks of {names}, merged by {how}"


def planned(
    state: LibraryState,
    tasks: Sequence[str],
    into: str,
    method: str,
    weights: Sequence[float] | None,
    density: float | None,
) -> Merge:
    """Return what `Library.merge` has to do. Raises UserError where it can't be done."""
    config = planning.config_of(state)
    if registry.parse(config.method).name != "softtf":
        raise UserError(
            f"merge: this library's method is {config.method!r}, and only the masks of 'softtf' "
            "can be merged: prompts of two tasks are not one prompt, the sum of two low-rank "
            "products is of a higher rank, and the mean of two binary masks is not binary"
        )
    if config.mask_init not in NEAR_ONE:
        raise UserError(
            f"merge: masks of this library were drawn as {config.mask_init!r}, far from 1, so what "
            f"tasks changed has no common point; only {' and '.join(NEAR_ONE)} can be merged"
        )
    named = [library.split_name(task) for task in tasks]
    parts = tuple((name, state.version(name, number)) for name, number in named)
    names = [name for name, _ in parts]
    if len(parts) < 2 or len(set(names)) < len(names):
        raise UserError("merge: name two or more tasks, each once")
    for name, version in parts:
        if version.state == ARCHIVED:
            raise UserError(f"merge: {name}@{version.number} is archived; restore it first")
    given = tuple(weights) if weights is not None else (1.0,) * len(parts)
    density = merging.check(method, given, density, len(parts))
    merge = Merge(into, parts, method, given, density)
    _check_classes(state, merge)
    return merge


def _check_classes(state: LibraryState, merge: Merge) -> None:
    """Raise UserError where the classes of a merged task are not its parts' alone."""
    into, classes = merge.into, merge.classes
    if len(set(classes)) < len(classes):
        twice = next(class_ for class_ in classes if classes.count(class_) > 1)
        raise UserError(f"merge: class {state.classes[twice]!r} is in two of these versions")
    if into in state.tasks:
        there = set(state.version(into).classes)
        if into in (name for name, _ in merge.parts) or there != set(classes):
            raise UserError(f"merge: there is a task {into!r} already; name a new one with --into")
    for name, version in state.active.items():
        if set(version.classes) & set(classes) and not set(version.classes) <= set(classes):
            other = next(class_ for class_ in version.classes if class_ not in classes)
            raise UserError(
                f"merge: {name}@{version.number} is active and has some of these classes, and "
                f"{state.classes[other]!r} as well, which would have no task; merge that version"
            )


def images(state: LibraryState, merge: Merge) -> tuple[planning.Plan, sources.Dataset]:
    """Return the plan of the merged version, and the images of all parts.

    Raises UserError where they can't be had, and Preempted after a signal.
    """
    parts = tuple(Data.from_json(part) for _, version in merge.parts for part in version.data)
    names = tuple(state.classes[class_] for class_ in merge.classes)
    with stop_at_signals() as stop:
        # Parts that follow each other are often of one data set.
        whole = functools.lru_cache(maxsize=1)(lambda data: data.whole(stop))
        try:
            each = (part.of(whole(dataclasses.replace(part, classes=()))) for part in parts)
            dataset = functools.reduce(data_spec.joined, each)
        except Stopped:
            raise Preempted("Stopped while reading images") from None
    number = state.numbers.get(merge.into, 0) + 1
    plan = planning.Plan(merge.into, number, names, parts, None, names, merge.origin)
    return plan, data_spec.subset(dataset, names)


def start(
    folder: LibraryFolder,
    state: LibraryState,
    backbone: backbones.Backbone,
    merge: Merge,
    plan: planning.Plan,
) -> Start:
    """Return what the merged version begins with. Raises UserError where a part is damaged."""
    config, number = planning.config_of(state), planning.number_of(plan)
    masks = [
        assembly.load_own(folder, state, name, version, config, backbone)["mask"]
        for name, version in merge.parts
    ]
    key = train_step.stream(config.seed, "merge", number)
    mask = merging.merge(masks, merge.method, merge.weights, merge.density, key)
    return Start(alone=True, trained=True, number=number, adapter={"mask": mask})
