"""ViT checkpoints of two namings as our parameters: Google's releases and timm's.

Google's arrays are named `Transformer/encoderblock_0/...`, timm's `blocks.0.attn.qkv.weight`, which
is also the naming of its models on the Hugging Face Hub. An array that changes the features and has
no place in our ViT is an error; what else is left over (the pre-trained classifier) is named.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.models.arrays import (
    Taken,
    at_least_float32,
    check_values,
    refuse_foreign,
    shape_of,
)

if TYPE_CHECKING:
    from soft_jax.models.vit import ViTConfig

# Behind the features: the pre-trained classifier, what stands between it and the features, and the
# classifier of a distillation token.
_CLASSIFIER = re.compile(r"(head|head_dist|pre_logits)[./]")
# Arrays of models that compute something else, and what they are.
_FOREIGN = {
    r"(.*\.)?(ls[12]\.gamma|gamma_[12])": "layer scale, a factor on what a layer adds",
    r"(.*\.)?reg_token": "register tokens beside the [class] token",
    r"(.*\.)?dist_token": "a distillation token beside the [class] token",
    r"(.*\.)?norm_pre\..*": "a norm before the first layer, as CLIP has it",
    r"(.*\.)?[qk]_norm\..*": "a norm of queries and keys",
    r"(.*\.)?fc_norm\..*": "a norm behind average pooling, where our features are a token",
    r"(.*\.)?attn_pool\..*": "pooling by attention, where our features are a token",
    r".*(rel_pos|relative_position).*": "relative positions",
    r"(.*\.)?patch_embed\.norm\..*": "a norm of the patches",
    r"(.*\.)?patch_embed\.backbone\..*": "convolutions before the patches",
    r"(.*\.)?(attn|mlp)\.norm\..*": "a norm inside attention or MLP",
    r"(.*\.)?mlp\.(fc1_[gx]|w12|w3)\..*": "a gated MLP",
    r"(conv_root|gn_root|block\d+)/.*": "convolutions before the patches",
}


def convert(
    arrays: Mapping[str, np.ndarray], vit: "ViTConfig"
) -> tuple[pytrees.Tree, tuple[str, ...]]:
    """Return a checkpoint's arrays as our tree, and the names of those left out.

    Arrays are float32 afterwards; float64 ones stay so. Only the pre-trained classifier is left
    out. Raises ValueError naming an array that is missing, of the wrong shape or type, not finite,
    or of a model that computes something else.
    """
    refuse_foreign(arrays, _FOREIGN, "ViT")
    check_values(arrays)
    naming = _from_google if _is_google(arrays) else _from_timm
    leaves, used = naming(arrays, vit)
    left_out = sorted(set(arrays) - used)
    for key in left_out:
        if not _CLASSIFIER.match(key):
            raise ValueError(f"array {key!r} has no place in this ViT, and may change its features")
    tree = pytrees.unflatten({path: at_least_float32(leaf) for path, leaf in leaves.items()})
    return tree, tuple(left_out)


def _is_google(arrays: Mapping[str, np.ndarray]) -> bool:
    return any(key.startswith("Transformer/") for key in arrays)


def _from_timm(
    arrays: Mapping[str, np.ndarray], vit: "ViTConfig"
) -> tuple[dict[str, np.ndarray], set[str]]:
    taken = Taken(arrays)
    d, mlp, patch, patches = vit.dim, vit.mlp_dim, vit.patch_size, vit.grid**2
    leaves = {
        "cls_token": taken.take("cls_token", 1, 1, d),
        "patch_embed/kernel": taken.take("patch_embed.proj.weight", d, 3, patch, patch).transpose(
            2, 3, 1, 0
        ),
        "patch_embed/bias": taken.take("patch_embed.proj.bias", d),
        "norm/scale": taken.take("norm.weight", d),
        "norm/bias": taken.take("norm.bias", d),
    }
    if taken["pos_embed"].shape == (1, patches, d):
        # timm's no_embed_class (FlexiViT): the [class] token has no position, that is, zero.
        positions = taken.take("pos_embed", 1, patches, d)
        leaves["pos_embed"] = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
    else:
        leaves["pos_embed"] = taken.take("pos_embed", 1, 1 + patches, d)
    # A model with qkv_bias=False has none in any layer.
    without_bias = not any(key.endswith(".attn.qkv.bias") for key in arrays)
    dense_layers = {
        "attn.qkv": (3 * d, d),
        "attn.proj": (d, d),
        "mlp.fc1": (mlp, d),
        "mlp.fc2": (d, mlp),
    }
    for i in range(vit.depth):
        for norm in ("norm1", "norm2"):
            leaves[f"blocks_{i}/{norm}/scale"] = taken.take(f"blocks.{i}.{norm}.weight", d)
            leaves[f"blocks_{i}/{norm}/bias"] = taken.take(f"blocks.{i}.{norm}.bias", d)
        for dense, (outputs, inputs) in dense_layers.items():
            ours, theirs = f"blocks_{i}/{dense.replace('.', '/')}", f"blocks.{i}.{dense}"
            kernel = taken.take(f"{theirs}.weight", outputs, inputs).T
            leaves[f"{ours}/kernel"] = kernel
            if dense == "attn.qkv" and without_bias:
                leaves[f"{ours}/bias"] = np.zeros((outputs,), kernel.dtype)
            else:
                leaves[f"{ours}/bias"] = taken.take(f"{theirs}.bias", outputs)
    _no_deeper(arrays, vit)
    return leaves, taken.used


def _from_google(
    arrays: Mapping[str, np.ndarray], vit: "ViTConfig"
) -> tuple[dict[str, np.ndarray], set[str]]:
    taken = Taken(arrays)
    d, heads, patch = vit.dim, (vit.heads, vit.head_dim), vit.patch_size
    leaves = {
        "cls_token": taken.take("cls", 1, 1, d),
        "pos_embed": taken.take("Transformer/posembed_input/pos_embedding", 1, 1 + vit.grid**2, d),
        "patch_embed/kernel": taken.take("embedding/kernel", patch, patch, 3, d),
        "patch_embed/bias": taken.take("embedding/bias", d),
        "norm/scale": taken.take("Transformer/encoder_norm/scale", d),
        "norm/bias": taken.take("Transformer/encoder_norm/bias", d),
    }
    for i in range(vit.depth):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks_{i}"
        # The released files number a layer's parts 0 to 3; Flax's own numbering starts anew with
        # each class.
        second_norm, attention, mlp = (
            (2, 1, 3) if f"{theirs}/LayerNorm_2/scale" in arrays else (1, 0, 0)
        )
        for norm, index in (("norm1", 0), ("norm2", second_norm)):
            for leaf in ("scale", "bias"):
                leaves[f"{ours}/{norm}/{leaf}"] = taken.take(
                    f"{theirs}/LayerNorm_{index}/{leaf}", d
                )
        attention = f"{theirs}/MultiHeadDotProductAttention_{attention}"
        parts = ("query", "key", "value")
        kernels = [
            taken.take(f"{attention}/{part}/kernel", d, *heads).reshape(d, d) for part in parts
        ]
        biases = [taken.take(f"{attention}/{part}/bias", *heads).reshape(d) for part in parts]
        leaves[f"{ours}/attn/qkv/kernel"] = np.concatenate(kernels, axis=1)
        leaves[f"{ours}/attn/qkv/bias"] = np.concatenate(biases)
        out = taken.take(f"{attention}/out/kernel", *heads, d)
        leaves[f"{ours}/attn/proj/kernel"] = out.reshape(d, d)
        leaves[f"{ours}/attn/proj/bias"] = taken.take(f"{attention}/out/bias", d)
        mlp = f"{theirs}/MlpBlock_{mlp}"
        for dense, shape in (("0", (d, vit.mlp_dim)), ("1", (vit.mlp_dim, d))):
            layer = f"{ours}/mlp/fc{int(dense) + 1}"
            leaves[f"{layer}/kernel"] = taken.take(f"{mlp}/Dense_{dense}/kernel", *shape)
            leaves[f"{layer}/bias"] = taken.take(f"{mlp}/Dense_{dense}/bias", shape[1])
    _no_deeper(arrays, vit)
    return leaves, taken.used


def _depth(arrays: Mapping[str, np.ndarray]) -> int:
    layers = [re.match(r"(?:blocks\.|Transformer/encoderblock_)(\d+)[./]", key) for key in arrays]
    return max((1 + int(found[1]) for found in layers if found), default=0)


def _no_deeper(arrays: Mapping[str, np.ndarray], vit: "ViTConfig") -> None:
    if (depth := _depth(arrays)) != vit.depth:
        raise ValueError(f"the file holds {depth} layers, expected {vit.depth}")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that a checkpoint's arrays show; `heads` is 0 where they don't (timm's naming)."""

    image_size: int
    patch_size: int
    dim: int
    depth: int
    mlp_dim: int
    heads: int


