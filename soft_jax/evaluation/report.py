"""Results of a run from its tasks' manifests: `results.jsonl`, a Markdown report, pictures and
the terminal's table. No jax.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from soft_jax.evaluation import metrics
from soft_jax.store.folder import write_text

LABELS = 20  # of tasks along the side of a picture

Manifests = Sequence[Mapping[str, Any]]

VOTE_GRADIENT = "batch_vote/gradient_id_"  # and the number of shots
TITLES = {
    "per_sample/prompt_id": "CIL per_sample, Prompt ID",
    "per_sample/gradient_id": "CIL per_sample, Gradient ID",
    "per_sample/prototype": "CIL per_sample, prototype",
    "batch_vote/prompt_id": "CIL batch_vote, Prompt ID *",
    "per_sample/no_task_id": "CIL per_sample, no task id",
    "batch_vote/pool": "CIL batch_vote, pool *",
    "oracle/task_given": "TIL oracle, task given",
}


def vote_gradient(shots: int) -> str:
    """The published Gradient ID's protocol with so many images of each test batch, 0 being all."""
    return f"{VOTE_GRADIENT}{shots or 'all'}"


def title(protocol: str) -> str:
    """A protocol as tables name it; that of the published Gradient ID with its shots."""
    if protocol.startswith(VOTE_GRADIENT):
        return f"CIL batch_vote, Gradient ID, {protocol.removeprefix(VOTE_GRADIENT)} shots *"
    return TITLES[protocol]


FOOTNOTE = (
    "* the published protocol: one task id for a test batch that holds a single task, so "
    "the batch leaks the task"
)
LEGEND = (
    "final: mean accuracy over all tasks after the last; learned: of each task just after it; "
    "incr.: of the tasks seen, mean over the "
    "stages; forget: best minus final, mean over the tasks before the last; backw.: final minus "
    "learned, over the same; task id: test "
    "images given to their own task"
)
COLUMNS = {
    "final_average": "final",
    "just_learned": "learned",
    "average_incremental": "incr.",
    "forgetting": "forget",
    "backward_transfer": "backw.",
    "task_id_accuracy": "task id",
}


def accuracy_matrix(manifests: Manifests, protocol: str, field: str = "correct") -> np.ndarray:
    """Percent `[task, trained through]` of one protocol; 0 below the diagonal. `field` is
    "correct" or "task_correct".
    """
    matrix = np.zeros((len(manifests), len(manifests)))
    for stage, manifest in enumerate(manifests):
        for task, row in enumerate(manifest["metrics"][protocol]):
            matrix[task, stage] = 100 * row[field] / row["total"]
    return matrix


def task_confusion(manifests: Manifests, protocol: str) -> np.ndarray:
    """Percent `[task, task given to]` of each task's test images after the last task trained."""
    rows = manifests[-1]["metrics"][protocol]
    confusion = np.zeros((len(rows), manifests[-1]["config"]["tasks"]))
    for task, row in enumerate(rows):
        for given, count in row["identified"].items():
            confusion[task, int(given)] = 100 * count / row["total"]
    return confusion


def figures(manifests: Manifests, protocol: str) -> dict[str, float]:
    """`metrics.summarize` of one protocol, with `task_id_accuracy`: percent of test images given
    to their own task.
    """
    task_id = accuracy_matrix(manifests, protocol, "task_correct")[:, -1].mean()
    return metrics.summarize(accuracy_matrix(manifests, protocol)) | {
        "task_id_accuracy": float(task_id)
    }


def published_rows() -> list[dict[str, Any]]:
    """Every row of the paper's tables; those with a task id are under the batch_vote protocol."""
    return json.loads((resources.files("soft_jax") / "assets" / "published.json").read_text())[
        "rows"
    ]


def published(benchmark: str) -> list[dict[str, Any]]:
    """The paper's rows with an accuracy for a benchmark."""
    return [row for row in published_rows() if "accuracy" in row.get(benchmark, {})]


def row_name(row: Mapping[str, Any]) -> str:
    """A published row's method, with what tells rows of one name apart."""
    qualifiers = {
        "exemplars": "{} exemplars",
        "pretraining": "pre-trained by {}",
        "mask_init": "masks drawn {}",
    }
    return ", ".join(
        [
            row["method"],
            *(text.format(row[key]) for key, text in qualifiers.items() if row.get(key)),
        ]
    )


