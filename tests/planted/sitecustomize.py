"""Faults in the kernel of the bulk job, in every process of a command whose PYTHONPATH names this folder.

Python imports this module first. Each block of rows takes ``PLANTED_SECONDS``. The text ``poison`` kills its process as
the operating system does when memory is exhausted. The text ``flood`` allocates more memory than the machine has.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any


class _Finder:
    """Waits for the kernel's module; whoever does not import it does not wait for torch."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != "pipeline.inference.classifier":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _plant(module.Classifier)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _plant(classifier: Any) -> None:
    tokenise = classifier.tokenise

    def planted(self: Any, texts: Sequence[str], **options: Any) -> Any:
        time.sleep(float(os.environ.get("PLANTED_SECONDS", "0.4")))
        if "poison" in texts:
            os.kill(os.getpid(), signal.SIGKILL)
        if "flood" in texts:
            bytearray(2**60)
        return tokenise(self, texts, **options)

    classifier.tokenise = planted


sys.meta_path.insert(0, _Finder())
