"""LoRA and head on a frozen encoder: attach, save, load, merge; the file formats; the door to peft."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipeline.config import AdapterConfig
from pipeline.encoder import Batch, Encoder, FloatArray
from pipeline.errors import AdapterError, first_line
from pipeline.lora import LoraLinear, share_inputs
from pipeline.records import AdapterRef, EncoderRef
from pipeline.run_folder import TaskFolder, adapter_sha256, write_atomically
from pipeline.tokeniser import Tokens

# Query, key, value and output projection by architecture. Full paths: `dense` and `Wo` also name MLP layers.
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
"""model_type -> pattern of the whole module path, whose first group is the layer's number."""


@dataclass(frozen=True)
class HeadStart:
    """Initial weights of the head, from a linear probe on the frozen encoder's vectors."""

    weight: FloatArray
    """(classes, width), for vectors that are not normalised."""
    bias: FloatArray
    """(classes,)."""


class Adapter:
    """LoRA weights, head and label names, attached to an encoder for one MTEB task."""

    def __init__(self, encoder: Encoder, config: AdapterConfig, label_names: Sequence[str], *, seed: int = 0) -> None:
        """Attach fresh LoRA pairs (no effect yet) and a head to the encoder, in place.

        Raises: AdapterError: the target matches nothing, or more layers are asked for than there are.
        """
        self.encoder = encoder
        self.config = config
        self.label_names = tuple(label_names)
        generator = torch.Generator().manual_seed(seed)
        self.projections: dict[str, LoraLinear] = {}
        for path in projection_paths(encoder.model, config, model_type=encoder.model.config.model_type):
            parent, leaf = _parent_of(encoder.model, path)
            lora = LoraLinear(getattr(parent, leaf), rank=config.rank, scaling=config.alpha / config.rank, generator=generator)
            setattr(parent, leaf, lora)
            self.projections[path] = lora
        if not encoder.runtime.compiled:  # the compiler sees the shared input by itself
            share_inputs(self.projections)
        linear = nn.Linear(encoder.hidden_size, len(label_names))
        nn.init.normal_(linear.weight, std=1 / math.sqrt(encoder.hidden_size), generator=generator)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.Dropout(config.dropout), linear).to(encoder.device)

    @property
    def lora_parameters(self) -> list[nn.Parameter]:
        """A and B of every pair, in ``named_modules()`` order."""
        return [p for lora in self.projections.values() for p in (lora.lora_A, lora.lora_B)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [*self.lora_parameters, *self.head.parameters()]

    def start_head(self, start: HeadStart) -> None:
        """Replace the head's random initialisation."""
        linear = self.head[1]
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(start.weight))
            linear.bias.copy_(torch.from_numpy(start.bias))

    def start_from(self, folder: TaskFolder) -> None:
        """Take over a saved adapter's pairs, and its head's rows for the labels that both have; rows of other labels stay as they are.

        Raises: AdapterError: files missing or damaged, or of another shape.
        """
        names = _read_json(folder.labels)
        try:
            state, head = load_file(folder.adapter_weights), load_file(folder.head)
            _copy_exactly(state, dict(_peft_names(self.projections)))
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterError(f"{folder.root}: cannot be started from: {first_line(error)}") from None
        linear = self.head[1]
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            for row, name in enumerate(self.label_names):
                if name in names:
                    linear.weight[row] = head["weight"][names.index(name)]
                    linear.bias[row] = head["bias"][names.index(name)]

    def logits(self, batch: Batch) -> Tensor:
        """float32 (texts, classes); differentiable, with dropout where the head is in training mode."""
        logits: Tensor = self.head(self.encoder.pooled(batch))
        return logits

    def logits_of_vectors(self, vectors: FloatArray) -> FloatArray:
        """float32 (texts, classes) of text vectors that the adapted encoder has already made; no dropout."""
        self.head.eval()
        with torch.inference_mode():
            logits: FloatArray = self.head(torch.from_numpy(vectors).to(self.encoder.device)).cpu().numpy()
        return logits

    def detach(self) -> None:
        """Give the encoder its own projections back."""
        for path, lora in self.projections.items():
            parent, leaf = _parent_of(self.encoder.model, path)
            setattr(parent, leaf, lora.base)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """While open, the encoder runs with plain projections ``W + scaling * B A``; bit for bit restored after."""
        kept = {path: lora.base.weight.detach().clone() for path, lora in self.projections.items()}
        self.detach()
        try:
            with torch.no_grad():
                for lora in self.projections.values():
                    lora.base.weight.copy_(lora.base.weight.float() + lora.update)
            yield
        finally:
            with torch.no_grad():
                for path, lora in self.projections.items():
                    lora.base.weight.copy_(kept[path])
                    parent, leaf = _parent_of(self.encoder.model, path)
                    setattr(parent, leaf, lora)

    def merge_difference(self, tokens: Tokens) -> float:
        """Largest absolute difference between the text vectors of the unmerged and the merged adapter."""
        unmerged = self.encoder.embed(tokens)
        with self.merged():
            merged = self.encoder.embed(tokens)
        return float(np.abs(unmerged - merged).max())


