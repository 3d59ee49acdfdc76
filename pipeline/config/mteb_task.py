"""The configuration of one data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.values import NAME_IN_WORDS, NON_REPEATING, Section, like
from pipeline.records import LONGEST_PREFIX, OWN_SLICES, Family, Loss


def _not_one_of_ours(name: str) -> str:
    if name in OWN_SLICES:
        raise ValueError(f"{name} is a slice that lorafleet reports by itself; rename the column")
    return name


def _checked_location(location: str) -> str:
    if "::" in location:
        raise ValueError("expected a path or one URL, without '::'")
    return location


_Name = Annotated[str, Field(min_length=1)]
# Also a value in a table of scores, where lorafleet has slices of its own.
_SliceName = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_not_one_of_ours)]
_Prefix = Annotated[str, Field(max_length=LONGEST_PREFIX)]
_Location = Annotated[_Name, AfterValidator(_checked_location)]


class MtebTaskConfig(Section):
    """One data set: a task of mteb, a task of the quickstart, or your own files."""

    name: Annotated[str, like(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", NAME_IN_WORDS)]
    """Name of the task. It also names folders, files and columns, so it must be short and plain."""
    max_epochs: int | None = Field(default=None, ge=1, le=10_000)
    """Overrides ``train.max_epochs``."""
    subset: str | None = None
    """Subset of a multilingual task. Default: English."""
    train: _Location | None = None
    """Your training texts: a CSV, TSV, JSON Lines or Parquet file, a folder or a glob of them, or a URL (``s3://…``).

    Files may be compressed (.gz)."""
    test: _Location | None = None
    """Your test texts, in the same formats. Default: ``test_fraction`` of the training texts."""
    validation: _Location | None = None
    """Your validation texts, in the same formats. Default: ``train.validation_fraction`` of the training texts."""
    objective: Family | None = None
    """Task family. Default: that of the mteb task, or for your own files the one that their columns fit.

    ``classification`` learns from texts with a label. ``separation`` does too, and trains no head. ``text-matching``
    learns from pairs of texts with a score, a 0/1 label or neither, ``retrieval`` from queries and their passages."""
    loss: Loss | None = None
    """Loss. Default: ``cross-entropy`` with a head, ``cosent`` for pairs with scores or labels, else ``infonce``."""
    columns: Annotated[tuple[_Name, ...], Field(min_length=2, max_length=16), *NON_REPEATING] | None = None
    """Columns of the texts of a pair: the two sides, then negatives. Only for your own files.

    Default: ``sentence1, sentence2``, or ``query, passage``, or ``anchor, positive``, and then each ``negative…``."""
    score_column: _Name | None = None
    """Column of the similarity, or of the 0/1 label, of each pair. Default: ``score``, ``similarity`` or ``label``."""
    sides: Literal["query-passage"] | None = None
    """``query-passage`` trains two adapters together, one for queries and one for passages. Default: one for both."""
    prefixes: Annotated[tuple[_Prefix, _Prefix], *NON_REPEATING] | None = None
    """Texts to put before each query and before each passage."""
    slices: Annotated[tuple[_SliceName, ...], Field(max_length=16), *NON_REPEATING] | None = None
    """Columns of the test file. The scores are also given for each of their values. Only for pairs."""
    corpus: _Location | None = None
    """Your passages with their ids, for retrieval: ``_id``, ``text`` and optionally ``title``.

    ``test`` then holds queries. Requires ``qrels``."""
    qrels: _Location | None = None
    """Relevant passages of each query of ``test``: ``query-id``, ``corpus-id`` and ``score``. Requires ``corpus``."""
    text_column: _Name | None = None
    """Column of the texts. Only for your own files. Default: ``text``."""
    label_column: _Name | None = None
    """Column of the labels: strings, whole numbers or booleans. Only for your own files. Default: ``label``."""
    group_column: _Name | None = None
    """Column of groups, such as customers or threads. Only for your own files.

    Texts of one group stay in one split."""
    test_fraction: float | None = Field(default=None, gt=0, lt=0.5)
    """Share of each label to use as test if ``test`` is not set. Default: 0.2. Near-equal texts stay on one side."""
    test_seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Seed of the choice of test texts. Default: 0.

    It is independent of ``train.seed``, so that runs with several seeds can be compared."""

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> MtebTaskConfig:
        file_keys: tuple[str, ...] = (
            "test",
            "validation",
            "text_column",
            "label_column",
            "group_column",
            "test_fraction",
            "test_seed",
        )
        file_keys += ("columns", "score_column", "corpus", "qrels")  # a mirror may have columns for slices too
        given = [key for key in file_keys if getattr(self, key) is not None]
        if self.train is None and given:
            raise ValueError(
                f"{' and '.join(given)} {_have(given)} an effect only with train, which names your own files"
            )
        split_keys = [key for key in given if key.startswith("test_")]
        if self.test is not None and split_keys:
            raise ValueError(
                f"{' and '.join(split_keys)} {_have(split_keys)} no effect together with test; set one or the other"
            )
        if (self.corpus is None) != (self.qrels is None) or (self.corpus is not None and self.test is None):
            raise ValueError("corpus, qrels and test, which names the queries, go together; set all three")
        return self


def _have(keys: Sequence[str]) -> str:
    return "has" if len(keys) == 1 else "have"
