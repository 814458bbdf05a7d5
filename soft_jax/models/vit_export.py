"""Our ViT's parameters as checkpoints of other libraries: timm's naming, and that of Hugging Face's
`ViTForImageClassification`.

The files are those of timm 1.0 and of transformers 4 and 5, which read the same names. The modules
themselves, which a PEFT adapter names, were renamed in transformers 5; `MODULES` has both.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from soft_jax import pytrees
from soft_jax.data.augmentation import tested_geometry
from soft_jax.models.vit import ViTConfig

# A dense layer of a block, and its modules in Hugging Face's ViT: those of transformers 5, and
# those of transformers 4 and of files. q, k and v, which stand side by side here, are apart there.
MODULES: dict[str, tuple[tuple[str, str], ...]] = {
    "attn/qkv": (
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
    ),
    "attn/proj": (("attention.o_proj", "attention.output.dense"),),
    "mlp/fc1": (("mlp.fc1", "intermediate.dense"),),
    "mlp/fc2": (("mlp.fc2", "output.dense"),),
}
_NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
# What stands outside the blocks, in the files of Hugging Face's ViT.
_OUTSIDE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed/kernel": "vit.embeddings.patch_embeddings.projection.weight",
    "patch_embed/bias": "vit.embeddings.patch_embeddings.projection.bias",
    "norm/scale": "vit.layernorm.weight",
    "norm/bias": "vit.layernorm.bias",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# timm's names of plain ViTs: dim, depth and heads, then patch and image sizes. The first stands for
# all others of that size, with the sizes as arguments.
_TIMM_NAMES = {
    "base": ((768, 12, 12), ("16_224", "16_384", "32_224", "32_384", "8_224")),
    "tiny": ((192, 12, 3), ("16_224", "16_384")),
    "small": ((384, 12, 6), ("16_224", "16_384", "32_224", "32_384", "8_224")),
    "large": ((1024, 24, 16), ("16_224", "16_384", "32_224", "32_384", "14_224")),
    "huge": ((1280, 32, 16), ("14_224",)),
}
_LAYER = re.compile(r"(?:layers|encoder\.layer)\.(\d+)\.(.+)\.(weight|bias)")
_BICUBIC = 3  # Pillow's number


def to_timm(params: pytrees.Tree, classifier: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return a ViT's parameters and its classifier as timm names and lays them out, float32.

    `classifier` is `{"kernel": [dim, classes], "bias": [classes]}`. Raises ValueError naming a
    parameter that timm's ViT does not have.
    """
    arrays = {}
    for path, leaf in pytrees.flatten(params).items():
        *module, kind = path.split("/")
        if path in ("cls_token", "pos_embed"):
            name = path
        elif path.startswith("patch_embed/"):
            name = f"patch_embed.proj.{_LEAVES[kind]}"
        elif path.startswith("norm/") or _layer_and_part(path)[1] in (*MODULES, *_NORMS):
            name = ".".join((*module, _LEAVES[kind])).replace("blocks_", "blocks.")
        else:
            raise ValueError(f"{path} has no place in a plain ViT")
        arrays[name] = _as_torch(leaf, kind)
    return arrays | {
        f"head.{_LEAVES[kind]}": _as_torch(classifier[kind], kind) for kind in ("kernel", "bias")
    }


