"""``lorafleet doctor``."""

from __future__ import annotations

import json
import sys

import click

from flows.commands.options import JSON, Command
from flows.terminal import say, say_json
from pipeline.errors import InputError


@click.command(cls=Command)
@click.option("--runs", default="runs", show_default=True, metavar="DIR", help="Run store (may not exist yet).")
@click.option("--ray-address", metavar="ADDRESS", help="Check this Ray cluster. [default: that of RAY_ADDRESS, if set]")
@click.option("--start", "start_ray", is_flag=True, help="If no cluster is named, start a local Ray and stop it again.")
@click.option("--json", "as_json", is_flag=True, help=JSON)
def doctor(runs: str, ray_address: str | None, start_ray: bool, as_json: bool) -> None:
    """Check this machine, and say what to fix.

    Checks what a run needs, and the servers that it uses. The exit code is 0 if runs will work, with or without
    warnings, and 1 if something is broken.

    Example: lorafleet doctor --runs runs
    """
    from pipeline.store.lock import store_folder
    from tasks.checks.doctor import examine, report

    if start_ray and ray_address is not None:
        raise InputError(
            "--start has no effect with --ray-address, which names an existing cluster; give only one of them"
        )
    checks = examine(store_folder(runs), ray_address=ray_address, start_ray=start_ray)
    if as_json:
        say_json(json.loads(report(checks, as_json=True)))
    else:
        say(*report(checks, as_json=False).split("\n"))
    sys.exit(1 if any(check.status == "fault" for check in checks) else 0)
