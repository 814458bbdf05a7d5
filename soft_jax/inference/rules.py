"""Task-identity rules: who names the task of a test image, and which classes can win then.

A rule is a protocol of its own, a row in every report. To add one, write its class and its line in
`RULES`; evaluation, `Predictor`, the commands, reports and tables ask the objects.

| protocol | who names the task | classes that can win |
|---|---|---|
| per_sample/no_task_id | nobody: tasks have nothing of their own | all seen |
| per_sample/prompt_id | each image's nearest key of the tasks seen | all seen |
| per_sample/gradient_id | each image's most negative ∂H/∂α | all seen |
| per_sample/prototype | statistics of the frozen features that every task leaves | the task's |
| per_sample/frozen_features | nobody: those statistics alone answer, no network does | all seen |
| per_sample/zero_shot | nobody: the frozen text features of the class names answer | all seen |
| per_sample/k_means | the nearest of centres of the frozen features (S-Prompts) | the task's |
| batch_vote/pool | L2P as published: a batch selects its prompts together | all |
| batch_vote/prompt_id | the published vote: a batch's majority, over every key | all |
| batch_vote/gradient_id_7 | ∂H/∂α on the batch's first 7 images, or as many as `shots` says | all |
| batch_vote/cut_off | nobody, as CLIP-PGP published it | those of tasks up to the batch's last |
| oracle/task_given | the task is given (task-incremental learning) | the task's |
| oracle/frozen_features | the task is given, and the statistics alone answer | the task's |
| oracle/zero_shot | the task is given, and the frozen text features answer | the task's |

The rows of frozen features and of zero-shot text cost no training and no forward pass: what a
method adds to them is what its training was good for. Zero-shot text, `k_means` and `cut_off` are
for backbones that read text. A published test batch holds one task, so that what decides by
batch leaks the task. "All" classes are all outputs of the head, also those that are not trained
yet.

`log_probabilities` says what the probability of a class is: over all classes that can win, doubt
about the task included. Prompt ID, Gradient ID, votes and the oracle take the softmax of the
network's logits, which knows nothing of that doubt; a temperature fitted on held-out images
(`evaluation.calibration`) makes it a probability that holds on average. Prototypes know p(task | x)
and multiply by it.
"""

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import numpy as np
import scipy.special

