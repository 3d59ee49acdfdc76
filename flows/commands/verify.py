"""``lorafleet verify``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from flows.commands.options import ENCODER, JSON, OFFLINE, Command
from flows.terminal import say, say_json

if TYPE_CHECKING:
    from pipeline.publishing.verify import Verification


@click.command(cls=Command)
@click.argument("ref", metavar="REF")
@click.option("--encoder", metavar="NAME", help=ENCODER)
@click.option("--offline", is_flag=True, help=OFFLINE)
@click.option("--json", "as_json", is_flag=True, help=JSON)
def verify(ref: str, encoder: str | None, offline: bool, as_json: bool) -> None:
    """Check published adapters in a new process.

    Each adapter of REF is loaded as a user would load it, and compared with the trained one.

    Example: lorafleet verify hf:me/support-classifiers@run-20261120-181500-1a2b
    """
    from pipeline.publishing.verify import verify as verify_ref
    from tasks.services.loopback import prepare_http

    prepare_http()
    print_verified(verify_ref(ref, encoder=encoder, offline=offline), as_json=as_json)


def print_verified(verified: Sequence[Verification], *, as_json: bool) -> None:
    """Print the verification of each adapter."""
    if as_json:
        say_json([dataclasses.asdict(adapter) for adapter in verified])
        return
    for adapter in verified:
        say(verified_line(adapter))


def verified_line(adapter: Verification) -> str:
    """Describe a verification in one line."""
    return (
        f"verified {adapter.name}: {adapter.outputs} within {adapter.difference:.2g} (allowed {adapter.tolerance:g}), "
        f"effect on the embedding {adapter.effect:.2g}"
    )
