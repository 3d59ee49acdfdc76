"""``lorafleet rollback``."""

from __future__ import annotations

import click

from flows.commands.options import ENCODER, Command
from flows.commands.verify import print_verified
from flows.terminal import say


@click.command(cls=Command)
@click.argument("repository", metavar="hf:OWNER/NAME")
@click.option(
    "--to",
    "revision",
    required=True,
    metavar="TAG|REVISION",
    help="State to restore. That of a run is tagged run-<run>.",
)
@click.option("--encoder", metavar="NAME", help=ENCODER)
@click.option("--offline", is_flag=True, help="Never ask the Hub for the encoder.")
def rollback(repository: str, revision: str, encoder: str | None, offline: bool) -> None:
    """Restore an older state of a repository.

    The older state is verified, and then becomes the newest commit.

    Example: lorafleet rollback hf:me/support-classifiers --to run-20261113-181500-9c8d
    """
    from pipeline.publishing.publish import rollback as roll_back
    from tasks.services.loopback import prepare_http

    prepare_http()
    landed, verified = roll_back(repository, revision, encoder=encoder, offline=offline)
    print_verified(verified, as_json=False)
    say(f"{repository} is now at {landed}, with the files of {revision}")
