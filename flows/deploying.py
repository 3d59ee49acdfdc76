"""Registration of the schedules in ``deploy/prefect.yaml`` with a Prefect server. Starts no run."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from httpx import HTTPError
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.flows import Flow
from prefect.server.schemas import schedules as server_schedules
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    get_current_settings,
    temporary_settings,
)
from prefect.utilities.schema_tools.validation import ValidationError as ParameterError
from prefect.utilities.schema_tools.validation import validate
from prefect.utilities.urls import url_for
from prefect.workers.process import ProcessWorker

from flows.deployment_file import DeploymentEntry, LimitEntry, ScheduleEntry, read_deployments
from pipeline.errors import InputError, LorafleetError, first_line
from tasks.services.loopback import prepare_http
from tasks.services.notifying import notify_of_failures
from tasks.services.passwords import login_for, running_ups

FILE = Path(__file__).parents[1] / "deploy" / "prefect.yaml"
TAG = "lorafleet"
_DEFAULT_API = "http://127.0.0.1:4200/api"


@dataclass(frozen=True)
class Deployment:
    """A registered deployment."""

    name: str
    """``flow/deployment``."""
    schedules: tuple[str, ...]
    """Schedules in words."""
    next_run: datetime | None
    """Next scheduled start, in the schedule's time zone; None if no schedule is active."""
    url: str
    """Address of its page in the Prefect UI."""

    def __str__(self) -> str:
        when = "; ".join(self.schedules) or "no schedule"
        following = f"; next {self.next_run:%a %Y-%m-%d %H:%M:%S %Z}" if self.next_run else ""
        return f"{self.name}: {when}{following}; {self.url}"


def deploy(
    file: Path = FILE, *, names: Sequence[str] = (), schedule: ScheduleEntry | None = None, notify: str | None = None
) -> list[Deployment]:
    """Register deployments. Existing deployments of the same names are replaced. Runs start in the working folder.

    Args:
        file: Deployments in the format of Prefect's ``prefect.yaml``.
        names: Deployments to register, as ``deployment`` or ``flow/deployment``. Defaults to all in the file.
        schedule: Replacement of the file's schedules. Allowed for a single deployment only.
        notify: ``TYPE/NAME`` of a notification block that reports failed runs.
    Returns:
        The registered deployments.
    Raises:
        InputError: no server answers, or the file, a name, a parameter or the block is wrong.
        LorafleetError: the server fails.
    """
    chosen = _chosen([(entry, _load_flow(file, entry)) for entry in read_deployments(file)], file, names)
    if schedule is not None and len(chosen) > 1:
        raise InputError(f"--interval, --cron: {file} has {len(chosen)} deployments; choose one with --name")
    for entry, flow in chosen:
        _check_parameters(file, entry, flow)
        _check_schedules(file, entry, entry.schedules if schedule is None else (schedule,))
    with _server() as client:
        if notify is not None:
            notify_of_failures(client, notify, tag=TAG, ui=str(get_current_settings().ui_url))
        return [
            _register(client, file, entry, flow, entry.schedules if schedule is None else (schedule,))
            for entry, flow in chosen
        ]


def _load_flow(file: Path, entry: DeploymentEntry) -> Flow[..., Any]:
    """Import the flow of a deployment. Prefect itself would prefer a tasks.py in the working folder over ours."""
    module, _, name = entry.entrypoint.rpartition(".")
    context = f"{file}: deployment {entry.name!r}: entrypoint {entry.entrypoint!r}"
    try:
        flow = getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        if module.partition(".")[0] == "flows" and not isinstance(error, ImportError):
            raise
        raise InputError(
            f"{context}: cannot be imported: {type(error).__name__}: {first_line(error)}; expected module.flow"
        ) from None
    if not isinstance(flow, Flow):
        raise InputError(f"{context}: {name} is not a flow of {module}; expected module.flow")
    return flow


def _chosen(
    entries: list[tuple[DeploymentEntry, Flow[..., Any]]], file: Path, names: Sequence[str]
) -> list[tuple[DeploymentEntry, Flow[..., Any]]]:
    existing = {f"{flow.name}/{entry.name}": entry.name for entry, flow in entries}
    if len(existing) < len(entries):
        every = [f"{flow.name}/{entry.name}" for entry, flow in entries]
        duplicates = sorted({name for name in every if every.count(name) > 1})
        raise InputError(
            f"{file}: {', '.join(duplicates)} is in it more than once, and the last one would replace the others; "
            "rename them"
        )
    if unknown := [name for name in names if name not in (*existing, *existing.values())]:
        raise InputError(f"--name {', '.join(unknown)}: not in {file}; it has {', '.join(existing)}")
    return [
        (entry, flow) for entry, flow in entries if not names or {entry.name, f"{flow.name}/{entry.name}"} & set(names)
    ]


def _check_parameters(file: Path, entry: DeploymentEntry, flow: Flow[..., Any]) -> None:
    """Check the parameters now. The server would check them only when a run is due."""
    schema = flow.parameters.model_dump(exclude_unset=True)
    for parameters in (entry.parameters, *(entry.parameters | schedule.parameters for schedule in entry.schedules)):
        if unknown := set(parameters) - set(schema["properties"]):
            names = ", ".join(schema["properties"])
            raise InputError(
                f"{file}: deployment {entry.name!r}: no parameter {', '.join(sorted(unknown))}; parameters are {names}"
            )
        try:
            validate(parameters, schema, raise_on_error=True, ignore_required=True)
        except ParameterError as error:
            raise InputError(f"{file}: deployment {entry.name!r}: parameters: {error}") from None


