"""Bulk jobs against their rivals, end to end: from Parquet to labels or vectors in Parquet, same rows, same cores.

    python tests/benchmarks/classify.py --adapter runs/<run>#Banking77Classification
    python tests/benchmarks/classify.py --adapter … --rows 2000 --rival-rows 500 --turns 1    # a smoke test
    python tests/benchmarks/classify.py --adapter … --shared … --arms eight eight_alone    # several adapters in one job
    python tests/benchmarks/classify.py --adapter … --data short --arms ours embed both encode encode_bf16    # vectors
    python tests/benchmarks/classify.py --adapter … --device cuda --arms ours pipeline sentence_transformers tokenise

Data sets: ``short`` (combined halves of Banking77's texts), ``duplicates`` (the same with 30 % repeated), ``imdb``.
The arms take turns, each in a fresh process. Ratios are computed within a turn, and their medians are reported. A slow
arm gets only the first ``--rival-rows`` rows, because its rows/s do not depend on their number. Start-up (imports,
weights, Ray, compiling) is reported separately.

ours                   the kernel in one process
ours_ray               the same through Ray Data, one actor per core
pipeline               transformers' text-classification pipeline, in batches
sentence_transformers  SentenceTransformer.encode in batches, and the head
ray_data               read_parquet, map_batches with a Hugging Face model, write_parquet; one actor per core
openvino               the merged encoder in OpenVINO, bfloat16, with our batches
onnx_int8              the merged encoder in ONNX Runtime, dynamic int8, with our batches
tokenise               reading and tokenising only: a ceiling
embed                  the kernel in one process, with vectors instead of labels
both                   the kernel in one process, with labels and vectors
encode, encode_bf16    SentenceTransformer.encode of the encoder without an adapter, its vectors in Parquet; two dtypes
eight, eight_alone     eight adapters in one job; one of them in a job of its own
command_eight, command_alone    the same as whole commands, `lorafleet classify`, from start to exit; all rows

On a GPU, every arm classifies other texts before the clock starts, because its libraries load with the first batches.
Rivals (a), (b) and (c) run as they come, in float32; ``--rival-dtype`` and ``--rival-batch`` are for (a) and (b).
Needs ``pip install openvino onnx onnxruntime onnxscript``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    import torch

    from pipeline.adapter.description import FoundAdapter
    from pipeline.bulk.plan import BulkPlan
    from pipeline.encoder.tokeniser import Tokens

SLOW = ("pipeline", "sentence_transformers", "ray_data", "openvino", "onnx_int8", "eight", "eight_alone")
SLOW += ("encode", "encode_bf16")
WARM_UP = [" ".join(["word"] * length) for length in range(1, 129) for _ in range(8)]
ROOF_SHAPES = {"cpu": (1024, 384, 1536), "cuda": (65536, 384, 1536)}


def main() -> None:
    """Make the data, run the arms in turns, print the table."""
    options = _options()
    if options.child:
        print(json.dumps(run_arm(options.child, options)))
        return
    with tempfile.TemporaryDirectory(prefix="lorafleet-benchmark-") as folder:
        options.folder = Path(folder)
        for name in options.data:
            make_data(name, options)
        measured = {
            name: [{arm: child(arm, name, turn, options) for arm in options.arms} for turn in range(options.turns)]
            for name in options.data
        }
        print(report(measured, options, roof=child("roof", options.data[0], 0, options)))


def child(arm: str, data: str, turn: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one arm in a process of its own."""
    rows = options.rival_rows if arm in SLOW else None
    command = [
        sys.executable,
        __file__,
        "--child",
        arm,
        "--input",
        str(options.folder / f"{data}-{rows or 'all'}.parquet"),
    ]
    command += ["--output", str(options.folder / f"out-{data}-{arm}-{turn}"), "--threads", str(options.threads)]
    command += [
        "--device",
        options.device,
        "--rival-dtype",
        options.rival_dtype,
        "--rival-batch",
        str(options.rival_batch),
    ]
    command += ["--adapter", options.adapter, *(["--shared", options.shared] if options.shared else [])]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{arm}: {done.stderr[-3000:]}")
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if "rows" in facts:
        print(
            f"{data}, turn {turn + 1}, {arm}: {facts['rows'] / facts['seconds']:.0f} rows/s",
            file=sys.stderr,
            flush=True,
        )
    return facts


