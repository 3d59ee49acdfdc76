"""Comparison of a newly trained embedding adapter with the published one, by the main metric of the task."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.adapter.description import FoundAdapter
from pipeline.adapter.files import load_adapter
from pipeline.config import RunConfig, TrainConfig
from pipeline.data.dataset import TaskData
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.runtime import choose_runtime
from pipeline.errors import DataError
from pipeline.evaluation.scores import Interval
from pipeline.evaluation.vectors import TextVectors
from pipeline.inference.encoder_of_adapter import find_encoder_of
from pipeline.inference.reference import find_adapters
from pipeline.machine import local_cpus
from pipeline.pairs.data import PairData
from pipeline.pairs.reading import read_task
from pipeline.publishing.measurement import GateMeasurement
from pipeline.publishing.publication import Candidate
from pipeline.vector_scores.comparison import compare
from pipeline.vector_scores.measuring import Measured, measure_vectors


def measure_vector_adapters(candidate: Candidate, task: str, published: str) -> GateMeasurement:
    """Measure the candidate's adapter of a task, and a published one, on the candidate's test set.

    Args:
        candidate: The run.
        task: Name of the MTEB task.
        published: Reference of the published adapter.
    Raises: DataError: the data set has changed since the run.
    """
    result, config = candidate.results[task], candidate.manifest.config
    data = read_task(result.mteb_task, config=config.train, offline=config.data.offline)
    if data.fingerprint != result.data.fingerprint:
        raise DataError(
            f"{task}: the data set has changed since run {candidate.summary.run_id}; retrain before publishing"
        )
    (new,) = find_adapters([f"{candidate.folder.root}#{task}"], offline=True)
    (old,) = find_adapters([published], offline=config.data.offline)
    first, second = (_measure(found, data, config, is_own=found is new) for found in (new, old))
    compared = compare(data, second, first, config=config.evaluate, seed=config.train.seed, run_id="gate")
    whole = compared.differences[0]
    # Too few independent texts give no interval: then anything is possible, and nothing is decided.
    interval = Interval(whole.low if whole.low is not None else -1.0, whole.high if whole.high is not None else 1.0)
    return GateMeasurement(
        published_accuracy=float(second.arrays["main"][0]),
        candidate_accuracy=float(first.arrays["main"][0]),
        interval=interval,
        p_value=whole.p_value,
        num_texts=whole.num_texts,
        metric=whole.metric,
    )


def _measure(found: FoundAdapter, data: PairData | TaskData, config: RunConfig, *, is_own: bool) -> Measured:
    """Measure an adapter at full width, on the encoder that it was trained on."""
    threads = local_cpus()
    torch.set_num_threads(threads)
    location = config.encoder.name if is_own and Path(config.encoder.name).is_dir() else None
    files, encoder_config = find_encoder_of(found, location, offline=config.data.offline)
    encoder = Encoder(files, encoder_config, choose_runtime(TrainConfig(), threads=threads, use_gpu=True))
    load_adapter(found.folder, encoder, found=found)
    return measure_vectors(data, TextVectors(encoder))
