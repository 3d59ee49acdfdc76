"""Metrics of two measurements of vectors, as functions of the weights of the test items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.data.dataset import TaskData
from pipeline.pairs.data import PairData
from pipeline.records import ValueColumn
from pipeline.vector_scores import pair_metrics
from pipeline.vector_scores.cluster_metrics import v_measure
from pipeline.vector_scores.measuring import MAIN_METRICS, SEARCH_METRICS, Measured, kind_of
from pipeline.vector_scores.parts import Part
from pipeline.vector_scores.resampling import Statistic

COLUMNS: tuple[ValueColumn, ValueColumn] = ("frozen", "adapted")
"""Columns of the encoder states, in the order of the series."""


@dataclass(frozen=True)
class Series:
    """One encoder state at one width."""

    column: ValueColumn
    width: int | None
    """Number of leading dimensions. None: all."""


@dataclass(frozen=True)
class BothMeasured:
    """Measurements of the frozen and of the adapted encoder on the same data, at the same widths."""

    data: PairData | TaskData
    frozen: Measured
    adapted: Measured
    learnt_validation: bool = False
    """Whether the adapter was trained on the validation pairs too, so that they cannot choose thresholds."""

    def __post_init__(self) -> None:
        assert self.frozen.widths == self.adapted.widths, f"widths {self.frozen.widths} and {self.adapted.widths}"

    @property
    def main_metric(self) -> str:
        """Name of the main metric."""
        return MAIN_METRICS[kind_of(self.data)]

    def widths(self, part: Part) -> tuple[int | None, ...]:
        """Widths at which a part of test is scored: full width for a user's slice, all for other parts."""
        return self.frozen.widths[:1] if part.is_user_slice else self.frozen.widths

    def series(self, part: Part) -> tuple[Series, ...]:
        """Series of a part: the frozen encoder at all its widths, then the adapted one."""
        return tuple(Series(column, width) for column in COLUMNS for width in self.widths(part))

    def statistics(self, part: Part) -> dict[str, Statistic]:
        """Metrics by name, as functions of the weights of the part's items, with the series of ``series``."""
        thresholds = self.thresholds and {n: self._at_widths(found, part) for n, found in self.thresholds.items()}
        arrays = partial(self._arrays, part=part)
        return statistics_of(self.data, part, arrays, thresholds, times_drawn=self.frozen.arrays.get("times_drawn"))

    @cached_property
    def thresholds(self) -> dict[str, npt.NDArray[np.float64]] | None:
        """Thresholds of F1 and of accuracy that are best on validation, float64 (columns, widths).

        None if the pairs have no labels, if validation does not have both labels, or if the adapter has learnt it.
        """
        if not isinstance(self.data, PairData) or self.data.kind != "labels" or self.learnt_validation:
            return None
        gold = self.data.validation.scores
        if gold is None or len(np.unique(gold)) < 2:
            return None
        similarities = np.stack([found.arrays["validation_similarity"] for found in (self.frozen, self.adapted)])
        return {name: _best(gold, similarities, metric=name)[0] for name in ("f1", "accuracy")}

    def best_f1_on_test(self) -> npt.NDArray[np.float64]:
        """F1 at the threshold that is best on test itself, float64 (columns, widths): an optimistic number."""
        assert isinstance(self.data, PairData) and self.data.test.scores is not None, "F1 needs labels"
        similarities = np.stack([found.arrays["similarity"] for found in (self.frozen, self.adapted)])
        return _best(self.data.test.scores, similarities, metric="f1")[1]

    def _arrays(self, name: str, part: Part) -> npt.NDArray[Any]:
        return self._at_widths(np.stack([found.arrays[name] for found in (self.frozen, self.adapted)]), part)

    def _at_widths(self, array: npt.NDArray[Any], part: Part) -> npt.NDArray[Any]:
        """Turn an array (columns, widths, ...) into one of the series of a part, (series, ...)."""
        chosen = array[:, : len(self.widths(part))]
        return chosen.reshape(-1, *chosen.shape[2:])


def statistics_of(
    data: PairData | TaskData,
    part: Part,
    arrays: Callable[[str], npt.NDArray[Any]],
    thresholds: Mapping[str, npt.NDArray[np.float64]] | None,
    *,
    times_drawn: npt.NDArray[Any] | None = None,
) -> dict[str, Statistic]:
    """Metrics of vectors by name, as functions of the weights of the items of a part.

    Args:
        data: The data that was measured.
        part: Part of test.
        arrays: Function from a name of ``Measured.arrays`` to the arrays of all series, (series, ..., items of test).
        thresholds: Thresholds of ``f1`` and ``accuracy``, (series,). None leaves these metrics out.
        times_drawn: As in ``Measured.arrays``, for texts with labels.
    """
    if isinstance(data, TaskData):
        assert times_drawn is not None, "texts with labels are clustered"
        return {
            "v_measure": partial(
                v_measure,
                labels=data.test_labels[part.mask],
                clusters=arrays("clusters")[..., part.mask],
                times_drawn=times_drawn[:, part.mask],
            ),
            "silhouette": partial(pair_metrics.mean, series=arrays("silhouette")[:, part.mask]),
        }
    if data.kind == "positives":
        return {name: partial(pair_metrics.mean, series=arrays(name)[:, part.mask]) for name in SEARCH_METRICS}
    assert data.test.scores is not None, "pairs without scores are searched"
    given: dict[str, Any] = {"gold": data.test.scores[part.mask], "series": arrays("similarity")[:, part.mask]}
    if data.kind == "scores":
        return {
            "spearman": partial(pair_metrics.spearman, **given),
            "pearson": partial(pair_metrics.pearson, **given),
        }
    statistics: dict[str, Statistic] = {
        "average_precision": partial(pair_metrics.average_precision, **given),
        "auc": partial(pair_metrics.auc, **given),
        "spearman": partial(pair_metrics.spearman, **given),
        "margin": partial(pair_metrics.margin, **given),
        "cohens_d": partial(pair_metrics.cohens_d, **given),
    }
    if thresholds is not None:
        statistics["f1"] = partial(pair_metrics.f1, thresholds=thresholds["f1"], **given)
        statistics["accuracy"] = partial(pair_metrics.accuracy, thresholds=thresholds["accuracy"], **given)
    return statistics


def _best(
    gold: npt.NDArray[np.float64], similarities: npt.NDArray[np.float64], *, metric: Literal["f1", "accuracy"]
) -> npt.NDArray[np.float64]:
    """Best threshold and its metric, float64 (2, columns, widths), by similarities (columns, widths, pairs)."""
    every = [pair_metrics.best_threshold(gold, row, metric=metric) for rows in similarities for row in rows]
    found = [(best.threshold, best.value) for best in every if best is not None]
    assert len(found) == len(every), "one label only"
    return np.array(found).T.reshape(2, *similarities.shape[:2])
