"""What the TPU's own compiler makes of our programs, without a TPU: python -m benchmarks.tpu

Compiles the programs of a run and of a `Predictor` for named TPU slices, on this machine's CPU, by
`libtpu` (pip install ".[tpu-compiler]"). For each it prints the memory that a chip needs,
operations, the compiler's forecast of cycles and the share of the chip's peak that they come to,
and what the chips send each other. A forecast is a figure to compare programs by; it is not a time.
Nothing runs, and no array is made. One program takes from half a minute to ten. The whole grid
takes hours:

    python -m benchmarks.tpu --output=forecast.json
    python -m benchmarks.tpu --slices=v5e-1,v6e-8 --backbones=vit_b16 --dtypes=bfloat16
    --programs=step,query --batch=128

With --output, results are kept in that file, and a program whose result is there, under whatever
name, is not compiled again. The exit status is 1 where a program does not compile. A program that
needs more memory than the chip has is no failure: its line says what helps.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from soft_jax import distributed, pytrees
from soft_jax.config import Config
from soft_jax.experiment import loop
from soft_jax.experiment.run import step_config_of
from soft_jax.inference import engine, identity, prototypes, zero_shot
from soft_jax.methods import registry
from soft_jax.models import backbones
from soft_jax.training import train_step

CLASSES, TASKS = 100, 10  # CIFAR-100 as the paper cuts it
SIDE, POOL = 32, 5000  # pixels and images of a task in memory
FEATURES = Config().prototype_features
PACKINGS = ("int8", "int4", "lowrank", "delta1", "delta2", "delta4")


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice: the name that libtpu knows it or a larger one by, and how many of its devices.

    `cycle` is what a device multiplies and adds in bfloat16 in one cycle, in operations, and
    `memory` its bytes, as Google publishes them. `cores` is libtpu's name for how they are
    used: "megacore" makes one device of a v4 chip's two, as a TPU VM does.
    """

    topology: str
    devices: int
    cycle: int
    memory: int
    cores: str = "default"


SLICES = {
    "v5e-1": Slice("v5e:2x2", 1, 131_072, 16 * 2**30),
    "v5e-4": Slice("v5e:2x2", 4, 131_072, 16 * 2**30),
    "v5e-8": Slice("v5e:2x4", 8, 131_072, 16 * 2**30),
    "v4-8": Slice("v4:2x2x1", 4, 262_144, 32 * 2**30, "megacore"),  # named for its cores
    "v6e-1": Slice("v6e:2x2", 1, 524_288, 32 * 2**30),
    "v6e-8": Slice("v6e:2x4", 8, 524_288, 32 * 2**30),
}
GRID = ("v5e-1", "v5e-8", "v4-8", "v6e-8")


def use_compiler() -> None:
    """Let jax find libtpu, and ask for no TPU. Raises SystemExit where libtpu is not installed."""
    found = importlib.util.find_spec("libtpu")
    if not found:
        sys.exit('libtpu is not installed; pip install ".[tpu-compiler]" brings it')
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {
        "TPU_LIBRARY_PATH": str(Path(found.submodule_search_locations[0]) / "libtpu.so"),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several programs may compile at the same time
    }


