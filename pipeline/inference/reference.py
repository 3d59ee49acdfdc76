"""References to trained adapters: a folder, ``FOLDER#TASK`` or ``hf:OWNER/NAME[@REVISION]#TASK``.

A reference may end with ``.query`` or ``.passage``, the side of a pair that the texts are on.
Adapters are found and described without torch.
"""

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
from pipeline.records import SIDES, Side
from pipeline.store.folders import adapters_in, explain, is_folder
from pipeline.store.run_folder import TaskFolder

NAME = re.compile(r"[^=/#@:]+")
"""Pattern of NAME in ``NAME=REF``."""
_NAMED = re.compile(rf"(?P<name>{NAME.pattern})=(?P<ref>.+)")


def find_adapters(refs: Sequence[str], *, offline: bool) -> tuple[FoundAdapter, ...]:
    """Find the adapters of references ``[NAME=]REF``. NAME defaults to the name of the MTEB task.

    Raises: AdapterError: not found, damaged, two with the same name, or trained on different encoders.
    """
    adapters: list[FoundAdapter] = []
    for ref in refs:
        named = None if is_folder(split_folder(ref)[0]) else _NAMED.fullmatch(ref)  # a folder's name may contain "="
        folder, side = _folder(named["ref"] if named else ref, offline=offline)
        adapter = describe_adapter(folder)
        _check_side(adapter, side, ref)
        name = named["name"] if named else f"{adapter.name}.{side}" if side else adapter.name
        adapters.append(replace(adapter, name=name, side=side))
    # To many readers of Parquet, columns whose names differ only in case are the same.
    names = [adapter.name.casefold() for adapter in adapters]
    twice = sorted({adapter.name for adapter in adapters if names.count(adapter.name.casefold()) > 1})
    if twice:
        raise AdapterError(
            f"two adapters are called {', '.join(twice)}, so their columns would clash; name them: --adapter NAME=REF"
        )
    for other in adapters[1:]:
        _check_same_encoder(adapters[0], other)
    return tuple(adapters)


def find_task_folder(ref: str, *, offline: bool) -> TaskFolder:
    """Find the folder of one adapter, or of the adapters of both sides of a task.

    Args:
        ref: A reference without NAME.
        offline: Send no request to the Hub.
    Raises: AdapterError: not found, or not published.
    """
    return _folder(ref, offline=offline, both_sides=True)[0]


def _folder(ref: str, *, offline: bool, both_sides: bool = False) -> tuple[TaskFolder, Side | None]:
    hub = HUB_REF.fullmatch(ref)
    if hub:
        return _hub_folder(hub, offline=offline, both_sides=both_sides)
    folder, task = split_folder(ref)
    if not folder or is_on_hub(ref):
        raise AdapterError(
            f"adapter {ref!r}: expected an adapter's folder, FOLDER#TASK, or hf:OWNER/NAME[@REVISION]#TASK"
        )
    return _pick(Path(folder), task, ref, both_sides=both_sides)


def split_folder(ref: str) -> tuple[str, str | None]:
    """Split ``FOLDER#TASK``. The task is None for a folder alone, whose name may contain ``#``."""
    if "#" not in ref or is_folder(ref):
        return ref, None
    folder, _, task = ref.rpartition("#")
    return folder, task


def split_side(name: str) -> tuple[str, Side | None]:
    """Split ``TASK.query`` or ``TASK.passage`` into task and side. The side is None in other names."""
    for side in SIDES:
        if name.endswith(f".{side}"):
            return name.removesuffix(f".{side}"), side
    return name, None


def _only(folder: TaskFolder, ref: str) -> TaskFolder:
    """Raises: AdapterError: the folder holds two adapters."""
    if folder.has_sides:
        name = folder.root.name
        raise AdapterError(f"adapter {ref}: {name} has two adapters; choose {name}.query or {name}.passage")
    return folder


def _names(folder: TaskFolder, *, both_sides: bool) -> list[str]:
    """Names by which the adapters of a task are chosen."""
    name = folder.root.name
    return [f"{name}.{side}" for side in SIDES] if folder.has_sides and not both_sides else [name]


