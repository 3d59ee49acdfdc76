"""LoRA and head: the published counts, no effect before training, the same bits after every way of loading."""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    COMMIT,
    CPU_FLOAT32,
    FAMILIES,
    OTHER_FAMILIES,
    give_effect,
    load_encoder,
    save_tiny_encoder,
    tiny_architecture,
    toy_texts,
)
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.description import describe_adapter
from pipeline.adapter.files import check_both_forms, load_adapter, save_adapter, start_from
from pipeline.adapter.head import HeadStart
from pipeline.adapter.lora import LoraLinear
from pipeline.adapter.peft_form import check_peft
from pipeline.adapter.targets import projection_paths
from pipeline.config import AdapterConfig, EncoderConfig, TrainConfig
from pipeline.encoder.encoder import Encoder, FloatArray
from pipeline.encoder.files import find_encoder
from pipeline.encoder.runtime import choose_runtime
from pipeline.errors import AdapterError, LorafleetError, VerificationError
from pipeline.records import EncoderRef
from pipeline.reports.model_card import usage_snippet
from pipeline.store.run_folder import TaskFolder, adapter_sha256

Folders = Callable[[str], Path]
TEXTS, _ = toy_texts(30)
LABELS = ("sea", "kitchen", "garden")
BERT_PATHS = [
    f"encoder.layer.{layer}.attention.{name}"
    for layer in (0, 1)
    for name in ("self.query", "self.key", "self.value", "output.dense")
]
PATHS = {
    "eurobert": [f"layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkvo"],
    "mpnet": [f"encoder.layer.{layer}.attention.attn.{name}" for layer in (0, 1) for name in "qkvo"],
    "distilbert": [
        f"transformer.layer.{layer}.attention.{name}_lin" for layer in (0, 1) for name in ("q", "k", "v", "out")
    ],
    "modernbert": [f"layers.{layer}.attn.{name}" for layer in (0, 1) for name in ("Wqkv", "Wo")],
    "deberta-v2": [
        f"encoder.layer.{layer}.attention.{name}"
        for layer in (0, 1)
        for name in ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense")
    ],
}
PATHS |= {"nomic_bert": PATHS["eurobert"], "jina_embeddings_v3": PATHS["eurobert"]}
PATHS |= dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), BERT_PATHS)


def embed(encoder: Encoder) -> FloatArray:
    return encoder.embed(encoder.tokenise(TEXTS))


def logits(adapter: Adapter) -> FloatArray:
    return adapter.logits_of_vectors(embed(adapter.encoder))


def trained(encoder: Encoder, config: AdapterConfig | None = None) -> Adapter:
    return give_effect(Adapter(encoder, config or AdapterConfig(), LABELS))


def empty(family: str) -> nn.Module:
    from transformers import AutoModel

    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(tiny_architecture(family))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> TaskFolder:
    return TaskFolder(tmp_path / "run" / "Topics")


@pytest.fixture
def saved(bert: Encoder, folder: TaskFolder) -> Adapter:
    adapter = trained(bert)
    save_adapter(adapter, folder, meta={"best_epoch": 2})
    return adapter


# Which modules


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_the_attention_projections_of_each_family_are_found_by_full_path(family: str) -> None:
    assert projection_paths(empty(family), AdapterConfig(), model_type=family) == PATHS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layers_alone_are_adapted_on_request(family: str, encoder_folder: Folders) -> None:
    encoder = load_encoder(encoder_folder(family))
    with torch.no_grad():
        batch = encoder.batch(encoder.tokenise(TEXTS[:4]), np.arange(4))
        before = encoder.model(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True).hidden_states
        adapter = trained(encoder, AdapterConfig(layers="last:1"))
        after = encoder.model(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True).hidden_states
    assert list(adapter.projections) == PATHS[family][len(PATHS[family]) // 2 :]
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[2], after[2])


def test_explicit_paths_are_adapted_in_the_models_order(bert: Encoder) -> None:
    target = ("encoder.layer.1.intermediate.dense", "encoder.layer.0.attention.self.value")
    assert list(Adapter(bert, AdapterConfig(target=target), LABELS).projections) == [target[1], target[0]]


def test_an_unknown_path_is_refused_with_those_that_exist(bert: Encoder) -> None:
    with pytest.raises(
        AdapterError,
        match=r"layer\.9\.attention\.self\.query.*not a linear layer.*encoder\.layer\.0\.attention\.self\.query",
    ):
        Adapter(bert, AdapterConfig(target=("encoder.layer.9.attention.self.query",)), LABELS)


def test_an_unknown_architecture_is_refused_with_the_known_ones_and_the_modules(bert: Encoder) -> None:
    with pytest.raises(AdapterError, match=r"'novel'.*eurobert.*encoder\.layer\.0\.attention\.self\.query"):
        projection_paths(bert.model, AdapterConfig(), model_type="novel")


def test_a_target_that_matches_nothing_is_refused_with_what_exists(bert: Encoder) -> None:
    with pytest.raises(AdapterError, match=r"matches none.*encoder\.layer\.0\.attention\.self\.query"):
        projection_paths(bert.model, AdapterConfig(), model_type="distilbert")