def to_hugging_face(params: pytrees.Tree, classifier: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the same as the file of a `ViTForImageClassification` has it, float32.

    `classifier` is `{"kernel": [dim, classes], "bias": [classes]}`. Raises ValueError naming a
    parameter that the model does not have.
    """
    arrays = {}
    for path, leaf in pytrees.flatten(params).items():
        kind = path.split("/")[-1]
        if path in _OUTSIDE:
            arrays[_OUTSIDE[path]] = _as_torch(leaf, kind)
            continue
        layer, part = _layer_and_part(path)
        if part in _NORMS:
            modules = [_NORMS[part]]
        elif part in MODULES:
            modules = [in_files for _, in_files in MODULES[part]]
        else:
            raise ValueError(f"{path} has no place in a plain ViT")
        pieces = np.split(_as_torch(leaf, kind), len(modules))
        for module, piece in zip(modules, pieces, strict=True):
            arrays[f"vit.encoder.layer.{layer}.{module}.{_LEAVES[kind]}"] = piece
    return arrays | {
        f"classifier.{_LEAVES[kind]}": _as_torch(classifier[kind], kind)
        for kind in ("kernel", "bias")
    }


def hugging_face_name(name: str) -> str:
    """Return how `to_hugging_face` names an array of a ViT that another file names otherwise.

    A file of the ViT without a classifier has no "vit." in front, and the modules of transformers 5
    are named otherwise than its files.
    """
    if name.startswith("classifier."):
        return name
    bare = name.removeprefix("vit.")
    if found := _LAYER.fullmatch(bare):
        layer, module, leaf = found.groups()
        in_files = {new: old for modules in MODULES.values() for new, old in modules}
        return f"vit.encoder.layer.{layer}.{in_files.get(module, module)}.{leaf}"
    return f"vit.{bare}"


def _layer_and_part(path: str) -> tuple[str, str]:
    """Return "3" and "attn/qkv" for "blocks_3/attn/qkv/kernel"; "" twice outside the blocks."""
    block, *part = path.split("/")[:-1] or [""]
    return (block.removeprefix("blocks_"), "/".join(part)) if part else ("", "")


def _as_torch(leaf: Any, kind: str) -> np.ndarray:
    array = np.asarray(leaf, np.float32)
    if kind == "kernel":  # [in, out], or of a convolution [height, width, in, out]
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return np.ascontiguousarray(array)  # safetensors writes the memory as it lies


def module_places(vit: ViTConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the kernels that modules of other libraries stand for, by the module's name.

    A kernel is its path here, and which of its column blocks: of q, k and v, or (0,) for a whole
    one. Modules are those of Hugging Face's ViT in transformers 4 and 5, with and without "vit."
    before them, and of timm's, where qkv is all three blocks.
    """
    places = {}
    for layer in range(vit.depth):
        for part, modules in MODULES.items():
            path = f"{vit.block_path(layer)}/{part}/kernel"
            places[f"blocks.{layer}.{part.replace('/', '.')}"] = path, tuple(range(len(modules)))
            for block, (new, old) in enumerate(modules):
                for prefix in ("vit.", ""):
                    places[f"{prefix}layers.{layer}.{new}"] = path, (block,)
                    places[f"{prefix}encoder.layer.{layer}.{old}"] = path, (block,)
    return places


def timm_config(vit: ViTConfig, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the `config.json` that timm reads beside a checkpoint, for a classifier of `vit`.

    `model_args` has all sizes: the architecture's name stands for some of them alone.
    """
    size, crops = vit.image_size, _crops(vit)
    return {
        "architecture": _timm_architecture(vit),
        "num_classes": len(class_names),
        "num_features": vit.dim,
        "global_pool": "token",
        "label_names": list(class_names),
        "model_args": {
            "img_size": size,
            "patch_size": vit.patch_size,
            "embed_dim": vit.dim,
            "depth": vit.depth,
            "num_heads": vit.heads,
            "mlp_ratio": _mlp_ratio(vit),
        },
        "pretrained_cfg": {
            "tag": "",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": size / tested_geometry(64, 64, size)[0][0],
            "crop_mode": "center" if crops else "squash",
            "mean": list(vit.preprocessing.mean),
            "std": list(vit.preprocessing.std),
            "num_classes": len(class_names),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _crops(vit: ViTConfig) -> bool:
    """Return whether test images are resized to more than the model takes, and then cut."""
    return tested_geometry(64, 64, vit.image_size)[0][0] > vit.image_size


def _timm_architecture(vit: ViTConfig) -> str:
    sizes = (vit.dim, vit.depth, vit.heads)
    name = next((name for name, (named, _) in _TIMM_NAMES.items() if named == sizes), "base")
    ours, known = f"{vit.patch_size}_{vit.image_size}", _TIMM_NAMES[name][1]
    return f"vit_{name}_patch{ours if ours in known else known[0]}"


def _mlp_ratio(vit: ViTConfig) -> float:
    ratio = vit.mlp_dim / vit.dim
    # timm takes the whole part of dim × ratio, which rounding may have put just below.
    return ratio if int(vit.dim * ratio) == vit.mlp_dim else math.nextafter(ratio, math.inf)


def hugging_face_config(vit: ViTConfig, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the `config.json` of a `ViTForImageClassification` of `vit`."""
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": vit.dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.heads,
        "intermediate_size": vit.mlp_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": vit.layer.epsilon,
        "image_size": vit.image_size,
        "patch_size": vit.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": {str(index): name for index, name in enumerate(class_names)},
        "label2id": {name: index for index, name in enumerate(class_names)},
        "torch_dtype": "float32",
    }


def preprocessor_config(vit: ViTConfig) -> dict[str, Any]:
    """Return the `preprocessor_config.json` with which transformers prepares images as we test.

    That is CLIP's processor where an image is cut after it was resized, which the ViT's can't do.
    """
    size = vit.image_size
    square = {"height": size, "width": size}
    common = {
        "do_resize": True,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vit.preprocessing.mean),
        "image_std": list(vit.preprocessing.std),
        "do_convert_rgb": True,
    }
    if not _crops(vit):
        return {"image_processor_type": "ViTImageProcessor", "size": square, **common}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": tested_geometry(64, 64, size)[0][0]},
        "do_center_crop": True,
        "crop_size": square,
        **common,
    }
