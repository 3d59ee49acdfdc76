"""Export of one trained adapter for other tools, without pickle or foreign code."""

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
from pipeline.export.common import COMPARED_TEXTS, Vectors
from pipeline.export.onnx import read_onnx, write_onnx
from pipeline.export.sentence_transformers import read_sentence_transformers, write_classifier, write_embedder
from pipeline.export.transformers import EUROBERT_POOLING, read_transformers, write_transformers
from pipeline.inference.encoder_of_adapter import find_encoder_of
from pipeline.records import Record
from pipeline.store.files import write_atomically

Form = Literal["sentence-transformers", "classifier", "transformers", "onnx"]
"""``sentence-transformers`` exports the adapted encoder's vectors, the other three forms export the head's logits.

Of an adapter without a head, ``onnx`` exports the vectors too."""

TOLERANCE = 1e-3
"""Largest allowed difference of a logit or a vector component between an export and its adapter, both in float32."""
_PROMPTS = ("query", "document")
"""Names of the prompts for queries and passages that ``encode_query``, ``encode_document`` and mteb look for."""
_NO_VECTORS = Vectors(None, False, {}, None)
_ONNX_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


class ExportManifest(Record):
    """The content of ``export.json``."""

    form: Form
    adapter: str
    """Name of the adapter."""
    adapter_sha256: str
    encoder: str
    """Public name of the encoder that the adapter was trained on."""
    encoder_revision: str
    lorafleet_version: str
    label_names: tuple[str, ...]
    """Label names in the order of the logits, as in ``labels.json``."""
    max_tokens: int
    """Length to which the exported tokenizer truncates, in tokens."""
    width: int | None
    """Number of dimensions of the exported vectors. None if logits were exported."""
    prefixes: tuple[str, str] | None
    """Texts that the training put before each query and before each passage."""
    prefix: str
    """Text that the exported model itself puts before every text. Empty in ONNX, which sees no text."""
    temperature: float
    """Calibrated probabilities are the softmax of logits / temperature. 1 if the adapter has no calibration."""
    num_texts: int
    """Number of texts on which the export was compared with the adapter."""
    largest_difference: float
    """Largest difference of a logit, or of a vector component, between the export read back and the adapter."""


def export_adapter(
    adapter: FoundAdapter, target: Path, *, form: Form, encoder: str | None, offline: bool, width: int | None = None
) -> ExportManifest:
    """Write one adapter, merged into its encoder in float32, as a folder that other tools load.

    The folder is read back and compared with the adapter before it appears.

    Args:
        adapter: The adapter to export.
        target: Folder to create, or an empty one. It appears whole or not at all.
        form: Form of the export; ``pipeline/export/README.md`` shows how to load each.
        encoder: Location of the encoder. None: the name that the adapter gives.
        offline: Never ask the Hub.
        width: Number of leading dimensions of exported vectors (Matryoshka). None: all.
    Raises:
        InputError: the target is not empty, a library that the form needs is not installed, or the width is larger
            than the encoder's or given for logits.
        EncoderError: the encoder cannot be found.
        AdapterError: the adapter is damaged, was trained on another encoder, or cannot be expressed in this form.
        VerificationError: the export, read back, differs from the adapter. It is deleted.
    """
    target = target.resolve()
    _check_target(target)
    if form == "onnx":
        _check_libraries()
    if form in ("classifier", "transformers") and not adapter.has_head:
        raise AdapterError(
            f"adapter {adapter.name}: has no head, so it has no form {form}; choose sentence-transformers or onnx"
        )
    gives_vectors = form == "sentence-transformers" or not adapter.has_head
    _check_width(adapter, width, form, gives_vectors=gives_vectors)
    files, config = find_encoder_of(adapter, encoder, offline=offline)
    # torch.onnx can follow plain layers and the attention of transformers.
    runtime = exact_runtime(threads=torch.get_num_threads(), use_gpu=False, kernels="torch")
    loaded = load_adapter(adapter.folder, Encoder(files, config, runtime), found=adapter)
    if form == "transformers":
        _check_own_head(adapter.name, loaded)
    vectors = _vectors(adapter, loaded, form, width) if gives_vectors else _NO_VECTORS
    expected = _expected(loaded, vectors if gives_vectors else None)
    with _staged(target) as folder:
        difference = _write_and_compare(loaded, folder, form, vectors, expected)
        if not difference <= TOLERANCE:
            raise VerificationError(
                f"adapter {adapter.name}: its {form} export, read back, differs by {difference:.3g} from the adapter "
                f"(allowed: {TOLERANCE:g}); nothing was exported"
            )
        manifest = _manifest(
            adapter,
            form,
            encoder_revision=files.ref.revision,
            max_tokens=config.max_tokens,
            width=expected.shape[1] if gives_vectors else None,
            prefix=vectors.prefix,
            difference=difference,
        )
        if adapter.has_head:
            write_atomically(folder / "labels.json", json.dumps(adapter.label_names, ensure_ascii=False, indent=1))
        write_atomically(folder / "export.json", manifest.model_dump_json(indent=1))
    return manifest


