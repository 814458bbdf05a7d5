"""What a run writes about itself, and the pictures as they are drawn."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from soft_jax.evaluation import metrics, pictures, report
from soft_jax.evaluation.report import Report
from soft_jax.store.records import TaskManifest

CONFIG = {"method": "dualprompt+softtf", "seed": 59}
PROTOCOLS = ("per_sample/prompt_id", "batch_vote/prompt_id", "oracle/task_given")


def manifest_of(task, tasks, rng, seconds=1.0, validation=False):
    """The manifest of a task whose images were right at random."""

    def rows():
        given = {"0": 30, str(task): 20} if task else {"0": 50}
        counts = rng.integers(0, 51, (task + 1, 2)).tolist()
        return [
            {"correct": right, "task_correct": named, "total": 50, "identified": given}
            for right, named in counts
        ]

    return TaskManifest(
        task=task,
        classes=(2 * task, 2 * task + 1),
        class_names=("a", "b"),
        num_classes=2 * tasks,
        num_tasks=tasks,
        config={},
        backbone={"name": "tiny", "sha256": "0"},
        metrics={protocol: rows() for protocol in PROTOCOLS},
        validation={protocol: rows() for protocol in PROTOCOLS} if validation else {},
        seconds={"train": seconds, "input_wait": 0.5, "statistics": 0.25, "evaluate": 0.5},
        parameters={"adapter": 3, "fixed": 0, "shared": 2},
        step_flops=None,
        bytes={"adapter": 3, "shared": 2, "memory": 0, "statistics": 1},
        mask_distance_from_one={"blocks_1/attn/qkv/kernel": 0.5},
        weight_drift={"blocks_1/attn/qkv/kernel": 0.25, "blocks_0/attn/qkv/kernel": 0.125},
        mask_density={"blocks_1/attn/qkv/kernel": {"low": 0.0, "high": 1.0, "counts": [1, 3]}},
        versions={},
    )


@pytest.fixture
def manifests(rng):
    return [manifest_of(task, 9, rng) for task in range(9)]


@pytest.fixture
def root(tmp_path):
    """A run's folder in which a task is finished."""
    (tmp_path / "tasks" / "000").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch):
    """They take seconds to draw."""
    monkeypatch.setattr(pictures, "draw", lambda *_: [])


def rows_of(root):
    return [json.loads(line) for line in (root / "results.jsonl").read_text().splitlines()]


def test_result_rows_are_the_figures_of_each_stage(manifests):
    rows = report.result_rows(CONFIG, "digits_9", manifests)
    assert len(rows) == 9 * len(PROTOCOLS)
    for row in rows:
        stage, protocol = row["tasks_trained"], f"{row['protocol']}/{row['task_id']}"
        figures = metrics.figures(manifests[:stage], protocol)
        assert {name: row[name] for name in figures} == figures
        matrix = metrics.accuracy_matrix(manifests, protocol)
        assert row["accuracy_by_task"] == matrix[:stage, stage - 1].tolist()
        assert (row["images"], row["part"], row["seconds"]["train"]) == (50 * stage, "test", 1.0)


def test_validation_has_rows_and_a_table_of_its_own(root, rng):
    manifest = manifest_of(0, 1, rng, validation=True)
    rows = report.result_rows(CONFIG, "digits_1", [manifest])
    assert [row["part"] for row in rows] == ["test"] * 3 + ["validation"] * 3
    for row in rows[3:]:
        protocol = f"{row['protocol']}/{row['task_id']}"
        assert row["accuracy_by_task"] == [2.0 * manifest.validation[protocol][0]["correct"]]
    text = report.markdown(root, CONFIG, "digits_1", [manifest], [])
    _, validation = text.split("## On images held out of training")
    cells = next(row for row in validation.splitlines() if "Prompt ID |" in row).split(" | ")
    assert float(cells[1]) == 2 * manifest.validation["per_sample/prompt_id"][0]["correct"]
    shown = Console(file=io.StringIO(), width=200)
    report.show(shown, "digits_1", [manifest])
    assert shown.file.getvalue().count("CIL per_sample, Prompt ID") == 2
    without = report.markdown(root, CONFIG, "digits_1", [manifest_of(0, 1, rng)], [])
    assert "held out" not in without


