from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.data.splits import blocks_of, held_out, label_key, text_key


def choose(
    texts: list[str], labels: list[int], *, groups: list[str] | None = None, fraction: float = 0.2, seed: int = 0
) -> NDArray[np.bool_]:
    return held_out(texts, np.array(labels), groups=groups, fraction=fraction, seed=seed)


def chosen_texts(texts: list[str], labels: list[int], *, seed: int = 0) -> set[str]:
    return {text for text, is_chosen in zip(texts, choose(texts, labels, seed=seed), strict=True) if is_chosen}


# --- what is alike ---


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Where is my parcel?", "where is  my parcel"),
        ("naïve", "nai\u0308ve"),
        ("ｆｕｌｌ width", "full width"),
        ("straße", "STRASSE"),
        ("e-mail", "email"),
        ("soft\u00adhyphen\u200b", "soft hyphen"),
        ("great 👍", "great!"),
        ("  ", ""),
    ],
)
def test_near_equal_texts_have_one_key(first: str, second: str) -> None:
    assert text_key(first) == text_key(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("order 12", "order 13"),
        ("cafe", "café"),
        (":-)", ":-("),
        ("👍", "👎"),
        ("हिंदी", "हद"),
        ("", "?"),
        ("a b", "b a"),
    ],
)
def test_texts_with_other_letters_marks_or_digits_have_other_keys(first: str, second: str) -> None:
    assert text_key(first) != text_key(second)


def test_the_fast_path_for_ascii_gives_equal_text_keys() -> None:
    signs = [chr(sign) for sign in range(128)]
    with_letters = [f"a{sign}b" for sign in signs]
    assert [text_key(text) for text in with_letters] == [
        text_key(f"é{text}").removeprefix("é".encode()) for text in with_letters
    ]


@pytest.mark.parametrize("twin", ["Bug", " bug", "bug\u00a0", "bu\u200bg", "ｂｕｇ"])
def test_labels_that_look_alike_have_one_key(twin: str) -> None:
    assert label_key(twin) == label_key("bug") == "bug"


def test_labels_that_differ_in_a_sign_have_other_keys_and_invisible_ones_none() -> None:
    assert len({label_key(label) for label in ("C", "C++", "C#", "C.")}) == 4
    assert {label_key(label) for label in ("", " ", "\t\n", "\u00a0", "\u200b")} == {""}


def test_blocks_join_near_equal_texts_and_groups_in_turn() -> None:
    texts = ["a", "A!", "b", "c", "d"]
    assert blocks_of(texts, None).tolist() == [0, 0, 1, 2, 3]
    assert blocks_of(texts, ["1", "2", "2", "3", "3"]).tolist() == [0, 0, 0, 1, 1]


# --- what is held out ---


def test_each_label_gives_its_rounded_share() -> None:
    labels = [0] * 100 + [1] * 7 + [2] * 3 + [3] * 2 + [4]
    texts = [f"text {i}" for i in range(len(labels))]
    chosen = choose(texts, labels)
    assert Counter(np.array(labels)[chosen].tolist()) == {0: 20, 1: 1, 2: 1}


def test_the_choice_depends_on_texts_and_seed_and_not_on_the_order_of_the_rows() -> None:
    texts, labels = [f"text {i}" for i in range(200)], [i % 4 for i in range(200)]
    assert chosen_texts(texts, labels) == chosen_texts(texts[::-1], labels[::-1])
    assert chosen_texts(texts, labels) != chosen_texts(texts, labels, seed=1)


def test_most_of_the_choice_stays_as_the_data_grows() -> None:
    texts, labels = [f"text {i}" for i in range(1100)], [i % 4 for i in range(1100)]
    before, after = chosen_texts(texts[:1000], labels[:1000]), chosen_texts(texts, labels)
    assert len(before) == 200
    assert len(before & after) >= 185


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.49])
@pytest.mark.parametrize("seed", range(5))
def test_no_near_equal_text_and_no_group_is_on_both_sides_and_every_label_keeps_a_text(
    seed: int, fraction: float
) -> None:
    draw = random.Random(seed)
    texts = [draw.choice(["Text {}!", "text {}", "TEXT  {}."]).format(draw.randrange(400)) for _ in range(600)]
    labels = [draw.choice([0] * 20 + [1] * 5 + [2]) for _ in texts]
    for groups in (None, [str(draw.randrange(300)) for _ in texts]):
        chosen = choose(texts, labels, groups=groups, fraction=fraction, seed=seed)
        for names in (list(map(text_key, texts)), groups or []):
            sides = {
                name: {side for other, side in zip(names, chosen.tolist(), strict=True) if other == name}
                for name in set(names)
            }
            assert all(len(both) == 1 for both in sides.values())
        assert set(np.array(labels)[~chosen].tolist()) == set(labels)


def test_large_groups_come_within_half_of_the_largest_of_the_share() -> None:
    """Ten customers with 10 to 28 texts each, and with both labels in equal parts."""
    groups = [str(customer) for customer in range(10) for _ in range(10 + 2 * customer)]
    labels = [i % 2 for i in range(len(groups))]
    texts = [f"text {i}" for i in range(len(groups))]
    for seed in range(20):
        shares = np.bincount(np.array(labels)[choose(texts, labels, groups=groups, seed=seed)]) / np.bincount(labels)
        assert np.abs(shares - 0.2).max() <= 28 / 190 / 2 + 1e-9


def test_a_label_that_only_one_group_has_stays_in_train() -> None:
    groups = ["rare"] * 5 + [str(i) for i in range(95)]
    labels = [0] * 3 + [1] * 97
    texts = [f"text {i}" for i in range(100)]
    for seed in range(20):
        assert not choose(texts, labels, groups=groups, fraction=0.49, seed=seed)[:5].any()


def test_two_groups_of_half_the_texts_cannot_be_split() -> None:
    labels = [i % 2 for i in range(40)]
    assert not choose([f"text {i}" for i in range(40)], labels, groups=[str(i // 2 % 2) for i in range(40)]).any()
