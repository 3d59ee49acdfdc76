"""One trained adapter as what other tools load, without pickle or foreign code. What was written is read back and compared."""

from __future__ import annotations

import importlib.util
import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.description import FoundAdapter
from pipeline.adapter.files import load_adapter
from pipeline.encoder.encoder import Encoder, FloatArray
from pipeline.encoder.runtime import exact_runtime
from pipeline.errors import AdapterError, InputError, VerificationError
from pipeline.evaluation.vectors import normalize
from pipeline.export.common import COMPARED_TEXTS
from pipeline.export.onnx import read_onnx, write_onnx
from pipeline.export.sentence_transformers import read_sentence_transformers, write_classifier, write_embedder
from pipeline.export.transformers import EUROBERT_POOLING, read_transformers, write_transformers
from pipeline.inference.encoder_of_adapter import find_encoder_of
from pipeline.records import Record
from pipeline.store.files import write_atomically

Form = Literal["sentence-transformers", "classifier", "transformers", "onnx"]
"""``sentence-transformers`` gives the adapted encoder's vectors, the other three the head's logits."""

TOLERANCE = 1e-3
"""Largest difference of a logit, or of a component of a vector, between an export and the adapter itself, both in float32."""
_ONNX_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


class Exported(Record):
    """The content of ``export.json``."""

    form: Form
    adapter: str
    adapter_sha256: str
    encoder: str
    """Public name of the encoder that the adapter was trained on."""
    encoder_revision: str
    lorafleet_version: str
    label_names: tuple[str, ...]
    """In the order of the logits; also in ``labels.json`` beside."""
    max_tokens: int
    """Longer texts are cut, by the tokenizer that was exported."""
    temperature: float
    """Calibrated probabilities are the softmax of logits / temperature; 1 where the adapter came without calibration."""
    num_texts: int
    """How many texts of our own the export was compared on."""
    largest_difference: float
    """Of a logit (``sentence-transformers``: of a component of a vector), between the export read back and the adapter itself."""


def export_adapter(adapter: FoundAdapter, target: Path, *, form: Form, encoder: str | None, offline: bool) -> Exported:
    """Write one adapter, merged into its encoder in float32, as a folder that other tools load.

    Args:
        adapter: What to export.
        target: Folder to make; may exist if it is empty. It appears whole or not at all.
        form: Tool that loads it; pipeline/export/README.md shows how.
        encoder: Where the encoder lies, if not under the name that the adapter gives.
        offline: Never ask the Hub.
    Raises:
        InputError: the target is taken, or a library that the form needs is not installed.
        EncoderError: the encoder cannot be found.
        AdapterError: damaged, trained on another encoder, or the form cannot express it.
        VerificationError: what was written, read back, is not the adapter; nothing is left of it.
    """
    target = target.resolve()
    _check_target(target)
    if form == "onnx":
        _check_libraries()
    if form != "sentence-transformers":
        adapter.check_has_head()
    files, config = find_encoder_of(adapter, encoder, offline=offline)
    # torch.onnx can follow plain layers and the attention of transformers.
    runtime = exact_runtime(threads=torch.get_num_threads(), use_gpu=False, kernels="torch")
    loaded = load_adapter(adapter.folder, Encoder(files, config, runtime), found=adapter)
    if form == "transformers":
        _check_own_head(adapter.name, loaded)
    library = _LIBRARIES[form]
    expected = _expected(loaded, form)
    with _staged(target) as folder:
        with loaded.merged():
            library.write(loaded, folder)
        found = library.read(folder)
        difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("inf")
        if not difference <= TOLERANCE:
            raise VerificationError(
                f"adapter {adapter.name}: what its {form} export says, read back, differs by {difference:.3g} from the adapter itself "
                f"(allowed: {TOLERANCE:g}); nothing was exported"
            )
        exported = Exported(
            form=form,
            adapter=adapter.name,
            adapter_sha256=adapter.sha256,
            encoder=adapter.encoder.name,
            encoder_revision=files.ref.revision,
            lorafleet_version=version("lorafleet"),
            label_names=adapter.label_names,
            max_tokens=config.max_tokens,
            temperature=adapter.calibration.temperature if adapter.calibration else 1.0,
            num_texts=len(COMPARED_TEXTS),
            largest_difference=difference,
        )
        if adapter.has_head:
            write_atomically(folder / "labels.json", json.dumps(adapter.label_names, ensure_ascii=False, indent=1))
        write_atomically(folder / "export.json", exported.model_dump_json(indent=1))
    return exported


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise InputError(f"cannot export to {target}: it is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(
            f"cannot export to {target}: expected a new or an empty folder, found files in it; choose another"
        )


def _check_libraries() -> None:
    missing = [name for name in _ONNX_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"the form onnx needs {', '.join(missing)}, not installed here; pip install 'lorafleet[onnx]'")


def _check_own_head(name: str, adapter: Adapter) -> None:
    """Whether the architecture's own classification head can be given weights with which it is ours."""
    encoder, num_classes = adapter.encoder, len(adapter.label_names)
    family, pooling = encoder.model.config.model_type, encoder.config.pooling
    if family != "eurobert":
        why = f"a {family} model's own classification head is no linear layer, and only EuroBERT's is turned into one here"
    elif pooling not in EUROBERT_POOLING:
        why = f"EuroBERT's classification head does not know {pooling} pooling; only {', '.join(EUROBERT_POOLING)}"
    elif 2 * num_classes > encoder.hidden_size:
        why = f"EuroBERT's classification head, {encoder.hidden_size} wide, holds {encoder.hidden_size // 2} classes, not {num_classes}"
    else:
        return
    raise AdapterError(
        f"adapter {name}: cannot be exported in the form transformers: {why}; choose the form classifier or onnx"
    )


def _expected(adapter: Adapter, form: Form) -> FloatArray:
    """What the adapter itself says of our texts, before it is merged: (texts, width) or (texts, classes)."""
    vectors = adapter.encoder.embed(adapter.encoder.tokenise(COMPARED_TEXTS))
    if form != "sentence-transformers":
        return adapter.logits_of_vectors(vectors)
    return normalize(vectors) if adapter.encoder.normalize else vectors


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A folder beside the target, which takes its place at the end; after an error nothing is left."""
    staging = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot export to {target}: {error.strerror}; choose another folder") from None
    try:
        yield staging
        staging.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# sentence-transformers


# transformers


# ONNX


@dataclass(frozen=True)
class _Library:
    """How an adapter gets there and back."""

    write: Callable[[Adapter, Path], None]
    """Of a merged adapter, into an empty folder."""
    read: Callable[[Path], FloatArray]
    """What the library itself, from the folder's files alone, says of ``COMPARED_TEXTS``: (texts, width) or (texts, classes)."""


_LIBRARIES: dict[Form, _Library] = {
    "sentence-transformers": _Library(write_embedder, read_sentence_transformers),
    "classifier": _Library(write_classifier, read_sentence_transformers),
    "transformers": _Library(write_transformers, read_transformers),
    "onnx": _Library(write_onnx, read_onnx),
}
