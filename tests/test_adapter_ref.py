"""References to adapters: what each form finds, and what is said where it finds nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import COMMIT, calibration, finished_run, save_tiny_encoder, task_result
from bulk import LABELS, save_bulk_adapter

from pipeline.adapter.description import FoundAdapter
from pipeline.errors import AdapterError, InputError
from pipeline.evaluation.calibration import coverage_table
from pipeline.inference.reference import find_adapters, threshold_for
from pipeline.store.run_folder import adapter_sha256

Folders = Callable[[str], Path]


@pytest.fixture
def run(encoder_folder: Folders, tmp_path: Path) -> Path:
    """A run folder with two adapters."""
    for seed, name in enumerate(("Topics", "Pairs")):
        save_bulk_adapter(tmp_path / "run" / name, encoder_folder("bert"), seed=seed)
    return tmp_path / "run"


def find(*refs: Path | str) -> tuple[FoundAdapter, ...]:
    return find_adapters([str(ref) for ref in refs], offline=True)


def test_an_adapters_folder_tells_all_that_is_known_of_it(run: Path) -> None:
    (adapter,) = find(run / "Topics")
    meta = json.loads((run / "Topics" / "meta.json").read_text())
    assert (adapter.name, adapter.folder.root, adapter.label_names) == ("Topics", run / "Topics", LABELS)
    assert adapter.sha256 == adapter_sha256(run / "Topics")
    assert (adapter.encoder.revision, adapter.encoder.pooling, adapter.encoder.max_tokens) == (
        meta["encoder"]["revision"],
        "mean",
        24,
    )
    assert adapter.calibration == calibration()


def test_a_task_of_a_run_is_named_behind_the_folder(run: Path) -> None:
    (adapter,) = find(f"{run}#Pairs")
    assert (adapter.name, adapter.folder.root) == ("Pairs", run / "Pairs")


def test_folders_and_names_may_hold_signs_of_the_grammar(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "Topics", tmp_path / "c#" / "a=b")
    assert find(folder)[0].folder.root == folder
    assert find(f"{tmp_path / 'c#'}#a=b")[0].folder.root == folder
    assert [(a.name, a.folder.root) for a in find(f"My task={folder}")] == [("My task", folder)]


def test_a_run_with_several_adapters_lists_them(run: Path) -> None:
    with pytest.raises(AdapterError, match=r"choose one of its adapters, such as \S+/run#Pairs \(Pairs, Topics\)"):
        find(run)
    with pytest.raises(AdapterError, match="it has no adapter Nothing; it has Pairs, Topics"):
        find(f"{run}#Nothing")


def test_texts_of_a_classifier_are_neither_queries_nor_passages(run: Path) -> None:
    with pytest.raises(AdapterError, match=r"#Topics\.query: only texts of a retrieval adapter .* leave out \.query"):
        find(f"{run}#Topics.query")


def test_a_store_in_place_of_a_run_is_told_with_its_newest_run(run: Path) -> None:
    for name in ("20261101-000000-aaaa", "20261108-000000-bbbb"):
        finished_run(run.parent / name, [task_result("Topics")])
    for ref, newest in (
        (run.parent, "20261108-000000-bbbb;"),
        (f"{run.parent}#Topics", "20261108-000000-bbbb#Topics;"),
    ):
        with pytest.raises(AdapterError, match=rf"is a run store; name one of its runs, such as \S+/{newest}"):
            find(ref)


def test_a_run_with_one_adapter_is_that_adapter(run: Path) -> None:
    shutil.rmtree(run / "Pairs")
    assert [adapter.name for adapter in find(run)] == ["Topics"]


def test_a_folder_without_adapter_and_no_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is neither a run folder, nor a publication, nor an adapter's folder"):
        find(tmp_path)
    with pytest.raises(
        AdapterError, match=r"there is no folder .*; expected an adapter's folder, FOLDER#TASK, or hf:OWNER/NAME\[@"
    ):
        find(tmp_path / "gone")


@pytest.mark.parametrize(
    "ref",
    ["", "#Topics", "mine=", "hf:", "hf:someone", "hf:someone/adapters#", "hf:someone/adapters#../x", "hf:a/b#c d"],
)
def test_what_is_no_reference_is_not_taken_for_the_current_folder(
    ref: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    with pytest.raises(AdapterError, match="expected an adapter's folder, FOLDER#TASK, or hf:OWNER/NAME"):
        find(ref)


@pytest.mark.parametrize("task", ["../run/Topics", "..", ".", "Topics/", "x" * 300])
def test_a_task_behind_the_folder_is_a_name_and_not_a_path(task: str, run: Path) -> None:
    with pytest.raises(AdapterError, match="it has no adapter"):
        find(f"{run}#{task}")


def test_a_folder_whose_name_has_an_equals_sign_is_a_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "ex=1" / "run")
    monkeypatch.chdir(tmp_path)
    for ref in ("ex=1/run#Topics", "ex=1/run/Topics"):
        assert [(a.name, str(a.folder.root)) for a in find(ref)] == [("Topics", "ex=1/run/Topics")]
    assert [(a.name, str(a.folder.root)) for a in find("mine=ex=1/run#Topics")] == [("mine", "ex=1/run/Topics")]


def test_a_name_before_the_reference_is_the_adapters_name(run: Path) -> None:
    assert [adapter.name for adapter in find(f"mine={run}#Pairs", f"v1.2={run}/Topics")] == ["mine", "v1.2"]


def test_two_adapters_of_one_name_are_refused_until_one_is_named(run: Path) -> None:
    with pytest.raises(AdapterError, match=r"two adapters are called Topics.*--adapter NAME=REF"):
        find(run / "Topics", f"{run}#Topics")
    with pytest.raises(AdapterError, match="two adapters are called Topics, topics"):
        find(run / "Topics", f"topics={run}#Pairs")  # DuckDB and others take their columns for one
    assert [adapter.name for adapter in find(run / "Topics", f"other={run}#Topics")] == ["Topics", "other"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b'"sea"', b"\xff"])
@pytest.mark.parametrize("file", ["meta.json", "labels.json", "calibration.json"])
def test_a_damaged_description_is_told_by_its_file(file: str, content: bytes | None, run: Path) -> None:
    (run / "Topics" / file).unlink()
    if content is None:
        (run / "Topics" / file).mkdir()
    else:
        (run / "Topics" / file).write_bytes(content)
    with pytest.raises(AdapterError, match=rf"run/Topics/{file} (is damaged|cannot be read: it is a folder)"):
        find(run / "Topics")


@pytest.mark.parametrize(
    "labels",
    [
        [],
        ["sea"],
        ["sea", "sea", "garden"],
        ["sea", "", "garden"],
        ["sea", ["kitchen"], "garden"],
        ["sea", 1, "garden"],
        ["sea", None, "garden"],
        {"0": "sea", "1": "kitchen"},
        ["x" * 10_001, "kitchen", "garden"],
        [str(number) for number in range(100_001)],
    ],
)
def test_labels_that_are_no_list_of_different_names_are_refused(labels: object, run: Path) -> None:
    meta = run / "Topics" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"label_names": LABELS}))
    (run / "Topics" / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(AdapterError, match=r"Topics/labels\.json is damaged") as raised:
        find(run / "Topics")
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize("changes", [{"label_names": LABELS[::-1]}, {"label_names": LABELS[:2]}, {"num_classes": 2}])
def test_two_lists_of_label_names_that_differ_are_refused(changes: dict[str, object], run: Path) -> None:
    meta = run / "Topics" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | changes))
    with pytest.raises(AdapterError, match=r"run/Topics: meta\.json and labels\.json do not list the same label names"):
        find(run / "Topics")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "../x"}, "task"),
        ({"task": "x" * 300}, "task"),
        ({"task": "a\nerror: forged"}, "task"),
        ({"encoder": {"name": "../x", "revision": "a" * 40}}, r"encoder\.name"),
        ({"encoder": {"name": "x", "revision": "../../x"}}, r"encoder\.revision"),
        ({"encoder": {"name": "x", "revision": None}}, r"encoder\.revision"),
        ({"pooling": "sum"}, "pooling"),
        ({"rank": 0}, "rank"),
        ({"rank": 257}, "rank"),
        ({"rank": 2**70}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1}, "dropout"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"adapted_modules": []}, "adapted_modules"),
        ({"adapted_modules": ["a"] * 10_001}, "adapted_modules"),
        ({"adapted_modules": ["x" * 301]}, "adapted_modules"),
        ({"adapted_modules": ["layers.0.q\n"]}, "adapted_modules"),
    ],
)
def test_a_description_out_of_range_is_told_by_its_key(changes: dict[str, object], says: str, run: Path) -> None:
    meta = run / "Topics" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | changes))
    with pytest.raises(AdapterError, match=rf"Topics/meta\.json.*{says}") as raised:
        find(run / "Topics")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("temperature", [0, -1, 1e-320, 1e300, float("nan"), float("inf"), None])
def test_a_temperature_that_no_head_needs_is_refused(temperature: float | None, run: Path) -> None:
    path = run / "Topics" / "calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": temperature}))
    with pytest.raises(AdapterError, match=r"Topics/calibration\.json is damaged.*temperature"):
        find(run / "Topics")


def test_a_damaged_calibration_and_a_missing_head_are_told_by_their_file(run: Path) -> None:
    (run / "Topics" / "calibration.json").write_text("{")
    with pytest.raises(AdapterError, match=r"Topics/calibration\.json"):
        find(run / "Topics")
    (run / "Pairs" / "head.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"Pairs/head\.safetensors"):
        find(run / "Pairs")


def test_other_label_names_have_another_hash_and_the_same_ones_the_same(
    encoder_folder: Folders, run: Path, tmp_path: Path
) -> None:
    topics, pairs = find(run / "Topics", run / "Pairs")
    turned = save_bulk_adapter(tmp_path / "Turned", encoder_folder("bert"), labels=LABELS[::-1])
    assert topics.labels_sha256 == pairs.labels_sha256 != find(turned)[0].labels_sha256


def test_adapters_of_different_encoders_are_refused_with_both_revisions(run: Path, tmp_path: Path) -> None:
    other = save_bulk_adapter(tmp_path / "Other", save_tiny_encoder(tmp_path / "encoder", "bert", seed=5))
    one, two = (find(folder)[0].encoder.revision for folder in (run / "Topics", other))
    with pytest.raises(
        AdapterError, match=f"adapters Topics and Other were trained with encoder revision {one} and {two}"
    ):
        find(run / "Topics", other)


def test_adapters_trained_at_other_lengths_are_refused(run: Path) -> None:
    meta = run / "Pairs" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"max_tokens": 12}))
    with pytest.raises(AdapterError, match="Topics and Pairs were trained with encoder max_tokens 24 and 12"):
        find(run / "Topics", run / "Pairs")


# The Hub


@pytest.fixture
def published(hub_cache: Path, run: Path) -> Path:
    """``someone/adapters`` in the local cache, as a download of one of its adapters leaves it."""
    repository = hub_cache / "models--someone--adapters"
    shutil.copytree(run / "Topics", repository / "snapshots" / COMMIT / "Topics")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return repository


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_an_adapter_of_the_hub_is_found_in_the_cache(revision: str, published: Path, run: Path) -> None:
    (adapter,) = find(f"mine=hf:someone/adapters{revision}#Topics")
    assert (adapter.name, adapter.folder.root) == ("mine", published / "snapshots" / COMMIT / "Topics")
    assert adapter.sha256 == find(run / "Topics")[0].sha256


def test_what_the_cache_lacks_is_told(published: Path) -> None:
    with pytest.raises(AdapterError, match="hf:someone/adapters#Nothing: it has no adapter Nothing; it has Topics"):
        find("hf:someone/adapters#Nothing")
    with pytest.raises(AdapterError, match="hf:someone/adapters@v2#Topics: not in the local cache"):
        find("hf:someone/adapters@v2#Topics")
    with pytest.raises(AdapterError, match="name one of the repository's adapters: hf:someone/adapters#TASK"):
        find("hf:someone/adapters")


# The threshold of an accuracy


def measured(run: Path, **changes: Any) -> FoundAdapter:
    """An adapter whose ``calibration.json`` has other fields."""
    path = run / "Topics" / "calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return find(run / "Topics")[0]


def test_the_threshold_is_the_lowest_of_the_table_whose_lower_end_reaches_the_accuracy(run: Path) -> None:
    (adapter,) = find(run / "Topics")
    assert [(row.accuracy, row.low) for row in calibration().coverage if row.threshold == 0.7] == [(0.939, 0.934)]
    assert threshold_for(adapter, 0.934) == 0.7
    assert threshold_for(adapter, 0.935) == 0.8
    assert threshold_for(adapter, 0.1) == 0.0


def test_five_right_texts_of_seven_hundred_promise_no_accuracy_of_four_nines(run: Path) -> None:
    confidence = np.linspace(0.4, 0.98, 695)
    right = np.random.default_rng(0).random(695) < confidence
    probabilities = np.full((700, 3), 0.0025)
    probabilities[:695, 0], probabilities[:695, 1:] = confidence, (1 - confidence[:, None]) / 2
    probabilities[695:, 0] = 0.995
    table = coverage_table(probabilities, np.where(np.append(right, [True] * 5), 0, 1))
    assert (table[-1].threshold, table[-1].num_texts, table[-1].accuracy) == (0.99, 5, 1.0)
    adapter = measured(run, coverage=[row.model_dump() for row in table])
    with pytest.raises(
        InputError, match=r"0\.9999 cannot be guaranteed: too few validation texts, or too many errors on them; the"
    ) as refused:
        threshold_for(adapter, 0.9999)
    best = re.search(r"possible is (\S+), at confidence (\S+), reached by (\d+) of them", str(refused.value))
    assert best is not None
    assert threshold_for(adapter, float(best[1])) == float(best[2]), "what the message offers is granted"
    assert int(best[3]) > 5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"coverage": [{"threshold": 0.9, "coverage": 0.5, "accuracy": 1.0}]},
            "an older version wrote its calibration.json, which has no counts",
        ),
        ({"coverage": []}, "an older version wrote its calibration.json, which has no counts"),
        (
            {"fitted_on": "none"},
            "it was trained without a validation slice, on which coverage is measured; use --min-score",
        ),
    ],
)
def test_a_table_that_supports_no_promise_still_loads_and_a_target_accuracy_on_it_is_refused(
    changes: dict[str, Any], told: str, run: Path
) -> None:
    adapter = measured(run, **changes)
    assert adapter.calibration is not None
    with pytest.raises(
        InputError, match=f"adapter Topics: --target-accuracy 0.5 cannot be guaranteed: {re.escape(told)}"
    ):
        threshold_for(adapter, 0.5)


def test_an_adapter_without_calibration_promises_no_accuracy(run: Path) -> None:
    (run / "Topics" / "calibration.json").unlink()
    (adapter,) = find(run / "Topics")
    assert adapter.calibration is None
    with pytest.raises(
        InputError, match=r"Topics: --target-accuracy 0\.5 cannot be guaranteed: it has no calibration\.json; use --min"
    ):
        threshold_for(adapter, 0.5)
