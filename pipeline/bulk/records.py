"""Records of a bulk job: the request, the fixed job, and its results."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.bulk_input.units import InputFile
from pipeline.config import CpuShare, GpuShare, without_repeats
from pipeline.printable import conceal
from pipeline.records import Fraction as Share
from pipeline.records import Record

Address = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(conceal)]
"""A path or a URL. A record holds it without its secret."""

SMALL_ROWS = 20_000
"""Number of rows up to which starting Ray costs more time than a second core saves."""


class BulkOptions(Record):
    """Options of a bulk job, besides input, output and adapters."""

    text_column: str = "text"
    """Column to classify."""
    columns: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], AfterValidator(without_repeats)] | None = None
    """Input columns to keep. Default: all."""
    min_score: Share | None = None
    """Least probability of a label; below it the label is null."""
    target_accuracy: Share | None = None
    """Accuracy to reach on the rows that keep their label. Each adapter's coverage table gives its threshold."""
    top_k: int = Field(default=1, ge=1, le=100_000)
    """Number of most probable labels to list in a column ``<name>_top_k``. The column exists above 1."""
    rows_per_unit: int = Field(default=200_000, ge=1, le=2**31)
    """Rows per unit of work. A unit is written, or retried, as a whole."""
    limit: int | None = Field(default=None, ge=1, le=2**62)
    """Number of rows to classify, from the start of the input. Default: all."""
    sample: float | None = Field(default=None, gt=0, lt=1)
    """Random share of the rows to classify, the same rows in every run."""

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
    """SHA-256 of its calibration and meta.json."""
    threshold: Share | None
    """Least probability of a label; below it the label is null."""


class BulkJob(Record):
    """The identity of a bulk job. Another value of any field is another job."""

    lorafleet_version: str
    files: tuple[InputFile, ...]
    adapters: tuple[BulkAdapter, ...]
    options: BulkOptions

    @property
    def fingerprint(self) -> str:
        """Hash of the job, independent of the versions of its files: a touched file keeps it."""
        without_versions = self.model_dump(mode="json")
        for file in without_versions["files"]:
            del file["version"]
        return hashlib.sha256(json.dumps(without_versions).encode()).hexdigest()[:16]


class Receipt(Record):
    """The result of one unit, also stored in the footer of its output."""

    unit: int
    rows: int = 0
    null_labels: dict[str, int] = Field(default_factory=dict)
    """Adapter -> number of rows without a label."""
    reasons: dict[str, int] = Field(default_factory=dict)
    """Reason for a null label -> number of rows, summed over the adapters."""
    truncated: int = 0
    """Number of rows whose text was cut to the encoder's length."""
    duplicates: int = 0
    """Number of rows whose text occurs earlier in the unit."""
    labels: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Adapter -> label -> number of rows."""
    version: str = ""
    """Version of the input file when it was read, as the store lists it."""
    content: str = ""
    """Identity of the bytes that were read: ``etag:…`` or ``blake2b:…``. Empty in receipts of older versions."""
    seconds: float = 0.0
    failure: str | None = None
    fatal: bool = False
    """Whether the failure stops the whole job, as a full disk does."""


class BulkSummary(Record):
    """The content of ``_job.json``."""

    job: str
    """Fingerprint of the job."""
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
    """Number of units that earlier starts of the same job have finished."""
    failures: int
    changed_types: tuple[str, ...] = ()
    """``column: before becomes after``, one entry per column whose Parquet type the output cannot keep."""
    skipped_files: dict[str, int] = Field(default_factory=dict)
    """Reason -> number of input files that were skipped."""
    seconds: float
    """Duration of this start, preparations included."""
    rows_per_second: float | None
    """Rows that this start has labelled, per second of labelling. None if no unit was left to do."""


class BulkCompute(Record):
    """The machine resources of a bulk job."""

    where: Literal["auto", "process", "ray"] = "auto"
    """``auto``: in this process up to ``SMALL_ROWS`` rows, on Ray above."""
    cpus: CpuShare | Literal["auto"] = "auto"
    """CPUs of one Ray actor, and its number of torch threads. ``auto``: one on Ray, all in this process."""
    gpus: GpuShare | Literal["auto"] = "auto"
    """GPUs of one actor. ``auto``: one if the machine has any."""
    concurrency: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"] = "auto"
    """Largest number of actors. The pool grows to it while units are waiting. ``auto``: as many as fit."""
    ray_address: Address | None = None
    """Address of an existing Ray cluster. Default: start a local Ray, and stop it at the end."""

    @model_validator(mode="after")
    def _place_is_unambiguous(self) -> BulkCompute:
        if self.where == "process" and self.ray_address is not None:
            raise ValueError("--where process and --ray-address name two places; choose one")
        if self.where == "process":
            self._check_shares_of_process()
        return self

    def _check_shares_of_process(self) -> None:
        if self.concurrency != "auto":
            raise ValueError("--concurrency has no effect with --where process, which has no actors; leave it out")
        if self.gpus not in ("auto", 0, 1):
            raise ValueError("--gpus with --where process: one process computes on one GPU; expected auto, 0 or 1")
        if self.cpus != "auto" and self.cpus != int(self.cpus):
            raise ValueError("--cpus with --where process is the number of threads; expected a whole number")


class BulkRequest(Record):
    """One call of ``lorafleet classify``."""

    source: Address
    """Input: a Parquet file, a folder, a glob, or an fsspec URL of one."""
    output: Address
    """Output: a folder, or an fsspec URL of one."""
    adapters: tuple[Address, ...]
    """Adapters, each as ``[NAME=]REF``."""
    options: BulkOptions = BulkOptions()
    compute: BulkCompute = BulkCompute()
    encoder: Address | None = None
    """Location of the encoder. Default: the name that the adapters give."""
    offline: bool = False
    overwrite: bool = False

    @model_validator(mode="after")
    def _offline_has_an_effect(self) -> BulkRequest:
        if self.offline and any(address.startswith("hf://") for address in (self.source, self.output)):
            raise ValueError("--offline has no effect on INPUT and OUTPUT, and one of them is on the Hub; leave it out")
        return self
