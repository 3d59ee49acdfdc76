"""The columns that an adapter adds to the output of a bulk job, and counts of their values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.adapter.description import FoundAdapter
from pipeline.bulk.records import BulkAdapter, BulkJob, BulkOptions, Receipt
from pipeline.bulk.texts import EMPTY, NO_ANSWERS, NOT_UTF8, NULL, LabelledTexts
from pipeline.bulk.vectors import TextVectors, VectorFormat
from pipeline.bulk_input.units import Unit
from pipeline.inference.engine import Answers


@dataclass(frozen=True)
class _AnswerColumns:
    """The new columns of some rows, with counts of their labels, reasons and missing vectors."""

    columns: list[pa.Array]
    labels: Counter[str]
    reasons: Counter[str]
    null_vectors: int


class AdapterColumns:
    """Makes the columns of one adapter."""

    def __init__(self, adapter: BulkAdapter, found: FoundAdapter, job: BulkJob) -> None:
        self.adapter = adapter
        self.options = job.options
        self.label_names = pa.array(found.label_names, pa.string())
        self.top_k = self.options.top_k
        self.format = vector_format(job, found.name)

    def fields(self) -> list[pa.Field]:
        """Return the fields of the columns, in the order of ``column_parts``."""
        kinds = {
            "label": pa.string(),
            "score": pa.float32(),
            "reason": pa.string(),
            "top_k": pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())])),
            "vector": None if self.format is None else self.format.kind,
        }
        return [pa.field(f"{self.adapter.name}_{part}", kinds[part]) for part in column_parts(self.options)]

    def answer(self, ids: npt.NDArray[np.int64], memory: LabelledTexts, index: int) -> _AnswerColumns:
        """Return the columns of some rows.

        Args:
            ids: Id of each row's text, as ``LabelledTexts.recognise`` returns it.
            memory: The answers for the texts.
            index: Position of this adapter in ``memory.answers``.
        """
        has_vector = np.zeros(len(ids), dtype=np.bool_)
        if self.format is not None:
            vectors, has_vector = _vectors(ids, memory.vectors[index])
        if not self.options.labels:
            reasons = _reasons(ids, {"vector is not a number": (ids >= 0) & ~has_vector})
            return _AnswerColumns([vectors, reasons], Counter(), _counted(reasons), int((~has_vector).sum()))
        columns = self._labelled(ids, memory.answers[index])
        labels, reasons = columns[0], columns[2]
        if self.format is not None:
            columns.append(vectors)
        return _AnswerColumns(columns, _counted(labels), _counted(reasons), int((~has_vector).sum()))

    def _labelled(self, ids: npt.NDArray[np.int64], answers: Answers | None) -> list[pa.Array]:
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
        below = f"score below {threshold:g}" if threshold is not None else ""
        reasons = _reasons(ids, {below: low, "score is not a number": overflow})
        columns = [labels, pa.array(scores, pa.float32(), mask=~has_score), reasons]
        if self.top_k > 1:
            columns.append(self._top(answers, safe, has_score))
        return columns

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


def column_parts(options: BulkOptions) -> list[str]:
    """Return the endings of the columns that each adapter adds, after ``<name>_``, in their order."""
    parts = ["label", "score", "reason", *(["top_k"] if options.top_k > 1 else [])] if options.labels else []
    return [*parts, *(["vector"] if options.vectors is not None else []), *([] if options.labels else ["reason"])]


def vector_format(job: BulkJob, name: str) -> VectorFormat | None:
    """Return the format of an adapter's vectors. None for a job without vectors."""
    options = job.options.vectors
    return None if options is None else VectorFormat(options, limit=job.limits.get(name, 1.0))


def _vectors(ids: npt.NDArray[np.int64], memory: TextVectors) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    """Return the column of vectors of some rows, and whether each row has one."""
    has_vector = ids >= 0
    if not len(memory.finite):  # every text of the unit is null
        nothing = np.zeros((len(ids), memory.numbers.shape[1]), dtype=memory.numbers.dtype)
        return memory.format.column(nothing, is_null=~has_vector), has_vector
    safe = np.where(has_vector, ids, 0)
    has_vector &= memory.finite[safe]
    return memory.format.column(memory.numbers[safe], is_null=~has_vector), has_vector


def _reasons(ids: npt.NDArray[np.int64], others: Mapping[str, npt.NDArray[np.bool_]]) -> pa.Array:
    """Return the column of reasons. ``others`` maps each further reason to the rows it applies to."""
    cases = {"text is null": ids == NULL, "text is empty": ids == EMPTY, "text is not UTF-8": ids == NOT_UTF8, **others}
    why = np.select(list(cases.values()), list(range(len(cases))), default=-1)
    return pa.array(list(cases), pa.string()).take(pa.array(why, mask=why < 0))


@dataclass
class Tally:
    """Counts over the rows of a unit, for its receipt."""

    names: list[str]
    rows: int = 0
    truncated: int = 0
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    null_labels: Counter[str] = field(default_factory=Counter)
    null_vectors: Counter[str] = field(default_factory=Counter)

    def count(self, name: str, answered: _AnswerColumns) -> None:
        """Add the labels, the reasons and the missing vectors of one block of rows, for one adapter."""
        self.labels.setdefault(name, Counter()).update(answered.labels)
        self.reasons.update(answered.reasons)
        self.null_labels[name] += answered.reasons.total()
        self.null_vectors[name] += answered.null_vectors

    def receipt(
        self, unit: Unit, memory: LabelledTexts, options: BulkOptions, *, version: str, content: str, seconds: float
    ) -> Receipt:
        """Return the receipt of a finished unit."""
        labelled, embedded = (self.names if wanted else [] for wanted in (options.labels, options.vectors is not None))
        inexact = options.vectors is not None and options.vectors.dtype != "float32"
        return Receipt(
            unit=unit.number,
            version=version,
            content=content,
            rows=self.rows,
            null_labels={name: self.null_labels[name] for name in labelled},
            reasons=dict(self.reasons),
            truncated=self.truncated,
            duplicates=memory.duplicates,
            labels={name: dict(self.labels.get(name, {})) for name in labelled},
            null_vectors={name: self.null_vectors[name] for name in embedded},
            vector_loss={name: vectors.loss() for name, vectors in zip(self.names, memory.vectors, strict=True)}
            if inexact
            else {},
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
