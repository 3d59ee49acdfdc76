"""What a saved adapter says of itself, read without torch."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pipeline.config import AdapterConfig, EncoderConfig
from pipeline.errors import AdapterError
from pipeline.records import AdapterMeta, Calibration, LabelNames
from pipeline.store.files import LARGEST_RECORD_BYTES, parse_record, read_file
from pipeline.store.run_folder import TaskFolder, adapter_sha256

CANNOT_CLASSIFY = "it has no head, so it cannot classify; use its text vectors"


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter on this machine's disk, and what must be known before it is loaded."""

    name: str
    folder: TaskFolder
    sha256: str
    described_sha256: str
    """Of meta.json and calibration.json, which also decide what it says."""
    encoder: EncoderConfig
    """Public name, revision, pooling and length it was trained with."""
    config: AdapterConfig
    """Configuration of its pairs; ``target`` lists the layers that have one."""
    meta: AdapterMeta
    label_names: tuple[str, ...]
    """In the order of the head's outputs; empty for an adapter without a head."""
    calibration: Calibration | None
    """None where the adapter came without one: its probabilities are then as the head gives them."""

    @property
    def has_head(self) -> bool:
        """Whether the adapter can classify."""
        return bool(self.label_names)

    def check_has_head(self) -> None:
        """Raises: AdapterError: the adapter has no head, so it cannot classify."""
        if not self.has_head:
            raise AdapterError(f"adapter {self.name}: {CANNOT_CLASSIFY}")

    @property
    def labels_sha256(self) -> str:
        """Of the label names in the order of the head's outputs."""
        return hashlib.sha256(json.dumps(self.label_names, ensure_ascii=False).encode()).hexdigest()


def describe_adapter(folder: TaskFolder) -> FoundAdapter:
    """What an adapter's files say of it, but for its weights.

    Raises: AdapterError: one is missing, damaged, or contradicts another.
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
    try:
        encoder = EncoderConfig(
            name=meta.encoder.name, revision=meta.encoder.revision, pooling=meta.pooling, max_tokens=meta.max_tokens
        )
        config = AdapterConfig(rank=meta.rank, alpha=meta.alpha, dropout=meta.dropout, target=meta.adapted_modules)
    except ValidationError as error:
        fault = error.errors(include_url=False)[
            -1
        ]  # of the tuple of modules, where none of the two forms of a target fits
        key = "adapted_modules" if fault["loc"][0] == "target" else fault["loc"][0]
        raise AdapterError(f"{folder.meta}: {key}: {fault['msg']}, found {fault['input']!r:.100}") from None
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


def _labels(folder: TaskFolder, meta: AdapterMeta) -> tuple[str, ...]:
    """Content of ``labels.json``; nothing for an adapter that names no label and has no file of a head."""
    if not (meta.label_names or meta.num_classes):
        of_a_head = (folder.labels, folder.head, folder.classifier_head_pt, folder.calibration)
        extra = [path.name for path in of_a_head if os.path.lexists(path)]
        if extra:
            raise AdapterError(f"{folder.root}: meta.json lists no labels, but {', '.join(extra)} belong to a head")
        return ()
    return parse_record(_read(folder.labels), LabelNames, folder.labels, fault=AdapterError).root


def _read(path: Path) -> bytes:
    try:
        return read_file(path, at_most=LARGEST_RECORD_BYTES)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from None
