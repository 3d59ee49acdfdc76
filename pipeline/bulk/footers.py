"""Footers of Parquet files, read in a process of their own: one that ends its reader costs its own file, and not the job.

``python -m pipeline.bulk.footers`` is that process. It takes one request per line of standard input, and answers in lines of JSON.
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

from pipeline.bulk.schema import Kinds
from pipeline.errors import LorafleetError
from pipeline.machine import read_answers
from pipeline.printable import reveal

_MOST_STARTS = 3


@dataclass(frozen=True)
class Footer:
    """What the footer of a file says."""

    schema: pa.Schema
    """As pyarrow reads the file, with the metadata of its fields and without that of the file."""
    in_microseconds: pa.Schema
    """The same, with the values of INT96 columns as microseconds in place of nanoseconds."""
    kinds: Kinds
    """Parquet's own types."""
    pandas_labels: str
    """Type of the column labels of the pandas table that was written, where that is not text; else empty."""
    lost_types: dict[str, str]
    """Column -> how its type differs from the one that Arrow's own schema in the footer names."""
    left_out: Sequence[str]
    """Keys of the footer that the output cannot have."""
    row_groups: tuple[int, ...]
    """Rows of each."""

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return sum(self.row_groups)


@dataclass(frozen=True)
class Dates:
    """What the INT96 columns of a file hold, which are as wide as no type of Arrow's."""

    are_far: bool
    """Some lie outside of the years 1677 to 2262, for which nanoseconds have no room."""
    are_fine: bool
    """Some of the others have nanoseconds, which microseconds cannot hold."""


def read_footers(paths: Sequence[str]) -> list[Footer | str]:
    """Read footers: the footer of each file, or why it cannot be read."""
    schemas: dict[str, tuple[pa.Schema, pa.Schema, Kinds, str, dict[str, str], list[str]]] = {}

    def footer(answer: dict[str, Any]) -> Footer:
        key = json.dumps(answer["schema"])
        if key not in schemas:  # files of one job mostly have the same
            first, second, *said = answer["schema"]
            schemas[key] = _read_schema(first), _read_schema(second), *said
        return Footer(*schemas[key], tuple(answer["row_groups"]))

    return [found if isinstance(found, str) else footer(found) for found in _Reader.shared().ask("footer", paths)]


def read_dates(paths: Sequence[str], columns: Sequence[str]) -> list[Dates | str]:
    """Read INT96 columns whole: what each file's hold, or why it cannot be kept."""
    answers = _Reader.shared().ask("dates", paths, columns)
    return [found if isinstance(found, str) else Dates(**found) for found in answers]


def start_ahead() -> None:
    """Start the process, so that the first question does not wait for it."""
    _Reader.shared().start()


class _Reader:
    """The parent's end. It ends by itself when it has been idle for some seconds, and is started again when it is asked."""

    @classmethod
    @functools.cache
    def shared(cls) -> _Reader:
        return cls()

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as this one
        self._lock = threading.Lock()

    def start(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._errors.truncate(0)
            command = [sys.executable, "-P", "-m", "pipeline.bulk.footer_process"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
            )
        return self._process

    def ask(self, operation: str, paths: Sequence[str], columns: Sequence[str] = ()) -> list[Any]:
        """One answer per path; of a path that ends the process, how it ended."""
        with self._lock:
            answers: dict[int, Any] = {}
            while todo := [(index, path) for index, path in enumerate(paths) if index not in answers]:
                begun = self._ask(operation, todo, columns, answers)
                for index, path in todo:
                    if index in begun and index not in answers:  # one of these has ended the process
                        self._ask(operation, [(index, path)], columns, answers)
                        if index not in answers:
                            answers[index] = f"reading its footer ends the process {self._ending()}"
            return [answers[index] for index in range(len(paths))]

    def _ask(
        self, operation: str, paths: list[tuple[int, str]], columns: Sequence[str], answers: dict[int, Any]
    ) -> set[int]:
        """Add what is answered until the process has done all or ends; returns which of the paths were begun, at least one.

        Raises: LorafleetError: the process does not start.
        """
        asked = [(index, reveal(path)) for index, path in paths]
        request = json.dumps({"operation": operation, "paths": asked, "columns": list(columns)}).encode() + b"\n"
        for _ in range(_MOST_STARTS):
            process, begun = self.start(), set[int]()
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):  # it had been idle, and ended just now
                process.stdin.write(request)
                process.stdin.flush()
            for line in process.stdout:
                for said in read_answers([line]):
                    if "done" in said:
                        return begun
                    begun.add(said["index"])
                    if "answer" in said:
                        answers[said["index"]] = said["answer"]
            process.wait()
            if begun:
                return begun
        raise LorafleetError(f"the process that reads footers ended before it read one {self._ending()}")

    def _ending(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace")
        said = re.findall(r"what\(\):\s*(.+)", errors) or errors.strip().splitlines()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"{how}: {said[-1][:300]}" if said else how


def _read_schema(written: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(b64decode(written)))
