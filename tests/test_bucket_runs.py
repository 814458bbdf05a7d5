"""Several runs in a bucket, several programs for one of them, and several hosts that are one.

What is interrupted here has to equal, array for array, what the same command does on a disk.
"""

import contextlib
import functools
import io
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import time
from http import HTTPStatus
from pathlib import Path

import pytest

from soft_jax import __main__ as command_line
from soft_jax import cache
from soft_jax.experiment import loop, planned
from soft_jax.paper import rows as rows_lib
from soft_jax.store import bucket_lock
from soft_jax.store.folder import Reader
from tests.conftest import COMPILED, hardly_optimized, tiny_world
from tests.emulator import lock, url
from tests.test_hosts import together

# ml_collections reads config files by a function that Python deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
    pytest.mark.usefixtures("calm_after"),
]

ROOT = Path(__file__).parent.parent
TINY = (sys.executable, "-m", "tests.tiny_command")
# Of two tasks of five digits, two steps each.
SETTINGS = (
    "dataset=digits,backbone=vit_ti8_32,train_images_per_class=4,test_images_per_class=4,epochs=1,"
    "batch_size=10,eval_batch_size=20,checkpoint_every=1,prototype_features=20,crop_scale=0.85-1,"
    "flip=false"
)
CONFIG = f"--config=digits:{SETTINGS},method=head,tasks=2"


@pytest.fixture(scope="module", autouse=True)
def _world(backbone):
    with pytest.MonkeyPatch.context() as patch, tiny_world(backbone, patch), hardly_optimized():
        patch.setenv("SOFT_JAX_TESTS_COMPILED", COMPILED)
        yield


@pytest.fixture(autouse=True)
def _logs(tmp_path, monkeypatch):
    """Keep logs of runs side by side, which a bucket can't take, out of the user's cache."""
    monkeypatch.setattr(cache, "CACHE", str(tmp_path / "cache"))


def side_by_side(monkeypatch, moment: str = "none") -> None:
    """Have runs side by side run in the tiny world too, and strike at `moment`."""
    run = functools.partial(planned.run, program=(*TINY, moment))
    monkeypatch.setattr(planned, "run", run)


