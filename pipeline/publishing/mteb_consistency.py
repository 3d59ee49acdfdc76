"""mteb's results in a publication, against what was measured of its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import get_args

from pipeline.errors import VerificationError, first_line
from pipeline.evaluation.scores import score_of_draws
from pipeline.records import FewShotColumn, FewShotResult, JsonObject, Publication, TaskResult
from pipeline.reports.summary import score_row
from pipeline.run.outputs import MODEL_META, as_mteb_loads, mteb_main_score, mteb_model, mteb_path
from pipeline.store.files import read_record
from pipeline.store.run_folder import RunFolder

_ROUNDED = 1e-6  # mteb and the model card write six decimals


def check_mteb_results(folder: RunFolder, publication: Publication, results: Mapping[str, TaskResult]) -> None:
    """Compare the files of ``mteb_results`` with the results of MTEB tasks.

    Raises:
        VerificationError: they disagree, or a file belongs to no published adapter.
        DataError: a file is damaged.
    """
    files = [path for path in publication.files if path.startswith(f"{folder.mteb_results.name}/")]
    names = {f"{name}.json" for name in publication.adapters}
    for path in files:
        if PurePosixPath(path).name not in names | {MODEL_META}:
            raise VerificationError(f"{path}: does not belong to a published adapter")
    for name, result in results.items():
        columns = {
            mteb_path(result, column, folder).relative_to(folder.root).as_posix(): column
            for column in few_shot_columns(result)
        }
        for path in files:
            if PurePosixPath(path).name != f"{name}.json":
                continue
            if path not in columns:
                raise VerificationError(f"{name}: {path}: belongs to a model that was not measured")
            check_few_shot(path, read_record(folder.root / path, FewShotResult), result, columns[path])
            meta = read_record((folder.root / path).with_name(MODEL_META), JsonObject).root
            model = meta.get("name"), meta.get("revision")
            meta_path = PurePosixPath(path).with_name(MODEL_META)
            check_fact(name, str(meta_path), "name, revision", model, mteb_model(result, columns[path]))


def few_shot_columns(result: TaskResult) -> list[FewShotColumn]:
    """Few-shot columns that were measured."""
    return [column for column in get_args(FewShotColumn) if score_row(result, column) is not None]


def check_few_shot(file: str, found: FewShotResult, result: TaskResult, column: FewShotColumn) -> None:
    """Compare an mteb result, scores of the draws included, with the score row of its column."""
    name, row = result.mteb_task.name, score_row(result, column)
    assert row is not None, f"{column} was not measured"
    check_fact(name, file, "task_name", found.task_name, name)
    try:
        as_mteb_loads(found)
    except ValueError as error:
        raise VerificationError(f"{name}: {file}: mteb cannot load it: {first_line(error)}") from None
    entries = found.scores.get("test", ())
    if len(entries) != 1:
        raise VerificationError(f"{name}: {file}: has scores for {len(entries)} subsets of test, but one was measured")
    (entry,) = entries
    check_fact(name, file, "hf_subset", entry.hf_subset, row.subset)
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


def check_fact(name: str, file: str, what: str, found: object, expected: object) -> None:
    """Raises: VerificationError: what a file says of an adapter is not what was measured."""
    if found != expected:
        raise VerificationError(
            f"{name}: {file}: {what} is {found!r:.200}, but the trained adapter has {expected!r:.200}"
        )
