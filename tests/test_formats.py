"""Records, their fingerprints, and the migrations from older formats."""

import copy
import dataclasses
import json
import tarfile
from pathlib import Path

import pytest

import soft_jax
from soft_jax.errors import UserError
from soft_jax.store import formats, records
from soft_jax.store.records import RunRecord, TaskManifest, TrainingManifest

WORKDIR = "tables/dualprompt+softtf-digits-2x-be97c3dd/seed59"
RECORD = RunRecord(
    settings={"method": "dualprompt+softtf", "layers": (1, 2), "rate": 0.5},
    backbone_sha256="aa",
    dataset_sha256="bb",
    tasks=((0, 3), (1, 2, 4)),
)
MANIFEST = TaskManifest(
    task=1,
    classes=(1, 2, 4),
    class_names=("b", "c", "é"),
    num_classes=5,
    num_tasks=2,
    config={"method": "dualprompt+softtf", "layers": [1, 2]},
    backbone={"name": "tiny", "sha256": "aa"},
    metrics={"p": [{"correct": 1, "task_correct": 2, "total": 3, "identified": {"0": 3}}]},
    seconds={"train": 1.5},
    parameters={"adapter": 5, "shared": 3, "fixed": 0},
    step_flops=None,
    bytes={"adapter": 20},
    mask_distance_from_one={},
    weight_drift={},
    mask_density={},
    versions={"jax": "0"},
    run=RECORD,
)


@pytest.fixture(scope="module")
def old():
    """JSON files of the finished run of format 0, by their path below its folder."""
    names = ("config.json", "tasks/000/manifest/metadata", "tasks/001/manifest/metadata")
    with tarfile.open(Path(__file__).parent / "data" / "format_0.tar.gz") as archive:
        members = {name.removeprefix("./"): name for name in archive.getnames()}
        read = {
            name: json.load(archive.extractfile(members[f"{WORKDIR}/{name}"])) for name in names
        }
    for name in names[1:]:
        del read[name]["manifest_sha256"]
    return read


@pytest.fixture
def config(old):
    return copy.deepcopy(old["config.json"])


@pytest.fixture
def manifest(old):
    return copy.deepcopy(old["tasks/001/manifest/metadata"])


def written(kind, record):
    """What a record is on disk, read again."""
    return json.loads(json.dumps(formats.stamped(kind, record.to_json())))


def read_run(data):
    return RunRecord.from_json(formats.upgrade("run", data, "config.json"), "config.json")


def read_task(data):
    return TaskManifest.from_json(formats.upgrade("task", data, "tasks/001"), "tasks/001")


# Records


def test_a_run_comes_back_equal():
    data = written("run", RECORD)
    assert (data["format"], data["written_by"]) == (1, soft_jax.__version__)
    assert read_run(data) == RECORD
    equal_split = dataclasses.replace(RECORD, tasks=None)
    assert read_run(written("run", equal_split)) == equal_split


def test_a_task_and_a_training_state_come_back_equal():
    assert read_task(written("task", MANIFEST) | {"sha256": {"a/b": "c"}}) == dataclasses.replace(
        MANIFEST, sha256={"a/b": "c"}
    )
    state = TrainingManifest(run_fingerprint="ab", task=1, step=3, seconds=0.5)
    data = formats.upgrade("training", written("training", state) | {"sha256": {}}, "here")
    assert TrainingManifest.from_json(data, "here") == state


def test_equal_runs_have_one_fingerprint_and_others_another():
    changed = [
        {"settings": RECORD.settings | {"rate": 0.25}},
        {"settings": RECORD.settings | {"more": None}},
        {"settings": {"method": "dualprompt+softtf", "layers": (1, 2)}},
        {"backbone_sha256": "ab"},
        {"dataset_sha256": "ab"},
        {"tasks": None},
        {"tasks": ((3, 0), (1, 2, 4))},
    ]
    fingerprints = {dataclasses.replace(RECORD, **change).fingerprint for change in changed}
    assert len(fingerprints | {RECORD.fingerprint}) == len(changed) + 1
    one, other = (
        dataclasses.replace(RECORD, settings={"a": (1, {"b": 2.0}), "c": 0}),
        dataclasses.replace(RECORD, settings={"c": 0.0, "a": [1, {"b": 2}]}),
    )
    assert one == other and one.fingerprint == other.fingerprint


