"""Logins of local Prefect servers. They need one, because every web page and every user can reach loopback."""

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
"""Prefect's variables with the ``NAME:PASSWORD`` of a server and of a client."""
_ORIGINS = {"PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"}
_LOOPBACK = {"127.0.0.1", "localhost"}


def new_login() -> str:
    """Generate a random ``NAME:PASSWORD``."""
    return f"lorafleet:{secrets.token_urlsafe(24)}"


def given_login() -> str | None:
    """Login that the user has set for a local server in the environment, if any.

    Raises:
        InputError: it contains characters that Prefect's server cannot compare.
    """
    name = next((name for name in (SERVER, CLIENT) if os.environ.get(name)), None)
    if name is None:
        return None
    if not os.environ[name].isascii():
        raise InputError(f"{name}: expected NAME:PASSWORD in ASCII, because Prefect's server compares nothing else")
    return os.environ[name]


def server_settings(ui: str, login: str) -> dict[str, str]:
    """Environment variables that make a Prefect server require a login and accept only pages of its own UI.

    The UI's static pages, ``/api/health`` and ``/api/ready`` stay open. They contain no data.

    Args:
        ui: Address of the server, ``http://127.0.0.1:PORT``.
        login: ``NAME:PASSWORD``.
    """
    origins = (
        {}
        if _ORIGINS & os.environ.keys()
        else {"PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{ui},{ui.replace('127.0.0.1', 'localhost')}"}
    )
    return {SERVER: login, CLIENT: login} | origins


def private_folder(folder: Path) -> None:
    """Create a folder that only this user can enter, or restrict an existing folder of this user."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid == os.getuid():
        folder.chmod(0o700)


def kept_secret(file: Path, new: str) -> str:
    """Read the secret in a file that only this user can read.

    Args:
        file: The file.
        new: Secret to write if the file does not exist, is empty, or may be read by others.
    Raises:
        InputError: the file cannot be read or written.
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
    """Login for a Prefect API: that of the environment, or else that of this user's `lorafleet up` at the address.

    Args:
        url: Address of the API.
    Returns:
        ``NAME:PASSWORD``, or None.
    """
    if os.environ.get(CLIENT) or os.environ.get("PREFECT_API_KEY"):
        return os.environ.get(CLIENT) or None
    with suppress(ValueError):  # not an address, which the client will report
        parts = urlsplit(url)
        if parts.hostname in _LOOPBACK:
            return next((up.login for up in running_ups() if urlsplit(up.api).port == parts.port), None)
    return None


@dataclass(frozen=True)
class RunningUp:
    """A running `lorafleet up` of this user."""

    api: str
    """Value of ``PREFECT_API_URL``."""
    runs: Path
    """Run store."""
    login: str
    """``NAME:PASSWORD``."""


def running_ups() -> list[RunningUp]:
    """Find every `lorafleet up` of this user on this machine.

    They are found by the environment of their supervisor process, which only this user can read. A file could outlive
    the process, and name a port that another user's program has taken since.
    """
    ups = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError, KeyError):  # ended meanwhile, or started by an older lorafleet
            if process.uids().real == os.getuid() and "supervisor.supervisord" in process.cmdline():
                environment = process.environ()
                ups.append(
                    RunningUp(
                        environment["PREFECT_API_URL"], Path(environment["LORAFLEET_UP_RUNS"]), environment[CLIENT]
                    )
                )
    return ups


def _is_private(status: os.stat_result) -> bool:
    return status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o077
