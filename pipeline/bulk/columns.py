"""The columns that an adapter adds to the rows of a bulk job, and the counts of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.adapter.description import FoundAdapter
from pipeline.bulk.records import BulkAdapter, Receipt
from pipeline.bulk.texts import EMPTY, NO_ANSWERS, NOT_UTF8, NULL, LabelledTexts
from pipeline.bulk.units import Unit
from pipeline.inference.engine import Answers


@dataclass(frozen=True)
class _Answered:
    columns: list[pa.Array]
    labels: Counter[str]
    reasons: Counter[str]


class AdapterColumns:
    """What one adapter adds to the output."""

    def __init__(self, adapter: BulkAdapter, found: FoundAdapter, top_k: int) -> None:
        self.adapter = adapter
        self.label_names = pa.array(found.label_names, pa.string())
        self.top_k = top_k

    def fields(self) -> list[pa.Field]:
        """Label, score, reason, and the top labels where asked for."""
        name = self.adapter.name
        fields = [(f"{name}_label", pa.string()), (f"{name}_score", pa.float32()), (f"{name}_reason", pa.string())]
        if self.top_k > 1:
            fields.append((f"{name}_top_k", pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))))
        return [pa.field(*parts) for parts in fields]

    def answer(self, ids: npt.NDArray[np.int64], memory: LabelledTexts, index: int) -> _Answered:
        """The columns for rows with these ids."""
        known = memory.answers[index]
        assert known is not None
        there = ids >= 0
        safe = np.where(there, ids, 0)
        if not len(known.labels):  # a unit of nulls
            known, safe = NO_ANSWERS, np.zeros_like(ids)
        scores, overflow = known.scores[safe], there & ~known.finite[safe]
        there &= ~overflow
        low = (
            there & (scores < self.adapter.threshold)
            if self.adapter.threshold is not None
            else np.zeros(len(ids), dtype=np.bool_)
        )
        labels = self.label_names.take(pa.array(known.labels[safe], mask=~there | low))
        why = np.select([ids == NULL, ids == EMPTY, ids == NOT_UTF8, low, overflow], [0, 1, 2, 3, 4], default=-1)
        threshold = self.adapter.threshold
        below = f"score below {threshold:g}" if threshold is not None else ""
        wording = pa.array(
            ["text is null", "text is empty", "text is not UTF-8", below, "score is not a number"], pa.string()
        )
        reasons = wording.take(pa.array(why, mask=why < 0))
        columns = [labels, pa.array(scores, pa.float32(), mask=~there), reasons]
        if self.top_k > 1:
            columns.append(self._top(known, safe, there))
        return _Answered(columns, _counted(labels), _counted(reasons))

    def _top(self, known: Answers, safe: npt.NDArray[np.int64], there: npt.NDArray[np.bool_]) -> pa.Array:
        width = known.top_labels.shape[1]
        rows = safe[there]
        flat = pa.StructArray.from_arrays(
            [
                self.label_names.take(pa.array(known.top_labels[rows].ravel())),
                pa.array(known.top_scores[rows].ravel(), pa.float32()),
            ],
            names=["label", "score"],
        )
        offsets = np.concatenate([[0], np.cumsum(np.where(there, width, 0))]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), flat, mask=pa.array(~there))


@dataclass
class Tally:
    """Counts for the receipt."""

    names: list[str]
    rows: int = 0
    truncated: int = 0
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    null_labels: Counter[str] = field(default_factory=Counter)

    def count(self, name: str, answered: _Answered) -> None:
        """Add the labels and the reasons of one block to the counts of an adapter."""
        self.labels.setdefault(name, Counter()).update(answered.labels)
        self.reasons.update(answered.reasons)
        self.null_labels[name] += answered.reasons.total()

    def receipt(self, unit: Unit, memory: LabelledTexts, *, version: str, content: str, seconds: float) -> Receipt:
        """The receipt of a finished unit, with these counts."""
        return Receipt(
            unit=unit.number,
            version=version,
            content=content,
            rows=self.rows,
            null_labels={name: self.null_labels[name] for name in self.names},
            reasons=dict(self.reasons),
            truncated=self.truncated,
            duplicates=memory.duplicates,
            labels={name: dict(self.labels.get(name, {})) for name in self.names},
            seconds=seconds,
        )


def _counted(values: pa.Array) -> Counter[str]:
    return Counter(
        {
            entry["values"]: entry["counts"]
            for entry in pc.value_counts(values).to_pylist()
            if entry["values"] is not None
        }
    )
