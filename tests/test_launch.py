"""The program as a user runs it: real images, the bundled backbone, and everything that can go
wrong on the way.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from soft_jax import __main__ as command_line
from soft_jax import distributed
from soft_jax.data import sources
from soft_jax.store import checkpoint, folder
from tests.conftest import COMPILED

ROOT = Path(__file__).parent.parent
# Two tasks of five digits, six steps each: the smallest run that has a past and a future.
SMALL = (
    "--config=configs/digits.py:tasks=2,epochs=1,batch_size=60,train_images_per_class=72,test_images_per_class=18,"
    "eval_batch_size=64,checkpoint_every=2,mask_layers=10-12,target_modules=qkv+proj,g_prompt_layers=1-2,"
    "learning_rate=0.03,crop_scale=0.6-1,cache_queries=false,prototype_features=500",
)


@pytest.fixture(scope="session")
def environment():
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": COMPILED,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "COLUMNS": "80",
    }


@pytest.fixture(scope="session")
def launch(environment):
    def run(*args, moment=None, expect=0, program=("launch.py",), devices=2):
        program = program if moment is None else ["-m", "tests.drive", moment]
        within = environment | {"JAX_NUM_CPU_DEVICES": str(devices)}
        done = subprocess.run(
            [sys.executable, *program, *args],
            cwd=ROOT,
            env=within,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def launch_two(environment):
    """Two processes with a device each, in one run; their outputs."""

    def run(*args, expect):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        program = [sys.executable, "-m", "tests.drive", "none"]
        alone = environment | {"JAX_NUM_CPU_DEVICES": "1"}
        pipes = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "cwd": ROOT,
            "env": alone,
        }
        where = [f"--distributed={address},{index},2" for index in range(2)]
        both = [subprocess.Popen([*program, *args, here], **pipes) for here in where]
        outputs = [process.communicate(timeout=300)[0] for process in both]
        assert [process.returncode for process in both] == [expect, expect], (
            outputs[0][-3000:] + outputs[1][-3000:]
        )
        return outputs

    return run


def contents(workdir):
    """Hash of every array and the counts of every protocol, by task: all that a run amounts to."""
    manifests = [
        json.loads((path / "manifest" / "metadata").read_text())
        for path in sorted((workdir / "tasks").iterdir())
    ]
    return [(m["sha256"], m["metrics"]) for m in manifests]


@pytest.fixture(scope="session")
def finished(launch, tmp_path_factory):
    """A run that nothing disturbed, and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, launch(*SMALL, "--config.tensorboard=True", f"--workdir={workdir}")


