"""Backbones by a timm name and a file: sizes, pixels, and what is refused."""

import contextlib
import json
import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from soft_jax import pytrees
from soft_jax.errors import UserError
from soft_jax.models import backbones, timm_config
from soft_jax.models.protocol import Preprocessing
from soft_jax.models.vit import ViTConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def timm_arrays(grid=10, dim=64, depth=6, mlp=192, patch=16, positions=None):
    """Return random float32 arrays in timm's naming; by default of its test_vit (160 pixels)."""
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, positions or 1 + grid**2, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "head.weight": (5, dim),
        "head.bias": (5,),
    }
    for i in range(depth):
        layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        layers |= {"mlp.fc1": (mlp, dim), "mlp.fc2": (dim, mlp)}
        layers |= {"norm1": (dim,), "norm2": (dim,)}
        for name, shape in layers.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    rng = np.random.default_rng(0)
    return {k: rng.normal(0, 0.1, shape).astype(np.float32) for k, shape in shapes.items()}


def hub_config(architecture="test_vit", model_args=None, **pretrained):
    """Return a config.json in the layout that timm writes for the Hugging Face Hub."""
    fields = {
        "tag": "r160_in1k",
        "custom_load": False,
        "input_size": [3, 160, 160],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": list(MEAN),
        "std": list(STD),
        "num_classes": 5,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {
        "architecture": architecture,
        "num_classes": 5,
        "num_features": 64,
        "global_pool": "token",
        "pretrained_cfg": fields | pretrained,
    }
    return config | ({"model_args": model_args} if model_args else {})


def write(folder, arrays, config=None):
    """Write a snapshot as the Hub has it; return the path of its folder."""
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()},
        folder / "model.safetensors",
    )
    if config is not None:
        (folder / "config.json").write_text(
            config if isinstance(config, str) else json.dumps(config)
        )
    return str(folder)


@contextlib.contextmanager
def refused(match):
    with pytest.raises(UserError, match=match) as raised:
        yield
    assert "\n" not in str(raised.value)


# By name and file.


