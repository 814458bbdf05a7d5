"""The grammar of a config's `method`, and what each part of it is made of.

A method is a prompt host, a strategy and a reparametrization, each of which may be absent, joined
by "+" in any order: "dualprompt+pgp+softtf". Or it is one part that stands alone. To add a part,
write its class in a module of its kind, and its line here.
"""

import dataclasses
from collections.abc import Sequence

from soft_jax.config import Config, unknown_value
from soft_jax.errors import UserError
from soft_jax.methods.clip_hosts import SharedImagePrompt, TaskImagePrompt
from soft_jax.methods.hosts import L2P, DualPrompt, PromptHost
from soft_jax.methods.low_rank import Bottleneck, LoRA
from soft_jax.methods.masks import BinaryMask, SoftMask, SoftNet
from soft_jax.methods.method import Method
from soft_jax.methods.regularization import EWC, PGP, LwF
from soft_jax.methods.rehearsal import BiC, DERpp, ICaRL
from soft_jax.methods.reparametrization import Reparametrization
from soft_jax.methods.strategy import ContinualStrategy
from soft_jax.models.protocol import Architecture, Preprocessing

HOSTS: dict[str, type[PromptHost]] = {
    "dualprompt": DualPrompt,
    "l2p": L2P,
    "clip": SharedImagePrompt,
    "clipprompt": TaskImagePrompt,
}
STRATEGIES: dict[str, type[ContinualStrategy]] = {
    "pgp": PGP,
    "ewc": EWC,
    "lwf": LwF,
    "derpp": DERpp,
    "icarl": ICaRL,
    "bic": BiC,
}
REPARAMETRIZATIONS: dict[str, type[Reparametrization]] = {
    "softtf": SoftMask,
    "wsn": BinaryMask,
    "softnet": SoftNet,
    "lora": LoRA,
    "adapter": Bottleneck,
}
# What the published CLIP host takes off its images, torchvision's usual numbers for CIFAR-100.
CIFAR100 = Preprocessing((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))
HEAD, FINE_TUNING = "head", "ft"  # train the classifier alone, and the whole network


@dataclasses.dataclass(frozen=True)
class Parts:
    """A `method` taken apart: the name of each part, None where it is absent, and their classes."""

    host_name: str | None = None
    strategy_name: str | None = None
    reparametrization_name: str | None = None
    whole_network: bool = False

    @property
    def host(self) -> type[PromptHost]:
        """Return the prompt host's class."""
        return HOSTS[self.host_name] if self.host_name else PromptHost

    @property
    def strategy(self) -> type[ContinualStrategy] | None:
        """Return the strategy's class."""
        return STRATEGIES[self.strategy_name] if self.strategy_name else None

    @property
    def reparametrization(self) -> type[Reparametrization] | None:
        """Return the reparametrization's class."""
        name = self.reparametrization_name
        return REPARAMETRIZATIONS[name] if name else None

    @property
    def name(self) -> str:
        """Return the method's one spelling: host, strategy, reparametrization."""
        names = (self.host_name, self.strategy_name, self.reparametrization_name)
        named = "+".join(name for name in names if name)
        return named or (FINE_TUNING if self.whole_network else HEAD)

    @property
    def classes(self) -> tuple[type, ...]:
        """Return the classes of the parts that are there."""
        return tuple(x for x in (self.host, self.strategy, self.reparametrization) if x)

    @property
    def by_task(self) -> bool:
        """Whether tasks have something of their own, as `Method.by_task`."""
        return self.host.per_task or self.reparametrization is not None

    @property
    def queries(self) -> bool:
        """Whether q(x) chooses something, as `Method.queries`."""
        return self.by_task or self.host.pools

    @property
    def replaces_kernels(self) -> bool:
        """Whether tasks have kernels of their own, as `Method.replaces_kernels`."""
        return bool(self.reparametrization and self.reparametrization.replaces_kernels)

    def settings_used(self, config: Config) -> set[str]:
        """Return the fields of `config` that the parts use."""
        used = {*self.host.settings, *(self.strategy.settings if self.strategy else ())}
        if self.reparametrization:
            used.update(self.reparametrization.settings_used(config))
        return used


