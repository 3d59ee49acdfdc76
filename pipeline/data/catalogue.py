"""The data sets of a run: planned from the config, and read from one of four sources.

The sources are a user's own files, packages that pip installs, a local mirror, and the Hub.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import DataConfig, MtebTaskConfig, RunConfig, absolute
from pipeline.data.mteb_tasks import (
    OWN_SAMPLES_PER_LABEL,
    check_subset,
    choose_subset,
    fill_mteb_task,
    find_mteb_task,
    load_from_hub,
    make_mteb_task,
    prefixed_errors,
)
from pipeline.data.quickstart import PACKAGES, installed_version, read_package
from pipeline.data.splits import held_out
from pipeline.data.table_checks import LoadedTask, check_kinds, checked_table, columns_by_key, with_revision
from pipeline.errors import ConfigError, DataError
from pipeline.labelled_files.column_names import some
from pipeline.labelled_files.formats import read_table
from pipeline.labelled_files.sources import SourceFiles, find_sources, read_content
from pipeline.records import CarvedTest, MtebTask
from pipeline.store.run_folder import RunFolder

UNREAD = "unread"
"""Revision of files in a plan, which reads no data."""

_TEST_FRACTION = 0.2


def plan_tasks(config: RunConfig) -> tuple[MtebTask, ...]:
    """Plan every task of a config, in its order; see ``plan_task``."""
    return tuple(plan_task(t, data=config.data, default_epochs=config.train.max_epochs) for t in config.mteb_tasks)


def plan_task(config: MtebTaskConfig, *, data: DataConfig, default_epochs: int) -> MtebTask:
    """Resolve the source of a task's data, without reading it and without a network.

    The first that applies counts: the user's own files, a package, ``data.mirror``, the Hub at mteb's pinned revision.

    Args:
        config: The task's part of the config.
        data: Where data sets are looked for.
        default_epochs: Epochs of a task that sets no ``max_epochs``.
    Raises: ConfigError: the name or the subset is unknown, or the task is not a classification of single texts with one
        label.
    """
    RunFolder(Path()).task(config.name)  # refuses names of files in a run folder
    max_epochs = config.max_epochs or default_epochs
    if config.train is not None:
        return _plan_own(config, config.train, max_epochs)
    if config.name in PACKAGES:
        return _plan_package(config, PACKAGES[config.name], max_epochs)
    mteb_task = find_mteb_task(config.name)
    common: dict[str, Any] = {
        "name": config.name,
        "subset": choose_subset(mteb_task, config.subset),
        "max_epochs": max_epochs,
        "samples_per_label": mteb_task.samples_per_label,
    }
    if data.mirror is not None:
        return MtebTask(
            source="mirror", location=absolute(str(Path(data.mirror) / config.name)), revision=UNREAD, **common
        )
    return MtebTask(
        source="hub",
        location=mteb_task.metadata.dataset["path"],
        revision=mteb_task.metadata.revision,
        text_column=mteb_task.input_column_name,
        label_column=mteb_task.label_column_name,
        **common,
    )


def files_look_wrong(config: RunConfig) -> bool:
    """Return whether a user's own file is missing, or is a Parquet file without the columns.

    The check takes no time. ``load_mteb_task`` reports what is wrong, and finds other faults too.
    """
    given = [(t, location) for t in config.mteb_tasks for location in (t.train, t.test) if location is not None]
    local = [
        (t, Path(absolute(location)))
        for t, location in given
        if "://" not in location and not set("*?[") & set(location)
    ]
    return any(
        not path.exists() or (path.suffix == ".parquet" and path.is_file() and _lacks_columns(t, path))
        for t, path in local
    )


def load_mteb_task(task: MtebTask, *, offline: bool) -> LoadedTask:
    """Read the splits of a planned task, and fill an mteb task with them, so that ``mteb.evaluate`` needs no network.

    A mirror holds data sets as mteb has transformed them. Data sets of the Hub are transformed by mteb here.

    Args:
        task: The planned task.
        offline: Read data sets of the Hub from the local cache only.
    Raises:
        DataError: the data is missing or damaged, or its columns are not text and label.
        LorafleetError: the Hub cannot be reached; a retry may help.
    """
    if task.source == "hub":
        mteb_task = find_mteb_task(task.name, subset=task.subset)
        return load_from_hub(task, mteb_task, offline=offline)
    notes: tuple[str, ...] = ()
    if task.source == "package":
        raw, revision = read_package(task)
        splits = {split: checked_table(table, task, f"{task.name}: {split}") for split, table in raw.items()}
    else:
        splits, revision, notes = _read_files(task, offline=offline)
    check_kinds(splits, task.name)
    if task.test_split is not None:
        splits |= _carve_test(splits["train"], task, task.test_split)
    loaded = with_revision(task, revision)
    mteb_task = find_mteb_task(task.name, subset=task.subset) if task.source == "mirror" else make_mteb_task(loaded)
    fill_mteb_task(mteb_task, splits, task.subset)
    return LoadedTask(loaded, mteb_task, splits, notes)


def describe_source(task: MtebTask) -> str:
    """Describe the source of a planned task's data, for messages."""
    match task.source:
        case "hub":
            return f"{task.location} on the Hub at {task.revision}, subset {task.subset}"
        case "mirror":
            return f"the mirror's folder {task.location}, subset {task.subset}"
        case "package":
            return f"the Python package {task.location} {task.revision}"
    test = f"{task.test_split.fraction:.0%} of it as test" if task.test_split else f"test on {task.test_location}"
    return f"your files: train on {task.location}, {test}"


