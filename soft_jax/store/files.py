"""What the store does with files, on a disk and in a bucket: one form for each, chosen by the path.

On a disk what is whole or not at all is made under another name and then renamed, and a folder is
held by flock, which the kernel lets go of when the process ends. A bucket knows neither:

- A text or picture is one object, which is written whole or not at all.
- Beside a checkpoint that is being saved or removed lies an object `NAME.partial`. Where a program
  was killed meanwhile, or the save failed, the checkpoint counts as whole if Orbax has written
  `commit_success.txt` in it, which is the last object that it writes, and is cleared away when the
  folder is next opened if not.
- A folder is held by an object `.lock`, as `bucket_lock` says.
"""

import abc
import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from soft_jax.buckets import BucketPath
from soft_jax.errors import UserError
from soft_jax.paths import Place
from soft_jax.store import bucket_lock, disk_lock

_PARTIAL, _COMMITTED = ".partial", "commit_success.txt"


class Lock(Protocol):
    """What keeps other programs out of a run's folder."""

    def make(self, folders: Sequence[Place]) -> None:
        """Make folders in it that are written in as well. Raises OSError."""

    def check(self) -> None:
        """Raise OSError where a folder is no longer the one that was locked, or no longer ours."""

    def close(self, keep: bool = True) -> None:
        """Let others in; without `keep`, what was made for the lock is removed."""


class Files(abc.ABC):
    """The operations that a disk and a bucket do in different ways."""

    @abc.abstractmethod
    def lock(self, root: Place) -> Lock:
        """Make a run's folder where it is missing, and lock it.

        Raises OSError where it can't be written, UserError where another process holds it.
        """

    @abc.abstractmethod
    def is_locked(self, root: Place) -> bool:
        """Return whether some process has locked a run's folder, as far as can be seen."""

    @abc.abstractmethod
    def exists(self, path: Place) -> bool:
        """Return whether anything is at `path`, also a link to nothing."""

    @abc.abstractmethod
    def is_dir(self, path: Place) -> bool:
        """Return whether `path` is a folder. A disk raises nothing."""

    @abc.abstractmethod
    def read_own(self, path: Place) -> bytes:
        """Return the content of a file that the store wrote; a link is not followed."""

    @abc.abstractmethod
    def write(self, path: Place, data: bytes, durable: bool = True) -> None:
        """Write a file whole or not at all; if `durable`, it outlives a power cut afterwards.

        Raises UserError when it can't be written; the file is then as it was.
        """

    @abc.abstractmethod
    def append(self, path: Place, data: bytes, size: int) -> bool:
        """Add to the end of a file of `size` bytes; return whether that was done.

        It is not where the file is not as it was left, or there is no way to add to a file.
        """

    @abc.abstractmethod
    def checkpoints(self, folder: Place) -> list[str]:
        """Return the names of what is in `folder`; of checkpoints, only of those that are whole.

        A disk raises FileNotFoundError where there is no such folder.
        """

    @abc.abstractmethod
    @contextlib.contextmanager
    def saving(self, path: Place) -> Any:
        """Mark the checkpoint at `path` as not whole within; if it fails, remove what there is."""

    @abc.abstractmethod
    def remove(self, path: Place) -> None:
        """Remove a checkpoint; of a link the link alone."""

    @abc.abstractmethod
    def clean(self, folder: Place) -> None:
        """Remove what saves and removals that were cut off left in `folder`."""

    @abc.abstractmethod
    def move(self, path: Place, target: Place) -> None:
        """Move a checkpoint to another folder, which is made where it is missing."""

    @abc.abstractmethod
    def size(self, folder: Place) -> int:
        """Return the bytes of all files in `folder`, at any depth."""

    @abc.abstractmethod
    def state(self, folder: Place) -> tuple | None:
        """Return what differs once the files in `folder` were written again.

        It is None where that can't be told.
        """

    @abc.abstractmethod
    def kvstore(self, path: Place) -> dict[str, Any]:
        """Return how TensorStore calls `path`: the `kvstore` of a spec."""

    @abc.abstractmethod
    def patience(self) -> dict[str, Any]:
        """Return how TensorStore tries again, as the JSON of a context; empty for its default."""


