"""PGP, EWC and LwF against their definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soft_jax import pytrees
from soft_jax.methods import hosts, regularization
from soft_jax.models.vit import ViT
from tests.conftest import DUALPROMPT, TINY, tiny_method
from tests.small import SMALL, first_two_layers

pytestmark = pytest.mark.usefixtures("fast_compile")

MASK = np.arange(6) < 2
POOL = hosts.L2P(size=4, length=2, top_k=2)


def trainable_of(method, backbone, seed=0):
    key = jax.random.key(seed)
    return {
        "adapter": method.init_adapter(key, backbone),
        "shared": method.init_shared(jax.random.fold_in(key, 1), backbone),
    }


def batch_of(images, labels):
    return {"images": images, "labels": labels, "class_mask": MASK}


def pictures(rng, count=12):
    return rng.random((count, 16, 16, 3), np.float32), rng.integers(0, 2, count).astype(np.int32)


@pytest.fixture(params=["prefixes", "pool"])
def pgp(request, backbone):
    """PGP with each of the prompt hosts, and its arrays."""
    host = {"host": POOL, "reparametrization": None} if request.param == "pool" else {}
    # At the published 0.5 a single direction is enough here.
    method = tiny_method(strategy=regularization.PGP(threshold=0.9), **host)
    return method, trainable_of(method, backbone)


def test_a_basis_holds_its_share_of_energy_in_the_fewest_directions(pgp, backbone, rng):
    """Two tasks one after the other: U Uᵀ is a projection that grows no more than it must."""
    assert regularization.PGP().threshold == 0.5
    method, trainable = pgp
    memory = method.strategy.init(method, trainable["shared"])
    before = np.asarray(memory["projector"], float)
    for _ in range(2):
        images, labels = pictures(rng)
        batch = batch_of(images, labels)
        memory = method.strategy.update(memory, method, trainable, backbone, batch)
        now = np.asarray(memory["projector"], float)
        grams = np.asarray(regularization._grams(method, trainable, backbone, images), float)
        for old, new, gram in zip(before, now, grams, strict=True):
            np.testing.assert_allclose(new @ new, new, atol=1e-5)
            assert np.trace(new @ gram) >= 0.899 * np.trace(gram)
            # As few directions as reach that share, beside those that are held already: by the
            # singular values.
            rest = np.eye(24) - old
            energies = np.linalg.svd(rest @ gram @ rest, compute_uv=False)
            needed = 0.9 * np.trace(gram) - np.trace(old @ gram)
            fewest = np.searchsorted(np.cumsum(energies), needed) + 1 if needed > 0 else 0
            assert round(np.trace(new) - np.trace(old)) == fewest
        assert np.trace(now, axis1=1, axis2=2).sum() >= np.trace(before, axis1=1, axis2=2).sum()
        before = now
    assert 0 < np.trace(before, axis1=1, axis2=2).sum() < 24 * len(before)


def test_projected_gradients_are_at_right_angles_to_the_basis(pgp, rng):
    """Those of key prefixes, or of the pool's prompts; all others are left alone, to the bit."""
    method, trainable = pgp
    bases = np.linalg.qr(rng.normal(size=(method.host.count_projectors(), 24, 24)))[0][:, :, :5]
    projector = jnp.asarray(bases @ bases.transpose(0, 2, 1), jnp.float32)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), trainable)
    projected = method.strategy.project({"projector": projector}, method, grads)
    adapter, shared = projected["adapter"], projected["shared"]
    if method.host.pools:
        assert np.abs(shared["pool"]["prompt"] @ projector[0]).max() < 1e-4
        changed = {"shared/pool/prompt"}
    else:
        parts = (shared["g_prompt"], projector[:1]), (adapter["prompt"], projector[1:])
        for prompt, its in parts:
            keys = np.asarray(prompt[:, 0]).reshape(len(prompt), prompt.shape[2], 24)
            assert np.abs(keys @ its).max() < 1e-4
        for part, name in (("shared", "g_prompt"), ("adapter", "prompt")):
            values = projected[part][name][:, 1]
            np.testing.assert_array_equal(values, grads[part][name][:, 1])  # values are free
        changed = {"shared/g_prompt", "adapter/prompt"}
    before, after = map(pytrees.flatten, (grads, projected))
    assert {path for path in before if (before[path] != after[path]).any()} == changed


