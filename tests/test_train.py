"""The training step and its programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soft_jax import pytrees
from soft_jax.data.augmentation import Augment
from soft_jax.distributed import by_row, data_mesh, replicated
from soft_jax.training import train_step
from tests.conftest import DUALPROMPT, tiny_method

pytestmark = pytest.mark.usefixtures("fast_compile")

CLASSES = np.arange(6)
FIXED = ("class_mask", "freeze_g_prompt", "memory")  # the same for every image of a task


@pytest.fixture(autouse=True)
def _optax_promotes():
    """Optax's Adam raises a float to an int step count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def step_config():
    return train_step.StepConfig(tiny_method(), learning_rate=0.01, augment=Augment(16))


def clipped(layout="separate"):
    """A step's settings for tests of gradients alone, so that they share a program."""
    host = dataclasses.replace(DUALPROMPT, prefix_layout=layout)
    return train_step.StepConfig(tiny_method(host=host), learning_rate=0.01, clip_norm=0.1)


def batch(rng, task=0, real=8, padded=8, hold=False):
    labels = np.zeros(padded, np.int32)
    labels[:real] = rng.integers(2 * task, 2 * task + 2, real)
    images = np.zeros((padded, 16, 16, 3), np.uint8)
    images[:real] = rng.integers(0, 256, (real, 16, 16, 3))
    weights = (np.arange(padded) < real).astype(np.float32)
    return {
        "images": images,
        "labels": labels,
        "weights": weights,
        "class_mask": task == CLASSES // 2,
        "freeze_g_prompt": hold,
        "memory": {},
    }


def start(step_config, backbone, seed=0):
    method = step_config.method
    adapter = method.init_adapter(train_step.stream(seed, "adapter", 0), backbone)
    return train_step.init_state(
        step_config, adapter, method.init_shared(train_step.stream(seed, "shared", 0), backbone)
    )


def gradients(trainable, backbone, one, step_config):
    one = one | {"images": one["images"] / np.float32(255)}
    return jax.jit(train_step.gradients, static_argnums=3)(trainable, backbone, one, step_config)


def run(step_config, backbone, batches, devices):
    mesh = data_mesh(jax.devices()[:devices])
    step = train_step.compile_step(step_config, mesh)
    state = jax.device_put(start(step_config, backbone), replicated(mesh))
    losses = []
    for one in batches:
        state, terms = step(state, backbone, one, train_step.stream(0, "augment", 0))
        losses.append(float(terms["loss"]))
    return jax.device_get(state), losses


def test_one_and_four_devices_agree(step_config, backbone, rng):
    batches = [batch(rng) for _ in range(5)]
    (one, losses_one), (four, losses_four) = (
        run(step_config, backbone, batches, 1),
        run(step_config, backbone, batches, 4),
    )
    np.testing.assert_allclose(losses_one, losses_four, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), one.trainable, four.trainable
    )
    moved = np.abs(
        one.trainable["shared"]["g_prompt"]
        - start(step_config, backbone).trainable["shared"]["g_prompt"]
    ).max()
    assert moved > 0.01  # the tolerance is far below what was learned


def test_one_compilation_serves_every_task_and_the_last_batch(step_config, backbone, rng):
    mesh = data_mesh()
    step = train_step.compile_step(step_config, mesh)
    state = jax.device_put(start(step_config, backbone, seed=3), replicated(mesh))
    before = step._cache_size()
    for task, real in ((0, 8), (1, 8), (2, 5)):
        data = batch(rng, task, real, hold=task > 0)
        data = {
            k: jax.device_put(v, replicated(mesh) if k in FIXED else by_row(mesh))
            for k, v in data.items()
        }
        state, _ = step(state, backbone, data, train_step.stream(0, "augment", task))
    assert step._cache_size() - before <= 1
    assert train_step.compile_step(step_config, mesh) is step


def test_state_is_donated(step_config, backbone, rng):
    mesh = data_mesh()
    state = jax.device_put(start(step_config, backbone), replicated(mesh))
    after, _ = train_step.compile_step(step_config, mesh)(
        state, backbone, batch(rng), jax.random.key(0)
    )
    assert state.trainable["adapter"]["key"].is_deleted()
    assert not after.trainable["adapter"]["key"].is_deleted()


@pytest.mark.parametrize("layout", ["separate", "interleaved"])
def test_padding_changes_nothing(backbone, rng, layout):
    step_config = clipped(layout)
    padded = batch(rng, task=1, real=5)  # the padding's label, 0, is of another task
    exact = {k: v if k in FIXED else v[:5] for k, v in padded.items()}
    state = start(step_config, backbone)
    results = []
    for one in (exact, padded):
        grads, terms = gradients(state.trainable, backbone, one, step_config)
        results.append((grads, terms["loss"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), *results)


def test_only_adapter_and_shared_part_are_trained(step_config, backbone):
    state = start(step_config, backbone)
    trained = pytrees.count(state.trainable)
    assert trained == 24 + 2 * 2 * 3 * 24 + 2 * (24 * 72 + 24 * 24) + 1 * 2 * 2 * 24 + 24 * 6 + 6
    assert pytrees.count(state.opt_state) == 2 * trained + 1  # two moments and a count


def test_other_tasks_classes_get_no_gradient(backbone, rng):
    state = start(clipped(), backbone)
    one = batch(rng, task=1)
    grads, _ = gradients(state.trainable, backbone, one, clipped())
    kernel = np.abs(grads["shared"]["head"]["kernel"]).max(axis=0)
    assert (kernel[[0, 1, 4, 5]] == 0).all()
    assert (kernel[[2, 3]] > 0).all()


def test_gradients_are_clipped_to_the_global_norm(backbone, rng):
    one = batch(rng)
    grads, terms = gradients(start(clipped(), backbone).trainable, backbone, one, clipped())
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    assert terms["grad_norm"] > 0.1
    assert norm == pytest.approx(0.1, rel=1e-3)


def test_streams_differ_by_seed_name_and_task():
    keys = [
        train_step.stream(*args) for args in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))
    ]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 4


def test_a_frozen_g_prompt_keeps_its_bits(step_config, backbone, rng):
    """All else is trained."""
    before = start(step_config, backbone)
    after, _ = run(step_config, backbone, [batch(rng, hold=True) for _ in range(3)], 1)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before.trainable, after.trainable)
    assert changed["shared"] == {"g_prompt": False, "head": {"kernel": True, "bias": True}}
    assert all(jax.tree.leaves(changed["adapter"]))


def test_a_frozen_g_prompt_does_not_count_in_the_norm(backbone, rng):
    """The norm that gradients are clipped to is that of those that are trained."""
    trainable, one = start(clipped(), backbone).trainable, batch(rng)
    frozen = one | {"freeze_g_prompt": True}
    free, terms = gradients(trainable, backbone, one, clipped())
    held, held_terms = gradients(trainable, backbone, frozen, clipped())
    assert not np.asarray(held["shared"]["g_prompt"]).any()
    assert np.asarray(free["shared"]["g_prompt"]).any()
    assert held_terms["grad_norm"] < terms["grad_norm"]
