"""Small real encoders for all tests, made once per session; no test reaches the network, and torch uses one thread."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import COMMIT, load_encoder, save_tiny_encoder

if TYPE_CHECKING:
    from pipeline.encoder import Encoder

# Before the first import of torch or huggingface_hub, which read them then.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> folder of a two-layer encoder of that architecture. Not to be written to."""
    root = tmp_path_factory.mktemp("encoders")

    def folder_of(family: str) -> Path:
        folder = root / f"tiny-{family}"
        return folder if folder.exists() else save_tiny_encoder(folder, family)

    return folder_of


@pytest.fixture
def bert(encoder_folder: Callable[[str], Path]) -> Encoder:
    """A fresh two-layer BERT, mean pooling, without adapter."""
    return load_encoder(encoder_folder("bert"))


@pytest.fixture
def hub_cache(encoder_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which huggingface_hub keeps what it has downloaded, with one encoder in it: ``someone/tiny`` at ``COMMIT``."""
    import huggingface_hub.constants

    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(encoder_folder("bert"), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))  # for processes that a test starts
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"
