"""The plan of a bulk job: input, adapters, encoder and output are checked before the first unit."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pydantic import SecretStr

from pipeline.adapter.description import FoundAdapter
from pipeline.bulk.columns import column_parts
from pipeline.bulk.limits import measure_limits
from pipeline.bulk.records import SMALL_ROWS, BulkAdapter, BulkJob, BulkOptions, BulkRequest
from pipeline.bulk.state import JobState, begin, with_limits
from pipeline.bulk.worker import WorkerSpec
from pipeline.bulk_input.units import BulkInput, plan_input
from pipeline.errors import AdapterError, InputError, first_line
from pipeline.hub_address import is_on_hub
from pipeline.inference.encoder_of_adapter import find_encoder_of
from pipeline.inference.reference import NAME, common_prefix, find_adapters, threshold_for
from pipeline.machine import local_cpus
from pipeline.parquet.footers import start_ahead
from pipeline.printable import concealed
from pipeline.storage.listing import written_folder
from pipeline.storage.place import Place, check_address, store_errors


@dataclass(frozen=True)
class BulkPlan:
    """A bulk job that is ready to start."""

    request: BulkRequest
    adapters: Sequence[FoundAdapter]
    source: BulkInput
    job: BulkJob
    output: Place
    state: JobState

    @property
    def rows_todo(self) -> int:
        """Number of rows without output."""
        return sum(unit.num_rows for unit in self.state.todo)

    @property
    def in_process(self) -> bool:
        """Whether the units run in this process rather than on Ray."""
        where = self.request.compute.where
        small = self.rows_todo <= SMALL_ROWS and self.request.compute.ray_address is None
        return where == "process" or (where == "auto" and small)

    def worker_spec(self, *, threads: int, use_gpu: bool) -> WorkerSpec:
        """Return the instructions for a worker on any machine. Their paths are absolute."""
        encoder = self.request.encoder
        return WorkerSpec(
            job=self.job,
            refs=tuple(_ref_for_worker(*pair) for pair in zip(self.request.adapters, self.adapters, strict=True)),
            output=self.state.folder.url(""),
            encoder=str(Path(encoder).resolve()) if encoder is not None and Path(encoder).is_dir() else encoder,
            threads=threads,
            use_gpu=use_gpu,
            offline=self.request.offline,
            kept_schema=b64encode(self.source.schema.serialize()).decode(),
            int96_unit=self.source.int96_unit,
            secrets={shown: SecretStr(real) for shown, real in concealed().items()},
        )


def plan_bulk(request: BulkRequest) -> BulkPlan:
    """Check all that can be checked before the first unit, and resume or start the job.

    The first start of a job with int8 vectors also loads the encoder and measures their limits.

    Raises: InputError: the input, an adapter, the encoder or the output folder cannot be used.
    """
    for address in (request.source, request.output):
        check_address(address)
    output = Place(request.output)
    start_ahead()
    try:
        check_places(request.source, output)
    except store_errors(ValueError, NotImplementedError) as error:
        raise InputError(
            f"input {request.source}, or output {output}: cannot be reached: {first_line(error)}"
        ) from None
    adapters = _find_adapters(request)
    options = _with_width(request.options, adapters)
    common_prefix(adapters)
    find_encoder_of(adapters[0], request.encoder, offline=request.offline)
    source = plan_input(
        request.source,
        text_column=options.text_column,
        columns=options.columns,
        new_columns=new_columns([adapter.name for adapter in adapters], options),
        rows_per_unit=options.rows_per_unit,
        limit=options.limit,
    )
    job = describe_job(adapters, source, options)
    try:
        state = begin(output, job, source, overwrite=request.overwrite)
    except store_errors() as error:
        raise InputError(f"output {output}: cannot be read: {first_line(error)}") from None
    if (
        options.vectors is not None
        and options.vectors.dtype == "int8"
        and state.job.limits.keys() != {adapter.name for adapter in adapters}
    ):
        state = with_limits(state, _measured(request, adapters, source, job))
    return BulkPlan(request, adapters, source, state.job, output, state)


def _find_adapters(request: BulkRequest) -> tuple[FoundAdapter, ...]:
    """Find the adapters of a request.

    Raises: InputError: an adapter is missing or damaged, cannot classify or has too few labels, or its name cannot be
        passed on.
    """
    adapters = find_adapters(request.adapters, offline=request.offline)
    for ref, adapter in zip(request.adapters, adapters, strict=True):
        if request.options.labels:
            adapter.check_has_head()
        if not NAME.fullmatch(adapter.name):  # a worker receives NAME=REF
            raise AdapterError(
                f"adapter {ref}: its name {adapter.name!r} holds one of = / # @ :; name it: --adapter NAME={ref}"
            )
    if not request.options.labels:
        return tuple(adapters)
    most, top_k = max(len(adapter.label_names) for adapter in adapters), request.options.top_k
    if top_k > most:
        raise InputError(f"--top-k {top_k}: there are only {most} labels; choose a smaller number")
    return tuple(adapters)


def _with_width(options: BulkOptions, adapters: Sequence[FoundAdapter]) -> BulkOptions:
    """Return the options with the width of the vectors, which is the encoder's if none was chosen.

    Raises: InputError: the encoder's vectors are not as wide, or do not fill whole bytes.
    """
    if options.vectors is None:
        return options
    widest, chosen = adapters[0].meta.hidden_size, options.vectors.width
    if chosen is not None and chosen > widest:
        raise InputError(f"--width {chosen}: the vectors of adapter {adapters[0].name} have {widest} dimensions")
    if chosen is None and options.vectors.dtype == "binary" and widest % 8:
        raise InputError(
            f"--dtype binary packs 8 dimensions into a byte, and the vectors of adapter {adapters[0].name} have "
            f"{widest}; choose a multiple of 8 with --width"
        )
    return options.model_copy(update={"vectors": options.vectors.changed(width=chosen or widest)})


def _measured(
    request: BulkRequest, adapters: Sequence[FoundAdapter], source: BulkInput, job: BulkJob
) -> dict[str, float]:
    cpus = request.compute.cpus
    return measure_limits(
        adapters,
        source,
        job,
        encoder=request.encoder,
        threads=local_cpus() if cpus == "auto" else max(1, int(cpus)),
        use_gpu=request.compute.gpus != 0,
        offline=request.offline,
    )


def _ref_for_worker(ref: str, adapter: FoundAdapter) -> str:
    """Return a reference that any machine understands: each fetches an adapter on the Hub by itself."""
    if is_on_hub(ref.rpartition("=")[2]):
        return ref
    root = adapter.folder.root.resolve()
    # Of a path with "#" in it, only what is behind the last one names a task.
    return f"{adapter.name}={f'{root.parent}#{root.name}.{adapter.side}' if adapter.side else root}"


def describe_job(adapters: Sequence[FoundAdapter], source: BulkInput, options: BulkOptions) -> BulkJob:
    """Fix the identity of a job: its files, adapters, thresholds and options.

    Raises: InputError: an adapter's coverage table does not reach the target accuracy.
    """

    def threshold(adapter: FoundAdapter) -> float | None:
        return options.min_score if options.target_accuracy is None else threshold_for(adapter, options.target_accuracy)

    described = tuple(
        BulkAdapter(
            name=adapter.name,
            sha256=adapter.sha256,
            described_sha256=adapter.described_sha256,
            encoder_revision=adapter.encoder.revision or "",
            labels_sha256=adapter.labels_sha256,
            threshold=threshold(adapter),
            prefix=adapter.prefix,
        )
        for adapter in adapters
    )
    return BulkJob(lorafleet_version=version("lorafleet"), files=source.files, adapters=described, options=options)


def new_columns(names: Sequence[str], options: BulkOptions) -> tuple[str, ...]:
    """Return the names of the columns that the output adds to those of the input."""
    return (*(f"{name}_{part}" for name in names for part in column_parts(options)), "truncated")


def check_places(source: str, output: Place) -> None:
    """Check that input and output do not contain each other.

    Raises: InputError: the output is in the input, or holds it, or is a file.
    """
    given, folder = Place(source), written_folder(source)
    if not given.fs.isfile(given.root) and folder.holds(output):
        raise InputError(
            f"output {output} is inside the input {folder}: the next job would read it too; choose a folder elsewhere"
        )
    if output.holds(given):
        raise InputError(
            f"input {source} is inside the output {output}, which --overwrite replaces; choose a folder elsewhere"
        )
    if output.local and Path(output.root).exists() and not Path(output.root).is_dir():
        raise InputError(f"output {output} is a file; name a folder")
