"""One unit of a bulk job: read, labelled, written and committed in one place, so that only a receipt travels. Knows nothing of Ray."""

from __future__ import annotations

import errno
import secrets
import threading
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Literal
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pydantic import Field, SecretStr

from pipeline.bulk.content import chunks_of, content_of, file_now
from pipeline.bulk.records import BulkAdapter, BulkJob, Receipt
from pipeline.bulk.schema import ARROW_SCHEMA, WrittenAs, kinds_by_column, output_metadata, written_as
from pipeline.bulk.state import ATTEMPTS, FOOTER_KEY, footer, read_receipt
from pipeline.bulk.units import Unit
from pipeline.encoder.tokeniser import Tokens
from pipeline.errors import AdapterError, DataError, LorafleetError, first_line
from pipeline.inference.classifier import Answers, load_classifier
from pipeline.inference.reference import FoundAdapter, find_adapters
from pipeline.printable import remember
from pipeline.records import Record
from pipeline.storage import Place, open_file, store_errors

MAX_ATTEMPTS = 3
_BLOCK_ROWS, _BLOCK_BYTES = 16_384, 16 * 1024**2  # four blocks may be in memory at a time
_GROUP_ROWS, _GROUP_BYTES = 65_536, 32 * 1024**2
_READ_BUFFER_BYTES = 1024**2
_SAMPLE_ROWS = 64
_CODECS = {"UNCOMPRESSED": "NONE", "UNKNOWN": "LZ4"}  # where pyarrow's reader and writer disagree; unknown to it is Hadoop's LZ4
_NULL, _EMPTY, _NOT_UTF8 = -1, -2, -3
_START_AGAIN = "start it again, into another folder"


class WorkerSpec(Record):
    """All that a worker is told."""

    job: BulkJob
    refs: tuple[str, ...]
    """``[NAME=]REF`` of the adapters, in the job's order."""
    output: str
    """Where units go."""
    encoder: str | None
    """Where the encoder lies, if not under the name that the adapters give."""
    threads: int
    use_gpu: bool
    offline: bool
    kept_schema: str
    """Of the input columns to keep, in the types of the output, as Arrow serialises it, in base64."""
    int96_unit: Literal["ns", "us"]
    """Unit of time in which INT96 columns are read."""
    secrets: dict[str, SecretStr] = Field(default_factory=dict, repr=False)
    """Address without its secret -> the real one; travels in memory only."""


