"""Which settings a run makes use of, and so what makes two runs the same.

Every field of `Config` is one of three kinds:

- *Without effect*: no part of the method, no task-identity rule and no scenario of this run reads
  it (each declares its `settings`). It has to stay at its default (`check`).
- *Runtime* (`config.RUNTIME_FIELDS`): it says where things are, what they are called or how fast
  they go. It may change while a run goes on.
- *Used*: all others. They make the run what it is (`used_settings`), together with the weights of
  the backbone, the images, and the classes of the tasks, each by what it holds and not by where it
  is. `store.records.RunRecord` is all of this; a workdir belongs to one such record, and
  `records.differences` says what another run has otherwise.

A table keeps its runs apart by their used settings, before any file is read. So there the paths of
`told_apart` count too (`planned.folder_of`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from soft_jax import paths
from soft_jax.config import DEFAULTS, RUNTIME_FIELDS, Config
from soft_jax.data import scenarios
from soft_jax.errors import UserError
from soft_jax.inference.rules import RULES
from soft_jax.methods import registry

# What methods have no use for that neither choose prompts nor a task by q(x).
_QUERY_SETTINGS = ("key_loss_weight", "cache_queries")


def _unused(config: Config) -> dict[str, str]:
    """Return the settings that have no effect beside the others, and what they are useless with."""
    parts = registry.parse(config.method)
    method = f"method {parts.name!r}"
    unused = dict.fromkeys(registry.settings_of_parts() - parts.settings_used(config), method)
    if not parts.queries:
        unused |= dict.fromkeys(_QUERY_SETTINGS, method)
    of_rules = {name for rule in RULES.values() for name in rule.settings}
    applying = [rule for rule in RULES.values() if rule.applies(parts)]
    unused |= dict.fromkeys(of_rules - {x for rule in applying for x in rule.settings}, method)
    scenario = scenarios.SCENARIOS.get(config.scenario)
    if scenario:
        of_scenarios = {name for each in scenarios.SCENARIOS.values() for name in each.settings}
        unused |= dict.fromkeys(
            of_scenarios - set(scenario.settings), f"scenario {config.scenario!r}"
        )
    return unused


def check(config: Config) -> None:
    """Raise UserError for a setting that is no good beside the others, or that has no effect."""
    parts = registry.parse(config.method)
    for name in ("data_dir", "backbone_path", "scenario_file"):
        paths.place(getattr(config, name), name)  # no URL, also where nothing reads it
    scenarios.check(config)
    for part in parts.classes:
        part.check(config)
    for name, where in without_effect(config).items():
        raise UserError(
            f"{name}: {getattr(config, name)!r} has no effect with {where}; leave it at "
            f"{DEFAULTS[name]!r}"
        )


def without_effect(config: Config) -> dict[str, str]:
    """Return the settings that are set and have no effect, and what they are useless with.

    A setting is set where it is not at its default. One of the two lists of layers that is not used
    may be as the other: `layers` sets both.
    """
    layers = {"e_prompt_layers": "mask_layers", "mask_layers": "e_prompt_layers"}
    unused, found = _unused(config), {}
    for name, where in unused.items():
        value, twin = getattr(config, name), layers.get(name)
        as_twin = twin and twin not in unused and value == getattr(config, twin)
        if value != DEFAULTS[name] and not as_twin:
            found[name] = where
    return found


def drop_unused(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings`, some of a `Config`'s fields, without those that have no effect."""
    unused = _unused(Config(**settings))
    return {name: value for name, value in settings.items() if name not in unused}


def beside(given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a user has `given`, and a config file's `own` settings that have an effect then.

    Both are some of a `Config`'s fields.
    """
    settings = {**own, **given}
    return {**drop_unused(settings), **given}


def to_keep(config: Config) -> Config:
    """Return `config` as it is stored: what it needs again later is found from any folder.

    Raises UserError where one of these is no path.
    """
    names = ("data_dir", "backbone_path")
    kept = {name: paths.to_keep(getattr(config, name), name) for name in names}
    return dataclasses.replace(config, **kept)


def used_settings(config: Config) -> dict[str, Any]:
    """Return the settings that make a run what it is, with the method in its one spelling."""
    unused = _unused(config)
    settings = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in unused and name not in RUNTIME_FIELDS
    }
    return settings | {"method": registry.parse(config.method).name}


def told_apart(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which of the settings that say where things are also say what a run is.

    That is a backbone's file, and a folder of images or a file of tasks where `settings`, some of a
    `Config`'s fields, name these.
    """
    names = ["backbone_path"]
    if settings.get("dataset") == "folder":
        names.append("data_dir")
    if settings.get("scenario") == "file":
        names.append("scenario_file")
    return tuple(names)
