"""Prefect automation that reports failed runs through a notification block."""

from __future__ import annotations

from prefect.automations import AutomationCore, EventTrigger, Posture, SendNotification
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound

from pipeline.errors import InputError

AUTOMATION = "lorafleet: a run failed"
_SUBJECT = "lorafleet: {{ flow.name }} {{ flow_run.state.name | lower }}"
_BODY = (
    "{{ flow.name }} / {{ flow_run.name }}: {{ flow_run.state.name }}: {{ flow_run.state.message }}\n"
    "%s/runs/flow-run/{{ flow_run.id }}"
)


def notify_of_failures(client: SyncPrefectClient, block: str, *, tag: str, ui: str) -> None:
    """Create the automation, or update it if it exists.

    Args:
        client: Client of the Prefect server.
        block: ``TYPE/NAME`` of a notification block document, such as ``slack-webhook/team``.
        tag: Tag of the flow runs to report.
        ui: Address of the Prefect UI, for the link.
    Raises:
        InputError: the block does not exist, or cannot notify.
    """
    block_type, _, name = block.partition("/")
    try:
        document = client.read_block_document_by_name(name, block_type)
    except ObjectNotFound:
        raise InputError(
            f"--notify {block}: the Prefect server has no such block document; expected TYPE/NAME of an existing one, "
            "such as slack-webhook/team"
        ) from None
    if document.block_schema is None or "notify" not in document.block_schema.capabilities:
        raise InputError(
            f"--notify {block}: a block of this type cannot notify; "
            "choose a notification block, such as slack-webhook/team"
        )
    automation = AutomationCore(
        name=AUTOMATION,
        description=f"Notifies {block}; created by lorafleet deploy --notify.",
        trigger=EventTrigger(
            expect={f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[SendNotification(block_document_id=document.id, subject=_SUBJECT, body=_BODY % ui)],
    )
    if existing := client.read_automations_by_name(AUTOMATION):
        client.update_automation(existing[0].id, automation)
    else:
        client.create_automation(automation)
