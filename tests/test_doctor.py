"""The doctor on this environment, and on environments that are each broken in one way."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import py_compile
import socket
import sys
import tempfile
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from cluster import Cluster
from commands import Command, Ended, run
from hub_server import USER, go_online, serve_hub
from packaging.requirements import Requirement

from pipeline.store.lock import hold_store
from tasks.checks import doctor, libraries
from tasks.checks import machine as checkup
from tasks.checks.doctor import check_gpu, report, try_out
from tasks.checks.machine import (
    Check,
    check_checkpoints,
    check_disk,
    check_open_files,
    check_store,
    guarded,
)
from tasks.checks.servers import Deferred, check_address, check_hub, check_prefect, in_time

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SECRET = "hf_RecognisableSecretOfNobody"
DEAD = "127.0.0.1:9"  # nothing listens to discard any more


def lines(ended: Ended) -> dict[str, tuple[str, str]]:
    """Name of a check -> its status, and what stands behind the name."""
    checks = json.loads(ended.out)["checks"]
    return {
        check["name"]: (check["status"], "; ".join(filter(None, (check["found"], check["advice"])))) for check in checks
    }


def with_status(ended: Ended, status: str) -> list[str]:
    return [name for name, (found, _) in lines(ended).items() if found == status]


# --- the whole command ---


def test_a_whole_environment_without_its_servers_has_no_fault_and_each_missing_server_is_told(tmp_path: Path) -> None:
    """A missing GPU, Hub or server is a warning. A refused token or a password in an address is never printed."""
    with serve_hub(token="another") as hub:
        environment = hub.environment | {"HF_TOKEN": SECRET, "HF_HOME": str(tmp_path / "hf")}
        environment |= {"PREFECT_API_URL": f"http://me:{SECRET}@{DEAD}/api", "RAY_ADDRESS": DEAD}
        ended = run("doctor", "--runs", "runs", "--json", cwd=tmp_path, **environment)
    found = lines(ended)
    assert (ended.code, ended.err, with_status(ended, "fault")) == (0, "", [])
    assert set(with_status(ended, "warning")) >= {"Prefect API", "Ray", "Hub"}
    assert f"no server answers at {DEAD}" in found["Prefect API"][1]
    assert "unset PREFECT_API_URL" in found["Prefect API"][1]
    assert f"nothing answers at {DEAD}" in found["Ray"][1]
    assert "unset RAY_ADDRESS" in found["Ray"][1]
    assert "refuses the token (401); set HF_TOKEN" in found["Hub"][1]
    assert SECRET not in ended.out + ended.err
    required = [Requirement(line) for line in PROJECT["dependencies"]]
    assert {one.name: found[one.name][1].split()[0] for one in required} == {
        one.name: importlib.metadata.version(one.name) for one in required
    }
    assert not (tmp_path / "runs").exists()
    assert next(iter(found)) == "Python"
    assert found["computing"][1].split("; ")[1].startswith("trains on ")


def test_a_broken_library_and_one_of_another_version_are_faults_with_advice(tmp_path: Path) -> None:
    """Torch ends the process that imports it. Libraries on top of torch are reported too, without a traceback."""
    planted = tmp_path / "planted"
    for name, text in {
        "torch": "import os; os.abort()",
        "pyarrow": "raise ImportError('libarrow.so: no such file')",
    }.items():
        (planted / name).mkdir(parents=True)
        (planted / name / "__init__.py").write_text(text, encoding="utf-8")
    (planted / "rich-1.0.dist-info").mkdir()
    (planted / "rich-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: rich\nVersion: 1.0\n", encoding="utf-8"
    )
    ended = run("doctor", "--runs", "runs", cwd=tmp_path, PYTHONPATH=str(planted))
    assert ended.code == 1
    assert "Traceback" not in ended.err + ended.out
    told = {line[9:].split()[0]: line for line in ended.out.splitlines()}
    assert told["torch"].startswith("fault")
    assert "cannot be imported: its process was ended by SIGABRT; pip install --force-reinstall" in told["torch"]
    assert "'torch==2.13.0'" in told["torch"]
    assert (
        f"cannot be imported: ImportError: libarrow.so: no such file (in {planted}/pyarrow/__init__.py)"
        in told["pyarrow"]
    )
    assert told["rich"].startswith("fault    rich")
    assert "1.0, expected >=15.0" in told["rich"]
    assert told["Python"].startswith("ok")
    assert told["prefect"].startswith("ok")
    assert told["computing"].startswith("warning")
    assert told["run"].startswith("ok       run store")


@pytest.mark.faults
def test_a_store_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file", encoding="utf-8")
    ended = run("doctor", "--json", cwd=tmp_path)
    assert (ended.code, with_status(ended, "fault")) == (1, ["run store"])
    assert "is not a folder; choose another store with --runs" in lines(ended)["run store"][1]


@pytest.mark.faults
def test_a_local_ray_is_really_started_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    command = Command("doctor", "--start", "--json", cwd=tmp_path)
    command.wait_until(lambda: command.family("gcs_server"))
    ended = command.wait()
    assert ended.code == 0, ended.out
    assert command.left(seconds=10) == []
    assert lines(ended)["Ray"][1].startswith("a local Ray was started and stopped: room for 1 workers")


@pytest.mark.faults
def test_what_keeps_a_run_from_starting_on_this_machine_is_told_with_its_remedy(tmp_path: Path) -> None:
    """An unusable proxy, and a path too long for Ray. A local Ray then fails with that reason."""
    ended = run("doctor", "--start", "--json", cwd=tmp_path, ALL_PROXY="ftp://127.0.0.1:9", RAY_TMPDIR=str(tmp_path))
    assert (ended.code, ended.err) == (1, "")
    found = lines(ended)
    assert set(with_status(ended, "fault")) == {"proxy", "temporary files"}
    assert "ALL_PROXY: not a valid address; expected http://HOST:PORT" in found["proxy"][1]
    assert f"RAY_TMPDIR {tmp_path}: " in found["temporary files"][1]
    assert "set it to a folder with a shorter path" in found["temporary files"][1]
    assert f"a local Ray cannot be used: RAY_TMPDIR {tmp_path}: " in found["Ray"][1]


@pytest.mark.faults
def test_a_cluster_is_joined_and_said_how_many_workers_it_has_room_for(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        ended = run("doctor", "--ray-address", cluster.address, "--json", cwd=tmp_path, **cluster.environment)
        refused = run("doctor", "--json", cwd=tmp_path, RAY_ADDRESS=cluster.address)
    finally:
        cluster.stop()
    assert lines(ended)["Ray"] == (
        "ok",
        f"the cluster at {cluster.address} answers: room for 2 workers of 1 CPUs and 0 GPUs each",
    )
    assert (lines(refused)["Ray"][0], refused.code) == ("warning", 0)
    assert "that RAY_AUTH_MODE and the token are set" in lines(refused)["Ray"][1]
    assert refused.seconds < 90


# --- libraries ---


def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_module_that_takes_its_process_with_it_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {
        "killed": "import os; os.kill(os.getpid(), 9)",
        "ends": "import sys; sys.exit(3)",
        "left": "import os; os._exit(4)",
    }
    planted(tmp_path, monkeypatch, **modules, loud="print('hello')", broken="import nosuch")
    answers = try_out(["json", *modules, "loud", "broken", "csv"])
    assert {step: answer.get("error", "") for step, answer in answers.items()} == {
        "json": "",
        "killed": "its process was ended by SIGKILL",
        "ends": f"SystemExit: 3 (in {tmp_path}/ends.py)",
        "left": "its process ended with exit code 4: ",
        "loud": "",
        "broken": f"ModuleNotFoundError: No module named 'nosuch' (in {tmp_path}/broken.py)",
        "csv": "",
    }


def test_a_module_that_hangs_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(tmp_path, monkeypatch, hangs="import time; time.sleep(100)")
    answers = try_out(["json", "hangs", "csv"], seconds=2)
    assert answers["hangs"] == {"error": "no answer in 2 s"}
    assert "facts" in answers["csv"]


def test_a_library_that_is_not_installed_is_a_fault() -> None:
    check = libraries._check_library(Requirement("no-such-thing[extra]>=1.2"), {"error": "ModuleNotFoundError"})
    assert (check.status, check.found) == ("fault", "not installed, expected >=1.2")
    assert check.advice.endswith("'no-such-thing[extra]>=1.2'")


def test_requirements_that_cannot_be_read_are_one_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("[project", encoding="utf-8")
    monkeypatch.setattr(libraries, "_CHECKOUT", tmp_path)
    (check,) = libraries.Libraries().checks({})
    assert check.status == "fault"
    assert "make setup" in check.advice


def test_without_its_checkout_the_requirements_are_those_that_it_was_installed_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "_CHECKOUT", tmp_path)
    modules = libraries.Libraries().modules(over_torch=True)
    assert {"torch", "sklearn", "sentence_transformers"} <= set(modules)


# --- GPU ---

NO_GPU: dict[str, Any] = {"torch": "2.13.0+cpu", "cuda": None, "gpus": [], "said": ""}
OLD = "The NVIDIA driver on your system is too old (found version 11040)."


@pytest.mark.parametrize(
    ("answer", "driver", "status", "words"),
    [
        ({"facts": NO_GPU}, "", "warning", ["none: training computes on the CPU"]),
        ({"error": "ImportError: libtorch"}, "", "warning", ["none"]),
        (
            {"facts": NO_GPU},
            "570.86",
            "warning",
            ["driver, 570.86", "torch 2.13.0+cpu, which is built for the CPU only", "install the torch"],
        ),
        ({"facts": NO_GPU | {"cuda": "12.8", "said": OLD}}, "470.1", "warning", ["built for CUDA 12.8", OLD]),
        (
            {"error": "RuntimeError: no kernel image"},
            "570.86",
            "fault",
            ["cannot compute on it: RuntimeError: no kernel", "gpus_per_worker=0"],
        ),
        (
            {"facts": NO_GPU | {"cuda": "12.8", "gpus": [{"name": "H100", "free": 80e9, "total": 85e9}]}},
            "570.86",
            "ok",
            ["H100 (80.0 GB of 85.0 GB free); torch for CUDA 12.8, driver 570.86"],
        ),
    ],
)
def test_what_a_gpu_lacks_is_told(answer: Mapping[str, Any], driver: str, status: str, words: list[str]) -> None:
    check = check_gpu(answer, driver=driver)
    assert check.status == status
    for word in words:
        assert word in f"{check.found}; {check.advice}"


def test_a_hidden_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides" in check_gpu({"facts": NO_GPU}, driver="570.86").found


# --- servers ---


@contextmanager
def answering(answers: dict[str, tuple[int, str]]) -> Iterator[tuple[str, list[str | None]]]:
    """A server that says so at each path; its address, and the credentials that it was given."""
    given: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given.append(self.headers["Authorization"])
            status, text = answers.get(self.path, (404, ""))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", given
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_API_URL", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_a_prefect_server_is_asked_for_its_version(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    check = check_prefect()
    assert (check.status, check.found) == (
        "ok",
        f"{prefect_api[7:-4]} answers, Prefect {importlib.metadata.version('prefect')}",
    )


@pytest.mark.parametrize(
    ("health", "version", "words"),
    [
        (
            (200, "true"),
            (200, '"2.20.1"'),
            "is Prefect 2.20.1, but Prefect 3.8.8 is installed here; use a server of the same major version",
        ),
        ((200, "true"), (200, '"3.1.0"'), "is Prefect 3.1.0, older than 3.8.8 here; upgrade that server"),
        ((200, "true"), (401, ""), "answers 401; set PREFECT_API_AUTH_STRING"),
        ((404, ""), (404, ""), "answers 404; set PREFECT_API_URL to that server's API"),
        ((200, "<html>"), (200, "<html>"), "is not a Prefect API"),
        ((500, ""), (200, '"3.8.8"'), "answers 500; start that server"),
    ],
)
def test_a_server_that_does_not_fit_is_told(
    health: tuple[int, str], version: tuple[int, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering({"/api/health": health, "/api/admin/version": version}) as (place, _):
        monkeypatch.setenv("PREFECT_API_URL", f"http://{place}/api/")
        check = check_prefect()
    assert check.status == "warning"
    assert words.replace("3.8.8", importlib.metadata.version("prefect")) in f"{check.found}; {check.advice}"


@pytest.mark.parametrize(
    ("environment", "url", "sent"),
    [
        ({"PREFECT_API_KEY": SECRET}, "{}", f"Bearer {SECRET}"),
        ({"PREFECT_API_AUTH_STRING": "me:secret"}, "{}", "Basic bWU6c2VjcmV0"),
        ({}, "me:secret@{}", "Basic bWU6c2VjcmV0"),
        ({}, "{}", None),
    ],
)
def test_credentials_go_to_the_server_and_into_no_message(
    environment: dict[str, str], url: str, sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with answering({"/api/health": (200, "true"), "/api/admin/version": (200, '"99.0"')}) as (place, given):
        monkeypatch.setenv("PREFECT_API_URL", f"http://{url.format(place)}/api")
        check = check_prefect()
    assert given == [sent, sent]
    assert "secret" not in f"{check.found}{check.advice}".lower()


def test_what_is_no_address_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "localhost:4200")
    assert "expected http://HOST:PORT/api" in check_prefect().found


def test_no_server_configured_is_no_warning() -> None:
    assert (check_prefect().status, doctor._check_ray(None, None).status) == ("ok", "ok")


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], Check]:
    """``check_hub`` against an address, with a token."""
    go_online(monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))

    def check(endpoint: str, token: str | None) -> Check:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", endpoint, raising=False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        return check_hub()

    return check


def test_the_hub_is_asked_whose_token_it_is(online: Callable[[str, str | None], Check]) -> None:
    with serve_hub(token=SECRET) as hub:
        place = hub.endpoint.removeprefix("http://")
        assert online(hub.endpoint, SECRET) == Check(
            "ok", "Hub", f"{place} answers; the token is {USER}'s, its role write"
        )
        anonymous = online(hub.endpoint, None)
        assert (anonymous.status, anonymous.found) == ("ok", f"{place} answers; there is no token")
        hub.fail(times=1, status=429, method="GET", path_contains="/whoami")
        assert online(hub.endpoint, SECRET).found == f"{place} answers 429"


@pytest.mark.parametrize("token", [SECRET, f"{SECRET}\x01", f"{SECRET}\u20ac"])
def test_a_hub_that_is_out_of_reach_is_a_warning_and_no_token_is_quoted(
    token: str, online: Callable[[str, str | None], Check]
) -> None:
    for endpoint in (f"http://{DEAD}", "http://nowhere.invalid"):
        check = online(endpoint, token)
        assert check.status == "warning"
        assert "could not be reached" in check.found
        assert SECRET not in f"{check.found}{check.advice}"


def test_a_hub_that_is_not_to_be_asked_is_a_warning() -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE, "conftest.py sets it"
    assert check_hub().found == "HF_HUB_OFFLINE is set: not checked"


def test_what_listens_at_an_address_and_what_names_none_is_left_to_ray() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert [check_address(name) for name in (address, f"ray://{address}", "auto", "")] == [None] * 4
    closed = check_address(address)
    assert closed is not None
    assert f"nothing answers at {address}" in closed.found
    assert check_address("127.0.0.1:port") is not None


def test_what_does_not_answer_in_time_is_a_warning_and_what_fails_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.checks.servers.NETWORK_SECONDS", 0.2)
    never = threading.Event()

    def wait() -> Check:
        never.wait()
        raise AssertionError

    check = in_time("Hub", Deferred(wait))
    never.set()
    assert (check.status, check.name, check.found) == ("warning", "Hub", "no answer in 0.2 s")

    def fail() -> Check:
        raise LookupError("no such thing\nat all")

    assert guarded("Hub", fail).found == "not checked: LookupError: no such thing"


# --- this machine ---


def test_a_store_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    assert check_store(tmp_path / "a" / "b") == Check(
        "ok", "run store", f"{tmp_path / 'a' / 'b'}: does not exist yet, and can be created"
    )
    assert check_store(tmp_path) == Check("ok", "run store", f"{tmp_path}: can be written, not in use")
    assert list(tmp_path.iterdir()) == []


def test_a_store_in_use_is_said_to_be(tmp_path: Path) -> None:
    with hold_store(tmp_path, "20260102-1"):
        assert (
            check_store(tmp_path).found
            == f"{tmp_path}: can be written, and is in use by run 20260102-1, process {os.getpid()}"
        )
    assert check_store(tmp_path).found == f"{tmp_path}: can be written, not in use"


@pytest.mark.parametrize("runs", ["file", "file/runs", "link"])
def test_a_store_below_a_file_or_behind_a_broken_link_is_a_fault(runs: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert check_store(tmp_path / runs).status == "fault"


def _checked_by_nobody(runs: Path, send: Any) -> None:
    """Run the checks in a child process, as a user without privileges."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    send.send(check_store(runs))


