"""Every path of a run, and the two ways its files are written and read. Knows nothing of what the files mean.

A folder may come from a stranger. So a file is read only if it is a regular one, and only up to a size.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.errors import AdapterError, ConfigError, DataError, InputError

R = TypeVar("R", bound=BaseModel)

LARGEST_RECORD_BYTES = 8 * 1024**2
"""The logits of 32 texts for 10,000 classes take 7 MB."""
LARGEST_WEIGHTS_BYTES = 4 * 1024**3
"""Rank 256 on every linear layer of an encoder of 7 billion parameters takes 3 GB."""


@dataclass(frozen=True)
class TaskFolder:
    """The files of one MTEB task, in the source document's layout and in the formats that others load."""

    root: Path

    @property
    def lora_adapter_pt(self) -> Path:
        """Tensors ``lora_{i}_A`` (in, rank), ``lora_{i}_B`` (rank, out) and ``lora_{i}_scaling``."""
        return self.root / "lora_adapter.pt"

    @property
    def classifier_head_pt(self) -> Path:
        """State of ``Sequential(Dropout, Linear)``."""
        return self.root / "classifier_head.pt"

    @property
    def meta(self) -> Path:
        """What is needed to attach the two files above by hand."""
        return self.root / "meta.json"

    @property
    def adapter_weights(self) -> Path:
        """The adapter as PEFT loads it."""
        return self.root / "adapter_model.safetensors"

    @property
    def adapter_config(self) -> Path:
        """PEFT's configuration of the adapter."""
        return self.root / "adapter_config.json"

    @property
    def head(self) -> Path:
        """The head's weight and bias."""
        return self.root / "head.safetensors"

    @property
    def labels(self) -> Path:
        """Label names in the order of the head's outputs."""
        return self.root / "labels.json"

    @property
    def calibration(self) -> Path:
        """A ``Calibration`` record."""
        return self.root / "calibration.json"

    @property
    def probe(self) -> Path:
        """A ``Probe`` record: what the adapter says of 32 texts."""
        return self.root / "probe.json"

    @property
    def few_shot(self) -> Path:
        """mteb's own results of the few-shot columns: column -> its ``TaskResult`` as JSON."""
        return self.root / "few_shot.json"

    @property
    def result(self) -> Path:
        """A ``TaskResult`` record, written last: with it the MTEB task is finished. Published without its local paths."""
        return self.root / "result.json"

    def published(self, *, has_head: bool = True) -> tuple[Path, ...]:
        """The files that are published as they are.

        Args:
            has_head: An adapter without a head has no file of one.
        """
        of_head = (self.classifier_head_pt, self.head, self.labels, self.calibration) if has_head else ()
        pairs = (self.lora_adapter_pt, self.meta, self.adapter_weights, self.adapter_config, self.probe, self.few_shot)
        return (*pairs, *of_head)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; a published repository has the same layout, less what stays at home."""

    root: Path

    @property
    def manifest(self) -> Path:
        """Written last: a folder with a manifest is a finished run, one without may be deleted."""
        return self.root / "manifest.json"

    @property
    def config(self) -> Path:
        """The whole configuration. May name local paths, so it is not published."""
        return self.root / "config.toml"

    @property
    def results(self) -> Path:
        """A ``ClassificationResults`` record."""
        return self.root / "classification_results.json"

    @property
    def publication(self) -> Path:
        """A ``Publication`` record; only in what was published."""
        return self.root / "publication.json"

    @property
    def mteb_results(self) -> Path:
        """The few-shot results as mteb's ``ResultCache`` has them; only in what was published."""
        return self.root / "mteb_results"

    @property
    def gate(self) -> Path:
        """One row per MTEB task that the promotion gate looked at; only where the run was published."""
        return self.metrics / "gate.parquet"

    @property
    def readme(self) -> Path:
        """The model card."""
        return self.root / "README.md"

    @property
    def report(self) -> Path:
        """The report as one HTML page."""
        return self.root / "report.html"

    @property
    def metrics(self) -> Path:
        """Folder of the tables."""
        return self.root / "metrics"

    @property
    def scores(self) -> Path:
        """One row per MTEB task and column of the score table."""
        return self.metrics / "scores.parquet"

    @property
    def values(self) -> Path:
        """One row per measured number. Older runs have none."""
        return self.metrics / "values.parquet"

    @property
    def epochs(self) -> Path:
        """One row per MTEB task and epoch."""
        return self.metrics / "epochs.parquet"

    @property
    def mteb_tasks(self) -> Path:
        """One row per MTEB task: its data and what it cost. Says how frequent each label is, so it is not published."""
        return self.metrics / "mteb_tasks.parquet"

    def task(self, name: str) -> TaskFolder:
        """The folder of one MTEB task.

        Raises: ConfigError: the name is taken by a file or folder of the run itself, or is not one folder name.
        """
        taken = {
            p.name.lower()
            for p in (self.manifest, self.config, self.publication, *self.published(), self.metrics, self.mteb_results)
        }
        if name.lower() in taken or name in ("", ".", "..") or Path(name).name != name:
            raise ConfigError(
                f"an MTEB task cannot be called {name!r}: a run folder needs that name for itself; choose another"
            )
        return TaskFolder(self.root / name)

    def published(self) -> tuple[Path, ...]:
        """The files beside the task folders that leave the run folder when it is published."""
        return (self.readme, self.results, self.report, self.scores, self.epochs)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is either old or new, never half; makes its folder. Text is written as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(path: Path, record_type: type[R], *, fault: type[InputError] = DataError) -> R:
    """Read a JSON file as the record it was written from.

    Raises: ``fault``: the file is missing, cannot be read, or does not hold such a record.
    """
    try:
        return parse_record(read_file(path, at_most=LARGEST_RECORD_BYTES), record_type, path, fault=fault)
    except FileNotFoundError:
        raise fault(f"{path} is missing; expected a {record_type.__name__} as JSON") from None
    except OSError as error:
        raise fault(f"{path} cannot be read: {error.strerror}") from None


