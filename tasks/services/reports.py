"""HTTP server of the run store's reports on loopback, so that the Prefect UI can link them.

Started by ``python -m tasks.services.reports FOLDER PORT``. It is read only. It serves a few types of files, and
neither dot folders nor links that lead outside of the store.
"""

from __future__ import annotations

import mimetypes
import os
import sys
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

_TYPES = (".html", ".json", ".md", ".png", ".parquet")
_FIRST_PAGE = "history.html"


def serve(folder: Path, port: int) -> None:
    """Serve the folder on loopback until the process ends."""
    mimetypes.add_type("text/plain", ".md")
    mimetypes.add_type("application/vnd.apache.parquet", ".parquet")
    # A page of another site can have its own name resolve to loopback, and asks under that name.
    ourselves = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    app = Starlette(routes=[Mount("/", _Reports(directory=folder))], middleware=[ourselves])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


class _Reports(StaticFiles):
    """Files of the listed types, outside of dot folders."""

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        """Find a file; the second value is None if it does not exist or is not served."""
        asked = _FIRST_PAGE if path == "." else path
        name, status = super().lookup_path(asked)  # follows links, and finds nothing outside of the folder
        parts = (*Path(asked).parts, *Path(os.path.relpath(name, os.path.realpath(str(self.directory)))).parts)
        is_served = Path(name).suffix in _TYPES and not any(part.startswith(".") for part in parts)
        return (name, status) if is_served else ("", None)

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        """The file, whose type a browser must not guess."""
        response = super().file_response(*arguments, **options)
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
