"""Whole runs: files of the run folder, reuse by the next run, and the result when one MTEB task fails."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tomli_w
from builders import CPU_FLOAT32, toy_texts
from commands import Command, Ended, FinishedRun, run, write_task
from publishing import change_adapter, copy_run

from pipeline.adapter.files import load_adapter
from pipeline.config import PublishConfig, load_config
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.files import find_encoder
from pipeline.history.schemas import EPOCHS_SCHEMA, GATE_SCHEMA, SCORES_SCHEMA
from pipeline.publishing.publish import publish
from pipeline.records import Calibration, ClassificationResults, ReferenceOutputs, TaskResult
from pipeline.store.files import read_record
from pipeline.store.manifest import RunManifest, read_manifest
from pipeline.store.run_folder import RunFolder, adapter_sha256

COLUMNS = ["majority", "frozen_full_data", "frozen_few_shot", "head", "adapted_few_shot"]


@pytest.fixture(scope="module")
def finished_run(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A copy, as the runs here go on in its store."""
    cwd = tmp_path_factory.mktemp("flow") / "finished"
    shutil.copytree(finished_run.cwd, cwd)
    return replace(finished_run, cwd=cwd)


def manifest_of(run_folder: Path) -> RunManifest:
    return read_manifest(RunFolder(run_folder))


def results_of(run_folder: Path) -> dict[str, TaskResult]:
    return {path.parent.name: read_record(path, TaskResult) for path in run_folder.glob("*/result.json")}


def scores_of(run_folder: Path) -> pd.DataFrame:
    return pd.read_parquet(run_folder / "metrics" / "scores.parquet")


# --- the run folder ---


def test_the_probe_says_what_the_adapter_says_in_float32(finished_run: FinishedRun) -> None:
    folder = RunFolder(finished_run.root).task("Topics")
    probe = read_record(folder.probe, ReferenceOutputs)
    assert len(set(probe.texts)) == len(probe.logits) == 32
    config = manifest_of(finished_run.root).config.encoder
    encoder = Encoder(find_encoder(config, offline=True), config, CPU_FLOAT32)
    adapter = load_adapter(folder, encoder)
    logits = adapter.logits_of_vectors(encoder.embed(encoder.tokenise(probe.texts)))
    assert np.abs(logits - np.array(probe.logits)).max() < 1e-5


def test_mtebs_own_few_shot_results_are_kept(finished_run: FinishedRun) -> None:
    scores = scores_of(finished_run.root).set_index(["mteb_task", "column"]).accuracy
    for task in ("Topics", "Pairs"):
        own = json.loads((finished_run.root / task / "few_shot.json").read_text(encoding="utf-8"))
        assert {column: result["scores"]["test"][0]["accuracy"] for column, result in own.items()} == pytest.approx(
            {column: scores[task, column] for column in ("frozen_few_shot", "adapted_few_shot")}
        )


def test_the_run_folder_holds_every_file_of_the_contract(finished_run: FinishedRun) -> None:
    of_run = {"manifest.json", "config.toml", "classification_results.json", "results.json", "README.md", "report.html"}
    of_run |= {f"metrics/{name}.parquet" for name in ("scores", "values", "epochs", "mteb_tasks")}
    of_task = {"lora_adapter.pt", "classifier_head.pt", "meta.json", "adapter_model.safetensors", "adapter_config.json"}
    of_task |= {"head.safetensors", "labels.json", "calibration.json", "probe.json", "few_shot.json", "result.json"}
    found = {path.relative_to(finished_run.root).as_posix() for path in finished_run.root.rglob("*") if path.is_file()}
    assert found == of_run | {f"{task}/{name}" for task in ("Topics", "Pairs") for name in of_task}
    assert list(finished_run.runs.glob(".work/*")) == []


def test_the_manifest_is_written_last(finished_run: FinishedRun) -> None:
    last = finished_run.root / "manifest.json"
    written = [
        *finished_run.root.rglob("*"),
        finished_run.runs / "metrics" / f"scores-{finished_run.root.name}.parquet",
    ]
    assert (
        max(path.stat().st_mtime_ns for path in written if path.is_file() and path != last) <= last.stat().st_mtime_ns
    )


