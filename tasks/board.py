"""What every MTEB task is doing right now: a live table on a terminal, nothing in a log (the lines are there)."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table


class Board:
    """One line per MTEB task, written by the threads that wait for the workers."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[str, str]] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def show(self, name: str, stage: str, detail: str = "") -> None:
        """Replace the line of an MTEB task."""
        with self._lock:
            self._lines[name] = (stage, detail)

    def __rich__(self) -> Table:
        grid = Table("MTEB task", "stage", f"{time.monotonic() - self._started:.0f} s", box=None, pad_edge=False)
        with self._lock:
            for name, (stage, detail) in self._lines.items():
                grid.add_row(name, stage, detail)
        return grid

    @contextmanager
    def live(self) -> Iterator[None]:
        """While open, the board is drawn on standard error, if that is a terminal."""
        if not sys.stderr.isatty():
            yield
            return
        self._started = time.monotonic()
        with Live(self, console=Console(stderr=True), refresh_per_second=2, transient=True):
            yield


BOARD = Board()
"""Of this process."""
