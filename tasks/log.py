"""The log of a flow or task run. What a line quotes (names, labels, paths, other libraries) cannot forge another line."""

from __future__ import annotations

import logging
from typing import Any

from prefect import get_run_logger

from pipeline.errors import LorafleetError
from pipeline.printable import printable


def run_logger() -> logging.LoggerAdapter[Any]:
    """Prefect's logger of this run, for ``log(format, *values)``: each value becomes one printable line."""
    return _Printable(get_run_logger(), {})


class _Printable(logging.LoggerAdapter[Any]):
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a line; the other methods call this one."""
        if self.isEnabledFor(level):
            self.logger.log(level, msg, *map(_shown, args), **kwargs)


def _shown(value: object) -> object:
    """Numbers as they are, for the format; an error of ours is printable, of one line or more."""
    return value if isinstance(value, int | float | LorafleetError) else printable(str(value))