def test_a_store_of_others_is_a_fault_with_advice() -> None:
    with tempfile.TemporaryDirectory() as place:  # others may not look into tmp_path
        runs = Path(place, "runs")
        runs.mkdir()
        Path(place).chmod(0o755)
        runs.chmod(0o555)
        context = multiprocessing.get_context("spawn")
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_checked_by_nobody, args=(runs, send))
        child.start()
        send.close()
        check: Check = receive.recv()
        child.join()
    assert (check.status, check.found) == ("fault", f"{runs}: {runs} cannot be written: Permission denied")
    assert check.advice.startswith("give this user the right to write there")


def test_checkpoints_that_nobody_went_on_with_are_a_warning_that_names_prune(tmp_path: Path) -> None:
    assert check_checkpoints(tmp_path) == Check("ok", "checkpoints", "none are left over")
    for days, key in ((1, "a"), (2, "b")):
        folder = tmp_path / ".work" / (key * 32)
        folder.mkdir(parents=True)
        (folder / "checkpoint.safetensors").write_bytes(b"x" * 500_000)
        when = (datetime.now() - timedelta(days=days)).timestamp()
        for path in (folder / "checkpoint.safetensors", folder):
            os.utime(path, (when, when))
    young = check_checkpoints(tmp_path)
    assert young.status == "ok"
    assert young.found.startswith("2 of unfinished trainings, 1.0 MB, the oldest last written 2 days ago")
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    old = check_checkpoints(tmp_path)
    assert old.status == "warning"
    assert f"`lorafleet prune {tmp_path} --older-than 7 --dry-run`" in old.advice


