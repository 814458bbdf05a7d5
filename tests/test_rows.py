"""Rows of the tables that differ in shots, seconds or the backbone, and CLIP's."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest

from soft_jax import config as config_lib
from soft_jax.config import Config
from soft_jax.errors import UserError
from soft_jax.evaluation.published import has_figures, published, published_rows, row_name
from soft_jax.experiment import planned
from soft_jax.experiment import settings as settings_lib
from soft_jax.inference import rules
from soft_jax.methods import registry
from soft_jax.models import backbones
from soft_jax.paper import lines as lines_lib
from soft_jax.paper import printing
from soft_jax.paper import rows as rows_lib

CONFIG = Path(__file__).parent.parent / "configs/clip_cil.py"
SMALL = {"backbone": "clip_ti8_32", "backbone_path": "small", "text_mask_layers": (1, 2, 3)}


def row_of(table, name, benchmark="c100_10"):
    return next(row for row in rows_lib.rows_of(table, benchmark) if row.name == name)


def config_of(table, name, overrides=None):
    return rows_lib.config_of(row_of(table, name), "c100_10", overrides or {}, 0)


def accuracies(row):
    return {key: figures.get("accuracy") for key, figures in row.published.items()}


def figures_of(row):
    """Every accuracy and forgetting of a published row, by the key that has them."""
    return {key: value for key, value in row.items() if key.startswith(("c100", "imr", "cub", "t"))}


def test_published_figures_are_percentages_and_seconds():
    for row in published_rows():
        found = [v for v in figures_of(row).values() if isinstance(v, dict) and "accuracy" in v]
        for figures in found:
            assert set(figures) == {"accuracy", "forgetting"}
            assert 0 < figures["accuracy"] < 100
            assert figures["forgetting"] is None or 0 <= figures["forgetting"] < 100
        if "train_seconds" in row:
            assert row["train_seconds"].keys() == row["test_seconds"].keys()
            assert all(row["test_seconds"][k] < v for k, v in row["train_seconds"].items())
        assert found or "train_seconds" in row


# Where the paper contradicts itself.
CONTRADICTIONS = {
    ("DualPrompt-Soft-TF-L[10,11,12] q,k,v,proj", "imr_10"): {(76.62, 5.3), (74.62, 5.3)},
}


def test_a_row_of_several_tables_has_the_same_figures_in_all():
    """Under each protocol: Table 7's Gradient ID of q,k,v,proj is Table 9's of the whole batch."""
    found = {}
    for row in published_rows():
        for benchmark in rows_lib.BENCHMARKS:
            if "accuracy" in row.get(benchmark, {}):
                key = (row_name(row), benchmark, rows_lib.protocol_of(row))
                found.setdefault(key, set()).add(tuple(row[benchmark].values()))
    differ = {(name, on): values for (name, on, _), values in found.items() if len(values) > 1}
    assert differ == CONTRADICTIONS


def test_a_row_of_several_tables_stands_in_a_report_once():
    rows = [row for row in published("c100_10") if row["method"] == "DualPrompt-PGP"]
    assert [row["table"] for row in rows] == ["1, 9, 11", "2"]  # Table 2's says its pre-training
    assert "1, 9, 11" not in {row["table"] for row in published_rows()}
    keys = [(row_name(row), row["table"], row["task_id"]) for row in published("imr_10")]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("benchmark", ["c100_10", "c100_20", "imr_10"])
def test_tables_8_and_9_are_of_the_same_runs_one_in_seconds(benchmark):
    """What they vary is how many images Gradient ID looks at."""
    seconds, figures = rows_lib.rows_of("8", benchmark), rows_lib.rows_of("9", benchmark)
    assert [(row.name, row.settings) for row in seconds] == [
        (row.name, row.settings) for row in figures
    ]
    assert [row.name.rpartition("-L")[2] for row in figures[2:]] == [
        "[12] q,k,v,proj",
        "[10,11,12] q,k,v,proj",
    ]
    for one, other in zip(seconds, figures, strict=True):
        assert one.published.keys() == other.published.keys()
        if "Soft-TF" in one.name:
            assert one.shots == other.shots == one.settings["shots"] == (3, 5, 7, 0)
            assert len(one.published) == 5


def test_table_8_has_the_published_seconds():
    published = row_of("8", "DualPrompt-Soft-TF-L[12] q,k,v,proj", "imr_10").published
    assert (
        printing.published_cell(published["batch_vote/gradient_id_5"])
        == "training 13420 s, test 61 s on a Quadro RTX 8000"
    )


def test_q_k_and_v_alone_are_masked_where_a_name_goes_on_behind_them():
    """WSN's row of Table 11 ends in its density."""
    wsn = config_of("11", "DualPrompt-WSN-L[12] q,k,v c=90%")
    assert (wsn.method, wsn.target_modules, wsn.mask_layers, wsn.density) == (
        "dualprompt+wsn",
        "qkv",
        (12,),
        0.9,
    )
    assert config_of("11", "DualPrompt-Soft-TF-L[12] q,k,v").target_modules == "qkv"
    assert config_of("9", "DualPrompt-Soft-TF-L[12] q,k,v,proj").target_modules == "qkv+proj"


