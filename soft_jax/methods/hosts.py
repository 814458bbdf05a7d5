"""Prompt hosts: the prompts that a method trains beside its masks, and how images find theirs.

Each class is one host. To add one, write its class and its line in `registry.HOSTS`; what a class
leaves out is what `PromptHost`, which has no prompts at all, does.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from soft_jax import pytrees
from soft_jax.config import Config, unknown_value
from soft_jax.errors import UserError
from soft_jax.methods import prompts
from soft_jax.models.protocol import Architecture, Prefix, check_layers

if TYPE_CHECKING:
    from soft_jax.methods.method import Method

# Where a prefix of the method is not keys and values of a layer, but tokens `[B or 1, P, dim]` that
# stand behind the first, in front of layer 0.
FRONT = -1


@dataclasses.dataclass(frozen=True)
class PromptHost:
    """A host without prompts, and what a host does unless it says otherwise. Layers count from 0.

    `settings` names the fields of `Config` that it uses, `published_as` is its name in the paper's
    tables. `per_task`: each task has a prompt of its own, so that an image's task matters. `pools`:
    prompts are shared, and each image selects some by q(x). `reads_text`: it is for backbones that
    read text, and makes their classifier of the class names.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    published_as: ClassVar[str] = ""
    per_task: ClassVar[bool] = False
    pools: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Make the host from its settings."""
        return cls()

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise UserError for settings that don't go together."""

    @classmethod
    def check_backbone(cls, config: Config, architecture: Architecture) -> None:
        """Raise UserError for settings that the backbone has no place for."""

    @property
    def task_layers(self) -> tuple[int, ...]:
        """Return the layers whose output depends on the task's own prompt."""
        return ()

    @property
    def prompt_tokens(self) -> int:
        """Return how many tokens the host puts behind the first; features are then theirs."""
        return 0

    @property
    def depends_on_place(self) -> bool:
        """Whether an image's prefixes depend on its place in its batch (a published slip)."""
        return False

    def row_shape(self, architecture: Architecture) -> tuple[int, ...]:
        """Return the shape of a task's prompt, which is held of every task at once."""
        return (0,)

    def init_task(self, key: jax.Array, architecture: Architecture) -> pytrees.Tree:
        """Draw what a task has of its own: `{"prompt": ...}` of `row_shape`, or nothing."""
        return {}

    def init_shared(self, key: jax.Array, architecture: Architecture) -> pytrees.Tree:
        """Draw what all tasks train."""
        return {}

    def sources(self, positions: jax.Array, batch: jax.Array) -> jax.Array | None:
        """Return `prompts.prefix_sources` for images at `positions` int `[B]` of a batch."""
        return None

    def shared_prefix(self, shared: pytrees.Tree) -> Prefix:
        """Return the prefixes that all tasks have, by layer."""
        return {}

    def task_prefix(self, adapter: pytrees.Tree, sources: jax.Array | None) -> Prefix:
        """Return the prefixes of the adapter's task, by layer."""
        return {}

    def row_prefix(self, rows: jax.Array, sources: jax.Array | None) -> Prefix:
        """Return prefixes of a prompt of its own per image, `rows` `[B, *row_shape]`."""
        return {}

    def prefixes(
        self, shared: pytrees.Tree, rows: jax.Array, positions: jax.Array, batch: jax.Array
    ) -> Prefix:
        """Return all prefixes of images by layer: the shared ones, and of prompts `rows`
        `[B, *row_shape]`. `positions` and `batch`, int `[B]`, are as for `sources`.
        """
        own = self.row_prefix(rows, self.sources(positions, batch))
        return {**self.shared_prefix(shared), **own}

    def freeze(self, grads: pytrees.Tree, frozen: jax.Array) -> pytrees.Tree:
        """Return the shared part's gradients, 0 for what `freeze_g_prompt` keeps if `frozen`."""
        return grads

    # Hosts that read text only.

    def check_names(self, architecture: Architecture, class_names: Sequence[str]) -> None:
        """Raise UserError for class names that the backbone can't read."""

    def notes(self, class_names: Sequence[str]) -> tuple[str, ...]:
        """Return sentences for the user on the class names: nothing."""
        return ()

    def context_shape(self, architecture: Architecture, classes: int) -> tuple[int, ...]:
        """Return the shape of a task's text contexts, for tasks of at most so many classes."""
        raise NotImplementedError

    def init_context(self, key: jax.Array, architecture: Architecture, classes: int) -> jax.Array:
        """Draw a task's text contexts, float32 of `context_shape`."""
        raise NotImplementedError

    def text_features(
        self,
        architecture: Architecture,
        params: pytrees.Tree,
        context: jax.Array,
        class_names: tuple[str, ...],
        classes: jax.Array,
    ) -> jax.Array:
        """Return text features `[K, feature_dim]` of `classes` int `[K]` behind a task's contexts.

        `classes` are places in `class_names`.
        """
        raise NotImplementedError

    # Pools only.

    def similarity(self, shared: pytrees.Tree, query: jax.Array) -> jax.Array:
        """Return cos(q(x), k), `[B, size]`, of queries `[B, feature_dim]` with the pool's keys."""
        raise NotImplementedError

    def select(self, similarity: jax.Array) -> jax.Array:
        """Return the pool's prompts for each image by itself, int `[B, count]`."""
        raise NotImplementedError

    def select_together(self, selected: jax.Array, weights: jax.Array) -> jax.Array:
        """Return one selection for a batch, int `[B, count]`; `weights` `[B]` are 0 for padding."""
        raise NotImplementedError

    def tokens(self, shared: pytrees.Tree, selected: jax.Array | None) -> jax.Array | None:
        """Return the selected prompts as tokens `[B, prompt_tokens, dim]`."""
        return None

    # For PGP.

    def count_projectors(self) -> int:
        """Return how many bases PGP keeps for this host's prompts."""
        raise NotImplementedError

    def project(self, grads: pytrees.Tree, projector: jax.Array) -> pytrees.Tree:
        """Take the part in `projector` `[count_projectors, dim, dim]` off the prompts' gradients.

        `grads` is `{"adapter": ..., "shared": ...}`.
        """
        raise NotImplementedError

    def projection_inputs(
        self, method: "Method", trainable: pytrees.Tree, backbone: pytrees.Tree, images: jax.Array
    ) -> list[jax.Array]:
        """Return the tokens `[B, N, dim]` whose directions each basis holds."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class DualPrompt(PromptHost):
    """DualPrompt (Wang et al., 2022): prefixes of all tasks (G) and of each task (E).

    A prompt is `[layers, 2, length, heads, head_dim]`, keys then values. The shared part holds
    `g_prompt`, a task's own part `prompt`.
    """

    settings: ClassVar[tuple[str, ...]] = (
        "e_prompt_layers",
        "e_prompt_length",
        "g_prompt_layers",
        "g_prompt_length",
        "prefix_layout",
        "freeze_g_prompt",
    )
    published_as: ClassVar[str] = "DualPrompt"
    per_task: ClassVar[bool] = True
    e_layers: tuple[int, ...] = (9, 10, 11)
    e_length: int = 5
    g_layers: tuple[int, ...] = (0, 1)
    g_length: int = 5
    prefix_layout: str = "separate"

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Make the host from its settings."""
        return cls(
            prompts.from_zero(config.e_prompt_layers),
            config.e_prompt_length,
            prompts.from_zero(config.g_prompt_layers),
            config.g_prompt_length,
            config.prefix_layout,
        )

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise UserError for a layer that has both prompts, or an unknown layout."""
        if config.prefix_layout not in prompts.LAYOUTS:
            raise UserError(unknown_value("prefix_layout", config.prefix_layout, prompts.LAYOUTS))
        if both := set(config.e_prompt_layers) & set(config.g_prompt_layers):
            raise UserError(
                f"e_prompt_layers and g_prompt_layers both name layer {min(both)}; "
                "a layer takes one prompt"
            )

    @classmethod
    def check_backbone(cls, config: Config, architecture: Architecture) -> None:
        """Raise UserError for a layer that the backbone doesn't have."""
        for field in ("e_prompt_layers", "g_prompt_layers"):
            check_layers(field, getattr(config, field), architecture.depth, config.backbone)

    @property
    def task_layers(self) -> tuple[int, ...]:
        """Return the E-prompt's layers."""
        return self.e_layers

    @property
    def depends_on_place(self) -> bool:
        """Whether the layout is the published look-up's."""
        return self.prefix_layout == "interleaved"

    def row_shape(self, architecture: Architecture) -> tuple[int, ...]:
        """Return the shape of a task's E-prompt."""
        return self._shape(architecture, self.e_layers, self.e_length)

    def _shape(
        self, architecture: Architecture, layers: tuple[int, ...], length: int
    ) -> tuple[int, ...]:
        return (len(layers), 2, length, architecture.heads, architecture.head_dim)

    def init_task(self, key: jax.Array, architecture: Architecture) -> pytrees.Tree:
        """Draw a task's E-prompt from U(-1, 1)."""
        return {"prompt": prompts.uniform(key, self.row_shape(architecture))}

    def init_shared(self, key: jax.Array, architecture: Architecture) -> pytrees.Tree:
        """Draw the G-prompt from U(-1, 1)."""
        shape = self._shape(architecture, self.g_layers, self.g_length)
        return {"g_prompt": prompts.uniform(key, shape)}

    def sources(self, positions: jax.Array, batch: jax.Array) -> jax.Array | None:
        """Return which half of its E-prompt each image gets as keys and as values."""
        return prompts.prefix_sources(self.prefix_layout, positions, batch)

    def shared_prefix(self, shared: pytrees.Tree) -> Prefix:
        """Return the G-prompt by layer."""
        return prompts.prefixes(shared["g_prompt"], self.g_layers)

    def task_prefix(self, adapter: pytrees.Tree, sources: jax.Array | None) -> Prefix:
        """Return the E-prompt by layer."""
        return prompts.prefixes(adapter["prompt"], self.e_layers, sources)

    def row_prefix(self, rows: jax.Array, sources: jax.Array | None) -> Prefix:
        """Return each image's E-prompt by layer."""
        return prompts.row_prefixes(rows, self.e_layers, sources)

    def freeze(self, grads: pytrees.Tree, frozen: jax.Array) -> pytrees.Tree:
        """Return gradients of 0 for the G-prompt: Adam, new in each task, then leaves it alone."""
        return grads | {"g_prompt": jnp.where(frozen, 0, grads["g_prompt"])}

    def count_projectors(self) -> int:
        """Return the number of prompted layers: each has one basis."""
        return len(self.g_layers + self.e_layers)

    def project(self, grads: pytrees.Tree, projector: jax.Array) -> pytrees.Tree:
        """Project the key half of both prompts; values move freely, as in the published code."""
        adapter, shared = dict(grads["adapter"]), dict(grads["shared"])
        g_count = len(self.g_layers)
        shared["g_prompt"] = _project_keys(shared["g_prompt"], projector[:g_count])
        adapter["prompt"] = _project_keys(adapter["prompt"], projector[g_count:])
        return {"adapter": adapter, "shared": shared}

    def projection_inputs(
        self, method: "Method", trainable: pytrees.Tree, backbone: pytrees.Tree, images: jax.Array
    ) -> list[jax.Array]:
        """Return the attention queries of the prompted layers."""
        architecture, shared, found = method.architecture, trainable["shared"], {}

        def watch(call, args, kwargs, context):
            out = call(*args, **kwargs)
            if context.method_name == "__call__":
                layer = architecture.query_layer(context.module.path)
                if layer is not None:
                    found[layer] = out[..., : architecture.dim]
            return out

        with nn.intercept_methods(watch):
            tokens = method.trunk(backbone, shared, images)
            method.logits(backbone, trainable["adapter"], shared, tokens)
        last = architecture.depth - 1  # of whose queries only the first token's is used
        layers = self.g_layers + self.e_layers
        return [found[layer][:, :1] if layer == last else found[layer] for layer in layers]


