"""Files in deploy/: valid by their schemas, without secrets, on loopback only, with existing commands."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import psutil
import pytest
import yaml
from commands import eventually
from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(DEPLOY.iterdir()) if path.suffix != ".png"}
COMPOSE = yaml.safe_load(TEXTS["docker-compose.yaml"])
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
KUBERNETES = {document["kind"]: document for document in yaml.safe_load_all(TEXTS["rayjob.yaml"])}
RAYJOB = KUBERNETES["RayJob"]["spec"]
CLUSTER = RAYJOB["rayClusterSpec"]
GROUPS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
PODS = {group.get("groupName", "head"): group["template"] for group in GROUPS}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
)
SECRETS = ("POSTGRES_PASSWORD", "RAY_AUTH_TOKEN", "PREFECT_API_AUTH_STRING")
_CODE = re.compile(r"^```\w*\n(?P<block>.*?)^```$|`(?P<inline>[^`]+)`", re.MULTILINE | re.DOTALL)
_VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(?::([-?])([^}]*))?\}")


# Compose


def test_the_compose_file_is_valid_by_the_compose_specification() -> None:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        "deploy/docker-compose.yaml",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def compose() -> list[str]:
    """A client with compose; no engine is asked."""
    for client in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(client[0])
            and subprocess.run([*client, "version"], capture_output=True, check=False).returncode == 0
        ):
            return client
    pytest.skip("no docker client with compose here")


def configured(compose: list[str], *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The configuration that compose makes of the file. It holds the secrets, so it must not be printed."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = [*compose, "--file", "deploy/docker-compose.yaml", *options, "config", "--format", "json"]
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False)


def test_compose_reads_the_file_as_it_is_meant(compose: list[str]) -> None:
    needed = {name: secrets.token_hex(8) for name in SECRETS}
    done = configured(compose, "--profile", "gpu", **needed, LORAFLEET_WORKERS="3", LORAFLEET_DATA="/srv/store")
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert set(services) == set(SERVICES)
    assert {port["host_ip"] for service in services.values() for port in service.get("ports", ())} == {"127.0.0.1"}
    assert services["ray-worker"]["scale"] == 3
    assert [(v["type"], v["source"], v["target"]) for v in services["ray-worker"]["volumes"]] == [
        ("bind", "/srv/store", "/data")
    ]
    tokens = {service["environment"].get("RAY_AUTH_TOKEN") == needed["RAY_AUTH_TOKEN"] for service in services.values()}
    assert tokens == {True, False}
    assert services["prefect-server"]["environment"]["PREFECT_SERVER_DATABASE_PASSWORD"] == needed["POSTGRES_PASSWORD"]


def test_prefects_api_asks_for_a_password_that_its_clients_have_and_only_its_own_pages_read_its_answers() -> None:
    asked = SERVICES["prefect-server"]["environment"]
    required = _VARIABLE.fullmatch(asked["PREFECT_SERVER_API_AUTH_STRING"])
    assert required is not None
    assert (required[1], required[2]) == ("PREFECT_API_AUTH_STRING", "?")  # without it nothing starts
    clients = {name for name, service in SERVICES.items() if "PREFECT_API_URL" in service.get("environment", ())}
    assert "prefect-worker" in clients
    assert {SERVICES[name]["environment"]["PREFECT_API_AUTH_STRING"] for name in clients} == {
        asked["PREFECT_SERVER_API_AUTH_STRING"]
    }
    assert filled(asked["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]) == "http://127.0.0.1:4200,http://localhost:4200"


@pytest.mark.parametrize("missing", SECRETS)
def test_compose_names_the_secret_that_is_missing(missing: str, compose: list[str]) -> None:
    given = {name: "x" for name in SECRETS if name != missing}
    done = configured(compose, **given)
    assert done.returncode != 0
    assert missing in done.stderr
    assert "openssl rand" in done.stderr


def test_every_port_is_published_on_loopback_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert not any(service.get("network_mode") == "host" for service in SERVICES.values())


def test_every_service_is_watched_and_started_again_and_waits_for_the_health_of_what_it_needs() -> None:
    for name, service in SERVICES.items():
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"], name
        assert {needed["condition"] for needed in service.get("depends_on", {}).values()} <= {"service_healthy"}, name
    assert SERVICES["prefect-worker"]["depends_on"].keys() == {"prefect-server", "ray-head"}


def test_every_service_of_ours_has_one_image_no_privileges_and_ray_only_with_a_token() -> None:
    ours = {name: service for name, service in SERVICES.items() if name != "postgres"}
    assert {service["image"] for service in ours.values()} == {f"${{LORAFLEET_IMAGE:-lorafleet:{PROJECT['version']}}}"}
    for name, service in ours.items():
        assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"]), name
        uses_ray = "ray start" in " ".join([*service["entrypoint"], *service.get("command", ())])
        assert uses_ray == (service["environment"].get("RAY_AUTH_MODE") == "token"), name
        assert uses_ray == ("RAY_AUTH_TOKEN" in service["environment"]), name
        assert uses_ray == any(volume.endswith(":/data") for volume in service["volumes"]), name


def test_prefects_settings_take_the_database_with_a_password_of_any_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import Settings
    from sqlalchemy import make_url

    for name, value in SERVICES["prefect-server"]["environment"].items():
        if value is not None:
            monkeypatch.setenv(name, filled(value, POSTGRES_PASSWORD="p@ss:w/rd#%"))
    url = Settings().server.database.connection_url
    assert url is not None
    address = make_url(url.get_secret_value())
    assert address.drivername == "postgresql+asyncpg"
    assert (address.host, address.username, address.database) == ("postgres", "prefect", "prefect")
    assert address.password == "p@ss:w/rd#%"
    assert Settings().server.ui.api_url == "http://127.0.0.1:4200/api"


@pytest.mark.parametrize("ends", ["ray", "prefect", "signal"])
def test_the_prefect_workers_container_ends_with_either_of_its_processes_and_leaves_none(
    ends: str, tmp_path: Path
) -> None:
    """The two are stand-ins. Both end themselves with SIGINT when SIGTERM comes, as Prefect's worker does."""
    for name in ("ray", "prefect"):
        lives = "true" if name == ends else "trap 'kill -INT $$' TERM; for second in {1..20}; do sleep 1 & wait; done"
        (tmp_path / name).write_text(f"#!/bin/bash\necho $$ > {tmp_path}/{name}.pid\n{lives}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    script = filled(SERVICES["prefect-worker"]["command"][0]).replace("$$", "$")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    as_init_does = (
        "env",
        "--default-signal=INT",
    )  # who runs these tests in the background ignores it, for all that they start
    process = subprocess.Popen([*as_init_does, "bash", "-c", script], env=environment, stderr=subprocess.DEVNULL)
    started = [tmp_path / f"{name}.pid" for name in ("ray", "prefect")]
    eventually(
        lambda: all(path.exists() and path.read_text() for path in started), seconds=10, what="both have started"
    )
    if ends == "signal":
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 1
    eventually(
        lambda: not any(psutil.pid_exists(int(path.read_text())) for path in started), seconds=5, what="both are gone"
    )


