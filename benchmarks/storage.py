"""Accuracy against bytes of the ways to keep masks: python -m benchmarks.storage WORKDIR
[WORKDIR ...]

Each workdir holds a finished run with masks as float32. They are packed and unpacked in every way,
and every protocol evaluates all tasks again. Nothing in a workdir changes.
"""

import argparse
import dataclasses
import json
import threading
from contextlib import closing

import numpy as np
from absl import logging
from rich.console import Console

from soft_jax import pytrees
from soft_jax.config import from_identity
from soft_jax.evaluation import report
from soft_jax.experiment import loop
from soft_jax.store import packing
from soft_jax.store.folder import Reader, Store
from soft_jax.training import train_step

STRATEGIES = {
    "float32": 0,
    "int8": 0,
    "int4": 0,
    "lowrank 4": 4,
    "lowrank 16": 16,
    "lowrank 64": 64,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+")
    parser.add_argument("--data-dir", default="")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in STRATEGIES}
    for workdir in arguments.workdirs:
        # All tasks' weights are held: what is read from the workdir again is not what was packed
        # here.
        identity = Reader(workdir).read_identity()
        config = dataclasses.replace(
            from_identity(identity), data_dir=arguments.data_dir, weights_cache_mb=2**20
        )
        with closing(Store(workdir)) as store:
            run = loop.prepare(config, store, Console(quiet=True), threading.Event())
            for name in STRATEGIES:
                found[name].append(evaluate(run, name))
    rows = {
        name: {
            key: (np.mean(v), np.std(v, ddof=min(len(v) - 1, 1)))
            for key, v in _columns(values).items()
        }
        for name, values in found.items()
    }
    for name, row in rows.items():
        print(
            f"{name}: "
            + "; ".join(
                f"{report.title(key) if '/' in key else key} {mean:.2f} ± {deviation:.2f}"
                for key, (mean, deviation) in row.items()
            )
        )
    print(json.dumps(rows))


def evaluate(run: loop.Run, name: str) -> dict[str, float]:
    """Final average accuracy of each protocol in percent, KiB of a task's masks, and the root
    mean square error of their entries.
    """
    way, rank = name.split(maxsplit=1)[0], STRATEGIES[name]
    learned, error = loop.TaskBank(run), []
    for task in range(run.config.tasks):
        templates = {
            "adapter": learned.template,
            "shared": run.initial_shared(),
            "statistics": run.statistics_shapes(task),
        }
        items, _ = run.store.load_task(task, templates, train_step.replicated(run.mesh))
        masks = items["adapter"]["mask"]
        packed = packing.pack(masks, way, rank)
        unpacked = packing.unpack(packed, way, masks)
        a, b = (
            np.concatenate(
                [np.asarray(leaf).reshape(-1) for leaf in pytrees.flatten(tree).values()]
            )
            for tree in (masks, unpacked)
        )
        error.append(np.sqrt(np.mean((a - b) ** 2)))
        learned.add(task, items["adapter"] | {"mask": unpacked}, items["statistics"])
    table, _ = loop.evaluate_stage(run, learned.model(items["shared"]))
    accuracy = {
        protocol: float(np.mean([100 * row.correct / row.total for row in rows]))
        for protocol, rows in table.items()
    }
    return accuracy | {
        "KiB a task": pytrees.nbytes(packed) / 1024,
        "error of an entry": float(np.mean(error)),
    }


def _columns(values: list[dict[str, float]]) -> dict[str, list[float]]:
    return {key: [row[key] for row in values] for key in values[0]}


if __name__ == "__main__":
    main()
