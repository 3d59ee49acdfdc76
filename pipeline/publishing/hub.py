"""Writer to the Hugging Face Hub: one verified commit, or nothing. No other module writes to the Hub.

The token is read by huggingface_hub alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ParamSpec, TypeVar

from pipeline.errors import InputError, LorafleetError, VerificationError
from pipeline.hub_client import ask, download
from pipeline.hub_errors import TOKEN_ADVICE, hub_status
from pipeline.publishing.publication import PublishedState, files_below
from pipeline.records import Publication
from pipeline.store.files import read_record
from pipeline.store.run_folder import RunFolder

P = ParamSpec("P")
T = TypeVar("T")
Check = Callable[[Path], None]
"""Check of a downloaded repository, which raises what is wrong with it."""

_CREATED_BY_HUB = (".gitattributes",)  # in every new repository
_MISSING, _MOVED = 404, 412


class MovedError(LorafleetError):
    """Another client has changed the repository since it was read."""


class HubRepository:
    """A model repository that adapters are published to."""

    def __init__(self, name: str, *, private: bool = False) -> None:
        """Take the repository, sending no request yet.

        Args:
            name: ``OWNER/NAME``.
            private: Whether to make the repository private if it does not exist yet.
        """
        from huggingface_hub import HfApi

        self.name = name
        self.private = private
        self._api = HfApi(library_name="lorafleet")

    def read(self) -> PublishedState:
        """Read the state of ``main``. Only JSON files are downloaded.

        Raises:
            InputError: lorafleet did not publish the repository, or it may not be read.
            LorafleetError: the Hub cannot be reached.
        """
        head = self._head()
        if head is None:
            return PublishedState(None, None, None)
        files = self._blobs(head)
        if RunFolder(Path()).publication.name not in files:
            foreign = sorted(set(files) - set(_CREATED_BY_HUB))
            if foreign:
                raise InputError(
                    f"cannot publish to hf:{self.name}: it holds {', '.join(foreign[:5])} but no publication.json, "
                    "so it was not published by lorafleet; choose another repository"
                )
            return PublishedState(head, None, None)
        folder = RunFolder(download(self.name, head, patterns=["*.json"]))
        return PublishedState(head, folder, read_record(folder.publication, Publication))

    def check_access(self) -> None:
        """Check before a training whether publishing can succeed at all.

        Raises:
            InputError: the token is missing or refused, or lorafleet did not publish the repository.
            LorafleetError: the Hub cannot be reached.
        """
        from huggingface_hub import get_token

        if get_token() is None:
            raise InputError(f"hf:{self.name}: no token to publish with{TOKEN_ADVICE}")
        self._ask(self._api.whoami)
        self.read()

    def land(self, staged: RunFolder, publication: Publication, base: PublishedState, check: Check) -> str:
        """Commit to a staging branch, check that commit, then commit the same files to ``main``.

        Only changed files are uploaded. After an interrupt ``main`` is either unchanged or complete, and a second call
        finishes the rest.

        Args:
            staged: Folder with the files.
            publication: Content of its ``publication.json``.
            base: State of ``main``, as read before.
            check: Check of the staging branch's files, downloaded again.
        Returns:
            Id of the new commit on ``main``.
        Raises:
            MovedError: ``main`` is no longer at ``base``; nothing was changed.
            VerificationError: the files on the Hub differ from the staged ones; ``main`` is unchanged.
            LorafleetError: the Hub refused the commit, or could not be reached; ``main`` is unchanged.
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
        """Tag the commit and delete the staging branch of a publish interrupted after its commit to ``main``."""
        tag = f"run-{run_id}"
        # An existing tag names a verified state. ``main`` may have been changed by hand since.
        if tag not in self._tags():
            self._tag(tag, revision)
        self._drop_branch(f"staging/{run_id}")

    def restore(self, revision: str, check: Check) -> str:
        """Commit the files of an older revision to ``main``, checked as in ``land``.

        Args:
            revision: Tag or commit to restore.
            check: Check of the restored files.
        Returns:
            Id of the new commit.
        Raises:
            InputError: the repository or the revision does not exist.
            VerificationError, LorafleetError: as ``land``.
        """
        head, wanted = self._head(), self._commit_of(revision)
        if head is None or wanted is None:
            raise InputError(
                f"hf:{self.name}: there is no {'repository of that name' if head is None else f'revision {revision}'}"
            )
        current, restored = self._blobs(head), self._blobs(wanted)
        with TemporaryDirectory(prefix="lorafleet-rollback-") as cache:
            root = download(self.name, wanted, cache=Path(cache))
            add = {path: root / path for path, blob in restored.items() if current.get(path) != blob}
            delete = sorted(set(current) - set(restored))
            message, branch = f"Roll back to {revision} ({wanted[:12]})", f"staging/rollback-{wanted[:12]}"
            landed = self._advance(add, delete, head, branch=branch, message=message, check=check)
        with self._after(landed):
            self._drop_branch(branch)
        return landed

    def _advance(
        self, add: dict[str, Path], delete: Sequence[str], head: str, *, branch: str, message: str, check: Check
    ) -> str:
        """Make two equal commits: a checked one on a branch, which the caller deletes, and then one on ``main``."""
        self._drop_branch(branch)
        self._ask(self._api.create_branch, self.name, branch=branch, revision=head, exist_ok=True)
        staged = self._commit(add, delete, head, branch=branch, message=message)
        blobs = self._blobs(staged)
        with TemporaryDirectory(prefix="lorafleet-verify-") as cache:
            try:
                check(download(self.name, staged, cache=Path(cache)))
            except (VerificationError, InputError) as error:
                self._drop_branch(branch)
                raise type(error)(f"hf:{self.name} is unchanged: {error}") from error
        try:
            landed = (
                head if blobs == self._blobs(head) else self._commit(add, delete, head, branch="main", message=message)
            )
        except MovedError:
            self._drop_branch(branch)
            raise
        if self._blobs(landed) != blobs:
            raise VerificationError(
                f"hf:{self.name}: commit {landed} differs from the checked commit {staged}; roll back to {head}"
            )
        return landed

    @contextmanager
    def _after(self, landed: str) -> Iterator[None]:
        """While open, prefix errors with the fact that ``main`` has been changed nevertheless."""
        try:
            yield
        except LorafleetError as error:
            raise type(error)(
                f"main of hf:{self.name} is now at {landed}, verified, but the cleanup failed; try again: {error}"
            ) from error

    def _commit(self, add: dict[str, Path], delete: Sequence[str], parent: str, *, branch: str, message: str) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError

        def commit() -> str:
            # Every attempt needs new operations, because they remember what they have uploaded.
            operations: list[Any] = [CommitOperationAdd(path, str(file)) for path, file in add.items()]
            operations += [CommitOperationDelete(path) for path in delete]
            with warnings.catch_warnings():
                # The data files are two small tables.
                warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
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
            # If only the answer was lost, our commit is on the branch: one ahead of the parent, with this message.
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
        """Map the path of each file to the id of its content."""
        from huggingface_hub.hf_api import RepoFile

        def listed() -> dict[str, str]:
            tree = self._api.list_repo_tree(self.name, recursive=True, revision=revision)
            return {entry.path: entry.blob_id for entry in tree if isinstance(entry, RepoFile)}

        return self._ask(listed)

    def _tag(self, tag: str, revision: str) -> None:
        existing = self._tags()
        if tag in existing and existing[tag] != revision:
            self._delete(self._api.delete_tag, tag=tag)
        if existing.get(tag) != revision:
            self._ask(self._api.create_tag, self.name, tag=tag, revision=revision, exist_ok=True)

    def _tags(self) -> dict[str, str]:
        """Map the name of each tag to its commit."""
        return {ref.name: ref.target_commit for ref in self._ask(self._api.list_repo_refs, self.name).tags}

    def _drop_branch(self, branch: str) -> None:
        self._delete(self._api.delete_branch, branch=branch)

    def _delete(self, delete: Callable[..., None], **what: str) -> None:
        """Delete a branch or tag, which may no longer exist."""
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
