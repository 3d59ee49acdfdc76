"""Whether an input file still holds the bytes that a unit was made from, by the store's version or a hash."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from hashlib import blake2b
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.bulk_input.units import InputFile, Unit
from pipeline.storage.listing import StoredFile, look_again
from pipeline.storage.place import open_file, store_errors

_BLOCK_BYTES = 1024**2


def file_now(path: str) -> StoredFile | None:
    """Return the current state of a file in its store; None if it no longer exists."""
    return look_again([path])[path]


def is_version(planned: InputFile, now: StoredFile) -> bool:
    """Return whether the store reports the planned file: the same size, and the same etag or time of change."""
    return planned.size == now.size and planned.version == now.version != ""


def content_of(
    source: IO[bytes], metadata: pq.FileMetaData, unit: Unit, columns: Sequence[str], *, version: str
) -> str:
    """Return the identity of the bytes that a unit is made from: the store's etag, or a hash of what is read.

    The hash covers the footer and the column chunks, so other parts of the file may change.

    Args:
        source: The file, open for reading.
        metadata: Its footer.
        unit: The unit, which names the row groups.
        columns: Columns that are read.
        version: The file's ``StoredFile.version``.
    """
    if version.startswith("etag:"):
        return version
    digest = blake2b(digest_size=16)
    for start, length in _ranges(source, metadata, unit, columns):
        source.seek(start)
        while length > 0 and (block := source.read(min(length, _BLOCK_BYTES))):
            digest.update(block)
            length -= len(block)
    return f"blake2b:{digest.hexdigest()}"


def content_now(unit: Unit, columns: Sequence[str]) -> str | None:
    """Return ``content_of`` the file in its current state; None if the unit can no longer be read from it."""
    try:
        now = file_now(unit.path)
        if now is None:
            return None
        with closing(open_file(unit.path)) as source:
            metadata = pq.read_metadata(source)
            if max(unit.row_groups) >= metadata.num_row_groups:
                return None
            return content_of(source, metadata, unit, columns, version=now.version)
    except store_errors(pa.ArrowException):
        return None


def chunks_of(group: pq.RowGroupMetaData, columns: Sequence[str]) -> Iterator[pq.ColumnChunkMetaData]:
    """Yield the column chunks of the given top-level columns in a row group."""
    chosen = set(columns)
    for index in range(group.num_columns):
        chunk = group.column(index)
        parts = chunk.path_in_schema.split(".")  # a name may contain dots
        if any(".".join(parts[:end]) in chosen for end in range(1, len(parts) + 1)):
            yield chunk


def _ranges(
    source: IO[bytes], metadata: pq.FileMetaData, unit: Unit, columns: Sequence[str]
) -> Iterator[tuple[int, int]]:
    """Yield the first byte and the number of bytes of each part that is read."""
    end = source.seek(0, os.SEEK_END)
    source.seek(end - 8)
    footer = int.from_bytes(source.read(4), "little") + 8
    yield end - footer, footer
    for group in unit.row_groups:
        for chunk in chunks_of(metadata.row_group(group), columns):
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < start:
                start = chunk.dictionary_page_offset
            yield start, chunk.total_compressed_size
