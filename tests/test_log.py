"""Log, artifacts and live table of a run: quoted values cannot forge other lines."""

from __future__ import annotations

import errno
import logging
import os

import pytest
from matplotlib.figure import Figure

from pipeline.errors import DataError, InputError, LorafleetError, refused_by_machine
from pipeline.reports.page import inline_svg, shorten
from tasks.live_table import LiveTable
from tasks.log import _Printable
from tasks.progress import _shown

EVIL = "x\x1b[2J\n00:00:00 | forged\u202e"
WRITTEN = r"x\x1b[2J\n00:00:00 | forged\u202e"


def test_a_value_cannot_forge_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    logger = _Printable(logging.getLogger("of a run"), {})
    logger.info("%s: %d texts, %.1f, %r, %s", EVIL, 3, 0.25, EVIL, None)
    logger.warning("%s", ValueError(EVIL))
    logger.error("%s", DataError("first", EVIL))
    logger.debug("%s", EVIL)
    escaped = WRITTEN.replace("\\", "\\\\")
    assert [record.getMessage() for record in caplog.records] == [
        f"{WRITTEN}: 3 texts, 0.2, '{escaped}', None",
        WRITTEN,
        f"first\n{WRITTEN}",
    ]


def test_an_artifact_shows_its_values_and_its_own_lines() -> None:
    assert _shown("- one\n- two\x1b") == "- one\n- two\\x1b"
    assert _shown([{EVIL: EVIL, "n": 1}, {"n": None}]) == [{WRITTEN: WRITTEN, "n": 1}, {"n": None}]
    assert _shown("https://u:hunter2@h/report") == "https://***@h/report"


def test_the_board_shows_names_on_one_line() -> None:
    table = LiveTable()
    table.show(EVIL, "train", EVIL)
    (cells,) = ([str(column._cells[0]) for column in table.__rich__().columns],)
    assert cells == [WRITTEN, "train", "", WRITTEN]


def test_a_page_and_its_figures_show_what_is_there() -> None:
    assert shorten(EVIL) == WRITTEN
    svg = str(inline_svg(Figure(), EVIL))
    assert WRITTEN in svg
    assert "\x1b" not in svg


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENAMETOOLONG, InputError),
        (errno.EACCES, InputError),
        (errno.EROFS, InputError),
        (errno.ENOSPC, LorafleetError),
        (errno.EMFILE, LorafleetError),
        (errno.ENOENT, None),
        (errno.EEXIST, None),
        (errno.EBADF, None),
    ],
)
def test_what_the_machine_refuses_is_the_users_matter_and_a_file_that_is_not_there_may_be_ours(
    number: int, kind: type[LorafleetError] | None
) -> None:
    refused = refused_by_machine(OSError(number, os.strerror(number), "a\nb"))
    assert type(refused) is (kind or type(None))
    if refused is not None:
        assert str(refused) == f"a\\nb: {os.strerror(number)}"
