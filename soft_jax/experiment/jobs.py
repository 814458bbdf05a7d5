"""Commands side by side: each in a process of its own, on a device of its own.

Who starts them (`run`) never starts a backend itself, which would hold the accelerator: devices are
counted by a short process (`devices_of_host`). Each process is given

- its device, by environment variables of the accelerator's runtime; on a CPU a share of the cores;
- `Job.given`, as a line of JSON on its standard input, which then stays open: when it ends, the
  other side is gone, and the process stops as at SIGTERM (`receive`);
- its log, as its error output. What it does now it tells on its standard output, as lines of JSON
  (`tell`, `ToldDisplay`); any other line there goes to the log.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from soft_jax.errors import UserError
from soft_jax.experiment.display import EVERY, Display

COUNTED_IN = 120.0  # seconds that the process has that counts devices
_POLL = 0.2  # seconds between looks at the processes, and at whether to stop
_TOLD = 0.25  # seconds between two lines about the same phase
# A TPU chip may have two devices; it is the chip that only one process can have.
_COUNT = """
import json, jax
devices = jax.local_devices()
platform = devices[0].platform
each = {str(device.coords) if platform == "tpu" else device.id for device in devices}
print(json.dumps({"platform": platform, "count": len(each)}))
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """A command to run: a title for the screen, its words, what it is given, and its log's file.

    `given` is a JSON value. The log's folder is made where it is not there; the log goes on where
    there is one.
    """

    title: str
    command: Sequence[str]
    given: Any
    log: Path


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a host computes on: "tpu", "gpu" or "cpu", and how many chips it has for as many
    processes; a CPU counts as one.
    """

    platform: str
    count: int

    def environment(self, slot: int, slots: int) -> dict[str, str]:
        """Return the variables that give a process the device of place `slot` among `slots`."""
        if self.platform == "tpu":
            port = str(8476 + slot)
            return {
                "TPU_VISIBLE_CHIPS": _chosen("TPU_VISIBLE_CHIPS", slot),
                "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
                "TPU_PROCESS_BOUNDS": "1,1,1",
                "CLOUD_TPU_TASK_ID": "0",
                "TPU_MESH_CONTROLLER_ADDRESS": f"localhost:{port}",
                "TPU_MESH_CONTROLLER_PORT": port,
            }
        if self.platform == "gpu":
            return {"CUDA_VISIBLE_DEVICES": _chosen("CUDA_VISIBLE_DEVICES", slot)}
        threads = str(len(share_of_cores(slot, slots)))
        # NPROC is what XLA goes by where a process can't be bound to cores.
        return {"JAX_NUM_CPU_DEVICES": "1", "OMP_NUM_THREADS": threads, "NPROC": threads}


def _chosen(variable: str, slot: int) -> str:
    """Return the name of device `slot` among those that this program may see itself."""
    visible = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
    return visible[slot] if slot < len(visible) else str(slot)


def share_of_cores(slot: int, slots: int) -> set[int]:
    """Return the cores of place `slot` among `slots`: a part, or one that several places share."""
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    if slots >= len(cores):
        return {cores[slot % len(cores)]}
    return set(cores[len(cores) * slot // slots : len(cores) * (slot + 1) // slots])


def devices_of_host() -> Devices:
    """Return the devices that jax would use, counted by a short process, which lets go of them.

    Raises UserError where it can't be told.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return Devices("cpu", 1)
    why = f"no answer in {COUNTED_IN:g} s"
    try:
        counted = subprocess.run(
            [sys.executable, "-P", "-c", _COUNT],  # a json.py in the current folder is not meant
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COUNTED_IN,
            check=False,
        )
        found = json.loads(counted.stdout.splitlines()[-1]) if counted.returncode == 0 else None
        why = _last_line(counted.stderr) or f"status {counted.returncode}"
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        found = None
        why = why if isinstance(error, subprocess.TimeoutExpired) else str(error)
    if found is None:
        raise UserError(
            f"--jobs: the devices of this host can't be counted ({why}); free them, or name the "
            "platform by the variable JAX_PLATFORMS, or take --jobs=1"
        )
    platform = "gpu" if found["platform"] in ("cuda", "rocm") else found["platform"]
    return Devices(platform, 1 if platform == "cpu" else found["count"])


def at_once(asked: int | None, runs: int, devices: Devices) -> int:
    """Return how many of `runs` runs go side by side: one a device, or as many as are asked for.

    Raises UserError where that is more than the host's chips: none can be shared.
    """
    if asked is not None and devices.platform != "cpu" and asked > devices.count:
        raise UserError(
            f"--jobs: {asked} is more than the {devices.count} {devices.platform.upper()} chip(s) "
            "of this host, and each run needs one of its own"
        )
    return min(asked or devices.count, runs)


