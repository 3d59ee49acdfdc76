"""What the processes that are started here have in common: their end, and where they say what went wrong."""

from __future__ import annotations

import ctypes
import re
import signal
import sys
from pathlib import Path


def die_with_parent(number: signal.Signals) -> None:
    """Have this process sent a signal when its parent ends, or the parent's thread that started it. Where there is no Linux, nothing."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, number)


def last_fault(log: Path) -> str:
    """The last line of a log that says what went wrong, or else the last one."""
    text = log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else ""
    lines = re.findall(r"^[\w.]+(?:Error|Exception): .+", text, re.MULTILINE) or text.splitlines()
    return lines[-1].strip()[:300] if lines else ""
