"""What timm's model names and its `config.json` say of a ViT checkpoint beyond the arrays.

No array shows the number of heads, nor the mean and standard deviation that pixels are normalized
with. What this module knows of timm is as in its `models/vision_transformer.py`, `models/deit.py`
and `models/_hub.py` of version 1.0.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from soft_jax.models.protocol import Preprocessing
from soft_jax.models.vit_checkpoints import Sizes

IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# The normalization of the checkpoints that timm names, where no config.json says it. A name without
# a tag stands for several checkpoints, which differ in it.
_PREPROCESSING_BY_TAG = {
    r".*\.(augreg2?|orig|sam)_in\w+": HALF,
    r"flexivit_\w+\.\w+": HALF,
    r"test_vit\.r160_in1k": HALF,
    r".*\.(dino|mae)": IMAGENET,
    r"deit_.*\.fb_in1k": IMAGENET,
    r".*_miil\.in21k(_ft_in1k)?": Preprocessing(),
}
# dim, depth and heads of the sizes in timm's names.
_NAMED_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    "giant": (1408, 40, 16),
    "gigantic": (1664, 48, 16),
}
# Arguments of timm's VisionTransformer that a config.json may give (`model_args`): those that are
# read here, those that the arrays show too, and those without effect after training.
_UNDERSTOOD_ARGUMENTS = {
    *("num_heads", "embed_dim", "depth", "patch_size", "img_size"),
    *("num_classes", "mlp_ratio", "qkv_bias", "proj_bias", "qk_norm", "init_values", "pre_norm"),
    *("class_token", "no_embed_class", "reg_tokens", "final_norm", "fc_norm", "scale_attn_norm"),
    *("scale_mlp_norm", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"),
    *("attn_drop_rate", "drop_path_rate", "weight_init", "fix_init", "dynamic_img_size"),
}
# Those that no array shows, and the values with which the model is our ViT.
_VALUES_OF_OUR_VIT = {
    "act_layer": (None, "gelu"),
    "norm_layer": (None, "layernorm"),
    "global_pool": ("token",),
    "in_chans": (3,),
    "pos_embed": ("learn",),
}


@dataclasses.dataclass(frozen=True)
class TimmConfig:
    """What timm's `config.json` says of a checkpoint; None where it says nothing.

    `image_size` is in pixels along a side; `crop_pct` is the share of a resized test image that
    timm's own evaluation cuts out.
    """

    architecture: str
    tag: str | None
    model_args: Mapping[str, Any]
    preprocessing: Preprocessing
    image_size: int | None
    global_pool: str | None
    crop_pct: float | None
    interpolation: str | None


def parse(text: str) -> TimmConfig:
    """Read a `config.json` as timm writes it for the Hugging Face Hub, of its old layout too.

    In the old layout the fields of `pretrained_cfg` stand beside `architecture`. Raises ValueError
    naming a field that is missing or not of its type.
    """
    whole = json.loads(text)
    if not isinstance(whole, dict):
        raise ValueError(f"it holds {whole!r}, expected an object with timm's fields")
    if not isinstance(architecture := whole.get("architecture"), str) or not architecture:
        raise ValueError("architecture is missing: it was not written by timm")
    pretrained = field(whole, "pretrained_cfg", is_object, "an object") or whole
    mean = field(pretrained, "mean", is_colour, "three numbers")
    std = field(pretrained, "std", lambda v: is_colour(v) and min(v) > 0, "three numbers above 0")
    for name, value in (("mean", mean), ("std", std)):
        if value is None:
            raise ValueError(f"{name} is missing: pixels can't be normalized as they were")
    size = field(pretrained, "input_size", _is_square, "[3, size, size]")
    architecture, _, tag = architecture.partition(".")
    return TimmConfig(
        architecture=architecture,
        tag=field(pretrained, "tag", _is_text, "a name") or tag or None,
        model_args=field(whole, "model_args", is_object, "an object") or {},
        preprocessing=Preprocessing(tuple(map(float, mean)), tuple(map(float, std))),
        image_size=size[1] if size else None,
        global_pool=field(whole, "global_pool", _is_text, "a name"),
        crop_pct=field(pretrained, "crop_pct", _is_number, "a number"),
        interpolation=field(pretrained, "interpolation", _is_text, "a name"),
    )


def field(
    fields: Mapping[str, Any], name: str, fits: Callable[[Any], bool], expected: str
) -> Any | None:
    """Return a field of a config, or None. Raises ValueError where its value does not fit."""
    value = fields.get(name)
    if value is not None and not fits(value):
        raise ValueError(f"{name} is {value!r}, expected {expected}")
    return value


def is_object(value: Any) -> bool:
    """Return whether a value of a config is an object."""
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_colour(value: Any) -> bool:
    """Return whether a value of a config is a list of three finite numbers."""
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _is_square(value: Any) -> bool:
    whole = isinstance(value, list) and len(value) == 3 and all(type(v) is int for v in value)
    return whole and value[0] == 3 and value[1] == value[2] > 0


@dataclasses.dataclass(frozen=True)
class _Named:
    """The sizes in a timm name; None where it says nothing."""

    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    patch_size: int | None = None
    image_size: int | None = None


def _read_name(architecture: str) -> _Named:
    found = re.fullmatch(r"(?:vit|deit)_([a-z]+)_patch(\d+)_(\d+)(?:_miil)?", architecture)
    if found and found[1] in _NAMED_SIZES:
        return _Named(*_NAMED_SIZES[found[1]], int(found[2]), int(found[3]))
    if found := re.fullmatch(r"flexivit_(small|base|large)", architecture):
        return _Named(*_NAMED_SIZES[found[1]], 16, 240)
    return _Named(64, 6, 2, 16, 160) if architecture == "test_vit" else _Named()


def is_known(name: str) -> bool:
    """Return whether `name`, with or without a tag, is timm's for a ViT whose heads are known."""
    return _read_name(name.partition(".")[0]).heads is not None


