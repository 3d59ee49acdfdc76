"""The summary and the score table: numbers, verdicts and what people read of them."""

from __future__ import annotations

import pytest
from builders import ENCODER, RUN_ID, WHEN, task_result

from pipeline.records import ClassificationResults, EncoderRef, Failure, TaskResult, WarmStart
from pipeline.results import SCORE_HEADINGS, head_change, percent, points, said_of_warm_start, score_table, summarise, without_local_paths


def summary_of(*results: TaskResult, failures: tuple[Failure, ...] = ()) -> ClassificationResults:
    return summarise(results, failures, encoder=ENCODER, run_id=RUN_ID, created_at=WHEN)


def test_delta_is_the_adapted_few_shot_score_minus_the_frozen_one() -> None:
    entry = summary_of(task_result()).tasks[0]
    assert entry.baseline_accuracy == 0.778
    assert entry.lora_accuracy == 0.861
    assert entry.delta == pytest.approx(0.083)
    assert entry.head_accuracy == 0.893


def test_an_average_leaves_out_tasks_without_the_column() -> None:
    full = task_result("Full", accuracies={"frozen_few_shot": 0.5, "adapted_few_shot": 0.7, "frozen_full_data": 0.6, "head": 0.8})
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
def test_the_verdict_needs_both_a_small_p_and_a_sign(head: float, probe: float, p_value: float | None, verdict: str | None) -> None:
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
    with_intervals, without = score_table(summary_of(result), [result]).lines[0], score_table(summary_of(result)).lines[0]
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
    assert cells["Best epoch"].text == "4 of 4"


def test_rows_chosen_on_test_and_reused_rows_are_marked_and_explained() -> None:
    results = [task_result("A", selected_on="test"), task_result("B", reused_from="earlier-run"), task_result("C")]
    table = score_table(summary_of(*results), results)
    assert [line.cells()[0].text for line in table.lines] == ["A †", "B ↺", "C"]
    assert len(table.notes()) == 2
    assert "earlier-run" in table.notes()[1]


def test_an_unmarked_table_has_no_legend() -> None:
    assert score_table(summary_of(task_result())).notes() == ()


def test_a_difference_has_a_sign_and_nothing_has_none() -> None:
    assert [points(0.152), points(-0.004), points(0.0), points(-0.0001), points(None)] == ["+15.2", "-0.4", "0.0", "0.0", "–"]
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
    return result.model_copy(update={"scores": tuple(row.model_copy(update={"test_sha256": sha256 * 64}) for row in result.scores)})


def test_the_change_from_run_to_run_is_now_less_then_where_the_same_texts_were_scored() -> None:
    before = task_result("Topics", accuracies={"majority": 0.2, "head": 0.5})
    now = task_result("Topics", accuracies={"majority": 0.2, "head": 0.75}).model_copy(update={"key": "e" * 32})
    assert head_change(now, None) == "first run"
    assert head_change(before, before) == "unchanged"
    assert head_change(now, before) == f"+25.0 (run {RUN_ID})"
    assert head_change(scored_on(now, "b"), scored_on(before, "b")) == f"+25.0 (run {RUN_ID})"
    assert head_change(scored_on(now, "b"), scored_on(before, "c")) == f"test data changed (run {RUN_ID}: 50.0)"


def test_what_a_warm_start_gave_is_told_of_the_best_epoch() -> None:
    result = task_result("Topics", num_epochs=3)
    epochs = tuple(row.model_copy(update={"validation_accuracy": score}) for row, score in zip(result.epochs, (0.7, 0.8, 0.6), strict=True))
    warm = result.model_copy(update={"epochs": epochs, "warm_start": WarmStart(sha256="f" * 64, validation_accuracy=0.5)})
    assert said_of_warm_start(warm).endswith("validation 50.0 before, 80.0 after training (+30.0)")
