"""CLIP: the functions of open_clip and of Hugging Face, its place in the protocol, its files."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from soft_jax import pytrees
from soft_jax.errors import UserError
from soft_jax.models import backbones, tokenizer
from soft_jax.models.clip import PREPROCESSING, CLIPConfig
from soft_jax.models.protocol import Preprocessing
from soft_jax.models.transformer import Attention
from tests.conftest import TINY

pytestmark = pytest.mark.usefixtures("fast_compile")

DATA = Path(__file__).parent / "data"
SMALL = CLIPConfig(
    image_size=8,
    patch_size=4,
    dim=12,
    depth=2,
    heads=3,
    mlp_dim=20,
    text_dim=8,
    text_depth=1,
    text_heads=2,
    text_mlp_dim=16,
    embed_dim=10,
    quick_gelu=True,
    context_length=9,
    vocabulary=32,
)
END = 31  # of SMALL's vocabulary: the largest id
embed, features, encode_text = map(jax.jit, (SMALL.embed, SMALL.features, SMALL.encode_text))
insert_prompts, classify = map(jax.jit, (SMALL.insert_prompts, SMALL.classify))
run_blocks = jax.jit(SMALL.run_blocks, static_argnames=("start", "stop", "prompts"))
pool = jax.jit(SMALL.pool, static_argnames="prompts")


def shapes_of(clip):
    """The arrays of a checkpoint in open_clip's naming, with their shapes."""
    d, text_d, patch = clip.dim, clip.text_dim, clip.patch_size
    shapes = {
        "visual.class_embedding": (d,),
        "visual.positional_embedding": (1 + clip.grid**2, d),
        "visual.conv1.weight": (d, 3, patch, patch),
        "visual.proj": (d, clip.embed_dim),
        "token_embedding.weight": (clip.vocabulary, text_d),
        "positional_embedding": (clip.context_length, text_d),
        "text_projection": (text_d, clip.embed_dim),
        "logit_scale": (),
    }
    norms = {"visual.ln_pre": d, "visual.ln_post": d, "ln_final": text_d}
    towers = (
        ("visual.transformer", d, clip.mlp_dim, clip.depth),
        ("transformer", text_d, clip.text_mlp_dim, clip.text_depth),
    )
    for tower, width, mlp, depth in towers:
        for i in range(depth):
            block = f"{tower}.resblocks.{i}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
            for dense, shape in (
                ("attn.out_proj", (width, width)),
                ("mlp.c_fc", (mlp, width)),
                ("mlp.c_proj", (width, mlp)),
            ):
                shapes |= {f"{block}.{dense}.weight": shape, f"{block}.{dense}.bias": shape[:1]}
    for norm, width in norms.items():
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (width,)
    return shapes


def draw(shapes, seed=0, dtype=np.float32):
    """Random arrays; a norm's scales are about 1. The numbers of `tests/data` are of these."""
    rng, drawn = np.random.RandomState(seed), {}
    for name in sorted(shapes):
        scale = len(shapes[name]) == 1 and name.endswith(".weight")
        drawn[name] = np.asarray(rng.normal(float(scale), 0.3, shapes[name]), dtype)
    return drawn


def to_hugging_face(arrays):
    """The same arrays in Hugging Face's naming."""
    renamed = {}
    words = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1": "vision_model.embeddings.patch_embedding",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "visual.transformer.resblocks": "vision_model.encoder.layers",
        "transformer.resblocks": "text_model.encoder.layers",
        "token_embedding": "text_model.embeddings.token_embedding",
        "ln_final": "text_model.final_layer_norm",
    }
    for name, array in arrays.items():
        if name == "positional_embedding":
            renamed["text_model.embeddings.position_embedding.weight"] = array
        elif name in ("visual.proj", "text_projection"):
            theirs = {"visual.proj": "visual_projection"}.get(name, name)
            renamed[f"{theirs}.weight"] = array.T
        else:
            for ours, theirs in words.items():
                name = name.replace(ours, theirs, 1)
            if "attn.in_proj_" in name:
                for part, piece in zip("qkv", np.split(array, 3), strict=True):
                    theirs = name.replace("attn.in_proj_", f"self_attn.{part}_proj.")
                    renamed[theirs] = piece
            else:
                renamed[name] = array
    return renamed


@pytest.fixture(scope="module")
def params():
    return SMALL.convert(draw(shapes_of(SMALL)))[0]


@pytest.fixture
def float64():
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),  # Flax's LayerNorm promotes float64 with float32
    ):
        yield


@pytest.fixture
def images(rng):
    return rng.random((3, 8, 8, 3), np.float32)


@pytest.fixture
def ids(rng):
    """Texts of three lengths with two places for a context; 0 behind the end."""
    ids = np.zeros((3, 9), np.int32)
    for row, length in zip(ids, (1, 5, 3), strict=True):
        row[0], row[3 : 3 + length], row[3 + length] = 30, rng.integers(1, 30, length), END
    return ids