def stand_alone() -> tuple[str, ...]:
    """Return the names that no other joins."""
    fine_tuned = (name for name, strategy in STRATEGIES.items() if strategy.fine_tunes)
    return (HEAD, FINE_TUNING, *fine_tuned)


def parse(method: str) -> Parts:
    """Take a config's `method` apart. Raises UserError for what the grammar does not have."""
    names, alone = method.split("+"), stand_alone()
    known = {*alone, *HOSTS, *STRATEGIES, *REPARAMETRIZATIONS}
    if unknown := [name for name in names if name not in known]:
        raise UserError(unknown_value("method", unknown[0], sorted(known)))
    if (len(names) > 1 and set(names) & set(alone)) or len(set(names)) < len(names):
        raise UserError(
            f"method: {method!r}: {', '.join(alone)} stand alone, and a part is named once"
        )
    chosen: list[str | None] = []
    for group in (HOSTS, STRATEGIES, REPARAMETRIZATIONS):
        these = [name for name in names if name in group]
        if len(these) > 1:
            raise UserError(
                f"method: {method!r} names both {these[0]} and {these[1]}; one of them at most"
            )
        chosen.append(these[0] if these else None)
    parts = Parts(*chosen)
    fine_tunes = bool(parts.strategy and parts.strategy.fine_tunes)
    if parts.strategy and not fine_tunes and not parts.host_name:
        raise UserError(
            f"method: {method!r}: {parts.strategy_name} projects prompts, so it needs one of "
            f"{', '.join(HOSTS)}"
        )
    return dataclasses.replace(parts, whole_network=fine_tunes or method == FINE_TUNING)


def settings_of_parts() -> set[str]:
    """Return the fields of `Config` that some part of a method uses."""
    parts = (*HOSTS.values(), *STRATEGIES.values(), *REPARAMETRIZATIONS.values())
    return {name for part in parts for name in part.settings}


def make_method(
    config: Config,
    architecture: Architecture,
    class_names: Sequence[str],
    classes_at_once: int = 1,
) -> Method:
    """Make the method that `config` names, for a backbone and the names of all classes.

    `classes_at_once` is the number of the largest task's classes. Raises UserError for a layer,
    module or rank that the backbone does not have, and for a method that is not made for it.
    """
    parts = parse(config.method)
    if parts.host.reads_text != architecture.reads_text:
        raise UserError(_not_for(config, architecture))
    if config.normalization == "cifar100":
        architecture = dataclasses.replace(architecture, preprocessing=CIFAR100)
    parts.host.check_backbone(config, architecture)
    reparametrization = None
    if parts.reparametrization:
        parts.reparametrization.check_backbone(config, architecture)
        reparametrization = parts.reparametrization.from_config(config, architecture)
    host = parts.host.from_config(config)
    if host.reads_text:
        host.check_names(architecture, class_names)
    return Method(
        architecture=architecture,
        class_names=tuple(class_names),
        classes_at_once=classes_at_once,
        host=host,
        strategy=parts.strategy.from_config(config) if parts.strategy else None,
        reparametrization=reparametrization,
        trains_backbone=parts.whole_network,
    )


def _not_for(config: Config, architecture: Architecture) -> str:
    """Say that a method of a backbone that reads text is not for one that doesn't, or reversed."""
    suited = [name for name, host in HOSTS.items() if host.reads_text == architecture.reads_text]
    if architecture.reads_text:
        return (
            f"method: {config.method!r} has no use for the text encoder of {config.backbone}, "
            f"which is its classifier; begin with one of {', '.join(suited)}, such as "
            f"{suited[-1]}+softtf"
        )
    return (
        f"method: {config.method!r} needs a backbone that reads text, which {config.backbone} does "
        f"not; take clip_vit_b16, or one of {', '.join(suited)} in the method's place"
    )
