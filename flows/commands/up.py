"""``lorafleet up``."""

from __future__ import annotations

import click

from flows.commands.options import Command
from flows.terminal import say


@click.command(cls=Command)
@click.option("--runs", default="runs", show_default=True, metavar="DIR", help="Run store, a folder.")
@click.option(
    "--port",
    default=4200,
    show_default=True,
    type=click.IntRange(1, 65_532),
    help="Port of the Prefect UI. The next three ports are used as well.",
)
@click.option("--no-ray", is_flag=True, help="Start no Ray. Each run starts its own, or joins that of RAY_ADDRESS.")
def up(runs: str, port: int, no_ray: bool) -> None:
    """Run Prefect, Ray and the reports locally.

    A Prefect server, a worker for scheduled runs, Ray and the reports run on this machine, until Ctrl-C.

    Example: lorafleet up --runs runs --port 4200
    """
    from pipeline.store.lock import store_folder
    from tasks.services.up import up as start

    start(store_folder(runs), port=port, with_ray=not no_ray, say=say)