class _OnDisk(Files):
    def lock(self, root: Path) -> Lock:
        held = (
            f"workdir: another process is running in {root}; wait for it, or take another workdir"
        )
        return disk_lock.DiskLock(root, held)

    def is_locked(self, root: Path) -> bool:
        return os.path.lexists(root / disk_lock.FILE)

    def exists(self, path: Path) -> bool:
        return os.path.lexists(path)

    def is_dir(self, path: Path) -> bool:
        return os.path.isdir(path)  # unlike Path.is_dir, it never raises

    def read_own(self, path: Path) -> bytes:
        # A pipe in its place is not waited for: it holds nothing.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(path, flags), "rb") as file:
            return file.read()

    def write(self, path: Path, data: bytes, durable: bool = True) -> None:
        partial = _partial(path)
        try:
            partial.unlink(missing_ok=True)  # of a process that was killed
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with open(os.open(partial, flags, 0o666), "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(partial, path)
            if durable:
                sync_folder(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise UserError(
                f"{path} could not be written ({error.strerror}); make room or mend the disk, and "
                "give the same command again"
            ) from error

    def append(self, path: Path, data: bytes, size: int) -> bool:
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
        try:
            file = open(os.open(path, flags), "ab")  # noqa: SIM115
        except OSError:  # it is not there, or a link
            return False
        with file:
            as_left = os.fstat(file.fileno()).st_size == size
            if as_left:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        return as_left

    def checkpoints(self, folder: Path) -> list[str]:
        return [path.name for path in folder.iterdir()]

    @contextlib.contextmanager
    def saving(self, path: Path) -> Any:
        try:
            yield  # Orbax saves under another name
        except Exception:
            with contextlib.suppress(OSError):
                self.clean(path.parent)
            raise

    def remove(self, path: Path) -> None:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)

    def clean(self, folder: Path) -> None:
        # Threads of a save that just failed may still be writing: a few tries.
        for _ in range(50):
            partials = list(folder.glob("*orbax-checkpoint-tmp*"))
            if not partials:
                return
            for partial in partials:
                with contextlib.suppress(OSError):
                    self.remove(partial)
            time.sleep(0.1)

    def move(self, path: Path, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)

    def size(self, folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def state(self, folder: Path) -> tuple | None:
        try:
            with os.scandir(folder) as entries:
                stats = [(entry.name, entry.stat()) for entry in entries]
        except OSError:
            return None
        return tuple(sorted((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats))

    def kvstore(self, path: Path) -> dict[str, Any]:
        # TensorStore takes no ".." in a path, and what stands before it may be a link.
        return {"driver": "file", "path": os.path.realpath(path)}

    def patience(self) -> dict[str, Any]:
        return {}


def _partial(path: Place) -> Place:
    """Return where a file is written before it gets its name, on a disk."""
    return path.with_name(f".{path.name}.partial")


def sync(path: Path) -> None:
    """Wait until a file, or a folder and all that is in it, outlives a power cut.

    Raises OSError where a file can't be brought to the disk: it may be lost then.
    """
    for each in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if each.is_dir():
            sync_folder(each)
        else:
            with open(each, "rb") as file:
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names of what is in a folder are on the disk, where that can be done."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems can't; the file itself is safe there.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _InBucket(Files):
    def lock(self, root: BucketPath) -> Lock:
        return bucket_lock.BucketLock(root)

    def is_locked(self, root: BucketPath) -> bool:
        return (root / bucket_lock.FILE).exists()

    def exists(self, path: BucketPath) -> bool:
        return path.exists()

    def is_dir(self, path: BucketPath) -> bool:
        return path.is_dir()

    def read_own(self, path: BucketPath) -> bytes:
        return path.read_bytes()

    def write(self, path: BucketPath, data: bytes, durable: bool = True) -> None:
        try:
            path.write_bytes(data)
        except OSError as error:
            raise UserError(
                f"{path} could not be written ({error.strerror}); see that the bucket is there and "
                "may be written, and give the same command again"
            ) from error

    def append(self, path: BucketPath, data: bytes, size: int) -> bool:
        return False

    def checkpoints(self, folder: BucketPath) -> list[str]:
        names, halves, _ = self._found(folder)
        return sorted(names - halves)

    def _found(self, folder: BucketPath) -> tuple[set[str], set[str], set[str]]:
        """Return the folders in `folder`, those of them that are not whole, and those marked."""
        below = [path.relative_to(folder).parts for path in folder.objects()]
        names = {name for name, *rest in below if rest}
        committed = {name for name, *rest in below if rest == [_COMMITTED]}
        files = [name for name, *rest in below if not rest]
        marked = {name.removesuffix(_PARTIAL) for name in files if name.endswith(_PARTIAL)}
        return names, marked - committed, marked

    @contextlib.contextmanager
    def saving(self, path: BucketPath) -> Any:
        marker = _marker(path)
        marker.write_bytes(b"")
        try:
            yield
        except Exception:
            # The marker stays: objects may still come whose requests are being tried again.
            with contextlib.suppress(OSError):  # a bucket that can't be reached
                path.rmtree()
            raise
        marker.unlink(missing_ok=True)

    def remove(self, path: BucketPath) -> None:
        marker = _marker(path)
        marker.write_bytes(b"")
        (path / _COMMITTED).unlink(missing_ok=True)
        path.rmtree()
        marker.unlink(missing_ok=True)

    def clean(self, folder: BucketPath) -> None:
        _, halves, marked = self._found(folder)
        for name in marked:
            if name in halves:
                (folder / name).rmtree()
            _marker(folder / name).unlink(missing_ok=True)

    def move(self, path: BucketPath, target: BucketPath) -> None:
        for each in path.objects():
            each.copy(target / each.relative_to(path))
        self.remove(path)

    def size(self, folder: BucketPath) -> int:
        return sum(each.size for each in folder.objects().values())

    def state(self, folder: BucketPath) -> tuple | None:
        return None  # asking costs a request for each array, as reading it does

    def kvstore(self, path: BucketPath) -> dict[str, Any]:
        return bucket_lock.kvstore(path)

    def patience(self) -> dict[str, Any]:
        return bucket_lock.PATIENCE


def _marker(path: BucketPath) -> BucketPath:
    return path.with_name(path.name + _PARTIAL)


_ON_DISK, _IN_BUCKET = _OnDisk(), _InBucket()


def of(path: Place) -> Files:
    """Return the operations for where `path` is."""
    return _IN_BUCKET if isinstance(path, BucketPath) else _ON_DISK


def refuse_link(path: Place) -> None:
    """Raise UserError where `path` is a symbolic link: what is written there would go elsewhere."""
    if path.is_symlink():
        raise UserError(
            f"workdir: {path} is a symbolic link; put what it points to in its place, or remove it"
        )


def write_text(path: Place, text: str) -> None:
    r"""Write a file, UTF-8, whole or not at all: it is safe when this returns.

    Bytes of a file name in `text` that are no UTF-8 become `\xNN`.

    Raises UserError when it can't be written; the file is then as it was.
    """
    refuse_link(_partial(path))
    raw = text.encode("utf-8", "surrogateescape")
    of(path).write(path, raw.decode("utf-8", "backslashreplace").encode())
