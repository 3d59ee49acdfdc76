"""The embedded Prefect server: access by other users, and messages if it cannot start."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import LORAFLEET, Command, write_config, write_task
from prefect_server import answers_to_strangers

PROGRAM = """
import os, sys
from pathlib import Path
from tasks.services.prefect_server import PrefectServer
server = PrefectServer(Path(sys.argv[1]))
server.start()
server.ready()
print(os.environ["PREFECT_API_URL"], os.environ["PREFECT_API_AUTH_STRING"], flush=True)
sys.stdin.read()
server.stop()
"""


def start(home: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that has the server as a run has it, until its standard input ends."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, str(home)],
        env=inherited | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[psutil.Process, Path, str, str]]:
    """A running one: its process, its home, its address, its login."""
    home = tmp_path_factory.mktemp("embedded") / ".prefect"
    process = start(home)
    assert process.stdout is not None
    url, login = process.stdout.readline().split()
    yield psutil.Process(process.pid), home, url, login
    process.communicate()


def test_the_server_of_a_run_answers_nobody_who_does_not_know_its_password(
    server: tuple[psutil.Process, Path, str, str],
) -> None:
    _, _, url, login = server
    assert answers_to_strangers(url, login=login) == []


def test_the_password_is_another_one_each_time_and_is_written_nowhere(
    server: tuple[psutil.Process, Path, str, str],
) -> None:
    process, home, _, login = server
    password = login.partition(":")[2]
    assert len(password) >= 32
    commands = [argument for child in (process, *process.children(recursive=True)) for argument in child.cmdline()]
    assert "tasks.services.prefect_server" in commands
    assert not any(password in argument for argument in commands)
    files = [path for path in home.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if password.encode() in path.read_bytes()] == []
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_server_of_the_users_that_refuses_the_password_is_one_message(
    server: tuple[psutil.Process, Path, str, str], tmp_path: Path
) -> None:
    _, _, url, login = server
    right = start(tmp_path / "home", PREFECT_API_URL=url, PREFECT_API_AUTH_STRING=login)
    assert right.communicate()[0] == f"{url} {login}\n"
    wrong = start(tmp_path / "home", PREFECT_API_URL=url, PREFECT_API_AUTH_STRING=login[:-1])
    out, err = wrong.communicate()
    assert out == ""
    assert (
        "InputError: the Prefect server of PREFECT_API_URL requires a password; "
        "set PREFECT_API_AUTH_STRING=NAME:PASSWORD" in err
    )
    assert not (tmp_path / "home").exists()


def can_mount() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not can_mount(), reason="may not mount a small disk")
@pytest.mark.parametrize(
    ("command", "what"),
    [("train", "store"), ("train", "TMPDIR"), ("classify", "TMPDIR"), ("up", "store"), ("up", "TMPDIR")],
)
def test_a_full_disk_is_one_message_before_anything_is_started(command: str, what: str, tmp_path: Path) -> None:
    """With exit code 1: on another try it may work."""
    disk, data = tmp_path / "disk", write_task(tmp_path / "data", "Topics")
    disk.mkdir()
    config = write_config(tmp_path / "config.toml", tmp_path, [data])
    runs = disk / "runs" if what == "store" else tmp_path / "runs"
    arguments: dict[str, list[str | Path]] = {
        "train": ["train", "--config", config, "--runs", runs],
        "classify": ["classify", data["train"], runs, "--adapter", tmp_path],
        "up": ["up", "--no-ray", "--runs", runs],
    }
    fill = (
        f"mount -t tmpfs -o size=1m tmpfs {disk} && mkdir {disk}/runs && "
        f"head --quiet -c 2M /dev/zero > {disk}/fill 2> /dev/null; "
    )
    program = ("unshare", "-m", "bash", "-c", f'{fill} exec "$@"', "bash", *LORAFLEET)
    environment = {"TMPDIR": str(disk)} if what == "TMPDIR" else {}
    ended = Command(*arguments[command], program=program, cwd=tmp_path, **environment).wait(seconds=60)
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1), ended.err
    assert f"error: {disk}" in ended.err
    assert "0.0 MB free, but a start needs 50 MB; free some space, or " in ended.err
    assert (what == "TMPDIR") == ("set TMPDIR to another folder" in ended.err)
