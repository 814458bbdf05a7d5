"""Tasks as models of timm, transformers and PEFT.

`data/export_vit.npz` is of those libraries: the arrays' names and shapes as each writes them itself
for the same model, and logits of the files that `write_examples` writes, loaded strictly. Which
versions, it says in `versions`.
"""

import dataclasses
import json
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from soft_jax import pytrees
from soft_jax.__main__ import main
from soft_jax.config import DEFAULTS, Config, from_settings
from soft_jax.data import augmentation, sources
from soft_jax.errors import UserError
from soft_jax.experiment import export as export_lib
from soft_jax.experiment import imported
from soft_jax.experiment import settings as settings_lib
from soft_jax.experiment.data_spec import Data
from soft_jax.experiment.gate import Gate
from soft_jax.experiment.library import Library
from soft_jax.inference import engine
from soft_jax.inference.predictor import Predictor
from soft_jax.methods import low_rank, masks, peft, registry
from soft_jax.methods.method import Method
from soft_jax.models import backbones, timm_config, vit_checkpoints, vit_export
from soft_jax.models.protocol import Preprocessing
from soft_jax.models.vit import ViTConfig
from soft_jax.store import formats
from soft_jax.store.folder import Store
from soft_jax.store.records import RunRecord, TaskManifest
from tests.conftest import TINY, hardly_optimized, names, tiny_config, tiny_world

RECORDED = Path(__file__).parent / "data/export_vit.npz"
NAMES = ("ant", "bee", "cow")
MODULES, LAYERS = ("qkv", "proj", "mlp"), (1, 11)  # layers from 0
VIT = ViTConfig(image_size=32, patch_size=8, dim=192, depth=12, heads=3, mlp_dim=768)


def example(kind):
    """A task on the bundled backbone whose arrays are drawn: its method, own arrays, classifier."""
    rng = np.random.default_rng(7)
    kernels = VIT.kernel_paths(MODULES, LAYERS)
    if kind == "lora":
        fused = tuple(path for path in kernels if VIT.fused(path) == 3)
        part = low_rank.LoRA(kernels, LAYERS, rank=3, parts=(0, 2), fused=fused)
    else:
        part = masks.SoftMask(kernels, LAYERS)
    method = Method(VIT, names(3), reparametrization=part)
    backbone = backbones.load("vit_ti8_32").params
    shapes = pytrees.flatten(jax.eval_shape(part.init, jax.random.key(0), backbone))
    own = {
        path: jnp.asarray(
            rng.normal(0, 0.05, like.shape)
            if kind == "lora"
            else rng.uniform(0.5, 1.5, like.shape),
            jnp.float32,
        )
        for path, like in shapes.items()
    }
    classifier = {"kernel": rng.normal(0, 0.3, (192, 3)), "bias": rng.normal(0, 0.3, (3,))}
    classifier = {name: leaf.astype(np.float32) for name, leaf in classifier.items()}
    return method, pytrees.unflatten(own), classifier, backbone


def example_files(kind):
    """Every file of the example in each format, by folder and name."""
    method, own, classifier, backbone = example(kind)
    params = pytrees.merge(backbone, method.reparametrization.weights(backbone, own))
    files = {
        "timm/model.safetensors": vit_export.to_timm(params, classifier),
        "timm/config.json": vit_export.timm_config(VIT, NAMES),
        "hf/model.safetensors": vit_export.to_hugging_face(params, classifier),
        "hf/config.json": vit_export.hugging_face_config(VIT, NAMES),
        "hf/preprocessor_config.json": vit_export.preprocessor_config(VIT),
    }
    if kind == "lora":
        config, arrays = peft.lora_to_peft(own, method, classifier)
        files |= {"peft/adapter_config.json": config, "peft/adapter_model.safetensors": arrays}
    return files


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(content))
        else:
            safetensors.numpy.save_file(content, folder / name, metadata={"format": "pt"})


def write_examples(folder):
    """Write what the recorded logits are of."""
    for kind in ("softtf", "lora"):
        write(Path(folder) / kind, example_files(kind))


