"""First module of the console script, installed under the unique name ``lorafleet_start`` (see pyproject.toml).

A folder on PYTHONPATH may hold a user's ``flows.py``, ``tasks.py`` or ``pipeline.py``, or a folder of that name. Python
would import it instead of ours, in this process and in every process started from it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

_PACKAGES = ("flows", "tasks", "pipeline")


def main() -> None:
    """Put our folder first on the path if other files shadow our packages, then run the command line."""
    ours = next(folder for folder in Path(__file__).resolve().parents if (folder / "flows" / "cli.py").is_file())
    if not all(_is_found_in(ours, package) for package in _PACKAGES):
        sys.path.insert(0, str(ours))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ours), os.environ.get("PYTHONPATH")]))
    try:
        from flows.cli import main as run_command_line

        run_command_line()
    except KeyboardInterrupt:  # before the command line handles it
        sys.exit(130)


def _is_found_in(folder: Path, package: str) -> bool:
    """Whether Python would import the package from this folder. Imports nothing."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve().parents[1] == folder
