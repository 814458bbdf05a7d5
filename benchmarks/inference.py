"""What inference costs, as ratios measured side by side in one run: python -m benchmarks.inference

Alternatives take turns, and a ratio is the median over the rounds. Masks are drawn at random and
nothing is trained: only times and memory are of interest. ViT-B/16 without its file: python -m
benchmarks.inference --backbone=vit_b16 --random
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
from absl import logging

from soft_jax import distributed, pytrees
from soft_jax.config import DEFAULTS, Config
from soft_jax.experiment import settings as settings_lib
from soft_jax.inference import engine, identity, prototypes, rules
from soft_jax.inference.predictor import Predictor
from soft_jax.methods import registry
from soft_jax.methods.method import Method
from soft_jax.models import backbones
from soft_jax.models.protocol import Architecture
from soft_jax.store.folder import Store
from soft_jax.store.records import RunRecord, TaskManifest

BATCH, SHOTS = 24, 7  # of the published protocol
FEATURES = 2000
NO_HASH = "0" * 64  # of the backbone and the data of runs that nobody trained


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="vit_ti8_32")
    parser.add_argument(
        "--random", action="store_true", help="draw the backbone instead of loading it"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--target-modules", default="qkv+proj", help="joined by +: qkv, proj, mlp")
    parser.add_argument("--images", type=int, default=256, help="of one request")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--tasks",
        type=int,
        nargs=2,
        default=(10, 100),
        help="the few and the many that are compared",
    )
    parser.add_argument("--memory-tasks", type=int, nargs="*", default=(10, 50, 200))
    parser.add_argument(
        "--budget-tasks",
        type=int,
        default=10,
        help="whose θ ⊙ m the budget of the memory measurement holds",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    if arguments.child:
        return _memory_of(arguments)
    print(
        f"{jax.devices()[0].device_kind} × {len(jax.devices())}, jax {jax.__version__}, "
        f"{arguments.images} images a request"
    )
    few, many = arguments.tasks
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: (
            compiled.append(event) if event.endswith("backend_compile_duration") else None
        )
    )
    requests = {count: Requests(arguments, count) for count in (few, many)}
    _dispatch(requests[few], arguments.rounds)
    _identification(requests, arguments.rounds)
    _compilations(requests[few], compiled)
    if arguments.memory_tasks:
        _memory(arguments)
    return None


def random_backbone(architecture: Architecture) -> pytrees.Tree:
    """Return frozen parameters as they are drawn, on the devices."""
    size = architecture.image_size
    images = np.zeros((1, size, size, 3), np.float32)
    return jax.jit(architecture.module().init)(jax.random.key(0), images)["params"]


def _config(arguments: argparse.Namespace, tasks: int = 10) -> Config:
    return Config(
        backbone=arguments.backbone,
        target_modules=arguments.target_modules,
        dtype=arguments.dtype,
        tasks=tasks,
    )


def _method(arguments: argparse.Namespace, classes: int) -> tuple[Method, pytrees.Tree]:
    """Return the method over that many classes, and the frozen parameters, on the devices."""
    if arguments.random:
        source = backbones.BACKBONES[arguments.backbone]
        architecture = dataclasses.replace(source.architecture, dtype=arguments.dtype)
        params = random_backbone(architecture)
    else:
        loaded = backbones.load(arguments.backbone, "", 0, arguments.dtype)
        architecture, params = loaded.architecture, jax.device_put(loaded.params)
    names = tuple(map(str, range(classes)))
    return registry.make_method(_config(arguments), architecture, names), params


class Requests:
    """Predictors of `count` tasks over one model, and what is asked of them."""

    def __init__(self, arguments: argparse.Namespace, count: int):
        self.count = count
        self.batching = engine.Batching(distributed.data_mesh(), arguments.images)
        method, params = _method(arguments, classes=10 * count)
        whole = distributed.replicated(self.batching.mesh)
        params = jax.device_put(params, whole)
        size = method.architecture.image_size
        self.images = (
            np.random.default_rng(0)
            .integers(0, 256, (arguments.images, size, size, 3))
            .astype(np.uint8)
        )
        draw = jax.jit(method.init_adapter)
        self.adapters = [draw(jax.random.key(task), params) for task in range(count)]
        query = engine.queries(method, params, self.images, self.batching, prepared=True)
        # Keys towards single images, so that tasks share the images out.
        keys = (query.astype(np.float32) - query.mean(axis=0))[np.arange(count) % len(query)]
        classes, settings = method.num_classes, Config(prototype_features=FEATURES)
        projection = prototypes.projection(settings.seed, method.architecture.feature_dim, FEATURES)
        drawn = np.random.default_rng(1).normal(0, 1e-2, (FEATURES, classes)).astype(np.float32)
        classifier = prototypes.Classifier(projection, drawn, np.ones(classes, bool))
        rows = {"key": keys, "prompt": np.stack([a["prompt"] for a in self.adapters])}
        self.model = engine.Model(
            method=method,
            backbone=params,
            shared=jax.device_put(method.init_shared(jax.random.key(1), params), whole),
            rows=jax.device_put(rows, whole),
            weights=engine.TaskWeights(method, params, self.adapters.__getitem__, 2**36),
            tasks=tuple(range(count)),
            task_of_class=np.arange(classes) // 10,
            solved=jax.device_put({rules.Prototype.name: classifier}, whole),
        )
        self.predictors = {
            option: Predictor(self.model, found, method.class_names, self.batching)
            for option, rule in rules.options().items()
            for found in rule.of(method, settings)
        }
        self.mix = np.random.default_rng(2).permutation(np.arange(arguments.images) % count)

    def per_sample(self, task_id: str) -> None:
        """Answer a request of mixed images as `predict` does; they are at their size already."""
        predictor = self.predictors[task_id]
        predictor.predict_prepared(self.images, self.mix if task_id == "oracle" else None)

    def given(self, tasks: np.ndarray) -> None:
        """Answer a request whose tasks are given."""
        self.predictors["oracle"].predict_prepared(self.images, tasks)

    def batch_prompt(self) -> None:
        """Answer the published batches, each by the majority of its images' nearest keys."""
        model, batches = self.model, rules.TestBatches(len(self.images), BATCH)
        tokens, query = engine.encode(
            model, self.images, self.batching, queried=True, prepared=True
        )
        nearest = engine.key_similarity(model, query, self.batching).argmax(axis=1)
        voted = identity.majority(nearest, batches.index, self.count)
        engine.logits(model, tokens, engine.alone(voted), self.batching)

    def batch_gradient(self) -> None:
        """Answer the published batches, each by ∂H/∂α on its first images.

        Only those need q(x), for the vote on the E-prompt; that of the others is left at 0.
        """
        model, batches = self.model, rules.TestBatches(len(self.images), BATCH)
        tokens, _ = engine.encode(model, self.images, self.batching, queried=False, prepared=True)
        shots = np.flatnonzero(batches.position < SHOTS)
        found = engine.queries(
            model.method, model.backbone, self.images[shots], self.batching, prepared=True
        )
        query = np.zeros((len(self.images), found.shape[1]), found.dtype)
        query[shots] = found
        images = rules.ImageBatch(model, tokens, query, self.batching, batches=batches)
        tasks = rules.GradientVote(SHOTS).identify(images)
        engine.logits(model, tokens, engine.alone(tasks), self.batching)


