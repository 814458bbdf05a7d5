"""How λ of the prototypes' ridge regression is chosen, by the number of training images:
python -m benchmarks.prototypes --data_dir=DIR

CIFAR-100 in 10 tasks of 10 classes, in an order, with training images and random features that are
drawn by the seed; q(x) of the bundled backbone, no masks. After each task the statistics of all so
far classify the test images of all classes so far. Prints three Markdown tables; percentages are
the mean over the seeds, with ± their standard deviation.

With --choose, tables on training images alone instead, of the two constants by which λ is chosen:
accuracy on the last 100 images of each class, in the seed's order, which no --images up to 400
train on, as the mean over the seeds, images a class and tasks of --after. The pair of the highest
mean wins; of equal ones that of the larger cap, then of the larger tolerance: the least shrinkage.
The pair in use stays where the 95% interval over the seeds of what the winner gains on it holds 0.

With --stages, one table instead: after which of the tasks of --after the chosen λ is furthest below
the best on test images, and how far below it the λ is that is best on the images held out.

With --half, one table instead: after the last task, by the statistics as they are and rounded to
float16, each array times a power of two that brings its largest entry near float16's. q(x) is then
of the first images of each class, as many as are asked for.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from soft_jax.data import sources
from soft_jax.inference import prototypes
from soft_jax.models import backbones

TASKS = 10
BATCH = 256  # images
HELD_OUT = 5  # one image of so many is held out, as by RanPAC
SHARPNESSES = np.geomspace(1, 300, 25)
BINS = 15  # of the expected calibration error
VALIDATION = 100  # images a class that are held out, by --choose and --stages
SLACKS = (0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05)
CAPS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
QUANTILE = 4.303  # of Student's t with two degrees of freedom, 97.5%: for three seeds

Split = tuple[np.ndarray, np.ndarray]  # q(x) [N, dim] and labels [N]
Row = dict[str, float]
Figures = dict[str, Any]  # of a stage: lists by λ of `RIDGES`, and the number of its tasks


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", default="", help="where TFDS has CIFAR-100")
    parser.add_argument("--images", type=int, nargs="+", default=[5, 10, 24, 60, 200, 500])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--features", type=int, default=2000)
    parser.add_argument("--queries", help="a file that keeps q(x) for the next time, .npz")
    parser.add_argument("--half", action="store_true", help="compare with half precision")
    parser.add_argument("--choose", action="store_true", help="compare the rule's constants")
    parser.add_argument("--stages", action="store_true", help="look at single stages")
    parser.add_argument("--after", type=int, nargs="+", default=range(1, TASKS + 1))
    parser.add_argument("--figures", help="a file that keeps those of --choose and --stages, .json")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(arguments.queries or Path(folder) / "queries.npz")
        limit = max(arguments.images) if arguments.half else 0
        train, test = queries(file, arguments.data_dir, limit)
        if arguments.choose or arguments.stages:
            found = kept_figures(arguments, train, test)
            print(constants(found) if arguments.choose else single_stages(found))
            return
        figures = halves if arguments.half else measure
        rows = {
            count: [
                figures(seed, count, arguments.features, train, test) for seed in arguments.seeds
            ]
            for count in arguments.images
        }
    print(table(rows, HALVES, 2) if arguments.half else tables(rows))


def queries(file: Path, data_dir: str, limit: int) -> tuple[Split, Split]:
    """Return q(x) and labels of the training and of the test images; `file` keeps them.

    Of training images it is the first `limit` of a class; 0: all.
    """
    if not file.exists():
        dataset, backbone = sources.load("cifar100", data_dir), backbones.load("vit_ti8_32")
        dataset = dataset.first(limit, 0)

        @jax.jit
        def query(images: jax.Array) -> jax.Array:
            return backbone.architecture.features(backbone.params, images.astype(jnp.float32) / 255)

        arrays = {}
        for name in ("train", "test"):
            split = getattr(dataset, name)
            blocks = range(0, len(split.labels), BATCH)
            found = [np.asarray(query(split.images[start : start + BATCH])) for start in blocks]
            arrays |= {name: np.concatenate(found), f"{name}_labels": split.labels}
        np.savez(file, **arrays)
    with np.load(file) as kept:
        return tuple((kept[name], kept[f"{name}_labels"]) for name in ("train", "test"))


def measure(seed: int, count: int, features: int, train: Split, test: Split) -> Row:
    """Return the figures of one seed and `count` images a class, by name."""
    rng = np.random.default_rng(seed)
    num_classes = int(train[1].max()) + 1
    order = rng.permutation(num_classes).reshape(TASKS, -1)
    # A smaller `count` takes the first of the same images.
    images = [rng.permutation(np.flatnonzero(train[1] == c)) for c in range(num_classes)]
    projection = prototypes.projection(seed, train[0].shape[1], features)
    whole, rest = (prototypes.Sums(num_classes, projection) for _ in range(2))
    held, stages, means = [], [], np.zeros((num_classes, train[0].shape[1]), np.float32)
    test_features = random_features(test[0], projection)
    for task, classes in enumerate(order):
        members = np.concatenate([images[c][:count] for c in classes])
        query, labels = (array[members] for array in train)
        whole.add(classes, prototypes.statistics(query, labels, classes, projection))
        last = np.tile(np.arange(count) >= count - max(count // HELD_OUT, 1), len(classes))
        kept = (query[~last], labels[~last])
        rest.add(classes, prototypes.statistics(*kept, classes, projection))
        held.append((query[last], labels[last]))
        means[classes] = [query[labels == c].mean(axis=0) for c in classes]
        seen = order[: task + 1].ravel()
        of_seen = np.isin(test[1], seen)
        found = whole.decompose()
        stages.append(
            stage(
                found,
                test_features[of_seen],
                (test[0][of_seen], test[1][of_seen]),
                order,
                seen,
                means,
            )
        )
    row = dict(stages[-1])
    row |= {f"mean {key}": float(np.mean([one[key] for one in stages])) for key in row}
    row["worst"] = max(one["hindsight"] - one["chosen"] for one in stages)
    # RanPAC's choice, after the last task: the least squared error of the images held out.
    truth = np.concatenate([labels for _, labels in held])
    held_features = random_features(np.concatenate([query for query, _ in held]), projection)
    errors = [
        np.square(scores - np.eye(num_classes)[truth]).sum()
        for scores in by_ridge(rest.decompose(), held_features)
    ]
    best = prototypes.RIDGES[int(np.argmin(errors))]
    scores = test_features @ found.weights(best).astype(np.float32)
    row["held out"] = percent(scores.argmax(axis=1) == test[1])
    return row


def kept_figures(
    arguments: argparse.Namespace, train: Split, test: Split
) -> dict[int, list[list[Figures]]]:
    """Return `by_stage` of all images a class and seeds, which `--figures` keeps for next time."""
    file = Path(arguments.figures) if arguments.figures else None
    kept = json.loads(file.read_text()) if file and file.exists() else {}
    found: dict[int, list[list[Figures]]] = {}
    for count in arguments.images:
        for seed in arguments.seeds:
            key = f"{arguments.features} {count} {seed} {list(arguments.after)}"
            if key not in kept:
                kept[key] = by_stage(seed, count, arguments.features, arguments.after, train, test)
                if file:
                    file.write_text(json.dumps(kept))
            found.setdefault(count, []).append(kept[key])
    return found


def by_stage(
    seed: int, count: int, features: int, after: Iterable[int], train: Split, test: Split
) -> list[Figures]:
    """Return the figures of each stage `after` so many tasks, each a list by λ of `RIDGES`.

    "error" and "fitted" are the `validation_error`; "validation" and "test" are accuracies on the
    images held out (none where `count` leaves too few) and on test images, in percent; "differ" is
    the percentage of test images of which this λ and the best one have one right and one wrong,
    "images" their number. Classes, training images and features are those of `measure`.
    """
    rng = np.random.default_rng(seed)
    num_classes = int(train[1].max()) + 1
    order = rng.permutation(num_classes).reshape(TASKS, -1)
    images = [rng.permutation(np.flatnonzero(train[1] == c)) for c in range(num_classes)]
    projection = prototypes.projection(seed, train[0].shape[1], features)
    sums = prototypes.Sums(num_classes, projection)
    last = np.concatenate([own[count:][-VALIDATION:] for own in images])
    splits = {"test": test}
    if len(last) == num_classes * VALIDATION:
        splits["validation"] = train[0][last], train[1][last]
    expanded = {
        name: (random_features(query, projection), labels)
        for name, (query, labels) in splits.items()
    }
    stages = []
    for task, classes in enumerate(order):
        own = np.concatenate([images[c][:count] for c in classes])
        sums.add(classes, prototypes.statistics(train[0][own], train[1][own], classes, projection))
        if task + 1 not in after:
            continue
        found, seen = sums.decompose(), order[: task + 1].ravel()
        error, fitted = zip(*found.validation_errors().values(), strict=True)
        stage: Figures = {"tasks": task + 1, "error": error, "fitted": fitted}
        for name, (phi, labels) in expanded.items():
            of_seen = np.isin(labels, seen)
            right = [
                seen[scores[:, seen].argmax(axis=1)] == labels[of_seen]
                for scores in by_ridge(found, phi[of_seen])
            ]
            stage[name] = [percent(r) for r in right]
            if name == "test":
                best = right[int(np.argmax(stage[name]))]
                stage["images"], stage["differ"] = len(best), [percent(r != best) for r in right]
        stages.append(stage)
    return stages


def index_chosen(stage: Figures, slack: float, cap: float) -> int:
    """Return which of `RIDGES` is chosen by these constants."""
    errors = dict(
        zip(prototypes.RIDGES, zip(stage["error"], stage["fitted"], strict=True), strict=True)
    )
    return prototypes.RIDGES.index(prototypes.smallest_ridge(errors, slack, cap))


def constants(found: dict[int, list[list[Figures]]]) -> str:
    """Return the tables of --choose as Markdown; they hold no figure of a test image."""
    by_pair = {  # [images a class, seeds], mean over the stages
        (cap, slack): np.array(
            [
                [
                    np.mean([s["validation"][index_chosen(s, slack, cap)] for s in stages])
                    for stages in seeds
                ]
                for seeds in found.values()
            ]
        )
        for cap in CAPS
        for slack in SLACKS
    }
    winner = max(by_pair, key=lambda pair: (round(float(by_pair[pair].mean()), 6), *pair))
    present = (prototypes.MOST_FITTED, prototypes.SLACK)
    best = np.array(
        [
            [np.mean([max(s["validation"]) for s in stages]) for stages in seeds]
            for seeds in found.values()
        ]
    )
    head = ["fitted at most", *(f"{100 * slack:g}%" for slack in SLACKS)]
    lines = [head, ["---"] * len(head)]
    for cap in CAPS:
        lines.append([f"{cap:g}", *(f"{by_pair[cap, slack].mean():.2f}" for slack in SLACKS)])
    head = ["images a class", *(str(count) for count in found)]
    sizes = [head, ["---"] * len(head)]
    for name, values in (
        ("best λ of each stage in hindsight", best),
        (f"winner: {name_of(winner)}", by_pair[winner]),
        (f"in use: {name_of(present)}", by_pair[present]),
    ):
        sizes.append([name, *(f"{value:.2f}" for value in values.mean(axis=1))])
    gain = (by_pair[winner] - by_pair[present]).mean(axis=0)
    interval = QUANTILE * np.std(gain, ddof=1) / np.sqrt(len(gain))
    grid, by_size = ("\n".join(f"| {' | '.join(line)} |" for line in t) for t in (lines, sizes))
    return (
        f"{grid}\n\n{by_size}\n\n"
        f"The winner gains {gain.mean():.3f} ± {interval:.3f} points, 95% over {len(gain)} seeds."
    )


def name_of(pair: tuple[float, float]) -> str:
    """Return a pair of constants in words."""
    return f"{100 * pair[1]:g}%, at most {pair[0]:g}"


def single_stages(found: dict[int, list[list[Figures]]]) -> str:
    """Return the table of --stages as Markdown.

    "Validated" is the λ of each stage that is best on the images held out. The standard error is
    that of the difference of two accuracies on the same images.
    """
    head = ["images a class", "mean: chosen", "validated"]
    head += ["worst mean over the seeds: chosen", "validated"]
    head += ["worst of all stages: chosen", "its standard error", "validated"]
    lines = [head, ["---"] * len(head)]
    for count, seeds in found.items():
        gaps = np.array([[shortfall(stage) for stage in stages] for stages in seeds])
        chosen, error, validated = np.moveaxis(gaps, -1, 0)  # each [seeds, stages]
        seed, place = np.unravel_index(chosen.argmax(), chosen.shape)
        tasks, means = [stage["tasks"] for stage in seeds[0]], chosen.mean(axis=0)
        line = [
            f"{chosen.mean():.2f}",
            f"{validated.mean():.2f}",
            f"{means.max():.2f}, {tasks[int(means.argmax())]} tasks",
            f"{validated.mean(axis=0).max():.2f}",
            f"{chosen.max():.2f}, {tasks[place]} tasks",
            f"{error[seed, place]:.2f}",
            f"{validated.max():.2f}",
        ]
        lines.append([str(count), *line])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shortfall(stage: Figures) -> tuple[float, float, float]:
    """Return how far the chosen λ is below the best on test images, that difference's standard
    error, and how far the λ is below that is best on the images held out; in points.
    """
    test = stage["test"]
    chosen = index_chosen(stage, prototypes.SLACK, prototypes.MOST_FITTED)
    gap, differ = max(test) - test[chosen], stage["differ"][chosen]
    error = 100 * np.sqrt((differ / 100 - (gap / 100) ** 2) / stage["images"])
    validated = np.nan  # too few images are left to hold out
    if "validation" in stage:
        validated = max(test) - test[int(np.argmax(stage["validation"]))]
    return gap, error, validated


HALVES = {
    "images a class": None,
    "float32": "float32",
    "float16": "float16",
    "task, float32": "task float32",
    "task, float16": "task float16",
    "λ, log₁₀": "ridge float32",
    "λ by float16, log₁₀": "ridge float16",
    "entries rounded to 0": "lost",
    "2-norm of the rounding, % of the mean diagonal": "rounding",
}


def halves(seed: int, count: int, features: int, train: Split, test: Split) -> Row:
    """Return the figures after the last task, of statistics in single and in half precision."""
    rng = np.random.default_rng(seed)
    num_classes = int(train[1].max()) + 1
    order = rng.permutation(num_classes).reshape(TASKS, -1)
    projection = prototypes.projection(seed, train[0].shape[1], features)
    sums = {name: prototypes.Sums(num_classes, projection) for name in ("float32", "float16")}
    lost, rounding = [], np.zeros(features * (features + 1) // 2)
    for classes in order:
        members = np.concatenate([np.flatnonzero(train[1] == c)[:count] for c in classes])
        found = prototypes.statistics(train[0][members], train[1][members], classes, projection)
        rounded = found | {name: halved(found[name]) for name in ("gram", "sums")}
        sums["float32"].add(classes, found)
        sums["float16"].add(classes, rounded)
        lost.append(percent((rounded["gram"] == 0) & (np.asarray(found["gram"]) != 0)))
        rounding += rounded["gram"] - np.asarray(found["gram"])
    test_features, row = random_features(test[0], projection), {"lost": float(np.mean(lost))}
    error = np.zeros((features, features))
    error[np.triu_indices(features)] = rounding
    largest = 100 * float(np.abs(np.linalg.eigvalsh(error, UPLO="U")).max())
    task_of_class = np.argsort(order.ravel()) // order.shape[1]
    for name, each in sums.items():
        solved = each.decompose()
        row.setdefault("rounding", largest / float(solved.values.mean()))
        ridge = solved.best_ridge()
        scores = test_features @ solved.weights(ridge).astype(np.float32)
        log_p = log_softmax(prototypes.SHARPNESS * scores)
        task = prototypes.task_posterior(log_p, task_of_class).argmax(axis=1)
        row[name] = percent(scores.argmax(axis=1) == test[1])
        row[f"task {name}"] = percent(task == task_of_class[test[1]])
        row[f"ridge {name}"] = float(np.log10(ridge))
    return row


def halved(array: jax.Array) -> np.ndarray:
    """Return float32 numbers as float16 keeps them beside a power of two for the array."""
    array = np.asarray(array)
    scale = np.float32(2.0 ** (15 - np.ceil(np.log2(np.abs(array).max()))))
    return (array * scale).astype(np.float16).astype(np.float32) / scale


def random_features(query: np.ndarray, projection: np.ndarray) -> np.ndarray:
    """Return φ(x) `[N, features]` for q(x) `[N, dim]`."""
    return np.asarray(jax.jit(prototypes.random_features)(query, projection))


def by_ridge(found: prototypes.Decomposition, features: np.ndarray) -> Iterator[np.ndarray]:
    """Return the scores `[N, classes]` by each λ of `RIDGES` in turn."""
    for ridge in prototypes.RIDGES:
        yield features @ found.weights(ridge).astype(np.float32)


def stage(
    found: prototypes.Decomposition,
    features: np.ndarray,
    test: Split,
    order: np.ndarray,
    seen: np.ndarray,
    means: np.ndarray,
) -> Row:
    """Return accuracies, λ and calibration errors after one task.

    `features` `[N, features]` and `test` are of the test images of the classes `seen`, of which
    `means` `[classes, dim]` are the mean q(x); `order` `[tasks, classes]` are all tasks' classes.
    """
    query, truth = test
    scores = np.stack([s[:, seen] for s in by_ridge(found, features)])
    right = seen[scores.argmax(axis=2)] == truth
    accuracy = [percent(r) for r in right]
    ridge = found.best_ridge()
    chosen = prototypes.RIDGES.index(ridge)
    task_of_class = np.argsort(order.ravel()) // order.shape[1]
    nearest = seen[(unit(query) @ unit(means[seen]).T).argmax(axis=1)]
    tasks = np.stack([means[classes].mean(axis=0) for classes in order if classes[0] in seen])
    nearest_task = (unit(query) @ unit(tasks).T).argmax(axis=1)
    log_p = np.full((len(query), order.size), -np.inf)
    log_p[:, seen] = log_softmax(prototypes.SHARPNESS * scores[chosen])
    task = prototypes.task_posterior(log_p, task_of_class).argmax(axis=1)
    calibration = {s: calibration_error(scores[chosen] * s, right[chosen]) for s in SHARPNESSES}
    best = min(calibration, key=calibration.get)
    fixed = prototypes.RIDGES.index(prototypes.RIDGE)
    return {
        "fixed": accuracy[fixed],
        "chosen": accuracy[chosen],
        "hindsight": max(accuracy),
        "log ridge": float(np.log10(ridge)),
        "log hindsight": float(np.log10(prototypes.RIDGES[int(np.argmax(accuracy))])),
        "nearest mean": percent(nearest == truth),
        "task": percent(task == task_of_class[truth]),
        "nearest mean, task": percent(task_of_class[nearest] == task_of_class[truth]),
        "nearest task": percent(nearest_task == task_of_class[truth]),
        "ECE fixed": calibration_error(prototypes.SHARPNESS * scores[fixed], right[fixed]),
        "ECE": calibration_error(prototypes.SHARPNESS * scores[chosen], right[chosen]),
        "ECE hindsight": calibration[best],
        "sharpness hindsight": float(best),
    }


def percent(right: np.ndarray) -> float:
    """Return the share of True, in percent."""
    return 100 * float(np.mean(right))


def unit(rows: np.ndarray) -> np.ndarray:
    """Return rows of length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log p `[N, classes]`."""
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def calibration_error(logits: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error in percent, over `BINS` equal bins (Guo et al., 2017).

    `right` bool `[N]` says whether each image's highest logit is its class's.
    """
    p = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    index = np.minimum((p * BINS).astype(int), BINS - 1)
    gaps = np.bincount(index, p, BINS) - np.bincount(index, right, BINS)
    return 100 * float(np.abs(gaps).sum() / len(p))