@pytest.mark.parametrize(
    ("limit", "check"),
    [
        ("LEAST_DISK_BYTES", lambda: check_disk(Path())),
        ("LEAST_SHARED_MEMORY_BYTES", checkup.check_shared_memory),
        ("LEAST_MEMORY_BYTES", checkup.check_memory),
        ("LEAST_OPEN_FILES", check_open_files),
    ],
)
def test_what_is_short_is_a_warning_with_advice(
    limit: str, check: Callable[[], Check], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkup, limit, 0)
    assert (check().status, check().advice) == ("ok", "")
    monkeypatch.setattr(checkup, limit, 2**62)
    assert check().status == "warning"
    assert check().advice


def test_a_disk_without_room_for_a_start_is_a_fault_and_one_that_does_not_say_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unsaid = check_disk(Path("/proc/x"))
    assert (unsaid.status, unsaid.found) == ("warning", "the file system of /proc does not report its free space")
    monkeypatch.setattr(checkup, "LEAST_ROOM_BYTES", 2**62)
    assert check_disk(Path()).status == "fault"
    assert check_disk(Path()).found.endswith("free on the disk of the run store: no run can start")


def test_a_home_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkup.check_home() == Check("ok", "home", f"{tmp_path} can be written")
    for nowhere in ("/proc", __file__):
        monkeypatch.setenv("HOME", nowhere)
        assert checkup.check_home().status == "warning"
        assert "set HOME to a folder that can" in checkup.check_home().advice
    assert list(tmp_path.iterdir()) == []


