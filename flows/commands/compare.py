"""``lorafleet compare``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.commands.options import Command
from flows.commands.run_flow import run_flow
from flows.terminal import complain, say, say_json, say_table

if TYPE_CHECKING:
    from flows.compare_arms import ComparisonOutcome
    from pipeline.compare.files import ComparisonFolder


@click.command(cls=Command)
@click.option("--config", "source", required=True, metavar="FILE|PRESET", help="Config with the data set.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key of the config. Repeatable."
)
@click.option("--task", "mteb_task", metavar="NAME", help="MTEB task to learn, if the config has several.")
@click.option(
    "--comparisons", default="comparisons", show_default=True, metavar="DIR", help="Folder of the comparisons."
)
@click.option("--force", is_flag=True, help="Train again what has finished with the same inputs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def compare(
    source: str, overrides: tuple[str, ...], mteb_task: str | None, comparisons: str, force: bool, as_json: bool
) -> None:
    """Compare LoRA with full fine-tuning.

    Arms are the frozen encoder, full fine-tuning, LoRA on several choices of layers, and a linear map. Each chooses its
    learning rate on validation, and is trained with several seeds. After a crash, run the same command to resume.

    Example: lorafleet compare --config tickets.toml --set compare.seeds=[0]
    """
    from pipeline.config import ComparisonConfig, load_config_of, select_task
    from pipeline.store.lock import hold_store, store_folder

    store = store_folder(comparisons)
    config = load_config_of(ComparisonConfig, source, overrides=overrides)
    select_task(config, mteb_task, command="compare")
    with hold_store(store, "being checked"):
        pass  # a locked store is refused before a server opens its database; the flow locks it again
    outcome = _run(source, overrides, mteb_task, store, force=force)
    for failure in outcome.failures:
        complain(f"failed: {failure.stage}: {failure.reason}")
    if outcome.folder is None:
        sys.exit(2 if all(failure.user_fault for failure in outcome.failures) else 1)
    _print(outcome.folder, as_json=as_json)
    sys.exit(1 if outcome.failures else 0)


def _run(
    source: str, overrides: tuple[str, ...], mteb_task: str | None, store: Path, *, force: bool
) -> ComparisonOutcome:
    """Run the flow with the configured Prefect server, or an embedded one."""
    from flows.compare_arms import compare_arms
    from tasks.services.prefect_server import PrefectServer

    server = PrefectServer(store / ".prefect")
    server.start()

    def run() -> Any:
        return compare_arms(
            source,
            overrides=list(overrides),
            mteb_task=mteb_task,
            comparisons=str(store),
            force=force,
            return_state=True,
        )

    result: ComparisonOutcome = run_flow(server, run)
    return result


def _print(folder: ComparisonFolder, *, as_json: bool) -> None:
    summary = json.loads(folder.results.read_text(encoding="utf-8"))
    if as_json:
        say_json(summary)
        return
    from pipeline.evaluation.metrics import title_of

    metric = summary["main_metric"]
    rows = []
    for arm, metrics in summary["arms"].items():
        value, cost = metrics[metric], summary["costs"][arm]
        over = summary["differences"].get(arm, {}).get("full", {}).get(metric)
        ends = "" if value["low"] is None else f" ({value['low']:.3f} to {value['high']:.3f})"
        gain = "" if over is None else f"{over['gain']:+.3f}"
        gain += "" if over is None or over["low"] is None else f" ({over['low']:+.3f} to {over['high']:+.3f})"
        rows.append(
            [
                arm,
                f"{value['value']:.3f}{ends}",
                gain,
                f"{cost['parameters']:,}",
                f"{cost['bytes_per_task']:,}",
                f"{cost['seconds_per_training']:.1f}",
            ]
        )
    headings = ["Arm", title_of(metric), "Over full", "Parameters", "Bytes per task", "Seconds"]
    say_table(headings, rows)
    say(f"comparison: {folder.root}")