# The functions of the other libraries.


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("library", ["open_clip", "hugging_face"])
def test_features_and_logits_are_the_libraries_own(float64, library, activation):
    """Their own model classes computed these, in float64, from arrays that are drawn here again."""
    with np.load(DATA / f"clip_{library}_{activation}.npz") as file:
        theirs = dict(file)
    meta = json.loads(str(theirs["meta"]))
    clip = CLIPConfig(**meta["sizes"], dtype="float64", preprocessing=Preprocessing())
    params, left_out = clip.convert(draw(meta["shapes"], meta["seed"], np.float64))
    assert (left_out, clip.quick_gelu) == ((), activation == "quick_gelu")
    images, ids = theirs["images"], theirs["ids"]
    features = jax.jit(clip.features)(params, images)
    texts = jax.jit(clip.encode_text)(params, ids)
    logits = clip.classify(params, {"text": texts}, features)
    found = {"image_features": features, "text_features": texts, "logits": logits}
    if library == "open_clip":  # computed there from its model's parts, in the host's way

        def prompted(params, images, prompts):
            tokens = clip.insert_prompts(params, clip.embed(params, images), prompts)
            return clip.pool(params, clip.run_blocks(params, tokens))

        found["prompted_features"] = jax.jit(prompted)(params, images, theirs["prompts"])
        found["context_features"] = jax.jit(clip.encode_text)(params, ids, theirs["contexts"])
    assert found.keys() == theirs.keys() - {"meta", "images", "ids", "prompts", "contexts"}
    for name, ours in found.items():
        np.testing.assert_allclose(ours, theirs[name], rtol=0, atol=1e-10, err_msg=name)


# Its parts.


def test_the_parameters_are_these(params):
    """Stored masks name them: with other paths, old runs could not be read."""
    expected = {
        "logit_scale": (),
        "vision/patch_embed/kernel": (4, 4, 3, 12),
        "vision/cls_token": (1, 1, 12),
        "vision/pos_embed": (1, 5, 12),
        "vision/norm_pre/scale": (12,),
        "vision/norm_pre/bias": (12,),
        "vision/norm/scale": (12,),
        "vision/norm/bias": (12,),
        "vision/proj": (12, 10),
        "text/token_embed": (32, 8),
        "text/pos_embed": (9, 8),
        "text/norm/scale": (8,),
        "text/norm/bias": (8,),
        "text/proj": (8, 10),
    }
    for block, dim, mlp in (
        ("vision/blocks_0", 12, 20),
        ("vision/blocks_1", 12, 20),
        ("text/blocks_0", 8, 16),
    ):
        for norm in ("norm1", "norm2"):
            expected |= {f"{block}/{norm}/scale": (dim,), f"{block}/{norm}/bias": (dim,)}
        for dense, shape in (
            ("attn/qkv", (dim, 3 * dim)),
            ("attn/proj", (dim, dim)),
            ("mlp/fc1", (dim, mlp)),
            ("mlp/fc2", (mlp, dim)),
        ):
            expected |= {f"{block}/{dense}/kernel": shape, f"{block}/{dense}/bias": shape[1:]}
    images, ids = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 9), np.int32)
    drawn = jax.eval_shape(SMALL.module().init, jax.random.key(0), images, ids)["params"]
    for tree in (params, drawn):
        assert {path: leaf.shape for path, leaf in pytrees.flatten(tree).items()} == expected
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype("float32")}


def test_parts_make_the_whole(params, images, ids):
    whole = jax.jit(lambda params, *inputs: SMALL.module().apply({"params": params}, *inputs))
    image, text = whole(params, SMALL.preprocessing.normalize(images), ids)
    tokens = embed(params, images)
    assert tokens.shape == (3, 5, 12)
    tokens = run_blocks(params, tokens, start=0, stop=1)
    tokens = run_blocks(params, tokens, start=1)
    assert tokens.shape == (3, 1, 12)
    np.testing.assert_allclose(pool(params, tokens), image, atol=1e-6)
    np.testing.assert_allclose(features(params, images), image, atol=1e-6)
    np.testing.assert_allclose(encode_text(params, ids), text, atol=1e-6)
    assert image.shape == text.shape == (3, SMALL.feature_dim)


def test_prompts_stand_before_the_norm_behind_the_class_token(params, images, rng):
    """As among the tokens that are not normalized yet, and for each image its own."""
    prompts = rng.normal(size=(3, 2, 12)).astype(np.float32)
    tokens = insert_prompts(params, embed(params, images), prompts)
    vision = params["vision"]
    normalized = SMALL.preprocessing.normalize(images).reshape(3, 2, 4, 2, 4, 3)
    patches = np.einsum("nihjwc,hwcd->nijd", normalized, vision["patch_embed"]["kernel"])
    cls = np.broadcast_to(vision["cls_token"], (3, 1, 12))
    plain = np.concatenate([cls, patches.reshape(3, 4, 12)], axis=1) + vision["pos_embed"]
    plain = np.concatenate([plain[:, :1], prompts, plain[:, 1:]], axis=1)
    centred = plain - plain.mean(axis=2, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + 1e-5)
    expected = expected * vision["norm_pre"]["scale"] + vision["norm_pre"]["bias"]
    np.testing.assert_allclose(tokens, expected, atol=1e-5)
    for_all = insert_prompts(params, embed(params, images), prompts[:1])
    np.testing.assert_array_equal(for_all[0], tokens[0])


