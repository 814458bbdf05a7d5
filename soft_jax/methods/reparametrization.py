"""Weight reparametrizations: what a task's own arrays do to the frozen parameters before the
forward pass.

A class derived from `Reparametrization` is one kind; they are in `masks` and `low_rank`. Products
and sums are taken in float32: bfloat16 steps by 0.004 near 1, which is where masks are. To add a
kind, write its class and its line in `registry.REPARAMETRIZATIONS`.

Nothing of an old task's arrays changes later, so none of them forgets by itself: see `method` for
what does.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from soft_jax import pytrees
from soft_jax.config import Config, unknown_value
from soft_jax.errors import UserError
from soft_jax.methods import prompts
from soft_jax.models.protocol import Architecture, check_layers

_LAYERS = {"vision": "mask_layers", "text": "text_mask_layers"}  # the setting, by tower
# The settings that say in which layers of which towers something is changed.
TOWER_SETTINGS = ("mask_towers", *_LAYERS.values())


class Reparametrization:
    """What a kind does unless it says otherwise; frozen dataclasses, so that jit takes them.

    `adapter_key` names its arrays in an adapter; `fixed` those among them that are kept but never
    trained. `kernels` are the paths of the parameters that they replace, `changed_layers` the
    layers of the vision tower, from 0, that then differ from the backbone's. `settings` names the
    fields of `Config` that it uses, `published_as` is its name in the paper's tables.
    """

    adapter_key: ClassVar[str]
    fixed: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ("target_modules", *TOWER_SETTINGS)
    published_as: ClassVar[str] = ""
    replaces_kernels: ClassVar[bool] = True  # what Gradient ID superposes
    splits_qkv: ClassVar[bool] = False  # whether it tells q, k and v apart, so that "qv" is one
    kernels: tuple[str, ...]
    changed_layers: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Config, architecture: Architecture) -> Self:
        """Make the kind from its settings, for a backbone."""
        return cls(*targets(config, architecture))

    @classmethod
    def settings_used(cls, config: Config) -> tuple[str, ...]:
        """Return the fields of `Config` that it uses beside these values of the others."""
        towers = config.mask_towers.split("+")
        idle = [name for tower, name in _LAYERS.items() if tower not in towers]
        return tuple(name for name in cls.settings if name not in idle)

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise UserError for settings that don't go together."""
        towers = config.mask_towers.split("+")
        if not set(towers) <= set(_LAYERS) or len(set(towers)) < len(towers):
            known = (*_LAYERS, "+".join(_LAYERS))
            raise UserError(unknown_value("mask_towers", config.mask_towers, known))

    @classmethod
    def check_backbone(cls, config: Config, architecture: Architecture) -> None:
        """Raise UserError for layers, modules or a rank that the backbone doesn't have."""
        for tower in config.mask_towers.split("+"):
            if tower not in architecture.towers:
                raise UserError(
                    f"mask_towers: {config.backbone} has no {tower} tower; it has "
                    f"{', '.join(architecture.towers)}"
                )
            name, depth = _LAYERS[tower], architecture.towers[tower]
            check_layers(name, getattr(config, name), depth, config.backbone)
        used = cls.settings_used(config)
        if "target_modules" in used:
            _check_modules(config, architecture, cls.splits_qkv)
        if "rank" in used and config.rank > architecture.dim:
            raise UserError(
                f"rank: {config.rank} is above the backbone's width, {architecture.dim}"
            )

    def init(self, key: jax.Array, backbone: pytrees.Tree) -> pytrees.Tree:
        """Draw a task's arrays."""
        raise NotImplementedError

    def weights(self, backbone: pytrees.Tree, own: pytrees.Tree) -> pytrees.Tree:
        """Return the parameters that take the place of the backbone's, or stand beside them."""
        raise NotImplementedError

    def pack(self, own: pytrees.Tree, key: jax.Array | None = None) -> pytrees.Tree:
        """Return a trained task's arrays as the store keeps them: as they are.

        `key` is the one that `init` drew them from; some kinds need it in some settings.
        """
        return own

    def unpack(self, packed: pytrees.Tree, backbone: pytrees.Tree) -> pytrees.Tree:
        """Return arrays that stand for the same weights, from what `pack` gave."""
        return packed


def targets(config: Config, architecture: Architecture) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the paths of the kernels that `config` names, and the vision tower's layers of them.

    Layers are counted from 0.
    """
    modules, by_tower = config.target_modules.split("+"), layers_by_tower(config)
    kernels = [
        path
        for tower, layers in by_tower.items()
        for path in architecture.kernel_paths(modules, layers, tower)
    ]
    return tuple(kernels), by_tower.get("vision", ())


def layers_by_tower(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the layers to be changed, counted from 0, of each tower that has any."""
    towers = config.mask_towers.split("+")
    return {
        tower: prompts.from_zero(getattr(config, name))
        for tower, name in _LAYERS.items()
        if tower in towers
    }


def _check_modules(config: Config, architecture: Architecture, splits_qkv: bool) -> None:
    modules = config.target_modules.split("+")
    for module in modules:
        if module not in architecture.modules:
            message = unknown_value("target_modules", module, architecture.modules)
            raise UserError(f"{message}, joined by '+'")
    if "qv" in modules and not splits_qkv:
        raise UserError(
            "target_modules: 'qv' is for lora, which treats q, k and v apart; take 'qkv'"
        )
    kernels = architecture.kernel_paths(modules, (0,))
    if len(set(kernels)) < len(kernels):
        raise UserError(f"target_modules: {config.target_modules!r} names weights twice")


Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def kaiming(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw as PyTorch draws a linear layer, kaiming_uniform(a=√5): U(-1/√in, 1/√in).

    `shape` is `[..., in, out]`.
    """
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def draw_for(
    key: jax.Array, backbone: pytrees.Tree, paths: tuple[str, ...], draw: Draw
) -> pytrees.Tree:
    """Draw an array for each kernel of `paths`.

    Raises KeyError naming the paths that the backbone does not have.
    """
    kernels = pytrees.flatten(pytrees.select(backbone, paths))
    keys = jax.random.split(key, len(kernels))
    by_shape: dict[tuple[int, ...], dict[str, jax.Array]] = {}
    for k, (path, kernel) in zip(keys, kernels.items(), strict=True):
        by_shape.setdefault(kernel.shape, {})[path] = k
    drawn: dict[str, jax.Array] = {}
    # Those of one shape together: a generator for each kernel takes XLA seconds to compile. The
    # numbers are the same.
    for shape, own in by_shape.items():
        same = jnp.stack(list(own.values()))
        drawn |= zip(own, jax.vmap(lambda k, shape=shape: draw(k, shape))(same), strict=True)
    return pytrees.unflatten({path: drawn[path] for path in kernels})
