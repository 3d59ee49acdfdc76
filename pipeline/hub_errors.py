"""Translation of the Hub's faults into lorafleet's exceptions, which decide between exit codes 1 and 2.

The code is 1 if a retry may help: the Hub is unreachable, busy or broken. It is 2 if an object is missing, access is
denied, or a file is not in the local cache while offline.
"""

from __future__ import annotations

import re
from typing import Any

from pipeline.errors import InputError, LorafleetError, first_line

TOKEN_ADVICE = "; provide a token with access: HF_TOKEN, `hf auth login`, or publish.token_block"
_REACH = (
    "; check the connection to the Hub (network, HTTPS_PROXY, HF_ENDPOINT) and run the command again: nothing is lost"
)


def hub_faults() -> tuple[type[Exception], ...]:
    """Return the exceptions that huggingface_hub raises for a failed request."""
    from httpx2 import TransportError  # its HTTP client
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    return HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, TransportError


def hub_error(
    error: BaseException, what: str, *, offline: bool = False, kind: type[InputError] = InputError
) -> LorafleetError:
    """Return the lorafleet exception for a fault of the Hub.

    Args:
        error: One of ``hub_faults``, or an exception caused by one.
        what: Name of the requested object, for the message.
        offline: Whether only the local cache was to be read.
        kind: Class of the exception if a retry cannot help.
    """
    from httpx2 import TransportError
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    status = hub_status(error)
    if isinstance(error, HFValidationError):
        return kind(f"{what}: {first_line(error)}")
    if status in (401, 403, 404):
        return kind(f"{what}: {hub_said(error)}{TOKEN_ADVICE if status != 404 else ''}")
    not_cached = isinstance(error, LocalEntryNotFoundError)
    if isinstance(error, OfflineModeIsEnabled) or (not_cached and (offline or constants.HF_HUB_OFFLINE)):
        return kind(f"{what}: not in the local cache, and offline; fetch it once while online, or name a folder")
    out_of_reach = status is None and (
        not_cached or any(isinstance(e, TransportError) for e in (error, error.__cause__))
    )
    return LorafleetError(f"{what}: {hub_said(error)}{_REACH if out_of_reach else ''}")


def hub_fault_behind(error: BaseException) -> BaseException | None:
    """Return the fault of the Hub that caused an exception of another library; None if there is none."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None and not isinstance(
        cause, HfHubHTTPError | LocalEntryNotFoundError | OfflineModeIsEnabled | TransportError
    ):
        cause = cause.__cause__ or cause.__context__
    return cause


def hub_status(error: BaseException) -> int | None:
    """Return the HTTP status of the Hub's answer; None if it did not answer."""
    response: Any = getattr(error, "response", None)
    if response is None and isinstance(error.__cause__, Exception):
        response = getattr(error.__cause__, "response", None)
    return None if response is None else int(response.status_code)


def hub_said(error: BaseException) -> str:
    """Return the message of a fault as one line, without the queries of URLs, which may hold signatures."""
    lines = [
        line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("For more information")
    ]
    return re.sub(r"\?[^\s'\"]*", "?…", " ".join(lines[:3]))[:300] or type(error).__name__