def test_the_fingerprint_stays_what_it_is():
    """It stands in files: another way to compute it needs another format."""
    assert RECORD.fingerprint == (
        "e378f213c9dc23f1c9f50b8c0db03e2ddb40a33ae50586ccd3ebf5b81f53cf0d"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["settings"].pop("rate"),
        lambda data: data["settings"].update(rate=0.6),
        lambda data: data["settings"].update(more=1),
        lambda data: data.update(backbone_sha256="cc"),
        lambda data: data.update(tasks=None),
        lambda data: data["tasks"].pop(),
        lambda data: data.pop("fingerprint"),
    ],
)
def test_what_was_changed_by_hand_in_a_run_is_found(change):
    data = written("run", RECORD)
    change(data)
    with pytest.raises(UserError, match=r"config.json: .*their fingerprint differs.*restore it"):
        read_run(data)


@pytest.mark.parametrize("key", ["settings", "backbone_sha256", "dataset_sha256", "tasks"])
def test_a_missing_or_unknown_part_of_a_run_is_named(key):
    data = written("run", RECORD)
    with pytest.raises(UserError, match="config.json: extra is unknown"):
        read_run(data | {"extra": 1})
    del data[key]
    with pytest.raises(UserError, match=f"config.json: {key} is missing"):
        read_run(data)


@pytest.mark.parametrize(
    "change", [{"settings": []}, {"tasks": [1]}, {"tasks": [[0.5]]}, {"backbone_sha256": None}]
)
def test_a_part_of_a_run_of_another_type_is_refused(change):
    with pytest.raises(UserError, match=r"config.json: an entry is not of the type"):
        read_run(written("run", RECORD) | change)


def test_a_missing_or_unknown_part_of_a_manifest_is_named():
    data = written("task", MANIFEST) | {"sha256": {}}
    with pytest.raises(UserError, match="tasks/001: extra is unknown"):
        read_task(data | {"extra": 1})
    with pytest.raises(UserError, match="tasks/001: run: a JSON object was expected"):
        read_task(data | {"run": None})
    del data["num_tasks"]
    with pytest.raises(UserError, match="tasks/001: num_tasks is missing"):
        read_task(data)


# Formats


@pytest.mark.parametrize("kind", formats.MIGRATIONS)
def test_a_newer_format_names_who_wrote_it(kind):
    newer = len(formats.MIGRATIONS[kind]) + 1
    with pytest.raises(UserError) as caught:
        formats.upgrade(kind, {"format": newer, "written_by": "9.1", "what": "ever"}, "/runs/x")
    message = str(caught.value)
    assert "\n" not in message
    ours = soft_jax.__version__
    for part in ("/runs/x", f"format {newer}", "soft_jax 9.1", ours, "upgrade this"):
        assert part in message


@pytest.mark.parametrize("data", [[], None, "text", {"format": "1"}, {"format": -1}])
def test_what_is_no_record_at_all(data):
    with pytest.raises(UserError, match="config.json: .*expected"):
        read_run(data)


def test_a_run_without_its_format_number_is_no_run_of_format_0():
    data = written("run", RECORD)
    del data["format"]
    with pytest.raises(UserError, match="config.json: backbone, .* is missing"):
        read_run(data)


# Format 1


def test_a_task_of_format_1_has_no_temperature():
    """What came with format 2 says that nothing was fitted or counted."""
    data = written("task", MANIFEST) | {"sha256": {}, "format": 1}
    del data["temperature"], data["calibration"]
    read = read_task(data)
    assert (read.temperature, read.calibration) == ({}, {})


