"""What a run writes about itself, and the pictures as they are drawn."""

import dataclasses
import io
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from soft_jax.config import Config
from soft_jax.evaluation import calibration, metrics, pictures, predictions, report
from soft_jax.evaluation.report import Report
from soft_jax.experiment import seeds
from soft_jax.inference import rules
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
        class_names=(f"class {2 * task}", f"class {2 * task + 1}"),
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
    report.StageTable(PROTOCOLS, 80).line(manifests[-1])
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
    rows = [row for row in text.splitlines() if row.startswith("| L")]
    assert rows == [
        "| L1 attn/qkv | 0.1250 | 0.1250 |",
        "| L2 attn/qkv | 0.2500 | 0.2500 |",
    ]


@pytest.mark.parametrize(
    ("path", "layer", "weight", "label"),
    [
        ("blocks_9/attn/qkv/kernel", 9, "attn/qkv", "L10 attn/qkv"),
        ("blocks_9/attn/qkv/bias", 9, "attn/qkv", "L10 attn/qkv/bias"),
        ("visual/blocks_11/mlp/fc1/kernel", 11, "visual/mlp/fc1", "L12 visual/mlp/fc1"),
        ("layers/3/attn/kernel", 3, "layers/attn", "L4 layers/attn"),
        ("embed/kernel", None, "embed", "embed"),
        ("pos_embed", None, "", "pos_embed"),
    ],
)
def test_layer_and_weight_are_read_from_a_path(path, layer, weight, label):
    assert (pictures.layer_of(path), pictures.weight_of(path)) == (layer, weight)
    assert pictures.label_of(path) == label  # for people, from 1


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


ALL = (
    "per_sample/prompt_id",
    "per_sample/gradient_id",
    "per_sample/prototype",
    "per_sample/frozen_features",
    "batch_vote/prompt_id",
    "batch_vote/gradient_id_7",
    "oracle/task_given",
    "oracle/frozen_features",
)


def with_accuracies(manifest, found, validation=None):
    """The manifest with `found` percent of a task's 1000 test images right, by protocol."""

    def rows(percents):
        return {
            key: [
                {"correct": 10 * right, "task_correct": 0, "total": 1000, "identified": {}}
                for _ in range(manifest.task + 1)
            ]
            for key, right in percents.items()
        }

    return dataclasses.replace(manifest, metrics=rows(found), validation=rows(validation or {}))


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_on_screen_has_a_line_a_task_within_the_screen(width, rng):
    table = report.StageTable(ALL, width)
    manifest = with_accuracies(
        manifest_of(11, 12, rng, seconds=12.3), dict(zip(ALL, range(90, 98), strict=True))
    )
    headings = table.heading.splitlines()[-1]
    assert max(map(len, table.heading.splitlines())) <= width
    line = table.line(manifest)
    assert len(line) <= width
    assert line.split()[0] == "12"  # from 1, for people
    assert "class" in line
    shown = [f"{90 + place}.0" for place in range(8)]
    if width == 80:  # without the published protocols by batch
        shown = shown[:4] + shown[6:]
    assert line.split()[-len(shown) - 1 :] == [*shown, "13.1"]  # seconds: all of the task's
    assert headings.split()[:2] == ["task", "classes"]
    # Headings stand above their columns: right ends are the same.
    assert headings.index("seconds") + len("seconds") == len(line)
    assert ("batch_vote" in table.heading) == (width == 120)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("cat", "dog"), "cat, dog"),
        (("cat", "elephant"), "cat +1"),
        (("hippopotamus", *"abcdefghi"), "hipp… +9"),
        (("hippopotamus",), "hippopo…"),
    ],
)
def test_names_of_classes_are_cut_to_the_room_there_is(names, shown, rng):
    """A number of classes alone could be taken for a class's name."""
    manifest = dataclasses.replace(manifest_of(0, 1, rng), class_names=names)
    line = report.StageTable(ALL, 60).line(manifest)  # the least room
    assert line.startswith(f"   1  {shown:<8}  ")


