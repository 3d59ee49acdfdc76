"""Kinds of folders that commands accept: adapter, run, publication, run store."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pipeline.store.finished import finished_runs
from pipeline.store.run_folder import RunFolder, TaskFolder

FolderKind = Literal["nothing", "file", "adapter", "run", "unfinished run", "publication", "run store", "other"]
RUN_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")
"""Pattern of the names that `lorafleet train` gives to run folders."""


def kind_of(root: Path) -> FolderKind:
    """Kind of a path, judged by file names alone. Damaged or hostile content is never read."""
    if not is_folder(root):
        return "file" if os.path.lexists(root) else "nothing"
    run = RunFolder(root)
    if os.path.lexists(run.publication):
        return "publication"
    if os.path.lexists(run.manifest):
        return "run"
    if any(os.path.lexists(adapter.adapter_weights) for adapter in TaskFolder(root).adapters):
        return "adapter"
    if os.path.lexists(run.results) or (RUN_NAME.fullmatch(root.absolute().name) and os.path.lexists(run.config)):
        return "unfinished run"
    return "run store" if os.path.lexists(root / ".lock") or _runs_in(root) else "other"


def is_folder(path: Path | str) -> bool:
    """Whether the path is a folder. ``Path.is_dir`` would raise an error for names that are too long."""
    return os.path.isdir(path)  # noqa: PTH112


def adapters_in(root: Path) -> list[str]:
    """Sorted names of the adapter folders in a run or a publication. Dot folders are incomplete copies and skipped."""
    folders = root.glob("[!.]*/") if is_folder(root) else ()
    return sorted(
        folder.name
        for folder in folders
        if any(os.path.lexists(adapter.adapter_weights) for adapter in TaskFolder(folder).adapters)
    )


def explain(root: Path, *, task: str | None = None) -> str:
    """Describe a folder of the wrong kind in a message, with a suggestion if there is one.

    Args:
        root: Path that the user gave.
        task: MTEB task whose adapter is looked up in the folder.
    """
    match kind_of(root):
        case "nothing":
            return f"there is no folder {root}"
        case "file":
            return f"{root} is a file"
        case "adapter":
            return f"{root} is the folder of a single adapter"
        case "run":
            return f"{root} is a run folder, in the run store {root.absolute().parent}"
        case "unfinished run":
            return (
                f"{root} is not finished: it has no manifest.json, which is written last; let `lorafleet train` finish"
            )
        case "publication":
            return f"{root} is a publication"
        case "run store":
            newest = next((run.root for run, _ in finished_runs(root)), None)
            if newest is None:
                return f"{root} is a run store, and none of its runs is finished"
            return f"{root} is a run store; name one of its runs, such as {newest}{f'#{task}' if task else ''}"
        case "other":
            return f"{root} is neither a run folder, nor a publication, nor an adapter's folder"


def _runs_in(root: Path) -> bool:
    return any(
        is_folder(path) and (RUN_NAME.fullmatch(path.name) or os.path.lexists(RunFolder(path).manifest))
        for path in root.glob("*")
    )
