"""The task family of a data set: which keys and losses it has, and how it follows from mteb, the config or columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config import MtebTaskConfig, TrainConfig
from pipeline.errors import ConfigError, DataError
from pipeline.records import Family, Loss, MtebTask

PairKind = Literal["scores", "labels", "positives"]
"""Meaning of the pairs: graded by a score, labelled 0 or 1, or all positive."""

SIDES = (("sentence1", "sentence2"), ("query", "passage"), ("anchor", "positive"))
"""Names of the two sides of a pair, as sentence-transformers has them."""

SCORES = ("score", "scores", "similarity", "label", "labels")
"""Names of the column with the similarity or the label of a pair."""

FAMILY_OF_MTEB: dict[str, Family] = {
    "Classification": "classification",
    "STS": "text-matching",
    "PairClassification": "text-matching",
    "Retrieval": "retrieval",
    "Clustering": "separation",
}
"""Task family of each type of mteb that can be learnt. Reranking cannot: mteb gives each query its own candidates."""

_LOSSES: dict[Family, tuple[Loss, ...]] = {  # the default first
    "classification": ("cross-entropy",),
    "text-matching": ("cosent", "cosine", "infonce"),
    "retrieval": ("infonce", "triplet"),
    "separation": ("infonce",),
}
_LABELLED: tuple[Family, ...] = ("classification", "separation")
_PAIRED: tuple[Family, ...] = ("text-matching", "retrieval")
_FAMILIES_OF_KEY: dict[str, tuple[Family, ...]] = {
    "text_column": _LABELLED,
    "label_column": _LABELLED,
    "columns": _PAIRED,
    "score_column": ("text-matching",),
    "prefixes": ("retrieval",),
    "sides": ("retrieval",),
    "slices": _PAIRED,
    "corpus": ("retrieval",),
}
_EMBEDDING: tuple[Family, ...] = (*_PAIRED, "separation")
_FAMILIES_OF_TRAIN_KEY: dict[str, tuple[Family, ...]] = {
    "temperature": _EMBEDDING,
    "widths": _EMBEDDING,
    "distillation": _EMBEDDING,
    "texts_per_pass": _EMBEDDING,
    "head_init": ("classification",),
    "label_smoothing": ("classification",),
    "class_weights": ("classification",),
}


@dataclass(frozen=True)
class Decision:
    """Family and loss of a planned task."""

    objective: Family
    loss: Loss
    undecided: tuple[str, ...]
    """Those of the two that are a guess until the columns of the data are known."""


def decide_family(config: MtebTaskConfig, *, known: Family | None) -> Decision:
    """Decide family and loss of a task from its config.

    Args:
        config: The task's part of the config.
        known: Family of the task in mteb, or of a package's task. None for the user's own files.
    Raises: ConfigError: a key has no effect in the family, or the loss does not fit it.
    """
    family = config.objective or known or _family_of_keys(config)
    if known is not None and family != known and (known, family) != ("classification", "separation"):
        also = ' or "separation"' if known == "classification" else ""
        raise ConfigError(
            f'{config.name}: objective = "{family}" does not fit its data; expected "{known}"{also}, or leave it out'
        )
    undecided: tuple[str, ...] = ("objective",) if family is None else ()
    family = family or _likely(config)
    for key, families in _FAMILIES_OF_KEY.items():
        if getattr(config, key) is not None and family not in families:
            raise ConfigError(
                f'{config.name}: {key} has no effect with objective = "{family}", only with {_quoted(families)}; '
                "leave it out, or set another objective"
            )
    if config.loss is not None and config.loss not in _LOSSES[family]:
        raise ConfigError(_misfit(config.name, config.loss, family))
    if config.loss is None and (undecided or family == "text-matching"):
        undecided += ("loss",)
    return Decision(family, config.loss or _LOSSES[family][0], undecided)


def family_of_columns(names: Sequence[str]) -> Family | None:
    """Return the family that the columns of a file fit: texts with a label first; None if they fit none."""
    if {"text", "label"} <= set(names):
        return "classification"
    sides = next((sides for sides in SIDES if set(sides) <= set(names)), None)
    return None if sides is None else "text-matching" if sides[0] == "sentence1" else "retrieval"


def family_of_one_side(names: Sequence[str]) -> Family | None:
    """Return the family of pairs of which a file has one side only; None if it has texts, or no side."""
    found = [sides for sides in SIDES if set(sides) & set(names)]
    if not found or "text" in names:
        return None
    return "text-matching" if found[0][0] == "sentence1" else "retrieval"


def with_family(task: MtebTask, family: Family) -> MtebTask:
    """Return the task with the family that its data have.

    Raises: DataError: a setting of the task does not fit the family.
    """
    says = f'its columns make it objective = "{family}"'
    if task.slices and family not in _PAIRED:
        raise DataError(f"{task.name}: slices has no effect, because {says}; leave it out, or set objective")
    if "loss" not in task.undecided and task.loss not in _LOSSES[family]:
        raise DataError(f"{_misfit(task.name, task.loss, family)} ({says})")
    loss = _LOSSES[family][0] if "loss" in task.undecided else task.loss
    still = [field for field in task.undecided if field != "objective" and (field != "loss" or family in _PAIRED)]
    return task.changed(objective=family, loss=loss, undecided=tuple(still))


def fitting_loss(task: MtebTask, *, kind: PairKind, num_negatives: int) -> Loss:
    """Return the loss of a task of pairs: the one that was said, or the default for its data.

    Args:
        task: The task, whose family is decided.
        kind: Meaning of the pairs.
        num_negatives: Given negatives of each training pair.
    Raises: DataError: the loss needs data of another kind.
    """
    if "loss" in task.undecided:
        return "infonce" if task.objective == "retrieval" or kind == "positives" else "cosent"
    needs = None
    if task.loss in ("cosent", "cosine") and kind == "positives":
        needs = 'scores or 0/1 labels, but the data have positive pairs alone; set score_column, or loss = "infonce"'
    if task.loss == "infonce" and kind != "positives":
        needs = f'positive pairs alone, but the data have {kind} in {task.score_column!r}; set loss = "cosent"'
    if task.loss == "triplet" and not num_negatives:
        needs = 'a given negative for each pair; add a column negative, or set loss = "infonce"'
    if needs is not None:
        raise DataError(f'{task.name}: loss = "{task.loss}" needs {needs}')
    return task.loss


def check_training(task: MtebTask, train: TrainConfig) -> None:
    """Check that the batches of a task are large enough for its loss.

    Raises: ConfigError: they are not.
    """
    try:
        check_batch_size(task.objective, task.loss, train.batch_size)
    except ConfigError as error:
        raise ConfigError(f"{task.name}: {error}") from None


def check_batch_size(family: Family, loss: Loss, batch_size: int) -> None:
    """Check that a loss has something to compare in each batch.

    Raises: ConfigError: the batches are too small.
    """
    least = least_batch(family, loss)
    if batch_size < least:
        raise ConfigError(
            f'loss = "{loss}" of objective = "{family}" compares the examples of a batch, so train.batch_size must be '
            f"at least {least}, not {batch_size}"
        )


def least_batch(family: Family, loss: Loss) -> int:
    """Return the number of examples of the smallest useful batch. Separation needs two texts of each of two labels."""
    if family == "separation":
        return 4
    return 1 if loss in ("cross-entropy", "cosine") else 2


def check_train_keys(tasks: Sequence[MtebTask], train: TrainConfig) -> None:
    """Check that every key of ``[train]`` that was changed has an effect on one of the tasks of a run.

    Raises: ConfigError: a key has none.
    """
    present = {task.objective for task in tasks}
    for key, families in _FAMILIES_OF_TRAIN_KEY.items():
        is_changed = getattr(train, key) != TrainConfig.model_fields[key].get_default()
        if is_changed and present.isdisjoint(families):
            raise ConfigError(
                f"train.{key} has an effect only with objective = {_quoted(families)}, and the tasks of this run have "
                f"{_quoted(sorted(present))}; leave it out"
            )


def check_widths(widths: Sequence[int], *, hidden_size: int) -> None:
    """Check that the encoder's vectors have as many dimensions as are asked for.

    Args:
        widths: ``train.widths``.
        hidden_size: Number of dimensions of the encoder's vectors.
    Raises: ConfigError: a width is larger, or the only one is the whole vector's.
    """
    if set(widths) == {hidden_size}:
        raise ConfigError(
            f"train.widths: {hidden_size} is the width of the whole vector, which is always trained; leave it out"
        )
    if too_large := [width for width in widths if width > hidden_size]:
        raise ConfigError(
            f"train.widths: {', '.join(map(str, too_large))} is larger than {hidden_size}, the width of the encoder's "
            "vectors; leave it out"
        )


def _family_of_keys(config: MtebTaskConfig) -> Family | None:
    """Return the family that the keys of an entry of own files decide; None if several fit.

    Raises: ConfigError: ``columns`` names sides of pairs, and nothing says which family they are for.
    """
    fitting = _fitting(config)
    if config.columns is not None and len(fitting) > 1:
        of_names = "retrieval" if len(config.columns) > 2 else family_of_columns(config.columns)
        if of_names is None:
            raise ConfigError(
                f"{config.name}: columns = {list(config.columns)} may be pairs of either kind; "
                'set objective to "text-matching" or "retrieval"'
            )
        return of_names
    return fitting[0] if len(fitting) == 1 else None


def _likely(config: MtebTaskConfig) -> Family:
    return next(iter(_fitting(config)), "classification")


def _fitting(config: MtebTaskConfig) -> list[Family]:
    """Return the families that every given key fits. Separation is never inferred."""
    given: list[Any] = [families for key, families in _FAMILIES_OF_KEY.items() if getattr(config, key) is not None]
    families: tuple[Family, ...] = ("classification", *_PAIRED)
    fitting = [family for family in families if all(family in of_key for of_key in given)]
    return [family for family in fitting if config.loss is None or config.loss in _LOSSES[family]]


def _misfit(name: str, loss: Loss, family: Family) -> str:
    return f'{name}: loss = "{loss}" does not fit objective = "{family}"; expected {_quoted(_LOSSES[family])}'


def _quoted(values: Sequence[str]) -> str:
    return " or ".join(f'"{value}"' for value in values)


def pair_columns_of(mteb_task: Any, *, is_mirror: bool) -> dict[str, Any]:
    """Return the fields of a planned task that name the columns of pairs in the data set of an mteb task.

    Args:
        mteb_task: A task of type STS, PairClassification or Retrieval.
        is_mirror: Whether the data set is in a mirror, where the columns of a retrieval task are not mteb's.
    """
    match mteb_task.metadata.type:
        case "STS":
            return {"columns": tuple(mteb_task.column_names), "score_column": "score"}
        case "PairClassification":
            columns = (mteb_task.input1_column_name, mteb_task.input2_column_name)
            return {"columns": columns, "score_column": mteb_task.label_column_name}
        case _:
            return {"undecided": ("columns",)} if is_mirror else {"columns": ("query", "passage")}
