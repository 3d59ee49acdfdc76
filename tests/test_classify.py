"""``lorafleet classify`` as users run it: the same files in process and on Ray, and one message per bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import save_tiny_encoder
from commands import Ended, FinishedRun, bulk_rows, run, write_bulk_input

from pipeline.config import load_config

Folders = Callable[[str], Path]
COLUMNS = [
    "id",
    "text",
    "Topics_label",
    "Topics_score",
    "Topics_reason",
    "Pairs_label",
    "Pairs_score",
    "Pairs_reason",
    "truncated",
]
SECRET = "peppermint"  # part of a text, and of nothing else
# One process runs the command once for each list of arguments; a new one each would cost seconds.
IN_TURN = """
import json, os, sys
from flows.cli import main
for number, arguments in enumerate(json.load(open(sys.argv[1]))):
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    try: main(["classify", *arguments])
    except SystemExit as end: code = end.code
    sys.stdout.flush()
    open(f"{number}.code", "w").write(str(code))
"""


@dataclass(frozen=True)
class Place:
    """The place of the tests of this file, with adapters, their encoder and a Prefect server."""

    root: Path
    api: str
    adapters: tuple[str, ...]
    """Options that every command has."""

    def classify(self, *arguments: str | Path, command: str = "classify", **environment: str) -> Ended:
        """``lorafleet classify``, or another bulk command, with one CPU."""
        options = ("--cpus", "1", *self.adapters)
        return run(
            command,
            *arguments,
            *options,
            cwd=self.root,
            PREFECT_API_URL=self.api,
            TOKENIZERS_PARALLELISM="false",
            **environment,
        )


@pytest.fixture(scope="module")
def place(finished_run: FinishedRun, prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Place:
    encoder = load_config(str(finished_run.config)).encoder.name
    adapters = [part for task in ("Topics", "Pairs") for part in ("--adapter", f"{finished_run.root}#{task}")]
    return Place(tmp_path_factory.mktemp("classify"), prefect_api, (*adapters, "--encoder", encoder, "--offline"))


@dataclass(frozen=True)
class Labelled:
    here: Ended
    on_ray: Ended
    root: Path


@pytest.fixture(scope="module")
def labelled(place: Place) -> Labelled:
    """Three files of 80 rows in six units, one row null and one empty, labelled in this process and on Ray."""
    write_bulk_input(
        place.root / "in", num_files=3, rows=80, group=40, changes={3: None, 85: "", 90: f"the {SECRET} sea"}
    )
    here = place.classify("in", "here", "--where", "process", "--rows-per-unit", "40")
    on_ray = place.classify("in", "there", "--where", "ray", "--rows-per-unit", "40")
    return Labelled(here, on_ray, place.root)


def summary(folder: Path) -> dict[str, Any]:
    """``_job.json``, but for times."""
    facts: dict[str, Any] = json.loads((folder / "_job.json").read_text())
    return {name: value for name, value in facts.items() if name not in ("seconds", "rows_per_second")}


def failures(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "_failures.parquet").to_pylist()
    return rows


def times_written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*-*.parquet")}


# --- what comes out ---


def test_this_process_and_ray_give_the_same_files(labelled: Labelled) -> None:
    for ended, name in ((labelled.here, "here"), (labelled.on_ray, "there")):
        assert ended.code == 0, ended.err
        assert ended.out.splitlines()[-1] == f"output: {name}"
    here, there = labelled.root / "here", labelled.root / "there"
    names = sorted(path.name for path in here.iterdir())
    units = [f"part-{file}-{unit:05d}.parquet" for file in range(3) for unit in range(2)]
    assert (
        names
        == sorted(path.name for path in there.iterdir())
        == sorted(["_SUCCESS", "_job.json", "_plan.json", *units])
    )
    for name in units:
        assert (here / name).read_bytes() == (there / name).read_bytes()
    assert summary(here) == summary(there)
    assert "in this process, 1 thread" in labelled.here.err
    assert "on Ray, up to" in labelled.on_ray.err


def test_rows_keep_their_order_and_null_and_empty_texts_say_why_they_have_no_label(labelled: Labelled) -> None:
    rows = bulk_rows(labelled.root / "here")
    given = pa.concat_tables(pq.read_table(path) for path in sorted((labelled.root / "in").iterdir()))
    assert rows.column_names == COLUMNS
    assert rows.select(["id", "text"]).equals(given)
    reasons = rows.column("Topics_reason").to_pylist()
    assert {index: reason for index, reason in enumerate(reasons) if reason} == {3: "text is null", 85: "text is empty"}
    labels = rows.column("Topics_label").to_pylist()
    assert [index for index, label in enumerate(labels) if label is None] == [3, 85]
    assert set(labels) - {None} <= {"sea", "kitchen", "garden"}


def test_the_last_estimate_and_the_summary_are_printed(labelled: Labelled) -> None:
    assert "input: 240 rows in 3 files, 6 units (0 already done)" in labelled.here.err
    assert "first estimate: 40 of 240 rows" in labelled.here.err
    lines = labelled.here.out.splitlines()
    assert lines[0].split() == ["adapter", "label", "rows", "share"]
    assert "without a label: 2 (text is null; each adapter counts)" in lines
    assert "240 of 240 rows in" in lines[-2]
    assert lines[-2].endswith("duplicates, 0 failures")


def test_duckdb_reads_the_output(labelled: Labelled) -> None:
    files = labelled.root / "there" / "**" / "[!_]*.parquet"
    query = f"select count(*), count(distinct id), count(Topics_label), count(Pairs_label) from '{files}'"
    assert duckdb.sql(query).fetchall() == [(240, 240, 238, 238)]


def test_pandas_reads_the_folder(labelled: Labelled) -> None:
    frame = pd.read_parquet(labelled.root / "there")
    assert list(frame) == COLUMNS
    assert sorted(frame.id) == list(range(240))
    assert frame.Topics_score.dropna().between(0, 1).all()


def test_embed_writes_vectors_and_a_table_of_what_int8_loses(labelled: Labelled, place: Place) -> None:
    ended = place.classify("in", "vectors", "--where", "process", "--dtype", "int8", "--width", "16", command="embed")
    assert ended.code == 0, ended.err
    assert "embedding 240 rows in this process, 1 thread" in ended.err
    lines = ended.out.splitlines()
    assert lines[0].split() == ["adapter", "vectors", "rows", "without", "cosine", "neighbours"]
    assert [line.split()[:6] for line in lines[1:3]] == [
        [name, "16", "×", "int8", "238", "2"] for name in ("Topics", "Pairs")
    ]
    assert "without a vector: 2 (text is null; each adapter counts)" in lines
    assert lines[-1] == "output: vectors"
    rows = bulk_rows(place.root / "vectors")
    parts = [f"{name}_{part}" for name in ("Topics", "Pairs") for part in ("vector", "reason")]
    assert rows.column_names == ["id", "text", *parts, "truncated"]
    assert rows.column("Topics_vector").type == pa.list_(pa.int8(), 16)
    assert rows.select(["id", "text"]).equals(bulk_rows(place.root / "here").select(["id", "text"]))
    refused = place.classify("in", "too-wide", "--width", "33", command="embed")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.splitlines()[-1] == "error: --width 33: the vectors of adapter Topics have 32 dimensions"
    assert not (place.root / "too-wide").exists()


def test_no_output_for_people_holds_a_text(labelled: Labelled) -> None:
    texts = [
        text
        for text in pq.read_table(labelled.root / "in").column("text").to_pylist()
        if text and len(text.split()) > 3
    ]
    for ended in (labelled.here, labelled.on_ray):
        assert SECRET not in ended.err + ended.out
        assert not any(text in ended.err + ended.out for text in texts)


def test_a_second_start_does_only_what_is_missing_and_json_is_the_summary_alone(
    labelled: Labelled, place: Place
) -> None:
    folder = place.root / "here"
    before = times_written(folder)
    (folder / "part-1-00001.parquet").unlink()
    (folder / "_SUCCESS").unlink()
    ended = place.classify("in", "here", "--where", "process", "--rows-per-unit", "40", "--json")
    assert ended.code == 0, ended.err
    facts = json.loads(ended.out)
    assert (facts["units"], facts["units_done_before"], facts["rows_in"], facts["rows_out"]) == (6, 5, 240, 240)
    assert {name for name, when in times_written(folder).items() if before[name] != when} == {"part-1-00001.parquet"}
    assert (folder / "_SUCCESS").exists()
    assert (folder / "part-1-00001.parquet").read_bytes() == (
        place.root / "there" / "part-1-00001.parquet"
    ).read_bytes()


# --- one bad file among good ones ---


@pytest.mark.faults
def test_a_corrupt_file_is_a_failure_and_when_it_is_mended_it_alone_is_done(place: Place) -> None:
    folder = write_bulk_input(place.root / "mixed", num_files=3, rows=30, group=30)
    whole = (folder / "part-1.parquet").read_bytes()
    (folder / "part-1.parquet").write_bytes(whole[: len(whole) // 2])
    ended = place.classify("mixed", "mixed-out")
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert f"failed: {folder / 'part-1.parquet'}: not a whole Parquet file" in ended.err
    assert ended.out.splitlines()[-1] == "output: mixed-out"
    out = place.root / "mixed-out"
    assert [(row["path"], row["unit"]) for row in failures(out)] == [(str(folder / "part-1.parquet"), None)]
    assert set(bulk_rows(out).column("id").to_pylist()) == {*range(30), *range(60, 90)}
    assert not (out / "_SUCCESS").exists()

    before = times_written(out)
    assert place.classify("mixed", "mixed-out").code == 1  # nothing has changed
    assert times_written(out) == before

    (folder / "part-1.parquet").write_bytes(whole)
    ended = place.classify("mixed", "mixed-out")
    assert ended.code == 0, ended.err
    assert bulk_rows(out).column("id").to_pylist() == list(range(90))
    assert {name for name, when in times_written(out).items() if before.get(name) != when} == {"part-1-00000.parquet"}
    assert (out / "_SUCCESS").exists()
    assert not (out / "_failures.parquet").exists()

    (folder / "part-1.parquet").write_bytes(whole[: len(whole) // 2])
    before = times_written(out)
    ended = place.classify("mixed", "mixed-out", "--top-k", "2", "--overwrite")
    assert ended.code == 1
    assert "the old output in mixed-out is unchanged, because of the failures" in ended.err
    (aside,) = out.glob("_next-*")
    assert ended.out.splitlines()[-1] == f"output: {aside}"
    assert times_written(out) == before
    assert len(bulk_rows(aside)) == 60


def test_a_unit_whose_data_are_damaged_is_a_failure_and_the_others_are_done(place: Place) -> None:
    """The footer is whole, so the fault shows only where the unit is read."""
    folder = write_bulk_input(place.root / "damaged", num_files=1, rows=90, group=30)
    path = folder / "part-0.parquet"
    column = pq.read_metadata(path).row_group(1).column(1)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    ended = place.classify("damaged", "damaged-out", "--rows-per-unit", "30")
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.err
    out = place.root / "damaged-out"
    assert [(row["unit"], row["first_row"], row["num_rows"]) for row in failures(out)] == [(1, 30, 30)]
    assert bulk_rows(out).column("id").to_pylist() == [*range(30), *range(60, 90)]
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


# --- refused before work starts ---


@dataclass(frozen=True)
class Refusal:
    arguments: Sequence[str]
    words: str
    """Words that the message must hold."""


REFUSALS = {
    "a missing text column": Refusal(
        ["good", "out", "--text-column", "body"], "no column 'body'; its columns are id, text"
    ),
    "a text column of numbers": Refusal(["good", "out", "--text-column", "id"], "column 'id' is int64, not text"),
    "a missing column to keep": Refusal(["good", "out", "--columns", "id,nope"], "no column 'nope'"),
    "schemas that differ": Refusal(["differing", "out"], "these two cannot be joined without a loss"),
    "no such input": Refusal(["nowhere", "out"], "no such file or folder"),
    "no such glob": Refusal(["good/*.pq", "out"], "no such file or folder"),
    "a folder without Parquet": Refusal(["empty", "out"], "no Parquet file in it"),
    "an unknown protocol": Refusal(["nope://good", "out"], "nope://good: cannot be opened: Protocol not known"),
    "a column that the output adds": Refusal(["colliding", "out"], "it has Topics_label already"),
    "an output inside the input": Refusal(["good", "good/out"], "is inside the input"),
    "an output that is the input": Refusal(["good", "good"], "is inside the input"),
    "an output that is a file": Refusal(["good", "good/part-0.parquet"], "output"),
    "an output folder of somebody's": Refusal(["good", "taken"], "holds mine.txt, but no plan of a job"),
    "another encoder": Refusal(["good", "out", "--encoder", "{other}"], "adapter Topics: trained on"),
    "no such encoder": Refusal(["good", "out", "--encoder", "./nowhere"], "nowhere"),
    "two encoders": Refusal(["good", "out", "--adapter", "{elsewhere}"], "were trained with encoder revision"),
    "two adapters of one name": Refusal(
        ["good", "out", "--adapter", "Pairs={run}#Topics"], "two adapters are called Pairs"
    ),
    "no such adapter": Refusal(
        ["good", "out", "--adapter", "{run}#Nope"], "it has no adapter Nope; it has Pairs, Topics"
    ),
    "no such run": Refusal(["good", "out", "--adapter", "nope#Nope"], "adapter nope#Nope: there is no folder nope"),
    "an adapter that is not chosen": Refusal(["good", "out", "--adapter", "{run}"], "choose one of its adapters"),
    "a probability above one": Refusal(
        ["good", "out", "--min-score", "2"], "--min-score: Input should be less than or equal to 1"
    ),
    "no label at all": Refusal(["good", "out", "--top-k", "0"], "--top-k: Input should be greater than or equal to 1"),
    "a sample of everything": Refusal(["good", "out", "--sample", "1"], "--sample: Input should be less than 1"),
    "units of nothing": Refusal(["good", "out", "--rows-per-unit", "0"], "--rows-per-unit: "),
    "no actor": Refusal(["good", "out", "--concurrency", "0"], "--concurrency: "),
    "a share that is no number": Refusal(["good", "out", "--cpus", "many"], "--cpus: "),
    "both thresholds": Refusal(
        ["good", "out", "--min-score", "0.5", "--target-accuracy", "0.9"], "both set a threshold; choose one"
    ),
    "a width of nothing": Refusal(["good", "out", "--width", "8"], "--width has no effect without --vectors"),
    "a width without bytes": Refusal(
        ["good", "out", "--vectors", "--dtype", "binary", "--width", "12"],
        "--width: --dtype binary packs 8 dimensions into a byte; expected a multiple of 8, found 12",
    ),
    "two places": Refusal(
        ["good", "out", "--where", "process", "--ray-address", "127.0.0.1:1"], "name two places; choose one"
    ),
    "a place that is not there": Refusal(["good", "out", "--where", "elsewhere"], "'elsewhere' is not one of"),
    "an option that is none": Refusal(["good", "out", "--nope"], "--nope"),
    "a cluster that does not answer": Refusal(
        ["good", "begun", "--ray-address", "127.0.0.1:1"], "no Ray cluster answers there"
    ),
}


@pytest.fixture(scope="module")
def refused(place: Place, finished_run: FinishedRun) -> dict[str, Ended]:
    """Answers of the command to each of ``REFUSALS``."""
    root = place.root / "refused"
    write_bulk_input(root / "good", num_files=1, rows=10, group=10)
    write_bulk_input(root / "differing", num_files=2, rows=10, group=10)
    pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), root / "differing" / "part-1.parquet")
    for folder in ("colliding", "empty", "taken"):
        (root / folder).mkdir()
    pq.write_table(pa.table({"text": ["a"], "Topics_label": ["b"]}), root / "colliding" / "part.parquet")
    (root / "taken" / "mine.txt").write_text("kept")
    other = save_tiny_encoder(root / "other", "bert", seed=1)
    shutil.copytree(finished_run.root / "Pairs", root / "Elsewhere")
    meta = json.loads((root / "Elsewhere" / "meta.json").read_text())
    meta["task"], meta["encoder"]["revision"] = "Elsewhere", "sha256:" + "0" * 64
    (root / "Elsewhere" / "meta.json").write_text(json.dumps(meta))
    names = {"other": other, "elsewhere": root / "Elsewhere", "run": finished_run.root}
    cases = [[*place.adapters, *(part.format(**names) for part in refusal.arguments)] for refusal in REFUSALS.values()]
    (root / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"PREFECT_API_URL": place.api}
    subprocess.run([sys.executable, "-c", IN_TURN, "cases.json"], cwd=root, env=environment, check=True, timeout=240)
    assert not (root / "out").exists()
    assert [path.name for path in (root / "good").iterdir()] == ["part-0.parquet"]
    assert [path.name for path in (root / "taken").iterdir()] == ["mine.txt"]
    read = [
        [(root / f"{number}.{name}").read_text() for name in ("code", "out", "err")] for number in range(len(cases))
    ]
    return {name: Ended(int(code), out, err, 0) for name, (code, out, err) in zip(REFUSALS, read, strict=True)}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_exit_code_2_and_one_message(case: str, refused: dict[str, Ended]) -> None:
    ended = refused[case]
    assert ended.code == 2, ended.err
    assert REFUSALS[case].words in ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""


def test_an_adapter_of_a_local_encoder_asks_where_it_lies(place: Place, finished_run: FinishedRun) -> None:
    write_bulk_input(place.root / "few", num_files=1, rows=10, group=10)
    arguments = ("classify", "few", "few-out", "--adapter", f"{finished_run.root}#Topics")
    ended = run(*arguments, cwd=place.root, PREFECT_API_URL=place.api)
    assert ended.code == 2
    assert "give their location: --encoder" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.faults
def test_another_job_into_the_same_folder_is_refused_and_overwritten_when_asked(
    labelled: Labelled, place: Place
) -> None:
    arguments = ("in", "there", "--where", "process", "--rows-per-unit", "40", "--top-k", "2")
    before = times_written(place.root / "there")
    ended = place.classify(*arguments)
    assert ended.code == 2
    assert "options.top_k: then 1, now 2" in ended.err
    assert times_written(place.root / "there") == before
    ended = place.classify(*arguments, "--overwrite")
    assert ended.code == 0, ended.err
    rows = bulk_rows(place.root / "there")
    assert len(rows) == 240
    assert all(top is None or len(top) == 2 for top in rows.column("Topics_top_k").to_pylist())
    assert rows.select(COLUMNS[:-1]).equals(bulk_rows(place.root / "here").select(COLUMNS[:-1]))
    assert [path.name for path in (place.root / "there").iterdir() if path.is_dir()] == []
