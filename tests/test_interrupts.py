"""Signals that end a command, and interrupts that something swallows."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import Command

SLOW = """
import signal, sys, time
from flows.terminal import secure_streams
from flows import cli
def slow(*_, **__):
    print("begun", flush=True)
    try: time.sleep(60)
    finally:
        print("stopping", flush=True)
        time.sleep({stopping})
cli.{name}.callback = slow
import atexit; atexit.register(lambda: time.sleep({leaving}))
sys.argv = ["lorafleet", "show", "x"]
cli.main()
"""


def start_slow(tmp_path: Path, *, stopping: float = 0, leaving: float = 0, ignored: str = "") -> Command:
    """A command that sleeps, then takes its time to stop."""
    program = SLOW.format(name="show", stopping=stopping, leaving=leaving)
    ignore = f"import signal; signal.signal(signal.{ignored}, signal.SIG_IGN)\n" if ignored else ""
    command = Command(program=(sys.executable, "-P", "-c", ignore + program), cwd=tmp_path)
    command.wait_until(lambda: "begun" in command.said(), seconds=30)
    return command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_that_ends_a_program_stops_a_command_as_ctrl_c_does(number: signal.Signals, tmp_path: Path) -> None:
    command = start_slow(tmp_path)
    command.process.send_signal(number)
    ended = command.wait(seconds=20)
    assert (ended.code, ended.out.splitlines()) == (130, ["begun", "stopping"])
    assert ended.err.lstrip() == "interrupted; finished work is kept, run the same command to resume\n"


@pytest.mark.parametrize("gap", [0.05, 0.6, 1.2])
@pytest.mark.parametrize(("stopping", "leaving"), [(5, 0), (0, 5)])
def test_three_ctrl_c_leave_no_traceback(gap: float, stopping: float, leaving: float, tmp_path: Path) -> None:
    command = start_slow(tmp_path, stopping=stopping, leaving=leaving)
    for _ in range(3):
        if command.process.poll() is None:
            command.process.send_signal(signal.SIGINT)
        time.sleep(gap)
    ended = command.wait(seconds=20)
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert "finished work is kept" in ended.err


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """The command runs as under nohup."""
    command = start_slow(tmp_path, ignored="SIGHUP")
    command.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert command.process.poll() is None
    command.process.send_signal(signal.SIGTERM)
    assert command.wait(seconds=20).code == 130


def test_the_signal_that_stops_a_command_disarms_the_alarm_that_rays_core_sets_on_it() -> None:
    program = """
import os, signal
from tasks.interrupts import stop_on_signals
stop_on_signals()
signal.alarm(50)
try:
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
except KeyboardInterrupt:
    print(signal.getitimer(signal.ITIMER_REAL)[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "0.0\n"


# Each swallows a KeyboardInterrupt that is raised in the middle of it.
SWALLOWERS = {
    "an error of C code": """
import pydantic
class Sent(pydantic.BaseModel):
    @pydantic.model_serializer
    def _serialized(self): interrupt(); return {}
def work():
    try: Sent().model_dump_json()
    except pydantic_core.PydanticSerializationError as error: print("error:", str(error)[:30], flush=True)
import pydantic_core
""",
    "a finalizer": """
class Freed:
    def __del__(self): interrupt()
def work(): Freed()
""",
    "a handler of everything": """
def work():
    try: interrupt()
    except BaseException as error: print(type(error).__name__, flush=True)
""",
}

SWALLOWED = """
import os, signal, sys, time
from flows import cli
def interrupt():
    os.kill(os.getpid(), signal.{number})
    for _ in range(10**6): pass
{work}
def swallow(*_, **__):
    work()
    for _ in range(600): time.sleep(0.1)
    print("went on", flush=True)
cli.show.callback = swallow
sys.argv = ["lorafleet", "show", "x"]
cli.main()
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("work", SWALLOWERS.values(), ids=SWALLOWERS)
def test_an_interrupt_that_something_swallows_comes_again(work: str, number: str, tmp_path: Path) -> None:
    program = (sys.executable, "-P", "-c", SWALLOWED.format(work=work, number=number))
    ended = Command(program=program, cwd=tmp_path).wait(seconds=20)
    assert ended.code == 130
    assert ended.err.endswith("interrupted; finished work is kept, run the same command to resume\n")


def test_an_interrupt_that_was_handled_does_not_come_again() -> None:
    program = """
import os, signal, time
from tasks.interrupts import Interrupt, stop_on_signals
stop_on_signals()
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except Interrupt as interrupt:
    interrupt.settle()
time.sleep(0.5)
print("went on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "went on\n"
