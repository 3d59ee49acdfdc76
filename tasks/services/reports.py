"""HTTP server of the run store's reports on loopback, so that the Prefect UI can link them.

Started by ``python -m tasks.services.reports FOLDER PORT``. It is read only. It serves a few types of files, and
neither dot folders nor links that lead outside of the store.
"""

from __future__ import annotations

import shutil
import sys
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".md": "text/plain; charset=utf-8",
    ".png": "image/png",
    ".parquet": "application/vnd.apache.parquet",
}
_FIRST_PAGE = "history.html"
_LOOPBACK = {"127.0.0.1", "localhost"}


def serve(folder: Path, port: int) -> None:
    """Serve the folder on loopback until the process ends."""
    ThreadingHTTPServer(("127.0.0.1", port), partial(_Reports, folder=folder.resolve())).serve_forever()


class _Reports(BaseHTTPRequestHandler):
    def __init__(self, *arguments: object, folder: Path) -> None:
        self._folder = folder
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        file = self._file()
        # A foreign web page whose host name resolves to loopback sends that name as Host (DNS rebinding).
        if file is None or (self.headers.get("Host") or "").partition(":")[0] not in _LOOPBACK:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with file.open("rb") as content:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", _TYPES[file.suffix])
            self.send_header("Content-Length", str(file.stat().st_size))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            shutil.copyfileobj(content, self.wfile)

    def _file(self) -> Path | None:
        requested = unquote(urlsplit(self.path).path).strip("/") or _FIRST_PAGE
        try:
            file = (self._folder / requested).resolve()
            inside = file.relative_to(self._folder)
        except ValueError:  # outside, or a null byte
            return None
        hidden = any(part.startswith(".") for part in (*requested.split("/"), *inside.parts))
        return file if not hidden and file.suffix in _TYPES and file.is_file() else None


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
