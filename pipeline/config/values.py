"""Types of config values, and the base class of all sections."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, Strict
from pydantic_core import PydanticCustomError

from pipeline.hub_address import HUB_TARGET
from pipeline.records import Record


def like(pattern: str, expected: str) -> AfterValidator:
    """Return a validator of texts that match a pattern as a whole.

    Args:
        pattern: Regular expression.
        expected: Description of the pattern, for the message.
    """

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise PydanticCustomError("unlike", "expected {expected}", {"expected": expected})
        return text

    return AfterValidator(check)


def without_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the values unchanged. Raises: PydanticCustomError: a value occurs more than once."""
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise PydanticCustomError("repeated", "{twice} occurs more than once", {"twice": ", ".join(map(repr, twice))})
    return values


def _whole_above_one(share: float) -> float:
    """Check a share of CPUs or GPUs by Ray's rule: a fraction of at least 0.0001, or a whole number."""
    if 0 < share < 1e-4 or (share > 1 and share != int(share)):
        raise PydanticCustomError("share", "expected a fraction from 0.0001 to 1, or a whole number")
    return share


NON_REPEATING = (Strict(False), AfterValidator(without_repeats))  # TOML has lists, which a strict tuple refuses
TARGET, TARGET_IN_WORDS = rf"{HUB_TARGET}|[^:]+", "a folder, or hf:OWNER/NAME"
NAME_IN_WORDS = "a name that fits the pattern: at most 128 of A-Z, a-z, 0-9, _, . and -, the first a letter or digit"
Target = Annotated[str, like(TARGET, TARGET_IN_WORDS)]
CpuShare = Annotated[float, Field(gt=0, le=4096), AfterValidator(_whole_above_one)]
GpuShare = Annotated[float, Field(ge=0, le=1024), AfterValidator(_whole_above_one)]


class Section(Record):
    """One section of the configuration.

    Types are strict: ``true`` and ``"5"`` are not numbers, and 1.0 is not an integer.
    """

    model_config = ConfigDict(strict=True, str_min_length=1, str_max_length=4096)
