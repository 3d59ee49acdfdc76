"""Access to local Prefect servers: passwords that only their owner can read, and that clients find."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect_server import start_stand_in

from pipeline.errors import InputError
from tasks.services.passwords import (
    given_login,
    kept_secret,
    login_for,
    new_login,
    private_folder,
    running_ups,
    server_settings,
)

StartUp = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "PREFECT_API_AUTH_STRING",
        "PREFECT_SERVER_API_AUTH_STRING",
        "PREFECT_API_KEY",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start_up() -> Iterator[StartUp]:
    """``start_stand_in``; ended after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any, **options: str) -> subprocess.Popen[bytes]:
        started.append(start_stand_in(*arguments, **options))
        return started[-1]

    yield start
    for process in started:
        process.communicate()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_secret_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    assert kept_secret(file, "one") == "one"
    assert kept_secret(file, "two") == "one"
    assert (mode(file), list(tmp_path.iterdir())) == (0o600, [file])


def spoil_mode(file: Path) -> None:
    file.chmod(0o640)


def spoil_link(file: Path) -> None:
    file.rename(file.parent / "elsewhere")
    file.symlink_to(file.parent / "elsewhere")


def spoil_content(file: Path) -> None:
    file.write_text("\n", encoding="utf-8")


@pytest.mark.parametrize("spoil", [spoil_mode, spoil_link, spoil_content])
def test_a_secret_that_others_could_have_read_or_written_or_that_is_empty_is_made_anew(
    spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    kept_secret(file, "one")
    spoil(file)
    assert kept_secret(file, "two") == "two"
    assert not file.is_symlink()
    assert mode(file) == 0o600


def test_a_secret_that_cannot_be_kept_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere/secret: cannot be read and written"):
        kept_secret(tmp_path / "nowhere" / "secret", "one")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder: cannot be read and written"):
        kept_secret(tmp_path / "folder", "one")


def test_a_private_folder_is_closed_to_others_even_if_it_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o755)
    for folder in (tmp_path / "a", tmp_path / "b" / "c"):
        private_folder(folder)
        assert mode(folder) == 0o700


def test_what_the_user_has_set_is_asked_for_the_servers_own_before_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given_login() is None
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:client")
    assert given_login() == "me:client"
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "me:server")
    assert given_login() == "me:server"
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "me:pä")
    with pytest.raises(InputError, match="PREFECT_SERVER_API_AUTH_STRING: expected NAME:PASSWORD in ASCII"):
        given_login()


def test_a_server_lets_the_pages_of_its_own_ui_read_its_answers_or_those_that_the_user_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = server_settings("http://127.0.0.1:4200", "a:b")
    assert settings.pop("PREFECT_SERVER_CORS_ALLOWED_ORIGINS") == "http://127.0.0.1:4200,http://localhost:4200"
    assert settings == {"PREFECT_SERVER_API_AUTH_STRING": "a:b", "PREFECT_API_AUTH_STRING": "a:b"}
    monkeypatch.setenv("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "https://team.example")
    assert server_settings("http://127.0.0.1:4200", "a:b") == settings


def test_no_two_logins_are_the_same() -> None:
    logins = {new_login() for _ in range(100)}
    assert len(logins) == 100
    assert all(login.startswith("lorafleet:") and len(login) >= 42 and login.isascii() for login in logins)


def test_the_login_of_a_running_up_is_found_by_its_port_as_long_as_it_runs(start_up: StartUp, tmp_path: Path) -> None:
    one = start_up("http://127.0.0.1:41001/api", tmp_path / "one", login="lorafleet:one")
    start_up("http://127.0.0.1:41002/api", tmp_path / "two", login="lorafleet:two")
    start_up("http://127.0.0.1:41003/api", tmp_path / "three", title="something else")
    here = {up.runs.name: up.login for up in running_ups() if up.runs.is_relative_to(tmp_path)}
    assert here == {"one": "lorafleet:one", "two": "lorafleet:two"}
    assert login_for("http://127.0.0.1:41001/api") == "lorafleet:one"
    assert login_for("http://localhost:41002/api/") == "lorafleet:two"
    for elsewhere in (
        "http://127.0.0.1:41003/api",
        "http://example.org:41001/api",
        "https://127.0.0.1/api",
        "41001",
        "http://[::1/api",
    ):
        assert login_for(elsewhere) is None
    one.communicate()  # whoever has the port then is sent nothing
    assert login_for("http://127.0.0.1:41001/api") is None


def test_a_login_that_the_user_has_set_goes_before_that_of_up(
    start_up: StartUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_up("http://127.0.0.1:41001/api", tmp_path)
    monkeypatch.setenv("PREFECT_API_KEY", "key")
    assert login_for("http://127.0.0.1:41001/api") is None
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:mine")
    assert login_for("http://127.0.0.1:41001/api") == "me:mine"