def test_the_manifest_says_what_was_made_from_what(finished_run: FinishedRun) -> None:
    manifest = manifest_of(finished_run.root)
    assert manifest.run_id == finished_run.root.name
    assert manifest.adapters == {task: adapter_sha256(finished_run.root / task) for task in ("Topics", "Pairs")}
    assert (manifest.failures, manifest.reused) == ((), {})
    assert [task.name for task in manifest.mteb_tasks] == ["Topics", "Pairs"]
    assert all(task.revision.startswith("sha256:") for task in manifest.mteb_tasks)
    assert 0 < manifest.seconds < finished_run.ended.seconds


def test_the_written_config_makes_the_run_again(finished_run: FinishedRun) -> None:
    again = load_config(str(finished_run.root / "config.toml"))
    assert again == load_config(str(finished_run.config)) == manifest_of(finished_run.root).config


def test_scores_have_one_row_per_task_and_column_with_its_origin(finished_run: FinishedRun) -> None:
    scores, results = scores_of(finished_run.root), results_of(finished_run.root)
    assert list(scores) == SCORES_SCHEMA.names
    assert list(zip(scores.mteb_task, scores.column, strict=True)) == [
        (task, column) for task in ("Topics", "Pairs") for column in COLUMNS
    ]
    assert set(scores.run_id) == {finished_run.root.name}
    assert set(scores.num_texts) == {60}
    assert scores.reused_from.isna().all()
    assert (scores.low <= scores.accuracy).all()
    assert (scores.accuracy <= scores.high).all()
    trained = scores[scores.column.isin(["head", "adapted_few_shot"])]
    assert all(row.adapter_sha256 == adapter_sha256(finished_run.root / row.mteb_task) for row in trained.itertuples())
    assert scores.drop(trained.index).adapter_sha256.isna().all()
    assert set(trained.selected_on) == {"validation"}
    assert scores.drop(trained.index).selected_on.isna().all()
    assert all(row.dataset_revision == results[row.mteb_task].mteb_task.revision for row in scores.itertuples())
    assert all(json.loads(versions).keys() >= {"torch", "transformers", "peft", "mteb"} for versions in scores.versions)
    assert (scores.average_precision.notna() == (scores.mteb_task == "Pairs") & (scores.column != "majority")).all()


def test_the_heads_p_values_are_corrected_over_the_runs_tasks(finished_run: FinishedRun) -> None:
    scores = scores_of(finished_run.root)
    heads = scores[scores.column == "head"]
    low, high = sorted(heads.p_value)
    assert sorted(heads.p_value_holm) == pytest.approx([min(1, 2 * low), max(min(1, 2 * low), high)])
    assert scores.drop(heads.index).p_value_holm.isna().all()


def test_epochs_have_one_row_each(finished_run: FinishedRun) -> None:
    epochs, results = pd.read_parquet(finished_run.root / "metrics" / "epochs.parquet"), results_of(finished_run.root)
    assert list(epochs) == EPOCHS_SCHEMA.names
    for task, rows in epochs.groupby("mteb_task"):
        assert list(rows.epoch) == [row.epoch for row in results[str(task)].epochs]
        assert list(rows.epoch[rows.is_best]) == [results[str(task)].best_epoch]
        assert (rows.texts_per_second * rows.seconds).tolist() == pytest.approx(
            [results[str(task)].data.num_train] * len(rows)
        )


def test_the_results_file_has_both_few_shot_accuracies_and_their_difference(finished_run: FinishedRun) -> None:
    summary = read_record(finished_run.root / "classification_results.json", ClassificationResults)
    scores = scores_of(finished_run.root).set_index(["mteb_task", "column"]).accuracy
    for entry in summary.tasks:
        assert entry.baseline_accuracy == scores[entry.task, "frozen_few_shot"]
        assert entry.lora_accuracy == scores[entry.task, "adapted_few_shot"]
        assert entry.delta == pytest.approx(
            scores[entry.task, "adapted_few_shot"] - scores[entry.task, "frozen_few_shot"]
        )
        assert entry.full_data_probe_accuracy == scores[entry.task, "frozen_full_data"]
        assert entry.head_accuracy == scores[entry.task, "head"]
        assert entry.majority_accuracy == scores[entry.task, "majority"]
    assert summary.average.head_accuracy == pytest.approx(scores[:, "head"].mean())


def test_calibration_was_fitted_on_validation(finished_run: FinishedRun) -> None:
    for task in ("Topics", "Pairs"):
        assert read_record(finished_run.root / task / "calibration.json", Calibration).fitted_on == "validation"