@pytest.mark.parametrize(
    ("given", "without", "validation", "says"),
    [
        (
            (93.7, 82.1),
            (87.6, 87.9),
            None,
            "Given the task, what was trained adds 11.6 points to the frozen features (93.7 "
            "against 82.1); without it, takes 0.3 points off them (87.6 by Gradient ID, the best "
            "of its rules, against 87.9).",
        ),
        (
            (90, 90),
            (50, 40),
            {"per_sample/prompt_id": 60, "per_sample/gradient_id": 50},
            "Given the task, what was trained adds nothing to the frozen features (90.0 against "
            "90.0); without it, takes 20.0 points off them (20.0 by Prompt ID, the best of its "
            "rules, against 40.0).",
        ),
    ],
)
def test_a_sentence_says_what_training_added_also_where_it_is_nothing(
    given, without, validation, says, root, rng
):
    """Where images are held out, they choose the rule, not the test images."""
    found = {
        "per_sample/prompt_id": 20,
        "per_sample/gradient_id": without[0],
        "per_sample/frozen_features": without[1],
        "oracle/task_given": given[0],
        "oracle/frozen_features": given[1],
    }
    if validation:
        validation |= {"per_sample/frozen_features": 99}
    manifest = with_accuracies(manifest_of(0, 1, rng), found, validation)
    assert report.gain([manifest]) == says
    assert says in report.markdown(root, CONFIG, "digits_1", [manifest], [])
    shown = Console(file=io.StringIO(), width=300)
    report.show(shown, "digits_1", [manifest])
    assert says in shown.file.getvalue()


def test_of_several_seeds_it_says_how_far_apart_they_are(rng):
    def of_seed(given, without):
        found = {
            "per_sample/prompt_id": without,
            "per_sample/frozen_features": 50,
            "oracle/task_given": given,
            "oracle/frozen_features": 80,
        }
        return [with_accuracies(manifest_of(0, 1, rng), found)]

    runs = {59: of_seed(90, 49), 60: of_seed(94, 51)}
    found = seeds.summary(Config(), runs)
    assert seeds.markdown(Config(), found, "soft-jax train").endswith(
        "\n\nGiven the task, what was trained adds 12.0 ± 2.8 points to the frozen features (92.0 "
        "against 80.0); without it, adds 0.0 ± 1.4 points to them (50.0 by Prompt ID, the best of "
        "its rules, against 50.0).\n"
    )
    alone = seeds.markdown(Config(), seeds.summary(Config(), {59: runs[59]}), "soft-jax train")
    assert report.gain(runs[59]) in alone


def test_a_run_without_frozen_features_says_nothing_of_them(manifests):
    assert report.gain(manifests) == ""


def test_the_final_table_fits_a_narrow_screen(rng):
    manifest = with_accuracies(manifest_of(0, 1, rng), dict.fromkeys(ALL, 99))
    shown = Console(file=io.StringIO(), width=80)
    report.show(shown, "digits_1", [manifest])
    lines = shown.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for key in ALL:  # a line each
        assert sum(line.startswith(f"{rules.title(key)} ") for line in lines) == 1


def test_a_protocol_has_one_name_wherever_people_read(root, manifests):
    text = report.markdown(root, CONFIG, "digits_9", manifests, [])
    for key in PROTOCOLS:
        assert key not in text
        assert report.escaped(rules.title(key)) in text
    figures = (
        pictures.accuracy_matrices(manifests, PROTOCOLS),
        pictures.task_confusions(manifests, PROTOCOLS),
    )
    for figure in figures:
        titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
        assert titles == [rules.title(key) for key in PROTOCOLS]
    (legend,) = pictures.curves(manifests, PROTOCOLS).legends
    assert {text.get_text() for text in legend.get_texts()} == set(map(rules.title, PROTOCOLS))


