"""CLIP checkpoints of two namings as our parameters: open_clip's, which is OpenAI's, and Hugging
Face's.

open_clip's arrays are named `visual.transformer.resblocks.0.attn.in_proj_weight`, those of Hugging
Face's CLIPModel `vision_model.encoder.layers.0.self_attn.q_proj.weight`. Every array is used, or is
no parameter; any other is an error.
"""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from soft_jax import pytrees
from soft_jax.models.arrays import Taken, at_least_float32, check_values, refuse_foreign, shape_of

if TYPE_CHECKING:
    from soft_jax.models.clip import CLIPConfig

# Sizes, counters and masks that some files hold beside the parameters.
_NO_PARAMETER = re.compile(
    r"(.*\.)?position_ids|input_resolution|context_length|vocab_size|attn_mask"
)
# Arrays of models that compute something else, and what they are.
_FOREIGN = {
    r"visual\.(layer\d+|attnpool|conv[23])\..*": "a part of a ResNet for images",
    r"visual\.trunk\..*": "a part of timm's image encoder in open_clip's frame",
    r"visual\.(attn_pool|ln_pool).*": "pooling by attention, where our features are a token",
    r"text\..*": "of open_clip's CustomTextCLIP, with a text encoder of another model",
    r"text_decoder\..*": "a decoder of texts, as CoCa has it",
    r"logit_bias": "a bias of the logits, as SigLIP has it",
    r"vision_model\.head\..*": "pooling by attention, as SigLIP has it",
    r".*\.ls_[12]\.gamma": "layer scale, a factor on what a layer adds",
    r".*\.(ln_[qk]|[qk]_norm)\..*": "a norm of queries and keys",
    r"text_projection\.bias": "a bias of the text projection",
}


# Our names, of blocks and ends, in each naming. Projections are [in, out], those named "weight"
# [out, in].
_OPEN_CLIP = {
    "vision/cls_token": "visual.class_embedding",
    "vision/pos_embed": "visual.positional_embedding",
    "vision/patch_embed": "visual.conv1.weight",
    "vision/norm_pre": "visual.ln_pre",
    "vision/blocks": "visual.transformer.resblocks",
    "vision/norm": "visual.ln_post",
    "vision/proj": "visual.proj",
    "text/token_embed": "token_embedding.weight",
    "text/pos_embed": "positional_embedding",
    "text/blocks": "transformer.resblocks",
    "text/norm": "ln_final",
    "text/proj": "text_projection",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn/proj": "attn.out_proj",
    "mlp/fc1": "mlp.c_fc",
    "mlp/fc2": "mlp.c_proj",
}
_HUGGING_FACE = {
    "vision/cls_token": "vision_model.embeddings.class_embedding",
    "vision/pos_embed": "vision_model.embeddings.position_embedding.weight",
    "vision/patch_embed": "vision_model.embeddings.patch_embedding.weight",
    "vision/norm_pre": "vision_model.pre_layrnorm",
    "vision/blocks": "vision_model.encoder.layers",
    "vision/norm": "vision_model.post_layernorm",
    "vision/proj": "visual_projection.weight",
    "text/token_embed": "text_model.embeddings.token_embedding.weight",
    "text/pos_embed": "text_model.embeddings.position_embedding.weight",
    "text/blocks": "text_model.encoder.layers",
    "text/norm": "text_model.final_layer_norm",
    "text/proj": "text_projection.weight",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn/proj": "self_attn.out_proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}


def is_hugging_face(arrays: Mapping[str, np.ndarray]) -> bool:
    """Return whether arrays are named as in Hugging Face's CLIP, or in a part of it."""
    return any(re.match(r"(vision_model|text_model)\.", key) for key in arrays)


def is_clip(arrays: Mapping[str, np.ndarray]) -> bool:
    """Return whether arrays are those of a CLIP, or of a part of one, in either naming."""
    return is_hugging_face(arrays) or any(
        re.match(r"(visual|transformer\.resblocks)\.|token_embedding\.|text\.", key)
        for key in arrays
    )


