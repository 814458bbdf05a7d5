"""Train and evaluate a continual learner: python launch.py --config=configs/vit_cil.py
--workdir=runs/mine
"""

import os
import sys
from pathlib import Path

from soft_jax.cache import COMPILED

# Set before jax is imported. Programs compiled once are kept for later runs.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))

from absl import app, flags, logging
from ml_collections import config_flags

from soft_jax import config as config_lib
from soft_jax.errors import UserError


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    # Imported here: a wrong flag is answered at once, not after jax has started.
    from soft_jax import distributed
    from soft_jax.experiment import loop

    logging.set_verbosity(logging.ERROR)
    try:
        config = config_lib.from_config_dict(flags.FLAGS.config)
        if flags.FLAGS.distributed:
            distributed.join(flags.FLAGS.distributed)
        workdir = (
            flags.FLAGS.workdir
            or f"runs/{config.name}-{config.method}-{config.tasks}x-seed{config.seed}"
        )
        loop.run(config, workdir)
    except UserError as error:
        end(f"error: {error}")
    except OSError as error:
        end(f"error: {error}; finished tasks are as they were, and the same command continues")
    except loop.Preempted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + 15)


def end(message: str) -> None:
    """Say what is wrong and end; of several processes this one at once, without waiting for the
    others, which may wait for it.
    """
    print(message, file=sys.stderr, flush=True)
    os._exit(1) if flags.FLAGS.distributed else sys.exit(1)


def parse_flags(argv: list[str]) -> list[str]:
    """The flags, and the config file that they name; what is wrong in either is one line."""
    flags.DEFINE_string(
        "workdir",
        None,
        "The run's folder; the same command continues it. Default: "
        "runs/NAME-METHOD-TASKSx-seedSEED.",
    )
    flags.DEFINE_string(
        "distributed",
        None,
        'Several processes, one a host, in one run: "auto" on TPU pod slices and clusters that jax '
        'knows, else "HOST:PORT,INDEX,COUNT".',
    )
    try:
        # Defining it reads the file and the overrides of its fields.
        config_flags.DEFINE_config_file(
            "config",
            str(Path(__file__).parent / "configs" / "digits.py"),
            "The run's settings; variants by argument (configs/vit_cil.py:tasks=20), any field by "
            "--config.field=value.",
        )
        argv = app.parse_flags_with_usage(argv)
        flags.FLAGS.config.lock()
    except UserError as error:
        sys.exit(f"error: --config: {error}")
    except (
        OSError,
        SyntaxError,
        AttributeError,
        KeyError,
    ) as error:  # no such file, no Python, no such field
        sys.exit(f"error: --config: {type(error).__name__}: {error}")
    return argv


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
