"""Addresses on the Hugging Face Hub, as commands and configs take them: ``hf:OWNER/NAME[@REVISION][#TASK]``."""

from __future__ import annotations

import re

HUB_REF = re.compile(
    r"hf:(?P<repository>[^/@#]+/[^/@#]+)(?:@(?P<revision>[^#]+))?(?:#(?P<task>[A-Za-z0-9][A-Za-z0-9_.-]*))?"
)
"""An adapter, or all adapters of a repository."""
HUB_TARGET = r"hf:[^/:@#]+/[^/:@#]+"
"""Pattern of a repository to publish to."""

_PREFIX = "hf:"


def is_on_hub(address: str) -> bool:
    """Whether an address names something on the Hub. Everything else is a folder."""
    return address.startswith(_PREFIX)


def repository_of(address: str) -> str | None:
    """``OWNER/NAME`` of a repository that is published to; None for a folder."""
    return address.removeprefix(_PREFIX) if is_on_hub(address) else None
