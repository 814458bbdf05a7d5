"""Continual learners on a frozen backbone: what each trains, and how a task's adapter turns into
a forward pass.

A `Method` is put together from three parts, each of which may be absent:

- prompts: DualPrompt's prefixes or L2P's pool (`prompts`);
- a reparametrisation of chosen weights, a task's own (`reparam`: soft masks, WSN, SoftNet, LoRA,
  adapters);
- what is kept from older tasks (`regularization`: PGP, EWC, LwF; `rehearsal`: DER++, iCaRL, BiC).

A config's `method` joins their names: "dualprompt+softtf", "l2p+pgp+softtf", "lora". "head" trains
the classifier alone, "ft" the whole network. Joint training, the upper bound of any method, is the
method with one task of all classes.

An adapter is a task's own pytree, `{"key": [dim], "prompt": [layers, 2, length, heads, head_dim],
"mask": {...}}` ("prompt" for DualPrompt only; the last under the name of the reparametrisation's
slot; empty where a method has nothing of a task's own). The shared part is trained by every task in
turn: `{"head": {"kernel": [dim, classes], "bias": [classes]}}`, with "g_prompt" for DualPrompt,
"pool" `{"key": [size, dim], "prompt": [size, length, dim]}` for L2P, and "weights", the whole
backbone, where that is trained.

What a method forgets comes from two places. With the task given, from the shared part alone: the
G-prompt, the pool, the weights; the classifier's columns of older classes only where those are
trained on again (`rehearsal`) or taught by the network before (LwF), since the loss is over the
task's classes otherwise. "head", "softtf" and "lora" alone share nothing else, and forget nothing
there. Without the task, every method also loses images to the classes, and the keys, of newer
tasks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from soft_jax import pytrees
from soft_jax.config import FINE_TUNED, STRATEGIES, Config
from soft_jax.errors import UserError
from soft_jax.methods import prompts, reparametrization
from soft_jax.methods.regularization import ContinualStrategy
from soft_jax.methods.rehearsal import Rehearsal
from soft_jax.methods.reparametrization import Reparametrization
from soft_jax.models.vit import Prefix, ViT, ViTConfig

Adapter = pytrees.Tree
Shared = pytrees.Tree


@dataclasses.dataclass(frozen=True)
class Method:
    """What is trained and how it acts. Hashable, so jit takes it as static.

    Layers count from 0. `pool_size` 0 is no pool; `e_length` 0 is no DualPrompt.
    """

    vit: ViTConfig
    classes: int
    reparam: Reparametrization | None = None
    strategy: ContinualStrategy | None = None
    e_layers: tuple[int, ...] = ()
    e_length: int = 0
    g_layers: tuple[int, ...] = ()
    g_length: int = 0
    prefix_layout: str = "separate"
    pool_size: int = 0
    pool_length: int = 5
    top_k: int = 5
    trains_backbone: bool = False

    @property
    def kernels(self) -> tuple[str, ...]:
        """Paths of the backbone's kernels that a task replaces by its own; Gradient ID
        superposes those.
        """
        return self.reparametrization.kernels if self.reparametrization else ()

    @property
    def by_task(self) -> bool:
        """Whether a task has anything of its own, so that an image's task has to be identified."""
        return self.reparametrization is not None or self.e_length > 0

    @property
    def rehearsal(self) -> Rehearsal | None:
        """The way of keeping images of older tasks, if the method has one."""
        return self.strategy if isinstance(self.strategy, Rehearsal) else None

    @property
    def columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What a training step needs of each image beside image, label and weight; shapes are
        those of one image.
        """
        return self.rehearsal.columns(self.classes) if self.rehearsal else {}

    @property
    def first_task_layer(self) -> int:
        """The first layer whose output depends on the task: everything before it is computed
        once for all tasks.
        """
        return min(
            [
                *self.e_layers,
                *(self.reparametrization.changed_layers if self.reparametrization else ()),
            ],
            default=self.vit.depth,
        )

    @property
    def prompt_tokens(self) -> int:
        """How many tokens L2P puts behind the [class] token."""
        return self.top_k * self.pool_length if self.pool_size else 0

    @property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is held of every task at once: its key, and its E-prompt, of no layers
        without DualPrompt.
        """
        return {"key": (self.vit.dim,), "prompt": self._prompt_shape(self.e_layers, self.e_length)}

    def init_prompts(self, key: jax.Array) -> Adapter:
        """The part of a task's adapter that all tasks' identification needs, as it is drawn:
        key, and DualPrompt's E-prompt.
        """
        prompt_key, key_key, _ = jax.random.split(key, 3)
        drawn = {"key": prompts.uniform(key_key, self.row_shapes["key"])} if self.by_task else {}
        return drawn | (
            {"prompt": prompts.uniform(prompt_key, self.row_shapes["prompt"])}
            if self.e_length
            else {}
        )

    def init_adapter(self, key: jax.Array, backbone: pytrees.Tree) -> Adapter:
        """A task's adapter as it is drawn; `begin` tells what its training starts from."""
        adapter = self.init_prompts(key)
        if self.reparametrization:
            adapter[self.reparametrization.adapter_key] = self.reparametrization.init(
                jax.random.split(key, 3)[2], backbone
            )
        return adapter

    def init_shared(self, key: jax.Array, backbone: pytrees.Tree) -> Shared:
        """What all tasks train, before the first; the classifier as timm draws it, N(0, 0.02²)
        and bias 0.
        """
        prompt_key, head_key = jax.random.split(key)
        kernel = 0.02 * jax.random.normal(head_key, (self.vit.dim, self.classes), jnp.float32)
        shared = {"head": {"kernel": kernel, "bias": jnp.zeros((self.classes,), jnp.float32)}}
        if self.e_length:
            shared["g_prompt"] = prompts.uniform(
                prompt_key, self._prompt_shape(self.g_layers, self.g_length)
            )
        if self.pool_size:
            pool_key, pool_prompt = jax.random.split(prompt_key)
            shared["pool"] = {
                "key": prompts.uniform(pool_key, (self.pool_size, self.vit.dim)),
                "prompt": prompts.uniform(
                    pool_prompt, (self.pool_size, self.pool_length, self.vit.dim)
                ),
            }
        if self.trains_backbone:
            shared["weights"] = jax.tree.map(jnp.asarray, backbone)
        return shared

    def init_memory(self, shared: Shared) -> pytrees.Tree:
        """What is kept of older tasks before the first, `shared` being as it is then; empty
        where nothing is.
        """
        return self.regularization.init(self, shared) if self.strategy else {}

    def before_task(self, memory: pytrees.Tree, shared: Shared) -> tuple[pytrees.Tree, Shared]:
        """What a task's steps get as `memory`, and the shared part that they start from, both
        being as stored after the task before.
        """
        return (
            self.regularization.before_task(memory, shared) if self.strategy else (memory, shared)
        )

    def _prompt_shape(self, layers: tuple[int, ...], length: int) -> tuple[int, ...]:
        return (len(layers), 2, length, self.vit.heads, self.vit.head_dim)

    def realize(
        self,
        backbone: pytrees.Tree,
        adapter: Adapter,
        shared: Shared,
        sources: jax.Array | None = None,
    ) -> tuple[pytrees.Tree, dict[int, jax.Array]]:
        """Parameters and prefixes of a plain forward pass for the task of `adapter`.

        `sources` is `prompts.prefix_sources`' answer for the batch: None, or int `[B, 2]`.
        """
        prefix = self.shared_prefix(shared)
        if self.e_length:
            prefix |= prompts.prefixes(adapter["prompt"], self.e_layers, sources)
        return pytrees.merge(backbone, self.weights(backbone, adapter)), prefix

    def weights(self, backbone: pytrees.Tree, adapter: Adapter) -> pytrees.Tree:
        """The parameters that the task of `adapter` changes or adds, θ ⊙ m for masks, by their
        place in the backbone's tree.
        """
        return (
            self.reparametrization.weights(backbone, adapter[self.reparametrization.adapter_key])
            if self.reparametrization
            else {}
        )

    def pack(self, adapter: Adapter) -> Adapter:
        """A trained adapter as the store keeps it."""
        if not self.reparametrization:
            return adapter
        return adapter | {
            self.reparametrization.adapter_key: self.reparametrization.pack(
                adapter[self.reparametrization.adapter_key]
            )
        }

    def unpack(self, packed: Adapter, backbone: pytrees.Tree) -> Adapter:
        """The adapter, or the part of it, that `pack` gave."""
        if not self.reparametrization or self.reparametrization.adapter_key not in packed:
            return packed
        return packed | {
            self.reparametrization.adapter_key: self.reparametrization.unpack(
                packed[self.reparametrization.adapter_key], backbone
            )
        }

    def fixed(self, adapter: Adapter) -> int:
        """How many of an adapter's numbers are kept but never trained."""
        return (
            pytrees.count(adapter[self.reparametrization.adapter_key].get("minor", {}))
            if self.reparametrization
            else 0
        )

    def shared_prefix(self, shared: Shared) -> dict[int, jax.Array]:
        """The prefixes that all tasks have: DualPrompt's G-prompt."""
        return prompts.prefixes(shared["g_prompt"], self.g_layers) if self.e_length else {}

    def query(self, backbone: pytrees.Tree, images: jax.Array) -> jax.Array:
        """q(x) `[B, dim]`: the [class] feature of the frozen, prompt-free backbone, for images
        in [0, 1].
        """
        return ViT(self.vit).apply({"params": backbone}, images)

    def pool_similarity(self, shared: Shared, query: jax.Array) -> jax.Array:
        """cos(q(x), k) of queries `[B, dim]` with the pool's keys, `[B, size]`."""
        return prompts.similarity(query.astype(shared["pool"]["key"].dtype), shared["pool"]["key"])

    def select(self, shared: Shared, query: jax.Array) -> jax.Array:
        """The pool's prompts for each image by itself, int `[B, top_k]`."""
        return prompts.nearest(self.pool_similarity(shared, query), self.top_k)

    def trunk(
        self,
        backbone: pytrees.Tree,
        shared: Shared,
        images: jax.Array,
        selected: jax.Array | None = None,
    ) -> jax.Array:
        """Tokens `[B, N, dim]` before the first layer that depends on the task.

        `selected`, int `[B, top_k]`, names the pool's prompts for each image; None: by `select`,
        each image by itself.
        """
        vit, params, pool = ViT(self.vit), {"params": self._whole(backbone, shared)}, None
        if self.pool_size:
            if selected is None:
                selected = self.select(shared, self.query(backbone, images))
            pool = shared["pool"]["prompt"][selected].reshape(
                len(images), self.prompt_tokens, self.vit.dim
            )
        tokens = vit.apply(params, images, pool, method="embed")
        return vit.apply(
            params,
            tokens,
            self.shared_prefix(shared),
            0,
            self.first_task_layer,
            self.prompt_tokens,
            method="run_blocks",
        )

    def _whole(self, params: pytrees.Tree, shared: Shared) -> pytrees.Tree:
        return shared["weights"] if self.trains_backbone else params

    def logits(
        self,
        backbone: pytrees.Tree,
        adapter: Adapter,
        shared: Shared,
        tokens: jax.Array,
        sources: jax.Array | None = None,
    ) -> jax.Array:
        """Logits `[B, classes]` in float32 or wider, for the task of `adapter`, from what
        `trunk` returned.
        """
        return self.classify(*self.realize(backbone, adapter, shared, sources), shared, tokens)

    def classify(
        self, params: pytrees.Tree, prefix: Prefix, shared: Shared, tokens: jax.Array
    ) -> jax.Array:
        """As `logits`, for parameters and prefixes that are at hand."""
        vit, params = ViT(self.vit), {"params": self._whole(params, shared)}
        tokens = vit.apply(
            params,
            tokens,
            prefix,
            self.first_task_layer,
            None,
            self.prompt_tokens,
            method="run_blocks",
        )
        return self.head(shared, vit.apply(params, tokens, self.prompt_tokens, method="pool"))

    def head(self, shared: Shared, features: jax.Array) -> jax.Array:
        """Logits `[B, classes]` in float32 or wider of features `[B, dim]`."""
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        return (
            jnp.matmul(features, shared["head"]["kernel"], precision="highest")
            + shared["head"]["bias"][None]
        )


