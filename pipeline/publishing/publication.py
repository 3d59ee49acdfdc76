"""Contents of a publication: the adapters of a finished run, plus those that stay. Uses neither the Hub nor torch."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipeline
from pipeline.errors import InputError, LorafleetError
from pipeline.publishing.consistency import check_run, check_summary, check_task, listed_tasks
from pipeline.records import AdapterMeta, ClassificationResults, Publication, TaskResult
from pipeline.reports.formatting import without_local_paths
from pipeline.run.outputs import write_mteb_results, write_outputs
from pipeline.store.files import add_file, copy_inside, open_inside, read_record, write_atomically
from pipeline.store.folders import explain, kind_of
from pipeline.store.manifest import RunManifest, read_manifest
from pipeline.store.run_folder import RunFolder


@dataclass(frozen=True)
class Candidate:
    """A finished run to publish."""

    folder: RunFolder
    manifest: RunManifest
    summary: ClassificationResults
    results: Mapping[str, TaskResult]
    """MTEB task -> its result, in the order of the score table."""


@dataclass(frozen=True)
class PublishedState:
    """State of a target before publishing."""

    revision: str | None
    """Commit of a repository; None for a folder."""
    folder: RunFolder | None
    """The published files, at least the JSON files; None if nothing is published."""
    publication: Publication | None

    def tasks(self) -> tuple[str, ...]:
        """Names of the published MTEB tasks."""
        return tuple(self.publication.adapters) if self.publication else ()

    def result(self, task: str) -> TaskResult:
        """Read the published result of an MTEB task."""
        assert self.folder is not None
        return read_record(self.folder.task(task).result, TaskResult)


def read_candidate(run: Path) -> Candidate:
    """Read a finished run, and check that its files are complete, consistent, and no symbolic links.

    Raises:
        InputError: not a run folder, an unfinished run, or a file that is missing, damaged or a link.
        VerificationError: a file contradicts what was measured of an adapter.
    """
    if kind_of(run) != "run":
        raise InputError(
            f"cannot publish {run}: {explain(run)}; expected the folder of a finished run, "
            "as the last line of `lorafleet train` names it"
        )
    folder = RunFolder(run.resolve())
    _check_files(folder.root, (folder.manifest, *folder.published()))
    summary = read_record(folder.results, ClassificationResults)
    tasks = listed_tasks(folder)
    if not tasks:
        raise InputError(
            f"{folder.root}: none of its {len(summary.failures)} MTEB tasks finished, so there is nothing to publish"
        )
    manifest, results = read_manifest(folder), {}
    for name in tasks:
        task = folder.task(name)
        _check_files(folder.root, (task.result,))
        result = read_record(task.result, TaskResult)
        _check_files(folder.root, task.published(has_head=result.has_head, has_sides=result.has_sides))
        found, results[name] = check_task(task)
        check_run(manifest, found, results[name])
    check_summary(folder, results, listed=manifest)
    return Candidate(folder, manifest, summary, results)


def stage(candidate: Candidate, promoted: Sequence[str], base: PublishedState, staging: RunFolder) -> Publication:
    """Write the files of the next publication. The result is reproducible byte for byte.

    Tables, card and report cover the adapters that stay as well as the promoted ones. Files of adapters that stay are
    copied only if they are in ``base.folder``.

    Args:
        candidate: The run.
        promoted: MTEB tasks whose adapters the gate promotes.
        base: Current state of the target.
        staging: Folder to write to.
    Returns:
        The content of ``publication.json``.
    Raises:
        InputError: an adapter that stays was trained on another encoder.
        LorafleetError: a file contains a local path.
    """
    stay = [task for task in base.tasks() if task not in promoted]
    _check_encoder(candidate, stay, base)
    results: dict[str, TaskResult] = {task: base.result(task) for task in stay}
    for task in stay:
        _copy_what_stays(base, task, staging)
    for task in promoted:
        of_task, result = candidate.folder.task(task), candidate.results[task]
        for path in of_task.published(has_head=result.has_head, has_sides=result.has_sides):
            _copy(candidate.folder, path.relative_to(candidate.folder.root).as_posix(), staging)
        results[task] = _public(candidate.results[task])
        write_atomically(staging.task(task).result, results[task].model_dump_json(indent=1))
    ordered = [results[task] for task in dict.fromkeys([*base.tasks(), *promoted])]
    meta = read_record(staging.task(ordered[-1].mteb_task.name).adapters[0].meta, AdapterMeta)
    write_outputs(
        ordered,
        candidate.summary.failures,
        staging,
        encoder=candidate.summary.encoder,
        run_id=candidate.summary.run_id,
        created_at=candidate.summary.created_at,
        adapted_modules=meta.adapted_modules,
        trust_remote_code=candidate.manifest.config.encoder.trust_remote_code,
        license=candidate.manifest.config.publish.license,
    )
    for result in ordered:
        write_mteb_results(result, staging.task(result.mteb_task.name), staging)
    _check_no_local_path(staging, candidate)
    publication = Publication(
        run_id=candidate.summary.run_id,
        lorafleet_version=pipeline.__version__,
        encoder=candidate.summary.encoder,
        adapters={result.mteb_task.name: result.adapter.sha256 for result in ordered},
        files=_files_that_stay(base, stay)
        | {path: file_sha256(staging.root / path) for path in files_below(staging.root)},
    )
    write_atomically(staging.publication, publication.model_dump_json(indent=1))
    return publication


def files_below(root: Path) -> list[str]:
    """Relative POSIX paths of all files and symbolic links below a folder, sorted."""
    return sorted(
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_symlink() or not path.is_dir()
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        OSError: as ``add_file``.
    """
    digest = hashlib.sha256()
    add_file(digest, path)
    return digest.hexdigest()


