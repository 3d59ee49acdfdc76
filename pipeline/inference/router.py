"""Adapters for people: texts in a list, labels or vectors out, for several adapters over one encoder. Thin over the bulk kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.encoder.encoder import FloatArray
from pipeline.encoder.tokeniser import IntArray
from pipeline.errors import AdapterError, DataError, InputError
from pipeline.inference.classifier import load_classifier
from pipeline.inference.engine import Answers
from pipeline.inference.reference import find_adapters
from pipeline.machine import local_cpus


class Scored(NamedTuple):
    """A label and how sure the adapter is of it."""

    label: str
    score: float
    """Calibrated probability, 0..1."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What an adapter says of one text: nothing if the text is empty or blank, or if the adapter overflows on it."""

    label: str | None
    """The most probable one; None where there is nothing to say."""
    score: float | None
    """Its calibrated probability, 0..1; None where the label is."""
    top: tuple[Scored, ...]
    """The ``top_k`` most probable labels, best first; none where the label is None."""


@dataclass(frozen=True)
class LoadedAdapter:
    """One adapter of a router, ready for texts."""

    router: Router
    name: str
    """The MTEB task's, or NAME of ``NAME=REF``."""
    label_names: tuple[str, ...]

    def predict(self, texts: Iterable[str], *, top_k: int = 1) -> list[Prediction]:
        """See ``Router.predict``."""
        return self.router.predict(texts, self.name, top_k=top_k)

    def embed(self, texts: Iterable[str]) -> FloatArray:
        """See ``Router.embed``."""
        return self.router.embed(texts, self.name)


def load_adapter(
    ref: str | Path,
    *,
    encoder: str | None = None,
    precision: Literal["auto", "float32"] = "auto",
    offline: bool = False,
    threads: int | None = None,
    use_gpu: bool = True,
) -> LoadedAdapter:
    """Load one adapter with its encoder; the arguments are those of ``Router``, and so are the errors."""
    router = Router([ref], encoder=encoder, precision=precision, offline=offline, threads=threads, use_gpu=use_gpu)
    return router[router.names[0]]


