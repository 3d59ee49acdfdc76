"""Paths of all files of a run, and the identity of an adapter."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import AdapterError, ConfigError
from pipeline.records import SIDES, Side
from pipeline.store.files import add_file


@dataclass(frozen=True)
class TaskFolder:
    """Paths of one MTEB task's files, in lorafleet's own layout and in formats that other libraries load."""

    root: Path

    def side(self, side: Side) -> TaskFolder:
        """Folder of the adapter of one side, if each side of its pairs has an adapter of its own."""
        return TaskFolder(self.root / side)

    @property
    def name(self) -> str:
        """Name of the task, with the side if this is the folder of one."""
        return f"{self.root.parent.name}.{self.root.name}" if self.own_side else self.root.name

    @property
    def own_side(self) -> Side | None:
        """Side whose adapter is in this folder, which is inside that of its task. None for every other folder."""
        return next((side for side in SIDES if self.root.name == side and TaskFolder(self.root.parent).has_sides), None)

    @property
    def has_sides(self) -> bool:
        """Whether the folder holds an adapter for each side of its pairs."""
        return not os.path.lexists(self.adapter_weights) and os.path.lexists(self.side("query").adapter_weights)

    @property
    def adapters(self) -> tuple[TaskFolder, ...]:
        """Folders of the task's adapters: this folder, or those of both sides, queries first."""
        return tuple(map(self.side, SIDES)) if self.has_sides else (self,)

    @property
    def lora_adapter_pt(self) -> Path:
        """Tensors ``lora_{i}_A`` (in, rank), ``lora_{i}_B`` (rank, out) and ``lora_{i}_scaling``."""
        return self.root / "lora_adapter.pt"

    @property
    def classifier_head_pt(self) -> Path:
        """State of ``Sequential(Dropout, Linear)``."""
        return self.root / "classifier_head.pt"

    @property
    def meta(self) -> Path:
        """An ``AdapterMeta`` record: everything needed to attach the two ``.pt`` files by hand."""
        return self.root / "meta.json"

    @property
    def adapter_weights(self) -> Path:
        """Weights of the adapter, as PEFT loads them."""
        return self.root / "adapter_model.safetensors"

    @property
    def adapter_config(self) -> Path:
        """PEFT's configuration of the adapter."""
        return self.root / "adapter_config.json"

    @property
    def head(self) -> Path:
        """Weight and bias of the head."""
        return self.root / "head.safetensors"

    @property
    def labels(self) -> Path:
        """Label names in the order of the head's outputs."""
        return self.root / "labels.json"

    @property
    def calibration(self) -> Path:
        """A ``Calibration`` record."""
        return self.root / "calibration.json"

    @property
    def probe(self) -> Path:
        """A ``ReferenceOutputs`` record: logits of the adapter for 32 texts."""
        return self.root / "probe.json"

    @property
    def few_shot(self) -> Path:
        """mteb's results of the few-shot columns: column -> mteb's ``TaskResult`` as JSON."""
        return self.root / "few_shot.json"

    @property
    def result(self) -> Path:
        """A ``TaskResult`` record. Written last, it marks the MTEB task as finished. Published without local paths."""
        return self.root / "result.json"

    def published(self, *, has_head: bool = True, has_sides: bool = False) -> tuple[Path, ...]:
        """Files that are published unchanged.

        Args:
            has_head: An adapter without a head has no file of one.
            has_sides: Whether each side of the task's pairs has an adapter of its own.
        """
        folders = tuple(map(self.side, SIDES)) if has_sides else (self,)
        return (*(path for folder in folders for path in folder._of_adapter(has_head=has_head)), self.few_shot)

    def _of_adapter(self, *, has_head: bool) -> tuple[Path, ...]:
        of_head = (self.classifier_head_pt, self.head, self.labels, self.calibration) if has_head else ()
        return (self.lora_adapter_pt, self.meta, self.adapter_weights, self.adapter_config, self.probe, *of_head)


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run's files. A publication has the same layout, without the private files."""

    root: Path

    @property
    def manifest(self) -> Path:
        """A ``RunManifest`` record. Written last, it marks the run as finished."""
        return self.root / "manifest.json"

    @property
    def config(self) -> Path:
        """The resolved config. Not published, because it may contain local paths."""
        return self.root / "config.toml"

    @property
    def results(self) -> Path:
        """A ``ClassificationResults`` record."""
        return self.root / "classification_results.json"

    @property
    def all_results(self) -> Path:
        """A ``RunResults`` record, which covers every task family. Older runs have none."""
        return self.root / "results.json"

    @property
    def publication(self) -> Path:
        """A ``Publication`` record. Exists in publications only."""
        return self.root / "publication.json"

    @property
    def mteb_results(self) -> Path:
        """Few-shot results in the layout of mteb's ``ResultCache``. Exists in publications only."""
        return self.root / "mteb_results"

    @property
    def gate(self) -> Path:
        """Gate decisions, one row per MTEB task and target. Exists only if the run went through the gate."""
        return self.metrics / "gate.parquet"

    @property
    def readme(self) -> Path:
        """The model card."""
        return self.root / "README.md"

    @property
    def report(self) -> Path:
        """Report as one HTML page."""
        return self.root / "report.html"

    @property
    def metrics(self) -> Path:
        """Folder of the tables."""
        return self.root / "metrics"

    @property
    def scores(self) -> Path:
        """One row per MTEB task and column of the score table."""
        return self.metrics / "scores.parquet"

    @property
    def values(self) -> Path:
        """One row per measured number. Older runs have none."""
        return self.metrics / "values.parquet"

    @property
    def epochs(self) -> Path:
        """One row per MTEB task and epoch."""
        return self.metrics / "epochs.parquet"

    @property
    def mteb_tasks(self) -> Path:
        """Data and cost, one row per MTEB task. Not published, because it contains the label frequencies."""
        return self.metrics / "mteb_tasks.parquet"

    def task(self, name: str) -> TaskFolder:
        """Folder of one MTEB task.

        Raises:
            ConfigError: the name is reserved for a file or folder of the run itself, or is not a single folder name.
        """
        reserved = {
            p.name.lower()
            for p in (
                self.manifest,
                self.config,
                self.publication,
                self.all_results,
                *self.published(),
                self.metrics,
                self.mteb_results,
            )
        }
        if name.lower() in (*reserved, *SIDES) or name in ("", ".", "..") or Path(name).name != name:
            raise ConfigError(
                f"an MTEB task cannot be called {name!r}: a run folder reserves that name for itself; choose another"
            )
        return TaskFolder(self.root / name)

    def published(self) -> tuple[Path, ...]:
        """Published files outside the task folders."""
        return (self.readme, self.results, self.report, self.scores, self.epochs)


def adapter_sha256(folder: Path) -> str:
    """Identity of an adapter: SHA-256 over ``adapter_model.safetensors``, then ``head.safetensors``, in hex.

    A folder with neither a head nor labels is an adapter without a head. The first file alone identifies it. Two
    adapters, one for each side of pairs, are identified together, by the files of both.

    Raises:
        AdapterError: one of the two files is missing or cannot be read.
    """
    digest, files = hashlib.sha256(), TaskFolder(folder)
    has_head = os.path.lexists(files.head) or os.path.lexists(files.labels)
    weights = [adapter.adapter_weights for adapter in files.adapters]
    for path in (*weights, *((files.head,) if has_head else ())):
        try:
            add_file(digest, path)
        except OSError as error:
            raise AdapterError(
                f"{path} cannot be read ({error.strerror}); an adapter needs both its weights and its head"
            ) from None
    return digest.hexdigest()
