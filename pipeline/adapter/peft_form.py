"""The file form of an adapter that PEFT loads. The only module that imports peft."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from torch import nn

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.description import FoundAdapter
from pipeline.adapter.lora import LoraLinear
from pipeline.encoder.encoder import FloatArray
from pipeline.encoder.tokeniser import Tokens
from pipeline.errors import AdapterError, VerificationError, first_line
from pipeline.records import EncoderName, JsonObject
from pipeline.store.files import read_record


def check_peft(adapter: Adapter, found: FoundAdapter, tokens: Tokens, *, outputs: FloatArray, tolerance: float) -> None:
    """Load the adapter's files with PEFT, and compare the outputs with those of the adapter.

    Args:
        adapter: An adapter that was loaded and detached. Its encoder is in float32, and is unchanged afterwards.
        found: Description of the adapter's files.
        tokens: Texts to compare on.
        outputs: ``Adapter.outputs`` of these texts.
        tolerance: Largest difference of an output.
    Raises: VerificationError: PEFT cannot load the files, or computes other outputs.
    """
    from peft import LoraConfig, PeftModel

    # A crafted config could make PEFT import modules or match patterns forever, so it is compared before PEFT reads it.
    path = found.folder.adapter_config
    config = LoraConfig().to_dict() | read_record(path, JsonObject, fault=AdapterError).root
    for key, value in json.loads(peft_config(adapter, encoder=found.meta.encoder)).items():
        if config[key] != value and key != "peft_version":
            raise VerificationError(f"{path}: {key} is {config[key]!r:.100}, but the adapter's is {value!r:.100}")
    encoder = adapter.encoder
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = PeftModel.from_pretrained(encoder.model, found.folder.root, torch_device=str(encoder.device))
    except Exception as error:  # noqa: BLE001 - damage makes PEFT raise anything
        raise VerificationError(f"{found.folder.root}: PEFT cannot load the adapter: {first_line(error)}") from None
    difference = float(np.abs(adapter.outputs(encoder.embed(tokens)) - outputs).max())
    loaded.unload()
    if not difference <= tolerance:
        raise VerificationError(
            f"{found.folder.root}: loaded by PEFT, {adapter.kind_of_outputs} differ by {difference:.3g} "
            f"(allowed: {tolerance:g})"
        )


def peft_names(projections: Mapping[str, LoraLinear]) -> Iterator[tuple[str, nn.Parameter]]:
    """Pairs of each LoRA tensor's name in PEFT's file and the tensor."""
    for path, lora in projections.items():
        yield peft_name(path, "A"), lora.lora_A
        yield peft_name(path, "B"), lora.lora_B


def peft_name(path: str, factor: Literal["A", "B"]) -> str:
    """Name of one LoRA tensor in PEFT's file."""
    return f"base_model.model.{path}.lora_{factor}.weight"


def peft_config(adapter: Adapter, *, encoder: EncoderName) -> str:
    """Content of ``adapter_config.json``."""
    from peft import LoraConfig, TaskType

    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=adapter.config.rank,
        lora_alpha=adapter.config.alpha,
        lora_dropout=0.0,
        target_modules=f"(?:{'|'.join(re.escape(path) for path in adapter.projections)})",
        base_model_name_or_path=encoder.name,
        revision=None if encoder.revision.startswith("sha256:") else encoder.revision,
        inference_mode=True,
    )
    return json.dumps(config.to_dict(), indent=1, sort_keys=True, default=list)


def encoder_name(adapter: Adapter) -> EncoderName:
    """Public name and revision of the encoder, as written to the adapter's files."""
    return EncoderName(name=adapter.encoder.ref.public_name, revision=adapter.encoder.ref.revision)
