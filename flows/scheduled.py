"""What a Prefect worker runs for a deployment: ``python -P -m flows.scheduled``, which is Prefect's engine with our flows imported.

Prefect imports a flow with the working folder first on ``sys.path``; there a ``tasks.py`` of the user's would be taken for ours.
"""

from __future__ import annotations

import logging
import runpy

import flows.classify_datasets
import flows.publish_adapters
import flows.train_adapters  # noqa: F401


def _is_news(record: logging.LogRecord) -> bool:
    """Of every failed run Prefect logs the traceback of its own exception; what failed is in the run's log and state already."""
    return not record.getMessage().startswith("Engine execution exited with")


if __name__ == "__main__":
    logging.getLogger("prefect.flow_runs").addFilter(_is_news)
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)
