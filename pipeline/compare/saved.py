"""The files of a trained arm: written by the worker, loaded by a fresh process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.files import load_adapter, save_adapter
from pipeline.adapter.full_encoder import FullEncoder
from pipeline.adapter.head import Head
from pipeline.adapter.linear_map import LinearMap, VectorTable
from pipeline.adapter.sided import SidedAdapter, Trainable
from pipeline.adapter.state import EncoderState
from pipeline.compare.files import read_arrays, write_arrays
from pipeline.config import EncoderConfig
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.files import EncoderFiles, find_encoder
from pipeline.errors import DataError, VerificationError
from pipeline.export.sentence_transformers import write_modules
from pipeline.records import SIDES, Record, Runtime
from pipeline.store.files import read_record, write_atomically
from pipeline.store.run_folder import TaskFolder

_ENCODER = "encoder"


class StateMeta(Record):
    """Facts by which a saved state is checked before use."""

    kind: str
    """What was trained: ``frozen``, ``full``, ``linear`` or ``lora``."""
    encoder_revision: str
    """Revision of the encoder that it was made from."""
    label_names: tuple[str, ...]
    trained: bool
    """Whether the weights are those of an epoch. Only a start may have no effect."""


class PlainState(EncoderState):
    """An encoder as it was loaded, with or without a head."""

    def __init__(self, encoder: Encoder, head: Head | None) -> None:
        self.encoder = encoder
        self.head = head

    @property
    def encoder_parameters(self) -> list[nn.Parameter]:
        """None: nothing is trained."""
        return []

    def detach(self) -> None:
        """Do nothing: nothing was changed."""


def save_state(state: Trainable, folder: Path, *, trained: bool, meta: dict[str, Any]) -> None:
    """Write a trained state.

    Args:
        state: The state, still in place.
        folder: Folder to write to. Created if missing.
        trained: Whether the weights are those of an epoch.
        meta: Facts for the meta.json of an adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(state, SidedAdapter):
        for side in SIDES:
            save_adapter(state.use(side), TaskFolder(folder).side(side), meta=meta)
    elif isinstance(state, Adapter):
        save_adapter(state, TaskFolder(folder), meta=meta)
    else:
        if isinstance(state, FullEncoder):
            from sentence_transformers.sentence_transformer.modules import Normalize

            (folder / _ENCODER).mkdir(exist_ok=True)
            write_modules(state.encoder, folder / _ENCODER, [Normalize()] if state.encoder.normalize else [])
        elif isinstance(state, LinearMap):
            write_arrays(folder / "linear_map.safetensors", {"weight": state.map.weight.detach().cpu().numpy()})
        if state.head is not None:
            linear = state.head.linear
            arrays = {name: tensor.detach().cpu().numpy() for name, tensor in linear.named_parameters()}
            write_arrays(folder / "head.safetensors", arrays)
    facts = StateMeta(
        kind=_kind_of(state),
        encoder_revision=state.encoder.ref.revision,
        label_names=state.label_names,
        trained=trained,
    )
    write_atomically(folder / "state.json", facts.model_dump_json(indent=1))


def load_state(
    folder: Path, *, kind: str, files: EncoderFiles, config: EncoderConfig, runtime: Runtime
) -> tuple[Trainable, StateMeta]:
    """Load a saved state onto a fresh encoder.

    Args:
        folder: Folder that ``save_state`` wrote.
        kind: Kind that is expected.
        files: The encoder that all arms start from.
        config: Its config.
        runtime: Runtime to load it in.
    Raises: VerificationError: another kind, or made from another encoder; AdapterError, EncoderError, DataError: a file
        is missing or damaged.
    """
    meta = read_record(folder / "state.json", StateMeta)
    for what, expected, found in (
        ("kind", kind, meta.kind),
        ("encoder", files.ref.revision, meta.encoder_revision),
    ):
        if expected != found:
            raise VerificationError(f"{folder.name}: belongs to another {what}: expected {expected}, found {found}")
    if kind == "full":
        trained = config.changed(name=str((folder / _ENCODER).resolve()), revision=None, trust_remote_code=False)
        encoder = Encoder(find_encoder(trained, offline=True), trained, runtime)
        return PlainState(encoder, _load_head(folder, encoder, meta.label_names)), meta
    encoder = Encoder(files, config, runtime)
    if kind == "lora":
        return _load_adapters(folder, encoder), meta
    if kind == "linear":
        state = LinearMap(VectorTable(encoder))
        weight = read_arrays(folder / "linear_map.safetensors").get("weight")
        if weight is None or weight.shape != tuple(state.map.weight.shape) or not np.isfinite(weight).all():
            raise DataError(
                f"{folder}: linear_map.safetensors does not hold a finite square matrix of the encoder's width"
            )
        with torch.no_grad():
            state.map.weight.copy_(torch.from_numpy(weight))
        state.head = _load_head(folder, state.encoder, meta.label_names)
        return state, meta
    return PlainState(encoder, _load_head(folder, encoder, meta.label_names)), meta


def state_bytes(folder: Path) -> int:
    """Bytes that one more data set needs beside the shared encoder: weights of the state and of its head."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors") if path.name not in _NOT_DEPLOYED)


_NOT_DEPLOYED = ("measured.safetensors", "expected.safetensors")


def _load_adapters(folder: Path, encoder: Encoder) -> Trainable:
    files = TaskFolder(folder)
    if not files.has_sides:
        return load_adapter(files, encoder)
    loaded = {}
    for side in SIDES:
        loaded[side] = load_adapter(files.side(side), encoder)
        loaded[side].detach()
    return SidedAdapter.of(encoder, loaded)


def _load_head(folder: Path, encoder: Encoder, label_names: Sequence[str]) -> Head | None:
    if not label_names:
        return None
    head = Head(encoder.hidden_size, label_names, dropout=0.0)
    arrays = read_arrays(folder / "head.safetensors")
    with torch.no_grad():
        for name, parameter in head.linear.named_parameters():
            array = arrays.get(name)
            if array is None or array.shape != tuple(parameter.shape) or not np.isfinite(array).all():
                raise DataError(f"{folder}: head.safetensors: {name} is missing, has another shape, or is not finite")
            parameter.copy_(torch.from_numpy(array))
    return head.to(encoder.device).eval()


def _kind_of(state: Trainable) -> str:
    if isinstance(state, FullEncoder):
        return "full"
    if isinstance(state, LinearMap):
        return "linear"
    return "frozen" if isinstance(state, PlainState) else "lora"
