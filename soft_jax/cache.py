"""Where files are kept between runs: on a disk, or in a bucket that several machines share. It
imports nothing of ours: the command lines need it before jax is imported.
"""

import contextlib
import os
import stat
from pathlib import Path


def _folder() -> str:
    """Return SOFT_JAX_CACHE, which may be a URL, or else the folder of `_on_disk`.

    A "~user" who is nobody stays as it is: who uses it says so.
    """
    named = os.environ.get("SOFT_JAX_CACHE", "")
    if "://" in named:
        return named
    return str(Path(os.path.expanduser(named)) if named else _on_disk())


def _on_disk() -> Path:
    """Return ~/.cache/soft_jax.

    For a user without a home directory, as in many containers, it is a folder of its own among the
    temporary files.
    """
    try:
        return Path("~/.cache/soft_jax").expanduser()
    except RuntimeError:  # "~" stands for nothing
        import tempfile  # here, since it is hardly ever needed

        folder = Path(tempfile.gettempdir()) / f"soft_jax-{os.getuid()}"
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700)
        # Compiled programs are kept there, and anyone may make a folder of that name first.
        there = folder.lstat()
        if stat.S_ISDIR(there.st_mode) and there.st_uid == os.getuid():
            return folder
        return Path(tempfile.mkdtemp(prefix="soft_jax-"))


CACHE = _folder()
COMPILED = f"{CACHE}/xla"  # programs compiled once


def on_disk() -> Path:
    """Return where copies are kept of what has to be on a disk to be read."""
    return _on_disk() if "://" in CACHE else Path(CACHE)
