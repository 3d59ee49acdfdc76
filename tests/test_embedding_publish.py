"""Embedding adapters in a run's files, published, verified and held at the gate. The job runs in this process."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from commands import write_config as write_toml
from publishing import REPO, Place, hub_of_our_own
from sentence_transformers import SentenceTransformer
from test_embedding_job import graded, labelled, translated

from flows.cli import lorafleet
from pipeline.config import GateConfig, PublishConfig, load_config
from pipeline.encoder.runtime import choose_runtime
from pipeline.errors import AdapterError, VerificationError
from pipeline.export.export import export_adapter
from pipeline.history.tables import read_gate
from pipeline.inference.reference import find_adapters
from pipeline.inference.router import Router
from pipeline.publishing.consistency import check_task
from pipeline.publishing.publish import publish, rollback
from pipeline.publishing.verify import verify
from pipeline.records import SIDES, RunResults, TaskResult
from pipeline.reports.model_card import render_card
from pipeline.reports.summary import summarise
from pipeline.run.collect import collect, finish_run
from pipeline.run.job import TaskJob
from pipeline.run.plan import job_spec
from pipeline.run.preflight import preflight
from pipeline.store.files import read_record
from pipeline.store.manifest import write_config
from pipeline.store.run_folder import RunFolder, TaskFolder
from tasks.stages import _sizes

Folders = Callable[[str], Path]
Make = Callable[[int, int], dict[str, list[Any]]]


def inverted(num_pairs: int, seed: int) -> dict[str, list[Any]]:
    """Pairs whose labels are the wrong way round."""
    rows = labelled(num_pairs, seed)
    return rows | {"label": [1 - label for label in rows["label"]]}


def misled(num_pairs: int, seed: int) -> dict[str, list[Any]]:
    """Queries whose passages stand in the other direction from that of ``translated``."""
    return translated(num_pairs, seed, step=2)


def finished_run(encoder: Path, folder: Path, run_id: str, *, is_harmful: bool = False) -> RunFolder:
    """A run of three tasks of pairs. A harmful one has learnt the opposite of two, and was selected by it."""
    entries: list[dict[str, Any]] = []
    kinds: dict[str, tuple[Make, Make, dict[str, Any]]] = {
        "Same": (labelled, inverted, {}),
        "Find": (translated, misled, {"sides": "query-passage", "prefixes": ["sea ", "garden "]}),
        "Graded": (graded, graded, {"columns": ["sentence1", "sentence2"]}),
    }
    for name, (right, wrong, extra) in kinds.items():
        entry = {"name": name} | extra
        for split, number, seed in (("train", 300, 1), ("validation", 120, 2), ("test", 300, 3)):
            entry[split] = str(folder / f"{run_id}-{name}-{split}.parquet")
            rows = wrong if is_harmful and split != "test" else right
            more = 5 if (name, split) == ("Same", "test") else 1  # a loss in average precision takes many to be seen
            pq.write_table(pa.table(rows(more * number, seed)), entry[split])
        entries.append(entry)
    train = {"learning_rate": 3e-3, "batch_size": 16, "max_epochs": 5, "widths": [8]}
    config = load_config(str(write_toml(folder / f"{run_id}.toml", encoder, entries, train=train, evaluate={})))
    plan = preflight(config, choose_runtime(config.train, threads=1, use_gpu=False))
    run = RunFolder(folder / "runs" / run_id)
    write_config(plan.config, run)
    jobs = [TaskJob(job_spec(plan, task, run_id=run_id, runs=folder / "runs")) for task in plan.tasks]
    results = [job.finish() for job in jobs]
    _, corrected = collect(plan, results, [], run_id=run_id, folder=run)
    finish_run(plan, corrected, [], run_id=run_id, folder=run, seconds=1.0)
    return run


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Place]:
    with hub_of_our_own(tmp_path) as place:
        yield place


@pytest.fixture(scope="module")
def runs(encoder_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    folder, encoder = tmp_path_factory.mktemp("runs"), encoder_folder("bert")
    good = finished_run(encoder, folder, "20270101-000000-0001")
    return {"good": good, "harmful": finished_run(encoder, folder, "20270102-000000-0002", is_harmful=True)}


def test_the_files_of_a_run_cover_it(runs: dict[str, RunFolder]) -> None:
    run = runs["good"]
    entries = {entry.task: entry for entry in read_record(run.all_results, RunResults).tasks}
    assert {(name, entry.family, entry.metric) for name, entry in entries.items()} == {
        ("Same", "text-matching", "average_precision"),
        ("Graded", "text-matching", "spearman"),
        ("Find", "retrieval", "ndcg_at_10"),
    }
    for entry in entries.values():
        assert entry.frozen is not None
        assert entry.adapted is not None
        assert entry.gain == pytest.approx(entry.adapted - entry.frozen)
        assert entry.p_value is not None
        assert entry.p_value_holm is not None
        assert entry.p_value_holm >= entry.p_value
    assert json.loads(run.results.read_text(encoding="utf-8"))["tasks"] == []
    values = pq.read_table(run.values).to_pylist()
    assert {
        (row["column"], row["width"]) for row in values if row["metric"] == "spearman" and row["slice"] is None
    } == {
        ("frozen", None),
        ("frozen", 8),
        ("adapted", None),
        ("adapted", 8),
    }
    shown = CliRunner().invoke(lorafleet, ["show", str(run.root)])
    assert shown.exit_code == 0, shown.output
    assert "Adapted against frozen" in shown.output
    assert "Spearman" in shown.output
    page = run.report.read_text(encoding="utf-8")
    assert "LoRA embedding adapters" in page
    assert "ROC, test pairs" in page
    assert "Spearman by width" in page
    assert "without texts of train" in page


def test_a_side_is_named_of_retrieval_adapters_only(runs: dict[str, RunFolder]) -> None:
    run = runs["good"].root
    with pytest.raises(AdapterError, match=r"this one is for text-matching; leave out \.passage"):
        find_adapters([f"{run}#Graded.passage"], offline=True)
    with pytest.raises(AdapterError, match=r"it has Find\.query, Find\.passage, Graded, Same"):
        find_adapters([f"{run}#Find.qurey"], offline=True)


def test_the_log_counts_pairs_and_says_how_scores_are_scaled(runs: dict[str, RunFolder]) -> None:
    sizes = {name: _sizes(read_record(runs["good"].task(name).result, TaskResult).data) for name in ("Graded", "Find")}
    assert re.match(
        r"300 training pairs, 120 validation, 300 test, scores \S+ to \S+ scaled to 0 to 1; \d+ test", sizes["Graded"]
    )
    assert re.match(r"300 training pairs, 120 validation, 300 test; \d+ test pairs share a text", sizes["Find"])


def test_the_card_lists_the_files_that_embedding_adapters_have(runs: dict[str, RunFolder]) -> None:
    card = runs["good"].readme.read_text(encoding="utf-8")
    assert "results.json" in card
    assert "query/  passage/" in card
    assert "calibration" not in card
    assert "classifier_head" not in card


def test_the_epochs_of_a_run_have_the_score_that_selects(runs: dict[str, RunFolder]) -> None:
    run = runs["good"]
    epochs = pq.read_table(run.epochs).to_pylist()
    for name in ("Find", "Graded", "Same"):
        scores = [row["validation_score"] for row in epochs if row["mteb_task"] == name]
        assert scores == [row.validation_score for row in read_record(run.task(name).result, TaskResult).epochs]
        assert None not in scores


def test_a_card_warns_of_an_epoch_that_test_chose_and_of_pairs_of_train(runs: dict[str, RunFolder]) -> None:
    result = read_record(runs["good"].task("Graded").result, TaskResult)
    data = result.data.changed(num_overlap=7)
    chosen = result.changed(selected_on="test", best_epoch=0, data=data)
    when = datetime(2027, 1, 1, tzinfo=UTC)
    summary = summarise([chosen], [], encoder=result.encoder, run_id=result.run_id, created_at=when)
    card = render_card([chosen], summary, adapted_modules=())
    assert "The epoch was chosen on the test split, so these scores are optimistic: Graded." in card
    assert "Test texts that also occur in train, which makes every column optimistic: Graded 7 of 300." in card
    assert "so training did not help: Graded." in card
    assert "chosen on test †" in card


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"gain": 0.9}, "difference of spearman"),
        ({"low": 0.5}, "difference of spearman"),
        ({"num_texts": 9}, "difference of spearman"),
        ({"width": 4}, "differences"),
    ],
)
def test_a_gain_that_is_not_that_of_the_values_is_found(
    changes: dict[str, Any], where: str, runs: dict[str, RunFolder], tmp_path: Path
) -> None:
    place = runs["good"].task("Graded")
    check_task(place)
    shutil.copytree(place.root, tmp_path / "Graded")
    result = read_record(place.result, TaskResult)
    first = result.differences[0].changed(**changes)
    forged = result.changed(differences=(first, *result.differences[1:]))
    (tmp_path / "Graded" / "result.json").write_text(forged.model_dump_json())
    with pytest.raises(VerificationError, match=where):
        check_task(TaskFolder(tmp_path / "Graded"))


def test_the_history_of_a_store_has_its_scores(runs: dict[str, RunFolder]) -> None:
    store = runs["good"].root.parent
    shown = CliRunner().invoke(lorafleet, ["show", str(store)])
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.output.splitlines()]
    assert lines[0] == ["MTEB", "task", "run", "metric", "frozen", "adapted"]
    entries = {entry.task: entry for entry in read_record(runs["good"].all_results, RunResults).tasks}
    metrics = {"Find": "ndcg_at_10", "Graded": "spearman", "Same": "average_precision"}
    expected = [
        [name, run.root.name, metrics[name]] for name in sorted(metrics) for run in (runs["good"], runs["harmful"])
    ]
    assert [line[:3] for line in lines[1:]] == expected
    for line in lines[1::2]:
        entry = entries[line[0]]
        assert [float(cell) / 100 for cell in line[3:5]] == pytest.approx([entry.frozen, entry.adapted], abs=6e-4)
    facts = json.loads(CliRunner().invoke(lorafleet, ["show", str(store), "--json"]).output)
    changed = {(row["mteb_task"], row["run_id"], row["column"]): row["test_data_changed"] for row in facts}
    assert changed == {
        (name, run.root.name, column): (name, run) == ("Find", runs["harmful"])  # it has other passages to search in
        for name in metrics
        for run in runs.values()
        for column in ("frozen", "adapted")
    }
    page = (store / "history.html").read_text(encoding="utf-8")
    assert "adapted, Spearman" in page
    assert "300 training and 300 test examples" in page


@pytest.mark.faults
def test_it_is_published_verified_and_a_planted_loss_is_blocked(
    runs: dict[str, RunFolder], encoder_folder: Folders, tmp_path: Path
) -> None:
    to = str(tmp_path / "published")
    first = publish(runs["good"].root, PublishConfig(to=to))
    assert [decision.decision for decision in first.decisions] == ["promote"] * 3
    verified = verify(to, encoder=str(encoder_folder("bert")), offline=True)
    assert {found.name for found in verified} == {"Same", "Graded", "Find.query", "Find.passage"}
    assert {found.name: found.effect > 0 for found in verified}["Same"]
    assert {found.outputs for found in verified} == {"vectors"}
    card = (tmp_path / "published" / "README.md").read_text(encoding="utf-8")
    assert "Scores of the embedding adapters" in card
    assert "| nDCG@10 | without texts of train | " in card
    assert "sentence-similarity" in card
    (before,) = find_adapters([f"{to}#Same"], offline=True)
    second = publish(runs["harmful"].root, PublishConfig(to=to))
    decisions = {decision.mteb_task: decision for decision in second.decisions}
    assert decisions["Same"].decision == "block", decisions["Same"].reason
    assert decisions["Same"].metric == "average_precision"
    assert "average precision" in decisions["Same"].reason
    assert decisions["Graded"].decision == "keep"
    assert (decisions["Find"].decision, decisions["Find"].metric) == ("block", "ndcg_at_10"), decisions["Find"].reason
    assert [found.metric for found in read_gate(runs["harmful"].gate)] == [d.metric for d in second.decisions]
    (after,) = find_adapters([f"{to}#Same"], offline=True)
    assert after.sha256 == before.sha256


@pytest.mark.faults
def test_each_side_of_a_task_is_loaded_and_exported_by_its_name(
    runs: dict[str, RunFolder], encoder_folder: Folders, tmp_path: Path
) -> None:
    run, encoder = runs["good"], str(encoder_folder("bert"))
    splits = {
        split: pq.read_table(run.root.parents[1] / f"{run.root.name}-Find-{split}.parquet").to_pydict()
        for split in ("train", "validation", "test")
    }
    router = Router([f"{run.root}#Find.{side}" for side in SIDES], encoder=encoder, precision="float32", offline=True)
    rows, corpus = splits["test"], sorted({text for columns in splits.values() for text in columns["passage"]})
    queries, passages = router.embed(rows["query"], "Find.query"), router.embed(corpus, "Find.passage")
    similarities = queries @ passages.T
    right = similarities[np.arange(len(queries)), [corpus.index(text) for text in rows["passage"]]]
    ranks = (similarities > right[:, np.newaxis] + 1e-6).sum(axis=1)
    found = np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean()
    entry = next(e for e in read_record(run.all_results, RunResults).tasks if e.task == "Find")
    assert entry.adapted == pytest.approx(found, abs=0.02)
    assert entry.frozen is not None
    assert found > entry.frozen + 0.03
    with pytest.raises(AdapterError, match=r"Find has two adapters; choose Find\.query or Find\.passage"):
        find_adapters([f"{run.root}#Find"], offline=True)
    with pytest.raises(AdapterError, match=r"Find has two adapters; choose Find\.query or Find\.passage"):
        find_adapters([str(run.root / "Find")], offline=True)
    task = run.root / "Find"
    for ref in (str(task / "passage"), f"{task}#passage", f"{task}.passage", f"{run.root}#Find.passage"):
        (passage,) = find_adapters([ref], offline=True)
        assert (passage.name, passage.prefix) == ("Find.passage", "garden "), ref
    for ref in (str(task), str(task / "query"), f"{run.root}#Find", f"{run.root}#Find.query"):
        assert {found.name for found in verify(ref, encoder=encoder, offline=True)} == {"Find.query", "Find.passage"}, (
            ref
        )
    export_adapter(passage, tmp_path / "out", form="sentence-transformers", encoder=encoder, offline=True)
    vectors = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(corpus)
    np.testing.assert_allclose(vectors, passages, atol=1e-4)


@pytest.mark.faults
def test_a_pair_of_adapters_on_the_hub_is_replaced_and_rolled_back_to(
    runs: dict[str, RunFolder], hub: Place, encoder_folder: Folders
) -> None:
    encoder, names = str(encoder_folder("bert")), ["Find.query", "Find.passage"]
    hub.publish(runs["good"].root)
    first = hub.hub.head(REPO)
    hub.publish(runs["harmful"].root, PublishConfig(gate=GateConfig(enabled=False)))
    refs = [f"hf:{REPO}@{revision}#{name}" for revision in (first, "main") for name in names]
    old, new = ([found.sha256 for found in find_adapters(some, offline=False)] for some in (refs[:2], refs[2:]))
    assert not set(old) & set(new)
    landed, verified = rollback(f"hf:{REPO}", first, encoder=encoder, offline=False)
    assert {"Same", "Graded", *names} == {adapter.name for adapter in verified}
    assert hub.hub.head(REPO) == landed
    back = find_adapters([f"hf:{REPO}@{landed}#{name}" for name in names], offline=False)
    assert [found.sha256 for found in back] == old
    assert [(found.name, found.prefix) for found in back] == list(zip(names, ["sea ", "garden "], strict=True))
