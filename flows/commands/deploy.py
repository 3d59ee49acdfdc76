"""``lorafleet deploy``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from flows.commands.options import Command
from flows.terminal import say


@click.command(cls=Command)
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File with the deployments. [default: deploy/prefect.yaml of lorafleet]",
)
@click.option(
    "--name", "names", multiple=True, metavar="NAME", help="Register only this deployment of the file. Repeatable."
)
@click.option("--interval", type=float, metavar="SECONDS", help="Run at this interval instead of the file's schedule.")
@click.option("--cron", metavar="EXPR", help="Run by this cron expression instead of the file's schedule.")
@click.option(
    "--timezone", metavar="TZ", help="Time zone for --cron or --interval, such as Europe/Berlin. [default: UTC]"
)
@click.option(
    "--notify",
    metavar="TYPE/NAME",
    help="Report failed runs to this Prefect notification block, such as slack-webhook/team.",
)
def deploy(
    file: Path | None,
    names: tuple[str, ...],
    interval: float | None,
    cron: str | None,
    timezone: str | None,
    notify: str | None,
) -> None:
    """Register schedules with a Prefect server.

    The server is that of PREFECT_API_URL or, if unset, that of `lorafleet up`. Scheduled runs start in the current
    folder.

    Example: lorafleet deploy --name weekly --cron "0 6 * * 1" --timezone Europe/Berlin --notify slack-webhook/team
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    from flows.deploying import FILE
    from flows.deploying import deploy as register
    from flows.deployment_file import schedule_of

    schedule = schedule_of(interval=interval, cron=cron, timezone=timezone)
    for deployment in register(file or FILE, names=names, schedule=schedule, notify=notify):
        say(str(deployment))
