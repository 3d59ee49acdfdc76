"""The work of the embedding families: pairs of texts, and texts to separate by label. Neither trains a head."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pipeline.data.dataset import TaskData
from pipeline.evaluation.vectors import TextVectors
from pipeline.objectives.objective import Objective
from pipeline.objectives.pairs import PairObjective, TokenPairs, tokenise_pairs
from pipeline.objectives.separation import Separation
from pipeline.pairs.data import PairData
from pipeline.pairs.faults import summarise_pairs
from pipeline.pairs.loading import load_pairs
from pipeline.records import AdapterRef, DataSummary, MtebTask, SimilarityCounts, ValueRow
from pipeline.run.classification_work import RELOADED_TEXTS, LabelledTexts
from pipeline.run.family import Evaluation, FamilyWork
from pipeline.run.inputs import JobInputs
from pipeline.store.files import write_atomically
from pipeline.store.run_folder import TaskFolder
from pipeline.training.checkpoint import tensor_file
from pipeline.training.train import AdapterTraining
from pipeline.vector_scores.comparison import compare
from pipeline.vector_scores.measuring import MAIN_METRICS, Measured, kind_of, measure_adapter, measure_vectors

_SIMILARITY_BINS = 200
_LOG = logging.getLogger(__name__)


class EmbeddingWork(FamilyWork):
    """Measures the vectors of the frozen and of the adapted encoder on the same test set."""

    def __init__(self, inputs: JobInputs) -> None:
        super().__init__(inputs)
        self._measured: Measured | None = None

    @property
    @abstractmethod
    def data(self) -> PairData | TaskData:
        """The data as read."""

    @property
    def task(self) -> MtebTask:
        """The MTEB task, with the revision of the data that was read."""
        return self.data.task

    def frozen(self) -> tuple[ValueRow, ...]:
        """Measure the vectors of the frozen encoder."""
        measured, data = self._frozen(), self.data
        num_texts = len(data.test_texts) if isinstance(data, TaskData) else len(data.test)
        return tuple(
            ValueRow(
                run_id=self.inputs.spec.run_id,
                mteb_task=self.task.name,
                column="frozen",
                metric=MAIN_METRICS[kind_of(data)],
                width=width,
                value=float(value),
                num_texts=num_texts,
                main=True,
            )
            for width, value in zip(measured.widths, measured.arrays["main"], strict=True)
        )

    def evaluate(self, training: AdapterTraining, adapter: AdapterRef, folder: TaskFolder) -> Evaluation:
        """Measure the vectors of the adapted encoder, and compare them with the frozen ones."""
        config, spec = self.inputs.config, self.inputs.spec
        frozen, adapted = self._frozen(), measure_adapter(self.data, training.adapter, widths=config.train.widths)
        compared = compare(
            self.data,
            frozen,
            adapted,
            run_id=spec.run_id,
            config=config.evaluate,
            seed=config.train.seed,
            learnt_validation=training.learnt_selection,
        )
        return Evaluation(
            values=compared.rows,
            few_shot={},
            differences=compared.differences,
            similarities=self._similarities(frozen, adapted),
            notes=compared.notes,
        )

    def _similarities(self, frozen: Measured, adapted: Measured) -> tuple[SimilarityCounts, ...]:
        return ()

    def _measure(self) -> Measured:
        return measure_vectors(self.data, TextVectors(self.inputs.encoder), widths=self.inputs.config.train.widths)

    def _frozen(self) -> Measured:
        if self._measured is None:
            path = self.inputs.work / "frozen.safetensors"
            found = _read_measured(self.inputs)
            if found is None:
                started = time.perf_counter()
                measured = self._measure()
                seconds = time.perf_counter() - started
                tensors = {name: torch.from_numpy(array) for name, array in measured.tensors().items()}
                write_atomically(path, tensor_file(tensors, {"seconds": repr(seconds)}))
                _LOG.info("measured the frozen encoder in %.1f s", seconds)
            else:
                measured, seconds = found
                _LOG.info("the frozen encoder was already measured, in %.1f s", seconds)
            self._measured, self.inputs.seconds["frozen"] = measured, seconds
        return self._measured


class PairWork(EmbeddingWork):
    """Text matching and retrieval."""

    def __init__(self, inputs: JobInputs) -> None:
        super().__init__(inputs)
        self._tokens: dict[str, TokenPairs] = {}

    @cached_property
    def data(self) -> PairData:
        """The pairs.

        Raises: DataError: they have changed since the run checked them.
        """
        config, spec = self.inputs.config, self.inputs.spec
        data = load_pairs(spec.mteb_task, config=config.train, offline=config.data.offline)
        self.inputs.check_fingerprint(data.fingerprint)
        return data

    def _tokens_of(self, name: str) -> TokenPairs | None:
        """Tokens of a split, made at first use. None if it is empty."""
        data = self.data
        split = {"train": data.train, "validation": data.validation, "test": data.test}[name]
        if name not in self._tokens and len(split):
            self._tokens[name] = tokenise_pairs(split, self.inputs.encoder, prefixes=data.task.prefixes)
        return self._tokens.get(name)

    def load(self) -> DataSummary:
        """Read and tokenise the pairs."""
        every = {name: self._tokens_of(name) for name in ("train", "validation", "test")}
        tokens = {name: pairs for name, pairs in every.items() if pairs is not None}
        truncated = {name: _num_truncated(pairs) for name, pairs in tokens.items()}
        lengths = np.concatenate([column.lengths for column in tokens["train"].columns])
        quantiles = np.quantile(lengths, (0.1, 0.5, 0.9), method="inverted_cdf")
        return summarise_pairs(
            self.data,
            num_truncated_train=truncated["train"] + truncated.get("validation", 0),
            num_truncated_test=truncated["test"],
            token_quantiles=tuple(quantiles.tolist()),
        )

    def texts_to_reload(self) -> Sequence[str]:
        """The first sides of the first test pairs."""
        return self.data.test.columns[0][:RELOADED_TEXTS]

    def objective(self) -> Objective:
        """The loss of the task over its training pairs."""
        split = "test" if self.inputs.config.train.early_stopping_split == "test" else "validation"
        family = self.task.objective
        assert family in ("text-matching", "retrieval"), family
        train = self._tokens_of("train")
        assert train is not None, "an empty training set was refused"
        return PairObjective(
            train,
            self._tokens_of(split),
            family=family,
            loss=self.task.loss,
            config=self.inputs.config.train,
            has_sides=self.task.sides is not None,
        )

    def _similarities(self, frozen: Measured, adapted: Measured) -> tuple[SimilarityCounts, ...]:
        """Histograms by label, or by third of the scores. None for pairs that are all positive."""
        scores = self.data.test.scores
        if scores is None:
            return ()
        is_label = self.data.kind == "labels"
        names = ("label 0", "label 1") if is_label else ("lowest third", "middle third", "highest third")
        group = scores.astype(np.int64) if is_label else np.minimum((3 * scores).astype(np.int64), 2)
        columns: tuple[tuple[Literal["frozen", "adapted"], Measured], ...] = (("frozen", frozen), ("adapted", adapted))
        histograms = []
        for column, measured in columns:
            cosines = np.clip(measured.arrays["similarity"][0], -1, 1)
            for number, name in enumerate(names):
                counts, _ = np.histogram(cosines[group == number], _SIMILARITY_BINS, (-1, 1))
                histograms.append(SimilarityCounts(column=column, group=name, counts=tuple(counts.tolist())))
        return tuple(histograms)


class SeparationWork(EmbeddingWork):
    """Texts of one label close together, without a head."""

    def __init__(self, inputs: JobInputs) -> None:
        super().__init__(inputs)
        self._texts = LabelledTexts(inputs)

    @property
    def data(self) -> TaskData:
        """The texts and labels."""
        return self._texts.data

    def load(self) -> DataSummary:
        """Read and tokenise the texts. The labels are not those of a head, so the summary names none."""
        return self._texts.summary().changed(label_names=(), label_counts=())

    def texts_to_reload(self) -> Sequence[str]:
        """The first test texts."""
        return self.data.test_texts[:RELOADED_TEXTS]

    def objective(self) -> Objective:
        """The contrastive loss over the labelled texts."""
        return Separation(self._texts.tokens.train, self._texts.selection, config=self.inputs.config.train)


def _read_measured(inputs: JobInputs) -> tuple[Measured, float] | None:
    """Measurement of an earlier worker, and its seconds. None if there is none, or if it is truncated."""
    path = inputs.work / "frozen.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            return Measured.from_tensors({name: file.get_tensor(name) for name in names}), float(
                file.metadata()["seconds"]
            )
    except (SafetensorError, KeyError, ValueError):
        return None


def _num_truncated(pairs: TokenPairs) -> int:
    return int(sum(column.truncated.sum() for column in pairs.columns))