def test_more_layers_than_there_are_is_refused(bert: Encoder) -> None:
    with pytest.raises(AdapterError, match=r"'last:3'.*2 layers"):
        Adapter(bert, AdapterConfig(layers="last:3"), LABELS)


def test_last_layers_of_a_module_outside_the_layers_is_refused() -> None:
    config = AdapterConfig(target=("embeddings_project", "encoder.layer.1.attention.self.query"), layers="last:1")
    with pytest.raises(AdapterError, match="embeddings_project"):
        projection_paths(empty("electra"), config, model_type="electra")


# The main job's numbers


@pytest.fixture(scope="module")
def published_size(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """The published encoder's architecture, at its size, with random weights."""
    from builders import save_tiny_tokenizer
    from transformers import EuroBertConfig, EuroBertModel

    folder = tmp_path_factory.mktemp("published") / "eurobert-17m"
    architecture = EuroBertConfig(
        vocab_size=41_778,
        hidden_size=256,
        num_hidden_layers=6,
        intermediate_size=1024,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        mask_token_id=4,
    )
    EuroBertModel(architecture).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return load_encoder(folder)


@pytest.mark.parametrize(("num_classes", "trainable"), [(77, 118_093), (2, 98_818)])
def test_the_published_encoder_has_the_published_counts(
    published_size: Encoder, num_classes: int, trainable: int, folder: TaskFolder
) -> None:
    adapter = Adapter(published_size, AdapterConfig(), [f"class {n}" for n in range(num_classes)])
    try:
        assert published_size.num_parameters == 16_989_952
        assert sum(p.numel() for p in adapter.encoder_parameters) == 98_304
        assert sum(p.numel() for p in adapter.parameters) == 98_304 + 257 * num_classes == trainable
        assert sum(p.numel() for p in published_size.model.parameters() if p.requires_grad) == 98_304
        save_adapter(adapter, folder, meta={})
        state = torch.load(folder.lora_adapter_pt, weights_only=True)
        names = {f"lora_{i}_{part}" for i in range(24) for part in ("A", "B", "scaling")}
        assert set(state) == names
        assert state["lora_23_A"].shape == (256, 8)
        assert state["lora_23_B"].shape == (8, 256)
        assert state["lora_23_scaling"].item() == 2.0
        assert (
            400_000 < folder.lora_adapter_pt.stat().st_size < 415_000
        )  # 393,216 bytes of weights; the document says about 405 KB
    finally:
        adapter.detach()


def test_fresh_pairs_have_normal_a_by_fan_in_and_zero_b(published_size: Encoder) -> None:
    adapter = Adapter(published_size, AdapterConfig(), LABELS)
    try:
        values = torch.cat([lora.lora_A.detach().flatten() for lora in adapter.projections.values()])
        assert values.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)
        assert abs(values.mean().item()) < 0.002
        assert (values.abs() > 2 * math.sqrt(2 / 256)).float().mean().item() == pytest.approx(0.0455, abs=0.005), (
            "normal, not uniform"
        )
        assert all(not lora.lora_B.any() for lora in adapter.projections.values())
        assert {lora.scaling for lora in adapter.projections.values()} == {2.0}
    finally:
        adapter.detach()


# Effect


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_adapter_leaves_the_encoder_output_unchanged_bit_for_bit(
    family: str, encoder_folder: Folders
) -> None:
    encoder = load_encoder(encoder_folder(family))
    before = embed(encoder)
    adapter = Adapter(encoder, AdapterConfig(), LABELS)
    assert embed(encoder).tobytes() == before.tobytes()
    give_effect(adapter)
    assert np.abs(embed(encoder) - before).max() > 0.01
    adapter.detach()
    assert embed(encoder).tobytes() == before.tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_changes_the_vectors_by_rounding_only_and_is_undone_bit_for_bit(
    family: str, encoder_folder: Folders
) -> None:
    encoder = load_encoder(encoder_folder(family))
    frozen = {name: p.detach().clone() for name, p in encoder.model.named_parameters()}
    plain = embed(encoder)
    adapter = trained(encoder)
    unmerged = embed(encoder)
    with adapter.merged():
        merged = embed(encoder)
        assert not any(isinstance(m, LoraLinear) for m in encoder.model.modules())
    np.testing.assert_allclose(merged, unmerged, atol=1e-5 * np.abs(unmerged).max())
    assert np.abs(merged - plain).max() > 0.01
    assert adapter.merge_difference(encoder.tokenise(TEXTS)) == np.abs(merged - unmerged).max()
    assert embed(encoder).tobytes() == unmerged.tobytes()
    adapter.detach()
    assert all(torch.equal(p, frozen[name]) for name, p in encoder.model.named_parameters())


