"""``lorafleet classify``."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.commands.options import ENCODER, OFFLINE, Command
from flows.commands.run_flow import run_flow
from flows.terminal import complain, say, say_json, say_table
from pipeline.errors import InputError
from pipeline.printable import counted, shortened

if TYPE_CHECKING:
    from flows.classify_datasets import BulkOutcome
    from pipeline.bulk.records import BulkRequest, BulkSummary

_LABELS_SHOWN = 10


@click.command(cls=Command)
@click.argument("source", metavar="INPUT")
@click.argument("output", metavar="OUTPUT")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    required=True,
    metavar="[NAME=]REF",
    help="Adapter to classify with. Repeatable.",
)
@click.option("--text-column", default="text", show_default=True, metavar="NAME", help="Column to classify.")
@click.option("--columns", metavar="A,B,...", help="Input columns to keep. [default: all]")
@click.option("--min-score", type=float, metavar="P", help="Leave the label null below this probability.")
@click.option(
    "--target-accuracy", type=float, metavar="A", help="Choose --min-score from each adapter's coverage table."
)
@click.option(
    "--top-k", type=int, default=1, show_default=True, metavar="K", help="Also list the K most probable labels."
)
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
@click.option("--encoder", metavar="NAME", help=ENCODER)
@click.option(
    "--where",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "process", "ray"]),
    help="Run in this process, or on Ray.",
)
@click.option(
    "--cpus", default="auto", show_default=True, metavar="N", help="CPUs of one Ray actor, or threads of this process."
)
@click.option("--gpus", default="auto", show_default=True, metavar="N", help="GPUs of one Ray actor.")
@click.option("--concurrency", default="auto", show_default=True, metavar="N", help="Largest number of Ray actors.")
@click.option("--ray-address", metavar="ADDRESS", help="Use this Ray cluster. [default: that of RAY_ADDRESS, if set]")
@click.option("--offline", is_flag=True, help=OFFLINE)
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
        location = failure.path if failure.unit is None else f"{failure.path}, rows from {failure.first_row}"
        complain(f"failed: {location}: {failure.reason}")
    if outcome.aside is not None:
        complain(f"the old output in {given['output']} is unchanged, because of the failures")
    if not as_json:
        say(f"output: {outcome.aside or given['output']}")
    sys.exit(1 if outcome.failures else 0)


def _bulk_request(given: dict[str, Any]) -> BulkRequest:
    from pydantic import ValidationError

    from pipeline.bulk.records import BulkCompute, BulkOptions, BulkRequest

    columns = given.pop("columns")
    given["columns"] = None if columns is None else tuple(name.strip() for name in columns.split(","))
    values: dict[str, Any] = {
        name: given[name] for name in ("source", "output", "adapters", "encoder", "offline", "overwrite")
    }
    values["options"] = {name: given[name] for name in BulkOptions.model_fields}
    values["compute"] = {name: given[name] for name in BulkCompute.model_fields}
    try:
        return BulkRequest.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        message = fault["msg"].removeprefix("Value error, ")
        options = {
            param.name: param.make_metavar(click.get_current_context())
            if isinstance(param, click.Argument)
            else param.opts[0]
            for param in classify.params
        }
        option = next((options[part] for part in reversed(fault["loc"]) if part in options), "")
        raise InputError(
            f"{option}: {message}, found {shortened(repr(fault['input']))}" if option else message
        ) from None


def _classify(request: BulkRequest) -> BulkOutcome:
    """Run the flow. The embedded Prefect server, used if no other is configured, is deleted afterwards."""
    from tasks.services.prefect_server import PrefectServer
    from tasks.services.temporary import temporary_folder

    home = tempfile.mkdtemp(prefix="lorafleet-", dir=temporary_folder())
    atexit.register(shutil.rmtree, home, ignore_errors=True)  # registered before the server's own, so run after it
    server = PrefectServer(Path(home))
    server.start()
    threading.Thread(target=_import_kernel, name="import-ahead", daemon=True).start()
    from flows.classify_datasets import classify_datasets

    result: BulkOutcome = run_flow(server, lambda: classify_datasets(request, return_state=True))
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
            rows.append(
                (
                    name,
                    "(none)",
                    f"{summary.null_labels[name]:,}",
                    f"{summary.null_labels[name] / max(1, summary.rows_out):.1%}",
                )
            )
    say_table(("adapter", "label", "rows", "share"), rows)
    for reason, count in summary.reasons.items():
        say(f"without a label: {count:,} ({reason}{'; each adapter counts' if len(summary.labels) > 1 else ''})")
    nothing = "nothing was labelled" if summary.failures else "nothing was left to do"
    rate = nothing if summary.rows_per_second is None else f"{summary.rows_per_second:,.0f} rows/s"
    facts = f"{summary.rows_out:,} of {counted(summary.rows_in, 'row')} in {summary.seconds:.0f} s, {rate}"
    say(
        f"{facts}; {summary.truncated:,} cut, {counted(summary.duplicates, 'duplicate')}, "
        f"{counted(summary.failures, 'failure')}"
    )
