"""A user's images, arrays or files of any size, to what the model takes. On the host: sizes differ from image to image."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from soft_jax.augment import tested_geometry
from soft_jax.errors import UserError

_DEEP = ("I", "F")  # Pillow's modes of more than 8 bits a channel, which it would clip without a word


def read(path: str | os.PathLike) -> np.ndarray:
    """An image file, upright and in colour, as uint8 `[H, W, 3]`. Raises UserError naming the file when it can't be read."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(_DEEP):
                raise ValueError(f"more than 8 bits a channel (Pillow's mode {image.mode}); convert it to 8 bits")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more for damaged files
        raise UserError(f"{os.fspath(path)} can't be read as an image ({type(error).__name__}: {error})") from error


def find(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """The files of `paths`; a folder stands for the image files in it and below it, in order of their names."""
    known = {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = []
    for path in map(Path, paths):
        within = sorted(p for p in path.rglob("*") if p.suffix.lower() in known and p.is_file()) if path.is_dir() else [path]
        if not within:
            raise UserError(f"{path}: no image files in this folder")
        files += within
    return files


def as_list(images: Any) -> Sequence[Any]:
    """`images` as a sequence of single images: an array `[N, H, W, 3]`, a path, or a sequence of arrays and paths.

    Raises UserError when there is none, or where an array is a single image.
    """
    if isinstance(images, str | os.PathLike):
        return [images]
    if hasattr(images, "shape"):
        images = np.asarray(images)
        if images.ndim != 4:
            raise UserError(f"images: shape {images.shape}, expected [N, H, W, 3]; for a single image give images[None]")
    elif not isinstance(images, Sequence):
        images = list(images)
    if len(images) == 0:  # an array has no truth value
        raise UserError("images: none were given; expected at least one")
    return images


def prepare(image: Any, index: int, size: int) -> np.ndarray:
    """One image to uint8 `[size, size, 3]`, as a test image of evaluation, resized by Pillow.

    Args:
        image: a path; or `[H, W, 3]`, uint8 or float in [0, 1], which is rounded to the 256 levels.
        index: its place among the images, for messages.
        size: the model's.

    Raises:
        UserError: naming the image and what is wrong with it.
    """
    levels = read(image) if isinstance(image, str | os.PathLike) else _levels(np.asarray(image), f"images[{index}]")
    (height, width), (top, left) = tested_geometry(*levels.shape[:2], size)
    if levels.shape[:2] != (height, width):
        levels = np.asarray(Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC))
    return levels[top : top + size, left : left + size]


def _levels(image: np.ndarray, name: str) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"{name}: shape {image.shape}, expected [H, W, 3], red, green and blue last")
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if not np.issubdtype(image.dtype, np.floating) and image.dtype.name != "bfloat16":
        raise UserError(f"{name}: dtype {image.dtype}, expected uint8, or float in [0, 1]")
    image = image.astype(np.float32)
    if not np.isfinite(image).all():
        raise UserError(f"{name}: has values that are not finite (NaN or infinity)")
    if image.min() < 0 or image.max() > 1:
        raise UserError(
            f"{name}: float values from {image.min():g} to {image.max():g}, expected 0 to 1 (no mean or standard deviation taken off)"
        )
    return np.round(image * 255).astype(np.uint8)
