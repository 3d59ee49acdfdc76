"""Pruning of real run folders: what is deleted, what is kept, and recovery from a kill at each step."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import CPU_FLOAT32, finished_run, task_result
from commands import run

from pipeline.errors import InputError, LockedError
from pipeline.history.retention import PruneResult, _delete_run, prune
from pipeline.history.tables import write_gate
from pipeline.history.verdicts import Policy, Verdict, checkpoints, judge
from pipeline.records import Failure, GateDecision, TaskResult
from pipeline.run.collect import reuse
from pipeline.store.files import read_record
from pipeline.store.finished import find_finished, finished_runs
from pipeline.store.lock import hold_run, hold_store
from pipeline.store.manifest import RunManifest, read_manifest, write_manifest
from pipeline.store.run_folder import RunFolder

NOW = datetime.now(UTC)
KEY = "0123456789abcdef" * 2
STEPS = ("os.rename", "os.remove", "os.rmdir")
"""What a process that prunes does to the disk, as Python's audit events call it; making a file is "open"."""

_WARM = multiprocessing.get_context("forkserver")  # its children start with everything imported
_WARM.set_forkserver_preload(["psutil", "pytest", "pipeline.run.collect", "pipeline.history.retention"])

Files = dict[str, bytes | str]


def run_of(runs: Path, days: float, *tasks: str, failed: Sequence[str] = ()) -> RunFolder:
    """A run that was finished so many days ago, on Topics if no MTEB task is named."""
    finished = NOW - timedelta(days=days)
    run_id = f"{finished:%Y%m%d-%H%M%S}-abcd"
    failures = [Failure(mteb_task=name, stage="train", reason="no memory") for name in failed]
    names = tasks or (() if failed else ("Topics",))
    folder = finished_run(runs / run_id, [task_result(name) for name in names], failures=failures, run_id=run_id)
    write_manifest(RunManifest.model_validate(read_manifest(folder).model_dump() | {"created_at": finished}), folder)
    return folder


def unfinished_run(runs: Path, days: float) -> Path:
    folder = run_of(runs, days)
    folder.manifest.unlink()
    return written(folder.root, days)


def checkpoint_of(runs: Path, days: float, key: str = KEY) -> Path:
    folder = runs / ".work" / key
    folder.mkdir(parents=True)
    for name in ("checkpoint.safetensors", "frozen.safetensors"):
        (folder / name).write_bytes(b"weights")
    (folder / "runtime.json").write_text(CPU_FLOAT32.model_dump_json(), encoding="utf-8")
    return written(folder, days)


def written(root: Path, days: float) -> Path:
    """Let all of a folder be written so many days ago."""
    when = (NOW - timedelta(days=days)).timestamp()
    for path in [root, *root.rglob("*")]:
        os.utime(path, (when, when), follow_symlinks=False)
    return root


def gate_of(folder: RunFolder, task: str, decision: str, published: str | None = None) -> None:
    """Decisions of the gate when the run was published."""
    sha256 = read_record(folder.task(task).result, TaskResult).adapter.sha256
    row: dict[str, Any] = dict.fromkeys(GateDecision.model_fields)
    row |= {
        "run_id": folder.root.name,
        "mteb_task": task,
        "to": "hf:me/fleet",
        "decision": decision,
        "reason": "so it is",
    }
    row |= {
        "candidate_sha256": sha256,
        "published_sha256": sha256 if published == "itself" else published,
        "created_at": NOW,
    }
    write_gate([GateDecision.model_validate(row)], folder.gate)


def files(root: Path) -> Files:
    """All that is there but the lock, whose text is of whoever held it last."""
    found: Files = {}
    for path in sorted(root.rglob("*")):
        if path.name != ".lock":
            name = path.relative_to(root).as_posix()
            found[name] = (
                str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
            )
    return found


