import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from hypothesis.strategies import DataObject

from soft_jax import distributed
from soft_jax.evaluation import evaluate
from soft_jax.inference import engine, identity, prototypes
from soft_jax.inference import rules as task_identity
from soft_jax.methods import hosts, prompts
from tests import protocols
from tests.conftest import soft_masks, tiny_method
from tests.replay import model_of

pytestmark = pytest.mark.usefixtures("fast_compile")

TASK_OF_CLASS = np.arange(6) // 2
COUNT = 37


def make_adapters(backbone, method):
    adapters = [method.init_adapter(jax.random.key(t), backbone) for t in range(3)]
    if method.reparametrization:  # spread, so that tasks disagree
        adapters = [
            a | {"mask": jax.tree.map(lambda m, t=t: m * (1 + t), a["mask"])}
            for t, a in enumerate(adapters)
        ]
    return adapters


def make_model(backbone, method, adapters, seen=3, **others):
    shared = method.init_shared(jax.random.key(9), backbone)
    shared = shared | {"head": jax.tree.map(lambda x: 20 * x, shared["head"])}
    return model_of(method, backbone, shared, adapters, tuple(range(seen)), TASK_OF_CLASS, **others)


def run_settings(batch_size=8, eval_batch_size=16, devices=4):
    mesh = distributed.data_mesh(jax.devices()[:devices])
    return evaluate.Settings(mesh, batch_size, eval_batch_size)


SHOTS, FEATURES = (5, 0), 40


def answer(model, images, query, task, settings, features=FEATURES):
    rules = protocols.rules_for(model.method, SHOTS, features)
    return evaluate.answer(model, rules, images, query, task, settings)


def evaluate_task(model, images, labels, query, task, settings, features=FEATURES):
    answers = answer(model, images, query, task, settings, features)
    return evaluate.count(answers, labels, task, len(model.rows["key"]))


def keys_that_split(query):
    """Three keys, each towards one image from the mean of all, such that every task is some
    images' nearest.
    """
    towards = query - query.mean(axis=0)
    for chosen in itertools.combinations(range(COUNT), 3):
        nearest = np.asarray(prompts.similarity(query, towards[list(chosen)])).argmax(axis=1)
        if np.bincount(nearest, minlength=3).min() >= 5:
            return [jax.numpy.asarray(towards[i]) for i in chosen]
    raise AssertionError("no such keys")


@pytest.fixture(scope="module")
def world(backbone):
    """A model of three tasks, its adapters, images, and their q(x)."""
    rng, method = np.random.default_rng(5), tiny_method()
    images = rng.integers(0, 256, (COUNT, 16, 16, 3)).astype(np.uint8)
    query = engine.queries(method, backbone, images, run_settings().batching)
    adapters = [
        a | {"key": key}
        for a, key in zip(make_adapters(backbone, method), keys_that_split(query), strict=True)
    ]
    projection = prototypes.projection(0, 24, FEATURES)
    sums = prototypes.Sums(6, projection)
    for task in range(3):
        labels = 2 * task + np.arange(COUNT) % 2
        part = slice(task, None, 3)
        sums.add(
            (2 * task, 2 * task + 1),
            prototypes.statistics(query[part], labels[part], (2 * task, 2 * task + 1), projection),
        )
    return (
        make_model(backbone, method, adapters, solved={"prototype": sums.solve()}),
        adapters,
        images,
        query,
    )


def by_hand(model, adapter, image, sources=None):
    """One image through one task, the plain way."""
    batch = image[None].astype(np.float32) / 255
    tokens = model.method.trunk(model.backbone, model.shared, batch)
    return np.asarray(model.method.logits(model.backbone, adapter, model.shared, tokens, sources))[
        0
    ]


def gradient_by_hand(model, adapters, image, nearest):
    """∂H/∂α of one image by jax.grad over explicit α."""
    tokens = model.method.trunk(model.backbone, model.shared, image[None].astype(np.float32) / 255)

    def entropy(alpha):
        mask = jax.tree.map(
            lambda *m: sum(a * x for a, x in zip(alpha, m, strict=True)),
            *[a["mask"] for a in adapters],
        )
        logits = model.method.logits(
            model.backbone, adapters[nearest] | {"mask": mask}, model.shared, tokens
        )
        return identity.entropy_of_top(logits, 2).sum()

    return np.asarray(jax.grad(entropy)(jax.numpy.full(3, 1 / 3)))


