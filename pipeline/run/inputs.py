"""Inputs of a worker's job: what it was told to do, the encoder, and the adapter to start from."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from pipeline.encoder.encoder import Encoder
from pipeline.encoder.files import find_encoder
from pipeline.errors import AdapterError, DataError, EncoderError
from pipeline.inference.reference import find_task_folder
from pipeline.records import Runtime
from pipeline.run.plan import JobSpec
from pipeline.store.files import read_record, write_atomically
from pipeline.store.run_folder import TaskFolder, adapter_sha256


class JobInputs:
    """The parts that every task family needs. The encoder is loaded at first use."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.config = spec.config
        self.work = Path(spec.runs) / ".work" / spec.key
        """Folder of the finished stages, by which a new worker resumes."""
        self.runtime = self._recorded_runtime()
        self.seconds: dict[str, float] = {}
        """Stage -> computing time, also of earlier workers."""

    @cached_property
    def encoder(self) -> Encoder:
        """The frozen encoder.

        Raises: EncoderError: it has changed since the run checked it, or cannot be loaded.
        """
        files = find_encoder(self.config.encoder, offline=self.config.data.offline)
        if files.ref.revision != self.spec.encoder_revision:
            change = f"is {files.ref.revision} now, and was {self.spec.encoder_revision} when this run checked it"
            raise EncoderError(f"encoder {self.config.encoder.name}: {change}; start it again")
        return Encoder(files, self.config.encoder, self.runtime)

    def warm_start(self) -> TaskFolder | None:
        """Folder of the adapter to start from; None to start from scratch.

        Raises: AdapterError: it has changed since the run checked it.
        """
        start = self.spec.warm_start
        if start is None:
            return None
        folder = find_task_folder(start.path, offline=self.config.data.offline)
        if adapter_sha256(folder.root) != start.sha256:
            raise AdapterError(f"adapter {start.path} has changed since this run checked it; start it again")
        return folder

    def check_fingerprint(self, fingerprint: str) -> None:
        """Check that the data are those that the run has checked.

        Raises: DataError: they differ.
        """
        if fingerprint != self.spec.fingerprint:
            raise DataError(
                f"{self.spec.mteb_task.name}: the data have changed since this run checked them; start it again"
            )

    def _recorded_runtime(self) -> Runtime:
        """Runtime that this job was started with. For a new job, record the current one."""
        path = self.work / "runtime.json"
        if not path.exists():
            write_atomically(path, self.spec.runtime.model_dump_json())
        return read_record(path, Runtime)