def test_a_table_shows_the_shots_that_it_publishes():
    def shots(table, layers):
        return row_of(table, f"DualPrompt-Soft-TF-L[{layers}] q,k,v,proj").shots

    assert shots("6", "11,12") == (0,)  # the whole batch
    assert shots("7", "11,12") == (0,)
    assert row_of("7", "DualPrompt-Soft-TF-L[12] q,k,v").shots == (7,)
    assert row_of("1", "DualPrompt-Soft-TF-L[10,11,12]").shots == (7,)
    assert row_of("5", "DualPrompt-Soft-TF-L[10,11,12] q,k,v,proj, masks drawn xavier").shots == ()


@pytest.mark.parametrize("table", ["3", "6", "8", "9", "11"])
def test_a_table_is_of_its_first_benchmark(table):
    assert rows_lib.default_benchmark(table) == "c100_10"
    assert rows_lib.default_benchmark("10") == "tiny_10"
    there = {b for row in published_rows() for b in rows_lib.BENCHMARKS if has_figures(row, b)}
    assert there == set(rows_lib.BENCHMARKS)


# CLIP.


def test_table_3_names_the_hosts_and_the_published_protocols():
    rows = rows_lib.rows_of("3", "c100_10")
    assert [(row.name, row.settings["method"]) for row in rows] == [
        ("CLIP", "clip"),
        ("CLIP-PGP", "clip+pgp"),
        ("CLIP-Prompt", "clipprompt"),
        ("CLIP-Prompt-Soft-TF-L[3,4,5]", "clipprompt+softtf"),
        ("CLIP-Prompt-Soft-TF-L[1-12]", "clipprompt+softtf"),
    ]
    assert [accuracies(row) for row in rows[1:]] == [
        {"batch_vote/cut_off": 79.47, "oracle/task_given": 93.0},
        {"batch_vote/prompt_id": 70.27, "oracle/task_given": 93.36},
        {
            "batch_vote/prompt_id": 71.58,
            "oracle/task_given": 95.29,
            "batch_vote/gradient_id_7": 76.77,
        },
        {
            "batch_vote/prompt_id": 72.28,
            "oracle/task_given": 96.83,
            "batch_vote/gradient_id_7": 85.9,
        },
    ]


@pytest.mark.parametrize("table", ["3", "clip"])
def test_every_row_of_clip_can_be_made(table):
    """And reports what is published under its protocol."""
    for row in rows_lib.rows_of(table, "c100_10"):
        config = rows_lib.config_of(row, "c100_10", {}, 0)
        architecture = backbones.BACKBONES[config.backbone].architecture
        method = registry.make_method(config, architecture, ("apple", "aquarium fish") * 50)
        keys = {rule.key for rule in rules.rules_of(method, config)}
        assert {*row.published, "per_sample/zero_shot"} <= keys
        of_tasks = row.name not in ("CLIP", "CLIP-PGP")
        assert ("per_sample/k_means" in keys) == of_tasks
        assert ("batch_vote/cut_off" in keys) == (not of_tasks)


def test_what_the_authors_reproduced_stands_beside_what_they_cite():
    clip = row_of("3", "CLIP").published
    assert printing.published_cell(clip["batch_vote/cut_off"]) == (
        "73.76 / 5.60 (reproduced 74.60 / 7.75)"
    )
    assert printing.published_cell(clip["oracle/task_given"]) == (
        "92.69 / 2.34 (reproduced 93.59 / 2.80)"
    )