def _project_keys(grads: jax.Array, projector: jax.Array) -> jax.Array:
    """Return gradients `[layers, 2, length, heads, head_dim]`, the keys' at right angles.

    `projector` is `[layers, dim, dim]`.
    """
    keys = grads[:, 0].reshape(grads.shape[0], grads.shape[2], -1)
    inside = jnp.einsum("lpd,lde->lpe", keys, projector.astype(keys.dtype), precision="highest")
    return grads.at[:, 0].set((keys - inside).reshape(grads[:, 0].shape))


def take_off(grads: jax.Array, projector: jax.Array) -> jax.Array:
    """Return gradients `[..., dim]` without their part in `projector` `[dim, dim]`."""
    return grads - jnp.matmul(grads, projector.astype(grads.dtype), precision="highest")


@dataclasses.dataclass(frozen=True)
class L2P(PromptHost):
    """L2P (Wang et al., 2022): a pool of prompts, of which each image gets those nearest to q(x).

    They stand behind the [class] token; features are the mean of theirs. The shared part holds
    `pool`: `{"key": [size, feature_dim], "prompt": [size, length, dim]}`.
    """

    settings: ClassVar[tuple[str, ...]] = ("pool_size", "top_k", "e_prompt_length")
    published_as: ClassVar[str] = "L2P"
    pools: ClassVar[bool] = True
    size: int = 10
    length: int = 5
    top_k: int = 5

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Make the host from its settings."""
        return cls(config.pool_size, config.e_prompt_length, config.top_k)

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise UserError where more prompts are selected than there are."""
        if config.top_k > config.pool_size:
            raise UserError(f"top_k: {config.top_k} is above pool_size, {config.pool_size}")

    @property
    def prompt_tokens(self) -> int:
        """Return the number of tokens of the selected prompts."""
        return self.top_k * self.length

    def init_shared(self, key: jax.Array, architecture: Architecture) -> pytrees.Tree:
        """Draw the pool from U(-1, 1)."""
        key_key, prompt_key = jax.random.split(key)
        pool = {
            "key": prompts.uniform(key_key, (self.size, architecture.feature_dim)),
            "prompt": prompts.uniform(prompt_key, (self.size, self.length, architecture.dim)),
        }
        return {"pool": pool}

    def similarity(self, shared: pytrees.Tree, query: jax.Array) -> jax.Array:
        """Return cos(q(x), k), `[B, size]`, of queries `[B, feature_dim]` with the pool's keys."""
        keys = shared["pool"]["key"]
        return prompts.similarity(query.astype(keys.dtype), keys)

    def select(self, similarity: jax.Array) -> jax.Array:
        """Return the nearest prompts for each image by itself, int `[B, top_k]`."""
        return prompts.nearest(similarity, self.top_k)

    def select_together(self, selected: jax.Array, weights: jax.Array) -> jax.Array:
        """Return the prompts that most images of a batch select, for all, int `[B, top_k]`."""
        return prompts.most_selected(selected, weights, self.size)

    def tokens(self, shared: pytrees.Tree, selected: jax.Array | None) -> jax.Array | None:
        """Return the prompts that `selected` int `[B, top_k]` names, `[B, prompt_tokens, dim]`."""
        prompt = shared["pool"]["prompt"]
        return prompt[selected].reshape(len(selected), self.prompt_tokens, prompt.shape[-1])

    def count_projectors(self) -> int:
        """Return 1: the pool has one basis."""
        return 1

    def project(self, grads: pytrees.Tree, projector: jax.Array) -> pytrees.Tree:
        """Project the pool's prompts."""
        pool = grads["shared"]["pool"]
        prompt = take_off(pool["prompt"], projector[0])
        shared = grads["shared"] | {"pool": pool | {"prompt": prompt}}
        return {"adapter": grads["adapter"], "shared": shared}

    def projection_inputs(
        self, method: "Method", trainable: pytrees.Tree, backbone: pytrees.Tree, images: jax.Array
    ) -> list[jax.Array]:
        """Return the embedded images."""
        return [method.architecture.embed(backbone, images)]
