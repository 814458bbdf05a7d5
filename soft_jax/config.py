"""Every setting of a run, its default, its type and its range.

`configs/*.py` and the command line fill a `Config`. What a method, scenario or backbone makes of a
setting is checked where that part is registered (`methods.registry`, `data.scenarios`), so that
this module imports nothing that takes time.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from soft_jax.errors import UserError

if TYPE_CHECKING:
    import ml_collections

DTYPES = ("float32", "bfloat16")
LONGEST = 64  # times the short side of an image: a thinner one, resized, would fill memory
# Settings that are one of a few words, whatever the method.
CHOICES = {
    "dtype": DTYPES,
    "normalization": ("backbone", "cifar100"),
    "optimizer": ("adam", "sgd"),
    "schedule": ("constant", "cosine"),
    "text_context": ("class", "task"),
}
# Settings that change where things are, what they are called or how fast they go, never a figure:
# a run may be continued with others.
RUNTIME_FIELDS = (
    "name",
    "data_dir",
    "scenario_file",  # the tasks that it lists make the run what it is, wherever it is
    "backbone_path",
    "eval_batch_size",
    "weights_cache_mb",
    "checkpoint_every",
    "tensorboard",
    "wandb",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of one run.

    Layers are counted from 1, as the paper's tables do. The learning rate is that of a batch of 256
    images. Raises UserError for a value of the wrong type or out of its range, naming the field.
    """

    name: str = "softtf"  # names the default workdir
    # Data and tasks
    dataset: str = "cifar100"  # "digits", "folder", "tiny_imagenet", or the name of a TFDS set
    data_dir: str = ""  # where the images are; empty: TFDS's own default
    scenario: str = "equal"  # how classes make tasks: equal, increments, or file
    tasks: int = 10  # equal: so many tasks of as many classes each; 1 is joint training
    initial_classes: int = 0  # increments: classes of the first task; 0: as many as of the others
    increment: int = 10  # increments: classes of each later task; the last has what is left
    scenario_file: str = ""  # file: a JSON list of tasks, each a list of class names or numbers
    # NumPy's RandomState(seed).permutation of the classes before they are cut into tasks; -1: label
    # order, as the paper has it. 1993 is the order that PILOT's figures use.
    class_order_seed: int = -1
    validation: float = 0.0  # share of each class's training images held out and evaluated apart
    train_images_per_class: int = 0  # the first so many of each class; 0: all
    test_images_per_class: int = 0
    seed: int = 59
    # Frozen backbone
    backbone: str = "vit_b16"
    backbone_path: str = ""  # its file, or the folder it is in; empty: bundled, cached, downloaded
    image_size: int = 0  # pixels; 0: the backbone's own
    # What mean and std are taken off pixels: the backbone's own, or CIFAR-100's, which the
    # published CLIP host takes.
    normalization: str = "backbone"
    dtype: str = "float32"  # of the computation; masks and θ ⊙ m are float32 in any case
    # Method: parts joined by "+", at most one of each kind: a prompt host (dualprompt, l2p), pgp,
    # and a reparametrization (softtf, wsn, softnet, lora, adapter). Or one that stands alone: head,
    # ft, ewc, lwf, derpp, icarl, bic. CLIP has prompt hosts of its own: clip, clipprompt.
    method: str = "dualprompt+softtf"
    mask_layers: tuple[int, ...] = (10, 11, 12)  # that the reparametrization changes
    # Of CLIP's towers, those whose layers the reparametrization changes: vision, text, vision+text.
    mask_towers: str = "vision"
    text_mask_layers: tuple[int, ...] = (10, 11, 12)  # the text tower's, where it is among them
    target_modules: str = "qkv+proj"  # of those layers, joined by "+": qkv, proj, mlp; lora also qv
    mask_init: str = "uniform"  # U(0.99, 1); or ones, xavier, kaiming, normal (Table 5)
    # How softtf's masks are stored: float32; their distance from 1 as int8, int4 or lowrank; or
    # delta1, delta2, delta4, what training added to their draw in so many bits a weight.
    mask_storage: str = "float32"
    density: float = 0.9  # the share c of each kernel that wsn and softnet keep
    rank: int = 4  # of lora's products, adapter's bottlenecks and lowrank's masks
    pool_size: int = 10  # l2p's prompts, each e_prompt_length long
    top_k: int = 5  # of them for an image
    ewc_strength: float = 1000.0  # λ of ewc's penalty
    lwf_strength: float = 1.0  # λ of lwf's distillation
    buffer_size: int = 1000  # images of all older tasks together that derpp, icarl and bic keep
    e_prompt_layers: tuple[int, ...] = (10, 11, 12)
    e_prompt_length: int = 5
    g_prompt_layers: tuple[int, ...] = (1, 2)
    g_prompt_length: int = 5
    prefix_layout: str = "separate"  # "interleaved" reproduces the published prompt look-up
    image_prompt_length: int = 5  # of clip and clipprompt, in front of CLIP's vision tower
    text_context: str = "class"  # what has text contexts of its own: each class, or each task
    text_context_length: int = 16  # vectors in front of a class name
    key_loss_weight: float = 1.0  # λ of the key-matching term
    # Train with q(x) of the whole image, computed once, instead of each crop's as the paper does.
    cache_queries: bool = False
    # Train the G-prompt in the first task only. The paper trains it on: old tasks drift with it.
    freeze_g_prompt: bool = False
    # Training
    epochs: int = 20
    batch_size: int = 24  # images over all devices
    learning_rate: float = 0.03  # × batch_size / 256
    first_learning_rate: float = 0.0  # of the first task; 0: as of the others
    optimizer: str = "adam"  # Adam(0.9, 0.999); or sgd, with momentum 0.9
    schedule: str = "constant"  # or cosine: from the learning rate to 0, in steps of an epoch
    weight_decay: float = 0.0  # × weights, added to their gradients
    first_weight_decay: float = -1.0  # of the first task; -1: as of the others
    clip_norm: float = 1.0  # the largest global norm of the gradients
    crop_scale: tuple[float, float] = (0.05, 1.0)  # shares of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height; (1, 1) in both: no crop
    flip: bool = True
    # Evaluation: every protocol that applies to the method is reported.
    # Images of a test batch that batch_vote's Gradient ID looks at, a row for each number; 0: all.
    shots: tuple[int, ...] = (7,)
    eval_batch_size: int = 256  # of the forward passes, at most; no figure depends on it
    # Of the devices' memory for tasks' θ ⊙ m; what doesn't fit is read from the workdir again.
    weights_cache_mb: int = 1024
    # Random features M of q(x) for prototype task identity, of which a task keeps 2 M² bytes; 0:
    # leave it out.
    prototype_features: int = 2000
    # Running
    checkpoint_every: int = 500  # steps between saves inside a task
    tensorboard: bool = False  # needs tensorboardX
    wandb: bool = False  # Weights & Biases; needs wandb

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), field.type)
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(unknown_value(name, value, known))
        for least, names in _LEAST.items():
            for name in names:
                if getattr(self, name) < least:
                    raise UserError(f"{name}: {getattr(self, name)!r} is below {least:g}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                if type(number) is int and field.type is not float and number >= 2**31:
                    raise UserError(f"{field.name}: {_short(number)} is not below 2**31")
        self._check_ranges()

    def _check_ranges(self) -> None:
        for most, names in _MOST.items():
            for name in names:
                if getattr(self, name) > most:
                    raise UserError(
                        f"{name}: {getattr(self, name)!r} is above {most}, the most that is taken: "
                        "what is made for more fills any memory"
                    )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == tuple[int, ...] and len(set(value)) < len(value):
                twice = next(number for number in value if value.count(number) > 1)
                raise UserError(f"{field.name}: {_short(value)} names {twice} twice")
        if min(self.shots) < 0:
            raise UserError(f"shots: {_short(self.shots)} are not numbers of images, or 0 for all")
        if not 0 < self.density <= 1:
            raise UserError(f"density: {self.density} is not a share above 0 and at most 1")
        if not 0 <= self.validation < 1:
            raise UserError(f"validation: {self.validation} is not a share from 0 to below 1")
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"{name}: {(low, high)} is not a range above 0")
        if self.crop_scale[1] > 1:
            raise UserError(f"crop_scale: {self.crop_scale} reaches above 1, the whole image")
        if self.crop_ratio[0] * LONGEST < 1 or self.crop_ratio[1] > LONGEST:
            raise UserError(
                f"crop_ratio: {self.crop_ratio} reaches beyond 1/{LONGEST} to {LONGEST}, the "
                "thinnest images that are read"
            )

    @property
    def benchmark(self) -> str:
        """Key of the published tables ("c100_10"), or a name of our own for other tasks."""
        short = {
            "cifar100": "c100",
            "imagenet_r": "imr",
            "caltech_birds2011": "cub",
            "tiny_imagenet": "tiny",
        }
        name = short.get(self.dataset, self.dataset)
        order = "" if self.class_order_seed < 0 else f"_order{self.class_order_seed}"
        return f"{name}_{self.tasks if self.scenario == 'equal' else self.scenario}{order}"