class _Process:
    """A job that runs, in the place `slot`."""

    def __init__(self, job: Job, slot: int, slots: int, devices: Devices):
        """Start it. Raises UserError where its log can't be written or no process can be made."""
        self.job, self.slot = job, slot
        self.what, self.done, self.total = "starting", 0, None
        self.error: str | None = None  # as the process told it
        self.silent = False
        self.began = time.monotonic()
        self._log = _open_log(job)
        self._log_from = os.fstat(self._log.fileno()).st_size
        try:
            self._popen = self._start(slots, devices)
        except OSError as error:
            self._log.close()
            raise UserError(f"its process can't be made ({error})") from error
        except BaseException:
            self._log.close()
            raise
        self._partial = b""
        with contextlib.suppress(BrokenPipeError):  # it has ended already, which is seen later
            self._popen.stdin.write(json.dumps(job.given).encode() + b"\n")
            self._popen.stdin.flush()
        os.set_blocking(self.stdout.fileno(), False)

    def _start(self, slots: int, devices: Devices) -> subprocess.Popen:
        path = os.pathsep.join(part or os.getcwd() for part in sys.path)
        environment = os.environ | {"PYTHONPATH": path} | devices.environment(self.slot, slots)
        bound = devices.platform == "cpu" and hasattr(os, "sched_setaffinity")
        before = os.sched_getaffinity(0) if bound else set()
        if bound:  # this thread's, which the process inherits
            os.sched_setaffinity(0, share_of_cores(self.slot, slots))
        try:
            return subprocess.Popen(
                list(self.job.command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this program alone, which passes it on
            )
        finally:
            if bound:
                os.sched_setaffinity(0, before)

    @property
    def stdout(self) -> IO[bytes]:
        return self._popen.stdout

    def read(self) -> None:
        """Take in what the process has told."""
        with contextlib.suppress(BlockingIOError):
            while some := os.read(self.stdout.fileno(), 65536):
                *lines, self._partial = (self._partial + some).split(b"\n")
                for line in lines:
                    self._take(line)
            self.silent = True  # its output has ended

    def _take(self, line: bytes) -> None:
        try:
            told = json.loads(line)
            if not isinstance(told, dict):
                raise ValueError(line)
        except ValueError:  # printed by something else in the process
            with contextlib.suppress(OSError):  # a full disk is the run's own to tell of
                self._log.write(line + b"\n")
            return
        self.error = told.get("error", self.error)
        self.what = told.get("what", self.what)
        self.done, self.total = told.get("done", self.done), told.get("total", self.total)

    def ended(self) -> bool:
        return self._popen.poll() is not None

    def stop(self) -> None:
        self._popen.terminate()

    def kill(self) -> None:
        """Kill the process and all that it has started."""
        if not self.ended():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    def close(self) -> UserError | None:
        """Return what was wrong with the process, which has ended; None if nothing was."""
        self.read()
        if self._partial:  # its last line had no end
            self._take(self._partial)
        for file in (self._popen.stdin, self.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                file.close()
        status = self._popen.returncode
        return UserError(f"{self._why(status)} (log: {self.job.log})") if status else None

    def _why(self, status: int) -> str:
        if self.error:
            return " ".join(self.error.split())
        if status == -signal.SIGKILL:
            return "its process was killed, as the system does where memory runs out"
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        with open(self.job.log, "rb") as file:
            file.seek(self._log_from)
            last = _last_line(file.read().decode(errors="replace"))
        return last or f"its process ended with status {status}"


def _open_log(job: Job) -> IO[bytes]:
    """Open a job's log at its end, and write its title. Raises UserError where that fails."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what a full disk refuses would come again at each later write.
        log = open(os.open(job.log, flags, 0o666), "ab", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{job.log} can't be written ({error})") from error
    try:
        log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {job.title}\n".encode())
    except OSError as error:
        log.close()
        raise UserError(f"{job.log} can't be written ({error})") from error
    return log


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def run(
    jobs: Sequence[Job], slots: int, devices: Devices, console: Console, stop: threading.Event
) -> list[UserError | None]:
    """Run `jobs`, `slots` of them at a time; return what was wrong with each, None if nothing.

    Each runs alone in its place: one that fails stops no other. When `stop` is set no job begins,
    those that run get SIGTERM, and this returns when all have ended; Ctrl-C then kills them. Those
    that did not begin have None too.
    """
    outcomes: list[UserError | None] = [None] * len(jobs)
    waiting = list(enumerate(jobs))
    running: dict[int, _Process] = {}  # by the job's place in `jobs`
    free = list(range(slots))
    with _Screen(console, len(jobs)) as screen, _all_ended(running):
        while running or (waiting and not stop.is_set()):
            while waiting and free and not stop.is_set():
                number, job = waiting.pop(0)
                free.sort()
                try:
                    running[number] = _Process(job, free[0], slots, devices)
                except UserError as error:
                    outcomes[number] = error
                    screen.end(number, job, error, 0.0)
                    continue
                free.pop(0)
                screen.begin(number, job)
            if stop.is_set():
                _stop_all(running, screen)
                continue
            _wait(running)
            for number, process in list(running.items()):
                screen.show(number, process)
                if process.ended():
                    del running[number]
                    free.append(process.slot)
                    outcomes[number] = process.close()
                    seconds = time.monotonic() - process.began
                    screen.end(number, process.job, outcomes[number], seconds)
    return outcomes


def _wait(running: Mapping[int, _Process]) -> None:
    """Take in what the processes tell, for a moment at most."""
    with selectors.DefaultSelector() as selector:
        for process in running.values():
            if not process.silent:
                selector.register(process.stdout, selectors.EVENT_READ, process)
        if not selector.get_map():
            time.sleep(_POLL)
            return
        for key, _ in selector.select(_POLL):
            key.data.read()


def _stop_all(running: dict[int, _Process], screen: "_Screen") -> None:
    """Send SIGTERM to all, and wait until they have ended; Ctrl-C kills them."""
    screen.say(f"stopping {len(running)} run(s), which save their states; Ctrl-C kills them")
    with _killed_by_ctrl_c(running):
        for process in running.values():
            process.stop()
        while running:
            _wait(running)
            for number, process in list(running.items()):
                screen.show(number, process)
                if process.ended():
                    process.close()
                    del running[number]


@contextlib.contextmanager
def _killed_by_ctrl_c(running: Mapping[int, _Process]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def kill(signum: int, frame: object) -> None:
        for process in list(running.values()):
            process.kill()
        signal.signal(signal.SIGINT, before)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, kill)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _all_ended(running: Mapping[int, _Process]) -> Iterator[None]:
    """Leave no process behind, whatever comes up here."""
    try:
        yield
    finally:
        for process in running.values():
            process.stop()
        while any(not process.ended() for process in running.values()):
            _wait(running)  # one whose pipe is full could not end
        for process in running.values():
            process.close()


class _Screen:
    """What is shown of all jobs: a line for each that runs on a terminal, else a few lines."""

    def __init__(self, console: Console, count: int):
        self._console, self._count, self._over = console, count, 0
        # A narrow terminal cuts the title's end off, not what the run is at.
        title, at = Column(ratio=1, no_wrap=True, overflow="ellipsis"), Column(no_wrap=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=title),
            TextColumn("{task.fields[at]}", markup=False, table_column=at),
            TimeElapsedColumn(),
            console=console,
            expand=True,
            transient=True,
            refresh_per_second=2,
            disable=not console.is_terminal,
        )
        self._bars: dict[int, Any] = {}
        self._told = time.monotonic()

    def __enter__(self) -> "_Screen":
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, number: int, job: Job) -> None:
        self._bars[number] = self._progress.add_task(job.title, total=None, at="")
        self.say(f"{number + 1} of {self._count} begins: {job.title}; log: {job.log}")

    def show(self, number: int, process: _Process) -> None:
        part = f", {process.done} of {process.total}" if process.total else ""
        self._progress.update(self._bars[number], at=f"{process.what}{part}")
        if not self._console.is_terminal and time.monotonic() - self._told >= EVERY:
            self._told = time.monotonic()
            self.say(f"{self._over} of {self._count} have ended, {len(self._bars)} go on")

    def end(self, number: int, job: Job, problem: UserError | None, seconds: float) -> None:
        self._over += 1
        if number in self._bars:
            self._progress.remove_task(self._bars.pop(number))
        if problem:
            self.say(f"error: {job.title}: {problem}")
        else:
            self.say(
                f"{number + 1} of {self._count} is finished after {seconds:.0f} s: {job.title}"
            )


# In the process of a job.


def receive() -> Any:
    """Return what this process is given, and stop it as at SIGTERM when its other side is gone."""
    line = b""
    while not line.endswith(b"\n"):
        some = os.read(0, 65536)
        if not some:
            raise UserError("this program is started by another, which gives it a run")
        line += some
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return json.loads(line)


def _end_with_parent() -> None:
    while os.read(0, 65536):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def tell(**what: Any) -> None:
    """Tell the other side "what" is done now, how much is "done" of a "total", or an "error"."""
    with contextlib.suppress(OSError):  # it is gone
        os.write(1, json.dumps(what).encode() + b"\n")


class ToldDisplay(Display):
    """A display that tells the other side too."""

    def __init__(self, console: Console):
        super().__init__(console)
        self._last = 0.0

    def begin(self, what: str, total: int | None = None) -> None:
        """Show and tell the phase `what`, as `Display.begin`."""
        super().begin(what, total)
        self._last = time.monotonic()
        tell(what=what, done=0, total=total or 0)

    def update(self, done: int) -> None:
        """Show and tell how far the phase is, as `Display.update`."""
        super().update(done)
        if time.monotonic() - self._last >= _TOLD:
            self._last = time.monotonic()
            tell(done=done)
