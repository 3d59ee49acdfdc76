"""The key of a training: a hash of all that its weights and scores depend on."""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pipeline
from pipeline.config import RunConfig
from pipeline.records import EncoderRef, MtebTask, Runtime

VERSIONED = ("torch", "transformers", "tokenizers", "peft", "mteb", "scikit-learn", "scipy", "numpy")
"""The libraries whose versions may change a weight or a score."""


_WORKERS_JOB = "pipeline.run.job"
_PACKAGE = Path(pipeline.__file__).parent


def library_versions() -> dict[str, str]:
    """Installed version of each library that may change a weight or a score."""
    return {name: metadata.version(name) for name in VERSIONED}


def task_key(
    config: RunConfig,
    *,
    mteb_task: MtebTask,
    fingerprint: str,
    encoder: EncoderRef,
    runtime: Runtime,
    versions: dict[str, str],
) -> str:
    """Hash of all that an MTEB task's weights and scores depend on; equal keys need no second training.

    The number of threads is left out: it depends on how many MTEB tasks share the machine, and what it may change in the last bits
    is no reason to train again. A training that was begun goes on with its own number. So is what a warm start goes on from: each
    publication changes it, and data that have not changed are no reason to train again.
    """
    parts: dict[str, Any] = {
        "data": fingerprint,
        "task": mteb_task.model_dump(include={"name", "subset", "max_epochs", "samples_per_label"}),
        "encoder": encoder.revision,
        "encoder_config": config.encoder.model_dump(exclude={"name", "revision"}),
        "adapter": config.adapter.model_dump(mode="json"),
        "train": config.train.model_dump(exclude={"max_epochs", "warm_start"})
        | {"warm_start": config.train.warm_start is not None},
        "evaluate": config.evaluate.model_dump(mode="json"),
        "runtime": runtime.model_dump(exclude={"threads"}),
        "sources": sources_sha256(),
        "versions": versions,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def sources_sha256(package: Path = _PACKAGE) -> str:
    """Hash of every file of the pipeline that the worker's job imports, directly or through others."""
    digest = hashlib.sha256()
    for path in imported_files(package):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def imported_files(package: Path = _PACKAGE) -> list[Path]:
    """Files of the pipeline in the import closure of the worker's job, imports inside functions included; sorted."""
    found: set[Path] = set()
    waiting = [_file_of(package, _WORKERS_JOB)]
    while waiting:
        path = waiting.pop()
        if path is None or path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pipeline":
                modules = (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
                waiting += [_file_of(package, module) for module in modules]
    return sorted(found)


def _file_of(package: Path, module: str) -> Path | None:
    path = package.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
