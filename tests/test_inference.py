import dataclasses
import functools
import itertools
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from soft_jax import distributed, pytrees
from soft_jax.config import Config
from soft_jax.inference import engine, rules
from soft_jax.inference.predictor import Predictor
from tests.conftest import tiny_method
from tests.replay import model_of


@given(
    count=strategies.integers(1, 3000),
    largest=strategies.integers(1, 600),
    devices=strategies.sampled_from([1, 2, 4]),
    bounds=strategies.tuples(strategies.integers(0, 5), strategies.integers(0, 5)),
)
def test_pieces_cover_every_row_once(count, largest, devices, bounds):
    batching = engine.Batching(distributed.data_mesh(jax.devices()[:devices]), largest)
    sizes = batching.sizes
    assert len(sizes) <= 6
    assert all(size % devices == 0 for size in sizes)
    most, least = (sizes[min(place, len(sizes) - 1)] for place in sorted(bounds))
    for allowed, pieces in (
        (sizes, list(batching.pieces(count))),
        (
            [size for size in sizes if least <= size <= most],
            list(batching.pieces(count, most, least)),
        ),
        (sizes[-1:], list(batching.pieces(count, 0))),  # a limit below all sizes
    ):
        rows = [row for start, stop, _ in pieces for row in range(start, stop)]
        assert rows == list(range(count))
        for start, stop, size in pieces:
            assert size in allowed
            assert stop - start <= size
            assert size <= 2 * (stop - start) or size == allowed[-1]
    pieces = list(batching.pieces(count))
    # What encode relies on: a chunk's pieces fit into the chunk.
    if count <= batching.chunk:
        assert sum(size for *_, size in pieces) <= batching.chunk


def test_a_pass_takes_about_64_images_a_device():
    devices = jax.devices()
    asked = [(1, largest) for largest in (512, 256, 200, 128, 80, 64, 16)] + [(4, 256), (4, 1024)]
    found = [
        engine.Batching(distributed.data_mesh(devices[:count]), largest) for count, largest in asked
    ]
    assert [each.sizes[0] for each in found] == [32, 64, 50, 32, 80, 64, 16, 256, 256]
    assert [each.chunk for each in found] == [2048, 1024, 800, 512, 320, 256, 64, 1024, 4096]
    assert found[1].rooms == (1, 4, 16, 64, 256, 1024)


