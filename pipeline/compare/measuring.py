"""Measurement of the saved states of an arm in a fresh process, which sees nothing but their files.

A state that was saved wrongly, or that has no effect, is refused here, so no number can be that of another state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.sided import SidedAdapter, Trainable
from pipeline.compare.files import ArmFolder, Forgetting, Speed, read_arrays, write_arrays
from pipeline.compare.groupings import pair_groupings, text_map
from pipeline.compare.plan import ArmSpec
from pipeline.compare.saved import load_state
from pipeline.config import MapMethod
from pipeline.data.dataset import TaskData
from pipeline.encoder.encoder import Encoder, FloatArray
from pipeline.encoder.files import find_encoder
from pipeline.errors import DataError, VerificationError
from pipeline.evaluation.probe import full_data_probe
from pipeline.evaluation.vectors import TextVectors
from pipeline.inference.fresh_process import answer_on_stdout, ask
from pipeline.pairs.data import PairData
from pipeline.pairs.reading import read_task
from pipeline.records import Record
from pipeline.run.classification_work import RELOADED_TEXTS
from pipeline.vector_scores.measuring import MAIN_METRICS, kind_of, measure_adapter, measure_vectors, side_texts

EXPECTED = "expected.safetensors"
"""File with the outputs of the trained state for the first test texts, before it was saved."""

_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # a full encoder that was trained in mixed precision rounds otherwise
_TIMED_TEXTS, _TIMES = 1000, 3


class Facts(Record):
    """What was measured of an arm besides its arrays."""

    speed: Speed
    forgetting: tuple[Forgetting, ...]


def outputs_of(state: Trainable, texts: Sequence[str]) -> FloatArray:
    """Logits of texts, or without a head their vectors, float32 (texts, outputs). Of two sides, that of the queries."""
    if isinstance(state, SidedAdapter):
        state = state.use("query")
    return state.outputs(state.encoder.embed(state.encoder.tokenise(texts)))


def measure_states(spec: ArmSpec, folder: ArmFolder) -> Facts:
    """Load every saved state in a fresh process, check it, and measure it on test.

    Args:
        spec: The arm.
        folder: Its folder, with a saved state of each seed. Receives the measured arrays.
    Raises: VerificationError: a state is not the trained one, is that of another encoder, or has no effect.
    """
    request = {"spec": spec.model_dump(mode="json"), "folder": str(folder.root)}
    cannot = f"{spec.arm}: a saved state cannot be measured in a fresh process"
    return Facts.model_validate(ask("pipeline.compare.measuring", request, cannot))


def _measured(request: dict[str, Any]) -> dict[str, Any]:
    spec = ArmSpec.model_validate(request["spec"])
    folder = ArmFolder(Path(request["folder"]))
    torch.set_num_threads(spec.runtime.threads)
    speeds, forgotten, without = [], [], None
    others = [read_task(task, config=spec.config.train, offline=spec.config.data.offline) for task in spec.forgetting]
    for seed, job in zip(spec.config.compare.seeds, spec.jobs, strict=True):
        data = read_task(spec.mteb_task, config=job.config.train, offline=spec.config.data.offline)
        if data.fingerprint != job.fingerprint:
            raise DataError(f"{spec.mteb_task.name}: the data have changed since they were checked; start it again")
        texts = checked_texts(data)
        without = frozen_vectors(spec, texts) if without is None else without
        state = check_state(spec, folder.seed(seed), texts, without)
        write_arrays(folder.measured(seed), _arrays(state, data, spec.config.compare.map))
        speeds.append(_speed(state, data))
        forgotten.append([_score_on(state, other, spec) for other in others])
    unmerged = [speed.unmerged for speed in speeds if speed.unmerged is not None]
    facts = Facts(
        speed=Speed(merged=mean(speed.merged for speed in speeds), unmerged=mean(unmerged) if unmerged else None),
        forgetting=tuple(
            Forgetting(
                mteb_task=other.task.name,
                metric="accuracy" if other.task.objective == "classification" else MAIN_METRICS[kind_of(other)],
                scores=tuple(of_seed[number] for of_seed in forgotten),
                num_texts=len(other.test_texts) if isinstance(other, TaskData) else len(other.test),
            )
            for number, other in enumerate(others)
        ),
    )
    return facts.model_dump(mode="json")


def checked_texts(data: TaskData | PairData) -> list[str]:
    """Texts whose outputs are compared: the first ones of test, which all seeds share."""
    return (data.test_texts if isinstance(data, TaskData) else data.test.columns[0])[:RELOADED_TEXTS]


def frozen_vectors(spec: ArmSpec, texts: Sequence[str]) -> FloatArray:
    """Vectors of texts from the encoder as it is, float32 (texts, width)."""
    files = find_encoder(spec.config.encoder, offline=spec.config.data.offline)
    frozen = Encoder(files, spec.config.encoder, spec.runtime)
    return frozen.embed(frozen.tokenise(texts))


def check_state(spec: ArmSpec, folder: Path, texts: Sequence[str], without: FloatArray) -> Trainable:
    """Load a state, and check that it is the trained one and changes the encoder.

    Args:
        spec: The arm.
        folder: Files of the state.
        texts: The first test texts.
        without: Their vectors from the frozen encoder, float32 (texts, width).
    Raises: VerificationError: it is not, or does not.
    """
    config = spec.config.encoder
    files = find_encoder(config, offline=spec.config.data.offline)
    state, meta = load_state(folder, kind=spec.kind, files=files, config=config, runtime=spec.runtime)
    encoder = state.use("query").encoder if isinstance(state, SidedAdapter) else state.encoder
    effect = float(np.abs(encoder.embed(encoder.tokenise(texts)) - without).max())
    if spec.kind != "frozen" and meta.trained and not effect > 0:
        raise VerificationError(f"{folder.name}: the saved state has no effect on the encoder")
    expected = read_arrays(folder / EXPECTED).get("outputs")
    outputs = outputs_of(state, texts)
    same_shape = expected is not None and expected.shape == outputs.shape
    difference = float(np.abs(expected - outputs).max()) if same_shape else float("inf")  # type: ignore[operator]
    # Only the full encoder is loaded in another form than it was trained in.
    is_exact = spec.kind != "full" or spec.runtime.dtype == "float32"
    tolerance = _TOLERANCE["float32" if is_exact else "bfloat16"]
    scale = max(1.0, float(np.abs(outputs).max()))
    if not difference <= tolerance * scale:
        raise VerificationError(
            f"{folder.name}: the outputs of the saved state differ by {difference:.3g} from the trained one "
            f"(allowed: {tolerance * scale:.3g}), so its files are not what was trained"
        )
    return state


def _arrays(state: Trainable, data: TaskData | PairData, method: MapMethod) -> dict[str, Any]:
    """Arrays by item: logits for classification, otherwise those of ``Measured``; and those of ``groupings.py``."""
    if isinstance(state, SidedAdapter):
        return measure_adapter(data, state).tensors()
    vectors = TextVectors(state.encoder)
    arrays: dict[str, Any]
    if isinstance(data, PairData):
        arrays = measure_vectors(data, vectors).tensors()
        if data.kind == "labels":
            assert data.validation.scores is not None, "labelled pairs have labels"
            arrays["validation_gold"] = data.validation.scores
            texts = side_texts(data)
            first, second = (vectors.unit(side[: len(data.test)]) for side in (texts.first, texts.second))
            arrays |= pair_groupings(first, second, method=method)
        return arrays
    grouped = text_map(vectors.unit(data.test_texts), method=method)
    if data.task.objective != "classification":
        return measure_vectors(data, vectors).tensors() | grouped
    arrays = grouped | {"logits": state.logits_of_vectors(vectors(data.test_texts))}
    if data.validation_texts:
        arrays["validation_logits"] = state.logits_of_vectors(vectors(data.validation_texts))
        arrays["validation_labels"] = data.validation_labels
    return arrays


def _speed(state: Trainable, data: TaskData | PairData) -> Speed:
    """Median rate of several passes over the first test texts."""
    texts = (data.test_texts if isinstance(data, TaskData) else data.test.columns[0])[:_TIMED_TEXTS]
    one = state.use("query") if isinstance(state, SidedAdapter) else state
    encoder = one.encoder

    def rate(embed: Callable[[], object]) -> float:
        seconds = []
        for _ in range(_TIMES):
            started = time.perf_counter()
            embed()
            seconds.append(time.perf_counter() - started)
        return len(texts) / median(seconds)

    if isinstance(one, Adapter):
        unmerged = rate(lambda: encoder.embed(encoder.tokenise(texts)))
        with one.merged():
            return Speed(merged=rate(lambda: encoder.embed(encoder.tokenise(texts))), unmerged=unmerged)
    inner = getattr(encoder, "frozen", encoder)  # a look-up of vectors is no inference
    return Speed(merged=rate(lambda: inner.embed(inner.tokenise(texts))), unmerged=None)


def _score_on(state: Trainable, data: TaskData | PairData, spec: ArmSpec) -> float:
    """Score on a data set that the state has not learnt: of a full-data probe, or the main metric of its vectors."""
    if isinstance(data, TaskData) and data.task.objective == "classification":
        encoder = state.use("query").encoder if isinstance(state, SidedAdapter) else state.encoder
        vectors = TextVectors(encoder)
        probe, _ = full_data_probe(data, vectors, spec.config.evaluate, seed=spec.config.train.seed)
        return float(probe.score(vectors.features(data.test_texts), data.test_labels))
    return float(measure_adapter(data, state).arrays["main"][0])


if __name__ == "__main__":
    answer_on_stdout(_measured)
