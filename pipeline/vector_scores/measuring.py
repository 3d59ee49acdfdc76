"""Measurement of one state of an encoder on the test set of a task: by pair, by query or by text, at every width."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from sklearn.metrics.pairwise import paired_cosine_distances

from pipeline.adapter.sided import SidedAdapter, Trainable
from pipeline.data.dataset import TaskData
from pipeline.encoder.encoder import FloatArray
from pipeline.errors import DataError
from pipeline.evaluation.few_shot import few_shot
from pipeline.evaluation.mteb_runs import Side, run_mteb
from pipeline.evaluation.vectors import TextVectors
from pipeline.pairs.data import PairData, PairSplit
from pipeline.pairs.filled_tasks import SearchData, clustering_task, pair_task, query_ids, search_data, search_task
from pipeline.records import SIDES
from pipeline.vector_scores.cluster_metrics import silhouettes, v_measure
from pipeline.vector_scores.pair_metrics import average_precision, spearman

Kind = Literal["scores", "labels", "positives", "separation"]
"""Kind of the data, which decides how vectors are measured."""

MAIN_METRICS: dict[Kind, str] = {
    "scores": "spearman",
    "labels": "average_precision",
    "positives": "ndcg_at_10",
    "separation": "v_measure",
}
"""Main metric of each kind of data."""

SEARCH_METRICS = ("ndcg_at_10", "recall_at_1", "recall_at_10", "mrr_at_10")
"""Metrics of a search, each a mean over the queries."""

_TOLERANCE = 1e-6
_ROUNDED = 6e-6  # mteb rounds its scores of a search to five digits


@dataclass(frozen=True)
class Measured:
    """Scores of one state of an encoder on test, by item and width, as a paired comparison needs them."""

    widths: tuple[int | None, ...]
    """Numbers of leading dimensions, the first axis of the arrays below. The first is None: all dimensions."""
    arrays: dict[str, npt.NDArray[Any]]
    """Arrays by name.

    ``main``: main metric on all of test, equal to mteb's, float64 (widths,).
    Scores and labels: ``similarity``, cosine of each test pair, float64 (widths, num_test). Labels also:
    ``validation_similarity``, float64 (widths, num_validation).
    Positives: each of ``SEARCH_METRICS`` by query, float64 (widths, queries).
    Separation: ``clusters``, int32 (widths, clusterings, texts), ``times_drawn``, how often mteb drew each text for
    each clustering, int32 (clusterings, texts), ``silhouette``, float64 (widths, texts), and ``few_shot_accuracy`` of
    each draw, float64 (widths, draws)."""

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """All content as arrays, as safetensors stores them. ``widths`` is int64, with 0 for None."""
        return {"widths": np.array([width or 0 for width in self.widths], dtype=np.int64), **self.arrays}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Build a measurement from the arrays of ``tensors``."""
        arrays = {name: array for name, array in tensors.items() if name != "widths"}
        return cls(tuple(int(width) or None for width in tensors["widths"]), arrays)


@dataclass(frozen=True)
class SideTexts:
    """Texts of each side that a measurement of pairs embeds, with their prefixes."""

    first: list[str]
    """Queries, or first texts of the pairs."""
    second: list[str]
    """Passages, or second texts of the pairs."""


def kind_of(data: PairData | TaskData) -> Kind:
    """Kind of the data of a task."""
    return data.kind if isinstance(data, PairData) else "separation"


def side_texts(data: PairData) -> SideTexts:
    """List the texts of each side that ``measure_vectors`` embeds.

    Where each side has an encoder state of its own, the caller embeds each list while its state is active. The
    measurement then finds all vectors in ``TextVectors``.
    """
    if data.kind == "positives":
        search = search_data(data)
        return SideTexts(_prefixed(data, search.queries, side=0), _prefixed(data, search.passages, side=1))
    splits = (data.test, data.validation) if data.kind == "labels" else (data.test,)
    first, second = ([text for split in splits for text in split.columns[side]] for side in (0, 1))
    return SideTexts(_prefixed(data, first, side=0), _prefixed(data, second, side=1))


