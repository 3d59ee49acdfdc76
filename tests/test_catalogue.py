from __future__ import annotations

import socket
from collections import Counter
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mteb.models.model_meta import ModelMeta

from pipeline.config import DataConfig, MtebTaskConfig
from pipeline.data.catalogue import UNREAD, load_mteb_task, plan_task
from pipeline.data.mteb_tasks import load_from_hub
from pipeline.data.quickstart import hash_order
from pipeline.data.table_checks import LoadedTask
from pipeline.errors import ConfigError, DataError
from pipeline.records import MtebTask

MIRROR = Path(__file__).parents[2] / "shared" / "data" / "mteb"
needs_mirror = pytest.mark.skipif(not MIRROR.is_dir(), reason=f"no copies of the MTEB data sets in {MIRROR}")


class LetterCounts:
    """An mteb encoder without weights, which counts letters. It records the texts that it encodes."""

    mteb_model_meta = ModelMeta.create_empty({"name": "lorafleet/letter-counts", "revision": "1"})

    def __init__(
        self,
        model_name: str = "letter-counts",
        revision: str | None = None,
        *,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.asked: list[tuple[str, str, list[str]]] = []

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **kwargs: Any
    ) -> Any:
        texts = [text for batch in inputs for text in batch["text"]]
        self.asked.append((hf_split, hf_subset, texts))
        counts = np.array(
            [[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts],
            dtype=np.float32,
        )
        return counts / np.maximum(1.0, np.linalg.norm(counts, axis=1, keepdims=True))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        raise NotImplementedError

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        raise NotImplementedError


def plan(name: str, *, mirror: Path | str | None = None, **config: Any) -> MtebTask:
    data = DataConfig(mirror=None if mirror is None else str(mirror))
    return plan_task(MtebTaskConfig(name=name, **config), data=data, default_epochs=5)


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def own_task(folder: Path, *, train: dict[str, Any], test: dict[str, Any], **config: Any) -> MtebTask:
    files = {
        split: str(write(folder / f"{split}.parquet", **columns))
        for split, columns in (("train", train), ("test", test))
    }
    return plan("Tickets", **files, **config)


def evaluate(loaded: LoadedTask, encoder: LetterCounts) -> Any:
    result = mteb.evaluate(
        encoder,
        loaded.mteb_task,
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
        encode_kwargs={"batch_size": 256},
    )
    return result.task_results[0]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"asked the network for {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


TWO_CLASSES = {
    "text": [f"{word} {i}" for i in range(10) for word in ("red fox", "blue whale")],
    "label": ["fox", "whale"] * 10,
}


# --- plan ---


def test_own_files_precede_packages_then_the_mirror_then_the_hub() -> None:
    assert plan("WordNetDomains", mirror="m", train="a.parquet", test="b.parquet").source == "files"
    assert plan("WordNetDomains", mirror="m").source == "package"
    assert plan("Banking77Classification", mirror="m").source == "mirror"
    assert plan("Banking77Classification").source == "hub"


def test_a_hub_task_is_planned_at_the_revision_that_mteb_pins() -> None:
    task = plan("Banking77Classification", max_epochs=10)
    assert (task.location, task.revision) == ("mteb/banking77", "0fd18e25b25c072e09e0d92ab615fda904d66300")
    assert (task.subset, task.max_epochs, task.samples_per_label) == ("default", 10, 8)


@pytest.mark.usefixtures("no_network")
def test_a_plan_reads_no_data(tmp_path: Path) -> None:
    mirrored = plan("MassiveIntentClassification", mirror=tmp_path / "nowhere")
    own = plan("Tickets", train="missing.parquet", test="missing.parquet", label_column="queue")
    assert (mirrored.location, mirrored.revision) == (str(tmp_path / "nowhere" / "MassiveIntentClassification"), UNREAD)
    assert (own.location, own.revision, own.label_column) == (str(Path.cwd() / "missing.parquet"), UNREAD, "queue")
    assert plan("RottenTomatoes").revision == "0.0.2"


@pytest.mark.parametrize(
    ("name", "subset", "samples_per_label"),
    [
        ("AmazonCounterfactualClassification", "en", 32),
        ("MassiveIntentClassification", "en", 8),
        ("MTOPDomainClassification", "en", 8),
        ("SIB200Classification", "eng_Latn", 8),
        ("ToxicConversationsClassification", "default", 16),
    ],
)
def test_english_is_the_default_subset(name: str, subset: str, samples_per_label: int) -> None:
    assert (plan(name).subset, plan(name).samples_per_label) == (subset, samples_per_label)


@pytest.mark.parametrize(
    ("name", "objective", "loss", "columns", "score_column"),
    [
        ("Banking77Classification", "classification", "cross-entropy", (), None),
        ("STS12", "text-matching", "cosent", ("sentence1", "sentence2"), "score"),
        ("TwitterURLCorpus", "text-matching", "cosent", ("sentence1", "sentence2"), "labels"),
        ("SciFact", "retrieval", "infonce", ("query", "passage"), None),
        ("WordNetReverseDictionary", "retrieval", "infonce", ("query", "passage"), None),
    ],
)
def test_the_family_of_a_known_task_follows_from_its_type(
    name: str, objective: str, loss: str, columns: tuple[str, ...], score_column: str | None
) -> None:
    task = plan(name)
    assert (task.objective, task.loss, task.columns, task.score_column) == (objective, loss, columns, score_column)


def test_a_known_classification_may_be_learnt_as_a_separation_and_nothing_else() -> None:
    task = plan("Banking77Classification", objective="separation")
    assert (task.objective, task.loss, task.label_column) == ("separation", "infonce", "label")
    for name, family in (("Banking77Classification", "retrieval"), ("STS12", "retrieval"), ("SciFact", "separation")):
        with pytest.raises(ConfigError, match=f'{name}: objective = "{family}" does not fit its data; expected'):
            plan(name, objective=family)


def test_a_clustering_is_learnt_from_a_mirror_with_train_texts_and_refused_without(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mteb lists it as Clustering, with test texts only"):
        plan("TwentyNewsgroupsClustering.v2")
    for split in ("train", "test"):
        write(tmp_path / "TwentyNewsgroupsClustering.v2" / f"{split}.parquet", **TWO_CLASSES)
    loaded = load_mteb_task(plan("TwentyNewsgroupsClustering.v2", mirror=tmp_path), offline=True)
    assert (loaded.task.objective, loaded.splits["train"].num_rows) == ("separation", 20)
    assert loaded.mteb_task.metadata.type == "Classification"  # it holds texts and labels for the few-shot protocol


def test_a_requested_subset_is_used() -> None:
    assert plan("MTOPDomainClassification", subset="de").subset == "de"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "Banking77"}, "Did you mean Banking77Classification"),
        ({"name": "WordnetDomain"}, "Did you mean WordNetDomains"),
        ({"name": "qqqqqqqq"}, "mteb knows no task 'qqqqqqqq'. For your own data"),
        ({"name": "AskUbuntuDupQuestions"}, "mteb lists it as Reranking of text"),
        ({"name": "SICK2014"}, "mteb knows no task 'SICK2014'"),
        ({"name": "STSBenchmrk"}, "Did you mean STSBenchmark"),
        ({"name": "EmotionVNClassification", "subset": "xx"}, "its subsets are default"),
        ({"name": "MTOPDomainClassification", "subset": "it"}, "its subsets are en, de, es, fr, hi, th"),
        ({"name": "RottenTomatoes", "subset": "en"}, "has no subset 'en'"),
        (
            {"name": "X", "train": "a", "test": "b", "text_column": "label"},
            "text_column and label_column both name 'label'",
        ),
        ({"name": "X", "train": "a", "group_column": "text"}, "text_column and group_column both name 'text'"),
    ],
)
def test_an_impossible_task_gives_one_message_with_the_alternatives(config: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**config)
    assert words in str(caught.value)


