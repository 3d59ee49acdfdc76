"""Splits of texts: which texts and labels count as equal, and which texts are held out of train."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from pipeline.data.quickstart import hash_order


def held_out(
    texts: Sequence[str], labels: NDArray[np.int64], *, groups: Sequence[str] | None, fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Choose a share of the texts of each label, bool (texts,).

    Blocks of texts (see ``blocks_of``) are visited in the order of a hash of seed and block. A block is taken as a
    whole if this brings the number of held-out texts per label closer to its share, and if every label keeps a text.
    If each block is one text, each label gets its share, rounded. The choice does not depend on the order of the rows,
    and most of it stays the same as the data grows.

    Args:
        texts: All texts.
        labels: A small number for each text, int64 (texts,).
        groups: Group of each text; None if texts have no groups.
        fraction: Share of each label, above 0 and below 0.5.
        seed: Seed of the order; another seed chooses other texts.
    """
    blocks = blocks_of(texts, groups)
    names = names_of(blocks, texts if groups is None else groups)
    return held_out_blocks(blocks, labels, names=names, fraction=fraction, seed=seed)


def held_out_blocks(
    blocks: NDArray[np.int64], labels: NDArray[np.int64], *, names: Sequence[str], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Choose a share of the examples of each label, whole blocks at a time, bool (examples,); see ``held_out``.

    Args:
        blocks: Number of each example's block, int64 (examples,), from 0 without gaps.
        labels: A small number for each example, int64 (examples,).
        names: Name of each block, by which its place in the order is decided.
        fraction: Share of each label, above 0 and below 0.5.
        seed: Seed of the order; another seed chooses other examples.
    """
    rank = np.argsort(np.array(hash_order(names, seed=seed), dtype=np.int64))
    counts = np.bincount(labels)
    missing, spare = (counts * fraction).tolist(), (counts - 1).tolist()
    chosen = np.zeros(len(blocks), dtype=np.bool_)
    block_of, label_of = blocks.tolist(), labels.tolist()
    wanting = sum(number >= 0.5 for number in missing)
    for _, same in groupby(np.argsort(rank[blocks], kind="stable").tolist(), key=block_of.__getitem__):
        if not wanting:
            break  # no block can bring a gain
        rows = list(same)
        num_texts = Counter(label_of[row] for row in rows)
        # Taking the block lowers the sum over labels of (missing texts)² / (texts of the label) by this.
        gain = sum(number * (2 * missing[label] - number) / counts[label] for label, number in num_texts.items())
        if gain >= 0 and all(number <= spare[label] for label, number in num_texts.items()):
            chosen[rows] = True
            for label, number in num_texts.items():
                wanting -= missing[label] >= 0.5 > missing[label] - number
                missing[label] -= number
                spare[label] -= number
    return chosen


def blocks_of(texts: Sequence[str], groups: Sequence[str] | None) -> NDArray[np.int64]:
    """Return the number of each text's block, int64 (texts,), from 0 without gaps.

    Texts with the same ``text_key`` share a block, and so do texts of the same group. Blocks are transitive: if A and B
    are near-equal, and B and C are in one group, all three share a block.
    """
    text_ids = _numbered(map(text_key, texts))
    return text_ids if groups is None else _connected(text_ids, [_numbered(groups) + text_ids.max(initial=-1) + 1])


def blocks_of_pairs(sides: Sequence[Sequence[str]], groups: Sequence[str] | None) -> NDArray[np.int64]:
    """Return the number of each pair's block, int64 (pairs,), from 0 without gaps.

    Pairs that share a near-equal text on any side are in one block, and so are pairs of one group. Blocks are
    transitive, as in ``blocks_of``.

    Args:
        sides: Texts of each side, of equal length.
        groups: Group of each pair; None if pairs have no groups.
    """
    num_pairs = len(sides[0])
    text_ids = _numbered(text_key(text) for side in sides for text in side).reshape(len(sides), num_pairs)
    others = list(text_ids[1:])
    if groups is not None:
        others.append(_numbered(groups) + text_ids.max(initial=-1) + 1)
    return _connected(text_ids[0], others)


def _connected(first: NDArray[np.int64], others: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Number the components of a graph that joins each example's nodes, by their first occurrence."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = max(int(ids.max(initial=-1)) for ids in (first, *others)) + 1
    start, end = np.concatenate([first] * len(others)), np.concatenate(others)
    graph = coo_array((np.ones(len(start), dtype=np.int8), (start, end)), shape=(size, size))
    return _numbered(connected_components(graph, directed=False)[1][first].tolist())


def text_key(text: str) -> bytes:
    """Return a key that is equal for near-equal texts, which have the same letters, marks and digits in order.

    Case, white space, punctuation, symbols and the Unicode form (NFKC) are ignored. For a text of symbols only, the
    key is the text without surrounding white space.
    """
    if text.isascii():  # an equal result, five times as fast
        return text.lower().encode().translate(None, _ASCII_SYMBOLS) or text.strip().encode()
    text = unicodedata.normalize("NFKC", text)
    return (text.casefold().translate(_LETTERS_AND_DIGITS) or text.strip()).encode()


def label_key(label: str) -> str:
    """Return a key that is equal for labels that look alike, and empty for an invisible label.

    Case, white space, invisible characters and the Unicode form (NFKC) are ignored. Punctuation is not: ``C`` and
    ``C++`` differ.
    """
    folded = unicodedata.normalize("NFKC", label).casefold()
    return " ".join("".join(sign for sign in folded if unicodedata.category(sign) != "Cf").split())


class _LettersAndDigits(dict[int, int | None]):
    """A table for ``str.translate`` that keeps letters, marks and digits only. It is filled on demand."""

    def __missing__(self, sign: int) -> int | None:
        self[sign] = sign if unicodedata.category(chr(sign))[0] in "LMN" else None
        return self[sign]


_LETTERS_AND_DIGITS = _LettersAndDigits()
_ASCII_SYMBOLS = bytes(sign for sign in range(128) if not chr(sign).isalnum())


def _numbered(values: Iterable[object]) -> NDArray[np.int64]:
    """Number the values by their first occurrence, from 0."""
    number: dict[object, int] = {}
    return np.array([number.setdefault(value, len(number)) for value in values], dtype=np.int64)


def names_of(blocks: NDArray[np.int64], names: Sequence[str]) -> list[str]:
    """Return the smallest name in each block. Hashing one name per block favours neither large nor small blocks."""
    smallest: list[str | None] = [None] * (int(blocks.max(initial=-1)) + 1)
    for block, name in zip(blocks.tolist(), names, strict=True):
        current = smallest[block]
        if current is None or name < current:
            smallest[block] = name
    return [name for name in smallest if name is not None]


def overlap(train_texts: Sequence[str], test_texts: Sequence[str]) -> NDArray[np.bool_]:
    """Return which test texts also occur in train, character for character; bool (test texts,)."""
    known = set(train_texts)
    return np.fromiter((text in known for text in test_texts), dtype=np.bool_, count=len(test_texts))


@dataclass(frozen=True)
class Split:
    """The texts of one split, with their labels."""

    texts: list[str]
    labels: NDArray[np.int64]
    """Number of each text's label, int64 (texts,)."""
    groups: list[str] | None = None
    """Group of each text; None if the data set has no groups."""

    def take(self, chosen: NDArray[np.bool_]) -> Split:
        """Return the texts for which the mask is true, without their groups."""
        return Split(
            [text for text, is_chosen in zip(self.texts, chosen, strict=True) if is_chosen], self.labels[chosen]
        )
