"""TOML and YAML files: valid ones are read, and harmful or surprising ones give one message."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from pipeline.documents import check_values, parse_toml, parse_yaml, read_text
from pipeline.errors import ConfigError

LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
MERGES = "m0: &m0 {k: v}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 5)}]}}\n" for n in range(1, 13))


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_not_part_of_the_text(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(start + "seed = 7 # é".encode())
    assert read_text(tmp_path / "a") == "seed = 7 # é"


def test_only_small_text_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"#" * (1024**2 + 1))
    (tmp_path / "utf-16").write_text("seed = 7", encoding="utf-16")
    os.mkfifo(tmp_path / "fifo")  # to open it would be to wait for a writer
    (tmp_path / "zero").symlink_to(os.devnull.replace("null", "zero"))
    for name, words in {
        "large": "larger than 1 MiB",
        "utf-16": "not UTF-8",
        "fifo": "not a regular file",
        "zero": "not a regular file",
        ".": "not a regular file",
        "none": "no such file",
        "n" * 300: "cannot be read",
        "large/below": "no such file",
    }.items():
        with pytest.raises(ConfigError, match=words):
            read_text(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = " + "[" * 5000 + "]" * 5000, "nested more than 32 deep"),
        ("a = " + "{b = " * 2000 + "1" + "}" * 2000, "nested more than 32 deep"),
        ("a = " + "9" * 6000, "more than 4,300 digits"),
        ("a =", "not valid TOML"),
        ("a = 1\na = 2", "not valid TOML"),
    ],
)
def test_invalid_toml_gives_one_message(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^here: .*{words}"):
        parse_toml(text, origin="here")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.b.c." * 20 + "d = 1", "nested more than 32 deep"),
        ("a = 0x" + "f" * 6000, "an integer of 24000 bits"),
        ('a = "x\\u0000y"', "a null character"),
        ("a = [" + "1," * 100_001 + "]", "more than 100,000 values"),
        ('a = "https://user:hunter2@h/x"', r"https://\*\*\*@h/x"),
        ('"https://user:hunter2@h/x" = 1', r"https://\*\*\*@h/x"),
    ],
)
def test_values_that_no_setting_can_have_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check_values(parse_toml(text, origin="here"), origin="here")
    assert "hunter2" not in str(caught.value)


DEEP = ".".join(["a"] * 33)


@pytest.mark.parametrize(
    "text", [f"{DEEP} = 1", f"[{DEEP}]", f"x = {{ y = 1, {DEEP} = 1 }}", " . ".join(['"a"', "'b'", "c"] * 11) + " = 1"]
)
@pytest.mark.parametrize("before", ["", 's = """a\\""" \n""""" # \n', "s = '''#''''\n", "s = '\\' # '\n"])
def test_a_key_of_too_many_parts_is_refused_before_parsing(before: str, text: str) -> None:
    with pytest.raises(ConfigError, match="here: nested more than 32 deep"):
        parse_toml(before + text, origin="here")


@pytest.mark.parametrize(
    "value",
    [
        f'"{DEEP}"',
        f"'{DEEP}'",
        f'"""\n{DEEP}\n"""',
        f"'''{DEEP}'''",
        f'"\\"{DEEP}"',
        f"1 # {DEEP}",
        f'"""a"""""\n# {DEEP}',
    ],
)
def test_a_text_of_many_parts_is_not_a_key(value: str) -> None:
    assert parse_toml(f"x = {value}", origin="here")


@pytest.mark.parametrize(
    "text",
    [
        ".".join(["a"] * 500_000) + " = 1",
        "\n".join(f"{'a.' * 31}b{i} = 1" for i in range(15_000)),
        '"""' + '\\"""' * 250_000,
        "'" * 10**6,
        '"' * 10**6,
        "a." * 500_000,
        '"\\' * 500_000,
    ],
    ids=["one key", "many keys", "escaped quotes", "quotes", "double quotes", "open key", "backslashes"],
)
def test_toml_of_a_megabyte_takes_seconds(text: str) -> None:
    started = time.process_time()
    with contextlib.suppress(ConfigError):
        parse_toml(text, origin="here")
    assert time.process_time() - started < 10


def test_yaml_of_a_megabyte_of_keys_takes_seconds() -> None:
    started = time.process_time()
    parse_yaml("".join(f"a{i}:\n" for i in range(40_000)), origin="here")
    assert time.process_time() - started < 10


def test_yaml_keeps_its_anchors_and_merges() -> None:
    text = "one: &one {a: 1, b: [x]}\ntwo: {<<: *one, a: 2}\nthree: [*one, *one]"
    assert parse_yaml(text, origin="here") == {
        "one": {"a": 1, "b": ["x"]},
        "two": {"a": 2, "b": ["x"]},
        "three": [{"a": 1, "b": ["x"]}] * 2,
    }
    assert parse_yaml("", origin="here") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("&a [*a]", "nested more than 32 deep"),
        ("a: &a {b: *a}", "nested more than 32 deep"),
        ("[" * 5000 + "]" * 5000, "nested more than 32 deep"),
        (LAUGHS, "more than 100,000 values"),
        (MERGES, "more than 100,000 values"),
        ("a: " + "9" * 6000, "cannot be read"),
        ("a: 0x" + "f" * 6000, "an integer of 24000 bits"),
        ("a: 2024-13-01", "month must be in 1..12"),
        ("a: !!timestamp x", "does not match its tag"),
        ("a: !!bool x", "does not match its tag"),
        ("a: !!int ''", "does not match its tag"),
        ("a: !!python/object/apply:os.getpid []", "not YAML"),
        ("? [a]\n: b", "not YAML"),
        ("a: 1\nb: {c: 1, c: 2}", "line 2: c occurs twice"),
        ('a: "\\ud800"', "half a character"),
        ('a: "x\\0y"', "a null character"),
        ("a: https://h/x?X-Amz-Signature=hunter2", r"Signature=\*\*\*"),
        ("a: [", "not YAML"),
        ("a: b\n---\nc: d", "not YAML"),
    ],
)
def test_harmful_or_surprising_yaml_gives_one_message_at_once(text: str, words: str) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError, match=f"^here: .*{words}") as caught:
        parse_yaml(text, origin="here")
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert time.process_time() - started < 5
