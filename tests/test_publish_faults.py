"""Faults during publishing to the Hub: ``main`` is in the old or the new state, and the next call completes it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Command, FinishedRun
from commands import run as run_command
from publishing import (
    BOTH,
    FAULTS,
    HARMS,
    REPO,
    SECRET,
    TO,
    WHERE,
    Outcome,
    Place,
    Trap,
    World,
    check_complete,
    check_ends_well,
    check_settled,
    concerns,
    hub_of_our_own,
    make_world,
    sent,
    suffer,
    suffer_harm,
    suffer_kill,
    traces,
)

from pipeline.publishing.publish import rollback

pytestmark = pytest.mark.faults
LARGE = pytest.mark.parametrize("large", [False, True], ids=["regular", "lfs"])


@pytest.fixture(scope="module")
def world(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(finished_run.root, tmp_path_factory.mktemp("publish"))


@pytest.fixture(scope="module")
def table() -> Iterator[list[Outcome]]:
    """Printed at the end; ``pytest -s`` shows it."""
    rows: list[Outcome] = []
    yield rows
    print("\n\nfault | ends as | main | next start")
    for row in rows:
        print(f"{row.fault} | {row.ends} | {row.main} | {row.after}")


@pytest.fixture
def place(large: bool, world: World, tmp_path: Path) -> Iterator[Place]:
    """A Hub on which the base is published."""
    with hub_of_our_own(tmp_path, large=large) as place:
        place.lay_down(world.old)
        yield place


@LARGE
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_the_way(place: Place, world: World, table: list[Outcome], name: str, large: bool) -> None:
    if not concerns(name, large=large):
        pytest.skip("there are no large files")
    outcome = suffer(place, world, FAULTS[name])
    if large:
        table.append(outcome)


@LARGE
@pytest.mark.parametrize("name", HARMS)
def test_a_fault_of_the_run(
    place: Place, world: World, table: list[Outcome], name: str, tmp_path: Path, large: bool
) -> None:
    outcome = suffer_harm(place, world, HARMS[name], tmp_path)
    assert not (tmp_path / "touched").exists()
    if large:
        table.append(outcome)


def points(requests: list[tuple[str, str, int]]) -> list[int]:
    """Requests to die at: each that changes something, and the first, middle and last of each frequent kind."""
    many: dict[str, list[int]] = {}
    for number, (method, path, _) in enumerate(requests, 1):
        if method in ("GET", "HEAD", "PUT"):
            many.setdefault(f"{method} {path.split('/')[3:5]}" if "/api/" in path else method, []).append(number)
        else:
            many[f"{number}"] = [number]
    return sorted({numbers[index] for numbers in many.values() for index in (0, len(numbers) // 2, -1)})


@LARGE
@pytest.mark.parametrize("before", [True, False], ids=["before its effect", "after its effect"])
@pytest.mark.parametrize("first", [False, True], ids=["onto the base", "the first"])
@pytest.mark.timeout(1800)
def test_killed_at_every_request(
    world: World, table: list[Outcome], tmp_path: Path, large: bool, before: bool, first: bool
) -> None:
    with hub_of_our_own(tmp_path / "reference", large=large) as place:
        if not first:
            place.lay_down(world.old)
        assert place.publish_elsewhere(world.both).ended()
        numbers, whole = points(place.hub.requests), place.files()
    states = World(
        world.base, world.both, world.pairs, world.encoder, {} if first else world.old, whole if first else world.new
    )
    for number in numbers:
        with hub_of_our_own(tmp_path / f"{number}", large=large) as place:
            if not first:
                place.lay_down(world.old)
            if before:
                place.hub.interrupt_at(number)
            outcome = suffer_kill(place, states, lambda count, _, number=number: count == number)  # type: ignore[misc]
            if large and not first:
                table.append(
                    Outcome(
                        f"{outcome.fault}, {'before' if before else 'after'} its effect", outcome.ends, outcome.main
                    )
                )


@LARGE
@pytest.mark.parametrize(
    "where", [where for where in WHERE if where not in ("the tag", "the tags", "the staged commit", "a large file")]
)
@pytest.mark.parametrize("kind", [500, "cut before", "cut after"])
def test_a_rollback_sits_a_passing_fault_out(
    place: Place, world: World, where: str, kind: int | str, large: bool
) -> None:
    if not concerns(where, large=large):
        pytest.skip("there are no large files")
    old = place.hub.head(REPO)
    place.hub.commit(REPO, dict(world.new))
    method, path = WHERE[where]
    if isinstance(kind, int):
        place.hub.fail(times=2, status=kind, method=method, path_contains=path)
    else:
        place.hub.cut(method=method, path_contains=path, takes_effect=kind == "cut after")
    place.hub.requests = []
    rollback(TO, old, encoder=str(world.encoder))
    assert any(status not in (200, 404) for *_, status in sent(place.hub, f"{method} ", path)), (
        "the fault has not been met"
    )
    assert place.files() == world.old
    assert set(place.hub.branches(REPO)) == {"main"}


@pytest.mark.parametrize("point", ["/commit/staging", "/commit/main"])
def test_the_command_line_is_killed(world: World, tmp_path: Path, point: str) -> None:
    with hub_of_our_own(tmp_path, large=True) as place:
        place.lay_down(world.old)
        environment = place.hub.environment | {"HF_HOME": str(tmp_path / "hf")}
        place.hub.requests = trap = Trap(lambda _, request: point in request[1], lambda: command.process.kill())
        command = Command("publish", world.both, "--to", TO, cwd=tmp_path, **environment)
        assert command.wait().code == -9
        assert trap.sprung
        assert place.files() == (world.new if "main" in point else world.old)
        place.hub.requests = []
        again = Command("publish", world.both, "--to", TO, cwd=tmp_path, **environment).wait()
        assert again.code == 0, again.err
        assert place.files() == world.new
        check_settled(place.hub, BOTH, world.both)
        check_ends_well(place, world)


def test_a_token_of_a_prefect_block_is_nowhere(
    finished_run: FinishedRun, prefect_api: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shutil.copytree(finished_run.runs, tmp_path / "cwd" / "runs", ignore=shutil.ignore_patterns(".prefect"))
    save = (
        "import sys; from prefect.blocks.system import Secret; "
        "Secret(value=sys.stdin.read()).save('hub-token', overwrite=True)"
    )
    environment = {"PREFECT_API_URL": prefect_api, "PREFECT_HOME": str(tmp_path / "prefect")}
    subprocess.run([sys.executable, "-c", save], input=SECRET, text=True, check=True, env=os.environ | environment)
    with hub_of_our_own(tmp_path, large=True, token=SECRET) as place:
        environment |= {name: value for name, value in place.hub.environment.items() if name != "HF_TOKEN"} | {
            "HF_HOME": str(tmp_path / "hf")
        }
        options = ("--set", f"publish.to={TO}", "--set", "publish.token_block=hub-token")
        ended = run_command(
            "train", "--config", finished_run.config, "--runs", "runs", *options, cwd=tmp_path / "cwd", **environment
        )
        assert ended.code == 0, ended.err
        check_complete(place.hub.files(REPO), BOTH)
        assert place.hub.tags(REPO) == {f"run-{ended.run.name}": place.hub.head(REPO)}
    assert SECRET not in ended.out + ended.err
    assert traces(tmp_path, SECRET) == []
    logs = [path for path in tmp_path_factory.getbasetemp().glob("prefect*") if path.is_dir()]
    assert logs
    assert [trace for path in logs for trace in traces(path, SECRET)] == []
