"""Every setting of a run, its default and its checks; `configs/*.py` and the command line fill
it.
"""

import ast
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from soft_jax.errors import UserError
from soft_jax.methods import prompts, regularization, rehearsal, reparametrization
from soft_jax.store import packing

HOSTS = ("dualprompt", "l2p")
STRATEGIES = (
    regularization.REGULARIZATION | rehearsal.REHEARSAL
)  # of keeping something from older tasks
FINE_TUNED = (
    "ft",
    *(name for name, way in STRATEGIES.items() if way.fine_tunes),
)  # methods that train the whole network
ALONE = ("head", *FINE_TUNED)  # whole methods; the other parts are joined
DTYPES = ("float32", "bfloat16")
# Settings that change where things are or how fast they go, never a figure: a run may be continued
# with others.
RUNTIME_FIELDS = (
    "data_dir",
    "backbone_path",
    "eval_batch_size",
    "weights_cache_mb",
    "checkpoint_every",
    "tensorboard",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Layers are named from 1, as the paper's tables do; learning rate is for a batch
    of 256 images.
    """

    name: str = "softtf"  # names the default workdir
    # Scenario
    dataset: str = (
        "cifar100"  # "digits", or a TFDS image classification set with the splits train and test
    )
    data_dir: str = ""  # where TFDS looks; empty: TFDS's own default
    tasks: int = 10  # 1 is joint training on all classes, the upper bound
    train_images_per_class: int = 0  # the first so many of each class; 0: all
    test_images_per_class: int = 0
    seed: int = 59
    # Frozen backbone
    backbone: str = "vit_b16"
    backbone_path: str = (
        ""  # the file, or the folder it is in; empty: bundled, cached or downloaded
    )
    image_size: int = 0  # pixels; 0: the backbone's own
    dtype: str = (
        "float32"  # of the computation; masks and their product with the weights are always float32
    )
    # Method
    # Joined by "+": dualprompt or l2p; pgp; one of softtf, wsn, softnet, lora, adapter. Or alone:
    # head, ft, ewc, lwf, derpp, icarl, bic.
    method: str = "dualprompt+softtf"
    mask_layers: tuple[int, ...] = (
        10,
        11,
        12,
    )  # that softtf, wsn, softnet, lora and adapter change
    target_modules: str = "qkv+proj"  # joined by "+": qkv, proj, mlp; for lora also qv
    mask_init: str = "uniform"  # U(0.99, 1); or ones, xavier, kaiming, normal (Table 5)
    # How the store keeps softtf's masks: or int8, int4 (steps by row), lowrank (of `rank`)
    mask_storage: str = "float32"
    density: float = 0.9  # the share c of each kernel that wsn and softnet keep
    rank: int = 4  # of lora's products, adapter's bottlenecks and lowrank's masks
    pool_size: int = 10  # l2p's prompts, each e_prompt_length long
    top_k: int = 5  # of them for an image
    ewc_strength: float = 1000.0  # λ of ewc's penalty
    lwf_strength: float = 1.0  # λ of lwf's
    buffer_size: int = (
        1000  # images of older tasks, of all together, that derpp, icarl and bic keep
    )
    e_prompt_layers: tuple[int, ...] = (10, 11, 12)
    e_prompt_length: int = 5
    g_prompt_layers: tuple[int, ...] = (1, 2)
    g_prompt_length: int = 5
    prefix_layout: str = "separate"  # "interleaved" reproduces the published prompt look-up
    key_loss_weight: float = 1.0  # λ of the key-matching term
    # Train with q(x) of the whole image, computed once, not of each crop as the paper does
    cache_queries: bool = False
    # Train the G-prompt in the first task only; the paper trains it on, and old tasks drift with it
    freeze_g_prompt: bool = False
    # Training
    epochs: int = 20
    batch_size: int = 24  # over all devices
    learning_rate: float = 0.03  # × batch_size / 256
    clip_norm: float = 1.0
    crop_scale: tuple[float, float] = (
        0.05,
        1.0,
    )  # of the image's area; (1, 1) with crop_ratio (1, 1): no crop
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    # Evaluation: "per_sample", "batch_vote" (the published one) and "oracle" are always reported
    # together
    # Images of a test batch that batch_vote's Gradient ID looks at, a row for each number; 0: all.
    shots: tuple[int, ...] = (7,)
    eval_batch_size: int = 256  # of the forward passes; no figure depends on it
    # Of the devices' memory for tasks' θ ⊙ m; what does not fit is read from the workdir again
    weights_cache_mb: int = 1024
    # Random features M of q(x) for prototype task identity; a task keeps 2 M² bytes of statistics
    prototype_features: int = 2000
    # Running
    checkpoint_every: int = 500  # steps between saves inside a task
    tensorboard: bool = False  # needs tensorboardX

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not _has_type(value := getattr(self, field.name), field.type):
                raise UserError(f"{field.name}: {value!r} is not {_type_name(field.type)}")
        self._check_method()
        self._one_of("prefix_layout", prompts.LAYOUTS)
        self._one_of("mask_init", reparametrization.MASK_INITS)
        self._one_of("dtype", DTYPES)
        self._one_of("mask_storage", packing.STORED_AS)
        self._check_mask_weights()
        for field in (
            "tasks",
            "epochs",
            "batch_size",
            "eval_batch_size",
            "checkpoint_every",
            "e_prompt_length",
            "g_prompt_length",
            "prototype_features",
            "rank",
            "pool_size",
            "top_k",
            "buffer_size",
        ):
            self._at_least(field, 1)
        for field in ("learning_rate", "clip_norm"):
            self._at_least(field, 1e-12)
        for field in (
            "image_size",
            "key_loss_weight",
            "seed",
            "weights_cache_mb",
            "train_images_per_class",
            "test_images_per_class",
            "ewc_strength",
            "lwf_strength",
        ):
            self._at_least(field, 0)
        if min(self.shots) < 0 or len(set(self.shots)) < len(self.shots):
            raise UserError(
                f"shots: {self.shots!r} are not different numbers of images, each 0 (all) or more"
            )
        if not 0 < self.density <= 1:
            raise UserError(f"density: {self.density} is not a share above 0 and at most 1")
        if self.top_k > self.pool_size:
            raise UserError(f"top_k: {self.top_k} is above pool_size, {self.pool_size}")
        for field in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, field)
            if not 0 < low <= high:
                raise UserError(f"{field}: {(low, high)} is not a range above 0")
        if self.seed >= 2**31:
            raise UserError(f"seed: {self.seed} is not below 2**31")
        both = set(self.e_prompt_layers) & set(self.g_prompt_layers)
        if both and "dualprompt" in self.method:
            raise UserError(
                f"e_prompt_layers and g_prompt_layers both name layer {min(both)}; a layer takes "
                "one prompt"
            )

    def _check_mask_weights(self) -> None:
        weights = self.target_modules.split("+")
        for weight in weights:
            if weight not in reparametrization.WEIGHTS:
                raise UserError(
                    f"target_modules: {weight!r} is unknown; join any of "
                    f"{', '.join(reparametrization.WEIGHTS)} with '+'"
                )
        if len(set(weights)) < len(weights) or {"qv", "qkv"} <= set(weights):
            raise UserError(f"target_modules: {self.target_modules!r} names weights twice")
        if "qv" in weights and "lora" not in self.method.split("+"):
            raise UserError(
                "target_modules: 'qv' is for lora, which treats q, k and v apart; take 'qkv'"
            )

    def _check_method(self) -> None:
        parts, joined = (
            self.method.split("+"),
            (
                HOSTS,
                tuple(name for name in STRATEGIES if name not in ALONE),
                tuple(reparametrization.REPARAMETRIZATIONS),
            ),
        )
        known = {*ALONE, *(part for group in joined for part in group)}
        if unknown := [part for part in parts if part not in known]:
            raise UserError(
                f"method: {unknown[0]!r} is unknown; known are {', '.join(sorted(known))}"
            )
        if (len(parts) > 1 and set(parts) & set(ALONE)) or len(set(parts)) < len(parts):
            raise UserError(
                f"method: {self.method!r}: {', '.join(ALONE)} stand alone, and a part is named once"
            )
        for group in joined:
            if len(chosen := [part for part in parts if part in group]) > 1:
                raise UserError(
                    f"method: {self.method!r} names both {chosen[0]} and {chosen[1]}; one of them "
                    "at most"
                )
        if self.mask_storage != "float32" and "softtf" not in parts:
            raise UserError(
                f"mask_storage: {self.method!r} has no soft masks to keep as {self.mask_storage}; "
                "leave it as float32"
            )
        if self.cache_queries and set(parts) & set(ALONE):
            raise UserError(f"cache_queries: {self.method!r} asks nothing of q(x); leave it off")
        if "pgp" in parts and not set(parts) & set(HOSTS):
            raise UserError(
                f"method: {self.method!r}: pgp projects prompts, so it needs one of "
                f"{', '.join(HOSTS)}"
            )

    def _one_of(self, field: str, known: Iterable[str]) -> None:
        if getattr(self, field) not in known:
            raise UserError(
                f"{field}: {getattr(self, field)!r} is unknown; known are {', '.join(known)}"
            )

    def _at_least(self, field: str, least: float) -> None:
        if not getattr(self, field) >= least:
            raise UserError(f"{field}: {getattr(self, field)!r} is below {least:g}")

    @property
    def benchmark(self) -> str:
        """Key of the published tables ("c100_10"), or a name of our own."""
        short = {
            "cifar100": "c100",
            "imagenet_r": "imr",
            "caltech_birds2011": "cub",
            "tiny_imagenet": "tiny",
        }
        return f"{short.get(self.dataset, self.dataset)}_{self.tasks}"


def config_dict(**settings: Any) -> ml_collections.ConfigDict:
    """The defaults with `settings` in their place, as what `config_flags` edits."""
    return as_config_dict(Config(**settings))


def as_config_dict(config: Config) -> ml_collections.ConfigDict:
    """`config` as what `config_flags` edits."""
    return ml_collections.ConfigDict(dataclasses.asdict(config))


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
    """The checked `Config`. Raises UserError for an unknown field or a bad value, by name."""
    values = config.to_dict()
    if unknown := values.keys() - {field.name for field in dataclasses.fields(Config)}:
        raise UserError(f"unknown settings: {', '.join(sorted(unknown))}")
    values = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in values.items()}
    return Config(**values)


def from_identity(identity: Mapping[str, Any]) -> Config:
    """The `Config` of a run's `config.json`, which holds more than that; RUNTIME_FIELDS settings
    are at their defaults.
    """
    fields = {field.name for field in dataclasses.fields(Config)}
    settings = {
        key: tuple(v) if isinstance(v, list) else v for key, v in identity.items() if key in fields
    }
    if isinstance(settings.get("shots"), int):  # of a run from when there was one number
        settings["shots"] = (settings["shots"],)
    return Config(**settings)


def parse_argument(argument: str | None) -> dict[str, Any]:
    """A config's string argument ("tasks=20,method=dualprompt,layers=3-5") as settings.

    Keys are the fields of `Config`, and `layers` for the E-prompt and masked layers at once.
    Layers, and other lists of numbers, are "10-12" or "3+5+7". Raises UserError for an unknown key
    or a value of the wrong type, by name.
    """
    fields = {field.name: field.type for field in dataclasses.fields(Config)}
    settings: dict[str, Any] = {}
    for item in filter(None, (argument or "").split(",")):
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals:
            raise UserError(f"config argument {item!r}: write key=value")
        if key == "layers":
            settings["e_prompt_layers"] = settings["mask_layers"] = _parse(
                key, text, tuple[int, ...]
            )
        elif key in fields:
            settings[key] = _parse(key, text, fields[key])
        else:
            raise UserError(
                f"config argument: unknown key {key!r}; known are layers, {', '.join(fields)}"
            )
    return settings


def _has_type(value: Any, kind: Any) -> bool:
    if kind == tuple[int, ...]:
        return isinstance(value, tuple) and len(value) > 0 and all(type(v) is int for v in value)
    if kind == tuple[float, float]:
        return (
            isinstance(value, tuple)
            and len(value) == 2
            and all(type(v) in (int, float) for v in value)
        )
    return type(value) is kind or (kind is float and type(value) is int)


def _type_name(kind: Any) -> str:
    names = {
        tuple[int, ...]: "one or more whole numbers, such as 10-12 or 3+5 (in a flag 3,5)",
        tuple[float, float]: "a range, such as 0.05-1",
    }
    return names.get(kind) or f"of the type {kind.__name__}"


def _parse(key: str, text: str, kind: Any) -> Any:
    try:
        if kind is str:
            value = text
        elif kind == tuple[int, ...]:
            value = _parse_numbers(text)
        elif kind == tuple[float, float]:
            value = tuple(float(part) for part in text.split("-"))
        else:
            value = ast.literal_eval(text.capitalize() if kind is bool else text)
    except (ValueError, SyntaxError):
        value = None
    if not _has_type(value, kind):
        raise UserError(f"config argument: {key}={text!r} is not {_type_name(kind)}")
    return float(value) if kind is float else value


def _parse_numbers(text: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in text.split("+"):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)
