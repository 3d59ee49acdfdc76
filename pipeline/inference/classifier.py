"""The bulk job's kernel: texts in, labels and probabilities out, for several adapters in one pass. Knows no file and no Ray."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.adapter.adapter import layer_number, load_adapter
from pipeline.config import EncoderConfig, TrainConfig
from pipeline.encoder.encoder import (
    Batch,
    Encoder,
    EncoderFiles,
    FloatArray,
    attention,
    batches_by_budget,
    choose_runtime,
    find_encoder,
    known_package,
)
from pipeline.encoder.frozen_linear import FrozenLinear, keep_primitives
from pipeline.encoder.tokeniser import IntArray, Tokens
from pipeline.errors import AdapterError, EncoderError
from pipeline.inference.fused_layer import fuse_layers, join_projections
from pipeline.inference.reference import FoundAdapter

_TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 65536}  # of a CPU: what a core's second-level cache holds between two layers
_LEAST_TOKENS_PER_BATCH = 256
CLOSE_CALL = 0.03
"""Where the second label is less than this share behind the first, float32 decides. What it gives and costs: CHANGELOG, Experiments."""
_MALLOPT_TRIM, _MALLOPT_MMAP, _MALLOPT_ARENAS = -1, -3, -8  # of malloc.h
_LARGEST_ARRAY = 1024**3
_ANY_TEXT = "What an adapter says of this must be finite."
_OUTSIDE = -1  # of every layer, as the embeddings are
_Computed = TypeVar("_Computed")


@dataclass(frozen=True)
class Answers:
    """What one adapter says of some texts."""

    top_labels: npt.NDArray[np.int32]
    """Indices of the most probable labels, best first, (texts, k)."""
    top_scores: FloatArray
    """Their calibrated probabilities, (texts, k)."""

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """Index of the most probable label, (texts,)."""
        return self.top_labels[:, 0]

    @property
    def scores(self) -> FloatArray:
        """Its calibrated probability, (texts,)."""
        return self.top_scores[:, 0]

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Whether the adapter computed a probability at all, (texts,); where it overflowed, its labels mean nothing."""
        return np.isfinite(self.scores)