def vit_fields(
    name: str, sizes: Sizes, config: TimmConfig | None, image_size: int = 0
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the fields of the `ViTConfig` of timm's model `name`, and notes for the user.

    `name` may end in a tag ("vit_small_patch16_224.augreg_in21k"), `sizes` are those of the arrays,
    and `image_size` is what was asked for (0: the file's own). Raises ValueError where name, arrays
    and config disagree, or where none of them says what is needed.
    """
    architecture, _, tag = name.partition(".")
    named, arguments = _read_name(architecture), {}
    if config:
        _check_config(config, architecture, tag)
        arguments = config.model_args
    for argument, of_arrays, of_name in (
        ("embed_dim", sizes.dim, named.dim),
        ("depth", sizes.depth, named.depth),
        ("patch_size", sizes.patch_size, named.patch_size),
    ):
        expected = arguments.get(argument, of_name)
        if expected not in (None, of_arrays):
            raise ValueError(f"its arrays are of {argument} {of_arrays}, expected {expected}")
    heads = arguments.get("num_heads", named.heads or sizes.heads)
    if not heads:
        raise ValueError(
            f"num_heads is missing: neither its arrays nor the name {name!r} say it; write it as "
            "num_heads in model_args of a config.json beside the file"
        )
    if type(heads) is not int or heads < 1 or sizes.heads not in (0, heads):
        raise ValueError(f"num_heads is {heads!r}, expected {sizes.heads or 'a number above 0'}")
    own = arguments.get("img_size") or (config and config.image_size) or named.image_size
    if not image_size and own not in (None, sizes.image_size, [sizes.image_size] * 2):
        raise ValueError(
            f"its position embeddings are of images of {sizes.image_size} pixels, its name or "
            f"config.json says {own}; choose one with image_size"
        )
    preprocessing = config.preprocessing if config else _preprocessing_by_tag(name)
    fields = dataclasses.asdict(sizes) | {"heads": heads, "preprocessing": preprocessing}
    return fields, _evaluation_notes(config)


def _check_config(config: TimmConfig, architecture: str, tag: str) -> None:
    if config.architecture != architecture:
        raise ValueError(f"its config.json is of {config.architecture!r}, not of {architecture!r}")
    if tag and config.tag not in (None, tag):
        raise ValueError(f"its config.json is of the tag {config.tag!r}, not of {tag!r}")
    if config.global_pool not in (None, "token"):
        raise ValueError(
            f"its config.json says global_pool {config.global_pool!r}: its features are not the "
            "[class] token ('token'), as ours are"
        )
    for argument, value in config.model_args.items():
        if argument in _VALUES_OF_OUR_VIT:
            understood = value in _VALUES_OF_OUR_VIT[argument]
        else:
            understood = argument in _UNDERSTOOD_ARGUMENTS
        if not understood:
            raise ValueError(
                f"its config.json says {argument} {value!r} in model_args, with which the model "
                "is not this ViT, or may not be"
            )


def _preprocessing_by_tag(name: str) -> Preprocessing:
    for pattern, preprocessing in _PREPROCESSING_BY_TAG.items():
        if re.fullmatch(pattern, name):
            return preprocessing
    raise ValueError(
        "mean and std, with which its pixels are normalized, are missing: put its config.json "
        f"beside the file, or add timm's tag to the name, as in {name.partition('.')[0]}"
        ".augreg_in21k"
    )


def _evaluation_notes(config: TimmConfig | None) -> tuple[str, ...]:
    if not config or (config.crop_pct, config.interpolation) == (0.875, "bicubic"):
        return ()
    return (
        f"its config.json evaluates with crop_pct {config.crop_pct} and {config.interpolation} "
        "resizing; here test images are prepared alike for every backbone, by 0.875 and bicubic",
    )
