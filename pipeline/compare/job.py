"""The job of a worker, without Ray: one arm from data to measured states, in steps that survive a kill."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.adapter.full_encoder import FullEncoder
from pipeline.adapter.head import Head
from pipeline.adapter.linear_map import LinearMap, VectorTable
from pipeline.adapter.sided import Trainable
from pipeline.compare.files import ArmFolder, ArmResult, ComparisonFolder, SeedResult, Trial, write_arrays
from pipeline.compare.measuring import EXPECTED, Facts, measure_states, outputs_of
from pipeline.compare.plan import ArmSpec, run_config
from pipeline.compare.saved import PlainState, save_state, state_bytes
from pipeline.config import RunConfig
from pipeline.encoder.files import find_encoder
from pipeline.encoder.trainable import TrainableEncoder
from pipeline.errors import DataError, DivergedError
from pipeline.objectives.objective import Objective
from pipeline.records import EpochRow, Progress, Record
from pipeline.run.family import FamilyWork
from pipeline.run.inputs import JobInputs
from pipeline.run.job import work_of
from pipeline.store.files import read_record, write_atomically
from pipeline.training.loop import peak_memory_bytes
from pipeline.training.train import Training, train_adapter, train_conditions, train_state

_LOG = logging.getLogger(__name__)


class _Trained(Record):
    """A finished training, beside the files of its state."""

    result: SeedResult
    metric: str | None
    num_parameters: int
    num_head_parameters: int
    peak_memory_bytes: int


class ArmJob:
    """The job of one arm.

    Finished trainings are kept under ``<store>/.work/<key>``, so a new worker, or a new comparison with the same key,
    goes on from them.
    """

    def __init__(self, spec: ArmSpec) -> None:
        self.spec = spec
        self.work = Path(spec.store) / ".work" / spec.key
        self.inputs = JobInputs(spec.jobs[0])
        self.runtime = self.inputs.runtime
        self._families: dict[int, FamilyWork] = {}

    def run(self, on_epoch: Callable[[EpochRow], None], on_progress: Callable[[Progress], None]) -> ArmResult:
        """Choose the learning rate, train with every seed, measure the saved states, and write the arm's folder.

        Raises:
            DivergedError: every learning rate diverged, or that of the first seed with another one.
            VerificationError: a saved state, loaded in a fresh process, is not the trained one or has no effect.
        """
        seeds, rates = self.spec.config.compare.seeds, self.spec.config.rates(self.spec.arm)
        self._on_epoch, self._on_progress = on_epoch, on_progress
        trials, rate = self._choose_rate(rates, seeds[0])
        trained = [self._trained(rate, seed, number, len(seeds)) for number, seed in enumerate(seeds)]
        for seed in seeds:
            target = self.work / "arm" / f"seed-{seed}"
            if not target.exists():
                partial = target.with_suffix(".copying")
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(self._folder(rate, seed) / "state", partial)
                partial.replace(target)
        folder = ArmFolder(self.work / "arm")
        facts = measure_states(self.spec, folder)
        return self._finish(folder, trials, trained, facts)

    def _choose_rate(self, rates: tuple[float, ...], seed: int) -> tuple[tuple[Trial, ...], float | None]:
        trials = []
        for number, rate in enumerate(rates):
            try:
                one = self._trained(rate, seed, number, len(rates))
            except DivergedError as error:
                _LOG.warning("learning rate %g: %s", rate, error)
                trials.append(Trial(learning_rate=rate, score=None, seconds=0.0, fault=str(error)))
                continue
            trials.append(Trial(learning_rate=rate, score=one.result.selection_score, seconds=one.result.train_seconds))
        alive = [trial for trial in trials if trial.fault is None]
        if rates and not alive:
            raise DivergedError(
                f"{self.spec.arm}: the training diverged with every learning rate ({', '.join(map(str, rates))}); "
                "give smaller ones in compare.learning_rates"
            )
        # The smallest of equally good rates wins.
        best = max(alive, key=lambda trial: -1.0 if trial.score is None else trial.score, default=None)
        for trial in alive:
            if best is not None and trial.learning_rate != best.learning_rate:
                shutil.rmtree(self._folder(trial.learning_rate, seed) / "state", ignore_errors=True)
        return tuple(trials), None if best is None else best.learning_rate

    def _folder(self, rate: float | None, seed: int) -> Path:
        return self.work / (f"seed-{seed}" if rate is None else f"rate-{rate:g}-seed-{seed}")

    def _trained(self, rate: float | None, seed: int, number: int, total: int) -> _Trained:
        """A training, made now or earlier. An earlier one that lost its files is made again if they are needed."""
        folder = self._folder(rate, seed)
        try:
            return read_record(folder / "trained.json", _Trained)
        except DataError:
            pass
        name = f"seed {seed}" if rate is None else f"learning rate {rate:g}, seed {seed}"
        _LOG.info("%s (%d of %d)", name, number + 1, total)
        shutil.rmtree(folder / "state", ignore_errors=True)
        family, config = self._family(seed), run_config(self.spec.config, self.spec.arm, seed=seed, learning_rate=rate)
        state, result = self._frozen(family, seed) if rate is None else self._train(family, config, folder)
        saved = folder / "state"
        save_state(
            state,
            saved,
            trained=result.result.best_epoch > 0,
            meta={"task": self.spec.mteb_task.name, "epochs": result.result.num_epochs, "seed": seed},
        )
        write_arrays(saved / EXPECTED, {"outputs": outputs_of(state, family.texts_to_reload())})
        state.detach()
        write_atomically(folder / "trained.json", result.model_dump_json(indent=1))
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return result

    def _frozen(self, family: FamilyWork, seed: int) -> tuple[PlainState, _Trained]:
        """The encoder as it is, with the probe as its head if the data have labels to predict."""
        objective, encoder = family.objective(), self.inputs.encoder
        head = None
        if objective.label_names is not None:
            head = Head(encoder.hidden_size, objective.label_names, dropout=0.0).to(encoder.device)
        state = PlainState(encoder, head)
        objective.start(state)
        seeds = SeedResult(
            seed=seed,
            learning_rate=None,
            selection_score=objective.score(state) if objective.has_selection else None,
            best_epoch=0,
            num_epochs=0,
            train_seconds=0.0,
            examples_per_second=None,
        )
        num_head = sum(parameter.numel() for parameter in state.parameters)
        metric = objective.selection_metric if objective.has_selection else None
        return state, _Trained(
            result=seeds,
            metric=metric,
            num_parameters=0,
            num_head_parameters=num_head,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def _train(self, family: FamilyWork, config: RunConfig, folder: Path) -> tuple[Trainable, _Trained]:
        objective = family.objective()
        started = time.perf_counter()
        training = self._training(objective, config, folder / "checkpoint.safetensors")
        state, epochs = training.adapter, training.epochs
        seconds = sum(row.seconds for row in epochs)
        scores = [row.validation_accuracy if row.validation_score is None else row.validation_score for row in epochs]
        measured = [score for score in (training.start_score, *scores) if score is not None]
        _LOG.info("trained in %.1f s", time.perf_counter() - started)
        return state, _Trained(
            result=SeedResult(
                seed=config.train.seed,
                learning_rate=config.train.learning_rate,
                selection_score=max(measured, default=None),
                best_epoch=training.best_epoch,
                num_epochs=len(epochs),
                train_seconds=seconds,
                examples_per_second=objective.num_examples * len(epochs) / seconds,
            ),
            metric=training.selection_metric if objective.has_selection else None,
            num_parameters=sum(parameter.numel() for parameter in state.encoder_parameters),
            num_head_parameters=0 if state.head is None else sum(p.numel() for p in state.head.parameters()),
            peak_memory_bytes=peak_memory_bytes(),
        )

    def _training(self, objective: Objective, config: RunConfig, checkpoint: Path) -> Training[Trainable]:
        """Train the arm's state on a fresh start."""
        train, encoder, epochs = config.train, self.inputs.encoder, self.spec.mteb_task.max_epochs
        if self.spec.kind == "lora":
            return train_adapter(
                objective,
                encoder,
                adapter_config=config.adapter,
                train_config=train,
                max_epochs=epochs,
                checkpoint=checkpoint,
                on_epoch=self._on_epoch,
                on_progress=self._on_progress,
            )
        labels, dropout = objective.label_names, config.adapter.dropout

        def make() -> FullEncoder | LinearMap:
            if self.spec.kind == "linear":
                assert isinstance(encoder, VectorTable)
                return LinearMap(encoder, labels, dropout=dropout, seed=train.seed)
            files = find_encoder(self.spec.config.encoder, offline=config.data.offline)
            fresh = TrainableEncoder(files, self.spec.config.encoder, self.runtime)
            return FullEncoder(fresh, labels, dropout=dropout, seed=train.seed)

        return train_state(
            objective,
            make,
            conditions=train_conditions(train, config.adapter, encoder) | {"arm": self.spec.arm},
            train_config=train,
            max_epochs=epochs,
            checkpoint=checkpoint,
            on_epoch=self._on_epoch,
            on_progress=self._on_progress,
        )

    def _family(self, seed: int) -> FamilyWork:
        """Data of a seed, and what the frozen encoder is measured to be on them."""
        if seed not in self._families:
            job = next(job for job in self.spec.jobs if job.config.train.seed == seed)
            inputs = JobInputs(job)
            # All seeds share the encoder. The linear map learns from vectors that it computes once.
            if self.spec.kind == "linear" and not isinstance(self.inputs.encoder, VectorTable):
                self.inputs.encoder = VectorTable(self.inputs.encoder)
            inputs.encoder = self.inputs.encoder
            self._families[seed] = work_of(inputs)
        return self._families[seed]

    def _finish(self, folder: ArmFolder, trials: tuple[Trial, ...], trained: list[_Trained], facts: Facts) -> ArmResult:
        result = ArmResult(
            arm=self.spec.arm,
            key=self.spec.key,
            run_id=self.spec.run_id,
            selection_metric=trained[0].metric,
            trials=trials,
            seeds=tuple(one.result for one in trained),
            num_parameters=trained[0].num_parameters,
            num_head_parameters=trained[0].num_head_parameters,
            bytes_per_task=state_bytes(folder.seed(trained[0].result.seed)),
            train_seconds=sum(t.seconds for t in trials) + sum(t.result.train_seconds for t in trained[bool(trials) :]),
            peak_memory_bytes=max(one.peak_memory_bytes for one in trained),
            speed=facts.speed,
            forgetting=facts.forgetting,
            files=folder.hashes(),
        )
        write_atomically(folder.result, result.model_dump_json(indent=1))
        target = ComparisonFolder(Path(self.spec.store) / self.spec.run_id).arm(self.spec.arm)
        target.root.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target.root, ignore_errors=True)
        folder.root.replace(target.root)
        shutil.rmtree(self.work, ignore_errors=True)
        return result
