"""A search: what is tried, what is stopped, what survives a kill, and what it says of chance."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tomli_w
import torch
from commands import Command, run, write_task
from safetensors import safe_open

from pipeline.config import RunConfig, SearchedConfig, load_config, load_config_of
from pipeline.encoder.runtime import exact_runtime
from pipeline.errors import ConfigError, DivergedError
from pipeline.run.job import TaskJob
from pipeline.run.plan import job_spec
from pipeline.run.preflight import preflight
from pipeline.search.job import TrialsJob
from pipeline.search.preflight import preflight_search
from pipeline.search.report import Outcome, expected_optimism, sentences, summarise, winner_of, write_results
from pipeline.search.study import Study
from pipeline.search.trials import SearchPlan, TrialFiles, TrialRecord

Folders = Callable[[str], Path]


def values_of_config(folder: Path, encoder: Path, **search: Any) -> dict[str, Any]:
    """Config of a search on toy texts."""
    return {
        "encoder": {"name": str(encoder), "max_tokens": 24},
        "train": {"batch_size": 16, "max_epochs": 4, "patience": 4, "precision": "float32"},
        "evaluate": {"bootstrap_draws": 100, "columns": ["frozen_full_data", "head"]},
        "search": {"trials": 5, "rank": [2, 4], "learning_rate": [1e-4, 1e-2]} | search,
        "mteb_tasks": [write_task(folder, "Topics", num_train=120, num_test=60)],
    }


@pytest.fixture
def plan(encoder_folder: Folders, tmp_path: Path) -> SearchPlan:
    config = SearchedConfig.model_validate(values_of_config(tmp_path, encoder_folder("bert")))
    return preflight_search(config, exact_runtime(threads=1, use_gpu=False), runs=str(tmp_path / "runs"))


def ask(study: Study) -> TrialRecord:
    trial = study.ask()
    assert trial is not None
    return trial


def score_of(trial: TrialRecord) -> float:
    """A made-up score, best at a learning rate of 1e-3 and a rank of 4."""
    return 0.9 - 0.1 * abs(np.log10(trial.learning_rate) + 3) - 0.05 * (trial.values["rank"] != 4)


def search_through(plan: SearchPlan, known: list[TrialRecord], *, until: int) -> list[TrialRecord]:
    """Trials up to a number, with made-up scores of four epochs."""
    study = Study(plan.config, known, lambda rate, values: plan.spec(rate, values).key)
    trials = [trial for trial in known if trial.state != "running"]
    waiting = [trial for trial in known if trial.state == "running"]
    while len(trials) < until:
        trial = waiting.pop() if waiting else ask(study)
        for epoch in range(len(trial.scores), 4):
            trial = trial.changed(scores=(*trial.scores, score_of(trial) - 0.2 / (epoch + 1)), start_score=0.1)
            if study.should_stop(trial) and epoch < 3:
                trial = trial.changed(state="stopped")
                break
        else:
            trial = trial.changed(state="finished")
        study.tell(trial)
        trials.append(trial)
    return trials


def test_the_first_trial_is_the_config_and_none_is_tried_twice(plan: SearchPlan) -> None:
    trials = search_through(plan, [], until=16)
    own = plan.config.train.learning_rate
    assert (trials[0].learning_rate, trials[0].values, trials[0].state) == (own, {"rank": 8}, "finished")
    assert len({trial.key for trial in trials}) == 16
    assert {trial.values["rank"] for trial in trials} == {8, 2, 4}
    states = [trial.state for trial in trials]
    assert 3 <= states.count("stopped") <= 13
    assert winner_of(trials).score == max(t.score or 0 for t in trials if t.state == "finished")


@pytest.mark.parametrize("killed_in", [0, 1, 5])
def test_a_search_that_was_killed_goes_on_as_it_would_have(plan: SearchPlan, tmp_path: Path, killed_in: int) -> None:
    whole = search_through(plan, [], until=8)
    files = TrialFiles(tmp_path / "trials")
    for trial in whole[:killed_in]:
        files.write(trial)
    half = whole[killed_in]
    files.write(half.changed(state="running", scores=half.scores[:-1]))
    assert search_through(plan, files.known(), until=8) == whole
    (files.root / "trial-00000.json").write_text("{")
    assert files.known() == []


def test_every_combination_is_tried_before_the_search_ends(plan: SearchPlan) -> None:
    rate = plan.config.train.learning_rate
    search = plan.config.search.changed(learning_rate=(rate, rate), layers=("last:1",), target=("query-value",))
    config = plan.config.changed(search=search)
    study = Study(config, [], lambda rate, values: plan.spec(rate, values).key)
    found = []
    while (trial := study.ask()) is not None:
        study.tell(trial.changed(state="finished", scores=(0.5,)))
        found.append((*trial.values.values(),))
    assert len(found) == len(set(found)) == 3 * 2 * 2


def test_the_first_trial_has_every_digit_of_the_config(plan: SearchPlan) -> None:
    config = plan.config.changed(train=plan.config.train.changed(learning_rate=0.0012345))
    first = ask(Study(config, [], lambda rate, values: plan.spec(rate, values).key))
    assert first.learning_rate == 0.0012345


def test_a_trial_behind_the_first_one_is_stopped(plan: SearchPlan) -> None:
    study = Study(plan.config, [], lambda rate, values: plan.spec(rate, values).key)
    first = ask(study).changed(scores=(0.9, 0.9), state="finished")
    assert not study.should_stop(first)
    study.tell(first)
    assert study.should_stop(ask(study).changed(scores=(0.1,)))


def test_a_trial_that_diverged_leaves_the_encoder_to_the_next(
    plan: SearchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing: Callable[[Any], None] = lambda event: None  # noqa: E731
    job, spec, other = TrialsJob(), plan.spec(2e-3, {"rank": 2}), plan.spec(3e-3, {"rank": 4})
    with monkeypatch.context() as broken:
        broken.setattr("pipeline.training.loop.math.isfinite", lambda loss: False)
        with pytest.raises(DivergedError):
            job.advance(other, 1, nothing, nothing)
    assert job.advance(spec, 1, nothing, nothing) == TrialsJob().advance(
        spec.changed(runs=f"{spec.runs}-other"), 1, nothing, nothing
    ).changed(seconds=job.advance(spec, 1, nothing, nothing).seconds)


def test_a_checkpoint_that_is_ahead_counts_epoch_by_epoch(plan: SearchPlan) -> None:
    nothing: Callable[[Any], None] = lambda event: None  # noqa: E731
    spec = plan.spec(2e-3, {"rank": 2})
    whole = TrialsJob().advance(spec, 4, nothing, nothing)
    first = TrialsJob().advance(spec, 1, nothing, nothing)
    assert (first.scores, first.is_finished, whole.is_finished) == (whole.scores[:1], False, True)


def test_a_trial_is_the_training_of_a_run_to_the_bit_and_is_taken_over(plan: SearchPlan, tmp_path: Path) -> None:
    spec = plan.spec(2e-3, {"rank": 4})
    job = TrialsJob()
    nothing: Callable[[Any], None] = lambda event: None  # noqa: E731
    other = plan.spec(5e-3, {"rank": 2})
    for until in (1, 2, 3, 4, 5):
        found = job.advance(spec, until, nothing, nothing)
        job.advance(other, until, nothing, nothing)  # shares the encoder, and takes turns
        if found.is_finished:
            break
    assert found.is_finished and len(found.scores) == 4

    path = tmp_path / "best.toml"
    path.write_text(tomli_w.dumps(spec.config.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    config = load_config(str(path))
    planned = preflight(config, plan.runtime)
    assert planned.tasks[0].key == spec.key
    of_run = job_spec(planned, planned.tasks[0], run_id="one", runs=Path(plan.runs))
    epochs: list[Any] = []
    taken = TaskJob(of_run)
    taken.evaluate_frozen()
    taken.train(epochs.append, nothing)
    assert epochs == []

    alone = TaskJob(of_run.changed(runs=str(tmp_path / "others")))
    alone.evaluate_frozen()
    alone.train(epochs.append, nothing)
    assert [row.validation_accuracy for row in epochs] == list(found.scores)
    weights = [tensors_of(job.folder.root / "adapter_model.safetensors") for job in (taken, alone)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def test_a_trial_never_looks_at_test(plan: SearchPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.run.classification_work import LabelledTexts

    class Guard:
        def __init__(self, data: Any) -> None:
            self._data = data

        def __getattr__(self, name: str) -> Any:
            assert not name.startswith("test"), f"a trial reads {name}"
            return getattr(self._data, name)

    whole = LabelledTexts.data.func  # type: ignore[attr-defined]
    monkeypatch.setattr(LabelledTexts, "data", property(lambda self: Guard(whole(self))))
    nothing: Callable[[Any], None] = lambda event: None  # noqa: E731
    assert TrialsJob().advance(plan.spec(1e-3, {"rank": 2}), 1, nothing, nothing).scores


def test_the_expected_optimism_is_that_of_equal_trials() -> None:
    random = np.random.default_rng(0)
    best = random.binomial(500, 0.8, size=(4000, 12)).max(axis=1) / 500
    assert expected_optimism("accuracy", 0.8, num_trials=12, num_items=500) == pytest.approx(
        best.mean() - 0.8, rel=0.05
    )
    assert expected_optimism("accuracy", 0.8, num_trials=1, num_items=500) == pytest.approx(0, abs=1e-9)
    assert expected_optimism("v_measure", 0.8, num_trials=12, num_items=500) is None
    normal = random.normal(size=(4000, 200, 2))
    normal[..., 1] = 0.5 * normal[..., 0] + np.sqrt(0.75) * normal[..., 1]
    ranks = normal.argsort(axis=1).argsort(axis=1) - 99.5
    found = (ranks[..., 0] * ranks[..., 1]).mean(axis=1) / (ranks[..., 0] ** 2).mean(axis=1)
    expected = np.sort(found.reshape(-1, 10), axis=1)[:, -1].mean() - found.mean()
    assert expected_optimism("spearman", found.mean(), num_trials=10, num_items=200) == pytest.approx(expected, rel=0.1)


def test_results_name_winner_default_and_chance(plan: SearchPlan, tmp_path: Path) -> None:
    trials = search_through(plan, [], until=16)
    trials[3] = trials[3].changed(state="failed", scores=(), start_score=None, fault="<b>training diverged</b>")
    write_results(tmp_path, plan, trials, Outcome("accuracy", None, None))
    summary = json.loads((tmp_path / "search.json").read_text())
    assert summary == summarise(plan, trials, Outcome("accuracy", None, None))
    assert summary["states"]["failed"] == 1
    assert len(sentences(summary)) == 2
    failed = [trials[0].changed(state="failed", scores=(), start_score=None), *trials[1:]]
    assert "diverged" in sentences(summarise(plan, failed, Outcome("accuracy", None, None)))[0]
    without = summarise(plan, trials[1:], Outcome("v_measure", None, None))
    assert without["default"] is None and "not known" in sentences(without)[1]
    rows = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert [row["number"] for row in rows] == list(range(16))
    page = (tmp_path / "search.html").read_text()
    assert "<svg" in page and "<b>" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": {"trials": 1}}, "search.trials"),
        ({"search": {"learning_rate": [1e-2, 1e-3]}}, "expected the smaller number first, found 0.01 and 0.001"),
        ({"search": {"ranks": [1]}}, "search.ranks"),
        ({"search": {"learning_rate": [1e-5, 1e-4]}}, "that holds train.learning_rate = 0.001, found 1e-05 to 0.0001"),
        ({"train": {"early_stopping_split": "test"}}, "would choose a trial on test"),
        ({"train": {"refit": True}}, "refit has no effect"),
        ({"publish": {"to": "somewhere"}}, "search publishes nothing"),
    ],
)
def test_a_wrong_search_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = {"mteb_tasks": [{"name": "Banking77Classification"}]} | change
    (tmp_path / "c.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config_of(SearchedConfig, str(tmp_path / "c.toml"))


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"rank": [], "learning_rate": [1e-3, 1e-3]}, "nothing is searched"),
        ({"layers": ["last:7"]}, "search.layers: "),
        ({"loss": ["cosent"]}, "search.loss: "),
        ({"layers": ["some"]}, "search.layers"),
        ({"widths": [[8]]}, "search.widths: "),
        ({"widths": [[0]]}, "search.widths"),
        ({"rank": [256], "alpha": 1e6}, "search.rank: with rank 256, adapter.alpha would be 3.2e+07"),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_the_first_trial(
    encoder_folder: Folders, tmp_path: Path, search: dict[str, Any], message: str
) -> None:
    path = tmp_path / "c.toml"
    alpha = search.get("alpha", 16.0)
    search = {key: value for key, value in search.items() if key != "alpha"}
    values = values_of_config(tmp_path, encoder_folder("bert"), **search) | {"adapter": {"alpha": alpha}}
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    with pytest.raises(ConfigError) as found:
        config = load_config_of(SearchedConfig, str(path))
        preflight_search(config, exact_runtime(threads=1, use_gpu=False), runs=str(tmp_path / "runs"))
    assert message in str(found.value)


def test_train_and_search_leave_the_sections_of_others_alone(tmp_path: Path) -> None:
    text = '[compare]\nseeds = [7]\n[search]\ntrials = 3\n[[mteb_tasks]]\nname = "Banking77Classification"\n'
    (tmp_path / "c.toml").write_text(text)
    assert load_config_of(SearchedConfig, str(tmp_path / "c.toml")).search.trials == 3
    assert set(load_config(str(tmp_path / "c.toml")).model_dump()) == set(RunConfig.model_fields)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_search_that_is_killed_resumes_and_ends_in_a_config_that_train_takes(
    encoder_folder: Folders, tmp_path: Path, prefect_api: str
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(tomli_w.dumps(values_of_config(tmp_path, encoder_folder("bert"))), encoding="utf-8")
    command = Command("search", "--config", config, cwd=tmp_path, PREFECT_API_URL=prefect_api)
    files = lambda: sorted((tmp_path / "searches" / ".work").glob("*/trial-*.json"))  # noqa: E731
    command.wait_until(lambda: len(files()) >= 3)
    command.kill("flows.cli")
    command.wait()
    before = [json.loads(path.read_text()) for path in files()]
    ended = run("search", "--config", config, cwd=tmp_path, PREFECT_API_URL=prefect_api)
    assert ended.code == 0, ended.err
    assert f"{len(before)} trials known from an earlier search" in ended.err
    sign, _, folder = ended.out.rstrip().rpartition("\n")[2].partition(" ")
    found = tmp_path / folder
    assert sign == "search:"
    trials = pq.read_table(found / "trials.parquet").to_pylist()
    assert len({trial["key"] for trial in trials}) == len(trials) == 5
    assert [trial["key"] for trial in trials[: len(before)]] == [trial["key"] for trial in before]
    summary = json.loads((found / "search.json").read_text())
    assert summary["winner"]["validation_score"] >= summary["default"]["validation_score"]
    assert {path.name for path in found.iterdir()} == {
        *("best.toml", "default.toml", "search.html", "search.json", "trials.parquet")
    }
    best = tomllib.loads((found / "best.toml").read_text())
    assert best["train"]["learning_rate"] == summary["winner"]["learning_rate"]
    again = run("train", "--config", found / "best.toml", cwd=tmp_path, PREFECT_API_URL=prefect_api)
    assert again.code == 0 and "epoch 1" not in again.err, again.err