def parse_record(content: bytes, record_type: type[R], path: Path, *, fault: type[InputError] = DataError) -> R:
    """The record that a file holds, read before.

    Raises: ``fault``: it holds none of this type.
    """
    try:
        return record_type.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:200]
        raise fault(
            f"{path} is damaged, or was written by another version: expected a {record_type.__name__}; "
            f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')[:300]}"
        ) from None


def read_file(path: Path, *, at_most: int) -> bytes:
    """The bytes of a regular file.

    Raises: OSError: it is missing, a folder, a pipe or a device, or has more bytes than ``at_most``.
    """
    with open_regular(path) as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise OSError(errno.EFBIG, f"it has more than {at_most:,} bytes", str(path))
    return content


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. A pipe would be waited for and a device has no end, so neither is opened.

    Raises: OSError: it is missing, or anything else than a regular file.
    """
    return _open(path, path, follow=True)


def open_inside(root: Path, path: str) -> BinaryIO:
    """Open a regular file that lies in a folder itself: neither it nor a folder on the way to it is a symbolic link.

    Raises: OSError: it is missing, not a regular file, or reached by a link.
    """
    *folders, name = path.split("/")
    with ExitStack() as stack:
        place = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, place)
        for depth, part in enumerate(folders, start=1):
            _check_kind(
                os.stat(part, dir_fd=place, follow_symlinks=False), stat.S_IFDIR, root.joinpath(*folders[:depth])
            )
            place = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            stack.callback(os.close, place)
        return _open(name, root / path, follow=False, dir_fd=place)


def _open(name: str | Path, path: Path, *, follow: bool, dir_fd: int | None = None) -> BinaryIO:
    _check_kind(os.stat(name, dir_fd=dir_fd, follow_symlinks=follow), stat.S_IFREG, path)
    # What lies there may have been replaced since: a pipe is not waited for, a link not followed, and what was opened is looked at.
    file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW), dir_fd=dir_fd)
    try:
        _check_kind(os.fstat(file), stat.S_IFREG, path)
    except OSError:
        os.close(file)
        raise
    return os.fdopen(file, "rb")


def copy_inside(root: Path, path: str, target: Path) -> None:
    """Copy a file that ``open_inside`` opens; makes its folder.

    Raises: OSError: as ``open_inside``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_inside(root, path) as source, target.open("xb") as copy:
        shutil.copyfileobj(source, copy)


_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
}


def _check_kind(found: os.stat_result, expected: int, path: Path) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != expected:
        raise OSError(
            errno.EINVAL, f"it is {_KINDS.get(kind, 'a device or socket')}, not {_KINDS[expected]}", str(path)
        )


def adapter_sha256(folder: Path) -> str:
    """sha256 over the bytes of ``adapter_model.safetensors``, then ``head.safetensors``; the identity of an adapter.

    A folder with neither a head nor labels is an adapter without a head: then the first file counts alone.

    Raises: AdapterError: one of the two files is missing or cannot be read.
    """
    digest, files = hashlib.sha256(), TaskFolder(folder)
    has_head = os.path.lexists(files.head) or os.path.lexists(files.labels)
    for path in (files.adapter_weights, *((files.head,) if has_head else ())):
        try:
            add_file(digest, path)
        except OSError as error:
            raise AdapterError(
                f"{path} cannot be read ({error.strerror}); an adapter needs both its weights and its head"
            ) from None
    return digest.hexdigest()


def add_file(digest: hashlib._Hash, path: Path) -> None:
    """Add the bytes of a regular file to a hash.

    Raises: OSError: as ``open_regular``, or it is larger than an adapter's files can be.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_WEIGHTS_BYTES:
            raise OSError(errno.EFBIG, f"it has more than {LARGEST_WEIGHTS_BYTES:,} bytes", str(path))
        while chunk := file.read(1 << 20):
            digest.update(chunk)
