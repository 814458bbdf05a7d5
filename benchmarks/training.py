"""What a training step costs, against the published PyTorch code and the device's own limit:
python -m benchmarks.training

DualPrompt + Soft-TF, masks on q,k,v,proj and the MLP of L[10,11,12], the tenth of ten tasks' worth
of classes; the images are random. The published code runs in its own interpreter, which needs
PyTorch, timm 0.6.7, einops, scikit-learn and matplotlib:

    python -m benchmarks.training --published=CHECKOUT --torch=/path/to/its/python
    python -m benchmarks.training --backbone=vit_b16 --steps=1 --rounds=3 --published=CHECKOUT
    --torch=/path/to/its/python

Alternatives take turns, a ratio is the median over the rounds. The published steps get images that
are on the device already; ours crop, resize and flip theirs in the step. Without --published, ours
in three ways, with --mask-layers of any layers.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from benchmarks import published
from benchmarks.inference import compare, high_water, random_backbone
from soft_jax import distributed
from soft_jax.config import Config, parse_argument
from soft_jax.data import batches
from soft_jax.experiment.run import step_config_of
from soft_jax.methods import registry
from soft_jax.models import backbones
from soft_jax.training import train_step

SIDE = 4096  # of the square matrices whose product is taken for the device's peak


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="vit_ti8_32", choices=published.SIZES)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--steps", type=int, default=16, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mask-layers", default="10-12", help="without --published")
    parser.add_argument("--published", help="a checkout of ihaeyong/Soft-TF")
    parser.add_argument(
        "--torch", default="python3", help="the interpreter that has its requirements"
    )
    parser.add_argument(
        "--autocast", action="store_true", help="the published code under bfloat16 autocast"
    )
    parser.add_argument("--device", default="cpu", help="the published code's: cpu or cuda")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    if arguments.published and arguments.mask_layers != "10-12":
        parser.error("--mask-layers, --published: the published steps have masks on 10-12")
    if arguments.published:
        _against_published(arguments)
    else:
        _ours(arguments)


def _ours(arguments: argparse.Namespace) -> None:
    """Our ways to run steps, in turns."""
    ours = Steps(arguments, cache_queries=False)
    ways = {
        "ours": ours.many,
        "ours, a step a call": ours.one_by_one,
        "ours, cache_queries": Steps(arguments, cache_queries=True).many,
    }
    peak, times = peak_flops(arguments.dtype), compare(arguments.rounds, **ways)
    print(
        f"{jax.devices()[0].device_kind} × {len(jax.devices())}, jax {jax.__version__}, "
        f"{arguments.backbone}, {arguments.dtype}, ",
        end="",
    )
    print(f"batch {arguments.batch}; {ours.flops / 1e9:.1f} GFLOP a step; ", end="")
    print(f"product of {SIDE} × {SIDE} matrices {peak / 1e9:.0f} GFLOP/s")
    row = {"gflop": ours.flops / 1e9, "peak_gflops": peak / 1e9, "memory": high_water()}
    row["device_memory"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    for name in ways:
        row[name] = times[name] / arguments.steps
        share = (
            "" if "cache_queries" in name else f", {ours.flops / row[name] / peak:.0%} of the peak"
        )
        print(
            f"  {name:22s} {_speed(arguments, row[name])}{share}; "
            f"{times.get(f'{name}/ours', 1.0):.2f} × ours"
        )
    print(json.dumps(row))


def _speed(arguments: argparse.Namespace, seconds: float) -> str:
    return f"{1000 * seconds:8.1f} ms a step, {arguments.batch / seconds:7.1f} images/s"


def _against_published(arguments: argparse.Namespace) -> None:
    """Ours and theirs in turns of whole processes: on a small machine the memory of one slows
    the other, idle as it is.
    """
    options = [
        f"--{name}={getattr(arguments, name)}" for name in ("backbone", "dtype", "batch", "steps")
    ]
    command, ratios, memory = (
        [sys.executable, "-m", "benchmarks.training", "--rounds=2", *options],
        [],
        [],
    )
    for _ in range(arguments.rounds):
        ours = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[
                -1
            ]
        )
        theirs = Published(arguments)
        seconds = (
            statistics.median(theirs.many() for _ in range(3)) / arguments.steps
        )  # the first is a warm-up, and the slowest
        memory.append((ours["memory"], theirs.close()))
        ratios.append(seconds / ours["ours"])
        print(
            f"  ours      {_speed(arguments, ours['ours'])}, "
            f"{ours['gflop'] / ours['ours'] / ours['peak_gflops']:.0%} of the peak"
        )
        print(f"  published {_speed(arguments, seconds)}; {ratios[-1]:.2f} × ours", flush=True)
    print(
        f"published / ours: {statistics.median(ratios):.2f}, from {min(ratios):.2f} to "
        f"{max(ratios):.2f} ({theirs.about})"
    )
    ours, theirs_ = (max(column) / 2**20 for column in zip(*memory, strict=True))
    print(
        f"peak memory of the process: ours (all three ways) {ours:.0f} MiB, published "
        f"{theirs_:.0f} MiB"
    )
    print(json.dumps({"ratios": ratios, "memory": memory, "about": theirs.about}))


class Steps:
    """Our steps of one task on random images."""

    def __init__(self, arguments: argparse.Namespace, cache_queries: bool):
        config = Config(
            backbone=arguments.backbone,
            dtype=arguments.dtype,
            target_modules="qkv+proj+mlp",
            **parse_argument(f"mask_layers={arguments.mask_layers}"),
            cache_queries=cache_queries,
            batch_size=arguments.batch,
        )
        source = backbones.BACKBONES[arguments.backbone]
        architecture = dataclasses.replace(source.architecture, dtype=arguments.dtype)
        names = tuple(map(str, range(published.CLASSES)))
        method = registry.make_method(config, architecture, names)
        self.step_config = step_config_of(config, method, on_device=True)
        self.mesh, self.count = distributed.data_mesh(), arguments.steps
        self.whole = distributed.replicated(self.mesh)
        self.params = jax.device_put(random_backbone(architecture), self.whole)
        adapter, shared = (
            method.init_adapter(jax.random.key(1), self.params),
            method.init_shared(jax.random.key(2), self.params),
        )
        self.state = train_step.compile_init(self.step_config, self.mesh)(adapter, shared)
        self.key = jax.device_put(jax.random.key(3), self.whole)
        rng = np.random.default_rng(0)
        # As CIFAR-100: 32 pixels, resized in the step.
        images, labels = (
            rng.integers(0, 256, (5000, 32, 32, 3)).astype(np.uint8),
            rng.integers(0, 10, 5000).astype(np.int32),
        )
        self.pool = {"images": images, "labels": labels}
        if cache_queries:
            query = rng.normal(size=(5000, architecture.feature_dim))
            self.pool["query"] = query.astype(architecture.dtype)
        self.on_device = jax.device_put(self.pool, self.whole)
        self.sampler = batches.BatchSampler(0, 0, 5000, 1000, arguments.batch, self.mesh.size)
        fixed = {
            "class_mask": np.arange(published.CLASSES) < 10,
            "freeze_g_prompt": np.bool_(False),
            "memory": {},
        }
        self.fixed, self.done = jax.device_put(fixed, self.whole), 0

    def many(self) -> None:
        """All steps in one call, as training runs them on images that fit the device."""
        rows = jax.device_put(
            self.sampler.chunk(self.done, self.count, train_step.CHUNK), self.whole
        )
        steps = train_step.compile_steps(self.step_config, self.mesh)
        self.state, terms = steps(
            self.state,
            self.params,
            self.on_device,
            rows,
            self.fixed,
            self.key,
            np.int32(self.count),
        )
        self._finish(terms)

    def one_by_one(self) -> None:
        """Run a call a step with its images sent along, as training does with those of files."""
        step = train_step.compile_step(self.step_config, self.mesh)
        for index in range(self.count):
            rows, weights_ = self.sampler.batch(self.done + index)
            batch = {name: array[rows] for name, array in self.pool.items()} | {"weights": weights_}
            batch = jax.device_put(batch, distributed.by_row(self.mesh))
            self.state, terms = step(self.state, self.params, batch | self.fixed, self.key)
        self._finish(terms)

    def _finish(self, terms: dict[str, jax.Array]) -> None:
        self.done += self.count
        jax.block_until_ready((self.state, terms))

    @property
    def flops(self) -> float:
        """Of a step, as XLA counts them in the program as it is written; crops and Adam are in
        it.
        """
        rows, weights_ = self.sampler.batch(0)
        batch = (
            {name: array[rows] for name, array in self.pool.items()}
            | {"weights": weights_}
            | self.fixed
        )
        lowered = train_step.compile_step(self.step_config, self.mesh).lower(
            self.state, self.params, batch, self.key
        )
        return (lowered.cost_analysis() or lowered.compile().cost_analysis())["flops"]


class Published:
    """The published code's steps, in a process of their own."""

    def __init__(self, arguments: argparse.Namespace):
        script = Path(published.__file__)
        command = [
            arguments.torch,
            str(script),
            arguments.published,
            arguments.backbone,
            str(arguments.batch),
            arguments.device,
        ]
        command += ["--autocast"] if arguments.autocast else []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about, self.steps = json.loads(self.process.stdout.readline()), arguments.steps

    def many(self) -> float:
        """All steps; their seconds."""
        self.process.stdin.write(f"{self.steps}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> int:
        """End it; its peak memory in bytes."""
        memory = high_water(self.process.pid)
        self.process.stdin.close()
        self.process.wait()
        return memory


def peak_flops(dtype: str) -> float:
    """FLOP/s of a product of large square matrices of `dtype` on one device, the best of five."""
    a = jnp.ones((SIDE, SIDE), dtype)
    product = jax.jit(
        lambda a: jnp.matmul(a, a, precision="default" if dtype == "bfloat16" else "highest")
    )
    product(a).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(times)


if __name__ == "__main__":
    main()