from soft_jax import pytrees
from soft_jax.config import Config
from soft_jax.inference import centres, engine, identity, prototypes, zero_shot
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
    of its test batch (another selection of a pool's prompts; else the same object). `query` is q(x)
    `[N, dim]`, `given` int `[N]` the tasks where they are told, `batches` the test batches where
    there are any. `last_in_batch` int `[N]` is the task of the last image in each image's batch,
    where all tasks' test images are batched in a row.
    """

    model: Model
    tokens: engine.Tokens
    query: np.ndarray
    batching: Batching
    given: np.ndarray | None = None
    batches: TestBatches | None = None
    batch_tokens: engine.Tokens | None = None
    last_in_batch: np.ndarray | None = None
    cache: dict[Any, np.ndarray] = dataclasses.field(default_factory=dict)
    _gradient_of: dict[tuple[int, ...], np.ndarray] = dataclasses.field(default_factory=dict)

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

    @property
    def selected_apart(self) -> bool:
        """Whether an image's tokens are others as part of its test batch than by itself."""
        return self.batch_tokens is not None and self.batch_tokens is not self.tokens

    def gradients_of(
        self, pairs: np.ndarray, in_batch: bool = False, smallest: int = 0
    ) -> np.ndarray:
        """Return ∂H/∂α at uniform α, `[K, seen]`, float32 or wider, each computed once.

        Args:
            pairs: int `[K, 4]`, and
            smallest: as `engine.alpha_gradients` takes them.
            in_batch: whether the tokens are those of each image as part of its test batch.
        """
        in_batch &= self.selected_apart
        tokens = self.batch_tokens if in_batch else self.tokens
        # What the gradient depends on: the task's E-prompt where there are any, the image, and its
        # place in the published slip.
        by_place = self.model.method.host.depends_on_place
        depends = [self.model.rows["prompt"].size > 0, True, by_place, by_place]
        keys = [(in_batch, *key) for key in np.where(depends, pairs, 0).tolist()]
        missing = {key: row for row, key in enumerate(keys) if key not in self._gradient_of}
        if missing:
            asked = pairs[list(missing.values())]
            found = engine.alpha_gradients(self.model, tokens, asked, self.batching, smallest)
            self._gradient_of.update(zip(missing, found, strict=True))
        return np.array([self._gradient_of[key] for key in keys])

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
    # Whether a network answers; else `scores` gets no logits.
    needs_network: ClassVar[bool] = True
    # The rule by which a published test batch decides in the place of each image.
    voted_by: "ClassVar[type[TaskIdentityRule] | None]" = None
    # What `task_scores` are, for people; the highest names the task, or else the lowest. Empty for
    # a rule that names none.
    scored_by: ClassVar[str] = ""
    lowest_wins: ClassVar[bool] = False
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
    def can_stand_alone(cls) -> bool:
        """Whether the rule names the task of one image by itself, for those who name none."""
        return cls.grouping == PER_SAMPLE and bool(cls.option)

    @classmethod
    def title_of(cls, name: str) -> str | None:
        """Return the title of this class's rule called `name`; None where it has no such rule."""
        return cls.title if name == cls.name else None

    @property
    def key(self) -> str:
        """Return the protocol's key in reports and manifests."""
        return f"{self.grouping}/{self.name}"

    @property
    def statistics_name(self) -> str:
        """Return the name under which `model.solved` has what the rule's statistics came to.

        Rules of one name keep the same statistics, once.
        """
        return self.name

    @property
    def by_batch(self) -> bool:
        """Whether a test batch decides for its images, which leaks the task."""
        return self.grouping == BATCH_VOTE

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return the task whose network answers for each image, int `[N]`."""
        raise NotImplementedError

    def gradient_pairs(self, images: ImageBatch) -> np.ndarray:
        """Return of which images the rule asks ∂H/∂α, as `engine.alpha_gradients` takes them.

        Int `[K, 4]`; here none.
        """
        return np.empty((0, 4), int)

    def task_scores(self, images: ImageBatch) -> np.ndarray:
        """Return what `identify` compares, `[N, len(model.tasks)]`; see `scored_by`."""
        raise NotImplementedError

    def scores(self, images: ImageBatch, logits: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return `logits` `[N, classes]` of each image's task, -inf for classes that can't win."""
        return engine.mask_to_seen(images.model, logits)

    def log_probabilities(
        self, images: ImageBatch, scores: np.ndarray, tasks: np.ndarray
    ) -> np.ndarray:
        """Return log p(class | x) `[N, classes]` of the `scores` of the tasks identified.

        -inf for classes that can't win; no temperature yet.
        """
        return scipy.special.log_softmax(scores, axis=1)

    def final_tasks(self, images: ImageBatch, scores: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return the task that each image is taken to be of, int `[N]`: the one identified."""
        return tasks

    def statistics_shapes(self, classes: int) -> pytrees.Tree:
        """Return shapes and dtypes of what the rule keeps of a task of that many classes.

        Names are the rule's own: those of all rules are stored side by side. Runs that were
        trained before there was a name don't have it.
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
    option: ClassVar[str] = "none"
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
    scored_by: ClassVar[str] = "cos(q(x), key)"

    def task_scores(self, images: ImageBatch) -> np.ndarray:
        """Return the cosine of q(x) with each task's key."""
        return images.key_similarity[:, images.model.tasks]

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return the task of each image's nearest key."""
        return images.nearest


class GradientId(TaskIdentityRule):
    """The most negative ∂H/∂α_t at the superposed mask (Soft-TF, section 3)."""

    name = "gradient_id"
    title: ClassVar[str] = "CIL per_sample, Gradient ID"
    option: ClassVar[str] = "gradient"
    scored_by: ClassVar[str] = "∂H/∂α"
    lowest_wins: ClassVar[bool] = True

    def task_scores(self, images: ImageBatch) -> np.ndarray:
        """Return ∂H/∂α of each task, each image by itself."""
        return images.gradients_of(engine.alone(images.nearest))

    def gradient_pairs(self, images: ImageBatch) -> np.ndarray:
        """Return each image by itself, with the E-prompt of its nearest key; of one task none."""
        if len(images.model.tasks) == 1:
            return super().gradient_pairs(images)
        return engine.alone(images.nearest)

    @classmethod
    def applies(cls, method: Method | Parts) -> bool:
        """Whether tasks replace kernels, which can be superposed."""
        return method.replaces_kernels

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return each image's task by its own gradient.

        The superposed pass of an image uses the E-prompt of its nearest key. With one class a task,
        C/T = 1 and H is 0 whatever α: the first task is the answer then, as in the published code.
        """
        tasks = np.asarray(images.model.tasks)
        if len(tasks) == 1:
            return np.full(images.count, tasks[0])
        return tasks[self.task_scores(images).argmin(axis=1)]


@dataclasses.dataclass(frozen=True)
class _Regression(TaskIdentityRule):
    """A rule by the ridge regression on random features of q(x), which every task leaves."""

    keeps_statistics: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ("prototype_features",)
    seed: int
    dim: int
    features: int

    @classmethod
    def from_config(cls, config: Config, method: Method) -> tuple[Self, ...]:
        """Make one rule where statistics are kept."""
        features = config.prototype_features
        return (cls(config.seed, method.architecture.feature_dim, features),) if features else ()

    @property
    def statistics_name(self) -> str:
        """Return "prototype": one regression serves all rules of this kind."""
        return "prototype"

    @functools.cached_property
    def projection(self) -> np.ndarray:
        """Return the random projection of every task's statistics, float32 `[dim, features]`."""
        return prototypes.projection(self.seed, self.dim, self.features)

    def log_posterior(self, images: ImageBatch) -> np.ndarray:
        """Return log p(class | x) by the regression, `[N, classes]`; -inf for classes not seen."""
        classifier = images.model.solved[self.statistics_name]

        def compute() -> np.ndarray:
            return images.batching.map(
                lambda part: prototypes.log_posterior(part, classifier), images.query
            )

        return images.cached(("log_posterior", self.statistics_name), compute)

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


class Prototype(_Regression):
    """The regression names the task, and answers together with its network's classifier."""

    name: ClassVar[str] = "prototype"
    title: ClassVar[str] = "CIL per_sample, prototype"
    option: ClassVar[str] = "prototype"
    scored_by: ClassVar[str] = "p(task | x)"

    def task_scores(self, images: ImageBatch) -> np.ndarray:
        """Return p(task | x) of the model's tasks."""
        return self._task_posterior(images)[:, images.model.tasks]

    def _task_posterior(self, images: ImageBatch) -> np.ndarray:
        """Return p(task | x), `[N, tasks]`."""
        return images.cached(
            ("task_posterior", self.statistics_name),
            lambda: prototypes.task_posterior(
                self.log_posterior(images), images.model.task_of_class
            ),
        )

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return the task of the highest p(task | x), among the model's."""
        return np.asarray(images.model.tasks)[self.task_scores(images).argmax(axis=1)]

    def scores(self, images: ImageBatch, logits: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return log p(class | x) by statistics + logits, over the task's classes."""
        return engine.mask_to_task(images.model, self.log_posterior(images) + logits, tasks)

    def log_probabilities(
        self, images: ImageBatch, scores: np.ndarray, tasks: np.ndarray
    ) -> np.ndarray:
        """Return log p(task | x) + log p(class | task, x).

        The latter is the softmax of the scores for classes of the task identified; other tasks'
        networks were not asked, so for their classes the regression's p(class | x) stands.
        """
        of_task = self._task_posterior(images)[np.arange(images.count), tasks]
        log_of_task = np.log(np.maximum(of_task, np.finfo(np.float32).tiny))[:, None]
        own = log_of_task + scipy.special.log_softmax(scores, axis=1)
        return np.where(np.isfinite(scores), own, self.log_posterior(images))


class FrozenFeatures(_Regression):
    """The regression's own answer: what the frozen backbone gives without any training."""

    name: ClassVar[str] = "frozen_features"
    title: ClassVar[str] = "CIL per_sample, frozen features"
    needs_network: ClassVar[bool] = False

    @classmethod
    def applies(cls, method: Method | Parts) -> bool:
        """Whether there are frozen features to compare with: always."""
        return True

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return the task of the most probable class."""
        return images.model.task_of_class[self.log_posterior(images).argmax(axis=1)]

    def scores(self, images: ImageBatch, logits: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return log p(class | x) by the regression."""
        return self.log_posterior(images)


class ZeroShot(TaskIdentityRule):
    """The frozen image and text encoders answer, by the class names alone."""

    name: ClassVar[str] = "zero_shot"
    title: ClassVar[str] = "CIL per_sample, zero-shot"
    option: ClassVar[str] = "zero_shot"
    needs_network: ClassVar[bool] = False

    @classmethod
    def applies(cls, method: Method | Parts) -> bool:
        """Whether the backbone reads text."""
        return method.host.reads_text

    def _logits(self, images: ImageBatch) -> np.ndarray:
        model = images.model
        architecture, params = model.method.architecture, model.backbone

        def compute() -> np.ndarray:
            return images.batching.map(
                lambda part: zero_shot.logits(architecture, params, model.zero_shot, part),
                images.query,
            )

        return images.cached("zero_shot", compute)

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return the task of the best class seen."""
        seen = engine.mask_to_seen(images.model, self._logits(images))
        return images.model.task_of_class[seen.argmax(axis=1)]

    def scores(self, images: ImageBatch, logits: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return the logits of the classes seen by frozen text features."""
        return engine.mask_to_seen(images.model, self._logits(images))


@dataclasses.dataclass(frozen=True)
class KMeans(TaskIdentityRule):
    """The nearest of the tasks' k-means centres of q(x) (S-liPrompts, Wang et al., 2022)."""

    name: ClassVar[str] = "k_means"
    title: ClassVar[str] = "CIL per_sample, k-means"
    option: ClassVar[str] = "k_means"
    scored_by: ClassVar[str] = "distance to the nearest centre"
    lowest_wins: ClassVar[bool] = True
    keeps_statistics: ClassVar[bool] = True
    dim: int

    @classmethod
    def from_config(cls, config: Config, method: Method) -> tuple[Self, ...]:
        """Make the rule for the width of q(x)."""
        return (cls(method.architecture.feature_dim),)

    @classmethod
    def applies(cls, method: Method | Parts) -> bool:
        """Whether tasks have something of their own, on a backbone that reads text."""
        return method.host.reads_text and method.by_task

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return the task of each image's nearest centre."""
        return np.asarray(images.model.tasks)[self.task_scores(images).argmin(axis=1)]

    def task_scores(self, images: ImageBatch) -> np.ndarray:
        """Return the L1 distance of q(x) to the nearest centre of each task."""
        found = np.asarray(images.model.solved[self.statistics_name])
        return centres.distances(images.query, found)

    def scores(self, images: ImageBatch, logits: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return `logits` of the task's classes."""
        return engine.mask_to_task(images.model, logits, tasks)

    def statistics_shapes(self, classes: int) -> pytrees.Tree:
        """Return the shape of the centres."""
        return {"centres": jax.ShapeDtypeStruct((centres.COUNT, self.dim), np.float32)}

    def statistics(
        self, query: np.ndarray, labels: np.ndarray, classes: Sequence[int]
    ) -> pytrees.Tree:
        """Return `centres.statistics`."""
        return centres.statistics(query)

    def collector(self, num_classes: int) -> "centres.Centres":
        """Return an object that holds all tasks' centres."""
        return centres.Centres()


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


class CutOff(_Vote):
    """CLIP-PGP's published CIL: the logits are cut to the classes up to the batch's last task.

    Only the last task's images face all classes.
    """

    name = "cut_off"
    title: ClassVar[str] = "CIL batch_vote, cut at the batch's task *"

    @classmethod
    def applies(cls, method: Method | Parts) -> bool:
        """Whether the method is the published host's: it reads text and identifies no task."""
        return method.host.reads_text and not method.by_task

    identify = NoTaskId.identify
    final_tasks = NoTaskId.final_tasks

    def scores(self, images: ImageBatch, logits: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return `logits` of the classes of tasks up to the last in each image's batch."""
        of_class = images.model.task_of_class
        can_win = (of_class >= 0) & (of_class <= images.last_in_batch[:, None])
        return np.where(can_win, logits, -np.inf)


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

    def gradient_pairs(self, images: ImageBatch) -> np.ndarray:
        """Return the first images of each batch, with the E-prompt that most of them are nearest
        to.
        """
        batches, nearest = images.batches, images.nearest_of_all
        place = batches.position
        first = np.flatnonzero(place < (self.shots or batches.size))
        batch = batches.index[first]
        voted = identity.majority(nearest[first], batch, len(images.model.rows["key"]))
        return np.stack([voted, first, place[first], np.bincount(batch)[batch]], axis=1)

    def batch_gradients(self, images: ImageBatch) -> np.ndarray:
        """Return the mean ∂H/∂α of each batch's first images, `[batches, seen]`."""
        pairs = self.gradient_pairs(images)
        starts = np.flatnonzero(pairs[:, 2] == 0)
        of_images = images.gradients_of(pairs, in_batch=True)
        counts = pairs[starts, 3, None].astype(of_images.dtype)
        return np.add.reduceat(of_images, starts) / counts

    def identify(self, images: ImageBatch) -> np.ndarray:
        """Return the batch's task for each image."""
        gradients = images.cached(
            ("alpha_gradients", self.shots), lambda: self.batch_gradients(images)
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


class FrozenFeaturesGiven(FrozenFeatures):
    """The regression's answer among the classes of the task that is given."""

    grouping: ClassVar[str] = ORACLE
    title: ClassVar[str] = "TIL oracle, frozen features"

    identify = TaskGiven.identify

    def scores(self, images: ImageBatch, logits: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return log p(class | x) of the task's classes."""
        return engine.mask_to_task(images.model, self.log_posterior(images), tasks)


class ZeroShotGiven(ZeroShot):
    """The frozen encoders' answer among the classes of the task that is given."""

    grouping: ClassVar[str] = ORACLE
    title: ClassVar[str] = "TIL oracle, zero-shot"
    option: ClassVar[str] = ""

    identify = TaskGiven.identify

    def scores(self, images: ImageBatch, logits: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Return the logits of the task's classes by frozen text features."""
        return engine.mask_to_task(images.model, self._logits(images), tasks)


NoTaskId.voted_by, PromptId.voted_by, GradientId.voted_by = PoolVote, PromptVote, GradientVote

# In the order of reports.
RULES: dict[str, type[TaskIdentityRule]] = {
    "no_task_id": NoTaskId,
    "prompt_id": PromptId,
    "gradient_id": GradientId,
    "prototype": Prototype,
    "frozen_features": FrozenFeatures,
    "zero_shot": ZeroShot,
    "k_means": KMeans,
    "pool_vote": PoolVote,
    "cut_off": CutOff,
    "prompt_vote": PromptVote,
    "gradient_vote": GradientVote,
    "task_given": TaskGiven,
    "frozen_features_given": FrozenFeaturesGiven,
    "zero_shot_given": ZeroShotGiven,
}


def rules_of(method: Method, config: Config) -> tuple[TaskIdentityRule, ...]:
    """Return the rules that apply to a method, each a row of its report."""
    return tuple(rule for each in RULES.values() for rule in each.of(method, config))


def keepers(rules: Sequence[TaskIdentityRule]) -> dict[str, TaskIdentityRule]:
    """Return by `statistics_name` the rules that keep statistics, one for each name."""
    return {rule.statistics_name: rule for rule in rules if rule.keeps_statistics}


def kept(rules: Sequence[TaskIdentityRule], stored: Container[str]) -> tuple[TaskIdentityRule, ...]:
    """Return the rules that a run can go on with, whose finished tasks have `stored`.

    `stored` names the arrays of one of its tasks, "statistics/NAME" among them. A rule that keeps
    statistics needs at least one of its names there.
    """

    def has(rule: TaskIdentityRule) -> bool:
        names = rule.statistics_shapes(1)
        return not names or any(f"statistics/{name}" in stored for name in names)

    return tuple(rule for rule in rules if has(rule))


def choose(
    rules: Sequence[TaskIdentityRule], validation: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[TaskIdentityRule, str]:
    """Return the rule that answers where nobody names one, and why, in a few words.

    That is the one with the most correct answers on the images held out for validation, whose
    counts `validation` has by protocol and task; without those the prototypes where they are kept,
    else the first. Only rules that can stand alone are candidates.
    """
    able = {rule.key: rule for rule in rules if rule.can_stand_alone()}
    key, because = chosen(list(able), validation)
    return able[key], because


def chosen(
    keys: Sequence[str], validation: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[str, str]:
    """Return what `choose` does, by the protocols of rules that can stand alone, at least one."""
    measured = {
        key: float(np.mean([row["correct"] / row["total"] for row in validation[key]]))
        for key in keys
        if validation.get(key)
    }
    if measured:
        best = max(measured, key=lambda key: measured[key])
        return best, f"the best on validation images, {100 * measured[best]:.2f}%"
    prototype = f"{Prototype.grouping}/{Prototype.name}"
    if prototype in keys:
        return prototype, "the tasks keep statistics for it, and nothing was held out"
    return keys[0], "nothing was held out to choose by"


def grouping_of(key: str) -> str:
    """Return the grouping of a protocol's images: "per_sample" of "per_sample/prompt_id"."""
    return key.partition("/")[0]


def rule_of(key: str) -> type[TaskIdentityRule] | None:
    """Return the class of the protocol `key`, such as "per_sample/prompt_id".

    It is None where no rule has it: a run may have one that is not registered here.
    """
    grouping, _, name = key.partition("/")
    for rule in RULES.values():
        if rule.grouping == grouping and rule.title_of(name) is not None:
            return rule
    return None


def is_reference(key: str) -> bool:
    """Whether no network answers under a protocol, so that no method has a part in its figures."""
    rule = rule_of(key)
    return rule is not None and not rule.needs_network


def title(key: str) -> str:
    """Return a protocol's title for people, the key itself where no rule here has it."""
    rule = rule_of(key)
    return rule.title_of(key.partition("/")[2]) if rule else key


def probabilities(log_probabilities: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return probabilities `[N, classes]`, which sum to 1, from logs, -inf where there is none."""
    return scipy.special.softmax(log_probabilities / temperature, axis=1)


def options() -> dict[str, type[TaskIdentityRule]]:
    """Return the rules that `predict --task-id` and `Predictor` offer, by option."""
    return {rule.option: rule for rule in RULES.values() if rule.option}


def compute_gradients(rules: Iterable[TaskIdentityRule], images: ImageBatch) -> None:
    """Compute ∂H/∂α of all images that `rules` ask for, in one go and in two sizes of passes.

    A go for each rule would have passes of more sizes, and in an evaluation each size's program
    takes longer to compile than the padding to compute.
    """
    asked: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for rule in rules:
        asked[images.selected_apart and rule.by_batch].append(rule.gradient_pairs(images))
    for in_batch, pairs in asked.items():
        if pairs:
            smallest = images.batching.sizes[:2][-1]
            images.gradients_of(np.concatenate(pairs), in_batch, smallest)
