"""Whether the files of an adapter, and those around it, say the same of it. Loads no weights and asks no Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.adapter_ref import FoundAdapter, describe_adapter
from pipeline.errors import DataError, VerificationError, first_line
from pipeline.manifest import RunManifest
from pipeline.records import (
    AdapterMeta,
    Calibration,
    ClassificationResults,
    Column,
    EncoderName,
    FewShot,
    FewShotResult,
    LabelNames,
    Publication,
    ResultsEntry,
    TaskResult,
)
from pipeline.results import score_row, summarise
from pipeline.run_folder import LARGEST_RECORD_BYTES, RunFolder, TaskFolder, read_file, read_record

_FRONT_MATTER = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_OVER_ALL_TASKS = ("p_value_holm", "p_value_main_holm")  # corrected for the number of MTEB tasks in the file
_MOST_LEVELS = 20  # of lists and mappings in a card's metadata
_FEW_SHOT: tuple[Column, ...] = ("frozen_few_shot", "adapted_few_shot")


def check_task(folder: TaskFolder) -> tuple[FoundAdapter, TaskResult]:
    """An adapter and what was measured of it, once every file that describes it agrees with ``result.json``.

    Raises:
        VerificationError: one says something else.
        AdapterError, DataError: one is missing or damaged.
    """
    result = read_record(folder.result, TaskResult)
    name, encoder, labels = result.mteb_task.name, result.encoder, result.data.label_names
    meta = read_record(folder.meta, AdapterMeta)
    trained_on = EncoderName(name=encoder.public_name, revision=encoder.revision)
    _check(name, "labels.json", "label names", read_record(folder.labels, LabelNames).root, labels)
    _check(name, "meta.json", "label_names", meta.label_names, labels)
    _check(name, "meta.json", "encoder", meta.encoder, trained_on)
    _check(name, "meta.json", "task", meta.task or name, name)
    _check(name, "result.json", "adapter.encoder_revision", result.adapter.encoder_revision, encoder.revision)
    _check(name, "calibration.json", "calibration", read_record(folder.calibration, Calibration), result.calibration)
    for column, few_shot in read_record(folder.few_shot, FewShot).root.items():
        _check_few_shot(name, f"few_shot.json, {column}", few_shot, result, (column,))
    found = describe_adapter(folder)
    if found.sha256 != result.adapter.sha256:
        raise VerificationError(f"{name}: the adapter's files have sha256 {found.sha256}, but {result.adapter.sha256} was trained")
    return found, result


def check_run(manifest: RunManifest, adapter: FoundAdapter, result: TaskResult) -> None:
    """Compare what a run's manifest says of one of its adapters.

    Raises: VerificationError: it is another one.
    """
    name, encoder = result.mteb_task.name, manifest.config.encoder
    _check(name, "manifest.json", "adapters", manifest.adapters.get(name), result.adapter.sha256)
    _check(name, "manifest.json", "encoder.revision", manifest.encoder.revision, result.encoder.revision)
    _check(name, "meta.json", "pooling", adapter.meta.pooling, encoder.pooling)
    _check(name, "meta.json", "max_tokens", adapter.meta.max_tokens, encoder.max_tokens)


def check_publication(folder: RunFolder, publication: Publication, result: TaskResult) -> None:
    """Compare what a publication says of one of its adapters, ``mteb_results`` included.

    Raises:
        VerificationError: it is another one.
        DataError: a file of ``mteb_results`` is damaged.
    """
    name = result.mteb_task.name
    _check(name, "publication.json", "adapters", publication.adapters.get(name), result.adapter.sha256)
    _check(name, "publication.json", "encoder.revision", publication.encoder.revision, result.encoder.revision)
    for path in publication.files:
        if path.startswith(f"{folder.mteb_results.name}/") and path.endswith(f"/{name}.json"):
            _check_few_shot(name, path, read_record(folder.root / path, FewShotResult), result, _FEW_SHOT)


def check_summary(folder: RunFolder, results: Mapping[str, TaskResult]) -> None:
    """Compare what ``classification_results.json`` says of some MTEB tasks with what was measured.

    Args:
        folder: A run or a publication.
        results: MTEB task -> its result.
    Raises:
        VerificationError: it claims something else.
        DataError: it is missing or damaged.
    """
    summary = read_record(folder.results, ClassificationResults)
    claimed = {entry.task: entry for entry in summary.tasks}
    for name, result in results.items():
        (measured,) = summarise([result], (), encoder=result.encoder, run_id=result.run_id, created_at=summary.created_at).tasks
        _check(name, folder.results.name, "encoder.revision", summary.encoder.revision, result.encoder.revision)
        if name not in claimed:
            raise VerificationError(f"{name}: is not in {folder.results.name}")
        for what in ResultsEntry.model_fields:
            value = getattr(claimed[name], what)
            if what not in _OVER_ALL_TASKS and value is not None:  # None: not known to an older version
                _check(name, folder.results.name, what, value, getattr(measured, what))


def check_card(folder: RunFolder, results: Mapping[str, TaskResult]) -> None:
    """Compare the scores and the base model in the card's metadata, which the Hub reads, with what was measured.

    Args:
        folder: A run or a publication.
        results: MTEB task -> its result, of all that are in the folder.
    Raises:
        VerificationError: it claims something else.
        DataError: it is missing or damaged.
    """
    scores = [row for result in results.values() for row in result.scores]
    measured = {round(value, 6) for row in scores for value in (row.accuracy, row.macro_f1, row.average_precision) if value is not None}
    try:
        front = _FRONT_MATTER.match(read_file(folder.readme, at_most=LARGEST_RECORD_BYTES).decode())
        metadata = _read_yaml(front[1]) if front else {}
        models = metadata.get("model-index", [])
        claimed = [metric["value"] for model in models for entry in model["results"] for metric in entry["metrics"]]
        wrong = [value for value in claimed if value not in measured]
        base_model = metadata.get("base_model")
    except OSError as error:
        raise DataError(f"{folder.readme} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{folder.readme}: its metadata are damaged: {first_line(error)}") from None
    if wrong:
        raise VerificationError(f"{folder.readme.name}: its metadata claim a score of {wrong[0]!r:.100}, which was not measured")
    encoders = [result.encoder.public_name for result in results.values()]
    if base_model is not None and base_model not in encoders:
        raise VerificationError(f"{folder.readme.name}: its metadata name the base model {base_model!r:.100}, but it is {encoders[0]}")


def _check(name: str, file: str, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise VerificationError(f"{name}: {file}: {what} is {found!r:.200}, but what was trained has {expected!r:.200}")


def _check_few_shot(name: str, file: str, found: FewShotResult, result: TaskResult, columns: tuple[Column, ...]) -> None:
    measured = [row.accuracy for row in (score_row(result, column) for column in columns) if row is not None]
    claimed = [scores.accuracy for scores in found.scores.get("test", ())]
    _check(name, file, "task_name", found.task_name, name)
    if not claimed or not all(any(abs(one - other) < 1e-6 for other in measured) for one in claimed):
        raise VerificationError(f"{name}: {file}: accuracy is {claimed!r:.200}, but {measured!r:.200} was measured")


def _read_yaml(text: str) -> Any:
    """What plain YAML says. Aliases make a small text endless, and many levels crash the parser that is written in C."""
    loader, depth = getattr(yaml, "CSafeLoader", yaml.SafeLoader), 0
    for event in yaml.parse(text, loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS or isinstance(event, yaml.AliasEvent):
            raise ValueError(f"expected at most {_MOST_LEVELS} levels and no alias")
    return yaml.load(text, loader)