def read_sizes(arrays: Mapping[str, np.ndarray]) -> Sizes:
    """Return the sizes of the ViT that `arrays` are of, in Google's or timm's naming.

    Raises ValueError naming an array that is missing or not shaped as a ViT's.
    """
    refuse_foreign(arrays, _FOREIGN, "ViT")
    heads = 0
    if _is_google(arrays):
        block = "Transformer/encoderblock_0"
        patch, columns, colours, dim = shape_of(
            arrays, "embedding/kernel", "(patch, patch, 3, dim)"
        )
        (mlp_dim,) = shape_of(arrays, f"{block}/MlpBlock_[03]/Dense_0/bias", "(mlp_dim,)")
        query = f"{block}/MultiHeadDotProductAttention_[01]/query/bias"
        heads, _ = shape_of(arrays, query, "(heads, head_dim)")
        positions = "Transformer/posembed_input/pos_embedding"
    else:
        kernel = r"patch_embed\.proj\.weight"
        dim, colours, patch, columns = shape_of(arrays, kernel, "(dim, 3, patch, patch)")
        (mlp_dim,) = shape_of(arrays, r"blocks\.0\.mlp\.fc1\.bias", "(mlp_dim,)")
        positions = "pos_embed"
    if patch != columns or colours != 3:
        raise ValueError(
            f"its patches are of {patch} × {columns} pixels of {colours} colours, expected squares "
            "of 3 colours"
        )
    _, tokens, _ = shape_of(arrays, positions, "(1, 1 + patches, dim)")
    # With a position of the [class] token or, as timm's no_embed_class has it, without.
    grid = next((math.isqrt(n) for n in (tokens - 1, tokens) if n and math.isqrt(n) ** 2 == n), 0)
    if not grid:
        raise ValueError(
            f"array {positions!r} has {tokens} positions, expected those of a [class] token and of "
            "a square of patches"
        )
    return Sizes(grid * patch, patch, dim, _depth(arrays), mlp_dim, heads)


def interpolate_positions(pos_embed: np.ndarray, grid: int) -> np.ndarray:
    """Resize position embeddings `[1, 1 + g·g, dim]` to `grid` × `grid` patches, bicubic.

    The position of the [class] token is kept.
    """
    tokens, dim = pos_embed.shape[1:]
    old = round((tokens - 1) ** 0.5)
    if old == grid:
        return pos_embed
    cells = jnp.asarray(pos_embed[0, 1:]).reshape(old, old, dim)
    resized = jax.image.resize(cells, (grid, grid, dim), "cubic", antialias=False)
    return np.concatenate(
        [pos_embed[:, :1], np.asarray(resized).reshape(1, grid * grid, dim)], axis=1
    )