def test_a_failure_while_merged_still_restores_the_weights(bert: Encoder) -> None:
    adapter = trained(bert)
    before = embed(bert)
    with pytest.raises(RuntimeError), adapter.merged():
        raise RuntimeError
    assert embed(bert).tobytes() == before.tobytes()


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_a_plain_formulation(bias: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 7, bias=bias).requires_grad_(False)
    lora = LoraLinear(base, rank=3, scaling=1.7, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(lora.lora_B)
    x = torch.randn(2, 5, 12)
    weight = torch.randn(2, 5, 7)

    def gradients(forward: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        inputs = x.clone().requires_grad_()
        y = forward(inputs)
        return [y, *torch.autograd.grad((y.tanh() * weight).sum(), [inputs, lora.lora_A, lora.lora_B])]

    ours = gradients(lora)
    plain = gradients(lambda v: base(v) + lora.scaling * (v @ lora.lora_A.t() @ lora.lora_B.t()))
    for ours_of, plain_of in zip(ours, plain, strict=True):
        torch.testing.assert_close(ours_of, plain_of, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_reaches_every_trained_weight_and_nothing_frozen(family: str, encoder_folder: Folders) -> None:
    encoder = load_encoder(encoder_folder(family))
    adapter = trained(encoder)
    batch = encoder.batch(encoder.tokenise(TEXTS[:6]), np.arange(6))
    nn.functional.cross_entropy(adapter.logits(batch), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters)
    ours = {id(p) for p in adapter.parameters}
    assert all(p.grad is None for p in encoder.model.parameters() if id(p) not in ours)


def test_the_seed_decides_the_initial_weights(encoder_folder: Folders) -> None:
    def initial(seed: int) -> list[torch.Tensor]:
        return [
            p.detach()
            for p in Adapter(load_encoder(encoder_folder("bert")), AdapterConfig(), LABELS, seed=seed).parameters
        ]

    assert all(torch.equal(a, b) for a, b in zip(initial(3), initial(3), strict=True))
    assert not torch.equal(initial(3)[0], initial(4)[0])


def test_a_head_start_is_taken_over_exactly(bert: Encoder) -> None:
    random = np.random.default_rng(0)
    start = HeadStart(random.normal(size=(3, 32)).astype(np.float32), random.normal(size=3).astype(np.float32))
    adapter = Adapter(bert, AdapterConfig(), LABELS)
    adapter.classifier.start_from(start)
    np.testing.assert_allclose(logits(adapter), embed(bert) @ start.weight.T + start.bias, atol=1e-4)


def test_dropout_acts_while_training_only(bert: Encoder) -> None:
    adapter = trained(bert, AdapterConfig(dropout=0.5))
    batch = bert.batch(bert.tokenise(TEXTS), np.arange(len(TEXTS)))
    with torch.no_grad():
        adapter.head.train()
        assert not torch.equal(adapter.logits(batch), adapter.logits(batch))
        adapter.head.eval()
        assert torch.equal(adapter.logits(batch), adapter.logits(batch))


# Files


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_gives_the_same_logits_bit_for_bit(
    family: str, encoder_folder: Folders, folder: TaskFolder
) -> None:
    config = AdapterConfig(rank=4, alpha=6, dropout=0.2, layers="last:1")
    adapter = trained(load_encoder(encoder_folder(family), pooling="cls"), config)
    ref = save_adapter(adapter, folder, meta={})
    loaded = load_adapter(folder, load_encoder(encoder_folder(family), pooling="cls"))
    assert logits(loaded).tobytes() == logits(adapter).tobytes()
    assert loaded.label_names == LABELS
    assert list(loaded.projections) == list(adapter.projections)
    assert not loaded.head.training
    assert (ref.path, ref.sha256, ref.encoder_revision) == (
        "Topics",
        adapter_sha256(folder.root),
        adapter.encoder.ref.revision,
    )


@pytest.mark.parametrize("family", ["bert", "eurobert", "modernbert"])
def test_peft_itself_gives_our_vectors(family: str, encoder_folder: Folders, folder: TaskFolder) -> None:
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    adapter = trained(load_encoder(encoder_folder(family)))
    save_adapter(adapter, folder, meta={})
    base = AutoModel.from_pretrained(encoder_folder(family), attn_implementation="eager")
    model = PeftModel.from_pretrained(base, str(folder.root)).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder(family))
    for text, ours in zip(TEXTS[:5], embed(adapter.encoder), strict=False):
        with torch.no_grad():
            vector = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector.numpy(), ours, atol=1e-4)
    assert json.loads(folder.adapter_config.read_text(encoding="utf-8"))["peft_type"] == "LORA"


@pytest.mark.usefixtures("hub_cache")
def test_the_files_name_the_public_encoder_and_commit_and_no_local_path(folder: TaskFolder, tmp_path: Path) -> None:
    config = EncoderConfig(name="someone/tiny", max_tokens=24)
    adapter = trained(Encoder(find_encoder(config, offline=True), config, CPU_FLOAT32))
    save_adapter(adapter, folder, meta={})
    described = json.loads(folder.adapter_config.read_text(encoding="utf-8"))
    assert (described["base_model_name_or_path"], described["revision"]) == ("someone/tiny", COMMIT)
    assert (described["r"], described["lora_alpha"], described["lora_dropout"], described["inference_mode"]) == (
        8,
        16.0,
        0.0,
        True,
    )
    assert json.loads(folder.meta.read_text(encoding="utf-8"))["encoder"] == {
        "name": "someone/tiny",
        "revision": COMMIT,
    }
    for path in folder.root.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_an_encoder_from_a_folder_is_named_without_its_path(
    saved: Adapter, folder: TaskFolder, encoder_folder: Folders
) -> None:
    described = json.loads(folder.adapter_config.read_text(encoding="utf-8"))
    assert (described["base_model_name_or_path"], described["revision"]) == ("tiny-bert", None)
    assert saved.encoder.ref.name == str(encoder_folder("bert"))
    for path in folder.root.iterdir():
        assert str(encoder_folder("bert").parent).encode() not in path.read_bytes(), path.name


def test_the_folder_holds_both_forms_and_nothing_else(saved: Adapter, folder: TaskFolder) -> None:
    later = {"calibration.json", "probe.json", "few_shot.json"}  # written when the MTEB task is finished
    assert {p.name for p in folder.root.iterdir()} == {p.name for p in folder.published()} - later
    assert json.loads(folder.labels.read_text(encoding="utf-8")) == list(LABELS)
    head = load_file(folder.head)
    linear = saved.head[1]
    assert isinstance(linear, nn.Linear)
    assert torch.equal(head["weight"], linear.weight)
    assert torch.equal(head["bias"], linear.bias)
    meta = json.loads(folder.meta.read_text(encoding="utf-8"))
    assert meta == {
        "num_classes": 3,
        "label_names": list(LABELS),
        "rank": 8,
        "alpha": 16.0,
        "dropout": 0.1,
        "pooling": "mean",
        "max_tokens": 24,
        "hidden_size": 32,
        "encoder": {"name": "tiny-bert", "revision": saved.encoder.ref.revision},
        "adapted_modules": BERT_PATHS,
        "best_epoch": 2,
    }


def test_both_forms_hold_the_same_numbers_and_the_pt_files_only_tensors(saved: Adapter, folder: TaskFolder) -> None:
    peft, lora = load_file(folder.adapter_weights), torch.load(folder.lora_adapter_pt, weights_only=True)
    assert len(peft) == 2 * len(BERT_PATHS)
    assert len(lora) == 3 * len(BERT_PATHS)
    for index, path in enumerate(BERT_PATHS):
        assert torch.equal(lora[f"lora_{index}_A"].t(), peft[f"base_model.model.{path}.lora_A.weight"])
        assert torch.equal(lora[f"lora_{index}_B"].t(), peft[f"base_model.model.{path}.lora_B.weight"])
        assert lora[f"lora_{index}_scaling"].item() == 2.0
    classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 3))
    classifier.load_state_dict(torch.load(folder.classifier_head_pt, weights_only=True))
    assert torch.equal(classifier[1].weight, saved.head[1].weight)  # type: ignore[arg-type]


