"""Signals that end a command: SIGINT (Ctrl-C), SIGTERM and SIGHUP."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

_ONE_STOP_SECONDS = 1.0
_AGAIN_SECONDS = 0.1


class Interrupt(KeyboardInterrupt):
    """The KeyboardInterrupt of a command that is to end. It is raised again if something swallows it.

    A KeyboardInterrupt is raised wherever the main thread happens to be. C code that calls Python, such as pydantic's
    serializer, turns it into an error of its own, and Python drops it in a finalizer. The command would then go on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._end: weakref.finalize[[int], Interrupt] | None = None

    def when_swallowed(self, call: Callable[[int], object], number: int) -> None:
        """Have a function called with the signal's number as soon as nothing holds this exception any more."""
        self._end = weakref.finalize(self, call, number)
        self._end.atexit = False

    def settle(self) -> None:
        """Do not raise this exception again: it has been handled."""
        if self._end is not None:
            self._end.detach()


def stop_on_signals() -> None:
    """Have SIGTERM and SIGHUP interrupt the command as Ctrl-C does. A second signal ends it at once.

    Signals that are already ignored, as under `nohup`, stay ignored.
    """
    _handle_signals(without_alarm(_Stop()))


def leave_on_signals() -> None:
    """Have the next signal end the process at once, after the command has reported its result."""
    _handle_signals(_leave)


def without_alarm(handler: Handler) -> Handler:
    """Wrap a signal handler: on SIGTERM, Ray's core sets an alarm that aborts this process after three seconds."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.alarm(0)
        handler(number, frame)

    return handle


class _Stop:
    """Handler of the signals that end a command."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._is_swallowed = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None or self._is_swallowed:
            self._first = self._first or now
            self._is_swallowed = False
            raise self._interrupt(number)  # no variable may hold it: its traceback holds this frame
        if now - self._first > _ONE_STOP_SECONDS:  # else it may be the same key press, passed on by a parent
            with suppress(OSError):
                os.write(2, b"stopped at once; finished work is kept\n")
            _leave(number, frame)

    def _interrupt(self, number: int) -> Interrupt:
        interrupt = Interrupt()
        interrupt.when_swallowed(self._again_soon, number)
        return interrupt

    def _again_soon(self, number: int) -> None:
        if _is_leaving(number):
            return
        # This runs in a finalizer, which would swallow the next interrupt too.
        timer = threading.Timer(_AGAIN_SECONDS, self._again, [number])
        timer.daemon = True
        timer.start()

    def _again(self, number: int) -> None:
        if not _is_leaving(number):
            self._is_swallowed = True
            signal.pthread_kill(threading.main_thread().ident or 0, number)


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(128 + signal.SIGINT)


def _is_leaving(number: int) -> bool:
    """Whether the command has reported its result."""
    return signal.getsignal(number) is _leave


def _handle_signals(handler: Handler) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
