"""The job of each embedding family: data, frozen vectors, training, comparison, reload in a fresh process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import mteb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import TOPIC_WORDS, toy_texts
from commands import write_config
from sentence_transformers import SentenceTransformer

from pipeline.adapter.description import describe_adapter
from pipeline.config import load_config
from pipeline.data.dataset import TaskData
from pipeline.encoder.runtime import choose_runtime
from pipeline.errors import InputError
from pipeline.export.export import export_adapter
from pipeline.history.values import find_value, main_value
from pipeline.inference.reference import find_adapters
from pipeline.pairs.data import PairData
from pipeline.pairs.filled_tasks import clustering_task, pair_task, search_data, search_task
from pipeline.records import TaskResult
from pipeline.run.job import TaskJob
from pipeline.run.plan import job_spec
from pipeline.run.preflight import preflight
from pipeline.store.files import read_record

Folders = Callable[[str], Path]
LONG = pytest.mark.faults


def pairs_of(num_pairs: int, *, seed: int) -> list[tuple[str, str, int]]:
    """Pairs of toy texts, and whether both are about one topic."""
    texts, labels = toy_texts(3 * num_pairs, seed=seed)
    random = Random(seed)
    every = list(zip(texts, labels, strict=True))
    rows = []
    for _ in range(num_pairs):
        (first, topic), (second, other) = random.sample(every, 2)
        rows.append((first, second, int(topic == other)))
    return rows


def graded(num_pairs: int, seed: int) -> dict[str, list[Any]]:
    rows, random = pairs_of(num_pairs, seed=seed), Random(seed)
    scores = [5 * same - random.random() * (2 * same - 1) for _, _, same in rows]
    return {
        "sentence1": [r[0] for r in rows],
        "sentence2": [r[1] for r in rows],
        "score": scores,
        "genre": ["even" if i % 2 == 0 else "odd" for i in range(num_pairs)],
    }


def labelled(num_pairs: int, seed: int) -> dict[str, list[Any]]:
    rows = pairs_of(num_pairs, seed=seed)
    return {
        "sentence1": [r[0] for r in rows],
        "sentence2": [r[1] for r in rows],
        "label": [r[2] for r in rows],
    }


def searched(num_pairs: int, seed: int) -> dict[str, list[Any]]:
    rows = [row for row in pairs_of(4 * num_pairs, seed=seed) if row[2]][:num_pairs]
    return {"query": [r[0] for r in rows], "passage": [r[1] for r in rows]}


def translated(num_pairs: int, seed: int, *, step: int = 1) -> dict[str, list[Any]]:
    """Queries of three words, and passages of the words of the next topic that stand in the same places."""
    random, words, size = Random(seed), TOPIC_WORDS, len(TOPIC_WORDS) // 3
    rows = [random.sample(range(len(words)), 3) for _ in range(num_pairs)]
    return {
        "query": [" ".join(words[i] for i in row) for row in rows],
        "passage": [" ".join(words[(i + step * size) % len(words)] for i in row) for row in rows],
    }


def topical(num_texts: int, seed: int) -> dict[str, list[Any]]:
    texts, labels = toy_texts(num_texts, seed=seed)
    return {"text": texts, "label": [f"topic {label}" for label in labels]}


TASKS: dict[str, tuple[Callable[[int, int], dict[str, list[Any]]], dict[str, Any], str]] = {
    "graded": (graded, {"slices": ["genre"]}, "spearman"),
    "labelled": (labelled, {}, "average_precision"),
    "searched": (searched, {"prefixes": ["sea ", "garden "]}, "ndcg_at_10"),
    "two adapters": (translated, {"prefixes": ["sea ", "garden "], "sides": "query-passage"}, "ndcg_at_10"),
    "separated": (topical, {"objective": "separation"}, "v_measure"),
}


def job_of(kind: str, encoder: Path, folder: Path, *, run_id: str = "one", **train: Any) -> TaskJob:
    make, extra, _ = TASKS[kind]
    entry = {"name": "Own", **extra}
    for split, number, seed in (("train", 160, 1), ("validation", 60, 2), ("test", 90, 3)):
        entry[split] = str(folder / f"{split}.parquet")
        pq.write_table(pa.table(make(number, seed)), entry[split])
    settings = {"learning_rate": 3e-3, "batch_size": 16, "max_epochs": 2, "widths": [8]} | train
    config = load_config(str(write_config(folder / "c.toml", encoder, [entry], train=settings, evaluate={})))
    plan = preflight(config, choose_runtime(config.train, threads=1, use_gpu=False))
    return TaskJob(job_spec(plan, plan.tasks[0], run_id=run_id, runs=folder / "runs"))


@pytest.mark.parametrize("kind", list(TASKS))
def test_an_embedding_adapter_is_trained_measured_and_reloaded(
    kind: str, encoder_folder: Folders, tmp_path: Path
) -> None:
    metric = TASKS[kind][2]
    job = job_of(kind, encoder_folder("bert"), tmp_path)
    frozen = job.evaluate_frozen()
    assert [(row.metric, row.width) for row in frozen] == [(metric, None), (metric, 8)]
    assert TaskJob(job.spec).evaluate_frozen() == frozen, "read back from its file"
    result = job.finish()
    assert read_record(job.folder.result, TaskResult) == result
    assert (result.has_head, result.scores, result.calibration, result.probe_c) == (False, (), None, None)
    assert [describe_adapter(one).has_head for one in job.folder.adapters] == [False] * (2 if result.has_sides else 1)
    assert json.loads(job.folder.few_shot.read_text(encoding="utf-8")) == {}
    assert result.selection_metric == metric
    assert result.start_score is not None
    whole, adapted = main_value(result.values, "frozen"), main_value(result.values, "adapted")
    assert whole is not None
    assert adapted is not None
    assert whole.value == pytest.approx(frozen[0].value, abs=1e-9)
    gain = result.differences[0]
    assert (gain.metric, gain.width, gain.slice) == (metric, None, None)
    assert gain.gain == pytest.approx(adapted.value - whole.value, abs=1e-9)
    found = find_value(result.values, "adapted", f"{metric}_gain")
    assert found is not None
    assert found.value == pytest.approx(gain.gain)


def test_a_prefix_that_leaves_no_room_for_a_text_is_refused(encoder_folder: Folders, tmp_path: Path) -> None:
    make, extra, metric = TASKS["searched"]
    long = {"long": (make, extra | {"prefixes": ["sea " * 30, "garden "]}, metric)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="fills all 24 tokens"):
        patch.setattr("test_embedding_job.TASKS", long)
        job_of("long", encoder_folder("bert"), tmp_path)


@pytest.mark.parametrize("kind", ["two adapters", *(pytest.param(kind, marks=LONG) for kind in ("graded", "labelled"))])
def test_training_raises_the_score_that_it_is_selected_by(kind: str, encoder_folder: Folders, tmp_path: Path) -> None:
    epochs = {"max_epochs": 16, "patience": 16} if kind == "labelled" else {"max_epochs": 6}
    result = job_of(kind, encoder_folder("bert"), tmp_path, **epochs).finish()
    assert result.start_score is not None
    assert max(row.validation_score for row in result.epochs) > result.start_score + 0.05


def test_the_scores_of_a_users_slices_stand_beside_those_of_all(encoder_folder: Folders, tmp_path: Path) -> None:
    result = job_of("graded", encoder_folder("bert"), tmp_path).finish()
    rows = [row for row in result.values if row.slice == "genre" and row.metric == "spearman"]
    assert {(row.column, row.slice_value, row.num_texts) for row in rows} == {
        (column, value, 45) for column in ("frozen", "adapted") for value in ("even", "odd")
    }


def test_histograms_count_every_test_pair_of_a_label(encoder_folder: Folders, tmp_path: Path) -> None:
    result = job_of("labelled", encoder_folder("bert"), tmp_path).finish()
    labels = pq.read_table(tmp_path / "test.parquet")["label"].to_pylist()
    for counts in result.similarities:
        assert sum(counts.counts) == labels.count(int(counts.group[-1]))
    assert len(result.similarities) == 4


@pytest.mark.parametrize("kind", ["searched", *(pytest.param(kind, marks=LONG) for kind in ("graded", "separated"))])
def test_mteb_gives_our_scores_for_the_exported_model(kind: str, encoder_folder: Folders, tmp_path: Path) -> None:
    encoder = encoder_folder("bert")
    job = job_of(kind, encoder, tmp_path, precision="float32")
    result = job.finish()
    adapted = main_value(result.values, "adapted")
    assert adapted is not None
    (adapter,) = find_adapters([str(job.folder.root)], offline=True)
    export_adapter(adapter, tmp_path / "out", form="sentence-transformers", encoder=str(encoder), offline=True)
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    with_data = mteb_task_of(job.family.data)  # type: ignore[attr-defined]
    (found,) = mteb.evaluate(model, with_data, cache=None, co2_tracker=False, show_progress_bar=False).task_results
    assert found.get_score() == pytest.approx(adapted.value, abs=1e-4)


def mteb_task_of(data: PairData | TaskData) -> Any:
    if isinstance(data, TaskData):
        return clustering_task(data)
    return search_task(data.task, search_data(data)) if data.kind == "positives" else pair_task(data)
