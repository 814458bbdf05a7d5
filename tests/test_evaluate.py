import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from hypothesis.strategies import DataObject

from soft_jax import evaluate, prompts, task_id, train
from soft_jax.vit import ViT
from tests.conftest import tiny_method

TASK_OF_CLASS = np.arange(6) // 2
COUNT = 37


def make_model(backbone, method, seen=3):
    adapters = [method.init_adapter(jax.random.key(t), backbone) for t in range(3)]
    if method.mask_paths:  # spread, so that tasks disagree
        adapters = [a | {"mask": jax.tree.map(lambda m, t=t: m * (1 + t), a["mask"])} for t, a in enumerate(adapters)]
    shared = method.init_shared(jax.random.key(9))
    shared = shared | {"head": jax.tree.map(lambda x: 20 * x, shared["head"])}
    return evaluate.Model(method, backbone, shared, adapters, seen, TASK_OF_CLASS)


def run_settings(batch_size=8, eval_batch_size=16, shots=5, devices=4):
    return evaluate.Settings(train.data_mesh(jax.devices()[:devices]), batch_size, shots, eval_batch_size)


def keys_that_split(query):
    """Three keys, each towards one image from the mean of all, such that every task is some images' nearest."""
    towards = query - query.mean(axis=0)
    for chosen in itertools.combinations(range(COUNT), 3):
        nearest = np.asarray(prompts.similarity(query, towards[list(chosen)])).argmax(axis=1)
        if np.bincount(nearest, minlength=3).min() >= 5:
            return [jax.numpy.asarray(towards[i]) for i in chosen]
    raise AssertionError("no such keys")


@pytest.fixture(scope="module")
def world(backbone):
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (COUNT, 16, 16, 3)).astype(np.uint8)
    model = make_model(backbone, tiny_method())
    query = evaluate.queries(model.method, backbone, images, run_settings())
    adapters = [a | {"key": key} for a, key in zip(model.adapters, keys_that_split(query), strict=True)]
    return dataclasses.replace(model, adapters=adapters), images, query


def by_hand(model, image, query, task, sources=None):
    """One image through one task, the plain way."""
    batch = image[None].astype(np.float32) / 255
    tokens = model.method.trunk(model.backbone, model.shared, batch)
    return np.asarray(model.method.logits(model.backbone, model.adapters[task], model.shared, tokens, sources))[0]


