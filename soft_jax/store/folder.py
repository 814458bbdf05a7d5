"""A run on disk: one Orbax checkpoint per finished task, the state of the task in training, and
the run's config.

    WORKDIR/config.json       what the run is; another config is refused
    WORKDIR/tasks/000/        a task: adapter, shared part, statistics, memory and manifest, written
    whole or not at all WORKDIR/training/000-000500/   task 0 after its 500th step, until the task
    is finished

Orbax keeps no checksums, so a manifest carries the SHA-256 of every array, and of itself.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from soft_jax import distributed, pytrees
from soft_jax.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _checkpointer(items: Mapping[str, Any]) -> ocp.Checkpointer:
    # One directory an array (no OCDBT): damage then has a name.
    handlers = {name: ocp.PyTreeCheckpointHandler(use_ocdbt=False) for name in items}
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(**handlers, manifest=ocp.JsonCheckpointHandler())
    )


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by dotted name, for any pytree; the name is also the array's directory on disk."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def save(path: Path, items: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Save pytrees of jax arrays and a JSON manifest as one checkpoint, whole or not at all.

    Raises UserError when it can't be written; nothing else on disk changes then.
    """
    named = {
        name: leaves for name, tree in items.items() if (leaves := _named(tree))
    }  # an item may be empty
    hashes = {
        f"{name}/{leaf}": pytrees.sha256(array)
        for name, leaves in named.items()
        for leaf, array in leaves.items()
    }
    manifest = dict(manifest, sha256=hashes)
    manifest["manifest_sha256"] = _digest(manifest)
    args = {name: ocp.args.PyTreeSave(leaves) for name, leaves in named.items()}
    try:
        with _checkpointer(named) as checkpointer:
            checkpointer.save(
                path.absolute(),
                args=ocp.args.Composite(**args, manifest=ocp.args.JsonSave(manifest)),
            )
    # Orbax and TensorStore raise OSError, ValueError and their own for the same full disk
    except Exception as error:
        if distributed.is_primary():
            clean(path.parent)
        raise UserError(
            f"{path} could not be saved ({str(error).splitlines()[0][:300]}). Finished tasks are "
            "as they were; "
            f"make room or mend the disk, and give the same command again"
        ) from error


def clean(folder: Path) -> None:
    """Remove what saves that were cut off left behind."""
    # Threads of a save that just failed may still be writing: a few tries.
    for _ in range(50):
        partials = list(folder.glob("*orbax-checkpoint-tmp*"))
        if not partials:
            return
        for partial in partials:
            shutil.rmtree(partial, ignore_errors=True)
        time.sleep(0.1)


def load_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises UserError when it is missing or damaged."""
    try:
        with _checkpointer({}) as checkpointer:
            restored = checkpointer.restore(
                path.absolute(), args=ocp.args.Composite(manifest=ocp.args.JsonRestore())
            )
        manifest = dict(restored.manifest)
        expected = manifest.pop("manifest_sha256")
    except Exception as error:  # missing files, bad JSON, bad UTF-8: all mean the same
        raise UserError(
            f"{path}: the manifest can't be read ({type(error).__name__}); {_ADVICE}"
        ) from error
    if _digest(manifest) != expected:
        raise UserError(
            f"{path}: the manifest does not have the SHA-256 it was saved with; {_ADVICE}"
        )
    return manifest


_ADVICE = (
    "restore this folder from a copy, or move it and all later tasks away and give the same "
    "command again to retrain them"
)


def load(
    path: Path, templates: Mapping[str, Any], sharding: Sharding, part: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Items like `templates` (pytrees of arrays or shapes), placed by `sharding`, and the
    manifest, all verified.

    With `part`, a template may leave arrays of its item out: they are neither read nor verified.
    Raises UserError naming the array that is missing, of another shape, or not what was saved.
    """
    manifest = load_manifest(path)
    out = {}
    for item, template in templates.items():
        leaves = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in _named(template).items()
        }
        expected = {
            key.removeprefix(f"{item}/"): value
            for key, value in manifest["sha256"].items()
            if key.startswith(f"{item}/")
        }
        if odd := sorted(
            leaves.keys() - expected.keys() if part else leaves.keys() ^ expected.keys()
        ):
            raise UserError(
                f"{path}: {item}/{odd[0]} is only in the "
                f"{'checkpoint' if odd[0] in expected else 'configured method'}"
            )
        arrays = _restore(path, item, leaves) if leaves else {}
        for name, array in arrays.items():
            if array.shape != leaves[name].shape or pytrees.sha256(array) != expected[name]:
                raise UserError(
                    f"{path}: array {item}/{name} is not what was saved (its SHA-256 differs); "
                    f"{_ADVICE}"
                )
        out[item] = jax.tree.unflatten(
            jax.tree.structure(template), [arrays[name] for name in leaves]
        )
    return out, manifest


