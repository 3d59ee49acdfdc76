"""Tokenisation of texts with a limit. If a tokenizer splits words independently, each distinct word is split once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

IntArray = npt.NDArray[np.int64]

_AT_ONCE = 4096  # texts
_CHARACTERS_PER_TOKEN = 32  # of longer texts, the beginning is tried first
_FAR_BEHIND = 512  # characters; longer than any word that WordPiece splits
_LONGEST_WORD = 64  # characters; longer words are links or scripts without spaces, which rarely repeat
_MOST_WORDS = 250_000  # about 50 MB
_WORDS_PER_LINE = 128
_TOO_LONG = 0


@dataclass(frozen=True)
class Tokens:
    """Token ids of texts in one flat array. Text ``i`` is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: npt.NDArray[np.int32]
    offsets: IntArray
    truncated: npt.NDArray[np.bool_]
    """Whether each text was cut at ``max_tokens``, (texts,)."""

    @property
    def lengths(self) -> IntArray:
        """Tokens per text, (texts,)."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1


class Tokeniser:
    """A fast tokenizer with special tokens and a limit. The ids always equal those of the tokenizer itself."""

    def __init__(self, tokenizer: Any, *, max_tokens: int) -> None:
        """Find out whether the tokenizer splits words independently.

        Args:
            tokenizer: A fast tokenizer of transformers. Every call sets its padding and truncation.
            max_tokens: Limit per text, special tokens included.
        """
        self._backend = tokenizer.backend_tokenizer
        self._max_tokens = max_tokens
        self._nothing = [int(tokenizer.pad_token_id or 0)]
        self._busy = threading.Lock()
        around = _special_tokens_around(self._backend) if _takes_words_one_by_one(self._backend) else None
        self._words: _Words | None = None
        if around is not None and len(around[0]) + len(around[1]) < max_tokens:
            self._before, self._after = around
            self._words = _Words()

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Token ids of all texts. A text without any token gets one padding token, so that it has a vector."""
        with self._busy:
            self._backend.no_padding()
            tokenise = self._whole if self._words is None else self._by_words
            return _joined([tokenise(texts[start : start + _AT_ONCE]) for start in range(0, len(texts), _AT_ONCE)])

    def _whole(self, texts: Sequence[str]) -> Tokens:
        """Tokenise whole texts with the tokenizer."""
        self._backend.enable_truncation(max_length=self._max_tokens)
        encodings = self._backend.encode_batch_fast([self._beginning(text) for text in texts])
        ids = [np.array(encoding.ids or self._nothing, dtype=np.int32) for encoding in encodings]
        truncated = [len(encoding.ids) == self._max_tokens and bool(encoding.overflowing) for encoding in encodings]
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        return Tokens(np.concatenate(ids), offsets, np.array(truncated, dtype=np.bool_))

    def _beginning(self, text: str) -> str:
        """The part of a text that its first tokens can depend on, so that a book costs no more than its first page."""
        length = max(_CHARACTERS_PER_TOKEN * self._max_tokens, 4 * _FAR_BEHIND)
        while len(text) > length:
            encoding = self._backend.encode(text[:length])
            # The cut changes only the word that it splits. If that word began long before, it is unknown either way.
            if encoding.overflowing and max(end for _, end in encoding.offsets) < length - _FAR_BEHIND:
                return text[:length]
            length *= 4
        return text

    def _by_words(self, texts: Sequence[str]) -> Tokens:
        """Tokenise texts word by word, and put the special tokens around them."""
        assert self._words is not None
        room = self._max_tokens - len(self._before) - len(self._after)
        # A word has at least one token, so one word more than the room shows that the text is cut.
        beginnings = pa.array([text[: (room + 2) * (_LONGEST_WORD + 1)] for text in texts], pa.large_string())
        words = pc.list_slice(pc.split_pattern(beginnings, " ", max_splits=room + 1), 0, room + 1)
        first, count = words.offsets.to_numpy()[:-1], np.diff(words.offsets.to_numpy())
        distinct = words.flatten().dictionary_encode()
        matches = self._words.find(distinct.dictionary.to_pylist(), distinct.indices.to_numpy(), self._backend)
        number = np.add.reduceat(matches.lengths, first)
        body, size = np.minimum(number, room), len(self._before) + len(self._after)
        # Some words have no token: empty ones between two spaces, and control characters.
        others = np.flatnonzero(np.logical_or.reduceat(matches.too_long, first) | ((count > room) & (number <= room)))
        whole = self._whole([texts[row] for row in others.tolist()]) if len(others) else None
        lengths = body + size
        if whole is not None:
            body[others], lengths[others] = 0, whole.lengths
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.empty(offsets[-1], dtype=np.int32)
        for position, token in enumerate(self._before):
            ids[offsets[:-1] + position] = token
        for position, token in enumerate(reversed(self._after), start=1):
            ids[offsets[1:] - position] = token
        ids[_ranges(offsets[:-1] + len(self._before), body)] = matches.ids[_ranges(_starts(number), body)]
        truncated = number > room
        if whole is not None:
            ids[_ranges(offsets[others], whole.lengths)], truncated[others] = whole.ids, whole.truncated
        return Tokens(ids, offsets, truncated)


