"""What a run shows while it works: the phase that it is in, and how far that is.

On a terminal it is one line at the bottom, which is gone when the run ends. Elsewhere, as in a log
file, it is a plain line when the run begins to load, and then one a minute at most.
"""

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

EVERY = 60.0  # seconds between two lines where there is no terminal
_PER_SECOND = 4  # drawings of the line on a terminal; each costs about 2 ms


class Display:
    """One line on what a run does now, kept from `with` to its end; there only on a terminal.

        with Display(console) as display:
            display.begin("loading")
            ...
            display.begin("task 1 of 5: training", total=300)
            display.update(1)

    A phase lasts until the next begins, so that something is shown at any time.
    """

    def __init__(self, console: Console):
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            _DoneOfTotal(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=_PER_SECOND,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("starting", total=None)
        self._what, self._total = "", None
        self._told = time.monotonic() - EVERY

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def begin(self, what: str, total: int | None = None) -> None:
        """Show the phase `what` from now on; `total` is the number of its parts, None if unknown.

        The same phase again goes on.
        """
        if (what, total) == (self._what, self._total):
            return
        self._what, self._total = what, total
        # A new bar: rich takes a total of None in an old one for "as before".
        self._progress.remove_task(self._bar)
        self._bar = self._progress.add_task(what, total=total)
        self._tell(0)

    def update(self, done: int) -> None:
        """Show that so many of the phase's parts are done."""
        self._progress.update(self._bar, completed=done)
        self._tell(done)

    def _tell(self, done: int) -> None:
        """Print a line where there is no terminal, and the last was long ago."""
        if self._console.is_terminal or time.monotonic() - self._told < EVERY:
            return
        self._told = time.monotonic()
        part = "" if self._total is None else f", {done} of {self._total}"
        self._console.print(f"{self._what}{part}", highlight=False)


class _DoneOfTotal(ProgressColumn):
    """Show "12/60", and nothing for a phase whose parts nobody knows."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else MofNCompleteColumn().render(task)


class NoDisplay(Display):
    """Shows nothing: for those who use parts of a run by themselves."""

    def __init__(self):
        super().__init__(Console(quiet=True))
