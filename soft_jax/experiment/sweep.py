"""A sweep: runs with every combination of some settings' values, and which of them did best on
images held out of training. Test images have no part in it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from soft_jax.config import Config, parse_argument, unknown_value
from soft_jax.errors import UserError
from soft_jax.evaluation import markdown as markdown_lib
from soft_jax.evaluation import metrics
from soft_jax.evaluation.metrics import VALIDATION
from soft_jax.experiment import planned as planned_lib
from soft_jax.experiment import settings as settings_lib
from soft_jax.experiment.planned import PlannedRun
from soft_jax.inference import rules
from soft_jax.methods import registry
from soft_jax.store.records import TaskManifest

VALIDATION_SHARE = 0.1  # of each class's training images, where the config holds none out
# Settings that say which images and tasks there are, or draw the images that are held out: figures
# of runs that differ in them are of different images.
_OF_IMAGES = (
    "validation",
    "seed",
    "dataset",
    "data_dir",
    "scenario",
    "tasks",
    "initial_classes",
    "increment",
    "scenario_file",
    "class_order_seed",
    "train_images_per_class",
    "test_images_per_class",
)


@dataclasses.dataclass(frozen=True)
class Point:
    """A combination of values, as they were written, and its run."""

    settings: Mapping[str, str]
    run: PlannedRun


@dataclasses.dataclass(frozen=True)
class Figure:
    """What a run reached on validation images under `protocol`, in percent after its last task."""

    protocol: str
    accuracy: float
    forgetting: float
    images: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a point: its figure, or what went wrong with its run."""

    point: Point
    figure: Figure | None
    problem: UserError | None = None


def plan(
    config: Config,
    choices: Sequence[str],
    protocol: str | None,
    workdir: Path,
    giving_way: Callable[[Config, Iterable[str]], Config] = lambda config, _: config,
) -> list[Point]:
    """Return a sweep's points, the last setting's values changing fastest.

    `choices` are texts such as "learning_rate=0.003,0.01", whose values go before `config`'s;
    `protocol` is what the runs will be compared by, None for each run's own best rule. Where
    `config` holds no images out, `VALIDATION_SHARE` of them are. `workdir` holds the runs of all
    sweeps. `giving_way` takes a point's config and the names that the point sets, and returns it
    without what has no effect beside those and which nobody asked for.

    Raises UserError for a choice that can't be read, a value that is no good, two points that are
    the same run, and a protocol that a run does not have.
    """
    values = _values(choices)
    config = dataclasses.replace(config, validation=config.validation or VALIDATION_SHARE)
    points: list[Point] = []
    folders: dict[Path, str] = {}
    for combination in itertools.product(*values.values()):
        texts = dict(zip(values, combination, strict=True))
        title = shown(texts)
        try:
            settings: dict = {}
            for name, text in texts.items():
                settings |= parse_argument(f"{name}={text}")
            of_point = giving_way(dataclasses.replace(config, **settings), texts)
            settings_lib.check(of_point)
        except UserError as error:
            raise UserError(f"--set: {title}: {error}") from error
        _check_protocol(of_point, protocol)
        folder = workdir / planned_lib.folder_of(of_point)
        if folder in folders:
            raise UserError(f"--set: {folders[folder]} and {title} are the same run")
        folders[folder] = title
        points.append(Point(texts, PlannedRun(of_point, folder, title)))
    return points


