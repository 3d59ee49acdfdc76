"""Text that leaves the program: one line, without control characters and without secrets of URLs."""

from __future__ import annotations

import pickle
import unicodedata

import pytest

from pipeline.errors import DataError, LorafleetError, first_line
from pipeline.printable import conceal, concealed, counted, markdown, printable, redacted, remember, reveal

# Marks around numbers and signs, which are seen: Arabic, Syriac, Kaithi, Egyptian; shorthand and musical notation.
SHOWN_FORMATS = (
    *((0x600, 0x605), (0x6DD, 0x6DD), (0x70F, 0x70F), (0x890, 0x891), (0x8E2, 0x8E2)),
    *((0x110BD, 0x110BD), (0x110CD, 0x110CD), (0x13430, 0x1343F), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A)),
)
ORDINARY = ("réclamé", "Straße 5 %", "日本語", "עברית", "می‌خواهم", "👨‍👩‍👧 ❤️", "a | b * c", r"C:\x", "100 €")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nerror: forged", r"a\nerror: forged"),
        ("a\r\tb\x0b\x0c", r"a\r\tb\x0b\x0c"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x00\x7f\x85\x9b31m", r"\x00\x7f\x85\x9b31m"),
        ("line\u2028paragraph\u2029", r"line\u2028paragraph\u2029"),
        ("\u202egpj.exe\u2066\u2069\u200e", r"\u202egpj.exe\u2066\u2069\u200e"),
        ("zero\u200bwidth\ufeff\u2060\xad", r"zero\u200bwidth\ufeff\u2060\xad"),
        ("half \udcff \ud83d", r"half \udcff \ud83d"),
        ("tag\U000e0041", r"tag\U000e0041"),
    ],
)
def test_characters_that_control_a_terminal_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_every_control_format_and_surrogate_character_is_escaped_except_joiners() -> None:
    unseen = {
        chr(number) for number in range(0x110000) if unicodedata.category(chr(number)) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    }
    kept = {character for character in unseen if printable(character) == character}
    needed = {"\u200c", "\u200d", *(chr(number) for start, end in SHOWN_FORMATS for number in range(start, end + 1))}
    assert kept == needed & unseen
    assert len(printable("".join(sorted(unseen - kept))[:400]).splitlines()) == 1


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_of_any_script_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_a_line_is_cut_at_its_largest_length() -> None:
    assert len(printable("x" * 10**6)) < 5000


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pw@host/a.parquet", "https://***@host/a.parquet"),
        ("https://token@host/a", "https://***@host/a"),
        ("https://user:p/w@host/a", "https://***@host/a"),
        ("https://user:p@w@host:8080/a@2", "https://***@host:8080/a@2"),
        (
            "https://h/a?X-Amz-Signature=abc&X-Amz-Credential=d%2Fe",
            "https://h/a?X-Amz-Signature=***&X-Amz-Credential=***",
        ),
        ("https://h/a?abcdef", "https://h/a?***"),
        ("https://h/a?versionId=7&sig=x", "https://h/a?versionId=7&sig=***"),
        ("s3://key:sec/ret@bucket/a", "s3://***@bucket/a"),
        ("abfs://c@account/a?sv=1&sig=x", "abfs://c@account/a?sv=1&sig=***"),
        ("postgresql+asyncpg://u:p@h:5432/d", "postgresql+asyncpg://***@h:5432/d"),
        ("simplecache::https://u:p@h/a", "simplecache::https://***@h/a"),
        ("NAME=https://u:p@h/a", "NAME=https://***@h/a"),
        ("https:/u:p@h/a", "https:/***@h/a"),
        ("https://h/x#access_token=abc", "https://h/x#access_token=***"),
        ("https://h/x?versionId=1#state=2&id_token=abc", "https://h/x?versionId=1#state=***&id_token=***"),
        ("https://h/a;jsessionid=1/b.parquet;v=2?x=3", "https://h/a;jsessionid=***/b.parquet;v=***?x=***"),
        ("s3://b/a;token=1/c#sig=2", "s3://b/a;token=***/c#sig=***"),
        ("//u:p@h/x", "//***@h/x"),
    ],
)
def test_the_secret_of_a_url_is_hidden_and_the_rest_is_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown
    assert redacted(shown) == shown
    assert redacted(f"404 for '{url}' at noon") == f"404 for '{shown}' at noon"
    assert conceal(url) == shown
    assert reveal(shown) == url


PLAIN = (
    *("s3://bucket/part-?.parquet", "s3://b/a#T", "hf://datasets/o/n@rev/a", "abfs://c@a/x", "https://[::1]:4200/a@b"),
    *("a/b?c=d", "a@b:c", "C:/a@b", "error:/a@b", "https://h/x#top", "s3://b/a;b=c/d", "//host/a:b@c", "https://h/a;"),
)


@pytest.mark.parametrize("url", PLAIN)
def test_a_url_without_a_secret_stays_as_it_is(url: str) -> None:
    assert printable(url) == conceal(url) == url


def test_another_process_learns_the_real_url() -> None:
    shown = conceal("https://u:p@elsewhere/a b.parquet?sig=x")
    assert shown == "https://***@elsewhere/a b.parquet?sig=***"
    remember({"https://***@of-another/": "https://u:q@of-another/"})
    assert reveal("https://***@of-another/") == "https://u:q@of-another/"
    assert concealed()[shown] == "https://u:p@elsewhere/a b.parquet?sig=x"


def test_an_error_of_ours_shows_each_of_its_lines_printable_also_behind_a_process() -> None:
    error = DataError("a\x1b[31m\nb", "https://u:p@h/a")
    assert str(error) == "a\\x1b[31m\\nb\nhttps://***@h/a"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - as Ray sends it
    assert str(LorafleetError()) == ""


def test_quotes_from_other_libraries_errors_are_printable() -> None:
    assert first_line(ValueError("https://u:p@h/\x1b\nmore")) == "https://***@h/\\x1b"


def test_a_value_cannot_break_out_of_markdown() -> None:
    assert markdown("a|b\n# c <img> [x](y) `d`\x1b") == r"a\|b # c \<img\> \[x\](y) \`d\`\\x1b"


@pytest.mark.parametrize(("number", "words"), [(0, "0 files"), (1, "1 file"), (2, "2 files"), (1200, "1,200 files")])
def test_a_number_agrees_with_its_noun(number: int, words: str) -> None:
    assert counted(number, "file") == words