# Kubernetes

# The fields of KubeRay's custom resources that deploy/ uses, with their types, from its API reference (v1.6 and v1.7).
# No registry has a package with the schema itself. Everything below `template` is checked by Kubernetes' own schemas.
_REQUIRED = {"headGroupSpec", "rayStartParams", "template", "groupName", "minReplicas", "maxReplicas"}
_WORKER_GROUP = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "rayStartParams": dict,
    "template": dict,
}
KUBERAY: dict[str, tuple[Any, dict[str, type]]] = {
    "RayJobSpec": (
        RAYJOB,
        {
            "entrypoint": str,
            "backoffLimit": int,
            "activeDeadlineSeconds": int,
            "shutdownAfterJobFinishes": bool,
            "ttlSecondsAfterFinished": int,
            "rayClusterSpec": dict,
        },
    ),
    "RayClusterSpec": (
        CLUSTER,
        {"rayVersion": str, "authOptions": dict, "headGroupSpec": dict, "workerGroupSpecs": list},
    ),
    "AuthOptions": (CLUSTER["authOptions"], {"mode": str, "secretName": str}),
    "HeadGroupSpec": (GROUPS[0], {"rayStartParams": dict, "template": dict}),
    **{f"WorkerGroupSpec {group['groupName']}": (group, _WORKER_GROUP) for group in GROUPS[1:]},
}


@pytest.mark.parametrize("kind", ["PersistentVolumeClaim", "ConfigMap"])
def test_what_kubernetes_itself_reads_is_valid(kind: str) -> None:
    kubernetes_validate.validate(KUBERNETES[kind], _newest_kubernetes(), strict=True)


@pytest.mark.parametrize("name", PODS)
def test_every_pod_is_valid(name: str) -> None:
    template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": PODS[name]}
    kubernetes_validate.validate(template, _newest_kubernetes(), strict=True)


def _newest_kubernetes() -> str:
    return kubernetes_validate.latest_version()


