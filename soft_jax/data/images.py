"""A user's images, arrays or files of any size, to what the model takes. On the host: sizes
differ from image to image.
"""

import functools
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from soft_jax import paths as paths_lib
from soft_jax.buckets import BucketPath
from soft_jax.config import LONGEST
from soft_jax.data.augmentation import tested_geometry
from soft_jax.errors import UserError
from soft_jax.paths import Place
from soft_jax.store import files as files_lib

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
# Pillow's modes of more than 8 bits a channel, which it would clip without a word
_DEEP = ("I", "F")
# Pixels that all threads together hold decoded at once. Decoding takes 6 bytes for one in colour,
# 15 with transparency and 18 with 16 bits a channel, as measured: 2.4 GB at most.
DECODED_AT_ONCE = 2**27
NAMED = 3  # files of one kind that are named where some are left out

# From half of the pixels on that Pillow refuses, it warns of the memory, which is bounded here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Then = Callable[[np.ndarray], np.ndarray]


def unchanged(levels: np.ndarray) -> np.ndarray:
    """Return an image as it is."""
    return levels


class _PixelBudget:
    """A bound on the pixels that all threads hold decoded at once, `DECODED_AT_ONCE`.

    An image above it waits until it is alone. First come, first served: small images can't keep a
    large one waiting for ever.
    """

    def __init__(self):
        self._held, self._changed, self._turn = 0, threading.Condition(), threading.Lock()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until `pixels` more fit, and count them until the end of the block."""
        with self._turn, self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + pixels <= DECODED_AT_ONCE)
            self._held += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()


_budget = _PixelBudget()


def read(path: str | os.PathLike, then: Then = unchanged) -> np.ndarray:
    """Read an image file, upright and in colour, as uint8 `[H, W, 3]`, and return `then` of it.

    `then` is called as in `decode`. Raises UserError naming the file when it can't be read.
    """
    file = paths_lib.place(path, "images")
    try:
        # Not by its name: Pillow would map some TIFF files into memory, and mixes the sides up of
        # those that are stored on their side.
        return decode(io.BytesIO(paths_lib.read_bytes(file)), then)
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more for damaged
    # files
    except Exception as error:
        missing = isinstance(error, FileNotFoundError)
        advice = "; name an image file, or a folder of them" if missing else ""
        why = getattr(error, "strerror", None) or error  # without the name once more
        raise UserError(
            f"{paths_lib.shown(file)} can't be read as an image ({type(error).__name__}: {why})"
            f"{advice}"
        ) from error


def decode(file: BinaryIO, then: Then = unchanged) -> np.ndarray:
    """Decode an image file's content, upright and in colour, to uint8 `[H, W, 3]`.

    Levels of 16 bits become their high byte, in grey as in colour: what Pillow makes of 16-bit
    colour.

    Args:
        file: the content.
        then: what is made of the image while its pixels are counted in the bound on what all
            threads hold at once; its result is returned. It must not decode another image.

    Raises:
        Exception: whatever Pillow's decoders do: OSError, SyntaxError, ValueError, struct.error
            and more.
    """
    try:
        opened = Image.open(file)
    except UnidentifiedImageError:  # whose own words name the object by its address
        raise UnidentifiedImageError("no image that Pillow can read") from None
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise ValueError(f"more than {most:,} pixels; make it smaller first") from None
    with opened as image:
        _check_shape(*image.size)
        with _budget.hold(image.width * image.height):
            grey16 = _has_16_bits(image)
            ImageOps.exif_transpose(image, in_place=True)  # a copy would take as much memory again
            return then(_colours(image, grey16))


def _check_shape(width: int, height: int) -> None:
    if max(height, width) > LONGEST * min(height, width):
        raise ValueError(
            f"{width} × {height} pixels, expected sides of at most {LONGEST} to 1; cut it first"
        )


def _has_16_bits(image: Image.Image) -> bool:
    """Return whether an image is grey in 16 bits.

    Pillow opens 16-bit PPM files, and before version 11 also PNG files, in its 32-bit mode.
    """
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _colours(image: Image.Image, grey16: bool) -> np.ndarray:
    if grey16:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode.startswith(_DEEP):
        raise ValueError(
            f"more than 16 bits a channel (Pillow's mode {image.mode}), whose range is not known; "
            "convert it to 8 bits"
        )
    if image.has_transparency_data:  # what lies under it is arbitrary: shown as on a white page
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def find(
    paths: Iterable[str | os.PathLike], tell: Callable[[str], None] = lambda note: None
) -> list[Place]:
    """Return the files of `paths`, in which a folder stands for the image files inside it.

    A folder's files are those of `walk`. `tell` is called with a line for each folder in which
    anything was left out. Raises UserError for a URL other than gs://, or a folder without images.
    """
    files: list[Place] = []
    for path in (paths_lib.place(path, "images") for path in paths):
        with paths_lib.reading("images"):
            if not files_lib.of(path).is_dir(path):
                files.append(path)
                continue
            within, left_out = walk(path)
        note = describe(left_out, path)
        if not within:
            raise UserError(
                f"{paths_lib.shown(path)}: no image files in this folder{note and '; ' + note}"
            )
        if note:
            tell(f"{paths_lib.shown(path)}: {note}")
        # "~" at the start of a file's own name is no home directory.
        files += [file.absolute() if str(file)[0] == "~" else file for file in within]
    return files


LeftOut = list[tuple[Place, str]]  # paths, and what kind of thing each is


def walk(folder: Place) -> tuple[list[Place], LeftOut]:
    """Return the image files inside `folder` by name, and what was left out of it.

    Files in its subfolders count too. Links to files and to folders are followed, but no folder is
    read twice, so that links in a circle end. What begins with "." is hidden, and is not told of.
    """
    if isinstance(folder, BucketPath):
        return _walk_bucket(folder)
    files: list[Place] = []
    left_out: LeftOut = []
    waiting, linked, seen = [folder], [], set()
    while waiting or linked:  # links last: a file has the name of the folder that it really is in
        here = waiting.pop() if waiting else linked.pop(0)
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:
                left_out.append((here, "links to folders that are read already"))
                continue
            seen.add((status.st_dev, status.st_ino))
            names = sorted(os.listdir(here))
        except OSError:
            left_out.append((here, "folders that can't be read"))
            continue
        for path in (here / name for name in names if name[0] != "."):
            if os.path.isdir(path):  # unlike Path.is_dir, it never raises
                (linked if path.is_symlink() else waiting).append(path)
            elif kind := _no_image(path):
                left_out.append((path, kind))
            else:
                files.append(path)
    return sorted(files), sorted(left_out)


def _walk_bucket(folder: BucketPath) -> tuple[list[Place], LeftOut]:
    """Do what `walk` does, by one listing."""
    files: list[Place] = []
    left_out: LeftOut = []
    for path in sorted(folder.objects()):
        if any(part[0] == "." for part in path.relative_to(folder).parts):
            continue
        if kind := _no_picture(path):
            left_out.append((path, kind))
        else:
            files.append(path)
    return files, left_out


def _no_image(path: Path) -> str:
    """Say what `path`, which is no folder, is if it is no image file by its name; else ""."""
    if not os.path.exists(path):
        return "links to nothing" if path.is_symlink() else "files that can't be looked at"
    if not os.path.isfile(path):
        return "pipes, sockets or devices"
    return _no_picture(path)


def _no_picture(path: Place) -> str:
    """Say what a file is if it is no image file by its name; else ""."""
    if not path.suffix:
        return "files without an extension"
    return "" if path.suffix.lower() in _extensions() else "files of other types"


@functools.cache
def _extensions() -> frozenset[str]:
    """Return the extensions of the image files that Pillow reads, in lower case: ".png", ..."""
    kinds = Image.registered_extensions()
    return frozenset(e for e in kinds if kinds[e] in Image.OPEN and kinds[e] not in _NOT_PICTURES)


def describe(left_out: LeftOut, folder: Place) -> str:
    """Say how many of each kind were left out of `folder`, with a few names; "" for none."""
    by_kind: dict[str, list[str]] = {}
    for path, kind in left_out:
        by_kind.setdefault(kind, []).append(paths_lib.shown(path.relative_to(folder)))
    kinds = []
    for kind, names in by_kind.items():
        more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
        kinds.append(f"{kind}: {len(names):,} ({', '.join(names[:NAMED])}{more})")
    return f"left out: {'; '.join(kinds)}" if kinds else ""


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
    if isinstance(image, str | os.PathLike):
        return read(image, lambda levels: _resized(levels, size))
    name = f"images[{index}]"
    levels = _levels(_array(image, name), name)
    try:
        _check_shape(levels.shape[1], levels.shape[0])
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return _resized(levels, size)


def _resized(levels: np.ndarray, size: int) -> np.ndarray:
    (height, width), (top, left) = tested_geometry(*levels.shape[:2], size)
    if levels.shape[:2] != (height, width):
        levels = np.asarray(
            Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)
        )
    return levels[top : top + size, left : left + size]


def _array(image: Any, name: str) -> np.ndarray:
    try:
        if isinstance(image, Image.Image):
            return _colours(image, _has_16_bits(image))
        return np.asarray(image)
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
