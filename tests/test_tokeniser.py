"""The tokeniser: the ids of the tokenizer itself, whatever the text, and each distinct word taken apart once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from builders import toy_texts
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.encoder import tokeniser as tokeniser_module
from pipeline.encoder.tokeniser import Tokeniser, Tokens

_PIECES = [
    "a",
    "b",
    "un",
    "ship",
    "é",
    "中",
    "文",
    "!",
    ".",
    "-",
    "'",
    "[",
    "]",
    "##b",
    "##ip",
    "##ship",
    "##un",
    "##.",
]
_SPECIAL = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
_VOCABULARY = [*_SPECIAL, *_PIECES, "c" * 64]
_CHARACTERS = [
    "aAbB.,!'-unship",
    "   \t\n\x0b\x0c\r\x1c\x1f\x85\xa0\u1680\u2003\u2028\u3000\u200b\ufeff",
    "中文字日本",
    "éÉßıİÅñ\u0301\u0308\u0338ﬁ\ufdfa한국어",
    "\x00\x01\ufffd😀👩\u200d👧🏽",
    "[]#",
]
_STRETCHES = ["[SEP]", "[MASK]", " [CLS] ", "SEP]", "ship", " " * 9, "a" * 63, "b" * 65, "ab" * 60]


def bert_tokenizer(**normaliser: Any) -> Any:
    """BERT's kind with a tiny vocabulary."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(_VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**normaliser)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def nasty_texts(count: int) -> list[str]:
    """Every kind of space, script and control character, special tokens spelt out, and words of all lengths."""
    chance = random.Random(0)

    def piece() -> str:
        return chance.choice(_STRETCHES) if chance.random() < 0.1 else chance.choice(chance.choice(_CHARACTERS))

    return ["", " ", "\x00", *("".join(piece() for _ in range(chance.randrange(60))) for _ in range(count))]


def listed(tokens: Tokens) -> list[tuple[list[int], bool]]:
    ends = zip(tokens.offsets[:-1], tokens.offsets[1:], tokens.truncated.tolist(), strict=True)
    return [(tokens.ids[start:end].tolist(), cut) for start, end, cut in ends]


