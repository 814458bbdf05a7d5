"""A method's arrays, and how they turn into a forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soft_jax import pytrees
from soft_jax.methods import hosts, masks, prompts
from soft_jax.models.vit import ViT
from tests.conftest import DUALPROMPT, TINY, soft_masks, tiny_method

pytestmark = pytest.mark.usefixtures("fast_compile")


def shapes(tree):
    return {path: leaf.shape for path, leaf in pytrees.flatten(tree).items()}


def test_literal_trees(backbone):
    method = tiny_method()
    assert shapes(method.init_adapter(jax.random.key(0), backbone)) == {
        "key": (24,),
        "mask/blocks_2/attn/proj/kernel": (24, 24),
        "mask/blocks_2/attn/qkv/kernel": (24, 72),
        "mask/blocks_3/attn/proj/kernel": (24, 24),
        "mask/blocks_3/attn/qkv/kernel": (24, 72),
        "prompt": (2, 2, 3, 3, 8),
    }
    assert shapes(method.init_shared(jax.random.key(0), backbone)) == {
        "g_prompt": (1, 2, 2, 3, 8),
        "head/bias": (6,),
        "head/kernel": (24, 6),
    }
    assert "mask" not in tiny_method(reparametrization=None).init_adapter(
        jax.random.key(0), backbone
    )


def test_initial_values(backbone):
    adapter = tiny_method().init_adapter(jax.random.key(0), backbone)
    drawn = np.concatenate([m.ravel() for m in jax.tree.leaves(adapter["mask"])])
    assert drawn.dtype == np.float32
    assert 0.99 <= drawn.min() < 0.9901
    assert 0.9999 < drawn.max() <= 1
    for drawn in (adapter["key"], adapter["prompt"]):
        assert -1 <= drawn.min() < 0 < drawn.max() < 1
    ones = tiny_method(reparametrization=soft_masks("ones")).init_adapter(
        jax.random.key(0), backbone
    )["mask"]
    assert all((m == 1).all() for m in jax.tree.leaves(ones))


def test_mask_of_ones_is_the_backbone_to_the_bit(backbone):
    method = tiny_method(reparametrization=soft_masks("ones"))
    adapter = method.init_adapter(jax.random.key(0), backbone)
    params, _ = method.realize(backbone, adapter, method.init_shared(jax.random.key(1), backbone))
    jax.tree.map(np.testing.assert_array_equal, params, backbone)


def test_mask_multiplies_kernels_and_nothing_else(backbone):
    method = tiny_method()
    adapter = method.init_adapter(jax.random.key(0), backbone)
    params, _ = method.realize(backbone, adapter, method.init_shared(jax.random.key(1), backbone))
    before, after, mask = map(pytrees.flatten, (backbone, params, adapter["mask"]))
    for path, leaf in after.items():
        expected = before[path] * mask[path] if path in mask else before[path]
        np.testing.assert_array_equal(leaf, expected)


def test_gradient_step_on_the_mask_preconditions_by_the_squared_weights(backbone, rng):
    """One SGD step on m moves θ ⊙ m by −lr · θ² ⊙ the gradient of the effective weight."""
    path = "blocks_2/attn/proj/kernel"
    theta = pytrees.flatten(backbone)[path]
    images = rng.random((2, 16, 16, 3), np.float32)

    def loss(effective):
        params = pytrees.merge(backbone, pytrees.unflatten({path: effective}))
        return jnp.sum(ViT(TINY).apply({"params": params}, images)[:, 0])

    mask = jnp.full(theta.shape, 0.995)
    by_effective = jax.jit(jax.grad(loss))(theta * mask)
    by_mask = jax.jit(
        jax.grad(
            lambda m: loss(
                pytrees.flatten(masks.masked(backbone, pytrees.unflatten({path: m})))[path]
            )
        )
    )(mask)
    moved = theta * (mask - 0.1 * by_mask) - theta * mask
    np.testing.assert_allclose(moved, -0.1 * theta**2 * by_effective, atol=1e-6)


def test_the_trunk_ends_where_the_task_begins():
    """At the first layer that a prompt or a mask of the task is in; without either, after all."""
    early = dataclasses.replace(DUALPROMPT, e_layers=(1, 3))
    assert tiny_method().first_task_layer == 2
    assert tiny_method(host=early).first_task_layer == 1
    assert tiny_method(host=early, reparametrization=None).first_task_layer == 1
    assert tiny_method(reparametrization=soft_masks(layers=(1, 2))).first_task_layer == 1
    assert tiny_method(host=hosts.L2P(), reparametrization=None).first_task_layer == 4


def test_trunk_and_rest_are_the_whole(backbone, rng):
    method = tiny_method()
    images = rng.random((2, 16, 16, 3), np.float32)
    shared = method.init_shared(jax.random.key(1), backbone)
    adapter = method.init_adapter(jax.random.key(2), backbone)
    logits = method.logits(backbone, adapter, shared, method.trunk(backbone, shared, images))
    params, prefix = method.realize(backbone, adapter, shared)
    features = ViT(TINY).apply({"params": params}, images, prefix)
    np.testing.assert_allclose(
        logits, features @ shared["head"]["kernel"] + shared["head"]["bias"][None], atol=1e-5
    )


@pytest.mark.parametrize("batch", [1, 2, 5, 6])
def test_interleaved_sources_are_a_reshape(batch):
    """The published look-up, spelt out: `[2, B]` reshaped to `[B, 2]`."""
    halves = np.repeat(np.arange(2)[:, None], batch, axis=1)
    sources = prompts.prefix_sources("interleaved", jnp.arange(batch + 2), jnp.asarray(batch))
    np.testing.assert_array_equal(sources[:batch], halves.reshape(batch, 2))


def test_what_is_kept_but_never_trained_is_counted(backbone):
    """SoftNet's small values; other kinds have none."""
    kernels = TINY.kernel_paths(("proj",), (3,))
    for kind, fixed in ((masks.SoftNet(kernels, (3,), 0.9, True), 24 * 24), (soft_masks(), 0)):
        method = tiny_method(reparametrization=kind)
        adapter = jax.eval_shape(method.init_adapter, jax.random.key(0), backbone)
        assert method.count_fixed(adapter) == fixed
    assert tiny_method(reparametrization=None).count_fixed({}) == 0


@pytest.mark.parametrize("host", [DUALPROMPT, hosts.L2P(), hosts.PromptHost()])
def test_rows_are_what_an_adapter_has_of_every_task(host, backbone):
    """A host whose tasks have no prompt has an empty row for it."""
    method = tiny_method(host=host)
    adapter = jax.eval_shape(method.init_adapter, jax.random.key(0), backbone)
    drawn = {name: adapter[name].shape for name in method.row_shapes if name in adapter}
    assert {"key": (24,)} | drawn == drawn
    assert ("prompt" in drawn) == host.per_task
    assert method.row_shapes == {"prompt": (0,)} | drawn