def calibrated(manifest):
    """With ten answers of probability 0.95, of which 6 are right, and ten of 0.5, 5 right."""
    counts = calibration.count(
        np.array([0.95] * 10 + [0.5] * 10), np.array([True] * 6 + [False] * 4 + [True, False] * 5)
    )
    return dataclasses.replace(manifest, calibration={"per_sample/prompt_id": counts})


def test_probabilities_are_held_against_what_was_right(root, rng):
    manifest = calibrated(manifest_of(0, 1, rng))
    text = report.markdown(root, CONFIG, "digits_1", [manifest], [])
    _, section = text.split("## Probabilities")
    # (10 · |0.6 − 0.95| + 10 · |0.5 − 0.5|) / 20
    assert "| CIL per_sample, Prompt ID | 72.50 | 55.00 | 17.50 | 1 |" in section
    assert "No images were held out" in section
    fitted = dataclasses.replace(manifest, temperature={"per_sample/prompt_id": 2.5})
    text = report.markdown(root, CONFIG, "digits_1", [fitted], [])
    assert "| 17.50 | 2.5 |" in text
    assert "No images were held out" not in text
    without = report.markdown(root, CONFIG, "digits_1", [manifest_of(0, 1, rng)], [])
    assert "Probabilities" not in without
    (axes,) = pictures.reliability(manifest.calibration).axes
    assert axes.get_title() == "CIL per_sample, Prompt ID"
    _, found = axes.get_lines()  # the diagonal comes first
    np.testing.assert_allclose(found.get_xydata(), [[50, 50], [95, 60]])
    assert [text.get_text() for text in axes.texts] == ["ECE 17.5"]


def test_classes_are_held_against_the_classes_they_are_taken_for():
    truth = ["cat", "cat", "cat", "cat", "dog", "dog"]
    given = ["cat", "dog", "dog", "dog", "dog", "owl"]
    figure = pictures.class_confusion(truth, {"a rule": given}, ["cat", "dog", "owl"])
    axes = figure.axes[0]
    (image,) = axes.get_images()
    np.testing.assert_allclose(image.get_array(), [[25, 75, 0], [0, 50, 50], [0, 0, 0]])
    assert [text.get_text() for text in axes.texts][:3] == ["25", "75", "0"]  # row by row
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "dog", "owl"]


def test_every_picture_is_drawn_of_a_run_that_has_all(root, rng):
    """Answers that are not those of the finished tasks are left out."""
    manifests = [manifest_of(task, 2, rng) for task in range(2)]
    manifests[-1] = calibrated(manifests[-1])
    names = tuple(name for manifest in manifests for name in manifest.class_names)
    answers = predictions.Predictions(
        index=np.arange(4),
        files=("",) * 4,
        tasks=np.array([0, 0, 1, 1]),
        truth=names,
        answers=dict.fromkeys(PROTOCOLS, names),
        probabilities=dict.fromkeys(PROTOCOLS, np.full(4, 0.5)),
    )
    predictions.write(root, answers, PROTOCOLS[0])
    drawn = pictures.draw(root, manifests)
    assert set(drawn) == {path.name for path in root.glob("*.png")}
    assert {"class_confusion.png", "reliability.png", "mask_density.png"} < set(drawn)
    assert pictures._class_confusions(root, manifests[:1]) is None


def test_labels_at_the_ends_of_curves_do_not_overlap_or_leave_the_picture(manifests):
    same = [with_accuracies(m, dict.fromkeys(ALL, 30)) for m in manifests]
    axes, _ = pictures.curves(same, ALL).axes
    heights = sorted(text.xy[1] for text in axes.texts)
    low, high = axes.get_ylim()
    assert min(np.diff(heights)) > 0.05 * (high - low)
    assert heights[0] >= low


def test_a_class_name_that_the_font_lacks_costs_no_warning(tmp_path):
    figure = Figure()
    figure.text(0, 0, "日本")
    pictures.save(figure, tmp_path / "drawn.png")  # warnings are errors here
    assert (tmp_path / "drawn.png").stat().st_size
