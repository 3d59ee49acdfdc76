"""The file of deployments, in a subset of Prefect's ``prefect.yaml`` format. Reads and validates only."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.utilities.templating import apply_values
from pydantic import Field, ValidationError, model_validator

from pipeline.config import like
from pipeline.documents import check_values, parse_yaml, read_text
from pipeline.errors import ConfigError, InputError
from pipeline.records import Record

_ANCHOR = datetime(2020, 1, 1, tzinfo=UTC)  # fixed, so that a second registration does not move the runs
_TOP_LEVEL = {"prefect-version", "name", "definitions", "pull", "deployments"}
_LONGEST_INTERVAL_SECONDS = 10 * 366 * 86_400
_Name = Annotated[str, like(r"[^/%&><]{1,200}", "1 to 200 characters without / % & < >")]  # as Prefect's server


def read_deployments(file: Path) -> list[DeploymentEntry]:
    """Read the deployments of a file.

    ``{{ $NAME }}`` is replaced by the environment variable NAME, and ``{{ $PWD }}`` by the working folder.

    Raises:
        InputError: the file cannot be read, or contains something that lorafleet does not register.
    """
    try:
        text = read_text(file)
    except ConfigError as error:
        raise InputError(f"{error}; choose another with --file") from None
    values = parse_yaml(text, origin=str(file))
    if not isinstance(values, dict) or not isinstance(values.get("deployments"), list) or not values["deployments"]:
        raise InputError(f"{file}: expected a mapping with a list of `deployments`, as in Prefect's prefect.yaml")
    if (unknown := set(values) - _TOP_LEVEL) or values.get("pull"):
        what = ", ".join(sorted(unknown)) or "pull"
        raise InputError(
            f"{file}: {what}: lorafleet registers deployments only, without build, push or pull; "
            "use `prefect deploy` for this file"
        )
    os.environ["PWD"] = str(Path.cwd())  # the shell's value may be that of a parent process
    try:
        filled: Any = apply_values(values["deployments"], {}, remove_notset=False)
    except ValueError as error:
        raise InputError(f"{file}: {error}; put dates in quotes") from None
    check_values(filled, origin=str(file))  # the environment may have inserted a password
    try:
        json.dumps(filled, allow_nan=False)
    except ValueError:
        raise InputError(
            f"{file}: contains .nan or .inf, which cannot be sent to Prefect's server; use another value"
        ) from None
    return [_entry(file, entry) for entry in filled]


class ScheduleEntry(Record):
    """One schedule of a deployment."""

    cron: str | None = Field(default=None, max_length=200)
    interval: float | None = Field(default=None, gt=0, le=_LONGEST_INTERVAL_SECONDS)
    """Interval in seconds, at least 1, counted from the anchor date."""
    timezone: str = Field(default="UTC", min_length=1)
    anchor_date: datetime = Field(
        default=_ANCHOR, ge=datetime(1970, 1, 2, tzinfo=UTC), le=datetime(2200, 1, 1, tzinfo=UTC)
    )
    day_or: bool = True
    """Whether day of month and day of week of a cron expression are combined with OR. AND otherwise."""
    active: bool = True
    parameters: dict[str, Any] = Field(default_factory=dict)
    slug: str | None = Field(default=None, min_length=1, max_length=200)

    @model_validator(mode="after")
    def _one_kind(self) -> ScheduleEntry:
        if (self.cron is None) == (self.interval is None):
            raise ValueError("expected either cron or interval")
        if self.interval is not None and self.interval < 1:
            raise ValueError(f"an interval of {self.interval:g} s would start runs continuously; expected at least 1")
        self.prefect()
        return self

    def prefect(self) -> CronSchedule | IntervalSchedule:
        """Convert to Prefect's type.

        Raises:
            ValueError: unknown time zone, or invalid cron expression.
        """
        if self.cron is not None:
            return CronSchedule(cron=self.cron, timezone=self.timezone, day_or=self.day_or)
        assert self.interval is not None
        return IntervalSchedule(
            interval=timedelta(seconds=self.interval), anchor_date=self.anchor_date, timezone=self.timezone
        )

    def __str__(self) -> str:
        when = (
            f"cron {self.cron}, {self.timezone}" if self.cron is not None else f"every {_in_words(self.interval or 0)}"
        )
        return when if self.active else f"{when} (inactive)"


class LimitEntry(Record):
    """Limit on concurrent runs of one deployment, and what happens to further runs."""

    limit: int = Field(ge=1, le=10_000)
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "ENQUEUE"
    grace_period_seconds: int | None = Field(default=None, ge=60, le=86400)


class PoolEntry(Record):
    """Work pool and queue that start the runs of a deployment."""

    name: _Name
    work_queue_name: _Name | None = None
    job_variables: dict[str, Any] = Field(default_factory=dict)


class DeploymentEntry(Record):
    """One deployment of the file, with the keys that lorafleet supports."""

    name: _Name
    entrypoint: str
    """``module.flow``. Paths are refused, because Prefect would put their folder first on ``sys.path``."""
    description: str | None = None
    """Defaults to the description of the flow."""
    tags: tuple[str, ...] = ()
    parameters: dict[str, Any] = Field(default_factory=dict)
    schedules: tuple[ScheduleEntry, ...] = ()
    concurrency_limit: LimitEntry | None = None
    work_pool: PoolEntry
    paused: bool = False


def schedule_of(*, interval: float | None, cron: str | None, timezone: str | None) -> ScheduleEntry | None:
    """Schedule given by command-line options, if any.

    Args:
        interval: Interval in seconds.
        cron: Cron expression.
        timezone: Time zone of either. Defaults to UTC.
    Raises:
        InputError: both kinds, a time zone alone, or an invalid value.
    """
    if interval is None and cron is None:
        if timezone is not None:
            raise InputError(
                f"--timezone {timezone}: has no effect without --cron or --interval; the file's schedules apply"
            )
        return None
    given = {"--interval": interval, "--cron": cron, "--timezone": timezone}
    try:
        return ScheduleEntry(cron=cron, interval=interval, timezone=timezone or "UTC")
    except ValidationError as error:
        options = " ".join(f"{option} {value!r}" for option, value in given.items() if value is not None)
        raise InputError(f"{options}: {_fault(error)}") from None


def _entry(file: Path, values: Any) -> DeploymentEntry:
    name = values.get("name") if isinstance(values, dict) else None
    try:
        entry = DeploymentEntry.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{file}: deployment {name!r}: {_fault(error)}") from None
    # Prefect fills those of the job variables when a run starts.
    if "{{" in json.dumps(entry.model_dump(mode="json", exclude={"work_pool"})):
        raise InputError(
            f"{file}: deployment {name!r}: a {{{{ … }}}} does not name a set environment variable; "
            "write its value instead"
        )
    is_path = ":" in entry.entrypoint or "/" in entry.entrypoint
    if is_path or not all(part.isidentifier() for part in entry.entrypoint.split(".")):
        what = "is a path" if is_path else "is not the name of a flow"
        raise InputError(f"{file}: deployment {name!r}: entrypoint {entry.entrypoint!r} {what}; expected module.flow")
    return entry


def _in_words(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds > size and seconds % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


def _fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where + ': ' if where else ''}{fault['msg'].removeprefix('Value error, ')}"