class UnitWorker:
    """Holds the encoder and the adapters, and labels one unit after the other."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Load the adapters.

        Raises: AdapterError: they are not the job's any more, and what ``load_classifier`` raises.
        """
        self.spec = spec
        self.job = spec.job
        remember({shown: real.get_secret_value() for shown, real in spec.secrets.items()})
        self.place = Place(spec.output)
        self._files = {file.path: file for file in spec.job.files}
        adapters = find_adapters(spec.refs, offline=spec.offline)
        for planned, found in zip(self.job.adapters, adapters, strict=True):
            facts = ("name", "sha256", "labels_sha256", "described_sha256")
            if any(getattr(planned, fact) != getattr(found, fact) for fact in facts):
                raise AdapterError(f"adapter {planned.name}: has changed since the job was planned; start it again")
        self.classifier = load_classifier(
            adapters,
            encoder=spec.encoder,
            threads=spec.threads,
            use_gpu=spec.use_gpu,
            offline=spec.offline,
            top_k=spec.job.options.top_k,
        )
        self.kept = pa.ipc.read_schema(pa.py_buffer(b64decode(spec.kept_schema)))
        self.columns = [_AdapterColumns(a, found, self.job.options.top_k) for a, found in zip(self.job.adapters, adapters, strict=True)]

    def label(self, unit: Unit) -> Receipt:
        """Label a unit, unless it is there; a fault of its file is told by the receipt, and leaves the other units alone."""
        torch.set_num_threads(self.spec.threads)  # torch keeps the number per thread, and Ray calls from another one
        try:
            return self._attempt(unit)
        except store_errors() as error:
            fatal = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            return Receipt(unit=unit.number, failure=first_line(error), fatal=fatal)
        except (pa.ArrowException, LorafleetError, UnicodeDecodeError) as error:
            return Receipt(unit=unit.number, failure=first_line(error))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error):  # torch has no class for it on the CPU
                raise
            return Receipt(unit=unit.number, failure="out of memory; a smaller --rows-per-unit needs less")

    def _attempt(self, unit: Unit) -> Receipt:
        attempts = f"{ATTEMPTS}/{unit.number:05d}"
        attempt = f"{attempts}-{secrets.token_hex(6)}"
        try:
            if self.place.exists(unit.output):
                return read_receipt(self.place, unit)
            before = [name for name in self.place.names(under=ATTEMPTS) if name.startswith(f"{attempts}-")]
            if len(before) >= MAX_ATTEMPTS:
                return Receipt(unit=unit.number, failure=f"killed the worker {len(before)} times")
            self.place.write(attempt, b"")
        except store_errors() as error:  # not this unit's fault: no other one could be written either
            return Receipt(unit=unit.number, failure=f"output {self.place}: {first_line(error)}", fatal=True)
        try:
            return self._label(unit)
        finally:
            with suppress(*store_errors()):
                self.place.remove(attempt)  # what remains was left by a worker that was killed

    def _label(self, unit: Unit) -> Receipt:
        started = time.perf_counter()
        tally = _Tally([column.adapter.name for column in self.columns])
        before = self._version(unit)
        with closing(open_file(unit.path)) as source, self.place.replaced(unit.output, mark=self.job.fingerprint) as path:
            parquet = pq.ParquetFile(
                source, pre_buffer=False, buffer_size=_READ_BUFFER_BYTES, coerce_int96_timestamp_unit=self.spec.int96_unit
            )
            read = self._columns_in(parquet, unit)
            with closing(_Output(path, self._written_as(parquet), _codecs(parquet, self.job.options.text_column))) as output:
                memory = _Memory(len(self.columns))
                for block in _ahead(self._blocks(parquet, unit, read, memory)):
                    memory.learn(block.tokens.truncated, self.classifier.classify(block.tokens))
                    output.add(self._with_answers(block, memory, tally))
                content = content_of(source, parquet.metadata, unit, read, version=before)
                if self._version(unit) != before:
                    raise DataError(f"{unit.path}: has changed while it was read; start again when nobody writes to it")
                receipt = tally.receipt(unit, memory, version=before, content=content, seconds=time.perf_counter() - started)
                output.describe(footer(self.job, unit, receipt))
        return receipt

    def _version(self, unit: Unit) -> str:
        """The version of a unit's file; where another one than planned holds other bytes, the end of the job finds out.

        Raises: DataError: the file is gone, or has another size.
        """
        planned, now = self._files[unit.path], file_now(unit.path)
        if now is None or now.size != planned.size:
            found = "is gone" if now is None else f"has {now.size:,} bytes now"
            raise DataError(f"{unit.path}: had {planned.size:,} bytes when the job was planned, and {found}; {_START_AGAIN}")
        return now.version

    def _columns_in(self, parquet: pq.ParquetFile, unit: Unit) -> tuple[str, ...]:
        """The columns to read of a file, which may be read long after it was planned.

        Raises: DataError: it lacks rows or columns by now, or its texts are none any more.
        """
        there, names, text_column = parquet.metadata, set(parquet.schema_arrow.names), self.job.options.text_column
        rows = sum(there.row_group(group).num_rows for group in unit.row_groups if group < there.num_row_groups)
        lacking = [field.name for field in self.kept if field.name not in names and not field.nullable]
        if rows < unit.first_row + unit.num_rows or lacking or text_column not in names:
            raise DataError(f"{unit.path}: has changed since the job was planned; {_START_AGAIN}")
        kept = [name for name in self.kept.names if name in names]
        return (*kept, *({text_column} - set(kept)))

    def _blocks(self, parquet: pq.ParquetFile, unit: Unit, columns: Sequence[str], memory: _Memory) -> Iterator[_Block]:
        """Rows with their new texts tokenised; runs ahead of the computation.

        Raises: DataError: the columns have fewer rows than the footer promises.
        """
        options = self.job.options
        random = np.random.default_rng(crc32(unit.output.encode()))
        position, end = 0, unit.first_row + unit.num_rows
        size = _block_rows(parquet, unit, columns)
        for batch in parquet.iter_batches(batch_size=size, row_groups=list(unit.row_groups), columns=columns):
            start = position
            position += len(batch)
            if position <= unit.first_row:
                continue
            first, last = max(0, unit.first_row - start), min(len(batch), end - start)
            rows = pa.Table.from_batches([batch.slice(first, last - first)])
            if options.sample is not None:
                rows = _chosen(rows, random.random(len(rows)) < options.sample)
            ids, new_texts = memory.recognise(rows.column(options.text_column))
            yield _Block(self._fitted(rows), ids, self.classifier.tokenise(new_texts))
            if position >= end:
                return
        raise DataError(f"its footer promises {end:,} rows in row groups {unit.row_groups}, and its columns have {position:,}")

    def _fitted(self, rows: pa.Table) -> pa.Table:
        """The kept columns in the types of the output; nulls for one that this file lacks."""
        there = dict(zip(rows.column_names, rows.columns, strict=True))
        columns = [there[f.name].cast(f.type) if f.name in there else pa.nulls(len(rows), f.type) for f in self.kept]
        return pa.table(columns, schema=self.kept) if columns else rows.select([])  # which knows how many rows it has

    def _written_as(self, parquet: pq.ParquetFile) -> WrittenAs:
        added = [new for column in self.columns for new in column.fields()] + [pa.field("truncated", pa.bool_())]
        keys = parquet.metadata.metadata or {}
        metadata = output_metadata(keys, kept=self.kept.names, added=added, leave_out=FOOTER_KEY)
        kinds = kinds_by_column(parquet)
        return written_as(pa.schema([*self.kept, *added]), kinds, metadata, with_arrow_schema=ARROW_SCHEMA in keys)

    def _with_answers(self, block: _Block, memory: _Memory, tally: _Tally) -> pa.Table:
        table = block.rows
        for index, column in enumerate(self.columns):
            answers = column.answer(block.ids, memory, index)
            for new, values in zip(column.fields(), answers.columns, strict=True):
                table = table.append_column(new, values)
            tally.count(column.adapter.name, answers)
        truncated = np.where(block.ids >= 0, memory.truncated.take(block.ids, mode="clip") if len(memory.truncated) else False, False)
        tally.rows += len(block.ids)
        tally.truncated += int(truncated.sum())
        return table.append_column("truncated", pa.array(truncated, pa.bool_()))


