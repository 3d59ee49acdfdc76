"""Whether the servers answer that a run may need: a Prefect API, the Hub, a Ray cluster. Changes nothing there.

For ``lorafleet doctor``: speaks to Prefect by its HTTP API only, and imports huggingface_hub where it is needed, for either library may be
what is broken.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from urllib.parse import unquote, urlsplit

from pipeline.errors import InputError, first_line
from tasks.checks.machine import Check
from tasks.network import check_listening
from tasks.services.loopback import basic, prepare_http, proxies_set
from tasks.services.passwords import login_for

T = TypeVar("T")

NETWORK_SECONDS = 5.0
"""For everything that is asked of a network, together."""

_PREFECT_ADVICE = "start that server (`prefect server start`), or unset PREFECT_API_URL: then a run starts its own"
_PREFECT_REFUSES = {
    401: "set PREFECT_API_AUTH_STRING, or PREFECT_API_KEY, to what that server asks for; that of `lorafleet up` is in .up of its run store",
    403: "set PREFECT_API_AUTH_STRING, or PREFECT_API_KEY, to what that server asks for; that of `lorafleet up` is in .up of its run store",
    404: "set PREFECT_API_URL to that server's API, whose address ends in /api",
}
_HUB_ADVICE = "look after network and proxy; without the Hub, train on data.mirror or files of your own, with an encoder from a folder"


class Deferred(Generic[T]):
    """A call in a thread of its own that nobody has to wait for: a name server may let it hang for minutes."""

    def __init__(self, call: Callable[[], T]) -> None:
        """Begin."""
        self._begun = time.monotonic()
        self._found: list[T] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def result(self, *, seconds: float | None = None) -> T:
        """What it returns or raises.

        Raises: TimeoutError: neither has come so many seconds after it began.
        """
        self._thread.join(None if seconds is None else max(0.0, self._begun + seconds - time.monotonic()))
        if self._error is not None:
            raise self._error
        if not self._found:
            raise TimeoutError(f"no answer in {seconds:g} s")
        return self._found[0]

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._found.append(call())
        except Exception as error:  # noqa: BLE001 - raised again by result(), in the thread that waits
            self._error = error


def check_prefect() -> Check:
    """The Prefect server that is configured, if one is."""
    url = os.environ.get("PREFECT_API_URL", "").rstrip("/")
    if not url:
        return Check(
            "ok",
            "Prefect API",
            "PREFECT_API_URL is not set: a run starts a server of its own, on loopback, and stops it",
        )
    if not url.startswith(("http://", "https://")):
        return Check(
            "warning", "Prefect API", "PREFECT_API_URL is no address; expected http://HOST:PORT/api", _PREFECT_ADVICE
        )
    place = _place(url)
    try:
        _get(f"{url}/health")
        # Prefect Cloud has no version: it goes with every client.
        server = "" if place == "api.prefect.cloud" else str(json.loads(_get(f"{url}/admin/version")))
    except urllib.error.HTTPError as error:
        return Check(
            "warning", "Prefect API", f"{place} answers {error.code}", _PREFECT_REFUSES.get(error.code, _PREFECT_ADVICE)
        )
    except (ValueError, http.client.HTTPException):
        return Check("warning", "Prefect API", f"what answers at {place} is not a Prefect API", _PREFECT_REFUSES[404])
    except OSError as error:
        reason = getattr(error, "reason", error)
        return Check("warning", "Prefect API", f"no server answers at {place}: {reason}", _PREFECT_ADVICE)
    return _compare_versions(place, server)


def refuses_login(url: str) -> bool:
    """Whether a Prefect API refuses the password that the environment has for it. What else may be wrong there is left to its client."""
    try:
        _get(f"{url.rstrip('/')}/admin/version")
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return False


def check_proxy() -> Check:
    """The proxies and certificates that the environment names for all that asks a network."""
    try:
        prepare_http()
    except InputError as error:
        return Check("fault", "proxy", str(error))
    return Check("ok", "proxy", f"{proxies_set()}: used for all but this machine" if proxies_set() else "none is set")


def check_hub() -> Check:
    """The Hugging Face Hub, and whose token this is.

    What the HTTP library says of a failure is not quoted: the token is in the request's header.
    """
    from huggingface_hub import HfApi, constants, get_session, get_token
    from huggingface_hub.errors import HfHubHTTPError

    place, token = _place(constants.ENDPOINT), get_token()
    if constants.HF_HUB_OFFLINE:
        return Check(
            "warning",
            "Hub",
            "HF_HUB_OFFLINE is set: not asked",
            "unset it to download encoders and data sets, and to publish",
        )
    try:
        if token is None:
            get_session().head(constants.ENDPOINT, timeout=NETWORK_SECONDS)
            advice = "to publish, or to read what is private: set HF_TOKEN, or `hf auth login`"
            return Check("ok", "Hub", f"{place} answers; there is no token", advice)
        user: dict[str, Any] = HfApi().whoami(token)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            return Check(
                "warning",
                "Hub",
                f"{place} refuses the token ({status})",
                "set HF_TOKEN to one that is valid, or `hf auth login`",
            )
        return Check("warning", "Hub", f"{place} answers {status}", "try again later")
    except Exception as error:  # noqa: BLE001 - the HTTP library's own, and whatever a malformed token leads to
        return Check("warning", "Hub", f"{place} could not be asked: {type(error).__name__}", _HUB_ADVICE)
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    return Check(
        "ok", "Hub", f"{place} answers; the token is {user.get('name')}'s" + (f", its role {role}" if role else "")
    )


def check_address(address: str) -> Check | None:
    """None if something listens at a Ray cluster's ``HOST:PORT`` or ``ray://HOST:PORT``, or it names none (``auto``)."""
    try:
        check_listening(address, timeout_seconds=NETWORK_SECONDS)
    except (OSError, ValueError) as error:
        advice = "start that cluster, or unset RAY_ADDRESS (compute.ray_address): then a run starts a local Ray"
        return Check("warning", "Ray", f"nothing answers at {address}: {first_line(error)}", advice)
    return None


