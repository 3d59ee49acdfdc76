"""The logistic-regression probe on all train vectors, and the head that starts from it."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.adapter.head import HeadStart
from pipeline.config import EvaluateConfig
from pipeline.data.dataset import TaskData
from pipeline.encoder.encoder import FloatArray
from pipeline.encoder.tokeniser import IntArray
from pipeline.evaluation.vectors import TextVectors

_PROBE_ITERATIONS = 1000


# A head as sure as the probe leaves the encoder nothing to learn from:
# tests/benchmarks/EXPERIMENTS.md, "What to train with".
_HEAD_START_CONFIDENCE = 0.25


def full_data_probe(data: TaskData, vectors: TextVectors, config: EvaluateConfig, *, seed: int) -> tuple[Any, float]:
    """Logistic regression on all of train, and the mean length of what it was fitted on relative to its features."""
    from sklearn.linear_model import LogisticRegression

    features, labels = vectors.features(data.train_texts), data.train_labels
    if data.validation_texts:
        fit, choose = (features, labels), (vectors.features(data.validation_texts), data.validation_labels)
    else:
        fit, choose = _hold_out(features, labels, seed=seed)
    best: tuple[float, Any] | None = None
    probe = LogisticRegression(max_iter=_PROBE_ITERATIONS, warm_start=True)
    for c in sorted(config.probe_c):
        probe.set_params(C=c).fit(*fit)
        right = (
            float(probe.score(*choose)) if len(choose[1]) else 0.0
        )  # of equals the smallest C is taken, so also of unmeasured ones
        if best is None or right > best[0]:
            best = (right, (c, probe.coef_.copy(), probe.intercept_.copy()))
    assert best is not None
    c, probe.coef_, probe.intercept_ = best[1]
    probe.set_params(C=c)
    if not data.validation_texts:
        probe.fit(features, labels)
    scale = float(np.linalg.norm(vectors(data.train_texts), axis=1).mean() / np.linalg.norm(features, axis=1).mean())
    return probe, scale


def _hold_out(features: FloatArray, labels: IntArray, *, seed: int) -> tuple[Any, Any]:
    """Train in two parts: what is fitted, and a tenth to choose the probe's C on where the task has no validation slice.

    Each class keeps a text in what is fitted, so the tenth is empty where no class has two.
    """
    from sklearn.model_selection import train_test_split

    single = np.bincount(labels)[labels] == 1
    spare = np.flatnonzero(~single)
    if not len(spare):
        return (features, labels), (features[spare], labels[spare])
    stratify = labels[spare] if len(spare) // 10 >= len(np.unique(labels[spare])) else None
    fit, choose = train_test_split(spare, test_size=0.1, random_state=seed, stratify=stratify)
    classes, first = np.unique(labels[choose], return_index=True)
    back = first[~np.isin(classes, labels[fit])]  # of a class that is wholly in the tenth; it has at least two
    fit, choose = np.concatenate([fit, choose[back], np.flatnonzero(single)]), np.delete(choose, back)
    return (features[fit], labels[fit]), (features[choose], labels[choose])


def head_start(probe: Any, scale: float, num_classes: int) -> HeadStart:
    """The probe as a linear layer on vectors that are not normalised, less sure of itself; of two classes each gets half the margin."""
    weight = np.asarray(probe.coef_) * _HEAD_START_CONFIDENCE / scale
    bias = np.asarray(probe.intercept_) * _HEAD_START_CONFIDENCE
    if num_classes == 2:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return HeadStart(weight.astype(np.float32), bias.astype(np.float32))
