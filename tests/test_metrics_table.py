"""Metrics tables: round trips, and readers that never see a half-written file."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import get_args

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError, InputError, LorafleetError
from pipeline.history.schemas import EPOCHS_SCHEMA, MTEB_TASKS_SCHEMA, SCORES_SCHEMA, VALUES_SCHEMA
from pipeline.history.tables import (
    append_history,
    append_mteb_tasks,
    read_gate,
    read_history,
    read_mteb_tasks,
    read_scores,
    runs_in_history,
    write_epochs,
    write_scores,
)
from pipeline.records import Column, EpochRow, LabelShare, MtebTaskRow, Record, ScoreRow, ValueRow

NOON = datetime(2025, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)


def score_row(
    run_id: str = "run-1",
    *,
    column: Column = "head",
    accuracy: float = 0.875,
    created_at: datetime = NOON,
    seed: int = 2**32 - 1,
) -> ScoreRow:
    return ScoreRow(
        run_id=run_id,
        mteb_task="Banking77Classification",
        subset="default",
        column=column,
        accuracy=accuracy,
        macro_f1=0.8,
        average_precision=None,
        low=0.5,
        high=1.0,
        num_texts=8,
        num_classes=77,
        num_overlap=1,
        accuracy_without_overlap=6 / 7,
        num_truncated=0,
        selected_on="validation" if column == "head" else None,
        seconds=1.5,
        encoder="sentence-transformers/all-MiniLM-L6-v2",
        encoder_revision="sha256:ab",
        dataset_revision="0.1.5",
        adapter_sha256="cd" * 32 if column == "head" else None,
        seed=seed,
        dtype="float32",
        device="cpu",
        versions='{"torch": "2.13.0"}',
        created_at=created_at,
        p_value=0.01 if column == "head" else None,
        p_value_holm=0.02 if column == "head" else None,
        reused_from=None if column == "head" else "run-0",
        test_sha256="ef" if column == "head" else None,
    )


def epoch_row(epoch: int) -> EpochRow:
    return EpochRow(
        epoch=epoch,
        train_loss=1 / epoch,
        validation_accuracy=None if epoch == 2 else 0.5,
        learning_rate=5e-4,
        texts_per_second=120.0,
        tokens_per_second=2400.0,
        seconds=3.0,
        peak_memory_bytes=5_000_000_000,
        is_best=epoch == 1,
    )


def mteb_task_row(run_id: str = "run-1", *, is_known: bool = True) -> MtebTaskRow:
    return MtebTaskRow(
        run_id=run_id,
        mteb_task="Banking77Classification",
        created_at=NOON,
        num_train=3,
        num_validation=1,
        num_test=2,
        num_classes=2,
        label_shares=(LabelShare(label="lost card", share=1 / 3), LabelShare(label="top up", share=2 / 3))
        if is_known
        else (),
        tokens_p10=4 if is_known else None,
        tokens_p50=9 if is_known else None,
        tokens_p90=30 if is_known else None,
        num_truncated_train=0,
        num_overlap=1,
        fingerprint="ab",
        test_sha256="ef" if is_known else None,
        worker_seconds=12.5,
        gpu_seconds=0.0,
        peak_memory_bytes=5_000_000_000,
        reused_from=None if is_known else "run-0",
    )


def test_score_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [score_row(), score_row(column="majority", accuracy=1 / 3)]
    write_scores(rows, tmp_path / "metrics" / "scores.parquet")
    assert read_scores(tmp_path / "metrics" / "scores.parquet") == rows


def test_the_schemas_hold_every_field_of_the_records_in_order() -> None:
    assert SCORES_SCHEMA.names == list(ScoreRow.model_fields)
    assert EPOCHS_SCHEMA.names == ["run_id", "mteb_task", *EpochRow.model_fields]
    assert VALUES_SCHEMA.names == list(ValueRow.model_fields)
    assert MTEB_TASKS_SCHEMA.names == list(MtebTaskRow.model_fields)


def test_a_column_may_be_null_exactly_where_its_field_may_be_none() -> None:
    tables: list[tuple[pa.Schema, type[Record]]] = [(SCORES_SCHEMA, ScoreRow), (EPOCHS_SCHEMA, EpochRow)]
    for schema, record in (*tables, (MTEB_TASKS_SCHEMA, MtebTaskRow), (VALUES_SCHEMA, ValueRow)):
        for name, field in record.model_fields.items():
            assert schema.field(name).nullable == (type(None) in get_args(field.annotation)), name


def test_a_file_has_our_types_even_where_every_value_is_null_or_no_row_is_there(tmp_path: Path) -> None:
    write_scores([score_row(column="majority")], tmp_path / "a.parquet")
    write_scores([], tmp_path / "b.parquet")
    assert pq.read_schema(tmp_path / "a.parquet").equals(SCORES_SCHEMA)
    assert pq.read_schema(tmp_path / "b.parquet").equals(SCORES_SCHEMA)
    assert pq.read_schema(tmp_path / "a.parquet").field("created_at").type == pa.timestamp("us", tz="UTC")
    assert read_scores(tmp_path / "b.parquet") == []


def test_a_time_of_another_zone_is_stored_as_the_same_instant(tmp_path: Path) -> None:
    tokyo = NOON.astimezone(timezone(timedelta(hours=9)))
    write_scores([score_row(created_at=tokyo)], tmp_path / "scores.parquet")
    assert pd.read_parquet(tmp_path / "scores.parquet")["created_at"][0] == pd.Timestamp(NOON)
    with pytest.raises(AssertionError, match="time zone"):
        write_scores([score_row(created_at=NOON.replace(tzinfo=None))], tmp_path / "scores.parquet")


def test_epochs_are_written_under_their_run_and_mteb_task(tmp_path: Path) -> None:
    path = tmp_path / "epochs.parquet"
    write_epochs("run-1", {"A": [epoch_row(1), epoch_row(2)], "B": [epoch_row(1)], "C": []}, path)
    assert pq.read_schema(path).equals(EPOCHS_SCHEMA)
    rows = pq.ParquetFile(path).read().to_pylist()
    assert [(r.pop("run_id"), r.pop("mteb_task")) for r in rows] == [("run-1", "A"), ("run-1", "A"), ("run-1", "B")]
    assert [EpochRow.model_validate(r) for r in rows] == [epoch_row(1), epoch_row(2), epoch_row(1)]


def test_what_a_runs_data_and_work_were_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rows = [mteb_task_row(), mteb_task_row(is_known=False)]
    path = append_mteb_tasks(tmp_path, "run-1", rows)
    assert path == tmp_path / "mteb_tasks" / "mteb_tasks-run-1.parquet"
    assert read_mteb_tasks(path) == rows
    with pytest.raises(AssertionError, match="another run"):
        append_mteb_tasks(tmp_path, "run-2", rows)


def test_label_shares_are_read_by_other_tools_as_pairs_with_names(tmp_path: Path) -> None:
    append_mteb_tasks(tmp_path, "run-1", [mteb_task_row()])
    found = duckdb.sql(
        f"SELECT s.label, s.share FROM (SELECT unnest(label_shares) AS s FROM '{tmp_path}/mteb_tasks/*.parquet')"
    ).fetchall()
    assert found == [("lost card", 1 / 3), ("top up", 2 / 3)]
    assert list(pd.read_parquet(tmp_path / "mteb_tasks").label_shares[0]) == [
        {"label": "lost card", "share": 1 / 3},
        {"label": "top up", "share": 2 / 3},
    ]


def test_a_file_of_before_the_test_data_had_a_hash_is_read_beside_newer_ones(tmp_path: Path) -> None:
    path = append_history(tmp_path, "run-1", [score_row("run-1")])
    pq.write_table(pq.ParquetFile(path).read().drop_columns(["test_sha256"]), path)
    append_history(tmp_path, "run-2", [score_row("run-2")])
    assert [row.test_sha256 for row in read_history(tmp_path)] == [None, "ef"]
    assert runs_in_history(tmp_path) == ["run-1", "run-2"]


def test_the_files_are_compressed_with_zstd(tmp_path: Path) -> None:
    write_scores([score_row()], tmp_path / "scores.parquet")
    group = pq.ParquetFile(tmp_path / "scores.parquet").metadata.row_group(0)
    assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}


def test_history_keeps_one_file_per_run_and_reads_oldest_first(tmp_path: Path) -> None:
    late, early, ahead = "20260102-000000-abcd", "20260101-000000-abcd", "20990101-000000-abcd"
    rows = {
        late: [score_row(late), score_row(late, column="majority", created_at=NOON - timedelta(days=99))],  # taken over
        early: [score_row(early)],
        ahead: [score_row(ahead, created_at=NOON + timedelta(days=27_000))],
    }
    for run_id, of_run in rows.items():
        assert append_history(tmp_path, run_id, of_run) == tmp_path / "metrics" / f"scores-{run_id}.parquet"
    assert sorted(p.name for p in (tmp_path / "metrics").iterdir()) == [
        f"scores-{run_id}.parquet" for run_id in sorted(rows)
    ]
    assert read_history(tmp_path) == [*rows[ahead], *rows[early], *rows[late]]


def test_appending_a_run_again_replaces_it(tmp_path: Path) -> None:
    append_history(tmp_path, "run-1", [score_row(accuracy=0.25)])
    append_history(tmp_path, "run-1", [score_row(accuracy=0.75)])
    assert [row.accuracy for row in read_history(tmp_path)] == [0.75]


def means_over_seeds(runs: Path) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parent / "benchmarks" / "seeds.py"
    return subprocess.run([sys.executable, str(script), str(runs)], capture_output=True, text=True, check=False)


def test_the_table_over_seeds_is_made_of_one_run_for_each_and_refused_of_anything_else(tmp_path: Path) -> None:
    empty = means_over_seeds(tmp_path)
    assert (empty.returncode, empty.stdout) == (2, "")
    assert (
        f"error: {tmp_path}: there is no finished run in it; expected a run store with one run for each seed"
        in empty.stderr
    )
    columns: tuple[Column, ...] = ("frozen_few_shot", "adapted_few_shot", "frozen_full_data", "head")
    for seed in (0, 1):
        run_id = f"2026010{seed + 1}-000000-abcd"
        append_history(
            tmp_path,
            run_id,
            [score_row(run_id, column=column, seed=seed, accuracy=0.25 + seed / 2) for column in columns],
        )
    table = means_over_seeds(tmp_path)
    assert (table.returncode, table.stderr) == (0, "")
    assert "| Mean | 50.0 | 50.0 | +0.0 | 50.0 | 50.0 " in table.stdout
    append_history(tmp_path, "20260103-000000-abcd", [score_row("20260103-000000-abcd", seed=1)])
    twice = means_over_seeds(tmp_path)
    assert twice.returncode == 2
    assert "head: expected one row for each seed of [0, 1], found those of [0, 1, 1]" in twice.stderr
    assert "Traceback" not in twice.stderr + empty.stderr


def test_a_row_of_another_run_is_not_appended(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="another run"):
        append_history(tmp_path, "run-2", [score_row("run-1")])


def test_history_is_empty_before_the_first_run(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []


def test_pandas_and_arrow_read_the_history_as_one_data_set(tmp_path: Path) -> None:
    append_history(tmp_path, "run-1", [score_row("run-1")])
    append_history(tmp_path, "run-2", [score_row("run-2", column="majority")])
    # What a killed run leaves behind disturbs nobody.
    (tmp_path / "metrics" / ".scores-run-3.parquet.0a.tmp").write_bytes(b"PAR1 half")
    assert sorted(pd.read_parquet(tmp_path / "metrics")["run_id"]) == ["run-1", "run-2"]
    assert pyarrow.dataset.dataset(tmp_path / "metrics").count_rows() == 2
    assert len(read_history(tmp_path)) == 2


@pytest.mark.parametrize("keep", [0, 3, 400, -1])
def test_a_cut_file_is_named_in_the_error(tmp_path: Path, keep: int) -> None:
    path = append_history(tmp_path, "run-1", [score_row()])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"scores-run-1\.parquet: damaged"):
        read_history(tmp_path)


def test_a_flipped_bit_never_changes_a_score_unnoticed(tmp_path: Path) -> None:
    path = append_history(tmp_path, "run-1", [score_row()])
    whole = path.read_bytes()
    accuracies = pq.ParquetFile(path).metadata.row_group(0).column(SCORES_SCHEMA.get_field_index("accuracy"))
    first = accuracies.dictionary_page_offset or accuracies.data_page_offset
    num_noticed = 0
    for index in range(first, first + accuracies.total_compressed_size):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        try:
            assert read_scores(path) == [score_row()]
        except DataError as error:
            num_noticed += "damaged" in str(error)
    # The 8 bytes of the value itself at least.
    assert num_noticed >= 8


def test_missing_columns_are_listed(tmp_path: Path) -> None:
    path = append_history(tmp_path, "run-1", [score_row()])
    pq.write_table(pq.ParquetFile(path).read().drop_columns(["seed", "low"]), path)
    with pytest.raises(DataError, match=r"scores-run-1\.parquet: lacks the columns low, seed;"):
        read_history(tmp_path)


def test_a_table_of_more_rows_than_a_run_can_write_is_not_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"run_id": pa.array(["x"]).take(pa.array([0] * 1_000_001))}), tmp_path / "gate.parquet")
    with pytest.raises(DataError, match=r"gate\.parquet: has 1,000,001 rows"):
        read_gate(tmp_path / "gate.parquet")


def test_a_value_that_no_score_can_have_is_an_error(tmp_path: Path) -> None:
    path = append_history(tmp_path, "run-1", [score_row()])
    table = pq.ParquetFile(path).read()
    for name, value in (
        ("accuracy", pa.array([93.1])),
        ("column", pa.array(["lora"])),
        ("run_id", pa.array([None], pa.string())),
        ("seconds", pa.array([{"s": 1.5}])),
    ):
        pq.write_table(table.set_column(table.schema.get_field_index(name), name, value), path)
        with pytest.raises(DataError, match=r"scores-run-1\.parquet"):
            read_history(tmp_path)


def test_a_file_that_pandas_rewrote_with_a_column_more_is_still_read(tmp_path: Path) -> None:
    path = append_history(tmp_path, "run-1", [score_row(), score_row(column="majority")])
    pd.read_parquet(path).assign(remark="checked").to_parquet(path)
    assert read_history(tmp_path) == [score_row(), score_row(column="majority")]


def test_a_time_without_zone_is_read_as_utc(tmp_path: Path) -> None:
    path = append_history(tmp_path, "run-1", [score_row()])
    table = pq.ParquetFile(path).read()
    index = table.schema.get_field_index("created_at")
    pq.write_table(table.set_column(index, "created_at", table["created_at"].cast(pa.timestamp("us"))), path)
    assert read_history(tmp_path) == [score_row()]


def test_a_missing_file_is_the_users_fault(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.parquet: expected a scores file, found none"):
        read_scores(tmp_path / "nothing.parquet")


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    # A limit on file sizes makes the write fail half-way, as a full disk does.
    path = tmp_path / "scores.parquet"
    write_scores([score_row()], path)
    script = f"""
