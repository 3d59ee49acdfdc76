"""Ray actor that runs the stages of one MTEB task. Does not use Prefect, and imports torch only in its own process."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.config import ComparisonConfig, RunConfig, SearchedConfig
from pipeline.records import AdapterRef, DataSummary, EpochRow, LogLine, Progress, TaskResult, ValueRow
from pipeline.run.plan import JobSpec, Plan

if TYPE_CHECKING:
    from pipeline.compare.files import ArmResult
    from pipeline.compare.plan import ArmSpec, ComparisonPlan
    from pipeline.run.job import TaskJob
    from pipeline.search.job import Advanced, TrialsJob
    from pipeline.search.trials import SearchPlan


_MOST_LINES = 200
_LONGEST_LINE = 300


class Worker:
    """Process with the job of one MTEB task. ``events`` can be called while a stage runs.

    A worker may be started before its task is known, so that slow imports are done when ``begin`` assigns the task.
    """

    def __init__(self, *, threads: int, use_gpu: bool) -> None:
        """Import the modules that every stage needs.

        Args:
            threads: Number of CPU threads to use.
            use_gpu: Whether the worker may use a GPU.
        """
        self._threads, self._use_gpu = threads, use_gpu
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        self._spec: JobSpec
        self._job: TaskJob | None = None
        self._trials: TrialsJob | None = None
        self._begun = threading.Event()
        self._events: list[EpochRow | Progress | LogLine] = []
        self._lock = threading.Lock()
        logger = logging.getLogger("pipeline")  # not the root logger: other libraries may quote a user's texts
        logger.setLevel(logging.INFO)
        logger.addHandler(_Lines(self._report))
        import pipeline.run.job  # noqa: F401
        from pipeline.evaluation.mteb_runs import import_ahead

        import_ahead()

    def check(self, config: RunConfig) -> Plan:
        """Check the inputs of a whole run on a worker, where they are used, and choose the runtime of all workers.

        Raises:
            InputError, LorafleetError: as ``preflight``.
        """
        from pipeline.encoder.runtime import choose_runtime
        from pipeline.run.preflight import preflight

        return preflight(config, choose_runtime(config.train, threads=self._threads, use_gpu=self._use_gpu))

    def check_comparison(self, config: ComparisonConfig, run_id: str, store: str) -> ComparisonPlan:
        """Check the inputs of a comparison on a worker, and choose the runtime of all workers.

        Raises: InputError, LorafleetError: as ``preflight_comparison``.
        """
        from pipeline.compare.preflight import preflight_comparison
        from pipeline.encoder.runtime import choose_runtime

        runtime = choose_runtime(config.train, threads=self._threads, use_gpu=self._use_gpu)
        return preflight_comparison(config, runtime, run_id=run_id, store=store)

    def run_arm(self, spec: ArmSpec) -> ArmResult:
        """Train and measure an arm of a comparison, going on from what an earlier worker has finished."""
        import torch

        from pipeline.compare.job import ArmJob

        job = ArmJob(spec)
        torch.set_num_threads(job.runtime.threads)
        return job.run(self._report, self._report)

    def check_search(self, config: SearchedConfig, runs: str) -> SearchPlan:
        """Check the inputs of a search on a worker, and choose the runtime of all workers.

        Raises: InputError, LorafleetError: as ``preflight_search``.
        """
        from pipeline.encoder.runtime import choose_runtime
        from pipeline.search.preflight import preflight_search

        runtime = choose_runtime(config.train, threads=self._threads, use_gpu=self._use_gpu)
        return preflight_search(config, runtime, runs=runs)

    def advance_trial(self, spec: JobSpec, until: int) -> Advanced:
        """Train a trial of a search until an epoch."""
        import torch

        from pipeline.search.job import TrialsJob

        if self._trials is None:
            self._trials = TrialsJob()
        torch.set_num_threads(spec.runtime.threads)
        return self._trials.advance(spec, until, self._report, self._report)

    def begin(self, spec: JobSpec) -> None:
        """Assign an MTEB task. Stages wait for this call, because Ray may start calls in any order."""
        self._spec = spec
        self._begun.set()

    def load(self) -> DataSummary:
        """Read the data and load the encoder."""
        return self._ready().load()

    def evaluate_frozen(self) -> tuple[ValueRow, ...]:
        """Measure the frozen encoder."""
        return self._ready().evaluate_frozen()

    def train(self) -> AdapterRef:
        """Train the adapter, resuming from the last checkpoint if there is one."""
        return self._ready().train(self._report, self._report)

    def finish(self) -> TaskResult:
        """Evaluate the adapter, verify it in a new process, and write the result."""
        return self._ready().finish()

    def events(self) -> list[EpochRow | Progress | LogLine]:
        """Events since the last call: every epoch and log line, and the latest progress."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def process_id(self) -> int:
        """Process id of this worker, for tests and monitoring."""
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
        # Set in each stage, because Ray sets OMP_NUM_THREADS by its own rule and torch's setting is per thread.
        torch.set_num_threads(self._job.runtime.threads)
        return self._job


class _Lines(logging.Handler):
    """Log handler that reports a bounded number of lines of bounded length."""

    def __init__(self, report: Callable[[LogLine], None]) -> None:
        super().__init__()
        self._report = report
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self._count += 1
        if self._count <= _MOST_LINES:
            self._report(LogLine(level=record.levelno, text=record.getMessage()[:_LONGEST_LINE]))
        elif self._count == _MOST_LINES + 1:
            self._report(LogLine(level=logging.WARNING, text=f"more than {_MOST_LINES} lines; the rest is omitted"))
