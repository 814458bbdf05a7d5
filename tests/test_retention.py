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

pytestmark = pytest.mark.usefixtures("fast_compile")

MASK = np.arange(6) < 2
POOL = hosts.L2P(size=4, length=2, top_k=2)


def trainable_of(method, backbone, seed=0):
    key = jax.random.key(seed)
    return {
        "adapter": method.init_adapter(key, backbone),
        "shared": method.init_shared(jax.random.fold_in(key, 1), backbone),
    }


def training_indices(images, labels):
    return {"images": images, "labels": labels, "class_mask": MASK}


def pictures(rng, count=12):
    return rng.random((count, 16, 16, 3), np.float32), rng.integers(0, 2, count).astype(np.int32)


@pytest.mark.parametrize("pooled", [False, True])
def test_projected_gradients_are_orthogonal_to_what_old_images_ask(backbone, rng, pooled):
    """Two tasks one after the other: U is a projection, holds the share of energy it must, and
    no projected key gradient meets it.
    """
    host = {"host": POOL, "reparametrization": None} if pooled else {}
    method = tiny_method(strategy=regularization.PGP(), **host)
    trainable = trainable_of(method, backbone)
    memory = method.strategy.init(method, trainable["shared"])
    held, before = 0, np.asarray(memory["projector"], float)
    for _ in range(2):
        images, labels = pictures(rng)
        memory = method.strategy.update(
            memory, method, trainable, backbone, training_indices(images, labels)
        )
        for layer, projector in enumerate(np.asarray(memory["projector"], float)):
            np.testing.assert_allclose(projector @ projector, projector, atol=1e-5)
            gram = np.asarray(
                regularization._grams(method, trainable, backbone, images)[layer], float
            )
            assert np.trace(projector @ gram) >= 0.499 * np.trace(gram)
            # As few directions as reach half of the energy, beside those that are held already: by
            # the singular values.
            rest = np.eye(24) - before[layer]
            energies = np.linalg.svd(rest @ gram @ rest, compute_uv=False)
            needed = 0.5 * np.trace(gram) - np.trace(before[layer] @ gram)
            added = round(np.trace(projector) - np.trace(before[layer]))
            assert (
                added == np.searchsorted(np.cumsum(energies), needed) + 1
                if needed > 0
                else added == 0
            )
        before = np.asarray(memory["projector"], float)
        rank = np.trace(np.asarray(memory["projector"]), axis1=1, axis2=2).sum()
        assert held <= rank + 1e-3
        held = rank
    assert 0 < held < 24 * len(memory["projector"])
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), trainable)
    projected = method.strategy.project(memory, method, grads)
    if pooled:
        assert np.abs(projected["shared"]["pool"]["prompt"] @ memory["projector"][0]).max() < 1e-4
        changed = {"shared/pool/prompt"}
    else:
        for part, first in (
            (projected["shared"]["g_prompt"], 0),
            (projected["adapter"]["prompt"], 1),
        ):
            keys = np.asarray(part[:, 0]).reshape(part.shape[0], part.shape[2], 24)
            for layer, rows in enumerate(keys):
                assert np.abs(rows @ memory["projector"][first + layer]).max() < 1e-4
        np.testing.assert_array_equal(
            projected["shared"]["g_prompt"][:, 1], grads["shared"]["g_prompt"][:, 1]
        )  # values are free
        changed = {"shared/g_prompt", "adapter/prompt"}
    before, after = pytrees.flatten(grads), pytrees.flatten(projected)
    assert {
        path for path in before if (np.asarray(before[path]) != np.asarray(after[path])).any()
    } == changed


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
    vit, params = ViT(TINY), {"params": backbone}
    tokens = np.asarray(vit.apply(params, images, method="embed"))
    pool = np.asarray(shared["pool"]["prompt"])
    tokens = np.stack(
        [
            np.concatenate([t[:1], pool[c].reshape(6, 24), t[1:]])
            for t, c in zip(tokens, chosen, strict=True)
        ]
    )
    whole = vit.apply(
        params, jnp.asarray(tokens), None, 0, 4, 22, method="run_blocks"
    )  # every token of the last layer
    features = np.stack(
        [vit.apply(params, whole[:, i : i + 1], method="pool") for i in range(1, 7)]
    ).mean(axis=0)
    np.testing.assert_allclose(
        logits, features @ shared["head"]["kernel"] + shared["head"]["bias"][None], atol=1e-4
    )
    selected = method.select(shared, method.query(backbone, images))
    own = method.trunk(backbone, shared, images)
    np.testing.assert_array_equal(own, method.trunk(backbone, shared, images, selected))