@pytest.mark.parametrize("name", [row.name for row in rows_lib.rows_of("3", "c100_10")])
def test_the_settings_of_table_3(name):
    config = config_of("3", name)
    assert (config.backbone, config.epochs, config.batch_size, config.seed) == (
        *("clip_vit_b16", 5, 32, 59),
    )
    assert (config.optimizer, config.schedule, config.learning_rate) == (
        *("adam", "constant", rows_lib.CLIP_LEARNING_RATE),
    )
    assert (config.image_prompt_length, config.text_context) == (5, "class")
    assert config.normalization == "cifar100"
    layers = {"CLIP-Prompt-Soft-TF-L[3,4,5]": (3, 4, 5)} | {
        "CLIP-Prompt-Soft-TF-L[1-12]": tuple(range(1, 13))
    }
    assert config.mask_layers == layers.get(name, Config.mask_layers)
    assert (config.mask_towers, config.target_modules) == ("vision", "qkv+proj")


@pytest.mark.parametrize("table", ["3", "clip"])
def test_rows_of_clip_take_any_clip(table):
    for row in rows_lib.rows_of(table, "c100_10"):
        config = rows_lib.config_of(row, "c100_10", SMALL | {"learning_rate": 0.1}, 0)
        assert (config.backbone, config.backbone_path) == ("clip_ti8_32", "small")
        assert config.learning_rate == 0.1
        in_text = "text" in config.mask_towers
        assert config.text_mask_layers == ((1, 2, 3) if in_text else Config.text_mask_layers)
        assert config.method == row.settings["method"]
    sam = row_of("2", "DualPrompt, pre-trained by SAM")
    with pytest.raises(UserError, match="is about vit_b16_sam"):
        rows_lib.config_of(sam, "c100_10", SMALL, 0)


def test_the_table_of_clip_is_at_equal_settings():
    rows = rows_lib.rows_of("clip", "imr_10")
    configs = {row.name: rows_lib.config_of(row, "imr_10", {}, 0) for row in rows}
    assert {
        (c.backbone, c.epochs, c.batch_size, c.learning_rate, c.normalization)
        for c in configs.values()
    } == {("clip_vit_b16", 5, 32, rows_lib.CLIP_LEARNING_RATE, "backbone")}
    assert [name for name, c in configs.items() if c.tasks == 1] == [
        *("Upper bound of CLIP-Prompt", "Upper bound of CLIP-Prompt-Soft-TF-L[10,11,12]"),
    ]
    assert {c.mask_layers for c in configs.values()} == {(10, 11, 12)}
    assert [c.mask_towers for name, c in configs.items() if "text tower" in name] == [
        *("text", "vision+text"),
    ]
    assert configs["S-liPrompts"].text_context == "task"
    assert len({planned.folder_of(c) for c in configs.values()}) == len(rows) == 14


def test_masks_of_clip_are_compared_with_their_host():
    names = {
        "CLIP-Soft-TF-L[10,11,12]": "CLIP",
        "CLIP-Prompt-Soft-TF-L[1-12]": "CLIP-Prompt",
        "CLIP-Prompt-Soft-TF in the text tower": "CLIP-Prompt",
        "CLIP-Prompt-Soft-TF-L[10,11,12] and in the text tower": "CLIP-Prompt",
    }
    found = {(name, "oracle/task_given"): [50.0 + len(name)] for name in {*names, *names.values()}}
    text = printing._comparisons(found)
    assert len(text) == len(names)
    for name, host in names.items():
        added = len(name) - len(host)
        assert f"- {name} beside {host}: oracle/task_given +{added:.2f} points." in text


def line(name, accuracy, protocol, joint=False):
    figures = {"final_average": (accuracy, 0.0), "forgetting": (1.0, 0.0)}
    figures |= {"task_id_accuracy": (0.0, 0.0)}
    costs = ("own", "shared", "own_bytes", "shared_bytes", "memory_bytes", "statistics_bytes")
    cost = dict.fromkeys((*costs, "train", "statistics", "evaluate"), 1) | {"gflops": None}
    return lines_lib.Line(1, name, protocol, figures, None, cost, joint, [accuracy], "clip_vit_b16")