@pytest.mark.parametrize("form", ["folder", "safetensors", "npz"])
def test_a_timm_vit_by_its_name_and_file(tmp_path, form):
    """Its sizes are the file's, its pixels are normalized as its config.json says."""
    arrays = timm_arrays()
    path = write(tmp_path / "snapshot", arrays, hub_config())
    if form == "safetensors":
        path += "/model.safetensors"
    if form == "npz":
        path += "/any.npz"
        np.savez(path, **arrays)
    found = backbones.load("test_vit", path)
    plain = ViTConfig(160, 16, 64, 6, 2, 192)
    assert found.architecture == ViTConfig(
        *(160, 16, 64, 6, 2, 192), preprocessing=Preprocessing(MEAN, STD)
    )
    assert found.left_out == ("head.bias", "head.weight")
    assert found.notes == ()
    params, _ = plain.convert(arrays)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_its_pixels_are_normalized(tmp_path):
    """Its features are those of a plain ViT on normalized images."""
    found = backbones.load("test_vit", write(tmp_path / "it", timm_arrays(), hub_config()))
    plain = ViTConfig(160, 16, 64, 6, 2, 192)
    images = np.random.default_rng(1).random((2, 160, 160, 3)).astype(np.float32)
    normalized = (images - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    np.testing.assert_allclose(
        jax.jit(found.architecture.features)(found.params, images),
        jax.jit(plain.features)(found.params, normalized),
        atol=1e-5,
    )


def test_the_bundled_backbone_by_a_timm_name_is_the_same(tmp_path):
    """Where its pixels are not normalized, all that depends on it is equal to the bit."""
    bundled = backbones.load("vit_ti8_32")
    config = hub_config("vit_tiny_patch8_32", mean=[0, 0, 0], std=[1, 1, 1], input_size=[3, 32, 32])
    path = write(tmp_path / "it", dict(np.load(backbones.locate("vit_ti8_32"))), config)
    found = backbones.load("vit_tiny_patch8_32", path)
    assert found.architecture == bundled.architecture
    jax.tree.map(np.testing.assert_array_equal, found.params, bundled.params)


@pytest.mark.parametrize(
    ("name", "dim", "depth", "heads"),
    [
        ("vit_tiny_patch16_224", 192, 12, 3),
        ("vit_small_patch32_384", 384, 12, 6),
        ("vit_base_patch8_224", 768, 12, 12),
        ("vit_base_patch16_224_miil", 768, 12, 12),
        ("vit_large_patch14_224", 1024, 24, 16),
        ("vit_huge_patch14_224", 1280, 32, 16),
        ("vit_giant_patch14_224", 1408, 40, 16),
        ("vit_gigantic_patch14_224", 1664, 48, 16),
        ("deit_small_patch16_224", 384, 12, 6),
        ("flexivit_large", 1024, 24, 16),
        ("test_vit", 64, 6, 2),
    ],
)
def test_heads_are_those_of_timms_sizes(name, dim, depth, heads):
    """As registered in timm's vision_transformer.py and deit.py."""
    named = timm_config._read_name(name)
    assert (named.dim, named.depth, named.heads) == (dim, depth, heads)
    assert timm_config.is_known(f"{name}.some_tag")


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_clip_224",  # norm_pre, another epsilon
        "vit_base_patch16_clip_quickgelu_224",
        "vit_base_patch16_gap_224",  # 16 heads, no [class] token
        "deit3_small_patch16_224",
        "vit_base_patch16_siglip_224",
        "vit_medium_patch16_gap_256",
    ],
)
def test_other_models_are_not_taken_for_plain_ones(name):
    assert not timm_config.is_known(name)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", (0.5,) * 3, (0.5,) * 3),
        ("vit_base_patch16_224.augreg2_in21k_ft_in1k", (0.5,) * 3, (0.5,) * 3),
        ("vit_base_patch16_224.orig_in21k", (0.5,) * 3, (0.5,) * 3),
        ("vit_base_patch32_224.sam_in1k", (0.5,) * 3, (0.5,) * 3),
        ("flexivit_base.1000ep_in21k", (0.5,) * 3, (0.5,) * 3),
        ("vit_base_patch16_224.dino", MEAN, STD),
        ("vit_large_patch16_224.mae", MEAN, STD),
        ("deit_tiny_patch16_224.fb_in1k", MEAN, STD),
        ("vit_base_patch16_224_miil.in21k", (0.0,) * 3, (1.0,) * 3),
    ],
)
def test_pixels_without_a_config_are_those_of_timms_tag(name, mean, std):
    assert timm_config._preprocessing_by_tag(name) == Preprocessing(mean, std)


def test_a_tag_stands_in_for_config_json(tmp_path):
    path = write(tmp_path / "bare", timm_arrays())
    found = backbones.load("test_vit.r160_in1k", path)
    assert found.architecture.preprocessing == Preprocessing((0.5,) * 3, (0.5,) * 3)
    with refused("mean and std.* are missing: put its config.json beside the file, or add"):
        backbones.load("test_vit", path)
    with refused("mean and std.* are missing"):
        backbones.load("test_vit.my_own", path)


def test_the_old_layout_of_config_json(tmp_path):
    config = hub_config()
    old = config.pop("pretrained_cfg") | config
    found = backbones.load("test_vit", write(tmp_path / "old", timm_arrays(), old))
    assert found.architecture.preprocessing == Preprocessing(MEAN, STD)