class Classifier:
    """Several adapters over the same texts, in the fastest dtype; where that cannot tell two labels apart, float32 decides."""

    def __init__(self, adapters: Sequence[FoundAdapter], encoder: Encoder, *, referee: Encoder | None = None, top_k: int = 1) -> None:
        """Load the adapters.

        Args:
            adapters: Trained on the encoder.
            encoder: Left as it is.
            referee: The same one in float32, asked again about close calls; none where ``encoder`` is it.
            top_k: Labels per text.
        Raises: AdapterError: an adapter's files are damaged, or it was trained on another encoder.
        """
        self.encoder = encoder
        self.top_k = top_k
        self._num_adapters = len(adapters)
        budget = _TOKENS_PER_BATCH[encoder.device.type]
        self._fast = _Engine(adapters, encoder, budget)
        self._referee = None if referee is None else _Engine(adapters, referee, budget // 2)  # whose numbers are twice as wide
        for found, answers in zip(adapters, self.classify(self.tokenise([_ANY_TEXT])), strict=True):
            if not answers.finite.all():
                raise AdapterError(f"adapter {found.name}: its weights overflow: what it says of a text is not a finite number")

    def tokenise(self, texts: Sequence[str]) -> Tokens:
        """Once for all adapters."""
        return self.encoder.tokenise(texts)

    def classify(self, tokens: Tokens) -> list[Answers]:
        """One answer per adapter. The same tokens give the same bits: batches depend on the lengths alone."""
        return self._answers(tokens, np.arange(len(tokens)), range(self._num_adapters), self.top_k)

    def classify_with(self, index: int, tokens: Tokens, rows: IntArray, *, top_k: int) -> Answers:
        """What one adapter says of some of the texts, in the order of ``rows``."""
        (answers,) = self._answers(tokens, rows, [index], top_k)
        return answers

    def embed_with(self, index: int, tokens: Tokens, rows: IntArray) -> FloatArray:
        """What the encoder makes of some of the texts with one adapter, float32 (rows, width), in the order of ``rows``.

        Unit vectors where the encoder's own definition ends in them. Computed in the encoder's dtype; the referee has no part in it.
        """
        return self._fast.embed(tokens, rows, index)

    def _answers(self, tokens: Tokens, rows: IntArray, asked: Sequence[int], top_k: int) -> list[Answers]:
        width = max(2, top_k)  # the second label says how close a call is
        answers = self._fast.answers(tokens, rows, asked, width=width)
        if self._referee is not None:
            for index, answer in zip(asked, answers, strict=True):
                close = np.flatnonzero(~(answer.top_scores[:, 1] <= (1 - CLOSE_CALL) * answer.top_scores[:, 0]))  # NaN too
                (exact,) = self._referee.answers(tokens, rows[close], [index], width=width)
                answer.top_labels[close], answer.top_scores[close] = exact.top_labels, exact.top_scores
        return [Answers(answer.top_labels[:, :top_k], answer.top_scores[:, :top_k]) for answer in answers]


class _Engine:
    """One encoder with several adapters merged into private copies of its projections, a batch at a time on each core."""

    def __init__(self, adapters: Sequence[FoundAdapter], encoder: Encoder, tokens_per_batch: int) -> None:
        self._encoder = encoder
        self._tokens_per_batch = tokens_per_batch
        self._merged = [_merged(found, encoder) for found in adapters]
        # Cores that share a batch wait for each other after every operation.
        count = encoder.runtime.threads if encoder.device.type == "cpu" else 1
        self._idle: SimpleQueue[_Stream] = SimpleQueue()
        for _ in range(count):
            self._idle.put(_Stream(encoder, self._merged))
        self._pool = ThreadPoolExecutor(count, "stream", torch.set_num_threads, (1,)) if count > 1 else None

    def answers(self, tokens: Tokens, which: IntArray, asked: Sequence[int], *, width: int) -> list[Answers]:
        """Of some adapters about some of the texts."""
        rows, answered = self._each_batch(tokens, which, lambda stream, batch: stream.answer(batch, asked, width))
        sizes = [self._merged[index].head.out_features for index in asked]
        return [_in_order([parts[i] for parts in answered], rows, min(width, size)) for i, size in enumerate(sizes)]

    def embed(self, tokens: Tokens, which: IntArray, index: int) -> FloatArray:
        """Vectors of one adapter for some of the texts, float32 (texts, width)."""
        rows, made = self._each_batch(tokens, which, lambda stream, batch: stream.embed(batch, index).cpu())
        vectors = np.empty((len(rows), self._encoder.hidden_size), dtype=np.float32)
        if made:
            vectors[rows] = torch.cat(made).numpy()
        return vectors

    def _each_batch(
        self, tokens: Tokens, which: IntArray, compute: Callable[[_Stream, Batch], _Computed]
    ) -> tuple[IntArray, list[_Computed]]:
        """What each batch gives, and the places in ``which`` that its texts have, one after the other."""

        def run(rows: IntArray) -> _Computed:
            stream = self._idle.get()
            try:
                return compute(stream, self._encoder.batch(tokens, which[rows]))
            finally:
                self._idle.put(stream)

        lengths, budget = tokens.lengths[which], self._tokens_per_batch
        if self._encoder.device.type == "cpu":  # few texts in batches so small that no core waits long for another; whatever their number
            budget = min(budget, max(_LEAST_TOKENS_PER_BATCH, int(lengths.sum()) // 8))
        batches = list(batches_by_budget(lengths, tokens_per_batch=budget))
        computed = list(map(run, batches) if self._pool is None else self._pool.map(run, batches))
        return np.concatenate(batches) if batches else np.empty(0, dtype=np.int64), computed


class _Stream:
    """The encoder's modules for one thread, which switches the adapters in them; the weights are everybody's."""

    def __init__(self, encoder: Encoder, adapters: Sequence[_Merged]) -> None:
        self._encoder = copy(encoder)
        self._encoder.model = _twin(encoder.model)
        self._adapters = adapters
        self._switches = [
            [_Switch(*_place(self._encoder.model, path), linear) for path, linear in adapter.projections.items()] for adapter in adapters
        ]
        self._layers = _SharedLayers(self._encoder.model, [adapter.first_layer for adapter in adapters])

    @torch.inference_mode()
    def answer(self, batch: Batch, asked: Iterable[int], width: int) -> list[tuple[Tensor, Tensor]]:
        """Best scores and labels of some adapters for a batch, (texts, width) each."""
        self._layers.forget()
        answers = []
        for index in asked:
            adapter = self._adapters[index]
            logits = adapter.head(self._pooled(batch, index)) / adapter.temperature
            scores, labels = torch.softmax(logits, dim=1).topk(min(width, logits.shape[1]), dim=1)
            answers.append((scores, labels))
        return answers

    @torch.inference_mode()
    def embed(self, batch: Batch, index: int) -> Tensor:
        """Vectors of one adapter for a batch, float32 (texts, width), at length 1 where the encoder's own definition says so."""
        self._layers.forget()
        vectors = self._pooled(batch, index)
        return nn.functional.normalize(vectors, dim=1) if self._encoder.normalize else vectors

    def _pooled(self, batch: Batch, index: int) -> Tensor:
        with _switched(self._switches[index]), self._layers.shared_below(self._adapters[index].first_layer):
            return self._encoder.pooled(batch)


def _twin(module: nn.Module) -> nn.Module:
    """The same weights in a module of its own."""
    twin = copy(module)
    twin._modules = {name: None if child is None else _twin(child) for name, child in module._modules.items()}
    return twin


def _in_order(parts: list[tuple[Tensor, Tensor]], rows: npt.NDArray[np.int64], width: int) -> Answers:
    scores, labels = np.empty((len(rows), width), dtype=np.float32), np.empty((len(rows), width), dtype=np.int32)
    if parts:
        scores[rows] = torch.cat([p for p, _ in parts]).float().cpu().numpy()
        labels[rows] = torch.cat([p for _, p in parts]).cpu().numpy()
    return Answers(labels, scores)


def load_classifier(
    adapters: Sequence[FoundAdapter],
    *,
    encoder: str | None,
    threads: int,
    use_gpu: bool,
    offline: bool,
    top_k: int = 1,
    precision: Literal["auto", "float32"] = "auto",
) -> Classifier:
    """The kernel for some adapters, on the encoder that they were trained on.

    Args:
        adapters: Trained on the same encoder.
        encoder: Where the encoder lies, if not under the name that the adapters give.
        threads: Of PyTorch.
        use_gpu: Where there is one.
        offline: Never ask the Hub.
        top_k: Labels per text.
        precision: ``auto`` is bfloat16 where the hardware multiplies it natively, with float32 for close calls.
    Raises:
        EncoderError: the encoder cannot be found, or is another one than the adapters were trained on.
        AdapterError: an adapter cannot be loaded.
    """
    torch.set_num_threads(threads)
    keep_primitives(128, per_thread=8)
    _keep_freed_memory()
    runtime = choose_runtime(TrainConfig(precision=precision), threads=threads, use_gpu=use_gpu)
    files, config = find_encoder_of(adapters[0], encoder, offline=offline)
    loaded = Encoder(files, config, runtime)
    exact = choose_runtime(TrainConfig(precision="float32"), threads=threads, use_gpu=use_gpu)
    referee = Encoder(files, config, exact) if runtime.dtype != exact.dtype else None
    for made in (loaded, referee):
        if made is not None:
            attention.for_inference(made.model)
            made.model = fuse_layers(made.model)
    return Classifier(adapters, loaded, referee=referee, top_k=top_k)


def find_encoder_of(adapter: FoundAdapter, encoder: str | None, *, offline: bool) -> tuple[EncoderFiles, EncoderConfig]:
    """The encoder that an adapter was trained on; reads no weights.

    Raises:
        EncoderError: it cannot be found.
        AdapterError: what is there is another one.
    """
    config = encoder_config_of(adapter, encoder)
    files = find_encoder(config, offline=offline)
    if files.ref.revision != adapter.encoder.revision:
        trained = f"{adapter.encoder.name} at {adapter.encoder.revision}"
        raise AdapterError(f"adapter {adapter.name}: trained on {trained}, but encoder {config.name} is {files.ref.revision}")
    return files, config


def encoder_config_of(adapter: FoundAdapter, encoder: str | None) -> EncoderConfig:
    """Which encoder to load: the given one, an installed package that is the one trained on, or that by its public name.

    Raises: EncoderError: it was trained on a folder of somebody's machine, and no other place is given.
    """
    trained = adapter.encoder
    values: dict[str, Any] = {"pooling": trained.pooling, "max_tokens": trained.max_tokens}
    package = known_package(trained.name, trained.revision)
    if encoder is not None:
        is_hub = not encoder.startswith("package:") and not Path(encoder).is_dir()
        return EncoderConfig(name=encoder, revision=trained.revision if is_hub else None, **values)
    if package is not None:
        return EncoderConfig(name=f"package:{package}", **values)
    if (trained.revision or "").startswith("sha256:"):
        raise EncoderError(f"adapter {adapter.name}: trained on {trained.name}, files of {trained.revision}; say where they lie: --encoder")
    return EncoderConfig(name=trained.name, revision=trained.revision, **values)


def _keep_freed_memory() -> None:
    """Have glibc use freed arrays again instead of asking the system for each anew: of long texts that was a third of the time.

    All threads' arrays come from one arena: one for each thread keeps 60 MB more.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MALLOPT_MMAP, _LARGEST_ARRAY)
        mallopt(_MALLOPT_TRIM, _LARGEST_ARRAY)
        mallopt(_MALLOPT_ARENAS, 1)


@dataclass(frozen=True)
class _Merged:
    """One adapter as plain linear layers."""

    projections: dict[str, nn.Linear]
    """Module path -> ``W + scaling * B A`` in the encoder's dtype."""
    head: nn.Linear
    """float32."""
    temperature: float
    first_layer: int


def _merged(found: FoundAdapter, encoder: Encoder) -> _Merged:
    adapter = load_adapter(found.folder, encoder, found=found)
    adapter.detach()
    numbers = [layer_number(path) for path in adapter.projections]
    return _Merged(
        projections=join_projections({path: _merge(lora.base, lora.update) for path, lora in adapter.projections.items()}, encoder.model),
        head=adapter.head[1],  # type: ignore[arg-type]
        temperature=found.calibration.temperature if found.calibration else 1.0,
        first_layer=min(_OUTSIDE if number is None else number for number in numbers),
    )


class _Switch(NamedTuple):
    """A projection's place in the encoder, and what stands there for one adapter. Every batch switches all of them for every adapter."""

    children: dict[str, nn.Module | None]
    name: str
    merged: nn.Linear


@contextmanager
def _switched(switches: Sequence[_Switch]) -> Iterator[None]:
    """While open, the encoder runs with an adapter's projections."""
    frozen = [switch.children[switch.name] for switch in switches]
    try:
        for switch in switches:
            switch.children[switch.name] = switch.merged
        yield
    finally:
        for switch, module in zip(switches, frozen, strict=True):
            switch.children[switch.name] = module


def _place(model: nn.Module, path: str) -> tuple[dict[str, nn.Module | None], str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent)._modules, name


def _merge(base: nn.Linear, update: Tensor) -> nn.Linear:
    weight = (base.weight.detach().float() + update.detach()).to(base.weight.dtype)
    merged = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    merged.weight, merged.bias = nn.Parameter(weight, requires_grad=False), base.bias
    return FrozenLinear(merged, gelu=base.gelu) if isinstance(base, FrozenLinear) else merged


class _SharedLayers:
    """Lets adapters compute once per batch what none of them changes: the embeddings, and the layers below the first adapted one.

    Their ``forward`` is wrapped: the first adapter that starts at layer ``n`` leaves the output of layer ``n - 1`` here, and for the next
    ones the layers below ``n`` answer with it. Embeddings are shared by all that adapt layers only.
    """

    def __init__(self, model: nn.Module, first_layers: Sequence[int]) -> None:
        self._kept: dict[int, Any] = {}
        self._first = _OUTSIDE
        in_layers = [first for first in first_layers if first != _OUTSIDE]
        self._worth = {first for first in in_layers if first > 0 and in_layers.count(first) > 1}
        if self._worth:
            for number, layer in enumerate(_layers(model)[: max(self._worth)]):
                layer.forward = self._shared_layer(number, layer.forward)
        embeddings = getattr(model, "embeddings", None)
        if len(in_layers) > 1 and isinstance(embeddings, nn.Module):
            embeddings.forward = self._shared_embeddings(embeddings.forward)

    def forget(self) -> None:
        """Before another batch."""
        self._kept.clear()

    @contextmanager
    def shared_below(self, first_layer: int) -> Iterator[None]:
        """While open, what lies below ``first_layer`` computes only if nobody has before."""
        self._first = first_layer
        try:
            yield
        finally:
            self._first = _OUTSIDE

    def _shared_embeddings(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def shared(*arguments: Any, **options: Any) -> Any:
            if self._first == _OUTSIDE:
                return forward(*arguments, **options)
            if 0 not in self._kept:
                self._kept[0] = forward(*arguments, **options)
            return self._kept[0]

        return shared

    def _shared_layer(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def shared(*arguments: Any, **options: Any) -> Any:
            if number >= self._first or self._first not in self._worth:
                return forward(*arguments, **options)
            if self._first in self._kept:
                return self._kept[self._first]
            output = forward(*arguments, **options)
            if number + 1 == self._first:
                self._kept[self._first] = output
            return output

        return shared


def _layers(model: nn.Module) -> nn.ModuleList:
    """The encoder's stack of layers: its longest list of modules."""
    stacks: Iterable[nn.ModuleList] = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    return max(stacks, key=len)
