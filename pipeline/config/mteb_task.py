"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.values import NAME_IN_WORDS, Section, like


def _checked_location(location: str) -> str:
    if "::" in location:
        raise ValueError("expected a path or one URL, without '::'")
    return location


_Name = Annotated[str, Field(min_length=1)]


_Location = Annotated[_Name, AfterValidator(_checked_location)]


class MtebTaskConfig(Section):
    """One data set: a task that mteb knows, one of the quickstart's, or files of your own."""

    name: Annotated[str, like(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", NAME_IN_WORDS)]
    """Also the name of a folder, of files and of columns, so it is short and plain."""
    max_epochs: int | None = Field(default=None, ge=1, le=10_000)
    """Overrides ``train.max_epochs``."""
    subset: str | None = None
    """Of a multilingual task; English where left out."""
    train: _Location | None = None
    """Your training texts: a CSV, TSV, JSON Lines or Parquet file (perhaps .gz), a folder or a glob of them, or a URL (``s3://…``)."""
    test: _Location | None = None
    """Your test texts, likewise. Default: ``test_fraction`` of the training texts."""
    text_column: _Name | None = None
    """Only for your own files. Default: ``text``."""
    label_column: _Name | None = None
    """Only for your own files. Default: ``label``. Strings, whole numbers or booleans, one for each text."""
    group_column: _Name | None = None
    """Only for your own files. Texts with the same value here (a customer, a thread) stay on one side of every split."""
    test_fraction: float | None = Field(default=None, gt=0, lt=0.5)
    """Share of each label that becomes test where ``test`` is not set. Default: 0.2. Near-equal texts stay on one side."""
    test_seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Another one chooses other test texts. Default: 0. ``train.seed`` has no say in it, so that the scores of several can be compared."""

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> MtebTaskConfig:
        of_files = ("test", "text_column", "label_column", "group_column", "test_fraction", "test_seed")
        given = [key for key in of_files if getattr(self, key) is not None]
        if self.train is None and given:
            raise ValueError(
                f"{' and '.join(given)} {_have(given)} an effect only with train, which names your own files"
            )
        carving = [key for key in given if key.startswith("test_")]
        if self.test is not None and carving:
            raise ValueError(
                f"{' and '.join(carving)} {_have(carving)} no effect beside test; leave out one or the other"
            )
        return self


def _have(keys: Sequence[str]) -> str:
    return "has" if len(keys) == 1 else "have"
