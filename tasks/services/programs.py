"""Processes of `lorafleet up`: supervisor, the programs in its config, and their children."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import psutil

from pipeline.errors import LorafleetError
from tasks.children import die_with_parent, last_fault

_MARK = "LORAFLEET_UP_MARK"
_START_SECONDS = 180.0
_RUN_ENDS_SECONDS = 20.0
_STOP_SECONDS = 90.0
_STARTS_THAT_ARE_ENOUGH = 3
_LOOK_UP_SECONDS = 0.5


class Programs:
    """Supervisor and its descendants. Must be created in the main thread, because they end with that thread."""

    def __init__(self, config: Path, state: Path, environment: Mapping[str, str]) -> None:
        """Start supervisor and its programs.

        Args:
            config: Config of supervisor.
            state: Folder of the logs: ``<program>.log`` and ``supervisord.log``.
            environment: Environment variables of all programs.
        """
        self._state, self._mark = state, secrets.token_hex(16)
        self._log = state / "supervisord.log"
        self._log_before = self._log.stat().st_size if self._log.exists() else 0
        self.started = datetime.now(UTC)
        with (state / "supervisord.err").open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "supervisor.supervisord", "-c", str(config)],
                env={**environment, _MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # only this process handles Ctrl-C
                # Has supervisor stop its programs even if `up` is killed by SIGKILL.
                preexec_fn=partial(die_with_parent, signal.SIGTERM),
            )

    def wait_until(self, answers: Callable[[], bool], stop: threading.Event) -> bool:
        """Wait until all programs answer.

        Args:
            answers: Whether all programs answer now.
            stop: Ends the wait.
        Returns:
            Whether all programs answer; False if ``stop`` was set first.
        Raises:
            LorafleetError: a program does not start.
        """
        deadline = time.monotonic() + _START_SECONDS
        while not answers():
            if stop.wait(_LOOK_UP_SECONDS):
                return False
            self._check_supervisor()
            log = self._log.read_bytes()[self._log_before :].decode(errors="replace") if self._log.exists() else ""
            for name, count in Counter(re.findall(r"exited: (\S+) ", log)).items():
                if count >= _STARTS_THAT_ARE_ENOUGH:
                    raise LorafleetError(
                        f"{name} does not start: {last_fault(self._state / f'{name}.log')}; "
                        f"see {self._state}/{name}.log"
                    )
            if time.monotonic() > deadline:
                raise LorafleetError(
                    f"some programs do not answer after {_START_SECONDS:.0f} s; see the logs in {self._state}"
                )
        return True

    def watch(self, stop: threading.Event) -> None:
        """Wait until ``stop`` is set.

        Raises:
            LorafleetError: supervisor itself has ended.
        """
        while not stop.wait(_LOOK_UP_SECONDS):
            self._check_supervisor()

    def stop(self) -> None:
        """End the flow runs, have supervisor stop its programs in order, and kill the remaining processes."""
        self._end_runs()
        family = self._family()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_STOP_SECONDS)
        for process in family | self._family():
            with suppress(psutil.Error):
                process.kill()
        self._process.wait()

    def _end_runs(self) -> None:
        """Terminate the flow runs. When stopped, the worker would kill them, and they would stay Running in the UI."""
        with suppress(psutil.Error):
            programs = psutil.Process(self._process.pid).children()
            runs = [run for program in programs if "worker" in program.cmdline() for run in program.children()]
            for run in runs:
                run.terminate()
            psutil.wait_procs(runs, timeout=_RUN_ENDS_SECONDS)

    def _family(self) -> set[psutil.Process]:
        """Find all processes of this `up`: descendants of supervisor, and processes with its mark in their environment.

        The mark identifies orphans. Descent identifies processes whose environment cannot be read.
        """
        family = set()
        with suppress(psutil.Error):
            family.update(psutil.Process(self._process.pid).children(recursive=True))
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(_MARK) == self._mark:
                    family.add(process)
        return family

    def _check_supervisor(self) -> None:
        if self._process.poll() is not None:
            why = last_fault(self._state / "supervisord.err") or last_fault(self._log)
            raise LorafleetError(
                f"supervisor has ended with exit code {self._process.returncode}: {why}; see {self._log}"
            )
