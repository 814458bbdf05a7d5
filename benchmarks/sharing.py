"""Whether alike tasks' masks are stored smaller together, and what merged ones answer:
python -m benchmarks.sharing WORKDIR [WORKDIR ...] [--output=DIR]

Each workdir holds a finished run of softtf with masks as float32; nothing in it changes. Of each it
is measured how alike its tasks' changes m − m₀ are, how many bits it could save at best to store
them together, and the error of an entry with a group's mean and without. With --output, the first
run's tasks are evaluated with their masks stored in each way, and merged, in a copy of it that is a
library; `sharing.png` is drawn there, where bytes of more tasks than the run has are computed.
"""

import argparse
import dataclasses
import functools
import json
import shutil
import tempfile
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.cluster.hierarchy
import scipy.spatial.distance
from absl import logging
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.storage import config_of
from soft_jax import distributed, pytrees
from soft_jax.evaluation import pictures
from soft_jax.evaluation.metrics import TEST
from soft_jax.experiment import loop
from soft_jax.experiment.bank import TaskBank
from soft_jax.experiment.gate import Gate
from soft_jax.experiment.library import Library
from soft_jax.experiment.run import Run, prepare
from soft_jax.methods.changes import cosine_distances
from soft_jax.store import packing
from soft_jax.store.folder import Store

