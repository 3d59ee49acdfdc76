"""mteb tasks of pairs, of retrieval and of clustering, filled in memory with data that lorafleet has read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.dataset import TaskData
from pipeline.pairs.data import PairData
from pipeline.records import MtebTask


@dataclass(frozen=True)
class SearchData:
    """The test pairs of a task as a search: each distinct query, and the passages that answer it."""

    queries: list[str]
    """Distinct texts of the first side, in the order of the test pairs."""
    passages: list[str]
    """Distinct passages, which every query searches."""
    relevant: tuple[frozenset[int], ...]
    """Positions in ``passages`` of the right passages of each query, at least one."""
    query_of_pair: NDArray[np.int64]
    """Position in ``queries`` of each test pair, int64 (num_test,)."""
    own_passage: tuple[int | None, ...]
    """Position of the passage to exclude, because it equals the query. None: exclude none."""


def search_data(data: PairData) -> SearchData:
    """Turn the test pairs into queries with their right passages.

    Pairs of one query are joined. In text matching, a query's own text is no candidate for it, as long as no pair says
    that it is the right one.

    Args:
        data: Pairs that are all positive.
    """
    assert data.kind == "positives", f"pairs with {data.kind} have no right passages"
    passages = data.corpus
    position = {passage: number for number, passage in enumerate(passages)}
    firsts = data.test.columns[0]
    number_of = {query: number for number, query in enumerate(dict.fromkeys(firsts))}
    relevant: list[set[int]] = [set() for _ in number_of]
    for query, passage in zip(firsts, data.test.columns[1], strict=True):
        assert passage in position, f"{data.task.name}: a passage of test is not in the corpus"
        relevant[number_of[query]].add(position[passage])
    is_symmetric = data.task.objective == "text-matching"
    own = [position.get(query) if is_symmetric else None for query in number_of]
    return SearchData(
        queries=list(number_of),
        passages=passages,
        relevant=tuple(map(frozenset, relevant)),
        query_of_pair=np.array([number_of[query] for query in firsts], dtype=np.int64),
        own_passage=tuple(None if place in right else place for place, right in zip(own, relevant, strict=True)),
    )


def pair_task(data: PairData) -> Any:
    """Return an mteb task with the test pairs: ``STS`` for graded scores, ``PairClassification`` for 0/1 labels.

    Graded scores stay on the scale 0..1, which leaves mteb's correlations unchanged. mteb asks for the first side as
    queries and for the second as documents, so that each side can have a prefix.

    Args:
        data: Pairs with scores or with labels.
    """
    from mteb.abstasks import AbsTaskPairClassification, AbsTaskSTS
    from mteb.types import PromptType

    test = data.test
    assert test.scores is not None, "pairs without scores are searched"
    if data.kind == "scores":
        mteb_task = _new_task(data.task, AbsTaskSTS, "STS", "cosine_spearman", min_score=0, max_score=1)
        names = (*mteb_task.column_names, "score")
        values: NDArray[Any] = test.scores
    else:
        mteb_task = _new_task(data.task, AbsTaskPairClassification, "PairClassification", "cosine_ap")
        names = (mteb_task.input1_column_name, mteb_task.input2_column_name, mteb_task.label_column_name)
        values = test.scores.astype(np.int64)
    mteb_task.input1_prompt_type, mteb_task.input2_prompt_type = PromptType.query, PromptType.document
    return _filled(mteb_task, dict(zip(names, (*test.columns[:2], values), strict=True)))


def search_task(task: MtebTask, search: SearchData) -> Any:
    """Return an mteb task of type ``Retrieval``.

    Ids are the positions of the passages, and those of the queries after ``q``. A query with an ``own_passage`` has the
    id of that passage, which mteb then leaves out.

    Args:
        task: The task, for its name and revision.
        search: Queries and passages.
    """
    import datasets
    from mteb.abstasks import AbsTaskRetrieval

    mteb_task = _new_task(task, AbsTaskRetrieval, "Retrieval", "ndcg_at_10", k_values=(1, 10, 11))
    mteb_task.ignore_identical_ids = True
    ids = query_ids(search)
    part = {
        "queries": datasets.Dataset.from_dict({"id": ids, "text": search.queries}),
        "corpus": datasets.Dataset.from_dict(
            {"id": list(map(str, range(len(search.passages)))), "text": search.passages}
        ),
        "relevant_docs": {
            query: dict.fromkeys(map(str, sorted(right)), 1) for query, right in zip(ids, search.relevant, strict=True)
        },
        "top_ranked": None,
    }
    mteb_task.dataset = {"default": {"test": part}}
    mteb_task.data_loaded = True
    return mteb_task


def query_ids(search: SearchData) -> list[str]:
    """Id of each query in mteb's task."""
    return [f"q{number}" if own is None else str(own) for number, own in enumerate(search.own_passage)]


def clustering_task(data: TaskData) -> Any:
    """Return an mteb task of type ``Clustering`` with the test texts, all of which it embeds.

    Args:
        data: Texts and labels.
    """
    from mteb.abstasks import AbsTaskClustering

    mteb_task = _new_task(data.task, AbsTaskClustering, "Clustering", "v_measure", category="t2c")
    mteb_task.max_fraction_of_documents_to_embed = mteb_task.max_document_to_embed = None
    columns = {mteb_task.input_column_name: data.test_texts, mteb_task.label_column_name: data.test_labels}
    return _filled(mteb_task, columns)


def _new_task(
    task: MtebTask, kind: type, type_name: str, main_score: str, *, category: str = "t2t", **attributes: Any
) -> Any:
    """Return an mteb task without data, of an abstract task's class."""
    from mteb.abstasks.task_metadata import TaskMetadata

    metadata = TaskMetadata.model_validate(
        {
            "name": task.name,
            "description": f"{task.name}, as lorafleet read it",
            "dataset": {"path": task.name, "revision": task.revision},
            "type": type_name,
            "category": category,
            "modalities": ["text"],
            "eval_splits": ["test"],
            "eval_langs": ["eng-Latn"],
            "main_score": main_score,
        }
    )
    return type(task.name, (kind,), {"metadata": metadata, **attributes})()


def _filled(mteb_task: Any, columns: dict[str, Any]) -> Any:
    """Fill an mteb task with columns as its test split, so that it loads no data."""
    import datasets

    parts = datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)})
    mteb_task.dataset = parts
    mteb_task.data_loaded = True
    return mteb_task
