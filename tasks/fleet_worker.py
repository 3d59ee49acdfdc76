"""The driver's handle of a worker, and the errors of a fleet."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipeline.errors import LorafleetError

if TYPE_CHECKING:
    from pipeline.run.plan import JobSpec
    from tasks.fleet import Fleet

_POLL_SECONDS = 0.5


class WorkerDiedError(LorafleetError):
    """The worker's process was killed, ran out of memory, or lost its node. A new process can resume the work."""


class FleetLostError(LorafleetError):
    """No node of the fleet is left to run a worker on."""


class StoppedError(LorafleetError):
    """The run is being stopped."""


class FleetWorker:
    """Handle of a worker. If the worker's process has died, the next call starts a new one."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._spec: JobSpec | None = None
        self._actor: Any = None
        self._has_slot = False

    def begin(self, spec: JobSpec) -> None:
        """Assign the MTEB task whose stages are called next."""
        self._spec = spec
        if self._actor is not None:
            self._actor.begin.remote(spec)

    def call(
        self, stage: str, *arguments: Any, on_event: Callable[[Any], None] = lambda event: None, timeout_seconds: float
    ) -> Any:
        """Run a method of the worker, and wait for its result.

        Args:
            stage: Name of the method: a stage of the MTEB task, or ``check``.
            arguments: Its arguments.
            on_event: Called with each event that the worker reports meanwhile.
            timeout_seconds: Longest time that it may take.
        Raises:
            WorkerDiedError: the process has died or took too long; the next call starts a new one.
            ConfigError: as ``Fleet.ready``.
            LorafleetError: any error that the stage raised.
            FleetLostError, StoppedError: as ``Fleet.check``.
        """
        actor = self._ready()
        import ray
        from ray.exceptions import RayError, RayTaskError

        answer = getattr(actor, stage).remote(*arguments)
        deadline = time.monotonic() + timeout_seconds
        try:
            while not ray.wait([answer], timeout=_POLL_SECONDS)[0]:
                self._pass_on(actor, on_event)
                self._check_clock(stage, deadline, timeout_seconds)
            result = ray.get(answer)
            with suppress(RayError):  # a worker that dies now has finished its work
                self._pass_on(actor, on_event)
            return result
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:  # died, out of memory, lost its node, or no resources left
            self._actor = None
            if getattr(error, "actor_init_failed", False):  # a new process would fail in the same way
                why = str(error).strip().splitlines()[-1][:300]
                raise LorafleetError(
                    f"{self._name}a worker cannot start: {why}; `lorafleet doctor` says what is missing"
                ) from error
            self._fleet.check()
            raise WorkerDiedError(f"{self._name}its worker died while it ran {stage!r}") from None

    def release(self) -> None:
        """Kill the process, and free its slot."""
        self.stop()
        if self._has_slot:
            self._has_slot = False
            self._fleet._slots.release()

    def stop(self) -> None:
        """Kill the process."""
        import ray

        actor, self._actor = self._actor, None
        if actor is not None and ray.is_initialized():
            ray.kill(actor)

    def _ready(self) -> Any:
        self._fleet.ready()
        if not self._has_slot:
            self._fleet._slots.acquire()
            self._has_slot = True
        self._fleet.check()
        if self._actor is None:
            self._actor = self._fleet._take_actor()
            if self._spec is not None:
                self._actor.begin.remote(self._spec)
        return self._actor

    @property
    def _name(self) -> str:
        return "" if self._spec is None else f"{self._spec.mteb_task.name}: "

    def _pass_on(self, actor: Any, on_event: Callable[[Any], None]) -> None:
        import ray
        from ray.exceptions import GetTimeoutError

        try:
            for event in ray.get(actor.events.remote(), timeout=30):
                on_event(event)
        except GetTimeoutError:
            return  # the worker is busy, or not started yet

    def _check_clock(self, stage: str, deadline: float, timeout_seconds: float) -> None:
        self._fleet.check()
        if time.monotonic() > deadline:
            self.stop()
            raise WorkerDiedError(
                f"{self._name}{stage!r} took longer than compute.timeout_seconds = {timeout_seconds:g}"
            )
