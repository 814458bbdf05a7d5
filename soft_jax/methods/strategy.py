"""What a continual strategy is: something kept of older tasks, so that training the next one harms
them less.

`regularization` keeps arrays, `rehearsal` images. To add one, write its class there and its line in
`registry.STRATEGIES`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax

from soft_jax import pytrees
from soft_jax.config import Config

if TYPE_CHECKING:
    from soft_jax.methods.method import Method

Batch = Mapping[str, Any]


class ContinualStrategy:
    """What a strategy does unless it says otherwise; frozen dataclasses, so that jit takes them.

    Its memory is a pytree that keeps its shapes from task to task and is stored with each task:
    `init` before the first, `update` after each. `before_task` makes of it what the training step
    gets as an argument, for `loss` and `project`.

    `fine_tunes`: it stands alone and trains the whole network; else it joins a prompt host.
    `settings` names the fields of `Config` that it uses, `published_as` is its name in the paper's
    tables.

    In the methods, `trainable` is `{"adapter": ..., "shared": ...}`. A batch holds `images` in
    [0, 1] `[N, H, W, 3]`, `labels` int `[N]` and `class_mask` bool `[classes]`, and in a step the
    `weights` `[N]` of `train_step.loss_fn`.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    published_as: ClassVar[str] = ""
    fine_tunes: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Make the strategy from its settings: none."""
        return cls()

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise UserError for settings that don't go together."""

    def check_classes(self, classes: int) -> None:
        """Raise UserError where the settings don't suit that many classes."""

    def init(self, method: "Method", shared: pytrees.Tree) -> pytrees.Tree:
        """Return the memory before the first task."""
        raise NotImplementedError

    def before_task(
        self, memory: pytrees.Tree, shared: pytrees.Tree
    ) -> tuple[pytrees.Tree, pytrees.Tree]:
        """Return what a task's steps get as `memory`, and the shared part that they start from.

        Both arguments are as stored; so are the results, unless a strategy says otherwise.
        """
        return memory, shared

    def loss(
        self,
        memory: pytrees.Tree,
        method: "Method",
        trainable: pytrees.Tree,
        backbone: pytrees.Tree,
        batch: Batch,
        logits: jax.Array,
    ) -> jax.Array | float:
        """Return what is added to the loss, a scalar: nothing.

        `logits` `[N, classes]` are the batch's.
        """
        return 0.0

    def project(self, memory: pytrees.Tree, method: "Method", grads: pytrees.Tree) -> pytrees.Tree:
        """Return gradients, shaped as `trainable`, as the optimizer gets them: as they are."""
        return grads

    def update(
        self,
        memory: pytrees.Tree,
        method: "Method",
        trainable: pytrees.Tree,
        backbone: pytrees.Tree,
        batch: Batch,
    ) -> pytrees.Tree:
        """Return the memory after one more task, from a batch of its images."""
        raise NotImplementedError
