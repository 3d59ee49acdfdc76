"""Trainings that are long enough to be disturbed, and what they come to if nothing does."""

from __future__ import annotations

import re
from pathlib import Path

from commands import Command, Ended, epochs_done, write_config, write_task

from pipeline.config import load_config
from pipeline.encoder.runtime import choose_runtime
from pipeline.records import TaskResult
from pipeline.run.job import TaskJob
from pipeline.run.plan import job_spec
from pipeline.run.preflight import preflight
from pipeline.store.files import read_record
from pipeline.store.manifest import read_manifest
from pipeline.store.run_folder import RunFolder

QUICK = "Quick"
"""The name of an MTEB task that is finished in no time."""


def write_training(folder: Path, encoder: Path, *names: str, epochs: int) -> Path:
    """A config of MTEB tasks that train for some seconds each, but for one of the name above."""
    tasks = [write_task(folder, QUICK, num_train=60, seed=3) | {"max_epochs": 1}] if QUICK in names else []
    tasks += [
        write_task(folder, name, num_train=800, seed=4 + number) | {"max_epochs": epochs}
        for number, name in enumerate(names)
        if name != QUICK
    ]
    train = {"batch_size": 2, "patience": epochs, "learning_rate": 0.002}
    return write_config(
        folder / "config.toml", encoder, tasks, train=train, evaluate={"columns": ["frozen_full_data", "head"]}
    )


def train_undisturbed(config: Path, runs: Path) -> dict[str, str]:
    """MTEB task -> sha256 of its adapter, trained here without Prefect, without Ray and without a fault."""
    values = load_config(str(config))
    plan = preflight(values, choose_runtime(values.train, threads=1, use_gpu=False))
    specs = {planned.mteb_task.name: job_spec(plan, planned, run_id="undisturbed", runs=runs) for planned in plan.tasks}
    return {name: TaskJob(spec).train(lambda row: None, lambda progress: None).sha256 for name, spec in specs.items()}


class Store:
    """A run store, and ``lorafleet train`` on it, as often as it takes."""

    def __init__(self, cwd: Path, config: Path, **environment: str) -> None:
        self.cwd, self.config, self._environment = cwd, config, environment
        self.runs = cwd / "runs"

    def start(self, *arguments: str) -> Command:
        """``lorafleet train``."""
        return Command(
            "train", "--config", self.config, "--runs", "runs", *arguments, cwd=self.cwd, **self._environment
        )

    def start_in_the_middle(self) -> Command:
        """Start, and return once the quick task is finished and the others are in the middle of their second epoch."""
        command = self.start()
        command.wait_until(self.in_the_middle)
        return command

    def in_the_middle(self) -> bool:
        """Whether the quick one is finished and each of the others has one epoch behind it, and none all."""
        names = [t.name for t in load_config(str(self.config)).mteb_tasks]
        done = epochs_done(self.runs)
        quick = QUICK not in names or bool(self.quick_results())
        return quick and len(done) == len(names) - names.count(QUICK) and min(done.values()) >= 1

    def quick_results(self) -> list[Path]:
        """Result file of the MTEB task that finished first."""
        return list(self.runs.glob(f"*/{QUICK}/result.json"))

    def adapters(self, ended: Ended) -> dict[str, str]:
        """sha256 of what the run holds."""
        assert ended.code == 0, ended.err
        return read_manifest(RunFolder(self.cwd / ended.run)).adapters

    def origins(self, ended: Ended) -> dict[str, str]:
        """MTEB task -> the run that it was reused from."""
        return read_manifest(RunFolder(self.cwd / ended.run)).reused

    def epochs(self, ended: Ended, name: str) -> list[int]:
        """All that the training of one MTEB task consists of, in order."""
        return [row.epoch for row in read_record(RunFolder(self.cwd / ended.run).task(name).result, TaskResult).epochs]


def epochs_told(log: str, name: str) -> list[int]:
    """The epochs of one MTEB task that a command told of, in order; one that it did again is there twice."""
    return [int(number) for number in re.findall(rf"{name}: epoch (\d+):", log)]
