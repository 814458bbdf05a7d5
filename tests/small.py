"""The tiny backbone's first two layers, for tests that compile gradients of a whole network."""

import dataclasses

from soft_jax import pytrees
from tests.conftest import TINY

SMALL = dataclasses.replace(TINY, depth=2)


def first_two_layers(backbone: pytrees.Tree) -> pytrees.Tree:
    """Return the parameters of `SMALL` among those of `TINY`."""
    return {name: leaf for name, leaf in backbone.items() if name not in ("blocks_2", "blocks_3")}
