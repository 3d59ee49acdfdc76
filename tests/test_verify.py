"""Verified means every file that anybody loads: one that was changed is found by ``verify``, and before ``publish`` changes anything."""

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
from builders import finished_run, give_effect, load_encoder, task_result
from publishing import _run_warm

import pipeline.reload
from flows.cli import main
from pipeline.adapter import Adapter, save_adapter
from pipeline.config import AdapterConfig, EncoderConfig, MtebTaskConfig, PublishConfig, RunConfig
from pipeline.encoder import exact_runtime
from pipeline.errors import AdapterError, EncoderError, InputError, LorafleetError, VerificationError
from pipeline.manifest import read_manifest, write_manifest
from pipeline.publish import publish
from pipeline.records import Probe, Publication
from pipeline.reload import Ask, reload_elsewhere
from pipeline.run_folder import RunFolder, TaskFolder, read_record
from pipeline.verify import verify

Folders = Callable[[str], Path]
LABELS = ("sea", "kitchen", "garden")
TEXTS = ("the ship and the harbour", "soup with pepper", "x")

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module", autouse=True)
def _warm() -> Iterator[None]:
    """A fresh process of a server that has everything imported: 0.2 s, not 4."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pipeline.reload, "subprocess", SimpleNamespace(run=_run_warm, PIPE=subprocess.PIPE))
        yield


@pytest.fixture(scope="module")
def trained(encoder_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one real adapter, with its probe. Not to be written to."""
    root, encoder = tmp_path_factory.mktemp("trained"), load_encoder(encoder_folder("bert"))
    adapter = give_effect(Adapter(encoder, AdapterConfig(), LABELS))
    made = TaskFolder(root / "made" / "A")
    save_adapter(adapter, made, meta={"task": "A"})
    logits = adapter.logits_of_vectors(encoder.embed(encoder.tokenise(TEXTS)))
    made.probe.write_text(Probe(texts=TEXTS, logits=logits.tolist(), tolerance=1e-3).model_dump_json(), encoding="utf-8")
    config = RunConfig(encoder=EncoderConfig(name=str(encoder_folder("bert")), max_tokens=24), mteb_tasks=(MtebTaskConfig(name="A"),))
    made.few_shot.write_text(json.dumps({"adapted_few_shot": few_shot(0.861), "frozen_few_shot": few_shot(0.778)}), encoding="utf-8")
    result = task_result("A", labels=LABELS, encoder=encoder.ref)
    run = finished_run(root / "one", [result], config=config, adapters={"A": made.root}, run_id="one")
    run.readme.write_text(CARD, encoding="utf-8")
    return run.root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    """A copy of it."""
    return RunFolder(shutil.copytree(trained, tmp_path / "runs" / "one"))


CARD = """---
base_model: tiny-bert
model-index:
- name: x
  results:
  - metrics:
    - type: accuracy
      value: 0.893
---
text
"""


def few_shot(accuracy: float) -> dict[str, Any]:
    scores = {"accuracy": accuracy, "main_score": accuracy, "hf_subset": "default", "languages": ["eng-Latn"]}
    return {
        "task_name": "A",
        "dataset_revision": "b" * 40,
        "mteb_version": "2.0.0",
        "scores": {"test": [scores]},
        "evaluation_time": 1.0,
        "kg_co2_emissions": None,
    }


def check(place: Path, encoder_folder: Folders) -> None:
    verify(str(place), encoder=str(encoder_folder("bert")), offline=True)


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_what_was_trained_is_verified_and_published(run: RunFolder, encoder_folder: Folders, tmp_path: Path) -> None:
    check(run.root, encoder_folder)
    check(run.root / "A", encoder_folder)
    published = publish(run.root, str(tmp_path / "out"), PublishConfig())
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


