"""Training on pairs and for separation: batches, masks, slices, learned temperature, kills, and what is learnt."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from builders import CPU_FLOAT32, give_effect, load_encoder, toy_texts
from safetensors import safe_open

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.files import save_adapter
from pipeline.adapter.sided import AnyAdapter, SidedAdapter
from pipeline.config import AdapterConfig, EncoderConfig, TrainConfig
from pipeline.encoder.encoder import Batch, Encoder
from pipeline.encoder.files import find_encoder
from pipeline.errors import ConfigError, DataError, LorafleetError, ResumeError
from pipeline.objectives.batches import LabelledTokens
from pipeline.objectives.embedding import EmbeddingObjective
from pipeline.objectives.pairs import PairObjective, TokenPairs, tokenise_pairs
from pipeline.objectives.separation import Separation
from pipeline.pairs.data import PairSplit
from pipeline.records import Progress
from pipeline.store.run_folder import TaskFolder
from pipeline.training.flat_weights import WorkingCopy, flatten
from pipeline.training.train import Training, train_adapter

Folders = Callable[[str], Path]
SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 8, "precision": "float32"}
PREFIXES = ("query: ", "passage: ")


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**SETTINGS | settings)


def similar(num_pairs: int, *, seed: int, grades: bool = True) -> PairSplit:
    """Two texts each; graded by the distance of their topics, or 1 for one topic."""
    first, topics = toy_texts(num_pairs, seed=seed)
    second, others = toy_texts(num_pairs, seed=seed + 100)
    order = np.random.default_rng(seed).permutation(num_pairs)
    apart = np.abs(np.array(topics) - np.array(others)[order])
    scores = 1 - apart / 2 if grades else (apart == 0).astype(np.float64)
    return PairSplit((first, [second[row] for row in order]), scores, {})


def searched(num_pairs: int, *, seed: int, negatives: bool = False) -> PairSplit:
    """Queries of two words that mean a passage of ten others, by the letter that both words begin with."""
    random = Random(seed)
    texts, _ = toy_texts(num_pairs * 3, seed=seed)
    passages = [" ".join(random.sample(text.split() * 4, 8)) for text in texts[:num_pairs]]
    queries = [" ".join(random.sample(passage.split(), 2)) for passage in passages]
    columns = (queries, passages, *([texts[num_pairs : 2 * num_pairs]] if negatives else ()))
    return PairSplit(columns, None, {})


def labelled(encoder: Encoder, num_texts: int, *, seed: int) -> LabelledTokens:
    texts, labels = toy_texts(num_texts, seed=seed)
    return LabelledTokens(encoder.tokenise(texts), np.array(labels))


def matching(encoder: Encoder, *, grades: bool = True, loss: Any = "cosent", **settings: Any) -> PairObjective:
    train, selection = (
        tokenise_pairs(similar(count, seed=seed, grades=grades), encoder, prefixes=None)
        for count, seed in ((240, 0), (60, 1))
    )
    return PairObjective(train, selection, family="text-matching", loss=loss, config=config(**settings))


def retrieval(
    encoder: Encoder, *, negatives: bool = True, loss: Any = "infonce", has_sides: bool = False, **settings: Any
) -> PairObjective:
    train, selection = (
        tokenise_pairs(searched(count, seed=seed, negatives=negatives), encoder, prefixes=PREFIXES)
        for count, seed in ((240, 0), (60, 1))
    )
    return PairObjective(
        train, selection, family="retrieval", loss=loss, config=config(**settings), has_sides=has_sides
    )


def separation(encoder: Encoder, **settings: Any) -> Separation:
    train, selection = (labelled(encoder, count, seed=seed) for count, seed in ((241, 0), (60, 1)))
    return Separation(train, selection, config=config(**settings))


Make = Callable[..., EmbeddingObjective]
FAMILIES: dict[str, tuple[Make, dict[str, Any]]] = {
    "text-matching": (matching, {"temperature": "learned", "widths": (8, 4), "distillation": 1.0}),
    "retrieval": (retrieval, {"temperature": "learned", "texts_per_pass": 7}),
    "two adapters": (retrieval, {"has_sides": True, "temperature": "learned", "texts_per_pass": 7}),
    "separation": (separation, {"temperature": "learned", "distillation": 1.0, "texts_per_pass": 3}),
}


def train(objective: EmbeddingObjective, encoder: Encoder, *, max_epochs: int = 3, **options: Any) -> Training:
    return train_adapter(
        objective,
        encoder,
        adapter_config=AdapterConfig(),
        train_config=objective._config,
        max_epochs=max_epochs,
        **options,
    )


def train_family(family: str, encoder: Encoder, **options: Any) -> Training:
    make, settings = FAMILIES[family]
    return train(make(encoder, **settings), encoder, **options)


def train_until_killed(family: str, folder: str, checkpoint: str) -> None:
    """For a process of its own, which is killed in the middle of its second epoch."""

    def kill(progress: Progress) -> None:
        if progress.epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    train_family(family, load_encoder(folder), checkpoint=Path(checkpoint), on_progress=kill)


def bits(training: Training) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in training.adapter.parameters)


def facts(training: Training) -> list[tuple[Any, ...]]:
    return [(e.epoch, e.train_loss, e.validation_score, e.learning_rate, e.is_best) for e in training.epochs]


def exponent_in(checkpoint: Path) -> float:
    """The learned temperature's logarithm, relative to its start: the last weight, after those of the adapter."""
    with safe_open(checkpoint, framework="pt") as file:
        return float(file.get_tensor("weights")[-1])


