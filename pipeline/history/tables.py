"""Reading and writing of the metrics tables. No other module reads or writes them.

A file is written under a hidden name that does not end in ``.parquet``, synced to disk, and then renamed. So a reader
of ``*.parquet`` sees only complete files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError, LorafleetError
from pipeline.history.schemas import EPOCHS_SCHEMA, GATE_SCHEMA, MTEB_TASKS_SCHEMA, SCORES_SCHEMA, VALUES_SCHEMA
from pipeline.history.values import values_of_scores
from pipeline.records import EpochRow, GateDecision, MtebTaskRow, Record, RunId, ScoreRow, TaskName, ValueRow
from pipeline.store.files import write_atomically
from pipeline.store.lock import oldest_first

R = TypeVar("R", bound=Record)
_MOST_ROWS = 1_000_000  # a table may come from an untrusted run


class _EpochOfTask(EpochRow):
    run_id: RunId
    mteb_task: TaskName


def write_scores(rows: Sequence[ScoreRow], path: Path) -> None:
    """Write ``scores.parquet``, replacing an existing file. Its folder is created if necessary.

    Raises:
        LorafleetError: the file cannot be written; an existing file is unchanged.
    """
    assert all(row.created_at.tzinfo is not None for row in rows), "created_at without a time zone"
    _write(pa.Table.from_pylist([row.model_dump() for row in rows], schema=SCORES_SCHEMA), path)


def write_values(rows: Sequence[ValueRow], path: Path) -> None:
    """Write ``values.parquet``, as ``write_scores`` does."""
    _write(pa.Table.from_pylist([row.model_dump() for row in rows], schema=VALUES_SCHEMA), path)


def write_epochs(run_id: str, epochs: Mapping[str, Sequence[EpochRow]], path: Path) -> None:
    """Write ``epochs.parquet``, as ``write_scores`` does.

    Args:
        run_id: Run that trained the adapters.
        epochs: MTEB task -> its epochs.
        path: File to write.
    Raises:
        LorafleetError: the file cannot be written; an existing file is unchanged.
    """
    rows = [
        {"run_id": run_id, "mteb_task": name, **epoch.model_dump()}
        for name, task_epochs in epochs.items()
        for epoch in task_epochs
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
    """Add the scores of a run to the history in ``<runs>/metrics/``. A second call replaces the file of the run.

    Returns:
        The file, ``scores-<run_id>.parquet``.
    Raises:
        LorafleetError: the file cannot be written.
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
    """Add the task rows of a run to the history: ``<runs>/mteb_tasks/mteb_tasks-<run_id>.parquet``."""
    assert all(row.run_id == run_id for row in rows), f"a row of another run than {run_id}"
    path = mteb_tasks_of_run(runs, run_id)
    write_mteb_tasks(rows, path)
    return path


def read_scores(path: Path) -> list[ScoreRow]:
    """Read one scores file in its own order. Unknown columns are ignored.

    Raises:
        DataError: the file is missing or damaged, lacks columns, or holds values that no score can have.
    """
    return _read(path, SCORES_SCHEMA, ScoreRow, "scores")


def read_values(path: Path) -> list[ValueRow]:
    """Read ``values.parquet``, as ``read_scores`` does."""
    return _read(path, VALUES_SCHEMA, ValueRow, "values")


def read_epochs(path: Path) -> dict[str, tuple[EpochRow, ...]]:
    """Read ``epochs.parquet``, as ``read_scores`` does, into a mapping of each MTEB task to its epochs."""
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
    """Read the score rows of all runs, oldest run first. The list is empty if no run has finished yet.

    Raises:
        DataError: a file is damaged or lacks columns.
    """
    return [row for run_id in runs_in_history(runs) for row in read_scores(scores_of_run(runs, run_id))]


def read_vector_history(runs: Path) -> list[ValueRow]:
    """Read the main metric of the vectors of all runs, frozen and adapted at full width, oldest run first.

    Raises: DataError: as ``read_history``.
    """
    files = [path for run_id in runs_in_history(runs) if (path := values_of_run(runs, run_id)).exists()]
    return [
        row
        for path in files
        for row in read_values(path)
        if row.column in ("frozen", "adapted") and row.main and row.width is None and row.slice is None
    ]


def read_task_history(runs: Path) -> list[MtebTaskRow]:
    """Read the task rows of all runs that recorded them, oldest run first.

    Raises: DataError: as ``read_history``.
    """
    files = [path for run_id in runs_in_history(runs) if (path := mteb_tasks_of_run(runs, run_id)).exists()]
    return [row for path in files for row in read_mteb_tasks(path)]


def runs_in_history(runs: Path) -> list[str]:
    """Ids of the runs in the history, oldest first."""
    return oldest_first(path.stem.removeprefix("scores-") for path in (runs / "metrics").glob("scores-*.parquet"))


def scores_of_run(runs: Path, run_id: str) -> Path:
    """Path of a run's scores in the history."""
    return runs / "metrics" / f"scores-{run_id}.parquet"


def values_of_run(runs: Path, run_id: str) -> Path:
    """The values of a run in the history; runs of older versions have no such file."""
    return runs / "values" / f"values-{run_id}.parquet"


def mteb_tasks_of_run(runs: Path, run_id: str) -> Path:
    """Path of a run's task rows in the history. Runs of older versions have no such file."""
    return runs / "mteb_tasks" / f"mteb_tasks-{run_id}.parquet"


def _read(path: Path, schema: pa.Schema, record_type: type[R], what: str) -> list[R]:
    if not path.is_file():
        raise DataError(
            f"{path}: expected a {what} file, found none; name a run folder that `lorafleet train` has finished"
        )
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if file.metadata.num_rows > _MOST_ROWS:
                raise DataError(f"{path}: has {file.metadata.num_rows:,} rows, more than a run can write; move it away")
            existing = set(file.schema_arrow.names)
            missing = [field.name for field in schema if field.name not in existing and not field.nullable]
            if missing:
                raise DataError(
                    f"{path}: lacks the columns {', '.join(missing)}; "
                    "it was not written by this version of lorafleet, move it away"
                )
            table = file.read(columns=[name for name in schema.names if name in existing])
        for field in schema:
            if field.name not in existing:  # written by an older version
                table = table.append_column(field, pa.nulls(len(table), field.type))
        # Another tool may have rewritten the file with its own kinds of string and timestamp.
        rows = table.select(schema.names).cast(schema).to_pylist()
        return [record_type.model_validate(row) for row in rows]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: damaged or not a {what} file: {error}; move it away or restore it") from None


def _write(table: pa.Table, path: Path) -> None:
    content = pa.BufferOutputStream()
    # Checksums, because a flipped bit in a plain column gives a wrong but readable score.
    pq.write_table(table, content, compression="zstd", write_page_checksum=True)
    try:
        write_atomically(path, content.getvalue().to_pybytes())
    except OSError as error:
        raise LorafleetError(
            f"{path}: cannot be written: {error}; free some space, or choose another folder with --runs"
        ) from error
