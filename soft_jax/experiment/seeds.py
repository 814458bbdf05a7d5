"""Several seeds of one config: a run each, and what they reach on average.

WORKDIR/seed59/      a run, and so on with seed60, ...
WORKDIR/seeds.json   means, standard deviations and each seed's figures, by protocol
WORKDIR/seeds.md     the same as a table
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from soft_jax import paths
from soft_jax.config import Config
from soft_jax.errors import UserError
from soft_jax.evaluation import markdown as markdown_lib
from soft_jax.evaluation import metrics, report
from soft_jax.evaluation.metrics import TEST, VALIDATION
from soft_jax.experiment import settings as settings_lib
from soft_jax.experiment.planned import PlannedRun, check_seeds
from soft_jax.inference import rules
from soft_jax.paths import Place
from soft_jax.store import formats
from soft_jax.store.files import write_text
from soft_jax.store.records import TaskManifest

# The table's columns; seeds.json has all figures.
_COLUMNS = {
    "final_average": "accuracy",
    "forgetting": "forgetting",
    "task_id_accuracy": "task id",
}


def plan(config: Config, count: int, workdir: Place) -> list[PlannedRun]:
    """Return `count` runs of `config`: with its own seed, and the seeds that follow.

    Raises UserError for a setting that is no good, and where `workdir` is itself a run's folder.
    """
    check_seeds(count)
    for name in ("config.json", "library.json"):
        with paths.reading("workdir"):
            there = (workdir / name).exists()
        if there:
            raise UserError(
                f"workdir: {workdir} is the folder of a run or library (it holds {name}); with "
                "--seeds, name one for the folders of several runs"
            )
    runs = []
    for seed in range(config.seed, config.seed + count):
        of_seed = dataclasses.replace(config, seed=seed)
        settings_lib.check(of_seed)
        runs.append(PlannedRun(of_seed, workdir / f"seed{seed}", f"seed {seed}"))
    return runs


def summary(config: Config, runs: Mapping[int, Sequence[TaskManifest]]) -> dict[str, Any]:
    """Return the figures of runs by seed, as seeds.json has them.

    By part of the data and protocol: each figure's mean, sample standard deviation (n − 1; None for
    one seed) and values, in the order of the seeds.
    """
    return {
        "settings": settings_lib.used_settings(dataclasses.replace(config, seed=min(runs))),
        "seeds": list(runs),
        "figures": {
            part: _by_protocol(list(runs.values()), part)
            for part in (TEST, VALIDATION)
            if metrics.counts(next(iter(runs.values()))[-1], part)
        },
    }


def _by_protocol(runs: Sequence[Sequence[TaskManifest]], part: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for protocol in metrics.counts(runs[0][-1], part):
        each = [metrics.figures(manifests, protocol, part) for manifests in runs]
        figures[protocol] = {}
        for name in each[0]:
            values = [of_seed[name] for of_seed in each]
            mean, deviation = metrics.mean_and_deviation(values)
            figures[protocol][name] = {
                "mean": mean,
                "deviation": deviation if len(values) > 1 else None,
                "each": values,
            }
    return figures


def markdown(config: Config, found: Mapping[str, Any], command: str) -> str:
    """Return the table of a `summary` as Markdown. `command` is what made it."""
    seeds = found["seeds"]
    lines = [
        f"# {settings_lib.used_settings(config)['method']} on {config.benchmark}, {len(seeds)} "
        "seed(s)",
        "",
        f"Made by `{command}`.",
        "",
        f"Seeds {', '.join(map(str, seeds))}: mean ± sample standard deviation (n − 1), after the "
        "last task, in percent of images.",
    ]
    for part, by_protocol in found["figures"].items():
        rows = [
            [rules.title(protocol), *(_cell(figures[name]) for name in _COLUMNS)]
            for protocol, figures in by_protocol.items()
        ]
        columns = (f"protocol, {part} images", *_COLUMNS.values())
        lines += ["", *markdown_lib.table(columns, rows, left=columns[:1])]
    lines += ["", f"{report.escaped(report.FOOTNOTE)}.", ""]
    finals = {
        part: {protocol: figures["final_average"]["each"] for protocol, figures in of_part.items()}
        for part, of_part in found["figures"].items()
    }
    if sentence := report.gain_of_runs(finals):
        lines += [sentence, ""]
    return "\n".join(lines)


def _cell(figure: Mapping[str, Any]) -> str:
    if figure["deviation"] is None:
        return f"{figure['mean']:.2f}"
    return f"{figure['mean']:.2f} ± {figure['deviation']:.2f}"


def write(workdir: Place, found: Mapping[str, Any], text: str) -> None:
    """Write a `summary` and its table. Raises UserError where they can't be written."""
    stamped = formats.stamped("seeds", found)
    write_text(workdir / "seeds.json", json.dumps(stamped, indent=2) + "\n")
    write_text(workdir / "seeds.md", text)
