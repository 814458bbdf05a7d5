"""Continual learners on a frozen backbone: what each trains, and how a task's adapter turns into
a forward pass.

A `Method` is put together from three parts, each of which may be absent:

- a prompt host: DualPrompt's prefixes or L2P's pool (`hosts`), or CLIP's image prompts with text
  contexts (`clip_hosts`);
- a reparametrization of chosen weights, a task's own (`masks`: soft masks, WSN, SoftNet;
  `low_rank`: LoRA, adapters);
- a strategy, which keeps something from older tasks (`regularization`: PGP, EWC, LwF;
  `rehearsal`: DER++, iCaRL, BiC).

A config's `method` joins their names: "dualprompt+softtf", "l2p+pgp+softtf", "lora". "head" trains
the classifier alone, "ft" the whole network. Joint training, the upper bound of any method, is the
method with one task of all classes. `registry` has the grammar.

An adapter is a task's own pytree, `{"key": [feature_dim], "prompt": [layers, 2, length, heads,
head_dim], "mask": {...}}` ("prompt" for DualPrompt; for `clipprompt` it is `[length, dim]`, and
CLIP's hosts add "context" `[classes_at_once or 1, length, text_dim]`; the last under the
reparametrization's `adapter_key`; empty where a method has nothing of a task's own). The shared
part is trained by every task in turn: `{"head": {"kernel": [feature_dim, classes], "bias":
[classes]}}`, with "g_prompt" for DualPrompt, "pool" `{"key": [size, feature_dim], "prompt": [size,
length, dim]}` for L2P, "image_prompt" `[length, dim]` for `clip`, and "weights", the whole
backbone, where that is trained. On CLIP its "head" is `{"text": [classes, feature_dim]}`: text
features of the classes, which no step trains; each task's are made once, of its contexts, when it
is finished.

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
from soft_jax.methods import prompts
from soft_jax.methods.hosts import FRONT, PromptHost
from soft_jax.methods.rehearsal import Rehearsal
from soft_jax.methods.reparametrization import Reparametrization
from soft_jax.methods.strategy import ContinualStrategy
from soft_jax.models.protocol import Architecture, Prefix

Adapter = pytrees.Tree
Shared = pytrees.Tree


@dataclasses.dataclass(frozen=True)
class Method:
    """A continual learner: what is trained and how it acts. Hashable, so jit takes it as static.

    `class_names` are those of all the classifier's columns, in order; a task has at most
    `classes_at_once` of them.
    """

    architecture: Architecture
    class_names: tuple[str, ...]
    classes_at_once: int = 1
    host: PromptHost = dataclasses.field(default_factory=PromptHost)
    strategy: ContinualStrategy | None = None
    reparametrization: Reparametrization | None = None
    trains_backbone: bool = False

    @property
    def num_classes(self) -> int:
        """Return the number of the classifier's columns."""
        return len(self.class_names)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Return the paths of the backbone's kernels that a task replaces by its own.

        Gradient ID superposes those.
        """
        return self.reparametrization.kernels if self.reparametrization else ()

    @property
    def text_kernels(self) -> tuple[str, ...]:
        """Return those of `kernels` that are the text tower's."""
        layer_of = self.architecture.layer_of
        return tuple(path for path in self.kernels if layer_of(path) is None)

    @property
    def replaces_kernels(self) -> bool:
        """Whether tasks have kernels of their own, which can be superposed."""
        return bool(self.kernels)

    @property
    def by_task(self) -> bool:
        """Whether a task has anything of its own, so that an image's task has to be identified."""
        return self.reparametrization is not None or self.host.per_task

    @property
    def queries(self) -> bool:
        """Whether anything is asked of q(x): by keys of tasks, or by those of a pool."""
        return self.by_task or self.host.pools

    @property
    def rehearsal(self) -> Rehearsal | None:
        """Return the strategy, if it keeps images of older tasks."""
        return self.strategy if isinstance(self.strategy, Rehearsal) else None

    @property
    def columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return what a training step needs of each image beside image, label and weight.

        Shapes are those of one image.
        """
        return self.rehearsal.columns(self.num_classes) if self.rehearsal else {}

    @property
    def first_task_layer(self) -> int:
        """Return the first layer whose output depends on the task.

        Everything before it is computed once for all tasks.
        """
        changed = self.reparametrization.changed_layers if self.reparametrization else ()
        return min([*self.host.task_layers, *changed], default=self.architecture.depth)

    @property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what is held of every task at once.

        That is its key and its prompt, and its text contexts where it has any.
        """
        shapes = {
            "key": (self.architecture.feature_dim,),
            "prompt": self.host.row_shape(self.architecture),
        }
        if self.host.reads_text:
            context = self.host.context_shape(self.architecture, self.classes_at_once)
            shapes["context"] = context
        return shapes

    def init_prompts(self, key: jax.Array) -> Adapter:
        """Draw the part of an adapter that is held of every task: key, prompt, text contexts."""
        prompt_key, key_key, _ = jax.random.split(key, 3)
        drawn = {}
        if self.by_task:
            drawn["key"] = prompts.uniform(key_key, self.row_shapes["key"])
        if self.host.reads_text:
            context_key = jax.random.fold_in(prompt_key, 1)
            drawn["context"] = self.host.init_context(
                context_key, self.architecture, self.classes_at_once
            )
        return drawn | self.host.init_task(prompt_key, self.architecture)

    def init_adapter(self, key: jax.Array, backbone: pytrees.Tree) -> Adapter:
        """Draw a task's adapter; `begin` tells what its training starts from."""
        adapter = self.init_prompts(key)
        if self.reparametrization:
            own = self.reparametrization.init(_own_key(key), backbone)
            adapter[self.reparametrization.adapter_key] = own
        return adapter

    def init_shared(self, key: jax.Array, backbone: pytrees.Tree) -> Shared:
        """Draw what all tasks train, as it is before the first."""
        prompt_key, head_key = jax.random.split(key)
        shared = {"head": self.architecture.init_classifier(head_key, self.class_names)}
        shared |= self.host.init_shared(prompt_key, self.architecture)
        if self.trains_backbone:
            shared["weights"] = jax.tree.map(jnp.asarray, backbone)
        return shared

    def init_memory(self, shared: Shared) -> pytrees.Tree:
        """Return what is kept of older tasks before the first; empty where nothing is."""
        return self.strategy.init(self, shared) if self.strategy else {}

    def before_task(self, memory: pytrees.Tree, shared: Shared) -> tuple[pytrees.Tree, Shared]:
        """Return what a task's steps get as `memory`, and the shared part that they start from.

        Both arguments are as they were stored after the task before.
        """
        return self.strategy.before_task(memory, shared) if self.strategy else (memory, shared)

    def realize(
        self,
        backbone: pytrees.Tree,
        adapter: Adapter,
        shared: Shared,
        sources: jax.Array | None = None,
    ) -> tuple[pytrees.Tree, Prefix]:
        """Return parameters and prefixes of a plain forward pass for the task of `adapter`.

        `sources` is the host's answer for the batch: None, or int `[B, 2]`.
        """
        prefix = {**self.host.shared_prefix(shared), **self.host.task_prefix(adapter, sources)}
        return pytrees.merge(backbone, self.weights(backbone, adapter)), prefix

    def weights(self, backbone: pytrees.Tree, adapter: Adapter) -> pytrees.Tree:
        """Return the parameters that the adapter's task changes or adds, θ ⊙ m for masks.

        They stand at their place in the backbone's tree.
        """
        if not self.reparametrization:
            return {}
        own = adapter[self.reparametrization.adapter_key]
        return self.reparametrization.weights(backbone, own)

    def with_own_classes(
        self, backbone: pytrees.Tree, adapter: Adapter, shared: Shared, class_mask: jax.Array
    ) -> Shared:
        """Return the shared part with the classifier that the task of `adapter` makes of text.

        Only the rows of its own classes, bool `[classes]`, are made, by its text contexts and its
        masks of the text tower. Where no text is read, `shared` is returned as it is.
        """
        if not self.host.reads_text:
            return shared
        params = pytrees.merge(backbone, self.weights(backbone, adapter))
        classes = self.classes_of(class_mask)
        rows = self.host.text_features(
            self.architecture,
            params,
            adapter["context"],
            self.class_names,
            jnp.minimum(classes, self.num_classes - 1),
        )
        text = shared["head"]["text"]
        text = text.at[classes].set(rows.astype(text.dtype), mode="drop")
        return shared | {"head": shared["head"] | {"text": text}}

    def classes_of(self, class_mask: jax.Array) -> jax.Array:
        """Return a task's classes in order, int `[classes_at_once]`, from bool `[classes]`.

        Behind them stands the number of all classes, which is no class.
        """
        return jnp.flatnonzero(class_mask, size=self.classes_at_once, fill_value=self.num_classes)

    def pack(self, adapter: Adapter, key: jax.Array | None = None) -> Adapter:
        """Return a trained adapter as the store keeps it.

        `key` is the one that `init_adapter` drew it from. Masks stored as a delta from their draw
        need it (ValueError without it), whatever their training began from.
        """
        if not self.reparametrization:
            return adapter
        name, own_key = self.reparametrization.adapter_key, None if key is None else _own_key(key)
        return adapter | {name: self.reparametrization.pack(adapter[name], own_key)}

    def packed_shapes(self, backbone: pytrees.Tree) -> Adapter:
        """Return shapes and dtypes of an adapter as the store keeps it."""
        return jax.eval_shape(
            lambda key, params: self.pack(self.init_adapter(key, params), key),
            jax.random.key(0),
            backbone,
        )

    def unpack(self, packed: Adapter, backbone: pytrees.Tree) -> Adapter:
        """Return the adapter, or the part of it, that `pack` gave.

        Raises UserError where a part that is drawn again, not stored, comes out otherwise.
        """
        if not self.reparametrization or self.reparametrization.adapter_key not in packed:
            return packed
        name = self.reparametrization.adapter_key
        return packed | {name: self.reparametrization.unpack(packed[name], backbone)}

    def trained_of_shared(self, shared: Shared) -> Shared:
        """Return the part of `shared` that steps train: all but a classifier made of text."""
        if not self.host.reads_text:
            return shared
        return {name: part for name, part in shared.items() if name != "head"}

    def count_fixed(self, adapter: Adapter) -> int:
        """Return how many of an adapter's numbers are kept but never trained."""
        if not self.reparametrization:
            return 0
        own = adapter[self.reparametrization.adapter_key]
        return pytrees.count([own[name] for name in self.reparametrization.fixed if name in own])

    def query(self, backbone: pytrees.Tree, images: jax.Array) -> jax.Array:
        """Return q(x) `[B, feature_dim]` of images in [0, 1]: the frozen feature, no prompts."""
        return self.architecture.features(backbone, images)

    def select(self, shared: Shared, query: jax.Array) -> jax.Array:
        """Return the pool's prompts for each image by itself, int `[B, top_k]`."""
        return self.host.select(self.host.similarity(shared, query))

    def trunk(
        self,
        backbone: pytrees.Tree,
        shared: Shared,
        images: jax.Array,
        selected: jax.Array | None = None,
    ) -> jax.Array:
        """Return tokens `[B, N, dim]` before the first layer that depends on the task.

        `selected`, int `[B, top_k]`, names a pool's prompts for each image; None: by `select`, each
        image by itself.
        """
        if self.host.pools and selected is None:
            selected = self.select(shared, self.query(backbone, images))
        params, pool = self._whole(backbone, shared), self.host.tokens(shared, selected)
        tokens = self.architecture.embed(params, images)
        if pool is not None:
            tokens = self.architecture.insert_prompts(params, tokens, pool)
        prefix, stop = self.host.shared_prefix(shared), self.first_task_layer
        prompts = self.host.prompt_tokens
        return self.architecture.run_blocks(params, tokens, prefix, 0, stop, prompts)

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
        """Return logits `[B, classes]` for the task of `adapter`, from what `trunk` returned.

        They are float32 or wider.
        """
        return self.classify(*self.realize(backbone, adapter, shared, sources), shared, tokens)

    def classify(
        self, params: pytrees.Tree, prefix: Prefix, shared: Shared, tokens: jax.Array
    ) -> jax.Array:
        """Return logits as `logits` does, for parameters and prefixes that are at hand."""
        features = self.features(params, prefix, shared, tokens)
        return self.head(self._whole(params, shared), shared, features)

    def features(
        self, params: pytrees.Tree, prefix: Prefix, shared: Shared, tokens: jax.Array
    ) -> jax.Array:
        """Return the features `[B, feature_dim]` that `classify` makes its logits of."""
        params, prompts = self._whole(params, shared), self.host.prompt_tokens
        start = self.first_task_layer
        if FRONT in prefix:
            tokens = self.architecture.insert_prompts(params, tokens, prefix[FRONT])
        tokens = self.architecture.run_blocks(params, tokens, prefix, start, None, prompts)
        return self.architecture.pool(params, tokens, prompts)

    def head(self, params: pytrees.Tree, shared: Shared, features: jax.Array) -> jax.Array:
        """Return logits `[B, classes]` in float32 or wider of features `[B, feature_dim]`.

        `params` are those that the features were computed with.
        """
        return self.architecture.classify(params, shared["head"], features)


def _own_key(key: jax.Array) -> jax.Array:
    """Return the key of the reparametrization's arrays, from that of the adapter."""
    return jax.random.split(key, 3)[2]


def begin(initial: Adapter, previous: Adapter | None) -> Adapter:
    """Return the adapter that a task's training starts from.

    It is as drawn, with the previous task's E-prompt in the place of its own, if there are any.
    """
    if previous is None or "prompt" not in initial:
        return initial
    return initial | {"prompt": previous["prompt"]}