def test_a_file_of_another_image_size_keeps_it(tmp_path):
    """384-pixel files at their own size, unless image_size says another."""
    arrays = timm_arrays(grid=24)
    path = write(tmp_path / "384", arrays, hub_config(input_size=[3, 384, 384]))
    found = backbones.load("test_vit", path)
    assert found.architecture.image_size == 384
    np.testing.assert_array_equal(found.params["pos_embed"], arrays["pos_embed"])
    smaller = backbones.load("test_vit", path, image_size=160)
    assert smaller.architecture.image_size == 160
    assert smaller.params["pos_embed"].shape == (1, 101, 64)
    with refused("image_size: image_size 100 is not a multiple"):
        backbones.load("test_vit", path, image_size=100)
    # A config.json or name that says another size than the arrays.
    for config in (hub_config(), hub_config(input_size=None, model_args={"img_size": 224})):
        path = write(tmp_path / "384", arrays, config)
        with refused("images of 384 pixels, its name or config.json says (160|224); choose one"):
            backbones.load("test_vit", path)
        assert backbones.load("test_vit", path, image_size=384).architecture.image_size == 384


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(tmp_path, kind):
    arrays = {k: v.astype(jnp.dtype(kind)) for k, v in timm_arrays().items()}
    found = backbones.load("test_vit", write(tmp_path / kind, arrays, hub_config()))
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype("float32")}
    np.testing.assert_array_equal(
        found.params["blocks_5"]["mlp"]["fc2"]["kernel"],
        arrays["blocks.5.mlp.fc2.weight"].astype(np.float32).T,
    )


def test_models_without_a_position_or_biases(tmp_path):
    """timm's no_embed_class and qkv_bias=False: the same as zeros in their places."""
    arrays = timm_arrays()
    zeros = {k: np.zeros_like(v) if k.endswith("qkv.bias") else v for k, v in arrays.items()}
    zeros["pos_embed"][:, 0] = 0
    less = {k: v for k, v in zeros.items() if not k.endswith("qkv.bias")}
    less["pos_embed"] = zeros["pos_embed"][:, 1:]
    whole, without = (
        backbones.load("test_vit", write(tmp_path / "it", each, hub_config())).params
        for each in (zeros, less)
    )
    jax.tree.map(np.testing.assert_array_equal, whole, without)


def test_googles_arrays_by_a_timm_name(tmp_path):
    """timm's augreg checkpoints are such files: the arrays show the heads."""
    arrays = timm_arrays()
    vit = ViTConfig(160, 16, 64, 6, 2, 192)
    google = to_google(vit.convert(arrays)[0], vit)
    np.savez(tmp_path / "google.npz", **google)
    path = str(tmp_path / "google.npz")
    found = backbones.load("test_vit.r160_in1k", path)
    assert found.architecture.heads == 2
    jax.tree.map(np.testing.assert_array_equal, found.params, vit.convert(arrays)[0])
    # Others than the name says.
    other = to_google(vit.convert(arrays)[0], ViTConfig(160, 16, 64, 6, 4, 192))
    np.savez(path, **other)
    with refused("num_heads is 2, expected 4"):
        backbones.load("test_vit.r160_in1k", path)
    np.savez(path, **google | {"Transformer/encoder_norm/bias": np.zeros(7, np.float32)})
    with refused(r"'Transformer/encoder_norm/bias' is \(7,\), expected \(64,\)"):
        backbones.load("test_vit.r160_in1k", path)
    for missing in ("embedding/kernel", "Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias"):
        np.savez(path, **{k: v for k, v in google.items() if k != missing})
        with refused(f"array '{missing.replace('_3', '_0')}' is missing"):
            backbones.load("test_vit.r160_in1k", path)


