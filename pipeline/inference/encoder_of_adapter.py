"""The encoder that an adapter was trained on: which one it is, and where its files lie. Reads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.adapter.description import FoundAdapter
from pipeline.config import EncoderConfig
from pipeline.encoder.files import EncoderFiles, find_encoder, known_package
from pipeline.errors import AdapterError, EncoderError


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
        raise AdapterError(
            f"adapter {adapter.name}: trained on {trained}, but encoder {config.name} is {files.ref.revision}"
        )
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
        raise EncoderError(
            f"adapter {adapter.name}: trained on {trained.name}, files of {trained.revision}; say where they lie: --encoder"
        )
    return EncoderConfig(name=trained.name, revision=trained.revision, **values)