def test_every_protocol_against_a_plain_loop(world):
    model, images, query = world
    answers = evaluate.answer(model, images, query, 1, run_settings())
    keys = np.stack([a["key"] for a in model.adapters])
    nearest = np.asarray(prompts.similarity(query, keys)).argmax(axis=1)
    assert len(set(nearest.tolist())) == 3
    np.testing.assert_array_equal(answers.task_ids[evaluate.PER_SAMPLE], nearest)
    np.testing.assert_array_equal(answers.task_ids[evaluate.ORACLE], np.ones(COUNT))
    assert answers.alpha_gradients.shape == (5, 3)
    voted = answers.alpha_gradients.argmin(axis=1)
    np.testing.assert_array_equal(answers.task_ids[evaluate.VOTE_GRADIENT], voted[np.arange(COUNT) // 8])
    for protocol, logits in answers.logits.items():
        assert logits.shape == (COUNT, 6)
        for i in (0, 7, 8, 36):
            expected = by_hand(model, images[i], query[i], answers.task_ids[protocol][i])
            np.testing.assert_allclose(logits[i], expected, atol=2e-4, err_msg=protocol)


def test_images_are_counted_exactly(world):
    """37 images in batches of 8: the last one holds 5; under oracle only the task's classes can win."""
    model, images, query = world
    labels = np.full(COUNT, 2)
    rows = evaluate.evaluate_task(model, images, labels, query, 1, run_settings())
    answers = evaluate.answer(model, images, query, 1, run_settings())
    assert set(rows) == set(evaluate.protocols(model.method))
    assert all(row.total == COUNT for row in rows.values())
    logits = answers.logits[evaluate.ORACLE]
    assert rows[evaluate.ORACLE].correct == (logits[:, 2] > logits[:, 3]).sum()
    assert rows[evaluate.ORACLE].task_correct == COUNT
    assert rows[evaluate.PER_SAMPLE].correct == (answers.logits[evaluate.PER_SAMPLE].argmax(axis=1) == 2).sum()


def test_unseen_tasks_and_classes_only_under_batch_vote(world):
    model, images, query = world
    early = dataclasses.replace(model, seen=1)
    answers = evaluate.answer(early, images, query, 0, run_settings())
    assert (answers.task_ids[evaluate.PER_SAMPLE] == 0).all()
    assert answers.task_ids[evaluate.VOTE_PROMPT].max() > 0
    logits = answers.logits[evaluate.PER_SAMPLE]
    rows = evaluate.evaluate_task(early, images, np.zeros(COUNT, int), query, 0, run_settings())
    assert rows[evaluate.PER_SAMPLE].correct == (logits[:, 0] > logits[:, 1]).sum()


@given(data=strategies.data())
@settings(max_examples=15, deadline=None)
def test_per_sample_does_not_depend_on_the_batch(world, data: DataObject):
    """Any choice of the images, in any order, under any batch size: the same task and class for each."""
    model, images, query = world
    whole = evaluate.answer(model, images, query, 0, run_settings())
    chosen = np.array(data.draw(strategies.lists(strategies.integers(0, COUNT - 1), min_size=1, max_size=COUNT)))
    batching = run_settings(
        batch_size=data.draw(strategies.sampled_from([3, 8])), eval_batch_size=data.draw(strategies.sampled_from([16, 64]))
    )
    alone = evaluate.queries(model.method, model.backbone, images[chosen], batching)
    part = evaluate.answer(model, images[chosen], alone, data.draw(strategies.integers(0, 2)), batching)
    np.testing.assert_array_equal(part.task_ids[evaluate.PER_SAMPLE], whole.task_ids[evaluate.PER_SAMPLE][chosen])
    np.testing.assert_array_equal(part.logits[evaluate.PER_SAMPLE].argmax(axis=1), whole.logits[evaluate.PER_SAMPLE][chosen].argmax(axis=1))


def test_one_and_four_devices_agree(world):
    model, images, query = world
    one, four = (evaluate.answer(model, images, query, 2, run_settings(devices=n)) for n in (1, 4))
    for protocol in one.logits:
        np.testing.assert_array_equal(one.task_ids[protocol], four.task_ids[protocol])
        np.testing.assert_allclose(one.logits[protocol], four.logits[protocol], atol=1e-4)


def test_interleaved_prefixes_follow_the_published_batches(world):
    """An image's prefix depends on its place in its batch, but under per_sample it is alone."""
    model, images, query = world
    model = dataclasses.replace(model, method=dataclasses.replace(model.method, prefix_layout="interleaved"))
    answers = evaluate.answer(model, images, query, 0, run_settings())
    separate = np.array([[0, 1]])
    # The last batch holds images 32 to 36: 34 stands in its middle.
    for i, sources in ((0, [[0, 0]]), (3, [[0, 0]]), (4, [[1, 1]]), (32, [[0, 0]]), (34, [[0, 1]]), (36, [[1, 1]])):
        expected = by_hand(model, images[i], query[i], 0, np.array(sources))
        np.testing.assert_allclose(answers.logits[evaluate.ORACLE][i], expected, atol=2e-4)
        expected = by_hand(model, images[i], query[i], answers.task_ids[evaluate.PER_SAMPLE][i], separate)
        np.testing.assert_allclose(answers.logits[evaluate.PER_SAMPLE][i], expected, atol=2e-4)


def test_chunks_are_joined(world):
    """More images than are held at once give what one chunk gives."""
    model, images, query = world
    many = run_settings(eval_batch_size=4)
    assert many.chunk == 16
    pieces, whole = evaluate.answer(model, images, query, 0, many), evaluate.answer(model, images, query, 0, run_settings())
    np.testing.assert_allclose(pieces.alpha_gradients, whole.alpha_gradients, atol=1e-4)
    for protocol in whole.logits:
        np.testing.assert_array_equal(pieces.task_ids[protocol], whole.task_ids[protocol])


def test_dualprompt_has_no_gradient_id(backbone, rng):
    method = tiny_method(mask_paths=())
    assert evaluate.VOTE_GRADIENT not in evaluate.protocols(method)
    images = rng.integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    query = evaluate.queries(method, backbone, images, run_settings())
    assert evaluate.answer(make_model(backbone, method), images, query, 0, run_settings()).alpha_gradients is None


def test_bfloat16_names_the_same_tasks(world):
    """q(x) comes in bfloat16 then, but is compared with the keys in float32: near 1 bfloat16 would tie."""
    model, images, query = world
    low = dataclasses.replace(model, method=dataclasses.replace(model.method, vit=dataclasses.replace(model.method.vit, dtype="bfloat16")))
    with jax.numpy_dtype_promotion("standard"):
        rounded = evaluate.queries(low.method, low.backbone, images, run_settings())
        answers = evaluate.answer(low, images, query.astype(rounded.dtype), 1, run_settings())
    assert rounded.dtype == jax.numpy.bfloat16
    expected = evaluate.answer(model, images, query, 1, run_settings()).task_ids[evaluate.PER_SAMPLE]
    assert (answers.task_ids[evaluate.PER_SAMPLE] == expected).mean() > 0.9
    similarity = task_id.key_similarity(query.astype(rounded.dtype), model.keys)
    assert similarity.dtype == np.float32
    assert answers.logits[evaluate.ORACLE].dtype == np.float32


def test_queries_are_those_of_the_plain_backbone(world):
    model, images, query = world
    expected = ViT(model.method.vit).apply({"params": model.backbone}, images.astype(np.float32) / 255)
    np.testing.assert_allclose(query, expected, atol=1e-4)