@dataclass(frozen=True)
class _Block:
    rows: pa.Table
    ids: npt.NDArray[np.int64]
    """Of each row's text within the unit; negative for null and empty ones."""
    tokens: Tokens
    """Of the texts that occur for the first time."""


class _Memory:
    """The unit's distinct texts, by a hash of theirs, and what is known of each: a text is computed once."""

    def __init__(self, num_adapters: int) -> None:
        self._ids: dict[bytes, int] = {}
        self.truncated: npt.NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        self.answers: list[Answers | None] = [None] * num_adapters
        self.duplicates = 0

    def recognise(self, texts: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], list[str]]:
        """The id of each row's text, and the texts that are new, in the order of their ids."""
        encoded = _as_bytes(texts).dictionary_encode()
        new: list[str] = []
        known = np.empty(len(encoded.dictionary) + 1, dtype=np.int64)
        known[-1] = _NULL
        before = len(self._ids)
        for index, content in enumerate(encoded.dictionary.to_pylist()):
            try:
                text = content.decode()
            except UnicodeDecodeError:
                known[index] = _NOT_UTF8
                continue
            if not text or text.isspace():
                known[index] = _EMPTY
                continue
            digest = blake2b(content, digest_size=16).digest()
            known[index] = self._ids.setdefault(digest, len(self._ids))
            if known[index] >= before + len(new):
                new.append(text)
        ids = known[encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)]
        self.duplicates += int((ids >= 0).sum()) - len(new)
        return ids, new

    def learn(self, truncated: npt.NDArray[np.bool_], answers: Sequence[Answers]) -> None:
        """Add what was computed for the new texts of a block; blocks come in order."""
        self.truncated = np.concatenate([self.truncated, truncated])
        for index, answer in enumerate(answers):
            known = self.answers[index]
            self.answers[index] = answer if known is None else _joined(known, answer)


