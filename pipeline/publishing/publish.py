"""Publish a finished run, to a folder or the Hub: gate, stage, verify, and only then change what is published."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from pipeline.config import PublishConfig
from pipeline.errors import InputError, LorafleetError, VerificationError
from pipeline.publishing.gate import evaluate_gate
from pipeline.publishing.hub import HubRepository, MovedError, repository_url
from pipeline.publishing.publication import Candidate, PublishedState, files_below, read_candidate, stage
from pipeline.publishing.verify import Verification, verify_folder
from pipeline.records import GateDecision, Publication
from pipeline.store.lock import hold_run
from pipeline.store.run_folder import RunFolder, open_inside, read_record
from pipeline.store.tables import read_gate, write_gate


@dataclass(frozen=True)
class PublishResult:
    """What came of publishing a run."""

    to: str
    decisions: tuple[GateDecision, ...]
    verified: tuple[Verification, ...]
    """The adapters that were promoted; empty where what is published stays as it is."""
    num_files: int
    """That are published now."""
    revision: str | None
    """Commit of the repository; none for a folder."""

    @property
    def url(self) -> str:
        """Where it can be looked at."""
        if self.revision is None:
            return Path(self.to).resolve().as_uri()
        return repository_url(self.to.removeprefix("hf:"), self.revision)

    @property
    def blocked(self) -> tuple[GateDecision, ...]:
        """The decisions that somebody should look at."""
        return tuple(decision for decision in self.decisions if decision.decision == "block")


class Target(Protocol):
    """Where adapters are published to."""

    def read(self) -> PublishedState:
        """What it holds."""

    def land(
        self, staged: RunFolder, publication: Publication, base: PublishedState, check: Callable[[Path], None]
    ) -> str | None:
        """Change it to what is staged, once that has passed the check."""

    def settle(self, run_id: str, revision: str) -> None:
        """End what an interrupted ``land`` had left to do."""


def publish(run: Path, config: PublishConfig, *, trust_remote_code: bool = False) -> PublishResult:
    """Publish the adapters of a finished run that the gate promotes. PublishResult adapters of other MTEB tasks are kept.

    On any error the target is unchanged. If only tagging or branch cleanup failed, it is fully updated.

    Args:
        run: A run folder with a manifest. Failed MTEB tasks are listed in the results. The others are published.
        config: Target (``to``), gate, and settings of a new repository.
        trust_remote_code: Whether to run the Python code that comes with the encoder. The run's own config does not
            count as consent, because the run may come from a stranger.
    Raises:
        InputError: no target is configured; the run is not finished or is being deleted; or the target holds something
            else or cannot be written.
        VerificationError: an adapter differs from the one that was measured, or the upload differs from what was sent.
        LorafleetError: a file contains a local path, the Hub cannot be reached, or others keep changing the repository.
    """
    if config.to is None:
        raise InputError(f"{run}: publish.to is not set; expected a folder, or hf:OWNER/NAME")
    with hold_run(run, alone=False):
        candidate = read_candidate(run)
        encoder = candidate.manifest.config.encoder
        if encoder.trust_remote_code and not trust_remote_code:
            raise InputError(
                f"{run}: its encoder {encoder.name} at {encoder.revision} needs Python code that comes with it; "
                "look at that code, and give --trust-remote-code if you trust it"
            )
        return _publish(candidate, config.to, config)


def _publish(candidate: Candidate, to: str, config: PublishConfig) -> PublishResult:
    repository = to.removeprefix("hf:") if to.startswith("hf:") else None
    target: Target = (
        HubRepository(repository, private=config.private)
        if repository
        else PublishedFolder(Path(to).resolve(), candidate)
    )
    for last in (False, True):
        base = target.read()
        decisions = evaluate_gate(candidate, base, config.gate, to=to, repository=repository)
        try:
            published = _land(candidate, to, target, base, decisions)
            _record(
                decisions, candidate.folder.gate, to=to
            )  # what was decided holds now: a run with it needs no second publishing
            return published
        except MovedError as error:
            if last:
                raise LorafleetError(
                    f"{to} was changed twice by others while this run was published; it has none of it; try again"
                ) from error
    raise AssertionError("unreachable")


def _record(decisions: list[GateDecision], path: Path, *, to: str) -> None:
    """In place of what was decided about the same target before; what was about another one stays."""
    others = [decision for decision in read_gate(path) if decision.to != to] if path.is_file() else []
    write_gate([*others, *decisions], path)


def _land(
    candidate: Candidate, to: str, target: Target, base: PublishedState, decisions: list[GateDecision]
) -> PublishResult:
    promoted = [decision.mteb_task for decision in decisions if decision.decision == "promote"]
    if not promoted:
        there = base.publication
        if there is not None and there.run_id == candidate.summary.run_id and base.revision is not None:
            target.settle(there.run_id, base.revision)
        return PublishResult(to, tuple(decisions), (), len(there.files) + 1 if there else 0, base.revision)
    config = candidate.manifest.config
    verified: list[Verification] = []

    def check(root: Path) -> None:
        verified[:] = verify_folder(root, tasks=promoted, encoder=config.encoder, offline=config.data.offline)

    with TemporaryDirectory(prefix="lorafleet-publish-") as folder:
        staging = RunFolder(Path(folder))
        publication = stage(candidate, promoted, base, staging)
        revision = target.land(staging, publication, base, check)
    return PublishResult(to, tuple(decisions), tuple(verified), len(publication.files) + 1, revision)


class PublishedFolder:
    """A folder that adapters are published to. It holds all of a publication, or what it held before."""

    def __init__(self, root: Path, candidate: Candidate) -> None:
        """Look at nothing yet, but that neither folder lies inside the other."""
        run = candidate.folder.root
        if root == run or root in run.parents or run in root.parents:
            raise InputError(f"cannot publish {run} to {root}: one lies inside the other; choose a folder elsewhere")
        self.root = root

    def read(self) -> PublishedState:
        """What it holds.

        Raises: InputError: something that was not published by lorafleet, or the folder cannot be written.
        """
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"cannot publish to {self.root}: it is a file; name a folder")
        self._try_to_write()
        if not self.root.is_dir() or not any(self.root.iterdir()):
            return PublishedState(None, None, None)
        folder = RunFolder(self.root)
        if not folder.publication.is_file():
            raise InputError(
                f"cannot publish to {self.root}: it is not empty and holds no publication.json, so it was not published by lorafleet; "
                "choose another folder"
            )
        publication = read_record(folder.publication, Publication)
        for path in (folder.publication.name, *publication.files):
            try:
                open_inside(self.root, path).close()
            except FileNotFoundError:
                pass  # somebody deleted it, and it is written again
            except OSError as error:
                raise InputError(
                    f"cannot publish to {self.root}: {error.filename}: {error.strerror}; choose another folder"
                ) from None
        foreign = sorted({*files_below(self.root)} - {*publication.files, folder.publication.name})
        if foreign:
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise InputError(
                f"cannot publish to {self.root}: publishing replaces the whole folder, so {', '.join(foreign[:5])}{more} would be lost; "
                "move that elsewhere, or choose another folder"
            )
        return PublishedState(None, folder, publication)

    def _try_to_write(self) -> None:
        parent = next(folder for folder in self.root.parents if folder.exists())
        try:
            TemporaryDirectory(dir=parent).cleanup()
        except OSError as error:
            raise InputError(
                f"cannot publish to {self.root}: {parent} cannot be written ({error.strerror}); choose another folder"
            ) from None

    def land(
        self, staged: RunFolder, publication: Publication, base: PublishedState, check: Callable[[Path], None]
    ) -> None:
        """Copy beside it, check the copy, and swap.

        Raises: VerificationError, LorafleetError: the copy is not what was staged, or failed; the folder is as it was.
        """
        beside = self.root.with_name(f".{self.root.name}.{secrets.token_hex(6)}.staging")
        try:
            shutil.copytree(staged.root, beside)
            check(beside)
            _swap(beside, self.root)
        except (VerificationError, InputError) as error:
            raise type(error)(f"{self.root} is left as it was: {error}") from error
        except OSError as error:
            raise LorafleetError(
                f"publishing run {publication.run_id} to {self.root} failed, and left it as it was: {error}"
            ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def settle(self, run_id: str, revision: str) -> None:
        """Nothing: a swap is done or not."""


def _swap(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    old = target.with_name(f".{target.name}.{secrets.token_hex(6)}.old")
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:  # an interrupt, too, must not leave the place empty
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def rollback(
    to: str, revision: str, *, encoder: str | None = None, offline: bool = False
) -> tuple[str, tuple[Verification, ...]]:
    """Make a repository's older state its newest one, by a commit that is verified first; returns its id.

    Args:
        to: ``hf:OWNER/NAME``.
        revision: A tag (``run-…``) or commit.
        encoder: As for ``verify``.
        offline: Never ask the Hub for an encoder.
    Raises:
        InputError: no such repository or revision.
        VerificationError: that state is damaged; the repository is as it was.
    """
    if not to.startswith("hf:"):
        raise InputError(f"{to}: only a repository has older states; expected hf:OWNER/NAME")
    verified: list[Verification] = []

    def check(root: Path) -> None:
        verified[:] = verify_folder(root, tasks=None, encoder=encoder, offline=offline)

    landed = HubRepository(to.removeprefix("hf:")).restore(revision, check)
    return landed, tuple(verified)
