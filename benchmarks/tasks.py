"""What grows with the number of tasks: python -m benchmarks.tasks --output=DIR

A run of many small tasks (random images, a small random ViT), put together of the functions that
`experiment.loop` is made of. It differs from a run in two things. After every task the newest alone
is evaluated: evaluating all of them, as a run does for its accuracy matrix, is by definition as
many evaluations as there are tasks. And no report is written, which needs that matrix. At some
numbers of tasks the run is opened again by a fresh process through `loop.run`, as a continued run
would be. Writes `tasks.png` into DIR.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.inference import high_water, random_backbone
from soft_jax.config import Config
from soft_jax.data import sources
from soft_jax.evaluation import evaluate
from soft_jax.evaluation.metrics import TEST
from soft_jax.experiment import loop, manifest
from soft_jax.experiment.bank import TaskBank
from soft_jax.experiment.run import Run, prepare
from soft_jax.methods.method import begin
from soft_jax.models import backbones
from soft_jax.models.vit import ViTConfig
from soft_jax.store.folder import Store
from soft_jax.store.records import TaskManifest

VIT = ViTConfig(image_size=16, patch_size=4, dim=64, depth=4, heads=4, mlp_dim=256)
CLASSES, TRAIN, TEST_IMAGES = 2, 24, 12  # of a task: its classes, and the images of each
PARTS = ("whole", "train", "statistics", "evaluate")  # of the seconds of a task


class Opened(Exception):
    """A run has read all that is stored and would begin to train."""


class Opening(Console):
    """A console that raises Opened when the run says that it has read its finished tasks."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print nothing."""
        if " are finished in " in str(objects[0]):
            raise Opened


