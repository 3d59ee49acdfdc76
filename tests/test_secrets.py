"""Passwords and signatures in addresses: used to read files, but never written, printed or sent elsewhere."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import parse_qs, urlsplit

import pyarrow.parquet as pq
import pytest
from bulk import save_bulk_adapter
from commands import SCRIPT, Ended, bulk_rows, run, write_bulk_input
from prefect_server import Api

from flows.deployment_file import read_deployments
from pipeline.bulk.records import BulkRequest
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.printable import reveal

Folders = Callable[[str], Path]
PASSWORD, SIGNATURES = "hunter2-of-nobody", ("first+signature/of=nobody", "second-signature-of-nobody")


class Store(ThreadingHTTPServer):
    """Parquet behind a name and a password, or behind a signature, as object stores sign their addresses."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Signed)
        self.folder = folder
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name: str, *, signature: str | None = None) -> str:
        """With the password, unless it is signed."""
        if signature is None:
            return f"http://anna:{PASSWORD}@127.0.0.1:{self.server_port}/{name}"
        return f"http://127.0.0.1:{self.server_port}/{name}?X-Amz-Expires=900&X-Amz-Signature={signature}"


class _Signed(BaseHTTPRequestHandler):
    server: Store

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, *, with_content: bool) -> None:
        self.server.asked.append(self.path)
        asked = urlsplit(self.path)
        login = base64.b64encode(f"anna:{PASSWORD}".encode()).decode()
        signature = parse_qs(asked.query.replace("+", "%2B")).get("X-Amz-Signature", [""])[0]
        file = self.server.folder / asked.path.strip("/")
        if self.headers.get("Authorization") != f"Basic {login}" and signature not in SIGNATURES:
            self.send_error(403)
            return
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        first, last = 0, len(content) - 1
        if wanted := self.headers.get("Range"):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(last - first + 1))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if with_content:
            self.wfile.write(content[first : last + 1])

    def log_message(self, *_: object) -> None:
        """Not into the tests' output."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(write_bulk_input(tmp_path / "there", num_files=1, rows=60, group=20))
    yield store
    store.shutdown()
    store.server_close()


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A folder for Ray's files, with a path that is short enough for its sockets."""
    with TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def classify(encoder_folder: Folders, prefect_api: str, ray_folder: Path, tmp_path: Path) -> Callable[..., Ended]:
    adapter = save_bulk_adapter(tmp_path / "topics", encoder_folder("bert"))

    def start(source: str, output: str, *options: str) -> Ended:
        options = (
            "--adapter",
            str(adapter),
            "--encoder",
            str(encoder_folder("bert")),
            "--rows-per-unit",
            "20",
            "--cpus",
            "1",
            *options,
        )
        environment = {"PREFECT_API_URL": prefect_api, "RAY_TMPDIR": str(ray_folder)}
        return run("classify", source, output, *options, cwd=tmp_path, program=SCRIPT, **environment)

    return start


def files_with(secret: str, *folders: Path) -> list[str]:
    """Every file in which the secret, or the part of it that no encoding changes, is found."""
    words = (secret.encode(), max(secret.replace("/", "+").replace("=", "+").split("+"), key=len).encode())
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(word in path.read_bytes() for word in words)]


@pytest.mark.parametrize(
    "where", ["process", pytest.param("ray", marks=[pytest.mark.faults, pytest.mark.timeout(300)])]
)
@pytest.mark.parametrize("kind", ["password", "signature"])
def test_a_job_reads_with_the_secret_and_leaves_it_nowhere(
    kind: str,
    where: str,
    store: Store,
    classify: Callable[..., Ended],
    ray_folder: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    secret = PASSWORD if kind == "password" else SIGNATURES[0]
    url = store.url("part-0.parquet", signature=None if kind == "password" else secret)
    ended = classify(url, "out", "--where", where)
    assert ended.code == 0, ended.err
    assert bulk_rows(tmp_path / "out").column("id").to_pylist() == list(range(60))
    plan = json.loads((tmp_path / "out" / "_plan.json").read_text())
    (path,) = [file["path"] for file in plan["files"]]
    host = f"127.0.0.1:{store.server_port}/part-0.parquet"
    assert path == (
        f"http://***@{host}" if kind == "password" else f"http://{host}?X-Amz-Expires=***&X-Amz-Signature=***"
    )
    assert (
        json.loads(pq.read_metadata(tmp_path / "out" / "part-0-00000.parquet").metadata[b"lorafleet"])["input_file"]
        == path
    )

    damaged = classify(url.replace("part-0", "none"), "other", "--where", where)
    assert damaged.code == 2
    assert "none.parquet" in damaged.err
    homes = list(tmp_path_factory.getbasetemp().glob("prefect*"))  # of the Prefect server, its database with it
    assert files_with("classify-datasets", *homes)  # what is looked for would be found
    assert files_with(secret, tmp_path, ray_folder, *homes) == []


def test_a_file_with_a_new_signature_is_the_same_file(
    store: Store, classify: Callable[..., Ended], tmp_path: Path
) -> None:
    first, second = (store.url("part-0.parquet", signature=signature) for signature in SIGNATURES)
    assert classify(first, "out").code == 0
    again = classify(second, "out")
    assert again.code == 0, again.err
    assert "nothing was left to do" in again.out
    assert sum(SIGNATURES[1] in path for path in store.asked)


def test_a_signature_that_is_refused_is_one_message_without_it(
    store: Store, classify: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = classify(store.url("part-0.parquet", signature="third-signature-of-nobody"), "out")
    assert ended.code == 2, ended.err
    assert "X-Amz-Signature=***" in ended.err
    assert "Traceback" not in ended.err
    assert files_with("third-signature-of-nobody", tmp_path) == []


def test_what_prefect_keeps_of_a_job_is_the_address_without_the_secret(
    store: Store, classify: Callable[..., Ended], prefect_api: str, tmp_path: Path
) -> None:
    assert classify(store.url("part-0.parquet"), "out").code == 0
    api = Api(prefect_api)
    parameters = api.get(f"/flow_runs/{api.newest_flow_run('classify-datasets')}")["parameters"]
    assert parameters["request"]["source"] == f"http://***@127.0.0.1:{store.server_port}/part-0.parquet"


def test_a_request_holds_no_secret_however_it_is_made() -> None:
    request = BulkRequest(
        source="https://u:hunter2@h/a.parquet", output="s3://b/o", adapters=("A=https://u:hunter2@h/",)
    )
    again = BulkRequest.model_validate_json(request.model_dump_json())
    assert again == request
    assert "hunter2" not in repr(request) + request.model_dump_json()
    assert reveal(again.source) == "https://u:hunter2@h/a.parquet"


def test_a_config_and_a_schedule_take_no_secret(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    for line in ('[data]\nmirror = "https://u:hunter2@h/"', '[encoder]\nname = "https://h/?token=hunter2"'):
        config.write_text(f'{line}\n[[mteb_tasks]]\nname = "A"\n', encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_config(str(config))
        assert "***" in str(caught.value)
        assert "hunter2" not in str(caught.value)
    schedules = tmp_path / "schedules.yaml"
    schedules.write_text(
        "deployments:\n- {name: a, entrypoint: a.b, work_pool: {name: p}, parameters: {source: '{{ $LAKE }}'}}\n",
        encoding="utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAKE", "https://u:hunter2@h/")
        with pytest.raises(ConfigError, match=r"https://\*\*\*@h/") as refused:
            read_deployments(schedules)
    assert "hunter2" not in str(refused.value)
