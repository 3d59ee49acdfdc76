"""The metrics data sets on disk: their schemas, and the only code that reads or writes them.

A file is written under a hidden name that does not end in ``.parquet``, forced to the disk, then renamed:
who reads ``*.parquet`` at any moment, with whatever tool, finds whole files only.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError, LorafleetError
from pipeline.records import EpochRow, GateDecision, ScoreRow

SCORES_SCHEMA = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("mteb_task", pa.string(), nullable=False),
        pa.field("subset", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("column", pa.string(), nullable=False),
        pa.field("accuracy", pa.float64(), nullable=False),
        pa.field("macro_f1", pa.float64(), nullable=False),
        pa.field("average_precision", pa.float64()),
        pa.field("low", pa.float64(), nullable=False),
        pa.field("high", pa.float64(), nullable=False),
        pa.field("num_texts", pa.int64(), nullable=False),
        pa.field("num_classes", pa.int64(), nullable=False),
        pa.field("num_overlap", pa.int64(), nullable=False),
        pa.field("accuracy_without_overlap", pa.float64()),
        pa.field("num_truncated", pa.int64(), nullable=False),
        pa.field("selected_on", pa.string()),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("encoder", pa.string(), nullable=False),
        pa.field("encoder_revision", pa.string(), nullable=False),
        pa.field("dataset_revision", pa.string(), nullable=False),
        pa.field("adapter_sha256", pa.string()),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("device", pa.string(), nullable=False),
        pa.field("versions", pa.string(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("p_value", pa.float64()),
        pa.field("p_value_holm", pa.float64()),
        pa.field("reused_from", pa.string()),
    ]
)
"""One row per MTEB task and column of the score table: the fields of ``ScoreRow``, in order."""

EPOCHS_SCHEMA = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("mteb_task", pa.string(), nullable=False),
        pa.field("epoch", pa.int64(), nullable=False),
        pa.field("train_loss", pa.float64(), nullable=False),
        pa.field("validation_accuracy", pa.float64()),
        pa.field("learning_rate", pa.float64(), nullable=False),
        pa.field("texts_per_second", pa.float64(), nullable=False),
        pa.field("tokens_per_second", pa.float64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("peak_memory_bytes", pa.int64(), nullable=False),
        pa.field("is_best", pa.bool_(), nullable=False),
    ]
)
"""One row per MTEB task and epoch: run, MTEB task, then the fields of ``EpochRow``, in order."""

GATE_SCHEMA = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("mteb_task", pa.string(), nullable=False),
        pa.field("decision", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("published_accuracy", pa.float64()),
        pa.field("candidate_accuracy", pa.float64()),
        pa.field("difference", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("p_value", pa.float64()),
        pa.field("num_texts", pa.int64()),
        pa.field("published_sha256", pa.string()),
        pa.field("candidate_sha256", pa.string(), nullable=False),
        pa.field("published_revision", pa.string()),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)
"""One row per MTEB task that the promotion gate looked at: the fields of ``GateDecision``, in order."""


def write_scores(rows: Sequence[ScoreRow], path: Path) -> None:
    """Write ``scores.parquet``, replacing what is there; its folder is made if need be.

    Raises: LorafleetError: the file cannot be written; an older one is as it was.
    """
    assert all(row.created_at.tzinfo is not None for row in rows), "created_at without a time zone"
    _write(pa.Table.from_pylist([row.model_dump() for row in rows], schema=SCORES_SCHEMA), path)


def write_epochs(run_id: str, epochs: Mapping[str, Sequence[EpochRow]], path: Path) -> None:
    """Write ``epochs.parquet``, replacing what is there; its folder is made if need be.

    Args:
        run_id: Of the run that trained them.
        epochs: Epochs by the name of their MTEB task.
        path: The file.
    Raises: LorafleetError: the file cannot be written; an older one is as it was.
    """
    rows = [{"run_id": run_id, "mteb_task": name, **row.model_dump()} for name, of_task in epochs.items() for row in of_task]
    _write(pa.Table.from_pylist(rows, schema=EPOCHS_SCHEMA), path)


def write_gate(decisions: Sequence[GateDecision], path: Path) -> None:
    """Write ``gate.parquet``, as ``write_scores`` does."""
    _write(pa.Table.from_pylist([decision.model_dump() for decision in decisions], schema=GATE_SCHEMA), path)


def append_history(runs: Path, run_id: str, score_rows: Sequence[ScoreRow]) -> Path:
    """Add a run to the history, ``<runs>/metrics/``; a second call for the same run replaces its file.

    Returns: The file, ``scores-<run_id>.parquet``.
    Raises: LorafleetError: the file cannot be written.
    """
    assert all(row.run_id == run_id for row in score_rows), f"a row of another run than {run_id}"
    path = _history(runs) / f"scores-{run_id}.parquet"
    write_scores(score_rows, path)
    return path


def read_scores(path: Path) -> list[ScoreRow]:
    """Read one scores file, in its order; columns that are not ours are left aside.

    Raises: DataError: the file is missing or damaged, lacks columns, or holds values that no score can have.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a scores file, found none; name a run folder that lorafleet train has finished")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            missing = [name for name in SCORES_SCHEMA.names if name not in file.schema_arrow.names]
            if missing:
                raise DataError(
                    f"{path}: lacks the columns {', '.join(missing)}; it was not written by this version of lorafleet, move it away"
                )
            table = file.read(columns=SCORES_SCHEMA.names)
        # Another tool may have rewritten the file with its own kinds of string and timestamp.
        rows = table.select(SCORES_SCHEMA.names).cast(SCORES_SCHEMA).to_pylist()
        return [ScoreRow.model_validate(row) for row in rows]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: damaged or not a scores file: {error}; move it away or restore it") from None


def read_history(runs: Path) -> list[ScoreRow]:
    """All rows of all runs, oldest first; none where no run has finished yet.

    Raises: DataError: a file is damaged or lacks columns; the message names it.
    """
    rows = [row for path in sorted(_history(runs).glob("scores-*.parquet")) for row in read_scores(path)]
    return sorted(rows, key=lambda row: row.created_at)


def _history(runs: Path) -> Path:
    return runs / "metrics"


def _write(table: pa.Table, path: Path) -> None:
    # No two writers share a temporary name, so neither can rename the other's half.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            # Checksums, because a flipped bit in a plain column is a wrong score that still reads well.
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise LorafleetError(f"{path}: cannot be written: {error}; free the place or choose another folder with --runs") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
