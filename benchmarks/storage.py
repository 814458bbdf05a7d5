"""Accuracy against bytes of the ways to keep masks: python -m benchmarks.storage WORKDIR
[WORKDIR ...]

Each workdir holds a finished run with masks as float32. They are packed and unpacked in every way,
and every protocol evaluates all tasks again. Nothing in a workdir changes. KiB are those of a
task's masks in the run, MB (10⁶ bytes) what ViT-B/16's q,k,v,proj of three layers would take.
"""

import argparse
import dataclasses
import json
import threading
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from rich.console import Console

from soft_jax import distributed, pytrees
from soft_jax.config import Config, from_settings
from soft_jax.evaluation.metrics import TEST
from soft_jax.experiment import loop
from soft_jax.experiment import settings as settings_lib
from soft_jax.experiment.bank import TaskBank
from soft_jax.experiment.run import Run, prepare
from soft_jax.inference import rules
from soft_jax.methods.masks import SoftMask
from soft_jax.store.folder import Reader, Store

WAYS = {  # by name, the rank of "lowrank"
    "float32": 0,
    "int8": 0,
    "int4": 0,
    "lowrank 4": 4,
    "lowrank 16": 16,
    "lowrank 64": 64,
    "delta1": 0,
    "delta2": 0,
    "delta4": 0,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+")
    parser.add_argument("--ways", help="some of them, joined by ','; default: all")
    parser.add_argument("--data-dir", help="where the images are; default: where each run had them")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    ways = arguments.ways.split(",") if arguments.ways else list(WAYS)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for workdir in arguments.workdirs:
        config = config_of(workdir, arguments.data_dir)
        with closing(Store(workdir)) as store:
            run = prepare(config, store, Console(quiet=True), threading.Event())
            for name in ways:
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
                f"{rules.title(key)} {mean:.2f} ± {deviation:.2f}"
                for key, (mean, deviation) in row.items()
            )
        )
    print(json.dumps(rows))


def config_of(workdir: str, data_dir: str | None) -> Config:
    """Return the config of a run, with room for the weights of all its tasks.

    What does not fit would be read from the workdir again, which is not what was packed here.
    """
    reader = Reader(workdir)
    reader.read_record()
    trained_with = from_settings(reader.load_task_manifest(0).config)
    # Older runs say settings, too, that their method does not use.
    config = Config(**settings_lib.drop_unused(dataclasses.asdict(trained_with)))
    where = config.data_dir if data_dir is None else data_dir
    return dataclasses.replace(config, data_dir=where, weights_cache_mb=2**20)


def evaluate(run: Run, name: str) -> dict[str, float]:
    """Evaluate all tasks of a run with their masks packed and unpacked in the way `name`.

    Returns the final average accuracy of each protocol in percent, the KiB of a task's masks, the
    MB of ViT-B/16's, and the root mean square error of their entries.
    """
    kind = dataclasses.replace(
        run.method.reparametrization, stored_as=name.split(maxsplit=1)[0], stored_rank=WAYS[name]
    )
    method = dataclasses.replace(run.method, reparametrization=kind)
    bank, error = TaskBank(run), []
    for task in range(run.scenario.num_tasks):
        templates = {
            "adapter": bank.template,
            "shared": run.initial_shared(),
            "statistics": run.statistics_shapes(task),
        }
        items, _ = run.store.load_task(task, templates, distributed.replicated(run.mesh))
        packed = method.pack(items["adapter"], run.adapter_key(task))
        unpacked = method.unpack(packed, run.params)
        a, b = (
            np.concatenate(
                [np.asarray(leaf).reshape(-1) for leaf in pytrees.flatten(tree["mask"]).values()]
            )
            for tree in (items["adapter"], unpacked)
        )
        error.append(np.sqrt(np.mean((a - b) ** 2)))
        bank.add(task, unpacked, items["statistics"])
    stage = loop.evaluate_stage(run, bank.model(items["shared"]), TEST)
    accuracy = {
        protocol: float(np.mean([100 * row.correct / row.total for row in rows]))
        for protocol, rows in stage.rows.items()
    }
    return accuracy | {
        "KiB a task": pytrees.nbytes(packed["mask"]) / 1024,
        "MB on ViT-B/16": _bytes_on_vit_b16(kind) / 1e6,
        "error of an entry": float(np.mean(error)),
    }


def _bytes_on_vit_b16(kind: SoftMask) -> int:
    """Return the bytes of a task's masks on q,k,v,proj of three layers of ViT-B/16."""
    columns = {
        f"{layer}/{name}": n for layer in "abc" for name, n in (("qkv", 2304), ("proj", 768))
    }
    kind = dataclasses.replace(kind, kernels=tuple(columns))
    masks = {path: jax.ShapeDtypeStruct((768, n), jnp.float32) for path, n in columns.items()}
    return pytrees.nbytes(jax.eval_shape(kind.pack, pytrees.unflatten(masks), jax.random.key(0)))


def _columns(values: list[dict[str, float]]) -> dict[str, list[float]]:
    return {key: [row[key] for row in values] for key in values[0]}


if __name__ == "__main__":
    main()