@pytest.mark.parametrize("name", KUBERAY)
def test_every_field_for_kuberay_is_one_that_it_has(name: str) -> None:
    found, fields = KUBERAY[name]
    assert {key: type(value) for key, value in found.items()} == {key: fields.get(key) for key in found}
    assert fields.keys() & _REQUIRED <= found.keys()


def test_the_ray_job_is_what_kuberay_can_start() -> None:
    assert (KUBERNETES["RayJob"]["apiVersion"], KUBERNETES["RayJob"]["metadata"]) == (
        "ray.io/v1",
        {"name": "lorafleet-train"},
    )
    assert CLUSTER["rayVersion"] == PINNED["ray"]
    assert CLUSTER["authOptions"]["mode"] == "token"
    assert RAYJOB["shutdownAfterJobFinishes"], "ttlSecondsAfterFinished has no effect without it"
    for group in GROUPS:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for group in GROUPS[1:]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


@pytest.mark.parametrize("name", PODS)
def test_every_pod_has_the_image_of_this_version_no_privileges_and_the_store(name: str) -> None:
    pod = PODS[name]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == f"lorafleet:{PROJECT['version']}"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert not any("hostPort" in port for port in container.get("ports", ()))
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    ]
    assert claims == [KUBERNETES["PersistentVolumeClaim"]["metadata"]["name"]]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu")


def test_the_ray_job_trains_a_valid_config_into_the_claim_with_workers_that_fit(tmp_path: Path) -> None:
    from pipeline.config import load_config

    words = shlex.split(RAYJOB["entrypoint"])
    config, runs = (Path(words[words.index(option) + 1]) for option in ("--config", "--runs"))
    mounts = {
        mount["name"]: Path(mount["mountPath"]) for mount in PODS["head"]["spec"]["containers"][0]["volumeMounts"]
    }
    assert runs.is_relative_to(mounts["store"])
    assert config.parent == mounts["config"]
    (tmp_path / config.name).write_text(KUBERNETES["ConfigMap"]["data"][config.name], encoding="utf-8")
    loaded = load_config(str(tmp_path / config.name))
    for name in ("cpu", "gpu"):
        (container,) = PODS[name]["spec"]["containers"]
        assert float(container["resources"]["limits"]["cpu"]) >= float(loaded.compute.cpus_per_worker)
    assert "ReadWriteMany" in KUBERNETES["PersistentVolumeClaim"]["spec"]["accessModes"]


def test_kubernetes_own_reader_sees_the_same_as_ours(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here")
    (tmp_path / "rayjob.yaml").write_text(TEXTS["rayjob.yaml"], encoding="utf-8")
    (tmp_path / "kustomization.yaml").write_text("resources: [rayjob.yaml]\n", encoding="utf-8")
    done = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {document["kind"]: document for document in yaml.safe_load_all(done.stdout)} == KUBERNETES


# The image


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """Instruction and value of each line of the Dockerfile, in order."""
    parser = DockerfileParser(fileobj=BytesIO(TEXTS["Dockerfile"].encode()))
    return [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]


def values(steps: list[tuple[str, str]], instruction: str) -> list[str]:
    return [value for name, value in steps if name == instruction]


def test_the_image_runs_lorafleet_and_not_as_root(steps: list[tuple[str, str]]) -> None:
    last_stage = steps[max(index for index, (name, _) in enumerate(steps) if name == "FROM") :]
    (user,) = values(last_stage, "USER")
    assert int(user) > 0
    assert user == str(PODS["head"]["spec"]["securityContext"]["runAsUser"])
    assert values(steps, "ENTRYPOINT") == ['["lorafleet"]']
    assert values(steps, "WORKDIR")[-1] == "/data"
    assert not values(steps, "EXPOSE")
    assert not values(steps, "HEALTHCHECK")


def test_the_image_is_built_from_what_is_pinned_and_names_no_address(steps: list[tuple[str, str]]) -> None:
    from packaging.specifiers import SpecifierSet

    base = next(value for value in values(steps, "ARG") if value.startswith("BASE_IMAGE="))
    python = re.fullmatch(r"BASE_IMAGE=python:(\d+\.\d+)-slim-\w+", base)
    assert python and python[1] in SpecifierSet(PROJECT["requires-python"])
    assert {value.split(" ")[0] for value in values(steps, "FROM")} == {"${BASE_IMAGE}"}
    assert "TORCH_INDEX" in values(steps, "ARG"), "without a default: nobody should get CUDA's gigabytes by accident"
    installs = [line for value in values(steps, "RUN") for line in value.split("&&") if "pip install" in line]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in line for line in installs)
    assert f"torch=={PINNED['torch']}" in PROJECT["dependencies"]
    assert "://" not in TEXTS["Dockerfile"]
    assert not values(steps, "ADD")


