"""Is a published adapter still the one that was trained: all its files against each other, and in a fresh process against the probe."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipeline.config import EncoderConfig
from pipeline.encoder.runtime import exact_runtime
from pipeline.errors import AdapterError, VerificationError
from pipeline.inference.encoder_of_adapter import encoder_config_of
from pipeline.inference.reference import HUB_REF, split_folder
from pipeline.inference.reload import Ask, reload_elsewhere
from pipeline.machine import local_cpus
from pipeline.publishing.consistency import check_card, check_publication, check_run, check_summary, check_task
from pipeline.publishing.publication import file_sha256
from pipeline.records import Probe, Publication
from pipeline.store.folders import adapters_in, explain, is_folder, kind_of
from pipeline.store.manifest import read_manifest
from pipeline.store.run_folder import RunFolder, read_record


@dataclass(frozen=True)
class Verification:
    """An adapter that is what was trained."""

    name: str
    difference: float
    """Largest difference of a logit to the stored ones."""
    effect: float
    """Largest difference that the adapter makes to a text vector."""
    tolerance: float


def verify(ref: str, *, encoder: str | None = None, offline: bool = False) -> list[Verification]:
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
            from pipeline.publishing.hub import download

            cache = stack.enter_context(TemporaryDirectory(prefix="lorafleet-verify-"))
            root, task = download(hub["repository"], hub["revision"] or "main", cache=Path(cache)), hub["task"]
        else:
            place, task = split_folder(ref)
            root = Path(place)
            if place and task is None and kind_of(root) == "adapter":  # part of what its parent is, if that is anything
                root, task = root.absolute().parent, root.absolute().name
            elif not place or (kind_of(root) not in ("run", "publication") and task not in adapters_in(root)):
                found = explain(root, task=task) if place else "no folder is named"
                raise AdapterError(
                    f"cannot verify {ref!r}: {found}; expected a run, a publication, an adapter's folder, or hf:OWNER/NAME"
                )
        return verify_folder(root, tasks=None if task is None else [task], encoder=encoder, offline=offline)


def verify_folder(
    root: Path, *, tasks: Sequence[str] | None, encoder: str | EncoderConfig | None, offline: bool
) -> list[Verification]:
    """Verify adapters of a folder, all of them where none is named; a publication's files, and a run's records, are checked whole.

    Raises: VerificationError, AdapterError: as ``verify``.
    """
    folder, kind = RunFolder(root), kind_of(root)
    publication = read_record(folder.publication, Publication) if kind == "publication" else None
    manifest = read_manifest(folder) if kind == "run" else None
    if publication is not None:
        check_files(folder, publication)
    listed = publication or manifest
    there = list(listed.adapters) if listed else adapters_in(root)
    asked = there if tasks is None else tasks
    missing = [task for task in asked if task not in there]
    if missing or not asked:
        named = f" {', '.join(missing)}" if missing else ""
        raise AdapterError(f"{root}: there is no adapter{named} in it; it has {', '.join(there) or 'none'}")
    checked = {task: check_task(folder.task(task)) for task in asked}
    for adapter, result in checked.values():
        if manifest is not None:
            check_run(manifest, adapter, result)
    results = {task: result for task, (_, result) in checked.items()}
    if publication is not None:
        check_publication(folder, publication, results)
    if listed:
        check_summary(folder, results, listed=listed)
        if results.keys() == listed.adapters.keys():
            check_card(folder, results)
    found = [adapter for adapter, _ in checked.values()]
    is_trained = [result.best_epoch > 0 for _, result in checked.values()]
    probes = [read_record(adapter.folder.probe, Probe) for adapter in found]
    runtime = exact_runtime(threads=local_cpus(), use_gpu=False)
    asks = [Ask(adapter.folder, runtime, probe.texts) for adapter, probe in zip(found, probes, strict=True)]
    config = encoder if isinstance(encoder, EncoderConfig) else encoder_config_of(found[0], encoder)
    verified = []
    answers = reload_elsewhere(asks, config, offline=offline)
    for adapter, trained, probe, reloaded in zip(found, is_trained, probes, answers, strict=True):
        logits, name = np.array(probe.logits, dtype=np.float32), adapter.folder.root.name
        difference = reloaded.check(
            name, logits=logits, label_names=adapter.label_names, tolerance=probe.tolerance, is_trained=trained
        )
        verified.append(Verification(name, difference, reloaded.effect, probe.tolerance))
    return verified


def check_files(folder: RunFolder, publication: Publication) -> None:
    """Compare every file with its hash.

    Raises: VerificationError: one is missing, has other bytes, or is one of ours for which there is no hash.
    """
    for name in publication.adapters:
        for file in (*folder.task(name).published(), folder.task(name).result):
            if f"{name}/{file.name}" not in publication.files:
                raise VerificationError(f"{name}/{file.name}: publication.json has no hash of it")
    ours = [path for part in (folder.metrics, folder.mteb_results) for path in part.rglob("*") if not is_folder(path)]
    for there in (*folder.published(), *ours):
        if (name := there.relative_to(folder.root).as_posix()) not in publication.files:
            raise VerificationError(f"{name}: publication.json has no hash of it")
    for path, sha256 in publication.files.items():
        try:
            found = file_sha256(folder.root / path)
        except FileNotFoundError:
            raise VerificationError(f"{path}: is missing, and was published by run {publication.run_id}") from None
        except OSError as error:
            raise VerificationError(f"{path}: cannot be read: {error.strerror}") from None
        if found != sha256:
            raise VerificationError(f"{path}: its sha256 is {found}, but {sha256} was published")
