"""``lorafleet search``."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.commands.options import Command
from flows.commands.run_flow import run_flow
from flows.terminal import complain, say, say_json, say_table
from pipeline.errors import InputError

if TYPE_CHECKING:
    from flows.search_settings import SearchOutcome


@click.command(cls=Command)
@click.option("--config", "source", required=True, metavar="FILE|PRESET", help="Config with the data set.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key of the config. Repeatable."
)
@click.option("--task", "mteb_task", metavar="NAME", help="MTEB task of the config, if it has several.")
@click.option("--runs", default="runs", show_default=True, metavar="DIR", help="Run store, a folder.")
@click.option("--searches", default="searches", show_default=True, metavar="DIR", help="Folder of the searches.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def search(
    source: str, overrides: tuple[str, ...], mteb_task: str | None, runs: str, searches: str, as_json: bool
) -> None:
    """Search for better settings on validation.

    Trials that fall behind are stopped early. Test is used once, at the end, for the best trial and for the config as
    it is. After a crash, run the same command to resume.

    Example: lorafleet search --config tickets.toml --set search.trials=24
    """
    from pipeline.config import SearchedConfig, load_config_of, select_task
    from pipeline.store.lock import hold_store, store_folder

    if importlib.util.find_spec("optuna") is None:
        raise InputError("optuna is not installed here; pip install 'lorafleet[search]'")
    config = load_config_of(SearchedConfig, source, overrides=overrides)
    select_task(config, mteb_task, command="search")
    store = store_folder(searches)
    if store.resolve() == store_folder(runs).resolve():
        raise InputError(f"--runs and --searches: expected two folders, found {runs} for both")
    for folder in (store, store_folder(runs)):
        with hold_store(folder, "being checked"):
            pass  # a locked store is refused before a server opens its database; the flow locks it again
    outcome = _run(source, overrides, mteb_task, store_folder(runs), store)
    if outcome.fault is not None:
        complain(f"failed: {outcome.fault}")
    if outcome.folder is None:
        sys.exit(2 if outcome.is_user_fault else 1)
    _print(outcome.folder, as_json=as_json)
    sys.exit(1 if outcome.fault else 0)


def _run(source: str, overrides: tuple[str, ...], mteb_task: str | None, runs: Path, searches: Path) -> SearchOutcome:
    """Run the flow with the configured Prefect server, or an embedded one."""
    from flows.search_settings import search_settings
    from tasks.services.prefect_server import PrefectServer

    server = PrefectServer(searches / ".prefect")
    server.start()

    def run() -> Any:
        return search_settings(
            source,
            overrides=list(overrides),
            mteb_task=mteb_task,
            runs=str(runs),
            searches=str(searches),
            return_state=True,
        )

    result: SearchOutcome = run_flow(server, run)
    return result


def _print(folder: Path, *, as_json: bool) -> None:
    import pyarrow.parquet as pq

    from pipeline.search.report import sentences

    summary = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    if as_json:
        say_json(summary)
        return
    trials = pq.read_table(folder / "trials.parquet").to_pylist()
    settings = ["learning_rate", *summary["winner"]["values"]]
    rows = [
        [
            str(trial["number"]),
            trial["state"],
            "–" if trial["score"] is None else f"{trial['score']:.3f}",
            str(trial["epochs"]),
            *(str(trial[name]) for name in settings),
        ]
        for trial in trials
    ]
    say_table(["Trial", "State", "Validation", "Epochs", *(name.replace("_", " ") for name in settings)], rows)
    for line in sentences(summary):
        say(line)
    say(f"search: {folder}")
