"""The command line as users run it: in its own process, on small real inputs, with all its processes in view."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from builders import toy_texts

LORAFLEET = (
    sys.executable,
    "-P",
    "-m",
    "flows.cli",
)  # -P: as the console script, which does not look into the working folder
SCRIPT = (str(Path(sys.executable).with_name("lorafleet")),)
"""The console script, as it is installed."""
PLANTED = Path(__file__).parent / "planted"
"""On PYTHONPATH it slows a bulk job down, and plants its faults."""
_MARK = "LORAFLEET_TEST_MARK"
_TOPICS = ("sea", "kitchen", "garden")


@dataclass(frozen=True)
class Ended:
    """The outcome of a command."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def run(self) -> Path:
        """The run folder that the last line on standard output names."""
        sign, _, path = self.out.rstrip("\n").rpartition("\n")[2].partition(" ")
        assert sign == "run:", f"the last line is not the run's: {self.out}\n{self.err}"
        return Path(path)


@dataclass(frozen=True)
class FinishedRun:
    """A run that all tests may look at."""

    cwd: Path
    config: Path
    tasks: tuple[dict[str, Any], ...]
    ended: Ended

    @property
    def runs(self) -> Path:
        """The run store."""
        return self.cwd / "runs"

    @property
    def root(self) -> Path:
        """The run folder."""
        return self.cwd / self.ended.run


class Command:
    """A running command; a mark in its environment finds every process that it started, and theirs."""

    def __init__(
        self, *arguments: str | Path, cwd: Path, program: Sequence[str] = LORAFLEET, **environment: str
    ) -> None:
        self._mark = uuid.uuid4().hex
        self._started = time.monotonic()
        self._known: set[psutil.Process] = set()
        self._out, self._err = cwd / f"{self._mark}.out", cwd / f"{self._mark}.err"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*program, *map(str, arguments)],
                cwd=cwd,
                env=inherited | environment | {_MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                preexec_fn=_heed_ctrl_c,
            )

    def family(self, *titles: str) -> list[psutil.Process]:
        """Living processes of this command, its own first; with titles, only those with one in their command line."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                # Ray's agents overwrite their environment with a title, but not their parent.
                if process.environ().get(_MARK) == self._mark or process.ppid() in {known.pid for known in self._known}:
                    self._known.add(process)
        return sorted((p for p in self._known if _lives(p, titles)), key=lambda p: p.pid != self.process.pid)

    def log(self) -> str:
        """Standard error so far."""
        return self._err.read_text()

    def said(self) -> str:
        """Standard output so far."""
        return self._out.read_text()

    def kill(self, *titles: str) -> None:
        """``kill -9`` of those whose command line holds one of the titles."""
        victims = self.family(*titles)
        assert victims, f"no process called {titles} among {[' '.join(p.cmdline())[:80] for p in self.family()]}"
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def wait_until(self, condition: Callable[[], Any], *, seconds: float = 150) -> Any:
        """The first true value of the condition; fails if the command ends before, or time does."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.sweep()
                raise AssertionError(
                    f"waited in vain; the command's exit code is {self.process.returncode}: {self._err.read_text()}"
                )
            time.sleep(0.05)
        return value

    def wait(self, *, seconds: float = 280) -> Ended:
        """Wait for the command's end, and make sure of it."""
        try:
            code = self.process.wait(timeout=seconds)
        finally:
            self.sweep()
        return Ended(code, self._out.read_text(), self._err.read_text(), time.monotonic() - self._started)

    def left(self, *, seconds: float, but: Sequence[str] = ()) -> list[str]:
        """Command lines of the processes that remain when the time is over, except those with one of the titles."""
        deadline = time.monotonic() + seconds
        while lines := [line for line in map(_line, self.family()) if line and not any(title in line for title in but)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        return lines

    def sweep(self) -> None:
        """Leave nothing behind for the next test, whatever happened in this one."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _heed_ctrl_c() -> None:
    """A shell that has started the tests in the background lets them, and what they start, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _lives(process: psutil.Process, titles: Sequence[str]) -> bool:
    line = _line(process)
    return bool(line) and (not titles or any(title in line for title in titles))


def _line(process: psutil.Process) -> str:
    """The command line of a living process; nothing of one that is gone."""
    with contextlib.suppress(psutil.Error):
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return " ".join(process.cmdline())[:200].strip()
    return ""


def session_folders(process: psutil.Process) -> Iterator[Path]:
    """The folder of ours that holds the session of a Ray process."""
    for argument in process.cmdline():
        if found := re.match(r"--session[-_]dir=(.*)/r/session_", argument):
            yield Path(found[1])


def eventually(condition: Callable[[], Any], *, seconds: float, what: str) -> Any:
    """The first true value of the condition; fails when time is over."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)
    return value


def run(
    *arguments: str | Path, cwd: Path, seconds: float = 280, program: Sequence[str] = LORAFLEET, **environment: str
) -> Ended:
    """Run ``lorafleet`` with these arguments to its end."""
    return Command(*arguments, cwd=cwd, program=program, **environment).wait(seconds=seconds)


def write_task(
    folder: Path, name: str, *, num_train: int = 200, num_test: int = 60, num_classes: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Two Parquet files of toy texts; returns their entry of ``mteb_tasks``."""
    folder.mkdir(parents=True, exist_ok=True)
    entry: dict[str, Any] = {"name": name}
    for split, num_texts in (("train", num_train), ("test", num_test)):
        texts, labels = toy_texts(num_texts, seed=2 * seed + (split == "test"), topics=_TOPICS[:num_classes])
        path = folder / f"{name}-{split}.parquet"
        pq.write_table(pa.table({"text": texts, "label": [_TOPICS[label] for label in labels]}), path)
        entry[split] = str(path)
    return entry


def write_config(
    path: Path, encoder: Path | str, tasks: Sequence[dict[str, Any]], /, **sections: dict[str, Any]
) -> Path:
    """A config of a small run: three epochs, few resamples, one CPU per worker."""
    values: dict[str, Any] = {
        "encoder": {"name": str(encoder), "max_tokens": 24},
        "train": {"max_epochs": 3, "learning_rate": 0.01},
        "evaluate": {"bootstrap_draws": 100},
        "data": {"offline": True},
        "compute": {"cpus_per_worker": 1.0, "retry_delay_seconds": 0.1},
        "mteb_tasks": list(tasks),
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return path


def epochs_done(runs: Path) -> dict[str, int]:
    """Key of each training under way -> epochs in its checkpoint."""
    from safetensors import SafetensorError, safe_open

    done = {}
    for path in runs.glob(".work/*/checkpoint.safetensors"):
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, framework="np") as file:
            done[path.parent.name] = len(json.loads(file.metadata()["state"])["epochs"])
    return done


def write_bulk_input(
    folder: Path, *, num_files: int, rows: int, group: int, changes: Mapping[int, str | None] | None = None
) -> Path:
    """Write Parquet files ``part-N`` of toy texts with consecutive ids; ``changes`` replaces the texts of some ids."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        ids = range(number * rows, (number + 1) * rows)
        texts = [
            (changes or {}).get(id, text) for id, text in zip(ids, toy_texts(rows, seed=100 + number)[0], strict=True)
        ]
        pq.write_table(pa.table({"id": ids, "text": texts}), folder / f"part-{number}.parquet", row_group_size=group)
    return folder


def bulk_rows(folder: Path) -> pa.Table:
    """All rows of a bulk job's output, in the order of its units."""
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*-*.parquet")))
