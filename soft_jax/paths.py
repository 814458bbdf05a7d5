"""Paths as users write them: "~" is the home directory, gs:// a bucket, and another URL no path."""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from soft_jax import buckets
from soft_jax.buckets import BucketPath
from soft_jax.errors import UserError

Place = Path | BucketPath  # where something is: on a disk, or in a bucket

# "gs:/bucket" too: that is what `Path` makes of "gs://bucket". One letter would be a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
FILE, FOLDER = "a file", "a folder"
_KINDS = {
    stat.S_ISDIR: FOLDER,
    stat.S_ISFIFO: "a named pipe (FIFO)",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def is_url(path: str | os.PathLike) -> bool:
    """Return whether `path` is written as a URL, such as gs://bucket/folder."""
    return _URL.match(os.fspath(path)) is not None


def place(path: str | os.PathLike, field: str) -> Place:
    """Return a path that a user wrote: in a bucket for gs://, else as `local` does.

    Raises UserError naming `field`, for another URL too, and where gs:// needs a package that is
    not installed.
    """
    if isinstance(path, BucketPath):
        return path
    if buckets.is_bucket(path):
        return buckets.path(os.fspath(path), field)
    return _on_disk(path, field, "local paths and buckets, as gs://BUCKET/FOLDER,")


def local(path: str | os.PathLike, field: str) -> Path:
    """Return a path that a user wrote, with "~" and "~user" expanded.

    Raises UserError naming `field`, the setting or argument that it is the value of, for a URL, an
    unknown user, or a zero character.
    """
    return _on_disk(path, field, "local paths")


def _on_disk(path: str | os.PathLike, field: str, known: str) -> Path:
    if is_url(path):
        raise UserError(
            f"{field}: {shown(path)!r} is a URL; only {known} are read and written here. Copy or "
            "mount it, and give that path"
        )
    if "\0" in os.fspath(path):
        raise UserError(f"{field}: {os.fspath(path)!r} has a zero character, which no path has")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # no such user, or "~" stands for nothing
        raise UserError(f"{field}: {shown(path)!r} can't be expanded ({error})") from error


def to_keep(path: str, field: str) -> str:
    """Return a path as a setting is stored: absolute, found from any folder; an empty one as it is.

    Raises UserError naming `field` where it is no path.
    """
    return str(place(path, field).absolute()) if path else path


@contextlib.contextmanager
def making(file: Place | None, field: str) -> Iterator[None]:
    """Make the folder that `file`, if any, is to be written to: now, not after what takes long.

    Where nothing is in it in the end, it is removed again. Raises UserError naming `field` where it
    can't be made.
    """
    if not isinstance(file, Path):  # a bucket has no folders
        yield
        return
    folder = file.absolute().parent
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{field}: {shown(folder)} can't be made ({error.strerror})") from error
    try:
        yield
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # it holds something
                each.rmdir()


def shown(path: str | os.PathLike) -> str:
    r"""Return a path as it can be printed and written to any UTF-8 file.

    Bytes of a file name that are no UTF-8 become `\xNN`.
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def reading(field: str) -> Iterator[None]:
    """Raise UserError naming `field` where an OSError comes up within: a bucket refuses, say."""
    try:
        yield
    except OSError as error:
        what = shown(error.filename) if isinstance(error.filename, str) else "it"
        raise UserError(f"{field}: {what} can't be read ({error.strerror or error})") from error


def read_bytes(path: str | os.PathLike) -> bytes:
    """Return the content of a file.

    Raises OSError, also for what is no regular file: a pipe would wait for a writer without end, a
    device may never end. Those are not opened.
    """
    if isinstance(path, BucketPath):
        return path.read_bytes()
    if (kind := kind_of(path)) != FILE:
        raise OSError(f"it is {kind}, not a file")
    return Path(path).read_bytes()


def kind_of(path: str | os.PathLike) -> str:
    """Say what a path on a disk is, a link followed: `FILE`, `FOLDER`, or "a device" and others.

    Raises OSError where it is not there or can't be looked at.
    """
    mode = os.stat(path).st_mode
    return next((kind for is_kind, kind in _KINDS.items() if is_kind(mode)), FILE)


def check_encoding(path: Place, field: str) -> None:
    """Raise UserError naming `field` for a folder's path that is no UTF-8: arrays can't be stored
    below it.
    """
    if shown(path) != str(path):
        raise UserError(f"{field}: {shown(path)!r} is not UTF-8; name a folder that is")


def check_writable(path: Place, field: str, kind: str) -> None:
    """Raise UserError naming `field` where another thing than a `kind` is at `path`.

    `kind` is `FILE` or `FOLDER`, what is going to be written. It is asked before what takes long: a
    pipe would be waited for afterwards, without end.
    """
    if kind == FOLDER:
        check_encoding(path, field)
    try:
        if isinstance(path, BucketPath):
            there = FOLDER if kind == FILE and path.is_dir() else kind
        else:
            there = kind_of(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{field}: {shown(path)} can't be written ({error.strerror})") from error
    if there != kind:
        other = "name a file in it" if there == FOLDER else f"name {kind}, or one that is not there"
        raise UserError(f"{field}: {shown(path)} is {there}; {other}")
