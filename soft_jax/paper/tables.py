"""The paper's tables as runs: published row → settings → runs of several seeds → a table with
ours beside theirs.

A row is known by the paper's own name for it (`assets/published.json`), which `row_settings` reads:
"DualPrompt-PGP-Soft-TF-L[3,4,5]" names host, retention, reparametrisation and layers. Choices where
the paper is silent:

- DualPrompt without layers has its E-prompts in L[3,4,5], as published; with masks in part of
  L[10,11,12] they are in all three.
- Soft-TF and WSN without weights mask q,k,v,proj; without layers, on L2P and in Table 2 too, they
  mask L[10,11,12]. (Table 2's Prompt ID figure of DualPrompt-Soft-TF on ImageNet-21K, 92.42 / 2.44,
  is within 0.01 Table 1's of DualPrompt-PGP-Soft-TF-L[3,4,5]; its Gradient ID figure is
  L[10,11,12]'s.)
- The adapter baseline's parameter counts are those of all 12 layers, whatever its name says: it is
  in all 12.
- Figure 4 moves the masked layer alone; E-prompts stay in L[10,11,12].
- Whole networks (FT, EWC, LwF and those with exemplars) are trained at base learning rate 0.003 on
  every benchmark, a tenth of what prompts take on CIFAR-100: the best of 0.0003, 0.001, 0.003 and
  0.01 for joint training on the small backbone. The paper gives none.
- The upper bound of a method is the method with one task of all classes.

In the table of all methods, prompts, masks, LoRA and adapters are all in L[10,11,12].

DER+MCG is printed as published and not run, and CLIP (Table 3) is not here. DER+MCG is DER (Yan et
al., 2021) with a gate that names the task (Cai et al., 2023): a whole network more with every task,
and all of them classify. No frozen backbone, nor one that is trained on, carries that.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from soft_jax.config import RUNTIME_FIELDS, Config
from soft_jax.errors import UserError
from soft_jax.evaluation import report
from soft_jax.store.folder import Reader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BENCHMARKS: dict[str, dict[str, Any]] = {
    "c100_10": {"dataset": "cifar100", "tasks": 10, "seed": 59},
    "c100_20": {"dataset": "cifar100", "tasks": 20, "seed": 42},
    "imr_10": {
        "dataset": "imagenet_r",
        "tasks": 10,
        "seed": 43,
        "epochs": 50,
        "learning_rate": 0.005,
        "e_prompt_length": 20,
    },
    "cub_5": {"dataset": "caltech_birds2011", "tasks": 5, "seed": 51, "epochs": 10},
    "tiny_10": {"dataset": "tiny_imagenet", "tasks": 10, "seed": 52, "epochs": 5},
}
BACKBONES = {"ImageNet-21K": "vit_b16", "SAM": "vit_b16_sam", "DINO": "vit_b16_dino"}
WHOLE_NETWORK = {"learning_rate": 0.003}
# Methods that train it, by the paper's names.
WHOLE = {"FT": "ft", "EWC": "ewc", "LwF": "lwf", "DER++": "derpp", "iCaRL": "icarl", "BiC": "bic"}
# Of L2P's rows, where they differ from its row settings or the benchmark's.
L2P_ON = {"imr_10": {"epochs": 50, "e_prompt_length": 30}}

# One row a method, under the settings that `--set` gives: every method beside every other, with the
# joint bounds.
METHODS = {
    "head": {"method": "head"},
    **{name: {"method": method} | WHOLE_NETWORK for name, method in WHOLE.items()},
    "L2P": {"method": "l2p"},
    "L2P-PGP": {"method": "l2p+pgp"},
    "L2P-Soft-TF": {"method": "l2p+softtf"},
    "L2P-PGP-Soft-TF": {"method": "l2p+pgp+softtf"},
    "DualPrompt": {"method": "dualprompt"},
    "DualPrompt-PGP": {"method": "dualprompt+pgp"},
    "DualPrompt-Soft-TF": {"method": "dualprompt+softtf"},
    "DualPrompt-PGP-Soft-TF": {"method": "dualprompt+pgp+softtf"},
    "DualPrompt-WSN c=90%": {"method": "dualprompt+wsn", "density": 0.9},
    "DualPrompt-SoftNet c=90%": {"method": "dualprompt+softnet", "density": 0.9},
    "DualPrompt-LoRA r=4": {"method": "dualprompt+lora", "target_modules": "qv+proj", "rank": 4},
    "DualPrompt-Adapter r=4": {"method": "dualprompt+adapter", "rank": 4},
    "Soft-TF": {"method": "softtf"},
    "LoRA r=4": {"method": "lora", "target_modules": "qv+proj", "rank": 4},
    "Upper bound of FT": {"method": "ft", "tasks": 1} | WHOLE_NETWORK,
    "Upper bound of DualPrompt": {"method": "dualprompt", "tasks": 1},
    "Upper bound of Soft-TF": {"method": "dualprompt+softtf", "tasks": 1},
}

# What Soft-TF is put beside in words: other ways to a task's own weights, and none.
RIVALS = {
    "DualPrompt-Soft-TF": (
        "DualPrompt-WSN c=90%",
        "DualPrompt-SoftNet c=90%",
        "DualPrompt-LoRA r=4",
        "DualPrompt-Adapter r=4",
    ),
    "Soft-TF": ("head", "LoRA r=4"),
}

_SOFTTF = {"method": "dualprompt+softtf", "e_prompt_layers": (10, 11, 12)}
LAYERS = {
    f"DualPrompt-Soft-TF-L[{layer}]": _SOFTTF | {"mask_layers": (layer,)} for layer in range(1, 13)
}

# What is masked in a layer, under the paper's names for it.
WEIGHTS = {
    f"DualPrompt-Soft-TF-{which} {name}": _SOFTTF
    | {"mask_layers": layers, "target_modules": weights}
    for which, layers in (("L[12]", (12,)), ("L[10,11,12]", (10, 11, 12)))
    for name, weights in (("only ATTN", "qkv"), ("w/o FF", "qkv+proj"), ("w/ FF", "qkv+proj+mlp"))
}

# Tables that the paper does not number: title, and settings by row.
OWN = {
    "methods": ("Every method", METHODS),
    "layers": ("Soft-TF on one layer at a time, E-prompts in L[10,11,12] (Figure 4)", LAYERS),
    "weights": ("Soft-TF on some of a layer's weights", WEIGHTS),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: its number in it, its name, the published figures by protocol, and the
    settings it is run with.

    `settings` is None for a row that is not run here. `shots` are those of the published Gradient
    ID that the table shows; None: all that are evaluated.
    """

    number: int
    name: str
    published: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any] | None
    shots: tuple[int, ...] | None = None


