"""Scores and base model that a model card claims in its metadata, which the Hub displays, against the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results

from pipeline.errors import DataError, VerificationError, first_line
from pipeline.publishing.mteb_consistency import is_different_score
from pipeline.records import TaskResult
from pipeline.reports.model_card import claimed_scores
from pipeline.store.files import LARGEST_RECORD_BYTES, read_file
from pipeline.store.run_folder import RunFolder

_MOST_LEVELS = 20  # nested lists and mappings in the metadata


def check_card(folder: RunFolder, results: Mapping[str, TaskResult]) -> None:
    """Compare the scores and the base model in the model card's metadata with the results.

    Args:
        folder: A run or a publication.
        results: MTEB task -> its result, for all adapters in the folder.
    Raises:
        VerificationError: they disagree.
        DataError: the card is missing or damaged.
    """
    name = folder.readme.name
    measured = {_score_of(claim): claim for result in results.values() for claim in claimed_scores(result)}
    try:
        # Found as the Hub's own library finds it.
        front = REGEX_YAML_BLOCK.search(read_file(folder.readme, at_most=LARGEST_RECORD_BYTES).decode())
        metadata = _read_yaml(front[2]) if front else {}
        models = metadata.get("model-index", [])
        claimed = model_index_to_eval_results(models)[1] if models else []
        wrong = [claim for claim in claimed if not _is_measured(claim, measured.get(_score_of(claim)))]
        base_model = metadata.get("base_model")
    except OSError as error:
        raise DataError(f"{folder.readme} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{folder.readme}: its metadata is damaged: {first_line(error)}") from None
    if front is None:
        raise VerificationError(f"{name}: has no metadata; expected a block between two lines of --- at its beginning")
    if wrong:
        claim = wrong[0]
        what = f"a score of {claim.metric_value!r:.100} ({claim.metric_name!r:.100}, {claim.dataset_name!r:.100})"
        raise VerificationError(f"{name}: its metadata claims {what}, which was not measured")
    encoders = [result.encoder.public_name for result in results.values()]
    if base_model is not None and base_model not in encoders:
        raise VerificationError(
            f"{name}: its metadata names the base model {base_model!r:.100}, but it is {encoders[0]}"
        )


def _score_of(claim: EvalResult) -> tuple[object, ...]:
    """Task, split and metric of a score claimed in the metadata. Older cards give the bare task name."""
    task = claim.dataset_name.removeprefix("MTEB ").removesuffix(" (own data)")
    return task, claim.dataset_split, claim.metric_type, claim.metric_name


def _is_measured(claim: EvalResult, measured: EvalResult | None) -> bool:
    if measured is None or is_different_score(claim.metric_value, measured.metric_value):
        return False
    claimed, actual = ((one.dataset_type, one.dataset_config) for one in (claim, measured))
    is_on_hub = any("/" in dataset for dataset, _ in (claimed, actual))
    return claimed == actual or not is_on_hub


def _read_yaml(text: str) -> Any:
    """Parse YAML without aliases, which can expand without bound, or deep nesting, which crashes the C parser."""
    loader, depth = getattr(yaml, "CSafeLoader", yaml.SafeLoader), 0
    for event in yaml.parse(text, loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS or isinstance(event, yaml.AliasEvent):
            raise ValueError(f"expected at most {_MOST_LEVELS} levels and no alias")
    return yaml.load(text, loader)
