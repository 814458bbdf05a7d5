"""A LoRA of PEFT as a task: what its folder has not, made of the training images.

Its products are taken as they are. The task's key is the mean of q(x) / |q(x)|, which is where
training would bring it. Where the folder has no classifier, a logistic regression on the features
of the adapted network is fitted (scikit-learn's, with its defaults). Nothing else is trained.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from soft_jax import distributed, paths, pytrees
from soft_jax.config import Config
from soft_jax.errors import UserError
from soft_jax.experiment.run import Run
from soft_jax.methods import peft, registry
from soft_jax.methods.method import Adapter, Shared
from soft_jax.models import backbones, vit_export
from soft_jax.models.arrays import BadArray, from_safetensors

BASE = "model.safetensors"
_SAME = 1e-6  # by how much a base model's numbers may differ from the backbone's


def check_method(config: Config) -> None:
    """Raise UserError where the tasks of a method are no LoRAs, and nothing but that."""
    name = registry.parse(config.method).name
    if name != "lora":
        raise UserError(
            f"method: {name!r} is this library's, and a LoRA of PEFT is a task of 'lora'; take a "
            "library of that, or make one with --config=library:method=lora"
        )


def origin_of(folder: Path) -> str:
    """Say which adapter a folder holds: where, and the SHA-256 of both files together.

    Raises UserError where they can't be read.
    """
    digest = hashlib.sha256()
    for name in (peft.CONFIG, peft.ARRAYS):
        try:
            digest.update((folder / name).read_bytes())
        except OSError as error:
            raise UserError(
                f"ADAPTER: {paths.shown(folder / name)} can't be read ({error.strerror}); give the "
                "folder of a LoRA that PEFT saved"
            ) from error
    return f"the PEFT adapter {folder.absolute()}, SHA-256 {digest.hexdigest()}"


def read(
    folder: Path,
    config: Config,
    backbone: backbones.Backbone,
    given: Sequence[str],
    classes: Sequence[str],
) -> tuple[Adapter, Shared]:
    """Return what a task begins with that is the adapter in `folder`.

    That are its products and, if it has one, its classifier, whose rows are the classes `given`, in
    the order of `classes`. Raises UserError for an adapter of another kind, rank, shape or base
    model than fits.
    """
    method = registry.make_method(config, backbone.architecture, tuple(classes), len(classes))
    adapter = peft.lora_from_peft(folder, method, backbone.params)
    _check_base(folder, backbone)
    classifier = peft.classifier_from_peft(folder)
    if classifier is None:
        return adapter, {}
    dim, where = backbone.architecture.feature_dim, paths.shown(folder / peft.ARRAYS)
    kernel, bias = classifier["kernel"], classifier["bias"]
    if kernel.ndim != 2 or bias.shape != kernel.shape[1:] or len(kernel) != dim:
        raise UserError(
            f"{where}: its classifier's weight and bias are {kernel.T.shape} and {bias.shape}, "
            f"expected (classes, {dim}) and (classes,)"
        )
    if len(bias) != len(given):
        raise UserError(
            f"{where}: its classifier has {len(bias)} classes, and the data {len(given)}; name the "
            "classes that it is for, in its order, with --classes"
        )
    order = [list(given).index(name) for name in classes]
    return adapter, {"head": {"kernel": kernel[:, order], "bias": bias[order]}}


def _check_base(folder: Path, backbone: backbones.Backbone) -> None:
    """Raise UserError where the adapter's base model is at hand, and is not the backbone.

    It is in the folder's `base/`, as our own export puts it there, or where the adapter's config
    says. Names on a hub are not looked up.
    """
    named = peft.base_of(folder)
    for place in (folder / "base", *([Path(named)] if named else [])):
        file = place / BASE
        if file.is_file():
            break
    else:
        return
    try:
        theirs = from_safetensors(paths.read_bytes(file))
    except (OSError, safetensors.SafetensorError, BadArray) as error:
        raise UserError(f"base model: {paths.shown(file)} can't be read ({error})") from error
    dim = backbone.architecture.feature_dim
    blank = {"kernel": np.zeros((dim, 1)), "bias": np.zeros(1)}
    if "cls_token" in theirs:
        naming = vit_export.to_timm
    else:
        naming = vit_export.to_hugging_face
        theirs = {vit_export.hugging_face_name(name): array for name, array in theirs.items()}
    for name, ours in naming(backbone.params, blank).items():
        if name.startswith(("head.", "classifier.")):
            continue
        array = theirs.get(name)
        if array is None or array.shape != ours.shape or not _are_close(array, ours):
            raise UserError(
                f"base model: {paths.shown(file)} is another than this library's backbone ("
                f"{name} {'is missing' if array is None else 'differs'}); an adapter is of use on "
                "its own base model alone"
            )


def _are_close(theirs: np.ndarray, ours: np.ndarray) -> bool:
    """Whether two arrays are the same, but for the rounding of theirs to its type."""
    rounded = ours.astype(theirs.dtype).astype(np.float32)
    return bool(np.abs(theirs.astype(np.float32) - rounded).max() <= _SAME)


def finish(run: Run, adapter: Adapter, shared: Shared) -> dict[str, pytrees.Tree]:
    """Return adapter and shared part of a run's only task as training would have left them.

    `adapter` and `shared` are as drawn, with what `read` gave in its place.
    """
    query = np.asarray(run.train_query(0), np.float64)
    key = (query / np.linalg.norm(query, axis=1, keepdims=True)).mean(axis=0)
    adapter = adapter | {"key": key.astype(np.asarray(adapter["key"]).dtype)}
    if "head" not in run.start.shared:
        rows = run.members(0)
        # The network that will answer: masks may be stored in few bits.
        packed = run.method.pack(adapter, run.adapter_key(0))
        stored = run.method.unpack(packed, run.params)
        params = pytrees.merge(run.params, run.method.weights(run.params, stored))
        fitted = fit(run.features(rows, params), run.dataset.train.labels[rows])
        shared = shared | {"head": jax.tree.map(_like, fitted, shared["head"])}
    trained = {"adapter": adapter, "shared": shared}
    return distributed.to_global(trained, distributed.replicated(run.mesh))


def _like(array: np.ndarray, other: Any) -> np.ndarray:
    return array.astype(other.dtype)


def fit(features: np.ndarray, labels: np.ndarray) -> Mapping[str, np.ndarray]:
    """Return a classifier, {"kernel": [dim, classes], "bias": [classes]}, of features `[N, dim]`.

    `labels` int `[N]` count from 0, and each class has an image. It is a multinomial logistic
    regression on features of mean 0 and deviation 1, folded back.
    """
    count, features = int(labels.max()) + 1, np.asarray(features, np.float64)
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
    if count == 1:
        return {"kernel": np.zeros((features.shape[1], 1)), "bias": np.zeros(1)}
    from sklearn.linear_model import LogisticRegression  # few need it; it takes long to import

    fitted = LogisticRegression(max_iter=1000).fit((features - mean) / scale, labels)
    weight, bias = fitted.coef_, fitted.intercept_
    if count == 2:  # the second's, against the first
        weight = np.concatenate([np.zeros_like(weight), weight])
        bias = np.concatenate([np.zeros_like(bias), bias])
    kernel = weight.T / scale[:, None]
    return {"kernel": kernel, "bias": bias - mean @ kernel}
