"""What is drawn is the same in every version: a run that an older one began goes on from it."""

import hashlib

import jax
import numpy as np
import pytest

from soft_jax.experiment import run as run_lib
from soft_jax.methods import masks
from soft_jax.methods.method import Method
from tests.conftest import TINY, soft_masks, tiny_method

KERNELS, LAYERS = TINY.kernel_paths(("qkv", "proj"), (2, 3)), (2, 3)


def sha256(tree):
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("kind", "drawn"),
    [
        ("uniform", "16becb117e66a766307918664fb9f14c2f01f45044c3cb5a204b89c3da985c8f"),
        ("ones", "46c5e864144d98ea0b3bec8dd8dfbb5bb82d176f5931f0f547ff01a0facabb30"),
        ("xavier", "0ca344c169a7389c4a2b502fa9e9ead564e52501c7543f57eb27583ee81d64f5"),
        ("kaiming", "2d7a1cc31e97e2f9f73d39cab906187ebf382da19e560a33bc491d253d79df8e"),
        ("normal", "a1027cb92962efa8025df6243c8dfd4fc6248c8568d320897c4e0b596746fac3"),
        ("wsn", "fe8599a156337d9ebb0520eba59fb45e9b4245228998e172a62c5f7dd78d413d"),
        # A few of its small values have another last digit (3e-14) from jax 0.12 on.
        (
            "softnet",
            "1e905a6dff7ff31d8f9d6172972e2496909689a43f7298a282cb8e1d3eaef033 "
            "2e79003dc22e1d72e253683a494a1bfd9663d2184a19736ba7d09a66a8294f93",
        ),
    ],
)
def test_an_adapter_is_drawn_to_the_same_bits(kind, drawn, backbone):
    """Also in the one program, hardly optimized, that a run draws it by."""
    binary = {
        "wsn": masks.BinaryMask(KERNELS, LAYERS),
        "softnet": masks.SoftNet(KERNELS, LAYERS, soft=True),
    }
    method = tiny_method(reparametrization=binary.get(kind) or soft_masks(kind))
    key = jax.random.key(3)
    adapter = run_lib._drawing(Method.init_adapter)(method, key, backbone)
    assert sha256(adapter) in drawn.split()
    assert sha256(method.init_adapter(key, backbone)) == sha256(adapter)
    rows = run_lib._drawing(Method.init_prompts)(method, key)
    assert sha256(rows) == sha256({name: adapter[name] for name in rows})


def test_the_shared_part_is_drawn_to_the_same_bits(backbone):
    shared = tiny_method().init_shared(jax.random.key(3), backbone)
    assert sha256(shared) == "d277967bd448e20d77531e8828979417062ddf9b35fce5b2c91b4064d708909f"