def test_rows_of_clip_are_compared_with_zero_shot_and_with_frozen_features():
    references = [
        line("", accuracy, protocol)
        for protocol, accuracy in {
            "per_sample/frozen_features": 74.0,
            "per_sample/zero_shot": 66.0,
            "oracle/zero_shot": 90.0,
        }.items()
    ]
    lines = [
        line("CLIP", 70.0, "per_sample/no_task_id"),
        line("CLIP", 95.0, "oracle/task_given"),
    ]
    text = printing.markdown("T", "make it", [], lines, "so", references=references)
    told = [part for part in text.splitlines() if part.startswith("- Beside")]
    assert told == [
        "- Beside the frozen features of clip_vit_b16, with each image by itself, by each row's "
        "best rule: CLIP -4.00 points.",
        "- Beside the zero-shot answers of clip_vit_b16, with each image by itself, by each row's "
        "best rule: CLIP +4.00 points.",
        "- Beside the zero-shot answers of clip_vit_b16, with the task given, by each row's best "
        "rule: CLIP +5.00 points.",
    ]
    assert "names. They are the same for every row, and what a row has above them" in text
    one = printing.markdown("T", "make it", [], lines, "so", references=references[:1])
    assert "closed form. They are the same for every row" in one


def test_a_rule_of_ones_own_can_be_a_reference(monkeypatch):
    class Constant(rules.NoTaskId):
        name = "constant"
        title = "CIL per_sample, constant"
        needs_network = False

    monkeypatch.setitem(rules.RULES, "constant", Constant)
    reference = line("", 10.0, "per_sample/constant")
    text = "\n".join(printing.reading([line("CLIP", 70.0, "per_sample/no_task_id")], [reference]))
    assert "- Beside the answers under 'CIL per_sample, constant' of clip_vit_b16" in text


def test_joint_training_of_clip_bounds_any_table_on_it(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(planned, "finished", lambda run: asked.append(run.config))
    lines_lib.joint_lines("c100_10", {"epochs": 2}, 1, tmp_path, ["clip_ti8_32"])
    found = {config.method for config in asked if config.epochs == 2 and config.tasks == 1}
    assert {"clipprompt", "clipprompt+softtf"} <= found
    assert {config.backbone for config in asked} == {"clip_ti8_32"}


def test_centres_are_bounded_as_what_has_no_prototypes():
    """They name a task, and a network answers."""
    plain = line("all", 60.0, "per_sample/prompt_id", joint=True)
    prototypes = line("all", 80.0, "per_sample/prototype", joint=True)
    bounds = [
        lines_lib.bound(line("one", 70.0, f"per_sample/{name}"), [plain, prototypes])
        for name in ("k_means", "prompt_id", "prototype")
    ]
    assert bounds == [60.0, 60.0, 80.0]


def get_config(argument=None):
    module = runpy.run_path(str(CONFIG))
    config = config_lib.from_config_dict(module["get_config"](argument))
    settings_lib.check(config)
    return config


def test_the_config_of_clip_is_the_best_row_of_table_3():
    best = max(
        rows_lib.rows_of("3", "c100_10"),
        key=lambda row: max(
            f.get("accuracy", 0) for p, f in row.published.items() if "oracle" not in p
        ),
    )
    row = rows_lib.config_of(best, "c100_10", {}, 0)
    assert dataclasses.replace(get_config(), name=row.name) == row
    assert get_config("tasks=20").seed == 42
    published = {figures["accuracy"] for figures in best.published.values()}
    assert published == {float(text) for text in re.findall(r"(\d\d\.\d\d)%", CONFIG.read_text())}


EXAMPLES = re.findall(r"^  clip_cil\.py:(\S+)$", CONFIG.read_text(), re.MULTILINE)


@pytest.mark.parametrize("argument", EXAMPLES)
def test_the_variants_of_the_config_of_clip_have_an_effect(argument):
    assert len(EXAMPLES) == 5
    config, given = get_config(argument), config_lib.parse_argument(argument)
    assert {name: getattr(config, name) for name in given} == given
    assert planned.folder_of(config) != planned.folder_of(get_config())


def test_the_variants_of_the_config_of_clip_are_the_published_rows():
    for name, argument in {
        "CLIP-Prompt-Soft-TF-L[3,4,5]": "mask_layers=3-5",
        "CLIP-Prompt": "method=clipprompt",
        "CLIP-PGP": "method=clip+pgp",
        "CLIP": "method=clip",
    }.items():
        row = config_of("3", name)
        assert dataclasses.replace(get_config(argument), name=row.name) == row
