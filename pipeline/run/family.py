"""The work that differs between task families: data, baseline, objective and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.objectives.objective import Objective
from pipeline.records import (
    AdapterRef,
    Calibration,
    Comparison,
    Confusion,
    DataSummary,
    Difference,
    MtebTask,
    ScoreRow,
    SimilarityCounts,
    ValueRow,
)
from pipeline.run.inputs import JobInputs
from pipeline.store.run_folder import TaskFolder
from pipeline.training.train import AdapterTraining


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured for one MTEB task, of the frozen and of the adapted encoder."""

    values: tuple[ValueRow, ...]
    few_shot: dict[str, Any]
    """mteb's own results of few-shot columns, by column. Empty if none was measured."""
    scores: tuple[ScoreRow, ...] = ()
    """Rows of ``scores.parquet``. Only classifiers have them."""
    probe_c: float | None = None
    comparison: Comparison | None = None
    differences: tuple[Difference, ...] = ()
    similarities: tuple[SimilarityCounts, ...] = ()
    calibration: Calibration | None = None
    confusions: tuple[Confusion, ...] = ()
    notes: tuple[str, ...] = ()
    """Numbers that are not given, and why, one sentence each."""


class FamilyWork(ABC):
    """The work of one task family on one MTEB task. Data and vectors are read at first use, and kept."""

    def __init__(self, inputs: JobInputs) -> None:
        self.inputs = inputs

    @property
    @abstractmethod
    def task(self) -> MtebTask:
        """The MTEB task, with the revision of the data that was read."""

    @abstractmethod
    def load(self) -> DataSummary:
        """Read and tokenise the data."""

    @abstractmethod
    def texts_to_reload(self) -> Sequence[str]:
        """Test texts on which the saved adapter is compared with the trained one."""

    @abstractmethod
    def frozen(self) -> tuple[ValueRow, ...]:
        """Measure the frozen encoder, once, even after a restart. Must be called before an adapter is attached."""

    @abstractmethod
    def objective(self) -> Objective:
        """Make the objective of the training."""

    @abstractmethod
    def evaluate(self, training: AdapterTraining, adapter: AdapterRef, folder: TaskFolder) -> Evaluation:
        """Measure the adapted encoder, and write the family's own files into the adapter's folder."""
