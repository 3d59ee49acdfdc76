"""The frozen encoder: tokenises texts, computes token vectors, and pools them into text vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config import EncoderConfig
from pipeline.encoder.files import EncoderFiles
from pipeline.encoder.loading import load_tokenizer, load_weights, normalizes_vectors
from pipeline.encoder.tokeniser import IntArray, Tokeniser, Tokens
from pipeline.records import Runtime

FloatArray = npt.NDArray[np.float32]

_TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}


class Encoder:
    """A frozen encoder with its tokenizer. Adapters are attached to ``model`` in place."""

    can_be_recorded = True
    """Whether a training step on a GPU may be recorded and replayed."""

    def __init__(self, files: EncoderFiles, config: EncoderConfig, runtime: Runtime) -> None:
        """Load the weights in the runtime's dtype and freeze them.

        Raises: EncoderError: files missing or damaged, remote code not allowed, no fast tokenizer.
        """
        self.ref = files.ref
        self.config = config
        self.device = torch.device(runtime.device)
        if self.device.type == "cuda":
            # cuDNN makes a plan for every new shape of a batch, which takes longer than the batch.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.model: Any = load_weights(files.folder, config, runtime)
        # Some architectures support eager attention only.
        self.runtime = runtime.changed(attention=self.model.config._attn_implementation)
        self.tokenizer = load_tokenizer(files.folder, config)
        self._tokenise = Tokeniser(self.tokenizer, max_tokens=config.max_tokens)
        self.normalize = normalizes_vectors(files.folder)
        self.hidden_size = int(self.model.config.hidden_size)
        self.pad_id = int(self.tokenizer.pad_token_id or 0)

    @property
    def num_parameters(self) -> int:
        """Number of frozen parameters, without those of adapters attached to the model."""
        return sum(p.numel() for n, p in self.model.named_parameters() if not p.requires_grad and ".lora_" not in n)

    def tokenise(self, texts: Sequence[str]) -> Tokens:
        """Turn texts into token ids, special tokens included, cut at ``max_tokens``."""
        return self._tokenise(texts)

    def pooled(self, batch: Batch) -> Tensor:
        """Text vectors, float32 (texts, width), not normalised, differentiable."""
        hidden = self.model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        return pool(hidden, batch.mask, how=self.config.pooling)

    @torch.inference_mode()
    def embed(self, tokens: Tokens) -> FloatArray:
        """Vectors of all texts in their order, float32 (texts, width), not normalised.

        Batches depend only on the lengths, so the same texts give the same bits.
        """
        vectors = np.empty((len(tokens), self.hidden_size), dtype=np.float32)
        for rows in batches_by_budget(tokens.lengths, tokens_per_batch=_TOKENS_PER_BATCH[self.device.type]):
            vectors[rows] = self.pooled(self.batch(tokens, rows)).cpu().numpy()
        return vectors

    def batch(self, tokens: Tokens, rows: IntArray, *, length_step: int = 1) -> Batch:
        """Make a batch of some texts on the encoder's device.

        Texts are padded to the length of the longest, rounded up to a multiple of ``length_step``."""
        starts, lengths = tokens.offsets[rows], tokens.offsets[rows + 1] - tokens.offsets[rows]
        longest = -(-int(lengths.max()) // length_step) * length_step
        columns = np.arange(min(longest, self.config.max_tokens))
        mask = columns < lengths[:, None]
        ids = np.where(mask, tokens.ids[np.minimum(starts[:, None] + columns, len(tokens.ids) - 1)], self.pad_id)
        return Batch(
            self.to_device(torch.from_numpy(ids.astype(np.int64))),
            self.to_device(torch.from_numpy(mask.astype(np.int64))),
        )

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the encoder's device without waiting for the copy."""
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """Token ids and mask of some texts, int64 (texts, longest text)."""

    ids: Tensor
    mask: Tensor
    """1 for text, 0 for padding. Every row has at least one 1."""


def pool(hidden: Tensor, mask: Tensor, *, how: str) -> Tensor:
    """Turn token vectors into text vectors.

    Args:
        hidden: Encoder output, float (texts, tokens, width).
        mask: 1 for text, 0 for padding, (texts, tokens).
        how: ``mean`` over the tokens that are not padding, ``cls`` (the first token), or ``max`` per dimension.
    Returns: float32 (texts, width), not normalised.
    """
    hidden = hidden.float()
    if how == "cls":
        return hidden[:, 0]
    weight = mask.unsqueeze(-1)
    if how == "max":
        return hidden.masked_fill(weight == 0, float("-inf")).amax(dim=1)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


def batches_by_budget(lengths: IntArray, *, tokens_per_batch: int) -> Iterator[IntArray]:
    """Row numbers in batches, longest texts first. Rows times the longest text of a batch stay within the budget."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, tokens_per_batch // int(lengths[order[start]]))
        yield order[start : start + rows]
        start += rows
