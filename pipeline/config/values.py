"""TODO."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, Strict
from pydantic_core import PydanticCustomError

from pipeline.hub_address import HUB_TARGET
from pipeline.records import Record


def like(pattern: str, expected: str) -> AfterValidator:
    """Validator of a text that matches the pattern as a whole; its message says in words what is expected."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise PydanticCustomError("unlike", "expected {expected}", {"expected": expected})
        return text

    return AfterValidator(check)


def without_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values. Raises: ``repeated``, for a message: one of them is there twice."""
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise PydanticCustomError("repeated", "{twice} is there more than once", {"twice": ", ".join(map(repr, twice))})
    return values


def _whole_above_one(share: float) -> float:
    """As Ray has it: a part of one, no smaller than a ten-thousandth, or whole ones."""
    if 0 < share < 1e-4 or (share > 1 and share != int(share)):
        raise PydanticCustomError("share", "expected a fraction from 0.0001 to 1, or a whole number")
    return share


NON_REPEATING = (Strict(False), AfterValidator(without_repeats))  # TOML has lists, and a strict tuple takes none


TARGET, TARGET_IN_WORDS = rf"{HUB_TARGET}|[^:]+", "a folder, or hf:OWNER/NAME"


NAME_IN_WORDS = "a name that fits the pattern: at most 128 of A-Z, a-z, 0-9, _, . and -, the first a letter or digit"


Target = Annotated[str, like(TARGET, TARGET_IN_WORDS)]


CpuShare = Annotated[float, Field(gt=0, le=4096), AfterValidator(_whole_above_one)]


GpuShare = Annotated[float, Field(ge=0, le=1024), AfterValidator(_whole_above_one)]


class Section(Record):
    """One part of the configuration. A value has the type of its key: ``true`` and ``"5"`` are not numbers, 1.0 is not an integer."""

    model_config = ConfigDict(strict=True, str_min_length=1, str_max_length=4096)