def begin(initial: Adapter, previous: Adapter | None) -> Adapter:
    """The adapter that a task's training starts from: as drawn, with the previous task's
    E-prompt, if there are any.
    """
    return (
        initial
        if previous is None or "prompt" not in initial
        else initial | {"prompt": previous["prompt"]}
    )


def method_from_config(config: Config, vit: ViTConfig, classes: int) -> Method:
    """The method that `config` names. Raises UserError for a layer that the ViT does not have,
    or a rank that it can't have.
    """
    parts = config.method.split("+")
    layered = ["mask_layers"] if set(parts) & reparametrization.REPARAMETRIZATIONS.keys() else []
    for field in layered + (
        ["e_prompt_layers", "g_prompt_layers"] if "dualprompt" in parts else []
    ):
        for layer in getattr(config, field):
            if not 1 <= layer <= vit.depth:
                raise UserError(
                    f"{field}: layer {layer} is not one of {config.backbone}'s layers 1 to "
                    f"{vit.depth}"
                )
    settings = {}
    for part in parts:
        if part in reparametrization.REPARAMETRIZATIONS:
            settings["reparametrization"] = reparametrization.REPARAMETRIZATIONS[part](
                config, _from_zero(config.mask_layers)
            )
            reparametrization.check(settings["reparametrization"], vit)
        elif part in STRATEGIES:
            settings["strategy"] = STRATEGIES[part].from_config(config)
        elif part == "dualprompt":
            settings |= {
                "e_layers": _from_zero(config.e_prompt_layers),
                "e_length": config.e_prompt_length,
            }
            settings |= {
                "g_layers": _from_zero(config.g_prompt_layers),
                "g_length": config.g_prompt_length,
            }
            settings |= {"prefix_layout": config.prefix_layout}
        elif part == "l2p":
            settings |= {
                "pool_size": config.pool_size,
                "pool_length": config.e_prompt_length,
                "top_k": config.top_k,
            }
    settings["trains_backbone"] = config.method in FINE_TUNED
    return Method(vit=vit, classes=classes, **settings)


def _from_zero(layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({layer - 1 for layer in layers}))
