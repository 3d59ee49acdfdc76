"""mteb's few-shot protocol on precomputed vectors. The only module that calls ``mteb.evaluate``."""

from __future__ import annotations

from typing import Any

from pipeline.encoder.encoder import FloatArray
from pipeline.evaluation import scores
from pipeline.evaluation.vectors import TextVectors


def import_ahead() -> None:
    """Import mteb and transformers in advance, because each takes seconds."""
    import mteb  # noqa: F401
    import transformers.modeling_utils  # noqa: F401


def few_shot(mteb_task: Any, vectors: TextVectors) -> tuple[scores.Score, dict[str, Any]]:
    """Run mteb's protocol: ten draws of a logistic regression on ``samples_per_label`` texts per label, scored on test.

    Returns: The score, and mteb's own result as JSON values.
    """
    import mteb

    result = mteb.evaluate(
        _mteb_encoder(vectors),
        mteb_task,
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
        encode_kwargs={"batch_size": 1024},
    )
    task_result = result.task_results[0]
    (entry,) = task_result.scores["test"]
    draws = entry["scores_per_experiment"]
    precisions = [draw["ap"] for draw in draws] if draws[0].get("ap") is not None else None
    score = scores.score_of_draws([d["accuracy"] for d in draws], [d["f1"] for d in draws], precisions)
    return score, task_result.model_dump(mode="json")


def _mteb_encoder(vectors: TextVectors) -> Any:
    """An encoder for mteb that returns precomputed vectors."""
    from mteb.models import ModelMeta
    from mteb.similarity_functions import cos_sim, pairwise_cos_sim

    class CachedEncoder:
        mteb_model_meta = ModelMeta.create_empty({"name": "lorafleet/encoder", "revision": "current"})

        def __init__(
            self, model_name: str = "", revision: str | None = None, *, device: str | None = None, **kwargs: Any
        ) -> None:
            """Accept the arguments that mteb's protocol requires."""

        def encode(self, inputs: Any, **kwargs: Any) -> FloatArray:
            return vectors.features([text for batch in inputs for text in batch["text"]])

        def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
            return cos_sim(embeddings1, embeddings2)

        def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
            return pairwise_cos_sim(embeddings1, embeddings2)

    return CachedEncoder()
