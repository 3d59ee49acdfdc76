"""One test per row of the README's table of exit codes, each through the console script."""

from __future__ import annotations

import fcntl
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from bulk import save_bulk_adapter
from commands import PLANTED, SCRIPT, Command, Ended, FinishedRun, bulk_rows, run, write_bulk_input

Folders = Callable[[str], Path]
ROWS = 80
# As a shell starts what ends in "&": the command ignores Ctrl-C, which is for what is in front.
BEHIND = ("bash", "-c", 'trap "" INT; exec "$0" "$@"', *SCRIPT)


class Place:
    """A folder with a bulk job's input and adapter, and a finished run elsewhere."""

    def __init__(self, cwd: Path, encoder: Path, finished: FinishedRun, api: str) -> None:
        self.cwd, self.finished, self._api = cwd, finished, api
        save_bulk_adapter(cwd / "topics", encoder)
        write_bulk_input(cwd / "in", num_files=1, rows=ROWS, group=20)
        self._options = (
            "--adapter",
            "topics",
            "--encoder",
            encoder,
            "--offline",
            "--rows-per-unit",
            "20",
            "--cpus",
            "1",
        )

    def run(self, *arguments: str | Path, **environment: str) -> Ended:
        """``lorafleet``, to its end."""
        return run(*arguments, cwd=self.cwd, program=SCRIPT, **environment)

    def classify(self, *arguments: str, program: Sequence[str] = SCRIPT, **environment: str) -> Command:
        """A bulk job, begun."""
        given = environment | {"PREFECT_API_URL": self._api}
        return Command("classify", "in", "out", *self._options, *arguments, cwd=self.cwd, program=program, **given)


@pytest.fixture
def place(encoder_folder: Folders, finished_run: FinishedRun, prefect_api: str, tmp_path: Path) -> Place:
    return Place(tmp_path, encoder_folder("bert"), finished_run, prefect_api)


def nothing_is_started(place: Place) -> Ended:
    return place.run("train", "--dry-run")


def a_run_is_shown(place: Place) -> Ended:
    return place.run("show", place.finished.root)


def a_job_is_done(place: Place) -> Ended:
    return place.classify().wait()


def nothing_is_left_to_do(place: Place) -> Ended:
    place.classify().wait()
    ended = place.classify().wait()
    assert "nothing was left to do" in ended.out
    return ended


def the_reader_goes_away(place: Place) -> Ended:
    line = f"{SCRIPT[0]} show {place.finished.root} | sed q; exit ${{PIPESTATUS[0]}}"
    return Command("-c", line, cwd=place.cwd, program=("bash",)).wait()


def a_file_cannot_be_read(place: Place) -> Ended:
    (place.cwd / "in" / "torn.parquet").write_bytes(b"PAR1 torn")
    ended = place.classify().wait()
    assert f"{ROWS} of {ROWS} rows" in ended.out
    assert "failed: " in ended.err
    return ended


def a_run_cannot_be_deleted_or_is_broken(place: Place) -> Ended:
    (place.cwd / "file").write_text("", encoding="utf-8")
    ended = place.run("doctor", "--runs", "file")
    assert "fault    run store" in ended.out
    return ended


def an_option_is_unknown(place: Place) -> Ended:
    return place.run("train", "--nosuch")


def a_key_of_the_config_is_unknown(place: Place) -> Ended:
    return place.run("train", "--set", "train.sed=1")


def the_input_is_not_there(place: Place) -> Ended:
    shutil.rmtree(place.cwd / "in")
    return place.classify().wait()


def the_adapter_is_damaged(place: Place) -> Ended:
    (place.cwd / "topics" / "meta.json").write_text("{", encoding="utf-8")
    return place.classify().wait()


def a_name_is_too_long(place: Place) -> Ended:
    return place.run("show", "n" * 300)


