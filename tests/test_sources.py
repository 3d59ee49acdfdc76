from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import absolute
from pipeline.errors import DataError
from pipeline.labelled_files.formats import read_table
from pipeline.labelled_files.sources import find_sources, read_content

COLUMNS = {"text_column": "text", "label_column": "label"}
ROWS = [
    ("a red fox", "fox"),
    ("one, two\nthree", "whale"),
    ('he said "so"', "fox"),
    ("007", "NA"),
    ("", "null"),
    ("  é\u2028; ", "whale"),
]


def read(path: Path, **columns: str) -> list[tuple[Any, ...]]:
    table = read_table(read_content(str(path)), str(path), columns=COLUMNS | columns)
    return list(zip(*(table[name].to_pylist() for name in (COLUMNS | columns).values()), strict=True))


def fault(path: Path, content: bytes | str, **columns: str) -> str:
    """Return the message about a file that must be refused, without the folder."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read(path, **columns)
    return str(caught.value).replace(f"{path.parent}/", "")


def as_csv(separator: str = ",", newline: str = "\n") -> bytes:
    quoted = [[f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row] for row in [("text", "label"), *ROWS]]
    return "".join(separator.join(row) + newline for row in quoted).encode()


def as_json_lines() -> bytes:
    return "".join(
        json.dumps({"id": i, "text": text, "label": label}) + "\n" for i, (text, label) in enumerate(ROWS)
    ).encode()


def as_parquet(folder: Path, **columns: Any) -> bytes:
    pq.write_table(
        pa.table(columns or dict(zip(("text", "label"), map(list, zip(*ROWS, strict=True)), strict=True))),
        folder / "made",
    )
    return (folder / "made").read_bytes()


# --- formats ---


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    contents = {
        "a.csv": as_csv(),
        "a.CSV": as_csv(newline="\r\n"),
        "bom.csv": b"\xef\xbb\xbf" + as_csv(";"),
        "bars.csv": as_csv("|"),
        "a.tsv": as_csv("\t"),
        "blank lines.csv": b"\n" + as_csv().replace(b"label", b"label", 1) + b"\n\n",
        "a.csv.gz": gzip.compress(as_csv()),
        "unpacked on the way.csv.gz": as_csv(),
        "packed.csv": gzip.compress(as_csv()),
        "a.jsonl": as_json_lines(),
        "a.ndjson": as_json_lines().replace(b"\n", b"\r\n\n"),
        "a.json": b"\xef\xbb\xbf" + as_json_lines(),
        "a.JSONL.GZ": gzip.compress(as_json_lines()),
        "a.parquet": as_parquet(tmp_path),
        "a.pq": as_parquet(tmp_path),
        "no ending, Parquet": as_parquet(tmp_path),
        "no ending, JSON Lines": gzip.compress(as_json_lines()),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == ROWS, name


def test_lines_of_csv_may_end_as_on_an_old_macintosh(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\rx,1\ry,2\r")
    assert read(tmp_path / "a.csv") == [("x", "1"), ("y", "2")]


def test_a_text_longer_than_any_buffer_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f'label,text\nx,"{"long " * 400_000}"\n')
    assert [len(text) for text, _ in read(tmp_path / "a.csv")] == [2_000_000]


def test_the_separator_is_the_one_under_which_the_columns_have_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('who;"text";label\nA,B;x, y, z;1\n')
    assert read(tmp_path / "a.csv", group_column="who") == [("x, y, z", "1", "A,B")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,label\nx,1\ny,2,3\n", "line 3 ends a row of 3 values, but the header names 2 columns"),
        ("a.csv", 'text,label\n"x\ny",1\nz\n', "line 4 ends a row of 1 values"),
        ("a.csv", 'text,label\nx,1\n"y,2\n', "line 3: unexpected end of data; double a quotation mark"),
        ("a.csv", 'text,label\n"x" y,1\n', "line 2: ',' expected after"),
        ("a.csv", "text;label;x,text,label\n1;2;3,4,5\n", "names the columns with ',' and with ';' between them"),
        (
            "a.csv",
            "x,1\ny,2\n",
            "no column 'text', but 'x', '1'; set text_column for this MTEB task in the config; "
            "its first line must name",
        ),
        ("a.csv", "x" * 61 + ",1\n", f"no column 'text', but '{'x' * 60}…', '1'"),
        ("a.csv", "text, label\nx,1\n", "no column 'label', but 'text', ' label'; set label_column"),
        ("a.csv", "text,label,text\nx,1,y\n", "has 2 columns named 'text'"),
        ("a.csv", "text:label\nx:1\n", "no column 'text', but 'text:label'"),
        ("a.csv", b"text,label\nx,1\ncaf\xe9,2\n", "is not UTF-8: byte 18 (0xe9, line 3) cannot be decoded"),
        ("a.csv", "text,label\nx,1\n".encode("utf-16"), "is not UTF-8: byte 0 (0xff, line 1)"),
        ("a.csv", b"", "a.csv is empty (0 bytes)"),
        ("a.csv.gz", gzip.compress(as_csv())[:-9], "cannot be unpacked: Compressed file ended"),
        ("a.tsv", 'text\tlabel\n"x\t1\ny\t2\nz"\t3\n', "quotation marks join lines that are rows without them"),
        (
            "a.jsonl",
            '{"text": "x", "label": 1}\n{"text": "x"',
            "line 2 is not JSON: Expecting ',' delimiter at column 13",
        ),
        ("a.jsonl", '{"text": "x", "label": 1}\n\n[1]', "line 3 is a list; expected an object"),
        ("a.jsonl", '{"text": "x", "label": 1, "label": 2}', "line 1: the key 'label' occurs twice"),
        (
            "a.jsonl",
            '{"text": "x", "label": 1}\n{"text": "x", "label": "1"}',
            "'label' holds a number (line 1) and a string (line 2)",
        ),
        (
            "a.jsonl",
            '{"text": "x", "label": true}\n{"text": "x", "label": 1}',
            "a boolean (line 1) and a number (line 2)",
        ),
        ("a.jsonl", '{"body": "x"}\n{"label": 1}', "has no column 'text', but 'body', 'label'"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}', "line 1 holds half a surrogate pair"),
        (
            "a.jsonl",
            '{"text": "x", "label": ' + "9" * 30 + "}",
            "'label' holds a whole number that needs more than 64 bits",
        ),
        ("a.jsonl", '{"text": "x", "label": ' + "9" * 6000 + "}", "line 1: Exceeds the limit (4300 digits)"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "line 1: maximum recursion depth exceeded"),
        ("a.jsonl", " \n", "has no column 'text'"),
        ("a.json", '[{"text": "x", "label": 1}]', "is one JSON array; expected JSON Lines"),
        ("a.parquet", as_csv(), "is named as Parquet, but its content is text"),
        ("a.parquet", as_json_lines(), "is named as Parquet, but its content is JSON Lines"),
        ("a.csv", b"PAR1\0", "is named as CSV, but its content is Parquet"),
        ("a.csv", b"PK\x03\x04\0", "but its content is a zip archive or an Excel sheet"),
        (
            "a.xlsx",
            b"PK\x03\x04\0",
            "its name does not show its format, and its content is a zip archive or an Excel sheet",
        ),
        (
            "a.txt",
            as_csv(),
            "its name does not show its format, and its content is text; expected a name that ends in .csv, .tsv",
        ),
        ("a.parquet", b"PAR1\0 and no more", "its footer cannot be read"),
    ],
)
def test_an_unreadable_file_gives_one_message_with_fault_and_line(
    name: str, content: bytes | str, words: str, tmp_path: Path
) -> None:
    message = fault(tmp_path / name, content)
    assert words in message
    assert message.startswith(name)


def test_names_that_begin_as_a_binary_format_does_are_names(tmp_path: Path) -> None:
    for first in ("PARENT", "ORCID", "BZhe"):
        (tmp_path / "a.csv").write_text(f"{first},text,label\n0,x,1\n")
        assert read(tmp_path / "a.csv") == [("x", "1")]


def test_a_value_that_is_missing_from_json_is_null(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "x", "label": 1}\n{"text": null, "label": 2.0}\n{"text": "z"}\n{"text": "z", "label": NaN}\n'
    )
    assert read(tmp_path / "a.jsonl") == [("x", 1), (None, 2), ("z", None), ("z", None)]


def test_a_parquet_file_with_fewer_values_than_its_footer_promises_is_refused(tmp_path: Path) -> None:
    """The nulls are in all columns that are read, so that no other column reveals them."""
    content = as_parquet(tmp_path, text=["x"] * 5, label=["y"] * 5)
    damaged = content.replace(
        b"\x16\x0a", b"\x16\x0e"
    )  # num_rows and num_values in the footer: 5, in zigzag, becomes 7
    assert damaged != content
    (tmp_path / "a.parquet").write_bytes(damaged)
    with pytest.raises(DataError, match=r"a\.parquet: its footer promises 7 rows, but 'text', 'label' hold 5"):
        read(tmp_path / "a.parquet")


def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").mkdir()
    with pytest.raises(DataError, match=r"a\.parquet cannot be read: .*Is a directory"):
        read_content(str(tmp_path / "a.parquet"))


# --- folders and globs ---


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(as_csv())
    return folder


def test_files_with_a_known_ending_are_read_and_the_others_are_reported(tmp_path: Path) -> None:
    folder = made(
        tmp_path / "in",
        "b.csv",
        "a.CSV.gz",
        "deep/c.tsv",
        "_k=v/d.csv",
        "README.md",
        "x.csv~",
        "x.csv.tmp",
        ".e.csv",
        "_f.csv",
    )
    made(tmp_path / "elsewhere", "linked.csv")
    (folder / "link.csv").symlink_to(tmp_path / "elsewhere" / "linked.csv")
    (folder / "up").symlink_to(folder)
    os.mkfifo(folder / "pipe.csv")
    found = find_sources(str(folder))
    assert found.paths == tuple(
        f"{folder}/{name}" for name in ("_k=v/d.csv", "a.CSV.gz", "b.csv", "deep/c.tsv", "link.csv")
    )
    assert found.left_out == (".e.csv", "README.md", "_f.csv", "x.csv.tmp", "x.csv~")


def test_a_glob_reads_its_matches(tmp_path: Path) -> None:
    folder = made(tmp_path, "2025/a.csv", "2026/b.csv", "2026/c.data", "2026/_d.csv")
    assert find_sources(f"{folder}/20*/*.csv").paths == (f"{folder}/2025/a.csv", f"{folder}/2026/b.csv")
    assert find_sources(f"{folder}/20*").paths == (f"{folder}/2025/a.csv", f"{folder}/2026/b.csv")
    assert find_sources(f"{folder}/2026/?.data").paths == (f"{folder}/2026/c.data",)
    assert find_sources(f"{made(tmp_path, '[x]/a.csv')}/[x]").paths == (f"{folder}/[x]/a.csv",)


def test_a_folder_of_an_object_store_is_read_as_one_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in {
            "ACCESS_KEY_ID": "a",
            "SECRET_ACCESS_KEY": "b",
            "DEFAULT_REGION": "us-east-1",
            "ENDPOINT_URL": address,
        }.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        store = s3fs.S3FileSystem()
        store.mkdir("lake")
        for name in ("in/a.csv", "in/deep/b.csv", "in/_c.csv", "in/README.md"):
            store.pipe(f"lake/{name}", as_csv())
        found = find_sources("s3://lake/in")
        assert found.paths == ("s3://lake/in/a.csv", "s3://lake/in/deep/b.csv")
        assert found.left_out == ("README.md", "_c.csv")
        assert find_sources("s3://lake/in/*.csv").paths == ("s3://lake/in/a.csv",)
        assert read_table(read_content(found.paths[0]), found.paths[0], columns=COLUMNS).num_rows == len(ROWS)
        with pytest.raises(DataError, match="s3://lake/gone does not exist"):
            find_sources("s3://lake/gone")
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("names", "location", "words"),
    [
        ((), "gone.csv", "gone.csv does not exist"),
        ((), "gone/*.csv", "gone/*.csv does not exist"),
        (("in/README.md",), "in", "in has no file to learn from; it has 'README.md'; expected files that end in .csv"),
        (("in/a.csv", "in/b.parquet"), "in", "holds CSV and Parquet"),
        (("in/train.csv", "in/test.csv"), "in", "holds files of more than one split"),
        (("in/training/a.csv", "in/validation/a.csv"), "in", "holds files of more than one split"),
        (("in/my_train.csv", "in/my_test.csv"), "in", "holds files of more than one split"),
        (("in/train.csv", "in/test.csv"), "in/*.csv", "holds files of more than one split"),
        (("in/a.csv", "in/a.csv.gz", "in/b.csv"), "in", "and with .gz too, which may be the same texts twice"),
        (("in/a.parquet", "in/_delta_log/0.json"), "in", "whose files also hold deleted rows"),
        (("in/a.parquet", "in/_delta_log/0.json"), "in/*.parquet", "whose files also hold deleted rows"),
        (("in/data/a.parquet", "in/metadata/v1.metadata.json"), "in", "whose files also hold deleted rows"),
    ],
)
def test_ambiguous_files_give_one_message(names: tuple[str, ...], location: str, words: str, tmp_path: Path) -> None:
    made(tmp_path, *names)
    with pytest.raises(DataError) as caught:
        find_sources(str(tmp_path / location))
    assert words in str(caught.value)


def test_files_called_trainers_or_tested_are_no_splits(tmp_path: Path) -> None:
    assert (
        len(find_sources(str(made(tmp_path / "in", "trainers.csv", "tested.csv", "devices.csv", "contest.csv"))).paths)
        == 4
    )


def test_a_loop_of_links_gives_one_message(tmp_path: Path) -> None:
    (tmp_path / "a.csv").symlink_to(tmp_path / "b.csv")
    (tmp_path / "b.csv").symlink_to(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"a\.csv (cannot be read: |does not exist)"):
        find_sources(absolute(str(tmp_path / "a.csv")))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match="is neither a file nor a folder"):
        find_sources(str(tmp_path / "pipe.csv"))
