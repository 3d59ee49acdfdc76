"""The model card: readable by the Hub, honest, free of local paths, with a usage program that compiles."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from builders import ENCODER, EUROBERT_MODULES, MINILM_MODULES, RUN_ID, WHEN, check_golden, task_result
from huggingface_hub import ModelCard, ModelCardData

from pipeline.records import CarvedTest, EncoderRef, Failure, MtebTask, TaskResult
from pipeline.reports.model_card import render_card, usage_snippet
from pipeline.reports.summary import summarise

HUB_ENCODER = EncoderRef(name="org/tiny", public_name="org/tiny", revision="0123456789abcdef0123456789abcdef01234567")


def card_of(
    *results: TaskResult,
    failures: tuple[Failure, ...] = (),
    encoder: EncoderRef = HUB_ENCODER,
    adapted_modules: tuple[str, ...] = MINILM_MODULES,
    license: str = "apache-2.0",
) -> str:
    summary = summarise(results, failures, encoder=encoder, run_id=RUN_ID, created_at=WHEN)
    return render_card(results, summary, adapted_modules=adapted_modules, license=license)


def data_in(card: str) -> ModelCardData:
    """The front matter as the Hub's own library reads it."""
    data = ModelCard(card).data
    assert isinstance(data, ModelCardData)
    return data


