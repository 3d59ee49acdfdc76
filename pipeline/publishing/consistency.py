"""Consistency of the files that describe an adapter. Loads no weights, and does not use the Hub."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import get_args

from pipeline.adapter.description import FoundAdapter, describe_adapter
from pipeline.errors import VerificationError, first_line
from pipeline.evaluation.scores import score_of_draws
from pipeline.history.tables import read_epochs, read_scores, read_values
from pipeline.history.values import find_value, values_of, values_of_scores
from pipeline.records import (
    AdapterMeta,
    Calibration,
    ClassificationResults,
    Column,
    EncoderName,
    EncoderRef,
    FewShot,
    FewShotColumn,
    FewShotResult,
    JsonObject,
    LabelNames,
    Publication,
    Record,
    TaskResult,
)
from pipeline.reports.outputs import (
    MODEL_META,
    as_mteb_loads,
    correct_over_tasks,
    mteb_main_score,
    mteb_model,
    mteb_path,
)
from pipeline.reports.summary import score_row, summarise
from pipeline.store.files import read_record
from pipeline.store.manifest import RunManifest
from pipeline.store.run_folder import RunFolder, TaskFolder

_OVER_ALL_TASKS = ("p_value_holm", "p_value_main_holm")  # these depend on all MTEB tasks in the file
_TRAINED: tuple[Column, ...] = ("adapted_few_shot", "head")
_ROUNDED = 1e-6  # mteb and the model card write six decimals


def check_task(folder: TaskFolder) -> tuple[FoundAdapter, TaskResult]:
    """Check that every file of an adapter agrees with its ``result.json``.

    Returns:
        The adapter and its result.
    Raises:
        VerificationError: a file disagrees, or mteb cannot load its results.
        AdapterError, DataError: a file is missing or damaged.
    """
    result = read_record(folder.result, TaskResult)
    name, encoder, labels = result.mteb_task.name, result.encoder, result.data.label_names
    meta = read_record(folder.meta, AdapterMeta)
    trained_on = EncoderName(name=encoder.public_name, revision=encoder.revision)
    if result.has_head:
        _check(name, "labels.json", "label names", read_record(folder.labels, LabelNames).root, labels)
        calibration = read_record(folder.calibration, Calibration)
        _check(name, "calibration.json", "calibration", calibration, result.calibration)
    _check(name, "meta.json", "label_names", meta.label_names, labels)
    _check(name, "meta.json", "encoder", meta.encoder, trained_on)
    _check(name, "meta.json", "task", meta.task or name, name)
    _check(name, "result.json", "adapter.encoder_revision", result.adapter.encoder_revision, encoder.revision)
    _check_rows(result)
    _check_values(result)
    few_shot = read_record(folder.few_shot, FewShot).root
    _check(name, "few_shot.json", "columns", sorted(few_shot), sorted(_few_shot_columns(result)))
    for column, scores in few_shot.items():
        _check_few_shot(f"few_shot.json, {column}", scores, result, column)
    adapter = describe_adapter(folder)
    if adapter.sha256 != result.adapter.sha256:
        raise VerificationError(
            f"{name}: the adapter's files have sha256 {adapter.sha256}, but {result.adapter.sha256} was trained"
        )
    return adapter, result


def check_run(manifest: RunManifest, adapter: FoundAdapter, result: TaskResult) -> None:
    """Compare a run's manifest with one of the run's adapters.

    Raises:
        VerificationError: they disagree.
    """
    name, encoder = result.mteb_task.name, manifest.config.encoder
    _check(name, "manifest.json", "adapters", manifest.adapters.get(name), result.adapter.sha256)
    _check_encoder(name, "manifest.json", manifest.encoder, result)
    _check(name, "meta.json", "pooling", adapter.meta.pooling, encoder.pooling)
    _check(name, "meta.json", "max_tokens", adapter.meta.max_tokens, encoder.max_tokens)


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
        _check(name, "publication.json", "adapters", publication.adapters.get(name), result.adapter.sha256)
        _check_encoder(name, "publication.json", publication.encoder, result)
    _check_tables(folder, publication, results)
    _check_mteb_results(folder, publication, results)


def check_summary(folder: RunFolder, results: Mapping[str, TaskResult], *, listed: Publication | RunManifest) -> None:
    """Compare ``classification_results.json`` with the results of MTEB tasks.

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
    tasks = [entry.task for entry in summary.tasks]
    _check_names(file, tasks, listed)
    if summary.run_id != listed.run_id:
        raise VerificationError(f"{file}: run_id is {summary.run_id}, but the adapters are of run {listed.run_id}")
    are_all = results.keys() == listed.adapters.keys()
    ordered = [results[task] for task in tasks if task in results]
    for result in ordered:
        _check_encoder(result.mteb_task.name, file, summary.encoder, result)
    measured = summarise(
        correct_over_tasks(ordered) if are_all else ordered,
        summary.failures,
        encoder=summary.encoder,
        run_id=summary.run_id,
        created_at=summary.created_at,
    )
    expected = {entry.task: entry for entry in measured.tasks}
    for entry in summary.tasks:
        if entry.task in expected:
            _check_fields(entry.task, file, entry, expected[entry.task], but=() if are_all else _OVER_ALL_TASKS)
    if are_all:
        _check_fields("average", file, summary.average, measured.average)


