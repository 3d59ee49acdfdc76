"""References to trained adapters: a folder, ``FOLDER#TASK`` or ``hf:OWNER/NAME[@REVISION]#TASK``, found and described without torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.adapter.description import FoundAdapter, describe_adapter
from pipeline.errors import AdapterError, InputError
from pipeline.hub_address import HUB_REF, is_on_hub
from pipeline.hub_client import download
from pipeline.store.folders import adapters_in, explain, is_folder
from pipeline.store.run_folder import TaskFolder

NAME = re.compile(r"[^=/#@:]+")
"""What NAME can be in ``NAME=REF``."""
_NAMED = re.compile(rf"(?P<name>{NAME.pattern})=(?P<ref>.+)")


def find_adapters(refs: Sequence[str], *, offline: bool) -> tuple[FoundAdapter, ...]:
    """Find what ``[NAME=]REF`` names; NAME is the MTEB task's where left out.

    Raises: AdapterError: not found, damaged, two of one name, or trained on different encoders.
    """
    found: list[FoundAdapter] = []
    for ref in refs:
        named = None if is_folder(split_folder(ref)[0]) else _NAMED.fullmatch(ref)  # a folder's name may hold the sign
        adapter = describe_adapter(_folder(named["ref"] if named else ref, offline=offline))
        found.append(replace(adapter, name=named["name"]) if named else adapter)
    names = [
        adapter.name.casefold() for adapter in found
    ]  # columns whose names differ only in case are one to many readers
    twice = sorted({adapter.name for adapter in found if names.count(adapter.name.casefold()) > 1})
    if twice:
        raise AdapterError(
            f"two adapters are called {', '.join(twice)}, and their columns would be too; name them: --adapter NAME=REF"
        )
    for other in found[1:]:
        _check_same_encoder(found[0], other)
    return tuple(found)


def _folder(ref: str, *, offline: bool) -> TaskFolder:
    hub = HUB_REF.fullmatch(ref)
    if hub:
        return _hub_folder(hub, offline=offline)
    place, task = split_folder(ref)
    if not place or is_on_hub(ref):
        raise AdapterError(
            f"adapter {ref!r}: expected an adapter's folder, FOLDER#TASK, or hf:OWNER/NAME[@REVISION]#TASK"
        )
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
        fault = (
            f"{explain(root, task=task)}; expected an adapter's folder, FOLDER#TASK, or hf:OWNER/NAME[@REVISION]#TASK"
        )
    raise AdapterError(f"adapter {ref}: {fault}")


def _hub_folder(ref: re.Match[str], *, offline: bool) -> TaskFolder:
    if not ref["task"]:
        raise AdapterError(f"adapter {ref[0]}: say which of the repository's adapters: {ref[0]}#TASK")
    files = TaskFolder(Path(ref["task"])).published()
    root = download(
        ref["repository"],
        ref["revision"],
        what=f"adapter {ref[0]}",
        patterns=[path.as_posix() for path in files if path.suffix != ".pt"],
        offline=offline,
        kind=AdapterError,
    )
    return _pick(root, ref["task"], ref[0])


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
    ``calibration.coverage_table``.

    Raises: InputError: the table is missing, was not measured on validation or does not count its texts, or no threshold supports it.
    """
    refusal = f"adapter {adapter.name}: --target-accuracy {target_accuracy:g} cannot be promised"
    calibration = adapter.calibration
    if calibration is None:
        raise InputError(f"{refusal}: there is no calibration.json; use --min-score")
    if calibration.fitted_on == "none":
        raise InputError(
            f"{refusal}: it was trained without a validation slice to measure its coverage on; use --min-score"
        )
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
