"""Comparison of a newly trained embedding adapter with the published one, by the main metric of the task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pipeline.adapter.description import describe_adapter
from pipeline.adapter.files import load_adapter
from pipeline.config import RunConfig, TrainConfig
from pipeline.data.dataset import TaskData
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.runtime import choose_runtime
from pipeline.errors import DataError
from pipeline.evaluation.scores import Interval
from pipeline.evaluation.vectors import TextVectors
from pipeline.inference.encoder_of_adapter import find_encoder_of
from pipeline.inference.reference import find_task_folder
from pipeline.machine import local_cpus
from pipeline.pairs.data import PairData
from pipeline.pairs.reading import read_task
from pipeline.publishing.measurement import GateMeasurement
from pipeline.publishing.publication import Candidate
from pipeline.store.run_folder import TaskFolder
from pipeline.vector_scores.comparison import compare
from pipeline.vector_scores.measuring import Measured, measure_vectors, side_texts


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
    new = find_task_folder(f"{candidate.folder.root}#{task}", offline=True)
    old = find_task_folder(published, offline=config.data.offline)
    revision = candidate.manifest.encoder.revision
    first, second = (_measure(folder, data, config, revision=revision) for folder in (new, old))
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


def _measure(folder: TaskFolder, data: PairData | TaskData, config: RunConfig, *, revision: str) -> Measured:
    """Measure the adapters of a task at full width, on the encoder and with the prefixes that they were trained on.

    The encoder of the run's config is theirs if it has the same revision. A local folder is found by no other name.
    """
    adapters = [describe_adapter(one) for one in folder.adapters]
    found = adapters[0]
    if isinstance(data, PairData):
        data = replace(data, task=data.task.changed(prefixes=found.meta.prefixes))
    threads = local_cpus()
    torch.set_num_threads(threads)
    is_of_run = found.encoder.revision == revision and Path(config.encoder.name).is_dir()
    location = config.encoder.name if is_of_run else None
    files, encoder_config = find_encoder_of(found, location, offline=config.data.offline)
    encoder = Encoder(files, encoder_config, choose_runtime(TrainConfig(), threads=threads, use_gpu=True))
    if not folder.has_sides:
        load_adapter(found.folder, encoder, found=found)
        return measure_vectors(data, TextVectors(encoder))
    assert isinstance(data, PairData), "only pairs have sides"
    texts, vectors = side_texts(data), (TextVectors(encoder), TextVectors(encoder))
    for adapter, of_side, embed in zip(adapters, (texts.first, texts.second), vectors, strict=True):
        attached = load_adapter(adapter.folder, encoder, found=adapter)
        embed(of_side)
        attached.detach()
    return measure_vectors(data, vectors[0], second=vectors[1])
