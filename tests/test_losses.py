"""Losses on vectors: equal to sentence-transformers' own where it has them, and lawful where it has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.objectives.losses import (
    cosent,
    cosine_mse,
    infonce,
    over_widths,
    relational_distance,
    supervised_infonce,
    triplet,
)
from pipeline.objectives.ranking import ndcg_at, relevant_ranks

WIDTH = 16
TEMPERATURE = 0.05
SCORES = torch.tensor([0.0, 0.2, 0.2, 1.0, 0.6, 0.8, 0.4, 0.6])
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 3])


def vectors(count: int, *, seed: int = 0) -> Tensor:
    """Vectors of any length, with a gradient."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)).mul_(3).requires_grad_()


def every_other_passage(queries: int, passages: int) -> Tensor:
    return ~torch.eye(queries, passages, dtype=torch.bool)


def library_loss(name: str, *embeddings: Tensor, scores: Tensor | None = None, **options: Any) -> Tensor:
    from sentence_transformers.sentence_transformer import losses

    loss: Tensor = getattr(losses, name)(None, **options).compute_loss_from_embeddings(list(embeddings), scores)
    return loss


def both_gradients(ours: Tensor, theirs: Tensor, of: list[Tensor]) -> tuple[Tensor, Tensor]:
    flat = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, of)]) for loss in (ours, theirs)]
    return flat[0], flat[1]


def check_equal(ours: Tensor, theirs: Tensor, of: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*both_gradients(ours, theirs, of), rtol=1e-4, atol=1e-6)


# The values of sentence-transformers


def test_cosent_is_that_of_sentence_transformers() -> None:
    sides = [vectors(8), vectors(8, seed=1)]
    check_equal(
        cosent(*sides, SCORES, temperature=TEMPERATURE),
        library_loss("CoSENTLoss", *sides, scores=SCORES, scale=1 / TEMPERATURE),
        sides,
    )


def test_cosine_mse_is_that_of_sentence_transformers() -> None:
    sides = [vectors(8), vectors(8, seed=1)]
    check_equal(cosine_mse(*sides, SCORES), library_loss("CosineSimilarityLoss", *sides, scores=SCORES), sides)


@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_infonce_is_the_bidirectional_loss_of_sentence_transformers(negatives: int) -> None:
    columns = [vectors(8, seed=seed) for seed in range(2 + negatives)]
    theirs = library_loss(
        "MultipleNegativesRankingLoss",
        *columns,
        scale=1 / TEMPERATURE,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    passages = torch.cat(columns[1:])
    ours = infonce(columns[0], passages, every_other_passage(8, len(passages)), temperature=TEMPERATURE)
    check_equal(ours, theirs, columns)


def test_triplet_with_the_given_negative_alone_is_that_of_sentence_transformers() -> None:
    from sentence_transformers.sentence_transformer.losses import TripletDistanceMetric

    columns = [vectors(8, seed=seed) for seed in range(3)]
    theirs = library_loss("TripletLoss", *columns, distance_metric=TripletDistanceMetric.COSINE, triplet_margin=0.3)
    own_negative = torch.cat([torch.zeros(8, 8, dtype=torch.bool), torch.eye(8, dtype=torch.bool)], dim=1)
    check_equal(triplet(columns[0], torch.cat(columns[1:]), own_negative, margin=0.3), theirs, columns)


# Masks


@pytest.mark.parametrize("loss", [infonce, triplet])
def test_a_passage_that_is_not_allowed_is_no_negative(loss: Callable[..., Tensor]) -> None:
    options = {"temperature": TEMPERATURE} if loss is infonce else {}
    queries, passages = vectors(4), vectors(6, seed=1)
    allowed = every_other_passage(4, 6)
    allowed[0, 2] = allowed[2, 0] = False
    allowed[:, 5] = False
    plain = loss(queries, passages, allowed, **options)
    moved = passages.detach().clone()
    moved[5] = queries[1]  # it would be the nearest
    torch.testing.assert_close(loss(queries, moved, allowed, **options), plain)
    allowed[1, 5] = True
    assert loss(queries, moved, allowed, **options) > plain + 0.1


def test_a_forbidden_pair_counts_in_neither_direction() -> None:
    unit = torch.eye(3, WIDTH)
    queries, passages = unit, unit[[0, 0, 2]]  # the second passage is the first one's text
    allowed = every_other_passage(3, 3)
    allowed[0, 1] = allowed[1, 0] = False
    e = math.exp(1 / TEMPERATURE)
    to_passages = [math.log(e / (e + 1)), math.log(1 / (1 + 1)), math.log(e / (e + 2))]
    to_queries = [math.log(e / (e + 1)), math.log(1 / (1 + 1)), math.log(e / (e + 2))]
    expected = -(sum(to_passages) + sum(to_queries)) / 6
    assert float(infonce(queries, passages, allowed, temperature=TEMPERATURE)) == pytest.approx(expected, rel=1e-5)


def test_texts_of_the_anchors_label_are_never_negatives_and_one_alone_does_not_count() -> None:
    texts = vectors(8)
    units = torch.nn.functional.normalize(texts.detach()).numpy().astype(np.float64)
    labels, similarities = LABELS.numpy(), units @ units.T / TEMPERATURE
    anchors = []
    for anchor in range(8):
        others = [j for j in range(8) if labels[j] == labels[anchor] and j != anchor]
        negatives = np.exp(similarities[anchor][labels != labels[anchor]]).sum()
        each = [-math.log(math.exp(s) / (math.exp(s) + negatives)) for s in similarities[anchor][others]]
        if each:
            anchors.append(sum(each) / len(each))
    assert len(anchors) == 7, "the last text is alone with its label"
    found = supervised_infonce(texts, LABELS, temperature=TEMPERATURE)
    assert float(found.detach()) == pytest.approx(sum(anchors) / 7, rel=1e-5)


# Laws


def test_a_batch_without_a_partner_has_a_finite_loss_and_gradient() -> None:
    few, nothing = vectors(3), torch.zeros(3, 3, dtype=torch.bool)
    losses = {
        "one label": supervised_infonce(few, torch.zeros(3, dtype=torch.int64), temperature=TEMPERATURE),
        "no second text": supervised_infonce(few, torch.arange(3), temperature=TEMPERATURE),
        "no negative": infonce(few, vectors(3, seed=1), nothing, temperature=TEMPERATURE),
        "no triplet": triplet(few, vectors(3, seed=1), nothing),
        "equal scores": cosent(few, vectors(3, seed=1), torch.ones(3), temperature=TEMPERATURE),
        "one pair": infonce(few[:1], vectors(1, seed=1), nothing[:1, :1], temperature=TEMPERATURE),
    }
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, few, retain_graph=True)
        assert abs(float(loss.detach())) < 1e-6, name
        assert torch.isfinite(gradient).all(), name


