"""Output files of a run: metrics, results, model card, report, and mteb's results."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.evaluation.significance import holm
from pipeline.history.tables import write_epochs, write_scores, write_values
from pipeline.history.values import values_of
from pipeline.records import (
    ClassificationResults,
    EncoderRef,
    Failure,
    FewShot,
    FewShotColumn,
    FewShotResult,
    MtebTask,
    TaskResult,
)
from pipeline.reports.model_card import render_card
from pipeline.reports.report import render_report
from pipeline.reports.summary import is_of_mteb, main_difference, summarise, summarise_all
from pipeline.store.files import read_record, write_atomically
from pipeline.store.run_folder import RunFolder, TaskFolder

MODEL_META = "model_meta.json"
"""Name of the file that tells mteb which model the results in the same folder belong to."""


def write_outputs(
    results: Sequence[TaskResult],
    failures: Sequence[Failure],
    folder: RunFolder,
    *,
    encoder: EncoderRef,
    run_id: str,
    created_at: datetime,
    adapted_modules: Sequence[str],
    trust_remote_code: bool,
    license: str | None,
) -> tuple[ClassificationResults, tuple[TaskResult, ...]]:
    """Write metrics, results, model card and report. Equal results give equal files.

    Returns: The content of ``classification_results.json``, and the results with p-values corrected over MTEB tasks.
    """
    corrected = correct_over_tasks(results)
    facts: dict[str, Any] = {"encoder": encoder, "run_id": run_id, "created_at": created_at}
    summary = summarise(corrected, failures, **facts)
    folder.metrics.mkdir(parents=True, exist_ok=True)
    write_scores([row for result in corrected for row in result.scores], folder.scores)
    write_values([row for result in corrected for row in values_of(result)], folder.values)
    write_epochs(run_id, {result.mteb_task.name: result.epochs for result in corrected}, folder.epochs)
    write_atomically(folder.results, summary.model_dump_json(indent=1))
    everything = summarise_all(corrected, failures, **facts)
    write_atomically(folder.all_results, everything.model_dump_json(indent=1))
    card = render_card(
        corrected, summary, adapted_modules=adapted_modules, trust_remote_code=trust_remote_code, license=license
    )
    write_atomically(folder.readme, card)
    write_atomically(folder.report, render_report(corrected, summary))
    return summary, corrected


def write_mteb_results(result: TaskResult, source: TaskFolder, folder: RunFolder) -> None:
    """Write the few-shot scores for mteb's ``ResultCache(cache_path=…)``. The own head is not an mteb protocol.

    The frozen encoder is a model with its own name and revision. The adapted encoder is another model, whose revision
    is the adapter's hash.
    """
    from mteb.models import ModelMeta

    public_name = result.encoder.public_name
    for column, few_shot in read_record(source.few_shot, FewShot).root.items():
        name, revision = mteb_model(result, column)
        meta = ModelMeta.create_empty(
            {"name": name, "revision": revision, "adapted_from": public_name if "adapted" in column else None}
        )
        path = mteb_path(result, column, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        as_mteb_loads(few_shot).to_disk(path)
        write_atomically(path.with_name(MODEL_META), json.dumps(meta.to_dict(), indent=1, sort_keys=True, default=str))


def mteb_model(result: TaskResult, column: FewShotColumn) -> tuple[str, str]:
    """Name and revision of the model of a few-shot column."""
    public_name = result.encoder.public_name
    if column == "frozen_few_shot":
        return public_name if "/" in public_name else f"local/{public_name}", _commit_like(result.encoder.revision)
    return f"lorafleet/{public_name.rpartition('/')[2]}-{result.mteb_task.name}", result.adapter.sha256[:40]


def mteb_path(result: TaskResult, column: FewShotColumn, folder: RunFolder) -> Path:
    """Path at which mteb looks for the result of a few-shot column."""
    from mteb.cache import ResultCache

    name, revision = mteb_model(result, column)
    return ResultCache(cache_path=folder.mteb_results).get_task_result_path(result.mteb_task.name, name, revision)


def as_mteb_loads(few_shot: FewShotResult) -> Any:
    """Convert a result to mteb's own class.

    Raises: ValueError: mteb cannot load it.
    """
    from mteb.results import TaskResult as MtebTaskResult

    return MtebTaskResult.model_validate(few_shot.model_dump(mode="json"))


def mteb_main_score(task: MtebTask) -> str | None:
    """Name of the score by which mteb compares models. None if this version of mteb does not know the task."""
    import mteb

    if not is_of_mteb(task):
        return "accuracy"  # the main score of tasks that lorafleet defines
    try:
        return str(mteb.get_task(task.name).metadata.main_score)
    except KeyError:
        return None


def correct_over_tasks(results: Sequence[TaskResult]) -> tuple[TaskResult, ...]:
    """Correct p-values over the MTEB tasks by Holm's method: of McNemar's test, and of the main metric of each task."""
    comparisons = [result.comparison for result in results]
    accuracy = holm([comparison.p_value if comparison else None for comparison in comparisons])
    main = holm([_main_p_value(result) for result in results])
    corrected = []
    for result, p_value, p_value_main in zip(results, accuracy, main, strict=True):
        values = {"p_value_holm": p_value, "p_value_main_holm": p_value_main}
        rows = tuple(row.changed(**values) if row.column == "head" else row for row in result.scores)
        differences = tuple(d.changed(p_value_holm=p_value_main) if d.width is None else d for d in result.differences)
        corrected.append(result.changed(scores=rows, differences=differences))
    return tuple(corrected)


def _main_p_value(result: TaskResult) -> float | None:
    if result.comparison is not None:
        return result.comparison.main_p_value
    difference = main_difference(result)
    return None if difference is None else difference.p_value


def _commit_like(revision: str) -> str:
    return re.sub(r"^sha256:", "", revision)[:40]
