"""The browser page: the files of `chatserve/static`, read once when the application is made.

Only these exact paths exist, so there is no path to traverse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

STATIC_DIRECTORY = Path(__file__).parent.parent / "static"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def page_routes(directory: Path = STATIC_DIRECTORY) -> list[Route]:
    """A route for each file under `directory` with a known type; `index.html` is `/`."""
    files = [path for path in sorted(directory.rglob("*")) if path.suffix in MEDIA_TYPES]
    return [_route(directory, path) for path in files]


def _route(directory: Path, path: Path) -> Route:
    name = path.relative_to(directory).as_posix()
    url_path = "/" if name == "index.html" else f"/{name}"
    return Route(url_path, _endpoint(path.read_bytes(), MEDIA_TYPES[path.suffix]), methods=["GET"])


def _endpoint(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def serve_file(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return serve_file
