"""The paper's rows, and some of our own, as settings.

A row is known by the paper's own name for it (`assets/published.json`), which `row_settings` reads:
"DualPrompt-PGP-Soft-TF-L[3,4,5]" names host, strategy, reparametrization and layers. Choices where
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
- Table 3's "CLIP" and "CLIP-PGP" are the host's that it follows: one image prompt for all tasks,
  and no task identity. In "CLIP-Prompt" each task has an image prompt and a key; Soft-TF masks
  q,k,v,proj of the vision tower. Text contexts are a class's own. Pixels are normalized by
  CIFAR-100's mean and std, as the host's are.
- The class-incremental figures of "CLIP" and "CLIP-PGP" are of the host's protocol, which cuts the
  logits to the classes up to the test batch's own task.
- Gradient ID without a number of images is of the first 7, as in the published code; but Table 7's
  of q,k,v,proj, and Table 5's, are of the whole test batch: Table 9 has the same figures as that,
  and others for 7.
- The upper bound of a method is the method with one task of all classes.

In the tables of all methods, prompts, masks, LoRA and adapters are all in L[10,11,12].

DER+MCG is printed as published and not run. It is DER (Yan et al., 2021) with a gate that names the
task (Cai et al., 2023): a whole network more with every task, and all of them classify. No frozen
backbone, nor one that is trained on, carries that.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from soft_jax.config import Config, parse_argument, unknown_value
from soft_jax.errors import UserError
from soft_jax.evaluation.published import has_figures, published_rows, row_name

# `methods.registry` and `inference.rules` are imported where they are used: they start jax, which
# takes longer than to list the tables does.

Settings = Mapping[str, Any]

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
_BACKBONES = {"ImageNet-21K": "vit_b16", "SAM": "vit_b16_sam", "DINO": "vit_b16_dino"}
_WHOLE_NETWORK = {"learning_rate": 0.003}
# Of L2P's rows, where they differ from its row settings or the benchmark's.
_L2P_ON = {"imr_10": {"epochs": 50, "e_prompt_length": 30}}
# What each layer's masks are in, where a row's name does not say.
_LAST_LAYERS = (10, 11, 12)
# The paper gives none for CLIP.
CLIP_LEARNING_RATE = 0.03
CLIP = {
    "backbone": "clip_vit_b16",
    "epochs": 5,
    "batch_size": 32,
    "learning_rate": CLIP_LEARNING_RATE,
}
# Of CLIP's published rows; ours take the normalization that CLIP was trained with.
CLIP_HOST = {"normalization": "cifar100"}
# How Table 3 calls its second figures of a row.
_REPRODUCED = " (reproduced by the authors)"
# How a row is run, and not what it is about.
_CONDITIONS = ("epochs", "batch_size", "learning_rate", "normalization")

# One row a method, under the settings that `--set` gives: every method beside every other, with the
# joint bounds.
METHODS: dict[str, dict[str, Any]] = {
    "head": {"method": "head"},
    "FT": {"method": "ft"} | _WHOLE_NETWORK,
    "EWC": {"method": "ewc"} | _WHOLE_NETWORK,
    "LwF": {"method": "lwf"} | _WHOLE_NETWORK,
    "DER++": {"method": "derpp"} | _WHOLE_NETWORK,
    "iCaRL": {"method": "icarl"} | _WHOLE_NETWORK,
    "BiC": {"method": "bic"} | _WHOLE_NETWORK,
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
    "Upper bound of FT": {"method": "ft", "tasks": 1} | _WHOLE_NETWORK,
    "Upper bound of DualPrompt": {"method": "dualprompt", "tasks": 1},
    "Upper bound of Soft-TF": {"method": "dualprompt+softtf", "tasks": 1},
}

_SOFTTF = {"method": "dualprompt+softtf", "e_prompt_layers": _LAST_LAYERS}
LAYERS = {
    f"DualPrompt-Soft-TF-L[{layer}]": _SOFTTF | {"mask_layers": (layer,)} for layer in range(1, 13)
}

# What is masked in a layer, under the paper's names for it.
WEIGHTS = {
    f"DualPrompt-Soft-TF-{which} {name}": _SOFTTF
    | {"mask_layers": layers, "target_modules": weights}
    for which, layers in (("L[12]", (12,)), ("L[10,11,12]", _LAST_LAYERS))
    for name, weights in (("only ATTN", "qkv"), ("w/o FF", "qkv+proj"), ("w/ FF", "qkv+proj+mlp"))
}

# CLIP's methods, as `METHODS` has those of a vision transformer. Layers are the vision tower's. The
# text tower's depth is its own: there, they are those that `text_mask_layers` says.
_CLIP_MASKED = CLIP | {"mask_layers": _LAST_LAYERS}
_CLIP_SOFTTF = _CLIP_MASKED | {"method": "clipprompt+softtf"}
_CLIP_LORA = {"method": "clipprompt+lora", "target_modules": "qv+proj", "rank": 4}
CLIP_METHODS: dict[str, dict[str, Any]] = {
    "CLIP": CLIP | {"method": "clip"},
    "CLIP-PGP": CLIP | {"method": "clip+pgp"},
    "CLIP-Soft-TF-L[10,11,12]": _CLIP_MASKED | {"method": "clip+softtf"},
    "CLIP-Prompt": CLIP | {"method": "clipprompt"},
    "CLIP-Prompt-Soft-TF-L[10,11,12]": _CLIP_SOFTTF,
    "CLIP-Prompt-Soft-TF in the text tower": CLIP
    | {"method": "clipprompt+softtf", "mask_towers": "text"},
    "CLIP-Prompt-Soft-TF-L[10,11,12] and in the text tower": _CLIP_SOFTTF
    | {"mask_towers": "vision+text"},
    "CLIP-Prompt-WSN c=90%": _CLIP_MASKED | {"method": "clipprompt+wsn", "density": 0.9},
    "CLIP-Prompt-SoftNet c=90%": _CLIP_MASKED | {"method": "clipprompt+softnet", "density": 0.9},
    "CLIP-Prompt-LoRA r=4": _CLIP_MASKED | _CLIP_LORA,
    "CLIP-Prompt-Adapter r=4": _CLIP_MASKED | {"method": "clipprompt+adapter", "rank": 4},
    "S-liPrompts": CLIP | {"method": "clipprompt", "text_context": "task"},
    "Upper bound of CLIP-Prompt": CLIP | {"method": "clipprompt", "tasks": 1},
    "Upper bound of CLIP-Prompt-Soft-TF-L[10,11,12]": _CLIP_SOFTTF | {"tasks": 1},
}

# Tables that the paper does not number: title, and settings by row.
OWN = {
    "methods": ("Every method", METHODS),
    "layers": ("Soft-TF on one layer at a time, E-prompts in L[10,11,12] (Figure 4)", LAYERS),
    "weights": ("Soft-TF on some of a layer's weights", WEIGHTS),
    "clip": ("Every method of CLIP", CLIP_METHODS),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: its number in it, its name, the published figures by protocol, and the
    settings it is run with.

    `settings` is None for a row that is not run here. `shots` are those of the published Gradient
    ID that the table shows; None or empty: all that are evaluated. Published figures may have a
    second pair, "reproduced".
    """

    number: int
    name: str
    published: Mapping[str, Mapping[str, Any]]
    settings: Settings | None
    shots: tuple[int, ...] | None = None


