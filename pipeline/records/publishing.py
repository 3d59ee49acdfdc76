"""Records of publications and of the gate before them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from pipeline.records.base import FilePath, Fraction, Record, RunId, Sha256, TaskName
from pipeline.records.refs import EncoderRef

Decision = Literal["promote", "keep", "block"]
"""Fate of a newly trained adapter: it replaces the published one, or not, or not and a person should look into it."""


class Publication(Record):
    """The content of ``publication.json``: the parts of a published repository."""

    run_id: RunId
    """Run that was published last. Adapters that this run does not have stay published."""
    lorafleet_version: str
    encoder: EncoderRef
    adapters: dict[TaskName, Sha256]
    """SHA-256 of the adapter of each MTEB task."""
    files: dict[FilePath, Sha256]
    """SHA-256 of every published file except this one, by path."""


class GateDecision(Record):
    """Comparison of the published and the newly trained adapter of one MTEB task, on the test texts of the latter."""

    run_id: str
    mteb_task: str
    to: str
    """Folder or repository that the run is published to."""
    decision: Decision
    reason: str
    metric: str | None = None
    """Metric of the two numbers below: the main metric of an embedding adapter, accuracy of a classifier.

    None if nothing was measured, and in decisions of older versions, which compared accuracies."""
    published_accuracy: Annotated[float, Field(ge=-1, le=1)] | None
    """Value of ``metric`` for the published adapter.

    None if nothing was compared: it is the first, or the labels differ."""
    candidate_accuracy: Annotated[float, Field(ge=-1, le=1)] | None
    difference: float | None
    """``candidate_accuracy`` minus ``published_accuracy``."""
    low: float | None
    """Lower end of the 95 % interval of the difference, from a paired bootstrap over the test texts."""
    high: float | None
    """Upper end of that interval."""
    p_value: Fraction | None
    """McNemar's exact test for classifiers, a paired bootstrap for embedding adapters; two-sided."""
    num_texts: int | None
    published_sha256: str | None
    candidate_sha256: str
    published_revision: str | None
    """Commit of the repository. None for a folder."""
    created_at: datetime
