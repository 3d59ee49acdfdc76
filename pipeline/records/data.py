"""Records of data sets: where they come from, and what was read."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pipeline.records.base import DataRevision, Family, Fraction, Loss, Record, TaskName


class CarvedTest(Record):
    """The part of train that becomes test if the data have no test split."""

    fraction: float = Field(gt=0, lt=0.5)
    """Fraction of the texts of each label."""
    seed: int = Field(ge=0)


def _renamed_source(source: object) -> object:
    return "files" if source == "parquet" else source  # the name in records of earlier versions


class MtebTask(Record):
    """A data set and its source, resolved from the config."""

    name: TaskName
    source: Annotated[Literal["hub", "mirror", "files", "package"], BeforeValidator(_renamed_source)]
    location: str
    """Hub data set, mirror folder, the user's training files, or package name."""
    test_location: str | None = None
    """The user's test files. None for other sources, and if ``test_split`` takes test from train."""
    test_split: CarvedTest | None = None
    revision: DataRevision
    """A commit, a package version, or ``sha256:…`` of the files once they have been read."""
    subset: str = "default"
    text_column: str = "text"
    label_column: str = "label"
    group_column: str | None = None
    """Texts with the same value in this column stay on one side of every split."""
    max_epochs: int = Field(ge=1)
    samples_per_label: int = Field(ge=1)
    """Texts per label in each of mteb's few-shot draws."""
    objective: Family = "classification"
    """Task family."""
    loss: Loss = "cross-entropy"
    columns: tuple[str, ...] = ()
    """Columns of texts, if an example has several: the two sides, then the given negatives."""
    score_column: str | None = None
    """Column of the similarity, or of the 0/1 label, of each pair. None: every pair is positive."""
    prefixes: tuple[str, str] | None = None
    """Texts put before each query and before each passage."""
    sides: Literal["query-passage"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """``query-passage``: one adapter for queries and another for passages."""
    slices: tuple[str, ...] = ()
    """Columns of test by whose values the scores are also given."""
    validation_location: str | None = None
    """The user's validation files. None: a slice of train."""
    corpus_location: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """The user's passages with ids. Then ``test_location`` holds queries, which ``qrels_location`` joins with them."""
    qrels_location: str | None = Field(default=None, exclude_if=lambda value: value is None)
    undecided: tuple[Literal["objective", "loss", "columns", "score_column"], ...] = Field(
        default=(), exclude_if=lambda value: not value
    )
    """Fields that the columns of the data decide, and that hold a guess until these have been read."""


class PairFaults(Record):
    """Pairs of some splits that are valid but weak. All of them are kept."""

    num_empty: int
    """Pairs of which a side is empty or white space."""
    num_identical: int
    """Pairs whose two sides are equal."""
    num_duplicates: int
    """Pairs that occur before, with the same score. In text matching, the order of the two sides does not count."""
    num_conflicts: int
    """Distinct pairs with more than one score or label."""


class PairSummary(Record):
    """Counts of the pairs of one MTEB task."""

    kind: Literal["scores", "labels", "positives"]
    """Meaning of the pairs: graded by a score, labelled 0 or 1, or all positive."""
    train: PairFaults
    """Counts of train and validation together."""
    test: PairFaults
    num_pair_in_train: int
    """Test pairs that stand word for word in train, in either order."""
    num_text_in_train: int
    """Test pairs of which a text also occurs in train."""
    num_passages: int
    """Passages that every query is searched in. 0 for text matching."""
    score_range: tuple[float, float] | None
    """Scores of the data that became 0 and 1. None without scores."""


class DataSummary(Record):
    """Sizes and warnings of the data of one MTEB task, before training."""

    num_train: int
    num_validation: int
    num_test: int
    label_names: tuple[str, ...]
    num_overlap: int
    """Test texts that also occur in train."""
    num_empty_train: int
    num_empty_test: int
    num_truncated_train: int
    num_truncated_test: int
    fingerprint: str
    """SHA-256 over the texts and labels of all splits, in order."""
    notes: tuple[str, ...]
    """Warnings about thin data, such as classes too small for a validation slice or missing from test."""
    label_counts: tuple[int, ...] = ()
    """Training texts per label, in the order of ``label_names``. Empty in results of older versions."""
    token_quantiles: tuple[int, ...] = ()
    """10th, 50th and 90th percentile of tokens per training text, cut at ``max_tokens``. Each is the length of a text.

    Empty in results of older versions."""
    test_fingerprint: str | None = None
    """Same hash as ``ScoreRow.test_sha256``. None in results of older versions."""
    pairs: PairSummary | None = Field(default=None, exclude_if=lambda value: value is None)
    """Counts of pairs, which then also are what ``num_train`` and the other numbers count. None for single texts."""


class LabelShare(Record):
    """Frequency of a label."""

    label: str
    share: Fraction
    """Fraction of the training texts with this label."""


class MtebTaskRow(Record):
    """Data and cost of one MTEB task in one run: one row of ``mteb_tasks.parquet``."""

    run_id: str
    mteb_task: str
    created_at: datetime
    """Time at which the run collected it, even if its result was reused from an earlier run."""
    num_train: int
    """Training texts, without the validation slice."""
    num_validation: int
    num_test: int
    num_classes: int
    label_shares: tuple[LabelShare, ...]
    """Label frequencies in train. Empty if an older version read the data."""
    tokens_p10: int | None
    """10th percentile of tokens per training text, cut at ``max_tokens``."""
    tokens_p50: int | None
    tokens_p90: int | None
    num_truncated_train: int
    """Texts of train and validation cut at ``max_tokens``."""
    num_overlap: int
    """Test texts that also occur in train."""
    fingerprint: str
    """SHA-256 over the texts and labels of all splits."""
    test_sha256: str | None
    """Same hash as ``ScoreRow.test_sha256``."""
    worker_seconds: float
    """Computing time of this run's worker. 0 if the result was reused from an earlier run."""
    gpu_seconds: float
    """``worker_seconds`` times the worker's fraction of a GPU."""
    peak_memory_bytes: int
    """Peak memory of the training, even if an earlier run did it."""
    reused_from: str | None
    """Run that computed the result, if not this one."""
