"""Python interface to trained adapters: labels or vectors of texts, from several adapters over one encoder."""

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
from pipeline.inference.reference import find_adapters
from pipeline.machine import local_cpus


class Scored(NamedTuple):
    """A label and its probability."""

    label: str
    score: float
    """Calibrated probability, 0..1."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Prediction for one text. Empty if the text is blank, or if the adapter overflows on it."""

    label: str | None
    """Most probable label. None for an empty prediction."""
    score: float | None
    """Calibrated probability of the label, 0..1. None for an empty prediction."""
    top: tuple[Scored, ...]
    """The ``top_k`` most probable labels, best first. Empty for an empty prediction."""


@dataclass(frozen=True)
class LoadedAdapter:
    """One adapter of a router, ready for texts."""

    router: Router
    name: str
    """Name of the MTEB task, or NAME of ``NAME=REF``."""
    label_names: tuple[str, ...]

    def predict(self, texts: Iterable[str], *, top_k: int = 1) -> list[Prediction]:
        """Predict labels of texts. See ``Router.predict``."""
        return self.router.predict(texts, self.name, top_k=top_k)

    def embed(self, texts: Iterable[str], *, width: int | None = None) -> FloatArray:
        """Compute vectors of texts. See ``Router.embed``."""
        return self.router.embed(texts, self.name, width=width)


def load_adapter(
    ref: str | Path,
    *,
    encoder: str | None = None,
    precision: Literal["auto", "float32"] = "auto",
    offline: bool = False,
    threads: int | None = None,
    use_gpu: bool = True,
) -> LoadedAdapter:
    """Load one adapter with its encoder. Arguments and errors are those of ``Router``."""
    router = Router([ref], encoder=encoder, precision=precision, offline=offline, threads=threads, use_gpu=use_gpu)
    return router[router.names[0]]


class Router:
    """Several adapters over one encoder, which is loaded once. Each call, or each text, names its adapter.

    Several threads may call a router at once. Loading sets PyTorch's number of threads and glibc's handling of freed
    memory for the whole process.
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
            refs: References ``[NAME=]REF``. REF is an adapter's folder, ``FOLDER#TASK`` or
                ``hf:OWNER/NAME[@REVISION]#TASK``. It may end with ``.query`` or ``.passage``, the side of the texts.
            encoder: Location of the encoder: a folder, ``package:NAME`` or a Hub id. None: the name in the adapters'
                files.
            precision: ``auto`` computes in bfloat16 if the hardware multiplies it natively, and decides close calls in
                float32. Vectors are then computed in bfloat16. ``float32`` computes everything in float32.
            offline: Send no request to the Hub.
            threads: Number of PyTorch threads. None: every core that this process may use.
            use_gpu: Use a GPU if there is one.
        Raises:
            AdapterError: not found, damaged, two with the same name, or not all trained on the encoder.
            EncoderError: the encoder cannot be found.
            InputError: an argument is invalid.
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
        """Names of the adapters, in the order of the references."""
        return tuple(self._index_of)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, as in a dict."""
        return iter(self._index_of)

    def __getitem__(self, name: str) -> LoadedAdapter:
        """The adapter of a name.

        Raises: AdapterError: the name is unknown.
        """
        return LoadedAdapter(self, name, self._adapters[self._index(name)].label_names)

    def predict(self, texts: Iterable[str], adapter: str | Sequence[str], *, top_k: int = 1) -> list[Prediction]:
        """Predict labels and probabilities, in the order of the texts. ``pandas.DataFrame`` makes a table of them.

        Args:
            texts: Strings of any length. Each is cut at the length that the adapters were trained with.
            adapter: Name of the adapter, or one name per text.
            top_k: Labels per text. An adapter with fewer labels returns all of them.
        Raises:
            AdapterError: a name is unknown, or the adapter has no head.
            DataError: a text is not a string, or the numbers of names and texts differ.
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
        for index, group in groups.items():
            rows, names = group[not_blank[group]], self._adapters[index].label_names
            answers = self._classifier.classify_with(index, tokens, rows, top_k=top_k)
            is_finite = answers.finite
            columns = (array[is_finite].tolist() for array in (rows, answers.top_labels, answers.top_scores))
            for row, labels, scores in zip(*columns, strict=True):
                top = tuple(Scored(names[label], score) for label, score in zip(labels, scores, strict=True))
                predictions[row] = Prediction(*top[0], top)
        return predictions

    def embed(self, texts: Iterable[str], adapter: str | Sequence[str], *, width: int | None = None) -> FloatArray:
        """Compute vectors of the adapted encoder, with or without a head.

        They have the direction of those of sentence-transformers for the merged encoder, and length 1 whether or not
        the encoder's own definition normalises. An empty text has the vector of its special tokens. A text for which
        the adapter overflows has NaN. An adapter that was trained with prefixes puts that of its side before each text.

        Args:
            texts: Strings of any length. Each is cut at the length that the adapters were trained with.
            adapter: Name of the adapter, or one name per text.
            width: Number of leading dimensions to keep (Matryoshka). None: all.
        Returns: float32 (texts, width), in the order of the texts.

        Raises:
            AdapterError: a name is unknown, or each side has a prefix and the reference names no side.
            DataError: a text is not a string, or the numbers of names and texts differ.
            InputError: ``width`` is less than 1, or more than the encoder's.
        """
        widest = self._classifier.encoder.hidden_size
        if width is not None and not 1 <= width <= widest:
            raise InputError(f"width: expected 1 to {widest}, the encoder's, found {width}")
        texts = _checked(texts)
        groups = self._groups(adapter, len(texts))
        prefixes = {index: self._adapters[index].prefix for index in groups}
        tokens = {prefix: self._classifier.tokenise(texts, prefix=prefix) for prefix in set(prefixes.values())}
        vectors = np.empty((len(texts), width or widest), dtype=np.float32)
        for index, rows in groups.items():
            vectors[rows] = self._classifier.embed_with(index, tokens[prefixes[index]], rows, width=width or widest)
        return vectors

    def _groups(self, adapter: str | Sequence[str], num_texts: int) -> dict[int, IntArray]:
        """Rows of the texts of each adapter, by the adapter's number."""
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
            raise AdapterError(f"unknown adapter {name!r}; loaded adapters: {', '.join(self._index_of)}")
        return self._index_of[name]


_NOTHING = Prediction(None, None, ())


def _checked(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise DataError(f"expected a list of texts, found {_kind(texts)}; put a single text into a list")
    checked = list(texts)
    for position, text in enumerate(checked):
        if not isinstance(text, str):
            raise DataError(f"text {position}: expected a string, found {_kind(text)}")
        if not _encodable(text):
            raise DataError(
                f"text {position}: contains half of a surrogate pair, not a character; decode it again or omit it"
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
