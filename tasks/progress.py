"""A progress bar in the Prefect UI."""

from __future__ import annotations

import time
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

_SECONDS = 2.0


class ProgressArtifact:
    """Made when first shown, then updated, at most every two seconds. A server that is away for a moment costs no job."""

    def __init__(self, key: str) -> None:
        """Args: key: lower-case letters, digits and dashes."""
        self._key = key
        self._artifact: UUID | None = None
        self._shown = 0.0

    def show(self, percent: float, facts: str) -> None:
        """Replace the bar and the line below it; the end is always shown."""
        now = time.monotonic()
        if now - self._shown < _SECONDS and percent < 100:
            return
        self._shown = now
        try:
            if self._artifact is None:
                made = create_progress_artifact(progress=percent, key=self._key, description=facts)
                assert isinstance(made, UUID)
                self._artifact = made
            else:
                update_progress_artifact(artifact_id=self._artifact, progress=percent, description=facts)
        except Exception as error:  # noqa: BLE001 - whatever the client raises
            get_run_logger().warning("no progress artifact: %s", error)
