"""Export for sentence-transformers: an embedder, or a classifier with the head as its last module."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.adapter.adapter import Adapter
from pipeline.encoder.encoder import Encoder, FloatArray
from pipeline.export.common import COMPARED_TEXTS, TEXTS_AT_ONCE, Vectors, head_tensors, save_tokenizer


def write_embedder(adapter: Adapter, folder: Path, vectors: Vectors) -> None:
    """Write the merged encoder as a SentenceTransformer, with its prompts."""
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    last: list[nn.Module] = []
    if vectors.width is not None:
        # A cut after the scaling, as by ``truncate_dim``, would leave vectors that are shorter than 1.
        first_dimensions = torch.eye(vectors.width, adapter.encoder.hidden_size)
        last.append(
            Dense(
                adapter.encoder.hidden_size,
                vectors.width,
                bias=False,
                activation_function=nn.Identity(),
                init_weight=first_dimensions,
            )
        )
    if vectors.unit:
        last.append(Normalize())
    write_modules(adapter.encoder, folder, last, prompts=dict(vectors.prompts), default_prompt_name=vectors.prompt)


def write_classifier(adapter: Adapter, folder: Path, vectors: Vectors) -> None:
    """Write the merged encoder and the head as a SentenceTransformer whose vectors are logits."""
    from sentence_transformers.sentence_transformer.modules import Dense

    weight, bias = head_tensors(adapter)
    head = Dense(
        weight.shape[1], weight.shape[0], activation_function=nn.Identity(), init_weight=weight, init_bias=bias
    )
    write_modules(adapter.encoder, folder, [head])


def write_modules(encoder: Encoder, folder: Path, last: Sequence[nn.Module], **model_options: Any) -> None:
    """Write an encoder as a SentenceTransformer. transformers loads the folder too, without the last modules.

    Args:
        encoder: Encoder with plain layers.
        folder: Existing folder to write to.
        last: Modules after the pooling.
        model_options: Further arguments of ``SentenceTransformer``.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    # Without this option, loading a BERT warns about random weights in its unused pooler.
    has_pooler = "add_pooling_layer" in inspect.signature(type(encoder.model).__init__).parameters
    options = {"add_pooling_layer": False} if has_pooler else {}
    with tempfile.TemporaryDirectory(dir=folder) as merged:
        encoder.model.save_pretrained(merged)
        save_tokenizer(encoder, Path(merged))
        transformer: Any = Transformer(merged, model_kwargs=options.copy())
        transformer.model_kwargs, transformer.config_keys = options, [*transformer.config_keys, "model_kwargs"]
        pooling = Pooling(encoder.hidden_size, encoder.config.pooling)
        model = SentenceTransformer(modules=[transformer, pooling, *last], device="cpu", **model_options)
        model.save(str(folder), create_model_card=False)


def read_sentence_transformers(folder: Path) -> FloatArray:
    """Return sentence-transformers' vectors of the compared texts, float32 (texts, width).

    For a classifier, the vectors are logits and the width is the number of classes.
    """
    from sentence_transformers import SentenceTransformer

    model: Any = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    vectors: FloatArray = model.encode(list(COMPARED_TEXTS), batch_size=TEXTS_AT_ONCE, show_progress_bar=False)
    return vectors
