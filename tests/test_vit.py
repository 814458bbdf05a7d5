import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soft_jax import pytrees
from soft_jax.models.protocol import Preprocessing
from soft_jax.models.transformer import Dense
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


def test_layers_are_the_same_function_in_each_backend_s_form():
    """In float64, with the gradients. A TPU's program keeps images apart, a CPU's does not."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel, bias = (rng.normal(size=shape) for shape in ((2, 3, 4), (4, 6), (6,)))

        def gradients_of(layer):
            def total(x, kernel, bias):
                out = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
                return (jnp.tanh(out) ** 2).sum()

            return jax.jit(jax.value_and_grad(total, (0, 1, 2)))

        gradients = gradients_of(Dense(6, dtype=np.float64))
        expected = gradients_of(nn.Dense(6, dtype=np.float64))(x, kernel, bias)
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-12),
            gradients(x, kernel, bias),
            expected,
        )
        traced = gradients.trace(x, kernel, bias)
        forms = {
            "cpu": ("<6x4xf64>, tensor<4x6xf64>", "<6x6xf64>, tensor<6x4xf64>"),
            "tpu": ("<2x3x4xf64>, tensor<4x6xf64>", "<2x3x6xf64>, tensor<2x3x4xf64>"),
        }
        for platform, (forward, of_kernel) in forms.items():
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            products = [line for line in text.splitlines() if "dot_general" in line]
            assert len(products) == 3
            assert forward in products[0]
            assert of_kernel in products[1]


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
    half = dataclasses.replace(TINY, dtype="bfloat16")
    with jax.numpy_dtype_promotion("standard"):  # Flax's LayerNorm mixes in float32 statistics
        low = jax.jit(half.features)(backbone, images)
    assert low.dtype == jnp.bfloat16
    whole = jax.jit(TINY.features)(backbone, images)
    np.testing.assert_allclose(low.astype(jnp.float32), whole, atol=0.15)


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


def test_where_layers_are():
    """Paths and back; biases, and what is in no block, are no layer's kernels."""
    paths = TINY.kernel_paths(("proj", "mlp"), (1, 3))
    assert paths == (
        "blocks_1/attn/proj/kernel",
        "blocks_1/mlp/fc1/kernel",
        "blocks_1/mlp/fc2/kernel",
        "blocks_3/attn/proj/kernel",
        "blocks_3/mlp/fc1/kernel",
        "blocks_3/mlp/fc2/kernel",
    )
    assert [TINY.layer_of(path) for path in paths] == [1, 1, 1, 3, 3, 3]
    assert TINY.layer_of("blocks_11/norm1/scale") == 11
    assert TINY.layer_of("patch_embed/kernel") is None
    assert TINY.query_layer(("blocks_2", "attn", "qkv")) == 2
    assert TINY.query_layer(("blocks_2", "attn", "proj")) is None


def test_every_module_has_its_kernels(backbone):
    """All names that `target_modules` may join stand for kernels that the parameters have."""
    layers = range(TINY.depth)
    kernels = pytrees.select(backbone, TINY.kernel_paths(("qkv", "proj", "mlp"), layers))
    assert len(pytrees.flatten(kernels)) == 4 * TINY.depth
    assert TINY.kernel_paths(("qv",), layers) == TINY.kernel_paths(("qkv",), layers)
    fused = [path for path in pytrees.flatten(kernels) if TINY.fused(path) == 3]
    assert fused == sorted(TINY.kernel_paths(("qkv",), layers))


def test_preprocessing_takes_mean_and_deviation_off(rng):
    images = jnp.asarray(rng.random((2, 4, 4, 3)), jnp.float32)
    assert Preprocessing().normalize(images) is images  # every bit as it is
    mean, std = np.float32([0.5, 0.4, 0.3]), np.float32([0.2, 0.25, 0.5])
    ours = Preprocessing(tuple(mean.tolist()), tuple(std.tolist())).normalize(images)
    expected = np.stack([(images[..., c] - mean[c]) / std[c] for c in range(3)], axis=-1)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