def measure_vectors(
    data: PairData | TaskData,
    vectors: TextVectors,
    *,
    second: TextVectors | None = None,
    widths: Sequence[int] = (),
) -> Measured:
    """Measure unit vectors on test through mteb's evaluator, at full width and at each smaller width.

    Args:
        data: Pairs, or for separation texts and labels.
        vectors: Vectors of texts, for pairs those of the first side.
        second: Vectors of the second side. None: those of the first.
        widths: Numbers of leading dimensions. The full width may be among them.
    Raises: DataError: test has one score or one label only, so that nothing can be measured.
    """
    every = (None, *sorted({width for width in widths if width != vectors.width}, reverse=True))
    if isinstance(data, TaskData):
        _check_varied(data.task.name, data.test_labels, "label")
        return Measured(every, _measure_texts(data, vectors, every))
    sides = _Sides(data, vectors, second or vectors)
    if data.kind == "positives":
        return Measured(every, _measure_search(data, sides, every))
    assert data.test.scores is not None, "pairs without scores are searched"
    _check_varied(data.task.name, data.test.scores, "score" if data.kind == "scores" else "label")
    return Measured(every, _measure_pairs(data, sides, every))


def measure_adapter(data: PairData | TaskData, adapter: Trainable, *, widths: Sequence[int] = ()) -> Measured:
    """Measure an encoder with the adapter that is attached to it, or with that of each side.

    Args:
        data: As for ``measure_vectors``.
        adapter: The adapter.
        widths: Numbers of leading dimensions.
    Raises: DataError: as ``measure_vectors``.
    """
    if not isinstance(adapter, SidedAdapter):
        return measure_vectors(data, TextVectors(adapter.encoder), widths=widths)
    assert isinstance(data, PairData), "only pairs have sides"
    texts, vectors = side_texts(data), (TextVectors(adapter.encoder), TextVectors(adapter.encoder))
    for side, of_side, embed in zip(SIDES, (texts.first, texts.second), vectors, strict=True):
        adapter.use(side)
        embed(of_side)
    return measure_vectors(data, vectors[0], second=vectors[1], widths=widths)


@dataclass(frozen=True)
class _Sides:
    """Vectors of both sides of pairs."""

    data: PairData
    first: TextVectors
    second: TextVectors

    def embed(self, texts: Sequence[str], side: Side | None, *, width: int | None) -> FloatArray:
        is_second = side == "document"
        prefixed = _prefixed(self.data, texts, side=int(is_second))
        return (self.second if is_second else self.first).unit(prefixed, width=width)

    def similarity(self, split: PairSplit, width: int | None) -> npt.NDArray[np.float64]:
        """Cosine of each pair, computed as mteb does, to the last bit: other rounding changes ties, and so ranks."""
        if not len(split):
            return np.empty(0)
        one, other = (
            self.embed(split.columns[0], "query", width=width),
            self.embed(split.columns[1], "document", width=width),
        )
        return (1 - paired_cosine_distances(one, other)).astype(np.float64)


def _measure_pairs(data: PairData, sides: _Sides, widths: Sequence[int | None]) -> dict[str, Any]:
    mteb_task = pair_task(data)
    key, metric = ("cosine_spearman", spearman) if data.kind == "scores" else ("cosine_ap", average_precision)
    whole, gold = np.ones((len(data.test), 1)), data.test.scores
    assert gold is not None, "pairs without scores are searched"
    main, similarities = [], []
    for width in widths:
        similarity = sides.similarity(data.test, width)
        score = run_mteb(mteb_task, partial(sides.embed, width=width)).scores[key]
        (own,) = metric(whole, gold=gold, series=similarity[np.newaxis])[:, 0]
        # mteb's correlation of similarities that are all equal is not a number. Ours is 0.
        main.append(_agreed(own, own if math.isnan(score) else score, _TOLERANCE))
        similarities.append(similarity)
    arrays = {"main": np.array(main), "similarity": np.stack(similarities)}
    if data.kind == "labels":
        arrays["validation_similarity"] = np.stack([sides.similarity(data.validation, width) for width in widths])
    return arrays


def _measure_search(data: PairData, sides: _Sides, widths: Sequence[int | None]) -> dict[str, Any]:
    search = search_data(data)
    mteb_task = search_task(data.task, search)
    passages = {str(number): passage for number, passage in enumerate(search.passages)}
    texts_by_id = dict(zip(query_ids(search), search.queries, strict=True)) | passages
    main, found = [], []
    for width in widths:
        embed = partial(sides.embed, width=width)
        run = run_mteb(mteb_task, embed, texts_by_id=texts_by_id, keep_predictions=True)
        found.append(_scores_by_query(search, run.predictions))
        main.append(_agreed(found[-1]["ndcg_at_10"].mean(), run.scores["ndcg_at_10"], _ROUNDED))
    return {"main": np.array(main)} | {name: np.stack([by_query[name] for by_query in found]) for name in found[0]}


