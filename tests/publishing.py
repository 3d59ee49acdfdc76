"""Publishing to the tests' Hub: from this process or from a child that may be killed, and what a repository then has to hold."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import huggingface_hub.constants
import psutil
import pytest
from builders import load_encoder
from hub_server import HubServer, go_online, serve_hub

import pipeline.hub
import pipeline.reload
from pipeline.adapter import load_adapter, save_adapter
from pipeline.config import GateConfig, PublishConfig
from pipeline.manifest import RunManifest, read_manifest, write_manifest
from pipeline.publish import Published, publish
from pipeline.records import AdapterRef, ClassificationResults, Probe, Publication, TaskResult
from pipeline.results import summarise
from pipeline.run_folder import RunFolder, read_record, write_atomically

REPO = "me/fleet"
TO = f"hf:{REPO}"
NO_GATE = PublishConfig(gate=GateConfig(enabled=False))
LARGE = 2_000
"""Bytes from which on a file is a large file, where there are any."""
FOREIGN = {".gitattributes", "publication.json"}
"""Files that publication.json does not list."""

_WARM = multiprocessing.get_context("forkserver")  # its children start with everything imported, and share no thread with us
_WARM.set_forkserver_preload(["publishing", "pipeline.reload", "transformers", "mteb", "matplotlib.pyplot", "transformers.models.bert"])


@dataclass(frozen=True)
class Place:
    """A Hub, and what this process is told of it."""

    hub: HubServer
    home: Path
    """Of the client's cache."""
    waits: list[float]
    """Seconds that were to be waited before trying again; nobody waits them."""

    def publish(self, run: Path, config: PublishConfig | None = None, *, to: str = TO) -> Published:
        """From this process."""
        return publish(run, to, config or PublishConfig())

    def publish_elsewhere(self, run: Path, name: str = "child", config: PublishConfig | None = None) -> Child:
        """From a process of its own, under way when this returns."""
        return Child(self, run, self.home / f"{name}.json", config or PublishConfig())

    def lay_down(self, files: dict[str, bytes]) -> None:
        """A repository with these files, as if they had been published before."""
        huggingface_hub.HfApi().create_repo(REPO)
        if files:
            self.hub.commit(REPO, dict(files))
        self.hub.requests.clear()

    def files(self) -> dict[str, bytes]:
        """What main holds; nothing if there is no repository."""
        try:
            return published_part(self.hub.files(REPO))
        except KeyError:
            return {}


class Child:
    """A process that publishes; what came of it, once it has ended."""

    def __init__(self, place: Place, run: Path, answer: Path, config: PublishConfig) -> None:
        self._answer = answer
        answer.unlink(missing_ok=True)
        arguments = (place.hub.endpoint, place.hub.token, str(place.home), str(run), str(answer), config.model_dump_json())
        self.process = _WARM.Process(target=_publish_here, args=arguments)
        self.process.start()

    def kill(self) -> None:
        """``kill -9``; returns when it is dead. May be called from any thread."""
        pid = self.process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)

    def ended(self, *, seconds: float = 60) -> dict[str, Any] | None:
        """What it came to; nothing if it was killed."""
        self.process.join(seconds)
        assert not self.process.is_alive(), "it hangs"
        return json.loads(self._answer.read_text(encoding="utf-8")) if self._answer.is_file() else None


class Trap(list[tuple[str, str, int]]):
    """Takes the place of ``HubServer.requests``, and strikes when a request has been dealt with but not answered."""

    def __init__(self, at: Callable[[int, tuple[str, str, int]], bool], strike: Callable[[], None]) -> None:
        super().__init__()
        self._at, self._strike = at, strike
        self.sprung = False

    def append(self, request: tuple[str, str, int]) -> None:
        super().append(request)
        if not self.sprung and self._at(len(self), request):
            self.sprung = True
            self._strike()


@contextlib.contextmanager
def hub_of_our_own(home: Path, *, large: bool = False, token: str = "hf_test") -> Iterator[Place]:
    """A Hub that this process publishes to. No wait is waited, and what verifies is a fresh process of a warm server: 0.2 s, not 4."""
    with serve_hub(token=token, lfs_from_bytes=LARGE if large else None) as hub, pytest.MonkeyPatch.context() as monkeypatch:
        waits: list[float] = []
        _go_to(hub.endpoint, token, home, waits, monkeypatch)
        monkeypatch.setattr(pipeline.reload, "subprocess", SimpleNamespace(run=_run_warm, PIPE=subprocess.PIPE))
        yield Place(hub, home, waits)


def _go_to(endpoint: str, token: str, home: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    go_online(monkeypatch)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants = {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(home / "hub")}
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", token)
    for module in (pipeline.hub, huggingface_hub.utils._http):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append))
    huggingface_hub.utils.disable_progress_bars()


def _publish_here(endpoint: str, token: str, home: str, run: str, answer: str, config: str) -> None:
    """In a child."""
    monkeypatch = pytest.MonkeyPatch()
    _go_to(endpoint, token, Path(home), [], monkeypatch)
    monkeypatch.setattr(pipeline.reload, "subprocess", SimpleNamespace(run=_run_forked, PIPE=subprocess.PIPE))
    try:
        published = publish(Path(run), TO, PublishConfig.model_validate_json(config))
        said = {"revision": published.revision, "promoted": [adapter.name for adapter in published.verified]}
    except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to see it
        said = {"error": type(error).__name__, "message": str(error)}
    write_atomically(Path(answer), json.dumps(said))


def _run_warm(command: Sequence[str], *, input: bytes, stdout: IO[bytes], **_: Any) -> subprocess.CompletedProcess[bytes]:
    return _as_main(command, input, stdout, lambda target, *args: _WARM.Process(target=target, args=args))


