"""References to trained adapters: a folder, ``FOLDER#TASK`` or ``hf:OWNER/NAME[@REVISION]#TASK``, found and described without torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config import EncoderConfig
from pipeline.errors import AdapterError, DataError, InputError, first_line
from pipeline.manifest import finished_runs
from pipeline.records import Calibration
from pipeline.run_folder import TaskFolder, adapter_sha256, read_record

_NAMED = re.compile(r"(?P<name>[^=/#@:]+)=(?P<ref>.+)")
HUB_REF = re.compile(r"hf:(?P<repository>[^/@#]+/[^/@#]+)(?:@(?P<revision>[^#]+))?(?:#(?P<task>[^/#]+))?")


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
        named = _NAMED.fullmatch(ref)
        adapter = _describe(_folder(named["ref"] if named else ref, offline=offline))
        found.append(replace(adapter, name=named["name"]) if named else adapter)
    names = [adapter.name for adapter in found]
    twice = sorted({name for name in names if names.count(name) > 1})
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
    root = Path(place)
    if not root.is_dir():
        raise AdapterError(f"adapter {ref}: no such folder; expected an adapter's folder, FOLDER#TASK, or hf:OWNER/NAME[@REVISION]#TASK")
    return _pick(root, task, ref)


def split_folder(ref: str) -> tuple[str, str | None]:
    """``FOLDER#TASK`` as both, or a folder alone; the sign may also be part of a folder's name."""
    if "#" not in ref or Path(ref).is_dir():
        return ref, None
    place, _, task = ref.rpartition("#")
    return place, task


def _pick(root: Path, task: str | None, ref: str) -> TaskFolder:
    folder = TaskFolder(root / task if task else root)
    if folder.adapter_weights.is_file():
        return folder
    there = sorted(path.parent.name for path in root.glob(f"*/{folder.adapter_weights.name}"))
    if len(there) == 1 and not task:
        return TaskFolder(root / there[0])
    newest = next((run.root for run, _ in finished_runs(root)), None)
    if there and task:
        fault = f"there is no adapter {task} in it, but {', '.join(there)}"
    elif there:
        fault = f"choose one of its adapters, as {ref}#{there[0]} ({', '.join(there)})"
    elif newest is not None:
        fault = f"{root} is a run store; name one of its runs, such as {newest}#{task or 'TASK'}"
    else:
        fault = "there is no adapter in it"
    raise AdapterError(f"adapter {ref}: {fault}")


def _hub_folder(ref: re.Match[str], *, offline: bool) -> TaskFolder:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not ref["task"]:
        raise AdapterError(f"adapter {ref[0]}: say which of the repository's adapters: {ref[0]}#TASK")
    try:
        patterns = [f"{ref['task']}/*.json", f"{ref['task']}/*.safetensors"]
        root = snapshot_download(ref["repository"], revision=ref["revision"], allow_patterns=patterns, local_files_only=offline)
    except LocalEntryNotFoundError:
        raise AdapterError(f"adapter {ref[0]}: not in the local cache, and the Hub cannot be reached") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise AdapterError(f"adapter {ref[0]}: cannot be fetched from the Hub: {first_line(error)}") from None
    return _pick(Path(root), ref["task"], ref[0])


def _describe(folder: TaskFolder) -> FoundAdapter:
    try:
        meta: dict[str, Any] = json.loads(folder.meta.read_text(encoding="utf-8"))
        labels = json.loads(folder.labels.read_text(encoding="utf-8"))
        encoder = EncoderConfig(
            name=meta["encoder"]["name"], revision=meta["encoder"]["revision"], pooling=meta["pooling"], max_tokens=meta["max_tokens"]
        )
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise AdapterError(f"{folder.root}: meta.json or labels.json is missing or damaged: {first_line(error)}") from None
    if not isinstance(labels, list) or not labels:
        raise AdapterError(f"{folder.labels}: expected a list of label names")
    try:
        calibration = read_record(folder.calibration, Calibration) if folder.calibration.is_file() else None
    except DataError as error:
        raise AdapterError(str(error)) from None
    sha256 = adapter_sha256(folder.root)
    described = hashlib.sha256()
    for path in (folder.meta, folder.calibration):
        described.update(path.read_bytes() if path.is_file() else b"none")
    name = meta.get("task", folder.root.name)
    return FoundAdapter(name, folder, sha256, described.hexdigest(), encoder, tuple(map(str, labels)), calibration)


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
