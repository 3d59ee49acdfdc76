"""A run store and publications of an older version: shown, verified, used, published over, rolled back to."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from commands import run
from publishing import REPO, Place, hub_of_our_own

from pipeline.history.tables import read_scores, read_values, run_values
from pipeline.history.values import values_of
from pipeline.publishing.publish import rollback
from pipeline.records import Publication, TaskResult
from pipeline.store.files import read_record
from pipeline.store.run_folder import RunFolder

ARCHIVE = Path(__file__).parent / "older" / "before_rooms.tar.xz"
FIRST, SECOND = "20261130-083731-7921", "20261130-083936-136c"


@dataclass(frozen=True)
class Older:
    """The files of the archive, as if they had been made in this folder."""

    root: Path

    @property
    def encoder(self) -> str:
        return str(self.root / "encoder")

    def files(self, publication: str) -> dict[str, bytes]:
        folder = self.root / publication
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def older(tmp_path: Path) -> Older:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.suffix in (".json", ".toml") and "published" not in path.parts[-3:]:
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace('"/older/', f'"{tmp_path}/'), encoding="utf-8")
    return Older(tmp_path)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Place]:
    with hub_of_our_own(tmp_path / "hub") as place:
        yield place


def test_its_runs_and_its_history_are_shown(older: Older) -> None:
    history = run("show", "runs", cwd=older.root)
    assert history.code == 0, history.err
    topics = [line.split() for line in history.out.splitlines() if line.startswith("Topics")]
    assert topics == [
        ["Topics", FIRST, "59.5", "59.5", "65.0", "65.0"],
        ["Topics", SECOND, "56.5", "79.0", "75.0", "77.5"],
    ]
    shown = run("show", f"runs/{SECOND}", cwd=older.root)
    assert shown.code == 0, shown.err
    assert "56.5 53.6–59.4" in shown.out
    assert "within noise" in shown.out
    assert run("show", "published-second", cwd=older.root).code == 0


@pytest.mark.parametrize("ref", [f"runs/{SECOND}", "published-first", "published-second", "published-second#Pairs"])
def test_its_adapters_are_verified(ref: str, older: Older) -> None:
    ended = run("verify", ref, "--encoder", older.encoder, cwd=older.root)
    assert ended.code == 0, ended.err
    names = ["Pairs"] if "#" in ref else ["Topics", "Pairs"]
    assert [line.split()[1].rstrip(":") for line in ended.out.splitlines()] == names


def test_its_adapters_give_the_labels_that_they_gave(older: Older) -> None:
    adapters = ("--adapter", f"topics=runs/{SECOND}#Topics", "--adapter", "pairs=published-second#Pairs")
    ended = run("classify", "data/Topics-test.parquet", "again", *adapters, "--encoder", older.encoder, cwd=older.root)
    assert ended.code == 0, ended.err
    now, then = (
        pq.read_table(next((older.root / folder).glob("*.parquet"))).to_pydict() for folder in ("again", "labelled")
    )
    assert now.keys() == then.keys()
    for name, values in then.items():
        if name.endswith("_score"):  # The archive's scores were computed in bfloat16.
            assert now[name] == pytest.approx(values, abs=0.03), name
        else:
            assert now[name] == values, name


def test_its_run_is_published_over_its_publication_with_the_same_verdicts(older: Older) -> None:
    ended = run("publish", f"runs/{SECOND}", "--to", "published-first", "--json", cwd=older.root)
    assert ended.code == 0, ended.err
    decisions = {decision["mteb_task"]: decision for decision in json.loads(ended.out)["decisions"]}
    assert {name: decision["decision"] for name, decision in decisions.items()} == {
        "Topics": "promote",
        "Pairs": "keep",
    }
    assert decisions["Topics"]["reason"].startswith("77.5 against 62.5 on the same 40 texts, +15.0 points")
    folder = RunFolder(older.root / "published-first")
    assert read_record(folder.publication, Publication).run_id == SECOND
    assert {row.mteb_task for row in read_values(folder.values)} == {"Topics", "Pairs"}
    assert run("verify", "published-first", "--encoder", older.encoder, cwd=older.root).code == 0


def test_its_publication_on_the_hub_is_rolled_back_to(older: Older, hub: Place) -> None:
    hub.lay_down(older.files("published-first"))
    first = hub.hub.head(REPO)
    hub.hub.commit(REPO, older.files("published-second"))
    assert Publication.model_validate_json(hub.files()["publication.json"]).run_id == SECOND
    landed, verified = rollback(f"hf:{REPO}", first, encoder=older.encoder, offline=False)
    assert {adapter.name for adapter in verified} == {"Topics", "Pairs"}
    assert hub.hub.head(REPO) == landed
    assert hub.files()["publication.json"] == older.files("published-first")["publication.json"]


def test_its_scores_are_read_as_values(older: Older) -> None:
    folder = RunFolder(older.root / "runs" / SECOND)
    result = read_record(folder.task("Topics").result, TaskResult)
    assert result.values == ()
    values = {(row.column, row.metric): row for row in values_of(result)}
    for row in result.scores:
        accuracy = values[row.column, "accuracy"]
        assert (accuracy.value, accuracy.low, accuracy.high) == (row.accuracy, row.low, row.high)
        assert (accuracy.num_texts, accuracy.main) == (row.num_texts, True)
        assert values[row.column, "macro_f1"].value == row.macro_f1
    scores = read_scores(older.root / "runs" / "metrics" / f"scores-{SECOND}.parquet")
    assert len(run_values(older.root / "runs", SECOND, scores)) > len(values)


def test_a_newer_run_beside_older_ones_is_read_by_pandas_duckdb_and_polars(older: Older) -> None:
    ended = run("train", "--config", "config.toml", "--runs", "runs", cwd=older.root)
    assert ended.code == 0, ended.err
    newest = ended.run.name
    runs = older.root / "runs"
    by_pandas = pd.read_parquet(runs / "metrics")
    by_polars = pl.read_parquet(runs / "metrics" / "*.parquet")
    by_duckdb = duckdb.sql(f"select * from '{runs}/metrics/*.parquet'").fetchall()
    assert len(by_pandas) == len(by_polars) == len(by_duckdb) == 30
    assert set(by_pandas["run_id"]) == {FIRST, SECOND, newest}
    values = pd.read_parquet(runs / "values")
    assert set(values["run_id"]) == {newest}
    assert values.equals(pd.read_parquet(runs / newest / "metrics" / "values.parquet"))
    assert len(pl.read_parquet(runs / "values" / "*.parquet")) == len(values)
    query = f"select t.column, metric, value from '{runs}/values/*.parquet' t"
    query += " where main and slice is null and mteb_task = 'Topics'"
    found = {(column, metric): value for column, metric, value in duckdb.sql(query).fetchall()}
    scores = by_pandas[(by_pandas["run_id"] == newest) & (by_pandas["mteb_task"] == "Topics")].set_index("column")
    assert found == {(column, "accuracy"): scores.loc[column, "accuracy"] for column in scores.index}
    head = values[(values["column"] == "head") & (values["mteb_task"] == "Topics")].set_index("metric")
    assert set(head.index) == {"accuracy", "macro_f1", "matthews"}
    assert (head["low"] <= head["value"]).all()
    assert (head["value"] <= head["high"]).all()
    page = (runs / "history.html").read_text(encoding="utf-8")
    assert all(run_id in page for run_id in (FIRST, SECOND, newest))
    assert "Matthews correlation" in (runs / newest / "report.html").read_text(encoding="utf-8")
