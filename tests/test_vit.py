import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soft_jax.models.vit import ViT
from tests.conftest import TINY

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_parts_make_the_whole(backbone, rng):
    vit, params = ViT(TINY), {"params": backbone}
    images = rng.random((2, 16, 16, 3), np.float32)
    tokens = vit.apply(params, images, method="embed")
    assert tokens.shape == (2, 17, 24)
    tokens = vit.apply(params, tokens, None, 0, 2, method="run_blocks")
    tokens = vit.apply(params, tokens, None, 2, method="run_blocks")
    np.testing.assert_allclose(
        vit.apply(params, tokens, method="pool"), vit.apply(params, images), atol=1e-5
    )


def test_prefix_acts_only_through_attention(backbone, rng):
    """A prefix whose keys get no weight and a prefix of no length both leave the features as
    they are.
    """
    vit, params = ViT(TINY), {"params": backbone}
    images = rng.random((2, 16, 16, 3), np.float32)
    plain = vit.apply(params, images)
    empty = {1: jnp.zeros((1, 2, 0, 3, 8))}
    np.testing.assert_allclose(vit.apply(params, images, empty), plain, atol=1e-6)
    full = {1: jnp.ones((1, 2, 2, 3, 8))}
    assert np.abs(vit.apply(params, images, full) - plain).max() > 1e-3


def test_bfloat16_computes_near_float32(backbone, rng):
    images = rng.random((2, 16, 16, 3), np.float32)
    with jax.numpy_dtype_promotion("standard"):  # Flax's LayerNorm mixes in float32 statistics
        low = ViT(dataclasses.replace(TINY, dtype="bfloat16")).apply({"params": backbone}, images)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        low.astype(jnp.float32), ViT(TINY).apply({"params": backbone}, images), atol=0.15
    )


def test_backbone_is_an_argument_not_a_constant(backbone):
    """A frozen tree captured by closure would be baked into the program and cost its size again."""
    images = jnp.zeros((1, 16, 16, 3))
    jaxpr = jax.make_jaxpr(lambda p, x: ViT(TINY).apply({"params": p}, x))(backbone, images)
    assert sum(np.size(c) for c in jaxpr.consts) == 0


def test_sizes_that_do_not_fit():
    with pytest.raises(
        ValueError, match="image_size 30 is not a multiple of the backbone's patch size 4"
    ):
        dataclasses.replace(TINY, image_size=30)
