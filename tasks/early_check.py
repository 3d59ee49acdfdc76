"""Early check of a run's inputs without Ray, to find out whether the run has anything to do.

``python -m tasks.early_check`` reads a config from standard input, checks the inputs as a worker would, and prints the
key of each MTEB task, or an error, as JSON. The process ends with its parent.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, anchored
from pipeline.errors import InputError, LorafleetError
from pipeline.machine import own_output, read_answers
from pipeline.store.finished import finished_runs
from pipeline.store.key import library_versions, sources_sha256
from tasks.children import die_with_parent


class EarlyCheck:
    """A running check of a run's inputs."""

    def __init__(self, config: RunConfig) -> None:
        """Start the process."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tasks.early_check"],  # -P: ignore a tasks.py in the working folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as config_in:
            config_in.write(anchored(config).model_dump_json().encode())
        self._process.stdin = None  # else communicate() would close it again
        self._timeout_seconds = config.compute.timeout_seconds

    def keys(self) -> Mapping[str, str] | None:
        """Wait for the result.

        Returns:
            MTEB task -> ``task_key``; None if the process died, or exceeded ``compute.timeout_seconds``.
        Raises:
            InputError, LorafleetError: as ``preflight``.
        """
        try:
            out, _ = self._process.communicate(timeout=self._timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, _ = self._process.communicate()
        answer = next(iter(read_answers(out.splitlines())), {})
        if "error" in answer:
            raise (InputError if answer["user_fault"] else LorafleetError)(*answer["error"])
        return answer.get("keys")


def refuse_wrong_files(config: RunConfig) -> None:
    """Check the inputs before Prefect is started, if a data file looks wrong.

    Raises:
        InputError, LorafleetError: as ``preflight``.
    """
    from pipeline.data.catalogue import files_look_wrong

    if not _is_on_cluster(config) and files_look_wrong(config):
        EarlyCheck(config).keys()


def early_check(config: RunConfig, runs: Path) -> EarlyCheck | None:
    """Start an early check, if it may save the start of Ray.

    That is the case if the newest run had the same config, code and libraries, so that only the data can differ. On a
    cluster the workers check the data, because they read it.

    Returns:
        The running check, or None if it is not worthwhile.
    """
    if _is_on_cluster(config) or not _is_like_newest_run(config, runs):
        return None
    return EarlyCheck(config)


def _is_on_cluster(config: RunConfig) -> bool:
    return bool(config.compute.ray_address or os.environ.get("RAY_ADDRESS"))


def _is_like_newest_run(config: RunConfig, runs: Path) -> bool:
    manifest = next((manifest for _, manifest in finished_runs(runs)), None)
    if manifest is None or (manifest.sources_sha256, manifest.versions) != (sources_sha256(), library_versions()):
        return False
    previous, current = (c.model_dump(exclude={"compute", "publish"}) for c in (manifest.config, anchored(config)))
    if current["encoder"]["revision"] is None:  # each run resolves it anew
        previous["encoder"]["revision"] = None
    return previous == current


def _answer(config: RunConfig) -> dict[str, Any]:
    from pipeline.encoder.runtime import choose_runtime
    from pipeline.run.preflight import preflight

    try:
        runtime = choose_runtime(config.train, threads=1, use_gpu=config.compute.gpus_per_worker != 0)
        return {"keys": {planned.mteb_task.name: planned.key for planned in preflight(config, runtime).tasks}}
    except LorafleetError as error:
        return {"error": error.args, "user_fault": isinstance(error, InputError)}


if __name__ == "__main__":
    die_with_parent(signal.SIGKILL)
    answers = own_output()
    print(json.dumps(_answer(RunConfig.model_validate_json(sys.stdin.buffer.read()))), file=answers, flush=True)
