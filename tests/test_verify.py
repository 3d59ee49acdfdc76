"""Verification: ``verify`` detects every changed file, and so does ``publish`` before it changes anything."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import few_shot_of, finished_run, give_effect, load_encoder, task_result
from publishing import _run_warm

import pipeline.inference.fresh_process
from flows.cli import main
from pipeline.adapter.adapter import Adapter
from pipeline.adapter.files import save_adapter
from pipeline.config import AdapterConfig, EncoderConfig, MtebTaskConfig, PublishConfig, RunConfig
from pipeline.encoder.runtime import exact_runtime
from pipeline.errors import AdapterError, EncoderError, InputError, LorafleetError, VerificationError
from pipeline.evaluation.scores import score_of_draws
from pipeline.history.tables import read_epochs, read_scores, write_epochs, write_scores
from pipeline.inference.reload import ReloadRequest, reload_elsewhere
from pipeline.publishing.card_claims import check_card
from pipeline.publishing.consistency import check_task
from pipeline.publishing.publication import read_candidate
from pipeline.publishing.publish import publish
from pipeline.publishing.verify import verify
from pipeline.records import (
    ClassificationResults,
    EncoderRef,
    MtebTask,
    Publication,
    ReferenceOutputs,
    ScoreRow,
    TaskResult,
)
from pipeline.reports.model_card import render_card
from pipeline.store.files import read_record
from pipeline.store.manifest import read_manifest, write_manifest
from pipeline.store.run_folder import RunFolder, TaskFolder

Folders = Callable[[str], Path]
LABELS = ("sea", "kitchen", "garden")
TEXTS = ("the ship and the harbour", "soup with pepper", "x")

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module", autouse=True)
def _warm() -> Iterator[None]:
    """A fresh process of a server that has everything imported: 0.2 s, not 4."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            pipeline.inference.fresh_process, "subprocess", SimpleNamespace(run=_run_warm, PIPE=subprocess.PIPE)
        )
        yield


