"""``lorafleet show``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.commands.options import Command
from flows.terminal import complain, say, say_json, say_table
from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.records import ScoreRow, ValueRow
    from pipeline.reports.score_table import ScoreTable
    from pipeline.store.run_folder import RunFolder


@click.command(cls=Command)
@click.argument("place", metavar="RUN|RUNS", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def show(place: Path, as_json: bool) -> None:
    """Print the scores of a run, or the history.

    For a run store, print the scores of each MTEB task over its runs.

    Example: lorafleet show runs
    """
    from pipeline.store.run_folder import RunFolder

    if RunFolder(place).results.is_file():
        show_run(place, as_json=as_json)
    else:
        _show_history(place, as_json=as_json)


def show_run(run: Path, *, as_json: bool) -> None:
    """Print the score table of a run, or of a publication."""
    from pipeline.records import ClassificationResults, TaskResult
    from pipeline.reports.score_table import score_table
    from pipeline.reports.vector_table import VECTOR_HEADINGS
    from pipeline.store.files import read_record
    from pipeline.store.run_folder import RunFolder

    folder = RunFolder(run)
    summary = read_record(folder.results, ClassificationResults)
    if as_json:
        say_json(results_json(run))
        return
    files = [folder.task(entry.task).result for entry in summary.tasks]
    results = [read_record(file, TaskResult) for file in files if file.is_file()]  # a publication may lack them
    vectors = _vector_rows(folder)
    if summary.tasks or not vectors:
        _print_table(score_table(summary, results))
    if vectors:
        say_table(VECTOR_HEADINGS, vectors)
    for failure in summary.failures:
        complain(f"failed: {failure.mteb_task} ({failure.stage}): {failure.reason}")


def results_json(run: Path) -> dict[str, Any]:
    """The content of ``classification_results.json``, and the embedding adapters of the run as ``vectors``."""
    from pipeline.records import ClassificationResults, RunResults
    from pipeline.store.files import read_record
    from pipeline.store.run_folder import RunFolder

    folder = RunFolder(run)
    summary = read_record(folder.results, ClassificationResults).model_dump(mode="json")
    if folder.all_results.is_file():
        tasks = read_record(folder.all_results, RunResults).tasks
        if vectors := [entry.model_dump(mode="json") for entry in tasks if entry.family != "classification"]:
            summary["vectors"] = vectors
    return summary


def _vector_rows(folder: RunFolder) -> list[tuple[str, ...]]:
    """Rows of the table of embedding adapters. Empty for a run of an older version."""
    from pipeline.records import RunResults
    from pipeline.reports.vector_table import vector_rows
    from pipeline.store.files import read_record

    return vector_rows(read_record(folder.all_results, RunResults).tasks) if folder.all_results.is_file() else []


def _print_table(table: ScoreTable) -> None:
    from pipeline.reports.score_table import SCORE_HEADINGS

    lines = [*(line.cells() for line in table.lines), table.average_cells()]
    say_table(
        SCORE_HEADINGS,
        [[f"{cell.text} {cell.interval}".strip() if cell.interval else cell.text for cell in cells] for cells in lines],
    )
    for note in table.notes():
        say(note)


def _show_history(runs: Path, *, as_json: bool) -> None:
    from pipeline.history.tables import read_history, read_task_history, read_vector_history
    from pipeline.history.timeline import changed_test_data
    from pipeline.store.folders import explain

    scores, vectors = read_history(runs), read_vector_history(runs)
    if not scores and not vectors:
        raise InputError(f"cannot show it: {explain(runs)}; expected a run, a publication, or a run store")
    changed = changed_test_data(scores, read_task_history(runs))
    if as_json:
        rows: list[ScoreRow | ValueRow] = [*scores, *vectors]
        say_json(
            [
                row.model_dump(mode="json") | {"test_data_changed": (row.mteb_task, row.run_id) in changed}
                for row in rows
            ]
        )
        return
    if scores:
        columns = ("frozen_few_shot", "adapted_few_shot", "frozen_full_data", "head")
        by_run: dict[tuple[str, ...], dict[str, float]] = {}
        for row in scores:
            by_run.setdefault((row.mteb_task, row.run_id), {})[row.column] = row.accuracy
        _say_history(("MTEB task", "run"), columns, by_run, changed)
    if vectors:
        of_vectors: dict[tuple[str, ...], dict[str, float]] = {}
        for value in vectors:
            of_vectors.setdefault((value.mteb_task, value.run_id, value.metric), {})[value.column] = value.value
        _say_history(("MTEB task", "run", "metric"), ("frozen", "adapted"), of_vectors, changed)


def _say_history(
    headings: Sequence[str],
    columns: Sequence[str],
    by_run: Mapping[tuple[str, ...], Mapping[str, float]],
    changed: Collection[tuple[str, str]],
) -> None:
    """Print one line per task and run, sorted by task. The runs of each task stay oldest first."""
    from pipeline.reports.formatting import percent

    lines = []
    for key, values in sorted(by_run.items(), key=lambda line: line[0][0]):
        note = "test data changed" if key[:2] in changed else ""  # not comparable with the previous line
        lines.append((*key, *(percent(values[c]) if c in values else "" for c in columns), note))
    say_table((*headings, *columns, ""), lines)