def _run_forked(command: Sequence[str], *, input: bytes, stdout: IO[bytes], **_: Any) -> subprocess.CompletedProcess[bytes]:
    fork = multiprocessing.get_context("fork")
    return _as_main(command, input, stdout, lambda target, *args: fork.Process(target=target, args=args))


def _as_main(command: Sequence[str], input: bytes, stdout: IO[bytes], make: Callable[..., Any]) -> subprocess.CompletedProcess[bytes]:
    *_, option, module = command
    assert option == "-m"
    receive, send = multiprocessing.Pipe(duplex=False)
    process = make(_main, module, input, send)
    process.start()
    send.close()
    try:
        out, err, code = receive.recv()
    except EOFError:
        out, err, code = b"", b"", -9
    process.join()
    stdout.write(out)
    stdout.flush()
    return subprocess.CompletedProcess(command, code, None, err)


def _main(module: str, input: bytes, send: Any) -> None:
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.stdin = io.TextIOWrapper(io.BytesIO(input))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__")
        except BaseException as error:  # noqa: BLE001 - as an interpreter ends
            print(f"{type(error).__name__}: {error}", file=err)
            code = 1
    send.send((out.getvalue().encode(), err.getvalue().encode(), code))


def published_part(files: dict[str, bytes]) -> dict[str, bytes]:
    """Less what the Hub put there."""
    return {path: content for path, content in files.items() if path != ".gitattributes"}


def check_complete(files: dict[str, bytes], tasks: set[str], *, others: Sequence[str] = ()) -> Publication:
    """All of a publication with these MTEB tasks, each file with its sha256, and nothing else but files of others."""
    publication = Publication.model_validate_json(files["publication.json"])
    assert set(files) - FOREIGN - set(others) == set(publication.files)
    wrong = [path for path, sha256 in publication.files.items() if hashlib.sha256(files[path]).hexdigest() != sha256]
    assert wrong == []
    assert set(publication.adapters) == tasks
    summary = ClassificationResults.model_validate_json(files["classification_results.json"])
    assert {entry.task: entry.adapter_sha256 for entry in summary.tasks} == publication.adapters
    assert all(f"| {task} |" in files["README.md"].decode() for task in tasks)
    return publication


def check_settled(hub: HubServer, tasks: set[str], run: Path, *, others: Sequence[str] = ()) -> Publication:
    """Complete, tagged, and nothing is left of how it came there."""
    publication = check_complete(hub.files(REPO), tasks, others=others)
    assert set(hub.branches(REPO)) == {"main"}
    tagged = hub.tags(REPO)[f"run-{RunFolder(run).root.name}"]
    assert published_part(hub.files(REPO, tagged)) == published_part(hub.files(REPO))
    return publication


def copy_run(run: Path, root: Path, *, tasks: Sequence[str] = ("Topics", "Pairs"), **config: Any) -> RunFolder:
    """A finished run with only these MTEB tasks, under the name of its new folder; ``config`` replaces sections of its configuration."""
    import shutil

    shutil.copytree(run, root, ignore=lambda _, names: {"Topics", "Pairs"} - set(tasks) & set(names))
    folder = RunFolder(root)
    folder.gate.unlink(missing_ok=True)
    kept = [read_record(folder.task(task).result, TaskResult) for task in tasks]
    _rewrite(folder, kept, **config)
    return folder


def _rewrite(folder: RunFolder, results: Sequence[TaskResult], **config: Any) -> None:
    """Let the run's records say what its folder now holds."""
    old, run_id = read_manifest(folder), folder.root.name
    names = [result.mteb_task.name for result in results]
    for result in results:
        folder.task(result.mteb_task.name).result.write_text(result.model_dump_json(indent=1), encoding="utf-8")
    summary = summarise(results, (), encoder=old.encoder, run_id=run_id, created_at=old.created_at)
    folder.results.write_text(summary.model_dump_json(indent=1), encoding="utf-8")
    changes = {
        "run_id": run_id,
        "config": old.config.model_dump() | config,
        "mteb_tasks": tuple(task for task in old.mteb_tasks if task.name in names),
        "adapters": {result.mteb_task.name: result.adapter.sha256 for result in results},
    }
    write_manifest(RunManifest.model_validate(old.model_dump() | changes), folder)


def change_adapter(folder: RunFolder, task: str, encoder: Path, change: Callable[[Any], None]) -> None:
    """Change a run's adapter as if it had been trained so: all its files, its probe and its sha256 fit each other afterwards."""
    place, loaded = folder.task(task), load_encoder(encoder)
    adapter = load_adapter(place, loaded)
    change(adapter)
    meta = json.loads(place.meta.read_text(encoding="utf-8"))
    saved: AdapterRef = save_adapter(adapter, place, meta=meta)
    probe = read_record(place.probe, Probe)
    logits = adapter.logits_of_vectors(loaded.embed(loaded.tokenise(probe.texts)))
    place.probe.write_text(Probe.model_validate(probe.model_dump() | {"logits": logits.tolist()}).model_dump_json(), encoding="utf-8")
    results = {path.parent.name: read_record(path, TaskResult) for path in folder.root.glob("*/result.json")}
    result = results[task]
    results[task] = TaskResult.model_validate(result.model_dump() | {"adapter": result.adapter.model_dump() | {"sha256": saved.sha256}})
    _rewrite(folder, list(results.values()))


def no_effect(adapter: Any) -> None:
    """As if nothing had been trained but the head."""
    import torch

    with torch.no_grad():
        for lora in adapter.projections.values():
            lora.lora_B.zero_()


def another_head(adapter: Any) -> None:
    """A little of another training."""
    import torch

    with torch.no_grad():
        adapter.head[1].bias.add_(0.05)
