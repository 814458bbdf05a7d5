"""Stop a run at a signal: the state is saved, and the same command continues."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Preempted(Exception):
    """The run was stopped by a signal, `signum`; its state is saved."""

    def __init__(self, message: str):
        super().__init__(f"{message}; the same command continues")
        self.signum = int(signal.SIGTERM)


@contextmanager
def stop_at_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT (Ctrl-C) set.

    A second SIGINT ends the program as it would without this. A Preempted that passes through is
    told which signal came. Outside the main thread, where no handler can be set, the event is never
    set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    received: list[int] = []
    before = {}

    def note(signum: int, frame: object) -> None:
        received.append(signum)
        stop.set()
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for signum in (signal.SIGTERM, signal.SIGINT):
        before[signum] = signal.signal(signum, note)
    try:
        yield stop
    except Preempted as stopped:
        stopped.signum = received[0] if received else stopped.signum
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