def by_itself(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[tuple[list[int], bool]]:
    """Tokens of one text at a time."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    whole = [len(backend.encode(text).ids) > max_tokens for text in texts]
    backend.enable_truncation(max_length=max_tokens)
    return [(backend.encode(text).ids, cut) for text, cut in zip(texts, whole, strict=True)]


@pytest.fixture
def learnt(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words that a tokenizer was asked about."""
    asked: list[str] = []
    take_apart = tokeniser_module._tokens_of_words

    def noted(words: Sequence[str], backend: Any) -> Any:
        asked.extend(words)
        return take_apart(words, backend)

    monkeypatch.setattr(tokeniser_module, "_tokens_of_words", noted)
    return asked


@pytest.mark.parametrize("max_tokens", [3, 4, 9, 24, 200])
@pytest.mark.parametrize(
    "normaliser",
    [{}, {"lowercase": False, "strip_accents": False}, {"clean_text": False, "handle_chinese_chars": False}],
    ids=str,
)
def test_words_one_by_one_give_the_ids_of_the_whole_text(
    max_tokens: int, normaliser: dict[str, bool], learnt: list[str]
) -> None:
    tokenizer, texts = bert_tokenizer(**normaliser), nasty_texts(1000)
    tokenise = Tokeniser(tokenizer, max_tokens=max_tokens)
    expected = by_itself(tokenizer, texts, max_tokens)
    assert listed(tokenise(texts)) == expected
    assert listed(tokenise(texts[::-1])) == expected[::-1], "also of words that are known by now"
    assert len(learnt) > 500
    assert any(cut for _, cut in expected) == (max_tokens < 100)


def test_each_distinct_word_is_taken_apart_once(learnt: list[str]) -> None:
    tokenise = Tokeniser(bert_tokenizer(), max_tokens=24)
    tokenise(["ship a ship", "b ship"])
    tokenise(["ship b un"])
    assert learnt == ["ship", "a", "b", "un"]


def test_long_words_are_not_kept_and_of_a_long_text_only_the_first_ones_are(learnt: list[str]) -> None:
    tokenizer = bert_tokenizer()
    tokenise = Tokeniser(tokenizer, max_tokens=6)
    texts = ["ship " + "a" * 65, " ".join(f"a{number}" for number in range(1000))]
    assert listed(tokenise(texts)) == by_itself(tokenizer, texts, 6)
    assert learnt == ["ship", "a0", "a1", "a2", "a3", "a4"]


def test_words_of_every_length_that_is_kept_fit_into_the_beginning() -> None:
    tokenizer, text = bert_tokenizer(), " ".join(["c" * 64] * 300)
    assert listed(Tokeniser(tokenizer, max_tokens=200)([text])) == by_itself(tokenizer, [text], 200)


def test_the_beginning_of_a_long_text_ends_far_behind_what_is_kept() -> None:
    """If it ended inside a word of more than a hundred letters, which is unknown, the rest could be known."""
    tokenizer = bert_tokenizer()
    for before in range(1850, 2050, 7):
        text = ("ab" * 40 + " ") * (before // 81) + "." * (before % 81) + " " + "b" * 150 + " a" * 3000
        assert listed(Tokeniser(tokenizer, max_tokens=60)([text])) == by_itself(tokenizer, [text], 60)


def test_all_special_tokens_stand_where_the_tokenizer_puts_them() -> None:
    tokenizer = bert_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[MASK] [CLS] $A [SEP] [PAD]", special_tokens=[("[MASK]", 4), ("[CLS]", 2), ("[SEP]", 3), ("[PAD]", 1)]
    )
    texts = ["", "ship", "a b un ship", "a" * 65]
    for max_tokens in (4, 5, 6, 24):
        assert listed(Tokeniser(tokenizer, max_tokens=max_tokens)(texts)) == by_itself(tokenizer, texts, max_tokens)


def test_too_many_words_are_forgotten(monkeypatch: pytest.MonkeyPatch, learnt: list[str]) -> None:
    monkeypatch.setattr(tokeniser_module, "_MOST_WORDS", 3)
    tokenizer = bert_tokenizer()
    tokenise = Tokeniser(tokenizer, max_tokens=24)
    for text in ("a b un ship", "ship a", "b un"):
        assert listed(tokenise([text])) == by_itself(tokenizer, [text], 24)
    assert learnt == ["a", "b", "un", "ship", "ship", "a", "b", "un"]


@pytest.mark.parametrize("added", ["ship a", "ship\ta"])
def test_an_added_token_that_holds_a_space_is_still_found(added: str, learnt: list[str]) -> None:
    """The second one does once it is normalised."""
    tokenizer, texts = bert_tokenizer(), ["b ship a b", "a ship b"]
    tokenizer.add_tokens([added])
    expected = by_itself(tokenizer, texts, 24)
    assert any(len(_VOCABULARY) in ids for ids, _ in expected)
    assert listed(Tokeniser(tokenizer, max_tokens=24)(texts)) == expected
    assert learnt == []


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_a_tokenizer_that_looks_across_spaces_is_given_the_whole_text(part: str, learnt: list[str]) -> None:
    tokenizer, text = bert_tokenizer(), "a b ship"
    looks = {"normalizer": normalizers.Replace("a b", "b"), "pre_tokenizer": pre_tokenizers.Punctuation()}
    setattr(tokenizer.backend_tokenizer, part, looks[part])
    expected = by_itself(tokenizer, [text], 24)
    assert expected != by_itself(bert_tokenizer(), [text], 24)
    assert listed(Tokeniser(tokenizer, max_tokens=24)([text])) == expected
    assert learnt == []


def test_other_kinds_of_tokenizer_are_given_the_whole_text(
    encoder_folder: Callable[[str], Path], learnt: list[str]
) -> None:
    tokenizer, texts = AutoTokenizer.from_pretrained(encoder_folder("roberta")), [*nasty_texts(50), *toy_texts(20)[0]]
    assert listed(Tokeniser(tokenizer, max_tokens=12)(texts)) == by_itself(tokenizer, texts, 12)
    assert learnt == []


def test_byte_level_words_depend_on_the_space_before_them(learnt: list[str]) -> None:
    vocabulary = {piece: number for number, piece in enumerate(["<pad>", "a", "Ġ", "b", "Ġb", "Ġa"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "b"), ("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    assert listed(Tokeniser(fast, max_tokens=8)(["a b", "b a", ""])) == [([1, 4], False), ([3, 5], False), ([0], False)]
    assert learnt == []


def test_two_threads_may_use_one_tokeniser() -> None:
    tokenizer, texts = bert_tokenizer(), nasty_texts(500)
    expected = by_itself(tokenizer, texts, 9)
    tokenise = Tokeniser(tokenizer, max_tokens=9)
    with ThreadPoolExecutor(4) as pool:
        assert all(listed(tokens) == expected for tokens in pool.map(tokenise, [texts] * 8))


def test_a_tokeniser_is_one_threads_at_a_time() -> None:
    """The tokenizer's own settings and the kept words change with every use."""
    tokenise = Tokeniser(bert_tokenizer(), max_tokens=9)
    with ThreadPoolExecutor(1) as pool:
        with tokenise._busy:
            asked = pool.submit(tokenise, ["ship"])
            assert not wait([asked], timeout=0.3).done
        asked.result(5)


@pytest.mark.parametrize("model", ["words", "pairs", "pieces"])
def test_other_models_behind_the_same_pre_tokenizer_see_one_word_at_a_time_too(model: str, learnt: list[str]) -> None:
    tokenizer, texts = bert_tokenizer(), nasty_texts(300)
    letters = {
        piece: number
        for number, piece in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *"shipabun", "sh", "ship"])
    }
    kinds = {
        "words": models.WordLevel({"[UNK]": 0, "ship": 1, "a": 5, "!": 6}, unk_token="[UNK]"),
        "pairs": models.BPE(letters, [("s", "h"), ("i", "p")] if "ip" in letters else [("s", "h")], unk_token="[UNK]"),
        "pieces": models.Unigram(
            [("[UNK]", 0.0), *((piece, -float(len(piece))) for piece in letters if piece != "[UNK]")], 0, False
        ),
    }
    tokenizer.backend_tokenizer.model = kinds[model]
    assert listed(Tokeniser(tokenizer, max_tokens=9)(texts)) == by_itself(tokenizer, texts, 9)
    assert learnt != []


def test_more_texts_than_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokeniser_module, "_AT_ONCE", 7)
    tokenizer, texts = bert_tokenizer(), nasty_texts(30)
    assert listed(Tokeniser(tokenizer, max_tokens=9)(texts)) == by_itself(tokenizer, texts, 9)
