"""A user's images, arrays or files of any size, to what the model takes. On the host: sizes
differ from image to image.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from soft_jax.data.augmentation import tested_geometry
from soft_jax.errors import UserError

_NOT_PICTURES = (
    "HDF5",
    "GRIB",
    "BUFR",
    "MPEG",
    "EPS",
    "WMF",
    "FITS",
    "PDF",
)  # that Pillow opens, by name only or through another program
_LONGEST = 64  # times the short side: resized, a thinner image would fill memory
_DEEP = (
    "I",
    "F",
)  # Pillow's modes of more than 8 bits a channel, which it would clip without a word


def read(path: str | os.PathLike) -> np.ndarray:
    """Read an image file, upright and in colour, as uint8 `[H, W, 3]`.

    Raises UserError naming the file when it can't be read.
    """
    try:
        return decode(path)
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more for damaged
    # files
    except Exception as error:
        raise UserError(
            f"{os.fspath(path)} can't be read as an image ({type(error).__name__}: {error})"
        ) from error


def decode(file: str | os.PathLike | BinaryIO) -> np.ndarray:
    """Decode an image file's content to what `read` returns.

    Raises whatever Pillow's decoders do: OSError, SyntaxError, ValueError, struct.error and more.
    """
    with Image.open(file) as image:
        levels = _colours(ImageOps.exif_transpose(image))
    _check_shape(levels)
    return levels


def _check_shape(levels: np.ndarray) -> None:
    height, width = levels.shape[:2]
    if max(height, width) > _LONGEST * min(height, width):
        raise ValueError(
            f"{width} × {height} pixels, expected sides of at most {_LONGEST} to 1; cut it first"
        )


def _colours(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(_DEEP):
        raise ValueError(
            f"more than 8 bits a channel (Pillow's mode {image.mode}); convert it to 8 bits"
        )
    if image.has_transparency_data:  # what lies under it is arbitrary: shown as on a white page
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def find(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Return the files of `paths`, in which a folder stands for the image files inside it.

    Files in its subfolders count too, hidden ones do not; they are in the order of their names.
    """
    known = {
        extension
        for extension, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NOT_PICTURES
    }
    files = []
    for path in map(Path, paths):
        within = [path]
        if path.is_dir():
            within = sorted(
                p
                for p in path.rglob("*")
                if p.suffix.lower() in known and p.name[0] != "." and p.is_file()
            )
        if not within:
            raise UserError(f"{path}: no image files in this folder")
        files += within
    return files


def as_list(images: Any) -> Sequence[Any]:
    """Return `images` as a sequence of single images.

    `images` is an array `[N, H, W, 3]`, a path, a Pillow image, or a sequence of those.

    An iterator is read to its end.

    Raises UserError when there is none, or where an array is a single image.
    """
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    if hasattr(images, "shape") and np.asarray(images).dtype.kind == "U":
        images = np.asarray(images).reshape(-1).tolist()
    if hasattr(images, "shape"):
        images = np.asarray(images)
        if images.ndim != 4:
            raise UserError(
                f"images: shape {images.shape}, expected [N, H, W, 3]; for a single image give "
                "images[None]"
            )
    elif not isinstance(images, Iterable):
        raise UserError(
            f"images: {type(images).__name__}, expected an array [N, H, W, 3], a path, or a "
            "sequence of images and paths"
        )
    elif not isinstance(images, Sequence):
        images = list(images)
    if len(images) == 0:  # an array has no truth value
        raise UserError("images: none were given; expected at least one")
    return images


def prepare(image: Any, index: int, size: int) -> np.ndarray:
    """Prepare one image as evaluation prepares a test image: to uint8 `[size, size, 3]`, by Pillow.

    Args:
        image: a path; or `[H, W, 3]`, uint8 or float in [0, 1], which is rounded to the 256 levels.
        index: its place among the images, for messages.
        size: the model's.

    Raises:
        UserError: naming the image and what is wrong with it.
    """
    name = os.fspath(image) if isinstance(image, str | os.PathLike) else f"images[{index}]"
    levels = (
        read(image) if isinstance(image, str | os.PathLike) else _levels(_array(image, name), name)
    )
    try:
        _check_shape(levels)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    (height, width), (top, left) = tested_geometry(*levels.shape[:2], size)
    if levels.shape[:2] != (height, width):
        levels = np.asarray(
            Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)
        )
    return levels[top : top + size, left : left + size]


def _array(image: Any, name: str) -> np.ndarray:
    try:
        return _colours(image) if isinstance(image, Image.Image) else np.asarray(image)
    # Rows of different lengths, whatever is no array, and all that Pillow's decoders raise
    except Exception as error:
        raise UserError(
            f"{name}: not an image ({error}); expected [H, W, 3], uint8 or float, or a path"
        ) from error


def _levels(image: np.ndarray, name: str) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(
            f"{name}: shape {image.shape}, expected [H, W, 3], red, green and blue last"
        )
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if not np.issubdtype(image.dtype, np.floating) and image.dtype.name != "bfloat16":
        raise UserError(f"{name}: dtype {image.dtype}, expected uint8, or float in [0, 1]")
    image = image.astype(np.float32)
    if not np.isfinite(image).all():
        raise UserError(f"{name}: has values that are not finite (NaN or infinity)")
    levels = np.round(image * 255)  # a value that passes 1 by rounding is 1
    if levels.min() < 0 or levels.max() > 255:
        raise UserError(
            f"{name}: float values from {image.min():g} to {image.max():g}, expected 0 to 1 (no "
            "mean or standard deviation taken off)"
        )
    return levels.astype(np.uint8)
