"""Why an image got its answer: every rule's scores of every task, what each masked layer did to the
answer, and what the [class] token looked at.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from soft_jax import pytrees
from soft_jax.config import Config, from_settings
from soft_jax.data import images as images_lib
from soft_jax.data.augmentation import to_unit
from soft_jax.inference import assembly, engine, rules, zero_shot
from soft_jax.inference import predictor as predictor_lib
from soft_jax.inference.predictor import Predictor
from soft_jax.inference.rules import ImageBatch, TaskIdentityRule
from soft_jax.methods.method import Method, Shared
from soft_jax.models.protocol import Prefix
from soft_jax.store.library import LibraryReader, LibraryState, holds_library

TOP = 5  # classes of an answer
ALL = "all"  # in the place of a layer: every layer's masks at once


class RuleAnswer(NamedTuple):
    """What one rule made of the image.

    `scores` float `[tasks]` are its scores of the tasks, None where it compares none; `task` is the
    task that it took the image to be of. `classes` int `[TOP or fewer]` are the most probable, with
    their `probabilities`.
    """

    rule: TaskIdentityRule
    scores: np.ndarray | None
    task: int
    classes: np.ndarray
    probabilities: np.ndarray


class LayerEffect(NamedTuple):
    """The answer with one layer's masks put back to 1: `margin` and `probability` of the class that
    won with them. `layer` counts from 0, or is `ALL`.
    """

    layer: int | str
    margin: float
    probability: float


class Attention(NamedTuple):
    """What the [class] token of the last layer attends to, in shares of 1.

    `patches` `[grid, grid]` are the image's; `itself` and `prompts` are what is left.
    """

    patches: np.ndarray
    itself: float
    prompts: float


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why an image got its answer.

    Tasks are places in `task_names`. `image` uint8 `[size, size, 3]` is as the model sees it.
    `network` is the task whose network answered, `class_` the class that won, `margin` its logit
    less the next highest of the classes that could win (its logit alone where no other could), and
    `probability` its share of the softmax over those: the network's own view, without what a rule
    adds. `own` is the place in `answers` of the rule that `predict` goes by.
    """

    task_names: tuple[str, ...]
    class_names: tuple[str, ...]
    task_of_class: np.ndarray
    image: np.ndarray
    answers: tuple[RuleAnswer, ...]
    own: int
    because: str
    network: int
    class_: int
    margin: float
    probability: float
    layers: tuple[LayerEffect, ...]
    frozen: Attention
    masked: Attention


def load(
    root: str | PathLike, tasks: Sequence[int] | Sequence[str] | None = None
) -> tuple[Predictor, tuple[TaskIdentityRule, ...]]:
    """Load the predictor of a library or a run, with what all of its rules by one image need.

    `tasks` are those to choose from. Returns it and those rules. Raises UserError as
    `Predictor.load`.
    """
    if holds_library(root):
        reader = LibraryReader(root)
        make = functools.partial(_load_of_library, reader, tasks)
        return predictor_lib.read_whole(reader, make)
    run = predictor_lib.read_run(root, tasks)
    return _with_all_rules(
        functools.partial(predictor_lib.of_run, run),
        lambda able: rules.kept(able, run.latest.sha256),
        run.config,
    )


def _load_of_library(
    reader: LibraryReader, names: Sequence[str] | None, state: LibraryState
) -> tuple[Predictor, tuple[TaskIdentityRule, ...]]:
    versions = predictor_lib.active_versions(reader, state, names)
    config = from_settings(state.config)
    backbone = assembly.load_backbone(config, state.backbone_sha256)
    make = functools.partial(predictor_lib.of_versions, reader, state, versions, backbone)
    return _with_all_rules(make, lambda able: able, config)


def _with_all_rules(
    make: Callable[..., Predictor],
    kept: Callable[[Sequence[TaskIdentityRule]], Sequence[TaskIdentityRule]],
    config: Config,
) -> tuple[Predictor, tuple[TaskIdentityRule, ...]]:
    """Return what `load` does; `make(rule's option)` reads the predictor of one rule.

    `kept` takes away the rules that the tasks keep nothing for.
    """
    predictor = make()
    model = predictor.model
    able = kept([r for r in rules.rules_of(model.method, config) if r.grouping == rules.PER_SAMPLE])
    solved = dict(model.solved)
    for rule in able:
        if rule.keeps_statistics and rule.option and rule.statistics_name not in solved:
            solved |= make(rule.option, params=model.backbone).model.solved
    able = tuple(r for r in able if not r.keeps_statistics or r.statistics_name in solved)
    text = model.zero_shot
    if text is None and any(isinstance(rule, rules.ZeroShot) for rule in able):
        architecture, names = model.method.architecture, model.method.class_names
        text = zero_shot.text_features(architecture, model.backbone, names)
    predictor.model = dataclasses.replace(model, solved=solved, zero_shot=text)
    return predictor, able


