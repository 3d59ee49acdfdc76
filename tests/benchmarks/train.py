"""Training speed against its rivals, with test accuracy, on Banking77 and all-MiniLM-L6-v2.

    python tests/benchmarks/train.py                                     # three turns on all of train: over an hour
    python tests/benchmarks/train.py --texts 320 --epochs 1 --pairs 1    # a smoke test, whose figures mean nothing
    python tests/benchmarks/train.py --precision float32 --arms ours trainer_default    # for CPUs without bf16 units
    python tests/benchmarks/train.py --device cuda --arms ours ours_launched trainer_default trainer_best plain_loop

Every arm trains rank-8 LoRA on query, key, value and output projection plus a linear head, with the same texts, epochs,
batch size, learning rate and threads. The arms take turns, each in a fresh process. Ratios are computed within a turn,
and the medians over turns are reported.

ours              ``pipeline.training.train.train_adapter``, head started at random
ours_probe        the same, head started from the full-data probe, whose embedding and fitting are part of its time
ours_launched     the same as ours on a GPU, but with every step launched kernel by kernel instead of replayed
trainer_default   Hugging Face Trainer + PEFT as they come: fp32, random batches padded to their longest text
trainer_best      the same with ``bf16=True`` and length grouping
plain_loop        PEFT on a bf16 frozen base in evaluation mode, eager attention (sdpa on a GPU), length-bucketed
                  batches, fused AdamW

texts/s = training texts x epochs / seconds from texts in memory to trained weights. It includes tokenising, attaching
the adapter and compiling, but not imports and reading the encoder from disk. Validation and checkpoints are timed
afterwards and reported separately. At the end, the machine, the table, the matrix-multiplication roof of the same run
and our fraction of it are printed as Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.data.dataset import TaskData
    from pipeline.encoder.encoder import Encoder
    from pipeline.encoder.files import EncoderFiles

TASK = "Banking77Classification"
MAX_TOKENS, BATCH_SIZE, RANK, ALPHA, DROPOUT, WEIGHT_DECAY, CLIP = 128, 32, 8, 16, 0.1, 0.01, 1.0
TARGETS = r".*attention\.(self\.(query|key|value)|output\.dense)"  # `dense` alone also names MLP layers
DEFAULT_ARMS = ("ours", "trainer_default", "trainer_best", "plain_loop")
ROOF_SHAPES = {"cpu": (2048, 1536, 1536), "cuda": (8192, 8192, 8192)}
HEADINGS = (
    "Arm",
    "Precision, attention",
    "Texts/s",
    "Test accuracy",
    "Texts/s of ours / of this arm",
    "Validation, s per 1,000 texts",
    "One checkpoint, s",
    "GFLOP/s",
)


@dataclass(frozen=True)
class Settings:
    """Settings that every arm is given."""

    texts: int | None
    rival_texts: int | None
    epochs: int
    learning_rate: float
    threads: int
    data: str
    precision: str
    device: str

    def num_texts(self, arm: str) -> int | None:
        """Training texts of an arm; none stands for all."""
        return self.rival_texts if self.rival_texts and arm.startswith("trainer") else self.texts


@dataclass(frozen=True)
class Trained:
    """Result of an arm: the time of its training, and functions that measure the rest in the same way for all."""

    seconds: float
    precision: str
    attention: str
    predict: Callable[[Tensor, Tensor], Tensor]
    """Token ids and mask -> logits."""
    save_checkpoint: Callable[[Path], float]
    """Writes what a resume needs, in the arm's own way; returns the seconds."""


# Children: one arm, one process


