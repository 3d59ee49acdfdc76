"""Configuration: valid files load, and every fault names the key, the expectation and the finding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from pipeline.config import (
    RunConfig,
    Section,
    load_config,
    preset_names,
    publish_config,
    validate_config,
    with_absolute_paths,
)
from pipeline.errors import ConfigError, InputError

SOURCE_EPOCHS = {
    "AmazonCounterfactualClassification": 5,
    "Banking77Classification": 10,
    "ImdbClassification": 5,
    "MTOPDomainClassification": 10,
    "MassiveIntentClassification": 10,
    "MassiveScenarioClassification": 8,
    "ToxicConversationsClassification": 4,
    "TweetSentimentExtractionClassification": 4,
}


def fault(*overrides: str, source: str = "quickstart") -> str:
    """Return the message about a config that must be refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides=overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name: str) -> None:
    assert load_config(name).mteb_tasks


def test_the_contract_names_two_presets() -> None:
    assert {"quickstart", "mteb8"} <= set(preset_names())


def test_mteb8_has_the_source_documents_tasks_epochs_and_hyperparameters() -> None:
    config = load_config("mteb8")
    assert {t.name: t.max_epochs for t in config.mteb_tasks} == SOURCE_EPOCHS
    assert config.encoder.name == "gomyk/jina-v5-h256-distilled-conv"
    train, adapter = config.train, config.adapter
    assert (train.learning_rate, train.weight_decay, train.batch_size, train.patience) == (2e-4, 0.01, 32, 3)
    assert (train.gradient_clip, train.early_stopping_split, train.class_weights) == (1.0, "validation", "none")
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.layers, adapter.target) == (
        8,
        16.0,
        0.1,
        "all",
        "attention",
    )
    assert (config.encoder.max_tokens, config.encoder.pooling, config.encoder.trust_remote_code) == (128, "mean", False)


def test_a_file_names_only_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[train]\nseed = 7\n[[mteb_tasks]]\nname = "A"\n', encoding="utf-8")
    assert load_config(str(path)) == RunConfig.model_validate({"train": {"seed": 7}, "mteb_tasks": [{"name": "A"}]})