def projection_paths(model: nn.Module, config: AdapterConfig, *, model_type: str) -> list[str]:
    """The linear layers that get a LoRA pair, in ``named_modules()`` order.

    Raises: AdapterError: nothing matches, an explicit path does not exist, or ``last:k`` exceeds the layers.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if config.target == "attention":
        if model_type not in ATTENTION_PROJECTIONS:
            raise AdapterError(
                f'adapter.target = "attention" is not known for model type {model_type!r} (known: {", ".join(ATTENTION_PROJECTIONS)}); '
                f"set adapter.target to module paths; the linear layers are {_some(linears)}"
            )
        pattern = re.compile(ATTENTION_PROJECTIONS[model_type])
        paths = [name for name in linears if pattern.fullmatch(name)]
    else:
        missing = sorted(set(config.target) - set(linears))
        if missing:
            raise AdapterError(f"adapter.target names {_some(missing)}, which is no linear layer; those are {_some(linears)}")
        paths = [name for name in linears if name in config.target]
    if not paths:
        raise AdapterError(f"adapter.target = {config.target!r} matches none of the linear layers {_some(linears)}")
    return _last_layers(paths, config.layers)


def save_adapter(adapter: Adapter, folder: TaskFolder, *, meta: dict[str, Any]) -> AdapterRef:
    """Write both forms: the three `.pt`/`.json` files and what PEFT loads, head and labels beside it.

    Args:
        adapter: What to save.
        folder: Where to; made if missing.
        meta: Facts of the training for ``meta.json``, added to those that are needed to rebuild the adapter.
    """
    folder.root.mkdir(parents=True, exist_ok=True)
    pairs = list(adapter.projections.items())
    peft_state = {name: parameter.detach().cpu().clone() for name, parameter in _peft_names(adapter.projections)}
    write_atomically(folder.adapter_weights, save(peft_state, metadata={"format": "pt"}))
    write_atomically(folder.adapter_config, _peft_config(adapter))
    head = _head_state(adapter)
    write_atomically(folder.head, save({"weight": head["1.weight"], "bias": head["1.bias"]}))
    write_atomically(folder.labels, json.dumps(adapter.label_names, ensure_ascii=False, indent=1))
    _save_tensors(_lora_state(pairs), folder.lora_adapter_pt)
    _save_tensors(head, folder.classifier_head_pt)
    write_atomically(folder.meta, json.dumps(_meta(adapter) | meta, ensure_ascii=False, indent=1))
    return AdapterRef(path=folder.root.name, sha256=adapter_sha256(folder.root), encoder_revision=adapter.encoder.ref.revision)


def load_adapter(folder: TaskFolder, encoder: Encoder) -> Adapter:
    """Attach a saved adapter to an encoder.

    Raises: AdapterError: files missing or damaged, another encoder revision, shapes that do not fit.
    """
    meta, labels = _read_json(folder.meta), _read_json(folder.labels)
    try:
        trained_on = {"revision": meta["encoder"]["revision"], "pooling": meta["pooling"]}
        config = AdapterConfig(rank=meta["rank"], alpha=meta["alpha"], dropout=meta["dropout"], target=tuple(meta["adapted_modules"]))
        state, head = load_file(folder.adapter_weights), load_file(folder.head)
    except (SafetensorError, OSError, KeyError, TypeError, ValidationError) as error:
        raise AdapterError(f"{folder.root}: the adapter's files are missing or damaged: {first_line(error)}") from None
    here = {"revision": encoder.ref.revision, "pooling": encoder.config.pooling}
    for what, value in trained_on.items():
        if value != here[what]:
            raise AdapterError(f"{folder.root}: trained on an encoder of {what} {value}, but this one's is {here[what]}")
    adapter = Adapter(encoder, config, labels)
    try:
        _copy_exactly(state, dict(_peft_names(adapter.projections)))
        _copy_exactly(head, dict(adapter.head[1].named_parameters()))
    except ValueError as error:
        adapter.detach()
        raise AdapterError(f"{folder.root}: the adapter's files do not fit together: {error}") from None
    adapter.head.eval()
    return adapter


def check_both_forms(adapter: Adapter, folder: TaskFolder) -> None:
    """Compare the ``.pt`` files with a loaded adapter: the same numbers, under the names of the source document.

    Raises: AdapterError: they differ, or one of them cannot be read.
    """
    expected = {folder.lora_adapter_pt: _lora_state(list(adapter.projections.items())), folder.classifier_head_pt: _head_state(adapter)}
    for path, state in expected.items():
        try:
            found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - torch raises whatever the damage leads it to
            raise AdapterError(f"{path}: missing or damaged: {first_line(error)}") from None
        if found.keys() != state.keys() or not all(torch.equal(found[name], state[name]) for name in state):
            raise AdapterError(f"{path}: not the weights of {folder.adapter_weights.name} and {folder.head.name} beside it")


def _peft_names(projections: Mapping[str, LoraLinear]) -> Iterator[tuple[str, nn.Parameter]]:
    for path, lora in projections.items():
        yield f"base_model.model.{path}.lora_A.weight", lora.lora_A
        yield f"base_model.model.{path}.lora_B.weight", lora.lora_B


def _copy_exactly(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name in sorted(tensors.keys() | parameters.keys()):
        expected, found = (tuple(of[name].shape) if name in of else "none" for of in (parameters, tensors))
        if expected != found:  # copy_ would broadcast
            raise ValueError(f"{name}: expected shape {expected}, found {found}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _peft_config(adapter: Adapter) -> str:
    from peft import LoraConfig, TaskType

    ref = adapter.encoder.ref
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=adapter.config.rank,
        lora_alpha=adapter.config.alpha,
        lora_dropout=0.0,
        target_modules=f"(?:{'|'.join(re.escape(path) for path in adapter.projections)})",
        base_model_name_or_path=ref.public_name,
        revision=_commit(ref),
        inference_mode=True,
    )
    return json.dumps(config.to_dict(), indent=1, sort_keys=True, default=list)


def _commit(ref: EncoderRef) -> str | None:
    return None if ref.revision.startswith("sha256:") else ref.revision


def _lora_state(pairs: list[tuple[str, LoraLinear]]) -> dict[str, Tensor]:
    state = {}
    for index, (_, lora) in enumerate(pairs):
        state[f"lora_{index}_A"] = lora.lora_A.detach().cpu().t().contiguous()
        state[f"lora_{index}_B"] = lora.lora_B.detach().cpu().t().contiguous()
        state[f"lora_{index}_scaling"] = torch.tensor(lora.scaling)
    return state


def _head_state(adapter: Adapter) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.head.state_dict().items()}


def _meta(adapter: Adapter) -> dict[str, Any]:
    encoder = adapter.encoder
    return {
        "num_classes": len(adapter.label_names),
        "label_names": list(adapter.label_names),
        "rank": adapter.config.rank,
        "alpha": adapter.config.alpha,
        "dropout": adapter.config.dropout,
        "pooling": encoder.config.pooling,
        "max_tokens": encoder.config.max_tokens,
        "hidden_size": encoder.hidden_size,
        "encoder": {"name": encoder.ref.public_name, "revision": encoder.ref.revision},
        "adapted_modules": list(adapter.projections),
    }


def _save_tensors(state: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: missing or damaged: {error}") from None


def layer_number(path: str) -> int | None:
    """The number of the layer that a module path lies in; none outside the stack."""
    number = re.search(r"\.(\d+)\.", f".{path}")
    return None if number is None else int(number[1])


def _last_layers(paths: list[str], layers: str) -> list[str]:
    if layers == "all":
        return paths
    last = int(layers.removeprefix("last:"))
    found = [layer_number(path) for path in paths]
    outside = [path for path, number in zip(paths, found, strict=True) if number is None]
    if outside:
        raise AdapterError(f"adapter.layers = {layers!r}, but {_some(outside)} is in no numbered layer; leave it out of adapter.target")
    numbers = [number for number in found if number is not None]
    there = sorted(set(numbers))
    if last > len(there):
        raise AdapterError(f"adapter.layers = {layers!r}, but the encoder has {len(there)} layers")
    return [path for path, number in zip(paths, numbers, strict=True) if number in there[-last:]]


def _parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, leaf = path.rpartition(".")
    return model.get_submodule(parent), leaf


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
