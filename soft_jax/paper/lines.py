"""From the manifests of a row's runs to the lines of a table, one a protocol."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from soft_jax import paths
from soft_jax.errors import UserError
from soft_jax.evaluation import metrics
from soft_jax.evaluation.metrics import VALIDATION
from soft_jax.evaluation.published import published_rows
from soft_jax.experiment import planned as planned_lib
from soft_jax.inference import rules
from soft_jax.paper import runs
from soft_jax.paper.rows import CLIP_METHODS, METHODS, Row, row_settings
from soft_jax.paths import Place
from soft_jax.store.records import TaskManifest

# Each image by itself, in the way that a method has: one that names no task stands beside the
# others' Prompt ID, and so does a figure that is published without one.
EACH_IMAGE = (rules.PromptId, rules.NoTaskId)


@dataclasses.dataclass(frozen=True)
class Line:
    """One row under one protocol: means and standard deviations over the seeds, in percent, and
    what it costs.

    `each` has the accuracy of every seed, `validation` that on images held out of training, None
    where there are none. `cost` has by name: parameters that are a task's "own" and "shared",
    "own_bytes", "shared_bytes", "memory_bytes" and "statistics_bytes" that are stored, "gflops" of
    a training step (None where XLA can't tell), and seconds of "train", "statistics", "evaluate".
    """

    number: int
    name: str
    protocol: str
    figures: Mapping[str, tuple[float, float]]
    published: Mapping[str, Any] | None
    cost: Mapping[str, float | None]
    joint: bool
    each: Sequence[float]
    backbone: str
    validation: tuple[float, float] | None = None

    @property
    def bounded(self) -> bool:
        """Whether joint training bounds it.

        It does not where the task is given, nor where this is joint training itself.
        """
        return not self.joint and not self.task_is_given

    @property
    def task_is_given(self) -> bool:
        """Whether the protocol tells the task."""
        return rules.grouping_of(self.protocol) == rules.ORACLE

    @property
    def seeds(self) -> int:
        """Return the number of seeds."""
        return len(self.each)


def lines_of(row: Row, seeds: Sequence[Sequence[TaskManifest]]) -> list[Line]:
    """Return a row's lines, one a protocol, from the manifests of each seed's run."""
    last = seeds[0][-1]
    shown = [p for p in last.metrics if _is_shown(p, row, joint=last.num_tasks == 1)]
    return [_line(row, protocol, seeds) for protocol in shown]


def reference_lines(row: Row, seeds: Sequence[Sequence[TaskManifest]]) -> list[Line]:
    """Return the lines of what the frozen backbone gives, from the manifests of each seed's run.

    They are the same whatever the row's method. Empty for runs of a version that had no such rule,
    and for joint training, which has nothing to tell apart by task.
    """
    last = seeds[0][-1]
    protocols = [] if last.num_tasks == 1 else [p for p in last.metrics if rules.is_reference(p)]
    return [_line(row, protocol, seeds) for protocol in protocols]


def _is_shown(protocol: str, row: Row, joint: bool) -> bool:
    rule = rules.rule_of(protocol)
    if rules.is_reference(protocol):
        return False
    if joint:  # the other protocols are one of these, with one task
        return rule in EACH_IMAGE or _is_prototype(protocol)
    if rule is rules.GradientVote and row.shots:  # the other shots are another table's
        return protocol in [rules.GradientVote(shots).key for shots in row.shots]
    return True


def _is_prototype(protocol: str) -> bool:
    return rules.rule_of(protocol) is rules.Prototype


def _line(row: Row, protocol: str, seeds: Sequence[Sequence[TaskManifest]]) -> Line:
    last = seeds[0][-1]
    each = [metrics.figures(manifests, protocol) for manifests in seeds]
    held_out = [
        metrics.figures(manifests, protocol, VALIDATION)["final_average"]
        for manifests in seeds
        if protocol in metrics.counts(manifests[-1], VALIDATION)
    ]
    published = row.published.get(protocol)
    if not published and rules.rule_of(protocol) in EACH_IMAGE:
        published = row.published.get(rules.PER_SAMPLE)
    return Line(
        number=row.number,
        name=row.name,
        protocol=protocol,
        figures={
            key: metrics.mean_and_deviation([figures[key] for figures in each]) for key in each[0]
        },
        published=published,
        cost=_cost(seeds),
        joint=last.num_tasks == 1,
        each=[figures["final_average"] for figures in each],
        backbone=last.backbone["name"],
        validation=metrics.mean_and_deviation(held_out) if len(held_out) == len(seeds) else None,
    )


def _cost(seeds: Sequence[Sequence[TaskManifest]]) -> dict[str, float | None]:
    """Return `Line.cost`, which is the same under every protocol."""
    last = seeds[0][-1]
    parameters, stored = last.parameters, last.bytes
    cost = {
        "own": parameters["adapter"] - parameters["fixed"],
        "shared": parameters["shared"],
        "own_bytes": stored["adapter"],
        "shared_bytes": stored["shared"],
        "memory_bytes": stored["memory"] + stored.get("exemplars", 0),
        "statistics_bytes": stored["statistics"],
        "gflops": last.step_flops and last.step_flops / 1e9,
    }
    for part in ("train", "statistics", "evaluate"):
        totals = [sum(m.seconds.get(part, 0) for m in manifests) for manifests in seeds]
        cost[part] = float(np.mean(totals))
    return cost


@paths.reading("workdir")
def joint_lines(
    benchmark: str,
    overrides: Mapping[str, Any],
    seeds: int,
    workdir: Place,
    backbones: Iterable[str],
) -> list[Line]:
    """Return the lines of joint training on `backbones` under the settings of a table.

    They are of the runs that any table has finished below `workdir`. Raises UserError where that
    can't be read.
    """
    upper_bounds = {
        row["method"]: row_settings(row)
        for row in published_rows()
        if row["method"].startswith("Upper bound")
    }
    lines = []
    for name, settings in [*METHODS.items(), *CLIP_METHODS.items(), *upper_bounds.items()]:
        if settings.get("tasks") != 1:
            continue
        for backbone in backbones:
            row, chosen = Row(0, name, {}, settings), {**overrides, "backbone": backbone}
            try:
                planned = runs.plan(row, benchmark, chosen, seeds, workdir)
                found = [m for each in planned if (m := planned_lib.finished(each))]
            # The settings are not for this method, or what it left is damaged: it is no bound here
            except UserError:
                continue
            lines += lines_of(row, found) if found else []
    return lines


def bound(line: Line, lines: Sequence[Line]) -> float | None:
    """Return the accuracy that joint training reached under the same conditions as `line`.

    It is looked for among `lines`: on all classes, the same backbone, and with prototypes where
    `line` has them. In percent; None where it was not measured, or is no bound for `line`.
    """
    if not line.bounded:
        return None

    def kind(one: Line) -> tuple[str, bool]:
        return one.backbone, _is_prototype(one.protocol)

    joint = [
        one.figures["final_average"][0] for one in lines if one.joint and kind(one) == kind(line)
    ]
    return max(joint, default=None)
