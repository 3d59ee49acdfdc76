"""Reading of TOML and YAML files that people write, with limits on size, depth and number of values."""

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
# Matches multi-line strings and comments first, so that nothing inside them counts, and then dotted keys; "deep" are
# keys with too many parts. An unclosed string reaches to the end of the line or the file.
_PART = r"""(?:"(?:[^"\\\n]|\\.)*+"?|'[^'\n]*+'?|[A-Za-z0-9_-]++)"""
_DOT = rf"(?:[ \t]*+\.[ \t]*+{_PART})"
# No lookahead inside a possessive group: before Python 3.11.5, such a group ends too early.
_TOML_TOKEN = re.compile(
    r'''"""[^"\\]*+(?:(?:\\[\s\S]|"{1,2}(?!"))[^"\\]*+)*(?:"{3,5}|\Z)'''
    r"""|'''[^']*+(?:'{1,2}(?!')[^']*+)*(?:'{3,5}|\Z)"""
    rf"|#[^\n]*+|(?P<deep>{_PART}{_DOT}{{{_DEEPEST},}}+)|{_PART}{_DOT}*+|[^\"'#A-Za-z0-9_-]++"
)


def read_text(path: Path) -> str:
    """Read a regular file as UTF-8, with or without a byte order mark.

    Raises: ConfigError: the file does not exist, is not a regular file, is larger than 1 MiB, or is not UTF-8.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        with path.open("rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > _LARGEST_BYTES:
        raise ConfigError(f"{path}: larger than {_LARGEST_BYTES // 1024**2} MiB; expected a file written by hand")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}; save it as UTF-8") from None


def parse_toml(text: str, *, origin: str) -> dict[str, Any]:
    """Parse TOML. The caller may add values, and must then call ``check_values``.

    Args:
        text: The document.
        origin: Name of the document, for messages.
    Raises: ConfigError: the text is not TOML, is nested too deeply, or holds too long a number.
    """
    if any(token["deep"] for token in _TOML_TOKEN.finditer(text)):  # tomllib is quadratic in the parts of a key
        raise ConfigError(f"{origin}: nested more than {_DEEPEST} deep")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from None
    except ValueError:  # Python parses at most 4,300 digits
        raise ConfigError(f"{origin}: holds a number of more than 4,300 digits") from None
    except RecursionError:
        raise ConfigError(f"{origin}: nested more than {_DEEPEST} deep") from None


def parse_yaml(text: str, *, origin: str) -> Any:
    """Parse YAML of plain values, including anchors and merges, and check the values.

    Args:
        text: The document.
        origin: Name of the document, for messages.
    Raises: ConfigError: the text is not YAML, a key occurs twice, or ``check_values`` refuses a value.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def get_single_node(self) -> Any:
            node = super().get_single_node()
            _check_size(node, _inside_node, origin)  # before aliases and merges multiply the values
            return node

    try:
        values = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: nested more than {_DEEPEST} deep") from None
    except (ValueError, OverflowError) as error:  # such as a 13th month or 4,301 digits
        raise ConfigError(
            f"{origin}: holds a value that cannot be read: {first_line(error).partition(':')[0]}"
        ) from None
    except (LookupError, AttributeError, TypeError):  # raised by PyYAML for tags such as !!bool
        raise ConfigError(f"{origin}: holds a value that does not match its tag (!!…)") from None
    check_values(values, origin=origin)
    return values


def check_values(values: Any, *, origin: str) -> None:
    """Refuse values that no setting can have, before anything recurses into them, prints or stores them.

    Args:
        values: Parsed values.
        origin: Name of the document, for messages.
    Raises: ConfigError: values are nested too deeply or too many, an integer has more than 64 bits, a text holds a null
        character or a lone surrogate, or a URL holds a password or a signature.
    """
    for value in _check_size(values, _inside_value, origin):
        if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
            raise ConfigError(f"{origin}: holds an integer of {value.bit_length()} bits; expected at most 64")
        if isinstance(value, str):
            if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
                raise ConfigError(f"{origin}: {value!r} is not a text: it holds a null character, or half a character")
            if redacted(value) != value:
                raise ConfigError(
                    f"{origin}: {redacted(value)} holds a password or a signature, which each run would store; "
                    "keep it in the environment of the program that opens the URL"
                )


def _check_size(root: Any, inside: Any, origin: str) -> list[Any]:
    """List all values inside a value, repeated ones repeatedly. Not recursive, because it checks the depth."""
    values, waiting = [], [(root, 0)]
    while waiting:
        value, depth = waiting.pop()
        values.append(value)
        if depth > _DEEPEST:
            raise ConfigError(f"{origin}: nested more than {_DEEPEST} deep")
        if len(values) > _MOST_VALUES:
            raise ConfigError(f"{origin}: holds more than {_MOST_VALUES:,} values")
        waiting.extend((part, depth + 1) for part in inside(value, origin))
    return values


def _inside_value(value: Any, origin: str) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value


def _inside_node(node: Any, origin: str) -> Iterator[Any]:
    """Yield the nodes inside a YAML node, whose ``value`` is a text, nodes, or pairs of nodes.

    Raises: ConfigError: a mapping has a key twice.
    """
    if node is None or isinstance(node.value, str):
        return
    keys = Counter(part[0].value for part in node.value if isinstance(part, tuple) and isinstance(part[0].value, str))
    if twice := sorted(key for key, count in keys.items() if count > 1):
        raise ConfigError(
            f"{origin}: line {node.start_mark.line + 1}: {', '.join(twice)} occurs twice, and only one would count"
        )
    for part in node.value:
        yield from part if isinstance(part, tuple) else (part,)
