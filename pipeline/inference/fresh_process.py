"""Questions to a fresh Python process, which sees nothing but the files that it is told of."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from pipeline import errors
from pipeline.errors import LorafleetError, VerificationError
from pipeline.machine import own_output, read_answers


def ask(module: str, request: dict[str, Any], cannot: str) -> dict[str, Any]:
    """Run a module in a fresh process, and return its answer.

    Args:
        module: Module that ends with ``answer_on_stdout``.
        request: JSON values that it reads.
        cannot: Beginning of the message if it fails.
    Raises: LorafleetError: as raised in the process, of the same type; VerificationError if it died.
    """
    with tempfile.TemporaryFile("w+b") as output:
        process = subprocess.run(
            [sys.executable, "-P", "-m", module],
            input=json.dumps(request).encode(),
            stdout=output,
            stderr=subprocess.PIPE,
            check=False,
        )
        if process.returncode != 0:
            lines = process.stderr.decode(errors="replace").strip().splitlines()
            raise VerificationError(f"{cannot}: {lines[-1] if lines else f'exit code {process.returncode}'}")
        output.seek(0)
        (answer,) = read_answers(output) or [{"fault": "VerificationError", "message": "the process gave no answer"}]
    if "fault" in answer:
        kind: type[LorafleetError] = getattr(errors, answer["fault"])
        raise kind(f"{cannot}: {answer['message']}")
    return answer


def answer_on_stdout(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer the request on standard input: the result of a function, or the type and the message of its error."""
    answers = own_output()
    try:
        answered = answer(json.load(sys.stdin.buffer))
    except LorafleetError as error:
        answered = {"fault": type(error).__name__, "message": str(error)}
    print(json.dumps(answered), file=answers, flush=True)
