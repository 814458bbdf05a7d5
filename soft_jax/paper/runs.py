"""The runs that a table's rows need, and where below the table's workdir each is kept: in the
folder that `experiment.planned` names, or in that of the program of format 0.
"""

from collections.abc import Mapping
from typing import Any

from soft_jax.config import DEFAULTS, Config
from soft_jax.experiment import planned
from soft_jax.experiment.planned import PlannedRun
from soft_jax.paper.rows import Row, config_of, settings_of
from soft_jax.paths import Place


def plan(
    row: Row, benchmark: str, overrides: Mapping[str, Any], seeds: int, workdir: Place
) -> list[PlannedRun]:
    """Return the runs of a row, one a seed. Raises UserError as `config_of` does."""
    configs = [config_of(row, benchmark, overrides, seed) for seed in range(seeds)]
    # What the method does not use was part of older folders' names.
    settings = [settings_of(row, benchmark, overrides, seed) for seed in range(seeds)]
    return [
        PlannedRun(
            config,
            find(workdir, config, of_seed),
            f"row {row.number}, seed {config.seed}: {row.name}",
        )
        for config, of_seed in zip(configs, settings, strict=True)
    ]


# The settings of format 0 that were in a folder's digest, under the names that they had, with their
# defaults.
_FORMAT_0 = {
    "dataset": "cifar100",
    "tasks": 10,
    "train_images_per_class": 0,
    "test_images_per_class": 0,
    "backbone": "vit_b16",
    "image_size": 0,
    "dtype": "float32",
    "method": "dualprompt+softtf",
    "mask_layers": (10, 11, 12),
    "mask_weights": "qkv+proj",
    "mask_init": "uniform",
    "mask_storage": "float32",
    "keep": 0.9,
    "rank": 4,
    "pool_size": 10,
    "top_k": 5,
    "ewc_strength": 1000.0,
    "lwf_strength": 1.0,
    "exemplars": 1000,
    "e_prompt_layers": (10, 11, 12),
    "e_prompt_length": 5,
    "g_prompt_layers": (1, 2),
    "g_prompt_length": 5,
    "prefix_layout": "separate",
    "pull": 1.0,
    "fixed_query": False,
    "hold_g_prompt": False,
    "epochs": 20,
    "batch_size": 24,
    "learning_rate": 0.03,
    "clip_norm": 1.0,
    "crop_scale": (0.05, 1.0),
    "crop_ratio": (3 / 4, 4 / 3),
    "flip": True,
    "shots": (7,),
    "prototype_features": 2000,
}
_NAMES_IN_FORMAT_0 = {
    "target_modules": "mask_weights",
    "density": "keep",
    "key_loss_weight": "pull",
    "buffer_size": "exemplars",
    "freeze_g_prompt": "hold_g_prompt",
    "cache_queries": "fixed_query",
}
# Settings that were not in the digest then.
_APART_IN_FORMAT_0 = (
    *("name", "seed", "data_dir", "backbone_path"),
    *("eval_batch_size", "weights_cache_mb", "checkpoint_every", "tensorboard"),
)


def folder_in_format_0(settings: Mapping[str, Any]) -> str | None:
    """Return the folder that the program of format 0 kept a run in; None where it had no such run.

    `settings` are some of a `Config`'s fields, under today's names, with those that the method does
    not use: all were in the digest.
    """
    old = {_NAMES_IN_FORMAT_0.get(name, name): value for name, value in settings.items()}
    later = old.keys() - _FORMAT_0.keys() - set(_APART_IN_FORMAT_0)
    if any(old[name] != DEFAULTS[name] for name in later):
        return None
    all_old = {name: old.get(name, default) for name, default in _FORMAT_0.items()}
    paths = ("backbone_path", "data_dir") if old.get("dataset") == "folder" else ("backbone_path",)
    digest = planned.digest(all_old | {name: old[name] for name in paths if old.get(name)})
    run = f"{all_old['method']}-{all_old['dataset']}-{all_old['tasks']}x-{digest}"
    return f"{run}/seed{old['seed']}"


def find(workdir: Place, config: Config, settings: Mapping[str, Any]) -> Place:
    """Return the folder of a run below `workdir`.

    `settings` are those that `config` was made of. It is the folder in which format 0 kept the run,
    where that is there and today's is not.
    """
    today, old = workdir / planned.folder_of(config), folder_in_format_0(settings)
    return workdir / old if old and not today.exists() and (workdir / old).exists() else today