def of(verdicts: Sequence[Verdict], folder: RunFolder | Path) -> Verdict:
    path = folder.root if isinstance(folder, RunFolder) else folder
    (found,) = (verdict for verdict in verdicts if verdict.path == path)
    return found


def gone(verdicts: Sequence[Verdict]) -> set[str]:
    return {verdict.path.name for verdict in verdicts if verdict.goes}


# --- finished runs ---


def test_runs_go_that_are_both_old_and_not_among_the_newest(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, days) for days in (90, 80, 70, 60, 50)]
    pruned = prune(tmp_path, Policy(keep=2, older_than_days=65), dry_run=False)
    assert [path.name for path in sorted(tmp_path.glob("2*"))] == [folder.root.name for folder in runs[3:]]
    assert [verdict.goes for verdict in pruned.verdicts] == [True, True, True, False, False]
    assert of(pruned.verdicts, runs[0]).reason == "finished 90 days ago, not among the newest 2 runs of Topics"
    assert of(pruned.verdicts, runs[3]).reason == "among the newest 2 runs of Topics"


def test_a_run_that_is_not_old_stays_however_many_are_newer(tmp_path: Path) -> None:
    run_of(tmp_path, 40)
    young, newest = run_of(tmp_path, 20), run_of(tmp_path, 10)
    verdicts = judge(tmp_path, Policy(keep=1), now=NOW)
    assert [verdict.goes for verdict in verdicts] == [True, False, False]
    assert of(verdicts, young).reason == "finished 20 days ago, not more than 30 days"
    assert of(verdicts, newest).reason == "the last good run of Topics"


def test_the_newest_are_counted_for_each_mteb_task_by_itself(tmp_path: Path) -> None:
    old = run_of(tmp_path, 99, "Topics")
    both = run_of(tmp_path, 98, "Topics", "Pairs")
    for days in (97, 96, 95):
        run_of(tmp_path, days, "Topics")
    verdicts = judge(tmp_path, Policy(keep=3), now=NOW)
    assert gone(verdicts) == {old.root.name}
    assert of(verdicts, both).reason == "the last good run of Pairs"
    run_of(tmp_path, 94, "Pairs")
    assert of(judge(tmp_path, Policy(keep=3), now=NOW), both).reason == "among the newest 3 runs of Pairs"


def test_a_run_from_a_clock_that_was_ahead_is_not_the_last_good_one(tmp_path: Path) -> None:
    good = run_of(tmp_path, 400)
    ahead = run_of(tmp_path, -27_000)
    verdicts = judge(tmp_path, Policy(keep=1), now=NOW)
    assert of(verdicts, good).reason == "the last good run of Topics"
    assert of(verdicts, ahead).reason == "finished at a time in the future, so its age is unknown"


def test_the_last_good_run_of_an_mteb_task_stays_though_a_newer_one_failed_or_lost_it(tmp_path: Path) -> None:
    good = run_of(tmp_path, 400, "Topics", "Pairs")
    run_of(tmp_path, 300, "Pairs", failed=["Topics"])
    emptied = run_of(tmp_path, 200, "Topics", "Pairs")
    shutil.rmtree(emptied.task("Topics").root)
    nothing = run_of(tmp_path, 100, failed=["Topics", "Pairs"])
    verdicts = judge(tmp_path, Policy(keep=0, older_than_days=0), now=NOW)
    assert of(verdicts, good).reason == "the last good run of Topics"
    assert of(verdicts, emptied).reason == "the last good run of Pairs"
    assert of(verdicts, nothing).reason == "finished 100 days ago, none of its MTEB tasks finished"
    assert gone(verdicts) == {folder.name for folder in tmp_path.iterdir()} - {good.root.name, emptied.root.name}


