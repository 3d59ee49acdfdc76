"""Is a published adapter still the one that was trained: files against their hashes, and in a fresh process logits against the probe."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipeline.adapter_ref import HUB_REF, FoundAdapter, find_adapters, split_folder
from pipeline.classifier import encoder_config_of
from pipeline.config import EncoderConfig
from pipeline.encoder import exact_runtime
from pipeline.errors import AdapterError, VerificationError
from pipeline.machine import local_cpus
from pipeline.publication import file_sha256
from pipeline.records import Probe, Publication, TaskResult
from pipeline.reload import Ask, reload_elsewhere
from pipeline.run_folder import RunFolder, read_record


@dataclass(frozen=True)
class Verified:
    """An adapter that is what was trained."""

    name: str
    difference: float
    """Largest difference of a logit to the stored ones."""
    effect: float
    """Largest difference that the adapter makes to a text vector."""
    tolerance: float


def verify(ref: str, *, encoder: str | None = None, offline: bool = False) -> list[Verified]:
    """Verify one adapter, or all of a repository, a published folder or a run.

    Args:
        ref: A folder, ``hf:OWNER/NAME[@REVISION]``, or either with ``#TASK``; what is on the Hub is downloaded anew.
        encoder: Where the encoder lies, if not under the name that the adapters give.
        offline: Never ask the Hub.
    Raises:
        VerificationError: a file, a label name, a logit is not what was published, or an adapter has no effect.
        AdapterError: there is no such adapter.
    """
    with ExitStack() as stack:
        hub = HUB_REF.fullmatch(ref)
        if hub:
            from pipeline.hub import download

            cache = stack.enter_context(TemporaryDirectory(prefix="lorafleet-verify-"))
            root, task = download(hub["repository"], hub["revision"] or "main", cache=Path(cache)), hub["task"]
        else:
            place, task = split_folder(ref)
            root = Path(place)
            if not root.is_dir():
                raise AdapterError(f"{ref}: no such folder; expected a run, a published folder, an adapter's folder, or hf:OWNER/NAME")
            if not RunFolder(root).results.is_file():  # an adapter's own folder
                root, task = root.parent, task or root.name
        return verify_folder(root, tasks=None if task is None else [task], encoder=encoder, offline=offline)


def verify_folder(root: Path, *, tasks: Sequence[str] | None, encoder: str | EncoderConfig | None, offline: bool) -> list[Verified]:
    """Verify adapters of a folder, all of them where none is named; the files of a publication are checked whole.

    Raises: VerificationError, AdapterError: as ``verify``.
    """
    folder = RunFolder(root)
    there = sorted(path.parent.name for path in root.glob("*/adapter_model.safetensors") if not path.parent.name.startswith("."))
    if folder.publication.is_file():
        publication = read_record(folder.publication, Publication)
        check_files(folder, publication)
        there = list(publication.adapters)
    if not there:
        raise AdapterError(f"{root}: there is no adapter in it; expected a run, a published folder, or an adapter's folder")
    found = [_find(folder, task) for task in (tasks if tasks is not None else there)]
    probes = [read_record(adapter.folder.probe, Probe) for adapter in found]
    runtime = exact_runtime(threads=local_cpus(), use_gpu=False)
    asks = [Ask(adapter.folder, runtime, probe.texts) for adapter, probe in zip(found, probes, strict=True)]
    config = encoder if isinstance(encoder, EncoderConfig) else encoder_config_of(found[0], encoder)
    verified = []
    for adapter, probe, reloaded in zip(found, probes, reload_elsewhere(asks, config, offline=offline), strict=True):
        logits = np.array(probe.logits, dtype=np.float32)
        name = adapter.folder.root.name
        is_trained = read_record(adapter.folder.result, TaskResult).best_epoch > 0
        difference = reloaded.check(name, logits=logits, label_names=adapter.label_names, tolerance=probe.tolerance, is_trained=is_trained)
        verified.append(Verified(name, difference, reloaded.effect, probe.tolerance))
    return verified


def check_files(folder: RunFolder, publication: Publication) -> None:
    """Compare every file with its hash.

    Raises: VerificationError: one is missing, or has other bytes.
    """
    for path, sha256 in publication.files.items():
        file = folder.root / path
        if not file.is_file():
            raise VerificationError(f"{path}: is missing, and was published by run {publication.run_id}")
        if file_sha256(file) != sha256:
            raise VerificationError(f"{path}: its sha256 is {file_sha256(file)}, but {sha256} was published")


def _find(folder: RunFolder, task: str) -> FoundAdapter:
    (adapter,) = find_adapters([f"{folder.root}#{task}"], offline=True)
    result = read_record(adapter.folder.result, TaskResult)
    if adapter.sha256 != result.adapter.sha256:
        raise VerificationError(f"{task}: the adapter's files have sha256 {adapter.sha256}, but {result.adapter.sha256} was trained")
    if adapter.label_names != result.data.label_names:
        raise VerificationError(f"{task}: labels.json is not the list of label names that it was trained with")
    return adapter
