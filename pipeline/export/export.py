"""One trained adapter as what other tools load, without pickle or foreign code. What was written is read back and compared."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapter.adapter import Adapter, load_adapter
from pipeline.config import TrainConfig
from pipeline.encoder.encoder import Batch, Encoder, FloatArray, choose_runtime
from pipeline.errors import AdapterError, InputError, VerificationError, first_line
from pipeline.evaluation.classification import unit
from pipeline.inference.classifier import find_encoder_of
from pipeline.inference.reference import FoundAdapter
from pipeline.inference.reload import PROBE_TEXTS
from pipeline.records import Record
from pipeline.store.run_folder import write_atomically

Form = Literal["sentence-transformers", "classifier", "transformers", "onnx"]
"""``sentence-transformers`` gives the adapted encoder's vectors, the other three the head's logits."""

TOLERANCE = 1e-3
"""Largest difference of a logit, or of a component of a vector, between an export and the adapter itself, both in float32."""
_TEXTS = (*PROBE_TEXTS, " ".join(PROBE_TEXTS))  # the last is longer than most encoders read
_TEXTS_AT_ONCE = 8
_ONNX_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
# Our pooling -> the name that EuroBERT's classification head has for it.
_EUROBERT_POOLING = {"mean": "mean", "cls": "bos"}


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
        form: For whom; see the README.
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
    files, config = find_encoder_of(adapter, encoder, offline=offline)
    # As for a compiler: plain layers and transformers' own attention, which torch.onnx can follow, instead of ours.
    runtime = choose_runtime(TrainConfig(precision="float32", compile=True), threads=torch.get_num_threads(), use_gpu=False)
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
            num_texts=len(_TEXTS),
            largest_difference=difference,
        )
        write_atomically(folder / "labels.json", json.dumps(adapter.label_names, ensure_ascii=False, indent=1))
        write_atomically(folder / "export.json", exported.model_dump_json(indent=1))
    return exported


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise InputError(f"cannot export to {target}: it is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"cannot export to {target}: expected a new or an empty folder, found files in it; choose another")


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
    elif pooling not in _EUROBERT_POOLING:
        why = f"EuroBERT's classification head does not know {pooling} pooling; only {', '.join(_EUROBERT_POOLING)}"
    elif 2 * num_classes > encoder.hidden_size:
        why = f"EuroBERT's classification head, {encoder.hidden_size} wide, holds {encoder.hidden_size // 2} classes, not {num_classes}"
    else:
        return
    raise AdapterError(f"adapter {name}: cannot be exported in the form transformers: {why}; choose the form classifier or onnx")


def _expected(adapter: Adapter, form: Form) -> FloatArray:
    """What the adapter itself says of our texts, before it is merged: (texts, width) or (texts, classes)."""
    vectors = adapter.encoder.embed(adapter.encoder.tokenise(_TEXTS))
    if form != "sentence-transformers":
        return adapter.logits_of_vectors(vectors)
    return unit(vectors) if adapter.encoder.normalize else vectors


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


def _save_tokenizer(encoder: Encoder, folder: Path) -> None:
    """In such a way that its files alone cut and pad as ``Encoder`` does."""
    tokenizer = deepcopy(encoder.tokenizer)
    tokenizer.model_max_length = encoder.config.max_tokens
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:  # any will do, because it is masked; but others do not pad without one
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(encoder.pad_id)
    tokenizer.backend_tokenizer.enable_truncation(max_length=encoder.config.max_tokens)
    tokenizer.backend_tokenizer.enable_padding(pad_id=encoder.pad_id, pad_token=tokenizer.pad_token)
    tokenizer.save_pretrained(folder)


def _head(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Weight (classes, width) and bias (classes,)."""
    state = adapter.head[1].state_dict()
    return state["weight"], state["bias"]


# sentence-transformers


