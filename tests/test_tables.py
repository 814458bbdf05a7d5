"""The paper's rows as settings, and the tables that come of runs."""

import dataclasses
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import soft_jax
from soft_jax import __main__ as command_line
from soft_jax import config as config_lib
from soft_jax.config import DEFAULTS, Config, parse_argument
from soft_jax.errors import UserError
from soft_jax.evaluation import pictures, report
from soft_jax.evaluation.published import published_rows
from soft_jax.experiment import loop, planned
from soft_jax.experiment import settings as settings_lib
from soft_jax.hooks import Hooks
from soft_jax.inference import rules
from soft_jax.methods import registry
from soft_jax.models import backbones
from soft_jax.paper import lines as lines_lib
from soft_jax.paper import printing, runs
from soft_jax.paper import rows as rows_lib
from soft_jax.store.folder import Reader
from soft_jax.store.records import TaskManifest
from tests.conftest import LAYERS

pytestmark = pytest.mark.usefixtures("fast_compile")

ROOT = Path(__file__).parent.parent
ALL = ("e_prompt_layers", "mask_layers")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("FT", {"method": "ft", "learning_rate": 0.003}),
        (
            "L2P-PGP",
            {"method": "l2p+pgp", "batch_size": 16, "epochs": 5, "e_prompt_layers": (3, 4, 5)},
        ),
        (
            "DualPrompt-PGP-Soft-TF-L[3,4,5]",
            {
                "method": "dualprompt+pgp+softtf",
                "target_modules": "qkv+proj",
                **dict.fromkeys(ALL, (3, 4, 5)),
            },
        ),
        (
            "DualPrompt-Soft-TF-L[12] q,k,v",
            {
                "method": "dualprompt+softtf",
                "mask_layers": (12,),
                "target_modules": "qkv",
                "e_prompt_layers": (10, 11, 12),
            },
        ),
        (
            "DualPrompt-WSN-L[10,11,12] c=83%",
            {
                "method": "dualprompt+wsn",
                "density": 0.83,
                "target_modules": "qkv+proj",
                **dict.fromkeys(ALL, (10, 11, 12)),
            },
        ),
        (
            "DualPrompt-LoRA-L[10,11,12] r=24",
            {
                "method": "dualprompt+lora",
                "rank": 24,
                "target_modules": "qv+proj",
                **dict.fromkeys(ALL, (10, 11, 12)),
            },
        ),
        (
            "DualPrompt-Adapter-L[10,11,12] r=75",
            {
                "method": "dualprompt+adapter",
                "rank": 75,
                "e_prompt_layers": (10, 11, 12),
                "mask_layers": tuple(range(1, 13)),
            },
        ),
        (
            "Upper bound of DualPrompt",
            {"method": "dualprompt", "tasks": 1, "e_prompt_layers": (3, 4, 5)},
        ),
    ],
)
def test_a_rows_name_is_its_settings(name, settings):
    assert rows_lib.row_settings({"method": name, "task_id": None}) == settings


def test_a_rows_other_columns_set_things_too():
    row = {
        "method": "DualPrompt-Soft-TF",
        "pretraining": "DINO",
        "task_id": "gradient, 3-shot",
        "mask_init": "xavier",
    }
    assert {("backbone", "vit_b16_dino"), ("shots", (3,)), ("mask_init", "xavier")} <= set(
        rows_lib.row_settings(row).items()
    )
    assert rows_lib.row_settings(row | {"task_id": "gradient, batch"})["shots"] == (0,)
    exemplars = rows_lib.row_settings({"method": "iCaRL", "exemplars": 5000, "task_id": None})
    assert (exemplars["method"], exemplars["buffer_size"]) == ("icarl", 5000)
    assert rows_lib.row_settings({"method": "DER+MCG", "exemplars": 2000, "task_id": None}) is None


def method_of(config):
    architecture = backbones.BACKBONES[config.backbone].architecture
    return registry.make_method(config, architecture, ("",) * 100)


def test_every_published_row_can_be_made():
    """A method for each but CLIP's and DER+MCG, on every benchmark that has a figure, with its
    published figure beside it.
    """
    seen = 0
    for number in ("1", "2", "4", "5", "6", "7", "8", "9", "10", "11"):
        for benchmark in rows_lib.BENCHMARKS:
            try:
                rows = rows_lib.rows_of(number, benchmark)
            except UserError:
                continue
            assert len({row.name for row in rows}) == len(rows)
            for row in rows:
                assert row.published
                if row.settings is None:
                    continue
                config = rows_lib.config_of(row, benchmark, {}, seed=1)
                assert config.seed == rows_lib.BENCHMARKS[benchmark]["seed"] + 1
                method = method_of(config)
                keys = {rule.key for rule in rules.rules_of(method, config)}
                assert set(row.published) <= {*keys, "per_sample"}
                seen += 1
    assert seen > 60
    for row in published_rows():
        assert row["method"] == "DER+MCG" or rows_lib.row_settings(row)