def compare(rounds: int, **alternatives: Callable[[], None]) -> dict[str, float]:
    """Return the seconds of each alternative, and by "a/b" the ratios of any two.

    They take turns, `rounds` times; each figure is the median over the rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(rounds + 1):
        for name, function in alternatives.items():
            start = time.perf_counter()
            function()
            if turn:  # the first compiles
                times[name].append(time.perf_counter() - start)
    ratios = {
        f"{a}/{b}": statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
        for a in times
        for b in times
        if a != b
    }
    return {name: statistics.median(values) for name, values in times.items()} | ratios


def _dispatch(requests: Requests, rounds: int) -> None:
    one = np.zeros(len(requests.images), int)
    times = compare(
        rounds, one=lambda: requests.given(one), mixed=lambda: requests.given(requests.mix)
    )
    print(
        f"\nThroughput, images of {requests.count} tasks mixed against one task's, tasks given: "
        f"{times['one/mixed']:.2f}"
    )
    print(f"  {len(one) / times['one']:.0f} and {len(one) / times['mixed']:.0f} images/s")


def _identification(requests: dict[int, Requests], rounds: int) -> None:
    few, many = requests.values()
    ways = {
        name: lambda r, name=name: r.per_sample(name)
        for name in ("prompt", "gradient", "prototype")
    }
    ways |= {"batch_prompt": Requests.batch_prompt, "batch_gradient": Requests.batch_gradient}
    times = compare(
        rounds,
        **{
            f"{name}@{r.count}": lambda way=way, r=r: way(r)
            for name, way in ways.items()
            for r in (few, many)
        },
    )
    print("\nTime of a request, identification and prediction")
    for name in ways:
        base = "batch_prompt" if name.startswith("batch") else "prompt"
        print(
            f"  {name:15s} T={few.count}: {times[f'{name}@{few.count}']:.3f} s"
            + (
                f", {times[f'{name}@{few.count}/{base}@{few.count}']:.2f} × {base}"
                if name != base
                else ""
            )
            + f"; T={many.count}: {times[f'{name}@{many.count}/{name}@{few.count}']:.2f} × "
            f"T={few.count}"
        )


def _compilations(requests: Requests, compiled: list[str]) -> None:
    rng = np.random.default_rng(3)
    print("\nCompilations after warm-up, 20 requests of other sizes and mixes")
    for name, predictor in requests.predictors.items():
        predictor.warm_up()
        compiled.clear()
        for _ in range(20):
            count = rng.integers(1, len(requests.images) + 1)
            predictor.predict_prepared(
                requests.images[:count],
                rng.integers(0, requests.count, count) if name == "oracle" else None,
            )
        print(f"  {name}: {len(compiled)}")


def _memory(arguments: argparse.Namespace) -> None:
    print(
        "\nPeak memory of a process that answers a mixed request, θ ⊙ m of "
        f"{arguments.budget_tasks} tasks in the budget"
    )
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.memory_tasks:
            workdir = Path(folder) / str(count)
            _write_run(arguments, workdir, count)
            for name in ("prompt", "gradient"):
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.inference",
                    *sys.argv[1:],
                    f"--child={workdir}:{name}",
                ]
                row = json.loads(
                    subprocess.run(
                        command, check=True, capture_output=True, text=True
                    ).stdout.splitlines()[-1]
                )
                text = ", ".join(
                    f"{key} {value / 2**20:.0f} MiB" for key, value in row.items() if value
                )
                print(f"  {name}, {count} tasks: {text}", flush=True)


def _write_run(arguments: argparse.Namespace, workdir: Path, count: int) -> None:
    """Write a workdir as a run would leave it, with masks that nobody trained."""
    method, params = _method(arguments, classes=10 * count)
    config = _config(arguments, count)
    record = RunRecord(
        settings=settings_lib.used_settings(config),
        backbone_sha256=NO_HASH,
        dataset_sha256=NO_HASH,
        tasks=None,
    )
    shared, draw = method.init_shared(jax.random.key(1), params), jax.jit(method.init_adapter)
    with closing(Store(workdir)) as store:
        store.claim(record, DEFAULTS)
        for task in range(count):
            items = {"adapter": draw(jax.random.key(task), params), "shared": shared}
            store.save_task(task, items, _manifest(config, task))


def _manifest(config: Config, task: int) -> TaskManifest:
    """Return a task's manifest without any figures, which `Predictor` has no use for."""
    classes = tuple(range(10 * task, 10 * task + 10))
    return TaskManifest(
        task=task,
        classes=classes,
        class_names=tuple(map(str, classes)),
        num_classes=10 * config.tasks,
        num_tasks=config.tasks,
        config=dataclasses.asdict(config),
        backbone={"name": config.backbone, "sha256": NO_HASH},
        metrics={},
        seconds={},
        parameters={},
        step_flops=None,
        bytes={},
        mask_distance_from_one={},
        weight_drift={},
        mask_density={},
        versions={},
    )


