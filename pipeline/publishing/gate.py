"""Promotion gate: compare a newly trained adapter with the published one on the same test texts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pipeline.adapter.description import FoundAdapter
from pipeline.config import GateConfig
from pipeline.data.dataset import load_data
from pipeline.encoder.tokeniser import IntArray
from pipeline.errors import DataError
from pipeline.evaluation import significance
from pipeline.inference.classifier import load_classifier
from pipeline.inference.reference import find_adapters
from pipeline.machine import local_cpus
from pipeline.publishing.measurement import GateMeasurement
from pipeline.publishing.publication import Candidate, PublishedState
from pipeline.publishing.vector_gate import measure_vector_adapters
from pipeline.records import SIGNIFICANCE, Decision, GateDecision, TaskResult
from pipeline.reports.formatting import label_changes
from pipeline.reports.summary import main_difference


def evaluate_gate(
    candidate: Candidate, base: PublishedState, config: GateConfig, *, to: str, repository: str | None
) -> list[GateDecision]:
    """Decide for each MTEB task of a run whether its adapter is promoted.

    Args:
        candidate: The run.
        base: Current state of the target.
        config: Thresholds of the gate.
        to: Target, as the decisions name it.
        repository: ``OWNER/NAME`` on the Hub; None if the target is a folder.
    Raises:
        DataError: the test texts that the run was measured on have changed or cannot be read.
    """
    return [_decide_task(candidate, task, base, config, to=to, repository=repository) for task in candidate.results]


def _decide_task(
    candidate: Candidate, task: str, base: PublishedState, config: GateConfig, *, to: str, repository: str | None
) -> GateDecision:
    result = candidate.results[task]
    published = base.publication.adapters.get(task) if base.publication else None
    measured: GateMeasurement | None = None
    decision, reason = decide_without_scoring(result, published, base, config)
    if decision is None:
        assert base.folder is not None
        ref = f"{base.folder.root}#{task}" if repository is None else f"hf:{repository}@{base.revision}#{task}"
        measured = (measure if result.has_head else measure_vector_adapters)(candidate, task, ref)
        decision, reason = decide(measured, config)
    if decision == "promote" and config.enabled and config.require_beats_probe and not beats_probe(result):
        decision = "block"
        rival = "its head is not above the full-data probe" if result.has_head else "it is not above the frozen encoder"
        reason = f"{rival} beyond noise (publish.gate.require_beats_probe)"
    return GateDecision(
        run_id=candidate.summary.run_id,
        mteb_task=task,
        to=to,
        decision=decision,
        reason=reason,
        metric=measured.metric if measured else None,
        published_accuracy=measured.published_accuracy if measured else None,
        candidate_accuracy=measured.candidate_accuracy if measured else None,
        difference=measured.difference if measured else None,
        low=measured.interval.low if measured else None,
        high=measured.interval.high if measured else None,
        p_value=measured.p_value if measured else None,
        num_texts=measured.num_texts if measured else None,
        published_sha256=published,
        candidate_sha256=result.adapter.sha256,
        published_revision=base.revision,
        created_at=datetime.now(UTC),
    )


def decide_without_scoring(
    result: TaskResult, published: str | None, base: PublishedState, config: GateConfig
) -> tuple[Decision | None, str]:
    """Decide about an adapter without scoring it, if possible.

    Args:
        result: Result of the candidate.
        published: sha256 of the published adapter; None if there is none.
        base: Current state of the target.
        config: Thresholds of the gate.
    Returns:
        Decision and reason; the decision is None if both adapters have to be scored.
    """
    if published is None:
        return "promote", "nothing is published under this name yet"
    before = base.result(result.mteb_task.name)
    old, new = before.data.label_names, result.data.label_names
    if published == result.adapter.sha256 and old == new:  # renaming a label changes no weight
        return "keep", "it is the published adapter"
    if not config.enabled:
        return "promote", "the gate is off (publish.gate.enabled)"
    families = before.mteb_task.objective, result.mteb_task.objective
    if families[0] != families[1]:
        return (
            "block",
            f"it is an adapter for {families[1]}, and the published one is for {families[0]}, so they cannot be "
            "compared; to replace it, set publish.gate.enabled = false",
        )
    if (changes := label_changes(old, new)) and not config.allow_label_change:
        return (
            "block",
            f"its labels differ from the published ones: {changes}; to allow it, set publish.gate.allow_label_change",
        )
    return None, ""


def decide(measured: GateMeasurement, config: GateConfig) -> tuple[Decision, str]:
    """Promote a gain beyond noise, block a loss beyond noise, and otherwise keep the published adapter.

    A difference is noise unless both the interval and McNemar's test reject that. With only a few discordant texts, the
    bootstrap alone is overconfident. A ``min_gain`` below 0 asks for non-inferiority, which the interval alone decides.

    Returns:
        Decision, and the numbers behind it in words.
    """
    gain, low, high = measured.difference, measured.interval.low, measured.interval.high
    facts = measured.in_words
    significant = measured.p_value < SIGNIFICANCE
    if gain >= config.min_gain and low > min(config.min_gain, 0.0) and (significant or config.min_gain < 0):
        return "promote", facts
    if gain < -config.max_regression and high < 0 and significant:
        return "block", f"worse: {facts}"
    return "keep", f"{'within noise' if low <= 0 <= high or not significant else 'too small a difference'}: {facts}"


def beats_probe(result: TaskResult) -> bool:
    """Whether the head exceeds the full-data probe beyond noise, by the MTEB task's main metric.

    For an adapter without a head: whether the adapted vectors exceed the frozen ones.
    """
    if not result.has_head:
        difference = main_difference(result)
        return difference is not None and difference.gain > 0 and difference.p_value < SIGNIFICANCE
    comparison = result.comparison
    return comparison is not None and comparison.gain > 0 and comparison.main_p_value < SIGNIFICANCE


def measure(candidate: Candidate, task: str, published: str) -> GateMeasurement:
    """Score the candidate's adapter of a task, and a published one, on the candidate's test texts.

    Args:
        candidate: The run.
        task: Name of the MTEB task.
        published: Reference of the published adapter.
    Raises:
        DataError: the data set has changed since the run.
    """
    result, config = candidate.results[task], candidate.manifest.config
    offline = config.data.offline
    data = load_data(result.mteb_task, config=config.train, offline=offline)
    if data.fingerprint != result.data.fingerprint:
        raise DataError(
            f"{task}: the data set has changed since run {candidate.summary.run_id}; retrain before publishing"
        )
    (new,) = find_adapters([f"{candidate.folder.root}#{task}"], offline=True)
    (old,) = find_adapters([published], offline=offline)
    names = {name: index for index, name in enumerate(data.label_names)}
    if all(getattr(new.encoder, what) == getattr(old.encoder, what) for what in ("revision", "pooling", "max_tokens")):
        first, second = _predict([new, old], data.test_texts, names, config.encoder.name, offline)
    else:
        (first,) = _predict([new], data.test_texts, names, config.encoder.name, offline)
        (second,) = _predict([old], data.test_texts, names, None, offline)
    return compare(data.test_labels, first, second)


def compare(labels: IntArray, candidate: IntArray, published: IntArray) -> GateMeasurement:
    """Compare two predictions of the same texts.

    Args:
        labels: Class numbers, shape (texts,).
        candidate: Predicted class numbers, same shape. A negative number counts as an error.
        published: As ``candidate``.
    """
    return GateMeasurement(
        published_accuracy=float((published == labels).mean()),
        candidate_accuracy=float((candidate == labels).mean()),
        interval=significance.paired_difference(labels, candidate, published),
        p_value=significance.mcnemar(labels, candidate, published).p_value,
        num_texts=len(labels),
    )


def _predict(
    adapters: Sequence[FoundAdapter], texts: Sequence[str], names: dict[str, int], encoder: str | None, offline: bool
) -> list[IntArray]:
    """Predict class numbers with adapters of one encoder: one array of shape (texts,) per adapter.

    A prediction is -1 if the data set has no such label, or if the adapter's output is not finite.
    """
    classifier = load_classifier(adapters, encoder=_local(encoder), threads=local_cpus(), use_gpu=True, offline=offline)
    class_numbers = [
        np.array([names.get(name, -1) for name in adapter.label_names], dtype=np.int64) for adapter in adapters
    ]
    predictions = classifier.classify(classifier.tokenise(texts))
    return [
        np.where(predicted.finite, numbers[predicted.labels], -1)
        for numbers, predicted in zip(class_numbers, predictions, strict=True)
    ]


def _local(encoder: str | None) -> str | None:
    """The encoder of the run if it is a local folder, else None: other names can be loaded anywhere."""
    return encoder if encoder is not None and Path(encoder).is_dir() else None
