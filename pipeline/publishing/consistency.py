"""Whether the files of an adapter, and those around it, say the same of it. Loads no weights and asks no Hub."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any, get_args

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results

from pipeline.adapter.description import FoundAdapter, describe_adapter
from pipeline.errors import DataError, VerificationError, first_line
from pipeline.evaluation.scores import score_of_draws
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
from pipeline.reports.model_card import claimed_scores
from pipeline.reports.outputs import (
    MODEL_META,
    as_mteb_loads,
    correct_over_tasks,
    mteb_main_score,
    mteb_model,
    mteb_path,
)
from pipeline.reports.score_table import score_row, summarise
from pipeline.store.manifest import RunManifest
from pipeline.store.run_folder import LARGEST_RECORD_BYTES, RunFolder, TaskFolder, read_file, read_record
from pipeline.store.tables import read_epochs, read_scores, read_values
from pipeline.store.values import find_value, values_of, values_of_scores

_OVER_ALL_TASKS = ("p_value_holm", "p_value_main_holm")  # corrected for the number of MTEB tasks in the file
_MOST_LEVELS = 20  # of lists and mappings in a card's metadata
_TRAINED: tuple[Column, ...] = ("adapted_few_shot", "head")
_ROUNDED = 1e-6  # mteb and the card write six decimals


def check_task(folder: TaskFolder) -> tuple[FoundAdapter, TaskResult]:
    """An adapter and what was measured of it, once every file that describes it agrees with ``result.json``.

    Raises:
        VerificationError: one says something else, or mteb cannot load what it is given.
        AdapterError, DataError: one is missing or damaged.
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
    for column, found in few_shot.items():
        _check_few_shot(f"few_shot.json, {column}", found, result, column)
    adapter = describe_adapter(folder)
    if adapter.sha256 != result.adapter.sha256:
        raise VerificationError(
            f"{name}: the adapter's files have sha256 {adapter.sha256}, but {result.adapter.sha256} was trained"
        )
    return adapter, result


def check_run(manifest: RunManifest, adapter: FoundAdapter, result: TaskResult) -> None:
    """Compare what a run's manifest says of one of its adapters.

    Raises: VerificationError: it is another one.
    """
    name, encoder = result.mteb_task.name, manifest.config.encoder
    _check(name, "manifest.json", "adapters", manifest.adapters.get(name), result.adapter.sha256)
    _check_encoder(name, "manifest.json", manifest.encoder, result)
    _check(name, "meta.json", "pooling", adapter.meta.pooling, encoder.pooling)
    _check(name, "meta.json", "max_tokens", adapter.meta.max_tokens, encoder.max_tokens)


def check_publication(folder: RunFolder, publication: Publication, results: Mapping[str, TaskResult]) -> None:
    """Compare what a publication says of some of its adapters, tables and ``mteb_results`` included.

    Args:
        folder: Where its files are, which have their hashes.
        publication: The content of ``publication.json``.
        results: MTEB task -> its result.
    Raises:
        VerificationError: it is another one.
        DataError: a table or a file of ``mteb_results`` is damaged.
    """
    for name, result in results.items():
        _check(name, "publication.json", "adapters", publication.adapters.get(name), result.adapter.sha256)
        _check_encoder(name, "publication.json", publication.encoder, result)
    _check_tables(folder, publication, results)
    _check_mteb_results(folder, publication, results)


def check_summary(folder: RunFolder, results: Mapping[str, TaskResult], *, listed: Publication | RunManifest) -> None:
    """Compare what ``classification_results.json`` says of some MTEB tasks with what was measured.

    Args:
        folder: A run or a publication.
        results: MTEB task -> its result. Averages and corrected p-values are of all MTEB tasks, and are compared where all are here.
        listed: What lists the adapters of the folder.
    Raises:
        VerificationError: it claims something else.
        DataError: it is missing or damaged.
    """
    file, summary = folder.results.name, read_record(folder.results, ClassificationResults)
    tasks = [entry.task for entry in summary.tasks]
    _check_names(file, tasks, listed)
    if summary.run_id != listed.run_id:
        raise VerificationError(f"{file}: run_id is {summary.run_id}, but this is of run {listed.run_id}")
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


