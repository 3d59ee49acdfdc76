"""History over runs: comparable scores, drift, cost, and the page that shows them."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from builders import CPU_FLOAT32, ENCODER, MINILM_MODULES, check_golden, finished_run, task_result
from commands import run, write_config, write_task
from test_dataset import load_own, numbered
from test_report import HOSTILE, figures, parse, texts

from pipeline.config import load_config
from pipeline.encoder.runtime import choose_runtime
from pipeline.history.tables import append_history, append_mteb_tasks, mteb_tasks_of_run, read_mteb_tasks, scores_of_run
from pipeline.history.timeline import (
    StoreHistory,
    TaskHistory,
    changed_test_data,
    label_drift,
    most_moved_labels,
    read_store,
    task_histories,
)
from pipeline.history.values import values_of_scores
from pipeline.records import Column, DataSummary, Failure, LabelShare, MtebTaskRow, ScoreRow, TaskResult
from pipeline.reports.history_page import NEWEST_RUNS, render_history, write_history_page
from pipeline.run.collect import collect, finish_run
from pipeline.run.job import TaskJob
from pipeline.run.plan import Plan, job_spec
from pipeline.run.preflight import preflight
from pipeline.store.files import read_record
from pipeline.store.manifest import RunManifest, write_manifest
from pipeline.store.run_folder import RunFolder

MONDAY = datetime(2026, 3, 2, 4, 30, tzinfo=UTC)


def run_name(week: int) -> str:
    return f"{MONDAY + timedelta(weeks=week):%Y%m%d-%H%M%S}-{week:04x}"


def scores(
    week: int,
    name: str = "Tickets",
    *,
    head: float = 0.9,
    columns: Sequence[Column] = ("frozen_full_data", "adapted_few_shot", "head"),
    sha256: str | None = "a" * 64,
    num_texts: int = 500,
    reused_from: int | None = None,
) -> list[ScoreRow]:
    """The rows of one MTEB task in the run of a week; taken-over ones keep the time of the run that measured them."""
    (template, *_) = task_result(name).scores
    below: dict[Column, float] = {"head": 0.0, "adapted_few_shot": 0.03, "frozen_full_data": 0.055}
    changes = {
        "run_id": run_name(week),
        "num_texts": num_texts,
        "test_sha256": sha256,
        "reused_from": None if reused_from is None else run_name(reused_from),
        "created_at": MONDAY + timedelta(weeks=week if reused_from is None else reused_from),
    }
    accuracies = {column: head - below[column] for column in columns}
    return [
        ScoreRow.model_validate(
            template.model_dump()
            | changes
            | {"column": column, "accuracy": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.018}
        )
        for column, accuracy in accuracies.items()
    ]


def facts(
    week: int,
    name: str = "Tickets",
    *,
    shares: Mapping[str, float] | None = None,
    tokens: tuple[int, int, int] = (6, 14, 40),
    num_train: int = 4500,
    seconds: float = 240.0,
    sha256: str | None = "a" * 64,
    num_texts: int = 500,
    reused_from: int | None = None,
) -> MtebTaskRow:
    """Data and work of one MTEB task in the run of a week."""
    shares = {"billing": 0.5, "delivery": 0.5} if shares is None else shares
    return MtebTaskRow(
        run_id=run_name(week),
        mteb_task=name,
        created_at=MONDAY + timedelta(weeks=week),
        num_train=num_train,
        num_validation=num_train // 9,
        num_test=num_texts,
        num_classes=len(shares),
        label_shares=tuple(LabelShare(label=label, share=share) for label, share in shares.items()),
        tokens_p10=tokens[0],
        tokens_p50=tokens[1],
        tokens_p90=tokens[2],
        num_truncated_train=0,
        num_overlap=0,
        fingerprint="e" * 64,
        test_sha256=sha256,
        worker_seconds=seconds if reused_from is None else 0.0,
        gpu_seconds=0.0,
        peak_memory_bytes=900_000_000 + 3_000_000 * week,
        reused_from=None if reused_from is None else run_name(reused_from),
    )


def finish(runs: Path, week: int, *, failures: Sequence[Failure] = ()) -> None:
    """Write the files that the page looks for in a run folder: a manifest and a report."""
    folder = RunFolder(runs / run_name(week))
    folder.root.mkdir(parents=True)
    folder.report.write_text("a report", encoding="utf-8")
    manifest = RunManifest(
        run_id=run_name(week),
        created_at=MONDAY + timedelta(weeks=week, minutes=20),
        config=load_config("quickstart"),
        encoder=ENCODER,
        runtime=CPU_FLOAT32,
        mteb_tasks=(),
        adapters={},
        reused={},
        failures=tuple(failures),
        versions={},
        lorafleet_version="0",
        sources_sha256="0",
        seconds=1.0,
    )
    write_manifest(manifest, folder)


def season(runs: Path) -> StoreHistory:
    """Twelve weekly runs of three MTEB tasks, written as a run writes them.

    Reviews gets another test file. Tickets gains a label, loses one, and fails once. Spam never changes. The folder of
    one run was pruned.
    """
    wobble = (0, 4, -3, 2, 6, 5, -2, 3, 1, 7, 4, 8)
    for week in range(12):
        before = week < 7
        refunds = 0.0 if week < 5 else 0.02 + 0.012 * (week - 5)
        tickets = {
            "billing": 0.46 - 0.012 * week,
            "delivery": 0.31,
            "login": 0.17 + 0.004 * week,
            "other": 0.06 + 0.008 * week - refunds,
        }
        if refunds:
            tickets["refund (since the new terms of sale)"] = refunds
        if week >= 9:
            tickets["delivery"] += tickets.pop("other")
        tests = {"sha256": ("a" if before else "b") * 64, "num_texts": 500 if before else 640}
        taken = None if week == 0 else 0
        rows = [
            *scores(week, "Reviews", head=0.812 + wobble[week] / 1000, **tests),
            *scores(week, "Spam", head=0.974, reused_from=taken, sha256="c" * 64),
        ]
        of_tasks = [
            facts(
                week,
                "Reviews",
                shares={"bad": 0.4, "good": 0.6},
                tokens=(21, 60 + 2 * week, 128),
                seconds=900 + 20 * week,
                **tests,
            ),
            facts(
                week,
                "Spam",
                shares={"ham": 0.8, "spam": 0.2},
                tokens=(9, 22, 64),
                seconds=130,
                reused_from=taken,
                sha256="c" * 64,
            ),
        ]
        failures = []
        if week == 3:
            failures.append(Failure(mteb_task="Tickets", stage="load data", reason="the test file does not exist"))
        else:
            rows += scores(week, "Tickets", head=0.871 + wobble[-week] / 800)
            sizes = {"tokens": (6, 14, 40 + week // 2), "num_train": 4500 + 210 * week}
            of_tasks.append(facts(week, "Tickets", shares=tickets, seconds=310, **sizes))
        append_history(runs, run_name(week), rows)
        append_mteb_tasks(runs, run_name(week), of_tasks)
        if week != 1:  # pruned
            finish(runs, week, failures=failures)
    return read_store(runs, newest=NEWEST_RUNS)


def one_task(rows: Sequence[ScoreRow], of_tasks: Sequence[MtebTaskRow] = ()) -> TaskHistory:
    when = {row.run_id: row.created_at for row in rows}
    (task,) = task_histories(rows, values_of_scores(rows), of_tasks, when)
    return task


def page_of(*tasks: TaskHistory) -> str:
    return render_history(StoreHistory(runs=(), tasks=tasks, num_older=0, faults=()))


def changed_weeks(*weeks: Sequence[ScoreRow]) -> list[int]:
    changed = changed_test_data([row for rows in weeks for row in rows])
    return [week for week in range(len(weeks)) if ("Tickets", run_name(week)) in changed]


# --- which scores may be compared ---


def test_a_run_is_marked_where_its_test_data_are_not_those_of_the_run_before() -> None:
    a, b = "a" * 64, "b" * 64
    assert changed_weeks(*(scores(week, sha256=sha256) for week, sha256 in enumerate((a, a, b, b, a)))) == [2, 4]
    assert changed_weeks(scores(0)) == []


def test_the_order_is_that_of_the_runs_and_not_of_the_times_at_which_scores_were_measured() -> None:
    a, b = "a" * 64, "b" * 64
    weeks = [scores(0, sha256=a), scores(1, sha256=b), scores(2, sha256=a, reused_from=0), scores(3, sha256=a)]
    assert changed_weeks(*weeks) == changed_weeks(*reversed(weeks)) == [1, 2]


def test_a_run_from_a_clock_that_was_ahead_comes_first_in_the_history(tmp_path: Path) -> None:
    a, b = "a" * 64, "b" * 64
    ahead = 52 * 70
    weeks = [scores(ahead, sha256=b), scores(0, sha256=a), scores(1, sha256=a)]
    rows = [row for of_week in weeks for row in of_week]
    assert changed_test_data(rows) == {("Tickets", run_name(0))}
    assert [point.run_id for point in one_task(rows).points] == [run_name(week) for week in (ahead, 0, 1)]
    for week, of_week in zip((ahead, 0, 1), weeks, strict=True):
        append_history(tmp_path, run_name(week), of_week)
    assert [line.run_id for line in read_store(tmp_path, newest=2).runs] == [run_name(1), run_name(0)]


def test_a_file_that_was_renamed_to_another_run_is_left_out_and_named(tmp_path: Path) -> None:
    for week in (0, 1):
        append_history(tmp_path, run_name(week), scores(week))
        append_mteb_tasks(tmp_path, run_name(week), [facts(week)])
    for place in (scores_of_run, mteb_tasks_of_run):
        place(tmp_path, run_name(1)).rename(place(tmp_path, run_name(5200)))
    history = read_store(tmp_path, newest=NEWEST_RUNS)
    assert [line.run_id for line in history.runs] == [run_name(0)]
    told = f"holds rows of run {run_name(1)}; rename it to match its run, or move it away"
    assert history.faults == (f"{scores_of_run(tmp_path, run_name(5200))}: {told}",)
    mteb_tasks_of_run(tmp_path, run_name(5200)).rename(mteb_tasks_of_run(tmp_path, run_name(0)))
    assert read_store(tmp_path, newest=NEWEST_RUNS).faults[-1] == f"{mteb_tasks_of_run(tmp_path, run_name(0))}: {told}"


def test_another_number_of_test_texts_tells_where_an_older_version_kept_no_hash() -> None:
    assert changed_weeks(scores(0, sha256=None), scores(1, sha256=None), scores(2, sha256=None, num_texts=400)) == [2]
    assert changed_weeks(scores(0, sha256=None), scores(1), scores(2)) == []


def test_a_hash_is_compared_with_the_newest_known_one() -> None:
    assert changed_weeks(scores(0, sha256="a" * 64), scores(1, sha256=None), scores(2, sha256="b" * 64)) == [2]
    assert changed_weeks(
        scores(0, sha256="a" * 64), scores(1, sha256=None, num_texts=9), scores(2, sha256="b" * 64, num_texts=9)
    ) == [1]


def test_the_hash_of_the_test_data_is_of_its_texts_and_labels_alone(tmp_path: Path) -> None:
    train, test = numbered({"b": 20, "c": 20}), numbered({"b": 3, "c": 3})
    data = load_own(tmp_path, train=train, test=test)
    with_new_label = load_own(tmp_path, train=numbered({"a": 20, "b": 20, "c": 20}), test=test)
    reordered = load_own(tmp_path, train=train, test={name: column[::-1] for name, column in test.items()})
    other_label = load_own(tmp_path, train=train, test=test | {"label": [*test["label"][:-1], "b"]})
    other_text = load_own(tmp_path, train=train, test=test | {"text": [*test["text"][:-1], "another"]})
    assert data.test_fingerprint == with_new_label.test_fingerprint == reordered.test_fingerprint
    assert data.fingerprint != with_new_label.fingerprint
    assert len({data.test_fingerprint, other_label.test_fingerprint, other_text.test_fingerprint}) == 3


# --- what moved ---


def test_total_variation_is_the_share_of_texts_that_would_need_another_label() -> None:
    old, new = facts(0, shares={"a": 0.5, "b": 0.3, "c": 0.2}), facts(1, shares={"a": 0.4, "b": 0.3, "d": 0.3})
    drift = label_drift(old, new)
    assert (drift.total_variation, drift.new, drift.vanished) == (pytest.approx(0.3), ("d",), ("c",))
    assert label_drift(new, old).total_variation == pytest.approx(0.3)
    assert label_drift(old, old).total_variation == 0
    assert label_drift(old, facts(1, shares={"x": 1.0})).total_variation == pytest.approx(1)


def test_the_most_moved_labels_span_the_widest_range_of_shares() -> None:
    weeks = (
        {"a": 0.6, "b": 0.3, "c": 0.1},
        {"a": 0.5, "b": 0.4, "c": 0.1},
        {"a": 0.55, "b": 0.2, "c": 0.1, "new": 0.15},
    )
    task = one_task(
        [row for week in range(3) for row in scores(week)],
        [facts(week, shares=shares) for week, shares in enumerate(weeks)],
    )
    assert most_moved_labels(task.points, most=3) == ("b", "new", "a")


def test_labels_are_compared_with_the_newest_run_that_knows_its_own() -> None:
    rows = [row for week in range(3) for row in scores(week)]
    task = one_task(rows, [facts(0, shares={"a": 1.0}), facts(1, shares={}), facts(2, shares={"a": 0.5, "b": 0.5})])
    assert [point.drift and point.drift.total_variation for point in task.points] == [None, None, pytest.approx(0.5)]


# --- what a run records ---


def results_in(folder: RunFolder, *results: TaskResult) -> list[TaskResult]:
    """The same results as this run's own."""
    return [TaskResult.model_validate(result.model_dump() | {"run_id": folder.root.name}) for result in results]


