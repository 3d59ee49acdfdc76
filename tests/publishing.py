"""Publishing to the tests' Hub, from this process or a child that may be killed, and expected contents."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import huggingface_hub.constants
import psutil
import pytest
from builders import load_encoder, of_adapter
from hub_server import CUT, HubServer, go_online, serve_hub

import pipeline.hub_client
import pipeline.inference.fresh_process
from pipeline.adapter.files import load_adapter, save_adapter
from pipeline.config import GateConfig, PublishConfig
from pipeline.errors import InputError, LorafleetError, VerificationError
from pipeline.publishing.publish import PublishResult, publish
from pipeline.records import AdapterRef, ClassificationResults, Publication, ReferenceOutputs, TaskResult
from pipeline.reports.summary import summarise, summarise_all
from pipeline.store.files import read_record, write_atomically
from pipeline.store.manifest import RunManifest, read_manifest, write_manifest
from pipeline.store.run_folder import RunFolder

REPO = "me/fleet"
TO = f"hf:{REPO}"
NO_GATE = PublishConfig(gate=GateConfig(enabled=False))
LARGE = 2_000
"""Bytes from which on a file is a large file, where there are any."""
SECRET = "hf_RecognisableSecretOfNobody"
FOREIGN = {".gitattributes", "publication.json"}
"""Files that publication.json does not list."""

BOTH = {"Topics", "Pairs"}
STAGING = "staging/both"

_WARM = multiprocessing.get_context(
    "forkserver"
)  # its children start with everything imported, and share no thread with us
_WARM.set_forkserver_preload(
    ["publishing", "mteb", "peft", "matplotlib.pyplot", "transformers.models.bert.modeling_bert"]
)


@dataclass(frozen=True)
class Place:
    """A Hub, and the state of this process as its client."""

    hub: HubServer
    home: Path
    """Folder of the client's cache."""
    waits: list[float]
    """Seconds of each wait before a retry. The waits are skipped."""

    def publish(self, run: Path, config: PublishConfig | None = None, *, to: str = TO) -> PublishResult:
        """Publish from this process."""
        return publish(run, (config or PublishConfig()).model_copy(update={"to": to}))

    def publish_elsewhere(self, run: Path, name: str = "child", config: PublishConfig | None = None) -> Child:
        """Start a process that publishes, and return at once."""
        return Child(self, run, self.home / f"{name}.json", config or PublishConfig())

    def lay_down(self, files: dict[str, bytes]) -> None:
        """Create a repository with these files."""
        huggingface_hub.HfApi().create_repo(REPO)
        if files:
            self.hub.commit(REPO, dict(files))
        self.hub.requests.clear()

    def files(self) -> dict[str, bytes]:
        """Files on main; empty if there is no repository."""
        try:
            return published_part(self.hub.files(REPO))
        except KeyError:
            return {}


class Child:
    """A process that publishes, and its outcome."""

    def __init__(self, place: Place, run: Path, answer: Path, config: PublishConfig) -> None:
        self._answer = answer
        answer.unlink(missing_ok=True)
        arguments = (
            place.hub.endpoint,
            place.hub.token,
            str(place.home),
            str(run),
            str(answer),
            config.model_dump_json(),
        )
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
        """The answer of the child; None if it was killed."""
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
    """A Hub that this process publishes to. Waits are skipped, and a warm server verifies in 0.2 s instead of 4 s."""
    with (
        serve_hub(token=token, lfs_from_bytes=LARGE if large else None) as hub,
        pytest.MonkeyPatch.context() as monkeypatch,
    ):
        waits: list[float] = []
        _go_to(hub.endpoint, token, home, waits, monkeypatch)
        monkeypatch.setattr(
            pipeline.inference.fresh_process, "subprocess", SimpleNamespace(run=_run_warm, PIPE=subprocess.PIPE)
        )
        yield Place(hub, home, waits)


def _go_to(endpoint: str, token: str, home: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    go_online(monkeypatch)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants = {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(home / "hub")}
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", token)
    for module in (pipeline.hub_client, huggingface_hub.utils._http):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append))
    huggingface_hub.utils.disable_progress_bars()


