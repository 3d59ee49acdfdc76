"""Publishing to the Hub: all of a run or nothing, once, by one verified commit."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commands import FinishedRun
from commands import run as run_command
from hub_server import CUT
from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from publishing import (
    BOTH,
    FAULTS,
    HARMS,
    LARGE,
    NO_GATE,
    REPO,
    SECRET,
    TO,
    Place,
    World,
    another_head,
    change_adapter,
    check_complete,
    check_ends_well,
    check_settled,
    copy_run,
    hub_of_our_own,
    make_world,
    plant_pickle,
    published_part,
    sent,
    suffer,
    suffer_harm,
    suffer_kill,
    traces,
)

from flows.cli import main
from pipeline.config import PublishConfig, load_config
from pipeline.encoder.runtime import choose_runtime
from pipeline.errors import AdapterError, InputError, LockedError, VerificationError
from pipeline.publishing.publish import publish, rollback
from pipeline.run.preflight import preflight
from pipeline.store.lock import hold_run
from pipeline.store.manifest import read_manifest
from pipeline.store.run_folder import RunFolder

ROOT_FILES = {
    "README.md",
    "classification_results.json",
    "results.json",
    "report.html",
    "publication.json",
    "metrics/scores.parquet",
    "metrics/values.parquet",
    "metrics/epochs.parquet",
}


@pytest.fixture(scope="module")
def world(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(finished_run.root, tmp_path_factory.mktemp("publish"))


@pytest.fixture(params=[pytest.param(False, id="regular", marks=pytest.mark.faults), pytest.param(True, id="lfs")])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A Hub without a repository."""
    with hub_of_our_own(tmp_path, large=request.param) as place:
        yield place


@pytest.fixture
def place(empty: Place, world: World) -> Place:
    """A Hub on which the base is published."""
    empty.lay_down(world.old)
    return empty


@pytest.fixture
def one(world: World, tmp_path: Path) -> Iterator[Place]:
    """The same with large files only, for what does not depend on that."""
    with hub_of_our_own(tmp_path, large=True) as place:
        place.lay_down(world.old)
        yield place


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# --- what is published ---


def test_a_run_that_is_published_when_it_is_finished_names_the_repository_as_it_was_given(
    finished_run: FinishedRun,
) -> None:
    config = load_config(str(finished_run.config), overrides=(f"publish.to={TO}",))
    assert preflight(config, choose_runtime(config.train, threads=1, use_gpu=False)).config.publish.to == TO


def test_an_empty_repository_gets_the_whole_run_in_one_commit(empty: Place, world: World) -> None:
    hub = empty.hub
    published = empty.publish(world.both, PublishConfig(private=True))
    assert published.revision == hub.head(REPO)
    assert {adapter.name for adapter in published.verified} == BOTH
    publication = check_settled(hub, BOTH, world.both)
    files = published_part(hub.files(REPO))
    of_task = {
        path.name
        for path in (*RunFolder(world.both).task("Topics").published(), RunFolder(world.both).task("Topics").result)
    }
    layout = {path for path in files if not path.startswith("mteb_results/")}
    assert layout == ROOT_FILES | {f"{task}/{name}" for task in BOTH for name in of_task}
    assert len(files) == published.num_files == len(publication.files) + 1
    for task in BOTH:
        for path in RunFolder(world.both).task(task).published():
            assert files[f"{task}/{path.name}"] == path.read_bytes()
    tree = {entry.path: entry for entry in HfApi().list_repo_tree(REPO, recursive=True) if isinstance(entry, RepoFile)}
    for path, content in files.items():
        lfs = tree[path].lfs
        if lfs is None:
            assert tree[path].blob_id == git_sha1(content)
        else:
            assert lfs.sha256 == hashlib.sha256(content).hexdigest()
            assert len(content) >= LARGE
    assert HfApi().model_info(REPO).private
    assert len(HfApi().list_repo_commits(REPO)) == 2, "the Hub's own and ours"
    assert hub.tags(REPO) == {"run-both": hub.head(REPO)}


