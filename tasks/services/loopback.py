"""HTTP settings: the environment's proxies for other machines, and direct connections to loopback."""

from __future__ import annotations

import os
import re
import ssl
import urllib.request
from base64 import b64encode

from pipeline.errors import InputError, first_line

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")  # in upper or lower case
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def prepare_http() -> None:
    """Exclude this machine from the environment's proxies, for this process and its children. Sends nothing.

    Raises:
        InputError: the proxies or certificates cannot be used. The message quotes no address, because it may contain a
            password.
    """
    proxies, certificates = _set(_PROXIES), _set(_CERTIFICATES)
    os.environ.update(dict.fromkeys(("no_proxy", "NO_PROXY"), _no_proxy()))
    if not (proxies or certificates):
        return
    import httpx

    try:
        httpx.Client().close()  # a wrong setting breaks every client, even for loopback
    except ImportError:
        raise InputError(f"{proxies}: a SOCKS proxy needs a package: pip install 'httpx[socks]'") from None
    except (ValueError, httpx.InvalidURL):
        expected = "expected http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT, and in NO_PROXY names of hosts"
        raise InputError(f"{proxies}: not a valid address; {expected}") from None
    except OSError as error:  # includes errors of ssl
        fault = "no certificate in it" if isinstance(error, ssl.SSLError) else error.strerror or first_line(error)
        raise InputError(f"{certificates}: cannot be used: {fault}; fix or unset it") from None


def proxies_set() -> str:
    """Names of the set proxy variables, separated by commas; empty if there are none."""
    return _set(_PROXIES[:3])


def ask(url: str, *, login: str | None = None, content: bytes | None = None) -> bytes:
    """Request a URL on loopback without a proxy, and return the body of the answer.

    Args:
        url: URL on loopback.
        login: ``NAME:PASSWORD``.
        content: JSON to send by POST; None for GET.
    Raises:
        OSError: no answer within five seconds, or an HTTP error.
    """
    request = urllib.request.Request(url, data=content, headers={"Content-Type": "application/json"})
    if login is not None:
        request.add_header("Authorization", basic(login))
    with _DIRECT.open(request, timeout=5) as answer:
        body: bytes = answer.read()
        return body


def basic(login: str) -> str:
    """Value of the header ``Authorization`` for a ``NAME:PASSWORD``."""
    return "Basic " + b64encode(login.encode()).decode()


def _no_proxy() -> str:
    """Value of NO_PROXY that includes loopback and that all libraries can parse.

    httpx cannot parse IPv6 addresses in brackets, so brackets are removed. It cannot parse IPv6 networks either, and
    would not respect them, so they are dropped.
    """
    given = [entry.strip() for name in ("NO_PROXY", "no_proxy") for entry in os.environ.get(name, "").split(",")]
    if "*" in given:
        return "*"
    hosts = [re.sub(r"^\[(.*)\](:\d+)?$", r"\1", entry) for entry in given]
    kept = [host for host in hosts if host and not re.fullmatch(r"[\da-fA-F]*:[\da-fA-F:.]*/\d+", host)]
    return ",".join(dict.fromkeys([*kept, "127.0.0.1", "localhost"]))


def _set(names: tuple[str, ...]) -> str:
    return ", ".join(name for name in os.environ if name.upper() in names and os.environ[name])
