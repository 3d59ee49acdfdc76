"""Texts of a bulk job: read ahead, and labelled once if they repeat."""

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

from pipeline.bulk.vectors import TextVectors, VectorFormat
from pipeline.inference.engine import Answers, Outputs

NULL, EMPTY, NOT_UTF8 = -1, -2, -3
"""Ids of texts without an answer."""


class LabelledTexts:
    """The distinct texts of a unit, by their hashes, with the answers for each, so that no text is computed twice."""

    def __init__(self, num_adapters: int, formats: Sequence[VectorFormat] = ()) -> None:
        """Begin without texts.

        Args:
            num_adapters: Number of adapters.
            formats: Format of the vectors of each adapter. Empty if none are asked for.
        """
        self._ids: dict[bytes, int] = {}
        self.truncated: npt.NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        self.answers: list[Answers | None] = [None] * num_adapters
        self.vectors = [TextVectors(format) for format in formats]
        self.duplicates = 0

    def recognise(self, texts: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], list[str]]:
        """Return the id of each row's text, int64 (rows,), and the new texts in the order of their ids.

        An id below 0 is one of ``NULL``, ``EMPTY`` and ``NOT_UTF8``.
        """
        encoded = _as_bytes(texts).dictionary_encode()
        new: list[str] = []
        id_of = np.empty(len(encoded.dictionary) + 1, dtype=np.int64)
        id_of[-1] = NULL
        num_known = len(self._ids)
        for index, content in enumerate(encoded.dictionary.to_pylist()):
            try:
                text = content.decode()
            except UnicodeDecodeError:
                id_of[index] = NOT_UTF8
                continue
            if not text or text.isspace():
                id_of[index] = EMPTY
                continue
            digest = blake2b(content, digest_size=16).digest()
            id_of[index] = self._ids.setdefault(digest, len(self._ids))
            if id_of[index] >= num_known + len(new):
                new.append(text)
        ids = id_of[encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)]
        self.duplicates += int((ids >= 0).sum()) - len(new)
        return ids, new

    def learn(self, truncated: npt.NDArray[np.bool_], outputs: Sequence[Outputs]) -> None:
        """Add the results for the new texts of a block. Blocks must come in order."""
        self.truncated = np.concatenate([self.truncated, truncated])
        for index, output in enumerate(outputs):
            if output.answers is not None:
                previous = self.answers[index]
                self.answers[index] = output.answers if previous is None else _joined(previous, output.answers)
            if output.vectors is not None:
                self.vectors[index].learn(output.vectors)


NO_ANSWERS = Answers(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32))


def _as_bytes(texts: pa.ChunkedArray) -> pa.Array:
    """Return texts of any Arrow type as bytes, which may not be UTF-8."""
    array = texts.combine_chunks()
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.large_binary())


def read_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield the items, with the next one prepared in a thread: reading and tokenising overlap with computing."""
    queue: Queue[Any] = Queue(maxsize=1)
    stopped = threading.Event()
    end = object()

    def produce() -> None:
        try:
            for item in items:
                if stopped.is_set():
                    return
                queue.put(item)
            queue.put(end)
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer
            queue.put(error)

    producer = threading.Thread(target=produce, name="read-ahead", daemon=True)
    producer.start()
    try:
        while (item := queue.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        while producer.is_alive():
            with suppress(Empty):
                queue.get_nowait()  # the producer may be waiting for room
            producer.join(0.05)


def _joined(first: Answers, second: Answers) -> Answers:
    return Answers(
        np.concatenate([first.top_labels, second.top_labels]),
        np.concatenate([first.top_scores, second.top_scores]),
    )
