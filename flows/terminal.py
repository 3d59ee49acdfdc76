"""Output of the command line. No other module writes to standard output or standard error.

Every line is made printable first, so that no name, label or path can forge a line or send terminal escapes.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from pipeline.errors import InputError
from pipeline.printable import printable

_LOG_COLUMNS = 180


class OutputError(InputError):
    """Standard output cannot be written, because of a full disk. A closed pipe is not an error."""


def say(*lines: str) -> None:
    """Print lines on standard output."""
    _write(sys.stdout, *map(printable, lines))


def complain(*lines: str) -> None:
    """Print lines on standard error."""
    _write(sys.stderr, *map(printable, lines))


def say_json(value: Any) -> None:
    """Print one JSON object in ASCII, so that no character depends on the encoding or controls the terminal."""
    _write(sys.stdout, json.dumps(value, indent=1))


def say_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as wide as the terminal, or up to 180 columns wide outside of one."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(*headings, box=None, pad_edge=False)
    for row in rows:
        grid.add_row(*map(printable, row))
    Console(width=None if sys.stdout.isatty() else _LOG_COLUMNS, highlight=False, markup=False, emoji=False).print(grid)


def secure_streams() -> None:
    """Replace the process's standard streams, so that no text and no reader can break the command.

    Closed streams are connected to the null device. Characters that the encoding lacks are written as escapes. Closed
    pipes are ignored. A full disk is an error only on standard output, and only once.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # else the next file to be opened would get this descriptor
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = _stream(1, getattr(sys.stdout, "encoding", None), is_error=False)
    sys.stderr = _stream(2, getattr(sys.stderr, "encoding", None), is_error=True)


def _write(stream: TextIO, *lines: str) -> None:
    stream.write("\n".join((*lines, "")))
    stream.flush()


def _stream(descriptor: int, encoding: str | None, *, is_error: bool) -> io.TextIOWrapper:
    raw = _Standard(descriptor, is_error=is_error)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=encoding or "utf-8",
        errors="backslashreplace",
        line_buffering=is_error or raw.isatty(),
        write_through=is_error,
    )


class _Standard(io.FileIO):
    """Standard output or standard error."""

    def __init__(self, descriptor: int, *, is_error: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._is_error = is_error
        self._is_lost = False

    def write(self, content: Any) -> int:
        """Write the content, or discard it if the stream is lost."""
        if not self._is_lost:
            try:
                return super().write(content)
            except OSError as error:
                self._is_lost = True
                if not (self._is_error or isinstance(error, BrokenPipeError)):
                    raise OutputError(
                        f"standard output cannot be written: {error.strerror}; finished work is kept"
                    ) from None
        return len(memoryview(content).cast("B"))
