"""Work that a command starts before its flow: the check of the inputs, and the fleet. The flow takes it over.

Both objects belong to this process, and flow parameters must stay serialisable. So the command and the flow share them
through a context variable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from pipeline.config import RunConfig
from tasks.early_check import EarlyCheck, early_check
from tasks.fleet import Fleet


class Ahead:
    """The work started for one run. The flow takes each part at most once."""

    def __init__(self, config: RunConfig, runs: Path) -> None:
        """Start nothing yet.

        Args:
            config: Config of the run.
            runs: Run store.
        """
        self._config, self._runs = config, runs
        self.fleet = _new_fleet(config)
        self._untaken_fleet: Fleet | None = self.fleet
        self._check: EarlyCheck | None = None

    def start(self, *, force: bool) -> None:
        """Start the check of the inputs or, if it would not save a training, Ray and the workers.

        Ray and the imports of the workers take several seconds. Meanwhile this process imports Prefect.

        Args:
            force: Whether the run trains in any case.
        Raises:
            InputError, LorafleetError: as ``Fleet.start_ahead``.
        """
        self._check = None if force else early_check(self._config, self._runs)
        if self._check is None:
            self.fleet.start_ahead()

    def take_fleet(self) -> Fleet | None:
        """Return the fleet on the first call, and None on every later call."""
        fleet, self._untaken_fleet = self._untaken_fleet, None
        return fleet

    def take_check(self) -> EarlyCheck | None:
        """Return the check on the first call, and None on every later call or if no check was started."""
        check, self._check = self._check, None
        return check


_AHEAD: ContextVar[Ahead | None] = ContextVar("ahead", default=None)


@contextmanager
def ahead_of_run(config: RunConfig, runs: Path) -> Iterator[Ahead]:
    """Hand work over to the flow that is called while this context is open.

    The fleet is stopped at the end, whether or not the flow took it. Stopping a fleet twice is harmless.
    """
    ahead = Ahead(config, runs)
    token = _AHEAD.set(ahead)
    try:
        yield ahead
    finally:
        _AHEAD.reset(token)
        ahead.fleet.stop()


def fleet_of_run(config: RunConfig) -> Fleet:
    """Return the fleet that the command handed over, or a new one. The caller must enter it."""
    ahead = _AHEAD.get()
    return (ahead.take_fleet() if ahead is not None else None) or _new_fleet(config)


def check_of_run(config: RunConfig, runs: Path) -> EarlyCheck | None:
    """Return the check that the command handed over, or a new one; None if no check is worthwhile."""
    ahead = _AHEAD.get()
    return (ahead.take_check() if ahead is not None else None) or early_check(config, runs)


def _new_fleet(config: RunConfig) -> Fleet:
    return Fleet(config.compute, num_tasks=len(config.mteb_tasks), make_ahead=True)