def test_a_run_and_its_results(finished):
    workdir, output = finished
    for identified in ("Prompt ID", "Gradient ID", "prototype"):
        assert f"CIL per_sample, {identified}" in output
    for row in (
        "CIL batch_vote, Prompt ID *",
        "CIL batch_vote, Gradient ID, 7",
        "TIL oracle, task given",
        "Time:",
    ):
        assert row in output
    rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert [(r["tasks_trained"], r["protocol"], r["task_id"]) for r in rows[:8]] == [
        (1, "per_sample", "prompt_id"),
        (1, "per_sample", "gradient_id"),
        (1, "per_sample", "prototype"),
        (1, "per_sample", "frozen_features"),
        (1, "batch_vote", "prompt_id"),
        (1, "batch_vote", "gradient_id_7"),
        (1, "oracle", "task_given"),
        (1, "oracle", "frozen_features"),
    ]
    assert len(rows) == 16
    assert rows[10]["task_id"] == "prototype"
    assert rows[10]["task_id_accuracy"] > 80  # the random keys of so short a run name about half
    assert rows[10]["final_average"] > 70
    assert rows[-1]["images"] == 180  # every test digit of them, once
    assert rows[-2]["final_average"] > 30  # it learned: chance is 20
    report = (workdir / "report.md").read_text()
    parameters = json.loads((workdir / "tasks/000/manifest/metadata").read_text())["parameters"]
    # Masks on q,k,v,proj of three layers, an E-prompt of length 5 in them, a key; G-prompts in two
    # layers and the classifier.
    assert parameters["adapter"] == 3 * (192 * 576 + 192 * 192) + 3 * 2 * 5 * 192 + 192
    assert parameters["shared"] == 2 * 2 * 5 * 192 + 192 * 10 + 10
    assert f"{parameters['adapter']:,}" in report
    # Statistics: the upper triangle of a 500 × 500 matrix, sums and counts of five classes.
    assert (
        f"{4 * (500 * 501 // 2 + 5 * 500 + 5):,} statistics for prototype task identity" in report
    )
    for picture in (
        "accuracy_matrix.png",
        "accuracy_and_forgetting.png",
        "mask_distance.png",
        "mask_density.png",
        "task_confusion.png",
    ):
        assert (workdir / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in report
    manifest = json.loads((workdir / "tasks/001/manifest/metadata").read_text())
    drifts = manifest["weight_drift"]
    assert len(drifts) == 6  # q,k,v and proj of three layers
    assert all(
        0 < drift < 0.1 for drift in drifts.values()
    )  # masks from U(0.99, 1), six steps of at most 0.014 each
    assert manifest["step_flops"] > 1e9
    assert manifest["classes"] == [5, 6, 7, 8, 9]
    assert (
        manifest["backbone"]["sha256"]
        == "222bec5caee26212771e6aa3754dd06608afa4fd23dcf792b1be87d20ada43de"
    )
    assert manifest["config"]["epochs"] == 1
    assert "jax" in manifest["versions"]
    assert not any("backbone" in path.name for path in (workdir / "tasks/000/adapter").iterdir())
    assert list((workdir / "tensorboard/task_2").glob("events*"))


def test_its_images_are_predicted(finished, launch, tmp_path):
    """From files, by the command line, as evaluation counted them."""
    workdir, _ = finished
    test = sources.load("digits").test
    for index in range(0, 60, 6):
        Image.fromarray(test.images[index]).save(tmp_path / f"{index:02d}.png")
    output = launch(
        "predict",
        str(workdir),
        str(tmp_path),
        "--json",
        "--task-id=prototype",
        program=("-m", "soft_jax"),
    )
    rows = [json.loads(line) for line in output.splitlines()]
    assert [Path(row["file"]).name for row in rows] == [
        f"{index:02d}.png" for index in range(0, 60, 6)
    ]
    assert (
        sum(
            int(row["class"]) == test.labels[index]
            for row, index in zip(rows, range(0, 60, 6), strict=True)
        )
        >= 7
    )
    output = launch("predict", str(tmp_path), str(tmp_path), program=("-m", "soft_jax"), expect=1)
    assert output.startswith(f"error: workdir: {tmp_path} holds no run")
    assert len(output.splitlines()) == 1


def test_a_finished_run_prints_its_table_again(finished, launch):
    workdir, _ = finished
    before = contents(workdir)
    output = launch(*SMALL, f"--workdir={workdir}", moment="none")
    assert "2 of 2 tasks are finished" in output
    assert "TIL oracle" in output
    assert contents(workdir) == before


@pytest.mark.parametrize(
    "moments",
    [
        # The moment of the strike, and what the run says of the one before it.
        (
            ("kill-step:0:3", ""),
            ("kill-save:001-000004", "Task 1 continues after step 2"),
            ("kill-evaluate:1", "Task 2 continues after step 2"),
        ),
        (
            ("kill-save:000-000002", ""),
            ("kill-save:tasks/000", ""),
            ("int-step:1:2", "Task 1 continues after step 6"),
        ),
    ],
)
def test_killed_and_continued_is_the_same_run(finished, launch, tmp_path, moments):
    """SIGKILL in training, in a save and in evaluation, Ctrl-C in training: same arrays to the
    bit, same counts.
    """
    for moment, continues in moments:
        ended = 128 + signal.SIGINT if moment.startswith("int") else -signal.SIGKILL
        output = launch(*SMALL, f"--workdir={tmp_path}", moment=moment, expect=ended)
        if continues:
            assert continues in output
        if moment.startswith("int"):
            assert "Stopped after step 4 of task 2; the same command continues" in output
    output = launch(*SMALL, f"--workdir={tmp_path}", moment="none")
    assert contents(tmp_path) == contents(finished[0])


def test_what_is_wrong_in_one_process_ends_both(launch_two, tmp_path):
    with closing(folder.Store(tmp_path)):
        first, second = launch_two(*SMALL, f"--workdir={tmp_path}", expect=1)
    assert "another process is running in" in first
    assert "error: another process of this run can't go on; its output says why" in second


def test_eight_devices_are_two(finished, launch, tmp_path):
    """Another number of devices adds up in another order, and does nothing else: the first task,
    as it is before its evaluation.
    """
    output = launch(
        *SMALL, f"--workdir={tmp_path}", moment="kill-evaluate:0", devices=8, expect=-signal.SIGKILL
    )
    assert re.search(r"8\s+cpu\s+device", output)
    (kept,) = (tmp_path / "training").iterdir()
    like = {
        "key": jax.ShapeDtypeStruct((192,), np.float32),
        "prompt": jax.ShapeDtypeStruct((3, 2, 5, 3, 64), np.float32),
    }
    whole = distributed.replicated(distributed.data_mesh(jax.devices()[:1]))
    template = {"state": {"trainable": {"adapter": like}}}
    hashes = checkpoint.load_manifest(kept)["sha256"]
    items = checkpoint.load_items(kept, hashes, template, whole, part=True)
    ours = items["state"]["trainable"]["adapter"]
    theirs = folder.Reader(finished[0]).load_task(0, {"adapter": like}, whole, part=True)[0][
        "adapter"
    ]
    for name in like:
        np.testing.assert_allclose(ours[name], theirs[name], atol=2e-4)


def test_a_damaged_training_state_costs_steps_not_the_run(finished, launch, tmp_path):
    launch(*SMALL, f"--workdir={tmp_path}", moment="kill-step:0:3", expect=-signal.SIGKILL)
    (kept,) = (tmp_path / "training").iterdir()
    chunk = next(
        path
        for path in sorted((kept / "state").rglob("*"))
        if path.is_file() and "key" in path.parent.name and path.name == "0"
    )
    chunk.write_bytes(chunk.read_bytes()[:-3])
    output = launch(*SMALL, f"--workdir={tmp_path}", moment="none")
    assert "The kept training state can't be used" in output
    assert contents(tmp_path) == contents(finished[0])


def test_a_loss_that_is_not_finite_stops_the_run(launch, tmp_path):
    output = launch(*SMALL, f"--workdir={tmp_path}", moment="nan-step:1:3", expect=1)
    assert (
        "error: task 2, step 4: loss is nan; training stopped, finished tasks are as they were"
        in output
    )
    assert len(contents(tmp_path)) == 1


def test_a_damaged_task_is_named_and_nothing_is_lost(finished, launch, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    chunk = next((tmp_path / "copy/tasks/000/adapter/key").glob("0"))
    bad = bytearray(chunk.read_bytes())
    bad[len(bad) // 2] ^= 4
    chunk.write_bytes(bad)
    output = launch(*SMALL, f"--workdir={tmp_path / 'copy'}", expect=1)
    assert re.search(
        r"error: .*tasks/000: array adapter/key .*restore this folder from a copy", output
    )
    assert len(contents(tmp_path / "copy")) == 2


def test_another_config_is_refused(finished, launch):
    workdir, _ = finished
    before = contents(workdir)
    output = launch(*SMALL, f"--workdir={workdir}", "--config.seed=7", expect=1)
    assert "holds a run of another config" in output
    assert "seed: 59 there, 7 now" in output
    assert contents(workdir) == before


# What is told in a process of its own: the program's own exit, what ends the process at once, and
# imports that warn.
BY_ITSELF = ("tasks=3", "--distributed", "nonesuch")


@pytest.mark.filterwarnings("ignore:the load_module")  # by which ml_collections reads a config
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=configs/digits.py:tasks=3"],
            "error: tasks: 10 classes can't be divided into 3 equal tasks",
        ),
        (
            ["--config.mask_layers=(12,13)"],
            "error: mask_layers: layer 13 is not one of vit_ti8_32's layers 1 to 12",
        ),
        (["--config.backbone=vit_b99"], "error: backbone: 'vit_b99' is unknown"),
        (
            ["--config.backbone_path=/nowhere/x.npz"],
            "error: backbone_path: no file at /nowhere/x.npz",
        ),
        (["--config.image_size=30"], "error: image_size: image_size 30 is not a multiple"),
        (["--config.dataset=nonesuch"], "error: dataset: TFDS does not know 'nonesuch'"),
        (
            ["--config=configs/digits.py:task=3"],
            "error: --config: config argument: key 'task' is unknown; did you mean 'tasks'?",
        ),
        (["--config=configs/none.py"], "error: --config: "),
        (["--config.epochs=many"], "error: flag --config.epochs=many: "),
        (["--config.epoch=3"], "setting 'epoch' is unknown; did you mean 'epochs'?"),
        (["--workdir=/proc/here"], "error: workdir: /proc/here can't be written"),
        (["--distributed=here"], "error: distributed: 'here': "),
    ],
)
def test_bad_input_is_one_clear_error(launch, tmp_path, capsys, arguments, message):
    if not any(a.startswith("--workdir") for a in arguments):
        arguments = [*arguments, f"--workdir={tmp_path / 'run'}"]
    if any(name in arguments[0] for name in BY_ITSELF):
        output = launch(*arguments, expect=1)
    else:
        assert command_line.main(["train", *arguments]) == 1
        output = "".join(capsys.readouterr())
    assert message in output
    assert "Traceback" not in output
    assert not list((tmp_path).glob("run/tasks/*"))


def test_the_bundled_backbone_is_the_documented_file():
    file = ROOT / "soft_jax/assets/vit_ti8_32.npz"
    assert hashlib.sha256(file.read_bytes()).hexdigest().startswith("222bec5c")
