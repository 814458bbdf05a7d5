import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soft_jax.inference import identity
from tests.conftest import DUALPROMPT, TINY, soft_masks, tiny_method

pytestmark = pytest.mark.usefixtures("fast_compile")

DATA = Path(__file__).parent / "data"


def test_vote_ties_go_where_pytorchs_do():
    """Tied batches, and what torch.unique and torch.topk (2.13, CPU) made of them: [pool, ids,
    voted].
    """
    for pool, ids, voted in json.loads((DATA / "votes.json").read_text()):
        assert identity.vote(np.array(ids), pool) == voted, (pool, ids)


def test_majority():
    ids, batches = np.array([2, 2, 1, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(identity.majority(ids, batches, 3), [2, 2, 2, 0, 0, 1, 1])


@pytest.mark.parametrize("top", [1, 3, 6])
def test_entropy_of_top(rng, top):
    logits = rng.normal(size=(4, 6)).astype(np.float32)
    best = np.sort(logits, axis=1)[:, ::-1][:, :top]
    p = np.exp(best) / np.exp(best).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        identity.entropy_of_top(logits, top), -(p * np.log(p)).sum(axis=1), atol=1e-6
    )
    assert np.isfinite(
        jax.grad(lambda x: identity.entropy_of_top(x, jnp.asarray(top)).sum())(logits)
    ).all()


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("layout", ["separate", "interleaved"])
def test_alpha_gradients_are_those_over_explicit_alpha(size, layout, monkeypatch):
    """In float64, for single images and for batches, the last one partial, against jax.grad
    through Σ α_t m_t.
    """
    monkeypatch.setattr(identity, "BLOCK_BYTES", 3 * 8 * 72 * 8)  # a few rows of a kernel at a time
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
    ):  # flax's LayerNorm promotes float64 with float32
        rng = np.random.default_rng(0)
        vit = dataclasses.replace(TINY, depth=3, dtype="float64")
        method = tiny_method(
            architecture=vit,
            reparametrization=soft_masks(modules=("qkv", "proj", "mlp"), layers=(1, 2)),
            host=dataclasses.replace(DUALPROMPT, e_layers=(1, 2), prefix_layout=layout),
        )
        key, images = jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32)

        def drawn(function, *arguments, deviation=0.3):
            like = jax.eval_shape(function, key, *arguments)
            return jax.tree.map(lambda x: rng.normal(0, deviation, x.shape), like)

        backbone = drawn(vit.module().init, images)["params"]
        adapters = [drawn(method.init_adapter, backbone) for _ in range(3)]
        adapters = [a | {"mask": jax.tree.map(lambda m: 1 + m, a["mask"])} for a in adapters]
        shared = drawn(method.init_shared, backbone, deviation=1)
        sizes = (size, size, (size + 1) // 2)
        tokens = jax.jit(method.trunk)(backbone, shared, rng.random((sum(sizes), 16, 16, 3)))
        starts = np.cumsum(sizes)[:-1]

        def entropy(alpha, masks, prompt, kept, backbone, shared):
            mask = jax.tree.map(
                lambda *m: sum(a * x for a, x in zip(alpha, m, strict=True)), *masks
            )
            sources = method.host.sources(jnp.arange(len(kept)), jnp.asarray(len(kept)))
            adapter = {"mask": mask, "prompt": prompt}
            logits = method.logits(backbone, adapter, shared, kept, sources)
            return identity.entropy_of_top(logits, 2).mean()

        over_alpha, uniform = jax.jit(jax.grad(entropy)), jnp.full(3, 1 / 3)
        masks = [a["mask"] for a in adapters]
        expected = np.stack(
            [
                over_alpha(uniform, masks, a["prompt"], images, backbone, shared)
                for a, images in zip(adapters, np.split(tokens, starts), strict=True)
            ]
        )
        effective = [method.weights(backbone, adapter) for adapter in adapters]
        mean = identity.mean_weights(iter(effective), 3)
        prompt = np.stack([a["prompt"] for a in adapters])
        pairs = np.array([(g, 0, i, n) for g, n in enumerate(sizes) for i in range(n)])
        gradient, _ = identity.entropy_gradients(
            method, backbone, mean, prompt, shared, tokens, pairs, 3
        )
        of_images = identity.alpha_gradients(gradient, tuple(effective))
        ours = np.stack([part.mean(axis=0) for part in np.split(of_images, starts)])
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, expected, atol=1e-12 * np.abs(expected).max())
    assert np.ptp(expected, axis=1).min() > 1e-3  # tasks differ, so the comparison says something


def test_alpha_gradients_multiply_out_one_kernel_at_a_time():
    """Also where a whole kernel fits in a block: 64 images' gradients of one take 16 MiB."""
    images, width, kernels = 64, 256, 8
    like = jax.ShapeDtypeStruct
    half = like((images, 5, width), np.float32)
    gradient = {f"{k}/kernel": identity.Factors(half, half) for k in range(kernels)}
    weights = {str(k): {"kernel": like((width, width), np.float32)} for k in range(kernels)}
    compiled = identity.alpha_gradients.lower(gradient, (weights,) * 2).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * images * width**2 * 4


def test_bfloat16_factors_lose_nothing_on_the_way(rng):
    """Their products are added up in float32, with weights in float32."""

    def draw(*shape):
        return jax.numpy.asarray(rng.normal(size=shape), jax.numpy.bfloat16)

    factors = identity.Factors(draw(4, 5, 8), draw(4, 5, 6))
    weights = tuple({"kernel": rng.normal(size=(8, 6)).astype(np.float32)} for _ in range(3))
    found = identity.alpha_gradients({"kernel": factors}, weights)
    assert found.dtype == np.float32
    inputs, gradients = (np.asarray(part, np.float64) for part in factors)
    stacked = np.stack([tree["kernel"] for tree in weights]).astype(np.float64)
    expected = np.einsum("gni,gno,kio->gk", inputs, gradients, stacked)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
