"""The trials of a search: what each tries, how it went, and the files by which a search resumes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config import RunConfig, SearchedConfig
from pipeline.errors import DataError
from pipeline.records import EncoderRef, Key, MtebTask, Record, Runtime
from pipeline.run.plan import JobSpec
from pipeline.store.files import read_record, write_atomically
from pipeline.store.key import library_versions, task_key

TrialState = Literal["running", "finished", "stopped", "failed"]
"""``stopped``: early, because other trials were better after as many epochs. ``failed``: it diverged."""


class TrialRecord(Record):
    """One trial, rewritten after every epoch."""

    number: int
    """Number of the trial. 0 is the configuration as it is."""
    key: Key
    """Key of the training, under which ``lorafleet train`` finds it."""
    learning_rate: float
    drawn_rate: float
    """The learning rate before it was rounded, from which the next trials are chosen."""
    values: dict[str, Any]
    """Setting -> value, of the settings that have several."""
    scores: tuple[float, ...] = ()
    """Validation score after each epoch."""
    start_score: float | None = None
    """Validation score before the first epoch."""
    metric: str | None = None
    """Name of the validation score."""
    state: TrialState = "running"
    fault: str | None = None
    seconds: float = 0.0
    """Seconds of training."""

    @property
    def score(self) -> float | None:
        """Validation score of the weights that the training keeps. None before its first epoch."""
        known = [score for score in (self.start_score, *self.scores) if score is not None]
        return max(known) if self.scores and self.state != "failed" else None


class SearchPlan(Record):
    """A checked search that can start."""

    config: SearchedConfig
    """Config with absolute paths and with the encoder's resolved revision."""
    encoder: EncoderRef
    runtime: Runtime
    mteb_task: MtebTask
    """The data set, with resolved revision."""
    fingerprint: str
    num_validation: int
    """Texts, pairs or queries of the selection."""
    runs: str
    """Run store, where the trainings are kept."""
    notes: tuple[str, ...]

    def config_of(self, learning_rate: float, values: dict[str, Any]) -> RunConfig:
        """The configuration of a run that trains a trial."""
        return self.config.with_values(learning_rate, values)

    def spec(self, learning_rate: float, values: dict[str, Any]) -> JobSpec:
        """The job of a trial. Its key is that of the same training in a run."""
        config = self.config_of(learning_rate, values)
        entry = config.mteb_tasks[0]
        task = self.mteb_task.changed(max_epochs=entry.max_epochs or config.train.max_epochs)
        if values.get("loss") is not None:
            task = task.changed(loss=values["loss"])
        key = task_key(
            config,
            mteb_task=task,
            fingerprint=self.fingerprint,
            encoder=self.encoder,
            runtime=self.runtime,
            versions=library_versions(),
        )
        return JobSpec(
            config=config,
            mteb_task=task,
            fingerprint=self.fingerprint,
            encoder_revision=self.encoder.revision,
            key=key,
            runtime=self.runtime,
            run_id="search",
            runs=self.runs,
        )

    @property
    def key(self) -> str:
        """Hash of what is searched. More trials or minutes go on with the same search."""
        space = self.config.search.model_dump(mode="json", exclude={"trials", "minutes"})
        own = self.spec(self.config.train.learning_rate, {}).key
        return hashlib.sha256(json.dumps([own, space], sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class TrialFiles:
    """Files of the trials of one search, kept so that it resumes."""

    root: Path

    def write(self, trial: TrialRecord) -> None:
        """Write a trial, atomically."""
        write_atomically(self.root / f"trial-{trial.number:05d}.json", trial.model_dump_json(indent=1))

    def read(self, number: int) -> TrialRecord | None:
        """Read a trial. None if there is none, or if its file is damaged."""
        try:
            return read_record(self.root / f"trial-{number:05d}.json", TrialRecord)
        except DataError:
            return None

    def known(self) -> list[TrialRecord]:
        """Trials from the first one to the last that is not missing."""
        found: list[TrialRecord] = []
        while (trial := self.read(len(found))) is not None:
            found.append(trial)
        return found
