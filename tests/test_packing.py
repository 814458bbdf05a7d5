import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from soft_jax import pytrees
from soft_jax.errors import UserError
from soft_jax.evaluation import pictures, report
from soft_jax.experiment import loop
from soft_jax.inference.predictor import Predictor
from soft_jax.methods import masks as masks_lib
from soft_jax.methods.masks import SoftMask
from soft_jax.store import packing
from tests.conftest import TINY, tiny_config


def masks(shape=(24, 71)):
    drawn = 1 + 0.05 * jax.random.normal(jax.random.key(0), shape, jnp.float32)
    return {
        "blocks_2": {
            "attn": {
                "qkv": {"kernel": drawn.at[3].set(1).at[5].multiply(40)},
                "proj": {"kernel": drawn[:, :8]},
            }
        }
    }


@pytest.mark.parametrize(("way", "levels"), [("int8", 127), ("int4", 7)])
def test_a_step_is_a_rows_own(way, levels):
    like = masks()
    back = packing.unpack(packing.pack(like, way, 4), way, like)
    for mask, there in zip(jax.tree.leaves(like), jax.tree.leaves(back), strict=True):
        step = np.abs(np.asarray(mask) - 1).max(axis=1, keepdims=True) / levels
        assert (np.abs(mask - there) <= step / 2 + 1e-6).all()
    np.testing.assert_array_equal(back["blocks_2"]["attn"]["qkv"]["kernel"][3], 1)


@pytest.mark.parametrize("way", ("float32", *packing.KINDS))
def test_ones_are_ones_and_bytes_are_what_they_should_be(way):
    like = {"a": jnp.ones((24, 71), jnp.float32)}
    packed = packing.pack(like, way, 4)
    np.testing.assert_array_equal(packing.unpack(packed, way, like)["a"], 1)
    expected = {
        "float32": 4 * 24 * 71,
        "int8": 24 * 71 + 4 * 24,
        "int4": 24 * 36 + 4 * 24,
        "lowrank": 4 * 4 * (24 + 71),
    }
    assert pytrees.nbytes(packed) == expected[way]


def test_masks_of_low_rank_are_kept_whole():
    rng = np.random.default_rng(0)
    sizes = {"a": (24, 71), "b": (71, 24), "c": (24, 71), "d": (24, 71)}
    like = {
        name: jnp.asarray(1 + rng.normal(size=(rows, 3)) @ rng.normal(size=(3, columns)), "float32")
        for name, (rows, columns) in sizes.items()
    }
    for rank, close in ((3, True), (2, False)):
        back = packing.unpack(packing.pack(like, "lowrank", rank), "lowrank", like)
        for name, mask in like.items():
            assert np.allclose(back[name], mask, atol=1e-4) == close


def test_the_decomposition_is_compiled_once_for_each_shape():
    like = masks() | {"another": masks()}
    program = jax.make_jaxpr(lambda tree: packing.pack(tree, "lowrank", 4))(like)
    assert str(program).count("= svd[") == 2  # of qkv and of proj, each twice


def soft_mask(bits, init_as="uniform"):
    paths = TINY.kernel_paths(("qkv", "proj"), (2, 3))
    return SoftMask(paths, (2, 3), init_as, f"delta{bits}")


def moved(drawn, rng, by=0.08):
    return jax.tree.map(lambda m: m + by * rng.normal(size=m.shape).astype(np.float32), drawn)