def in_time(name: str, later: Deferred[Check], advice: str = "look after network, proxy and name server") -> Check:
    """The check, if it comes in time."""
    try:
        return later.result(seconds=NETWORK_SECONDS)
    except TimeoutError as error:
        return Check("warning", name, str(error), advice)


def _get(url: str) -> bytes:
    parts = urlsplit(url)
    request = urllib.request.Request(parts._replace(netloc=_place(url)).geturl())
    key, login = os.environ.get("PREFECT_API_KEY"), login_for(url)
    if parts.username and not login:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    # Unredirected: not for wherever the server sends us.
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    elif login:
        request.add_unredirected_header("Authorization", basic(login))
    with urllib.request.urlopen(request, timeout=NETWORK_SECONDS) as answer:
        content: bytes = answer.read(10_000)
    return content


def _compare_versions(place: str, server: str) -> Check:
    """By Prefect's own rule, which it does not apply to runs that lorafleet starts."""
    from packaging.version import Version

    client = importlib.metadata.version("prefect")
    if server and Version(server).major != Version(client).major:
        found = f"{place} is Prefect {server}, but Prefect {client} is installed here"
        return Check(
            "warning", "Prefect API", found, "use a server of the same major version; flows cannot run with this one"
        )
    if server and Version(server) < Version(client):
        found = f"{place} is Prefect {server}, older than {client} here"
        return Check("warning", "Prefect API", found, f"upgrade that server to {client} or newer")
    return Check("ok", "Prefect API", f"{place} answers" + (f", Prefect {server}" if server else ""))


def _place(url: str) -> str:
    """Host and port, without the name and password that an address may hold."""
    return urlsplit(url).netloc.rpartition("@")[2]