def start(moment: str, *arguments: str) -> subprocess.Popen:
    """Start a command in a program of its own."""
    return subprocess.Popen(
        [*TINY, moment, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def struck(moment: str, *arguments: str, expect: int) -> str:
    """Return what a command printed until `moment` ended it."""
    with start(moment, *arguments) as program:
        printed, _ = program.communicate(timeout=300)
    assert program.returncode == expect, printed[-4000:]
    return printed


def contents(folder: str | Path):
    """Hash of every array and the counts of every protocol, by task."""
    reader = Reader(folder)
    manifests = [reader.load_task_manifest(task) for task in range(2)]
    return [(manifest.sha256, manifest.metrics, manifest.validation) for manifest in manifests]


def table_rows(text: str) -> list[list[str]]:
    """The cells of a text's first table."""
    first = text[text.index("\n|") :].split("\n\n", 1)[0]
    rows = [row for row in first.splitlines() if row.startswith("| ")]
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows]


@contextlib.contextmanager
def nothing_done(emulator, *but: str):
    """Within, no run is begun, and nothing is written to the bucket but the objects `but`."""
    written = []

    def watch(method: str, name: str) -> None:
        if method != "GET" and name not in but:
            written.append((method, name))

    emulator.before = watch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run", lambda *_, **__: pytest.fail("a run was begun"))
        yield
    emulator.calm()
    assert not written


def check_nothing_is_left(emulator, folder: str):
    """Neither locks, nor states, nor anything half done."""
    there = [name for name in emulator.objects if name.startswith(f"{folder}/")]
    ends, within = (".lock", ".partial"), "/training/"
    assert there
    assert not [name for name in there if name.endswith(ends) or within in name]


# Several runs


def test_a_table_in_a_bucket(emulator, tmp_path, monkeypatch, capsys):
    """Side by side, of which one fails alone; then that one; then none. As on a disk."""
    rows = {f"order {seed}": {"method": "head", "class_order_seed": seed} for seed in (1, 2)}
    monkeypatch.setitem(rows_lib.OWN, "two", ("Two", rows))
    command = ["table", "two", f"--set={SETTINGS},tasks=2"]
    assert command_line.main([*command, f"--workdir={tmp_path / 'tables'}"]) == 0
    on_disk = table_rows(capsys.readouterr().out)
    folders = {
        Reader(folder).read_record().settings["class_order_seed"]: folder.relative_to(tmp_path)
        for folder in tmp_path.glob("tables/*/seed*")
    }
    first, second = str(folders[1]), str(folders[2])

    command += [f"--workdir={url('tables')}", f"--output={url('new/t.md')}"]
    side_by_side(monkeypatch)
    emulator.put(f"{second}/.lock", lock())
    assert command_line.main([*command, "--jobs=2"]) == 1
    printed = capsys.readouterr().out
    held = f"workdir: another process is running in {url(second)} (process 7 on elsewhere"
    assert f"| 2 | order 2 | failed: {held}" in printed
    assert f"error: row 2, seed 59: order 2: {held}" in printed
    assert printed.endswith(emulator.objects["new/t.md"].decode() + "\n")
    assert table_rows(printed)[:-1] == [row for row in on_disk if row[0] != "2"]
    assert [name for name in emulator.objects if second in name] == [f"{second}/.lock"]

    finished = {name: emulator.generation(name) for name in emulator.objects if first in name}
    assert f"{first}/tasks/001/commit_success.txt" in finished
    emulator.put(f"{second}/.lock", lock(time=time.time() - bucket_lock.STALE - 1))
    without, replaced = emulator.objects["new/t.md"], []

    def look(method: str, name: str) -> None:
        if method != "GET" and name == "new/t.md":
            replaced.append(emulator.objects[name])

    emulator.before = look
    assert command_line.main(command) == 0
    emulator.calm()
    table, printed = emulator.objects["new/t.md"], capsys.readouterr().out
    assert set(replaced) == {without}  # at once, by the whole table
    assert printed.endswith(table.decode() + "\n")
    assert table_rows(printed) == on_disk
    assert finished == {name: emulator.generation(name) for name in finished}
    check_nothing_is_left(emulator, "tables")

    def refuse(method: str, name: str) -> HTTPStatus | None:
        return HTTPStatus.FORBIDDEN if method != "GET" and name == "new/t.md" else None

    emulator.before = refuse
    assert command_line.main(command) == 1
    assert f"error: {url('new/t.md')} could not be written (" in capsys.readouterr().err
    assert emulator.objects["new/t.md"] == table

    def hide(method: str, name: str) -> HTTPStatus | None:  # an upper bound of another table
        return HTTPStatus.FORBIDDEN if name.startswith("tables/ft-") else None

    emulator.before = hide
    assert command_line.main(command) == 1
    assert f"error: workdir: {url('tables/ft-')}" in capsys.readouterr().err
    assert emulator.objects["new/t.md"] == table
    with nothing_done(emulator, "new/t.md"):
        assert command_line.main([*command, "--jobs=2"]) == 0
    assert capsys.readouterr().out.encode() == table + b"\n"
    assert emulator.objects["new/t.md"] == table


@pytest.fixture(scope="module")
def on_disk(_world, tmp_path_factory):
    """The folder of two seeds that were run on a disk, undisturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "seeds"
    with contextlib.redirect_stdout(io.StringIO()):
        assert command_line.main(["train", CONFIG, "--seeds=2", f"--workdir={workdir}"]) == 0
    return workdir


def test_seeds_in_a_bucket(on_disk, emulator, monkeypatch, capsys):
    """Killed, then stopped while they go side by side, and continued."""
    command = ["train", CONFIG, "--seeds=2", f"--workdir={url('seeds')}"]
    struck("kill-step:1:1", *command, expect=-signal.SIGKILL)
    assert Reader(url("seeds/seed59")).present() == [0]
    assert Reader(url("seeds/seed60")).present() == []
    side_by_side(monkeypatch, "parent-step:1:1")
    assert command_line.main([*command, "--jobs=2"]) == 128 + signal.SIGTERM
    assert "Stopped; the same command continues" in capsys.readouterr().err
    (log,) = cache.on_disk().glob(f"logs/**/seeds/seed59/{planned.LOG}")
    assert "Task 2 continues after step 1" in log.read_text()
    assert "seeds/seeds.md" not in emulator.objects
    assert command_line.main(command) == 0
    for seed in ("seed59", "seed60"):
        assert contents(url("seeds", seed)) == contents(on_disk / seed)
    found = emulator.objects["seeds/seeds.json"]
    assert json.loads(found) == json.loads((on_disk / "seeds.json").read_text())
    text = emulator.objects["seeds/seeds.md"].decode()
    assert f"{text}\nWritten to {url('seeds/seeds.md')} and" in capsys.readouterr().out
    assert table_rows(text) == table_rows((on_disk / "seeds.md").read_text())
    check_nothing_is_left(emulator, "seeds")
    with nothing_done(emulator, "seeds/seeds.json", "seeds/seeds.md"):
        assert command_line.main(command) == 0
    assert emulator.objects["seeds/seeds.json"] == found


def test_a_sweep_in_a_bucket(emulator, tmp_path, capsys):
    """Stopped by SIGTERM, and continued."""
    command = ["sweep", CONFIG, "--config.validation=0.25", "--set=epochs=1,2"]
    assert command_line.main([*command, f"--workdir={tmp_path / 'sweeps'}"]) == 0
    on_disk = capsys.readouterr().out
    command += [f"--workdir={url('sweeps')}", f"--output={url('sweep.md')}"]
    stopped = struck("term-step:1:0", *command, expect=128 + signal.SIGTERM)
    assert "Stopped after step 1 of task 2; the same command continues" in stopped
    assert "sweep.md" not in emulator.objects
    assert command_line.main(command) == 0
    printed = capsys.readouterr().out
    assert "Task 2 continues after step 1" in printed
    table = emulator.objects["sweep.md"]
    assert printed.endswith(table.decode() + "\n")
    assert len(table_rows(printed)) == 3
    chosen = printed[printed.index("\n| epochs") :]
    assert on_disk.endswith(chosen)
    for folder in tmp_path.glob("sweeps/*/seed59"):
        assert contents(folder) == contents(url(str(folder.relative_to(tmp_path))))
    check_nothing_is_left(emulator, "sweeps")
    with nothing_done(emulator, "sweep.md"):
        assert command_line.main(command) == 0
    assert emulator.objects["sweep.md"] == table


def test_a_scenario_file_in_a_bucket(emulator, tmp_path, capsys):
    file = url("lists/tasks.json")
    command = ["train", f"--config=digits:{SETTINGS},method=head,scenario=file"]
    command += [f"--config.scenario_file={file}"]

    def check_refused(why: str) -> None:
        before = emulator.objects
        for workdir in (url("listed"), str(tmp_path / "listed")):
            assert command_line.main([*command, f"--workdir={workdir}"]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: scenario_file: {file} can't be read (")
            assert why in line
        assert emulator.objects == before
        assert not list(tmp_path.iterdir())

    check_refused("No such file")
    emulator.put("lists/tasks.json", b"[[")
    check_refused("Expecting value")
    emulator.before = lambda _, name: HTTPStatus.FORBIDDEN if "lists" in name else None
    check_refused("Forbidden")
    emulator.calm()

    emulator.put("lists/tasks.json", b'[["7", 2, 0, 9, 1], [5, 6, 3, 4, 8]]')
    command += [f"--workdir={url('listed')}"]
    assert command_line.main(command) == 0
    reader = Reader(url("listed"))
    assert [reader.load_task_manifest(task).classes for task in reader.present()] == [
        (7, 2, 0, 9, 1),
        (5, 6, 3, 4, 8),
    ]
    capsys.readouterr()
    assert command_line.main(command) == 0
    assert "2 of 2 tasks are finished" in capsys.readouterr().out
    emulator.put("lists/tasks.json", b'[["7", 2, 0, 9], [5, 6, 3, 4, 8]]')
    assert command_line.main(command) == 1
    assert (
        "tasks: [[7, 2, 0, 9, 1], [5, 6, 3, 4, 8]] there, [[7, 2, 0, 9], "
        in capsys.readouterr().err
    )


# Several programs, and several hosts


def test_another_host_waits_until_the_lock_of_a_killed_program_is_void(
    on_disk, emulator, monkeypatch, capsys
):
    command = ["train", CONFIG, f"--workdir={url('held')}"]

    def last_heard() -> float:
        return json.loads(emulator.objects["held/.lock"])["time"]

    def check_refused() -> None:
        there = emulator.objects.keys()
        assert command_line.main(command) == 1
        line = capsys.readouterr().err
        holder_is = re.escape(f"process {holder.pid} on {socket.gethostname()}")
        assert re.fullmatch(
            rf"error: workdir: another process is running in {url('held')} \({holder_is}, last "
            r"heard of [0-9]+ s ago\); wait for it, or take another workdir. If it was killed, its "
            r"lock is void after 60 s\n",
            line,
        )
        assert emulator.objects.keys() == there

    holder = start("hold-step:1:1", *command)
    try:
        printed = list(itertools.takewhile("held\n".__ne__, iter(holder.stdout.readline, "")))
        assert holder.poll() is None, "".join(printed)
        heard, deadline = last_heard(), time.monotonic() + 20
        while last_heard() == heard:  # it keeps its lock alive
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # This program is another host's: it can't see whether the other is still there.
        monkeypatch.setattr(bucket_lock, "_machine", lambda: "another")
        check_refused()
    finally:
        holder.kill()
        holder.communicate()
    check_refused()
    monkeypatch.setattr(bucket_lock, "STALE", 0.5)
    time.sleep(max(0.0, last_heard() + 0.6 - time.time()))
    assert command_line.main(command) == 0
    assert "Task 2 continues after step 1" in capsys.readouterr().out
    assert contents(url("held")) == contents(on_disk / "seed59")
    check_nothing_is_left(emulator, "held")


def test_two_hosts_with_a_workdir_in_a_bucket(emulator, tmp_path):
    """Each dies once in a save, which ends the other; continued to the bit what one process does
    on a disk.
    """
    together(str(tmp_path / "one"), "none", method="head")

    def run(dies: int) -> list[str]:
        def die(hosts) -> None:
            def strike(method: str, name: str) -> None:
                if method != "GET" and name.startswith("hosts/tasks/000/shared/"):
                    hosts[dies].kill()

            emulator.before = strike

        ends = [-signal.SIGABRT, -signal.SIGABRT]
        ends[dies] = -signal.SIGKILL
        outputs = together(url("hosts"), "none", "none", method="head", expect=ends, begun=die)
        emulator.calm()
        assert Reader(url("hosts")).present() == []  # nothing half done is taken for a task
        assert "another task died" in outputs[1 - dies]
        return outputs

    run(dies=1)
    assert "Task 1 continues after step 6" in run(dies=0)[0]
    first, second = together(url("hosts"), "none", "none", method="head")
    assert "Task 1 continues after step 6" in first
    assert f"Report: {url('hosts/report.md')}" in first
    assert "TIL oracle" not in second
    assert contents(url("hosts")) == contents(tmp_path / "one")
    assert "hosts/report.md" in emulator.objects
    check_nothing_is_left(emulator, "hosts")
