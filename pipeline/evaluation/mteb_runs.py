"""mteb's evaluation of a filled task on precomputed vectors. The only module that calls ``mteb.evaluate``."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.encoder.encoder import FloatArray

Side = Literal["query", "document"]
"""Role of a text in a search."""

Embed = Callable[[list[str], Side | None], FloatArray]
"""Vectors of texts, float32 (texts, width), for a role. The role is None outside a search."""


def import_ahead() -> None:
    """Import mteb and transformers in advance, because each takes seconds."""
    import mteb  # noqa: F401
    import transformers.modeling_utils  # noqa: F401


@dataclass(frozen=True)
class MtebRun:
    """The outcome of one evaluation by mteb."""

    scores: dict[str, Any]
    """mteb's scores on test, of the only subset."""
    result: dict[str, Any]
    """mteb's own ``TaskResult``, as JSON values."""
    predictions: Any
    """mteb's predictions on test, as JSON values. None if they were not asked for, or if the task makes none."""


def run_mteb(
    mteb_task: Any, embed: Embed, *, texts_by_id: Mapping[str, str] | None = None, keep_predictions: bool = False
) -> MtebRun:
    """Let mteb evaluate vectors on a filled task. Repeated calls on the same task give the same scores.

    Args:
        mteb_task: Task whose data are in memory.
        embed: Function that returns the vectors of texts.
        texts_by_id: Text of each query and passage, if mteb's rows have ids. mteb strips passages of outer space.
        keep_predictions: Whether to return mteb's predictions too.
    """
    import mteb

    mteb_task.rng_state = random.Random(mteb_task.seed)  # an evaluation of clusters uses it up
    with tempfile.TemporaryDirectory() as folder, _no_progress_bars():
        (task_result,) = mteb.evaluate(
            _mteb_encoder(embed, texts_by_id or {}),
            mteb_task,
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"batch_size": 1024, "show_progress_bar": False},
            prediction_folder=folder if keep_predictions else None,
        ).task_results
        (entry,) = task_result.scores["test"]
        path = Path(folder) / mteb_task.prediction_file_name
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    predictions = None if saved is None else saved[entry["hf_subset"]]["test"]
    return MtebRun(entry, task_result.model_dump(mode="json"), predictions)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the progress bars of ``datasets`` off the log."""
    import datasets

    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()


def _mteb_encoder(embed: Embed, texts_by_id: Mapping[str, str]) -> Any:
    """An encoder for mteb that returns the vectors of ``embed``."""
    from mteb.models import ModelMeta
    from mteb.similarity_functions import cos_sim, pairwise_cos_sim

    def texts_of(batch: Any) -> list[str]:
        return [texts_by_id[number] for number in batch["id"]] if "id" in batch else list(batch["text"])

    class CachedEncoder:
        mteb_model_meta = ModelMeta.create_empty({"name": "lorafleet/encoder", "revision": "current"})

        def __init__(
            self, model_name: str = "", revision: str | None = None, *, device: str | None = None, **kwargs: Any
        ) -> None:
            """Accept the arguments that mteb's protocol requires."""

        def encode(self, inputs: Any, *, prompt_type: Any = None, **kwargs: Any) -> FloatArray:
            side = None if prompt_type is None else prompt_type.value
            return embed([text for batch in inputs for text in texts_of(batch)], side)

        def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
            return cos_sim(embeddings1, embeddings2)

        def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
            return pairwise_cos_sim(embeddings1, embeddings2)

    return CachedEncoder()
