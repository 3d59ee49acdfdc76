"""Fleet of workers, one per MTEB task, on a local Ray or an existing cluster."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from typing import Any, Self

from pipeline.config import ComputeConfig
from pipeline.errors import ConfigError
from pipeline.machine import local_cpus
from tasks.fleet_worker import FleetLostError, FleetWorker, StoppedError
from tasks.ray_start import RayStartError, start_ray
from tasks.services.temporary import ray_base
from tasks.worker import Worker

_STARTS = 2  # Ray allows itself half a minute, which may be too short on a busy machine


class Fleet:
    """Starts Ray, hands out workers, and leaves no process behind."""

    def __init__(self, config: ComputeConfig, *, num_tasks: int, make_ahead: bool = False) -> None:
        """Start nothing yet.

        Args:
            config: Resources of a worker, and address of Ray.
            num_tasks: Number of MTEB tasks or units, among which ``auto`` divides the CPUs of this machine.
            make_ahead: Whether to start the first workers as soon as a local Ray is up. They hold their resources from
                then on.
        """
        self.config = config
        self._make_ahead = make_ahead
        self.address = config.ray_address or os.environ.get("RAY_ADDRESS") or None
        """Address of an existing cluster: ``compute.ray_address``, or RAY_ADDRESS, which Ray sets in submitted jobs."""
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
        """CPUs of one worker: as configured; or 1 on a cluster; or an equal share of this machine, at least 1."""
        if self.config.cpus_per_worker != "auto":
            return self.config.cpus_per_worker
        if self.address is not None:
            return 1.0
        return float(max(1, local_cpus() // self._num_tasks))

    def start(self) -> None:
        """Start Ray in the background. ``ready`` waits for it."""
        self._keeper = threading.Thread(target=self._keep_ray, name="keep-ray", daemon=True)
        self._keeper.start()

    def start_ahead(self) -> None:
        """Start as ``start`` does, but check first that a local Ray has a folder for its files.

        Raises:
            InputError, LorafleetError: as ``ray_base``.
        """
        if self.address is None:
            ray_base()
        self.start()

    def ready(self) -> None:
        """Wait until Ray is up.

        Raises:
            ConfigError: no cluster answers at the address, or it is too small for one worker.
            RayStartError: a local Ray does not start.
            InputError, LorafleetError: as ``ray_base``.
        """
        assert self._keeper is not None, "start() comes first"
        self._started.wait()
        if self._fault is not None:
            raise self._fault

    @property
    def gpus_per_worker(self) -> float:
        """GPUs of one worker: as configured, or 1 if Ray has a GPU, else 0. Ray must be up."""
        if self.config.gpus_per_worker != "auto":
            return self.config.gpus_per_worker
        import ray

        return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0

    @property
    def num_workers(self) -> int:
        """Number of workers that fit at a time. Ray must be up.

        Raises:
            ConfigError: not even one worker fits.
        """
        import ray

        total = ray.cluster_resources()
        shares = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # a worker cannot span two nodes
        fit = sum(int(min(node.get(kind, 0) / share for kind, share in shares.items() if share)) for node in nodes)
        if fit < 1:
            raise ConfigError(
                f"a worker needs {self.cpus_per_worker:g} CPUs and {self.gpus_per_worker:g} GPUs, but Ray has "
                f"{total.get('CPU', 0):g} and {total.get('GPU', 0):g}; lower its share: "
                "compute.cpus_per_worker, compute.gpus_per_worker (of classify: --cpus, --gpus)"
            )
        return fit if self.config.workers == "auto" else min(fit, self.config.workers)

    def worker(self) -> FleetWorker:
        """Create a worker. Its process starts with the first call, as soon as a slot is free."""
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
        """Kill the workers. Shut Ray down only if this process started it."""
        if self._keeper is None:
            return
        self._started.wait()
        self._stopping.set()  # first, so that calls of killed workers are not retried
        for worker in self._workers:
            worker.stop()
        self._slots.release(len(self._workers) or 1)
        self._released.set()
        self._keeper.join()

    def check(self) -> None:
        """Check that workers can still run.

        Raises:
            StoppedError: the fleet is being stopped.
            FleetLostError: no node is alive.
        """
        import ray

        if self._stopping.is_set():
            raise StoppedError("stopped")
        if not any(node["Alive"] for node in ray.nodes()):
            raise FleetLostError("Ray's last node is lost; run the command again, finished work is kept")

    def _take_actor(self) -> Any:
        with self._lock:
            return self._made_ahead.pop() if self._made_ahead else self._make_actor()

    def _make_actor(self) -> Any:
        import ray

        shares = {"num_cpus": self.cpus_per_worker, "num_gpus": self.gpus_per_worker}
        worker = ray.remote(Worker).options(**shares, max_concurrency=2, max_restarts=0)
        return worker.remote(threads=max(1, int(self.cpus_per_worker)), use_gpu=self.gpus_per_worker > 0)

    def _keep_ray(self, starts: int = _STARTS) -> None:
        """Start Ray and stop it in the same thread, because a local Ray ends with the thread that started it."""
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
            self._started.set()  # else ``ready`` would wait forever
            raise
        self._keeper = threading.Thread(target=self._keep_ray, args=(starts - 1,), name="keep-ray", daemon=True)
        self._keeper.start()

    def _start(self, ends: ExitStack) -> Exception | None:
        """Start Ray or join a cluster, and register the cleanup.

        Args:
            ends: Receives the callbacks that undo the start.
        Returns:
            The error, if any.
        """
        ends.callback(self._made_ahead.clear)  # runs after Ray's shutdown: earlier, Ray's core would print warnings
        try:
            start_ray(self.address, num_cpus=max(local_cpus(), int(self.cpus_per_worker)), ends=ends)
            num_workers = self.num_workers
            if self._make_ahead and self.address is None:  # not on a shared cluster
                self._made_ahead += [self._make_actor() for _ in range(min(num_workers, self._num_tasks))]
            self._slots.release(num_workers)
        except Exception as error:  # noqa: BLE001 - ready() raises it, in the thread that waits
            if self.address is None or not isinstance(error, OSError | ValueError | RuntimeError):
                return error
            return ConfigError(
                f"Ray address {self.address!r}: no Ray cluster answers there: {error} "
                "(one with tokens needs RAY_AUTH_MODE=token)"
            )
        return None
