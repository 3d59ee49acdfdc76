"""The files of each split of a task: the user's own, or those of the mirror."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from pipeline.data.mteb_tasks import prefixed_errors
from pipeline.errors import DataError
from pipeline.labelled_files.column_names import some
from pipeline.labelled_files.sources import SourceFiles, find_sources
from pipeline.records import MtebTask


def split_files(task: MtebTask, *, offline: bool) -> dict[str, SourceFiles]:
    """List the files of each split of a task that lies in the user's own files or in a mirror.

    Args:
        task: The planned task.
        offline: Whether files on the Hub are refused.
    Returns: The files of ``train``, and of ``test`` and ``validation`` if these have files of their own.
    Raises: DataError: a location has no files, or one file is in two splits.
    """
    if task.source == "mirror":
        return {split: SourceFiles((str(path),), ()) for split, path in _mirror_files(task).items()}
    locations = {"train": task.location, "validation": task.validation_location, "test": task.test_location}
    files: dict[str, SourceFiles] = {}
    for split, location in locations.items():
        if location is not None:
            files[split] = find_files(task, split, location, offline=offline)
    for one, other in combinations(files, 2):
        if twice := set(files[one].paths).intersection(files[other].paths):
            raise DataError(
                f"{task.name}: {some(sorted(twice))} is in {one} and in {other}; each split needs texts of its own"
            )
    return files


def find_files(task: MtebTask, what: str, location: str, *, offline: bool) -> SourceFiles:
    """List the files of a location.

    Args:
        task: The planned task.
        what: The split or the key that the location belongs to, for messages.
        location: A file, a folder, a glob or a URL.
        offline: Whether files on the Hub are refused.
    Raises: DataError: it has no files, or they cannot be reached.
    """
    if offline and location.startswith("hf://"):
        raise DataError(
            f"{task.name}: {what}: {location} is on the Hub, but data.offline = true; change one of the two"
        )
    with prefixed_errors(f"{task.name}: {what}"):
        return find_sources(location)


def _mirror_files(task: MtebTask) -> dict[str, Path]:
    folder = Path(task.location)
    if not folder.is_dir():
        raise DataError(
            f"{task.name}: the mirror has no folder {folder}; expected {folder}/train.parquet and test.parquet"
        )
    existing = {path.stem: path for path in sorted(folder.glob("*.parquet"))}
    for split in ("train", "test"):
        if split not in existing:
            raise DataError(
                f"{task.name}: expected a split {split!r}, found {', '.join(existing) or 'none'} in {folder}; "
                f"add {split}.parquet"
            )
    return {split: existing[split] for split in ("train", "validation", "test") if split in existing}
