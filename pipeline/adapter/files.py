"""The files of an adapter: written atomically, and every number checked before use."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.description import FoundAdapter, describe_adapter
from pipeline.adapter.peft_form import encoder_name, peft_config, peft_name, peft_names
from pipeline.adapter.targets import projection_paths
from pipeline.encoder.encoder import Encoder
from pipeline.errors import AdapterError, VerificationError, first_line
from pipeline.records import AdapterRef
from pipeline.store.files import read_file, write_atomically
from pipeline.store.run_folder import TaskFolder, adapter_sha256

_BYTES_AROUND_TENSORS, _BYTES_AROUND_TENSOR = 64 * 1024, 1024  # allowed for a header, and for the entry of a tensor
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Far above every trained update. Its sum with a weight is still finite in every dtype of an encoder.
_LARGEST_UPDATE = 1e30


def save_adapter(adapter: Adapter, folder: TaskFolder, *, meta: dict[str, Any]) -> AdapterRef:
    """Write both forms of an adapter: the `.pt` files with ``meta.json``, and the files that PEFT loads.

    The head and the label names are files of their own, which an adapter without a head does not have.

    Args:
        adapter: Adapter to save.
        folder: Folder to write to. Created if missing.
        meta: Facts about the training for ``meta.json``, in addition to those needed to rebuild the adapter.
    """
    folder.root.mkdir(parents=True, exist_ok=True)
    pairs = _copies(dict(peft_names(adapter.projections)))
    write_atomically(folder.adapter_weights, save(pairs, metadata={"format": "pt"}))
    write_atomically(folder.adapter_config, peft_config(adapter, encoder=encoder_name(adapter)))
    _save_tensors(_lora_state(adapter), folder.lora_adapter_pt)
    if adapter.head is not None:
        write_atomically(folder.head, save(_copies(dict(adapter.head.linear.named_parameters()))))
        write_atomically(folder.labels, json.dumps(adapter.label_names, ensure_ascii=False, indent=1))
        _save_tensors(_copies(adapter.head.state_dict()), folder.classifier_head_pt)
    write_atomically(folder.meta, json.dumps(_meta(adapter) | meta, ensure_ascii=False, indent=1))
    return AdapterRef(
        path=folder.root.name, sha256=adapter_sha256(folder.root), encoder_revision=adapter.encoder.ref.revision
    )


def load_adapter(folder: TaskFolder, encoder: Encoder, *, found: FoundAdapter | None = None) -> Adapter:
    """Attach a saved adapter to an encoder.

    Args:
        folder: Folder with the adapter's files.
        encoder: The encoder that it was trained on.
        found: Description read earlier. The files must still match it.
    Raises: AdapterError: files missing or damaged, another encoder, wrong shapes, or a weight that is not finite.
    """
    found = found or describe_adapter(folder)
    expected = {
        "revision": (found.encoder.revision, encoder.ref.revision),
        "pooling": (found.encoder.pooling, encoder.config.pooling),
        "max_tokens": (found.encoder.max_tokens, encoder.config.max_tokens),
        "width": (found.meta.hidden_size, encoder.hidden_size),
    }
    for what, (trained_on, given) in expected.items():
        if trained_on != given:
            raise AdapterError(f"{folder.root}: trained with {what} {trained_on}, but the encoder has {given}")
    paths = projection_paths(encoder.model, found.config, model_type=encoder.model.config.model_type)
    if tuple(paths) != found.meta.adapted_modules:
        raise AdapterError(
            f"{folder.meta}: adapted_modules must be in the encoder's order, because the pairs are numbered by it"
        )
    pairs, head = _read_weights(found, encoder, {path: encoder.model.get_submodule(path) for path in paths})
    adapter = Adapter(encoder, found.config, found.label_names or None)
    weights = pairs | head
    with torch.no_grad():
        for name, parameter in peft_names(adapter.projections):
            parameter.copy_(weights[name])
        if adapter.head is not None:
            for name, parameter in adapter.head.linear.named_parameters():
                parameter.copy_(weights[name])
    adapter.eval()
    return adapter


def start_from(adapter: Adapter, folder: TaskFolder) -> None:
    """Copy a saved adapter's pairs, and its head's rows for labels that both adapters have.

    Rows of other labels are unchanged.

    Raises: AdapterError: files missing or damaged, or shapes that differ.
    """
    found = describe_adapter(folder)
    if found.config.rank != adapter.config.rank:
        raise AdapterError(
            f"{folder.root}: cannot start from this adapter: "
            f"expected rank {adapter.config.rank}, found {found.config.rank}"
        )
    pairs, head = _read_weights(found, adapter.encoder, {path: lora.base for path, lora in adapter.projections.items()})
    with torch.no_grad():
        for name, parameter in peft_names(adapter.projections):
            parameter.copy_(pairs[name])
        for row, name in enumerate(adapter.label_names):
            if name in found.label_names:
                linear = adapter.classifier.linear
                linear.weight[row] = head["weight"][found.label_names.index(name)]
                linear.bias[row] = head["bias"][found.label_names.index(name)]


def check_both_forms(adapter: Adapter, folder: TaskFolder) -> None:
    """Check that the ``.pt`` files hold the same numbers as a loaded adapter.

    Raises: VerificationError: they differ, or a file cannot be read.
    """
    expected = {folder.lora_adapter_pt: _lora_state(adapter)}
    if adapter.head is not None:
        expected[folder.classifier_head_pt] = _copies(adapter.head.state_dict())
    # In files of older versions, each tensor is saved with the vector of all trained weights, of which it is a view.
    num_bytes = sum(parameter.nbytes for parameter in adapter.parameters)
    for path, state in expected.items():
        saved = _read_pt(path, at_most=num_bytes + _BYTES_AROUND_TENSORS + _BYTES_AROUND_TENSOR * len(state))
        if saved.keys() != state.keys() or not all(_is_same(saved[name], tensor) for name, tensor in state.items()):
            raise VerificationError(
                f"{path}: the weights differ from {folder.adapter_weights.name} and {folder.head.name}"
            )


def _is_same(saved: Any, tensor: Tensor) -> bool:
    return isinstance(saved, Tensor) and saved.dtype == tensor.dtype and torch.equal(saved, tensor)


def _read_weights(
    found: FoundAdapter, encoder: Encoder, linears: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read the pairs under PEFT's names, and the head's weight and bias, float32 and finite.

    Raises: AdapterError: missing, damaged, changed since described, wrong shape, not finite, or too large.
    """
    rank, digest = found.config.rank, hashlib.sha256()
    shapes: dict[str, tuple[int, ...]] = {}
    for path, linear in linears.items():
        assert isinstance(linear, nn.Linear)
        shapes |= {peft_name(path, "A"): (rank, linear.in_features), peft_name(path, "B"): (linear.out_features, rank)}
    classes = len(found.label_names)
    pairs = _read_tensors(found.folder.adapter_weights, shapes, digest)
    head_shapes = {"weight": (classes, encoder.hidden_size), "bias": (classes,)}
    head = _read_tensors(found.folder.head, head_shapes, digest) if found.has_head else {}
    if digest.hexdigest() != found.sha256:
        raise AdapterError(f"{found.folder.root}: the adapter was replaced while it was being loaded; try again")
    for path in linears:
        down, up = (max(1.0, float(pairs[peft_name(path, factor)].abs().max())) for factor in ("A", "B"))
        if found.config.alpha * down * up > _LARGEST_UPDATE:
            raise AdapterError(
                f"{found.folder.root}: alpha and the pair of {path} are too large: their product may overflow"
            )
    return pairs, head


