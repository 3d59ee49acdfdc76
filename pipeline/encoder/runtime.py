"""Choice of device, number format and kernels for an encoder on this machine."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Literal

import torch

from pipeline.config import TrainConfig
from pipeline.encoder import attention
from pipeline.records import Runtime


def choose_runtime(
    train: TrainConfig, *, threads: int, use_gpu: bool, kernels: Literal["lorafleet", "torch"] | None = None
) -> Runtime:
    """Choose how this run computes, from the hardware's features and the config. Nothing is timed.

    bfloat16 is chosen if the hardware multiplies it natively and faster than float32. On a CPU, attention is
    ``pipeline/encoder/attention.py``. For short texts it is faster than the fused kernel and transformers' eager one,
    and gives the same bits in every run.
    """
    kernels = kernels or ("torch" if train.compile else "lorafleet")
    if use_gpu and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        device, implementation, processor = "cuda", "sdpa", torch.cuda.get_device_name()
    else:
        native, processor = _cpu_bfloat16()
        device, implementation = "cpu", attention.NAME if kernels == "lorafleet" else "eager"
    dtype = ("bfloat16" if native else "float32") if train.precision == "auto" else train.precision
    return Runtime.model_validate(
        {
            "device": device,
            "dtype": dtype,
            "attention": implementation,
            "compiled": train.compile,
            "kernels": kernels,
            "threads": threads,
            "processor": processor,
        }
    )


def exact_runtime(*, threads: int, use_gpu: bool, kernels: Literal["lorafleet", "torch"] = "lorafleet") -> Runtime:
    """Runtime in float32, to decide close calls of bfloat16 and to compare two machines."""
    return choose_runtime(TrainConfig(precision="float32"), threads=threads, use_gpu=use_gpu, kernels=kernels)


def _cpu_bfloat16() -> tuple[bool, str]:
    """Whether this CPU multiplies bfloat16 natively and faster, and the name of its widest instruction set.

    On Intel the AVX-512 instructions take twice as long as float32, so only matrix tiles (AMX) count:
    tests/benchmarks/EXPERIMENTS.md, "bfloat16 on Intel without AMX".
    """
    if platform.machine() in ("aarch64", "arm64"):
        flags = set(_cpuinfo("Features"))
        return "bf16" in flags, "arm-bf16" if "bf16" in flags else "arm"
    flags = set(_cpuinfo("flags"))
    if "amx_bf16" in flags:
        return True, "amx-bf16"
    if "avx512_bf16" in flags:
        return _cpuinfo("vendor_id") != ["GenuineIntel"], "avx512-bf16"
    return False, torch.backends.cpu.get_cpu_capability().lower()


def _cpuinfo(field: str) -> list[str]:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    line = re.search(rf"^{field}\s*:(.*)$", text, flags=re.MULTILINE)
    return line.group(1).split() if line else []
