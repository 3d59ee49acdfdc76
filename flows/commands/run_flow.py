"""A Prefect flow run by a command: its server, its live table, and what is printed of its log."""

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
    """Run a flow once its server answers, with the live table, and return what the flow returned."""
    import httpx

    from tasks.live_table import LIVE_TABLE

    server.ready()
    logging.getLogger("prefect.events.clients").setLevel(
        logging.ERROR
    )  # it warns of each event that a server which is away does not take
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
    """Exit at once: Prefect would wait for seven seconds with each event that the server did not take, and there may be hundreds."""
    where = f"the Prefect server at {os.environ['PREFECT_API_URL']}"
    # On a line of its own: Prefect's last one, on logs that were not taken, has no end.
    complain("", f"error: {where} does not answer: {error}; finished work is kept, start again when it does")
    server.stop()
    sys.stdout.flush()
    os._exit(1)


def is_worth_logging(record: logging.LogRecord) -> bool:
    """Prefect ends every run with a line of its own; what came of a stage is said by the stage, and of the flow by the command.

    Stages that never began, because the one before failed, and those that an interrupt stopped have nothing to say.
    """
    if record.exc_info and type(record.exc_info[1]).__module__.startswith("httpx"):
        return False  # the flow's end that could not be reported, as a traceback
    stopped = "Failed('Task run encountered an exception StoppedError"
    ends = ("",) if record.name == "prefect.flow_runs" else ("Completed", "NotReady", stopped)
    interrupted = "Crash detected! Execution was aborted by an interrupt"
    return not record.getMessage().startswith((*(f"Finished in state {end}" for end in ends), interrupted))
