"""Parameter trees by path: nested dicts whose leaves are named "blocks_0/attn/qkv/kernel"."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

Tree = dict[str, Any]


def flatten(tree: Mapping) -> dict[str, Any]:
    """Flatten nested dicts into one dict keyed by path, in sorted order."""
    return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """Rebuild the nested dicts that `flatten` took apart."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def select(tree: Mapping, paths: Iterable[str]) -> Tree:
    """Return the subtree at `paths`.

    Raises KeyError naming the paths that the tree does not have.
    """
    leaves = flatten(tree)
    paths = list(paths)
    if missing := [path for path in paths if path not in leaves]:
        raise KeyError(f"no such parameters: {', '.join(missing)}")
    return unflatten({path: leaves[path] for path in paths})


def merge(tree: Mapping, overlay: Mapping) -> Tree:
    """Return `tree` with the leaves of `overlay` in the place of its own, or beside them."""
    return unflatten(flatten(tree) | flatten(overlay))


def count(tree: Any) -> int:
    """Return the number of scalars in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Return the size of a tree of arrays in bytes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def sha256(array: Any) -> str:
    """Return the hex SHA-256 of an array's dtype, shape and little-endian C-order bytes."""
    array = np.ascontiguousarray(array)
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()
