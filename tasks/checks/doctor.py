"""``lorafleet doctor``: what a run needs of this environment, and what to do about what is missing.

Has to work where a library is broken: they are imported by processes that may die of it, and what a check raises is a line of the report.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import first_line
from pipeline.machine import local_cpus, read_answers
from tasks.checks import machine as checkup
from tasks.checks.machine import Check, readable_bytes
from tasks.checks.servers import Deferred, check_address, check_hub, check_prefect, check_proxy, in_time
from tasks.services.temporary import check_temporary

if TYPE_CHECKING:
    from packaging.requirements import Requirement

Answers = Mapping[str, Mapping[str, Any]]
"""Step of ``tasks.checks.trial`` -> its ``facts``, or its ``error``."""

_TRIAL_SECONDS = 180.0  # a cold disk takes its time over torch
_CLUSTER_SECONDS = 45.0  # where a cluster asks for a token and gets none, Ray tries for minutes
_START_SECONDS = 120.0  # a local Ray is started twice where the first start takes too long
_MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}  # those that are not called as their distribution
_OVER_TORCH = (
    "torch",
    "transformers",
    "datasets",
    "mteb",
    "peft",
    "safetensors",
    "sentence-transformers",
    "scikit-learn",
    "scipy",
)
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "true"}
_CLUSTER_ADVICE = (
    "see that Ray and Python are of the same version there, and that RAY_AUTH_MODE and the token are set where it asks "
    "for one"
)
_CHECKOUT = Path(__file__).parents[2]


def examine(runs: Path, *, ray_address: str | None = None, start_ray: bool = False) -> list[Check]:
    """Every check, at the same time where one waits for a network or another process; none of them raises.

    Args:
        runs: The run store; need not be there.
        ray_address: Of a cluster; left out, that of ``RAY_ADDRESS``.
        start_ray: Where no cluster is named, start a local Ray and stop it again.
    """
    address = ray_address or os.environ.get("RAY_ADDRESS") or None
    proxy = _guarded("proxy", check_proxy)  # first: the others ask through it
    prefect, hub = (
        Deferred(lambda: _guarded("Prefect API", check_prefect)),
        Deferred(lambda: _guarded("Hub", check_hub)),
    )
    listening = Deferred(lambda: check_address(address or ""))
    libraries = _Libraries()
    over_torch = Deferred(lambda: try_out([*libraries.modules(over_torch=True), "@compute", "@gpu"]))
    others = Deferred(lambda: try_out(libraries.modules(over_torch=False)))
    unreachable = _unreachable(listening)
    ray = [f"@ray={address or ''}"] if (address or start_ray) and unreachable is None else []
    joined = Deferred(lambda: try_out(ray, seconds=_CLUSTER_SECONDS if address else _START_SECONDS))
    local = [_guarded(name, check) for name, check in _local(runs).items()]
    answers = {**over_torch.result(), **others.result(), **joined.result()}
    return [
        *libraries.checks(answers),
        _guarded("computing", lambda: _check_computing(answers["@compute"])),
        _guarded("GPU", lambda: check_gpu(answers["@gpu"], driver=_gpu_driver())),
        unreachable or _guarded("Ray", lambda: _check_ray(address, answers[ray[0]] if ray else None)),
        proxy,
        in_time("Prefect API", prefect),
        in_time("Hub", hub),
        *local,
    ]


def report(checks: Sequence[Check], *, as_json: bool) -> str:
    """One line per check and one for all of them; or one JSON object."""
    faults, warnings = (sum(check.status == status for check in checks) for status in ("fault", "warning"))
    if as_json:
        return json.dumps(
            {"faults": faults, "warnings": warnings, "checks": [dataclasses.asdict(check) for check in checks]},
            indent=1,
        )
    width = max(len(check.name) for check in checks)
    lines = [
        f"{check.status:9}{check.name:{width}}  {check.found}{f'; {check.advice}' if check.advice else ''}"
        for check in checks
    ]
    return "\n".join([*lines, f"faults: {faults}, warnings: {warnings}"])


def try_out(steps: Sequence[str], *, seconds: float = _TRIAL_SECONDS) -> Answers:
    """What ``tasks.checks.trial`` answers within so many seconds; a step that takes longer, or its process with it, costs only itself."""
    answers: dict[str, Mapping[str, Any]] = {}
    todo = list(steps)
    while todo:
        try:
            out, ending = _trial(todo, seconds)
        except OSError as error:  # no process, or no temporary folder for it
            out, ending = b"", f"it cannot be tried: {first_line(error)}"
        lines = read_answers(out.splitlines())
        answers |= {line["step"]: line for line in lines}
        if len(lines) < len(todo):
            answers[todo[len(lines)]] = {"error": ending}
        todo = todo[len(lines) + 1 :]
    return answers


def _trial(steps: Sequence[str], seconds: float) -> tuple[bytes, str]:
    """Its answers, and how it ended."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "tasks.checks.trial",
        *steps,
    ]  # -P: the working folder may hold a module of any name
    environment = os.environ | _QUIET
    with tempfile.TemporaryDirectory(prefix="lorafleet-doctor-") as home:
        if "PREFECT_API_URL" not in environment:
            environment.setdefault(
                "PREFECT_HOME", home
            )  # which Prefect makes when it is imported; a run has its own, too
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired as error:
            return error.stdout or b"", f"no answer in {seconds:g} s"
        return done.stdout, _ending(done)


