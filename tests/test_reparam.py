"""What each kind of reparametrization does to the weights, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from soft_jax import pytrees
from soft_jax.config import Config
from soft_jax.methods import low_rank, masks, registry
from soft_jax.models.backbones import BACKBONES
from soft_jax.models.transformer import Mlp
from tests.conftest import TINY, soft_masks

pytestmark = pytest.mark.usefixtures("fast_compile")

LAYERS = (2, 3)
PATHS = TINY.kernel_paths(("qkv", "proj"), LAYERS)
QKV, PROJ = "blocks_2/attn/qkv/kernel", "blocks_2/attn/proj/kernel"


@pytest.mark.parametrize(
    ("init_as", "low", "high", "deviation"),
    [
        ("uniform", 0.99, 1, 0.01 / 12**0.5),
        ("ones", 1, 1, 0),
        ("xavier", -((6 / 96) ** 0.5), (6 / 96) ** 0.5, (2 / 96) ** 0.5),  # in 24, out 72
        ("kaiming", -(24**-0.5), 24**-0.5, (3 * 24) ** -0.5),
        ("normal", -0.06, 0.06, 0.01),
    ],
)
def test_masks_are_drawn_as_the_ablation_says(backbone, init_as, low, high, deviation):
    mask = pytrees.flatten(soft_masks(init_as).init(jax.random.key(0), backbone))[QKV]
    assert low <= mask.min() <= mask.max() <= high
    assert mask.std() == pytest.approx(deviation, rel=0.05, abs=1e-7)
    assert mask.dtype == jnp.float32


@pytest.mark.parametrize("keep", [0.8, 0.83, 0.9, 1.0])
def test_a_binary_mask_keeps_exactly_its_share(backbone, keep):
    kind = masks.BinaryMask(PATHS, LAYERS, keep)
    own = kind.init(jax.random.key(0), backbone)
    # Ties at the threshold are common in float32; here they are the rule.
    own = {"scores": jax.tree.map(lambda s: jnp.round(s, 1), own["scores"])}
    for path, mask in pytrees.flatten(kind.masks(own)).items():
        assert set(np.unique(mask)) <= {0.0, 1.0}
        assert mask.sum() == round(keep * mask.size), path
        scores = np.abs(pytrees.flatten(own["scores"])[path])
        assert scores[mask == 1].min() >= scores[mask == 0].max(initial=0)


@pytest.mark.parametrize("scores", ["drawn", "rounded", "equal"])
@pytest.mark.parametrize("keep", [1, 37, 99, 120])
def test_the_highest_are_those_that_sorting_finds(rng, scores, keep):
    """Of equal ones the first, in row-major order; negative ones too, which a mask never has."""
    values = {
        "drawn": rng.normal(size=(10, 12)),
        "rounded": np.round(rng.normal(size=(10, 12)), 1) + 0.0,
        "equal": np.ones((10, 12)),
    }[scores]
    values = values.astype(np.float32)
    expected = np.zeros(120, np.float32)
    expected[np.argsort(-values.reshape(-1), kind="stable")[:keep]] = 1
    np.testing.assert_array_equal(masks.top_k_mask(values, keep), expected.reshape(10, 12))


def test_a_masks_cost_grows_with_its_size():
    """As XLA counts operations, by which a run reports what a step costs: a sum of all that are
    before each entry would be its square.
    """
    counted = [
        jax.jit(masks.top_k_mask, static_argnums=1)
        .lower(np.ones(size, np.float32), size // 2)
        .cost_analysis()["flops"]
        for size in (1000, 8000)
    ]
    assert counted[1] < 10 * counted[0]


def test_scores_get_the_gradient_of_the_mask(backbone, rng):
    """Straight through to |s|: d/ds Σ c ⊙ θ ⊙ top(|s|) = c ⊙ θ ⊙ sign(s), for kept and dropped
    weights alike.
    """
    kind = masks.BinaryMask((PROJ,), (2,), 0.5)
    own = kind.init(jax.random.key(0), backbone)
    theta, c = pytrees.flatten(backbone)[PROJ], rng.normal(size=(24, 24)).astype(np.float32)
    grads = jax.grad(lambda own: jnp.sum(c * pytrees.flatten(kind.weights(backbone, own))[PROJ]))(
        own
    )
    signs = np.sign(pytrees.flatten(own["scores"])[PROJ])
    np.testing.assert_allclose(pytrees.flatten(grads["scores"])[PROJ], c * theta * signs, rtol=1e-6)


def test_softnet_keeps_the_rest_as_small_fixed_values(backbone):
    hard, soft = (
        masks.BinaryMask(PATHS, LAYERS, 0.7),
        masks.BinaryMask(PATHS, LAYERS, 0.7, soft=True),
    )
    own = soft.init(jax.random.key(0), backbone)
    made = (jax.jit(hard.masks)(own), jax.jit(soft.masks)(own), own["minor"])
    binary, both, minor = map(pytrees.flatten, made)
    for path, mask in both.items():
        np.testing.assert_array_equal(mask[binary[path] == 1], 1)
        np.testing.assert_array_equal(mask[binary[path] == 0], minor[path][binary[path] == 0])
        assert 0 < minor[path].max() < 1e-4  # σ(-10) at most
    grads = jax.jit(
        jax.grad(lambda own: sum(jnp.sum(w) for w in jax.tree.leaves(soft.weights(backbone, own))))
    )(own)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads["minor"]))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(grads["scores"]))


@pytest.mark.parametrize(("keep", "soft"), [(0.7, False), (0.7, True), (1.0, True)])
def test_a_binary_mask_is_stored_as_bits(backbone, rng, keep, soft):
    """The masks of what is read again are those that were stored, to the bit; so are they when
    it is stored once more.
    """
    kind = masks.BinaryMask(PATHS, LAYERS, keep, soft)
    own = kind.init(jax.random.key(0), backbone)
    packed = jax.jit(kind.pack)(own)
    back = kind.unpack(packed, backbone)
    assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, own)
    made = jax.jit(kind.masks)
    jax.tree.map(np.testing.assert_array_equal, made(back), made(own))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(kind.pack)(back), packed)
    sizes = [leaf.size for leaf in jax.tree.leaves(own["scores"])]
    assert pytrees.nbytes(packed) == sum(
        size // 8 + (4 * (size - round(keep * size)) if soft else 0) for size in sizes
    )


@pytest.mark.parametrize("parts", [(0, 1, 2), (0, 2)])
def test_lora_equals_the_merged_weight(backbone, rng, parts):
    """x W + 8 (x A) B, for q, k and v apart."""
    kind = low_rank.LoRA(PATHS, LAYERS, rank=3, parts=parts, fused=PATHS[::2])
    assert set(kind.fused) == {path for path in PATHS if path.endswith("qkv/kernel")}
    own = kind.init(jax.random.key(0), backbone)
    jax.tree.map(
        np.testing.assert_array_equal, kind.weights(backbone, own), pytrees.select(backbone, PATHS)
    )  # as drawn: the backbone
    own = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), own)
    flat, merged, theta = (pytrees.flatten(t) for t in (own, kind.weights(backbone, own), backbone))
    x = rng.normal(size=(5, 24)).astype(np.float32)
    np.testing.assert_allclose(
        x @ merged[PROJ],
        x @ theta[PROJ] + 8 * (x @ flat[f"{PROJ}/a"][0]) @ flat[f"{PROJ}/b"][0],
        rtol=1e-3,
        atol=1e-3,
    )
    for part in range(3):
        columns = slice(24 * part, 24 * part + 24)
        expected = x @ theta[QKV][:, columns]
        if part in parts:
            index = parts.index(part)
            expected += 8 * (x @ flat[f"{QKV}/a"][index]) @ flat[f"{QKV}/b"][index]
        np.testing.assert_allclose(x @ merged[QKV][:, columns], expected, rtol=1e-3, atol=1e-3)


def test_parameter_counts_are_the_papers():
    """Table 7, ViT-B, in millions: r = 4, 24 and 500 of LoRA in three layers, r = 1, 4 and 75 of
    the adapter in all twelve.
    """
    vit = BACKBONES["vit_b16"].architecture
    images = jnp.zeros((1, 224, 224, 3))
    params = jax.eval_shape(vit.module().init, jax.random.key(0), images)["params"]

    def millions(method, layers, **settings):
        config = Config(method=method, mask_layers=layers, **settings)
        kind = registry.make_method(config, vit, ("",)).reparametrization
        return pytrees.count(jax.eval_shape(kind.init, jax.random.key(0), params)) / 1e6

    def lora(rank):
        return millions("lora", (10, 11, 12), target_modules="qv+proj", rank=rank)

    def adapter(rank):
        return millions("adapter", tuple(range(1, 13)), rank=rank)

    assert [round(lora(rank), 2) for rank in (4, 24)] == [0.06, 0.33]  # 331,776; printed as 0.32
    assert lora(500) == pytest.approx(6.91, abs=0.005)
    assert [round(adapter(rank), 2) for rank in (1, 75)] == [0.09, 6.91]
    assert adapter(4) == pytest.approx(0.36, abs=0.01)
    assert millions("softtf", (12,), target_modules="qkv") == pytest.approx(1.77, abs=0.005)


def test_a_bottleneck_is_the_published_residual(backbone, rng):
    """As drawn, the backbone to the bit; else x + up(GELU(down x)) behind fc1 and behind fc2,
    and nowhere else.
    """
    places = tuple(tuple(TINY.bottleneck_widths(layer).items()) for layer in (1, 3))
    kind = low_rank.Bottleneck((1, 3), places, rank=2)
    images = rng.random((2, 16, 16, 3), np.float32)
    own = kind.init(jax.random.key(0), backbone)
    features = jax.jit(TINY.features)
    plain = features(backbone, images)
    as_drawn = pytrees.merge(backbone, kind.weights(backbone, own))
    np.testing.assert_array_equal(features(as_drawn, images), plain)
    own = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), own)
    params = pytrees.merge(backbone, kind.weights(backbone, own))
    x = rng.normal(size=(1, 5, 24)).astype(np.float32)
    mlp = {"params": params["blocks_1"]["mlp"]}

    def dense(name, x):
        return x @ mlp["params"][name]["kernel"] + mlp["params"][name]["bias"][None, None]

    def residual(name, x):
        weights = mlp["params"][name]
        return x + jax.nn.gelu(x @ weights["down"], approximate=False) @ weights["up"]

    hidden = residual("adapter1", dense("fc1", x))
    expected = residual("adapter2", dense("fc2", jax.nn.gelu(hidden, approximate=False)))
    np.testing.assert_allclose(Mlp(TINY.layer).apply(mlp, x), expected, rtol=1e-4, atol=1e-3)
    touched = {
        path.split("/")[0]
        for path in traverse_util.flatten_dict(kind.weights(backbone, own), sep="/")
    }
    assert touched == {"blocks_1", "blocks_3"}
    assert np.abs(features(params, images) - plain).max() > 0.01
