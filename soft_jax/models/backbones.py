"""Pre-trained backbones: where they are found, and their arrays under our names.

Two namings are read, from `.npz` and `.safetensors` files: Google's ViT releases
(`Transformer/encoderblock_0/...`) and timm's (`blocks.0.attn.qkv.weight`), which is also that of
its models on the Hugging Face Hub. Every array of a file is used, or reported by name as left out.
"""

import dataclasses
import hashlib
import io
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from soft_jax import pytrees
from soft_jax.cache import CACHE
from soft_jax.errors import UserError
from soft_jax.models.vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True)
class Source:
    """A named backbone: its sizes, its file, and where the file can be had (bundled when `url`
    is empty).
    """

    vit: ViTConfig
    file: str
    url: str = ""


def _vit(image_size: int, patch_size: int, dim: int, depth: int, heads: int) -> ViTConfig:
    return ViTConfig(image_size, patch_size, dim, depth, heads, mlp_dim=4 * dim)


BUCKET = "https://storage.googleapis.com/vit_models/"
_AUGREG = "augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz"
BACKBONES = {
    # The backbone of the paper's tables: the original ImageNet-21k release, without its pre_logits
    # layer.
    "vit_b16": Source(
        _vit(224, 16, 768, 12, 12), "ViT-B_16.npz", BUCKET + "imagenet21k/ViT-B_16.npz"
    ),
    "vit_b32": Source(
        _vit(224, 32, 768, 12, 12), "ViT-B_32.npz", BUCKET + "imagenet21k/ViT-B_32.npz"
    ),
    "vit_l16": Source(
        _vit(224, 16, 1024, 24, 16), "ViT-L_16.npz", BUCKET + "imagenet21k/ViT-L_16.npz"
    ),
    # Its successor, ImageNet-21k with augmentation and regularization (Steiner et al., 2021),
    # before any fine-tuning.
    "vit_b16_augreg": Source(_vit(224, 16, 768, 12, 12), "ViT-B_16-augreg.npz", BUCKET + _AUGREG),
    # Table 2's: ImageNet-1k with the SAM optimizer (Chen et al., 2022), and DINO's self-supervision
    # (Caron et al., 2021) in timm's naming.
    "vit_b16_sam": Source(
        _vit(224, 16, 768, 12, 12), "ViT-B_16-sam.npz", BUCKET + "sam/ViT-B_16.npz"
    ),
    "vit_b16_dino": Source(
        _vit(224, 16, 768, 12, 12),
        "ViT-B_16-dino.safetensors",
        "https://huggingface.co/timm/vit_base_patch16_224.dino/resolve/main/model.safetensors",
    ),
    # Supervised on Tiny-ImageNet at 32 pixels, 17.6% top-1: weak, but pre-trained; it ships with
    # the package.
    "vit_ti8_32": Source(_vit(32, 8, 192, 12, 3), "vit_ti8_32.npz"),
}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Frozen parameters with what identifies them.

    `params` is the float32 tree of `ViT`; `fingerprint` the hex SHA-256 of the file (what
    `sha256sum` prints); `left_out` the arrays of the file that the ViT has no use for.
    """

    name: str
    vit: ViTConfig
    params: pytrees.Tree
    fingerprint: str
    left_out: tuple[str, ...] = ()


def locate(name: str, path: str = "") -> Path:
    """The file of backbone `name`: `path` if given, else the bundled or cached copy, else a
    download.

    Raises UserError when `name` is unknown, `path` does not exist, or the download fails.
    """
    if name not in BACKBONES:
        raise UserError(f"backbone: {name!r} is unknown; known are {', '.join(BACKBONES)}")
    source = BACKBONES[name]
    if path:
        given = Path(path).expanduser()
        found = given / source.file if given.is_dir() else given
        if not found.is_file():
            raise UserError(
                f"backbone_path: no file at {found}; give the path of {source.file} or of the "
                "folder it is in"
            )
        return found
    if not source.url:
        return Path(str(resources.files("soft_jax") / "assets" / source.file))
    cached = CACHE / source.file
    return cached if cached.is_file() else _download(source, cached)


def _download(source: Source, target: Path) -> Path:
    partial = target.with_suffix(f".partial{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"Downloading {source.url} to {target}")
        with (
            urllib.request.urlopen(source.url, timeout=60) as response,
            open(partial, "wb") as file,
        ):
            shutil.copyfileobj(response, file)
        expected = response.headers.get("Content-Length")
        if expected and partial.stat().st_size != int(expected):
            raise OSError(f"{partial.stat().st_size} of {expected} bytes arrived")
        partial.replace(target)
    except (OSError, urllib.error.URLError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"backbone: {source.file} is not at {target} and could not be downloaded from "
            f"{source.url} ({error}). "
            f"Put a copy there, or name one with --config.backbone_path=FILE"
        ) from error
    return target


def load(name: str, path: str = "", image_size: int = 0, dtype: str = "float32") -> Backbone:
    """Backbone `name` ready for images of `image_size` pixels (0: its own size).

    Raises UserError when the file cannot be had, is damaged, or does not fit the backbone's sizes.
    """
    file = locate(name, path)
    native = dataclasses.replace(BACKBONES[name].vit, dtype=dtype)
    try:
        vit = dataclasses.replace(native, image_size=image_size or native.image_size)
    except ValueError as error:
        raise UserError(f"image_size: {error}") from error
    try:
        raw = file.read_bytes()
        arrays = _arrays(file, raw)
    except (
        Exception
    ) as error:  # zipfile, zlib, numpy and safetensors each have their own for damaged bytes
        kind = ".safetensors" if file.suffix == ".safetensors" else ".npz"
        raise UserError(
            f"backbone: {file} is not a readable {kind} file ({type(error).__name__}: {error}); "
            "fetch it again"
        ) from error
    try:
        params, left_out = convert(arrays, native)
    except ValueError as error:
        raise UserError(f"backbone: {file} does not fit {name!r}: {error}") from error
    params["pos_embed"] = interpolate_positions(params["pos_embed"], vit.grid)
    return Backbone(name, vit, params, hashlib.sha256(raw).hexdigest(), left_out)


def _arrays(file: Path, raw: bytes) -> dict[str, np.ndarray]:
    if file.suffix == ".safetensors":
        return safetensors.numpy.load(raw)
    with np.load(io.BytesIO(raw)) as archive:
        return {key: archive[key] for key in archive.files}


def convert(
    arrays: Mapping[str, np.ndarray], vit: ViTConfig
) -> tuple[pytrees.Tree, tuple[str, ...]]:
    """A checkpoint's arrays as our tree, in float32 (float64 arrays stay so), and the names left
    out.

    Raises ValueError naming an array that is missing or of the wrong shape.
    """
    naming = _from_google if any(key.startswith("Transformer/") for key in arrays) else _from_timm
    leaves, used = naming(arrays, vit)
    shapes = jax.eval_shape(
        ViT(vit).init, jax.random.key(0), jnp.zeros((1, vit.image_size, vit.image_size, 3))
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
    arrays: Mapping[str, np.ndarray], vit: ViTConfig
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
    arrays: Mapping[str, np.ndarray], vit: ViTConfig
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


def _no_deeper(arrays: Mapping[str, np.ndarray], pattern: str, vit: ViTConfig) -> None:
    depth = 1 + max(int(match[1]) for key in arrays if (match := re.match(pattern, key)))
    if depth != vit.depth:
        raise ValueError(f"the file holds {depth} layers, expected {vit.depth}")


def interpolate_positions(pos_embed: np.ndarray, grid: int) -> np.ndarray:
    """Position embeddings `[1, 1 + g·g, dim]` for a `grid` × `grid` image, bicubic; the [class]
    position is kept.
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