def test_features_of_prompts_are_projected_too(params, images, rng):
    prompts = rng.normal(size=(1, 2, 12)).astype(np.float32)
    tokens = insert_prompts(params, embed(params, images), prompts)
    tokens = run_blocks(params, tokens, prompts=2)
    assert tokens.shape == (3, 3, 12)
    each = [pool(params, tokens[:, i : i + 1]) for i in (1, 2)]
    np.testing.assert_allclose(pool(params, tokens, prompts=2), np.mean(each, axis=0), atol=1e-5)


def test_a_prediction_does_not_depend_on_its_batch(params, images, ids):
    for encode, inputs in ((features, images), (encode_text, ids)):
        together = encode(params, inputs)
        alone = np.concatenate([encode(params, inputs[i : i + 1]) for i in range(3)])
        np.testing.assert_allclose(together, alone, atol=1e-5)


def test_what_is_behind_the_end_changes_nothing(params, ids, rng):
    """Nor does leaving it out: the text tower looks back alone."""
    contexts = rng.normal(size=(3, 2, 8)).astype(np.float32)
    plain = encode_text(params, ids, contexts)
    end = ids.argmax(axis=1)
    other = np.where(np.arange(9)[None] > end[:, None], rng.integers(0, 30, ids.shape), ids)
    assert (other != ids).any()
    other = other.astype(np.int32)
    np.testing.assert_array_equal(encode_text(params, other, contexts), plain)
    for row in range(3):
        short = slice(row, row + 1), slice(0, end[row] + 1)
        one = encode_text(params, ids[short], contexts[row : row + 1])
        np.testing.assert_allclose(one[0], plain[row], atol=1e-5)
    # What is before it does.
    other = np.where(np.arange(9)[None] == 3, (ids + 1) % 30, ids).astype(np.int32)
    assert np.abs(encode_text(params, other, contexts) - plain).max(axis=1).min() > 1e-3