def write(
    root: Path, config: Mapping[str, Any], benchmark: str, manifests: Manifests, drawn: bool
) -> None:
    """Write `results.jsonl`, `report.md` and, if they are to be `drawn`, the pictures, all made
    anew from the manifests.
    """
    write_text(
        root / "results.jsonl",
        "".join(json.dumps(row) + "\n" for row in result_rows(config, benchmark, manifests)),
    )
    pictures = draw(root, manifests) if drawn else []
    write_text(root / "report.md", markdown(root, config, benchmark, manifests, pictures))


def result_rows(
    config: Mapping[str, Any], benchmark: str, manifests: Manifests
) -> list[dict[str, Any]]:
    """One row per task trained and protocol."""
    rows = []
    # Once for all stages: their rows are written anew after every task.
    protocols = manifests[0]["metrics"]
    accuracy = {protocol: accuracy_matrix(manifests, protocol) for protocol in protocols}
    by_stage = {protocol: metrics.by_stage(matrix) for protocol, matrix in accuracy.items()}
    identified = {
        protocol: accuracy_matrix(manifests, protocol, "task_correct") for protocol in protocols
    }
    for stage in range(1, len(manifests) + 1):
        for protocol in protocols:
            name, task_id = protocol.split("/")
            rows.append(
                {
                    "benchmark": benchmark,
                    "method": config["method"],
                    "seed": config["seed"],
                    "tasks_trained": stage,
                    "protocol": name,
                    "task_id": task_id,
                    **{
                        figure: float(values[stage - 1])
                        for figure, values in by_stage[protocol].items()
                    },
                    "task_id_accuracy": float(identified[protocol][:stage, stage - 1].mean()),
                    "accuracy_by_task": accuracy[protocol][:stage, stage - 1].tolist(),
                    "images": sum(
                        row["total"] for row in manifests[stage - 1]["metrics"][protocol]
                    ),
                    "seconds": manifests[stage - 1]["seconds"],
                }
            )
    return rows


def line(manifests: Manifests) -> str:
    """One line on the state after the latest task."""
    parts = [
        f"{protocol} {accuracy_matrix(manifests, protocol)[:, -1].mean():.2f}"
        for protocol in manifests[0]["metrics"]
    ]
    return f"After task {len(manifests)}: " + ", ".join(parts)


def show(console: Console, benchmark: str, manifests: Manifests) -> None:
    """Print the final table."""
    table = Table(
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"{benchmark} after {len(manifests)} tasks, percent",
        title_justify="left",
    )
    table.add_column("protocol")  # what is too long for a narrow terminal goes on below
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for protocol in manifests[0]["metrics"]:
        values = figures(manifests, protocol)
        table.add_row(title(protocol), *(f"{values[column]:.2f}" for column in COLUMNS))
    console.print(table)
    console.print(f"{FOOTNOTE}\n{LEGEND}")
    console.print(_time(manifests))


def _time(manifests: Manifests) -> str:
    parts = ("train", "input_wait", "statistics", "evaluate")
    train, wait, statistics, evaluate = (
        sum(manifest["seconds"].get(part, 0) for manifest in manifests) for part in parts
    )
    return (
        f"Time: {train:.0f} s training ({wait:.1f} s of it waiting for batches), {statistics:.0f} "
        "s statistics, "
        f"{evaluate:.0f} s evaluation, compilation included."
    )


