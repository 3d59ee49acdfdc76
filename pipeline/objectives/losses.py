"""Losses on text vectors. Each is a function of float32 tensors that never waits for the GPU, so it can be recorded.

Vectors need not be normalised: every similarity is a cosine. A loss is a scalar, finite even if a batch has nothing to
compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

MARGIN = 0.2
"""Least difference between the distances of a negative and of the positive in ``triplet``."""

_NOTHING = float("-inf")


def over_widths(loss: Callable[[Tensor], Tensor], vectors: Tensor, *, widths: Sequence[int]) -> Tensor:
    """Mean of a loss over several widths of the same vectors.

    The leading dimensions are normalised anew at every width, because each loss takes cosines.
    Source: Kusupati et al. 2022, arXiv:2205.13147 (Matryoshka representation learning).

    Args:
        loss: Function from vectors of any width to a scalar.
        vectors: float32 (texts, width).
        widths: Numbers of leading dimensions. The whole width is always included, and counts once.
    """
    whole = vectors.shape[1]
    every = sorted({*widths, whole}, reverse=True)
    assert every[0] == whole, "a width is larger than the vectors"
    return torch.stack([loss(vectors[:, :width]) for width in every]).mean()


def cosent(first: Tensor, second: Tensor, scores: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Penalty for cosines that are not in the order of their scores.

    It is ``log(1 + Σ exp((low - high) / temperature))``, where ``low`` and ``high`` are the cosines of two examples
    with a lower and a higher score, and the sum is over all such examples. Equal scores are not compared.
    Source: Huang et al. 2024, doi:10.1109/TASLP.2024.3402087.

    Args:
        first: One side of each example, (examples, width).
        second: The other side, (examples, width).
        scores: Similarity of the sides, float32 (examples,). Only its order counts.
        temperature: Divisor of the cosines.
    """
    cosines = nn.functional.cosine_similarity(first, second) / temperature
    excess = cosines[:, None] - cosines[None, :]
    excess = excess.masked_fill(scores[:, None] >= scores[None, :], _NOTHING)
    return torch.cat([excess.new_zeros(1), excess.flatten()]).logsumexp(dim=0)


def cosine_mse(first: Tensor, second: Tensor, scores: Tensor) -> Tensor:
    """Mean squared difference between the cosine of the sides and the score of each example.

    Args:
        first: One side of each example, (examples, width).
        second: The other side, (examples, width).
        scores: Cosine that is wanted, float32 (examples,).
    """
    return (nn.functional.cosine_similarity(first, second) - scores).square().mean()


def infonce(queries: Tensor, passages: Tensor, allowed: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Cross-entropy of finding each query's passage, and each passage's query, among the negatives of the batch.

    It is the mean of both directions. Given negatives take part in the first only, because they have no query.
    Source: van den Oord et al. 2018, arXiv:1807.03748.

    Args:
        queries: (queries, width).
        passages: The passage of each query in the same order, then given negatives, (passages, width).
        allowed: Mask of the pairs that may count as negatives, bool (queries, passages).
        temperature: Divisor of the cosines.
    """
    similarities = _cosines(queries, passages) / temperature
    num_queries = len(queries)
    own = similarities.diagonal()
    candidates = torch.where(allowed | _diagonal(similarities), similarities, _NOTHING)
    backward = candidates[:, :num_queries].logsumexp(dim=0)
    return ((candidates.logsumexp(dim=1) + backward) / 2 - own).mean()


def triplet(queries: Tensor, passages: Tensor, allowed: Tensor, *, margin: float = MARGIN) -> Tensor:
    """Triplet loss with the hardest negative: mean of ``max(0, d(query, passage) - d(query, negative) + margin)``.

    The distance ``d`` is one minus the cosine. A query without an allowed negative adds 0.
    Source: Hermans et al. 2017, arXiv:1703.07737 (batch hard).

    Args:
        queries: (queries, width).
        passages: The passage of each query in the same order, then given negatives, (passages, width).
        allowed: Mask of the pairs that may count as negatives, bool (queries, passages).
        margin: Least difference of the distances.
    """
    similarities = _cosines(queries, passages)
    nearest = similarities.masked_fill(~allowed | _diagonal(similarities), _NOTHING).amax(dim=1)
    return (nearest - similarities.diagonal() + margin).relu().mean()


def supervised_infonce(vectors: Tensor, labels: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Cross-entropy of finding each text of an anchor's label among the texts of other labels.

    It is the mean over the other texts of the label, then over the anchors. Texts of the anchor's label are never
    negatives. An anchor that is alone with its label does not count.
    Source: Khosla et al. 2020, arXiv:2004.11362, whose denominator also has the other texts of the label.

    Args:
        vectors: (texts, width).
        labels: int64 (texts,).
        temperature: Divisor of the cosines.
    """
    similarities = _cosines(vectors, vectors) / temperature
    same = labels[:, None] == labels[None, :]
    positive = same & ~_diagonal(similarities)
    negatives = similarities.masked_fill(same, _NOTHING).logsumexp(dim=1)
    losses = nn.functional.softplus(negatives[:, None] - similarities) * positive
    count = positive.sum(dim=1)
    return (losses.sum(dim=1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def relational_distance(vectors: Tensor, frozen_vectors: Tensor) -> Tensor:
    """Mean squared difference between the cosines of all texts in two spaces.

    Source: the distillation term of jina-embeddings-v5, arXiv:2602.15547.

    Args:
        vectors: Vectors of the adapted encoder, (texts, width).
        frozen_vectors: Vectors of the frozen encoder for the same texts, (texts, any width).
    """
    return (_cosines(vectors, vectors) - _cosines(frozen_vectors, frozen_vectors)).square().mean()


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    return nn.functional.normalize(first, dim=1) @ nn.functional.normalize(second, dim=1).t()


def _diagonal(matrix: Tensor) -> Tensor:
    """Mask of the diagonal of a matrix that may be wider than high."""
    return torch.eye(*matrix.shape, dtype=torch.bool, device=matrix.device)
