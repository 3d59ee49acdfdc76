"""Checks of the servers that a run may need: a Prefect API, the Hub, a Ray cluster. Read only.

Prefect is accessed by its HTTP API, and huggingface_hub is imported late, because either library may be broken when
``lorafleet doctor`` runs.
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
"""Time limit of each check, and of each connection."""

_PREFECT_ADVICE = "start that server (`prefect server start`), or unset PREFECT_API_URL: then a run starts its own"
_PREFECT_LOGIN = (
    "set PREFECT_API_AUTH_STRING, or PREFECT_API_KEY, to the login of that server; "
    "that of `lorafleet up` is in .up of its run store"
)
_PREFECT_REFUSES = {
    401: _PREFECT_LOGIN,
    403: _PREFECT_LOGIN,
    404: "set PREFECT_API_URL to that server's API, whose address ends in /api",
}
_HUB_ADVICE = (
    "check network and proxy; without the Hub, train on data.mirror or files of your own, with an encoder from a folder"
)


class Deferred(Generic[T]):
    """A call in a background thread, whose result may be abandoned: a name server may make it hang for minutes."""

    def __init__(self, call: Callable[[], T]) -> None:
        """Start the call."""
        self._started = time.monotonic()
        self._results: list[T] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def result(self, *, seconds: float | None = None) -> T:
        """Wait for the call, and return its result or raise its error.

        Args:
            seconds: Time limit, counted from the start of the call; None for no limit.
        Raises:
            TimeoutError: the time is up.
        """
        self._thread.join(None if seconds is None else max(0.0, self._started + seconds - time.monotonic()))
        if self._error is not None:
            raise self._error
        if not self._results:
            raise TimeoutError(f"no answer in {seconds:g} s")
        return self._results[0]

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._results.append(call())
        except Exception as error:  # noqa: BLE001 - raised again by result(), in the thread that waits
            self._error = error


def check_prefect() -> Check:
    """Check the configured Prefect server, if any."""
    url = os.environ.get("PREFECT_API_URL", "").rstrip("/")
    if not url:
        return Check(
            "ok",
            "Prefect API",
            "PREFECT_API_URL is not set: a run starts its own server on loopback, and stops it",
        )
    if not url.startswith(("http://", "https://")):
        return Check(
            "warning",
            "Prefect API",
            "PREFECT_API_URL is not an address; expected http://HOST:PORT/api",
            _PREFECT_ADVICE,
        )
    host = _host(url)
    try:
        _get(f"{url}/health")
        # Prefect Cloud has no version, and works with every client.
        server = "" if host == "api.prefect.cloud" else str(json.loads(_get(f"{url}/admin/version")))
    except urllib.error.HTTPError as error:
        return Check(
            "warning", "Prefect API", f"{host} answers {error.code}", _PREFECT_REFUSES.get(error.code, _PREFECT_ADVICE)
        )
    except (ValueError, http.client.HTTPException):
        return Check("warning", "Prefect API", f"what answers at {host} is not a Prefect API", _PREFECT_REFUSES[404])
    except OSError as error:
        reason = getattr(error, "reason", error)
        return Check("warning", "Prefect API", f"no server answers at {host}: {reason}", _PREFECT_ADVICE)
    return _compare_versions(host, server)


def refuses_login(url: str) -> bool:
    """Whether a Prefect API refuses the configured login. Other errors are left to Prefect's client."""
    try:
        _get(f"{url.rstrip('/')}/admin/version")
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return False


def check_proxy() -> Check:
    """Check the proxies and certificates in the environment."""
    try:
        prepare_http()
    except InputError as error:
        return Check("fault", "proxy", str(error))
    return Check("ok", "proxy", f"{proxies_set()}: used for all but this machine" if proxies_set() else "none is set")


def check_hub() -> Check:
    """Check the Hugging Face Hub, and the owner of the token.

    Messages of the HTTP library are not quoted, because they may contain the token.
    """
    from huggingface_hub import HfApi, constants, get_session, get_token
    from huggingface_hub.errors import HfHubHTTPError

    host, token = _host(constants.ENDPOINT), get_token()
    if constants.HF_HUB_OFFLINE:
        return Check(
            "warning",
            "Hub",
            "HF_HUB_OFFLINE is set: not checked",
            "unset it to download encoders and data sets, and to publish",
        )
    try:
        if token is None:
            get_session().head(constants.ENDPOINT, timeout=NETWORK_SECONDS)
            advice = "to publish, or to read private data: set HF_TOKEN, or run `hf auth login`"
            return Check("ok", "Hub", f"{host} answers; there is no token", advice)
        user: dict[str, Any] = HfApi().whoami(token)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            return Check(
                "warning",
                "Hub",
                f"{host} refuses the token ({status})",
                "set HF_TOKEN to a valid one, or run `hf auth login`",
            )
        return Check("warning", "Hub", f"{host} answers {status}", "try again later")
    except Exception as error:  # noqa: BLE001 - the HTTP library's own, and whatever a malformed token leads to
        return Check("warning", "Hub", f"{host} could not be reached: {type(error).__name__}", _HUB_ADVICE)
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    return Check(
        "ok", "Hub", f"{host} answers; the token is {user.get('name')}'s" + (f", its role {role}" if role else "")
    )


def check_address(address: str) -> Check | None:
    """Check that something listens at the address of a Ray cluster.

    Args:
        address: ``HOST:PORT`` or ``ray://HOST:PORT``. Others, such as ``auto``, are not checked.
    Returns:
        A warning, or None.
    """
    try:
        check_listening(address, timeout_seconds=NETWORK_SECONDS)
    except (OSError, ValueError) as error:
        advice = "start that cluster, or unset RAY_ADDRESS (compute.ray_address): then a run starts a local Ray"
        return Check("warning", "Ray", f"nothing answers at {address}: {first_line(error)}", advice)
    return None


def in_time(name: str, deferred: Deferred[Check], advice: str = "check network, proxy and name server") -> Check:
    """Result of a check, or a warning if it takes longer than ``NETWORK_SECONDS``."""
    try:
        return deferred.result(seconds=NETWORK_SECONDS)
    except TimeoutError as error:
        return Check("warning", name, str(error), advice)


def _get(url: str) -> bytes:
    parts = urlsplit(url)
    request = urllib.request.Request(parts._replace(netloc=_host(url)).geturl())
    key, login = os.environ.get("PREFECT_API_KEY"), login_for(url)
    if parts.username and not login:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    # Not sent along a redirect.
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    elif login:
        request.add_unredirected_header("Authorization", basic(login))
    with urllib.request.urlopen(request, timeout=NETWORK_SECONDS) as answer:
        content: bytes = answer.read(10_000)
    return content


def _compare_versions(host: str, server: str) -> Check:
    """Compare versions by Prefect's own rule, which Prefect does not apply to runs that lorafleet starts."""
    from packaging.version import Version

    client = importlib.metadata.version("prefect")
    if server and Version(server).major != Version(client).major:
        found = f"{host} is Prefect {server}, but Prefect {client} is installed here"
        return Check(
            "warning", "Prefect API", found, "use a server of the same major version; flows cannot run with this one"
        )
    if server and Version(server) < Version(client):
        found = f"{host} is Prefect {server}, older than {client} here"
        return Check("warning", "Prefect API", found, f"upgrade that server to {client} or newer")
    return Check("ok", "Prefect API", f"{host} answers" + (f", Prefect {server}" if server else ""))


def _host(url: str) -> str:
    """Host and port of an address, without name and password."""
    return urlsplit(url).netloc.rpartition("@")[2]