# The least value of each number that has one.
_LEAST = {
    1: (
        "tasks",
        "increment",
        "epochs",
        "batch_size",
        "eval_batch_size",
        "checkpoint_every",
        "e_prompt_length",
        "g_prompt_length",
        "rank",
        "pool_size",
        "top_k",
        "buffer_size",
        "image_prompt_length",
        "text_context_length",
    ),
    1e-12: ("learning_rate", "clip_norm"),
    0: (
        "image_size",
        "initial_classes",
        "key_loss_weight",
        "seed",
        "weights_cache_mb",
        "train_images_per_class",
        "test_images_per_class",
        "ewc_strength",
        "lwf_strength",
        "prototype_features",
        "first_learning_rate",
        "weight_decay",
    ),
    -1: ("class_order_seed", "first_weight_decay"),
}
# The most of each number that the length of an array grows with; what is above is a slip. Without a
# bound it filled the machine's memory, or XLA ended or hung the program where no size holds it.
_MOST = {
    # Images of so many pixels have 65,536 patches of 16: 16 GiB of attention for each head.
    4096: ("image_size",),
    # Of so many features, Σ φφᵀ has 2 GiB while it is summed.
    2**14: (
        "prototype_features",
        "rank",
        "pool_size",
        "top_k",
        "e_prompt_length",
        "g_prompt_length",
        "image_prompt_length",
        "text_context_length",
    ),
    # So many images of 32 × 32 pixels have 3 GiB.
    2**20: ("batch_size", "eval_batch_size", "buffer_size"),
}
SIZES = tuple(name for names in _MOST.values() for name in names)  # what takes memory
DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in dataclasses.fields(Config)}


