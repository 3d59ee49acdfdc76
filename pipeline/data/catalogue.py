"""From a name to data: what mteb knows of a task, and its splits inside a real mteb task. The door to mteb's tasks.

Four sources, one interface: your own files, packages that pip installed, a local mirror, the Hub.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import DataConfig, MtebTaskConfig, RunConfig, absolute
from pipeline.data.quickstart import PACKAGES, installed_version, read_package
from pipeline.data.sources import SourceFiles, find_sources, read_content, read_table, some
from pipeline.data.splits import held_out, label_key
from pipeline.errors import ConfigError, DataError, InputError, LorafleetError, first_line
from pipeline.hub_errors import hub_error, hub_fault_behind
from pipeline.records import CarvedTest, MtebTask
from pipeline.store.run_folder import RunFolder

UNREAD = "unread"
"""The revision of files that nobody has read yet: a plan reads no data."""

_OWN_SAMPLES_PER_LABEL = 8  # mteb's default
_TEST_FRACTION = 0.2


@dataclass(frozen=True)
class LoadedTask:
    """The data of one task, read."""

    task: MtebTask
    """With the revision of what was read."""
    mteb_task: Any
    """An ``mteb.abstasks.AbsTaskClassification`` with its data filled in: one subset, split test."""
    splits: dict[str, Any]
    """``train``, ``test`` and perhaps ``validation``: pyarrow tables.

    Columns: ``text`` (string), ``label`` (int64 or string), perhaps ``group`` and ``label_text`` (string). Nulls only in the last."""
    notes: tuple[str, ...] = ()
    """What the user should know of how they were read, one sentence each."""


def plan_tasks(config: RunConfig) -> tuple[MtebTask, ...]:
    """Resolve where each task's data will come from, in the config's order; see ``plan_task``."""
    return tuple(plan_task(t, data=config.data, default_epochs=config.train.max_epochs) for t in config.mteb_tasks)


def plan_task(config: MtebTaskConfig, *, data: DataConfig, default_epochs: int) -> MtebTask:
    """Resolve where a task's data will come from; reads none of it and asks no network.

    Files of the user's own go before packages, packages before ``data.mirror``, the mirror before the Hub at mteb's pinned revision.

    Args:
        default_epochs: For a task that names no number of its own.
    Raises: ConfigError: an unknown name or subset, or a task that is not a classification of single texts with one label.
    """
    RunFolder(Path()).task(config.name)  # refuses the names that a run folder has files of
    max_epochs = config.max_epochs or default_epochs
    if config.train is not None:
        return _plan_own(config, config.train, max_epochs)
    if config.name in PACKAGES:
        _check_subset(config.name, config.subset, ["default"])
        package = PACKAGES[config.name]
        return MtebTask(
            name=config.name,
            source="package",
            location=package,
            revision=installed_version(package) or "not installed",
            max_epochs=max_epochs,
            samples_per_label=_OWN_SAMPLES_PER_LABEL,
        )
    mteb_task = _find_mteb_task(config.name)
    common: dict[str, Any] = {
        "name": config.name,
        "subset": _choose_subset(mteb_task, config.subset),
        "max_epochs": max_epochs,
        "samples_per_label": mteb_task.samples_per_label,
    }
    if data.mirror is not None:
        return MtebTask(source="mirror", location=absolute(str(Path(data.mirror) / config.name)), revision=UNREAD, **common)
    return MtebTask(
        source="hub",
        location=mteb_task.metadata.dataset["path"],
        revision=mteb_task.metadata.revision,
        text_column=mteb_task.input_column_name,
        label_column=mteb_task.label_column_name,
        **common,
    )


def files_look_wrong(config: RunConfig) -> bool:
    """Whether a file of the user's own is not there, or is a Parquet file without the columns: a look that takes no time.

    ``load_mteb_task`` says what is wrong, here and where this look sees nothing.
    """
    given = [(t, location) for t in config.mteb_tasks for location in (t.train, t.test) if location is not None]
    local = [(t, Path(absolute(location))) for t, location in given if "://" not in location and not set("*?[") & set(location)]
    return any(not path.exists() or (path.suffix == ".parquet" and path.is_file() and _lacks_columns(t, path)) for t, path in local)


def load_mteb_task(task: MtebTask, *, offline: bool) -> LoadedTask:
    """Read the splits of a planned task and put them into a real mteb task, so that ``mteb.evaluate`` needs no network.

    A mirror holds what mteb has after its own transformation of a data set; from the Hub, mteb transforms it itself.

    Args:
        offline: Take from the Hub only what its local cache holds.
    Raises:
        DataError: data that is missing, damaged, or whose columns are not text and label.
        LorafleetError: the Hub cannot be reached; trying again may help.
    """
    if task.source == "hub":
        mteb_task = _find_mteb_task(task.name, subset=task.subset)
        return load_from_hub(task, mteb_task, offline=offline)
    notes: tuple[str, ...] = ()
    if task.source == "package":
        raw, revision = read_package(task)
        splits = {split: _checked(table, task, f"{task.name}: {split}") for split, table in raw.items()}
    else:
        splits, revision, notes = _read_files(task, offline=offline)
    _check_kinds(splits, task.name)
    if task.test_split is not None:
        splits |= _carve_test(splits["train"], task, task.test_split)
    loaded = _with_revision(task, revision)
    mteb_task = _find_mteb_task(task.name, subset=task.subset) if task.source == "mirror" else _make_mteb_task(loaded)
    _fill(mteb_task, splits, task.subset)
    return LoadedTask(loaded, mteb_task, splits, notes)


def load_from_hub(task: MtebTask, mteb_task: Any, *, offline: bool) -> LoadedTask:
    """Let mteb load and transform its own data set, and read the splits back from it.

    Args:
        mteb_task: Restricted to one subset.
    Raises: DataError, LorafleetError: as ``load_mteb_task``.
    """
    import datasets
    from huggingface_hub import constants

    path = mteb_task.metadata.dataset["path"]
    name, at = task.name, f"{path} at {mteb_task.metadata.revision}"
    if not Path(path).is_absolute() and Path(path).exists():
        raise DataError(f"{name}: {path} in the working folder would be taken for the data set on the Hub; start in another folder")
    try:
        with _hub_access(offline=offline):
            mteb_task.load_data()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if (fault := hub_fault_behind(error)) is not None:
            raise hub_error(fault, f"{name}: {at}", offline=offline, kind=DataError) from error
        if isinstance(error, ConnectionError) and not (offline or constants.HF_HUB_OFFLINE):
            raise LorafleetError(f"{name}: the Hub cannot be reached for {at}: {error}; try again, or set data.mirror") from error
        if isinstance(error, ConnectionError):
            raise DataError(f"{name}: {at} is not in the local Hub cache; fetch it once while online, or set data.mirror") from error
        raise DataError(f"{name}: {at} cannot be loaded: {first_line(error)}") from error
    parts = mteb_task.dataset[task.subset] if mteb_task.metadata.is_multilingual else mteb_task.dataset
    found = sorted(parts)
    for split in ("train", "test"):
        if split not in parts:
            raise DataError(f"{name}: expected a split {split!r}, found {', '.join(found)} in {at}")
    tables = {split: _hub_table(parts[split], task.label_column) for split in ("train", "validation", "test") if split in parts}
    splits = {split: _checked(table, task, f"{name}: {split}") for split, table in tables.items()}
    _check_kinds(splits, name)
    _fill(mteb_task, splits, task.subset)
    return LoadedTask(_with_revision(task, mteb_task.metadata.revision), mteb_task, splits)


def describe_source(task: MtebTask) -> str:
    """Where the data of a planned task will come from, as a phrase for people."""
    match task.source:
        case "hub":
            return f"{task.location} on the Hub at {task.revision}, subset {task.subset}"
        case "mirror":
            return f"the mirror's folder {task.location}, subset {task.subset}"
        case "package":
            return f"the Python package {task.location} {task.revision}"
    test = f"{task.test_split.fraction:.0%} of it as test" if task.test_split else f"test on {task.test_location}"
    return f"your files: train on {task.location}, {test}"


# --- plan ---


def _plan_own(config: MtebTaskConfig, train: str, max_epochs: int) -> MtebTask:
    _check_subset(config.name, config.subset, ["default"])
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
            raise ConfigError(f"{config.name}: {' and '.join(keys)} both name {column!r}; they are two columns")
    fraction = config.test_fraction if config.test_fraction is not None else _TEST_FRACTION
    return MtebTask(
        name=config.name,
        source="files",
        location=absolute(train),
        test_location=None if config.test is None else absolute(config.test),
        test_split=CarvedTest(fraction=fraction, seed=config.test_seed or 0) if config.test is None else None,
        revision=UNREAD,
        max_epochs=max_epochs,
        samples_per_label=_OWN_SAMPLES_PER_LABEL,
        **columns,  # type: ignore[arg-type]
    )


def _lacks_columns(config: MtebTaskConfig, path: Path) -> bool:
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return True
    return not {config.text_column or "text", config.label_column or "label"} <= set(names)


def _find_mteb_task(name: str, *, subset: str | None = None) -> Any:
    import mteb
    from mteb.abstasks import AbsTaskClassification

    try:
        mteb_task = mteb.get_task(name, eval_splits=["test"], hf_subsets=None if subset is None else [subset])
    except KeyError:
        close = _close_names(name)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise ConfigError(f"mteb_tasks: mteb knows no task {name!r}. {hint}For data of your own, name a file in train") from None
    known = mteb_task.metadata
    is_text = known.type == "Classification" and known.modalities == ["text"]
    if not is_text or not isinstance(mteb_task, AbsTaskClassification) or not isinstance(mteb_task.input_column_name, str):
        kind = f"{known.type} of {' and '.join(known.modalities)}"
        raise ConfigError(f"{name}: expected a classification of single texts with one label, but mteb says it is {kind}")
    if "test" not in known.eval_splits or mteb_task.is_cross_validation:
        raise ConfigError(f"{name}: has no test split to be scored on; mteb scores it on {', '.join(known.eval_splits)}")
    return mteb_task


def _close_names(name: str) -> list[str]:
    import mteb

    every = mteb.get_tasks(task_types=["Classification"], modalities=["text"], exclude_superseded=False, exclude_aggregate=True)
    by_key = {known.lower(): known for known in (*PACKAGES, *(task.metadata.name for task in every))}
    starting = [key for key in by_key if key.startswith(name.lower())]
    similar = difflib.get_close_matches(name.lower(), by_key, n=5)
    return [by_key[key] for key in dict.fromkeys((*sorted(starting, key=len), *similar))][:5]


def _choose_subset(mteb_task: Any, subset: str | None) -> str:
    name, languages = mteb_task.metadata.name, mteb_task.metadata.hf_subsets_to_langscripts
    if subset is not None or len(languages) == 1:
        _check_subset(name, subset, list(languages))
        return subset or next(iter(languages))
    english = [part for part, scripts in languages.items() if scripts == ["eng-Latn"]]
    if "en" in english:
        return "en"
    if len(english) != 1:
        raise ConfigError(f"{name}: has {len(english)} English subsets; set subset to one of {', '.join(english or languages)}")
    return english[0]


def _check_subset(name: str, subset: str | None, known: list[str]) -> None:
    if subset is not None and subset not in known:
        raise ConfigError(f"{name}: has no subset {subset!r}; those that exist are {', '.join(known)}")


# --- read ---


def _read_files(task: MtebTask, *, offline: bool) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """The checked splits, the hash of all files, and notes."""
    digest = hashlib.sha256()
    splits, notes = {}, []
    for split, files in _split_files(task, offline=offline).items():
        tables = {}
        for path in files.paths:
            with _prefixed(f"{task.name}: {split}"):
                content = read_content(path)
                table = read_table(content, path, columns=_columns(task))
            digest.update(split.encode() + content)
            if table.num_rows:
                tables[path] = _checked(table, task, f"{task.name}: {split}: {path}")
        splits[split] = _joined(tables, f"{task.name}: {split}")
        if files.left_out:
            notes.append(f"left out of the folder of {split}: {some(files.left_out)}")
    return splits, f"sha256:{digest.hexdigest()}", tuple(notes)


def _split_files(task: MtebTask, *, offline: bool) -> dict[str, SourceFiles]:
    if task.source == "mirror":
        return {split: SourceFiles((str(path),), ()) for split, path in _mirror_files(task).items()}
    locations = {"train": task.location} | ({} if task.test_location is None else {"test": task.test_location})
    files = {}
    for split, location in locations.items():
        if offline and location.startswith("hf://"):
            raise DataError(f"{task.name}: {split}: {location} is on the Hub, and data.offline = true; set one of the two otherwise")
        with _prefixed(f"{task.name}: {split}"):
            files[split] = find_sources(location)
    if twice := set(files["train"].paths).intersection(files["test"].paths if "test" in files else ()):
        raise DataError(f"{task.name}: {some(sorted(twice))} is in train and in test; what was learnt is no test")
    return files


def _mirror_files(task: MtebTask) -> dict[str, Path]:
    folder = Path(task.location)
    if not folder.is_dir():
        raise DataError(f"{task.name}: the mirror has no folder {folder}; expected {folder}/train.parquet and test.parquet")
    found = {path.stem: path for path in sorted(folder.glob("*.parquet"))}
    for split in ("train", "test"):
        if split not in found:
            raise DataError(f"{task.name}: expected a split {split!r}, found {', '.join(found) or 'none'} in {folder}; add {split}.parquet")
    return {split: found[split] for split in ("train", "validation", "test") if split in found}


@contextmanager
def _prefixed(where: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise DataError(f"{where}: {error}") from None


def _columns(task: MtebTask) -> dict[str, str]:
    """Key of the config -> column of the files."""
    grouped = {} if task.group_column is None else {"group_column": task.group_column}
    return {"text_column": task.text_column, "label_column": task.label_column, **grouped}


def _joined(tables: dict[str, Any], where: str) -> Any:
    """One table of all files, with the columns that they share."""
    if not tables:
        raise DataError(f"{where} is empty; expected at least one text")
    kinds = {str(table["label"].type): path for path, table in reversed(tables.items())}
    if len(kinds) > 1:
        found = " and ".join(f"{kind} in {path}" for kind, path in kinds.items())
        raise DataError(f"{where}: labels are {found}; write them alike")
    shared = set.intersection(*(set(table.column_names) for table in tables.values()))
    return pa.concat_tables([table.select([name for name in table.column_names if name in shared]) for table in tables.values()])


def _carve_test(train: Any, task: MtebTask, split: CarvedTest) -> dict[str, Any]:
    """Train less its test split, and that split. Seeds below 0 are for this choice: the validation slice has the run's, from 0 up."""
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