def row_of(tmp_path: Path, result: TaskResult, *, gpus_per_worker: float | str = "auto") -> MtebTaskRow:
    folder = RunFolder(tmp_path / "one")
    config = load_config("quickstart", overrides=(f"compute.gpus_per_worker={gpus_per_worker}",))
    collect(
        Plan(config, ENCODER, MINILM_MODULES, CPU_FLOAT32, ()),
        results_in(folder, result),
        [],
        run_id="one",
        folder=folder,
    )
    (row,) = read_mteb_tasks(folder.mteb_tasks)
    return row


def with_values(result: TaskResult, **values: Any) -> TaskResult:
    return TaskResult.model_validate(result.model_dump() | values)


def test_a_row_says_what_the_data_and_the_work_were(tmp_path: Path) -> None:
    result = task_result("Tickets", labels=("x", "y"))
    data = result.data.model_dump() | {
        "label_counts": (6000, 3000),
        "token_quantiles": (5, 9, 30),
        "test_fingerprint": "b" * 64,
    }
    row = row_of(tmp_path, with_values(result, data=data))
    assert [(share.label, share.share) for share in row.label_shares] == [
        ("x", pytest.approx(2 / 3)),
        ("y", pytest.approx(1 / 3)),
    ]
    assert (row.tokens_p10, row.tokens_p50, row.tokens_p90, row.test_sha256) == (5, 9, 30, "b" * 64)
    assert (row.worker_seconds, row.gpu_seconds, row.peak_memory_bytes) == (93.4, 0.0, 600_000_000)


