"""Messages about a Hub that does not answer."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets.config
import huggingface_hub
import mteb
import pytest
from httpx2 import ConnectError
from hub_server import HubServer, go_online
from huggingface_hub.errors import LocalEntryNotFoundError
from publishing import hub_of_our_own

from pipeline.config import DataConfig, EncoderConfig, MtebTaskConfig
from pipeline.data.catalogue import plan_task
from pipeline.data.mteb_tasks import load_from_hub
from pipeline.encoder.files import find_encoder
from pipeline.errors import InputError, LorafleetError
from pipeline.hub_client import ask, download
from pipeline.inference.reference import find_adapters
from pipeline.publishing.hub import HubRepository


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
    go_online(monkeypatch)
    monkeypatch.setattr("pipeline.hub_client._FIRST_WAIT_SECONDS", 0.001)

    def call() -> None:
        raise error

    with pytest.raises(LorafleetError, match=r"^hf:team/adapters: ") as raised:
        ask("hf:team/adapters", call)
    assert ("HTTPS_PROXY" in str(raised.value)) == is_out_of_reach
    assert not isinstance(raised.value, InputError)


def load_data_set() -> None:
    """One that mteb knows, at another address; ``datasets`` has constants of its own."""
    mteb_task = mteb.get_task("Banking77Classification", eval_splits=["test"])
    mteb_task.metadata = mteb_task.metadata.model_copy(update={"dataset": {"path": "team/data", "revision": "0" * 40}})
    planned = plan_task(MtebTaskConfig(name="Banking77Classification"), data=DataConfig(), default_epochs=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", huggingface_hub.constants.ENDPOINT)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", huggingface_hub.constants.HF_HUB_OFFLINE)
        load_from_hub(planned, mteb_task, offline=False)


Asks = dict[str, Callable[[], object]]
ASKS: Asks = {
    "an adapter": lambda: find_adapters(["hf:team/adapters#Topics"], offline=False),
    "an encoder": lambda: find_encoder(EncoderConfig(name="team/encoder"), offline=False),
    "a repository": lambda: HubRepository("team/adapters").read(),
    "a download": lambda: download("team/adapters", "main"),
    "a data set": load_data_set,
}
"""Everything of ours that asks the Hub for something."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub without a repository, and an empty cache."""
    with hub_of_our_own(tmp_path) as place:
        yield place.hub


@pytest.mark.parametrize("what", ASKS)
@pytest.mark.parametrize("fault", [500, 503, "no server"])
def test_a_hub_out_of_reach_or_broken_is_worth_another_try(
    what: str, fault: int | str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(fault, int):
        hub.fail(times=10_000, status=fault)
    else:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(LorafleetError, match=r"team/") as raised:
        ASKS[what]()
    assert not isinstance(raised.value, InputError), "exit code 1"
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("what", [what for what in ASKS if what != "a repository"])  # one that is not there is made
@pytest.mark.parametrize("status", [None, 401, 403])
def test_what_is_not_there_or_not_allowed_is_not_worth_one(what: str, status: int | None, hub: HubServer) -> None:
    if status is not None:
        hub.fail(times=10_000, status=status)
    with pytest.raises(InputError, match=r"team/") as raised:
        ASKS[what]()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("what", ASKS)
def test_what_is_not_in_the_cache_while_offline_is_not_worth_one(
    what: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"team/"):
        ASKS[what]()
    assert hub.requests == []


@pytest.mark.parametrize("is_cause", [False, True])
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, InputError),
        (errno.EROFS, InputError),
        (errno.ENAMETOOLONG, InputError),
        (errno.ENOSPC, LorafleetError),
    ],
)
def test_a_fault_of_this_machine_is_not_waited_for(
    number: int, kind: type[LorafleetError], is_cause: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, waits = [], []
    monkeypatch.setattr("pipeline.hub_client.time.sleep", waits.append)

    def call() -> None:
        calls.append(1)
        error = OSError(number, os.strerror(number), "cache/file")
        raise (RuntimeError("upload") if is_cause else error) from error

    with pytest.raises(kind, match=rf"^team/x: cache/file: {os.strerror(number)}$") as raised:
        ask("team/x", call)
    assert (type(raised.value), len(calls), waits) == (kind, 1, [])


@pytest.mark.parametrize("what", ["an adapter", "an encoder", "a repository", "a download"])
@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_every_download_asks_a_busy_hub_again(
    what: str, status: int, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is busy for a few requests. Then it answers that the repository is missing."""
    waits: list[float] = []
    monkeypatch.setattr("pipeline.hub_client.time.sleep", waits.append)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail(times=2, status=status)
    with contextlib.suppress(InputError):
        ASKS[what]()
    assert waits, "it was not asked again"
    assert len(hub.requests) > 2


@pytest.mark.parametrize("what", ["an adapter", "an encoder"])
def test_a_hub_out_of_reach_is_said_at_once_where_a_cache_may_do(
    what: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("pipeline.hub_client.time.sleep", waits.append)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LorafleetError, match="team/"):
        ASKS[what]()
    assert waits == []
