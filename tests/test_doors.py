"""Rules checked on the syntax tree: one module per outside library, no pickle, no remote code, no local paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("flows", "tasks", "pipeline") for path in (ROOT / package).rglob("*.py"))
PROGRAMS = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
TEXTS = sorted(path for ending in ("*.toml", "*.j2", "*.yaml", "*.yml") for path in (ROOT / "pipeline").rglob(ending))
DOORS = {
    "peft": {"pipeline/adapter/peft_form.py"},
    "mteb": {
        "pipeline/data/mteb_tasks.py",
        "pipeline/evaluation/mteb_runs.py",
        "pipeline/pairs/filled_tasks.py",
        "pipeline/run/outputs.py",
    },
    "prefect": {
        *("flows/classify_datasets.py", "flows/compare_arms.py"),
        *("flows/publish_adapters.py", "flows/search_settings.py", "flows/train_adapters.py"),
        *("flows/deploying.py", "flows/deployment_file.py", "tasks/services/notifying.py"),  # schedules
        *(
            "tasks/bulk.py",
            "tasks/cancelling.py",
            "tasks/compare_stages.py",
            "tasks/search_stages.py",
            "tasks/log.py",
            "tasks/progress.py",
            "tasks/publish_stage.py",
            "tasks/stages.py",
        ),
    },
    "ray": {"tasks/bulk.py", "tasks/fleet.py", "tasks/fleet_worker.py", "tasks/ray_start.py"},
    "deltalake": {"pipeline/parquet/table_formats.py"},
    "pyiceberg": {"pipeline/parquet/table_formats.py"},
}
# Where text leaves the process: each makes it printable, so nothing else may.
WAYS_OUT = {
    "terminal": {"flows/terminal.py", "tasks/live_table.py"},  # the table makes its lines printable itself
    "machine": {  # JSON, for the process that has started them
        "pipeline/parquet/footer_process.py",
        "pipeline/inference/fresh_process.py",
        "tasks/early_check.py",
        "tasks/checks/trial.py",
    },
    "log": {"tasks/log.py"},
}
RUNS_CODE = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
MACHINE_PATH = re.compile(r"(?:^|[\s\"'=(])(?:/(?:home|Users|root|tmp|work|mnt|opt|var|usr|data)/|[A-Z]:\\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of all imports, those inside functions and by ``import_module`` too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name.split(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.split(".")[0]
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(n)), *_],
            ):
                yield n.split(".")[0]


def uses_of(library: str) -> set[str]:
    return {name_of(path) for path in SOURCES if library in imported(ast.parse(path.read_text(encoding="utf-8")))}


def loads_without_promise(tree: ast.AST) -> Iterator[int]:
    """Lines with a ``torch.load`` that does not say ``weights_only=True``, or a ``load`` that allows pickle."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            said = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if (of_torch and said.get("weights_only") is not True) or said.get("allow_pickle"):
                yield node.lineno


def trusts_strangers(tree: ast.AST) -> Iterator[int]:
    """Lines that say ``trust_remote_code = True``, as an argument, a default, an assignment or a key."""
    for node in ast.walk(tree):
        match node:
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                yield node.value.lineno
            case ast.AnnAssign(target=ast.Name(id="trust_remote_code"), value=ast.Constant(value=True)):
                yield node.lineno
            case ast.Dict(keys=keys, values=values):
                pairs = zip(keys, values, strict=True)
                yield from (
                    v.lineno
                    for k, v in pairs
                    if isinstance(k, ast.Constant)
                    and k.value == "trust_remote_code"
                    and isinstance(v, ast.Constant)
                    and v.value is True
                )