def _check(name: str, file: str, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise VerificationError(
            f"{name}: {file}: {what} is {found!r:.200}, but the trained adapter has {expected!r:.200}"
        )


def _check_names(file: str, found: Collection[str], listed: Publication | RunManifest) -> None:
    if sorted(found) != sorted(listed.adapters):
        names, adapters = (", ".join(sorted(some)) for some in (found, listed.adapters))
        raise VerificationError(f"{file}: covers {names or 'nothing':.200}, but the adapters are {adapters:.200}")


def _check_fields(name: str, file: str, found: Record, expected: Record, *, but: Collection[str] = ()) -> None:
    for what in type(found).model_fields:
        value = getattr(found, what)
        if what not in but and value is not None:  # None: written by an older version
            _check(name, file, what, value, getattr(expected, what))


def _check_encoder(name: str, file: str, found: EncoderRef, result: TaskResult) -> None:
    _check(name, file, "encoder.revision", found.revision, result.encoder.revision)
    # A hash of the files holds under any name, but a commit belongs to one repository.
    if not found.revision.startswith("sha256:"):
        _check(name, file, "encoder.public_name", found.public_name, result.encoder.public_name)


def _check_rows(result: TaskResult) -> None:
    """Check that columns are unique, and that each score has the task, run, encoder and adapter of the result."""
    name, file = result.mteb_task.name, "result.json"
    columns = [row.column for row in result.scores]
    _check(name, file, "scores", columns, list(dict.fromkeys(columns)))
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
            _check(name, file, f"{what} of {row.column}", getattr(row, what), expected)


def _check_values(result: TaskResult) -> None:
    """Whether the values are of this task and run, each there once, and those of the scores among them as they are."""
    name, file = result.mteb_task.name, "result.json"
    keys = [(row.column, row.metric, row.width, row.slice, row.slice_value) for row in result.values]
    _check(name, file, "values", keys, list(dict.fromkeys(keys)))
    for row in result.values:
        place = (row.run_id, row.mteb_task)
        _check(name, file, f"run and task of {row.metric} of {row.column}", place, (result.run_id, name))
    if not result.values:
        return
    for expected in values_of_scores(result.scores):
        what = f"{expected.metric} of {expected.column}"
        found = find_value(result.values, expected.column, expected.metric)
        _check(name, file, what, found and (found.value, found.num_texts), (expected.value, expected.num_texts))
        if found is not None and expected.low is not None:
            _check(name, file, f"interval of {what}", (found.low, found.high), (expected.low, expected.high))


def _few_shot_columns(result: TaskResult) -> list[FewShotColumn]:
    return [column for column in get_args(FewShotColumn) if score_row(result, column) is not None]


def _check_few_shot(file: str, found: FewShotResult, result: TaskResult, column: FewShotColumn) -> None:
    """Compare an mteb result, scores of the draws included, with the score row of its column."""
    name, row = result.mteb_task.name, score_row(result, column)
    assert row is not None, f"{column} was not measured"
    _check(name, file, "task_name", found.task_name, name)
    try:
        as_mteb_loads(found)
    except ValueError as error:
        raise VerificationError(f"{name}: {file}: mteb cannot load it: {first_line(error)}") from None
    entries = found.scores.get("test", ())
    if len(entries) != 1:
        raise VerificationError(f"{name}: {file}: has scores for {len(entries)} subsets of test, but one was measured")
    (entry,) = entries
    _check(name, file, "hf_subset", entry.hf_subset, row.subset)
    measured = {"accuracy": row.accuracy, "f1": row.macro_f1, "ap": row.average_precision}
    for what, score in measured.items():
        _check_score(name, file, what, getattr(entry, what), score)
    main = mteb_main_score(result.mteb_task)
    among = [main] if main in measured else ["accuracy", "f1"]  # any, if this version of mteb does not know the task
    if all(is_different_score(entry.main_score, measured[what]) for what in among):
        _check_score(name, file, "main_score", entry.main_score, measured[among[0]])
    if draws := entry.scores_per_experiment:
        precisions = [draw.ap for draw in draws if draw.ap is not None]
        whole = precisions if len(precisions) == len(draws) else None
        mean = score_of_draws([draw.accuracy for draw in draws], [draw.f1 for draw in draws], whole)
        for what in ("accuracy", "macro_f1", "average_precision", "low", "high"):
            _check_score(name, file, f"{what} of scores_per_experiment", getattr(mean, what), getattr(row, what))


def _check_score(name: str, file: str, what: str, found: float | None, expected: float | None) -> None:
    if is_different_score(found, expected):
        raise VerificationError(f"{name}: {file}: {what} is {found!r}, but {expected!r} was measured")


def is_different_score(one: float | None, other: float | None) -> bool:
    """Whether two scores differ by more than rounding, or one of them is missing."""
    return one != other if one is None or other is None else abs(one - other) >= _ROUNDED


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
        _check(name, folder.scores.name, "columns", [row.column for row in rows], [row.column for row in result.scores])
        for row, measured in zip(rows, result.scores, strict=True):
            _check_fields(
                name, f"{folder.scores.name}, {row.column}", row, measured, but=() if are_all else _OVER_ALL_TASKS
            )
        _check(name, folder.epochs.name, "epochs", epochs[name], result.epochs)


def _check_values_table(folder: RunFolder, results: Mapping[str, TaskResult]) -> None:
    rows = read_values(folder.values)
    for name, result in results.items():
        found = tuple(row for row in rows if row.mteb_task == name)
        _check(name, folder.values.name, "values", found, values_of(result))


def _check_mteb_results(folder: RunFolder, publication: Publication, results: Mapping[str, TaskResult]) -> None:
    files = [path for path in publication.files if path.startswith(f"{folder.mteb_results.name}/")]
    names = {f"{name}.json" for name in publication.adapters}
    for path in files:
        if PurePosixPath(path).name not in names | {MODEL_META}:
            raise VerificationError(f"{path}: does not belong to a published adapter")
    for name, result in results.items():
        columns = {
            mteb_path(result, column, folder).relative_to(folder.root).as_posix(): column
            for column in _few_shot_columns(result)
        }
        for path in files:
            if PurePosixPath(path).name != f"{name}.json":
                continue
            if path not in columns:
                raise VerificationError(f"{name}: {path}: belongs to a model that was not measured")
            _check_few_shot(path, read_record(folder.root / path, FewShotResult), result, columns[path])
            meta = read_record((folder.root / path).with_name(MODEL_META), JsonObject).root
            model = meta.get("name"), meta.get("revision")
            meta_path = PurePosixPath(path).with_name(MODEL_META)
            _check(name, str(meta_path), "name, revision", model, mteb_model(result, columns[path]))