def _publish_here(endpoint: str, token: str, home: str, run: str, answer: str, config: str) -> None:
    """Publish in a child process."""
    monkeypatch = pytest.MonkeyPatch()
    _go_to(endpoint, token, Path(home), [], monkeypatch)
    monkeypatch.setattr(
        pipeline.inference.fresh_process, "subprocess", SimpleNamespace(run=_run_forked, PIPE=subprocess.PIPE)
    )
    try:
        published = publish(Path(run), PublishConfig.model_validate_json(config).model_copy(update={"to": TO}))
        said = {"revision": published.revision, "promoted": [adapter.name for adapter in published.verified]}
    except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to see it
        said = {"error": type(error).__name__, "message": str(error)}
    write_atomically(Path(answer), json.dumps(said))


def _run_warm(
    command: Sequence[str], *, input: bytes, stdout: IO[bytes], **_: Any
) -> subprocess.CompletedProcess[bytes]:
    return _as_main(command, input, stdout, lambda target, *args: _WARM.Process(target=target, args=args))


def _run_forked(
    command: Sequence[str], *, input: bytes, stdout: IO[bytes], **_: Any
) -> subprocess.CompletedProcess[bytes]:
    fork = multiprocessing.get_context("fork")
    return _as_main(command, input, stdout, lambda target, *args: fork.Process(target=target, args=args))


def _as_main(
    command: Sequence[str], input: bytes, stdout: IO[bytes], make: Callable[..., Any]
) -> subprocess.CompletedProcess[bytes]:
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
    """Files of a repository without those that the Hub adds."""
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
    """A finished run with only these MTEB tasks, named as its new folder; ``config`` replaces config sections."""
    shutil.copytree(run, root, ignore=lambda _, names: {"Topics", "Pairs"} - set(tasks) & set(names))
    folder = RunFolder(root)
    folder.gate.unlink(missing_ok=True)
    kept = [read_record(folder.task(task).result, TaskResult) for task in tasks]
    rewrite_results(folder, kept, **config)
    return folder


def rewrite_results(folder: RunFolder, results: Sequence[TaskResult], **config: Any) -> None:
    """Let the run's records say what its folder now holds."""
    old, run_id = read_manifest(folder), folder.root.name
    names = [result.mteb_task.name for result in results]
    for result in results:
        folder.task(result.mteb_task.name).result.write_text(result.model_dump_json(indent=1), encoding="utf-8")
    facts: dict[str, Any] = {"encoder": old.encoder, "run_id": run_id, "created_at": old.created_at}
    folder.results.write_text(summarise(results, (), **facts).model_dump_json(indent=1), encoding="utf-8")
    folder.all_results.write_text(summarise_all(results, (), **facts).model_dump_json(indent=1), encoding="utf-8")
    changes = {
        "run_id": run_id,
        "config": old.config.model_dump() | config,
        "mteb_tasks": tuple(task for task in old.mteb_tasks if task.name in names),
        "adapters": {result.mteb_task.name: result.adapter.sha256 for result in results},
    }
    write_manifest(RunManifest.model_validate(old.model_dump() | changes), folder)


def change_adapter(folder: RunFolder, task: str, encoder: Path, change: Callable[[Any], None]) -> None:
    """Change a run's adapter consistently: afterwards its files, its probe and its sha256 agree."""
    place, loaded = folder.task(task), load_encoder(encoder)
    adapter = load_adapter(place, loaded)
    change(adapter)
    meta = json.loads(place.meta.read_text(encoding="utf-8"))
    saved: AdapterRef = save_adapter(adapter, place, meta=meta)
    probe = read_record(place.probe, ReferenceOutputs)
    logits = adapter.logits_of_vectors(loaded.embed(loaded.tokenise(probe.texts)))
    place.probe.write_text(
        ReferenceOutputs.model_validate(probe.model_dump() | {"logits": logits.tolist()}).model_dump_json(),
        encoding="utf-8",
    )
    results = {path.parent.name: read_record(path, TaskResult) for path in folder.root.glob("*/result.json")}
    result = results[task]
    results[task] = of_adapter(result, result.adapter.model_copy(update={"sha256": saved.sha256}))
    rewrite_results(folder, list(results.values()))