def devices_of(chip: Slice) -> list[jax.Device]:
    """Return the devices of a slice, for which programs can be compiled and not run."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=chip.topology, chip_config_name=chip.cores
    )
    return topology.devices[: chip.devices]


class Programs:
    """The programs of one method on one slice, each as `lower` gives it to the compiler."""

    def __init__(
        self, mesh: Mesh, backbone: str, dtype: str, batch: int, images: int, modules: str
    ):
        self.mesh, self.batch = mesh, batch
        self.batching = engine.Batching(mesh, images)
        architecture = backbones.BACKBONES[backbone].architecture
        self.architecture = dataclasses.replace(architecture, dtype=dtype)
        host = "clip" if architecture.reads_text else "dualprompt"
        self.config = Config(
            backbone=backbone,
            dtype=dtype,
            batch_size=batch,
            target_modules=modules,
            method=f"{host}+softtf",
        )
        self.method = self._method()
        self.rows, self.whole = distributed.by_row(mesh), distributed.replicated(mesh)
        size = architecture.image_size
        inputs = [self._array((1, size, size, 3), jnp.float32)]
        inputs += [self._array((1, 8), jnp.int32)] if architecture.reads_text else []
        init = self.architecture.module().init
        params = jax.eval_shape(init, jax.random.key(0), *inputs)["params"]
        self.params = self._everywhere(params)
        self.key = self._everywhere(jax.eval_shape(lambda: jax.random.key(0)))
        self.adapter = self._shapes(self.method.init_adapter, self.key, self.params)
        self.shared = self._shapes(self.method.init_shared, self.key, self.params)
        self.weights = self._shapes(self.method.weights, self.params, self.adapter)
        prompts = {
            name: self._array((TASKS, *shape), jnp.float32)
            for name, shape in self.method.row_shapes.items()
        }
        self.prompts = self._everywhere(prompts)

    def _method(self, **changes: str):
        config = dataclasses.replace(self.config, **changes)
        names = tuple(map(str, range(CLASSES)))
        return registry.make_method(config, self.architecture, names, CLASSES // TASKS)

    def _array(self, shape: tuple[int, ...], dtype: jnp.dtype, split: bool = False):
        sharding = None if not hasattr(self, "rows") else self.rows if split else self.whole
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _everywhere(self, shapes: pytrees.Tree) -> pytrees.Tree:
        return jax.tree.map(lambda leaf: self._array(leaf.shape, leaf.dtype), shapes)

    def _split(self, shapes: pytrees.Tree) -> pytrees.Tree:
        return jax.tree.map(lambda leaf: self._array(leaf.shape, leaf.dtype, True), shapes)

    def _shapes(self, function: Callable, *arguments: pytrees.Tree) -> pytrees.Tree:
        return self._everywhere(jax.eval_shape(function, *arguments))

    @functools.cached_property
    def trained_bytes(self) -> int:
        """Return the bytes of what a step has gradients of."""
        return pytrees.nbytes([self.adapter, self.method.trained_of_shared(self.shared)])

    @functools.cached_property
    def table(self) -> dict[str, Callable[[], jax.stages.Lowered]]:
        """Return every program by its name, not lowered yet."""
        sizes = self.batching.sizes
        table = {"step": self._step, "step_files": self._step_of_files, "init": self._init}
        table |= {"query": self._query, "encode": self._encode, "weights": self._weights}
        table |= {f"logits@{size}": functools.partial(self._logits, size) for size in sizes}
        for size in self._gradient_sizes:
            table[f"gradient@{size}"] = functools.partial(self._gradient, size)
            table[f"alpha@{size}"] = functools.partial(self._alpha, size)
        table |= {
            "mean": self._mean,
            "keys": self._keys,
            "grow": self._grow,
            "insert": self._insert,
            "take": self._take,
            "sums": self._sums,
            "posterior": self._posterior,
        }
        table |= {f"pack_{kind}": functools.partial(self._pack, kind) for kind in PACKINGS}
        if self.architecture.reads_text:
            table |= {
                "class_texts": self._class_texts,
                "zero_shot_texts": self._zero_shot_texts,
                "zero_shot": self._zero_shot,
                "superposed_text": self._superposed_text,
                "alpha_of_text": self._alpha_of_text,
            }
        return table

    # Training.

    @property
    def _state(self) -> train_step.TrainState:
        init = functools.partial(train_step.init_state, self._step_config(True))
        return self._shapes(init, self.adapter, self.shared)

    def _step_config(self, on_device: bool) -> train_step.StepConfig:
        return step_config_of(self.config, self.method, on_device)

    def _fixed(self) -> dict[str, pytrees.Tree]:
        return {
            "class_mask": self._array((CLASSES,), jnp.bool),
            "freeze_g_prompt": self._array((), jnp.bool),
            "memory": {},
        }

    def _step(self) -> jax.stages.Lowered:
        """Lower steps on images in memory; their cycles are those of one."""
        steps = train_step.compile_steps(self._step_config(True), self.mesh)
        size = -(-self.batch // self.mesh.size) * self.mesh.size
        pool = {
            "images": self._array((POOL, SIDE, SIDE, 3), jnp.uint8),
            "labels": self._array((POOL,), jnp.int32),
        }
        batches = {
            "rows": self._array((train_step.CHUNK, size), jnp.int32),
            "weights": self._array((train_step.CHUNK, size), jnp.float32),
        }
        count = self._array((), jnp.int32)
        return steps.lower(self._state, self.params, pool, batches, self._fixed(), self.key, count)

    def _step_of_files(self) -> jax.stages.Lowered:
        step = train_step.compile_step(self._step_config(False), self.mesh)
        size = -(-self.batch // self.mesh.size) * self.mesh.size
        batch = {
            "images": self._images(size, self.architecture.image_size),
            "labels": self._array((size,), jnp.int32, True),
            "weights": self._array((size,), jnp.float32, True),
        }
        return step.lower(self._state, self.params, batch | self._fixed(), self.key)

    def groups(self, name: str) -> int:
        """Return in how many groups of images a program runs: more than one in some steps."""
        if not name.startswith("step"):
            return 1
        size = self.architecture.image_size
        images = self._array((self.batch, size, size, 3), jnp.float32)
        config = self._step_config(False).on(self.mesh)
        return self.batch // config.images_at_once(self.params, images)

    def _init(self) -> jax.stages.Lowered:
        init = train_step.compile_init(self._step_config(True), self.mesh)
        return init.lower(self.adapter, self.shared)

    def _pack(self, kind: str) -> jax.stages.Lowered:
        return loop._pack.lower(self._method(mask_storage=kind), self.adapter, self.key)

    # Inference.

    def _images(self, count: int, side: int):
        return self._array((count, side, side, 3), jnp.uint8, True)

    def _query(self) -> jax.stages.Lowered:
        images = self._images(self.batching.sizes[0], SIDE)
        return engine._query.lower(self.method, self.params, images, prepared=False)

    def _encode(self) -> jax.stages.Lowered:
        images = self._images(self.batching.sizes[0], SIDE)
        return engine._encode.lower(
            self.method, self.params, self.shared, images, None, queried=True, prepared=False
        )

    def _tokens(self, count: int, split: bool = True):
        images = self._images(1, self.architecture.image_size)
        encode = functools.partial(
            engine._encode, self.method, selected=None, queried=False, prepared=True
        )
        one, _ = jax.eval_shape(encode, self.params, self.shared, images)
        return self._array((count, *one.shape[1:]), one.dtype, split)

    def _weights(self) -> jax.stages.Lowered:
        return engine._weights.lower(self.method, self.params, self.adapter)

    def _logits(self, size: int) -> jax.stages.Lowered:
        return engine._logits.lower(
            self.method,
            self.params,
            self.weights,
            self.prompts["prompt"],
            self.shared,
            self._tokens(size),
            self._array((size, 4), jnp.int32, True),
        )

    @functools.cached_property
    def _gradient_sizes(self) -> tuple[int, ...]:
        """Return the images of a Gradient ID's passes in an evaluation, largest first."""
        most = engine.gradients_at_once(self._tokens(1), jax.tree.leaves(self.weights))
        largest = next(self.batching.pieces(self.batching.largest, most))[2]
        return tuple(dict.fromkeys((largest, min(largest, self.batching.sizes[:2][-1]))))

    def _gradient_arguments(self, size: int):
        return (
            self.method,
            self.params,
            self.weights,
            self.prompts["prompt"],
            self.shared,
            self._tokens(size),
            self._array((size, 4), jnp.int32, True),
            self._array((), jnp.int32),
        )

    def _factors(self, size: int, part: int):
        method, *arrays = self._gradient_arguments(size)
        found = jax.eval_shape(functools.partial(identity.entropy_gradients, method), *arrays)
        return self._split(found[part])

    def _gradient(self, size: int) -> jax.stages.Lowered:
        return identity.entropy_gradients.lower(*self._gradient_arguments(size))

    def _alpha(self, size: int) -> jax.stages.Lowered:
        at_once = engine.TaskWeights(
            self.method, self.params, dict, self.config.weights_cache_mb * 2**20
        ).at_once(TASKS)
        return identity.alpha_gradients.lower(self._factors(size, 0), (self.weights,) * at_once)

    def _mean(self) -> jax.stages.Lowered:
        return identity._add.lower(self.weights, self.weights)

    def _keys(self) -> jax.stages.Lowered:
        query = self._array(
            (self.batching.sizes[0], self.architecture.feature_dim), self.config.dtype, True
        )
        return identity.key_similarity.lower(query, self.prompts["key"])

    # What is exchanged between chips.

    def _grow(self) -> jax.stages.Lowered:
        part = self._tokens(self.batching.sizes[0])
        return engine._grow.lower(part, self.batching.chunk, self.mesh)

    def _insert(self) -> jax.stages.Lowered:
        part = self._tokens(self.batching.sizes[0])
        whole = self._tokens(self.batching.chunk)
        return engine._insert.lower(whole, part, self._array((), jnp.int32), self.mesh)

    def _take(self) -> jax.stages.Lowered:
        size = self.batching.sizes[0]
        rows = self._array((size,), jnp.int32)
        return engine._take_scattered.lower(self._tokens(self.batching.chunk), rows, self.mesh)

    # Prototypes. Their solution is NumPy's, in float64 on the host.

    def _sums(self) -> jax.stages.Lowered:
        dim = self.architecture.feature_dim
        return prototypes._sums.lower(
            self._array((prototypes.ROWS, dim), self.config.dtype),
            self._array((prototypes.ROWS, CLASSES // TASKS), jnp.float32),
            self._array((dim, FEATURES), jnp.float32),
        )

    def _posterior(self) -> jax.stages.Lowered:
        dim = self.architecture.feature_dim
        classifier = prototypes.Classifier(
            self._array((dim, FEATURES), jnp.float32),
            self._array((FEATURES, CLASSES), jnp.float32),
            self._array((CLASSES,), jnp.bool),
        )
        query = self._array((self.batching.sizes[0], dim), self.config.dtype, True)
        return prototypes.log_posterior.lower(query, classifier)

    # Text.

    def _class_texts(self) -> jax.stages.Lowered:
        mask = self._array((CLASSES,), jnp.bool)
        return loop._with_own_classes.lower(
            self.method, self.params, self.adapter, self.shared, mask
        )

    def _zero_shot_texts(self) -> jax.stages.Lowered:
        return zero_shot.text_features.lower(
            self.architecture, self.params, self.method.class_names
        )

    def _zero_shot(self) -> jax.stages.Lowered:
        dim, size = self.architecture.feature_dim, self.batching.sizes[0]
        text = self._array((CLASSES, dim), jnp.float32)
        query = self._array((size, dim), self.config.dtype, True)
        return zero_shot.logits.lower(self.architecture, self.params, text, query)

    def _text_arguments(self):
        classes = self._array((TASKS, self.method.classes_at_once), jnp.int32)
        return self.weights, self.weights, self.prompts["context"], classes

    def _superposed_text(self) -> jax.stages.Lowered:
        return identity.superposed_text.lower(self.method, self.params, *self._text_arguments())

    def _alpha_of_text(self) -> jax.stages.Lowered:
        text = self.shared["head"]["text"]
        tangents = self._array((TASKS, *text.shape), jnp.float32)
        factors = self._factors(self._gradient_sizes[0], 1)
        return identity.text_alpha_gradients.lower(
            self.method, self.params, self.shared, factors, tangents
        )


# What the compiler says.

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
_WHILE = re.compile(r"\bwhile\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return a compiled program's computations by name, as lines, and the entry's name."""
    found, lines, entry = {}, [], ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            lines = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return found, entry


def cycles(text: str) -> int:
    """Return the cycles that the compiler forecasts for the entry computation of a program.

    A loop that counts from 0 to a constant counts that often, any other once.
    """
    found, entry = computations(text)

    def trips(condition: str) -> int:
        bound = _BOUND.findall("\n".join(found[condition]))
        return int(bound[0]) if len(bound) == 1 else 1

    def of(name: str) -> int:
        total = 0
        for line in found[name]:
            if own := _CYCLES.search(line):
                total += int(own[1])
            elif loop_ := _WHILE.search(line):
                total += of(loop_[2]) * trips(loop_[1])
            elif re.search(r"\b(call|conditional)\(", line):
                total += max(map(of, _CALLED.findall(line)), default=0)
        return total

    return of(entry)


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Return how often chips exchange something, how many numbers, and one chip's bytes of them.

    Each instruction counts once, also in a loop.
    """
    found: dict[str, dict[str, int]] = {}
    for line in text.splitlines():
        if not (match := _COLLECTIVE.search(line)):
            continue
        arrays = [
            (int(np.prod([int(n) for n in sizes.split(",") if n])), _BYTES.get(kind, 4))
            for kind, sizes in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", match[1]))
        ]
        if match[3] and match[2] != "all-reduce":  # its operand stands beside its result
            arrays = arrays[len(arrays) // 2 :]
        kind = found.setdefault(match[2], {"count": 0, "numbers": 0, "bytes": 0})
        kind["count"] += 1
        kind["numbers"] += sum(numbers for numbers, _ in arrays)
        kind["bytes"] += sum(numbers * each for numbers, each in arrays)
    return found


def forecast(lowered: jax.stages.Lowered, groups: int = 1) -> dict:
    """Compile a program, and return what the compiler says of it.

    It counts the operations of a loop once, so those of a program in `groups` are multiplied.
    Where it needs too much memory, only `needs` (text) and `seconds` are there. Other errors of the
    compiler are raised.
    """
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used (\S+) of (\S+)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not used:
            raise
        return {"needs": f"{used[1]} of {used[2]}", "seconds": time.monotonic() - start}
    text, memory = compiled.as_text(), compiled.memory_analysis()
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes
    return {
        "memory": arguments + results - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        # -1 where the compiler does not know.
        "operations": max((compiled.cost_analysis() or {}).get("flops", 0.0), 0.0) * groups,
        "cycles": cycles(text),
        "collectives": collectives(text),
        "seconds": time.monotonic() - start,
    }


HELP = {"step": "a smaller batch_size, or more chips", "gradient": "a smaller eval_batch_size"}


def row(name: str, found: Mapping, chip: Slice) -> str:
    """Return a program's line of the table."""
    if "needs" in found:
        helps = HELP.get(re.split(r"[_@]", name)[0], "a smaller eval_batch_size, or more chips")
        return f"| {name} | does not fit: {found['needs']}; {helps} | | | | |"
    share = found["operations"] / max(found["cycles"], 1) / chip.cycle
    sent = ", ".join(
        f"{kind['count']} {name} of {kind['bytes'] / 2**20:.1f} MiB"
        for name, kind in sorted(found["collectives"].items())
    )
    return (
        f"| {name} | {found['memory'] / 2**30:.2f} of {chip.memory / 2**30:.0f} GiB "
        f"| {found['operations'] / 1e12:.3f} | {found['cycles'] / 1e6:.2f} | {share:.1%} "
        f"| {sent or '–'} |"
    )


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slices", default=",".join(GRID), help=f"of {', '.join(SLICES)}")
    parser.add_argument("--backbones", default="vit_b16,clip_vit_b16")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--programs", default="", help="those that begin so; default: all")
    parser.add_argument("--batch", type=int, default=24, help="images of a step, over all chips")
    parser.add_argument("--images", type=int, default=256, help="of a forward pass")
    parser.add_argument("--target-modules", default="qkv+proj")
    parser.add_argument("--output", type=Path, help="a JSON file that keeps the results")
    arguments = parser.parse_args()
    use_compiler()
    wanted = tuple(filter(None, arguments.programs.split(",")))
    kept = Results(arguments.output)
    failed = [
        name
        for slice_name in arguments.slices.split(",")
        for backbone in arguments.backbones.split(",")
        for dtype in arguments.dtypes.split(",")
        for name in _compile_all(arguments, kept, slice_name, backbone, dtype, wanted)
    ]
    if failed:
        sys.exit("does not compile: " + "; ".join(failed))


def _compile_all(arguments, kept, slice_name, backbone, dtype, wanted) -> list[str]:
    """Compile what is wanted of one slice, backbone and dtype; return what does not compile."""
    chip, failed = SLICES[slice_name], []
    mesh = distributed.data_mesh(devices_of(chip))
    programs = Programs(
        mesh, backbone, dtype, arguments.batch, arguments.images, arguments.target_modules
    )
    of = f"{slice_name}, {backbone}, {dtype}, batch {arguments.batch}, {arguments.target_modules}"
    print(f"\n{of}; {programs.trained_bytes / 2**20:.1f} MiB of gradients; jax {jax.__version__}")
    print("| program | memory a chip | TFLOP | M cycles | of the peak | exchanged |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, lower in programs.table.items():
        if wanted and not name.startswith(wanted):
            continue
        try:
            title = f"{of}, {arguments.images} images, {name}"
            found = kept.get(title, lower(), chip, programs.trained_bytes, programs.groups(name))
        except Exception as error:  # whatever it is, the others are compiled all the same
            failed.append(f"{of}, {name}")
            print(f"| {name} | does not compile: {str(error).splitlines()[0]} | | | | |")
            continue
        print(row(name, found, chip), flush=True)
    return failed


class Results:
    """Forecasts by program in a JSON file, if one is given."""

    def __init__(self, path: Path | None):
        self.path = path
        self.found = json.loads(path.read_text()) if path and path.exists() else {}

    def get(
        self, name: str, lowered: jax.stages.Lowered, chip: Slice, gradients: int, groups: int
    ) -> dict:
        """Return the forecast of a program: one kept, where it is of the same program and slice.

        The same program may stand there under another name: packing, for one, is the same in
        bfloat16 and in float32, whose masks are float32 both.
        """
        beside = f"{jax.__version__} {os.environ['TPU_LIBRARY_PATH']} {chip} "
        program = hashlib.sha256((beside + lowered.as_text()).encode()).hexdigest()
        same = (found for found in self.found.values() if found["program"] == program)
        if not (found := next(same, None)):
            about = {"program": program, "gradients": gradients}
            found = about | forecast(lowered, groups)
        if self.found.get(name) != found:
            self.found[name] = found
            self._save()
        return found

    def _save(self) -> None:
        if self.path:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.found, indent=1))
            part.replace(self.path)


if __name__ == "__main__":
    main()
