"""TODO."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from pipeline.errors import ConfigError


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set keys of a config in place, each given as ``KEY=VALUE``.

    Raises: ConfigError: a key is given twice or does not exist, or its value is not TOML.
    """
    keys = [override.partition("=")[0].strip() for override in overrides]
    for key, override in zip(keys, overrides, strict=True):
        if keys.count(key) > 1:
            raise ConfigError(f"--set {key} is given more than once; keep one")
        _apply_override(values, override)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, sign, raw = override.partition("=")
    if not sign or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE, such as train.seed=7")
    node: Any = values
    last, rest = _first_part(node, key.strip())
    while rest:
        node = _child(node, last, key)
        last, rest = _first_part(node, rest)
    if isinstance(node, list):
        node[_index(node, last, key)] = _toml_value(raw)
    else:
        node[last] = _toml_value(raw)


def _first_part(node: Any, key: str) -> tuple[str, str]:
    """The first part of a dotted key, and the rest. The name of an MTEB task may hold dots itself (`….v2`)."""
    names = [str(item.get("name")) for item in node if isinstance(item, dict)] if isinstance(node, list) else []
    for name in sorted(names, key=len, reverse=True):
        if f"{key}.".startswith(f"{name}."):
            return name, key[len(name) + 1 :]
    first, _, rest = key.partition(".")
    return first, rest


def _child(node: Any, name: str, key: str) -> Any:
    child = node[_index(node, name, key)] if isinstance(node, list) else node.setdefault(name, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"--set {key}: {name!r} is a value, not a section")
    return child


def _index(node: list[Any], name: str, key: str) -> int:
    for index, item in enumerate(node):
        if (isinstance(item, dict) and item.get("name") == name) or name == str(index):
            return index
    raise ConfigError(f"--set {key}: {name!r} names none of the {len(node)} entries")


def _toml_value(raw: str) -> Any:
    """One TOML value on one line; else the text as it is. What TOML would skip (a comment, a comma) makes it a text."""
    if "\n" in raw or "\r" in raw:
        return raw
    try:
        tomllib.loads(f"value = [{raw}]")
        return tomllib.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):  # also of a number with too many digits
        return raw
