"""What the configs beside a CLIP checkpoint say beyond the arrays: open_clip's
`open_clip_config.json`, and Hugging Face's `config.json` with its `preprocessor_config.json`.

No array shows the numbers of heads, the activation, and the mean and standard deviation that pixels
are normalized with. What this module knows is as in open_clip 3.3 and transformers 5.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from soft_jax.models import tokenizer
from soft_jax.models.clip import EPSILON, PREPROCESSING, CLIPConfig
from soft_jax.models.protocol import Preprocessing
from soft_jax.models.timm_config import field, is_colour, is_object
from soft_jax.paths import Place

OPEN_CLIP, HUGGING_FACE = "open_clip_config.json", "config.json"
# Fields of open_clip's configs that the arrays show too, that are read here, or that have no effect
# after training.
_UNDERSTOOD = {
    "model_cfg": {
        *("embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "cast_dtype"),
        *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "output_dict"),
    },
    "vision_cfg": {
        *("image_size", "patch_size", "layers", "width", "head_width", "mlp_ratio"),
        *("patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads"),
    },
    "text_cfg": {
        *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
        *("output_tokens", "pad_id", "bos_id", "eos_id"),
    },
}
# Other fields may have these values, or be absent, false or empty; with any other the model is not
# our CLIP, or may not be.
_VALUES_OF_OUR_CLIP = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
    "text_arch": ("clip",),
}


@dataclasses.dataclass(frozen=True)
class Described:
    """What a config, `file`, says of a CLIP.

    `sizes` are fields of `CLIPConfig` that the arrays show too. `preprocessing` is None where no
    file says it.
    """

    file: str
    heads: int
    text_heads: int
    quick_gelu: bool
    sizes: Mapping[str, int]
    preprocessing: Preprocessing | None


def read(folder: Place, hugging_face: bool) -> Described | None:
    """Read the config in `folder`, first that of the arrays' naming; None where there is none.

    Raises ValueError naming a file and a field that can't be used, or with which a model is not our
    CLIP.
    """
    readers = [(OPEN_CLIP, _from_open_clip), (HUGGING_FACE, _from_hugging_face)]
    for file, reader in readers[::-1] if hugging_face else readers:
        if (folder / file).is_file():
            try:
                found = reader(_object(folder / file), folder)
            except (OSError, ValueError) as error:  # JSON and Unicode errors are ValueErrors
                raise ValueError(f"its {file} can't be used: {error}") from error
            if found:
                return found
    return None


def _object(file: Place) -> Mapping[str, Any]:
    whole = json.loads(file.read_text("utf-8"))
    if not is_object(whole):
        raise ValueError(f"it holds {whole!r}, expected an object")
    return whole


def _from_open_clip(whole: Mapping[str, Any], folder: Place) -> Described:
    model = _part(whole, "model_cfg")
    vision, text = _part(model, "vision_cfg"), _part(model, "text_cfg")
    for name, fields in (("model_cfg", model), ("vision_cfg", vision), ("text_cfg", text)):
        for key, value in fields.items():
            if key in _UNDERSTOOD[name] or not value or value in _VALUES_OF_OUR_CLIP.get(key, ()):
                continue
            raise ValueError(
                f"{key} is {value!r} in {name}, with which the model is not this CLIP, or may not "
                "be"
            )
    width, head_width = _count(vision, "width", 768), _count(vision, "head_width", 64)
    if width % head_width:
        raise ValueError(f"head_width is {head_width}, and width {width} is not a multiple of it")
    pixels = field(whole, "preprocess_cfg", is_object, "an object") or {}
    return Described(
        file=OPEN_CLIP,
        heads=width // head_width,
        text_heads=_count(text, "heads", 8),
        quick_gelu=_flag(model, "quick_gelu"),
        sizes={
            "dim": width,
            "depth": _count(vision, "layers", 12),
            "patch_size": _count(vision, "patch_size", 16),
            "text_dim": _count(text, "width", 512),
            "text_depth": _count(text, "layers", 12),
        },
        preprocessing=_preprocessing(pixels, "mean", "std"),
    )


def _from_hugging_face(whole: Mapping[str, Any], folder: Place) -> Described | None:
    """Read Hugging Face's config; None where it is another library's of the same name."""
    if not {"model_type", "vision_config", "text_config"} & whole.keys():
        return None
    if whole.get("model_type", "clip") != "clip":
        raise ValueError(f"model_type is {whole['model_type']!r}, expected 'clip'")
    vision, text = _part(whole, "vision_config"), _part(whole, "text_config")
    activations = set()
    for name, fields in (("vision_config", vision), ("text_config", text)):
        activations.add(fields.get("hidden_act", "quick_gelu"))
        if (epsilon := fields.get("layer_norm_eps", EPSILON)) != EPSILON:
            raise ValueError(f"layer_norm_eps is {epsilon!r} in {name}, expected {EPSILON}")
    if activations not in ({"gelu"}, {"quick_gelu"}):
        raise ValueError(
            f"hidden_act is {' and '.join(sorted(map(repr, activations)))}, expected 'gelu' or "
            "'quick_gelu' for both encoders"
        )
    pixels = {}
    if (beside := folder / "preprocessor_config.json").is_file():
        pixels = _object(beside)
    return Described(
        file=HUGGING_FACE,
        heads=_count(vision, "num_attention_heads", 12),
        text_heads=_count(text, "num_attention_heads", 8),
        quick_gelu=activations == {"quick_gelu"},
        sizes={
            "dim": _count(vision, "hidden_size", 768),
            "depth": _count(vision, "num_hidden_layers", 12),
            "patch_size": _count(vision, "patch_size", 32),
            "text_dim": _count(text, "hidden_size", 512),
            "text_depth": _count(text, "num_hidden_layers", 12),
        },
        preprocessing=_preprocessing(pixels, "image_mean", "image_std"),
    )


def _part(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = field(fields, name, is_object, "an object")
    if part is None:
        raise ValueError(f"{name} is missing")
    return part


def _count(fields: Mapping[str, Any], name: str, default: int) -> int:
    value = field(fields, name, lambda v: type(v) is int and v > 0, "a number above 0")
    return default if value is None else value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    return bool(field(fields, name, lambda v: isinstance(v, bool), "true or false"))


def _preprocessing(fields: Mapping[str, Any], mean: str, std: str) -> Preprocessing | None:
    found = (
        field(fields, mean, is_colour, "three numbers"),
        field(fields, std, lambda v: is_colour(v) and min(v) > 0, "three numbers above 0"),
    )
    return None if None in found else Preprocessing(*(tuple(map(float, x)) for x in found))


def clip_fields(
    sizes: Mapping[str, int], described: Described
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the fields of the `CLIPConfig` of arrays of `sizes`, and notes for the user.

    Raises ValueError where arrays and config disagree.
    """
    for name, said in described.sizes.items():
        if sizes[name] != said:
            raise ValueError(
                f"its arrays are of {name} {sizes[name]}, its {described.file} says {said}"
            )
    if sizes["vocabulary"] != tokenizer.END + 1:
        raise ValueError(
            f"its vocabulary has {sizes['vocabulary']} tokens, but texts are read by CLIP's "
            f"tokenizer, which has {tokenizer.END + 1}"
        )
    fields = dict(sizes) | {
        "heads": described.heads,
        "text_heads": described.text_heads,
        "quick_gelu": described.quick_gelu,
    }
    if described.preprocessing:
        return fields | {"preprocessing": described.preprocessing}, ()
    note = (
        f"no file beside it says mean and std of its pixels; it gets CLIP's, {PREPROCESSING.mean}"
    )
    return fields, (f"{note} and {PREPROCESSING.std}",)


def check_listed(clip: CLIPConfig, described: Described) -> None:
    """Raise ValueError where the config beside a listed backbone's file is of another model."""
    for name, ours, theirs in (
        ("quick_gelu", clip.quick_gelu, described.quick_gelu),
        ("heads", clip.heads, described.heads),
        ("text_heads", clip.text_heads, described.text_heads),
        ("mean and std", clip.preprocessing, described.preprocessing or clip.preprocessing),
    ):
        if _rounded(ours) != _rounded(theirs):
            raise ValueError(
                f"its {described.file} says {name} {_shown(theirs)}, but this backbone has "
                f"{_shown(ours)}: the file is another model's, whose features would be wrong; give "
                "the right one, or name it otherwise (my_clip) to follow its config"
            )


def _rounded(value: Any) -> Any:
    if not isinstance(value, Preprocessing):
        return value
    return np.float32([value.mean, value.std]).tolist()


def _shown(value: Any) -> str:
    return f"{value.mean} and {value.std}" if isinstance(value, Preprocessing) else str(value)
