"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.config.mteb_task import MtebTaskConfig
from pipeline.config.sections import RunConfig
from pipeline.printable import shortened
from pipeline.records import Record


def describe_faults(faults: Sequence[Any]) -> list[str]:
    """One line per key: "a number, or auto" is one key, but pydantic finds a fault in each of the two."""
    by_key: dict[str, list[Any]] = {}
    unknown = []
    for fault in faults:
        key, model = _locate(fault["loc"])
        if fault["type"] == "too_short" and fault["input"]:
            continue  # it has items, and each of them a fault of its own
        if fault["type"] == "extra_forbidden":
            unknown.append(
                f"unknown key {'.'.join(map(str, fault['loc']))!r}; the keys there are {', '.join(model.model_fields)}"
            )
        else:
            by_key.setdefault(key, []).append(fault)
    return [_describe_key(key, of_key) for key, of_key in by_key.items()] + unknown


def _describe_key(key: str, faults: Sequence[Any]) -> str:
    message = ", or: ".join(fault["msg"].removeprefix("Value error, ") for fault in faults)
    found = "" if faults[0]["type"] in ("missing", "value_error") else f", found {shortened(repr(faults[0]['input']))}"
    return f"{key}: {message}{found}" if key else f"{message}{found}"


def _locate(location: tuple[str | int, ...]) -> tuple[str, type[Record]]:
    """The key that pydantic's location stands for, without the names of types that it puts behind, and the part it is in."""
    model: type[Record] = RunConfig
    key: list[str] = []
    for part in location:
        if isinstance(part, str) and part not in model.model_fields:
            break
        key.append(str(part))
        inner = (
            MtebTaskConfig
            if part == "mteb_tasks"
            else model.model_fields[part].annotation
            if isinstance(part, str)
            else None
        )
        if isinstance(inner, type) and issubclass(inner, Record):
            model = inner
    return ".".join(key), model
