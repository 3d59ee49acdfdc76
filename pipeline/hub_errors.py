"""Translation of the Hub's errors. The one place that decides between exit codes 1 and 2 for them.

1: the Hub is busy, broken or cannot be reached, so a retry may help.
2: the repository does not exist or may not be accessed, or it is not in the cache while offline.
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
    """Types of the exceptions that huggingface_hub raises if a request fails."""
    from httpx2 import TransportError  # huggingface_hub's HTTP client
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    return HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, TransportError


def hub_error(
    error: BaseException, what: str, *, offline: bool = False, kind: type[InputError] = InputError
) -> LorafleetError:
    """Translate an exception into the error that a command ends with.

    Args:
        error: One of ``hub_faults``, or one caused by it.
        what: Name of the requested repository in the message.
        offline: Whether the caller allows the local cache only.
        kind: Type of the errors that a retry cannot help.
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
    """The Hub's exception that made another library raise ``error``. None if there is none."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    behind: BaseException | None = error
    while behind is not None and not isinstance(
        behind, HfHubHTTPError | LocalEntryNotFoundError | OfflineModeIsEnabled | TransportError
    ):
        behind = behind.__cause__ or behind.__context__
    return behind


def hub_status(error: BaseException) -> int | None:
    """HTTP status of the Hub's response. None without a response."""
    response: Any = getattr(error, "response", None)
    if response is None and isinstance(error.__cause__, Exception):
        response = getattr(error.__cause__, "response", None)
    return None if response is None else int(response.status_code)


def hub_said(error: BaseException) -> str:
    """Message of an error in one line, without the query strings of URLs, which may hold signatures."""
    lines = [
        line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("For more information")
    ]
    return re.sub(r"\?[^\s'\"]*", "?…", " ".join(lines[:3]))[:300] or type(error).__name__
