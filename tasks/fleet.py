"""The fleet: a local Ray or an existing cluster, and one worker per MTEB task on it."""

from __future__ import annotations

import os
import secrets
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from pipeline.config import ComputeConfig
from pipeline.errors import ConfigError, LorafleetError, first_line
from pipeline.machine import local_cpus
from tasks.children import last_fault
from tasks.fleet_worker import FleetLostError, FleetWorker, StoppedError
from tasks.network import check_listening
from tasks.services.temporary import ray_base, ray_folder
from tasks.worker import Worker

_OBJECT_STORE_BYTES = 150 * 1024**2  # receipts only travel through it
_ANSWER_SECONDS = 10
_STARTS = 2  # Ray gives itself half a minute, which a busy machine may exceed
_HEAD_LOST_SECONDS = 10  # then Ray ends this process: on one machine a head that is gone does not come back


class RayStartError(LorafleetError):
    """A local Ray does not start; on another try it may."""


class Fleet:
    """Starts Ray, hands out workers, and leaves no process behind."""

    def __init__(self, config: ComputeConfig, *, num_tasks: int, make_ahead: bool = False) -> None:
        """Start nothing yet.

        Args:
            config: Shares of a worker, and where Ray is.
            num_tasks: What the machine's CPUs are shared among, where the shares are ours to choose.
            make_ahead: Make the first workers as soon as a Ray of our own is up. They hold their places from then on.
        """
        self.config = config
        self._make_ahead = make_ahead
        self.address = config.ray_address or os.environ.get("RAY_ADDRESS") or None
        """Of an existing cluster: as configured, or as Ray's own variable names it (a job submitted to a cluster has it set)."""
        self._num_tasks = num_tasks
        self._started = threading.Event()
        self._stopping = threading.Event()
        self._released = threading.Event()
        self._keeper: threading.Thread | None = None
        self._fault: Exception | None = None
        self._slots = threading.Semaphore(0)
        self._workers: list[FleetWorker] = []
        self._made_ahead: list[Any] = []
        self._lock = threading.Lock()

    @property
    def cpus_per_worker(self) -> float:
        """CPU share of one worker: as configured, or an equal share of this machine, at least one."""
        if self.config.cpus_per_worker != "auto":
            return self.config.cpus_per_worker
        if self.address is not None:
            return 1.0
        return float(max(1, local_cpus() // self._num_tasks))

    def start(self) -> None:
        """Begin to start Ray; ``ready`` waits for it. What is done meanwhile costs no time."""
        self._keeper = threading.Thread(target=self._keep_ray, name="keep-ray", daemon=True)
        self._keeper.start()

    def start_ahead(self) -> None:
        """``start``, before anything else is: where a local Ray has no place for its files, that is raised at once.

        Raises: InputError, LorafleetError: as ``ray_base``.
        """
        if self.address is None:
            ray_base()
        self.start()

    def ready(self) -> None:
        """Wait for Ray.

        Raises:
            ConfigError: no cluster at ``compute.ray_address``, or it is too small for one worker.
            RayStartError, InputError, LorafleetError: a local Ray does not start; as ``ray_base``.
        """
        assert self._keeper is not None, "start() comes first"
        self._started.wait()
        if self._fault is not None:
            raise self._fault

    @property
    def gpus_per_worker(self) -> float:
        """GPU share of one worker; Ray must be up."""
        if self.config.gpus_per_worker != "auto":
            return self.config.gpus_per_worker
        import ray

        return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0

    @property
    def num_workers(self) -> int:
        """MTEB tasks at a time; Ray must be up.

        Raises: ConfigError: not one worker fits.
        """
        import ray

        there = ray.cluster_resources()
        shares = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # a worker cannot lie on two
        fit = sum(int(min(node.get(kind, 0) / share for kind, share in shares.items() if share)) for node in nodes)
        if fit < 1:
            raise ConfigError(
                f"a worker asks for {self.cpus_per_worker:g} CPUs and {self.gpus_per_worker:g} GPUs, but Ray has "
                f"{there.get('CPU', 0):g} and {there.get('GPU', 0):g}; lower its share: "
                "compute.cpus_per_worker, compute.gpus_per_worker (of classify: --cpus, --gpus)"
            )
        return fit if self.config.workers == "auto" else min(fit, self.config.workers)

    def worker(self) -> FleetWorker:
        """A worker; it gets a process when it is first called and a place is free."""
        worker = FleetWorker(self)
        with self._lock:
            self._workers.append(worker)
        return worker

    def __enter__(self) -> Self:
        if self._keeper is None:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill the workers and stop the Ray that was started here; a cluster of others goes on."""
        if self._keeper is None:
            return
        self._started.wait()
        self._stopping.set()  # first: who sees a killed worker now must not wait to try again
        for worker in self._workers:
            worker.stop()
        self._slots.release(len(self._workers) or 1)
        self._released.set()
        self._keeper.join()

    def check(self) -> None:
        """See that there is still something to work on.

        Raises:
            StoppedError: the fleet is being stopped.
            FleetLostError: no node is alive.
        """
        import ray

        if self._stopping.is_set():
            raise StoppedError("stopped")
        if not any(node["Alive"] for node in ray.nodes()):
            raise FleetLostError("Ray's last node is gone; start again, what was finished is kept")

    def _take_actor(self) -> Any:
        with self._lock:
            return self._made_ahead.pop() if self._made_ahead else self._make_actor()

    def _make_actor(self) -> Any:
        import ray

        shares = {"num_cpus": self.cpus_per_worker, "num_gpus": self.gpus_per_worker}
        worker = ray.remote(Worker).options(**shares, max_concurrency=2, max_restarts=0)
        return worker.remote(threads=max(1, int(self.cpus_per_worker)), use_gpu=self.gpus_per_worker > 0)

    def _keep_ray(self, starts: int = _STARTS) -> None:
        """Start Ray, and stop it from the same thread: a local Ray dies with the thread that started it, whatever has become of it."""
        try:
            with ExitStack() as ends:
                fault = self._start(ends)
                if starts == 1 or not isinstance(fault, RayStartError):
                    self._fault = fault
                    self._started.set()
                    self._released.wait()
                    return
        except Exception as error:
            self._fault = self._fault or error
            self._started.set()  # who waits for Ray shall not wait for ever
            raise
        self._keeper = threading.Thread(target=self._keep_ray, args=(starts - 1,), name="keep-ray", daemon=True)
        self._keeper.start()

    def _start(self, ends: ExitStack) -> Exception | None:
        """Start Ray, or join a cluster, and enter what undoes it; returns what went wrong."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray would let every other process of the machine go first
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Else a thread that still asks for its worker once all is stopped would join whatever Ray there is on the machine.
        os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
        try:
            options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
            if self.address is None:
                os.environ.setdefault(
                    "RAY_gcs_rpc_server_reconnect_timeout_s", str(_HEAD_LOST_SECONDS)
                )  # read by the import of Ray
                # Says whether Ray may be more than this machine. If so it listens on all interfaces, whatever address it is given.
                os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
                if not _token_can_be_kept():
                    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
                # Without "local", Ray would join whatever cluster a stale file names.
                options |= {"address": "local", "num_cpus": max(local_cpus(), int(self.cpus_per_worker))}
                options |= {
                    "_node_ip_address": "127.0.0.1",
                    "include_dashboard": False,
                    "object_store_memory": _OBJECT_STORE_BYTES,
                }
                options["_temp_dir"] = str(ends.enter_context(ray_folder()))
            else:
                options["address"] = self.address
                check_listening(self.address, timeout_seconds=_ANSWER_SECONDS)  # Ray itself would try for minutes
            import ray
            from ray.job_config import JobConfig

            if (
                "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ
            ):  # Ray marks a submitted job so; its folder may be the code itself
                # Or Ray would have its workers import from the driver's working folder first, which may hold a tasks.py of its own.
                options["job_config"] = JobConfig(_client_job=True)
            ends.callback(
                self._made_ahead.clear
            )  # after Ray: its core complains on standard error of an actor dropped while it is made
            ends.callback(ray.shutdown)
            if not ray.is_initialized():
                _init(options)
            num_workers = self.num_workers
            if self._make_ahead and self.address is None:  # of a cluster of others nothing is held that early
                self._made_ahead += [self._make_actor() for _ in range(min(num_workers, self._num_tasks))]
            self._slots.release(num_workers)
        except Exception as error:  # noqa: BLE001 - told by ready(), in the thread that waits
            if self.address is None or not isinstance(error, OSError | ValueError | RuntimeError):
                return error
            where = f"Ray address {self.address!r}"
            return ConfigError(
                f"{where}: no Ray cluster answers there: {error} (one with tokens needs RAY_AUTH_MODE=token)"
            )
        return None


def _init(options: dict[str, Any]) -> None:
    """Start a local Ray, or join a cluster.

    Raises: RayStartError: a local one does not start; where Ray names a reason of the machine's, and not of ours.
    """
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(**options)
    except Exception as error:
        of_the_machine = type(error) is Exception or isinstance(error, OSError | RuntimeError | RayError)
        if options["address"] != "local" or not of_the_machine:
            raise
        logs = Path(options["_temp_dir"]) / "session_latest" / "logs"
        said = next(filter(None, (last_fault(logs / name) for name in ("gcs_server.err", "raylet.err"))), "")
        raise RayStartError(
            f"Ray does not start on this machine: {first_line(error)}{f' ({said})' if said else ''}; give the same command again when "
            "the machine is less busy; `lorafleet doctor --start` says what it lacks"
        ) from error


def _token_can_be_kept() -> bool:
    """Whether Ray can keep the token of a local Ray where it does, in the home folder; in a container a user may have none."""
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return False
    return (folder / "auth_token").exists() or os.access(folder, os.W_OK)
