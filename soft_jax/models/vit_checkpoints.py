"""ViT checkpoints of two namings as our parameters: Google's releases and timm's.

Google's arrays are named `Transformer/encoderblock_0/...`, timm's `blocks.0.attn.qkv.weight`, which
is also the naming of its models on the Hugging Face Hub. Every array of a file is used, or reported
by name as left out.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees

if TYPE_CHECKING:
    from soft_jax.models.vit import ViTConfig


def convert(
    arrays: Mapping[str, np.ndarray], vit: "ViTConfig"
) -> tuple[pytrees.Tree, tuple[str, ...]]:
    """Return a checkpoint's arrays as our tree, and the names of those left out.

    Arrays are float32 afterwards; float64 ones stay so. Raises ValueError naming an array that is
    missing or of the wrong shape.
    """
    naming = _from_google if any(key.startswith("Transformer/") for key in arrays) else _from_timm
    leaves, used = naming(arrays, vit)
    shapes = jax.eval_shape(
        vit.module().init, jax.random.key(0), jnp.zeros((1, vit.image_size, vit.image_size, 3))
    )
    expected = pytrees.flatten(shapes["params"])
    for path, leaf in expected.items():
        if leaves[path].shape != leaf.shape:
            raise ValueError(f"{path} is {leaves[path].shape}, expected {leaf.shape}")
    return pytrees.unflatten({k: _at_least_float32(v) for k, v in leaves.items()}), tuple(
        sorted(set(arrays) - used)
    )


def _at_least_float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.promote_types(array.dtype, np.float32))


class _Taken(dict):
    """Arrays of a file, remembering which were asked for."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        super().__init__(arrays)
        self.used: set[str] = set()

    def __missing__(self, key: str):
        raise ValueError(f"array {key!r} is missing")

    def take(self, key: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        array = self[key]
        self.used.add(key)
        if shape is not None and array.shape != shape:
            raise ValueError(f"array {key!r} is {array.shape}, expected {shape}")
        return array


def _from_timm(
    arrays: Mapping[str, np.ndarray], vit: "ViTConfig"
) -> tuple[dict[str, np.ndarray], set[str]]:
    taken = _Taken(arrays)
    leaves = {
        "cls_token": taken.take("cls_token"),
        "pos_embed": taken.take("pos_embed"),
        "patch_embed/kernel": taken.take("patch_embed.proj.weight").transpose(2, 3, 1, 0),
        "patch_embed/bias": taken.take("patch_embed.proj.bias"),
        "norm/scale": taken.take("norm.weight"),
        "norm/bias": taken.take("norm.bias"),
    }
    for i in range(vit.depth):
        for norm in ("norm1", "norm2"):
            leaves[f"blocks_{i}/{norm}/scale"] = taken.take(f"blocks.{i}.{norm}.weight")
            leaves[f"blocks_{i}/{norm}/bias"] = taken.take(f"blocks.{i}.{norm}.bias")
        for dense in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            ours = f"blocks_{i}/{dense.replace('.', '/')}"
            leaves[f"{ours}/kernel"] = taken.take(f"blocks.{i}.{dense}.weight").T
            leaves[f"{ours}/bias"] = taken.take(f"blocks.{i}.{dense}.bias")
    _no_deeper(arrays, r"blocks\.(\d+)\.", vit)
    return leaves, taken.used


def _from_google(
    arrays: Mapping[str, np.ndarray], vit: "ViTConfig"
) -> tuple[dict[str, np.ndarray], set[str]]:
    taken = _Taken(arrays)
    d, heads = vit.dim, (vit.heads, vit.head_dim)
    leaves = {
        "cls_token": taken.take("cls"),
        "pos_embed": taken.take("Transformer/posembed_input/pos_embedding"),
        "patch_embed/kernel": taken.take("embedding/kernel"),
        "patch_embed/bias": taken.take("embedding/bias"),
        "norm/scale": taken.take("Transformer/encoder_norm/scale"),
        "norm/bias": taken.take("Transformer/encoder_norm/bias"),
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
                leaves[f"{ours}/{norm}/{leaf}"] = taken.take(f"{theirs}/LayerNorm_{index}/{leaf}")
        attention = f"{theirs}/MultiHeadDotProductAttention_{attention}"
        kernels = [
            taken.take(f"{attention}/{part}/kernel", (d, *heads)).reshape(d, d)
            for part in ("query", "key", "value")
        ]
        biases = [
            taken.take(f"{attention}/{part}/bias", heads).reshape(d)
            for part in ("query", "key", "value")
        ]
        leaves[f"{ours}/attn/qkv/kernel"] = np.concatenate(kernels, axis=1)
        leaves[f"{ours}/attn/qkv/bias"] = np.concatenate(biases)
        leaves[f"{ours}/attn/proj/kernel"] = taken.take(
            f"{attention}/out/kernel", (*heads, d)
        ).reshape(d, d)
        leaves[f"{ours}/attn/proj/bias"] = taken.take(f"{attention}/out/bias")
        mlp = f"{theirs}/MlpBlock_{mlp}"
        for dense, index in (("fc1", 0), ("fc2", 1)):
            for leaf in ("kernel", "bias"):
                leaves[f"{ours}/mlp/{dense}/{leaf}"] = taken.take(f"{mlp}/Dense_{index}/{leaf}")
    _no_deeper(arrays, r"Transformer/encoderblock_(\d+)/", vit)
    return leaves, taken.used


def _no_deeper(arrays: Mapping[str, np.ndarray], pattern: str, vit: "ViTConfig") -> None:
    depth = 1 + max(int(match[1]) for key in arrays if (match := re.match(pattern, key)))
    if depth != vit.depth:
        raise ValueError(f"the file holds {depth} layers, expected {vit.depth}")


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
