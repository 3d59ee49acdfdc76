"""Scores of text vectors against mteb, scipy and brute force: pairs, searches and clusters, at every width."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import CPU_FLOAT32, give_effect, toy_texts
from commands import write_task
from safetensors.numpy import load_file, save_file
from scipy import stats
from sklearn.metrics import average_precision_score, f1_score
from test_evaluation import PlainEncoder

from pipeline.adapter.adapter import Adapter
from pipeline.config import AdapterConfig, DataConfig, EncoderConfig, EvaluateConfig, MtebTaskConfig, TrainConfig
from pipeline.data.catalogue import plan_task
from pipeline.data.dataset import TaskData, load_data
from pipeline.encoder.encoder import Encoder, FloatArray
from pipeline.encoder.files import find_encoder
from pipeline.errors import DataError
from pipeline.evaluation.vectors import TextVectors, normalize
from pipeline.pairs.data import PairData, PairKind, PairSplit
from pipeline.pairs.filled_tasks import clustering_task, pair_task, search_data, search_task
from pipeline.records import Family, MtebTask, ValueRow
from pipeline.vector_scores.comparison import EmbeddingScores, compare
from pipeline.vector_scores.measuring import MAIN_METRICS, Measured, measure_vectors, side_texts
from pipeline.vector_scores.pair_metrics import best_threshold
from pipeline.vector_scores.parts import parts_of_test

PAIRS = Path(__file__).parents[2] / "shared" / "data" / "pairs"
needs_pairs = pytest.mark.skipif(not PAIRS.is_dir(), reason=f"no copies of the pair data sets in {PAIRS}")
FEW_DRAWS = EvaluateConfig(bootstrap_draws=100)


# --- small data ---


def split_of(num_pairs: int, kind: PairKind, *, seed: int) -> PairSplit:
    """Pairs of texts about topics, graded by whether the topics agree, with a slice of the parity of the row."""
    first, topics = toy_texts(num_pairs, seed=seed)
    second, others = toy_texts(num_pairs, seed=seed + 100)
    random = np.random.default_rng(seed)
    order = random.permutation(num_pairs)
    second, others = [second[row] for row in order], [others[row] for row in order]
    agree = np.array(topics) == np.array(others)
    scores = {"scores": (agree + random.integers(0, 3, num_pairs)) / 3, "labels": agree.astype(float)}.get(kind)
    return PairSplit((first, second), scores, {"parity": ["even", "odd"] * (num_pairs // 2)})


def pairs_of(
    kind: PairKind, *, objective: Family = "text-matching", test: PairSplit | None = None, **task: Any
) -> PairData:
    train, validation = split_of(40, kind, seed=1), split_of(60, kind, seed=2)
    test = test or split_of(120, kind, seed=3)
    known = {text for column in train.columns for text in column}
    both = {frozenset(pair) for pair in zip(*train.columns, strict=True)}
    test_pairs = list(zip(*test.columns[:2], strict=True))
    passages = [text for split in (train, validation, test) for text in split.columns[1]]
    return PairData(
        task=MtebTask(
            name="Topics",
            source="files",
            location="pairs.csv",
            revision="1",
            max_epochs=1,
            samples_per_label=8,
            objective=objective,
            **task,
        ),
        kind=kind,
        train=train,
        validation=validation,
        test=test,
        corpus=list(dict.fromkeys(passages)),
        pair_in_train=np.array([frozenset(pair) in both for pair in test_pairs]),
        text_in_train=np.array([not known.isdisjoint(pair) for pair in test_pairs]),
        score_range=None,
        fingerprint="a" * 64,
        test_fingerprint="b" * 64,
        notes=(),
    )


def labelled(folder: Path) -> TaskData:
    entry = write_task(folder, "Topics", num_classes=3)
    task = plan_task(MtebTaskConfig(**entry), data=DataConfig(), default_epochs=2)
    return load_data(task, config=TrainConfig(), offline=True)


def unit(encoder: Encoder, texts: Sequence[str], width: int | None = None) -> FloatArray:
    return normalize(encoder.embed(encoder.tokenise(texts))[:, :width])


class NarrowEncoder(PlainEncoder):
    """An encoder for mteb that embeds by itself and keeps the leading dimensions."""

    def __init__(self, encoder: Encoder, width: int | None) -> None:
        super().__init__(encoder)
        self.width = width

    def encode(self, inputs: Any, **_: Any) -> FloatArray:
        return unit(self.encoder, [text for batch in inputs for text in batch["text"]], self.width)

    def similarity(self, one: Any, other: Any) -> Any:
        return np.asarray(one) @ np.asarray(other).T

    def similarity_pairwise(self, one: Any, other: Any) -> Any:
        return (np.asarray(one) * np.asarray(other)).sum(axis=1)


def scored_by_mteb(encoder: Encoder, mteb_task: Any, width: int | None) -> dict[str, Any]:
    (result,) = mteb.evaluate(
        NarrowEncoder(encoder, width), mteb_task, cache=None, co2_tracker=False, show_progress_bar=False
    ).task_results
    (scores,) = result.scores["test"]
    return dict(scores)


def both_of(data: PairData | TaskData, bert: Encoder, widths: Sequence[int] = (8,)) -> EmbeddingScores:
    """Scores of a tiny encoder, and of the same with an adapter that has an effect."""
    frozen = measure_vectors(data, TextVectors(bert), widths=widths)
    give_effect(Adapter(bert, AdapterConfig(), ("a", "b")))
    adapted = measure_vectors(data, TextVectors(bert), widths=widths)
    return compare(data, frozen, adapted, run_id="run", config=FEW_DRAWS, seed=0)


def row_of(scores: EmbeddingScores, metric: str, *, column: str = "frozen", **found: Any) -> ValueRow:
    wanted = {"width": None, "slice": None, "slice_value": None} | found | {"metric": metric, "column": column}
    (row,) = [r for r in scores.rows if all(getattr(r, name) == value for name, value in wanted.items())]
    return row


# --- one state of the encoder ---


@pytest.mark.parametrize(("kind", "key"), [("scores", "cosine_spearman"), ("labels", "cosine_ap")])
def test_the_main_metric_of_pairs_is_mtebs_at_every_width(kind: PairKind, key: str, bert: Encoder) -> None:
    data = pairs_of(kind)
    found = measure_vectors(data, TextVectors(bert), widths=(8, 32, 16))
    assert found.widths == (None, 16, 8)  # 32 is all there is
    for width, main in zip(found.widths, found.arrays["main"], strict=True):
        assert main == pytest.approx(scored_by_mteb(bert, pair_task(data), width)[key], abs=1e-6)
    assert len(set(found.arrays["main"])) == 3


def test_similarity_is_the_cosine_of_the_leading_dimensions(bert: Encoder) -> None:
    data = pairs_of("labels")
    found = measure_vectors(data, TextVectors(bert), widths=(8,))
    for name, part in (("similarity", data.test), ("validation_similarity", data.validation)):
        for width, row in zip(found.widths, found.arrays[name], strict=True):
            first, second = (unit(bert, column, width).astype(np.float64) for column in part.columns)
            assert row == pytest.approx((first * second).sum(axis=1), abs=1e-6)


@pytest.mark.parametrize("objective", ["retrieval", "text-matching"])
def test_a_search_scores_as_mteb_scores_it_and_as_brute_force_does(objective: Family, bert: Encoder) -> None:
    test = split_of(120, "positives", seed=3)
    queries = [query if row % 3 else test.columns[0][0] for row, query in enumerate(test.columns[0])]
    data = pairs_of(
        "positives", objective=objective, test=dataclasses.replace(test, columns=(queries, test.columns[1]))
    )
    search = search_data(data)
    assert len(search.relevant[0]) > 10  # more right passages than ranks
    found = measure_vectors(data, TextVectors(bert), widths=(8,))
    for number, width in enumerate(found.widths):
        of_mteb = scored_by_mteb(bert, search_task(data.task, search), width)
        cosine = unit(bert, search.queries, width) @ unit(bert, search.passages, width).T
        for query, right in enumerate(search.relevant):
            ranks = [rank for rank, passage in enumerate(np.argsort(-cosine[query])[:10]) if int(passage) in right]
            ideal = sum(1 / math.log2(2 + rank) for rank in range(min(10, len(right))))
            ndcg = sum(1 / math.log2(2 + rank) for rank in ranks) / ideal
            assert found.arrays["ndcg_at_10"][number, query] == pytest.approx(ndcg)
            assert found.arrays["recall_at_10"][number, query] == len(ranks) / len(right)
            assert found.arrays["mrr_at_10"][number, query] == (1 / (1 + ranks[0]) if ranks else 0)
        for name in ("ndcg_at_10", "recall_at_1", "recall_at_10", "mrr_at_10"):
            assert found.arrays[name][number].mean() == pytest.approx(of_mteb[name], abs=6e-6)


def test_a_query_is_no_candidate_of_its_own_in_text_matching_unless_a_pair_says_so(bert: Encoder) -> None:
    first, second = ["old ship", "wave tide", "soup oven"], ["wave tide", "old ship", "soup oven"]
    test = PairSplit((first, second), None, {})
    matching = search_data(pairs_of("positives", test=test))
    own = [None if place is None else matching.passages[place] for place in matching.own_passage]
    assert own == ["old ship", "wave tide", None]
    assert search_data(pairs_of("positives", objective="retrieval", test=test)).own_passage == (None, None, None)
    few = dataclasses.replace(pairs_of("positives", test=test), corpus=second)
    found = measure_vectors(few, TextVectors(bert))
    assert found.arrays["recall_at_10"][0].tolist() == [1, 1, 1]  # of three passages
    assert found.arrays["recall_at_1"][0, 2] == 1  # a text is nearest to itself


def test_clusters_score_as_mteb_scores_them_and_are_kept_by_text(bert: Encoder, tmp_path: Path) -> None:
    data = labelled(tmp_path)
    found = measure_vectors(data, TextVectors(bert), widths=(8,))
    for number, width in enumerate(found.widths):
        assert found.arrays["main"][number] == pytest.approx(
            scored_by_mteb(bert, clustering_task(data), width)["v_measure"], abs=1e-6
        )
    assert found.arrays["clusters"].shape == (2, 10, 60)
    assert (found.arrays["times_drawn"].sum(axis=1) == 16_384).all()
    assert found.arrays["few_shot_accuracy"].shape == (2, 10)


def test_prefixes_stand_before_the_texts_of_their_side_and_each_side_can_have_its_own_encoder(bert: Encoder) -> None:
    data = pairs_of("positives", objective="retrieval", prefixes=("near ", "soup "))
    texts = side_texts(data)
    assert texts.first == [f"near {query}" for query in search_data(data).queries]
    assert texts.second == [f"soup {passage}" for passage in data.corpus]
    one, other = TextVectors(bert), TextVectors(bert)
    one([*texts.first, *texts.second])
    shared = measure_vectors(data, TextVectors(bert)).arrays["ndcg_at_10"]
    give_effect(Adapter(bert, AdapterConfig(), ("a", "b")))
    other(texts.second)
    apart = measure_vectors(data, one, second=other).arrays["ndcg_at_10"]
    cosine = one.unit(texts.first) @ other.unit(texts.second).T
    is_first = [int(cosine[query].argmax()) in right for query, right in enumerate(search_data(data).relevant)]
    assert (measure_vectors(data, one, second=other).arrays["recall_at_1"][0] == is_first).all()
    assert (apart != shared).any()


def test_a_measurement_survives_a_file(bert: Encoder, tmp_path: Path) -> None:
    found = measure_vectors(pairs_of("labels"), TextVectors(bert), widths=(8,))
    save_file(found.tensors(), tmp_path / "measured.safetensors")
    again = Measured.from_tensors(load_file(tmp_path / "measured.safetensors"))
    assert again.widths == found.widths
    assert again.arrays.keys() == found.arrays.keys()
    assert all((again.arrays[name] == array).all() for name, array in found.arrays.items())


@pytest.mark.parametrize("kind", ["scores", "labels"])
def test_a_test_set_of_one_score_or_label_is_refused(kind: PairKind, bert: Encoder) -> None:
    test = split_of(30, kind, seed=3)
    flat = dataclasses.replace(test, scores=np.ones(30))
    with pytest.raises(DataError, match=r"Topics: expected two different (score|label)s in test, found one"):
        measure_vectors(pairs_of(kind, test=flat), TextVectors(bert))


def test_vectors_that_are_all_equal_score_zero(bert: Encoder) -> None:
    test = split_of(30, "scores", seed=3)
    same = dataclasses.replace(test, columns=(["old ship"] * 30, ["soup oven"] * 30))
    assert measure_vectors(pairs_of("scores", test=same), TextVectors(bert)).arrays["main"].tolist() == [0]


# --- two states ---

WITHOUT_THRESHOLD = ("average_precision", "auc", "spearman", "margin", "cohens_d")
"""Metrics of labelled pairs that need no threshold."""


@pytest.mark.parametrize(
    ("kind", "metrics"),
    [
        ("scores", {"spearman", "pearson"}),
        ("labels", {*WITHOUT_THRESHOLD, "f1", "accuracy"}),
        ("positives", {"ndcg_at_10", "recall_at_1", "recall_at_10", "mrr_at_10"}),
    ],
)
def test_every_metric_has_a_row_for_each_column_width_and_test_set(
    kind: PairKind, metrics: set[str], bert: Encoder
) -> None:
    test = split_of(120, kind, seed=3)
    known = split_of(40, kind, seed=1).columns
    mixed = tuple([*known[side][:10], *column[10:]] for side, column in enumerate(test.columns))
    data = pairs_of(kind, test=dataclasses.replace(test, columns=(*mixed,)))
    scores = both_of(data, bert)
    assert {row.slice for row in scores.rows} == {None, "pair_in_train", "text_in_train", "parity"}
    for part in ("pair_in_train", "text_in_train"):
        for width in (None, 8):
            for column in ("frozen", "adapted"):
                for metric in metrics:
                    where: dict[str, Any] = {"column": column, "width": width}
                    assert row_of(scores, metric, **where).num_texts == 120
                    assert row_of(scores, metric, **where, slice=part, slice_value="no").num_texts == 110
    main = MAIN_METRICS[kind]
    assert {row.metric for row in scores.rows if row.main} == {main}
    for difference in scores.differences:
        where = {"width": difference.width, "slice": difference.slice, "slice_value": difference.slice_value}
        frozen, adapted = (row_of(scores, main, column=column, **where) for column in ("frozen", "adapted"))
        assert difference.gain == pytest.approx(adapted.value - frozen.value, abs=1e-12)
        gain = row_of(scores, f"{main}_gain", column="adapted", **where)
        assert (gain.value, gain.low, gain.high) == (difference.gain, difference.low, difference.high)
    assert (scores.differences[0].width, scores.differences[0].slice) == (None, None)
    assert scores.differences[0].gain != 0
    assert [row.width for row in scores.rows if row.slice == "parity" and row.width is not None] == []


def test_the_score_of_a_part_is_that_of_its_pairs_alone(bert: Encoder) -> None:
    data = pairs_of("scores")
    data = dataclasses.replace(data, text_in_train=np.arange(120) % 3 == 0)
    similarity = measure_vectors(data, TextVectors(bert)).arrays["similarity"][0]
    scores = both_of(data, bert)
    assert data.test.scores is not None
    for name, value, mask in (
        ("text_in_train", "no", np.arange(120) % 3 > 0),
        ("parity", "odd", np.arange(120) % 2 == 1),
    ):
        row = row_of(scores, "spearman", slice=name, slice_value=value)
        assert row.value == pytest.approx(stats.spearmanr(data.test.scores[mask], similarity[mask])[0], abs=1e-12)
        assert row.num_texts == mask.sum()


def test_the_threshold_of_f1_and_accuracy_comes_from_validation(bert: Encoder) -> None:
    data = pairs_of("labels")
    found = measure_vectors(data, TextVectors(bert)).arrays
    scores = both_of(data, bert)
    gold, validation = data.test.scores, data.validation.scores
    assert gold is not None and validation is not None
    for metric in ("f1", "accuracy"):
        chosen = best_threshold(validation, found["validation_similarity"][0], metric=metric)  # type: ignore[arg-type]
        assert chosen is not None
        called = found["similarity"][0] >= chosen.threshold
        expected = f1_score(gold, called) if metric == "f1" else (called == gold).mean()
        assert row_of(scores, metric).value == pytest.approx(expected)
        assert row_of(scores, f"{metric}_threshold").value == chosen.threshold
    on_test = best_threshold(gold, found["similarity"][0], metric="f1")
    assert on_test is not None
    assert row_of(scores, "f1_best_threshold").value == on_test.value > row_of(scores, "f1").value
    assert row_of(scores, "average_precision").value == pytest.approx(
        average_precision_score(gold, found["similarity"][0])
    )


def test_without_both_labels_in_validation_there_is_no_f1_and_a_note_says_so(bert: Encoder) -> None:
    data = pairs_of("labels")
    data = dataclasses.replace(data, validation=dataclasses.replace(data.validation, scores=np.zeros(60)))
    scores = both_of(data, bert)
    assert {row.metric for row in scores.rows} == {*WITHOUT_THRESHOLD, "average_precision_gain", "f1_best_threshold"}
    assert any("validation does not have both labels" in note for note in scores.notes)


def test_validation_that_the_adapter_has_learnt_chooses_no_threshold(bert: Encoder) -> None:
    data = pairs_of("labels")
    found = measure_vectors(data, TextVectors(bert))
    settings: dict[str, Any] = {"run_id": "one", "config": EvaluateConfig(bootstrap_draws=100), "seed": 0}
    scores = compare(data, found, found, **settings, learnt_validation=True)
    assert {row.metric for row in scores.rows} == {*WITHOUT_THRESHOLD, "average_precision_gain", "f1_best_threshold"}
    assert any("the adapter was trained on validation" in note for note in scores.notes)


def test_an_identifier_as_slice_takes_no_memory_for_each_value(bert: Encoder) -> None:
    test = split_of(120, "scores", seed=3)
    data = pairs_of("scores", test=dataclasses.replace(test, slices={"id": [str(i) for i in range(120)]}))
    divided = parts_of_test(data)
    assert [part.slice for part in divided.parts if part.is_user_slice] == []
    assert any("no score for id" in note for note in divided.notes)


def test_small_slices_and_slices_of_one_label_have_no_score_and_are_named(bert: Encoder) -> None:
    test = split_of(120, "labels", seed=3)
    assert test.scores is not None
    kinds = ["rare"] * 19 + ["just enough"] * 20 + ["wide"] * 81
    same = ["alike" if label else "unlike" for label in test.scores]
    scores = both_of(pairs_of("labels", test=dataclasses.replace(test, slices={"kind": kinds, "same": same})), bert)
    assert {row.slice_value for row in scores.rows if row.slice == "kind"} == {"just enough", "wide"}
    assert any("'rare' (19)" in note for note in scores.notes)
    assert {row.metric for row in scores.rows if row.slice_value == "alike"} == {"f1", "accuracy"}
    assert any(
        note.startswith("no average_precision, auc, spearman, margin, cohens_d for same 'alike'")
        for note in scores.notes
    )
    numbers = [n for row in scores.rows for n in (row.value, row.low, row.high) if n is not None]
    assert np.isfinite(numbers).all()


def test_an_encoder_is_no_better_than_itself(bert: Encoder, tmp_path: Path) -> None:
    every: list[PairData | TaskData] = [pairs_of("scores"), pairs_of("positives"), labelled(tmp_path)]
    for data in every:
        same = measure_vectors(data, TextVectors(bert), widths=(8,))
        scores = compare(data, same, same, run_id="run", config=FEW_DRAWS, seed=0)
        assert {(d.gain, d.low, d.high, d.p_value) for d in scores.differences} == {(0, 0, 0, 1)}


def test_clusters_silhouette_and_few_shot_accuracy_have_rows(bert: Encoder, tmp_path: Path) -> None:
    data = labelled(tmp_path)
    data = dataclasses.replace(data, test_in_train=np.arange(60) < 30)
    found = measure_vectors(data, TextVectors(bert), widths=(8,))
    scores = both_of(data, bert)
    row = row_of(scores, "v_measure")
    assert row.value == pytest.approx(found.arrays["main"][0], abs=1e-12)
    assert row.low is not None and row.high is not None and row.low < row.high
    assert row_of(scores, "silhouette", width=8).value == pytest.approx(found.arrays["silhouette"][1].mean())
    part = row_of(scores, "silhouette", slice="text_in_train", slice_value="no")
    assert (part.num_texts, part.value) == (30, pytest.approx(found.arrays["silhouette"][0, 30:].mean()))
    assert row_of(scores, "few_shot_accuracy").value == pytest.approx(found.arrays["few_shot_accuracy"][0].mean())


# --- real data ---


def real_pairs(name: str, kind: PairKind, columns: tuple[str, str], *, objective: Family, scale: float = 1) -> PairData:
    def read(split: str) -> PairSplit:
        table = pq.read_table(PAIRS / name / f"{split}.parquet")
        scored = next((column for column in ("score", "label") if column in table.column_names), None)
        scores = None if scored is None else np.array(table[scored].to_pylist(), dtype=np.float64) / scale
        return PairSplit(tuple(table[column].to_pylist() for column in columns), scores, {})

    small = pairs_of(kind, objective=objective)
    splits = {split: read(split) for split in ("train", "validation", "test")}
    passages = [text for split in splits.values() for text in split.columns[1]]
    none = np.zeros(len(splits["test"]), dtype=np.bool_)
    corpus = list(dict.fromkeys(passages))
    return dataclasses.replace(small, **splits, corpus=corpus, pair_in_train=none, text_in_train=none)


def minilm() -> TextVectors:
    config = EncoderConfig(max_tokens=128)
    return TextVectors(Encoder(find_encoder(config, offline=True), config, CPU_FLOAT32))


@needs_pairs
def test_minilm_has_its_known_spearman_on_stsbenchmark() -> None:
    data = real_pairs("STSBenchmark", "scores", ("sentence1", "sentence2"), objective="text-matching", scale=5)
    assert measure_vectors(data, minilm(), widths=(64,)).arrays["main"] == pytest.approx([0.8203, 0.7921], abs=3e-4)


@needs_pairs
def test_minilm_is_as_wrong_on_dating_pairs_as_its_source_document_found() -> None:
    table = pq.read_table(PAIRS / "DatingCompatibility" / "test.parquet").to_pydict()
    test = PairSplit((table["sentence1"], table["sentence2"]), np.array(table["label"], dtype=np.float64), {})
    none = np.zeros(len(test), dtype=np.bool_)
    data = dataclasses.replace(pairs_of("labels"), test=test, pair_in_train=none, text_in_train=none)
    found = measure_vectors(data, minilm())
    scores = compare(data, found, found, run_id="one", config=EvaluateConfig(bootstrap_draws=100), seed=0)
    known = {"spearman": -0.2194, "margin": -0.0826, "auc": 0.3730, "f1_best_threshold": 0.6976}
    for metric, value in known.items():
        assert round(row_of(scores, metric).value, 4) == value, metric
    assert round(row_of(scores, "cohens_d").value, 3) == -0.419


@needs_pairs
@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (partial(real_pairs, "SICK2014", "scores", objective="text-matching", scale=5), 0.7715),
        (partial(real_pairs, "MRPC", "labels", objective="text-matching"), 0.8369),
    ],
)
def test_minilm_has_its_known_scores(read: Any, expected: float) -> None:
    data = read(columns=("sentence1", "sentence2"))
    assert measure_vectors(data, minilm()).arrays["main"] == pytest.approx([expected], abs=5e-4)


@needs_pairs
@pytest.mark.timeout(60)
def test_a_thousand_draws_of_sick_take_seconds() -> None:
    data = real_pairs("SICK2014", "scores", ("sentence1", "sentence2"), objective="text-matching", scale=5)
    assert data.test.scores is not None
    random = np.random.default_rng(0)
    states = [
        Measured((None,), {"similarity": (data.test.scores + noise * random.random(4927))[np.newaxis]})
        for noise in (1, 0.5)
    ]
    scores = compare(data, *states, run_id="run", config=EvaluateConfig(bootstrap_draws=1000), seed=0)
    frozen, adapted = row_of(scores, "spearman"), row_of(scores, "spearman", column="adapted")
    assert frozen.high is not None and adapted.low is not None and frozen.high < adapted.low
    assert scores.differences[0].p_value == pytest.approx(2 / 1001)
