"""The reload gate: a saved adapter, loaded again in a fresh process, must give the logits it was trained to give."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.adapter import Adapter, check_both_forms, load_adapter
from pipeline.config import EncoderConfig
from pipeline.encoder import Encoder, FloatArray, find_encoder
from pipeline.errors import VerificationError
from pipeline.records import Runtime
from pipeline.run_folder import TaskFolder

TOLERANCE = 1e-4
"""Largest difference between a logit before saving and after loading; the same machine gives 0."""


@dataclass(frozen=True)
class Reloaded:
    """What the fresh process saw."""

    logits: FloatArray
    """float32 (texts, classes)."""
    effect: float
    """Largest absolute difference that the adapter makes to a text vector."""
    label_names: tuple[str, ...]


def check_reload(adapter: Adapter, folder: TaskFolder, texts: list[str], *, offline: bool) -> None:
    """Load the saved adapter in a fresh process and compare it with the one in memory.

    Raises: VerificationError: logits differ, the adapter has no effect, label names differ, or it cannot be loaded.
    """
    encoder = adapter.encoder
    expected = adapter.logits_of_vectors(encoder.embed(encoder.tokenise(texts)))
    found = _reload_elsewhere(folder, encoder, texts, offline=offline)
    difference = float(np.abs(found.logits - expected).max()) if found.logits.shape == expected.shape else float("inf")
    if not difference <= TOLERANCE:
        raise VerificationError(f"{folder.root.name}: logits differ by {difference:.3g} after reloading (allowed: {TOLERANCE:g})")
    if not found.effect > 0:
        raise VerificationError(f"{folder.root.name}: the reloaded adapter has no effect on the encoder")
    if found.label_names != adapter.label_names:
        raise VerificationError(f"{folder.root.name}: label names after reloading are not those trained with")


def _reload_elsewhere(folder: TaskFolder, encoder: Encoder, texts: list[str], *, offline: bool) -> Reloaded:
    request = {
        "folder": str(folder.root),
        "encoder": encoder.config.model_dump() | {"revision": encoder.config.revision or _hub_commit(encoder)},
        "runtime": encoder.runtime.model_dump(),
        "texts": texts,
        "offline": offline,
    }
    with tempfile.TemporaryFile("w+b") as answer:
        process = subprocess.run(
            [sys.executable, "-P", "-m", "pipeline.reload"],
            input=json.dumps(request).encode(),
            stdout=answer,
            stderr=subprocess.PIPE,
            check=False,
        )
        if process.returncode != 0:
            reason = process.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise VerificationError(f"{folder.root.name}: the saved adapter cannot be loaded in a fresh process: {reason[0]}")
        answer.seek(0)
        values: dict[str, Any] = json.loads(answer.read())
    return Reloaded(np.array(values["logits"], dtype=np.float32), values["effect"], tuple(values["label_names"]))


def _hub_commit(encoder: Encoder) -> str | None:
    local = encoder.config.name.startswith("package:") or Path(encoder.config.name).is_dir()
    return None if local else encoder.ref.revision


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    config, runtime = EncoderConfig.model_validate(request["encoder"]), Runtime.model_validate(request["runtime"])
    torch.set_num_threads(runtime.threads)
    encoder = Encoder(find_encoder(config, offline=request["offline"]), config, runtime)
    tokens = encoder.tokenise(request["texts"])
    frozen = encoder.embed(tokens)
    folder = TaskFolder(Path(request["folder"]))
    adapter = load_adapter(folder, encoder)
    check_both_forms(adapter, folder)
    adapted = encoder.embed(tokens)
    return {
        "logits": adapter.logits_of_vectors(adapted).tolist(),
        "effect": float(np.abs(adapted - frozen).max()),
        "label_names": list(adapter.label_names),
    }


if __name__ == "__main__":
    json.dump(_answer(json.load(sys.stdin)), sys.stdout)
