"""Publish a finished run to a folder or the Hub. The target changes only after gate, staging and verification."""

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
from pipeline.history.tables import read_gate, write_gate
from pipeline.hub_address import repository_of
from pipeline.hub_client import repository_url
from pipeline.publishing.gate import evaluate_gate
from pipeline.publishing.hub import HubRepository, MovedError
from pipeline.publishing.publication import Candidate, PublishedState, files_below, read_candidate, stage
from pipeline.publishing.verify import Verification, verify_folder
from pipeline.records import GateDecision, Publication
from pipeline.store.files import open_inside, read_record
from pipeline.store.lock import hold_run
from pipeline.store.run_folder import RunFolder


@dataclass(frozen=True)
class PublishResult:
    """Result of publishing a run."""

    to: str
    decisions: tuple[GateDecision, ...]
    verified: tuple[Verification, ...]
    """Verifications of the promoted adapters; empty if the target is unchanged."""
    num_files: int
    """Number of published files, ``publication.json`` included."""
    revision: str | None
    """Commit of the repository; None for a folder."""

    @property
    def url(self) -> str:
        """Address of the published folder or revision, for a browser."""
        repository = repository_of(self.to)
        if repository is None or self.revision is None:
            return Path(self.to).resolve().as_uri()
        return repository_url(repository, self.revision)

    @property
    def blocked(self) -> tuple[GateDecision, ...]:
        """Decisions that block an adapter."""
        return tuple(decision for decision in self.decisions if decision.decision == "block")


class Target(Protocol):
    """A place that adapters are published to."""

    def read(self) -> PublishedState:
        """Read the current state."""

    def land(
        self, staged: RunFolder, publication: Publication, base: PublishedState, check: Callable[[Path], None]
    ) -> str | None:
        """Replace the current state with the staged files, after they have passed the check.

        Returns: The new commit; None for a folder.
        """

    def settle(self, run_id: str, revision: str) -> None:
        """Complete the work that an interrupted ``land`` left unfinished."""


