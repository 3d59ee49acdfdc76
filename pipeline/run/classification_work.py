"""The work of a classification task: labelled texts, a head, and the columns of the score table."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from pipeline.data.dataset import TaskData, load_data
from pipeline.encoder.encoder import Encoder
from pipeline.evaluation.classification import Baselines, RowFacts, evaluate_adapter, evaluate_frozen
from pipeline.objectives.batches import LabelledTokens
from pipeline.objectives.objective import Classification, Objective
from pipeline.records import AdapterRef, DataSummary, MtebTask, ValueRow
from pipeline.run.baselines_file import BaselinesFile
from pipeline.run.family import Evaluation, FamilyWork
from pipeline.run.inputs import JobInputs
from pipeline.store.files import write_atomically
from pipeline.store.run_folder import TaskFolder
from pipeline.training.train import AdapterTraining

RELOADED_TEXTS = 32
"""Number of test texts that a fresh process computes again."""
_LOG = logging.getLogger(__name__)


class TokenisedSplits:
    """The splits of labelled texts as tokens, each tokenised at first use."""

    def __init__(self, data: TaskData, encoder: Encoder) -> None:
        self._data, self._encoder = data, encoder

    @cached_property
    def train(self) -> LabelledTokens:
        """The training texts."""
        return LabelledTokens(self._encoder.tokenise(self._data.train_texts), self._data.train_labels)

    @cached_property
    def validation(self) -> LabelledTokens:
        """The validation texts."""
        return LabelledTokens(self._encoder.tokenise(self._data.validation_texts), self._data.validation_labels)

    @cached_property
    def test(self) -> LabelledTokens:
        """The test texts."""
        return LabelledTokens(self._encoder.tokenise(self._data.test_texts), self._data.test_labels)


class LabelledTexts:
    """Labelled texts of one MTEB task, and their tokens."""

    def __init__(self, inputs: JobInputs) -> None:
        self._inputs = inputs

    @cached_property
    def data(self) -> TaskData:
        """The texts and labels.

        Raises: DataError: they have changed since the run checked them.
        """
        config, spec = self._inputs.config, self._inputs.spec
        data = load_data(spec.mteb_task, config=config.train, offline=config.data.offline)
        self._inputs.check_fingerprint(data.fingerprint)
        return data

    @cached_property
    def tokens(self) -> TokenisedSplits:
        """The tokens of all splits."""
        return TokenisedSplits(self.data, self._inputs.encoder)

    @property
    def selection(self) -> LabelledTokens | None:
        """Texts that select the epoch. None if there are none."""
        is_test = self._inputs.config.train.early_stopping_split == "test"
        texts = self.tokens.test if is_test else self.tokens.validation
        return texts if len(texts.labels) else None

    def summary(self) -> DataSummary:
        """Sizes and warnings."""
        data, tokens = self.data, self.tokens
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


class ClassificationWork(FamilyWork):
    """LoRA pairs and a head, against the majority class, mteb's few-shot protocol and the full-data probe."""

    def __init__(self, inputs: JobInputs) -> None:
        super().__init__(inputs)
        self._texts = LabelledTexts(inputs)
        self._baselines: Baselines | None = None

    @property
    def task(self) -> MtebTask:
        """The MTEB task, with the revision of the data that was read."""
        return self._texts.data.task

    def load(self) -> DataSummary:
        """Read and tokenise the texts."""
        return self._texts.summary()

    def texts_to_reload(self) -> Sequence[str]:
        """The first test texts."""
        return self._texts.data.test_texts[:RELOADED_TEXTS]

    def frozen(self) -> tuple[ValueRow, ...]:
        """Measure the columns of the frozen encoder."""
        return self._frozen().values

    def objective(self) -> Objective:
        """Cross-entropy, with the head of the probe as its start if the config says so."""
        train, baselines = self.inputs.config.train, self._frozen()
        return Classification(
            self._texts.tokens.train,
            self._texts.selection,
            label_names=self._texts.data.label_names,
            config=train,
            head_start=baselines.head_start if train.head_init == "probe" else None,
        )

    def evaluate(self, training: AdapterTraining, adapter: AdapterRef, folder: TaskFolder) -> Evaluation:
        """Measure the adapted encoder and its head, and write the calibration."""
        baselines = self._frozen()
        measured = evaluate_adapter(
            self._facts(),
            self.inputs.config.evaluate,
            training=training,
            adapter_sha256=adapter.sha256,
            baselines=baselines,
        )
        write_atomically(folder.calibration, measured.calibration.model_dump_json(indent=1))
        return Evaluation(
            values=(*baselines.values, *measured.values),
            few_shot=baselines.few_shot | measured.few_shot,
            scores=(*baselines.rows, *measured.rows),
            probe_c=baselines.probe_c,
            comparison=measured.comparison,
            calibration=measured.calibration,
            confusions=measured.confusions,
        )

    def _facts(self) -> RowFacts:
        truncated = int(self._texts.tokens.test.tokens.truncated.sum())
        inputs = self.inputs
        return RowFacts(inputs.spec.run_id, self._texts.data, inputs.encoder, truncated, inputs.config.train.seed)

    def _frozen(self) -> Baselines:
        if self._baselines is None:
            file = BaselinesFile(self.inputs.work / "frozen.safetensors")
            measured = file.read()
            if measured is None:
                started = time.perf_counter()
                config, tokens = self.inputs.config, self._texts.tokens.train.tokens
                baselines = evaluate_frozen(self._facts(), config.evaluate, tokens=tokens, refit=config.train.refit)
                measured = baselines, time.perf_counter() - started
                file.write(*measured)
                _LOG.info("evaluated the frozen encoder in %.1f s, probe with C = %g", measured[1], baselines.probe_c)
            else:
                _LOG.info("the frozen encoder was already evaluated, in %.1f s", measured[1])
            self._baselines, self.inputs.seconds["frozen"] = measured
            run_id = self.inputs.spec.run_id
            self._baselines = replace(
                self._baselines,
                rows=tuple(row.changed(run_id=run_id) for row in self._baselines.rows),
                values=tuple(row.changed(run_id=run_id) for row in self._baselines.values),
            )
        return self._baselines
