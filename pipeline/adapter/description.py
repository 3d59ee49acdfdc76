"""The description of a saved adapter, read without torch."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pipeline.config import AdapterConfig, EncoderConfig
from pipeline.errors import AdapterError
from pipeline.records import SIDES, AdapterMeta, Calibration, LabelNames, Side
from pipeline.store.files import LARGEST_RECORD_BYTES, parse_record, read_file
from pipeline.store.run_folder import TaskFolder, adapter_sha256

CANNOT_CLASSIFY = "it has no head, so it cannot classify; it can only embed"


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter on this machine's disk, with the facts needed to load it."""

    name: str
    folder: TaskFolder
    sha256: str
    """SHA-256 of the weights of pairs and head, as in ``AdapterRef``."""
    described_sha256: str
    """SHA-256 of meta.json and calibration.json, which also affect predictions."""
    encoder: EncoderConfig
    """Public name and revision of the encoder, and the pooling and length of the training."""
    config: AdapterConfig
    """Configuration of the pairs. ``target`` lists the layers that have one."""
    meta: AdapterMeta
    label_names: tuple[str, ...]
    """Label names in the order of the head's outputs. Empty for an adapter without a head."""
    calibration: Calibration | None
    """Calibration of the head. None if the adapter has none: its probabilities are then used uncalibrated."""
    side: Side | None = None
    """Side of a pair that its texts are on. None: the reference names none."""

    @property
    def has_head(self) -> bool:
        """Whether the adapter can classify."""
        return bool(self.label_names)

    def check_has_head(self) -> None:
        """Raises: AdapterError: the adapter has no head, so it cannot classify."""
        if not self.has_head:
            raise AdapterError(f"adapter {self.name}: {CANNOT_CLASSIFY}")

    @property
    def prefix(self) -> str:
        """Text to put before every text, as in the training.

        Raises: AdapterError: each side has another prefix, and the reference names no side.
        """
        prefixes = self.meta.prefixes
        if prefixes is None:
            return ""
        if self.side is None:
            raise AdapterError(
                f"adapter {self.name}: was trained with {prefixes[0]!r} before a query and {prefixes[1]!r} before a "
                f"passage; say which your texts are: {self.name}.query or {self.name}.passage"
            )
        return prefixes[SIDES.index(self.side)]

    @property
    def labels_sha256(self) -> str:
        """SHA-256 of the label names in the order of the head's outputs."""
        return hashlib.sha256(json.dumps(self.label_names, ensure_ascii=False).encode()).hexdigest()


def describe_adapter(folder: TaskFolder) -> FoundAdapter:
    """Read and check an adapter's files, except its weights.

    Raises: AdapterError: a file is missing, damaged, or contradicts another.
    """
    meta_content = _read(folder.meta)
    meta = parse_record(meta_content, AdapterMeta, folder.meta, fault=AdapterError)
    labels = _labels(folder, meta)
    if meta.label_names != labels or meta.num_classes != len(labels):
        raise AdapterError(
            f"{folder.root}: meta.json and labels.json do not list the same label names in the same order"
        )
    calibration, calibration_content = None, b"none"
    if os.path.lexists(folder.calibration):
        calibration_content = _read(folder.calibration)
        calibration = parse_record(calibration_content, Calibration, folder.calibration, fault=AdapterError)
    encoder, config = _configs(meta, path=folder.meta)
    return FoundAdapter(
        name=meta.task or folder.root.name,
        folder=folder,
        sha256=adapter_sha256(folder.root),
        described_sha256=hashlib.sha256(meta_content + calibration_content).hexdigest(),
        encoder=encoder,
        config=config,
        meta=meta,
        label_names=labels,
        calibration=calibration,
    )


def _configs(meta: AdapterMeta, *, path: Path) -> tuple[EncoderConfig, AdapterConfig]:
    try:
        encoder = EncoderConfig(
            name=meta.encoder.name, revision=meta.encoder.revision, pooling=meta.pooling, max_tokens=meta.max_tokens
        )
        config = AdapterConfig(rank=meta.rank, alpha=meta.alpha, dropout=meta.dropout, target=meta.adapted_modules)
    except ValidationError as error:
        # If neither form of a target fits, the last error is about the tuple of modules.
        fault = error.errors(include_url=False)[-1]
        key = "adapted_modules" if fault["loc"][0] == "target" else fault["loc"][0]
        raise AdapterError(f"{path}: {key}: {fault['msg']}, found {fault['input']!r:.100}") from None
    return encoder, config


def _labels(folder: TaskFolder, meta: AdapterMeta) -> tuple[str, ...]:
    """Content of ``labels.json``. Empty if meta.json lists no labels and the folder has no file of a head."""
    if not (meta.label_names or meta.num_classes):
        head_files = (folder.labels, folder.head, folder.classifier_head_pt, folder.calibration)
        extra = [path.name for path in head_files if os.path.lexists(path)]
        if extra:
            raise AdapterError(f"{folder.root}: meta.json lists no labels, but {', '.join(extra)} belong to a head")
        return ()
    return parse_record(_read(folder.labels), LabelNames, folder.labels, fault=AdapterError).root


def _read(path: Path) -> bytes:
    try:
        return read_file(path, at_most=LARGEST_RECORD_BYTES)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from None