def _hub_table(part: Any, label_column: str) -> Any:
    """An arrow table of a ``datasets.Dataset``, with the names of its ``ClassLabel`` as ``label_text``."""
    table = part.with_format("arrow")[:]
    names = getattr(part.features[label_column], "names", None)
    if names and "label_text" not in table.column_names:
        numbers = table[label_column].to_pylist()
        of_label = [None if number is None or number < 0 else names[number] for number in numbers]  # -1: without a label
        return table.append_column("label_text", pa.array(of_label, pa.string()))
    return table


def _check_kinds(splits: dict[str, Any], name: str) -> None:
    kinds = {split: table["label"].type for split, table in splits.items()}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{split} {kind}" for split, kind in kinds.items())
        raise DataError(
            f"{name}: labels are numbers in one split and strings in another ({found}); write them alike (CSV has only strings)"
        )


def _checked(table: Any, task: MtebTask, where: str) -> Any:
    """The columns that ``LoadedTask.splits`` promises, of its types and without nulls."""
    if table.num_rows == 0:
        raise DataError(f"{where} is empty; expected at least one text")
    text = _as_strings(table[task.text_column], where, task.text_column)
    if text is None:
        kind = table[task.text_column].type
        raise DataError(f"{where}: column {task.text_column!r} is {kind}, not text; set text_column to a column of strings")
    columns = {"text": text, "label": _checked_label(table[task.label_column], task, where)}
    if task.group_column is not None:
        columns["group"] = _checked_group(table[task.group_column], task.group_column, where)
    for column, values in zip(_columns(task).values(), columns.values(), strict=True):
        if values.null_count:
            first = pc.index(pc.is_null(values), True).as_py() + 1
            count = f"{values.null_count} of {table.num_rows} rows have no value"
            raise DataError(f"{where}: column {column!r}: {count}; remove these rows or fill them (the first is row {first})")
    if "label_text" in table.column_names and (names := _as_strings(table["label_text"], where, "label_text")) is not None:
        columns["label_text"] = names
    checked = pa.table(columns)
    try:
        checked.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: holds bytes that are not UTF-8: {first_line(error)}; write the file again") from None
    return checked


