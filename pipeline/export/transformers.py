"""Export for ``AutoModelForSequenceClassification`` of transformers."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.adapter.adapter import Adapter
from pipeline.encoder.encoder import FloatArray
from pipeline.export.common import Vectors, head_tensors, save_tokenizer, text_batches

EUROBERT_POOLING = {"mean": "mean", "cls": "bos"}
"""lorafleet's name of a pooling -> its name in EuroBERT's classification head."""


def write_transformers(adapter: Adapter, folder: Path, vectors: Vectors) -> None:
    """Write the merged encoder with the head as that of EuroBERT, ``classifier(GELU(dense(x)))``.

    With ``dense = [W; -W]`` and ``classifier = [I, -I]``, it equals the linear head: ``z = GELU(z) - GELU(-z)``.
    """
    from transformers import EuroBertForSequenceClassification

    encoder, (weight, bias) = adapter.encoder, head_tensors(adapter)
    names, identity = dict(enumerate(adapter.label_names)), torch.eye(len(weight))
    config = deepcopy(encoder.model.config)
    config.classifier_pooling = EUROBERT_POOLING[encoder.config.pooling]
    config.id2label, config.label2id = names, {name: index for index, name in names.items()}
    config.problem_type = "single_label_classification"
    model = EuroBertForSequenceClassification(config)
    model.model = encoder.model
    unused = encoder.hidden_size - 2 * len(weight)
    with torch.no_grad():
        model.dense.weight.copy_(nn.functional.pad(torch.cat([weight, -weight]), (0, 0, 0, unused)))
        model.dense.bias.zero_()
        model.classifier.weight.copy_(nn.functional.pad(torch.cat([identity, -identity], dim=1), (0, unused)))
        model.classifier.bias.copy_(bias)
    model.save_pretrained(folder)
    save_tokenizer(encoder, folder)


@torch.inference_mode()
def read_transformers(folder: Path) -> FloatArray:
    """Return transformers' logits of the compared texts, float32 (texts, classes)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
    batches = [tokenizer(texts, padding=True, truncation=True, return_tensors="pt") for texts in text_batches()]
    return np.concatenate([model(**batch).logits.numpy() for batch in batches])
