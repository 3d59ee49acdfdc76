"""Live table of what each MTEB task, or the bulk job, is doing. Shown on a terminal only; logs have lines."""

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
    """Table with one line per MTEB task, or one line for a bulk job. May be updated from any thread."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[str, float | None, str]] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def show(self, name: str, stage: str, detail: str = "", *, percent: float | None = None) -> None:
        """Replace one line.

        Args:
            name: Name of the MTEB task, or of the job.
            stage: What it is doing.
            detail: Further facts.
            percent: Progress from 0 to 100, shown as a bar; None for no bar.
        """
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
        """While open, draw the table on standard error, if that is a terminal."""
        if not sys.stderr.isatty():
            yield
            return
        self._started = time.monotonic()
        with Live(self, console=Console(stderr=True), refresh_per_second=2, transient=True):
            yield


LIVE_TABLE = LiveTable()
"""The live table of this process."""
