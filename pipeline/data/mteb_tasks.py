"""mteb's task classes: found by name, filled with tables. The door to mteb's tasks."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.quickstart import PACKAGES
from pipeline.data.table_checks import LoadedTask, check_kinds, checked_table, with_revision
from pipeline.errors import ConfigError, DataError, InputError, LorafleetError, first_line
from pipeline.hub_errors import hub_error, hub_fault_behind
from pipeline.records import MtebTask

OWN_SAMPLES_PER_LABEL = 8  # mteb's default


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
        raise DataError(
            f"{name}: {path} in the working folder would be taken for the data set on the Hub; start in another folder"
        )
    try:
        with _hub_access(offline=offline):
            mteb_task.load_data()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if (fault := hub_fault_behind(error)) is not None:
            raise hub_error(fault, f"{name}: {at}", offline=offline, kind=DataError) from error
        if isinstance(error, ConnectionError) and not (offline or constants.HF_HUB_OFFLINE):
            raise LorafleetError(
                f"{name}: the Hub cannot be reached for {at}: {error}; try again, or set data.mirror"
            ) from error
        if isinstance(error, ConnectionError):
            raise DataError(
                f"{name}: {at} is not in the local Hub cache; fetch it once while online, or set data.mirror"
            ) from error
        raise DataError(f"{name}: {at} cannot be loaded: {first_line(error)}") from error
    parts = mteb_task.dataset[task.subset] if mteb_task.metadata.is_multilingual else mteb_task.dataset
    found = sorted(parts)
    for split in ("train", "test"):
        if split not in parts:
            raise DataError(f"{name}: expected a split {split!r}, found {', '.join(found)} in {at}")
    tables = {
        split: _hub_table(parts[split], task.label_column)
        for split in ("train", "validation", "test")
        if split in parts
    }
    splits = {split: checked_table(table, task, f"{name}: {split}") for split, table in tables.items()}
    check_kinds(splits, name)
    fill_mteb_task(mteb_task, splits, task.subset)
    return LoadedTask(with_revision(task, mteb_task.metadata.revision), mteb_task, splits)


def find_mteb_task(name: str, *, subset: str | None = None) -> Any:
    """The classification task of mteb with this name.

    Raises: ConfigError: no such task, or one of another type; with names that are close.
    """
    import mteb
    from mteb.abstasks import AbsTaskClassification

    try:
        mteb_task = mteb.get_task(name, eval_splits=["test"], hf_subsets=None if subset is None else [subset])
    except KeyError:
        close = _close_names(name)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise ConfigError(
            f"mteb_tasks: mteb knows no task {name!r}. {hint}For data of your own, name a file in train"
        ) from None
    known = mteb_task.metadata
    is_text = known.type == "Classification" and known.modalities == ["text"]
    if (
        not is_text
        or not isinstance(mteb_task, AbsTaskClassification)
        or not isinstance(mteb_task.input_column_name, str)
    ):
        kind = f"{known.type} of {' and '.join(known.modalities)}"
        raise ConfigError(
            f"{name}: expected a classification of single texts with one label, but mteb says it is {kind}"
        )
    if "test" not in known.eval_splits or mteb_task.is_cross_validation:
        raise ConfigError(
            f"{name}: has no test split to be scored on; mteb scores it on {', '.join(known.eval_splits)}"
        )
    return mteb_task


def _close_names(name: str) -> list[str]:
    import mteb

    every = mteb.get_tasks(
        task_types=["Classification"], modalities=["text"], exclude_superseded=False, exclude_aggregate=True
    )
    by_key = {known.lower(): known for known in (*PACKAGES, *(task.metadata.name for task in every))}
    starting = [key for key in by_key if key.startswith(name.lower())]
    similar = difflib.get_close_matches(name.lower(), by_key, n=5)
    return [by_key[key] for key in dict.fromkeys((*sorted(starting, key=len), *similar))][:5]


def choose_subset(mteb_task: Any, subset: str | None) -> str:
    """The subset to read: the one asked for, the only one, or the default of a task with several languages.

    Raises: ConfigError: no such subset, or several and none asked for.
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
    """Raises: ConfigError: an MTEB task without this subset."""
    if subset is not None and subset not in known:
        raise ConfigError(f"{name}: has no subset {subset!r}; those that exist are {', '.join(known)}")


@contextmanager
def prefixed_errors(where: str) -> Iterator[None]:
    """Prefix input errors with the place of the table that they are about."""
    try:
        yield
    except InputError as error:
        raise DataError(f"{where}: {error}") from None


def _hub_table(part: Any, label_column: str) -> Any:
    """An arrow table of a ``datasets.Dataset``, with the names of its ``ClassLabel`` as ``label_text``."""
    table = part.with_format("arrow")[:]
    names = getattr(part.features[label_column], "names", None)
    if names and "label_text" not in table.column_names:
        numbers = table[label_column].to_pylist()
        of_label = [
            None if number is None or number < 0 else names[number] for number in numbers
        ]  # -1: without a label
        return table.append_column("label_text", pa.array(of_label, pa.string()))
    return table


def make_mteb_task(task: MtebTask) -> Any:
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


def fill_mteb_task(mteb_task: Any, splits: dict[str, Any], subset: str) -> None:
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
        parts[split] = _with_whole_columns(
            pa.table({mteb_task.input_column_name: table["text"], mteb_task.label_column_name: numbers})
        )
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