def from_settings(settings: Mapping[str, Any]) -> Config:
    """Make the `Config` of `settings`, in which JSON may have turned tuples into lists.

    Raises UserError for an unknown field, naming the nearest, or a bad value.
    """
    for name in settings:
        if name not in DEFAULTS:
            raise UserError(unknown("setting", name, DEFAULTS))
    return Config(**{name: _as_tuple(name, value) for name, value in settings.items()})


def _as_tuple(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    # A layer that was named twice was taken once, in runs that older releases stored.
    return tuple(dict.fromkeys(value) if name.endswith("layers") else value)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is no known `what`, with the nearest that is, or else all of them."""
    return f"{what} {_short(name)} is unknown; {nearest(name, known)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of `known` is the nearest to `name`, or else all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def unknown_value(field: str, value: str, known: Iterable[str]) -> str:
    """Say that `field` has no such value, with the nearest that it has, and all of them."""
    known = list(known)
    near = difflib.get_close_matches(str(value), known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{field}: {_short(value)} is unknown; {hint}known are {', '.join(known)}"


def config_dict(**settings: Any) -> "ml_collections.ConfigDict":
    """Return the defaults with `settings` in their place, as what `config_flags` edits."""
    return as_config_dict(from_settings(settings))


def as_config_dict(config: Config) -> "ml_collections.ConfigDict":
    """Return `config` as what `config_flags` edits."""
    import ml_collections  # here, since it takes as long as all the rest

    return ml_collections.ConfigDict(dataclasses.asdict(config))


def from_config_dict(config: "ml_collections.ConfigDict") -> Config:
    """Check a config file's settings. Raises UserError for an unknown field or a bad value."""
    return from_settings(config.to_dict())


def parse_argument(argument: str | None, where: str = "config argument") -> dict[str, Any]:
    """Read a config's string argument ("tasks=20,method=dualprompt,layers=3-5") as settings.

    Keys are the fields of `Config`, and `layers` for the E-prompt and masked layers at once. Layers
    and other lists of numbers are written "10-12" or "3+5+7". Raises UserError for an unknown key,
    one that stands twice, or a value of the wrong type, by name, and `where` a user wrote it.
    """
    fields = {field.name: field.type for field in dataclasses.fields(Config)}
    settings: dict[str, Any] = {}
    for item in filter(None, (argument or "").split(",")):
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals:
            raise UserError(f"{where}: {_short(item)}: write key=value")
        if key != "layers" and key not in fields:
            raise UserError(f"{where}: {unknown('key', key, ['layers', *fields])}")
        names = ("e_prompt_layers", "mask_layers") if key == "layers" else (key,)
        if set(names) & settings.keys():
            raise UserError(f"{where}: {key} is given twice")
        value = _parse(f"{where}: {key}", text, fields[names[0]])
        settings |= dict.fromkeys(names, value)
    return settings


def check_flag(name: str, text: str) -> None:
    """Raise UserError where `text` is not how a flag `--config.NAME=TEXT` gives the field `name`.

    The message says how it is written. ml_collections reads flags by Python's rules, and says what
    Python says: `epochs=1e1` is "invalid literal for int()". Lists are those of Python here; the
    commands translate "10-12" before. Ranges are checked by `Config`.
    """
    kind = next(field.type for field in dataclasses.fields(Config) if field.name == name)
    try:
        if kind is int:
            int(text, 16 if text[:2].lower() == "0x" else 10)
        elif kind is float:
            float(text)
        elif kind is bool and text.lower() not in ("true", "t", "1", "false", "f", "0"):
            raise ValueError
        elif kind in _LISTS:
            for part in text.strip(" ()[]").removesuffix(",").split(","):
                _LISTS[kind](part)
    except ValueError:
        raise UserError(f"{name}: {_short(text)} {_problem(text, kind)}") from None


def _check_type(name: str, value: Any, kind: Any) -> None:
    """Raise UserError where a field's value is not of its type, or a number is not finite."""
    if not _has_type(value, kind):
        raise UserError(f"{name}: {_short(value)} is not {_type_name(kind)}")
    for number in value if isinstance(value, tuple) else (value,):
        # Nor is what float32 does not hold, in which everything is computed; of integers too.
        if isinstance(number, int | float) and not -_LARGEST <= number <= _LARGEST:
            raise UserError(f"{name}: {_short(value)} is not finite in float32")


def _has_type(value: Any, kind: Any) -> bool:
    if kind == tuple[int, ...]:
        return isinstance(value, tuple) and len(value) > 0 and all(type(v) is int for v in value)
    if kind == tuple[float, float]:
        numbers = isinstance(value, tuple) and all(type(v) in (int, float) for v in value)
        return numbers and len(value) == 2
    return type(value) is kind or (kind is float and type(value) is int)


def _type_name(kind: Any) -> str:
    names = {
        tuple[int, ...]: "one or more whole numbers, such as 10-12 or 3+5 (in a flag also 3,5)",
        tuple[float, float]: "a range, such as 0.05-1 (in a flag also 0.05,1)",
        int: "of the type int, a whole number such as 10",
        float: "of the type float, a number such as 0.03 or 3e-2",
        bool: "of the type bool, true or false",
    }
    return names.get(kind) or f"of the type {kind.__name__}"


def _short(value: Any) -> str:
    """Return `value` as Python writes it, cut to what fits on a line."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _parse(name: str, text: str, kind: Any) -> Any:
    try:
        if kind is str:
            value = text
        elif kind == tuple[int, ...]:
            value = _parse_numbers(text)
        elif kind == tuple[float, float]:
            value = tuple(float(part) for part in text.split("-"))
        elif kind is bool:
            value = {"true": True, "false": False}.get(text.lower())
        else:
            value = float(text) if kind is float else int(text)
    except ValueError:
        value = None
    if not _has_type(value, kind):
        raise UserError(f"{name}={_short(text)} {_problem(text, kind)}")
    return value


_SHOWN = 80  # signs of a value that a message shows
_LARGEST = (2 - 2**-23) * 2.0**127  # of float32
_LISTS = {tuple[int, ...]: int, tuple[float, float]: float}  # types of several numbers: of one
_MOST_NUMBERS = 10_000  # in one list: more is a slip, and would fill memory before it is found


class _BadNumbers(ValueError):
    """Says what is wrong with a list of numbers that can be read."""


def _problem(text: str, kind: Any) -> str:
    """Say what is wrong with a text that gives no value of the type `kind`."""
    if kind == tuple[int, ...]:
        try:
            _parse_numbers(text)
        except _BadNumbers as error:
            return str(error)
        except ValueError:
            pass
    return f"is not {_type_name(kind)}"


def _parse_numbers(text: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in text.split("+"):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if high < low:
            raise _BadNumbers(
                f"has the range {_short(part)}, which goes backwards; write the smaller number "
                "first, such as 10-12"
            )
        if len(numbers) + high - low + 1 > _MOST_NUMBERS:
            raise _BadNumbers(f"is more than {_MOST_NUMBERS:,} numbers, the most of one list")
        numbers += range(low, high + 1)
    return tuple(numbers)
