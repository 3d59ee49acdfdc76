"""Reading files of an untrusted folder: an invalid file or record is one message, and never a wait."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import task_result

from pipeline.errors import AdapterError, DataError
from pipeline.records import (
    AdapterMeta,
    ClassificationResults,
    FewShot,
    LabelNames,
    Publication,
    ReferenceOutputs,
    TaskResult,
)
from pipeline.store.files import (
    LARGEST_RECORD_BYTES,
    LARGEST_WEIGHTS_BYTES,
    copy_inside,
    open_inside,
    read_file,
    read_record,
)
from pipeline.store.run_folder import adapter_sha256

pytestmark = pytest.mark.timeout(20)  # a pipe that is waited for is a failure, not a hang


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the name of a socket may have 107 bytes
        server.bind(path.name)


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 42)  # a terabyte that takes no room


NO_RECORD: list[tuple[Callable[[Path], None], str]] = [
    (pipe, "a named pipe"),
    (device, "a device"),
    (listening, "a device or socket"),
    (Path.mkdir, "a folder"),
    (endless, "more than 8,388,608 bytes"),
]


@pytest.mark.parametrize(("make", "says"), NO_RECORD)
def test_only_a_regular_file_of_a_record_size_is_read(
    make: Callable[[Path], None], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "meta.json")
    with pytest.raises(DataError, match=rf"meta\.json cannot be read: .*{says}"):
        read_record(tmp_path / "meta.json", AdapterMeta)


@pytest.mark.parametrize(("make", "says"), NO_RECORD)
def test_weights_that_are_no_file_or_of_no_adapters_size_are_not_hashed(
    make: Callable[[Path], None], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "adapter_model.safetensors")
    said = f"more than {LARGEST_WEIGHTS_BYTES:,} bytes" if make is endless else says
    with pytest.raises(AdapterError, match=rf"adapter_model\.safetensors cannot be read.*{said}"):
        adapter_sha256(tmp_path)


def test_a_file_is_read_up_to_its_limit_and_not_beyond(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    assert read_file(tmp_path / "file", at_most=4) == b"1234"
    with pytest.raises(OSError, match="more than 3 bytes"):
        read_file(tmp_path / "file", at_most=3)


DEEP, HUGE, HALF = b"[" * 100_000 + b"]" * 100_000, b"9" * 6000, b'"\\ud800"'


@pytest.mark.parametrize(
    "record_type", [AdapterMeta, LabelNames, ReferenceOutputs, FewShot, TaskResult, ClassificationResults, Publication]
)
@pytest.mark.parametrize("value", [DEEP, HUGE, HALF, b"NaN", b'"' + b"x" * 1_000_000 + b'"'])
def test_json_that_breaks_readers_is_one_line_that_names_the_file(
    record_type: type, value: bytes, tmp_path: Path
) -> None:
    for content in (value, b'{"run_id": ' + value + b"}", b"[" + value + b"]", b'{"' + b"k" * 100_000 + b'": 1}'):
        (tmp_path / "record.json").write_bytes(content)
        with pytest.raises(DataError, match=r"record\.json is damaged") as raised:
            read_record(tmp_path / "record.json", record_type)
        assert len(str(raised.value)) < 1000
        assert "\n" not in str(raised.value)


def written(**changes: object) -> bytes:
    return json.dumps(json.loads(task_result().model_dump_json()) | changes).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "../x"},
        {"run_id": "a/b"},
        {"run_id": "x" * 300},
        {"run_id": "a\n"},
        {"reused_from": "../x"},
        *(
            {"encoder": {"name": "e", "public_name": name, "revision": "a" * 40}}
            for name in ("../e", "/e", "a/../b", "a/b/c", ".e", "e\n", "")
        ),
        *(
            {"encoder": {"name": "e", "public_name": "e", "revision": r}}
            for r in ("../../x", "main", "a/b", "sha256:../x", "a" * 40 + "\n", "")
        ),
        *(
            {"adapter": {"path": "A", "sha256": sha256, "encoder_revision": "a" * 40}}
            for sha256 in ("../x", "A" * 64, "a" * 63, "a" * 64 + "\n")
        ),
    ],
)
def test_a_record_whose_strings_are_no_names_is_not_read(changes: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(written())
    assert read_record(tmp_path / "result.json", TaskResult) == task_result()
    (tmp_path / "result.json").write_bytes(written(**changes))
    with pytest.raises(DataError, match=next(iter(changes))):
        read_record(tmp_path / "result.json", TaskResult)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".x", "", "x" * 129, "a\0", "é", "a b", "-x"])
def test_an_mteb_task_of_a_record_is_called_as_a_config_may_call_it(name: str, tmp_path: Path) -> None:
    task = json.loads(task_result().model_dump_json())["mteb_task"] | {"name": name}
    (tmp_path / "result.json").write_bytes(written(mteb_task=task))
    with pytest.raises(DataError, match=r"mteb_task\.name"):
        read_record(tmp_path / "result.json", TaskResult)


@pytest.mark.parametrize(
    "path",
    ["../../etc/passwd", "/etc/passwd", "A/../../x", "A//x", "A/.x", ".x", "A/", "", "A\\x", "A/x\n", "a" * 1001],
)
def test_a_publication_names_only_files_inside_itself(path: str, tmp_path: Path) -> None:
    encoder = {"name": "e", "public_name": "e", "revision": "a" * 40}
    publication = {
        "run_id": "one",
        "lorafleet_version": "0",
        "encoder": encoder,
        "adapters": {},
        "files": {path: "a" * 64},
    }
    (tmp_path / "publication.json").write_text(json.dumps(publication), encoding="utf-8")
    with pytest.raises(DataError, match=r"publication\.json is damaged.*files"):
        read_record(tmp_path / "publication.json", Publication)


# Files that are taken from a folder


def test_a_file_of_the_folder_itself_is_copied(tmp_path: Path) -> None:
    (tmp_path / "run" / "A").mkdir(parents=True)
    (tmp_path / "run" / "A" / "x").write_bytes(b"ours")
    copy_inside(tmp_path / "run", "A/x", tmp_path / "out" / "B" / "x")
    assert (tmp_path / "out" / "B" / "x").read_bytes() == b"ours"


@pytest.mark.parametrize("link", ["A", "A/B", "A/B/x"])
def test_nothing_is_read_through_a_symbolic_link(link: str, tmp_path: Path) -> None:
    inside, outside = tmp_path / "run" / "A" / "B", tmp_path / "outside" / "A" / "B"
    for folder in (inside, outside):
        folder.mkdir(parents=True)
        (folder / "x").write_bytes(folder.parts[-3].encode())
    (tmp_path / "run" / link).rename(tmp_path / "aside")
    (tmp_path / "run" / link).symlink_to(tmp_path / "outside" / link)
    assert (inside / "x").read_bytes() == b"outside", "the link leads there"
    with pytest.raises(OSError, match="a symbolic link"):
        open_inside(tmp_path / "run", "A/B/x")


@pytest.mark.parametrize("make", [pipe, listening, Path.mkdir])
def test_nothing_but_a_regular_file_is_taken_from_a_folder(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "x")
    with pytest.raises(OSError, match=r"it is .*, not a file"):
        open_inside(tmp_path, "x")


def test_a_file_that_becomes_a_pipe_after_it_was_looked_at_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"")
    looked_at = (tmp_path / "x").stat()
    (tmp_path / "x").unlink()
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(os, "stat", lambda *arguments, **options: looked_at)
    with pytest.raises(OSError, match="a named pipe"):
        read_file(tmp_path / "x", at_most=LARGEST_RECORD_BYTES)