EXAMPLES = re.findall(
    r"^  table\.py:(\S+)\n +(.*)", (ROOT / "configs/table.py").read_text(), re.MULTILINE
)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("table=7,row=²", "row='²' is not one row's number, 1 to 10"),
        (f"table=7,row={'9' * 5000}", f"row='{'9' * 80}' is not one row's number"),
        ("table=7,row=5,row=6", "row is given twice"),
        ("table=7,row=5,benchmark=c100_10,benchmark=c100_20", "benchmark is given twice"),
        ("row=5", "table is missing"),
    ],
)
def test_a_bad_argument_of_the_config_is_named(argument, message):
    module = runpy.run_path(str(ROOT / "configs/table.py"))
    with pytest.raises(UserError, match=f"^config argument: {message}"):
        module["get_config"](argument)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_config_are_what_they_say(example):
    assert len(EXAMPLES) == 2
    argument, meant = example
    module = runpy.run_path(str(ROOT / "configs/table.py"))
    config = config_lib.from_config_dict(module["get_config"](argument))
    if meant == "Soft-TF-L[10,11,12] on 20-Split-CIFAR100":
        assert (config.method, config.mask_layers, config.tasks) == (
            "dualprompt+softtf",
            (10, 11, 12),
            20,
        )
    else:
        assert meant == "L2P on the small bundled backbone"
        assert (config.method, config.backbone, config.epochs) == ("l2p", "vit_ti8_32", 2)


def test_table_6_has_the_published_seconds():
    rows = rows_lib.rows_of("6", "c100_20")
    assert (
        printing.published_cell(rows[0].published["batch_vote/prompt_id"])
        == "training 11600 s, test 78 s on a Quadro RTX 8000"
    )


def test_l2p_on_imagenet_r_has_its_own_settings():
    rows = [row for row in rows_lib.rows_of("1", "imr_10") if row.name.startswith("L2P")]
    configs = [rows_lib.config_of(row, "imr_10", {}, seed=0) for row in rows]
    assert {(c.epochs, c.batch_size, c.e_prompt_length) for c in configs} == {(50, 16, 30)}
    assert {
        rows_lib.config_of(row, "c100_10", {"learning_rate": 0.1}, 0).learning_rate
        for row in rows_lib.rows_of("methods", "c100_10")
    } == {0.1}


def test_one_run_serves_rows_that_differ_in_the_protocol_only():
    rows = {row.name: row for row in rows_lib.rows_of("7", "c100_10")}
    row = rows["DualPrompt-Soft-TF-L[10,11,12] q,k,v,proj"]
    assert {protocol: figures["accuracy"] for protocol, figures in row.published.items()} == {
        "batch_vote/gradient_id_all": 98.05,
        "batch_vote/prompt_id": 92.35,
    }


def test_which_weights_are_masked_is_swept():
    rows = rows_lib.rows_of("weights", "c100_10")
    assert [row.name for row in rows][:3] == [
        f"DualPrompt-Soft-TF-L[12] {name}" for name in ("only ATTN", "w/o FF", "w/ FF")
    ]
    method = {row.name: method_of(rows_lib.config_of(row, "c100_10", {}, 0)) for row in rows}
    parts = {
        name.split("] ")[1]: sorted({kernel.split("/", 1)[1] for kernel in m.kernels})
        for name, m in method.items()
    }
    assert parts["only ATTN"] == ["attn/qkv/kernel"]
    assert parts["w/o FF"] == ["attn/proj/kernel", "attn/qkv/kernel"]
    assert parts["w/ FF"] == [
        "attn/proj/kernel",
        "attn/qkv/kernel",
        "mlp/fc1/kernel",
        "mlp/fc2/kernel",
    ]


def manifests(*protocols, validation=()):
    """Of a run of two tasks, by which half of the images are right, of those held out a quarter;
    `validation` are the protocols with these.
    """
    held_out = {"correct": 1, "total": 4, "task_correct": 1, "identified": {"0": 4}}
    row = {"correct": 1, "total": 2, "task_correct": 1, "identified": {"0": 2}}
    return [
        TaskManifest(
            task=task,
            classes=(task,),
            class_names=("a",),
            num_classes=2,
            num_tasks=2,
            config={},
            backbone={"name": "vit_b16", "sha256": "0"},
            metrics={protocol: [row] * (task + 1) for protocol in protocols},
            validation={protocol: [held_out] * (task + 1) for protocol in validation},
            seconds={"train": 1, "statistics": 1, "evaluate": 1},
            parameters={"adapter": 3, "fixed": 0, "shared": 2},
            step_flops=None,
            bytes={"adapter": 3, "shared": 2, "memory": 0, "statistics": 1},
            mask_distance_from_one={},
            weight_drift={},
            mask_density={},
            versions={},
        )
        for task in range(2)
    ]


def table_of(*arguments, workdir, monkeypatch, capsys, outcomes=None):
    """Exit status and text of a table whose runs end as `outcomes`; where none are given, all as
    `manifests` of Prompt ID by batches.
    """
    monkeypatch.setattr(
        planned,
        "run",
        lambda every, *_, **__: outcomes or [manifests("batch_vote/prompt_id")] * len(every),
    )
    status = command_line.main(["table", *arguments, f"--workdir={workdir}"])
    return status, capsys.readouterr().out


FROZEN = ("per_sample/frozen_features", "oracle/frozen_features")