def make_data(name: str, options: argparse.Namespace) -> None:
    """Two files: all rows, and those that slow arms get."""
    random = np.random.default_rng(0)
    if name == "imdb":
        texts = _texts(options.mirror, "ImdbClassification", "test")
        texts = [texts[i] for i in random.permutation(len(texts))[: options.imdb_rows]]
    else:
        texts = mixed_texts(options.mirror, options.rows, random)
        if name == "duplicates":
            for row in np.flatnonzero(random.random(len(texts)) < 0.3)[1:]:
                texts[row] = texts[random.integers(row)]
    for rows in (None, options.rival_rows):
        table = pa.table({"id": np.arange(len(texts[:rows])), "text": texts[:rows]})
        pq.write_table(table, options.folder / f"{name}-{rows or 'all'}.parquet", row_group_size=10_000)


def mixed_texts(mirror: str, rows: int, random: np.random.Generator) -> list[str]:
    """The beginning of one of Banking77's texts and the end of another: as long as they are, and hardly one twice."""
    texts = _texts(mirror, "Banking77Classification", "train")
    mixed = []
    for _ in range(rows):
        one, two = (texts[i].split() for i in random.integers(len(texts), size=2))
        cut = int(random.integers(1, len(one) + 1))
        mixed.append(" ".join([*one[:cut], *two[len(two) * cut // len(one) :]]))
    return mixed


def run_arm(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rows, seconds from opening the input to closed output, and seconds of start-up."""
    import torch

    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    return ARMS[arm](options, started)


def run_ours(options: argparse.Namespace, started: float, *, refs: Sequence[str] = (), **how: Any) -> dict[str, Any]:
    """The unit worker over all units, in this process. ``how`` are options of the job."""
    from pipeline.bulk.worker import UnitWorker

    job = plan(options.input, options.output, refs or [options.adapter], **how)
    worker = UnitWorker(job.worker_spec(threads=options.threads, use_gpu=options.device == "cuda"))
    if options.device == "cuda":
        worker.classifier.classify(worker.classifier.tokenise(WARM_UP))
    begun = time.perf_counter()
    rows = sum(worker.label(unit).rows for unit in job.state.todo)
    return _facts(rows, begun, started)


def run_ours_ray(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """The same units through Ray Data; the clock starts when all actors are up."""
    import ray
    import ray.data

    from tasks.bulk import UnitActor

    job = plan(options.input, options.output, [options.adapter], rows_per_unit=10_000)
    spec, units = job.worker_spec(threads=1, use_gpu=False), job.state.todo
    _start_ray(options.threads)
    items = ray.data.from_items([{"unit": unit.model_dump_json()} for unit in units], override_num_blocks=len(units))
    pool = ray.data.ActorPoolStrategy(size=options.threads)
    receipts = items.map_batches(
        UnitActor, fn_constructor_args=(spec,), batch_size=1, num_cpus=1, compute=pool
    ).iter_rows()
    rows = [json.loads(row["receipt"]) for row in receipts]
    ended = time.perf_counter()
    # Actors load while units wait, so work is measured where it is done: rows of a core over the seconds it was at it.
    busy = sum(row["seconds"] for row in rows) / options.threads
    return {"rows": sum(row["rows"] for row in rows), "seconds": busy, "startup": ended - started - busy}


def run_pipeline(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """(a) transformers' own pipeline; its head is random, which costs the same."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.pipelines import pipeline

    (adapter,), encoder = _adapter(options)
    folder = _encoder_folder(encoder)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(adapter.label_names), dtype=options.rival_dtype
    )
    classify = pipeline(
        "text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder), device=options.device
    )
    how = {"batch_size": options.rival_batch, "truncation": True, "max_length": encoder.config.max_tokens}
    if options.device == "cuda":
        classify(WARM_UP, **how)
    begun = time.perf_counter()
    table = pq.read_table(options.input)
    texts = table.column("text").to_pylist()
    answers = classify(texts, **how)
    _write(options, table, [answer["label"] for answer in answers], [answer["score"] for answer in answers])
    return _facts(len(table), begun, started)


def run_sentence_transformers(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """(b) encode, then a linear head."""
    import torch
    from sentence_transformers import SentenceTransformer

    (adapter,), encoder = _adapter(options)
    model = SentenceTransformer(
        str(_encoder_folder(encoder)), device=options.device, model_kwargs={"dtype": options.rival_dtype}
    )
    model.max_seq_length = encoder.config.max_tokens
    head = torch.nn.Linear(encoder.hidden_size, len(adapter.label_names)).to(options.device)
    how = {"batch_size": options.rival_batch, "convert_to_tensor": True, "show_progress_bar": False}
    if options.device == "cuda":
        model.encode(WARM_UP, **how)
    begun = time.perf_counter()
    table = pq.read_table(options.input)
    texts = table.column("text").to_pylist()
    vectors = model.encode(texts, **how)
    _write_logits(options, table, head(vectors.float().clone()).cpu(), adapter)
    return _facts(len(table), begun, started)


def run_encode(options: argparse.Namespace, started: float, *, dtype: str) -> dict[str, Any]:
    """SentenceTransformer.encode, then a fixed-size list in Parquet."""
    from sentence_transformers import SentenceTransformer

    _, encoder = _adapter(options)
    model = SentenceTransformer(str(_encoder_folder(encoder)), device=options.device, model_kwargs={"dtype": dtype})
    model.max_seq_length = encoder.config.max_tokens
    how = {"batch_size": options.rival_batch, "convert_to_tensor": True, "show_progress_bar": False}
    if options.device == "cuda":
        model.encode(WARM_UP, **how)
    begun = time.perf_counter()
    table = pq.read_table(options.input)
    vectors = model.encode(table.column("text").to_pylist(), **how).float().cpu().numpy()
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    options.output.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.append_column("vector", column), options.output / "out.parquet")
    return _facts(len(table), begun, started)


def run_ray_data(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """(c) the plain recipe; one row runs first, so that loading is not counted."""
    import ray.data

    (adapter,), encoder = _adapter(options)
    folder, labels, length = str(_encoder_folder(encoder)), len(adapter.label_names), encoder.config.max_tokens
    _start_ray(options.threads)

    class Model:
        def __init__(self) -> None:
            import torch
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            torch.set_num_threads(1)
            self.model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.loaded = time.time()

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            import torch

            torch.set_num_threads(1)
            inputs = self.tokenizer(
                list(batch["text"]), padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
            with torch.inference_mode():
                scores, label = torch.softmax(self.model(**inputs).logits, dim=1).max(dim=1)
            return batch | {"label": label.numpy(), "score": scores.numpy(), "loaded": np.full(len(label), self.loaded)}

    actors = ray.data.ActorPoolStrategy(size=options.threads)
    rows = ray.data.read_parquet(options.input).repartition(4 * options.threads)  # else one row group is one actor's
    rows.map_batches(Model, batch_size=options.rival_batch, num_cpus=1, compute=actors).write_parquet(
        str(options.output)
    )
    ended = time.time()
    written = pq.read_table(options.output)
    seconds = ended - written.column("loaded").to_numpy().max()
    return {"rows": len(written), "seconds": seconds, "startup": time.perf_counter() - started - seconds}


def run_openvino(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """(d) OpenVINO's CPU plugin in bfloat16, on the merged encoder, with our tokens and our batches."""
    import openvino

    (adapter,), encoder = _adapter(options)
    model, example = _merged_float32(adapter, encoder), _example()
    converted = openvino.convert_model(model, example_input=example)
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": options.threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    names = list(example)
    return _with_our_batches(
        options,
        started,
        adapter,
        encoder,
        lambda ids, mask: request.infer(dict(zip(names, (ids, mask), strict=True)))[0],
    )


def run_onnx_int8(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """(e) ONNX Runtime, weights and activations int8."""
    import onnxruntime
    import torch
    from onnxruntime.quantization import quantize_dynamic

    (adapter,), encoder = _adapter(options)
    model, example = _merged_float32(adapter, encoder), _example()
    path, small = str(options.output) + ".onnx", str(options.output) + ".int8.onnx"
    axes = {name: {0: "texts", 1: "tokens"} for name in example}
    torch.onnx.export(
        model,
        tuple(example.values()),
        path,
        input_names=list(example),
        output_names=["logits"],
        dynamic_axes=axes,
        dynamo=False,
    )
    quantize_dynamic(path, small)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(small, settings, providers=["CPUExecutionProvider"])
    names = list(example)
    return _with_our_batches(
        options,
        started,
        adapter,
        encoder,
        lambda ids, mask: session.run(None, dict(zip(names, (ids, mask), strict=True)))[0],
    )


def run_command(options: argparse.Namespace, started: float, *, refs: Sequence[str]) -> dict[str, Any]:
    """Run the whole command, start-up included, as a user does."""
    command = [
        str(Path(sys.executable).parent / "lorafleet"),
        "classify",
        str(options.input),
        str(options.output),
        "--offline",
        "--json",
    ]
    begun = time.perf_counter()
    done = subprocess.run(
        [*command, *(part for ref in refs for part in ("--adapter", ref))], check=True, stdout=subprocess.PIPE
    )
    return _facts(json.loads(done.stdout)["rows_out"], begun, started)


def run_tokenise(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """Tokenise only: the time that would be left if computing cost nothing."""
    _, encoder = _adapter(options)
    begun = time.perf_counter()
    table = pq.read_table(options.input)
    encoder.tokenise(table.column("text").to_pylist())
    return _facts(len(table), begun, started)


def run_roof(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """Matrix products of the encoder's largest shape, bfloat16, and what one token costs at least."""
    import torch

    from pipeline.encoder.files import find_encoder
    from pipeline.encoder.loading import empty_model

    _, encoder = _adapter(options)
    rows, inner, outer = ROOF_SHAPES[options.device]
    left, right = (torch.randn(*shape, device=options.device).bfloat16() for shape in ((rows, inner), (inner, outer)))
    times = []
    for _ in range(200):
        begun = time.perf_counter()
        left @ right
        if options.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    # Those of the encoder as it is published; the kernel's own modules hold some of them twice.
    plain = empty_model(find_encoder(encoder.config, offline=True), encoder.config)
    linears = [m for name, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and "pooler" not in name]
    per_token = 2 * sum(m.weight.numel() for m in linears)
    tokens = encoder.tokenise(pq.read_table(options.input).column("text").to_pylist()).lengths.mean()
    return {
        "flops_per_second": 2 * rows * inner * outer / statistics.median(times),
        "flops_per_text": float(per_token * tokens),
    }


ARMS: dict[str, Callable[[argparse.Namespace, float], dict[str, Any]]] = {
    "ours": run_ours,
    "ours_ray": run_ours_ray,
    "pipeline": run_pipeline,
    "sentence_transformers": run_sentence_transformers,
    "ray_data": run_ray_data,
    "openvino": run_openvino,
    "onnx_int8": run_onnx_int8,
    "tokenise": run_tokenise,
    "embed": lambda options, started: run_ours(options, started, labels=False, vectors={"dtype": "float32"}),
    "both": lambda options, started: run_ours(options, started, vectors={"dtype": "float32"}),
    "encode": lambda options, started: run_encode(options, started, dtype="float32"),
    "encode_bf16": lambda options, started: run_encode(options, started, dtype="bfloat16"),
    "eight": lambda options, started: run_ours(options, started, refs=_same_adapter(options, times=8)),
    "eight_alone": lambda options, started: run_ours(options, started, refs=_same_adapter(options, times=1)),
    "command_eight": lambda options, started: run_command(options, started, refs=_same_adapter(options, times=8)),
    "command_alone": lambda options, started: run_command(options, started, refs=_same_adapter(options, times=1)),
    "roof": run_roof,
}


def report(measured: dict[str, list[dict[str, Any]]], options: argparse.Namespace, *, roof: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    lines = [
        f"{options.threads} threads, {options.turns} alternated turns (median, lowest–highest); {_processor()}.",
        "",
    ]
    for name, turns in measured.items():
        lines += [
            f"**{name}**",
            "",
            "| Arm | Rows | Rows/s | Rows/s of ours / of this arm | Start-up, s |",
            "|---|---|---|---|---|",
        ]
        for arm in options.arms:
            speeds = [turn[arm]["rows"] / turn[arm]["seconds"] for turn in turns]
            ratios = [
                turn["ours"]["rows"] / turn["ours"]["seconds"] / speed
                for turn, speed in zip(turns, speeds, strict=True)
                if "ours" in turn
            ]
            startup = statistics.median(turn[arm]["startup"] for turn in turns)
            ratio = f"{_spread(ratios, '.2f')}×" if ratios and arm != "ours" else "-"
            lines.append(f"| {arm} | {turns[0][arm]['rows']} | {_spread(speeds, '.0f')} | {ratio} | {startup:.1f} |")
        for together, alone in (("eight", "eight_alone"), ("command_eight", "command_alone")):
            if {together, alone} <= set(options.arms):
                gains = [8 * turn[alone]["seconds"] / turn[together]["seconds"] for turn in turns]
                lines.append(f"\n{together} against eight times {alone}: {_spread(gains, '.2f')}×.")
        lines.append("")
    if "ours" in options.arms:
        first = options.data[0]
        speed = statistics.median(turn["ours"]["rows"] / turn["ours"]["seconds"] for turn in measured[first])
        share = speed * roof["flops_per_text"] / roof["flops_per_second"]
        size = "×".join(map(str, ROOF_SHAPES[options.device]))
        lines.append(
            f"Matmul roof (bfloat16, {size}): {roof['flops_per_second'] / 1e9:.0f} GFLOP/s, that is "
            f"{roof['flops_per_second'] / roof['flops_per_text']:.0f} rows/s of {first}; ours reach {share:.0%} of it."
        )
    return "\n".join(lines)


def plan(source: Path, output: Path, adapters: Sequence[str], **options: Any) -> BulkPlan:
    """A bulk job with the defaults of ``lorafleet classify``."""
    from pipeline.bulk.plan import plan_bulk
    from pipeline.bulk.records import BulkOptions, BulkRequest

    request = BulkRequest(
        source=str(source), output=str(output), adapters=tuple(adapters), options=BulkOptions(**options), offline=True
    )
    return plan_bulk(request)


def _same_adapter(options: argparse.Namespace, *, times: int) -> list[str]:
    return [f"A{number}={options.shared or options.adapter}" for number in range(times)]


def _adapter(options: argparse.Namespace) -> tuple[tuple[FoundAdapter, ...], Any]:
    from pipeline.inference.classifier import load_classifier
    from pipeline.inference.reference import find_adapters

    adapters, use_gpu = find_adapters([options.adapter], offline=True), options.device == "cuda"
    return adapters, load_classifier(
        adapters, encoder=None, threads=options.threads, use_gpu=use_gpu, offline=True
    ).encoder


def _encoder_folder(encoder: Any) -> Path:
    from pipeline.encoder.files import find_encoder

    return find_encoder(encoder.config, offline=True).folder


def _merged_float32(found: FoundAdapter, encoder: Any) -> torch.nn.Module:
    import torch
    from transformers import AutoModel

    from pipeline.adapter.files import load_adapter

    base = AutoModel.from_pretrained(_encoder_folder(encoder), attn_implementation="eager").eval()
    adapter = load_adapter(found.folder, encoder)
    adapter.detach()
    with torch.no_grad():
        for path, lora in adapter.projections.items():
            base.get_submodule(path).weight += lora.update

    class Merged(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.head = base, adapter.head[1]

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.base(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weight = attention_mask.unsqueeze(-1).float()
            logits: torch.Tensor = self.head((hidden * weight).sum(1) / weight.sum(1))
            return logits

    return Merged().eval()


def _example() -> dict[str, torch.Tensor]:
    import torch

    ones = torch.ones(2, 8, dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones.clone()}


def _with_our_batches(
    options: argparse.Namespace,
    started: float,
    adapter: FoundAdapter,
    encoder: Any,
    infer: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> dict[str, Any]:
    import torch

    from pipeline.encoder.encoder import batches_by_budget

    begun = time.perf_counter()
    table = pq.read_table(options.input)
    tokens: Tokens = encoder.tokenise(table.column("text").to_pylist())
    logits = np.empty((len(table), len(adapter.label_names)), dtype=np.float32)
    for rows in batches_by_budget(tokens.lengths, tokens_per_batch=options.rival_tokens):
        batch = encoder.batch(tokens, rows)
        logits[rows] = infer(batch.ids.numpy(), batch.mask.numpy())
    _write_logits(options, table, torch.from_numpy(logits), adapter)
    return _facts(len(table), begun, started)


def _write_logits(options: argparse.Namespace, table: pa.Table, logits: torch.Tensor, adapter: FoundAdapter) -> None:
    scores, labels = logits.detach().softmax(dim=1).max(dim=1)
    _write(options, table, [adapter.label_names[label] for label in labels.tolist()], scores.numpy())


def _write(options: argparse.Namespace, table: pa.Table, labels: Sequence[str], scores: Any) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table.append_column("label", pa.array(labels)).append_column("score", pa.array(scores)),
        options.output / "out.parquet",
    )


def _start_ray(cpus: int) -> None:
    """With a core more than there are: tasks that read and write must find one while actors hold the others."""
    import ray

    ray.init(
        address="local",
        num_cpus=cpus + 1,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    ray.data.DataContext.get_current().enable_progress_bars = False


def _texts(mirror: str, task: str, split: str) -> list[str]:
    texts: list[str] = pq.read_table(Path(mirror) / task / f"{split}.parquet").column("text").to_pylist()
    return texts


def _facts(rows: int, begun: float, started: float) -> dict[str, Any]:
    return {"rows": rows, "seconds": time.perf_counter() - begun, "startup": begun - started}


def _spread(values: Sequence[float], form: str) -> str:
    middle = f"{statistics.median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}–{max(values):{form}})"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="reference of the adapter to classify with")
    parser.add_argument(
        "--shared", help="reference of the adapter for eight and eight_alone, such as one of the last three layers"
    )
    parser.add_argument("--arms", nargs="+", default=["ours", "ours_ray", *SLOW[:5], "tokenise"], choices=list(ARMS))
    parser.add_argument(
        "--data", nargs="+", default=["short", "duplicates", "imdb"], choices=["short", "duplicates", "imdb"]
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--imdb-rows", type=int, default=5_000)
    parser.add_argument("--rival-rows", type=int, default=5_000)
    parser.add_argument("--rival-tokens", type=int, default=1024, help="tokens per batch of openvino and onnx_int8")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of ours, pipeline and sentence_transformers"
    )
    parser.add_argument("--rival-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rival-batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--mirror", default=str(Path(__file__).resolve().parents[3] / "shared" / "data" / "mteb"))
    parser.add_argument("--child", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--input", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
