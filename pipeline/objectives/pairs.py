"""Pairs of texts as token arrays, and the objective of text matching and retrieval."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.adapter.sided import Trainable
from pipeline.config import TrainConfig
from pipeline.data.families import check_batch_size
from pipeline.encoder.encoder import Encoder, FloatArray
from pipeline.encoder.tokeniser import IntArray, Tokens
from pipeline.errors import ConfigError, DataError
from pipeline.objectives.batches import arrays_sha256, chosen, epoch_batches, joined
from pipeline.objectives.embedding import EmbeddingObjective
from pipeline.objectives.losses import cosent, cosine_mse, infonce, triplet
from pipeline.objectives.ranking import ndcg_at, relevant_ranks
from pipeline.pairs.data import PairSplit
from pipeline.records import SIDES, Loss

_LOOKED_AT = 10  # passages
_LOSSES_OF_SCORES = ("cosent", "cosine")
_LOSSES_OF_POSITIVES = ("infonce", "triplet")


@dataclass(frozen=True)
class TokenPairs:
    """Tokenised pairs. Example ``i`` is text ``i`` of every column."""

    columns: tuple[Tokens, ...]
    """The two sides (query and passage), then given negatives."""
    text_ids: tuple[IntArray, ...]
    """Hash of the tokens of each text in each column, without a prefix, int64 (pairs,)."""
    scores: npt.NDArray[np.float32] | None
    """Similarity of each pair, 0..1, (pairs,). None if every pair is positive."""

    def __len__(self) -> int:
        return len(self.columns[0])

    def __add__(self, other: TokenPairs) -> TokenPairs:
        assert len(self.columns) == len(other.columns)
        assert (self.scores is None) == (other.scores is None)
        return TokenPairs(
            tuple(joined(column) for column in zip(self.columns, other.columns, strict=True)),
            tuple(np.concatenate(ids) for ids in zip(self.text_ids, other.text_ids, strict=True)),
            None if self.scores is None or other.scores is None else np.concatenate([self.scores, other.scores]),
        )

    @property
    def sha256(self) -> str:
        """SHA-256 of all tokens, numbers and scores."""
        tokens = [array for column in self.columns for array in (column.ids, column.offsets)]
        return arrays_sha256(*tokens, *self.text_ids, *(() if self.scores is None else (self.scores,)))


def tokenise_pairs(split: PairSplit, encoder: Encoder, *, prefixes: tuple[str, str] | None) -> TokenPairs:
    """Turn the texts of pairs into tokens.

    Args:
        split: The pairs, without prefixes.
        encoder: Encoder whose tokenizer is used.
        prefixes: Text to put before each text of the first column, and before each text of the other columns.
    """
    query_prefix, other_prefix = prefixes or ("", "")
    before = [query_prefix, *[other_prefix] * (len(split.columns) - 1)]
    plain = [encoder.tokenise(column) for column in split.columns]
    prefixed = [
        encoder.tokenise([prefix + text for text in column]) if prefix else tokens
        for prefix, column, tokens in zip(before, split.columns, plain, strict=True)
    ]
    return TokenPairs(
        tuple(prefixed),
        tuple(map(_text_ids, plain)),
        None if split.scores is None else split.scores.astype(np.float32),
    )


class PairObjective(EmbeddingObjective):
    """Objective of text matching and retrieval.

    It trains the cosine of a pair to follow its score, or a query to be closer to its passage than to negatives. The
    epoch is selected by Spearman's correlation if the scores are graded, by average precision if they are labels, and
    by nDCG@10 among the passages of the selection if every pair is positive.
    """

    examples = "pairs"

    def __init__(
        self,
        train: TokenPairs,
        selection: TokenPairs | None,
        *,
        family: Literal["text-matching", "retrieval"],
        loss: Loss,
        config: TrainConfig,
        has_sides: bool = False,
    ) -> None:
        """Find out which texts may not be negatives of each other.

        Args:
            train: Training pairs.
            selection: Pairs that select the epoch.
            family: Task family.
            loss: ``cosent`` or ``cosine`` for pairs with scores, ``infonce`` or ``triplet`` for positive pairs.
            config: Temperature, widths, distillation and texts per pass.
            has_sides: Whether queries and passages have an adapter each.
        Raises:
            ConfigError: the loss does not fit the data, or the batches are too small for it.
            DataError: the scores of the selection are all equal.
        """
        super().__init__(joined(train.columns), config=config, has_sides=has_sides)
        self._train, self._selection, self._family, self._loss = train, selection, family, loss
        _check_loss(loss, train)
        check_batch_size(family, loss, config.batch_size)
        self.selection_metric = _selection_metric(train, selection)
        self._belonging = _Belonging(train)

    @property
    def num_examples(self) -> int:
        """Number of training pairs."""
        return len(self._train)

    @property
    def has_selection(self) -> bool:
        """Whether there are pairs that select the epoch."""
        return self._selection is not None

    def conditions(self) -> dict[str, Any]:
        """Task family, loss, and hashes of the pairs."""
        return {
            "family": self._family,
            "loss": self._loss,
            "sides": self.has_sides,
            "training pairs": self._train.sha256,
            "selection pairs": None if self._selection is None else self._selection.sha256,
        }

    def batches(self, *, batch_size: int, order: np.random.Generator) -> Iterator[IntArray]:
        """Random batches of pairs whose texts are of similar length together."""
        lengths = np.sum([column.lengths for column in self._train.columns], axis=0)
        return epoch_batches(lengths, batch_size=batch_size, order=order)

    def texts_of(self, rows: IntArray) -> IntArray:
        """All texts of the first column, then of the second, and so on."""
        return np.concatenate([rows + number * len(self._train) for number in range(len(self._train.columns))])

    def targets(self, rows: IntArray) -> np.ndarray:
        """Scores, float32 (pairs,), or the mask of possible negatives, bool (pairs, passages)."""
        return self._belonging.allowed(rows) if self._train.scores is None else self._train.scores[rows]

    def vector_loss(self, vectors: Tensor, targets: Tensor, temperature: float | Tensor) -> Tensor:
        """Loss of the vectors of one batch."""
        first, others = vectors[: len(targets)], vectors[len(targets) :]
        match self._loss:
            case "cosent":
                return cosent(first, others, targets, temperature=temperature)
            case "cosine":
                return cosine_mse(first, others, targets)
            case "triplet":
                return triplet(first, others, targets)
            case _:
                return infonce(first, others, targets, temperature=temperature)

    def score(self, adapter: Trainable) -> float:
        """Value of the selection metric on the selection's pairs. Not a number if a vector is not finite."""
        assert self._selection is not None
        if self._selection.scores is None:
            return _search_score(adapter, self._selection)
        first, second = (
            adapter.embed(side, column) for side, column in zip(SIDES, self._selection.columns[:2], strict=True)
        )
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            return float("nan")
        return _agreement(_cosines(first, second), self._selection.scores, metric=self.selection_metric)

    def with_selection(self) -> PairObjective:
        """The same objective, trained on the selection's pairs as well."""
        assert self._selection is not None
        return PairObjective(
            self._train + self._selection,
            None,
            family=self._family,
            loss=self._loss,
            config=self._config,
            has_sides=self.has_sides,
        )


