"""Replay the float64 trace of the published CLIP host, CLIP-PGP, through our own functions.

Two tasks of 10 classes: one context a task, one image prompt for both, SGD with momentum and a
cosine by epoch; in the second task the published projection; then its CIL, whose logits are cut
at each test batch's last task.
"""

from collections.abc import Mapping
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from soft_jax.evaluation import evaluate
from soft_jax.inference import rules
from soft_jax.methods.clip_hosts import SharedImagePrompt
from soft_jax.methods.method import Method
from soft_jax.methods.regularization import PGP
from soft_jax.models.clip import CLIPConfig
from soft_jax.models.protocol import Preprocessing
from soft_jax.training import train_step

BATCH, STEPS, EPOCHS = 8, 20, 5
RATES = ((0.001, 5e-4), (0.01, 2e-4))  # learning rate and weight decay, by task
TASK_OF_CLASS = np.arange(30) // 10
ARCHITECTURE = CLIPConfig(
    image_size=32,
    patch_size=8,
    dim=64,
    depth=3,
    heads=1,
    mlp_dim=256,
    text_dim=32,
    text_depth=2,
    text_heads=2,
    text_mlp_dim=128,
    embed_dim=16,
    quick_gelu=True,
    dtype="float64",
    preprocessing=Preprocessing(),  # the trace's images are normalized
)


def is_one(trace: Mapping[str, np.ndarray]) -> bool:
    """Whether a trace is the CLIP host's."""
    return "w/visual.proj" in trace


def _backbone(trace: Mapping[str, np.ndarray]) -> dict:
    arrays = {
        name.removeprefix("w/"): array.astype(np.float64)
        for name, array in trace.items()
        if name.startswith("w/")
    }
    embeddings = np.zeros((ARCHITECTURE.vocabulary, ARCHITECTURE.text_dim))
    embeddings[trace["token_ids"]] = trace["token_rows"]
    params, left_out = ARCHITECTURE.convert(arrays | {"token_embedding.weight": embeddings})
    assert not left_out, left_out
    return jax.tree.map(jnp.asarray, params)


def _images(seed: int, count: int) -> np.ndarray:
    """Draw the trace's images, [N, H, W, 3]."""
    patterns = np.random.RandomState(1000).standard_normal((5, 3, 32, 32))
    rng = np.random.RandomState(seed)
    shares = rng.standard_normal((count, 5)) * [1.0, 0.9, 0.8, 0.7, 0.6]
    noise = 0.02 * rng.standard_normal((count, 3, 32, 32))
    return np.moveaxis(np.tensordot(shares, patterns, 1) + noise, 1, 3)


