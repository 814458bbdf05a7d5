"""Replay a float64 trace of the published PyTorch code through our own functions: python -m
tests.replay FILE.npz

Prints the largest absolute error of each quantity. Sizes, layers, tasks and batches come from the
trace.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from soft_jax import distributed, pytrees
from soft_jax.config import Config
from soft_jax.evaluation import evaluate, metrics
from soft_jax.inference import engine, rules
from soft_jax.methods import hosts, masks
from soft_jax.methods.method import Adapter, Method, Shared, begin
from soft_jax.models.vit import ViTConfig
from soft_jax.training import train_step
from tests import replay_clip


def method_of(trace: Mapping[str, np.ndarray], meta: dict) -> Method:
    """The method that a trace ran; the masked weights are those it has masks for."""
    c = meta["config"]
    vit = ViTConfig(
        c["image_size"],
        c["patch_size"],
        c["dim"],
        c["depth"],
        c["heads"],
        int(c["dim"] * c["mlp_ratio"]),
        "float64",
    )
    masked = [key.split("/")[1] for key in trace if key.startswith("init/blocks.")]
    kernels = tuple(_mask_path(name) for name in masked)
    layers = tuple(sorted({vit.layer_of(path) for path in kernels}))
    host = hosts.DualPrompt(
        tuple(c["e_layers"]),
        c["e_length"],
        tuple(c["g_layers"]),
        c["g_length"],
        meta["prefix_layout"],
    )
    return Method(
        architecture=vit,
        class_names=tuple(map(str, range(c["classes"]))),
        host=host,
        reparametrization=masks.SoftMask(kernels, layers) if masked else None,
    )


def _mask_path(name: str) -> str:
    _, layer, part, dense, _ = name.split(".")
    return f"blocks_{layer}/{part}/{dense}/kernel"


def adapter_of(arrays: Mapping[str, np.ndarray], task: int) -> Adapter:
    """Task `task`'s adapter from a trace's arrays (names without their `init/` or
    `after_task{t}/`).
    """
    adapter = {
        "key": arrays["e_prompt.prompt_key"][task],
        "prompt": arrays["e_prompt.prompt"][:, :, task],
    }
    masks = {
        _mask_path(name): arrays[name][task].T for name in arrays if name.endswith("ones_weight")
    }
    return adapter | ({"mask": pytrees.unflatten(masks)} if masks else {})


def shared_of(arrays: Mapping[str, np.ndarray]) -> Shared:
    """The shared part from a trace's arrays."""
    return {
        "g_prompt": arrays["g_prompt"],
        "head": {"kernel": arrays["head.weight"].T, "bias": arrays["head.bias"]},
    }


def model_of(
    method, backbone, shared, adapters, tasks, task_of_class, budget=2**30, **others
) -> engine.Model:
    """A model of adapters that are all in memory."""
    rows = {
        name: jax.numpy.stack([adapter.get(name, np.zeros(shape)) for adapter in adapters])
        for name, shape in method.row_shapes.items()
    }
    weights_ = engine.TaskWeights(method, backbone, adapters.__getitem__, budget)
    return engine.Model(method, backbone, shared, rows, weights_, tasks, task_of_class, **others)


