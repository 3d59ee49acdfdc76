"""Publishing and loading on the real Hub if a repository and a token are given, on the tests' own Hub otherwise."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import FinishedRun, run
from hub_server import serve_hub

from pipeline.config import load_config

REPOSITORY = os.environ.get("LORAFLEET_TEST_REPOSITORY")
TOKEN = os.environ.get("HF_TOKEN")


@pytest.fixture(params=[pytest.param("loopback", marks=pytest.mark.faults), "real"])
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A repository's name, and what a child process needs to reach it."""
    with ExitStack() as stack:
        if request.param == "real":
            if not (REPOSITORY and TOKEN):
                pytest.skip(
                    "LORAFLEET_TEST_REPOSITORY=OWNER/NAME and HF_TOKEN are not given; the repository is written to"
                )
            yield f"hf:{REPOSITORY}", {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        else:
            server = stack.enter_context(serve_hub(lfs_from_bytes=2_000))
            yield "hf:me/fleet", server.environment | {"HF_HOME": str(tmp_path / "hf")}


def test_a_run_is_published_verified_and_rolled_back(
    hub: tuple[str, dict[str, str]], finished_run: FinishedRun, tmp_path: Path
) -> None:
    to, environment = hub
    own = shutil.copytree(finished_run.root, tmp_path / "run")
    encoder = ("--encoder", load_config(str(finished_run.config)).encoder.name)
    published = run(
        "publish", own, "--to", to, "--private", "--set", "publish.gate.enabled=false", cwd=tmp_path, **environment
    )
    assert published.code == 0, published.err
    again = run("publish", own, "--to", to, cwd=tmp_path, **environment)
    assert (again.code, "stays as it is" in again.out) == (0, True), again.err
    tag = f"run-{finished_run.root.name}"
    for ref in (to, f"{to}@{tag}#Topics"):
        verified = run("verify", ref, *encoder, cwd=tmp_path, **environment)
        assert verified.code == 0, verified.err
        assert "verified Topics" in verified.out
    back = run("rollback", to, "--to", tag, *encoder, cwd=tmp_path, **environment)
    assert back.code == 0, back.err