def row_settings(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings that a published row's name and other columns stand for.

    None for a method that is not run here.
    """
    from soft_jax.methods import registry

    name = row["method"]
    if name == "DER+MCG":
        return None
    alone = {
        each.published_as: key for key, each in registry.STRATEGIES.items() if each.fine_tunes
    } | {"FT": registry.FINE_TUNING}
    if name in alone:
        exemplars = {"buffer_size": row["exemplars"]} if row.get("exemplars") else {}
        return {"method": alone[name]} | exemplars | _WHOLE_NETWORK
    if name.startswith("Upper bound of "):
        hosted = name.removeprefix("Upper bound of ")
        named = hosted if hosted == "DualPrompt" else f"DualPrompt-{hosted}-L[10,11,12]"
        return row_settings({"method": named}) | {"tasks": 1} | _other_columns(row)
    joined = {key: part for key, part in registry.STRATEGIES.items() if key not in alone.values()}
    groups = (registry.HOSTS, joined, registry.REPARAMETRIZATIONS)
    parts = [part for group in groups if (part := _part_named(name, group))]
    named = {"method": "+".join(parts)}
    return _of_name(name, parts) | named | _other_columns(row)


def _part_named(name: str, group: Mapping[str, Any]) -> str | None:
    """Return the key of the part of a `group` that a row's name has; None where it has none.

    It is the one of the longest name: "CLIP-Prompt" has "CLIP" in it.
    """
    found = [key for key, each in group.items() if each.published_as and each.published_as in name]
    return max(found, key=lambda key: len(group[key].published_as), default=None)


def _of_name(name: str, parts: Sequence[str]) -> dict[str, Any]:
    """Return the settings that a row's name gives beside its method, which has `parts`."""
    settings: dict[str, Any] = {}
    if "l2p" in parts:
        settings |= {"batch_size": 16, "epochs": 5}
    layers = _layers_in(name)
    if "adapter" in parts:
        settings["mask_layers"] = tuple(range(1, 13))
    elif {"softtf", "wsn", "lora"} & set(parts):
        settings["mask_layers"] = layers or _LAST_LAYERS
    if name.startswith("CLIP"):
        settings |= CLIP | CLIP_HOST
    else:
        last = "mask_layers" in settings and layers != (3, 4, 5)
        settings["e_prompt_layers"] = _LAST_LAYERS if last else (3, 4, 5)
    if "lora" in parts:
        settings["target_modules"] = "qv+proj"
    elif {"softtf", "wsn"} & set(parts):
        only = re.search(r" q,k,v\b(?!,)", name)
        settings["target_modules"] = "qkv" if only else "qkv+proj"
    if found := re.search(r" c=(\d+)%", name):
        settings["density"] = int(found[1]) / 100
    if found := re.search(r" r=(\d+)", name):
        settings["rank"] = int(found[1])
    return settings


def _layers_in(name: str) -> tuple[int, ...]:
    """Return the layers that a row's name gives, as "L[3,4,5]" or "L[1-12]"; () without any."""
    found = re.search(r"L\[([\d,-]+)\]", name)
    written = found and found[1].replace(",", "+")
    return parse_argument(f"mask_layers={written}")["mask_layers"] if written else ()


def _other_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a row's other columns give."""
    settings = {}
    if row.get("pretraining"):
        settings["backbone"] = _BACKBONES[row["pretraining"]]
    if row.get("mask_init"):
        settings["mask_init"] = row["mask_init"]
    if (row.get("task_id") or "").startswith("gradient"):
        settings["shots"] = (_shots(row),)
    return settings


def _shots(row: Mapping[str, Any]) -> int:
    """Return how many images of a test batch a row's Gradient ID looks at; 0: all."""
    if found := re.search(r"(\d+)-shot|batch", row["task_id"]):
        return int(found[1] or 0)
    whole = row.get("table") in (5, 7) and row["method"].endswith(" q,k,v,proj")
    return 0 if whole else Config.shots[0]


def protocol_of(row: Mapping[str, Any]) -> str:
    """Return which of our protocols a published figure belongs to.

    It is the key of a task-identity rule; "per_sample" where the paper names none. Table 3's
    task-incremental figures are those of the task given, whatever the row.
    """
    from soft_jax.inference import rules

    if not row["task_id"]:
        return rules.PER_SAMPLE
    if row["task_id"].startswith("gradient"):
        return rules.GradientVote(_shots(row)).key
    if row["method"].startswith("CLIP") and not row["method"].startswith("CLIP-Prompt"):
        return rules.CutOff().key
    pooled = row["method"].startswith("L2P") and "Soft-TF" not in row["method"]
    return (rules.PoolVote() if pooled else rules.PromptVote()).key


def rows_of(table: str, benchmark: str) -> list[Row]:
    """Return the rows of a table on a benchmark, in the paper's order.

    Published rows of the same settings become one. `table` is a number, or a name of `OWN`. Raises
    UserError for a table that is not there.
    """
    if table in OWN:
        return [
            Row(number, name, {}, settings)
            for number, (name, settings) in enumerate(OWN[table][1].items(), 1)
        ]
    known = {str(row["table"]) for row in published_rows()}
    if table not in known:
        raise UserError(unknown_value("table", table, [*sorted(known, key=int), *OWN]))
    rows: dict[str, Row] = {}
    for row in published_rows():
        if str(row["table"]) == table and has_figures(row, benchmark):
            _add(rows, row, benchmark)
    if not rows:
        raise UserError(f"table: Table {table} has no figures for {benchmark}")
    return list(rows.values())


def _add(rows: dict[str, Row], row: Mapping[str, Any], benchmark: str) -> None:
    """Add a published row to the rows of its table, a dict by their settings."""
    settings, name = row_settings(row), row_name(row)
    if settings and "l2p" in settings["method"].split("+"):
        settings |= _L2P_ON.get(benchmark, {})
    shots = settings.pop("shots", ()) if settings else ()
    key = json.dumps(settings, sort_keys=True) if settings else name
    if settings:
        settings |= {"shots": _all_shots().get(key) or Config.shots}
    before = rows.get(key, Row(len(rows) + 1, name, {}, settings, ()))
    published = dict(before.published)
    for protocol, figures in _figures(row, benchmark).items():
        published[protocol] = {**published.get(protocol, {}), **figures}
    rows[key] = dataclasses.replace(
        before,
        published=published,
        shots=tuple(dict.fromkeys((*before.shots, *shots))),
    )


def _figures(row: Mapping[str, Any], benchmark: str) -> dict[str, Mapping[str, Any]]:
    """Return a published row's accuracy and forgetting, or its seconds, by protocol."""
    from soft_jax.inference import rules

    if "train_seconds" in row:
        seconds = {part: row[f"{part}_seconds"][benchmark] for part in ("train", "test")}
        return {protocol_of(row): seconds | {"device": row["device"]}}
    class_incremental = row.get(benchmark) or row.get(f"{benchmark}_cil")
    task_incremental = row.get(f"{benchmark}_til")
    each = {protocol_of(row): class_incremental, rules.TaskGiven().key: task_incremental}
    again = row["method"].endswith(_REPRODUCED)
    return {
        protocol: {"reproduced": figures} if again else figures
        for protocol, figures in each.items()
        if figures and "accuracy" in figures
    }


@functools.cache
def _all_shots() -> dict[str, tuple[int, ...]]:
    """Return the shots that any table names for a row, by the rest of its settings as JSON.

    With all of them, one run serves all tables.
    """
    found: dict[str, set[int]] = {}
    for row in published_rows():
        if settings := row_settings(row):
            shots = settings.pop("shots", ())
            found.setdefault(json.dumps(settings, sort_keys=True), set()).update(shots)
    return {
        key: tuple(sorted(shots, key=lambda count: count or math.inf))
        for key, shots in found.items()
    }


def settings_of(row: Row, benchmark: str, overrides: Settings, seed: int) -> dict[str, Any]:
    """Return all settings that a row, its benchmark and `overrides` give, the `seed`th run's.

    `overrides` go before the benchmark's settings and the row's own, but for what the row is about.
    Settings that the row's method does not use may be among them: they are for other rows.

    Raises UserError for a row that is not run here, or another backbone for a row that is about its
    own.
    """
    if row.settings is None:
        raise UserError(
            f"table: the row {row.name!r} is not run here: it adds a whole network with every task"
        )
    if benchmark not in BENCHMARKS:
        raise UserError(unknown_value("benchmark", benchmark, BENCHMARKS))
    if "tasks" in row.settings and overrides.get("scenario", "equal") != "equal":
        raise UserError(
            f"scenario: the row {row.name!r} is about {row.settings['tasks']} task(s), an equal "
            "split; leave scenario out, or this row"
        )
    if "backbone" in fixed(row) and "backbone" in overrides:
        raise UserError(
            f"backbone: the row {row.name!r} is about {row.settings['backbone']}; leave backbone "
            "out, or this row"
        )
    settings = BENCHMARKS[benchmark] | dict(row.settings) | dict(overrides) | fixed(row)
    return settings | {"name": "table", "seed": settings["seed"] + seed}


def config_of(row: Row, benchmark: str, overrides: Settings, seed: int) -> Config:
    """Return the config of a row's `seed`th run: `settings_of` without those that have no effect.

    Raises UserError as `settings_of` does, and for a setting that is no good.
    """
    from soft_jax.experiment import settings as settings_lib

    config = Config(**settings_lib.drop_unused(settings_of(row, benchmark, overrides, seed)))
    settings_lib.check(config)
    return config


def fixed(row: Row) -> dict[str, Any]:
    """Return the settings that a row is about, which nothing overrides.

    A run of fewer epochs or at another rate is still this row; one of another method, rank or
    number of tasks is not. Rows on CLIP take any CLIP; others that name a backbone are about it.
    """
    return {
        key: value
        for key, value in row.settings.items()
        if key not in _CONDITIONS and (key, value) != ("backbone", CLIP["backbone"])
    }


def default_benchmark(table: str) -> str:
    """Return the first benchmark that a table has figures for."""
    for benchmark in BENCHMARKS:
        if any(
            str(row["table"]) == table and has_figures(row, benchmark) for row in published_rows()
        ):
            return benchmark
    return next(iter(BENCHMARKS))


def chosen(numbers: str | None, count: int) -> list[int]:
    """Return row numbers, from 1 and in order, from a list such as "1,3-5"; all without a list.

    Raises UserError for what is no such list, or a number above `count`.
    """
    if not numbers:
        return list(range(1, count + 1))
    # Few digits: int fails at thousands of them.
    number = "([0-9]{1,18})"
    found = [re.fullmatch(f"{number}(?:-{number})?", part.strip()) for part in numbers.split(",")]
    parts = [(int(part[1]), int(part[2] or part[1])) for part in found if part]
    if not all(found) or any(first > last for first, last in parts):
        raise UserError(f"--rows: {numbers[:80]!r} is not a list such as 1,3-5")
    # Looked at before it is spelled out: a slip of many digits would fill the memory.
    if not all(first >= 1 and last <= count for first, last in parts):
        raise UserError(f"--rows: {numbers!r}: rows are numbered 1 to {count}; --list shows them")
    return sorted({number for first, last in parts for number in range(first, last + 1)})
