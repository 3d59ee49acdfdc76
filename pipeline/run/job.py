"""The job of a worker, without Ray: one MTEB task from data to a finished adapter, in stages that survive a kill."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.adapter.files import save_adapter
from pipeline.data.dataset import TaskData, load_data
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.files import find_encoder
from pipeline.errors import AdapterError, DataError, EncoderError
from pipeline.evaluation.classification import (
    AdapterEvaluation,
    Baselines,
    RowFacts,
    evaluate_adapter,
    evaluate_frozen,
)
from pipeline.inference.reference import find_adapters
from pipeline.inference.reload import check_reload
from pipeline.records import (
    AdapterRef,
    DataSummary,
    EpochRow,
    Progress,
    Runtime,
    ScoreRow,
    TaskResult,
    WarmStart,
)
from pipeline.run.baselines_file import BaselinesFile
from pipeline.run.plan import JobSpec
from pipeline.store.files import read_record, write_atomically
from pipeline.store.run_folder import RunFolder, TaskFolder, adapter_sha256
from pipeline.training.batches import LabelledTokens
from pipeline.training.objective import Classification
from pipeline.training.train import Training, train_adapter

_RELOADED_TEXTS = 32
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Tokenised:
    train: LabelledTokens
    validation: LabelledTokens
    test: LabelledTokens


class TaskJob:
    """Data and encoder of one MTEB task, with training and both evaluations.

    Finished stages are kept under ``<runs>/.work/<key>``, so a new worker, or a new run with the same key, resumes.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.config = spec.config
        self.work = Path(spec.runs) / ".work" / spec.key
        self.runtime = self._recorded_runtime()
        self.folder = RunFolder(Path(spec.runs) / spec.run_id).task(spec.mteb_task.name)
        self._baselines: Baselines | None = None
        self._training: Training | None = None
        self._seconds: dict[str, float] = {}

    def load(self) -> DataSummary:
        """Read and tokenise the data and load the encoder."""
        started = time.perf_counter()
        data, tokens = self._data, self._tokens
        self._seconds.setdefault("load", time.perf_counter() - started)
        return DataSummary(
            num_train=len(data.train_texts),
            num_validation=len(data.validation_texts),
            num_test=len(data.test_texts),
            label_names=data.label_names,
            num_overlap=data.num_overlap,
            num_empty_train=data.num_empty_train,
            num_empty_test=data.num_empty_test,
            num_truncated_train=int(tokens.train.tokens.truncated.sum() + tokens.validation.tokens.truncated.sum()),
            num_truncated_test=int(tokens.test.tokens.truncated.sum()),
            fingerprint=data.fingerprint,
            notes=data.notes,
            label_counts=tuple(np.bincount(data.train_labels, minlength=len(data.label_names)).tolist()),
            token_quantiles=tuple(
                np.quantile(tokens.train.tokens.lengths, (0.1, 0.5, 0.9), method="inverted_cdf").tolist()
            ),
            test_fingerprint=data.test_fingerprint,
        )

    def evaluate_frozen(self) -> tuple[ScoreRow, ...]:
        """Evaluate the frozen encoder. Computed once, even after a restart."""
        return self._frozen().rows

    def train(self, on_epoch: Callable[[EpochRow], None], on_progress: Callable[[Progress], None]) -> AdapterRef:
        """Train, resuming from the last finished epoch, and write the adapter's files."""
        training = self._trained(on_epoch, on_progress)
        meta = {
            "task": self.spec.mteb_task.name,
            "epochs": len(training.epochs),
            "best_epoch": training.best_epoch,
            "selected_on": training.selected_on,
            "learnt_validation": training.learnt_selection,
            "seed": self.config.train.seed,
            "run_id": self.spec.run_id,
        }
        return save_adapter(training.adapter, self.folder, meta=meta)

    def finish(self) -> TaskResult:
        """Evaluate the adapter, verify its files in a fresh process, and write the result.

        The result marks the MTEB task as finished.

        Raises: VerificationError: the saved adapter, loaded in a fresh process, differs from the trained one.
        """
        if (finished := self._finished()) is not None:
            return finished
        baselines = self._frozen()
        training = self._trained(lambda row: None, lambda progress: None)
        adapter = self.train(lambda row: None, lambda progress: None)
        started = time.perf_counter()
        facts = self._facts()
        evaluation = evaluate_adapter(
            facts, self.config.evaluate, training=training, adapter_sha256=adapter.sha256, baselines=baselines
        )
        reloaded_texts = self._data.test_texts[:_RELOADED_TEXTS]
        is_trained = training.best_epoch > 0
        check_reload(
            training.adapter, self.folder, reloaded_texts, is_trained=is_trained, offline=self.config.data.offline
        )
        _LOG.info("evaluated and reloaded in a fresh process in %.1f s", time.perf_counter() - started)
        write_atomically(self.folder.calibration, evaluation.calibration.model_dump_json(indent=1))
        write_atomically(self.folder.few_shot, json.dumps(baselines.few_shot | evaluation.few_shot, indent=1))
        result = self._result(training, adapter, baselines, evaluation, started=started)
        write_atomically(self.folder.result, result.model_dump_json(indent=1))
        shutil.rmtree(self.work, ignore_errors=True)
        return result

    def _result(
        self,
        training: Training,
        adapter: AdapterRef,
        baselines: Baselines,
        evaluation: AdapterEvaluation,
        *,
        started: float,
    ) -> TaskResult:
        reloaded_texts = self._data.test_texts[:_RELOADED_TEXTS]
        return TaskResult(
            mteb_task=self._data.task,
            key=self.spec.key,
            run_id=self.spec.run_id,
            data=self.load(),
            encoder=self._encoder.ref,
            runtime=self._encoder.runtime,
            adapter=adapter,
            num_lora_parameters=sum(p.numel() for p in training.adapter.lora_parameters),
            num_head_parameters=sum(p.numel() for p in training.adapter.classifier.parameters()),
            merge_difference=training.adapter.merge_difference(self._encoder.tokenise(reloaded_texts)),
            probe_c=baselines.probe_c,
            epochs=training.epochs,
            best_epoch=training.best_epoch,
            selected_on=training.selected_on,
            refitted=training.refitted,
            start_accuracy=training.start_score,
            warm_start=WarmStart(sha256=self.spec.warm_start.sha256) if self.spec.warm_start else None,
            scores=(*baselines.rows, *evaluation.rows),
            values=(*baselines.values, *evaluation.values),
            comparison=evaluation.comparison,
            calibration=evaluation.calibration,
            confusions=evaluation.confusions,
            busy_seconds=sum(self._seconds.values()) + time.perf_counter() - started,
        )

    def _finished(self) -> TaskResult | None:
        """Result of a worker that died between its last file and its answer. None if there is none."""
        try:
            result = read_record(self.folder.result, TaskResult)
            is_this = result.key == self.spec.key and adapter_sha256(self.folder.root) == result.adapter.sha256
        except (DataError, AdapterError):
            return None
        return result if is_this else None

    def _recorded_runtime(self) -> Runtime:
        """Runtime that this job was started with. For a new job, record the current one."""
        path = self.work / "runtime.json"
        if not path.exists():
            write_atomically(path, self.spec.runtime.model_dump_json())
        return read_record(path, Runtime)

    @cached_property
    def _data(self) -> TaskData:
        data = load_data(self.spec.mteb_task, config=self.config.train, offline=self.config.data.offline)
        if data.fingerprint != self.spec.fingerprint:
            raise DataError(
                f"{self.spec.mteb_task.name}: the data have changed since this run checked them; start it again"
            )
        return data

    @cached_property
    def _encoder(self) -> Encoder:
        files = find_encoder(self.config.encoder, offline=self.config.data.offline)
        if files.ref.revision != self.spec.encoder_revision:
            change = f"is {files.ref.revision} now, and was {self.spec.encoder_revision} when this run checked it"
            raise EncoderError(f"encoder {self.config.encoder.name}: {change}; start it again")
        return Encoder(files, self.config.encoder, self.runtime)

    @cached_property
    def _tokens(self) -> _Tokenised:
        data, encoder = self._data, self._encoder
        return _Tokenised(
            LabelledTokens(encoder.tokenise(data.train_texts), data.train_labels),
            LabelledTokens(encoder.tokenise(data.validation_texts), data.validation_labels),
            LabelledTokens(encoder.tokenise(data.test_texts), data.test_labels),
        )

    def _facts(self) -> RowFacts:
        truncated = int(self._tokens.test.tokens.truncated.sum())
        return RowFacts(self.spec.run_id, self._data, self._encoder, truncated, self.config.train.seed)

    def _frozen(self) -> Baselines:
        if self._baselines is None:
            assert self._training is None, "the frozen encoder must be evaluated before an adapter is attached"
            file = BaselinesFile(self.work / "frozen.safetensors")
            measured = file.read()
            if measured is None:
                started = time.perf_counter()
                tokens = self._tokens.train.tokens
                baselines = evaluate_frozen(
                    self._facts(), self.config.evaluate, tokens=tokens, refit=self.config.train.refit
                )
                measured = baselines, time.perf_counter() - started
                file.write(*measured)
                _LOG.info("evaluated the frozen encoder in %.1f s, probe with C = %g", measured[1], baselines.probe_c)
            else:
                _LOG.info("the frozen encoder was already evaluated, in %.1f s", measured[1])
            self._baselines, self._seconds["frozen"] = measured
            run_id = self.spec.run_id
            self._baselines = replace(
                self._baselines,
                rows=tuple(row.changed(run_id=run_id) for row in self._baselines.rows),
                values=tuple(row.changed(run_id=run_id) for row in self._baselines.values),
            )
        return self._baselines

    @property
    def _checkpoint(self) -> Path:
        return self.work / "checkpoint.safetensors"

    def _trained(self, on_epoch: Callable[[EpochRow], None], on_progress: Callable[[Progress], None]) -> Training:
        if self._training is None:
            baselines, train = self._frozen(), self.config.train
            started = time.perf_counter()
            tokens = self._tokens
            action = "resuming from the last finished epoch" if self._checkpoint.exists() else "training"
            _LOG.info(
                "%s: %d texts, at most %d epochs", action, len(tokens.train.labels), self.spec.mteb_task.max_epochs
            )
            selection = tokens.test if train.early_stopping_split == "test" else tokens.validation
            objective = Classification(
                tokens.train,
                selection if len(selection.labels) else None,
                label_names=self._data.label_names,
                config=train,
                head_start=baselines.head_start if train.head_init == "probe" else None,
            )
            self._training = train_adapter(
                objective,
                self._encoder,
                adapter_config=self.config.adapter,
                train_config=train,
                max_epochs=self.spec.mteb_task.max_epochs,
                warm_start=self._warm_start(),
                checkpoint=self._checkpoint,
                on_epoch=on_epoch,
                on_progress=on_progress,
            )
            self._seconds["train"] = max(
                time.perf_counter() - started, sum(row.seconds for row in self._training.epochs)
            )
        return self._training

    def _warm_start(self) -> TaskFolder | None:
        start = self.spec.warm_start
        if start is None:
            return None
        (adapter,) = find_adapters([start.path], offline=self.config.data.offline)
        if adapter.sha256 != start.sha256:
            raise AdapterError(f"adapter {start.path} has changed since this run checked it; start it again")
        return adapter.folder
