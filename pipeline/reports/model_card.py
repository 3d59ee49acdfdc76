"""The model card of a run: what the adapters are, what they score and how to use them. Pure; holds no local path."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from pipeline.printable import markdown
from pipeline.records import ClassificationResults, Column, EncoderRef, ResultsEntry, TaskResult, ValueRow
from pipeline.reports.formatting import percent, points, utc
from pipeline.reports.score_table import (
    HOW_IT_WAS_MADE,
    SCORE_HEADINGS,
    data_source,
    is_of_mteb,
    score_row,
    score_table,
    task_heading,
)
from pipeline.store.values import find_value, values_of

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_CLAIMED: tuple[tuple[Column, str, str, str], ...] = (
    ("head", "accuracy", "accuracy", "Accuracy, own head"),
    ("head", "macro_f1", "f1", "Macro-F1, own head"),
    ("head", "average_precision", "average_precision", "Average precision, own head"),
    ("adapted_few_shot", "accuracy", "accuracy", "Accuracy, MTEB few-shot on the adapted encoder"),
)
"""Column, metric, and the Hub's type and name of each claim in the card's metadata."""
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
    """Write ``README.md`` of a run folder or a published repository.

    Args:
        results: The finished MTEB tasks that ``summary`` lists.
        summary: What ``results.summarise`` made of them.
        adapted_modules: As in any ``meta.json`` of the run; decides which usage snippet fits.
        trust_remote_code: Whether the encoder needs code of its own.
        license: As the Hub abbreviates it; none is claimed where left out.
    """
    table, encoder = score_table(summary, results), summary.encoder
    example = summary.tasks[0].task if summary.tasks else ""
    snippet = (
        usage_snippet(
            task=example, encoder=encoder, adapted_modules=adapted_modules, trust_remote_code=trust_remote_code
        )
        if summary.tasks
        else ""
    )
    rows = [line.cells() for line in table.lines] + ([table.average_cells()] if len(table.lines) > 1 else [])
    text = _environment().get_template("card.md.j2")
    return text.render(
        front_matter=_front_matter(results, encoder, license=license),
        encoder=encoder,
        encoder_url=f"https://huggingface.co/{encoder.public_name}" if _is_on_hub(encoder) else "",
        num_tasks=f"{len(summary.tasks)} LoRA adapter{'s' * (len(summary.tasks) != 1)} with classification heads",
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
        snippet=snippet,
        license=license,
    )


def usage_snippet(
    *, task: str, encoder: EncoderRef, adapted_modules: Sequence[str], trust_remote_code: bool = False
) -> str:
    """A Python program that classifies one text with nothing but torch and transformers.

    Args:
        task: The MTEB task whose folder it reads.
        encoder: What it loads; only ``public_name`` and ``revision`` are written.
        adapted_modules: Full module paths in pair order. Where all end in ``q_proj``, ``k_proj``, ``v_proj`` or ``o_proj`` it walks
            the projections as the source document does, otherwise the paths that ``meta.json`` lists.
        trust_remote_code: Whether the encoder needs code of its own.
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


def _front_matter(results: Sequence[TaskResult], encoder: EncoderRef, *, license: str | None) -> str:
    datasets = sorted(
        {
            r.mteb_task.location
            for r in results
            if r.mteb_task.source == "hub" and _HUB_ID.fullmatch(r.mteb_task.location)
        }
    )
    data = ModelCardData(
        base_model=encoder.public_name if _is_on_hub(encoder) else None,
        library_name="peft",
        pipeline_tag="text-classification",
        license=license,
        tags=[
            "lora",
            "text-classification",
            *(["mteb"] if any(is_of_mteb(r.mteb_task) for r in results) else []),
            "lorafleet",
        ],
        datasets=datasets or None,
        metrics=["accuracy", "f1"],
        model_name=f"LoRA text classifiers on {encoder.public_name}" if results else None,
        eval_results=[metric for result in results for metric in claimed_scores(result)] or None,
    )
    return data.to_yaml() + "\n"


