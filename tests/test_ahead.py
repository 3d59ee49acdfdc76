"""The hand-over of started work from a command to the flow that it calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig, load_config
from tasks import ahead as module
from tasks.ahead import ahead_of_run, check_of_run, fleet_of_run
from tasks.fleet import Fleet


@pytest.fixture
def config() -> RunConfig:
    return load_config("quickstart")


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The checks that were started; each is a new object."""
    started: list[object] = []

    def early_check(*_: Any) -> object:
        started.append(object())
        return started[-1]

    monkeypatch.setattr(module, "early_check", early_check)
    monkeypatch.setattr(Fleet, "start_ahead", lambda self: started.append(self))
    return started


def test_the_flow_takes_the_fleet_of_the_command_once(config: RunConfig, tmp_path: Path) -> None:
    with ahead_of_run(config, tmp_path) as ahead:
        assert fleet_of_run(config) is ahead.fleet
        assert fleet_of_run(config) is not ahead.fleet
    assert fleet_of_run(config) is not ahead.fleet


def test_the_flow_takes_the_check_of_the_command_once(config: RunConfig, tmp_path: Path, checks: list[object]) -> None:
    with ahead_of_run(config, tmp_path) as ahead:
        ahead.start(force=False)
        assert check_of_run(config, tmp_path) is checks[0]
        assert check_of_run(config, tmp_path) is checks[1]


def test_a_forced_run_starts_ray_instead_of_the_check(config: RunConfig, tmp_path: Path, checks: list[object]) -> None:
    with ahead_of_run(config, tmp_path) as ahead:
        ahead.start(force=True)
    assert checks == [ahead.fleet]


def test_a_flow_without_a_command_makes_its_own(config: RunConfig, tmp_path: Path, checks: list[object]) -> None:
    assert isinstance(fleet_of_run(config), Fleet)
    assert check_of_run(config, tmp_path) is checks[0]