def markdown(
    root: Path,
    config: Mapping[str, Any],
    benchmark: str,
    manifests: Manifests,
    pictures: Sequence[str],
) -> str:
    """The report as Markdown."""
    lines = [f"# {config['method']} on {benchmark}, seed {config['seed']}", ""]
    lines += [f"After {len(manifests)} of {config['tasks']} tasks; percent of test images.", ""]
    lines += [
        "| protocol | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for protocol in manifests[0]["metrics"]:
        values = figures(manifests, protocol)
        lines.append(
            f"| {_escaped(title(protocol))} | "
            + " | ".join(f"{values[column]:.2f}" for column in COLUMNS)
            + " |"
        )
    lines += [
        "",
        _escaped(FOOTNOTE),
        "",
        f"({LEGEND}.)",
        "",
        _time(manifests),
        "",
        *_size_lines(root, manifests),
    ]
    lines += ["## Accuracy by task (rows) after each task trained (columns)", ""]
    for protocol in manifests[0]["metrics"]:
        lines += [
            f"{_escaped(title(protocol))}:",
            "",
            *_matrix(accuracy_matrix(manifests, protocol)),
            "",
        ]
    lines += [
        *_drift_lines(manifests),
        *_published_lines(benchmark),
        *(f"![{name}]({name})" for name in pictures),
    ]
    backbone = manifests[-1]["backbone"]
    settings = ", ".join(f"{key}={value}" for key, value in config.items())
    lines += [
        "",
        f"Backbone {backbone['name']}, SHA-256 {backbone['sha256']}.",
        "",
        f"Settings: {settings}.",
        "",
    ]
    return "\n".join(lines)


def _size_lines(root: Path, manifests: Manifests) -> list[str]:
    parameters = manifests[-1]["parameters"]
    adapter, shared = parameters["adapter"] - parameters["fixed"], parameters["shared"]
    sizes, flops = {"exemplars": 0} | manifests[-1]["bytes"], manifests[-1]["step_flops"]
    folders = sorted(path for path in (root / "tasks").iterdir() if path.name.isdigit())
    return [
        "## Size",
        "",
        f"- Trainable parameters of one task: {adapter:,} of its own, and {shared:,} shared by "
        "all.",
        f"- Of all {len(manifests)} tasks: {adapter * len(manifests) + shared:,}.",
        f"- Bytes that one task keeps: {sizes['adapter']:,} adapter, {sizes['statistics']:,} "
        "statistics for prototype task identity, "
        f"{sizes['shared']:,} shared part, {sizes['memory'] + sizes['exemplars']:,} what the "
        "method holds of older tasks"
        + (
            f" ({sizes['exemplars']:,} of it images, stored as their rows in the training set)."
            if sizes["exemplars"]
            else "."
        ),
        f"- Bytes on disk: {_bytes(folders[-1]):,} of the last task, {sum(map(_bytes, folders)):,} "
        "of all.",
        *(
            [f"- Floating point operations of a training step, as XLA counts them: {flops:.4g}."]
            if flops
            else []
        ),
        "",
    ]


def _drift_lines(manifests: Manifests) -> list[str]:
    drifts = manifests[-1]["weight_drift"]
    if not drifts:
        return []
    lines = [
        "## How far each task's weights are from the frozen ones",
        "",
        "Relative, |θ_t − θ| / |θ|; at its largest and in the mean over tasks.",
    ]
    lines += ["", "| weight | largest | mean |", "|---|---|---|"]
    for path in sorted(drifts, key=_layer_first):
        values = [manifest["weight_drift"][path] for manifest in manifests]
        lines.append(f"| {path} | {max(values):.4f} | {np.mean(values):.4f} |")
    return [*lines, ""]


def _published_lines(benchmark: str) -> list[str]:
    rows = published(benchmark)
    if not rows:
        return []
    lines = [
        "## Published figures",
        "",
        "From arXiv 2411.16073, ViT-B/16 at 224 pixels. Rows with a task id are under batch_vote "
        "(one id for a whole test batch).",
        "",
        "| method | table | protocol | task id | final | forgetting |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        method = row_name(row)
        protocol = "batch_vote" if row["task_id"] else "–"
        value = row[benchmark]
        forgetting = "–" if value["forgetting"] is None else f"{value['forgetting']:.2f}"
        lines.append(
            f"| {method} | {row['table']} | {protocol} | {row['task_id'] or '–'} | "
            f"{value['accuracy']:.2f} | {forgetting} |"
        )
    return [*lines, ""]


def _escaped(text: str) -> str:
    return text.replace("*", "\\*")


def _matrix(matrix: np.ndarray) -> list[str]:
    stages = range(matrix.shape[1])
    lines = [
        "| task | " + " | ".join(str(stage + 1) for stage in stages) + " |",
        "|---" * (len(stages) + 1) + "|",
    ]
    for task in stages:
        lines.append(
            f"| {task + 1} | "
            + " | ".join(f"{matrix[task, s]:.1f}" if s >= task else "" for s in stages)
            + " |"
        )
    return lines


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def draw(root: Path, manifests: Manifests) -> list[str]:
    """Draw the pictures into `root`; their file names."""
    # Figures without pyplot: no display, no global state.
    from matplotlib.figure import Figure

    protocols, stages = list(manifests[0]["metrics"]), np.arange(1, len(manifests) + 1)
    names = []

    def save(figure: Figure, name: str) -> None:
        figure.savefig(root / name, dpi=100)
        names.append(name)

    figure = Figure(figsize=(4 * len(protocols), 4), layout="constrained")
    for axes, protocol in zip(
        figure.subplots(1, len(protocols), squeeze=False)[0], protocols, strict=True
    ):
        matrix = accuracy_matrix(manifests, protocol)
        image = axes.imshow(
            np.ma.masked_array(matrix, np.tril(np.ones_like(matrix), -1)), vmin=0, vmax=100
        )
        axes.set(title=protocol, xlabel="trained through task", ylabel="test images of task")
        for ticks in (axes.set_xticks, axes.set_yticks):
            _number(ticks, len(stages))
    figure.colorbar(image, ax=figure.axes, label="accuracy (%)")
    save(figure, "accuracy_matrix.png")

    identifying = [protocol for protocol in protocols if not protocol.startswith("oracle/")]
    figure = Figure(figsize=(4 * len(identifying), 4), layout="constrained")
    for axes, protocol in zip(
        figure.subplots(1, len(identifying), squeeze=False)[0], identifying, strict=True
    ):
        confusion = task_confusion(manifests, protocol)
        image = axes.imshow(confusion, vmin=0, vmax=100)
        axes.set(title=protocol, xlabel="given to task", ylabel="test images of task")
        _number(axes.set_xticks, confusion.shape[1])
        _number(axes.set_yticks, len(stages))
    figure.colorbar(image, ax=figure.axes, label="test images (%)")
    save(figure, "task_confusion.png")

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, field, title in zip(
        figure.subplots(1, 2),
        ("final_average", "forgetting"),
        ("average accuracy", "forgetting"),
        strict=True,
    ):
        for protocol in protocols:
            values = metrics.by_stage(accuracy_matrix(manifests, protocol))[field]
            axes.plot(stages, values, marker="o", label=protocol)
        axes.set(
            xlabel="tasks trained", ylabel=f"{title} (%)", xticks=stages[:: _every(len(stages))]
        )
        axes.legend()
    save(figure, "accuracy_and_forgetting.png")

    if densities := manifests[-1]["mask_density"]:
        save(_densities(densities), "mask_density.png")
    if distances := manifests[-1]["mask_distance_from_one"]:
        paths = sorted(distances, key=_layer_first)
        figure = Figure(
            figsize=(2 + 0.8 * min(len(stages), LABELS), 1 + 0.4 * len(paths)), layout="constrained"
        )
        axes = figure.subplots()
        values = np.array(
            [[manifest["mask_distance_from_one"][path] for manifest in manifests] for path in paths]
        )
        image = axes.imshow(values, aspect="auto")
        axes.set_yticks(range(len(paths)), [_label(path) for path in paths])
        _number(axes.set_xticks, len(stages))
        axes.set(xlabel="task", title="how far each mask moved from 1")
        figure.colorbar(image, ax=axes, label="root mean square of m − 1")
        save(figure, "mask_distance.png")
    return names


def _every(count: int) -> int:
    return -(-count // LABELS)


def _number(set_ticks: Callable[..., Any], count: int) -> None:
    """Label places 0 to `count` - 1 as 1 and on, those that there is room for."""
    places = np.arange(0, count, _every(count))
    set_ticks(places, places + 1)


def _layer_first(path: str) -> tuple[int, str]:
    return int(path.split("/", maxsplit=1)[0].removeprefix("blocks_")) if path.startswith(
        "blocks_"
    ) else -1, path


def _label(path: str) -> str:
    layer, _ = _layer_first(path)
    return f"L{layer + 1} {'/'.join(path.split('/')[1:-1])}"


def _densities(densities: Mapping[str, Mapping[str, Any]]) -> Any:
    """The densities of the last task's mask entries, a panel a weight and a curve a layer (the
    paper's Figures 6 and 7).
    """
    from matplotlib.figure import Figure

    weights = sorted({"/".join(path.split("/")[1:-1]) for path in densities})
    figure = Figure(figsize=(4 * len(weights), 3.5), layout="constrained")
    for axes, weight in zip(
        figure.subplots(1, len(weights), squeeze=False)[0], weights, strict=True
    ):
        for path in sorted((p for p in densities if f"/{weight}/" in p), key=_layer_first):
            found, counts = densities[path], np.array(densities[path]["counts"])
            edges = np.linspace(found["low"], found["high"], len(counts) + 1)
            axes.stairs(
                counts / counts.sum() / np.diff(edges), edges, label=_label(path).split()[0]
            )
        axes.set(title=weight, xlabel="mask entry", ylabel="density", yscale="log")
        axes.legend()
    return figure
