"""Arrow schemas of the metrics tables."""

from __future__ import annotations

import pyarrow as pa

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
"""Schema of scores: one row per MTEB task and column of the score table, with the fields of ``ScoreRow`` in order."""

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
        pa.field("validation_score", pa.float64()),
    ]
)
"""Schema of epochs: one row per MTEB task and epoch, with run, MTEB task, then the fields of ``EpochRow`` in order."""

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
        # A list of structs: pandas and Polars have no map type, and would give a list of unnamed pairs.
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
"""Schema of data and cost: one row per MTEB task, with the fields of ``MtebTaskRow`` in order."""

GATE_SCHEMA = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("mteb_task", pa.string(), nullable=False),
        pa.field("to", pa.string(), nullable=False),
        pa.field("decision", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("metric", pa.string()),
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
"""Schema of gate decisions: one row per MTEB task, with the fields of ``GateDecision`` in order."""
