"""Loading of an encoder's tokenizer and weights, with checks of its files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config import EncoderConfig
from pipeline.encoder import attention
from pipeline.encoder.files import EncoderFiles
from pipeline.encoder.frozen_linear import pack_linears
from pipeline.errors import EncoderError, first_line
from pipeline.records import Runtime

# These number positions from the padding index plus one, so the first positions of the table are never used.
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model")


def load_tokenizer(folder: Path, config: EncoderConfig) -> Any:
    """Load the encoder's fast tokenizer.

    Raises: EncoderError: it is missing, damaged, or a slow one.
    """
    from transformers import AutoTokenizer

    # Without a vocabulary transformers would make an empty tokenizer.
    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        raise EncoderError(f"encoder {config.name}: no tokenizer found; expected tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise EncoderError(f"encoder {config.name}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise EncoderError(
            f"encoder {config.name}: needs a fast tokenizer (tokenizer.json), found {type(tokenizer).__name__}"
        )
    return tokenizer


def empty_model(files: EncoderFiles, config: EncoderConfig) -> nn.Module:
    """Build the encoder's modules without weights (meta device), to check names and shapes before a worker starts.

    Raises: EncoderError: unknown architecture, remote code not allowed, weights missing or damaged.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModel

    weights = sorted(files.folder.glob("*.safetensors"))
    if not weights:
        raise EncoderError(f"encoder {config.name}: no *.safetensors file found; pickled weights are not loaded")
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise EncoderError(f"encoder {config.name}: {path.name} is damaged: {first_line(error)}") from None
    architecture = _architecture(files.folder, config)
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModel.from_config(architecture, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise EncoderError(
            f"encoder {config.name}: config.json does not describe a model: {first_line(error)}"
        ) from error
    _check_shapes(model, weights, config)
    return model


def _check_shapes(model: nn.Module, weights: Sequence[Path], config: EncoderConfig) -> None:
    from safetensors import safe_open

    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    # In files of a model with a head, the names of the encoder's tensors have this prefix.
    prefix = getattr(model, "base_model_prefix", "") + "."
    for path in weights:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                wanted, shape = expected.get(name.removeprefix(prefix)), file.get_slice(name).get_shape()
                if wanted is not None and wanted != shape:
                    raise EncoderError(
                        f"encoder {config.name}: {path.name} holds {name} as {shape}, but config.json says {wanted}"
                    )


def load_weights(folder: Path, config: EncoderConfig, runtime: Runtime) -> Any:
    """Load the encoder's model, and check that no weight is missing.

    Raises: EncoderError: unreadable or incomplete files, or an architecture that needs remote code.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    architecture = _architecture(folder, config)
    model_class, options = _model_class(architecture), dict[str, Any]()
    attention.register()
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False  # if the file has no pooler, its weights would be random
    try:
        model, loading = AutoModel.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=getattr(torch, runtime.dtype),
            attn_implementation=runtime.attention if _supports(model_class, runtime.attention) else "eager",
            trust_remote_code=config.trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            **options,
        )
    except Exception as error:
        raise EncoderError(f"encoder {config.name}: cannot be loaded: {first_line(error)}") from error
    missing = sorted(name for name in loading["missing_keys"] if "pooler" not in name)
    if missing:  # transformers fills them with random numbers
        raise EncoderError(f"encoder {config.name}: missing weights: {', '.join(missing[:3])} ({len(missing)} in all)")
    model.requires_grad_(False)
    pack_linears(model, runtime)
    # The frozen base runs without its own dropout, even in training:
    # tests/benchmarks/EXPERIMENTS.md, "Training speed: what was tried".
    model.eval()
    return model.to(runtime.device)


def _architecture(folder: Path, config: EncoderConfig) -> Any:
    from transformers import AutoConfig

    try:
        architecture = AutoConfig.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            remedy = "set encoder.revision and encoder.trust_remote_code = true if you trust it"
            raise EncoderError(f"encoder {config.name}: requires its own Python code; {remedy}") from error
        raise EncoderError(f"encoder {config.name}: config.json cannot be used: {first_line(error)}") from error
    limit = getattr(architecture, "max_position_embeddings", None)
    if limit is not None and architecture.model_type in _POSITIONS_AFTER_PADDING:
        limit -= architecture.pad_token_id + 1
    if limit is not None and config.max_tokens > limit:
        raise EncoderError(
            f"encoder {config.name}: max_tokens = {config.max_tokens}, but it reads at most {limit}; "
            "set encoder.max_tokens"
        )
    return architecture


def _model_class(architecture: Any) -> Any:
    from transformers import MODEL_MAPPING

    return MODEL_MAPPING.get(type(architecture), nn.Module)


def _supports(model_class: Any, implementation: str) -> bool:
    flags = {"sdpa": "_supports_sdpa", attention.NAME: "_supports_attention_backend"}
    return implementation == "eager" or bool(getattr(model_class, flags[implementation], False))


def normalizes_vectors(folder: Path) -> bool:
    """Whether the encoder's own definition (sentence-transformers) ends in unit vectors."""
    path = folder / "modules.json"
    if not path.is_file():
        return False
    try:
        return any(module["type"].endswith("Normalize") for module in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        raise EncoderError(f"{path}: damaged; expected a JSON list of modules with their types") from None