def test_gpu_seconds_are_the_workers_times_its_share_of_a_gpu(tmp_path: Path) -> None:
    on_gpu = with_values(task_result(), runtime=CPU_FLOAT32.model_dump() | {"device": "cuda"})
    assert row_of(tmp_path / "a", on_gpu).gpu_seconds == 93.4
    assert row_of(tmp_path / "b", on_gpu, gpus_per_worker=0.25).gpu_seconds == pytest.approx(93.4 / 4)
    assert row_of(tmp_path / "c", task_result(), gpus_per_worker=0.25).gpu_seconds == 0


def test_what_was_taken_over_cost_nothing(tmp_path: Path) -> None:
    row = row_of(
        tmp_path, with_values(task_result(), reused_from="zero", runtime=CPU_FLOAT32.model_dump() | {"device": "cuda"})
    )
    assert (row.worker_seconds, row.gpu_seconds, row.reused_from) == (0, 0, "zero")


def test_a_result_of_an_older_version_is_read_and_its_row_says_that_nothing_is_known(tmp_path: Path) -> None:
    older = json.loads(task_result().model_dump_json())
    for name in ("label_counts", "token_quantiles", "test_fingerprint"):
        del older["data"][name]
    row = row_of(tmp_path, TaskResult.model_validate_json(json.dumps(older)))
    assert (row.label_shares, row.tokens_p50, row.test_sha256) == ((), None, None)


