"""Requests to the Hugging Face Hub: retries, translated errors, downloads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pipeline.errors import InputError, VerificationError, refused_by_machine
from pipeline.hub_errors import hub_error, hub_faults, hub_said, hub_status

P = ParamSpec("P")
T = TypeVar("T")

_RETRIED_STATUS = (429, 500, 502, 503, 504)
_ATTEMPTS, _FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 6, 1.0, 30.0


def repository_url(name: str, revision: str) -> str:
    """Address of a revision of a repository, for a browser."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}/tree/{revision}"


def download(
    name: str,
    revision: str | None,
    *,
    what: str | None = None,
    cache: Path | None = None,
    patterns: Sequence[str] | None = None,
    but: Sequence[str] | None = None,
    offline: bool = False,
    kind: type[InputError] = InputError,
) -> Path:
    """Download the files of a repository, with retries if the Hub is busy or broken.

    Args:
        name: ``OWNER/NAME``.
        revision: Branch, tag or commit. Defaults to the main branch.
        what: Name of the repository in messages. Defaults to ``hf:OWNER/NAME``.
        cache: Empty folder to download into. Defaults to huggingface_hub's own cache.
        patterns: Glob patterns of the files to download. Defaults to all files.
        but: Glob patterns of files to skip.
        offline: Use the cache only, without a request to the Hub.
        kind: Type of the error that a retry cannot help.
    Returns:
        Folder with the files. Its name is the commit.
    Raises:
        VerificationError: the repository lists a file that does not exist.
        InputError: of type ``kind``, in the same cases as ``ask``.
        LorafleetError: in the same cases as ``ask``.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    def fetch() -> Path:
        try:
            folder = snapshot_download(
                name,
                revision=revision,
                cache_dir=cache,
                allow_patterns=list(patterns) if patterns else None,
                ignore_patterns=list(but) if but else None,
                local_files_only=offline,
            )
            return Path(folder)
        except RemoteEntryNotFoundError as error:
            raise VerificationError(
                f"hf:{name}@{revision} lists a file that does not exist: {hub_said(error)}"
            ) from error

    # With a cache that may hold the files already, an unreachable Hub is reported at once.
    return _ask(what or f"hf:{name}", fetch, offline=offline, kind=kind, wait_for_network=cache is not None)


def ask(what: str, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Call the Hub. If it is busy, broken or out of reach, wait and try again, up to six times.

    Args:
        what: Name of the repository in messages.
        call: Function to call.
        args: Its positional arguments.
        options: Its keyword arguments.
    Raises:
        InputError: the repository, or a local file, may not be read or written.
        LorafleetError: the Hub cannot be reached or refuses, or the local disk is full.
    """
    return _ask(what, lambda: call(*args, **options))


def _ask(
    what: str,
    call: Callable[[], T],
    *,
    offline: bool = False,
    kind: type[InputError] = InputError,
    wait_for_network: bool = True,
) -> T:
    faults: tuple[type[Exception], ...] = (*hub_faults(), RuntimeError)
    wait = _FIRST_WAIT_SECONDS
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except faults as error:
            if type(error) is RuntimeError and not isinstance(error.__cause__, hub_faults()):
                raise  # a RuntimeError for a failed upload has a cause
            for fault in (error, error.__cause__):  # a retry helps neither a full disk nor a missing permission
                if isinstance(fault, OSError) and (refused := refused_by_machine(fault)):
                    raise type(refused)(f"{what}: {refused}") from error
            translated, status = hub_error(error, what, offline=offline, kind=kind), hub_status(error)
            is_last = attempt == _ATTEMPTS or isinstance(translated, InputError)
            may_pass = wait_for_network if status is None else status in _RETRIED_STATUS
            if is_last or not may_pass:
                raise translated from error
            time.sleep(min(_retry_after(error) or wait, _LONGEST_WAIT_SECONDS))
            wait *= 2
    raise AssertionError("unreachable")


def _retry_after(error: BaseException) -> float | None:
    response: Any = getattr(error, "response", None)
    value = None if response is None else response.headers.get("Retry-After")
    return float(value) if value is not None and value.isdecimal() else None
