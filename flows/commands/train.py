"""``lorafleet train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.commands.options import Command
from flows.commands.run_flow import run_flow
from flows.commands.show import results_json, show_run
from flows.terminal import complain, say, say_json

if TYPE_CHECKING:
    from flows.train_adapters import RunOutcome
    from pipeline.config import RunConfig


@click.command(cls=Command)
@click.option(
    "--config",
    "source",
    default="quickstart",
    show_default=True,
    metavar="PRESET|FILE",
    help="Name of a preset (quickstart, minilm6, mteb8), or path of a TOML file.",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key of the config. Repeatable."
)
@click.option("--runs", default="runs", show_default=True, metavar="DIR", help="Run store, a folder.")
@click.option("--dry-run", is_flag=True, help="Check the config and print the resolved plan. Read nothing else.")
@click.option("--force", is_flag=True, help="Train again even if an earlier run has finished with the same inputs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def train(source: str, overrides: tuple[str, ...], runs: str, dry_run: bool, force: bool, as_json: bool) -> None:
    """Train and evaluate one adapter per task.

    All results of a run are in one run folder. After a crash, run the same command to resume.

    Example: lorafleet train --config mteb8 --set data.mirror=data/mteb --set train.seed=7
    """
    from pipeline.config import load_config
    from pipeline.store.lock import store_folder

    store_folder(runs)
    config = load_config(source, overrides=overrides)
    if dry_run:
        _print_plan(config, as_json=as_json)
        return
    outcome = _run(config, source, overrides, runs, force=force)
    _print_outcome(outcome, as_json=as_json)
    if outcome.folder is None:
        sys.exit(2 if all(failure.user_fault for failure in outcome.failures) else 1)
    if not as_json:
        say(f"run: {outcome.folder.root}")
    sys.exit(1 if outcome.failures else 0)


def _run(config: RunConfig, source: str, overrides: tuple[str, ...], runs: str, *, force: bool) -> RunOutcome:
    """Run the flow with the configured Prefect server, or an embedded one."""
    from pipeline.store.lock import hold_store
    from tasks.services.prefect_server import PrefectServer

    store = Path(runs)
    with hold_store(store, "being checked"):
        pass  # a locked store is refused before a server opens its database; the flow locks it again
    server = PrefectServer(store / ".prefect")
    from tasks.ahead import ahead_of_run
    from tasks.early_check import refuse_wrong_files

    with ahead_of_run(config, store) as ahead:
        ahead.start(force=force)
        refuse_wrong_files(config)
        from flows.train_adapters import train_adapters

        server.start()  # not earlier: on few cores it would delay the workers

        def run() -> Any:
            try:
                return train_adapters(source, overrides=list(overrides), runs=runs, force=force, return_state=True)
            finally:
                ahead.fleet.stop()  # also here, because the process exits at once if Prefect's server is gone

        result: RunOutcome = run_flow(server, run)
        return result


def _print_plan(config: RunConfig, *, as_json: bool) -> None:
    from pipeline.data.catalogue import describe_source, plan_tasks

    tasks = plan_tasks(config)
    plan = {"config": config.model_dump(mode="json"), "mteb_tasks": [t.model_dump() for t in tasks]}
    if as_json:
        say_json(plan)
        return
    import tomli_w

    say(*tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)).split("\n"))
    for t in tasks:
        say(f"# {t.name}: {describe_source(t)}; at most {t.max_epochs} epochs")


def _print_outcome(outcome: RunOutcome, *, as_json: bool) -> None:
    # The run's files do not list failures of publishing, because they are written before.
    unpublished = [failure for failure in outcome.failures if failure.stage in ("gate", "publish")]
    for failure in unpublished:
        complain(f"failed: {' · '.join(filter(None, (failure.stage, failure.mteb_task)))}: {failure.reason}")
    if as_json:
        if outcome.folder is not None:
            summary = results_json(outcome.folder.root)
            summary["failures"] += [failure.model_dump() for failure in unpublished]
            say_json(summary)
        else:
            say_json({"failures": [f.model_dump() for f in outcome.failures]})
        return
    if outcome.folder is not None:
        show_run(outcome.folder.root, as_json=False)
