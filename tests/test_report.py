"""The report page: complete, self-contained, deterministic, and safe whatever a label is called."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from builders import ENCODER, RUN_ID, WHEN, check_golden, task_result

from pipeline.records import Confusion, EncoderRef, EpochRow, Failure, MtebTask, TaskResult
from pipeline.reports.report import render_report
from pipeline.reports.summary import summarise

HOSTILE = (
    "<script>alert(1)</script>",
    "a$b$c",
    "$\\frac{x}$",
    'say "hi" & {{ 7 * 7 }}',
    "反事实 עברית",
    "long " * 80 + "x" * 300,
)


def page_of(*results: TaskResult, failures: tuple[Failure, ...] = (), encoder: EncoderRef = ENCODER) -> str:
    return render_report(results, summarise(results, failures, encoder=encoder, run_id=RUN_ID, created_at=WHEN))


class Tags(HTMLParser):
    """The elements and attributes that a browser sees, and whether they close in order."""

    void = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: set[str] = set()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id" and "svg" not in self.stack]
        if tag not in self.void:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.stack == []
    return tags


def figures(page: str) -> list[ElementTree.Element]:
    found = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    return [
        ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1))
        for svg in found
    ]


def texts(figure: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in figure.iter() if element.tag.endswith("text")]


def test_the_page_is_the_golden_one_with_figures_cut_down_to_their_words() -> None:
    results = [
        task_result("Banking77Classification"),
        task_result("ImdbClassification", labels=("negative", "positive"), selected_on="test", p_value_holm=0.3),
        task_result(
            "MTOPDomainClassification",
            reused_from="2025-12-31-000000-123456",
            num_epochs=1,
            notes=["1 class has one text"],
        ),
    ]
    page = page_of(
        *results, failures=(Failure(mteb_task="EmotionClassification", stage="train", reason="worker died <3 times>"),)
    )
    words = iter([" | ".join(texts(figure)) for figure in figures(page)])
    check_golden(
        "report.html",
        re.sub(r"<svg.*?</svg>", lambda _: f"<svg>{html.escape(next(words))}</svg>", page, flags=re.DOTALL),
    )


def test_equal_records_give_equal_bytes() -> None:
    assert page_of(task_result()) == page_of(task_result())


def test_the_page_asks_nothing_of_the_network() -> None:
    tags = parse(page_of(task_result(), task_result("Second")))
    assert {address[:1] for address in tags.addresses} == {"#"}
    assert not tags.seen & {"script", "link", "img", "iframe", "object", "embed", "image"}


def test_every_link_of_the_page_leads_somewhere() -> None:
    failure = Failure(mteb_task="B", stage="train", reason="lost")
    page = page_of(task_result("A"), task_result("C"), failures=(failure,))
    tags = parse(page)
    ids = set(re.findall(r'id="([^"]+)"', page))
    assert {address[1:] for address in tags.addresses} <= ids
    assert len(tags.ids) == len(set(tags.ids))


def test_figures_take_all_their_colours_from_the_style_sheet() -> None:
    for figure in figures(page_of(task_result())):
        assert re.findall(r"#[0-9a-f]{6}\b", ElementTree.tostring(figure, encoding="unicode")) == []


@pytest.mark.parametrize("label", HOSTILE)
def test_a_label_is_shown_as_it_is_whatever_it_contains(label: str) -> None:
    confusion = Confusion(label=label, predicted="other", num_texts=3, num_of_label=9)
    tags = parse(page_of(task_result(labels=(label, "other"), confusions=[confusion])))
    assert label in tags.text
    assert "script" not in tags.seen


def test_what_cannot_be_seen_in_a_label_is_written_out() -> None:
    evil, written = "a\x1b\u202eb\u200b\x00", r"a\x1b\u202eb\u200b\x00"
    confusion = Confusion(label=evil, predicted="other", num_texts=3, num_of_label=9)
    page = page_of(task_result("Task", labels=(evil, "other"), confusions=[confusion]))
    assert written in parse(page).text
    assert not any(character in page for character in "\x1b\u202e\u200b\x00")


@pytest.mark.parametrize("name", ["a_b_c", "A.b-c_"])
def test_a_name_in_a_figure_is_text_and_never_mathematics(name: str) -> None:
    assert name in texts(figures(page_of(task_result(name)))[0])


def test_a_very_long_name_keeps_its_two_ends_in_the_figure() -> None:
    name = "First" + "x" * 100 + "Last"
    shown = next(text for text in texts(figures(page_of(task_result(name)))[0]) if "…" in text)
    assert shown.startswith("First") and shown.endswith("Last") and len(shown) <= 44


def test_failures_are_listed_and_escaped_and_lose_their_local_paths() -> None:
    reason = "cannot read /home/anna/x.parquet: <b>no such column</b>"
    tags = parse(page_of(task_result(), failures=(Failure(mteb_task="Lost", stage="load data", reason=reason),)))
    assert "cannot read …/x.parquet: <b>no such column</b>" in tags.text
    assert "b" not in tags.seen
    assert "1 failed" in tags.text


def test_a_run_in_which_everything_failed_still_has_a_page() -> None:
    page = page_of(failures=(Failure(mteb_task="Lost", stage="load data", reason="gone"),))
    parse(page)
    assert "No MTEB task finished" in page
    assert figures(page) == []


def test_one_task_with_one_epoch_has_no_average_and_both_figures() -> None:
    page = page_of(task_result(num_epochs=1))
    assert "<td>Average</td>" not in page
    assert len(figures(page)) == 2
    assert "1 of 1" in page


def test_with_many_tasks_the_details_start_folded() -> None:
    few, many = page_of(*(task_result(f"T{i}") for i in range(2))), page_of(*(task_result(f"T{i}") for i in range(13)))
    assert few.count("<details open>") == 2
    assert many.count("<details open>") == 0
    assert many.count("<details>") == 13


@pytest.mark.faults
def test_sixty_tasks_fit_in_one_figure_that_grows_with_them() -> None:
    names = [f"Task{i}" for i in range(60)]
    results = [task_result(name, confusions=[]) for name in names]
    page = page_of(*results)
    overview = figures(page)[0]
    assert set(names) <= set(texts(overview))
    assert float(overview.attrib["viewBox"].split()[-1]) > 60 * 25


def test_columns_that_were_switched_off_leave_the_rest_standing() -> None:
    page = page_of(task_result(accuracies={"head": 0.9}))
    parse(page)
    assert "90.0" in texts(figures(page)[0])


def test_a_refit_is_drawn_apart_and_an_unmeasured_accuracy_is_said_so() -> None:
    result = task_result(num_epochs=2)
    rows = tuple(
        EpochRow.model_validate(row.model_dump() | {"validation_accuracy": None, "is_best": False})
        for row in result.epochs
    )
    both = TaskResult.model_validate(result.model_dump() | {"epochs": result.epochs + rows, "refitted": True})
    blind = TaskResult.model_validate(result.model_dump() | {"epochs": rows, "selected_on": "last_epoch"})
    assert "training loss (dashed: refit)" in texts(figures(page_of(both))[1])
    assert "not measured" in texts(figures(page_of(blind))[1])


def test_the_verdict_against_the_probe_is_marked() -> None:
    page = page_of(task_result("Up"), task_result("Level", p_value_holm=0.4))
    assert '<span class="above">above</span>' in page
    assert '<span class="noise">within noise</span>' in page


def test_the_p_value_of_the_test_and_the_corrected_one_stand_side_by_side() -> None:
    results = []
    for name, p_value in (("A", 0.101), ("B", 0.2)):
        result = task_result(name)
        test = {"main_metric": "accuracy", "p_value_main": p_value, "p_value_main_holm": 0.202}
        rows = tuple(row.model_copy(update=test) if row.column == "head" else row for row in result.scores)
        results.append(result.model_copy(update={"scores": rows}))
    page = page_of(*results)
    assert "p 0.101, corrected 0.202" in page
    assert "p 0.200, corrected 0.202" in page


def calibrated(before: float, after: float) -> TaskResult:
    result = task_result()
    return result.model_copy(
        update={"calibration": result.calibration.model_copy(update={"error_before": before, "error_after": after})}
    )


def test_a_calibration_error_that_rose_is_said_to_have_risen() -> None:
    assert "3.8 before and 4.2 after temperature 1.40: it rose" in " ".join(
        parse(page_of(calibrated(0.038, 0.042))).text.split()
    )
    assert "it rose" not in page_of(calibrated(0.042, 0.042))


def test_a_kept_start_is_drawn_and_told() -> None:
    page = page_of(task_result("Kept", best_epoch=0, start_accuracy=0.912))
    text = " ".join(parse(page).text.split())
    assert "epoch 0 of 4 (the start), chosen on validation" in text
    assert "started from scratch: validation 91.2 before, 85.1 after training (-6.1); the start was kept" in text
    assert "91.2" in texts(figures(page)[1]), "the best point of the curve is the start"


def test_own_data_are_not_called_mteb_tasks_and_their_few_shot_texts_are_counted() -> None:
    own = task_result("Own").mteb_task.model_copy(update={"source": "files", "samples_per_label": 16})
    page = page_of(task_result("Own", source=own))
    assert "<dt>Data sets</dt>" in page
    assert "<th>MTEB task</th>" not in page
    assert "<th>Few-shot texts per label</th></tr>" in page
    assert "<td>16</td></tr>" in page


def test_the_lower_ends_of_a_coverage_table_are_shown_where_they_were_measured_on_validation() -> None:
    told = "at least, with 95 % confidence"
    result = task_result()
    assert told in page_of(result)
    blind = result.calibration.model_copy(update={"fitted_on": "none"})
    older = tuple(row.model_copy(update={"num_texts": None, "low": None}) for row in result.calibration.coverage)
    for calibration in (blind, result.calibration.model_copy(update={"coverage": older})):
        assert told not in page_of(result.model_copy(update={"calibration": calibration}))


def test_the_page_names_no_local_path() -> None:
    encoder = EncoderRef(name="/home/anna/encoders/minilm", public_name="minilm", revision="sha256:0")
    sources = [
        MtebTask(
            name="M",
            source="mirror",
            location="/home/anna/mirror",
            revision="sha256:1",
            max_epochs=1,
            samples_per_label=8,
        ),
        MtebTask(
            name="P",
            source="files",
            location="/home/anna/a.parquet",
            test_location="/home/anna/b.parquet",
            revision="sha256:2",
            max_epochs=1,
            samples_per_label=8,
        ),
    ]
    results = [
        task_result(s.name, source=s, encoder=encoder, notes=["/home/anna/a.parquet: 2 labels are rare"])
        for s in sources
    ]
    assert "/home" not in page_of(*results, encoder=encoder)