def _memory_of(arguments: argparse.Namespace) -> None:
    workdir, _, task_id = arguments.child.rpartition(":")
    method, params = _method(arguments, classes=1)
    backbone = backbones.Backbone(
        arguments.backbone, method.architecture, jax.device_get(params), NO_HASH
    )
    backbones.load = lambda *_: backbone
    each = engine.TaskWeights(method, params, dict, 0).bytes_each
    predictor = Predictor.load(
        workdir,
        task_id=task_id,
        cache_bytes=arguments.budget_tasks * each,
        batch_size=arguments.images,
    )
    size = method.architecture.image_size
    images = (
        np.random.default_rng(0)
        .integers(0, 256, (arguments.images, size, size, 3))
        .astype(np.uint8)
    )
    given = np.arange(arguments.images) % len(predictor.model.tasks)
    before = high_water()
    predictor.predict_prepared(images, given)
    if task_id == "gradient":
        predictor.predict_prepared(images)
    row = {"host": high_water(), "before the request": before}
    row["devices"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    row["all masks"] = each * len(predictor.model.tasks)
    print(json.dumps(row))


def high_water(pid: int | str = "self") -> int:
    """Return the peak memory of a process in bytes.

    getrusage's would count what the parent process held when it forked.
    """
    return next(
        int(line.split()[1]) * 1024
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )


if __name__ == "__main__":
    main()
