"""Evaluation after a task: every task-identity rule that applies, on every test image.

The engine is `inference.engine`, the same as for users' images. Every distinct (image, task) pair
is run once, whichever rules ask for it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from soft_jax.evaluation import calibration
from soft_jax.evaluation.predictions import Predictions
from soft_jax.inference import engine
from soft_jax.inference.engine import Batching, Model
from soft_jax.inference.rules import (
    ORACLE,
    ImageBatch,
    TaskIdentityRule,
    TestBatches,
    compute_gradients,
    probabilities,
)

# Held-out images of a task that temperatures are fitted on: of one number, that is plenty.
FITTED_PER_TASK = 1000


@dataclasses.dataclass(frozen=True)
class Row:
    """One protocol's counts on one task's test images.

    `identified` counts the images by the task that they were given to.
    """

    correct: int
    task_correct: int
    total: int
    identified: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How test images are batched.

    `batch_size` is that of the published test batches, `eval_batch_size` that of forward passes.
    `prepared`: whether test images come at the model's size, prepared already.
    """

    mesh: Mesh
    batch_size: int
    eval_batch_size: int
    prepared: bool = False

    @property
    def batching(self) -> Batching:
        """Return the sizes of forward passes."""
        return Batching(self.mesh, self.eval_batch_size)

    @property
    def chunk(self) -> int:
        """Return how many images have their tokens in memory at once.

        They are whole test batches, about four forward passes.
        """
        return self.batch_size * max(self.batching.chunk // self.batch_size, 1)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the protocols made of one task's test images.

    By protocol: `task_ids` int `[N]`, `logits` `[N, classes]` of that task's network where one
    answers, `scores`, with -inf for classes that the protocol does not let win, and
    `log_probabilities` `[N, classes]`, before any temperature. `alpha_gradients` are the test
    batches', `[batches, seen]` by shots; empty without masks.
    """

    task_ids: dict[str, np.ndarray]
    logits: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    log_probabilities: dict[str, np.ndarray]
    alpha_gradients: dict[int, np.ndarray]

    @classmethod
    def concatenate(cls, parts: Sequence["Answers"]) -> "Answers":
        """Return the answers to consecutive chunks as one."""

        def joined(field):
            return {
                key: np.concatenate([getattr(part, field)[key] for part in parts])
                for key in getattr(parts[0], field)
            }

        return cls(*(joined(field.name) for field in dataclasses.fields(cls)))


def last_in_batch(tasks: Sequence[int], sizes: Sequence[int], batch_size: int) -> np.ndarray:
    """Return for each test image the task of the last image in its batch, int `[sum(sizes)]`.

    The images of `tasks`, `sizes` each, stand in a row and are cut into batches, so that a batch
    may hold images of several tasks.
    """
    task_of = np.repeat(tasks, sizes)
    index = np.arange(len(task_of)) // batch_size
    return task_of[np.minimum((index + 1) * batch_size, len(task_of)) - 1]


def answer(
    model: Model,
    rules: Sequence[TaskIdentityRule],
    images: np.ndarray,
    query: np.ndarray,
    task: int,
    settings: Settings,
    last_in_batch: np.ndarray | None = None,
) -> Answers:
    """Identify and classify test images of one task under every rule.

    Args:
        model: the model of the tasks seen.
        rules: those that apply to its method.
        images: uint8 `[N, H, W, 3]`.
        query: q(x) `[N, dim]`.
        task: the images' task.
        settings: how they are batched.
        last_in_batch: int `[N]`, as `ImageBatch` has it; the images' task if not given.
    """
    if last_in_batch is None:
        last_in_batch = np.full(len(images), task)
    starts = range(0, len(images), settings.chunk)
    parts = [slice(start, start + settings.chunk) for start in starts]
    return Answers.concatenate(
        [
            _answer_chunk(
                model, rules, images[part], query[part], task, settings, last_in_batch[part]
            )
            for part in parts
        ]
    )


def _answer_chunk(
    model: Model,
    rules: Sequence[TaskIdentityRule],
    images: np.ndarray,
    query: np.ndarray,
    task: int,
    settings: Settings,
    last_in_batch: np.ndarray,
) -> Answers:
    batches = TestBatches(len(images), settings.batch_size)
    tokens, batch_tokens = _tokens(model, images, query, batches, settings)
    given = np.full(len(images), task)
    batch = ImageBatch(
        model,
        tokens,
        query,
        settings.batching,
        given,
        batches,
        batch_tokens=batch_tokens,
        last_in_batch=last_in_batch,
    )
    compute_gradients(rules, batch)
    ids = {rule.key: rule.identify(batch) for rule in rules}
    asking = {rule.key: rule for rule in rules if rule.needs_network}
    alone = {
        key: rule for key, rule in asking.items() if not (batch.selected_apart and rule.by_batch)
    }
    logits = _logits(batch, tokens, alone, ids)
    if len(alone) < len(asking):
        together = {key: rule for key, rule in asking.items() if key not in alone}
        logits |= _logits(batch, batch_tokens, together, ids)
    answers = Answers({}, {key: logits[key] for key in asking}, {}, {}, batch.alpha_gradients)
    for rule in rules:
        key, tasks = rule.key, ids[rule.key]
        answers.scores[key] = rule.scores(batch, logits.get(key), tasks)
        answers.log_probabilities[key] = rule.log_probabilities(batch, answers.scores[key], tasks)
        answers.task_ids[key] = rule.final_tasks(batch, answers.scores[key], tasks)
    return answers


def _tokens(
    model: Model, images: np.ndarray, query: np.ndarray, batches: TestBatches, settings: Settings
) -> tuple[engine.Tokens, engine.Tokens]:
    """Return trunk tokens of each image by itself, and as part of its test batch.

    The two differ where a batch selects other prompts of a pool than an image by itself; otherwise
    they are the same array.
    """
    batching, prepared, host = settings.batching, settings.prepared, model.method.host
    if not host.pools:
        tokens, _ = engine.encode(model, images, batching, queried=False, prepared=prepared)
        return tokens, tokens
    selected = engine.pool_selection(model, query, batching)
    voted = np.empty_like(selected)
    for batch in range(batches.index[-1] + 1):
        members = batches.index == batch
        voted[members] = host.select_together(selected[members], np.ones(members.sum(), np.float32))
    return tuple(
        engine.encode(model, images, batching, False, prepared, selected=chosen)[0]
        for chosen in (selected, voted)
    )


def _logits(
    batch: ImageBatch,
    tokens: engine.Tokens,
    rules: dict[str, TaskIdentityRule],
    ids: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Return logits `[N, classes]` by protocol.

    Every distinct (task, image, place in its batch) is run once.
    """
    method = batch.model.method
    place = np.stack([batch.batches.position, batch.batches.length], axis=1)
    columns = []
    for key, rule in rules.items():
        # Where tasks have nothing of their own, all protocols ask for the same.
        pairs = engine.alone(ids[key] if method.by_task else np.zeros_like(ids[key]))
        # Every published figure, also with the task given, is by batches.
        if method.host.depends_on_place and (rule.by_batch or rule.grouping == ORACLE):
            pairs[:, 2:] = place
        columns.append(pairs)
    pairs, inverse = np.unique(np.concatenate(columns), axis=0, return_inverse=True)
    logits = engine.logits(batch.model, tokens, pairs, batch.batching)
    parts = np.split(inverse.reshape(-1), len(rules))
    return {key: logits[part] for key, part in zip(rules, parts, strict=True)}


def count(answers: Answers, labels: np.ndarray, task: int, num_tasks: int) -> dict[str, Row]:
    """Count by protocol how many of a task's images, of the classes `labels` `[N]`, were right."""
    rows = {}
    for protocol, tasks in answers.task_ids.items():
        counts = np.bincount(tasks, minlength=num_tasks)
        rows[protocol] = Row(
            correct=int((answers.scores[protocol].argmax(axis=1) == labels).sum()),
            task_correct=int((tasks == task).sum()),
            total=len(labels),
            identified=tuple(counts.tolist()),
        )
    return rows


@dataclasses.dataclass
class Stage:
    """What every rule makes of one part of the data set after a task, filled task by task.

    By protocol, `rows` of the tasks seen. Beside them, images held out `for_fit` give the
    `fitted_temperatures`; of others there are the `predictions`, and by protocol the
    `calibration_counts` of these.
    """

    model: Model
    rules: Sequence[TaskIdentityRule]
    settings: Settings
    temperatures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    for_fit: bool = False
    rows: dict[str, list[Row]] = dataclasses.field(default_factory=dict)
    _parts: list[Predictions] = dataclasses.field(default_factory=list)
    _fitted_on: list[tuple[dict[str, np.ndarray], np.ndarray]] = dataclasses.field(
        default_factory=list
    )

    def add(
        self,
        task: int,
        images: np.ndarray,
        labels: np.ndarray,
        query: np.ndarray,
        index: np.ndarray,
        files: Sequence[str],
        last_in_batch: np.ndarray | None = None,
    ) -> None:
        """Identify and classify a task's images under every rule, and count what was right.

        `images`, `query`, `task` and `last_in_batch` are those of `answer`, `labels` int `[N]`,
        `index` and `files` as `Predictions` has them.
        """
        answers = answer(self.model, self.rules, images, query, task, self.settings, last_in_batch)
        num_tasks = len(self.model.rows["key"])
        for protocol, row in count(answers, labels, task, num_tasks).items():
            self.rows.setdefault(protocol, []).append(row)
        if self.for_fit:
            few = np.linspace(0, len(labels) - 1, min(len(labels), FITTED_PER_TASK)).astype(int)
            logs = {key: array[few] for key, array in answers.log_probabilities.items()}
            self._fitted_on.append((logs, labels[few]))
            return
        names, classes, sure = self.model.method.class_names, {}, {}
        for protocol, scores in answers.scores.items():
            chosen = scores.argmax(axis=1)
            all_probabilities = probabilities(
                answers.log_probabilities[protocol], self.temperatures.get(protocol, 1.0)
            )
            classes[protocol] = tuple(names[class_] for class_ in chosen)
            sure[protocol] = all_probabilities[np.arange(len(labels)), chosen]
        truth = tuple(names[class_] for class_ in labels)
        given = np.full(len(labels), task)
        self._parts.append(Predictions(index, tuple(files), given, truth, classes, sure))

    @functools.cached_property
    def predictions(self) -> Predictions:
        """Return the answers to all images, once the last task is added."""
        return Predictions.concatenate(self._parts)

    @property
    def calibration_counts(self) -> dict[str, dict[str, list[float]]]:
        """Return `calibration.count` of the answers, by protocol."""
        answers = self.predictions
        return {
            key: calibration.count(sure, answers.correct(key))
            for key, sure in answers.probabilities.items()
        }

    def fitted_temperatures(self) -> dict[str, float]:
        """Return by protocol the temperature under which the images' own classes are likeliest."""
        labels = np.concatenate([labels for _, labels in self._fitted_on])
        return {
            key: calibration.fit_temperature(
                np.concatenate([logs[key] for logs, _ in self._fitted_on]), labels
            )
            for key in self.rows
        }
