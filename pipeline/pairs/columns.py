"""The columns of a table of pairs: which are the texts, which is the score, and which may be left alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.families import SCORES, SIDES
from pipeline.errors import DataError
from pipeline.labelled_files.column_names import check_columns, some
from pipeline.records import MtebTask

_NEGATIVE = re.compile(r"negative(?:_(\d+))?")
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")  # pandas hides this column from its user


@dataclass(frozen=True)
class PairColumns:
    """The columns of one table of pairs."""

    texts: tuple[str, ...]
    """The two sides, then the given negatives."""
    score: str | None
    """Similarity or 0/1 label. None: every pair is positive."""
    slices: tuple[str, ...]
    ignored: tuple[str, ...]
    """Columns that are not read."""


def find_columns(names: Sequence[str], task: MtebTask, *, split: str, where: str, others_allowed: bool) -> PairColumns:
    """Find the columns of a table of pairs, and refuse one that is not known to be text, score, group or slice.

    sentence-transformers takes every column except the score for a text, by their order. A column that is refused here
    would therefore become an input there.

    Args:
        names: Columns of the table.
        task: The planned task.
        split: ``train``, ``validation`` or ``test``. Only train needs the negatives. Only the file that test
            comes from needs the slices.
        where: The table, for messages.
        others_allowed: Whether other columns are left alone, because the config or mteb says which ones are read.
    Raises: DataError: a column is missing, superfluous or ambiguous.
    """
    texts = _sides(names, task, where)
    texts += _negatives(names, task, split=split)
    score = _score_column(names, task, texts, where)
    slices = task.slices if split == ("test" if task.test_split is None else "train") else ()
    required = [("columns", name) for name in texts] + [("slices", name) for name in slices]
    for key, column in (*required, ("score_column", score), ("group_column", task.group_column)):
        if column is not None:
            check_columns(names, where, {key: column})
    used = {*texts, score, task.group_column, *task.slices}
    others = tuple(dict.fromkeys(name for name in names if name not in used))
    extra = [name for name in others if not _PANDAS_INDEX.fullmatch(name)]
    if extra and not others_allowed:
        raise DataError(_superfluous(extra, texts, score, task, where))
    return PairColumns(texts, score, slices, others)


def _sides(names: Sequence[str], task: MtebTask, where: str) -> tuple[str, ...]:
    if "columns" not in task.undecided:
        return task.columns[:2]
    for sides in SIDES:
        if set(sides) <= set(names):
            return sides
    for one, other in SIDES:
        if task.objective == "retrieval" and one in names:
            raise DataError(
                f"{where} has queries ({one!r}) but no passages; expected a column {other!r}, or corpus and qrels"
            )
    expected = ", or ".join(" and ".join(map(repr, sides)) for sides in SIDES)
    raise DataError(
        f"{where} has {some(names) if names else 'no columns'}; expected two columns of texts, named {expected}; "
        "set columns for this MTEB task in the config"
    )


def _negatives(names: Sequence[str], task: MtebTask, *, split: str) -> tuple[str, ...]:
    if "columns" not in task.undecided:
        given = task.columns[2:]
        return given if split == "train" else tuple(name for name in given if name in names)
    if task.objective != "retrieval":
        return ()
    numbered = {name: int(match[1] or 0) for name in names if (match := _NEGATIVE.fullmatch(name))}
    return tuple(sorted(numbered, key=lambda name: (numbered[name], name)))


def _score_column(names: Sequence[str], task: MtebTask, texts: Sequence[str], where: str) -> str | None:
    if task.objective != "text-matching" or "score_column" not in task.undecided:
        return task.score_column
    apart = {*texts, task.group_column, *task.slices}
    fitting = [name for name in SCORES if name in names and name not in apart]
    if len(fitting) > 1:
        raise DataError(
            f"{where} has several columns that may be the score of a pair: {some(fitting)}; "
            "set score_column for this MTEB task in the config"
        )
    return fitting[0] if fitting else None


def _superfluous(extra: Sequence[str], texts: Sequence[str], score: str | None, task: MtebTask, where: str) -> str:
    named = f"columns = {list(texts)}".replace("'", '"')
    known = f"the texts {some(texts)}" + ("" if score is None else f" and the score {score!r}")
    scores = sorted(set(extra) & set(SCORES))
    if task.objective == "retrieval" and scores:
        return (
            f'{where} has the score {some(scores)}, but objective = "retrieval" has positive pairs alone. The config '
            "says so, or it follows from sides, prefixes, corpus, or columns called query and passage. "
            f'For pairs with a score set objective = "text-matching"; if every pair is a positive one, set {named}'
        )
    hint = ""
    if any(_NEGATIVE.fullmatch(name) for name in extra):
        hint = '; given negatives need objective = "retrieval"'
    return (
        f"{where} has {some(extra)} beside {known}, and sentence-transformers would take it for a text; "
        f"remove it, name it in slices, or set {named} to leave out all others{hint}"
    )