def main() -> None:
    """Run, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument(
        "--resume-at", type=int, nargs="*", default=(10, 50, 100, 200, 300, 400, 499)
    )
    parser.add_argument("--output", default=".")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tasks < 6:
        parser.error("--tasks: the first five are not looked at; take 6 or more")
    logging.set_verbosity(logging.ERROR)
    backbone = backbones.Backbone("random", VIT, jax.device_get(random_backbone(VIT)), "0" * 64)
    backbones.load = lambda *_: backbone
    if arguments.child:
        return _open_again(arguments)
    rows, resumed = [], []
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        for count, seconds in enumerate(_run(arguments.tasks, workdir), 1):
            disk = sum(
                path.stat().st_size
                for path in (workdir / "tasks" / f"{count - 1:03d}").rglob("*")
                if path.is_file()
            )
            rows.append({"tasks": count, "seconds": seconds, "disk": disk, "memory": _resident()})
            if count in arguments.resume_at:
                resumed.append({"tasks": count} | _opened_by_another(workdir, folder, arguments))
                print(json.dumps({"after": rows[-1], "opened again": resumed[-1]}), flush=True)
    _draw(rows, resumed, Path(arguments.output) / "tasks.png")
    first, last = rows[5:55], rows[-50:]
    for name in PARTS:
        early, late = (
            float(np.median([row["seconds"][name] for row in part])) for part in (first, last)
        )
        print(f"{name}: {early:.3f} s a task early, {late:.3f} s late, {late / early:.2f} ×")
    print(
        json.dumps(
            {
                "disk a task": [rows[5]["disk"], rows[-1]["disk"]],
                "memory": [rows[5]["memory"], rows[-1]["memory"]],
                "resumed": resumed,
            }
        )
    )
    return None


def _run(tasks: int, workdir: Path) -> Iterator[dict[str, float]]:
    """Train all tasks in `workdir`; yields the seconds of each by what they went into."""
    console, stop = Console(quiet=True), threading.Event()
    with closing(Store(workdir)) as store:
        run = prepare(_config(tasks), store, console, stop, dataset=_images(tasks))
        bank, shared = TaskBank(run), run.initial_shared()
        manifests = []  # a run holds them, too
        for task in range(tasks):
            start = time.monotonic()
            made, shared = _learn_task(run, bank, task, shared)
            manifests.append(made)
            yield {**made.seconds, "whole": time.monotonic() - start}


def _learn_task(run: Run, bank: TaskBank, task: int, shared: Any) -> tuple[TaskManifest, Any]:
    """Train, evaluate and store a task of a method that keeps no memory of older ones."""
    adapter = begin(run.initial_adapter(task), bank.prompt(task - 1) if task else None)
    state, seconds = loop.train_task(run, task, adapter, shared, {})
    adapter, shared = state.trainable["adapter"], state.trainable["shared"]
    start = time.monotonic()
    statistics = loop.task_statistics(run, task)
    seconds["statistics"] = time.monotonic() - start
    bank.add(task, adapter, statistics)
    start = time.monotonic()
    stage = _evaluate_newest(run, bank.model(shared))
    seconds["evaluate"] = time.monotonic() - start
    items = {
        "adapter": run.method.pack(adapter),
        "shared": shared,
        "statistics": statistics,
        "memory": {},
    }
    made = manifest.make(run, task, adapter, items, {TEST: stage}, seconds)
    run.store.save_task(task, items, made)
    bank.stored(task)
    return made, shared


def _evaluate_newest(run: Run, model: Any) -> evaluate.Stage:
    """Evaluate the newest task as `loop.evaluate_stage` does each."""
    task, stage = model.tasks[-1], evaluate.Stage(model, run.rules, run.settings)
    split, index = run.part(TEST, task), run.index(TEST, task)
    files = run.files(TEST, index)
    stage.add(task, split.images, split.labels, run.query(TEST, task), index, files)
    return stage


def _config(tasks: int) -> Config:
    layers = {"mask_layers": (3, 4), "e_prompt_layers": (3, 4), "g_prompt_layers": (1,)}
    sizes = {"batch_size": 24, "epochs": 1, "eval_batch_size": 64, "prototype_features": 200}
    return Config(dataset="digits", tasks=tasks, weights_cache_mb=128, **sizes, **layers)


def _images(tasks: int) -> sources.Dataset:
    rng, classes = np.random.default_rng(0), CLASSES * tasks

    def split(count: int) -> sources.InMemoryImages:
        labels = np.repeat(np.arange(classes, dtype=np.int32), count)
        return sources.InMemoryImages(
            rng.integers(0, 256, (len(labels), 16, 16, 3)).astype(np.uint8), labels
        )

    return sources.Dataset(split(TRAIN), split(TEST_IMAGES), tuple(map(str, range(classes))))


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _opened_by_another(
    workdir: Path, folder: str, arguments: argparse.Namespace
) -> dict[str, float]:
    """Return seconds and peak memory of a fresh process that opens what is stored.

    It opens a copy, since the run holds its folder.
    """
    copy = Path(folder) / "copy"
    shutil.copytree(workdir, copy, copy_function=os.link)
    (copy / ".lock").unlink()  # a link to the run's own
    command = [
        sys.executable,
        "-m",
        "benchmarks.tasks",
        f"--tasks={arguments.tasks}",
        f"--child={copy}",
    ]
    answer = subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.splitlines()[-1]
    shutil.rmtree(copy)
    return json.loads(answer)


def _open_again(arguments: argparse.Namespace) -> None:
    images, start = _images(arguments.tasks), time.monotonic()
    try:
        loop.run(_config(arguments.tasks), arguments.child, Opening(quiet=True), images)
    except Opened:
        print(json.dumps({"seconds": time.monotonic() - start, "memory": high_water()}))


def _draw(rows: list[dict], resumed: list[dict], path: Path) -> None:
    tasks = [row["tasks"] for row in rows]
    figure = Figure(figsize=(16, 4), layout="constrained")
    time_axes, disk_axes, memory_axes, resume_axes = figure.subplots(1, 4)
    for name in PARTS:
        time_axes.plot(
            tasks[1:], [row["seconds"][name] for row in rows[1:]], linewidth=0.8, label=name
        )
    time_axes.set(title="seconds of a task", xlabel="task", ylim=(0, None))
    time_axes.legend()
    disk_axes.plot(tasks, [row["disk"] / 2**20 for row in rows])
    disk_axes.set(title="MiB on disk of a task", xlabel="task", ylim=(0, None))
    memory_axes.plot(tasks, [row["memory"] / 2**20 for row in rows])
    memory_axes.set(title="MiB of memory of the run", xlabel="tasks", ylim=(0, None))
    resume_axes.plot(
        [row["tasks"] for row in resumed], [row["seconds"] for row in resumed], marker="o"
    )
    resume_axes.set(title="seconds to open a run", xlabel="tasks", ylim=(0, None))
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
