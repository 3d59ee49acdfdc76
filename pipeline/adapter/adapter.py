"""LoRA and head on a frozen encoder: attach, save, load, merge; the file formats; the door to peft."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.adapter.lora import LoraLinear, share_inputs
from pipeline.config import AdapterConfig
from pipeline.encoder.encoder import Batch, Encoder, FloatArray
from pipeline.encoder.tokeniser import Tokens
from pipeline.errors import AdapterError, VerificationError, first_line
from pipeline.inference.reference import FoundAdapter, describe_adapter
from pipeline.records import AdapterRef, EncoderName, JsonObject
from pipeline.store.run_folder import TaskFolder, adapter_sha256, read_file, read_record, write_atomically

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

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LARGEST_UPDATE = 1e30  # far above every trained one, and its sum with a weight is finite in every dtype that an encoder may have
_BYTES_AROUND_TENSORS, _BYTES_AROUND_TENSOR = 64 * 1024, 1024  # of a file: its header, and the entry of each tensor


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
        found = describe_adapter(folder)
        if found.config.rank != self.config.rank:
            raise AdapterError(f"{folder.root}: cannot be started from: expected rank {self.config.rank}, found {found.config.rank}")
        pairs, head = _read_weights(found, self.encoder, {path: lora.base for path, lora in self.projections.items()})
        linear = self.head[1]
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            for name, parameter in _peft_names(self.projections):
                parameter.copy_(pairs[name])
            for row, name in enumerate(self.label_names):
                if name in found.label_names:
                    linear.weight[row] = head["weight"][found.label_names.index(name)]
                    linear.bias[row] = head["bias"][found.label_names.index(name)]

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
    pairs = _copies(dict(_peft_names(adapter.projections)))
    write_atomically(folder.adapter_weights, save(pairs, metadata={"format": "pt"}))
    write_atomically(folder.adapter_config, _peft_config(adapter, encoder=_encoder_name(adapter)))
    write_atomically(folder.head, save(_copies(dict(adapter.head[1].named_parameters()))))
    write_atomically(folder.labels, json.dumps(adapter.label_names, ensure_ascii=False, indent=1))
    _save_tensors(_lora_state(adapter), folder.lora_adapter_pt)
    _save_tensors(_head_state(adapter), folder.classifier_head_pt)
    write_atomically(folder.meta, json.dumps(_meta(adapter) | meta, ensure_ascii=False, indent=1))
    return AdapterRef(path=folder.root.name, sha256=adapter_sha256(folder.root), encoder_revision=adapter.encoder.ref.revision)


def load_adapter(folder: TaskFolder, encoder: Encoder, *, found: FoundAdapter | None = None) -> Adapter:
    """Attach a saved adapter to an encoder.

    Args:
        folder: Its files.
        encoder: What it was trained on.
        found: How the files were described before; what is loaded is then exactly that.
    Raises: AdapterError: files missing or damaged, another encoder, shapes that do not fit, a weight that is not finite.
    """
    found = found or describe_adapter(folder)
    expected = {
        "revision": (found.encoder.revision, encoder.ref.revision),
        "pooling": (found.encoder.pooling, encoder.config.pooling),
        "max_tokens": (found.encoder.max_tokens, encoder.config.max_tokens),
        "width": (found.meta.hidden_size, encoder.hidden_size),
    }
    for what, (trained_on, here) in expected.items():
        if trained_on != here:
            raise AdapterError(f"{folder.root}: trained on an encoder of {what} {trained_on}, but this one's is {here}")
    paths = projection_paths(encoder.model, found.config, model_type=encoder.model.config.model_type)
    if tuple(paths) != found.meta.adapted_modules:
        raise AdapterError(f"{folder.meta}: adapted_modules are not in the encoder's order, in which the pairs are numbered")
    pairs, head = _read_weights(found, encoder, {path: encoder.model.get_submodule(path) for path in paths})
    adapter = Adapter(encoder, found.config, found.label_names)
    weights = pairs | head
    with torch.no_grad():
        for name, parameter in (*_peft_names(adapter.projections), *adapter.head[1].named_parameters()):
            parameter.copy_(weights[name])
    adapter.head.eval()
    return adapter


def check_both_forms(adapter: Adapter, folder: TaskFolder) -> None:
    """Compare the ``.pt`` files with a loaded adapter: the same numbers, under the names of the source document.

    Raises: VerificationError: they differ, or one of them cannot be read.
    """
    expected = {folder.lora_adapter_pt: _lora_state(adapter), folder.classifier_head_pt: _head_state(adapter)}
    # Files of older versions held the whole vector of trained weights behind each tensor.
    num_bytes = sum(parameter.nbytes for parameter in adapter.parameters)
    for path, state in expected.items():
        found = _read_pt(path, at_most=num_bytes + _BYTES_AROUND_TENSORS + _BYTES_AROUND_TENSOR * len(state))
        if found.keys() != state.keys() or not all(_is_same(found[name], tensor) for name, tensor in state.items()):
            raise VerificationError(f"{path}: not the weights of {folder.adapter_weights.name} and {folder.head.name} beside it")


def _is_same(found: Any, tensor: Tensor) -> bool:
    return isinstance(found, Tensor) and found.dtype == tensor.dtype and torch.equal(found, tensor)


def check_peft(adapter: Adapter, found: FoundAdapter, tokens: Tokens, *, logits: FloatArray, tolerance: float) -> None:
    """Load the adapter's files with PEFT, and compare what comes of them with the adapter itself.

    Args:
        adapter: Loaded and detached again. PEFT attaches itself to its encoder, in float32, and leaves it as it was.
        found: Its files.
        tokens: Of some texts.
        logits: What the adapter says of them.
        tolerance: Largest difference of a logit.
    Raises: VerificationError: PEFT would load something else, or nothing.
    """
    from peft import LoraConfig, PeftModel

    # It could make PEFT import modules or match patterns without end, so it is compared before PEFT reads it.
    path = found.folder.adapter_config
    config = LoraConfig().to_dict() | read_record(path, JsonObject, fault=AdapterError).root
    for key, value in json.loads(_peft_config(adapter, encoder=found.meta.encoder)).items():
        if config[key] != value and key != "peft_version":
            raise VerificationError(f"{path}: {key} is {config[key]!r:.100}, but the adapter's is {value!r:.100}")
    encoder = adapter.encoder
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = PeftModel.from_pretrained(encoder.model, found.folder.root, torch_device=str(encoder.device))
    except Exception as error:  # noqa: BLE001 - PEFT raises whatever the damage leads it to
        raise VerificationError(f"{found.folder.root}: PEFT cannot load the adapter: {first_line(error)}") from None
    difference = float(np.abs(adapter.logits_of_vectors(encoder.embed(tokens)) - logits).max())
    loaded.unload()
    if not difference <= tolerance:
        raise VerificationError(f"{found.folder.root}: loaded by PEFT, logits differ by {difference:.3g} (allowed: {tolerance:g})")


def _read_weights(found: FoundAdapter, encoder: Encoder, linears: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pairs under PEFT's names and the head's weight and bias, float32 and finite, as they were described.

    Raises: AdapterError: missing, damaged, changed since, of another shape, not finite, or so large that what they compute is not.
    """
    rank, digest = found.config.rank, hashlib.sha256()
    shapes: dict[str, tuple[int, ...]] = {}
    for path, linear in linears.items():
        assert isinstance(linear, nn.Linear)
        shapes |= {_peft_name(path, "A"): (rank, linear.in_features), _peft_name(path, "B"): (linear.out_features, rank)}
    classes = len(found.label_names)
    pairs = _read_tensors(found.folder.adapter_weights, shapes, digest)
    head = _read_tensors(found.folder.head, {"weight": (classes, encoder.hidden_size), "bias": (classes,)}, digest)
    if digest.hexdigest() != found.sha256:
        raise AdapterError(f"{found.folder.root}: the adapter was replaced while it was being loaded; try again")
    for path in linears:
        down, up = (max(1.0, float(pairs[_peft_name(path, factor)].abs().max())) for factor in ("A", "B"))
        if found.config.alpha * down * up > _LARGEST_UPDATE:
            raise AdapterError(f"{found.folder.root}: alpha and the pair of {path} are too large to be computed with")
    return pairs, head


