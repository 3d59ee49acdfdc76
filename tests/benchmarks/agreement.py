"""Agreement of the bulk kernel (merged, fastest dtype) with the adapters (not merged, float32) on real test texts.

    python tests/benchmarks/agreement.py runs/<run>

Prints, for every adapter of the run whose MTEB task is in the mirror, the fraction of equal labels, the largest top-two
gap (in float32) of a text with different labels, and both accuracies. The exit code is 1 if less than 99.5 % agree, a
gap is 0.05 or more, or the accuracies differ by more than 0.1 points.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from pipeline.adapter.description import FoundAdapter
from pipeline.adapter.files import load_adapter
from pipeline.config import TrainConfig
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.runtime import choose_runtime
from pipeline.inference.classifier import load_classifier
from pipeline.inference.encoder_of_adapter import find_encoder_of
from pipeline.inference.reference import find_adapters

AGREEMENT, GAP, POINTS = 0.995, 0.05, 0.1


@dataclass(frozen=True)
class Agreement:
    """One adapter's answers, both ways."""

    texts: int
    equal: float
    largest_gap: float
    """Largest gap of float32 probabilities over the texts with different labels."""
    accuracy: float
    exact_accuracy: float

    @property
    def good(self) -> bool:
        return (
            self.equal >= AGREEMENT
            and self.largest_gap < GAP
            and abs(self.accuracy - self.exact_accuracy) <= POINTS / 100
        )


def main() -> None:
    """One line per adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--mirror", type=Path, default=Path(__file__).resolve().parents[3] / "shared" / "data" / "mteb")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    print(
        "| MTEB task | Texts | Equal labels | Largest gap where not | Accuracy, bulk | Accuracy, float32 |\n"
        "|---|---|---|---|---|---|"
    )
    good = True
    for weights in sorted(options.run.glob("*/adapter_model.safetensors")):
        found = find_adapters([str(weights.parent)], offline=True)[0]
        path = options.mirror / found.name / "test.parquet"
        if path.is_file():
            result = compare(found, path, threads=threads, use_gpu=options.device == "cuda")
            good &= result.good
            facts = (
                f"{result.equal:.2%} | {result.largest_gap:.3f} | {result.accuracy:.2%} | {result.exact_accuracy:.2%}"
            )
            print(f"| {found.name} | {result.texts} | {facts} |", flush=True)
    sys.exit(0 if good else 1)


def compare(found: FoundAdapter, path: Path, *, threads: int, use_gpu: bool) -> Agreement:
    """Classify a test split both ways."""
    table = pq.read_table(path)
    if "lang" in table.column_names:
        table = table.filter(pq.read_table(path).column("lang").to_pandas().isin(["en"]).to_numpy())
    texts, labels = table.column("text").to_pylist(), [str(label) for label in table.column("label").to_pylist()]
    classifier = load_classifier([found], encoder=None, threads=threads, use_gpu=use_gpu, offline=True)
    (answers,) = classifier.classify(classifier.tokenise(texts))
    files, config = find_encoder_of(found, None, offline=True)
    encoder = Encoder(files, config, choose_runtime(TrainConfig(precision="float32"), threads=threads, use_gpu=use_gpu))
    adapter = load_adapter(found.folder, encoder)
    logits = torch.from_numpy(adapter.logits_of_vectors(encoder.embed(encoder.tokenise(texts))))
    temperature = found.calibration.temperature if found.calibration else 1.0
    scores = torch.softmax(logits / temperature, dim=1).numpy()
    exact, ordered = scores.argmax(axis=1), np.sort(scores, axis=1)
    different = exact != answers.labels
    gaps = (ordered[:, -1] - ordered[:, -2])[different]
    right = np.array(_names(found, labels, table.column_names, table))
    return Agreement(
        len(texts),
        float(1 - different.mean()),
        float(gaps.max()) if len(gaps) else 0.0,
        float((np.array(found.label_names)[answers.labels] == right).mean()),
        float((np.array(found.label_names)[exact] == right).mean()),
    )


def _names(found: FoundAdapter, labels: list[str], columns: list[str], table: object) -> list[str]:
    """Labels as the adapter names them."""
    if set(labels) <= set(found.label_names):
        return labels
    assert "label_text" in columns, (
        f"{found.name}: labels {sorted(set(labels))[:3]} are not the adapter's {found.label_names[:3]}"
    )
    names: list[str] = table.column("label_text").to_pylist()  # type: ignore[attr-defined]
    return names


if __name__ == "__main__":
    main()