def convert(
    arrays: Mapping[str, np.ndarray], clip: "CLIPConfig"
) -> tuple[pytrees.Tree, tuple[str, ...]]:
    """Return a checkpoint's arrays as our tree, and the names of those left out.

    Arrays are float32 afterwards; float64 ones stay so. Only what is no parameter is left out.
    Raises ValueError naming an array that is missing, of the wrong shape or type, not finite, or of
    a model that computes something else.
    """
    names = _naming(arrays)
    left_out = tuple(sorted(filter(_NO_PARAMETER.fullmatch, arrays)))
    arrays = {key: array for key, array in arrays.items() if key not in left_out}
    check_values(arrays)
    taken, grid = Taken(arrays), clip.grid
    leaves = {"logit_scale": taken.take("logit_scale")}
    d, text_d, patch = clip.dim, clip.text_dim, clip.patch_size
    ends = {
        "vision/cls_token": (d,),
        "vision/pos_embed": (1 + grid**2, d),
        "vision/patch_embed": (d, 3, patch, patch),
        "vision/proj": (d, clip.embed_dim),
        "text/token_embed": (clip.vocabulary, text_d),
        "text/pos_embed": (clip.context_length, text_d),
        "text/proj": (text_d, clip.embed_dim),
    }
    for ours, shape in ends.items():
        transposed = ours.endswith("proj") and names[ours].endswith(".weight")
        array = taken.take(names[ours], *(shape[::-1] if transposed else shape))
        leaves[ours] = array.T if transposed else array
    leaves["vision/cls_token"] = leaves["vision/cls_token"][None, None]
    leaves["vision/pos_embed"] = leaves["vision/pos_embed"][None]
    leaves["vision/patch_embed/kernel"] = leaves.pop("vision/patch_embed").transpose(2, 3, 1, 0)
    for norm, dim in (("vision/norm_pre", d), ("vision/norm", d), ("text/norm", text_d)):
        leaves |= _norm(taken, names[norm], norm, dim)
    for tower, config in (("vision", clip.layer), ("text", clip.text_layer)):
        for layer in range(clip.towers[tower]):
            theirs, ours = f"{names[f'{tower}/blocks']}.{layer}", clip.block_path(layer, tower)
            leaves |= _block(taken, names, theirs, ours, config.dim, config.mlp_dim)
        depth = _depth(arrays, names[f"{tower}/blocks"])
        if depth != clip.towers[tower]:
            raise ValueError(
                f"the file's {tower} tower has {depth} layers, expected {clip.towers[tower]}"
            )
    if unused := sorted(set(arrays) - taken.used):
        raise ValueError(
            f"array {unused[0]!r} has no place in this CLIP, and may change its features"
        )
    tree = pytrees.unflatten({path: at_least_float32(leaf) for path, leaf in leaves.items()})
    return tree, left_out


def _naming(arrays: Mapping[str, np.ndarray]) -> Mapping[str, str]:
    """Return the names that a file uses. Raises ValueError where it holds no whole CLIP."""
    refuse_foreign(arrays, _FOREIGN, "CLIP")
    names = _HUGGING_FACE if is_hugging_face(arrays) else _OPEN_CLIP
    if not is_clip(arrays):
        found = min(arrays, default="")
        raise ValueError(
            "its arrays are named neither as open_clip's (visual.conv1.weight) nor as Hugging "
            f"Face's CLIP (vision_model.pre_layrnorm.weight), but like {found!r}; take "
            "open_clip_model.safetensors or model.safetensors of the whole CLIP"
        )
    for tower, kind in (("vision", "image"), ("text", "text")):
        beginnings = tuple(name for ours, name in names.items() if ours.startswith(tower))
        if not any(key.startswith(beginnings) for key in arrays):
            raise ValueError(
                f"the file holds no {kind} encoder (array {beginnings[0]!r} and others are "
                "missing): it is half of a CLIP, so take the file of the whole model"
            )
    return names


