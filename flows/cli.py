"""Command line: registers the commands, and turns errors into one message and an exit code.

Each command imports what it needs when it runs, so that ``--help`` and ``--dry-run`` stay fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from flows.commands.classify import classify
from flows.commands.compare import compare
from flows.commands.deploy import deploy
from flows.commands.doctor import doctor
from flows.commands.embed import embed
from flows.commands.export import export
from flows.commands.prune import prune
from flows.commands.publish import publish
from flows.commands.rollback import rollback
from flows.commands.search import search
from flows.commands.show import show
from flows.commands.train import train
from flows.commands.up import up
from flows.commands.verify import verify
from flows.terminal import complain, secure_streams
from pipeline.errors import InputError, LorafleetError, refused_by_machine
from tasks.interrupts import leave_on_signals, stop_on_signals

_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="lorafleet")
def lorafleet() -> None:
    """Train, evaluate, publish and apply a fleet of LoRA adapters on one frozen encoder: classifiers and embedders."""


for _command in (
    train,
    compare,
    search,
    classify,
    embed,
    publish,
    verify,
    rollback,
    export,
    show,
    doctor,
    prune,
    deploy,
    up,
):
    lorafleet.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script. Errors become one message and an exit code.

    Args:
        arguments: Arguments of the command line. Defaults to those of the process, whose standard streams and signals
            the command then takes over as well.
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
        complain("interrupted; finished work is kept, run the same command to resume")
        sys.exit(_INTERRUPTED)
    except LorafleetError as error:
        complain(*f"error: {error}".split("\n"))
        sys.exit(2 if isinstance(error, InputError) else 1)
    finally:
        if arguments is None:
            leave_on_signals()


def _invoke(arguments: Sequence[str]) -> None:
    """Run a command. What the machine refuses, such as a full disk, becomes an error without a traceback."""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise InputError(
                f"{argument}: not valid in this terminal's encoding; rename the file, or write the name in UTF-8"
            )
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


if __name__ == "__main__":
    main()