@pytest.mark.parametrize(
    ("decision", "published", "stays"),
    [
        ("promote", None, True),
        ("promote", "0" * 64, True),
        ("keep", "0" * 64, False),
        ("block", "0" * 64, False),
        ("keep", "itself", True),
    ],
)
def test_a_run_stays_that_was_published(decision: str, published: str | None, stays: bool, tmp_path: Path) -> None:
    """Also if it was published twice: the gate then keeps its own adapter, which hides the promotion."""
    folder = run_of(tmp_path, 400)
    run_of(tmp_path, 300)
    gate_of(folder, "Topics", decision, published)
    found = of(judge(tmp_path, Policy(keep=0), now=NOW), folder)
    assert found.goes != stays
    assert not stays or found.reason == "published to hf:me/fleet: Topics"


def test_a_run_stays_while_it_is_published(tmp_path: Path) -> None:
    folder = run_of(tmp_path, 400)
    run_of(tmp_path, 300)
    with hold_run(folder.root, alone=False):
        assert of(prune(tmp_path, Policy(keep=0), dry_run=False).verdicts, folder).reason == "is being published"
    assert of(prune(tmp_path, Policy(keep=0), dry_run=False).verdicts, folder).goes
    assert not folder.root.exists()


def test_publishing_that_begins_after_the_verdict_keeps_the_run_too(tmp_path: Path) -> None:
    folder = run_of(tmp_path, 400)
    before = files(folder.root)
    with hold_run(folder.root, alone=False), pytest.raises(LockedError, match="is being published"):
        _delete_run(folder.root)
    assert files(folder.root) == before


def test_a_run_stays_that_was_published_after_it_was_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = run_of(tmp_path, 400), run_of(tmp_path, 399)
    run_of(tmp_path, 300)
    before = files(folder.root)

    def judge_and_publish(*arguments: Any, **options: Any) -> list[Verdict]:
        verdicts = judge(*arguments, **options)
        gate_of(folder, "Topics", "promote")
        return verdicts

    monkeypatch.setattr("pipeline.history.retention.judge", judge_and_publish)
    done = prune(tmp_path, Policy(keep=0), dry_run=False)
    assert done.failures == (f"run {folder.root}: published to hf:me/fleet: Topics, just now",)
    assert before.items() <= files(folder.root).items()
    assert not other.root.exists(), "the others go"


def test_a_run_that_only_took_over_the_published_adapter_may_go(tmp_path: Path) -> None:
    folder = run_of(tmp_path, 400)
    run_of(tmp_path, 300)
    gate_of(folder, "Topics", "keep", "itself")
    manifest = read_manifest(folder)
    write_manifest(
        RunManifest.model_validate(manifest.model_dump() | {"reused": {"Topics": "20200101-000000-abcd"}}), folder
    )
    assert of(judge(tmp_path, Policy(keep=0), now=NOW), folder).goes


def test_what_cannot_be_read_stays(tmp_path: Path) -> None:
    gate, manifest, renamed = (run_of(tmp_path, days) for days in (400, 390, 380))
    run_of(tmp_path, 300)
    gate.gate.write_bytes(b"half a table")
    manifest.manifest.write_text('{"run_id"', encoding="utf-8")
    copy = tmp_path / "20200101-000000-abcd"
    renamed.root.rename(copy)
    verdicts = judge(tmp_path, Policy(keep=0, older_than_days=0), now=NOW)
    assert gone(verdicts) == set()
    assert "cannot read whether it was published" in of(verdicts, gate).reason
    assert "manifest.json is damaged" in of(verdicts, manifest).reason
    assert of(verdicts, copy).reason == f"its manifest belongs to another run, {renamed.root.name}"


def test_the_adapter_of_a_run_that_goes_lives_on_in_the_run_that_took_it_over(tmp_path: Path) -> None:
    old, new = run_of(tmp_path, 400), run_of(tmp_path, 300)
    result = read_record(old.task("Topics").result, TaskResult)
    shutil.rmtree(new.task("Topics").root)
    reuse(old.task("Topics"), result, run_id=new.root.name, folder=new)
    prune(tmp_path, Policy(keep=0), dry_run=False)
    ((found, taken_over),) = find_finished(tmp_path, {result.key}).values()
    assert not old.root.exists()
    assert found.root == new.task("Topics").root
    assert (taken_over.adapter.sha256, taken_over.reused_from) == (result.adapter.sha256, result.run_id)


