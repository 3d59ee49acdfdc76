"""Reading and writing the Parquet files of a bulk job: block sizes, row groups and codecs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.bulk_input.content import chunks_of
from pipeline.bulk_input.units import Unit
from pipeline.parquet.schema import WrittenAs

_BLOCK_ROWS, _BLOCK_BYTES = 16_384, 16 * 1024**2  # up to four blocks are in memory
_GROUP_ROWS, _GROUP_BYTES = 65_536, 32 * 1024**2
READ_BUFFER_BYTES = 1024**2
_SAMPLE_ROWS = 64
# pyarrow's reader and writer name these differently. "UNKNOWN" is Hadoop's LZ4.
_CODECS = {"UNCOMPRESSED": "NONE", "UNKNOWN": "LZ4"}


class UnitFile:
    """A Parquet file under construction. Small tables are collected into row groups of a good size."""

    def __init__(self, path: Path, how: WrittenAs, codecs: dict[str, str], *, vectors: Collection[str] = ()) -> None:
        """Open the file.

        Args:
            path: Path of the file.
            how: Settings of the writer.
            codecs: Codec of each column, and under ``*`` that of new ones.
            vectors: Columns of vectors. They get no dictionary, because their values hardly repeat.
        """
        leaves, options = _leaves(how.schema), dict(how.options)
        compression = {name: codecs.get(name, codecs.get(name.split(".")[0], codecs["*"])) for name in leaves}
        if vectors:
            inside = tuple(f"{name}." for name in vectors)
            options["use_dictionary"] = [leaf for leaf in leaves if not leaf.startswith(inside)]
        self._writer = pq.ParquetWriter(path, how.schema, compression=compression, **options)
        self._how = how
        self._pending: list[pa.Table] = []
        self._rows = self._bytes = 0

    def add(self, table: pa.Table) -> None:
        """Append rows. A row group is written once enough rows are collected."""
        self._pending.append(self._how.table(table))
        self._rows += len(table)
        self._bytes += table.nbytes
        if self._rows >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._flush()

    def describe(self, metadata: dict[bytes, bytes]) -> None:
        """Set the key-value metadata of the file's footer."""
        self._flush()
        self._writer.add_key_value_metadata(self._how.metadata | metadata)

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.concat_tables(self._pending))
        self._pending, self._rows, self._bytes = [], 0, 0


def block_rows(parquet: pq.ParquetFile, unit: Unit, columns: Sequence[str]) -> int:
    """Return the number of rows to read at once, fewer if they are wide.

    It depends on the file alone, so that the same unit always gives the same batches.
    """
    groups = [parquet.metadata.row_group(index) for index in unit.row_groups]
    stored = sum(chunk.total_uncompressed_size for group in groups for chunk in chunks_of(group, columns)) / max(
        1, sum(group.num_rows for group in groups)
    )
    # With dictionaries, rows are smaller in the file than in memory.
    first = next(parquet.iter_batches(batch_size=_SAMPLE_ROWS, row_groups=[unit.row_groups[0]], columns=columns), None)
    read = first.nbytes / max(1, len(first)) if first is not None else 0.0
    return max(1, min(_BLOCK_ROWS, int(_BLOCK_BYTES / max(stored, read, 1.0))))


def chosen_rows(rows: pa.Table, mask: npt.NDArray[np.bool_]) -> pa.Table:
    """Return the rows for which the mask is true."""
    try:
        return rows.filter(pa.array(mask))
    except pa.ArrowNotImplementedError:  # Arrow cannot filter views, but it can slice them
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
        parts = [rows.slice(start, stop - start) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
        return pa.concat_tables(parts) if parts else rows.slice(0, 0)


def input_codecs(parquet: pq.ParquetFile, text_column: str) -> dict[str, str]:
    """Return the codec of each column and top-level column of the input, and under ``*`` that of the text column."""
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
    """Return the paths of a schema's leaves, as Parquet names them."""
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, schema).close()
    parquet = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [parquet.column(i).path for i in range(len(parquet))]
