"""Texts of a bulk job: read ahead, and labelled once where they repeat."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from queue import Empty, Queue
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.inference.engine import Answers

NULL, EMPTY, NOT_UTF8 = -1, -2, -3


class LabelledTexts:
    """The unit's distinct texts, by a hash of theirs, and what is known of each: a text is computed once."""

    def __init__(self, num_adapters: int) -> None:
        self._ids: dict[bytes, int] = {}
        self.truncated: npt.NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        self.answers: list[Answers | None] = [None] * num_adapters
        self.duplicates = 0

    def recognise(self, texts: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], list[str]]:
        """The id of each row's text, and the texts that are new, in the order of their ids."""
        encoded = _as_bytes(texts).dictionary_encode()
        new: list[str] = []
        known = np.empty(len(encoded.dictionary) + 1, dtype=np.int64)
        known[-1] = NULL
        before = len(self._ids)
        for index, content in enumerate(encoded.dictionary.to_pylist()):
            try:
                text = content.decode()
            except UnicodeDecodeError:
                known[index] = NOT_UTF8
                continue
            if not text or text.isspace():
                known[index] = EMPTY
                continue
            digest = blake2b(content, digest_size=16).digest()
            known[index] = self._ids.setdefault(digest, len(self._ids))
            if known[index] >= before + len(new):
                new.append(text)
        ids = known[encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)]
        self.duplicates += int((ids >= 0).sum()) - len(new)
        return ids, new

    def learn(self, truncated: npt.NDArray[np.bool_], answers: Sequence[Answers]) -> None:
        """Add what was computed for the new texts of a block; blocks come in order."""
        self.truncated = np.concatenate([self.truncated, truncated])
        for index, answer in enumerate(answers):
            known = self.answers[index]
            self.answers[index] = answer if known is None else _joined(known, answer)


NO_ANSWERS = Answers(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32))


def _as_bytes(texts: pa.ChunkedArray) -> pa.Array:
    """Texts of any type as the bytes that they are; what is not UTF-8 is found when they are decoded."""
    array = texts.combine_chunks()
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.large_binary())


def read_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, the next one already in the making: reading and tokenising overlap with computing."""
    queue: Queue[Any] = Queue(maxsize=1)
    stopped = threading.Event()
    end = object()

    def make() -> None:
        try:
            for item in items:
                if stopped.is_set():
                    return
                queue.put(item)
            queue.put(end)
        except BaseException as error:  # noqa: BLE001 - raised again by the one who waits
            queue.put(error)

    maker = threading.Thread(target=make, name="read-ahead", daemon=True)
    maker.start()
    try:
        while (item := queue.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        while maker.is_alive():
            with suppress(Empty):
                queue.get_nowait()  # it may wait for room
            maker.join(0.05)


def _joined(known: Answers, more: Answers) -> Answers:
    return Answers(
        np.concatenate([known.top_labels, more.top_labels]), np.concatenate([known.top_scores, more.top_scores])
    )
