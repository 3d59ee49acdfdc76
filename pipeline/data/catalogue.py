"""The data sets of a run: planned from the config, and read from one of four sources.

The sources are a user's own files, packages that pip installs, a local mirror, and the Hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import DataConfig, MtebTaskConfig, RunConfig, absolute
from pipeline.data.families import FAMILY_OF_MTEB, decide_family, family_of_columns, pair_columns_of
from pipeline.data.mteb_tasks import (
    OWN_SAMPLES_PER_LABEL,
    check_subset,
    choose_subset,
    fill_mteb_task,
    find_mteb_task,
    load_from_hub,
    make_mteb_task,
)
from pipeline.data.quickstart import PACKAGES, PAIR_COLUMNS, installed_version, read_package
from pipeline.data.table_checks import LoadedTask, check_kinds, checked_table, with_revision
from pipeline.data.text_tables import carve_test, read_text_files
from pipeline.errors import ConfigError
from pipeline.records import CarvedTest, Family, MtebTask
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
    Returns: The task. For the user's own files, its family and its columns may still be undecided.
    Raises: ConfigError: the name or the subset is unknown, the task has a type that cannot be learnt, or a key does not
        fit the task family.
    """
    RunFolder(Path()).task(config.name)  # refuses names of files in a run folder
    max_epochs = config.max_epochs or default_epochs
    if config.train is not None:
        return _plan_own(config, config.train, max_epochs)
    if config.name in PACKAGES:
        return _plan_package(config, PACKAGES[config.name], max_epochs)
    mteb_task = find_mteb_task(config.name)
    known = FAMILY_OF_MTEB[mteb_task.metadata.type]
    common: dict[str, Any] = {
        "name": config.name,
        "subset": choose_subset(mteb_task, config.subset),
        "max_epochs": max_epochs,
        "samples_per_label": getattr(mteb_task, "samples_per_label", OWN_SAMPLES_PER_LABEL),
        **_family_fields(config, known),
    }
    if common["objective"] not in ("classification", "separation"):
        common |= pair_columns_of(mteb_task, is_mirror=data.mirror is not None)
    if data.mirror is not None:
        return MtebTask(
            source="mirror", location=absolute(str(Path(data.mirror) / config.name)), revision=UNREAD, **common
        )
    if mteb_task.metadata.type == "Clustering":
        raise ConfigError(
            f"{config.name}: mteb lists it as Clustering, with test texts only, so there is nothing to learn from; "
            "name your own files in train, or put train.parquet and test.parquet into data.mirror"
        )
    if common["objective"] in ("classification", "separation"):
        common |= {"text_column": mteb_task.input_column_name, "label_column": mteb_task.label_column_name}
    return MtebTask(
        source="hub",
        location=mteb_task.metadata.dataset["path"],
        revision=mteb_task.metadata.revision,
        **common,
    )


def files_look_wrong(config: RunConfig) -> bool:
    """Return whether a user's own file is missing, or is a Parquet file without the columns.

    The check takes no time. ``load_mteb_task`` reports what is wrong, and finds other faults too.
    """
    given = [
        (t, location)
        for t in config.mteb_tasks
        for location in (t.train, t.validation, t.test, t.corpus, t.qrels)
        if location is not None
    ]
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
        splits, revision, notes = read_text_files(task, offline=offline)
    check_kinds(splits, task.name)
    if task.test_split is not None:
        splits |= carve_test(splits["train"], task, task.test_split)
    loaded = with_revision(task, revision)
    is_known = task.source == "mirror" and find_mteb_task(task.name).metadata.type == "Classification"
    mteb_task = find_mteb_task(task.name, subset=task.subset) if is_known else make_mteb_task(loaded)
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
    is_of_pairs = config.name in PAIR_COLUMNS
    return MtebTask(
        name=config.name,
        source="package",
        location=package,
        revision=installed_version(package) or "not installed",
        max_epochs=max_epochs,
        samples_per_label=OWN_SAMPLES_PER_LABEL,
        columns=PAIR_COLUMNS.get(config.name, ()),
        **_family_fields(config, "retrieval" if is_of_pairs else "classification"),
    )


def _family_fields(config: MtebTaskConfig, known: Family | None) -> dict[str, Any]:
    """Return the fields of a task that its family decides."""
    decision = decide_family(config, known=known)
    return {
        "objective": decision.objective,
        "loss": decision.loss,
        "undecided": decision.undecided,
        "prefixes": config.prefixes,
        "sides": config.sides,
        "slices": config.slices or (),
    }


def _plan_own(config: MtebTaskConfig, train: str, max_epochs: int) -> MtebTask:
    check_subset(config.name, config.subset, ["default"])
    family = _family_fields(config, None)
    is_of_pairs = family["objective"] in ("text-matching", "retrieval")
    if is_of_pairs or "objective" in family["undecided"]:
        family |= _pair_fields(config, family)
    columns = {
        "text_column": config.text_column or "text",
        "label_column": config.label_column or "label",
        "group_column": config.group_column,
    }
    if not is_of_pairs:
        _refuse_shared(config, columns)
    fraction = config.test_fraction if config.test_fraction is not None else _TEST_FRACTION
    return MtebTask(
        name=config.name,
        source="files",
        location=absolute(train),
        test_location=None if config.test is None else absolute(config.test),
        validation_location=None if config.validation is None else absolute(config.validation),
        corpus_location=None if config.corpus is None else absolute(config.corpus),
        qrels_location=None if config.qrels is None else absolute(config.qrels),
        test_split=CarvedTest(fraction=fraction, seed=config.test_seed or 0) if config.test is None else None,
        revision=UNREAD,
        max_epochs=max_epochs,
        samples_per_label=OWN_SAMPLES_PER_LABEL,
        **columns,  # type: ignore[arg-type]
        **family,
    )


def _pair_fields(config: MtebTaskConfig, family: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a task of the user's own files that name the columns of pairs."""
    named = {f"columns[{number}]": column for number, column in enumerate(config.columns or ())}
    _refuse_shared(config, {**named, "score_column": config.score_column, "group_column": config.group_column})
    for number, column in enumerate(config.slices or ()):
        _refuse_shared(config, {**named, "score_column": config.score_column, f"slices[{number}]": column})
    keys = ("columns",) if family["objective"] == "retrieval" else ("columns", "score_column")
    return {
        "columns": config.columns or (),
        "score_column": config.score_column,
        "undecided": (*family["undecided"], *(key for key in keys if getattr(config, key) is None)),
    }


def _refuse_shared(config: MtebTaskConfig, columns: dict[str, str | None]) -> None:
    """Raises: ConfigError: two keys name one column."""
    keys_of: dict[str | None, list[str]] = {}
    for key, column in columns.items():
        keys_of.setdefault(column, []).append(key)
    for column, keys in keys_of.items():
        if len(keys) > 1 and column is not None:
            raise ConfigError(f"{config.name}: {' and '.join(keys)} both name {column!r}; name two different columns")


def _lacks_columns(config: MtebTaskConfig, path: Path) -> bool:
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return True
    if {config.text_column or "text", config.label_column or "label"} <= set(names):
        return False
    if config.objective in ("classification", "separation") or config.text_column or config.label_column:
        return True
    # Which columns pairs need depends on the file's part in the task, so the reader checks them.
    is_of_pairs = config.objective is not None or config.columns is not None
    return not is_of_pairs and family_of_columns(names) is None