@dataclass(frozen=True)
class _FoundWords:
    """Concatenated tokens of some words."""

    ids: npt.NDArray[np.int32]
    lengths: IntArray
    """Tokens per word. 0 for words that are too long."""
    too_long: npt.NDArray[np.bool_]


class _Words(dict[str, int]):
    """Numbers of the words met so far. Their tokens are stored by number."""

    def __init__(self) -> None:
        super().__init__()
        self._new: list[str] = []
        self._forget()

    def _forget(self) -> None:
        self.clear()
        self._ids = np.empty(0, dtype=np.int32)
        self._lengths = np.zeros(_TOO_LONG + 1, dtype=np.int64)

    def __missing__(self, word: str) -> int:
        if len(word) > _LONGEST_WORD:
            return _TOO_LONG
        self._new.append(word)
        number = self[word] = _TOO_LONG + len(self) + 1
        return number

    def find(self, words: Sequence[str], which: IntArray, backend: Any) -> _FoundWords:
        """Tokens of ``words[which[0]]``, ``words[which[1]]``, …. New words are split and stored."""
        if len(self) > _MOST_WORDS:
            self._forget()
        numbers = np.fromiter(map(self.__getitem__, words), np.int64, len(words))[which]
        if self._new:
            ids, lengths = _tokens_of_words(self._new, backend)
            self._ids, self._lengths = np.concatenate([self._ids, ids]), np.concatenate([self._lengths, lengths])
            self._new = []
        lengths = self._lengths[numbers]
        return _FoundWords(self._ids[_ranges(_starts(self._lengths)[numbers], lengths)], lengths, numbers == _TOO_LONG)


def _tokens_of_words(words: Sequence[str], backend: Any) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Concatenated token ids of some words, and the number of each.

    Words are tokenised as lines of many words, because a text per word costs more."""
    backend.no_truncation()
    lines = [words[start : start + _WORDS_PER_LINE] for start in range(0, len(words), _WORDS_PER_LINE)]
    ids: list[int] = []
    lengths = []
    encodings = backend.encode_batch([" ".join(line) for line in lines], add_special_tokens=False)
    for line, encoding in zip(lines, encodings, strict=True):
        ids += encoding.ids
        behind = np.cumsum([len(word) + 1 for word in line])
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        lengths.append(np.bincount(np.searchsorted(behind, starts, side="right"), minlength=len(line)))
    return np.array(ids, dtype=np.int32), np.concatenate(lengths)


def _takes_words_one_by_one(backend: Any) -> bool:
    """Whether a word between two spaces gets the same tokens in every text, as in BERT's tokenizer.

    The normaliser works on single characters and the pre-tokenizer splits at every space, so no model sees beyond it.
    """
    from tokenizers import normalizers, pre_tokenizers

    normaliser, breaks = backend.normalizer, backend.pre_tokenizer
    if not (isinstance(normaliser, normalizers.BertNormalizer) and isinstance(breaks, pre_tokenizers.BertPreTokenizer)):
        return False
    return not any(
        " " in normaliser.normalize_str(token.content) for token in backend.get_added_tokens_decoder().values()
    )


def _special_tokens_around(backend: Any) -> tuple[list[int], list[int]] | None:
    """Special tokens before and after every text. None if the tokenizer adds none or does anything else."""
    backend.no_padding()
    backend.no_truncation()
    word, text = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    for start in range(len(text) - len(word) + 1):
        end = start + len(word)
        if text[start:end] == word and len(text) > len(word):
            return text[:start], text[end:]
    return None


def _joined(parts: Sequence[Tokens]) -> Tokens:
    if len(parts) == 1:
        return parts[0]
    lengths = [part.lengths for part in parts]
    return Tokens(
        np.concatenate([np.empty(0, dtype=np.int32), *(part.ids for part in parts)]),
        np.concatenate([[0], np.cumsum(np.concatenate([np.empty(0, dtype=np.int64), *lengths]))]),
        np.concatenate([np.empty(0, dtype=np.bool_), *(part.truncated for part in parts)]),
    )


def _starts(lengths: IntArray) -> IntArray:
    """Start of each of some consecutive ranges."""
    return np.cumsum(lengths) - lengths


def _ranges(starts: IntArray, lengths: IntArray) -> IntArray:
    """Concatenated ranges: ``lengths[i]`` numbers from ``starts[i]`` on."""
    return np.repeat(starts - _starts(lengths), lengths) + np.arange(lengths.sum())