HARMS: dict[str, tuple[Callable[[TaskFolder], None], str]] = {
    "adapter_config.json cut short": (_cut("adapter_config.json"), r"adapter_config\.json is damaged"),
    "adapter_config.json of another alpha": (_changed("adapter_config.json", lora_alpha=32), "lora_alpha is 32"),
    "labels.json reversed": (_labels_reversed, r"labels\.json: label names"),
    "label_names of meta.json reversed": (_changed("meta.json", label_names=LABELS[::-1]), r"meta\.json: label_names"),
    "both reversed": (_both_reversed, r"labels\.json: label names"),
    "meta.json of another commit": (_changed("meta.json", encoder={"name": "tiny-bert", "revision": "a" * 40}), r"meta\.json: encoder"),
    "meta.json of another encoder": (_changed("meta.json", encoder={"name": "x/y", "revision": "a" * 40}), r"meta\.json: encoder"),
    "meta.json of another task": (_changed("meta.json", task="B"), r"meta\.json: task is 'B'"),
    "meta.json of another length": (_changed("meta.json", max_tokens=32), "max_tokens"),
    "meta.json of another pooling": (_changed("meta.json", pooling="cls"), "pooling"),
    "meta.json of another alpha": (_changed("meta.json", alpha=32), r"lora_adapter\.pt|logits differ"),
    "meta.json of another width": (_changed("meta.json", hidden_size=64), "width 64"),
    "meta.json cut short": (_cut("meta.json"), r"meta\.json is damaged"),
    "calibration.json of another temperature": (_changed("calibration.json", temperature=2.0), r"calibration\.json: calibration"),
    "calibration.json cut short": (_cut("calibration.json"), r"calibration\.json is damaged"),
    "calibration.json gone": (lambda task: task.calibration.unlink(), r"calibration\.json is missing"),
    "lora_adapter.pt cut short": (_cut("lora_adapter.pt"), r"lora_adapter\.pt: missing or damaged"),
    "classifier_head.pt cut short": (_cut("classifier_head.pt"), r"classifier_head\.pt: missing or damaged"),
    "few_shot.json cut short": (_cut("few_shot.json"), r"few_shot\.json is damaged"),
    "few_shot.json of another score": (
        _changed("few_shot.json", adapted_few_shot=few_shot(0.99)),
        r"few_shot\.json, adapted_few_shot: accuracy",
    ),
    "few_shot.json of another task": (_changed("few_shot.json", frozen_few_shot=few_shot(0.778) | {"task_name": "B"}), "task_name is 'B'"),
    "probe.json cut short": (_cut("probe.json"), r"probe\.json is damaged"),
    "probe.json of other logits": (_far_probe, "logits differ by"),
    "probe.json without texts": (_changed("probe.json", texts=[], logits=[]), r"probe\.json is damaged.*texts"),
    "probe.json of ragged rows": (_changed("probe.json", logits=[[1.0], [1.0, 2.0], [1.0]]), r"probe\.json is damaged.*of the same length"),
    "probe.json that allows anything": (_changed("probe.json", tolerance=1e9), r"probe\.json is damaged.*tolerance"),
    "result.json of another adapter": (
        lambda task: change(task.result, adapter={"path": "A", "sha256": "f" * 64, "encoder_revision": "a" * 40}),
        "encoder_revision|have sha256",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_one_file_that_says_something_else_is_found(harm: str, run: RunFolder, encoder_folder: Folders, tmp_path: Path) -> None:
    do, says = HARMS[harm]
    do(run.task("A"))
    for name, call in {
        "verify": lambda: check(run.root, encoder_folder),
        "publish": lambda: publish(run.root, str(tmp_path / "out"), PublishConfig()),
    }.items():
        with pytest.raises(LorafleetError, match=says) as raised:
            call()
        assert "\n" not in str(raised.value), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"], "nothing was published"


def _card(run: RunFolder, old: str, new: str) -> None:
    assert old in CARD
    run.readme.write_text(CARD.replace(old, new), encoding="utf-8")


ALIASES = "a: &a [{value: 0.893}]\nmodel-index: [{results: [{metrics: *a}]}]"
DAMAGED = r"README\.md: its metadata are damaged"
AROUND: dict[str, tuple[Callable[[RunFolder], None], str]] = {
    "the summary claims more": (lambda run: _claim(run, head_accuracy=0.99), r"results\.json: head_accuracy is 0\.99"),
    "the summary names another adapter": (
        lambda run: _claim(run, adapter_sha256="f" * 64),
        r"results\.json: adapter_sha256",
    ),
    "the summary cut short": (
        lambda run: run.results.write_bytes(run.results.read_bytes()[:200]),
        r"results\.json is damaged",
    ),
    "the manifest names another adapter": (lambda run: _manifest(run, adapters={"A": "f" * 64}), r"manifest\.json: adapters"),
    "the manifest names another encoder": (
        lambda run: _manifest(run, encoder={"name": "e", "public_name": "e", "revision": "a" * 40}),
        r"manifest\.json: encoder\.revision",
    ),
    "the manifest cut short": (lambda run: run.manifest.write_bytes(run.manifest.read_bytes()[:200]), r"manifest\.json is damaged"),
    "the card claims more": (lambda run: _card(run, "0.893", "0.993"), r"README\.md: its metadata claim a score of 0\.993"),
    "the card claims no number": (lambda run: _card(run, "0.893", "[0.893]"), DAMAGED),
    "the card names another encoder": (lambda run: _card(run, "tiny-bert", "x/y"), r"README\.md: .* base model 'x/y'"),
    "the card names no encoder": (lambda run: _card(run, "tiny-bert", "[x, y]"), r"README\.md: .* base model"),
    "the card is no YAML": (lambda run: _card(run, "base_model:", "base_model: ["), DAMAGED),
    "the card is deep": (lambda run: _card(run, "tiny-bert", "[" * 500 + "]" * 500), DAMAGED),
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
        publish(run.root, str(tmp_path / "out"), PublishConfig())
    assert not (tmp_path / "out").exists()


# A publication whose hashes fit


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What publishing it gives. Not to be written to."""
    target = tmp_path_factory.mktemp("published") / "out"
    publish(trained, str(target), PublishConfig())
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
        (published / path).write_bytes(content)
    changed = Publication.model_validate(record.model_dump() | {"files": files})
    (published / "publication.json").write_text(changed.model_dump_json(), encoding="utf-8")


def _with(published: Path, path: str, **changes: Any) -> bytes:
    return json.dumps(json.loads((published / path).read_bytes()) | changes).encode()


def few_shot_file(published: Path) -> str:
    return next(path.relative_to(published).as_posix() for path in published.glob("mteb_results/results/lorafleet__*/*/A.json"))


FORGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "labels": (lambda p: forge(p, "A/labels.json", json.dumps(LABELS[::-1]).encode()), r"labels\.json: label names"),
    "meta": (lambda p: forge(p, "A/meta.json", _with(p, "A/meta.json", label_names=LABELS[::-1])), r"meta\.json: label_names"),
    "PEFT": (lambda p: forge(p, "A/adapter_config.json", _with(p, "A/adapter_config.json", r=4)), "r is 4"),
    "a hash that is not there": (
        lambda p: forge(p, "A/adapter_config.json", None),
        r"publication\.json has no hash",
    ),
    "the card": (lambda p: forge(p, "README.md", b"---\nmodel-index: [{results: [{metrics: [{value: 1.0}]}]}]\n---\n"), "score of 1.0"),
    "mteb's results": (
        lambda p: forge(p, few_shot_file(p), _with(p, few_shot_file(p), scores={"test": [{"accuracy": 1.0}]})),
        r"mteb_results/.*A\.json: accuracy is \[1\.0\]",
    ),
    "a file that is a pipe": (lambda p: _as_pipe(p / "report.html"), r"report\.html: cannot be read: it is a named pipe"),
    "a file that is gone": (lambda p: (p / "report.html").unlink(), r"report\.html: is missing"),
    "another adapter": (lambda p: change(p / "publication.json", adapters={"A": "f" * 64}), r"publication\.json: adapters"),
    "publication.json as a folder": (lambda p: _as_folder(p / "publication.json"), r"publication\.json cannot be read: it is a folder"),
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
        with pytest.raises(LorafleetError, match=r"A/.*is missing|there is no adapter Evil"):
            verify(ref, encoder=str(encoder_folder("bert")), offline=True)


# The kind of a fault in the fresh process


@pytest.mark.parametrize(
    ("encoder", "kind"), [("nowhere", EncoderError), ("package:nothing-of-that-name", EncoderError), ("someone/nothing", EncoderError)]
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
    with pytest.raises(kind, match=r"out is left as it was: .*encoder"):
        publish(run.root, str(tmp_path / "out"), PublishConfig())
    assert not (tmp_path / "out").exists()


def test_another_encoder_is_the_fault_of_who_names_it(run: RunFolder, encoder_folder: Folders) -> None:
    with pytest.raises(AdapterError, match="trained on an encoder of revision"):
        verify(str(run.root), encoder=str(encoder_folder("mpnet")), offline=True)


def test_a_fault_of_our_own_in_the_fresh_process_is_no_fault_of_the_users(run: RunFolder, encoder_folder: Folders) -> None:
    runtime = exact_runtime(threads=1, use_gpu=False)
    config = EncoderConfig(name=str(encoder_folder("bert")), max_tokens=24)
    with pytest.raises(VerificationError, match="cannot be loaded in a fresh process"):
        reload_elsewhere([Ask(run.task("A"), runtime, [1])], config, offline=True)  # type: ignore[list-item]


# Code that comes with an encoder


def test_a_strangers_run_cannot_have_the_code_of_its_encoder_run(run: RunFolder, tmp_path: Path) -> None:
    manifest = read_manifest(run)
    encoder = manifest.config.encoder.model_dump() | {"trust_remote_code": True, "revision": manifest.encoder.revision}
    config = manifest.config.model_dump() | {"encoder": encoder}
    write_manifest(type(manifest).model_validate(manifest.model_dump() | {"config": config}), run)
    with pytest.raises(InputError, match=r"needs Python code that comes with it; .* --trust-remote-code"):
        publish(run.root, str(tmp_path / "out"), PublishConfig())
    assert not (tmp_path / "out").exists()
    assert publish(run.root, str(tmp_path / "out"), PublishConfig(), trust_remote_code=True).verified
