"""The differences between two bulk jobs, as one message."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.bulk.records import BulkJob
from pipeline.errors import InputError
from pipeline.printable import counted
from pipeline.storage.place import Place


def check_same_job(output: Place, previous: BulkJob, job: BulkJob, *, changed: Collection[str]) -> None:
    """Check that a job is the one that its output folder was created for.

    Files that were unreadable then and can be read now may differ, and so may files that were only touched.

    Args:
        output: The output folder.
        previous: The job in its plan.
        job: The new job.
        changed: Input files whose bytes have changed since a unit was made from them.
    Raises: InputError: anything else differs; the message names up to three differences.
    """
    old = json.loads(previous.model_dump_json())
    current = {file.path: file for file in job.files}
    for index, before in enumerate(previous.files):
        now = current.get(before.path)
        if now is None or before.path in changed:
            continue
        was_repaired = before.num_rows is None and job.options.limit is None
        if was_repaired or (before.size, before.num_rows) == (now.size, now.num_rows):
            old["files"][index] = json.loads(now.model_dump_json())
    old.pop("limits")  # measured, not chosen
    differences = _differences(old, json.loads(job.model_dump_json(exclude={"limits"})))
    if differences or changed:
        what = differences or [f"input: {min(changed)} has changed since"]
        raise InputError(
            f"output {output}: holds another job's output ({'; '.join(what[:3])}); "
            "choose another folder, or --overwrite to replace it"
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    differences: list[str] = []
    for key, after in new.items():
        name, before = f"{path}{key}", old.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            differences += _differences(before, after, f"{name}.")
        elif key == "files":
            differences.append(_different_files(before or [], after))
        elif key == "adapters":
            differences += _different_adapters(before or [], after)
        else:
            differences.append(f"{name}: then {before}, now {after}")
    return differences


def _different_files(old_files: list[dict[str, Any]], new_files: list[dict[str, Any]]) -> str:
    old, new = ({file["path"]: file for file in files} for files in (old_files, new_files))
    for what, paths in (("new", new.keys() - old.keys()), ("gone", old.keys() - new.keys())):
        if paths:
            return f"input: {min(paths)} is {what} ({counted(len(old), 'file')} then, {len(new)} now)"
    path = min(path for path in new if new[path] != old[path])
    if {**new[path], "num_rows": None} == {**old[path], "num_rows": None}:
        became_readable = old[path]["num_rows"] is None
        change = "could not be read then, and can be now" if became_readable else "could be read then, and cannot now"
        return f"input: {path} {change}"
    return f"input: {path} has changed since"


def _different_adapters(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    if [a["name"] for a in old] != [a["name"] for a in new]:
        return [f"adapters: then {_named(old)}, now {_named(new)}"]
    pairs = zip(old, new, strict=True)
    return [difference for a, b in pairs for difference in _differences(a, b, f"adapter {b['name']}: ")]


def _named(adapters: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{a['name']} {a['sha256'][:8]}" for a in adapters)
