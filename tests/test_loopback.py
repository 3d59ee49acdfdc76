"""Proxies and certificates of the environment: loopback uses no proxy, and an invalid one is one message."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx
import pytest

from pipeline.errors import InputError
from tasks.checks.servers import check_proxy
from tasks.services.loopback import prepare_http

NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
SECRET = "recognisable-secret"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *map(str.lower, NAMES), "SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"):
        monkeypatch.setenv(name, "")  # set, so that whatever is changed is put back
        monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "proxy"),
    [
        ("HTTP_PROXY", "http://127.0.0.1:9"),
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("all_proxy", "socks5h://me:x@127.0.0.1:9"),
    ],
)
@pytest.mark.parametrize("no_proxy", [None, "*,corp.example", "::1,[::1],[::1]:80,fe80::/10,10.0.0.0/8,.corp, ,"])
def test_loopback_is_asked_directly_whatever_proxy_is_set(
    name: str, proxy: str, no_proxy: str | None, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens at the proxy, so that whoever asks it fails."""
    monkeypatch.setenv(name, proxy)
    if no_proxy is not None:
        monkeypatch.setenv("NO_PROXY", no_proxy)
    prepare_http()
    assert httpx.get(server).status_code == 200
    assert httpx.get(server.replace("127.0.0.1", "localhost")).status_code == 200
    assert proxy_bypass("127.0.0.1")


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_the_hosts_that_need_no_proxy_stay_those_that_the_user_has_set(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries read the name in small letters first, where it is there."""
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:80")
    monkeypatch.setenv(name, "corp.example, [::1] ,10.0.0.1")
    prepare_http()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "corp.example,::1,10.0.0.1,127.0.0.1,localhost"
    assert all(proxy_bypass(host) for host in ("corp.example", "git.corp.example", "127.0.0.1"))
    assert not proxy_bypass("elsewhere.example")
    assert getproxies()["http"] == "http://proxy.example:80"


def test_where_no_host_needs_a_proxy_that_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """urllib knows the star only where it stands alone."""
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:80")
    monkeypatch.setenv("NO_PROXY", "*")
    prepare_http()
    assert proxy_bypass("elsewhere.example")


@pytest.mark.parametrize(
    ("environment", "named", "words"),
    [
        ({"HTTP_PROXY": f"ftp://me:{SECRET}@proxy.example:1"}, "HTTP_PROXY", "expected http://HOST:PORT"),
        ({"https_proxy": f"http://me:{SECRET}/x@proxy.example:port"}, "https_proxy", "expected http://HOST:PORT"),
        ({"ALL_PROXY": "socks4://127.0.0.1:9"}, "ALL_PROXY", "socks5://HOST:PORT"),
        ({"ALL_PROXY": f"://{SECRET}"}, "ALL_PROXY", "expected"),
        ({"HTTP_PROXY": "http://a:1", "NO_PROXY": f"http://x:{SECRET}"}, "HTTP_PROXY, NO_PROXY", "names of hosts"),
        ({"SSL_CERT_FILE": "/nowhere.pem"}, "SSL_CERT_FILE", "No such file"),
        ({"SSL_CERT_FILE": __file__}, "SSL_CERT_FILE", "no certificate in it"),
        ({"SSL_CERT_FILE": str(Path(__file__).parent)}, "SSL_CERT_FILE", "Is a directory"),
        ({"SSLKEYLOGFILE": "/nowhere/log"}, "SSLKEYLOGFILE", "No such file"),
    ],
)
def test_what_no_client_can_use_is_one_message_that_names_the_variables_and_no_password(
    environment: dict[str, str], named: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as undone:
        undone.setenv("no_proxy", "")  # so that it is put back
        undone.setenv("NO_PROXY", environment.get("NO_PROXY", ""))
        check = check_proxy()
    with pytest.raises(InputError) as raised:
        prepare_http()
    message = str(raised.value)
    assert message.startswith(f"{named}: ")
    assert words in message
    assert SECRET not in message
    assert "\n" not in message
    assert (check.status, check.found) == ("fault", message)


def test_the_doctor_names_the_variables_of_proxies_and_not_their_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (check_proxy().status, check_proxy().found) == ("ok", "none is set")
    monkeypatch.setenv("ALL_PROXY", f"socks5://me:{SECRET}@proxy.example:1")
    assert (check_proxy().status, check_proxy().found) == ("ok", "ALL_PROXY: used for all but this machine")