def test_no_file_that_is_published_names_a_local_path(finished_run: FinishedRun) -> None:
    local = [str(finished_run.config.parent).encode(), str(load_config(str(finished_run.config)).encoder.name).encode()]
    folder = RunFolder(finished_run.root)
    for path in (*folder.published(), *folder.task("Topics").published()):
        assert not any(name in path.read_bytes() for name in local), path
    assert json.loads(folder.task("Topics").adapter_config.read_text())["base_model_name_or_path"] == "tiny-bert"


# --- the next runs ---


@pytest.fixture(scope="module")
def again(finished_run: FinishedRun, prefect_api: str) -> Ended:
    """The same command in the same store, where no Ray can start: none is needed."""
    nowhere = {"PREFECT_API_URL": prefect_api, "RAY_TMPDIR": "nowhere"}
    return run("train", "--config", finished_run.config, "--runs", "runs", cwd=finished_run.cwd, **nowhere)


def test_a_second_run_with_the_same_inputs_does_nothing_and_names_the_first(
    finished_run: FinishedRun, again: Ended
) -> None:
    assert again.code == 0
    assert again.run == finished_run.ended.run
    assert again.out == finished_run.ended.out
    assert f"nothing to do: data and config are those of run {finished_run.root.name}" in again.err
    assert [path.parent.name for path in finished_run.runs.glob("*/manifest.json")] == [finished_run.root.name]


@dataclass(frozen=True)
class Mixed:
    ended: Ended
    root: Path
    published: Path


