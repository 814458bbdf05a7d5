"""Where files are kept between runs. It imports nothing of ours: the command lines need it
before jax is imported.
"""

import os
from pathlib import Path

CACHE = Path(os.environ.get("SOFT_JAX_CACHE", "~/.cache/soft_jax")).expanduser()
COMPILED = CACHE / "xla"  # programs compiled once
