"""Program that a Prefect worker runs for a deployment: ``python -P -m flows.scheduled``.

It is Prefect's engine with our flows already imported. Prefect itself would import them with the working folder first
on ``sys.path``, where a user's ``tasks.py`` could take the place of ours.
"""

from __future__ import annotations

import logging
import runpy

import flows.classify_datasets
import flows.publish_adapters
import flows.train_adapters  # noqa: F401


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Whether a log record adds information. The engine's traceback of a failed run only repeats the run's log."""
    return not record.getMessage().startswith("Engine execution exited with")


if __name__ == "__main__":
    logging.getLogger("prefect.flow_runs").addFilter(_is_worth_logging)
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)
