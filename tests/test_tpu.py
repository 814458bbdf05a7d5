"""A training step as the TPU's own compiler makes it, and what is done for TPUs alone; no TPU is
needed.
"""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

from benchmarks import tpu
from soft_jax.distributed import data_mesh
from soft_jax.methods import hosts
from soft_jax.training import train_step
from tests.conftest import DUALPROMPT, python, tiny_method


@pytest.fixture
def step_config():
    """A step of which the scores of attention of four images fit."""
    host = dataclasses.replace(DUALPROMPT, prefix_layout="interleaved")
    config = train_step.StepConfig(tiny_method(host=host), learning_rate=0.01, clip_norm=0.1)
    tokens = (16 // 4) ** 2 + 1
    return dataclasses.replace(config, score_bytes=4 * (4 * 3 * tokens**2))


@pytest.mark.usefixtures("fast_compile")
def test_groups_of_images_give_the_whole_batch_s_gradients_and_terms(step_config, backbone):
    """The last group is padding alone, and an E-prompt's halves go by position in the batch."""
    rng, size, real = np.random.default_rng(0), 12, 7
    batch = {
        "images": rng.random((size, 16, 16, 3), np.float32),
        "labels": rng.integers(0, 2, size),
        "weights": (np.arange(size) < real).astype(np.float32),
        "class_mask": np.arange(6) < 2,
        "freeze_g_prompt": False,
        "memory": {},
    }
    method = step_config.method
    trainable = {
        "adapter": method.init_adapter(jax.random.key(0), backbone),
        "shared": method.init_shared(jax.random.key(1), backbone),
    }
    assert step_config.images_at_once(backbone, batch["images"]) == 4
    gradients = jax.jit(train_step.gradients, static_argnums=3)
    grouped = gradients(trainable, backbone, batch, step_config)
    whole = gradients(
        trainable, backbone, batch, dataclasses.replace(step_config, score_bytes=None)
    )
    assert grouped[1]["grad_norm"] > step_config.clip_norm  # so that clipping is of the sum
    for ours, theirs in zip(*map(jax.tree.leaves_with_path, (grouped, whole)), strict=True):
        np.testing.assert_allclose(
            ours[1], theirs[1], rtol=2e-4, atol=1e-6, err_msg=jax.tree_util.keystr(ours[0])
        )


def test_a_batch_is_split_where_its_scores_do_not_fit_and_its_loss_is_a_sum(step_config, backbone):
    def at_once(count, **changes):
        images = jax.ShapeDtypeStruct((count, 16, 16, 3), np.float32)
        return dataclasses.replace(step_config, **changes).images_at_once(backbone, images)

    assert [at_once(count) for count in (3, 4, 6, 8, 12, 30)] == [3, 4, 3, 4, 4, 3]
    assert at_once(13) == 13  # no divisor of at least half of what fits
    assert at_once(12, score_bytes=None) == 12
    pool = tiny_method(host=hosts.L2P(size=4, length=2, top_k=2))
    assert at_once(12, method=pool) == 12


def test_processors_and_several_devices_get_whole_batches(step_config):
    for count in (1, 2):
        config = dataclasses.replace(step_config, score_bytes=None)
        assert config.on(data_mesh(jax.devices()[:count])).score_bytes is None


def test_a_loop_to_a_constant_counts_that_often_and_any_other_once():
    text = """
%bounded (p: (s32[])) -> pred[] {
  %end = s32[]{:T(128)} constant(8)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}
%open (p: (s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %count), direction=LT
}
%inner (p: (s32[])) -> (s32[]) {
  %a = f32[] fusion(%x), backend_config={"estimated_cycles":"10"}
}
%outer (p: (s32[])) -> (s32[]) {
  %b = f32[] fusion(%x), backend_config={"estimated_cycles":"100"}
  %w = (s32[]) while(%t), condition=%bounded, body=%inner
}
ENTRY %main (x: f32[]) -> f32[] {
  %c = f32[] fusion(%x), backend_config={"estimated_cycles":"1000"}
  %w.1 = (s32[]) while(%t), condition=%open, body=%outer
}
"""
    assert tpu.cycles(text) == 1000 + 100 + 8 * 10


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='needs the TPU compiler, libtpu: pip install ".[tpu-compiler]"',
)


def printed(*arguments: str) -> str:
    """Return what Python prints, which has libtpu to itself: that reads its environment once, and
    keeps no compiled programs among those of other tests.
    """
    done = python(*arguments, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_libtpu
def test_slices_have_the_devices_of_a_tpu_vm():
    """Of v4 a device is a whole chip, both of its cores."""
    code = """
from benchmarks import tpu
tpu.use_compiler()
for name, chip in tpu.SLICES.items():
    devices = tpu.devices_of(chip)
    print(name, chip.devices, len(devices), devices[0].num_cores)
"""
    found = {line.split()[0]: line.split()[1:] for line in printed("-c", code).splitlines()}
    assert found.pop("v4-8") == ["4", "4", "2"]
    assert found
    for name, (meant, there, cores) in found.items():
        assert meant == there == name.partition("-")[2]
        assert cores == "1"


@needs_libtpu
def test_a_step_on_four_chips_exchanges_its_gradients_alone_and_once(tmp_path):
    output = tmp_path / "forecast.json"
    of = ("--slices=v5e-4", "--dtypes=bfloat16", "--backbones=vit_ti8_32", "--programs=step_files")
    printed("-m", "benchmarks.tpu", *of, f"--output={output}")
    (found,) = json.loads(output.read_text()).values()
    assert found["cycles"] > 0
    # No weights or images are gathered, and each gradient, a float32, is summed once: some of them
    # in bfloat16, so that their bytes could not tell once from twice.
    assert set(found["collectives"]) == {"all-reduce"}
    assert 1 <= found["collectives"]["all-reduce"]["numbers"] / (found["gradients"] / 4) < 1.1
