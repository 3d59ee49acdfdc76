"""The only writer to the Hugging Face Hub: one verified commit, or nothing. The token stays with huggingface_hub."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ParamSpec, TypeVar

from pipeline.errors import InputError, LorafleetError, VerificationError, refused_by_machine
from pipeline.hub_errors import TOKEN_ADVICE, hub_error, hub_faults, hub_said, hub_status
from pipeline.publishing.publication import PublishedState, files_below
from pipeline.records import Publication
from pipeline.store.run_folder import RunFolder, read_record

P = ParamSpec("P")
T = TypeVar("T")
Check = Callable[[Path], None]
"""Raises what is wrong with a downloaded repository."""

_PATIENT_WITH = (429, 500, 502, 503, 504)
_ATTEMPTS, _FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 6, 1.0, 30.0
_NOT_OURS = (".gitattributes",)  # the Hub puts it into every new repository
_MISSING, _MOVED = 404, 412


class MovedError(LorafleetError):
    """Somebody else has changed the repository since it was read."""


class HubRepository:
    """A model repository that adapters are published to."""

    def __init__(self, name: str, *, private: bool = False) -> None:
        """Ask nothing yet.

        Args:
            name: ``OWNER/NAME``.
            private: If it has to be made.
        """
        from huggingface_hub import HfApi

        self.name = name
        self.private = private
        self._api = HfApi(library_name="lorafleet")

    def read(self) -> PublishedState:
        """What ``main`` holds; JSON files only.

        Raises: InputError: it was not published by lorafleet, or may not be read.
        """
        head = self._head()
        if head is None:
            return PublishedState(None, None, None)
        files = self._blobs(head)
        if RunFolder(Path()).publication.name not in files:
            foreign = sorted(set(files) - set(_NOT_OURS))
            if foreign:
                raise InputError(
                    f"cannot publish to hf:{self.name}: it holds {', '.join(foreign[:5])} but no publication.json, so it was not published "
                    "by lorafleet; choose another repository"
                )
            return PublishedState(head, None, None)
        folder = RunFolder(download(self.name, head, patterns=["*.json"]))
        return PublishedState(head, folder, read_record(folder.publication, Publication))

    def check_access(self) -> None:
        """Look, before hours of training, whether publishing can work at all.

        Raises:
            InputError: no token, a wrong one, or a repository that was not published by lorafleet.
            LorafleetError: the Hub cannot be reached.
        """
        from huggingface_hub import get_token

        if get_token() is None:
            raise InputError(f"hf:{self.name}: no token to publish with{TOKEN_ADVICE}")
        self._ask(self._api.whoami)
        self.read()

    def land(self, staged: RunFolder, publication: Publication, base: PublishedState, check: Check) -> str:
        """Commit to a branch of its own, check that commit, then make it ``main``'s next one; returns its id.

        Only files that differ travel. Interrupted anywhere, ``main`` is as it was or has all of it, and the same call ends what is missing.

        Raises:
            MovedError: ``main`` is no longer at ``base``; nothing was changed.
            VerificationError: what arrived is not what was sent; ``main`` is as it was.
            LorafleetError: the Hub refused, or could not be reached; ``main`` is as it was.
        """
        head = base.revision or self._make()
        old = set(base.publication.files) & set(self._blobs(head)) if base.publication else set()
        add = {path: staged.root / path for path in files_below(staged.root)}
        delete = sorted(old - set(publication.files))
        message = f"Adapters of run {publication.run_id}: {', '.join(publication.adapters)}"
        branch = f"staging/{publication.run_id}"
        landed = self._advance(add, delete, head, branch=branch, message=message, check=check)
        with self._after(landed):
            self._drop_branch(branch)
            self._tag(f"run-{publication.run_id}", landed)
        return landed

    def settle(self, run_id: str, revision: str) -> None:
        """End what a publishing that was interrupted after its commit to ``main`` had left to do."""
        tag = f"run-{run_id}"
        if (
            tag not in self._tags()
        ):  # one that is there names a state that was verified; main may have been changed by hand since
            self._tag(tag, revision)
        self._drop_branch(f"staging/{run_id}")

    def restore(self, revision: str, check: Check) -> str:
        """A new commit on ``main`` with the files of an older one, checked as ``land`` does; returns its id.

        Raises:
            InputError: there is no such revision.
            LorafleetError: as ``land``.
        """
        head, wanted = self._head(), self._commit_of(revision)
        if head is None or wanted is None:
            raise InputError(
                f"hf:{self.name}: there is no {'repository of that name' if head is None else f'revision {revision}'}"
            )
        now, then = self._blobs(head), self._blobs(wanted)
        with TemporaryDirectory(prefix="lorafleet-rollback-") as cache:
            root = download(self.name, wanted, cache=Path(cache))
            add = {path: root / path for path, blob in then.items() if now.get(path) != blob}
            delete = sorted(set(now) - set(then))
            message, branch = f"Roll back to {revision} ({wanted[:12]})", f"staging/rollback-{wanted[:12]}"
            landed = self._advance(add, delete, head, branch=branch, message=message, check=check)
        with self._after(landed):
            self._drop_branch(branch)
        return landed

    def _advance(
        self, add: dict[str, Path], delete: Sequence[str], head: str, *, branch: str, message: str, check: Check
    ) -> str:
        """Two equal commits: one on a branch, which is checked and left to be dropped, and then one on ``main``."""
        self._drop_branch(branch)
        self._ask(self._api.create_branch, self.name, branch=branch, revision=head, exist_ok=True)
        staged = self._commit(add, delete, head, branch=branch, message=message)
        blobs = self._blobs(staged)
        with TemporaryDirectory(prefix="lorafleet-verify-") as cache:
            try:
                check(download(self.name, staged, cache=Path(cache)))
            except (VerificationError, InputError) as error:
                self._drop_branch(branch)
                raise type(error)(f"hf:{self.name} is left as it was: {error}") from error
        try:
            landed = (
                head if blobs == self._blobs(head) else self._commit(add, delete, head, branch="main", message=message)
            )
        except MovedError:
            self._drop_branch(branch)
            raise
        if self._blobs(landed) != blobs:
            raise VerificationError(
                f"hf:{self.name}: commit {landed} has other files than {staged}, which was checked; roll back to {head}"
            )
        return landed

    @contextmanager
    def _after(self, landed: str) -> Iterator[None]:
        """While open, an error says that ``main`` has been changed all the same."""
        try:
            yield
        except LorafleetError as error:
            raise type(error)(
                f"main of hf:{self.name} is at {landed} now, verified, but tidying up failed; try again: {error}"
            ) from error

    def _commit(self, add: dict[str, Path], delete: Sequence[str], parent: str, *, branch: str, message: str) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError

        def commit() -> str:
            # The operations remember what was uploaded, so every attempt needs its own.
            operations: list[Any] = [CommitOperationAdd(path, str(file)) for path, file in add.items()]
            operations += [CommitOperationDelete(path) for path in delete]
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="It seems that you are about to commit a data file"
                )  # two small tables
                return str(
                    self._api.create_commit(
                        self.name, operations, commit_message=message, parent_commit=parent, revision=branch
                    ).oid
                )

        try:
            return self._ask(commit)
        except LorafleetError as error:
            cause = error.__cause__
            if not isinstance(cause, HfHubHTTPError) or hub_status(cause) != _MOVED:
                raise
            # Our own commit, if its answer got lost: then the branch is one ahead of the parent and has this message.
            newest = self._ask(self._api.list_repo_commits, self.name, revision=branch)[:2]
            if [c.commit_id for c in newest[1:]] == [parent] and newest[0].title == message.splitlines()[0]:
                return str(newest[0].commit_id)
            raise MovedError(f"hf:{self.name}: {branch} has moved on from {parent}") from error

    def _head(self) -> str | None:
        return self._commit_of("main")

    def _commit_of(self, revision: str) -> str | None:
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        def find() -> str | None:
            try:
                return self._api.repo_info(self.name, revision=revision).sha
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None

        return self._ask(find)

    def _make(self) -> str:
        self._ask(self._api.create_repo, self.name, private=self.private, exist_ok=True)
        head = self._head()
        assert head is not None
        return head

    def _blobs(self, revision: str) -> dict[str, str]:
        """Path -> id of its content."""
        from huggingface_hub.hf_api import RepoFile

        def listed() -> dict[str, str]:
            tree = self._api.list_repo_tree(self.name, recursive=True, revision=revision)
            return {entry.path: entry.blob_id for entry in tree if isinstance(entry, RepoFile)}

        return self._ask(listed)

    def _tag(self, tag: str, revision: str) -> None:
        there = self._tags()
        if tag in there and there[tag] != revision:
            self._delete(self._api.delete_tag, tag=tag)
        if there.get(tag) != revision:
            self._ask(self._api.create_tag, self.name, tag=tag, revision=revision, exist_ok=True)

    def _tags(self) -> dict[str, str]:
        """Tag -> commit."""
        return {ref.name: ref.target_commit for ref in self._ask(self._api.list_repo_refs, self.name).tags}

    def _drop_branch(self, branch: str) -> None:
        self._delete(self._api.delete_branch, branch=branch)

    def _delete(self, delete: Callable[..., None], **what: str) -> None:
        """Delete what may be gone already."""
        from huggingface_hub.errors import HfHubHTTPError

        def gone() -> None:
            try:
                delete(self.name, **what)
            except HfHubHTTPError as error:
                if hub_status(error) != _MISSING:
                    raise

        self._ask(gone)

    def _ask(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return ask(f"hf:{self.name}", call, *args, **options)


def repository_url(name: str, revision: str) -> str:
    """Where a person looks at a revision of a repository."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}/tree/{revision}"