# --- what was never finished ---


@pytest.mark.parametrize(("days", "older_than", "goes"), [(6, 0, False), (8, 0, True), (8, 30, False), (31, 30, True)])
def test_what_was_begun_stays_for_seven_days_whatever_the_policy(
    days: float, older_than: float, goes: bool, tmp_path: Path
) -> None:
    run_folder, checkpoint = unfinished_run(tmp_path, days), checkpoint_of(tmp_path, days)
    verdicts = prune(tmp_path, Policy(older_than_days=older_than), dry_run=False).verdicts
    assert (of(verdicts, run_folder).goes, of(verdicts, checkpoint).goes) == (goes, goes)
    assert (run_folder.exists(), checkpoint.exists()) == (not goes, not goes)


def test_its_age_is_that_of_the_newest_file_in_it(tmp_path: Path) -> None:
    run_folder, checkpoint = unfinished_run(tmp_path, 90), checkpoint_of(tmp_path, 90)
    (run_folder / "Topics" / "labels.json").write_text("[]", encoding="utf-8")
    (checkpoint / "checkpoint.safetensors").write_bytes(b"an epoch more")
    assert gone(judge(tmp_path, Policy(), now=NOW)) == set()


def test_a_store_that_a_run_holds_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    run_of(tmp_path, 400)
    run_of(tmp_path, 300)
    checkpoint_of(tmp_path, 400)
    before = files(tmp_path)
    for dry_run in (True, False):
        with hold_store(tmp_path, "20260102-1"), pytest.raises(LockedError, match="in use by run 20260102-1"):
            prune(tmp_path, Policy(keep=0), dry_run=dry_run)
    assert files(tmp_path) == before


def test_a_file_system_without_locks_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(InputError, match="cannot be locked: No locks available"), hold_store(tmp_path, "20260102-1"):
        pass


# --- what is none of its business ---


def test_nothing_else_in_a_store_is_touched(tmp_path: Path) -> None:
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    outside = run_of(elsewhere, 500)
    doomed = run_of(runs, 400)
    run_of(runs, 300)
    for name in (
        "metrics/scores-x.parquet",
        "epochs/epochs-x.parquet",
        "mteb_tasks/x.parquet",
        "history.html",
        ".prefect/prefect.db",
    ):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_bytes(b"history")
    for name in (
        "20200101-000000-abcd/notes.txt",
        "20200102-000000-abcd/config.toml",
        "my-run/manifest.json",
        ".work/notes/x",
        ".other/x",
    ):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_text("x = 1", encoding="utf-8")
    (runs / outside.root.name).symlink_to(outside.root)
    (runs / ".work" / KEY).symlink_to(outside.root)
    (doomed.root / "link").symlink_to(outside.root)
    (doomed.task("Topics").root / "link").symlink_to(outside.manifest)
    written(tmp_path, 400)
    before = {
        name: content for name, content in files(tmp_path).items() if not name.startswith(f"runs/{doomed.root.name}")
    }
    verdicts = prune(runs, Policy(keep=0, older_than_days=0), dry_run=False).verdicts
    assert gone(verdicts) == {doomed.root.name}
    assert files(tmp_path) == before
    assert of(verdicts, runs / outside.root.name).reason == "a symbolic link, which is never followed"
    assert "so it may not be a run" in of(verdicts, runs / "20200102-000000-abcd").reason


def test_a_folder_for_checkpoints_that_is_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "elsewhere", 400)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".work").symlink_to(tmp_path / "elsewhere" / ".work")
    assert checkpoints(tmp_path / "runs") == []