def _read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], digest: hashlib._Hash) -> dict[str, Tensor]:
    """Read a safetensors file as float32, and add its bytes to the digest.

    Raises: AdapterError: the file is missing or damaged, has other tensors or shapes, or not finite floats.
    """
    num_bytes = sum(math.prod(shape) for shape in shapes.values()) * torch.float64.itemsize
    try:
        content = read_file(path, at_most=num_bytes + _BYTES_AROUND_TENSORS + _BYTES_AROUND_TENSOR * len(shapes))
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from None
    digest.update(content)
    try:
        tensors = load(content)
    except Exception as error:  # noqa: BLE001 - damage makes safetensors raise anything
        raise AdapterError(f"{path}: damaged: {first_line(error)}") from None
    for name in sorted(tensors.keys() | shapes.keys()):
        expected, found = shapes.get(name, "none"), tuple(tensors[name].shape) if name in tensors else "none"
        if expected != found:
            raise AdapterError(f"{path}: {name:.200}: expected shape {expected}, found {found}")
        if tensors[name].dtype not in _FLOATS:
            raise AdapterError(f"{path}: {name}: expected floats, found {tensors[name].dtype}")
        tensors[name] = tensors[name].to(torch.float32)
        if not tensors[name].isfinite().all():
            raise AdapterError(f"{path}: {name}: a number is not finite in float32")
    return tensors


def _read_pt(path: Path, *, at_most: int) -> dict[str, Any]:
    """Read a file that ``torch.save`` wrote, which may hold nothing but tensors.

    Raises: VerificationError: missing, damaged, other objects, or above ``at_most`` bytes, packed or unpacked.
    """
    try:
        content = read_file(path, at_most=at_most)
        with ZipFile(BytesIO(content)) as archive:
            entries = archive.infolist()
        if (
            any(entry.compress_type != ZIP_STORED for entry in entries)
            or sum(entry.file_size for entry in entries) > at_most
        ):
            raise BadZipFile("its parts are compressed or overlap, which torch.save never does")
        tensors = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except OSError as error:
        raise VerificationError(f"{path}: missing or damaged: {error.strerror}") from None
    except Exception as error:  # noqa: BLE001 - damage makes torch and zipfile raise anything
        raise VerificationError(f"{path}: missing or damaged: {first_line(error)}") from None
    if not isinstance(tensors, dict):
        raise VerificationError(f"{path}: expected tensors by name, found {type(tensors).__name__}")
    return tensors


def _lora_state(adapter: Adapter) -> dict[str, Tensor]:
    state = {}
    for index, lora in enumerate(adapter.projections.values()):
        state[f"lora_{index}_A"] = lora.lora_A.t()
        state[f"lora_{index}_B"] = lora.lora_B.t()
        state[f"lora_{index}_scaling"] = torch.tensor(lora.scaling)
    return _copies(state)


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies. Of a view, torch would save the whole storage, which may be every trained weight."""
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
        "encoder": encoder_name(adapter).model_dump(),
        "adapted_modules": list(adapter.projections),
    }


def _save_tensors(state: dict[str, Tensor], path: Path) -> None:
    content = BytesIO()
    torch.save(state, content)
    write_atomically(path, content.getvalue())
