"""A run's folder in a bucket, held by one process at a time by an object `.lock` in it.

The object is written only where there is none, which the storage sees to (if-generation-match 0),
and says who holds the folder: host, process, and when. The holder writes it anew every `REFRESH`
seconds, and only over what it wrote itself. A lock that is `STALE` seconds old is void: its holder
was killed, or is cut off from the bucket; so is, at once, that of a process of this machine that is
no more, where the machine is known (on Linux). Who takes a void lock over writes it over what was
read, so that of two that try one gets it; and a holder that was only slow finds that out at the
next refresh, or before or after its next save.

Hosts' clocks have to agree to within a few seconds, as those of cloud machines do.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from soft_jax.buckets import BucketPath, check_reachable
from soft_jax.errors import UserError
from soft_jax.store import formats

FILE = ".lock"
REFRESH = 15.0  # seconds between two signs of life
STALE = 60.0  # seconds without one after which a lock is void
# Tries of a request that fails for a reason that may pass, such as a lost connection: about half a
# minute in all, as gcsfs has it. TensorStore's default is a quarter of an hour.
PATIENCE = {"gcs_request_retries": {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}}


def kvstore(path: BucketPath) -> dict[str, Any]:
    """Return how TensorStore calls a path in a bucket."""
    return {"driver": "gcs", "bucket": path.bucket, "path": path.key}


def _machine() -> str:
    """Return what this process shares with those whose numbers it can look up; "" if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return ""


_ours: set[str] = set()  # the tokens of the locks that this process holds


def _is_running(lock: Mapping[str, Any]) -> bool:
    """Return whether the process of this machine that wrote a lock may still hold it."""
    if lock["process"] == os.getpid():
        return lock["token"] in _ours
    try:
        os.kill(lock["process"], 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


class BucketLock:
    """A folder in a bucket that is locked, and kept so by a thread until it is closed."""

    def __init__(self, root: BucketPath):
        """Lock `root`. Raises OSError where it can't be written, UserError where it is held."""
        import tensorstore as ts  # here: who reads images needs only the path of a bucket

        self._root, self._token = root, uuid.uuid4().hex
        self._one_at_a_time, self._closed = threading.Lock(), threading.Event()
        self._taken = False  # by another process, since we were silent
        with _as_os_errors(root):
            check_reachable()
            context = ts.Context(PATIENCE)
            self._object = ts.KvStore.open(kvstore(root / FILE), context=context).result()
            self._generation = self._acquire()
        _ours.add(self._token)
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _acquire(self) -> bytes:
        there = self._object.read("").result()
        self._refuse_held(there.value)
        generation = self._write(there.stamp.generation)
        if generation is None:  # another was faster
            self._refuse_held(self._object.read("").result().value)
            raise OSError("its lock was taken and left again; try once more")
        return generation

    def _refuse_held(self, content: bytes) -> None:
        """Raise UserError where the lock that is there is not void."""
        if not content:  # there is none, or that of a run that was copied from a disk
            return
        where = f"workdir: {self._root / FILE}"
        try:
            data = formats.upgrade("lock", json.loads(content), where)
            age = time.time() - data["time"]
            gone = data["machine"] == _machine() != "" and not _is_running(data)
            holder = f"process {data['process']} on {data['host']}"
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where} is no lock of ours; remove it") from error
        if gone or age > STALE:
            return
        raise UserError(
            f"workdir: another process is running in {self._root} ({holder}, last heard of "
            f"{max(age, 0):.0f} s ago); wait for it, or take another workdir. If it was killed, "
            f"its lock is void after {STALE:.0f} s"
        )

    def _write(self, over: bytes) -> bytes | None:
        """Write the lock over the generation `over`; return its own, None where it isn't there."""
        data = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "machine": _machine(),
            "time": time.time(),
            "token": self._token,
        }
        text = json.dumps(formats.stamped("lock", data))
        written = self._object.write("", text, if_equal=over).result().generation
        if written:
            return written
        # An answer may be lost and the request sent again: then it is ours that is there.
        there = self._object.read("").result()
        ours = there.state == "value" and self._token.encode() in there.value
        return there.stamp.generation if ours else None

    def make(self, folders: Sequence[BucketPath]) -> None:
        """Do nothing: a bucket has no folders to make."""

    def _keep(self) -> None:
        while not self._closed.wait(REFRESH):
            # If the bucket can't be reached, the next time may do.
            with contextlib.suppress(OSError):
                self.check()

    def check(self) -> None:
        """Give a sign of life. Raises OSError where that fails, or another has taken the lock."""
        with self._one_at_a_time, _as_os_errors(self._root):
            if self._closed.is_set():
                return
            generation = None if self._taken else self._write(self._generation)
            self._taken = generation is None
            if self._taken:
                raise OSError("another process has taken its lock")
            self._generation = generation

    def close(self, keep: bool = True) -> None:
        """Let others in."""
        self._closed.set()
        _ours.discard(self._token)
        with self._one_at_a_time, contextlib.suppress(Exception):
            # If it can't be reached, the lock is void by itself before long.
            if not self._taken:
                self._object.write("", None, if_equal=self._generation).result()


@contextlib.contextmanager
def _as_os_errors(root: BucketPath) -> Any:
    """Make OSErrors of TensorStore's own errors."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise OSError(reason) from error