def test_publishing_again_changes_nothing_and_sends_no_commit(place: Place, world: World) -> None:
    RunFolder(world.both).gate.unlink(missing_ok=True)  # other tests publish this run too
    first = place.publish(world.both)
    state = place.hub.head(REPO), place.hub.tags(REPO), place.hub.branches(REPO)
    place.hub.requests = []
    again = place.publish(world.both)
    assert (place.hub.head(REPO), place.hub.tags(REPO), place.hub.branches(REPO)) == state
    assert sent(place.hub, "/commit/") == sent(place.hub, "PUT ") == []
    assert (again.revision, again.num_files, again.verified) == (first.revision, first.num_files, ())
    assert [decision.decision for decision in again.decisions] == ["keep", "keep"]
    gate = pq.read_table(RunFolder(world.both).gate).to_pylist()
    recorded = {row["mteb_task"]: row["decision"] for row in gate}
    assert recorded == {decision.mteb_task: decision.decision for decision in first.decisions}
    assert recorded["Pairs"] == "promote", "the decision that published it"


def test_only_changed_files_travel(one: Place, world: World) -> None:
    one.publish(world.both)
    put = {path.rpartition("/")[2] for _, path, _ in sent(one.hub, "PUT ")}
    changed = {path for path, content in world.new.items() if world.old.get(path) != content}
    expected = {hashlib.sha256(world.new[path]).hexdigest() for path in changed if len(world.new[path]) >= LARGE}
    unchanged = {
        hashlib.sha256(world.old[path]).hexdigest()
        for path in set(world.new) - changed
        if len(world.old[path]) >= LARGE
    }
    assert put == expected
    assert unchanged
    assert len(sent(one.hub, "PUT ")) == len(put), "and each of them once, though there are two commits"


@pytest.mark.faults
def test_a_new_adapter_takes_the_place_of_the_published_one(one: Place, world: World, tmp_path: Path) -> None:
    changed = copy_run(world.base, tmp_path / "runs" / "changed", tasks=["Topics"])
    change_adapter(changed, "Topics", world.encoder, another_head)
    one.publish(changed.root, NO_GATE)
    check_settled(one.hub, {"Topics"}, changed.root)
    assert (
        one.files()["Topics/head.safetensors"]
        == changed.task("Topics").head.read_bytes()
        != world.old["Topics/head.safetensors"]
    )


@pytest.mark.faults
def test_what_others_put_into_the_repository_stays(one: Place, world: World) -> None:
    one.hub.commit(REPO, {"notes.md": b"ours"})
    one.publish(world.both)
    check_settled(one.hub, BOTH, world.both, others=["notes.md"])
    assert one.hub.files(REPO)["notes.md"] == b"ours"


@pytest.mark.faults
def test_a_tag_stays_with_the_state_that_was_verified(one: Place, world: World) -> None:
    one.publish(world.both)
    verified = one.hub.head(REPO)
    one.hub.commit(REPO, {"README.md": b"rewritten by hand"})
    one.publish(world.both)
    assert one.hub.tags(REPO)["run-both"] == verified


def test_a_repository_of_somebody_else_is_left_alone(empty: Place, world: World) -> None:
    empty.lay_down({"model.safetensors": b"theirs"})
    head = empty.hub.head(REPO)
    with pytest.raises(InputError, match=r"it holds model\.safetensors but no publication\.json"):
        empty.publish(world.both)
    assert (empty.hub.head(REPO), empty.hub.branches(REPO)) == (head, {"main": head})


@pytest.mark.faults
def test_what_somebody_deleted_is_not_deleted_again(one: Place, world: World, tmp_path: Path) -> None:
    changed = copy_run(world.base, tmp_path / "runs" / "changed", tasks=["Topics"])
    change_adapter(changed, "Topics", world.encoder, another_head)
    gone = [path for path in world.old if path.startswith("mteb_results/results/lorafleet__")]
    one.hub.commit(REPO, {gone[0]: None})
    one.publish(changed.root, NO_GATE)
    check_settled(one.hub, {"Topics"}, changed.root)
    assert not set(gone) & set(one.files()), "the old adapter's few-shot results are filed under its hash"


# --- faults; all of them are in test_publish_faults.py ---


QUICK_HARMS = ["a pickle that acts", "weights changed in the run"]
QUICK = ["cut after the commit to main", "a flipped byte in a new file"]


