"""The worker of a bulk job: it reads, labels or embeds, and writes one unit, and returns a receipt. Without Ray."""

from __future__ import annotations

import errno
import secrets
import time
from base64 import b64decode
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field, SecretStr

from pipeline.bulk.columns import AdapterColumns, Tally
from pipeline.bulk.output import ATTEMPTS, FOOTER_KEY, UnitFile, footer, read_receipt
from pipeline.bulk.records import BulkJob, Receipt
from pipeline.bulk.texts import LabelledTexts, read_ahead
from pipeline.bulk_input.blocks import READ_BUFFER_BYTES, block_rows, chosen_rows, input_codecs
from pipeline.bulk_input.content import content_of, file_now
from pipeline.bulk_input.units import Unit
from pipeline.encoder.tokeniser import Tokens
from pipeline.errors import AdapterError, DataError, LorafleetError, first_line
from pipeline.inference.classifier import load_classifier
from pipeline.inference.engine import Outputs
from pipeline.inference.reference import find_adapters
from pipeline.parquet.metadata import ARROW_SCHEMA, output_metadata
from pipeline.parquet.schema import WrittenAs, kinds_by_column, written_as
from pipeline.printable import remember
from pipeline.records import Record
from pipeline.storage.place import Place, open_file, store_errors

MAX_ATTEMPTS = 3
_START_AGAIN = "start it again, into another folder"


class WorkerSpec(Record):
    """Instructions for a worker."""

    job: BulkJob
    refs: tuple[str, ...]
    """``[NAME=]REF`` of the adapters, in the job's order."""
    output: str
    """Folder that the units are written to."""
    encoder: str | None
    """Location of the encoder. None: the name that the adapters give."""
    threads: int
    use_gpu: bool
    offline: bool
    kept_schema: str
    """Schema of the input columns to keep, in the types of the output; serialised by Arrow, in base64."""
    int96_unit: Literal["ns", "us"]
    """Time unit in which INT96 columns are read."""
    secrets: dict[str, SecretStr] = Field(default_factory=dict, repr=False)
    """Address without its secret -> the real address. Never written to disk."""


