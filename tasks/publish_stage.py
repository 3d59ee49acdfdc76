"""Prefect task that publishes a finished run, and the check of its target before the training."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.blocks.system import Secret
from prefect.cache_policies import NO_CACHE

from pipeline.config import PublishConfig
from pipeline.errors import InputError, LorafleetError
from pipeline.store.run_folder import RunFolder
from tasks.log import run_logger
from tasks.progress import create_link_artifact, create_table_artifact

if TYPE_CHECKING:
    from pipeline.publishing.publish import PublishResult


@task(name="publish", task_run_name="publish", cache_policy=NO_CACHE)
def publish(folder: RunFolder, config: PublishConfig, *, trust_remote_code: bool) -> PublishResult | LorafleetError:
    """Gate, stage, verify and publish a finished run.

    Args:
        folder: Run folder.
        config: Target and gate.
        trust_remote_code: Whether to run the Python code that comes with the encoder.
    Returns:
        The result, or the error: Prefect would log a raised error with a traceback.
    """
    from pipeline.publishing.publish import publish as publish_run

    logger = run_logger()
    try:
        with _hub_token(config.token_block):
            published = publish_run(folder.root, config, trust_remote_code=trust_remote_code)
    except LorafleetError as error:
        logger.error("not published: %s", error)
        return error
    rows = [
        decision.model_dump(mode="json", exclude={"run_id", "to", "created_at"}) for decision in published.decisions
    ]
    create_table_artifact(
        table=rows, key="gate", description=f"Promotion gate of run {folder.root.name}, to {config.to}"
    )
    for decision in published.decisions:
        level = logging.ERROR if decision.decision == "block" else logging.INFO
        logger.log(level, "%s: %s: %s", decision.mteb_task, decision.decision, decision.reason)
    logger.info(
        "published %d adapters to %s%s",
        len(published.verified),
        config.to,
        f"@{published.revision}" * bool(published.revision),
    )
    create_link_artifact(published.url, key="published", link_text=f"published by run {folder.root.name}")
    return published


def check_target(config: PublishConfig) -> None:
    """Check before a training whether publishing to a repository can succeed. Does nothing for other targets.

    Raises:
        InputError, LorafleetError: as ``HubRepository.check_access``.
    """
    if config.to is not None and config.to.startswith("hf:"):
        from pipeline.publishing.hub import HubRepository

        with _hub_token(config.token_block):
            HubRepository(config.to.removeprefix("hf:")).check_access()


@contextmanager
def _hub_token(block: str | None) -> Iterator[None]:
    """While open, provide huggingface_hub with the token in a Prefect Secret block.

    Raises:
        InputError: the block does not exist.
    """
    if block is None:
        yield
        return
    try:
        secret: Any = Secret.load(block)
    except ValueError:
        raise InputError(
            f"publish.token_block: there is no Prefect Secret block {block!r}; create it, or set HF_TOKEN"
        ) from None
    previous = os.environ.get("HF_TOKEN")
    os.environ["HF_TOKEN"] = secret.get()
    try:
        yield
    finally:
        os.environ.pop("HF_TOKEN")
        if previous is not None:
            os.environ["HF_TOKEN"] = previous
