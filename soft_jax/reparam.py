"""Weight reparametrisations: what a task does to the frozen kernels before the forward pass."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from soft_jax import trees

WEIGHTS = {"qkv": ("attn/qkv",), "proj": ("attn/proj",), "mlp": ("mlp/fc1", "mlp/fc2")}
MASK_INITS = ("uniform", "ones")


def mask_paths(weights: Iterable[str], layers: Iterable[int]) -> tuple[str, ...]:
    """Paths of the masked kernels; `weights` from "qkv", "proj", "mlp", `layers` counted from 0. Biases are not masked."""
    names = [name for weight in weights for name in WEIGHTS[weight]]
    return tuple(f"blocks_{layer}/{name}/kernel" for layer in layers for name in names)


def init_masks(key: jax.Array, backbone: trees.Tree, paths: tuple[str, ...], kind: str) -> trees.Tree:
    """A float32 mask for each kernel of `paths`: drawn from U(0.99, 1) ("uniform", the published code's), or ones.

    Raises KeyError naming the paths that the backbone does not have.
    """
    kernels = trees.flatten(trees.select(backbone, paths))
    keys = jax.random.split(key, len(kernels))
    low = {"uniform": 0.99, "ones": 1.0}[kind]
    masks = {
        path: jax.random.uniform(k, kernel.shape, jnp.float32, low, 1) for k, (path, kernel) in zip(keys, kernels.items(), strict=True)
    }
    return trees.unflatten(masks)


def effective_weights(backbone: trees.Tree, masks: trees.Tree) -> trees.Tree:
    """The masked kernels alone, θ ⊙ m (Soft-TF, section 3).

    The product is taken in float32: bfloat16 steps by 0.004 near 1, which is where masks are.
    """
    kernels = trees.select(backbone, trees.flatten(masks))
    return jax.tree.map(jnp.multiply, kernels, masks)