MEAN_BITS, OWN_BITS = 4, 1  # of a group's mean, and of a task's difference from it
EVALUATED = ("float32", "int8", "delta1", "shared by all")
AT = (10, 100, 500)  # tasks, in the picture
GIVEN, ALONE = "oracle/task_given", "per_sample/prototype"
Changes = list[pytrees.Tree]  # m − m₀ of each task


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+")
    parser.add_argument("--data-dir", help="where the images are; default: where each run had them")
    parser.add_argument("--output", help="evaluate the first run, and draw into this folder")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    for number, workdir in enumerate(arguments.workdirs):
        config = config_of(workdir, arguments.data_dir)
        with closing(Store(workdir)) as store:
            run = prepare(config, store, Console(quiet=True), threading.Event())
            items, drawn, changes = read(run)
            groups = grouped(changes)
            print(json.dumps({"run": workdir} | alike(changes, drawn, groups)), flush=True)
            if number or not arguments.output:
                continue
            found: dict[str, Any] = {"tasks": len(changes)}
            for name, (kept, size, mean) in stored(changes, drawn, groups).items():
                if name not in EVALUATED:
                    continue
                accuracy = evaluated(run, items, drawn, kept)
                found[name] = {"bytes": size, "mean bytes": mean} | accuracy
                print(json.dumps({name: found[name]}), flush=True)
        size, count = found["delta1"]["bytes"], len(changes)
        whole = list(range(count))
        halves = [whole[: count // 2], whole[count // 2 :]]
        for name, parts in (("merged to two", halves), ("merged to one", [whole])):
            each = size * len(parts) / count
            found[name] = {"bytes": each} | merged(workdir, parts)
            print(json.dumps({name: found[name]}), flush=True)
        pictures.save(draw(found), Path(arguments.output) / "sharing.png")


def read(run: Run) -> tuple[list[dict], Changes, Changes]:
    """Return each task's stored items, the draw of its masks, and what training added to it."""
    bank, items, drawn = TaskBank(run), [], []
    for task in range(run.scenario.num_tasks):
        templates = {
            "adapter": bank.template,
            "shared": run.initial_shared(),
            "statistics": run.statistics_shapes(task),
        }
        items.append(run.store.load_task(task, templates, distributed.replicated(run.mesh))[0])
        drawn.append(run.initial_adapter(task)["mask"])
    changes = [
        jax.tree.map(jnp.subtract, item["adapter"]["mask"], m0)
        for item, m0 in zip(items, drawn, strict=True)
    ]
    return items, drawn, changes


def vector(tree: pytrees.Tree) -> np.ndarray:
    """Return all entries of a tree as one row, float32."""
    return np.concatenate([np.ravel(leaf) for leaf in pytrees.flatten(tree).values()])


def grouped(changes: Changes) -> list[list[int]]:
    """Return tasks in groups of alike ones, half as many as tasks, by average linkage."""
    distances = cosine_distances([vector(change) for change in changes])
    condensed = scipy.spatial.distance.squareform(distances, checks=False)
    tree = scipy.cluster.hierarchy.linkage(condensed, "average")
    labels = scipy.cluster.hierarchy.fcluster(tree, max(1, len(changes) // 2), "maxclust")
    return [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]


def alike(changes: Changes, drawn: Changes, groups: list[list[int]]) -> dict:
    """Return how alike changes are, and what storing them together saves.

    "bits at best" are those of an entry of a task that a perfect code of all tasks together saves
    over one of each by itself, at the same error: −log₂ det C / 2 over the number of tasks, for
    Gaussian entries with the cosines C. Errors are |error| / |change| over all tasks.
    """
    cosines = 1 - cosine_distances([vector(change) for change in changes])
    pairs = cosines[np.triu_indices(len(cosines), 1)]
    best = -np.linalg.slogdet(cosines)[1] / np.log(2) / 2 / len(cosines)
    whole = sum(float(np.sum(vector(change) ** 2)) for change in changes)
    errors = {}
    for name, (kept, size, mean) in stored(changes, drawn, groups).items():
        lost = sum(
            float(np.sum((vector(a) - vector(b)) ** 2)) for a, b in zip(kept, changes, strict=True)
        )
        errors[name] = {"bytes": size + mean, "error": float(np.sqrt(lost / whole))}
    return {
        "mean cosine": float(pairs.mean()),
        "largest": float(pairs.max()),
        "groups": groups,
        "bits at best": float(best),
        "kept": errors,
    }


def stored(
    changes: Changes, drawn: Changes, groups: list[list[int]]
) -> dict[str, tuple[Changes, float, float]]:
    """Return by way of storing: the changes as they are read again, the bytes of a task of its own,
    and a task's share of its group's mean.
    """
    size = vector(changes[0]).size
    masks = [jax.tree.map(jnp.add, *both) for both in zip(drawn, changes, strict=True)]
    packed = [packing.pack(mask, "int8", 0) for mask in masks]
    again = [
        jax.tree.map(jnp.subtract, packing.unpack(kept, "int8", m0), m0)
        for kept, m0 in zip(packed, drawn, strict=True)
    ]
    ways = {
        "float32": (changes, 4.0 * size, 0.0),
        "int8": (again, float(pytrees.nbytes(packed[0])), 0.0),
    }
    for bits in packing.DELTA_BITS.values():
        ways[f"delta{bits}"] = ([coded(one, bits) for one in changes], bits * size / 8, 0.0)
    together, kept = [list(range(len(changes)))], dict[int, pytrees.Tree]()
    for name, of in (("shared in groups", groups), ("shared by all", together)):
        for group in of:
            mean = jax.tree.map(lambda *rows: sum(rows) / len(rows), *(changes[t] for t in group))
            mean = coded(mean, MEAN_BITS)
            for task in group:
                own = coded(jax.tree.map(jnp.subtract, changes[task], mean), OWN_BITS)
                kept[task] = jax.tree.map(jnp.add, mean, own)
        share = MEAN_BITS * size / 8 * len(of) / len(changes)
        ways[name] = ([kept[task] for task in range(len(changes))], OWN_BITS * size / 8, share)
    return ways


@functools.partial(jax.jit, static_argnames="bits")
def coded(change: pytrees.Tree, bits: int) -> pytrees.Tree:
    """Return a change as `bits` an entry keep it."""
    zero = jax.tree.map(jnp.zeros_like, change)
    return packing.unpack_delta(packing.pack_delta(change, zero, bits), zero, bits)


def evaluated(run: Run, items: list[dict], drawn: Changes, kept: Changes) -> dict[str, float]:
    """Return the accuracy of all tasks, in percent, with these changes of their masks."""
    run = dataclasses.replace(run, rules=tuple(r for r in run.rules if r.key in (GIVEN, ALONE)))
    bank = TaskBank(run)
    for task, item in enumerate(items):
        mask = jax.tree.map(jnp.add, drawn[task], kept[task])
        bank.add(task, item["adapter"] | {"mask": mask}, item["statistics"])
    rows = loop.evaluate_stage(run, bank.model(items[-1]["shared"]), TEST).rows
    return {
        key: 100 * sum(row.correct for row in rows[key]) / sum(row.total for row in rows[key])
        for key in (GIVEN, ALONE)
    }


def merged(workdir: str, groups: list[list[int]]) -> dict[str, float]:
    """Return the accuracy, in percent, with the tasks of each group merged by their mean."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "library"
        shutil.copytree(workdir, root)
        library = Library(root)
        for number, group in enumerate(groups):
            if len(group) > 1:
                library.merge([f"task{t + 1}" for t in group], f"m{number}", gate=Gate(100.0))
        state = library.state()
    counts = [version.test["images"] for version in state.active.values()]
    return {
        key: float(np.average([state.figures[t][of] for t in state.active], weights=counts))
        for key, of in ((GIVEN, "given"), (ALONE, "per_sample"))
    }


def draw(found: dict) -> Figure:
    """Draw bytes against the number of tasks, and accuracy against the bytes of a task."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    sizes, accuracies = figure.subplots(1, 2)
    count, ways = found["tasks"], {k: row for k, row in found.items() if isinstance(row, dict)}
    for color, (name, row) in zip(pictures.CURVES, ways.items(), strict=False):
        own, mean = row["bytes"] / 1e6, count * row.get("mean bytes", 0) / 1e6  # the mean: once
        sizes.plot(AT, [own * tasks + mean for tasks in AT], "o--", color=color, label=name)
        accuracies.plot(own + mean / count, row[ALONE], "o", color=color, label=name)
    sizes.set(xscale="log", yscale="log", xlabel="tasks", ylabel="MB of masks")
    sizes.set_title(f"bytes: of {count} tasks measured, of more computed", fontsize=10)
    sizes.set_xticks(AT, AT)
    accuracies.set(xscale="log", xlabel="MB of masks a task", ylabel="accuracy, %", ylim=(0, 60))
    accuracies.set_title(f"{count} real tasks, each image by itself", fontsize=10)
    accuracies.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
