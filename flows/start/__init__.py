"""The first module of the console script. It is installed under a name of its own, ``lorafleet_start`` (see pyproject.toml).

A folder on PYTHONPATH may hold a ``flows.py``, ``tasks.py`` or ``pipeline.py`` of the user's, or a plain folder of that name. Python
would take it for ours, here and in every process that is started from here.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

_PACKAGES = ("flows", "tasks", "pipeline")


def main() -> None:
    """Put our folder first on the path if other files hide our packages, then run the command line."""
    ours = next(folder for folder in Path(__file__).resolve().parents if (folder / "flows" / "cli.py").is_file())
    if not all(_is_found_in(ours, package) for package in _PACKAGES):
        sys.path.insert(0, str(ours))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ours), os.environ.get("PYTHONPATH")]))
    try:
        from flows.cli import main as run_command_line

        run_command_line()
    except KeyboardInterrupt:  # before the command line could say so
        sys.exit(130)


def _is_found_in(folder: Path, package: str) -> bool:
    """Whether Python finds this folder's package of that name; imports nothing."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve().parents[1] == folder
