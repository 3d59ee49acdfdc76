"""The linear layers of an encoder that get LoRA pairs, chosen by architecture and ``adapter.target``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from pipeline.config import AdapterConfig
from pipeline.errors import AdapterError

# Query, key, value and output projection by architecture. Full paths, because `dense` and `Wo` also name MLP layers.
_LAYERS = r"(?:.*\.)?layers\.(\d+)\."
_ENCODER_LAYER = r"(?:.*\.)?encoder\.layer\.(\d+)\."
_LLAMA_LIKE = _LAYERS + r"self_attn\.[qkvo]_proj"
_BERT_LIKE = _ENCODER_LAYER + r"attention\.(?:self\.(?:query|key|value)|output\.dense)"

ATTENTION_PROJECTIONS = {
    "eurobert": _LLAMA_LIKE,
    "nomic_bert": _LLAMA_LIKE,
    "jina_embeddings_v3": _LLAMA_LIKE,
    "bert": _BERT_LIKE,
    "roberta": _BERT_LIKE,
    "xlm-roberta": _BERT_LIKE,
    "electra": _BERT_LIKE,
    "mpnet": _ENCODER_LAYER + r"attention\.attn\.[qkvo]",
    "distilbert": r"(?:.*\.)?transformer\.layer\.(\d+)\.attention\.(?:[qkv]|out)_lin",
    "modernbert": _LAYERS + r"attn\.(?:Wqkv|Wo)",
    "deberta-v2": _ENCODER_LAYER + r"attention\.(?:self\.(?:query|key|value)_proj|output\.dense)",
}
"""Pattern of the whole module path by model type. Its first group is the layer's number."""


QUERY_AND_VALUE = {
    family: pattern
    for families, pattern in (
        (("eurobert", "nomic_bert", "jina_embeddings_v3"), _LAYERS + r"self_attn\.[qv]_proj"),
        (("bert", "roberta", "xlm-roberta", "electra"), _ENCODER_LAYER + r"attention\.self\.(?:query|value)"),
        (("mpnet",), _ENCODER_LAYER + r"attention\.attn\.[qv]"),
        (("distilbert",), r"(?:.*\.)?transformer\.layer\.(\d+)\.attention\.[qv]_lin"),
        (("deberta-v2",), _ENCODER_LAYER + r"attention\.self\.(?:query|value)_proj"),
    )
    for family in families
}
"""Query and value projections alone, as ``ATTENTION_PROJECTIONS``. ModernBERT has them in one layer with the key."""

_PATTERNS = {"attention": ATTENTION_PROJECTIONS, "query-value": QUERY_AND_VALUE}


def projection_paths(model: nn.Module, config: AdapterConfig, *, model_type: str) -> list[str]:
    """Paths of the linear layers that get a LoRA pair, in ``named_modules()`` order.

    Raises: AdapterError: nothing matches, an explicit path does not exist, or ``last:k`` exceeds the number of layers.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if config.target == "all-linear":
        paths = [name for name in linears if layer_number(name) is not None]
    elif isinstance(config.target, str):
        patterns = _PATTERNS[config.target]
        if model_type not in patterns:
            raise AdapterError(
                f'adapter.target = "{config.target}" is not supported for model type {model_type!r} '
                f"(supported: {', '.join(patterns)}); "
                f"set adapter.target to module paths; the linear layers are {_some(linears)}"
            )
        pattern = re.compile(patterns[model_type])
        paths = [name for name in linears if pattern.fullmatch(name)]
    else:
        missing = sorted(set(config.target) - set(linears))
        if missing:
            raise AdapterError(
                f"adapter.target: {_some(missing)} is not a linear layer; linear layers are {_some(linears)}"
            )
        paths = [name for name in linears if name in config.target]
    if not paths:
        raise AdapterError(f"adapter.target = {config.target!r} matches none of the linear layers {_some(linears)}")
    return _last_layers(paths, config.layers)


def layer_number(path: str) -> int | None:
    """Number of the layer that a module belongs to. None outside the stack of layers."""
    number = re.search(r"\.(\d+)\.", f".{path}")
    return None if number is None else int(number[1])


def _last_layers(paths: list[str], layers: str) -> list[str]:
    if layers == "all":
        return paths
    last = int(layers.removeprefix("last:"))
    numbers_or_none = [layer_number(path) for path in paths]
    outside = [path for path, number in zip(paths, numbers_or_none, strict=True) if number is None]
    if outside:
        raise AdapterError(
            f"adapter.layers = {layers!r}, but {_some(outside)} is in no numbered layer; remove it from adapter.target"
        )
    numbers = [number for number in numbers_or_none if number is not None]
    existing = sorted(set(numbers))
    if last > len(existing):
        raise AdapterError(f"adapter.layers = {layers!r}, but the encoder has {len(existing)} layers")
    return [path for path, number in zip(paths, numbers, strict=True) if number in existing[-last:]]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
