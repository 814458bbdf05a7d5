"""Format numbers of what is on disk, and the migrations from older formats.

Each kind of JSON on disk ("run": config.json; "task", "training": the manifest of a checkpoint;
"library", "log", "transfer": library.json, a record of its log, transfer.json; "seeds": seeds.json;
"lock": .lock in a bucket) carries a format number and the version that wrote it. A format changes
when a key is added, removed, renamed or comes to mean something else; the change brings one
function, which turns the format before it into it, at the end of the kind's row in `MIGRATIONS`.
Reading goes through all the functions from the format found on. They are never changed afterwards:
tasks and config.json of one run may have been written by different versions, and have to come out
equal.

A new *setting* needs no new format, as long as its default is what runs did before there was such a
setting: where a run's record lacks a setting, `records.differences` takes the default.

Format 0 is what was written before there were numbers: JSON without the key "format".
"""

from collections.abc import Callable, Mapping
from typing import Any

import soft_jax
from soft_jax.errors import UserError
from soft_jax.store import records

Data = dict[str, Any]


class NewerFormat(UserError):
    """What a newer release wrote, which this one can't read."""


# Settings that were renamed after format 0.
_RENAMED = {
    "mask_weights": "target_modules",
    "keep": "density",
    "pull": "key_loss_weight",
    "exemplars": "buffer_size",
    "hold_g_prompt": "freeze_g_prompt",
    "fixed_query": "cache_queries",
}
# Settings, by their new names, that every run of format 0 has in its config.json.
_ALWAYS = frozenset(
    (
        *("dataset", "tasks", "seed", "backbone", "image_size", "dtype", "method"),
        *("mask_layers", "target_modules", "mask_init"),
        *("e_prompt_layers", "e_prompt_length", "g_prompt_layers", "g_prompt_length"),
        *("prefix_layout", "key_loss_weight", "epochs", "batch_size", "learning_rate"),
        *("clip_norm", "crop_scale", "crop_ratio", "flip", "shots"),
    )
)
# Settings that came while format 0 was in use, with what runs did before. The first seven came
# together with the methods that use them: for older runs their values mean nothing.
_CAME_LATER = {
    "density": 0.9,
    "rank": 4,
    "pool_size": 10,
    "top_k": 5,
    "ewc_strength": 1000.0,
    "lwf_strength": 1.0,
    "buffer_size": 1000,
    "mask_storage": "float32",
    "train_images_per_class": 0,
    "test_images_per_class": 0,
    "freeze_g_prompt": False,
    "cache_queries": False,
    "prototype_features": 0,  # no statistics were stored
}
_HOSTS, _STRATEGIES = ("dualprompt", "l2p"), ("pgp",)


def _method_0_to_1(method: str) -> str:
    """Spell a method in the one order: prompt host, strategy, reparametrization."""
    ranks = {**dict.fromkeys(_HOSTS, 0), **dict.fromkeys(_STRATEGIES, 1)}
    return "+".join(sorted(str(method).split("+"), key=lambda part: ranks.get(part, 2)))


def _settings_0_to_1(old: Mapping[str, Any]) -> Data:
    new = {_RENAMED.get(key, key): value for key, value in old.items()}
    if new.get("method") == "softtf" and "density" not in new:
        # Before methods were joined from parts, this was the name of the two together.
        new["method"] = "dualprompt+softtf"
    if "method" in new:
        new["method"] = _method_0_to_1(new["method"])
    if isinstance(new.get("shots"), int):  # there was one number
        new["shots"] = [new["shots"]]
    return _CAME_LATER | new


def config_0_to_1(old: Data) -> Data:
    """Turn the flat dict of settings and two hashes into a run record with its fingerprint.

    All settings are kept, also those that the method does not use: which it uses, the program that
    compares runs knows (`records.differences`). `name` was no part of what a run computes.
    """
    settings = {key: value for key, value in _settings_0_to_1(old).items() if key != "name"}
    hashes = {key: settings.pop(key, None) for key in ("backbone_sha256", "dataset_sha256")}
    missing = {key for key, value in hashes.items() if value is None} | (_ALWAYS - settings.keys())
    _check_keys(missing, settings.keys() - _ALWAYS - _CAME_LATER.keys())
    record = records.RunRecord(settings=settings, tasks=None, **hashes)
    return record.to_json()


def task_manifest_0_to_1(old: Data) -> Data:
    """Add what later manifests hold: counts of classes and tasks, and figures that came later."""
    needed = {"config", "classes", "metrics", "parameters", "run"}
    _check_keys(needed - old.keys(), set())
    config, parameters = old["config"], old["parameters"]
    defaults = {"step_flops": None, "weight_drift": {}, "mask_density": {}, "validation": {}}
    sizes = {
        # All was float32 as long as sizes were not written down.
        **{name: 4 * parameters[name] for name in ("adapter", "shared")},
        **dict.fromkeys(("statistics", "memory", "exemplars"), 0),
    }
    return {
        **defaults,
        **old,
        # Tasks were equal, contiguous slices of the classes.
        "num_classes": config["tasks"] * len(old["classes"]),
        "num_tasks": config["tasks"],
        "config": _settings_0_to_1(config),
        "metrics": {
            _protocol_0_to_1(name, config["shots"]): [_row_0_to_1(row) for row in rows]
            for name, rows in old["metrics"].items()
        },
        "parameters": {"fixed": 0} | parameters,
        "bytes": sizes | old.get("bytes", {}),
        "run": config_0_to_1(old["run"]),
    }


def _protocol_0_to_1(name: str, shots: Any) -> str:
    """Name the shots in a protocol that did not name them while there was one number of them."""
    return f"{name}_{shots or 'all'}" if name == "batch_vote/gradient_id" else name