def _as_strings(values: Any, where: str, column: str) -> Any | None:
    """The values as pyarrow strings; None if they are no text. Bytes without a type are text if they are UTF-8."""
    values = _plain(values)
    kind = values.type
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    if not is_bytes and not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return None
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid as error:
        fault = f"column {column!r} holds bytes that are not UTF-8: {first_line(error)}"
        raise DataError(f"{where}: {fault}; write the file again, or choose another column") from None


def _plain(values: Any) -> Any:
    """Without dictionary, and without a logical type such as JSON that pyarrow keeps as an extension."""
    if isinstance(values.type, pa.BaseExtensionType):
        values = values.cast(values.type.storage_type)
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def _checked_label(values: Any, task: MtebTask, where: str) -> Any:
    """Strings or int64; null where there is no label, and an empty string is none."""
    strings = _as_strings(values, where, task.label_column)
    if strings is not None:
        blank = [label for label in pc.unique(strings).to_pylist() if label is not None and not label_key(label)]
        return pc.if_else(pc.is_in(strings, value_set=pa.array(blank, pa.string())), None, strings) if blank else strings
    where, values = f"{where}: column {task.label_column!r}", _plain(values)
    kind = values.type
    if pa.types.is_boolean(kind):
        return values.cast(pa.string())
    if pa.types.is_floating(kind):
        values = pc.if_else(pc.is_nan(values), None, values)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
        try:
            return values.cast(pa.int64())
        except pa.ArrowInvalid as error:
            expected = "whole numbers" if pa.types.is_floating(kind) else "numbers of 64 bits with a sign"
            raise DataError(f"{where} is {kind}, but not of {expected}: {first_line(error)}; write the labels as strings") from None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_list_view(kind):
        raise DataError(f"{where} is {kind}, so several labels for a text; expected one label for each text, several are not supported yet")
    raise DataError(f"{where} is {kind}; expected strings, whole numbers or booleans; set label_column")


