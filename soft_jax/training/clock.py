"""Measure how long things take."""

import time
from typing import Self


class Stopwatch:
    """Add up the seconds spent in its `with` blocks."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        return self

    def __exit__(self, *_) -> None:
        self.seconds += time.monotonic() - self._start
