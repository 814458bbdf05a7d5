"""The tables of `settings.md`, made when the site is built, of the fields of `Config`.

A field's meaning is its comment in `config.py`, its default is the class's. `ABOUT` adds what the
comment leaves out: the unit, and where the default comes from.
"""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

from soft_jax import config
from soft_jax.config import RUNTIME_FIELDS, Config

MARKER = "<!-- the tables of settings -->"
PAPER = "paper"
CODE = "published code"
CLIP_HOST = "CLIP-PGP's code"
HERE = "ours"


class About(NamedTuple):
    """What is said of a field beside its comment.

    `meaning` stands before the comment, or for it where there is none.
    """

    unit: str
    source: str
    meaning: str = ""


ABOUT: dict[str, dict[str, About]] = {
    "Data and tasks": {
        "name": About("text", HERE),
        "dataset": About("name", PAPER, "The images:"),
        "data_dir": About("folder", "TFDS"),
        "scenario": About("name", PAPER),
        "tasks": About("tasks", PAPER),
        "initial_classes": About("classes", "PILOT (`init_cls`)"),
        "increment": About("classes", "PILOT (`increment`)"),
        "scenario_file": About("file", HERE),
        "class_order_seed": About("seed, or -1", PAPER),
        "validation": About("share, 0 to below 1", HERE),
        "train_images_per_class": About("images", HERE),
        "test_images_per_class": About(
            "images", HERE, "As `train_images_per_class`, of the test images; 0: all."
        ),
        "seed": About(
            "whole number below 2³¹",
            CODE,
            "Of every random draw: first values, batches, crops, images held out.",
        ),
    },
    "Frozen backbone": {
        "backbone": About(
            "name",
            PAPER,
            "One of ours (`vit_b16`, `vit_b32`, `vit_l16`, `vit_b16_augreg`, `vit_b16_sam`, "
            "`vit_b16_dino`, `vit_ti8_32`, and of CLIP `clip_vit_b16`, `clip_vit_b32`, "
            "`clip_vit_l14`, `clip_vit_b16_laion400m`). With `backbone_path` also timm's name of a "
            "plain ViT, or any name for a CLIP with its config beside the file.",
        ),
        "backbone_path": About("file or folder", HERE),
        "image_size": About("pixels along a side", HERE),
        "normalization": About("backbone, cifar100", HERE),
        "dtype": About("float32, bfloat16", HERE, "Floating point type"),
    },
    "Method": {
        "method": About("names joined by +", PAPER),
        "mask_layers": About("layers, from 1", PAPER, "Layers"),
        "mask_towers": About("vision, text, vision+text", HERE, "Towers"),
        "text_mask_layers": About("layers, from 1", HERE, "As `mask_layers`,"),
        "target_modules": About("names joined by +", PAPER, "Kernels"),
        "mask_init": About("name", CODE, "A new task's mask is drawn from"),
        "mask_storage": About("name", HERE),
        "density": About("share, above 0 to 1", "paper, rows c=90%"),
        "rank": About("columns", "paper, rows r=4", "Rank"),
        "pool_size": About("prompts", "L2P", "Number of"),
        "top_k": About("prompts", "L2P", "So many"),
        "ewc_strength": About("factor", HERE),
        "lwf_strength": About("factor", HERE),
        "buffer_size": About("images", "paper, Table 1"),
        "e_prompt_layers": About(
            "layers, from 1", PAPER, "Layers in which a task's own prompt (E-prompt) is prefixed."
        ),
        "e_prompt_length": About("tokens", CODE, "Tokens of an E-prompt in each of its layers."),
        "g_prompt_layers": About(
            "layers, from 1", "DualPrompt", "Layers of the prompt that all tasks share (G-prompt)."
        ),
        "g_prompt_length": About("tokens", "DualPrompt", "Tokens of the G-prompt in each layer."),
        "prefix_layout": About("separate, interleaved", HERE, "Which part of a prefix is keys:"),
        "image_prompt_length": About("tokens", PAPER, "Tokens of the image prompt"),
        "text_context": About("class, task", PAPER),
        "text_context_length": About("vectors", CLIP_HOST),
        "key_loss_weight": About("factor", CODE),
        "cache_queries": About("true, false", PAPER),
        "freeze_g_prompt": About("true, false", PAPER),
    },
    "Training": {
        "epochs": About("passes over a task's images", CODE, "Of each task."),
        "batch_size": About("images", CODE),
        "learning_rate": About("per batch of 256 images", CODE, "The optimizer's:"),
        "first_learning_rate": About("per batch of 256 images", HERE, "`learning_rate`"),
        "optimizer": About("adam, sgd", CODE),
        "schedule": About("constant, cosine", CODE, "The learning rate stays as it is;"),
        "weight_decay": About("factor", CODE),
        "first_weight_decay": About("factor, or -1", HERE, "`weight_decay`"),
        "clip_norm": About("norm", CODE),
        "crop_scale": About("range of shares", CODE, "Random crops:"),
        "crop_ratio": About("range of ratios", CODE, "Random crops:"),
        "flip": About("true, false", CODE, "Mirror half of the training images, left to right."),
    },
    "Evaluation": {
        "shots": About("images", PAPER),
        "eval_batch_size": About("images", HERE, "Images"),
        "weights_cache_mb": About("MiB (2²⁰ bytes)", HERE),
        "prototype_features": About("features", HERE),
    },
    "Running": {
        "checkpoint_every": About("steps", HERE),
        "tensorboard": About("true, false", HERE, "Write event files into the workdir;"),
        "wandb": About("true, false", HERE, "Send curves and figures to"),
    },
}
# Comments of `config.py` that head several fields.
_HEADING = re.compile(r"[A-Z]\w+( \w+){0,2}|Evaluation: every protocol .* is reported\.")