def to_google(params, vit):
    flat, d, heads = pytrees.flatten(params), vit.dim, (vit.heads, vit.head_dim)
    arrays = {
        "cls": flat["cls_token"],
        "Transformer/posembed_input/pos_embedding": flat["pos_embed"],
        "embedding/kernel": flat["patch_embed/kernel"],
        "embedding/bias": flat["patch_embed/bias"],
        "Transformer/encoder_norm/scale": flat["norm/scale"],
        "Transformer/encoder_norm/bias": flat["norm/bias"],
        "pre_logits/kernel": np.ones((3, 3), np.float32),
    }
    for i in range(vit.depth):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks_{i}"
        for norm, index in (("norm1", 0), ("norm2", 2)):
            for leaf in ("scale", "bias"):
                arrays[f"{theirs}/LayerNorm_{index}/{leaf}"] = flat[f"{ours}/{norm}/{leaf}"]
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for j, part in enumerate(("query", "key", "value")):
            columns = slice(j * d, (j + 1) * d)
            kernel = flat[f"{ours}/attn/qkv/kernel"][:, columns]
            arrays[f"{attention}/{part}/kernel"] = kernel.reshape(d, *heads)
            bias = flat[f"{ours}/attn/qkv/bias"][columns]
            arrays[f"{attention}/{part}/bias"] = bias.reshape(heads)
        kernel = flat[f"{ours}/attn/proj/kernel"]
        arrays[f"{attention}/out/kernel"] = kernel.reshape(*heads, d)
        arrays[f"{attention}/out/bias"] = flat[f"{ours}/attn/proj/bias"]
        for j in (0, 1):
            for leaf in ("kernel", "bias"):
                arrays[f"{theirs}/MlpBlock_3/Dense_{j}/{leaf}"] = flat[
                    f"{ours}/mlp/fc{j + 1}/{leaf}"
                ]
    return arrays


def test_what_no_array_shows_is_part_of_the_fingerprint(tmp_path):
    """A run is not continued with other pixels or heads on the same file."""
    arrays = timm_arrays()
    configs = [
        hub_config(),
        hub_config(mean=[0, 0, 0]),
        hub_config(std=[1.0, 1.0, 1.0]),
        hub_config(model_args={"num_heads": 4}),
    ]
    paths = [write(tmp_path / f"{i}", arrays, config) for i, config in enumerate(configs)]
    assert len({backbones.load("test_vit", path).fingerprint for path in paths}) == 4
    # What changes nothing is not.
    again = write(tmp_path / "again", arrays, hub_config(crop_pct=1.0, num_classes=7))
    assert (
        backbones.load("test_vit", again).fingerprint
        == backbones.load("test_vit", paths[0]).fingerprint
    )


def test_what_is_not_followed_is_said(tmp_path):
    arrays = timm_arrays()
    path = write(tmp_path / "it", arrays, hub_config(crop_pct=0.95, interpolation="bilinear"))
    (note,) = backbones.load("test_vit", path).notes
    assert note.startswith("its config.json evaluates with crop_pct 0.95 and bilinear resizing")


def test_a_listed_backbone_says_that_config_json_is_not_followed(tmp_path):
    """It gets pixels in [0, 1], as published, whatever stands beside its file."""
    bundled = backbones.load("vit_ti8_32")
    arrays = dict(np.load(backbones.locate("vit_ti8_32")))
    path = write(tmp_path / "it", arrays, hub_config("vit_tiny_patch8_32"))
    found = backbones.load("vit_ti8_32", path + "/model.safetensors")
    assert found.architecture == bundled.architecture
    (note,) = found.notes
    assert "name it vit_tiny_patch8_32 to follow its config.json" in note
    assert bundled.notes == ()


# What is refused.


@pytest.mark.parametrize(
    ("array", "meaning"),
    [
        ("blocks.3.ls1.gamma", "layer scale"),
        ("blocks.0.gamma_2", "layer scale"),
        ("reg_token", "register tokens"),
        ("dist_token", "a distillation token"),
        ("norm_pre.weight", "a norm before the first layer"),
        ("blocks.1.attn.q_norm.weight", "a norm of queries and keys"),
        ("blocks.1.attn.k_norm.bias", "a norm of queries and keys"),
        ("fc_norm.weight", "a norm behind average pooling"),
        ("attn_pool.latent", "pooling by attention"),
        ("blocks.0.attn.relative_position_bias_table", "relative positions"),
        ("blocks.0.attn.rel_pos.mlp.fc1.weight", "relative positions"),
        ("patch_embed.norm.weight", "a norm of the patches"),
        ("patch_embed.backbone.stem.conv.weight", "convolutions before the patches"),
        ("blocks.0.attn.norm.weight", "a norm inside attention or MLP"),
        ("blocks.0.mlp.fc1_g.weight", "a gated MLP"),
        ("blocks.0.attn.q_bias", "has no place in this ViT"),
    ],
)
def test_arrays_that_change_the_features_are_refused(tmp_path, array, meaning):
    path = write(tmp_path / "it", timm_arrays() | {array: np.ones(64, np.float32)}, hub_config())
    with refused(rf"array '{array}' (is )?{meaning}"):
        backbones.load("test_vit", path)