def test_no_image_is_called_latest() -> None:
    images = [SERVICES["postgres"]["image"], *(pod["spec"]["containers"][0]["image"] for pod in PODS.values())]
    assert all(re.search(r":[\w.-]*\d", image) for image in images), images
    assert ":latest" not in "".join(TEXTS.values())


# Without the finder of this checkout's own installation, which would fill a gap.
_FROM_THE_IMAGE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
from flows import cli, deploying
from tasks.services.deploy_folder import deploy_file
assert deploying.FILE == deploy_file("prefect.yaml") and deploy_file("supervisord.conf")
cli.main(["train", "--dry-run"])
"""


def test_what_the_image_copies_is_let_through_and_runs_by_itself(steps: list[tuple[str, str]], tmp_path: Path) -> None:
    sources = [source for value in values(steps, "COPY") if "--from" not in value for source in value.split()[:-1]]
    patterns = [
        line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
    ]
    context = tmp_path / "context"
    for source in sources:
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        (context / source).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / source, context / source)
    planted = [
        ".env",
        "deploy/.env",
        "lorafleet.env",
        ".git/config",
        ".venv/bin/python",
        "runs/x/manifest.json",
        "tests/x.py",
    ]
    for name in planted:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_text("not to be sent", encoding="utf-8")
    sent = exclude_paths(str(context), patterns)
    assert sent.isdisjoint(planted)
    assert set(sources) <= sent
    image = tmp_path / "image"
    for name in sorted(sent):
        if (context / name).is_file():
            (image / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(context / name, image / name)
    environment = os.environ | {"PYTHONPATH": str(image)}
    command = [sys.executable, "-P", "-c", _FROM_THE_IMAGE]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "RottenTomatoes" in done.stdout


# Commands


def commands(program: str) -> dict[str, list[str]]:
    """Every command line of deploy/ that calls the program, as it stands there -> its arguments."""
    lines = [line for name in TEXTS if name.endswith(".md") for line in _code_lines(TEXTS[name])]
    lines.append(RAYJOB["entrypoint"])
    for service in SERVICES.values():
        lines += [shlex.join(service.get("entrypoint", ())), *"".join(service.get("command", ())).splitlines()]
    found = {}
    for line in lines:
        words = shlex.split(filled(line).rstrip("& "), comments=True) if program in line else []
        for index, word in enumerate(words):
            if word == program and _begins_a_command(words[:index]):
                found[line] = words[index + 1 :]
    return found


def _code_lines(text: str) -> Iterator[str]:
    for code in _CODE.finditer(text):
        yield from (code["block"] or " ".join((code["inline"] or "").split())).splitlines()


def _begins_a_command(before: list[str]) -> bool:
    """At the beginning, behind assignments, or as what another program is told to run."""
    return all("=" in word for word in before) or before[-1] == "--" or before[-2] == "exec"


def filled(text: str, **environment: str) -> str:
    """With compose's variables put in: those given, or their defaults."""
    return _VARIABLE.sub(lambda match: environment.get(match[1], match[3] if match[2] == "-" else "x"), text)


def parse_click(group: click.Command, name: str, arguments: list[str]) -> click.Context:
    """Parse as the command line would, and run nothing.

    Raises: click.UsageError: no such command, no such option, an argument is missing.
    """
    context = click.Context(group, info_name=name)
    command: click.Command | None = group
    while isinstance(command, click.Group):
        _, command, arguments = command.resolve_command(context, arguments)
    assert command is not None
    return command.make_context(command.name, arguments, parent=context)


def test_the_commands_are_found_wherever_they_stand() -> None:
    found = commands("lorafleet")
    names = {words[0] for words in found.values()}
    assert {"train", "up", "deploy", "doctor", "prune", "show", "publish"} <= names
    assert RAYJOB["entrypoint"] in found
    assert any(line.startswith("ray job submit") for line in found)
    assert {words[0] for words in commands("ray").values()} == {"start", "job"}
    assert {words[0] for words in commands("prefect").values()} == {"server", "worker"}


@pytest.mark.parametrize("line", commands("lorafleet"))
def test_every_lorafleet_command_is_one(line: str) -> None:
    from flows.cli import lorafleet

    parse_click(lorafleet, "lorafleet", commands("lorafleet")[line])


@pytest.mark.parametrize("line", commands("ray"))
def test_every_ray_command_is_one(line: str) -> None:
    from ray.scripts.scripts import cli

    parse_click(cli, "ray", commands("ray")[line])