def test_prompt_layers_are_asked_by_their_own_queries(backbone, rng):
    """The features that PGP takes are x Wq of each prompted layer; without prompts in the way,
    those of the plain network.
    """
    method = tiny_method(
        strategy=regularization.PGP(),
        reparametrization=None,
        host=dataclasses.replace(DUALPROMPT, e_layers=(2,), g_layers=()),
    )
    images, _ = pictures(rng, 3)
    gram = regularization._grams(method, trainable_of(method, backbone), backbone, images)[0]
    vit = ViT(TINY)
    tokens = vit.apply(
        {"params": backbone},
        vit.apply({"params": backbone}, images, method="embed"),
        None,
        0,
        2,
        method="run_blocks",
    )
    block = backbone["blocks_2"]
    normed = (tokens - tokens.mean(-1, keepdims=True)) / jnp.sqrt(
        tokens.var(-1, keepdims=True) + 1e-6
    )
    normed = normed * block["norm1"]["scale"][None, None] + block["norm1"]["bias"][None, None]
    q = (
        normed @ block["attn"]["qkv"]["kernel"][:, :24]
        + block["attn"]["qkv"]["bias"][None, None, :24]
    )
    np.testing.assert_allclose(gram, jnp.einsum("bnd,bne->de", q, q), rtol=1e-3, atol=1e-2)


def test_l2p_selects_as_a_loop_would(backbone, rng):
    host = hosts.L2P(size=7, length=2, top_k=3)
    method = tiny_method(host=host, reparametrization=None)
    shared = trainable_of(method, backbone)["shared"]
    query = rng.normal(size=(9, 24)).astype(np.float32)
    selected = np.asarray(method.select(shared, query))
    for row, q in zip(selected, query, strict=True):
        cosines = [
            float(q @ k / np.linalg.norm(q) / np.linalg.norm(k))
            for k in np.asarray(shared["pool"]["key"])
        ]
        assert row.tolist() == sorted(range(7), key=lambda i: -cosines[i])[:3]
    weights = np.array([1, 1, 1, 1, 1, 1, 0, 0, 0], np.float32)  # padding has no vote
    votes = [sum(i in row for row in selected[:6].tolist()) for i in range(7)]
    batch = np.asarray(host.select_together(jnp.asarray(selected), jnp.asarray(weights)))
    assert batch.tolist() == [sorted(range(7), key=lambda i: (-votes[i], i))[:3]] * 9


def test_l2p_puts_its_prompts_behind_the_class_token(backbone, rng):
    """Features are the mean of the prompts' outputs; the selection may be given."""
    host = hosts.L2P(size=4, length=3, top_k=2)
    method = tiny_method(host=host, reparametrization=None)
    shared = trainable_of(method, backbone)["shared"]
    images, _ = pictures(rng, 2)
    chosen = np.array([[1, 3], [0, 2]])
    trunk = jax.jit(method.trunk)
    tokens = trunk(backbone, shared, images, chosen)
    logits = jax.jit(method.logits)(backbone, {}, shared, tokens)
    tokens = np.asarray(TINY.embed(backbone, images))
    pool = np.asarray(shared["pool"]["prompt"])
    tokens = np.stack(
        [
            np.concatenate([t[:1], pool[c].reshape(6, 24), t[1:]])
            for t, c in zip(tokens, chosen, strict=True)
        ]
    )
    every = 22  # tokens of the last layer, which gives only those of prompts otherwise
    whole = jax.jit(lambda x: TINY.run_blocks(backbone, x, prompts=every))(tokens)
    pooled = [TINY.pool(backbone, whole[:, i : i + 1]) for i in range(1, 7)]
    features = np.mean(pooled, axis=0)
    np.testing.assert_allclose(
        logits, features @ shared["head"]["kernel"] + shared["head"]["bias"][None], atol=1e-4
    )
    selected = method.select(shared, jax.jit(method.query)(backbone, images))
    assert selected.tolist() != chosen.tolist()
    own = trunk(backbone, shared, images)
    np.testing.assert_allclose(own, trunk(backbone, shared, images, selected), atol=1e-5)


