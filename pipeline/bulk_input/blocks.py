"""Reading the rows of a unit in blocks: how many rows at once, and the codecs of the input's columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.bulk_input.content import chunks_of
from pipeline.bulk_input.units import Unit

READ_BUFFER_BYTES = 1024**2
"""Size of the buffer that each column of the input is read through."""

_BLOCK_ROWS, _BLOCK_BYTES = 16_384, 16 * 1024**2  # up to four blocks are in memory
_SAMPLE_ROWS = 64
# pyarrow's reader and writer name these differently. "UNKNOWN" is Hadoop's LZ4.
_CODECS = {"UNCOMPRESSED": "NONE", "UNKNOWN": "LZ4"}


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