@pytest.mark.parametrize("line", commands("prefect"))
def test_every_prefect_command_is_one(line: str) -> None:
    from prefect.cli._app import _app  # the public one runs what it parses

    _app.parse_args(commands("prefect")[line], exit_on_error=False, print_error=False)


def test_every_module_that_is_run_is_there() -> None:
    modules = {module for text in TEXTS.values() for module in re.findall(r" -m ([a-z][\w.]*\w)", text)}
    assert {"prefect.engine", "tasks.services.reports"} <= modules
    assert [module for module in sorted(modules) if importlib.util.find_spec(module) is None] == []


def test_every_entry_point_of_a_schedule_is_a_flow_that_takes_its_parameters() -> None:
    from prefect import Flow

    for deployment in yaml.safe_load(TEXTS["prefect.yaml"])["deployments"]:
        module, _, name = deployment["entrypoint"].rpartition(".")
        flow = getattr(importlib.import_module(module), name)
        assert isinstance(flow, Flow)
        assert deployment["parameters"].keys() <= flow.parameters.properties.keys()


def test_every_service_that_a_command_names_is_there() -> None:
    named = {match for text in TEXTS.values() for match in re.findall(r"docker compose exec (\S+)", text)}
    assert named
    assert named <= SERVICES.keys()


def test_the_readme_has_every_variable_that_the_compose_file_reads() -> None:
    read = {match[1] for match in _VARIABLE.finditer(TEXTS["docker-compose.yaml"])}
    passed_on = {
        name for service in SERVICES.values() for name, value in service["environment"].items() if value is None
    }
    table = TEXTS["README.md"].partition("| variable |")[2]
    assert [name for name in sorted(read | passed_on) if name not in table] == []


# Secrets

_SECRET_NAME = re.compile(r"(PASSWORD|TOKEN|SECRET|AUTH_STRING|API_KEY|CONNECTION_URL)$", re.IGNORECASE)
_FROM_OUTSIDE = re.compile(r"\$\{\w+(:\?[^}]*)?\}|sqlite\+aiosqlite:///.*")  # a default would be a secret that all have
_SECRET_TEXT = re.compile(
    r"hf_\w{16,}|gh[pousr]_\w{20,}|AKIA\w{16}|xox[a-z]-\w+|-----BEGIN|\b[0-9a-f]{32,}\b"
    r"|://[^/\s:@{}]+:[^/\s@{}]+@|hooks\.slack\.com/\w"
)


def given_secrets(node: Any, name: str = "") -> Iterator[str]:
    """Names of secrets whose value stands in the manifest, not a variable or a reference."""
    if isinstance(node, dict):
        if "value" in node and "name" in node:
            yield from given_secrets(node["value"], str(node["name"]))
        for key, value in node.items():
            yield from given_secrets(value, str(key))
    elif isinstance(node, list):
        for value in node:
            yield from given_secrets(value, name)
    elif isinstance(node, str) and _SECRET_NAME.search(name) and not _FROM_OUTSIDE.fullmatch(node):
        yield name


def test_no_manifest_holds_a_secret() -> None:
    documents = {name: list(yaml.safe_load_all(text)) for name, text in TEXTS.items() if name.endswith(".yaml")}
    assert {name: list(given_secrets(document)) for name, document in documents.items()} == {
        name: [] for name in documents
    }
    assert {name: _SECRET_TEXT.findall(text) for name, text in TEXTS.items()} == {name: [] for name in TEXTS}


def test_the_image_is_built_without_a_secret(steps: list[tuple[str, str]]) -> None:
    names = [
        name for value in (*values(steps, "ARG"), *values(steps, "ENV")) for name in re.findall(r"(\w+)(?:=|$)", value)
    ]
    assert "TORCH_INDEX" in names
    assert [name for name in names if _SECRET_NAME.search(name)] == []


@pytest.mark.parametrize(
    "planted",
    [
        {"environment": {"POSTGRES_PASSWORD": "prefect"}},
        {"env": [{"name": "HF_TOKEN", "value": "x"}]},
        {"stringData": {"auth_token": "x"}},
        {"environment": {"RAY_AUTH_TOKEN": "${RAY_AUTH_TOKEN:-x}"}},
    ],
)
def test_the_check_sees_a_secret_that_is_given(planted: dict[str, Any]) -> None:
    assert list(given_secrets(planted))


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "a" * 30,
        "postgresql://prefect:prefect@postgres/prefect",
        "0123456789abcdef" * 2,
        "-----BEGIN PRIVATE KEY-----",
    ],
)
def test_the_check_sees_what_looks_like_a_secret(text: str) -> None:
    assert _SECRET_TEXT.search(f"x: {text}")
