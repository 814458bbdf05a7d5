"""A toy of everything that can be added, defined outside the package, in one run together.

`docs/extending.md` shows these pieces.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from soft_jax import pytrees
from soft_jax.config import Config
from soft_jax.data import scenarios, sources
from soft_jax.experiment import loop
from soft_jax.inference import rules
from soft_jax.inference.predictor import Predictor
from soft_jax.methods import registry
from soft_jax.methods.hosts import PromptHost
from soft_jax.methods.reparametrization import Reparametrization
from soft_jax.methods.strategy import ContinualStrategy
from soft_jax.models import backbones
from soft_jax.models.protocol import Architecture, Preprocessing


@dataclasses.dataclass(frozen=True)
class ColumnScale(Reparametrization):
    """A factor for each output of a kernel."""

    adapter_key: ClassVar[str] = "scale"
    kernels: tuple[str, ...]
    changed_layers: tuple[int, ...]

    def init(self, key, backbone):
        kernels = pytrees.flatten(pytrees.select(backbone, self.kernels))
        return pytrees.unflatten({path: jnp.ones(k.shape[1]) for path, k in kernels.items()})

    def weights(self, backbone, own):
        kernels = pytrees.select(backbone, self.kernels)
        return jax.tree.map(lambda kernel, scale: kernel * scale[None], kernels, own)


class LastLayerPrefix(PromptHost):
    """A prefix of length 2 for each task, in the last of two layers."""

    per_task: ClassVar[bool] = True

    @property
    def task_layers(self):
        return (1,)

    def row_shape(self, architecture):
        return (2, 2, architecture.heads, architecture.head_dim)

    def init_task(self, key, architecture):
        return {"prompt": jax.random.normal(key, self.row_shape(architecture), jnp.float32)}

    def task_prefix(self, adapter, sources):
        return {1: adapter["prompt"][None]}

    def row_prefix(self, rows, sources):
        return {1: rows}


class StayNear(ContinualStrategy):
    """A penalty on what the classifier moves away from where the task before left it."""

    fine_tunes: ClassVar[bool] = False

    def init(self, method, shared):
        return {"head": jax.tree.map(jnp.zeros_like, shared["head"])}

    def loss(self, memory, method, trainable, backbone, batch, logits):
        moved = jax.tree.map(
            lambda now, then: jnp.sum((now - then) ** 2),
            trainable["shared"]["head"],
            memory["head"],
        )
        return 1e-3 * sum(jax.tree.leaves(moved))

    def update(self, memory, method, trainable, backbone, batch):
        return {"head": trainable["shared"]["head"]}


class NearestMean(rules.TaskIdentityRule):
    """The task whose mean q(x) is nearest."""

    name = "nearest_mean"
    title: ClassVar[str] = "CIL per_sample, nearest mean"
    option: ClassVar[str] = "nearest_mean"
    keeps_statistics: ClassVar[bool] = True

    def identify(self, images):
        means = np.asarray(images.model.solved[self.name])
        distances = ((images.query[:, None] - means[None]) ** 2).sum(axis=2)
        return np.asarray(images.model.tasks)[distances.argmin(axis=1)]

    def statistics_shapes(self, classes):
        return {"mean_query": jax.ShapeDtypeStruct((DIM,), jnp.float32)}

    def statistics(self, query, labels, classes):
        return {"mean_query": jnp.asarray(query.mean(axis=0), jnp.float32)}

    def collector(self, num_classes):
        return Means()


class Means(rules.Collector):
    """The means of the tasks, in their order."""

    def __init__(self):
        self.means = []

    def add(self, classes, statistics):
        self.means.append(np.asarray(statistics["mean_query"]))

    def solve(self):
        return jnp.asarray(np.stack(self.means))


DIM = 8


class ToyBlock(nn.Module):
    """Add a dense layer's output of the tokens' mean, prefix included."""

    @nn.compact
    def __call__(self, x, prefix=None):
        mean = x.mean(axis=1, keepdims=True)
        if prefix is not None:
            keys_and_values = prefix.sum(axis=(1, 2)).reshape(-1, 1, DIM)
            mean = mean + keys_and_values.astype(x.dtype)
        return x + nn.tanh(nn.Dense(DIM, name="dense")(x + mean))


class ToyModule(nn.Module):
    """Four patches of 4 × 4 pixels, two blocks."""

    def setup(self):
        self.patches = nn.Conv(DIM, (4, 4), (4, 4), padding="VALID")
        self.blocks = [ToyBlock() for _ in range(2)]

    def embed(self, images):
        return self.patches(images).reshape(len(images), -1, DIM)

    def run_blocks(self, tokens, prefix=None, start=0, stop=None, prompts=0):
        for layer in range(2)[start:stop]:
            tokens = self.blocks[layer](tokens, (prefix or {}).get(layer))
        return tokens

    def pool(self, tokens, prompts=0):
        return tokens.mean(axis=1)

    def __call__(self, images):
        return self.pool(self.run_blocks(self.embed(images)))


@dataclasses.dataclass(frozen=True)
class ToyFamily(Architecture):
    """A backbone without attention, with colours of its own and a classifier by cosine."""

    image_size: int = 8
    dim: int = DIM
    depth: int = 2
    heads: int = 2
    dtype: str = "float32"
    preprocessing: ClassVar[Preprocessing] = Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    modules: ClassVar[Mapping[str, tuple[str, ...]]] = {"dense": ("dense",)}

    def module(self):
        return ToyModule()

    def block_path(self, layer, tower="vision"):
        return f"blocks_{layer}"

    def layer_of(self, path):
        return int(path[7]) if path.startswith("blocks_") else None

    def query_layer(self, path):
        return None

    def bottleneck_widths(self, layer, tower="vision"):
        return {}

    def init_classifier(self, key, class_names):
        return {"directions": jax.random.normal(key, (len(class_names), DIM), jnp.float32)}

    def classify(self, params, classifier, features):
        directions = classifier["directions"]
        norms = jnp.linalg.norm(directions, axis=1) * 10
        return features @ directions.T / norms[None]

    def convert(self, arrays):
        return pytrees.unflatten(arrays), ()

    def at_size(self, image_size):
        if image_size != self.image_size:
            raise ValueError("toys come in one size")
        return self

    def fit_size(self, params):
        return params


def stripes(data_dir):
    """Six classes of stripes: three colours, two directions."""
    rng, labels = np.random.default_rng(0), np.arange(120, dtype=np.int32) % 6
    images = rng.integers(0, 60, (120, 8, 8, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        bright = image[::2] if label % 2 else image[:, ::2]
        bright[..., label // 2] += 180
    split = sources.InMemoryImages(images, labels)
    names = tuple(f"{c} {d}" for c in ("red", "green", "blue") for d in ("down", "across"))
    return sources.Dataset(split.take(np.arange(90)), split.take(np.arange(90, 120)), names)


class Backwards(scenarios.ScenarioRule):
    """The last four classes first, then the other two."""

    @staticmethod
    def make(config, class_names) -> scenarios.Scenario:
        return scenarios.Scenario(len(class_names), ((5, 4, 3, 2), (1, 0)))


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """Register all of them, a line each."""
    monkeypatch.setitem(registry.REPARAMETRIZATIONS, "columnscale", ColumnScale)
    monkeypatch.setitem(registry.HOSTS, "lastlayer", LastLayerPrefix)
    monkeypatch.setitem(registry.STRATEGIES, "staynear", StayNear)
    monkeypatch.setitem(rules.RULES, "nearest_mean", NearestMean)
    monkeypatch.setitem(backbones.BACKBONES, "toy", backbones.Source(ToyFamily(), "toy.npz"))
    monkeypatch.setitem(sources.DATASETS, "stripes", stripes)
    monkeypatch.setitem(scenarios.SCENARIOS, "backwards", Backwards)
    params = ToyModule().init(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))["params"]
    np.savez(tmp_path / "toy.npz", **pytrees.flatten(params))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield {
            "backbone": "toy",
            "backbone_path": str(tmp_path / "toy.npz"),
            "dataset": "stripes",
            "scenario": "backwards",
            "method": "columnscale+lastlayer+staynear",
            "target_modules": "dense",
            "mask_layers": (2,),
            "batch_size": 10,
            "epochs": 8,
            "learning_rate": 1.0,
            "crop_scale": (0.8, 1.0),
            "prototype_features": 16,
            "validation": 0.2,
        }


def test_a_run_of_toys_alone(toys, tmp_path):
    manifests = loop.run(Config(**toys), tmp_path / "run", Console(quiet=True))
    assert [manifest.classes for manifest in manifests] == [(5, 4, 3, 2), (1, 0)]
    assert manifests[0].class_names == ("blue across", "blue down", "green across", "green down")
    assert manifests[-1].metrics.keys() == {
        "per_sample/prompt_id",
        "per_sample/gradient_id",
        "per_sample/prototype",
        "batch_vote/prompt_id",
        "batch_vote/gradient_id_7",
        "oracle/task_given",
        "per_sample/frozen_features",
        "oracle/frozen_features",
        "per_sample/nearest_mean",
    }
    assert manifests[-1].validation.keys() == manifests[-1].metrics.keys()
    assert "CIL per_sample, nearest mean" in (tmp_path / "run/report.md").read_text()
    config = (tmp_path / "run/config.json").read_text()
    assert '"lastlayer+staynear+columnscale"' in config
    rows = manifests[-1].metrics["oracle/task_given"]
    assert sum(row["correct"] for row in rows) > 0.6 * sum(row["total"] for row in rows)

    predictor = Predictor.load(
        tmp_path / "run", task_id="nearest_mean", backbone_path=toys["backbone_path"]
    )
    test = stripes("").test
    classes, _, networks, _ = predictor.predict(test.images)
    rows = manifests[-1].metrics["per_sample/nearest_mean"]
    assert (classes == test.labels).sum() == sum(row["correct"] for row in rows)
    assert (networks == np.where(test.labels < 2, 1, 0)).sum() == sum(
        row["task_correct"] for row in rows
    )


def test_a_run_of_toys_is_continued(toys, tmp_path):
    """What the toys keep is stored: stopped after a task, the second is the same to the bit."""
    whole = loop.run(Config(**toys), tmp_path / "whole", Console(quiet=True))

    class Stopped(Exception):
        pass

    def stop(task):
        raise Stopped

    hooks = loop.Hooks(before_evaluation=lambda task: stop(task) if task else None)
    with pytest.raises(Stopped):
        loop.run(Config(**toys), tmp_path / "run", Console(quiet=True), hooks=hooks)
    again = loop.run(Config(**toys), tmp_path / "run", Console(quiet=True))
    assert [manifest.metrics for manifest in again] == [manifest.metrics for manifest in whole]
    read = [report_hashes(tmp_path / name) for name in ("whole", "run")]
    assert read[0] == read[1]


def report_hashes(workdir):
    from soft_jax.store.folder import Reader

    return [Reader(workdir).load_task_manifest(task).sha256 for task in range(2)]


def test_the_page_shows_these_pieces():
    page = (Path(__file__).parent.parent / "docs/extending.md").read_text()
    code = Path(__file__).read_text()
    blocks = page.split("```python\n")[1:]
    assert len(blocks) >= 7
    for block in blocks:
        piece = block.split("```")[0].strip("\n")
        assert piece in code, f"docs/extending.md shows what isn't run:\n{piece}"