# --- deletion ---


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with one of each kind that is deleted, and of each that stays."""
    runs = tmp_path / "runs"
    for days in (400, 300, 2):
        run_of(runs, days)
    unfinished_run(runs, 90)
    checkpoint_of(runs, 90)
    checkpoint_of(runs, 2, key=KEY[::-1])
    return runs


def test_a_dry_run_says_what_the_real_one_does_and_changes_nothing(store: Path) -> None:
    before = files(store)
    said = prune(store, Policy(keep=1), dry_run=True)
    assert files(store) == before
    sizes = sum(len(content) for content in before.values() if isinstance(content, bytes))
    done = prune(store, Policy(keep=1), dry_run=False)
    assert said == done
    after = files(store)
    assert {name.removeprefix(".work/").split("/")[0] for name in set(before) - set(after)} == gone(said.verdicts)
    assert len(gone(said.verdicts)) == 4
    # A folder has a size too, which the file system chooses.
    assert done.freed_bytes >= sizes - sum(len(content) for content in after.values() if isinstance(content, bytes)) > 0


def _prune_and_die(runs: Path, step: int) -> None:
    """Prune in a child process that is killed right before the given change of the disk."""
    left = step

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        makes = event == "open" and "deleted" in str(arguments[0])
        if event in STEPS or makes:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    prune(runs, Policy(keep=1), dry_run=False)


def killed_at(store: Path, copies: Path) -> Iterator[tuple[int, Path]]:
    """A copy of the store for each step of its pruning, left as it is when that is killed before the step."""
    for step in range(1, 1000):
        copy = copies / str(step)
        shutil.copytree(store, copy, symlinks=True)
        child = _WARM.Process(target=_prune_and_die, args=(copy, step))
        child.start()
        child.join(60)
        if child.exitcode == 0:
            return
        assert child.exitcode == -signal.SIGKILL
        yield step, copy


@pytest.mark.faults
def test_killed_at_any_step_no_run_is_half_a_finished_one_and_the_next_pruning_ends_it(
    store: Path, tmp_path: Path
) -> None:
    whole = {path.name: files(path) for path in store.glob("2*")}
    work = {path.name: files(path) for path in store.glob(".work/*")}
    ended = tmp_path / "ended"
    shutil.copytree(store, ended)
    prune(ended, Policy(keep=1), dry_run=False)
    (tmp_path / "copies").mkdir()
    steps = 0
    for step, copy in killed_at(store, tmp_path / "copies"):
        for folder, _ in finished_runs(copy):
            assert files(folder.root) == whole[folder.root.name], f"step {step}"
        for path in copy.glob(f".work/{'[0-9a-f]' * 32}"):
            assert files(path) == work[path.name], f"step {step}"
        prune(copy, Policy(keep=1), dry_run=False)
        assert files(copy) == files(ended), f"step {step}"
        steps = step
    assert steps > 50, "hardly anything was deleted"


def test_a_killed_command_is_gone_on_with_by_the_next(store: Path, tmp_path: Path) -> None:
    (tmp_path / "planted").mkdir()
    plant = (
        "import os, sys\nleft = [9]\ndef watch(event, arguments):\n    if event == 'os.remove':\n        left[0] -= 1\n"
    )
    plant += "        if left[0] == 0: os.kill(os.getpid(), 9)\nsys.addaudithook(watch)\n"
    (tmp_path / "planted" / "sitecustomize.py").write_text(plant, encoding="utf-8")
    links = " ".join(f'<a href="{manifest.parent.name}/report.html">' for manifest in store.glob("*/manifest.json"))
    (store / "history.html").write_text(links, encoding="utf-8")
    assert (
        run("prune", "runs", "--keep", "1", cwd=tmp_path, PYTHONPATH=str(tmp_path / "planted")).code == -signal.SIGKILL
    )
    (half,) = store.glob("*/manifest.deleted.json")
    ended = run("prune", "runs", "--keep", "1", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert f"runs/{half.parent.name}" in ended.out
    assert "its deletion was interrupted" in ended.out
    assert not half.parent.exists()
    assert len(list(store.glob("2*"))) == 1
    page = (store / "history.html").read_text(encoding="utf-8")
    assert "</html>" in page
    assert f'href="{half.parent.name}/report.html"' not in page


def _prune_as_nobody(runs: Path, send: Any) -> None:
    """Prune in a child process, as a user without privileges."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    send.send(prune(runs, Policy(keep=1), dry_run=False))