def check_gpu(answer: Mapping[str, Any], *, driver: str) -> Check:
    """What torch can compute on.

    Args:
        answer: Of the step ``@gpu``.
        driver: Version of this machine's NVIDIA driver; empty if it has none.
    """
    facts = answer.get("facts", {})
    if gpus := facts.get("gpus"):
        each = ", ".join(
            f"{gpu['name']} ({readable_bytes(gpu['free'])} of {readable_bytes(gpu['total'])} free)" for gpu in gpus
        )
        return Check("ok", "GPU", f"{each}; torch for CUDA {facts['cuda']}, driver {driver or 'not known'}")
    if not driver:
        return Check(
            "warning", "GPU", "none: training computes on the CPU", "if this machine has a GPU, install its driver"
        )
    there, fitting = f"there is an NVIDIA driver, {driver}, but", "install the torch that fits driver and GPU"
    if "error" in answer:  # a run would choose the GPU, and fail
        advice = f"{fitting}, or train on the CPU: --set compute.gpus_per_worker=0"
        return Check("fault", "GPU", f"{there} torch cannot compute on it: {answer['error']}", advice)
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return Check("warning", "GPU", f"{there} CUDA_VISIBLE_DEVICES hides every GPU", "unset it")
    built = f"for CUDA {facts['cuda']}" if facts["cuda"] else "for the CPU only"
    said = f": {facts['said']}" if facts["said"] else ""
    return Check(
        "warning", "GPU", f"{there} torch {facts['torch']}, which is built {built}, sees no GPU{said}", fitting
    )


class _Libraries:
    """What the project requires; read once, and without any of it but ``packaging``."""

    def __init__(self) -> None:
        self._required: list[Requirement] = []
        self._python = ""
        self._fault: Check | None = None
        try:
            self._read()
        except Exception as error:  # noqa: BLE001 - a broken packaging may raise anything
            found = f"what lorafleet requires cannot be read: {type(error).__name__}: {first_line(error)}"
            self._fault = Check("fault", "lorafleet", found, "`make setup` in its checkout, or `pip install` it again")

    def modules(self, *, over_torch: bool) -> list[str]:
        """Names to import, of those that import torch, or of the others."""
        return [_module(one.name) for one in self._required if (one.name in _OVER_TORCH) == over_torch]

    def checks(self, answers: Answers) -> list[Check]:
        """Python, then each library."""
        if self._fault is not None:
            return [self._fault]
        each = [
            _guarded(one.name, functools.partial(_check_library, one, answers[_module(one.name)]))
            for one in self._required
        ]
        return [_guarded("Python", lambda: _check_python(self._python)), *each]

    def _read(self) -> None:
        from packaging.requirements import Requirement

        try:  # a checkout may ask for more than when it was installed
            project = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            self._python, lines = project["requires-python"], project["dependencies"]
        except FileNotFoundError:
            metadata = importlib.metadata.metadata("lorafleet")
            self._python, lines = metadata["Requires-Python"], metadata.get_all("Requires-Dist") or []
        all_required = map(Requirement, lines)
        self._required = [one for one in all_required if one.marker is None or one.marker.evaluate({"extra": ""})]