def _check_schedules(file: Path, entry: DeploymentEntry, schedules: Sequence[ScheduleEntry]) -> None:
    for schedule in schedules:
        try:
            _next_run(schedule)
        except ValueError as error:  # such as the 31st of February
            raise InputError(
                f"{file}: deployment {entry.name!r}: {schedule}: no run would ever be due: {first_line(error)}"
            ) from None


@contextmanager
def _server() -> Iterator[SyncPrefectClient]:
    """Open a client of the server of ``PREFECT_API_URL``, or else of `lorafleet up`, whose password is found.

    Raises:
        InputError: no server answers, or it refuses the password.
        LorafleetError: the server fails, or stopped responding.
    """
    url = os.environ.get("PREFECT_API_URL") or _server_of_up()
    prepare_http()
    login = login_for(url)
    with temporary_settings({PREFECT_API_URL: url} | ({PREFECT_API_AUTH_STRING: login} if login else {})):
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), get_client(sync_client=True) as client:
            fault = client.api_healthcheck()
        if fault is not None:
            why = str(fault).splitlines()[0]
            raise InputError(
                f"no Prefect server answers at {url} ({why}); "
                "start one with `lorafleet up`, or set PREFECT_API_URL to yours"
            )
        try:
            with get_client(sync_client=True) as client:
                yield client
        except PrefectHTTPStatusError as error:
            if error.response.status_code in (401, 403):
                raise InputError(
                    f"the Prefect server at {url} requires a password; set PREFECT_API_AUTH_STRING=NAME:PASSWORD"
                ) from None
            raise LorafleetError(
                f"the Prefect server at {url} fails: {error.response.status_code} {error.response.text[:300]}"
            ) from None
        except HTTPError as error:
            raise LorafleetError(
                f"the Prefect server at {url} stopped responding: {error}; run the command again"
            ) from None


def _server_of_up() -> str:
    """API of this user's `lorafleet up`. If several are running, the one with its run store in the working folder.

    Raises:
        InputError: several are running, and none or more than one has its run store there.
    """
    ups = running_ups()
    match [up for up in ups if up.runs.is_relative_to(Path.cwd())] or ups:
        case []:
            return _DEFAULT_API
        case [up]:
            return up.api
        case several:
            candidates = ", ".join(f"{up.api} (run store {up.runs})" for up in several)
            raise InputError(f"several `lorafleet up` are running: {candidates}; set PREFECT_API_URL to one of them")


def _register(
    client: SyncPrefectClient,
    file: Path,
    entry: DeploymentEntry,
    flow: Flow[..., Any],
    schedules: Sequence[ScheduleEntry],
) -> Deployment:
    _make_pool(client, entry.work_pool.name)
    limit = entry.concurrency_limit
    try:
        deployment = client.create_deployment(
            flow_id=client.create_flow_from_name(flow.name),
            name=entry.name,
            version=version("lorafleet"),
            entrypoint=entry.entrypoint,
            description=entry.description or flow.description,
            tags=list(entry.tags),
            parameters=entry.parameters,
            parameter_openapi_schema=flow.parameters.model_dump(exclude_unset=True),
            enforce_parameter_schema=True,
            schedules=[
                DeploymentScheduleCreate(schedule=s.prefect(), active=s.active, parameters=s.parameters, slug=s.slug)
                for s in schedules
            ],
            concurrency_limit=None if limit is None else limit.limit,
            concurrency_options=None if limit is None else _options(limit),
            work_pool_name=entry.work_pool.name,
            work_queue_name=entry.work_pool.work_queue_name,
            job_variables=entry.work_pool.job_variables,
            paused=entry.paused,
            pull_steps=[],
        )
    except PrefectHTTPStatusError as error:
        if error.response.is_client_error:
            raise InputError(
                f"{file}: deployment {entry.name!r}: the Prefect server refuses it: {error.response.text[:300]}"
            ) from None
        raise
    following = [_next_run(schedule) for schedule in schedules if schedule.active and not entry.paused]
    return Deployment(
        name=f"{flow.name}/{entry.name}",
        schedules=tuple(map(str, schedules)),
        next_run=min(filter(None, following), default=None),
        url=str(url_for("deployment", deployment)),
    )


def _options(limit: LimitEntry) -> ConcurrencyOptions:
    strategy = ConcurrencyLimitStrategy(limit.collision_strategy)
    return ConcurrencyOptions(collision_strategy=strategy, grace_period_seconds=limit.grace_period_seconds)


def _make_pool(client: SyncPrefectClient, name: str) -> None:
    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=name, type=ProcessWorker.type, base_job_template=template))


def _next_run(schedule: ScheduleEntry) -> datetime | None:
    """Next start of a schedule, computed by the server's own code.

    Raises:
        ValueError: no run would ever be due.
    """
    client_schedule = schedule.prefect()
    server_type = getattr(server_schedules, type(client_schedule).__name__)
    dates: list[datetime] = asyncio.run(server_type(**client_schedule.model_dump()).get_dates(1))
    return dates[0].astimezone(ZoneInfo(schedule.timezone)) if dates else None
