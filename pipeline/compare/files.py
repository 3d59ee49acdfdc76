"""Paths of a comparison's files, and the record of a finished arm."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import AwareDatetime
from safetensors import SafetensorError, safe_open

from pipeline.compare.plan import folder_of_arm
from pipeline.config import ComparisonConfig
from pipeline.errors import DataError
from pipeline.records import EncoderRef, Failure, Key, MtebTask, Record, RunId, Runtime, Sha256
from pipeline.store.files import add_file, read_record, write_atomically
from pipeline.training.checkpoint import tensor_file


class Trial(Record):
    """One learning rate that was tried."""

    learning_rate: float
    score: float | None
    """Best selection score of its epochs. None if it diverged, or without a selection."""
    seconds: float
    fault: str | None = None
    """Why it diverged."""


class SeedResult(Record):
    """One trained state of an arm."""

    seed: int
    learning_rate: float | None
    """None for an arm that trains nothing."""
    selection_score: float | None
    best_epoch: int
    num_epochs: int
    train_seconds: float
    """Seconds inside the training loop."""
    examples_per_second: float | None
    """Training examples per second inside the loop."""


class Speed(Record):
    """Texts per second of inference, on the test set."""

    merged: float
    """Of the form that is deployed: an adapter is merged into its encoder."""
    unmerged: float | None
    """Of an adapter beside its encoder. None for other arms."""


class Forgetting(Record):
    """Score of each seed on a data set that the arm has not learnt from."""

    mteb_task: str
    metric: str
    scores: tuple[float, ...]
    num_texts: int


class ArmResult(Record):
    """All that is known of a finished arm. Its file is written last, and marks the arm as finished."""

    arm: str
    key: Key
    run_id: RunId
    """Comparison that made it."""
    reused_from: RunId | None = None
    """Comparison that it was taken over from."""
    selection_metric: str | None
    trials: tuple[Trial, ...]
    seeds: tuple[SeedResult, ...]
    num_parameters: int
    """Trained parameters of the encoder's side, without a head."""
    num_head_parameters: int
    bytes_per_task: int
    """Bytes of the files that one more data set needs, beside the shared encoder."""
    train_seconds: float
    """Seconds of all trainings, the choice of the learning rate included."""
    peak_memory_bytes: int
    """Largest memory of the worker's process, or of the GPU, during the trainings."""
    speed: Speed
    forgetting: tuple[Forgetting, ...]
    files: dict[str, Sha256]
    """SHA-256 of every other file of the arm's folder, by path."""


@dataclass(frozen=True)
class ArmFolder:
    """Paths of an arm's files."""

    root: Path

    @property
    def result(self) -> Path:
        """An ``ArmResult`` record."""
        return self.root / "arm.json"

    def seed(self, seed: int) -> Path:
        """Folder of a trained state."""
        return self.root / f"seed-{seed}"

    def measured(self, seed: int) -> Path:
        """Arrays that were measured on test, by item: safetensors."""
        return self.seed(seed) / "measured.safetensors"

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file but ``arm.json``, by path.

        Raises: DataError: a file cannot be read, or is no regular file.
        """
        found = {}
        for path in sorted(self.root.rglob("*")):
            if path.is_dir() or path == self.result:
                continue
            digest = hashlib.sha256()
            try:
                add_file(digest, path)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from None
            found[str(path.relative_to(self.root))] = digest.hexdigest()
        return found

    def read(self, key: str) -> ArmResult | str:
        """The result if this folder holds the finished arm of a key, unchanged; otherwise what is wrong with it."""
        try:
            result = read_record(self.result, ArmResult)
            if result.key != key:
                return "it was made from other inputs"
            changed = sorted(name for name, sha256 in result.files.items() if self.hashes().get(name) != sha256)
        except DataError as error:
            return str(error)
        return f"{', '.join(changed[:3])} has changed since it was written" if changed else result


@dataclass(frozen=True)
class ComparisonFolder:
    """Paths of a comparison's files."""

    root: Path

    @property
    def manifest(self) -> Path:
        """A ``ComparisonManifest`` record. Written last, it marks the comparison as finished."""
        return self.root / "manifest.json"

    @property
    def results(self) -> Path:
        """The results: arms, differences, costs and notes."""
        return self.root / "comparison.json"

    @property
    def page(self) -> Path:
        """The report as one HTML page."""
        return self.root / "comparison.html"

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / "config.toml"

    def table(self, name: str) -> Path:
        """A Parquet table: ``values``, ``differences``, ``seeds``, ``trials``, ``costs``, ``forgetting``.

        For labelled pairs also ``errors`` and ``wrong_pairs``."""
        return self.root / "metrics" / f"{name}.parquet"

    def arm(self, arm: str) -> ArmFolder:
        """Folder of an arm."""
        return ArmFolder(self.root / folder_of_arm(arm))


class ComparisonManifest(Record):
    """Everything needed to repeat a comparison."""

    run_id: RunId
    created_at: AwareDatetime
    config: ComparisonConfig
    encoder: EncoderRef
    runtime: Runtime
    mteb_task: MtebTask
    arms: dict[str, Key]
    """Key of each finished arm."""
    reused: dict[str, RunId]
    """Arm -> comparison that it was taken over from."""
    failures: tuple[Failure, ...]
    versions: dict[str, str]
    lorafleet_version: str
    seconds: float


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Write arrays as safetensors, atomically."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    write_atomically(path, tensor_file(tensors, {}))


def read_arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    """Read arrays that ``write_arrays`` wrote.

    Raises: DataError: missing or damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: missing or damaged: {error}") from None