def _restore(
    path: Path, item: str, leaves: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    def read(part):
        restore_args = ocp.checkpoint_utils.construct_restore_args(part)
        args = ocp.args.PyTreeRestore(part, restore_args=restore_args, partial_restore=True)
        with _checkpointer({item: part}) as checkpointer:
            return checkpointer.restore(path.absolute(), args=ocp.args.Composite(**{item: args}))[
                item
            ]

    try:
        return read(leaves)
    except Exception as whole:  # find the array to blame, one by one
        for name, leaf in leaves.items():
            try:
                read({name: leaf})
            except Exception as error:
                reason = str(error).splitlines()[0][:200]
                raise UserError(
                    f"{path}: array {item}/{name} can't be read ({reason}); {_ADVICE}"
                ) from whole
        raise UserError(
            f"{path}: {item} can't be read ({str(whole).splitlines()[0][:200]}); {_ADVICE}"
        ) from whole


class Reader:
    """The folder of one run, to read from: finished tasks are whole, also while another process
    trains more.
    """

    def __init__(self, workdir: str | Path):
        self.root = Path(workdir).expanduser()
        self.tasks, self.training = self.root / "tasks", self.root / "training"
        self.identity: dict[str, Any] = {}

    def read_identity(self) -> dict[str, Any]:
        """What makes the run this one (`config.json`); every task is checked against it. Raises
        UserError where there is no run.
        """
        config = self.root / "config.json"
        try:
            self.identity = json.loads(config.read_text())
        except OSError as error:
            raise UserError(
                f"workdir: {self.root} holds no run ({config.name} can't be read: {error.strerror})"
            ) from error
        except ValueError as error:
            raise UserError(
                f"workdir: {config} is damaged ({error}); restore it, or take another workdir"
            ) from error
        return self.identity

    def task_path(self, task: int) -> Path:
        """Where task `task` (from 0) is kept."""
        return self.tasks / f"{task:03d}"

    def present(self) -> list[int]:
        """The tasks that are there, in order."""
        return (
            sorted(int(path.name) for path in self.tasks.iterdir() if path.name.isdigit())
            if self.tasks.is_dir()
            else []
        )

    def finished(self) -> int:
        """How many tasks are finished. Raises UserError where one is missing among them."""
        there = self.present()
        if there != list(range(len(there))):
            missing = min(set(range(there[-1])) - set(there))
            raise UserError(
                f"{self.task_path(missing)} is missing, later tasks are there; {_ADVICE}"
            )
        return len(there)

    def load_task(
        self, task: int, templates: Mapping[str, Any], sharding: Sharding, part: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Items of a finished task ("adapter", "shared", "statistics", "memory") like
        `templates`, and its manifest, verified as by `load`.

        Raises UserError when an array is damaged, or the task is missing, another one, of another
        run or another backbone.
        """
        path = self.task_path(task)
        if not path.is_dir():
            raise UserError(f"{path} is missing; {_ADVICE}")
        items, manifest = load(path, templates, sharding, part)
        self._check_origin(task, manifest)
        return items, manifest

    def load_task_manifest(self, task: int) -> dict[str, Any]:
        """A finished task's manifest alone. Raises UserError as `load_task`."""
        manifest = load_manifest(self.task_path(task))
        self._check_origin(task, manifest)
        return manifest

    def _check_origin(self, task: int, manifest: Mapping[str, Any]) -> None:
        for key, now in {"task": task, **self.identity}.items():
            there = manifest["task"] if key == "task" else manifest["run"].get(key)
            if there != now:
                raise UserError(
                    f"{self.task_path(task)}: {key} is {there!r}, expected {now!r}: this task is "
                    f"from elsewhere; {_ADVICE}"
                )


class Store(Reader):
    """The folder of one run, held by one program at a time. Of its processes the first writes
    what Orbax does not, and keeps the lock.
    """

    def __init__(self, workdir: str | Path):
        """Make the folder, or open it. Raises UserError when it can't be written, or another
        process runs in it.
        """
        super().__init__(workdir)
        self._locked = None
        distributed.run_on_all(self._open)

    def _open(self) -> None:
        if not distributed.is_primary():
            if not self.tasks.is_dir():
                raise UserError(
                    f"workdir: {self.root}, which the first process opened, is not there for "
                    "another; take one that all see"
                )
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock()
            for folder in (self.tasks, self.training):
                folder.mkdir(exist_ok=True)
                clean(folder)
        except OSError as error:
            raise UserError(
                f"workdir: {self.root} can't be written ({error}); name another with --workdir=DIR"
            ) from error

    def _lock(self) -> None:
        # The kernel lets go of it when the process ends, however it ends.
        self._locked = open(self.root / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._locked.close()
            raise UserError(
                f"workdir: another process is running in {self.root}; wait for it, or take another "
                "workdir"
            ) from error

    def close(self) -> None:
        """Let others open the folder."""
        if self._locked:
            self._locked.close()

    def compare(self, identity: Mapping[str, Any]) -> None:
        """Raise UserError when the folder holds a run that differs in any of `identity`'s
        entries (JSON values).
        """
        config = self.root / "config.json"
        if not config.exists():
            if self.finished():
                raise UserError(
                    f"workdir: {self.root} has tasks but no config.json; restore it, or take "
                    "another workdir"
                )
            return
        there = self.read_identity()
        now = json.loads(json.dumps(identity))
        lines = [
            f"  {key}: {there.get(key)!r} there, {value!r} now"
            for key, value in now.items()
            if there.get(key) != value
        ]
        if lines:
            raise UserError(
                f"workdir: {self.root} holds a run of another config; take another workdir, or its "
                "settings:\n" + "\n".join(lines)
            )

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make the folder this run's: `identity` is what makes it this one. Raises UserError as
        `compare` does.
        """
        self.compare(identity)
        self.identity = json.loads(json.dumps(identity))
        distributed.barrier()  # all have compared
        if distributed.is_primary():
            write_text(self.root / "config.json", json.dumps(self.identity, indent=2) + "\n")

    def save_task(self, task: int, items: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Keep a finished task's `items` ("adapter", "shared", "statistics", "memory"), and drop
        its training state.
        """
        save(self.task_path(task), items, {"task": task, "run": self.identity, **manifest})
        self._keep_only(None)

    def save_training(self, task: int, step: int, state: Any, seconds: float) -> None:
        """Keep the state of task `task` after `step` steps and `seconds` of training in the
        place of the one before.
        """
        path = self.training / f"{task:03d}-{step:06d}"
        if not distributed.all_max(path.exists())[0]:
            save(path, {"state": state}, {"task": task, "step": step, "seconds": seconds})
        self._keep_only(path)

    def load_training(
        self, task: int, template: Any, sharding: Sharding
    ) -> tuple[Any, float] | None:
        """The latest kept state of task `task` and its seconds, None if there is none. Raises
        UserError when it is damaged.
        """
        kept = [path for path in self._states() if path.name.startswith(f"{task:03d}-")]
        if not kept:
            return None
        items, manifest = load(kept[-1], {"state": template}, sharding)
        return items["state"], manifest["seconds"]

    def set_aside_training(self) -> Path:
        """Move every kept training state out of the way, never to be read again; returns where
        to.
        """
        aside = self.root / "damaged"
        if distributed.is_primary():
            aside.mkdir(exist_ok=True)
            for path in self._states():
                os.replace(path, aside / f"{path.name}-{time.time_ns()}")
        distributed.barrier()
        return aside

    def _states(self) -> list[Path]:
        return sorted(
            path for path in self.training.iterdir() if re.fullmatch(r"\d+-\d+", path.name)
        )

    def _keep_only(self, path: Path | None) -> None:
        if distributed.is_primary():
            for other in self._states():
                if other != path:
                    shutil.rmtree(other)
        distributed.barrier()