def distance(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return np.sqrt(sum(float(((x - y) ** 2).sum()) for x, y in leaves))


@pytest.mark.parametrize(("bits", "lost"), [(1, 0.6028), (2, 0.3448), (4, 0.1074)])
@pytest.mark.parametrize("init_as", ["uniform", "normal"])
def test_a_delta_loses_what_so_many_even_levels_lose(backbone, rng, bits, lost, init_as):
    """Of a normal distribution, that is: Max (1960), Table II, has the squares of these."""
    kind, key = soft_mask(bits, init_as), jax.random.key(5)
    drawn = kind.init(key, backbone)
    trained = moved(drawn, rng)
    packed = jax.jit(kind.pack)(trained, key)
    back = kind.unpack(packed, backbone)
    assert distance(back, trained) / distance(drawn, trained) == pytest.approx(lost, rel=0.03)
    sizes = [leaf.size for leaf in jax.tree.leaves(trained)]
    assert pytrees.nbytes(packed) == 8 + sum(size * bits // 8 + 4 + 16 * 4 for size in sizes)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_mask_that_training_left_alone_is_its_draw(backbone, bits):
    kind, key = soft_mask(bits), jax.random.key(5)
    drawn = kind.init(key, backbone)
    jax.tree.map(np.testing.assert_array_equal, kind.unpack(kind.pack(drawn, key), backbone), drawn)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_delta_of_even_levels_is_kept_whole(rng, bits):
    """Also where the last byte isn't full, and whatever the draw was."""
    step, levels = {1: 1.6, 2: 1, 4: 0.34}[bits], 2**bits
    codes = np.clip(np.floor(rng.normal(size=(45, 7)) / step), -levels / 2, levels / 2 - 1)
    delta = (step * (codes + 0.5)).astype(np.float32)
    drawn = {"a": jnp.asarray(rng.normal(size=delta.shape), jnp.float32)}
    packed = packing.pack_delta({"a": drawn["a"] + delta}, drawn, bits)
    assert packed["a"]["codes"].shape == (-(-315 * bits // 8),)
    back = packing.unpack_delta(packed, drawn, bits)["a"]
    np.testing.assert_allclose(back, drawn["a"] + delta, rtol=0, atol=2e-6)


def test_another_generator_is_named(backbone, rng, monkeypatch):
    """Other random bits, or other floats of the same: an error, not another mask."""
    kind, key = soft_mask(1), jax.random.key(5)
    packed = kind.pack(moved(kind.init(key, backbone), rng), key)
    named = r"mask of blocks_2/attn/proj/kernel is stored as a delta .* jax in the task's manifest"
    with jax.threefry_partitionable(False), pytest.raises(UserError, match=named):
        kind.unpack(packed, backbone)
    monkeypatch.setitem(
        masks_lib.MASK_INITS,
        "uniform",
        lambda key, shape: 1.99 - jax.random.uniform(key, shape, jnp.float32, 0.99, 1),
    )
    with pytest.raises(UserError, match=named):
        kind.unpack(packed, backbone)


def test_a_delta_needs_the_key_of_the_draw(backbone):
    kind = soft_mask(1)
    with pytest.raises(ValueError, match="delta1 are packed with their draw's key"):
        kind.pack(kind.init(jax.random.key(0), backbone))


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize(
    "settings", [{"mask_storage": "delta1"}, {"method": "dualprompt+softnet", "density": 0.7}]
)
def test_a_run_goes_on_with_what_it_stored(settings, digits, tmp_path, monkeypatch):
    """Its figures are those of the stored masks: read again, by the run and by a predictor, they
    are the ones that were evaluated.
    """
    config = tiny_config(
        tasks=2,
        batch_size=10,
        epochs=1,
        eval_batch_size=16,
        prototype_features=40,
        **settings,
    )
    seen = []
    add = loop.TaskBank.add
    monkeypatch.setattr(
        loop.TaskBank,
        "add",
        lambda self, task, adapter, rest: seen.append(adapter) or add(self, task, adapter, rest),
    )
    monkeypatch.setattr(report, "WRITTEN_AFTER", 0.0)
    drawn = []
    monkeypatch.setattr(
        pictures, "draw", lambda root, manifests: drawn.append(len(manifests)) or []
    )
    for _ in range(2):  # the second reads both tasks from the store
        manifests = loop.run(config, tmp_path, Console(quiet=True))
    assert drawn == [1, 2, 2]  # long tasks have pictures before the last is done
    assert len(seen) == 2
    predictor = Predictor.load(tmp_path, task_id="oracle", batch_size=16)
    for task, adapter in enumerate(seen):
        evaluated = predictor.model.method.weights(predictor.model.backbone, adapter)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9),
            predictor.model.weights[task],
            evaluated,
        )
    labels = digits.test.labels
    right = predictor.predict(digits.test.images, labels // 5).classes == labels
    rows = manifests[-1].metrics["oracle/task_given"]
    assert [int(right[labels // 5 == task].sum()) for task in range(2)] == [
        row["correct"] for row in rows
    ]
    stored = json.loads((tmp_path / "tasks/000/manifest/metadata").read_text())
    assert stored["parameters"]["adapter"] == pytrees.count(seen[0])
    assert stored["bytes"]["adapter"] < pytrees.nbytes(seen[0]) / 2
    shutil.rmtree(tmp_path / "tasks/001")  # as a run that was cut off after its first task
    assert loop.run(config, tmp_path, Console(quiet=True))[1].metrics == manifests[1].metrics
