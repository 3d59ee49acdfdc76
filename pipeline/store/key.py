"""Key of a training: a hash of everything that its weights and scores depend on."""

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
"""Libraries whose versions may change a weight or a score."""

_TASK_FIELDS = {*("name", "subset", "max_epochs", "samples_per_label")}
_TASK_FIELDS |= {*("objective", "loss", "prefixes", "sides", "slices")}
WORKERS_JOB = "pipeline.run.job"
"""Module of the worker's job in a run."""

_PACKAGE = Path(pipeline.__file__).parent


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that may change a weight or a score."""
    return {name: metadata.version(name) for name in VERSIONED}


def task_key(
    config: RunConfig,
    *,
    mteb_task: MtebTask,
    fingerprint: str,
    encoder: EncoderRef,
    runtime: Runtime,
    versions: dict[str, str],
    job: str = WORKERS_JOB,
) -> str:
    """Hash everything that an MTEB task's weights and scores depend on. Equal keys need no second training.

    The number of threads is excluded: it depends on how many MTEB tasks share the machine, and changes at most the last
    bits. A resumed training keeps its own number. The adapter that a warm start begins with is excluded as well: each
    publication changes it, but unchanged data should not be retrained.

    Args:
        config: Config of the run.
        mteb_task: The MTEB task, with resolved revision.
        fingerprint: Hash of its data.
        encoder: The encoder, with resolved revision.
        runtime: Device and number format of the training.
        versions: As ``library_versions``.
        job: Module whose imports are the code that counts.
    Returns:
        32 hex digits.
    """
    parts: dict[str, Any] = {
        "data": fingerprint,
        "task": mteb_task.model_dump(include=_TASK_FIELDS),
        "encoder": encoder.revision,
        "encoder_config": config.encoder.model_dump(exclude={"name", "revision"}),
        "adapter": config.adapter.model_dump(mode="json"),
        "train": config.train.model_dump(exclude={"max_epochs", "warm_start"})
        | {"warm_start": config.train.warm_start is not None},
        "evaluate": config.evaluate.model_dump(mode="json"),
        "runtime": runtime.model_dump(exclude={"threads"}),
        "sources": sources_sha256(job=job),
        "versions": versions,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def sources_sha256(package: Path = _PACKAGE, *, job: str = WORKERS_JOB) -> str:
    """SHA-256 over every file of the pipeline that a worker's job imports, directly or indirectly."""
    digest = hashlib.sha256()
    for path in imported_files(package, job=job):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def imported_files(package: Path = _PACKAGE, *, job: str = WORKERS_JOB) -> list[Path]:
    """Sorted files of the pipeline that a worker's job imports, also indirectly or inside functions."""
    files: set[Path] = set()
    waiting = [_file_of(package, job)]
    while waiting:
        path = waiting.pop()
        if path is None or path in files:
            continue
        files.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pipeline":
                modules = (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
                waiting += [_file_of(package, module) for module in modules]
    return sorted(files)


def _file_of(package: Path, module: str) -> Path | None:
    path = package.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
