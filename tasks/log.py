"""Logger of a flow or task run. Quoted names, labels, paths and messages cannot forge another line."""

from __future__ import annotations

import logging
from typing import Any

from prefect import get_run_logger

from pipeline.errors import LorafleetError
from pipeline.printable import printable


def run_logger() -> logging.LoggerAdapter[Any]:
    """Logger of the current Prefect run, for ``log(format, *values)``. Each value is made one printable line."""
    return _Printable(get_run_logger(), {})


class _Printable(logging.LoggerAdapter[Any]):
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a line. The other methods call this one."""
        if self.isEnabledFor(level):
            self.logger.log(level, msg, *map(_shown, args), **kwargs)


def _shown(value: object) -> object:
    """Make a value printable. Numbers stay numbers for the format, and our own errors are printable already."""
    return value if isinstance(value, int | float | LorafleetError) else printable(str(value))
