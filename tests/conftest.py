"""Small real encoders for all tests, made once per session; no test reaches the network, and torch uses one thread."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import COMMIT, load_encoder, save_tiny_encoder
from commands import SCRIPT, Ended, FinishedRun, run, write_config, write_task
from filelock import FileLock

if TYPE_CHECKING:
    from pipeline.encoder.encoder import Encoder

# Before the first import of torch or huggingface_hub, which read them then.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Reset the number of threads, which a test may set and which changes the last bits of the next test's weights."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> folder of a two-layer encoder of that architecture. Not to be written to."""
    root = tmp_path_factory.mktemp("encoders")

    def folder_of(family: str) -> Path:
        folder = root / f"tiny-{family}"
        return folder if folder.exists() else save_tiny_encoder(folder, family)

    return folder_of


@pytest.fixture
def bert(encoder_folder: Callable[[str], Path]) -> Encoder:
    """A fresh two-layer BERT, mean pooling, without adapter."""
    return load_encoder(encoder_folder("bert"))


@pytest.fixture
def hub_cache(encoder_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache folder of huggingface_hub with one encoder: ``someone/tiny`` at ``COMMIT``."""
    import huggingface_hub.constants

    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(encoder_folder("bert"), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))  # for processes that a test starts
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prefect server for the commands of all tests; it saves each of them the start of its own."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tasks.services.prefect_server", str(port)], env=environment, stdout=log, stderr=log
        )
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5).close()
            break
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, (home / "server.log").read_text()
            assert time.monotonic() < deadline, "the Prefect server did not answer"
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/api"
    server.kill()
    server.wait()


@pytest.fixture(scope="session")
def finished_run(encoder_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """``lorafleet train`` on two small tasks, with the Prefect server and the Ray that it starts itself. Read-only.

    The folder holds modules of the user's that are called as ours, and is on PYTHONPATH.
    """
    cwd = _of_all_processes(tmp_path_factory) / "finished"
    with FileLock(f"{cwd}.lock"):  # the first process of pytest that needs the run makes it for the others too
        done = cwd / "ended.json"
        if not done.exists():
            cwd.mkdir(exist_ok=True)  # of a process whose run failed: this one shall fail for the same reason
            for name in ("flows", "tasks", "pipeline"):
                (cwd / f"{name}.py").write_text("raise AssertionError('this is not lorafleet')", encoding="utf-8")
            tasks = [
                write_task(cwd / "data", "Topics", num_classes=3),
                write_task(cwd / "data", "Pairs", num_classes=2, seed=1),
            ]
            config = write_config(cwd / "config.toml", encoder_folder("bert"), tasks)
            ended = run("train", "--config", config, "--runs", "runs", cwd=cwd, program=SCRIPT, PYTHONPATH=str(cwd))
            assert ended.code == 0, ended.err
            done.write_text(
                json.dumps({"config": str(config), "tasks": tasks, "ended": asdict(ended)}), encoding="utf-8"
            )
    facts = json.loads(done.read_text(encoding="utf-8"))
    return FinishedRun(cwd, Path(facts["config"]), tuple(facts["tasks"]), Ended(**facts["ended"]))


def _of_all_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of this run of the tests have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