# Format 0


def test_settings_of_format_0_get_their_new_names(config):
    config |= {"mask_weights": "mlp", "keep": 0.5, "pull": 2.0, "exemplars": 7}
    config |= {"hold_g_prompt": True, "fixed_query": True, "seed": 3}
    settings = read_run(config).settings
    for name, value in {
        "target_modules": "mlp",
        "density": 0.5,
        "key_loss_weight": 2.0,
        "buffer_size": 7,
        "freeze_g_prompt": True,
        "cache_queries": True,
        "seed": 3,
        "mask_layers": [3, 4],
    }.items():
        assert settings[name] == value
    gone = {"name", "mask_weights", "keep", "pull", "exemplars", "hold_g_prompt", "fixed_query"}
    assert not gone & settings.keys()


def test_hashes_and_tasks_of_format_0(config):
    record = read_run(config)
    assert record.backbone_sha256 == config["backbone_sha256"]
    assert record.dataset_sha256 == config["dataset_sha256"]
    assert record.tasks is None
    assert not {"backbone_sha256", "dataset_sha256"} & record.settings.keys()
    assert read_run(config | {"name": "another"}) == record


@pytest.mark.parametrize(
    ("spelled", "canonical"),
    [
        ("softtf+dualprompt", "dualprompt+softtf"),
        ("lora+pgp+l2p", "l2p+pgp+lora"),
        ("pgp+dualprompt", "dualprompt+pgp"),
        ("softtf", "softtf"),
        ("icarl", "icarl"),
    ],
)
def test_a_method_of_format_0_is_spelled_in_one_order(config, spelled, canonical):
    assert read_run(config | {"method": spelled}).settings["method"] == canonical


def test_shots_were_once_one_number(config):
    assert read_run(config | {"shots": 5}) == read_run(config | {"shots": [5]})


def test_a_setting_that_came_later_has_the_value_of_what_was_done_before(config):
    """The first runs of format 0, which had 13 settings fewer."""
    added = {"keep", "rank", "pool_size", "top_k", "ewc_strength", "lwf_strength", "exemplars"}
    added |= {"mask_storage", "train_images_per_class", "test_images_per_class", "hold_g_prompt"}
    added |= {"fixed_query", "prototype_features"}
    first = {key: value for key, value in config.items() if key not in added}
    settings = read_run(first | {"method": "softtf"}).settings
    assert settings.keys() == read_run(config).settings.keys()
    assert settings["prototype_features"] == 0  # there were none
    assert settings["mask_storage"] == "float32"
    assert settings["cache_queries"] is settings["freeze_g_prompt"] is False
    assert settings["method"] == "dualprompt+softtf"  # what "softtf" was the name of
    assert read_run(first | {"method": "dualprompt"}).settings["method"] == "dualprompt"


@pytest.mark.parametrize(
    "key", ["seed", "prefix_layout", "mask_weights", "backbone_sha256", "dataset_sha256", "shots"]
)
def test_what_every_run_of_format_0_has_may_not_be_missing(config, key):
    del config[key]
    with pytest.raises(UserError, match=f"config.json: {key} is missing"):
        read_run(config)


def test_what_no_run_of_format_0_had_is_refused(config):
    with pytest.raises(UserError, match="config.json: sede is unknown"):
        read_run(config | {"sede": 3})


def test_a_manifest_of_format_0_opens(config, manifest):
    read = read_task(manifest)
    assert (read.task, read.classes, read.class_names) == (1, (5, 6, 7, 8, 9), tuple("56789"))
    assert (read.num_classes, read.num_tasks) == (10, 2)
    assert read.run == read_run(config)
    assert read.config["target_modules"] == "qkv+proj" and read.config["eval_batch_size"] == 16
    kept = ("metrics", "seconds", "parameters", "step_flops", "bytes", "mask_density", "sha256")
    for name in kept:
        assert getattr(read, name) == manifest[name]
    again = written("task", read) | {"sha256": dict(read.sha256)}
    assert read_task(again) == read