def no_effect(adapter: Any) -> None:
    """Remove the effect of the pairs, as if only the head had been trained."""
    import torch

    with torch.no_grad():
        for lora in adapter.projections.values():
            lora.lora_B.zero_()


def another_head(adapter: Any) -> None:
    """A little of another training."""
    import torch

    with torch.no_grad():
        adapter.head[1].bias.add_(0.05)


def traces(root: Path, secret: str) -> list[str]:
    """Files that hold a secret, in whatever encoding of a log or a database leaves it readable."""
    return [str(path) for path in root.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


# --- the world of these tests ---


@dataclass(frozen=True)
class World:
    """Runs to publish, and what the Hub holds before and after."""

    base: Path
    """Run of Topics alone, which is already published."""
    both: Path
    pairs: Path
    encoder: Path
    old: dict[str, bytes]
    """Files after publishing ``base``."""
    new: dict[str, bytes]
    """Files after publishing ``both`` over it: Topics stays, Pairs is added."""


def make_world(run: Path, root: Path) -> World:
    """Make the world from a finished run."""
    base = copy_run(run, root / "runs" / "base", tasks=["Topics"]).root
    both = copy_run(run, root / "runs" / "both").root
    pairs = copy_run(run, root / "runs" / "pairs", tasks=["Pairs"]).root
    with hub_of_our_own(root) as place:
        place.publish(base)
        old = place.files()
        place.publish(both)
        new = place.files()
    encoder = Path(read_manifest(RunFolder(both)).config.encoder.name)
    return World(base, both, pairs, encoder, old, new)


def check_ends_well(place: Place, world: World, *, others: Sequence[str] = ()) -> None:
    """With the fault gone, the same publishing ends complete."""
    place.hub.clear_faults()
    place.hub.before_commit = None
    place.hub.requests = []
    place.publish(world.both)
    assert {path: content for path, content in place.files().items() if path not in others} == world.new
    check_settled(place.hub, BOTH, world.both, others=others)


def sent(hub: HubServer, *parts: str) -> list[tuple[str, str, int]]:
    """The requests whose method and path hold all of these."""
    return [request for request in hub.requests if all(part in f"{request[0]} {request[1]}" for part in parts)]


# --- what can go wrong, with the base published already ---


@dataclass(frozen=True)
class Outcome:
    """A row of the table."""

    fault: str
    ends: str
    main: str
    after: str = "complete"


@dataclass(frozen=True)
class Fault:
    """A fault of the Hub or of the way to it, and how publishing must end."""

    name: str
    plant: Callable[[Place, World], None]
    met: Callable[[Place], bool]
    """Whether it did go wrong."""
    ends: type[Exception] | None = None
    """The error that publishing ends with. None: it succeeds."""
    says: str = ""
    main: str = "new"
    others: tuple[str, ...] = ()
    mend: Callable[[Place, World], None] = lambda place, world: None


def suffer(place: Place, world: World, fault: Fault) -> Outcome:
    """Publish with a fault and without; fails if ``main`` is ever anything but old or new."""
    fault.plant(place, world)
    if fault.ends is None:
        place.publish(world.both)
        check_settled(place.hub, BOTH, world.both, others=fault.others)
    else:
        with pytest.raises(fault.ends, match=fault.says) as caught:
            place.publish(world.both)
        assert type(caught.value) is fault.ends
        assert "\n" not in str(caught.value)
    assert fault.met(place), "the fault has not been met"
    fault.mend(place, world)
    found = {path: content for path, content in place.files().items() if path not in fault.others}
    assert found == {"old": world.old, "new": world.new}[fault.main]
    commits = [commit.title for commit in huggingface_hub.HfApi().list_repo_commits(REPO)]
    assert len(commits) == len(set(commits)) or fault.others, "a commit is there twice"
    check_ends_well(place, world, others=fault.others)
    return Outcome(fault.name, fault.ends.__name__ if fault.ends else "well", fault.main)


def suffer_kill(place: Place, world: World, at: Callable[[int, tuple[str, str, int]], bool]) -> Outcome:
    """The same with a publisher that dies when a request has been dealt with."""
    place.hub.requests = trap = Trap(at, lambda: child.kill())
    child = place.publish_elsewhere(world.both)
    assert child.ended() is None
    assert trap.sprung
    place.hub.clear_faults()
    files = place.files()
    assert files in (world.old, world.new)
    check_ends_well(place, world)
    method, path, _ = trap[-1]
    return Outcome(
        f"kill -9 at request {len(trap)}: {method} {path[:60]}", "killed", "old" if files == world.old else "new"
    )


WHERE = {
    "the repository's state": ("GET", "/revision/main"),
    "making the branch": ("POST", "/branch/"),
    "dropping the branch": ("DELETE", "/branch/"),
    "the preupload": ("POST", "/preupload/"),
    "the large files' batch": ("POST", "/objects/batch"),
    "a large file": ("PUT", "/storage/"),
    "the staged commit": ("POST", f"/commit/{STAGING}"),
    "a listing": ("GET", "/tree/"),
    "a download": ("GET", "/resolve/"),
    "the commit to main": ("POST", "/commit/main"),
    "the tags": ("GET", "/refs"),
    "the tag": ("POST", "/tag/"),
}
"""Method and part of the path of the requests of a publishing."""
_ONLY_LARGE = ("the large files' batch", "a large file")
_MUST = ("making the branch", "the staged commit", "the commit to main", "the tag")
_AFTER_MAIN = ("the tags", "the tag")


def _passing(kind: int | str, where: str) -> Fault:
    method, path = WHERE[where]

    def plant(place: Place, _: World) -> None:
        if isinstance(kind, int):
            place.hub.fail(
                times=2, status=kind, method=method, path_contains=path, retry_after=7 if kind == 429 else None
            )
        else:
            place.hub.cut(method=method, path_contains=path, takes_effect=kind == "cut after")

    def met(place: Place) -> bool:
        struck = sent(place.hub, f"{method} ", path)
        in_time = kind != 429 or (
            bool(place.waits) and set(place.waits) <= {7, 8}
        )  # huggingface_hub waits a second more
        return in_time and any(status == (kind if isinstance(kind, int) else CUT) for *_, status in struck)

    return Fault(f"{kind} {'at ' if isinstance(kind, int) else ''}{where}", plant, met)


def _lasting(status: int, where: str) -> Fault:
    method, path = WHERE[where]

    def plant(place: Place, _: World) -> None:
        place.hub.fail(times=1000, status=status, method=method, path_contains=path)

    def met(place: Place) -> bool:
        return len(sent(place.hub, f"{method} ", path)) == (6 if status == 503 else 1)

    ends, main = (LorafleetError if status == 503 else InputError), ("new" if where in _AFTER_MAIN else "old")
    says = f"{'^main of ' if main == 'new' else '^'}hf:{REPO}.*{status}"
    return Fault(f"lasting {status} at {where}", plant, met, ends, says, main)


def _race(times: int) -> Fault:
    def plant(place: Place, _: World) -> None:
        def first(repo: str, branch: str) -> None:
            if branch == "main" and len(sent(place.hub, "/commit/main")) < times:
                place.hub.commit(repo, {"theirs.md": b"%d" % len(sent(place.hub, "/commit/main"))})

        place.hub.before_commit = first

    def met(place: Place) -> bool:
        assert place.hub.files(REPO)["theirs.md"] == b"%d" % (times - 1)
        return [status for *_, status in sent(place.hub, "/commit/main")] == ([412, 200] if times == 1 else [412, 412])

    ends = None if times == 1 else LorafleetError
    name = f"somebody else's commit first, {'once' if times == 1 else 'twice'}"
    return Fault(name, plant, met, ends, "was changed by others twice", "new" if times == 1 else "old", ("theirs.md",))


def _damage(name: str, path: str, change: Callable[[bytes], bytes] | None) -> Fault:
    """Damage in the Hub's storage, between the staged commit and its download."""

    def plant(place: Place, world: World) -> None:
        def strike() -> None:
            if change is None:
                place.hub.remove(REPO, path)
            else:
                place.hub.tamper(REPO, path, change(world.new[path]))

        place.hub.requests = Trap(lambda _, request: f"/commit/{STAGING}" in request[1], strike)

    def met(place: Place) -> bool:
        assert set(place.hub.branches(REPO)) == {"main"}
        return isinstance(place.hub.requests, Trap) and place.hub.requests.sprung

    def mend(place: Place, world: World) -> None:
        place.hub.tamper(REPO, path, world.new[path])

    says = f"^hf:{REPO} is unchanged: .*{path}"
    return Fault(name, plant, met, VerificationError, says, "old", mend=mend)


def flipped(content: bytes) -> bytes:
    """With another last bit."""
    return content[:-1] + bytes([content[-1] ^ 1])


def reordered(labels: bytes) -> bytes:
    """The same names in another order."""
    return json.dumps(json.loads(labels)[::-1], indent=1).encode()


_ALL = [
    *(_passing(kind, where) for where in WHERE for kind in (429, 500, 503, "cut before", "cut after")),
    *(
        _lasting(status, where)
        for where in ("making the branch", "the staged commit", "the commit to main", "the tag")
        for status in (503, 403)
    ),
    _race(1),
    _race(2),
    _damage("a flipped byte in a new file", "Pairs/adapter_model.safetensors", flipped),
    _damage("a flipped byte in a file that stays", "Topics/head.safetensors", flipped),
    _damage("a wrong label map", "Pairs/labels.json", reordered),
    _damage("a missing file", "Pairs/adapter_model.safetensors", None),
    _damage("a missing label map", "Pairs/labels.json", None),
]
FAULTS = {fault.name: fault for fault in _ALL}


def concerns(name: str, *, large: bool) -> bool:
    """Whether there is anything for a fault to strike."""
    return large or not name.endswith(_ONLY_LARGE)


# --- a run that is not what was measured ---


@dataclass(frozen=True)
class Harm:
    """A fault of the run itself."""

    name: str
    do: Callable[[RunFolder, Path, Path], None]
    """Called with the run, the encoder's folder, and one for what must not be written."""
    says: str


def suffer_harm(place: Place, world: World, harm: Harm, tmp_path: Path) -> Outcome:
    """Publish a copy of the run with something wrong in it, and then the run."""
    harmed = copy_run(world.both, tmp_path / "runs" / "both")
    harm.do(harmed, world.encoder, tmp_path)
    with pytest.raises(VerificationError, match=harm.says):
        place.publish(harmed.root)
    assert place.files() == world.old
    assert set(place.hub.branches(REPO)) == {"main"}
    check_ends_well(place, world)
    return Outcome(harm.name, "VerificationError", "old")


def swap_labels(folder: RunFolder, encoder: Path, tmp_path: Path) -> None:
    """Two names have changed places."""
    labels = json.loads(folder.task("Pairs").labels.read_text(encoding="utf-8"))
    folder.task("Pairs").labels.write_text(json.dumps(labels[::-1], indent=1), encoding="utf-8")


def zero(folder: RunFolder, encoder: Path, tmp_path: Path) -> None:
    """All files fit each other, but the adapter does nothing."""
    change_adapter(folder, "Pairs", encoder, no_effect)


def touch_weights(folder: RunFolder, encoder: Path, tmp_path: Path) -> None:
    """One byte."""
    with folder.task("Pairs").adapter_weights.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")


class _Bomb:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


def plant_pickle(folder: RunFolder, encoder: Path, tmp_path: Path) -> None:
    """Plant a file as torch.save writes it, with another pickle inside."""
    path = folder.task("Pairs").lora_adapter_pt
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, pickle.dumps(_Bomb(tmp_path / "touched")) if name.endswith("data.pkl") else content)


_HARMS = [
    Harm("labels swapped in the run", swap_labels, r"Pairs: labels\.json: label names"),
    Harm("an adapter without effect", zero, "Pairs: the reloaded adapter has no effect"),
    Harm("weights changed in the run", touch_weights, "Pairs: the adapter's files have sha256"),
    Harm("a pickle that acts", plant_pickle, r"Pairs.* fresh process: .*lora_adapter\.pt: missing or damaged"),
]
HARMS = {harm.name: harm for harm in _HARMS}