def _read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], digest: hashlib._Hash) -> dict[str, Tensor]:
    """Exactly these tensors of a safetensors file, float32; its bytes are added to the digest.

    Raises: AdapterError: the file is missing or damaged, or holds others; a tensor is not of floats, or not finite.
    """
    num_bytes = sum(math.prod(shape) for shape in shapes.values()) * torch.float64.itemsize
    try:
        content = read_file(path, at_most=num_bytes + _BYTES_AROUND_TENSORS + _BYTES_AROUND_TENSOR * len(shapes))
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from None
    digest.update(content)
    try:
        tensors = load(content)
    except Exception as error:  # noqa: BLE001 - safetensors raises whatever the damage leads it to
        raise AdapterError(f"{path}: damaged: {first_line(error)}") from None
    for name in sorted(tensors.keys() | shapes.keys()):
        expected, found = shapes.get(name, "none"), tuple(tensors[name].shape) if name in tensors else "none"
        if expected != found:
            raise AdapterError(f"{path}: {name:.200}: expected shape {expected}, found {found}")
        if tensors[name].dtype not in _FLOATS:
            raise AdapterError(f"{path}: {name}: expected floats, found {tensors[name].dtype}")
        tensors[name] = tensors[name].to(torch.float32)
        if not tensors[name].isfinite().all():
            raise AdapterError(f"{path}: {name}: holds a number that is not finite in float32")
    return tensors