def test_tokens_look_back_and_at_a_prefix(rng):
    """Whatever comes later, of few queries too; a prefix is before all of them."""
    layer = dataclasses.replace(SMALL.text_layer, dim=6, heads=2)
    attention = Attention(layer)
    x, later = rng.normal(size=(2, 1, 4, 6)).astype(np.float32)
    prefix = rng.normal(size=(1, 2, 3, 2, 3)).astype(np.float32)
    params = attention.init(jax.random.key(0), x)
    apply = jax.jit(attention.apply, static_argnames="queries")
    for i in (0, 2):
        other = np.concatenate([x[:, : i + 1], later[:, i + 1 :]], axis=1)
        for before in (None, prefix):
            seen = apply(params, x, before)[0, : i + 1]
            np.testing.assert_allclose(apply(params, other, before)[0, : i + 1], seen, atol=1e-6)
            few = apply(params, x, before, queries=i + 1)[0]
            np.testing.assert_allclose(few, seen, atol=1e-6)
    first = [apply(params, x, before)[0, 0] for before in (None, prefix, -prefix)]
    assert min(np.abs(first[i] - first[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


def test_contexts_take_the_places_of_tokens(params, ids, rng):
    """The embeddings of two tokens as a context are those tokens, whatever ids stand there."""
    ids[:, 1:3] = rng.integers(1, 30, (3, 2))
    contexts = params["text"]["token_embed"][ids[:, 1:3]]
    plain = encode_text(params, ids)
    ids = np.where(np.isin(np.arange(9), (1, 2))[None], 0, ids).astype(np.int32)
    np.testing.assert_array_equal(encode_text(params, ids, contexts), plain)
    one = contexts[:1]
    many = encode_text(params, ids, np.broadcast_to(one, contexts.shape))
    np.testing.assert_array_equal(encode_text(params, ids, one), many)


def test_texts_are_chosen_inside_a_program(params, ids):
    """A training step takes the rows of its task's classes, which change without compiling."""

    @jax.jit
    def some(params, ids, classes):
        return encode_text(params, ids[classes])

    found = some(params, ids, np.array([2, 0]))
    np.testing.assert_allclose(found, encode_text(params, ids)[np.array([2, 0])], atol=1e-5)


def test_bfloat16_computes_near_float32(params, images, ids):
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    with jax.numpy_dtype_promotion("standard"):  # Flax's LayerNorm mixes in float32 statistics
        low = jax.jit(half.features)(params, images), jax.jit(half.encode_text)(params, ids)
        logits = half.classify(params, {"text": low[1].astype(jnp.float32)}, low[0])
    assert {x.dtype for x in low} == {jnp.dtype("bfloat16")}
    assert logits.dtype == np.float32
    np.testing.assert_allclose(low[0].astype(np.float32), features(params, images), atol=0.2)
    np.testing.assert_allclose(low[1].astype(np.float32), encode_text(params, ids), atol=0.2)


def test_where_layers_are(params):
    """The text tower's have paths of their own, and are no layers of the vision tower."""
    assert SMALL.towers == {"vision": 2, "text": 1}
    assert TINY.towers == {"vision": 4}
    vision = SMALL.kernel_paths(("proj",), (0, 1))
    text = SMALL.kernel_paths(("qkv", "mlp"), (0,), "text")
    assert vision == ("vision/blocks_0/attn/proj/kernel", "vision/blocks_1/attn/proj/kernel")
    assert text == tuple(
        f"text/blocks_0/{dense}/kernel" for dense in ("attn/qkv", "mlp/fc1", "mlp/fc2")
    )
    assert len(pytrees.flatten(pytrees.select(params, vision + text))) == 5
    assert [SMALL.layer_of(path) for path in vision + text] == [0, 1, None, None, None]
    assert SMALL.layer_of("vision/norm/scale") is None
    assert [SMALL.fused(path) for path in vision + text] == [1, 1, 3, 1, 1]
    assert SMALL.bottleneck_widths(0, "text") == {
        "text/blocks_0/mlp/adapter1": 16,
        "text/blocks_0/mlp/adapter2": 8,
    }
    assert SMALL.bottleneck_widths(1)["vision/blocks_1/mlp/adapter2"] == 12


def test_queries_are_watched_in_the_vision_tower(params, images, ids):
    found = {}

    def watch(call, args, kwargs, context):
        out = call(*args, **kwargs)
        layer = SMALL.query_layer(context.module.path)
        if context.method_name == "__call__" and layer is not None:
            found[layer] = out.shape
        return out

    with nn.intercept_methods(watch):
        for encode, inputs in ((SMALL.features, images), (SMALL.encode_text, ids)):
            jax.eval_shape(functools.partial(encode), params, inputs)  # traced anew
    assert found == {0: (3, 5, 36), 1: (3, 5, 36)}


def test_positions_for_another_image_size(params):
    larger = SMALL.at_size(16)
    fitted = larger.fit_size(params)
    assert fitted["vision"]["pos_embed"].shape == (1, 17, 12)
    assert fitted["text"] is params["text"]
    images = np.zeros((1, 16, 16, 3), np.float32)
    assert jax.eval_shape(larger.features, fitted, images).shape == (1, 10)
    with pytest.raises(ValueError, match="image_size 10 is not a multiple of .* patch size 4"):
        SMALL.at_size(10)
    for change in ({"heads": 5}, {"text_heads": 3}, {"heads": 0}):
        with pytest.raises(ValueError, match="tower's width .* is not a multiple of heads"):
            dataclasses.replace(SMALL, **change)


# The classifier.


def test_logits_are_scaled_cosines(params, rng):
    features, texts = (rng.normal(size=(n, 10)).astype(np.float32) for n in (4, 3))
    cosines = (features / np.linalg.norm(features, axis=1, keepdims=True)) @ (
        texts / np.linalg.norm(texts, axis=1, keepdims=True)
    ).T
    logits = classify(params, {"text": texts}, features)
    np.testing.assert_allclose(logits, np.exp(params["logit_scale"]) * cosines, atol=1e-5)
    colder = params | {"logit_scale": params["logit_scale"] + np.float32(1)}
    np.testing.assert_allclose(
        classify(colder, {"text": texts}, features), np.e * logits, rtol=1e-5
    )


def test_a_class_without_a_text_yet_has_logit_0(params, rng):
    """And finite gradients, of the features too: tasks to come are in the classifier already."""
    classifier = SMALL.init_classifier(jax.random.key(0), ("cat", "dog", "cow"))
    assert classifier["text"].shape == (3, 10)
    classifier = {"text": classifier["text"].at[1].set(1.0)}
    features = rng.normal(size=(2, 10)).astype(np.float32)
    logits = classify(params, classifier, features)
    np.testing.assert_array_equal(logits[:, [0, 2]], 0)
    assert (logits[:, 1] != 0).all()

    def loss(classifier, features):
        return jnp.sum(classify(params, classifier, features) ** 2)

    for inputs in (features, np.zeros_like(features)):
        grads = jax.grad(loss, (0, 1))(classifier, jnp.asarray(inputs))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_a_vit_reads_no_text(backbone):
    assert (TINY.reads_text, SMALL.reads_text) == (False, True)
    with pytest.raises(NotImplementedError, match="ViTConfig reads no text"):
        TINY.tokenize(["cat"])
    with pytest.raises(NotImplementedError, match="ViTConfig reads no text"):
        TINY.encode_text(backbone, np.zeros((1, 3), np.int32))


# Text to ids.


def test_ids_of_names_behind_a_context():
    clip = dataclasses.replace(SMALL, vocabulary=49408, context_length=8)
    cat, plane = tokenizer.encode("cat."), tokenizer.encode("green plane.")
    assert (len(cat), len(plane)) == (2, 3)
    start, end = tokenizer.START, tokenizer.END
    found = clip.tokenize(["cat.", "green plane."], context=2)
    assert found.tolist() == [[start, 0, 0, *cat, end, 0], [start, 0, 0, *plane, end]]
    assert found.dtype == np.int32
    # A text that is too long is cut, as CLIP's tokenizers cut it: the end is the last id.
    long = "cat " * 20
    np.testing.assert_array_equal(clip.tokenize([long]), tokenizer.tokenize([long], 8))
    assert clip.tokenize([long], 5).tolist() == [[start, *[0] * 5, tokenizer.encode("cat")[0], end]]
    assert clip.tokenize([]).shape == (0, 2)
    with pytest.raises(UserError, match="a context of 6 vectors leaves no room for a text"):
        clip.tokenize(["cat"], 6)
    with pytest.raises(UserError, match="texts: one string, 'cat'; give a list"):
        clip.tokenize("cat")
    with pytest.raises(UserError, match="its vocabulary of 32 tokens is not that of CLIP's"):
        SMALL.tokenize(["cat"])


# Files.


# As SMALL, with CLIP's own vocabulary and an image size and patch that a name may say.
FULL = dataclasses.replace(SMALL, vocabulary=49408, context_length=12)
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 10,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 8,
            "layers": 2,
            "width": 12,
            "head_width": 4,
            "patch_size": 4,
            "mlp_ratio": 1.6667,
        },
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 49408,
            "width": 8,
            "heads": 2,
            "layers": 1,
            "mlp_ratio": 2.0,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]},
}
HUGGING_FACE = {
    "model_type": "clip",
    "projection_dim": 10,
    "vision_config": {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "patch_size": 4,
        "hidden_act": "gelu",
    },
    "text_config": {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-05,
    },
}
PIXELS = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))


