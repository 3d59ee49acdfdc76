"""Records of a bulk job: the request, the fixed job, and its results."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from pipeline.bulk_input.units import InputFile
from pipeline.config import CpuShare, GpuShare, without_repeats
from pipeline.printable import conceal
from pipeline.records import Fraction as Share
from pipeline.records import Record

Address = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(conceal)]
"""A path or a URL. A record holds it without its secret."""

SMALL_ROWS = 20_000
"""Number of rows up to which starting Ray costs more time than a second core saves."""


class VectorOptions(Record):
    """Options of the vectors that a bulk job writes."""

    dtype: Literal["float32", "float16", "int8", "binary"] = "float32"
    """Number format of the vectors. See ``vectors.VectorFormat``."""
    width: int | None = Field(default=None, ge=1, le=1_000_000)
    """Number of leading dimensions to keep (Matryoshka). None: all."""

    @field_validator("width")
    @classmethod
    def _fills_bytes(cls, width: int | None, info: ValidationInfo) -> int | None:
        if width is not None and info.data.get("dtype") == "binary" and width % 8:
            raise ValueError("--dtype binary packs 8 dimensions into a byte; expected a multiple of 8")
        return width


class BulkOptions(Record):
    """Options of a bulk job, besides input, output and adapters."""

    text_column: str = "text"
    """Column to classify or to embed."""
    labels: bool = True
    """Whether to classify."""
    vectors: VectorOptions | None = None
    """How to write vectors. None: write none."""
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
    """Number of rows to read, from the start of the input. Default: all."""
    sample: float | None = Field(default=None, gt=0, lt=1)
    """Random share of the rows to read, the same rows in every run."""

    @model_validator(mode="after")
    def _one_threshold(self) -> BulkOptions:
        if self.min_score is not None and self.target_accuracy is not None:
            raise ValueError("--min-score and --target-accuracy both set a threshold; choose one")
        return self

    @model_validator(mode="after")
    def _has_an_effect(self) -> BulkOptions:
        about_labels = self.min_score is not None or self.target_accuracy is not None or self.top_k > 1
        if not self.labels and (self.vectors is None or about_labels):
            raise ValueError("a job without labels writes vectors, and takes no option about labels")
        return self

    @property
    def participle(self) -> str:
        """The word for what happens to rows, in messages: ``labelled``, or ``embedded`` for vectors alone."""
        return "labelled" if self.labels else "embedded"

    @property
    def gerund(self) -> str:
        """The same as a noun: ``labelling`` or ``embedding``."""
        return "labelling" if self.labels else "embedding"


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
    prefix: str = Field(default="", exclude_if=lambda value: not value)
    """Text that is put before each text, as in the training."""


class BulkJob(Record):
    """The identity of a bulk job. Another value of any field is another job."""

    lorafleet_version: str
    files: tuple[InputFile, ...]
    adapters: tuple[BulkAdapter, ...]
    options: BulkOptions
    limits: dict[str, Annotated[float, Field(ge=0.001, le=1)]] = Field(default_factory=dict)
    """Adapter -> largest absolute value that int8 vectors express. Measured by the first start, and not compared."""

    @property
    def fingerprint(self) -> str:
        """Hash of the job, independent of the versions of its files: a touched file keeps it."""
        without_versions = self.model_dump(mode="json", exclude={"limits"})
        for file in without_versions["files"]:
            del file["version"]
        if self.options.vectors is None:  # the fingerprint of earlier versions, which wrote labels alone
            del without_versions["options"]["labels"], without_versions["options"]["vectors"]
        return hashlib.sha256(json.dumps(without_versions).encode()).hexdigest()[:16]


class VectorLoss(Record):
    """What the number format of a column of vectors loses, against float32."""

    texts: int
    """Number of texts that were compared."""
    cosine: float
    """Mean cosine of a vector and its stored form. 1 without texts."""
    neighbours: float | None
    """Mean share of a text's 10 nearest neighbours among the compared texts that stored vectors find. None if few."""
    clipped: int
    """Number of values of distinct texts beyond the limit of int8."""


class Receipt(Record):
    """The result of one unit, also stored in the footer of its output."""

    unit: int
    rows: int = 0
    null_labels: dict[str, int] = Field(default_factory=dict)
    """Adapter -> number of rows without a label."""
    reasons: dict[str, int] = Field(default_factory=dict)
    """Reason for a null label or vector -> number of rows, summed over the adapters."""
    truncated: int = 0
    """Number of rows whose text was cut to the encoder's length."""
    duplicates: int = 0
    """Number of rows whose text occurs earlier in the unit."""
    labels: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Adapter -> label -> number of rows."""
    null_vectors: dict[str, int] = Field(default_factory=dict)
    """Adapter -> number of rows without a vector. Empty without vectors."""
    vector_loss: dict[str, VectorLoss] = Field(default_factory=dict)
    """Adapter -> loss of the number format. Empty for float32."""
    version: str = ""
    """Version of the input file when it was read, as the store lists it."""
    content: str = ""
    """Identity of the bytes that were read: ``etag:…`` or ``blake2b:…``. Empty in receipts of older versions."""
    seconds: float = 0.0
    failure: str | None = None
    fatal: bool = False
    """Whether the failure stops the whole job, as a full disk does."""


class VectorSummary(Record):
    """Facts on one column of vectors."""

    dtype: str
    width: int
    """Number of dimensions."""
    nulls: int
    """Number of rows without a vector."""
    limit: float | None = None
    """Largest absolute value that int8 expresses: ``value * limit / 127`` gives the vector. None for other formats."""
    loss: VectorLoss | None = None
    """Loss of the format, measured on the first texts of every unit. None for float32, which loses nothing."""


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
    vectors: dict[str, VectorSummary] = Field(default_factory=dict)
    """Adapter -> facts on its vectors. Empty without vectors."""
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
    """Rows that this start has done, per second of that work. None if no unit was left to do."""


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
    """One call of ``lorafleet classify`` or ``lorafleet embed``."""

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
