"""Encoder layers that several adapters do not change, computed once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

OUTSIDE_LAYERS = -1
"""Number for modules outside the stack of layers, such as the embeddings."""

Computed = TypeVar("Computed")


class SharedLayers:
    """Computes the embeddings, and the layers below the first adapted one, once per batch for several adapters.

    The ``forward`` of these modules is wrapped. The first adapter that starts at layer ``n`` stores the output of layer
    ``n - 1``. For the next adapters, the layers below ``n`` return it. Adapters that change layers only share the
    embeddings.
    """

    def __init__(self, model: nn.Module, first_layers: Sequence[int]) -> None:
        self._kept: dict[int, Any] = {}
        self._first = OUTSIDE_LAYERS
        in_layers = [first for first in first_layers if first != OUTSIDE_LAYERS]
        self._worth = {first for first in in_layers if first > 0 and in_layers.count(first) > 1}
        if self._worth:
            for number, layer in enumerate(_layers(model)[: max(self._worth)]):
                layer.forward = self._shared_layer(number, layer.forward)
        embeddings = getattr(model, "embeddings", None)
        if len(in_layers) > 1 and isinstance(embeddings, nn.Module):
            embeddings.forward = self._shared_embeddings(embeddings.forward)

    def forget(self) -> None:
        """Discard stored outputs. Called before each batch."""
        self._kept.clear()

    @contextmanager
    def shared_below(self, first_layer: int) -> Iterator[None]:
        """Reuse stored outputs of everything below ``first_layer`` while open."""
        self._first = first_layer
        try:
            yield
        finally:
            self._first = OUTSIDE_LAYERS

    def _shared_embeddings(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def shared(*arguments: Any, **options: Any) -> Any:
            if self._first == OUTSIDE_LAYERS:
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
