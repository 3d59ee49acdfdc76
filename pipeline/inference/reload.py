"""A saved adapter, loaded in a fresh process: what it then says is what anybody will get from its files."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import errors
from pipeline.adapter.adapter import Adapter
from pipeline.adapter.description import describe_adapter
from pipeline.adapter.files import check_both_forms, load_adapter
from pipeline.adapter.peft_form import check_peft
from pipeline.config import EncoderConfig
from pipeline.encoder.encoder import Encoder, FloatArray
from pipeline.encoder.files import find_encoder
from pipeline.encoder.runtime import exact_runtime
from pipeline.errors import AdapterError, LorafleetError, VerificationError
from pipeline.machine import own_output, read_answers
from pipeline.records import ReferenceOutputs, Runtime
from pipeline.store.files import write_atomically
from pipeline.store.run_folder import TaskFolder

TOLERANCE = 1e-4
"""Largest difference between a logit before saving and after loading; the same machine gives 0."""
REFERENCE_TOLERANCE = 1e-3
"""The same between two machines, both in float32."""


@dataclass(frozen=True)
class ReloadResult:
    """What the fresh process saw."""

    outputs: FloatArray
    """``Adapter.outputs`` of the texts, float32 (texts, outputs)."""
    effect: float
    """Largest absolute difference that the adapter makes to a text vector."""
    label_names: tuple[str, ...]

    def check(
        self, name: str, *, outputs: FloatArray, label_names: Sequence[str], tolerance: float, is_trained: bool
    ) -> float:
        """Compare with what was trained; returns the largest difference between two outputs.

        Args:
            is_trained: The adapter is that of an epoch. Only one that is still its start may be without effect on the encoder.
        Raises: VerificationError: label names or logits differ, or a trained adapter has no effect.
        """
        if self.label_names != tuple(label_names):
            raise VerificationError(f"{name}: label names after reloading are not those trained with")
        if not (self.effect > 0 or (self.effect == 0 and not is_trained)):
            raise VerificationError(f"{name}: the reloaded adapter has no effect on the encoder")
        same_shape = self.outputs.shape == outputs.shape
        difference = float(np.abs(self.outputs - outputs).max()) if same_shape else float("inf")
        if not difference <= tolerance:
            raise VerificationError(
                f"{name}: {'logits' if label_names else 'vectors'} differ by {difference:.3g} after reloading (allowed: {tolerance:g})"
            )
        return difference


@dataclass(frozen=True)
class ReloadRequest:
    """What a fresh process is asked: what an adapter says of some texts."""

    folder: TaskFolder
    runtime: Runtime
    texts: Sequence[str]


def check_reload(
    adapter: Adapter, folder: TaskFolder, texts: Sequence[str], *, is_trained: bool, offline: bool
) -> None:
    """Load the saved adapter in a fresh process and compare it with the one in memory; then leave the probe beside it.

    The probe is what later proves, on any machine, that a copy of these files is this adapter: its float32 logits for texts of our own.

    Args:
        is_trained: As ``ReloadResult.check`` takes it.
    Raises: VerificationError: logits or label names differ, a trained adapter has no effect, or it cannot be loaded.
    """
    encoder = adapter.encoder
    expected = adapter.outputs(encoder.embed(encoder.tokenise(texts)))
    config = encoder.config.changed(revision=encoder.config.revision or _hub_commit(encoder))
    exact = exact_runtime(threads=encoder.runtime.threads, use_gpu=encoder.device.type == "cuda")
    asks = [ReloadRequest(folder, encoder.runtime, texts), ReloadRequest(folder, exact, REFERENCE_TEXTS)]
    try:
        found, probed = reload_elsewhere(asks, config, offline=offline)
    except AdapterError as error:  # the files are not a user's but ours, of a moment ago
        raise VerificationError(str(error)) from None
    found.check(
        folder.root.name, outputs=expected, label_names=adapter.label_names, tolerance=TOLERANCE, is_trained=is_trained
    )
    probe = ReferenceOutputs(
        texts=REFERENCE_TEXTS, logits=tuple(map(tuple, probed.outputs.tolist())), tolerance=REFERENCE_TOLERANCE
    )
    write_atomically(folder.probe, probe.model_dump_json(indent=1))


def reload_elsewhere(asks: Sequence[ReloadRequest], encoder: EncoderConfig, *, offline: bool) -> list[ReloadResult]:
    """What a fresh process says.

    Raises: LorafleetError: what kept it from loading an adapter, of the kind that it would be in this process.
    """
    request = {
        "asks": [
            {"folder": str(ask.folder.root), "runtime": ask.runtime.model_dump(), "texts": list(ask.texts)}
            for ask in asks
        ],
        "encoder": encoder.model_dump(),
        "offline": offline,
    }
    with tempfile.TemporaryFile("w+b") as answer:
        process = subprocess.run(
            [sys.executable, "-P", "-m", "pipeline.inference.reload"],
            input=json.dumps(request).encode(),
            stdout=answer,
            stderr=subprocess.PIPE,
            check=False,
        )
        names = ", ".join(dict.fromkeys(ask.folder.root.name for ask in asks))
        cannot = f"{names}: the saved adapter cannot be loaded in a fresh process"
        if process.returncode != 0:
            reason = process.stderr.decode(errors="replace").strip().splitlines()[-1:] or [
                f"exit code {process.returncode}"
            ]
            raise VerificationError(f"{cannot}: {reason[0]}")
        answer.seek(0)
        (said,) = read_answers(answer) or [{"fault": "VerificationError", "message": "it gives no answer"}]
    if "fault" in said:
        kind: type[LorafleetError] = getattr(errors, said["fault"])
        raise kind(f"{cannot}: {said['message']}")
    return [
        ReloadResult(np.array(a["outputs"], dtype=np.float32), a["effect"], tuple(a["label_names"]))
        for a in said["answers"]
    ]


def _hub_commit(encoder: Encoder) -> str | None:
    local = encoder.config.name.startswith("package:") or Path(encoder.config.name).is_dir()
    return None if local else encoder.ref.revision


def _say(request: dict[str, Any]) -> dict[str, Any]:
    """The answers, or the kind and the words of the error that there is in their place."""
    try:
        return {"answers": list(_answers(request))}
    except LorafleetError as error:
        return {"fault": type(error).__name__, "message": str(error)}


def _answers(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    config = EncoderConfig.model_validate(request["encoder"])
    files = find_encoder(config, offline=request["offline"])
    encoders: dict[Runtime, Encoder] = {}
    for ask in request["asks"]:
        runtime = Runtime.model_validate(ask["runtime"])
        torch.set_num_threads(runtime.threads)
        if runtime not in encoders:
            encoders[runtime] = Encoder(files, config, runtime)
        yield _answer(encoders[runtime], TaskFolder(Path(ask["folder"])), ask["texts"])


def _answer(encoder: Encoder, folder: TaskFolder, texts: list[str]) -> dict[str, Any]:
    tokens = encoder.tokenise(texts)
    frozen = encoder.embed(tokens)
    found = describe_adapter(folder)
    adapter = load_adapter(folder, encoder, found=found)
    check_both_forms(adapter, folder)
    adapted = encoder.embed(tokens)
    outputs = adapter.outputs(adapted)
    adapter.detach()  # the next one finds the encoder as it was
    if encoder.runtime.dtype == "float32":  # as others load it
        check_peft(adapter, found, tokens, outputs=outputs, tolerance=REFERENCE_TOLERANCE)
    return {
        "outputs": outputs.tolist(),
        "effect": float(np.abs(adapted - frozen).max()),
        "label_names": list(adapter.label_names),
    }


REFERENCE_TEXTS = (
    "The card I ordered last week has still not arrived.",
    "Why was I charged twice for the same transfer?",
    "Set an alarm for half past six tomorrow morning, please.",
    "What will the weather be like in Lisbon this weekend?",
    "I laughed until the credits rolled; the second half is a small miracle.",
    "Two hours of my life that nobody will give back.",
    "If the battery had lasted a day longer I would have kept it.",
    "good",
    "NOT GOOD AT ALL!!!",
    "The committee adopted the resolution by eleven votes to four.",
    "A freshwater fish with a long snout, found in slow rivers.",
    "To heat a liquid until it turns into vapour.",
    "My flight was cancelled and the desk closed before anyone helped us.",
    "Play something quiet by a pianist I have not heard yet.",
    "Remind my sister about dinner on Friday at eight.",
    "How do I reset the passcode on my old phone?",
    "They won 3-1, but the score flatters them.",
    "Shares fell 4.2 % after the quarterly report.",
    "¿Dónde está la estación más cercana?",
    "Das Paket kam beschädigt an, und niemand antwortet.",
    "Le service était lent mais souriant.",
    "今日は雨が降っています。",
    "😀👍 best day ever",
    "http://example.org/path?query=1#fragment",
    "x",
    "42",
    "…",
    "An instrument for measuring the pressure of the atmosphere",
    "Could you turn down the lights in the kitchen and then lock the front door before you start the washing machine?",
    "You people never listen, do you?",
    "Thank you so much, this solved a problem that had kept three of us busy since the beginning of the month, and it took ten minutes.",
    "It is neither as bad as its critics say nor as good as its makers hope, and for long stretches it is both at once: slow where it "
    "should be quick, loud where it should be still, and then, without warning, so exact about a small disappointment that one forgives "
    "it the rest and waits for the next such moment, which comes late, but comes.",
)
"""Ours, of many kinds and lengths, so that no user's text has to be published to verify an adapter."""


if __name__ == "__main__":
    answers = own_output()
    print(json.dumps(_say(json.load(sys.stdin.buffer))), file=answers, flush=True)
