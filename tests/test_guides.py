"""The READMEs and CONTRIBUTING.md: short enough, every link and heading in them exists, every command is one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "pipeline").glob("*/README.md"))]
GUIDES += [ROOT / "deploy/README.md", ROOT / "tests/benchmarks/README.md"]
EXPERIMENTS = ROOT / "tests/benchmarks/EXPERIMENTS.md"
_CODE = re.compile(r"^```\w*\n(?P<block>.*?)^```$|`(?P<inline>[^`]+)`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def name(guide: Path) -> str:
    return guide.relative_to(ROOT).as_posix()


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.*)$", text, re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The fragments by which GitHub links headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(text)}


def commands() -> Iterator[str]:
    """Every command line of the guides that calls lorafleet, in blocks and inline."""
    for guide in GUIDES:
        for code in _CODE.finditer(guide.read_text(encoding="utf-8")):
            for line in (code["block"] or " ".join((code["inline"] or "").split())).splitlines():
                if line.startswith("lorafleet "):
                    yield line


def test_the_readme_can_be_read_in_five_minutes() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 160] == []


def test_the_readme_names_every_room() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = {folder.name for folder in (ROOT / "pipeline").iterdir() if (folder / "__init__.py").is_file()}
    linked = {Path(target).name for target in re.findall(r"\]\((pipeline/\w+)", text)}
    assert rooms - linked == set()


@pytest.mark.parametrize("guide", GUIDES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(guide: Path) -> None:
    for target, anchor in _LINK.findall(guide.read_text(encoding="utf-8")):
        file = (guide.parent / target).resolve() if target else guide
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_every_command_is_one() -> None:
    from flows.cli import lorafleet

    lines = set(commands())
    assert {line.split()[1] for line in lines} >= lorafleet.commands.keys() - {"export"}
    for line in lines:
        group: click.Command = lorafleet
        context = click.Context(group, info_name="lorafleet")
        _, command, arguments = lorafleet.resolve_command(context, shlex.split(line)[1:])
        assert command is not None
        if arguments:  # without any, only the command's name is meant
            command.make_context(command.name, arguments, parent=context)


def test_every_pointer_to_the_experiments_names_a_heading() -> None:
    known = headings(EXPERIMENTS.read_text(encoding="utf-8"))
    pointers = [
        (path, heading)
        for folder in ("flows", "tasks", "pipeline")
        for path in (ROOT / folder).rglob("*.py")
        for heading in re.findall(r'EXPERIMENTS\.md,[\s#]*"([^"]+)"', path.read_text(encoding="utf-8"))
    ]
    assert len(pointers) >= 10
    assert [(path, heading) for path, heading in pointers if not any(k.startswith(heading) for k in known)] == []
