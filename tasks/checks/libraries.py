"""Checks of Python and of the required libraries for ``lorafleet doctor``."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import first_line
from tasks.checks.machine import Check, guarded

if TYPE_CHECKING:
    from packaging.requirements import Requirement

Answers = Mapping[str, Mapping[str, Any]]
"""Step of ``tasks.checks.trial`` -> its ``facts`` or its ``error``."""

_MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}  # modules whose name differs from their distribution
_OVER_TORCH = (
    "torch",
    "transformers",
    "datasets",
    "mteb",
    "peft",
    "safetensors",
    "sentence-transformers",
    "scikit-learn",
    "scipy",
)
_CHECKOUT = Path(__file__).parents[2]


class Libraries:
    """Libraries that lorafleet requires. Only ``packaging`` is imported to read the requirements."""

    def __init__(self) -> None:
        self._required: list[Requirement] = []
        self._python = ""
        self._fault: Check | None = None
        try:
            self._read()
        except Exception as error:  # noqa: BLE001 - a broken packaging may raise anything
            found = f"the requirements of lorafleet cannot be read: {type(error).__name__}: {first_line(error)}"
            self._fault = Check(
                "fault", "lorafleet", found, "run `make setup` in its checkout, or `pip install` it again"
            )

    def modules(self, *, over_torch: bool) -> list[str]:
        """Modules to import: those that import torch, or all others."""
        return [_module(library.name) for library in self._required if (library.name in _OVER_TORCH) == over_torch]

    def checks(self, answers: Answers) -> list[Check]:
        """Results for Python, then for each library."""
        if self._fault is not None:
            return [self._fault]
        each = [
            guarded(library.name, functools.partial(_check_library, library, answers[_module(library.name)]))
            for library in self._required
        ]
        return [guarded("Python", lambda: _check_python(self._python)), *each]

    def _read(self) -> None:
        from packaging.requirements import Requirement

        try:  # a checkout may require more than at its installation
            project = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            self._python, lines = project["requires-python"], project["dependencies"]
        except FileNotFoundError:
            metadata = importlib.metadata.metadata("lorafleet")
            self._python, lines = metadata["Requires-Python"], metadata.get_all("Requires-Dist") or []
        all_required = map(Requirement, lines)
        self._required = [
            library for library in all_required if library.marker is None or library.marker.evaluate({"extra": ""})
        ]


def _check_python(required: str) -> Check:
    from packaging.specifiers import SpecifierSet

    found = platform.python_version()
    if SpecifierSet(required).contains(found, prereleases=True):
        return Check("ok", "Python", f"{found} ({required}), {sys.executable}")
    return Check(
        "fault", "Python", f"{found}, expected {required}", "create the virtual environment again with another Python"
    )


def _check_library(required: Requirement, answer: Mapping[str, Any]) -> Check:
    requirement = f"{required.name}{_extras(required)}{required.specifier}"
    reinstall = f"pip install --force-reinstall --constraint constraints.txt '{requirement}'"
    try:
        version = importlib.metadata.version(required.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(
            "fault", required.name, f"not installed, expected {required.specifier}", "`make setup`, or " + reinstall
        )
    if not required.specifier.contains(version, prereleases=True):
        return Check(
            "fault", required.name, f"{version}, expected {required.specifier}", "`make setup`, or " + reinstall
        )
    if "error" in answer:
        return Check("fault", required.name, f"{version} cannot be imported: {answer['error']}", reinstall)
    return Check("ok", required.name, f"{version} ({required.specifier})")


def _module(distribution: str) -> str:
    return _MODULES.get(distribution, distribution.replace("-", "_"))


def _extras(required: Requirement) -> str:
    return f"[{','.join(sorted(required.extras))}]" if required.extras else ""
