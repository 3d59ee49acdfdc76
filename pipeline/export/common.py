"""Parts that all export forms share: the compared texts, the tokenizer and the head."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pipeline.adapter.adapter import Adapter
from pipeline.encoder.encoder import Encoder
from pipeline.inference.reload import REFERENCE_TEXTS


@dataclass(frozen=True)
class Vectors:
    """The vectors that an export computes, where it computes vectors."""

    width: int | None
    """Number of leading dimensions to keep (Matryoshka). None: all."""
    unit: bool
    """Whether to scale them to length 1, after the cut."""
    prompts: Mapping[str, str]
    """Texts put before a ``query`` and before a ``document``. Empty if there are none."""
    prompt: str | None
    """Key of the prompt that is put before every text. None: no prompt."""

    @property
    def prefix(self) -> str:
        """Text that is put before every text."""
        return self.prompts[self.prompt] if self.prompt else ""

    def of(self, pooled: Tensor) -> Tensor:
        """Cut and scale pooled vectors, float32 (texts, width)."""
        cut = pooled if self.width is None else pooled[:, : self.width]
        return nn.functional.normalize(cut) if self.unit else cut


COMPARED_TEXTS = (*REFERENCE_TEXTS, " ".join(REFERENCE_TEXTS))
"""Texts on which an export is compared with its adapter. Most encoders cut the last one."""
TEXTS_AT_ONCE = 8
"""Batch size of the comparison."""


def save_tokenizer(encoder: Encoder, folder: Path) -> None:
    """Save the encoder's tokenizer so that its files alone truncate and pad as ``Encoder`` does."""
    tokenizer = deepcopy(encoder.tokenizer)
    tokenizer.model_max_length = encoder.config.max_tokens
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:  # other tools need one to pad; any token will do, as it is masked
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(encoder.pad_id)
    tokenizer.backend_tokenizer.enable_truncation(max_length=encoder.config.max_tokens)
    tokenizer.backend_tokenizer.enable_padding(pad_id=encoder.pad_id, pad_token=tokenizer.pad_token)
    tokenizer.save_pretrained(folder)


def head_tensors(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return the head's weight (classes, width) and bias (classes,)."""
    state = adapter.classifier.linear.state_dict()
    return state["weight"], state["bias"]


def text_batches() -> list[list[str]]:
    """Return ``COMPARED_TEXTS`` in batches."""
    return [
        list(COMPARED_TEXTS[start : start + TEXTS_AT_ONCE]) for start in range(0, len(COMPARED_TEXTS), TEXTS_AT_ONCE)
    ]