def _row_0_to_1(row: Data) -> Data:
    """Write how many images were given to each task as a dict of those that got any."""
    given = row.get("identified", {})
    if isinstance(given, list):
        given = {str(task): count for task, count in enumerate(given) if count}
    return row | {"identified": given}


def training_0_to_1(old: Data) -> Data:
    """Say that the state does not tell which run it is of."""
    return {"run_fingerprint": None} | old


def task_manifest_1_to_2(old: Data) -> Data:
    """Say that no temperatures were fitted, and nothing was counted of how sure answers were."""
    return {"temperature": {}, "calibration": {}} | old


def library_0_to_1(old: Data) -> Data:
    """Add the numbers that versions had; of those removed, no format 0 knows.

    Nor does it know what was confused, and where arrays are from that were not trained.
    """
    numbers = {name: max(v["number"] for v in found) for name, found in old["tasks"].items()}
    tasks = {name: [v | {"origin": ""} for v in found] for name, found in old["tasks"].items()}
    return old | {"tasks": tasks, "numbers": numbers, "confusion": {}}


def library_1_to_2(old: Data) -> Data:
    """Say that no version took the place of other tasks'."""
    tasks = {name: [v | {"replaces": []} for v in found] for name, found in old["tasks"].items()}
    return old | {"tasks": tasks}


def library_2_to_3(old: Data) -> Data:
    """Leave out the figures of other tasks that each version had, which are the log's."""

    def of_gate(found: Mapping[str, Any]) -> Data:
        return {key: found[key] for key in ("fallen", "unchecked") if key in found}

    tasks = {
        name: [v | {"gate": of_gate(v["gate"])} for v in found]
        for name, found in old["tasks"].items()
    }
    return old | {"tasks": tasks}


def library_3_to_4(old: Data) -> Data:
    """Say which task each name is of; of names that no task has now, it is not known.

    Nor are the hashes of versions' manifests.
    """
    owners = {name: min(v["id"] for v in found) for name, found in old["tasks"].items()}
    tasks = {
        name: [v | {"manifest_sha256": ""} for v in found] for name, found in old["tasks"].items()
    }
    return old | {"tasks": tasks, "owners": dict.fromkeys(old["numbers"], -1) | owners}


def library_4_to_5(old: Data) -> Data:
    """Change nothing: archives are read as they were written, and releases before can't read new
    ones, in which the bytes of arrays are in another order.
    """
    return old


def log_0_to_1(old: Data) -> Data:
    """Say that nothing was kept of what was measured."""
    return old | {"found": {}}


def log_1_to_2(old: Data) -> Data:
    """Leave out the figures of other tasks by their names, which others may have by now."""
    return old | {"found": {k: v for k, v in old["found"].items() if k != "backward"}}


def log_2_to_3(old: Data) -> Data:
    """Say that all figures are there, and not only those that changed."""
    found = old["found"]
    if "figures" not in found:
        return old
    without = [id_ for id_ in found["figures"] if id_ not in found["backward"]]
    return old | {"found": found | {"whole": True, "gone": [], "without": without}}


# A kind's number of functions is its format today; the function at index n reads format n.
MIGRATIONS: dict[str, tuple[Callable[[Data], Data], ...]] = {
    "run": (config_0_to_1,),
    "task": (task_manifest_0_to_1, task_manifest_1_to_2),
    "training": (training_0_to_1,),
    "library": (
        library_0_to_1,
        library_1_to_2,
        library_2_to_3,
        library_3_to_4,
        library_4_to_5,
    ),
    "log": (log_0_to_1, log_1_to_2, log_2_to_3),
    "transfer": (),
    "seeds": (),
    "lock": (),
}


def stamped(kind: str, data: Mapping[str, Any]) -> Data:
    """Return `data` as it goes to disk, with the kind's format number and this version."""
    return {
        "format": len(MIGRATIONS[kind]),
        "written_by": soft_jax.__version__,
        **data,
    }


def number(data: Any) -> int:
    """Return the format number that `data` carries, 0 where it carries none.

    Raises UserError where it is no whole number, or `data` is no dict.
    """
    if not isinstance(data, dict):
        raise UserError(f"a JSON object was expected, not {type(data).__name__}")
    found = data.get("format", 0)
    if type(found) is not int or found < 0:
        raise UserError(f"format is {found!r}, expected a whole number")
    return found


def upgrade(kind: str, data: Any, where: Any) -> Data:
    """Return `data`, read from the file or folder `where`, in today's format of its kind.

    The format number and the version that wrote it are left out. Raises UserError, naming `where`,
    for a format that is newer than this program, or data that its own format does not allow.
    """
    latest = len(MIGRATIONS[kind])
    try:
        found = number(data)
        if found > latest:
            raise NewerFormat(
                f"it has format {found}, written by soft_jax {data.get('written_by', '(unknown)')};"
                f" this is soft_jax {soft_jax.__version__}, which reads formats up to {latest}: "
                "upgrade this program"
            )
        data = {key: value for key, value in data.items() if key not in ("format", "written_by")}
        for migrate in MIGRATIONS[kind][found:]:
            data = migrate(data)
    except UserError as error:
        raise type(error)(f"{where}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:  # a value of another type
        raise UserError(
            f"{where}: it is not what its format says ({type(error).__name__}: {error}); restore it"
        ) from error
    return data


def _check_keys(missing: set[str], unknown: set[str]) -> None:
    old_names = {new: old for old, new in _RENAMED.items()}
    if missing:
        names = ", ".join(old_names.get(key, key) for key in sorted(missing))
        raise UserError(f"{names} is missing, which every run of its format has; restore it")
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))} is unknown in its format; restore it")