def test_no_loss_depends_on_the_length_of_a_vector() -> None:
    first, second = vectors(8).detach(), vectors(8, seed=1).detach()
    lengths = torch.linspace(0.1, 30, 8)[:, None]
    allowed = every_other_passage(8, 8)
    for loss in (
        lambda a, b: cosent(a, b, SCORES, temperature=TEMPERATURE),
        lambda a, b: cosine_mse(a, b, SCORES),
        lambda a, b: infonce(a, b, allowed, temperature=TEMPERATURE),
        lambda a, b: triplet(a, b, allowed),
        lambda a, b: supervised_infonce(a, LABELS, temperature=TEMPERATURE),
        lambda a, b: relational_distance(a, b),
    ):
        torch.testing.assert_close(loss(first * lengths, second / lengths), loss(first, second), rtol=1e-4, atol=1e-5)


def test_the_distillation_term_is_zero_for_the_same_similarities_and_known_for_others() -> None:
    frozen = vectors(6).detach()
    rotation = torch.linalg.qr(vectors(WIDTH, seed=3).detach()).Q
    assert float(relational_distance(frozen @ rotation, frozen)) == pytest.approx(0, abs=1e-10)
    collapsed = torch.ones(2, WIDTH)
    assert float(relational_distance(collapsed, torch.eye(2, WIDTH))) == pytest.approx(0.5)


def test_every_width_counts_once_and_is_normalised_anew() -> None:
    first, second = vectors(8).detach(), vectors(8, seed=1).detach()
    both = torch.cat([first, second])

    def loss(narrow: Tensor) -> Tensor:
        return cosine_mse(narrow[:8], narrow[8:], SCORES)

    by_hand = [
        (torch.cosine_similarity(first[:, :width], second[:, :width]) - SCORES).square().mean() for width in (16, 4, 2)
    ]
    torch.testing.assert_close(over_widths(loss, both, widths=(4, 2)), sum(by_hand, torch.zeros(())) / 3)
    torch.testing.assert_close(over_widths(loss, both, widths=(4, 16, 2)), sum(by_hand, torch.zeros(())) / 3)
    torch.testing.assert_close(over_widths(loss, both, widths=()), by_hand[0])


# nDCG


def test_ndcg_is_that_of_scikit_learn_with_several_relevant_passages() -> None:
    from sklearn.metrics import ndcg_score

    random = np.random.default_rng(0)
    queries, passages = random.normal(size=(30, 8)), random.normal(size=(25, 8))
    relevant = random.random((30, 25)) < 0.15
    relevant[np.arange(30), random.integers(25, size=30)] = True
    query_numbers, passage_numbers = np.nonzero(relevant)
    ranks = relevant_ranks(
        queries.astype(np.float32),
        passages.astype(np.float32),
        query_numbers=query_numbers,
        passage_numbers=passage_numbers,
    )
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
        passages / np.linalg.norm(passages, axis=1, keepdims=True)
    ).T
    for k in (1, 10):
        expected = [ndcg_score(relevant[i : i + 1], cosines[i : i + 1], k=k) for i in range(30)]
        np.testing.assert_allclose(ndcg_at(k, query_numbers=query_numbers, ranks=ranks), expected, atol=1e-6)


def test_an_encoder_that_maps_all_texts_to_one_vector_finds_nothing() -> None:
    same = np.ones((20, 4), dtype=np.float32)
    numbers = np.arange(20)
    ranks = relevant_ranks(same, same, query_numbers=numbers, passage_numbers=numbers)
    assert (ranks == 20).all()
    assert ndcg_at(10, query_numbers=numbers, ranks=ranks).sum() == 0
