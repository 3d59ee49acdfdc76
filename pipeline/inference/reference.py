"""References to trained adapters: a folder, ``FOLDER#TASK`` or ``hf:OWNER/NAME[@REVISION]#TASK``, found and described without torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from pipeline.config import AdapterConfig, EncoderConfig
from pipeline.errors import AdapterError, InputError
from pipeline.hub_errors import hub_error, hub_faults
from pipeline.records import AdapterMeta, Calibration, LabelNames
from pipeline.store.folders import adapters_in, explain, is_folder
from pipeline.store.run_folder import LARGEST_RECORD_BYTES, TaskFolder, adapter_sha256, parse_record, read_file

NAME = re.compile(r"[^=/#@:]+")
"""What NAME can be in ``NAME=REF``."""
_NAMED = re.compile(rf"(?P<name>{NAME.pattern})=(?P<ref>.+)")
HUB_REF = re.compile(r"hf:(?P<repository>[^/@#]+/[^/@#]+)(?:@(?P<revision>[^#]+))?(?:#(?P<task>[A-Za-z0-9][A-Za-z0-9_.-]*))?")


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
    calibration: Calibration | None
    """None where the adapter came without one: its probabilities are then as the head gives them."""

    @property
    def labels_sha256(self) -> str:
        """Of the label names in the order of the head's outputs."""
        return hashlib.sha256(json.dumps(self.label_names, ensure_ascii=False).encode()).hexdigest()


def find_adapters(refs: Sequence[str], *, offline: bool) -> tuple[FoundAdapter, ...]:
    """Find what ``[NAME=]REF`` names; NAME is the MTEB task's where left out.

    Raises: AdapterError: not found, damaged, two of one name, or trained on different encoders.
    """
    found: list[FoundAdapter] = []
    for ref in refs:
        named = None if is_folder(split_folder(ref)[0]) else _NAMED.fullmatch(ref)  # a folder's name may hold the sign
        adapter = describe_adapter(_folder(named["ref"] if named else ref, offline=offline))
        found.append(replace(adapter, name=named["name"]) if named else adapter)
    names = [adapter.name.casefold() for adapter in found]  # columns whose names differ only in case are one to many readers
    twice = sorted({adapter.name for adapter in found if names.count(adapter.name.casefold()) > 1})
    if twice:
        raise AdapterError(f"two adapters are called {', '.join(twice)}, and their columns would be too; name them: --adapter NAME=REF")
    for other in found[1:]:
        _check_same_encoder(found[0], other)
    return tuple(found)


def _folder(ref: str, *, offline: bool) -> TaskFolder:
    hub = HUB_REF.fullmatch(ref)
    if hub:
        return _hub_folder(hub, offline=offline)
    place, task = split_folder(ref)
    if not place or ref.startswith("hf:"):
        raise AdapterError(f"adapter {ref!r}: expected an adapter's folder, FOLDER#TASK, or hf:OWNER/NAME[@REVISION]#TASK")
    return _pick(Path(place), task, ref)


def split_folder(ref: str) -> tuple[str, str | None]:
    """``FOLDER#TASK`` as both, or a folder alone; the sign may also be part of a folder's name."""
    if "#" not in ref or is_folder(ref):
        return ref, None
    place, _, task = ref.rpartition("#")
    return place, task


def _pick(root: Path, task: str | None, ref: str) -> TaskFolder:
    there = adapters_in(root)
    if task is None and os.path.lexists(TaskFolder(root).adapter_weights):
        return TaskFolder(root)
    if task in there or (task is None and len(there) == 1):
        return TaskFolder(root / (task or there[0]))
    if there and task:
        fault = f"there is no adapter {task} in it, but {', '.join(there)}"
    elif there:
        fault = f"choose one of its adapters, as {ref}#{there[0]} ({', '.join(there)})"
    else:
        fault = f"{explain(root, task=task)}; expected an adapter's folder, FOLDER#TASK, or hf:OWNER/NAME[@REVISION]#TASK"
    raise AdapterError(f"adapter {ref}: {fault}")


