"""The command line. Imports only what the command at hand needs: ``--help`` and ``--dry-run`` start nothing."""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from pipeline.errors import InputError, LorafleetError

if TYPE_CHECKING:
    from flows.classify_datasets import BulkOutcome
    from flows.train_adapters import RunOutcome
    from pipeline.bulk_records import BulkRequest, BulkSummary
    from pipeline.config import RunConfig
    from pipeline.export import Form
    from pipeline.publish import Published
    from pipeline.results import ScoreTable
    from pipeline.retention import Pruned
    from pipeline.verify import Verified
    from tasks.embedded import PrefectServer

_INTERRUPTED = 130
_LABELS_SHOWN = 10


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="lorafleet")
def lorafleet() -> None:
    """Train, evaluate, publish and apply a fleet of LoRA text classifiers on one frozen encoder."""


@lorafleet.command()
@click.option("--config", "source", default="quickstart", show_default=True, metavar="PRESET|FILE", help="A preset's name, or a TOML file.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key of the config; may be repeated.")
@click.option("--runs", default="runs", show_default=True, metavar="DIR", help="The run store.")
@click.option("--dry-run", is_flag=True, help="Check the config, print the resolved plan, and read nothing else.")
@click.option("--force", is_flag=True, help="Train again what an earlier run has finished for the same inputs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def train(source: str, overrides: tuple[str, ...], runs: str, dry_run: bool, force: bool, as_json: bool) -> None:
    """Train one adapter per MTEB task, evaluate it honestly, and collect everything in a run folder.

    Example: lorafleet train --config mteb8 --set data.mirror=data/mteb --set train.seed=7
    """
    from pipeline.config import load_config

    if "://" in runs:
        raise InputError(f"--runs {runs}: the run store must be a local or mounted folder")
    config = load_config(source, overrides=overrides)
    if dry_run:
        _print_plan(config, as_json=as_json)
        return
    outcome = _run(config, source, overrides, runs, force=force)
    _print_outcome(outcome, as_json=as_json)
    if outcome.folder is None:
        sys.exit(2 if all(failure.user_fault for failure in outcome.failures) else 1)
    if not as_json:
        click.echo(f"run: {outcome.folder.root}")
    sys.exit(1 if outcome.failures else 0)


@lorafleet.command()
@click.argument("source", metavar="INPUT")
@click.argument("output", metavar="OUTPUT")
@click.option("--adapter", "adapters", multiple=True, required=True, metavar="[NAME=]REF", help="An adapter; may be repeated.")
@click.option("--text-column", default="text", show_default=True, metavar="NAME", help="The column to classify.")
@click.option("--columns", metavar="A,B,…", help="Input columns to keep; all where left out.")
@click.option("--min-score", type=float, metavar="P", help="Leave the label null below this probability.")
@click.option("--target-accuracy", type=float, metavar="A", help="The same, with the threshold from each adapter's coverage table.")
@click.option("--top-k", type=int, default=1, show_default=True, metavar="K", help="Also list the K most probable labels.")
@click.option("--limit", type=int, metavar="N", help="Only the first N rows, to try a job.")
@click.option("--sample", type=float, metavar="F", help="Only a random share of the rows, to try a job.")
@click.option("--rows-per-unit", type=int, default=200_000, show_default=True, metavar="N", help="What is done, or done again, as a whole.")
@click.option("--encoder", metavar="NAME", help="Where the encoder lies: a Hub id, a folder, or package:NAME.")
@click.option("--where", default="auto", show_default=True, type=click.Choice(["auto", "process", "ray"]), help="This process, or Ray.")
@click.option("--cpus", default="auto", show_default=True, metavar="N", help="CPU share of one Ray actor.")
@click.option("--gpus", default="auto", show_default=True, metavar="N", help="GPU share of one Ray actor.")
@click.option("--concurrency", default="auto", show_default=True, metavar="N", help="Ray actors at most.")
@click.option("--ray-address", metavar="ADDRESS", help="An existing Ray cluster.")
@click.option("--offline", is_flag=True, help="Never ask the Hub.")
@click.option("--overwrite", is_flag=True, help="Replace another job's output, once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def classify(as_json: bool, **given: Any) -> None:
    """Label Parquet with trained adapters; the same command goes on where an earlier one was stopped.

    Example: lorafleet classify reviews/ labelled/ --adapter runs/20261120-181500-1a2b#RottenTomatoes
    """
    outcome = _classify(_bulk_request(given))
    if outcome.error is not None:
        click.echo(f"error: {outcome.error}", err=True)
        sys.exit(2 if isinstance(outcome.error, InputError) else 1)
    assert outcome.summary is not None
    if as_json:
        click.echo(outcome.summary.model_dump_json(indent=1))
    else:
        _print_summary(outcome.summary)
    for failure in outcome.failures:
        where = failure.path if failure.unit is None else f"{failure.path}, rows from {failure.first_row}"
        click.echo(f"failed: {where}: {failure.reason}", err=True)
    if outcome.aside is not None:
        click.echo(f"the old output in {given['output']} is left as it was, because of the failures", err=True)
    if not as_json:
        click.echo(f"output: {outcome.aside or given['output']}")
    sys.exit(1 if outcome.failures else 0)


@lorafleet.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--to", required=True, metavar="DIR|hf:OWNER/NAME", help="A folder, or a repository of the Hugging Face Hub.")
@click.option("--private", is_flag=True, help="Make the repository private, if it has to be made.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the run's [publish]; may be repeated.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that the run's encoder comes with, where it needs some.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def publish(run: Path, to: str, private: bool, overrides: tuple[str, ...], trust_remote_code: bool, as_json: bool) -> None:
    """Publish what the promotion gate lets through of a finished run: verified, in one commit.

    Example: lorafleet publish runs/20261120-181500-1a2b --to hf:me/support-classifiers --set publish.gate.min_gain=0.002
    """
    from pipeline.config import publish_config
    from pipeline.publication import read_candidate
    from pipeline.publish import publish as publish_run
    from tasks.loopback import prepare_http

    prepare_http()
    config = publish_config(read_candidate(run).manifest.config, to=to, private=private, overrides=overrides)
    published = publish_run(run, to, config, trust_remote_code=trust_remote_code)
    _print_published(published, as_json=as_json)
    sys.exit(1 if published.blocked else 0)


@lorafleet.command()
@click.argument("ref", metavar="REF")
@click.option("--encoder", metavar="NAME", help="Where the encoder lies: a Hub id, a folder, or package:NAME.")
@click.option("--offline", is_flag=True, help="Never ask the Hub.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(ref: str, encoder: str | None, offline: bool, as_json: bool) -> None:
    """Reload published adapters in a fresh process, and compare them with what was trained.

    Example: lorafleet verify hf:me/support-classifiers@run-20261120-181500-1a2b
    """
    from pipeline.verify import verify as verify_ref
    from tasks.loopback import prepare_http

    prepare_http()
    _print_verified(verify_ref(ref, encoder=encoder, offline=offline), as_json=as_json)


@lorafleet.command()
@click.argument("repository", metavar="hf:OWNER/NAME")
@click.option("--to", "revision", required=True, metavar="TAG|REVISION", help="The state to go back to; a run's is tagged run-<run>.")
@click.option("--encoder", metavar="NAME", help="Where the encoder lies: a Hub id, a folder, or package:NAME.")
@click.option("--offline", is_flag=True, help="Never ask the Hub for an encoder.")
def rollback(repository: str, revision: str, encoder: str | None, offline: bool) -> None:
    """Make an older state of a repository its newest one, verified first.

    Example: lorafleet rollback hf:me/support-classifiers --to run-20261113-181500-9c8d
    """
    from pipeline.publish import rollback as roll_back
    from tasks.loopback import prepare_http

    prepare_http()
    landed, verified = roll_back(repository, revision, encoder=encoder, offline=offline)
    _print_verified(verified, as_json=False)
    click.echo(f"{repository} is at {landed} now, with the files of {revision}")


@lorafleet.command()
@click.argument("ref", metavar="REF")
@click.argument("target", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option(
    "--form",
    required=True,
    type=click.Choice(["sentence-transformers", "classifier", "transformers", "onnx"]),
    help="The adapted encoder; encoder and head for sentence-transformers; for transformers' own pipeline (EuroBERT); for ONNX Runtime.",
)
@click.option("--encoder", metavar="NAME", help="Where the encoder lies: a Hub id, a folder, or package:NAME.")
@click.option("--offline", is_flag=True, help="Never ask the Hub.")
def export(ref: str, target: Path, form: Form, encoder: str | None, offline: bool) -> None:
    """Write one adapter, merged into its encoder, as a model that other tools load; read back and compared.

    Example: lorafleet export hf:me/support-classifiers#Tickets tickets-onnx --form onnx
    """
    from pipeline.adapter_ref import find_adapters
    from pipeline.export import export_adapter
    from tasks.loopback import prepare_http

    prepare_http()
    (adapter,) = find_adapters([ref], offline=offline)
    exported = export_adapter(adapter, target, form=form, encoder=encoder, offline=offline)
    click.echo(f"exported {exported.adapter} to {target}: within {exported.largest_difference:.2g} of the adapter itself")


@lorafleet.command()
@click.argument("place", metavar="RUN|RUNS", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def show(place: Path, as_json: bool) -> None:
    """Print the score table of a run, or the history of each MTEB task over the runs of a store.

    Example: lorafleet show runs
    """
    from pipeline.run_folder import RunFolder

    if RunFolder(place).results.is_file():
        _show_run(place, as_json=as_json)
    else:
        _show_history(place, as_json=as_json)


@lorafleet.command()
@click.option("--runs", default="runs", show_default=True, metavar="DIR", help="The run store; need not be there yet.")
@click.option("--ray-address", metavar="ADDRESS", help="An existing Ray cluster; that of RAY_ADDRESS where left out.")
@click.option("--start", "start_ray", is_flag=True, help="Where no cluster is named, start a local Ray and stop it again.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(runs: str, ray_address: str | None, start_ray: bool, as_json: bool) -> None:
    """Check what a run needs of this machine and the servers it uses, and say what to do about each fault.

    Exit code 0 where runs will work, warnings or not; 1 where something is broken.

    Example: lorafleet doctor --runs runs
    """
    from flows.doctor import examine, report

    if "://" in runs:
        raise InputError(f"--runs {runs}: the run store must be a local or mounted folder")
    checks = examine(Path(runs), ray_address=ray_address, start_ray=start_ray)
    click.echo(report(checks, as_json=as_json))
    sys.exit(1 if any(check.status == "fault" for check in checks) else 0)


@lorafleet.command()
@click.argument("runs", metavar="RUNS", type=click.Path(path_type=Path))
@click.option(
    "--keep", type=click.IntRange(min=0), default=10, show_default=True, metavar="N", help="Newest runs of each MTEB task to keep."
)
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    metavar="DAYS",
    help="Delete only what is older; of what was never finished, also only what is older than 7 days.",
)
@click.option("--dry-run", is_flag=True, help="Print the same, and delete nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def prune(runs: Path, keep: int, older_than: float, dry_run: bool, as_json: bool) -> None:
    """Delete old run folders and abandoned checkpoints of a run store.

    What was published stays, and so does the last good run of each MTEB task. The history over runs keeps every score; its page is
    written anew, without links to what is gone.

    Example: lorafleet prune runs --keep 5 --older-than 60 --dry-run
    """
    from pipeline.retention import Policy
    from pipeline.retention import prune as prune_store

    pruned = prune_store(runs, Policy(keep=keep, older_than_days=older_than), dry_run=dry_run)
    _print_pruned(pruned, dry_run=dry_run, as_json=as_json)
    if not dry_run and any(verdict.goes and verdict.what == "run" for verdict in pruned.verdicts):
        from pipeline.history_page import write_history_page

        write_history_page(runs)
    sys.exit(1 if pruned.failures else 0)


@lorafleet.command()
@click.option("--file", type=click.Path(path_type=Path), metavar="FILE", help="Deployments; where left out, our deploy/prefect.yaml.")
@click.option("--name", "names", multiple=True, metavar="NAME", help="Only this deployment of the file; may be repeated.")
@click.option("--interval", type=float, metavar="SECONDS", help="Every so many seconds, instead of the file's schedule.")
@click.option("--cron", metavar="EXPR", help="By a cron expression, instead of the file's schedule.")
@click.option("--timezone", metavar="TZ", help="Of --cron or --interval, such as Europe/Berlin; UTC where left out.")
@click.option("--notify", metavar="TYPE/NAME", help="Tell this Prefect notification block of failed runs, such as slack-webhook/team.")
def deploy(
    file: Path | None, names: tuple[str, ...], interval: float | None, cron: str | None, timezone: str | None, notify: str | None
) -> None:
    """Register schedules with the Prefect server of PREFECT_API_URL (of lorafleet up, where unset); runs start in this folder.

    Example: lorafleet deploy --name weekly --cron "0 6 * * 1" --timezone Europe/Berlin --notify slack-webhook/team
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    from flows.deploying import FILE
    from flows.deploying import deploy as register
    from flows.deployment_file import schedule_of

    schedule = schedule_of(interval=interval, cron=cron, timezone=timezone)
    for deployed in register(file or FILE, names=names, schedule=schedule, notify=notify):
        click.echo(deployed)


@lorafleet.command()
@click.option("--runs", default="runs", show_default=True, type=click.Path(path_type=Path), metavar="DIR", help="The run store.")
@click.option("--port", default=4200, show_default=True, type=click.IntRange(1, 65_532), help="Of the Prefect UI; three more follow it.")
@click.option("--no-ray", is_flag=True, help="Start no Ray: each run starts its own, or joins that of RAY_ADDRESS.")
def up(runs: Path, port: int, no_ray: bool) -> None:
    """Run a Prefect server, a worker for scheduled runs, Ray and the reports on this machine, until Ctrl-C.

    Example: lorafleet up --runs runs --port 4200
    """
    from flows.up import up as start

    start(runs, port=port, with_ray=not no_ray, say=click.echo)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; turns errors into one message and an exit code."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported
    try:
        lorafleet.main(args=arguments, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; what was finished is kept, and the same command goes on from there", err=True)
        sys.exit(_INTERRUPTED)
    except LorafleetError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2 if isinstance(error, InputError) else 1)


def _run(config: RunConfig, source: str, overrides: tuple[str, ...], runs: str, *, force: bool) -> RunOutcome:
    """Run the flow with what it needs around it: the configured Prefect server, or an embedded one."""
    from pipeline.run_store import hold_store
    from tasks.embedded import PrefectServer

    store = Path(runs)
    with hold_store(store, "being checked"):
        pass  # who cannot have the store must not start a server on its database; the flow takes it for good
    server = PrefectServer(store / ".prefect")
    from tasks.early_check import refuse_wrong_files, start_check_ahead
    from tasks.fleet import fleet_ahead

    with fleet_ahead(config) as fleet:
        if force or start_check_ahead(config, store) is None:
            fleet.start_ahead()  # Ray and the workers' imports take longest; the driver imports Prefect meanwhile
        refuse_wrong_files(config)
        from flows.train_adapters import train_adapters

        server.start()  # not before: on few cores it would keep the workers waiting

        def run() -> Any:
            try:
                return train_adapters(source, overrides=list(overrides), runs=runs, force=force, return_state=True)
            finally:
                fleet.stop()  # here too: without an answer from Prefect's server the process ends at once

        result: RunOutcome = _run_flow(server, run)
        return result


def _run_flow(server: PrefectServer, flow: Callable[[], Any]) -> Any:
    import httpx

    from tasks.board import BOARD

    server.ready()
    logging.getLogger("prefect.events.clients").setLevel(logging.ERROR)  # it warns of each event that a server which is away does not take
    for runs in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(runs).addFilter(_says_something)
    try:
        with BOARD.live():
            state = flow()
    except httpx.HTTPError as error:
        _leave_without_server(server, error)
    if state.is_cancelled():
        raise KeyboardInterrupt
    outcome = state.result(raise_on_failure=False)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _leave_without_server(server: PrefectServer, error: Exception) -> NoReturn:
    """Exit at once: Prefect would wait for seven seconds with each event that the server did not take, and there may be hundreds."""
    where = f"the Prefect server at {os.environ['PREFECT_API_URL']}"
    # On a line of its own: Prefect's last one, on logs that were not taken, has no end.
    click.echo(f"\nerror: {where} does not answer: {error}; what was finished is kept, start again when it does", err=True)
    server.stop()
    sys.stdout.flush()
    os._exit(1)


def _bulk_request(given: dict[str, Any]) -> BulkRequest:
    from pydantic import ValidationError

    from pipeline.bulk_records import BulkCompute, BulkOptions, BulkRequest

    columns = given.pop("columns")
    given["columns"] = None if columns is None else tuple(columns.split(","))
    values: dict[str, Any] = {name: given[name] for name in ("source", "output", "adapters", "encoder", "offline", "overwrite")}
    values["options"] = {name: given[name] for name in BulkOptions.model_fields}
    values["compute"] = {name: given[name] for name in BulkCompute.model_fields}
    try:
        return BulkRequest.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = next(str(part) for part in reversed(fault["loc"]) if str(part) in given) if fault["loc"][1:] else ""
        message = fault["msg"].removeprefix("Value error, ")
        raise InputError(f"--{name.replace('_', '-')}: {message}, found {given[name]!r}" if name else message) from None


def _classify(request: BulkRequest) -> BulkOutcome:
    """Run the flow with what it needs around it; its Prefect history is kept only by a server of your own."""
    from tasks.embedded import PrefectServer
    from tasks.temporary import temporary_folder

    home = tempfile.mkdtemp(prefix="lorafleet-", dir=temporary_folder())
    atexit.register(shutil.rmtree, home, ignore_errors=True)  # before the server's own, so run after it
    server = PrefectServer(Path(home))
    server.start()
    threading.Thread(target=_import_kernel, name="import-ahead", daemon=True).start()
    from flows.classify_datasets import classify_datasets

    result: BulkOutcome = _run_flow(server, lambda: classify_datasets(request, return_state=True))
    return result


def _import_kernel() -> None:
    import pipeline.unit_worker  # noqa: F401


def _print_summary(summary: BulkSummary) -> None:
    from rich.console import Console
    from rich.table import Table

    grid = Table("adapter", "label", "rows", "share", box=None, pad_edge=False)
    for name, counts in summary.labels.items():
        for label, count in list(counts.items())[:_LABELS_SHOWN]:
            grid.add_row(name, label, f"{count:,}", f"{count / max(1, summary.rows_out):.1%}")
        others = len(counts) - _LABELS_SHOWN
        if others > 0:
            grid.add_row(name, f"… {others} more labels", "", "")
        if summary.null_labels.get(name):
            grid.add_row(name, "(none)", f"{summary.null_labels[name]:,}", f"{summary.null_labels[name] / max(1, summary.rows_out):.1%}")
    Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False).print(grid)
    for reason, count in summary.reasons.items():
        click.echo(f"without a label: {count:,} ({reason}{'; each adapter counts' if len(summary.labels) > 1 else ''})")
    nothing = "nothing was labelled" if summary.failures else "nothing was left to do"
    rate = nothing if summary.rows_per_second is None else f"{summary.rows_per_second:,.0f} rows/s"
    facts = f"{summary.rows_out:,} of {summary.rows_in:,} rows in {summary.seconds:.0f} s, {rate}"
    click.echo(f"{facts}; {summary.truncated:,} cut, {summary.duplicates:,} duplicates, {summary.failures} failures")


def _says_something(record: logging.LogRecord) -> bool:
    """Prefect ends every run with a line of its own; what came of a stage is said by the stage, and of the flow by the command.

    Stages that never began, because the one before failed, and those that an interrupt stopped have nothing to say.
    """
    if record.exc_info and type(record.exc_info[1]).__module__.startswith("httpx"):
        return False  # the flow's end that could not be reported, as a traceback
    stopped = "Failed('Task run encountered an exception StoppedError"
    ends = ("",) if record.name == "prefect.flow_runs" else ("Completed", "NotReady", stopped)
    return not record.getMessage().startswith(tuple(f"Finished in state {end}" for end in ends))


def _print_published(published: Published, *, as_json: bool) -> None:
    if as_json:
        decisions = [decision.model_dump(mode="json") for decision in published.decisions]
        facts = {"to": published.to, "revision": published.revision, "num_files": published.num_files, "decisions": decisions}
        click.echo(json.dumps(facts, indent=1))
    else:
        for decision in published.decisions:
            click.echo(f"{decision.decision:8}{decision.mteb_task}: {decision.reason}")
        for adapter in published.verified:
            click.echo(_verified_line(adapter))
        where = published.to if published.revision is None else f"{published.to}@{published.revision}"
        promoted = len(published.verified)
        click.echo(
            f"published {promoted} of {len(published.decisions)} adapters, {published.num_files} files: {where}"
            if promoted
            else f"nothing to publish; {where} stays as it is"
        )


def _print_verified(verified: Sequence[Verified], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(adapter) for adapter in verified], indent=1))
        return
    for adapter in verified:
        click.echo(_verified_line(adapter))


def _verified_line(adapter: Verified) -> str:
    return (
        f"verified {adapter.name}: logits within {adapter.difference:.2g} (allowed {adapter.tolerance:g}), "
        f"effect on the embedding {adapter.effect:.2g}"
    )


def _print_pruned(pruned: Pruned, *, dry_run: bool, as_json: bool) -> None:
    from pipeline.checkup import readable_bytes

    if as_json:
        verdicts = [dataclasses.asdict(verdict) | {"path": str(verdict.path)} for verdict in pruned.verdicts]
        facts = {"dry_run": dry_run, "freed_bytes": pruned.freed_bytes, "failures": pruned.failures, "verdicts": verdicts}
        click.echo(json.dumps(facts, indent=1))
        return
    for verdict in pruned.verdicts:
        word, size = "delete" if verdict.goes else "keep", readable_bytes(verdict.num_bytes)
        click.echo(f"{word:8}{verdict.what:16}{verdict.path}  {size:>8}  {verdict.reason}")
    for failure in pruned.failures:
        click.echo(f"failed: {failure}", err=True)
    gone, size = sum(verdict.goes for verdict in pruned.verdicts) - len(pruned.failures), readable_bytes(pruned.freed_bytes)
    click.echo(f"{f'would delete {gone}' if dry_run else f'deleted {gone}'} of {len(pruned.verdicts)}, {size}")


def _print_plan(config: RunConfig, *, as_json: bool) -> None:
    from pipeline.catalogue import describe_source, plan_tasks

    tasks = plan_tasks(config)
    plan = {"config": config.model_dump(mode="json"), "mteb_tasks": [t.model_dump() for t in tasks]}
    if as_json:
        click.echo(json.dumps(plan, indent=1))
        return
    import tomli_w

    click.echo(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    for t in tasks:
        click.echo(f"# {t.name}: {describe_source(t)}; at most {t.max_epochs} epochs")


def _print_outcome(outcome: RunOutcome, *, as_json: bool) -> None:
    unpublished = [failure for failure in outcome.failures if failure.stage in ("gate", "publish")]  # known after all files were written
    for failure in unpublished:
        click.echo(f"failed: {' · '.join(filter(None, (failure.stage, failure.mteb_task)))}: {failure.reason}", err=True)
    if as_json:
        if outcome.folder is not None:
            summary = json.loads(outcome.folder.results.read_text(encoding="utf-8"))
            summary["failures"] += [failure.model_dump() for failure in unpublished]
            click.echo(json.dumps(summary, indent=1, ensure_ascii=False))
        else:
            click.echo(json.dumps({"failures": [f.model_dump() for f in outcome.failures]}))
        return
    if outcome.folder is not None:
        _show_run(outcome.folder.root, as_json=False)


def _show_run(run: Path, *, as_json: bool) -> None:
    from pipeline.records import ClassificationResults, TaskResult
    from pipeline.results import score_table
    from pipeline.run_folder import RunFolder, read_record

    folder = RunFolder(run)
    summary = read_record(folder.results, ClassificationResults)
    if as_json:
        click.echo(summary.model_dump_json(indent=1))
        return
    files = [folder.task(entry.task).result for entry in summary.tasks]
    results = [read_record(file, TaskResult) for file in files if file.is_file()]  # a published folder has none
    _print_table(score_table(summary, results))
    for failure in summary.failures:
        click.echo(f"failed: {failure.mteb_task} ({failure.stage}): {failure.reason}", err=True)


def _print_table(table: ScoreTable) -> None:
    from rich.console import Console
    from rich.table import Table

    from pipeline.results import SCORE_HEADINGS

    grid = Table(*SCORE_HEADINGS, box=None, pad_edge=False)
    for cells in [*(line.cells() for line in table.lines), table.average_cells()]:
        grid.add_row(*(f"{cell.text} {cell.interval}".strip() if cell.interval else cell.text for cell in cells))
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False, markup=False)
    console.print(grid)
    for note in table.notes():
        console.print(note)


def _show_history(runs: Path, *, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from pipeline.history import changed_test_data
    from pipeline.metrics_table import read_history
    from pipeline.results import percent

    rows = read_history(runs)
    if not rows:
        raise InputError(f"{runs}: neither a run folder nor a run store with finished runs in it")
    changed = changed_test_data(rows)
    if as_json:
        facts = [row.model_dump(mode="json") | {"test_data_changed": (row.mteb_task, row.run_id) in changed} for row in rows]
        click.echo(json.dumps(facts))
        return
    by_run: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        by_run.setdefault((row.mteb_task, row.run_id), {})[row.column] = row.accuracy
    columns = ("frozen_few_shot", "adapted_few_shot", "frozen_full_data", "head")
    grid = Table("MTEB task", "run", *columns, "", box=None, pad_edge=False)
    for (mteb_task, run_id), scores in sorted(by_run.items(), key=lambda line: line[0][0]):  # the runs of each, oldest first, as read
        note = "test data changed" if (mteb_task, run_id) in changed else ""  # not comparable with the line above
        grid.add_row(mteb_task, run_id, *(percent(scores[c]) if c in scores else "" for c in columns), note)
    Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False).print(grid)


if __name__ == "__main__":
    main()
