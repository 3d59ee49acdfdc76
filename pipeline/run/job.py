"""The job of a worker, without Ray: one MTEB task from data to a finished adapter, in stages that survive a kill."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.files import save_adapter
from pipeline.adapter.sided import SidedAdapter
from pipeline.errors import AdapterError, DataError
from pipeline.inference.reload import check_reload
from pipeline.printable import counted
from pipeline.records import SIDES, AdapterRef, DataSummary, EpochRow, Progress, TaskResult, ValueRow, WarmStart
from pipeline.run.classification_work import ClassificationWork
from pipeline.run.embedding_work import PairWork, SeparationWork
from pipeline.run.family import Evaluation, FamilyWork
from pipeline.run.inputs import JobInputs
from pipeline.run.plan import JobSpec
from pipeline.store.files import read_record, write_atomically
from pipeline.store.run_folder import RunFolder, TaskFolder, adapter_sha256
from pipeline.training.train import AdapterTraining, train_adapter

_LOG = logging.getLogger(__name__)


class TaskJob:
    """The stages of one MTEB task: load, measure the frozen encoder, train, evaluate.

    Finished stages are kept under ``<runs>/.work/<key>``, so a new worker, or a new run with the same key, resumes.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.config = spec.config
        self.inputs = JobInputs(spec)
        self.runtime = self.inputs.runtime
        self.folder = RunFolder(Path(spec.runs) / spec.run_id).task(spec.mteb_task.name)
        self.family = work_of(self.inputs)
        self._training: AdapterTraining | None = None

    def load(self) -> DataSummary:
        """Read and tokenise the data and load the encoder."""
        started = time.perf_counter()
        summary = self.family.load()
        self.inputs.seconds.setdefault("load", time.perf_counter() - started)
        return summary

    def evaluate_frozen(self) -> tuple[ValueRow, ...]:
        """Evaluate the frozen encoder. Computed once, even after a restart."""
        self._check_not_attached()
        return self.family.frozen()

    def train(self, on_epoch: Callable[[EpochRow], None], on_progress: Callable[[Progress], None]) -> AdapterRef:
        """Train, resuming from the last finished epoch, and write the adapter's files."""
        training = self._trained(on_epoch, on_progress)
        meta: dict[str, Any] = {
            "task": self.spec.mteb_task.name,
            "epochs": len(training.epochs),
            "best_epoch": training.best_epoch,
            "selected_on": training.selected_on,
            "learnt_validation": training.learnt_selection,
            "seed": self.config.train.seed,
            "run_id": self.spec.run_id,
        }
        if self.spec.mteb_task.objective != "classification":
            meta["objective"] = self.spec.mteb_task.objective
        if self.spec.mteb_task.prefixes is not None:
            meta["prefixes"] = self.spec.mteb_task.prefixes
        for adapter, folder in self._parts(training):
            ref = save_adapter(adapter, folder, meta=meta)
        return ref.changed(path=self.folder.root.name, sha256=adapter_sha256(self.folder.root))

    def finish(self) -> TaskResult:
        """Evaluate the adapter, verify its files in a fresh process, and write the result.

        The result marks the MTEB task as finished.

        Raises: VerificationError: the saved adapter, loaded in a fresh process, differs from the trained one.
        """
        if (finished := self._finished()) is not None:
            return finished
        training = self._trained(lambda row: None, lambda progress: None)
        adapter = self.train(lambda row: None, lambda progress: None)
        started = time.perf_counter()
        evaluation = self.family.evaluate(training, adapter, self.folder)
        texts, is_trained = self.family.texts_to_reload(), training.best_epoch > 0
        for part, folder in self._parts(training):
            check_reload(part, folder, texts, is_trained=is_trained, offline=self.config.data.offline)
        _LOG.info("evaluated and reloaded in a fresh process in %.1f s", time.perf_counter() - started)
        write_atomically(self.folder.few_shot, json.dumps(evaluation.few_shot, indent=1))
        result = self._result(training, adapter, evaluation, started=started)
        write_atomically(self.folder.result, result.model_dump_json(indent=1))
        shutil.rmtree(self.inputs.work, ignore_errors=True)
        return result

    def _parts(self, training: AdapterTraining) -> Iterator[tuple[Adapter, TaskFolder]]:
        """Yield each trained adapter, one or one per side, and its folder. Each is attached when it is yielded."""
        if isinstance(training.adapter, SidedAdapter):
            for side in SIDES:
                yield training.adapter.use(side), self.folder.side(side)
        else:
            yield training.adapter, self.folder

    def _result(
        self, training: AdapterTraining, adapter: AdapterRef, evaluation: Evaluation, *, started: float
    ) -> TaskResult:
        encoder, trained = self.inputs.encoder, training.adapter
        data, tokens = self.load(), encoder.tokenise(self.family.texts_to_reload())
        is_accuracy = training.selection_metric == "accuracy"
        return TaskResult(
            mteb_task=self.family.task,
            key=self.spec.key,
            run_id=self.spec.run_id,
            data=data.changed(notes=(*data.notes, *evaluation.notes)),
            encoder=encoder.ref,
            runtime=encoder.runtime,
            adapter=adapter,
            num_lora_parameters=sum(p.numel() for p in trained.encoder_parameters),
            num_head_parameters=0 if trained.head is None else sum(p.numel() for p in trained.head.parameters()),
            merge_difference=max(part.merge_difference(tokens) for part, _ in self._parts(training)),
            probe_c=evaluation.probe_c,
            epochs=training.epochs,
            best_epoch=training.best_epoch,
            selection_metric=training.selection_metric,
            selected_on=training.selected_on,
            refitted=training.refitted,
            start_accuracy=training.start_score if is_accuracy else None,
            start_score=None if is_accuracy else training.start_score,
            warm_start=WarmStart(sha256=self.spec.warm_start.sha256) if self.spec.warm_start else None,
            scores=evaluation.scores,
            values=evaluation.values,
            comparison=evaluation.comparison,
            differences=evaluation.differences,
            similarities=evaluation.similarities,
            calibration=evaluation.calibration,
            confusions=evaluation.confusions,
            busy_seconds=sum(self.inputs.seconds.values()) + time.perf_counter() - started,
        )

    def _finished(self) -> TaskResult | None:
        """Result of a worker that died between its last file and its answer. None if there is none."""
        try:
            result = read_record(self.folder.result, TaskResult)
            is_this = result.key == self.spec.key and adapter_sha256(self.folder.root) == result.adapter.sha256
        except (DataError, AdapterError):
            return None
        return result if is_this else None

    def _check_not_attached(self) -> None:
        assert self._training is None, "the frozen encoder must be evaluated before an adapter is attached"

    def _trained(
        self, on_epoch: Callable[[EpochRow], None], on_progress: Callable[[Progress], None]
    ) -> AdapterTraining:
        if self._training is None:
            self.family.frozen()
            started = time.perf_counter()
            objective, max_epochs = self.family.objective(), self.spec.mteb_task.max_epochs
            action = "resuming from the last finished epoch" if checkpoint_of(self.inputs).exists() else "training"
            examples, most = f"{objective.num_examples} {objective.examples}", counted(max_epochs, "epoch")
            _LOG.info("%s: %s, at most %s", action, examples, most)
            self._training = train_adapter(
                objective,
                self.inputs.encoder,
                adapter_config=self.config.adapter,
                train_config=self.config.train,
                max_epochs=max_epochs,
                warm_start=self.inputs.warm_start(),
                checkpoint=checkpoint_of(self.inputs),
                on_epoch=on_epoch,
                on_progress=on_progress,
            )
            epochs = sum(row.seconds for row in self._training.epochs)
            self.inputs.seconds["train"] = max(time.perf_counter() - started, epochs)
        return self._training


def checkpoint_of(inputs: JobInputs) -> Path:
    """File of the training, which any worker with the same key goes on from."""
    return inputs.work / "checkpoint.safetensors"


def work_of(inputs: JobInputs) -> FamilyWork:
    """Make the work of the task's family."""
    match inputs.spec.mteb_task.objective:
        case "classification":
            return ClassificationWork(inputs)
        case "separation":
            return SeparationWork(inputs)
        case _:
            return PairWork(inputs)
