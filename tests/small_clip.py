"""A tiny CLIP with the vocabulary of CLIP's tokenizer: classes are told by their names."""

import dataclasses
from contextlib import contextmanager

import jax
import numpy as np

from soft_jax import pytrees
from soft_jax.config import Config
from soft_jax.data import sources
from soft_jax.experiment import settings as settings_lib
from soft_jax.methods import registry
from soft_jax.methods.method import Method
from soft_jax.models import backbones
from soft_jax.models.clip import CLIPConfig
from tests.conftest import found_instead

SMALL = CLIPConfig(
    image_size=8,
    patch_size=4,
    dim=12,
    depth=2,
    heads=3,
    mlp_dim=20,
    text_dim=8,
    text_depth=2,
    text_heads=2,
    text_mlp_dim=16,
    embed_dim=10,
    quick_gelu=True,
)
# For tests that compile gradients of a whole network.
ONE = dataclasses.replace(SMALL, depth=1, text_depth=1)
NAMES = ("cat", "green_sea turtle", "apple", "dog", "rose", "aquarium fish")
# Where a run on it has masks.
LAYERS = {"mask_layers": (2,), "text_mask_layers": (1,)}


def small_config(method: str = "clipprompt+softtf", **settings) -> Config:
    """A config of a method on the tiny CLIP: its layers, and those of `settings` that the method
    has a use for.
    """
    return Config(**settings_lib.drop_unused({"method": method, **LAYERS, **settings}))


def small_method(
    method: str = "clipprompt+softtf", architecture=SMALL, names=NAMES, at_once=3, **settings
) -> Method:
    return registry.make_method(small_config(method, **settings), architecture, names, at_once)


def small_params(architecture: CLIPConfig = SMALL, seed: int = 0) -> pytrees.Tree:
    """Random frozen parameters, float32, drawn by NumPy, which compiles nothing."""
    rng = np.random.default_rng(seed)
    example = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 4), np.int32)
    shapes = jax.eval_shape(architecture.module().init, jax.random.key(0), *example)["params"]

    def draw(path, like):
        if path[-1].key == "logit_scale":
            return np.asarray(2, like.dtype)
        mean = 1 if path[-1].key == "scale" else 0
        return np.asarray(rng.normal(mean, 0.4, like.shape), like.dtype)

    return jax.tree.map_with_path(draw, shapes)


@contextmanager
def few_digits_on_clip():
    """Within, runs, libraries and predictors get the tiny CLIP, and a few digits, which are given,
    under names of CLIP's words.
    """
    digits = sources.load("digits")

    def few(split, count):
        rows = [np.flatnonzero(split.labels == class_)[:count] for class_ in range(len(NAMES))]
        return split.take(np.sort(np.concatenate(rows)))

    data = sources.Dataset(few(digits.train, 8), few(digits.test, 5), NAMES)
    clip = backbones.Backbone("small", ONE, small_params(ONE), "0" * 64)
    with found_instead(clip, lambda: data):
        yield data