@pytest.mark.parametrize("array", ["head_dist.weight", "pre_logits.fc.weight"])
def test_the_classifier_alone_is_left_out(tmp_path, array):
    path = write(tmp_path / "it", timm_arrays() | {array: np.ones(64, np.float32)}, hub_config())
    assert array in backbones.load("test_vit", path).left_out


BAD = {
    "nan": (np.full(64, np.nan, np.float32), "NaN or infinite"),
    "infinite": (np.full(64, -np.inf, np.float16), "NaN or infinite"),
    "beyond float32": (np.full(64, 1e300), "NaN or infinite"),
    "complex": (np.ones(64, np.complex64), "type complex64, expected float32"),
    "integers": (np.ones(64, np.int32), "type int32, expected float32"),
    "strings": (np.full(64, "1.0"), "type <U3, expected float32"),
    "structured": (np.zeros(64, [("a", np.float32)]), r"type \[\('a', '<f4'\)\], expected"),
    "objects": (np.full(64, 1.0, object), "holds Python objects, expected floats"),
    "empty": (np.zeros((0, 64), np.float32), r"is empty: its shape is \(0, 64\)"),
    "raw bytes": (np.ones(64, jnp.bfloat16), r"type \|V2, expected"),  # np.save knows no bfloat16
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "by timm name"])
def test_arrays_of_no_numbers_are_refused_by_name(tmp_path, case, listed):
    bad, message = BAD[case]
    name = "vit_ti8_32" if listed else "test_vit.r160_in1k"
    arrays = dict(np.load(backbones.locate("vit_ti8_32"))) if listed else timm_arrays()
    np.savez(tmp_path / "bad.npz", **arrays | {"norm.bias": bad})
    with refused(f"array 'norm.bias' (is of the )?.*{message}"):
        backbones.load(name, str(tmp_path / "bad.npz"))


def test_unknown_types_and_complex_numbers_of_safetensors(tmp_path):
    """safetensors has more types than numpy: they are named too."""
    path = write(tmp_path / "it", timm_arrays(), hub_config())
    file = tmp_path / "it/model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    for kind, expected in (("F8_E4M3", "type F8_E4M3"), ("C64", "type complex64")):
        width = {"F8_E4M3": 1, "C64": 8}[kind]
        header["norm.bias"] |= {"dtype": kind, "shape": [64 * 4 // width]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
        with refused(f"array 'norm.bias' is of the {expected}, expected"):
            backbones.load("test_vit", path)


@pytest.mark.parametrize(
    ("array", "shape", "expected"),
    [
        ("blocks.2.mlp.fc1.bias", (7,), r"\(192,\)"),
        ("blocks.2.attn.qkv.weight", (64, 192), r"\(192, 64\)"),
        ("patch_embed.proj.weight", (64, 768), r"\(dim, 3, patch, patch\)"),
        ("cls_token", (64,), r"\(1, 1, 64\)"),
        ("pos_embed", (101, 64), r"\(1, 1 \+ patches, dim\)"),
        ("pos_embed", (1, 103, 64), "those of a .class. token and of a square of patches"),
        ("pos_embed", (2, 101, 64), r"\(1, 101, 64\)"),
    ],
)
def test_wrong_and_missing_arrays_are_named(tmp_path, array, shape, expected):
    arrays = timm_arrays()
    bad = arrays | {array: np.zeros(shape, np.float32)}
    with refused(rf"array '{array}' .*expected {expected}"):
        backbones.load("test_vit", write(tmp_path / "it", bad, hub_config()))
    del arrays[array]
    with refused(f"array '{array}' is missing"):
        backbones.load("test_vit", write(tmp_path / "it", arrays, hub_config()))


def test_one_missing_bias_is_damage(tmp_path):
    """Only a model without any query, key and value biases is meant to have none."""
    arrays = timm_arrays()
    del arrays["blocks.2.attn.qkv.bias"]
    with refused("array 'blocks.2.attn.qkv.bias' is missing"):
        backbones.load("test_vit", write(tmp_path / "it", arrays, hub_config()))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 96}, "arrays are of embed_dim 96, expected 64"),
        ({"depth": 5}, "arrays are of depth 5, expected 6"),
        ({"patch": 8}, "arrays are of patch_size 8, expected 16"),
    ],
)
def test_a_name_of_another_model_is_refused(tmp_path, sizes, message):
    """Else its heads would be wrong, or layers missing, and nobody would notice."""
    arrays = timm_arrays(**sizes)
    with refused(message):
        backbones.load("test_vit", write(tmp_path / "it", arrays, hub_config()))