# Tokens, batches and masks


def test_equal_texts_have_equal_numbers_in_every_column_and_split_whatever_the_prefix(bert: Encoder) -> None:
    one = tokenise_pairs(
        PairSplit((["a harbour", "butter"], ["butter", "a flower"]), None, {}), bert, prefixes=PREFIXES
    )
    two = tokenise_pairs(PairSplit((["a flower"], ["a  flower"]), None, {}), bert, prefixes=None)
    (harbour, butter), (same_butter, flower) = (ids.tolist() for ids in one.text_ids)
    assert butter == same_butter
    assert two.text_ids[0].tolist() == [flower]
    assert two.text_ids[1].tolist() == [flower], "to the encoder it is the same text"
    assert len({harbour, butter, flower}) == 3
    expected = bert.tokenise(["query: a harbour", "query: butter", "passage: butter", "passage: a flower"])
    np.testing.assert_array_equal(np.concatenate([column.ids for column in one.columns]), expected.ids)


def test_all_columns_of_a_batch_are_one_batch_of_the_encoder(bert: Encoder) -> None:
    split = searched(20, seed=0, negatives=True)
    objective = PairObjective(
        tokenise_pairs(split, bert, prefixes=None), None, family="retrieval", loss="infonce", config=config()
    )
    rows = np.array([3, 0, 7])
    first, order, batch = objective.inputs(rows, bert, length_step=1)
    assert isinstance(batch, Batch) and isinstance(first, torch.Tensor)
    assert len(first) == len(rows), "recorded steps tell full batches by it"
    expected = bert.tokenise([column[row] for column in split.columns for row in rows])
    np.testing.assert_array_equal(batch.ids, bert.batch(expected, np.arange(9)).ids)
    np.testing.assert_array_equal(order, np.arange(9))
    assert objective.num_tokens == sum(len(bert.tokenise(column).ids) for column in split.columns)