def explain(
    predictor: Predictor, able: Sequence[TaskIdentityRule], image: str | PathLike | np.ndarray
) -> Explanation:
    """Explain the answer to one image, a file or an array as `Predictor.predict` takes it.

    `predictor` and `able` are those that `load` gave. Raises UserError where the image can't be
    used.
    """
    model, batching = predictor.model, predictor.batching
    (given,) = images_lib.as_list([image])
    prepared = images_lib.prepare(given, 0, model.method.architecture.image_size)
    queried = any(rule.needs_query for rule in able)
    tokens, query = engine.encode(model, prepared[None], batching, queried, prepared=True)
    query = np.zeros((1, 0), np.float32) if query is None else query
    batch = ImageBatch(model, tokens, query, batching)
    answers, tasks, scores = [], [], []
    for rule in able:
        named = rule.identify(batch)
        logits = engine.logits(model, tokens, engine.alone(named), batching)
        found = rule.scores(batch, logits, named)
        log_probabilities = rule.log_probabilities(batch, found, named)
        temperature = predictor.temperatures.get(rule.key, 1.0)
        probabilities = rules.probabilities(log_probabilities, temperature)[0]
        # By what `predict` goes by: the highest score, then the most probable of the others.
        first = int(found[0].argmax())
        others = [c for c in np.argsort(-probabilities, kind="stable") if c != first]
        best = np.array([first, *others[: TOP - 1]])
        best = best[(probabilities[best] > 0) | (best == first)]
        compared = rule.task_scores(batch)[0] if rule.scored_by else None
        final = int(rule.final_tasks(batch, found, named)[0])
        answers.append(RuleAnswer(rule, compared, final, best, probabilities[best]))
        tasks.append(int(named[0]))
        scores.append(found[0])
    own = next(i for i, rule in enumerate(able) if rule.key == predictor.rule.key)
    network, class_ = tasks[own], int(answers[own].classes[0])
    can_win = np.isfinite(scores[own])
    return Explanation(
        task_names=tuple(map(str, predictor.task_names)),
        class_names=predictor.class_names,
        task_of_class=model.task_of_class,
        image=prepared,
        answers=tuple(answers),
        own=own,
        because=predictor.chosen_because,
        network=network,
        class_=class_,
        **_by_layer(model, prepared, network, class_, can_win),
    )


def _by_layer(
    model: engine.Model, image: np.ndarray, task: int, class_: int, can_win: np.ndarray
) -> dict[str, Any]:
    """Return the fields of an explanation that look into the network of `task`."""
    method, backbone, weights = model.method, model.backbone, model.weights[task]
    batch = to_unit(jnp.asarray(image[None]), jax.tree.leaves(backbone)[0].dtype)
    prompt = model.rows["prompt"][task][None]

    def answered(weights: pytrees.Tree) -> tuple[float, float, Attention]:
        logits, attention = network_and_attention(
            method, backbone, weights, prompt, model.shared, batch
        )
        logits = np.asarray(logits, np.float64)[0]
        attention = Attention(*(np.asarray(part[0], np.float64) for part in attention))
        return *_margin(logits, class_, can_win), attention

    margin, probability, masked = answered(weights)
    layers = [
        LayerEffect(layer, *answered(put_back(method, backbone, weights, layer))[:2])
        for layer in masked_layers(method, weights)
    ]
    if len(layers) > 1:
        layers.append(LayerEffect(ALL, *answered(put_back(method, backbone, weights, ALL))[:2]))
    frozen = Attention(
        *(np.asarray(x[0], np.float64) for x in frozen_attention(method, backbone, batch))
    )
    return {
        "margin": margin,
        "probability": probability,
        "layers": tuple(layers),
        "masked": _shares(masked),
        "frozen": _shares(frozen),
    }


def _shares(attention: Attention) -> Attention:
    return attention._replace(itself=float(attention.itself), prompts=float(attention.prompts))


def _margin(logits: np.ndarray, class_: int, can_win: np.ndarray) -> tuple[float, float]:
    """Return by how much a class's logit is above the next, and its probability by the softmax.

    Both over the classes that can win, bool `[classes]`, and the class itself.
    """
    can_win = can_win.copy()
    can_win[class_] = True
    logits = np.where(can_win, logits, -np.inf)
    others = np.delete(logits, class_)
    next_ = others.max() if np.isfinite(others).any() else 0.0
    return float(logits[class_] - next_), float(scipy.special.softmax(logits)[class_])