@pytest.fixture
def eager_threads():
    """Python changes from thread to thread as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def loader(adapters, pause=0.0):
    """A function that loads one of `adapters`, and the list of the loads it made. It takes `pause`
    seconds, in which other threads run, and fails when two threads are in it.
    """
    loads, alone = [], threading.Lock()

    def load(task):
        assert alone.acquire(blocking=False), "two tasks are loaded into the room of one"
        loads.append(task)
        time.sleep(pause)
        alone.release()
        return adapters[task]

    return load, loads


@pytest.fixture
def weights_of(backbone):
    """A cache over four tasks with a budget in tasks, the loads it made, and the adapters."""
    method = tiny_method()
    adapters = [method.init_adapter(jax.random.key(t), backbone) for t in range(4)]
    each = 4 * pytrees.count(adapters[0]["mask"])

    def make(budget, pause=0.0):
        load, loads = loader(adapters, pause)
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
    assert [roomy.at_once(count) for count in (1, 3, 10, 200)] == [8, 8, 16, 16]


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
        pairs = engine.alone(tasks)
        logits = engine.logits(model, tokens, pairs, batching)
        answers.append((query, logits, engine.alpha_gradients(model, tokens, pairs, batching)))
    np.testing.assert_array_equal(answers[0][0], answers[1][0])
    np.testing.assert_array_equal(answers[0][1], answers[1][1])
    np.testing.assert_allclose(answers[0][2], answers[1][2], atol=1e-6)
    assert answers[0][2].shape == (23, 4)


@pytest.mark.usefixtures("eager_threads")
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


@pytest.mark.usefixtures("fast_compile", "eager_threads")
@pytest.mark.parametrize("option", ("prompt", "gradient", "prototype", "oracle"))
def test_threads_share_a_predictor(backbone, rng, option):
    """8 threads × 10 calls with room for one of three tasks answer what one thread does."""
    method, images = tiny_method(), rng.integers(0, 256, (8, 9, 16, 16, 3)).astype(np.uint8)
    adapters = [method.init_adapter(jax.random.key(t), backbone) for t in range(3)]
    shared = method.init_shared(jax.random.key(9), backbone)
    settings_ = Config(prototype_features=8)
    (rule,) = rules.options()[option].of(method, settings_)
    solved = {}
    if collector := rule.collector(6):
        for task in range(3):
            classes = [2 * task, 2 * task + 1]
            query = rng.normal(size=(10, 24)).astype(np.float32)
            collector.add(classes, rule.statistics(query, np.repeat(classes, 5), classes))
        solved = {rule.statistics_name: collector.solve()}
    model = model_of(
        method, backbone, shared, adapters, (0, 1, 2), np.arange(6) // 2, solved=solved
    )
    weights = engine.TaskWeights(method, backbone, loader(adapters, pause=0.001)[0], 0)
    model = dataclasses.replace(model, weights=weights)
    predictor = Predictor(model, rule, list("abcdef"), engine.Batching(mesh_of(4), 8))
    given = np.arange(9) % 3 if option == "oracle" else None
    expected = [predictor.predict(some, given) for some in images]

    def ask(thread):
        return [predictor.predict(images[thread], given) for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        for answers, alone in zip(pool.map(ask, range(8)), expected, strict=True):
            for answer in answers:
                np.testing.assert_array_equal(answer.classes, alone.classes)
                np.testing.assert_array_equal(answer.networks, alone.networks)
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
    pairs = engine.alone(rng.integers(0, 5, 64))
    batching = engine.Batching(distributed.data_mesh(), 16)

    model = model_of(method, backbone, shared, adapters, range(5), np.arange(6) % 5)
    tokens, _ = engine.encode(model, images, batching, queried=False)
    expected = engine.alpha_gradients(model, tokens, pairs, batching)

    # Inputs and output gradients of an image, float32.
    kernels = pytrees.flatten(model.mean_weights).values()
    each = tokens.array.shape[1] * sum(sum(kernel.shape) for kernel in kernels) * 4
    monkeypatch.setattr(engine, "GRADIENT_BYTES", 16 * each * pieces_at_once)
    load, loads = loader(adapters)
    model = dataclasses.replace(model, weights=engine.TaskWeights(method, backbone, load, 0))
    for count in (first, later):
        found = engine.alpha_gradients(model, tokens, pairs, batching)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert len(loads) == count
        loads.clear()


@given(
    seed=strategies.integers(0, 1000),
    devices=strategies.sampled_from([1, 2, 4]),
)
@settings(max_examples=20)
def test_tokens_are_joined_and_taken_to_the_bit(seed, devices):
    rng, batching = np.random.default_rng(seed), engine.Batching(mesh_of(devices), 16)
    count = int(rng.integers(1, batching.chunk + 1))
    whole = rng.normal(size=(count, 3, 2)).astype(np.float32)
    pieces = list(batching.pieces(count))
    tokens = engine.join_tokens(
        [batching.put(whole[start:stop], size) for start, stop, size in pieces],
        [stop - start for start, stop, _ in pieces],
        pieces[0][2] if len(pieces) == 1 else batching.chunk,
        batching,
    )
    size = int(rng.choice(batching.sizes))
    images = rng.integers(0, count, int(rng.integers(1, size + 1)))
    taken = engine.take_rows(tokens, images, size, batching)
    assert taken.shape == (size, 3, 2)
    assert taken.sharding.is_equivalent_to(tokens.array.sharding, taken.ndim)
    np.testing.assert_array_equal(np.asarray(taken)[: len(images)], whole[images])


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


def test_devices_exchange_rows_alone():
    """For 64 of 256 rows, each of 4 devices receives its own share of 16. XLA's own gather gives
    each device all 64, or all tokens. Joining parts of tokens exchanges nothing.
    """
    batching = engine.Batching(mesh_of(4), 64)
    like, by_row = jax.ShapeDtypeStruct, distributed.by_row(batching.mesh)
    whole = distributed.replicated(batching.mesh)
    tokens = like((256, 17, 8), np.float32, sharding=by_row)
    index = like((64,), np.int32, sharding=whole)
    ours = engine._take_scattered.lower(tokens, index, batching.mesh).compile().as_text()
    assert floats_sent(ours) <= 16 * 17 * 8
    plain = jax.jit(lambda tokens, rows: tokens[rows]).lower(tokens, index).compile().as_text()
    assert floats_sent(plain) >= 64 * 17 * 8

    part, start = like((64, 17, 8), np.float32, sharding=by_row), like((), np.int32, sharding=whole)
    insert = jax.lax.dynamic_update_slice_in_dim
    plain = jax.jit(functools.partial(insert, axis=0), out_shardings=by_row)
    assert floats_sent(plain.lower(tokens, part, start).compile().as_text()) >= 64 * 17 * 8
    grow = engine._grow.lower(part, 256, batching.mesh)
    for joins in (grow, engine._insert.lower(tokens, part, start, batching.mesh)):
        assert not COLLECTIVE.search(joins.compile().as_text())