# --- own files ---


def test_columns_of_any_name_and_labels_of_any_type_become_text_and_label(tmp_path: Path) -> None:
    kinds: dict[str, Any] = {
        "strings": (pa.array(["b", "a", "b"]), ["b", "a", "b"]),
        "dictionary": (pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
        "bytes": (pa.array([3, -1, 3], pa.int8()), [3, -1, 3]),
        "booleans": (pa.array([True, False, True]), ["true", "false", "true"]),
        "whole floats": (pa.array([1.0, 0.0, 1.0]), [1, 0, 1]),
        "half floats": (pa.array([1.0, 0.0, 1.0], pa.float16()), [1, 0, 1]),
        "categories of numbers": (pa.array([3, -1, 3]).dictionary_encode(), [3, -1, 3]),
        "small numbers of a large type": (pa.array([3, 1, 3], pa.uint64()), [3, 1, 3]),
        "bytes without a type": (pa.array([b"b", b"\xc3\xa9", b"b"]), ["b", "é", "b"]),
        "views": (pa.array(["b", "a", "b"], pa.string_view()), ["b", "a", "b"]),
    }
    for kind, (queue, expected) in kinds.items():
        columns = {"body": pa.array(["x", "y", "z"], pa.large_string()), "queue": queue, "id": [1, 2, 3]}
        task = own_task(tmp_path / kind, train=columns, test=columns, text_column="body", label_column="queue")
        train = load_mteb_task(task, offline=True).splits["train"]
        assert train.column_names == ["text", "label"], kind
        assert train["label"].to_pylist() == expected, kind
        assert (train["text"].type, train["text"].to_pylist()) == (pa.string(), ["x", "y", "z"]), kind


def test_the_revision_of_files_is_the_hash_of_both_of_them(tmp_path: Path) -> None:
    other = {"text": ["red fox", "blue whale"], "label": ["whale", "fox"]}
    tasks = [
        own_task(tmp_path / str(i), train=TWO_CLASSES, test=test)
        for i, test in enumerate((TWO_CLASSES, TWO_CLASSES, other))
    ]
    first, same, changed = (load_mteb_task(task, offline=True).task.revision for task in tasks)
    assert first == same != changed
    assert first.startswith("sha256:")
    assert len(first) == len("sha256:") + 64


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, "train is empty"),
        ({"body": ["a", "b"], "label": [0, 1]}, "train.parquet has no column 'text', but 'body', 'label'"),
        ({"text": ["a", "b"], "queue": [0, 1]}, "set label_column for this MTEB task in the config"),
        ({"text": [1, 2], "label": [0, 1]}, "column 'text' is int64, not text"),
        (
            {"text": ["a", None], "label": [0, 1]},
            "column 'text': 1 of 2 rows have no value; remove these rows or fill them",
        ),
        ({"text": ["a", "b"], "label": [None, 1]}, "column 'label': 1 of 2 rows have no value"),
        ({"text": ["a", "b"], "label": [0.5, 1.0]}, "column 'label' is double, but not of whole numbers"),
        ({"text": ["a", "b"], "label": [float("nan"), 1.0]}, "column 'label': 1 of 2 rows have no value"),
        ({"text": ["a", "b"], "label": [float("inf"), 1.0]}, "column 'label' is double, but not of whole numbers"),
        (
            {"text": ["a", "b"], "label": [[0], [1]]},
            "which means several labels for a text; expected one label for each text, several are not supported",
        ),
        (
            {"text": ["a", "b"], "label": [{"x": 0}, {"x": 1}]},
            "column 'label' is struct<x: int64>; expected strings, whole numbers or",
        ),
        (
            {"text": ["a", "b"], "label": [date(2026, 1, 1)] * 2},
            "column 'label' is date32[day]; expected strings, whole numbers or",
        ),
        (
            {"text": ["a", "b"], "label": [Decimal(1), Decimal(2)]},
            "column 'label' is decimal128(1, 0); expected strings",
        ),
        (
            {"text": ["a", "b"], "label": pa.array([2**63, 1], pa.uint64())},
            "is uint64, but not of numbers of 64 bits with a sign",
        ),
        ({"text": [b"a", b"\xff"], "label": [0, 1]}, "column 'text' holds bytes that are not UTF-8"),
    ],
)
def test_a_file_without_texts_and_labels_gives_one_message(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        load_mteb_task(own_task(tmp_path, train=columns, test=TWO_CLASSES), offline=True)
    assert words in str(caught.value)
    assert str(caught.value).startswith("Tickets: ")


@pytest.mark.parametrize("twice", ["text", "label"])
def test_a_repeated_column_gives_one_message(tmp_path: Path, twice: str) -> None:
    task = own_task(tmp_path, train=TWO_CLASSES, test=TWO_CLASSES)
    table = pq.read_table(tmp_path / "train.parquet")
    pq.write_table(table.append_column(twice, table[twice]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=rf"Tickets: train: .*train\.parquet has 2 columns named '{twice}'"):
        load_mteb_task(task, offline=True)


def test_text_that_a_file_calls_json_or_leaves_untyped_is_text(tmp_path: Path) -> None:
    for number, kind in enumerate((pa.json_(), None)):
        text = (
            pa.ExtensionArray.from_storage(kind, pa.array(['"a"', '"b"']))
            if kind
            else pa.array([b'"a"', b'"b"'], pa.large_binary())
        )
        task = own_task(
            tmp_path / str(number), train={"text": text, "label": [0, 1]}, test=TWO_CLASSES | {"label": [0, 1] * 10}
        )
        assert load_mteb_task(task, offline=True).splits["train"]["text"].to_pylist() == ['"a"', '"b"']


def test_shards_are_read_together_whatever_the_order_and_width_of_their_columns(tmp_path: Path) -> None:
    write(tmp_path / "in" / "1.parquet", text=pa.array(["a"]), label=pa.array(["x"]), label_text=["X"])
    write(
        tmp_path / "in" / "2.parquet",
        label=pa.array(["y"]).dictionary_encode(),
        text=pa.array(["b"], pa.large_string()),
    )
    write(
        tmp_path / "in" / "3.parquet",
        id=[1],
        label=pa.array(["x"], pa.large_string()),
        text=pa.array(["c"]).dictionary_encode(),
    )
    write(tmp_path / "in" / "4.parquet", text=pa.nulls(0), label=pa.nulls(0))
    test = write(tmp_path / "test.parquet", text=["d"], label=["x"])
    loaded = load_mteb_task(plan("Tickets", train=str(tmp_path / "in"), test=str(test)), offline=True)
    assert loaded.splits["train"].to_pydict() == {"text": ["a", "b", "c"], "label": ["x", "y", "x"]}


def test_the_revision_of_shards_is_the_hash_of_their_content(tmp_path: Path) -> None:
    revisions = []
    for name, label in (("here", "x"), ("there", "x"), ("there", "z")):
        for number in range(3):
            write(tmp_path / name / f"{number}.parquet", text=[f"text {number}"] * 4, label=["y", label] * 2)
        task = plan("Tickets", train=str(tmp_path / name / "*.parquet"), test_fraction=0.4)
        revisions.append(load_mteb_task(task, offline=True).task.revision)
    assert revisions[0] == revisions[1] != revisions[2]


def test_shards_whose_labels_differ_in_kind_are_named_both(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", text=["a"], label=["x"])
    write(tmp_path / "2.parquet", text=["b"], label=[1])
    with pytest.raises(DataError, match=r"train: labels are .*int64 in .*2\.parquet.*; write them alike") as caught:
        load_mteb_task(plan("Tickets", train=str(tmp_path)), offline=True)
    assert f"string in {tmp_path}/1.parquet" in str(caught.value)


def test_a_file_that_is_in_train_and_in_test_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", **TWO_CLASSES)
    with pytest.raises(DataError, match=r"b\.parquet' is in train and in test"):
        load_mteb_task(plan("Tickets", train=str(tmp_path), test=str(tmp_path / "b.parquet")), offline=True)


def test_skipped_files_of_a_folder_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", **TWO_CLASSES)
    (tmp_path / "README.md").write_text("x")
    assert load_mteb_task(plan("Tickets", train=str(tmp_path)), offline=True).notes == (
        "skipped in the folder of train: 'README.md'",
    )


@pytest.mark.usefixtures("no_network")
def test_files_on_the_hub_are_not_requested_offline() -> None:
    with pytest.raises(
        DataError, match=r"Tickets: train: hf://datasets/somebody/x is on the Hub, but data\.offline = true"
    ):
        load_mteb_task(plan("Tickets", train="hf://datasets/somebody/x"), offline=True)


def test_a_record_of_an_earlier_version_says_parquet_for_own_files(tmp_path: Path) -> None:
    task = own_task(tmp_path, train=TWO_CLASSES, test=TWO_CLASSES)
    assert (
        MtebTask.model_validate(task.model_dump(exclude={"test_split", "group_column"}) | {"source": "parquet"}) == task
    )


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    task = own_task(tmp_path, train=TWO_CLASSES, test=TWO_CLASSES)
    test = tmp_path / "test.parquet"
    test.write_bytes(test.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"Tickets: test: .*test\.parquet: its footer cannot be read"):
        load_mteb_task(task, offline=True)
    test.unlink()
    with pytest.raises(DataError, match=r"Tickets: test: .*test\.parquet does not exist"):
        load_mteb_task(task, offline=True)


def test_text_that_is_not_utf_8_is_an_error_without_traceback(tmp_path: Path) -> None:
    damaged = pa.array([b"caf\xe9", b"tea"]).view(pa.string())
    with pytest.raises(DataError, match=r"train\.parquet: holds bytes that are not UTF-8"):
        load_mteb_task(own_task(tmp_path, train={"text": damaged, "label": [0, 1]}, test=TWO_CLASSES), offline=True)


def test_a_mirror_without_the_task_or_a_split_lists_its_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the mirror has no folder .*Banking77Classification"):
        load_mteb_task(plan("Banking77Classification", mirror=tmp_path), offline=True)
    write(tmp_path / "Banking77Classification" / "train.parquet", text=["a"], label=[0])
    with pytest.raises(DataError, match="expected a split 'test', found train"):
        load_mteb_task(plan("Banking77Classification", mirror=tmp_path), offline=True)


# --- mteb's evaluator ---


@pytest.mark.usefixtures("no_network")
def test_mteb_scores_own_files_with_two_string_labels_on_test_alone(tmp_path: Path) -> None:
    test = {"text": ["a red fox", "the blue whale", "fox", "whale"], "label": ["fox", "whale", "fox", "whale"]}
    encoder = LetterCounts()
    result = evaluate(load_mteb_task(own_task(tmp_path, train=TWO_CLASSES, test=test), offline=True), encoder)
    (scores,) = result.scores["test"]
    assert (result.task_name, list(result.scores), scores["hf_subset"]) == ("Tickets", ["test"], "default")
    assert (scores["accuracy"], scores["f1"], scores["ap"]) == (1.0, 1.0, 1.0)
    assert len(scores["scores_per_experiment"]) == 10
    assert [(split, subset) for split, subset, _ in encoder.asked] == [("train", "default"), ("test", "default")]
    assert encoder.asked[1][2] == test["text"]


@pytest.mark.usefixtures("no_network")
def test_mteb_scores_one_subset_and_no_validation_split_of_a_mirrored_multilingual_task(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / "MTOPDomainClassification" / f"{split}.parquet", **TWO_CLASSES)
    loaded = load_mteb_task(plan("MTOPDomainClassification", mirror=tmp_path), offline=True)
    encoder = LetterCounts()
    result = evaluate(loaded, encoder)
    assert sorted(loaded.splits) == ["test", "train", "validation"]
    assert list(result.scores) == ["test"]
    assert [scores["hf_subset"] for scores in result.scores["test"]] == ["en"]
    assert [(split, subset) for split, subset, _ in encoder.asked] == [("train", "en"), ("test", "en")]


def test_a_small_class_gives_mteb_all_its_texts(tmp_path: Path) -> None:
    train = {"text": [f"fox {i}" for i in range(20)] + ["whale 0", "whale 1"], "label": ["fox"] * 20 + ["whale"] * 2}
    loaded = load_mteb_task(own_task(tmp_path, train=train, test=TWO_CLASSES), offline=True)
    drawn, _, _ = loaded.mteb_task._undersample_data(loaded.mteb_task.dataset["train"], 0)
    assert Counter(drawn["label"]) == {0: 8, 1: 2}


@needs_mirror
def test_the_few_shot_scores_are_those_of_mteb_with_the_labels_as_the_hub_has_them(tmp_path: Path) -> None:
    """The Hub's MASSIVE has label names, the mirror has numbers in another order. The first rows are enough."""
    import datasets

    name = "MassiveScenarioClassification"
    as_on_hub = datasets.DatasetDict()
    for split, count in (("train", 2000), ("test", 300)):
        table = pq.read_table(MIRROR / name / f"{split}.parquet").slice(0, count)
        write(tmp_path / name / f"{split}.parquet", text=table["text"], label=table["label"])
        as_on_hub[split] = datasets.Dataset(pa.table({"text": table["text"], "label": table["label_text"]}))
    theirs = mteb.get_task(name, eval_splits=["test"], hf_subsets=["en"])
    theirs.dataset, theirs.data_loaded = {"en": as_on_hub}, True
    ours = load_mteb_task(plan(name, mirror=tmp_path), offline=True)
    expected, found = (
        evaluate(loaded, LetterCounts()).scores["test"][0] for loaded in (LoadedTask(ours.task, theirs, {}), ours)
    )
    assert found["accuracy"] == expected["accuracy"]
    assert found["f1"] == pytest.approx(expected["f1"], abs=1e-12)


# --- Hub ---


def test_a_hub_task_that_is_not_in_the_local_cache_fails_at_once_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match=r"mteb/banking77 at 0fd18e25b25c\w+ is not in the local Hub cache"):
        load_mteb_task(plan("Banking77Classification"), offline=True)
    assert not datasets.config.HF_HUB_OFFLINE


def test_from_the_hub_mteb_loads_and_transforms_its_own_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder replaces the Hub repository; ``datasets`` loads both alike. mteb cuts this task's test to 2048."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split, count in (("train", 40), ("test", 2100)):
        names = ["not toxic", "toxic"] * (count // 2)
        write(
            tmp_path / "hub" / f"{split}.parquet",
            text=[f"{i}" for i in range(count)],
            label=[0, 1] * (count // 2),
            label_text=names,
        )
    mteb_task = mteb.get_task("ToxicConversationsClassification", eval_splits=["test"])
    repository = {"path": str(tmp_path / "hub"), "revision": "0" * 40}
    mteb_task.metadata = mteb_task.metadata.model_copy(update={"dataset": repository})
    loaded = load_from_hub(plan("ToxicConversationsClassification"), mteb_task, offline=True)
    assert {split: table.num_rows for split, table in loaded.splits.items()} == {"train": 40, "test": 2048}
    assert set(
        zip(*(loaded.splits["test"][column].to_pylist() for column in ("label", "label_text")), strict=True)
    ) == {
        (0, "not toxic"),
        (1, "toxic"),
    }
    assert loaded.task.revision == "0" * 40
    assert list(evaluate(loaded, LetterCounts()).scores) == ["test"]


def test_a_folder_named_like_a_data_set_of_the_hub_is_not_read_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "mteb" / "banking77" / "train.parquet", text=["a"], label=[0])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match="mteb/banking77 in the working folder would be taken for the data set on the Hub"
    ):
        load_from_hub(plan("Banking77Classification"), mteb.get_task("Banking77Classification"), offline=True)


def test_names_that_the_hub_keeps_beside_the_numbers_arrive_as_label_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["card", "cash"])}
    )
    for split in ("train", "test"):
        part = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
        part.to_parquet(str(tmp_path / "hub" / f"{split}.parquet"))
    mteb_task = mteb.get_task("Banking77Classification", eval_splits=["test"])
    repository = {"path": str(tmp_path / "hub"), "revision": "0" * 40}
    mteb_task.metadata = mteb_task.metadata.model_copy(update={"dataset": repository})
    loaded = load_from_hub(plan("Banking77Classification"), mteb_task, offline=True)
    assert loaded.splits["train"].to_pydict() == {
        "text": ["a", "b", "c"],
        "label": [1, 0, 1],
        "label_text": ["cash", "card", "cash"],
    }


