"""``lorafleet prune``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.commands.options import JSON, Command, FiniteRange
from flows.terminal import complain, say, say_json

if TYPE_CHECKING:
    from pipeline.history.retention import PruneResult


@click.command(cls=Command)
@click.argument("runs", metavar="RUNS", type=click.Path(path_type=Path))
@click.option(
    "--keep",
    type=click.IntRange(0, 1_000_000),
    default=10,
    show_default=True,
    metavar="N",
    help="Keep the newest N runs of each MTEB task.",
)
@click.option(
    "--older-than",
    type=FiniteRange(0, 36_500),
    default=30,
    show_default=True,
    metavar="DAYS",
    help="Delete only what is older. Unfinished work younger than 7 days is always kept.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be deleted. Delete nothing.")
@click.option("--json", "as_json", is_flag=True, help=JSON)
def prune(runs: Path, keep: int, older_than: float, dry_run: bool, as_json: bool) -> None:
    """Delete old runs and abandoned checkpoints.

    Published runs and the last good run of each MTEB task are kept. The history keeps every score. Its page is updated,
    without links to deleted runs.

    Example: lorafleet prune runs --keep 5 --older-than 60 --dry-run
    """
    from pipeline.history.retention import prune as prune_store
    from pipeline.history.verdicts import Policy

    pruned = prune_store(runs, Policy(keep=keep, older_than_days=older_than), dry_run=dry_run)
    _print_pruned(pruned, dry_run=dry_run, as_json=as_json)
    if not dry_run and any(verdict.goes and verdict.what == "run" for verdict in pruned.verdicts):
        from pipeline.reports.history_page import write_history_page

        write_history_page(runs)
    sys.exit(1 if pruned.failures else 0)


def _print_pruned(pruned: PruneResult, *, dry_run: bool, as_json: bool) -> None:
    from humanize import naturalsize

    if as_json:
        verdicts = [dataclasses.asdict(verdict) | {"path": str(verdict.path)} for verdict in pruned.verdicts]
        facts = {
            "dry_run": dry_run,
            "freed_bytes": pruned.freed_bytes,
            "failures": pruned.failures,
            "verdicts": verdicts,
        }
        say_json(facts)
        return
    for verdict in pruned.verdicts:
        word, size = "delete" if verdict.goes else "keep", naturalsize(verdict.num_bytes)
        say(f"{word:8}{verdict.what:16}{verdict.path}  {size:>8}  {verdict.reason}")
    for failure in pruned.failures:
        complain(f"failed: {failure}")
    num_deleted = sum(verdict.goes for verdict in pruned.verdicts) - len(pruned.failures)
    verb = "would delete" if dry_run else "deleted"
    say(f"{verb} {num_deleted} of {len(pruned.verdicts)}, {naturalsize(pruned.freed_bytes)}")