def _check_python(required: str) -> Check:
    from packaging.specifiers import SpecifierSet

    found = platform.python_version()
    if SpecifierSet(required).contains(found, prereleases=True):
        return Check("ok", "Python", f"{found} ({required}), {sys.executable}")
    return Check(
        "fault", "Python", f"{found}, expected {required}", "make the virtual environment again with another Python"
    )


def _check_library(required: Requirement, answer: Mapping[str, Any]) -> Check:
    again = f"pip install --force-reinstall --constraint constraints.txt '{required.name}{_extras(required)}{required.specifier}'"
    try:
        version = importlib.metadata.version(required.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(
            "fault", required.name, f"not installed, expected {required.specifier}", "`make setup`, or " + again
        )
    if not required.specifier.contains(version, prereleases=True):
        return Check("fault", required.name, f"{version}, expected {required.specifier}", "`make setup`, or " + again)
    if "error" in answer:
        return Check("fault", required.name, f"{version} cannot be imported: {answer['error']}", again)
    return Check("ok", required.name, f"{version} ({required.specifier})")


def _check_computing(answer: Mapping[str, Any]) -> Check:
    if "error" in answer:
        return Check("warning", "computing", f"not known: {answer['error']}", "mend the libraries first")
    facts = answer["facts"]
    why = "which it multiplies natively" if facts["dtype"] == "bfloat16" else "for it multiplies bfloat16 no faster"
    return Check(
        "ok",
        "computing",
        f"{local_cpus()} cores; trains on {facts['device']} ({facts['processor']}) in {facts['dtype']}, {why}",
    )


def _check_ray(address: str | None, answer: Mapping[str, Any] | None) -> Check:
    """With the answer of the step ``@ray``, if it was done."""
    if answer is None:
        return Check("ok", "Ray", "no cluster is named: a run starts a local Ray and stops it (--start tries that)")
    what = f"the cluster at {address}" if address else "a local Ray"
    if "error" in answer:
        advice = _CLUSTER_ADVICE if address else "do what it says; if it names a library, mend that first"
        return Check("warning", "Ray", f"{what} cannot be used: {answer['error']}", advice)
    facts = answer["facts"]
    share = f"{facts['cpus_per_worker']:g} CPUs and {facts['gpus_per_worker']:g} GPUs"
    found = "answers" if address else "was started and stopped"
    return Check("ok", "Ray", f"{what} {found}: room for {facts['workers']} workers of {share} each")


def _local(runs: Path) -> dict[str, Callable[[], Check]]:
    return {
        "bytecode": checkup.check_bytecode,
        "disk": lambda: checkup.check_disk(runs),
        "temporary files": check_temporary,
        "home": checkup.check_home,
        "shared memory": checkup.check_shared_memory,
        "memory": checkup.check_memory,
        "open files": checkup.check_open_files,
        "run store": lambda: checkup.check_store(runs),
        "checkpoints": lambda: checkup.check_checkpoints(runs),
    }


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a report with a hole is better than none
        return Check(
            "warning", name, f"not looked at: {type(error).__name__}: {first_line(error)}", "mend what that names first"
        )


def _unreachable(listening: Deferred[Check | None]) -> Check | None:
    try:
        return listening.result(seconds=3)
    except TimeoutError as error:
        return Check("warning", "Ray", str(error), "look after the network, and RAY_ADDRESS (compute.ray_address)")


def _ending(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode < 0:
        return f"its process was ended by {signal.Signals(-done.returncode).name}"
    last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return f"its process ended with exit code {done.returncode}: {last[:300]}"


def _module(distribution: str) -> str:
    return _MODULES.get(distribution, distribution.replace("-", "_"))


def _extras(required: Requirement) -> str:
    return f"[{','.join(sorted(required.extras))}]" if required.extras else ""


def _gpu_driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module\D*([\d.]+)", path.read_text(encoding="utf-8")) if path.exists() else None
    return found[1] if found else ""
