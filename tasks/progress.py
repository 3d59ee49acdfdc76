"""Prefect artifacts of a run: progress bar, tables, texts and links. A run never fails because of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any
from uuid import UUID

from prefect import artifacts
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from pipeline.printable import printable
from tasks.log import run_logger

_SECONDS = 2.0
_gone = threading.Event()


class ProgressArtifact:
    """A progress bar in the Prefect UI, updated at most every two seconds. Errors of the server are only logged."""

    def __init__(self, key: str) -> None:
        """Create nothing yet.

        Args:
            key: Key of the artifact: lower-case letters, digits and dashes.
        """
        self._key = key
        self._artifact: UUID | None = None
        self._shown = 0.0
        self._answers = True

    def show(self, percent: float, facts: str) -> None:
        """Update the bar. An update within two seconds of the last one is skipped, unless it completes the bar.

        Args:
            percent: Progress from 0 to 100.
            facts: Line below the bar.
        """
        now = time.monotonic()
        if now - self._shown < _SECONDS and percent < 100:
            return
        self._shown = now
        try:
            with _impatient():  # a retry would block the events of the worker, and the next update is near
                self._send(percent, facts)
            self._answers = True
        except Exception as error:  # noqa: BLE001 - whatever the client raises
            if self._answers:
                run_logger().warning("no progress artifact: the Prefect server does not answer: %s", error)
            self._answers = False

    def _send(self, percent: float, facts: str) -> None:
        if self._artifact is None:
            artifact = artifacts.create_progress_artifact(progress=percent, key=self._key, description=printable(facts))
            assert isinstance(artifact, UUID)
            self._artifact = artifact
        else:
            artifacts.update_progress_artifact(
                artifact_id=self._artifact, progress=percent, description=printable(facts)
            )


def _harmless(create: Callable[..., Any]) -> Callable[..., None]:
    """Wrap a function that creates an artifact: content is made printable, and a failure becomes a warning.

    Prefect's client retries for a minute. After one failure, later calls do not retry until a call succeeds.
    """

    @wraps(create)
    def create_or_warn(*args: Any, key: str, **content: Any) -> None:
        try:
            with _impatient() if _gone.is_set() else nullcontext():
                create(*map(_shown, args), key=key, **{name: _shown(value) for name, value in content.items()})
            _gone.clear()
        except Exception as error:  # noqa: BLE001 - whatever the client raises
            run_logger().warning("no artifact %r: the Prefect server does not answer: %s", key, error)
            _gone.set()

    return create_or_warn


def _shown(content: Any) -> Any:
    """Make the lines of a text, or the cells of a table, printable. Values in a text are already single lines."""
    return "\n".join(map(printable, content.split("\n"))) if isinstance(content, str) else _cells(content)


def _cells(table: Any) -> Any:
    if isinstance(table, str):
        return printable(table)
    if isinstance(table, Mapping):
        return {_cells(key): _cells(value) for key, value in table.items()}
    return [_cells(value) for value in table] if isinstance(table, list | tuple) else table


def _impatient() -> AbstractContextManager[Any]:
    return temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})


create_table_artifact = _harmless(artifacts.create_table_artifact)
create_markdown_artifact = _harmless(artifacts.create_markdown_artifact)
create_link_artifact = _harmless(artifacts.create_link_artifact)
