"""What peers' own code computed on given arrays, in float64: Google's L2P, LAMDA-PILOT's
DualPrompt, layers of the published PyTorch code.

`l2p.npz`: google-research/l2p's ViT (its tanh GELU set to the exact one, which the published
PyTorch code has) on `google_vit.npz`'s checkpoint, one batch of one task with batch-wise selection:
loss, its terms and its gradients. `dualprompt_pilot.npz`: LAMDA-PILOT's DualPrompt on the same
checkpoint, loss, terms and gradients for a batch of the second of three tasks, and that batch's
vote and logits in a test; it looks prompts up as the published code does,
`prefix_layout="interleaved"`. `published_layers.npz`: the published LoRA of q and v, the MLP with
adapters, and the binary mask of WSN.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soft_jax import pytrees
from soft_jax.inference import identity
from soft_jax.methods import hosts, low_rank, masks, prompts
from soft_jax.methods.method import Method
from soft_jax.models.transformer import Mlp
from soft_jax.models.vit import ViTConfig
from soft_jax.training import train_step
from tests.conftest import names

pytestmark = pytest.mark.usefixtures("fast_compile")

DATA = Path(__file__).parent / "data"
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
FLAX = {
    "rtol": 1e-6,
    "atol": 1e-7,
}  # Google's model takes the variance in one pass and its softmax in float32


@pytest.fixture(autouse=True)
def _float64():
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
    ):  # flax's LayerNorm promotes float64 with float32
        yield


@pytest.fixture(scope="module")
def layers():
    with np.load(DATA / "published_layers.npz") as file:
        return {key: file[key] for key in file.files}


def their_backbone():
    with np.load(DATA / "google_vit.npz") as file:
        checkpoint = {
            key.removeprefix("checkpoint/"): file[key].astype(float)
            for key in file.files
            if key.startswith("checkpoint/")
        }
    depth = sum(key.endswith("Dense_0/bias") for key in checkpoint)
    vit = ViTConfig(16, 4, 24, depth, 3, 48, dtype="float64")
    return vit, vit.convert(checkpoint)[0]


loss_gradients = jax.jit(jax.grad(train_step.loss_fn, has_aux=True), static_argnums=3)


def test_a_step_of_googles_l2p():
    with np.load(DATA / "l2p.npz") as file:
        theirs = {key: file[key] for key in file.files}
    vit, backbone = their_backbone()
    method = Method(vit, names(6), host=hosts.L2P(size=6, length=2, top_k=3))
    shared = {
        "head": {"kernel": theirs["head_kernel"], "bias": theirs["head_bias"]},
        "pool": {"key": theirs["pool_key"], "prompt": theirs["pool_prompt"]},
    }
    shared = jax.tree.map(jnp.asarray, shared)
    batch = {
        "images": theirs["images"],
        "labels": theirs["labels"],
        "weights": np.ones(len(theirs["labels"])),
        "class_mask": np.arange(6) < 2,
    }
    step_config = train_step.StepConfig(method, learning_rate=0.01)
    grads, terms = loss_gradients({"adapter": {}, "shared": shared}, backbone, batch, step_config)
    np.testing.assert_allclose(terms["query"], theirs["query"], **FLAX)
    for name in ("loss", "cross_entropy", "key_similarity", "logits"):
        np.testing.assert_allclose(terms[name], theirs[name], err_msg=name, **FLAX)
    for ours, name in (
        (("pool", "key"), "pool_key"),
        (("pool", "prompt"), "pool_prompt"),
        (("head", "kernel"), "head_kernel"),
    ):
        np.testing.assert_allclose(
            grads["shared"][ours[0]][ours[1]], theirs[f"grad_{name}"], err_msg=name, **FLAX
        )
        assert np.abs(theirs[f"grad_{name}"]).max() > 1e-3


def test_a_step_of_pilots_dualprompt():
    with np.load(DATA / "dualprompt_pilot.npz") as file:
        theirs = {key: file[key] for key in file.files}
    vit, backbone = their_backbone()
    host = hosts.DualPrompt(
        e_layers=(1, 2), e_length=2, g_layers=(0,), g_length=3, prefix_layout="interleaved"
    )
    method = Method(vit, names(6), host=host)
    adapters = [
        {"key": jnp.asarray(key), "prompt": jnp.asarray(theirs["e_prompt"][:, :, task])}
        for task, key in enumerate(theirs["key"])
    ]
    head = {"kernel": jnp.asarray(theirs["head_kernel"]), "bias": jnp.asarray(theirs["head_bias"])}
    shared = {"head": head, "g_prompt": jnp.asarray(theirs["g_prompt"])}
    task_of_class, count = np.array([0, 0, 1, 1, 2, 2]), len(theirs["labels"])
    batch = {
        "images": theirs["images"],
        "labels": theirs["labels"],
        "weights": np.ones(count),
        "class_mask": task_of_class == 1,
    }
    step_config = train_step.StepConfig(method, learning_rate=0.001, key_loss_weight=0.1)
    grads, terms = loss_gradients(
        {"adapter": adapters[1], "shared": shared}, backbone, batch, step_config
    )
    for name in ("query", "loss", "cross_entropy", "key_similarity", "logits"):
        np.testing.assert_allclose(terms[name], theirs[name], err_msg=name, **CLOSE)
    for ours, name, expected in (
        (grads["adapter"]["prompt"], "e_prompt", theirs["grad_e_prompt"][:, :, 1]),
        (grads["adapter"]["key"], "key", theirs["grad_key"][1]),
        (grads["shared"]["g_prompt"], "g_prompt", theirs["grad_g_prompt"]),
        (grads["shared"]["head"]["kernel"], "head", theirs["grad_head_kernel"]),
        (grads["shared"]["head"]["bias"], "bias", theirs["grad_head_bias"]),
    ):
        np.testing.assert_allclose(ours, expected, err_msg=name, **CLOSE)
        assert np.abs(expected).max() > 1e-3
    voted = np.asarray(prompts.similarity(theirs["query"], theirs["key"])).argmax(axis=1)
    (winner,) = set(identity.majority(voted, np.zeros(count, int), 3).tolist())
    assert {winner} == set(theirs["voted"].flatten().tolist()) != {1}
    sources = method.host.sources(jnp.arange(count), jnp.asarray(count))
    tokens = jax.jit(method.trunk)(backbone, shared, theirs["images"])
    logits = jax.jit(method.logits)(backbone, adapters[winner], shared, tokens, sources)
    np.testing.assert_allclose(logits, theirs["voted_logits"], **CLOSE)


def test_the_published_lora(layers):
    """Its matrices are [rank, in] and [out, rank], those of q and of v one below the other."""
    theirs = {
        key.removeprefix("lora/"): value for key, value in layers.items() if key.startswith("lora/")
    }
    path = "blocks_0/attn/qkv/kernel"
    kind = low_rank.LoRA((path,), (0,), rank=3, parts=(0, 2), fused=(path,))
    backbone = pytrees.unflatten({path: jnp.asarray(theirs["weight"].T)})

    def split(a, b):
        return a.reshape(2, 3, 24).transpose(0, 2, 1), b.reshape(2, 24, 3).transpose(0, 2, 1)

    a, b = split(theirs["a"], theirs["b"])

    def output(a, b):
        own = pytrees.unflatten({f"{path}/a": a, f"{path}/b": b})
        return (
            theirs["x"] @ pytrees.flatten(kind.weights(backbone, own))[path] + theirs["bias"][None]
        )

    np.testing.assert_allclose(output(a, b), theirs["y"], **CLOSE)
    grads = jax.grad(lambda a, b: jnp.sum(output(a, b) * theirs["c"]), (0, 1))(
        jnp.asarray(a), jnp.asarray(b)
    )
    for ours, expected in zip(grads, split(theirs["grad_a"], theirs["grad_b"]), strict=True):
        np.testing.assert_allclose(ours, expected, **CLOSE)


def test_the_published_adapters(layers):
    theirs = {
        key.removeprefix("adapter/"): value
        for key, value in layers.items()
        if key.startswith("adapter/")
    }
    params = {
        name: {"kernel": theirs[f"{name}.weight"].T, "bias": theirs[f"{name}.bias"]}
        for name in ("fc1", "fc2")
    }
    for name in ("adapter1", "adapter2"):
        params[name] = {part: theirs[f"{name}.adapter_{part}_proj"].T for part in ("down", "up")}
    out = Mlp(ViTConfig(16, 4, 24, 1, 3, 48, dtype="float64").layer).apply(
        {"params": params}, theirs["x"]
    )
    np.testing.assert_allclose(out, theirs["y"], **CLOSE)


@pytest.mark.parametrize("percent", [80, 83, 90])
def test_the_published_binary_mask(layers, percent):
    scores, c = jnp.asarray(layers["wsn/scores"]), layers["wsn/c"]
    keep = masks.num_kept(percent / 100, scores.size)

    @jax.jit
    def mask(scores):
        return masks.top_k_mask(jnp.abs(scores), keep)

    np.testing.assert_array_equal(mask(scores), layers[f"wsn/mask_{percent}"])
    grads = jax.grad(lambda s: jnp.sum(mask(s) * c))(scores)
    np.testing.assert_array_equal(grads, layers["wsn/grad"])
