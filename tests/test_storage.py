"""Storage: files appear whole or not at all, and a listing shows the files that a job should read."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import pytest
from bulk import files_below, write_table

from pipeline.errors import InputError
from pipeline.storage.listing import find_files, in_words, written_folder
from pipeline.storage.place import Place, check_address
from pipeline.storage.tables import tables_around


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"content")
    return folder


def below(pattern: Path | str) -> list[str]:
    return [file.below for file in find_files(str(pattern)).files]


# Writing


def test_a_file_appears_under_its_name_when_it_is_whole(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "out"))
    with place.replaced("a/b.bin", mark="m") as path:
        path.write_bytes(b"half")
        assert not place.exists("a/b.bin")
        assert [name for name, _ in place.temporaries(mark="m")] == [str(path.relative_to(tmp_path / "out"))]
        assert place.temporaries(mark="other") == []
    assert place.read("a/b.bin") == b"half"
    assert place.names() == ["a/b.bin"]


def test_an_error_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    place.write("a.bin", b"old")

    def write_half() -> None:
        with place.replaced("a.bin", mark="m") as path:
            path.write_bytes(b"half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_half()
    assert place.read("a.bin") == b"old"
    assert place.names() == ["a.bin"]


def test_a_late_writer_whose_temporary_was_swept_yields_to_the_one_that_was_faster(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    with place.replaced("a.bin", mark="m") as path:
        path.write_bytes(b"same")
        place.write("a.bin", b"same")
        path.unlink()
    assert place.read("a.bin") == b"same"


def test_a_swept_temporary_of_a_file_that_nobody_else_wrote_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), Place(str(tmp_path)).replaced("a.bin", mark="m"):
        pass


def test_a_vanished_input_is_an_error_even_if_the_output_exists(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    place.write("a.bin", b"old")
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet"), place.replaced("a.bin", mark="m"):
        (tmp_path / "gone.parquet").read_bytes()


def test_removing_a_missing_file_succeeds(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    place.remove("never there")
    place.write("a", b"1")
    place.remove("a")
    assert place.names() == []


def test_a_file_moves_into_a_new_folder(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    place.write("a", b"1")
    place.move("a", "x/y/b")
    assert place.names() == ["x/y/b"]
    assert place.names(under="x/y") == ["x/y/b"]
    assert place.names(under="z") == []


def test_an_object_store_gets_one_object_or_none() -> None:
    place = Place("memory://lorafleet-test/out")
    with place.replaced("a/b.bin", mark="m") as path:
        path.write_bytes(b"whole")
        assert not place.exists("a/b.bin")
    assert place.read("a/b.bin") == b"whole"
    assert place.names() == ["a/b.bin"]
    assert place.url("a/b.bin") == "memory:///lorafleet-test/out/a/b.bin"
    assert [file.below for file in find_files("memory://lorafleet-test/out/a/b.bin").files] == ["b.bin"]
    place.move("a/b.bin", "c.bin")
    place.remove("d.bin")
    assert place.names() == ["c.bin"]


def test_a_place_holds_itself_and_its_content(tmp_path: Path) -> None:
    data = Place(str(tmp_path / "data"))
    assert data.holds(data)
    assert data.holds(Place(str(tmp_path / "data" / "in")))
    assert data.holds(Place(f"file://{tmp_path}/data/in"))
    assert not data.holds(Place(str(tmp_path / "data-2")))
    assert not data.holds(Place(f"memory://{tmp_path}/data"))


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(InputError, match=r"gopher://somewhere/x.*gopher"):
        Place("gopher://somewhere/x")


# Listing


def test_a_folder_gives_its_parquet_files_at_any_depth_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.parquet", "a.parquet", "day=2/c.pq", "day=1/c.parquet", "notes.txt")
    assert below(tmp_path) == ["a.parquet", "b.parquet", "day=1/c.parquet", "day=2/c.pq"]


def test_names_that_begin_with_an_underscore_or_a_dot_are_skipped_in_folders_and_globs(tmp_path: Path) -> None:
    touch(tmp_path, "a.parquet", "_b.parquet", ".c.parquet", "_delta_log/d.parquet", "x/.e/f.parquet", "x/g.parquet")
    assert below(tmp_path) == ["a.parquet", "x/g.parquet"]
    assert below(tmp_path / "**/*.parquet") == ["a.parquet", "x/g.parquet"]
    assert below(tmp_path / "*/*.parquet") == ["x/g.parquet"]


def parquet(path: Path) -> Path:
    return write_table(path, {"text": ["a"]})


def test_files_are_known_by_suffix_in_any_case_or_by_their_magic_bytes(tmp_path: Path) -> None:
    taken = ["a.parquet", "b.parq", "c.PARQUET", "d.parquet.gz", "e.pq", "f.Parquet.Snappy", "000000_0", "k=v/part"]
    others = {
        "with the name of a temporary file or a backup": [
            "a.parquet~",
            "b.parquet.tmp",
            ".c.parquet.crc",
            "d.parquet.bak",
            "e.parquet.part",
        ],
        "with a name, or in a folder, that begins with _ or .": [
            "_a.parquet",
            ".b.parquet",
            "_temporary/c.parquet",
            ".x=1/d.parquet",
        ],
        "of Parquet's own summaries (_metadata)": ["_metadata", "k=v/_common_metadata"],
        "with the suffix .snappy": ["e.snappy"],
    }
    for name in [*taken, *(name for names in others.values() for name in names)]:
        parquet(tmp_path / name)
    touch(tmp_path, "README", "short")
    (tmp_path / "short").write_bytes(b"PAR1")
    found = find_files(str(tmp_path))
    assert [file.below for file in found.files] == sorted(taken)
    expected = {reason: len(names) for reason, names in others.items()} | {"without a suffix and not Parquet": 2}
    expected["with the name of a temporary file or a backup"] -= 1  # the hidden one counts as hidden
    expected["with a name, or in a folder, that begins with _ or ."] += 1
    assert found.skipped == expected
    assert "2 files without a suffix and not Parquet" in in_words(found.skipped)


def test_special_files_are_counted_and_broken_links_are_named(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet")
    os.mkfifo(tmp_path / "b.parquet")
    found = find_files(str(tmp_path))
    assert ([file.below for file in found.files], found.skipped) == (
        ["a.parquet"],
        {"without content (a pipe, a socket or a device)": 1},
    )
    with pytest.raises(InputError, match=r"b\.parquet: it is a pipe, a socket or a device; expected"):
        find_files(str(tmp_path / "b.parquet"))
    (tmp_path / "c.parquet").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"cannot be read: .*c\.parquet"):
        find_files(str(tmp_path))


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(tmp_path / "a" / "a.parquet")
    parquet(tmp_path / "b" / "b.parquet")
    list_folder = os.scandir

    def refuse(path: str) -> object:  # the tests may run as root, whom nothing is refused
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot be read: .*Permission denied: '\S+/b'"):
        find_files(str(tmp_path))


def test_partition_folders_may_begin_with_an_underscore_and_hold_any_value(tmp_path: Path) -> None:
    for name in ("_date=2024-01-01", "k=_x", "k=.x", "k=ok"):
        parquet(tmp_path / name / "p.parquet")
    assert below(tmp_path) == ["_date=2024-01-01/p.parquet", "k=.x/p.parquet", "k=_x/p.parquet", "k=ok/p.parquet"]


def test_a_file_that_is_named_itself_is_read_whatever_its_name(tmp_path: Path) -> None:
    for name in ("_hidden.parquet", "backup.parquet~", "data.bin"):
        assert below(parquet(tmp_path / name)) == [name]


def test_a_glob_says_which_suffix_is_meant_and_one_that_ends_in_a_wildcard_does_not(tmp_path: Path) -> None:
    for name in ("a.dat", "b.parquet"):
        parquet(tmp_path / name)
    assert below(tmp_path / "*.dat") == ["a.dat"]
    assert below(tmp_path / "*") == ["b.parquet"]


def test_an_input_of_other_formats_only_is_refused_with_a_remedy(tmp_path: Path) -> None:
    touch(tmp_path, "a.csv", "b.csv")
    with pytest.raises(InputError, match=r"skipped: 2 files with the suffix \.csv.*Convert other formats first"):
        find_files(str(tmp_path))


def test_a_folder_whose_own_name_is_hidden_is_read_when_it_is_named(tmp_path: Path) -> None:
    touch(tmp_path, ".cache/_raw/a.parquet")
    assert below(tmp_path / ".cache" / "_raw") == ["a.parquet"]
    assert below(tmp_path / ".cache" / "_raw" / "*.parquet") == ["a.parquet"]


def test_a_glob_keeps_the_path_below_what_is_written_out(tmp_path: Path) -> None:
    touch(tmp_path, "year=1/a.parquet", "year=2/a.parquet", "other/a.parquet")
    assert below(tmp_path / "year=*" / "*.parquet") == ["year=1/a.parquet", "year=2/a.parquet"]
    assert written_folder(str(tmp_path / "year=*" / "*.parquet")).root == str(tmp_path)


def test_a_file_is_itself_even_if_its_name_looks_like_a_glob(tmp_path: Path) -> None:
    touch(tmp_path, "a[1].parquet", "a1.parquet")
    (file,) = find_files(str(tmp_path / "a[1].parquet")).files
    assert (file.path, file.below, file.size) == (str(tmp_path / "a[1].parquet"), "a[1].parquet", len(b"content"))


def test_links_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "blobs/1", "other/day=2/c.parquet")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").symlink_to(tmp_path / "blobs" / "1")
    (tmp_path / "in" / "day=2").symlink_to(tmp_path / "other" / "day=2")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    assert below(tmp_path / "in") == ["a.parquet", "day=2/c.parquet"]
    before = find_files(str(tmp_path / "in")).files[0]
    os.utime(tmp_path / "blobs" / "1", (1, 1))
    assert find_files(str(tmp_path / "in")).files[0].version != before.version


def test_a_glob_that_matches_folders_reads_what_is_in_them(tmp_path: Path) -> None:
    touch(tmp_path, "a.parquet/part-0.parquet", "a.parquet/_SUCCESS", "b.parquet")
    assert below(tmp_path / "*.parquet") == ["a.parquet/part-0.parquet", "b.parquet"]


def test_a_folder_may_have_brackets_in_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "run[1]/a.parquet", "run1/b.parquet")
    assert below(tmp_path / "run[1]") == ["a.parquet"]
    assert written_folder(str(tmp_path / "run[1]")).root == str(tmp_path / "run[1]")


def test_a_glob_that_fsspec_does_not_know_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\*\*\.parquet: cannot be read: "):
        find_files(str(tmp_path / "data**.parquet"))


def test_a_changed_file_has_another_version(tmp_path: Path) -> None:
    touch(tmp_path, "a.parquet")
    (before,) = find_files(str(tmp_path)).files
    assert find_files(str(tmp_path)).files == (before,)
    os.utime(tmp_path / "a.parquet", (1, 1))
    (after,) = find_files(str(tmp_path)).files
    assert after.version != before.version


def test_an_empty_and_a_missing_folder_have_different_messages(tmp_path: Path) -> None:
    touch(tmp_path, "in/notes.txt", "in/_x.parquet")
    with pytest.raises(
        InputError,
        match=r"in: no Parquet file in it \(skipped: 1 file .* begins with _ or \., 1 file .* suffix \.txt\)",
    ):
        find_files(str(tmp_path / "in"))
    with pytest.raises(
        InputError, match=r"gone: no such file or folder; expected a Parquet file, a folder of them, or a glob"
    ):
        find_files(str(tmp_path / "gone"))
    assert files_below(tmp_path) == ["in/_x.parquet", "in/notes.txt"]


# Addresses


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("", "empty path"),
        ("  ", "empty path"),
        ("memory://out", "lost when the command ends"),
        ("MEMORY://out", "lost when the command ends"),
        ("zip://", "not the address of a store"),
        ("zip://a.parquet::b.zip", "not the address of a store"),
        ("simplecache::s3://b/a", "not the address of a store"),
        ("tar://a", "not the address of a store"),
        ("data:,a", "not the address of a store"),
        ("reference://", "not the address of a store"),
        ("s3://KEY:hunter2@bucket/a", "AWS_ACCESS_KEY_ID"),
        ("gs://a:hunter2@bucket/a", "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
def test_addresses_of_no_persistent_store_are_refused(address: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        check_address(address)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["out", ".", "a b/c", "file:///a", "s3://b/a", "https://u:p@h/a?sig=x", "hf://datasets/o/n@r/a", "abfs://c@a/x"],
)
def test_paths_and_stores_are_accepted(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize(
    "address", ["zip://", "nothing://a", "tar://", "dir://", "reference://", "github://", "libarchive://x", "cached://"]
)
def test_an_address_that_fsspec_cannot_open_gives_one_message(address: str) -> None:
    with pytest.raises(InputError, match=f"^{address}: ") as caught:
        Place(address)
    assert "\n" not in str(caught.value)


def test_a_store_without_its_package_is_refused_with_the_extra_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = import_module("fsspec.registry")
    monkeypatch.setitem(
        registry.known_implementations, "s3", {"class": "nowhere_s3fs.S3", "err": "Install s3fs to access S3"}
    )
    monkeypatch.delitem(registry._registry, "s3", raising=False)
    with pytest.raises(InputError, match=r"^s3://b/a: Install s3fs to access S3; pip install 'lorafleet\[s3\]'$"):
        Place("s3://b/a")


class Server(BaseHTTPRequestHandler):
    """List a folder of one file. Report the file's size only if its name says so."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        sized = self.path.endswith("sized.parquet")
        content = (
            b"PAR1 PAR1"
            if "parquet" in self.path
            else f'<a href="{self.path.rstrip("/")}/sized.parquet">one</a>'.encode()
        )
        self.send_response(404 if "*" in self.path else 200)
        self.send_header("Connection", "close")
        if sized:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)
        self.close_connection = True


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def test_over_http_sizes_are_requested_and_an_unknown_size_is_refused(server: str) -> None:
    (file,) = find_files(f"{server}/d/*.parquet").files
    assert (file.path, file.size) == (f"{server}/d/sized.parquet", 9)
    with pytest.raises(InputError, match=r"/d/a\.parquet: its server does not report the size"):
        find_files(f"{server}/d/a.parquet")


def test_the_root_of_a_bucket_may_be_a_table_too() -> None:
    import fsspec

    place = Place("memory://lorafleet-bucket/k=x")
    with (
        place.fs.open("/lorafleet-bucket/_delta_log/0.json", "wb"),
        place.fs.open("/lorafleet-bucket/k=x/a.parquet", "wb"),
    ):
        pass
    assert tables_around(fsspec.filesystem("memory"), ["/lorafleet-bucket/k=x/a.parquet"]) == {
        "/lorafleet-bucket": "Delta"
    }

    class Store:
        """Names as in S3: the bucket is the first part, without a leading slash."""

        protocol = "s3"

        def isdir(self, path: str) -> bool:
            return path == "bucket/_delta_log"

    assert tables_around(Store(), ["bucket/k=x/a.parquet"]) == {"bucket": "Delta"}