def whole(strategy, backbone):
    """A method that trains a whole network of two layers, its backbone and its arrays."""
    backbone = first_two_layers(backbone)
    method = tiny_method(
        architecture=SMALL,
        strategy=strategy,
        trains_backbone=True,
        reparametrization=None,
        host=hosts.PromptHost(),
    )
    return method, backbone, trainable_of(method, backbone)


def test_ewc_is_the_quadratic_around_the_last_task(backbone, rng):
    method, backbone, trainable = whole(regularization.EWC(strength=3.0), backbone)
    memory = method.strategy.init(method, trainable["shared"])
    recalled, start = method.before_task(memory, trainable["shared"])
    assert start is trainable["shared"]
    assert method.strategy.loss(recalled, method, trainable, backbone, None, None) == 0
    images, labels = pictures(rng, 5)
    memory = method.strategy.update(memory, method, trainable, backbone, batch_of(images, labels))
    recalled, _ = method.before_task(memory, trainable["shared"])

    def log_p(kernel, image, label):
        shared = trainable["shared"] | {"head": trainable["shared"]["head"] | {"kernel": kernel}}
        logits = method.logits(backbone, {}, shared, method.trunk(backbone, shared, image[None]))[
            0, :2
        ]
        return jax.nn.log_softmax(logits)[label]

    kernel = trainable["shared"]["head"]["kernel"]
    gradient = jax.jit(jax.grad(log_p))
    squares = [
        gradient(kernel, image, label) ** 2 for image, label in zip(images, labels, strict=True)
    ]
    fisher = memory["fisher"]["head"]["kernel"]
    np.testing.assert_allclose(fisher, sum(squares) / 5, rtol=1e-3, atol=1e-5)
    assert any(np.asarray(f).any() for f in jax.tree.leaves(memory["fisher"]["weights"]))
    moved = trainable | {
        "shared": trainable["shared"]
        | {"head": trainable["shared"]["head"] | {"kernel": kernel + 0.1}}
    }
    loss = method.strategy.loss(recalled, method, moved, backbone, None, None)
    assert loss == pytest.approx(3.0 / 2 * 0.01 * float(fisher.sum()), rel=1e-3)
    again = method.strategy.update(memory, method, trainable, backbone, batch_of(images, labels))
    np.testing.assert_allclose(again["fisher"]["head"]["kernel"], 2 * fisher, rtol=1e-5)


def test_lwf_holds_the_old_answers(backbone, rng):
    method, backbone, trainable = whole(regularization.LwF(strength=2.0), backbone)
    images, labels = pictures(rng, 4)
    batch = {"images": images, "weights": np.array([1, 1, 1, 0], np.float32)}

    @jax.jit
    def logits_of(shared):
        return method.logits(backbone, {}, shared, method.trunk(backbone, shared, images))

    @jax.jit
    def term(recalled, now):
        logits = logits_of(now["shared"])
        return method.strategy.loss(recalled, method, now, backbone, batch, logits)

    def loss(memory, now):
        return float(term(method.before_task(memory, trainable["shared"])[0], now))

    memory = method.strategy.init(method, trainable["shared"])
    moved = trainable | {"shared": jax.tree.map(lambda x: x * 2, trainable["shared"])}
    assert loss(memory, moved) == 0  # nothing is old
    memory = method.strategy.update(memory, method, trainable, backbone, batch_of(images, labels))
    assert memory["seen"].tolist() == MASK.tolist()
    assert loss(memory, trainable) == pytest.approx(0, abs=1e-5)
    then, now = (np.asarray(logits_of(t["shared"]), float)[:3, :2] / 2 for t in (trainable, moved))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (then, now))
    assert loss(memory, moved) == pytest.approx(
        2.0 * 4 * (p * np.log(p / q)).sum(1).mean(), rel=1e-3
    )
    recalled, _ = method.before_task(memory, trainable["shared"])
    grads = jax.jit(jax.grad(term, argnums=1))(recalled, moved)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
