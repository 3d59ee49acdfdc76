"""``lorafleet publish``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.commands.options import JSON, Command
from flows.commands.verify import verified_line
from flows.terminal import say, say_json
from pipeline.errors import InputError
from pipeline.printable import counted

if TYPE_CHECKING:
    from pipeline.publishing.publish import PublishResult


@click.command(cls=Command)
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    metavar="DIR|hf:OWNER/NAME",
    help="Folder, or repository of the Hugging Face Hub, to publish to.",
)
@click.option("--private", is_flag=True, help="Make the repository private if it does not exist yet.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the run's [publish]. Repeatable."
)
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that the run's encoder needs.")
@click.option("--json", "as_json", is_flag=True, help=JSON)
def publish(
    run: Path, to: str, private: bool, overrides: tuple[str, ...], trust_remote_code: bool, as_json: bool
) -> None:
    """Publish what passes the gate, in one commit.

    RUN is a finished run folder. The files to publish are verified before the target changes.

    Example: lorafleet publish runs/20261120-181500-1a2b --to hf:me/support-classifiers --set publish.gate.min_gain=0.01
    """
    from pipeline.config import publish_config
    from pipeline.publishing.publication import read_candidate
    from pipeline.publishing.publish import publish as publish_run
    from tasks.services.loopback import prepare_http

    prepare_http()
    if any(override.startswith("publish.token_block") for override in overrides):
        raise InputError("--set publish.token_block has no effect here, only in a flow; set HF_TOKEN")
    config = publish_config(read_candidate(run).manifest.config, to=to, private=private, overrides=overrides)
    published = publish_run(run, config, trust_remote_code=trust_remote_code)
    _print_published(published, as_json=as_json)
    sys.exit(1 if published.blocked else 0)


def _print_published(published: PublishResult, *, as_json: bool) -> None:
    if as_json:
        decisions = [decision.model_dump(mode="json") for decision in published.decisions]
        facts = {
            "to": published.to,
            "revision": published.revision,
            "num_files": published.num_files,
            "decisions": decisions,
        }
        say_json(facts)
    else:
        for decision in published.decisions:
            say(f"{decision.decision:8}{decision.mteb_task}: {decision.reason}")
        for adapter in published.verified:
            say(verified_line(adapter))
        target = published.to if published.revision is None else f"{published.to}@{published.revision}"
        if promoted := sum(decision.decision == "promote" for decision in published.decisions):
            tasks, files = counted(len(published.decisions), "MTEB task"), counted(published.num_files, "file")
            say(f"published {promoted} of {tasks}, {files}: {target}")
        else:
            say(f"nothing to publish; {target} is unchanged")
