"""Peak memory of a bulk worker on an input that is larger than its memory limit, as one file and as many.

    python tests/benchmarks/memory.py --adapter runs/<run>#Banking77Classification
    python tests/benchmarks/memory.py --adapter … --gigabytes 0.1    # a smoke test

Each row has a text combined from Banking77's and random bytes that do not compress, so the size on disk is that in
memory. Each case runs in a fresh process with the job's defaults (200,000 rows per unit, so one file is one unit).
Prints the largest resident set of each.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from classify import mixed_texts, plan

ROW_BYTES, GROUP_ROWS = 32_768, 2_000


def main() -> None:
    """Make the inputs, run the cases, print the table."""
    options = _options()
    if options.child:
        print(json.dumps(run(options)))
        return
    rows = round(options.gigabytes * 1e9 / ROW_BYTES)
    print("| Files | Rows | On disk, GB | Peak resident memory, GB | Rows/s |\n|---|---|---|---|---|")
    for files in options.files:
        with tempfile.TemporaryDirectory(prefix="lorafleet-benchmark-") as folder:
            size = make_input(Path(folder) / "in", rows=rows, files=files, mirror=options.mirror)
            command = [
                sys.executable,
                __file__,
                "--child",
                folder,
                "--adapter",
                options.adapter,
                "--threads",
                str(options.threads),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            facts = json.loads(done.stdout.strip().splitlines()[-1])
        assert facts["rows"] == rows
        speed = facts["rows"] / facts["seconds"]
        print(f"| {files} | {rows} | {size / 1e9:.2f} | {facts['peak'] / 1e9:.2f} | {speed:.0f} |", flush=True)


def make_input(folder: Path, *, rows: int, files: int, mirror: str) -> int:
    """Bytes on disk."""
    random = np.random.default_rng(0)
    texts = mixed_texts(mirror, rows, random)
    folder.mkdir()
    for number, part in enumerate(np.array_split(np.arange(rows), files)):
        schema = pa.schema([("id", pa.int64()), ("text", pa.string()), ("payload", pa.binary())])
        with pq.ParquetWriter(
            folder / f"part-{number:03d}.parquet", schema, use_dictionary=False, compression="zstd"
        ) as writer:
            for start in range(0, len(part), GROUP_ROWS):
                ids = part[start : start + GROUP_ROWS]
                payload = [random.bytes(ROW_BYTES) for _ in ids]
                writer.write_table(pa.table([ids, [texts[id] for id in ids], payload], schema=schema))
    return sum(path.stat().st_size for path in folder.iterdir())


def run(options: argparse.Namespace) -> dict[str, float]:
    """Label all units in this process."""
    from pipeline.bulk.worker import UnitWorker

    job = plan(options.child / "in", options.child / "out", [options.adapter])
    worker = UnitWorker(job.worker_spec(threads=options.threads, use_gpu=False))
    receipts = [worker.label(unit) for unit in job.state.todo]
    assert not any(receipt.failure for receipt in receipts), receipts
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return {"rows": sum(r.rows for r in receipts), "seconds": sum(r.seconds for r in receipts), "peak": peak}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--files", type=int, nargs="+", default=[1, 40])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mirror", default="../shared/data/mteb")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