def check_card(folder: RunFolder, results: Mapping[str, TaskResult]) -> None:
    """Compare the scores and the base model in the card's metadata, which the Hub reads, with what was measured.

    Args:
        folder: A run or a publication.
        results: MTEB task -> its result, of all that are in the folder.
    Raises:
        VerificationError: it claims something else.
        DataError: it is missing or damaged.
    """
    name = folder.readme.name
    measured = {_score_of(claim): claim for result in results.values() for claim in claimed_scores(result)}
    try:
        # As the Hub's own library finds it: where it finds none, nobody does.
        front = REGEX_YAML_BLOCK.search(read_file(folder.readme, at_most=LARGEST_RECORD_BYTES).decode())
        metadata = _read_yaml(front[2]) if front else {}
        models = metadata.get("model-index", [])
        claimed = model_index_to_eval_results(models)[1] if models else []
        wrong = [claim for claim in claimed if not _is_measured(claim, measured.get(_score_of(claim)))]
        base_model = metadata.get("base_model")
    except OSError as error:
        raise DataError(f"{folder.readme} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{folder.readme}: its metadata are damaged: {first_line(error)}") from None
    if front is None:
        raise VerificationError(f"{name}: has no metadata; expected them between two lines of --- at its beginning")
    if wrong:
        claim = wrong[0]
        what = f"a score of {claim.metric_value!r:.100} ({claim.metric_name!r:.100}, {claim.dataset_name!r:.100})"
        raise VerificationError(f"{name}: its metadata claim {what}, which was not measured")
    encoders = [result.encoder.public_name for result in results.values()]
    if base_model is not None and base_model not in encoders:
        raise VerificationError(
            f"{name}: its metadata name the base model {base_model!r:.100}, but it is {encoders[0]}"
        )