class UnitWorker:
    """Labels units one after the other. Holds the encoder and the adapters."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Load the adapters.

        Raises: AdapterError: an adapter has changed since the job was planned, or what ``load_classifier`` raises.
        """
        self.spec = spec
        self.job = spec.job
        remember({shown: real.get_secret_value() for shown, real in spec.secrets.items()})
        self.place = Place(spec.output)
        self._files = {file.path: file for file in spec.job.files}
        adapters = find_adapters(spec.refs, offline=spec.offline)
        for planned, found in zip(self.job.adapters, adapters, strict=True):
            facts = ("name", "sha256", "labels_sha256", "described_sha256", "prefix")
            if any(getattr(planned, fact) != getattr(found, fact) for fact in facts):
                raise AdapterError(f"adapter {planned.name}: has changed since the job was planned; start it again")
        self.classifier = load_classifier(
            adapters,
            encoder=spec.encoder,
            threads=spec.threads,
            use_gpu=spec.use_gpu,
            offline=spec.offline,
            top_k=spec.job.options.top_k,
            labels=spec.job.options.labels,
        )
        self.kept = pa.ipc.read_schema(pa.py_buffer(b64decode(spec.kept_schema)))
        self.columns = [
            AdapterColumns(a, found, self.job) for a, found in zip(self.job.adapters, adapters, strict=True)
        ]
        self.formats = [column.format for column in self.columns if column.format is not None]
        self._vectors = [f"{column.adapter.name}_vector" for column in self.columns if column.format is not None]

    def label(self, unit: Unit) -> Receipt:
        """Label a unit, unless its output exists. A fault of its file is reported in the receipt, not raised."""
        torch.set_num_threads(self.spec.threads)  # torch keeps the number per thread, and Ray calls from another one
        try:
            return self._attempt(unit)
        except store_errors() as error:
            fatal = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            return Receipt(unit=unit.number, failure=first_line(error), fatal=fatal)
        except (pa.ArrowException, LorafleetError, UnicodeDecodeError) as error:
            return Receipt(unit=unit.number, failure=first_line(error))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(
                error
            ):  # torch has no exception for it on CPU
                raise
            return Receipt(unit=unit.number, failure="out of memory; choose a smaller --rows-per-unit")

    def _attempt(self, unit: Unit) -> Receipt:
        attempts = f"{ATTEMPTS}/{unit.number:05d}"
        attempt = f"{attempts}-{secrets.token_hex(6)}"
        try:
            if self.place.exists(unit.output):
                return read_receipt(self.place, unit)
            earlier = [name for name in self.place.names(under=ATTEMPTS) if name.startswith(f"{attempts}-")]
            if len(earlier) >= MAX_ATTEMPTS:
                return Receipt(unit=unit.number, failure=f"killed the worker {len(earlier)} times")
            self.place.write(attempt, b"")
        except store_errors() as error:  # not this unit's fault: no unit can be written
            return Receipt(unit=unit.number, failure=f"output {self.place}: {first_line(error)}", fatal=True)
        try:
            return self._label(unit)
        finally:
            with suppress(*store_errors()):
                self.place.remove(attempt)  # an attempt that remains was left by a killed worker

    def _label(self, unit: Unit) -> Receipt:
        started = time.perf_counter()
        tally = Tally([column.adapter.name for column in self.columns])
        version = self._version(unit)
        with (
            closing(open_file(unit.path)) as source,
            self.place.replaced(unit.output, mark=self.job.fingerprint) as path,
        ):
            parquet = pq.ParquetFile(
                source,
                pre_buffer=False,
                buffer_size=READ_BUFFER_BYTES,
                coerce_int96_timestamp_unit=self.spec.int96_unit,
            )
            read = self._columns_in(parquet, unit)
            codecs = input_codecs(parquet, self.job.options.text_column)
            with closing(UnitFile(path, self._written_as(parquet), codecs, vectors=self._vectors)) as output:
                memory = LabelledTexts(len(self.columns), self.formats)
                for block in read_ahead(self._blocks(parquet, unit, read, memory)):
                    memory.learn(block.tokens.truncated, self._compute(block.tokens))
                    output.add(self._with_answers(block, memory, tally))
                content = content_of(source, parquet.metadata, unit, read, version=version)
                if self._version(unit) != version:
                    raise DataError(f"{unit.path}: changed while it was read; start again when nothing writes to it")
                seconds = time.perf_counter() - started
                receipt = tally.receipt(
                    unit, memory, self.job.options, version=version, content=content, seconds=seconds
                )
                output.describe(footer(self.job, unit, receipt))
        return receipt

    def _tokenise(self, texts: list[str]) -> Tokens:
        return self.classifier.tokenise(texts, prefix=self.job.adapters[0].prefix)  # the adapters share it

    def _compute(self, tokens: Tokens) -> list[Outputs]:
        width = self.formats[0].width if self.formats else 0  # adapters of one encoder have one width
        return self.classifier.compute(tokens, labels=self.job.options.labels, width=width)

    def _version(self, unit: Unit) -> str:
        """Return the current version of a unit's file. ``finish`` checks whether another version has other bytes.

        Raises: DataError: the file no longer exists, or has another size.
        """
        planned, now = self._files[unit.path], file_now(unit.path)
        if now is None or now.size != planned.size:
            change = "is gone" if now is None else f"has {now.size:,} bytes now"
            raise DataError(
                f"{unit.path}: had {planned.size:,} bytes when the job was planned, and {change}; {_START_AGAIN}"
            )
        return now.version

    def _columns_in(self, parquet: pq.ParquetFile, unit: Unit) -> tuple[str, ...]:
        """Return the columns to read from a file, which may have changed since it was planned.

        Raises: DataError: the file no longer has the rows or the columns.
        """
        metadata, names, text_column = parquet.metadata, set(parquet.schema_arrow.names), self.job.options.text_column
        rows = sum(metadata.row_group(group).num_rows for group in unit.row_groups if group < metadata.num_row_groups)
        lacking = [field.name for field in self.kept if field.name not in names and not field.nullable]
        if rows < unit.first_row + unit.num_rows or lacking or text_column not in names:
            raise DataError(f"{unit.path}: has changed since the job was planned; {_START_AGAIN}")
        kept = [name for name in self.kept.names if name in names]
        return (*kept, *({text_column} - set(kept)))

    def _blocks(
        self, parquet: pq.ParquetFile, unit: Unit, columns: Sequence[str], memory: LabelledTexts
    ) -> Iterator[_Block]:
        """Yield blocks of rows with their new texts tokenised. It runs ahead of the classifier, in a thread.

        Raises: DataError: the columns have fewer rows than the footer promises.
        """
        options = self.job.options
        random = np.random.default_rng(crc32(unit.output.encode()))
        position, end = 0, unit.first_row + unit.num_rows
        size = block_rows(parquet, unit, columns)
        for batch in parquet.iter_batches(batch_size=size, row_groups=list(unit.row_groups), columns=columns):
            start = position
            position += len(batch)
            if position <= unit.first_row:
                continue
            first, last = max(0, unit.first_row - start), min(len(batch), end - start)
            rows = pa.Table.from_batches([batch.slice(first, last - first)])
            if options.sample is not None:
                rows = chosen_rows(rows, random.random(len(rows)) < options.sample)
            ids, new_texts = memory.recognise(rows.column(options.text_column))
            yield _Block(self._fitted(rows), ids, self._tokenise(new_texts))
            if position >= end:
                return
        raise DataError(
            f"its footer promises {end:,} rows in row groups {unit.row_groups}, and its columns have {position:,}"
        )

    def _fitted(self, rows: pa.Table) -> pa.Table:
        """Return the kept columns in the types of the output, with nulls for a column that this file lacks."""
        existing = dict(zip(rows.column_names, rows.columns, strict=True))
        columns = [
            existing[f.name].cast(f.type) if f.name in existing else pa.nulls(len(rows), f.type) for f in self.kept
        ]
        return pa.table(columns, schema=self.kept) if columns else rows.select([])  # this keeps the number of rows

    def _written_as(self, parquet: pq.ParquetFile) -> WrittenAs:
        added = [new for column in self.columns for new in column.fields()] + [pa.field("truncated", pa.bool_())]
        keys = parquet.metadata.metadata or {}
        metadata = output_metadata(keys, kept=self.kept.names, added=added, leave_out=FOOTER_KEY)
        kinds = kinds_by_column(parquet)
        # Parquet has no fixed-size lists: readers know them from Arrow's schema alone.
        with_arrow_schema = ARROW_SCHEMA in keys or bool(self.formats)
        return written_as(pa.schema([*self.kept, *added]), kinds, metadata, with_arrow_schema=with_arrow_schema)

    def _with_answers(self, block: _Block, memory: LabelledTexts, tally: Tally) -> pa.Table:
        table = block.rows
        for index, column in enumerate(self.columns):
            answers = column.answer(block.ids, memory, index)
            for new, values in zip(column.fields(), answers.columns, strict=True):
                table = table.append_column(new, values)
            tally.count(column.adapter.name, answers)
        truncated = np.where(
            block.ids >= 0, memory.truncated.take(block.ids, mode="clip") if len(memory.truncated) else False, False
        )
        tally.rows += len(block.ids)
        tally.truncated += int(truncated.sum())
        return table.append_column("truncated", pa.array(truncated, pa.bool_()))


@dataclass(frozen=True)
class _Block:
    """Some rows of a unit."""

    rows: pa.Table
    ids: npt.NDArray[np.int64]
    """Id of each row's text within the unit, int64 (rows,); negative for a row without text."""
    tokens: Tokens
    """Tokens of the texts that occur for the first time."""
