"""HTTP on a machine that reaches the rest of the world through a proxy, and loopback, which no proxy knows."""

from __future__ import annotations

import os
import re
import ssl
import urllib.request
from base64 import b64encode

from pipeline.errors import InputError, first_line

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")  # each may be written in small letters, too
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def prepare_http() -> None:
    """Have this process, and those that it starts, use the environment's proxies for all but this machine. Sends nothing.

    Raises: InputError: no client can be made with these proxies and certificates; an address, which may hold a password, is not quoted.
    """
    proxies, certificates = _set(_PROXIES), _set(_CERTIFICATES)
    os.environ.update(dict.fromkeys(("no_proxy", "NO_PROXY"), _no_proxy()))
    if not (proxies or certificates):
        return
    import httpx

    try:
        httpx.Client().close()  # every client fails in the same way, even one for loopback
    except ImportError:
        raise InputError(f"{proxies}: a SOCKS proxy needs a package: pip install 'httpx[socks]'") from None
    except (ValueError, httpx.InvalidURL):
        expected = "expected http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT, and in NO_PROXY names of hosts"
        raise InputError(f"{proxies}: not an address that can be used; {expected}") from None
    except OSError as error:  # an error of ssl is one
        fault = "no certificate in it" if isinstance(error, ssl.SSLError) else error.strerror or first_line(error)
        raise InputError(f"{certificates}: cannot be used: {fault}; mend or unset it") from None


def proxies_set() -> str:
    """The names of those variables that name proxies here; empty if none does."""
    return _set(_PROXIES[:3])


def ask(url: str, *, login: str | None = None, content: bytes | None = None) -> bytes:
    """The answer of a server on this machine, which is not asked through a proxy.

    Args:
        url: On loopback.
        login: ``NAME:PASSWORD``.
        content: JSON, to be sent with POST.
    Raises: OSError: no answer within five seconds, or one that is an error.
    """
    request = urllib.request.Request(url, data=content, headers={"Content-Type": "application/json"})
    if login is not None:
        request.add_header("Authorization", basic(login))
    with _DIRECT.open(request, timeout=5) as answer:
        body: bytes = answer.read()
        return body


def basic(login: str) -> str:
    """The header ``Authorization`` of a ``NAME:PASSWORD``."""
    return "Basic " + b64encode(login.encode()).decode()


def _no_proxy() -> str:
    """The hosts that need no proxy, with this machine's loopback, in a form that all libraries can read.

    httpx fails at an IPv6 address in brackets, and at a network of IPv6 addresses, which it could not heed anyway.
    """
    given = [entry.strip() for name in ("NO_PROXY", "no_proxy") for entry in os.environ.get(name, "").split(",")]
    if "*" in given:
        return "*"
    hosts = [re.sub(r"^\[(.*)\](:\d+)?$", r"\1", entry) for entry in given]
    kept = [host for host in hosts if host and not re.fullmatch(r"[\da-fA-F]*:[\da-fA-F:.]*/\d+", host)]
    return ",".join(dict.fromkeys([*kept, "127.0.0.1", "localhost"]))


def _set(names: tuple[str, ...]) -> str:
    return ", ".join(name for name in os.environ if name.upper() in names and os.environ[name])
