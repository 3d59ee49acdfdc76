"""Messages about faults in a config, from pydantic's errors."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pipeline.config.mteb_task import MtebTaskConfig
from pipeline.config.sections import RunConfig
from pipeline.printable import shortened
from pipeline.records import Record


def describe_faults(faults: Sequence[Any], config: type[RunConfig]) -> list[str]:
    """Describe pydantic's errors, one line per key.

    For a key with alternatives, such as "a number, or auto", pydantic reports an error for each of them.

    Args:
        faults: The errors.
        config: Config that they are about.
    """
    by_key: dict[str, list[Any]] = {}
    unknown = []
    for fault in faults:
        key, model = _locate(fault["loc"], config)
        if fault["type"] == "missing" and isinstance(fault["loc"][-1], int):  # a list of a fixed length is too short
            key = key.rpartition(".")[0]
            fault = fault | {"type": "length", "msg": f"expected {fault['loc'][-1] + 1} values"}
        if fault["type"] == "too_short" and len(fault["input"]) >= fault["ctx"]["min_length"]:
            continue  # its items are faulty, and reported themselves
        if fault["type"] == "extra_forbidden":
            close = get_close_matches(str(fault["loc"][-1]), model.model_fields, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            unknown.append(
                f"unknown key {'.'.join(map(str, fault['loc']))!r}; {hint}"
                f"the keys of this section are {', '.join(model.model_fields)}"
            )
        else:
            by_key.setdefault(key, []).append(fault)
    return [_describe_key(key, key_faults) for key, key_faults in by_key.items()] + unknown


def _describe_key(key: str, faults: Sequence[Any]) -> str:
    message = ", or: ".join(fault["msg"].removeprefix("Value error, ") for fault in faults)
    found = "" if faults[0]["type"] in ("missing", "value_error") else f", found {shortened(repr(faults[0]['input']))}"
    return f"{key}: {message}{found}" if key else f"{message}{found}"


def _locate(location: tuple[str | int, ...], config: type[RunConfig]) -> tuple[str, type[Record]]:
    """Return the key of pydantic's location, without the trailing names of types, and the section of the key."""
    model: type[Record] = config
    key: list[str] = []
    for part in location:
        if isinstance(part, str) and part not in model.model_fields:
            break
        key.append(str(part))
        inner = (
            MtebTaskConfig
            if part in ("mteb_tasks", "forgetting")
            else model.model_fields[part].annotation
            if isinstance(part, str)
            else None
        )
        if isinstance(inner, type) and issubclass(inner, Record):
            model = inner
    return ".".join(key), model
