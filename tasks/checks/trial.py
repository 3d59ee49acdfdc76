"""Trials of ``lorafleet doctor`` in a separate process, because a broken library may end the process that imports it.

``python -m tasks.checks.trial STEP...`` performs the steps in order, and prints the outcome of each as one line of
JSON. A step is the name of a module to import, ``@compute``, ``@gpu`` or ``@ray=ADDRESS``. Without an address, a local
Ray is started and stopped.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any

from pipeline.errors import LorafleetError, first_line
from pipeline.machine import own_output


def try_out(steps: Sequence[str], answers: IO[str]) -> None:
    """Perform the steps.

    Args:
        steps: Steps, as in the module's docstring.
        answers: Receives one JSON object per step, with its ``facts`` or its ``error``.
    """
    for step in steps:
        answer: dict[str, Any] = {"step": step}
        try:
            answer["facts"] = _do(step)
        except BaseException as error:  # noqa: BLE001 - some modules end the interpreter when they are imported
            text = first_line(error)
            answer["error"] = (
                text if isinstance(error, LorafleetError) else f"{type(error).__name__}: {text}{_origin(step)}"
            )
        print(json.dumps(answer), file=answers, flush=True)


def _do(step: str) -> dict[str, Any]:
    if step == "@compute":
        return _compute()
    if step == "@gpu":
        return _gpu()
    if step.startswith("@ray="):
        return _ray(step.removeprefix("@ray="))
    importlib.import_module(step)
    return {}


def _compute() -> dict[str, Any]:
    """Runtime that training chooses on this machine by default."""
    from pipeline.config import TrainConfig
    from pipeline.encoder.runtime import choose_runtime

    return choose_runtime(TrainConfig(), threads=1, use_gpu=True).model_dump()


def _gpu() -> dict[str, Any]:
    """GPUs that torch sees, after using each once; or the reason why it sees none."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
    if not available:
        return facts | {
            "said": "; ".join(first_line(warning.message) for warning in caught if isinstance(warning.message, Warning))
        }
    for index in range(torch.cuda.device_count()):
        torch.zeros(1, device=f"cuda:{index}").add_(1).item()  # a build without code for this GPU fails only now
        free, total = torch.cuda.mem_get_info(index)
        facts["gpus"].append({"name": torch.cuda.get_device_name(index), "free": free, "total": total})
    return facts


def _ray(address: str) -> dict[str, Any]:
    """Join a cluster or start a local Ray, exactly as a run does, and report its capacity."""
    from pipeline.config import ComputeConfig
    from tasks.fleet import Fleet

    with Fleet(ComputeConfig(ray_address=address or None), num_tasks=1) as fleet:
        fleet.ready()
        return {
            "workers": fleet.num_workers,
            "cpus_per_worker": fleet.cpus_per_worker,
            "gpus_per_worker": fleet.gpus_per_worker,
        }


def _origin(step: str) -> str:
    """Location of a module for messages, because another module of that name may be first on the path."""
    if step.startswith("@"):
        return ""
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(step)
        if spec is not None and spec.origin is not None:
            return f" (in {spec.origin})"
    return ""


if __name__ == "__main__":
    try_out(sys.argv[1:], own_output())
