"""``lorafleet classify``."""

from __future__ import annotations

from typing import Any

import click

from flows.commands.bulk_job import DTYPES, input_options, job_options, run_bulk_command
from flows.commands.options import Command
from pipeline.errors import InputError


@click.command(cls=Command)
@input_options("classify")
@click.option("--min-score", type=float, metavar="P", help="Leave the label null below this probability.")
@click.option(
    "--target-accuracy", type=float, metavar="A", help="Choose --min-score from each adapter's coverage table."
)
@click.option(
    "--top-k", type=int, default=1, show_default=True, metavar="K", help="Also list the K most probable labels."
)
@click.option("--vectors", is_flag=True, help="Also write the vectors, as `lorafleet embed` does, in the same pass.")
@click.option("--width", type=int, metavar="W", help="With --vectors: keep the W leading dimensions. [default: all]")
@click.option("--dtype", type=DTYPES, help="With --vectors: their number format. [default: float32]")
@job_options("Label", rows_per_unit="200000, with --vectors 50000")
def classify(as_json: bool, **given: Any) -> None:
    """Label Parquet with trained adapters.

    Finished units are kept: after a crash, run the same command to resume.

    Example: lorafleet classify reviews/ labelled/ --adapter runs/20261120-181500-1a2b#RottenTomatoes
    """
    of_vectors = {name: value for name in ("width", "dtype") if (value := given.pop(name)) is not None}
    if of_vectors and not given["vectors"]:
        raise InputError(f"--{min(of_vectors)} has no effect without --vectors; add it, or leave it out")
    given["vectors"] = of_vectors if given["vectors"] else None
    run_bulk_command(given, as_json=as_json, flow="classify")