def claimed_scores(result: TaskResult) -> list[EvalResult]:
    """What the adapter scores, 0..1; the frozen columns are not results of this repository."""
    values = values_of(result)
    found = []
    for column, metric, kind, name in _CLAIMED:
        if (row := find_value(values, column, metric)) is not None:
            found.append(_metric(result, row, kind, name))
    return found


def _metric(result: TaskResult, row: ValueRow, kind: str, name: str) -> EvalResult:
    task = result.mteb_task
    on_hub, is_own = task.source == "hub", _is_own(result)
    return EvalResult(
        task_type="text-classification",
        task_name="Text classification",
        # The Hub reads a type as the name of a data set on it, and takes two results of one type, subset and split for the same data's.
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
    over = " and ".join(f"{count} {word}{'s' * (count != 1)}{where}" for count, word, where in counts if count)
    return (
        f"In mteb's few-shot protocol over {over} the mean accuracy goes from {percent(mean.baseline_accuracy)} to "
        f"{percent(mean.lora_accuracy)} per cent ({points(mean.delta)} points); how the adapters compare with a probe that "
        'saw the same training texts is in the column "Head against probe".'
    )


def _adapter(result: TaskResult) -> dict[str, str | int]:
    data = result.data
    return {
        "name": result.mteb_task.name,
        "data": data_source(result.mteb_task),
        "num_classes": len(data.label_names),
        "num_lora": f"{result.num_lora_parameters:,}",
        "num_head": f"{result.num_head_parameters:,}",
        "texts": f"{data.num_train:,} / {data.num_validation:,} / {data.num_test:,}",
        "samples_per_label": result.mteb_task.samples_per_label,
        "selected_on": result.selected_on.replace("_", " "),
    }


def _limits(results: Sequence[TaskResult], summary: ClassificationResults) -> list[str]:
    limits = [
        "Each score is one training with one seed. Its interval says how far other test texts of the same kind would move it, no more.",
        "An adapter fits only the encoder revision named above, and every text gets one of its labels, fitting or not.",
    ]
    overlap = [f"{e.task} {e.num_overlap:,} of {e.num_test:,}" for e in summary.tasks if e.num_overlap]
    if overlap:
        limits.append(f"Test texts that also occur in train, which flatters every column: {', '.join(overlap)}.")
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
    if kept := [entry.task for entry in summary.tasks if entry.best_epoch == 0]:
        limits.append(
            f"No epoch was as good as the start of training, which was kept, so training has not helped: {', '.join(kept)}."
        )
    limits += _limits_of_selection(summary.tasks)
    if summary.failures:
        limits.append(
            f"The averages leave out what did not finish: {', '.join(f.mteb_task for f in summary.failures)}."
        )
    return limits


def _limits_of_selection(tasks: Sequence[ResultsEntry]) -> list[str]:
    on_test = [entry.task for entry in tasks if entry.selected_on == "test"]
    blind = [entry.task for entry in tasks if entry.selected_on == "last_epoch"]
    limits = []
    if on_test:
        limits.append(f"The epoch was chosen on the test split, so these scores are optimistic: {', '.join(on_test)}.")
    if blind:
        limits.append(f"No texts were left to choose an epoch on, the last one was taken: {', '.join(blind)}.")
    return limits


def _is_no_better_than_majority(result: TaskResult) -> bool:
    head, majority = score_row(result, "head"), score_row(result, "majority")
    return head is not None and majority is not None and head.low <= majority.accuracy


def _is_on_hub(encoder: EncoderRef) -> bool:
    return _HUB_ID.fullmatch(encoder.public_name) is not None and _COMMIT.fullmatch(encoder.revision) is not None


def _literal(text: str) -> str:
    """A Python literal in double quotes, as the formatter would write it."""
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
