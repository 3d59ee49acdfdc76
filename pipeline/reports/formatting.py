"""Formatting of numbers, times and names for people, without paths of this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime


def percent(score: float | None) -> str:
    """``0.9213`` -> ``92.1``, and ``–`` for None."""
    return "–" if score is None else f"{100 * score:.1f}"


def points(difference: float | None) -> str:
    """``0.152`` -> ``+15.2``, and ``–`` for None."""
    if difference is None:
        return "–"
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def utc(when: datetime) -> str:
    """A time in the form ``2026-01-02 03:04 UTC``."""
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def label_changes(old: Sequence[str], new: Sequence[str]) -> str:
    """Text such as ``without 'x' and with new 'y'``. Empty if both have the same labels in any order."""
    lost, added = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    return " and ".join(f"{what} {_some(names)}" for what, names in (("without", lost), ("with new", added)) if names)


def without_local_paths(text: str) -> str:
    """Replace absolute paths in a text by ``…/name``, so that it can be published. URLs are unchanged."""
    return _LOCAL_PATH.sub(lambda match: f"…/{match['name']}", text)


_LOCAL_PATH = re.compile(
    r"""(?<![\w.:/-])(?:file://)?(?:[A-Za-z]:\\(?:[^\s\\'":;,()]+\\)*|/(?:[^\s/'":;,()]+/)+)(?P<name>[^\s/\\'":;,()]*)"""
)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
