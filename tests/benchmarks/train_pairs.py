"""Training speed of embedding adapters against sentence-transformers' trainer with PEFT, and the score on test.

    .venv/bin/python tests/benchmarks/train_pairs.py STSBenchmark PackageDescriptions
    .venv/bin/python tests/benchmarks/train_pairs.py STSBenchmark --rows 320 --turns 1    # a smoke test

Every arm trains rank-8 LoRA on query, key, value and output projection of all-MiniLM-L6-v2 with the same pairs, loss
(CoSENT; bidirectional InfoNCE for PackageDescriptions), epochs, batch size, learning rate and threads. The arms take
turns, each in a fresh process. Ratios are computed within a turn, and their medians are reported. With ``--full``,
every weight of the encoder is trained instead: the arm ``full`` of a comparison against the trainer without PEFT.

ours             ``pipeline.training.train.train_adapter``
ours_float32     the same without bfloat16
trainer          SentenceTransformerTrainer as it comes: float32, random batches
trainer_bf16     the same with ``bf16=True``
trainer_eager    the same with ``bf16=True`` and eager attention, whose backward pass is faster on short texts
trainer_sorted   the same with batches of texts of similar length, as ours has, by a batch sampler of a few lines

pairs/s = training pairs x epochs / seconds from texts in memory to trained weights, with tokenising and attaching the
adapter, without imports and reading the encoder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RANK, ALPHA, MAX_TOKENS, WEIGHT_DECAY = 8, 16, 128, 0.01
LEARNING_RATES = {"STSBenchmark": 5e-4, "PackageDescriptions": 1e-3}
FULL_RATES = {"STSBenchmark": 5e-5, "PackageDescriptions": 5e-5}
BATCH_SIZES = {"STSBenchmark": 32, "PackageDescriptions": 64}
TARGETS = r".*attention\.(self\.(query|key|value)|output\.dense)"


def main() -> None:
    """Take turns over the arms of each data set and print one Markdown row per arm."""
    options = _options()
    if options.child:
        print(json.dumps(run_arm(options.child, options)))
        return
    for name in options.sets:
        runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
        for turn in range(options.turns):
            for arm in options.arms:
                runs[arm].append(_in_fresh_process(arm, name, turn, options))
                print(f"{name}, turn {turn + 1}, {arm}: {runs[arm][-1]}", file=sys.stderr, flush=True)
        print("| set | arm | pairs/s | score on test | ours is |\n|---|---|---|---|---|")
        for arm, of_arm in runs.items():
            rates = [run["rate"] for run in of_arm]
            ratios = [ours["rate"] / rate for ours, rate in zip(runs.get("ours", of_arm), rates, strict=True)]
            scores = [run["score"] for run in of_arm]
            print(f"| {name} | {arm} | {_spread(rates, 0)} | {_spread(scores, 4)} | {_spread(ratios, 2)}× |")


def run_arm(arm: str, options: argparse.Namespace) -> dict[str, float]:
    """Train one arm, and score its vectors on test."""
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.turn)
    (name,) = options.sets
    data = _read(options, name)
    seconds, embed = ARMS[arm](data, name, options)
    pairs = len(data.train)
    return {"rate": pairs * options.epochs / seconds, "score": _score(data, embed), "seconds": seconds}


def train_ours(data: Any, name: str, options: argparse.Namespace, *, precision: str = "auto") -> Any:
    """The project's own training, as a worker runs it."""
    from pipeline.adapter.full_encoder import FullEncoder
    from pipeline.config import AdapterConfig, EncoderConfig, TrainConfig
    from pipeline.encoder.encoder import Encoder
    from pipeline.encoder.files import find_encoder
    from pipeline.encoder.runtime import choose_runtime
    from pipeline.encoder.trainable import TrainableEncoder
    from pipeline.objectives.pairs import PairObjective, tokenise_pairs
    from pipeline.training.train import train_adapter, train_state

    rate = (FULL_RATES if options.full else LEARNING_RATES)[name]
    config = TrainConfig.model_validate(
        {"learning_rate": rate, "batch_size": BATCH_SIZES[name], "weight_decay": WEIGHT_DECAY}
        | {"temperature": 0.05, "seed": options.turn, "precision": precision}
    )
    encoder_config = EncoderConfig(max_tokens=MAX_TOKENS)
    runtime = choose_runtime(config, threads=options.threads, use_gpu=options.device == "cuda")
    files = find_encoder(encoder_config, offline=True)
    encoder = (TrainableEncoder if options.full else Encoder)(files, encoder_config, runtime)
    _warm_up(options)
    started = time.perf_counter()
    objective = PairObjective(
        tokenise_pairs(data.train, encoder, prefixes=None),
        None,
        family=data.task.objective,
        loss=data.task.loss,
        config=config,
    )
    if isinstance(encoder, TrainableEncoder):
        train_state(
            objective,
            lambda: FullEncoder(encoder, None, seed=config.seed),
            conditions={},
            train_config=config,
            max_epochs=options.epochs,
        )
    else:
        train_adapter(
            objective,
            encoder,
            adapter_config=AdapterConfig(rank=RANK, alpha=ALPHA),
            train_config=config,
            max_epochs=options.epochs,
        )
    return time.perf_counter() - started, lambda texts: encoder.embed(encoder.tokenise(texts))


