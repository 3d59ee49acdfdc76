"""The evaluation of the frozen encoder on disk, so that a resumed job does not repeat it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from pipeline.adapter.head import HeadStart
from pipeline.evaluation.classification import Baselines
from pipeline.records import ScoreRow, ValueRow
from pipeline.store.files import write_atomically
from pipeline.training.checkpoint import tensor_file


class BaselinesFile:
    """File with the evaluation of the frozen encoder: arrays, with rows and times as metadata."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, baselines: Baselines, seconds: float) -> None:
        """Replace the file atomically. ``seconds`` is the duration of the evaluation."""
        tensors = {
            "predictions": torch.from_numpy(baselines.probe_predictions),
            "weight": torch.from_numpy(baselines.head_start.weight),
            "bias": torch.from_numpy(baselines.head_start.bias),
        }
        facts: dict[str, Any] = {"probe_c": baselines.probe_c, "seconds": seconds}
        for name, rows in (("rows", baselines.rows), ("values", baselines.values)):
            facts[name] = [row.model_dump(mode="json") for row in rows]
        facts["few_shot"] = baselines.few_shot
        write_atomically(self.path, tensor_file(tensors, {"facts": json.dumps(facts)}))

    def read(self) -> tuple[Baselines, float] | None:
        """Read the file. None if there is none, if it is truncated, or if another version wrote it."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="np") as file:
                facts = json.loads(file.metadata()["facts"])
                start = HeadStart(file.get_tensor("weight"), file.get_tensor("bias"))
                predictions = file.get_tensor("predictions").astype(np.int64)
            rows = tuple(ScoreRow.model_validate(row) for row in facts["rows"])
            values = tuple(ValueRow.model_validate(row) for row in facts["values"])
            baselines = Baselines(rows, values, facts["probe_c"], predictions, start, facts["few_shot"])
        except (SafetensorError, ValidationError, KeyError):  # truncated, or written by another version
            return None
        return baselines, facts["seconds"]