def tables(rows: dict[int, list[Row]]) -> str:
    """Return the tables as Markdown; `rows` holds the figures of each seed by images a class."""
    accuracy = {
        "images a class": None,
        "λ fixed": "fixed",
        "λ chosen": "chosen",
        "λ by a held-out fifth": "held out",
        "best λ in hindsight": "hindsight",
        "nearest class mean": "nearest mean",
        "chosen λ, log₁₀": "log ridge",
        "best λ, log₁₀": "log hindsight",
    }
    stages = {
        "images a class": None,
        "λ fixed": "mean fixed",
        "λ chosen": "mean chosen",
        "best λ in hindsight": "mean hindsight",
        "nearest class mean": "mean nearest mean",
        "most below the best, any stage": "worst",
        "task, prototypes": "mean task",
        "task, nearest class mean": "mean nearest mean, task",
        "task, nearest task mean": "mean nearest task",
    }
    calibration = {
        "images a class": None,
        "ECE, λ fixed": "ECE fixed",
        "ECE, λ chosen": "ECE",
        "ECE by the best sharpness in hindsight": "ECE hindsight",
        "that sharpness": "sharpness hindsight",
        "mean over stages: ECE, λ fixed": "mean ECE fixed",
        "mean over stages: ECE, λ chosen": "mean ECE",
        "mean over stages: the best sharpness of each": "mean ECE hindsight",
    }
    return "\n\n".join(
        f"{title}\n\n{table(rows, columns)}"
        for title, columns in (
            ("After the last task:", accuracy),
            ("Mean over the stages:", stages),
            (f"Calibration with a sharpness of {prototypes.SHARPNESS}:", calibration),
        )
    )


def table(rows: dict[int, list[Row]], columns: dict[str, str | None], digits: int = 1) -> str:
    """Return one table; `columns` give the figure under each heading, None the images a class."""
    lines = [list(columns), ["---"] * len(columns)]
    for count, found in rows.items():
        values = [[row[key] for row in found] for key in columns.values() if key]
        spread = [(np.mean(v), np.std(v, ddof=min(len(v) - 1, 1))) for v in values]
        cells = [f"{mean:.{digits}f} ± {deviation:.{digits}f}" for mean, deviation in spread]
        lines.append([str(count), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
