"""Schedules, from the file to the run: registration, execution by a worker, and notification of failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import Command, eventually, run, write_config, write_task
from prefect_server import POOL, Api, start_stand_in, start_worker

from flows.cli import main
from flows.deploying import FILE, deploy
from flows.deployment_file import ScheduleEntry, read_deployments, schedule_of
from pipeline.errors import InputError

Folders = Callable[[str], Path]
NAMES = ("train-adapters/weekly", "classify-datasets/nightly", "publish-adapters/by-hand")


@pytest.fixture
def api(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """The tests' server, and ours here; what was registered is scheduled no more after the test."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    api = Api(prefect_api)
    yield api
    for deployment in registered(api):
        api.post(f"/deployments/{deployment['id']}/pause_deployment")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to deploy from. It holds modules of the user's that are called as ours."""
    for name in ("flows", "tasks", "pipeline"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('this is not lorafleet')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", "/")  # as of a shell that has since moved on
    monkeypatch.setenv("NO_PROXY", "")
    return tmp_path


def registered(api: Api) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.post("/deployments/filter", deployments={"tags": {"all_": ["lorafleet"]}})
    return found


def shipped(name: str) -> dict[str, Any]:
    """One deployment of our own file, before anything is filled in."""
    (entry,) = (
        entry for entry in yaml.safe_load(FILE.read_text(encoding="utf-8"))["deployments"] if entry["name"] == name
    )
    assert isinstance(entry, dict)
    return entry


def write_file(folder: Path, **changes: Any) -> Path:
    """A file with our weekly deployment, called as the folder, in the pool of the tests' worker, with some changes."""
    entry = shipped("weekly")
    entry |= {"name": folder.name, "work_pool": entry["work_pool"] | {"name": POOL}} | changes
    path = folder / "schedules.yaml"
    path.write_text(
        yaml.safe_dump({"pull": [], "deployments": [{k: v for k, v in entry.items() if v is not None}]}),
        encoding="utf-8",
    )
    return path


def only_one(api: Api, file: Path, **options: Any) -> dict[str, Any]:
    """Register the only deployment of a file; returns it as the server has it."""
    (deployed,) = deploy(file, **options)
    found: dict[str, Any] = api.get(f"/deployments/name/{deployed.name}")
    return found


# --- what is registered ---


@pytest.mark.parametrize("command", ["deploy", "up"])
def test_the_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    assert f"Example: lorafleet {command} --" in capsys.readouterr().out


def test_our_file_is_registered_as_it_is_written_and_again_changes_nothing(api: Api, project: Path) -> None:
    ended = run("deploy", cwd=project, PREFECT_API_URL=api.url)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(NAMES)
    assert "cron 0 6 * * 1, Europe/Berlin; next Mon " in lines[0]
    assert "cron 0 2 * * *, Europe/Berlin (inactive)" in lines[1]
    assert "next" not in lines[1]
    assert "no schedule" in lines[2]

    before = [api.get(f"/deployments/name/{name}") for name in NAMES]
    for deployment, line in zip(before, lines, strict=True):
        written = shipped(deployment["name"])
        assert {k: deployment[k] for k in ("entrypoint", "description", "tags", "parameters")} == {
            k: written[k] for k in ("entrypoint", "description", "tags", "parameters")
        }
        assert deployment["work_pool_name"] == "lorafleet"
        assert deployment["job_variables"] == {"command": "python -P -m flows.scheduled", "working_dir": str(project)}
        assert deployment["global_concurrency_limit"]["limit"] == 1
        assert deployment["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
        assert line.endswith(f"{api.url.removesuffix('/api')}/deployments/deployment/{deployment['id']}")
        schedules = [
            {"cron": s["schedule"]["cron"], "timezone": s["schedule"]["timezone"]} for s in deployment["schedules"]
        ]
        assert schedules == [{"cron": s["cron"], "timezone": s["timezone"]} for s in written.get("schedules", [])]
        assert [s["active"] for s in deployment["schedules"]] == [
            s.get("active", True) for s in written.get("schedules", [])
        ]
    assert api.get("/work_pools/lorafleet")["type"] == "process"

    assert [deployed.name for deployed in deploy()] == list(NAMES)
    changing = {"updated", "schedules", "version_id", "updated_by", "version_info"}
    for name, deployment in zip(NAMES, before, strict=True):
        after = api.get(f"/deployments/name/{name}")
        assert {k: v for k, v in after.items() if k not in changing} == {
            k: v for k, v in deployment.items() if k not in changing
        }
        assert [s["schedule"] for s in after["schedules"]] == [s["schedule"] for s in deployment["schedules"]]


@pytest.mark.faults
def test_prefect_itself_registers_the_same_from_our_file(
    api: Api, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = project / "clean"  # Prefect would take the user's flows.py for ours
    clean.mkdir()
    monkeypatch.chdir(clean)
    deploy()
    ours = [api.get(f"/deployments/name/{name}") for name in NAMES]
    program = [sys.executable, "-P", "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(FILE)]
    subprocess.run(program, cwd=clean, env=os.environ | {"PWD": str(clean)}, capture_output=True, check=True)
    same = (
        "id",
        "entrypoint",
        "description",
        "tags",
        "parameters",
        "parameter_openapi_schema",
        "job_variables",
        "pull_steps",
    )
    same = (*same, "work_pool_name", "concurrency_options", "enforce_parameter_schema", "paused")
    for name, deployment in zip(NAMES, ours, strict=True):
        theirs = api.get(f"/deployments/name/{name}")
        assert {k: theirs[k] for k in same} == {k: deployment[k] for k in same}
        assert [(s["schedule"], s["active"]) for s in theirs["schedules"]] == [
            (s["schedule"], s["active"]) for s in deployment["schedules"]
        ]


def test_each_parameter_has_a_title_and_a_description_for_the_form(api: Api, project: Path) -> None:
    deploy()
    for name in NAMES:
        schema = api.get(f"/deployments/name/{name}")["parameter_openapi_schema"]
        assert schema["properties"]
        for parameter, shown in schema["properties"].items():
            assert shown.get("title"), f"{name}: {parameter}"
            assert len(shown.get("description", "")) > 10, f"{name}: {parameter}"


def test_a_schedule_that_is_gone_from_the_file_is_gone_from_the_server(api: Api, project: Path) -> None:
    two = [{"cron": "0 6 * * 1", "timezone": "Europe/Berlin"}, {"interval": 3600}]
    assert len(only_one(api, write_file(project, schedules=two))["schedules"]) == 2
    assert only_one(api, write_file(project, schedules=None))["schedules"] == []


def test_the_next_run_that_is_told_is_the_one_that_the_server_schedules(api: Api, project: Path) -> None:
    (deployed,) = deploy(write_file(project), schedule=schedule_of(interval=5400, cron=None, timezone="Europe/Berlin"))
    assert deployed.schedules == ("every 90 minutes",)
    assert deployed.next_run is not None
    deployment = api.get(f"/deployments/name/{deployed.name}")

    def scheduled() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = api.post(
            "/flow_runs/filter", deployments={"id": {"any_": [deployment["id"]]}}, sort="EXPECTED_START_TIME_ASC"
        )
        return found

    first = eventually(scheduled, seconds=30, what="the server has scheduled runs")[0]
    assert datetime.fromisoformat(first["expected_start_time"]) == deployed.next_run
    assert "lorafleet" in first["tags"]


def test_what_the_command_line_says_replaces_the_schedule_of_the_file(api: Api, project: Path) -> None:
    asked = schedule_of(interval=None, cron="*/10 8-18 * * *", timezone="Asia/Tokyo")
    (schedule,) = only_one(api, write_file(project), schedule=asked)["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("*/10 8-18 * * *", "Asia/Tokyo")


def test_registering_an_interval_again_does_not_move_its_runs(api: Api, project: Path) -> None:
    file = write_file(project, schedules=[{"interval": 86_400}])
    assert deploy(file)[0].next_run == deploy(file)[0].next_run


@pytest.mark.parametrize("name", ["weekly", "train-adapters/weekly"])
def test_a_name_chooses_one_deployment_of_the_file(name: str, api: Api, project: Path) -> None:
    assert [deployed.name for deployed in deploy(names=[name])] == ["train-adapters/weekly"]


def test_where_no_address_is_set_the_up_whose_store_is_in_this_folder_is_found_by_itself(
    api: Api, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL")
    ups = [
        start_stand_in("http://127.0.0.1:9/api", project.parent / "elsewhere"),
        start_stand_in(api.url, project / "runs"),
    ]
    try:
        assert deploy(names=["weekly"])[0].url.startswith(api.url.removesuffix("/api"))
        ups.append(start_stand_in("http://127.0.0.1:8/api", project / "other"))
        with pytest.raises(InputError, match=r"several `lorafleet up` are running: .*; set PREFECT_API_URL") as raised:
            deploy(names=["weekly"])
        told = [f"{api.url} (run store {project}/runs)", f"http://127.0.0.1:8/api (run store {project}/other)"]
        assert [one for one in told if one not in str(raised.value)] == []
        assert "elsewhere" not in str(raised.value)
    finally:
        for up in ups:
            up.communicate()


# --- faults ---


def test_without_a_server_one_message_names_the_command_that_starts_one(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(SystemExit) as end:
        main(["deploy", "--name", "weekly"])
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1), err
    assert "no Prefect server answers at http://127.0.0.1:9/api" in err
    assert "`lorafleet up`" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--file", "none.yaml"], ["none.yaml", "--file"]),
        (["--name", "montly"], ["montly", "train-adapters/weekly"]),
        (["--name", "weekly", "--cron", "at dawn"], ["at dawn"]),
        (["--name", "weekly", "--cron", "0 6 * * 1", "--timezone", "Mars/Phobos"], ["Mars/Phobos"]),
        (["--name", "weekly", "--interval", "60", "--timezone", "Mars/Phobos"], ["Mars/Phobos"]),
        (["--name", "weekly", "--interval", "-1"], ["greater than 0"]),
        (["--name", "weekly", "--interval", "60", "--cron", "0 6 * * 1"], ["either cron or interval"]),
        (["--timezone", "Europe/Berlin"], ["--cron or --interval"]),
        (["--interval", "60"], ["3 deployments", "--name"]),
        (["--notify", "slack-webhook/nobody"], ["slack-webhook/nobody", "TYPE/NAME"]),
        (["--notify", "team"], ["team", "TYPE/NAME"]),
    ],
)
def test_a_wrong_call_is_one_message_and_registers_nothing(
    arguments: list[str], words: list[str], api: Api, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {d["id"]: d["updated"] for d in registered(api)}
    with pytest.raises(SystemExit) as end:
        main(["deploy", *arguments])
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1), err
    assert [word for word in words if word not in err] == []
    assert {d["id"]: d["updated"] for d in registered(api)} == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"entrypoint": "flows/train_adapters.py:train_adapters"}, ["is a path", "module.flow"]),
        ({"entrypoint": "flows.train_adapters.retrain"}, ["retrain"]),
        ({"entrypoint": "flows.nothing.train_adapters"}, ["flows.nothing"]),
        ({"entrypoint": "flows.cli.main"}, ["not a flow"]),
        ({"entrypoint": "main"}, ["main", "module.flow"]),
        ({"parameters": {"confg": "quickstart"}}, ["confg", "config"]),
        ({"parameters": {"force": "perhaps"}}, ["perhaps"]),
        ({"schedules": [{"cron": "0 6 * * 1", "timezone": "Mars/Phobos"}]}, ["schedules.0", "Mars/Phobos"]),
        ({"schedules": [{"timezone": "Europe/Berlin"}]}, ["schedules.0", "either cron or interval"]),
        ({"schedules": [{"cron": "0 6 * * 1", "parameters": {"runs": 7}}]}, ["7"]),
        ({"triggers": [{"type": "event"}]}, ["triggers"]),
        ({"description": "{{ $NOT_SET_ANYWHERE }}"}, ["environment"]),
        ({"concurrency_limit": {"limit": 0}}, ["concurrency_limit"]),
        ({"work_pool": None}, ["work_pool"]),
        ({"work_pool": {"name": ""}}, ["work_pool.name", "without / % & < >"]),
        ({"work_pool": {"name": POOL, "work_queue_name": "a/b"}}, ["work_queue_name"]),
        ({"work_pool": {"name": POOL, "job_variables": {"a": float("nan")}}}, [".nan"]),
        ({"name": "n" * 300}, ["name", "200 characters"]),
        ({"entrypoint": "..x"}, ["'..x'", "module.flow"]),
        ({"entrypoint": "flows."}, ["'flows.'", "module.flow"]),
        ({"entrypoint": ""}, ["entrypoint", "module.flow"]),
        ({"entrypoint": "antigravity.flow\0"}, ["null character"]),
        ({"schedules": [{"interval": 1e300}]}, ["schedules.0.interval"]),
        ({"schedules": [{"interval": 0.001}]}, ["schedules.0", "at least 1"]),
        ({"schedules": [{"cron": "0 0 31 2 *"}]}, ["0 0 31 2 *", "no run would ever be due"]),
        ({"schedules": [{"interval": 60, "anchor_date": "0001-01-01T00:00:00+00:00"}]}, ["anchor_date"]),
        ({"schedules": [{"interval": 60, "timezone": ""}]}, ["timezone"]),
        ({"concurrency_limit": {"limit": 10**12}}, ["concurrency_limit"]),
        ({"parameters": {"config": "https://u:hunter2@h/c.toml"}}, ["https://***@h/c.toml"]),
        ({"parameters": {"runs": 10**4000}}, ["bits; expected at most 64"]),
    ],
)
def test_a_wrong_deployment_is_told_before_anything_is_registered(
    changes: dict[str, Any], words: list[str], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # nobody is there to ask
    file = write_file(project, **changes)
    with pytest.raises(InputError) as error:
        deploy(file)
    message = str(error.value)
    assert "\n" not in message
    assert "hunter2" not in message
    assert [word for word in [str(file), *words] if word not in message] == []


def test_two_deployments_of_one_name_are_told_before_anything_is_registered(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    file = write_file(project)
    entries = yaml.safe_load(file.read_text(encoding="utf-8"))["deployments"]
    file.write_text(yaml.safe_dump({"deployments": [*entries, *entries]}), encoding="utf-8")
    with pytest.raises(InputError, match=rf"train-adapters/{project.name} is in it more than once"):
        deploy(file)


def test_a_module_of_the_users_that_cannot_be_imported_is_told_with_its_error(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "broken_flow.py").write_text("raise SystemExit('no')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(project))
    with pytest.raises(InputError, match=r"cannot be imported: SystemExit: no; expected module\.flow"):
        deploy(write_file(project, entrypoint="broken_flow.train"))


@pytest.mark.parametrize(
    "text", ["deployments: [", "", "- a", "deployments: []", "build: []\ndeployments: [{name: a}]", "deployments: [a]"]
)
def test_what_is_not_such_a_file_is_told_with_its_name(text: str, project: Path) -> None:
    file = project / "schedules.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"schedules\.yaml: "):
        read_deployments(file)


@pytest.mark.parametrize(
    ("seconds", "words"), [(20, "20 s"), (90, "90 s"), (300, "5 minutes"), (7200, "2 hours"), (604_800, "7 days")]
)
def test_an_interval_is_told_in_words(seconds: float, words: str) -> None:
    assert str(ScheduleEntry(interval=seconds)) == f"every {words}"


# --- what a worker makes of it ---


class Inbox(ThreadingHTTPServer):
    """A webhook on loopback, and what came in."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receive)
        self.messages: list[dict[str, str]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Receive(BaseHTTPRequestHandler):
    server: Inbox

    def do_POST(self) -> None:
        self.server.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Not into the tests' output."""


@pytest.fixture
def inbox(api: Api) -> Iterator[Inbox]:
    """A webhook that the block document ``custom-webhook/inbox`` notifies."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.settings import PREFECT_API_URL, temporary_settings

    server = Inbox()
    block = CustomWebhookNotificationBlock(
        name="inbox",
        url=f"http://127.0.0.1:{server.server_port}/",
        json_data={"subject": "{{subject}}", "text": "{{body}}"},
    )
    with temporary_settings({PREFECT_API_URL: api.url}):
        block.save("inbox", overwrite=True)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def worker(api: Api, project: Path) -> Iterator[Command]:
    worker = start_worker(api, project, PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    yield worker
    for process in worker.family():
        process.kill()
    worker.sweep()


def stopped(worker: Command) -> bool:
    """Whether the process of a flow run is there; it does not go on."""
    for process in worker.family("flows.scheduled"):
        process.send_signal(signal.SIGSTOP)
        return True
    return False


@pytest.mark.timeout(200)
@pytest.mark.faults
def test_a_run_that_overlaps_is_cancelled_and_one_that_fails_is_told_of(
    encoder_folder: Folders, api: Api, project: Path, inbox: Inbox, worker: Command
) -> None:
    (project / "data").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table({"sentence": ["a"], "label": ["b"]}), project / "data" / f"{split}.parquet")
    task = {
        "name": "Topics",
        "train": "data/train.parquet",
        "test": "data/test.parquet",
    }  # of the folder that was deployed from
    write_config(project / "config.toml", encoder_folder("bert"), [task])
    file = write_file(project, parameters={"config": "config.toml", "runs": "runs"}, schedules=None)
    for _ in range(2):
        deployment = only_one(api, file, notify="custom-webhook/inbox")["id"]
    assert len(api.post("/automations/filter", automations={"name": {"any_": ["lorafleet: a run failed"]}})) == 1

    first = api.start(deployment)
    eventually(lambda: api.state(first)["type"] == "RUNNING" and stopped(worker), seconds=60, what="the first run runs")
    second = api.start(deployment)
    eventually(lambda: api.state(second)["type"] == "CANCELLED", seconds=30, what="the second run is cancelled")
    assert api.state(first)["type"] == "RUNNING"
    assert "concurrency limit" in api.state(second)["message"]

    for process in worker.family("flows.scheduled"):
        process.send_signal(signal.SIGCONT)
    eventually(lambda: api.state(first)["type"] == "FAILED", seconds=60, what="the first run fails")
    message = api.state(first)["message"]
    assert message.startswith("nothing was trained: preflight: Topics: train: ")
    assert "train.parquet has no column 'text', but 'sentence', 'label'; set text_column" in message
    logs = [log["message"] for log in api.post("/logs/filter", logs={"flow_run_id": {"any_": [first]}})]
    assert [line for line in logs if "Traceback" in line] == []
    assert any(message.endswith(line) for line in logs)

    (told,) = eventually(lambda: inbox.messages, seconds=30, what="the webhook is called")
    assert told["subject"] == "lorafleet: train-adapters failed"
    assert message in told["text"]
    assert told["text"].endswith(f"{api.url.removesuffix('/api')}/runs/flow-run/{first}")


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_schedule_trains_then_finds_nothing_to_do_then_retrains_only_what_has_changed(
    encoder_folder: Folders, api: Api, project: Path, worker: Command
) -> None:
    tasks = [
        write_task(project / "data", "Topics", num_train=60),
        write_task(project / "data", "Pairs", num_train=60, num_classes=2, seed=1),
    ]
    evaluate = {"columns": ["frozen_full_data", "head"]}
    write_config(project / "config.toml", encoder_folder("bert"), tasks, evaluate=evaluate)
    file = write_file(project, parameters={"config": "config.toml", "runs": "runs"})
    deployment = only_one(api, file, schedule=schedule_of(interval=15, cron=None, timezone=None))["id"]

    def messages() -> list[str]:
        """State messages of the finished runs, oldest first, without those cancelled because another was running."""
        runs = api.post("/flow_runs/filter", deployments={"id": {"any_": [deployment]}}, sort="START_TIME_ASC")
        return [run["state"]["message"] for run in runs if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED")]

    first, second = eventually(lambda: messages() if len(messages()) >= 2 else None, seconds=200, what="two runs")[:2]
    assert first == "2 adapters trained, 0 unchanged"
    assert second.startswith("nothing to do")
    assert len(list((project / "runs").glob("*/manifest.json"))) == 1

    write_task(project / "data", "Pairs", num_train=60, num_classes=2, seed=7)
    trained = eventually(
        lambda: [m for m in messages()[1:] if "trained" in m], seconds=200, what="a run that trains again"
    )
    assert trained == ["1 adapter trained, 1 unchanged"]
