"""Task-identity rules: who names the task of a test image, and which classes can win then.

A rule is a protocol of its own, a row in every report. To add one, write its class and its line in
`RULES`; evaluation, `Predictor`, the commands, reports and tables ask the objects.

| protocol | who names the task | classes that can win |
|---|---|---|
| per_sample/no_task_id | nobody: tasks have nothing of their own | all seen |
| per_sample/prompt_id | each image's nearest key of the tasks seen | all seen |
| per_sample/gradient_id | each image's most negative ∂H/∂α | all seen |
| per_sample/prototype | statistics of the frozen features that every task leaves | the task's |
| batch_vote/pool | L2P as published: a batch selects its prompts together | all |
| batch_vote/prompt_id | the published vote: a batch's majority, over every key | all |
| batch_vote/gradient_id_7 | ∂H/∂α on the batch's first 7 images, or as many as `shots` says | all |
| oracle/task_given | the task is given (task-incremental learning) | the task's |

A published test batch holds one task, so that what decides by batch leaks the task. "All" classes
are all outputs of the head, also those that are not trained yet.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import numpy as np

from soft_jax import pytrees
from soft_jax.config import Config
from soft_jax.inference import engine, identity, prototypes
from soft_jax.inference.engine import Batching, Model
from soft_jax.methods.method import Method
from soft_jax.methods.registry import Parts

PER_SAMPLE, BATCH_VOTE, ORACLE = "per_sample", "batch_vote", "oracle"


@dataclasses.dataclass(frozen=True)
class TestBatches:
    """How the published code batches a task's test images: in order, the last one partial."""

    __test__ = False  # pytest: this is no test

    count: int  # images
    size: int  # of a batch

    @property
    def index(self) -> np.ndarray:
        """Return the batch of each image, int `[N]`."""
        return np.arange(self.count) // self.size

    @property
    def position(self) -> np.ndarray:
        """Return each image's position in its batch, int `[N]`."""
        return np.arange(self.count) % self.size

    @property
    def length(self) -> np.ndarray:
        """Return the number of images in each image's batch, int `[N]`."""
        return np.bincount(self.index)[self.index]