def publish(run: Path, config: PublishConfig, *, trust_remote_code: bool = False) -> PublishResult:
    """Publish the adapters of a finished run that the gate promotes. Published adapters of other MTEB
    tasks are kept.

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
    repository = repository_of(to)
    target: Target = (
        HubRepository(repository, private=config.private)
        if repository
        else PublishedFolder(Path(to).resolve(), candidate)
    )
    for is_last_try in (False, True):
        base = target.read()
        decisions = evaluate_gate(candidate, base, config.gate, to=to, repository=repository)
        try:
            published = _land(candidate, to, target, base, decisions)
        except MovedError as error:
            if is_last_try:
                raise LorafleetError(
                    f"{to} was changed by others twice while this run was being published; "
                    "nothing was published; try again"
                ) from error
        else:
            # Recorded last: the flow does not publish a run again once its decisions are recorded.
            _record(decisions, candidate.folder.gate, to=to)
            return published
    raise AssertionError("unreachable")


def _record(decisions: list[GateDecision], path: Path, *, to: str) -> None:
    """Write the decisions, replacing earlier ones about the same target. Those about other targets are kept.

    A repeated publish finds its own adapter. The decision that published it, with its figures, then stays.
    """
    earlier = read_gate(path) if path.is_file() else []
    others = [made for made in earlier if made.to != to]
    promoted: dict[tuple[str, str | None], GateDecision] = {
        (made.mteb_task, made.candidate_sha256): made
        for made in earlier
        if made.to == to and made.decision == "promote"
    }
    new = [
        promoted.get((made.mteb_task, made.published_sha256), made) if made.decision == "keep" else made
        for made in decisions
    ]
    write_gate([*others, *new], path)


def _land(
    candidate: Candidate, to: str, target: Target, base: PublishedState, decisions: list[GateDecision]
) -> PublishResult:
    promoted = [decision.mteb_task for decision in decisions if decision.decision == "promote"]
    if not promoted:
        existing = base.publication
        if existing is not None and existing.run_id == candidate.summary.run_id and base.revision is not None:
            target.settle(existing.run_id, base.revision)
        num_files = len(existing.files) + 1 if existing else 0
        return PublishResult(to, tuple(decisions), (), num_files, base.revision)
    config = candidate.manifest.config
    verified: list[Verification] = []

    def check(root: Path) -> None:
        verified[:] = verify_folder(root, tasks=promoted, encoder=config.encoder, offline=config.data.offline)

    with TemporaryDirectory(prefix="lorafleet-publish-") as folder:
        staging = RunFolder(Path(folder) / "staged")  # a temporary folder itself is closed to other users
        staging.root.mkdir()
        publication = stage(candidate, promoted, base, staging)
        revision = target.land(staging, publication, base, check)
    return PublishResult(to, tuple(decisions), tuple(verified), len(publication.files) + 1, revision)


class PublishedFolder:
    """A folder that adapters are published to. It is replaced as a whole, or left unchanged."""

    def __init__(self, root: Path, candidate: Candidate) -> None:
        """Take the folder, reading nothing yet.

        Raises:
            InputError: the folder contains the run, or is inside it.
        """
        run = candidate.folder.root
        if root == run or root in run.parents or run in root.parents:
            raise InputError(f"cannot publish {run} to {root}: one is inside the other; choose another folder")
        self.root = root

    def read(self) -> PublishedState:
        """Read the publication in the folder.

        Raises:
            InputError: the folder holds something that lorafleet did not publish, or cannot be written.
        """
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"cannot publish to {self.root}: it is a file; name a folder")
        self._try_to_write()
        if not self.root.is_dir() or not any(self.root.iterdir()):
            return PublishedState(None, None, None)
        folder = RunFolder(self.root)
        if not folder.publication.is_file():
            raise InputError(
                f"cannot publish to {self.root}: it is not empty and holds no publication.json, "
                "so it was not published by lorafleet; choose another folder"
            )
        publication = read_record(folder.publication, Publication)
        for path in (folder.publication.name, *publication.files):
            try:
                open_inside(self.root, path).close()
            except FileNotFoundError:
                pass  # a deleted file is written again
            except OSError as error:
                raise InputError(
                    f"cannot publish to {self.root}: {error.filename}: {error.strerror}; choose another folder"
                ) from None
        foreign = sorted({*files_below(self.root)} - {*publication.files, folder.publication.name})
        if foreign:
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise InputError(
                f"cannot publish to {self.root}: publishing replaces the whole folder, "
                f"so {', '.join(foreign[:5])}{more} would be lost; move them elsewhere, or choose another folder"
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
        """Copy the staged files next to the folder, check the copy, and swap the two.

        Raises:
            VerificationError: the copy differs from the staged files; the folder is unchanged.
            LorafleetError: copying failed; the folder is unchanged.
        """
        copy = self.root.with_name(f".{self.root.name}.{secrets.token_hex(6)}.staging")
        try:
            shutil.copytree(staged.root, copy)
            check(copy)
            _swap(copy, self.root)
        except (VerificationError, InputError) as error:
            raise type(error)(f"{self.root} is unchanged: {error}") from error
        except OSError as error:
            raise LorafleetError(
                f"publishing run {publication.run_id} to {self.root} failed, and left it unchanged: {error}"
            ) from error
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def settle(self, run_id: str, revision: str) -> None:
        """Do nothing: a swap leaves no work unfinished."""


def _swap(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    old = target.with_name(f".{target.name}.{secrets.token_hex(6)}.old")
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:  # also on an interrupt: the target must never stay empty
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def rollback(
    to: str, revision: str, *, encoder: str | None = None, offline: bool = False
) -> tuple[str, tuple[Verification, ...]]:
    """Restore an older state of a repository by a new commit, verified before it lands on ``main``.

    Args:
        to: ``hf:OWNER/NAME``.
        revision: A tag (``run-…``) or commit.
        encoder: As for ``verify``.
        offline: Whether to load the encoder without asking the Hub.
    Returns:
        Id of the new commit, and the verification of each adapter.
    Raises:
        InputError: ``to`` is a folder, or the repository or revision does not exist.
        VerificationError: the older state is damaged; the repository is unchanged.
    """
    repository = repository_of(to)
    if repository is None:
        raise InputError(f"{to}: only a repository keeps older states; expected hf:OWNER/NAME")
    verified: list[Verification] = []

    def check(root: Path) -> None:
        verified[:] = verify_folder(root, tasks=None, encoder=encoder, offline=offline)

    landed = HubRepository(repository).restore(revision, check)
    return landed, tuple(verified)
