"""``lorafleet doctor``: check what a run needs of this environment, and advise what to do.

It has to work even if a library is broken. So libraries are imported in child processes, which may crash, and an
exception in a check becomes a line of the report.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import first_line
from pipeline.machine import local_cpus, read_answers
from tasks.checks import machine as checkup
from tasks.checks.libraries import Answers, Libraries
from tasks.checks.machine import Check, guarded, readable_bytes
from tasks.checks.servers import Deferred, check_address, check_hub, check_prefect, check_proxy, in_time
from tasks.services.temporary import check_temporary

_TRIAL_SECONDS = 180.0  # importing torch from a cold disk is slow
_CLUSTER_SECONDS = 45.0  # without the token of a cluster, Ray tries for minutes
_START_SECONDS = 120.0  # a local Ray is started again if the first start takes too long
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "true"}
_CLUSTER_ADVICE = (
    "make sure that Ray and Python have the same versions there, and that RAY_AUTH_MODE and the token are set if it "
    "needs one"
)


def examine(runs: Path, *, ray_address: str | None = None, start_ray: bool = False) -> list[Check]:
    """Run all checks. Those that wait for a network or another process run concurrently.

    Args:
        runs: Run store, which may not exist yet.
        ray_address: Address of a Ray cluster. Defaults to ``RAY_ADDRESS``.
        start_ray: Whether to start and stop a local Ray, if no cluster is named.
    Returns:
        Results in the order of the report. No check raises an exception.
    """
    address = ray_address or os.environ.get("RAY_ADDRESS") or None
    proxy = guarded("proxy", check_proxy)  # first, because the other checks use it
    prefect, hub = (
        Deferred(lambda: guarded("Prefect API", check_prefect)),
        Deferred(lambda: guarded("Hub", check_hub)),
    )
    listening = Deferred(lambda: check_address(address or ""))
    libraries = Libraries()
    over_torch = Deferred(lambda: try_out([*libraries.modules(over_torch=True), "@compute", "@gpu"]))
    others = Deferred(lambda: try_out(libraries.modules(over_torch=False)))
    unreachable = _unreachable(listening)
    ray = [f"@ray={address or ''}"] if (address or start_ray) and unreachable is None else []
    joined = Deferred(lambda: try_out(ray, seconds=_CLUSTER_SECONDS if address else _START_SECONDS))
    local = [guarded(name, check) for name, check in _local(runs).items()]
    answers = {**over_torch.result(), **others.result(), **joined.result()}
    return [
        *libraries.checks(answers),
        guarded("computing", lambda: _check_computing(answers["@compute"])),
        guarded("GPU", lambda: check_gpu(answers["@gpu"], driver=_gpu_driver())),
        unreachable or guarded("Ray", lambda: _check_ray(address, answers[ray[0]] if ray else None)),
        proxy,
        in_time("Prefect API", prefect),
        in_time("Hub", hub),
        *local,
    ]


def report(checks: Sequence[Check], *, as_json: bool) -> str:
    """Format the results.

    Args:
        checks: Results of the checks.
        as_json: Whether to return one JSON object instead of lines of text.
    """
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
    """Perform steps of ``tasks.checks.trial`` in child processes.

    Args:
        steps: The steps. If one crashes or hangs, the remaining steps run in a new process.
        seconds: Time limit of a process.
    Returns:
        The answer of each step. A step that crashed or took too long has an ``error``.
    """
    answers: dict[str, Mapping[str, Any]] = {}
    todo = list(steps)
    while todo:
        try:
            out, ending = _trial(todo, seconds)
        except OSError as error:  # the process or its temporary folder cannot be created
            out, ending = b"", f"it cannot be tried: {first_line(error)}"
        lines = read_answers(out.splitlines())
        answers |= {line["step"]: line for line in lines}
        if len(lines) < len(todo):
            answers[todo[len(lines)]] = {"error": ending}
        todo = todo[len(lines) + 1 :]
    return answers


def _trial(steps: Sequence[str], seconds: float) -> tuple[bytes, str]:
    """Run one process with the steps. Return its output, and how it ended."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "tasks.checks.trial",
        *steps,
    ]  # -P: ignore modules in the working folder
    environment = os.environ | _QUIET
    with tempfile.TemporaryDirectory(prefix="lorafleet-doctor-") as home:
        if "PREFECT_API_URL" not in environment:
            # Importing Prefect creates this folder. A run has its own as well.
            environment.setdefault("PREFECT_HOME", home)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired as error:
            return error.stdout or b"", f"no answer in {seconds:g} s"
        return done.stdout, _ending(done)


