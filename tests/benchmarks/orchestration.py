"""Cost of the orchestration: wall time of ``lorafleet train`` against the busy time of its workers.

    python tests/benchmarks/orchestration.py                             # the quickstart
    python tests/benchmarks/orchestration.py --set train.max_epochs=1 --set mteb_tasks.0.max_epochs=1

Runs the command in its own process with a fresh run store, so that nothing is reused, and reads ``busy_seconds`` of
every ``result.json``. Prints the wall time and the limit, 1.15 x (sum of busy seconds / parallelism) + 25 s. The
parallelism is the number of MTEB tasks or of cores, whichever is smaller. The exit code is 1 if the limit is exceeded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FACTOR, FIXED_SECONDS = 1.15, 25.0


def main() -> None:
    """Run the command, then compare."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="lorafleet-benchmark-") as store:
        wall, folder = run_lorafleet(options.config, options.overrides, store)
        busy = busy_seconds(folder)
    parallelism = min(len(busy), len(os.sched_getaffinity(0)))
    bar = FACTOR * sum(busy.values()) / parallelism + FIXED_SECONDS
    print("\n".join(report(busy, wall=wall, bar=bar, parallelism=parallelism)))
    if options.json:
        facts = {"wall_seconds": wall, "bar_seconds": bar, "parallelism": parallelism, "busy_seconds": busy}
        options.json.write_text(json.dumps(facts, indent=1))
    sys.exit(0 if wall <= bar else 1)


def run_lorafleet(config: str, overrides: list[str], store: str) -> tuple[float, Path]:
    """Wall seconds of the whole command, and the run folder that its last line names."""
    command = [str(Path(sys.executable).with_name("lorafleet")), "train", "--config", config, "--runs", store]
    for override in overrides:
        command += ["--set", override]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    wall = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}; its messages are above")
    print(done.stdout, file=sys.stderr)
    return wall, Path(done.stdout.strip().splitlines()[-1].removeprefix("run: "))


def busy_seconds(run: Path) -> dict[str, float]:
    """MTEB task -> seconds its worker worked."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("*/result.json"))]
    reused = [result["mteb_task"]["name"] for result in results if result["reused_from"]]
    assert results, f"{run}: no result.json in it"
    assert not reused, f"{run}: {reused} were reused, though the store was fresh"
    return {result["mteb_task"]["name"]: result["busy_seconds"] for result in results}


def report(busy: dict[str, float], *, wall: float, bar: float, parallelism: int) -> list[str]:
    """The lines of the Markdown report."""
    return [
        "| MTEB task | Busy, s |",
        "|---|---|",
        *(f"| {name} | {seconds:.1f} |" for name, seconds in busy.items()),
        f"| sum / {parallelism} | {sum(busy.values()) / parallelism:.1f} |",
        "",
        f"Wall time {wall:.1f} s, {'within' if wall <= bar else 'over'} the bar of {bar:.1f} s "
        f"= {FACTOR} x {sum(busy.values()) / parallelism:.1f} s + {FIXED_SECONDS:.0f} s.",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="quickstart", help="preset or TOML file")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