def test_the_first_manifests_of_format_0_open(manifest):
    """Those from before sizes, drift and densities were written down, and shots were named."""
    rows = [{"correct": 3, "task_correct": 4, "total": 5}]
    listed = [row | {"identified": [0, 5, 0]} for row in rows]
    manifest |= {"metrics": {"batch_vote/gradient_id": rows, "oracle/task_given": listed}}
    manifest["config"]["shots"] = 0
    manifest["parameters"] = {"adapter": 10, "shared": 4}
    for key in ("step_flops", "weight_drift", "mask_density", "bytes"):
        del manifest[key]
    read = read_task(manifest)
    assert read.metrics == {
        "batch_vote/gradient_id_all": [rows[0] | {"identified": {}}],
        "oracle/task_given": [rows[0] | {"identified": {"1": 5}}],
    }
    assert (read.step_flops, read.weight_drift, read.mask_density) == (None, {}, {})
    assert read.parameters == {"adapter": 10, "shared": 4, "fixed": 0}
    nothing = {"statistics": 0, "memory": 0, "exemplars": 0}
    assert read.bytes == {"adapter": 40, "shared": 16} | nothing


def test_a_manifest_of_format_0_without_its_run_is_refused(manifest):
    del manifest["run"]
    with pytest.raises(UserError, match="tasks/001: run is missing"):
        read_task(manifest)
    with pytest.raises(UserError, match="tasks/001: it is not what its format says"):
        read_task(manifest | {"run": {}, "config": None})


def test_a_training_state_of_format_0_says_no_run():
    data = {"task": 1, "step": 3, "seconds": 0.5, "sha256": {}}
    data = formats.upgrade("training", data, "training/001-000003")
    assert TrainingManifest.from_json(data, "here").run_fingerprint is None


# Which runs are the same


def test_a_setting_on_one_side_only_counts_as_its_default_on_the_other():
    there = dataclasses.replace(RECORD, settings={"a": 1, "old": 5, "layers": [1]})
    now, defaults = {"a": 1, "new": "x", "layers": (1,)}, {"old": 5, "new": "x"}
    assert records.differences(there, now, defaults) == []
    assert records.differences(there, now, defaults | {"new": "y"}) == ["new: 'y' there, 'x' now"]
    assert records.differences(there, now, defaults | {"old": 6}) == ["old: 5 there, 6 now"]
    assert records.differences(there, now, {}) == [
        "new: nothing there, 'x' now",
        "old: 5 there, nothing now",
    ]
    assert records.differences(there, now | {"a": 2}, defaults) == ["a: 1 there, 2 now"]


def test_a_setting_that_its_method_does_not_use_is_not_looked_at_in_format_0():
    there = dataclasses.replace(RECORD, settings={"a": 1, "unused": 5})
    assert records.differences(there, {"a": 1}, {"unused": 6}, ignore_unused=True) == []
    assert records.differences(there, {"a": 2}, {}, ignore_unused=True) == ["a: 1 there, 2 now"]
    assert records.differences(there, {"b": 2}, {"b": 3}, ignore_unused=True) == [
        "b: 3 there, 2 now"
    ]


def test_other_hashes_and_other_tasks_are_other_runs():
    other = dataclasses.replace(RECORD, backbone_sha256="b", dataset_sha256="d", tasks=None)
    assert records.origin_differences(RECORD, RECORD) == []
    assert records.origin_differences(RECORD, other) == [
        "backbone_sha256: 'aa' there, 'b' now",
        "dataset_sha256: 'bb' there, 'd' now",
        "classes of the tasks: [[0, 3], [1, 2, 4]] there, the equal split now",
    ]
