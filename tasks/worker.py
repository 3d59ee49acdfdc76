"""The Ray actor that owns one MTEB task. Knows nothing of Prefect; imports torch only in the worker's own process."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig
from pipeline.records import AdapterRef, DataSummary, EpochRow, LogLine, Progress, ScoreRow, TaskResult
from pipeline.run.plan import JobSpec, Plan

if TYPE_CHECKING:
    from pipeline.run.job import TaskJob


_MOST_LINES = 200
_LONGEST_LINE = 300


class Worker:
    """One MTEB task's job in a process of its own; ``events`` answers while a stage runs.

    It may be started before it is known which task will be its own: what takes long to import is there when ``begin`` says so.
    """

    def __init__(self, *, threads: int, use_gpu: bool) -> None:
        """Import what every stage needs.

        Args:
            threads: CPU threads of its share.
            use_gpu: Whether a GPU is in its share.
        """
        self._threads, self._use_gpu = threads, use_gpu
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        self._spec: JobSpec
        self._job: TaskJob | None = None
        self._begun = threading.Event()
        self._events: list[EpochRow | Progress | LogLine] = []
        self._lock = threading.Lock()
        logger = logging.getLogger("pipeline")  # ours alone: other libraries may quote a user's text
        logger.setLevel(logging.INFO)
        logger.addHandler(_Lines(self._report))
        import pipeline.run.job  # noqa: F401
        from pipeline.evaluation.few_shot import import_ahead

        import_ahead()

    def check(self, config: RunConfig) -> Plan:
        """Check the inputs of a whole run, where they will be used, and choose how its workers compute; see ``preflight``."""
        from pipeline.encoder.runtime import choose_runtime
        from pipeline.run.preflight import preflight

        return preflight(config, choose_runtime(config.train, threads=self._threads, use_gpu=self._use_gpu))

    def begin(self, spec: JobSpec) -> None:
        """Take on an MTEB task; stages called meanwhile wait for it, as Ray may start them in any order."""
        self._spec = spec
        self._begun.set()

    def load(self) -> DataSummary:
        """Read the data, load the encoder."""
        return self._ready().load()

    def evaluate_frozen(self) -> tuple[ScoreRow, ...]:
        """Measure the frozen encoder."""
        return self._ready().evaluate_frozen()

    def train(self) -> AdapterRef:
        """Train the adapter, from the last checkpoint on."""
        return self._ready().train(self._report, self._report)

    def finish(self) -> TaskResult:
        """Evaluate, pass the reload gate, write the result."""
        return self._ready().finish()

    def events(self) -> list[EpochRow | Progress | LogLine]:
        """What was reported since the last call: every epoch and line of the log, and the latest progress."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def process_id(self) -> int:
        """Of this worker, for those who watch it."""
        return os.getpid()

    def _report(self, event: Any) -> None:
        with self._lock:
            if self._events and isinstance(self._events[-1], Progress):
                self._events.pop()
            self._events.append(event)

    def _ready(self) -> TaskJob:
        import torch

        from pipeline.run.job import TaskJob

        self._begun.wait()
        if self._job is None:
            self._job = TaskJob(self._spec)
        # Ray sets OMP_NUM_THREADS by its own rule, and torch keeps the number per thread: say it in each stage.
        torch.set_num_threads(self._job.runtime.threads)
        return self._job


class _Lines(logging.Handler):
    """Hands the log on, a bounded number of bounded lines."""

    def __init__(self, report: Callable[[LogLine], None]) -> None:
        super().__init__()
        self._hand_on = report
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self._count += 1
        if self._count <= _MOST_LINES:
            self._hand_on(LogLine(level=record.levelno, text=record.getMessage()[:_LONGEST_LINE]))
        elif self._count == _MOST_LINES + 1:
            self._hand_on(LogLine(level=logging.WARNING, text=f"more than {_MOST_LINES} lines; the rest is left out"))