def shapes_of(arrays):
    return {name: list(array.shape) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def recorded():
    with np.load(RECORDED) as file:
        return dict(file)


@pytest.fixture(scope="module")
def logits_of():
    @jax.jit
    def features(params, images):
        return VIT.features(params, images.astype(jnp.float32) / 255)

    def logits(params, classifier, images):
        return VIT.classify(params, classifier, features(params, images))

    return logits


@pytest.mark.parametrize("kind", ["softtf", "lora"])
def test_other_libraries_answer_as_we_do(kind, recorded, logits_of):
    method, own, classifier, backbone = example(kind)
    params = pytrees.merge(backbone, method.reparametrization.weights(backbone, own))
    ours = logits_of(params, classifier, recorded["images"])
    assert np.abs(ours - logits_of(backbone, classifier, recorded["images"])).max() > 0.1
    for library in ("timm", "hf", "peft") if kind == "lora" else ("timm", "hf"):
        np.testing.assert_allclose(recorded[f"{kind}_{library}"], ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("library", ["timm", "hf", "peft"])
def test_arrays_are_those_that_the_library_writes_itself(library, recorded):
    files = example_files("lora")
    name = "adapter_model" if library == "peft" else "model"
    arrays = files[f"{library}/{name}.safetensors"]
    assert shapes_of(arrays) == json.loads(str(recorded[f"{library}_shapes"]))
    assert all(a.dtype == np.float32 and a.flags.c_contiguous for a in arrays.values())


def test_timm_files_are_backbones_here(tmp_path):
    """What is written is read: the same parameters, sizes and normalization."""
    method, own, classifier, backbone = example("softtf")
    vit = ViTConfig(32, 8, 192, 12, 3, 768, preprocessing=Preprocessing((0.1, 0.2, 0.3)))
    params = pytrees.merge(backbone, method.reparametrization.weights(backbone, own))
    write(
        tmp_path,
        {
            "model.safetensors": vit_export.to_timm(params, classifier),
            "config.json": vit_export.timm_config(vit, NAMES),
        },
    )
    loaded = backbones.load("vit_tiny_patch16_224", str(tmp_path))
    assert loaded.architecture == vit
    assert loaded.left_out == ("head.bias", "head.weight")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


@pytest.mark.parametrize(
    ("vit", "architecture", "crop_pct", "processor"),
    [
        (ViTConfig(224, 16, 768, 12, 12, 3072), "vit_base_patch16_224", 0.875, "CLIP"),
        (ViTConfig(384, 32, 384, 12, 6, 1536), "vit_small_patch32_384", 384 / 438, "CLIP"),
        (ViTConfig(112, 8, 1024, 24, 16, 4096), "vit_large_patch16_224", 0.875, "CLIP"),
        (TINY, "vit_base_patch16_224", 1, "ViT"),
    ],
)
def test_configs_say_what_arrays_do_not(vit, architecture, crop_pct, processor):
    config = vit_export.timm_config(vit, NAMES)
    assert config["architecture"] == architecture
    assert config["label_names"] == list(NAMES)
    assert config["pretrained_cfg"]["crop_pct"] == pytest.approx(crop_pct)
    parsed = timm_config.parse(json.dumps(config))
    sizes = vit_checkpoints.Sizes(
        vit.image_size, vit.patch_size, vit.dim, vit.depth, vit.mlp_dim, 0
    )
    assert ViTConfig(**timm_config.vit_fields(architecture, sizes, parsed)[0]) == vit
    hugging_face = vit_export.hugging_face_config(vit, NAMES)
    assert hugging_face["layer_norm_eps"] == 1e-6
    assert hugging_face["id2label"] == {"0": "ant", "1": "bee", "2": "cow"}
    prepared = vit_export.preprocessor_config(vit)
    assert prepared["image_processor_type"] == f"{processor}ImageProcessor"
    assert prepared.get("crop_size", prepared["size"])["height"] == vit.image_size


def test_timm_gets_the_mlp_width_that_it_rounds_down_to():
    for dim, mlp in ((1408, 6144), (24, 47), (192, 767), (49, 97)):
        config = vit_export.timm_config(ViTConfig(32, 8, dim, 2, 1, mlp), NAMES)
        assert int(dim * config["model_args"]["mlp_ratio"]) == mlp


# PEFT.


@pytest.fixture
def lora_folder(tmp_path):
    write(tmp_path, example_files("lora"))
    return tmp_path / "peft"


def changed(folder, arrays=lambda arrays: arrays, **config):
    """Write the folder again with other arrays and fields."""
    file = folder / peft.ARRAYS
    there = {name: a.copy() for name, a in safetensors.numpy.load_file(file).items()}
    fields = json.loads((folder / peft.CONFIG).read_text()) | config
    shutil.rmtree(folder)
    write(folder, {peft.CONFIG: fields, peft.ARRAYS: arrays(there)})


def test_lora_comes_back_to_the_bit(lora_folder):
    method, own, classifier, backbone = example("lora")
    back = peft.lora_from_peft(lora_folder, method, backbone)
    jax.tree.map(np.testing.assert_array_equal, back, {"lora": own})
    found = peft.classifier_from_peft(lora_folder)
    jax.tree.map(np.testing.assert_array_equal, found, classifier)


def old_names(arrays):
    """The arrays as transformers 4 names the modules, and older PEFT an adapter."""
    old = {new: old for part in vit_export.MODULES.values() for new, old in part}
    renamed = {}
    for name, array in arrays.items():
        name = name.replace("vit.layers", "vit.encoder.layer").replace("lora_A.", "lora_A.default.")
        module = next((new for new in old if f".{new}." in name), "")
        renamed[name.replace(module, old[module]) if module else name] = array
    return renamed


def test_any_naming_scale_and_lower_rank_is_the_same_change(lora_folder):
    method, own, _, backbone = example("lora")
    changed(lora_folder, old_names, lora_alpha=12)  # 4 = 12 / 3, half of ours
    lora = method.reparametrization
    back = peft.lora_from_peft(lora_folder, method, backbone)["lora"]
    wide = low_rank.LoRA(lora.kernels, lora.changed_layers, 5, lora.parts, lora.fused)
    filled = peft.lora_from_peft(
        lora_folder, Method(VIT, names(3), reparametrization=wide), backbone
    )["lora"]
    own, theirs = lora.weights(backbone, own), wide.weights(backbone, filled)
    kernels = pytrees.flatten(pytrees.select(backbone, lora.kernels))
    for path, kernel in kernels.items():
        half = (pytrees.flatten(own)[path] + kernel) / 2
        np.testing.assert_allclose(pytrees.flatten(theirs)[path], half, atol=1e-6)
        same = pytrees.flatten(lora.weights(backbone, back))[path]
        np.testing.assert_allclose(same, half, atol=1e-6)


def test_a_product_of_timms_whole_qkv_becomes_three(tmp_path):
    rng = np.random.default_rng(0)
    kernels = VIT.kernel_paths(("qkv",), (4,))
    lora = low_rank.LoRA(kernels, (4,), rank=2, fused=kernels)
    a, b = (rng.normal(0, 1, s).astype(np.float32) for s in ((2, 192), (576, 2)))
    arrays = {
        f"base_model.model.blocks.4.attn.qkv.lora_{n}.weight": x
        for n, x in zip("AB", (a, b), strict=True)
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_rslora": True}
    write(tmp_path, {peft.CONFIG: config, peft.ARRAYS: arrays})
    backbone = backbones.load("vit_ti8_32").params
    method = Method(VIT, names(3), reparametrization=lora)
    own = peft.lora_from_peft(tmp_path, method, backbone)["lora"]
    there = lora.weights(backbone, jax.tree.map(jnp.asarray, own))["blocks_4"]["attn"]["qkv"]
    kernel = backbone["blocks_4"]["attn"]["qkv"]["kernel"]
    expected = kernel + 2 / np.sqrt(2) * (b @ a).T
    np.testing.assert_allclose(there["kernel"], expected, atol=1e-5)
    assert peft.classifier_from_peft(tmp_path) is None


@pytest.mark.parametrize(
    ("config", "rename", "message"),
    [
        ({"use_dora": True}, {}, "use_dora is True"),
        ({"bias": "all"}, {}, "bias is 'all'"),
        ({"peft_type": "LOHA"}, {}, "expected an object with the peft_type 'LORA'"),
        ({"r": None}, {}, "r is None, expected a number above 0"),
        ({}, {"layers.11": "layers.5"}, "module 'vit.layers.5.* has no product"),
        ({}, {"lora_A": "lora_magnitude"}, "no part of a plain LoRA"),
        ({}, {"layers.11.mlp.fc1.lora_A": "layers.11.mlp.fc3.lora_A"}, "lora_A of .* is missing"),
        ({}, {"classifier.bias": "classifier.weights"}, "no part of a plain LoRA"),
    ],
)
def test_adapters_of_another_kind_are_refused(config, rename, message, lora_folder):
    def renamed(arrays):
        for old, new in rename.items():
            arrays = {name.replace(old, new): array for name, array in arrays.items()}
        return arrays

    method, _, _, backbone = example("lora")
    changed(lora_folder, renamed, **config)
    with pytest.raises(UserError, match=message):
        peft.lora_from_peft(lora_folder, method, backbone)


def test_adapters_that_do_not_fit_are_refused(lora_folder):
    method, _, _, backbone = example("lora")
    lora = method.reparametrization
    low = low_rank.LoRA(lora.kernels, lora.changed_layers, 2, lora.parts, lora.fused)
    with pytest.raises(UserError, match="the rank of .* is 3, the method's 2; take a rank of 3"):
        peft.lora_from_peft(lora_folder, Method(VIT, names(3), reparametrization=low), backbone)
    with pytest.raises(UserError, match="only LoRA on a ViT"):
        peft.lora_from_peft(lora_folder, example("softtf")[0], backbone)
    changed(
        lora_folder, lambda arrays: {n: a[:, :2] if a.ndim == 2 else a for n, a in arrays.items()}
    )
    with pytest.raises(UserError, match=r"lora_B of .* are \(3, 2\) and .*, expected \(r, 192\)"):
        peft.lora_from_peft(lora_folder, method, backbone)
    changed(lora_folder, lambda arrays: {n: a * np.nan for n, a in arrays.items()})
    with pytest.raises(UserError, match="NaN"):
        peft.lora_from_peft(lora_folder, method, backbone)
    (lora_folder / peft.ARRAYS).write_bytes(b"\x00")
    with pytest.raises(UserError, match="can't be read"):
        peft.lora_from_peft(lora_folder, method, backbone)
    with pytest.raises(UserError, match="can't be read"):
        peft.lora_from_peft(lora_folder / "nowhere", method, backbone)


# Adapters of PEFT as tasks of a library.


@pytest.fixture(scope="module")
def pets():
    """18 training images and 6 to test, of three classes, a colour a class."""
    rng = np.random.default_rng(3)

    def split(count):
        labels = np.repeat(np.arange(3, dtype=np.int32), count)
        images = rng.integers(0, 60, (len(labels), 32, 32, 3)) + 90 * labels[:, None, None, None]
        return sources.InMemoryImages(np.minimum(images, 255).astype(np.uint8), labels)

    return sources.Dataset(split(6), split(2), NAMES)


LORA = Config(
    method="lora",
    backbone="vit_ti8_32",
    mask_layers=tuple(layer + 1 for layer in LAYERS),
    target_modules="+".join(MODULES),
    rank=3,
    prototype_features=20,
    eval_batch_size=16,
)


@contextmanager
def instead_of_others(pets):
    """Within, every data set is `pets`: not for longer, since other fixtures load the digits."""
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        hardly_optimized(),
    ):
        patch.setattr(sources, "load", lambda *_: pets)
        yield


@pytest.fixture(scope="module")
def imported_once(pets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    write(folder / "peft", {k.removeprefix("peft/"): v for k, v in example_files("lora").items()
                            if k.startswith("peft/")})  # fmt: skip
    opened = Library(folder / "library")
    with instead_of_others(pets):
        opened.import_lora("pets", folder / "peft", Data("pets", classes=NAMES), config=LORA)
    return opened, folder / "peft"


@pytest.fixture
def taken_in(imported_once, pets):
    """A library that took in the adapter that PEFT was given, and that adapter's folder."""
    with instead_of_others(pets):
        yield imported_once


def logits_of_task(root, name, images):
    """A library's logits of a task's classes, in the order of their names."""
    plain = export_lib.load(root, name)
    model, batching = plain.predictor.model, plain.predictor.batching
    tokens, _ = engine.encode(model, images, batching, queried=False)
    rows = engine.logits(model, tokens, engine.alone(np.zeros(len(images), int)), batching)
    return rows[:, [plain.columns[plain.class_names.index(name)] for name in NAMES]]


def test_what_peft_answered_an_imported_adapter_answers(taken_in, recorded, pets, tmp_path):
    opened, _ = taken_in
    ours = logits_of_task(opened.root, "pets", recorded["images"])
    np.testing.assert_allclose(ours, recorded["lora_peft"], rtol=0, atol=1e-5)
    version = opened.state().active["pets"]
    assert "the PEFT adapter" in version.origin and version.seconds == 0
    predictor = export_lib.load(opened.root, "pets").predictor
    model = predictor.model
    query = engine.queries(model.method, model.backbone, pets.train.images, predictor.batching)
    key = (query / np.linalg.norm(query, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(model.rows["key"][0], key, atol=1e-5)
    # Out again, and into another library.
    out = tmp_path / "out"
    assert main(["export", str(opened.root), "pets@1", str(out), "--format=peft"]) == 0
    other = Library(tmp_path / "other")
    config = from_settings(opened.state().config)
    other.import_lora("again", out, Data("pets", classes=NAMES), config=config)
    again = logits_of_task(other.root, "again", recorded["images"])
    np.testing.assert_allclose(again, ours, rtol=0, atol=1e-5)
    # A classifier whose rows are in another order than the task's classes, and none at all.
    changed(
        out,
        lambda arrays: {n: a[::-1].copy() if "classifier" in n else a for n, a in arrays.items()},
    )
    other.import_lora("again", out, Data("pets", classes=NAMES[::-1]), gate=Gate(100))
    turned = logits_of_task(other.root, "again@2", recorded["images"])
    np.testing.assert_allclose(turned, again, rtol=0, atol=1e-5)
    changed(out, lambda arrays: {n: a for n, a in arrays.items() if "classifier" not in n})
    version, _ = other.import_lora("again", out, Data("pets", classes=NAMES), gate=Gate(100))
    assert version.number == 3 and version.learned["given"] == 100  # colours are easy


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_a_fitted_classifier_tells_apart_what_features_do(classes):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), 20)
    features = rng.normal(size=(len(labels), 5)) + 6 * np.eye(3, 5)[labels]
    found = imported.fit(features, labels)
    logits = features @ found["kernel"] + found["bias"]
    assert logits.shape == (len(labels), classes)
    assert (logits.argmax(axis=1) == labels).all()


def new_names(name):
    """An array of a file of transformers as transformers 5 names its module."""
    name = name.replace("encoder.layer.", "layers.")
    for new, old in sorted(
        (pair for part in vit_export.MODULES.values() for pair in part),
        key=lambda pair: -len(pair[1]),
    ):
        if f".{old}." in name:
            return name.replace(old, new)
    return name


@pytest.mark.parametrize(
    ("kind", "rename"),
    [
        ("float32", lambda name: name),
        ("float16", lambda name: name.removeprefix("vit.")),
        (jnp.bfloat16, new_names),
        (jnp.bfloat16, lambda name: new_names(name).removeprefix("vit.")),
    ],
)
def test_an_adapters_own_base_model_is_known(kind, rename, lora_folder):
    """Whichever of transformers' names it has, and rounded to half precision."""
    backbone = backbones.load("vit_ti8_32")
    arrays = vit_export.to_hugging_face(backbone.params, example("lora")[2])
    base = {rename(name): array.astype(kind) for name, array in arrays.items()}
    assert len(base) == len(arrays)
    write(lora_folder / "base", {"model.safetensors": base})
    adapter, _ = imported.read(lora_folder, LORA, backbone, NAMES, NAMES)
    assert adapter["lora"]
    name = rename("vit.encoder.layer.11.attention.attention.key.bias")
    base[name] = base[name] + np.asarray(0.1, kind)
    write(lora_folder / "base", {"model.safetensors": base})
    with pytest.raises(UserError, match="another than this library's .*11.*key.bias differs"):
        imported.read(lora_folder, LORA, backbone, NAMES, NAMES)


def test_adapters_that_do_not_fit_a_library_are_refused(taken_in, tmp_path, monkeypatch):
    opened, folder = taken_in
    before = opened.state()

    def refused(message, arrays=lambda arrays: arrays, **config):
        shutil.rmtree(tmp_path / "peft", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "peft")
        changed(tmp_path / "peft", arrays, **config)
        with pytest.raises(UserError, match=message):
            opened.import_lora("pets", tmp_path / "peft", Data("pets", classes=NAMES))

    def wider(arrays):
        return {
            n: np.concatenate([a, a], axis=0 if "lora_A" in n else 1) if "lora" in n else a
            for n, a in arrays.items()
        }

    def of_a_narrower_model(arrays):
        return {n: a[:, :96] if "lora_A" in n else a for n, a in arrays.items()}

    def of_layer_5(arrays):
        return {n.replace("layers.11", "layers.5"): a for n, a in arrays.items()}

    def four_classes(arrays):
        return {n: a[[0, 1, 2, 0]] if "classifier" in n else a for n, a in arrays.items()}

    refused("the rank of .* is 6, the method's 3", wider)
    refused(r"expected \(r, 192\)", of_a_narrower_model)
    refused("module 'vit.layers.5.* has no product in this method", of_layer_5)
    refused("its classifier has 4 classes, and the data 3", four_classes)
    base = {"model.safetensors": vit_export.to_timm(backbones.load("vit_ti8_32").params, example(
        "lora")[2])}  # fmt: skip
    base["model.safetensors"]["cls_token"] = base["model.safetensors"]["cls_token"] + 0.1
    write(tmp_path / "base", base)
    named = {"base_model_name_or_path": str(tmp_path / "base")}
    refused("base model: .* is another .*cls_token differs", **named)
    changed(tmp_path / "peft", base_model_name_or_path=None)
    shutil.move(tmp_path / "base", tmp_path / "peft/base")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="base model: .* is another"):
        opened.import_lora("pets", "~/peft", Data("pets", classes=NAMES))
    with pytest.raises(UserError, match="ADAPTER: .* can't be read"):
        opened.import_lora("pets", tmp_path / "nothing", Data("pets", classes=NAMES))
    config = Config(method="softtf", backbone="vit_ti8_32")
    with pytest.raises(UserError, match="method: 'softtf' is this library's, and a LoRA of PEFT"):
        Library(tmp_path / "new").import_lora("x", folder, Data("pets"), config=config)
    assert opened.state() == before and not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def world(backbone):
    with (
        pytest.MonkeyPatch.context() as patch,
        tiny_world(backbone, patch) as few,
        hardly_optimized(),
    ):
        yield few


@pytest.fixture(scope="module")
def run_of(world, backbone, tmp_path_factory):
    """Runs of two tasks whose arrays are drawn, not trained."""
    folder = tmp_path_factory.mktemp("runs")

    def run(method, **settings):
        workdir = folder / method
        if not workdir.exists():
            config = tiny_config(method=method, tasks=2, **settings)
            write_run(workdir, config, backbone, world)
        return workdir

    return run


def write_run(workdir, config, backbone, dataset):
    method = registry.make_method(config, TINY, dataset.class_names, 5)
    record = RunRecord(
        settings=settings_lib.used_settings(config),
        backbone_sha256="0" * 64,
        dataset_sha256=dataset.fingerprint,
        tasks=None,
    )
    store = Store(workdir)
    store.claim(record, DEFAULTS)
    rng = np.random.default_rng(5)

    def spread(leaf):  # so that nothing is still what it starts as
        spread = leaf * rng.uniform(0.7, 1.3, leaf.shape) + rng.normal(0, 0.02, leaf.shape)
        return spread.astype(leaf.dtype)

    init_adapter, init_shared = jax.jit(method.init_adapter), jax.jit(method.init_shared)
    shared = jax.tree.map(spread, jax.device_get(init_shared(jax.random.key(2), backbone)))
    for task in range(2):
        drawn = jax.device_get(init_adapter(jax.random.key(task), backbone))
        adapter = jax.tree.map(spread, drawn)
        classes = tuple(range(5 * task, 5 * task + 5))
        empty = (
            *("seconds", "parameters", "bytes", "mask_distance_from_one"),
            *("weight_drift", "mask_density", "versions"),
        )
        manifest = TaskManifest(
            task=task,
            classes=classes,
            class_names=tuple(map(str, classes)),
            num_classes=10,
            num_tasks=2,
            config=dataclasses.asdict(config),
            backbone={},
            step_flops=None,
            metrics={
                key: [{"correct": 1, "total": 10, "identified": {}}] * (task + 1)
                for key in ("oracle/task_given", "per_sample/prototype")
            },
            **{name: {} for name in empty},
        )
        items = {"adapter": method.pack(adapter), "shared": shared, "statistics": {}, "memory": {}}
        store.save_task(task, items, manifest)
    store.close()


def given_logits(workdir, task, images):
    """The run's logits of the task's classes."""
    predictor = Predictor.load(workdir, task_id="oracle", batch_size=16)
    model, batching = predictor.model, predictor.batching
    tokens, _ = engine.encode(model, images, batching, queried=False)
    rows = engine.logits(model, tokens, engine.alone(np.full(len(images), task)), batching)
    return rows[:, model.task_of_class == task]


def plain_logits(arrays, images):
    """The logits of a file in timm's naming, which our own reading of it takes."""
    params, left_out = TINY.convert(arrays)
    assert left_out == ("head.bias", "head.weight")
    classifier = {"kernel": arrays["head.weight"].T, "bias": arrays["head.bias"]}
    return _tiny_logits(params, classifier, images)


@jax.jit
def _tiny_logits(params, classifier, images):
    pixels = augmentation.to_unit(augmentation.prepare_test(images, TINY.image_size))
    return TINY.classify(params, classifier, TINY.features(params, pixels))


@pytest.mark.parametrize(
    ("method", "settings"), [("softtf", {"mask_storage": "int8"}), ("lora", {}), ("ft", {})]
)
def test_a_runs_task_is_exported_as_it_answers(method, settings, run_of, world, tmp_path, capsys):
    run = run_of(method, **settings)
    assert main(["export", str(run), "2", str(tmp_path / "out"), "--format=timm"]) == 0
    assert "task 2 of" in capsys.readouterr().out
    arrays = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    images = world.test.images[:6]
    ours = given_logits(run, 1, images)
    np.testing.assert_allclose(plain_logits(arrays, images), ours, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["label_names"] == list("56789")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


def test_a_runs_task_has_a_number_and_a_name_also_when_it_is_a_library(run_of, tmp_path, capsys):
    run, found = tmp_path / "run", []
    shutil.copytree(run_of("softtf", mask_storage="int8"), run)

    def exported(task):
        out = tmp_path / f"out{len(found)}"
        assert main(["export", str(run), task, str(out), "--format=timm"]) == 0
        found.append(safetensors.numpy.load_file(out / "model.safetensors"))

    exported("2")
    exported("task2")
    Library(run).archive("task1")
    exported("2")
    exported("task2@1")
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])
    assert main(["export", str(run), "3", str(tmp_path / "no"), "--format=timm"]) == 1
    assert "there is no 'task3' in this library" in capsys.readouterr().err


def test_a_lora_task_goes_out_and_comes_back(run_of, world, tmp_path, backbone):
    run, out = run_of("lora"), tmp_path / "out"
    out.mkdir()  # empty: it is taken
    assert main(["export", str(run), "1", str(out), "--format=peft"]) == 0
    method = Predictor.load(run, [0], "oracle").model.method
    own = peft.lora_from_peft(out, method, backbone)["lora"]
    base = safetensors.numpy.load_file(out / "base/model.safetensors")
    np.testing.assert_array_equal(base["vit.embeddings.cls_token"], backbone["cls_token"])
    np.testing.assert_array_equal(
        base["vit.encoder.layer.3.attention.attention.key.weight"],
        backbone["blocks_3"]["attn"]["qkv"]["kernel"][:, 24:48].T,
    )
    weights = method.reparametrization.weights(backbone, jax.tree.map(jnp.asarray, own))
    merged = vit_export.to_timm(pytrees.merge(backbone, weights), peft.classifier_from_peft(out))
    images = world.test.images[:4]
    ours = given_logits(run, 0, images)
    np.testing.assert_allclose(plain_logits(merged, images), ours, rtol=0, atol=1e-5)


def test_prompts_are_left_out_when_told_so(run_of, world, tmp_path, capsys, monkeypatch):
    run = str(run_of("dualprompt+softtf"))
    assert main(["export", run, "1", str(tmp_path / "a"), "--format=hf"]) == 1
    error = capsys.readouterr().err
    assert "has prompts, which have no place in a plain ViT" in error
    assert error.count("\n") == 1
    command = ["export", run, "1", "--format=hf", "--without-prompts"]
    assert main([*command, str(tmp_path / "a")]) == 0
    told = capsys.readouterr().out
    plain = export_lib.load(run, 0, without_prompts=True)
    own = np.flatnonzero(world.test.labels < 5)
    images, labels = world.test.images[own], world.test.labels[own]
    ours = given_logits(run, 0, images).argmax(axis=1)
    theirs = plain_logits(vit_export.to_timm(plain.params, plain.classifier), images).argmax(axis=1)
    found = export_lib.agreement(plain, images, labels, prepared=False)
    assert found == (
        (ours == theirs).sum(),
        (ours == labels).sum(),
        (theirs == labels).sum(),
        len(own),
    )
    assert f"Of the task's {len(own)} test images, {100 * found.same / len(own):.1f}%" in told

    def gone(*_):
        raise UserError("data_dir: gone")

    monkeypatch.setattr(sources, "load", gone)
    assert main([*command, str(tmp_path / "b")]) == 0
    assert "could not be measured: data_dir: gone" in capsys.readouterr().out
    assert (tmp_path / "b/model.safetensors").is_file()


def test_what_is_no_plain_vit_is_refused(run_of, tmp_path, capsys):
    def refused(*arguments):
        assert main(["export", *map(str, arguments)]) == 1
        out, error = capsys.readouterr()
        assert (out, error.count("\n")) == ("", 1)
        return error

    run, out = run_of("softtf", mask_storage="int8"), tmp_path / "out"
    assert "3 is no finished task of" in refused(run, 3, out, "--format=timm")
    assert "finished are 1, 2" in refused(run, 9, out, "--format=timm")
    assert "TASK: '0' is not a whole number" in refused(run, 0, out, "--format=timm")
    assert "format: 'onnx' is unknown" in refused(run, 1, out, "--format=onnx")
    assert "'peft' is for lora" in refused(run, 1, out, "--format=peft")
    (tmp_path / "file").write_text("mine")
    assert "is not empty" in refused(run, 1, tmp_path, "--format=timm")
    assert "is a file; name a folder" in refused(run, 1, tmp_path / "file", "--format=timm")
    below = refused(run, 1, tmp_path / "file/out", "--format=timm")
    assert below.startswith(f"error: OUT: {tmp_path}/file/out can't be written (Not a directory)")
    assert (tmp_path / "file").read_text() == "mine"
    assert "holds no run" in refused(tmp_path, 1, out, "--format=timm")
    for method, message in (("adapter", "bottleneck"), ("clip+softtf", "of a CLIP")):
        other = tmp_path / method
        (other / "tasks/000").mkdir(parents=True)
        record = RunRecord(
            settings={"method": method}, backbone_sha256="", dataset_sha256="", tasks=None
        )
        text = json.dumps(formats.stamped("run", record.to_json()))
        (other / "config.json").write_text(text)
        assert message in refused(other, 1, out, "--format=timm")
    assert not out.exists()


def test_a_full_disk_is_one_error_and_leaves_nothing(run_of, tmp_path, capsys, monkeypatch):
    save = safetensors.numpy.save_file

    def save_on_a_full_disk(*arguments, **options):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            save(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(safetensors.numpy, "save_file", save_on_a_full_disk)
    run = run_of("softtf", mask_storage="int8")
    assert main(["export", str(run), "1", str(tmp_path / "out"), "--format=timm"]) == 1
    error = capsys.readouterr().err
    assert "OUT: " in error and "can't be written" in error and error.count("\n") == 1
    assert "; make room or mend the disk, or name another folder, and give the same" in error
    assert not list(tmp_path.iterdir())
