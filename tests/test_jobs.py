"""Runs side by side: each in a process and on a device of its own, one failing alone, all stopped
by one signal and continued to the same arrays.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from rich.console import Console

from soft_jax import __main__ as command_line
from soft_jax import commands
from soft_jax.config import Config
from soft_jax.data import sources
from soft_jax.errors import UserError
from soft_jax.evaluation import pictures
from soft_jax.experiment import jobs, loop, planned, seeds
from soft_jax.experiment.jobs import Devices, Job
from soft_jax.experiment.stopping import Preempted
from tests.conftest import COMPILED

# ml_collections imports a config file in a way that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

ROOT = Path(__file__).parent.parent
# A program that starts at once and is Python: what it is given, or for a run its last argument.
FAKE = (
    *(sys.executable, "-S", "-E", "-c"),
    "import json, os, signal, sys, time\n"
    # Also for signals: time.sleep(20) would not see one that comes just before it begins.
    "def until(there):\n"
    "    end = time.monotonic() + 20\n"
    "    while not there() and time.monotonic() < end: time.sleep(0.01)\n"
    "    assert there()\n"
    "given = json.loads(sys.stdin.readline())\n"
    "exec(given if isinstance(given, str) else sys.argv[1])\n",
)
CPU = Devices("cpu", 1)
QUIET = Console(quiet=True)


def fakes(folder, *codes):
    return [Job(f"job {i}", FAKE, code, folder / f"{i}/log.txt") for i, code in enumerate(codes)]


def test_jobs_run_side_by_side_and_one_fails_alone(tmp_path):
    (tmp_path / "meet").mkdir()
    meet = f"open({str(tmp_path / 'meet')!r} + '/' + str(os.getpid()), 'w'); " + (
        f"until(lambda: len(os.listdir({str(tmp_path / 'meet')!r})) == 2)"
    )
    codes = (
        f"{meet}; print('a stray line\\nand one without end', end='', flush=True)",
        f"{meet}; open({str(tmp_path)!r} + '/variables', 'w').write(json.dumps(dict(os.environ)))",
        "raise ValueError('[no] good')",
        "print(json.dumps({'error': 'seed: 1 there,\\n  2 now'}), flush=True); sys.exit(1)",
        "os.kill(os.getpid(), signal.SIGKILL)",
    )
    output = io.StringIO()
    console = Console(file=output, width=80)
    outcomes = jobs.run(fakes(tmp_path, *codes), 2, CPU, console, threading.Event())
    assert outcomes[:2] == [None, None]
    reasons = (
        "ValueError: [no] good",
        "seed: 1 there, 2 now",
        "its process was killed, as the system does where memory runs out",
    )
    for number, reason in enumerate(reasons, 2):
        log = tmp_path / f"{number}/log.txt"
        assert str(outcomes[number]) == f"{reason} (log: {log})"
        assert f"error: job {number}: {reason} (log: {log})\n" in output.getvalue()
    assert "a stray line\nand one without end\n" in (tmp_path / "0/log.txt").read_text()
    assert "Traceback" in (tmp_path / "2/log.txt").read_text()
    variables = json.loads((tmp_path / "variables").read_text())
    assert variables["JAX_NUM_CPU_DEVICES"] == "1"
    # A log goes on, and the reason is of the last time.
    (again,) = jobs.run(fakes(tmp_path, "sys.exit(3)"), 1, CPU, QUIET, threading.Event())
    assert str(again).startswith("its process ended with status 3 (log: ")
    assert "a stray line" in (tmp_path / "0/log.txt").read_text()


def test_a_narrow_terminal_cuts_titles_and_not_what_is_done(tmp_path):
    output = io.StringIO()
    console = Console(file=output, width=80, force_terminal=True)
    title = "row 4, seed 59: DualPrompt-Soft-TF-L[10,11,12] [q,k,v,proj]"
    job = Job(title, FAKE, "pass", tmp_path / "log.txt")
    process = types.SimpleNamespace(what="task 3 of 10: training", done=41, total=418)
    with jobs._Screen(console, 1) as screen:
        screen.begin(0, job)
        screen.show(0, process)
        screen._progress.refresh()
    cut = r"row 4, seed 59: DualPrompt-.*… task 3 of 10: training, 41 of 418 .*0:00:0"
    assert re.search(cut, output.getvalue())
    assert f"1 of 1 begins: {title}; log: {job.log}" in output.getvalue()


def test_what_a_run_can_not_begin_with_is_said(tmp_path):
    """Its log is a link, or its program is not there; the others go on."""
    (tmp_path / "mine").write_text("mine")
    link, none, good = fakes(tmp_path, "pass", "pass", "pass")
    link.log.parent.mkdir()
    link.log.symlink_to(tmp_path / "mine")
    none = dataclasses.replace(none, command=["/nonesuch"])
    outcomes = jobs.run([link, none, good], 1, CPU, QUIET, threading.Event())
    assert str(outcomes[0]).startswith(f"{link.log} can't be written (")
    assert (tmp_path / "mine").read_text() == "mine"
    assert str(outcomes[1]).startswith("its process can't be made (")
    assert outcomes[2] is None


def test_a_log_that_gets_full_ends_nothing():
    process = jobs._Process.__new__(jobs._Process)
    with open("/dev/full", "wb", buffering=0) as process._log:
        process._take(b"a stray line")


def test_a_process_that_tells_much_as_it_ends_is_waited_for(tmp_path):
    """Unread, its pipe would be full, and it would wait without end."""
    code = (
        "signal.alarm(20)\n"
        "def stop(*_):\n"
        "    os.write(1, b'x' * 2**20)\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"open({str(tmp_path / 'began')!r}, 'w')\n"
        "until(lambda: False)"
    )
    process = jobs._Process(fakes(tmp_path, code)[0], 0, 1, CPU)
    with contextlib.suppress(KeyError), jobs._all_ended({0: process}):
        while not (tmp_path / "began").exists():
            assert not process.ended()
        raise KeyError
    assert process._popen.returncode == 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no process is bound to cores")
def test_jobs_on_a_cpu_share_its_cores(tmp_path):
    ours = os.sched_getaffinity(0)
    shares = [jobs.share_of_cores(slot, 2) for slot in range(2)]
    assert set.union(*shares) == ours
    assert len(ours) == 1 or not set.intersection(*shares)
    more = len(ours) + 1
    assert [len(jobs.share_of_cores(slot, more)) for slot in range(more)] == [1] * more
    code = f"open({str(tmp_path / 'cores')!r}, 'w').write(json.dumps([*os.sched_getaffinity(0)]))"
    jobs.run(fakes(tmp_path, code), 2, CPU, QUIET, threading.Event())
    assert set(json.loads((tmp_path / "cores").read_text())) == shares[0]
    assert os.sched_getaffinity(0) == ours


def test_a_chip_is_given_by_its_runtimes_variables(monkeypatch):
    for name in ("TPU_VISIBLE_CHIPS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    third = Devices("tpu", 8).environment(2, 8)
    assert third["TPU_VISIBLE_CHIPS"] == "2"
    assert third["TPU_CHIPS_PER_PROCESS_BOUNDS"] == third["TPU_PROCESS_BOUNDS"] == "1,1,1"
    ports = {Devices("tpu", 8).environment(i, 8)["TPU_MESH_CONTROLLER_PORT"] for i in range(8)}
    assert len(ports) == 8
    assert Devices("gpu", 2).environment(1, 2) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-8932")  # this program may see those alone
    assert Devices("gpu", 2).environment(1, 2) == {"CUDA_VISIBLE_DEVICES": "GPU-8932"}


@pytest.mark.parametrize(
    ("asked", "runs", "devices", "slots"),
    [
        (None, 30, Devices("tpu", 8), 8),
        (None, 3, Devices("tpu", 8), 3),
        (4, 30, Devices("gpu", 8), 4),
        (None, 30, Devices("cpu", 1), 1),
        (4, 30, Devices("cpu", 1), 4),
    ],
)
def test_there_are_as_many_jobs_as_chips(asked, runs, devices, slots):
    assert jobs.at_once(asked, runs, devices) == slots


def test_more_jobs_than_chips_are_refused():
    with pytest.raises(UserError, match=r"^--jobs: 9 is more than the 8 TPU chip.s. of this host"):
        jobs.at_once(9, 30, Devices("tpu", 8))


def test_devices_that_can_not_be_counted_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonesuch")
    (tmp_path / "json.py").write_text("raise SystemExit('another json')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--jobs: the devices .* can't be counted .*nonesuch"):
        jobs.devices_of_host()


def test_without_a_count_runs_go_one_by_one_unless_jobs_are_asked_for(tmp_path, monkeypatch):
    def count():
        raise UserError("--jobs: no [count]")

    monkeypatch.setattr(jobs, "devices_of_host", count)
    monkeypatch.setattr(loop, "run", lambda *_, **__: ["a manifest"])
    runs, output = some_runs(2, tmp_path), io.StringIO()
    assert list(planned.run(runs, Console(file=output), jobs=None)) == [["a manifest"]] * 2
    assert "One run at a time: --jobs: no [count]" in output.getvalue()
    with pytest.raises(UserError, match="--jobs: no"):
        list(planned.run(runs, QUIET, jobs=2))


def some_runs(count, folder):
    return seeds.plan(Config(dataset="digits", tasks=5, backbone="vit_ti8_32"), count, folder)


def test_sigterm_stops_all_and_the_same_call_begins_them_again(tmp_path):
    run, runs = "given['folder']", some_runs(3, tmp_path)
    first = (
        "def stop(*_):\n"
        f"    open({run} + '/stopped', 'w')\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"open({run} + '/began', 'w')\n"
        "if given['config']['seed'] == 59:\n"
        f"    until(lambda: os.path.exists({run}.replace('59', '60') + '/began'))\n"
        "    os.kill(os.getppid(), signal.SIGTERM)\n"
        "until(lambda: False)"
    )
    with pytest.raises(Preempted, match="^Stopped; the same command continues") as stopped:
        list(planned.run(runs, QUIET, jobs=2, program=(*FAKE, first)))
    assert stopped.value.signum == signal.SIGTERM
    assert [(run.folder / "stopped").exists() for run in runs] == [True, True, False]
    assert not runs[2].folder.exists()
    again = planned.run(runs, QUIET, jobs=2, program=(*FAKE, f"open({run} + '/again', 'w')"))
    assert [str(outcome) for outcome in again] == [
        f"its process ended without a word (log: {run.folder / 'log.txt'})" for run in runs
    ]
    assert all((run.folder / "again").exists() for run in runs)


def test_a_second_ctrl_c_kills_what_does_not_stop(tmp_path):
    stubborn = (
        "ctrl_c = given['config']['seed'] == 59\n"
        "def again(*_):\n"
        "    if ctrl_c: os.kill(os.getppid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGTERM, again)\n"
        "if ctrl_c: os.kill(os.getppid(), signal.SIGINT)\n"
        "until(lambda: False)"
    )
    output = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        list(
            planned.run(
                some_runs(2, tmp_path), Console(file=output), jobs=2, program=(*FAKE, stubborn)
            )
        )
    assert "stopping 2 run(s), which save their states; Ctrl-C kills them" in output.getvalue()


def test_who_starts_runs_never_starts_a_backend(tmp_path):
    """It would hold the accelerator. Here, a backend of its own would be an error."""
    code = (
        "import os, sys, jax\n"
        "os.environ['JAX_PLATFORMS'] = 'cpu'\n"
        "from pathlib import Path\n"
        "from rich.console import Console\n"
        "from soft_jax.config import Config\n"
        "from soft_jax.experiment import planned, seeds\n"
        "config = Config(dataset='digits', tasks=5, backbone='vit_ti8_32')\n"
        f"runs = seeds.plan(config, 2, Path({str(tmp_path)!r}))\n"
        "program = (sys.executable, '-S', '-c', 'raise SystemExit(5)')\n"
        "outcomes = planned.run(runs, Console(quiet=True), jobs=2, program=program)\n"
        "print([str(each).split(' (')[0] for each in outcomes])\n"
        "try: jax.devices()\n"
        "except RuntimeError: print('none yet')\n"
    )
    alone = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "nonesuch"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.stdout == f"{['its process ended with status 5'] * 2}\nnone yet\n", alone.stderr


# Two tasks of two steps, without masks: the smallest run that has a past and a future.
SMALL = (
    "digits:tasks=2,epochs=1,batch_size=20,train_images_per_class=8,test_images_per_class=4,"
    "eval_batch_size=20,checkpoint_every=1,method=head,prototype_features=20"
)


def contents(run):
    """Hash of every array and the counts of every protocol, by task, as they are on disk."""
    return [(manifest.sha256, manifest.metrics) for manifest in planned.finished(run)]


def test_seeds_side_by_side_are_those_one_after_the_other(tmp_path, monkeypatch, capsys):
    """As hashes of arrays and as counts, though they were stopped; the command takes their mean."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", COMPILED)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    flags = [f"--config={SMALL}", "--seeds=2", f"--workdir={tmp_path / 'side'}"]
    config = commands.read_config(flags[:1], commands.TRAIN_FLAGS)
    in_turn, side = (seeds.plan(config, 2, tmp_path / name) for name in ("turn", "side"))
    drive = (sys.executable, "-m", "tests.drive", "none")
    subprocess.run(
        [*drive, *flags[:2], f"--workdir={tmp_path / 'turn'}"],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},  # as each of those side by side has
        check=True,
    )
    with pytest.raises(Preempted):
        list(planned.run(side, QUIET, jobs=2, program=(*drive[:-1], "parent-step:1:0")))
    assert any("continues" in (run.folder / "log.txt").read_text() for run in side)
    assert not all(map(planned.finished, side))
    list(planned.run(side, QUIET, jobs=2, program=drive))
    assert list(map(contents, side)) == list(map(contents, in_turn))
    assert all(sha256 for sha256, _ in contents(side[0]))
    assert "1 cpu device(s)" in (side[1].folder / "log.txt").read_text()
    # One of them was killed after its last task, before its lines and its report.
    lines, page = (side[0].folder / name for name in ("results.jsonl", "report.md"))
    whole = lines.read_bytes(), page.read_bytes()
    lines.write_bytes(b"".join(whole[0].splitlines(True)[:-1]))
    page.unlink()
    # The command finds them finished, and reads no images.
    monkeypatch.setattr(sources, "load", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(pictures, "draw", lambda *_: [])  # as in tests.drive
    capsys.readouterr()
    assert command_line.main(["train", *flags]) == 0
    output = capsys.readouterr().out
    assert (lines.read_bytes(), page.read_bytes()) == whole
    found = json.loads((tmp_path / "side/seeds.json").read_text())
    figure = found["figures"]["test"]["oracle/task_given"]["final_average"]
    first, second = figure["each"]
    assert figure["mean"] == pytest.approx((first + second) / 2)
    assert figure["deviation"] == pytest.approx(abs(first - second) / 2**0.5)
    cell = f"{figure['mean']:.2f} ± {figure['deviation']:.2f}"
    table = (tmp_path / "side/seeds.md").read_text()
    assert re.search(rf"\| TIL oracle, task given +\| +{re.escape(cell)} \|", table)
    assert f"{table}\n" in output
    assert (found["seeds"], found["format"]) == ([59, 60], 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds=0"], "--seeds: '0' is not a whole number from 1 on"),
        (["--seeds=x"], "--seeds: 'x' is not a whole number from 1 on"),
        (["--seeds=2", "--jobs=0"], "--jobs: '0' is not a whole number from 1 on"),
        (["--jobs=2"], "--jobs: one run has nothing beside it; give --seeds too"),
        (["--seeds=2", "--distributed=auto"], "--seeds, --distributed: take one of them"),
        (["--seeds=2", "--config.density=0.5"], "density: 0.5 has no effect"),
        (["--seeds=2", "--config.seed=2147483647"], "seed: 2147483648 is not below 2**31"),
    ],
)
def test_what_can_not_be_run_is_said_before_anything_runs(tmp_path, capsys, flags, message):
    assert command_line.main(["train", *flags, f"--workdir={tmp_path / 'run'}"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


def test_a_runs_own_folder_is_not_the_folder_of_seeds(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert command_line.main(["train", "--seeds=2", f"--workdir={tmp_path}"]) == 1
    assert "is the folder of a run or library" in capsys.readouterr().err