def _scores_by_query(search: SearchData, results: dict[str, dict[str, float]]) -> dict[str, npt.NDArray[np.float64]]:
    """Metrics of a search by query, from mteb's ranked passages. Ties are in mteb's order: the larger id first."""
    discounts = 1 / np.log2(np.arange(2, 12))
    rows = np.zeros((len(search.queries), len(SEARCH_METRICS)))
    for row, own_id, right in zip(rows, query_ids(search), search.relevant, strict=True):
        ranking = sorted(((score, passage) for passage, score in results[own_id].items()), reverse=True)
        passages = [passage for _, passage in ranking if passage != own_id][:10]
        hits = np.zeros(10)
        hits[: len(passages)] = [int(passage) in right for passage in passages]
        first = int(hits.argmax())
        row[:] = (
            (hits * discounts).sum() / discounts[: len(right)].sum(),
            hits[0] / len(right),
            hits.sum() / len(right),
            hits[first] / (first + 1),
        )
    return dict(zip(SEARCH_METRICS, rows.T, strict=True))


def _measure_texts(data: TaskData, vectors: TextVectors, widths: Sequence[int | None]) -> dict[str, Any]:
    mteb_task = clustering_task(data)
    texts, labels = data.test_texts, data.test_labels
    times_drawn = _times_drawn(mteb_task, len(texts))
    main, clusters, silhouette, accuracies = [], [], [], []
    for width in widths:
        run = run_mteb(mteb_task, partial(_unit, vectors, width=width), keep_predictions=True)
        assigned = _assigned(mteb_task, run.predictions["Level 0"], len(texts))
        (own,) = v_measure(
            np.ones((len(texts), 1)), labels=labels, clusters=assigned[np.newaxis], times_drawn=times_drawn
        )[:, 0]
        main.append(_agreed(own, run.scores["v_measure"], _TOLERANCE))
        clusters.append(assigned)
        silhouette.append(silhouettes(vectors.unit(texts, width=width), labels))
        draws = few_shot(data.mteb_task, vectors, width=width or vectors.width)[1]["scores"]["test"][0]
        accuracies.append([draw["accuracy"] for draw in draws["scores_per_experiment"]])
    return {
        "main": np.array(main),
        "clusters": np.stack(clusters),
        "times_drawn": times_drawn,
        "silhouette": np.stack(silhouette),
        "few_shot_accuracy": np.array(accuracies),
    }


def _unit(vectors: TextVectors, texts: list[str], side: Side | None, *, width: int | None) -> FloatArray:
    return vectors.unit(texts, width=width)


def _samples(mteb_task: Any, num_texts: int) -> list[list[int]]:
    """Texts that mteb draws for each of its clusterings, with replacement, from its own seed."""
    state = random.Random(mteb_task.seed)
    size = mteb_task.max_documents_per_cluster
    return [state.choices(range(num_texts), k=size) for _ in range(mteb_task.n_clusters)]


def _times_drawn(mteb_task: Any, num_texts: int) -> npt.NDArray[np.int32]:
    samples = _samples(mteb_task, num_texts)
    return np.stack([np.bincount(sample, minlength=num_texts) for sample in samples]).astype(np.int32)


def _assigned(mteb_task: Any, predicted: list[list[int]], num_texts: int) -> npt.NDArray[np.int32]:
    """Cluster of each text in each of mteb's clusterings, int32 (clusterings, texts). 0 if it was not drawn."""
    assigned = np.zeros((len(predicted), num_texts), dtype=np.int32)
    for row, sample, clusters in zip(assigned, _samples(mteb_task, num_texts), predicted, strict=True):
        row[sample] = clusters
    return assigned


def _prefixed(data: PairData, texts: Sequence[str], *, side: int) -> list[str]:
    prefix = data.task.prefixes[side] if data.task.prefixes else ""
    return [prefix + text for text in texts]


def _check_varied(name: str, values: npt.NDArray[Any], noun: str) -> None:
    """Raises: DataError: all values are equal."""
    if len(np.unique(values)) < 2:
        raise DataError(
            f"{name}: expected two different {noun}s in test, found one {noun} for all of {len(values)}; "
            f"add test rows with another {noun}"
        )


def _agreed(own: float, of_mteb: float, tolerance: float) -> float:
    """Return our value, which has all digits. Raises: AssertionError: mteb's differs."""
    assert abs(own - of_mteb) <= tolerance, f"own score {own}, mteb's {of_mteb}"
    return float(own)
