"""The limit of int8 vectors: measured once on a sample of the input, and kept in the plan of the job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.adapter.description import FoundAdapter
from pipeline.bulk.records import BulkJob
from pipeline.bulk.texts import LabelledTexts
from pipeline.bulk_input.units import BulkInput, Unit
from pipeline.inference.classifier import load_classifier
from pipeline.inference.reference import common_prefix
from pipeline.storage.place import open_file, store_errors

_SAMPLED_UNITS, _SAMPLED_ROWS = 8, 1024
_HEADROOM = 1.1
_LARGEST = 1.0  # no component of a unit vector is larger


def measure_limits(
    adapters: Sequence[FoundAdapter],
    source: BulkInput,
    job: BulkJob,
    *,
    encoder: str | None,
    threads: int,
    use_gpu: bool,
    offline: bool,
) -> dict[str, float]:
    """Measure the largest absolute value of each adapter's vectors, with 10 % of headroom.

    The sample has up to 1,024 rows: the beginning of up to 8 ranges of row groups, spread over the input. The limit is
    1 if it holds no text.

    Args:
        adapters: The adapters of the job.
        source: Its input.
        job: The job, whose options ask for vectors.
        encoder: Location of the encoder. None: the name that the adapters give.
        threads: Number of PyTorch threads.
        use_gpu: Use a GPU if there is one.
        offline: Send no request to the Hub.
    Returns: Adapter -> limit, above 0 and at most 1.

    Raises: EncoderError, AdapterError: what ``load_classifier`` raises.
    """
    assert job.options.vectors is not None and job.options.vectors.width is not None
    kernel = load_classifier(adapters, encoder=encoder, threads=threads, use_gpu=use_gpu, offline=offline, labels=False)
    memory = LabelledTexts(0)
    tokens = kernel.tokenise(
        [text for column in _sample(source, job.options.text_column) for text in memory.recognise(column)[1]],
        prefix=common_prefix(adapters),
    )
    outputs = kernel.compute(tokens, labels=False, width=job.options.vectors.width)
    limits = dict[str, float]()
    for found, output in zip(adapters, outputs, strict=True):
        assert output.vectors is not None
        largest = float(np.nan_to_num(np.abs(output.vectors)).max(initial=0.0))
        limits[found.name] = min(_LARGEST, largest * _HEADROOM) or _LARGEST
    return limits


def _sample(source: BulkInput, text_column: str) -> Iterator[pa.ChunkedArray]:
    """Yield the texts of the sample. A unit that cannot be read is left out: its worker will say why."""
    ranges = list({(unit.path, unit.row_groups): unit for unit in source.units}.values())
    chosen = ranges[:: -(-len(ranges) // _SAMPLED_UNITS)]
    for unit in chosen:
        with suppress(pa.ArrowException, *store_errors()):
            yield _first_texts(unit, text_column, rows=_SAMPLED_ROWS // len(chosen))


def _first_texts(unit: Unit, text_column: str, *, rows: int) -> pa.ChunkedArray:
    with closing(open_file(unit.path)) as file:
        parquet = pq.ParquetFile(file)
        batches = parquet.iter_batches(batch_size=rows, row_groups=list(unit.row_groups), columns=[text_column])
        first = next(batches, None)
        kind = parquet.schema_arrow.field(text_column).type
        return pa.chunked_array([] if first is None else [first.column(0)], type=kind)
