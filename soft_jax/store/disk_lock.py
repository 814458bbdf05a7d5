"""A folder on a disk, a run's or a library's, held by one process by flock."""

import contextlib
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from soft_jax.errors import UserError

FILE = ".lock"


class DiskLock:
    """A folder that is made and locked. The kernel lets go of it when the process ends, however."""

    def __init__(self, root: Path, held: str):
        """Make `root` and lock it.

        Raises OSError where it can't be written, UserError(`held`) where another process holds it.
        """
        self._folders, self._opened = [root], []
        wanted = (*reversed(root.absolute().parents), root, root / FILE)
        # Files and folders that were not there, outermost first.
        self._made = [path for path in wanted if not os.path.lexists(path)]
        root.mkdir(parents=True, exist_ok=True)
        # Not emptied: whatever it is, it stays as it is.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._file = open(os.open(root / FILE, flags, 0o666), "r+b")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise UserError(held) from error

    def make(self, folders: Sequence[Path]) -> None:
        """Make folders in it that are written in as well. Raises OSError."""
        self._made += [path for path in folders if not os.path.lexists(path)]
        self._folders += folders
        for folder in folders:
            folder.mkdir(exist_ok=True)
        self._opened = self._identities()

    def _identities(self) -> list[tuple[int, int]]:
        """Return device and inode of each folder that is written in."""
        stats = [os.stat(folder) for folder in self._folders]
        return [(stat.st_dev, stat.st_ino) for stat in stats]

    def check(self) -> None:
        """Raise OSError where a folder is no longer the one that was locked."""
        if self._identities() != self._opened:
            raise OSError("it is another folder")

    def close(self, keep: bool = True) -> None:
        """Let others in; without `keep`, what was made here and is empty is removed."""
        with contextlib.closing(self._file):
            for path in () if keep else reversed(self._made):
                # A folder that holds something by now stays.
                with contextlib.suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()