def run_arm(arm: str, settings: Settings, *, seed: int) -> dict[str, Any]:
    """Train one arm and measure it; everything that is not part of the figure happens before or after the clock."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(seed)
    data = load_task(settings, settings.num_texts(arm))
    trained = ARMS[arm](data, settings, seed)
    started = time.perf_counter()
    accuracy = test_accuracy(trained.predict, data, device=settings.device)
    validation = (time.perf_counter() - started) / len(data.test_texts) * 1000
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = trained.save_checkpoint(Path(folder))
    texts = len(data.train_texts)
    return {
        "texts": texts,
        "seconds": trained.seconds,
        "texts_per_second": texts * settings.epochs / trained.seconds,
        "flops": training_flops(data) * settings.epochs,
        "accuracy": accuracy if settings.num_texts(arm) == settings.texts else None,
        "validation_seconds_per_1000": validation,
        "checkpoint_seconds": checkpoint,
        "precision": trained.precision,
        "attention": trained.attention,
        "threads": torch.get_num_threads(),
    }


def load_task(settings: Settings, num_texts: int | None) -> TaskData:
    """Banking77 with all of train to learn from, or an equal share of each class."""
    from pipeline.config import DataConfig, MtebTaskConfig, TrainConfig
    from pipeline.data.catalogue import plan_task
    from pipeline.data.dataset import load_data

    task = plan_task(
        MtebTaskConfig(name=TASK), data=DataConfig(mirror=settings.data, offline=True), default_epochs=settings.epochs
    )
    data = load_data(task, config=TrainConfig(early_stopping_split="test"), offline=True)
    shuffled = np.random.default_rng(0).permutation(len(data.train_texts))
    before = np.zeros(len(shuffled), dtype=np.int64)  # how many texts of the same class come first
    for label in range(len(data.label_names)):
        of_label = shuffled[data.train_labels[shuffled] == label]
        before[of_label] = np.arange(len(of_label))
    rows = np.sort(shuffled[np.argsort(before[shuffled], kind="stable")][:num_texts])
    rows = np.random.default_rng(1).permutation(rows)
    return dataclasses.replace(
        data, train_texts=[data.train_texts[row] for row in rows], train_labels=data.train_labels[rows]
    )


def train_ours(data: TaskData, settings: Settings, seed: int, *, probe: bool = False, replay: bool = True) -> Trained:
    """The project's own training, as a worker runs it."""
    from pipeline.config import AdapterConfig, EncoderConfig, TrainConfig
    from pipeline.encoder.encoder import Batch, Encoder
    from pipeline.encoder.runtime import choose_runtime
    from pipeline.objectives.batches import LabelledTokens
    from pipeline.objectives.objective import Classification
    from pipeline.training import loop
    from pipeline.training.train import train_adapter

    config = TrainConfig.model_validate(
        {
            "learning_rate": settings.learning_rate,
            "weight_decay": WEIGHT_DECAY,
            "batch_size": BATCH_SIZE,
            "gradient_clip": CLIP,
        }
        | {"head_init": "probe" if probe else "random", "seed": seed, "precision": settings.precision}
    )
    runtime = choose_runtime(config, threads=settings.threads, use_gpu=settings.device == "cuda")
    encoder = Encoder(_encoder_files(), EncoderConfig(max_tokens=MAX_TOKENS), runtime)
    parts: dict[str, Any] = {"train_config": config}
    learns: dict[str, Any] = {"label_names": data.label_names, "config": config}
    parts["adapter_config"] = AdapterConfig(rank=RANK, alpha=ALPHA, dropout=DROPOUT)
    if not replay:
        loop.is_recordable = lambda encoder: False
    _import_ahead("sklearn.linear_model", "sklearn.model_selection")
    _start_device(settings)
    started = time.perf_counter()
    tokens = LabelledTokens(encoder.tokenise(data.train_texts), data.train_labels)
    start = _probe_start(data, encoder, tokens, seed) if probe else None
    objective = Classification(tokens, None, head_start=start, **learns)
    training = train_adapter(objective, encoder, max_epochs=settings.epochs, **parts)
    seconds = time.perf_counter() - started
    adapter = training.adapter
    adapter.eval()

    def save_checkpoint(folder: Path) -> float:
        adapter.detach()
        few = LabelledTokens(encoder.tokenise(data.train_texts[:BATCH_SIZE]), data.train_labels[:BATCH_SIZE])
        with _timed_checkpoints() as written:
            objective = Classification(few, None, **learns)
            train_adapter(objective, encoder, max_epochs=1, checkpoint=folder / "checkpoint.safetensors", **parts)
        return written[0]

    attention = runtime.attention + (", compiled" if runtime.compiled else "")
    return Trained(
        seconds, runtime.dtype, attention, lambda ids, mask: adapter.logits(Batch(ids, mask)), save_checkpoint
    )


