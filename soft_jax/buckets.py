"""Paths in a bucket of Google Cloud Storage, as gs://bucket/folder/file.

They have those of `pathlib.Path`'s methods that the package uses, so that most of it need not know
where a path leads. A bucket holds objects and no folders: a path is a folder where objects lie
below it, there is nothing to make before one is written, and an object is written whole or not at
all. Nothing is taken from a cache, since other programs read and write there too.
"""

import errno
import functools
import importlib.util
import logging
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, ParamSpec, TypeVar

from soft_jax.errors import UserError

_URL = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(/.*)?", re.DOTALL)
_FILE, _FOLDER = "file", "directory"  # as fsspec calls them
_GOOGLE = "https://storage.googleapis.com"
_PATIENCE = 10  # seconds

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _as_os_error(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a method of `BucketPath` raise OSError alone, with a reason and the path, as files do."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        path = str(args[0])
        try:
            return function(*args, **kwargs)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        # gcsfs, its HTTP client and Google's sign-in each have errors of their own.
        except Exception as error:
            if isinstance(error, OSError) and error.filename == path:  # of another method here
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise OSError(errno.EIO, reason, path) from error

    return call


def check_reachable() -> None:
    """Raise OSError where no connection can be made: gcsfs would try for a minute, deaf to signals.

    With a proxy, which connects in our place, nothing is looked at.
    """
    server = urllib.parse.urlsplit(os.environ.get("STORAGE_EMULATOR_HOST") or _GOOGLE)
    if server.hostname and not urllib.request.getproxies():
        port = server.port or (80 if server.scheme == "http" else 443)
        socket.create_connection((server.hostname, port), timeout=_PATIENCE).close()


@functools.cache
def _storage() -> Any:
    """Return gcsfs's file system, the one that Orbax and JAX get through epath as well."""
    import fsspec

    check_reachable()
    # Of each failed try gcsfs logs pages, which the error that it raises says in a line.
    if (logger := logging.getLogger("gcsfs")).getEffectiveLevel() >= logging.WARNING:
        logger.setLevel(logging.CRITICAL)
    # Its memory of what was there knows nothing of other programs.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs", finalize_on_close=True)


class Object(NamedTuple):
    """What a listing tells of an object: its bytes, and a number that each writing changes."""

    size: int
    generation: str


class BucketPath(os.PathLike):
    """A path in a bucket. Methods that look there, read or write raise OSError, and no other."""

    def __init__(self, url: str):
        """Take a URL. Raises UserError where it names no bucket."""
        found = _URL.fullmatch(url)
        if not found:
            raise UserError(
                f"{url!r} names no bucket; write gs://BUCKET/FOLDER, with the bucket's name in "
                "lower case"
            )
        self._path = PurePosixPath(found[1] + (found[2] or ""))
        self._kind: str | None = None  # where a listing has told it

    def _of(self, path: PurePosixPath, kind: str | None = None) -> "BucketPath":
        made = BucketPath.__new__(BucketPath)
        made._path, made._kind = path, kind
        return made

    def __truediv__(self, other: str | os.PathLike) -> "BucketPath":
        return self._of(self._path / other)

    def __str__(self) -> str:
        return f"gs://{self._path}"

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"BucketPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and self._path == other._path

    def __lt__(self, other: "BucketPath") -> bool:
        return self._path < other._path

    def __hash__(self) -> int:
        return hash(self._path)

    @property
    def bucket(self) -> str:
        """Return the bucket's name."""
        return self._path.parts[0]

    @property
    def key(self) -> str:
        """Return the object's name in the bucket."""
        return "/".join(self._path.parts[1:])

    @property
    def name(self) -> str:
        """Return the last part."""
        return self._path.name

    @property
    def suffix(self) -> str:
        """Return the extension, such as ".png"; "" for none."""
        return self._path.suffix

    @property
    def parent(self) -> "BucketPath":
        """Return the path without its last part; of a bucket, the bucket."""
        return self._of(self._path.parent if self.key else self._path)

    def with_name(self, name: str) -> "BucketPath":
        """Return the path with another last part."""
        return self._of(self._path.with_name(name))

    def with_suffix(self, suffix: str) -> "BucketPath":
        """Return the path with another extension."""
        return self._of(self._path.with_suffix(suffix))

    def relative_to(self, folder: "BucketPath") -> PurePosixPath:
        """Return the part below `folder`."""
        return self._path.relative_to(folder._path)

    def absolute(self) -> "BucketPath":
        """Return the path: it is the same from everywhere."""
        return self

    def is_symlink(self) -> bool:
        """Return False: a bucket has no links."""
        return False

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a bucket has no folders to make."""

    @_as_os_error
    def _look(self) -> str | None:
        if self._kind is None:
            try:
                return _storage().info(str(self._path))["type"]
            except FileNotFoundError:
                return None
        return self._kind

    def exists(self) -> bool:
        """Return whether it is an object, or objects lie below it."""
        return self._look() is not None

    def is_file(self) -> bool:
        """Return whether it is an object."""
        return self._look() == _FILE

    def is_dir(self) -> bool:
        """Return whether objects lie below it."""
        return self._look() == _FOLDER

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yield what lies directly below it."""
        yield from self._listed()

    @_as_os_error
    def _listed(self) -> list["BucketPath"]:
        entries = _storage().ls(str(self._path), detail=True)
        paths = [(PurePosixPath(entry["name"]), entry["type"]) for entry in entries]
        return [self._of(path, kind) for path, kind in paths if path != self._path]

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yield what lies directly below it and fits a pattern; nothing where nothing lies."""
        try:
            yield from (path for path in self._listed() if path._path.match(pattern))
        except FileNotFoundError:
            return

    @_as_os_error
    def objects(self) -> dict["BucketPath", "Object"]:
        """Return all objects below it, at any depth."""
        found = _storage().find(str(self._path), detail=True)
        return {
            self._of(PurePosixPath(name), _FILE): Object(entry["size"], entry["generation"])
            for name, entry in found.items()
            if not name.endswith("/")
        }

    @_as_os_error
    def read_bytes(self) -> bytes:
        """Return the object's content."""
        return _storage().cat_file(str(self._path))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the object's content as text."""
        return self.read_bytes().decode(encoding, errors)

    @_as_os_error
    def write_bytes(self, data: bytes) -> None:
        """Write the object, whole or not at all."""
        _storage().pipe_file(str(self._path), data)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Write the object, whole or not at all."""
        self.write_bytes(text.encode(encoding))

    @_as_os_error
    def download(self, target: Path) -> None:
        """Write the object's content to a file on a disk, a part at a time."""
        _storage().get_file(str(self._path), str(target))

    @_as_os_error
    def copy(self, target: "BucketPath") -> None:
        """Copy the object within the storage."""
        _storage().cp_file(str(self._path), str(target._path))

    @_as_os_error
    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            _storage().rm_file(str(self._path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    @_as_os_error
    def rmtree(self) -> None:
        """Remove all objects below it."""
        if found := self.objects():
            _storage().rm([str(path._path) for path in found])


def is_bucket(path: str | os.PathLike) -> bool:
    """Return whether a path is written as one in a bucket, gs://..."""
    return os.fspath(path).startswith("gs://")


def path(url: str, field: str) -> BucketPath:
    """Return the path that a URL names.

    Raises UserError naming `field`, what it is the value of, where gcsfs is missing, or the URL
    names no bucket.
    """
    if not importlib.util.find_spec("gcsfs"):
        raise UserError(
            f'{field}: {url!r} is in a bucket, which needs gcsfs: pip install "soft_jax[gcs]"'
        )
    try:
        return BucketPath(url)
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
