"""Overrides of config values: ``--set KEY=VALUE``."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from pipeline.errors import ConfigError


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply ``KEY=VALUE`` overrides to raw config values, in place.

    Raises: ConfigError: an override is malformed, a key occurs twice, or a value has no such section.
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
    """Split a dotted key into its first part and the rest. The name of a task may contain dots (``….v2``)."""
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
    raise ConfigError(f"--set {key}: none of the {len(node)} entries is named {name!r}")


def _toml_value(raw: str) -> Any:
    """Parse one TOML value on one line; return anything else as a text.

    A value with something that TOML would skip, such as a comment or a comma, is a text too.
    """
    if "\n" in raw or "\r" in raw:
        return raw
    try:
        tomllib.loads(f"value = [{raw}]")
        return tomllib.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):  # ValueError also for a number with too many digits
        return raw
