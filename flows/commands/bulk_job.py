"""The common part of ``lorafleet classify`` and ``lorafleet embed``: options, request, run and report."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from flows.commands.options import ENCODER, OFFLINE
from flows.commands.run_flow import run_flow
from flows.terminal import complain, say, say_json, say_table
from pipeline.errors import InputError
from pipeline.printable import counted, shortened

if TYPE_CHECKING:
    from flows.classify_datasets import BulkOutcome
    from pipeline.bulk.records import BulkRequest, BulkSummary

_Function = Callable[..., Any]
_LABELS_SHOWN = 10
_ROWS_PER_UNIT_WITH_VECTORS = 50_000  # a worker keeps the vectors of a unit's texts in memory

DTYPES = click.Choice(["float32", "float16", "int8", "binary"])
"""Number formats of vectors."""


def input_options(does: str) -> Callable[[_Function], _Function]:
    """Add INPUT, OUTPUT, and the options of adapters and columns. ``does`` is a verb, for the help."""
    return _added(
        click.argument("source", metavar="INPUT"),
        click.argument("output", metavar="OUTPUT"),
        click.option(
            "--adapter",
            "adapters",
            multiple=True,
            required=True,
            metavar="[NAME=]REF",
            help=f"Adapter to {does} with. Repeatable.",
        ),
        click.option("--text-column", default="text", show_default=True, metavar="NAME", help=f"Column to {does}."),
        click.option("--columns", metavar="A,B,...", help="Input columns to keep. [default: all]"),
    )


def job_options(does: str, *, rows_per_unit: str) -> Callable[[_Function], _Function]:
    """Add the options of units, machine and output. ``does`` and the default ``rows_per_unit`` are for the help."""
    units = "Rows per unit of work. A unit is written, or retried, as a whole."
    shares = "CPUs of one Ray actor, or threads of this process."
    replace = "Replace the output of another job, once the new one is complete."
    return _added(
        click.option("--limit", type=int, metavar="N", help=f"{does} only the first N rows, to try a job."),
        click.option(
            "--sample", type=float, metavar="F", help=f"{does} only a random fraction of the rows, to try a job."
        ),
        click.option("--rows-per-unit", type=int, metavar="N", help=f"{units} [default: {rows_per_unit}]"),
        click.option("--encoder", metavar="NAME", help=ENCODER),
        click.option(
            "--where",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "process", "ray"]),
            help="Run in this process, or on Ray.",
        ),
        click.option("--cpus", default="auto", show_default=True, metavar="N", help=shares),
        click.option("--gpus", default="auto", show_default=True, metavar="N", help="GPUs of one Ray actor."),
        click.option(
            "--concurrency", default="auto", show_default=True, metavar="N", help="Largest number of Ray actors."
        ),
        click.option(
            "--ray-address",
            metavar="ADDRESS",
            help="Use this Ray cluster. [default: that of RAY_ADDRESS, if set]",
        ),
        click.option("--offline", is_flag=True, help=OFFLINE),
        click.option("--overwrite", is_flag=True, help=replace),
        click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object."),
    )


def run_bulk_command(given: dict[str, Any], *, as_json: bool, flow: Literal["classify", "embed"]) -> NoReturn:
    """Run a bulk job, report it and exit: 0 if all is done, 1 if something failed.

    Args:
        given: Values of the command's options. ``vectors`` holds those of the vectors, or None.
        as_json: Whether to print the summary as JSON.
        flow: The flow to run.
    Raises: LorafleetError: the job stopped early.
    """
    outcome = _run(_bulk_request(given), flow)
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


def _added(*options: Callable[[_Function], _Function]) -> Callable[[_Function], _Function]:
    """Join decorators into one. Click lists options in reverse order of their application."""

    def decorate(function: _Function) -> _Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _bulk_request(given: dict[str, Any]) -> BulkRequest:
    from pydantic import ValidationError

    from pipeline.bulk.records import BulkCompute, BulkOptions, BulkRequest

    columns = given.pop("columns")
    given["columns"] = None if columns is None else tuple(name.strip() for name in columns.split(","))
    if given["vectors"] is not None and given["rows_per_unit"] is None:
        given["rows_per_unit"] = _ROWS_PER_UNIT_WITH_VECTORS
    values: dict[str, Any] = {
        name: given[name] for name in ("source", "output", "adapters", "encoder", "offline", "overwrite")
    }
    values["options"] = {name: given[name] for name in BulkOptions.model_fields if given.get(name) is not None}
    values["compute"] = {name: given[name] for name in BulkCompute.model_fields}
    try:
        return BulkRequest.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        message = fault["msg"].removeprefix("Value error, ")
        context = click.get_current_context()
        options = {
            param.name: param.make_metavar(context) if isinstance(param, click.Argument) else param.opts[0]
            for param in context.command.params
        }
        option = next((options[part] for part in reversed(fault["loc"]) if part in options), "")
        raise InputError(
            f"{option}: {message}, found {shortened(repr(fault['input']))}" if option else message
        ) from None


def _run(request: BulkRequest, flow: Literal["classify", "embed"]) -> BulkOutcome:
    """Run the flow. The embedded Prefect server, used if no other is configured, is deleted afterwards."""
    from tasks.services.prefect_server import PrefectServer
    from tasks.services.temporary import temporary_folder

    home = tempfile.mkdtemp(prefix="lorafleet-", dir=temporary_folder())
    atexit.register(shutil.rmtree, home, ignore_errors=True)  # registered before the server's own, so run after it
    server = PrefectServer(Path(home))
    server.start()
    threading.Thread(target=_import_kernel, name="import-ahead", daemon=True).start()
    from flows.classify_datasets import classify_datasets, embed_datasets

    chosen = {"classify": classify_datasets, "embed": embed_datasets}[flow]
    result: BulkOutcome = run_flow(server, lambda: chosen(request, return_state=True))
    return result


def _import_kernel() -> None:
    import pipeline.bulk.worker  # noqa: F401


def _print_summary(summary: BulkSummary) -> None:
    only_vectors = bool(summary.vectors) and not summary.labels
    if not only_vectors:
        say_table(("adapter", "label", "rows", "share"), _label_rows(summary))
    if summary.vectors:
        say_table(("adapter", "vectors", "rows", "without", "cosine", "neighbours"), _vector_rows(summary))
    without = "a vector" if only_vectors else "a label"
    each = "; each adapter counts" if max(len(summary.labels), len(summary.vectors)) > 1 else ""
    for reason, count in summary.reasons.items():
        say(f"without {without}: {count:,} ({reason}{each})")
    done = "embedded" if only_vectors else "labelled"
    nothing = f"nothing was {done}" if summary.failures else "nothing was left to do"
    rate = nothing if summary.rows_per_second is None else f"{summary.rows_per_second:,.0f} rows/s"
    facts = f"{summary.rows_out:,} of {counted(summary.rows_in, 'row')} in {summary.seconds:.0f} s, {rate}"
    say(
        f"{facts}; {summary.truncated:,} cut, {counted(summary.duplicates, 'duplicate')}, "
        f"{counted(summary.failures, 'failure')}"
    )


def _label_rows(summary: BulkSummary) -> list[tuple[str, ...]]:
    rows = list[tuple[str, ...]]()
    for name, counts in summary.labels.items():
        for label, count in list(counts.items())[:_LABELS_SHOWN]:
            rows.append((name, label, f"{count:,}", f"{count / max(1, summary.rows_out):.1%}"))
        others = len(counts) - _LABELS_SHOWN
        if others > 0:
            rows.append((name, f"… {counted(others, 'more label')}", "", ""))
        if nulls := summary.null_labels.get(name):
            rows.append((name, "(none)", f"{nulls:,}", f"{nulls / max(1, summary.rows_out):.1%}"))
    return rows


def _vector_rows(summary: BulkSummary) -> list[tuple[str, ...]]:
    """Rows of the table of vectors, with the loss of their number format."""
    rows = list[tuple[str, ...]]()
    for name, vectors in summary.vectors.items():
        loss = vectors.loss
        cosine = "" if loss is None or not loss.texts else f"{loss.cosine:.4f}"
        neighbours = "" if loss is None or loss.neighbours is None else f"{loss.neighbours:.1%}"
        shape, rows_with = f"{vectors.width} × {vectors.dtype}", summary.rows_out - vectors.nulls
        rows.append((name, shape, f"{rows_with:,}", f"{vectors.nulls:,}", cosine, neighbours))
    return rows
