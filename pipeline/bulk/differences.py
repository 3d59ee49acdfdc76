"""What differs between two bulk jobs, as one message."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.bulk.records import BulkJob
from pipeline.errors import InputError
from pipeline.printable import counted
from pipeline.storage.place import Place


def check_same_job(output: Place, before: BulkJob, job: BulkJob, *, changed: Collection[str]) -> None:
    """Compare a job with the one that the folder was begun for. Files that could not be read then, or were only touched, may differ.

    Raises: InputError: something else is not as it was.
    """
    there = json.loads(before.model_dump_json())
    now = {file.path: file for file in job.files}
    for index, then in enumerate(before.files):
        found = now.get(then.path)
        if found is None or then.path in changed:
            continue
        was_mended = then.num_rows is None and job.options.limit is None
        if was_mended or (then.size, then.num_rows) == (found.size, found.num_rows):
            there["files"][index] = json.loads(found.model_dump_json())
    differences = _differences(there, json.loads(job.model_dump_json()))
    if differences or changed:
        what = differences or [f"input: {min(changed)} has changed since"]
        raise InputError(
            f"output {output}: holds another job's output ({'; '.join(what[:3])}); choose another folder, or --overwrite to replace it"
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> list[str]:
    found: list[str] = []
    for key in here:
        name, one, two = f"{path}{key}", there.get(key), here[key]
        if one == two:
            continue
        if isinstance(one, dict) and isinstance(two, dict):
            found += _differences(one, two, f"{name}.")
        elif key == "files":
            found.append(_different_files(one or [], two))
        elif key == "adapters":
            found += _different_adapters(one or [], two)
        else:
            found.append(f"{name}: then {one}, now {two}")
    return found


def _different_files(there: list[dict[str, Any]], here: list[dict[str, Any]]) -> str:
    old, new = ({file["path"]: file for file in files} for files in (there, here))
    for what, paths in (("new", new.keys() - old.keys()), ("gone", old.keys() - new.keys())):
        if paths:
            return f"input: {min(paths)} is {what} ({counted(len(old), 'file')} then, {len(new)} now)"
    path = min(path for path in new if new[path] != old[path])
    if {**new[path], "num_rows": None} == {**old[path], "num_rows": None}:
        became_readable = old[path]["num_rows"] is None
        return f"input: {path} could {'not be read then, and can be now' if became_readable else 'be read then, and cannot now'}"
    return f"input: {path} has changed since"


def _different_adapters(there: list[dict[str, Any]], here: list[dict[str, Any]]) -> list[str]:
    if [a["name"] for a in there] != [a["name"] for a in here]:
        return [f"adapters: then {_named(there)}, now {_named(here)}"]
    pairs = zip(there, here, strict=True)
    return [difference for one, two in pairs for difference in _differences(one, two, f"adapter {two['name']}: ")]


def _named(adapters: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{a['name']} {a['sha256'][:8]}" for a in adapters)
