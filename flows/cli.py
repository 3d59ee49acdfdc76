"""The command line. Imports only what the command at hand needs: ``--help`` and ``--dry-run`` start nothing."""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from flows.terminal import complain, leave_on_signals, say, say_json, say_table, secure_streams, stop_on_signals
from pipeline.errors import InputError, LorafleetError, refused_by_machine
from pipeline.printable import counted, shortened

if TYPE_CHECKING:
    from flows.classify_datasets import BulkOutcome
    from flows.train_adapters import RunOutcome
    from pipeline.bulk.records import BulkRequest, BulkSummary
    from pipeline.config import RunConfig
    from pipeline.export.export import Form
    from pipeline.publishing.publish import Published
    from pipeline.publishing.verify import Verified
    from pipeline.reports.score_table import ScoreTable
    from pipeline.store.retention import Pruned
    from tasks.services.prefect_server import PrefectServer

_INTERRUPTED = 130
_LABELS_SHOWN = 10
_ENCODER = "Location of the encoder: a Hub id, a folder, or package:NAME."
_OFFLINE = "Never ask the Hub."
_JSON = "Print one JSON object."


class _Command(click.Command):
    """A command that takes no empty value, and says of a value that another one replaces it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Look at the values as they are given: as a path, an empty one is the current folder."""
        given, _, order = self.make_parser(ctx).parse_args(list(args))
        for param in dict.fromkeys(order):
            values = given[param.name or ""]
            if "" in (values if isinstance(values, list) else [values]):
                raise click.BadParameter("it is empty", ctx=ctx, param=param)
            if order.count(param) > 1 and not (param.multiple or getattr(param, "is_flag", False)):
                complain(f"warning: {param.opts[0]} is given {order.count(param)} times; the last one counts")
        return super().parse_args(ctx, args)


class _Group(click.Group):
    command_class = _Command


class _FiniteRange(click.FloatRange):
    """Numbers between two; ``nan`` is in no range, though click lets it into each."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="lorafleet")
def lorafleet() -> None:
    """Train, evaluate, publish and apply a fleet of LoRA text classifiers on one frozen encoder."""


@lorafleet.command()
@click.option(
    "--config", "source", default="quickstart", show_default=True, metavar="PRESET|FILE", help="Name of a preset, or a TOML file."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one key of the config. Repeatable.")
@click.option("--runs", default="runs", show_default=True, metavar="DIR", help="Run store, a folder.")
@click.option("--dry-run", is_flag=True, help="Check the config and print the resolved plan. Read nothing else.")
@click.option("--force", is_flag=True, help="Train again even if an earlier run has finished with the same inputs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def train(source: str, overrides: tuple[str, ...], runs: str, dry_run: bool, force: bool, as_json: bool) -> None:
    """Train and evaluate one adapter per task.

    Everything that a run makes is collected in one run folder. After a crash, run the same command to resume.

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


