"""Zero-shot classification by a backbone that reads text (CLIP, Radford et al., 2021, section 3.1).

A class is told by its name in several templates, "a photo of a {}." among them: the mean of their
text features, each of norm 1. Nothing is trained.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.methods.prompts import normalize
from soft_jax.models.protocol import Architecture
from soft_jax.models.tokenizer import TEMPLATES


@functools.partial(jax.jit, static_argnames=("architecture", "class_names"))
def text_features(
    architecture: Architecture, params: pytrees.Tree, class_names: tuple[str, ...]
) -> jax.Array:
    """Return the text features `[classes, feature_dim]` of class names, of norm 1.

    An underscore in a name stands for a space.
    """
    names = [name.replace("_", " ") for name in class_names]
    texts = [template.format(name) for template in TEMPLATES for name in names]
    ids = architecture.tokenize(texts).reshape(len(TEMPLATES), len(names), -1)
    by_template = jax.lax.map(
        lambda rows: normalize(architecture.encode_text(params, rows)), jnp.asarray(ids)
    )
    return normalize(by_template.mean(axis=0))


@functools.partial(jax.jit, static_argnames="architecture")
def logits(
    architecture: Architecture, params: pytrees.Tree, text: jax.Array, query: jax.Array
) -> jax.Array:
    """Return logits `[N, classes]` of q(x) `[N, feature_dim]` by text features.

    `text` `[classes, feature_dim]` is `text_features`'.
    """
    return architecture.classify(params, {"text": text}, query)


def answers(
    architecture: Architecture,
    params: pytrees.Tree,
    class_names: tuple[str, ...],
    query: jax.Array,
) -> np.ndarray:
    """Return the probabilities `[N, classes]` of any class names for q(x) `[N, feature_dim]`."""
    text = text_features(architecture, params, class_names)
    return np.asarray(jax.nn.softmax(logits(architecture, params, text, query), axis=1))
