"""The encoder that an adapter was trained on: its config and its files. Reads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.adapter.description import FoundAdapter
from pipeline.config import EncoderConfig
from pipeline.encoder.files import EncoderFiles, find_encoder, known_package
from pipeline.errors import AdapterError, EncoderError


def find_encoder_of(
    adapter: FoundAdapter, encoder_location: str | None, *, offline: bool
) -> tuple[EncoderFiles, EncoderConfig]:
    """Find the encoder that an adapter was trained on.

    Raises:
        EncoderError: it cannot be found.
        AdapterError: the location has another encoder.
    """
    config = encoder_config_of(adapter, encoder_location)
    files = find_encoder(config, offline=offline)
    if files.ref.revision != adapter.encoder.revision:
        trained = f"{adapter.encoder.name} at {adapter.encoder.revision}"
        raise AdapterError(
            f"adapter {adapter.name}: trained on {trained}, but encoder {config.name} is {files.ref.revision}"
        )
    return files, config


def encoder_config_of(adapter: FoundAdapter, encoder_location: str | None) -> EncoderConfig:
    """Config of the encoder to load for an adapter.

    The encoder is at the given location. Without one, it is an installed package with the same files, or the public
    name in the adapter's files.

    Raises: EncoderError: the adapter was trained on a local folder, and no location is given.
    """
    trained = adapter.encoder
    values: dict[str, Any] = {"pooling": trained.pooling, "max_tokens": trained.max_tokens}
    package = known_package(trained.name, trained.revision)
    if encoder_location is not None:
        is_hub = not encoder_location.startswith("package:") and not Path(encoder_location).is_dir()
        return EncoderConfig(name=encoder_location, revision=trained.revision if is_hub else None, **values)
    if package is not None:
        return EncoderConfig(name=f"package:{package}", **values)
    if (trained.revision or "").startswith("sha256:"):
        raise EncoderError(
            f"adapter {adapter.name}: trained on {trained.name}, files of {trained.revision}; "
            "give their location: --encoder"
        )
    return EncoderConfig(name=trained.name, revision=trained.revision, **values)