def test_no_text_is_a_negative_of_its_equal_or_of_a_query_that_it_is_known_to_answer(bert: Encoder) -> None:
    queries = ["harbour", "harbour", "flower", "butter", "pepper"]
    passages = ["ship", "wave", "ship", "flower", "soup"]
    negatives = ["wave", "soup", "butter", "anchor", "pepper"]
    pairs = tokenise_pairs(PairSplit((queries, passages, negatives), None, {}), bert, prefixes=PREFIXES)
    objective = PairObjective(pairs, None, family="retrieval", loss="infonce", config=config())
    rows = np.array([0, 2, 3, 4])  # that "wave" answers "harbour" is known from a pair outside of the batch
    columns = [passages[row] for row in rows] + [negatives[row] for row in rows]
    forbidden = {
        ("harbour", "ship"),
        ("harbour", "wave"),
        ("flower", "ship"),
        ("flower", "flower"),
        ("butter", "flower"),
    }
    forbidden |= {("flower", "butter"), ("butter", "butter")}  # a pair counts in either order
    forbidden |= {("pepper", "soup"), ("pepper", "pepper")}
    expected = [[(queries[row], passage) not in forbidden for passage in columns] for row in rows]
    np.testing.assert_array_equal(objective.targets(rows), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_epoch_has_every_example_once_in_as_many_batches_as_steps(family: str, bert: Encoder) -> None:
    objective = FAMILIES[family][0](bert)
    batches = list(objective.batches(batch_size=8, order=np.random.default_rng(0)))
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(objective.num_examples))
    assert len(batches) == math.ceil(objective.num_examples / 8)
    assert sorted(map(len, batches))[1:] == [8] * (len(batches) - 1)
    again = list(objective.batches(batch_size=8, order=np.random.default_rng(1)))
    assert [set(rows.tolist()) for rows in again] != [set(rows.tolist()) for rows in batches]


def test_texts_of_separation_come_with_another_text_of_their_label(bert: Encoder) -> None:
    texts, _ = toy_texts(500)
    labels = np.repeat(np.arange(100), [1] * 10 + [3] * 20 + [2] * 20 + [8] * 40 + [5] * 5 + [4] * 5)[:500]
    data = LabelledTokens(bert.tokenise(texts[: len(labels)]), np.random.default_rng(0).permutation(labels))
    objective = Separation(data, None, config=config())
    number = np.bincount(data.labels)
    alone = 0
    batches = list(objective.batches(batch_size=16, order=np.random.default_rng(0)))
    for rows in batches:
        of_label = np.bincount(data.labels[rows], minlength=100)
        alone += int(((of_label == 1) & (number > 1)).sum())
    assert (number == 1).sum() == 10
    assert alone <= 2 * (len(batches) - 1), "only where a batch ends within a group"


# Slices


def load_in(dtype: str, folder: Path) -> Encoder:
    settings = EncoderConfig(name=str(folder), max_tokens=24)
    return Encoder(find_encoder(settings, offline=True), settings, CPU_FLOAT32.model_copy(update={"dtype": dtype}))


def adapter_for(objective: EmbeddingObjective, encoder: Encoder) -> AnyAdapter:
    return SidedAdapter(encoder, AdapterConfig()) if objective.has_sides else Adapter(encoder, AdapterConfig())


