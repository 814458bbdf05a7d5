"""LoRA tasks as adapter folders of PEFT, and such folders as tasks.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. PEFT adds (alpha / r) B A to a
weight `[out, in]`; ours is 8 A B to a kernel `[in, out]`, so the two are transposed, and a scale
other than 8 goes into B. What is known of PEFT here is as in its version 0.21.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from soft_jax import paths, pytrees
from soft_jax.errors import UserError
from soft_jax.methods.low_rank import LoRA
from soft_jax.methods.method import Method
from soft_jax.models import vit_export
from soft_jax.models.arrays import BadArray, check_values, from_safetensors
from soft_jax.models.vit import ViTConfig

CONFIG, ARRAYS = "adapter_config.json", "adapter_model.safetensors"
# Older versions put the adapter's name, or that of a wrapper, in between.
_PRODUCT = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.\w+)?\.weight")
_CLASSIFIER = re.compile(
    r"base_model\.model\.(?:classifier|head)(?:\.modules_to_save)?(?:\.default)?\.(weight|bias)"
)
# Fields that make an adapter more than W + (alpha / r) B A, where they say anything.
_MORE = (
    *("use_dora", "lora_bias", "use_qalora", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "megatron_config"),
)


def lora_to_peft(
    own: pytrees.Tree, method: Method, classifier: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the config and the arrays of the PEFT adapter that a LoRA task is.

    Modules are named as in transformers 5's `ViTForImageClassification`, and q, k and v have a
    product each. `own` is the adapter's "lora" part, `method` one with LoRA on a ViT. `classifier`,
    `{"kernel": [dim, classes], "bias": [classes]}`, is saved whole, as PEFT's `modules_to_save`.
    """
    lora, leaves, arrays = _lora_of(method), pytrees.flatten(own), {}
    names = {  # by kernel and block; of a place's names, transformers 5's with "vit."
        place: name
        for name, place in vit_export.module_places(method.architecture).items()
        if name.startswith("vit.layers.")
    }
    modules = []
    for path in lora.kernels:
        for index, block in enumerate(_blocks(lora, path)):
            modules.append(names[path, (block,)])
            for ours, theirs in (("a", "A"), ("b", "B")):
                array = np.asarray(leaves[f"{path}/{ours}"][index], np.float32).T
                key = f"base_model.model.{modules[-1]}.lora_{theirs}.weight"
                arrays[key] = np.ascontiguousarray(array)
    for kind, name in (("kernel", "weight"), ("bias", "bias")):
        array = np.asarray(classifier[kind], np.float32).T
        arrays[f"base_model.model.classifier.{name}"] = np.ascontiguousarray(array)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": int(lora.SCALE * lora.rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
        "modules_to_save": ["classifier"],
    }
    return config, arrays


