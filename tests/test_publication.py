"""Contents of a publication, and published folders: replaced as a whole, and no foreign file is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from builders import finished_run, task_result

from pipeline.config import EncoderConfig, MtebTaskConfig, RunConfig
from pipeline.errors import AdapterError, ConfigError, DataError, InputError, LorafleetError, VerificationError
from pipeline.publishing.publication import PublishedState, read_candidate, stage
from pipeline.publishing.publish import PublishedFolder
from pipeline.publishing.verify import check_files
from pipeline.records import ClassificationResults, EncoderRef, Failure, MtebTask, Publication, TaskResult
from pipeline.store.files import read_record, write_atomically
from pipeline.store.run_folder import RunFolder, adapter_sha256

ROOT_FILES = {
    "README.md",
    "classification_results.json",
    "results.json",
    "report.html",
    "metrics/scores.parquet",
    "metrics/values.parquet",
    "metrics/epochs.parquet",
    "publication.json",
}
TASK_FILES = {
    "lora_adapter.pt",
    "classifier_head.pt",
    "meta.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "head.safetensors",
    "labels.json",
    "calibration.json",
    "probe.json",
    "few_shot.json",
    "result.json",
}


def publish_to_folder(run: Path, target: Path) -> Publication:
    """All of the run's MTEB tasks; the gate and the reload in a fresh process have tests of their own."""
    candidate = read_candidate(run)
    place = PublishedFolder(target.resolve(), candidate)
    base = place.read()
    with TemporaryDirectory() as folder:
        staging = RunFolder(Path(folder))
        publication = stage(candidate, list(candidate.results), base, staging)
        place.land(staging, publication, base, lambda root: check_files(RunFolder(root), publication))
    return publication


def mteb_files(published: Publication) -> set[str]:
    """Files of the few-shot columns. The frozen encoder is one model, and each adapted encoder is another."""
    frozen = f"sentence-transformers__all-MiniLM-L6-v2/{'c' * 40}"
    adapted = {task: f"lorafleet__all-MiniLM-L6-v2-{task}/{sha256[:40]}" for task, sha256 in published.adapters.items()}
    found = {f"{model}/{name}" for task, model in adapted.items() for name in (f"{task}.json", "model_meta.json")}
    found |= {f"{frozen}/{name}" for name in ("model_meta.json", *(f"{task}.json" for task in adapted))}
    return {f"mteb_results/results/{path}" for path in found}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return finished_run(tmp_path / "runs" / "one", [task_result("A"), task_result("B")])


def test_a_published_folder_has_the_layout_of_the_source_document(run: RunFolder, tmp_path: Path) -> None:
    published = publish_to_folder(run.root, tmp_path / "new" / "repository")
    target = tmp_path / "new" / "repository"
    expected = ROOT_FILES | {f"{task}/{name}" for task in "AB" for name in TASK_FILES} | mteb_files(published)
    assert set(contents(target)) == expected
    assert set(published.files) == expected - {"publication.json"}
    assert names(target.parent) == ["repository"]


def test_every_adapters_files_have_the_bytes_of_the_run(run: RunFolder, tmp_path: Path) -> None:
    publish_to_folder(run.root, tmp_path / "out")
    for task in "AB":
        for path in run.task(task).published():
            assert (tmp_path / "out" / task / path.name).read_bytes() == path.read_bytes()


