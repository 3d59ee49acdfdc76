"""Export as an ONNX graph from token ids to logits, or to vectors if the adapter has no head."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapter.adapter import Adapter
from pipeline.encoder.encoder import Batch, FloatArray
from pipeline.errors import AdapterError, first_line
from pipeline.export.common import Vectors, save_tokenizer, text_batches
from pipeline.inference.reload import REFERENCE_TEXTS


class _Graph(nn.Module):
    """Encoder, pooling and head, or what is done to vectors, as one module."""

    def __init__(self, adapter: Adapter, vectors: Vectors) -> None:
        super().__init__()
        self.model, self.head = adapter.encoder.model, adapter.head
        self._adapter, self._vectors = adapter, vectors

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (texts, classes) or vectors (texts, width) of ids and mask, each int64 (texts, tokens)."""
        batch = Batch(input_ids, attention_mask)
        if self._adapter.head is not None:
            return self._adapter.logits(batch)
        return self._vectors.of(self._adapter.vectors(batch))


def write_onnx(adapter: Adapter, folder: Path, vectors: Vectors) -> None:
    """Write the ONNX graph of a merged adapter, with its tokenizer.

    Raises: AdapterError: torch cannot export this architecture.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    encoder = adapter.encoder
    example = encoder.batch(encoder.tokenise(REFERENCE_TEXTS), np.arange(2))
    axes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about torchvision and deprecations in torch
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                _Graph(adapter, vectors).eval(),
                (example.ids, example.mask),
                input_names=["input_ids", "attention_mask"],
                output_names=[adapter.kind_of_outputs],
                dynamic_shapes=(axes, axes),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch raises whatever the unsupported layer leads to
        family = encoder.model.config.model_type
        raise AdapterError(
            f"torch cannot export a {family} model to ONNX: {first_line(error)}; choose the form classifier"
        ) from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # the nodes name source files of this machine
    program.save(folder / "model.onnx")
    save_tokenizer(encoder, folder)


def read_onnx(folder: Path) -> FloatArray:
    """Return ONNX Runtime's logits (texts, classes) or vectors (texts, width) of the compared texts, float32."""
    import onnxruntime  # type: ignore[import-untyped]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    outputs: list[FloatArray] = []
    for texts in text_batches():
        encodings = tokenizer.encode_batch(texts)
        inputs = {
            "input_ids": np.array([e.ids for e in encodings]),
            "attention_mask": np.array([e.attention_mask for e in encodings]),
        }
        outputs.append(session.run(None, inputs)[0])
    return np.concatenate(outputs)