def _values(choices: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the values to try by setting. Raises UserError for texts that don't say them."""
    if not choices:
        raise UserError("--set: write what to try, such as --set=learning_rate=0.003,0.01,0.03")
    values: dict[str, tuple[str, ...]] = {}
    fields: dict[str, str] = {}
    for choice in choices:
        name, equals, text = (part.strip() for part in choice.partition("="))
        texts = tuple(part.strip() for part in text.split(","))
        if not equals or not all(texts):
            raise UserError(f"--set: {choice!r}: write NAME=VALUE,VALUE")
        if name in _OF_IMAGES:
            raise UserError(
                f"--set: {name} changes the images or the tasks, so its values can't be compared "
                "on the same ones"
            )
        if name in values:
            both = ",".join(dict.fromkeys((*values[name], *texts)))
            raise UserError(f"--set: {name} is given twice; write --set={name}={both}")
        read = [parse_argument(f"{name}={text}", "--set") for text in texts]
        for field in read[0]:
            if field in fields:
                raise UserError(f"--set: {fields[field]} and {name} both set {field}")
            fields[field] = name
        values[name] = texts
    return values


def _check_protocol(config: Config, protocol: str | None) -> None:
    """Raise UserError for a protocol that is none, that the run has not, or that learns nothing."""
    if protocol is None:
        return
    rule = rules.rule_of(protocol)
    if rule is None:
        keys = [
            f"{rule.grouping}/{rule.name}"
            for rule in rules.RULES.values()
            if isinstance(rule.name, str)
        ]
        raise UserError(unknown_value("--protocol", protocol, keys))
    if not rule.needs_network:
        raise UserError(
            f"--protocol: {protocol!r} is the same for all runs: no training changes it"
        )
    if not rule.applies(registry.parse(config.method)):
        raise UserError(f"--protocol: {protocol!r} means nothing for method {config.method!r}")


def run(
    points: Sequence[Point], protocol: str | None, console: Console, jobs: int | None = 1
) -> list[Result]:
    """Run what is missing, and return what became of each point, in order.

    `jobs` is how many runs go side by side, as in `planned.run`. `console` shows how far a run is
    and its validation figure when it is finished, and no figure of test images. Raises Preempted
    after a signal to stop, and UserError where a run does not have the protocol.
    """
    results = []
    outcomes = planned_lib.run([point.run for point in points], console, figures=False, jobs=jobs)
    for point, outcome in zip(points, outcomes, strict=True):
        if isinstance(outcome, UserError):
            results.append(Result(point, None, outcome))
            continue
        figure = figure_of(outcome, protocol)
        results.append(Result(point, figure))
        told = f"{point.run.title}: {figure.accuracy:.2f} on validation images"
        console.print(told, markup=False)
    return results


def figure_of(manifests: Sequence[TaskManifest], protocol: str | None) -> Figure:
    """Return a run's figure on validation images, from the manifests of its tasks.

    Under `protocol`, or where that is None under the best of the rules that `predict` chooses
    among: those that take each image by itself. Raises UserError where the run has no such figure.
    """
    counts = metrics.counts(manifests[-1], VALIDATION)
    candidates = [protocol] if protocol else [key for key in counts if _is_candidate(key)]
    if not candidates or not set(candidates) <= counts.keys():
        raise UserError(
            f"--protocol: {protocol or 'none given'!r} has no validation figure in this run; it "
            f"has those of {', '.join(counts) or 'none'}"
        )
    figures = []
    for key in candidates:
        found = metrics.figures(manifests, key, VALIDATION)
        images = sum(row["total"] for row in counts[key])
        figures.append(Figure(key, found["final_average"], found["forgetting"], images))
    return max(figures, key=lambda figure: figure.accuracy)


def _is_candidate(protocol: str) -> bool:
    """Whether training has a part in a protocol's figure, and no batch or task is given."""
    rule = rules.rule_of(protocol)
    return rule is not None and rule.can_stand_alone() and not rules.is_reference(protocol)


def ranked(results: Sequence[Result]) -> list[Result]:
    """Return results by accuracy, the highest first and failed runs last; equal ones in order."""
    return sorted(
        results,
        key=lambda result: result.figure.accuracy if result.figure else float("-inf"),
        reverse=True,
    )


def best(results: Sequence[Result]) -> Mapping[str, str]:
    """Return the settings of the best run. Raises the first run's UserError where all failed."""
    first = ranked(results)[0]
    if first.figure is None:
        raise results[0].problem
    return first.point.settings


def shown(settings: Mapping[str, str]) -> str:
    """Return settings as they are written: "learning_rate=0.01, epochs=5"."""
    return ", ".join(f"{name}={text}" for name, text in settings.items())


def markdown(
    results: Sequence[Result], protocol: str | None, command: str, train_command: str
) -> str:
    """Return the sweep's table as Markdown, by accuracy, and the row that is chosen.

    `command` is what the sweep is said to be made by, `train_command` what trains the chosen run
    on all training images. At least one run has to have a figure.
    """
    in_order = ranked(results)
    top = in_order[0]
    config, figure = top.point.run.config, top.figure
    names = list(top.point.settings)
    rows = []
    for result in in_order:
        cells = ["failed", "–", "–"]
        if result.figure:
            accuracy, forgetting = result.figure.accuracy, result.figure.forgetting
            cells = [f"{accuracy:.2f}", f"{forgetting:.2f}", rules.title(result.figure.protocol)]
        rows.append([*result.point.settings.values(), *cells])
    columns = [*names, "val.", "forget", "protocol"]
    if protocol:  # one for all, which the text names
        rows, columns = [row[:-1] for row in rows], columns[:-1]
        by = rules.title(protocol)
    else:
        by = "each run's best rule among those that take each image by itself"
    return "\n".join(
        [
            f"# Sweep on {config.benchmark}, seed {config.seed}",
            "",
            f"Made by `{command}`.",
            "",
            f"Accuracy (val.) and forgetting after the last task, in percent of validation images: "
            f"{config.validation:g} of each class's training images, held out of training. Sorted "
            f"by the accuracy, under {by}. One of the {figure.images} images is "
            f"{100 / figure.images:.2f} points. Test images have no part in this.",
            "",
            *markdown_lib.table(columns, rows, left=("protocol",)),
            "",
            *(
                f"- failed: {shown(result.point.settings)}: {' '.join(str(result.problem).split())}"
                for result in in_order
                if result.problem
            ),
            *([""] if in_order[-1].problem else []),
            f"Chosen: {shown(top.point.settings)}. To train it on all training images:",
            "",
            f"    {train_command}",
            "",
        ]
    )
