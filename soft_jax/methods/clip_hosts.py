"""Prompt hosts for backbones that read text (CLIP): image prompts, and text contexts as the
classifier.

A class is told by its text: context vectors, which are trained, in front of the class name and a
full stop. The classifier is the text features of all classes. Contexts are a task's own and frozen
with it, so a class's text feature is computed once, when its task is trained, and stays.

Each class is one host, with its line in `registry.HOSTS`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from soft_jax import pytrees
from soft_jax.config import Config
from soft_jax.errors import UserError
from soft_jax.methods.hosts import FRONT, PromptHost, take_off
from soft_jax.models.protocol import Architecture, Prefix

if TYPE_CHECKING:
    from soft_jax.methods.method import Method

CONTEXT_STD = 0.02  # of the normal distribution that contexts are drawn from (CoOp's)


@dataclasses.dataclass(frozen=True)
class SharedImagePrompt(PromptHost):
    """One image prompt for all tasks, and text contexts of each task: CLIP of Table 3.

    The image prompt, `[length, dim]` in the shared part, stands behind the [class] token in front
    of the vision tower's first layer, and every task trains it. A task has contexts `[K, n,
    text_dim]`: for K classes (as many as the largest task has), or one for all of them
    (`by_class` False, what the published host CLIP-PGP does).
    """

    settings: ClassVar[tuple[str, ...]] = (
        "image_prompt_length",
        "text_context",
        "text_context_length",
    )
    published_as: ClassVar[str] = "CLIP"
    reads_text: ClassVar[bool] = True
    length: int = 5
    by_class: bool = True
    context_length: int = 16

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Make the host from its settings."""
        return cls(
            config.image_prompt_length, config.text_context == "class", config.text_context_length
        )

    @classmethod
    def check_backbone(cls, config: Config, architecture: Architecture) -> None:
        """Raise UserError for contexts that leave no room for any class name."""
        # A name takes one token at least, and beside it are start, full stop and end.
        most = architecture.context_length - 4
        if config.text_context_length > most:
            raise UserError(
                f"text_context_length: {config.text_context_length} vectors leave no room for a "
                f"class name; {config.backbone} reads {architecture.context_length} tokens, so "
                f"take at most {most}"
            )

    def check_names(self, architecture: Architecture, class_names: Sequence[str]) -> None:
        """Raise UserError for a class name that does not fit behind the contexts."""
        for name in class_names:
            taken = architecture.tokenize([_sentence(name)], 0).shape[1]
            if (room := architecture.context_length - self.context_length) < taken:
                raise UserError(
                    f"class names: {name[:80]!r} takes {taken} tokens with its start, full stop "
                    f"and end; {self.context_length} context vectors leave {max(room, 0)} of "
                    f"{architecture.context_length}. Take a shorter name, or a lower "
                    "text_context_length"
                )

    def notes(self, class_names: Sequence[str]) -> tuple[str, ...]:
        """Return what a user should know of the class names: numbers say nothing."""
        numbers = [name for name in class_names if _is_number(name)]
        if not numbers:
            return ()
        return (
            f"class names: {len(numbers)} of {len(class_names)} are numbers, such as "
            f"{numbers[0]!r}; they say nothing to a text tower. Name the classes for better "
            "figures",
        )

    # The image prompt.

    def init_shared(self, key: jax.Array, architecture: Architecture) -> pytrees.Tree:
        """Draw the image prompt as the published host does, U(±1/√dim)."""
        return {"image_prompt": _image_prompt(key, self.length, architecture.dim)}

    def tokens(self, shared: pytrees.Tree, selected: jax.Array | None) -> jax.Array | None:
        """Return the image prompt as tokens `[1, length, dim]`."""
        return shared["image_prompt"][None]

    def count_projectors(self) -> int:
        """Return 1: the image prompt has one basis."""
        return 1

    def project(self, grads: pytrees.Tree, projector: jax.Array) -> pytrees.Tree:
        """Project the image prompt."""
        shared = grads["shared"]
        prompt = take_off(shared["image_prompt"], projector[0])
        return grads | {"shared": shared | {"image_prompt": prompt}}

    def projection_inputs(
        self, method: "Method", trainable: pytrees.Tree, backbone: pytrees.Tree, images: jax.Array
    ) -> list[jax.Array]:
        """Return the embedded images."""
        return [method.architecture.embed(backbone, images)]

    # Text.

    def context_shape(self, architecture: Architecture, classes: int) -> tuple[int, ...]:
        """Return the shape of a task's contexts, for tasks of at most so many classes."""
        return (classes if self.by_class else 1, self.context_length, architecture.text_dim)

    def init_context(self, key: jax.Array, architecture: Architecture, classes: int) -> jax.Array:
        """Draw a task's contexts from N(0, 0.02²), as the published host does."""
        shape = self.context_shape(architecture, classes)
        return CONTEXT_STD * jax.random.normal(key, shape, jnp.float32)

    def text_features(
        self,
        architecture: Architecture,
        params: pytrees.Tree,
        context: jax.Array,
        class_names: tuple[str, ...],
        classes: jax.Array,
    ) -> jax.Array:
        """Return the text features `[K, embed_dim]` of `classes` int `[K]`, behind a task's
        contexts.
        """
        ids = jnp.asarray(_ids(architecture, class_names, self.context_length))
        context = jnp.broadcast_to(context, (len(classes), *context.shape[1:]))
        return architecture.encode_text(params, ids[classes], context)


@dataclasses.dataclass(frozen=True)
class TaskImagePrompt(SharedImagePrompt):
    """An image prompt of each task's own, beside its key and text contexts: CLIP-Prompt.

    A task's own part holds `prompt`, `[length, dim]`. An image's task is identified by keys on the
    frozen image feature, as DualPrompt's.
    """

    published_as: ClassVar[str] = "CLIP-Prompt"
    per_task: ClassVar[bool] = True

    @property
    def task_layers(self) -> tuple[int, ...]:
        """Return the first layer: the prompt stands in front of it."""
        return (0,)

    def row_shape(self, architecture: Architecture) -> tuple[int, ...]:
        """Return the shape of a task's image prompt."""
        return (self.length, architecture.dim)

    def init_task(self, key: jax.Array, architecture: Architecture) -> pytrees.Tree:
        """Draw a task's image prompt, U(±1/√dim)."""
        return {"prompt": _image_prompt(key, self.length, architecture.dim)}

    def init_shared(self, key: jax.Array, architecture: Architecture) -> pytrees.Tree:
        """Draw nothing: tasks share no prompt."""
        return {}

    def tokens(self, shared: pytrees.Tree, selected: jax.Array | None) -> jax.Array | None:
        """Return None: no prompt stands in all tasks' images."""
        return None

    def task_prefix(self, adapter: pytrees.Tree, sources: jax.Array | None) -> Prefix:
        """Return the task's image prompt, `[1, length, dim]`."""
        return {FRONT: adapter["prompt"][None]}

    def row_prefix(self, rows: jax.Array, sources: jax.Array | None) -> Prefix:
        """Return each image's prompt, `[B, length, dim]`."""
        return {FRONT: rows}

    def project(self, grads: pytrees.Tree, projector: jax.Array) -> pytrees.Tree:
        """Project the task's image prompt."""
        adapter = grads["adapter"]
        return grads | {"adapter": adapter | {"prompt": take_off(adapter["prompt"], projector[0])}}


def _image_prompt(key: jax.Array, length: int, dim: int) -> jax.Array:
    bound = 1 / math.sqrt(dim)
    return jax.random.uniform(key, (length, dim), jnp.float32, -bound, bound)


def _is_number(name: str) -> bool:
    """Whether a class name is a number, also one such as "class 7"; or has no letter at all."""
    rest = re.sub(r"^(class|label|category)\b", "", name.replace("_", " ").strip().lower())
    return not any(sign.isalpha() for sign in rest)


def _sentence(class_name: str) -> str:
    return f"{class_name.replace('_', ' ')}."


@functools.lru_cache(maxsize=4)
def _ids(
    architecture: Architecture, class_names: tuple[str, ...], context_length: int
) -> np.ndarray:
    """Return the tokens of all class names behind their contexts, int32 `[classes, L]`."""
    return architecture.tokenize([_sentence(name) for name in class_names], context_length)