def snippet_in(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_the_card_is_the_golden_one() -> None:
    results = [
        task_result("Banking77Classification"),
        task_result("ImdbClassification", labels=("negative", "positive"), selected_on="test", p_value_holm=0.3),
        task_result("MTOPDomainClassification", reused_from="2025-12-31-000000-123456", num_epochs=1),
    ]
    failure = Failure(mteb_task="EmotionClassification", stage="train", reason="worker died <3 times>")
    check_golden("README.md", card_of(*results, failures=(failure,)))


def test_the_hub_reads_back_the_metrics_of_the_card() -> None:
    data = data_in(card_of(task_result(labels=("no", "yes"))))
    assert data.base_model == "org/tiny"
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-classification"
    assert data.datasets == ["mteb/banking77classification"]
    found = {(result.metric_name, result.metric_type): result.metric_value for result in data.eval_results or []}
    assert found == {
        ("Accuracy, own head", "accuracy"): 0.893,
        ("Macro-F1, own head", "f1"): 0.87514,
        ("Average precision, own head", "average_precision"): 0.88407,
        ("Accuracy, MTEB few-shot on the adapted encoder", "accuracy"): 0.861,
    }


def test_metrics_of_a_row_chosen_on_test_say_so() -> None:
    results = data_in(card_of(task_result(selected_on="test"))).eval_results or []
    assert all((result.metric_name or "").endswith("(epoch chosen on test)") for result in results)
    assert len(results) == 3


def test_an_encoder_that_the_hub_does_not_know_is_not_named_as_base_model() -> None:
    encoder = EncoderRef(name="/home/anna/minilm", public_name="minilm", revision="sha256:" + "0" * 64)
    card = card_of(task_result(encoder=encoder), encoder=encoder)
    assert "base_model" not in card
    assert "huggingface.co/minilm" not in card


def own(
    name: str, *, source: Literal["files", "mirror", "package"] = "files", samples_per_label: int = 8
) -> TaskResult:
    location = f"/home/anna/{name}.parquet"
    task = MtebTask(
        name=name,
        source=source,
        location=location,
        test_location=location,
        revision="sha256:1",
        max_epochs=2,
        samples_per_label=samples_per_label,
    )
    return task_result(name, source=task)


def test_data_that_is_not_on_the_hub_is_not_named_as_a_hub_dataset() -> None:
    card = card_of(own("Own"), own("Other"))
    data = data_in(card)
    assert data.datasets is None
    named = {(r.dataset_type, r.dataset_name, r.dataset_revision) for r in data.eval_results or []}
    assert named == {("own-data", "Own (own data)", None), ("own-data", "Other (own data)", None)}, (
        "each under its own name"
    )
    assert len(data.eval_results or []) == 6
    assert "/home" not in card


def test_the_card_says_which_part_of_the_own_files_became_test() -> None:
    own = MtebTask(
        name="Own",
        source="files",
        location="/home/anna/*.csv",
        test_split=CarvedTest(fraction=0.25, seed=0),
        group_column="customer",
        revision="sha256:" + "1" * 64,
        max_epochs=2,
        samples_per_label=8,
    )
    assert "| own files, 25% of them as test, split by customer @ sha256:111111111111 |" in card_of(
        task_result("Own", source=own)
    )


@pytest.mark.parametrize(
    ("results", "told", "is_mteb", "heading"),
    [
        ([task_result("A"), own("B", source="mirror")], "over 2 MTEB tasks the", True, "MTEB task"),
        ([own("A"), own("B", source="package")], "over 2 data sets outside MTEB the", False, "Data set"),
        ([own("A")], "over 1 data set outside MTEB the", False, "Data set"),
        ([task_result("A"), own("B"), own("C")], "over 1 MTEB task and 2 data sets outside MTEB the", True, "Data set"),
    ],
)
def test_own_data_are_not_called_mteb_tasks(results: list[TaskResult], told: str, is_mteb: bool, heading: str) -> None:
    card = card_of(*results)
    assert f"In mteb's few-shot protocol {told} mean accuracy goes from" in card
    assert ("mteb" in (data_in(card).tags or [])) == is_mteb
    assert {line.split(" | ")[0] for line in card.splitlines() if re.match(r"\| (MTEB task|Data set) \|", line)} == {
        f"| {heading}"
    }


def test_the_card_says_how_many_texts_per_label_the_few_shot_scores_are_from() -> None:
    card = card_of(task_result("A"), own("B", samples_per_label=16))
    head, _, *rows = [
        line.split(" | ") for line in card[card.index("## Adapters") :].splitlines() if line.startswith("|")
    ]
    assert [row[head.index("Few-shot texts per label")] for row in rows] == ["8", "16"]
    assert "Few-shot texts per label: A 8, B 16." in card


def test_a_kept_start_is_a_limit_of_the_card() -> None:
    told = "No epoch was as good as the start of training, which was kept, so training did not help: Kept."
    assert told in card_of(task_result("Kept", best_epoch=0), task_result("Trained"))
    assert "No epoch beat" not in card_of(task_result("Trained"))


def test_a_card_names_no_local_path_even_where_a_failure_does() -> None:
    failure = Failure(mteb_task="Lost", stage="load data", reason="/home/anna/x.parquet: no column")
    card = card_of(task_result(encoder=ENCODER), failures=(failure,))
    assert "/home" not in card
    assert "…/x.parquet: no column" in card


def test_what_a_user_wrote_cannot_break_the_markdown() -> None:
    failure = Failure(mteb_task="Lost", stage="load data", reason="<img src=x> [a](b) | `c`\n## d")
    line = next(line for line in card_of(task_result(), failures=(failure,)).splitlines() if "Lost" in line)
    assert line.endswith(r"\<img src=x\> \[a\](b) \| \`c\` ## d")


def test_every_table_row_has_as_many_cells_as_its_heading() -> None:
    card = card_of(task_result("A", selected_on="test"), task_result("B", accuracies={"head": 0.5}))
    scores = card[card.index("## Scores") : card.index("## Adapters")]
    counts = {len(re.split(r"(?<!\\)\|", line)) for line in scores.splitlines() if line.startswith("|")}
    assert counts == {13}


def test_limits_name_overlap_truncation_selection_on_test_and_an_adapter_that_learnt_nothing() -> None:
    weak = task_result(
        "Weak", accuracies={"majority": 0.6, "head": 0.61}, selected_on="test", num_overlap=1234, num_truncated=7
    )
    card = card_of(weak, task_result("Clean", num_overlap=0, num_truncated=0))
    limits = card[card.index("## Known limits") : card.index("## Files")]
    assert "also occur in train, which makes every column optimistic: Weak 1,234 of 1,000" in limits
    assert "cut at the encoder's token limit: Weak 7 of 1,000" in limits
    assert "Not distinguishable from always answering the most frequent label: Weak." in limits
    assert "chosen on the test split, so these scores are optimistic: Weak." in limits
    assert "Clean" not in limits


def test_a_clean_run_is_not_burdened_with_limits_it_does_not_have() -> None:
    card = card_of(task_result(num_overlap=0, num_truncated=0))
    for words in ("also occur in train", "cut at the encoder", "Not distinguishable", "optimistic:", "did not finish"):
        assert words not in card[card.index("## Known limits") :]


def test_a_run_in_which_everything_failed_has_a_card_without_usage() -> None:
    card = card_of(failures=(Failure(mteb_task="Lost", stage="load data", reason="gone"),))
    assert data_in(card).eval_results is None
    assert "## Usage" not in card
    assert "**Lost**" in card


@pytest.mark.parametrize("modules", [MINILM_MODULES, EUROBERT_MODULES])
@pytest.mark.parametrize("encoder", [HUB_ENCODER, ENCODER])
@pytest.mark.parametrize("trust", [True, False])
def test_the_usage_program_compiles(modules: tuple[str, ...], encoder: EncoderRef, trust: bool) -> None:
    program = usage_snippet(
        task="Banking77Classification", encoder=encoder, adapted_modules=modules, trust_remote_code=trust
    )
    compile(program, "snippet", "exec")
    assert 'FOLDER = "Banking77Classification"\n' in program
    assert ("trust_remote_code=True" in program) == trust


def test_the_card_holds_the_usage_program_of_its_first_task() -> None:
    card = card_of(task_result("First"), task_result("Second"))
    assert snippet_in(card) == usage_snippet(task="First", encoder=HUB_ENCODER, adapted_modules=MINILM_MODULES)


def test_projections_are_walked_only_where_all_adapted_modules_are_projections() -> None:
    walked = usage_snippet(task="T", encoder=HUB_ENCODER, adapted_modules=EUROBERT_MODULES)
    listed = usage_snippet(task="T", encoder=HUB_ENCODER, adapted_modules=(*EUROBERT_MODULES, "layers.0.mlp.up"))
    assert '("q_proj", "k_proj", "v_proj", "o_proj")' in walked
    assert "q_proj" not in listed
    assert "get_submodule(path)" in listed


def test_a_commit_is_pinned_and_a_checksum_is_not_passed_as_a_revision() -> None:
    pinned = usage_snippet(task="T", encoder=HUB_ENCODER, adapted_modules=MINILM_MODULES)
    local = usage_snippet(task="T", encoder=ENCODER, adapted_modules=MINILM_MODULES)
    assert f'REVISION = "{HUB_ENCODER.revision}"' in pinned
    assert "REVISION = None" in local
    assert ENCODER.revision in local


def test_a_name_with_quotes_is_still_one_string_of_the_program() -> None:
    program = usage_snippet(task='a"; import os #\\', encoder=HUB_ENCODER, adapted_modules=MINILM_MODULES)
    compile(program, "snippet", "exec")
    assert 'FOLDER = "a\\"; import os #\\\\"' in program