def changed(config, where, **fields):
    """`config` with other fields in its part `where`, such as "model_cfg/text_cfg"."""
    copy = json.loads(json.dumps(config))
    part = copy
    for name in where.split("/") if where else ():
        part = part[name]
    part.update(fields)
    return copy


@pytest.fixture(scope="module")
def arrays():
    return draw(shapes_of(FULL), dtype=np.float16)


def write(folder, arrays, file="open_clip_model.safetensors", **configs):
    """Write a snapshot, with configs by their names without `.json`; return its folder."""
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(
        {name: np.array(array, order="C") for name, array in arrays.items()}, folder / file
    )
    for name, config in configs.items():
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / f"{name}.json").write_text(text)
    return str(folder)


@contextlib.contextmanager
def refused(match):
    with pytest.raises(UserError, match=match) as raised:
        yield
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_clip_by_any_name_with_its_config(tmp_path, arrays, form):
    path = write(tmp_path / "it", arrays, open_clip_config=OPEN_CLIP)
    found = backbones.load("my_clip", path + "/open_clip_model.safetensors" * (form == "file"))
    assert found.architecture == dataclasses.replace(FULL, preprocessing=PIXELS)
    assert (found.left_out, found.notes) == ((), ())
    jax.tree.map(np.testing.assert_array_equal, found.params, FULL.convert(arrays)[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype("float32")}
    larger = backbones.load("my_clip", path, image_size=16, dtype="bfloat16")
    assert (larger.architecture.image_size, larger.architecture.dtype) == (16, "bfloat16")
    assert larger.params["vision"]["pos_embed"].shape == (1, 17, 12)


def test_hugging_faces_files_hold_the_same(tmp_path, arrays):
    """The same tree from the other naming; what is no parameter is left out, and said."""
    renamed = to_hugging_face(arrays)
    renamed["text_model.embeddings.position_ids"] = np.arange(12)[None]
    renamed["vision_model.embeddings.position_ids"] = np.arange(5)[None]
    path = write(
        *(tmp_path / "it", renamed, "model.safetensors"),
        config=HUGGING_FACE,
        preprocessor_config={"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25]},
    )
    found = backbones.load("my_clip", path)
    assert found.architecture == dataclasses.replace(FULL, preprocessing=PIXELS, quick_gelu=False)
    assert found.left_out == (
        "text_model.embeddings.position_ids",
        "vision_model.embeddings.position_ids",
    )
    jax.tree.map(np.testing.assert_array_equal, found.params, FULL.convert(arrays)[0])


def test_openais_sizes_and_the_causal_mask_are_no_parameters(arrays):
    more = {name: np.array(7) for name in ("input_resolution", "context_length", "vocab_size")}
    more["attn_mask"] = np.full((12, 12), -np.inf, np.float32)
    tree, left_out = FULL.convert(arrays | more)
    assert left_out == tuple(sorted(more))
    jax.tree.map(np.testing.assert_array_equal, tree, FULL.convert(arrays)[0])


def test_pixels_without_mean_and_std_are_clips_own(tmp_path, arrays):
    config = {name: part for name, part in OPEN_CLIP.items() if name != "preprocess_cfg"}
    found = backbones.load("my_clip", write(tmp_path / "it", arrays, open_clip_config=config))
    assert found.architecture.preprocessing == PREPROCESSING
    assert "no file beside it says mean and std" in found.notes[0]


def test_the_config_of_the_arrays_naming_comes_first(tmp_path, arrays):
    """The Hub's folders hold several configs: timm's is none of a CLIP, others are read in turn."""
    timm = {"architecture": "vit_base_patch16_clip_224", "num_classes": 5}
    both = {"open_clip_config": OPEN_CLIP, "config": HUGGING_FACE}
    with_timm = {"open_clip_config": OPEN_CLIP, "config": timm}
    for i, (held, configs, quick) in enumerate(
        (
            (arrays, both, True),
            (to_hugging_face(arrays), both, False),
            (to_hugging_face(arrays), with_timm, True),
            (arrays, {"config": HUGGING_FACE}, False),
        )
    ):
        path = write(tmp_path / f"{i}", held, **configs)
        assert backbones.load("my_clip", path).architecture.quick_gelu == quick


def test_defaults_are_the_libraries_own(tmp_path, arrays):
    """open_clip leaves quick_gelu out where it is false, Hugging Face where it is true."""
    ours = changed(OPEN_CLIP, "model_cfg")
    del ours["model_cfg"]["quick_gelu"]
    theirs = changed(HUGGING_FACE, "")
    del theirs["vision_config"]["hidden_act"], theirs["text_config"]["hidden_act"]
    for name, config, quick in (("open_clip_config", ours, False), ("config", theirs, True)):
        path = write(tmp_path / name, arrays, **{name: config})
        assert backbones.load("my_clip", path).architecture.quick_gelu == quick


def test_what_no_array_shows_is_part_of_the_fingerprint(tmp_path, arrays):
    configs = [
        OPEN_CLIP,
        changed(OPEN_CLIP, "model_cfg", quick_gelu=False),
        changed(OPEN_CLIP, "model_cfg/vision_cfg", head_width=6),
        changed(OPEN_CLIP, "model_cfg/text_cfg", heads=4),
        changed(OPEN_CLIP, "preprocess_cfg", mean=[0.5, 0.5, 0.5]),
    ]
    paths = [
        write(tmp_path / f"{i}", arrays, open_clip_config=config)
        for i, config in enumerate(configs)
    ]
    assert len({backbones.load("my_clip", path).fingerprint for path in paths}) == len(configs)
    again = changed(OPEN_CLIP, "preprocess_cfg", interpolation="bicubic")
    path = write(tmp_path / "again", arrays, open_clip_config=again)
    found = [backbones.load("other_name", each).fingerprint for each in (path, paths[0])]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "parameters", "quick_gelu"),
    [
        ("clip_vit_b16", 149_620_737, True),
        ("clip_vit_b32", 151_277_313, True),
        ("clip_vit_l14", 427_616_513, True),
        ("clip_vit_b16_laion400m", 149_620_737, False),
    ],
)
def test_listed_clips_have_the_published_sizes(name, parameters, quick_gelu):
    clip = backbones.BACKBONES[name].architecture
    assert sum(int(np.prod(shape)) for shape in shapes_of(clip).values()) == parameters
    assert (clip.head_dim, clip.text_dim // clip.text_heads) == (64, 64)
    assert (clip.quick_gelu, clip.preprocessing) == (quick_gelu, PREPROCESSING)
    assert (clip.image_size, clip.context_length, clip.vocabulary) == (224, 77, 49408)


@pytest.fixture
def listed(monkeypatch):
    """A listed CLIP of FULL's sizes."""
    clip = dataclasses.replace(FULL, preprocessing=PIXELS)
    url = "https://huggingface.co/timm/small/resolve/main/open_clip_model.safetensors"
    source = backbones.Source(clip, "CLIP-small.safetensors", url)
    monkeypatch.setitem(backbones.BACKBONES, "clip_small", source)
    return clip


def test_a_listed_clip_needs_no_config(tmp_path, arrays, listed):
    """It is found by its own name and by those of the Hub; timm's file of it is passed over."""
    vit = {"norm_pre.weight": np.ones(12, np.float32)}
    for file in ("CLIP-small.safetensors", "open_clip_model.safetensors", "model.safetensors"):
        path = write(tmp_path / file[:4], arrays, file)
        if file != "model.safetensors":
            write(tmp_path / file[:4], vit, "model.safetensors")
        found = backbones.load("clip_small", path)
        assert (found.architecture, found.notes) == (listed, ())
        raw = (tmp_path / file[:4] / file).read_bytes()
        assert found.fingerprint == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize(
    ("where", "fields", "said"),
    [
        ("model_cfg", {"quick_gelu": False}, "quick_gelu False, but this backbone has True"),
        ("model_cfg/text_cfg", {"heads": 4}, "text_heads 4, but this backbone has 2"),
        ("preprocess_cfg", {"mean": [0, 0, 0]}, r"mean and std \(0.0, .*has \(0.5, 0.4, 0.3\)"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, arrays, listed, where, fields, said):
    """A LAION model under OpenAI's name: its features would be wrong, and nobody would notice."""
    path = write(tmp_path / "it", arrays, open_clip_config=changed(OPEN_CLIP, where, **fields))
    with refused(f"'clip_small': its open_clip_config.json says {said}.*the file is another"):
        backbones.load("clip_small", path)
    same = changed(OPEN_CLIP, "preprocess_cfg", mean=np.float32([0.5, 0.4, 0.3]).tolist())
    path = write(tmp_path / "it", arrays, open_clip_config=same)
    assert backbones.load("clip_small", path).architecture == listed


def test_openais_own_files_are_named_as_such(tmp_path, listed):
    folder = tmp_path / "it"
    folder.mkdir()
    (folder / "ViT-B-16.pt").write_bytes(b"PK\3\4")
    for path in (folder, folder / "ViT-B-16.pt"):
        message = r"ViT-B-16.pt is a PyTorch pickle.*; take https://huggingface.co/timm/small/"
        with refused(message):
            backbones.load("clip_small", str(path))
        with refused("is a PyTorch pickle.*open_clip_model.safetensors of a CLIP"):
            backbones.load("my_clip", str(path))


def test_without_a_config_nobody_knows_the_activation(tmp_path, arrays):
    path = write(tmp_path / "it", arrays)
    with refused(
        "put open_clip_config.json, or Hugging Face's config.json, beside it, or name it "
    ):
        backbones.load("my_clip", path)
    with refused("it is a CLIP, and that is timm's name of a plain ViT; say my_clip"):
        backbones.load("vit_base_patch16_224", path + "/open_clip_model.safetensors")


@pytest.mark.parametrize("naming", ["open_clip", "hugging_face"])
@pytest.mark.parametrize(
    ("array", "shape", "expected"),
    [
        ("visual.transformer.resblocks.1.mlp.c_fc.bias", (7,), r"\(20,\)"),
        ("visual.ln_pre.weight", (7,), r"\(12,\)"),
        ("visual.conv1.weight", (12, 48), r"\(dim, 3, patch, patch\)"),
        ("transformer.resblocks.0.ln_1.bias", (7,), r"\(8,\)"),
        ("ln_final.weight", (7,), r"\(8,\)"),
        ("logit_scale", (1,), r"\(\)"),
    ],
)
def test_wrong_and_missing_arrays_are_named(tmp_path, arrays, naming, array, shape, expected):
    """By the file's own names, with both shapes."""
    renamed = to_hugging_face if naming == "hugging_face" else dict
    bad = renamed({**arrays, array: np.zeros(shape, np.float32)})
    (name,) = renamed({array: np.zeros(shape)})
    configs = {"open_clip_config": OPEN_CLIP}
    size = r"\({}\)".format(", ".join(map(str, shape)) + "," * (len(shape) == 1))
    with refused(rf"array '{name}' is {size}, expected {expected}"):
        backbones.load("my_clip", write(tmp_path / "it", bad, **configs))
    del bad[name]
    with refused(f"array '{name}' is missing"):
        backbones.load("my_clip", write(tmp_path / "it", bad, **configs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.proj": np.zeros((5, 10))}, r"'visual.proj' is \(5, 10\), expected \(12, 10\)"),
        (
            {"visual.positional_embedding": np.zeros((4, 12))},
            "'visual.positional_embedding' has 4 positions, expected those of a .class. token and",
        ),
        ({"visual.conv1.weight": np.zeros((12, 3, 4, 2))}, "patches are of 4 × 2 pixels of 3"),
        ({"surprise": np.zeros(3)}, "array 'surprise' has no place in this CLIP"),
        ({"ln_final.bias": np.full(8, np.nan)}, "array 'ln_final.bias' holds NaN"),
        ({"ln_final.bias": np.zeros(8, np.int32)}, "array 'ln_final.bias' is of the type int32"),
        (
            {"transformer.resblocks.2.ln_1.bias": np.zeros(8)},
            "arrays are of text_depth 3, its open_clip_config.json says 1",
        ),
        ({"token_embedding.weight": np.zeros((64, 8))}, "its vocabulary has 64 tokens, but texts"),
        ({"logit_bias": np.zeros(())}, "'logit_bias' is a bias of the logits, as SigLIP has it"),
        ({"text.ln_final.bias": np.zeros(8)}, "is of open_clip's CustomTextCLIP, with a text enc"),
        ({"visual.layer1.0.conv1.weight": np.zeros(8)}, "is a part of a ResNet for images"),
        ({"visual.trunk.norm.bias": np.zeros(8)}, "is a part of timm's image encoder in open_cl"),
        ({"visual.transformer.resblocks.0.ls_1.gamma": np.zeros(8)}, "is layer scale"),
        ({"text_decoder.ln_final.bias": np.zeros(8)}, "is a decoder of texts, as CoCa has it"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, change, message):
    path = write(tmp_path / "it", arrays | change, open_clip_config=OPEN_CLIP)
    with refused(message):
        backbones.load("my_clip", path)


def test_half_a_clip_is_refused(tmp_path, arrays, listed):
    renamed = to_hugging_face(arrays)
    for held, tower, missing in (
        (arrays, "visual", "image encoder .array 'visual.class_embedding'"),
        (renamed, "vis", "image encoder .array 'vision_model.embeddings.class_embedding'"),
    ):
        vision = {name: array for name, array in held.items() if name.startswith(tower)}
        text = {name: array for name, array in held.items() if name not in vision}
        path = write(tmp_path / "it", text, open_clip_config=OPEN_CLIP)
        for name in ("my_clip", "clip_small"):
            with refused(f"the file holds no {missing}.*take the file of the whole model"):
                backbones.load(name, path)
        path = write(tmp_path / "it", vision, open_clip_config=OPEN_CLIP)
        with refused("the file holds no text encoder .*half of a CLIP, so take the file of the"):
            backbones.load("my_clip", path)
    vit = {"norm_pre.weight": np.ones(12, np.float32)}
    path = write(tmp_path / "timm", vit, "model.safetensors")
    with refused("arrays are named neither as open_clip's .*but like 'norm_pre.weight'"):
        backbones.load("clip_small", path)


def test_another_size_of_a_listed_clip_is_refused(tmp_path, arrays, listed):
    deeper = arrays | {"visual.transformer.resblocks.2.ln_1.bias": np.zeros(12)}
    with refused("the file's vision tower has 3 layers, expected 2"):
        backbones.load("clip_small", write(tmp_path / "it", deeper))
    with refused(r"'visual.class_embedding' is \(12,\), expected \(768,\)"):
        backbones.load("clip_vit_b16", write(tmp_path / "it", arrays))


@pytest.mark.parametrize(
    ("file", "config", "message"),
    [
        ("open_clip_config", "{", "its open_clip_config.json can't be used: Expecting"),
        ("open_clip_config", "[]", r"can't be used: it holds \[\], expected an object"),
        ("open_clip_config", {}, "model_cfg is missing"),
        ("open_clip_config", {"model_cfg": {"vision_cfg": {}}}, "text_cfg is missing"),
        (
            "open_clip_config",
            changed(OPEN_CLIP, "model_cfg", quick_gelu="no"),
            "quick_gelu is 'no', expected true or false",
        ),
        (
            "open_clip_config",
            changed(OPEN_CLIP, "model_cfg/vision_cfg", head_width=-4),
            "head_width is -4, expected a number above 0",
        ),
        (
            "open_clip_config",
            changed(OPEN_CLIP, "model_cfg/vision_cfg", head_width=5),
            "head_width is 5, and width 12 is not a multiple of it",
        ),
        (
            "open_clip_config",
            changed(OPEN_CLIP, "model_cfg/text_cfg", heads=3),
            "the text tower's width 8 is not a multiple of heads 3",
        ),
        (
            "open_clip_config",
            changed(OPEN_CLIP, "model_cfg/vision_cfg", width=16),
            "its arrays are of dim 12, its open_clip_config.json says 16",
        ),
        (
            "open_clip_config",
            changed(OPEN_CLIP, "model_cfg/vision_cfg", no_ln_pre=True),
            "no_ln_pre is True in vision_cfg, with which the model is not this CLIP",
        ),
        (
            "open_clip_config",
            changed(OPEN_CLIP, "model_cfg/vision_cfg", norm_kwargs={"eps": 1e-6}),
            "norm_kwargs is {'eps': 1e-06} in vision_cfg",
        ),
        (
            "open_clip_config",
            changed(OPEN_CLIP, "model_cfg/text_cfg", hf_tokenizer_name="bert"),
            "hf_tokenizer_name is 'bert' in text_cfg",
        ),
        (
            "open_clip_config",
            changed(OPEN_CLIP, "preprocess_cfg", std=[1, 0, 1]),
            r"std is \[1, 0, 1\], expected three numbers above 0",
        ),
        ("config", changed(HUGGING_FACE, "", model_type="siglip"), "model_type is 'siglip'"),
        (
            "config",
            changed(HUGGING_FACE, "vision_config", hidden_act="quick_gelu"),
            "hidden_act is 'gelu' and 'quick_gelu', expected 'gelu' or 'quick_gelu' for both",
        ),
        (
            "config",
            changed(HUGGING_FACE, "text_config", layer_norm_eps=1e-6),
            "layer_norm_eps is 1e-06 in text_config, expected 1e-05",
        ),
    ],
)
def test_configs_are_followed_or_refused(tmp_path, arrays, file, config, message):
    with refused(message):
        backbones.load("my_clip", write(tmp_path / "it", arrays, **{file: config}))