def test_names_that_timm_does_not_know_need_their_heads_in_config_json(tmp_path):
    arrays = timm_arrays(dim=48, mlp=100, depth=2)
    with refused("'vit_mine' is unknown.*num_heads of others has to stand in model_args"):
        backbones.load("vit_mine", write(tmp_path / "it", arrays))
    with refused("num_heads is missing"):
        backbones.load("vit_mine", write(tmp_path / "it", arrays, hub_config("vit_mine")))
    path = write(tmp_path / "it", arrays, hub_config("vit_mine", {"num_heads": 3}))
    found = backbones.load("vit_mine", path).architecture
    assert (found.heads, found.dim, found.depth, found.mlp_dim) == (3, 48, 2, 100)
    for heads, message in (
        (5, "dim 48 is not a multiple of heads 5"),
        ("3", "num_heads is '3', expected a number above 0"),
        (-3, "num_heads is -3, expected a number above 0"),
    ):
        path = write(tmp_path / "it", arrays, hub_config("vit_mine", {"num_heads": heads}))
        with refused(message):
            backbones.load("vit_mine", path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", r"config.json is not timm's .*: it holds \[\], expected an object"),
        ("null", "it holds None, expected an object"),
        ("5", "it holds 5, expected an object"),
        ("{", "config.json is not timm's"),
        ("[" * 10_000, "it/config.json is not timm's .*recursion"),
        ("{}", "architecture is missing"),
        ({"architecture": 3}, "architecture is missing"),
        ({"architecture": "test_vit"}, "mean is missing"),
        (hub_config() | {"pretrained_cfg": []}, r"pretrained_cfg is \[\], expected an object"),
        (hub_config(std=None), "std is missing"),
        (hub_config(mean=[0.5, 0.5]), r"mean is \[0.5, 0.5\], expected three numbers"),
        (hub_config(mean="0.5"), "mean is '0.5', expected three numbers"),
        (hub_config(mean=[float("nan")] * 3), r"mean is \[nan.*, expected three numbers"),
        (hub_config(std=[1, 0, 1]), r"std is \[1, 0, 1\], expected three numbers above 0"),
        (hub_config(input_size=[1, 160, 160]), r"input_size is .*expected \[3, size, size\]"),
        (hub_config(crop_pct="all"), "crop_pct is 'all', expected a number"),
        (hub_config("vit_tiny_patch16_224"), "of 'vit_tiny_patch16_224', not of 'test_vit'"),
        (hub_config() | {"global_pool": "avg"}, "says global_pool 'avg'"),
        (hub_config(model_args={"act_layer": "quick_gelu"}), "says act_layer 'quick_gelu'"),
        (hub_config(model_args={"norm_layer": "rmsnorm"}), "says norm_layer 'rmsnorm'"),
        (hub_config(model_args={"global_pool": "map"}), "says global_pool 'map'"),
        (hub_config(model_args={"in_chans": 1}), "says in_chans 1"),
        (hub_config(model_args={"new_in_timm": 1}), "says new_in_timm 1"),
        (hub_config(model_args={"depth": 7}), "arrays are of depth 6, expected 7"),
    ],
)
def test_config_json_is_followed_or_refused(tmp_path, config, message):
    with refused(message):
        backbones.load("test_vit", write(tmp_path / "it", timm_arrays(), config))


