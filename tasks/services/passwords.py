"""Who may use a Prefect server on this machine: every web page can reach loopback, and so can every user of the machine."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from pipeline.errors import InputError

SERVER, CLIENT = "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"
"""Prefect's variables for what a server asks, and for what a client answers: ``NAME:PASSWORD``."""
_ORIGINS = {"PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"}
_HERE = {"127.0.0.1", "localhost"}


def new_login() -> str:
    """A ``NAME:PASSWORD`` that nobody can guess."""
    return f"lorafleet:{secrets.token_urlsafe(24)}"


def given_login() -> str | None:
    """What the user wants a server on this machine to ask for, if the environment says so.

    Raises: InputError: it has characters that Prefect's server cannot compare.
    """
    name = next((name for name in (SERVER, CLIENT) if os.environ.get(name)), None)
    if name is None:
        return None
    if not os.environ[name].isascii():
        raise InputError(f"{name}: expected NAME:PASSWORD in ASCII, which is all that Prefect's server can compare")
    return os.environ[name]


def server_settings(ui: str, login: str) -> dict[str, str]:
    """Variables under which a Prefect server asks for this login, and lets only its own UI's pages read its answers.

    Prefect leaves open what holds nothing: the UI's static pages, ``/api/health`` and ``/api/ready``.

    Args:
        ui: Its address, ``http://127.0.0.1:PORT``.
        login: ``NAME:PASSWORD``.
    """
    origins = (
        {}
        if _ORIGINS & os.environ.keys()
        else {"PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{ui},{ui.replace('127.0.0.1', 'localhost')}"}
    )
    return {SERVER: login, CLIENT: login} | origins


def private_folder(folder: Path) -> None:
    """Make a folder that only this user can enter, or close one of this user's that is there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid == os.getuid():
        folder.chmod(0o700)


def kept_secret(file: Path, new: str) -> str:
    """The secret in a file that only its owner can read. Where there is none, or others could read it, ``new`` is written there.

    Raises: InputError: the file cannot be read or written.
    """
    try:
        if (
            file.is_symlink()
            or not file.is_file()
            or not _is_private(file.stat())
            or not file.read_text(encoding="utf-8").strip()
        ):
            with tempfile.NamedTemporaryFile(
                "w", dir=file.parent, delete=False, encoding="utf-8"
            ) as written:  # of mode 0600
                written.write(new)
            Path(written.name).replace(file)
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read and written: {error}; delete it") from None


def login_for(url: str) -> str | None:
    """``NAME:PASSWORD`` for a Prefect API: what the environment says, or else what this user's `lorafleet up` asks for, if it is its."""
    if os.environ.get(CLIENT) or os.environ.get("PREFECT_API_KEY"):
        return os.environ.get(CLIENT) or None
    with suppress(ValueError):  # not an address; who asks there will say so
        parts = urlsplit(url)
        if parts.hostname in _HERE:
            return next((up.login for up in running_ups() if urlsplit(up.api).port == parts.port), None)
    return None


@dataclass(frozen=True)
class RunningUp:
    """A `lorafleet up` of this user."""

    api: str
    """What ``PREFECT_API_URL`` is for it."""
    runs: Path
    """Its run store."""
    login: str


def running_ups() -> list[RunningUp]:
    """Every `lorafleet up` of this user on this machine, from the environment of its supervisor, which only its user can read.

    A file would still be there when another program, perhaps of somebody else's, has the port.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError, KeyError):  # gone meanwhile, or of an older lorafleet
            if process.uids().real == os.getuid() and "supervisor.supervisord" in process.cmdline():
                environment = process.environ()
                found.append(
                    RunningUp(
                        environment["PREFECT_API_URL"], Path(environment["LORAFLEET_UP_RUNS"]), environment[CLIENT]
                    )
                )
    return found


def _is_private(there: os.stat_result) -> bool:
    return there.st_uid == os.getuid() and not stat.S_IMODE(there.st_mode) & 0o077