def row_settings(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings that a published row's name stands for; None for a method that is not run
    here.
    """
    name, settings = row["method"], {}
    if name.startswith("CLIP") or name == "DER+MCG":
        return None
    if name in WHOLE:
        exemplars = {"buffer_size": row["exemplars"]} if row.get("exemplars") else {}
        return {"method": WHOLE[name]} | exemplars | WHOLE_NETWORK
    if name.startswith("Upper bound of "):
        hosted = name.removeprefix("Upper bound of ")
        inner = row_settings(
            {"method": f"DualPrompt-{hosted}-L[10,11,12]" if hosted != "DualPrompt" else hosted}
        )
        return inner | {"tasks": 1} | _qualified(row)
    parts = [
        part
        for key, part in (("DualPrompt", "dualprompt"), ("L2P", "l2p"), ("PGP", "pgp"))
        if key in name
    ]
    if "l2p" in parts:
        settings |= {"batch_size": 16, "epochs": 5}
    layers = (
        tuple(int(layer) for layer in re.search(r"L\[([\d,]+)\]", name)[1].split(","))
        if "L[" in name
        else ()
    )
    for key, part in (
        ("Soft-TF", "softtf"),
        ("WSN", "wsn"),
        ("LoRA", "lora"),
        ("Adapter", "adapter"),
    ):
        if key in name:
            parts.append(part)
            settings["mask_layers"] = (
                tuple(range(1, 13)) if part == "adapter" else layers or (10, 11, 12)
            )
    settings["e_prompt_layers"] = (
        (10, 11, 12) if "mask_layers" in settings and layers != (3, 4, 5) else (3, 4, 5)
    )
    if "lora" in parts:
        settings["target_modules"] = "qv+proj"
    elif "softtf" in parts or "wsn" in parts:
        settings["target_modules"] = "qkv" if name.endswith(" q,k,v") else "qkv+proj"
    if found := re.search(r" c=(\d+)%", name):
        settings["density"] = int(found[1]) / 100
    if found := re.search(r" r=(\d+)", name):
        settings["rank"] = int(found[1])
    return settings | {"method": "+".join(parts)} | _qualified(row)


def _qualified(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's other columns set."""
    settings = {}
    if row.get("pretraining"):
        settings["backbone"] = BACKBONES[row["pretraining"]]
    if row.get("mask_init"):
        settings["mask_init"] = row["mask_init"]
    if (row.get("task_id") or "").startswith("gradient"):
        found = re.search(r"(\d+)-shot|batch", row["task_id"])
        settings["shots"] = (int(found[1] or 0),) if found else Config.shots
    return settings


def protocol_of(row: Mapping[str, Any]) -> str:
    """Which of our protocols a published figure is under."""
    if not row["task_id"]:
        return "per_sample"
    if row["task_id"].startswith("gradient"):
        (shots,) = _qualified(row)["shots"]
        return report.vote_gradient(shots)
    return (
        "batch_vote/pool"
        if row["method"].startswith("L2P") and "Soft-TF" not in row["method"]
        else "batch_vote/prompt_id"
    )


def rows_of(table: str, benchmark: str) -> list[Row]:
    """The rows of a table on a benchmark, in the paper's order; published rows of the same
    settings become one.

    `table` is a number, or a name of `OWN`. Raises UserError for a table that is not there.
    """
    if table in OWN:
        return [
            Row(number, name, {}, settings)
            for number, (name, settings) in enumerate(OWN[table][1].items(), 1)
        ]
    known = {str(row["table"]) for row in report.published_rows()} - {"3"}
    if table == "3":
        raise UserError("table: Table 3 is CLIP's, which is not here")
    if table not in known:
        raise UserError(
            f"table: {table!r} is unknown; known are {', '.join([*sorted(known, key=int), *OWN])}"
        )
    rows: dict[str, Row] = {}
    for row in report.published_rows():
        if str(row["table"]) != table or benchmark not in row.get("train_seconds", row):
            continue
        settings = row_settings(row)
        if settings and "l2p" in settings["method"]:
            settings |= L2P_ON.get(benchmark, {})
        name = report.row_name(row)
        shots = settings.pop("shots", Config.shots) if settings else ()
        key = json.dumps(settings, sort_keys=True) if settings else name
        figures = {protocol_of(row): row[benchmark]} if "accuracy" in row.get(benchmark, {}) else {}
        if "train_seconds" in row:
            figures = {
                protocol_of(row): {
                    part: row[f"{part}_seconds"][benchmark] for part in ("train", "test")
                }
                | {"device": row["device"]}
            }
        if settings:
            settings |= {"shots": _shots().get(key, Config.shots)}
        before = rows.get(key, Row(len(rows) + 1, name, {}, settings, ()))
        shown = tuple(dict.fromkeys((*before.shots, *shots)))
        rows[key] = dataclasses.replace(
            before, published={**before.published, **figures}, shots=shown
        )
    if not rows:
        raise UserError(f"table: Table {table} has no figures for {benchmark}")
    return list(rows.values())


@functools.cache
def _shots() -> dict[str, tuple[int, ...]]:
    """By the rest of a row's settings, as JSON: the shots that any table names for it, so that
    one run serves all tables.
    """
    found: dict[str, set[int]] = {}
    for row in report.published_rows():
        if settings := row_settings(row):
            shots = settings.pop("shots", Config.shots)
            found.setdefault(json.dumps(settings, sort_keys=True), set()).update(shots)
    return {
        key: tuple(sorted(shots, key=lambda count: count or math.inf))
        for key, shots in found.items()
    }


def config_of(row: Row, benchmark: str, overrides: Mapping[str, Any], seed: int) -> Config:
    """A row's config. `overrides` go before the benchmark's settings and the row's own, but for
    what the row is about.

    Raises UserError for a row that is not run here, a setting that is no good, or another backbone
    for a row that is about its own.
    """
    if row.settings is None:
        raise UserError(
            f"table: the row {row.name!r} is not run here: it adds a whole network with every task"
        )
    if benchmark not in BENCHMARKS:
        raise UserError(f"benchmark: {benchmark!r} is unknown; known are {', '.join(BENCHMARKS)}")
    if "backbone" in row.settings and "backbone" in overrides:
        raise UserError(
            f"backbone: the row {row.name!r} is about {row.settings['backbone']}; leave backbone "
            "out, or this row"
        )
    settings = BENCHMARKS[benchmark] | dict(row.settings) | dict(overrides)
    return Config(**settings | fixed(row) | {"name": "table", "seed": settings["seed"] + seed})


def fixed(row: Row) -> dict[str, Any]:
    """The settings that a row is about, which nothing overrides.

    A run of fewer epochs or at another rate is still this row; one of another method, rank or
    number of tasks is not.
    """
    return {
        key: value
        for key, value in row.settings.items()
        if key not in ("epochs", "batch_size", "learning_rate")
    }


def folder_of(config: Config) -> str:
    """The run's folder below the table's workdir: its method, what tells it apart, a digest of
    all its settings, and its seed.
    """
    settings = {
        k: v
        for k, v in dataclasses.asdict(config).items()
        if k not in {*RUNTIME_FIELDS, "name", "seed"}
    }
    settings |= {
        field: getattr(config, field)
        for field in told_apart(config.dataset)
        if getattr(config, field)
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.method}-{config.dataset}-{config.tasks}x-{digest}/seed{config.seed}"


def told_apart(dataset: str | None) -> tuple[str, ...]:
    """Settings of where things are that say what they are too: a backbone's file, and a folder
    of images.
    """
    return ("backbone_path", "data_dir") if dataset == "folder" else ("backbone_path",)


def finished(workdir: Path, config: Config) -> list[dict[str, Any]] | None:
    """The manifests of a run that is whole, else None."""
    reader = Reader(workdir)
    if len(reader.present()) < config.tasks or not (workdir / "config.json").exists():
        return None
    reader.read_identity()
    return [reader.load_task_manifest(task) for task in range(config.tasks)]


def run(
    configs: Sequence[Config], workdir: Path, console: Console
) -> list[list[dict[str, Any]] | UserError]:
    """The manifests of each config's run below `workdir`, or what was wrong with it; those that
    are not finished are run, or continued.

    One data set is held at a time, and seeds of one method share its compiled programs. Raises
    Preempted after a SIGTERM.
    """
    from soft_jax.data import sources
    from soft_jax.experiment import loop  # they start jax, which a finished table does without

    @functools.lru_cache(maxsize=1)
    def load(name: str, folder: str) -> sources.Dataset | UserError:
        try:
            return sources.load(name, folder)
        except UserError as error:  # what can't be had is not tried for again
            return error

    done = []
    for number, config in enumerate(configs, 1):
        folder = workdir / folder_of(config)
        try:
            manifests = finished(folder, config)
            if manifests is None:
                console.rule(
                    f"{number} of {len(configs)}: {config.method}, {config.tasks} tasks, seed "
                    f"{config.seed}"
                )
                if isinstance(dataset := load(config.dataset, config.data_dir), UserError):
                    raise dataset
                manifests = loop.run(config, folder, console, dataset)
            done.append(manifests)
        except UserError as error:  # hours of other rows may be before and behind it
            console.print(f"error: {error}")
            done.append(error)
    return done


@dataclasses.dataclass(frozen=True)
class Line:
    """One row under one protocol: means and standard deviations over the seeds, in percent, and
    what it costs.

    `each` has the accuracy of every seed.
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

    @property
    def bounded(self) -> bool:
        """Whether joint training bounds it: not where the task is given, nor joint training
        itself.
        """
        return not self.joint and not self.protocol.startswith("oracle")

    @property
    def seeds(self) -> int:
        """How many seeds it is of."""
        return len(self.each)


def lines_of(row: Row, runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[Line]:
    """A row's lines, one a protocol, from the manifests of its seeds."""
    last, lines = [manifests[-1] for manifests in runs], []
    cost = {
        "own": last[0]["parameters"]["adapter"] - last[0]["parameters"]["fixed"],
        "shared": last[0]["parameters"]["shared"],
        "shared_bytes": last[0]["bytes"]["shared"],
        "memory_bytes": last[0]["bytes"]["memory"] + last[0]["bytes"].get("exemplars", 0),
        "gflops": last[0]["step_flops"] and last[0]["step_flops"] / 1e9,
    }
    for part in ("train", "statistics", "evaluate"):
        cost[part] = float(
            np.mean([sum(m["seconds"][part] for m in manifests) for manifests in runs])
        )
    for protocol in runs[0][0]["metrics"]:
        each = [report.figures(manifests, protocol) for manifests in runs]
        figures = {key: _statistics([e[key] for e in each]) for key in each[0]}
        published = row.published.get(protocol) or (
            row.published.get("per_sample") if protocol in _EACH_IMAGE else None
        )
        joint = len(runs[0]) == 1
        if joint and protocol not in (*_EACH_IMAGE, "per_sample/prototype"):
            continue  # with one task, the others are one of these
        if (
            protocol.startswith(report.VOTE_GRADIENT)
            and row.shots
            and protocol not in map(report.vote_gradient, row.shots)
        ):
            continue  # another table's
        accuracies = [e["final_average"] for e in each]
        # Prototypes alone need the statistics.
        own = last[0]["bytes"]["adapter"] + (
            last[0]["bytes"]["statistics"] if protocol == "per_sample/prototype" else 0
        )
        costs = cost | {"own_bytes": own}
        lines.append(
            Line(
                row.number,
                row.name,
                protocol,
                figures,
                published,
                costs,
                joint,
                accuracies,
                last[0]["backbone"]["name"],
            )
        )
    return lines


def _statistics(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n − 1; 0 for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def joint_lines(
    benchmark: str,
    overrides: Mapping[str, Any],
    seeds: int,
    workdir: Path,
    backbones: Iterable[str],
) -> list[Line]:
    """Joint training on `backbones` under the settings of a table, as far as any table has
    finished it below `workdir`.
    """
    published = {
        row["method"]: row_settings(row)
        for row in report.published_rows()
        if row["method"].startswith("Upper bound")
    }
    lines = []
    for name, settings in [*METHODS.items(), *published.items()]:
        if settings.get("tasks") != 1:
            continue
        for backbone in backbones:
            row = Row(0, name, {}, settings)
            try:
                configs = [
                    config_of(row, benchmark, {**overrides, "backbone": backbone}, seed)
                    for seed in range(seeds)
                ]
                runs = [finished(workdir / folder_of(config), config) for config in configs]
            # The settings are not for this method, or what it left is damaged: it is no bound here
            except UserError:
                continue
            lines += lines_of(row, found) if (found := [one for one in runs if one]) else []
    return lines


def bound(line: Line, lines: Sequence[Line]) -> float | None:
    """What joint training reached among `lines` in what `line` is: all classes, its backbone,
    with or without prototypes.

    None where that was not measured, or does not bound it.
    """
    if not line.bounded:
        return None

    def kind(one: Line) -> tuple[str, bool]:
        return one.backbone, one.protocol.endswith("prototype")

    joint = [
        one.figures["final_average"][0] for one in lines if one.joint and kind(one) == kind(line)
    ]
    return max(joint, default=None)


def _mean(values: tuple[float, float], seeds: int) -> str:
    return f"{values[0]:.2f} ± {values[1]:.2f}" if seeds > 1 else f"{values[0]:.2f}"


def _published(figures: Mapping[str, Any] | None) -> str:
    if not figures:
        return "–"
    if "train" in figures:
        return f"training {figures['train']} s, test {figures['test']} s on a {figures['device']}"
    return " / ".join(
        f"{figures[key]:.2f}" for key in ("accuracy", "forgetting") if figures.get(key) is not None
    )


def _cells(line: Line, best: float | None) -> list[str]:
    shown = {key: _mean(values, line.seeds) for key, values in line.figures.items()}
    cost, given = line.cost, line.protocol.startswith("oracle")
    above = best is not None and line.figures["final_average"][0] > best
    return [
        str(line.number),
        line.name + (" (joint)" if line.joint else ""),
        report.title(line.protocol).replace("*", "\\*"),
        shown["final_average"] + (" **▲**" if above else ""),
        "–" if line.joint else shown["forgetting"],
        "–" if line.joint or given else shown["task_id_accuracy"],
        _published(line.published),
        f"{cost['own']:,} + {cost['shared']:,}",
        " + ".join(
            f"{cost[part] / 2**20:.2f}" for part in ("own_bytes", "shared_bytes", "memory_bytes")
        ),
        "–" if cost["gflops"] is None else f"{cost['gflops']:.1f}",
        " + ".join(f"{cost[part]:.0f}" for part in ("train", "statistics", "evaluate")),
    ]


def markdown(
    title: str,
    command: str,
    rows: Sequence[Row],
    lines: Sequence[Line],
    settings: str,
    joint: Sequence[Line] = (),
    failed: Mapping[int, UserError] = types.MappingProxyType({}),
) -> str:
    """The table as Markdown. `joint` are lines of joint training that bound those of the table,
    whether or not they are in it.
    """
    columns = [
        "#",
        "row",
        "protocol",
        "accuracy",
        "forgetting",
        "task id",
        "published",
        "parameters: own + shared",
    ]
    columns += [
        "MiB a task: own + shared + memory",
        "GFLOP a step",
        "seconds: training + after it + evaluation",
    ]
    out = [
        f"# {title}",
        "",
        f"Made by `{command}`; a row alone by its number, with `--rows=#`.",
        "",
        settings,
        "",
    ]
    out += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    measured = [*lines, *joint]
    bounds = [bound(line, measured) for line in lines]
    out += [
        "| " + " | ".join(_cells(line, best)) + " |"
        for line, best in zip(lines, bounds, strict=True)
    ]
    for row in rows:
        for figures in row.published.values() if row.settings is None else ():
            out.append(
                f"| {row.number} | {row.name} | as published, not run |{' – |' * 3} "
                f"{_published(figures)} |{' – |' * 4}"
            )
        if row.number in failed:
            problem = " ".join(str(failed[row.number]).split()).replace("|", "\\|")
            out.append(f"| {row.number} | {row.name} | failed: {problem} |{' – |' * 8}")
    out += ["", report.FOOTNOTE.replace("*", "\\*", 1) + ".", ""]
    out += [
        "Accuracy and forgetting after the last task, in percent of test images, ± the standard "
        "deviation over seeds; published: "
        "accuracy / forgetting, on ViT-B/16. Memory is what a method holds of older tasks; what is "
        "a prototype row's own counts the "
        "statistics of q(x). After training come those statistics and what the method keeps; "
        "evaluation is of all protocols and stages.",
        "",
    ]
    without = dict.fromkeys(
        line.number
        for line, best in zip(lines, bounds, strict=True)
        if line.bounded and best is None
    )
    if any(line.joint for line in measured):
        legend = (
            "▲: above joint training on all classes, as measured here on the same backbone "
            "(for prototype rows: with prototypes)."
        )
        if without:
            legend += (
                f" That is not measured for row(s) {', '.join(map(str, without))}: nothing "
                "marks what is above it there."
            )
        out += [legend, ""]
    else:
        out += [
            "Joint training on all classes, the bound that ▲ marks what is above of, is not "
            "measured under these settings; "
            "`table methods` has it in its last rows.",
            "",
        ]
    return "\n".join([*out, *reading(lines)])


# Each image by itself, in the way that a method has: one that names no task stands beside the
# others' Prompt ID, and so does a figure that is published without one.
_EACH_IMAGE = ("per_sample/prompt_id", "per_sample/no_task_id")
# Protocols that two methods are compared under.
_COMPARED = {
    "per_sample/prompt_id": _EACH_IMAGE,
    "per_sample/prototype": ("per_sample/prototype",),
    "batch_vote/prompt_id": ("batch_vote/prompt_id", "batch_vote/pool"),
    "oracle/task_given": ("oracle/task_given",),
}


# What the batch decides in the place of each image; how the protocol begins.
_VOTED = {
    "per_sample/no_task_id": "batch_vote/pool",
    "per_sample/prompt_id": "batch_vote/prompt_id",
    "per_sample/gradient_id": report.VOTE_GRADIENT,
}


def reading(lines: Sequence[Line]) -> list[str]:
    """What the figures say, as Markdown: the best, what Soft-TF does beside each method, what
    the vote over single-task batches adds.
    """
    found = {(line.name, line.protocol): line.each for line in lines if not line.joint}
    out = []
    for title, prefix in (("each image by itself", "per_sample"), ("the task given", "oracle")):
        ranked = sorted(
            (
                (np.mean(each), each, key)
                for key, each in found.items()
                if key[1].startswith(prefix)
            ),
            reverse=True,
        )
        if len(ranked) > 1:
            best = "; ".join(
                f"{name} ({report.title(protocol)}) {_mean(_statistics(each), len(each))}"
                for _, each, (name, protocol) in ranked[:3]
            )
            out.append(
                f"- Highest with {title}: {best}. Lowest: {ranked[-1][2][0]}, {ranked[-1][0]:.2f}."
            )
    for name in dict.fromkeys(name for name, _ in found):
        host = re.sub(r"-Soft-TF(-L\[[\d,]+\])?( q,k,v(,proj)?)?", "", name)
        if host != name and (changes := _differences(found, name, host)):
            out.append(f"- {name} beside {host}: {changes} points.")
    for one, others in RIVALS.items():
        for other in others:
            if changes := _differences(found, one, other):
                out.append(f"- {one} beside {other}: {changes} points.")
    leaks = {}
    for (name, protocol), each in found.items():
        if protocol not in _VOTED:
            continue
        voted = next(
            (p for same, p in found if same == name and p.startswith(_VOTED[protocol])), None
        )
        if voted:
            leaks[f"{name} {voted}"] = np.mean(found[name, voted]) - np.mean(each)
    if leaks:
        most = max(leaks, key=leaks.get)
        out.append(
            f"- Going by batches of one task adds {np.mean(list(leaks.values())):+.2f} points in "
            f"the mean of {len(leaks)} pairs of rows, "
            f"{leaks[most]:+.2f} at most ({most})."
        )
    if out and any(len(each) > 1 for each in found.values()):
        out += [
            "",
            "Differences are taken seed by seed: mean ± standard deviation. Of few seeds, those "
            "below twice that say little.",
        ]
    return ["## What the figures say", "", *out, ""] if out else []


def _differences(found: Mapping[tuple[str, str], Sequence[float]], one: str, other: str) -> str:
    """By how much the accuracies of `one` are above those of `other`, by protocol."""
    parts = []
    for protocol, theirs in _COMPARED.items():
        new, old = (
            next((found[name, p] for p in theirs if (name, p) in found), None)
            for name in (one, other)
        )
        if new and old:
            mean, deviation = _statistics(np.subtract(new, old))
            parts.append(
                f"{protocol} {mean:+.2f}" + (f" ± {deviation:.2f}" if len(new) > 1 else "")
            )
    return ", ".join(parts)


def draw_layers(lines: Sequence[Line]) -> "Figure":
    """Figure 4: accuracy by masked layer, a curve a protocol."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for protocol in dict.fromkeys(line.protocol for line in lines):
        these = [line for line in lines if line.protocol == protocol]
        layers = [int(re.search(r"L\[(\d+)\]", line.name)[1]) for line in these]
        means, stds = zip(*(line.figures["final_average"] for line in these), strict=True)
        axes.errorbar(layers, means, stds, marker="o", capsize=3, label=report.title(protocol))
    axes.set(xlabel="masked layer", ylabel="accuracy after the last task (%)", xticks=range(1, 13))
    axes.legend(fontsize="small")
    return figure


def _conditions(
    rows: Sequence[Row], configs: Mapping[int, Sequence[Config]], overrides: Mapping[str, Any]
) -> str:
    """Backbone, epochs, batches, rates and images, and for which rows; and where an override did
    not reach.

    `configs` has those of every seed by a row's number; rows that are not run have none.
    """
    kept: dict[str, list[int]] = {}
    for row in rows:
        for key, value in fixed(row).items() if row.settings else ():
            if overrides.get(key, value) != value:
                kept.setdefault(key, []).append(row.number)
    but = "".join(
        f" {key} is what rows {', '.join(map(str, numbers))} are about: theirs is their own."
        for key, numbers in kept.items()
    )
    by_condition: dict[str, list[int]] = {}
    for number, (c, *_) in configs.items():
        images = (
            f"{c.train_images_per_class or 'all'} training and "
            f"{c.test_images_per_class or 'all'} test images a class"
        )
        text = (
            f"{c.backbone}, {c.epochs} epoch(s) in batches of {c.batch_size} at base rate "
            f"{c.learning_rate}, {images}"
        )
        by_condition.setdefault(text, []).append(number)
    if len(by_condition) == 1:
        return f"{next(iter(by_condition))}." + but
    return (
        " ".join(
            f"Rows {', '.join(map(str, numbers))}: {text}."
            for text, numbers in by_condition.items()
        )
        + but
    )


def default_benchmark(table: str) -> str:
    """The first benchmark that a table has figures for."""
    for benchmark in BENCHMARKS:
        if any(str(row["table"]) == table and benchmark in row for row in report.published_rows()):
            return benchmark
    return next(iter(BENCHMARKS))


def chosen(numbers: str | None, count: int) -> list[int]:
    """Row numbers from 1 in order, of a list such as "1,3-5"; all without one. Raises UserError
    for what is no such list.
    """
    if not numbers:
        return list(range(1, count + 1))
    found = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in numbers.split(",")]
    parts = [(int(part[1]), int(part[2] or part[1])) for part in found if part]
    if not all(found) or any(first > last for first, last in parts):
        raise UserError(f"--rows: {numbers!r} is not a list such as 1,3-5")
    out = sorted({number for first, last in parts for number in range(first, last + 1)})
    if not 1 <= out[0] <= out[-1] <= count:
        raise UserError(f"--rows: {numbers!r}: rows are numbered 1 to {count}; --list shows them")
    return out


def make(
    table: str,
    benchmark: str,
    rows: Sequence[Row],
    overrides: Mapping[str, Any],
    seeds: int,
    workdir: Path,
    command: str,
    picture: Path,
) -> tuple[str, bool]:
    """Run what is missing of `rows` below `workdir`: the table as Markdown, and whether every
    row is in it.

    A row that can't be run, or fails, has its error in the table; the others are run. That of the
    layers has a picture, a PNG at `picture`. Raises UserError where no row is run, for the reason
    of the first.
    """
    console, lines, failed, configs = Console(), [], {}, {}
    for row in rows:
        try:
            if row.settings is not None:
                configs[row.number] = [
                    config_of(row, benchmark, overrides, seed) for seed in range(seeds)
                ]
        except UserError as error:
            failed[row.number] = error
    if not configs:
        raise next(
            iter(failed.values()),
            UserError("--rows: none of these rows is run here; --list shows which are"),
        )
    for number, error in failed.items():  # now, not after hours
        console.print(f"error: row {number}: {error}")
    wanted = [config for each in configs.values() for config in each]
    outcomes = iter(run(wanted, workdir, console))
    # What was published is of the benchmark's own data and tasks.
    setting = BENCHMARKS[benchmark] | dict(overrides)
    ran = Config(dataset=setting["dataset"], tasks=setting["tasks"]).benchmark
    if ran != benchmark:
        rows = [dataclasses.replace(row, published={}) for row in rows]
    for row in rows:
        runs = [next(outcomes) for _ in configs.get(row.number, ())]
        if problem := next((outcome for outcome in runs if isinstance(outcome, UserError)), None):
            failed[row.number] = problem
        elif runs:
            lines += lines_of(row, runs)
    if not lines:
        raise next(iter(failed.values()))
    title = OWN[table][0] if table in OWN else f"Table {table}"
    note = f"{seeds} seed(s), from {wanted[0].seed} on. " + _conditions(rows, configs, overrides)
    if ran != benchmark and table not in OWN:
        note += f" The published figures are of {benchmark}, and left out."
    joint = joint_lines(
        benchmark, overrides, seeds, workdir, dict.fromkeys(config.backbone for config in wanted)
    )
    text = markdown(f"{title}, {ran}", command, rows, lines, note, joint, failed)
    if table == "layers":
        draw_layers(lines).savefig(picture, dpi=100)
        text += f"\n![Accuracy by masked layer]({picture.name})\n"
    return text, not failed