class Router:
    """Several adapters over one encoder, which is loaded once; each call, or each text, says which adapter it is for.

    Several threads may call it at once. Loading sets PyTorch's number of threads and how glibc keeps freed memory for the whole process,
    as a worker of the bulk job does.
    """

    def __init__(
        self,
        refs: Sequence[str | Path],
        *,
        encoder: str | None = None,
        precision: Literal["auto", "float32"] = "auto",
        offline: bool = False,
        threads: int | None = None,
        use_gpu: bool = True,
    ) -> None:
        """Load the adapters and the encoder that they were trained on.

        Args:
            refs: ``[NAME=]REF`` each, where REF is an adapter's folder, ``FOLDER#TASK`` or ``hf:OWNER/NAME[@REVISION]#TASK``.
            encoder: Where the encoder lies, if not under the name that the adapters give: a folder, ``package:NAME`` or a Hub id.
            precision: ``auto`` computes in bfloat16 where the hardware multiplies it natively, and asks float32 where that leaves two
                labels close; vectors are then bfloat16's. ``float32`` computes everything in float32.
            offline: Never ask the Hub.
            threads: Of PyTorch; None takes every core that this process may use.
            use_gpu: Where there is one.
        Raises:
            AdapterError: not found, damaged, two of one name, or not all trained on the encoder that is there.
            EncoderError: the encoder cannot be found.
            InputError: an option that is none.
        """
        if isinstance(refs, str | Path) or not refs:
            raise AdapterError(f"a router needs a list of adapters, found {refs!r}; load_adapter loads a single one")
        if threads is not None and threads < 1:
            raise InputError(f"threads: expected at least 1, found {threads}")
        if precision not in ("auto", "float32"):
            raise InputError(f"precision: expected auto or float32, found {precision!r}")
        adapters = find_adapters([str(ref) for ref in refs], offline=offline)
        self._classifier = load_classifier(
            adapters,
            encoder=encoder,
            threads=threads or local_cpus(),
            use_gpu=use_gpu,
            offline=offline,
            precision=precision,
        )
        self._adapters = adapters
        self._index_of = {found.name: index for index, found in enumerate(adapters)}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters, in the order they were given."""
        return tuple(self._index_of)

    def __iter__(self) -> Iterator[str]:
        """The names, as a dict has them."""
        return iter(self._index_of)

    def __getitem__(self, name: str) -> LoadedAdapter:
        """One of the adapters.

        Raises: AdapterError: there is none of this name.
        """
        return LoadedAdapter(self, name, self._adapters[self._index(name)].label_names)

    def predict(self, texts: Iterable[str], adapter: str | Sequence[str], *, top_k: int = 1) -> list[Prediction]:
        """Labels and probabilities, in the order of the texts; ``pandas.DataFrame`` makes a table of them.

        Args:
            texts: Strings of any length; each is cut at the length the adapters were trained with.
            adapter: Name of the adapter, or one name per text.
            top_k: Labels per text; all of them where the adapter has fewer.
        Raises:
            AdapterError: there is no adapter of such a name, or it has no head.
            DataError: a text is no string, or there are not as many names as texts.
            InputError: ``top_k`` is less than 1.
        """
        if top_k < 1:
            raise InputError(f"top_k: expected at least 1, found {top_k}")
        texts = _checked(texts)
        groups = self._groups(adapter, len(texts))
        for index in groups:
            self._adapters[index].check_has_head()
        tokens = self._classifier.tokenise(texts)
        not_blank = np.array([bool(text.strip()) for text in texts], dtype=np.bool_)
        predictions = [_NOTHING] * len(texts)
        for index, asked in groups.items():
            rows, names = asked[not_blank[asked]], self._adapters[index].label_names
            answers = self._classifier.classify_with(index, tokens, rows, top_k=top_k)
            kept, answers = (
                rows[answers.finite],
                Answers(answers.top_labels[answers.finite], answers.top_scores[answers.finite]),
            )
            for row, labels, scores in zip(
                kept.tolist(), answers.top_labels.tolist(), answers.top_scores.tolist(), strict=True
            ):
                top = tuple(Scored(names[label], score) for label, score in zip(labels, scores, strict=True))
                predictions[row] = Prediction(*top[0], top)
        return predictions

    def embed(self, texts: Iterable[str], adapter: str | Sequence[str]) -> FloatArray:
        """Vectors of the adapted encoder, float32 (texts, width), in the order of the texts.

        They are what sentence-transformers gives for the merged encoder: of length 1 where the encoder's own ``modules.json`` ends in
        ``Normalize`` (all-MiniLM-L6-v2's does), else as the pooling leaves them. An empty text has the vector of its special tokens.
        Arguments and errors are those of ``predict``.
        """
        texts = _checked(texts)
        groups = self._groups(adapter, len(texts))
        tokens = self._classifier.tokenise(texts)
        vectors = np.empty((len(texts), self._classifier.encoder.hidden_size), dtype=np.float32)
        for index, rows in groups.items():
            vectors[rows] = self._classifier.embed_with(index, tokens, rows)
        return vectors

    def _groups(self, adapter: str | Sequence[str], num_texts: int) -> dict[int, IntArray]:
        """Number of each adapter that is asked, and the rows of the texts that it is asked about."""
        if isinstance(adapter, str):
            return {self._index(adapter): np.arange(num_texts)}
        indices = np.array([self._index(name) for name in adapter], dtype=np.int64)
        if len(indices) != num_texts:
            raise DataError(
                f"{len(indices)} names of adapters for {num_texts} texts; expected one name, or one per text"
            )
        return {index: np.flatnonzero(indices == index) for index in np.unique(indices).tolist()}

    def _index(self, name: str) -> int:
        if name not in self._index_of:
            raise AdapterError(f"no adapter is called {name!r}; there is {', '.join(self._index_of)}")
        return self._index_of[name]


_NOTHING = Prediction(None, None, ())


def _checked(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise DataError(f"expected a list of texts, found {_kind(texts)}; a single text goes in a list, too")
    checked = list(texts)
    for position, text in enumerate(checked):
        if not isinstance(text, str):
            raise DataError(f"text {position}: expected a string, found {_kind(text)}")
        if not _encodable(text):
            raise DataError(
                f"text {position}: holds half of a surrogate pair, which is no character; decode it again, or leave it out"
            )
    return checked


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