def _batch(images, labels, rows, task: int, projector) -> dict:
    return {
        "images": jnp.asarray(images[rows]),
        "labels": jnp.asarray(labels[rows]),
        "weights": jnp.ones(len(rows)),
        "class_mask": jnp.asarray(task == TASK_OF_CLASS),
        "freeze_g_prompt": False,
        "memory": {"projector": jnp.asarray(projector)[None]},
        "rates": train_step.Rates(
            *map(np.float64, RATES[task]), np.int32(EPOCHS), np.int32(STEPS // EPOCHS)
        ),
    }


def replay(trace: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the largest absolute error of each quantity of the trace. Needs float64 enabled."""
    errors: dict[str, float] = {}

    def compare(name: str, ours, theirs) -> None:
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
        errors[name] = max(errors.get(name, 0.0), float(np.abs(ours - theirs).max(initial=0)))

    params = _backbone(trace)
    names = tuple(map(str, trace["class_names"]))
    images = [_images(1001, 64), _images(1002, 64), _images(1010, 45)]
    for drawn, check in zip(images, trace["images/check"], strict=True):
        ours = [drawn.sum(), (drawn**2).sum(), drawn[0, 0, 0, 0], drawn[-1, -1, -1, -1]]
        np.testing.assert_allclose(ours, check, rtol=1e-9)

    def step_config(by_class: bool) -> train_step.StepConfig:
        host = SharedImagePrompt(length=5, by_class=by_class, context_length=16)
        method = Method(ARCHITECTURE, names, classes_at_once=10, host=host, strategy=PGP())
        return train_step.StepConfig(
            method, learning_rate=0.0, clip_norm=1e30, optimizer="sgd", scheduled=True
        )

    config = step_config(by_class=False)
    step = jax.jit(train_step.train_step, static_argnames="step_config")
    gradients = jax.jit(train_step.gradients, static_argnames="step_config")
    key = jax.random.key(0)
    contexts = [jnp.asarray(c, float)[None] for c in trace["init/context"]]
    shared = {
        "image_prompt": jnp.asarray(trace["init/image_prompt"], float),
        "head": {"text": jnp.zeros((len(names), ARCHITECTURE.embed_dim))},
    }
    nothing = np.zeros((ARCHITECTURE.dim, ARCHITECTURE.dim))
    for task, projector in enumerate((nothing, trace["memory1/projection"])):
        of = f"task{task + 1}"
        labels = trace[f"{of}/labels"]
        state = train_step.init_state(config, {"context": contexts[task]}, shared)
        for index, rows in enumerate(trace[f"{of}/steps"]):
            batch = _batch(images[task], labels, rows, task, projector)
            if index == 0:
                raw = _batch(images[task], labels, rows, task, nothing)
                grads, terms = gradients(state.trainable, params, raw, step_config=config)
                own = terms["logits"][:, 10 * task : 10 * task + 10]
                compare("first_logits", own, trace[f"{of}/logits"])
                image_prompt, context = grads["shared"]["image_prompt"], grads["adapter"]["context"]
                compare("first_grad_image_prompt", image_prompt, trace[f"{of}/grad_image_prompt"])
                compare("first_grad_context", context[0], trace[f"{of}/grad_context"])
                if task:
                    grads, _ = gradients(state.trainable, params, batch, step_config=config)
                    theirs = trace[f"{of}/grad_image_prompt_projected"]
                    compare("first_grad_projected", grads["shared"]["image_prompt"], theirs)
            rate = batch["rates"].at(jnp.int32(index))
            compare("learning_rate", rate, trace[f"{of}/learning_rates"][index])
            as_levels = batch | {"images": 255 * batch["images"]}  # which a step divides by 255
            state, terms = step(state, params, as_levels, key, step_config=config)
            compare("loss", terms["loss"], trace[f"{of}/losses"][index])
            if index in (0, STEPS - 1):
                after = "1" if index == 0 else "20"
                trained = state.trainable
                prompt, context = trained["shared"]["image_prompt"], trained["adapter"]["context"]
                compare(f"image_prompt_{after}", prompt, trace[f"{of}/image_prompt_{after}"])
                compare(f"context_{after}", context[0], trace[f"{of}/context_{after}"])
        shared, contexts[task] = state.trainable["shared"], state.trainable["adapter"]["context"]
        made = config.method.with_own_classes
        shared = made(params, {"context": contexts[task]}, shared, task == TASK_OF_CLASS)
    _evaluate(trace, config.method, params, shared, images[2], compare)
    _by_class(trace, step_config(by_class=True), params, images[0], step, gradients, compare)
    return errors


def _evaluate(trace, method, params, shared, images, compare) -> None:
    tokens = method.trunk(params, shared, jnp.asarray(images))
    logits = np.asarray(method.logits(params, {}, shared, tokens))
    compare("eval_logits", logits[:, :20], trace["eval/logits"])
    tasks = trace["eval/labels"] // 10
    last = evaluate.last_in_batch([0, 1], [25, 20], BATCH)
    compare("eval_columns", 10 * (last + 1), trace["eval/columns"])
    of_class = np.where(TASK_OF_CLASS < 2, TASK_OF_CLASS, -1)
    model = SimpleNamespace(task_of_class=of_class, tasks=(0, 1))
    batch = SimpleNamespace(model=model, last_in_batch=last)
    cut = rules.CutOff().scores(batch, logits, tasks).argmax(axis=1)
    compare("eval_predictions_cil", cut, trace["eval/predictions_cil"])
    given = rules.TaskGiven().scores(batch, logits, tasks).argmax(axis=1)
    compare("eval_predictions_til", given, trace["eval/predictions_til"])


def _by_class(trace, config, params, images, step, gradients, compare) -> None:
    """Compare steps with a context for each class."""
    shared = {
        "image_prompt": jnp.asarray(trace["init/image_prompt"], float),
        "head": {"text": jnp.zeros((len(TASK_OF_CLASS), ARCHITECTURE.embed_dim))},
    }
    adapter = {"context": jnp.asarray(trace["init/context_csc"], float)}
    state, labels = train_step.init_state(config, adapter, shared), trace["task1/labels"]
    nothing = np.zeros((ARCHITECTURE.dim, ARCHITECTURE.dim))
    for index, rows in enumerate(trace["task1/steps"][:5]):
        batch = _batch(images, labels, rows, 0, nothing)
        if index == 0:
            grads, terms = gradients(state.trainable, params, batch, step_config=config)
            compare("by_class_logits", terms["logits"][:, :10], trace["csc/logits"])
            prompt, context = grads["shared"]["image_prompt"], grads["adapter"]["context"]
            compare("by_class_grad_image_prompt", prompt, trace["csc/grad_image_prompt"])
            compare("by_class_grad_context", context, trace["csc/grad_context"])
        as_levels = batch | {"images": 255 * batch["images"]}
        state, terms = step(state, params, as_levels, jax.random.key(0), step_config=config)
        compare("by_class_loss", terms["loss"], trace["csc/losses"][index])
    trained = state.trainable
    compare("by_class_image_prompt", trained["shared"]["image_prompt"], trace["csc/image_prompt_5"])
    compare("by_class_context", trained["adapter"]["context"][:3], trace["csc/context_5"])
