"""Consistency of the files that describe an adapter. Loads no weights, and does not use the Hub."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.adapter.description import FoundAdapter, describe_adapter
from pipeline.errors import VerificationError
from pipeline.history.tables import read_epochs, read_scores, read_values
from pipeline.history.values import find_value, values_of, values_of_scores
from pipeline.publishing.mteb_consistency import check_fact, check_few_shot, check_mteb_results, few_shot_columns
from pipeline.records import (
    AdapterMeta,
    Calibration,
    ClassificationResults,
    Column,
    EncoderName,
    EncoderRef,
    FewShot,
    LabelNames,
    Publication,
    Record,
    RunResults,
    TaskResult,
)
from pipeline.reports.summary import summarise, summarise_all
from pipeline.run.outputs import (
    correct_over_tasks,
)
from pipeline.store.files import read_record
from pipeline.store.manifest import RunManifest
from pipeline.store.run_folder import RunFolder, TaskFolder, adapter_sha256

_OVER_ALL_TASKS = ("p_value_holm", "p_value_main_holm")  # these depend on all MTEB tasks in the file
_ROUNDING = 1e-9
_TRAINED: tuple[Column, ...] = ("adapted_few_shot", "head")


def check_task(folder: TaskFolder) -> tuple[tuple[FoundAdapter, ...], TaskResult]:
    """Check that every file of a task's adapter, or of the adapters of both its sides, agrees with ``result.json``.

    Returns:
        The adapters and the result.
    Raises:
        VerificationError: a file disagrees, or mteb cannot load its results.
        AdapterError, DataError: a file is missing or damaged.
    """
    result = read_record(folder.result, TaskResult)
    name, encoder, labels = result.mteb_task.name, result.encoder, result.data.label_names
    trained_on = EncoderName(name=encoder.public_name, revision=encoder.revision)
    if result.has_head:
        check_fact(name, "labels.json", "label names", read_record(folder.labels, LabelNames).root, labels)
        calibration = read_record(folder.calibration, Calibration)
        check_fact(name, "calibration.json", "calibration", calibration, result.calibration)
    check_fact(name, "result.json", "adapters of sides", folder.has_sides, result.has_sides)
    for one in folder.adapters:
        meta = read_record(one.meta, AdapterMeta)
        check_fact(name, "meta.json", "label_names", meta.label_names, labels)
        check_fact(name, "meta.json", "encoder", meta.encoder, trained_on)
        check_fact(name, "meta.json", "task", meta.task or name, name)
        objective = result.mteb_task.objective
        check_fact(name, "meta.json", "objective", meta.objective or objective, objective)
        check_fact(name, "meta.json", "prefixes", meta.prefixes, result.mteb_task.prefixes)
    check_fact(name, "result.json", "adapter.encoder_revision", result.adapter.encoder_revision, encoder.revision)
    _check_rows(result)
    _check_values(result)
    few_shot = read_record(folder.few_shot, FewShot).root
    check_fact(name, "few_shot.json", "columns", sorted(few_shot), sorted(few_shot_columns(result)))
    for column, scores in few_shot.items():
        check_few_shot(f"few_shot.json, {column}", scores, result, column)
    sha256 = adapter_sha256(folder.root)
    if sha256 != result.adapter.sha256:
        raise VerificationError(
            f"{name}: the adapter's files have sha256 {sha256}, but {result.adapter.sha256} was trained"
        )
    return tuple(describe_adapter(one) for one in folder.adapters), result


def check_run(manifest: RunManifest, adapters: Sequence[FoundAdapter], result: TaskResult) -> None:
    """Compare a run's manifest with the adapters of one of its tasks.

    Raises:
        VerificationError: they disagree.
    """
    name, encoder = result.mteb_task.name, manifest.config.encoder
    check_fact(name, "manifest.json", "adapters", manifest.adapters.get(name), result.adapter.sha256)
    _check_encoder(name, "manifest.json", manifest.encoder, result)
    for adapter in adapters:
        check_fact(name, "meta.json", "pooling", adapter.meta.pooling, encoder.pooling)
        check_fact(name, "meta.json", "max_tokens", adapter.meta.max_tokens, encoder.max_tokens)


def check_publication(folder: RunFolder, publication: Publication, results: Mapping[str, TaskResult]) -> None:
    """Compare ``publication.json``, the tables and ``mteb_results`` with the adapters of a publication.

    Args:
        folder: Folder of the publication, whose hashes have been checked.
        publication: Content of ``publication.json``.
        results: MTEB task -> its result, for all adapters or some of them.
    Raises:
        VerificationError: they disagree.
        DataError: a table or a file of ``mteb_results`` is damaged.
    """
    for name, result in results.items():
        check_fact(name, "publication.json", "adapters", publication.adapters.get(name), result.adapter.sha256)
        _check_encoder(name, "publication.json", publication.encoder, result)
    _check_tables(folder, publication, results)
    check_mteb_results(folder, publication, results)


def listed_tasks(folder: RunFolder) -> list[str]:
    """Names of the MTEB tasks of a run or a publication, in the order of its tables.

    Raises: DataError: ``results.json``, or ``classification_results.json`` of an older version, is missing or damaged.
    """
    if folder.all_results.is_file():
        return [entry.task for entry in read_record(folder.all_results, RunResults).tasks]
    return [entry.task for entry in read_record(folder.results, ClassificationResults).tasks]


def check_summary(folder: RunFolder, results: Mapping[str, TaskResult], *, listed: Publication | RunManifest) -> None:
    """Compare ``classification_results.json`` and ``results.json`` with the results of MTEB tasks.

    Args:
        folder: A run or a publication.
        results: MTEB task -> its result. Averages and corrected p-values depend on all MTEB tasks, so they are compared
            only if all are given.
        listed: Manifest or publication, which lists the adapters of the folder.
    Raises:
        VerificationError: they disagree.
        DataError: the file is missing or damaged.
    """
    file, summary = folder.results.name, read_record(folder.results, ClassificationResults)
    tasks, classifiers = listed_tasks(folder), [entry.task for entry in summary.tasks]
    _check_names(folder.all_results.name if folder.all_results.is_file() else file, tasks, listed)
    for name in tasks:
        if name in results and results[name].has_head != (name in classifiers):
            raise VerificationError(f"{name}: {file}: lists adapters that classify, and this one's head says otherwise")
    if summary.run_id != listed.run_id:
        raise VerificationError(f"{file}: run_id is {summary.run_id}, but the adapters are of run {listed.run_id}")
    are_all = results.keys() == listed.adapters.keys()
    ordered = [results[task] for task in tasks if task in results]
    for result in ordered:
        _check_encoder(result.mteb_task.name, file, summary.encoder, result)
    corrected = correct_over_tasks(ordered) if are_all else ordered
    facts: dict[str, Any] = {
        "encoder": summary.encoder,
        "run_id": summary.run_id,
        "created_at": summary.created_at,
    }
    measured = summarise(corrected, summary.failures, **facts)
    expected = {entry.task: entry for entry in measured.tasks}
    for entry in summary.tasks:
        if entry.task in expected:
            _check_fields(entry.task, file, entry, expected[entry.task], but=() if are_all else _OVER_ALL_TASKS)
    if are_all:
        _check_fields("average", file, summary.average, measured.average)
    if folder.all_results.is_file():
        everything = summarise_all(corrected, summary.failures, **facts)
        _check_all_results(folder, everything, but=() if are_all else ("p_value_holm",))


def _check_all_results(folder: RunFolder, expected: RunResults, *, but: Collection[str]) -> None:
    file, found = folder.all_results.name, read_record(folder.all_results, RunResults)
    for what in ("run_id", "created_at", "encoder"):
        check_fact("run", file, what, getattr(found, what), getattr(expected, what))
    entries = {entry.task: entry for entry in found.tasks}
    for entry in expected.tasks:
        _check_fields(entry.task, file, entries[entry.task], entry, but=but)


def _check_names(file: str, found: Collection[str], listed: Publication | RunManifest) -> None:
    if sorted(found) != sorted(listed.adapters):
        names, adapters = (", ".join(sorted(some)) for some in (found, listed.adapters))
        raise VerificationError(f"{file}: covers {names or 'nothing':.200}, but the adapters are {adapters:.200}")


def _check_fields(name: str, file: str, found: Record, expected: Record, *, but: Collection[str] = ()) -> None:
    for what in type(found).model_fields:
        value = getattr(found, what)
        if what not in but and value is not None:  # None: written by an older version
            check_fact(name, file, what, value, getattr(expected, what))


def _check_encoder(name: str, file: str, found: EncoderRef, result: TaskResult) -> None:
    check_fact(name, file, "encoder.revision", found.revision, result.encoder.revision)
    # A hash of the files holds under any name, but a commit belongs to one repository.
    if not found.revision.startswith("sha256:"):
        check_fact(name, file, "encoder.public_name", found.public_name, result.encoder.public_name)


def _check_rows(result: TaskResult) -> None:
    """Check that columns are unique, and that each score has the task, run, encoder and adapter of the result."""
    name, file = result.mteb_task.name, "result.json"
    columns = [row.column for row in result.scores]
    check_fact(name, file, "scores", columns, list(dict.fromkeys(columns)))
    of_task = {
        "run_id": result.run_id,
        "mteb_task": name,
        "subset": result.mteb_task.subset,
        "dataset_revision": result.mteb_task.revision,
        "encoder": result.encoder.public_name,
        "encoder_revision": result.encoder.revision,
    }
    for row in result.scores:
        adapter = result.adapter.sha256 if row.column in _TRAINED else None
        for what, expected in (of_task | {"adapter_sha256": adapter}).items():
            check_fact(name, file, f"{what} of {row.column}", getattr(row, what), expected)


def _check_values(result: TaskResult) -> None:
    """Whether the values are of this task and run, each there once, and those of the scores among them as they are."""
    name, file = result.mteb_task.name, "result.json"
    keys = [(row.column, row.metric, row.width, row.slice, row.slice_value) for row in result.values]
    check_fact(name, file, "values", keys, list(dict.fromkeys(keys)))
    for row in result.values:
        place = (row.run_id, row.mteb_task)
        check_fact(name, file, f"run and task of {row.metric} of {row.column}", place, (result.run_id, name))
    _check_differences(result)
    if not result.values:
        return
    for expected in values_of_scores(result.scores):
        what = f"{expected.metric} of {expected.column}"
        found = find_value(result.values, expected.column, expected.metric)
        check_fact(name, file, what, found and (found.value, found.num_texts), (expected.value, expected.num_texts))
        if found is not None and expected.low is not None:
            check_fact(name, file, f"interval of {what}", (found.low, found.high), (expected.low, expected.high))


def _check_differences(result: TaskResult) -> None:
    """Check that each gain is that of the values: adapted minus frozen, with the same interval and size."""
    name, file = result.mteb_task.name, "result.json"
    rows = {(row.column, row.metric, row.width, row.slice, row.slice_value): row for row in result.values}
    gains = {key[1:]: row for key, row in rows.items() if key[1].endswith("_gain")}
    listed = [(f"{d.metric}_gain", d.width, d.slice, d.slice_value) for d in result.differences]
    check_fact(name, file, "differences", listed, list(gains))
    for difference, row in zip(result.differences, gains.values(), strict=True):
        what = f"difference of {difference.metric}"
        place = difference.metric, difference.width, difference.slice, difference.slice_value
        frozen, adapted = (rows.get((column, *place)) for column in ("frozen", "adapted"))
        stated = (difference.gain, difference.low, difference.high, difference.num_texts)
        check_fact(name, file, what, stated, (row.value, row.low, row.high, row.num_texts))
        gain = None if frozen is None or adapted is None else adapted.value - frozen.value
        if gain is None or abs(gain - difference.gain) > _ROUNDING:
            check_fact(name, file, what, difference.gain, gain)


def _check_tables(folder: RunFolder, publication: Publication, results: Mapping[str, TaskResult]) -> None:
    scores, epochs = read_scores(folder.scores), read_epochs(folder.epochs)
    if folder.values.exists() or any(result.values for result in results.values()):  # older versions wrote no values
        _check_values_table(folder, results)
    scored = {row.mteb_task for row in scores}
    others = (name for name in publication.adapters if name not in results)
    stored = {name: read_record(folder.task(name).result, TaskResult) for name in others}
    unscored = {name for name, result in (stored | dict(results)).items() if not result.scores}  # without a head
    for file, names in ((folder.scores.name, scored | unscored), (folder.epochs.name, set(epochs))):
        _check_names(file, names, publication)
    are_all = results.keys() == publication.adapters.keys()
    corrected = (
        correct_over_tasks([results[name] for name in publication.adapters]) if are_all else tuple(results.values())
    )
    for result in corrected:
        name = result.mteb_task.name
        rows = [row for row in scores if row.mteb_task == name]
        check_fact(
            name, folder.scores.name, "columns", [row.column for row in rows], [row.column for row in result.scores]
        )
        for row, measured in zip(rows, result.scores, strict=True):
            _check_fields(
                name, f"{folder.scores.name}, {row.column}", row, measured, but=() if are_all else _OVER_ALL_TASKS
            )
        check_fact(name, folder.epochs.name, "epochs", epochs[name], result.epochs)


def _check_values_table(folder: RunFolder, results: Mapping[str, TaskResult]) -> None:
    rows = read_values(folder.values)
    for name, result in results.items():
        found = tuple(row for row in rows if row.mteb_task == name)
        check_fact(name, folder.values.name, "values", found, values_of(result))