@pytest.fixture(scope="module")
def mixed(finished_run: FinishedRun, prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """One MTEB task is as it was, one has new data, and one loses its test file between preflight and its worker."""
    cwd = tmp_path_factory.mktemp("mixed")
    topics, _ = finished_run.tasks
    pairs, lost = (
        write_task(cwd / "data", "Pairs", num_classes=2, seed=7),
        write_task(cwd / "data", "Lost", num_train=60, seed=9),
    )
    values = load_config(str(finished_run.config)).model_dump(mode="json", exclude_none=True)
    values |= {"mteb_tasks": [topics, lost, pairs], "publish": {"to": str(cwd / "out")}}
    config = cwd / "config.toml"
    config.write_text(tomli_w.dumps(values), encoding="utf-8")
    known = set(finished_run.runs.iterdir())
    command = Command("train", "--config", config, "--runs", finished_run.runs, cwd=cwd, PREFECT_API_URL=prefect_api)
    command.wait_until(
        lambda: any((path / "config.toml").exists() for path in set(finished_run.runs.iterdir()) - known)
    )
    Path(lost["test"]).unlink()
    ended = command.wait()
    return Mixed(ended, ended.run, cwd / "out")


def test_the_workers_log_is_in_the_flow_runs(mixed: Mixed, prefect_api: str) -> None:
    question = {"logs": {"task_run_id": {"is_null_": False}}, "limit": 200, "sort": "TIMESTAMP_DESC"}
    request = urllib.request.Request(
        f"{prefect_api}/logs/filter", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        lines = [log["message"] for log in json.load(answer)]
    assert any(line.startswith("Pairs: evaluated the frozen encoder in ") for line in lines), lines


def test_a_failing_task_leaves_the_others_finished_and_is_listed_with_exit_code_1(mixed: Mixed) -> None:
    assert mixed.ended.code == 1
    assert mixed.ended.out.splitlines()[-1] == f"run: {mixed.root}"
    assert mixed.ended.err.count("failed: Lost (load data): Lost: test: ") == 1, mixed.ended.err
    (failure,) = manifest_of(mixed.root).failures
    assert (failure.mteb_task, failure.stage, failure.user_fault) == ("Lost", "load data", True)
    assert "does not exist" in failure.reason
    summary = read_record(mixed.root / "classification_results.json", ClassificationResults)
    assert [entry.task for entry in summary.tasks] == ["Topics", "Pairs"]
    (published,) = summary.failures  # what is published names no local path
    assert (published.mteb_task, published.stage) == ("Lost", "load data")
    assert "Lost: test: …/Lost-test.parquet does not exist" in published.reason


def test_only_what_changed_is_trained_again(mixed: Mixed, finished_run: FinishedRun) -> None:
    manifest, before = manifest_of(mixed.root), manifest_of(finished_run.root)
    assert manifest.reused == {"Topics": finished_run.root.name}
    assert manifest.adapters["Topics"] == before.adapters["Topics"]
    assert manifest.adapters["Pairs"] != before.adapters["Pairs"]
    when = scores_of(mixed.root).groupby("mteb_task").created_at.max()
    assert when["Topics"] == scores_of(finished_run.root).groupby("mteb_task").created_at.max()["Topics"]
    assert when["Pairs"] > datetime.fromisoformat(str(before.created_at))


def test_what_was_taken_over_is_whole_and_keeps_its_rows(mixed: Mixed, finished_run: FinishedRun) -> None:
    for path in (finished_run.root / "Topics").iterdir():
        if path.name != "result.json":
            assert (mixed.root / "Topics" / path.name).read_bytes() == path.read_bytes()
    assert results_of(mixed.root)["Topics"].reused_from == finished_run.root.name
    first, second = (
        scores.query("mteb_task == 'Topics'") for scores in (scores_of(finished_run.root), scores_of(mixed.root))
    )
    assert set(second.reused_from) == {finished_run.root.name}
    differing = ["run_id", "reused_from", "p_value_holm"]
    pd.testing.assert_frame_equal(first.drop(columns=differing), second.drop(columns=differing))


def test_the_history_holds_every_run(mixed: Mixed, finished_run: FinishedRun) -> None:
    history = pd.read_parquet(finished_run.runs / "metrics")
    for root in (finished_run.root, mixed.root):
        rows = history[history.run_id == root.name].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, scores_of(root))


def test_what_finished_is_published_beside_a_failure(mixed: Mixed) -> None:
    assert {path.name for path in mixed.published.iterdir() if path.is_dir()} == {
        "Topics",
        "Pairs",
        "metrics",
        "mteb_results",
    }


def gate_artifact(api: str, run_folder: Path) -> list[dict[str, Any]]:
    """The gate's decisions about a run, as Prefect's UI shows them."""
    (artifact,) = (
        artifact for artifact in _filtered(api, "gate") if f"run {run_folder.name}," in artifact["description"]
    )
    assert artifact["type"] == "table"
    rows: list[dict[str, Any]] = json.loads(artifact["data"])
    return rows


def test_the_gates_decisions_are_an_artifact_and_rows(mixed: Mixed, prefect_api: str) -> None:
    shown = gate_artifact(prefect_api, mixed.root)
    assert [(row["mteb_task"], row["decision"], row["published_sha256"]) for row in shown] == [
        ("Topics", "promote", None),
        ("Pairs", "promote", None),
    ]
    assert {row["mteb_task"]: row["candidate_sha256"] for row in shown} == manifest_of(mixed.root).adapters
    rows = pd.read_parquet(mixed.root / "metrics" / "gate.parquet")
    assert list(rows) == GATE_SCHEMA.names
    assert list(rows.reason) == [row["reason"] for row in shown]


@dataclass(frozen=True)
class Gated:
    ended: Ended
    root: Path
    published: Path
    before: dict[str, bytes]


@pytest.fixture(scope="module")
def gated(
    finished_run: FinishedRun,
    prefect_api: str,
    encoder_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Gated:
    """Published are Topics with a head that is wrong about everything, and Pairs with a label of another name."""
    cwd = tmp_path_factory.mktemp("gated")
    earlier = copy_run(finished_run.root, cwd / "runs" / "earlier")
    change_adapter(earlier, "Topics", encoder_folder("bert"), lambda adapter: adapter.head[1].weight.data.neg_())
    pairs = earlier.task("Pairs")
    for path in (pairs.labels, pairs.meta, pairs.result):
        path.write_text(path.read_text(encoding="utf-8").replace('"sea"', '"ocean"'), encoding="utf-8")
    publish(earlier.root, PublishConfig(to=str(cwd / "out")))
    before = {path.name: path.read_bytes() for path in (cwd / "out" / "Pairs").iterdir()}
    arguments = ("--config", finished_run.config, "--runs", finished_run.runs, "--set", f"publish.to={cwd / 'out'}")
    ended = run("train", *arguments, cwd=cwd, PREFECT_API_URL=prefect_api)
    return Gated(ended, ended.run, cwd / "out", before)


@pytest.mark.faults
def test_a_block_is_exit_code_1_and_the_run_is_finished_all_the_same(gated: Gated, finished_run: FinishedRun) -> None:
    assert gated.ended.code == 1
    assert manifest_of(gated.root).adapters == manifest_of(finished_run.root).adapters
    assert manifest_of(gated.root).failures == ()
    assert "Pairs: block: its labels differ from the published ones: without ocean and with new sea" in gated.ended.err
    assert "failed: gate · Pairs: its labels differ from the published ones" in gated.ended.err
    assert "Traceback" not in gated.ended.err


@pytest.mark.faults
def test_a_block_of_one_adapter_does_not_keep_the_others_back(gated: Gated) -> None:
    assert {path.name: path.read_bytes() for path in (gated.published / "Pairs").iterdir()} == gated.before
    assert adapter_sha256(gated.published / "Topics") == manifest_of(gated.root).adapters["Topics"]


@pytest.mark.faults
def test_the_artifact_has_the_figures_and_both_adapters(gated: Gated, prefect_api: str) -> None:
    topics, pairs = gate_artifact(prefect_api, gated.root)
    rows = pd.read_parquet(gated.root / "metrics" / "gate.parquet").set_index("mteb_task")
    assert (topics["decision"], pairs["decision"], pairs["difference"]) == ("promote", "block", None)
    head = scores_of(gated.root).set_index(["mteb_task", "column"]).accuracy["Topics", "head"]
    assert topics["candidate_accuracy"] == pytest.approx(head, abs=0.034)  # of 60 texts, two may be computed otherwise
    assert 0 < topics["low"] < topics["difference"] < topics["high"] <= 1
    assert topics["difference"] == pytest.approx(topics["candidate_accuracy"] - topics["published_accuracy"])
    assert topics["num_texts"] == 60
    for shown in (topics, pairs):
        assert shown["published_sha256"] == rows.published_sha256[shown["mteb_task"]]
        assert shown["candidate_sha256"] == manifest_of(gated.root).adapters[shown["mteb_task"]]


@pytest.mark.faults
def test_a_publish_that_fails_is_exit_code_1_and_leaves_run_and_target_as_they_are(
    finished_run: FinishedRun, prefect_api: str, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    arguments = ("--config", finished_run.config, "--runs", finished_run.runs, "--set", "publish.to=out")
    ended = run("train", *arguments, cwd=tmp_path, PREFECT_API_URL=prefect_api)
    assert ended.code == 1
    assert "not published: cannot publish to" in ended.err
    assert "Traceback" not in ended.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert manifest_of(ended.run).adapters == manifest_of(finished_run.root).adapters


def test_no_log_holds_a_text(mixed: Mixed, finished_run: FinishedRun) -> None:
    texts = toy_texts(200, seed=0)[0]
    for ended in (finished_run.ended, mixed.ended):
        assert not any(text in ended.err + ended.out for text in texts if len(text.split()) > 3)


# --- the next week: new data, some of it with other labels, from the published adapters on ---


@dataclass(frozen=True)
class NextWeek:
    ended: Ended
    root: Path
    published: dict[str, str]
    config: Path
    cwd: Path


@pytest.fixture(scope="module")
def next_week(finished_run: FinishedRun, prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> NextWeek:
    """Topics has new texts, Pairs a third label, Fresh is new; what is published of the other two is gone on from."""
    cwd = tmp_path_factory.mktemp("next-week")
    earlier = copy_run(finished_run.root, cwd / "runs" / finished_run.root.name)
    publish(earlier.root, PublishConfig(to=str(cwd / "out")))
    tasks = [
        write_task(cwd / "data", "Topics", num_classes=3, seed=5),
        write_task(cwd / "data", "Pairs", num_classes=3, seed=6),
    ]
    tasks.append(write_task(cwd / "data", "Fresh", num_classes=2, seed=8))
    values = load_config(str(finished_run.config)).model_dump(mode="json", exclude_none=True)
    values |= {"mteb_tasks": tasks, "publish": {"to": str(cwd / "out")}}
    values["train"] |= {"warm_start": str(cwd / "out")}
    config = cwd / "config.toml"
    config.write_text(tomli_w.dumps(values), encoding="utf-8")
    ended = run("train", "--config", config, "--runs", "runs", cwd=cwd, PREFECT_API_URL=prefect_api)
    return NextWeek(ended, cwd / ended.run, manifest_of(earlier.root).adapters, config, cwd)


@pytest.mark.faults
def test_a_warm_start_goes_on_from_what_is_published_and_says_what_it_gave(next_week: NextWeek) -> None:
    results = results_of(next_week.root)
    for task in ("Topics", "Pairs"):
        start = results[task].warm_start
        assert start is not None
        assert start.sha256 == next_week.published[task]
        assert results[task].start_accuracy is not None
        assert f"{task}: started from published adapter {start.sha256[:12]}: validation" in next_week.ended.err
    assert results["Topics"].start_accuracy > 0.6  # type: ignore[operator]  # it knows these three labels already
    assert "started from published adapter" in (next_week.root / "report.html").read_text(encoding="utf-8")


@pytest.mark.faults
def test_what_is_not_published_yet_is_trained_from_scratch_and_that_is_said(next_week: NextWeek) -> None:
    assert results_of(next_week.root)["Fresh"].warm_start is None
    assert "Fresh: trained from scratch: nothing to start from: adapter " in next_week.ended.err


@pytest.mark.faults
def test_a_new_label_is_named_before_training_and_reaches_the_gate(next_week: NextWeek) -> None:
    assert "Pairs: its labels differ from those of run" in next_week.ended.err
    assert next_week.ended.err.index("with new garden") < next_week.ended.err.index("Pairs: loaded")
    assert next_week.ended.code == 1
    assert "failed: gate · Pairs: its labels differ from the published ones: with new garden" in next_week.ended.err


@pytest.mark.faults
def test_the_score_table_names_the_change_since_the_run_before(next_week: NextWeek, prefect_api: str) -> None:
    rows = {
        row["MTEB task"]: row["Since the run before"] for row in _artifact(prefect_api, "score-table", next_week.root)
    }
    assert rows["Topics"].startswith("test data changed (run ")
    assert rows["Fresh"] == "first run"


@pytest.mark.faults
def test_the_report_and_what_is_published_are_linked(next_week: NextWeek, prefect_api: str) -> None:
    assert f"({(next_week.root / 'report.html').as_uri()})" in _text_of(prefect_api, "report", next_week.root)
    assert f"({(next_week.cwd / 'out').as_uri()})" in _text_of(prefect_api, "published", next_week.root)


@pytest.mark.faults
def test_the_week_after_with_nothing_new_does_nothing_although_the_published_adapter_is_another_now(
    next_week: NextWeek, prefect_api: str
) -> None:
    assert adapter_sha256(next_week.cwd / "out" / "Topics") != next_week.published["Topics"]
    again = run("train", "--config", next_week.config, "--runs", "runs", cwd=next_week.cwd, PREFECT_API_URL=prefect_api)
    assert again.code == 0, again.err
    assert f"nothing to do: data and config are those of run {next_week.root.name}" in again.err
    assert next_week.cwd / again.run == next_week.root


@pytest.mark.faults
def test_a_publication_that_failed_is_tried_again_by_the_next_start(
    finished_run: FinishedRun, prefect_api: str, tmp_path: Path
) -> None:
    copy_run(finished_run.root, tmp_path / "runs" / finished_run.root.name)
    target = tmp_path / "out"
    target.write_text("somebody else's file", encoding="utf-8")
    arguments = ("--config", finished_run.config, "--runs", "runs", "--set", f"publish.to={target}")
    refused = run("train", *arguments, cwd=tmp_path, PREFECT_API_URL=prefect_api)
    assert refused.code == 1, refused.err
    target.unlink()
    tried_again = run("train", *arguments, cwd=tmp_path, PREFECT_API_URL=prefect_api)
    assert tried_again.code == 0, tried_again.err
    assert {"Topics", "Pairs"} < {path.name for path in target.iterdir()}
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    settled = run("train", *arguments, cwd=tmp_path, PREFECT_API_URL=prefect_api)
    assert settled.code == 0, settled.err
    assert "not the published" not in settled.err
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    assert len(list((tmp_path / "runs").glob("*/manifest.json"))) == 1


def _filtered(api: str, key: str) -> list[dict[str, Any]]:
    question = {"artifacts": {"key": {"any_": [key]}}}
    request = urllib.request.Request(
        f"{api}/artifacts/filter", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return found


def _artifact(api: str, key: str, run_folder: Path) -> list[dict[str, Any]]:
    (found,) = (artifact for artifact in _filtered(api, key) if run_folder.name in artifact["description"])
    rows: list[dict[str, Any]] = json.loads(found["data"])
    return rows


def _text_of(api: str, key: str, run_folder: Path) -> str:
    (found,) = (artifact["data"] for artifact in _filtered(api, key) if run_folder.name in artifact["data"])
    text: str = found
    return text
