"""Why an image got its answer: the attention is the model's own, a layer put back is one whose mask
is 1, and the scores are those that rules decide by.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from soft_jax import distributed, pytrees
from soft_jax.evaluation import explained
from soft_jax.inference import engine, explain, rules
from soft_jax.inference.predictor import Predictor
from soft_jax.methods import changes
from tests.conftest import TINY, hardly_optimized, tiny_method
from tests.replay import model_of
from tests.small_clip import SMALL, small_method, small_params

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def predictor(backbone):
    """Two tasks of three classes, with prompts, and masks in the layers 2 and 3."""
    method = tiny_method()
    rng = np.random.default_rng(0)

    def drawn(shapes):  # by NumPy, which compiles nothing
        return jax.tree.map(
            lambda like: jnp.asarray(rng.normal(1, 0.5, like.shape), like.dtype), shapes
        )

    key = jax.random.key(0)
    adapters = [drawn(jax.eval_shape(method.init_adapter, key, backbone)) for _ in range(2)]
    shared = drawn(jax.eval_shape(method.init_shared, key, backbone))
    solved = {"k_means": rng.normal(size=(2, 5, 24)).astype(np.float32)}
    of_class = np.arange(6) // 3
    model = model_of(method, backbone, shared, adapters, (0, 1), of_class, solved=solved)
    batching = engine.Batching(distributed.data_mesh(jax.devices()[:1]), 4)
    return Predictor(model, rules.PromptId(), tuple("abcdef"), batching, task_names=("x", "y"))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(5).integers(0, 256, (16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def found(predictor, image):
    with jax.numpy_dtype_promotion("standard"), hardly_optimized():
        yield explain.explain(predictor, (rules.PromptId(), rules.KMeans(24)), image)


def last_products(architecture):
    """Watch what enters proj and what leaves qkv of the last layer; yields where they go."""
    seen = {}

    def watch(call, args, kwargs, context):
        out = call(*args, **kwargs)
        path = context.module.path
        if context.method_name == "__call__" and path[-2:] == ("attn", "proj"):
            seen["proj"] = args[0]  # the last layer's comes last
        if context.method_name == "__call__" and architecture.query_layer(path) is not None:
            seen["qkv"] = out
        return out

    return seen, watch


def test_the_attention_is_that_which_the_model_computed_with(predictor, image):
    """Weighted values are what enters the last projection, to 1e-6: with a prefix and without."""
    model, method = predictor.model, predictor.model.method
    images = jnp.asarray(image[None] / np.float32(255))
    prefix = method.host.row_prefix(model.rows["prompt"][:1], None)
    weights = pytrees.merge(model.backbone, model.weights[0])
    for own in ({}, prefix):
        seen, watch = last_products(TINY)
        with nn.intercept_methods(watch):
            TINY.run_blocks(weights, TINY.embed(weights, images), own)
        attention = explain.attention_weights(method, seen["qkv"], own)
        values = jnp.split(seen["qkv"], 3, axis=-1)[2].reshape(1, -1, 3, 8)
        if own:
            values = jnp.concatenate([own[3][:, 1], values], axis=1)
        out = np.einsum("nhqk,nkhd->nqhd", attention, values).reshape(1, -1, 24)
        # The last layer goes on with the [class] token alone.
        np.testing.assert_allclose(out[:, : seen["proj"].shape[1]], seen["proj"], atol=1e-6)


def test_the_attention_of_clip_and_its_prompts():
    method, params = small_method("clipprompt", names=("a", "b")), small_params()
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(1, 8, 8, 3)), jnp.float32)
    prompt = jnp.asarray(rng.normal(size=(1, *method.row_shapes["prompt"])), jnp.float32)
    shared = method.init_shared(jax.random.key(0), params)
    _, (patches, itself, prompts) = explain.network_and_attention(
        method, params, {}, prompt, shared, images
    )
    assert patches.shape == (1, SMALL.grid, SMALL.grid)
    assert prompts[0] > 0.01
    np.testing.assert_allclose(patches.sum() + itself[0] + prompts[0], 1, atol=1e-5)
    patches, itself, prompts = explain.frozen_attention(method, params, images)
    np.testing.assert_allclose(patches.sum() + itself[0], 1, atol=1e-5)
    np.testing.assert_allclose(prompts, 0, atol=1e-5)


def test_an_answer_is_that_of_the_engine(predictor, image, found):
    answer = predictor.predict(image[None])
    own = found.answers[found.own]
    assert found.class_ == answer.classes[0] == own.classes[0]
    assert found.network == answer.networks[0]
    np.testing.assert_allclose(own.probabilities[0], answer.probabilities.max(), atol=1e-5)
    model, batching = predictor.model, predictor.batching
    tokens, _ = engine.encode(model, image[None], batching, queried=False, prepared=True)
    logits = engine.logits(model, tokens, engine.alone(np.array([found.network])), batching)[0]
    margin = logits[found.class_] - np.delete(logits, found.class_).max()
    np.testing.assert_allclose(found.margin, margin, atol=1e-4)
    np.testing.assert_allclose(
        found.probability, scipy.special.softmax(logits)[found.class_], atol=1e-5
    )


def test_a_layer_put_back_is_one_whose_mask_is_one(predictor, image, backbone, found):
    """Against a model of its own, whose masks of that layer are 1."""
    method = predictor.model.method
    assert [effect.layer for effect in found.layers] == [2, 3, explain.ALL]
    assert len({effect.margin for effect in found.layers}) == 3
    tokens = method.trunk(backbone, predictor.model.shared, jnp.asarray(image[None]) / 255)
    for effect in found.layers:
        theta = pytrees.flatten(backbone)
        own = {
            path: theta[path]
            if effect.layer in (TINY.layer_of(path), explain.ALL)
            else predictor_weights
            for path, predictor_weights in pytrees.flatten(
                predictor.model.weights[found.network]
            ).items()
        }
        host, prompt = method.host, predictor.model.rows["prompt"][found.network]
        prefix = host.shared_prefix(predictor.model.shared)
        prefix = {**prefix, **host.task_prefix({"prompt": prompt}, None)}
        params = pytrees.merge(backbone, pytrees.unflatten(own))
        logits = np.asarray(method.classify(params, prefix, predictor.model.shared, tokens))[0]
        margin = logits[found.class_] - np.delete(logits, found.class_).max()
        np.testing.assert_allclose(effect.margin, margin, atol=1e-4)


def test_what_stands_beside_the_backbone_is_put_to_nothing(backbone):
    weights = {"blocks_2": {"mlp": {"adapter1": {"up": jnp.ones((2, 48))}}}}
    back = explain.put_back(tiny_method(), backbone, weights, 2)
    assert not pytrees.flatten(back)["blocks_2/mlp/adapter1/up"].any()
    same = explain.put_back(tiny_method(), backbone, weights, 3)
    assert pytrees.flatten(same)["blocks_2/mlp/adapter1/up"].all()


def test_the_scores_are_what_rules_decide_by(found):
    assert [answer.rule.lowest_wins for answer in found.answers] == [False, True]
    for answer in found.answers:
        best = answer.scores.argmin() if answer.rule.lowest_wins else answer.scores.argmax()
        assert best == answer.task


def test_lines_say_it_in_short(found):
    text = "\n".join(explained.lines(found, "photo.jpg"))
    letter = "abcdef"[found.class_]
    assert text.startswith(f"photo.jpg: {letter}, of task {'xy'[found.class_ // 3]}, by Prompt ID")
    assert "layer 3 " in text and "all layers" in text and "nearest centre" in text
    assert max(map(len, text.splitlines()[1:])) <= 100
    many = explained.shown_tasks(found, 1)
    assert len(many) == 1


# How far weights are from the frozen ones.


def test_changes_by_layer_and_head_are_the_formula(backbone):
    """One head of k is halved, and proj scaled by 1.1: all else is 0."""
    theta = pytrees.flatten(backbone)
    qkv, proj = "blocks_2/attn/qkv/kernel", "blocks_2/attn/proj/kernel"
    changed = np.array(theta[qkv])
    changed[:, 24 + 8 : 24 + 16] *= 0.5  # the second head of k
    weights = pytrees.unflatten({qkv: changed, proj: 1.1 * np.asarray(theta[proj])})
    found = changes.measure(TINY, backbone, weights)
    k = np.asarray(theta[qkv])[:, 24:48]
    share = 0.5 * np.linalg.norm(k[:, 8:16]) / np.linalg.norm(k)
    expected = {"q": 0, "k": share, "v": 0, "proj": 0.1}
    assert {place.part: value for place, value in found.by_place.items()} == pytest.approx(
        expected, abs=1e-6
    )
    assert {(place.tower, place.layer) for place in found.by_place} == {("vision", 2)}
    heads = {place.part: row for place, row in found.by_head.items()}
    np.testing.assert_allclose(heads["k"], [0, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(heads["proj"], [0.1] * 3, atol=1e-6)
    both = np.linalg.norm([share * np.linalg.norm(k), 0.1 * np.linalg.norm(theta[proj])])
    whole = np.linalg.norm([np.linalg.norm(theta[qkv]), np.linalg.norm(theta[proj])])
    assert found.overall == pytest.approx(both / whole, abs=1e-6)
    assert changes.measure(TINY, backbone, {}) is None


def test_distances_of_changes(backbone, monkeypatch):
    theta = pytrees.select(backbone, TINY.kernel_paths(("qkv",), (1,)))
    up, down = (jax.tree.map(lambda w, s=s: s * w, theta) for s in (1.2, 0.9))

    def distances():
        rows = [changes.vector(backbone, own, 3) for own in (up, down, theta)]
        return changes.cosine_distances(rows), len(rows[0])

    expected = [[0, 2, 1], [2, 0, 1], [1, 1, 0]]
    exact, length = distances()
    np.testing.assert_allclose(exact, expected, atol=1e-5)
    assert length == 24 * 72
    monkeypatch.setattr(changes, "_EXACT", 1)
    monkeypatch.setattr(changes, "SKETCH", 200)
    sketched, length = distances()
    assert length == 200
    np.testing.assert_allclose(sketched, expected, atol=0.15)