@dataclasses.dataclass(frozen=True)
class ImageBatch:
    """Some images as rules see them; what several rules ask for is computed once.

    `tokens` are what `engine.encode` gave of each image by itself, `batch_tokens` of each as part
    of its test batch (another selection of a pool's prompts; else the same array). `query` is q(x)
    `[N, dim]`, `given` int `[N]` the tasks where they are told, `batches` the test batches where
    there are any.
    """

    model: Model
    tokens: jax.Array
    query: np.ndarray
    batching: Batching
    given: np.ndarray | None = None
    batches: TestBatches | None = None
    batch_tokens: jax.Array | None = None
    cache: dict[Any, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def count(self) -> int:
        """Return the number of images."""
        return len(self.query)

    def cached(self, key: Any, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Return what `compute` gave when `key` was first asked for."""
        if key not in self.cache:
            self.cache[key] = compute()
        return self.cache[key]

    @property
    def alpha_gradients(self) -> dict[int, np.ndarray]:
        """Return the test batches' ∂H/∂α `[batches, seen]` computed so far, by number of shots."""
        return {key[1]: found for key, found in self.cache.items() if key[0] == "alpha_gradients"}

    @functools.cached_property
    def key_similarity(self) -> np.ndarray:
        """Return cos(q(x), k) with every key, those of untrained tasks included: `[N, P]`."""
        return engine.key_similarity(self.model, self.query, self.batching)

    @functools.cached_property
    def nearest(self) -> np.ndarray:
        """Return the task of each image's nearest key among the model's tasks, int `[N]`."""
        return engine.nearest_key(self.model, self.key_similarity)

    @functools.cached_property
    def nearest_of_all(self) -> np.ndarray:
        """Return each image's nearest key of the whole pool, int `[N]`."""
        return self.key_similarity.argmax(axis=1)


class Collector:
    """What a rule makes of all tasks' statistics together."""

    def add(self, classes: Sequence[int], statistics: Mapping[str, jax.Array]) -> None:
        """Take in the statistics of one more task, of its `classes`."""
        raise NotImplementedError

    def solve(self) -> Any:
        """Return the pytree that `identify` finds in `model.solved` under the rule's name."""
        raise NotImplementedError


class TaskIdentityRule:
    """What a rule does unless it says otherwise.

    `grouping` and `name` make its protocol's key, "per_sample/prompt_id"; `title` names it where
    people read. `option` is its name for `predict --task-id` and `Predictor` ("": not offered).
    """

    grouping: ClassVar[str] = PER_SAMPLE
    name: str = ""
    title: ClassVar[str] = ""
    option: ClassVar[str] = ""
    needs_query: ClassVar[bool] = True
    # The rule by which a published test batch decides in the place of each image.
    voted_by: "ClassVar[type[TaskIdentityRule] | None]" = None
    # Whether the task is named by statistics that a task leaves behind, beside its adapter.
    keeps_statistics: ClassVar[bool] = False
    # The fields of `Config` that no part of a method uses but this rule.
    settings: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, method: Method, config: Config) -> tuple[Self, ...]:
        """Return the rules of this class that apply to a method: one, none or several."""
        return cls.from_config(config, method) if cls.applies(method) else ()

    @classmethod
    def from_config(cls, config: Config, method: Method) -> tuple[Self, ...]:
        """Make the rules of this class, for a method that it applies to."""
        return (cls(),)

    @classmethod
    def applies(cls, method: Method | Parts) -> bool:
        """Whether the rule means anything for a method, made or only named."""
        return method.by_task

    @classmethod
    def title_of(cls, name: str) -> str | None:
        """Return the title of this class's rule called `name`; None where it has no such rule."""
        return cls.title if name == cls.name else None

    @property
    def key(self) -> str:
        """Return the protocol's key in reports and manifests."""
        return f"{self.grouping}/{self.name}"

    @property
    def by_batch(self) -> bool:
        """Whether a test batch decides for its images, which leaks the task."""
        return self.grouping == BATCH_VOTE

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return the task whose network answers for each image, int `[N]`."""
        raise NotImplementedError

    def scores(self, images: ImageBatch, logits: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return `logits` `[N, classes]` of each image's task, -inf for classes that can't win."""
        return engine.mask_to_seen(images.model, logits)

    def final_tasks(self, images: ImageBatch, scores: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return the task that each image is taken to be of, int `[N]`: the one identified."""
        return tasks

    def statistics_shapes(self, classes: int) -> pytrees.Tree:
        """Return shapes and dtypes of what the rule keeps of a task of that many classes.

        Names are the rule's own: those of all rules are stored side by side.
        """
        return {}

    def statistics(
        self, query: np.ndarray, labels: np.ndarray, classes: Sequence[int]
    ) -> pytrees.Tree:
        """Return what the rule keeps of a task, from q(x) `[N, dim]` of its training images."""
        return {}

    def collector(self, num_classes: int) -> Collector | None:
        """Return an object that adds up the tasks' statistics; None where the rule keeps none."""
        return None


class NoTaskId(TaskIdentityRule):
    """No task is named; the winning class has one."""

    name = "no_task_id"
    title: ClassVar[str] = "CIL per_sample, no task id"
    needs_query: ClassVar[bool] = False

    @classmethod
    def applies(cls, method: Method | Parts) -> bool:
        """Whether tasks have nothing of their own."""
        return not method.by_task

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return any task: all networks are the same."""
        return np.full(images.count, images.model.tasks[0])

    def final_tasks(self, images: ImageBatch, scores: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return the winning classes' tasks."""
        return images.model.task_of_class[scores.argmax(axis=1)]


class PromptId(TaskIdentityRule):
    """The nearest key (Soft-TF, section 3)."""

    name = "prompt_id"
    title: ClassVar[str] = "CIL per_sample, Prompt ID"
    option: ClassVar[str] = "prompt"

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return the task of each image's nearest key."""
        return images.nearest


class GradientId(TaskIdentityRule):
    """The most negative ∂H/∂α_t at the superposed mask (Soft-TF, section 3)."""

    name = "gradient_id"
    title: ClassVar[str] = "CIL per_sample, Gradient ID"
    option: ClassVar[str] = "gradient"

    @classmethod
    def applies(cls, method: Method | Parts) -> bool:
        """Whether tasks replace kernels, which can be superposed."""
        return method.replaces_kernels

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return each image's task by its own gradient."""
        return engine.gradient_id(images.model, images.tokens, images.nearest, images.batching)


@dataclasses.dataclass(frozen=True)
class Prototype(TaskIdentityRule):
    """A ridge regression on random features of q(x), and its answer beside the classifier's."""

    name: ClassVar[str] = "prototype"
    title: ClassVar[str] = "CIL per_sample, prototype"
    option: ClassVar[str] = "prototype"
    keeps_statistics: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ("prototype_features",)
    seed: int
    dim: int
    features: int

    @classmethod
    def from_config(cls, config: Config, method: Method) -> tuple[Self, ...]:
        """Make one rule where statistics are kept."""
        features = config.prototype_features
        return (cls(config.seed, method.architecture.dim, features),) if features else ()

    @functools.cached_property
    def projection(self) -> np.ndarray:
        """Return the random projection of every task's statistics, float32 `[dim, features]`."""
        return prototypes.projection(self.seed, self.dim, self.features)

    def _log_posterior(self, images: ImageBatch) -> np.ndarray:
        classifier = images.model.solved[self.name]

        def compute() -> np.ndarray:
            return images.batching.map(
                lambda part: prototypes.log_posterior(part, classifier), images.query
            )

        return images.cached(("log_posterior", self.name), compute)

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return the task of the highest p(task | x), among the model's."""
        model = images.model
        by_task = prototypes.task_posterior(self._log_posterior(images), model.task_of_class)
        return np.asarray(model.tasks)[by_task[:, model.tasks].argmax(axis=1)]

    def scores(self, images: ImageBatch, logits: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return log p(class | x) by statistics + logits, over the task's classes."""
        return engine.mask_to_task(images.model, self._log_posterior(images) + logits, tasks)

    def statistics_shapes(self, classes: int) -> pytrees.Tree:
        """Return the shapes of `prototypes.statistics`."""
        return prototypes.shapes(self.features, classes)

    def statistics(
        self, query: np.ndarray, labels: np.ndarray, classes: Sequence[int]
    ) -> pytrees.Tree:
        """Return `prototypes.statistics`."""
        return prototypes.statistics(query, labels, classes, self.projection)

    def collector(self, num_classes: int) -> "prototypes.Sums":
        """Return the sums of all tasks' statistics."""
        return prototypes.Sums(num_classes, self.projection)


class _Vote(TaskIdentityRule):
    """A published protocol: a test batch, which holds a single task, decides for its images."""

    grouping: ClassVar[str] = BATCH_VOTE

    def scores(self, images: ImageBatch, logits: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return `logits`: any output of the head can win."""
        return logits


class PoolVote(_Vote):
    """L2P as published: what most images of a batch select, for all of them."""

    name = "pool"
    title: ClassVar[str] = "CIL batch_vote, pool *"

    @classmethod
    def applies(cls, method: Method | Parts) -> bool:
        """Whether images select prompts and tasks have nothing of their own."""
        return method.host.pools and not method.by_task

    identify = NoTaskId.identify
    final_tasks = NoTaskId.final_tasks


class PromptVote(_Vote):
    """The majority of a batch's nearest keys."""

    name = "prompt_id"
    title: ClassVar[str] = "CIL batch_vote, Prompt ID *"

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return the batch's majority for each image."""
        pool = len(images.model.rows["key"])
        return identity.majority(images.nearest_of_all, images.batches.index, pool)


@dataclasses.dataclass(frozen=True)
class GradientVote(_Vote):
    """∂H/∂α on the first `shots` images of a batch (0: all), for all of it."""

    settings: ClassVar[tuple[str, ...]] = ("shots",)
    shots: int

    @classmethod
    def from_config(cls, config: Config, method: Method) -> tuple[Self, ...]:
        """Make a rule for each number of shots."""
        return tuple(cls(shots) for shots in config.shots)

    @classmethod
    def applies(cls, method: Method | Parts) -> bool:
        """Whether tasks replace kernels, which can be superposed."""
        return method.replaces_kernels

    @property
    def name(self) -> str:
        """Return "gradient_id_7" and the like."""
        return f"gradient_id_{self.shots or 'all'}"

    @classmethod
    def title_of(cls, name: str) -> str | None:
        """Return the title with the number of shots."""
        shots = name.removeprefix("gradient_id_")
        return None if shots == name else f"CIL batch_vote, Gradient ID, {shots} shots *"

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return the batch's task for each image."""
        gradients = images.cached(
            ("alpha_gradients", self.shots), lambda: batch_alpha_gradients(images, self.shots)
        )
        return np.asarray(images.model.tasks)[gradients.argmin(axis=1)[images.batches.index]]


class TaskGiven(TaskIdentityRule):
    """The task is given, and the logits are restricted to its classes."""

    grouping: ClassVar[str] = ORACLE
    name = "task_given"
    title: ClassVar[str] = "TIL oracle, task given"
    option: ClassVar[str] = "oracle"
    needs_query: ClassVar[bool] = False

    @classmethod
    def applies(cls, method: Method | Parts) -> bool:
        """Whether a task can be given: always."""
        return True

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return the tasks that are given."""
        return images.given

    def scores(self, images: ImageBatch, logits: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return `logits` of the task's classes."""
        return engine.mask_to_task(images.model, logits, tasks)


NoTaskId.voted_by, PromptId.voted_by, GradientId.voted_by = PoolVote, PromptVote, GradientVote

# In the order of reports.
RULES: dict[str, type[TaskIdentityRule]] = {
    "no_task_id": NoTaskId,
    "prompt_id": PromptId,
    "gradient_id": GradientId,
    "prototype": Prototype,
    "pool_vote": PoolVote,
    "prompt_vote": PromptVote,
    "gradient_vote": GradientVote,
    "task_given": TaskGiven,
}


def rules_of(method: Method, config: Config) -> tuple[TaskIdentityRule, ...]:
    """Return the rules that apply to a method, each a row of its report."""
    return tuple(rule for each in RULES.values() for rule in each.of(method, config))


def class_of(key: str) -> type[TaskIdentityRule]:
    """Return the class of the protocol `key`, such as "per_sample/prompt_id".

    Raises KeyError where no rule has it.
    """
    grouping, _, name = key.partition("/")
    for rule in RULES.values():
        if rule.grouping == grouping and rule.title_of(name) is not None:
            return rule
    raise KeyError(key)


def title(key: str) -> str:
    """Return a protocol's title for people, the key itself where no rule here has it."""
    try:
        return class_of(key).title_of(key.partition("/")[2])
    except KeyError:  # of a run with a rule that is not registered here
        return key


def options() -> dict[str, type[TaskIdentityRule]]:
    """Return the rules that `predict --task-id` and `Predictor` offer, by option."""
    return {rule.option: rule for rule in RULES.values() if rule.option}


def batch_alpha_gradients(images: ImageBatch, shots: int) -> np.ndarray:
    """Return ∂H/∂α at uniform α, `[batches, seen]`, of each published test batch's first images.

    `shots` is the number of those images; 0 means all. The superposed pass uses the E-prompt that
    the majority of those images is nearest to.
    """
    batches, nearest = images.batches, images.nearest_of_all
    shots = min(shots or batches.size, batches.size)
    starts = np.arange(0, batches.count, batches.size)
    counts = np.minimum(np.minimum(batches.count - starts, batches.size), shots)
    taken = starts[:, None] + np.arange(shots)
    pool = len(images.model.rows["key"])
    votes = (identity.vote(nearest[row[:n]], pool) for row, n in zip(taken, counts, strict=True))
    voted = np.array(list(votes))
    taken, weights = np.minimum(taken, batches.count - 1), np.arange(shots) < counts[:, None]
    tokens = images.batch_tokens if images.batch_tokens is not None else images.tokens
    return engine.alpha_gradients(images.model, tokens, taken, weights, voted, images.batching)