def test_a_table_has_validation_figures_where_a_run_held_images_out(tmp_path, monkeypatch, capsys):
    world = {"workdir": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    protocol = "per_sample/prompt_id"
    with_, without = manifests(protocol, validation=[protocol]), manifests(protocol)
    _, text = table_of("methods", "--rows=12,14", **world, outcomes=[with_, without])
    heading, *rows = table_rows(text)[:3]
    assert heading[3:5] == ["accuracy", "val."]
    assert [row[3:5] for row in rows] == [["50.00", "25.00"], ["50.00", "–"]]
    assert "val.: the accuracy on training images that were held out" in text
    _, text = table_of("methods", "--rows=12,14", **world, outcomes=[without, without])
    assert "val." not in text


def test_validation_figures_are_means_over_the_seeds(tmp_path, monkeypatch, capsys):
    world = {"workdir": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    protocol = "per_sample/prompt_id"
    one, other = (manifests(protocol, validation=[protocol]) for _ in range(2))
    half = {"correct": 2, "total": 4, "task_correct": 1, "identified": {"0": 4}}
    other[-1] = dataclasses.replace(other[-1], validation={protocol: [half] * 2})
    _, text = table_of("methods", "--rows=12", "--seeds=2", **world, outcomes=[one, other])
    assert table_rows(text)[1][3:5] == ["50.00 ± 0.00", "37.50 ± 17.68"]
    # A mean over some of the seeds would stand beside one over all.
    outcomes = [one, manifests(protocol)]
    _, text = table_of("methods", "--rows=12", "--seeds=2", **world, outcomes=outcomes)
    assert "val." not in text


def test_frozen_features_stand_above_all_rows_once(tmp_path, monkeypatch, capsys):
    """Runs of older versions don't have them, and need none of their own."""
    world = {"workdir": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    new, old = manifests("per_sample/prompt_id", *FROZEN), manifests("per_sample/prompt_id")
    _, text = table_of("methods", "--rows=8,12,14", **world, outcomes=[old, new, new])
    rows = table_rows(text)[1:]
    assert [row[:3] for row in rows[:5]] == [
        ["–", "vit_b16, frozen", "CIL per_sample, frozen features"],
        ["–", "vit_b16, frozen", "TIL oracle, frozen features"],
        ["8", "L2P", "CIL per_sample, Prompt ID"],
        ["12", "DualPrompt", "CIL per_sample, Prompt ID"],
        ["14", "DualPrompt-Soft-TF", "CIL per_sample, Prompt ID"],
    ]
    assert "what a row has above them is what its training added" in text
    assert "Beside the frozen features of vit_b16, with each image by itself" in text
    _, text = table_of("methods", "--rows=8,12", **world, outcomes=[old, old])
    assert "rozen" not in text


def test_each_backbone_has_its_own_frozen_features(tmp_path, monkeypatch, capsys):
    world = {"workdir": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    one = manifests("per_sample/prompt_id", *FROZEN)
    other = [dataclasses.replace(m, backbone={"name": "vit_b16_sam", "sha256": "1"}) for m in one]
    _, text = table_of("2", "--rows=1,3", **world, outcomes=[one, other])
    above = [row[1] for row in table_rows(text) if row[0] == "–"]
    assert above == [*["vit_b16, frozen"] * 2, *["vit_b16_sam, frozen"] * 2]


def test_what_a_row_adds_to_frozen_features_is_by_its_best_rule():
    reference = dataclasses.replace(line("ViT", 40.0, FROZEN[0]), each=[39.0, 40.0, 41.0])
    lines = [
        line("one", 42.0, "per_sample/prompt_id"),
        line("one", 43.0, "per_sample/prototype"),
        line("other", 38.0, "per_sample/prompt_id"),
        line("other", 99.0, "oracle/task_given"),
        line("another backbone", 99.0, "per_sample/prompt_id", backbone="vit_b16_sam"),
    ]
    text = "\n".join(printing.reading(lines, [reference]))
    assert "by each row's best rule: one +3.00 ± 0.50, other -2.00 ± 0.50 points." in text


def test_figures_and_costs_are_two_tables_a_row_costs_once(tmp_path, monkeypatch, capsys):
    world = {"workdir": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    protocols = ("per_sample/prompt_id", "per_sample/prototype", "oracle/task_given")
    _, text = table_of("methods", "--rows=12", **world, outcomes=[manifests(*protocols)])
    rows = table_rows(text)
    assert rows[0] == list(printing.FIGURE_COLUMNS)
    assert [row[0] for row in rows] == ["#", "12", "12", "12", "#", "12"]
    costs = ["3 + 2", "0.00 + 0.00 + 0.00", "0.00", "–", "2 + 2 + 2"]
    assert rows[-1] == ["12", "DualPrompt", *costs]
    assert max(len(row) for row in text.splitlines() if row.startswith("|")) <= 100


def test_in_a_terminal_a_table_is_drawn(tmp_path, monkeypatch, capsys):
    world = {"workdir": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    _, text = table_of("7", "--rows=4", "--set=epochs=1", **world)
    assert "| " not in text
    drawn = re.sub("\x1b\\[[0-9;]*m", "", text)
    assert max(map(len, drawn.splitlines())) <= 100
    assert "CIL batch_vote, Prompt ID *" in drawn


def test_settings_that_are_not_for_joint_training(tmp_path, monkeypatch, capsys):
    """FT has no masks to keep as int8; that must not cost the table."""
    world = {"workdir": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    status, text = table_of("7", "--rows=4", "--set=mask_storage=int8", **world)
    assert status == 0
    assert "| 50.00 | 0.00 |" in text
    assert "is not measured under these settings" in text


def test_a_setting_that_is_no_good_for_a_row_fails_that_row(tmp_path, monkeypatch, capsys):
    world = {"workdir": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    status, text = table_of("methods", "--rows=8,12", "--set=top_k=99", **world)
    assert status == 1
    assert text.startswith("error: row 8: top_k: 99 is above pool_size, 10")
    assert "| 8 | L2P | failed: top_k: 99 is above pool_size, 10" in text
    assert "| 12 | DualPrompt | CIL batch_vote, Prompt ID" in text
    assert "Rows 8" not in text  # its settings are of no run


def test_a_setting_that_a_row_does_not_use_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    world = {"workdir": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    status, text = table_of("methods", "--rows=1,12", "--set=cache_queries=True", **world)
    assert status == 0
    assert "cache_queries has no effect on rows 1." in text


def test_published_figures_are_of_the_benchmarks_own_data_and_tasks(tmp_path, monkeypatch, capsys):
    world = {"workdir": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    _, text = table_of("7", "--rows=4", "--set=epochs=1", **world)
    assert text.startswith("# Table 7, c100_10\n")
    assert " / " in text.split("| 50.00 | 0.00 |")[1].split("|")[1]
    for changes, ran in (("dataset=digits,tasks=2", "digits_2"), ("tasks=5", "c100_5")):
        _, text = table_of("7", "--rows=4", f"--set={changes}", **world)
        assert text.startswith(f"# Table 7, {ran}\n")
        assert "The published figures are of c100_10, and left out." in text
        assert " / " not in text.split("| 50.00 | 0.00 |")[1].split("|")[1]


def test_one_run_serves_all_shots_of_all_tables():
    rows = rows_lib.rows_of("9", "c100_10")[2:]
    assert [row.settings["shots"] for row in rows] == [(3, 5, 7, 0)] * 2
    assert [row.shots for row in rows] == [(3, 5, 7, 0)] * 2
    assert [figures["accuracy"] for figures in rows[0].published.values()] == [
        *(91.83, 93.12, 96.13, 96.51, 96.84)
    ]
    assert list(rows[1].published) == [
        "batch_vote/prompt_id",
        *(f"batch_vote/gradient_id_{shots}" for shots in (3, 5, 7, "all")),
    ]
    same = "DualPrompt-Soft-TF-L[10,11,12] q,k,v,proj"
    found = {
        table: next(row for row in rows_lib.rows_of(table, "c100_10") if row.name.startswith(same))
        for table in "6789"
    }
    assert {table: row.shots for table, row in found.items()} == {
        "6": (0,),
        "7": (0,),
        "8": (3, 5, 7, 0),
        "9": (3, 5, 7, 0),
    }
    assert (
        len(
            {planned.folder_of(rows_lib.config_of(row, "c100_10", {}, 0)) for row in found.values()}
        )
        == 1
    )
    seeds = [manifests("per_sample/prototype", *(rules.GradientVote(n).key for n in (3, 5, 7, 0)))]
    shown = [line.protocol for line in lines_lib.lines_of(found["7"], seeds)]
    assert shown == ["per_sample/prototype", "batch_vote/gradient_id_all"]
    assert len(lines_lib.lines_of(dataclasses.replace(found["7"], shots=None), seeds)) == 5


def test_settings_for_all_rows_leave_alone_what_a_row_is_about():
    joint = next(row for row in rows_lib.rows_of("1", "c100_10") if row.name.startswith("Upper"))
    config = rows_lib.config_of(
        joint, "c100_10", {"tasks": 5, "epochs": 2, "backbone": "vit_ti8_32", "seed": 3}, seed=0
    )
    assert (config.tasks, config.epochs, config.backbone, config.seed) == (1, 2, "vit_ti8_32", 3)
    same = dataclasses.replace(config, data_dir="/elsewhere", eval_batch_size=64, seed=4)
    assert planned.folder_of(same).split("/")[0] == planned.folder_of(config).split("/")[0]
    assert (
        planned.folder_of(dataclasses.replace(config, epochs=3)).split("/")[0]
        != planned.folder_of(config).split("/")[0]
    )
    # Where things are is no setting, but where it says what they are.
    assert planned.folder_of(
        dataclasses.replace(config, backbone_path="/b.npz")
    ) != planned.folder_of(config)
    one, two = (
        dataclasses.replace(config, dataset="folder", data_dir=path) for path in ("/one", "/two")
    )
    assert planned.folder_of(one) != planned.folder_of(two)
    one, two = (
        dataclasses.replace(config, scenario="file", scenario_file=path) for path in ("/1", "/2")
    )
    assert planned.folder_of(one) != planned.folder_of(two)
    assert "epochs is what" not in printing.conditions(
        [row := rows_lib.rows_of("7", "c100_10")[0]], {}, {"epochs": 2}
    )
    assert "mask_layers is what rows 1 are about" in printing.conditions(
        [row], {}, {"mask_layers": (3,)}
    )


def row_of(table, name):
    return next(row for row in rows_lib.rows_of(table, "c100_10") if row.name == name)


# The run in tests/data/format_0.tar.gz, which the program of format 0 made for this row.
OLD_ROW = "DualPrompt-Soft-TF"
OLD_SETTINGS = (
    "dataset=digits,tasks=2,backbone=tiny,mask_layers=3+4,e_prompt_layers=3+4,g_prompt_layers=1,"
    "e_prompt_length=2,g_prompt_length=2,epochs=2,batch_size=10,train_images_per_class=8,"
    "test_images_per_class=6,prototype_features=20,checkpoint_every=3,eval_batch_size=16,"
    "learning_rate=0.1"
)
OLD_FOLDER = "dualprompt+softtf-digits-2x-be97c3dd/seed59"


def folder_then(row, **overrides):
    return runs.folder_in_format_0(rows_lib.settings_of(row, "c100_10", overrides, 0))


def test_a_run_of_format_0_is_found_by_the_name_that_it_had():
    row = row_of("methods", OLD_ROW)
    assert row.number == 14
    assert folder_then(row, **parse_argument(OLD_SETTINGS)) == OLD_FOLDER


def test_what_format_0_did_not_have_names_no_folder_of_it():
    row, old = row_of("methods", OLD_ROW), parse_argument(OLD_SETTINGS)
    assert folder_then(row, **old, class_order_seed=-1) == OLD_FOLDER  # as it was then
    assert folder_then(row, **old, class_order_seed=1993) is None
    assert folder_then(row, **old, validation=0.1) is None


def test_what_a_method_did_not_use_was_in_the_name_then_and_is_not_now():
    """--set=exemplars=300 moved a row without exemplars."""
    row, old = row_of("methods", OLD_ROW), parse_argument(OLD_SETTINGS)
    assert folder_then(row, **old, buffer_size=300) not in (None, OLD_FOLDER)
    now = [
        planned.folder_of(rows_lib.config_of(row, "c100_10", old | unused, 0))
        for unused in ({}, {"buffer_size": 300}, {"pool_size": 3, "top_k": 2})
    ]
    assert len(set(now)) == 1


@pytest.fixture
def old_tables(tmp_path):
    """The workdir of a table that the program of format 0 finished."""
    with tarfile.open(ROOT / "tests/data/format_0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "tables"


def test_a_run_of_format_0_stands_in_a_table_without_training(old_tables, monkeypatch):
    monkeypatch.setattr(loop, "run", None)
    row, overrides = row_of("methods", OLD_ROW), parse_argument(OLD_SETTINGS)
    (the_run,) = runs.plan(row, "c100_10", overrides, 1, old_tables)
    assert the_run.folder == old_tables / OLD_FOLDER
    (manifests,) = planned.run([the_run], Console(quiet=True))
    written = [
        json.loads(line) for line in (the_run.folder / "results.jsonl").read_text().splitlines()
    ]
    for line in lines_lib.lines_of(row, [manifests]):
        (final,) = (
            r["final_average"]
            for r in written
            if r["tasks_trained"] == 2 and f"{r['protocol']}/{r['task_id']}" == line.protocol
        )
        assert line.each == [final]
    # What was written about it then is what would be written now, but for the new key.
    expected = report.result_rows(manifests[-1].config, "digits_2", manifests)
    assert [{k: v for k, v in r.items() if k != "part"} for r in expected] == written
    # Where today's folder is there, it is taken.
    (old_tables / planned.folder_of(the_run.config)).mkdir(parents=True)
    (again,) = runs.plan(row, "c100_10", overrides, 1, old_tables)
    assert again.folder == old_tables / planned.folder_of(the_run.config)


def test_a_folder_that_holds_a_run_of_other_settings_is_no_finished_run(old_tables):
    row, overrides = row_of("methods", OLD_ROW), parse_argument(OLD_SETTINGS)
    (the_run,) = runs.plan(row, "c100_10", overrides | {"epochs": 3}, 1, old_tables)
    assert planned.finished(the_run) is None
    with pytest.raises(UserError, match="epochs: 2 there, 3 now"):
        planned.finished(dataclasses.replace(the_run, folder=old_tables / OLD_FOLDER))


def test_a_run_is_finished_with_its_last_task(old_tables):
    row, overrides = row_of("methods", OLD_ROW), parse_argument(OLD_SETTINGS)
    (the_run,) = runs.plan(row, "c100_10", overrides, 1, old_tables)
    assert [manifest.task for manifest in planned.finished(the_run)] == [0, 1]
    shutil.rmtree(the_run.folder / "tasks/001")
    assert planned.finished(the_run) is None


def test_a_setting_that_comes_later_moves_nothing(monkeypatch):
    """A folder's name says what differs from the defaults."""
    config = rows_lib.config_of(row_of("methods", "head"), "c100_10", {"epochs": 2}, 0)
    before, used = planned.folder_of(config), settings_lib.used_settings
    monkeypatch.setattr(settings_lib, "used_settings", lambda config: used(config) | {"new": 1})
    monkeypatch.setattr(planned, "DEFAULTS", {**DEFAULTS, "new": 1})
    assert planned.folder_of(config) == before
    monkeypatch.setattr(planned, "DEFAULTS", {**DEFAULTS, "new": 2})
    assert planned.folder_of(config) != before


def test_the_parts_of_a_method_are_of_one_folder_in_any_order():
    config = Config(method="dualprompt+softtf")
    swapped = dataclasses.replace(config, method="softtf+dualprompt")
    assert planned.folder_of(config) == planned.folder_of(swapped)


def test_a_slip_in_the_rows_numbers_fills_no_memory():
    with pytest.raises(UserError, match="rows are numbered 1 to 3"):
        rows_lib.chosen("1-99999999999999", 3)


@pytest.mark.parametrize(
    ("table", "overrides"),
    [
        ("7", {"target_modules": "qkv+proj+mlp", "shots": (5,)}),
        ("layers", {"method": "dualprompt+lora", "e_prompt_layers": (3, 4)}),
        ("weights", {"method": "softtf", "target_modules": "mlp"}),
    ],
)
def test_what_is_in_a_rows_name_or_columns_is_what_it_is_about(table, overrides):
    for row in rows_lib.rows_of(table, "c100_10"):
        if "Soft-TF" in row.name:
            changed, default = (
                rows_lib.config_of(row, "c100_10", settings, 0) for settings in (overrides, {})
            )
            assert changed == default


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("12",),
            "table: '12' is unknown; did you mean '2'? known are 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, "
            "11, methods, layers, weights, clip",
        ),
        (("10", "--benchmark=c100_10"), "table: Table 10 has no figures for c100_10"),
        (("7", "--rows=11"), "--rows: '11': rows are numbered 1 to 10"),
        (("3", "--benchmark=imr_10"), "table: Table 3 has no figures for imr_10"),
        (("7", "--rows=x"), "--rows: 'x' is not a list such as 1,3-5"),
        (("7", "--rows=2-"), "--rows: '2-' is not a list such as 1,3-5"),
        (("7", "--rows=1,4-2"), "--rows: '1,4-2' is not a list such as 1,3-5"),
        (
            ("2", "--rows=3", "--set=backbone=vit_ti8_32"),
            "backbone: the row 'DualPrompt, pre-trained by SAM' is about vit_b16_sam",
        ),
        (("9" * 5000,), f"table: '{'9' * 79}... is unknown"),
        (("layrs",), "table: 'layrs' is unknown; did you mean 'layers'? known are 1, 2, 3"),
        (("7", "--seeds=999999999"), "--seeds: 999999999 is above 1000, the most runs of one"),
        (("7", "--seeds=0"), "--seeds: '0' is not a whole number from 1 on"),
        (("7", "--jobs=0"), "--jobs: '0' is not a whole number from 1 on"),
        (("7", "--jobs=x"), "--jobs: 'x' is not a whole number from 1 on"),
        (("7", "--seeds=²"), "--seeds: '²' is not a whole number from 1 on"),
        (("7", "--rows=²"), "--rows: '²' is not a list such as 1,3-5"),
        (("7", f"--rows={'9' * 5000}"), f"--rows: '{'9' * 80}' is not a list such as 1,3-5"),
        (("7", "--output=s3://bucket/t.md"), "--output: 's3://bucket/t.md' is a URL"),
        (("7", "--seeds=1", "--seeds=3"), "--seeds is given twice, as '1' and as '3'"),
        (("7", "--set=epoch=2"), "--set: key 'epoch' is unknown"),
        (("1", "--rows=4"), "--rows: none of these rows is run here"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys, tmp_path):
    """And leave no folders behind, for the output neither."""
    output = [f"--output={tmp_path / 'new/t.md'}"]
    output *= not any(argument.startswith("--output") for argument in arguments)
    arguments = ["table", *arguments, f"--workdir={tmp_path / 'runs'}", *output]
    assert command_line.main(arguments) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


def test_where_all_rows_failed_there_is_no_folder_for_the_table(tmp_path, monkeypatch, capsys):
    world = {"workdir": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    output = f"--output={tmp_path / 'new/one/t.md'}"
    status, _ = table_of("7", "--rows=2", output, **world, outcomes=[UserError("no images")])
    assert (status, list(tmp_path.iterdir())) == (1, [])
    assert table_of("7", "--rows=2", output, **world)[0] == 0
    assert (tmp_path / "new/one/t.md").is_file()


def test_an_output_replaces_no_text_that_is_not_a_table_of_ours(tmp_path, capsys):
    """That is told before anything runs, hours before the table."""
    mine = tmp_path / "results.md"
    mine.write_text("# Results\n\nBy hand.\n\nMade by `soft-jax table 7`.\n")
    os.mkfifo(pipe := tmp_path / "pipe")
    problems = {mine: "is there and holds no table", tmp_path: "is a folder; name a file in it"}
    problems |= {pipe: "is a named pipe (FIFO); name a file, or one that is not there"}
    for output, problem in problems.items():
        arguments = ["table", "7", f"--workdir={tmp_path / 'runs'}", f"--output={output}"]
        for more in ((), ("--list",)):
            assert command_line.main([*arguments, *more]) == 1
            assert capsys.readouterr().err.startswith(f"error: --output: {output} {problem}")
    (tmp_path / "layers.png").mkdir()  # where the picture would be
    arguments = ["table", "layers", f"--output={tmp_path / 'layers.md'}"]
    assert command_line.main(arguments) == 1
    assert f"--output: {tmp_path / 'layers.png'} is a folder" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == sorted([mine, pipe, tmp_path / "layers.png"])


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_nobody_reads_is_no_error(unbuffered):
    command, environment = (
        [sys.executable, "-m", "soft_jax", "table", "methods", "--list"],
        os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + 13


@pytest.mark.usefixtures("digits")
def test_a_table_runs_what_is_missing_and_says_what_is_above_the_bound(
    tmp_path, capsys, monkeypatch
):
    arguments = ["table", "methods", f"--workdir={tmp_path}", "--rows=1,24", "--seeds=2"]
    arguments.append(
        "--set=dataset=digits,tasks=2,epochs=1,batch_size=16,layers=3-4,g_prompt_layers=1,prototype_features=50,eval_batch_size=16"
    )
    drawn, draw = [], pictures.draw
    monkeypatch.setattr(
        pictures,
        "draw",
        lambda root, manifests: drawn.append(len(manifests)) or draw(root, manifests),
    )
    assert command_line.main([*arguments, f"--output={tmp_path / 'table.md'}"]) == 0
    assert drawn == [2, 2, 1, 1]  # so short tasks have no pictures before the end
    assert not list(tmp_path.glob("head*/*/mask_d*.png"))  # it has no masks
    assert capsys.readouterr().out.endswith((tmp_path / "table.md").read_text() + "\n")
    lines = table_rows((tmp_path / "table.md").read_text())[1:]
    assert [line[1] for line in lines[6:]] == ["row", "head", "Upper bound of Soft-TF (joint)"]
    assert [line[1:3] for line in lines[:2]] == [
        ["tiny, frozen", "CIL per_sample, frozen features"],
        ["tiny, frozen", "TIL oracle, frozen features"],
    ]
    lines = lines[2:6]
    assert [(line[1], line[2]) for line in lines] == [
        ("head", "CIL per_sample, no task id"),
        ("head", "TIL oracle, task given"),
        ("Upper bound of Soft-TF (joint)", "CIL per_sample, Prompt ID"),
        ("Upper bound of Soft-TF (joint)", "CIL per_sample, prototype"),
    ]
    each = [
        json.loads(line)
        for path in tmp_path.glob("head*/*/results.jsonl")
        for line in path.read_text().splitlines()
    ]
    finals = [
        row["final_average"]
        for row in each
        if row["task_id"] == "no_task_id" and row["tasks_trained"] == 2
    ]
    assert len(finals) == 2
    assert lines[0][3].startswith(
        f"{sum(finals) / 2:.2f} ± {abs(finals[0] - finals[1]) / 2**0.5:.2f}"
    )
    # Nothing is missing now. Another table finds that bound; a row of it that can't be run doesn't
    # keep the others from it.
    run = loop.run
    monkeypatch.setattr(
        loop,
        "run",
        lambda config, *rest, **options: (
            run(config, *rest, **options) if "lora" in config.method else None
        ),
    )
    rows = {"wide": {"method": "dualprompt+lora", "rank": 99}, "head": {"method": "head"}}
    monkeypatch.setitem(rows_lib.OWN, "two", ("Two", rows))
    two = [
        "table",
        "two",
        *(argument for argument in arguments[2:] if not argument.startswith("--rows")),
    ]
    assert command_line.main(two) == 1
    text = capsys.readouterr().out
    names = [row[1] for row in table_rows(text)]
    assert names == ["row", *["tiny, frozen"] * 2, "head", "head", "wide", "row", "head"]
    assert "failed: rank: 99 is above the backbone's width, 24" in text
    assert "▲: above joint training" in text
    assert command_line.main([*two, "--rows=1"]) == 1
    assert "error: rank: 99 is above" in capsys.readouterr().err
    # Nor does a finished run that is damaged.
    next(tmp_path.glob("head*/*/tasks/001/manifest/metadata")).write_text("{")
    assert command_line.main(arguments) == 1
    rows = table_rows(capsys.readouterr().out)
    joint = "Upper bound of Soft-TF (joint)"
    assert [row[1] for row in rows] == ["row", joint, joint, "head", "row", joint]
    assert rows[3][2].startswith("failed: ")


def table_rows(text):
    """The cells of all tables in a Markdown text, headings included."""
    return [
        [cell.strip() for cell in row.strip("| ").split(" | ")]
        for row in text.splitlines()
        if row.startswith("| ")
    ]


def line(name, accuracy, protocol="batch_vote/prompt_id", joint=False, backbone="vit_b16"):
    figures = dict.fromkeys(("forgetting", "task_id_accuracy"), (1.0, 0.0)) | {
        "final_average": (accuracy, 0.5)
    }
    cost = {
        "own": 1,
        "shared": 2,
        "own_bytes": 3,
        "shared_bytes": 4,
        "memory_bytes": 5,
        "statistics_bytes": 6,
        "gflops": None,
    }
    cost |= {"train": 6.0, "statistics": 6.5, "evaluate": 7.0}
    return lines_lib.Line(
        7,
        name,
        protocol,
        figures,
        {"accuracy": 97.87, "forgetting": 0.21},
        cost,
        joint,
        [accuracy - 0.5, accuracy, accuracy + 0.5],
        backbone,
    )


def test_what_is_above_the_joint_bound_is_marked():
    lines = [line("above", 94.0), line("below", 93.0), line("told", 99.0, "oracle/task_given")]
    lines += [
        line("all", 93.5, "per_sample/prompt_id", joint=True),
        line("by statistics", 95.0, "per_sample/prototype"),
    ]
    lines += [
        line("all", 96.0, "per_sample/prototype", joint=True),
        line("another backbone", 99.0, backbone="vit_b16_sam"),
    ]
    text = printing.markdown(
        "T",
        "make it",
        [rows_lib.Row(1, "BiC", {"per_sample": {"accuracy": 81.0}}, None)],
        lines,
        "so",
    )
    marked = [row.split(" | ")[1] for row in text.splitlines() if "**▲**" in row]
    assert marked == ["above"]
    assert lines_lib.bound(lines[0], lines) == 93.5
    assert "97.87 / 0.21" in text
    assert "| 1 | BiC | as published, not run" in text
    assert lines_lib.bound(lines[0], lines[:3]) is None
    assert "is not measured under these settings" in printing.markdown(
        "T", "make it", [], lines[:3], "so"
    )
    assert "That is not measured for row(s) 8" in printing.markdown(
        "T", "make it", [], [*lines[:-1], dataclasses.replace(lines[-1], number=8)], "so"
    )
    elsewhere = printing.markdown("T", "make it", [], lines[:3], "so", joint=lines[3:6])
    assert "That is not measured" not in elsewhere
    assert [row.split(" | ")[1] for row in elsewhere.splitlines() if "**▲**" in row] == ["above"]


def test_what_the_figures_say_is_computed():
    lines = [
        line("DualPrompt", 20.0, "per_sample/prompt_id"),
        line("DualPrompt-Soft-TF", 19.5, "per_sample/prompt_id"),
    ]
    lines += [line("DualPrompt", 26.0), line("all", 90.0, "per_sample/prompt_id", joint=True)]
    text = "\n".join(printing.reading(lines))
    assert (
        "Highest with each image by itself: DualPrompt (CIL per_sample, Prompt ID) 20.00 ± 0.50"
        in text
    )
    assert (
        "DualPrompt-Soft-TF beside DualPrompt: per_sample/prompt_id -0.50 ± 0.00 points." in text
    )  # seed by seed
    assert (
        "+6.00 points in the mean of 1 pairs of rows, +6.00 at most (DualPrompt "
        "batch_vote/prompt_id)" in text
    )
    lora = dataclasses.replace(
        line("DualPrompt-LoRA r=4", 0, "per_sample/prompt_id"), each=[18.5, 19.0, 21.0]
    )
    assert (
        "- DualPrompt-Soft-TF beside DualPrompt-LoRA r=4: per_sample/prompt_id +0.00 ± 0.87 points."
        in printing.reading([*lines, lora])
    )
    assert printing.reading(lines[:1]) == []
    pooled = [
        line("L2P", 11.0, "per_sample/no_task_id"),
        line("L2P-Soft-TF", 10.0, "per_sample/prompt_id"),
    ]
    assert "L2P-Soft-TF beside L2P: per_sample/prompt_id -1.00 ± 0.00 points." in "\n".join(
        printing.reading(pooled)
    )
    named = [line("DualPrompt", 11.0), line("DualPrompt-Soft-TF-L[10,11,12] q,k,v,proj", 12.0)]
    assert (
        "DualPrompt-Soft-TF-L[10,11,12] q,k,v,proj beside DualPrompt: batch_vote/prompt_id +1.00"
        in "\n".join(printing.reading(named))
    )


def test_the_layer_sweep_has_a_picture():
    rows = rows_lib.rows_of("layers", "c100_10")
    assert [row.settings["mask_layers"] for row in rows] == [(layer,) for layer in range(1, 13)]
    protocols = ("per_sample/prompt_id", "oracle/task_given")
    lines = [
        line(row.name, 50.0 + row.number + 20 * i, protocol)
        for row in rows
        for i, protocol in enumerate(protocols)
    ]
    (axes,) = printing.draw_layers(lines).axes
    for i, curve in enumerate(axes.containers):
        assert curve.get_label() == rules.title(protocols[i])
        np.testing.assert_array_equal(curve[0].get_xdata(), range(1, 13))
        np.testing.assert_array_equal(curve[0].get_ydata(), 50 + np.arange(1, 13) + 20 * i)
    assert len(axes.containers) == 2


@pytest.mark.parametrize(
    "method",
    ["l2p+pgp+softtf", "dualprompt+pgp+adapter", "softnet", "ewc", "lwf", "derpp", "icarl", "bic"],
)
def test_a_method_continues_from_its_tasks_and_predicts_what_it_evaluated(method, digits, tmp_path):
    """Task 2 trained again from what task 1 left on disk, and killed on the way: the same
    arrays, whether or not task 1's weights are held; task 1 is not touched; and the predictor's
    counts are those of the evaluation.
    """
    settings = {
        "dataset": "digits",
        "tasks": 2,
        "method": method,
        "batch_size": 16,
        "epochs": 1,
        "eval_batch_size": 16,
        "prototype_features": 50,
        "pool_size": 3,
        "top_k": 2,
        "buffer_size": 20,
        "prefix_layout": "interleaved",
        "mask_storage": "int8",
        "checkpoint_every": 2,
        **LAYERS,
    }
    config = Config(**settings_lib.drop_unused(settings))
    once = loop.run(config, tmp_path, Console(quiet=True))
    arrays = Reader(tmp_path).load_task_manifest(1).sha256
    shutil.rmtree(tmp_path / "tasks/001")
    first = {
        path: path.read_bytes() for path in (tmp_path / "tasks/000").rglob("*") if path.is_file()
    }

    class Killed(Exception):
        pass

    def kill(task, step, values):
        if step == 2:
            raise Killed
        return values

    config, output = dataclasses.replace(config, weights_cache_mb=0), io.StringIO()
    with pytest.raises(Killed):
        loop.run(config, tmp_path, Console(quiet=True), hooks=Hooks(after_step=kill))
    again = loop.run(config, tmp_path, Console(file=output))
    assert "Task 2 continues after step 2" in output.getvalue()
    assert again[1].metrics == once[1].metrics
    assert Reader(tmp_path).load_task_manifest(1).sha256 == arrays
    assert {
        path: path.read_bytes() for path in (tmp_path / "tasks/000").rglob("*") if path.is_file()
    } == first
    test = digits.test
    by_task = "+" in method or method == "softnet"
    rule = rules.PromptId() if by_task else rules.NoTaskId()
    predictor = soft_jax.Predictor.load(tmp_path, task_id=rule.option, batch_size=16)
    prediction = predictor.predict(test.images)
    rows = once[1].metrics[rule.key]
    correct = (prediction.classes == test.labels).sum()
    assert correct == sum(row["correct"] for row in rows)
    identified = (prediction.networks == test.labels // 5).sum()
    assert identified == sum(row["task_correct"] for row in rows)