def test_publishing_again_gives_the_same_bytes(run: RunFolder, tmp_path: Path) -> None:
    publish_to_folder(run.root, tmp_path / "out")
    before = contents(tmp_path / "out")
    publish_to_folder(run.root, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_mteb_tasks_that_are_not_in_the_run_stay(run: RunFolder, tmp_path: Path) -> None:
    publish_to_folder(run.root, tmp_path / "out")
    before = contents(tmp_path / "out")
    other = finished_run(
        tmp_path / "runs" / "two", [task_result("C"), task_result("A", labels=("x", "y"))], run_id="two"
    )
    published = publish_to_folder(other.root, tmp_path / "out")
    after = contents(tmp_path / "out")
    assert set(after) == ROOT_FILES | {f"{task}/{name}" for task in "ABC" for name in TASK_FILES} | mteb_files(
        published
    )
    assert all(after[name] == before[name] for name in before if name.startswith("B/"))
    assert json.loads(after["A/labels.json"]) == ["x", "y"]
    assert (published.run_id, list(published.adapters)) == ("two", ["A", "B", "C"])
    summary = read_record(tmp_path / "out" / "classification_results.json", ClassificationResults)
    assert [entry.task for entry in summary.tasks] == ["A", "B", "C"]
    assert summary.tasks[0].num_classes == 2
    assert all(f"| {task} |" in after["README.md"].decode() for task in "ABC")
    check_files(RunFolder(tmp_path / "out"), published)


def test_adapters_of_two_encoders_are_not_mixed(run: RunFolder, tmp_path: Path) -> None:
    publish_to_folder(run.root, tmp_path / "out")
    before = contents(tmp_path / "out")
    encoder = EncoderRef(name="me/other", public_name="me/other", revision="e" * 40)
    one = finished_run(tmp_path / "runs" / "two", [task_result("A", encoder=encoder)], run_id="two")
    with pytest.raises(
        InputError,
        match=r"B stays published, and was trained on sentence-transformers/all-MiniLM-L6-v2 at .* me/other at eee",
    ):
        publish_to_folder(one.root, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    both = finished_run(
        tmp_path / "runs" / "three", [task_result(name, encoder=encoder) for name in "AB"], run_id="three"
    )
    assert publish_to_folder(both.root, tmp_path / "out").encoder == encoder


def test_a_published_result_names_no_place_of_this_machine(tmp_path: Path) -> None:
    own = MtebTask(
        name="A",
        source="files",
        location="/srv/a/train.parquet",
        test_location="/srv/a/test.parquet",
        validation_location="/srv/a/validation.parquet",
        revision="r",
        max_epochs=1,
        samples_per_label=8,
    )
    encoder = EncoderRef(name="/srv/models/minilm", public_name="minilm", revision="sha256:" + "c" * 64)
    run = finished_run(
        tmp_path / "run", [task_result("A", source=own, encoder=encoder, notes=["/srv/a/train.parquet is short"])]
    )
    publish_to_folder(run.root, tmp_path / "out")
    result = read_record(tmp_path / "out" / "A" / "result.json", TaskResult)
    assert (result.mteb_task.location, result.mteb_task.test_location) == ("…/train.parquet", "…/test.parquet")
    assert result.mteb_task.validation_location == "…/validation.parquet"
    assert (result.encoder.name, result.adapter.path, result.data.notes) == (
        "minilm",
        "A",
        ("…/train.parquet is short",),
    )
    assert not any(b"/srv" in content for content in contents(tmp_path / "out").values())


def test_no_licence_is_claimed_that_nobody_gave(run: RunFolder, tmp_path: Path) -> None:
    publish_to_folder(run.root, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "license:" not in card
    assert "The authors of these adapters gave none" in card


def test_an_empty_folder_can_be_published_to(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert len(publish_to_folder(run.root, tmp_path / "out").files) + 1 == len(contents(tmp_path / "out"))


def test_tasks_that_failed_are_listed_and_the_others_published(tmp_path: Path) -> None:
    run = finished_run(
        tmp_path / "run", [task_result("A")], failures=[Failure(mteb_task="Lost", stage="train", reason="died")]
    )
    (run.root / "Lost").mkdir()
    (run.root / "Lost" / "meta.json").write_text("{}", encoding="utf-8")
    publish_to_folder(run.root, tmp_path / "out")
    assert not (tmp_path / "out" / "Lost").exists()
    assert (
        read_record(tmp_path / "out" / "classification_results.json", ClassificationResults).failures[0].mteb_task
        == "Lost"
    )


def test_a_run_without_manifest_is_not_finished(run: RunFolder, tmp_path: Path) -> None:
    run.manifest.unlink()
    with pytest.raises(InputError, match=r"is not finished: it has no manifest\.json"):
        publish_to_folder(run.root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        publish_to_folder(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("name", ["report.html", "A/labels.json", "A/result.json", "metrics/epochs.parquet"])
def test_a_missing_file_is_named(run: RunFolder, tmp_path: Path, name: str) -> None:
    (run.root / name).unlink()
    with pytest.raises(InputError, match=Path(name).name):
        publish_to_folder(run.root, tmp_path / "out")


def test_a_run_in_which_everything_failed_is_not_published(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", [], failures=[Failure(mteb_task="Lost", stage="train", reason="died")])
    with pytest.raises(InputError, match="nothing to publish"):
        publish_to_folder(run.root, tmp_path / "out")


def test_an_adapter_that_is_not_the_measured_one_stops_everything(run: RunFolder, tmp_path: Path) -> None:
    publish_to_folder(run.root, tmp_path / "out")
    before = contents(tmp_path / "out")
    run.task("B").head.write_bytes(b"another head")
    with pytest.raises(VerificationError, match="B: the adapter's files have sha256"):
        publish_to_folder(run.root, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert names(tmp_path) == ["out", "runs"]


@pytest.mark.parametrize("name", ["A/adapter_config.json", "B/probe.json"])
def test_a_file_that_names_the_run_folder_stops_everything(run: RunFolder, tmp_path: Path, name: str) -> None:
    (run.root / name).write_text(f'{{"path": "{run.root}/A"}}', encoding="utf-8")
    with pytest.raises(LorafleetError, match=f"{name} contains the local path"):
        publish_to_folder(run.root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_path_of_the_config_is_found_in_its_json_form_too(tmp_path: Path) -> None:
    config = RunConfig(encoder=EncoderConfig(name="/srv/modèles/minilm"), mteb_tasks=(MtebTaskConfig(name="A"),))
    run = finished_run(tmp_path / "run", [task_result("A")], config=config)
    run.task("A").adapter_config.write_text(json.dumps({"base": "/srv/modèles/minilm"}), encoding="utf-8")
    with pytest.raises(LorafleetError, match=r"A/adapter_config\.json contains the local path"):
        publish_to_folder(run.root, tmp_path / "out")


def test_a_longer_name_that_begins_like_a_local_path_is_none(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", [task_result("A")])
    run.task("A").adapter_config.write_text(f"{run.root}ning, https://example.org{run.root}", encoding="utf-8")
    assert publish_to_folder(run.root, tmp_path / "out")


# What is not the run's to publish

RUN_FILES = [
    *(
        "manifest.json",
        "classification_results.json",
        "README.md",
        "report.html",
        "metrics/scores.parquet",
    ),
    *(f"A/{name}" for name in sorted(TASK_FILES)),
]


@pytest.mark.parametrize("name", [*RUN_FILES, "A", "metrics"])
def test_nothing_is_published_through_a_symbolic_link(name: str, run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    elsewhere = (run.root / name).rename(tmp_path / "secret" / "key")
    (run.root / name).symlink_to(elsewhere)
    with pytest.raises(
        InputError, match=rf"one/{name}: it is a symbolic link, not a f(ile|older); nothing was published"
    ):
        publish_to_folder(run.root, tmp_path / "out")
    assert names(tmp_path) == ["runs", "secret"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_pipe_in_a_run_is_not_waited_for(name: str, run: RunFolder, tmp_path: Path) -> None:
    (run.root / name).unlink()
    os.mkfifo(run.root / name)
    with pytest.raises(InputError, match=rf"one/{name}: it is a named pipe, not a file"):
        publish_to_folder(run.root, tmp_path / "out")
    assert names(tmp_path) == ["runs"]


@pytest.mark.parametrize("name", ["few_shot.json", "lora_adapter.pt"])
def test_a_file_that_becomes_a_link_after_it_was_checked_is_not_published(
    name: str, run: RunFolder, tmp_path: Path
) -> None:
    candidate = read_candidate(run.root)
    (tmp_path / "secret").write_bytes(b"secret")
    (run.task("A").root / name).unlink()
    (run.task("A").root / name).symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="it is a symbolic link"):
        stage(candidate, ["A"], PublishedState(None, None, None), RunFolder(tmp_path / "staging"))
    assert b"secret" not in contents(tmp_path / "staging").values()


@pytest.mark.parametrize("name", ["A/labels.json", "A", "README.md", "publication.json"])
def test_what_is_published_already_is_not_taken_through_a_link_either(
    name: str, run: RunFolder, tmp_path: Path
) -> None:
    publish_to_folder(run.root, tmp_path / "out")
    elsewhere = (tmp_path / "out" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "out" / name).symlink_to(elsewhere)
    other = finished_run(tmp_path / "runs" / "two", [task_result("C")], run_id="two")
    with pytest.raises(InputError, match=rf"cannot publish to .*out/{name}: it is a symbolic link"):
        publish_to_folder(other.root, tmp_path / "out")
    assert (tmp_path / "out" / name).is_symlink()


def test_a_foreign_link_in_a_published_folder_is_not_lost(run: RunFolder, tmp_path: Path) -> None:
    publish_to_folder(run.root, tmp_path / "out")
    (tmp_path / "photos").mkdir()
    (tmp_path / "out" / "photos").symlink_to(tmp_path / "photos")
    with pytest.raises(InputError, match="photos would be lost"):
        publish_to_folder(run.root, tmp_path / "out")


@pytest.mark.parametrize("value", ["../../x", "../../../../x", "/x", "a/../../x", "sha256:../../x"])
@pytest.mark.parametrize("key", ["revision", "public_name"])
def test_a_record_of_a_stranger_names_no_place_outside_the_target(
    key: str, value: str, run: RunFolder, tmp_path: Path
) -> None:
    old = run.task("A").result.read_text(encoding="utf-8")
    for path in (
        run.manifest,
        run.results,
        *(run.task(task).result for task in "AB"),
        *(run.task(task).meta for task in "AB"),
    ):
        record = json.loads(path.read_text(encoding="utf-8"))
        record["encoder"][key if path.name != "meta.json" else {"public_name": "name"}.get(key, key)] = value
        path.write_text(json.dumps(record), encoding="utf-8")
    assert run.task("A").result.read_text(encoding="utf-8") != old
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=rf"encoder\.{key}: String should match pattern"):
        publish_to_folder(run.root, tmp_path / "deep" / "deeper" / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "x" * 300, "README.md", "metrics"])
def test_a_task_of_a_stranger_is_called_as_one_of_ours_may_be(name: str, run: RunFolder, tmp_path: Path) -> None:
    for path in (run.manifest, run.results, run.task("A").result):
        path.write_text(path.read_text(encoding="utf-8").replace('"A"', json.dumps(name)), encoding="utf-8")
    with pytest.raises(InputError, match=r"task|cannot be called"):
        publish_to_folder(run.root, tmp_path / "out")
    assert names(tmp_path) == ["runs"]


def test_a_folder_of_somebody_else_is_left_alone(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(InputError, match="was not published by lorafleet"):
        publish_to_folder(run.root, tmp_path / "photos")
    assert contents(tmp_path / "photos") == {"cat.jpg": b"cat"}


def test_a_file_added_to_a_published_folder_is_not_lost(run: RunFolder, tmp_path: Path) -> None:
    publish_to_folder(run.root, tmp_path / "out")
    (tmp_path / "out" / "A" / "notes.txt").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"A/notes\.txt would be lost"):
        publish_to_folder(run.root, tmp_path / "out")
    assert (tmp_path / "out" / "A" / "notes.txt").read_bytes() == b"mine"


def test_another_run_folder_is_not_a_target(run: RunFolder, tmp_path: Path) -> None:
    other = finished_run(tmp_path / "runs" / "two", [task_result("A")])
    with pytest.raises(InputError, match="was not published by lorafleet"):
        publish_to_folder(run.root, other.root)
    assert other.manifest.is_file()


def test_run_and_target_must_lie_apart(run: RunFolder, tmp_path: Path) -> None:
    for target in (run.root, run.root / "inside", run.root.parent, tmp_path):
        with pytest.raises(InputError, match="one is inside the other"):
            publish_to_folder(run.root, target)


def test_a_file_is_not_a_target(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"x")
    with pytest.raises(InputError, match="it is a file"):
        publish_to_folder(run.root, tmp_path / "out")


def test_a_link_to_a_folder_stays_a_link(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    publish_to_folder(run.root, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "README.md").is_file()


@pytest.mark.parametrize("parent", ["/proc", "file", "file/deeper"])
def test_a_folder_that_cannot_be_written_is_refused(parent: str, run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(InputError, match=r"(/proc|file) cannot be written \(.+\); choose another folder$"):
        publish_to_folder(run.root, tmp_path / parent / "out")
    assert (tmp_path / "file").read_bytes() == b"in the way"


def test_a_copy_that_fails_leaves_the_target_as_it_was(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        target.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("pipeline.publishing.publish.shutil.copytree", full)
    with pytest.raises(LorafleetError, match=r"left it unchanged: .*No space left"):
        publish_to_folder(run.root, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = task_result(labels=("né", "反"))
    write_atomically(tmp_path / "deep" / "result.json", result.model_dump_json())
    assert read_record(tmp_path / "deep" / "result.json", TaskResult) == result
    assert names(tmp_path / "deep") == ["result.json"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}', b"\xff\xfe"])
def test_a_damaged_record_is_an_error_that_names_file_and_type(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(DataError, match=r"result\.json is damaged.*expected a TaskResult"):
        read_record(tmp_path / "result.json", TaskResult)


def test_a_missing_record_is_an_error_that_names_file_and_type(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"result\.json is missing; expected a TaskResult"):
        read_record(tmp_path / "result.json", TaskResult)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="file"):
        write_atomically(tmp_path / "file", "new")
    assert names(tmp_path) == ["file"]


def test_the_identity_of_an_adapter_is_the_hash_of_weights_then_head(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"ab")
    (tmp_path / "head.safetensors").write_bytes(b"c")
    assert (
        adapter_sha256(tmp_path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )  # sha256sum <<< of "abc"
    (tmp_path / "labels.json").touch()
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"head\.safetensors cannot be read"):
        adapter_sha256(tmp_path)
    (tmp_path / "labels.json").unlink()
    assert adapter_sha256(tmp_path) == hashlib.sha256(b"ab").hexdigest(), "an adapter without a head"


@pytest.mark.parametrize("name", ["metrics", "Metrics", "query", "Passage", "manifest.json", "README.md", "..", "a/b"])
def test_a_task_cannot_take_a_name_that_the_run_needs(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        RunFolder(tmp_path).task(name)