def train_with_trainer(
    data: Any, name: str, options: argparse.Namespace, *, attention: str = "sdpa", is_sorted: bool = False, **best: Any
) -> Any:
    """SentenceTransformerTrainer and PEFT. ``best`` are training arguments that differ from the defaults."""
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss

    from pipeline.config import EncoderConfig
    from pipeline.encoder.files import find_encoder

    model = SentenceTransformer(
        str(find_encoder(EncoderConfig(), offline=True).folder),
        device=options.device,
        model_kwargs={"attn_implementation": attention},
    )
    model.max_seq_length = MAX_TOKENS
    if is_sorted:
        tokens = model.tokenizer(list(data.train.columns[0]))["input_ids"]
        other = model.tokenizer(list(data.train.columns[1]))["input_ids"]
        lengths = np.array([len(one) + len(two) for one, two in zip(tokens, other, strict=True)])
        best["batch_sampler"] = _sorted_batches(lengths, BATCH_SIZES[name], options)
    _warm_up(options)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        columns: dict[str, Any] = {"sentence1": data.train.columns[0], "sentence2": data.train.columns[1]}
        if data.train.scores is not None:
            columns["score"] = data.train.scores.tolist()
        if not options.full:
            model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.1, target_modules=TARGETS))
        both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        loss = CoSENTLoss(model) if "score" in columns else MultipleNegativesRankingLoss(model, **both)
        arguments = Arguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH_SIZES[name],
            num_train_epochs=options.epochs,
            learning_rate=(FULL_RATES if options.full else LEARNING_RATES)[name],
            weight_decay=WEIGHT_DECAY,
            lr_scheduler_type="cosine",
            seed=options.turn,
            use_cpu=options.device == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **best,
        )
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss
        )
        trainer.train()
        seconds = time.perf_counter() - started
    return seconds, lambda texts: model.encode(texts, batch_size=64)


def _sorted_batches(lengths: np.ndarray, batch_size: int, options: argparse.Namespace) -> Callable[..., Any]:
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    from pipeline.objectives.batches import epoch_batches

    class Sorted(DefaultBatchSampler):  # type: ignore[misc]
        def __iter__(self) -> Iterator[list[int]]:
            order = np.random.default_rng((options.turn, self.epoch))
            for rows in epoch_batches(lengths, batch_size=batch_size, order=order):
                yield rows.tolist()

    return lambda dataset, **given: Sorted(SequentialSampler(dataset), **given)


ARMS: dict[str, Callable[..., Any]] = {
    "ours": train_ours,
    "ours_float32": lambda *given: train_ours(*given, precision="float32"),
    "trainer": train_with_trainer,
    "trainer_bf16": lambda *given: train_with_trainer(*given, bf16=True),
    "trainer_eager": lambda *given: train_with_trainer(*given, attention="eager", bf16=True),
    "trainer_sorted": lambda *given: train_with_trainer(*given, attention="eager", is_sorted=True, bf16=True),
}


def _score(data: Any, embed: Callable[[list[str]], np.ndarray]) -> float:
    """Spearman's correlation on test, or nDCG@10 among the passages of test, computed alike for all arms."""
    from scipy.stats import spearmanr

    from pipeline.objectives.ranking import ndcg_at, relevant_ranks

    first = np.asarray(embed(data.test.columns[0]), dtype=np.float32)
    if data.test.scores is None:
        corpus = list(dict.fromkeys(data.test.columns[1]))
        passages = np.asarray(embed(corpus), dtype=np.float32)
        row_of = {passage: row for row, passage in enumerate(corpus)}
        numbers, rows = np.arange(len(first)), np.array([row_of[passage] for passage in data.test.columns[1]])
        ranks = relevant_ranks(first, passages, query_numbers=numbers, passage_numbers=rows)
        return float(ndcg_at(10, query_numbers=numbers, ranks=ranks).mean())
    second = np.asarray(embed(data.test.columns[1]), dtype=np.float32)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(spearmanr((first * second).sum(axis=1) / lengths, data.test.scores).statistic)


def _read(options: argparse.Namespace, name: str) -> Any:
    from embedding_quality import read_set

    data: Any = read_set(options.data / name, epochs=options.epochs)
    chosen = np.arange(len(data.train)) < (options.rows or len(data.train))
    return dataclasses.replace(data, train=data.train.take(chosen))


def _warm_up(options: argparse.Namespace) -> None:
    """Import what the first optimiser imports, and start a GPU, which every arm would pay for alike."""
    import torch
    import torch._dynamo

    if options.device == "cuda":
        torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).sum().item()


def _in_fresh_process(arm: str, name: str, turn: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, name, "--child", arm, "--turn", str(turn), "--data", str(options.data)]
    command += ["--epochs", str(options.epochs), "--threads", str(options.threads), "--device", options.device]
    command += ["--rows", str(options.rows)] if options.rows else []
    command += ["--full"] if options.full else []
    threads = {"OMP_NUM_THREADS": str(options.threads), "RAYON_NUM_THREADS": str(options.threads)}
    environment = os.environ | threads | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{arm}: {done.stderr[-3000:]}")
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def _spread(values: list[float], digits: int) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sets", nargs="+", choices=tuple(BATCH_SIZES), help="Folders of --data.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/pairs"))
    parser.add_argument("--rows", type=int, help="Training pairs. Default: all.")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--full", action="store_true", help="Train every weight instead of LoRA.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
