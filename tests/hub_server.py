"""An in-memory Hugging Face Hub for huggingface_hub's own client over HTTP. Tests break it on demand.

The client reads its switches when it is imported. So a child process needs ``HubServer.environment``, and this process
needs ``go_online(monkeypatch)``, because conftest.py sets HF_HUB_OFFLINE.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

import huggingface_hub.constants
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

USER = "tester"
"""Whose token it is."""
CUT = 0
"""The status of a request without an answer, in ``HubServer.requests``."""
_GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_MODEL = "/api/models/{owner}/{name}"


@dataclass(frozen=True)
class Blob:
    """A file of a tree."""

    etag: str  # what the client compares and keeps it under: git's sha1, or the sha256 of a large file
    oid: str  # git's sha1, of the pointer if it is a large file
    size: int
    lfs: bool

    @staticmethod
    def of(content: bytes, lfs: bool) -> Blob:
        if not lfs:
            return Blob(_git_sha1(content), _git_sha1(content), len(content), lfs=False)
        sha256 = hashlib.sha256(content).hexdigest()
        return Blob(sha256, _git_sha1(_pointer(sha256, len(content))), len(content), lfs=True)

    def lfs_info(self, hash_key: str) -> dict[str, Any]:
        """Further facts that the Hub gives of a large file. It has several names for the hash."""
        if not self.lfs:
            return {}
        return {"lfs": {hash_key: self.etag, "size": self.size, "pointerSize": len(_pointer(self.etag, self.size))}}


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str
    parent: str | None
    tree: dict[str, Blob]
    title: str
    message: str
    date: str


@dataclass
class Repo:
    """A model repository: commits, what names them, and the files' contents."""

    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # etag -> content as it was uploaded
    damage: dict[tuple[str, str], bytes | None] = field(
        default_factory=dict
    )  # (path, etag) -> what is served in its place

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a commit's hash names."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise _problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def add(self, path: str, content: bytes, lfs: bool) -> Blob:
        """Store an uploaded file, which mends what was damaged."""
        blob = Blob.of(content, lfs)
        self.objects[blob.etag] = content
        self.damage.pop((path, blob.etag), None)
        return blob

    def served(self, path: str, blob: Blob) -> bytes | None:
        """Bytes that a download gets."""
        return self.damage.get((path, blob.etag), self.objects[blob.etag])

    def lacks(self, sha256: str) -> bool:
        """Whether the content of a large file has yet to be uploaded."""
        return sha256 not in self.objects or any(
            etag == sha256 and content is None for (_, etag), content in self.damage.items()
        )

    def history(self, commit: Commit) -> Iterator[Commit]:
        """The commit and its ancestors."""
        yield commit
        while commit.parent is not None:
            commit = self.commits[commit.parent]
            yield commit

    def move(self, branch: str, tree: dict[str, Blob], title: str, message: str = "") -> Commit:
        """Commit ``tree`` on top of a branch."""
        parent = self.branches.get(branch)
        identity = json.dumps(
            [len(self.commits), parent, title, message, sorted((path, blob.oid) for path, blob in tree.items())]
        )
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commit = Commit(hashlib.sha1(identity.encode()).hexdigest(), parent, tree, title, message, date)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def items(self, commit: Commit, expand: bool) -> dict[str, dict[str, Any]]:
        """Path -> the Hub's description of it, for all files and folders."""
        found: dict[str, dict[str, Any]] = {}
        for path, blob in sorted(commit.tree.items()):
            for folder in (str(parent) for parent in PurePosixPath(path).parents if parent.name):
                found[folder] = {"type": "directory", "path": folder, "oid": _git_sha1(folder.encode()), "size": 0}
            found[path] = {"type": "file", "path": path, "oid": blob.oid, "size": blob.size} | blob.lfs_info("oid")
            if expand:
                last = self._last_change(commit, path)
                found[path]["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
        return found

    def _last_change(self, commit: Commit, path: str) -> Commit:
        *_, last = takewhile(lambda ancestor: ancestor.tree.get(path) == commit.tree[path], self.history(commit))
        return last


@dataclass
class _Fault:
    status: int | None  # None: the connection is cut
    times: int
    after: int
    method: str | None
    path_contains: str | None
    retry_after: int | None = None
    takes_effect: bool = False

    def concerns(self, method: str, path: str) -> bool:
        return self.method in (None, method) and (self.path_contains or "") in path


class _Connection(H11Protocol):
    """Hands its transport to the application, which ASGI would otherwise not let hang up."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


class HubServer:
    """A test's handle on its Hub. A repository is named ``owner/name``. Every method may be called from any thread.

    Attributes:
        endpoint: ``http://127.0.0.1:port``.
        token: The one valid token; it may write to every repository.
        requests: (method, unquoted path, status) of each handled request, in order; ``CUT`` if unanswered.
        before_commit: Called with repository and branch before each commit over HTTP, without the lock held.
    """

    def __init__(self, endpoint: str, token: str, lfs_from_bytes: int | None) -> None:
        self.endpoint = endpoint
        self.token = token
        self.requests: list[tuple[str, str, int]] = []
        self.before_commit: Callable[[str, str], None] | None = None
        self._lfs_from_bytes = lfs_from_bytes
        self._repos: dict[str, Repo] = {}
        self._faults: list[_Fault] = []
        self._lock = threading.RLock()
        self._routes = Starlette(
            routes=[Route(path, self._locked(handler), methods=[method]) for method, path, handler in self._table()],
            exception_handlers={HTTPException: _answer_problem},
        )

    @property
    def environment(self) -> dict[str, str]:
        """Environment that a child process needs in addition to its own HF_HOME."""
        online = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return online | {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token}

    # Looking, and acting behind the client's back

    def head(self, repo: str, branch: str = "main") -> str:
        with self._lock:
            return self._repos[repo].branches[branch]

    def branches(self, repo: str) -> dict[str, str]:
        """Name -> commit."""
        with self._lock:
            return dict(self._repos[repo].branches)

    def tags(self, repo: str) -> dict[str, str]:
        """Name -> commit."""
        with self._lock:
            return dict(self._repos[repo].tags)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content, of all that can be downloaded."""
        with self._lock:
            held = self._repos[repo]
            served = {path: held.served(path, blob) for path, blob in held.at(revision).tree.items()}
        return {path: content for path, content in served.items() if content is not None}

    def commit(self, repo: str, files: dict[str, bytes | None], branch: str = "main") -> str:
        """Somebody else's commit, None deletes a file; returns its hash."""
        with self._lock:
            held = self._repos[repo]
            tree = dict(held.at(branch).tree)
            for path, content in files.items():
                if content is None:
                    del tree[path]
                else:
                    tree[path] = held.add(path, content, self._is_large(len(content)))
            return held.move(branch, tree, "Somebody else's commit").oid

    def tamper(self, repo: str, path: str, content: bytes, *, keep_hash: bool = True) -> None:
        """Change a file at every revision that has it, without a commit; ``keep_hash`` keeps the listed hashes.

        Uploading the file's bytes again mends it, but the client sends them only if it sees another hash.
        """
        with self._lock:
            held = self._repos[repo]
            for commit, blob in self._everywhere(held, path):
                if keep_hash:
                    held.damage[path, blob.etag] = content
                else:
                    commit.tree[path] = held.add(path, content, blob.lfs)

    def remove(self, repo: str, path: str) -> None:
        """Lose the content of a file that every listing goes on to name; a large file is then asked for again."""
        with self._lock:
            held = self._repos[repo]
            for _, blob in self._everywhere(held, path):
                held.damage[path, blob.etag] = None

    @staticmethod
    def _everywhere(repo: Repo, path: str) -> list[tuple[Commit, Blob]]:
        found = [(commit, commit.tree[path]) for commit in repo.commits.values() if path in commit.tree]
        if not found:
            raise KeyError(f"{repo.id} has no {path}")
        return found

    # Faults on demand: requests are counted from the call, those that match

    def fail(
        self,
        *,
        times: int = 1,
        status: int = 500,
        method: str | None = None,
        path_contains: str | None = None,
        after: int = 0,
        retry_after: int | None = None,
    ) -> None:
        """Answer with ``status``, without effect, ``times`` requests that come after the next ``after``."""
        self._faults.append(_Fault(status, times, after, method, path_contains, retry_after))

    def cut(
        self,
        *,
        times: int = 1,
        method: str | None = None,
        path_contains: str | None = None,
        after: int = 0,
        takes_effect: bool = False,
    ) -> None:
        """Close the connection of ``times`` requests that come after the next ``after``, instead of an answer."""
        self._faults.append(_Fault(None, times, after, method, path_contains, takes_effect=takes_effect))

    def interrupt_at(self, n: int) -> None:
        """Cut the n-th request from now before it has any effect."""
        self.cut(after=n - 1)

    def interrupt_after(self, n: int) -> None:
        """Cut the n-th request from now when it has had its effect, before its answer."""
        self.cut(after=n - 1, takes_effect=True)

    def clear_faults(self) -> None:
        """Forget the faults that are still to come."""
        self._faults = []

    def _due(self, method: str, path: str) -> _Fault | None:
        with self._lock:
            concerned = [fault for fault in self._faults if fault.concerns(method, path)]
            due = next((fault for fault in concerned if fault.after <= 0 and fault.times), None)
            for fault in concerned:  # also one that has to wait for another to be over
                fault.after -= 1
            if due is not None:
                due.times -= 1
            return due

    # HTTP

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        # The whole body is read first: with bytes left unread, hanging up would reset the connection.
        try:
            scope["state"]["body"] = await Request(scope, receive).body()
        except ClientDisconnect:
            return  # the client has died in the middle of its request
        fault = self._due(method, path)
        app: ASGIApp = self._routes
        if fault is not None and not fault.takes_effect:
            headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            app = JSONResponse({"error": "A fault on demand"}, fault.status or CUT, headers)
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        # Routes see the path as it was sent: in a revision, a quoted slash is not one between two parts of the path.
        await app({**scope, "path": scope["raw_path"].decode()}, receive, keep)
        if fault is not None and fault.status is None:
            self.requests.append((method, path, CUT))
            scope["state"]["transport"].close()
            while (await receive())["type"] != "http.disconnect":
                pass
        else:
            self.requests.append((method, path, answer[0]["status"]))
            for message in answer:
                await send(message)

    def _table(self) -> list[tuple[str, str, Callable[[Request], Response]]]:
        return [
            ("GET", "/api/whoami-v2", self._whoami),
            ("POST", "/api/validate-yaml", self._validate_yaml),
            ("POST", "/api/repos/create", self._create_repo),
            ("DELETE", "/api/repos/delete", self._delete_repo),
            ("GET", _MODEL, self._info),
            ("GET", _MODEL + "/revision/{revision}", self._info),
            ("GET", _MODEL + "/refs", self._refs),
            ("GET", _MODEL + "/tree/{revision}", self._tree),
            ("GET", _MODEL + "/tree/{revision}/{folder}", self._tree),
            ("POST", _MODEL + "/paths-info/{revision}", self._paths_info),
            ("GET", _MODEL + "/commits/{revision}", self._commits),
            ("POST", _MODEL + "/branch/{branch}", self._create_branch),
            ("DELETE", _MODEL + "/branch/{branch}", self._delete_branch),
            ("POST", _MODEL + "/tag/{revision}", self._create_tag),
            ("DELETE", _MODEL + "/tag/{tag}", self._delete_tag),
            ("POST", _MODEL + "/preupload/{revision}", self._preupload),
            ("POST", _MODEL + "/commit/{revision}", self._commit),
            ("POST", "/{owner}/{name}.git/info/lfs/objects/batch", self._lfs_batch),
            ("PUT", "/storage/{owner}/{name}/{sha256}", self._lfs_upload),
            ("GET", "/{owner}/{name}/resolve/{revision}/{path:path}", self._resolve),
        ]

    def _locked(self, handler: Callable[[Request], Response]) -> Callable[[Request], Response]:
        def endpoint(request: Request) -> Response:
            if handler == self._commit and self.before_commit is not None:
                self.before_commit(_repo_id(request), _part(request, "revision"))
            with self._lock:
                return handler(request)

        return endpoint

    def _knows(self, request: Request) -> bool:
        """Whether the request has the token."""
        given = request.headers.get("Authorization")
        if given not in (None, f"Bearer {self.token}"):
            raise _problem(401, "Invalid credentials in Authorization header")
        return given is not None

    def _require_token(self, request: Request) -> None:
        if not self._knows(request):
            raise _problem(401, "Invalid username or password.")

    def _repo(self, request: Request, *, write: bool = False) -> Repo:
        known, repo = self._knows(request), self._repos.get(_repo_id(request))
        if repo is None or (not known and (write or repo.private)):
            raise _problem(404 if known else 401, "Repository not found", "RepoNotFound")
        return repo

    def _is_large(self, size: int) -> bool:
        return self._lfs_from_bytes is not None and size >= max(1, self._lfs_from_bytes)

    def _whoami(self, request: Request) -> Response:
        self._require_token(request)
        access = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        return JSONResponse({"type": "user", "name": USER, "orgs": [], "auth": access})

    def _validate_yaml(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    def _create_repo(self, request: Request) -> Response:
        self._require_token(request)
        given = _json(request)
        repo = Repo(_given_repo_id(given), private=given.get("visibility") == "private")
        answer = {"name": repo.id, "url": f"{self.endpoint}/{repo.id}"}
        if repo.id in self._repos:
            return JSONResponse(answer | {"error": "You already created this model repo"}, 409)
        repo.move("main", {".gitattributes": repo.add(".gitattributes", _GITATTRIBUTES, lfs=False)}, "initial commit")
        self._repos[repo.id] = repo
        return JSONResponse(answer)

    def _delete_repo(self, request: Request) -> Response:
        self._require_token(request)
        if self._repos.pop(_given_repo_id(_json(request)), None) is None:
            raise _problem(404, "Repository not found", "RepoNotFound")
        return JSONResponse({})

    def _info(self, request: Request) -> Response:
        repo = self._repo(request)
        commit = repo.at(_part(request, "revision", "main"))
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(commit.tree.items()):
            known = (
                {"blobId": blob.oid, "size": blob.size} | blob.lfs_info("sha256") if _switch(request, "blobs") else {}
            )
            siblings.append({"rfilename": path} | known)
        names = {
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.partition("/")[0],
            "private": repo.private,
            "tags": [],
        }
        return JSONResponse(names | {"sha": commit.oid, "lastModified": commit.date, "siblings": siblings})

    def _refs(self, request: Request) -> Response:
        repo = self._repo(request)

        def listed(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        return JSONResponse(
            {"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []}
        )

    def _tree(self, request: Request) -> Response:
        repo, folder = self._repo(request), _part(request, "folder", "")
        prefix = f"{folder}/" if folder else ""
        items = repo.items(repo.at(_part(request, "revision")), _switch(request, "expand"))
        below = {path.removeprefix(prefix): item for path, item in items.items() if path.startswith(prefix)}
        if folder and not below:
            raise _problem(404, f"{folder} does not exist", "EntryNotFound")
        return JSONResponse([item for path, item in below.items() if "/" not in path or _switch(request, "recursive")])

    def _paths_info(self, request: Request) -> Response:
        repo, given = self._repo(request), parse_qs(request.state.body.decode())
        items = repo.items(repo.at(_part(request, "revision")), given.get("expand") == ["true"])
        return JSONResponse([items[path] for path in given.get("paths", []) if path in items])

    def _commits(self, request: Request) -> Response:
        repo = self._repo(request)
        return JSONResponse(
            [
                {
                    "id": commit.oid,
                    "title": commit.title,
                    "message": commit.message,
                    "date": commit.date,
                    "authors": [{"user": USER}],
                }
                for commit in repo.history(repo.at(_part(request, "revision")))
            ]
        )

    def _create_branch(self, request: Request) -> Response:
        repo, branch = self._repo(request, write=True), _part(request, "branch")
        start = repo.at(_json(request).get("startingPoint", "main"))
        return self._create_ref(repo.branches, branch, start)

    def _create_tag(self, request: Request) -> Response:
        repo = self._repo(request, write=True)
        return self._create_ref(repo.tags, _json(request)["tag"], repo.at(_part(request, "revision")))

    def _delete_branch(self, request: Request) -> Response:
        repo, branch = self._repo(request, write=True), _part(request, "branch")
        if branch == "main":
            raise _problem(403, "Cannot delete refs/heads/main")
        return self._delete_ref(repo.branches, branch)

    def _delete_tag(self, request: Request) -> Response:
        return self._delete_ref(self._repo(request, write=True).tags, _part(request, "tag"))

    @staticmethod
    def _create_ref(refs: dict[str, str], name: str, commit: Commit) -> Response:
        if name in refs:
            raise _problem(409, f"Reference already exists: {name}")
        refs[name] = commit.oid
        return JSONResponse({})

    @staticmethod
    def _delete_ref(refs: dict[str, str], name: str) -> Response:
        if refs.pop(name, None) is None:
            raise _problem(404, f"Reference does not exist: {name}")
        return JSONResponse({})

    def _preupload(self, request: Request) -> Response:
        repo = self._repo(request, write=True)
        tree = repo.at(_part(request, "revision")).tree
        answers = []
        for file in _json(request)["files"]:
            answer = {
                "path": file["path"],
                "uploadMode": "lfs" if self._is_large(file["size"]) else "regular",
                "shouldIgnore": False,
            }
            answers.append(answer | ({"oid": tree[file["path"]].etag} if file["path"] in tree else {}))
        return JSONResponse({"files": answers})

    def _commit(self, request: Request) -> Response:
        repo, branch = self._repo(request, write=True), _part(request, "revision")
        if branch not in repo.branches:
            raise _problem(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        (_, header), *changes = (
            (line["key"], line["value"]) for line in map(json.loads, request.state.body.splitlines())
        )
        if header.get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
            raise _problem(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.at(branch).tree)
        for key, value in changes:
            path = value["path"]
            if key == "file":
                tree[path] = repo.add(path, b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if repo.lacks(value["oid"]):
                    raise _problem(400, f"LFS pointer pointed to a file that does not exist: {path}")
                tree[path] = Blob.of(repo.objects[value["oid"]], lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                gone = [
                    held
                    for held in tree
                    if held == path or (key == "deletedFolder" and held.startswith(path.rstrip("/") + "/"))
                ]
                if not gone:
                    raise _problem(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for held in gone:
                    del tree[held]
            else:
                raise _problem(400, f"Unknown operation: {key}")
        oid = repo.move(branch, tree, header["summary"], header["description"]).oid
        return JSONResponse(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.endpoint}/{repo.id}/commit/{oid}",
                "hookOutput": "",
            }
        )

    def _lfs_batch(self, request: Request) -> Response:
        repo = self._repo(request, write=True)
        objects = _json(request)["objects"]
        for wanted in objects:
            if repo.lacks(wanted["oid"]):
                wanted["actions"] = {"upload": {"href": f"{self.endpoint}/storage/{repo.id}/{wanted['oid']}"}}
        return JSONResponse({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, request: Request) -> Response:
        # Without a token, as the client sends none: on the real Hub the address is signed.
        repo, sha256, content = self._repos[_repo_id(request)], _part(request, "sha256"), request.state.body
        if hashlib.sha256(content).hexdigest() != sha256:
            raise _problem(400, "The content is not what its address says")
        repo.objects[sha256] = content
        repo.damage = {(path, etag): damaged for (path, etag), damaged in repo.damage.items() if etag != sha256}
        return Response()

    def _resolve(self, request: Request) -> Response:
        repo, path = self._repo(request), _part(request, "path")
        commit = repo.at(_part(request, "revision"))
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.tree.get(path)
        content = None if blob is None else repo.served(path, blob)
        if blob is None or content is None:
            raise _problem(404, "Entry not found", "EntryNotFound", headers)
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if wanted is None or not any(wanted.groups()):
            return Response(content, 200, headers)
        # "bytes=-5" asks for the last five.
        first = int(wanted[1]) if wanted[1] else max(0, len(content) - int(wanted[2]))
        end = min(int(wanted[2]) + 1, len(content)) if wanted[1] and wanted[2] else len(content)
        if first >= end:
            raise _problem(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
        return Response(content[first:end], 206, headers | {"Content-Range": f"bytes {first}-{end - 1}/{len(content)}"})


@contextmanager
def serve_hub(*, token: str = "hf_test", lfs_from_bytes: int | None = None) -> Iterator[HubServer]:
    """Serve an empty Hub on a free port. Files of ``lfs_from_bytes`` and more are large files; None: there are none."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # connections wait in it until the server accepts them
        # asyncio does this for its own sockets only, and without it each answer takes 40 ms longer.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hub = HubServer(f"http://127.0.0.1:{listener.getsockname()[1]}", token, lfs_from_bytes)
        # If the server closed idle connections, some requests would fail, and the client does not repeat them.
        config = uvicorn.Config(
            hub,
            http=_Connection,
            lifespan="off",
            log_level="error",
            timeout_keep_alive=600,
            timeout_graceful_shutdown=2,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.should_exit = True
            thread.join(10)


def go_online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub reach a server from this process, for one test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _problem(
    status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
) -> HTTPException:
    """The Hub's refusal, for a handler to raise; the client chooses its exception by ``code``."""
    codes = {} if code is None else {"X-Error-Code": code}
    return HTTPException(status, message, {"X-Error-Message": message} | codes | (headers or {}))


def _answer_problem(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    return JSONResponse({"error": problem.detail}, problem.status_code, problem.headers)


def _part(request: Request, name: str, default: str = "") -> str:
    return unquote(request.path_params.get(name, default))


def _repo_id(request: Request) -> str:
    return f"{_part(request, 'owner')}/{_part(request, 'name')}"


def _given_repo_id(given: dict[str, Any]) -> str:
    return f"{given['organization'] or USER}/{given['name']}"


def _json(request: Request) -> dict[str, Any]:
    given: dict[str, Any] = json.loads(request.state.body or b"{}")
    return given


def _switch(request: Request, name: str) -> bool:
    return request.query_params.get(name) == "true"
