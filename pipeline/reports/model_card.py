"""The model card of a run: the adapters, their scores and their use. Contains no local path."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from pipeline.evaluation.metrics import title_of
from pipeline.history.values import find_value, main_value, values_of
from pipeline.printable import markdown
from pipeline.records import SIDES, ClassificationResults, Column, EncoderRef, TaskResult, ValueRow
from pipeline.reports.formatting import percent, points, utc
from pipeline.reports.score_table import HOW_IT_WAS_MADE, SCORE_HEADINGS, score_table, task_heading
from pipeline.reports.summary import data_source, is_of_mteb, score_row, task_entry
from pipeline.reports.vector_table import (
    DETAIL_HEADINGS,
    HOW_VECTORS_ARE_MEASURED,
    VECTOR_HEADINGS,
    vector_details,
    vector_rows,
)

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_CLAIMED: tuple[tuple[Column, str, str, str], ...] = (
    ("head", "accuracy", "accuracy", "Accuracy, own head"),
    ("head", "macro_f1", "f1", "Macro-F1, own head"),
    ("head", "average_precision", "average_precision", "Average precision, own head"),
    ("adapted_few_shot", "accuracy", "accuracy", "Accuracy, MTEB few-shot on the adapted encoder"),
)
"""Column, metric, type on the Hub, and name of each claim in the card's metadata."""
_KINDS: tuple[tuple[str, Callable[[Sequence[TaskResult]], bool]], ...] = (
    ("text-classification", lambda results: any(result.has_head for result in results)),
    ("sentence-similarity", lambda results: any(not result.has_head for result in results)),
)
"""Kinds of models on the Hub, and whether the adapters of a run have one of the kind."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def render_card(
    results: Sequence[TaskResult],
    summary: ClassificationResults,
    *,
    adapted_modules: Sequence[str],
    trust_remote_code: bool = False,
    license: str | None = None,
) -> str:
    """Render ``README.md`` of a run folder or a published repository.

    Args:
        results: Results of the MTEB tasks in ``summary``.
        summary: Summary of the results.
        adapted_modules: Paths of the adapted layers, which decide the form of the usage snippet.
        trust_remote_code: Whether the encoder needs its own code.
        license: Abbreviation on the Hub. None: no license is claimed.
    """
    table, encoder = score_table(summary, results), summary.encoder
    vectors = [result for result in results if not result.has_head]
    snippets = []
    if summary.tasks:
        example = summary.tasks[0].task
        snippets.append(
            usage_snippet(
                task=example, encoder=encoder, adapted_modules=adapted_modules, trust_remote_code=trust_remote_code
            )
        )
    if vectors:
        example, has_sides = vectors[0].mteb_task.name, vectors[0].has_sides
        snippets.append(
            vector_snippet(task=example, has_sides=has_sides, encoder=encoder, trust_remote_code=trust_remote_code)
        )
    rows = [line.cells() for line in table.lines] + ([table.average_cells()] if len(table.lines) > 1 else [])
    text = _environment().get_template("card.md.j2")
    return text.render(
        front_matter=_front_matter(results, encoder, license=license),
        encoder=encoder,
        encoder_url=f"https://huggingface.co/{encoder.public_name}" if _is_on_hub(encoder) else "",
        title="LoRA text classifiers" if summary.tasks or not vectors else "LoRA embedding adapters",
        num_tasks=_number_of_adapters(len(summary.tasks), len(vectors)),
        vector_headings=VECTOR_HEADINGS,
        vector_rows=vector_rows([task_entry(result) for result in vectors]),
        detail_headings=DETAIL_HEADINGS,
        vector_details=[(result.mteb_task.name, vector_details(result)) for result in vectors],
        how_vectors=HOW_VECTORS_ARE_MEASURED,
        delta_sentence=_delta_sentence(results, summary),
        run_id=summary.run_id,
        created_at=utc(summary.created_at),
        task_heading=task_heading(results),
        headings=SCORE_HEADINGS[1:],
        rows=rows,
        table_notes=table.notes(),
        failures=summary.failures,
        adapters=[_adapter(result) for result in results],
        how=HOW_IT_WAS_MADE,
        limits=_limits(results, summary),
        classifies=bool(summary.tasks) or not results,
        has_sides=any(result.has_sides for result in results),
        snippets=snippets,
        license=license,
    )


def usage_snippet(
    *, task: str, encoder: EncoderRef, adapted_modules: Sequence[str], trust_remote_code: bool = False
) -> str:
    """Render a Python program that classifies one text with torch and transformers only.

    Args:
        task: MTEB task whose folder the program reads.
        encoder: Encoder that the program loads by ``public_name`` and ``revision``.
        adapted_modules: Module paths in the order of the pairs. If all end in ``q_proj``, ``k_proj``, ``v_proj`` or
            ``o_proj``, the program walks these projections. Otherwise it walks the paths in ``meta.json``.
        trust_remote_code: Whether the encoder needs its own code.
    """
    pinned = _COMMIT.fullmatch(encoder.revision) is not None
    return (
        _environment()
        .get_template("snippet.py.j2")
        .render(
            encoder=_literal(encoder.public_name),
            revision=_literal(encoder.revision) if pinned else "",
            fingerprint=encoder.revision,
            folder=_literal(task),
            trust=", trust_remote_code=True" if trust_remote_code else "",
            projections=bool(adapted_modules)
            and all(path.rpartition(".")[2] in _PROJECTIONS for path in adapted_modules),
        )
    )


def vector_snippet(*, task: str, has_sides: bool, encoder: EncoderRef, trust_remote_code: bool = False) -> str:
    """Render a Python program that compares two texts with an embedding adapter, by PEFT.

    Args:
        task: MTEB task whose folder the program reads.
        has_sides: Whether the folder holds an adapter for queries and one for passages.
        encoder: Encoder that the program loads by ``public_name`` and ``revision``.
        trust_remote_code: Whether the encoder needs its own code.
    """
    pinned = _COMMIT.fullmatch(encoder.revision) is not None
    folders = [f"{task}/{side}" for side in SIDES] if has_sides else [task, task]
    template = _environment().get_template("vector_snippet.py.j2")
    return template.render(
        encoder=_literal(encoder.public_name),
        revision=_literal(encoder.revision) if pinned else "",
        fingerprint=encoder.revision,
        folders=f"({', '.join(map(_literal, folders))})",
        trust=", trust_remote_code=True" if trust_remote_code else "",
    )


def _number_of_adapters(num_classifiers: int, num_vectors: int) -> str:
    classifiers = f"{num_classifiers} LoRA adapter{'s' * (num_classifiers != 1)} with classification heads"
    vectors = f"{num_vectors} LoRA embedding adapter{'s' * (num_vectors != 1)}"
    if not num_vectors:
        return classifiers
    return f"{classifiers} and {vectors}" if num_classifiers else vectors


def _front_matter(results: Sequence[TaskResult], encoder: EncoderRef, *, license: str | None) -> str:
    locations = {result.mteb_task.location for result in results if result.mteb_task.source == "hub"}
    datasets = sorted(location for location in locations if _HUB_ID.fullmatch(location))
    classifies = any(result.has_head for result in results) or not results
    kinds = [kind for kind, is_there in _KINDS if is_there(results)] or ["text-classification"]
    data = ModelCardData(
        base_model=encoder.public_name if _is_on_hub(encoder) else None,
        library_name="peft",
        pipeline_tag=kinds[0],
        license=license,
        tags=[
            "lora",
            *kinds,
            *(["mteb"] if any(is_of_mteb(r.mteb_task) for r in results) else []),
            "lorafleet",
        ],
        datasets=datasets or None,
        metrics=["accuracy", "f1"] if classifies else None,
        model_name=f"LoRA {'text classifiers' if classifies else 'embedding adapters'} on {encoder.public_name}"
        if results
        else None,
        eval_results=[metric for result in results for metric in claimed_scores(result)] or None,
    )
    return data.to_yaml() + "\n"


def claimed_scores(result: TaskResult) -> list[EvalResult]:
    """Scores that the card claims for an adapter, 0..1. Those of the frozen encoder are not claimed."""
    values = values_of(result)
    claims = []
    for column, metric, kind, name in _CLAIMED:
        if (row := find_value(values, column, metric)) is not None:
            claims.append(_metric(result, row, kind, name))
    if (main := main_value(values, "adapted")) is not None:
        title = title_of(main.metric)
        claims.append(_metric(result, main, main.metric, f"{title[0].upper()}{title[1:]}, adapted encoder"))
    return claims


def _metric(result: TaskResult, row: ValueRow, kind: str, name: str) -> EvalResult:
    task = result.mteb_task
    on_hub, is_own = task.source == "hub", _is_own(result)
    return EvalResult(
        task_type="text-classification" if result.has_head else "sentence-similarity",
        task_name="Text classification" if result.has_head else "Sentence similarity",
        # The Hub takes a type for the name of a data set, and results of equal type, subset and split for one data set.
        dataset_type=task.location if on_hub else "own-data" if is_own else task.name,
        dataset_name=f"MTEB {task.name}" if on_hub else f"{task.name} (own data)" if is_own else task.name,
        dataset_config=task.name if is_own else task.subset,
        dataset_split=row.split,
        dataset_revision=task.revision if _COMMIT.fullmatch(task.revision) else None,
        metric_type=kind,
        metric_value=round(row.value, 6),
        metric_name=f"{name} (epoch chosen on test)" if result.selected_on == "test" else name,
    )


def _is_own(result: TaskResult) -> bool:
    return not is_of_mteb(result.mteb_task) and result.mteb_task.source != "package"


def _delta_sentence(results: Sequence[TaskResult], summary: ClassificationResults) -> str:
    mean = summary.average
    if mean.delta is None:
        return ""
    others = {result.mteb_task.name for result in results if not is_of_mteb(result.mteb_task)}
    is_other = [entry.task in others for entry in summary.tasks if entry.delta is not None]
    counts = ((is_other.count(False), "MTEB task", ""), (is_other.count(True), "data set", " outside MTEB"))
    over = " and ".join(f"{count} {word}{'s' * (count != 1)}{suffix}" for count, word, suffix in counts if count)
    return (
        f"In mteb's few-shot protocol over {over} the mean accuracy goes from {percent(mean.baseline_accuracy)} to "
        f'{percent(mean.lora_accuracy)} per cent ({points(mean.delta)} points). The column "Head against probe" '
        "compares the adapters with a probe on the same training texts."
    )


def _adapter(result: TaskResult) -> dict[str, str | int]:
    data = result.data
    return {
        "name": result.mteb_task.name,
        "data": data_source(result.mteb_task),
        "num_classes": len(data.label_names) if result.has_head else "–",
        "num_lora": f"{result.num_lora_parameters:,}",
        "num_head": f"{result.num_head_parameters:,}",
        "texts": f"{data.num_train:,} / {data.num_validation:,} / {data.num_test:,}",
        "samples_per_label": result.mteb_task.samples_per_label if _is_few_shot(result) else "–",
        "selected_on": result.selected_on.replace("_", " "),
    }


def _limits(results: Sequence[TaskResult], summary: ClassificationResults) -> list[str]:
    limits = [
        "Each score is from one training with one seed. Its interval covers only the choice of test texts.",
        "An adapter works only with the encoder revision named above."
        + (" Every text gets one of its labels, even if none fits." if summary.tasks or not results else ""),
    ]
    overlap = [
        f"{r.mteb_task.name} {r.data.num_overlap:,} of {r.data.num_test:,}" for r in results if r.data.num_overlap
    ]
    if overlap:
        limits.append(
            f"Test texts that also occur in train, which makes every column optimistic: {', '.join(overlap)}."
        )
    truncated = [
        f"{r.mteb_task.name} {r.data.num_truncated_test:,} of {r.data.num_test:,}"
        for r in results
        if r.data.num_truncated_test
    ]
    if truncated:
        limits.append(f"Test texts that were cut at the encoder's token limit: {', '.join(truncated)}.")
    weak = [result.mteb_task.name for result in results if _is_no_better_than_majority(result)]
    if weak:
        limits.append(f"Not distinguishable from always answering the most frequent label: {', '.join(weak)}.")
    if kept := [result.mteb_task.name for result in results if result.best_epoch == 0]:
        limits.append(
            "No epoch was as good as the start of training, which was kept, so training did not help: "
            f"{', '.join(kept)}."
        )
    limits += _limits_of_selection(results)
    if summary.failures:
        limits.append(
            f"The averages do not include tasks that failed: {', '.join(f.mteb_task for f in summary.failures)}."
        )
    return limits


def _limits_of_selection(results: Sequence[TaskResult]) -> list[str]:
    on_test = [result.mteb_task.name for result in results if result.selected_on == "test"]
    blind = [result.mteb_task.name for result in results if result.selected_on == "last_epoch"]
    limits = []
    if on_test:
        limits.append(f"The epoch was chosen on the test split, so these scores are optimistic: {', '.join(on_test)}.")
    if blind:
        limits.append(f"No texts were left to choose an epoch, so it is the last one: {', '.join(blind)}.")
    return limits


def _is_few_shot(result: TaskResult) -> bool:
    """Whether a few-shot protocol is among the scores: texts with labels have one, pairs have none."""
    return result.mteb_task.objective in ("classification", "separation")


def _is_no_better_than_majority(result: TaskResult) -> bool:
    head, majority = score_row(result, "head"), score_row(result, "majority")
    return head is not None and majority is not None and head.low <= majority.accuracy


def _is_on_hub(encoder: EncoderRef) -> bool:
    return _HUB_ID.fullmatch(encoder.public_name) is not None and _COMMIT.fullmatch(encoder.revision) is not None


def _literal(text: str) -> str:
    """Python literal of a text in double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.reports"),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["md"] = markdown
    return environment
