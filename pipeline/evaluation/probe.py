"""The logistic-regression probe on the vectors of all training texts, and the head's start that is made from it."""

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
# With the full confidence of the probe, the loss would be too small to train the encoder:
# tests/benchmarks/EXPERIMENTS.md, "What to train with".
_HEAD_START_CONFIDENCE = 0.25


def full_data_probe(data: TaskData, vectors: TextVectors, config: EvaluateConfig, *, seed: int) -> tuple[Any, float]:
    """Fit a logistic regression on all of train.

    Returns: The regression, and the mean length of the encoder's vectors relative to that of the features.
    """
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
        accuracy = float(probe.score(*choose)) if len(choose[1]) else 0.0
        # The smallest of equally good C wins, also if there are no texts to choose on.
        if best is None or accuracy > best[0]:
            best = (accuracy, (c, probe.coef_.copy(), probe.intercept_.copy()))
    assert best is not None
    c, probe.coef_, probe.intercept_ = best[1]
    probe.set_params(C=c)
    if not data.validation_texts:
        probe.fit(features, labels)
    scale = float(np.linalg.norm(vectors(data.train_texts), axis=1).mean() / np.linalg.norm(features, axis=1).mean())
    return probe, scale


def _hold_out(features: FloatArray, labels: IntArray, *, seed: int) -> tuple[Any, Any]:
    """Split train into nine tenths to fit on and one tenth to choose the probe's C on, without a validation slice.

    Each class keeps a text to fit on, so the tenth is empty if no class has two texts.
    """
    from sklearn.model_selection import train_test_split

    single = np.bincount(labels)[labels] == 1
    spare = np.flatnonzero(~single)
    if not len(spare):
        return (features, labels), (features[spare], labels[spare])
    stratify = labels[spare] if len(spare) // 10 >= len(np.unique(labels[spare])) else None
    fit, choose = train_test_split(spare, test_size=0.1, random_state=seed, stratify=stratify)
    classes, first = np.unique(labels[choose], return_index=True)
    back = first[~np.isin(classes, labels[fit])]  # one text of each class that is entirely in the tenth
    fit, choose = np.concatenate([fit, choose[back], np.flatnonzero(single)]), np.delete(choose, back)
    return (features[fit], labels[fit]), (features[choose], labels[choose])


def head_start(probe: Any, scale: float, num_classes: int) -> HeadStart:
    """Turn the probe into a linear layer on vectors that are not normalised, with reduced confidence.

    With two classes, each gets half of the margin."""
    weight = np.asarray(probe.coef_) * _HEAD_START_CONFIDENCE / scale
    bias = np.asarray(probe.intercept_) * _HEAD_START_CONFIDENCE
    if num_classes == 2:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return HeadStart(weight.astype(np.float32), bias.astype(np.float32))