def prints(tree: ast.AST) -> Iterator[int]:
    """Lines that write to a standard stream: ``print``, ``click.echo``, a rich ``Console``, or the stream itself."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="print" | "Console")) | ast.Call(func=ast.Attribute(attr="echo" | "secho")):
                yield node.lineno
            case ast.Attribute(
                value=ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr"), attr="write" | "buffer"
            ):
                yield node.lineno
            case ast.Call(args=[*_, ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr")]):
                yield node.lineno


def logs_a_made_line(tree: ast.AST) -> Iterator[int]:
    """Lines that log a text made of values, rather than a format and the values: only values are made printable."""
    place = {"debug": 0, "info": 0, "warning": 0, "error": 0, "exception": 0, "critical": 0, "log": 1}
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=logger, attr=attr), args=args) if (
                attr in place and "log" in ast.unparse(logger).lower()
            ):
                if len(args) > place[attr] and not isinstance(args[place[attr]], ast.Constant):
                    yield node.lineno


def names_a_machine(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and MACHINE_PATH.search(node.value):
            yield node.lineno


def found(check: Callable[[ast.AST], Iterator[int]], paths: list[Path]) -> list[str]:
    return [f"{name_of(path)}:{line}" for path in paths for line in check(ast.parse(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_one_door(library: str) -> None:
    uses = uses_of(library)
    assert uses <= DOORS[library]
    assert uses, f"nothing uses {library}: is the door still where this test thinks it is?"


def test_the_driver_of_a_run_imports_nothing_that_computes() -> None:
    """They take seconds of a start, and the workers import them meanwhile."""
    program = (
        "import sys, flows.train_adapters; "
        "print(sorted({'torch', 'transformers', 'mteb', 'sklearn', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_imports_one_that_runs_code_when_it_reads_data() -> None:
    assert {name: uses_of(name) for name in RUNS_CODE} == {name: set() for name in RUNS_CODE}


def test_torch_load_always_reads_weights_only() -> None:
    assert found(loads_without_promise, PROGRAMS) == []


def test_nothing_trusts_remote_code_by_itself() -> None:
    assert found(trusts_strangers, SOURCES) == []


def test_only_the_ways_out_write_to_a_standard_stream() -> None:
    out = {line.partition(":")[0] for line in found(prints, SOURCES)}
    assert out == WAYS_OUT["terminal"] | WAYS_OUT["machine"]


def test_only_our_own_logger_is_prefects() -> None:
    users = {name_of(path) for path in SOURCES if "get_run_logger" in path.read_text(encoding="utf-8")}
    assert users == WAYS_OUT["log"]


def test_what_is_logged_is_a_format_and_values() -> None:
    assert {line.partition(":")[0] for line in found(logs_a_made_line, SOURCES)} == WAYS_OUT[
        "log"
    ]  # which hands a format on


def test_no_source_names_a_path_of_somebodys_machine() -> None:
    assert found(names_a_machine, SOURCES) == []
    assert [name_of(path) for path in TEXTS if MACHINE_PATH.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("check", "program"),
    [
        (loads_without_promise, "torch.load(path)"),
        (loads_without_promise, "torch.load(path, weights_only=False)"),
        (loads_without_promise, "np.load(path, allow_pickle=True)"),
        (trusts_strangers, "load(name, trust_remote_code=True)"),
        (trusts_strangers, "options = {'trust_remote_code': True}"),
        (trusts_strangers, "class Config:\n    trust_remote_code: bool = True"),
        (prints, "print('a')"),
        (prints, "click.echo(label)"),
        (prints, "rich.console; Console().print(label)"),
        (prints, "sys.stdout.write(label)"),
        (prints, "json.dump(facts, sys.stdout)"),
        (logs_a_made_line, "logger.info(f'{label}')"),
        (logs_a_made_line, "run_logger().error(message)"),
        (names_a_machine, "path = '/home/anna/data'"),
        (names_a_machine, "path = f'cp /work/x {y}'"),
    ],
)
def test_the_checks_see_what_they_look_for(check: Callable[[ast.AST], Iterator[int]], program: str) -> None:
    assert list(check(ast.parse(program)))


def test_imports_are_seen_wherever_they_hide() -> None:
    program = "def f():\n    import peft.tuners\n    from mteb import get_task\n    importlib.import_module('pickle')"
    assert set(imported(ast.parse(program))) == {"peft", "mteb", "pickle"}
