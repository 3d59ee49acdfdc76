"""What every MTEB task, or the bulk job, is doing right now: a live table on a terminal, nothing in a log (the lines are there)."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from pipeline.printable import printable

_BAR_WIDTH = 20


class LiveTable:
    """One line per MTEB task, written by the threads that wait for the workers; a bulk job has one line."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[str, float | None, str]] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def show(self, name: str, stage: str, detail: str = "", *, percent: float | None = None) -> None:
        """Replace the line of that name; with a percentage it has a bar."""
        with self._lock:
            self._lines[printable(name)] = (stage, percent, printable(detail))

    def __rich__(self) -> Table:
        grid = Table("", "", "", f"{time.monotonic() - self._started:.0f} s", box=None, pad_edge=False)
        with self._lock:
            for name, (stage, percent, detail) in self._lines.items():
                grid.add_row(
                    name, stage, "" if percent is None else ProgressBar(completed=percent, width=_BAR_WIDTH), detail
                )
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


LIVE_TABLE = LiveTable()
"""Of this process."""
