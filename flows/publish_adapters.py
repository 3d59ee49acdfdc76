"""Flow that publishes a finished run, as `lorafleet publish` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from pipeline.config import publish_config
from pipeline.errors import LorafleetError
from pipeline.printable import counted, printable
from pipeline.publishing.publication import read_candidate
from tasks import publish_stage


@flow(name="publish-adapters")
def publish_adapters(
    run: str, to: str, private: bool = False, overrides: list[str] | None = None, trust_remote_code: bool = False
) -> State[Any]:
    """Publish the adapters of a finished run that pass the promotion gate. A blocked adapter fails the flow run.

    Args:
        run: Run folder.
        to: A folder, or hf:OWNER/NAME.
        private: Make the repository private if it does not exist yet.
        overrides: Keys of the run's [publish] to override, each as KEY=VALUE, such as publish.gate.min_gain=0.002.
        trust_remote_code: Run the Python code that the run's encoder needs.
    """
    try:
        candidate = read_candidate(Path(run))
        config = publish_config(candidate.manifest.config, to=to, private=private, overrides=tuple(overrides or ()))
    except LorafleetError as error:
        return Failed(message=f"not published: {error}")
    published = publish_stage.publish(candidate.folder, config, trust_remote_code=trust_remote_code)
    if isinstance(published, LorafleetError):
        return Failed(message=f"not published: {published}")
    blocked = ", ".join(f"{decision.mteb_task} (gate: {decision.reason})" for decision in published.blocked)
    if blocked:
        return Failed(message=printable(f"blocked: {blocked}"))
    return Completed(message=f"{counted(len(published.verified), 'adapter')} published")