class _Belonging:
    """Relation of the texts that belong together: equal texts, and the sides of a positive pair in either order."""

    def __init__(self, pairs: TokenPairs) -> None:
        from scipy.sparse import csr_array, eye_array

        distinct, numbers = np.unique(np.concatenate(pairs.text_ids), return_inverse=True)
        self._numbers = numbers.reshape(len(pairs.columns), len(pairs))
        first, second = self._numbers[:2]
        shape = len(distinct), len(distinct)
        positive = csr_array((np.ones(len(pairs), dtype=np.int8), (first, second)), shape=shape)
        self._matrix = ((positive + positive.T + eye_array(len(distinct), dtype=np.int8)) != 0).tocsr()

    def allowed(self, rows: IntArray) -> npt.NDArray[np.bool_]:
        """Mask of the passages of some examples that may be negatives of their queries, bool (pairs, passages)."""
        queries, passages = self._numbers[0, rows], self._numbers[1:, rows].ravel()
        mask: npt.NDArray[np.bool_] = ~self._matrix[queries][:, passages].toarray()
        return mask


def _check_loss(loss: Loss, train: TokenPairs) -> None:
    if train.scores is None:
        kind, fitting = "all pairs are positive", _LOSSES_OF_POSITIVES
    else:
        kind, fitting = "each pair has a score", _LOSSES_OF_SCORES
        assert len(train.columns) == 2, "given negatives have no score"
    if loss not in fitting:
        raise ConfigError(f"loss = {loss!r} does not fit data in which {kind}; set it to {' or '.join(fitting)}")


def _selection_metric(train: TokenPairs, selection: TokenPairs | None) -> str:
    if train.scores is None:
        return f"ndcg_at_{_LOOKED_AT}"
    if selection is not None:
        assert selection.scores is not None
        if len(np.unique(selection.scores)) < 2:
            raise DataError(
                f"the {len(selection)} validation pairs have one score, {selection.scores[0]:g}, so no epoch can be "
                "selected; give validation pairs of several scores"
            )
    every = [pairs.scores for pairs in (train, selection) if pairs is not None and pairs.scores is not None]
    return "average_precision" if np.isin(np.concatenate(every), (0, 1)).all() else "spearman"


def _agreement(cosines: FloatArray, scores: FloatArray, *, metric: str) -> float:
    from scipy.stats import spearmanr
    from sklearn.metrics import average_precision_score

    if metric == "spearman":
        return float(spearmanr(cosines, scores).statistic)
    return float(average_precision_score(scores, cosines))


def _search_score(adapter: Trainable, pairs: TokenPairs) -> float:
    """Mean nDCG of the distinct queries in the distinct passages, given negatives included."""
    _, query_rows, query_numbers = np.unique(pairs.text_ids[0], return_index=True, return_inverse=True)
    passage_ids = np.concatenate(pairs.text_ids[1:])
    _, passage_rows, passage_numbers = np.unique(passage_ids, return_index=True, return_inverse=True)
    queries = adapter.embed("query", chosen(pairs.columns[0], query_rows))
    passages = adapter.embed("passage", chosen(joined(pairs.columns[1:]), passage_rows))
    if not (np.isfinite(queries).all() and np.isfinite(passages).all()):
        return float("nan")
    relevant = np.unique(np.stack([query_numbers, passage_numbers[: len(pairs)]]), axis=1)
    ranks = relevant_ranks(queries, passages, query_numbers=relevant[0], passage_numbers=relevant[1])
    return float(ndcg_at(_LOOKED_AT, query_numbers=relevant[0], ranks=ranks).mean())


def _cosines(first: FloatArray, second: FloatArray) -> FloatArray:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return ((first * second).sum(axis=1) / np.maximum(lengths, 1e-12)).astype(np.float32)


def _text_ids(tokens: Tokens) -> IntArray:
    """First 64 bits of a hash of the tokens of each text. To the encoder, texts of equal tokens are one text."""
    ids = np.ascontiguousarray(tokens.ids, dtype=np.int64)
    ends = zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True)
    digests = (hashlib.blake2b(ids[start:end].tobytes(), digest_size=8).digest() for start, end in ends)
    return np.frombuffer(b"".join(digests), dtype=np.int64)