def _checked_group(values: Any, column: str, where: str) -> Any:
    """Strings, equal where the values are; null where there is no value, and an empty string or NaN is none.

    The files of a split may write one value in several types: 7 of a whole column is 7.0 of one with gaps, as pandas writes it.
    """
    strings = _as_strings(values, where, column)
    if strings is None:
        strings = _names_of_values(values, f"{where}: column {column!r}")
    return pc.if_else(pc.equal(strings, ""), None, strings)


def _names_of_values(values: Any, where: str) -> Any:
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    kind = _plain(values).type
    try:
        if pa.types.is_fixed_size_binary(kind):  # Parquet's UUID too, whose values are such objects
            return pa.array(
                [value.hex() if isinstance(value, bytes) else value and str(value) for value in values.to_pylist()], pa.string()
            )
        values = _plain(values)
        if pa.types.is_decimal(kind):
            return pa.array([None if value is None else f"{value.normalize():f}" for value in values.to_pylist()], pa.string())
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            return values.cast(pa.timestamp("us", getattr(kind, "tz", None))).cast(pa.string())
        if pa.types.is_floating(kind):
            values = pc.if_else(pc.is_nan(values), None, values.cast(pa.float64()))
            is_whole = pc.and_(pc.equal(pc.floor(values), values), pc.less(pc.abs(values), 2.0**63))
            return pc.if_else(is_whole, pc.if_else(is_whole, values, 0.0).cast(pa.int64()).cast(pa.string()), values.cast(pa.string()))
        return values.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(f"{where} is {kind}; expected one value for each text; set group_column") from None