def _norm(taken: Taken, theirs: str, ours: str, dim: int) -> dict[str, np.ndarray]:
    return {
        f"{ours}/scale": taken.take(f"{theirs}.weight", dim),
        f"{ours}/bias": taken.take(f"{theirs}.bias", dim),
    }


def _block(
    taken: Taken, names: Mapping[str, str], theirs: str, ours: str, dim: int, mlp_dim: int
) -> dict[str, np.ndarray]:
    leaves = {}
    for norm in ("norm1", "norm2"):
        leaves |= _norm(taken, f"{theirs}.{names[norm]}", f"{ours}/{norm}", dim)
    sizes = {"attn/proj": (dim, dim), "mlp/fc1": (mlp_dim, dim), "mlp/fc2": (dim, mlp_dim)}
    for dense, shape in sizes.items():
        name = f"{theirs}.{names[dense]}"
        leaves[f"{ours}/{dense}/kernel"] = taken.take(f"{name}.weight", *shape).T
        leaves[f"{ours}/{dense}/bias"] = taken.take(f"{name}.bias", shape[0])
    if names is _OPEN_CLIP:
        weight = taken.take(f"{theirs}.attn.in_proj_weight", 3 * dim, dim)
        bias = taken.take(f"{theirs}.attn.in_proj_bias", 3 * dim)
    else:
        parts = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
        weight = np.concatenate([taken.take(f"{part}.weight", dim, dim) for part in parts])
        bias = np.concatenate([taken.take(f"{part}.bias", dim) for part in parts])
    return leaves | {f"{ours}/attn/qkv/kernel": weight.T, f"{ours}/attn/qkv/bias": bias}


def _depth(arrays: Mapping[str, np.ndarray], blocks: str) -> int:
    layers = [re.match(rf"{re.escape(blocks)}\.(\d+)\.", key) for key in arrays]
    return max((1 + int(found[1]) for found in layers if found), default=0)


def read_sizes(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return the fields of a `CLIPConfig` that arrays in either naming show: all but the heads.

    Raises ValueError where the arrays are those of no whole CLIP, naming the one that is missing or
    not shaped as a CLIP's.
    """
    names = _naming(arrays)

    def shape(ours: str, expected: str) -> tuple[int, ...]:
        return shape_of(arrays, re.escape(names[ours]), expected)

    dim, colours, patch, columns = shape("vision/patch_embed", "(dim, 3, patch, patch)")
    if patch != columns or colours != 3:
        raise ValueError(
            f"its patches are of {patch} × {columns} pixels of {colours} colours, expected squares "
            "of 3 colours"
        )
    tokens, _ = shape("vision/pos_embed", "(1 + patches, dim)")
    if (grid := math.isqrt(tokens - 1)) ** 2 != tokens - 1 or not grid:
        raise ValueError(
            f"array {names['vision/pos_embed']!r} has {tokens} positions, expected those of a "
            "[class] token and of a square of patches"
        )
    vocabulary, text_dim = shape("text/token_embed", "(vocabulary, dim)")
    context_length, _ = shape("text/pos_embed", "(context, dim)")
    projection = shape("text/proj", "(in, out)")
    sizes = {
        "image_size": grid * patch,
        "patch_size": patch,
        "dim": dim,
        "text_dim": text_dim,
        "embed_dim": projection[0 if names is _HUGGING_FACE else 1],
        "context_length": context_length,
        "vocabulary": vocabulary,
    }
    for tower, prefix in (("vision", ""), ("text", "text_")):
        blocks = names[f"{tower}/blocks"]
        bias = re.escape(f"{blocks}.0.{names['mlp/fc1']}.bias")
        (sizes[f"{prefix}mlp_dim"],) = shape_of(arrays, bias, "(mlp_dim,)")
        sizes[f"{prefix}depth"] = _depth(arrays, blocks)
    return sizes
