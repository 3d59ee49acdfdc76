"""What somebody is told when the Hub does not answer."""

from __future__ import annotations

import errno

import pytest
from httpx2 import ConnectError
from huggingface_hub.errors import LocalEntryNotFoundError

from pipeline.errors import LorafleetError
from pipeline.hub import ask


def upload_failed() -> Exception:
    error = RuntimeError("Error while uploading")
    error.__cause__ = ConnectError("Name or service not known")
    return error


@pytest.mark.parametrize(
    ("error", "is_out_of_reach"),
    [
        (ConnectError("Name or service not known"), True),
        (LocalEntryNotFoundError("not in the cache"), True),
        (upload_failed(), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
    ],
)
def test_only_a_hub_out_of_reach_is_looked_for_in_the_network(
    error: Exception, is_out_of_reach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.hub._FIRST_WAIT_SECONDS", 0.001)

    def call() -> None:
        raise error

    with pytest.raises(LorafleetError, match=r"^hf:team/adapters: ") as raised:
        ask("hf:team/adapters", call)
    assert ("HTTPS_PROXY" in str(raised.value)) == is_out_of_reach
