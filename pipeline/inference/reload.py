"""Verification of a saved adapter in a fresh process, which sees nothing but its files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.description import describe_adapter
from pipeline.adapter.files import check_both_forms, load_adapter
from pipeline.adapter.peft_form import check_peft
from pipeline.config import EncoderConfig
from pipeline.encoder.encoder import Encoder, FloatArray
from pipeline.encoder.files import find_encoder
from pipeline.encoder.runtime import exact_runtime
from pipeline.errors import AdapterError, VerificationError
from pipeline.inference.fresh_process import answer_on_stdout, ask
from pipeline.records import ReferenceOutputs, Runtime
from pipeline.store.files import write_atomically
from pipeline.store.run_folder import TaskFolder

TOLERANCE = 1e-4
"""Largest difference of an output before saving and after loading. On the same machine it is 0."""

REFERENCE_TOLERANCE = 1e-3
"""Largest difference of an output between two machines, both in float32."""


@dataclass(frozen=True)
class ReloadResult:
    """Outputs of an adapter in the fresh process."""

    outputs: FloatArray
    """``Adapter.outputs`` for the texts, float32 (texts, outputs)."""
    effect: float
    """Largest absolute change of a text vector by the adapter."""
    label_names: tuple[str, ...]

    def check(
        self, name: str, *, outputs: FloatArray, label_names: Sequence[str], tolerance: float, is_trained: bool
    ) -> float:
        """Compare with the trained adapter.

        Args:
            name: Name of the adapter in messages.
            outputs: Outputs of the trained adapter, float32 (texts, outputs).
            label_names: Label names of the trained adapter.
            tolerance: Largest allowed difference of an output.
            is_trained: Whether the weights are those of an epoch. Only a start may have no effect on the encoder.
        Returns: Largest difference of an output.
        Raises: VerificationError: label names or outputs differ, or a trained adapter has no effect.
        """
        if self.label_names != tuple(label_names):
            raise VerificationError(f"{name}: label names differ after reloading")
        if not (self.effect > 0 or (self.effect == 0 and not is_trained)):
            raise VerificationError(f"{name}: the reloaded adapter has no effect on the encoder")
        same_shape = self.outputs.shape == outputs.shape
        difference = float(np.abs(self.outputs - outputs).max()) if same_shape else float("inf")
        if not difference <= tolerance:
            raise VerificationError(
                f"{name}: {'logits' if label_names else 'vectors'} differ by {difference:.3g} after reloading "
                f"(allowed: {tolerance:g})"
            )
        return difference


@dataclass(frozen=True)
class ReloadRequest:
    """A request to a fresh process to compute an adapter's outputs for some texts."""

    folder: TaskFolder
    runtime: Runtime
    texts: Sequence[str]


def check_reload(
    adapter: Adapter, folder: TaskFolder, texts: Sequence[str], *, is_trained: bool, offline: bool
) -> None:
    """Load the saved adapter in a fresh process, compare it with the one in memory, and write its reference outputs.

    The reference outputs are the float32 outputs for ``REFERENCE_TEXTS``. With them, any machine can verify a copy of
    the files.

    Args:
        adapter: The adapter in memory.
        folder: Folder with the saved adapter.
        texts: Texts to compare on.
        is_trained: Whether the weights are those of an epoch, as in ``ReloadResult.check``.
        offline: Send no request to the Hub.
    Raises: VerificationError: outputs or label names differ, a trained adapter has no effect, or it cannot be loaded.
    """
    encoder = adapter.encoder
    expected = adapter.outputs(encoder.embed(encoder.tokenise(texts)))
    config = encoder.config.changed(revision=encoder.config.revision or _hub_commit(encoder))
    exact = exact_runtime(threads=encoder.runtime.threads, use_gpu=encoder.device.type == "cuda")
    requests = [ReloadRequest(folder, encoder.runtime, texts), ReloadRequest(folder, exact, REFERENCE_TEXTS)]
    try:
        reloaded, reference = reload_elsewhere(requests, config, offline=offline)
    except AdapterError as error:  # not a user's fault: this process has just written the files
        raise VerificationError(str(error)) from None
    reloaded.check(
        folder.name, outputs=expected, label_names=adapter.label_names, tolerance=TOLERANCE, is_trained=is_trained
    )
    record = ReferenceOutputs(
        texts=REFERENCE_TEXTS, logits=tuple(map(tuple, reference.outputs.tolist())), tolerance=REFERENCE_TOLERANCE
    )
    write_atomically(folder.probe, record.model_dump_json(indent=1))


def reload_elsewhere(requests: Sequence[ReloadRequest], encoder: EncoderConfig, *, offline: bool) -> list[ReloadResult]:
    """Compute outputs of saved adapters in a fresh process.

    Args:
        requests: Adapters and texts.
        encoder: Config of the encoder of all adapters.
        offline: Send no request to the Hub.
    Returns: One result per request.
    Raises: LorafleetError: an adapter cannot be loaded. The type is that of the error in the fresh process.
    """
    requested = [
        {"folder": str(r.folder.root), "runtime": r.runtime.model_dump(), "texts": list(r.texts)} for r in requests
    ]
    names = ", ".join(dict.fromkeys(request.folder.name for request in requests))
    cannot = f"{names}: the saved adapter cannot be loaded in a fresh process"
    request = {"requests": requested, "encoder": encoder.model_dump(), "offline": offline}
    answer = ask("pipeline.inference.reload", request, cannot)
    return [
        ReloadResult(np.array(a["outputs"], dtype=np.float32), a["effect"], tuple(a["label_names"]))
        for a in answer["answers"]
    ]


def _hub_commit(encoder: Encoder) -> str | None:
    local = encoder.config.name.startswith("package:") or Path(encoder.config.name).is_dir()
    return None if local else encoder.ref.revision


def _answers(request: dict[str, Any]) -> dict[str, Any]:
    return {"answers": list(_each_answer(request))}


def _each_answer(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    config = EncoderConfig.model_validate(request["encoder"])
    files = find_encoder(config, offline=request["offline"])
    encoders: dict[Runtime, Encoder] = {}
    for item in request["requests"]:
        runtime = Runtime.model_validate(item["runtime"])
        torch.set_num_threads(runtime.threads)
        if runtime not in encoders:
            encoders[runtime] = Encoder(files, config, runtime)
        yield _answer(encoders[runtime], TaskFolder(Path(item["folder"])), item["texts"])


def _answer(encoder: Encoder, folder: TaskFolder, texts: list[str]) -> dict[str, Any]:
    tokens = encoder.tokenise(texts)
    frozen = encoder.embed(tokens)
    found = describe_adapter(folder)
    adapter = load_adapter(folder, encoder, found=found)
    check_both_forms(adapter, folder)
    adapted = encoder.embed(tokens)
    outputs = adapter.outputs(adapted)
    adapter.detach()  # for the next request
    if encoder.runtime.dtype == "float32":  # users of PEFT load it in float32
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
    "Thank you so much, this solved a problem that had kept three of us busy since the beginning of the month, "
    "and it took ten minutes.",
    "It is neither as bad as its critics say nor as good as its makers hope, and for long stretches it is both at "
    "once: slow where it should be quick, loud where it should be still, and then, without warning, so exact about a "
    "small disappointment that one forgives it the rest and waits for the next such moment, which comes late, "
    "but comes.",
)
"""Texts of many kinds and lengths for the reference outputs, so that no user's text has to be published."""


if __name__ == "__main__":
    answer_on_stdout(_answers)