def test_a_config_survives_its_own_json() -> None:
    config = load_config("mteb8", overrides=('adapter.target=["a.b", "c"]', "train.seed=3"))
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("override", "key", "expected", "found"),
    [
        ("adapter.rank=0", "adapter.rank", "greater than or equal to 1", "0"),
        ("adapter.alpha=inf", "adapter.alpha", "finite", "inf"),
        ("adapter.dropout=1.0", "adapter.dropout", "less than 1", "1.0"),
        ('adapter.layers="last:0"', "adapter.layers", "last:K", "'last:0'"),
        ("adapter.target=[]", "adapter.target", "at least 1", "[]"),
        ('adapter.target="mlp"', "adapter.target", "'attention'", "'mlp'"),
        ('encoder.pooling="sum"', "encoder.pooling", "'mean', 'cls' or 'max'", "'sum'"),
        ("encoder.max_tokens=2", "encoder.max_tokens", "greater than or equal to 4", "2"),
        ("train.learning_rate=0", "train.learning_rate", "greater than 0", "0"),
        ("train.learning_rate=nan", "train.learning_rate", "finite number", "nan"),
        ('train.seed="seven"', "train.seed", "integer", "'seven'"),
        ("train.seed=1.5", "train.seed", "integer", "1.5"),
        ("train.validation_fraction=-0.1", "train.validation_fraction", "greater than or equal to 0", "-0.1"),
        ("train.validation_fraction=0.5", "train.validation_fraction", "less than 0.5", "0.5"),
        ('train.precision="fp16"', "train.precision", "'auto', 'float32' or 'bfloat16'", "'fp16'"),
        ("evaluate.probe_c=[]", "evaluate.probe_c", "at least 1", "[]"),
        ("evaluate.probe_c=[1.0, -1.0]", "evaluate.probe_c.1", "greater than 0", "-1.0"),
        ('evaluate.columns=["hat"]', "evaluate.columns.0", "'head'", "'hat'"),
        ("compute.workers=0", "compute.workers", "greater than or equal to 1", "0"),
        ("compute.cpus_per_worker=-1", "compute.cpus_per_worker", "greater than 0", "-1"),
        ('compute.gpus_per_worker="all"', "compute.gpus_per_worker", "'auto'", "'all'"),
        ("compute.retries=11", "compute.retries", "less than or equal to 10", "11"),
        ('mteb_tasks.0.name="../x"', "mteb_tasks.0.name", "pattern", "'../x'"),
        ("mteb_tasks=[]", "mteb_tasks", "at least 1", "[]"),
        ("train=5", "train", "dictionary", "5"),
        ("train.seed=true", "train.seed", "integer", "True"),
        ('train.seed="5"', "train.seed", "integer", "'5'"),
        ("train.batch_size=32.0", "train.batch_size", "integer", "32.0"),
        ("train.learning_rate=true", "train.learning_rate", "number", "True"),
        ('train.refit="true"', "train.refit", "boolean", "'true'"),
        ("data.offline=1", "data.offline", "boolean", "1"),
        ("compute.workers=true", "compute.workers", "integer", "True"),
        ("encoder.name=7", "encoder.name", "string", "7"),
        ("encoder.name=", "encoder.name", "at least 1 character", "''"),
        ("data.mirror=", "data.mirror", "at least 1 character", "''"),
        ("mteb_tasks.0.subset=", "mteb_tasks.0.subset", "at least 1 character", "''"),
        ("train.seed=1\nfoo=2", "train.seed", "integer", r"'1\nfoo=2'"),
        ("train.seed=1 # foo", "train.seed", "integer", "'1 # foo'"),
        ("train.seed=1 # foo\n", "train.seed", "integer", r"'1 # foo\n'"),
        ("train.seed=1,", "train.seed", "integer", "'1,'"),
        ("train.seed=1, 2", "train.seed", "integer", "'1, 2'"),
        (
            'evaluate.columns=["head", "head"]',
            "evaluate.columns",
            "'head' occurs more than once",
            "['head', 'head']",
        ),
        ("evaluate.probe_c=[1.0, 1]", "evaluate.probe_c", "1.0 occurs more than once", "[1.0, 1]"),
        ('adapter.target=["a", "a"]', "adapter.target", "'a' occurs more than once", "['a', 'a']"),
        ("compute.cpus_per_worker=1.5", "compute.cpus_per_worker", "a whole number", "1.5"),
        ("compute.cpus_per_worker=0.00001", "compute.cpus_per_worker", "0.0001", "1e-05"),
        ("publish.to=hf:OWNER", "publish.to", "a folder, or hf:OWNER/NAME", "'hf:OWNER'"),
        ("train.warm_start=s3://b/x", "train.warm_start", "a folder, or hf:OWNER/NAME", "'s3://b/x'"),
        (f"mteb_tasks.0.name={'n' * 129}", "mteb_tasks.0.name", "at most 128", f"'{'n' * 129}'"),
        ('adapter.layers="last:99999"', "adapter.layers", "last:K", "'last:99999'"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected_and_found(
    override: str, key: str, expected: str, found: str
) -> None:
    message = fault(override)
    assert message.startswith(f"preset quickstart with --set: {key}: ")
    assert expected in message
    assert message.endswith(f", found {found}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "key", "neighbour"),
    [
        ("train.sed=7", "train.sed", "seed"),
        ("encodr.name=x", "encodr", "encoder"),
        ("mteb_tasks.0.epochs=3", "mteb_tasks.0.epochs", "max_epochs"),
        ("compute.worker=1", "compute.worker", "workers"),
    ],
)
def test_a_misspelt_key_is_named_with_the_keys_that_exist_there(override: str, key: str, neighbour: str) -> None:
    message = fault(override)
    assert f"unknown key {key!r}" in message
    assert neighbour in message.partition("the keys of this section are ")[2].split(", ")


def test_the_likeliest_key_is_named_first_and_a_short_list_as_a_whole() -> None:
    assert "unknown key 'train.sed'; did you mean 'seed'? the keys of this section" in fault("train.sed=7")
    message = fault('mteb_tasks.0.prefixes=["query: "]')
    assert "mteb_tasks.0.prefixes: expected 2 values, found ['query: ']" in message


def test_all_faults_are_in_one_message() -> None:
    lines = fault(
        "train.sed=7", "adapter.rank=0", 'compute.workers="x"', "encoder.max_tokens=1", "mteb_tasks.1.max_epochs=0"
    ).splitlines()
    assert len(lines) == 5
    for key in ("train.sed", "adapter.rank", "compute.workers", "encoder.max_tokens", "mteb_tasks.1.max_epochs"):
        assert sum(key in line for line in lines) == 1


def test_an_override_reaches_a_section_and_a_task_by_name_or_number() -> None:
    config = load_config(
        "quickstart",
        overrides=(
            "train.seed=7",
            "mteb_tasks.RottenTomatoes.max_epochs=9",
            "mteb_tasks.0.max_epochs=4",
            "data.mirror=../some=where",
        ),
    )
    assert config.train.seed == 7
    assert config.data.mirror == "../some=where"
    epochs = {t.name: t.max_epochs for t in config.mteb_tasks}
    assert epochs == {"WordNetDomains": 4, "RottenTomatoes": 9, "WordNetReverseDictionary": 2}


def test_no_task_is_called_like_the_adapter_of_one_side_of_another() -> None:
    tasks = 'mteb_tasks=[{name="Help", train="a.csv"}, {name="Help.query", train="b.csv"}]'
    assert "Help.query, which is also how the adapter of one side of another task is called" in fault(tasks)
    assert load_config("quickstart", overrides=('mteb_tasks=[{name="Help.query", train="b.csv"}]',))


def test_a_slice_is_not_called_like_one_of_ours() -> None:
    tasks = 'mteb_tasks=[{name="Help", train="a.csv", slices=["pair_in_train"]}]'
    assert "pair_in_train is a slice that lorafleet reports by itself" in fault(tasks)


def test_an_override_reaches_a_task_whose_name_holds_a_dot() -> None:
    tasks = 'mteb_tasks=[{name="Banking77Classification"}, {name="Banking77Classification.v2"}]'
    config = load_config("quickstart", overrides=(tasks, "mteb_tasks.Banking77Classification.v2.max_epochs=3"))
    assert [t.max_epochs for t in config.mteb_tasks] == [None, 3]


def numbers(model: type[Any], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Yield the key of each number in the configuration, and whether it is an integer."""
    for name, field in model.model_fields.items():
        kinds = {kind for kind in walk_types(field.annotation) if isinstance(kind, type)}
        (part,) = (
            (kind for kind in kinds if issubclass(kind, Section))
            if any(issubclass(kind, Section) for kind in kinds)
            else (None,)
        )
        key = f"{prefix}mteb_tasks.0" if name == "mteb_tasks" else f"{prefix}{name}"
        if part is not None:
            yield from numbers(part, f"{key}.")
        elif kinds & {int, float}:
            yield key, int in kinds


def walk_types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from walk_types(inner)


NUMBERS = dict(numbers(RunConfig))


def test_the_numbers_of_the_configuration_are_found() -> None:
    assert len(NUMBERS) >= 24
    assert {
        "train.seed",
        "mteb_tasks.0.max_epochs",
        "publish.gate.min_gain",
        "compute.cpus_per_worker",
        "evaluate.probe_c",
    } <= set(NUMBERS)


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", "1e300", "-1e300", str(10**18), str(-(10**18)), "0x" + "f" * 40, "9" * 6000, "true"]
)
def test_every_number_has_sane_bounds(key: str, value: str) -> None:
    message = fault(f"{key}={f'[{value}]' if key == 'evaluate.probe_c' else value}")
    assert key in message or "bits" in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    "override",
    ["train.seed", "=7", "train.=7", "train..seed=7", "mteb_tasks.Nobody.max_epochs=3", "encoder.name.x.y=1"],
)
def test_an_override_that_cannot_be_applied_is_refused(override: str) -> None:
    assert override.partition("=")[0] in fault(override)


def test_remote_code_without_a_revision_is_refused() -> None:
    assert "revision" in fault("encoder.trust_remote_code=true")
    pinned = load_config("quickstart", overrides=("encoder.trust_remote_code=true", "encoder.revision=0123abc"))
    assert pinned.encoder.trust_remote_code


def test_a_refit_after_selection_on_test_is_refused() -> None:
    assert "refit" in fault("train.refit=true", "train.early_stopping_split=test")
    assert load_config("quickstart", overrides=("train.refit=true",)).train.refit


def test_a_main_metric_without_the_probe_is_refused() -> None:
    columns = 'evaluate.columns=["majority", "head"]'
    with pytest.raises(
        ConfigError, match='main_metric = "macro_f1" has no effect without the column "frozen_full_data"'
    ):
        load_config("quickstart", overrides=(columns, "evaluate.main_metric=macro_f1"))
    assert load_config("quickstart", overrides=(columns,)).evaluate.main_metric == "auto"
    assert load_config("quickstart", overrides=("evaluate.main_metric=macro_f1",)).evaluate.main_metric == "macro_f1"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["train.early_stopping_split=test", "train.validation_fraction=0.2"], "train.validation_fraction"),
        (["compute.retries=0", "compute.retry_delay_seconds=1"], "compute.retry_delay_seconds"),
        (["publish.gate.enabled=false", "publish.gate.min_gain=0.1"], "publish.gate.min_gain"),
        (["publish.gate.enabled=false", "publish.gate.allow_label_change=true"], "publish.gate.allow_label_change"),
        (["publish.to=folder", "publish.private=true"], "publish.private"),
        (["publish.to=folder", "publish.token_block=hub"], "publish.token_block"),
        (["train.max_epochs=3"], "train.max_epochs"),
        (['mteb_tasks=[{name="A", train="a", test="b"}]', "data.mirror=m"], "data.mirror"),
    ],
)
def test_a_setting_without_effect_is_refused(overrides: list[str], key: str) -> None:
    assert f"{key} has no effect: " in fault(*overrides)
    assert load_config("quickstart", overrides=tuple(overrides[:-1]))


def test_settings_of_a_later_publication_need_no_target() -> None:
    config = load_config(
        "quickstart", overrides=("publish.private=true", "publish.gate.min_gain=0.1", "publish.license=mit")
    )
    assert publish_config(config, to="hf:me/x", private=False, overrides=()).private


@pytest.mark.parametrize(
    ("to", "private", "overrides", "words"),
    [
        ("hf:OWNER", False, (), "--to: expected a folder, or hf:OWNER/NAME, found 'hf:OWNER'"),
        ("", False, (), "--to: expected a folder"),
        ("x", False, ("publish.to=y",), "--to already names"),
        ("x", False, ("publish.to=",), "--to already names"),
        ("x", True, (), "has no effect on the folder x"),
        ("x", False, ("publish.private=true",), "has no effect on the folder x"),
        ("x", False, ("train.seed=1",), r"only keys of \[publish\]"),
    ],
)
def test_redundant_options_of_a_publication_are_refused(
    to: str, private: bool, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        publish_config(load_config("quickstart"), to=to, private=private, overrides=overrides)


def test_a_key_that_is_set_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--set train\.seed is given more than once"):
        load_config("quickstart", overrides=("train.seed=1", "train.seed = 2"))
    with pytest.raises(ConfigError, match=r"--set publish\.private is given more than once"):
        publish_config(load_config("quickstart"), to="hf:me/x", private=False, overrides=("publish.private=true",) * 2)


def test_a_validation_file_that_selects_no_epoch_is_refused() -> None:
    entry = {"name": "Mine", "train": "a", "validation": "b"}
    with pytest.raises(ConfigError, match=r"validation of Mine has no effect with train\.early_stopping_split"):
        validate_config({"mteb_tasks": [entry], "train": {"early_stopping_split": "test"}}, "here")


def test_a_name_given_twice_is_refused() -> None:
    assert "RottenTomatoes more than once" in fault("mteb_tasks.0.name=RottenTomatoes")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"test": "b"}, "test has an effect only with train"),
        ({"text_column": "body", "group_column": "who"}, "text_column and group_column have an effect only with train"),
        ({"train": "a", "test": "b", "test_seed": 1}, "test_seed has no effect together with test"),
        ({"train": "a", "test": "b", "test_fraction": 0.2}, "test_fraction has no effect together with test"),
        ({"columns": ["a", "b"], "score_column": "c"}, "columns and score_column have an effect only with train"),
        ({"validation": "b"}, "validation has an effect only with train"),
        ({"train": "a", "test": "b", "corpus": "c"}, "corpus, qrels and test, which names the queries, go together"),
        ({"train": "a", "corpus": "c", "qrels": "d"}, "corpus, qrels and test, which names the queries, go together"),
        ({"train": "a", "columns": ["a"]}, "mteb_tasks.0.columns: Tuple should have at least 2 items"),
        ({"train": "a", "columns": ["a", "a"]}, "mteb_tasks.0.columns"),
        ({"train": "a", "slices": ["x" * 129]}, "mteb_tasks.0.slices.0: String should have at most 128 characters"),
        ({"train": "a", "objective": "ranking"}, "mteb_tasks.0.objective: "),
        ({"train": "a", "test_fraction": 0.5}, "mteb_tasks.0.test_fraction: Input should be less than 0.5"),
        ({"train": ""}, "mteb_tasks.0.train: String should have at least 1 character"),
        ({"train": "a", "text_column": ""}, "mteb_tasks.0.text_column: String should have at least 1 character"),
        ({"train": "a\0b"}, "it holds a null character"),
        ({"train": "zip://a.csv::b.zip"}, "expected a path or one URL"),
    ],
)
def test_a_key_of_own_files_that_is_empty_or_has_no_effect_is_refused(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config({"mteb_tasks": [{"name": "Mine", **entry}]}, "here")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "address", ["s3://key:secret@bucket/a.csv", "https://me:secret@host/a.csv", "https://host/a.csv?token=secret"]
)
def test_an_address_with_a_password_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(ConfigError, match="holds a password or a signature") as caught:
        validate_config({"mteb_tasks": [{"name": "Mine", "train": address}]}, "here")
    assert "secret" not in str(caught.value)


def test_paths_become_absolute_and_addresses_are_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, expected in {
        "a/*.csv": str(tmp_path / "a" / "*.csv"),
        "~/a.csv": str(Path.home().resolve() / "a.csv"),
        "~nobody-of-this-name/a.csv": str(tmp_path / "~nobody-of-this-name" / "a.csv"),
        "file:///there/a.csv": "/there/a.csv",
        "s3://bucket/a": "s3://bucket/a",
        "hf://datasets/somebody/a": "hf://datasets/somebody/a",
    }.items():
        config = validate_config({"mteb_tasks": [{"name": "Mine", "train": given}]}, "here")
        assert with_absolute_paths(config).mteb_tasks[0].train == expected
    keys = ("train", "test", "validation", "corpus", "qrels")
    (entry,) = with_absolute_paths(
        validate_config({"mteb_tasks": [{"name": "Mine", **{key: f"{key}.csv" for key in keys}}]}, "here")
    ).mteb_tasks
    assert [getattr(entry, key) for key in keys] == [str(tmp_path / f"{key}.csv") for key in keys]


def test_the_head_column_cannot_be_switched_off() -> None:
    assert "head" in fault('evaluate.columns=["majority"]')


def test_an_unknown_preset_lists_the_existing_ones() -> None:
    message = fault(source="quickstrat")
    assert "'quickstrat'" in message
    assert "quickstart" in message
    assert "mteb8" in message


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[train\n", encoding="utf-8")
    assert str(path) in fault(source=str(path))
    path.write_bytes(b"\xff\xfe")
    assert str(path) in fault(source=str(path))


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes(b'\xef\xbb\xbf[train]\r\nseed = 7\r\n[[mteb_tasks]]\r\nname = "A"\r\n')
    assert load_config(str(path)).train.seed == 7


def test_a_fault_in_the_config_is_an_input_error() -> None:
    assert issubclass(ConfigError, InputError)