def _check(name: str, file: str, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise VerificationError(f"{name}: {file}: {what} is {found!r:.200}, but what was trained has {expected!r:.200}")


def _check_names(file: str, found: Collection[str], listed: Publication | RunManifest) -> None:
    if sorted(found) != sorted(listed.adapters):
        names, adapters = (", ".join(sorted(some)) for some in (found, listed.adapters))
        raise VerificationError(f"{file}: is of {names or 'nothing':.200}, but the adapters are {adapters:.200}")


def _check_fields(name: str, file: str, found: Record, expected: Record, *, but: Collection[str] = ()) -> None:
    for what in type(found).model_fields:
        value = getattr(found, what)
        if what not in but and value is not None:  # None: not known to an older version
            _check(name, file, what, value, getattr(expected, what))


def _check_encoder(name: str, file: str, found: EncoderRef, result: TaskResult) -> None:
    _check(name, file, "encoder.revision", found.revision, result.encoder.revision)
    if not found.revision.startswith(
        "sha256:"
    ):  # files are the same under any name, a commit is one of its repository's
        _check(name, file, "encoder.public_name", found.public_name, result.encoder.public_name)


def _check_rows(result: TaskResult) -> None:
    """Whether each score is of this task, run, encoder and adapter, and of another column than the others."""
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
        for what, expected in of_task.items() | {
            ("adapter_sha256", result.adapter.sha256 if row.column in _TRAINED else None)
        }:
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
    """Compare one of mteb's results, its scores and those of its draws, with the row of its column."""
    name, row = result.mteb_task.name, score_row(result, column)
    assert row is not None, f"{column} was not measured"
    _check(name, file, "task_name", found.task_name, name)
    try:
        as_mteb_loads(found)
    except ValueError as error:
        raise VerificationError(f"{name}: {file}: mteb cannot load it: {first_line(error)}") from None
    entries = found.scores.get("test", ())
    if len(entries) != 1:
        raise VerificationError(f"{name}: {file}: has scores of {len(entries)} subsets of test, but one was measured")
    (entry,) = entries
    _check(name, file, "hf_subset", entry.hf_subset, row.subset)
    measured = {"accuracy": row.accuracy, "f1": row.macro_f1, "ap": row.average_precision}
    for what, score in measured.items():
        _check_score(name, file, what, getattr(entry, what), score)
    main = mteb_main_score(result.mteb_task)
    among = [main] if main in measured else ["accuracy", "f1"]  # any where this version of mteb does not know the task
    if all(_is_other(entry.main_score, measured[what]) for what in among):
        _check_score(name, file, "main_score", entry.main_score, measured[among[0]])
    if draws := entry.scores_per_experiment:
        precisions = [draw.ap for draw in draws if draw.ap is not None]
        whole = precisions if len(precisions) == len(draws) else None
        mean = score_of_draws([draw.accuracy for draw in draws], [draw.f1 for draw in draws], whole)
        for what in ("accuracy", "macro_f1", "average_precision", "low", "high"):
            _check_score(name, file, f"{what} of scores_per_experiment", getattr(mean, what), getattr(row, what))


def _check_score(name: str, file: str, what: str, found: float | None, expected: float | None) -> None:
    if _is_other(found, expected):
        raise VerificationError(f"{name}: {file}: {what} is {found!r}, but {expected!r} was measured")


def _is_other(one: float | None, other: float | None) -> bool:
    return one != other if one is None or other is None else abs(one - other) >= _ROUNDED


def _check_tables(folder: RunFolder, publication: Publication, results: Mapping[str, TaskResult]) -> None:
    scores, epochs = read_scores(folder.scores), read_epochs(folder.epochs)
    if folder.values.exists() or any(result.values for result in results.values()):  # older versions wrote no values
        _check_values_table(folder, results)
    scored = {row.mteb_task for row in scores}
    unscored = {name for name, result in results.items() if not result.scores}  # an adapter without a head
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
            raise VerificationError(f"{path}: is not of an adapter that is published")
    for name, result in results.items():
        columns = {
            mteb_path(result, column, folder).relative_to(folder.root).as_posix(): column
            for column in _few_shot_columns(result)
        }
        for path in files:
            if PurePosixPath(path).name != f"{name}.json":
                continue
            if path not in columns:
                raise VerificationError(f"{name}: {path}: is of a model that was not measured")
            _check_few_shot(path, read_record(folder.root / path, FewShotResult), result, columns[path])
            meta = read_record((folder.root / path).with_name(MODEL_META), JsonObject).root
            model = meta.get("name"), meta.get("revision")
            _check(
                name,
                str(PurePosixPath(path).with_name(MODEL_META)),
                "name, revision",
                model,
                mteb_model(result, columns[path]),
            )


def _score_of(claim: EvalResult) -> tuple[object, ...]:
    """What a score in the card's metadata is said to be the score of: task and metric. Earlier versions wrote the task's name alone."""
    task = claim.dataset_name.removeprefix("MTEB ").removesuffix(" (own data)")
    return task, claim.dataset_split, claim.metric_type, claim.metric_name


def _is_measured(claim: EvalResult, measured: EvalResult | None) -> bool:
    if measured is None or _is_other(claim.metric_value, measured.metric_value):
        return False
    said, known = ((one.dataset_type, one.dataset_config) for one in (claim, measured))
    return said == known or not any(
        "/" in dataset for dataset, _ in (said, known)
    )  # others are no data set of the Hub's


def _read_yaml(text: str) -> Any:
    """What plain YAML says. Aliases make a small text endless, and many levels crash the parser that is written in C."""
    loader, depth = getattr(yaml, "CSafeLoader", yaml.SafeLoader), 0
    for event in yaml.parse(text, loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS or isinstance(event, yaml.AliasEvent):
            raise ValueError(f"expected at most {_MOST_LEVELS} levels and no alias")
    return yaml.load(text, loader)
