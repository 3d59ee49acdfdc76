"""The files of a comparison besides those of its arms."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w

import pipeline
from pipeline.compare.files import ArmFolder, ArmResult, ComparisonFolder, ComparisonManifest, read_arrays
from pipeline.compare.plan import ArmSpec, ComparisonPlan, folder_of_arm
from pipeline.compare.report.page import write_page
from pipeline.compare.report.pair_errors import PairErrors, WrongPair
from pipeline.compare.scores import ArmDifference, ArmValue, Scores, main_metric, score_arms
from pipeline.compare.statistics import Series
from pipeline.pairs.data import PairData
from pipeline.pairs.reading import read_task
from pipeline.records import Failure, Record
from pipeline.store.files import write_atomically
from pipeline.store.key import library_versions
from pipeline.store.lock import oldest_first


def find_arm(store: Path, spec: ArmSpec) -> tuple[ArmFolder, ArmResult] | str | None:
    """A finished arm with the same key in any comparison of the store, newest first.

    Returns: Its folder and result; what is wrong with the newest one that has changed on disk; or None.
    """
    damaged = None
    name = folder_of_arm(spec.arm)
    for run_id in reversed(oldest_first({path.parent.parent.name for path in store.glob(f"*/{name}/arm.json")})):
        folder = ArmFolder(store / run_id / name)
        found = folder.read(spec.key)
        if isinstance(found, ArmResult):
            return folder, found
        if "changed" in found:
            damaged = damaged or f"{run_id}/{name}: {found}"
    return damaged


def reuse_arm(source: ArmFolder, result: ArmResult, target: ArmFolder, *, run_id: str) -> ArmResult:
    """Take a finished arm over into another comparison. Its files are linked, or copied to another file system."""
    if source.root == target.root:
        return result
    partial = target.root.with_name(f".{target.root.name}.copying")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source.root, partial, copy_function=_link)
    taken = result.changed(run_id=run_id, reused_from=result.reused_from or result.run_id)
    (partial / target.result.name).unlink()  # a link: writing to it would change the source
    write_atomically(partial / target.result.name, taken.model_dump_json(indent=1))
    shutil.rmtree(target.root, ignore_errors=True)
    partial.replace(target.root)
    return taken


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def collect_arms(
    plan: ComparisonPlan, results: Sequence[ArmResult], failures: Sequence[Failure], *, folder: ComparisonFolder
) -> Scores:
    """Score the finished arms on test, and write tables, JSON and page."""
    config = plan.config
    data = read_task(plan.mteb_task, config=config.train, offline=config.data.offline)
    series = [
        Series(result.arm, one.seed, read_arrays(folder.arm(result.arm).measured(one.seed)))
        for result in results
        for one in result.seeds
    ]
    scores = score_arms(data, series, config=config.evaluate, seed=config.compare.seeds[0])
    errors = PairErrors(data, series) if isinstance(data, PairData) and data.kind == "labels" else None
    tables: dict[str, list[dict[str, Any]]] = {
        "values": [_row(value) for value in scores.values],
        "differences": [_row(difference) for difference in scores.differences],
        "trials": [{"arm": r.arm, **_row(trial)} for r in results for trial in r.trials],
        "seeds": [{"arm": r.arm, **_row(one)} for r in results for one in r.seeds],
        "costs": [{"arm": r.arm, **costs(r)} for r in results],
        "forgetting": [{"arm": r.arm, **_row(one)} for r in results for one in r.forgetting],
        "errors": [] if errors is None else [_row(count) for count in errors.counts()],
        "wrong_pairs": [] if errors is None else [_flat(pair) for pair in errors.pairs()],
    }
    for name, rows in tables.items():
        if rows:
            path = folder.table(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".writing")
            pq.write_table(pa.Table.from_pylist(rows), temporary)
            temporary.replace(path)
    summary = {
        "task": plan.mteb_task.name,
        "main_metric": main_metric(data),
        "selected_on": config.train.early_stopping_split
        if any(r.selection_metric is not None for r in results)
        else "last_epoch",
        "seeds": list(config.compare.seeds),
        "arms": _nested(scores.values, results),
        "differences": _differences(scores.differences, results),
        "parts": _parts(scores.values),
        "trials": {r.arm: [trial.model_dump() for trial in r.trials] for r in results if r.trials},
        "costs": {r.arm: costs(r) for r in results},
        "forgetting": {
            r.arm: {one.mteb_task: one.model_dump(exclude={"mteb_task"}) for one in r.forgetting} for r in results
        },
        "notes": list(scores.notes),
        "failures": [failure.model_dump() for failure in failures],
    }
    write_atomically(folder.results, json.dumps(summary, indent=1, ensure_ascii=False))
    write_atomically(folder.config, tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    write_page(folder.page, summary, data=data, series=series, errors=errors, method=config.compare.map)
    return scores


def finish_comparison(
    plan: ComparisonPlan,
    results: Sequence[ArmResult],
    failures: Sequence[Failure],
    *,
    folder: ComparisonFolder,
    seconds: float,
) -> None:
    """Write the manifest, which marks the comparison as finished."""
    manifest = ComparisonManifest(
        run_id=folder.root.name,
        created_at=datetime.now(UTC),
        config=plan.config,
        encoder=plan.encoder,
        runtime=plan.runtime,
        mteb_task=plan.mteb_task,
        arms={result.arm: result.key for result in results},
        reused={result.arm: result.reused_from for result in results if result.reused_from},
        failures=tuple(failures),
        versions=library_versions(),
        lorafleet_version=pipeline.__version__,
        seconds=seconds,
    )
    write_atomically(folder.manifest, manifest.model_dump_json(indent=1))


def costs(result: ArmResult) -> dict[str, Any]:
    """What an arm costs, as one row."""
    return {
        "parameters": result.num_parameters,
        "head_parameters": result.num_head_parameters,
        "bytes_per_task": result.bytes_per_task,
        "train_seconds": result.train_seconds,
        "seconds_per_training": sum(one.train_seconds for one in result.seeds) / len(result.seeds),
        "peak_memory_bytes": result.peak_memory_bytes,
        "texts_per_second_merged": result.speed.merged,
        "texts_per_second_unmerged": result.speed.unmerged,
    }


def _row(record: Record) -> dict[str, Any]:
    return record.model_dump(mode="json")


def _flat(pair: WrongPair) -> dict[str, Any]:
    """A row with a column for each slice and each arm."""
    row = _row(pair)
    slices = {f"slice_{column}": value for column, value in row.pop("slices").items()}
    cosines = {f"similarity_{arm}": value for arm, value in row.pop("similarity").items()}
    return row | slices | cosines


def _interval(value: ArmValue) -> dict[str, Any]:
    return value.model_dump(include={"value", "low", "high", "num_items", "by_seed", "optimistic"}, mode="json")


def _nested(values: Sequence[ArmValue], results: Sequence[ArmResult]) -> dict[str, Any]:
    return {r.arm: {v.metric: _interval(v) for v in values if v.arm == r.arm and v.slice is None} for r in results}


def _parts(values: Sequence[ArmValue]) -> dict[str, Any]:
    """Column -> value -> arm -> metric, for parts of test."""
    found: dict[str, Any] = {}
    for value in values:
        if value.slice is not None:
            of_part = found.setdefault(value.slice, {}).setdefault(value.slice_value, {})
            of_part.setdefault(value.arm, {})[value.metric] = _interval(value)
    return found


def _differences(differences: Sequence[ArmDifference], results: Sequence[ArmResult]) -> dict[str, Any]:
    """Arm -> arm that is subtracted -> metric, on all of test."""

    def of(arm: str) -> Iterator[tuple[str, ArmDifference]]:
        return ((d.over, d) for d in differences if d.arm == arm and d.slice is None)

    found: dict[str, Any] = {}
    for result in results:
        for over, difference in of(result.arm):
            row = difference.model_dump(mode="json", exclude={"arm", "over", "metric", "slice", "slice_value"})
            found.setdefault(result.arm, {}).setdefault(over, {})[difference.metric] = row
    return found