def test_saving_twice_gives_the_same_bytes(saved: Adapter, folder: TaskFolder, tmp_path: Path) -> None:
    again = TaskFolder(tmp_path / "again")
    save_adapter(saved, again, meta={"best_epoch": 2})
    for path in folder.root.iterdir():
        if path.suffix != ".pt":  # a zip file, which holds its own name
            assert path.read_bytes() == (again.root / path.name).read_bytes(), path.name


def test_the_source_documents_snippet_gives_our_labels_on_eurobert(encoder_folder: Folders, folder: TaskFolder) -> None:
    from transformers import AutoModel, AutoTokenizer

    adapter = trained(load_encoder(encoder_folder("eurobert")))
    save_adapter(adapter, folder, meta={})
    # From here on as published, with the paths put in and `classifier.eval()` added.
    base_model, tokenizer = (
        AutoModel.from_pretrained(encoder_folder("eurobert")),
        AutoTokenizer.from_pretrained(encoder_folder("eurobert")),
    )
    meta = json.loads(folder.meta.read_text(encoding="utf-8"))
    lora_state = torch.load(folder.lora_adapter_pt, map_location="cpu", weights_only=True)
    idx = 0
    for _name, module in base_model.named_modules():
        for target in ["q_proj", "k_proj", "v_proj", "o_proj"]:
            child = getattr(module, target, None)
            if child is not None and isinstance(child, nn.Linear):
                A = lora_state[f"lora_{idx}_A"]
                B = lora_state[f"lora_{idx}_B"]
                scaling = lora_state[f"lora_{idx}_scaling"].item()
                child.weight.data += (scaling * (A @ B)).T
                idx += 1
    assert idx == 8
    classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, meta["num_classes"]))
    classifier.load_state_dict(torch.load(folder.classifier_head_pt, map_location="cpu", weights_only=True))
    classifier.eval()
    found = []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
        with torch.no_grad():
            hidden = base_model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            found.append(classifier(pooled)[0].numpy())
    ours = logits(adapter)
    np.testing.assert_allclose(np.stack(found), ours, atol=1e-3)
    assert len(set(ours.argmax(1).tolist())) > 1, "one label for all would prove nothing"