def lora_from_peft(
    folder: str | PathLike, method: Method, backbone: pytrees.Tree
) -> dict[str, pytrees.Tree]:
    """Return the adapter arrays, `{"lora": ...}`, of a PEFT LoRA of a ViT, float32.

    Modules may be named as in Hugging Face's ViT, of transformers 4 or 5, or as in timm's, whose
    product of the whole qkv becomes three with the same A. Kernels of `method` that the adapter
    leaves alone get products of 0, a lower rank is filled up with 0, and any scale is taken. The
    classifier in the folder is left to `classifier_from_peft`.

    Args:
        folder: the adapter's, with its config and its `.safetensors`.
        method: one with LoRA on a ViT; it says which kernels can have a product, and of what rank.
        backbone: the ViT's parameters, whose shapes are taken.

    Raises:
        UserError: naming the file and what in it is missing, damaged, of another shape, of another
            kind than LoRA, or has no place in `method`.
    """
    lora = _lora_of(method)
    config, (arrays, _), where = _read_config(folder), _read_arrays(folder), Path(folder) / ARRAYS
    kernels = pytrees.flatten(pytrees.select(backbone, lora.kernels))
    own = {}
    for path, kernel in kernels.items():
        blocks, of = len(_blocks(lora, path)), 3 if path in lora.fused else 1
        own[f"{path}/a"] = np.zeros((blocks, kernel.shape[0], lora.rank), np.float32)
        own[f"{path}/b"] = np.zeros((blocks, lora.rank, kernel.shape[1] // of), np.float32)
    places = vit_export.module_places(method.architecture)
    for module, product in arrays.items():
        path, blocks = places.get(module, ("", ()))
        there = _blocks(lora, path) if path in kernels else ()
        if not blocks or not set(blocks) <= set(there):
            raise UserError(
                f"{where}: module {module!r} has no product in this method; take target_modules, "
                "mask_layers and a backbone with it"
            )
        (_, inputs, _), (_, _, outputs) = own[f"{path}/a"].shape, own[f"{path}/b"].shape
        a, b = _product(where, module, product, inputs, outputs * len(blocks), lora.rank)
        b = b * np.float32(_scale(config, module, a.shape[1]) / lora.SCALE)
        for block, columns in zip(blocks, np.split(b, len(blocks), axis=1), strict=True):
            index = there.index(block)
            own[f"{path}/a"][index, :, : a.shape[1]] = a
            own[f"{path}/b"][index, : a.shape[1]] = columns
    return {lora.adapter_key: pytrees.unflatten(own)}


def classifier_from_peft(folder: str | PathLike) -> dict[str, np.ndarray] | None:
    """Return the classifier that a PEFT folder holds; None where it holds none.

    It is `{"kernel": [dim, classes], "bias": [classes]}`, float32. Raises UserError as
    `lora_from_peft`, and where one of the two is missing.
    """
    found = _read_arrays(folder)[1]
    if not found:
        return None
    if set(found) != {"weight", "bias"}:
        raise UserError(f"{Path(folder) / ARRAYS}: its classifier is not a weight and a bias")
    return {"kernel": found["weight"].T, "bias": found["bias"]}


def base_of(folder: str | PathLike) -> str:
    """Return the name or path of the base model that an adapter's config gives, "" for none.

    Raises UserError as `lora_from_peft`.
    """
    return str(_read_config(folder).get("base_model_name_or_path") or "")


def _lora_of(method: Method) -> LoRA:
    lora = method.reparametrization
    if not isinstance(lora, LoRA) or not isinstance(method.architecture, ViTConfig):
        raise UserError("peft: only LoRA on a ViT is an adapter of PEFT; the method is another")
    return lora


def _blocks(lora: LoRA, path: str) -> Sequence[int]:
    return lora.parts if path in lora.fused else (0,)


def _read_config(folder: str | PathLike) -> dict[str, Any]:
    file = paths.local(folder, "folder") / CONFIG
    try:
        config = json.loads(paths.read_bytes(file))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} can't be read: {error}; give the folder of a PEFT LoRA") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{file}: expected an object with the peft_type 'LORA'")
    for field in ("bias", *_MORE):
        if config.get(field) not in ((None, "none") if field == "bias" else (None, False, [], {})):
            raise UserError(
                f"{file}: {field} is {config[field]!r}: the adapter is more than a low-rank product"
            )
    for field in ("r", "lora_alpha"):
        if type(config.get(field)) not in (int, float) or not config[field] > 0:
            raise UserError(f"{file}: {field} is {config.get(field)!r}, expected a number above 0")
    return config


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, other in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = other
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_arrays(
    folder: str | PathLike,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Return A and B by module, and the classifier's arrays, float32."""
    file = paths.local(folder, "folder") / ARRAYS
    try:
        stored = from_safetensors(paths.read_bytes(file))
    except (OSError, safetensors.SafetensorError, BadArray) as error:
        raise UserError(
            f"{file} can't be read: {error}; give the folder of a PEFT LoRA, saved as .safetensors"
        ) from error
    try:
        check_values(stored)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    arrays = {name: stored[name].astype(np.float32) for name in sorted(stored)}
    products, classifier = {}, {}
    for name, array in arrays.items():
        if found := _PRODUCT.fullmatch(name):
            products.setdefault(found[1], {})[found[2]] = array
        elif found := _CLASSIFIER.fullmatch(name):
            classifier[found[1]] = array
        else:
            raise UserError(f"{file}: array {name!r} is no part of a plain LoRA of a ViT")
    return products, classifier


def _product(
    where: Path,
    module: str,
    product: Mapping[str, np.ndarray],
    inputs: int,
    outputs: int,
    rank: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return A `[in, r]` and B `[r, out]` of a module, after a look at their shapes."""
    if set(product) != {"A", "B"}:
        missing = "B" if "A" in product else "A"
        raise UserError(f"{where}: lora_{missing} of {module!r} is missing")
    a, b = product["A"], product["B"]
    if a.ndim != 2 or a.shape[1] != inputs or b.shape != (outputs, a.shape[0]):
        raise UserError(
            f"{where}: lora_A and lora_B of {module!r} are {a.shape} and {b.shape}, expected "
            f"(r, {inputs}) and ({outputs}, r)"
        )
    if a.shape[0] > rank:
        raise UserError(
            f"{where}: the rank of {module!r} is {a.shape[0]}, the method's {rank}; take a rank of "
            f"{a.shape[0]}"
        )
    return a.T, b.T