@pytest.fixture
def whole(backbone):
    """A method that trains the whole network, with its arrays."""

    def make(kind):
        method = tiny_method(
            strategy=kind, trains_backbone=True, reparametrization=None, host=hosts.PromptHost()
        )
        return method, trainable_of(method, backbone)

    return make


def test_ewc_is_the_quadratic_around_the_last_task(whole, backbone, rng):
    method, trainable = whole(regularization.EWC(strength=3.0))
    memory = method.strategy.init(method, trainable["shared"])
    recalled, start = method.before_task(memory, trainable["shared"])
    assert start is trainable["shared"]
    assert method.strategy.loss(recalled, method, trainable, backbone, None, None) == 0
    images, labels = pictures(rng, 5)
    memory = method.strategy.update(
        memory, method, trainable, backbone, training_indices(images, labels)
    )
    recalled, _ = method.before_task(memory, trainable["shared"])

    def log_p(kernel, image, label):
        shared = trainable["shared"] | {"head": trainable["shared"]["head"] | {"kernel": kernel}}
        logits = method.logits(backbone, {}, shared, method.trunk(backbone, shared, image[None]))[
            0, :2
        ]
        return jax.nn.log_softmax(logits)[label]

    kernel = trainable["shared"]["head"]["kernel"]
    squares = [
        jax.grad(log_p)(kernel, image, label) ** 2
        for image, label in zip(images, labels, strict=True)
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
    again = method.strategy.update(
        memory, method, trainable, backbone, training_indices(images, labels)
    )
    np.testing.assert_allclose(again["fisher"]["head"]["kernel"], 2 * fisher, rtol=1e-5)


def test_lwf_holds_the_old_answers(whole, backbone, rng):
    method, trainable = whole(regularization.LwF(strength=2.0))
    images, labels = pictures(rng, 4)
    batch = {"images": images, "weights": np.array([1, 1, 1, 0], np.float32)}

    def logits_of(shared):
        return method.logits(backbone, {}, shared, method.trunk(backbone, shared, images))

    def loss(memory, now):
        memory, _ = method.before_task(memory, trainable["shared"])
        return float(
            method.strategy.loss(memory, method, now, backbone, batch, logits_of(now["shared"]))
        )

    memory = method.strategy.init(method, trainable["shared"])
    moved = trainable | {"shared": jax.tree.map(lambda x: x * 2, trainable["shared"])}
    assert loss(memory, moved) == 0  # nothing is old
    memory = method.strategy.update(
        memory, method, trainable, backbone, training_indices(images, labels)
    )
    assert memory["seen"].tolist() == MASK.tolist()
    assert loss(memory, trainable) == pytest.approx(0, abs=1e-5)
    then, now = (np.asarray(logits_of(t["shared"]), float)[:3, :2] / 2 for t in (trainable, moved))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (then, now))
    assert loss(memory, moved) == pytest.approx(
        2.0 * 4 * (p * np.log(p / q)).sum(1).mean(), rel=1e-3
    )
    recalled, _ = method.before_task(memory, trainable["shared"])
    grads = jax.grad(
        lambda t: method.strategy.loss(recalled, method, t, backbone, batch, logits_of(t["shared"]))
    )(moved)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