def gradient(make: Make, encoder: Encoder, **settings: Any) -> torch.Tensor:
    """Flat gradient of one step, as the loop computes it."""
    objective = make(encoder, **settings)
    adapter = adapter_for(objective, encoder)
    objective.start(adapter)
    for one in adapter.sides.values() if isinstance(adapter, SidedAdapter) else (adapter,):
        give_effect(one)
    weights = flatten([*adapter.parameters, *objective.parameters])
    working = WorkingCopy(adapter, weights)
    working.attach()
    working.refresh()
    objective.loss(adapter)(*objective.inputs(np.arange(64), encoder, length_step=1)).backward()
    working.collect_gradients()
    adapter.detach()
    assert weights.grad is not None
    return weights.grad


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 1e-5), ("bfloat16", 5e-3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_slices_is_that_of_one_pass(
    family: str, dtype: str, largest: float, encoder_folder: Folders
) -> None:
    make, settings = FAMILIES[family]
    whole, sliced = (
        gradient(make, load_in(dtype, encoder_folder("bert")), **settings | {"texts_per_pass": size})
        for size in (1000, 10)
    )
    assert whole.norm() > 0.01
    assert whole[-1] != 0, "the temperature's"
    assert (sliced - whole).norm() / whole.norm() <= largest


def test_two_adapters_share_the_gradient_of_one_with_their_weights(encoder_folder: Folders) -> None:
    one = gradient(retrieval, load_encoder(encoder_folder("bert")), texts_per_pass=10)
    two = gradient(retrieval, load_encoder(encoder_folder("bert")), texts_per_pass=10, has_sides=True)
    of_queries, of_passages = two.view(2, -1)
    assert (of_queries + of_passages - one).norm() / one.norm() <= 1e-5
    assert min(of_queries.norm(), of_passages.norm()) > 0.1 * one.norm()


def test_a_batch_on_a_cpu_is_embedded_in_passes_of_similar_length_and_one_gradient(encoder_folder: Folders) -> None:
    encoder = load_encoder(encoder_folder("bert"))
    shapes = []
    for size in (1000, None):
        objective = matching(encoder, texts_per_pass=size)
        _, _, *passes = objective.inputs(np.arange(96), encoder, length_step=1)
        shapes.append([tuple(batch.ids.shape) for batch in passes if isinstance(batch, Batch)])
    lengths = np.sort(objective._tokens.lengths[objective.texts_of(np.arange(96))]).tolist()
    assert lengths[63] < lengths[127] < lengths[191]
    assert shapes == [[(192, lengths[191])], [(64, lengths[63]), (64, lengths[127]), (64, lengths[191])]]
    whole, passed = (gradient(retrieval, load_encoder(encoder_folder("bert")), texts_per_pass=s) for s in (1000, None))
    assert (passed - whole).norm() / whole.norm() <= 1e-5


def test_slices_are_padded_to_few_lengths_where_steps_are_recorded(encoder_folder: Folders) -> None:
    encoder = load_encoder(encoder_folder("bert"))

    def padded_lengths(texts_per_pass: int) -> set[int]:
        inputs = matching(encoder, texts_per_pass=texts_per_pass).inputs(np.arange(96), encoder, length_step=3)
        return {batch.ids.shape[1] for batch in inputs if isinstance(batch, Batch)}

    (whole,) = padded_lengths(1000)
    assert whole % 3 == 0 and whole % 12 != 0
    assert {length % 12 for length in padded_lengths(16)} == {0}


def peak_bytes(act: Callable[[], object]) -> int:
    """Most memory that torch held at a time, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        act()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def test_slices_need_the_memory_of_one(encoder_folder: Folders) -> None:
    whole, sliced = (
        peak_bytes(lambda size=size: gradient(retrieval, load_encoder(encoder_folder("bert")), texts_per_pass=size))
        for size in (1000, 8)
    )
    assert sliced < whole / 4, f"{whole} bytes for 192 texts at once, {sliced} for 8"


# Temperature


def test_a_learned_temperature_moves_and_is_saved_in_the_checkpoint_only(bert: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    training = train(retrieval(bert, temperature="learned"), bert, checkpoint=path)
    assert 0.001 < abs(exponent_in(path)) < math.log(5)
    with safe_open(path, framework="pt") as file:
        saved = file.get_tensor("weights")
    adapter = training.adapter
    assert len(saved) == sum(p.numel() for p in adapter.parameters) + 1
    save_adapter(adapter, TaskFolder(tmp_path / "saved"), meta={})
    with safe_open(tmp_path / "saved" / "adapter_model.safetensors", framework="pt") as file:
        assert all(".lora_" in name for name in file.keys())  # noqa: SIM118 - not a mapping


@pytest.mark.parametrize(("exponent", "temperature"), [(-50.0, 0.01), (0.0, 0.05), (50.0, 1.0)])
def test_a_learned_temperature_keeps_its_limits(exponent: float, temperature: float, bert: Encoder) -> None:
    learned, fixed = retrieval(bert, temperature="learned"), retrieval(bert, temperature=temperature)
    adapter = give_effect(Adapter(bert, AdapterConfig()))
    for objective in (learned, fixed):
        objective.start(adapter)
    (parameter,) = learned.parameters
    assert fixed.parameters == ()
    with torch.no_grad():
        parameter.fill_(exponent)
    inputs = learned.inputs(np.arange(16), bert, length_step=1)
    loss = learned.loss(adapter)(*inputs)
    torch.testing.assert_close(loss, fixed.loss(adapter)(*inputs))
    loss.backward()
    assert parameter.grad is not None and parameter.grad != 0, "it can leave its limit again"


# Kills


@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_training_resumes_to_the_same_bits(family: str, encoder_folder: Folders, tmp_path: Path) -> None:
    folder, path = encoder_folder("bert"), tmp_path / "training.safetensors"
    program = f"import test_pair_objective as t; t.train_until_killed({family!r}, {str(folder)!r}, {str(path)!r})"
    killed = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert exponent_in(path) != 0
    rows: list[int] = []
    resumed = train_family(family, load_encoder(folder), checkpoint=path, on_epoch=lambda row: rows.append(row.epoch))
    end = exponent_in(path)
    undisturbed = train_family(family, load_encoder(folder), checkpoint=tmp_path / "other.safetensors")
    assert rows == [2, 3]
    assert bits(resumed) == bits(undisturbed)
    assert facts(resumed) == facts(undisturbed)
    assert end == exponent_in(tmp_path / "other.safetensors")


def test_a_training_on_other_pairs_or_with_another_loss_is_not_resumed(encoder_folder: Folders, tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"

    def start(train_pairs: TokenPairs, loss: Any = "cosent") -> None:
        encoder = load_encoder(encoder_folder("bert"))
        objective = PairObjective(train_pairs, None, family="text-matching", loss=loss, config=config())
        train(objective, encoder, max_epochs=1, checkpoint=path)

    encoder = load_encoder(encoder_folder("bert"))
    split = similar(40, seed=0)
    pairs = tokenise_pairs(split, encoder, prefixes=None)
    start(pairs)
    others = [
        tokenise_pairs(similar(40, seed=2), encoder, prefixes=None),
        tokenise_pairs(split, encoder, prefixes=PREFIXES),
        TokenPairs(pairs.columns, pairs.text_ids, 1 - (pairs.scores if pairs.scores is not None else 0)),
        TokenPairs(pairs.columns[::-1], pairs.text_ids[::-1], pairs.scores),
    ]
    for other in others:
        with pytest.raises(ResumeError, match="training pairs: then"):
            start(other)
    with pytest.raises(ResumeError, match="loss: then cosent, now cosine"):
        start(pairs, "cosine")
    start(pairs)


# What is learnt


@pytest.mark.parametrize(
    ("make", "settings", "metric"),
    [
        (matching, {"grades": True, "loss": "cosine"}, "spearman"),
        (matching, {"grades": False}, "average_precision"),
        (retrieval, {}, "ndcg_at_10"),
        (retrieval, {"loss": "triplet"}, "ndcg_at_10"),
        (retrieval, {"negatives": False, "widths": (8,)}, "ndcg_at_10"),
        (separation, {}, "v_measure"),
    ],
)
def test_training_improves_the_number_that_selects_the_epoch(
    make: Make, settings: dict[str, Any], metric: str, bert: Encoder
) -> None:
    objective = make(bert, **settings)
    training = train(objective, bert, max_epochs=5)
    scores = [row.validation_score or 0 for row in training.epochs]
    losses = [row.train_loss for row in training.epochs]
    assert objective.selection_metric == metric
    assert training.start_score is not None
    assert max(scores) > training.start_score + 0.05
    assert losses[-1] < losses[0]
    assert objective.score(training.adapter) == max(scores)
    assert training.adapter.head is None


def test_distillation_keeps_the_similarities_of_the_frozen_encoder(encoder_folder: Folders) -> None:
    moved = []
    for weight in (0.0, 100.0):
        encoder = load_encoder(encoder_folder("bert"))
        objective = matching(encoder, distillation=weight)
        tokens = objective._tokens
        frozen = encoder.embed(tokens)
        train(objective, encoder)
        similarities = [
            v @ v.T for v in (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (frozen, encoder.embed(tokens)))
        ]
        moved.append(float(((similarities[0] - similarities[1]) ** 2).mean()))
    assert moved[1] < moved[0] / 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refit_learns_from_the_selection_too(family: str, encoder_folder: Folders) -> None:
    make, settings = FAMILIES[family]
    encoder = load_encoder(encoder_folder("bert"))
    objective = make(encoder, **settings, refit=True)
    training = train(objective, encoder)
    assert training.refitted
    again = [row for row in training.epochs if row.validation_score is None]
    assert len(again) == training.best_epoch
    seen = [row.texts_per_second * row.seconds for row in training.epochs]
    assert seen[-1] - seen[0] == pytest.approx(60)
    both = objective.with_selection()
    assert not both.has_selection
    assert both.num_examples == objective.num_examples + 60


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_that_diverges_says_so(family: str, bert: Encoder) -> None:
    make, settings = FAMILIES[family]
    objective = make(bert, **settings, weight_decay=1000)
    adapter = give_effect(Adapter(bert, AdapterConfig()))
    with torch.no_grad():
        adapter.encoder_parameters[-1].fill_(math.nan)
    assert math.isnan(objective.score(adapter))
    adapter.detach()
    exploding = make(bert, **settings, weight_decay=1000, learning_rate=1)
    with pytest.raises(LorafleetError, match="training diverged in epoch 1: loss nan"):
        train(exploding, bert)


# Refusals


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (retrieval, {"batch_size": 1}, 'loss = "infonce" of objective = "retrieval".*at least 2, not 1'),
        (
            retrieval,
            {"batch_size": 1, "loss": "triplet"},
            'loss = "triplet".*at least 2, not 1',
        ),
        (matching, {"batch_size": 1}, 'loss = "cosent".*at least 2, not 1'),
        (separation, {"batch_size": 3}, 'loss = "infonce" of objective = "separation".*at least 4, not 3'),
        (retrieval, {"loss": "cosent"}, "loss = 'cosent' does not fit data in which all pairs are positive"),
        (matching, {"loss": "infonce"}, "'infonce' does not fit data in which each pair has a score; set it to cosent"),
    ],
)
def test_what_cannot_be_learnt_is_refused(make: Make, settings: dict[str, Any], message: str, bert: Encoder) -> None:
    with pytest.raises(ConfigError, match=message):
        make(bert, **settings)


def test_one_pair_at_a_time_is_enough_for_the_cosine_loss(bert: Encoder) -> None:
    assert matching(bert, loss="cosine", batch_size=1).num_examples == 240


def test_validation_pairs_of_one_score_cannot_select(bert: Encoder) -> None:
    pairs = tokenise_pairs(similar(20, seed=0), bert, prefixes=None)
    same = TokenPairs(pairs.columns, pairs.text_ids, np.full(20, 0.5, dtype=np.float32))
    with pytest.raises(DataError, match="the 20 validation pairs have one score"):
        PairObjective(pairs, same, family="text-matching", loss="cosent", config=config())


def test_a_width_larger_than_the_vectors_is_refused(bert: Encoder) -> None:
    with pytest.raises(ConfigError, match=f"train.widths: 64 is larger than the {bert.hidden_size} dimensions"):
        train(matching(bert, widths=(64, 8)), bert)
