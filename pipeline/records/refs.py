"""Records that identify an encoder or an adapter, and the content of an adapter's files."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, FailFast, Field, RootModel, model_validator

from pipeline.records.base import (
    LONGEST_PREFIX,
    EncoderRevision,
    Family,
    LabelName,
    ModulePath,
    PublicName,
    Record,
    Sha256,
    TaskName,
)


class EncoderRef(Record):
    """An encoder at one revision."""

    name: str
    """Location in the config: a Hub id, a folder, or ``package:<name>``."""
    public_name: PublicName
    """Name that others can load it by. Never a local path."""
    revision: EncoderRevision
    """Commit on the Hub, or ``sha256:…`` of the weights of a folder or a package."""


class EncoderName(Record):
    """The encoder that an adapter was trained on."""

    name: PublicName
    revision: EncoderRevision


class Runtime(Record):
    """Device, number format and kernels. Chosen once per run, because each can change the last bits of a weight."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    """Number format of the frozen encoder. Adapters, head and optimiser are always float32."""
    attention: Literal["eager", "sdpa", "lorafleet"]
    """Attention kernel of the encoder. ``lorafleet`` is ``pipeline/encoder/attention.py``."""
    compiled: bool
    """Whether ``torch.compile`` compiles the encoder."""
    kernels: Literal["lorafleet", "torch"]
    """Origin of the encoder's linear layers and shared inputs. Compilers and exporters can trace PyTorch's only."""
    threads: int = Field(ge=1)
    """Torch threads of one worker."""
    processor: str
    """Instruction set or GPU that the choice was made for."""

    @model_validator(mode="before")
    @classmethod
    def _derive_missing_kernels(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "kernels" in values:
            return values
        return values | {"kernels": "torch" if values.get("compiled") else "lorafleet"}


class AdapterRef(Record):
    """A trained adapter on disk."""

    path: str
    sha256: Sha256
    """SHA-256 of ``adapter_model.safetensors`` followed by ``head.safetensors``."""
    encoder_revision: EncoderRevision


_Prefix = Annotated[str, Field(max_length=LONGEST_PREFIX)]


class AdapterMeta(Record):
    """The content of ``meta.json`` that is needed to load an adapter. Other keys of the file are ignored."""

    model_config = ConfigDict(extra="ignore")

    num_classes: int
    label_names: Annotated[tuple[LabelName, ...], FailFast(), Field(max_length=100_000)]
    rank: int
    alpha: float
    dropout: float
    pooling: Literal["mean", "cls", "max"]
    max_tokens: int
    hidden_size: int = Field(ge=1, le=1_000_000)
    encoder: EncoderName
    adapted_modules: Annotated[tuple[ModulePath, ...], FailFast(), Field(min_length=1, max_length=10_000)]
    """Paths of the linear layers that have a LoRA pair, in the order of the pairs."""
    task: TaskName | None = None
    """MTEB task. None if the adapter was saved outside a run."""
    objective: Family | None = None
    """Task family of an adapter without a head. None: the adapter has one, or an older version saved it."""
    prefixes: tuple[_Prefix, _Prefix] | None = None
    """Texts that the training put before each query and before each passage. None: nothing."""
    learnt_validation: bool = False
    """Whether the adapter, or one it started from, was also trained on its validation slice (``train.refit``)."""


class LabelNames(RootModel[Annotated[tuple[LabelName, ...], FailFast(), Field(min_length=2, max_length=100_000)]]):
    """The content of ``labels.json``: label names in the order of the head's outputs."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="after")
    def _no_name_twice(self) -> Self:
        name, count = Counter(self.root).most_common(1)[0]
        if count > 1:
            raise ValueError(f"label {name!r:.200} occurs {count} times")
        return self


class ReferenceOutputs(Record):
    """The content of ``probe.json``: outputs for fixed texts, used to verify a copy of the adapter on any machine."""

    texts: tuple[str, ...] = Field(min_length=1)
    logits: tuple[tuple[float, ...], ...]
    """(texts, classes), or (texts, width) for an adapter without a head. Encoder and adapter computed in float32."""
    tolerance: float = Field(gt=0, le=0.01)
    """Largest difference of an output that another machine may show."""

    @model_validator(mode="after")
    def _is_a_table(self) -> Self:
        if len(self.logits) != len(self.texts) or len({len(row) for row in self.logits}) != 1:
            raise ValueError("logits: expected one row per text, all of the same length")
        return self
