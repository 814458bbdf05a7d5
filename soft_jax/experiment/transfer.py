"""What one task's network is good for on another task's images.

A ridge regression on a network's features (Hoerl and Kennard, 1970; scikit-learn chooses its
strength by leave-one-out) names the classes of images that were held out of training. Its accuracy
with task i's network, less that with the frozen network, is what task i has to give to the task of
those images: above 0 it helps, below 0 it harms. No test image is looked at.
"""

import functools

import jax
import numpy as np

from soft_jax import pytrees
from soft_jax.data import scenarios, sources
from soft_jax.inference import engine
from soft_jax.inference.predictor import Predictor
from soft_jax.methods.method import Method, Shared

HELD_OUT = 0.25  # of each class's training images, which the probe is measured on
MOST = 400  # training images of a class that a probe looks at
STRENGTHS = tuple(10.0**power for power in range(-3, 5))  # of the ridge, to choose from


@functools.partial(jax.jit, static_argnames="method")
def _features(
    method: Method,
    backbone: pytrees.Tree,
    weights: pytrees.Tree,
    prompt: jax.Array,
    shared: Shared,
    tokens: jax.Array,
) -> jax.Array:
    prefix = {
        **method.host.shared_prefix(shared),
        **method.host.task_prefix({"prompt": prompt}, None),
    }
    return method.features(pytrees.merge(backbone, weights), prefix, shared, tokens)


def features(predictor: Predictor, images: np.ndarray, task: int | None) -> np.ndarray:
    """Return features `[N, feature_dim]` by the network of `task` of a predictor's model.

    None is the frozen network. `images` uint8 `[N, size, size, 3]` are at the model's size.
    """
    model, batching = predictor.model, predictor.batching
    if task is None:
        method, params = model.method, model.backbone
        return engine.queries(method, params, images, batching, prepared=True)
    out, weights = [], model.weights[task]
    for first in range(0, len(images), batching.chunk):
        part = images[first : first + batching.chunk]
        tokens, _ = engine.encode(model, part, batching, queried=False, prepared=True)
        for start, stop, size in batching.pieces(len(part)):
            rows = engine.take_rows(tokens, np.arange(start, stop), size, batching)
            found = _features(
                model.method,
                model.backbone,
                weights,
                model.rows["prompt"][task],
                model.shared,
                rows,
            )
            out.append(np.asarray(found)[: stop - start])
    return np.concatenate(out)


def probe(query: np.ndarray, labels: np.ndarray, seed: int = 0) -> float:
    """Return the accuracy, in percent, of a ridge regression on features `[N, dim]`.

    It is fitted on three quarters of each class's images, `labels` int `[N]`, and measured on the
    rest. With one class it is 100.
    """
    from sklearn.linear_model import RidgeClassifierCV  # few need it; it takes long to import

    if len(np.unique(labels)) < 2:
        return 100.0
    held = scenarios.hold_out(labels, HELD_OUT, seed)
    if not held.any():
        held = scenarios.hold_out(labels, 0.5, seed)
    query = np.asarray(query, np.float64)
    mean, scale = query[~held].mean(axis=0), query[~held].std(axis=0) + 1e-6
    query = (query - mean) / scale
    fitted = RidgeClassifierCV(STRENGTHS).fit(query[~held], labels[~held])
    return float(100 * (fitted.predict(query[held]) == labels[held]).mean())


def gains(predictor: Predictor, dataset: sources.Dataset) -> tuple[float, dict[str, float]]:
    """Return what each task's network of a predictor gives to the images of a data set.

    The first result is the probe's accuracy on the frozen network, in percent; the others, by task,
    are in points above it. Only training images are looked at.
    """
    train = dataset.first(MOST, 0).train
    size = predictor.model.method.architecture.image_size
    images, labels = train.prepared(np.arange(len(train.labels)), size), train.labels
    frozen = probe(features(predictor, images, None), labels)
    return frozen, {
        str(name): probe(features(predictor, images, task), labels) - frozen
        for task, name in zip(predictor.model.tasks, predictor.task_names, strict=False)
    }
