"""Continual learners on a frozen backbone: what each trains, and how a task's adapter turns into a forward pass.

An adapter is a task's own pytree, `{"key": [dim], "prompt": [layers, 2, length, heads, head_dim], "mask": {...}}` (no "mask" for
DualPrompt); the shared part, `{"g_prompt": ..., "head": {"kernel": [dim, classes], "bias": [classes]}}`, is
trained by every task in turn.
"""

import dataclasses

import jax
import jax.numpy as jnp

from soft_jax import prompts, reparam, trees
from soft_jax.config import Config
from soft_jax.errors import UserError
from soft_jax.vit import Prefix, ViT, ViTConfig

Adapter = trees.Tree
Shared = trees.Tree


@dataclasses.dataclass(frozen=True)
class Method:
    """DualPrompt, with soft masks on `mask_paths` (none: plain DualPrompt). Hashable, so jit takes it as static.

    Layers count from 0.
    """

    vit: ViTConfig
    classes: int
    mask_paths: tuple[str, ...] = ()
    mask_init: str = "uniform"
    e_layers: tuple[int, ...] = ()
    e_length: int = 5
    g_layers: tuple[int, ...] = ()
    g_length: int = 5
    prefix_layout: str = "separate"

    @property
    def first_task_layer(self) -> int:
        """The first layer whose output depends on the task: everything before it is computed once for all tasks."""
        masked = [int(path.split("/")[0].removeprefix("blocks_")) for path in self.mask_paths]
        return min([*self.e_layers, *masked], default=self.vit.depth)

    def init_prompts(self, key: jax.Array) -> Adapter:
        """The part of a task's adapter that all tasks' identification needs, as it is drawn: key and E-prompt."""
        prompt_key, key_key, _ = jax.random.split(key, 3)
        return {
            "key": prompts.uniform(key_key, (self.vit.dim,)),
            "prompt": prompts.uniform(prompt_key, self._prompt_shape(self.e_layers, self.e_length)),
        }

    def init_adapter(self, key: jax.Array, backbone: trees.Tree) -> Adapter:
        """A task's adapter as it is drawn; `begin` tells what its training starts from."""
        adapter = self.init_prompts(key)
        if self.mask_paths:
            adapter["mask"] = reparam.init_masks(jax.random.split(key, 3)[2], backbone, self.mask_paths, self.mask_init)
        return adapter

    def init_shared(self, key: jax.Array) -> Shared:
        """G-prompts and the classifier before the first task; the classifier as timm draws it, N(0, 0.02²) and bias 0."""
        prompt_key, head_key = jax.random.split(key)
        kernel = 0.02 * jax.random.normal(head_key, (self.vit.dim, self.classes), jnp.float32)
        return {
            "g_prompt": prompts.uniform(prompt_key, self._prompt_shape(self.g_layers, self.g_length)),
            "head": {"kernel": kernel, "bias": jnp.zeros((self.classes,), jnp.float32)},
        }

    def _prompt_shape(self, layers: tuple[int, ...], length: int) -> tuple[int, ...]:
        return (len(layers), 2, length, self.vit.heads, self.vit.head_dim)

    def realize(
        self, backbone: trees.Tree, adapter: Adapter, shared: Shared, sources: jax.Array | None = None
    ) -> tuple[trees.Tree, dict[int, jax.Array]]:
        """Parameters and prefixes of a plain forward pass for the task of `adapter`.

        `sources` is `prompts.prefix_sources`' answer for the batch: None, or int `[B, 2]`.
        """
        prefix = prompts.prefixes(shared["g_prompt"], self.g_layers)
        return trees.merge(backbone, self.weights(backbone, adapter)), prefix | prompts.prefixes(adapter["prompt"], self.e_layers, sources)

    def weights(self, backbone: trees.Tree, adapter: Adapter) -> trees.Tree:
        """The parameters that the task of `adapter` changes, θ ⊙ m, as a subtree of the backbone; empty without masks."""
        return reparam.effective_weights(backbone, adapter["mask"]) if self.mask_paths else {}

    def query(self, backbone: trees.Tree, images: jax.Array) -> jax.Array:
        """q(x) `[B, dim]`: the [class] feature of the frozen, prompt-free backbone, for images in [0, 1]."""
        return ViT(self.vit).apply({"params": backbone}, images)

    def trunk(self, backbone: trees.Tree, shared: Shared, images: jax.Array) -> jax.Array:
        """Tokens `[B, N, dim]` before the first layer that depends on the task."""
        vit, params = ViT(self.vit), {"params": backbone}
        tokens = vit.apply(params, images, method="embed")
        prefix = prompts.prefixes(shared["g_prompt"], self.g_layers)
        return vit.apply(params, tokens, prefix, 0, self.first_task_layer, method="run_blocks")

    def logits(
        self,
        backbone: trees.Tree,
        adapter: Adapter,
        shared: Shared,
        tokens: jax.Array,
        sources: jax.Array | None = None,
    ) -> jax.Array:
        """Logits `[B, classes]` in float32 or wider, for the task of `adapter`, from what `trunk` returned."""
        return self.classify(*self.realize(backbone, adapter, shared, sources), shared, tokens)

    def classify(self, params: trees.Tree, prefix: Prefix, shared: Shared, tokens: jax.Array) -> jax.Array:
        """As `logits`, for parameters and prefixes that are at hand."""
        vit = ViT(self.vit)
        tokens = vit.apply({"params": params}, tokens, prefix, self.first_task_layer, method="run_blocks")
        features = vit.apply({"params": params}, tokens, method="pool")
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        return jnp.matmul(features, shared["head"]["kernel"], precision="highest") + shared["head"]["bias"][None]


def begin(initial: Adapter, previous: Adapter | None) -> Adapter:
    """The adapter that a task's training starts from: as drawn, with the previous task's E-prompt."""
    return initial if previous is None else initial | {"prompt": previous["prompt"]}


def from_config(config: Config, vit: ViTConfig, classes: int) -> Method:
    """The method that `config` names. Raises UserError for a layer that the ViT does not have."""
    for field in ("mask_layers", "e_prompt_layers", "g_prompt_layers"):
        for layer in getattr(config, field):
            if not 1 <= layer <= vit.depth:
                raise UserError(f"{field}: layer {layer} is not one of {config.backbone}'s layers 1 to {vit.depth}")
    masked = config.mask_layers if config.method == "softtf" else ()
    return Method(
        vit=vit,
        classes=classes,
        mask_paths=reparam.mask_paths(config.mask_weights.split("+"), _from_zero(masked)),
        mask_init=config.mask_init,
        e_layers=_from_zero(config.e_prompt_layers),
        e_length=config.e_prompt_length,
        g_layers=_from_zero(config.g_prompt_layers),
        g_length=config.g_prompt_length,
        prefix_layout=config.prefix_layout,
    )


def _from_zero(layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({layer - 1 for layer in layers}))