@dataclass(frozen=True)
class _Answered:
    columns: list[pa.Array]
    labels: Counter[str]
    reasons: Counter[str]


class _AdapterColumns:
    """What one adapter adds to the output."""

    def __init__(self, adapter: BulkAdapter, found: FoundAdapter, top_k: int) -> None:
        self.adapter = adapter
        self.label_names = pa.array(found.label_names, pa.string())
        self.top_k = top_k

    def fields(self) -> list[pa.Field]:
        """Label, score, reason, and the top labels where asked for."""
        name = self.adapter.name
        fields = [(f"{name}_label", pa.string()), (f"{name}_score", pa.float32()), (f"{name}_reason", pa.string())]
        if self.top_k > 1:
            fields.append((f"{name}_top_k", pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))))
        return [pa.field(*parts) for parts in fields]

    def answer(self, ids: npt.NDArray[np.int64], memory: _Memory, index: int) -> _Answered:
        """The columns for rows with these ids."""
        known = memory.answers[index]
        assert known is not None
        there = ids >= 0
        safe = np.where(there, ids, 0)
        if not len(known.labels):  # a unit of nulls
            known, safe = _NOTHING, np.zeros_like(ids)
        scores, overflow = known.scores[safe], there & ~known.finite[safe]
        there &= ~overflow
        low = there & (scores < self.adapter.threshold) if self.adapter.threshold is not None else np.zeros(len(ids), dtype=np.bool_)
        labels = self.label_names.take(pa.array(known.labels[safe], mask=~there | low))
        why = np.select([ids == _NULL, ids == _EMPTY, ids == _NOT_UTF8, low, overflow], [0, 1, 2, 3, 4], default=-1)
        threshold = self.adapter.threshold
        below = f"score below {threshold:g}" if threshold is not None else ""
        wording = pa.array(["text is null", "text is empty", "text is not UTF-8", below, "score is not a number"], pa.string())
        reasons = wording.take(pa.array(why, mask=why < 0))
        columns = [labels, pa.array(scores, pa.float32(), mask=~there), reasons]
        if self.top_k > 1:
            columns.append(self._top(known, safe, there))
        return _Answered(columns, _counted(labels), _counted(reasons))

    def _top(self, known: Answers, safe: npt.NDArray[np.int64], there: npt.NDArray[np.bool_]) -> pa.Array:
        width = known.top_labels.shape[1]
        rows = safe[there]
        flat = pa.StructArray.from_arrays(
            [self.label_names.take(pa.array(known.top_labels[rows].ravel())), pa.array(known.top_scores[rows].ravel(), pa.float32())],
            names=["label", "score"],
        )
        offsets = np.concatenate([[0], np.cumsum(np.where(there, width, 0))]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), flat, mask=pa.array(~there))


_NOTHING = Answers(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32))


@dataclass
class _Tally:
    """Counts for the receipt."""

    names: list[str]
    rows: int = 0
    truncated: int = 0
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    null_labels: Counter[str] = field(default_factory=Counter)

    def count(self, name: str, answered: _Answered) -> None:
        self.labels.setdefault(name, Counter()).update(answered.labels)
        self.reasons.update(answered.reasons)
        self.null_labels[name] += answered.reasons.total()

    def receipt(self, unit: Unit, memory: _Memory, *, version: str, content: str, seconds: float) -> Receipt:
        return Receipt(
            unit=unit.number,
            version=version,
            content=content,
            rows=self.rows,
            null_labels={name: self.null_labels[name] for name in self.names},
            reasons=dict(self.reasons),
            truncated=self.truncated,
            duplicates=memory.duplicates,
            labels={name: dict(self.labels.get(name, {})) for name in self.names},
            seconds=seconds,
        )


