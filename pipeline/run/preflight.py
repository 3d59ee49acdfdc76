"""Checks before the first worker starts. They also pin the revisions that the run depends on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.adapter.description import describe_adapter
from pipeline.adapter.targets import projection_paths
from pipeline.config import RunConfig
from pipeline.data.catalogue import plan_tasks
from pipeline.data.dataset import TaskData
from pipeline.data.families import check_widths
from pipeline.encoder.files import EncoderFiles, find_encoder
from pipeline.encoder.loading import empty_model, load_tokenizer
from pipeline.encoder.tokeniser import Tokeniser
from pipeline.errors import AdapterError, ConfigError, DataError, InputError
from pipeline.inference.reference import find_task_folder
from pipeline.pairs.data import PairData
from pipeline.pairs.reading import read_task
from pipeline.printable import shortened
from pipeline.records import AdapterRef, EncoderRef, MtebTask, Runtime
from pipeline.run.plan import Plan, PlannedTask
from pipeline.store.key import library_versions, task_key
from pipeline.store.run_folder import adapter_sha256


def preflight(config: RunConfig, runtime: Runtime) -> Plan:
    """Read every data set, load the encoder's tokenizer and structure, and resolve the adapter's target.

    Args:
        config: Config of the run. Relative paths are relative to this process's working folder.
        runtime: Runtime of the workers.
    Raises: InputError: a check failed. The error has one line per fault.
    """
    mteb_tasks = plan_tasks(config)  # reports an unknown name before anything is downloaded
    mirror = config.data.mirror
    uses_mirror = any(mteb_task.source == "mirror" for mteb_task in mteb_tasks)
    if mirror is not None and uses_mirror and not Path(mirror).is_dir():
        raise DataError(
            f"data.mirror: there is no folder {mirror}; "
            "expected a folder that contains a folder with train.parquet for each MTEB task"
        )
    files = find_encoder(config.encoder, offline=config.data.offline)
    tokeniser = Tokeniser(load_tokenizer(files.folder, config.encoder), max_tokens=config.encoder.max_tokens)
    model = empty_model(files, config.encoder)
    paths = projection_paths(model, config.adapter, model_type=model.config.model_type)  # type: ignore[union-attr,arg-type]
    check_widths(config.train.widths, hidden_size=int(model.config.hidden_size))  # type: ignore[union-attr,arg-type]
    pinned = _pin(config, files)
    tasks: list[PlannedTask] = []
    faults: list[str] = []
    for mteb_task in mteb_tasks:
        try:
            _check_prefixes(mteb_task, tokeniser, config.encoder.max_tokens)
            tasks.append(_check_task(pinned, mteb_task, files.ref, runtime, paths))
        except InputError as error:
            faults.extend(error.args)
    if faults:
        raise DataError(*faults)
    tasks.sort(key=lambda t: -t.num_train * t.mteb_task.max_epochs)
    return Plan(pinned, files.ref, tuple(paths), runtime, tuple(tasks))


def _check_prefixes(mteb_task: MtebTask, tokeniser: Tokeniser, max_tokens: int) -> None:
    """Raises: ConfigError: a prefix leaves no room for a text."""
    for prefix in mteb_task.prefixes or ():
        num_tokens = int(tokeniser([prefix]).lengths[0])
        if num_tokens >= max_tokens:
            raise ConfigError(
                f"{mteb_task.name}: the prefix {shortened(prefix)!r} fills all {max_tokens} tokens of "
                "encoder.max_tokens, so nothing of a text is left; shorten it, or raise encoder.max_tokens"
            )


def _check_task(
    config: RunConfig, mteb_task: MtebTask, encoder: EncoderRef, runtime: Runtime, paths: Sequence[str]
) -> PlannedTask:
    data = read_task(mteb_task, config=config.train, offline=config.data.offline)
    key = task_key(
        config,
        mteb_task=data.task,
        fingerprint=data.fingerprint,
        encoder=encoder,
        runtime=runtime,
        versions=library_versions(),
    )
    start = _find_warm_start(config, mteb_task, encoder, paths)
    notes = (*data.notes, f"trained from scratch: {start}") if isinstance(start, str) else data.notes
    warm_start = start if isinstance(start, AdapterRef) else None
    if isinstance(data, PairData):
        sizes = len(data.train), len(data.validation)
    else:
        sizes = len(data.train_texts), len(data.validation_texts)
    labels = data.label_names if isinstance(data, TaskData) else ()
    return PlannedTask(data.task, data.fingerprint, key, *sizes, labels, warm_start, notes)


def _find_warm_start(
    config: RunConfig, mteb_task: MtebTask, encoder: EncoderRef, paths: Sequence[str]
) -> AdapterRef | str | None:
    """The adapter to start from, or the reason why it is impossible. None if the config requests no warm start."""
    if config.train.warm_start is None:
        return None
    ref = f"{config.train.warm_start}#{mteb_task.name}"
    try:
        folder = find_task_folder(ref, offline=config.data.offline)
        adapter, *_ = (describe_adapter(part) for part in folder.adapters)
    except AdapterError as error:
        return f"nothing to start from: {error}"
    expected = {
        "rank": config.adapter.rank,
        "alpha": config.adapter.alpha,
        "adapted_modules": tuple(paths),
        "pooling": config.encoder.pooling,
    }
    other = [what for what, value in expected.items() if getattr(adapter.meta, what) != value]
    if folder.has_sides != (mteb_task.sides is not None):
        other.append("number of adapters")
    if adapter.encoder.revision != encoder.revision:
        other.append("encoder revision")
    if other:
        return f"{ref} has another {' and another '.join(other)}"
    return AdapterRef(path=ref, sha256=adapter_sha256(folder.root), encoder_revision=encoder.revision)


def _pin(config: RunConfig, files: EncoderFiles) -> RunConfig:
    """Copy of the config with the commit of the encoder on the Hub."""
    if Path(config.encoder.name).is_dir() or config.encoder.name.startswith("package:"):
        return config
    return config.model_copy(update={"encoder": config.encoder.model_copy(update={"revision": files.ref.revision})})