# --- packages ---


def test_hash_order_depends_on_texts_and_seed_alone_and_puts_equal_texts_together() -> None:
    texts = ["a", "b", "a", "c", "d"]
    order = [texts[i] for i in hash_order(texts, seed=0)]
    assert sorted(order) == sorted(texts)
    assert order == [texts[::-1][i] for i in hash_order(texts[::-1], seed=0)]
    assert order != [texts[i] for i in hash_order(texts, seed=1)]
    assert abs(order.index("a") - (len(order) - 1 - order[::-1].index("a"))) == 1


def test_wordnet_domains_are_thirty_classes_of_three_hundred_definitions() -> None:
    loaded = load_mteb_task(plan("WordNetDomains"), offline=True)
    train, test = (loaded.splits[split].to_pydict() for split in ("train", "test"))
    assert set(Counter(train["label"]).values()) == {240}
    assert set(Counter(test["label"]).values()) == {60}
    assert len(Counter(train["label"])) == 30
    assert "Factotum" not in train["label"]
    texts = train["text"] + test["text"]
    assert len(set(texts)) == 9000
    assert not any("\\" in text or text != text.strip(" ;:") or not text for text in texts)
    assert loaded.task.revision == "0.1.5"


def test_rotten_tomatoes_are_7000_and_1530_sentences_of_two_classes_in_balance() -> None:
    loaded = load_mteb_task(plan("RottenTomatoes"), offline=True)
    assert Counter(loaded.splits["train"]["label"].to_pylist()) == {"negative": 3500, "positive": 3500}
    assert Counter(loaded.splits["test"]["label"].to_pylist()) == {"negative": 765, "positive": 765}
    assert set(loaded.splits["train"]["label"].to_pylist()[:20]) == {"negative", "positive"}


@pytest.mark.usefixtures("no_network")
def test_mteb_scores_a_package_task() -> None:
    encoder = LetterCounts()
    result = evaluate(load_mteb_task(plan("RottenTomatoes"), offline=True), encoder)
    assert [(split, len(texts)) for split, _, texts in encoder.asked] == [("train", 160), ("test", 1530)]
    assert 0.4 < result.scores["test"][0]["accuracy"] < 0.7
