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
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError, LorafleetError
from pipeline.records import EpochRow, GateDecision, MtebTaskRow, Record, RunId, ScoreRow, TaskName, ValueRow
from pipeline.store.lock import oldest_first
from pipeline.store.values import values_of_scores

R = TypeVar("R", bound=Record)
_MOST_ROWS = 1_000_000  # a table may come with a stranger's run

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
        pa.field("test_sha256", pa.string()),
        pa.field("samples_per_label", pa.int64()),
        pa.field("main_metric", pa.string()),
        pa.field("p_value_main", pa.float64()),
        pa.field("p_value_main_holm", pa.float64()),
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

VALUES_SCHEMA = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("mteb_task", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("column", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("width", pa.int64()),
        pa.field("slice", pa.string()),
        pa.field("slice_value", pa.string()),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("num_texts", pa.int64(), nullable=False),
        pa.field("main", pa.bool_(), nullable=False),
    ]
)
"""One row per measured number: the fields of ``ValueRow``, in order."""

MTEB_TASKS_SCHEMA = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("mteb_task", pa.string(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("num_train", pa.int64(), nullable=False),
        pa.field("num_validation", pa.int64(), nullable=False),
        pa.field("num_test", pa.int64(), nullable=False),
        pa.field("num_classes", pa.int64(), nullable=False),
        # Not a map: pandas and Polars have no such type, and give a list of pairs without names.
        pa.field("label_shares", pa.list_(pa.struct({"label": pa.string(), "share": pa.float64()})), nullable=False),
        pa.field("tokens_p10", pa.int64()),
        pa.field("tokens_p50", pa.int64()),
        pa.field("tokens_p90", pa.int64()),
        pa.field("num_truncated_train", pa.int64(), nullable=False),
        pa.field("num_overlap", pa.int64(), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("test_sha256", pa.string()),
        pa.field("worker_seconds", pa.float64(), nullable=False),
        pa.field("gpu_seconds", pa.float64(), nullable=False),
        pa.field("peak_memory_bytes", pa.int64(), nullable=False),
        pa.field("reused_from", pa.string()),
    ]
)
"""One row per MTEB task, its data and what it cost: the fields of ``MtebTaskRow``, in order."""

GATE_SCHEMA = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("mteb_task", pa.string(), nullable=False),
        pa.field("to", pa.string(), nullable=False),
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


class _EpochOfTask(EpochRow):
    run_id: RunId
    mteb_task: TaskName


def write_scores(rows: Sequence[ScoreRow], path: Path) -> None:
    """Write ``scores.parquet``, replacing what is there; its folder is made if need be.

    Raises: LorafleetError: the file cannot be written; an older one is as it was.
    """
    assert all(row.created_at.tzinfo is not None for row in rows), "created_at without a time zone"
    _write(pa.Table.from_pylist([row.model_dump() for row in rows], schema=SCORES_SCHEMA), path)


def write_values(rows: Sequence[ValueRow], path: Path) -> None:
    """Write ``values.parquet``, as ``write_scores`` does."""
    _write(pa.Table.from_pylist([row.model_dump() for row in rows], schema=VALUES_SCHEMA), path)


def write_epochs(run_id: str, epochs: Mapping[str, Sequence[EpochRow]], path: Path) -> None:
    """Write ``epochs.parquet``, replacing what is there; its folder is made if need be.

    Args:
        run_id: Of the run that trained them.
        epochs: Epochs by the name of their MTEB task.
        path: The file.
    Raises: LorafleetError: the file cannot be written; an older one is as it was.
    """
    rows = [
        {"run_id": run_id, "mteb_task": name, **row.model_dump()} for name, of_task in epochs.items() for row in of_task
    ]
    _write(pa.Table.from_pylist(rows, schema=EPOCHS_SCHEMA), path)


def write_mteb_tasks(rows: Sequence[MtebTaskRow], path: Path) -> None:
    """Write ``mteb_tasks.parquet``, as ``write_scores`` does."""
    assert all(row.created_at.tzinfo is not None for row in rows), "created_at without a time zone"
    _write(pa.Table.from_pylist([row.model_dump() for row in rows], schema=MTEB_TASKS_SCHEMA), path)


def write_gate(decisions: Sequence[GateDecision], path: Path) -> None:
    """Write ``gate.parquet``, as ``write_scores`` does."""
    _write(pa.Table.from_pylist([decision.model_dump() for decision in decisions], schema=GATE_SCHEMA), path)


def append_history(runs: Path, run_id: str, score_rows: Sequence[ScoreRow]) -> Path:
    """Add a run to the history, ``<runs>/metrics/``; a second call for the same run replaces its file.

    Returns: The file, ``scores-<run_id>.parquet``.
    Raises: LorafleetError: the file cannot be written.
    """
    assert all(row.run_id == run_id for row in score_rows), f"a row of another run than {run_id}"
    path = scores_of_run(runs, run_id)
    write_scores(score_rows, path)
    return path


def append_values(runs: Path, run_id: str, rows: Sequence[ValueRow]) -> Path:
    """The same for ``<runs>/values/``; the file is ``values-<run_id>.parquet``."""
    assert all(row.run_id == run_id for row in rows), f"a row of another run than {run_id}"
    path = values_of_run(runs, run_id)
    write_values(rows, path)
    return path


def append_mteb_tasks(runs: Path, run_id: str, rows: Sequence[MtebTaskRow]) -> Path:
    """The same for ``<runs>/mteb_tasks/``; the file is ``mteb_tasks-<run_id>.parquet``."""
    assert all(row.run_id == run_id for row in rows), f"a row of another run than {run_id}"
    path = mteb_tasks_of_run(runs, run_id)
    write_mteb_tasks(rows, path)
    return path


def read_scores(path: Path) -> list[ScoreRow]:
    """Read one scores file, in its order; columns that are not ours are left aside.

    Raises: DataError: the file is missing or damaged, lacks columns, or holds values that no score can have.
    """
    return _read(path, SCORES_SCHEMA, ScoreRow, "scores")


def read_values(path: Path) -> list[ValueRow]:
    """Read ``values.parquet``, as ``read_scores`` does."""
    return _read(path, VALUES_SCHEMA, ValueRow, "values")


def read_epochs(path: Path) -> dict[str, tuple[EpochRow, ...]]:
    """Read ``epochs.parquet``, as ``read_scores`` does: MTEB task -> its epochs."""
    epochs: dict[str, tuple[EpochRow, ...]] = {}
    for row in _read(path, EPOCHS_SCHEMA, _EpochOfTask, "epochs"):
        epoch = EpochRow.model_validate(row.model_dump(include=set(EpochRow.model_fields)))
        epochs[row.mteb_task] = (*epochs.get(row.mteb_task, ()), epoch)
    return epochs


def read_mteb_tasks(path: Path) -> list[MtebTaskRow]:
    """Read ``mteb_tasks.parquet``, as ``read_scores`` does."""
    return _read(path, MTEB_TASKS_SCHEMA, MtebTaskRow, "mteb_tasks")


def read_gate(path: Path) -> list[GateDecision]:
    """Read ``gate.parquet``, as ``read_scores`` does."""
    return _read(path, GATE_SCHEMA, GateDecision, "gate")


def run_values(runs: Path, run_id: str, scores: Sequence[ScoreRow]) -> list[ValueRow]:
    """The values of a run in the history; those of its scores where an older version wrote no others.

    Raises: DataError: the file is damaged or lacks columns.
    """
    path = values_of_run(runs, run_id)
    return read_values(path) if path.exists() else list(values_of_scores(scores))


def read_history(runs: Path) -> list[ScoreRow]:
    """All rows of all runs, oldest run first; none where no run has finished yet.

    Raises: DataError: a file is damaged or lacks columns; the message names it.
    """
    return [row for run_id in runs_in_history(runs) for row in read_scores(scores_of_run(runs, run_id))]


def runs_in_history(runs: Path) -> list[str]:
    """The ids of the runs that the history holds, oldest first."""
    return oldest_first(path.stem.removeprefix("scores-") for path in (runs / "metrics").glob("scores-*.parquet"))


def scores_of_run(runs: Path, run_id: str) -> Path:
    """The scores of a run in the history."""
    return runs / "metrics" / f"scores-{run_id}.parquet"


def values_of_run(runs: Path, run_id: str) -> Path:
    """The values of a run in the history; runs of older versions have no such file."""
    return runs / "values" / f"values-{run_id}.parquet"


def mteb_tasks_of_run(runs: Path, run_id: str) -> Path:
    """What a run's data and work were, in the history; runs of older versions have no such file."""
    return runs / "mteb_tasks" / f"mteb_tasks-{run_id}.parquet"


def _read(path: Path, schema: pa.Schema, record_type: type[R], what: str) -> list[R]:
    if not path.is_file():
        raise DataError(
            f"{path}: expected a {what} file, found none; name a run folder that lorafleet train has finished"
        )
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if file.metadata.num_rows > _MOST_ROWS:
                raise DataError(f"{path}: has {file.metadata.num_rows:,} rows, more than a run can write; move it away")
            there = set(file.schema_arrow.names)
            missing = [field.name for field in schema if field.name not in there and not field.nullable]
            if missing:
                raise DataError(
                    f"{path}: lacks the columns {', '.join(missing)}; it was not written by this version of lorafleet, move it away"
                )
            table = file.read(columns=[name for name in schema.names if name in there])
        for field in schema:
            if field.name not in there:  # an earlier version did not know it yet
                table = table.append_column(field, pa.nulls(len(table), field.type))
        # Another tool may have rewritten the file with its own kinds of string and timestamp.
        rows = table.select(schema.names).cast(schema).to_pylist()
        return [record_type.model_validate(row) for row in rows]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: damaged or not a {what} file: {error}; move it away or restore it") from None


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
        raise LorafleetError(
            f"{path}: cannot be written: {error}; free the place or choose another folder with --runs"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
