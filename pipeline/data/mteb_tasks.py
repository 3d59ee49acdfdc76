"""mteb's task objects: found by name, and filled with tables. The door to mteb's tasks."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.families import FAMILY_OF_MTEB
from pipeline.data.quickstart import PACKAGES
from pipeline.data.table_checks import LoadedTask, check_kinds, checked_table, with_revision
from pipeline.errors import ConfigError, DataError, InputError, LorafleetError, first_line
from pipeline.hub_errors import hub_error, hub_fault_behind
from pipeline.records import MtebTask

OWN_SAMPLES_PER_LABEL = 8  # mteb's default


def load_from_hub(task: MtebTask, mteb_task: Any, *, offline: bool) -> LoadedTask:
    """Let mteb load and transform a data set of the Hub, and check its splits.

    Args:
        task: The planned task.
        mteb_task: The same task of mteb, restricted to one subset.
        offline: Read from the local cache of the Hub only.
    Raises:
        DataError: the data set is missing, damaged, or lacks a split.
        LorafleetError: the Hub cannot be reached.
    """
    place = load_mteb_data(task.name, mteb_task, offline=offline)
    parts = mteb_task.dataset[task.subset] if mteb_task.metadata.is_multilingual else mteb_task.dataset
    for split in ("train", "test"):
        if split not in parts:
            raise DataError(f"{task.name}: expected a split {split!r}, found {', '.join(sorted(parts))} in {place}")
    tables = {
        split: _hub_table(parts[split], task.label_column)
        for split in ("train", "validation", "test")
        if split in parts
    }
    splits = {split: checked_table(table, task, f"{task.name}: {split}") for split, table in tables.items()}
    check_kinds(splits, task.name)
    fill_mteb_task(mteb_task, splits, task.subset)
    return LoadedTask(with_revision(task, mteb_task.metadata.revision), mteb_task, splits)


def load_mteb_data(name: str, mteb_task: Any, *, offline: bool) -> str:
    """Let mteb load its data set, and translate what it raises.

    Args:
        name: Name of the task, for messages.
        mteb_task: A task of mteb, restricted to one subset.
        offline: Read from the local cache of the Hub only.
    Returns: The data set and its revision, for messages.
    Raises: DataError, LorafleetError: as ``load_from_hub``.
    """
    import datasets
    from huggingface_hub import constants

    place = f"{mteb_task.metadata.dataset['path']} at {mteb_task.metadata.revision}"
    path = mteb_task.metadata.dataset["path"]
    if not Path(path).is_absolute() and Path(path).exists():
        raise DataError(
            f"{name}: {path} in the working folder would be taken for the data set on the Hub; start elsewhere"
        )
    try:
        with _hub_access(offline=offline):
            mteb_task.load_data()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if (fault := hub_fault_behind(error)) is not None:
            raise hub_error(fault, f"{name}: {place}", offline=offline, kind=DataError) from error
        if isinstance(error, ConnectionError) and not (offline or constants.HF_HUB_OFFLINE):
            raise LorafleetError(
                f"{name}: the Hub cannot be reached for {place}: {error}; try again, or set data.mirror"
            ) from error
        if isinstance(error, ConnectionError):
            raise DataError(
                f"{name}: {place} is not in the local Hub cache; fetch it once while online, or set data.mirror"
            ) from error
        raise DataError(f"{name}: {place} cannot be loaded: {first_line(error)}") from error
    return place


def find_mteb_task(name: str, *, subset: str | None = None) -> Any:
    """Return the task of mteb with this name, of a type that can be learnt.

    Raises: ConfigError: mteb has no such task, or it has another type. The message names similar tasks.
    """
    import mteb

    try:
        mteb_task = mteb.get_task(name, eval_splits=["test"], hf_subsets=None if subset is None else [subset])
    except KeyError:
        close = _close_names(name)
        hint = f"Did you mean {', '.join(close)}? " if close else ""
        raise ConfigError(
            f"mteb_tasks: mteb knows no task {name!r}. {hint}For your own data, name a file in train"
        ) from None
    metadata = mteb_task.metadata
    if metadata.modalities != ["text"] or not _can_be_learnt(mteb_task):
        kind = f"{metadata.type} of {' and '.join(metadata.modalities)}"
        raise ConfigError(
            f"{name}: expected a task of texts of type {', '.join(FAMILY_OF_MTEB)}, with one label for each text, "
            f"but mteb lists it as {kind}"
        )
    if "test" not in metadata.eval_splits or getattr(mteb_task, "is_cross_validation", False):
        raise ConfigError(f"{name}: has no test split; mteb scores it on {', '.join(metadata.eval_splits)}")
    return mteb_task


def _can_be_learnt(mteb_task: Any) -> bool:
    """Return whether the task has a type that can be learnt, with one column for each text."""
    from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskPairClassification, AbsTaskSTS

    match mteb_task.metadata.type:
        case "Classification":
            return isinstance(mteb_task, AbsTaskClassification) and isinstance(mteb_task.input_column_name, str)
        case "STS":
            return isinstance(mteb_task, AbsTaskSTS) and isinstance(mteb_task.column_names[0], str)
        case "PairClassification":
            return isinstance(mteb_task, AbsTaskPairClassification) and isinstance(mteb_task.input1_column_name, str)
        case "Clustering":
            return isinstance(mteb_task, AbsTaskClustering)
        case kind:
            return kind in FAMILY_OF_MTEB


def _close_names(name: str) -> list[str]:
    import mteb

    every = mteb.get_tasks(
        task_types=list(FAMILY_OF_MTEB), modalities=["text"], exclude_superseded=False, exclude_aggregate=True
    )
    by_key = {known.lower(): known for known in (*PACKAGES, *(task.metadata.name for task in every))}
    starting = [key for key in by_key if key.startswith(name.lower())]
    similar = difflib.get_close_matches(name.lower(), by_key, n=5)
    return [by_key[key] for key in dict.fromkeys((*sorted(starting, key=len), *similar))][:5]


def choose_subset(mteb_task: Any, subset: str | None) -> str:
    """Return the subset to read: the requested one, the only one, or the English one.

    Raises: ConfigError: the subset does not exist, or there are several and no default.
    """
    name, languages = mteb_task.metadata.name, mteb_task.metadata.hf_subsets_to_langscripts
    if subset is not None or len(languages) == 1:
        check_subset(name, subset, list(languages))
        return subset or next(iter(languages))
    english = [part for part, scripts in languages.items() if scripts == ["eng-Latn"]]
    if "en" in english:
        return "en"
    if len(english) != 1:
        raise ConfigError(
            f"{name}: has {len(english)} English subsets; set subset to one of {', '.join(english or languages)}"
        )
    return english[0]


def check_subset(name: str, subset: str | None, known: list[str]) -> None:
    """Check that a task has the requested subset, if one is requested.

    Raises: ConfigError: it does not.
    """
    if subset is not None and subset not in known:
        raise ConfigError(f"{name}: has no subset {subset!r}; its subsets are {', '.join(known)}")


@contextmanager
def prefixed_errors(where: str) -> Iterator[None]:
    """Prefix the message of an InputError with the table that it is about, and raise it as a DataError."""
    try:
        yield
    except InputError as error:
        raise DataError(f"{where}: {error}") from None


def _hub_table(part: Any, label_column: str) -> Any:
    """Return a ``datasets.Dataset`` as an Arrow table, with the names of its ``ClassLabel`` as ``label_text``."""
    table = part.with_format("arrow")[:]
    names = getattr(part.features[label_column], "names", None)
    if names and "label_text" not in table.column_names:
        numbers = table[label_column].to_pylist()
        # -1 stands for a missing label.
        label_texts = [None if number is None or number < 0 else names[number] for number in numbers]
        return table.append_column("label_text", pa.array(label_texts, pa.string()))
    return table


def make_mteb_task(task: MtebTask) -> Any:
    """Return an mteb task for data that mteb does not know."""
    from mteb.abstasks import AbsTaskClassification
    from mteb.abstasks.task_metadata import TaskMetadata

    metadata = TaskMetadata(
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
    return type(
        task.name, (AbsTaskClassification,), {"metadata": metadata, "samples_per_label": task.samples_per_label}
    )()


def fill_mteb_task(mteb_task: Any, splits: dict[str, Any], subset: str) -> None:
    """Fill an mteb task with data, so that it loads none.

    Labels become 0..C-1 in sorted order. This leaves mteb's few-shot scores unchanged, and lets its average precision,
    which takes 1 as the positive class, work for strings too.
    """
    import datasets

    labels = pc.unique(pa.chunked_array([chunk for table in splits.values() for chunk in table["label"].chunks]))
    in_order = labels.take(pc.sort_indices(labels))
    parts = datasets.DatasetDict()
    for split, table in splits.items():
        numbers = pc.index_in(table["label"], value_set=in_order).cast(pa.int64())
        parts[split] = _with_whole_columns(
            pa.table({mteb_task.input_column_name: table["text"], mteb_task.label_column_name: numbers})
        )
    mteb_task.dataset = {subset: parts} if mteb_task.metadata.is_multilingual else parts
    mteb_task.data_loaded = True


def _with_whole_columns(table: Any) -> Any:
    """Return a ``datasets.Dataset`` whose columns are lists.

    A plain ``datasets.Dataset`` reads a column again, row by row, at every use, and mteb uses columns often. Without
    the encoder, TweetSentiment's few-shot protocol took 14 s with plain columns and 0.4 s with lists, for equal scores.
    """
    import datasets

    class WholeColumns(datasets.Dataset):
        def __getitem__(self, key: Any) -> Any:
            item = super().__getitem__(key)
            return item[:] if isinstance(key, str) else item

    return WholeColumns(table)


@contextmanager
def _hub_access(*, offline: bool) -> Iterator[None]:
    """Keep ``datasets`` and ``huggingface_hub`` off the network if offline.

    Both read these constants at every call, but the environment only when they are imported.
    """
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    previous = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module, was_offline in zip(modules, previous, strict=True):
            module.HF_HUB_OFFLINE = was_offline or offline
        yield
    finally:
        for module, was_offline in zip(modules, previous, strict=True):
            module.HF_HUB_OFFLINE = was_offline