def _write_embedder(adapter: Adapter, folder: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Normalize

    _write_modules(adapter, folder, [Normalize()] if adapter.encoder.normalize else [])


def _write_classifier(adapter: Adapter, folder: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense

    weight, bias = _head(adapter)
    head = Dense(weight.shape[1], weight.shape[0], activation_function=nn.Identity(), init_weight=weight, init_bias=bias)
    _write_modules(adapter, folder, [head])


def _write_modules(adapter: Adapter, folder: Path, last: Sequence[nn.Module]) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    encoder = adapter.encoder
    # Else whoever loads a BERT is warned of random weights, in a layer that nothing reads.
    has_pooler = "add_pooling_layer" in inspect.signature(type(encoder.model).__init__).parameters
    options = {"add_pooling_layer": False} if has_pooler else {}
    with tempfile.TemporaryDirectory(dir=folder) as merged:
        encoder.model.save_pretrained(merged)
        _save_tokenizer(encoder, Path(merged))
        transformer: Any = Transformer(merged, model_kwargs=options.copy())
        transformer.model_kwargs, transformer.config_keys = options, [*transformer.config_keys, "model_kwargs"]
        pooling = Pooling(encoder.hidden_size, encoder.config.pooling)
        SentenceTransformer(modules=[transformer, pooling, *last], device="cpu").save(str(folder), create_model_card=False)


def _read_sentence_transformers(folder: Path) -> FloatArray:
    from sentence_transformers import SentenceTransformer

    model: Any = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    vectors: FloatArray = model.encode(list(_TEXTS), batch_size=_TEXTS_AT_ONCE, show_progress_bar=False)
    return vectors


# transformers


def _write_transformers(adapter: Adapter, folder: Path) -> None:
    """Our head as EuroBERT's, which is classifier(GELU(dense(x))): ``z = GELU(z) - GELU(-z)``, so [W; -W] and [I, -I] give it exactly."""
    from transformers import EuroBertForSequenceClassification

    encoder, (weight, bias) = adapter.encoder, _head(adapter)
    names, identity = dict(enumerate(adapter.label_names)), torch.eye(len(weight))
    config = deepcopy(encoder.model.config)
    config.classifier_pooling = _EUROBERT_POOLING[encoder.config.pooling]
    config.id2label, config.label2id = names, {name: index for index, name in names.items()}
    config.problem_type = "single_label_classification"
    model = EuroBertForSequenceClassification(config)
    model.model = encoder.model
    unused = encoder.hidden_size - 2 * len(weight)
    with torch.no_grad():
        model.dense.weight.copy_(nn.functional.pad(torch.cat([weight, -weight]), (0, 0, 0, unused)))
        model.dense.bias.zero_()
        model.classifier.weight.copy_(nn.functional.pad(torch.cat([identity, -identity], dim=1), (0, unused)))
        model.classifier.bias.copy_(bias)
    model.save_pretrained(folder)
    _save_tokenizer(encoder, folder)


@torch.inference_mode()
def _read_transformers(folder: Path) -> FloatArray:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
    batches = [tokenizer(texts, padding=True, truncation=True, return_tensors="pt") for texts in _batches()]
    return np.concatenate([model(**batch).logits.numpy() for batch in batches])


# ONNX


class _Logits(nn.Module):
    """Encoder, pooling and head as one module."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.model, self.head = adapter.encoder.model, adapter.head
        self._adapter = adapter

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 (texts, tokens), twice -> float32 (texts, classes)."""
        return self._adapter.logits(Batch(input_ids, attention_mask))


def _write_onnx(adapter: Adapter, folder: Path) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    encoder = adapter.encoder
    example = encoder.batch(encoder.tokenise(PROBE_TEXTS), np.arange(2))
    axes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision, and of deprecations inside torch
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                _Logits(adapter).eval(),
                (example.ids, example.mask),
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes=(axes, axes),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # what torch raises depends on the layer that it cannot follow
        family = encoder.model.config.model_type
        raise AdapterError(f"torch cannot export a {family} model to ONNX: {first_line(error)}; choose the form classifier") from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # each node names the source line that it came from, with its path
    program.save(folder / "model.onnx")
    _save_tokenizer(encoder, folder)


def _read_onnx(folder: Path) -> FloatArray:
    import onnxruntime  # type: ignore[import-untyped]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    logits: list[FloatArray] = []
    for texts in _batches():
        encodings = tokenizer.encode_batch(texts)
        inputs = {"input_ids": np.array([e.ids for e in encodings]), "attention_mask": np.array([e.attention_mask for e in encodings])}
        logits.append(session.run(["logits"], inputs)[0])
    return np.concatenate(logits)


def _batches() -> list[list[str]]:
    return [list(_TEXTS[start : start + _TEXTS_AT_ONCE]) for start in range(0, len(_TEXTS), _TEXTS_AT_ONCE)]


@dataclass(frozen=True)
class _Library:
    """How an adapter gets there and back."""

    write: Callable[[Adapter, Path], None]
    """Of a merged adapter, into an empty folder."""
    read: Callable[[Path], FloatArray]
    """What the library itself, from the folder's files alone, says of ``_TEXTS``: (texts, width) or (texts, classes)."""


_LIBRARIES: dict[Form, _Library] = {
    "sentence-transformers": _Library(_write_embedder, _read_sentence_transformers),
    "classifier": _Library(_write_classifier, _read_sentence_transformers),
    "transformers": _Library(_write_transformers, _read_transformers),
    "onnx": _Library(_write_onnx, _read_onnx),
}
