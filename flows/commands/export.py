"""``lorafleet export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.commands.options import ENCODER, OFFLINE, Command
from flows.terminal import say

if TYPE_CHECKING:
    from pipeline.export.export import Form


@click.command(cls=Command)
@click.argument("ref", metavar="REF")
@click.argument("target", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option(
    "--form",
    required=True,
    type=click.Choice(["sentence-transformers", "classifier", "transformers", "onnx"]),
    help=(
        "Encoder, or encoder and head, for sentence-transformers; or a model for transformers (EuroBERT) "
        "or ONNX Runtime."
    ),
)
@click.option("--width", type=click.IntRange(min=1), metavar="W", help="Leading dimensions of the vectors to keep.")
@click.option("--encoder", metavar="NAME", help=ENCODER)
@click.option("--offline", is_flag=True, help=OFFLINE)
def export(ref: str, target: Path, form: Form, width: int | None, encoder: str | None, offline: bool) -> None:
    """Export an adapter for other tools.

    The adapter is merged into its encoder. The exported model is then loaded and compared with the original.

    Example: lorafleet export hf:me/support-classifiers#Tickets tickets-onnx --form onnx
    """
    from pipeline.export.export import export_adapter
    from pipeline.inference.reference import find_adapters
    from tasks.services.loopback import prepare_http

    prepare_http()
    (adapter,) = find_adapters([ref], offline=offline)
    exported = export_adapter(adapter, target, form=form, encoder=encoder, offline=offline, width=width)
    say(f"exported {exported.adapter} to {target}: within {exported.largest_difference:.2g} of the adapter itself")
