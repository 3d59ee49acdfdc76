"""Checkpoints, from which a killed training resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.errors import ResumeError
from pipeline.records import EpochRow
from pipeline.store.files import write_atomically


@dataclass
class LoopState:
    """State that the rest of a training depends on, besides weights and arguments."""

    epochs: list[EpochRow] = field(default_factory=list)
    best_epoch: int = 0
    best_score: float = -math.inf
    last_gain: int = 1
    """First epoch that reached the best score. 1 for the start, because patience begins with the first epoch."""
    steps: int = 0
    finished: bool = False
    start_score: float | None = None
    """Selection score before the first epoch."""
    start_knows: bool = False
    """Whether the start was trained on the selection's examples."""


class Checkpoint:
    """State of a training after an epoch, in one safetensors file that is replaced atomically."""

    def __init__(self, path: Path, conditions: dict[str, Any]) -> None:
        self.path = path
        self.conditions = conditions

    def write(self, tensors: dict[str, Tensor], state: LoopState) -> None:
        """Replace the file atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        described = vars(state) | {"epochs": [row.model_dump() for row in state.epochs]}
        metadata = {"state": json.dumps(described), "conditions": json.dumps(self.conditions, sort_keys=True)}
        write_atomically(self.path, tensor_file(tensors, metadata))

    def read(self) -> tuple[dict[str, Tensor], LoopState] | None:
        """Read the saved state. None if there is no file, or if it is truncated.

        Raises: ResumeError: the file was written under other conditions.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            saved = json.loads(metadata["conditions"])
        except (SafetensorError, OSError):
            return None
        different = sorted(k for k in self.conditions.keys() | saved.keys() if self.conditions.get(k) != saved.get(k))
        if different:
            facts = ", ".join(f"{k}: then {saved.get(k)}, now {self.conditions.get(k)}" for k in different)
            raise ResumeError(f"{self.path}: made under other conditions ({facts}); delete it to train from the start")
        state = json.loads(metadata["state"])
        epochs = [EpochRow.model_validate(row) for row in state.pop("epochs")]
        return tensors, LoopState(epochs=epochs, **state)


def tensor_file(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Bytes of a safetensors file. Makes tensors contiguous, because safetensors refuses others."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata=metadata)
