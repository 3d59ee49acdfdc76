"""What a fault of the Hub means to who asked it: the one place that decides between exit code 1 and 2.

Out of reach, busy or broken is 1, because trying again may help. Not there, not allowed, and not in the cache while offline is 2.
"""

from __future__ import annotations

import re
from typing import Any

from pipeline.errors import InputError, LorafleetError, first_line

TOKEN_ADVICE = "; give a token that may do that: HF_TOKEN, `hf auth login`, or publish.token_block"
_REACH = "; is the Hub in reach (network, HTTPS_PROXY, HF_ENDPOINT)? Nothing is lost: run the command again"


def hub_faults() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where it cannot give what it was asked for."""
    from httpx2 import TransportError  # what it speaks HTTP with
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    return HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, TransportError


def hub_error(
    error: BaseException, what: str, *, offline: bool = False, kind: type[InputError] = InputError
) -> LorafleetError:
    """The error that a command ends with.

    Args:
        error: One of ``hub_faults``, or one caused by it.
        what: What was asked for, as the message names it.
        offline: Whether the caller wanted the local cache alone to be asked.
        kind: Of the errors that trying again cannot help.
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
    """The fault of the Hub that made another library raise ``error``; None if there is none."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    behind: BaseException | None = error
    while behind is not None and not isinstance(
        behind, HfHubHTTPError | LocalEntryNotFoundError | OfflineModeIsEnabled | TransportError
    ):
        behind = behind.__cause__ or behind.__context__
    return behind


def hub_status(error: BaseException) -> int | None:
    """The status that the Hub answered with; none if it did not."""
    response: Any = getattr(error, "response", None)
    if response is None and isinstance(error.__cause__, Exception):
        response = getattr(error.__cause__, "response", None)
    return None if response is None else int(response.status_code)


def hub_said(error: BaseException) -> str:
    """What an error says, in one line, without what is signed in an address."""
    lines = [
        line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("For more information")
    ]
    return re.sub(r"\?[^\s'\"]*", "?…", " ".join(lines[:3]))[:300] or type(error).__name__