def _plan_package(config: MtebTaskConfig, package: str, max_epochs: int) -> MtebTask:
    check_subset(config.name, config.subset, ["default"])
    return MtebTask(
        name=config.name,
        source="package",
        location=package,
        revision=installed_version(package) or "not installed",
        max_epochs=max_epochs,
        samples_per_label=OWN_SAMPLES_PER_LABEL,
    )


def _plan_own(config: MtebTaskConfig, train: str, max_epochs: int) -> MtebTask:
    check_subset(config.name, config.subset, ["default"])
    columns = {
        "text_column": config.text_column or "text",
        "label_column": config.label_column or "label",
        "group_column": config.group_column,
    }
    keys_of: dict[str | None, list[str]] = {}
    for key, column in columns.items():
        keys_of.setdefault(column, []).append(key)
    for column, keys in keys_of.items():
        if len(keys) > 1:
            raise ConfigError(f"{config.name}: {' and '.join(keys)} both name {column!r}; name two different columns")
    fraction = config.test_fraction if config.test_fraction is not None else _TEST_FRACTION
    return MtebTask(
        name=config.name,
        source="files",
        location=absolute(train),
        test_location=None if config.test is None else absolute(config.test),
        test_split=CarvedTest(fraction=fraction, seed=config.test_seed or 0) if config.test is None else None,
        revision=UNREAD,
        max_epochs=max_epochs,
        samples_per_label=OWN_SAMPLES_PER_LABEL,
        **columns,  # type: ignore[arg-type]
    )


def _lacks_columns(config: MtebTaskConfig, path: Path) -> bool:
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return True
    return not {config.text_column or "text", config.label_column or "label"} <= set(names)


def _read_files(task: MtebTask, *, offline: bool) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """Read the files of a task: the checked splits, a hash of all files, and notes."""
    digest = hashlib.sha256()
    splits, notes = {}, []
    for split, files in _split_files(task, offline=offline).items():
        tables = {}
        for path in files.paths:
            with prefixed_errors(f"{task.name}: {split}"):
                content = read_content(path)
                table = read_table(content, path, columns=columns_by_key(task))
            digest.update(split.encode() + content)
            if table.num_rows:
                tables[path] = checked_table(table, task, f"{task.name}: {split}: {path}")
        splits[split] = _joined(tables, f"{task.name}: {split}")
        if files.left_out:
            notes.append(f"skipped in the folder of {split}: {some(files.left_out)}")
    return splits, f"sha256:{digest.hexdigest()}", tuple(notes)


def _split_files(task: MtebTask, *, offline: bool) -> dict[str, SourceFiles]:
    if task.source == "mirror":
        return {split: SourceFiles((str(path),), ()) for split, path in _mirror_files(task).items()}
    locations = {"train": task.location} | ({} if task.test_location is None else {"test": task.test_location})
    files = {}
    for split, location in locations.items():
        if offline and location.startswith("hf://"):
            raise DataError(
                f"{task.name}: {split}: {location} is on the Hub, but data.offline = true; change one of the two"
            )
        with prefixed_errors(f"{task.name}: {split}"):
            files[split] = find_sources(location)
    if twice := set(files["train"].paths).intersection(files["test"].paths if "test" in files else ()):
        raise DataError(
            f"{task.name}: {some(sorted(twice))} is in train and in test; a test needs texts that were not learnt"
        )
    return files


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


def _joined(tables: dict[str, Any], where: str) -> Any:
    """Join the tables of all files, with the columns that they share.

    Raises: DataError: all files are empty, or their labels differ in type.
    """
    if not tables:
        raise DataError(f"{where} is empty; expected at least one text")
    kinds = {str(table["label"].type): path for path, table in reversed(tables.items())}
    if len(kinds) > 1:
        found = " and ".join(f"{kind} in {path}" for kind, path in kinds.items())
        raise DataError(f"{where}: labels are {found}; write them alike")
    shared = set.intersection(*(set(table.column_names) for table in tables.values()))
    return pa.concat_tables(
        [table.select([name for name in table.column_names if name in shared]) for table in tables.values()]
    )


def _carve_test(train: Any, task: MtebTask, split: CarvedTest) -> dict[str, Any]:
    """Split test off train. The seed is negative, so that it never equals that of the validation slice.

    Raises: DataError: train is too small.
    """
    labels = train["label"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    groups = train["group"].to_pylist() if task.group_column is not None else None
    chosen = held_out(train["text"].to_pylist(), labels, groups=groups, fraction=split.fraction, seed=-1 - split.seed)
    if not chosen.any():
        found = f"{len(labels)} texts of {len(set(labels.tolist()))} labels"
        if groups is not None:
            found += f" and {len(set(groups))} groups by {task.group_column!r}"
        raise DataError(
            f"{task.name}: no text can be spared for test: train has {found}, and test_fraction is {split.fraction:g}; "
            "raise it (below 0.5), add texts, or name a test file"
        )
    return {"train": train.filter(pa.array(~chosen)), "test": train.filter(pa.array(chosen))}