@pytest.mark.parametrize("name", QUICK)
def test_main_is_old_or_new_and_the_next_start_ends_it(one: Place, world: World, name: str) -> None:
    suffer(one, world, FAULTS[name])


# --- faults of the run ---


@pytest.mark.faults
@pytest.mark.parametrize("branch", ["staging", "main"])
def test_a_lost_answer_is_not_taken_for_somebody_elses_commit(
    one: Place, world: World, tmp_path: Path, branch: str
) -> None:
    changed = copy_run(world.base, tmp_path / "runs" / "changed", tasks=["Topics"])
    change_adapter(
        changed, "Topics", world.encoder, another_head
    )  # files are deleted too, so the client does send the commit again
    one.hub.cut(method="POST", path_contains=f"/commit/{branch}", takes_effect=True)
    published = one.publish(changed.root, NO_GATE)
    assert [adapter.name for adapter in published.verified] == ["Topics"]
    check_settled(one.hub, {"Topics"}, changed.root)
    assert [status for *_, status in sent(one.hub, f"/commit/{branch}")] == [CUT, 412]
    assert len(HfApi().list_repo_commits(REPO)) == 3


@pytest.mark.parametrize("name", QUICK_HARMS)
def test_a_run_that_is_not_what_was_measured_is_not_published(
    one: Place, world: World, tmp_path: Path, name: str
) -> None:
    suffer_harm(one, world, HARMS[name], tmp_path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.faults
def test_the_planted_pickle_is_a_real_one(world: World, tmp_path: Path) -> None:
    harmed = copy_run(world.both, tmp_path / "both")
    plant_pickle(harmed, world.encoder, tmp_path)
    with zipfile.ZipFile(harmed.task("Pairs").lora_adapter_pt) as archive:
        pickle.loads(archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl"))))  # noqa: S301
    assert (tmp_path / "touched").exists()


def test_a_published_pickle_is_not_run_by_who_verifies_it(one: Place, world: World, tmp_path: Path) -> None:
    harmed = copy_run(world.both, tmp_path / "runs" / "both")
    plant_pickle(harmed, world.encoder, tmp_path)
    content = harmed.task("Pairs").lora_adapter_pt.read_bytes()
    publication = json.loads(world.new["publication.json"])
    publication["files"]["Pairs/lora_adapter.pt"] = hashlib.sha256(content).hexdigest()
    files = world.new | {"Pairs/lora_adapter.pt": content, "publication.json": json.dumps(publication).encode()}
    one.hub.commit(REPO, dict(files))
    assert code_of("verify", TO, "--encoder", str(world.encoder)) == 1
    assert not (tmp_path / "touched").exists()


@pytest.mark.faults
def test_an_encoder_that_moved_is_noticed(one: Place, world: World, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    encoder = shutil.copytree(world.encoder, tmp_path / world.encoder.name)
    config = json.loads((world.both / "manifest.json").read_text())["config"]["encoder"] | {"name": str(encoder)}
    moved = copy_run(world.both, tmp_path / "runs" / "both", encoder=config)
    weights = load_file(encoder / "model.safetensors")
    save_file(
        {name: torch.nextafter(value, value + 1) for name, value in weights.items()},
        encoder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(AdapterError, match=r"Pairs.* fresh process: .*sha256:") as caught:
        one.publish(moved.root)
    assert str(caught.value).startswith(f"hf:{REPO} is unchanged")
    assert one.files() == world.old
    shutil.copyfile(world.encoder / "model.safetensors", encoder / "model.safetensors")
    one.publish(moved.root)
    assert one.files() == world.new


@pytest.mark.faults
def test_another_encoder_does_not_mix_with_what_is_published(one: Place, world: World, tmp_path: Path) -> None:
    other = copy_run(world.pairs, tmp_path / "runs" / "pairs", tasks=["Pairs"])
    revision = read_manifest(other).encoder.revision
    for path in (other.manifest, other.results, other.task("Pairs").result, other.task("Pairs").meta):
        path.write_text(path.read_text().replace(revision, f"sha256:{'0' * 64}"))
    with pytest.raises(InputError, match="Topics stays published, and was trained on"):
        one.publish(other.root)
    assert one.files() == world.old
    assert sent(one.hub, "POST ") == []


# --- a publisher that dies ---


POINTS = {
    "its branch": ("POST ", "/branch/"),
    "a large file": ("PUT ",),
    "its staged commit": ("POST ", "/commit/staging"),
    "a download": ("GET ", "/resolve/", ".safetensors"),
    "its commit to main": ("POST ", "/commit/main"),
    "its tag": ("POST ", "/tag/"),
}


@pytest.mark.parametrize(
    "point",
    [pytest.param(point, marks=() if point == "its commit to main" else pytest.mark.faults) for point in POINTS],
)
def test_killed_at_any_point_main_is_old_or_new_and_the_next_start_ends_it(
    one: Place, world: World, point: str
) -> None:
    parts = POINTS[point]
    outcome = suffer_kill(one, world, lambda _, request: all(part in f"{request[0]} {request[1]}" for part in parts))
    assert outcome.main == ("new" if point in ("its commit to main", "its tag") else "old")


# --- several publishers ---


def test_a_run_that_is_being_deleted_is_not_published(world: World, tmp_path: Path) -> None:
    with hold_run(world.both, alone=True), pytest.raises(LockedError, match="is being deleted"):
        publish(world.both, NO_GATE.model_copy(update={"to": str(tmp_path / "published")}))
    assert not (tmp_path / "published").exists()


@pytest.mark.faults
def test_two_publishers_at_once_both_land(place: Place, world: World, tmp_path: Path) -> None:
    changed = copy_run(world.base, tmp_path / "runs" / "changed", tasks=["Topics"])
    change_adapter(changed, "Topics", world.encoder, another_head)
    barrier = threading.Barrier(2)

    def together(repo: str, branch: str) -> None:
        if branch == "main" and not barrier.broken:
            barrier.wait(30)
            barrier.abort()

    place.hub.before_commit = together
    children = [
        place.publish_elsewhere(world.pairs, "pairs"),
        place.publish_elsewhere(changed.root, "changed", NO_GATE),
    ]
    assert [child.ended()["promoted"] for child in children] == [["Pairs"], ["Topics"]]  # type: ignore[index]
    assert sorted(status for _, _, status in sent(place.hub, "/commit/main")) == [200, 200, 412]
    check_complete(place.hub.files(REPO), BOTH)
    assert set(place.hub.branches(REPO)) == {"main"}
    titles = [commit.title for commit in HfApi().list_repo_commits(REPO)]
    assert len(titles) == 4
    assert {"run-pairs", "run-changed"} == set(place.hub.tags(REPO))
    assert place.files()["Topics/head.safetensors"] == changed.task("Topics").head.read_bytes()


@pytest.mark.faults
def test_two_publishers_of_a_new_repository_both_land(empty: Place, world: World) -> None:
    barrier = threading.Barrier(2)

    def together(repo: str, branch: str) -> None:
        if branch == "main" and not barrier.broken:
            barrier.wait(30)
            barrier.abort()

    empty.hub.before_commit = together
    children = [empty.publish_elsewhere(world.pairs, "pairs"), empty.publish_elsewhere(world.base, "base")]
    assert [child.ended()["promoted"] for child in children] == [["Pairs"], ["Topics"]]  # type: ignore[index]
    check_complete(empty.hub.files(REPO), BOTH)
    assert len(HfApi().list_repo_commits(REPO)) == 3
    assert set(empty.hub.branches(REPO)) == {"main"}


# --- going back ---


def code_of(*arguments: str) -> int:
    """Exit code of the command line, run in this process."""
    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.faults
def test_an_older_state_comes_back(empty: Place, world: World) -> None:
    empty.publish(world.base)
    old = empty.hub.head(REPO)
    empty.publish(world.both)
    empty.hub.requests = []
    landed, verified = rollback(TO, "run-base", encoder=str(world.encoder))
    assert landed == empty.hub.head(REPO) != old
    assert [adapter.name for adapter in verified] == ["Topics"]
    assert empty.files() == world.old
    assert set(empty.hub.branches(REPO)) == {"main"}
    assert sent(empty.hub, "PUT ") == [], "all of it is there already"
    assert empty.hub.tags(REPO)["run-base"] == old
    check_ends_well(empty, world)
    assert empty.hub.tags(REPO)["run-both"] == empty.hub.head(REPO), "published again, it is tagged where it is now"
    rollback(TO, old, encoder=str(world.encoder))
    assert empty.files() == world.old


@pytest.mark.faults
def test_a_damaged_state_does_not_come_back(one: Place, world: World) -> None:
    old = one.hub.head(REPO)
    head = one.hub.commit(REPO, dict(world.new))
    one.hub.tamper(REPO, "Topics/labels.json", b'["sea"]')
    with pytest.raises(VerificationError, match=r"is unchanged: Topics/labels\.json"):
        rollback(TO, old, encoder=str(world.encoder))
    assert one.hub.branches(REPO) == {"main": head}


@pytest.mark.faults
def test_what_is_not_there_cannot_come_back(one: Place, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("rollback", TO, "--to", "run-never", "--encoder", str(world.encoder)) == 2
    assert "there is no revision run-never" in capsys.readouterr().err
    assert code_of("rollback", "hf:me/nothing", "--to", "main") == 2
    assert "there is no repository of that name" in capsys.readouterr().err
    assert code_of("rollback", "out", "--to", "main") == 2
    assert one.files() == world.old


@pytest.mark.faults
def test_verify_says_by_its_exit_code_what_it_found(
    one: Place, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    one.publish(world.both)
    encoder = ("--encoder", str(world.encoder))
    assert code_of("verify", TO, *encoder) == 0
    assert [line.split()[1].strip(":") for line in capsys.readouterr().out.splitlines()] == ["Topics", "Pairs"]
    assert code_of("verify", f"{TO}@run-both#Pairs", *encoder) == 0
    assert [line.split()[1].strip(":") for line in capsys.readouterr().out.splitlines()] == ["Pairs"]
    assert code_of("verify", str(world.both), *encoder) == 0
    assert code_of("verify", f"{world.both}#Pairs", *encoder) == 0
    assert code_of("verify", f"{world.both}/Pairs", *encoder) == 0
    capsys.readouterr()
    for missing in (f"{TO}@run-never", "hf:me/nothing", str(world.both / "nothing"), f"{TO}#Nothing"):
        assert code_of("verify", missing, *encoder) == 2, missing
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1
    one.hub.tamper(REPO, "Pairs/labels.json", b'["sea"]')
    assert code_of("verify", f"{TO}#Topics", *encoder) == code_of("verify", TO, *encoder) == 1
    assert "Pairs/labels.json: its sha256 is" in capsys.readouterr().err


# --- the command line, in processes of its own ---


def test_a_token_is_nowhere_and_no_local_path_is_published(
    finished_run: FinishedRun, world: World, tmp_path: Path
) -> None:
    with hub_of_our_own(tmp_path, large=True, token=SECRET) as place:
        cwd = tmp_path / "cwd"
        copied = copy_run(world.both, cwd / "runs" / "both")
        environment = place.hub.environment | {"HF_HOME": str(tmp_path / "hf")}
        ended = run_command("publish", copied.root, "--to", TO, cwd=cwd, **environment)
        assert ended.code == 0, ended.err
        assert [line.split()[0] for line in ended.out.splitlines()] == [
            "promote",
            "promote",
            "verified",
            "verified",
            "published",
        ]
        check_settled(place.hub, BOTH, copied.root)
        assert ended.err == ""
        local = [*(str(path).encode() for path in (cwd, finished_run.cwd, world.encoder)), f"{Path.home()}/".encode()]
        assert [path for path, content in place.hub.files(REPO).items() if any(name in content for name in local)] == []
        assert traces(tmp_path, SECRET) == []
        assert SECRET not in ended.out + ended.err


@pytest.mark.faults
@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refusal_does_not_repeat_the_token(
    world: World, tmp_path: Path, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub_of_our_own(tmp_path, token=SECRET) as place:
        place.hub.fail(times=1000, status=status, method="POST")
        assert code_of("publish", str(world.both), "--to", TO) == (1 if status == 500 else 2)
        said = capsys.readouterr()
    assert str(status) in said.err
    assert SECRET not in said.out + said.err
    assert ("provide a token with access" in said.err) == (status != 500)
    assert traces(tmp_path, SECRET) == []