@pytest.mark.usefixtures("no_pictures")
def test_a_task_appends_its_rows_and_touches_no_others(root, manifests):
    """Else T tasks would write on the order of T² rows."""
    path = root / "results.jsonl"
    with Report(root, CONFIG, "digits_9", manifests[:2]) as files:
        before, file = path.read_bytes(), path.stat().st_ino
        for task in range(2, 9):
            files.add(manifests[task])
            after = path.read_bytes()
            assert after.startswith(before)
            assert after.count(b"\n") == before.count(b"\n") + len(PROTOCOLS)
            before = after
        assert path.stat().st_ino == file
    assert rows_of(root) == report.result_rows(CONFIG, "digits_9", manifests)


def test_a_tasks_rows_are_made_without_looking_at_the_tasks_before(manifests, monkeypatch):
    looked_at = []
    accuracies = metrics.accuracies

    def look(manifest, *rest, **options):
        looked_at.append(manifest.task)
        return accuracies(manifest, *rest, **options)

    rows = report.ResultRows(CONFIG, "digits_9")
    for manifest in manifests[:-1]:
        rows.add(manifest)
    monkeypatch.setattr(metrics, "accuracies", look)
    rows.add(manifests[-1])
    report.line(manifests[-1])
    assert set(looked_at) == {8}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "left",
    [None, "", "cut in a line", "rows of a later task", "another run's", "no first row"],
)
def test_results_are_mended_when_a_run_goes_on(left, root, manifests):
    """It may have been killed between a task and its rows, or inside a row."""
    path = root / "results.jsonl"
    whole = [json.dumps(r) + "\n" for r in report.result_rows(CONFIG, "digits_9", manifests[:4])]
    contents = {
        "cut in a line": "".join(whole)[:-20],
        "rows of a later task": "".join(whole),
        "another run's": "".join(whole[:9]).replace("59", "60"),
        "no first row": "".join(whole[1:9]),
    }
    if left is not None:
        path.write_text(contents.get(left, left))
    with Report(root, CONFIG, "digits_9", manifests[:3]) as files:
        assert path.read_text() == "".join(whole[:9])
        files.add(manifests[3])
        assert path.read_text() == "".join(whole)


@pytest.mark.usefixtures("no_pictures")
def test_results_that_change_beside_a_run_are_written_anew(root, manifests, tmp_path):
    path, elsewhere = root / "results.jsonl", root / "elsewhere"
    with Report(root, CONFIG, "digits_9") as files:
        assert not path.exists()  # there is nothing to say yet
        files.add(manifests[0])
        path.write_text(path.read_text() + "{}\n")
        files.add(manifests[1])
        assert rows_of(root) == report.result_rows(CONFIG, "digits_9", manifests[:2])
        elsewhere.write_text("mine")
        path.unlink()
        path.symlink_to(elsewhere)
        files.add(manifests[2])
    assert elsewhere.read_text() == "mine"
    assert rows_of(root) == report.result_rows(CONFIG, "digits_9", manifests[:3])