def the_store_is_in_use(place: Place) -> Ended:
    (place.cwd / "runs").mkdir()
    with (place.cwd / "runs" / ".lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return place.run("train", "--config", place.finished.config)


def the_disk_behind_standard_output_is_full(place: Place) -> Ended:
    return Command("-c", f"{SCRIPT[0]} show {place.finished.root} > /dev/full", cwd=place.cwd, program=("bash",)).wait()


def stopped(number: signal.Signals, *, program: Sequence[str] = SCRIPT) -> Callable[[Place], Ended]:
    """A job that is stopped after its first unit; the next start does the rest."""

    def stop(place: Place) -> Ended:
        job = place.classify("--where", "process", program=program, PYTHONPATH=str(PLANTED), PLANTED_SECONDS="1.5")
        job.wait_until(lambda: list((place.cwd / "out").glob("part-0-*.parquet")))
        job.process.send_signal(number)
        ended = job.wait(seconds=60)
        assert "Crash detected" not in ended.err
        assert ended.err.count("interrupted; finished work is kept") == 1
        assert job.left(seconds=10) == []
        done = {path.name: path.stat().st_mtime_ns for path in (place.cwd / "out").glob("part-0-*.parquet")}
        assert 1 <= len(done) < 4
        assert place.classify().wait().code == 0
        assert {name: (place.cwd / "out" / name).stat().st_mtime_ns for name in done} == done
        assert bulk_rows(place.cwd / "out").num_rows == ROWS
        return ended

    stop.__name__ = f"stopped_by_{number.name}{'_in_the_background' * (program is BEHIND)}"
    return stop


DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
TABLE: dict[int, list[Callable[[Place], Ended]]] = {
    DONE: [nothing_is_started, a_run_is_shown, a_job_is_done, nothing_is_left_to_do, the_reader_goes_away],
    FAILED: [a_file_cannot_be_read, a_run_cannot_be_deleted_or_is_broken],
    WRONG: [
        *(
            an_option_is_unknown,
            a_key_of_the_config_is_unknown,
            the_input_is_not_there,
            the_adapter_is_damaged,
            a_name_is_too_long,
        ),
        *(the_store_is_in_use, the_disk_behind_standard_output_is_full),
    ],
    INTERRUPTED: [
        *(stopped(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)),
        stopped(signal.SIGTERM, program=BEHIND),
    ],
}


def _marks(case: Callable[[Place], Ended]) -> Sequence[pytest.MarkDecorator]:
    """Signals beyond the first two are long runs: twenty seconds each, on the same path."""
    is_another = case.__name__ in ("stopped_by_SIGHUP", "stopped_by_SIGTERM_in_the_background")
    return [pytest.mark.faults] if is_another else []


@pytest.mark.parametrize(
    ("code", "case"),
    [pytest.param(code, case, id=case.__name__, marks=_marks(case)) for code, cases in TABLE.items() for case in cases],
)
def test_the_exit_code_is_that_of_the_table(code: int, case: Callable[[Place], Ended], place: Place) -> None:
    ended = case(place)
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err + ended.out
    if code == WRONG:
        assert ended.out == ""
        assert len([line for line in ended.err.splitlines() if line.lower().startswith("error: ")]) == 1


def test_what_a_label_a_file_and_a_folder_are_called_cannot_forge_a_line(
    encoder_folder: Folders, prefect_api: str, tmp_path: Path
) -> None:
    """The line is looked for on the terminal, in the log, in Prefect's artifact and in its state."""
    from prefect_server import Api

    evil = "x\x1b[2J\n00:00:00 | forged"
    written = r"x\x1b[2J\n00:00:00 | forged"
    save_bulk_adapter(tmp_path / "topics", encoder_folder("bert"), labels=(evil, "kitchen | **b**", "\u202egarden"))
    source = write_bulk_input(tmp_path / evil, num_files=1, rows=40, group=20)
    (source / f"torn{evil}.parquet").write_bytes(b"PAR1 torn")
    options = ("--adapter", "topics", "--encoder", encoder_folder("bert"), "--offline", "--cpus", "1")
    ended = run("classify", source, "out", *options, cwd=tmp_path, program=SCRIPT, PREFECT_API_URL=prefect_api)
    assert ended.code == 1, ended.err
    api = Api(prefect_api)
    flow_run = api.newest_flow_run("classify-datasets")
    artifact = api.artifacts(flow_run)["bulk-summary"]
    logs = [log["message"] for log in api.post("/logs/filter", logs={"flow_run_id": {"any_": [flow_run]}})]
    for text in (ended.out, ended.err, artifact, *logs, api.state(flow_run)["message"]):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert [line for line in text.splitlines() if line.startswith("00:00:00 | forged")] == []
    assert written in ended.out
    assert written in ended.err
    assert r"kitchen \| \*\*b\*\*" in artifact
    labels = {label for label in bulk_rows(tmp_path / "out").column("topics_label").to_pylist() if label}
    assert labels <= {evil, "kitchen | **b**", "\u202egarden"}  # data stay data
    assert pq.read_table(tmp_path / "out" / "_failures.parquet").num_rows == 1