def our_snippet(adapter: Adapter, folder: TaskFolder, *, encoder: Path, text: str = TEXTS[0]) -> str:
    """The card's program with the two places put in that only its reader knows, and another text."""
    ref = EncoderRef.model_construct(
        name=str(encoder), public_name=str(encoder), revision="sha256:0"
    )  # a card names no place
    program = usage_snippet(task=folder.root.name, encoder=ref, adapted_modules=list(adapter.projections))
    program = program.replace('REPOSITORY = "."', f"REPOSITORY = {str(folder.root.parent)!r}")
    return program.replace('TEXT = "I need to transfer money to another account"', f"TEXT = {text!r}")


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("family", ["bert", "eurobert", "modernbert"])
def test_the_cards_snippet_gives_our_label(
    family: str, pooling: Any, encoder_folder: Folders, folder: TaskFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained(load_encoder(encoder_folder(family), pooling=pooling))
    save_adapter(adapter, folder, meta={})
    probabilities = torch.from_numpy(logits(adapter)).softmax(-1)
    for index in (0, 1):
        exec(our_snippet(adapter, folder, encoder=encoder_folder(family), text=TEXTS[index]), {})
        label, probability = capsys.readouterr().out.split()
        assert label == LABELS[int(probabilities[index].argmax())]
        assert float(probability) == pytest.approx(probabilities[index].max().item(), abs=1e-3)


@pytest.mark.parametrize(
    ("family", "other"), [("bert", "distilbert"), ("bert", "eurobert"), ("eurobert", "distilbert")]
)
def test_the_cards_snippet_raises_when_no_pair_attaches(
    family: str, other: str, encoder_folder: Folders, folder: TaskFolder
) -> None:
    adapter = trained(load_encoder(encoder_folder(family)))
    save_adapter(adapter, folder, meta={})
    with pytest.raises(RuntimeError, match="not the encoder"):
        exec(our_snippet(adapter, folder, encoder=encoder_folder(other)), {})


@pytest.mark.faults
def test_the_cards_snippet_runs_as_a_program_of_its_own(
    saved: Adapter, folder: TaskFolder, encoder_folder: Folders
) -> None:
    program = our_snippet(saved, folder, encoder=encoder_folder("bert"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder.root, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == LABELS[int(logits(saved)[0].argmax())]


# Faults


def test_another_encoder_is_refused(saved: Adapter, folder: TaskFolder, tmp_path: Path) -> None:
    other = load_encoder(save_tiny_encoder(tmp_path / "other", "bert", seed=1))
    with pytest.raises(AdapterError, match=f"{saved.encoder.ref.revision}.*{other.ref.revision}"):
        load_adapter(folder, other)


@pytest.mark.usefixtures("saved")
def test_another_pooling_is_refused(folder: TaskFolder, encoder_folder: Folders) -> None:
    with pytest.raises(AdapterError, match=r"pooling mean.*max"):
        load_adapter(folder, load_encoder(encoder_folder("bert"), pooling="max"))


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "head.safetensors", "labels.json", "meta.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other"])
def test_a_missing_or_damaged_file_is_refused_and_leaves_the_encoder_alone(
    name: str, damage: str, folder: TaskFolder, encoder_folder: Folders
) -> None:
    path = folder.root / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "other": b"[]"}[damage])
    encoder = load_encoder(encoder_folder("bert"))
    before = embed(encoder)
    with pytest.raises(AdapterError, match="Topics") as caught:
        load_adapter(folder, encoder)
    assert "\n" not in str(caught.value)
    assert embed(encoder).tobytes() == before.tobytes()


def _without_a_pair(state: dict[str, torch.Tensor]) -> None:
    del state[next(iter(state))]


def _with_a_pair_too_many(state: dict[str, torch.Tensor]) -> None:
    state["base_model.model.encoder.layer.7.attention.self.query.lora_A.weight"] = torch.zeros(8, 32)


def _of_another_rank(state: dict[str, torch.Tensor]) -> None:
    name = next(iter(state))
    state[name] = state[name][:1].clone()  # would broadcast


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize("damage", [_without_a_pair, _with_a_pair_too_many, _of_another_rank])
def test_tensors_that_do_not_fit_are_refused(
    damage: Callable[[dict[str, torch.Tensor]], None], folder: TaskFolder, encoder_folder: Folders
) -> None:
    state = load_file(folder.adapter_weights)
    damage(state)
    save_file(state, folder.adapter_weights)
    with pytest.raises(AdapterError, match=r"Topics.*lora_A"):
        load_adapter(folder, load_encoder(encoder_folder("bert")))


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize(
    "shapes", [{"weight": (1, 32), "bias": (3,)}, {"weight": (2, 32), "bias": (2,)}, {"weight": (3, 32)}]
)
def test_a_head_that_does_not_fit_the_labels_is_refused(
    shapes: dict[str, tuple[int, ...]], folder: TaskFolder, encoder_folder: Folders
) -> None:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder.head)
    with pytest.raises(AdapterError, match=r"Topics.*(weight|bias)"):
        load_adapter(folder, load_encoder(encoder_folder("bert")))


