"""The paper's tables as runs: published rows, the runs of several seeds that they need, and a table
with our figures beside the paper's.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from soft_jax import paths
from soft_jax.config import Config
from soft_jax.errors import UserError
from soft_jax.evaluation import pictures
from soft_jax.experiment import planned as planned_lib
from soft_jax.experiment.planned import PlannedRun, check_seeds
from soft_jax.paper import printing, runs
from soft_jax.paper.lines import Line, joint_lines, lines_of, reference_lines
from soft_jax.paper.rows import BENCHMARKS, OWN, Row
from soft_jax.paths import Place

Planned = Mapping[int, Sequence[PlannedRun]]  # a row's runs, one a seed, by the row's number


@dataclasses.dataclass(frozen=True)
class Request:
    """A table that is asked for: a number or a name of `OWN`, and how its rows are run.

    `overrides` are settings for all rows; `workdir` holds the runs of all tables; `jobs` is
    how many runs go side by side, as in `planned.run`.
    """

    table: str
    benchmark: str
    overrides: Mapping[str, Any]
    seeds: int
    workdir: Place
    jobs: int | None = 1


def make(request: Request, rows: Sequence[Row], command: str, picture: Place) -> tuple[str, bool]:
    """Run what is missing of `rows`; return the table as Markdown, and whether it has every row.

    A row that can't be run, or fails, has its error in the table; the others are run. That of the
    layers has a picture, a PNG at `picture`. `command` is what the table is said to be made by.
    Raises UserError where no row is run, for the reason of the first.
    """
    console = Console()
    planned, failed = plan(request, rows)
    for number, error in failed.items():  # now, not after hours
        console.print(f"error: row {number}: {error}", markup=False, highlight=False)
    rows = with_published(request, rows)
    gathered = gather(rows, planned, console, request.jobs)
    failed |= gathered.failed
    if not gathered.lines:
        raise next(iter(failed.values()))
    text = text_of(request, rows, command, planned, dataclasses.replace(gathered, failed=failed))
    if request.table == "layers":
        pictures.save(printing.draw_layers(gathered.lines), picture)
        text += f"\n![Accuracy by masked layer]({picture.name})\n"
    return text, not failed


def plan(
    request: Request, rows: Sequence[Row]
) -> tuple[dict[int, list[PlannedRun]], dict[int, UserError]]:
    """Return the runs of each row that can be run, and what is wrong with the others, by number.

    Raises UserError where no row can be.
    """
    check_seeds(request.seeds)
    planned: dict[int, list[PlannedRun]] = {}
    failed: dict[int, UserError] = {}
    for row in rows:
        if row.settings is None:
            continue
        try:
            with paths.reading("workdir"):
                planned[row.number] = runs.plan(
                    row, request.benchmark, request.overrides, request.seeds, request.workdir
                )
        except UserError as error:
            failed[row.number] = error
    if not planned:
        nothing = UserError("--rows: none of these rows is run here; --list shows which are")
        raise next(iter(failed.values()), nothing)
    return planned, failed


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What became of a table's rows: their lines, the references that stand above them, one for
    each backbone and way to group images, and the errors of rows that failed, by number.
    """

    lines: Sequence[Line]
    references: Sequence[Line]
    failed: Mapping[int, UserError]


def gather(
    rows: Sequence[Row], planned: Planned, console: Console, jobs: int | None = 1
) -> Gathered:
    """Run what is missing, and make the lines of the rows."""
    every_run = [each for of_row in planned.values() for each in of_row]
    outcomes = iter(list(planned_lib.run(every_run, console, jobs=jobs)))
    lines: list[Line] = []
    references: dict[tuple[str, str], Line] = {}
    failed: dict[int, UserError] = {}
    for row in rows:
        seeds = [next(outcomes) for _ in planned.get(row.number, ())]
        problems = [outcome for outcome in seeds if isinstance(outcome, UserError)]
        if problems:
            failed[row.number] = problems[0]
        elif seeds:
            lines += lines_of(row, seeds)
            for line in reference_lines(row, seeds):
                references.setdefault((line.backbone, line.protocol), line)
    return Gathered(lines, list(references.values()), failed)


def benchmark_run(request: Request) -> str:
    """Return the benchmark that is run: the one asked for, unless the overrides make it another."""
    changes = {
        name: value
        for name, value in (BENCHMARKS[request.benchmark] | dict(request.overrides)).items()
        if name in ("dataset", "tasks", "scenario", "class_order_seed")
    }
    return Config(**changes).benchmark


def with_published(request: Request, rows: Sequence[Row]) -> list[Row]:
    """Return `rows`, with published figures only where these are of the data and tasks run."""
    if benchmark_run(request) == request.benchmark:
        return list(rows)
    return [dataclasses.replace(row, published={}) for row in rows]


def text_of(
    request: Request,
    rows: Sequence[Row],
    command: str,
    planned: Planned,
    gathered: Gathered,
) -> str:
    """Return the table as Markdown, with the bounds that any table has measured."""
    configs = {number: [each.config for each in of_row] for number, of_row in planned.items()}
    every_config = [config for of_row in configs.values() for config in of_row]
    ran = benchmark_run(request)
    title = OWN[request.table][0] if request.table in OWN else f"Table {request.table}"
    note = f"{request.seeds} seed(s), from {every_config[0].seed} on. " + printing.conditions(
        rows, configs, request.overrides
    )
    if ran != request.benchmark and request.table not in OWN:
        note += f" The published figures are of {request.benchmark}, and left out."
    joint = joint_lines(
        request.benchmark,
        request.overrides,
        request.seeds,
        request.workdir,
        dict.fromkeys(config.backbone for config in every_config),
    )
    lines, references, failed = gathered.lines, gathered.references, gathered.failed
    title = f"{title}, {ran}"
    return printing.markdown(title, command, rows, lines, note, joint, failed, references)