def _with_revision(task: MtebTask, revision: str) -> MtebTask:
    return MtebTask.model_validate({**task.model_dump(), "revision": revision})


# --- mteb ---


def _make_mteb_task(task: MtebTask) -> Any:
    """A task that mteb does not know, as an instance of a class of its own."""
    from mteb.abstasks import AbsTaskClassification
    from mteb.abstasks.task_metadata import TaskMetadata

    known = TaskMetadata(
        name=task.name,
        description=f"{task.name}, a data set outside mteb",
        dataset={"path": task.name, "revision": task.revision},
        type="Classification",
        category="t2c",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="accuracy",
    )
    return type(task.name, (AbsTaskClassification,), {"metadata": known, "samples_per_label": task.samples_per_label})()


def _fill(mteb_task: Any, splits: dict[str, Any], subset: str) -> None:
    """Give an mteb task its data, so that it loads none.

    Labels become 0..C-1 in their own order: mteb's few-shot scores stay as they are, and its average precision, which takes the label 1
    for the positive class, works for strings too.
    """
    import datasets

    labels = pc.unique(pa.chunked_array([chunk for table in splits.values() for chunk in table["label"].chunks]))
    in_order = labels.take(pc.sort_indices(labels))
    parts = datasets.DatasetDict()
    for split, table in splits.items():
        numbers = pc.index_in(table["label"], value_set=in_order).cast(pa.int64())
        parts[split] = _with_whole_columns(pa.table({mteb_task.input_column_name: table["text"], mteb_task.label_column_name: numbers}))
    mteb_task.dataset = {subset: parts} if mteb_task.metadata.is_multilingual else parts
    mteb_task.data_loaded = True


def _with_whole_columns(table: Any) -> Any:
    """A ``datasets.Dataset`` that gives a column as a list.

    ``datasets`` itself gives one that is read again, row by row, at every use, and mteb uses columns often: TweetSentiment's few-shot
    protocol took 14 s with it and 0.4 s with lists, besides the encoder, with the same scores.
    """
    import datasets

    class WholeColumns(datasets.Dataset):
        def __getitem__(self, key: Any) -> Any:
            item = super().__getitem__(key)
            return item[:] if isinstance(key, str) else item

    return WholeColumns(table)


@contextmanager
def _hub_access(*, offline: bool) -> Iterator[None]:
    """Keep both libraries off the network; they read these at every call, and the environment only when imported."""
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module, was_offline in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = was_offline or offline
        yield
    finally:
        for module, was_offline in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = was_offline