class _Output:
    """A Parquet file that grows by row groups of a good size, whatever the size of what is added."""

    def __init__(self, path: Path, how: WrittenAs, codecs: dict[str, str]) -> None:
        compression = {name: codecs.get(name, codecs.get(name.split(".")[0], codecs["*"])) for name in _leaves(how.schema)}
        self._writer = pq.ParquetWriter(path, how.schema, compression=compression, **how.options)
        self._how = how
        self._waiting: list[pa.Table] = []
        self._rows = self._bytes = 0

    def add(self, table: pa.Table) -> None:
        self._waiting.append(self._how.table(table))
        self._rows += len(table)
        self._bytes += table.nbytes
        if self._rows >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._flush()

    def describe(self, metadata: dict[bytes, bytes]) -> None:
        self._flush()
        self._writer.add_key_value_metadata(self._how.metadata | metadata)

    def close(self) -> None:
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
        self._waiting, self._rows, self._bytes = [], 0, 0


def _block_rows(parquet: pq.ParquetFile, unit: Unit, columns: Sequence[str]) -> int:
    """Rows to read at once, fewer where they are wide. It depends on the file alone, so the same unit gives the same batches."""
    groups = [parquet.metadata.row_group(index) for index in unit.row_groups]
    stored = sum(chunk.total_uncompressed_size for group in groups for chunk in chunks_of(group, columns)) / max(
        1, sum(group.num_rows for group in groups)
    )
    # Dictionaries make stored rows smaller than read ones.
    first = next(parquet.iter_batches(batch_size=_SAMPLE_ROWS, row_groups=[unit.row_groups[0]], columns=columns), None)
    read = first.nbytes / max(1, len(first)) if first is not None else 0.0
    return max(1, min(_BLOCK_ROWS, int(_BLOCK_BYTES / max(stored, read, 1.0))))


def _chosen(rows: pa.Table, mask: npt.NDArray[np.bool_]) -> pa.Table:
    """The rows for which the mask is true."""
    try:
        return rows.filter(pa.array(mask))
    except pa.ArrowNotImplementedError:  # Arrow cannot filter views, but it can cut them
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
        parts = [rows.slice(start, stop - start) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
        return pa.concat_tables(parts) if parts else rows.slice(0, 0)


def _as_bytes(texts: pa.ChunkedArray) -> pa.Array:
    """Texts of any type as the bytes that they are; what is not UTF-8 is found when they are decoded."""
    array = texts.combine_chunks()
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.large_binary())


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, the next one already in the making: reading and tokenising overlap with computing."""
    queue: Queue[Any] = Queue(maxsize=1)
    stopped = threading.Event()
    end = object()

    def make() -> None:
        try:
            for item in items:
                if stopped.is_set():
                    return
                queue.put(item)
            queue.put(end)
        except BaseException as error:  # noqa: BLE001 - raised again by the one who waits
            queue.put(error)

    maker = threading.Thread(target=make, name="read-ahead", daemon=True)
    maker.start()
    try:
        while (item := queue.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        while maker.is_alive():
            with suppress(Empty):
                queue.get_nowait()  # it may wait for room
            maker.join(0.05)


def _joined(known: Answers, more: Answers) -> Answers:
    return Answers(np.concatenate([known.top_labels, more.top_labels]), np.concatenate([known.top_scores, more.top_scores]))


def _counted(values: pa.Array) -> Counter[str]:
    return Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(values).to_pylist() if entry["values"] is not None})


def _codecs(parquet: pq.ParquetFile, text_column: str) -> dict[str, str]:
    """Compression by column and by top-level column of the input; ``*`` for new columns, as the texts are."""
    if not parquet.num_row_groups:
        return {"*": "SNAPPY"}
    group = parquet.metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    codecs: dict[str, str] = {}
    for column in columns:
        path, codec = column.path_in_schema, _CODECS.get(column.compression, column.compression)
        codecs.setdefault(path.split(".")[0], codec)
        codecs[path] = codec
    return codecs | {"*": codecs.get(text_column, "SNAPPY")}


def _leaves(schema: pa.Schema) -> list[str]:
    """Column paths as Parquet names them."""
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, schema).close()
    parquet = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [parquet.column(i).path for i in range(len(parquet))]