def train_with_trainer(data: TaskData, settings: Settings, seed: int, **best: Any) -> Trained:
    """Hugging Face Trainer + PEFT; ``best`` are training arguments that differ from the defaults."""
    import torch
    from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

    folder = _encoder_files().folder
    base, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    scratch = tempfile.TemporaryDirectory()
    _import_ahead("peft")
    _start_device(settings)
    started = time.perf_counter()
    encoded = tokenizer(data.train_texts, truncation=True, max_length=MAX_TOKENS)
    labels = data.train_labels.tolist()
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], labels, strict=True)
    ]
    model = _classifier(_with_lora(base), num_classes=len(data.label_names))
    arguments = TrainingArguments(
        output_dir=scratch.name,
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        seed=seed,
        use_cpu=settings.device == "cpu",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **best,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    seconds = time.perf_counter() - started
    model.eval()

    def predict(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(settings.device, torch.bfloat16, enabled=arguments.bf16):
            logits: Tensor = model(ids, mask)["logits"]
        return logits.float()

    def save_checkpoint(folder: Path) -> float:
        scratch.cleanup()
        arguments.output_dir = str(folder)
        begun = time.perf_counter()
        trainer._save_checkpoint(model, trial=None)
        return time.perf_counter() - begun

    precision = "bfloat16 (autocast)" if arguments.bf16 else str(base.dtype).removeprefix("torch.")
    return Trained(seconds, precision, base.config._attn_implementation, predict, save_checkpoint)


def train_plain_loop(data: TaskData, settings: Settings, seed: int) -> Trained:
    """Train with the loop that a good engineer writes in forty lines."""
    import torch
    from torch import nn
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModel, AutoTokenizer

    folder = _encoder_files().folder
    dtype = torch.float32 if settings.precision == "float32" else torch.bfloat16
    attention = "eager" if settings.device == "cpu" else "sdpa"
    base = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = np.random.default_rng(seed)
    _import_ahead("peft")
    _start_device(settings)
    started = time.perf_counter()
    encoded = tokenizer(data.train_texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    ids, labels = [torch.tensor(row) for row in encoded], torch.from_numpy(data.train_labels)
    lengths = np.array([len(row) for row in ids])
    model = _classifier(_with_lora(base), num_classes=len(data.label_names)).to(settings.device)
    model.base.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    steps = settings.epochs * math.ceil(len(ids) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(settings.epochs):
        for rows in _bucketed_batches(lengths, rng):
            batch = pad_sequence([ids[row] for row in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
            mask = (torch.arange(batch.shape[1]) < torch.from_numpy(lengths[rows])[:, None]).long()
            loss = model(*(t.to(settings.device) for t in (batch, mask, labels[rows])))["loss"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            schedule.step()
    float(loss)  # waits for a GPU
    seconds = time.perf_counter() - started
    model.eval()

    def save_checkpoint(folder: Path) -> float:
        begun = time.perf_counter()
        torch.save(
            {"weights": trained, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()},
            folder / "checkpoint.pt",
        )
        return time.perf_counter() - begun

    return Trained(
        seconds,
        str(dtype).removeprefix("torch."),
        attention,
        lambda ids, mask: model(ids, mask)["logits"],
        save_checkpoint,
    )


ARMS: dict[str, Callable[[TaskData, Settings, int], Trained]] = {
    "ours": train_ours,
    "ours_probe": lambda data, settings, seed: train_ours(data, settings, seed, probe=True),
    "ours_launched": lambda data, settings, seed: train_ours(data, settings, seed, replay=False),
    "trainer_default": train_with_trainer,
    "trainer_best": lambda data, settings, seed: train_with_trainer(
        data, settings, seed, bf16=True, train_sampling_strategy="group_by_length"
    ),
    "plain_loop": train_plain_loop,
}


def test_accuracy(predict: Callable[[Tensor, Tensor], Tensor], data: TaskData, *, device: str) -> float:
    """Share of the test texts that an arm labels rightly: same tokens, same batches for every arm."""
    import torch

    from pipeline.encoder.encoder import batches_by_budget

    tokens = _tokens(data.test_texts)
    right = 0
    with torch.inference_mode():
        for rows in batches_by_budget(tokens.lengths, tokens_per_batch=4096):
            lengths = tokens.lengths[rows]
            mask = np.arange(lengths.max()) < lengths[:, None]
            ids = np.zeros(mask.shape, dtype=np.int64)
            ids[mask] = np.concatenate([tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]] for row in rows])
            logits = predict(torch.from_numpy(ids).to(device), torch.from_numpy(mask.astype(np.int64)).to(device))
            right += int((logits.argmax(dim=1).cpu().numpy() == data.test_labels[rows]).sum())
    return right / len(data.test_texts)


def training_flops(data: TaskData) -> int:
    """Floating-point operations that every implementation needs in one epoch, without padding.

    Linear layers: 2 x weights per token forward, and as many for the gradient of their input, except below the first
    layer's query, key and value, where nothing is trained. LoRA pairs and head: as many again for the gradient of their
    weights. Attention: two products forward and four backward, each 2 x tokens^2 x width per text. Norms, GELU and
    softmax are not counted.
    """
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(_encoder_files().folder)
    width, inner, layers = int(shape.hidden_size), int(shape.intermediate_size), int(shape.num_hidden_layers)
    lengths = _tokens(data.train_texts).lengths
    frozen = layers * (4 * width**2 + 2 * width * inner)
    below_first = 3 * width**2
    lora = layers * 4 * RANK * 2 * width
    lora_below_first = 3 * RANK * width
    per_token = 2 * (2 * frozen - below_first) + 2 * (3 * lora - lora_below_first)
    attention = layers * 6 * 2 * width * int((lengths**2).sum())
    head = 3 * 2 * width * len(data.label_names) * len(lengths)
    return per_token * int(lengths.sum()) + attention + head


def measure_roof(settings: Settings) -> dict[str, Any]:
    """FLOP/s of matrix products: the largest, and in the encoder's layer shapes with the mean tokens of a batch."""
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(settings.threads)
    shape = AutoConfig.from_pretrained(_encoder_files().folder)
    lengths = _tokens(load_task(settings, settings.texts).train_texts).lengths
    tokens, width, inner = round(BATCH_SIZE * float(lengths.mean())), shape.hidden_size, shape.intermediate_size
    layer = [(tokens, width, width)] * 4 + [(tokens, width, inner), (tokens, inner, width)]
    roof: dict[str, Any] = {"batch_tokens": tokens}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        largest = ROOF_SHAPES[settings.device]
        seconds = {size: _product_seconds(*size, dtype, device=settings.device) for size in {largest, *layer}}
        roof[name] = 2 * math.prod(largest) / seconds[largest]
        roof[f"{name}_layer"] = 2 * sum(map(math.prod, layer)) / sum(seconds[size] for size in layer)
    return roof


def _product_seconds(rows: int, inner: int, columns: int, dtype: torch.dtype, *, device: str) -> float:
    """Seconds of the fastest of many (rows, inner) x (inner, columns) products.

    On a GPU, twenty products are launched at once, and the fastest twenty count.
    """
    import torch

    x, weight = (
        torch.randn(rows, inner, dtype=dtype, device=device),
        torch.randn(columns, inner, dtype=dtype, device=device),
    )
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    fastest, until, at_once = math.inf, time.perf_counter() + 2.0, 1 if device == "cpu" else 20
    with torch.inference_mode():
        while time.perf_counter() < until:
            started = time.perf_counter()
            for _ in range(at_once):
                torch.mm(x, weight.t(), out=out)
            if device == "cuda":
                torch.cuda.synchronize()
            fastest = min(fastest, (time.perf_counter() - started) / at_once)
    return fastest


def _probe_start(data: TaskData, encoder: Encoder, tokens: Any, seed: int) -> Any:
    """The frozen stage of a worker, less the test texts: embed train, choose the probe's C, fit it."""
    from pipeline.config import EvaluateConfig
    from pipeline.evaluation.classification import RowFacts, evaluate_frozen

    little_test = dataclasses.replace(data, test_texts=data.test_texts[:1], test_labels=data.test_labels[:1])
    facts = RowFacts("benchmark", little_test, encoder, 0, seed)
    return evaluate_frozen(facts, EvaluateConfig(columns=("head",)), tokens=tokens.tokens).head_start


def _classifier(base: Any, *, num_classes: int) -> Any:
    """Mean pooling, dropout and a linear head on a base; labels -> loss, as the Trainer wants it."""
    import torch
    from torch import nn

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = base
            self.head = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(base.config.hidden_size, num_classes))

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            hidden = self.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weight = attention_mask.unsqueeze(-1).float()
            logits = self.head((hidden.float() * weight).sum(1) / weight.sum(1))
            if labels is None:
                return {"logits": logits}
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    return Classifier()


def _with_lora(base: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    pairs = sum("lora_A" in name for name, _ in model.named_parameters())
    assert pairs == 4 * base.config.num_hidden_layers, pairs
    return model


def _bucketed_batches(lengths: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    shuffled = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(shuffled), 64 * BATCH_SIZE):
        bucket = shuffled[start : start + 64 * BATCH_SIZE]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i : i + BATCH_SIZE] for i in range(0, len(bucket), BATCH_SIZE)]
    for index in rng.permutation(len(batches)):
        yield batches[index]


@contextmanager
def _timed_checkpoints() -> Iterator[list[float]]:
    """While open, collects the seconds of each checkpoint that training writes."""
    from pipeline.training.checkpoint import Checkpoint

    write, seconds = Checkpoint.write, []

    def timed(*args: Any) -> None:
        started = time.perf_counter()
        write(*args)
        seconds.append(time.perf_counter() - started)

    Checkpoint.write = timed  # type: ignore[method-assign,assignment]
    try:
        yield seconds
    finally:
        Checkpoint.write = write  # type: ignore[method-assign]


def _import_ahead(*modules: str) -> None:
    """Import what an arm would import on the clock otherwise. The first optimiser imports ``torch._dynamo``."""
    for module in (*modules, "torch._dynamo"):
        importlib.import_module(module)


def _start_device(settings: Settings) -> None:
    """A GPU's own start, which every arm would pay alike."""
    import torch

    if settings.device == "cuda":
        torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).sum().item()


def _tokens(texts: Sequence[str]) -> Any:
    from pipeline.config import EncoderConfig
    from pipeline.encoder.loading import load_tokenizer
    from pipeline.encoder.tokeniser import Tokeniser

    config = EncoderConfig(max_tokens=MAX_TOKENS)
    return Tokeniser(load_tokenizer(_encoder_files().folder, config), max_tokens=MAX_TOKENS)(texts)


def _encoder_files() -> EncoderFiles:
    from pipeline.config import EncoderConfig
    from pipeline.encoder.files import find_encoder

    return find_encoder(EncoderConfig(), offline=True)


# Parent: takes turns, then reports


def main() -> None:
    """Take turns over the arms, then print the report."""
    options = _options()
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**fields)
    if options.child:
        print(
            json.dumps(
                measure_roof(settings)
                if options.child == "roof"
                else run_arm(options.child, settings, seed=options.seed)
            )
        )
        return
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    roofs = []
    for pair in range(options.pairs):
        for arm in options.arms:
            runs[arm].append(_in_fresh_process(arm, settings, seed=pair))
            run = runs[arm][-1]
            print(
                f"turn {pair + 1}, {arm}: {run['texts_per_second']:.1f} texts/s, accuracy {_number(run['accuracy'])}",
                file=sys.stderr,
            )
        roofs.append(_in_fresh_process("roof", settings, seed=pair))
    roof = {key: max(r[key] for r in roofs) for key in roofs[0]}
    print("\n".join(report(settings, runs, roof)))
    if options.json:
        options.json.write_text(
            json.dumps({"settings": fields, "machine": machine(settings), "runs": runs, "roof": roofs}, indent=1)
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, help="training texts, an equal share of each class (default: all 10,003)")
    parser.add_argument("--rival-texts", type=int, help="fewer for the slow Trainer arms: a rate, but no accuracy")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--pairs", type=int, default=3, help="turns; the training seed is the number of the turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", default="../shared/data/mteb", help="folder of <TaskName>/<split>.parquet")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of ours; float32 also of plain_loop",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(DEFAULT_ARMS))
    parser.add_argument("--json", type=Path, help="also write every single measurement there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_fresh_process(arm: str, settings: Settings, *, seed: int) -> dict[str, Any]:
    """Threads, allocator and caches of one arm do not reach the next."""
    command = [sys.executable, __file__, "--child", arm, "--seed", str(seed)]
    for key, value in dataclasses.asdict(settings).items():
        command += [f"--{key.replace('_', '-')}", str(value)] if value is not None else []
    threads = {"OMP_NUM_THREADS": str(settings.threads), "RAYON_NUM_THREADS": str(settings.threads)}
    environment = (
        os.environ | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "PYTHONWARNINGS": "ignore"}
    )
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{arm} failed with exit code {done.returncode}; its message is above")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def machine(settings: Settings) -> dict[str, Any]:
    """Facts of the machine that the figures depend on."""
    from importlib.metadata import version

    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = dict(
        part.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in (part := line.replace("\t", ""))
    )
    flags = fields.get("flags", "").split()
    facts: dict[str, Any] = {
        "cpu": fields.get("model name", "unknown").strip(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
    }
    facts |= {flag: flag in flags for flag in ("amx_bf16", "avx512_bf16")}
    if settings.device == "cuda":
        import torch

        facts["cpu"] = f"{torch.cuda.get_device_name()} beside {facts['cpu']}"
    return facts | {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}


def report(settings: Settings, runs: dict[str, list[dict[str, Any]]], roof: dict[str, Any]) -> list[str]:
    """The lines of the Markdown report."""
    facts = machine(settings)
    units = ", ".join(f"{flag} {'yes' if facts[flag] else 'no'}" for flag in ("amx_bf16", "avx512_bf16"))
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers", "peft", "accelerate"))
    first = next(iter(runs.values()))
    lines = [
        f"Banking77, all-MiniLM-L6-v2, rank-{RANK} LoRA + linear head, batch {BATCH_SIZE}, max length {MAX_TOKENS}, "
        f"{settings.texts or 'all'} training texts, {settings.epochs} epochs, "
        f"learning rate {settings.learning_rate:g}, {len(first)} alternated turns (median, lowest–highest).",
        f"Machine: {facts['cpu']}, {facts['cores']} cores, {settings.threads} threads, {units}; {versions}.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "|---" * len(HEADINGS) + "|",
        *(_row(arm, of_arm, runs.get("ours")) for arm, of_arm in runs.items()),
        "",
        "Validation and checkpoints are not part of texts/s. GFLOP/s counts only operations that every implementation "
        "needs, so no padding.",
    ]
    if settings.rival_texts and any(arm.startswith("trainer") for arm in runs):
        lines.append(
            f"The Trainer arms were trained on {settings.rival_texts} texts for their rate only, "
            "so they have no accuracy ('-')."
        )
    return [*lines, "", *_roof_lines(settings, runs, roof)]


def _row(arm: str, runs: list[dict[str, Any]], ours: list[dict[str, Any]] | None) -> str:
    rates = [run["texts_per_second"] for run in runs]
    ratios = [a["texts_per_second"] / b for a, b in zip(ours, rates, strict=True)] if ours and arm != "ours" else []
    accuracies = [run["accuracy"] for run in runs if run["accuracy"] is not None]
    cells = [
        arm,
        f"{runs[0]['precision']}, {runs[0]['attention']}",
        _spread(rates, 1),
        _spread(accuracies, 4),
        _spread(ratios, 2, unit="×"),
        _spread([run["validation_seconds_per_1000"] for run in runs], 2),
        _spread([run["checkpoint_seconds"] for run in runs], 3),
        _spread([run["flops"] / run["seconds"] / 1e9 for run in runs], 0),
    ]
    return f"| {' | '.join(cells)} |"


def _roof_lines(settings: Settings, runs: dict[str, list[dict[str, Any]]], roof: dict[str, Any]) -> list[str]:
    rates = {name: (roof[name] / 1e9, roof[f"{name}_layer"] / 1e9) for name in ("bfloat16", "float32")}
    size = "×".join(map(str, ROOF_SHAPES[settings.device]))
    lines = [
        f"Matmul roof, {name}: {large:.0f} GFLOP/s at {size}, "
        f"{layer:.0f} at the encoder's layers with {roof['batch_tokens']} tokens."
        for name, (large, layer) in rates.items()
    ]
    for arm in ("ours", "ours_probe"):
        if arm in runs:
            rate = statistics.median(run["flops"] / run["seconds"] / 1e9 for run in runs[arm])
            large, layer = rates[runs[arm][0]["precision"]]
            lines.append(
                f"Fraction of it, {arm}: {rate / large:.1%} of the large product, "
                f"{rate / layer:.1%} of the encoder's layers."
            )
    return lines


def _spread(values: Sequence[float], digits: int, unit: str = "") -> str:
    if not values:
        return "-"
    middle = f"{statistics.median(values):.{digits}f}{unit}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