@pytest.fixture(scope="module")
def trained(encoder_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one real adapter, with its probe. Not to be written to."""
    root, encoder = tmp_path_factory.mktemp("trained"), load_encoder(encoder_folder("bert"))
    adapter = give_effect(Adapter(encoder, AdapterConfig(), LABELS))
    made = TaskFolder(root / "made" / "A")
    save_adapter(adapter, made, meta={"task": "A"})
    logits = adapter.logits_of_vectors(encoder.embed(encoder.tokenise(TEXTS)))
    made.probe.write_text(
        ReferenceOutputs(texts=TEXTS, logits=logits.tolist(), tolerance=1e-3).model_dump_json(), encoding="utf-8"
    )
    config = RunConfig(
        encoder=EncoderConfig(name=str(encoder_folder("bert")), max_tokens=24), mteb_tasks=(MtebTaskConfig(name="A"),)
    )
    result = measured("A", encoder.ref)
    run = finished_run(root / "one", [result], config=config, adapters={"A": made.root}, run_id="one")
    few_shot = {column: with_draws(mteb) for column, mteb in few_shot_of(result).items()}
    run.task("A").few_shot.write_text(json.dumps(few_shot), encoding="utf-8")
    summary = read_record(run.results, ClassificationResults)
    run.readme.write_text(
        render_card([read_record(run.task("A").result, TaskResult)], summary, adapted_modules=()), encoding="utf-8"
    )
    return run.root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    """A copy of it."""
    return RunFolder(shutil.copytree(trained, tmp_path / "runs" / "one"))


def measured(name: str, encoder: EncoderRef) -> TaskResult:
    """Numbers of one MTEB task whose few-shot columns are those of two draws."""
    result = task_result(name, labels=LABELS, encoder=encoder)
    rows = [row.model_copy(update=_of_draws(row) if "few_shot" in row.column else {}) for row in result.scores]
    return TaskResult.model_validate(result.model_dump() | {"scores": rows})


def _of_draws(row: ScoreRow) -> dict[str, float]:
    score = score_of_draws([draw["accuracy"] for draw in draws_of(row.accuracy)], [row.macro_f1] * 2, None)
    return {"accuracy": score.accuracy, "low": score.low, "high": score.high}


def draws_of(accuracy: float) -> list[dict[str, float]]:
    return [{"accuracy": accuracy - 0.001}, {"accuracy": accuracy + 0.001}]


def with_draws(mteb: dict[str, Any]) -> dict[str, Any]:
    """mteb's result with the draws that it is the mean of."""
    (entry,) = mteb["scores"]["test"]
    draws = [draw | {"f1": entry["f1"], "ap": None} for draw in draws_of(entry["accuracy"])]
    return mteb | {"scores": {"test": [entry | {"scores_per_experiment": draws}]}}


def scored(task: TaskFolder, column: str, **changes: Any) -> None:
    """Change scores in ``few_shot.json``."""
    content = json.loads(task.few_shot.read_text(encoding="utf-8"))
    content[column]["scores"]["test"][0] |= changes
    task.few_shot.write_text(json.dumps(content), encoding="utf-8")


def check(place: Path, encoder_folder: Folders) -> None:
    verify(str(place), encoder=str(encoder_folder("bert")), offline=True)


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_what_was_trained_is_verified_and_published(run: RunFolder, encoder_folder: Folders, tmp_path: Path) -> None:
    check(run.root, encoder_folder)
    check(run.root / "A", encoder_folder)
    published = publish(run.root, PublishConfig(to=str(tmp_path / "out")))
    assert [adapter.name for adapter in published.verified] == ["A"]
    check(tmp_path / "out", encoder_folder)
    check(tmp_path / "out" / "A", encoder_folder)


def test_a_single_adapter_folder_is_verified_by_itself(run: RunFolder, encoder_folder: Folders, tmp_path: Path) -> None:
    alone = (tmp_path / "elsewhere" / "my copy").resolve()
    alone.parent.mkdir()
    run.task("A").root.rename(alone)
    check(alone, encoder_folder)
    change(alone / "meta.json", label_names=LABELS[::-1])
    with pytest.raises(VerificationError, match=r"A: meta\.json: label_names"):
        check(alone, encoder_folder)


# One file of an adapter changed, of which PEFT, a program, or lorafleet itself would load something else.


def _cut(name: str) -> Callable[[TaskFolder], None]:
    def harm(task: TaskFolder) -> None:
        path = task.root / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return harm


def _changed(name: str, **changes: Any) -> Callable[[TaskFolder], None]:
    return lambda task: change(task.root / name, **changes)


def _labels_reversed(task: TaskFolder) -> None:
    task.labels.write_text(json.dumps(LABELS[::-1]), encoding="utf-8")


def _both_reversed(task: TaskFolder) -> None:
    _labels_reversed(task)
    change(task.meta, label_names=LABELS[::-1])


def _far_probe(task: TaskFolder) -> None:
    probe = json.loads(task.probe.read_text(encoding="utf-8"))
    task.probe.write_text(json.dumps(probe | {"logits": [[9.0] * 3] * 3}), encoding="utf-8")


def _scored(**changes: Any) -> Callable[[TaskFolder], None]:
    return lambda task: scored(task, "adapted_few_shot", **changes)


def _few_shot(make: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[TaskFolder], None]:
    def harm(task: TaskFolder) -> None:
        content = json.loads(task.few_shot.read_text(encoding="utf-8"))
        task.few_shot.write_text(json.dumps({column: make(one) for column, one in content.items()}), encoding="utf-8")

    return harm


def _swapped(task: TaskFolder) -> None:
    content = json.loads(task.few_shot.read_text(encoding="utf-8"))
    task.few_shot.write_text(json.dumps(dict(zip(content, reversed(content.values()), strict=True))), encoding="utf-8")


def _twice(task: TaskFolder) -> None:
    _few_shot(lambda one: one | {"scores": {"test": one["scores"]["test"] * 2}})(task)


def _without(column: str) -> Callable[[TaskFolder], None]:
    def harm(task: TaskFolder) -> None:
        content = json.loads(task.few_shot.read_text(encoding="utf-8"))
        task.few_shot.write_text(
            json.dumps({name: one for name, one in content.items() if name != column}), encoding="utf-8"
        )

    return harm


def _row(column: str, **changes: Any) -> Callable[[TaskFolder], None]:
    def harm(task: TaskFolder) -> None:
        rows = json.loads(task.result.read_text(encoding="utf-8"))["scores"]
        change(task.result, scores=[row | changes if row["column"] == column else row for row in rows])

    return harm


def _row_twice(task: TaskFolder) -> None:
    rows = json.loads(task.result.read_text(encoding="utf-8"))["scores"]
    change(task.result, scores=[*rows, rows[-1] | {"accuracy": 0.99}])


HARMS: dict[str, tuple[Callable[[TaskFolder], None], str]] = {
    "adapter_config.json cut short": (_cut("adapter_config.json"), r"adapter_config\.json is damaged"),
    "adapter_config.json of another alpha": (_changed("adapter_config.json", lora_alpha=32), "lora_alpha is 32"),
    "labels.json reversed": (_labels_reversed, r"labels\.json: label names"),
    "label_names of meta.json reversed": (_changed("meta.json", label_names=LABELS[::-1]), r"meta\.json: label_names"),
    "both reversed": (_both_reversed, r"labels\.json: label names"),
    "meta.json of another commit": (
        _changed("meta.json", encoder={"name": "tiny-bert", "revision": "a" * 40}),
        r"meta\.json: encoder",
    ),
    "meta.json of another encoder": (
        _changed("meta.json", encoder={"name": "x/y", "revision": "a" * 40}),
        r"meta\.json: encoder",
    ),
    "meta.json of another task": (_changed("meta.json", task="B"), r"meta\.json: task is 'B'"),
    "meta.json of another length": (_changed("meta.json", max_tokens=32), "max_tokens"),
    "meta.json of another pooling": (_changed("meta.json", pooling="cls"), "pooling"),
    "meta.json of another alpha": (_changed("meta.json", alpha=32), r"lora_adapter\.pt|logits differ"),
    "meta.json of another width": (_changed("meta.json", hidden_size=64), "width 64"),
    "meta.json cut short": (_cut("meta.json"), r"meta\.json is damaged"),
    "calibration.json of another temperature": (
        _changed("calibration.json", temperature=2.0),
        r"calibration\.json: calibration",
    ),
    "calibration.json cut short": (_cut("calibration.json"), r"calibration\.json is damaged"),
    "calibration.json gone": (lambda task: task.calibration.unlink(), r"calibration\.json is missing"),
    "lora_adapter.pt cut short": (_cut("lora_adapter.pt"), r"lora_adapter\.pt: missing or damaged"),
    "classifier_head.pt cut short": (_cut("classifier_head.pt"), r"classifier_head\.pt: missing or damaged"),
    "few_shot.json cut short": (_cut("few_shot.json"), r"few_shot\.json is damaged"),
    "few_shot.json of another accuracy": (_scored(accuracy=0.99), "few_shot.json, adapted_few_shot: accuracy is 0.99"),
    "few_shot.json of another main score": (
        _scored(main_score=0.99),
        "few_shot.json, adapted_few_shot: main_score is 0.99",
    ),
    "few_shot.json of another macro-F1": (_scored(f1=0.99), "few_shot.json, adapted_few_shot: f1 is 0.99"),
    "few_shot.json of an average precision that nobody measured": (_scored(ap=0.99), "adapted_few_shot: ap is 0.99"),
    "few_shot.json of other draws": (
        _scored(scores_per_experiment=[{"accuracy": 0.861, "f1": 0.84378}] * 2),
        "adapted_few_shot: low of scores_per_experiment is",
    ),
    "few_shot.json of another subset": (_scored(hf_subset="fr"), "adapted_few_shot: hf_subset is 'fr'"),
    "few_shot.json that mteb cannot load": (_scored(languages="English"), "adapted_few_shot: mteb cannot load it"),
    "few_shot.json with the other column's scores": (_swapped, "few_shot: accuracy is 0.861"),
    "few_shot.json with two subsets": (_twice, "has scores for 2 subsets"),
    "few_shot.json of another task": (_few_shot(lambda one: one | {"task_name": "B"}), "task_name is 'B'"),
    "few_shot.json of nothing": (
        lambda task: task.few_shot.write_text("{}", encoding="utf-8"),
        "few_shot.json: columns is \\[\\]",
    ),
    "few_shot.json without a column": (
        _without("frozen_few_shot"),
        r"few_shot\.json: columns is \['adapted_few_shot'\]",
    ),
    "few_shot.json of the head": (
        _changed("few_shot.json", head={"task_name": "A", "scores": {}}),
        r"few_shot\.json is damaged",
    ),
    "few_shot.json with scores alone": (
        _changed("few_shot.json", adapted_few_shot={"task_name": "A", "scores": {"test": [{"accuracy": 0.861}]}}),
        r"few_shot\.json is damaged",
    ),
    "few_shot.json without a revision": (
        _few_shot(lambda one: {k: v for k, v in one.items() if k != "dataset_revision"}),
        "cannot load it",
    ),
    "probe.json cut short": (_cut("probe.json"), r"probe\.json is damaged"),
    "probe.json of other logits": (_far_probe, "logits differ by"),
    "probe.json without texts": (_changed("probe.json", texts=[], logits=[]), r"probe\.json is damaged.*texts"),
    "probe.json of ragged rows": (
        _changed("probe.json", logits=[[1.0], [1.0, 2.0], [1.0]]),
        r"probe\.json is damaged.*of the same length",
    ),
    "probe.json that allows anything": (_changed("probe.json", tolerance=1e9), r"probe\.json is damaged.*tolerance"),
    "result.json of another adapter": (
        lambda task: change(task.result, adapter={"path": "A", "sha256": "f" * 64, "encoder_revision": "a" * 40}),
        "encoder_revision|have sha256",
    ),
    "a score of another task": (_row("head", mteb_task="B"), "mteb_task of head is 'B'"),
    "a score of another run": (_row("head", run_id="two"), "run_id of head is 'two'"),
    "a score of another adapter": (_row("head", adapter_sha256="f" * 64), "adapter_sha256 of head is 'fff"),
    "a score of an adapter where there is none": (
        _row("majority", adapter_sha256="f" * 64),
        "adapter_sha256 of majority is",
    ),
    "a score of another encoder": (_row("head", encoder_revision="a" * 40), "encoder_revision of head is 'aaa"),
    "a score of other data": (_row("head", dataset_revision="c" * 40), "dataset_revision of head is 'ccc"),
    "a score of a task that is a path": (_row("head", mteb_task="../B"), r"result\.json is damaged.*mteb_task"),
    "a score of a run that is a path": (_row("head", run_id="../B"), r"result\.json is damaged.*run_id"),
    "two scores of one column": (_row_twice, "result.json: scores is"),
    "a key that is a path": (_changed("result.json", key="../" * 12), r"result\.json is damaged.*key"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_one_file_that_says_something_else_is_found(
    harm: str, run: RunFolder, encoder_folder: Folders, tmp_path: Path
) -> None:
    do, says = HARMS[harm]
    do(run.task("A"))
    for name, call in {
        "verify": lambda: check(run.root, encoder_folder),
        "publish": lambda: publish(run.root, PublishConfig(to=str(tmp_path / "out"))),
    }.items():
        with pytest.raises(LorafleetError, match=says) as raised:
            call()
        assert "\n" not in str(raised.value), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"], "nothing was published"


def _card(run: RunFolder, old: str, new: str) -> None:
    card = run.readme.read_text(encoding="utf-8")
    assert old in card
    run.readme.write_text(card.replace(old, new, 1), encoding="utf-8")


def _front(run: RunFolder, make: Callable[[bytes], bytes]) -> None:
    """A card of nothing but metadata that claim too much."""
    front = run.readme.read_text(encoding="utf-8").split("---\n")[1].replace("0.893", "0.993")
    run.readme.write_bytes(make(front.encode()))


TOO_MUCH = r"README\.md: its metadata claims a score of 0\.993"
ALIASES = "a: &a [{value: 0.893}]\nmodel-index: [{results: [{metrics: *a}]}]"
DAMAGED = r"README\.md: its metadata is damaged"
AROUND: dict[str, tuple[Callable[[RunFolder], None], str]] = {
    "the summary claims more": (lambda run: _claim(run, head_accuracy=0.99), r"results\.json: head_accuracy is 0\.99"),
    "the summary names another adapter": (
        lambda run: _claim(run, adapter_sha256="f" * 64),
        r"results\.json: adapter_sha256",
    ),
    "the summary's average claims more": (
        lambda run: _average(run, head_accuracy=0.999),
        r"average: .*results\.json: head_accuracy is 0\.999",
    ),
    "the summary's p-value claims more": (
        lambda run: _claim(run, p_value_holm=0.0001),
        r"results\.json: p_value_holm is 0\.0001",
    ),
    "the summary lists a task more": (
        lambda run: _tasks(run, lambda entry: [entry, entry | {"task": "B"}]),
        r"results\.json: covers A, B, but the adapters are A|B: .*is missing",
    ),
    "the summary lists a task twice": (
        lambda run: _tasks(run, lambda entry: [entry | {"head_accuracy": 0.999}, entry]),
        r"results\.json: covers A, A, but the adapters are A",
    ),
    "the summary lists nothing": (
        lambda run: _tasks(run, lambda entry: []),
        r"results\.json: covers nothing, but the adapters are A|so there is nothing to publish",
    ),
    "the summary is of another run": (lambda run: change(run.results, run_id="two"), r"results\.json: run_id is two"),
    "the summary cut short": (
        lambda run: run.results.write_bytes(run.results.read_bytes()[:200]),
        r"results\.json is damaged",
    ),
    "the manifest names another adapter": (
        lambda run: _manifest(run, adapters={"A": "f" * 64}),
        r"manifest\.json: adapters",
    ),
    "the manifest names another encoder": (
        lambda run: _manifest(run, encoder={"name": "e", "public_name": "e", "revision": "a" * 40}),
        r"manifest\.json: encoder\.revision",
    ),
    "the manifest cut short": (
        lambda run: run.manifest.write_bytes(run.manifest.read_bytes()[:200]),
        r"manifest\.json is damaged",
    ),
    "the card claims more": (
        lambda run: _card(run, "0.893", "0.993"),
        r"README\.md: its metadata claims a score of 0\.993",
    ),
    "the card claims another column's score": (lambda run: _card(run, "0.861", "0.893"), "a score of 0.893 .*few-shot"),
    "the card claims another metric's score": (
        lambda run: _card(run, "0.87514", "0.893"),
        "a score of 0.893 .*Macro-F1",
    ),
    "the card claims a score of other data": (lambda run: _card(run, "MTEB A", "MTEB B"), "a score of 0.893 .*MTEB B"),
    "the card claims a score on another data set of the Hub": (
        lambda run: _card(run, "type: mteb/a", "type: mteb/imdb"),
        "a score of 0.893",
    ),
    "the card with CRLF": (
        lambda run: _front(run, lambda front: (b"---\n" + front + b"---\n").replace(b"\n", b"\r\n")),
        TOO_MUCH,
    ),
    "the card after a blank line": (lambda run: _front(run, lambda front: b"\n \n---\n" + front + b"---\n"), TOO_MUCH),
    "the card ends with its metadata": (lambda run: _front(run, lambda front: b"---\n" + front + b"---"), TOO_MUCH),
    "the card has spaces after its metadata": (
        lambda run: _front(run, lambda front: b"---\n" + front + b"--- \t\ntext"),
        TOO_MUCH,
    ),
    "the card has no metadata": (lambda run: run.readme.write_bytes(b"text"), "README.md: has no metadata"),
    "the card is empty": (lambda run: run.readme.write_bytes(b""), "README.md: has no metadata"),
    "the card claims no number": (lambda run: _card(run, "0.893", "[0.893]"), DAMAGED),
    "the card names another encoder": (
        lambda run: _card(run, "library_name", "base_model: x/y\nlibrary_name"),
        r"README\.md: .* base model 'x/y'",
    ),
    "the card names no encoder": (
        lambda run: _card(run, "library_name", "base_model: [x, y]\nlibrary_name"),
        r"README\.md: .* base model",
    ),
    "the card is no YAML": (lambda run: _card(run, "library_name:", "library_name: ["), DAMAGED),
    "the card is deep": (lambda run: _card(run, "library_name: peft", "x: " + "[" * 500 + "]" * 500), DAMAGED),
    "the card has aliases": (
        lambda run: run.readme.write_text(f"---\n{ALIASES}\n---\n", encoding="utf-8"),
        DAMAGED,
    ),
    "the card is a list": (lambda run: run.readme.write_text("---\n[]\n---\n", encoding="utf-8"), DAMAGED),
    "the card is not UTF-8": (lambda run: run.readme.write_bytes(b"\xff"), DAMAGED),
}


def _claim(run: RunFolder, **changes: Any) -> None:
    summary = json.loads(run.results.read_text(encoding="utf-8"))
    summary["tasks"][0] |= changes
    run.results.write_text(json.dumps(summary), encoding="utf-8")


def _tasks(run: RunFolder, make: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> None:
    (entry,) = json.loads(run.results.read_text(encoding="utf-8"))["tasks"]
    change(run.results, tasks=make(entry))


def _average(run: RunFolder, **changes: Any) -> None:
    average = json.loads(run.results.read_text(encoding="utf-8"))["average"]
    change(run.results, average=average | changes)


def _manifest(run: RunFolder, **changes: Any) -> None:
    change(run.manifest, **changes)


@pytest.mark.parametrize("harm", AROUND)
def test_a_run_that_claims_something_else_of_its_adapter_is_found(
    harm: str, run: RunFolder, encoder_folder: Folders, tmp_path: Path
) -> None:
    do, says = AROUND[harm]
    do(run)
    with pytest.raises(LorafleetError, match=says) as raised:
        check(run.root, encoder_folder)
    assert "\n" not in str(raised.value)
    if "card" in harm:  # it is not published: what is published has a card of its own
        return
    with pytest.raises(LorafleetError, match=says):
        publish(run.root, PublishConfig(to=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_card_of_an_earlier_version_that_called_own_data_by_their_name_is_verified(run: RunFolder) -> None:
    result = read_record(run.task("A").result, TaskResult)
    own = MtebTask.model_validate(result.mteb_task.model_dump() | {"source": "files", "location": "a.parquet"})
    card = run.readme.read_text(encoding="utf-8")
    results = {"A": TaskResult.model_validate(result.model_dump() | {"mteb_task": own})}
    run.readme.write_text(card.replace("name: MTEB A", "name: A").replace("type: mteb/a", "type: A"), encoding="utf-8")
    check_card(run, results)
    with pytest.raises(VerificationError, match="which was not measured"):
        run.readme.write_text(card, encoding="utf-8")
        check_card(run, results)


# A publication whose hashes fit


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The publication of the run. Tests must not write to it."""
    target = tmp_path_factory.mktemp("published") / "out"
    publish(trained, PublishConfig(to=str(target)))
    return target


@pytest.fixture
def published(whole: Path, tmp_path: Path) -> Path:
    """A copy of that."""
    return shutil.copytree(whole, tmp_path / "out")


def forge(published: Path, path: str, content: bytes | None) -> None:
    """Change or remove a file, and its hash with it."""
    record = read_record(published / "publication.json", Publication)
    files = dict(record.files)
    if content is None:
        del files[path]
        (published / path).unlink()
    else:
        files[path] = hashlib.sha256(content).hexdigest()
        (published / path).parent.mkdir(parents=True, exist_ok=True)
        (published / path).write_bytes(content)
    changed = Publication.model_validate(record.model_dump() | {"files": files})
    (published / "publication.json").write_text(changed.model_dump_json(), encoding="utf-8")


def _with(published: Path, path: str, **changes: Any) -> bytes:
    return json.dumps(json.loads((published / path).read_bytes()) | changes).encode()


def unlist(published: Path, path: str) -> None:
    """Remove the hash of a file that stays, so that it could be changed at will."""
    files = json.loads((published / "publication.json").read_text(encoding="utf-8"))["files"]
    change(published / "publication.json", files={name: sha256 for name, sha256 in files.items() if name != path})


def few_shot_file(published: Path, model: str = "lorafleet__*") -> str:
    return next(
        path.relative_to(published).as_posix() for path in published.glob(f"mteb_results/results/{model}/*/A.json")
    )


def model_meta_file(published: Path) -> str:
    return few_shot_file(published).replace("A.json", "model_meta.json")


def few_shot_claiming(published: Path, **changes: Any) -> bytes:
    content = json.loads((published / few_shot_file(published)).read_bytes())
    content["scores"]["test"][0] |= changes
    return json.dumps(content).encode()


def _averaged(published: Path, **changes: Any) -> bytes:
    content = json.loads((published / "classification_results.json").read_bytes())
    return json.dumps(content | {"average": content["average"] | changes}).encode()


def _forge_scores(published: Path, **changes: Any) -> None:
    path = published / "metrics" / "scores.parquet"
    rows = [row.model_copy(update=changes) if row.column == "head" else row for row in read_scores(path)]
    write_scores(rows, path)
    forge(published, "metrics/scores.parquet", path.read_bytes())


def _forge_epochs(published: Path) -> None:
    path = published / "metrics" / "epochs.parquet"
    epochs = [row.model_copy(update={"validation_accuracy": 1.0}) for row in read_epochs(path)["A"]]
    write_epochs("one", {"A": epochs}, path)
    forge(published, "metrics/epochs.parquet", path.read_bytes())


FORGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "labels": (lambda p: forge(p, "A/labels.json", json.dumps(LABELS[::-1]).encode()), r"labels\.json: label names"),
    "meta": (
        lambda p: forge(p, "A/meta.json", _with(p, "A/meta.json", label_names=LABELS[::-1])),
        r"meta\.json: label_names",
    ),
    "PEFT": (lambda p: forge(p, "A/adapter_config.json", _with(p, "A/adapter_config.json", r=4)), "r is 4"),
    "a hash that is not there": (
        lambda p: forge(p, "A/adapter_config.json", None),
        r"publication\.json has no hash",
    ),
    "the card": (
        lambda p: forge(p, "README.md", (p / "README.md").read_bytes().replace(b"0.893", b"1.0", 1)),
        "score of 1.0",
    ),
    "the card without its hash": (lambda p: unlist(p, "README.md"), r"README\.md: publication\.json has no hash"),
    "the report without its hash": (lambda p: unlist(p, "report.html"), r"report\.html: publication\.json has no hash"),
    "the summary's average": (
        lambda p: forge(p, "classification_results.json", _averaged(p, head_accuracy=0.999)),
        r"results\.json: head_accuracy is 0\.999",
    ),
    "the table of scores": (lambda p: _forge_scores(p, accuracy=1.0), r"scores\.parquet, head: accuracy is 1\.0"),
    "the table of scores with a task more": (
        lambda p: _forge_scores(p, mteb_task="B"),
        r"scores\.parquet: covers A, B",
    ),
    "the table of epochs": (_forge_epochs, r"epochs\.parquet: epochs is"),
    "mteb's results": (
        lambda p: forge(p, few_shot_file(p), few_shot_claiming(p, accuracy=1.0)),
        r"mteb_results/.*A\.json: accuracy is 1\.0",
    ),
    "mteb's results of the main score": (
        lambda p: forge(p, few_shot_file(p), few_shot_claiming(p, main_score=1.0)),
        r"mteb_results/.*A\.json: main_score is 1\.0",
    ),
    "mteb's results of the frozen encoder": (
        lambda p: forge(p, few_shot_file(p, "local__*"), (p / few_shot_file(p)).read_bytes()),
        r"mteb_results/.*A\.json: accuracy is 0\.861",
    ),
    "mteb's results of another model": (
        lambda p: forge(p, "mteb_results/results/me__best/main/A.json", (p / few_shot_file(p)).read_bytes()),
        r"me__best/main/A\.json: belongs to a model that was not measured",
    ),
    "mteb's results of another task": (
        lambda p: forge(p, few_shot_file(p).replace("A.json", "B.json"), (p / few_shot_file(p)).read_bytes()),
        r"B\.json: does not belong to a published adapter",
    ),
    "mteb's results without a hash": (
        lambda p: (p / few_shot_file(p)).with_name("B.json").write_bytes((p / few_shot_file(p)).read_bytes()),
        r"B\.json: publication\.json has no hash",
    ),
    "mteb's name of the model": (
        lambda p: forge(p, model_meta_file(p), _with(p, model_meta_file(p), name="me/best")),
        r"model_meta\.json: name, revision is \('me/best'",
    ),
    "a file that is a pipe": (
        lambda p: _as_pipe(p / "report.html"),
        r"report\.html: cannot be read: it is a named pipe",
    ),
    "a file that is gone": (lambda p: (p / "report.html").unlink(), r"report\.html: is missing"),
    "another adapter": (
        lambda p: change(p / "publication.json", adapters={"A": "f" * 64}),
        r"publication\.json: adapters",
    ),
    "publication.json as a folder": (
        lambda p: _as_folder(p / "publication.json"),
        r"publication\.json cannot be read: it is a folder",
    ),
}


def _as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", FORGED)
def test_a_publication_with_hashes_that_fit_is_no_proof(harm: str, published: Path, encoder_folder: Folders) -> None:
    do, says = FORGED[harm]
    do(published)
    with pytest.raises(LorafleetError, match=says) as raised:
        check(published, encoder_folder)
    assert "\n" not in str(raised.value)


def test_an_adapter_that_a_publication_does_not_list_is_not_verified(published: Path, encoder_folder: Folders) -> None:
    (published / "A").rename(published / "Evil")
    for ref in (f"{published}#Evil", str(published / "Evil")):
        with pytest.raises(LorafleetError, match=r"A/.*is missing|has no adapter Evil"):
            verify(ref, encoder=str(encoder_folder("bert")), offline=True)


@pytest.mark.parametrize("record", ["manifest.json", "classification_results.json"])
def test_the_encoder_of_a_commit_has_the_name_of_its_repository(record: str, tmp_path: Path) -> None:
    """Files are the same under any name, but a commit is one of the repository that people would load."""
    trained_on = EncoderRef(name="me/tiny", public_name="me/tiny", revision="e" * 40)
    run = finished_run(tmp_path / "one", [task_result("A", encoder=trained_on)], run_id="one")
    assert read_candidate(run.root).results
    encoder = json.loads((run.root / record).read_text(encoding="utf-8"))["encoder"]
    change(run.root / record, encoder=encoder | {"public_name": "me/evil"})
    with pytest.raises(VerificationError, match=rf"{record}: encoder\.public_name is 'me/evil'"):
        read_candidate(run.root)


def test_the_main_score_is_the_one_that_mteb_compares_models_by(tmp_path: Path) -> None:
    """For Banking77 it is the accuracy. Macro-F1 is measured too, but models are not compared by it."""
    run = finished_run(tmp_path / "one", [task_result("Banking77Classification")])
    task = run.task("Banking77Classification")
    assert check_task(task)
    scored(task, "adapted_few_shot", main_score=0.84378)
    with pytest.raises(VerificationError, match=r"main_score is 0\.84378, but 0\.861 was measured"):
        check_task(task)


# The kind of a fault in the fresh process


@pytest.mark.parametrize(
    ("encoder", "kind"),
    [("nowhere", EncoderError), ("package:nothing-of-that-name", EncoderError), ("someone/nothing", EncoderError)],
)
def test_an_encoder_that_is_not_there_is_exit_code_2_through_a_fresh_process_too(
    encoder: str, kind: type[Exception], run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(kind, match="encoder"):
        verify(str(run.root), encoder=encoder, offline=True)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(run.root), "--encoder", encoder, "--offline"])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    manifest = read_manifest(run)
    config = manifest.config.model_dump() | {"encoder": {"name": encoder, "max_tokens": 24}, "data": {"offline": True}}
    write_manifest(type(manifest).model_validate(manifest.model_dump() | {"config": config}), run)
    with pytest.raises(kind, match=r"out is unchanged: .*encoder"):
        publish(run.root, PublishConfig(to=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_another_encoder_is_the_fault_of_who_names_it(run: RunFolder, encoder_folder: Folders) -> None:
    with pytest.raises(AdapterError, match="trained with revision"):
        verify(str(run.root), encoder=str(encoder_folder("mpnet")), offline=True)


def test_a_fault_of_our_own_in_the_fresh_process_is_no_fault_of_the_users(
    run: RunFolder, encoder_folder: Folders
) -> None:
    runtime = exact_runtime(threads=1, use_gpu=False)
    config = EncoderConfig(name=str(encoder_folder("bert")), max_tokens=24)
    with pytest.raises(VerificationError, match="cannot be loaded in a fresh process"):
        reload_elsewhere([ReloadRequest(run.task("A"), runtime, [1])], config, offline=True)  # type: ignore[list-item]


# Code that comes with an encoder


def test_a_strangers_run_cannot_have_the_code_of_its_encoder_run(run: RunFolder, tmp_path: Path) -> None:
    manifest = read_manifest(run)
    encoder = manifest.config.encoder.model_dump() | {"trust_remote_code": True, "revision": manifest.encoder.revision}
    config = manifest.config.model_dump() | {"encoder": encoder}
    write_manifest(type(manifest).model_validate(manifest.model_dump() | {"config": config}), run)
    with pytest.raises(InputError, match=r"needs Python code that comes with it; .* --trust-remote-code"):
        publish(run.root, PublishConfig(to=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    assert publish(run.root, PublishConfig(to=str(tmp_path / "out")), trust_remote_code=True).verified