def test_every_protocol_against_a_plain_loop(world):
    model, adapters, images, query = world
    answers = answer(model, images, query, 1, run_settings())
    keys = np.stack([a["key"] for a in adapters])
    nearest = np.asarray(prompts.similarity(query, keys)).argmax(axis=1)
    assert len(set(nearest.tolist())) == 3
    np.testing.assert_array_equal(answers.task_ids[protocols.PER_SAMPLE], nearest)
    np.testing.assert_array_equal(answers.task_ids[protocols.ORACLE], np.ones(COUNT))
    assert answers.alpha_gradients[5].shape == (5, 3)
    for shots, protocol in ((5, "batch_vote/gradient_id_5"), (0, "batch_vote/gradient_id_all")):
        voted = answers.alpha_gradients[shots].argmin(axis=1)
        np.testing.assert_array_equal(answers.task_ids[protocol], voted[np.arange(COUNT) // 8])
    asking = (r for r in protocols.rules_for(model.method, SHOTS, FEATURES) if r.needs_network)
    assert set(answers.logits) == {rule.key for rule in asking}
    for i in (0, 36):
        for protocol, logits in answers.logits.items():
            assert logits.shape == (COUNT, 6)
            expected = by_hand(model, adapters[answers.task_ids[protocol][i]], images[i])
            np.testing.assert_allclose(logits[i], expected, atol=2e-4, err_msg=protocol)
        assert (
            answers.task_ids[protocols.PER_SAMPLE_GRADIENT][i]
            == gradient_by_hand(model, adapters, images[i], nearest[i]).argmin()
        )
    assert len(set(answers.task_ids[protocols.PER_SAMPLE_GRADIENT].tolist())) > 1


def test_prototypes_name_the_task_and_weigh_the_logits(world):
    model, _, images, query = world
    answers = answer(model, images, query, 1, run_settings())
    posterior = np.asarray(prototypes.log_posterior(query, model.solved["prototype"]))
    by_task = np.exp(posterior).reshape(COUNT, 3, 2).sum(axis=2)
    tasks = answers.task_ids[protocols.PROTOTYPE]
    np.testing.assert_array_equal(tasks, by_task.argmax(axis=1))
    assert len(set(tasks.tolist())) == 3
    scores = answers.scores[protocols.PROTOTYPE]
    expected = (posterior + answers.logits[protocols.PROTOTYPE]).reshape(COUNT, 3, 2)[
        np.arange(COUNT), tasks
    ]
    np.testing.assert_allclose(
        scores.reshape(COUNT, 3, 2)[np.arange(COUNT), tasks], expected, rtol=1e-5, atol=1e-5
    )
    assert np.isinf(scores).sum() == 4 * COUNT


def test_frozen_features_answer_alone(world):
    """By the statistics, whatever the networks say; with the task given, among its classes."""
    model, _, images, query = world
    answers = answer(model, images, query, 1, run_settings())
    posterior = np.asarray(prototypes.log_posterior(query, model.solved["prototype"]))
    best = posterior.argmax(axis=1)
    np.testing.assert_array_equal(answers.scores[protocols.FROZEN].argmax(axis=1), best)
    np.testing.assert_array_equal(answers.task_ids[protocols.FROZEN], best // 2)
    given = answers.scores[protocols.FROZEN_GIVEN]
    np.testing.assert_array_equal(given.argmax(axis=1), 2 + posterior[:, 2:4].argmax(axis=1))
    assert np.isinf(given).sum() == 4 * COUNT
    assert not {protocols.FROZEN, protocols.FROZEN_GIVEN} & answers.logits.keys()


def test_probabilities_count_the_doubt_about_the_task(world):
    """Under every rule they sum to 1 over the classes that can win; prototypes multiply by
    p(task | x), and give the other tasks what is left.
    """
    model, _, images, query = world
    answers = answer(model, images, query, 1, run_settings())
    posterior = np.exp(prototypes.log_posterior(query, model.solved["prototype"]))
    by_task, rows = posterior.reshape(COUNT, 3, 2).sum(axis=2), np.arange(COUNT)
    for protocol, logs in answers.log_probabilities.items():
        np.testing.assert_allclose(np.exp(logs).sum(axis=1), 1, atol=1e-5, err_msg=protocol)
    tasks = answers.task_ids[protocols.PROTOTYPE]
    found = np.exp(answers.log_probabilities[protocols.PROTOTYPE])
    own = found.reshape(COUNT, 3, 2)[rows, tasks]
    np.testing.assert_allclose(own.sum(axis=1), by_task[rows, tasks], rtol=1e-4)
    other = found.reshape(COUNT, 3, 2)[rows, (tasks + 1) % 3]
    expected = posterior.reshape(COUNT, 3, 2)[rows, (tasks + 1) % 3]
    np.testing.assert_allclose(other, expected, rtol=1e-4, atol=1e-7)
    assert own.max() < 1
    given = np.exp(answers.log_probabilities[protocols.ORACLE])
    np.testing.assert_allclose(given[:, 2:4].sum(axis=1), 1, atol=1e-5)


def test_images_are_counted_exactly(world):
    """37 images in batches of 8: the last one holds 5; under oracle only the task's classes can
    win.
    """
    model, _, images, query = world
    labels = np.full(COUNT, 2)
    answers = answer(model, images, query, 1, run_settings())
    rows = evaluate_task(model, images, labels, query, 1, run_settings())
    assert set(rows) == set(protocols.keys_of(model.method, SHOTS, FEATURES))
    for protocol, row in rows.items():
        assert row.total == COUNT == sum(row.identified)
        assert row.identified == tuple(np.bincount(answers.task_ids[protocol], minlength=3))
        assert row.task_correct == row.identified[1]
    logits = answers.logits[protocols.ORACLE]
    assert rows[protocols.ORACLE].correct == (logits[:, 2] > logits[:, 3]).sum()
    assert rows[protocols.ORACLE].task_correct == COUNT
    assert (
        rows[protocols.PER_SAMPLE].correct
        == (answers.logits[protocols.PER_SAMPLE].argmax(axis=1) == 2).sum()
    )


def test_unseen_tasks_and_classes_only_under_batch_vote(world):
    model, _, images, query = world
    early = dataclasses.replace(model, tasks=(0,), solved={})
    answers = answer(early, images, query, 0, run_settings(), features=0)
    assert (answers.task_ids[protocols.PER_SAMPLE] == 0).all()
    assert answers.task_ids[protocols.VOTE_PROMPT].max() > 0
    logits = answers.logits[protocols.PER_SAMPLE]
    rows = evaluate_task(early, images, np.zeros(COUNT, int), query, 0, run_settings(), features=0)
    assert rows[protocols.PER_SAMPLE].correct == (logits[:, 0] > logits[:, 1]).sum()


@given(data=strategies.data())
@settings(max_examples=15)
def test_per_sample_does_not_depend_on_the_batch(world, data: DataObject):
    """Any choice of the images, in any order, under any batch size: the same task and class for
    each.
    """
    model, _, images, query = world
    whole = answer(model, images, query, 0, run_settings())
    chosen = np.array(
        data.draw(strategies.lists(strategies.integers(0, COUNT - 1), min_size=1, max_size=COUNT))
    )
    batching = run_settings(
        batch_size=data.draw(strategies.sampled_from([3, 8])),
        eval_batch_size=data.draw(strategies.sampled_from([16, 64])),
    )
    alone = engine.queries(model.method, model.backbone, images[chosen], batching.batching)
    part = answer(model, images[chosen], alone, data.draw(strategies.integers(0, 2)), batching)
    for protocol in (protocols.PER_SAMPLE, protocols.PER_SAMPLE_GRADIENT, protocols.PROTOTYPE):
        np.testing.assert_array_equal(part.task_ids[protocol], whole.task_ids[protocol][chosen])
        np.testing.assert_array_equal(
            part.scores[protocol].argmax(axis=1), whole.scores[protocol][chosen].argmax(axis=1)
        )


def test_one_and_four_devices_agree(world):
    model, _, images, query = world
    one, four = (answer(model, images, query, 2, run_settings(devices=n)) for n in (1, 4))
    for protocol in one.logits:
        np.testing.assert_array_equal(one.task_ids[protocol], four.task_ids[protocol])
        np.testing.assert_allclose(one.logits[protocol], four.logits[protocol], atol=1e-4)


def test_interleaved_prefixes_follow_the_published_batches(world):
    """An image's prefix depends on its place in its batch, but under per_sample it is alone."""
    model, adapters, images, query = world
    model = dataclasses.replace(
        model,
        method=dataclasses.replace(
            model.method, host=dataclasses.replace(model.method.host, prefix_layout="interleaved")
        ),
    )
    answers = answer(model, images, query, 0, run_settings())
    separate = np.array([[0, 1]])
    # The last batch holds images 32 to 36: 34 stands in its middle.
    for i, sources in (
        (0, [[0, 0]]),
        (3, [[0, 0]]),
        (4, [[1, 1]]),
        (32, [[0, 0]]),
        (34, [[0, 1]]),
        (36, [[1, 1]]),
    ):
        expected = by_hand(model, adapters[0], images[i], np.array(sources))
        np.testing.assert_allclose(answers.logits[protocols.ORACLE][i], expected, atol=2e-4)
        expected = by_hand(
            model, adapters[answers.task_ids[protocols.PER_SAMPLE][i]], images[i], separate
        )
        np.testing.assert_allclose(answers.logits[protocols.PER_SAMPLE][i], expected, atol=2e-4)


def test_a_test_batch_larger_than_a_chunk(world):
    model, _, images, query = world
    settings_ = run_settings(batch_size=30, eval_batch_size=4)
    assert settings_.batching.chunk == 16
    large, whole = (
        answer(model, images, query, 0, s) for s in (settings_, run_settings(batch_size=30))
    )
    for protocol in whole.logits:
        np.testing.assert_array_equal(large.task_ids[protocol], whole.task_ids[protocol])


@pytest.fixture
def asked(monkeypatch):
    """What `engine.alpha_gradients` is asked for, call by call."""
    pairs_of_calls, alpha_gradients = [], engine.alpha_gradients

    def count(model, tokens, pairs, *others):
        pairs_of_calls.append(pairs)
        return alpha_gradients(model, tokens, pairs, *others)

    monkeypatch.setattr(engine, "alpha_gradients", count)
    return pairs_of_calls


@pytest.mark.parametrize("layout", ["separate", "interleaved"])
def test_an_images_gradients_are_computed_once_for_all_rules(world, layout, asked):
    """Of the same image with the same E-prompt, whichever rule asks, in one go; a batch's are the
    mean of its first images'.
    """
    model, adapters, images, query = world
    host = dataclasses.replace(model.method.host, prefix_layout=layout)
    model = dataclasses.replace(model, method=dataclasses.replace(model.method, host=host))
    answers = answer(model, images, query, 1, run_settings(eval_batch_size=64))
    (pairs,) = asked
    nearest, (batch, place) = answers.task_ids[protocols.PER_SAMPLE], np.divmod(range(COUNT), 8)
    wanted = {(nearest[i], i, 0, 1) for i in range(COUNT)}
    means = {}
    batching = run_settings(eval_batch_size=64).batching
    tokens, _ = engine.encode(model, images, batching, queried=False)
    for shots in SHOTS:
        first = np.flatnonzero(place < (shots or 8))
        voted = identity.majority(nearest[first], batch[first], 3)
        of = np.stack([voted, first, place[first], np.bincount(batch[first])[batch[first]]], axis=1)
        wanted |= set(map(tuple, of.tolist()))
        rows = engine.alpha_gradients(model, tokens, of, batching)
        means[shots] = np.stack([rows[batch[first] == b].mean(axis=0) for b in range(5)])
    if layout == "separate":  # its place in a batch changes nothing
        wanted = {(task, image) for task, image, *_ in wanted}
        by_hand = [gradient_by_hand(model, adapters, images[i], voted[i]) for i in range(8)]
        np.testing.assert_allclose(means[0][0], np.mean(by_hand, axis=0), rtol=2e-3, atol=1e-6)
        assert len(wanted) < 2 * COUNT
    width = 2 if layout == "separate" else 4
    assert sorted(map(tuple, pairs[:, :width].tolist())) == sorted(wanted)
    for shots in SHOTS:
        np.testing.assert_allclose(
            answers.alpha_gradients[shots], means[shots], rtol=1e-4, atol=1e-7
        )


def test_votes_take_the_prompts_that_a_batch_selects(backbone, rng, asked):
    """Of a pool, a batch selects others than an image by itself; the gradients follow. Tasks have
    no prompt here, so an image has one gradient by itself and one in its batch.
    """
    host = hosts.L2P(size=6, length=2, top_k=2)
    method = tiny_method(host=host, reparametrization=soft_masks(layers=(1,)))
    adapters = make_adapters(backbone, method)
    model = make_model(backbone, method, adapters)
    images = rng.integers(0, 256, (COUNT, 16, 16, 3)).astype(np.uint8)
    query = engine.queries(method, backbone, images, run_settings().batching)
    settings_ = run_settings(eval_batch_size=64)
    answers = answer(model, images, query, 1, settings_, features=0)
    assert list(map(len, asked)) == [COUNT, COUNT]
    batches = task_identity.TestBatches(COUNT, 8)
    alone, in_batch = evaluate._tokens(model, images, query, batches, settings_)
    of_images = [
        engine.alpha_gradients(
            model, tokens, engine.alone(np.zeros(COUNT, int)), settings_.batching
        )
        for tokens in (alone, in_batch)
    ]
    ours, others = (
        np.stack([rows[batches.index == b].mean(axis=0) for b in range(5)])
        for rows in reversed(of_images)
    )
    assert np.abs(ours - others).max() > 1e-2 * np.abs(ours).max()
    np.testing.assert_allclose(answers.alpha_gradients[0], ours, rtol=1e-4, atol=1e-7)
    by_itself = of_images[0].argmin(axis=1)
    np.testing.assert_array_equal(answers.task_ids["per_sample/gradient_id"], by_itself)


def test_chunks_are_joined(world):
    """More images than are held at once give what one chunk gives."""
    model, _, images, query = world
    many = run_settings(eval_batch_size=4)
    assert many.chunk == 16
    pieces, whole = (
        answer(model, images, query, 0, many),
        answer(model, images, query, 0, run_settings()),
    )
    for shots in (5, 0):
        np.testing.assert_allclose(
            pieces.alpha_gradients[shots], whole.alpha_gradients[shots], atol=1e-4
        )
    for protocol in whole.logits:
        np.testing.assert_array_equal(pieces.task_ids[protocol], whole.task_ids[protocol])


def test_dualprompt_has_no_gradient_id(backbone, rng):
    method = tiny_method(reparametrization=None)
    assert not any(
        "gradient_id" in protocol for protocol in protocols.keys_of(method, (7,), FEATURES)
    )
    images = rng.integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    query = engine.queries(method, backbone, images, run_settings().batching)
    adapters = make_adapters(backbone, method)
    model = make_model(backbone, method, adapters)
    answers = answer(model, images, query, 0, run_settings(), features=0)
    assert answers.alpha_gradients == {}
    assert set(answers.scores) == set(protocols.keys_of(method, SHOTS))
    # Images of all tasks run together, each with its own prompt.
    tasks = np.array([2, 0, 1, 1, 0])
    batching = run_settings().batching
    tokens, _ = engine.encode(model, images, batching, queried=False)
    logits = engine.logits(model, tokens, engine.alone(tasks), batching)
    for i, task in enumerate(tasks):
        np.testing.assert_allclose(logits[i], by_hand(model, adapters[task], images[i]), atol=2e-4)


def test_bfloat16_names_the_same_tasks(world):
    """q(x) comes in bfloat16 then, but is compared with the keys in float32: near 1 bfloat16
    would tie.
    """
    model, _, images, query = world
    low = dataclasses.replace(
        model,
        method=dataclasses.replace(
            model.method,
            architecture=dataclasses.replace(model.method.architecture, dtype="bfloat16"),
        ),
    )
    with jax.numpy_dtype_promotion("standard"):
        rounded = engine.queries(low.method, low.backbone, images, run_settings().batching)
        answers = answer(low, images, query.astype(rounded.dtype), 1, run_settings())
    assert rounded.dtype == jax.numpy.bfloat16
    expected = answer(model, images, query, 1, run_settings()).task_ids[protocols.PER_SAMPLE]
    assert (answers.task_ids[protocols.PER_SAMPLE] == expected).mean() > 0.9
    similarity = identity.key_similarity(query.astype(rounded.dtype), model.rows["key"])
    assert similarity.dtype == np.float32
    assert answers.logits[protocols.ORACLE].dtype == np.float32


def test_queries_are_those_of_the_plain_backbone(world):
    model, _, images, query = world
    plain = images.astype(np.float32) / 255
    expected = model.method.architecture.module().apply({"params": model.backbone}, plain)
    np.testing.assert_allclose(query, expected, atol=1e-4)
