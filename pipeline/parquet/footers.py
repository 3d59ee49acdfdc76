"""Footers of Parquet files, read in a separate process, so that a footer that crashes its reader costs one file only.

``pipeline.parquet.footer_process`` is that process.
"""

from __future__ import annotations

import functools
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
from base64 import b64decode
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from pipeline.errors import LorafleetError
from pipeline.machine import read_answers
from pipeline.parquet.schema import Kinds
from pipeline.printable import reveal

_MOST_STARTS = 3


@dataclass(frozen=True)
class Footer:
    """The facts of a file's footer."""

    schema: pa.Schema
    """Schema in which pyarrow reads the file, with the metadata of its fields but not that of the file."""
    in_microseconds: pa.Schema
    """The same schema with INT96 columns in microseconds instead of nanoseconds."""
    kinds: Kinds
    """Parquet's types of the columns."""
    pandas_labels: str
    """Type of the column labels that pandas wrote; empty if they are texts."""
    lost_types: dict[str, str]
    """Column -> how its type differs from the one in the footer's Arrow schema."""
    left_out: Sequence[str]
    """Keys of the footer that the output drops."""
    row_groups: tuple[int, ...]
    """Number of rows of each row group."""

    @property
    def num_rows(self) -> int:
        """Number of rows of the file."""
        return sum(self.row_groups)


@dataclass(frozen=True)
class Dates:
    """The range of the INT96 columns of a file. No Arrow type is as wide as INT96."""

    are_far: bool
    """Whether some dates are outside the years 1677 to 2262, the range of nanoseconds."""
    are_fine: bool
    """Whether some of the other dates have nanoseconds, which microseconds cannot hold."""


def read_footers(paths: Sequence[str]) -> list[Footer | str]:
    """Read the footer of each file; a text instead says why it cannot be read."""
    schemas: dict[str, tuple[pa.Schema, pa.Schema, Kinds, str, dict[str, str], list[str]]] = {}

    def footer(answer: dict[str, Any]) -> Footer:
        key = json.dumps(answer["schema"])
        if key not in schemas:  # most files of a job share their schema
            first, second, *facts = answer["schema"]
            schemas[key] = _read_schema(first), _read_schema(second), *facts
        return Footer(*schemas[key], tuple(answer["row_groups"]))

    return [found if isinstance(found, str) else footer(found) for found in _Reader.shared().ask("footer", paths)]


def read_dates(paths: Sequence[str], columns: Sequence[str]) -> list[Dates | str]:
    """Read the INT96 columns of each file as a whole; a text instead says why they cannot be kept."""
    answers = _Reader.shared().ask("dates", paths, columns)
    return [found if isinstance(found, str) else Dates(**found) for found in answers]


def start_ahead() -> None:
    """Start the process, so that the first request does not wait for it."""
    _Reader.shared().start()


class _Reader:
    """The parent's end of the process, which exits when idle and is started again by the next request."""

    @classmethod
    @functools.cache
    def shared(cls) -> _Reader:
        return cls()

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self._lock = threading.Lock()

    def start(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._errors.seek(0)
            self._errors.truncate()
            command = [sys.executable, "-P", "-m", "pipeline.parquet.footer_process"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
            )
        return self._process

    def ask(self, operation: str, paths: Sequence[str], columns: Sequence[str] = ()) -> list[Any]:
        """Return one answer per path; for a path that crashes the process, a text that says how."""
        with self._lock:
            answers: dict[int, Any] = {}
            while todo := [(index, path) for index, path in enumerate(paths) if index not in answers]:
                started = self._ask(operation, todo, columns, answers)
                for index, path in todo:
                    if index in started and index not in answers:  # one of these has crashed the process
                        self._ask(operation, [(index, path)], columns, answers)
                        if index not in answers:
                            answers[index] = f"reading its footer ends the process {self._ending()}"
            return [answers[index] for index in range(len(paths))]

    def _ask(
        self, operation: str, paths: list[tuple[int, str]], columns: Sequence[str], answers: dict[int, Any]
    ) -> set[int]:
        """Collect answers until the process is done or ends.

        Returns: Indices of the paths that the process has started to read, at least one.
        Raises: LorafleetError: the process does not start.
        """
        real_paths = [(index, reveal(path)) for index, path in paths]
        request = json.dumps({"operation": operation, "paths": real_paths, "columns": list(columns)}).encode() + b"\n"
        for _ in range(_MOST_STARTS):
            process, started = self.start(), set[int]()
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):  # the process was idle, and has just exited
                process.stdin.write(request)
                process.stdin.flush()
            for line in process.stdout:
                for message in read_answers([line]):
                    if "done" in message:
                        return started
                    started.add(message["index"])
                    if "answer" in message:
                        answers[message["index"]] = message["answer"]
            process.wait()
            if started:
                return started
        raise LorafleetError(f"the process that reads footers ended before it read one {self._ending()}")

    def _ending(self) -> str:
        """Return how the process has ended: ``by SIGABRT``, or ``with exit code 1``, and its last message."""
        assert self._process is not None
        code = self._process.wait()
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace")
        reasons = re.findall(r"what\(\):\s*(.+)", errors) or errors.strip().splitlines()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"{how}: {reasons[-1][:300]}" if reasons else how


def _read_schema(written: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(b64decode(written)))
