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
from pipeline.records import Side
from pipeline.store.folders import adapters_in, explain, is_folder
from pipeline.store.run_folder import TaskFolder

NAME = re.compile(r"[^=/#@:]+")
"""Pattern of NAME in ``NAME=REF``."""
_SIDES: tuple[Side, ...] = ("query", "passage")
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
        name = named["name"] if named else _with_side(adapter.name, side)
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


def _folder(ref: str, *, offline: bool) -> tuple[TaskFolder, Side | None]:
    hub = HUB_REF.fullmatch(ref)
    if hub:
        return _hub_folder(hub, offline=offline)
    folder, task = split_folder(ref)
    if not folder or is_on_hub(ref):
        raise AdapterError(
            f"adapter {ref!r}: expected an adapter's folder, FOLDER#TASK, or hf:OWNER/NAME[@REVISION]#TASK"
        )
    return _pick(Path(folder), task, ref)


def split_folder(ref: str) -> tuple[str, str | None]:
    """Split ``FOLDER#TASK``. The task is None for a folder alone, whose name may contain ``#``."""
    if "#" not in ref or is_folder(ref):
        return ref, None
    folder, _, task = ref.rpartition("#")
    return folder, task


def _split_side(name: str) -> tuple[str, Side | None]:
    """Split ``TASK.query`` or ``TASK.passage``. The side is None in other names."""
    for side in _SIDES:
        if name.endswith(f".{side}"):
            return name.removesuffix(f".{side}"), side
    return name, None


def _with_side(name: str, side: Side | None) -> str:
    return name if side is None or _split_side(name)[1] == side else f"{name}.{side}"


def _pick(root: Path, task: str | None, ref: str) -> tuple[TaskFolder, Side | None]:
    existing = adapters_in(root)
    name, side = _split_side(root.name if task is None else task)
    if task is None and os.path.lexists(TaskFolder(root).adapter_weights):
        return TaskFolder(root), side
    if task in existing:
        return TaskFolder(root / task), side
    if task is None and len(existing) == 1:
        return TaskFolder(root / existing[0]), _split_side(existing[0])[1]
    of_side = TaskFolder((root.parent if task is None else root) / name)
    if side and os.path.lexists(of_side.adapter_weights):
        return of_side, side
    if existing and task:
        fault = f"it has no adapter {task}; it has {', '.join(existing)}"
    elif existing:
        fault = f"choose one of its adapters, such as {ref}#{existing[0]} ({', '.join(existing)})"
    else:
        fault = (
            f"{explain(root, task=task)}; expected an adapter's folder, FOLDER#TASK, or hf:OWNER/NAME[@REVISION]#TASK"
        )
    raise AdapterError(f"adapter {ref}: {fault}")


def _hub_folder(ref: re.Match[str], *, offline: bool) -> tuple[TaskFolder, Side | None]:
    if not ref["task"]:
        raise AdapterError(f"adapter {ref[0]}: name one of the repository's adapters: {ref[0]}#TASK")
    names = dict.fromkeys((ref["task"], _split_side(ref["task"])[0]))
    files = [path for name in names for path in TaskFolder(Path(name)).published()]
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