@pytest.mark.parametrize("name", ["test_vit", "vit_ti8_32"])
def test_a_config_json_that_can_not_be_read_is_named(tmp_path, name):
    arrays = timm_arrays() if name == "test_vit" else dict(np.load(backbones.locate(name)))
    path = write(tmp_path / "it", arrays, "[" * 10_000) + "/model.safetensors"
    with refused("it/config.json is .*recursion"):
        backbones.load(name, path)
    (tmp_path / "it/config.json").unlink()
    os.mkfifo(tmp_path / "it/config.json")  # it is not waited for
    with refused("it/config.json can't be read .*named pipe"):
        backbones.load(name, path)


def test_a_config_of_a_clip_that_is_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("[" * 10_000)
    source = backbones.BACKBONES["clip_vit_b16"]
    with refused("open_clip_config.json, or .* is damaged: it is nested too deeply"):
        backbones._notes(source, tmp_path / "model.safetensors", {})


def test_a_tag_that_config_json_does_not_have_is_refused(tmp_path):
    path = write(tmp_path / "it", timm_arrays(), hub_config())
    assert backbones.load("test_vit.r160_in1k", path).architecture.heads == 2
    with refused("its config.json is of the tag 'r160_in1k', not of 'dino'"):
        backbones.load("test_vit.dino", path)


def test_arguments_of_training_alone_are_no_matter(tmp_path):
    arguments = {"drop_path_rate": 0.1, "img_size": [160, 160], "num_classes": 5, "depth": 6}
    arguments |= {"act_layer": "gelu", "mlp_ratio": 3, "norm_layer": None}
    path = write(tmp_path / "it", timm_arrays(), hub_config(model_args=arguments))
    assert backbones.load("test_vit", path).architecture.depth == 6


def test_pytorch_pickles_are_named_as_such(tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    message = r"pytorch_model.bin is a PyTorch pickle.*take model.safetensors"
    with refused(message):
        backbones.load("test_vit", str(folder))
    with refused(message):
        backbones.load("vit_b16", str(folder / "pytorch_model.bin"))
    # By their content too: an old one is a pickle, a new one a zip archive as .npz is.
    (folder / "old.npz").write_bytes(b"\x80\x02\x8a")
    with zipfile.ZipFile(folder / "new.npz", "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02")
    for name in ("old.npz", "new.npz"):
        with refused(f"{name} is a PyTorch pickle"):
            backbones.load("test_vit", str(folder / name))


def test_no_safetensors_are_taken_for_a_pickle(tmp_path):
    """They begin with the length of their header, whose first byte may be that of a pickle."""
    path = write(tmp_path / "it", timm_arrays(), hub_config())
    file = tmp_path / "it/model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    longer = size + (0x80 - size) % 256
    header = whole[8 : 8 + size] + b" " * (longer - size)
    file.write_bytes(longer.to_bytes(8, "little") + header + whole[8 + size :])
    assert file.read_bytes()[:1] == b"\x80"
    assert backbones.load("test_vit", path).architecture.depth == 6


def test_a_timm_name_needs_a_file(tmp_path):
    with refused("backbone_path: missing; give the file of 'vit_small_patch16_224.dino'"):
        backbones.load("vit_small_patch16_224.dino")
    with refused("backbone_path: no file at .*model.safetensors; give the path of"):
        backbones.load("vit_small_patch16_224.dino", str(tmp_path))
    with refused("backbone: 'vit_smal_patch16_224' is unknown; .*known are vit_b16"):
        backbones.load("vit_smal_patch16_224")


def test_a_listed_backbone_is_found_in_a_snapshot(tmp_path):
    """The Hub calls every file model.safetensors."""
    write(tmp_path / "it", timm_arrays())
    found = backbones.locate("vit_b16_dino", str(tmp_path / "it"))
    assert found == tmp_path / "it/model.safetensors"
    with refused("backbone_path: no file at .*ViT-B_16.npz"):
        backbones.locate("vit_b16", str(tmp_path / "it"))
