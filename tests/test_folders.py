"""Kinds of folders, and the message of each command that is given the wrong kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import finished_run, task_result

from flows.cli import main
from pipeline.errors import InputError
from pipeline.history.retention import prune
from pipeline.history.verdicts import Policy
from pipeline.inference.reference import find_adapters
from pipeline.publishing.publication import read_candidate
from pipeline.publishing.verify import verify
from pipeline.store.folders import adapters_in, explain, kind_of

NAME = "20260102-030405-abcd"


def store(root: Path) -> Path:
    finished_run(root / NAME, [task_result("A")])
    return root


def begun_store(root: Path) -> Path:
    return unfinished(root / NAME).parent


def unfinished(root: Path) -> Path:
    finished_run(root, [task_result("A")]).manifest.unlink()
    return root


def publication(root: Path) -> Path:
    run = finished_run(root, [task_result("A")])
    run.manifest.rename(run.publication)
    return root


def adapter(root: Path) -> Path:
    (root / "deep").mkdir(parents=True)
    (root / "adapter_model.safetensors").write_bytes(b"")
    return root


def file(root: Path) -> Path:
    root.write_bytes(b"")
    return root


def other(root: Path) -> Path:
    (root / "photos").mkdir(parents=True)
    return root


def too_long(root: Path) -> Path:
    return root.parent / ("x" * 300)


def link_to_nowhere(root: Path) -> Path:
    root.symlink_to(root / "gone")
    return root


KINDS: list[tuple[Callable[[Path], Path], str, str]] = [
    (store, "run store", f"is a run store; name one of its runs, such as .*{NAME}"),
    (begun_store, "run store", "is a run store, and none of its runs is finished"),
    (lambda root: finished_run(root, [task_result("A")]).root, "run", "is a run folder, in the run store"),
    (unfinished, "unfinished run", r"is not finished: it has no manifest\.json"),
    (publication, "publication", "is a publication"),
    (adapter, "adapter", "is the folder of a single adapter"),
    (file, "file", "is a file"),
    (other, "other", "is neither a run folder, nor a publication, nor an adapter's folder"),
    (lambda root: root, "nothing", "there is no folder"),
    (too_long, "nothing", "there is no folder"),
    (link_to_nowhere, "file", "is a file"),
]


@pytest.mark.parametrize(("make", "kind", "says"), KINDS)
def test_a_folder_is_known_by_the_names_in_it(
    make: Callable[[Path], Path], kind: str, says: str, tmp_path: Path
) -> None:
    place = make(tmp_path / "place")
    assert kind_of(place) == kind
    assert re.search(says, explain(place))


COMMANDS: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "publish": (read_candidate, {"run"}),
    "prune": (lambda place: prune(place, Policy(), dry_run=True), {"run store"}),
    "verify": (lambda place: verify(str(place), offline=True), {"run", "publication", "adapter"}),
    "classify": (
        lambda place: find_adapters([str(place)], offline=True),
        {"run", "unfinished run", "publication", "adapter"},
    ),
}


@pytest.mark.parametrize(("make", "kind", "says"), KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_the_same_of_a_folder_that_it_cannot_take(
    command: str, make: Callable[[Path], Path], kind: str, says: str, tmp_path: Path
) -> None:
    call, takes = COMMANDS[command]
    place = make(tmp_path / "place")
    if kind in takes:
        return
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=says) as raised:
        call(place)
    assert str(place) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_copies_that_were_cut_short_are_no_adapters(tmp_path: Path) -> None:
    adapter(tmp_path / "A")
    adapter(tmp_path / ".A.copying")
    assert adapters_in(tmp_path) == ["A"]


@pytest.mark.parametrize("days", ["nan", "inf", "-inf", "-1"])
def test_what_is_no_number_of_days_deletes_nothing(
    days: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = store(tmp_path / "runs")
    (root / ".lock").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(root), "--keep", "0", "--older-than", days])
    assert ended.value.code == 2
    assert capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    root = store(tmp_path / "runs")
    (tmp_path / "precious").write_text("mine", encoding="utf-8")
    (root / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match="cannot be written"):
        prune(root, Policy(), dry_run=False)
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "mine"


def test_a_manifest_whose_time_has_no_zone_is_kept_and_called_damaged(tmp_path: Path) -> None:
    root = store(tmp_path / "runs")
    manifest = root / NAME / "manifest.json"
    manifest.write_text(
        re.sub(r'("created_at":\s*"[^"]*?)Z"', r'\1"', manifest.read_text(encoding="utf-8")), encoding="utf-8"
    )
    (verdict,) = prune(root, Policy(keep=0, older_than_days=0), dry_run=False).verdicts
    assert (verdict.goes, "timezone" in verdict.reason) == (False, True)
