"""TFDS sets that are not prepared yet: they are downloaded and prepared by a process of its own.

That process can be ended at once, also while it waits for a network that does not answer. And
TensorFlow, which most sets need for being prepared only, stays out of the process that trains. Sets
that only this process knows are prepared in it, by a thread.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import Any
from urllib.parse import urlsplit

from soft_jax.errors import Stopped

FIRST_ANSWER = 15.0  # seconds that a host has for its first answer
SILENCE = 60.0  # seconds that it may be silent later
POLL = 0.2  # seconds between looks at the process, and at whether it shall stop


class PreparationError(Exception):
    """What went wrong in the other process: its exception's type and first line."""


def in_another_process(name: str, data_dir: str, stop: threading.Event | None = None) -> None:
    """Download and prepare TFDS's set `name` below `data_dir`, or where TFDS keeps its sets.

    The other process knows the sets that come with TFDS. It ends with this one.

    Raises:
        PreparationError: it could not be done.
        Stopped: `stop` was set meanwhile.
    """
    command = [sys.executable, "-m", "soft_jax.data.preparation", name, data_dir]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        try:
            while process.poll() is None:
                if stop is not None and stop.is_set():
                    raise Stopped
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
        finally:
            process.kill()
        report = process.stdout.read()
    if process.returncode:
        raise PreparationError(report or f"the process ended with status {process.returncode}")


def in_this_process(name: str, data_dir: str, stop: threading.Event | None = None) -> None:
    """Do what `in_another_process` does here, also for sets that are defined in this process.

    Raises whatever TFDS, its download manager or a missing TensorFlow raises, and Stopped. The
    preparation can't be ended then: it goes on until the process ends.
    """
    problems: list[Exception] = []

    def prepare() -> None:
        try:
            _prepare(name, data_dir)
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=prepare, daemon=True)
    thread.start()
    while thread.is_alive():
        if stop is not None and stop.is_set():
            raise Stopped
        thread.join(POLL)
    if problems:
        raise problems[0]


def _prepare(name: str, data_dir: str) -> None:
    import tensorflow_datasets as tfds

    if name == "cifar100":
        from soft_jax.data import cifar100

        builder = cifar100.builder(data_dir or None)
    else:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    builder.download_and_prepare()


def describe(error: Exception) -> str:
    """Return an exception's type and the first line of its message, for a message of our own."""
    text = str(error).strip()
    return type(error).__name__ + (f": {text.splitlines()[0][:300]}" if text else "")


def refuse_soon() -> None:
    """Let `requests`, by which TFDS downloads, give up soon where there is no network.

    By itself TFDS tries ten times, with longer and longer pauses, and has no limit on silence. The
    first request to a host is made once before, with `FIRST_ANSWER` seconds for an answer of any
    kind; whoever asks is told why there was none by a `requests.ConnectionError`. Files that were
    downloaded before are not asked for.
    """
    import requests

    original, answered = requests.Session.get, set()

    def get(session: Any, url: str, **options: Any) -> Any:
        host = urlsplit(url).netloc
        if host not in answered:
            _ask(original, url, options)
            answered.add(host)
        return original(session, url, timeout=(FIRST_ANSWER, SILENCE), **options)

    requests.Session.get = get
    socket.setdefaulttimeout(FIRST_ANSWER)  # of ftp


def _ask(get: Any, url: str, options: dict[str, Any]) -> None:
    """Raise ConnectionError where `url` gives no answer, by `get` on a session of its own."""
    import requests

    host, problem = urlsplit(url).netloc, [f"no answer in {FIRST_ANSWER:g} s"]

    def ask() -> None:
        try:
            with requests.Session() as session:
                get(session, url, timeout=FIRST_ANSWER, **options | {"stream": True}).close()
            problem.clear()
        except requests.RequestException as error:
            cause = error.args[0] if error.args else error
            problem[:] = [str(getattr(cause, "reason", cause))]  # without urllib3's wrapping

    # In a thread, since neither looking a name up nor trying all of its addresses has a limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(FIRST_ANSWER)
    if problem:
        raise requests.ConnectionError(f"{host} can't be reached ({problem[0]})")


def _end_with_parent() -> None:
    sys.stdin.buffer.read()  # to its end, which comes when the other process ends
    os._exit(1)


def main() -> None:
    """Be the other process, with the arguments NAME DATA_DIR; what went wrong goes to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    report = os.dup(1)
    os.dup2(2, 1)  # what TFDS prints is for the terminal
    status = 0
    try:
        refuse_soon()
        in_this_process(sys.argv[1], sys.argv[2])
    except Exception as error:
        os.write(report, describe(error).encode())
        status = 1
    sys.stdout.flush()
    os._exit(status)  # at once: threads of TFDS may still wait for the network


if __name__ == "__main__":
    main()