def masked_layers(method: Method, weights: pytrees.Tree) -> tuple[int, ...]:
    """Return the vision tower's layers, from 0, that a task's `weights` change."""
    layers = {method.architecture.layer_of(path) for path in pytrees.flatten(weights)}
    return tuple(sorted(layers - {None}))


def put_back(
    method: Method, backbone: pytrees.Tree, weights: pytrees.Tree, layer: int | str
) -> pytrees.Tree:
    """Return a task's `weights` with those of one layer of the vision tower as the backbone has
    them, which is a mask of 1; `ALL`: of every layer.

    What stands beside the backbone's parameters (an adapter) is put to 0. The tree is the same, so
    that nothing is compiled anew.
    """
    theta, out = pytrees.flatten(backbone), {}
    for path, array in pytrees.flatten(weights).items():
        of = method.architecture.layer_of(path)
        changed = of is not None and layer in (of, ALL)
        frozen = theta[path] if path in theta else jnp.zeros_like(array)
        out[path] = frozen if changed else array
    return pytrees.unflatten(out)


@functools.partial(jax.jit, static_argnames="method")
def network_and_attention(
    method: Method,
    backbone: pytrees.Tree,
    weights: pytrees.Tree,
    prompts: jax.Array,
    shared: Shared,
    images: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Return logits `[N, classes]` of images in [0, 1] `[N, size, size, 3]`, and the attention that
    they were computed with, as `Attention` has it, `[N, ...]`.

    `weights` and `prompts` `[N, *row_shape]` are a task's. Each image is a batch of its own.
    """
    host, count = method.host, len(images)
    prefix = host.prefixes(shared, prompts, jnp.zeros(count, int), jnp.ones(count, int))
    params = pytrees.merge(backbone, weights)
    with _watching(method) as found:
        tokens = method.trunk(backbone, shared, images)
        logits = method.classify(params, prefix, shared, tokens)
    return logits, _attention(method, found, prefix, host.prompt_tokens)


@functools.partial(jax.jit, static_argnames="method")
def frozen_attention(
    method: Method, backbone: pytrees.Tree, images: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the attention of the frozen network, without masks and prompts."""
    with _watching(method) as found:
        method.query(backbone, images)
    return _attention(method, found, {}, 0)


@contextlib.contextmanager
def _watching(method: Method) -> Iterator[dict[str, jax.Array]]:
    """Yield a dict that gets, as "qkv", what the last layer's product of q, k and v gives within.

    `[N, tokens, 3 dim]`, of the network that ran last.
    """
    architecture, found = method.architecture, {}

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        layer = architecture.query_layer(context.module.path)
        if context.method_name == "__call__" and layer == architecture.depth - 1:
            found["qkv"] = out
        return out

    with nn.intercept_methods(watch):
        yield found


def _attention(
    method: Method, found: Mapping[str, jax.Array], prefix: Prefix, prompts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    weights = attention_weights(method, found["qkv"], prefix)
    # The tokens that the features are made of: the [class] token, or L2P's prompts behind it.
    rows = weights[:, :, 1 : 1 + prompts] if prompts else weights[:, :, :1]
    looked = rows.mean(axis=(1, 2))
    grid = method.architecture.grid
    before = weights.shape[-1] - weights.shape[-2]  # prefixes, in front of the tokens
    patches = looked[:, -(grid**2) :].reshape(-1, grid, grid)
    itself = looked[:, before]
    return patches, itself, jnp.maximum(1 - itself - patches.sum(axis=(1, 2)), 0)


def attention_weights(method: Method, qkv: jax.Array, prefix: Prefix) -> jax.Array:
    """Return the attention of the last layer, softmax(q k / √d), `[N, heads, tokens, keys]`.

    `qkv` `[N, tokens, 3 dim]` is what the layer's product gave; the keys of `prefix` stand in front
    of the tokens' own.
    """
    architecture = method.architecture
    heads = architecture.heads
    q, k, _ = jnp.split(qkv.astype(jnp.promote_types(qkv.dtype, jnp.float32)), 3, axis=-1)
    q, k = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k))
    if (own := prefix.get(architecture.depth - 1)) is not None:
        keys = jnp.broadcast_to(own[:, 0].astype(k.dtype), (len(k), *own.shape[2:]))
        k = jnp.concatenate([keys, k], axis=1)
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k, precision="highest") * q.shape[-1] ** -0.5
    return jax.nn.softmax(scores, axis=-1)
