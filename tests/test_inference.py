import dataclasses
import itertools
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from soft_jax import distributed, pytrees
from soft_jax.inference import engine, rules
from soft_jax.inference.predictor import Predictor
from tests.conftest import tiny_method
from tests.replay import model_of


@given(
    count=strategies.integers(1, 3000),
    largest=strategies.integers(1, 600),
    devices=strategies.sampled_from([1, 2, 4]),
)
def test_pieces_cover_every_row_once(count, largest, devices):
    batching = engine.Batching(distributed.data_mesh(jax.devices()[:devices]), largest)
    assert len(batching.sizes) <= 6
    assert all(size % devices == 0 for size in batching.sizes)
    pieces = list(batching.pieces(count))
    assert [row for start, stop, _ in pieces for row in range(start, stop)] == list(range(count))
    for start, stop, size in pieces:
        assert size in batching.sizes
        assert size == batching.sizes[-1] or stop - start <= size <= 2 * (stop - start)
    # What encode relies on: a chunk's pieces fit into the chunk.
    if count <= batching.chunk:
        assert sum(size for *_, size in pieces) <= batching.chunk


@pytest.fixture
def weights_of(backbone):
    """A cache over four tasks with a budget in tasks, the loads it made, and the adapters. Loading
    takes `pause` seconds, in which other threads run.
    """
    method = tiny_method()
    adapters = [method.init_adapter(jax.random.key(t), backbone) for t in range(4)]
    each = 4 * pytrees.count(adapters[0]["mask"])

    def make(budget, pause=0.0):
        loads = []

        def load(task):
            loads.append(task)
            time.sleep(pause)
            return adapters[task]

        cache = engine.TaskWeights(method, backbone, load, int(budget * each))
        assert cache.bytes_each == each
        return cache, loads, adapters

    return make


@pytest.mark.parametrize("budget", [0, 1, 2.9])
def test_weights_stay_within_their_budget(weights_of, budget):
    cache, _, _ = weights_of(budget)
    for task in (0, 1, 2, 3, 0, 2):
        assert task in cache or cache[task]
        assert sum(t in cache for t in range(4)) <= max(1, int(budget))


def test_weights_are_made_once_while_they_fit(weights_of, backbone):
    cache, loads, adapters = weights_of(2)
    for task in (0, 1, 0, 1):
        effective = cache[task]
        theta = pytrees.select(backbone, pytrees.flatten(effective))
        jax.tree.map(
            lambda w, k, m: np.testing.assert_array_equal(w, k * m),
            effective,
            theta,
            adapters[task]["mask"],
        )
    assert loads == [0, 1]
    cache[2]  # in the place of 0, which was used before 1
    assert [task in cache for task in range(3)] == [False, True, True]
    assert cache.order(range(4)) == [1, 2, 0, 3]
    assert (cache.at_once(4), cache.at_once(1)) == (1, 1)
    roomy, _, _ = weights_of(100)
    assert [roomy.at_once(count) for count in (1, 3, 10, 200)] == [1, 4, 16, 16]


def test_a_budget_changes_no_answer(backbone, rng):
    """Tasks read again and again from their source: the same logits, to the bit, and the same
    gradients over α.
    """
    method = tiny_method()
    adapters = [method.init_adapter(jax.random.key(t), backbone) for t in range(5)]
    shared = method.init_shared(jax.random.key(9), backbone)
    images = rng.integers(0, 256, (23, 16, 16, 3)).astype(np.uint8)
    batching = engine.Batching(distributed.data_mesh(), 16)
    tasks = rng.integers(0, 5, 23)
    answers = []
    for budget in (2**30, 0):
        model = model_of(method, backbone, shared, adapters, (0, 1, 3, 4), np.arange(5), budget)
        tokens, query = engine.encode(model, images, batching, queried=True)
        logits = engine.logits(model, tokens, engine.alone(tasks), batching)
        rows = np.arange(23)[:, None]
        answers.append(
            (
                query,
                logits,
                engine.alpha_gradients(model, tokens, rows, np.ones((23, 1)), tasks, batching),
            )
        )
    np.testing.assert_array_equal(answers[0][0], answers[1][0])
    np.testing.assert_array_equal(answers[0][1], answers[1][1])
    np.testing.assert_allclose(answers[0][2], answers[1][2], atol=1e-6)
    assert answers[0][2].shape == (23, 4)


