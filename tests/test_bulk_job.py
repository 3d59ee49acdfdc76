"""Job state: units are done once, any process can resume, jobs never mix, and only a complete job replaces another."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from builders import toy_texts
from bulk import LABELS, Bulk, files_below, save_bulk_adapter, start, write_table
from pydantic import ValidationError

from pipeline.bulk.output import ATTEMPTS, FAILURES, FOOTER_KEY, GRACE_SECONDS, JOB, PLAN, SUCCESS, forget_attempts
from pipeline.bulk.plan import check_places, new_columns
from pipeline.bulk.records import BulkOptions, BulkSummary
from pipeline.bulk_input.content import content_of
from pipeline.errors import InputError, LorafleetError
from pipeline.storage.place import Place

Folders = Callable[[str], Path]
TEXTS, _ = toy_texts(60)
UNITS = [f"{stem}-{number:05d}.parquet" for stem in "ab" for number in range(3)]
FINISHED = sorted([JOB, PLAN, SUCCESS, *UNITS])


class Setting:
    """Two input files of three units each, and an output folder."""

    def __init__(self, root: Path, adapter: Path, encoder: Path) -> None:
        self.root, self.input, self.output = root, root / "in", root / "out"
        self.adapter, self.encoder = adapter, encoder
        for file, name in enumerate("ab"):
            texts = [None, "", *TEXTS[:20], *TEXTS[file * 28 : file * 28 + 8]]
            write_table(
                self.input / f"{name}.parquet",
                {"id": range(file * 30, file * 30 + 30), "text": texts},
                row_group_size=10,
            )

    def start(self, output: Path | None = None, **options: Any) -> Bulk:
        chosen: dict[str, Any] = {"rows_per_unit": 10, **options}
        adapters = chosen.pop("adapters", [self.adapter])
        return start(self.input, output or self.output, adapters, self.encoder, **chosen)

    def ids(self, output: Path | None = None) -> list[int]:
        paths = sorted((output or self.output).glob("*.parquet"))
        return [
            id for path in paths if not path.name.startswith("_") for id in pq.read_table(path).column("id").to_pylist()
        ]


@pytest.fixture(scope="module")
def adapter(encoder_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bulk_adapter(tmp_path_factory.mktemp("adapters") / "T", encoder_folder("bert"))


@pytest.fixture
def setting(adapter: Path, encoder_folder: Folders, tmp_path: Path) -> Setting:
    return Setting(tmp_path, adapter, encoder_folder("bert"))


def counts(summary: BulkSummary) -> dict[str, Any]:
    """The part of a summary that does not depend on time."""
    return summary.model_dump(exclude={"units_done_before", "seconds", "rows_per_second"})


def summary_in(folder: Path) -> BulkSummary:
    return BulkSummary.model_validate_json((folder / JOB).read_text())


# From beginning to end


def test_a_job_ends_with_its_units_a_summary_and_success(setting: Setting) -> None:
    summary = setting.start().run()
    assert files_below(setting.output) == FINISHED
    assert setting.ids() == list(range(60))
    assert summary == summary_in(setting.output)
    assert (summary.rows_in, summary.rows_out, summary.units, summary.failures) == (60, 60, 6, 0)
    assert (summary.null_labels, summary.reasons) == ({"T": 4}, {"text is empty": 2, "text is null": 2})
    assert sum(summary.labels["T"].values()) == 56
    assert list(summary.labels["T"].values()) == sorted(summary.labels["T"].values(), reverse=True)
    assert (summary.rows_per_second, summary.seconds) == (60.0, 2.0)


def test_done_units_are_skipped_and_counts_equal_those_of_an_uninterrupted_run(setting: Setting) -> None:
    undisturbed = setting.start(setting.root / "undisturbed").run()
    stopped = setting.start()
    stopped.label(stopped.state.todo[:4])
    old = {name: (setting.output / name).stat().st_mtime_ns for name in UNITS[:4]}
    going_on = setting.start()
    assert [unit.output for unit in going_on.state.todo] == UNITS[4:]
    assert going_on.state.num_done == 4
    summary = going_on.run()
    assert counts(summary) == counts(undisturbed)
    assert (summary.units_done_before, summary.rows_per_second) == (4, 20.0)
    assert {name: (setting.output / name).stat().st_mtime_ns for name in UNITS[:4]} == old
    for name in UNITS:
        assert (setting.output / name).read_bytes() == (setting.root / "undisturbed" / name).read_bytes()


def test_a_finished_job_has_nothing_left_to_do(setting: Setting) -> None:
    first = setting.start().run()
    again = setting.start()
    assert again.state.todo == ()
    summary = again.run()
    assert counts(summary) == counts(first)
    assert summary.rows_per_second is None


def test_a_failed_unit_is_reported_and_retried_alone(setting: Setting) -> None:
    bulk = setting.start()
    for attempt in "xyz":
        bulk.output.write(f"{ATTEMPTS}/00002-{attempt}", b"")
    summary, failures = bulk.finish(bulk.label())
    assert [(f.unit, f.first_row, f.num_rows, f.reason) for f in failures] == [(2, 20, 10, "killed the worker 3 times")]
    assert pq.read_table(setting.output / FAILURES).to_pylist() == [failures[0].model_dump()]
    assert (summary.rows_in, summary.rows_out, summary.failures) == (60, 50, 1)
    assert not (setting.output / SUCCESS).exists()
    again = setting.start()
    assert [unit.number for unit in again.state.todo] == [2]
    assert counts(again.run()) == counts(setting.start(setting.root / "undisturbed").run())
    assert files_below(setting.output) == FINISHED
    assert not (setting.output / ATTEMPTS).exists()


def test_a_file_that_cannot_be_read_is_a_failure_in_every_start(setting: Setting) -> None:
    (setting.input / "0.parquet").write_bytes(b"")
    for done in (0, 6):
        bulk = setting.start()
        assert bulk.state.num_done == done
        summary, failures = bulk.finish(bulk.label())
        assert [(Path(f.path).name, f.unit) for f in failures] == [("0.parquet", None)]
        assert summary.rows_out == 60
        assert files_below(setting.output) == sorted([FAILURES, JOB, PLAN, *UNITS])


def test_success_is_removed_when_a_deleted_unit_fails_again(setting: Setting) -> None:
    setting.start().run()
    (setting.output / UNITS[1]).unlink()
    bulk = setting.start()
    for attempt in "xyz":
        bulk.output.write(f"{ATTEMPTS}/00001-{attempt}", b"")
    bulk.finish(bulk.label())
    assert not (setting.output / SUCCESS).exists()


# Another job


def test_another_jobs_folder_is_refused_with_the_difference(setting: Setting, tmp_path: Path) -> None:
    setting.start().run()
    before = files_below(setting.output)
    for options, difference in (
        ({"top_k": 2}, r"options\.top_k: then 1, now 2"),
        ({"min_score": 0.5}, r"adapter T: threshold: then None, now 0\.5; options\.min_score: then None, now 0\.5"),
        ({"columns": ("id",)}, r"options\.columns: then None, now \['id'\]"),
        ({"adapters": [f"U={setting.adapter}"]}, r"adapters: then T \w{8}, now U \w{8}"),
        (
            {"adapters": [save_bulk_adapter(tmp_path / "T", setting.encoder, seed=5)]},
            r"adapter T: sha256: then \w{64}, now \w{64}",
        ),
        (
            {"adapters": [save_bulk_adapter(tmp_path / "turned" / "T", setting.encoder, labels=LABELS[::-1])]},
            r"\(adapter T: labels_sha256: then \w{64}, now \w{64}; ",
        ),
    ):
        with pytest.raises(InputError, match=difference) as error:
            setting.start(**options)
        assert "holds another job's output (" in str(error.value)
        assert "choose another folder, or --overwrite to replace it" in str(error.value)
    assert files_below(setting.output) == before


def test_an_input_that_changed_grew_or_shrank_is_another_job(setting: Setting) -> None:
    setting.start().run()
    write_table(setting.input / "c.parquet", {"id": [1], "text": ["x"]})
    with pytest.raises(InputError, match=r"input: \S+/c\.parquet is new \(2 files then, 3 now\)"):
        setting.start()
    (setting.input / "c.parquet").unlink()
    (setting.input / "b.parquet").unlink()
    with pytest.raises(InputError, match=r"input: \S+/b\.parquet is gone \(2 files then, 1 now\)"):
        setting.start()


def test_a_repaired_file_is_labelled_by_the_next_start_and_no_other_unit_is(setting: Setting) -> None:
    path = setting.input / "0.parquet"
    content = write_table(path, {"id": [1], "text": ["x"]}).read_bytes()
    path.write_bytes(b"?" * 10)
    first = setting.start()
    first.label()
    written = {
        name: (setting.output / name).stat().st_mtime_ns
        for name in files_below(setting.output)
        if not name.startswith("_")
    }
    path.write_bytes(content)
    second = setting.start()
    assert [unit.output for unit in second.state.todo] == ["0-00000.parquet"]
    second.label()
    assert {name: (setting.output / name).stat().st_mtime_ns for name in written} == written
    assert setting.start().state.todo == ()


def test_with_a_limit_a_repaired_file_would_displace_others_and_is_another_job(setting: Setting) -> None:
    path = setting.input / "0.parquet"
    content = write_table(path, {"id": [1], "text": ["x"]}).read_bytes()
    path.write_bytes(b"?" * len(content))
    os.utime(path, (1, 1))
    setting.start(limit=12).label()
    path.write_bytes(content)
    os.utime(path, (1, 1))
    with pytest.raises(InputError, match=r"input: \S+/0\.parquet could not be read then, and can be now"):
        setting.start(limit=12)


# An input file that is touched, restored or replaced


def write_twins(path: Path, *, letter: str) -> None:
    """Write a file of three units. Another letter changes one text, but neither the footer nor the size."""
    texts = [*TEXTS[:14], f"the {letter} file", *TEXTS[15:30]]
    table = {"id": range(30), "text": texts}
    write_table(path, table, row_group_size=10, write_statistics=False, compression="none", use_dictionary=False)


def letters(setting: Setting) -> list[str]:
    """Return the letters of the labelled texts of ``b.parquet``; a unit without output has none."""
    found = [
        text
        for path in sorted(setting.output.glob("b-*.parquet"))
        for text in pq.read_table(path).column("text").to_pylist()
    ]
    return [text.split()[1] for text in found if text and text.startswith("the ") and text.endswith(" file")]


def test_versions_of_a_file_have_equal_footers_and_sizes(tmp_path: Path) -> None:
    for letter in "xy":
        write_twins(tmp_path / f"{letter}.parquet", letter=letter)
    one, two = (tmp_path / f"{letter}.parquet" for letter in "xy")
    assert one.read_bytes() != two.read_bytes()
    assert one.stat().st_size == two.stat().st_size
    assert pq.read_metadata(one).equals(pq.read_metadata(two))


def test_touching_or_restoring_a_file_loses_no_finished_unit(setting: Setting) -> None:
    path = setting.input / "b.parquet"
    write_twins(path, letter="x")
    bulk = setting.start()
    bulk.label(bulk.state.todo[:5])
    written = {name: (setting.output / name).stat().st_mtime_ns for name in UNITS[:5]}
    os.utime(path, (1, 1))
    assert setting.start().state.num_done == 5
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    again = setting.start()
    assert [unit.output for unit in again.state.todo] == UNITS[5:]
    summary = again.run()
    assert (summary.rows_out, summary.failures) == (60, 0)
    assert {name: (setting.output / name).stat().st_mtime_ns for name in written} == written
    os.utime(path, (2, 2))
    assert setting.start().state.todo == ()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_unit_of_a_touched_file_is_labelled_again(overwrite: bool, setting: Setting) -> None:
    if overwrite:
        setting.start(limit=20).run()  # another job, whose output is to be replaced
    bulk = setting.start(overwrite=overwrite)
    bulk.label(bulk.state.todo[:5])
    damaged = Path(bulk.state.folder.root) / UNITS[4]
    damaged.write_bytes(damaged.read_bytes()[:50])
    os.utime(setting.input / "b.parquet", (1, 1))
    again = setting.start(overwrite=overwrite)
    assert [unit.output for unit in again.state.todo] == UNITS[4:]
    assert (again.run().rows_out, setting.ids()) == (60, list(range(60)))


def test_replacing_a_file_between_starts_is_another_job_even_with_equal_footer_and_size(
    setting: Setting,
) -> None:
    path = setting.input / "b.parquet"
    write_twins(path, letter="x")
    bulk = setting.start()
    bulk.label(bulk.state.todo[:5])
    write_twins(path, letter="y")
    os.utime(path, (1, 1))
    with pytest.raises(InputError, match=r"input: \S+/b\.parquet has changed since"):
        setting.start()


def test_replacing_a_file_during_the_job_drops_its_units_and_the_next_start_labels_the_new_file(
    setting: Setting,
) -> None:
    path = setting.input / "b.parquet"
    write_twins(path, letter="x")
    bulk = setting.start()
    receipts = bulk.label(bulk.state.todo[:5])
    write_twins(path, letter="y")
    os.utime(path, (1, 1))
    summary, failures = bulk.finish([*receipts, *bulk.label(bulk.state.todo[5:])])
    assert [(f.first_row, f.num_rows) for f in failures] == [(10, 10)]
    assert "was replaced while the job ran" in failures[0].reason
    assert (summary.rows_out, summary.failures, letters(setting)) == (50, 1, [])
    assert not (setting.output / SUCCESS).exists()
    again = setting.start()
    assert [unit.output for unit in again.state.todo] == ["b-00001.parquet"]
    assert again.run().failures == 0
    assert letters(setting) == ["y"]


def test_touching_a_file_during_the_job_changes_nothing(setting: Setting) -> None:
    bulk = setting.start()
    receipts = bulk.label(bulk.state.todo[:5])
    os.utime(setting.input / "b.parquet", (1, 1))
    summary, failures = bulk.finish([*receipts, *bulk.label(bulk.state.todo[5:])])
    assert (summary.rows_out, failures) == (60, ())
    assert setting.start().state.todo == ()


def test_replacing_a_file_while_a_unit_is_read_fails_that_unit(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = setting.input / "b.parquet"
    write_twins(path, letter="x")
    bulk = setting.start()

    def read_then_replaced(*arguments: Any, **options: Any) -> str:
        write_twins(path, letter="y")
        os.utime(path, (1, 1))
        return content_of(*arguments, **options)

    monkeypatch.setattr("pipeline.bulk.worker.content_of", read_then_replaced)
    (receipt,) = bulk.label([unit for unit in bulk.state.todo if unit.output == "b-00001.parquet"])
    assert "changed while it was read" in (receipt.failure or "")


def test_an_overwriting_job_labels_the_units_of_a_replaced_file_again(setting: Setting) -> None:
    setting.start().run()
    path = setting.input / "b.parquet"
    write_twins(path, letter="x")
    bulk = setting.start(overwrite=True)
    bulk.label(bulk.state.todo[:5])
    write_twins(path, letter="y")
    os.utime(path, (1, 1))
    again = setting.start(overwrite=True)
    assert [unit.output for unit in again.state.todo] == ["b-00001.parquet", "b-00002.parquet"]
    assert again.run().failures == 0
    assert letters(setting) == ["y"]


def test_a_finished_unit_with_fewer_rows_than_planned_is_an_error(setting: Setting) -> None:
    bulk = setting.start()
    receipts = bulk.label()
    with pytest.raises(LorafleetError, match=r"a-00000\.parquet has 9 of 10 rows"):
        bulk.finish([receipts[0].model_copy(update={"rows": 9}), *receipts[1:]])


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\udcff"])
def test_a_damaged_plan_is_reported(content: str, setting: Setting) -> None:
    setting.start()
    (setting.output / PLAN).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"its _plan\.json is damaged, or of another version"):
        setting.start()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_refused(overwrite: bool, setting: Setting) -> None:
    write_table(setting.output / "mine.parquet", {"id": [1]})
    with pytest.raises(InputError, match=r"holds mine\.parquet, but no plan of a job; choose an empty or a new folder"):
        setting.start(overwrite=overwrite)
    assert files_below(setting.output) == ["mine.parquet"]


def test_a_folder_that_cannot_be_created_is_reported(setting: Setting) -> None:
    (setting.root / "file").write_text("x")
    with pytest.raises(InputError, match=r"file/out: cannot be written to"):
        setting.start(setting.root / "file" / "out")


# Where the output lies


@pytest.mark.parametrize(
    "source", ["in", "in/", "in/*.parquet", "in/part-*.parquet", "in/**/*.parquet", "file://{root}/in"]
)
@pytest.mark.parametrize("output", ["in", "in/out", "in/x/y"])
def test_an_output_inside_the_input_is_refused(
    source: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path / "in" / "part-0.parquet", {"id": [1]})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is inside the input"):
        check_places(source.format(root=tmp_path), Place(output))


def test_an_output_inside_the_input_is_refused_in_an_object_store() -> None:
    with pytest.raises(InputError, match="is inside the input"):
        check_places("memory://lake/in", Place("memory://lake/in/out"))
    check_places("memory://lake/in", Place("memory://lake/in-labelled"))


def test_an_input_inside_the_output_is_refused_because_overwriting_would_delete_it(tmp_path: Path) -> None:
    path = write_table(tmp_path / "out" / "in" / "a.parquet", {"id": [1]})
    for source in (path, path.parent, path.parent / "*.parquet"):
        with pytest.raises(InputError, match=r"input \S+ is inside the output \S+/out, which --overwrite replaces"):
            check_places(str(source), Place(str(tmp_path / "out")))


def test_an_output_beside_the_input_is_accepted_and_a_file_in_its_place_is_not(tmp_path: Path) -> None:
    path = write_table(tmp_path / "in.parquet", {"id": [1]})
    check_places(str(path), Place(str(tmp_path / "out")))
    check_places(str(tmp_path / "in"), Place(str(tmp_path / "in-labelled")))
    with pytest.raises(InputError, match="is a file; name a folder"):
        check_places(str(tmp_path / "x"), Place(str(path)))


# Overwriting


def test_the_old_output_stays_whole_until_the_new_one_is_complete(setting: Setting) -> None:
    setting.start().run()
    old = {name: (setting.output / name).read_bytes() for name in files_below(setting.output)}
    new = setting.start(overwrite=True, top_k=2, rows_per_unit=20)
    for attempt in "xyz":
        new.state.folder.write(f"{ATTEMPTS}/00001-{attempt}", b"")
    summary, failures = new.finish(new.label())
    assert (summary.failures, len(failures)) == (1, 1)
    assert {name: (setting.output / name).read_bytes() for name in old} == old
    again = setting.start(overwrite=True, top_k=2, rows_per_unit=20)
    assert (again.state.num_done, len(again.state.todo)) == (3, 1)
    complete = again.run()
    names = [f"{stem}-{number:05d}.parquet" for stem in "ab" for number in range(2)]
    assert files_below(setting.output) == sorted([JOB, PLAN, SUCCESS, *names])
    assert summary_in(setting.output) == complete
    assert setting.ids() == list(range(60))
    assert setting.start(top_k=2, rows_per_unit=20).state.todo == ()


def test_the_same_job_is_repeated_on_request(setting: Setting) -> None:
    first = setting.start().run()
    again = setting.start(overwrite=True)
    assert len(again.state.todo) == 6
    assert counts(again.run()) == counts(first)
    assert files_below(setting.output) == FINISHED


def test_files_of_others_beside_the_output_stay(setting: Setting) -> None:
    setting.start().run()
    (setting.output / "notes.txt").write_text("ours")
    (setting.output / "report").mkdir()
    (setting.output / "report" / "table.parquet").write_text("theirs")
    setting.start(overwrite=True, rows_per_unit=30).run()
    kept = {"notes.txt", "report/table.parquet"}
    assert kept <= set(files_below(setting.output))
    assert setting.ids() == list(range(60))


def test_parquet_files_of_others_stay_and_folders_with_only_these_are_refused(setting: Setting, tmp_path: Path) -> None:
    setting.start().run()
    kept = ["raw/train-00000-of-00002.parquet", "sales-20240101.parquet"]
    for name in kept:
        write_table(setting.output / name, {"x": [1]})
    setting.start(overwrite=True, top_k=2).run()
    assert set(kept) <= set(files_below(setting.output))
    write_table(tmp_path / "spark" / "part-00000.parquet", {"x": [1]})
    (tmp_path / "spark" / SUCCESS).touch()
    with pytest.raises(InputError, match="no plan of a job"):
        setting.start(tmp_path / "spark", overwrite=True)


def test_a_missing_or_damaged_output_at_the_end_is_reported(setting: Setting) -> None:
    bulk = setting.start()
    receipts = bulk.label()
    (setting.output / UNITS[1]).unlink()
    with pytest.raises(LorafleetError, match=rf"{UNITS[1]} is missing, but a worker has written it"):
        bulk.finish(receipts)
    (setting.output / UNITS[1]).write_bytes(b"PAR1 and no more")
    with pytest.raises(LorafleetError, match=rf"{UNITS[1]} is damaged: .*; remove it and start again"):
        setting.start().run()
    assert not (setting.output / SUCCESS).exists()


def test_another_calibration_is_another_job(setting: Setting, tmp_path: Path) -> None:
    shutil.copytree(setting.adapter, tmp_path / "T")
    setting.start(adapters=[tmp_path / "T"]).run()
    calibration = json.loads((tmp_path / "T" / "calibration.json").read_text())
    (tmp_path / "T" / "calibration.json").write_text(json.dumps(calibration | {"temperature": 2.5}))
    with pytest.raises(InputError, match=r"described_sha256"):
        setting.start(adapters=[tmp_path / "T"])


# Six units, then plan, summary and success.
@pytest.mark.parametrize(("moves", "overwrite"), [(0, False), (3, True), (6, False), (7, True), (7, False), (8, False)])
def test_an_interrupted_replacement_is_completed_by_the_next_start(
    moves: int, overwrite: bool, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.start(rows_per_unit=30).run()
    new = setting.start(overwrite=True, top_k=2)
    receipts = new.label()
    left, move = [moves], Place.move

    def dies(place: Place, name: str, to: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        move(place, name, to)

    monkeypatch.setattr(Place, "move", dies)
    with pytest.raises(KeyboardInterrupt):
        new.finish(receipts)
    monkeypatch.undo()
    with pytest.raises(InputError):  # the old job takes nothing of it for its own
        setting.start(rows_per_unit=30)
    again = setting.start(top_k=2, overwrite=overwrite)
    assert again.state.todo == ()
    again.run()
    assert files_below(setting.output) == FINISHED
    assert setting.ids() == list(range(60))
    assert all("T_top_k" in pq.read_schema(setting.output / name).names for name in UNITS)


# Temporaries and attempts


def unfinished(bulk: Bulk, name: str, *, mark: str, age_seconds: float) -> str:
    path = Path(bulk.state.folder.root) / f".{name}.{mark}.0123456789ab.tmp"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age_seconds,) * 2)
    return path.name


def test_stale_temporaries_are_deleted_at_the_start_and_all_at_the_end(setting: Setting) -> None:
    first = setting.start()
    for mark in (first.job.fingerprint, "file", "0123456789abcdef"):  # the last one is of a job that this one replaces
        unfinished(first, "old", mark=mark, age_seconds=GRACE_SECONDS + 5)
    fresh = [
        unfinished(first, "new", mark=mark, age_seconds=GRACE_SECONDS - 30) for mark in (first.job.fingerprint, "file")
    ]
    second = setting.start()
    assert files_below(setting.output) == sorted([*fresh, PLAN])
    second.run()
    assert files_below(setting.output) == FINISHED


def test_a_start_that_was_killed_while_writing_its_plan_does_not_block_the_next(setting: Setting) -> None:
    bulk = setting.start()
    (setting.output / PLAN).unlink()
    unfinished(bulk, PLAN, mark="file", age_seconds=1)
    setting.start().run()
    assert files_below(setting.output) == FINISHED


def test_attempts_survive_a_start_until_they_are_reset(setting: Setting) -> None:
    bulk = setting.start()
    for attempt in "xyz":
        bulk.output.write(f"{ATTEMPTS}/00000-{attempt}", b"")
    assert setting.start().run().failures == 1  # which forgets them
    assert setting.start().run().failures == 0
    bulk = setting.start(overwrite=True)
    for attempt in "xyz":
        bulk.state.folder.write(f"{ATTEMPTS}/00000-{attempt}", b"")
    forget_attempts(bulk.state.folder)
    assert setting.start(overwrite=True).run().failures == 0


# Options


def test_two_thresholds_at_once_are_refused() -> None:
    with pytest.raises(ValidationError, match="choose one"):
        BulkOptions(min_score=0.5, target_accuracy=0.9)


def test_the_target_accuracy_sets_each_adapters_threshold(setting: Setting) -> None:
    bulk = setting.start(target_accuracy=0.93)
    assert [adapter.threshold for adapter in bulk.job.adapters] == [0.7]
    assert [adapter.threshold for adapter in setting.start(setting.root / "b", min_score=0.4).job.adapters] == [0.4]


def test_the_new_columns_are_those_that_the_output_has(setting: Setting) -> None:
    assert new_columns(["T"], BulkOptions()) == ("T_label", "T_score", "T_reason", "truncated")
    setting.start(top_k=2).run()
    names = pq.read_schema(setting.output / UNITS[0]).names
    assert tuple(names[2:]) == new_columns(["T"], BulkOptions(top_k=2))


def test_equal_jobs_have_one_fingerprint_and_it_is_in_every_file(setting: Setting) -> None:
    bulk = setting.start()
    bulk.run()
    assert setting.start(setting.root / "x").job.fingerprint == bulk.job.fingerprint
    assert setting.start(setting.root / "y", limit=59).job.fingerprint != bulk.job.fingerprint
    for name in UNITS:
        metadata: dict[bytes, bytes] = pq.read_metadata(setting.output / name).metadata
        assert bulk.job.fingerprint.encode() in metadata[FOOTER_KEY]