def download(name: str, revision: str, *, cache: Path | None = None, patterns: Sequence[str] | None = None) -> Path:
    """A repository's files at a revision; into an empty folder, or the Hub's own cache.

    Raises:
        VerificationError: it lists a file that is not there.
        LorafleetError: it cannot be read.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    def fetch() -> Path:
        try:
            return Path(
                snapshot_download(
                    name, revision=revision, cache_dir=cache, allow_patterns=list(patterns) if patterns else None
                )
            )
        except RemoteEntryNotFoundError as error:
            raise VerificationError(
                f"hf:{name}@{revision} lists a file that is not there: {hub_said(error)}"
            ) from error

    return ask(f"hf:{name}", fetch)


def ask(what: str, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Call the Hub, and again after a while where it is busy, broken or out of reach.

    Raises:
        InputError: it may not be read or written, or a file here may not.
        LorafleetError: it cannot be reached, or refused, or this machine's disk is full.
    """
    faults: tuple[type[Exception], ...] = (*hub_faults(), RuntimeError)
    wait = _FIRST_WAIT_SECONDS
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call(*args, **options)
        except faults as error:
            if type(error) is RuntimeError and not isinstance(error.__cause__, hub_faults()):
                raise  # huggingface_hub's word for an upload that failed has a cause
            for said in (error, error.__cause__):  # waiting makes no room on this disk, and gives no permission
                if isinstance(said, OSError) and (refused := refused_by_machine(said)):
                    raise type(refused)(f"{what}: {refused}") from error
            fault, status = hub_error(error, what), hub_status(error)
            if (
                attempt == _ATTEMPTS
                or isinstance(fault, InputError)
                or (status is not None and status not in _PATIENT_WITH)
            ):
                raise fault from error
            time.sleep(min(_retry_after(error) or wait, _LONGEST_WAIT_SECONDS))
            wait *= 2
    raise AssertionError("unreachable")


def _retry_after(error: BaseException) -> float | None:
    response: Any = getattr(error, "response", None)
    value = None if response is None else response.headers.get("Retry-After")
    return float(value) if value is not None and value.isdecimal() else None