def replay(path: str | Path) -> dict[str, float]:
    """Largest absolute error of each quantity of the trace at `path`; ids and accuracies
    included. Needs float64 enabled.
    """
    with np.load(path) as file:
        trace = {key: file[key] for key in file.files}
    if replay_clip.is_one(trace):
        return replay_clip.replay(trace)
    meta = json.loads(str(trace["meta"]))
    c, method = meta["config"], method_of(trace, meta)
    params, left_out = method.architecture.convert(_under(trace, "backbone/"))
    assert not left_out, left_out
    step_config = train_step.StepConfig(method, learning_rate=c["lr"] * c["batch"] / 256)
    mesh = distributed.data_mesh(jax.devices()[:1])
    step = train_step.compile_step(step_config, mesh)

    init = _under(trace, "init/")
    adapters = [adapter_of(init, task) for task in range(c["tasks"])]
    shared = shared_of(init)
    task_of_class = np.arange(c["classes"]) // (c["classes"] // c["tasks"])
    errors: dict[str, float] = {}

    def compare(name: str, ours, theirs) -> None:
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
        errors[name] = max(errors.get(name, 0.0), float(np.abs(ours - theirs).max(initial=0)))

    def compare_trees(name: str, ours, theirs) -> None:
        jax.tree.map(lambda a, b: compare(name, a, b), ours, theirs)

    def batch_of(task: int, index: int) -> dict:
        images, labels = trace["train_images"][task, index], trace["train_labels"][task, index]
        return {
            "images": images,
            "labels": labels,
            "weights": np.ones(len(labels)),
            "class_mask": task_of_class == task,
            "freeze_g_prompt": False,
            "memory": {},
        }

    settings = evaluate.Settings(
        mesh, c["eval_batch"], eval_batch_size=c["eval_batch"] * c["eval_batches"]
    )
    applying = rules.rules_of(method, Config(shots=(c["shots"],), prototype_features=0))
    prompt_vote, gradient_vote = rules.PromptVote().key, rules.GradientVote(c["shots"]).key
    published = {
        prompt_vote: "prompt_id",
        gradient_vote: "gradient_id",
        rules.TaskGiven().key: "task_incremental",
    }
    accuracy = {name: np.zeros((c["tasks"], c["tasks"])) for name in published.values()}
    count = 0
    for task in range(c["tasks"]):
        adapters[task] = begin(adapters[task], adapters[task - 1] if task else None)
        state = train_step.init_state(step_config, adapters[task], shared)
        if task == 0:
            batch = batch_of(0, 0)
            first, terms = train_step.gradients(
                state.trainable, params, batch | {"images": batch["images"] / 255}, step_config
            )
            compare("first_query", terms["query"], trace["first_query"])
            compare("first_logits", terms["logits"], trace["first_logits"])
            theirs = _under(trace, "first_grad/")
            compare_trees(
                "first_grad", first, {"adapter": adapter_of(theirs, 0), "shared": shared_of(theirs)}
            )
        for index in range(c["steps"]):
            state, terms = step(state, params, batch_of(task, index), jax.random.key(0))
            for name in ("loss", "cross_entropy", "key_similarity", "grad_norm"):
                compare(name, terms[name], trace[name][count])
            count += 1
        adapters[task], shared = jax.device_get(
            (state.trainable["adapter"], state.trainable["shared"])
        )
        theirs = _under(trace, f"after_task{task}/")
        compare_trees("trained_arrays", shared, shared_of(theirs))
        for seen in range(task + 1):
            compare_trees("trained_arrays", adapters[seen], adapter_of(theirs, seen))
        model = model_of(method, params, shared, adapters, tuple(range(task + 1)), task_of_class)
        for seen in range(task + 1):
            images = trace["eval_images"][seen].reshape(-1, *trace["eval_images"].shape[-3:])
            labels = trace["eval_labels"][seen].reshape(-1)
            query = engine.queries(method, params, images, settings.batching)
            answers = evaluate.answer(model, applying, images, query, seen, settings)
            rows = evaluate.count(answers, labels, seen, len(model.rows["key"]))
            for protocol, row in rows.items():
                if name := published.get(protocol):
                    accuracy[name][seen, task] = 100 * row.correct / row.total
            batches = slice(0, None, c["eval_batch"])
            for protocol in (prompt_vote, gradient_vote):
                if protocol not in answers.task_ids:
                    continue
                name = published[protocol]
                compare(
                    f"{name}s", answers.task_ids[protocol][batches], trace[f"{name}s"][task, seen]
                )
                if task == c["tasks"] - 1:
                    ours = answers.logits[protocol].reshape(c["eval_batches"], c["eval_batch"], -1)
                    for index in range(c["eval_batches"]):
                        compare(
                            f"eval_logits_{name}",
                            ours[index],
                            trace[f"eval_logits_{name}/{seen}/{index}"],
                        )
            for gradients in answers.alpha_gradients.values():
                compare(
                    "alpha_gradients",
                    gradients,
                    trace["alpha_gradients"][task, seen, :, : task + 1],
                )
    for name, matrix in accuracy.items():
        if f"accuracy_{name}" in trace:
            compare(f"accuracy_{name}", matrix, trace[f"accuracy_{name}"])
            figures = metrics.summarize(matrix)
            published = meta[name]
            for ours, theirs in (
                ("final_average", "average_accuracy"),
                ("forgetting", "forgetting"),
                ("backward_transfer", "backward"),
            ):
                compare(f"{ours}_{name}", figures[ours], published[theirs])
    return errors


def _under(trace: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        key.removeprefix(prefix): array for key, array in trace.items() if key.startswith(prefix)
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    jax.config.update("jax_enable_x64", True)
    for name, error in replay(sys.argv[1]).items():
        print(f"{name:32s} {error:.2e}")
