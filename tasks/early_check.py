"""Whether a run has anything to do, found out without Ray: a process of its own checks the inputs as a worker would.

``python -m tasks.early_check`` reads the run's config from standard input and prints the key of each MTEB task, or what is wrong, as JSON.
It dies with the process that started it.
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

from pipeline.config import RunConfig, with_absolute_paths
from pipeline.errors import InputError, LorafleetError
from pipeline.machine import own_output, read_answers
from pipeline.store.finished import finished_runs
from pipeline.store.key import library_versions, sources_sha256
from tasks.children import die_with_parent

_AHEAD: list[EarlyCheck] = []


class EarlyCheck:
    """The check of a run's inputs, under way."""

    def __init__(self, config: RunConfig) -> None:
        """Begin."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tasks.early_check"],  # -P: the working folder may hold a tasks.py of its own
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as config_in:
            config_in.write(with_absolute_paths(config).model_dump_json().encode())
        self._process.stdin = None  # or communicate() would want to close it
        self._timeout_seconds = config.compute.timeout_seconds

    def keys(self) -> Mapping[str, str] | None:
        """MTEB task -> ``task_key``; None if the process ended without an answer, or took longer than a stage may.

        Raises: InputError, LorafleetError: as ``preflight``.
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


def start_check_ahead(config: RunConfig, runs: Path) -> EarlyCheck | None:
    """Begin the check of a run that this process is about to make, where it may have nothing to do: ``early_check`` of it."""
    check = early_check(config, runs)
    if check is not None:
        _AHEAD.append(check)
    return check


def refuse_wrong_files(config: RunConfig) -> None:
    """Check the inputs of a run at once where a file looks wrong, so that nobody waits for Prefect to be told.

    Raises: InputError, LorafleetError: as ``preflight``.
    """
    from pipeline.data.catalogue import files_look_wrong

    if not _is_on_cluster(config) and files_look_wrong(config):
        EarlyCheck(config).keys()


def early_check(config: RunConfig, runs: Path) -> EarlyCheck | None:
    """The check that was started ahead, or a new one; None where it is not worth it.

    It is where the newest run had the same config, code and libraries, so that only the data may have changed. On a cluster the data are
    checked where they are read.
    """
    if _AHEAD:
        return _AHEAD.pop()
    if _is_on_cluster(config) or not _same_as_before(config, runs):
        return None
    return EarlyCheck(config)


def _is_on_cluster(config: RunConfig) -> bool:
    return bool(config.compute.ray_address or os.environ.get("RAY_ADDRESS"))


def _same_as_before(config: RunConfig, runs: Path) -> bool:
    manifest = next((manifest for _, manifest in finished_runs(runs)), None)
    if manifest is None or (manifest.sources_sha256, manifest.versions) != (sources_sha256(), library_versions()):
        return False
    before, now = (c.model_dump(exclude={"compute", "publish"}) for c in (manifest.config, with_absolute_paths(config)))
    if now["encoder"]["revision"] is None:  # then it is resolved by each run
        before["encoder"]["revision"] = None
    return before == now


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
