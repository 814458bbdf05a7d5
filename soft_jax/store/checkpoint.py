"""Pytrees of arrays and a JSON manifest as one Orbax checkpoint, whole or not at all.

Orbax keeps no checksums, so a manifest carries the SHA-256 of every array, and of itself.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging as absl_logging
from jax.sharding import Sharding

from soft_jax import distributed, paths, pytrees
from soft_jax.errors import UserError
from soft_jax.paths import Place
from soft_jax.store import files

ADVICE = (
    "restore this folder from a copy, or move it and all later tasks away and give the same "
    "command again to retrain them"
)


def _checkpointer(items: Mapping[str, Any]) -> ocp.Checkpointer:
    # One directory an array (no OCDBT): damage then has a name.
    handlers = {name: ocp.PyTreeCheckpointHandler(use_ocdbt=False) for name in items}
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(**handlers, manifest=ocp.JsonCheckpointHandler())
    )


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Drop what Orbax logs within.

    Of every save it warns without a reason, and for a full disk it logs pages, which the error that
    it raises says in a line. Where logging was set to say more than warnings, it says all.
    """
    logger = absl_logging.get_absl_logger()

    def is_not_orbaxs(record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts

    if logger.getEffectiveLevel() >= logging.WARNING:
        logger.addFilter(is_not_orbaxs)
    try:
        yield
    finally:
        logger.removeFilter(is_not_orbaxs)


@contextlib.contextmanager
def _saving(path: Place) -> Iterator[None]:
    """Mark the checkpoint as not whole within, where it is saved under its own name."""
    if not distributed.is_primary():
        yield
        return
    with files.of(path).saving(path):
        yield


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return any pytree's leaves by dotted name, which is also each array's directory on disk."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def save(path: Place, items: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Save pytrees of jax arrays and a JSON manifest as one checkpoint, whole or not at all.

    The manifest gets the key "sha256": the hash of each array by "item/leaf". Raises UserError when
    it can't be written; nothing else on disk changes then.
    """
    # An item may be empty.
    named = {name: leaves for name, tree in items.items() if (leaves := named_leaves(tree))}
    hashes = {
        f"{name}/{leaf}": pytrees.sha256(array)
        for name, leaves in named.items()
        for leaf, array in leaves.items()
    }
    manifest = dict(manifest, sha256=hashes)
    manifest["manifest_sha256"] = _digest(manifest)
    args = {name: ocp.args.PyTreeSave(leaves) for name, leaves in named.items()}
    try:
        # Quiet also while what failed is removed, which Orbax's threads may still be writing.
        with _quiet_orbax(), _saving(path), _checkpointer(named) as checkpointer:
            checkpointer.save(
                os.fspath(path.absolute()),
                args=ocp.args.Composite(**args, manifest=ocp.args.JsonSave(manifest)),
            )
    # Orbax and TensorStore raise OSError, ValueError and their own for the same full disk
    except Exception as error:
        raise UserError(
            f"{path} could not be saved ({str(error).splitlines()[0][:300]}). Finished tasks are "
            "as they were; make room or mend the disk, and give the same command again"
        ) from error


def load_manifest(path: Place) -> dict[str, Any]:
    """Return a checkpoint's manifest as it was saved, with "sha256" of each array in it.

    It is read as the plain JSON that Orbax writes: setting up Orbax takes far longer than that, and
    a report reads one manifest a task. Raises UserError when it is missing or damaged.
    """
    try:
        manifest = json.loads(paths.read_bytes(path / "manifest" / "metadata"))
        expected = manifest.pop("manifest_sha256")
    except Exception as error:  # missing files, bad JSON, bad UTF-8: all mean the same
        raise UserError(
            f"{path}: the manifest can't be read ({type(error).__name__}); {ADVICE}"
        ) from error
    if _digest(manifest) != expected:
        raise UserError(
            f"{path}: the manifest does not have the SHA-256 it was saved with; {ADVICE}"
        )
    return manifest


def load_items(
    path: Place,
    hashes: Mapping[str, str],
    templates: Mapping[str, Any],
    sharding: Sharding,
    part: bool = False,
) -> dict[str, Any]:
    """Return items like `templates` (pytrees of arrays or shapes), placed by `sharding`, verified.

    `hashes` are those of the manifest, by "item/leaf". With `part`, a template may leave arrays of
    its item out: they are neither read nor verified. Raises UserError naming the array that is
    missing, of another shape, or not what was saved.
    """
    out, folder = {}, path.absolute()
    for item, template in templates.items():
        leaves = named_leaves(template)
        expected = {
            key.removeprefix(f"{item}/"): value
            for key, value in hashes.items()
            if key.startswith(f"{item}/")
        }
        if odd := sorted(
            leaves.keys() - expected.keys() if part else leaves.keys() ^ expected.keys()
        ):
            raise UserError(
                f"{path}: {item}/{odd[0]} is only in the "
                f"{'checkpoint' if odd[0] in expected else 'configured method'}"
            )
        # Looked at before the arrays are read: what changes meanwhile is hashed again next time.
        states = {name: files.of(path).state(folder / item / name) for name in leaves}
        arrays = _read(path, item, leaves)
        for name, array in arrays.items():
            key, state = (str(folder / item / name), expected[name]), states[name]
            known = state is not None and _verified.get(key) == state
            like = array.shape == leaves[name].shape and array.dtype == leaves[name].dtype
            if not like or not (known or pytrees.sha256(array) == expected[name]):
                raise UserError(
                    f"{path}: array {item}/{name} is not what was saved (its SHA-256 differs); "
                    f"{ADVICE}"
                )
            if state is not None:
                _verified[key] = state
        placed = distributed.to_global(arrays, sharding)
        out[item] = jax.tree.unflatten(
            jax.tree.structure(template), [placed[name] for name in leaves]
        )
    return out


def verify(path: Place) -> None:
    """Read every array of a checkpoint. Raises UserError naming one that is not what was saved."""
    for key, expected in load_manifest(path)["sha256"].items():
        item, _, name = key.partition("/")
        if pytrees.sha256(_read(path, item, [name])[name]) != expected:
            raise UserError(f"{path}: array {key} is not what was saved (its SHA-256 differs)")


# What this process has verified: by folder and hash, the state of an array's files. An array that
# is read again and again while predicting is hashed once, as long as its files stay as they were.
# Threads share it: one look-up or one entry is atomic in a dict.
_verified: dict[tuple[str, str], tuple] = {}


def _read(path: Place, item: str, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return arrays of an item as they are on disk. Raises UserError naming one that can't be read.

    By TensorStore, which is what Orbax reads with. Of a damaged array Orbax prints pages, some of
    them from its threads when it has raised already.
    """
    folder, there = path.absolute() / item, files.of(path)
    patience = there.patience()
    context = ts.Context(patience) if patience else None
    opened = {
        name: ts.open(
            {"driver": "zarr", "kvstore": there.kvstore(folder / name)},
            open=True,
            read=True,
            context=context,
        )
        for name in names
    }
    arrays = {}
    try:
        coming = {}
        for name, store in opened.items():
            coming[name] = store.result().read()
        for name, array in coming.items():
            arrays[name] = array.result()
    except Exception as error:  # TensorStore raises ValueError and more for what is damaged
        reason = str(error).splitlines()[0][:300]
        raise UserError(
            f"{path}: array {item}/{name} can't be read ({reason}); {ADVICE}"
        ) from error
    return arrays
