"""Arms of a comparison: trained by the one loop, measured from their files in a fresh process, scored together."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tomli_w
import torch
from builders import load_encoder, save_tiny_encoder, toy_texts
from commands import Command, run, write_task

from pipeline.adapter.full_encoder import FullEncoder
from pipeline.adapter.linear_map import LinearMap, VectorTable
from pipeline.adapter.targets import projection_paths
from pipeline.compare import measuring
from pipeline.compare.collect import collect_arms, find_arm, finish_comparison, reuse_arm
from pipeline.compare.files import ArmResult, ComparisonFolder, read_arrays, write_arrays
from pipeline.compare.job import ArmJob
from pipeline.compare.plan import ArmSpec, ComparisonPlan
from pipeline.compare.preflight import preflight_comparison
from pipeline.compare.saved import StateMeta
from pipeline.compare.scores import score_arms
from pipeline.compare.statistics import Series
from pipeline.config import AdapterConfig, ComparisonConfig, EvaluateConfig, TrainConfig, load_config, load_config_of
from pipeline.encoder.files import find_encoder
from pipeline.encoder.runtime import exact_runtime
from pipeline.encoder.trainable import TrainableEncoder
from pipeline.errors import AdapterError, ConfigError, VerificationError
from pipeline.objectives.pairs import PairObjective, tokenise_pairs
from pipeline.pairs.data import PairData
from pipeline.pairs.reading import read_task
from pipeline.training.train import train_state
from pipeline.vector_scores import pair_metrics

Folders = Callable[[str], Path]
ARMS = ("frozen", "full", "lora:query-value", "linear")


def write_labelled_pairs(path: Path, num_pairs: int, *, seed: int) -> None:
    """Pairs of toy texts: label 1 for one topic, 0 for two."""
    texts, topics = toy_texts(3 * num_pairs, seed=seed)  # three topics take turns
    blocks = range(0, len(texts), 6)
    chosen = [pair for start in blocks for pair in ((start, start + 3), (start + 1, start + 5))]
    rows = [
        {
            "sentence1": texts[one],
            "sentence2": texts[other],
            "label": int(topics[one] == topics[other]),
            "kind": "first" if one < len(texts) // 2 else "second",
        }
        for one, other in chosen
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def values_of_config(folder: Path, encoder: Path, **compare: Any) -> dict[str, Any]:
    """Config of a comparison on labelled pairs."""
    rates = {arm: [2e-3] for arm in compare.get("arms", ARMS) if arm != "frozen"}
    return {
        "encoder": {"name": str(encoder), "max_tokens": 24},
        "train": {"batch_size": 8, "max_epochs": 2, "precision": "float32"},
        "evaluate": {"bootstrap_draws": 100},
        "compare": {"arms": list(ARMS), "seeds": [0, 1], "learning_rates": rates} | compare,
        "mteb_tasks": [
            {
                "name": "Matches",
                "train": str(folder / "train.parquet"),
                "test": str(folder / "test.parquet"),
                "objective": "text-matching",
                "columns": ["sentence1", "sentence2"],
                "score_column": "label",
                "loss": "cosine",
                "slices": ["kind"],
            }
        ],
    }


@dataclass(frozen=True)
class Compared:
    """A finished comparison."""

    plan: ComparisonPlan
    results: tuple[ArmResult, ...]
    folder: ComparisonFolder
    data: PairData

    def spec(self, arm: str) -> ArmSpec:
        return next(spec for spec in self.plan.arms if spec.arm == arm)


@dataclass(frozen=True)
class Planned:
    """A comparison that can start."""

    plan: ComparisonPlan
    store: Path
    data: PairData


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    folder = tmp_path_factory.mktemp("compare")
    encoder = save_tiny_encoder(folder / "tiny", "bert")
    write_labelled_pairs(folder / "train.parquet", 60, seed=1)
    write_labelled_pairs(folder / "test.parquet", 50, seed=2)
    config = ComparisonConfig.model_validate(values_of_config(folder, encoder))
    store = folder / "comparisons"
    plan = preflight_comparison(config, exact_runtime(threads=1, use_gpu=False), run_id="first", store=str(store))
    data = read_task(plan.mteb_task, config=config.train, offline=True)
    assert isinstance(data, PairData)
    return Planned(plan, store, data)


@pytest.fixture(scope="module")
def compared(planned: Planned) -> Compared:
    results = tuple(ArmJob(spec).run(lambda row: None, lambda progress: None) for spec in planned.plan.arms)
    target = ComparisonFolder(planned.store / "first")
    collect_arms(planned.plan, results, (), folder=target)
    finish_comparison(planned.plan, results, (), folder=target, seconds=1.0)
    return Compared(planned.plan, results, target, planned.data)


@pytest.mark.faults
def test_every_arm_has_its_scores_its_differences_and_its_cost(compared: Compared) -> None:
    summary = json.loads(compared.folder.results.read_text(encoding="utf-8"))
    assert list(summary["arms"]) == list(ARMS)
    for arm in ARMS:
        value = summary["arms"][arm]["average_precision"]
        assert value["low"] <= value["value"] <= value["high"]
        assert len(value["by_seed"]) == 2
    assert set(summary["differences"]["linear"]) == {"frozen", "full"}
    over = summary["differences"]["full"]["frozen"]["average_precision"]
    full, frozen = (summary["arms"][arm]["average_precision"]["value"] for arm in ("full", "frozen"))
    assert over["gain"] == pytest.approx(full - frozen)
    costs = summary["costs"]
    width = load_encoder(compared.plan.config.encoder.name).hidden_size
    assert costs["frozen"]["parameters"] == 0 < costs["linear"]["parameters"] == width**2
    assert costs["full"]["parameters"] > costs["lora:query-value"]["parameters"] == 2 * 2 * 2 * width * 8
    assert costs["full"]["bytes_per_task"] > costs["full"]["parameters"] * 4
    assert {path.stem for path in (compared.folder.root / "metrics").glob("*.parquet")} == {
        *("values", "differences", "trials", "seeds", "costs", "errors", "wrong_pairs")
    }
    assert compared.folder.manifest.is_file()
    page = compared.folder.page.read_text(encoding="utf-8")
    assert "has the best average precision on test" in page
    assert not re.search(r'(src|href)="(?!#)', page)


@pytest.mark.faults
def test_the_full_encoder_is_loaded_by_others_and_gives_the_measured_cosines(compared: Compared) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    folder = compared.folder.arm("full").seed(0)
    model = SentenceTransformer(str(folder / "encoder"), device="cpu", local_files_only=True)
    one, other = (model.encode(column, normalize_embeddings=True) for column in compared.data.test.columns)
    measured = read_arrays(compared.folder.arm("full").measured(0))["similarity"][0]
    assert np.abs((one * other).sum(axis=1) - measured).max() < 1e-5
    _, loading = AutoModel.from_pretrained(folder / "encoder", output_loading_info=True, local_files_only=True)
    assert not loading["unexpected_keys"]


@pytest.mark.faults
def test_full_fine_tuning_changes_every_weight_matrix(compared: Compared) -> None:
    base = load_encoder(compared.plan.config.encoder.name).model.state_dict()
    trained = load_encoder(compared.folder.arm("full").seed(0) / "encoder").model.state_dict()
    unchanged = [n for n, t in base.items() if t.dim() == 2 and torch.equal(t, trained[n]) and "token_type" not in n]
    assert not unchanged


def broken_copy(compared: Compared, arm: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compared.folder.arm(arm).seed(0), tmp_path / "seed-0"))


def check(compared: Compared, arm: str, folder: Path) -> None:
    """Load a saved state and check it."""
    spec, texts = compared.spec(arm), measuring.checked_texts(compared.data)
    measuring.check_state(spec, folder, texts, measuring.frozen_vectors(spec, texts))


def zero(path: Path) -> None:
    write_arrays(path, {name: np.zeros_like(array) for name, array in read_arrays(path).items()})


@pytest.mark.faults
def test_a_lora_adapter_of_zeros_is_refused(compared: Compared, tmp_path: Path) -> None:
    folder = broken_copy(compared, "lora:query-value", tmp_path)
    zero(folder / "adapter_model.safetensors")
    with pytest.raises(VerificationError, match="no effect on the encoder"):
        check(compared, "lora:query-value", folder)


@pytest.mark.faults
@pytest.mark.parametrize(("arm", "file"), [("linear", "linear_map.safetensors"), ("full", "encoder/model.safetensors")])
def test_another_state_in_the_files_is_refused(compared: Compared, tmp_path: Path, arm: str, file: str) -> None:
    folder = broken_copy(compared, arm, tmp_path)
    zero(folder / file)
    with pytest.raises(VerificationError, match=r"are not what was trained|differ by"):
        check(compared, arm, folder)


@pytest.mark.faults
def test_a_state_that_was_not_attached_is_refused(
    compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = measuring.load_state

    def detached(*arguments: Any, **options: Any) -> Any:
        state, meta = loaded(*arguments, **options)
        state.detach()
        return state, meta

    monkeypatch.setattr(measuring, "load_state", detached)
    for arm in ("lora:query-value", "linear"):
        with pytest.raises(VerificationError, match="no effect on the encoder"):
            check(compared, arm, compared.folder.arm(arm).seed(0))


@pytest.mark.faults
@pytest.mark.parametrize("arm", ["full", "lora:query-value", "linear"])
def test_a_state_of_another_encoder_is_refused(compared: Compared, tmp_path: Path, arm: str) -> None:
    folder = broken_copy(compared, arm, tmp_path)
    meta = StateMeta.model_validate_json((folder / "state.json").read_text())
    (folder / "state.json").write_text(meta.changed(encoder_revision="sha256:" + "0" * 64).model_dump_json())
    with pytest.raises(VerificationError, match="belongs to another encoder: expected sha256"):
        check(compared, arm, folder)


@pytest.mark.faults
def test_a_finished_arm_is_taken_over_unless_its_files_have_changed(compared: Compared, tmp_path: Path) -> None:
    store = Path(shutil.copytree(compared.folder.root.parent, tmp_path / "store"))
    spec = compared.spec("linear")
    found = find_arm(store, spec)
    assert found is not None and not isinstance(found, str)
    taken = reuse_arm(*found, ComparisonFolder(store / "second").arm("linear"), run_id="second")
    assert taken.reused_from == "first" and taken.files == found[1].files
    shutil.rmtree(store / "second")
    assert find_arm(store, spec.changed(key="0" * 32)) is None
    zero(store / "first" / "linear" / "seed-0" / "linear_map.safetensors")
    assert find_arm(store, spec) == "first/linear: seed-0/linear_map.safetensors has changed since it was written"


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("kind", ["full", "linear"])
def test_a_killed_training_resumes_to_the_same_bits(planned: Planned, tmp_path: Path, kind: str) -> None:
    config = planned.plan.config
    files, runtime = find_encoder(config.encoder, offline=True), exact_runtime(threads=1, use_gpu=False)

    def trained(checkpoint: Path | None, on_epoch: Callable[[Any], None]) -> torch.Tensor:
        encoder = load_encoder(config.encoder.name)
        table = VectorTable(encoder)
        tokens = [
            tokenise_pairs(split, table if kind == "linear" else encoder, prefixes=None)
            for split in (planned.data.train, planned.data.validation)
        ]
        train = TrainConfig(batch_size=8, learning_rate=1e-3)
        objective = PairObjective(*tokens, family="text-matching", loss="cosine", config=train)

        def make() -> FullEncoder | LinearMap:
            return (
                LinearMap(table) if kind == "linear" else FullEncoder(TrainableEncoder(files, config.encoder, runtime))
            )

        found = train_state(
            objective,
            make,
            conditions={},
            train_config=train,
            max_epochs=3,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
        )
        return torch.cat([p.detach().flatten().clone() for p in found.adapter.parameters])

    def kill(row: Any) -> None:
        if row.epoch == 2:
            raise KilledError

    undisturbed = trained(None, lambda row: None)
    with pytest.raises(KilledError):
        trained(tmp_path / "checkpoint", kill)
    epochs: list[int] = []
    resumed = trained(tmp_path / "checkpoint", lambda row: epochs.append(row.epoch))
    assert epochs == [3]
    assert torch.equal(undisturbed, resumed)


def test_equal_arms_have_no_difference_and_seeds_widen_the_interval(planned: Planned) -> None:
    gold = planned.data.test.scores
    assert gold is not None
    random = np.random.default_rng(0)

    def series(arm: str, seed: int, noise: float) -> Series:
        similarity = np.clip(gold - 0.5 + noise * random.normal(size=len(gold)), -1, 1)
        return Series(arm, seed, {"similarity": similarity[np.newaxis]})

    good, bad = series("frozen", 0, 0.5), series("frozen", 1, 3.0)
    twice = [Series(arm, one.seed, one.arrays) for arm in ("frozen", "full") for one in (good, bad)]
    config = EvaluateConfig(bootstrap_draws=400)
    scores = score_arms(planned.data, twice, config=config, seed=0)
    assert all(d.gain == 0 and d.low == d.high == 0 and d.p_value == 1 for d in scores.differences)
    (both,) = [v for v in scores.values if (v.arm, v.metric, v.slice) == ("full", "auc", None)]
    alone = score_arms(planned.data, [good], config=config, seed=0).values
    (one,) = [v for v in alone if (v.metric, v.slice) == ("auc", None)]
    assert both.high is not None and both.low is not None and one.high is not None and one.low is not None
    assert both.high - both.low > 1.5 * (one.high - one.low)


def test_precision_and_recall_are_scikit_learns() -> None:
    from sklearn.metrics import precision_score, recall_score

    random = np.random.default_rng(0)
    gold, similarity = random.integers(2, size=40).astype(float), random.normal(size=40)
    times = random.integers(0, 3, size=40)
    options = {"gold": gold, "series": similarity[np.newaxis], "thresholds": np.array([0.2])}
    truth, called = np.repeat(gold, times), np.repeat(similarity >= 0.2, times)
    weights = times[:, np.newaxis].astype(float)
    assert pair_metrics.precision(weights, **options)[0, 0] == pytest.approx(precision_score(truth, called))
    assert pair_metrics.recall(weights, **options)[0, 0] == pytest.approx(recall_score(truth, called))
    assert pair_metrics.false_positive_rate(weights, **options)[0, 0] == pytest.approx(
        1 - recall_score(truth, called, pos_label=0)
    )


def test_targets_are_resolved_by_architecture(encoder_folder: Folders) -> None:
    def paths(family: str, target: str) -> list[str]:
        model = load_encoder(encoder_folder(family)).model
        config = AdapterConfig.model_validate({"target": target})
        return projection_paths(model, config, model_type=model.config.model_type)

    assert len(paths("bert", "query-value")) == 4
    assert len(paths("bert", "all-linear")) == 12
    assert {path.rpartition(".")[2] for path in paths("distilbert", "query-value")} == {"q_lin", "v_lin"}
    with pytest.raises(AdapterError, match="\"query-value\" is not supported for model type 'modernbert'"):
        paths("modernbert", "query-value")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compare": {"arms": ["full", "lora"]}}, "arms must contain"),
        ({"compare": {"arms": ["frozen", "ful"]}}, "compare.arms.1: expected frozen, full"),
        ({"compare": {"learning_rates": {"full": [1e-5]}}}, "every arm needs as many learning rates, found full 1"),
        ({"compare": {"arms": ["frozen", "full"], "learning_rates": {"lora": [1e-3]}}}, "names lora, which is no"),
        ({"publish": {"to": "somewhere"}}, "compare publishes nothing"),
        ({"train": {"warm_start": "somewhere"}}, "every arm starts from the encoder"),
        ({"compare": {"forgetting": [{"name": "Banking77Classification"}]}}, "is already taken"),
    ],
)
def test_a_wrong_comparison_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = {"mteb_tasks": [{"name": "Banking77Classification"}]} | change
    (tmp_path / "c.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config_of(ComparisonConfig, str(tmp_path / "c.toml"))


def test_train_leaves_the_section_of_compare_alone(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[compare]\nseeds = [7]\n[[mteb_tasks]]\nname = "Banking77Classification"\n')
    assert "compare" not in load_config(str(tmp_path / "c.toml")).model_dump()
    assert load_config_of(ComparisonConfig, str(tmp_path / "c.toml")).compare.seeds == (7,)


def test_the_default_rates_follow_the_configured_one() -> None:
    config = ComparisonConfig.model_validate({"mteb_tasks": [{"name": "Banking77Classification"}]})
    assert config.rates("full") == (1e-5, 2e-5, 5e-5, 1e-4)
    assert config.rates("last:2") == config.rates("lora") == (2.5e-4, 5e-4, 1e-3, 2e-3)
    assert config.rates("frozen") == ()


@pytest.mark.timeout(600)
def test_the_command_compares_reuses_and_refuses(encoder_folder: Folders, tmp_path: Path, prefect_api: str) -> None:
    write_labelled_pairs(tmp_path / "train.parquet", 60, seed=1)
    write_labelled_pairs(tmp_path / "test.parquet", 50, seed=2)
    config = tmp_path / "c.toml"
    values = values_of_config(tmp_path, encoder_folder("bert"), arms=["frozen", "linear"], seeds=[0])
    config.write_text(tomli_w.dumps(values), encoding="utf-8")
    first = run("compare", "--config", config, cwd=tmp_path, PREFECT_API_URL=prefect_api)
    assert first.code == 0, first.err
    sign, _, folder = first.out.rstrip().rpartition("\n")[2].partition(" ")
    assert sign == "comparison:" and (tmp_path / folder / "manifest.json").is_file()
    again = run("compare", "--config", config, "--json", cwd=tmp_path, PREFECT_API_URL=prefect_api)
    assert again.code == 0, again.err
    assert "linear: unchanged, taken over" in again.err and "frozen: unchanged" in again.err
    assert set(json.loads(again.out)["arms"]) == {"frozen", "linear"}
    values["mteb_tasks"].append(values["mteb_tasks"][0] | {"name": "Others"})
    config.write_text(tomli_w.dumps(values), encoding="utf-8")
    refused = run("compare", "--config", config, cwd=tmp_path)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "compare takes one data set, found 2: Matches, Others; choose with --task NAME" in refused.err


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_comparison_that_was_stopped_goes_on(
    how: str, encoder_folder: Folders, tmp_path: Path, prefect_api: str
) -> None:
    write_labelled_pairs(tmp_path / "train.parquet", 60, seed=1)
    write_labelled_pairs(tmp_path / "test.parquet", 50, seed=2)
    values = values_of_config(tmp_path, encoder_folder("bert"), arms=["frozen", "linear", "full"], seeds=[0])
    (tmp_path / "c.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    command = Command("compare", "--config", "c.toml", cwd=tmp_path, PREFECT_API_URL=prefect_api)
    command.wait_until(lambda: bool(list((tmp_path / "comparisons").glob("*/frozen/arm.json"))))
    if how == "killed":
        command.kill("flows.cli")
        assert command.wait().code == -signal.SIGKILL
    else:
        command.process.send_signal(signal.SIGINT)
        ended = command.wait()
        assert ended.code == 130 and "Traceback" not in ended.err
        assert command.left(seconds=20) == []
    ended = run("compare", "--config", "c.toml", "--json", cwd=tmp_path, PREFECT_API_URL=prefect_api)
    assert ended.code == 0, ended.err
    assert "frozen: unchanged, taken over" in ended.err
    assert set(json.loads(ended.out)["arms"]) == {"frozen", "linear", "full"}


def entry_of(folder: Path, family: str) -> dict[str, Any]:
    """Files of toy data of a task family, and their entry of ``mteb_tasks``."""
    if family in ("classification", "separation"):
        return write_task(folder, "Toys", num_train=90, num_test=60) | {"objective": family}
    for split, num_pairs, seed in (("train", 60, 1), ("test", 50, 2)):
        write_labelled_pairs(folder / f"{split}.parquet", num_pairs, seed=seed)
        pairs = pq.read_table(folder / f"{split}.parquet").drop_columns("kind")
        if family == "labels without slices":
            pass
        elif family == "retrieval":
            pairs = pairs.filter(pc.equal(pairs["label"], 1)).select(["sentence1", "sentence2"])
            pairs = pairs.rename_columns(["query", "passage"])
        else:
            graded = pa.array([3.0 * label + number % 2 for number, label in enumerate(pairs["label"].to_pylist())])
            pairs = pairs.drop_columns("label").append_column("score", graded)
        pq.write_table(pairs, folder / f"{split}.parquet")
    return {"name": "Toys", "train": str(folder / "train.parquet"), "test": str(folder / "test.parquet")}


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "metric"),
    [
        ("classification", "accuracy"),
        ("separation", "v_measure"),
        ("retrieval", "ndcg_at_10"),
        ("graded", "spearman"),
        ("labels without slices", "average_precision"),
    ],
)
def test_every_family_is_compared(family: str, metric: str, encoder_folder: Folders, tmp_path: Path) -> None:
    values = values_of_config(tmp_path, encoder_folder("bert"), arms=["frozen", "full", "lora", "linear"], seeds=[0])
    other = write_task(tmp_path / "other", "Others", num_train=60, num_test=40)
    values["compare"]["forgetting"] = [other]
    values["mteb_tasks"] = [entry_of(tmp_path, family)]
    config = ComparisonConfig.model_validate(values)
    plan = preflight_comparison(
        config, exact_runtime(threads=1, use_gpu=False), run_id="one", store=str(tmp_path / "comparisons")
    )
    results = tuple(ArmJob(spec).run(lambda row: None, lambda progress: None) for spec in plan.arms)
    folder = ComparisonFolder(tmp_path / "comparisons" / "one")
    collect_arms(plan, results, (), folder=folder)
    summary = json.loads(folder.results.read_text(encoding="utf-8"))
    assert summary["main_metric"] == metric
    assert {arm for arm in summary["arms"] if metric in summary["arms"][arm]} == {"frozen", "full", "lora", "linear"}
    assert all(0 <= summary["arms"][arm][metric]["value"] <= 1 for arm in summary["arms"] if metric != "spearman")
    assert all(summary["forgetting"][arm]["Others"]["metric"] == "accuracy" for arm in summary["arms"])
    assert "NaN" not in folder.results.read_text(encoding="utf-8")
    assert folder.page.stat().st_size > 10_000