def test_the_report_is_written_at_the_end_and_after_long_tasks(root, rng, monkeypatch):
    written, draw = [], pictures.draw

    def drawn(root, manifests):
        written.append(len(manifests))
        return draw(root, manifests) if len(manifests) == 4 else []

    monkeypatch.setattr(pictures, "draw", drawn)
    slow = report.WRITTEN_AFTER
    seconds = [1.0, slow, 1.0, 1.0]
    with Report(root, CONFIG, "digits_4") as files:
        for task, each in enumerate(seconds):
            files.add(manifest_of(task, 4, rng, each))
    assert written == [2, 4]
    text = (root / "report.md").read_text()
    assert "After 4 of 4 tasks" in text
    for name in ("accuracy_matrix", "task_confusion", "accuracy_and_forgetting", "mask_distance"):
        assert f"![{name}.png]" in text
        assert (root / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(root.glob(".*"))


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_is_stopped_writes_its_report(root, rng):
    with pytest.raises(KeyboardInterrupt), Report(root, CONFIG, "digits_4") as files:
        files.add(manifest_of(0, 4, rng))
        raise KeyboardInterrupt
    assert "After 1 of 4 tasks" in (root / "report.md").read_text()
    # Nor does a report that can't be written hide what ended the run.
    with pytest.raises(KeyError), Report(root, CONFIG, "digits_4") as files:
        files.add(manifest_of(0, 4, rng))
        (root / "tasks" / "000").rmdir()
        (root / "tasks").rmdir()
        raise KeyError
    with pytest.raises(FileNotFoundError), Report(root, CONFIG, "digits_4") as files:
        files.add(manifest_of(0, 4, rng))


def test_a_run_without_a_finished_task_writes_nothing(root):
    with Report(root, CONFIG, "digits_4"):
        pass
    assert [path.name for path in root.iterdir()] == ["tasks"]


def test_weights_are_listed_by_layer(root, manifests):
    text = report.markdown(root, CONFIG, "digits_9", manifests, [])
    rows = [row for row in text.splitlines() if row.startswith("| blocks")]
    assert rows == [
        "| blocks_0/attn/qkv/kernel | 0.1250 | 0.1250 |",
        "| blocks_1/attn/qkv/kernel | 0.2500 | 0.2500 |",
    ]


@pytest.mark.parametrize(
    ("path", "layer", "weight"),
    [
        ("blocks_9/attn/qkv/kernel", 9, "attn/qkv"),
        ("visual/blocks_11/mlp/fc1/kernel", 11, "visual/mlp/fc1"),
        ("layers/3/attn/kernel", 3, "layers/attn"),
        ("embed/kernel", None, "embed"),
        ("pos_embed", None, ""),
    ],
)
def test_layer_and_weight_are_read_from_a_path(path, layer, weight):
    assert (pictures.layer_of(path), pictures.weight_of(path)) == (layer, weight)


def test_a_link_in_a_pictures_place_is_replaced(root, rng):
    elsewhere = root / "elsewhere"
    elsewhere.write_text("mine")
    (root / "accuracy_matrix.png").symlink_to(elsewhere)
    (root / ".accuracy_matrix.png.partial").symlink_to(elsewhere)
    pictures.draw(root, [manifest_of(0, 1, rng)])
    assert elsewhere.read_text() == "mine"
    assert not (root / "accuracy_matrix.png").is_symlink()


def test_densities_are_those_of_the_mask_entries(rng):
    """The paper's Figures 6 and 7: a panel a weight, a curve a layer in order, each of area 1."""
    entries = {
        f"blocks_{layer}/{name}/kernel": rng.normal(1, 0.01 + layer / 100, 5000)
        for layer in (10, 9)
        for name in ("attn/qkv", "attn/proj")
    }
    counted = {path: np.histogram(values, bins=60) for path, values in entries.items()}
    figure = pictures.mask_densities(
        {
            path: {"low": e[0], "high": e[-1], "counts": counts.tolist()}
            for path, (counts, e) in counted.items()
        }
    )
    assert [axes.get_title() for axes in figure.axes] == ["attn/proj", "attn/qkv"]
    for axes in figure.axes:
        assert [curve.get_label() for curve in axes.patches] == ["L10", "L11"]
        for layer, curve in zip((9, 10), axes.patches, strict=True):
            density, edges, _ = curve.get_data()
            np.testing.assert_allclose(np.sum(density * np.diff(edges)), 1)
            expected, _ = np.histogram(
                entries[f"blocks_{layer}/{axes.get_title()}/kernel"], bins=60, density=True
            )
            np.testing.assert_allclose(density, expected)
