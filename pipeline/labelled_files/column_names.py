"""The columns that a labelled file must have, and how messages list them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.errors import DataError

_MOST_NAMES = 12  # in one message


def some(names: Sequence[str]) -> str:
    """Quote the first names, and count the rest: ``'a', 'b' and 3 more``."""
    rest = len(names) - _MOST_NAMES
    return ", ".join(map(repr, names[:_MOST_NAMES])) + (f" and {rest} more" if rest > 0 else "")


def check_columns(names: Sequence[str], path: str, columns: Mapping[str, str], *, hint: str = "") -> None:
    """Check that each configured column occurs exactly once.

    Args:
        names: Columns of the file.
        path: The file, for messages.
        columns: Config key -> column name.
        hint: Further advice, appended to the message about a missing column.
    Raises: DataError: a column is missing, or occurs more than once.
    """
    for key, column in columns.items():
        if column not in names:
            # A CSV file without a header has text in place of names, so these may be long.
            shown = some([name if len(name) <= 60 else f"{name[:60]}…" for name in names])
            existing = f"but {shown}" if names else "and no other"
            raise DataError(
                f"{path} has no column {column!r}, {existing}; set {key} for this MTEB task in the config{hint}"
            )
        if (count := names.count(column)) > 1:
            raise DataError(f"{path} has {count} columns named {column!r}; give each its own name")


def wanted_columns(names: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """Return the columns to read: the configured ones, and ``label_text`` if it occurs once."""
    also = ["label_text"] if names.count("label_text") == 1 else []
    return list(dict.fromkeys((*columns.values(), *also)))
