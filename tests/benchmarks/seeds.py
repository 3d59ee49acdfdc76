"""The result table of pipeline/evaluation/README.md: means over the runs of a store that differ only in their seed.

    for seed in 0 1 2; do
        lorafleet train --config minilm6 --set data.mirror=DIR --set train.seed=$seed --runs RUNS
    done
    python tests/benchmarks/seeds.py RUNS

Prints Markdown with accuracies on test in per cent. The spread over seeds follows the mean of the head.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from pipeline.errors import LorafleetError
from pipeline.history.tables import read_history
from pipeline.records import ScoreRow

COLUMNS = ("frozen_few_shot", "adapted_few_shot", "frozen_full_data", "head")
SIGNIFICANT = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The result table of pipeline/evaluation/README.md.")
    parser.add_argument("runs", type=Path, help="a run store with one run for each seed")
    runs = parser.parse_args(arguments).runs
    try:
        history = read_history(runs)
    except LorafleetError as error:
        parser.error(str(error))
    if not history:
        parser.error(f"{runs}: there is no finished run in it; expected a run store with one run for each seed")
    rows: dict[str, dict[str, list[ScoreRow]]] = defaultdict(lambda: defaultdict(list))
    for row in history:
        rows[row.mteb_task][row.column].append(row)
    seeds = sorted({row.seed for row in history})
    for task, columns in rows.items():
        for column in COLUMNS:
            found = sorted(row.seed for row in columns[column])
            if found != seeds:
                parser.error(
                    f"{runs}: {task}, {column}: expected one row for each seed of {seeds}, found those of {found}"
                )
    print(
        f"{len(seeds)} seeds: {', '.join(map(str, seeds))}; "
        "head against probe: seeds in which it is above / within noise / below\n"
    )
    print(
        "| MTEB task | Frozen, few-shot | LoRA, few-shot | Gain | Frozen, full-data probe | LoRA, own head "
        "| Head against probe |"
    )
    print("|---|---|---|---|---|---|---|")
    means = {task: [fmean(row.accuracy for row in columns[c]) for c in COLUMNS] for task, columns in rows.items()}
    for task, columns in rows.items():
        print(line(task, means[task], verdicts(columns), spread(columns["head"])))
    print(line("Mean", [fmean(column) for column in zip(*means.values(), strict=True)], "", ""))


def line(name: str, means: Sequence[float], verdict: str, spread_of_head: str) -> str:
    frozen, adapted, probe, head = (100 * mean for mean in means)
    numbers = f"{frozen:.1f} | {adapted:.1f} | {adapted - frozen:+.1f} | {probe:.1f} | {head:.1f} {spread_of_head}"
    return f"| {name} | {numbers} | {verdict} |"


def spread(heads: Sequence[ScoreRow]) -> str:
    accuracies = [100 * row.accuracy for row in heads]
    return f"({min(accuracies):.1f}–{max(accuracies):.1f})"


def verdicts(columns: dict[str, list[ScoreRow]]) -> str:
    probe_of = {row.run_id: row for row in columns["frozen_full_data"]}
    above = within = below = 0
    for row in columns["head"]:
        metric, p_value = (
            (row.main_metric, row.p_value_main_holm) if row.main_metric else ("accuracy", row.p_value_holm)
        )
        if p_value is None or p_value >= SIGNIFICANT:
            within += 1
        elif getattr(row, metric) > getattr(probe_of[row.run_id], metric):
            above += 1
        else:
            below += 1
    return f"{above} / {within} / {below}"


if __name__ == "__main__":
    main()
