"""Pre-trained backbones: where they are found, and their arrays under our names.

Two namings are read, from `.npz` and `.safetensors` files: Google's ViT releases
(`Transformer/encoderblock_0/...`) and timm's (`blocks.0.attn.qkv.weight`), which is also that of
its models on the Hugging Face Hub. Every array of a file is used, or reported by name as left out.
"""

import dataclasses
import hashlib
import io
import os
import shutil
import urllib.error
import urllib.request
from importlib import resources
from pathlib import Path

import numpy as np
import safetensors.numpy

from soft_jax import pytrees
from soft_jax.cache import CACHE
from soft_jax.errors import UserError
from soft_jax.models.protocol import Architecture
from soft_jax.models.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class Source:
    """A named backbone: its sizes, its file, and where the file can be had (bundled when `url`
    is empty).
    """

    architecture: Architecture
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
    architecture: Architecture
    params: pytrees.Tree
    fingerprint: str
    left_out: tuple[str, ...] = ()


def locate(name: str, path: str = "") -> Path:
    """Find the file of backbone `name`: `path`, a bundled or cached copy, or a download.

    `path` is taken if it is given; else the copy, and a download where there is no copy.

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
    """Load backbone `name` for images of `image_size` pixels (0: its own size).

    Raises UserError when the file cannot be had, is damaged, or does not fit the backbone's sizes.
    """
    file = locate(name, path)
    native = dataclasses.replace(BACKBONES[name].architecture, dtype=dtype)
    try:
        architecture = native.at_size(image_size or native.image_size)
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
        params, left_out = native.convert(arrays)
    except ValueError as error:
        raise UserError(f"backbone: {file} does not fit {name!r}: {error}") from error
    params = architecture.fit_size(params)
    return Backbone(name, architecture, params, hashlib.sha256(raw).hexdigest(), left_out)


def _arrays(file: Path, raw: bytes) -> dict[str, np.ndarray]:
    if file.suffix == ".safetensors":
        return safetensors.numpy.load(raw)
    with np.load(io.BytesIO(raw)) as archive:
        return {key: archive[key] for key in archive.files}