def _manifest(
    adapter: FoundAdapter,
    form: Form,
    *,
    encoder_revision: str,
    max_tokens: int,
    width: int | None,
    prefix: str,
    difference: float,
) -> ExportManifest:
    return ExportManifest(
        form=form,
        adapter=adapter.name,
        adapter_sha256=adapter.sha256,
        encoder=adapter.encoder.name,
        encoder_revision=encoder_revision,
        lorafleet_version=version("lorafleet"),
        label_names=adapter.label_names,
        max_tokens=max_tokens,
        width=width,
        prefixes=adapter.meta.prefixes,
        prefix=prefix,
        temperature=adapter.calibration.temperature if adapter.calibration else 1.0,
        num_texts=len(COMPARED_TEXTS),
        largest_difference=difference,
    )


def _write_and_compare(adapter: Adapter, folder: Path, form: Form, vectors: Vectors, expected: FloatArray) -> float:
    """Write an export and read it back; return its largest difference from the expected output."""
    library = _LIBRARIES[form]
    with adapter.merged():
        library.write(adapter, folder, vectors)
    actual = library.read(folder)
    return float(np.abs(actual - expected).max()) if actual.shape == expected.shape else float("inf")


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
    """Check that the architecture's own classification head can express the adapter's linear head.

    Raises: AdapterError: it cannot.
    """
    encoder, num_classes = adapter.encoder, len(adapter.label_names)
    family, pooling = encoder.model.config.model_type, encoder.config.pooling
    if family != "eurobert":
        why = f"a {family} model's own classification head is not linear, and only EuroBERT's can imitate a linear one"
    elif pooling not in EUROBERT_POOLING:
        why = f"EuroBERT's classification head does not support {pooling} pooling, only {', '.join(EUROBERT_POOLING)}"
    elif 2 * num_classes > encoder.hidden_size:
        why = (
            f"EuroBERT's classification head, {encoder.hidden_size} wide, holds {encoder.hidden_size // 2} classes, "
            f"not {num_classes}"
        )
    else:
        return
    raise AdapterError(
        f"adapter {name}: cannot be exported in the form transformers: {why}; choose the form classifier or onnx"
    )


def _check_width(adapter: FoundAdapter, width: int | None, form: Form, *, gives_vectors: bool) -> None:
    if width is None:
        return
    if not gives_vectors:
        raise InputError(f"--width {width} has no effect on the logits of the form {form}; leave it out")
    if not 1 <= width <= adapter.meta.hidden_size:
        raise InputError(
            f"--width {width}: expected 1 to {adapter.meta.hidden_size}, the width of the encoder's vectors"
        )


def _vectors(adapter: FoundAdapter, loaded: Adapter, form: Form, width: int | None) -> Vectors:
    """Decide which vectors to export. Those of an embedding adapter have length 1, as everywhere in lorafleet."""
    unit = not adapter.has_head or width is not None or loaded.encoder.normalize
    prompts = dict(zip(_PROMPTS, adapter.meta.prefixes or (), strict=False))
    prompt = {"query": _PROMPTS[0], "passage": _PROMPTS[1], None: None}[adapter.side] if prompts else None
    if prompt is not None and adapter.folder.own_side:  # the other side has its own weights
        prompts = {prompt: prompts[prompt]}
    return Vectors(width, unit, prompts, prompt if form == "sentence-transformers" else None)


def _expected(adapter: Adapter, vectors: Vectors | None) -> FloatArray:
    """Return the adapter's own output for the compared texts: vectors (texts, width), or else logits."""
    prefix = vectors.prefix if vectors else ""
    pooled = adapter.encoder.embed(adapter.encoder.tokenise([prefix + text for text in COMPARED_TEXTS]))
    if vectors is None:
        return adapter.logits_of_vectors(pooled)
    found: FloatArray = vectors.of(torch.from_numpy(pooled)).numpy()
    return found


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Yield a folder beside the target, and rename it to the target at the end. After an error it is deleted."""
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


@dataclass(frozen=True)
class _Library:
    """The functions that write an export form and read it back."""

    write: Callable[[Adapter, Path, Vectors], None]
    """Write a merged adapter into an empty folder. Forms of logits ignore the vectors."""
    read: Callable[[Path], FloatArray]
    """Return the library's output for the compared texts, from the folder's files alone.

    Shape (texts, width) or (texts, classes)."""


_LIBRARIES: dict[Form, _Library] = {
    "sentence-transformers": _Library(write_embedder, read_sentence_transformers),
    "classifier": _Library(write_classifier, read_sentence_transformers),
    "transformers": _Library(write_transformers, read_transformers),
    "onnx": _Library(write_onnx, read_onnx),
}