def _hub_folder(ref: re.Match[str], *, offline: bool) -> TaskFolder:
    from huggingface_hub import snapshot_download

    if not ref["task"]:
        raise AdapterError(f"adapter {ref[0]}: say which of the repository's adapters: {ref[0]}#TASK")
    try:
        folder = TaskFolder(Path(ref["task"]))
        patterns = [path.as_posix() for path in folder.published() if path.suffix != ".pt"]
        root = snapshot_download(ref["repository"], revision=ref["revision"], allow_patterns=patterns, local_files_only=offline)
    except hub_faults() as error:
        raise hub_error(error, f"adapter {ref[0]}", offline=offline, kind=AdapterError) from None
    return _pick(Path(root), ref["task"], ref[0])


def describe_adapter(folder: TaskFolder) -> FoundAdapter:
    """What an adapter's files say of it, but for its weights.

    Raises: AdapterError: one is missing, damaged, or contradicts another.
    """
    meta_content, labels_content = _read(folder.meta), _read(folder.labels)
    meta = parse_record(meta_content, AdapterMeta, folder.meta, fault=AdapterError)
    labels = parse_record(labels_content, LabelNames, folder.labels, fault=AdapterError).root
    if meta.label_names != labels or meta.num_classes != len(labels):
        raise AdapterError(f"{folder.root}: meta.json and labels.json do not list the same label names in the same order")
    calibration, calibration_content = None, b"none"
    if os.path.lexists(folder.calibration):
        calibration_content = _read(folder.calibration)
        calibration = parse_record(calibration_content, Calibration, folder.calibration, fault=AdapterError)
    try:
        encoder = EncoderConfig(name=meta.encoder.name, revision=meta.encoder.revision, pooling=meta.pooling, max_tokens=meta.max_tokens)
        config = AdapterConfig(rank=meta.rank, alpha=meta.alpha, dropout=meta.dropout, target=meta.adapted_modules)
    except ValidationError as error:
        fault = error.errors(include_url=False)[-1]  # of the tuple of modules, where none of the two forms of a target fits
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


def _read(path: Path) -> bytes:
    try:
        return read_file(path, at_most=LARGEST_RECORD_BYTES)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from None


def _check_same_encoder(first: FoundAdapter, other: FoundAdapter) -> None:
    for what in ("revision", "pooling", "max_tokens"):
        one, two = getattr(first.encoder, what), getattr(other.encoder, what)
        if one != two:
            raise AdapterError(
                f"adapters {first.name} and {other.name} were trained on encoders of {what} {one} and {two}; classify with one job for each"
            )


def threshold_for(adapter: FoundAdapter, target_accuracy: float) -> float:
    """Return the lowest threshold of the adapter's coverage table whose lower end is not below an accuracy.

    What keeps its label is then right this often, with probability 0.95 and for texts like those of the validation slice; see
    ``scores.coverage_table``.

    Raises: InputError: the table is missing, was not measured on validation or does not count its texts, or no threshold supports it.
    """
    refusal = f"adapter {adapter.name}: --target-accuracy {target_accuracy:g} cannot be promised"
    calibration = adapter.calibration
    if calibration is None:
        raise InputError(f"{refusal}: there is no calibration.json; use --min-score")
    if calibration.fitted_on == "none":
        raise InputError(f"{refusal}: it was trained without a validation slice to measure its coverage on; use --min-score")
    supported = [(row.low, row) for row in calibration.coverage if row.low is not None]
    if not supported:
        older = "its calibration.json counts no texts, as older versions wrote it"
        raise InputError(f"{refusal}: {older}; train the adapter again, or use --min-score")
    if good := [row.threshold for low, row in supported if low >= target_accuracy]:
        return min(good)
    low, best = max(supported, key=lambda row: row[0])
    raise InputError(
        f"{refusal}: its validation texts are too few or too often wrong; the highest that they support is "
        f"{math.floor(low * 1000) / 1000:.3f}, at confidence {best.threshold:g}, which {best.num_texts} of them reach"
    )