def check_gpu(answer: Mapping[str, Any], *, driver: str) -> Check:
    """Check whether torch can use a GPU of this machine.

    Args:
        answer: Answer of the step ``@gpu``.
        driver: Version of the NVIDIA driver; empty if there is none.
    """
    facts = answer.get("facts", {})
    if gpus := facts.get("gpus"):
        each = ", ".join(
            f"{gpu['name']} ({readable_bytes(gpu['free'])} of {readable_bytes(gpu['total'])} free)" for gpu in gpus
        )
        return Check("ok", "GPU", f"{each}; torch for CUDA {facts['cuda']}, driver {driver or 'unknown'}")
    if not driver:
        return Check(
            "warning", "GPU", "none: training computes on the CPU", "if this machine has a GPU, install its driver"
        )
    prefix, fitting = f"there is an NVIDIA driver, {driver}, but", "install the torch build for this driver and GPU"
    if "error" in answer:  # a run would choose the GPU, and fail
        advice = f"{fitting}, or train on the CPU: --set compute.gpus_per_worker=0"
        return Check("fault", "GPU", f"{prefix} torch cannot compute on it: {answer['error']}", advice)
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return Check("warning", "GPU", f"{prefix} CUDA_VISIBLE_DEVICES hides every GPU", "unset it")
    built = f"for CUDA {facts['cuda']}" if facts["cuda"] else "for the CPU only"
    reason = f": {facts['said']}" if facts["said"] else ""
    return Check(
        "warning", "GPU", f"{prefix} torch {facts['torch']}, which is built {built}, sees no GPU{reason}", fitting
    )


def _check_computing(answer: Mapping[str, Any]) -> Check:
    if "error" in answer:
        return Check("warning", "computing", f"unknown: {answer['error']}", "fix the libraries first")
    facts = answer["facts"]
    why = "which it multiplies natively" if facts["dtype"] == "bfloat16" else "because bfloat16 is not faster on it"
    return Check(
        "ok",
        "computing",
        f"{local_cpus()} cores; trains on {facts['device']} ({facts['processor']}) in {facts['dtype']}, {why}",
    )


def _check_ray(address: str | None, answer: Mapping[str, Any] | None) -> Check:
    """Check Ray by the answer of the step ``@ray``, if it was performed."""
    if answer is None:
        return Check("ok", "Ray", "no cluster is named: a run starts a local Ray and stops it (--start tries that)")
    what = f"the cluster at {address}" if address else "a local Ray"
    if "error" in answer:
        advice = _CLUSTER_ADVICE if address else "follow the message; if it names a library, fix that first"
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


def _unreachable(listening: Deferred[Check | None]) -> Check | None:
    try:
        return listening.result(seconds=3)
    except TimeoutError as error:
        return Check("warning", "Ray", str(error), "check the network, and RAY_ADDRESS (compute.ray_address)")


def _ending(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode < 0:
        return f"its process was ended by {signal.Signals(-done.returncode).name}"
    last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return f"its process ended with exit code {done.returncode}: {last[:300]}"


def _gpu_driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module\D*([\d.]+)", path.read_text(encoding="utf-8")) if path.exists() else None
    return found[1] if found else ""
