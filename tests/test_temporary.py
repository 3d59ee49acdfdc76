"""Temporary files of local servers: in a folder with space, a path short enough for sockets, closed to other users."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import machine
from pipeline.errors import InputError, LorafleetError
from tasks.services.temporary import LONGEST_BASE, check_temporary, ray_base, ray_folder, temporary_folder


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder that is the temporary one; nothing else of this machine is looked at."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        point_to(Path(folder), monkeypatch)
        yield Path(folder)


def point_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)  # what Python has found before
    return folder


def long(base: Path) -> Path:
    folder = base / ("x" * LONGEST_BASE)
    folder.mkdir()
    return folder


def test_only_this_user_can_enter_the_folder_of_ray_and_it_is_gone_at_the_end(base: Path) -> None:
    with ray_folder() as folder:
        folder.mkdir()
        folder.chmod(0o777)  # as Ray does
        assert folder.parent.parent == base
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert list(base.iterdir()) == []


def test_the_longest_base_leaves_room_for_the_sockets_of_ray(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a process number of seven digits, the most that Linux has."""
    longest = base / ("x" * (LONGEST_BASE - len(str(base)) - 1))
    longest.mkdir()
    point_to(longest, monkeypatch)
    with ray_folder() as folder:
        assert folder.is_relative_to(longest)
        path = folder / "session_2026-11-30_00-13-56_181829_4194304" / "sockets" / "plasma_store"
        path.parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))


def test_where_the_temporary_folder_has_too_long_a_path_the_systems_takes_ray(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = point_to(long(base), monkeypatch)
    assert temporary_folder() == folder
    assert ray_base() == Path("/tmp")
    check = check_temporary()
    assert check.status == "ok"
    assert check.found.startswith(f"in {folder}, ")
    assert check.found.endswith("those of Ray in /tmp, as the other path is too long for sockets")


def test_a_folder_that_is_named_for_ray_is_taken_or_refused_with_the_limit(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = base / "r"
    named.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(named))
    assert ray_base() == named
    monkeypatch.setenv("RAY_TMPDIR", str(long(base)))
    with pytest.raises(
        InputError, match=rf"RAY_TMPDIR .*leave room for {LONGEST_BASE}; set it to a folder with a shorter path"
    ):
        ray_base()
    assert check_temporary().status == "fault"
    for nowhere in ("nowhere", str(base / "nowhere"), "/proc", __file__):
        monkeypatch.setenv("RAY_TMPDIR", nowhere)
        with pytest.raises(InputError, match=r"RAY_TMPDIR .*: not a folder that can be written"):
            ray_base()


def test_a_temporary_folder_that_is_not_there_is_passed_over_as_python_does(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(base / "nowhere", monkeypatch)
    assert temporary_folder() == Path(tempfile.gettempdir()) != base / "nowhere"


def test_a_full_disk_is_told_before_anything_is_started(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LEAST_ROOM_BYTES", 2**62)
    with pytest.raises(
        LorafleetError, match=r"MB free, but a start needs .*; free some space, or set TMPDIR to another folder"
    ) as raised:
        temporary_folder()
    assert not isinstance(raised.value, InputError)  # on another try it may work
    assert str(raised.value).startswith(f"{base}: ")
    assert check_temporary().status == "fault"
    monkeypatch.setenv("RAY_TMPDIR", str(base))
    with pytest.raises(LorafleetError, match="or set RAY_TMPDIR to another folder"):
        ray_base()


HOLDER = """import sys
from tasks.services.temporary import ray_folder
with ray_folder() as folder:
    print(folder.parent, flush=True)
    sys.stdin.read()
"""


def hold() -> tuple[subprocess.Popen[str], Path]:
    """Another process that has such a folder."""
    holder = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    return holder, Path(holder.stdout.readline().strip())


def test_what_a_killed_process_has_left_is_deleted_and_what_a_living_one_has_is_not(base: Path) -> None:
    living, kept = hold()
    killed, left = hold()
    (left / "r").mkdir()
    (left / "r" / "log").write_text("x", encoding="utf-8")
    (base / "lorafleet-ray-file").write_text("a file", encoding="utf-8")
    (base / "lorafleet-ray-link").symlink_to(base)
    (base / "ray-of-others").mkdir()
    killed.kill()
    killed.wait()
    with ray_folder() as folder:
        there = {path.name for path in base.iterdir()}
    assert there == {kept.name, folder.parent.name, "lorafleet-ray-file", "lorafleet-ray-link", "ray-of-others"}
    living.communicate()
    assert not kept.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_what_another_user_has_left_is_left_to_them(base: Path) -> None:
    theirs = base / "lorafleet-ray-theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    with ray_folder():
        assert theirs.exists()


def test_a_file_system_without_locks_is_one_message(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(LorafleetError, match="cannot be locked: No locks available; set TMPDIR"), ray_folder():
        pass
    assert len(list(base.iterdir())) <= 1


def test_behind_a_link_to_nothing_is_as_much_room_as_beside_it(base: Path) -> None:
    (base / "runs").symlink_to(base / "gone" / "runs")
    assert machine.free_bytes(base / "runs" / "x") == pytest.approx(shutil.disk_usage(base).free, rel=0.05)