def test_a_job_counts_the_labels_and_measures_the_texts_of_train(
    encoder_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    task = write_task(tmp_path, "Topics", num_train=60)
    config = load_config(str(write_config(tmp_path / "c.toml", encoder_folder("bert"), [task])))
    plan = preflight(config, choose_runtime(config.train, threads=1, use_gpu=False))
    job = TaskJob(job_spec(plan, plan.tasks[0], run_id="one", runs=tmp_path / "runs"))
    data: DataSummary = job.load()
    assert data.label_counts == (18, 18, 18)
    assert sum(data.label_counts) == data.num_train
    words = sorted(
        len(text.split()) + 2 for text in job.family._texts.data.train_texts
    )  # one token per word, and two around them
    assert data.token_quantiles == (words[5], words[26], words[48])
    assert data.test_fingerprint == job.family._texts.data.test_fingerprint
    assert {row.test_sha256 for row in job.family._frozen().rows} == {data.test_fingerprint}


def test_a_finished_run_is_in_the_history_and_on_its_page(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "runs" / "one", [task_result("A")])
    results = results_in(folder, read_record(folder.task("A").result, TaskResult))
    results = [with_values(r, scores=[row.model_dump() | {"run_id": "one"} for row in r.scores]) for r in results]
    plan = Plan(load_config("quickstart"), ENCODER, MINILM_MODULES, CPU_FLOAT32, ())
    _, results_out = collect(plan, results, [], run_id="one", folder=folder)
    finish_run(
        plan,
        results_out,
        [Failure(mteb_task="B", stage="train", reason="lost")],
        run_id="one",
        folder=folder,
        seconds=1.0,
    )
    history = mteb_tasks_of_run(tmp_path / "runs", "one")
    assert read_mteb_tasks(history) == read_mteb_tasks(folder.mteb_tasks)
    page = parse((tmp_path / "runs" / "history.html").read_text(encoding="utf-8"))
    assert "one/report.html" in page.addresses
    (line,) = read_store(tmp_path / "runs", newest=9).runs
    assert (line.trained, line.reused, line.failed) == (("A",), (), ("B",))


# --- what is read of a store ---


def test_runs_are_listed_newest_first_with_what_they_did(tmp_path: Path) -> None:
    runs = season(tmp_path).runs
    assert [line.run_id for line in runs] == [run_name(week) for week in reversed(range(12))]
    third, first, pruned = runs[-4], runs[-1], runs[-2]
    assert (third.trained, third.reused, third.failed) == (("Reviews",), ("Spam",), ("Tickets",))
    assert third.worker_seconds == 960  # of Reviews alone: what was taken over cost nothing
    assert (first.trained, first.reused, first.peak_memory_bytes) == (("Reviews", "Spam", "Tickets"), (), 900_000_000)
    assert (pruned.failed, pruned.has_report, pruned.worker_seconds) == (None, False, 920 + 310)


def test_a_damaged_file_is_named_and_hides_no_other_run(tmp_path: Path) -> None:
    season(tmp_path)
    path = scores_of_run(tmp_path, run_name(4))
    path.write_bytes(path.read_bytes()[:100])
    history = read_store(tmp_path, newest=NEWEST_RUNS)
    (fault,) = history.faults
    assert fault.startswith(f"{path}: damaged")
    assert len(history.runs) == 11
    assert fault in parse(render_history(history)).text


def test_older_runs_than_asked_for_are_left_out_and_counted(tmp_path: Path) -> None:
    season(tmp_path)
    history = read_store(tmp_path, newest=5)
    assert (len(history.runs), history.num_older) == (5, 7)
    assert {len(task.points) for task in history.tasks} == {5}
    assert "7 older" in parse(render_history(history)).text


def test_a_run_in_which_everything_failed_is_a_line_without_scores(tmp_path: Path) -> None:
    append_history(tmp_path, run_name(0), [])
    finish(tmp_path, 0, failures=[Failure(mteb_task="Tickets", stage="train", reason="lost")])
    history = read_store(tmp_path, newest=9)
    assert (history.tasks, history.runs[0].failed, history.runs[0].worker_seconds) == ((), ("Tickets",), None)
    parse(render_history(history))


def test_the_page_of_an_empty_store_says_so(tmp_path: Path) -> None:
    assert "No run of this store can be shown." in parse(write_history_page(tmp_path).read_text(encoding="utf-8")).text


# --- the page ---


def pieces(figure: ElementTree.Element, colour: str) -> list[list[float]]:
    """The x of each line of that colour that joins points, left to right."""
    found = []
    for path in figure.iter("path"):
        style = path.get("style", "")
        if f"stroke: var({colour})" in style and "stroke-width: 1.4" in style:
            found.append([float(x) for x in re.findall(r"[ML] (\S+) \S+", path.attrib["d"])])
    return found


def marks(figure: ElementTree.Element) -> list[float]:
    """The x of the vertical marks, left to right."""
    red = [path.attrib["d"] for path in figure.iter("path") if "stroke: var(--bad)" in path.get("style", "")]
    return [float(re.findall(r"M (\S+) ", d)[0]) for d in red]


def test_the_page_is_the_golden_one_with_figures_cut_down_to_their_words(tmp_path: Path) -> None:
    page = render_history(season(tmp_path))
    words = iter([" | ".join(texts(figure)) for figure in figures(page)])
    check_golden(
        "history.html",
        re.sub(r"<svg.*?</svg>", lambda _: f"<svg>{html.escape(next(words))}</svg>", page, flags=re.DOTALL),
    )


def test_no_line_joins_scores_on_different_test_data() -> None:
    a, b = "a" * 64, "b" * 64
    task = one_task(
        [row for week, sha256 in enumerate((a, a, a, b, b, a)) for row in scores(week, columns=["head"], sha256=sha256)]
    )
    (figure,) = figures(page_of(task))
    lines = [line for line in pieces(figure, "--adapted") if line]
    assert [len(line) for line in lines] == [3, 2, 1]
    assert texts(figure).count("test data changed") == 2
    for mark, before, after in zip(marks(figure), lines, lines[1:], strict=False):
        assert before[-1] < mark < after[0]


def test_scores_that_were_not_measured_again_are_hollow_and_have_no_interval() -> None:
    weeks = [scores(0, columns=["head"]), scores(1, columns=["head"], reused_from=0), scores(2, columns=["head"])]
    (figure,) = figures(page_of(one_task([row for rows in weeks for row in rows])))
    hollow = [use for use in figure.iter("use") if "fill: var(--paper)" in use.get("style", "")]
    intervals = [
        path
        for path in figure.iter("path")
        if "stroke-opacity: 0.6" in path.get("style", "") and "clip-path" in path.attrib
    ]
    assert len(hollow) == 1
    assert len(intervals) == 2


def test_new_and_vanished_labels_are_named_with_their_run(tmp_path: Path) -> None:
    text = " ".join(parse(render_history(season(tmp_path))).text.split())
    assert f"run {run_name(5)}: new label refund (since the new terms of sale)" in text
    assert f"run {run_name(9)}: without label other" in text
    assert (
        f"run {run_name(7)}: test data changed (640 texts, before 500), so scores before and after cannot be compared"
        in text
    )


def test_one_run_has_a_page_that_promises_nothing() -> None:
    page = page_of(one_task(scores(0), [facts(0)]))
    (figure,) = figures(page)
    assert "from the second run on" in texts(figure)
    assert "test data changed" not in texts(figure)
    assert (
        "newest of 1, 2026-03-02: head 90.0 (88.0–91.8), 4,500 training and 500 test texts, 2 classes"
        in parse(page).text
    )


def test_runs_of_an_older_version_show_their_scores_and_that_the_rest_was_not_recorded() -> None:
    (figure,) = figures(page_of(one_task([*scores(0, sha256=None), *scores(1, sha256=None)])))
    assert texts(figure).count("not recorded") == 4
    assert [len(line) for line in pieces(figure, "--adapted") if line] == [2]


def test_the_newest_score_is_compared_with_the_run_before_only_on_the_same_test_data() -> None:
    same, other = scores(1, head=0.912), scores(1, head=0.912, sha256="b" * 64)
    assert "+1.2 against the previous run" in page_of(one_task([*scores(0), *same]))
    assert "test data differ from the previous run" in page_of(one_task([*scores(0), *other]))
    assert f"reused from run {run_name(0)}" in page_of(one_task([*scores(0), *scores(1, reused_from=0)]))


def test_equal_stores_give_equal_bytes(tmp_path: Path) -> None:
    assert render_history(season(tmp_path / "a")) == render_history(season(tmp_path / "b"))


def test_the_page_asks_nothing_of_the_network_and_links_to_reports_that_exist(tmp_path: Path) -> None:
    page = render_history(season(tmp_path))
    tags = parse(page)
    links = [address for address in tags.addresses if not address.startswith("#")]
    assert links == [f"{run_name(week)}/report.html" for week in reversed(range(12)) if week != 1]
    assert all((tmp_path / link).is_file() for link in links)
    assert {address[1:] for address in tags.addresses if address.startswith("#")} <= set(
        re.findall(r'id="([^"]+)"', page)
    )
    assert not tags.seen & {"script", "link", "img", "iframe", "object", "embed", "image"}
    for figure in figures(page):
        assert re.findall(r"#[0-9a-f]{6}\b", ElementTree.tostring(figure, encoding="unicode")) == []


@pytest.mark.parametrize("label", [*HOSTILE, "_hidden"])
def test_a_label_is_shown_as_it_is_whatever_it_contains(label: str) -> None:
    task = one_task([*scores(0), *scores(1)], [facts(0, shares={"b": 1.0}), facts(1, shares={"b": 0.5, label: 0.5})])
    page = page_of(task)
    tags, shown = parse(page), texts(figures(page)[0])
    assert "script" not in tags.seen
    assert label in tags.text or "…" in tags.text
    assert any(text.strip()[:9] == label[:9] for text in shown)


# --- the terminal ---


def test_show_marks_the_run_whose_test_data_changed(tmp_path: Path) -> None:
    for week, sha256 in enumerate(("a" * 64, "b" * 64)):
        append_history(tmp_path / "runs", run_name(week), scores(week, sha256=sha256))
    lines = run("show", "runs", cwd=tmp_path).out.splitlines()
    assert [line.rstrip().endswith("test data changed") for line in lines] == [False, False, True]
    rows = json.loads(run("show", "runs", "--json", cwd=tmp_path).out)
    assert {(row["run_id"], row["test_sha256"], row["test_data_changed"]) for row in rows} == {
        (run_name(0), "a" * 64, False),
        (run_name(1), "b" * 64, True),
    }
