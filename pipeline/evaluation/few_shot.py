"""mteb's few-shot protocol on precomputed vectors."""

from __future__ import annotations

from typing import Any

from pipeline.encoder.encoder import FloatArray
from pipeline.evaluation import scores
from pipeline.evaluation.mteb_runs import Side, run_mteb
from pipeline.evaluation.vectors import TextVectors


def few_shot(mteb_task: Any, vectors: TextVectors, *, width: int | None = None) -> tuple[scores.Score, dict[str, Any]]:
    """Run mteb's protocol: ten draws of a logistic regression on ``samples_per_label`` texts per label, scored on test.

    Args:
        mteb_task: Filled classification task of mteb.
        vectors: Vectors of its texts.
        width: Number of leading dimensions to use, as unit vectors. None: the encoder's features.
    Returns: The score, and mteb's own result as JSON values.
    """

    def embed(texts: list[str], side: Side | None) -> FloatArray:
        return vectors.features(texts) if width is None else vectors.unit(texts, width=width)

    run = run_mteb(mteb_task, embed)
    draws = run.scores["scores_per_experiment"]
    precisions = [draw["ap"] for draw in draws] if draws[0].get("ap") is not None else None
    score = scores.score_of_draws([d["accuracy"] for d in draws], [d["f1"] for d in draws], precisions)
    return score, run.result
