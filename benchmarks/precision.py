"""What bfloat16 changes: python -m benchmarks.precision WORKDIR --data_dir=DIR

WORKDIR is a float32 run of soft masks. Prints how many of its test images get another Prompt ID or
Gradient ID when the same networks compute in bfloat16, and how many of the bfloat16 products θ ⊙ m
one step of training, at the default learning rate, leaves as they were, to the bit.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from soft_jax import distributed, pytrees
from soft_jax.config import Config, from_settings
from soft_jax.data import sources
from soft_jax.experiment.run import step_config_of
from soft_jax.inference import engine, rules
from soft_jax.inference.predictor import Predictor
from soft_jax.methods.method import Method
from soft_jax.store.folder import Reader
from soft_jax.training import train_step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir")
    parser.add_argument("--data_dir", default="", help="where TFDS has its data set")
    parser.add_argument("--images", type=int, default=1000, help="of the test images, at most")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    config = from_settings(Reader(arguments.workdir).read_record().settings)
    predictor = Predictor.load(arguments.workdir, task_id="gradient")
    data = sources.load(config.dataset, arguments.data_dir)
    model, test = predictor.model, data.test
    chosen = np.arange(0, len(test.labels), -(-len(test.labels) // arguments.images))
    images = test.images[chosen]
    task = model.task_of_class[test.labels[chosen]]
    found = {dtype: identities(model, dtype, images) for dtype in ("float32", "bfloat16")}
    ways = zip(*found.values(), strict=True)
    print(f"{len(images)} test images, {len(model.tasks)} tasks")
    for name, (one, other) in zip(("Prompt ID", "Gradient ID"), ways, strict=True):
        print(
            f"  {name}: {np.mean(one != other):.1%} move; right {np.mean(one == task):.1%} "
            f"in float32, {np.mean(other == task):.1%} in bfloat16"
        )
    own = np.flatnonzero(model.task_of_class == model.tasks[0])
    rows = np.flatnonzero(np.isin(data.train.labels, own))[: config.batch_size]
    same = unchanged(in_dtype(model.method, "bfloat16"), config, model, data.train, rows)
    for path, (products, masks) in same.items():
        print(f"  {path}: {products:.1%} of the products stay, {masks:.1%} of the masks")


def in_dtype(method: Method, dtype: str) -> Method:
    """Return the method computed in `dtype`."""
    architecture = dataclasses.replace(method.architecture, dtype=dtype)
    return dataclasses.replace(method, architecture=architecture)


def identities(model: engine.Model, dtype: str, images: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the Prompt ID and the Gradient ID of each image by itself, int `[N]` each."""
    model = dataclasses.replace(model, method=in_dtype(model.method, dtype))
    batching = engine.Batching(distributed.data_mesh(), 64)
    found = []
    for start in range(0, len(images), batching.chunk):
        part = images[start : start + batching.chunk]
        tokens, query = engine.encode(model, part, batching, queried=True)
        batch = rules.ImageBatch(model, tokens, query, batching)
        found.append((batch.nearest, rules.GradientId().identify(batch)))
    return tuple(map(np.concatenate, zip(*found, strict=True)))


def unchanged(
    method: Method,
    config: Config,
    model: engine.Model,
    train: sources.InMemoryImages,
    rows: np.ndarray,
) -> dict[str, tuple[float, float]]:
    """Return, by kernel, the shares of products θ ⊙ m in bfloat16, and of masks, that a first step
    leaves as they were.
    """
    mesh = distributed.data_mesh()
    config = dataclasses.replace(config, learning_rate=Config().learning_rate)
    step_config = step_config_of(config, method, on_device=True)
    adapter = method.init_adapter(jax.random.key(config.seed), model.backbone)
    state = train_step.compile_init(step_config, mesh)(adapter, model.shared)
    batch = {
        "images": train.images[rows],
        "labels": train.labels[rows].astype(np.int32),
        "weights": np.ones(len(rows), np.float32),
        "class_mask": model.task_of_class == model.tasks[0],
        "freeze_g_prompt": np.bool_(False),
        "memory": {},
    }
    step = train_step.compile_step(step_config, mesh)
    after, _ = step(state, model.backbone, batch, train_step.stream(config.seed, "augment", 0))
    trained = after.trainable["adapter"]
    masks = [pytrees.flatten(tree["mask"]) for tree in (adapter, trained)]
    products = [
        {
            path: kernel.astype(jnp.bfloat16)
            for path, kernel in pytrees.flatten(method.weights(model.backbone, tree)).items()
        }
        for tree in (adapter, trained)
    ]
    return {
        path: (
            float(jnp.mean(products[0][path] == products[1][path])),
            float(jnp.mean(masks[0][path] == masks[1][path])),
        )
        for path in masks[0]
    }


if __name__ == "__main__":
    main()
