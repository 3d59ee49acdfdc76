"""Verification of adapters: compare their files with each other, and the logits of a new process with stored ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from pipeline.adapter.description import FoundAdapter
from pipeline.config import EncoderConfig
from pipeline.encoder.runtime import exact_runtime
from pipeline.errors import AdapterError, VerificationError
from pipeline.hub_address import HUB_REF
from pipeline.inference.encoder_of_adapter import encoder_config_of
from pipeline.inference.reference import split_folder, split_side
from pipeline.inference.reload import ReloadRequest, reload_elsewhere
from pipeline.machine import local_cpus
from pipeline.publishing.card_claims import check_card
from pipeline.publishing.consistency import check_publication, check_run, check_summary, check_task
from pipeline.publishing.publication import file_sha256
from pipeline.records import SIDES, Publication, ReferenceOutputs, TaskResult
from pipeline.store.files import read_record
from pipeline.store.folders import adapters_in, explain, is_folder, kind_of
from pipeline.store.manifest import read_manifest
from pipeline.store.run_folder import RunFolder, TaskFolder


@dataclass(frozen=True)
class Verification:
    """A verified adapter: its outputs match the stored ones."""

    name: str
    outputs: Literal["logits", "vectors"]
    """Outputs that were compared. An adapter without a head has vectors only."""
    difference: float
    """Largest absolute difference between an output and its stored value."""
    effect: float
    """Largest change that the adapter makes to an element of a text embedding."""
    tolerance: float
    """Largest difference that is allowed."""


def verify(ref: str, *, encoder: str | None = None, offline: bool = False) -> list[Verification]:
    """Verify one adapter, or every adapter of a repository, a published folder or a run.

    Args:
        ref: A folder, ``hf:OWNER/NAME[@REVISION]``, or either with ``#TASK``. A repository is downloaded again.
        encoder: Location of the encoder. Defaults to the name that the adapters give.
        offline: Whether to load the encoder without asking the Hub.
    Raises:
        VerificationError: a file, a label name or a logit differs, or an adapter has no effect.
        AdapterError: the adapter does not exist.
    """
    with ExitStack() as stack:
        hub = HUB_REF.fullmatch(ref)
        if hub:
            from pipeline.hub_client import download

            cache = stack.enter_context(TemporaryDirectory(prefix="lorafleet-verify-"))
            root, task = download(hub["repository"], hub["revision"] or "main", cache=Path(cache)), hub["task"]
        else:
            path, task = split_folder(ref)
            root = Path(path)
            # An adapter's folder is verified as part of the run or publication around it, if there is one.
            if path and task is None and kind_of(root) == "adapter":
                folder = root.absolute()
                folder = folder.parent if TaskFolder(folder.parent).has_sides else folder  # one of its two sides
                root, task = folder.parent, folder.name
            elif not path or (kind_of(root) not in ("run", "publication") and task not in adapters_in(root)):
                reason = explain(root, task=task) if path else "no folder is named"
                raise AdapterError(
                    f"cannot verify {ref!r}: {reason}; "
                    "expected a run, a publication, an adapter's folder, or hf:OWNER/NAME"
                )
        if task is not None and split_side(task)[0] in adapters_in(root):  # both sides are verified together
            task = task if task in adapters_in(root) else split_side(task)[0]
        return verify_folder(root, tasks=None if task is None else [task], encoder=encoder, offline=offline)


def verify_folder(
    root: Path, *, tasks: Sequence[str] | None, encoder: str | EncoderConfig | None, offline: bool
) -> list[Verification]:
    """Verify adapters of a folder. The files of a publication are always checked as a whole.

    Args:
        root: A run, a publication, or a folder with adapters.
        tasks: MTEB tasks to verify; None for all.
        encoder: Location of the encoder, or the whole encoder config. Defaults to the name that the adapters give.
        offline: Whether to load the encoder without asking the Hub.
    Raises:
        VerificationError, AdapterError: as ``verify``.
    """
    folder, kind = RunFolder(root), kind_of(root)
    publication = read_record(folder.publication, Publication) if kind == "publication" else None
    manifest = read_manifest(folder) if kind == "run" else None
    if publication is not None:
        check_files(folder, publication)
    listed = publication or manifest
    existing = list(listed.adapters) if listed else adapters_in(root)
    requested = existing if tasks is None else tasks
    missing = [task for task in requested if task not in existing]
    if missing or not requested:
        named = f" {', '.join(missing)}" if missing else ""
        raise AdapterError(f"{root}: there is no adapter{named} in it; it has {', '.join(existing) or 'none'}")
    checked = {task: check_task(folder.task(task)) for task in requested}
    for adapters, result in checked.values():
        if manifest is not None:
            check_run(manifest, adapters, result)
    results = {task: result for task, (_, result) in checked.items()}
    if publication is not None:
        check_publication(folder, publication, results)
    if listed:
        check_summary(folder, results, listed=listed)
        if results.keys() == listed.adapters.keys():
            check_card(folder, results)
    every = [(adapter, result) for adapters, result in checked.values() for adapter in adapters]
    return _verify_outputs(every, encoder, offline=offline)


def _verify_outputs(
    checked: Sequence[tuple[FoundAdapter, TaskResult]], encoder: str | EncoderConfig | None, *, offline: bool
) -> list[Verification]:
    """Load the adapters in a new process, and compare what they compute there with the stored outputs."""
    adapters = [adapter for adapter, _ in checked]
    is_trained = [result.best_epoch > 0 for _, result in checked]
    probes = [read_record(adapter.folder.probe, ReferenceOutputs) for adapter in adapters]
    runtime = exact_runtime(threads=local_cpus(), use_gpu=False)
    asks = [
        ReloadRequest(adapter.folder, runtime, probe.texts) for adapter, probe in zip(adapters, probes, strict=True)
    ]
    config = encoder if isinstance(encoder, EncoderConfig) else encoder_config_of(adapters[0], encoder)
    verified = []
    answers = reload_elsewhere(asks, config, offline=offline)
    for adapter, trained, probe, reloaded in zip(adapters, is_trained, probes, answers, strict=True):
        stored, name = np.array(probe.logits, dtype=np.float32), adapter.folder.name
        difference = reloaded.check(
            name, outputs=stored, label_names=adapter.label_names, tolerance=probe.tolerance, is_trained=trained
        )
        outputs: Literal["logits", "vectors"] = "logits" if adapter.has_head else "vectors"
        verified.append(Verification(name, outputs, difference, reloaded.effect, probe.tolerance))
    return verified


def check_files(folder: RunFolder, publication: Publication) -> None:
    """Compare every file of a publication with its hash.

    Raises:
        VerificationError: a file is missing or changed, or one of lorafleet's files has no hash.
    """
    for name in publication.adapters:
        task = folder.task(name)
        has_head = f"{name}/{task.labels.name}" in publication.files
        has_sides = f"{name}/{SIDES[0]}/{task.meta.name}" in publication.files
        for file in (*task.published(has_head=has_head, has_sides=has_sides), task.result):
            if (inside := file.relative_to(folder.root).as_posix()) not in publication.files:
                raise VerificationError(f"{inside}: publication.json has no hash of it")
    ours = [path for part in (folder.metrics, folder.mteb_results) for path in part.rglob("*") if not is_folder(path)]
    for path in (*folder.published(), *ours):
        if (name := path.relative_to(folder.root).as_posix()) not in publication.files:
            raise VerificationError(f"{name}: publication.json has no hash of it")
    for name, expected in publication.files.items():
        try:
            sha256 = file_sha256(folder.root / name)
        except FileNotFoundError:
            raise VerificationError(f"{name}: is missing, and was published by run {publication.run_id}") from None
        except OSError as error:
            raise VerificationError(f"{name}: cannot be read: {error.strerror}") from None
        if sha256 != expected:
            raise VerificationError(f"{name}: its sha256 is {sha256}, but {expected} was published")