def test_a_folder_that_cannot_be_deleted_is_named_and_the_others_go() -> None:
    with tempfile.TemporaryDirectory() as place:  # others may not look into tmp_path
        runs = Path(place, "runs")
        locked, free = run_of(runs, 400), run_of(runs, 350)
        run_of(runs, 300)
        for path in [Path(place), *Path(place).rglob("*")]:
            path.chmod(0o777)
        locked.root.chmod(0o555)
        receive, send = multiprocessing.Pipe(duplex=False)
        child = _WARM.Process(target=_prune_as_nobody, args=(runs, send))
        child.start()
        send.close()
        pruned: PruneResult = receive.recv()
        child.join()
        locked.root.chmod(0o755)
        (failure,) = pruned.failures
        assert failure.startswith(f"{locked.root}: Permission denied")
        assert pruned.freed_bytes == of(pruned.verdicts, free).num_bytes
        assert (read_manifest(locked).run_id, free.root.exists()) == (locked.root.name, False)


# --- the command ---


def test_the_command_says_of_each_folder_why_it_goes_or_stays(store: Path, tmp_path: Path) -> None:
    oldest = min(store.glob("2*")).name
    dry = run("prune", "runs", "--keep", "1", "--dry-run", cwd=tmp_path)
    real = run("prune", "runs", "--keep", "1", cwd=tmp_path)
    assert (dry.code, real.code, dry.err, real.err) == (0, 0, "", "")
    lines = real.out.splitlines()
    assert dry.out.splitlines()[:-1] == lines[:-1]
    assert lines[0].split()[:3] == ["delete", "run", f"runs/{oldest}"]
    assert lines[0].endswith("finished 400 days ago, not among the newest 1 runs of Topics")
    assert (dry.out.splitlines()[-1].split(",")[0], lines[-1].split(",")[0]) == (
        "would delete 4 of 6",
        "deleted 4 of 6",
    )
    again = run("prune", "runs", "--keep", "1", "--json", cwd=tmp_path)
    said = json.loads(again.out)
    assert [(verdict["what"], verdict["goes"]) for verdict in said["verdicts"]] == [
        ("run", False),
        ("checkpoint", False),
    ]
    assert (said["freed_bytes"], said["failures"], said["dry_run"]) == (0, [], False)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (lambda runs: [runs / "nowhere"], "there is no folder"),
        (lambda runs: [next(runs.glob("2*/manifest.json")).parent], "is a run folder, in the run store"),
        (lambda runs: [runs, "--keep", "-1"], "--keep"),
    ],
)
def test_a_wrong_call_is_one_message(
    arguments: Callable[[Path], list[Any]], word: str, store: Path, tmp_path: Path
) -> None:
    before = files(store)
    ended = run("prune", *arguments(store), cwd=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert word in ended.err
    assert "Traceback" not in ended.err
    assert files(store) == before


def test_a_run_in_progress_is_one_message(store: Path, tmp_path: Path) -> None:
    with hold_store(store, "20260102-1"):
        ended = run("prune", "runs", cwd=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert "runs: in use by run 20260102-1" in ended.err


def test_a_run_folder_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"is a run folder, in the run store {tmp_path}; name the run store"):
        prune(run_of(tmp_path, 1).root, Policy(), dry_run=True)
