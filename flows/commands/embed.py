"""``lorafleet embed``."""

from __future__ import annotations

from typing import Any

import click

from flows.commands.bulk_job import DTYPES, input_options, job_options, run_bulk_command
from flows.commands.options import Command


@click.command(cls=Command)
@input_options("embed")
@click.option("--width", type=int, metavar="W", help="Keep the W leading dimensions (Matryoshka). [default: all]")
@click.option(
    "--dtype",
    type=DTYPES,
    default="float32",
    show_default=True,
    help="Number format. int8 scales, binary packs signs into bytes.",
)
@job_options("Embed", rows_per_unit="50000")
def embed(as_json: bool, width: int | None, dtype: str, **given: Any) -> None:
    """Add text vectors to Parquet.

    Vectors have length 1 before they are rounded. Adapters with and without a head have them. Finished units are kept:
    after a crash, run the same command to resume.

    Example: lorafleet embed questions/ vectors/ --adapter runs/20261120-181500-1a2b#Help.query
    """
    vectors = {"width": width, "dtype": dtype}
    run_bulk_command(given | {"labels": False, "vectors": vectors}, as_json=as_json, flow="embed")
