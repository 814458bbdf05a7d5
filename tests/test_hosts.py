"""Several processes that are one run, as on the hosts of a TPU slice."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import tensorstore

from soft_jax.store import checkpoint

ROOT = Path(__file__).parent.parent


def started(method, workdir, devices, strike, hosts):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.one_host", method, workdir, str(devices), strike, hosts],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def together(workdir, *strikes, method="softtf", expect=0, begun=None):
    """Run processes that share eight devices, one for each strike, to their end; their outputs.

    Soft-TF has masks, and a classifier that the tasks share. `expect` is what they end with, all of
    them or each; `begun` gets the processes when all are started.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    count = len(strikes)
    hosts = [
        started(method, workdir, 8 // count, strike, f"{address},{index},{count}")
        for index, strike in enumerate(strikes)
    ]
    try:
        if begun:
            begun(hosts)
        outputs = [host.communicate(timeout=300)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    ends = [expect] * count if isinstance(expect, int) else expect
    assert [host.returncode for host in hosts] == ends, "\n".join(outputs)[-4000:]
    return outputs


def task(workdir, number):
    """A finished task's arrays by name, and its counts of every protocol."""
    path = workdir / "tasks" / f"{number:03d}"
    manifest = checkpoint.load_manifest(path)
    arrays = {}
    for name in manifest["sha256"]:
        stored = {"driver": "file", "path": str(path / name)}
        opened = tensorstore.open({"driver": "zarr", "kvstore": stored}, read=True)
        arrays[name] = opened.result().read().result()
    return arrays, manifest["metrics"]


def test_four_hosts_are_one_process(tmp_path):
    """Killed in training, one of them stopped by SIGTERM, and continued: to the bit what one
    process with eight devices does.

    The one process joins itself, so that its devices sum by the library that processes sum by,
    Gloo. Without it, jax adds the eight in an order of its own, and the last bits are others.
    """
    together(tmp_path / "one", "none")
    workdir = tmp_path / "four"
    together(workdir, *["KILL:0:2"] * 4, expect=-signal.SIGKILL)
    stopped = together(workdir, "none", "none", "TERM:0:3", "none", expect=128 + signal.SIGTERM)
    assert "Task 1 continues after step 2" in stopped[0]
    assert "8 cpu device(s)" in stopped[0]
    assert all("Stopped after step 4 of task 1" in output for output in stopped)
    first, *others = together(workdir, *["none"] * 4)
    assert "Task 1 continues after step 4" in first
    assert "TIL oracle" in first
    assert not any("TIL oracle" in output for output in others)
    for number in (0, 1):
        (ours, counts), (theirs, same_counts) = (
            task(where, number) for where in (workdir, tmp_path / "one")
        )
        assert counts == same_counts
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name], err_msg=name)
