"""Running a Prefect flow from a command: its server, live table and log."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from flows.terminal import complain

if TYPE_CHECKING:
    from tasks.services.prefect_server import PrefectServer


def run_flow(server: PrefectServer, flow: Callable[[], Any]) -> Any:
    """Wait for the server, run the flow with the live table, and return the flow's result.

    Raises:
        KeyboardInterrupt: the run was cancelled.
        BaseException: the exception that the flow ended with.
    """
    import httpx

    from tasks.live_table import LIVE_TABLE

    server.ready()
    # Else Prefect would warn of each event that an unreachable server does not accept.
    logging.getLogger("prefect.events.clients").setLevel(logging.ERROR)
    for runs in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(runs).addFilter(is_worth_logging)
    try:
        with LIVE_TABLE.live():
            state = flow()
    except httpx.HTTPError as error:
        _leave_without_server(server, error)
    if state.is_cancelled():
        raise KeyboardInterrupt
    outcome = state.result(raise_on_failure=False)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _leave_without_server(server: PrefectServer, error: Exception) -> NoReturn:
    """Exit at once. Prefect would wait seven seconds for each of the pending events, of which there may be hundreds."""
    address = f"the Prefect server at {os.environ['PREFECT_API_URL']}"
    # Starts with a new line, because Prefect's last message has no line end.
    complain("", f"error: {address} does not answer: {error}; finished work is kept, start again when it does")
    server.stop()
    sys.stdout.flush()
    os._exit(1)


def is_worth_logging(record: logging.LogRecord) -> bool:
    """Whether a Prefect log record adds information. Used as a log filter.

    Prefect logs the final state of every run, but stages and commands report their results themselves. Stages that were
    skipped or interrupted have no result.
    """
    if record.exc_info and type(record.exc_info[1]).__module__.startswith("httpx"):
        return False  # the traceback of a final state that could not be reported
    stopped = "Failed('Task run encountered an exception StoppedError"
    ends = ("",) if record.name == "prefect.flow_runs" else ("Completed", "NotReady", stopped)
    interrupted = "Crash detected! Execution was aborted by an interrupt"
    return not record.getMessage().startswith((*(f"Finished in state {end}" for end in ends), interrupted))
