"""Edge cases of the console script: PYTHONPATH, standard streams, signals, and how it ends."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import SCRIPT, Command, FinishedRun

from flows.cli import lorafleet
from flows.terminal import say_json, say_table
from pipeline.config import load_config


def shell(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line in bash, in which ``lorafleet`` is the console script, and ``$?`` that of the first command."""
    line = f'set -o pipefail; lorafleet() {{ {shlex.join(SCRIPT)} "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def foreign(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder of the user's that holds what is called as our packages: modules, plain folders or packages."""
    for name in ("flows", "tasks", "pipeline"):
        if request.param == "modules":
            (tmp_path / f"{name}.py").write_text("raise AssertionError('this is not lorafleet')", encoding="utf-8")
        else:
            (tmp_path / name).mkdir()
        if request.param == "packages":
            (tmp_path / name / "__init__.py").write_text(
                "raise AssertionError('this is not lorafleet')", encoding="utf-8"
            )
    (tmp_path / "ours.py").write_text("", encoding="utf-8")
    return tmp_path


# --- the path that modules are found on ---


@pytest.mark.parametrize("foreign", ["modules", "folders", "packages"], indirect=True)
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--dry-run", "--json"], ["verify", "nowhere"]])
def test_what_is_called_as_our_packages_hides_none_of_them(arguments: list[str], foreign: Path) -> None:
    ended = Command(*arguments, program=SCRIPT, cwd=foreign, PYTHONPATH=str(foreign)).wait()
    assert ended.code == (2 if arguments[0] == "verify" else 0), ended.err
    assert "Traceback" not in ended.err
    assert ended.err == "" or "nowhere" in ended.err


@pytest.mark.parametrize("foreign", ["modules"], indirect=True)
def test_each_process_of_a_bulk_job_finds_our_packages(
    foreign: Path, finished_run: FinishedRun, prefect_api: str
) -> None:
    """``finished_run`` is a training whose workers had to find them, too."""
    encoder = load_config(str(finished_run.config)).encoder.name
    options = ("--adapter", f"{finished_run.root}#Topics", "--encoder", encoder, "--limit", "20", "--offline")
    environment = {"PYTHONPATH": str(foreign), "PREFECT_API_URL": prefect_api}
    ended = Command(
        "classify",
        finished_run.cwd / "data" / "Topics-test.parquet",
        "out",
        *options,
        program=SCRIPT,
        cwd=foreign,
        **environment,
    ).wait()
    assert ended.code == 0, ended.err
    assert "20 of 20 rows" in ended.out


def test_pythonpath_is_left_alone_where_nothing_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("", encoding="utf-8")
    program = "import sys, lorafleet_start, os; sys.argv = ['lorafleet', '--version']\n"
    program += "try: lorafleet_start.main()\nexcept SystemExit: pass\n"
    program += "print(os.environ['PYTHONPATH'], sys.path[0])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == f"{tmp_path} {tmp_path}"


# --- standard streams ---


@pytest.mark.parametrize("command", ["--help", "train --dry-run", "train --dry-run --json", "--version"])
def test_a_full_disk_behind_standard_output_is_one_message(command: str, tmp_path: Path) -> None:
    ended = shell(f"lorafleet {command} > /dev/full", tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: standard output cannot be written: No space left on device; finished work is kept\n"


@pytest.mark.parametrize("command", ["--help", "train --dry-run", "train --dry-run --json"])
def test_a_reader_that_goes_away_is_not_missed(command: str, tmp_path: Path) -> None:
    ended = shell(f"lorafleet {command} | sed q", tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(ended.stdout.splitlines()) == 1
    gone = shell(f"lorafleet {command} | sleep 0", tmp_path)
    assert (gone.returncode, gone.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "2>/dev/full", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("command", "code"), [("train --dry-run", 0), ("train --set train.seed=x", 2), ("train --nosuch", 2)]
)
def test_a_closed_stream_changes_no_exit_code(command: str, code: int, closed: str, tmp_path: Path) -> None:
    ended = shell(f"lorafleet {command} {closed}", tmp_path)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_what_the_encoding_lacks_is_printed_as_an_escape(
    environment: dict[str, str], finished_run: FinishedRun, tmp_path: Path
) -> None:
    ended = Command("show", finished_run.root, program=SCRIPT, cwd=tmp_path, **environment).wait()
    assert ended.code == 0, ended.err
    assert "\\u2013" in ended.out  # the dash of an interval
    assert ended.out.isascii()
    config = tmp_path / "config.toml"
    config.write_text('[[mteb_tasks]]\nname = "A"\ntrain = "a.parquet"\ntext_column = "é\\u001b"\n', encoding="utf-8")
    plan = Command(
        "train", "--config", config, "--dry-run", "--json", program=SCRIPT, cwd=tmp_path, **environment
    ).wait()
    assert json.loads(plan.out)["config"]["mteb_tasks"][0]["text_column"] == "é\x1b"


def test_a_path_that_the_locale_cannot_name_is_one_message(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[[mteb_tasks]]\nname = "A"\ntrain = "é.parquet"\n', encoding="utf-8")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = Command("train", "--config", config, program=SCRIPT, cwd=tmp_path, **locale).wait()
    assert ended.code == 2
    assert ended.err.startswith("error: '\\xe9.parquet': no file can have this name in this locale, whose encoding is ")
    assert len(ended.err.splitlines()) == 1


# --- what a name can do ---


def test_no_argument_can_forge_a_line_or_reach_the_terminal(tmp_path: Path) -> None:
    evil = "x\x1b[2J\nerror: forged\u202e"
    for arguments in (
        ["show", evil],
        ["train", "--config", evil],
        [evil],
        ["train", f"--{evil}"],
        ["train", "--set", evil],
        ["prune", evil],
    ):
        ended = Command(*arguments, program=SCRIPT, cwd=tmp_path).wait()
        assert ended.code == 2, ended.err
        assert "\x1b" not in ended.err
        assert "\u202e" not in ended.err
        assert [line for line in ended.err.splitlines() if line.startswith("error: forged")] == []
        assert "\\nerror: forged" in ended.err


def test_an_argument_that_is_no_text_is_one_message(tmp_path: Path) -> None:
    ended = shell("lorafleet show $'caf\\xe9'", tmp_path)
    assert ended.returncode == 2
    assert (
        ended.stderr
        == "error: caf\\udce9: not valid in this terminal's encoding; rename the file, or write the name in UTF-8\n"
    )


def test_a_table_shows_a_label_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    say_table(("label", "rows"), [(":bug:", "1"), ("[red]x[/red]", "2"), ("a\nb\x1b", "3")])
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        [":bug:", "1"],
        ["[red]x[/red]", "2"],
        ["a\\nb\\x1b", "3"],
    ]


def test_json_is_ascii_and_the_same_values(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a\x7f\x9b": ["é\n\x1b\u202e", 1.5, None]}
    say_json(value)
    out = capsys.readouterr().out
    assert json.loads(out) == value
    assert all(character == "\n" or " " <= character <= "~" for character in out)


# --- help ---


def test_every_command_says_in_the_list_all_of_its_first_sentence() -> None:
    for name, command in lorafleet.commands.items():
        summary = command.get_short_help_str(limit=45)
        assert summary.endswith("."), f"{name}: {summary}"
        assert not summary.endswith("..."), f"{name}: {summary}"
        for param in command.params:
            text = getattr(param, "help", None) or "An argument."
            assert text[0].isupper(), f"{name}: {text}"
            assert text.endswith((".", "]")), f"{name}: {text}"


# --- values that count for nothing ---


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("train --runs ''", "'--runs'"),
        ("train --runs=", "'--runs'"),
        ("train --config ''", "'--config'"),
        ("train --set ''", "'--set'"),
        ("classify '' out --adapter a", "'INPUT'"),
        ("classify in '' --adapter a", "'OUTPUT'"),
        ("classify in out --adapter ''", "'--adapter'"),
        ("classify in out --adapter a --encoder ''", "'--encoder'"),
        ("classify in out --adapter a --columns ''", "'--columns'"),
        ("publish '' --to x", "'RUN'"),
        ("publish x --to ''", "'--to'"),
        ("verify ''", "'REF'"),
        ("export a '' --form onnx", "'FOLDER'"),
        ("show ''", "'RUN|RUNS'"),
        ("doctor --runs ''", "'--runs'"),
        ("prune ''", "'RUNS'"),
        ("deploy --file ''", "'--file'"),
        ("deploy --cron ''", "'--cron'"),
        ("up --runs ''", "'--runs'"),
    ],
)
def test_an_empty_value_is_refused_by_the_name_of_its_option(arguments: str, named: str, tmp_path: Path) -> None:
    ended = shell(f"lorafleet {arguments}", tmp_path)
    assert ended.returncode == 2
    assert f"Invalid value for {named}: it is empty" in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("classify in out --adapter a --cpus 1e30", "--cpus: Input should be less than or equal to 4096"),
        ("classify in out --adapter a --cpus nan", "--cpus: Input should be a finite number"),
        ("classify in out --adapter a --cpus 1.5", "--cpus: expected a fraction from 0.0001 to 1, or a whole number"),
        ("classify in out --adapter a --gpus 1e30", "--gpus: "),
        ("classify in out --adapter a --gpus inf", "--gpus: "),
        ("classify in out --adapter a --concurrency 1e30", "--concurrency: "),
        ("classify in out --adapter a --min-score nan", "--min-score: "),
        ("classify in out --adapter a --target-accuracy inf", "--target-accuracy: "),
        ("classify in out --adapter a --sample nan", "--sample: "),
        (f"classify in out --adapter a --limit {10**30}", "--limit: "),
        (f"classify in out --adapter a --top-k {10**30}", "--top-k: "),
        (f"classify in out --adapter a --rows-per-unit {10**30}", "--rows-per-unit: "),
        (f"classify in out --adapter a --limit {'9' * 5000}", "'--limit'"),
        ("classify in out --adapter a --columns a,,b", "--columns: "),
        ("classify in out --adapter a --columns ' a , a '", "--columns: 'a' occurs more than once"),
        ("classify in out --adapter a --where process --concurrency 2", "--concurrency has no effect"),
        ("classify in out --adapter a --where process --gpus 2", "--gpus with --where process"),
        ("classify in out --adapter a --where process --cpus 0.5", "--cpus with --where process"),
        ("classify hf://datasets/a/b out --adapter a --offline", "--offline has no effect on INPUT"),
        (f"classify {'n' * 5000} out --adapter a", "INPUT: String should have at most"),
        ("prune . --older-than nan", "'--older-than'"),
        ("prune . --older-than inf", "'--older-than'"),
        ("prune . --older-than 1e300", "'--older-than'"),
        (f"prune . --keep {10**30}", "'--keep'"),
        ("deploy --interval 1e300", "--interval"),
        ("deploy --interval nan", "--interval"),
        ("deploy --interval 1e-9", "--interval"),
        ("doctor --start --ray-address 127.0.0.1:1", "--start has no effect with --ray-address"),
        ("train --runs https://user:hunter2@host/runs", "https://***@host/runs"),
        ("train --config https://user:hunter2@host/c.toml", "https://***@host/c.toml"),
        ("train --set data.mirror=https://user:hunter2@host/", "https://***@host/"),
        ("verify https://user:hunter2@host/x", "https://***@host/x"),
    ],
)
def test_a_value_out_of_bounds_is_one_message_that_names_its_option(arguments: str, words: str, tmp_path: Path) -> None:
    ended = shell(f"lorafleet {arguments}", tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "hunter2" not in ended.stderr
    assert ended.stdout == ""
    assert len(ended.stderr) < 6000
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_a_second_one_replaces_is_said(tmp_path: Path) -> None:
    ended = shell("lorafleet train --dry-run --runs a --runs b", tmp_path)
    assert ended.returncode == 0
    assert ended.stderr == "warning: --runs is given 2 times; only the last one counts\n"
