"""The process that reads footers: one request per line of standard input, answers in lines of JSON.

It is started as ``python -m pipeline.parquet.footer_process``.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import first_line
from pipeline.machine import own_output
from pipeline.parquet.metadata import keys_left_out, pandas_labels
from pipeline.parquet.schema import kinds_by_column, types_lost_in_reading
from pipeline.storage.place import open_file, store_errors

_AT_ONCE = 16
_IDLE_SECONDS = 5.0
_UNITS = ("ns", "us", "s")
_MAGIC, _GZIP = b"PAR1", b"\x1f\x8b"
# All attributes of a column chunk that this package or pyarrow's reader uses.
_FACTS = (
    *(
        "file_offset",
        "file_path",
        "physical_type",
        "num_values",
        "path_in_schema",
        "is_stats_set",
        "statistics",
        "compression",
    ),
    *("encodings", "has_dictionary_page", "dictionary_page_offset", "data_page_offset", "has_offset_index"),
    *("has_column_index", "total_compressed_size", "total_uncompressed_size"),
)


def _footer(path: str) -> dict[str, Any]:
    """Read a footer, and touch all of it, so that a crash in pyarrow ends this process and not a later one."""
    with closing(open_file(path)) as source:
        parquet = pq.ParquetFile(source)
        groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
        rows = [group.num_rows for group in groups]
        for group in groups:
            for index in range(group.num_columns):
                chunk = group.column(index)
                for fact in _FACTS:
                    getattr(chunk, fact)  # a damaged footer raises or crashes here
        if parquet.metadata.num_rows > sum(rows) or min(rows, default=0) < 0:
            raise ValueError(f"its footer promises {parquet.metadata.num_rows} rows, but {sum(rows)} in its row groups")
        schema = parquet.schema_arrow.remove_metadata()
        schema.names  # noqa: B018 - raises if a name is not UTF-8
        kinds = kinds_by_column(parquet)
        has_int96 = any("int96" in leaves for leaves in kinds.values())
        other = (
            pq.ParquetFile(source, coerce_int96_timestamp_unit="us").schema_arrow.remove_metadata()
            if has_int96
            else schema
        )
        keys = parquet.metadata.metadata or {}
        facts = [
            kinds,
            pandas_labels(keys),
            types_lost_in_reading(schema, kinds, keys),
            keys_left_out(keys, schema.names),
        ]
        return {"schema": [*map(_written_schema, (schema, other)), *facts], "row_groups": rows}


def _written_schema(schema: pa.Schema) -> str:
    return b64encode(schema.serialize()).decode()


def _dates(path: str, columns: list[str]) -> dict[str, bool]:
    """Compare the values in each time unit. If a unit is too narrow, pyarrow wraps around silently."""
    are_far = are_fine = False
    with ExitStack() as stack:
        sources = [stack.enter_context(closing(open_file(path))) for _ in _UNITS]
        files = [
            pq.ParquetFile(source, coerce_int96_timestamp_unit=unit)
            for source, unit in zip(sources, _UNITS, strict=True)
        ]
        for batches in zip(*(file.iter_batches(columns=columns) for file in files), strict=True):
            for in_ns, in_us, in_s in zip(*(_timestamps(batch.to_struct_array()) for batch in batches), strict=True):
                if (in_s != in_us // 10**6).any():
                    raise ValueError("an INT96 column has a date outside the years -290,308 to 294,247")
                far = in_us != in_ns // 1000
                are_far |= bool(far.any())
                are_fine |= bool((in_ns[~far] % 1000 != 0).any())
    return {"are_far": are_far, "are_fine": are_fine}


def _timestamps(values: pa.Array) -> Iterator[npt.NDArray[np.int64]]:
    """Yield all timestamps of a column as integers, however nested; 0 for nulls."""
    kind = values.type
    if pa.types.is_timestamp(kind):
        yield values.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    elif pa.types.is_struct(kind):
        for part in values.flatten():
            yield from _timestamps(part)
    elif pa.types.is_map(kind):
        yield from _timestamps(values.keys)
        yield from _timestamps(values.items)
    elif isinstance(values, pa.ExtensionArray):
        yield from _timestamps(values.storage)
    elif kind.num_fields:  # any kind of list
        yield from _timestamps(values.flatten())


def _answer(operation: str, path: str, columns: list[str]) -> Any:
    """Return the answer, or a text that says why there is none."""
    try:
        return _footer(path) if operation == "footer" else _dates(path, columns)
    except pa.ArrowNotImplementedError as error:
        return f"pyarrow cannot read it: {first_line(error)}"
    except store_errors(pa.ArrowException, ValueError, OverflowError, MemoryError) as error:
        return _why(path) or f"its footer cannot be read: {first_line(error)}"


def _why(path: str) -> str:
    """Explain a fault by the file's size and its first and last bytes; empty if they look right."""
    try:
        with closing(open_file(path)) as source:
            first = source.read(4)
            size = source.seek(0, os.SEEK_END)
            source.seek(max(0, size - 4))
            last = source.read(4)
    except store_errors() as error:
        return f"it cannot be read: {first_line(error)}"
    if not size:
        return "the file is empty (0 bytes)"
    if first[:2] == _GZIP:
        return "it is compressed with gzip as a whole; decompress it first"
    if b"PARE" in (first, last):
        return "its footer is encrypted"
    if first == _MAGIC and last != _MAGIC:
        return f"not a whole Parquet file: it begins as one, and its end is missing ({size:,} bytes)"
    return "" if first == _MAGIC else "not a Parquet file: it does not begin with PAR1"


def _serve() -> None:
    """Answer requests until none arrives for some seconds, or the parent exits."""
    lock, answers = threading.Lock(), own_output()

    def send(**answer: Any) -> None:
        with lock:
            print(json.dumps(answer), file=answers, flush=True)

    def handle(operation: str, index: int, path: str, columns: list[str]) -> None:
        send(index=index)
        send(index=index, answer=_answer(operation, path, columns))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while select.select([sys.stdin], [], [], _IDLE_SECONDS)[0] and (line := sys.stdin.buffer.readline()):
            request = json.loads(line)
            operation, columns = request["operation"], request["columns"]
            for done in [pool.submit(handle, operation, index, path, columns) for index, path in request["paths"]]:
                done.result()
            send(done=True)


if __name__ == "__main__":
    _serve()