def test_where_no_process_can_be_tried_each_step_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    answers = try_out(["json", "csv"])
    assert list(answers) == ["json", "csv"]
    assert all(answer["error"].startswith("it cannot be tried: [Errno 2] No such file") for answer in answers.values())


def test_libraries_that_each_process_would_compile_anew_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heavy.py").write_text("x = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    check = checkup.check_bytecode("heavy")
    assert check.status == "warning"
    assert "PYTHONDONTWRITEBYTECODE is set" in check.found
    assert "compileall" in check.advice
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert checkup.check_bytecode("heavy").status == "ok"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written" in checkup.check_bytecode("heavy").found
    py_compile.compile(str(tmp_path / "heavy.py"))
    assert (checkup.check_bytecode("heavy").status, checkup.check_bytecode("heavy").advice) == ("ok", "")
    assert checkup.check_bytecode("no_such_library").status == "ok"


def test_memory_is_what_the_machine_has_or_its_control_group_may_still_take(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    there = checkup.available_memory()
    assert there is not None
    assert 0 < there <= 1.2 * psutil.virtual_memory().available
    said = {"/proc/meminfo": "MemFree: 7 kB\nMemAvailable:   1000 kB\n"}
    monkeypatch.setattr(checkup, "_text", lambda path: said.get(path, ""))
    assert checkup.available_memory() == 1_024_000
    said |= {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "100000\n"}
    assert checkup.available_memory() == 1_024_000
    said["/sys/fs/cgroup/memory.max"] = "500000\n"
    assert checkup.available_memory() == 400_000


def test_the_report_has_a_line_for_each_check_and_one_for_all() -> None:
    checks = [Check("ok", "disk", "enough"), Check("fault", "run store", "a file", "choose another")]
    assert report(checks, as_json=False).splitlines() == [
        "ok       disk       enough",
        "fault    run store  a file; choose another",
        "faults: 1, warnings: 0",
    ]
    assert json.loads(report(checks, as_json=True))["checks"][1] == {
        "status": "fault",
        "name": "run store",
        "found": "a file",
        "advice": "choose another",
    }
