"""From a name to data: what mteb knows of a task, and its splits inside a real mteb task. The door to mteb's tasks.

Four sources, one interface: your own Parquet files, packages that pip installed, a local mirror, the Hub.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import DataConfig, MtebTaskConfig, RunConfig
from pipeline.errors import ConfigError, DataError, LorafleetError
from pipeline.packages import PACKAGES, installed_version, read_package
from pipeline.records import MtebTask
from pipeline.run_folder import RunFolder

UNREAD = "unread"
"""The revision of files that nobody has read yet: a plan reads no data."""

_OWN_SAMPLES_PER_LABEL = 8  # mteb's default


@dataclass(frozen=True)
class LoadedTask:
    """The data of one task, read."""

    task: MtebTask
    """With the revision of what was read."""
    mteb_task: Any
    """An ``mteb.abstasks.AbsTaskClassification`` with its data filled in: one subset, split test."""
    splits: dict[str, Any]
    """``train``, ``test`` and perhaps ``validation``: pyarrow tables.

    Columns: ``text`` (string), ``label`` (int64 or string), perhaps ``label_text`` (string); no nulls in the first two."""


def plan_tasks(config: RunConfig) -> tuple[MtebTask, ...]:
    """Resolve where each task's data will come from, in the config's order; see ``plan_task``."""
    return tuple(plan_task(t, data=config.data, default_epochs=config.train.max_epochs) for t in config.mteb_tasks)


def plan_task(config: MtebTaskConfig, *, data: DataConfig, default_epochs: int) -> MtebTask:
    """Resolve where a task's data will come from; reads none of it and asks no network.

    Own files go before packages, packages before ``data.mirror``, the mirror before the Hub at mteb's pinned revision.

    Args:
        default_epochs: For a task that names no number of its own.
    Raises: ConfigError: an unknown name or subset, or a task that is not a classification of single texts with one label.
    """
    RunFolder(Path()).task(config.name)  # refuses the names that a run folder has files of
    max_epochs = config.max_epochs or default_epochs
    if config.train is not None and config.test is not None:
        return _plan_own(config, config.train, config.test, max_epochs)
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
        return MtebTask(source="mirror", location=_absolute(str(Path(data.mirror) / config.name)), revision=UNREAD, **common)
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
    local = [(t, Path(location).expanduser()) for t, location in given if "://" not in location and not set("*?[") & set(location)]
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
    if task.source == "package":
        raw, revision = read_package(task)
    else:
        raw, revision = _read_files(task)
    splits = _checked_splits(raw, task)
    loaded = _with_revision(task, revision)
    mteb_task = _find_mteb_task(task.name, subset=task.subset) if task.source == "mirror" else _make_mteb_task(loaded)
    _fill(mteb_task, splits, task.subset)
    return LoadedTask(loaded, mteb_task, splits)


def load_from_hub(task: MtebTask, mteb_task: Any, *, offline: bool) -> LoadedTask:
    """Let mteb load and transform its own data set, and read the splits back from it.

    Args:
        mteb_task: Restricted to one subset.
    Raises: DataError, LorafleetError: as ``load_mteb_task``.
    """
    import datasets

    name, at = task.name, f"{mteb_task.metadata.dataset['path']} at {mteb_task.metadata.revision}"
    try:
        with _hub_access(offline=offline):
            mteb_task.load_data()
    except ConnectionError as error:
        if offline:
            raise DataError(f"{name}: {at} is not in the local Hub cache; set data.offline = false, or data.mirror") from error
        raise LorafleetError(f"{name}: the Hub cannot be reached for {at}: {error}; try again, or set data.mirror") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: {at} cannot be loaded: {error}") from error
    parts = mteb_task.dataset[task.subset] if mteb_task.metadata.is_multilingual else mteb_task.dataset
    found = sorted(parts)
    for split in ("train", "test"):
        if split not in parts:
            raise DataError(f"{name}: expected a split {split!r}, found {', '.join(found)} in {at}")
    tables = {split: _hub_table(parts[split], task.label_column) for split in ("train", "validation", "test") if split in parts}
    splits = _checked_splits(tables, task)
    _fill(mteb_task, splits, task.subset)
    return LoadedTask(_with_revision(task, mteb_task.metadata.revision), mteb_task, splits)


# --- plan ---


def _plan_own(config: MtebTaskConfig, train: str, test: str, max_epochs: int) -> MtebTask:
    _check_subset(config.name, config.subset, ["default"])
    text_column, label_column = config.text_column or "text", config.label_column or "label"
    if text_column == label_column:
        raise ConfigError(f"{config.name}: text_column and label_column both name {text_column!r}; they are two columns")
    return MtebTask(
        name=config.name,
        source="parquet",
        location=_absolute(train),
        test_location=_absolute(test),
        revision=UNREAD,
        text_column=text_column,
        label_column=label_column,
        max_epochs=max_epochs,
        samples_per_label=_OWN_SAMPLES_PER_LABEL,
    )


def _absolute(path: str) -> str:
    # A worker may have another working directory than the command line.
    return str(Path(path).expanduser().absolute())


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
        raise ConfigError(f"mteb_tasks: mteb knows no task {name!r}. {hint}For data of your own, name the files train and test") from None
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


def _read_files(task: MtebTask) -> tuple[dict[str, Any], str]:
    files = _split_files(task)
    digest = hashlib.sha256()
    raw = {}
    for split, path in files.items():
        raw[split] = _read_parquet(path, task, split)
        digest.update(split.encode() + path.read_bytes())
    return raw, f"sha256:{digest.hexdigest()}"


def _split_files(task: MtebTask) -> dict[str, Path]:
    if task.source == "parquet":
        assert task.test_location is not None
        files = {"train": Path(task.location), "test": Path(task.test_location)}
        for split, path in files.items():
            if not path.is_file():
                raise DataError(f"{task.name}: the {split} file {path} does not exist; set {split} for this MTEB task in the config")
        return files
    folder = Path(task.location)
    if not folder.is_dir():
        raise DataError(f"{task.name}: the mirror has no folder {folder}; expected {folder}/train.parquet and test.parquet")
    found = {path.stem: path for path in sorted(folder.glob("*.parquet"))}
    for split in ("train", "test"):
        if split not in found:
            raise DataError(f"{task.name}: expected a split {split!r}, found {', '.join(found) or 'none'} in {folder}; add {split}.parquet")
    return {split: found[split] for split in ("train", "validation", "test") if split in found}


def _read_parquet(path: Path, task: MtebTask, split: str) -> Any:
    wanted = (task.text_column, task.label_column)
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            for column in wanted:
                if column not in columns:
                    fix = f"set {'text_column' if column == wanted[0] else 'label_column'} for this MTEB task in the config"
                    raise DataError(f"{task.name}: {split} has no column {column!r}, but {', '.join(columns)} ({path}); {fix}")
                if (count := columns.count(column)) > 1:
                    raise DataError(f"{task.name}: {split} has {count} columns named {column!r} ({path}); give each its own name")
            names = ["label_text"] if columns.count("label_text") == 1 and "label_text" not in wanted else []
            return file.read(columns=[*wanted, *names])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{task.name}: {split} cannot be read as Parquet: {path}: {error}; write the file again") from error


def _hub_table(part: Any, label_column: str) -> Any:
    """An arrow table of a ``datasets.Dataset``, with the names of its ``ClassLabel`` as ``label_text``."""
    table = part.with_format("arrow")[:]
    names = getattr(part.features[label_column], "names", None)
    if names and "label_text" not in table.column_names:
        numbers = table[label_column].to_pylist()
        of_label = [None if number is None or number < 0 else names[number] for number in numbers]  # -1: without a label
        return table.append_column("label_text", pa.array(of_label, pa.string()))
    return table


def _checked_splits(tables: dict[str, Any], task: MtebTask) -> dict[str, Any]:
    splits = {split: _checked(table, task, split) for split, table in tables.items()}
    kinds = {split: table["label"].type for split, table in splits.items()}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{split} {kind}" for split, kind in kinds.items())
        raise DataError(f"{task.name}: labels are numbers in one split and strings in another ({found}); write them alike")
    return splits


def _checked(table: Any, task: MtebTask, split: str) -> Any:
    """Columns text, label and perhaps label_text, without nulls, of the types that ``LoadedTask.splits`` promises."""
    where = f"{task.name}: {split}"
    if table.num_rows == 0:
        raise DataError(f"{where} is empty; expected at least one text")
    text = _decoded(table[task.text_column])
    if not _is_text(text.type):
        raise DataError(f"{where}: column {task.text_column!r} is {text.type}, not text; set text_column to a column of strings")
    columns = {"text": text, "label": _checked_label(_decoded(table[task.label_column]), task, where)}
    for column, values in ((task.text_column, text), (task.label_column, columns["label"])):
        if values.null_count:
            count = f"{values.null_count} of {table.num_rows} rows have no value"
            raise DataError(f"{where}: column {column!r}: {count}; remove these rows or fill them")
    if "label_text" in table.column_names and _is_text(_decoded(table["label_text"]).type):
        columns["label_text"] = _decoded(table["label_text"])
    columns = {name: values.cast(pa.string()) if _is_text(values.type) else values for name, values in columns.items()}
    checked = pa.table(columns)
    try:
        checked.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: holds bytes that are not UTF-8: {error}; write the file again") from error
    return checked


def _decoded(values: Any) -> Any:
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _checked_label(values: Any, task: MtebTask, where: str) -> Any:
    kind = values.type
    if _is_text(kind):
        return values
    if pa.types.is_boolean(kind):
        return values.cast(pa.string())
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
        try:
            return values.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise DataError(f"{where}: column {task.label_column!r} is {kind}, but not of whole numbers: {error}") from error
    raise DataError(f"{where}: column {task.label_column!r} is {kind}; expected strings or integers; set label_column")


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