def test_threads_share_the_weights(weights_of, backbone):
    """With room for one task, another thread often evicts what a thread has just asked for."""
    cache, _, adapters = weights_of(1, pause=0.001)

    def ask(thread):
        return [(task, cache[task]) for task in np.random.default_rng(thread).integers(0, 4, 10)]

    with ThreadPoolExecutor(8) as pool:
        for task, weights in itertools.chain.from_iterable(pool.map(ask, range(8))):
            for path, kernel in pytrees.flatten(weights).items():
                mask = pytrees.flatten(adapters[task]["mask"])[path]
                np.testing.assert_array_equal(kernel, pytrees.flatten(backbone)[path] * mask)
    assert sum(task in cache for task in range(4)) == 1


def test_a_task_that_threads_miss_is_loaded_once(weights_of):
    cache, loads, _ = weights_of(1, pause=0.05)
    together = threading.Barrier(8)

    def ask(_):
        together.wait()
        return cache[2]

    with ThreadPoolExecutor(8) as pool:
        weights = list(pool.map(ask, range(8)))
    assert loads == [2]
    assert all(tree is weights[0] for tree in weights)


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("option", rules.options())
def test_threads_share_a_predictor(backbone, rng, option):
    """8 threads × 10 calls with room for one of three tasks answer what one thread does."""
    method, images = tiny_method(), rng.integers(0, 256, (8, 9, 16, 16, 3)).astype(np.uint8)
    adapters = [method.init_adapter(jax.random.key(t), backbone) for t in range(3)]
    shared = method.init_shared(jax.random.key(9), backbone)
    settings_ = rules.RuleSettings(prototype_features=8)
    (rule,) = rules.options()[option].of(method, settings_)
    solved = {}
    if collector := rule.collector(6):
        for task in range(3):
            classes = [2 * task, 2 * task + 1]
            query = rng.normal(size=(10, 24)).astype(np.float32)
            collector.add(classes, rule.statistics(query, np.repeat(classes, 5), classes))
        solved = {rule.name: collector.solve()}
    model = model_of(
        method, backbone, shared, adapters, (0, 1, 2), np.arange(6) // 2, budget=0, solved=solved
    )
    predictor = Predictor(model, rule, list("abcdef"), engine.Batching(mesh_of(4), 8))
    given = np.arange(9) % 3 if option == "oracle" else None
    expected = [predictor.predict(some, given) for some in images]

    def ask(thread):
        return [predictor.predict(images[thread], given) for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        for answers, alone in zip(pool.map(ask, range(8)), expected, strict=True):
            for answer in answers:
                np.testing.assert_array_equal(answer.classes, alone.classes)
                np.testing.assert_array_equal(answer.tasks, alone.tasks)
                np.testing.assert_array_equal(answer.probabilities, alone.probabilities)


@pytest.mark.parametrize(
    ("pieces_at_once", "first", "later"),
    [(4, 5 + 4, 4), (2, 5 + 2 * 4, 2 * 4), (1, 5 + 4 * 4, 4 * 4)],
)
def test_gradient_id_loads_a_task_once(backbone, rng, monkeypatch, pieces_at_once, first, later):
    """64 images in pieces of 16, room for one of five tasks. The first call needs all tasks for the
    mean of their weights; from then on, a pass begins with the task that the last one ended with.
    """
    method = tiny_method()
    adapters = [method.init_adapter(jax.random.key(t), backbone) for t in range(5)]
    shared = method.init_shared(jax.random.key(9), backbone)
    images = rng.integers(0, 256, (64, 16, 16, 3)).astype(np.uint8)
    nearest = rng.integers(0, 5, 64)
    batching = engine.Batching(distributed.data_mesh(), 16)
    rows, ones = np.arange(64)[:, None], np.ones((64, 1))

    model = model_of(method, backbone, shared, adapters, range(5), np.arange(6) % 5)
    tokens, _ = engine.encode(model, images, batching, queried=False)
    expected = engine.alpha_gradients(model, tokens, rows, ones, nearest, batching)

    # Inputs and output gradients of an image, float32.
    kernels = pytrees.flatten(model.mean_weights).values()
    each = tokens.shape[1] * sum(sum(kernel.shape) for kernel in kernels) * 4
    monkeypatch.setattr(engine, "GRADIENT_BYTES", 16 * each * pieces_at_once)
    loads = []

    def load(task):
        loads.append(task)
        return adapters[task]

    model = dataclasses.replace(model, weights=engine.TaskWeights(method, backbone, load, 0))
    for count in (first, later):
        found = engine.alpha_gradients(model, tokens, rows, ones, nearest, batching)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert len(loads) == count
        loads.clear()


def random_piece(rng, batching, total, group=()):
    """A piece of random size, and the rows that items need, any of `total`."""
    size = int(rng.choice([size for size in batching.sizes if size <= total]))
    rows = rng.integers(0, total, (int(rng.integers(1, size + 1)), *group))
    return rows, next(engine.dispatch(rows.reshape(len(rows), -1)[:, 0], total, batching, size))


@given(
    seed=strategies.integers(0, 1000),
    devices=strategies.sampled_from([1, 2, 4]),
    group=strategies.sampled_from([(), (1,), (3,)]),
)
@settings(max_examples=20)
def test_rows_are_taken_to_the_bit(seed, devices, group):
    rng, batching = np.random.default_rng(seed), engine.Batching(mesh_of(devices), 16)
    whole = rng.integers(0, 2**32, (32, 3, 2), np.uint32).view(np.float32)  # NaN and -0 as well
    rows, piece = random_piece(rng, batching, 32, group)
    tokens = jax.device_put(whole, distributed.by_row(batching.mesh))
    taken = engine.take_rows(tokens, rows, piece, batching)
    assert taken.shape == (piece.size, *group, 3, 2)
    assert taken.sharding.is_equivalent_to(tokens.sharding, taken.ndim)
    found = np.asarray(taken)[piece.slots].view(np.uint32)
    np.testing.assert_array_equal(found, whole[rows[piece.chosen]].view(np.uint32))


@given(
    owners=strategies.lists(strategies.integers(0, 3), min_size=1, max_size=200),
    devices=strategies.sampled_from([1, 2, 4]),
)
def test_items_are_dispatched_once_to_the_devices_that_have_them(owners, devices):
    batching = engine.Batching(mesh_of(devices), 32)
    rows = np.array(owners) * 8 + np.arange(len(owners)) % 8
    owners = rows // (32 // devices)
    pieces = list(engine.dispatch(rows, 32, batching))
    chosen = np.concatenate([piece.chosen for piece in pieces])
    assert sorted(chosen) == list(range(len(rows)))
    if devices == 1:
        assert chosen.tolist() == list(range(len(rows)))
    for piece in pieces:
        room = piece.size // devices
        assert len(set(piece.slots)) == len(piece.slots)
        assert piece.slots.min() >= 0 and piece.slots.max() < piece.size
        at_home = np.sum(piece.slots // room == owners[piece.chosen])
        assert at_home == np.minimum(np.bincount(owners[piece.chosen]), room).sum()


def mesh_of(devices):
    return distributed.data_mesh(jax.devices()[:devices])


COLLECTIVE = re.compile(
    r"= (.*) (all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute)(-start)?\("
)


def floats_sent(compiled: str) -> int:
    """Numbers of the float results of a program's collectives, on each device."""
    shapes = [
        shape
        for line in compiled.splitlines()
        if (found := COLLECTIVE.search(line))
        for shape in re.findall(r"f32\[([\d,]*)\]", found[1])
    ]
    return sum(int(np.prod([int(side) for side in shape.split(",")])) for shape in shapes)


@pytest.mark.parametrize(
    ("name", "total", "rows", "most"),
    [
        ("every row once", 64, np.arange(64), 0),
        ("in the chunk's order", 256, np.arange(256), 0),
        ("of any image", 256, np.random.default_rng(0).permutation(256)[:64], 64 / 4),
        ("repeated", 64, np.random.default_rng(1).integers(0, 64, 64), 64 / 4),
        ("all on one device", 256, np.arange(64), 64),  # which has to send most of them
    ],
)
def test_devices_exchange_few_rows(name, total, rows, most):
    """Each of 4 devices receives no more rows for a piece of 64 than its own share, 16, where the
    images' places are mixed. XLA's own gather gives each device all 64, or all tokens.
    """
    batching = engine.Batching(mesh_of(4), 64)
    tokens = jax.ShapeDtypeStruct(
        (total, 17, 8), np.float32, sharding=distributed.by_row(batching.mesh)
    )
    for piece in engine.dispatch(rows, total, batching):
        take = jax.jit(lambda tokens, piece=piece: engine.take_rows(tokens, rows, piece, batching))
        assert floats_sent(take.lower(tokens).compile().as_text()) <= most * 17 * 8, name
    plain = jax.jit(lambda tokens, rows: tokens[rows])
    index = jax.ShapeDtypeStruct((64,), np.int32, sharding=tokens.sharding)
    assert floats_sent(plain.lower(tokens, index).compile().as_text()) >= 64 * 17 * 8


def test_the_exchange_compiles_one_program_for_every_mix(rng):
    batching = engine.Batching(mesh_of(4), 16)
    tokens = jax.device_put(np.ones((64, 5, 8), np.float32), distributed.by_row(batching.mesh))
    before = engine._exchange._cache_size()
    for most in (17, 30, 50, 64):
        rows = rng.integers(0, most, 16)
        (piece,) = engine.dispatch(rows, 64, batching)
        engine.take_rows(tokens, rows, piece, batching)
    assert engine._exchange._cache_size() == before + 1
