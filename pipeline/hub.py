"""Publish a finished run in the source document's repository layout: all of it, verified, or nothing. Reads no pickle."""

from __future__ import annotations

import html
import json
import re
import secrets
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, LorafleetError, VerificationError
from pipeline.records import ClassificationResults, TaskResult
from pipeline.run_folder import RunFolder, adapter_sha256, read_record


def publish_to_folder(run: Path, target: Path) -> list[Path]:
    """Copy a finished run to ``target``, which then holds all of it, or what it held before.

    Args:
        run: A run folder with its manifest. MTEB tasks that failed are listed in the results, the others are published.
        target: A folder that is new, empty, or was published before; its parents are made.
    Returns: The published files, sorted.
    Raises:
        InputError: the run is not finished, or the target holds something else.
        VerificationError: an adapter is not the one that was measured.
        LorafleetError: a file names a local path, or the copy failed; the target is as it was.
    """
    source, target = RunFolder(run.resolve()), target.resolve()
    summary = _finished(source)
    _check_target(source, target)
    staging = target.with_name(f".{target.name}.{secrets.token_hex(6)}.staging")
    try:
        for path in _layout(source, summary):
            copy = staging / path.relative_to(source.root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        _verify(RunFolder(staging), source, summary)
        _swap(staging, target)
    except OSError as error:
        raise LorafleetError(f"publishing {source.root.name} to {target} failed, and left it as it was: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return sorted(_layout(RunFolder(target), summary))


def _finished(run: RunFolder) -> ClassificationResults:
    if not run.manifest.is_file():
        there = "is not finished" if run.results.is_file() or run.config.is_file() else "is not a run folder"
        raise InputError(
            f"{run.root} {there}: manifest.json is missing, which is written last; "
            "let `lorafleet train` finish, or name the folder that its last line prints"
        )
    missing = [path.name for path in run.published() if not path.is_file()]
    if missing:
        raise InputError(f"{run.root}: {', '.join(missing)} is missing from a finished run; run `lorafleet train` again")
    summary = read_record(run.results, ClassificationResults)
    if not summary.tasks:
        raise InputError(f"{run.root}: none of its {len(summary.failures)} MTEB tasks finished, so there is nothing to publish")
    for entry in summary.tasks:
        folder = run.task(entry.task)
        missing = [path.name for path in (*folder.published(), folder.result) if not path.is_file()]
        if missing:
            raise InputError(f"{folder.root}: {', '.join(missing)} is missing from a finished run; run `lorafleet train` again")
    return summary


def _check_target(run: RunFolder, target: Path) -> None:
    if target == run.root or target in run.root.parents or run.root in target.parents:
        raise InputError(f"cannot publish {run.root} to {target}: one lies inside the other; choose a folder elsewhere")
    if target.exists() and not target.is_dir():
        raise InputError(f"cannot publish to {target}: it is a file; name a folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    published = RunFolder(target)
    if not published.results.is_file():
        raise InputError(
            f"cannot publish to {target}: it is not empty and holds no classification_results.json, so it was not published by lorafleet; "
            "choose another folder"
        )
    expected = set(_layout(published, read_record(published.results, ClassificationResults)))
    foreign = sorted(str(path.relative_to(target)) for path in target.rglob("*") if not path.is_dir() and path not in expected)
    if foreign:
        raise InputError(
            f"cannot publish to {target}: publishing replaces the whole folder, so {', '.join(foreign[:5])}"
            f"{f' and {len(foreign) - 5} more' if len(foreign) > 5 else ''} would be lost; move that elsewhere, or choose another folder"
        )


def _layout(root: RunFolder, summary: ClassificationResults) -> list[Path]:
    """Every file of the repository, below ``root``."""
    return [*root.published(), *(path for entry in summary.tasks for path in root.task(entry.task).published())]


def _verify(staged: RunFolder, run: RunFolder, summary: ClassificationResults) -> None:
    results = {entry.task: read_record(run.task(entry.task).result, TaskResult) for entry in summary.tasks}
    for entry in summary.tasks:
        found, measured = adapter_sha256(staged.task(entry.task).root), results[entry.task].adapter.sha256
        if not found == measured == entry.adapter_sha256:
            raise VerificationError(
                f"{entry.task}: the adapter's files have sha256 {found}, but the scores were measured with {measured} "
                f"(classification_results.json: {entry.adapter_sha256}); train it again"
            )
    names = "|".join(re.escape(form) for path in sorted(_local_paths(run, results)) for form in _written_forms(path))
    pattern = re.compile(rf"(?<![\w.])(?:{names})(?![\w-])".encode())
    for path in _layout(staged, summary):
        match = pattern.search(path.read_bytes())
        if match:
            raise LorafleetError(
                f"{path.relative_to(staged.root)} names the local path {match[0].decode()}, which would be published; nothing was"
            )


def _local_paths(run: RunFolder, results: dict[str, TaskResult]) -> set[str]:
    """Absolute paths of this machine that the run knows: its own, and all that its config and results name."""
    known: list[Any] = [str(run.root)]
    if run.config.is_file():
        try:
            known.append(tomllib.loads(run.config.read_text(encoding="utf-8")))
        except ValueError as error:
            raise InputError(f"{run.config} is damaged: {error}") from None
    for result in results.values():
        known += [result.mteb_task.location, result.mteb_task.test_location, result.adapter.path, result.encoder.name]
    return {text.rstrip("/") for text in _strings(known) if Path(text).is_absolute() and text.strip("/")}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _written_forms(path: str) -> set[str]:
    """As it stands in text, in JSON and in HTML."""
    return {path, json.dumps(path)[1:-1], html.escape(path)}


def _swap(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    old = target.with_name(f".{target.name}.{secrets.token_hex(6)}.old")
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:  # an interrupt, too, must not leave the place empty
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