def comments(source: str) -> dict[str, str]:
    """Return the comments of the fields of `Config`: above a field, and behind it on its line."""
    lines = source.splitlines()
    (class_,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
    )
    found = {}
    for node in class_.body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above, line = [], node.lineno - 2
        while lines[line].strip().startswith("#"):
            text = lines[line].strip().removeprefix("#").strip()
            if not _HEADING.fullmatch(text):
                above.insert(0, text)
            line -= 1
        behind = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()
        found[node.target.id] = " ".join(filter(None, [*above, behind]))
    return found


def meanings() -> dict[str, str]:
    """Return what each field means, as a sentence; empty where nobody says it."""
    of_config = comments(Path(config.__file__).read_text("utf-8"))
    about = {name: each for fields in ABOUT.values() for name, each in fields.items()}
    return {
        name: _sentence(f"{about[name].meaning} {comment}" if name in about else comment)
        for name, comment in of_config.items()
    }


def _sentence(text: str) -> str:
    text = text.strip()
    if not text:
        return ""
    first = text[0].upper() if text[0].isascii() else text[0]  # λ stays λ
    return first + text[1:].rstrip(".") + "."


def markdown() -> str:
    """Return the tables, a section for each group of settings."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    means = meanings()
    lines = []
    for group, fields in ABOUT.items():
        lines += [
            f"## {group}",
            "",
            "| setting | meaning | default | unit | source |",
            "|---" * 5 + "|",
        ]
        for name, about in fields.items():
            runtime = " †" if name in RUNTIME_FIELDS else ""
            cells = (
                f"`{name}`{runtime}",
                means[name].replace("|", "\\|"),
                f"`{written(defaults[name])}`",
                about.unit,
                about.source,
            )
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def written(value: Any) -> str:
    """Return a value as a config's argument has it: (10, 11) is "10+11"."""
    if value == "":
        return '""'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        sign = "-" if isinstance(value[0], float) else "+"
        return sign.join(f"{number:g}" for number in value)
    return str(value)


def fill_page(app: Any, docname: str, source: list[str]) -> None:
    """Put the tables in the place of `MARKER`; Sphinx calls it for every page that it reads."""
    source[0] = source[0].replace(MARKER, markdown())