def _check_files(root: Path, paths: Iterable[Path]) -> None:
    """Check that files exist, and that no symbolic link leads to them: the run does not own the target of a link."""
    missing = []
    for path in paths:
        try:
            open_inside(root, path.relative_to(root).as_posix()).close()
        except FileNotFoundError:
            missing.append(path)
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}; nothing was published") from None
    if missing:
        names = ", ".join(path.name for path in missing)
        raise InputError(f"{missing[0].parent}: {names} is missing from a finished run; run `lorafleet train` again")


def _copy(source: RunFolder, path: str, staging: RunFolder) -> None:
    try:
        copy_inside(source.root, path, staging.root / path)
    except OSError as error:
        raise InputError(f"{source.root / path}: {error.strerror}; nothing was published") from None


def _copy_what_stays(base: PublishedState, task: str, staging: RunFolder) -> None:
    assert base.folder is not None
    for path in _files_that_stay(base, [task]):
        if base.revision is None:
            _copy(base.folder, path, staging)
        elif (base.folder.root / path).exists():  # read, not copied: the Hub's cache consists of links
            write_atomically(staging.root / path, (base.folder.root / path).read_bytes())


def _check_encoder(candidate: Candidate, stay: Sequence[str], base: PublishedState) -> None:
    for task in stay:
        published, new = base.result(task).encoder, candidate.summary.encoder
        if published.revision != new.revision:
            raise InputError(
                f"cannot publish run {candidate.summary.run_id}: {task} stays published, and was trained on "
                f"{published.public_name} at {published.revision}, but this run's encoder is {new.public_name} at "
                f"{new.revision}; train {task} as well, or publish elsewhere"
            )


_LOCATIONS = ("location", "test_location", "validation_location", "corpus_location", "qrels_location")


def _public(result: TaskResult) -> TaskResult:
    """Copy a result without machine-specific paths."""
    task, encoder = result.mteb_task, result.encoder
    locations = {
        field: without_local_paths(location) for field in _LOCATIONS if (location := getattr(task, field)) is not None
    }
    return result.changed(
        mteb_task=task.changed(**locations),
        encoder=encoder.changed(name=encoder.public_name),
        adapter=result.adapter.changed(path=task.name),
        data=result.data.changed(notes=tuple(without_local_paths(note) for note in result.data.notes)),
    )


def _files_that_stay(base: PublishedState, stay: Sequence[str]) -> dict[str, str]:
    if base.publication is None:
        return {}
    return {path: sha256 for path, sha256 in base.publication.files.items() if path.split("/")[0] in stay}


def _check_no_local_path(staging: RunFolder, candidate: Candidate) -> None:
    names = "|".join(re.escape(form) for path in sorted(_local_paths(candidate)) for form in _written_forms(path))
    pattern = re.compile(rf"(?<![\w.])(?:{names})(?![\w-])".encode())
    for path in files_below(staging.root):
        match = pattern.search((staging.root / path).read_bytes())
        if match:
            raise LorafleetError(f"{path} contains the local path {match[0].decode()}; nothing was published")


def _local_paths(candidate: Candidate) -> set[str]:
    """Absolute local paths in a run: its own folder, and every path in its config and results."""
    values: list[Any] = [str(candidate.folder.root), candidate.manifest.config.model_dump(mode="json")]
    for result in candidate.results.values():
        values += [getattr(result.mteb_task, field) for field in _LOCATIONS]
        values += [result.adapter.path, result.encoder.name]
    return {text.rstrip("/") for text in _strings(values) if Path(text).is_absolute() and text.strip("/")}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _written_forms(path: str) -> set[str]:
    """Spellings of a path in plain text, JSON and HTML."""
    return {path, json.dumps(path)[1:-1], html.escape(path)}
