"""What a bulk job is asked for, what it is, and what comes of it: the values that travel."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.bulk.units import InputFile
from pipeline.config import CpuShare, GpuShare, without_repeats
from pipeline.printable import conceal
from pipeline.records import Fraction as Share
from pipeline.records import Record

Address = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(conceal)]
"""A path or a URL; without its secret, if it has one, from the moment it is part of a record."""

SMALL_ROWS = 20_000
"""Up to here Ray's start costs more than a second core gains."""


class BulkOptions(Record):
    """What is asked of a bulk job, besides input, output and adapters."""

    text_column: str = "text"
    """The column that is classified."""
    columns: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], AfterValidator(without_repeats)] | None = None
    """Input columns to keep; all where left out."""
    min_score: Share | None = None
    """Below this probability the label is null."""
    target_accuracy: Share | None = None
    """The threshold is taken from each adapter's coverage table so that what keeps its label is right this often."""
    top_k: int = Field(default=1, ge=1, le=100_000)
    """With more than one, a column ``<name>_top_k`` lists the most probable labels."""
    rows_per_unit: int = Field(default=200_000, ge=1, le=2**31)
    """What is done, or done again, as a whole."""
    limit: int | None = Field(default=None, ge=1, le=2**62)
    """The first rows only."""
    sample: float | None = Field(default=None, gt=0, lt=1)
    """A random share of the rows, the same in every run."""

    @model_validator(mode="after")
    def _one_threshold(self) -> BulkOptions:
        if self.min_score is not None and self.target_accuracy is not None:
            raise ValueError("--min-score and --target-accuracy both set a threshold; choose one")
        return self


class BulkAdapter(Record):
    """One adapter of a bulk job."""

    name: str
    sha256: str
    encoder_revision: str
    labels_sha256: str
    described_sha256: str
    """Of its calibration and meta.json."""
    threshold: Share | None
    """Below it a label is null."""


class BulkJob(Record):
    """What a bulk job is. Another value of any field is another job."""

    lorafleet_version: str
    files: tuple[InputFile, ...]
    adapters: tuple[BulkAdapter, ...]
    options: BulkOptions

    @property
    def fingerprint(self) -> str:
        """Equal for equal jobs, and where a file was only touched."""
        without_versions = self.model_dump(mode="json")
        for file in without_versions["files"]:
            del file["version"]
        return hashlib.sha256(json.dumps(without_versions).encode()).hexdigest()[:16]


class Receipt(Record):
    """What came of a unit. Lies in the footer of its output, too."""

    unit: int
    rows: int = 0
    null_labels: dict[str, int] = Field(default_factory=dict)
    """Adapter -> rows without a label."""
    reasons: dict[str, int] = Field(default_factory=dict)
    """Why, over all adapters."""
    truncated: int = 0
    duplicates: int = 0
    """Rows whose text occurs earlier in the unit."""
    labels: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Adapter -> label -> rows."""
    version: str = ""
    """Version of the input file when it was read, as a listing shows it."""
    content: str = ""
    """What identifies the bytes that were read: ``etag:…`` or ``blake2b:…``; empty in receipts of older versions."""
    seconds: float = 0.0
    failure: str | None = None
    fatal: bool = False
    """The whole job cannot go on: a full disk."""


class BulkSummary(Record):
    """``_job.json``."""

    job: str
    """Fingerprint."""
    lorafleet_version: str
    rows_in: int
    rows_out: int
    null_labels: dict[str, int]
    reasons: dict[str, int]
    truncated: int
    duplicates: int
    labels: dict[str, dict[str, int]]
    units: int
    units_done_before: int
    """By an earlier start of the same job."""
    failures: int
    changed_types: tuple[str, ...] = ()
    """``column: before becomes after`` of each column whose Parquet type the output cannot keep."""
    skipped_files: dict[str, int] = Field(default_factory=dict)
    """Reason -> files of the input that were not read."""
    seconds: float
    """Of this start, preparations included."""
    rows_per_second: float | None
    """Rows labelled by this start / seconds of labelling; none where nothing was left to do."""


class BulkCompute(Record):
    """Where a bulk job runs."""

    where: Literal["auto", "process", "ray"] = "auto"
    """``auto``: in this process up to ``SMALL_ROWS`` rows, because Ray takes longer to start than they take to label."""
    cpus: CpuShare | Literal["auto"] = "auto"
    """CPU share of one Ray actor, and its torch threads; ``auto``: one (in this process: all)."""
    gpus: GpuShare | Literal["auto"] = "auto"
    """GPU share of one actor; ``auto``: one where there are any."""
    concurrency: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"] = "auto"
    """Actors at most; the pool grows to it while there is work. ``auto``: as many as fit."""
    ray_address: Address | None = None
    """An existing Ray cluster; left out, a local Ray is started and stopped."""

    @model_validator(mode="after")
    def _one_place(self) -> BulkCompute:
        if self.where == "process" and self.ray_address is not None:
            raise ValueError("--where process and --ray-address name two places; choose one")
        if self.where == "process":
            self._check_shares_of_process()
        return self

    def _check_shares_of_process(self) -> None:
        if self.concurrency != "auto":
            raise ValueError("--concurrency has no effect with --where process: there are no actors; leave it out")
        if self.gpus not in ("auto", 0, 1):
            raise ValueError("--gpus with --where process: one process computes on one GPU; expected auto, 0 or 1")
        if self.cpus != "auto" and self.cpus != int(self.cpus):
            raise ValueError("--cpus with --where process is a number of threads; expected a whole number")


class BulkRequest(Record):
    """What ``lorafleet classify`` is asked for."""

    source: Address
    """A Parquet file, a folder, a glob, or an fsspec URL of one."""
    output: Address
    """A folder, or an fsspec URL of one."""
    adapters: tuple[Address, ...]
    """``[NAME=]REF`` each."""
    options: BulkOptions = BulkOptions()
    compute: BulkCompute = BulkCompute()
    encoder: Address | None = None
    """Where the encoder lies, if not under the name that the adapters give."""
    offline: bool = False
    overwrite: bool = False

    @model_validator(mode="after")
    def _offline_is_meant(self) -> BulkRequest:
        if self.offline and any(place.startswith("hf://") for place in (self.source, self.output)):
            raise ValueError("--offline has no effect on INPUT and OUTPUT, and one of them is on the Hub; leave it out")
        return self