def _pick(root: Path, task: str | None, ref: str, *, both_sides: bool) -> tuple[TaskFolder, Side | None]:
    if task is None and TaskFolder(root).has_sides:
        return TaskFolder(root) if both_sides else _only(TaskFolder(root), ref), None
    existing = adapters_in(root)
    name, side = split_side(root.name if task is None else task)
    if task is None and os.path.lexists(TaskFolder(root).adapter_weights):
        return TaskFolder(root), TaskFolder(root).own_side
    if task in existing or (task is None and len(existing) == 1):
        folder = TaskFolder(root / (task or existing[0]))
        return folder if both_sides else _only(folder, ref), folder.own_side
    of_side = TaskFolder((root.parent if task is None else root) / name)
    if side and any(os.path.lexists(adapter.adapter_weights) for adapter in of_side.adapters):
        return of_side.side(side) if of_side.has_sides else of_side, side
    names = [chosen for each in existing for chosen in _names(TaskFolder(root / each), both_sides=both_sides)]
    if names and task:
        fault = f"it has no adapter {task}; it has {', '.join(names)}"
    elif names:
        fault = f"choose one of its adapters, such as {ref}#{names[0]} ({', '.join(names)})"
    else:
        fault = (
            f"{explain(root, task=task)}; expected an adapter's folder, FOLDER#TASK, or hf:OWNER/NAME[@REVISION]#TASK"
        )
    raise AdapterError(f"adapter {ref}: {fault}")


def _check_side(adapter: FoundAdapter, side: Side | None, ref: str) -> None:
    """Raises: AdapterError: the reference names a side, and the adapter's texts have none."""
    if side is not None and (adapter.has_head or adapter.meta.objective not in (None, "retrieval")):
        family = "classification" if adapter.has_head else adapter.meta.objective
        raise AdapterError(
            f"adapter {ref}: only texts of a retrieval adapter are queries or passages, and this one is for {family}; "
            f"leave out .{side}"
        )


def _hub_folder(ref: re.Match[str], *, offline: bool, both_sides: bool) -> tuple[TaskFolder, Side | None]:
    if not ref["task"]:
        raise AdapterError(f"adapter {ref[0]}: name one of the repository's adapters: {ref[0]}#TASK")
    names = dict.fromkeys((ref["task"], split_side(ref["task"])[0]))
    files = [
        path
        for name in names
        for has_sides in (False, True)
        for path in TaskFolder(Path(name)).published(has_sides=has_sides)
    ]
    root = download(
        ref["repository"],
        ref["revision"],
        what=f"adapter {ref[0]}",
        patterns=[path.as_posix() for path in files if path.suffix != ".pt"],
        offline=offline,
        kind=AdapterError,
    )
    return _pick(root, ref["task"], ref[0], both_sides=both_sides)


def _check_same_encoder(first: FoundAdapter, other: FoundAdapter) -> None:
    for what in ("revision", "pooling", "max_tokens"):
        one, two = getattr(first.encoder, what), getattr(other.encoder, what)
        if one != two:
            raise AdapterError(
                f"adapters {first.name} and {other.name} were trained with encoder {what} {one} and {two}; "
                "use a job for each"
            )


def common_prefix(adapters: Sequence[FoundAdapter]) -> str:
    """Text that several adapters put before each text, so that the texts are tokenised once.

    Raises: AdapterError: they put different texts, or one of them needs a side.
    """
    for other in adapters[1:]:
        if other.prefix != adapters[0].prefix:
            raise AdapterError(
                f"adapters {adapters[0].name} and {other.name} put different texts before each text, "
                f"{adapters[0].prefix!r} and {other.prefix!r}; use a job for each"
            )
    return adapters[0].prefix


def threshold_for(adapter: FoundAdapter, target_accuracy: float) -> float:
    """Lowest threshold of the adapter's coverage table that guarantees an accuracy.

    With probability 0.95, texts that keep their label are then labelled with at least this accuracy, if they are like
    those of the validation slice. See ``calibration.coverage_table``.

    Raises: InputError: the table is missing, was not measured on validation or has no counts, or no threshold suffices.
    """
    refusal = f"adapter {adapter.name}: --target-accuracy {target_accuracy:g} cannot be guaranteed"
    calibration = adapter.calibration
    if calibration is None:
        raise InputError(f"{refusal}: it has no calibration.json; use --min-score")
    if calibration.fitted_on == "none":
        raise InputError(
            f"{refusal}: it was trained without a validation slice, on which coverage is measured; use --min-score"
        )
    supported = [(row.low, row) for row in calibration.coverage if row.low is not None]
    if not supported:
        older = "an older version wrote its calibration.json, which has no counts of texts"
        raise InputError(f"{refusal}: {older}; train the adapter again, or use --min-score")
    if thresholds := [row.threshold for low, row in supported if low >= target_accuracy]:
        return min(thresholds)
    low, best = max(supported, key=lambda row: row[0])
    raise InputError(
        f"{refusal}: too few validation texts, or too many errors on them; the highest possible is "
        f"{math.floor(low * 1000) / 1000:.3f}, at confidence {best.threshold:g}, reached by {best.num_texts} of them"
    )
