"""Cancellation of flows that were not started by a Prefect worker: SIGTERM, and the Prefect UI, act like Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from pipeline.errors import LorafleetError
from tasks.interrupts import Handler, Interrupt, without_alarm

_LOOK_UP_SECONDS = 2.0


class RunCancelledError(LorafleetError):
    """The run was cancelled in the Prefect UI. Finished work is kept."""


@contextmanager
def interrupted_if_cancelled() -> Iterator[None]:
    """While open, interrupt the flow run on SIGTERM, or when its state becomes Cancelling, as Ctrl-C does.

    Must be opened in the main thread. It has no effect on runs started by a Prefect worker, which stops them with
    SIGTERM itself. Without a worker, Prefect's engine would take SIGTERM for a crash.

    Raises:
        RunCancelledError: the run was cancelled. Raised instead of the KeyboardInterrupt.
    """
    if os.environ.get("PREFECT__FLOW_RUN_ID"):
        yield
        return
    on_ctrl_c = signal.getsignal(signal.SIGINT)  # ignored by processes that a shell starts in the background
    handler = on_ctrl_c if callable(on_ctrl_c) else signal.default_int_handler
    with _sigterm_calls(without_alarm(handler)), _watched():
        yield


@contextmanager
def _sigterm_calls(handler: Handler) -> Iterator[None]:
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _watched() -> Iterator[None]:
    """While open, send SIGTERM to this process when the state of the flow run becomes Cancelling.

    Raises:
        RunCancelledError: the run was cancelled. Raised instead of the KeyboardInterrupt.
    """
    ended, cancelled = threading.Event(), threading.Event()
    watch = threading.Thread(
        target=_watch, args=(UUID(flow_run.id), ended, cancelled), name="watch-for-cancellation", daemon=True
    )
    watch.start()
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if cancelled.is_set():
            if isinstance(interrupt, Interrupt):
                interrupt.settle()
            raise RunCancelledError(
                "cancelled in the Prefect UI; finished work is kept, run the same command to resume"
            ) from None
        raise
    finally:
        ended.set()


def _watch(run_id: UUID, ended: threading.Event, cancelled: threading.Event) -> None:
    with get_client(sync_client=True) as client:
        while not ended.wait(_LOOK_UP_SECONDS):
            with suppress(Exception):  # a server that is briefly unreachable cancels nothing
                state = client.read_flow_run(run_id).state
                if state is not None and state.is_cancelling() and not ended.is_set():
                    cancelled.set()
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
