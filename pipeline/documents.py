"""TOML and YAML files that a person writes: read with a bound on their size, their depth and the number of their values."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, first_line
from pipeline.printable import redacted

_LARGEST_BYTES = 1024**2
_DEEPEST = 32
_MOST_VALUES = 100_000
_LARGEST_INTEGER = 2**63 - 1
# Texts over several lines and comments, so that nothing inside of them counts; then keys, of which those of too many parts are deep. What
# is not closed reaches to the end of the line or of the file.
_PART = r"""(?:"(?:[^"\\\n]|\\.)*+"?|'[^'\n]*+'?|[A-Za-z0-9_-]++)"""
_DOT = rf"(?:[ \t]*+\.[ \t]*+{_PART})"
_TOML_TOKEN = re.compile(
    r'''"""(?:[^"\\]|\\[\s\S]|"{1,2}(?!"))*+(?:"{3,5}|\Z)'''
    r"""|'''(?:[^']|'{1,2}(?!'))*+(?:'{3,5}|\Z)"""
    rf"|#[^\n]*+|(?P<deep>{_PART}{_DOT}{{{_DEEPEST},}}+)|{_PART}{_DOT}*+|[^\"'#A-Za-z0-9_-]++"
)


def read_text(path: Path) -> str:
    """The text of a regular file, UTF-8 with or without a byte order mark.

    Raises: ConfigError: no such file, not a regular one, larger than 1 MiB, or not UTF-8.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        with path.open("rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > _LARGEST_BYTES:
        raise ConfigError(
            f"{path}: larger than {_LARGEST_BYTES // 1024**2} MiB; expected a file that a person has written"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}; save it as UTF-8") from None


def parse_toml(text: str, *, origin: str) -> dict[str, Any]:
    """Read TOML; ``check_values`` is left to the caller, who may add to it.

    Raises: ConfigError: not TOML, or what no TOML file needs; ``origin`` names it.
    """
    if any(found["deep"] for found in _TOML_TOKEN.finditer(text)):  # tomllib's time grows with the square of the parts
        raise ConfigError(f"{origin}: nested more than {_DEEPEST} deep")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from None
    except ValueError:  # Python reads no more than 4,300 digits
        raise ConfigError(f"{origin}: holds a number of more than 4,300 digits") from None
    except RecursionError:
        raise ConfigError(f"{origin}: nested more than {_DEEPEST} deep") from None


def parse_yaml(text: str, *, origin: str) -> Any:
    """Read YAML of plain values, with anchors and merges, and check the values.

    Raises: ConfigError: not YAML, or a key is there twice, and what ``check_values`` raises.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def get_single_node(self) -> Any:
            node = super().get_single_node()
            _check_size(node, _inside_node, origin)  # before aliases and merges make many values of few
            return node

    try:
        values = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: nested more than {_DEEPEST} deep") from None
    except (ValueError, OverflowError) as error:  # a 13th month, 4,301 digits
        raise ConfigError(
            f"{origin}: holds a value that cannot be read: {first_line(error).partition(':')[0]}"
        ) from None
    except (LookupError, AttributeError, TypeError):  # PyYAML's, of !!bool perhaps and the like
        raise ConfigError(f"{origin}: holds a value that does not fit its tag (!!…)") from None
    check_values(values, origin=origin)
    return values


def check_values(values: Any, *, origin: str) -> None:
    """Refuse what no setting can be, before anything recurses into the values, prints or stores them.

    Raises: ConfigError: nested too deep, too many values, an integer of more than 64 bits, a text with a null character or half a
        character, or a URL with a password or a signature.
    """
    for value in _check_size(values, _inside_value, origin):
        if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
            raise ConfigError(f"{origin}: holds an integer of {value.bit_length()} bits; at most 64 are read")
        if isinstance(value, str):
            if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
                raise ConfigError(f"{origin}: {value!r} is not a text: it holds a null character, or half a character")
            if redacted(value) != value:
                raise ConfigError(
                    f"{origin}: {redacted(value)} holds a password or a signature, which would be stored with each run; "
                    "keep it in the environment of what opens the URL"
                )


def _check_size(root: Any, inside: Any, origin: str) -> list[Any]:
    """All that is in it, what occurs twice twice; without recursion, because that is what is checked."""
    found, waiting = [], [(root, 0)]
    while waiting:
        value, depth = waiting.pop()
        found.append(value)
        if depth > _DEEPEST:
            raise ConfigError(f"{origin}: nested more than {_DEEPEST} deep")
        if len(found) > _MOST_VALUES:
            raise ConfigError(f"{origin}: holds more than {_MOST_VALUES:,} values")
        waiting.extend((part, depth + 1) for part in inside(value, origin))
    return found


def _inside_value(value: Any, origin: str) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value


def _inside_node(node: Any, origin: str) -> Iterator[Any]:
    """Of a YAML node, whose ``value`` is a text, nodes, or pairs of them."""
    if node is None or isinstance(node.value, str):
        return
    keys = Counter(part[0].value for part in node.value if isinstance(part, tuple) and isinstance(part[0].value, str))
    if twice := sorted(key for key, count in keys.items() if count > 1):
        raise ConfigError(
            f"{origin}: line {node.start_mark.line + 1}: {', '.join(twice)} is there twice, and only one would count"
        )
    for part in node.value:
        yield from part if isinstance(part, tuple) else (part,)
