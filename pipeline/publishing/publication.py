"""What a publication consists of: a finished run laid over what is published already. Knows no Hub and no torch."""

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
from pipeline.publishing.consistency import check_run, check_summary, check_task
from pipeline.records import AdapterMeta, ClassificationResults, Publication, TaskResult
from pipeline.reports.formatting import without_local_paths
from pipeline.reports.outputs import write_mteb_results, write_outputs
from pipeline.store.folders import explain, kind_of
from pipeline.store.manifest import RunManifest, read_manifest
from pipeline.store.run_folder import RunFolder, add_file, copy_inside, open_inside, read_record, write_atomically


@dataclass(frozen=True)
class Candidate:
    """A finished run that is to be published."""

    folder: RunFolder
    manifest: RunManifest
    summary: ClassificationResults
    results: Mapping[str, TaskResult]
    """MTEB task -> what the run knows of it, in table order."""


@dataclass(frozen=True)
class PublishedState:
    """What a target holds before publishing."""

    revision: str | None
    """Commit of a repository; none for a folder."""
    folder: RunFolder | None
    """What is published, at least its JSON files; none if nothing is."""
    publication: Publication | None

    def tasks(self) -> tuple[str, ...]:
        """The MTEB tasks that are published."""
        return tuple(self.publication.adapters) if self.publication else ()

    def result(self, task: str) -> TaskResult:
        """What is published of an MTEB task."""
        assert self.folder is not None
        return read_record(self.folder.task(task).result, TaskResult)


def read_candidate(run: Path) -> Candidate:
    """A finished run whose files are all there, agree about each adapter, and lie in the run folder itself.

    Raises:
        InputError: no run folder, not finished, or a file is missing, damaged or a link.
        VerificationError: a file says something else of an adapter than what was measured.
    """
    if kind_of(run) != "run":
        raise InputError(
            f"cannot publish {run}: {explain(run)}; expected the folder of a finished run, as the last line of `lorafleet train` names it"
        )
    folder = RunFolder(run.resolve())
    _check_files(folder.root, (folder.manifest, *folder.published()))
    summary = read_record(folder.results, ClassificationResults)
    if not summary.tasks:
        raise InputError(
            f"{folder.root}: none of its {len(summary.failures)} MTEB tasks finished, so there is nothing to publish"
        )
    manifest, results = read_manifest(folder), {}
    for entry in summary.tasks:
        task = folder.task(entry.task)
        _check_files(folder.root, (*task.published(), task.result))
        found, results[entry.task] = check_task(task)
        check_run(manifest, found, results[entry.task])
    check_summary(folder, results, listed=manifest)
    return Candidate(folder, manifest, summary, results)


def stage(candidate: Candidate, promoted: Sequence[str], base: PublishedState, staging: RunFolder) -> Publication:
    """Write what is to be published, less those files of MTEB tasks that stay and are not in ``base.folder``.

    Tables, card and report list what stays and what is new; the same run over the same base gives the same bytes.

    Raises:
        InputError: what stays was trained on another encoder.
        LorafleetError: a file names a local path.
    """
    stay = [task for task in base.tasks() if task not in promoted]
    _check_encoder(candidate, stay, base)
    results: dict[str, TaskResult] = {task: base.result(task) for task in stay}
    for task in stay:
        _copy_what_stays(base, task, staging)
    for task in promoted:
        for path in candidate.folder.task(task).published():
            _copy(candidate.folder, f"{task}/{path.name}", staging)
        results[task] = _public(candidate.results[task])
        write_atomically(staging.task(task).result, results[task].model_dump_json(indent=1))
    ordered = [results[task] for task in dict.fromkeys([*base.tasks(), *promoted])]
    meta = read_record(staging.task(ordered[-1].mteb_task.name).meta, AdapterMeta)
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
    """Relative paths of all files and symbolic links, with slashes, sorted."""
    return sorted(
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_symlink() or not path.is_dir()
    )


def file_sha256(path: Path) -> str:
    """Of its bytes.

    Raises: OSError: as ``run_folder.add_file``.
    """
    digest = hashlib.sha256()
    add_file(digest, path)
    return digest.hexdigest()


def _check_files(root: Path, paths: Iterable[Path]) -> None:
    """Check that files are there and lie in the folder itself: what a symbolic link leads to is not the run's to publish."""
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
        elif (base.folder.root / path).exists():  # the rest stays on the Hub; its cache is made of links
            write_atomically(staging.root / path, (base.folder.root / path).read_bytes())


def _check_encoder(candidate: Candidate, stay: Sequence[str], base: PublishedState) -> None:
    for task in stay:
        published, new = base.result(task).encoder, candidate.summary.encoder
        if published.revision != new.revision:
            raise InputError(
                f"cannot publish run {candidate.summary.run_id}: {task} stays, and was trained on {published.public_name} at "
                f"{published.revision}, but this run's encoder is {new.public_name} at {new.revision}; "
                "train that MTEB task too, or publish elsewhere"
            )


def _public(result: TaskResult) -> TaskResult:
    """Less what only this machine understands."""
    task, encoder = result.mteb_task, result.encoder
    places = {"location": without_local_paths(task.location)}
    if task.test_location is not None:
        places["test_location"] = without_local_paths(task.test_location)
    changed = {
        "mteb_task": task.model_dump() | places,
        "encoder": encoder.model_dump() | {"name": encoder.public_name},
        "adapter": result.adapter.model_dump() | {"path": task.name},
        "data": result.data.model_dump() | {"notes": tuple(without_local_paths(note) for note in result.data.notes)},
    }
    return TaskResult.model_validate(result.model_dump() | changed)


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
            raise LorafleetError(
                f"{path} names the local path {match[0].decode()}, which would be published; nothing was"
            )


def _local_paths(candidate: Candidate) -> set[str]:
    """Absolute paths of this machine that the run knows: its own, and all that its config and results name."""
    known: list[Any] = [str(candidate.folder.root), candidate.manifest.config.model_dump(mode="json")]
    for result in candidate.results.values():
        known += [result.mteb_task.location, result.mteb_task.test_location, result.adapter.path, result.encoder.name]
    return {text.rstrip("/") for text in _strings(known) if Path(text).is_absolute() and text.strip("/")}


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
    """As it stands in text, in JSON and in HTML."""
    return {path, json.dumps(path)[1:-1], html.escape(path)}