@lorafleet.command()
@click.argument("source", metavar="INPUT")
@click.argument("output", metavar="OUTPUT")
@click.option("--adapter", "adapters", multiple=True, required=True, metavar="[NAME=]REF", help="Adapter to classify with. Repeatable.")
@click.option("--text-column", default="text", show_default=True, metavar="NAME", help="Column to classify.")
@click.option("--columns", metavar="A,B,...", help="Input columns to keep. [default: all]")
@click.option("--min-score", type=float, metavar="P", help="Leave the label null below this probability.")
@click.option("--target-accuracy", type=float, metavar="A", help="Take that probability from the coverage table of each adapter.")
@click.option("--top-k", type=int, default=1, show_default=True, metavar="K", help="Also list the K most probable labels.")
@click.option("--limit", type=int, metavar="N", help="Label only the first N rows, to try a job.")
@click.option("--sample", type=float, metavar="F", help="Label only a random fraction of the rows, to try a job.")
@click.option(
    "--rows-per-unit",
    type=int,
    default=200_000,
    show_default=True,
    metavar="N",
    help="Rows per unit of work. A unit is written, or retried, as a whole.",
)
@click.option("--encoder", metavar="NAME", help=_ENCODER)
@click.option(
    "--where", default="auto", show_default=True, type=click.Choice(["auto", "process", "ray"]), help="Run in this process, or on Ray."
)
@click.option("--cpus", default="auto", show_default=True, metavar="N", help="CPUs of one Ray actor, or threads of this process.")
@click.option("--gpus", default="auto", show_default=True, metavar="N", help="GPUs of one Ray actor.")
@click.option("--concurrency", default="auto", show_default=True, metavar="N", help="Largest number of Ray actors.")
@click.option("--ray-address", metavar="ADDRESS", help="Use this Ray cluster. [default: that of RAY_ADDRESS, if set]")
@click.option("--offline", is_flag=True, help=_OFFLINE)
@click.option("--overwrite", is_flag=True, help="Replace the output of another job, once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def classify(as_json: bool, **given: Any) -> None:
    """Label Parquet with trained adapters.

    Finished units are kept: after a crash, run the same command to resume.

    Example: lorafleet classify reviews/ labelled/ --adapter runs/20261120-181500-1a2b#RottenTomatoes
    """
    outcome = _classify(_bulk_request(given))
    if outcome.error is not None:
        raise outcome.error
    assert outcome.summary is not None
    if as_json:
        say_json(outcome.summary.model_dump(mode="json"))
    else:
        _print_summary(outcome.summary)
    for failure in outcome.failures:
        where = failure.path if failure.unit is None else f"{failure.path}, rows from {failure.first_row}"
        complain(f"failed: {where}: {failure.reason}")
    if outcome.aside is not None:
        complain(f"the old output in {given['output']} is left as it was, because of the failures")
    if not as_json:
        say(f"output: {outcome.aside or given['output']}")
    sys.exit(1 if outcome.failures else 0)


@lorafleet.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--to", required=True, metavar="DIR|hf:OWNER/NAME", help="Folder, or repository of the Hugging Face Hub, to publish to.")
@click.option("--private", is_flag=True, help="Make the repository private if it does not exist yet.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the run's [publish]. Repeatable.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that the run's encoder needs.")
@click.option("--json", "as_json", is_flag=True, help=_JSON)
def publish(run: Path, to: str, private: bool, overrides: tuple[str, ...], trust_remote_code: bool, as_json: bool) -> None:
    """Publish what passes the gate, in one commit.

    RUN is a finished run folder. What it would publish is verified before the target changes.

    Example: lorafleet publish runs/20261120-181500-1a2b --to hf:me/support-classifiers --set publish.gate.min_gain=0.002
    """
    from pipeline.config import publish_config
    from pipeline.publishing.publication import read_candidate
    from pipeline.publishing.publish import publish as publish_run
    from tasks.services.loopback import prepare_http

    prepare_http()
    if any(override.startswith("publish.token_block") for override in overrides):
        raise InputError("--set publish.token_block has no effect here, only where a flow publishes; set HF_TOKEN")
    config = publish_config(read_candidate(run).manifest.config, to=to, private=private, overrides=overrides)
    published = publish_run(run, to, config, trust_remote_code=trust_remote_code)
    _print_published(published, as_json=as_json)
    sys.exit(1 if published.blocked else 0)


@lorafleet.command()
@click.argument("ref", metavar="REF")
@click.option("--encoder", metavar="NAME", help=_ENCODER)
@click.option("--offline", is_flag=True, help=_OFFLINE)
@click.option("--json", "as_json", is_flag=True, help=_JSON)
def verify(ref: str, encoder: str | None, offline: bool, as_json: bool) -> None:
    """Check published adapters in a new process.

    Each adapter of REF is loaded as anybody would load it, and compared with what was trained.

    Example: lorafleet verify hf:me/support-classifiers@run-20261120-181500-1a2b
    """
    from pipeline.publishing.verify import verify as verify_ref
    from tasks.services.loopback import prepare_http

    prepare_http()
    _print_verified(verify_ref(ref, encoder=encoder, offline=offline), as_json=as_json)


@lorafleet.command()
@click.argument("repository", metavar="hf:OWNER/NAME")
@click.option("--to", "revision", required=True, metavar="TAG|REVISION", help="State to restore. That of a run is tagged run-<run>.")
@click.option("--encoder", metavar="NAME", help=_ENCODER)
@click.option("--offline", is_flag=True, help="Never ask the Hub for an encoder.")
def rollback(repository: str, revision: str, encoder: str | None, offline: bool) -> None:
    """Restore an older state of a repository.

    That state is verified first, and becomes the newest commit.

    Example: lorafleet rollback hf:me/support-classifiers --to run-20261113-181500-9c8d
    """
    from pipeline.publishing.publish import rollback as roll_back
    from tasks.services.loopback import prepare_http

    prepare_http()
    landed, verified = roll_back(repository, revision, encoder=encoder, offline=offline)
    _print_verified(verified, as_json=False)
    say(f"{repository} is at {landed} now, with the files of {revision}")


@lorafleet.command()
@click.argument("ref", metavar="REF")
@click.argument("target", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option(
    "--form",
    required=True,
    type=click.Choice(["sentence-transformers", "classifier", "transformers", "onnx"]),
    help="Write the encoder, or encoder and head, for sentence-transformers; or a model for transformers (EuroBERT) or ONNX Runtime.",
)
@click.option("--encoder", metavar="NAME", help=_ENCODER)
@click.option("--offline", is_flag=True, help=_OFFLINE)
def export(ref: str, target: Path, form: Form, encoder: str | None, offline: bool) -> None:
    """Export an adapter for other tools.

    The adapter is merged into its encoder. What was written is read back and compared.

    Example: lorafleet export hf:me/support-classifiers#Tickets tickets-onnx --form onnx
    """
    from pipeline.export.export import export_adapter
    from pipeline.inference.reference import find_adapters
    from tasks.services.loopback import prepare_http

    prepare_http()
    (adapter,) = find_adapters([ref], offline=offline)
    exported = export_adapter(adapter, target, form=form, encoder=encoder, offline=offline)
    say(f"exported {exported.adapter} to {target}: within {exported.largest_difference:.2g} of the adapter itself")


@lorafleet.command()
@click.argument("place", metavar="RUN|RUNS", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def show(place: Path, as_json: bool) -> None:
    """Print the scores of a run, or the history.

    For a run store, print the scores of each MTEB task over its runs.

    Example: lorafleet show runs
    """
    from pipeline.store.run_folder import RunFolder

    if RunFolder(place).results.is_file():
        _show_run(place, as_json=as_json)
    else:
        _show_history(place, as_json=as_json)


@lorafleet.command()
@click.option("--runs", default="runs", show_default=True, metavar="DIR", help="Run store (may not exist yet).")
@click.option("--ray-address", metavar="ADDRESS", help="Check this Ray cluster. [default: that of RAY_ADDRESS, if set]")
@click.option("--start", "start_ray", is_flag=True, help="If no cluster is named, start a local Ray and stop it again.")
@click.option("--json", "as_json", is_flag=True, help=_JSON)
def doctor(runs: str, ray_address: str | None, start_ray: bool, as_json: bool) -> None:
    """Check this machine, and say what to fix.

    Checks what a run needs, and the servers that it uses. Exit code 0 if runs will work, with or without warnings; 1 if something is
    broken.

    Example: lorafleet doctor --runs runs
    """
    from pipeline.store.lock import store_folder
    from tasks.checks.doctor import examine, report

    if start_ray and ray_address is not None:
        raise InputError("--start has no effect with --ray-address, which names a cluster that is there; leave one out")
    checks = examine(store_folder(runs), ray_address=ray_address, start_ray=start_ray)
    if as_json:
        say_json(json.loads(report(checks, as_json=True)))
    else:
        say(*report(checks, as_json=False).split("\n"))
    sys.exit(1 if any(check.status == "fault" for check in checks) else 0)


@lorafleet.command()
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
    type=_FiniteRange(0, 36_500),
    default=30,
    show_default=True,
    metavar="DAYS",
    help="Delete only what is older. Unfinished work younger than 7 days is always kept.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be deleted. Delete nothing.")
@click.option("--json", "as_json", is_flag=True, help=_JSON)
def prune(runs: Path, keep: int, older_than: float, dry_run: bool, as_json: bool) -> None:
    """Delete old runs and abandoned checkpoints.

    Published runs and the last good run of each MTEB task are kept. The history over runs keeps every score. Its page is written again,
    without links to deleted runs.

    Example: lorafleet prune runs --keep 5 --older-than 60 --dry-run
    """
    from pipeline.store.retention import Policy
    from pipeline.store.retention import prune as prune_store

    pruned = prune_store(runs, Policy(keep=keep, older_than_days=older_than), dry_run=dry_run)
    _print_pruned(pruned, dry_run=dry_run, as_json=as_json)
    if not dry_run and any(verdict.goes and verdict.what == "run" for verdict in pruned.verdicts):
        from pipeline.reports.history_page import write_history_page

        write_history_page(runs)
    sys.exit(1 if pruned.failures else 0)


@lorafleet.command()
@click.option(
    "--file", type=click.Path(path_type=Path), metavar="FILE", help="File with the deployments. [default: deploy/prefect.yaml of lorafleet]"
)
@click.option("--name", "names", multiple=True, metavar="NAME", help="Register only this deployment of the file. Repeatable.")
@click.option("--interval", type=float, metavar="SECONDS", help="Run at this interval instead of the file's schedule.")
@click.option("--cron", metavar="EXPR", help="Run by this cron expression instead of the file's schedule.")
@click.option("--timezone", metavar="TZ", help="Time zone for --cron or --interval, such as Europe/Berlin. [default: UTC]")
@click.option("--notify", metavar="TYPE/NAME", help="Report failed runs to this Prefect notification block, such as slack-webhook/team.")
def deploy(
    file: Path | None, names: tuple[str, ...], interval: float | None, cron: str | None, timezone: str | None, notify: str | None
) -> None:
    """Register schedules with a Prefect server.

    The server is that of PREFECT_API_URL, or that of `lorafleet up` if it is not set. Scheduled runs start in the current folder.

    Example: lorafleet deploy --name weekly --cron "0 6 * * 1" --timezone Europe/Berlin --notify slack-webhook/team
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    from flows.deploying import FILE
    from flows.deploying import deploy as register
    from flows.deployment_file import schedule_of

    schedule = schedule_of(interval=interval, cron=cron, timezone=timezone)
    for deployed in register(file or FILE, names=names, schedule=schedule, notify=notify):
        say(str(deployed))


@lorafleet.command()
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; turns errors into one message and an exit code.

    Args:
        arguments: Those of the process where left out; then its standard streams and its signals are the command's, too.
    """
    if arguments is None:
        secure_streams()
        stop_on_signals()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported
    try:
        _invoke(sys.argv[1:] if arguments is None else arguments)
    except click.ClickException as error:
        _complain_of_usage(error)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        complain("interrupted; what was finished is kept, and the same command goes on from there")
        sys.exit(_INTERRUPTED)
    except LorafleetError as error:
        complain(*f"error: {error}".split("\n"))
        sys.exit(2 if isinstance(error, InputError) else 1)
    finally:
        if arguments is None:
            leave_on_signals()


def _invoke(arguments: Sequence[str]) -> None:
    """Run the command. What the machine refuses is an error of ours; what else goes wrong is a fault of ours, with its traceback."""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise InputError(f"{argument}: not a text in this terminal's encoding; rename the file, or write the name in UTF-8")
    try:
        lorafleet.main(args=list(arguments), standalone_mode=False)
        sys.stdout.flush()
    except (OSError, UnicodeEncodeError) as error:
        if (refused := refused_by_machine(error)) is None:
            raise
        raise refused from error


def _complain_of_usage(error: click.ClickException) -> None:
    if isinstance(error, click.UsageError) and error.ctx is not None:
        complain(*error.ctx.get_usage().split("\n"), f"Try '{error.ctx.command_path} --help' for help.", "")
    complain(f"Error: {' '.join(error.format_message().split())}")


def _run(config: RunConfig, source: str, overrides: tuple[str, ...], runs: str, *, force: bool) -> RunOutcome:
    """Run the flow with what it needs around it: the configured Prefect server, or an embedded one."""
    from pipeline.store.lock import hold_store
    from tasks.services.prefect_server import PrefectServer

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
    complain("", f"error: {where} does not answer: {error}; finished work is kept, start again when it does")
    server.stop()
    sys.stdout.flush()
    os._exit(1)


def _bulk_request(given: dict[str, Any]) -> BulkRequest:
    from pydantic import ValidationError

    from pipeline.bulk.records import BulkCompute, BulkOptions, BulkRequest

    columns = given.pop("columns")
    given["columns"] = None if columns is None else tuple(name.strip() for name in columns.split(","))
    values: dict[str, Any] = {name: given[name] for name in ("source", "output", "adapters", "encoder", "offline", "overwrite")}
    values["options"] = {name: given[name] for name in BulkOptions.model_fields}
    values["compute"] = {name: given[name] for name in BulkCompute.model_fields}
    try:
        return BulkRequest.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        message = fault["msg"].removeprefix("Value error, ")
        options = {
            param.name: param.make_metavar(click.get_current_context()) if isinstance(param, click.Argument) else param.opts[0]
            for param in classify.params
        }
        option = next((options[part] for part in reversed(fault["loc"]) if part in options), "")
        raise InputError(f"{option}: {message}, found {shortened(repr(fault['input']))}" if option else message) from None


def _classify(request: BulkRequest) -> BulkOutcome:
    """Run the flow with what it needs around it; its Prefect history is kept only by a server of your own."""
    from tasks.services.prefect_server import PrefectServer
    from tasks.services.temporary import temporary_folder

    home = tempfile.mkdtemp(prefix="lorafleet-", dir=temporary_folder())
    atexit.register(shutil.rmtree, home, ignore_errors=True)  # before the server's own, so run after it
    server = PrefectServer(Path(home))
    server.start()
    threading.Thread(target=_import_kernel, name="import-ahead", daemon=True).start()
    from flows.classify_datasets import classify_datasets

    result: BulkOutcome = _run_flow(server, lambda: classify_datasets(request, return_state=True))
    return result


def _import_kernel() -> None:
    import pipeline.bulk.worker  # noqa: F401


def _print_summary(summary: BulkSummary) -> None:
    rows = []
    for name, counts in summary.labels.items():
        for label, count in list(counts.items())[:_LABELS_SHOWN]:
            rows.append((name, label, f"{count:,}", f"{count / max(1, summary.rows_out):.1%}"))
        others = len(counts) - _LABELS_SHOWN
        if others > 0:
            rows.append((name, f"… {counted(others, 'more label')}", "", ""))
        if summary.null_labels.get(name):
            rows.append((name, "(none)", f"{summary.null_labels[name]:,}", f"{summary.null_labels[name] / max(1, summary.rows_out):.1%}"))
    say_table(("adapter", "label", "rows", "share"), rows)
    for reason, count in summary.reasons.items():
        say(f"without a label: {count:,} ({reason}{'; each adapter counts' if len(summary.labels) > 1 else ''})")
    nothing = "nothing was labelled" if summary.failures else "nothing was left to do"
    rate = nothing if summary.rows_per_second is None else f"{summary.rows_per_second:,.0f} rows/s"
    facts = f"{summary.rows_out:,} of {counted(summary.rows_in, 'row')} in {summary.seconds:.0f} s, {rate}"
    say(f"{facts}; {summary.truncated:,} cut, {counted(summary.duplicates, 'duplicate')}, {counted(summary.failures, 'failure')}")


def _says_something(record: logging.LogRecord) -> bool:
    """Prefect ends every run with a line of its own; what came of a stage is said by the stage, and of the flow by the command.

    Stages that never began, because the one before failed, and those that an interrupt stopped have nothing to say.
    """
    if record.exc_info and type(record.exc_info[1]).__module__.startswith("httpx"):
        return False  # the flow's end that could not be reported, as a traceback
    stopped = "Failed('Task run encountered an exception StoppedError"
    ends = ("",) if record.name == "prefect.flow_runs" else ("Completed", "NotReady", stopped)
    interrupted = "Crash detected! Execution was aborted by an interrupt"
    return not record.getMessage().startswith((*(f"Finished in state {end}" for end in ends), interrupted))


def _print_published(published: Published, *, as_json: bool) -> None:
    if as_json:
        decisions = [decision.model_dump(mode="json") for decision in published.decisions]
        facts = {"to": published.to, "revision": published.revision, "num_files": published.num_files, "decisions": decisions}
        say_json(facts)
    else:
        for decision in published.decisions:
            say(f"{decision.decision:8}{decision.mteb_task}: {decision.reason}")
        for adapter in published.verified:
            say(_verified_line(adapter))
        where = published.to if published.revision is None else f"{published.to}@{published.revision}"
        promoted = len(published.verified)
        say(
            f"published {promoted} of {counted(len(published.decisions), 'adapter')}, {counted(published.num_files, 'file')}: {where}"
            if promoted
            else f"nothing to publish; {where} stays as it is"
        )


def _print_verified(verified: Sequence[Verified], *, as_json: bool) -> None:
    if as_json:
        say_json([dataclasses.asdict(adapter) for adapter in verified])
        return
    for adapter in verified:
        say(_verified_line(adapter))


def _verified_line(adapter: Verified) -> str:
    return (
        f"verified {adapter.name}: logits within {adapter.difference:.2g} (allowed {adapter.tolerance:g}), "
        f"effect on the embedding {adapter.effect:.2g}"
    )


def _print_pruned(pruned: Pruned, *, dry_run: bool, as_json: bool) -> None:
    from tasks.checks.machine import readable_bytes

    if as_json:
        verdicts = [dataclasses.asdict(verdict) | {"path": str(verdict.path)} for verdict in pruned.verdicts]
        facts = {"dry_run": dry_run, "freed_bytes": pruned.freed_bytes, "failures": pruned.failures, "verdicts": verdicts}
        say_json(facts)
        return
    for verdict in pruned.verdicts:
        word, size = "delete" if verdict.goes else "keep", readable_bytes(verdict.num_bytes)
        say(f"{word:8}{verdict.what:16}{verdict.path}  {size:>8}  {verdict.reason}")
    for failure in pruned.failures:
        complain(f"failed: {failure}")
    gone, size = sum(verdict.goes for verdict in pruned.verdicts) - len(pruned.failures), readable_bytes(pruned.freed_bytes)
    say(f"{f'would delete {gone}' if dry_run else f'deleted {gone}'} of {len(pruned.verdicts)}, {size}")


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
    unpublished = [failure for failure in outcome.failures if failure.stage in ("gate", "publish")]  # known after all files were written
    for failure in unpublished:
        complain(f"failed: {' · '.join(filter(None, (failure.stage, failure.mteb_task)))}: {failure.reason}")
    if as_json:
        if outcome.folder is not None:
            summary = json.loads(outcome.folder.results.read_text(encoding="utf-8"))
            summary["failures"] += [failure.model_dump() for failure in unpublished]
            say_json(summary)
        else:
            say_json({"failures": [f.model_dump() for f in outcome.failures]})
        return
    if outcome.folder is not None:
        _show_run(outcome.folder.root, as_json=False)


def _show_run(run: Path, *, as_json: bool) -> None:
    from pipeline.records import ClassificationResults, TaskResult
    from pipeline.reports.score_table import score_table
    from pipeline.store.run_folder import RunFolder, read_record

    folder = RunFolder(run)
    summary = read_record(folder.results, ClassificationResults)
    if as_json:
        say_json(summary.model_dump(mode="json"))
        return
    files = [folder.task(entry.task).result for entry in summary.tasks]
    results = [read_record(file, TaskResult) for file in files if file.is_file()]  # a published folder has none
    _print_table(score_table(summary, results))
    for failure in summary.failures:
        complain(f"failed: {failure.mteb_task} ({failure.stage}): {failure.reason}")


def _print_table(table: ScoreTable) -> None:
    from pipeline.reports.score_table import SCORE_HEADINGS

    lines = [*(line.cells() for line in table.lines), table.average_cells()]
    say_table(
        SCORE_HEADINGS, [[f"{cell.text} {cell.interval}".strip() if cell.interval else cell.text for cell in cells] for cells in lines]
    )
    for note in table.notes():
        say(note)


def _show_history(runs: Path, *, as_json: bool) -> None:
    from pipeline.reports.score_table import percent
    from pipeline.store.history import changed_test_data
    from pipeline.store.tables import read_history

    rows = read_history(runs)
    if not rows:
        raise InputError(f"{runs}: neither a run folder nor a run store with finished runs in it")
    changed = changed_test_data(rows)
    if as_json:
        facts = [row.model_dump(mode="json") | {"test_data_changed": (row.mteb_task, row.run_id) in changed} for row in rows]
        say_json(facts)
        return
    by_run: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        by_run.setdefault((row.mteb_task, row.run_id), {})[row.column] = row.accuracy
    columns = ("frozen_few_shot", "adapted_few_shot", "frozen_full_data", "head")
    lines = []
    for (mteb_task, run_id), scores in sorted(by_run.items(), key=lambda line: line[0][0]):  # the runs of each, oldest first, as read
        note = "test data changed" if (mteb_task, run_id) in changed else ""  # not comparable with the line above
        lines.append((mteb_task, run_id, *(percent(scores[c]) if c in scores else "" for c in columns), note))
    say_table(("MTEB task", "run", *columns, ""), lines)


if __name__ == "__main__":
    main()
