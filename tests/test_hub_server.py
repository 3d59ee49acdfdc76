"""The tests' own Hub, through the full cycle of huggingface_hub's client."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from hub_server import CUT, USER, HubServer, go_online, serve_hub
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder
from huggingface_hub.utils import get_session

REPO = "someone/fleet"
FILES = {
    "README.md": b"---\nlicense: apache-2.0\n---\n# Fleet\n",
    "tasks/Topics/adapter/weights.safetensors": bytes(range(256)) * 40,
    "tasks/Topics/task.json": b"{}\n",
    "tasks/Pairs with space/task.json": "größer".encode(),
    "empty.txt": b"",
}
WEIGHTS = "tasks/Topics/adapter/weights.safetensors"
STAGING = "staging/2026-01-02_a"

Serve = Callable[..., HubServer]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    go_online(monkeypatch)
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(serve_hub(**options))


@pytest.fixture
def hub(serve: Serve) -> HubServer:
    """With an empty repository."""
    hub = serve()
    client(hub).create_repo(REPO)
    return hub


def client(hub: HubServer, *, token: str | bool | None = None) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token if token is None else token)


def upload(hub: HubServer, files: dict[str, bytes], branch: str = "main", parent: str | None = None) -> str:
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return (
        client(hub).create_commit(REPO, operations, commit_message="Upload", revision=branch, parent_commit=parent).oid
    )


def download(hub: HubServer, cache: Path, revision: str = "main") -> dict[str, bytes]:
    root = Path(
        snapshot_download(
            REPO, revision=revision, cache_dir=cache, endpoint=hub.endpoint, token=hub.token, max_workers=2
        )
    )
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lfs_from_bytes", [None, 5])
def test_what_the_client_uploads_it_lists_and_downloads(
    serve: Serve, tmp_path: Path, lfs_from_bytes: int | None
) -> None:
    hub = serve(lfs_from_bytes=lfs_from_bytes)
    api = client(hub)
    url = api.create_repo(REPO)
    assert (url, url.repo_id, api.whoami()["name"]) == (f"{hub.endpoint}/{REPO}", REPO, USER)
    first = hub.head(REPO)
    oid = upload(hub, FILES)
    assert oid == hub.head(REPO) == api.model_info(REPO).sha != first
    downloaded = download(hub, tmp_path)
    assert downloaded == hub.files(REPO)
    assert {path: downloaded[path] for path in FILES} == FILES
    assert set(downloaded) == {*FILES, ".gitattributes"} == set(api.list_repo_files(REPO))
    entries = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True, expand=True)}
    weights, folder = entries[WEIGHTS], entries["tasks/Topics/adapter"]
    assert isinstance(weights, RepoFile)
    assert isinstance(folder, RepoFolder)
    assert weights.size == len(FILES[WEIGHTS])
    assert weights.last_commit is not None
    assert weights.last_commit.oid == oid
    kept = {path.name for path in (tmp_path / "models--someone--fleet" / "blobs").iterdir()}
    sha256 = hashlib.sha256(FILES[WEIGHTS]).hexdigest()
    if lfs_from_bytes is None:
        assert weights.lfs is None
        assert weights.blob_id in kept
    else:
        assert weights.lfs is not None
        assert weights.lfs.sha256 == sha256
        assert sha256 in kept
        assert any(path.startswith("/storage/") for _, path, _ in hub.requests)
    siblings = {sibling.rfilename: sibling for sibling in api.model_info(REPO, files_metadata=True).siblings or []}
    assert siblings[WEIGHTS].blob_id == weights.blob_id
    assert [item.path for item in api.get_paths_info(REPO, [WEIGHTS, "missing"])] == [WEIGHTS]
    assert {entry.path for entry in api.list_repo_tree(REPO, "tasks/Topics")} == {
        "tasks/Topics/adapter",
        "tasks/Topics/task.json",
    }
    commits = api.list_repo_commits(REPO)
    assert [(commit.commit_id, commit.title) for commit in commits] == [(oid, "Upload"), (first, "initial commit")]
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


@pytest.mark.parametrize("lfs_from_bytes", [None, 5])
def test_the_client_does_not_send_what_has_not_changed(serve: Serve, lfs_from_bytes: int | None) -> None:
    hub = serve(lfs_from_bytes=lfs_from_bytes)
    client(hub).create_repo(REPO)
    oid = upload(hub, FILES)
    hub.requests.clear()
    assert upload(hub, FILES) == oid == hub.head(REPO)
    assert all("/commit/" not in path for _, path, _ in hub.requests)
    assert upload(hub, FILES | {"empty.txt": b"no more"}) != oid
    assert all(
        method != "PUT" for method, path, _ in hub.requests if path.endswith(hashlib.sha256(FILES[WEIGHTS]).hexdigest())
    )


@pytest.mark.parametrize("lfs_from_bytes", [None, 5])
def test_files_are_copied_and_deleted_on_their_own_and_by_folder(serve: Serve, lfs_from_bytes: int | None) -> None:
    hub = serve(lfs_from_bytes=lfs_from_bytes)
    api = client(hub)
    api.create_repo(REPO)
    upload(hub, FILES)
    operations = [
        CommitOperationCopy(WEIGHTS, "copy.safetensors"),
        CommitOperationDelete("empty.txt"),
        CommitOperationDelete("tasks/"),
    ]
    api.create_commit(REPO, operations, commit_message="Tidy")
    held = hub.files(REPO)
    assert set(held) == {".gitattributes", "README.md", "copy.safetensors"}
    assert held["copy.safetensors"] == FILES[WEIGHTS]
    with pytest.raises(EntryNotFoundError):
        api.delete_file("empty.txt", REPO)


def test_a_commit_on_an_old_parent_is_refused(hub: HubServer) -> None:
    old = hub.head(REPO)
    theirs = hub.commit(REPO, {"theirs.txt": b"first"})
    with pytest.raises(HfHubHTTPError) as caught:
        upload(hub, FILES, parent=old)
    assert caught.value.response.status_code == 412
    assert hub.head(REPO) == theirs
    assert upload(hub, FILES, parent=theirs) == hub.head(REPO)
    assert hub.files(REPO)["theirs.txt"] == b"first"


def test_branches_with_a_slash_work_everywhere(hub: HubServer, tmp_path: Path) -> None:
    api = client(hub)
    main = hub.head(REPO)
    api.create_branch(REPO, branch=STAGING)
    api.create_branch(REPO, branch=STAGING, exist_ok=True)
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_branch(REPO, branch=STAGING)
    assert caught.value.response.status_code == 409
    staged = upload(hub, FILES, STAGING, parent=main)
    assert hub.branches(REPO) == {"main": main, STAGING: staged}
    assert {ref.name: ref.target_commit for ref in api.list_repo_refs(REPO).branches} == hub.branches(REPO)
    assert api.model_info(REPO, revision=STAGING).sha == staged
    assert download(hub, tmp_path, STAGING) == hub.files(REPO, STAGING)
    assert WEIGHTS not in hub.files(REPO)
    path = hf_hub_download(
        REPO, WEIGHTS, revision=STAGING, cache_dir=tmp_path / "one", endpoint=hub.endpoint, token=hub.token
    )
    assert Path(path).read_bytes() == FILES[WEIGHTS]
    assert {entry.path for entry in api.list_repo_tree(REPO, "tasks/Topics", revision=STAGING)} >= {
        "tasks/Topics/task.json"
    }
    assert len(api.get_paths_info(REPO, [WEIGHTS, "tasks"], revision=STAGING)) == 2
    assert [commit.commit_id for commit in api.list_repo_commits(REPO, revision=STAGING)] == [staged, main]
    assert hub.head(REPO, STAGING) == staged
    api.create_branch(REPO, branch="from/there", revision=STAGING)
    api.delete_branch(REPO, branch=STAGING)
    assert hub.branches(REPO) == {"main": main, "from/there": staged}
    assert not api.revision_exists(REPO, STAGING)
    with pytest.raises(RevisionNotFoundError):
        upload(hub, FILES, STAGING)
    for branch in ("main", STAGING):
        with pytest.raises(HfHubHTTPError):
            api.delete_branch(REPO, branch=branch)


def test_tags_name_commits(hub: HubServer, tmp_path: Path) -> None:
    api = client(hub)
    oid = upload(hub, FILES)
    api.create_tag(REPO, tag="runs/a", revision=oid)
    api.create_tag(REPO, tag="runs/a", exist_ok=True)
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_tag(REPO, tag="runs/a")
    assert caught.value.response.status_code == 409
    hub.commit(REPO, dict.fromkeys(FILES))
    assert hub.tags(REPO) == {"runs/a": oid} == {ref.name: ref.target_commit for ref in api.list_repo_refs(REPO).tags}
    assert download(hub, tmp_path, "runs/a") == hub.files(REPO, oid) != hub.files(REPO)
    api.delete_tag(REPO, tag="runs/a")
    assert hub.tags(REPO) == {}
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(REPO, tag="b", revision="missing")


def test_a_part_of_a_file_can_be_read(hub: HubServer) -> None:
    upload(hub, FILES)
    url = f"{hub.endpoint}/{REPO}/resolve/main/{WEIGHTS}"
    whole = FILES[WEIGHTS]
    for asked, expected in (
        ("0-9", whole[:10]),
        ("10000-", whole[10000:]),
        ("-7", whole[-7:]),
        ("10200-99999", whole[10200:]),
    ):
        answer = get_session().get(url, headers={"Range": f"bytes={asked}"})
        assert (answer.status_code, answer.content) == (206, expected)
        assert answer.headers["Content-Range"].endswith(f"/{len(whole)}")
    assert get_session().get(url, headers={"Range": f"bytes={len(whole)}-"}).status_code == 416


def test_only_the_token_writes_and_reads_what_is_private(hub: HubServer, tmp_path: Path) -> None:
    anonymous, wrong = client(hub, token=False), client(hub, token="hf_wrong")
    assert anonymous.repo_exists(REPO)
    with pytest.raises(RepositoryNotFoundError):
        anonymous.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id=REPO)
    for act in (lambda: anonymous.create_repo("someone/new"), lambda: wrong.model_info(REPO), wrong.whoami):
        with pytest.raises(HfHubHTTPError) as caught:
            act()
        assert caught.value.response.status_code == 401
    client(hub).create_repo("someone/secret", private=True)
    assert client(hub).model_info("someone/secret").private
    assert not anonymous.repo_exists("someone/secret")
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("someone/secret", cache_dir=tmp_path, endpoint=hub.endpoint, token=False)
    with pytest.raises(RepositoryNotFoundError) as missing:
        client(hub).model_info("someone/missing")
    assert missing.value.response.status_code == 404
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "missing", cache_dir=tmp_path, endpoint=hub.endpoint, token=hub.token)


def test_a_repository_is_created_once(hub: HubServer) -> None:
    head = hub.head(REPO)
    assert client(hub).create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError) as caught:
        client(hub).create_repo(REPO)
    assert caught.value.response.status_code == 409
    assert hub.head(REPO) == head


@pytest.mark.parametrize("status", [429, 500])
def test_the_client_repeats_a_listing_that_failed_once(hub: HubServer, tmp_path: Path, status: int) -> None:
    hub.fail(status=status, path_contains="/tree/", retry_after=0)
    assert download(hub, tmp_path) == hub.files(REPO)
    assert [answered for _, path, answered in hub.requests if "/tree/" in path] == [status, 200]


def test_faults_strike_the_requests_they_are_meant_for(hub: HubServer) -> None:
    api = client(hub)
    hub.fail(times=2, status=503, method="GET", path_contains="/refs", after=1)
    hub.requests.clear()
    for _ in range(4):
        get_session().get(f"{hub.endpoint}/api/models/{REPO}/refs")
        api.model_info(REPO)
    assert [status for _, _, status in hub.requests] == [200, 200, 503, 200, 503, 200, 200, 200]
    hub.fail(times=100)
    hub.clear_faults()
    api.model_info(REPO)


def test_an_interrupted_commit_has_its_effect_or_not(hub: HubServer) -> None:
    api, head = client(hub), hub.head(REPO)
    operations = [CommitOperationAdd("a.txt", b"a")]
    hub.interrupt_at(2)  # the first request asks how to upload
    with pytest.raises(Exception, match="disconnected"):
        api.create_commit(REPO, operations, commit_message="Upload")
    assert hub.requests[-1] == ("POST", f"/api/models/{REPO}/commit/main", CUT)
    assert hub.head(REPO) == head
    hub.interrupt_after(1)  # the client remembers the first answer
    with pytest.raises(Exception, match="disconnected"):
        api.create_commit(REPO, operations, commit_message="Upload")
    assert hub.head(REPO) != head
    assert hub.files(REPO)["a.txt"] == b"a"


def test_the_client_repeats_a_cut_upload(serve: Serve) -> None:
    hub = serve(lfs_from_bytes=5)
    client(hub).create_repo(REPO)
    hub.cut(method="PUT", takes_effect=True)
    upload(hub, {WEIGHTS: FILES[WEIGHTS]})
    assert hub.files(REPO)[WEIGHTS] == FILES[WEIGHTS]
    assert [status for method, _, status in hub.requests if method == "PUT"] == [CUT, 200]


@pytest.mark.parametrize("lfs_from_bytes", [None, 5])
def test_a_flipped_byte_in_storage_reaches_the_reader_under_the_old_hash(
    serve: Serve, tmp_path: Path, lfs_from_bytes: int | None
) -> None:
    hub = serve(lfs_from_bytes=lfs_from_bytes)
    api = client(hub)
    api.create_repo(REPO)
    upload(hub, FILES)
    before = api.get_paths_info(REPO, WEIGHTS)[0]
    flipped = b"\xff" + FILES[WEIGHTS][1:]
    hub.tamper(REPO, WEIGHTS, flipped, keep_hash=False)
    assert api.get_paths_info(REPO, WEIGHTS)[0] != before
    upload(hub, FILES)
    assert hub.files(REPO)[WEIGHTS] == FILES[WEIGHTS]
    api.create_branch(REPO, branch=STAGING)
    hub.tamper(REPO, WEIGHTS, flipped)
    assert api.get_paths_info(REPO, WEIGHTS)[0].blob_id == before.blob_id
    assert download(hub, tmp_path)[WEIGHTS] == hub.files(REPO, STAGING)[WEIGHTS] == flipped
    assert upload(hub, FILES) == hub.head(REPO, STAGING), "the client sees the old hash"
    hub.remove(REPO, WEIGHTS)
    assert WEIGHTS in api.list_repo_files(REPO)
    assert WEIGHTS not in hub.files(REPO)
    with pytest.raises(EntryNotFoundError):
        download(hub, tmp_path / "fresh")


def test_the_hook_lets_somebody_else_be_first(hub: HubServer) -> None:
    def race(repo: str, branch: str) -> None:
        # The client's request must not hold the lock that this commit from another thread needs.
        thread = threading.Thread(target=hub.commit, args=(repo, {"theirs.txt": b""}, branch))
        thread.start()
        thread.join(10)

    hub.before_commit = race
    with pytest.raises(HfHubHTTPError) as caught:
        upload(hub, FILES, parent=hub.head(REPO))
    assert caught.value.response.status_code == 412
    assert set(hub.files(REPO)) == {".gitattributes", "theirs.txt"}


def test_no_commit_of_several_clients_is_lost(hub: HubServer) -> None:
    names = [f"{index}.txt" for index in range(8)]
    with ThreadPoolExecutor(len(names)) as threads:
        list(threads.map(lambda name: upload(hub, {name: name.encode()}), names))
    assert set(hub.files(REPO)) == {".gitattributes", *names}
    assert len(client(hub).list_repo_commits(REPO)) == 1 + len(names)


def test_a_child_process_needs_only_its_environment(hub: HubServer, tmp_path: Path) -> None:
    upload(hub, FILES)
    script = f"import huggingface_hub, json; print(json.dumps(huggingface_hub.list_repo_files({REPO!r})))"
    ended = subprocess.run(
        [sys.executable, "-c", script], env=hub.environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert set(json.loads(ended.stdout)) == set(hub.files(REPO))


def test_a_server_that_is_gone_leaves_only_what_was_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    go_online(monkeypatch)
    with serve_hub() as hub:
        client(hub).create_repo(REPO)
        before = download(hub, tmp_path)
    assert download(hub, tmp_path) == before
    with pytest.raises(LocalEntryNotFoundError):
        download(hub, tmp_path / "fresh")