import resource, signal, sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from pathlib import Path
from test_metrics_table import score_row
from pipeline.errors import LorafleetError
from pipeline.history.tables import write_scores
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    write_scores([score_row(accuracy=0.0)], Path({str(path)!r}))
except LorafleetError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert "scores.parquet: cannot be written: " in done.stdout
    assert read_scores(path) == [score_row()]
    assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet"]


def test_a_writer_that_is_killed_leaves_whole_files_only(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from pathlib import Path
from test_metrics_table import score_row
from pipeline.history.tables import append_history
rows = [score_row(accuracy=i / 5000) for i in range(5000)]
print("ready", flush=True)
while True:
    append_history(Path({str(tmp_path)!r}), "run-1", rows)
"""
    append_history(tmp_path, "run-1", [score_row()])
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        sizes, names = set(), set()
        for _ in range(100):
            sizes.add(len(pd.read_parquet(tmp_path / "metrics", columns=["accuracy"])))
            names |= {path.name for path in (tmp_path / "metrics").glob("*.parquet")}
        os.kill(writer.pid, signal.SIGKILL)
    assert sizes <= {1, 5000}
    assert names == {"scores-run-1.parquet"}
    assert len(read_history(tmp_path)) in (1, 5000)


def test_a_place_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "metrics").write_text("a file where the folder should be")
    with pytest.raises(LorafleetError, match=r"scores-run-1\.parquet: cannot be written"):
        append_history(tmp_path, "run-1", [score_row()])
