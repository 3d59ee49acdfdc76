"""lorafleet installed from a wheel, which has no folder deploy/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Without the finder of this checkout's own installation, which would fill a gap.
PROGRAM = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
from lorafleet_start import main
main()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the wheel, built from a copy of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("flows", "tasks", "pipeline", "deploy"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (wheel,) = folder.glob("lorafleet-*.whl")
    _run(*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", str(folder / "installed"), str(wheel))
    return folder / "installed"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def lorafleet(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", "-c", PROGRAM, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_command_line_and_the_presets_are_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    shown = lorafleet(installed, tmp_path, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "train" in shown.stdout
    planned = lorafleet(installed, tmp_path, "train", "--config", "quickstart", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "RottenTomatoes" in planned.stdout


@pytest.mark.parametrize(("command", "file"), [("up", "supervisord.conf"), ("deploy", "prefect.yaml")])
def test_a_command_that_needs_deploy_says_so_and_starts_nothing(
    command: str, file: str, installed: Path, tmp_path: Path
) -> None:
    ended = lorafleet(installed, tmp_path, command)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(f"error: deploy/{file} is missing")
    assert "checkout" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
