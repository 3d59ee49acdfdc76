"""Contract of the command line: exit codes, the last line, and one message without traceback for wrong input."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import LORAFLEET, Ended, FinishedRun, run, write_config, write_task

from flows.commands.bulk_job import _print_summary
from flows.commands.run_flow import is_worth_logging
from pipeline.bulk.records import BulkSummary
from pipeline.config import load_config, preset_names

Folders = Callable[[str], Path]
SLOW_IMPORTS = {"prefect", "ray", "torch", "transformers", "peft"}
OBSERVED = """
import json, sys
opened, connected = [], []
def watch(event, arguments):
    if event == "open": opened.append(str(arguments[0]))
    if event == "socket.connect": connected.append(str(arguments[1]))
sys.addaudithook(watch)
from flows.cli import main
try: main(sys.argv[1:])
except SystemExit as end: code = end.code
else: code = 0
facts = {"code": code, "modules": list(sys.modules), "opened": opened, "connected": connected}
print(json.dumps(facts), file=sys.stderr)
"""


def observe(*arguments: str | Path, cwd: Path) -> tuple[str, dict[str, Any]]:
    """Standard output of a command, and what its process imported, opened and connected to."""
    done = subprocess.run(
        [sys.executable, "-c", OBSERVED, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=True
    )
    return done.stdout, json.loads(done.stderr)


def refused(ended: Ended, cwd: Path, *words: str) -> None:
    """Exit code 2, one message that holds the words, no traceback, nothing on standard output, and no run folder."""
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err + ended.out
    assert ended.out == ""
    for word in words:
        assert ended.err.count(word) == 1, f"{word!r} is there {ended.err.count(word)} times:\n{ended.err}"
    assert [path for path in cwd.glob("runs/*") if not path.name.startswith(".")] == []


@pytest.fixture
def config(encoder_folder: Folders, tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.toml", encoder_folder("bert"), [write_task(tmp_path / "data", "Topics")])


# --- help and plan ---


def test_help_is_there_in_half_a_second() -> None:
    """CPU seconds of the best of three, so that a busy machine does not count."""
    seconds = []
    for _ in range(3):
        process = subprocess.Popen([*LORAFLEET, "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("command", ["train", "show", "publish"])
def test_every_command_has_help_with_an_example(command: str, tmp_path: Path) -> None:
    ended = run(command, "--help", cwd=tmp_path)
    assert ended.code == 0
    assert f"Example: lorafleet {command}" in ended.out


@pytest.mark.parametrize("preset", preset_names())
def test_a_dry_run_prints_the_whole_plan_and_reads_no_data_no_encoder_and_no_network(
    preset: str, tmp_path: Path
) -> None:
    out, seen = observe("train", "--config", preset, "--dry-run", "--set", "train.seed=7", "--json", cwd=tmp_path)
    plan, expected = json.loads(out), load_config(preset, overrides=("train.seed=7",))
    assert seen["code"] == 0
    assert plan["config"] == expected.model_dump(mode="json")
    assert plan["config"]["train"]["seed"] == 7
    assert [task["name"] for task in plan["mteb_tasks"]] == [task.name for task in expected.mteb_tasks]
    assert SLOW_IMPORTS & set(seen["modules"]) == set()
    assert [
        path for path in seen["opened"] if path.endswith((".parquet", ".safetensors", "tokenizer.json", ".arrow"))
    ] == []
    assert seen["connected"] == []
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_files_that_do_not_exist_is_a_plan_all_the_same(tmp_path: Path) -> None:
    path = write_config(
        tmp_path / "config.toml", tmp_path / "nowhere", [{"name": "Own", "train": "a.parquet", "test": "b.parquet"}]
    )
    ended = run("train", "--config", path, "--dry-run", cwd=tmp_path)
    assert ended.code == 0
    assert (
        f"# Own: your files: train on {tmp_path}/a.parquet, test on {tmp_path}/b.parquet; at most 3 epochs" in ended.out
    )
    assert load_config(str(path)).train.learning_rate == 0.01
    assert "learning_rate = 0.01" in ended.out


# --- what the caller got wrong ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "train.learning_rat=0.1"], ["unknown key 'train.learning_rat'"]),
        (["--set", "train.batch_size=0"], ["train.batch_size", "greater than or equal to 1"]),
        (["--set", "encoder.trust_remote_code=true"], ["trust_remote_code = true needs an explicit revision"]),
        (["--config", "nosuch"], ["'nosuch' is neither a preset"]),
        (["--runs", "config.toml"], ["run store config.toml: cannot be written"]),
        (["--no-such-option"], ["No such option"]),
    ],
)
def test_a_wrong_call_is_one_message_at_once(
    arguments: list[str], words: list[str], config: Path, tmp_path: Path
) -> None:
    refused(run("train", "--config", config, *arguments, cwd=tmp_path), tmp_path, *words)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_task_is_one_message_with_what_may_be_meant(encoder_folder: Folders, tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.toml", encoder_folder("bert"), [{"name": "Banking77Clasification"}])
    refused(
        run("train", "--config", path, cwd=tmp_path),
        tmp_path,
        "mteb knows no task 'Banking77Clasification'",
        "Banking77Classification,",
    )


def test_every_fault_of_the_data_is_in_one_message(encoder_folder: Folders, prefect_api: str, tmp_path: Path) -> None:
    good = write_task(tmp_path / "data", "Good")

    def own(name: str, train: dict[str, list[Any]] | None, test: dict[str, list[Any]] | None) -> dict[str, Any]:
        entry = {"name": name, "train": good["train"], "test": good["test"]}
        for split, columns in (("train", train), ("test", test)):
            if columns is not None:
                entry[split] = str(tmp_path / "data" / f"{name}-{split}.parquet")
                pq.write_table(pa.table(columns), entry[split])
        return entry

    tasks = [
        good,
        own("NoColumn", {"sentence": ["a", "b"], "label": ["x", "y"]}, None),
        own("NoFile", None, None) | {"test": str(tmp_path / "data" / "missing.parquet")},
        own("Empty", None, {"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}),
        own("NotText", {"text": [1, 2], "label": ["x", "y"]}, None),
        own("NewLabel", {"text": ["a", "b"], "label": ["x", "y"]}, {"text": ["c"], "label": ["z"]}),
        own("OneClass", {"text": ["a", "b"], "label": ["x", "x"]}, {"text": ["c"], "label": ["x"]}),
    ]
    path = write_config(tmp_path / "config.toml", encoder_folder("bert"), tasks)
    ended = run("train", "--config", path, cwd=tmp_path, PREFECT_API_URL=prefect_api)
    refused(
        ended,
        tmp_path,
        "NoColumn-train.parquet has no column 'text', but 'sentence', 'label'",
        "missing.parquet does not exist",
        "Empty: test is empty",
        "NotText-train.parquet: column 'text' is int64, not text",
        "NewLabel: test has labels that never occur in train: 'z'",
        "OneClass: train has the single label 'x'",
    )
    assert "Beginning flow run" not in ended.err  # a file that is not there is seen before


@pytest.mark.faults
def test_an_encoder_that_cannot_be_loaded_is_one_message(prefect_api: str, tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.toml", tmp_path / "nowhere", [write_task(tmp_path / "data", "Topics")])
    ended = run("train", "--config", path, cwd=tmp_path, PREFECT_API_URL=prefect_api)
    refused(ended, tmp_path, "no such folder, and not a Hub id")


def test_a_run_store_in_use_is_one_message_that_names_the_other_run(
    config: Path, prefect_api: str, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    with (tmp_path / "runs" / ".lock").open("w", encoding="utf-8") as lock:
        lock.write("run 20260102-1, process 12")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = run("train", "--config", config, cwd=tmp_path, PREFECT_API_URL=prefect_api)
    refused(ended, tmp_path, "in use by run 20260102-1, process 12")


@pytest.mark.faults
def test_workers_that_do_not_fit_are_one_message(config: Path, prefect_api: str, tmp_path: Path) -> None:
    ended = run(
        "train", "--config", config, "--set", "compute.gpus_per_worker=64", cwd=tmp_path, PREFECT_API_URL=prefect_api
    )
    refused(ended, tmp_path, "a worker needs 1 CPUs and 64 GPUs")


# --- what a finished run prints ---


def test_train_prints_the_score_table_and_the_run_folder_last(finished_run: FinishedRun) -> None:
    lines = finished_run.ended.out.splitlines()
    assert finished_run.ended.code == 0
    assert [line.split()[0] for line in lines[:4]] == ["MTEB", "Topics", "Pairs", "Average"]
    assert lines[-1] == f"run: runs/{finished_run.root.name}"
    assert "Traceback" not in finished_run.ended.err


@pytest.mark.parametrize(
    ("logger", "message", "is_shown"),
    [
        ("prefect.task_runs", "Finished in state Completed()", False),
        (
            "prefect.task_runs",
            "Finished in state NotReady(\"Upstream task run 'x' did not reach a 'COMPLETED' state.\")",
            False,
        ),
        (
            "prefect.task_runs",
            "Finished in state Failed('Task run encountered an exception StoppedError: stopped')",
            False,
        ),
        ("prefect.task_runs", "Finished in state Failed('Task run encountered an exception DataError: no text')", True),
        ("prefect.flow_runs", "Finished in state Failed('1 of 2 failed')", False),
        ("prefect.task_runs", "Topics: epoch 1: loss 0.5", True),
    ],
)
def test_of_prefects_lines_only_those_are_shown_that_say_something(logger: str, message: str, is_shown: bool) -> None:
    assert is_worth_logging(logging.LogRecord(logger, logging.INFO, "", 0, message, None, None)) == is_shown


@pytest.mark.parametrize(
    ("failures", "rows_per_second", "told"),
    [
        (0, None, "nothing was left to do; 0 cut"),
        (3, None, "nothing was labelled; 0 cut"),
        (3, 20.0, "20 rows/s; 0 cut"),
    ],
)
def test_a_job_that_failed_is_not_said_to_have_had_nothing_to_do(
    failures: int, rows_per_second: float | None, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    counts: dict[str, Any] = dict.fromkeys(
        ("rows_in", "rows_out", "truncated", "duplicates", "units", "units_done_before"), 0
    )
    counts |= {name: {} for name in ("null_labels", "reasons", "labels")} | {
        "job": "a",
        "lorafleet_version": "0",
        "seconds": 1.0,
    }
    _print_summary(BulkSummary(**counts, failures=failures, rows_per_second=rows_per_second))
    assert told in capsys.readouterr().out


def test_show_prints_what_train_printed(finished_run: FinishedRun, tmp_path: Path) -> None:
    ended = run("show", finished_run.root, cwd=tmp_path)
    assert ended.code == 0
    assert ended.out.splitlines() == finished_run.ended.out.splitlines()[:-1]


def test_show_json_is_the_results_file(finished_run: FinishedRun, tmp_path: Path) -> None:
    ended = run("show", finished_run.root, "--json", cwd=tmp_path)
    assert json.loads(ended.out) == json.loads((finished_run.root / "classification_results.json").read_text())


def test_show_of_a_store_is_its_history(finished_run: FinishedRun, tmp_path: Path) -> None:
    ended = run("show", finished_run.runs, cwd=tmp_path)
    lines = [line.split() for line in ended.out.splitlines()]
    assert ended.code == 0
    assert [name for name, run_id, *_ in lines[1:] if run_id == finished_run.root.name] == ["Pairs", "Topics"]


@pytest.mark.parametrize("place", ["runs/nosuch", "", "config.toml"])
def test_show_of_a_mistyped_path_is_one_message(place: str, config: Path, tmp_path: Path) -> None:
    ended = run("show", tmp_path / place, cwd=tmp_path)
    refused(ended, tmp_path, str(tmp_path / place))


@pytest.mark.faults
def test_publish_writes_the_runs_public_files(finished_run: FinishedRun, tmp_path: Path) -> None:
    own = shutil.copytree(finished_run.root, tmp_path / "run")
    ended = run("publish", own, "--to", "out", cwd=tmp_path)
    assert ended.code == 0, ended.err
    published = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    lines = ended.out.splitlines()
    assert lines[:2] == [f"promote {task}: nothing is published under this name yet" for task in ("Topics", "Pairs")]
    assert all(
        line.startswith(f"verified {task}: logits within ")
        for line, task in zip(lines[2:4], ("Topics", "Pairs"), strict=True)
    )
    assert (tmp_path / "out").stat().st_mode == finished_run.root.stat().st_mode, "others may read it"
    assert lines[4:] == [f"published 2 of 2 MTEB tasks, {len(published)} files: out"]
    assert {
        "README.md",
        "report.html",
        "publication.json",
        "Topics/lora_adapter.pt",
        "Pairs/head.safetensors",
    } <= published
    assert not any(name.endswith(("manifest.json", "config.toml")) for name in published)
    assert not any(str(finished_run.cwd).encode() in (tmp_path / "out" / name).read_bytes() for name in published)
    gate = pd.read_parquet(own / "metrics" / "gate.parquet")
    assert list(gate.decision) == ["promote", "promote"]
    encoder = load_config(str(finished_run.config)).encoder.name
    refused(run("publish", "out", "--to", "elsewhere", cwd=tmp_path), tmp_path, "out is a publication; expected")
    verified = run("verify", "out", "--encoder", encoder, "--offline", cwd=tmp_path)
    assert (verified.code, verified.out.splitlines()) == (0, lines[2:4])


def test_publish_of_what_is_no_run_is_one_message(tmp_path: Path) -> None:
    refused(run("publish", "nosuch", "--to", "out", cwd=tmp_path), tmp_path, "there is no folder nosuch")