def _replace(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    state = load_file(path)
    save_file(state | {name: change(state[name])}, path)


def _set(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.double() if abs(value) > 1e38 else tensor.clone()
        changed.view(-1)[0] = value
        return changed

    return change


PAIR = f"base_model.model.{BERT_PATHS[0]}.lora_A.weight"
FILES = [("adapter_model.safetensors", PAIR), ("head.safetensors", "weight"), ("head.safetensors", "bias")]
WRONG_NUMBERS: list[tuple[Callable[[torch.Tensor], torch.Tensor], str]] = [
    (_set(float("nan")), "not finite"),
    (_set(float("inf")), "not finite"),
    (_set(-float("inf")), "not finite"),
    (_set(1e300), "not finite"),  # in float64, which float32 cannot hold
    (lambda t: t.to(torch.int8), "expected floats, found torch.int8"),
    (lambda t: t.to(torch.int64), "expected floats, found torch.int64"),
    (lambda t: t > 0, "expected floats, found torch.bool"),
    (lambda t: t.to(torch.complex64), "expected floats, found torch.complex64"),
    (lambda t: t.to(torch.float8_e4m3fn), "expected floats, found torch.float8_e4m3fn"),
    (lambda t: t.reshape(-1), "expected shape"),
    (lambda t: t[None], "expected shape"),
    (lambda t: t[:0], "expected shape"),
    (lambda t: t.reshape(-1)[0], "expected shape"),
]


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize(("change", "says"), WRONG_NUMBERS)
@pytest.mark.parametrize(("file", "name"), FILES)
def test_a_weight_that_cannot_be_computed_with_is_refused_by_its_name(
    file: str,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    says: str,
    folder: TaskFolder,
    encoder_folder: Folders,
) -> None:
    if says == "expected shape" and name == "bias" and change(torch.zeros(3)).shape == (3,):
        pytest.skip("a bias has this shape")
    _replace(folder.root / file, name, change)
    encoder = load_encoder(encoder_folder("bert"))
    before = embed(encoder)
    with pytest.raises(AdapterError, match=rf"{file}: {name}: .*{says}"):
        load_adapter(folder, encoder)
    assert embed(encoder).tobytes() == before.tobytes()
    with pytest.raises(AdapterError, match=says):  # as a warm start reads it
        start_from(Adapter(encoder, AdapterConfig(), LABELS), folder)


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_float_type_are_loaded_as_float32(
    dtype: torch.dtype, folder: TaskFolder, encoder_folder: Folders
) -> None:
    for file, name in FILES:
        _replace(folder.root / file, name, lambda tensor: tensor.to(dtype))
    loaded = load_adapter(folder, load_encoder(encoder_folder("bert")))
    assert {parameter.dtype for parameter in loaded.parameters} == {torch.float32}
    assert torch.equal(loaded.head[1].bias, load_file(folder.head)["bias"].float())  # type: ignore[arg-type]


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize(("alpha", "factor"), [(16.0, 1e30), (1e6, 1e25)])
def test_an_update_that_would_overflow_is_refused(
    alpha: float, factor: float, folder: TaskFolder, encoder_folder: Folders
) -> None:
    meta = json.loads(folder.meta.read_text(encoding="utf-8"))
    folder.meta.write_text(json.dumps(meta | {"alpha": alpha}), encoding="utf-8")
    _replace(folder.adapter_weights, PAIR, lambda tensor: tensor / tensor.abs().max() * factor)
    with pytest.raises(AdapterError, match="too large: their product may overflow"):
        load_adapter(folder, load_encoder(encoder_folder("bert")))


@pytest.mark.usefixtures("saved")
def test_pairs_in_another_order_than_the_encoders_are_refused(folder: TaskFolder, encoder_folder: Folders) -> None:
    meta = json.loads(folder.meta.read_text(encoding="utf-8"))
    wrong = {"adapted_modules must be in the encoder's order": meta["adapted_modules"][::-1]}
    wrong["adapted_modules: .* occurs more than once"] = meta["adapted_modules"] * 2
    for words, modules in wrong.items():
        folder.meta.write_text(json.dumps(meta | {"adapted_modules": modules}), encoding="utf-8")
        with pytest.raises(AdapterError, match=rf"meta\.json: {words}"):
            load_adapter(folder, load_encoder(encoder_folder("bert")))


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize("changes", [{"max_tokens": 32}, {"hidden_size": 64}])
def test_an_encoder_of_another_length_or_width_is_refused(
    changes: dict[str, int], folder: TaskFolder, encoder_folder: Folders
) -> None:
    meta = json.loads(folder.meta.read_text(encoding="utf-8"))
    folder.meta.write_text(json.dumps(meta | changes), encoding="utf-8")
    with pytest.raises(AdapterError, match=r"trained with (max_tokens 32, but .* 24|width 64, but .* 32)"):
        load_adapter(folder, load_encoder(encoder_folder("bert")))


@pytest.mark.usefixtures("saved")
def test_files_that_are_replaced_after_they_were_looked_at_are_not_loaded(
    folder: TaskFolder, encoder_folder: Folders
) -> None:
    found = describe_adapter(folder)
    _replace(folder.head, "bias", lambda tensor: tensor + 1)
    with pytest.raises(AdapterError, match="was replaced while it was being loaded"):
        load_adapter(folder, load_encoder(encoder_folder("bert")), found=found)


def _header(entries: str) -> bytes:
    return len(entries).to_bytes(8, "little") + entries.encode()


LONG_FILES: list[tuple[Callable[[], bytes], str]] = [
    (
        lambda: _header(
            "{" + ",".join(f'"t{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(400_000)) + "}"
        ),
        "bytes",
    ),
    (lambda: _header('{"__metadata__":{"x":"' + "x" * 99_000_000 + '"}}'), "bytes"),
    (lambda: (1 << 62).to_bytes(8, "little"), "damaged"),
    (lambda: _header("{}") + b"x", "damaged"),
    (lambda: _header("[" * 20_000), "damaged"),
    (lambda: _header('{"weight":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}}'), "damaged"),
]


@pytest.mark.usefixtures("saved")
@pytest.mark.timeout(20)
@pytest.mark.parametrize(("content", "says"), LONG_FILES)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "head.safetensors"])
def test_a_file_that_would_be_read_for_long_is_refused_at_once(
    file: str, content: Callable[[], bytes], says: str, folder: TaskFolder, encoder_folder: Folders
) -> None:
    (folder.root / file).write_bytes(content())
    with pytest.raises(AdapterError, match=rf"{file}.*{says}"):
        load_adapter(folder, load_encoder(encoder_folder("bert")))


def test_a_head_of_very_many_classes_is_not_made_before_its_file_is_read(
    saved: Adapter, folder: TaskFolder, tmp_path: Path
) -> None:
    names = [str(number) for number in range(100_000)]
    folder.labels.write_text(json.dumps(names), encoding="utf-8")
    meta = json.loads(folder.meta.read_text(encoding="utf-8"))
    folder.meta.write_text(json.dumps(meta | {"label_names": names, "num_classes": len(names)}), encoding="utf-8")
    saved.detach()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError, match=r"head\.safetensors: bias: expected shape \(100000,\), found \(3,\)"):
        load_adapter(folder, saved.encoder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


# What PEFT loads


def check_with_peft(folder: TaskFolder, encoder: Encoder) -> None:
    found, tokens = describe_adapter(folder), encoder.tokenise(TEXTS)
    adapter = load_adapter(folder, encoder, found=found)
    expected = logits(adapter)
    adapter.detach()
    check_peft(adapter, found, tokens, outputs=expected, tolerance=1e-3)


@pytest.mark.usefixtures("saved")
def test_the_check_with_peft_leaves_the_encoder_as_it_was(folder: TaskFolder, encoder_folder: Folders) -> None:
    encoder = load_encoder(encoder_folder("bert"))
    before, modules = embed(encoder), list(encoder.model.modules())
    check_with_peft(folder, encoder)
    assert list(encoder.model.modules()) == modules
    assert embed(encoder).tobytes() == before.tobytes()


@pytest.mark.usefixtures("saved")
@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"lora_alpha": 32}, "lora_alpha is 32"),
        ({"r": 4}, "r is 4"),
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": r"encoder\.layer\.0\.attention\.self\.query"}, "target_modules"),
        ({"target_modules": "(a+)+$"}, "target_modules"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"query": 99}}, "alpha_pattern"),
        ({"exclude_modules": "query"}, "exclude_modules"),
        ({"modules_to_save": ["pooler"]}, "modules_to_save"),
        ({"layer_replication": [[0, 1000]]}, "layer_replication"),
        ({"megatron_core": "os.path", "megatron_config": {"x": 1}}, "megatron_co"),
        ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, "auto_mapping"),
        ({"base_model_name_or_path": "someone/else"}, "base_model_name_or_path"),
        ({"revision": "a" * 40}, "revision"),
    ],
)
def test_a_configuration_by_which_peft_would_load_something_else_is_refused(
    changes: dict[str, Any], says: str, folder: TaskFolder, encoder_folder: Folders
) -> None:
    config = json.loads(folder.adapter_config.read_text(encoding="utf-8"))
    folder.adapter_config.write_text(json.dumps(config | changes), encoding="utf-8")
    with pytest.raises(VerificationError, match=rf"adapter_config\.json: {says}"):
        check_with_peft(folder, load_encoder(encoder_folder("bert")))


