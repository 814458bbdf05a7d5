"""Where files are kept between runs. It imports nothing of ours: the command lines need it
before jax is imported.
"""

import contextlib
import os
import stat
from pathlib import Path


def _folder() -> Path:
    """SOFT_JAX_CACHE, or ~/.cache/soft_jax; for a user without a home directory, as in many
    containers, a folder of its own among the temporary files.
    """
    try:
        return Path(os.environ.get("SOFT_JAX_CACHE", "~/.cache/soft_jax")).expanduser()
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
COMPILED = CACHE / "xla"  # programs compiled once
