"""The summary and the score table: numbers, verdicts and what people read of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from builders import ENCODER, RUN_ID, WHEN, task_result

from pipeline.records import ClassificationResults, EncoderRef, Failure, MainMetric, TaskResult, WarmStart
from pipeline.reports.formatting import percent, points, without_local_paths
from pipeline.reports.score_table import SCORE_HEADINGS, score_table
from pipeline.reports.summary import accuracy_change, summarise, warm_start_summary


def summary_of(*results: TaskResult, failures: tuple[Failure, ...] = ()) -> ClassificationResults:
    return summarise(results, failures, encoder=ENCODER, run_id=RUN_ID, created_at=WHEN)


def test_delta_is_the_adapted_few_shot_score_minus_the_frozen_one() -> None:
    entry = summary_of(task_result()).tasks[0]
    assert entry.baseline_accuracy == 0.778
    assert entry.lora_accuracy == 0.861
    assert entry.delta == pytest.approx(0.083)
    assert entry.head_accuracy == 0.893


def test_an_average_leaves_out_tasks_without_the_column() -> None:
    full = task_result(
        "Full", accuracies={"frozen_few_shot": 0.5, "adapted_few_shot": 0.7, "frozen_full_data": 0.6, "head": 0.8}
    )
    part = task_result("Part", accuracies={"head": 0.6})
    average = summary_of(full, part).average
    assert average.head_accuracy == pytest.approx(0.7)
    assert average.full_data_probe_accuracy == 0.6
    assert average.delta == pytest.approx(0.2)


def test_a_run_in_which_nothing_finished_has_no_averages() -> None:
    summary = summary_of(failures=(Failure(mteb_task="A", stage="load", reason="no such file"),))
    assert summary.average.head_accuracy is None
    assert summary.failures[0].mteb_task == "A"
    assert score_table(summary).lines == ()


@pytest.mark.parametrize(
    ("head", "probe", "p_value", "verdict"),
    [
        (0.9, 0.8, 0.049, "above"),
        (0.8, 0.9, 0.001, "below"),
        (0.9, 0.8, 0.05, "within noise"),
        (0.8, 0.8, 0.01, "within noise"),
        (0.9, 0.8, None, None),
    ],
)
def test_the_verdict_needs_both_a_small_p_and_a_sign(
    head: float, probe: float, p_value: float | None, verdict: str | None
) -> None:
    result = task_result(accuracies={"frozen_full_data": probe, "head": head}, p_value_holm=p_value)
    assert score_table(summary_of(result), [result]).lines[0].verdict == verdict


def test_the_sign_of_the_verdict_is_the_sign_of_the_paired_counts() -> None:
    for head, probe in ((0.9, 0.8), (0.7, 0.8)):
        result = task_result(accuracies={"frozen_full_data": probe, "head": head})
        assert result.comparison is not None
        expected = "above" if result.comparison.only_head > result.comparison.only_probe else "below"
        assert score_table(summary_of(result)).lines[0].verdict == expected


def test_there_is_no_verdict_without_the_probe() -> None:
    result = task_result(accuracies={"head": 0.9})
    assert score_table(summary_of(result), [result]).lines[0].verdict is None


def test_intervals_come_from_the_results_and_are_left_out_without_them() -> None:
    result = task_result()
    with_intervals, without = (
        score_table(summary_of(result), [result]).lines[0],
        score_table(summary_of(result)).lines[0],
    )
    assert with_intervals.head is not None and without.head is not None
    assert (with_intervals.head.low, with_intervals.head.high) == (0.873, 0.911)
    assert without.head.low is None
    assert without.head.accuracy == 0.893


def test_each_line_has_one_cell_per_heading() -> None:
    table = score_table(summary_of(task_result("A"), task_result("B", accuracies={"head": 0.5})))
    assert {len(line.cells()) for line in table.lines} == {len(SCORE_HEADINGS)} == {len(table.average_cells())}


def test_cells_show_per_cent_and_a_dash_for_what_was_not_computed() -> None:
    result = task_result(accuracies={"head": 0.8931, "majority": 0.4})
    cells = dict(zip(SCORE_HEADINGS, score_table(summary_of(result), [result]).lines[0].cells(), strict=True))
    assert cells["LoRA, own head"].text == "89.3"
    assert cells["LoRA, own head"].interval == "87.3–91.1"
    assert cells["Delta"].text == "–"
    assert cells["Macro-F1, probe / head"].text == "– / 87.5"
    assert cells["Best epoch"].text == "4 of 4"


def test_rows_chosen_on_test_and_reused_rows_are_marked_and_explained() -> None:
    results = [task_result("A", selected_on="test"), task_result("B", reused_from="earlier-run"), task_result("C")]
    table = score_table(summary_of(*results), results)
    assert [line.cells()[0].text for line in table.lines] == ["A †", "B ↺", "C"]
    assert len(table.notes()) == 3
    assert "earlier-run" in table.notes()[2]


def test_an_unmarked_table_has_no_legend_and_one_without_few_shot_columns_no_notes() -> None:
    assert score_table(summary_of(task_result())).notes() == ("Few-shot texts per label: 8.",)
    assert score_table(summary_of(task_result(accuracies={"head": 0.5}))).notes() == ()


def with_samples(name: str, number: int) -> TaskResult:
    result = task_result(name)
    return result.model_copy(update={"mteb_task": result.mteb_task.model_copy(update={"samples_per_label": number})})


def test_few_shot_texts_per_label_are_told_of_each_task_where_they_differ() -> None:
    table = score_table(summary_of(with_samples("Own", 8), with_samples("Imdb", 32)))
    assert table.notes() == ("Few-shot texts per label: Own 8, Imdb 32.",)


def test_a_kept_start_is_told_below_the_table() -> None:
    table = score_table(summary_of(task_result("Kept", best_epoch=0), task_result("Trained")))
    assert [line.cells()[-1].text for line in table.lines] == ["0 of 4", "4 of 4"]
    assert table.notes()[1:] == ("Best epoch 0: no epoch was as good as the start of training, which was kept: Kept.",)


def test_a_difference_has_a_sign_and_nothing_has_none() -> None:
    assert [points(0.152), points(-0.004), points(0.0), points(-0.0001), points(None)] == [
        "+15.2",
        "-0.4",
        "0.0",
        "0.0",
        "–",
    ]
    assert [percent(0.9213), percent(0.0), percent(None)] == ["92.1", "0.0", "–"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/anna/data/x.parquet: no column 'text'", "…/x.parquet: no column 'text'"),
        ("expected '/srv/a b/y' (found /tmp/z/)", "expected '…/a b/y' (found …/)"),
        (r"C:\Users\anna\x.parquet is empty", "…/x.parquet is empty"),
        ("see file:///home/anna/x", "see …/x"),
        ("see https://huggingface.co/mteb/banking77", "see https://huggingface.co/mteb/banking77"),
        ("mteb/banking77 and/or 3/4", "mteb/banking77 and/or 3/4"),
    ],
)
def test_absolute_paths_lose_their_folders_and_web_addresses_stay(text: str, expected: str) -> None:
    assert without_local_paths(text) == expected


def test_a_summary_names_no_local_path() -> None:
    encoder = EncoderRef(name="/home/anna/encoders/minilm", public_name="minilm", revision="sha256:0")
    failure = Failure(mteb_task="A", stage="load", reason="/home/anna/a.parquet is missing")
    summary = summarise([task_result(encoder=encoder)], [failure], encoder=encoder, run_id=RUN_ID, created_at=WHEN)
    assert "/home" not in summary.model_dump_json()


def scored_on(result: TaskResult, sha256: str) -> TaskResult:
    return result.model_copy(
        update={"scores": tuple(row.model_copy(update={"test_sha256": sha256 * 64}) for row in result.scores)}
    )


def test_the_change_from_run_to_run_is_now_less_then_where_the_same_texts_were_scored() -> None:
    before = task_result("Topics", accuracies={"majority": 0.2, "head": 0.5})
    now = task_result("Topics", accuracies={"majority": 0.2, "head": 0.75}).model_copy(update={"key": "e" * 32})
    assert accuracy_change(now, None) == "first run"
    assert accuracy_change(before, before) == "unchanged"
    assert accuracy_change(now, before) == f"+25.0 (run {RUN_ID})"
    assert accuracy_change(scored_on(now, "b"), scored_on(before, "b")) == f"+25.0 (run {RUN_ID})"
    assert accuracy_change(scored_on(now, "b"), scored_on(before, "c")) == f"test data changed (run {RUN_ID}: 50.0)"


def started(start_accuracy: float | None, **changes: Any) -> TaskResult:
    result = task_result("Topics", num_epochs=3, start_accuracy=start_accuracy)
    epochs = tuple(
        row.model_copy(update={"validation_accuracy": score})
        for row, score in zip(result.epochs, (0.7, 0.8, 0.6), strict=True)
    )
    return result.model_copy(update={"epochs": epochs} | changes)


def test_what_a_warm_start_gave_is_told_of_the_best_epoch() -> None:
    warm = {"warm_start": WarmStart(sha256="f" * 64)}
    fact = "started from published adapter ffffffffffff"
    assert warm_start_summary(started(0.5, **warm)) == f"{fact}: validation 50.0 before, 80.0 after training (+30.0)"
    assert warm_start_summary(started(None, **warm)) == fact
    kept = f"{fact}: validation 85.0 before, 80.0 after training (-5.0); the start was kept"
    assert warm_start_summary(started(0.85, best_epoch=0, **warm)) == kept


def test_a_training_from_scratch_is_told_of_only_where_it_did_not_help() -> None:
    assert warm_start_summary(started(0.5)) == ""
    kept = "started from scratch: test 85.0 before, 80.0 after training (-5.0); the start was kept"
    assert warm_start_summary(started(0.85, best_epoch=0, selected_on="test")) == kept


def test_a_result_of_an_older_version_keeps_its_score_at_the_start() -> None:
    older = started(None).model_dump(mode="json")
    del older["start_accuracy"]
    older["warm_start"] = {"sha256": "f" * 64, "validation_accuracy": 0.5}
    assert TaskResult.model_validate_json(json.dumps(older)) == started(0.5, warm_start=WarmStart(sha256="f" * 64))


def judged(metric: MainMetric | None, *, p_value: float, **macro_f1: float) -> TaskResult:
    """A head that is above the probe in accuracy, by a test whose p is 0.001; of macro-F1 and its test as given."""
    result = task_result("Topics")
    rows = []
    for row in result.scores:
        changes: dict[str, Any] = {"macro_f1": macro_f1.get(row.column, row.macro_f1)}
        if row.column == "head":
            changes |= {"main_metric": metric, "p_value_main": p_value / 2, "p_value_main_holm": p_value}
        rows.append(row.model_copy(update=changes))
    return result.model_copy(update={"scores": tuple(rows)})


@pytest.mark.parametrize(
    ("metric", "p_value", "macro_f1", "told"),
    [
        ("macro_f1", 0.01, {"head": 0.4, "frozen_full_data": 0.5}, "below (macro-F1)"),
        ("macro_f1", 0.01, {"head": 0.5, "frozen_full_data": 0.4}, "above (macro-F1)"),
        ("macro_f1", 0.2, {"head": 0.4, "frozen_full_data": 0.5}, "within noise (macro-F1)"),
        ("accuracy", 0.01, {"head": 0.4, "frozen_full_data": 0.5}, "above"),
        (None, 0.2, {"head": 0.4, "frozen_full_data": 0.5}, "above"),
    ],
)
def test_the_verdict_is_about_the_main_metric(
    metric: MainMetric | None, p_value: float, macro_f1: dict[str, float], told: str
) -> None:
    (line,) = score_table(summary_of(judged(metric, p_value=p_value, **macro_f1))).lines
    cells = dict(zip(SCORE_HEADINGS, line.cells(), strict=True))
    assert cells["Head against probe"].text == told
    assert cells["Macro-F1, probe / head"].text == "{frozen_full_data:.1%} / {head:.1%}".format(**macro_f1).replace(
        "%", ""
    )
    assert (line.p_value, line.p_value_holm) == (p_value / 2, p_value if metric else 0.001)


def test_a_summary_of_an_older_version_still_has_its_verdict() -> None:
    values = summary_of(task_result()).model_dump(mode="json")
    for name in (
        "samples_per_label",
        "full_data_probe_macro_f1",
        "head_macro_f1",
        "main_metric",
        "p_value_main",
        "p_value_main_holm",
    ):
        del values["tasks"][0][name]
    table = score_table(ClassificationResults.model_validate_json(json.dumps(values)))
    assert (table.lines[0].verdict, table.notes()) == ("above", ())
