"""A flow that was started directly stops as by Ctrl-C: on SIGTERM, and on its cancellation in the Prefect UI."""

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

_LOOK_UP_SECONDS = 2.0


class RunCancelledError(LorafleetError):
    """The run was cancelled in the Prefect UI; what was finished is kept."""


@contextmanager
def interrupted_if_cancelled() -> Iterator[None]:
    """While open, a flow run is interrupted as by Ctrl-C by SIGTERM, and when it is set to Cancelling. Must be opened in the main thread.

    A Prefect worker stops the flow runs that it has started by itself, with SIGTERM: Prefect's engine knows what that means there. Here
    it would take it for a crash.

    Raises: RunCancelledError: instead of the KeyboardInterrupt of a cancellation.
    """
    if os.environ.get("PREFECT__FLOW_RUN_ID"):
        yield
        return
    of_ctrl_c = signal.getsignal(signal.SIGINT)
    # A shell ignores Ctrl-C for what it starts in the background.
    before = signal.signal(signal.SIGTERM, of_ctrl_c if callable(of_ctrl_c) else signal.default_int_handler)
    ended, cancelled = threading.Event(), threading.Event()
    watch = threading.Thread(
        target=_watch, args=(UUID(flow_run.id), ended, cancelled), name="watch-for-cancellation", daemon=True
    )
    watch.start()
    try:
        yield
    except KeyboardInterrupt:
        if cancelled.is_set():
            raise RunCancelledError(
                "cancelled in the Prefect UI; what was finished is kept, and the same call goes on from there"
            ) from None
        raise
    finally:
        ended.set()
        signal.signal(signal.SIGTERM, before)


def _watch(run_id: UUID, ended: threading.Event, cancelled: threading.Event) -> None:
    with get_client(sync_client=True) as client:
        while not ended.wait(_LOOK_UP_SECONDS):
            with suppress(Exception):  # a server that is away for a moment cancels nothing
                state = client.read_flow_run(run_id).state
                if state is not None and state.is_cancelling() and not ended.is_set():
                    cancelled.set()
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
