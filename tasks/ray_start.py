"""Start of a local Ray, or connection to a cluster."""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.errors import LorafleetError, first_line
from tasks.children import last_fault
from tasks.network import check_listening
from tasks.services.temporary import ray_folder

_OBJECT_STORE_BYTES = 150 * 1024**2  # only receipts pass through it
_ANSWER_SECONDS = 10
_HEAD_LOST_SECONDS = 10  # then Ray ends this process: a local head that is lost does not come back


class RayStartError(LorafleetError):
    """A local Ray did not start. Another attempt may succeed."""


def start_ray(address: str | None, *, num_cpus: int, ends: ExitStack) -> None:
    """Start a local Ray or join a cluster, unless this process is connected already.

    Args:
        address: Address of the cluster; None for a local Ray.
        num_cpus: Number of CPUs of a local Ray.
        ends: Receives the callbacks that undo the start.
    Raises:
        RayStartError: a local Ray does not start.
        InputError, LorafleetError: as ``ray_base``.
        OSError, ValueError, RuntimeError: no cluster answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default gives way to every other process
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Else a thread that requests its worker after the shutdown would join any Ray on the machine.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        options |= _local_options(num_cpus, ends)
    else:
        options["address"] = address
        check_listening(address, timeout_seconds=_ANSWER_SECONDS)  # Ray itself would try for minutes
    import ray
    from ray.job_config import JobConfig

    # Else Ray's workers would import from the driver's working folder first, which may hold a tasks.py. Ray sets the
    # variable in a submitted job, whose working folder may be lorafleet itself.
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        options["job_config"] = JobConfig(_client_job=True)
    ends.callback(ray.shutdown)
    if not ray.is_initialized():
        _init(options)


def _local_options(num_cpus: int, ends: ExitStack) -> dict[str, Any]:
    # Read when Ray is imported.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(_HEAD_LOST_SECONDS))
    # Whether Ray may span machines. If so, it listens on all interfaces, whatever address it is given.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if not _token_can_be_kept():
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    return {
        "address": "local",  # else Ray would join any cluster that a stale file names
        "num_cpus": num_cpus,
        "_node_ip_address": "127.0.0.1",
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_temp_dir": str(ends.enter_context(ray_folder())),
    }


def _init(options: dict[str, Any]) -> None:
    """Call ``ray.init``.

    Raises:
        RayStartError: a local Ray does not start, for a reason that is not a bug of ours.
        Exception: any other error of Ray.
    """
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(**options)
    except Exception as error:
        is_local_fault = type(error) is Exception or isinstance(error, OSError | RuntimeError | RayError)
        if options["address"] != "local" or not is_local_fault:
            raise
        logs = Path(options["_temp_dir"]) / "session_latest" / "logs"
        reason = next(filter(None, (last_fault(logs / name) for name in ("gcs_server.err", "raylet.err"))), "")
        raise RayStartError(
            f"Ray does not start on this machine: {first_line(error)}{f' ({reason})' if reason else ''}; "
            "run the command again when the machine is less busy; `lorafleet doctor --start` says what is missing"
        ) from error


def _token_can_be_kept() -> bool:
    """Whether Ray can write a local Ray's token to the home folder. In a container the user may have none."""
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return False
    return (folder / "auth_token").exists() or os.access(folder, os.W_OK)
