"""Child processes: ending with their parent, and finding the reason of a failure in their logs."""

from __future__ import annotations

import ctypes
import re
import signal
import sys
from pathlib import Path


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel signal this process when its parent ends. Without effect on systems other than Linux.

    Strictly, the signal is sent when the parent's thread that started this process ends.
    """
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, number)


def last_fault(log: Path) -> str:
    """Last line of a log that names an exception, or else its last line. Empty if there is no log."""
    text = log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else ""
    lines = re.findall(r"^[\w.]+(?:Error|Exception): .+", text, re.MULTILINE) or text.splitlines()
    return lines[-1].strip()[:300] if lines else ""