def _read_pt(path: Path, *, at_most: int) -> dict[str, Any]:
    """What a file of torch's holds, which is of tensors alone.

    Raises: VerificationError: missing, damaged, not of tensors alone, or larger than ``at_most`` bytes, packed or unpacked.
    """
    try:
        content = read_file(path, at_most=at_most)
        with ZipFile(BytesIO(content)) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != ZIP_STORED for entry in entries) or sum(entry.file_size for entry in entries) > at_most:
            raise BadZipFile("its parts are compressed or lie over each other, as torch.save never writes them")
        found = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except OSError as error:
        raise VerificationError(f"{path}: missing or damaged: {error.strerror}") from None
    except Exception as error:  # noqa: BLE001 - torch and zipfile raise whatever the damage leads them to
        raise VerificationError(f"{path}: missing or damaged: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise VerificationError(f"{path}: expected tensors by name, found {type(found).__name__}")
    return found


def _peft_names(projections: Mapping[str, LoraLinear]) -> Iterator[tuple[str, nn.Parameter]]:
    for path, lora in projections.items():
        yield _peft_name(path, "A"), lora.lora_A
        yield _peft_name(path, "B"), lora.lora_B


def _peft_name(path: str, factor: Literal["A", "B"]) -> str:
    return f"base_model.model.{path}.lora_{factor}.weight"


def _peft_config(adapter: Adapter, *, encoder: EncoderName) -> str:
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


def _encoder_name(adapter: Adapter) -> EncoderName:
    return EncoderName(name=adapter.encoder.ref.public_name, revision=adapter.encoder.ref.revision)


def _lora_state(adapter: Adapter) -> dict[str, Tensor]:
    state = {}
    for index, lora in enumerate(adapter.projections.values()):
        state[f"lora_{index}_A"] = lora.lora_A.t()
        state[f"lora_{index}_B"] = lora.lora_B.t()
        state[f"lora_{index}_scaling"] = torch.tensor(lora.scaling)
    return _copies(state)


def _head_state(adapter: Adapter) -> dict[str, Tensor]:
    return _copies(adapter.head.state_dict())


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of their own: torch saves all that a tensor is a view of, which may be every trained weight."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


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
        "encoder": _encoder_name(adapter).model_dump(),
        "adapted_modules": list(adapter.projections),
    }


def _save_tensors(state: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


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
