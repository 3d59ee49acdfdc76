"""LoRA pairs without a head: saved, merged, verified, published and used like a classifier, without labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import give_effect, load_encoder
from commands import FinishedRun, run
from publishing import NO_GATE, REPO, change_adapter, copy_run, hub_of_our_own, rewrite_results

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.description import describe_adapter
from pipeline.adapter.files import check_both_forms, load_adapter, save_adapter, start_from
from pipeline.config import AdapterConfig, PublishConfig
from pipeline.encoder.encoder import Encoder
from pipeline.errors import AdapterError, VerificationError
from pipeline.evaluation.vectors import normalize
from pipeline.export.export import export_adapter
from pipeline.inference.classifier import load_classifier
from pipeline.inference.reference import find_adapters
from pipeline.inference.reload import check_reload
from pipeline.inference.router import Router
from pipeline.publishing.publish import publish
from pipeline.publishing.verify import verify
from pipeline.records import TaskResult
from pipeline.store.files import read_record
from pipeline.store.run_folder import RunFolder, TaskFolder, adapter_sha256

Folders = Callable[[str], Path]
TEXTS = ["the sea is wide", "a rose in the garden", "salt and pepper", "a boat"]
CANNOT = "has no head, so it cannot classify; it can only embed"


@pytest.fixture
def folder(encoder_folder: Folders, tmp_path: Path) -> TaskFolder:
    """A saved adapter without a head, with an effect."""
    encoder, saved = load_encoder(encoder_folder("bert")), TaskFolder(tmp_path / "Vectors")
    save_adapter(give_effect(Adapter(encoder, AdapterConfig())), saved, meta={"task": "Vectors"})
    return saved


@pytest.fixture
def both(folder: TaskFolder, encoder_folder: Folders, tmp_path: Path) -> list[str]:
    """The same, and a classifier beside it."""
    encoder, saved = load_encoder(encoder_folder("bert")), TaskFolder(tmp_path / "Labels")
    save_adapter(give_effect(Adapter(encoder, AdapterConfig(), ("a", "b")), seed=2), saved, meta={"task": "Labels"})
    return [str(folder.root), str(saved.root)]


def vectors_of(folder: TaskFolder, encoder: Encoder) -> np.ndarray:
    adapter = load_adapter(folder, encoder)
    vectors = encoder.embed(encoder.tokenise(TEXTS))
    adapter.detach()
    return vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_it_is_saved_without_a_file_of_a_head_and_loaded_to_the_same_vectors(bert: Encoder, tmp_path: Path) -> None:
    saved = TaskFolder(tmp_path / "saved")
    adapter = give_effect(Adapter(bert, AdapterConfig()))
    ref = save_adapter(adapter, saved, meta={})
    expected = bert.embed(bert.tokenise(TEXTS))
    check_both_forms(adapter, saved)
    adapter.detach()
    assert not (expected == bert.embed(bert.tokenise(TEXTS))).all()
    assert {path.name for path in saved.root.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lora_adapter.pt",
        "meta.json",
    }
    found = describe_adapter(saved)
    assert (found.has_head, found.label_names, found.sha256) == (False, (), ref.sha256)
    assert json.loads(saved.meta.read_text(encoding="utf-8"))["num_classes"] == 0
    np.testing.assert_array_equal(vectors_of(saved, bert), expected)


def test_its_logits_are_refused(bert: Encoder) -> None:
    adapter = Adapter(bert, AdapterConfig())
    assert (adapter.head, adapter.label_names) == (None, ())
    assert adapter.parameters == adapter.encoder_parameters
    batch = bert.batch(bert.tokenise(TEXTS), np.arange(2))
    for ask in (lambda: adapter.classifier, lambda: adapter.logits(batch)):
        with pytest.raises(AdapterError, match=CANNOT):
            ask()


@pytest.mark.parametrize("extra", ["labels.json", "head.safetensors", "classifier_head.pt", "calibration.json"])
def test_a_file_of_a_head_beside_it_is_a_contradiction(extra: str, folder: TaskFolder) -> None:
    (folder.root / extra).write_text("[]", encoding="utf-8")
    with pytest.raises(AdapterError, match=f"meta.json lists no labels, but {extra} belong to a head"):
        describe_adapter(folder)


def test_a_classifier_that_has_lost_its_head_does_not_pass_for_one(both: list[str]) -> None:
    classifier = TaskFolder(Path(both[1]))
    before = adapter_sha256(classifier.root)
    classifier.head.unlink()
    with pytest.raises(AdapterError, match=r"head\.safetensors cannot be read"):
        describe_adapter(classifier)
    classifier.labels.unlink()
    with pytest.raises(AdapterError, match=r"labels\.json cannot be read"):
        describe_adapter(classifier)
    assert adapter_sha256(classifier.root) != before


@pytest.mark.parametrize("width", [0, -5, 2_000_000])
def test_a_forged_width_is_refused(width: int, folder: TaskFolder) -> None:
    folder.meta.write_text(json.dumps(json.loads(folder.meta.read_text()) | {"hidden_size": width}))
    with pytest.raises(AdapterError, match="hidden_size"):
        describe_adapter(folder)


def test_a_damaged_weight_is_refused(folder: TaskFolder, bert: Encoder) -> None:
    folder.adapter_weights.write_bytes(folder.adapter_weights.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="damaged"):
        load_adapter(folder, bert)


def test_merged_it_gives_the_same_vectors(folder: TaskFolder, bert: Encoder) -> None:
    adapter = load_adapter(folder, bert)
    assert adapter.merge_difference(bert.tokenise(TEXTS)) < 1e-5


def test_a_classifier_starts_from_its_pairs_and_it_from_a_classifiers(both: list[str], encoder_folder: Folders) -> None:
    headless, classifier = (TaskFolder(Path(path)) for path in both)
    for start, labels in ((headless, ("a", "b")), (classifier, None)):
        encoder = load_encoder(encoder_folder("bert"))
        expected = vectors_of(start, encoder)
        start_from(Adapter(encoder, AdapterConfig(), labels), start)
        np.testing.assert_array_equal(encoder.embed(encoder.tokenise(TEXTS)), expected)


def test_it_passes_the_reload_gate_and_a_changed_weight_does_not(folder: TaskFolder, bert: Encoder) -> None:
    adapter = load_adapter(folder, bert)
    check_reload(adapter, folder, TEXTS, is_trained=True, offline=True)
    assert len(json.loads(folder.probe.read_text(encoding="utf-8"))["logits"][0]) == bert.hidden_size
    with torch.no_grad():
        adapter.encoder_parameters[1][0, 0] += 1
    with pytest.raises(VerificationError, match="Vectors: vectors differ by"):
        check_reload(adapter, folder, TEXTS, is_trained=True, offline=True)


def test_a_router_embeds_with_it_and_labels_with_the_others(both: list[str], bert: Encoder) -> None:
    router = Router(both, encoder=bert.config.name, offline=True, precision="float32", threads=1)
    vectors = router.embed(TEXTS, "Vectors")
    np.testing.assert_allclose(vectors, unit(vectors_of(TaskFolder(Path(both[0])), bert)), atol=1e-5)
    assert {prediction.label for prediction in router.predict(TEXTS, "Labels")} <= {"a", "b"}
    assert router["Vectors"].label_names == ()
    for name in ("Vectors", ["Labels", "Vectors", "Labels", "Labels"]):
        with pytest.raises(AdapterError, match=f"adapter Vectors: it {CANNOT}"):
            router.predict(TEXTS, name)


def test_the_bulk_kernel_embeds_with_it(both: list[str], bert: Encoder) -> None:
    found = find_adapters(both, offline=True)
    kernel = load_classifier(
        found, encoder=bert.config.name, threads=2, use_gpu=False, offline=True, precision="float32"
    )
    tokens = kernel.tokenise(TEXTS)
    vectors = kernel.embed_with(0, tokens, np.arange(len(TEXTS)), width=8)
    np.testing.assert_allclose(vectors, unit(vectors_of(found[0].folder, bert)[:, :8]), atol=1e-5)
    assert kernel.classify_with(1, tokens, np.arange(2), top_k=1).labels.shape == (2,)
    with pytest.raises(AdapterError, match=CANNOT):
        kernel.classify(tokens)


def test_weights_that_overflow_are_refused(folder: TaskFolder, encoder_folder: Folders) -> None:
    encoder = load_encoder(encoder_folder("bert"))
    adapter = load_adapter(folder, encoder)
    with torch.no_grad():
        for lora in adapter.projections.values():
            lora.lora_B.fill_(1e13)
            lora.lora_A.fill_(1e13)
    save_adapter(adapter, folder, meta={"task": "Vectors"})
    with pytest.raises(AdapterError, match="Vectors: its weights overflow"):
        Router([folder.root], encoder=str(encoder_folder("bert")), offline=True, threads=1)


def test_a_bulk_job_refuses_it_with_one_message(both: list[str], tmp_path: Path) -> None:
    ended = run("classify", "in.parquet", "out", "--adapter", both[0], cwd=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.splitlines()[-1] == f"error: adapter Vectors: it {CANNOT}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["classifier", "transformers"])
def test_an_export_that_classifies_is_refused(form: str, folder: TaskFolder, tmp_path: Path) -> None:
    (found,) = find_adapters([str(folder.root)], offline=True)
    with pytest.raises(
        AdapterError, match=f"has no head, so it has no form {form}; choose sentence-transformers or onnx"
    ):
        export_adapter(found, tmp_path / "out", form=form, encoder=None, offline=True)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_sentence_transformers_loads_its_export(folder: TaskFolder, bert: Encoder, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    (found,) = find_adapters([str(folder.root)], offline=True)
    exported = export_adapter(
        found, tmp_path / "out", form="sentence-transformers", encoder=bert.config.name, offline=True
    )
    assert exported.label_names == ()
    assert not (tmp_path / "out" / "labels.json").exists()
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True)
    np.testing.assert_allclose(model.encode(TEXTS), normalize(vectors_of(folder, bert)), atol=1e-4)


# Published


def without_head(finished_run: FinishedRun, encoder_folder: Folders, root: Path, *, change: float = 0.0) -> RunFolder:
    """A finished run whose Topics adapter has lost its head, with all records of it rewritten."""
    folder = copy_run(finished_run.root, root, tasks=["Topics", "Pairs"])
    task, encoder = folder.task("Topics"), load_encoder(encoder_folder("bert"))
    result, meta = read_record(task.result, TaskResult), json.loads(task.meta.read_text(encoding="utf-8"))
    trained = load_adapter(task, encoder)
    pairs = [parameter.detach().clone() for parameter in trained.encoder_parameters]
    trained.detach()
    for path in (*task.published(), task.result):
        path.unlink()
    adapter = Adapter(encoder, trained.config)
    with torch.no_grad():
        for parameter, values in zip(adapter.encoder_parameters, pairs, strict=True):
            parameter.copy_(values + change)
    kept = {key: meta[key] for key in ("task", "epochs", "best_epoch", "selected_on", "seed", "run_id")}
    ref = save_adapter(adapter, task, meta=kept)
    check_reload(adapter, task, TEXTS, is_trained=result.best_epoch > 0, offline=True)
    task.few_shot.write_text("{}", encoding="utf-8")
    data = result.data.changed(label_names=(), label_counts=())
    nothing = {"scores": (), "comparison": None, "calibration": None, "confusions": (), "num_head_parameters": 0}
    pairs_result = read_record(folder.task("Pairs").result, TaskResult)
    rewrite_results(folder, [result.changed(adapter=ref, data=data, **nothing), pairs_result])
    return folder


def test_it_is_published_verified_and_published_over(
    finished_run: FinishedRun, encoder_folder: Folders, tmp_path: Path
) -> None:
    folder = without_head(finished_run, encoder_folder, tmp_path / "20270101-000000-0001")
    to = str(tmp_path / "published")
    first = publish(folder.root, NO_GATE.changed(to=to))
    assert [decision.decision for decision in first.decisions] == ["promote", "promote"]
    assert {adapter.name for adapter in verify(to, encoder=str(encoder_folder("bert")), offline=True)} == {
        "Topics",
        "Pairs",
    }
    assert not (tmp_path / "published" / "Topics" / "labels.json").exists()
    (loaded,) = find_adapters([f"{to}#Topics"], offline=True)
    assert not loaded.has_head
    other = without_head(finished_run, encoder_folder, tmp_path / "20270102-000000-0002", change=0.01)
    held = publish(other.root, PublishConfig(to=to))
    assert (held.decisions[0].decision, held.decisions[0].metric) == ("keep", "v_measure"), held.decisions[0].reason
    replaced = publish(other.root, NO_GATE.changed(to=to))
    assert "promote" in [decision.decision for decision in replaced.decisions]
    assert describe_adapter(RunFolder(Path(to)).task("Topics")).sha256 == adapter_sha256(other.task("Topics").root)
    card = (tmp_path / "published" / "README.md").read_text(encoding="utf-8")
    assert "| Topics |" in card


@pytest.mark.faults
def test_it_stays_on_the_hub_while_another_adapter_is_replaced(
    finished_run: FinishedRun, encoder_folder: Folders, tmp_path: Path
) -> None:
    folder = without_head(finished_run, encoder_folder, tmp_path / "20270101-000000-0001")
    other = copy_run(finished_run.root, tmp_path / "20270102-000000-0002", tasks=["Pairs"])
    change_adapter(other, "Pairs", encoder_folder("bert"), lambda adapter: adapter.parameters[0].data.mul_(1.01))
    with hub_of_our_own(tmp_path / "hub") as place:
        place.publish(folder.root, NO_GATE)
        replaced = place.publish(other.root, NO_GATE)
        assert [decision.decision for decision in replaced.decisions] == ["promote"]
        verified = verify(f"hf:{REPO}", encoder=str(encoder_folder("bert")), offline=False)
        assert {adapter.name for adapter in verified} == {"Topics", "Pairs"}