@pytest.mark.usefixtures("saved")
def test_a_configuration_of_another_version_of_peft_is_no_fault(folder: TaskFolder, encoder_folder: Folders) -> None:
    config = json.loads(folder.adapter_config.read_text(encoding="utf-8"))
    left_out = {
        key: value for key, value in config.items() if key not in ("velora_config", "use_bdlora", "peft_version")
    }
    folder.adapter_config.write_text(json.dumps(left_out | {"of_a_later_version": None}), encoding="utf-8")
    check_with_peft(folder, load_encoder(encoder_folder("bert")))


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"{}"])
def test_a_configuration_that_is_damaged_or_gone_is_refused(
    content: bytes | None, folder: TaskFolder, encoder_folder: Folders
) -> None:
    folder.adapter_config.unlink()
    if content is not None:
        folder.adapter_config.write_bytes(content)
    with pytest.raises(LorafleetError, match=r"adapter_config\.json"):
        check_with_peft(folder, load_encoder(encoder_folder("bert")))


# The .pt files


def _bomb(path: Path) -> None:
    """The same names and more numbers, packed: a thousandth of what it unpacks to."""
    state = torch.load(path, weights_only=True)
    torch.save({name: torch.zeros(4_000_000) for name in state}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _overlapping(path: Path) -> None:
    """Many entries of the directory that stand for the same bytes."""
    content = path.read_bytes()
    with zipfile.ZipFile(BytesIO(content)) as archive:
        entries = archive.infolist()
        largest = max(entries, key=lambda entry: entry.file_size)
        archive.mode, archive.fp, archive._didModify = "a", BytesIO(content[: archive.start_dir]), True  # type: ignore[attr-defined,assignment]
        archive.fp.seek(archive.start_dir)  # type: ignore[union-attr,attr-defined]
        for number in range(500):
            twin = copy.copy(largest)
            twin.filename = f"{largest.filename}{number}"
            archive.filelist.append(twin)
        file = archive.fp
        archive._write_end_record()  # type: ignore[attr-defined]
        path.write_bytes(file.getvalue())  # type: ignore[union-attr]
        archive._didModify = False  # type: ignore[attr-defined]


def _list(path: Path) -> None:
    torch.save([torch.zeros(3)], path)


def _words(path: Path) -> None:
    torch.save(dict.fromkeys(torch.load(path, weights_only=True), "a"), path)


def _as_float64(path: Path) -> None:
    torch.save({name: tensor.double() for name, tensor in torch.load(path, weights_only=True).items()}, path)


def _one_more(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True) | {"more": torch.zeros(3)}, path)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("file", ["lora_adapter.pt", "classifier_head.pt"])
@pytest.mark.parametrize("harm", [_bomb, _overlapping, _list, _words, _as_float64, _one_more, _empty, _pipe])
def test_a_pt_file_that_is_not_the_adapter_is_refused_before_it_is_unpacked(
    harm: Callable[[Path], None], file: str, saved: Adapter, folder: TaskFolder
) -> None:
    check_both_forms(saved, folder)
    harm(folder.root / file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        VerificationError, match=rf"{file}: (missing or damaged|expected tensors by name|the weights differ)"
    ):
        check_both_forms(saved, folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"


def _one_vector(adapter: Adapter) -> Adapter:
    """Hold the weights as the training loop does, as views of one vector."""
    parameters = adapter.parameters
    vector = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    return adapter


@pytest.mark.parametrize("num_classes", [2, 77])
@pytest.mark.parametrize("rank", [1, 8])
def test_a_tensor_file_holds_its_tensors_and_little_more(
    num_classes: int, rank: int, encoder_folder: Folders, folder: TaskFolder
) -> None:
    names = [f"class {number}" for number in range(num_classes)]
    adapter = _one_vector(give_effect(Adapter(load_encoder(encoder_folder("bert")), AdapterConfig(rank=rank), names)))
    save_adapter(adapter, folder, meta={})
    head = sum(parameter.nbytes for parameter in adapter.head.parameters())
    pairs = sum(parameter.nbytes for parameter in adapter.encoder_parameters)
    assert head < folder.classifier_head_pt.stat().st_size <= head + 2_500
    assert pairs < folder.lora_adapter_pt.stat().st_size <= pairs + 500 * 3 * len(adapter.projections)
    assert head < folder.head.stat().st_size <= head + 500
    assert pairs < folder.adapter_weights.stat().st_size <= pairs + 300 * 2 * len(adapter.projections)
    check_both_forms(adapter, folder)


def test_pt_files_of_older_versions_which_held_more_still_are_the_adapter(
    encoder_folder: Folders, folder: TaskFolder
) -> None:
    adapter = _one_vector(trained(load_encoder(encoder_folder("bert"))))
    save_adapter(adapter, folder, meta={})
    torch.save({name: tensor.detach() for name, tensor in adapter.head.state_dict().items()}, folder.classifier_head_pt)
    assert folder.classifier_head_pt.stat().st_size > sum(parameter.nbytes for parameter in adapter.parameters)
    check_both_forms(adapter, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_an_adapter_embeds_trains_and_embeds_again(family: str, encoder_folder: Folders) -> None:
    """The path of a run on a processor with bfloat16: packed weights, first used by an inference."""
    config = EncoderConfig(name=str(encoder_folder(family)), max_tokens=24)
    runtime = choose_runtime(TrainConfig(precision="bfloat16"), threads=1, use_gpu=False)
    encoder = Encoder(find_encoder(config, offline=True), config, runtime)
    exact = embed(trained(load_encoder(encoder_folder(family))).encoder)
    adapter = trained(encoder)
    before = embed(encoder)
    np.testing.assert_allclose(before, exact, atol=0.1)
    batch = encoder.batch(encoder.tokenise(TEXTS[:6]), np.arange(6))
    nn.functional.cross_entropy(adapter.logits(batch), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in adapter.parameters)
    assert embed(encoder).tobytes() == before.tobytes()
    with adapter.merged():
        np.testing.assert_allclose(embed(encoder), before, atol=0.1)
    assert embed(encoder).tobytes() == before.tobytes()
