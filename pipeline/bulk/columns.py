"""The columns that an adapter adds to the output of a bulk job, and counts of their values."""

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
from pipeline.bulk_input.units import Unit
from pipeline.inference.engine import Answers


@dataclass(frozen=True)
class _AnswerColumns:
    """The new columns of some rows, with counts of their labels and reasons."""

    columns: list[pa.Array]
    labels: Counter[str]
    reasons: Counter[str]


class AdapterColumns:
    """Makes the columns of one adapter."""

    def __init__(self, adapter: BulkAdapter, found: FoundAdapter, top_k: int) -> None:
        self.adapter = adapter
        self.label_names = pa.array(found.label_names, pa.string())
        self.top_k = top_k

    def fields(self) -> list[pa.Field]:
        """Return the fields of the columns: label, score, reason, and with ``top_k`` above 1 the top labels."""
        name = self.adapter.name
        fields = [(f"{name}_label", pa.string()), (f"{name}_score", pa.float32()), (f"{name}_reason", pa.string())]
        if self.top_k > 1:
            fields.append((f"{name}_top_k", pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))))
        return [pa.field(*parts) for parts in fields]

    def answer(self, ids: npt.NDArray[np.int64], memory: LabelledTexts, index: int) -> _AnswerColumns:
        """Return the columns of some rows.

        Args:
            ids: Id of each row's text, as ``LabelledTexts.recognise`` returns it.
            memory: The answers for the texts.
            index: Position of this adapter in ``memory.answers``.
        """
        answers = memory.answers[index]
        assert answers is not None
        threshold = self.adapter.threshold
        has_text = ids >= 0
        safe = np.where(has_text, ids, 0)
        if not len(answers.labels):  # every text of the unit is null
            answers, safe = NO_ANSWERS, np.zeros_like(ids)
        scores, overflow = answers.scores[safe], has_text & ~answers.finite[safe]
        has_score = has_text & ~overflow
        low = has_score & (scores < threshold) if threshold is not None else np.zeros(len(ids), dtype=np.bool_)
        labels = self.label_names.take(pa.array(answers.labels[safe], mask=~has_score | low))
        why = np.select([ids == NULL, ids == EMPTY, ids == NOT_UTF8, low, overflow], [0, 1, 2, 3, 4], default=-1)
        below = f"score below {threshold:g}" if threshold is not None else ""
        wording = pa.array(
            ["text is null", "text is empty", "text is not UTF-8", below, "score is not a number"], pa.string()
        )
        reasons = wording.take(pa.array(why, mask=why < 0))
        columns = [labels, pa.array(scores, pa.float32(), mask=~has_score), reasons]
        if self.top_k > 1:
            columns.append(self._top(answers, safe, has_score))
        return _AnswerColumns(columns, _counted(labels), _counted(reasons))

    def _top(self, answers: Answers, safe: npt.NDArray[np.int64], has_score: npt.NDArray[np.bool_]) -> pa.Array:
        width = answers.top_labels.shape[1]
        rows = safe[has_score]
        flat = pa.StructArray.from_arrays(
            [
                self.label_names.take(pa.array(answers.top_labels[rows].ravel())),
                pa.array(answers.top_scores[rows].ravel(), pa.float32()),
            ],
            names=["label", "score"],
        )
        offsets = np.concatenate([[0], np.cumsum(np.where(has_score, width, 0))]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), flat, mask=pa.array(~has_score))


@dataclass
class Tally:
    """Counts over the rows of a unit, for its receipt."""

    names: list[str]
    rows: int = 0
    truncated: int = 0
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    null_labels: Counter[str] = field(default_factory=Counter)

    def count(self, name: str, answered: _AnswerColumns) -> None:
        """Add the labels and the reasons of one block of rows, for one adapter."""
        self.labels.setdefault(name, Counter()).update(answered.labels)
        self.reasons.update(answered.reasons)
        self.null_labels[name] += answered.reasons.total()

    def receipt(self, unit: Unit, memory: LabelledTexts, *, version: str, content: str, seconds: float) -> Receipt:
        """Return the receipt of a finished unit."""
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
