"""Every test runs on four simulated devices, with strict dtypes and ranks; warnings are errors."""

import atexit
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs compiled once serve all workers, and the programs that tests start; xdist's workers
# inherit the controller's environment.
if "SOFT_JAX_TESTS_COMPILED" not in os.environ:
    os.environ["SOFT_JAX_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="soft_jax_compiled")
    atexit.register(shutil.rmtree, os.environ["SOFT_JAX_TESTS_COMPILED"], ignore_errors=True)
COMPILED = os.environ["SOFT_JAX_TESTS_COMPILED"]
# A shell lets what it starts in the background ignore Ctrl-C, of which there are tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax

jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from contextlib import contextmanager
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from soft_jax.config import Config
from soft_jax.data import sources
from soft_jax.evaluation import pictures
from soft_jax.experiment import settings as settings_lib
from soft_jax.methods import hosts, masks
from soft_jax.methods.method import Method
from soft_jax.models import backbones
from soft_jax.models.vit import ViTConfig
from soft_jax.training import train_step

ROOT = Path(__file__).parent.parent
# A busy machine is slow, not wrong.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")

TINY = ViTConfig(image_size=16, patch_size=4, dim=24, depth=4, heads=3, mlp_dim=48)
# Where a run on it has masks and prompts.
LAYERS = {"mask_layers": (3, 4), "e_prompt_layers": (3, 4), "g_prompt_layers": (1,)}


def tiny_config(**settings) -> Config:
    """A config of digits on the tiny backbone: its layers, and those of `settings` that the method
    has a use for.
    """
    return Config(**settings_lib.drop_unused({"dataset": "digits", **LAYERS, **settings}))


def soft_masks(init_as="uniform", modules=("qkv", "proj"), layers=(2, 3)) -> masks.SoftMask:
    return masks.SoftMask(TINY.kernel_paths(modules, layers), layers, init_as)


DUALPROMPT = hosts.DualPrompt(e_layers=(2, 3), e_length=3, g_layers=(0,), g_length=2)


def names(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def tiny_method(**changes) -> Method:
    settings = {
        "architecture": TINY,
        "class_names": names(6),
        "reparametrization": soft_masks(),
        "host": DUALPROMPT,
    }
    return Method(**settings | changes)


@pytest.fixture(scope="session")
def backbone():
    """`tiny_backbone`, drawn once."""
    return tiny_backbone()


def tiny_backbone():
    """Random frozen parameters of the tiny ViT, spread wide enough that nothing is nearly
    linear.
    """
    rng, images = np.random.default_rng(0), np.zeros((1, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(TINY.module().init, jax.random.key(0), images)[
        "params"
    ]  # drawn by NumPy, which compiles nothing

    def draw(path, like):
        mean = 1 if path[-1].key == "scale" else 0
        return jax.numpy.asarray(
            rng.normal(mean, 0.3 if path[-1].key == "kernel" else 0.2, like.shape), like.dtype
        )

    return jax.tree.map_with_path(draw, shapes)


@contextmanager
def tiny_world(backbone, patch):
    """Runs and predictors get the tiny backbone and the first 80 training and test digits, which
    are given, until `patch` is undone. Runs there draw no pictures, which take longer than they do.
    """
    digits = sources.load("digits")
    few = sources.Dataset(
        *(
            sources.InMemoryImages(s.images[:80], s.labels[:80])
            for s in (digits.train, digits.test)
        ),
        digits.class_names,
    )
    patch.setattr(
        backbones, "load", lambda *_: backbones.Backbone("tiny", TINY, backbone, "0" * 64)
    )
    patch.setattr(sources, "load", lambda *_: few)
    patch.setattr(pictures, "draw", lambda *_: [])
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an int
        yield few


@pytest.fixture
def digits(backbone, monkeypatch):
    """`tiny_world` around one test, by its own patches: those of another would be undone in
    another order, and some come back.
    """
    with tiny_world(backbone, monkeypatch) as few:
        yield few


def python(*arguments, cwd=ROOT, timeout=120):
    """Run Python in a process of its own, where it finds this folder's packages."""
    found = os.environ.get("PYTHONPATH")
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), found)))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@contextmanager
def hardly_optimized():
    """Within, programs are: compiling tiny ones is most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def emulator():
    """A bucket for the tests of a module; with `calm_after` it refuses nothing after each."""
    from tests.emulator import running

    with running() as emulator:
        yield emulator


@pytest.fixture
def calm_after(emulator):
    yield
    emulator.calm()


@contextmanager
def found_instead(backbone, images):
    """Within, every backbone is `backbone` and every data set what `images()` returns, and
    programs are hardly optimized: compiling is most of the time.
    """
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(backbones, "load", lambda *_: backbone)
        patch.setattr(sources, "load", lambda *_: images())
        with hardly_optimized():
            yield


@pytest.fixture(autouse=True)
def _reset_verbosity():
    """Undo what commands of earlier tests, and of fixtures that several share, say of logging."""
    logging.getLogger("absl").setLevel(logging.NOTSET)


@pytest.fixture(scope="module", autouse=True)
def _drop_programs():
    """Let a module's compiled programs go with it: all of them together fill a worker's memory."""
    yield
    jax.clear_caches()
    train_step.compile_step.cache_clear()
    train_step.compile_steps.cache_clear()
    train_step.compile_init.cache_clear()


@pytest.fixture
def fast_compile():
    """For tests of definitions on tiny models, where compiling is most of the time; not for
    those of bits.
    """
    with hardly_optimized():
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
